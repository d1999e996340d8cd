"""The study of labels mapped by meaning: its arms, and which of them run."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from studies import label_mapping
from studies.label_mapping import ARMS, COMPARISONS, DATA
from studies.runs import RESULTS
from vptm.data.datasets import ImageData
from vptm.settings import MapSettings


def test_every_comparison_is_of_arms_that_are_run() -> None:
    """A name misspelt in a comparison would drop it from the table without a word."""
    assert {name for pair in COMPARISONS for name in (pair.first, pair.second)} == set(ARMS)


def test_committed_runs_are_all_arms_on_the_same_five_seeds() -> None:
    """A data set or seed left out after a look at it would bias what is seen."""
    runs = json.loads((RESULTS / "label_mapping.json").read_text(encoding="utf-8"))["runs"]
    found = sorted((run["task"], run["arm"], run["seed"]) for run in runs)
    assert found == sorted((name, arm, seed) for name in DATA for arm in ARMS for seed in range(5))


def test_a_finished_run_is_not_run_again_and_arms_differ_in_their_mapping_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other images or settings for one arm would be read as what its mapping does."""
    made: list[tuple[MapSettings, ImageData]] = []

    def map_labels(
        settings: MapSettings, *, data: ImageData, report: Callable[[str], None]
    ) -> tuple[list[list[str]], float]:
        made.append((settings, data))
        return [], 0.25 + 0.01 * len(made) * (1 + settings.seed)

    monkeypatch.setattr(label_mapping, "map_labels", map_labels)
    monkeypatch.setattr(label_mapping, "classifier", lambda: tmp_path / "c.pth")
    monkeypatch.setattr(label_mapping, "DATA", ("digits",))
    command = ["/somewhere/studies/label_mapping.py", "--data", "digits", "--out", str(tmp_path / "m.json")]

    def run(seeds: int) -> str:
        made.clear()
        monkeypatch.setattr(sys, "argv", [*command, "--seeds", str(seeds)])
        label_mapping.main()
        return capsys.readouterr().out

    assert run(1).count("seed 0: test") == len(made) == len(ARMS)
    for (settings, data), arm in zip(made, ARMS):
        assert settings == MapSettings(
            weights=tmp_path / "c.pth",
            m=5,
            aggregation="logsumexp",
            shots="16",
            epochs=4,
            batch_size=32,
            seed=0,
            device="cpu",
            **ARMS[arm],
        )
        assert data.test is not None and set(data.test.counts()) == {30}
        assert data.test.keys == made[0][1].test.keys and data.train.keys == made[0][1].train.keys  # type: ignore[union-attr]
    printed = run(2)
    assert len(made) == len(ARMS) == printed.count("seed 1: test") and "seed 0" not in printed
    run(2)
    assert not made
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["weights"] == label_mapping.WEIGHTS and len(content["runs"]) == 2 * len(ARMS)
    for stored in content["runs"]:
        assert stored["command"].startswith("python -m studies.label_mapping --data digits --out ")
        assert stored["versions"]["torch"]
    assert content["runs"][0]["command"].endswith("--seeds 1") and content["runs"][-1]["command"].endswith("--seeds 2")
    assert content["summary"] == label_mapping.study(tmp_path / "m.json").summary(content["runs"])
    assert content["summary"]["tasks"]["digits"]["paired_difference_points"].keys() == {
        f"{first} - {second}" for first, second, *_ in COMPARISONS
    }


def test_few_images_are_of_every_class_or_all_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small class would stop the study, or count less than others."""
    data, shots = label_mapping.arrange("digits", 3)
    assert shots == 16 and data.test is not None
    few = data.test.subset(list(range(40)))
    assert label_mapping.few(few, 30, 3) is few
    monkeypatch.setattr(label_mapping, "SHOTS", 10_000)
    assert label_mapping.arrange("digits", 3)[1] == data.train.counts().min()


def test_only_the_classifier_of_the_stored_runs_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs of two classifiers would be averaged."""
    monkeypatch.setattr(label_mapping, "PACKAGE", "a_classifier_for_this_test")
    with pytest.raises(SystemExit, match="a_classifier_for_this_test not found: pip install efficientnet-lite0"):
        label_mapping.classifier()
    package = tmp_path / "a_classifier_for_this_test"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    file = package / "models" / "c.pth"
    file.write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=rf"c\.pth must be {label_mapping.WEIGHTS}, got sha256:"):
        label_mapping.classifier()
    monkeypatch.setattr(label_mapping, "WEIGHTS", f"sha256:{hashlib.sha256(b'other').hexdigest()}")
    assert label_mapping.classifier() == file
