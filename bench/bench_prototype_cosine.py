"""From hidden state to class cosines through 8192 visual tokens: inference, training steps and memory.

    pytest bench/bench_prototype_cosine.py --benchmark-only --grid full

Peers: "eager" is the definition (token logits, activation, projection, two normalisations, product); "hand-folded" is
what a clever user writes for logits, token head and projection multiplied beforehand, from the same prototypes as
ours; `torch.compile` of eager, on a CPU for one size alone, with max-autotune when asked for by name. They take the
same tensors as vptm: a `FoldedHead`, or token head and projection. `peak extra bytes` is the most that one call holds
beyond its inputs, its result and its gradients, and `memory over eager` its ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from bench import timing
from vptm_kernels import fold_head, prototype_cosine
from vptm_kernels.prototype_cosine.activations import ACTIVATIONS
from vptm_kernels.prototype_cosine.reference import prototype_cosine_reference

DEVICE, FULL = timing.selection.device, timing.selection.full
WIDTH, TOKENS, DIM = (24, 60, 8) if timing.selection.tiny else (768, 8192, 128)
BATCHES = (1, 64, 512)
COMPILED_SIZE = (64, 100)  # images and classes, on a CPU
# folded, the number of classes decides what is left to do; unfolded, the two ends of it show that it does not
UNIT = (10, 100, 1000)
OTHERS = UNIT if FULL else (10, 1000)
FOLDED = [("unit", classes) for classes in UNIT] + [("raw", classes) for classes in OTHERS]
Run = Callable[[], Tensor | tuple[Tensor, ...]]
COMPILED = timing.compiled(lambda: None)
PEERS = {"eager": timing.Peer(lambda: None), "hand-folded": timing.Peer(lambda: None), **COMPILED}
UNFOLDED = {name: peer for name, peer in PEERS.items() if name != "hand-folded"}


class Problem:
    """Tensors of one shape, of the size that a trained model has: logits of standard deviation 1."""

    def __init__(self, batch: int, classes: int, activation: str, training: bool, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.activation, self.training, self.classes = activation, training, classes

        def random(*shape: int, scale: float = 1.0, learned: bool = True) -> Tensor:
            return (torch.randn(*shape) * scale).to(DEVICE, dtype).requires_grad_(training and learned)

        self.hidden = random(batch, WIDTH)
        self.weight, self.bias = random(TOKENS, WIDTH, scale=WIDTH**-0.5, learned=False), random(TOKENS, learned=False)
        self.projection, self.prototypes = random(DIM, TOKENS, scale=TOKENS**-0.5), random(classes, DIM)
        self.labels = torch.arange(batch, device=DEVICE) % classes
        self.head = fold_head(self.weight, self.bias, self.projection)
        self.unit = F.normalize(self.prototypes.detach(), dim=-1)

    @property
    def learned(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.projection, self.prototypes

    def work(self) -> timing.Work:
        """Of the definition: inputs read and cosines written once, two operations a multiply-add.

        Forward B (V (C + d) + K d) multiply-adds; a training step adds as many for hidden and B (V d + K d) for
        projection and prototypes, reads the inputs again and writes their gradients.
        """
        batch = len(self.hidden)
        forward = TOKENS * (WIDTH + DIM) + self.classes * DIM
        learned = TOKENS * DIM + self.classes * DIM
        inputs = (*self.learned, self.weight, self.bias)
        elements = sum(t.numel() for t in inputs) + batch * self.classes
        elements += self.training * (elements + sum(t.numel() for t in self.learned))
        operations = 2 * batch * (forward + (forward + learned) * self.training)
        return timing.Work(elements * self.hidden.element_size(), operations)

    def folded_work(self) -> timing.Work:
        """The same with token head and projection multiplied beforehand: B d (C + K) multiply-adds."""
        batch = len(self.hidden)
        elements = self.hidden.numel() + DIM * (WIDTH + 1) + self.prototypes.numel() + batch * self.classes
        return timing.Work(elements * self.hidden.element_size(), 2 * batch * DIM * (WIDTH + self.classes))

    def step(self, cosines: Callable[[], Tensor]) -> Run:
        """The cosines, or in training the gradients of the cross-entropy at temperature 0.1."""
        if not self.training:
            return cosines
        return lambda: torch.autograd.grad(F.cross_entropy(cosines() / 0.1, self.labels), self.learned)

    def eager(self) -> Tensor:
        return prototype_cosine_reference(
            self.hidden, self.weight, self.bias, self.prototypes, projection=self.projection, activation=self.activation
        )

    def hand_folded(self) -> Tensor:
        embedding = F.normalize(F.linear(self.hidden, *self.head), dim=-1)
        return F.linear(embedding, F.normalize(self.prototypes, dim=-1))

    def folded(self) -> Tensor:
        return prototype_cosine(self.hidden, self.head, None, self.prototypes)

    def hand_folded_unit(self) -> Tensor:
        return F.linear(F.normalize(F.linear(self.hidden, *self.head), dim=-1), self.unit)

    def folded_unit(self) -> Tensor:
        return prototype_cosine(self.hidden, self.head, None, self.unit, unit_prototypes=True)

    def unfolded(self) -> Tensor:
        return prototype_cosine(
            self.hidden, self.weight, self.bias, self.prototypes, projection=self.projection, activation=self.activation
        )

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        hidden, projection, prototypes = (t.detach().double().requires_grad_(self.training) for t in self.learned)
        weight, bias = self.weight.double(), self.bias.double()
        out = prototype_cosine_reference(
            hidden, weight, bias, prototypes, projection=projection, activation=self.activation
        )
        if not self.training:
            return (out,)
        return torch.autograd.grad(F.cross_entropy(out / 0.1, self.labels), (hidden, projection, prototypes))


def _tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


# one at a time, shared by the rows of a group
_problem = lru_cache(maxsize=1)(Problem)


def _report(
    benchmark: BenchmarkFixture, implementation: str, problem: Problem, eager: dict[str, Run], work: timing.Work
) -> None:
    """Check all against the definition in float64, time them in turns, and report ratios, work and memory.

    eager: functions for cosines by implementation, compiled forms left out.
    """
    present = timing.present(PEERS)
    forms = eager | {
        name: timing.Peer(problem.eager, mode=peer.mode).form(benchmark.group)
        for name, peer in present.items()
        if name in COMPILED and (DEVICE == "cuda" or (len(problem.hidden), problem.classes) == COMPILED_SIZE)
    }
    runs = {name: problem.step(form) for name, form in forms.items() if name == "vptm" or name in present}
    if implementation not in runs:
        images, classes = COMPILED_SIZE
        pytest.skip(f"not timed: on a CPU {implementation} is compiled for {images} images and {classes} classes")
    batch, dtype = problem.hidden.shape[0], problem.hidden.dtype
    benchmark.extra_info |= {"batch": batch, "classes": problem.classes}
    with torch.set_grad_enabled(problem.training):
        found = timing.report(
            benchmark,
            implementation,
            runs,
            check=timing.within_budget(problem.exact, _tuple(problem.step(problem.eager)()), [3] * 3),
            work=work,
            device=DEVICE,
            dtype=dtype,
            table=(3, 1),
            rounds={1: 101, 64: 31}.get(batch, 9),
            graph=True,
            at_least=1e-3,
        )
        if found:
            held = benchmark.extra_info["peak extra bytes"]
            held = {name: size - sum(t.nbytes for t in _tuple(runs[name]())) for name, size in held.items()}
            benchmark.extra_info["peak extra bytes"] = held
            if "eager" in held:
                benchmark.extra_info["memory over eager"] = round(held["vptm"] / max(1, held["eager"]), 4)


@pytest.mark.parametrize("implementation", timing.rows(PEERS))
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("prototypes", "classes"), FOLDED)
@pytest.mark.parametrize("dtype", timing.selection.dtypes, ids=timing.label)
def bench_folded_inference(
    benchmark: BenchmarkFixture, implementation: str, prototypes: str, classes: int, batch: int, dtype: torch.dtype
) -> None:
    """A saved adapter with unit prototypes, as the model runs it, or with learned ones: at B = 64 at least 25 times
    eager, no slower than the same by hand, a tenth of the memory."""
    problem, kind = _problem(batch, classes, "logits", False, dtype), f"folded inference, {prototypes} prototypes"
    benchmark.group = f"prototype cosine, {kind}, B={batch}, K={classes}, {dtype}, {DEVICE}"
    benchmark.extra_info["shape"] = kind
    ours, by_hand = (
        (problem.folded_unit, problem.hand_folded_unit)
        if prototypes == "unit"
        else (problem.folded, problem.hand_folded)
    )
    functions = {"vptm": ours, "eager": problem.eager, "hand-folded": by_hand}
    _report(benchmark, implementation, problem, functions, problem.folded_work())


@pytest.mark.parametrize("implementation", timing.rows(UNFOLDED))
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("classes", OTHERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", timing.selection.dtypes, ids=timing.label)
def bench_inference(
    benchmark: BenchmarkFixture, implementation: str, activation: str, classes: int, batch: int, dtype: torch.dtype
) -> None:
    """Unfolded arguments: no slower than eager after a softmax; logits stream, in a tenth of the memory, from 16 images
    on and fold, faster, from 112."""
    _unfolded(benchmark, implementation, _problem(batch, classes, activation, False, dtype), "inference")


@pytest.mark.parametrize("implementation", timing.rows(UNFOLDED))
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("classes", OTHERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", timing.selection.dtypes, ids=timing.label)
def bench_training_step(
    benchmark: BenchmarkFixture, implementation: str, activation: str, classes: int, batch: int, dtype: torch.dtype
) -> None:
    """Gradients of hidden, projection, prototypes: at B = 512 in logits mode at least 3 times eager, never slower."""
    _unfolded(benchmark, implementation, _problem(batch, classes, activation, True, dtype), "training step")


def _unfolded(benchmark: BenchmarkFixture, implementation: str, problem: Problem, what: str) -> None:
    kind, sizes = f"{problem.activation} {what}", f"B={len(problem.hidden)}, K={problem.classes}"
    benchmark.group = f"prototype cosine, {kind}, {sizes}, {problem.hidden.dtype}, {DEVICE}"
    benchmark.extra_info["shape"] = kind
    functions = {"vptm": problem.unfolded, "eager": problem.eager}
    _report(benchmark, implementation, problem, functions, problem.work())
