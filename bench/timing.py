"""What the benches share: refuse what is wrong, time the rest in turns, and say on which machine.

    result = compare({"eager": eager, "vptm": ours}, check=check, device="cuda", graph=True)
    result.speed_up("eager")         # median of the ratios of neighbouring runs, so that drift cancels
    benchmark.extra_info |= result.info()

`compare` checks before it times: a wrong result of ours raises, and a peer that is wrong, not finite or fails is listed
under `refused` with the reason and has no time at all.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import profile

from vptm.messages import error_line
from vptm_kernels._runtime.frozen_linear import multiplies_bfloat16
from vptm_kernels.testing import assert_close_to_exact

Run = Callable[[], object]
Clock = Callable[[Run], float]
"""Seconds that one call takes."""


# ------------------------------------------------------------------ what is asked for


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16)}
"""What is timed by device unless the command line says otherwise."""


@dataclass(frozen=True)
class Selection:
    """What the command line of a bench run asks for; empty `peers` means all of them. tiny: a rehearsal of a GPU's run,
    whose peers are all tried, those that need a GPU too. any_dtype: no dtype was asked for."""

    device: str = DEVICE
    dtypes: tuple[torch.dtype, ...] = DTYPES[DEVICE]
    peers: tuple[str, ...] = ()
    full: bool = DEVICE == "cuda"
    tiny: bool = False
    any_dtype: bool = True

    def of_models(self) -> tuple[torch.dtype, ...]:
        """Dtypes of whole models: on a CPU that multiplies bfloat16 that as well, where none was asked for."""
        beside = self.any_dtype and self.device == "cpu" and not self.tiny and multiplies_bfloat16()
        return (*self.dtypes, torch.bfloat16) if beside else self.dtypes

    def missing(self) -> str | None:
        """Why nothing can be timed with this device and these dtypes; None when it can."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "device cuda is not here"
        for dtype in self.dtypes:
            if self.device == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
                return "dtype bfloat16 is not supported by this GPU"
        return None


selection = Selection()


def select(chosen: Selection) -> None:
    """Called once, before the benches are imported."""
    global selection
    selection = chosen


def one_graph(function: Callable[..., Any], mode: str = "default", backend: str = "inductor") -> Callable[..., Any]:
    """`function` compiled as a whole for the shapes it gets, with nothing compiled before it.

    torch.compile keeps a handful of forms of a function and runs any further shape eagerly, under the compiled name.
    So what was compiled earlier is dropped here, and reaching that limit is an error.
    """
    from torch._dynamo import config  # loads in seconds

    backend = "eager" if selection.tiny else backend
    torch.compiler.reset()
    if hasattr(config, "fail_on_recompile_limit_hit"):
        config.fail_on_recompile_limit_hit = True
    return torch.compile(
        function, fullgraph=True, dynamic=False, mode=mode if backend == "inductor" else None, backend=backend
    )


# by what is added to the name of a compiled form; without CUDA graphs, which would hide launches of one form alone,
# but where the name says so
MODES = {"": "default", " max-autotune": "max-autotune-no-cudagraphs", " reduce-overhead": "reduce-overhead"}


