"""What is installed is what is declared: imports, bounds, one version."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vptm

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# what a requirement is imported as, where that is another name
IMPORTED_AS = {"scikit_learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml", "open_clip_torch": "open_clip"}
OPTIONAL = ("data", "hf", "text", "clip", "onnx", "ranks", "serve")


def declared(*extras: str) -> set[str]:
    """Import names of the requirements, and of these extras."""
    lists = [re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.DOTALL | re.MULTILINE)]
    lists += [re.search(rf"^{extra} = \[(.*?)\]$", PYPROJECT, re.DOTALL | re.MULTILINE) for extra in extras]
    assert all(lists)
    texts = [
        text for found in lists for pair in re.findall(r"\"([^\"]+)\"|'([^']+)'", found[1]) for text in pair if text
    ]  # type: ignore[index]
    names = [Requirement(text).name.replace("-", "_") for text in texts]
    return {IMPORTED_AS.get(name, name) for name in names}


def imported(folder: str) -> set[str]:
    """Top-level packages that files of a folder import anywhere, functions included."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_every_import_is_declared() -> None:
    """What another requirement happens to bring today may be gone in its next version."""
    assert imported("vptm") - declared(*OPTIONAL) == {"vptm", "vptm_kernels"}
    assert imported("vptm_kernels") - {"vptm_kernels"} == {"torch", "triton"}
    assert imported("examples") <= declared("ranks", "test") | {"vptm", "vptm_kernels"}


def test_every_requirement_is_used() -> None:
    """One that nothing imports is downloaded for nothing."""
    assert declared() <= imported("vptm") | imported("vptm_kernels")


def test_the_version_has_one_home() -> None:
    """The others are copies that nobody can compute: a citation and the change log."""
    assert 'version = { attr = "vptm.version.__version__" }' in PYPROJECT
    assert f"\nversion: {vptm.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == vptm.__version__


def test_an_index_page_has_no_link_that_breaks_there() -> None:
    """There is no file of the project beside it."""
    page = runpy.run_path(str(ROOT / "setup.py"))["page"]
    text = page("# vptm\n\n![speed](bench/a.png)\n\nSee [how](docs/gpu.md) and [paper](https://arxiv.org/abs/1).\n")
    assert text == "# vptm\n\nSee how and [paper](https://arxiv.org/abs/1).\n"
    readme = page((ROOT / "README.md").read_text(encoding="utf-8"))
    assert re.findall(r"\]\((?!https://)[^)]*\)", readme) == []


@pytest.mark.parametrize("name", ["ruff", "mypy"])
def test_checkers_have_one_version(name: str) -> None:
    """Another one finds other things."""
    assert len(re.findall(rf"\b{name}==", PYPROJECT)) == 1
    assert f"{name}==" not in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
