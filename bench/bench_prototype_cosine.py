"""From hidden state to class cosines through 8192 visual tokens: inference, training steps and memory.

    pytest bench/bench_prototype_cosine.py --benchmark-only --benchmark-json bench/results/prototype_cosine_cpu.json

Peers: "eager" is the definition (token logits, activation, projection, two normalisations, product); "hand-folded" is
what a clever user writes for logits, token head and projection multiplied beforehand, from the same prototypes as
ours; on a GPU also `torch.compile` of eager. They take the same tensors as ours: "folded" is a `FoldedHead`,
"unfolded" token head and projection. All of one group are checked against the definition in float64 before any is
timed, then timed in turns, so that a busy machine slows them alike; `speed-up over X` is the ratio of medians.

`peak extra bytes` is the most that one call holds beyond its inputs, its result and its gradients, and `memory over
eager` its ratio. `gflop` counts two per multiply-add of the definition: 2 B (V (C + d) + K d) forward, and for a
training step as much again for hidden and 2 B (V d + K d) for projection and prototypes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile

from vptm_kernels import fold_head, prototype_cosine
from vptm_kernels.prototype_cosine.reference import prototype_cosine_reference
from vptm_kernels.testing import assert_close_to_exact

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
WIDTH, TOKENS, DIM = 768, 8192, 128
ACTIVATIONS = ("logits", "softmax", "log_softmax")
Run = Callable[[], Tensor | tuple[Tensor, ...]]


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

    @property
    def gflop(self) -> float:
        batch = len(self.hidden)
        forward = TOKENS * (WIDTH + DIM) + self.classes * DIM
        learned = TOKENS * DIM + self.classes * DIM
        return 2e-9 * batch * (forward + (forward + learned) * self.training)

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


def _peak_extra_bytes(run: Run) -> int:
    """Allocated at most during the call, less what it returns."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = _tuple(run())
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in out)
    with profile(profile_memory=True) as recorded:
        out = _tuple(run())
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - sum(t.nbytes for t in out)


def _seconds(run: Run, calls: int) -> float:
    """Mean duration of one call."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _compare(benchmark: BenchmarkFixture, problem: Problem, runs: dict[str, Run], rounds: int) -> None:
    """Time the last of `runs`; the others are peers, "eager" first."""
    *peers, ours = runs
    with torch.set_grad_enabled(problem.training):
        exact, eager = problem.exact(), _tuple(runs["eager"]())
        for name, run in runs.items():
            for found, want, peer in zip(_tuple(run()), exact, eager):
                assert_close_to_exact(f"{name}: not timed", found, want, peer, factor=3)

        # Peers and ours take turns of at least a millisecond: a single short call would be timed with the caches as the
        # one before left them, and the longest peer before it sweeps them.
        calls = {name: max(1, round(1e-3 / _seconds(run, 3))) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(_seconds(run, calls[name]))
        medians = {name: statistics.median(found) for name, found in times.items()}
        bytes_held = {name: _peak_extra_bytes(run) for name, run in runs.items()}

        def timed() -> None:
            runs[ours]()
            if CUDA:
                torch.cuda.synchronize()

        benchmark.extra_info |= {f"speed-up over {peer}": medians[peer] / medians[ours] for peer in peers}
        benchmark.extra_info |= {
            "peak extra bytes": bytes_held[ours],
            "memory over eager": bytes_held[ours] / max(1, bytes_held["eager"]),
            "gflop": problem.gflop,
            "dtype": str(DTYPE),
            "threads": torch.get_num_threads(),
        }
        benchmark.pedantic(timed, rounds=3, warmup_rounds=1)


def _rounds(batch: int) -> int:
    return {1: 101, 64: 31}.get(batch, 9)


def _with_compile(problem: Problem, runs: dict[str, Run]) -> dict[str, Run]:
    if CUDA:
        compiled = torch.compile(problem.eager, fullgraph=True)
        return {"eager": runs.pop("eager"), "torch.compile": problem.step(compiled), **runs}
    return runs


@pytest.mark.parametrize("batch", [1, 64, 512])
@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("prototypes", ["unit", "raw"])
def bench_folded_inference(benchmark: BenchmarkFixture, prototypes: str, classes: int, batch: int) -> None:
    """A saved adapter with unit prototypes, as the model runs it, or with learned ones: at B = 64 at least 25 times
    eager, no slower than the same by hand, a tenth of the memory."""
    problem = Problem(batch, classes, "logits", training=False)
    benchmark.group = f"folded inference, {prototypes} prototypes, B={batch} K={classes} {DEVICE}"
    by_hand = problem.hand_folded_unit if prototypes == "unit" else problem.hand_folded
    ours = problem.folded_unit if prototypes == "unit" else problem.folded
    runs: dict[str, Run] = {"eager": problem.eager, "hand-folded": by_hand, "folded": ours}
    _compare(benchmark, problem, _with_compile(problem, runs), _rounds(batch))


@pytest.mark.parametrize("batch", [1, 64, 512])
@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def bench_inference(benchmark: BenchmarkFixture, activation: str, classes: int, batch: int) -> None:
    """Unfolded arguments: no slower than eager after a softmax; logits stream, in a tenth of the memory, from 16 images
    on and fold, faster, from 112."""
    problem = Problem(batch, classes, activation, training=False)
    benchmark.group = f"{activation} inference B={batch} K={classes} {DEVICE}"
    runs: dict[str, Run] = {"eager": problem.eager, "unfolded": problem.unfolded}
    _compare(benchmark, problem, _with_compile(problem, runs), _rounds(batch))


@pytest.mark.parametrize("batch", [1, 64, 512])
@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def bench_training_step(benchmark: BenchmarkFixture, activation: str, classes: int, batch: int) -> None:
    """Gradients of hidden, projection, prototypes: at B = 512 in logits mode at least 3 times eager, never slower."""
    problem = Problem(batch, classes, activation, training=True)
    benchmark.group = f"{activation} training B={batch} K={classes} {DEVICE}"
    runs: dict[str, Run] = {"eager": problem.step(problem.eager), "unfolded": problem.step(problem.unfolded)}
    _compare(benchmark, problem, _with_compile(problem, runs), _rounds(batch))
