"""A whole prompted BEiT-B/16 at 224, inference: images in, class scores out.

    pytest bench/bench_model.py --benchmark-only

Three implementations of one setting share a group: timm's own forward without any prompt, the same blocks with the
prompts concatenated (scaled_dot_product_attention, position bias built per block, as eager code does it), and vptm. The
last two are checked against the fp64 reference before they are timed. The ratios in `extra_info` come from interleaved
runs, so that drift cancels.

Batch 4 on a CPU: the smallest at which linear layers, not overhead, take the time. Batch 64 in bf16 on a GPU.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn import functional as F

from vptm import PromptedBEiT
from vptm.reference import block_forward, sdpa

CUDA = torch.cuda.is_available()
BATCH, DEVICE, DTYPE = (64, "cuda", torch.bfloat16) if CUDA else (4, "cpu", torch.float32)
TOLERANCE = 2e-2 if CUDA else 1e-4
SETTINGS = [("deep", 100), ("deep", 50), ("deep", 10), ("shallow", 100), ("shallow", 10), ("no", 0)]
PAIRED_ROUNDS = 7


@cache
def _backbone() -> Beit:
    torch.manual_seed(0)
    beit = Beit(num_classes=0, global_pool="token", use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    for name, parameter in beit.named_parameters():
        if "table" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return beit.eval()


def _images() -> Tensor:
    return torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@cache
def _model(mode: str, length: int) -> tuple[PromptedBEiT, Tensor]:
    """The model, and the read-out rows its fp64 reference gives for two of the images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(
            copy.deepcopy(_backbone()),
            100,
            prompt_mode="deep" if mode == "no" else mode,
            prompt_length=length,
            readout="cls",
            token_activation="hidden",
        ).eval()
    oracle = copy.deepcopy(model).double()
    oracle.impl = "reference"
    with torch.inference_mode():
        expected = oracle.forward_hidden(_images()[:2].double())
    return model.to(DEVICE, DTYPE), expected


def _implementations(mode: str, length: int) -> dict[str, Callable[[], Tensor]]:
    model, _ = _model(mode, length)
    images = _images().to(DEVICE, DTYPE)
    plain = copy.deepcopy(_backbone()).to(DEVICE, DTYPE)
    return {
        "timm without prompts": lambda: plain(images),
        "concatenation": lambda: _concatenate(model, images),
        "vptm": lambda: model.forward_hidden(images),
    }


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


def _timed(run: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


@pytest.mark.parametrize(("mode", "length"), SETTINGS, ids=[f"{mode}-{length}" for mode, length in SETTINGS])
@pytest.mark.parametrize("implementation", ["timm without prompts", "concatenation", "vptm"])
@torch.inference_mode()
def bench_inference(benchmark: BenchmarkFixture, implementation: str, mode: str, length: int) -> None:
    benchmark.group = f"inference, BEiT-B/16 at 224, {mode} prompts, P={length}, batch {BATCH}, {DTYPE}, {DEVICE}"
    implementations = _implementations(mode, length)
    run = implementations[implementation]
    if implementation != "timm without prompts":
        expected = _model(mode, length)[1]
        error = (run()[:2].double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error <= TOLERANCE, f"{implementation} differs from the fp64 reference by {error:.1e}: not timed"
    benchmark.extra_info |= {
        "mode": mode,
        "prompt_length": length,
        "batch": BATCH,
        "dtype": str(DTYPE),
        "device": DEVICE,
    }
    benchmark.extra_info |= {"implementation": implementation, "threads": torch.get_num_threads()}
    benchmark.pedantic(lambda: _timed(run), rounds=5, warmup_rounds=1)
    if implementation == "vptm":
        times: dict[str, list[float]] = {name: [] for name in implementations}
        for _ in range(PAIRED_ROUNDS):
            for name, peer in implementations.items():
                times[name].append(_timed(peer))
        for name in ("timm without prompts", "concatenation"):
            ratios = [peer / own for peer, own in zip(times[name], times["vptm"])]
            benchmark.extra_info[f"speed-up over {name}"] = round(statistics.median(ratios), 3)
