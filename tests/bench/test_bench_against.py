"""A vptm that merely got slower is named against the results of before, and nothing else is."""

from __future__ import annotations

import json

import pytest
import torch
from counting_clock import CountingClock

from bench import report, timing

X = torch.ones(3)


def run_of(path, vptm_operations, spread=0.0, peers=("concatenation",), refused=None):
    """The json of a bench in which vptm does so many operations and every peer twelve, timed by what they do."""
    clock, turn = CountingClock(), [0]

    def seconds(run):
        turn[0] += 1
        return clock.seconds(run) * (1 + spread * (turn[0] % 3))

    def work(operations):
        return lambda: [X + X for _ in range(operations)]

    runs = {"vptm": work(vptm_operations)} | {peer: work(12) for peer in peers}
    info = timing.compare(runs, check=None, rounds=9, clock=seconds).info() | (refused or {})
    machine = {"cpu": {"brand_raw": "a CPU"}, "threads": 2, "versions": {"torch": "2"}}
    bench = {"fullname": "bench/bench_model.py::x", "group": "inference", "extra_info": info}
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": [bench]}))
    return str(path)


def test_a_slower_vptm_fails_against_the_run_before(tmp_path, capsys):
    """Tests pass whatever an op takes: this is what sees a regression of speed."""
    before, after = (run_of(tmp_path / f"{n}.json", n) for n in (4, 6))
    assert report.main(["--against", before, after]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "fell: inference: over concatenation: 3x [3x, 3x] -> 2x [2x, 2x], -33.3%",
        "1 ratios compared, 1 fell beyond the quartiles of both runs",
    ]


@pytest.mark.parametrize(
    "before, after, spread", [(4, 4, 0.0), (6, 4, 0.0), (24, 25, 0.2)], ids=["same", "faster", "noise"]
)
def test_what_is_as_fast_or_within_the_spread_passes(tmp_path, capsys, before, after, spread):
    """A check that cried at noise would be ignored."""
    files = (run_of(tmp_path / f"{i}.json", n, spread) for i, n in enumerate((before, after)))
    assert report.main(["--against", *files]) == 0
    assert capsys.readouterr().out == "1 ratios compared, none fell beyond the quartiles of both runs\n"


def test_a_ratio_that_is_gone_and_another_machine_are_named(tmp_path, capsys):
    """A peer refused by the new run could hide what happened to its ratio."""
    before = run_of(tmp_path / "before.json", 4, peers=("concatenation", "prefix"))
    after = run_of(tmp_path / "after.json", 4, refused={"refused": {"prefix": "is wrong"}})
    content = json.loads((tmp_path / "after.json").read_text())
    content["machine_info"]["threads"] = 8
    (tmp_path / "after.json").write_text(json.dumps(content))
    assert report.main(["--against", before, after]) == 0
    out = capsys.readouterr().out
    assert "no longer compared: inference: prefix: is wrong" in out
    assert "measured elsewhere: a CPU, 2 threads, torch 2 and a CPU, 8 threads, torch 2" in out


def test_runs_without_a_common_ratio_are_refused(tmp_path, capsys):
    """Nothing compared must not look like nothing lost."""
    before = run_of(tmp_path / "before.json", 4)
    after = run_of(tmp_path / "after.json", 4, peers=("other",))
    with pytest.raises(SystemExit) as exit_status:
        report.main(["--against", before, after])
    assert exit_status.value.code == 2 and "none in common" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["--against", before])
