"""The study of bf16 beside fp32: runs of one commit, paired by seed, and the sentence in the docs made of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from studies import precision_builtin, trained
from studies.precision_builtin import PAIR, PRECISIONS, Precision, summarise
from studies.runs import RESULTS, builtin_weights


def run(precision: str, seed: int, test: float = 0.5, commit: str | None = "a") -> dict[str, Any]:
    return {"precision": precision, "seed": seed, "test": test, "commit": commit}


def test_differences_are_paired_by_seed() -> None:
    """Seed 3 has no partner; over the others bf16 is 10 points better, whatever the level of the seed."""
    runs = [run("bf16", s, t) for s, t in ((0, 0.3), (1, 0.9), (2, 0.5), (3, 1.0))]
    runs += [run("fp32", s, t) for s, t in ((2, 0.4), (0, 0.2), (1, 0.8))]
    found = summarise(runs)
    difference = found["paired_difference_points"][PAIR]
    assert difference["seeds"] == 3 and difference["mean"] == pytest.approx(10) and difference["low"] > 9.9
    assert found["test_accuracy_percent"]["fp32"]["mean"] == pytest.approx(140 / 3)
    assert found["test_accuracy_percent"]["bf16"]["seeds"] == 4


def test_a_run_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else that differed between the two would be read as the precision's."""
    asked: list[tuple[list[str], int]] = []
    monkeypatch.setattr(trained, "train", lambda options, seed: asked.append((options, seed)) or {"seed": seed})
    assert precision_builtin.train("bf16", 3) == {"precision": "bf16", "seed": 3}
    assert asked == [(["--precision", "bf16"], 3)]


def test_finished_runs_are_kept_and_those_of_another_commit_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A difference between two programs would be read as one between two precisions."""
    made: list[tuple[str, int]] = []

    def train(precision: str, seed: int) -> dict[str, Any]:
        made.append((precision, seed))
        return {"precision": precision, "seed": seed, "test": 0.25 * (1 + seed)}

    monkeypatch.setattr(precision_builtin, "train", train)
    for commit, seeds, expected in (
        ("a", 1, [("fp32", 0), ("bf16", 0)]),
        ("a", 2, [("fp32", 1), ("bf16", 1)]),
        ("b", 1, [("fp32", 0), ("bf16", 0)]),
    ):
        monkeypatch.setattr("studies.runs.commit", lambda results, commit=commit: commit)
        name = "/somewhere/studies/precision_builtin.py"  # what python -m makes of it
        monkeypatch.setattr(sys, "argv", [name, "--seeds", str(seeds), "--out", str(tmp_path / "p.json")])
        made.clear()
        precision_builtin.main()
        assert made == expected
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["commit"] == "b" and [each["commit"] for each in content["runs"]] == ["b", "b"]
    assert content["command"].startswith("python -m studies.precision_builtin --seeds 1 --out ")
    assert content["summary"] == summarise(content["runs"]) and content["versions"]["torch"]
    assert Precision(tmp_path / "p.json").stored()[0] == content["runs"]


def test_the_committed_sentence_is_that_of_the_committed_runs() -> None:
    """A number typed into the docs, runs of other weights, or a run counted twice would be read as measured."""
    content = json.loads((RESULTS / "precision.json").read_text(encoding="utf-8"))
    assert content["weights"] == builtin_weights()
    assert not content["commit"].endswith("+") and {run["commit"] for run in content["runs"]} == {content["commit"]}
    pairs = sorted((run["precision"], run["seed"]) for run in content["runs"])
    assert pairs == sorted((precision, seed) for precision in PRECISIONS for seed in range(5))
    found, expected = content["summary"], summarise(content["runs"])
    assert found["test_accuracy_percent"] == {
        name: pytest.approx(values) for name, values in expected["test_accuracy_percent"].items()
    }
    assert found["paired_difference_points"][PAIR] == pytest.approx(expected["paired_difference_points"][PAIR])
