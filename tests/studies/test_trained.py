"""Studies made of `vptm train` runs: which are missing, which rate is taken, and when a difference counts as seen."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from scipy.stats import false_discovery_control, ttest_rel

from studies import plain_twin, prompt_length, published_methods, trained, what_prompts_add
from studies.runs import Comparison, holm, verdict
from studies.trained import Arm, Task, TrainedStudy
from vptm.commands.app import app
from vptm.recipes.recipe import with_recipe

ARMS = (Arm("plain", "--prompt-length 0"), Arm("tuned", "--prompt-length 5", rates=(0.1, 0.2)))
TASKS = (Task("a", "--shots 1"), Task("b", "--shots 2"))
ASKED = (Comparison("tuned", "plain"), Comparison("plain", "tuned", "no worse"))


def found(mean: float, half: float, seeds: int = 5, p_holm: float = 0.01) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": seeds, "p_holm": p_holm}


def test_holm_corrects_for_all_comparisons_and_keeps_their_order() -> None:
    """Without it one of twenty comparisons of nothing is seen to be something."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
    # never below the correction of the false discovery rate, which allows more
    values = [0.001, 0.2, 0.013, 0.04, 0.04]
    assert all(mine >= other for mine, other in zip(holm(values), false_discovery_control(values, method="bh")))


@pytest.mark.parametrize(
    ("one", "asked", "said"),
    [
        (found(2, 1), "better", "seen here"),
        (found(2, 1, p_holm=0.2), "better", "too little data"),
        (found(0.2, 0.5, p_holm=0.4), "better", "not seen here"),
        (found(-3, 1), "better", "not seen here"),
        (found(0.5, 2, p_holm=0.6), "better", "too little data"),
        (found(2, 1, seeds=2), "better", "too little data"),
        (found(-0.3, 0.5), "no worse", "seen here"),
        (found(-3, 1), "no worse", "not seen here"),
        (found(-0.5, 2), "no worse", "too little data"),
    ],
)
def test_a_verdict_needs_an_interval_that_decides(one: dict[str, Any], asked: str, said: str) -> None:
    """A difference that may be nothing would be reported as seen, or one that may be large as absent."""
    assert verdict(one, asked) == said


def make(folder: Path) -> TrainedStudy:
    return TrainedStudy(folder / "study.json", ARMS, TASKS, ASKED)


def test_only_what_is_missing_runs_and_the_best_rate_on_validation_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A rate chosen on test images, or other images for one arm, would make the comparison unfair."""
    made: list[tuple[list[str], int]] = []

    def train(options: list[str], seed: int) -> dict[str, Any]:
        made.append((options, seed))
        rate = options[options.index("--lr") + 1] if "--lr" in options else ""
        test = {} if "--no-test" in options else {"test": 0.5 + 0.01 * seed + ((0.1 + 0.02 * seed) if rate else 0)}
        return {"seed": seed, "val": {"0.1": 0.9, "0.2": 0.4}.get(rate, 0), **test}

    monkeypatch.setattr(trained, "train", train)
    study = make(tmp_path)
    study.run(seeds=2, jobs=2)
    trials = [options for options, seed in made if seed in trained.TUNING_SEEDS]
    assert len(trials) == 2 * 2 * 3 and all("--no-test" in options for options in trials)
    runs = [(options, seed) for options, seed in made if seed not in trained.TUNING_SEEDS]
    assert sorted(runs) == sorted(
        (["--shots", shots, *own], seed)
        for seed in (0, 1)
        for shots in ("1", "2")
        for own in (["--prompt-length", "0"], ["--prompt-length", "5", "--lr", "0.1"])
    )
    made.clear()
    make(tmp_path).run(seeds=2, jobs=1)
    assert not made
    make(tmp_path).run(seeds=3, jobs=1)
    assert {seed for _, seed in made} == {2} and len(made) == 4
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["summary"]["comparisons_corrected_for"] == 2
    assert content["summary"] == make(tmp_path).summary(content["runs"])


def test_differences_are_paired_by_seed_and_corrected_over_all_tasks(tmp_path: Path) -> None:
    """Seed 9 has no partner; the p-values are those of scipy's paired t-test, twice as large for the smaller of two."""
    tests = {"a": ([0.5, 0.7, 0.6], [0.55, 0.72, 0.67]), "b": ([0.5, 0.7, 0.6], [0.6, 0.65, 0.7])}
    runs = [
        {"task": task, "arm": arm, "seed": seed, "test": value}
        for task, both in tests.items()
        for arm, values in zip(("plain", "tuned"), both)
        for seed, value in enumerate(values)
    ]
    runs.append({"task": "a", "arm": "tuned", "seed": 9, "test": 1.0})
    tasks = make(tmp_path).summary(runs)["tasks"]
    one, other = (tasks[task]["paired_difference_points"]["tuned - plain"] for task in "ab")
    assert one["seeds"] == other["seeds"] == 3 and one["mean"] == pytest.approx(14 / 3)
    assert [one["p"], other["p"]] == pytest.approx([ttest_rel(both[1], both[0]).pvalue for both in tests.values()])
    assert one["p_holm"] == pytest.approx(2 * one["p"]) and other["p_holm"] == pytest.approx(other["p"])
    assert tasks["a"]["test_accuracy_percent"]["tuned"]["seeds"] == 4