@dataclass(frozen=True)
class Peer:
    """An implementation to compare with: how it is run, what it is checked against, and how it is shown.

    Attributes:
        run: the implementation; nothing for one that every setting builds anew.
        needs: "cuda" or "cpu", or packages by import name.
        paired: False for one that computes less than the others and stands for the speed of light.
        mode: of torch.compile, in which `run` is timed; None for as it is.
        named: it takes minutes, and is timed when asked for by name.
        long: on a CPU it takes half a minute for a shape, and is timed on the full grid or when asked for by name.
        way: "eager", "compiled", "graphed" or "exported". A form of vptm is compared with peers that are run alike.
        function: whose function it computes and is checked against in float64: that of "vptm", or its own where it
            computes less, by a name. It is then shown after those that compute the same.
        title: in tables and legends, where its name says too little.
        look: colour and marker in pictures; None for any that is free.
    """

    run: Callable[..., Any] = lambda: None
    needs: tuple[str, ...] = ()
    paired: bool = True
    mode: str | None = None
    named: bool = False
    long: bool = False
    way: str = "eager"
    function: str = "vptm"
    title: str | None = None
    look: tuple[str, str] | None = None

    def missing(self) -> str | None:
        """What it needs and is not here."""
        for need in self.needs:
            if need == "cuda":
                if selection.device != "cuda" and not selection.tiny:
                    return "needs a GPU"
            elif need == "cpu":
                if selection.device != "cpu":
                    return "runs on CPUs"
            elif not installed(need):
                return f"needs the package {need}, which is not installed"
        return None

    def left_out(self, name: str) -> str | None:
        """Why it is not timed though it could be."""
        if name in selection.peers:
            return None
        if self.named:
            return f'takes minutes, timed with --peers "{name}"'
        if self.long and selection.device == "cpu" and not selection.full:
            return f'takes long on a CPU, timed with --grid full or --peers "{name}"'
        return None

    def form(self, group: str) -> Callable[..., Any]:
        """`run`, or a compiled form of it: one for all benches of `group`, made anew for the next group."""
        global _formed
        if self.mode is None:
            return self.run
        if _formed[0] != group:
            _formed = (group, {})
        forms = _formed[1]
        if (self.run, self.mode) not in forms:
            forms[self.run, self.mode] = one_graph(self.run, self.mode)
        return forms[self.run, self.mode]


_formed: tuple[str, dict[tuple[Callable[..., Any], str], Callable[..., Any]]] = ("", {})


