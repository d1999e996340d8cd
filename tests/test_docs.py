"""The programs in docs/ run as they are written."""

from __future__ import annotations

import re
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
