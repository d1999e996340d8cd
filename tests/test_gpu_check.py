"""One command for a GPU machine: whatever a stage does, the others run, the budget holds and the file is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check
from bench.gpu_check import Check, Stage

WRITES = "import json,sys; json.dump({'benchmarks': [], 'proposals': []}, open(sys.argv[1], 'w'))"
# Interrupted, it writes what it has, as pytest-benchmark does.
WRITES_LATE = (
    "import json,signal,sys,time\n"
    "try: time.sleep(60)\n"
    "except KeyboardInterrupt: json.dump({'half': 1}, open(sys.argv[1], 'w'))"
)
DEAF = "import signal,time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


def python(name, code, seconds=5.0, *more):
    return Stage(name, ("-c", code, *more), seconds)


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    return lambda budget=30.0: Check(tmp_path / "out", budget, {"environment": {}})


def saved(check):
    return json.loads((check.out / gpu_check.JSON).read_text())


def test_a_stage_that_fails_is_recorded_and_the_others_run(check):
    check = check()
    stages = [
        python("breaks", "print('the reason'); raise SystemExit(3)"),
        Stage("tool", ("--help",), 5, program="no-such-program"),
        python("writes", WRITES, 5.0, "{result}"),
    ]
    assert check.run(stages) is False
    breaks, tool, writes = saved(check)["stages"]
    assert (breaks["status"], breaks["exit status"]) == ("failed", 3) and "the reason" in breaks["tail"]
    assert (tool["status"], tool["why"]) == ("skipped", "no-such-program is not installed")
    assert writes["status"] == "passed" and writes["result"] == {"benchmarks": [], "proposals": []}
    assert saved(check)["finished"] is True
    assert "gpu state after" in saved(check), "clocks that fell during the run explain its numbers"
    assert "the reason" in (check.out / gpu_check.LOG).read_text()


def test_a_bench_of_two_stages_is_one_row(check):
    """The stage of peers that take minutes compares with vptm again: as a second row the report would refuse it."""
    first = {"batch": 64, "speed-up over a": 2.0, "microseconds": {"vptm": [1, 1, 1], "a": [2, 2, 2]}}
    later = {"batch": 64, "speed-up over b": 1.5, "microseconds": {"vptm": [9, 9, 9], "b": [3, 3, 3]}}
    write = "import json,sys; json.dump({{'benchmarks': {!r}}}, open(sys.argv[1], 'w'))"

    def stage(name, *benches):
        found = [{"fullname": full, "group": "g", "extra_info": info, "stats": {}} for full, info in benches]
        return python(name, write.format(found), 5.0, "{result}")

    check = check()
    check.run([stage("all", ("x", first)), stage("named", ("x", later), ("y", later))])
    both, named = (entry["result"]["benchmarks"] for entry in saved(check)["stages"])
    assert [bench["fullname"] for bench in both + named] == ["x", "y"] and named[0]["extra_info"] == later
    times = {"vptm": [1, 1, 1], "a": [2, 2, 2], "b": [3, 3, 3]}
    assert both[0]["extra_info"] == later | first | {"microseconds": times}


def test_the_file_is_complete_after_every_stage(check):
    """A machine taken away in the third stage must not take the first two with it."""
    check = check()
    path = check.out / gpu_check.JSON
    # each stage sees what was saved when it ran
    code = f"import json; print(len(json.load(open({str(path)!r}))['stages'])); raise SystemExit(1)"
    check.run([python(str(i), code) for i in range(3)])
    assert [entry["tail"] for entry in saved(check)["stages"]] == [["0"], ["1"], ["2"]]


def test_a_stage_at_its_limit_is_interrupted_and_keeps_what_it_wrote(check):
    check = check(4.0)
    started = time.monotonic()
    check.run([python("slow", WRITES_LATE, 2.0, "{result}"), python("next", "pass", 2.0)])
    slow, following = saved(check)["stages"]
    assert (slow["status"], slow["result"]) == ("stopped at its limit", {"half": 1})
    assert following["status"] == "passed"
    assert time.monotonic() - started < 20


def test_an_interrupted_bench_run_keeps_the_benches_that_finished(check, tmp_path):
    """pytest-benchmark writes its json at the end only: it must get to its end when the time is up."""
    file = tmp_path / "bench_two.py"
    file.write_text(
        "import os, signal, time\n"
        "def test_first(benchmark): benchmark.pedantic(lambda: None, rounds=2)\n"
        "def test_second(benchmark): os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    command = ("-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "--benchmark-json", "{result}")
    check = check()
    check.run([Stage("benches", command, 25.0)])
    (entry,) = saved(check)["stages"]
    assert entry["status"] == "failed"
    assert [bench["name"] for bench in entry["result"]["benchmarks"]] == ["test_first"]
    assert "data" not in entry["result"]["benchmarks"][0]["stats"]


def test_a_half_written_json_is_named_and_stops_nothing(check):
    check = check()
    half = "import sys; open(sys.argv[1], 'w').write('{\"benchmarks\": [')"
    assert check.run([python("half", half, 5.0, "{result}"), python("next", "pass")])
    assert "its json is not complete" in saved(check)["stages"][0]["why"]


def test_a_stage_that_ignores_the_interrupt_is_killed_with_its_children(check):
    check = check(3.0)
    child = (
        f"import subprocess,sys,time; p = subprocess.Popen([sys.executable, '-c', {DEAF!r}]); print(p.pid, flush=True);"
    )
    check.run([python("deaf", child + DEAF, 3.0)])
    (entry,) = saved(check)["stages"]
    assert entry["status"] == "stopped at its limit"
    pid = int(next(line for line in entry["tail"] if line.isdigit()))
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the stage's child still runs")


def test_what_a_stage_leaves_over_goes_to_the_later_ones_and_the_budget_holds(check):
    check = check(20.0)
    check.run([python("first", "pass", 5.0), python("second", "pass", 5.0), python("third", "pass", 10.0)])
    first, second, third = (entry["limit"] for entry in saved(check)["stages"])
    assert first == pytest.approx(5, abs=0.2)
    assert 5 < second <= 10
    assert 10 < third <= 20


def test_without_time_left_a_stage_is_not_run_and_says_so(check):
    check = check(0.5)
    assert check.run([python("never", "raise SystemExit(1)")]) is False
    (entry,) = saved(check)["stages"]
    assert (entry["status"], entry["why"]) == ("not run", "no time left")


@pytest.mark.parametrize("workers", [False, True])
def test_outcomes_are_read_from_complete_and_from_cut_off_output(workers):
    """A run of tests stopped at its limit prints no summary: its counts come from the progress lines."""
    lines = [("a.py::test_1[x y]", "PASSED"), ("a.py::test_2", "FAILED"), ("b.py::test_3", "SKIPPED")]
    if workers:
        text = "\n".join(f"[gw1] [ 50%] {outcome} tests/{name} " for name, outcome in lines)
    else:
        reasons = {"SKIPPED": "(needs a GPU) "}
        text = "\n".join(f"tests/{name} {outcome} {reasons.get(outcome, '')}[ 5%]" for name, outcome in lines)
    text += "\nFAILED tests/a.py::test_2 - AssertionError: PASSED\nSKIPPED [1] tests/b.py:3: needs a GPU"
    text += "\ntests/c.py::test_4 "
    assert gpu_check.outcomes(text) == {
        "counts": {"passed": 1, "failed": 1, "skipped": 1},
        "failed": ["tests/a.py::test_2"],
    }


def test_stages_cover_every_bench_and_every_op_within_the_budget():
    """A new bench or op that no stage runs would never see a GPU."""
    stages = gpu_check.stages()
    commands = " ".join(" ".join(stage.command) for stage in stages)
    for path in (gpu_check.ROOT / "bench").glob("bench_*.py"):
        assert f"bench/{path.name}" in commands or path.name in gpu_check.CPU_BENCHES, path.name
    for path in (gpu_check.ROOT / "vptm_kernels").glob("*/api.py"):
        assert f"tests/test_{path.parent.name}.py" in commands, path.parent.name
    assert sum(stage.seconds for stage in stages) <= 60 * gpu_check.MINUTES
    names = [stage.name for stage in stages]
    assert names.index("max-autotune") > max(names.index(gpu_check._title(bench)) for bench in gpu_check.BENCHES)
    assert [stage.name for stage in stages][:3] == ["kernel tests", "prompted attention", "model"]
    for name in (part for stage in stages for part in stage.command if part.endswith(".py")):
        assert (gpu_check.ROOT / name).is_file(), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "no GPU here: torch sees none (--dry-run tries the commands without one)\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "modell"], "--only must be of kernel tests, .*got modell"),
        (["--only", " , "], "got nothing"),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
    ],
)
def test_a_selection_of_nothing_is_an_error(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_dry_run_tries_commands_from_a_checkout_without_an_install(tmp_path):
    """The options and paths of the stages are right: an error in them would cost a GPU lease."""
    environment = {**os.environ, "PYTHONPATH": str(gpu_check.ROOT)}
    command = [sys.executable, "-m", "bench.gpu_check", "--dry-run", "--out", str(tmp_path), "--minutes", "3"]
    done = subprocess.run(
        [*command, "--only", "prompted attention,autotune,max-autotune"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / gpu_check.JSON).read_text())
    assert [entry["status"] for entry in document["stages"]] == ["passed", "passed", "passed"]
    assert "--device cuda" in document["stages"][0]["command"]
    assert str(tmp_path) not in document["command"]
