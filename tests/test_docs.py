"""What docs/ says can be done: programs run, commands take the options that are given, files and tests are there."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
# the README's program has a test of its own; that of the kernels' notes is a measurement of minutes
NOT_HERE = ("README.md", "docs/kernels.md")
# what a page's programs leave, where that is known
LEFT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "docs/serving.md": lambda names: names["scores"].shape == (3, 10),
    "docs/inference.md": lambda names: names["logits"].shape == (8, 10),
    "docs/export.md": lambda names: names["logits"].shape == (5, 3) and names["labels"] == ["shirt", "shoe", "bag"],
    "docs/adapters.md": lambda names: names["scores"].shape == (1, 3),
    "docs/prompts.md": lambda names: names["scores"].shape == (2, 3),
    "docs/training.md": lambda names: Path("run", "adapter_config.json").is_file() and float(names["loss"]) > 0,
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in NOT_HERE])
def test_programs_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user copies them first. Tracing is tried without inductor, whose compiler takes half a minute."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, mode, fullgraph: compile_(model, fullgraph=fullgraph, backend="eager")
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        if "transformers" not in block or find_spec("accelerate") is not None:  # its Trainer needs that
            exec(compile(block, page, "exec"), names)
    assert page not in LEFT or LEFT[page](names)


def commands(start: str) -> dict[str, list[str]]:
    """Commands that begin with `start` and where they are said, from blocks and from running text."""
    found: dict[str, list[str]] = {}
    for page, text in PAGES.items():
        lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
        lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        for line in lines:
            for part in re.split(r" && |; ", re.split(r" +#", line)[0]):
                words = part.split("/")[-1] if part.startswith(("kernels/venv", ".venv")) else part
                if words.startswith(start):
                    found.setdefault(words.rstrip(), []).append(page)
    return found


def options(command: str) -> list[str]:
    return [word.partition("=")[0] for word in shlex.split(command) if re.match(r"--\w", word)]


MODULES = sorted({shlex.split(command)[2] for command in commands("python -m ") if len(shlex.split(command)) > 2})
FOREIGN = ("venv", "ruff", "mypy", "pdoc")


@pytest.mark.parametrize("module", [module for module in MODULES if module not in FOREIGN])
def test_programs_take_the_options_that_are_given(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that is copied from a page must not end in a usage message."""
    given = {option for command in commands(f"python -m {module}") for option in options(command)}
    if module == "tools.check":
        assert given == set() and (ROOT / "tools" / "check.py").is_file()
        return
    helped = [["--help"]]
    if module in ("bench.try_versions", "bench.kernel_cache"):
        subcommands = {shlex.split(command)[3] for command in commands(f"python -m {module} ")}
        helped += [[name, "--help"] for name in sorted(subcommands) if not name.startswith("-")]
    said = ""
    program = importlib.import_module(module)
    for arguments in helped:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit) as ended:
            program.main()
        assert not ended.value.code
        said += capsys.readouterr().out
    assert [option for option in sorted(given) if option not in said] == []


def test_vptm_commands_take_the_options_that_are_given(vptm) -> None:
    said = {}
    for command in commands("vptm "):
        words = shlex.split(command)
        if len(words) < 2 or not re.fullmatch(r"[a-z]+", words[1]):
            continue
        if words[1] not in said:
            _, said[words[1]], _ = vptm(words[1], "--help")
        for option in options(command):
            assert option in said[words[1]], command
    assert len(said) > 5


def test_pytest_lines_name_files_and_options_that_exist() -> None:
    known = (ROOT / "bench" / "conftest.py").read_text(encoding="utf-8")
    others = ("--benchmark-only", "--benchmark-json", "--dist")
    found = commands("pytest")
    assert len(found) > 3
    for command in found:
        words = shlex.split(command)
        for word in words[1:]:
            assert "/" not in word or (ROOT / word.partition("::")[0]).exists(), command
        for option in options(command):
            assert option in others or f'"{option}"' in known, command
        if "-m" in words:
            mark = words[words.index("-m") + 1]
            assert f'"{mark}: ' in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), command


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