def installed(package: str) -> bool:
    """Whether a package, by its import name, could be imported; nothing is imported but the packages it lies in."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def compiled(
    run: Callable[..., Any], name: str = "torch.compile", needs: tuple[str, ...] = (), long: bool = True
) -> dict[str, Peer]:
    """Peers by name: `run` compiled by default, and with max-autotune, which takes minutes."""
    return {
        name: Peer(run, needs, mode=MODES[""], long=long, way="compiled"),
        f"{name} max-autotune": Peer(run, needs, mode=MODES[" max-autotune"], named=True, way="compiled"),
    }


def absent(peers: Mapping[str, Peer]) -> dict[str, str]:
    """The peers that cannot be timed here, or are only when named, each with the reason."""
    found = {}
    for name, peer in peers.items():
        if why := peer.missing() or peer.left_out(name):
            found[name] = why
    return found


def present(peers: Mapping[str, Peer]) -> dict[str, Peer]:
    """The peers that were asked for and are here."""
    asked, gone = selection.peers or tuple(peers), absent(peers)
    return {name: peer for name, peer in peers.items() if name in asked and name not in gone}


def rows(peers: Mapping[str, Peer]) -> list[str]:
    """Names for `parametrize`: vptm, which compares, then every peer that is not left out."""
    return ["vptm", *(name for name, peer in peers.items() if not peer.left_out(name))]


# ------------------------------------------------------------------ clocks


def host_clock(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


class EventClock:
    """Seconds on a GPU between two events. Before each run a buffer of four times the second-level cache is written, so
    that inputs come from memory.

    ahead: the host may queue the run while that buffer is written, so that a graph's launch costs nothing. Otherwise it
    waits, and launches one by one are part of the time, as they are for a user.
    """

    def __init__(self, ahead: bool) -> None:
        size = torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(max(4 * size, 1 << 28), dtype=torch.uint8, device="cuda")
        self._ahead = ahead

    def __call__(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if not self._ahead:
            torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@functools.cache
def clock_of(device: str, ahead: bool = False) -> Clock:
    return EventClock(ahead) if device == "cuda" else host_clock


def captured(run: Run) -> Run:
    """One replay of a CUDA graph of `run`, so that launches cost the host nothing; it returns what `run` does. `run`
    itself in a rehearsal without a GPU."""
    if selection.tiny and not torch.cuda.is_available():
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def without_onednn(run: Run) -> Run:
    """`run` with what PyTorch sends to MKL without being told otherwise. vptm tells it otherwise on AMD processors."""

    def call() -> object:
        before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        try:
            return run()
        finally:
            torch.backends.mkldnn.enabled = before

    return call


def finished(run: Run, device: str) -> Run:
    """`run` until the device is done with it: for pytest-benchmark's own table, which looks at the host's clock."""

    def call() -> object:
        out = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return call


# ------------------------------------------------------------------ comparing


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@dataclass
class Comparison:
    """Seconds of every round by implementation, and the peers that were not timed with the reason."""

    ours: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def ratios(self, peer: str, ours: str | None = None) -> list[float]:
        """Time of `peer` over ours, or over another form of ours, round by round."""
        return [theirs / own for theirs, own in zip(self.seconds[peer], self.seconds[ours or self.ours])]

    def speed_up(self, peer: str) -> float:
        return statistics.median(self.ratios(peer))

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def info(self) -> dict[str, Any]:
        """For `extra_info`: "speed-up over X", quartiles of ratios and of microseconds, and what was refused.

        Names that begin with ours and a blank are forms of ours: what they reach over every peer stands in "forms".
        """
        peers = [name for name in self.seconds if name != self.ours]
        found: dict[str, Any] = {f"speed-up over {peer}": round(self.speed_up(peer), 3) for peer in peers}
        found["ratio quartiles"] = {peer: [round(r, 3) for r in quartiles(self.ratios(peer))] for peer in peers}
        found["microseconds"] = {
            name: [round(1e6 * s, 2) for s in quartiles(taken)] for name, taken in self.seconds.items()
        }
        forms = [name for name in peers if name.startswith(f"{self.ours} ")]
        if forms:
            found["forms"] = {
                form: {
                    peer: [round(r, 3) for r in quartiles(self.ratios(peer, form))]
                    for peer in peers
                    if peer not in forms
                }
                for form in forms
            }
        if self.refused:
            found["refused"] = self.refused
        return found


Check = Callable[[str, Any], None]
"""(name, what one call returned) -> None; raises AssertionError if that is wrong."""


def refusal(name: str, run: Run, check: Check) -> str | None:
    """Why a peer must not be timed: it fails, or what one call returns is wrong; None when it may."""
    try:
        check(name, run())
    except Exception as error:  # a peer may fail in any way
        return error_line(error, first=True)
    return None


def compare(
    runs: Mapping[str, Run],
    ours: str = "vptm",
    *,
    check: Check | None,
    rounds: int = 7,
    warmup: int = 2,
    device: str = "cpu",
    graph: bool = False,
    at_least: float = 0.0,
    clock: Clock | None = None,
) -> Comparison:
    """Time all of `runs` in turns, after checking each.

    Args:
        runs: implementations by name, one call each.
        ours: the one whose error is an error; every other is a peer.
        check: what a result must be; None where there is nothing to compare, as with imports.
        rounds: calls timed of each. The order rotates, so that nobody always runs behind the same neighbour.
        graph: on a GPU, time replays of a CUDA graph, whose results are checked as well. A peer that cannot be captured
            is refused, not timed otherwise.
        at_least: on a CPU, seconds of a turn: shorter calls are repeated and count with their mean. One short call
            would find the caches as its neighbour left them.
        clock: seconds of one call; by default events behind a flushed cache on a GPU, the host's clock elsewhere.
    """
    if ours not in runs:
        raise ValueError(f"ours must be one of {', '.join(runs)}, got {ours!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    clock = clock_of(device, graph) if clock is None else clock
    found = Comparison(ours)
    timed: dict[str, Run] = {}
    for name in [ours, *(name for name in runs if name != ours)]:
        try:
            if check is not None:
                check(name, runs[name]())
            replayed = graph and device == "cuda"
            timed[name] = captured(runs[name]) if replayed else runs[name]
            for turn in range(warmup):
                result = timed[name]()
                if replayed and turn == 0 and check is not None:
                    check(name, result)
        except Exception as error:  # whatever is wrong with a peer, the others are still compared
            if name == ours:
                raise
            timed.pop(name, None)
            found.refused[name] = error_line(error, first=True)
    names = list(timed)
    calls = dict.fromkeys(names, 1)
    if at_least and device != "cuda":
        calls = {name: max(1, round(at_least / clock(run))) for name, run in timed.items()}
    found.seconds = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found.seconds[name].append(clock(repeated(timed[name], calls[name])) / calls[name])
    return found


def repeated(run: Run, times: int) -> Run:
    """`run` so many times over."""
    if times == 1:
        return run

    def runs() -> None:
        for _ in range(times):
            run()

    return runs


FACTOR = 3.0
"""How many times as far from float64 as the definition in its own dtype a whole model or its gradients may be."""


def finite(name: str, found: Tensor) -> None:
    assert bool(found.isfinite().all()), f"{name}: not finite"


def within_budget(exact: Sequence[Tensor], eager: Sequence[Tensor], factors: Sequence[float]) -> Check:
    """A check of one tensor or several against the float64 result, allowing `factors` times the error of eager PyTorch
    in the same dtype."""

    def check(name: str, found: Any) -> None:
        results = (found,) if isinstance(found, Tensor) else tuple(found)
        assert len(results) == len(exact), f"{name}: {len(results)} results, expected {len(exact)}"
        for i, (actual, true, peer, factor) in enumerate(zip(results, exact, eager, factors)):
            label = f"{name}: result {i}" if len(results) > 1 else name
            assert_close_to_exact(label, actual.detach().to(true.device), true, peer.to(true.device), factor=factor)

    return check


# ------------------------------------------------------------------ memory and ceilings


def peak_extra_bytes(run: Run, device: str, warm: bool = False) -> int:
    """The most that one call holds at a time beyond what was there before it, its result included.

    A first call, not counted, leaves what is kept between calls; `warm` says that there has been one.
    """
    if not warm:
        run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del out  # alive until here: the result counts
        return peak
    with profile(profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def products(device: str, a: Tensor, b: Tensor) -> dict[str, Run]:
    """The product a @ b by each library that PyTorch has here, by its name."""
    if device == "cuda":
        return {name: functools.partial(_by_blas, name, a, b) for name in ("cublas", "cublaslt")}
    found: dict[str, Run] = {"MKL" if torch.backends.mkl.is_available() else "BLAS": lambda: a @ b}
    if torch.backends.mkldnn.is_available() and a.dtype in (torch.float32, torch.bfloat16):
        rows, weight = a.to_mkldnn(), b.mT.contiguous().to_mkldnn()
        found["oneDNN"] = lambda: torch.nn.functional.linear(rows, weight)
    return found


def _by_blas(name: str, a: Tensor, b: Tensor) -> Tensor:
    before = torch.backends.cuda.preferred_blas_library(name)
    try:
        return a @ b
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@functools.cache
def matrix_rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of a square matrix product, by library; best of several turns, see `ceilings`."""
    n = 64 if selection.tiny else 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, dtype=torch.float32).to(device, dtype)
    clock, runs = clock_of(device, True), products(device, a, b)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(7):
        for name, run in runs.items():
            taken[name].append(clock(run))
    found = {name: 2 * n**3 / min(seconds) for name, seconds in taken.items()}
    measured_rates[str(dtype)] = found
    return found


