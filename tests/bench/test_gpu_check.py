"""Two commands for a GPU that is borrowed for minutes: whatever a stage does, the others run, the budget holds, the
files are written, and all of it has been tried where there is no GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import KERNEL_TESTS

from bench import gpu_check, kernel_cache, timing
from bench.gpu_check import Check, Plan, Stage

WRITES = "import json,sys; json.dump({'benchmarks': [], 'proposals': []}, open(sys.argv[1], 'w'))"
# Interrupted, it writes what it has, as pytest-benchmark does.
WRITES_LATE = (
    "import json,signal,sys,time\n"
    "try: time.sleep(60)\n"
    "except KeyboardInterrupt: json.dump({'half': 1}, open(sys.argv[1], 'w'))"
)
DEAF = "import signal,time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


def python(name, code, seconds=5.0, *more, needs=0.0, **options):
    return Stage(name, ("-c", code, *more), seconds, needs, **options)


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    work = tmp_path / "work"
    work.mkdir()
    made = dict(os.environ)
    return lambda budget=30.0: Check("first", tmp_path / "out", work, budget, {"environment": {}}, made)


def run(check, *stages, warmers=()):
    return check.run(Plan(tuple(stages), tuple(warmers)))


def saved(check):
    return json.loads(check.json.read_text())


def test_a_stage_that_fails_is_recorded_and_the_others_run(check):
    check = check()
    stages = [
        python("breaks", "print('the reason'); raise SystemExit(3)"),
        Stage("tool", ("--help",), 5, 0, program="no-such-program"),
        python("writes", WRITES, 5.0, "{result}"),
    ]
    assert run(check, *stages) is False
    breaks, tool, writes = saved(check)["stages"]
    assert (breaks["status"], breaks["exit status"]) == ("failed", 3) and "the reason" in breaks["tail"]
    assert (tool["status"], tool["why"]) == ("skipped", "no-such-program is not installed")
    assert writes["status"] == "passed" and writes["result"] == {"benchmarks": [], "proposals": []}
    assert saved(check)["finished"] is True
    assert "gpu state after" in saved(check), "clocks that fell during the run explain its numbers"
    assert "the reason" in check.log.read_text()


def test_a_bench_of_two_stages_is_one_row(check):
    """The stage of compiled peers compares with vptm again: as a second row the report would refuse it."""
    first = {"batch": 64, "speed-up over a": 2.0, "microseconds": {"vptm": [1, 1, 1], "a": [2, 2, 2]}}
    later = {"batch": 64, "speed-up over b": 1.5, "microseconds": {"vptm": [9, 9, 9], "b": [3, 3, 3]}}
    write = "import json,sys; json.dump({{'benchmarks': {!r}}}, open(sys.argv[1], 'w'))"

    def stage(name, *benches):
        found = [{"fullname": full, "group": "g", "extra_info": info, "stats": {}} for full, info in benches]
        return python(name, write.format(found), 5.0, "{result}")

    check = check()
    run(check, stage("all", ("x", first)), stage("compiled", ("x", later), ("y", later)))
    both, named = (entry["result"]["benchmarks"] for entry in saved(check)["stages"])
    assert [bench["fullname"] for bench in both + named] == ["x", "y"] and named[0]["extra_info"] == later
    times = {"vptm": [1, 1, 1], "a": [2, 2, 2], "b": [3, 3, 3]}
    assert both[0]["extra_info"] == later | first | {"microseconds": times}


def test_the_file_is_complete_after_every_stage(check):
    """A machine taken away in the third stage must not take the first two with it."""
    check = check()
    # each stage sees what was saved when it ran
    code = f"import json; print(len(json.load(open({str(check.json)!r}))['stages'])); raise SystemExit(1)"
    run(check, *(python(str(i), code) for i in range(3)))
    assert [entry["tail"] for entry in saved(check)["stages"]] == [["0"], ["1"], ["2"]]


def test_a_stage_at_its_limit_is_interrupted_and_keeps_what_it_wrote(check):
    check = check(4.0)
    started = time.monotonic()
    run(check, python("slow", WRITES_LATE, 2.0, "{result}"), python("next", "pass", 2.0))
    slow, following = saved(check)["stages"]
    assert (slow["status"], slow["result"]) == ("stopped at its limit", {"half": 1})
    assert following["status"] == "passed"
    assert time.monotonic() - started < 20


BENCHES = (
    "import os, signal, time\n"
    "def test_first(benchmark): benchmark.pedantic(lambda: None, rounds=2)\n"
    "def test_second(benchmark): os.kill(os.getpid(), signal.{signal}); time.sleep(60)\n"
)


@pytest.mark.parametrize("number", ["SIGINT", "SIGKILL"])
def test_a_bench_run_that_is_cut_short_keeps_the_benches_that_finished(check, tmp_path, number):
    """pytest-benchmark writes its json at the end only; killed it writes none, and the lines made until then count."""
    folder = tmp_path / "benches"
    folder.mkdir()
    (folder / "conftest.py").write_text((gpu_check.ROOT / "bench" / "conftest.py").read_text())
    (folder / "bench_two.py").write_text(BENCHES.format(signal=number))
    quiet = ("-q", "-p", "no:cacheprovider", "-o", "python_functions=test_*")
    result = ("--benchmark-json", "{result}", "--each", "{each}")
    check = check()
    run(check, Stage("benches", ("-m", "pytest", str(folder / "bench_two.py"), *quiet, *result), 25.0, 0))
    (entry,) = saved(check)["stages"]
    assert entry["status"] == "failed"
    assert [bench["name"] for bench in entry["result"]["benchmarks"]] == ["test_first"], entry
    assert "data" not in entry["result"]["benchmarks"][0]["stats"] and "machine_info" in entry["result"]
    assert len(check.each.read_text().splitlines()) == 1


def test_a_half_written_json_is_named_and_stops_nothing(check):
    check = check()
    half = "import sys; open(sys.argv[1], 'w').write('{\"benchmarks\": [')"
    assert run(check, python("half", half, 5.0, "{result}"), python("next", "pass"))
    assert "its json is not complete" in saved(check)["stages"][0]["why"]


def test_a_stage_that_ignores_the_interrupt_is_killed_with_its_children(check):
    check = check(3.0)
    child = (
        f"import subprocess,sys,time; p = subprocess.Popen([sys.executable, '-c', {DEAF!r}]); print(p.pid, flush=True);"
    )
    run(check, python("deaf", child + DEAF, 3.0))
    (entry,) = saved(check)["stages"]
    assert entry["status"] == "stopped at its limit"
    assert ended(int(next(line for line in entry["tail"] if line.isdigit()))), "the stage's child still runs"


def state(pid):
    path = Path(f"/proc/{pid}/stat")
    return path.read_text().rsplit(")", 1)[1].split()[0] if path.exists() else "gone"


def ended(pid):
    for _ in range(100):
        if state(pid) in ("Z", "gone"):
            return True
        time.sleep(0.05)
    return False


def test_what_a_stage_leaves_over_goes_to_the_later_ones_and_the_budget_holds(check):
    check = check(20.0)
    run(check, python("first", "pass", 5.0), python("second", "pass", 5.0), python("third", "pass", 10.0))
    first, second, third = (entry["limit"] for entry in saved(check)["stages"])
    assert first == pytest.approx(5, abs=0.2)
    assert 5 < second <= 10
    assert 10 < third <= 20


def test_a_stage_that_would_get_less_than_it_needs_is_skipped_by_name(check):
    """Begun with a second left it would cost that second and say nothing; the next may need less."""
    check = check(5.0)
    began = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"
    marks = [str(check.work / name) for name in ("large", "small")]
    large = python("large", began, 1.0, marks[0], needs=60.0)
    assert run(check, large, python("small", began, 1.0, marks[1], needs=0.5))
    entry, small = saved(check)["stages"]
    assert entry["name"] == "large" and entry["status"] == "skipped"
    assert re.fullmatch(r"needs 60 s, [0-5] s are left", entry["why"]) and "command" not in entry
    assert small["status"] == "passed" and [Path(mark).exists() for mark in marks] == [False, True]


def test_what_compiles_in_the_background_stands_still_while_something_is_timed(check, tmp_path):
    """A timing beside a compiler's processes is no timing; afterwards they go on, and the stage they serve waits."""
    check = check()
    pid, done = tmp_path / "pid", tmp_path / "done"
    warm = (
        "import os,pathlib,sys,time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(2);"
        "pathlib.Path(sys.argv[2]).touch()"
    )
    seen = (
        "import pathlib,sys,time\n"
        "while not (p := pathlib.Path(sys.argv[1])).exists() or not p.read_text(): time.sleep(0.05)\n"
        "print('state', pathlib.Path(f'/proc/{p.read_text()}/stat').read_text().rsplit(')', 1)[1].split()[0])\n"
        "raise SystemExit(1)"
    )
    after = "import pathlib,sys; raise SystemExit(not pathlib.Path(sys.argv[1]).exists())"
    started = python("free", seen, 5.0, str(pid))
    timed = python("timed", seen, 5.0, str(pid), timed=True)
    served = python("served", after, 20.0, str(done), warmed=True, needs=1.0)
    run(check, started, timed, served, warmers=[python("compiling", warm, 0.0, str(pid), str(done))])
    free, stopped, last = saved(check)["stages"]
    assert "state T" not in free["tail"][0] and stopped["tail"] == ["state T"]
    assert last["status"] == "passed" and set(last["compiled before"]) == {"compiling"}
    assert "=== compiling: exit status 0" in check.log.read_text()


