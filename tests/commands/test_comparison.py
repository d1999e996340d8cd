"""`vptm compare`: what it trains, what it selects on, what survives a stop or a failure, and what it writes."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from console import Console
from tiny_data import write_pictures

import vptm.commands.comparison as compare_module
from vptm.commands.app import main
from vptm.commands.comparison import SEARCH_SEED, compare
from vptm.commands.comparison_table import table

MINE = "summary: mine\nsettings: {{readout: mean, token_activation: hidden, verbalizer: linear{}}}\n"


def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: list[list[str]]) -> Any:
    """A launcher that runs `vptm` here: starting a process takes longer than these runs."""

    def launch(arguments: list[str]) -> tuple[int, str]:
        calls.append(arguments)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        return int(end.value.code or 0), capsys.readouterr().err

    return launch


@pytest.fixture
def calls() -> list[list[str]]:
    return []


@pytest.fixture
def run(
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    calls: list[list[str]],
) -> Any:
    monkeypatch.chdir(tmp_path)
    launcher = in_process(monkeypatch, capsys, calls)

    def start(*methods: str, out: str = "out", **settings: Any) -> Any:
        defaults = {"data": str(material / "pictures"), "seeds": 2, "epochs": 3, "shots": "2", "launch": launcher}
        options = defaults | settings
        more = [*options.pop("arguments", []), "--model", str(material / "backbone.safetensors"), "--batch-size", "3"]
        return compare(methods, out, arguments=more, **options)

    return start


def test_table_csv_and_plot_say_what_the_runs_say(run: Any, calls: list[list[str]]) -> None:
    """Mean and spread come from the runs' own test results; every method has the same seeds, epochs and images."""
    results = run("linear", "vptm")
    rows = {row["method"]: row for row in csv.DictReader(Path("out/comparison.csv").read_text().splitlines())}
    for result in results:
        accuracies = []
        for seed in (0, 1):
            stored = json.loads(Path(f"out/{result.name}/seed-{seed}/run.json").read_text())
            assert (stored["settings"]["epochs"], stored["settings"]["shots"]) == (3, "2")
            assert stored["settings"]["seed"] == seed and stored["settings"]["recipe"] == result.name
            accuracies.append(stored["result"]["test"]["accuracy"])
        row = rows[result.name]
        assert float(row["accuracy_mean"]) == pytest.approx(statistics.fmean(accuracies))
        assert float(row["accuracy_std"]) == pytest.approx(statistics.stdev(accuracies))
        assert int(row["runs"]) == 2 and float(row["images_per_second"]) > 0 and float(row["peak_memory_mib"]) > 10
    # 16 weights and a bias for each of three classes
    assert int(rows["linear"]["trainable_parameters"]) == 51
    printed = [row[:2] for row in table(results)]
    assert {name for name, _ in printed[1:]} == {"linear", "vptm"} and all(" ± " in mean for _, mean in printed[1:])
    assert Path("out/comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert len(calls) == 4


def test_finished_runs_are_kept_and_stopped_ones_resumed(run: Any, calls: list[list[str]]) -> None:
    """The same command after a stop trains what is missing: a finished run is not read, one with a state goes on."""
    run("linear", seeds=1)
    finished = Path("out/linear/seed-0/run.json").read_bytes()
    stopped = json.loads(finished)
    Path("out/linear/seed-1").mkdir()
    for file in Path("out/linear/seed-0").iterdir():
        Path("out/linear/seed-1", file.name).write_bytes(file.read_bytes())
    del stopped["result"], stopped["cost"]
    stopped["settings"]["seed"] = 1
    Path("out/linear/seed-1/run.json").write_text(json.dumps(stopped))
    calls.clear()
    results = run("linear", seeds=3)
    assert [call[:4] for call in calls] == [
        ["train", "--out", "out/linear/seed-1", "--resume"],
        ["train", "--out", "out/linear/seed-2", "--overwrite"],
    ]
    assert Path("out/linear/seed-0/run.json").read_bytes() == finished
    assert 0 in results[0].runs and 2 in results[0].runs


def test_a_comparison_goes_on_where_its_data_moved(run: Any, calls: list[list[str]]) -> None:
    write_pictures(Path("old"), 10)
    run("linear", seeds=1, data=str(Path("old").resolve()))
    Path("old").rename("new")
    calls.clear()
    (result,) = run("linear", seeds=1, data=str(Path("new").resolve()))
    assert calls == [] and 0 in result.runs
    unfinished("out/linear/seed-0")
    (result,) = run("linear", seeds=1, data=str(Path("new").resolve()))
    assert [call[3] for call in calls] == ["--resume"] and 0 in result.runs
    Path("new").rename("newer")
    Path("newer/left/3.png").unlink()
    with pytest.raises(ValueError, match="was trained with --data"):
        run("linear", seeds=1, data=str(Path("newer").resolve()))


def unfinished(folder: str, *more: str) -> None:
    """A finished run as a stop before its test leaves it; without "finished" it stopped while it trained."""
    path = Path(folder, "run.json")
    facts = json.loads(path.read_text())
    for name in ("result", "cost", *more):
        del facts[name]
    path.write_text(json.dumps(facts))


def test_finished_runs_of_an_edited_recipe_are_refused(run: Any, calls: list[list[str]]) -> None:
    """A table would mix old and new settings under one name; the same values written otherwise are the same recipe."""
    Path("mine.yaml").write_text(MINE.format(", lr: 0.02"))
    run("mine.yaml", seeds=1)
    calls.clear()
    Path("mine.yaml").write_text(MINE.format(", augment: true, lr: 2e-2"))
    assert len(run("mine.yaml", seeds=1)[0].runs) == 1
    for change, message in (
        (", lr: 0.03", "--lr 0.02, not 0.03"),
        ("", "--lr 0.02, not 0.002"),
        (", lr: 0.02, augment: false", "--augment True, not False"),
    ):
        Path("mine.yaml").write_text(MINE.format(change))
        with pytest.raises(ValueError, match=f"^out/mine/seed-0 was trained with {message}: choose another folder$"):
            run("linear", "mine.yaml", seeds=1)
    assert calls == [], "refused before a run starts"


def test_unfinished_runs_that_cannot_be_resumed_start_anew(run: Any, calls: list[list[str]]) -> None:
    """A recipe mended after NaN, and a damaged file of a stopped run: resumed, they would fail at every try."""
    Path("mine.yaml").write_text(MINE.format(", optimizer: momentum, lr: 1.0e+30"))
    for _ in range(2):
        assert "lower lr" in run("mine.yaml", seeds=1)[0].failures["seed-0"]
    Path("mine.yaml").write_text(MINE.format(", optimizer: momentum, lr: 0.01"))
    (result,) = run("mine.yaml", seeds=1)
    assert result.runs[0]["settings"]["lr"] == 0.01
    for file in ("state.pt", "run.json"):
        unfinished("out/mine/seed-0", "finished")  # of a run that is finished the state is not needed
        Path("out/mine/seed-0", file).write_bytes(b"damaged")
        assert 0 in run("mine.yaml", seeds=1)[0].runs, file
    assert [call[3] for call in calls] == ["--overwrite", "--resume", "--overwrite", "--overwrite", "--overwrite"]


def test_flags_reach_every_run_and_are_compared(run: Any, calls: list[list[str]]) -> None:
    """Options without a value, before others, neither shift those nor pass for the settings of another run; a search
    may choose one."""
    given = ["--no-augment", "--flip", "--label-smoothing=0.1"]
    (result,) = run("linear", seeds=1, arguments=given)
    found = result.runs[0]["settings"]
    assert (found["augment"], found["flip"], found["label_smoothing"], found["epochs"]) == (False, True, 0.1, 3)
    assert 0 in run("linear", seeds=1, arguments=given)[0].runs and len(calls) == 1
    with pytest.raises(ValueError, match="--flip True, not False"):
        run("linear", seeds=1, arguments=["--no-augment", "--no-flip", "--label-smoothing", "0.1"])
    Path("mine.yaml").write_text(MINE.format("") + "search: {augment: [true, false]}\n")
    (result,) = run("mine.yaml", seeds=1, search=True)
    assert not result.failures and result.runs[0]["settings"]["augment"] == result.chosen["augment"]


def test_a_search_may_choose_no_gates(run: Any) -> None:
    """None of a recipe is none on the command line of a run; passed as None, the search would be refused."""
    Path("mine.yaml").write_text(MINE.format(", prompt_gate: -4") + "search: {prompt_gate: [null]}\n")
    (result,) = run("mine.yaml", seeds=1, epochs=1, search=True)
    assert not result.failures and result.runs[0]["settings"]["prompt_gate"] is None
    assert table([result])[1][-1] == "prompt_gate=none"
    Path("mine.yaml").write_text(MINE.format(", prompt_gate: -4"))
    with pytest.raises(ValueError, match=r"was trained with --prompt-gate none, not -4\.0: choose another folder"):
        run("mine.yaml", seeds=1, epochs=1)


def test_what_no_run_could_use_is_refused_before_the_first(
    run: Any,
    calls: list[list[str]],
    material: Path,
) -> None:
    """Each of these would be said once per run, or after hours of runs that nothing can be read from."""
    for split, first in (("train", 0), ("val", 4), ("test", 6)):
        for data in {"train": ("no-test", "no-val"), "val": ("no-test",), "test": ("no-val",)}[split]:
            write_pictures(Path(data, split), 2, first=first)
    Path("file").touch()
    Path("mine.yaml").write_text(MINE.format("") + "search: {lrr: [1]}\n")
    Path("typo.yaml").write_text(MINE.format(", lrr: 1"))
    for method, settings, message in (
        ("linear", {"data": "no-test"}, "^data must have test images to compare on, no-test has none$"),
        ("linear", {"data": "no-val", "search": True}, "^data must have validation images for search, no-val has"),
        (
            "linear",
            {"shots": "999"},
            "^shots must be at most 7, or all: class 'left' has 7 training images, got 999$",
        ),
        ("linear", {"shots": "few"}, "shots must be an integer >= 1 or all, got 'few'"),
        ("linear", {"data": "nosuch"}, "^data must be one of .*got 'nosuch'"),
        ("linear", {"out": "file"}, "^out must be a folder, got file: it is a file$"),
        ("linear", {"out": "file/out"}, "^out must be a folder, got file/out: Not a directory$"),
        ("linear", {"arguments": ["--no-test"]}, "^arguments must leave --test to compare, got --no-test"),
        ("linear", {"arguments": ["--out", "x"]}, "^arguments must leave --out to compare"),
        ("linear", {"arguments": ["--epoch", "3"]}, r"^No such option:? '?--epoch\b"),
        ("mine.yaml", {"search": True}, "^recipe mine.yaml: search.lrr: No such option: --lrr"),
        ("typo.yaml", {}, "unknown setting 'lrr'"),
        ("linear", {"arguments": ["--device", "cpu", "--precision", "tf32"]}, "^precision tf32 needs a GPU"),
        ("linear", {"arguments": ["--accumulate", "2"]}, "^accumulate must divide the batch of 3 images, got 2$"),
    ):
        with pytest.raises(ValueError, match=message):
            run(method, **settings)
    for model, kind in (("beit_base_patch16_22", ValueError), ("none.pth", FileNotFoundError)):
        with pytest.raises(kind, match=f"^{model}: no such file"):
            compare(["linear"], "out", data="no-test", seeds=1, epochs=1, shots="2", arguments=["--model", model])
    assert not Path("out").exists()
    assert calls == []
    assert len(run("linear", data="no-val", seeds=1)[0].runs) == 1


def test_the_reason_of_a_failure_is_its_error(run: Any) -> None:
    """Progress goes to stderr too, also after the error where processes that read images end late."""
    progress = "training 51 of 100 parameters\nepoch 1/3  val loss 1.0\n"
    for code, errors, reason in (
        (1, f"{progress}vptm: loss became nan\nlate warning\n", "loss became nan"),
        (1, f"{progress}Traceback\nMemoryError\n", "MemoryError"),
        (0, progress, "ended without a result"),
        (-9, progress, "killed by signal 9"),
        (3, "", "exit code 3"),
    ):
        (result,) = run("linear", seeds=1, launch=lambda arguments: (code, errors))  # noqa: B023
        assert result.failures == {"seed-0": reason}


def test_a_failed_run_is_reported_and_the_others_go_on(run: Any) -> None:
    """A learning rate that ends in NaN takes its own runs with it alone, and its reason stands in the results."""
    Path("bad.yaml").write_text(
        "summary: explodes\nsettings: {readout: cls, token_activation: hidden, verbalizer: linear, "
        "optimizer: momentum, lr: 1.0e+30}\n"
    )
    lines: list[str] = []
    bad, linear = run("bad.yaml", "linear", seeds=1, report=lines.append)
    assert not bad.runs and "lower lr" in bad.failures["seed-0"] and len(linear.runs) == 1
    row = next(csv.DictReader(Path("out/comparison.csv").read_text().splitlines()))
    assert (row["method"], row["runs"], row["failed"], row["accuracy_mean"]) == ("bad", "0", "1", "")
    assert any("bad seed-0: failed" in line for line in lines) and table([bad])[1][2] == "0 (1 failed)"


def test_search_chooses_on_validation_and_never_tests(run: Any, calls: list[list[str]]) -> None:
    """The chosen value is the one with the best validation accuracy of a seed that is not reported; those runs read
    no test image, and the value reaches every reported run."""
    Path("mine.yaml").write_text(
        "summary: mine\nsettings: {readout: mean, token_activation: hidden, verbalizer: linear, lr: 1.0e-9}\n"
        "search: {lr: [1.0e-9, 0.05]}\n"
    )
    (result,) = run("mine.yaml", search=True, epochs=15, shots="4")
    assert result.chosen == {"lr": 0.05}
    searched = [json.loads(Path(f"out/mine/search-lr-{k}/run.json").read_text()) for k in (0, 1)]
    assert all(found["result"]["test"] is None and found["settings"]["seed"] == SEARCH_SEED for found in searched)
    assert searched[1]["result"]["val_accuracy"] > searched[0]["result"]["val_accuracy"]
    assert [found["settings"]["lr"] for found in result.runs.values()] == [0.05, 0.05]
    assert ["--no-test" in call for call in calls] == [True, True, False, False]


def test_warm_up_keeps_its_share(run: Any) -> None:
    """10 of 100 published epochs are 1 of 3 here, not all of them: a warm-up as long as the run would train nothing."""
    (result,) = run("vpt-deep", seeds=1, arguments=["--prompt-length", "2"])
    assert result.runs[0]["settings"]["warmup_epochs"] == 1


def test_bad_input_is_refused(run: Any) -> None:
    """Unknown and repeated methods, numbers out of range, and a folder of runs with other settings."""
    for methods, settings, message in (
        (("vpt-dep",), {}, "did you mean 'vpt-deep'"),
        (("vpt-dep",), {}, "finetune, linear"),
        (("spt", "spt-deep"), {}, "one or more different recipes, got spt, spt-deep"),
        ((), {}, "got none"),
        (("linear",), {"seeds": 0}, "seeds must be >= 1, got 0"),
        (("linear",), {"jobs": 0}, "jobs must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*methods, **settings)
    run("linear", seeds=1)
    with pytest.raises(ValueError, match=r"was trained with --epochs 3, not 4: choose another folder"):
        run("linear", seeds=1, epochs=4)


def test_the_command(vptm: Console, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One real process per run; the table is on stdout, progress and a failure on stderr with exit code 1."""
    arguments = ["compare", "--data", material / "pictures", "--model", material / "backbone.safetensors"]
    arguments += ["--seeds", 1, "--epochs", 2, "--shots", 2, "--out", "side by side"]
    code, out, err = vptm(*arguments, "--methods", "linear")
    assert code == 0 and "linear" in out and "%" in out and "linear seed 0: test accuracy" in err
    monkeypatch.setattr(compare_module, "launch", lambda arguments: (1, "vptm: out of memory\n"))
    monkeypatch.setattr(
        compare_module.compare,
        "__kwdefaults__",
        {**compare_module.compare.__kwdefaults__, "launch": compare_module.launch},
    )
    code, out, err = vptm(*arguments, "--methods", "linear,vptm")
    assert code == 1 and "linear" in out and "1 runs failed" in err and "vptm seed-0: out of memory" in err
    for option, value, message in (
        ("--methods", "liner", "did you mean 'linear'"),
        ("--shots", 999, "class 'left' has 7 training images"),
        ("--data", "nosuch", "data must be one of"),
    ):
        code, line = vptm.refused(*arguments, option, value)
        assert code == 2 and message in line
