"""The study of the papers' claims: verdicts follow from its runs, and committed numbers are those of their runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vptm
from studies import accuracy_builtin, accuracy_claims, report
from studies.accuracy_claims import ARMS, comparisons, information, summarise, verdict
from studies.runs import RESULTS


@pytest.mark.parametrize(
    ("low", "high", "seeds", "alike", "expected"),
    [
        (0.1, 4.0, 5, False, "supported"),
        (-4.0, -0.1, 5, False, "contradicted"),
        (-0.1, 4.0, 5, False, "inconclusive"),
        (-1.9, 1.9, 5, True, "supported"),
        (0.5, 1.9, 5, True, "supported"),
        (-1.9, 2.1, 5, True, "inconclusive"),
        (2.1, 4.0, 5, True, "contradicted"),
        (-4.0, -2.1, 5, True, "contradicted"),
        # one seed has no interval, two may agree by chance
        (None, None, 1, False, "inconclusive"),
        (None, None, 1, True, "inconclusive"),
        (1.9, 1.9, 2, False, "inconclusive"),
    ],
)
def test_a_verdict_follows_from_the_interval(
    low: float | None, high: float | None, seeds: int, alike: bool, expected: str
) -> None:
    assert verdict({"low": low, "high": high, "seeds": seeds}, alike) == expected


@pytest.mark.parametrize("claim", ARMS)
def test_every_comparison_is_of_arms_that_are_run(claim: str) -> None:
    """A name misspelt in a comparison would drop a claim from the report without a word."""
    names = [name for name, _ in ARMS[claim]()]
    assert len(set(names)) == len(names)
    assert {name for pair in comparisons(claim) for name in (pair.first, pair.second)} == set(names)


def test_differences_are_paired_by_seed() -> None:
    def run(arm: str, seed: int, test: float) -> dict[str, Any]:
        return {"claim": "mapping", "data": "d", "arm": arm, "seed": seed, "test": test}

    first, second = "semantic, border", "random, border"
    # seed 3 has no partner; over the others the difference is 10 points, whatever the level of the seed
    runs = [run(first, s, t) for s, t in ((0, 0.3), (1, 0.9), (2, 0.5), (3, 1.0))]
    runs += [run(second, s, t) for s, t in ((0, 0.2), (1, 0.8), (2, 0.4))]
    found = summarise(runs)["mapping, d"]["paired_difference_points"]
    assert list(found) == [f"{first} - {second}"]
    difference = found[f"{first} - {second}"]
    assert difference["seeds"] == 3 and difference["mean"] == pytest.approx(10) and difference["low"] > 9.9
    assert (difference["claimed"], difference["verdict"]) == ("better", "supported")


def test_information_is_none_for_equal_patches_and_all_for_prompts_that_are_the_patches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = vptm.PromptedBEiT("builtin", 2, prompt_mode="shallow", prompt_length=16, readout="cls")
    tokens = torch.eye(16, model.num_features)[None]
    monkeypatch.setattr(accuracy_claims, "layer_tokens", lambda model, images, layers: [tokens])
    with torch.no_grad():
        model.prompts.weight.copy_(tokens)
    assert information(model, torch.zeros(1)) == pytest.approx(1, abs=0.02)
    tokens = torch.ones(1, 16, model.num_features)
    assert information(model, torch.zeros(1)) == pytest.approx(0, abs=1e-5)


def test_a_finished_run_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("EPOCHS", "PASSES"):
        monkeypatch.setattr(accuracy_claims, name, 1)
    monkeypatch.setattr(accuracy_claims, "SHOTS", 2)
    monkeypatch.setitem(ARMS, "robust", lambda: [("default", {}), ("1 prompts", {"prompt_length": 1})])
    command = ["accuracy_claims.py", "--claims", "robust", "--data", "digits", "--out", str(tmp_path / "claims")]
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "1"])
    accuracy_claims.main()
    assert capsys.readouterr().out.count("seed 0") == 2
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "2"])
    accuracy_claims.main()
    printed = capsys.readouterr().out
    assert printed.count("seed 1") == 2 and "seed 0" not in printed
    stored = json.loads((tmp_path / "claims.json").read_text())
    assert [run["seed"] for run in stored["runs"]] == [0, 0, 1, 1]
    assert (tmp_path / "claims.png").stat().st_size > 1000


def close(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[name], expected[name]) for name in expected)
    return found == pytest.approx(expected) if isinstance(expected, float) else found == expected


def test_committed_numbers_are_those_of_the_committed_runs() -> None:
    """A summary that was edited, or belongs to other runs, would be read as measured; and so would one of other weights
    that does not say so, or a claim about the one that takes a run of the other."""
    shipped = vptm.PromptedBEiT("builtin", 2).weight_hash()
    weights = json.loads((RESULTS / "builtin.json").read_text())["weights"]
    for name, summary in (("builtin", accuracy_builtin.summarise), ("claims", summarise)):
        content = json.loads((RESULTS / f"{name}.json").read_text())
        assert content["weights"] == weights
        table = report.STUDIES[name][0]
        assert ("**Of an earlier built-in model**" in table(content)) == (weights != shipped)
        assert "**Of an earlier" not in table({**content, "weights": shipped})
        expected = summary(content["runs"])
        if name == "claims":
            expected = accuracy_claims.tasks(RESULTS / "builtin.json") | expected
        assert close(content["summary"], expected)
        keys = [
            (run.get("claim"), run["data"], run.get("shots"), run.get("method", run.get("arm")), run["seed"])
            for run in content["runs"]
        ]
        assert len(set(keys)) == len(keys), "a run counted twice narrows the interval"


@pytest.mark.parametrize("name", report.STUDIES)
def test_committed_tables_are_those_of_the_json(name: str) -> None:
    """A number typed into a table, or a json measured again without a new table, would be read as measured."""
    table, _ = report.STUDIES[name]
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == table(content), "run: python -m studies.report"