def test_a_run_is_one_of_vptm_train() -> None:
    """Short ones: what is kept is what run.json says; an option that is none ends the study with its line."""
    short = ["--epochs", "1", "--shots", "1", "--batch-size", "10"]
    run = trained.train(short, 3)
    assert run["command"] == "vptm train --device cpu --epochs 1 --shots 1 --batch-size 10 --seed 3"
    assert run["settings"] == {"shots": "1", "epochs": 1, "batch_size": 10, "lr": 0.0005}
    assert 0 < run["test"] < 1 and run["test"] != run["val"]
    with pytest.raises(SystemExit, match=r"(?s)--epochs 0 --seed 3 ended with status 2:.*epochs must be"):
        trained.train(["--epochs", "0"], 3)


@pytest.mark.parametrize(
    ("program", "options", "count"),
    [
        (prompt_length, [], 1 + 2 * 2 * 6),
        (what_prompts_add, [], 6 * 2 * 2),
        (published_methods, ["--tasks", "digits-16"], 26),
        (plain_twin, [], 2 * 6),
    ],
)
def test_arms_are_options_of_vptm_train(
    program: Any, options: list[str], count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An arm that `vptm train` refuses would end a study of hours in its middle; two names of one are one."""
    made: list[str] = []

    def train(options: list[str], seed: int) -> dict[str, Any]:
        made.append(shlex.join(options))
        return {"seed": seed, "val": 0.5, **({} if "--no-test" in options else {"test": 0.5 + 0.01 * (len(made) % 7)})}

    monkeypatch.setattr(trained, "train", train)
    monkeypatch.setattr(sys, "argv", ["x.py", "--seeds", "1", *options, "--out", str(tmp_path / "p.json")])
    program.main()
    runs = [one for one in made if "--no-test" not in one]
    assert len(set(runs)) == len(runs) == count
    content = json.loads((tmp_path / "p.json").read_text())
    for task in content["summary"]["tasks"].values():
        asked = {f"{first} - {second}" for first, second, *_ in content_of(program)}
        assert set(task["paired_difference_points"]) == asked
    group = typer.main.get_command(app)
    group.commands["train"].callback = lambda **settings: settings  # type: ignore[attr-defined]
    for one in runs:
        settings = group.main(["train", *shlex.split(one)], prog_name="vptm", standalone_mode=False)
        # an unknown recipe, or a setting of it that is none, is found where both meet
        read = with_recipe(settings, {word[2:].replace("-", "_") for word in one.split() if word.startswith("--")})
        few = read["shots"] != "all"
        images = 10 * int(read["shots"]) if few else {"digits": 1259, "mnist5k": 3500}[read["data"]]
        steps = read["epochs"] * -(-images // read["batch_size"])
        assert steps >= 400 or program is prompt_length, f"{one}: {steps} steps"


def test_the_picture_has_a_line_for_what_ran(tmp_path: Path) -> None:
    """Half a study is drawn as it is: an arm without a run is no zero."""
    runs = [
        {"task": prompt_length.TASK.name, "arm": prompt_length.name("deep", length, "no gate"), "seed": 0, "test": 0.5}
        for length in (1, 50)
    ]
    summary = prompt_length.study(tmp_path / "p.json").summary(runs)
    prompt_length.plot(summary, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def content_of(program: Any) -> list[Comparison]:
    return program.comparisons() if program is prompt_length else program.COMPARISONS
