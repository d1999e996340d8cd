"""The program that grows a bank runs, and its bytes are those of the formula."""

from __future__ import annotations

import json
import sys

import pytest

from bench import task_bank_scale


def test_a_bank_grows_as_computed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "builtin", "--tasks", "2,40", "--batch", "2", "--rounds", "2", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["task_bank_scale", *arguments])
    task_bank_scale.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tasks"] for line in lines] == [2, 40]
    for line in lines:
        assert 1 <= line["share"] <= 1.05 and line["bytes"] == pytest.approx(line["computed"], rel=0.05)
        assert all(seconds > 0 for seconds in line["seconds"].values())
        assert len(line["mixed over one task, images/s"]) == 3
