"""Benches cannot lie: slower is seen as slower, wrong is not timed, and a run of nothing is no success."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from counting_clock import CountingClock

from bench import conftest, timing
from vptm_kernels import prompted_attention
from vptm_kernels.prompted_attention.reference import prompted_attention_reference

pytest_plugins = ["pytester"]


X = torch.arange(6.0)


def close_to(expected):
    def check(name, found):
        torch.testing.assert_close(found, expected, msg=lambda m: f"{name} is wrong")

    return check


def attention_runs(slower: int):
    """The attention op, run `slower` times over, and the definition it is compared with."""
    generator = torch.Generator().manual_seed(0)
    qkv, prompts = (torch.randn(*shape, generator=generator) for shape in ((2, 7, 96), (3, 64)))

    def ours():
        for _ in range(slower):
            out = prompted_attention(qkv, prompts, num_heads=2)
        return out

    exact = prompted_attention_reference(qkv.double(), prompts.double(), num_heads=2)[0]
    eager = prompted_attention_reference(qkv, prompts, num_heads=2)[0]
    runs = {"eager": lambda: prompted_attention_reference(qkv, prompts, num_heads=2)[0], "vptm": ours}
    return runs, timing.within_budget([exact], [eager], [2])


def test_making_vptm_slower_on_purpose_lowers_its_ratio():
    """A bench that reported the same speed-up for an op doing its work four times would be worthless."""
    found = []
    for slower in (1, 4):
        runs, check = attention_runs(slower)
        found.append(timing.compare(runs, check=check, clock=CountingClock().seconds))
    honest, slowed = (result.speed_up("eager") for result in found)
    assert honest > 1
    assert slowed == honest / 4
    assert found[1].info()["speed-up over eager"] < found[0].info()["speed-up over eager"]
    assert found[1].info()["microseconds"]["vptm"][1] == 4 * found[0].info()["microseconds"]["vptm"][1]


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (lambda: X * float("nan"), "wrong peer is wrong"),
        (lambda: X + 1, "wrong peer is wrong"),
        (lambda: X[:-1], "wrong peer is wrong"),
        (lambda: torch.zeros(2) @ X, "size"),
    ],
    ids=["nan", "off by one", "shape", "raises"],
)
def test_a_wrong_peer_is_refused_by_name_and_never_timed(wrong, reason):
    calls, clock = [], CountingClock()

    def peer():
        calls.append(1)
        return wrong()

    runs = {"wrong peer": peer, "eager": lambda: X + X, "vptm": lambda: X * 2}
    found = timing.compare(runs, check=close_to(X * 2), clock=clock.seconds)
    assert len(calls) == 1, "called by the check alone"
    assert "wrong peer" not in found.seconds and reason in found.refused["wrong peer"]
    info = found.info()
    assert "speed-up over wrong peer" not in info and "wrong peer" in info["refused"]
    assert info["speed-up over eager"] == 1


def test_a_peer_that_no_graph_captures_is_refused_and_not_timed_otherwise(monkeypatch):
    """Replays of ours beside launches of theirs would be a speed-up of the clock."""
    replayed = []

    def captured(run):
        if run is synchronising:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: replayed.append(run) or run()

    monkeypatch.setattr(timing, "captured", captured)
    synchronising, eager, ours = (lambda: X * 2), (lambda: X + X), (lambda: 2 * X)
    runs = {"synchronising": synchronising, "eager": eager, "vptm": ours}
    clock = CountingClock().seconds
    found = timing.compare(runs, check=close_to(X * 2), device="cuda", graph=True, clock=clock, rounds=3, warmup=1)
    assert found.refused == {"synchronising": "operation not permitted when stream is capturing"}
    assert set(found.seconds) == {"eager", "vptm"}
    assert replayed.count(eager) == replayed.count(ours) == 4


def test_a_replay_that_differs_from_its_call_is_refused(monkeypatch):
    """A graph reads the addresses it was captured with: right once, it may be wrong ever after."""
    stale = lambda: X + X  # noqa: E731
    monkeypatch.setattr(timing, "captured", lambda run: (lambda: X * 3) if run is stale else run)
    runs = {"stale": stale, "vptm": lambda: X * 2}
    found = timing.compare(runs, check=close_to(X * 2), device="cuda", graph=True, clock=CountingClock().seconds)
    assert set(found.refused) == {"stale"} and set(found.seconds) == {"vptm"}


def test_nan_exceeds_every_error_budget():
    """Comparisons with NaN are all false: a budget written the other way round would let a NaN peer through."""
    exact = torch.ones(3, dtype=torch.float64)
    check = timing.within_budget([exact], [torch.full((3,), 1.5)], [1e9])
    check("coarse", torch.full((3,), 2.0))
    with pytest.raises(AssertionError, match="NaN peer"):
        check("NaN peer", torch.full((3,), float("nan")))
    with pytest.raises(AssertionError, match="2 results, expected 1"):
        check("pair", (torch.ones(3), torch.ones(3)))


def test_no_number_on_red():
    """When vptm itself is wrong nothing is timed, not even a peer."""
    clocked = []
    with pytest.raises(AssertionError, match="vptm is wrong"):
        timing.compare(
            {"eager": lambda: X * 2, "vptm": lambda: X + 1}, check=close_to(X * 2), clock=lambda run: clocked.append(1)
        )
    assert not clocked


def test_drift_cancels_in_paired_ratios():
    """A machine that slows down threefold during the run moves every time and no ratio by more than one step."""
    elapsed, costs = [0.0], {}

    def clock(run):
        elapsed[0] += 1
        return costs[run] * (1 + elapsed[0] / 14)

    runs = {"eager": lambda: X, "vptm": lambda: X.clone()}
    costs.update({runs["eager"]: 2.0, runs["vptm"]: 1.0})
    found = timing.compare(runs, check=None, rounds=14, clock=clock)
    assert max(found.seconds["vptm"]) > 1.9 * min(found.seconds["vptm"])
    assert found.speed_up("eager") == pytest.approx(2, rel=0.06)
    # the order rotates: nobody always runs behind the same neighbour
    assert {ratio > 2 for ratio in found.ratios("eager")} == {True, False}


def test_short_calls_are_repeated_and_count_once():
    """A turn of many calls must not look like one long call, nor a long call be repeated."""
    clock, called = CountingClock(), {"long": 0, "vptm": 0}

    def work(name, operations):
        called[name] += 1
        for _ in range(operations):
            X + X

    runs = {"long": lambda: work("long", 8), "vptm": lambda: work("vptm", 2)}
    found = timing.compare(runs, check=None, rounds=3, warmup=0, at_least=10, clock=clock.seconds)
    assert found.seconds == {"long": [8.0] * 3, "vptm": [2.0] * 3}
    assert called == {"long": 1 + 3 * 1, "vptm": 1 + 3 * 5}


def test_peak_memory_counts_what_is_held_at_once():
    """Two buffers one after the other are half of two at a time."""

    def one_after_the_other():
        for _ in range(2):
            torch.zeros(1000)

    def both_at_once():
        return torch.zeros(1000), torch.zeros(1000)

    single = timing.peak_extra_bytes(one_after_the_other, "cpu")
    assert 4000 <= single < 8000 <= timing.peak_extra_bytes(both_at_once, "cpu")


def test_the_ceilings_are_the_best_of_several_turns(monkeypatch):
    """A neighbour that takes the machine for a turn would lower a ceiling: plain products would come out above 1."""
    seconds = iter([8.0, 4.0, 1.0, *[8.0] * 4] + [4.0, 2.0, 4.0, 0.5] + [4.0, 2.0] * 5)
    monkeypatch.setattr(timing, "clock_of", lambda *_: lambda run: next(seconds))
    monkeypatch.setattr(timing, "products", lambda *_: {"one": lambda: None, "other": lambda: None})
    for cached in (timing.ceilings, timing.matrix_rates):
        cached.cache_clear()
    bandwidth, rate = timing.ceilings("cpu", torch.float32)
    for cached in (timing.ceilings, timing.matrix_rates):
        cached.cache_clear()
    assert bandwidth == 2 * (1 << 28) / 1.0 and rate == 2 * 2048**3 / 0.5
    assert timing.measured_rates["torch.float32"] == {"one": 2 * 2048**3 / 4.0, "other": rate}


def test_every_matrix_library_multiplies_the_same():
    """A ceiling of the slower library would call what the faster one leaves unused 98 % of the machine."""
    a, b = torch.randn(2, 8, 8)
    found = {name: run() for name, run in timing.products("cpu", a, b).items()}
    assert not torch.backends.mkldnn.is_available() or "oneDNN" in found
    for result in found.values():
        torch.testing.assert_close(result.to_dense() if result.is_mkldnn else result, a @ b)


def test_forms_of_vptm_are_compared_with_every_peer():
    """What vptm reaches without a processor's special case, or in a graph against others in graphs, stands beside."""
    clock = CountingClock()
    runs = {"vptm": lambda: X + X, "vptm with MKL": lambda: X + X + X, "eager": lambda: X + X + X + X}
    info = timing.compare(runs, check=None, clock=clock.seconds).info()
    assert info["speed-up over eager"] == 3 and info["speed-up over vptm with MKL"] == 2
    assert info["forms"] == {"vptm with MKL": {"eager": [1.5, 1.5, 1.5]}}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_without_onednn_nothing_runs_in_it():
    assert timing.without_onednn(lambda: torch.backends.mkldnn.enabled)() is False
    assert torch.backends.mkldnn.enabled


