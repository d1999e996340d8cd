"""The programs in docs/ run as they are written."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.filterwarnings("ignore")
def test_serving_examples_run() -> None:
    """A user copies them first."""
    names: dict[str, object] = {}
    found = blocks("serving.md")
    assert len(found) == 1
    for block in found:
        exec(block, names)
    assert names["scores"].shape == (3, 10)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_export_examples_run() -> None:
    names: dict[str, object] = {}
    found = blocks("export.md")
    assert len(found) == 1
    for block in found:
        exec(block, names)
    assert names["logits"].shape == (5, 3) and names["labels"] == ["shirt", "shoe", "bag"]  # type: ignore[attr-defined]


def blocks(file: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / file).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore")
def test_inference_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user copies them first. Tracing is tried without inductor, whose compiler takes half a minute."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, mode, fullgraph: compile_(model, fullgraph=fullgraph, backend="eager")
    )
    names: dict[str, object] = {}
    found = blocks("inference.md")
    assert len(found) == 4
    for block in found:
        exec(block, names)
    assert names["logits"].shape == (8, 10)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_training_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Trainer's runs where accelerate is installed, which it needs."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks("training.md")
    assert len(found) == 4
    for block in found:
        if "transformers" not in block or find_spec("accelerate") is not None:
            exec(block, names)
    assert (tmp_path / "run" / "adapter_config.json").is_file() and float(names["loss"]) > 0  # type: ignore[arg-type]
    assert find_spec("accelerate") is None or (tmp_path / "clothing" / "adapter_config.json").is_file()
