"""What docs/ names is there: extras, files, tests, identities. Its programs and commands: test_doc_blocks.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}


def test_extras_that_are_named_are_declared() -> None:
    """`pip install ".[name]"` with another name installs the package without a word about it."""
    extras = {name for text in PAGES.values() for name in re.findall(r'"(?:vptm)?\.?\[(\w+)\]"', text)}
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"test", "dev", "docs"} <= extras <= set(declared)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_that_are_named_exist(page: str) -> None:
    """A recipe that names a file that moved sends its reader nowhere."""
    text, folder = PAGES[page], (ROOT / page).parent
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        assert (folder / link).exists(), link
    rooms = "vptm|vptm_kernels|bench|tests|studies|tools|examples|docs"
    for name in re.findall(rf"`((?:{rooms})/[\w./]*)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_every_page_is_in_the_index() -> None:
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/index.md":
            assert f"]({Path(page).name})" in PAGES["docs/index.md"], page


def test_every_named_test_exists() -> None:
    """The support table proves each line by a test: a renamed or deleted one fails here."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"`((?:test_\w+\.py)?(?:::test_\w+)?)`", PAGES["docs/support.md"])
    assert len(named) > 50
    module = ""
    for entry in named:
        module, _, function = (entry if entry.startswith("test_") else module + entry).partition("::")
        assert module in sources, module
        assert not function or f"def {function}(" in sources[module], entry


def test_identities_that_tests_cite_are_defined() -> None:
    """A1 to A15 are names that only docs/design.md explains."""
    defined = set(re.findall(r"^\| (A\d+) \|", PAGES["docs/design.md"], re.MULTILINE))
    assert defined == {f"A{number}" for number in range(1, 16)}