def test_share_of_ceiling_is_the_slower_of_the_two_times(monkeypatch):
    monkeypatch.setattr(timing, "ceilings", lambda *_: (100.0, 1000.0))
    for moved, operations, share in ((50, 100, 0.25), (5, 4000, 2.0)):
        info = timing.work_info(2.0, moved, operations, "cpu", torch.float32)
        assert info["share of ceiling"] == share
        assert (info["achieved bandwidth"], info["achieved rate"]) == (moved / 2, operations / 2)


def test_environment_says_where_and_what():
    found = timing.environment()
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"]
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
    assert {"threads", "commit", "gpu state", "load average"} <= set(found)


def test_the_commit_comes_from_the_environment_where_there_is_no_git_folder(monkeypatch):
    """Results of a borrowed machine, which gets the files alone, would be of no commit."""

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(timing.subprocess, "run", no_git)
    monkeypatch.setenv("VPTM_COMMIT", "abc")
    assert timing.commit() == "abc"


def test_results_that_a_command_has_changed_are_no_change_of_the_checkout(tmp_path, monkeypatch):
    """A study that goes on would be of another commit than when it began; any other edit still shows."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for file in ("bench/timing.py", "studies/results/a.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("before")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "bench/timing.py"))
    assert timing.commit() == timing.commit("studies/results") == head
    (tmp_path / "studies/results/a.json").write_text("after")
    assert timing.commit() == head + "+" and timing.commit("studies/results") == head
    (tmp_path / "bench/timing.py").write_text("after")
    assert timing.commit("studies/results") == head + "+"


@pytest.mark.parametrize("arguments, message", [({"ours": "mine"}, "ours must be one of a"), ({"rounds": 0}, "rounds")])
def test_a_comparison_of_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        timing.compare({"a": lambda: X}, **{"ours": "a", "check": None, **arguments})


BENCH = """
import pytest, torch
from bench import timing

