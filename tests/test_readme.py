"""The README says what was measured and what runs, and nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_come_from_the_json_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number typed into the README, or a json that was measured again without updating it, fails here."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    from bench.report import updated

    assert updated(README) == README, "run: python -m bench.report"


def test_every_named_test_exists() -> None:
    """The support table proves each line by a test: a renamed or deleted one fails here."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    table = README[README.index("## What is supported") : README.index("## Limits")]
    named = re.findall(r"`((?:test_\w+\.py)?(?:::test_\w+)?)`", table)
    assert len(named) > 5
    module = ""
    for entry in named:
        module, _, function = (entry if entry.startswith("test_") else module + entry).partition("::")
        assert module in sources, module
        assert not function or f"def {function}(" in sources[module], entry


def test_drop_in_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code a user copies from the README works as it stands."""
    example = re.search(r"## Drop-in\n+```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], "README.md", "exec"), {})