measured_rates: dict[str, dict[str, float]] = {}
"""Operations per second by dtype and library, of what this process has measured so far."""


@functools.cache
def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second of a copy, reads and writes counted, operations per second of the fastest matrix product).

    The best of several turns, of sizes that leave caches behind and keep every core busy: what others take of the
    machine meanwhile lowers no ceiling.
    """
    size = 1 << 20 if selection.tiny else 1 << 30 if device == "cuda" else 1 << 28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = clock_of(device, True)
    copied = min(clock(lambda: target.copy_(source)) for _ in range(7))
    return 2 * size / copied, max(matrix_rates(device, dtype).values())


def work_info(seconds: float, moved: int, operations: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """For `extra_info`: what must be moved and computed, and the share of the ceilings measured here that was reached.

    "share of ceiling" is the larger of the two times the machine needs at its own ceilings, over the measured time.
    Above 1 the implementation does fewer operations than the formula counts, or finds in a cache what the formula moves
    from memory: then it is no measure of how well the machine is used.
    """
    bandwidth, rate = ceilings(device, dtype)
    return {
        "bytes": moved,
        "operations": operations,
        "measured copy bandwidth": bandwidth,
        "measured matrix rate": rate,
        "achieved bandwidth": moved / seconds,
        "achieved rate": operations / seconds,
        "share of ceiling": round(max(moved / bandwidth, operations / rate) / seconds, 3),
    }


# ------------------------------------------------------------------ one row of a bench


class Work(NamedTuple):
    """What no implementation can avoid: bytes moved, floating-point operations."""

    moved: int
    operations: int


_last: dict[str, Comparison] = {}  # of the group that was compared last


def report(
    benchmark: Any,
    implementation: str,
    runs: Mapping[str, Run],
    *,
    check: Check,
    work: Work,
    device: str,
    dtype: torch.dtype,
    alone: Collection[str] = (),
    held: Collection[str] | None = None,
    table: tuple[int, int] = (5, 1),
    **options: Any,
) -> Comparison | None:
    """One row of pytest-benchmark's table. That of vptm comes first in its group and compares all of `runs`.

    `extra_info` gets the implementation, dtype, device, threads and `work_info`, on vptm's row also the comparison and
    the "peak extra bytes" of each. A peer that is wrong or fails is skipped with the reason.

    Args:
        runs: implementations by name, vptm among them.
        work: of one call.
        alone: names that take no part in the comparison.
        held: names whose memory is measured; None for all that are timed.
        table: rounds and warm-up rounds of pytest-benchmark's own table.
        options: `rounds`, `warmup`, `graph` and `at_least` of `compare`.

    Returns:
        The comparison, on vptm's row.
    """
    import pytest

    found = _last.get(benchmark.group)
    if implementation == "vptm":
        paired = {name: run for name, run in runs.items() if name not in alone}
        found = compare(paired, check=check, device=device, **options)
        _last.clear()
        _last[benchmark.group] = found
        timed = [name for name in found.seconds if held is None or name in held]
        memory = {name: peak_extra_bytes(runs[name], device, warm=True) for name in timed}
        benchmark.extra_info |= found.info() | {"peak extra bytes": memory}
    elif found is None or implementation not in found.seconds:
        why = found.refused.get(implementation) if found else None
        if why is None:
            try:
                found = compare(
                    {implementation: runs[implementation]}, implementation, check=check, device=device, **options
                )
            except Exception as error:  # a peer may fail in any way
                why = error_line(error, first=True)
        if why is not None:
            pytest.skip(f"not timed: {why}")
    assert found is not None
    benchmark.extra_info |= {
        "implementation": implementation,
        "dtype": str(dtype),
        "device": device,
        "threads": torch.get_num_threads(),
    } | work_info(found.median(implementation), *work, device, dtype)
    rounds, warmup = table
    benchmark.pedantic(finished(runs[implementation], device), rounds=rounds, warmup_rounds=warmup)
    return found if implementation == "vptm" else None


def merged(info: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`info` and `more`, with the dictionaries that both have joined."""
    return info | {
        name: info[name] | value if isinstance(value, dict) and name in info else value for name, value in more.items()
    }


