"""A training step of a prompted BEiT-B/16 at 224: images in, gradients of prompts and classifier out.

    pytest bench/bench_training_step.py --benchmark-only              # batch 8 on a CPU: a minute
    pytest bench/bench_training_step.py --benchmark-only --grid full  # batch 32 on a CPU

vptm against the same frozen blocks with the prompts concatenated (scaled_dot_product_attention, position bias built per
block), on a GPU compiled as well in the settings that come first. Gradients are within tolerance of the fp64 reference
before anything is timed. `extra_info` holds the ratio of interleaved steps, the bytes each keeps between forward and
backward (weights, and what is derived from them once, left out), and the most each holds at a time during a step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import lru_cache
from itertools import product

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from bench import peers, timing
from bench.bench_model import Setting, _backbone, _concatenate, work
from vptm import PromptedBEiT

DEVICE, FULL = timing.selection.device, timing.selection.full
CUDA = DEVICE == "cuda"
BATCH = 64 if CUDA else 32 if FULL else 8
CLASSES = 100
# without prompts the classifier alone is learned
PROMPTS = [("deep", 100), ("shallow", 10), ("deep", 50), ("deep", 10), ("no", 0)] if FULL else [("deep", 100)]
SETTINGS = list(product((Setting(*each, BATCH) for each in PROMPTS), timing.selection.dtypes))
FIRST = [setting for setting, _ in SETTINGS[: 2 * len(timing.selection.dtypes)]]
PEERS = {"concatenation": timing.Peer(lambda: None), **peers.COMPILED}

Gradients = tuple[Tensor, ...]


@lru_cache(maxsize=1)
def _model(setting: Setting, dtype: torch.dtype) -> PromptedBEiT:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(
            copy.deepcopy(_backbone(setting.size, setting.side)),
            CLASSES,
            prompt_mode="deep" if setting.mode == "no" else setting.mode,
            prompt_length=setting.length,
            readout="cls",
            verbalizer="linear",
            token_activation="hidden",
        )
    return model.to(DEVICE, dtype).train()


def _batch(size: int, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(1))
    return images.to(DEVICE, dtype), torch.arange(size, device=DEVICE) % CLASSES


def _learned(model: PromptedBEiT) -> list[Tensor]:
    return [parameter for parameter in model.trainable_parameters() if parameter.numel()]


def _loss(model: PromptedBEiT, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.verbalizer(hidden, model.lm_head).float(), labels)


def _steps(setting: Setting, dtype: torch.dtype) -> dict[str, Callable[[], Gradients]]:
    """vptm and every peer that is here, was asked for and belongs to this setting."""
    model, (images, labels) = _model(setting, dtype), _batch(setting.batch, setting.side, dtype)
    learned = _learned(model)
    hidden: dict[str, Callable[[], Tensor]] = {
        "vptm": lambda: model.forward_hidden(images),
        "concatenation": lambda: _concatenate(model, images),
    }
    if CUDA and setting in FIRST:
        hidden |= peers.compiled(hidden["concatenation"])

    def step(run: Callable[[], Tensor]) -> Callable[[], Gradients]:
        return lambda: torch.autograd.grad(_loss(model, run(), labels), learned)

    return {name: step(run) for name, run in hidden.items() if name == "vptm" or name in timing.present(PEERS)}


@lru_cache(maxsize=1)
def _exact(setting: Setting, dtype: torch.dtype) -> Gradients:
    """Of the fp64 reference, two images at a time: it has no room for more."""
    oracle = copy.deepcopy(_model(setting, dtype)).double()
    oracle.impl = "reference"
    images, labels = _batch(setting.batch, setting.side, dtype)
    parts = []
    for few, their in zip(images.split(2), labels.split(2)):
        loss = F.cross_entropy(oracle(few.double()), their, reduction="sum") / len(images)
        parts.append(torch.autograd.grad(loss, _learned(oracle)))
    return tuple(torch.stack(part).sum(0) for part in zip(*parts))


def _check(setting: Setting, dtype: torch.dtype) -> timing.Check:
    exact, tolerance = _exact(setting, dtype), 1e-4 if dtype == torch.float32 else 5e-2

    def check(name: str, found: Gradients) -> None:
        for gradient, expected in zip(found, exact, strict=True):
            error = (gradient.double() - expected).abs().max() / expected.abs().max()
            assert error <= tolerance, f"{name}: gradients differ from the fp64 reference by {error:.1e}"

    return check


def _saved_bytes(model: PromptedBEiT, step: Callable[[], Gradients]) -> int:
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model._encoder.constants())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


@pytest.mark.parametrize("implementation", ["vptm", "concatenation"])
@pytest.mark.parametrize(("setting", "dtype"), SETTINGS, ids=timing.label)
def bench_training_step(benchmark: BenchmarkFixture, implementation: str, setting: Setting, dtype: torch.dtype) -> None:
    mode, length, batch, size, side = setting
    name = f"BEiT-{size}/16 at {side}"
    benchmark.group = f"training step, {name}, {mode} prompts, P={length}, batch {batch}, {dtype}, {DEVICE}"
    benchmark.extra_info |= {"model": name, "mode": mode, "prompt_length": length, "batch": batch}
    steps = _steps(setting, dtype)
    found = timing.report(
        benchmark,
        implementation,
        steps,
        check=_check(setting, dtype),
        work=work(setting, dtype, step=True),
        device=DEVICE,
        dtype=dtype,
        held=("vptm", "concatenation"),
        table=(5, 1) if CUDA else (1, 0),
        rounds=7 if CUDA else 3,
        warmup=2 if CUDA else 0,
    )
    if found:
        model, peak = _model(setting, dtype), benchmark.extra_info["peak extra bytes"]
        saved = {name: _saved_bytes(model, steps[name]) for name in peak}
        for what, sizes in (("saved", saved), ("peak", peak)):
            if "concatenation" in sizes:
                benchmark.extra_info[f"{what} over concatenation"] = round(sizes["vptm"] / sizes["concatenation"], 3)
        benchmark.extra_info["bytes saved for backward"] = saved
