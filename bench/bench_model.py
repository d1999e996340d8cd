"""A whole prompted BEiT, inference: images in, read-out rows out.

    pytest bench/bench_model.py --benchmark-only
    pytest bench/bench_model.py --benchmark-only --peers "torch.compile max-autotune" -k "deep-100-64"

Implementations of one setting share a group: timm's own forward without any prompt, the same blocks with the prompts
concatenated (scaled_dot_product_attention, position bias built per block, as eager code does it), and vptm. vptm is
compared in turns with those and, on a GPU, with deep prompts as cached keys and values that every block concatenates,
which is what PEFT's prefix tuning does; in the settings that come first also with the concatenated form compiled and
with transformers' BEiT without prompts. For few images on a GPU a second comparison has both sides in CUDA graphs.
Compiling with max-autotune takes minutes and happens when asked for by name. Whoever takes prompts is checked against
the fp64 reference first.

BEiT-B/16 at 224 and batch 4 on a CPU: the smallest batch at which linear layers, not overhead, take the time. On a GPU
every size, resolution, number of prompts and batch, most important first, so that a run cut short has those.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache, lru_cache, partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn import functional as F

from bench import peers, timing
from vptm import PromptedBEiT
from vptm.reference import block_forward, sdpa

DEVICE = timing.selection.device
CUDA = DEVICE == "cuda"
# channels, blocks, heads
SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16)}
EAGER = ("timm without prompts", "concatenation")
PREFIX = "PEFT-style prefix"
IN_GRAPHS = " (CUDA graphs)"
PEERS = {
    **{name: timing.Peer(lambda: None) for name in (*EAGER, PREFIX)},
    "concatenation" + IN_GRAPHS: timing.Peer(lambda: None, needs=("cuda",)),
    **peers.PEERS,
}


class Setting(NamedTuple):
    mode: str
    length: int
    batch: int
    size: str = "B"
    side: int = 224

    def __str__(self) -> str:
        larger = "" if (self.size, self.side) == ("B", 224) else f"-{self.size}{self.side}"
        return f"{self.mode}-{self.length}-{self.batch}{larger}"


def _settings() -> list[tuple[Setting, torch.dtype]]:
    """With every dtype, most important first."""
    prompts = [("deep", 100), ("deep", 50), ("deep", 10), ("shallow", 100), ("shallow", 10), ("no", 0)]
    dtypes = timing.selection.dtypes
    if not timing.selection.full:
        return list(product([Setting(*each, 4) for each in prompts], dtypes))
    first = [Setting(*each, 64) for each in (("deep", 100), ("shallow", 10), ("deep", 50), ("no", 0))]
    first += [Setting("deep", 100, batch) for batch in (1, 8)]
    every = [*prompts, ("deep", 200), ("shallow", 50), ("shallow", 200)]
    rest = [
        Setting(*each, batch, size, side)
        for (size, side), batch, each in product(product("BL", (224, 384)), (64, 1, 8, 256), every)
    ]
    rest = [setting for setting in rest if setting not in first]
    return [(setting, dtype) for part in (first, rest) for dtype in dtypes for setting in part]


SETTINGS = _settings()
# compiling takes half a minute each, and transformers' BEiT as long as the others on a CPU
FIRST = [setting for setting, _ in SETTINGS[: 2 if CUDA else 1]]


@cache
def _backbone(size: str = "B", side: int = 224) -> Beit:
    torch.manual_seed(0)
    width, depth, heads = SIZES[size]
    beit = Beit(
        img_size=side,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        global_pool="token",
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=0.1,
    )
    for name, parameter in beit.named_parameters():
        if "table" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return beit.eval()


@lru_cache(maxsize=1)
def _images(batch: int, side: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


# one at a time: the settings of a full grid together fill a GPU
@lru_cache(maxsize=1)
def _model(setting: Setting, dtype: torch.dtype) -> tuple[PromptedBEiT, Tensor]:
    """The model, and the read-out rows its fp64 reference gives for the first two of the images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(
            copy.deepcopy(_backbone(setting.size, setting.side)),
            100,
            prompt_mode="deep" if setting.mode == "no" else setting.mode,
            prompt_length=setting.length,
            readout="cls",
            token_activation="hidden",
        ).eval()
    oracle = copy.deepcopy(model).to(DEVICE).double()
    oracle.impl = "reference"
    with torch.inference_mode():
        expected = oracle.forward_hidden(_images(setting.batch, setting.side, dtype)[:2].double())
    return model.to(DEVICE, dtype), expected