def test_what_is_not_compiled_in_time_is_ended_and_its_stage_still_runs(check):
    check = check(8.0)
    forever = python("compiling", "import time; print('begun', flush=True); time.sleep(600)", 0.0)
    assert run(check, python("served", "pass", 6.0, warmed=True, needs=4.0), warmers=[forever])
    (entry,) = saved(check)["stages"]
    assert entry["status"] == "passed" and 1 < entry["compiled before"]["compiling"] < 8
    assert "=== compiling: not done" in check.log.read_text()
    assert "failed warmers" not in saved(check)


def test_what_could_not_be_compiled_is_named_and_fails_the_run(check, capsys):
    """Its stage would compile as well, within its own time, and the run look like one in which all was ready."""
    check = check()
    broken = python("compiling", "raise SystemExit(4)", 0.0)
    assert run(check, python("served", "pass", 6.0, warmed=True, needs=1.0), warmers=[broken]) is False
    assert saved(check)["stages"][0]["status"] == "passed"
    assert saved(check)["failed warmers"] == {"compiling": 4}
    assert "compiling failed with exit status 4" in capsys.readouterr().out


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


@pytest.mark.parametrize("part", ["first", "second"])
def test_a_part_fits_its_budget_and_names_what_is_there(part):
    """Shares beyond the budget would leave the last stages nothing; a peer or file that is gone ends a stage."""
    plan = gpu_check.plan(part)
    assert sum(stage.seconds for stage in plan.stages) <= gpu_check.BUDGETS[part] - 15, "unpacking takes some"
    assert all(0 < stage.needs <= stage.seconds for stage in plan.stages)
    assert plan.warmers and any(stage.warmed for stage in plan.stages)
    for stage in (*plan.stages, *plan.warmers):
        for name in (part for part in stage.command if part.endswith(".py")):
            assert (gpu_check.ROOT / name).is_file(), name
        if "--peers" in stage.command:
            assert stage.command[stage.command.index("--peers") + 1], stage.name
            assert "cuda" in stage.command and "tiny" not in stage.command


