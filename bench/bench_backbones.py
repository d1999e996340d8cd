"""Backbones of other kinds with deep prompts, inference: images in, the read-out row out.

    pytest bench/bench_backbones.py --benchmark-only
    pytest bench/bench_backbones.py --benchmark-only --settings eva02_base_patch14_224

Base models of timm at 224 with random weights: EVA-02 (rotary positions, SwiGLU, a norm inside attention and MLP),
DINOv3 (rotary positions, registers) and ViT. Beside vptm, in turns, run timm's own blocks with the prompts concatenated
and timm's forward without any prompt. Whoever is compared is checked against the textbook path in float64 first.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import pytest
import timm
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import peers, timing
from vptm import PromptedViT

DEVICE = timing.selection.device
CUDA, TINY = DEVICE == "cuda", timing.selection.tiny
LENGTH = 100
# what every kind becomes in a rehearsal
SMALL = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
EAGER = (peers.TIMM, peers.CONCATENATION)
PEERS = {name: peers.PEERS[name] for name in EAGER}


class Setting(NamedTuple):
    name: str
    batch: int

    def __str__(self) -> str:
        return f"{self.name}-{self.batch}"


NAMES = ("eva02_base_patch14_224", "vit_base_patch16_dinov3", "vit_base_patch16_224")
SETTINGS = [Setting(name, batch) for batch in ((64, 1) if CUDA else (4,)) for name in NAMES]


@lru_cache(maxsize=1)
def _model(name: str, dtype: torch.dtype) -> PromptedViT:
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, **(SMALL if TINY else {"img_size": 224}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedViT(backbone, 100, prompt_mode="deep", prompt_length=LENGTH, readout="cls")
    for parameter in model.backbone.parameters():
        if parameter.ndim == 1:  # norms, biases and layer scales as training leaves them: none is one or zero
            nn.init.normal_(parameter, 0.2 if parameter.mean() < 0.5 else 1.0, 0.1)
    return model.to(DEVICE, dtype).eval()


@lru_cache(maxsize=1)
def _images(setting: Setting, dtype: torch.dtype) -> Tensor:
    side = SMALL["img_size"] if TINY else 224
    return torch.randn(setting.batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def _without_prompts(model: PromptedViT, images: Tensor) -> Tensor:
    features: Tensor = model.backbone.forward_features(images)
    return features[:, 0]


def _textbook(model: PromptedViT, images: Tensor) -> Tensor:
    """Prompts as rows of timm's own blocks, which choose their attention themselves."""
    plain = copy.copy(model)
    plain.impl = "reference"
    return plain.forward_hidden(images)


def _runs(setting: Setting, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    model, images = _model(setting.name, dtype), _images(setting, dtype)
    return {
        peers.OURS: lambda: model.forward_hidden(images),
        peers.TIMM: lambda: _without_prompts(model, images),
        peers.CONCATENATION: lambda: _textbook(model, images),
    }


@lru_cache(maxsize=2)
@torch.inference_mode()
def _exact(setting: Setting, dtype: torch.dtype, function: str) -> tuple[Tensor, Tensor]:
    """What the definition gives for the first two images, in float64 and in the dtype that is timed."""
    own = copy.deepcopy(_model(setting.name, dtype))
    run = _without_prompts if function == peers.TIMM else _textbook
    images = _images(setting, dtype)[:2]
    return run(copy.deepcopy(own).double(), images.double()), run(own, images)


def _check(setting: Setting, dtype: torch.dtype) -> timing.Check:
    def check(name: str, found: Tensor) -> None:
        timing.finite(name, found)
        exact, eager = _exact(setting, dtype, peers.declared(name).function)
        timing.within_budget([exact], [eager], [timing.FACTOR])(name, found[:2])

    return check


def work(setting: Setting, dtype: torch.dtype) -> timing.Work:
    """Weights and images once, and the products of the least known way, which is that of vptm."""
    model, images = _model(setting.name, dtype), _images(setting, dtype)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.forward_hidden(images)
    held = sum(parameter.numel() for parameter in model.backbone.parameters()) + images.numel()
    return timing.Work(held * dtype.itemsize, counter.get_total_flops())


@pytest.mark.parametrize("implementation", [peers.OURS, *EAGER])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", timing.selection.dtypes, ids=timing.label)
@torch.inference_mode()
def bench_backbones(benchmark: BenchmarkFixture, implementation: str, setting: Setting, dtype: torch.dtype) -> None:
    benchmark.group = f"inference, {setting.name}, deep prompts, P={LENGTH}, batch {setting.batch}, {dtype}, {DEVICE}"
    benchmark.extra_info |= {"batch": setting.batch, "shape": setting.name, "prompt_length": LENGTH}
    runs = _runs(setting, dtype)
    present = timing.present(PEERS)
    timing.report(
        benchmark,
        implementation,
        {name: run for name, run in runs.items() if name == peers.OURS or name in present},
        check=_check(setting, dtype),
        work=work(setting, dtype),
        device=DEVICE,
        dtype=dtype,
        table=(5, 1) if CUDA else (1, 0),
        rounds=7 if CUDA else 5,
        warmup=2 if CUDA else 0,
    )