X = torch.ones(3)
DEVICE, DTYPE = timing.Selection().device, timing.Selection().dtypes[0]
PEERS = {
    "eager": timing.Peer(lambda: X + X),
    "wrong": timing.Peer(lambda: X * 3),
    "absent": timing.Peer(lambda: X, needs=("no_such_package",)),
}

def check(name, found):
    assert torch.equal(found, X * 2), f"{name} differs"

@pytest.mark.parametrize("name", [*PEERS, "vptm"])
def bench_doubling(benchmark, name):
    benchmark.group = "doubling"
    runs = {"vptm": lambda: X * 2} | {n: p.run for n, p in timing.present(PEERS).items()}
    if name == "vptm":
        benchmark.extra_info |= timing.compare(runs, check=check, device=timing.selection.device).info()
    elif why := timing.refusal(name, runs[name], check):
        pytest.skip(f"not timed: {why}")
    benchmark.pedantic(runs[name], rounds=1)
"""


# a bench that is not parametrised by implementation, and times in one dtype
PLAIN = """
import torch
from bench import timing

DTYPE = torch.float32
PEERS = {"eager": timing.Peer(lambda: 1), "xformers": timing.Peer(lambda: 1, needs=("no_such_package",))}

def bench_plain(benchmark):
    benchmark.group = "plain"
    runs = {"vptm": lambda: 1} | {n: p.run for n, p in timing.present(PEERS).items()}
    benchmark.extra_info |= timing.compare(runs, check=None).info()
    benchmark.extra_info |= timing.work_info(1.0, 10**6, 10**9, "cpu", DTYPE)
    names = ("exponent of time", "exponent of memory", "expected exponent of time")
    benchmark.extra_info |= dict(zip(names, (1.04, None, 1)))
    benchmark.pedantic(runs["vptm"], rounds=1)
