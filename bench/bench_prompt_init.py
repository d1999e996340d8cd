"""Starting prompts as tokens of the frozen model (SPT, arXiv:2402.02382): draw first, forward what was drawn.

    pytest bench/bench_prompt_init.py --benchmark-only

The peer does what the published code does: forward the whole training set, keep every token of every layer, draw
P of them. Both are checked before they are timed: every prompt must be a token (or for "mean" a window's mean) that the
frozen model gives for one of the images. On a GPU BEiT-B/16 at 224 and 1024 images, on a CPU the built-in model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timm.models.beit import Beit
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bench import timing
from vptm import PromptedBEiT, init_prompts
from vptm.methods.spt import layer_tokens, pooling_windows

DEVICE = timing.selection.device
# a CPU has no time for these
FULL = DEVICE == "cuda" and timing.selection.full
DTYPE = torch.float32
PROMPTS, IMAGES, BATCH = 10, 64 if timing.selection.tiny else 1024 if FULL else 512, 16
PEERS = {"every image forwarded": timing.Peer(lambda: None)}


@cache
def _model() -> PromptedBEiT:
    torch.manual_seed(0)
    backbone = Beit(num_classes=0, use_abs_pos_emb=False, use_rel_pos_bias=True) if FULL else "builtin"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(backbone, 10, prompt_mode="deep", prompt_length=PROMPTS, readout="cls", vocab_size=64)
    return model.eval().to(DEVICE)


@cache
def _loader() -> DataLoader[tuple[Tensor, ...]]:
    shape = (3, 224, 224) if FULL else (1, 28, 28)
    images = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.arange(IMAGES) % 10), batch_size=BATCH)


@torch.no_grad()
def every_token(method: str) -> list[Tensor]:
    """(rows, C) of every layer: all tokens of all images, or the means of their windows."""
    model = _model()
    layers = list(range(len(model.prompts.weight)))
    windows = pooling_windows(model.num_patches, PROMPTS)
    kept: list[list[Tensor]] = [[] for _ in layers]
    for images, _ in _loader():
        for layer, tokens in zip(layers, layer_tokens(model, images.to(DEVICE), layers)):
            rows = tokens if method == "random" else torch.stack([tokens[:, w].mean(1) for w in windows], 1)
            kept[layer].append(rows.flatten(0, 1))
    return [torch.cat(rows) for rows in kept]


def _published(method: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [rows[torch.randperm(len(rows), generator=generator)[:PROMPTS].to(DEVICE)] for rows in every_token(method)]
    )


def _ours(method: str) -> Tensor:
    init_prompts(_model(), _loader(), method, progress=False)
    return _model().prompts.weight.detach().clone()


@lru_cache(maxsize=1)
def each_is_a_token(method: str) -> Callable[[str, Tensor], None]:
    every = every_token(method)

    def check(name: str, prompts: Tensor) -> None:
        for layer, (rows, tokens) in enumerate(zip(prompts, every)):
            # other batch sizes round differently
            nearest = torch.cdist(rows.double(), tokens.double()).min(1).values
            far = nearest.max().item() / tokens.double().norm(dim=1).max().item()
            assert far < 1e-4, f"{name}: a prompt of layer {layer} is no token of the frozen model ({far:.1e} away)"
            # images are drawn with replacement, so a token can come twice, but not over and over
            assert len(rows.unique(dim=0)) > PROMPTS // 2, f"{name}: the prompts of layer {layer} are copies"

    return check


def _work() -> timing.Work:
    """What P images of its own for every layer cost, drawn first: L (L-1) / 2 blocks of 24 N C² + 4 N² C operations and
    L patch embeddings each; weights and those images are read once."""
    backbone = _model().backbone
    blocks, embed = backbone.blocks, backbone.patch_embed.proj
    depth, width, patches = len(blocks), embed.weight.shape[0], _model().num_patches
    block = 24 * (patches + 1) * width**2 + 4 * (patches + 1) ** 2 * width
    operations = PROMPTS * (depth * (depth - 1) // 2 * block + depth * 2 * patches * embed.weight.numel())
    elements = sum(p.numel() for p in blocks.parameters()) + embed.weight.numel()
    elements += PROMPTS * depth * patches * embed.weight[0].numel()
    return timing.Work(elements * DTYPE.itemsize, operations)


@pytest.mark.parametrize("implementation", timing.rows(PEERS))
@pytest.mark.parametrize("method", ["random", "mean"])
def bench_prompt_init(benchmark: BenchmarkFixture, implementation: str, method: str) -> None:
    benchmark.group = f"prompt initialisation, {method}, P={PROMPTS}, {IMAGES} images, {DEVICE}"
    runs: dict[str, timing.Run] = {"vptm": lambda: _ours(method), "every image forwarded": lambda: _published(method)}
    timing.report(
        benchmark,
        implementation,
        {name: run for name, run in runs.items() if name == "vptm" or name in timing.present(PEERS)},
        check=each_is_a_token(method),
        work=_work(),
        device=DEVICE,
        dtype=DTYPE,
        table=(3 if implementation == "vptm" else 1, 0),
        rounds=3,
        warmup=0,
    )