def label(value: object) -> str:
    """A dtype or a shape in the name of a bench."""
    return str(value).removeprefix("torch.")


# ------------------------------------------------------------------ where it ran

PACKAGES = (
    *("torch", "triton", "timm", "transformers", "numpy", "xformers", "peft"),
    *("flash-attn-4", "openvino", "onnxruntime"),
)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    found["cudnn"] = str(torch.backends.cudnn.version()) if torch.cuda.is_available() else None
    return found


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, power limit and temperature as nvidia-smi reports them now; None without it."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in text.splitlines()[0].split(","))))


def load_average() -> list[float] | None:
    """Processes that ran or waited in the last 1, 5 and 15 minutes; None where the system does not count them."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def commit(results: str | None = None) -> str | None:
    """The commit of the checkout, with "+" if files differ from it, those of the folder `results` (from the root) left
    out, which a command that goes on has changed; VPTM_COMMIT where there is no git."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=20)
        changes = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":(top)"]
        changes += [] if results is None else [f":(top,exclude){results}"]
        changed = subprocess.run(changes, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("VPTM_COMMIT")
    return head.stdout.strip() + ("+" if changed else "")


def environment() -> dict[str, Any]:
    """Machine, clocks, driver, versions and commit, for every json."""
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpu state": gpu_state() if gpu else None,
        "threads": torch.get_num_threads(),
        "load average": load_average(),
        "versions": versions(),
        "commit": commit(),
    }