def test_every_test_of_a_gpu_is_in_the_plan():
    """Workers are given the files that have some, and a new file would never see a GPU."""
    tests = gpu_check.ROOT / "tests"
    marked = {
        str(path.relative_to(gpu_check.ROOT))
        for path in tests.rglob("test_*.py")
        if "mark.gpu" + "\n" in path.read_text()
    }
    assert marked <= set(gpu_check.TESTS) and len(marked) >= 2
    assert {f"tests/kernels/{name}.py" for name in KERNEL_TESTS} == set(gpu_check.TESTS[1:])
    ops = {path.parent.name for path in (gpu_check.ROOT / "vptm_kernels").glob("*/api.py")}
    assert ops == set(gpu_check.OPS), "an op that no GPU would see"


COLLECTED = """
import contextlib, io, json, sys, torch, pytest
from bench import gpu_check, timing

class Seen:
    def pytest_collection_finish(self, session):
        self.names = [item.name for item in session.items]

known = {}
for part in ("first", "second"):
    timing.select(timing.Selection("cuda", (torch.bfloat16,), (), True))
    plan = gpu_check.plan(part)
    for stage in (*plan.stages, *plan.warmers):
        if "--peers" not in stage.command or stage.command in known:
            continue
        # benches read at import what is asked for
        for name in [name for name in sys.modules if name.startswith(("bench.bench_", "bench.peers"))]:
            del sys.modules[name]
        seen, said = Seen(), io.StringIO()
        arguments = stage.command[2 : stage.command.index("--benchmark-only")]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = pytest.main([*arguments, "--collect-only"], plugins=[seen])
        known[stage.command] = stage.name, int(status), getattr(seen, "names", []), said.getvalue()[-500:]
from bench import bench_model, bench_prompted_attention as attention, bench_training_step as training
settings = [str(each) for each, _ in (*bench_model.SETTINGS, *attention.SHAPES)]
compiled = [str(setting) for setting, _ in bench_model.SETTINGS if bench_model._in_every_form(setting)]
print(json.dumps([list(known.values()), settings, compiled, [str(setting) for setting in training.FIRST]]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU lists")
def test_every_stage_and_warmer_has_benches_that_know_its_peers_and_settings():
    """A peer that one bench of a stage does not know, or a setting that none has, ends the stage; a model that is not
    compiled where it is asked for compiled costs half a minute and times nothing. Both would be seen on a GPU first."""
    environment = {**os.environ, "PYTHONPATH": str(gpu_check.ROOT)}
    code = [sys.executable, "-c", COLLECTED]
    done = subprocess.run(code, capture_output=True, text=True, env=environment, cwd=gpu_check.ROOT)
    assert done.returncode == 0, done.stderr
    stages, settings, compiled, steps = json.loads(done.stdout.splitlines()[-1])
    assert len(stages) >= 10
    for name, status, benches, said in stages:
        assert status == 0 and benches and all(each.startswith("bench_") for each in benches), (name, status, said)
    known = [set(label.split()) for label in settings]
    for label in (*gpu_check.ATTENTION, *gpu_check.MODELS, *gpu_check.OTHER_BATCHES, *gpu_check.HALF):
        assert any(set(label.split()) <= words for words in known), label
    assert set(compiled) == set(gpu_check.MODELS) and steps == [gpu_check.MODELS[0]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys, tmp_path):
    assert gpu_check.main(["first", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "no GPU here: torch sees none (--rehearse runs every stage without one)\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["first", "--rehearse", "--only", "modell"], "--only must be of environment, .*got modell"),
        (["first", "--rehearse", "--only", " , "], "got nothing"),
        (["first", "--budget", "0"], "--budget must be positive, got 0"),
        ([], "a part must be named, first or second"),
        (
            ["first", "--rehearse", "--kernels", "nowhere.tar.xz"],
            "kernels must be an archive of .*got nowhere.tar.xz: ",
        ),
        (["first", "--rehearse", "--wheels", "nowhere"], "wheels must be a folder of wheels, got nowhere"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(timing, "select", lambda chosen: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_another_card_than_planned_is_one_line():
    assert gpu_check.another_card("sm90", "NVIDIA H100") is None and gpu_check.another_card(None, None) is None
    line = gpu_check.another_card("sm100", "NVIDIA B200")
    assert line == "another card than planned: NVIDIA B200 is sm100, planned was sm90; its numbers stand"


def test_the_commit_comes_from_the_environment_where_there_is_no_git(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "timing.py"))
    monkeypatch.delenv("VPTM_COMMIT", raising=False)
    assert gpu_check.prepare(tmp_path)[1] == [
        "the commit is unknown, and no result of it can be published: set VPTM_COMMIT"
    ]
    monkeypatch.setenv("VPTM_COMMIT", "abc")
    assert gpu_check.prepare(tmp_path)[1] == [] and timing.environment()["commit"] == "abc"


def test_wheels_are_installed_for_the_run_alone(tmp_path, monkeypatch):
    import zipfile

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "only_here-1-py3-none-any.whl", "w") as file:
        file.writestr("only_here.py", "VALUE = 7")
        file.writestr("only_here-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: only-here\nVersion: 1\n")
        file.writestr("only_here-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("only_here-1.dist-info/RECORD", "")
    environment, _ = gpu_check.prepare(tmp_path / "work", wheels=wheels)
    found = [sys.executable, "-c", "import only_here; print(only_here.VALUE)"]
    assert subprocess.run(found, env=environment, capture_output=True, text=True, cwd=tmp_path).stdout == "7\n"
    assert subprocess.run(found, capture_output=True, cwd=tmp_path).returncode


@pytest.mark.slow
def test_every_stage_is_rehearsed_to_its_end(tmp_path):
    """The whole of the first part and what the second has beside it, with packed kernels, joins, report and README."""
    pytest.importorskip("triton")
    archive = tmp_path / "kernels.tar.xz"
    folder = tmp_path / "cache"
    kernel_cache.pack(archive, kernel_cache.TARGET, ["probe"], folder)
    environment = {**os.environ, "PYTHONPATH": str(gpu_check.ROOT), "VPTM_COMMIT": "abc"}
    command = [sys.executable, "-m", "bench.gpu_check", "--rehearse", "--out", str(tmp_path / "out")]
    more = ["--kernels", str(archive)]
    runs = [["first", *more], ["second", *more, "--only", "sanitizer"]]
    for arguments in runs:
        done = subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    first, second = (json.loads((out / f"{part}.json").read_text()) for part in ("first", "second"))
    statuses = {entry["name"]: entry["status"] for entry in (*first["stages"], *second["stages"])}
    assert statuses == {stage.name: "passed" for stage in gpu_check.plan("first").stages} | {"sanitizer": "passed"}
    facts, _, headlines, compiled, sizes = (entry.get("result") for entry in first["stages"])
    assert facts["packed kernels are accepted"] is True and facts["ceilings"]
    assert first["stages"][1]["tests"]["counts"].keys() == {"passed"}
    rows = headlines["benchmarks"]
    assert len(rows) >= 3 and not compiled["benchmarks"], "what both stages timed is one row"
    assert all("speed-up over torch.compile" in row["extra_info"] for row in rows)
    assert len((out / "first.jsonl").read_text().splitlines()) == 2 * len(rows)
    assert sizes["kept"] or sizes["proposals"]
    assert "P=0 D=16" in (out / "results.md").read_text()
    assert (out / "README.md").read_text() != (gpu_check.ROOT / "README.md").read_text()
    assert str(tmp_path) not in first["command"]


def test_what_was_compiled_on_a_machine_before_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers take longer to compile than to time, and the second of two borrowed machines would compile them again."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert gpu_check.prepare(tmp_path)[0]["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "carried")
    assert gpu_check.prepare(tmp_path)[0]["TORCHINDUCTOR_CACHE_DIR"] == "carried"
