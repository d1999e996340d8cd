"""A training step of a prompted BEiT-B/16 at 224: images in, gradients of prompts and classifier out.

    pytest bench/bench_training_step.py --benchmark-only              # batch 8 on a CPU: a minute
    pytest bench/bench_training_step.py --benchmark-only --grid full  # batch 32 on a CPU

vptm against the same frozen blocks with the prompts concatenated (scaled_dot_product_attention, position bias built per
block), on a GPU compiled as well. Gradients are within tolerance of the fp64 reference before they are timed, compiled
ones of the eager ones. `extra_info` holds the ratio
of interleaved steps, the bytes each keeps between forward and backward (weights, and what is derived from them once,
left out), and the most each holds at a time during a step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from bench import peers, timing
from bench.bench_model import _backbone, _concatenate
from vptm import PromptedBEiT

DEVICE = timing.selection.device
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BATCH = (32 if timing.selection.full else 8) if DEVICE == "cpu" else 64
TOLERANCE = 5e-2 if DEVICE == "cuda" else 1e-4
SETTINGS = [("deep", 100), ("deep", 10), ("shallow", 10)] if timing.selection.full else [("deep", 100)]
CLASSES = 100
PEERS = {"concatenation": timing.Peer(lambda: None), **{name: peers.PEERS[name] for name in peers.MODES}}
BOTH = ("vptm", "concatenation")
SLOW = "torch.compile max-autotune"  # minutes: when asked for by name

Gradients = tuple[Tensor, ...]


@cache
def _model(mode: str, length: int) -> PromptedBEiT:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(
            copy.deepcopy(_backbone()),
            CLASSES,
            prompt_mode=mode,
            prompt_length=length,
            readout="cls",
            verbalizer="linear",
            token_activation="hidden",
        )
    return model.to(DEVICE, DTYPE).train()


def _batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 224, 224, generator=generator)
    return images.to(DEVICE, DTYPE), torch.arange(size, device=DEVICE) % CLASSES


def _loss(model: PromptedBEiT, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.verbalizer(hidden, model.lm_head).float(), labels)


def _steps(model: PromptedBEiT, size: int, compiled: bool = False) -> dict[str, Callable[[], Gradients]]:
    images, labels = _batch(size)
    learned = list(model.trainable_parameters())

    def step(hidden: Callable[[], Tensor]) -> Callable[[], Gradients]:
        return lambda: torch.autograd.grad(_loss(model, hidden(), labels), learned)

    found = {
        "vptm": step(lambda: model.forward_hidden(images)),
        "concatenation": step(lambda: _concatenate(model, images)),
    }
    if compiled:
        forms = peers.compiled(lambda: _concatenate(model, images))
        found |= {n: step(run) for n, run in forms.items() if n != SLOW or SLOW in timing.selection.peers}
    return found


def _like(expected: Gradients) -> timing.Check:
    def check(name: str, found: Gradients) -> None:
        for ours, theirs in zip(found, expected):
            error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
            assert error <= TOLERANCE, f"{name}: gradients differ from the eager ones by {error:.1e}"

    return check


def _check(model: PromptedBEiT) -> None:
    """The gradients of two images against the fp64 reference."""
    oracle = copy.deepcopy(model).double()
    oracle.impl = "reference"
    images, labels = _batch(2)
    loss = F.cross_entropy(oracle(images.double()), labels)
    exact = torch.autograd.grad(loss, list(oracle.trainable_parameters()))
    for name, step in _steps(model, 2).items():
        for found, expected in zip(step(), exact):
            error = (found.double() - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE, f"{name}: gradients differ from the fp64 reference by {error:.1e}: not timed"


def _saved_bytes(model: PromptedBEiT, step: Callable[[], Gradients]) -> int:
    step()
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


@pytest.mark.parametrize(("mode", "length"), SETTINGS, ids=[f"{mode}-{length}" for mode, length in SETTINGS])
def bench_training_step(benchmark: BenchmarkFixture, mode: str, length: int) -> None:
    benchmark.group = f"training step, BEiT-B/16 at 224, {mode} prompts, P={length}, batch {BATCH}, {DTYPE}, {DEVICE}"
    model = _model(mode, length)
    _check(model)
    steps = _steps(model, BATCH, compiled=(mode, length) in SETTINGS[:2])
    check = _like(steps["concatenation"]()) if len(steps) > 2 else None
    saved = {name: _saved_bytes(model, step) for name, step in steps.items() if name in BOTH}
    peak = {name: timing.peak_extra_bytes(step, DEVICE) for name, step in steps.items() if name in BOTH}
    rounds = 7 if DEVICE == "cuda" else 3
    found = timing.compare(steps, check=check, rounds=rounds, warmup=0 if DEVICE == "cpu" else 2, device=DEVICE)
    benchmark.extra_info |= {
        "model": "BEiT-B/16 at 224",
        "implementation": "vptm",
        "mode": mode,
        "prompt_length": length,
        "batch": BATCH,
        "dtype": str(DTYPE),
        "device": DEVICE,
        "threads": torch.get_num_threads(),
        "bytes saved for backward": saved,
        "saved over concatenation": round(saved["vptm"] / saved["concatenation"], 3),
        "peak bytes": peak,
        "peak over concatenation": round(peak["vptm"] / peak["concatenation"], 3),
    } | found.info()
    benchmark.pedantic(timing.finished(steps["vptm"], DEVICE), rounds=1)
