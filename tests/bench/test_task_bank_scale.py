"""The program that grows banks runs, and their bytes are those of the formula."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import task_bank_scale


def test_banks_grow_as_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--model", "builtin", "--tasks", "2,40", "--batch", "2", "--rounds", "2", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["task_bank_scale", *arguments, "--out", str(tmp_path / "found.json")])
    task_bank_scale.main()
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert found["command"].endswith("found.json") and found["environment"]["versions"]["torch"]
    assert [bank["tasks"] for bank in found["banks"]] == [2, 40]
    for bank in found["banks"]:
        assert 1 <= bank["share"] <= 1.05 and bank["bytes"] == pytest.approx(bank["computed"], rel=0.05)
        assert len(bank["images/s, mixed over one task"]) == 3
    assert found["banks"][0]["seconds, mixed over that of 2 tasks"] == [1, 1, 1]
    assert len(found["seconds"]) == 5 and all(seconds > 0 for seconds in found["seconds"].values())
