"""The program that times exported models runs, and leaves out by name what is not installed or scores otherwise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import Tensor

from bench import exported_speed
from vptm import PromptedBEiT


def right(model: PromptedBEiT, folder: Path, images: Tensor) -> exported_speed.Run:
    return lambda: model(images)


def wrong(model: PromptedBEiT, folder: Path, images: Tensor) -> exported_speed.Run:
    return lambda: model(images) + 1


def missing(*_: object) -> exported_speed.Run:
    raise ModuleNotFoundError("No module named 'no_such_runtime'")


def test_runtimes_are_compared_or_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(exported_speed, "RUNTIMES", {"right": right, "missing": missing, "wrong": wrong})
    arguments = ["--model", "builtin", "--batch", "2", "--prompts", "2", "--classes", "3", "--rounds", "2"]
    arguments += ["--runtimes", "right,missing,wrong", "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["exported_speed", *arguments])
    exported_speed.main()
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert set(found["seconds"]) == {"vptm", "right"} and all(value > 0 for value in found["seconds"].values())
    assert len(found["images/s over vptm"]["right"]) == 3
    assert found["left out"]["missing"] == "No module named 'no_such_runtime'"
    assert found["left out"]["wrong"].endswith("of the largest away from vptm's")