def _runs(setting: Setting, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    model, images = _model(setting, dtype)[0], _images(setting.batch, setting.side, dtype)
    plain = copy.deepcopy(_backbone(setting.size, setting.side)).to(DEVICE, dtype)
    return {
        "vptm": lambda: model.forward_hidden(images),
        "timm without prompts": lambda: plain(images),
        "concatenation": lambda: _concatenate(model, images),
    }


def _check(setting: Setting, dtype: torch.dtype) -> timing.Check:
    expected = _model(setting, dtype)[1]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2

    def check(name: str, found: Tensor) -> None:
        if name == peers.TRANSFORMERS:
            peers.hugging_face_check(_images(setting.batch, setting.side, dtype), tolerance)(name, found)
        elif name != "timm without prompts":  # another function: it is there as the speed without prompts
            error = (found[:2].double() - expected).abs().max() / expected.abs().max().clamp(min=1)
            assert error <= tolerance, f"{name} differs from the fp64 reference by {error:.1e}"

    return check


def _peers(setting: Setting, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """vptm and everything that is here, was asked for and belongs to this setting."""
    found, present = _runs(setting, dtype), timing.present(PEERS)
    model, images = _model(setting, dtype)[0], _images(setting.batch, setting.side, dtype)
    first = setting in FIRST
    if setting.mode == "deep" and (CUDA or first):
        prefixes = _prefixes(model)
        found[PREFIX] = lambda: _with_prefixes(model, prefixes, images)
    if first and CUDA:
        found |= peers.compiled(found["concatenation"])
    if first and peers.TRANSFORMERS in present:
        found[peers.TRANSFORMERS] = _made_when_called(lambda: peers.hugging_face(images))
    return {name: run for name, run in found.items() if name == "vptm" or name in present}


def _made_when_called(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """A peer that cannot even be built is then refused like any other."""
    made = cache(make)
    return lambda: made()()


def _in_graphs(runs: dict[str, Callable[[], Tensor]], check: timing.Check, device: str = DEVICE) -> dict[str, object]:
    """For `extra_info`: vptm over concatenation, launches left out on both sides."""
    present = timing.present(PEERS)
    names = ["vptm", *(name for name in ("concatenation",) if name in runs and name + IN_GRAPHS in present)]
    graphs = {name + IN_GRAPHS: runs[name] for name in names}
    try:
        return timing.compare(graphs, "vptm" + IN_GRAPHS, check=check, device=device, graph=True).info()
    except RuntimeError as error:  # what was timed without graphs stands
        return {"refused": {"vptm" + IN_GRAPHS: timing.reason(error)}}


def _concatenate(model: PromptedBEiT, images: Tensor) -> Tensor:
    """What a careful user of timm writes: prompts after the patches, the bias of each block padded with zeros, SDPA."""
    backbone, prompts = model.backbone, model.prompts
    x = backbone.patch_embed(images)
    x = torch.cat([backbone.cls_token.expand(len(x), -1, -1), x], dim=1)
    tokens, length = x.shape[1], prompts.length
    for layer, block in enumerate(backbone.blocks):
        if length and (layer == 0 or prompts.mode == "deep"):
            x = torch.cat([x[:, :tokens], prompts.weight[layer].expand(len(x), -1, -1)], dim=1)
        bias = F.pad(block.attn._get_rel_pos_bias(), (0, length, 0, length))
        x = block_forward(block, x, bias, sdpa)
    return backbone.norm(x)[:, 0]


def _prefixes(model: PromptedBEiT) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (H, P, D) of the deep prompts of every block."""
    found = []
    for block, prompts in zip(model.backbone.blocks, model.prompts.weight.detach()):
        attn = block.attn
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        rows = F.linear(block.norm1(prompts), attn.qkv.weight, bias).unflatten(1, (3, attn.num_heads, -1))
        _, key, value = rows.permute(1, 2, 0, 3).contiguous()
        found.append((key, value))
    return found


def _with_prefixes(model: PromptedBEiT, prefixes: list[tuple[Tensor, Tensor]], images: Tensor) -> Tensor:
    """What PEFT's prefix tuning does: past keys and values, expanded to the batch and concatenated in every block."""
    backbone, length = model.backbone, model.prompts.length
    x = backbone.patch_embed(images)
    x = torch.cat([backbone.cls_token.expand(len(x), -1, -1), x], dim=1)
    for block, past in zip(backbone.blocks, prefixes):
        bias = F.pad(block.attn._get_rel_pos_bias(), (0, length))
        x = block_forward(block, x, bias, partial(_attention_to_past, *past))
    return backbone.norm(x)[:, 0]


def _attention_to_past(
    past_key: Tensor, past_value: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    batch = len(query)
    key = torch.cat([key, past_key.expand(batch, -1, -1, -1)], dim=2)
    value = torch.cat([value, past_value.expand(batch, -1, -1, -1)], dim=2)
    return sdpa(query, key, value, bias)


def work(setting: Setting, dtype: torch.dtype, step: bool = False) -> timing.Work:
    """Of B images of N tokens through L blocks with P prompts, C channels and H heads, the last block for its read-out
    row alone.

    Operations per image: patch embedding 2 (N-1) 768 C; L-1 blocks of 24 N C² + 4 N (N+P) C; the last one 24 C² +
    4 H N C + 4 P C: keys and values of deep prompts are cached. Shallow prompts are rows, T = N+P in place of N, which
    block 0 projects once for the batch. A training step projects prompts, 4 P C² per block and batch, and goes back
    once through every linear but the projection of image rows in block 0, and with five products for the two of
    attention.

    Bytes: weights and images once, and 24 C elements per row and block: input and output of its five steps, with
    residual sums and norms inside of them. A step reads the weights twice and moves 34 C elements more: gradients of
    the same, and 10 C that were kept.
    """
    mode, length, batch, size, side = setting
    width, depth, heads = SIZES[size]
    square, tokens = width**2, (side // 16) ** 2 + 1
    carried = length if mode == "shallow" else 0
    rows, keys = tokens + carried, tokens + length
    linear = 24 * (depth - 1) * rows * square - 6 * carried * square
    attention = (depth - 1) * rows * keys * width
    readout = 4 * heads * rows * width + 4 * (length - carried) * width
    once = 6 * carried * square
    weights, kept = (12 * depth * square + 768 * width), batch * (depth - 1) * rows * width
    moved = weights + 24 * kept + batch * (rows * width + 3 * side**2)
    operations = 2 * (tokens - 1) * 768 * width + linear + 4 * attention + 24 * square + readout
    if step and length:
        operations += linear - 6 * tokens * square + 10 * attention + 24 * square + 2 * readout
        once = 12 * carried * square + 8 * depth * (length - carried) * square
        moved += weights + 34 * kept
    return timing.Work(moved * dtype.itemsize, batch * operations + once)


@pytest.mark.parametrize("implementation", ["vptm", *EAGER])
@pytest.mark.parametrize(("setting", "dtype"), SETTINGS, ids=timing.label)
@torch.inference_mode()
def bench_inference(benchmark: BenchmarkFixture, implementation: str, setting: Setting, dtype: torch.dtype) -> None:
    mode, length, batch, size, side = setting
    name = f"BEiT-{size}/16 at {side}"
    benchmark.group = f"inference, {name}, {mode} prompts, P={length}, batch {batch}, {dtype}, {DEVICE}"
    benchmark.extra_info |= {"model": name, "mode": mode, "prompt_length": length, "batch": batch}
    ours, check = implementation == "vptm", _check(setting, dtype)
    runs = _peers(setting, dtype) if ours else _runs(setting, dtype)
    found = timing.report(
        benchmark,
        implementation,
        runs,
        check=check,
        work=work(setting, dtype),
        device=DEVICE,
        dtype=dtype,
        held=("vptm", *EAGER),
        table=(5, 1) if CUDA else (3 if ours else 1, 0),
        rounds=7 if CUDA else 5,
        warmup=2 if CUDA else 0,
    )
    if found:
        benchmark.extra_info["microseconds per image"] = round(1e6 * found.median("vptm") / batch, 2)
        if CUDA and batch <= 8:  # launches of few images take longer than their work
            benchmark.extra_info |= timing.merged(benchmark.extra_info, _in_graphs(runs, check))
