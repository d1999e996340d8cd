"""From hidden state to class cosines through 8192 visual tokens: inference, training steps and memory.

    pytest bench/bench_prototype_cosine.py --benchmark-only --benchmark-json bench/results/prototype_cosine_cpu.json

Peers: "eager" is the definition (token logits, activation, projection, two normalisations, product); "hand-folded" is
what a clever user writes for logits, token head and projection multiplied beforehand, from the same prototypes as
ours; on a GPU also `torch.compile` of eager. They take the same tensors as vptm: a `FoldedHead`, or token head and
projection. `peak extra bytes` is the most that one call holds beyond its inputs, its result and its gradients, and
`memory over eager` its ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from bench import timing
from vptm_kernels import fold_head, prototype_cosine
from vptm_kernels.prototype_cosine.reference import prototype_cosine_reference

DEVICE, DTYPE = timing.selection.device, timing.selection.dtypes[0]
WIDTH, TOKENS, DIM = 768, 8192, 128
ACTIVATIONS = ("logits", "softmax", "log_softmax")
Run = Callable[[], Tensor | tuple[Tensor, ...]]
PEERS = {
    "eager": timing.Peer(lambda: None),
    "hand-folded": timing.Peer(lambda: None),
    "torch.compile": timing.Peer(lambda: None, needs=("cuda",)),
}


class Problem:
    """Tensors of one shape, of the size that a trained model has: logits of standard deviation 1."""

    def __init__(self, batch: int, classes: int, activation: str, training: bool) -> None:
        torch.manual_seed(0)
        self.activation, self.training, self.classes = activation, training, classes

        def random(*shape: int, scale: float = 1.0, learned: bool = True) -> Tensor:
            return (torch.randn(*shape) * scale).to(DEVICE, DTYPE).requires_grad_(training and learned)

        self.hidden = random(batch, WIDTH)
        self.weight, self.bias = random(TOKENS, WIDTH, scale=WIDTH**-0.5, learned=False), random(TOKENS, learned=False)
        self.projection, self.prototypes = random(DIM, TOKENS, scale=TOKENS**-0.5), random(classes, DIM)
        self.labels = torch.arange(batch, device=DEVICE) % classes
        self.head = fold_head(self.weight, self.bias, self.projection)
        self.unit = F.normalize(self.prototypes.detach(), dim=-1)

    @property
    def learned(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.projection, self.prototypes

    def work(self) -> tuple[int, int]:
        """(bytes, operations) of the definition: inputs read and cosines written once, two operations a multiply-add.

        Forward B (V (C + d) + K d) multiply-adds; a training step adds as many for hidden and B (V d + K d) for
        projection and prototypes, reads the inputs again and writes their gradients.
        """
        batch = len(self.hidden)
        forward = TOKENS * (WIDTH + DIM) + self.classes * DIM
        learned = TOKENS * DIM + self.classes * DIM
        inputs = (*self.learned, self.weight, self.bias)
        elements = sum(t.numel() for t in inputs) + batch * self.classes
        elements += self.training * (elements + sum(t.numel() for t in self.learned))
        return elements * self.hidden.element_size(), 2 * batch * (forward + (forward + learned) * self.training)

    def folded_work(self) -> tuple[int, int]:
        """The same with token head and projection multiplied beforehand: B d (C + K) multiply-adds."""
        batch = len(self.hidden)
        elements = self.hidden.numel() + DIM * (WIDTH + 1) + self.prototypes.numel() + batch * self.classes
        return elements * self.hidden.element_size(), 2 * batch * DIM * (WIDTH + self.classes)

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


def _compare(benchmark: BenchmarkFixture, problem: Problem, ours: Run, work: tuple[int, int], **peers: Run) -> None:
    """Check all against the definition in float64, time them in turns, and report ratios, work and memory."""
    runs: dict[str, Run] = {"vptm": ours, "eager": problem.step(problem.eager)}
    runs |= {name.replace("_", "-"): run for name, run in peers.items()}
    if "torch.compile" in timing.present(PEERS):
        runs["torch.compile"] = problem.step(torch.compile(problem.eager, fullgraph=True))
    with torch.set_grad_enabled(problem.training):
        check = timing.within_budget(problem.exact(), _tuple(runs["eager"]()), [3] * 3)
        asked = {name: run for name, run in runs.items() if name == "vptm" or name in timing.present(PEERS)}
        rounds = {1: 101, 64: 31}.get(len(problem.hidden), 9)
        found = timing.compare(asked, check=check, rounds=rounds, device=DEVICE, graph=True, at_least=1e-3)
        held = {name: _extra_bytes(runs[name]) for name in ("vptm", "eager")}
        benchmark.extra_info |= found.info() | timing.work_info(found.median("vptm"), *work, DEVICE, DTYPE)
        benchmark.extra_info |= {
            "peak extra bytes": held,
            "memory over eager": round(held["vptm"] / max(1, held["eager"]), 4),
            "batch": len(problem.hidden),
            "classes": problem.classes,
            "dtype": str(DTYPE),
            "device": DEVICE,
            "threads": torch.get_num_threads(),
        }
        benchmark.pedantic(timing.finished(ours, DEVICE), rounds=3, warmup_rounds=1)


def _extra_bytes(run: Run) -> int:
    """The most that one call holds at a time, less what it returns."""
    return timing.peak_extra_bytes(run, DEVICE) - sum(t.nbytes for t in _tuple(run()))


@pytest.mark.parametrize("batch", [1, 64, 512])
@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("prototypes", ["unit", "raw"])
def bench_folded_inference(benchmark: BenchmarkFixture, prototypes: str, classes: int, batch: int) -> None:
    """A saved adapter with unit prototypes, as the model runs it, or with learned ones: at B = 64 at least 25 times
    eager, no slower than the same by hand, a tenth of the memory."""
    problem = Problem(batch, classes, "logits", training=False)
    benchmark.group = f"prototype cosine, folded inference, {prototypes} prototypes, B={batch}, K={classes}, {DEVICE}"
    by_hand = problem.hand_folded_unit if prototypes == "unit" else problem.hand_folded
    ours = problem.folded_unit if prototypes == "unit" else problem.folded
    _compare(benchmark, problem, ours, problem.folded_work(), hand_folded=by_hand)


@pytest.mark.parametrize("batch", [1, 64, 512])
@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def bench_inference(benchmark: BenchmarkFixture, activation: str, classes: int, batch: int) -> None:
    """Unfolded arguments: no slower than eager after a softmax; logits stream, in a tenth of the memory, from 16 images
    on and fold, faster, from 112."""
    problem = Problem(batch, classes, activation, training=False)
    benchmark.group = f"prototype cosine, {activation} inference, B={batch}, K={classes}, {DEVICE}"
    _compare(benchmark, problem, problem.unfolded, problem.work())


@pytest.mark.parametrize("batch", [1, 64, 512])
@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def bench_training_step(benchmark: BenchmarkFixture, activation: str, classes: int, batch: int) -> None:
    """Gradients of hidden, projection, prototypes: at B = 512 in logits mode at least 3 times eager, never slower."""
    problem = Problem(batch, classes, activation, training=True)
    benchmark.group = f"prototype cosine, {activation} training step, B={batch}, K={classes}, {DEVICE}"
    _compare(benchmark, problem, problem.step(problem.unfolded), problem.work())
