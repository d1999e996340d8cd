"""A training step of a prompted BEiT-B/16 at 224: images in, gradients of prompts and classifier or prototypes out.

    pytest bench/bench_training_step.py --benchmark-only              # batch 4 on a CPU
    pytest bench/bench_training_step.py --benchmark-only --grid full  # batch 32 as well

vptm against the same frozen blocks with the prompts concatenated (scaled_dot_product_attention, position bias built per
block) and with deep prompts as keys and values, projected once in every step and concatenated in every block, as PEFT's
prefix tuning has them. Settings with the mask row are VPTM's own: token head, projection and prototypes are part of the
step, and so they are what the package does by default. In the setting that comes first everybody is compiled as well,
and in a CUDA graph on a GPU. Gradients are checked against float64 before anything is timed, with as much error as the
definition makes in its dtype. On a CPU that multiplies bfloat16 it is timed beside float32. `extra_info` holds the
ratio of interleaved steps, the bytes each keeps between forward and backward (weights, and what is derived from them
once, left out), and the most each holds at a time during a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import product

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from bench import bench_model, peers, timing
from bench.bench_model import PREFIX, TINY, Setting, _prefixes, _scores, _with_prefixes, prompted, work
from vptm import PromptedBEiT
from vptm_kernels.testing import largest_error

DEVICE = timing.selection.device
CUDA, FULL = DEVICE == "cuda", timing.selection.full
# without prompts the classifier alone is learned
PROMPTS = [("deep", 100), ("shallow", 10), ("deep", 50), ("deep", 10), ("no", 0)]


def _settings() -> list[Setting]:
    """Most important first. On a CPU the batch is small, and on its full grid there is a larger one as well."""
    if CUDA or TINY:
        own = [Setting(*each, 64, readout="mask") for each in (("shallow", 10), ("deep", 100))]
        return [Setting(*each, 64) for each in (PROMPTS if FULL else PROMPTS[:1])] + own
    found = [Setting("deep", 100, 4), Setting("shallow", 10, 4, readout="mask")]
    if FULL:
        found += [Setting("deep", 100, 32), Setting("deep", 100, 4, readout="mask")]
        found += [Setting(*each, 4) for each in PROMPTS[1:3]]
    return found


CHOSEN = _settings()
# what is timed beside the dtypes that were asked for, in the first setting alone unless all are
SETTINGS = [
    (setting, dtype)
    for setting, dtype in product(CHOSEN, timing.selection.of_models())
    if FULL or dtype in timing.selection.dtypes or setting == CHOSEN[0]
]
FIRST = CHOSEN[:1]
EAGER = (peers.OURS, peers.CONCATENATION, PREFIX)
PEERS = {
    **{name: peers.PEERS[name] for name in EAGER[1:]},
    **peers.with_mkl(),
    peers.FLOAT32: peers.PEERS[peers.FLOAT32],
    **peers.compiled_peers(*EAGER),
    **peers.graphed_peers(*EAGER),
}

Gradients = tuple[Tensor, ...]


@lru_cache(maxsize=1)
def _model(setting: Setting, dtype: torch.dtype) -> PromptedBEiT:
    model = copy.deepcopy(prompted(setting, dtype)).train()
    assert isinstance(model, PromptedBEiT)
    return model


def _batch(size: int, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    side = bench_model.pixels(side)
    images = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(1))
    return images.to(DEVICE, dtype), torch.arange(size, device=DEVICE) % bench_model.CLASSES


def _learned(model: PromptedBEiT) -> list[Tensor]:
    return [parameter for parameter in model.trainable_parameters() if parameter.numel()]


def _steps(setting: Setting, dtype: torch.dtype) -> dict[str, Callable[[], Gradients]]:
    """vptm and every peer that is here, was asked for and belongs to this setting."""
    model, (images, labels) = _model(setting, dtype), _batch(setting.batch, setting.side, dtype)
    learned, present = _learned(model), timing.present(PEERS)

    def classified(hidden: Tensor) -> Tensor:
        scores = _scores(model, hidden)
        return model.verbalizer(hidden, model.lm_head) if scores is hidden else scores

    scores: dict[str, Callable[[], Tensor]] = {
        peers.OURS: lambda: model(images),
        peers.CONCATENATION: lambda: classified(bench_model._concatenate(model, images)),
    }
    if setting.mode == "deep":
        scores[PREFIX] = lambda: classified(_with_prefixes(model, _prefixes(model), images))

    def step(run: Callable[[], Tensor]) -> Callable[[], Gradients]:
        return lambda: torch.autograd.grad(F.cross_entropy(run().float(), labels), learned)

    steps = {name: step(run) for name, run in scores.items()}
    found = dict(steps)
    if peers.FLOAT32 in present and dtype == torch.bfloat16:
        wide = cache(lambda: copy.deepcopy(model).float())
        wider = images.float()

        def in_float32() -> Gradients:
            loss = F.cross_entropy(wide()(wider), labels)
            return tuple(grad.to(dtype) for grad in torch.autograd.grad(loss, _learned(wide())))

        found[peers.FLOAT32] = in_float32
    if peers.WITH_MKL in present and dtype == torch.float32 and (setting in FIRST or FULL):
        found[peers.WITH_MKL] = timing.without_onednn(steps[peers.OURS])
    if setting in FIRST:
        # the forward pass is compiled, and with it the backward pass; autograd's own call is not traced
        found |= {name: step(run) for name, run in peers.compiled(scores).items()} | peers.graphed(steps)
    return {name: run for name, run in found.items() if name == peers.OURS or name in present}


def _of_the_definition(model: PromptedBEiT, setting: Setting, dtype: torch.dtype) -> Gradients:
    """By the definition, two images at a time: it has no room for more."""
    model = copy.deepcopy(model)
    model.impl = "reference"
    images, labels = _batch(setting.batch, setting.side, dtype)
    parts = []
    own = next(model.parameters()).dtype
    for few, their in zip(images.split(2), labels.split(2)):
        loss = F.cross_entropy(model(few.to(own)).to(torch.promote_types(own, torch.float32)), their, reduction="sum")
        parts.append(torch.autograd.grad(loss / len(images), _learned(model)))
    return tuple(torch.stack([each.double() for each in part]).sum(0).to(own) for part in zip(*parts))


@lru_cache(maxsize=1)
def _exact(setting: Setting, dtype: torch.dtype) -> tuple[Gradients, Gradients]:
    """In float64 and in the dtype that is timed."""
    model = _model(setting, dtype)
    found = [_of_the_definition(each, setting, dtype) for each in (copy.deepcopy(model).double(), model)]
    return found[0], found[1]


def _check(setting: Setting, dtype: torch.dtype) -> timing.Check:
    """Of every gradient against float64. The error of a single number is luck: that of the temperature may be as large,
    for its size, as the definition's largest of any gradient."""
    exact, eager = _exact(setting, dtype)
    worst = max(largest_error(own, true) / float(true.abs().max()) for own, true in zip(eager, exact))
    lucky = [true * (1 + worst) if true.numel() == 1 else own for own, true in zip(eager, exact)]
    return timing.within_budget(exact, [own.to(dtype) for own in lucky], [timing.FACTOR] * len(exact))


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


