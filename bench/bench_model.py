"""Whole prompted model, inference: images in, class scores out, each implementation beside timm's un-prompted forward.

    pytest bench/bench_model.py --benchmark-only

Shapes: BEiT-S sized blocks (384 wide, 6 heads, 4 deep) at 224 on a CPU so that a run takes seconds, BEiT-B/16 on a GPU.
Every implementation is checked against the fp64 reference before it is timed; a wrong one is an error, not a number.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timm.models.beit import Beit
from torch import nn

from vptm import PromptedBEiT

CUDA = torch.cuda.is_available()
SHAPE = {"embed_dim": 768, "depth": 12, "num_heads": 12} if CUDA else {"embed_dim": 384, "depth": 4, "num_heads": 6}
BATCH = 64 if CUDA else 4
DEVICE = "cuda" if CUDA else "cpu"


def _random_beit() -> Beit:
    torch.manual_seed(0)
    beit = Beit(
        num_classes=0,
        global_pool="token",
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        init_values=0.1,
        **SHAPE,
    )
    for name, parameter in beit.named_parameters():
        if "table" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return beit


def _prompted(mode: str, length: int, impl: str) -> PromptedBEiT:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(_random_beit(), 100, prompt_mode=mode, prompt_length=length, impl=impl)
    return model.eval()


@pytest.mark.parametrize("length", [10, 100])
@pytest.mark.parametrize("mode", ["shallow", "deep"])
@pytest.mark.parametrize("impl", ["timm without prompts", "reference", "auto"])
def bench_inference(benchmark: BenchmarkFixture, impl: str, mode: str, length: int) -> None:
    """Forward of one batch; `pytest` groups the implementations of one setting so that they stand side by side."""
    benchmark.group = f"{mode} prompts, P={length}, batch {BATCH}, {DEVICE}"
    images = torch.randn(BATCH, 3, 224, 224)
    if impl == "timm without prompts":
        model: nn.Module = _random_beit().eval()
        expected = copy.deepcopy(model).double()(images.double())
    else:
        model = _prompted(mode, length, impl)
        oracle = copy.deepcopy(model).double()
        oracle.impl = "reference"
        with torch.inference_mode():
            expected = oracle(images.double())
    model, images = model.to(DEVICE), images.to(DEVICE)

    def run() -> torch.Tensor:
        out = model(images)
        if CUDA:
            torch.cuda.synchronize()
        return out

    with torch.inference_mode():
        error = (run().double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error < 1e-3, f"{impl} differs from the fp64 reference by {error:.1e}: not timed"
        benchmark(run)