"""


@pytest.fixture
def benches(pytester, monkeypatch):
    """A bench folder with two files, run with arguments in this process; the selection is put back afterwards."""
    before = timing.selection
    # the machine's description costs seconds and is tested above
    monkeypatch.setattr(timing, "environment", lambda: {"gpu": None})
    monkeypatch.setattr(timing, "ceilings", lambda *_: (1e7, 4e9))
    pytester.makeconftest("from bench.conftest import *")
    pytester.makeini("[pytest]\npython_files = bench_*.py\npython_functions = bench_*")
    pytester.makepyfile(bench_doubling=BENCH)
    pytester.mkdir("plain").joinpath("bench_plain.py").write_text(PLAIN)
    monkeypatch.setattr("pytest_benchmark.plugin.get_commit_info", lambda *_: {"id": "none"})
    yield lambda *arguments, file="bench_doubling.py": pytester.runpytest_inprocess(
        "--benchmark-only", "-rs", file, *arguments
    )
    timing.select(before)


def test_a_bench_run_reports_ratios_refusals_and_absences(benches):
    result = benches()
    result.assert_outcomes(passed=2, skipped=2)
    result.stdout.fnmatch_lines_random(
        [
            "*not timed: wrong differs*",
            "*absent: needs the package no_such_package, which is not installed*",
            "*doubling: *x over eager*",
            "*doubling: wrong: wrong differs*",
        ]
    )


def test_peers_can_be_chosen_and_an_absent_one_is_skipped_by_name(benches):
    result = benches("--peers", "absent")
    result.assert_outcomes(passed=1, skipped=1, deselected=2)
    result.stdout.fnmatch_lines(["*absent: needs the package no_such_package*"])
    result.stdout.no_fnmatch_line("*over eager*")


NO_PACKAGE = "needs the package no_such_package, which is not installed"


def test_the_closing_tables_show_exponents_and_work(benches):
    """What the complexity bench claims must be seen without opening a json."""
    benches(file="plain").stdout.fnmatch_lines(
        [
            "plain: bench_plain: 1 MB, 1 GFLOP, 25% of the ceiling",
            "*fitted exponents*",
            "plain: time 1.04 (expected 1), memory none",
        ]
    )


def test_peers_that_are_not_here_are_listed_though_nobody_asked_for_them(benches, pytester):
    """A table without xformers would read as if it had been beaten. The json says it as well, with the machine's load
    and clock, and what the run took."""
    result = benches("--benchmark-json", "found.json", file="plain")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*absent, not timed*", f"bench_plain: xformers: {NO_PACKAGE}", "all benches took * s"])
    machine = json.loads(pytester.path.joinpath("found.json").read_text())["machine_info"]
    assert machine["absent"] == {"bench_plain": {"xformers": NO_PACKAGE}}
    assert {"load average before", "gpu state before"} <= set(machine)


def test_the_clock_of_the_cpu_stays_in_the_json():
    """A machine is described without what tells nothing of its speed; its clocks tell."""
    cpu = {"brand_raw": "x", "hz_advertised_friendly": "2.5 GHz", "hz_actual_friendly": "3.1 GHz", "flags": ["sse"]}
    output = {"machine_info": {"cpu": dict(cpu), "release": "1"}}
    conftest.pytest_benchmark_update_json(None, [], output)
    assert output == {"machine_info": {"cpu": {name: cpu[name] for name in cpu if name != "flags"}}}


@pytest.mark.parametrize("file, name", [("plain", "xformers"), ("bench_doubling.py", "absent")])
def test_a_run_of_absent_peers_alone_is_no_success(benches, file, name):
    """vptm alone is timed then, and nothing that was asked for."""
    result = benches("--peers", name, file=file)
    assert result.ret == 5
    result.stdout.fnmatch_lines([f"bench_*: {name}: {NO_PACKAGE}", f"nothing was timed of --peers {name}"])


@pytest.mark.parametrize("peer", ["wrong", "eager"])
def test_a_run_of_refused_peers_alone_is_no_success(benches, peer):
    assert benches("--peers", peer).ret == (5 if peer == "wrong" else 0)


def test_one_peer_of_two_is_enough(benches):
    result = benches("--peers", "xformers,eager", file="plain")
    assert result.ret == 0
    result.stdout.fnmatch_lines([f"bench_plain: xformers: {NO_PACKAGE}"])


def test_a_dtype_that_is_left_out_is_named(benches):
    """Asked for two, a bench that times one of them in silence would be taken for both."""
    result = benches("--dtype", "float32,float16", file="plain")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["bench_plain: dtype float16: float32 alone is timed"])


@pytest.mark.parametrize(
    "arguments, exit_code, message",
    [
        (["--peers", "xformerz"], 4, "*--peers must be of absent, eager, wrong, got xformerz*"),
        (["--dtype", "float7"], 4, "*--dtype must be of float16, bfloat16, float32, got float7*"),
        (["-k", "nothing_of_that_name"], 5, "*nothing was timed*"),
        (["-k", "absent"], 5, "*nothing was timed*"),
    ],
    ids=["unknown peer", "unknown dtype", "empty selection", "everything skipped"],
)
def test_an_empty_or_unknown_selection_is_an_error(benches, arguments, exit_code, message):
    result = benches(*arguments)
    assert result.ret == exit_code
    (result.stderr if exit_code == 4 else result.stdout).fnmatch_lines([message])


def test_a_dtype_that_a_bench_does_not_time_is_skipped_by_name_and_no_success(benches):
    """Timing float32 under a command line that asks for float16 would put a wrong number beside a right name."""
    result = benches("--dtype", "float16")
    assert result.ret == 5
    result.stdout.fnmatch_lines_random(["*dtype float16 is not timed by bench_doubling.py, * is*"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_here_is_skipped_by_name_and_no_success(benches):
    result = benches("--device", "cuda")
    assert result.ret == 5
    result.stdout.fnmatch_lines_random(["*device cuda is not here*", "*nothing was timed*"])