@pytest.mark.parametrize("implementation", [peers.OURS, peers.CONCATENATION])
@pytest.mark.parametrize(("setting", "dtype"), SETTINGS, ids=timing.label)
def bench_training_step(benchmark: BenchmarkFixture, implementation: str, setting: Setting, dtype: torch.dtype) -> None:
    mode, length, batch = setting[:3]
    benchmark.group = f"training step, {setting.model}, {mode} prompts, P={length}, batch {batch}, {dtype}, {DEVICE}"
    benchmark.extra_info |= setting.info
    steps = _steps(setting, dtype)
    found = timing.report(
        benchmark,
        implementation,
        steps,
        check=_check(setting, dtype),
        work=work(setting, dtype, step=True),
        device=DEVICE,
        dtype=dtype,
        held=EAGER,
        table=(5, 1) if CUDA else (1, 0),
        rounds=7 if CUDA else 3,
        warmup=2 if CUDA else 0,
    )
    if found:
        model, peak = _model(setting, dtype), benchmark.extra_info["peak extra bytes"]
        saved = {name: _saved_bytes(model, steps[name]) for name in peak}
        for what, sizes in (("saved", saved), ("peak", peak)):
            if peers.CONCATENATION in sizes:
                share = sizes[peers.OURS] / sizes[peers.CONCATENATION]
                benchmark.extra_info[f"{what} over concatenation"] = round(share, 3)
        benchmark.extra_info["bytes saved for backward"] = saved
