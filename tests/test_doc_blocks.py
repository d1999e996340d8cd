"""Every fenced block of the pages has a proof: a program runs, a command runs or is read by the command line it is for,
and what is neither names the test that shows it. A block without one fails here.

Commands in running text are read by their command lines as well.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from console import Console
from tiny_data import picture

import vptm as library
from vptm.commands.app import app
from vptm.recipes.recipe import read_recipe

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}

# programs of blocks that are read by their own command line and not run, and why; those of vptm all run
NOT_RUN = {
    "venv": "an environment takes a download: .ci/run makes it",
    "pip": "fetches packages: .ci/run installs the README's lines",
    ".": "a shell's own",
    "pytest": "this suite, or benches of minutes",
    "pdoc": "tools.check builds the pages",
    "tools.check": "ruff, mypy and the pages: .ci/run",
    "bench.kernel_cache": "compiles for hours: test_kernel_cache.py has one case",
    "bench.gpu_check": "needs a GPU, the rehearsal minutes: test_gpu_check.py has the stages",
    "bench.report": "writes into the README: test_readme.py has all its forms",
    "bench.bench_host_time": "minutes: test_host_path.py has its device",
    "vptm_kernels.aot": "compiles for minutes: test_aot.py has its cases",
    "studies.precision_builtin": "hours: test_precision_builtin.py has the parts",
    "studies.prompt_length": "hours: test_trained.py has the parts",
    "studies.what_prompts_add": "hours: test_trained.py has the parts",
    "studies.published_methods": "hours: test_trained.py has the parts",
    "studies.plain_twin": "hours: test_trained.py has the parts",
    "studies.label_mapping": "an hour: test_label_mapping_study.py has the parts",
    "studies.report": "writes into studies/results: test_report.py has its tables",
    "torchrun": "starts processes: test_ranks.py trains in two",
    "accelerate": "starts processes: test_ranks.py trains in two",
}

# what a program of a page is too large for, and what stands in for it
STAND_INS = {"docs/kernels.md": {"vit_base_patch16_224": "vit_tiny_patch16_224", "return 6000": "return 24"}}

# what a page's programs leave, where that is known
LEFT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "README.md": lambda names: names["logits"].shape == (8, 10) and Path("my_adapter").is_dir(),
    "docs/serving.md": lambda names: names["scores"].shape == (3, 10),
    "docs/inference.md": lambda names: names["logits"].shape == (8, 10),
    "docs/export.md": lambda names: names["logits"].shape == (5, 3) and names["labels"] == ["shirt", "shoe", "bag"],
    "docs/adapters.md": lambda names: names["scores"].shape == (1, 3),
    "docs/prompts.md": lambda names: names["scores"].shape == (2, 3),
    "docs/training.md": lambda names: Path("run", "adapter_config.json").is_file() and float(names["loss"]) > 0,
    "docs/kernels.md": lambda names: sum(p.numel() for p in names["model"].prompts.parameters()) == 12 * 20 * 192,
}


def _rooms(block: str, folder: Path) -> None:
    """Every file and folder of the layout is there."""
    named = re.findall(r"(?:^|  )([a-z_]+/(?:[a-z_]+(?:/|\.py))?)(?=  )", block, re.MULTILINE)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def _list(block: str, folder: Path) -> None:
    """The lines are a list of pictures that `load_data` takes."""
    for line in re.findall(r'"file_name": "(.*?)"', block):
        picture(0, 0).save(folder / line)
    (folder / "metadata.jsonl").write_text(block)
    data = library.load_data(folder / "metadata.jsonl", multi_label=True, transform=None)
    assert data.classes == ["cat", "indoors"] and len(data.train) == len(data.val) == 1  # type: ignore[arg-type]


# of blocks that are no code, by how they begin: a function of their text, or the tests that show what they say
SHOWN: dict[tuple[str, str], Callable[[str, Path], None] | str] = {
    ("docs/design.md", "vptm_kernels/ "): _rooms,
    ("docs/training.md", '{"file_name": '): _list,
    (
        "docs/training.md",
        "epoch  1/80  step",
    ): "training/test_fit.py::test_steps_are_counted_before_the_first_epoch_ends",
    ("docs/training.md", "real pictures "): "methods/test_feeding.py::test_what_is_measured_says_which_is_the_limit",
    ("docs/training.md", "stream = timm.data."): "training/test_streams.py::test_timms_shards_stream_into_fit",
}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def _blocks() -> list[Block]:
    """The fenced blocks of all pages, in order."""
    found = []
    for page, text in sorted(PAGES.items()):
        lines = text.splitlines()
        fences = [number for number, line in enumerate(lines) if re.match(r" *(```|~~~)", line)]
        assert len(fences) % 2 == 0, f"{page}: a fence is not closed"
        for start, end in zip(fences[::2], fences[1::2]):
            language = lines[start].strip(" `~")
            found.append(Block(page, start + 1, language, "\n".join(lines[start + 1 : end]) + "\n"))
    return found


BLOCKS = _blocks()


class Line(NamedTuple):
    """One command: where it stands, and its words without comment, folder of the program and redirection."""

    where: str
    words: list[str]

    @property
    def program(self) -> str:
        return self.words[2] if self.words[:2] == ["python", "-m"] else self.words[0]


def _lines(where: str, text: str) -> list[Line]:
    """The commands of a line; `...` stands for options of the reader's own."""
    found = []
    for part in re.split(r" && |; ", re.split(r"(?:^| +)#", text)[0]):
        words = [word for word in shlex.split(part.partition(" > ")[0]) if word != "..."]
        if words:
            found.append(Line(where, [re.sub(r"^python[\d.]+$", "python", words[0].rsplit("/", 1)[-1]), *words[1:]]))
    return found


OF_BLOCKS = [
    line
    for block in BLOCKS
    if block.language == "bash"
    for number, text in enumerate(block.text.splitlines(), block.line + 1)
    for line in _lines(f"{block.page}:{number}", text)
]
OUR_OWN = ("vptm", "python -m vptm", "python -m bench", "python -m studies", "python -m tools", "pytest")
OF_TEXT = [
    line
    for page, text in PAGES.items()
    for quoted in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    if quoted.startswith(tuple(f"{start} " for start in OUR_OWN) + tuple(f"{start}." for start in OUR_OWN[1:5]))
    for line in _lines(page, quoted)
]
LINES = OF_BLOCKS + OF_TEXT


def test_every_block_has_a_proof() -> None:
    """Code that nobody ran is wrong sooner or later, and its reader is the first to know."""
    unproved = []
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for block in BLOCKS:
        shown = [proof for (page, start), proof in SHOWN.items() if page == block.page and block.text.startswith(start)]
        if block.language not in ("python", "bash") and len(shown) != 1:
            unproved.append(f"{block.page}:{block.line}")
        for proof in shown:
            if isinstance(proof, str):
                path, _, function = proof.partition("::")
                assert f"def {function}(" in sources[ROOT / "tests" / path], proof
    assert unproved == []
    used = {block.page for block in BLOCKS if block.language == "python"}
    assert set(LEFT) == used, "a page's programs must leave something that LEFT looks at"


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "text"], ids=lambda block: f"{block.page}:{block.line}"
)
def test_listings_are_what_they_show(block: Block, tmp_path: Path) -> None:
    for (page, start), proof in SHOWN.items():
        if page == block.page and block.text.startswith(start) and callable(proof):
            proof(block.text, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
def test_programs_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user copies them first. Those of a page run one after another, as they are read. Tracing is tried without
    inductor, whose compiler takes half a minute."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, mode, fullgraph: compile_(model, fullgraph=fullgraph, backend="eager")
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS:
        if (block.page, block.language) != (page, "python"):
            continue
        text = block.text
        for large, small in STAND_INS.get(page, {}).items():
            assert text.count(large) == 1, large
            text = text.replace(large, small)
        if "transformers" not in text or find_spec("accelerate") is not None:  # its Trainer needs that
            exec(compile(text, f"{page}:{block.line}", "exec"), names)
    assert LEFT[page](names)


# slow settings of the README's lines, and what is tried
QUICK = {"train": ["--epochs", "1", "--shots", "2"], "compare": ["--epochs", "1", "--shots", "2"]}


def test_commands_run_as_they_are_written(vptm: Console, material: Path, tmp_path: Path) -> None:
    """Those of every block, one after another, with pictures, a file of weights and, to be quick, few epochs."""
    lines = [line for line in OF_BLOCKS if line.program == "vptm"]
    assert len(lines) > 5
    shutil.copytree(material / "pictures", tmp_path / "photos")
    shutil.copy(next((material / "pictures").rglob("*.png")), tmp_path / "picture.jpg")
    weights = str(material / "backbone.safetensors")
    for line in lines:
        words = [weights if word.endswith(".pth") else word for word in line.words[1:]]
        if words[0] == "compare":
            # every run is a process of its own: one is made, of the others the names are looked up
            assert [read_recipe(name) for name in words[words.index("--methods") + 1].split(",")]
            words += ["--data", "photos", "--model", weights, "--seeds", "1", "--methods", "vptm"]
        status, _, said = vptm(*words, *(QUICK.get(words[0], []) if "--resume" not in words else []))
        assert status == 0, f"{line}: {said}"


class Read(Exception):
    """Ends a program once its arguments are read."""


def _stopping(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
    parsed, rest = self.parse_known_args(*arguments, **options)
    if rest:
        self.error(f"unrecognized arguments: {' '.join(rest)}")
    raise Read(parsed)


def _read_vptm(arguments: Sequence[str], whole: bool) -> None:
    """Arguments of `vptm`, read by its own command line, whose commands do nothing. Words in capitals are the reader's:
    a place and a name are any word, a form is one of a few. A line that is not whole leaves out what is required."""
    group = typer.main.get_command(app)
    for command in group.commands.values():  # type: ignore[attr-defined]
        command.callback = lambda **options: None
        for parameter in command.params:
            parameter.required &= whole
    assert not group.main(
        ["pt2" if word == "FORMAT" else word for word in arguments], prog_name="vptm", standalone_mode=False
    )


def _read_module(module: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments of `python -m`, read by the module's own parser, at which it ends."""
    if not module.startswith("pdoc"):
        program = importlib.import_module(module)
        if not arguments:
            assert callable(program.main), module  # named, or all that is required left out
            return
        start = program.main
    else:
        pytest.importorskip("pdoc", reason="makes the pages")
        start = importlib.import_module("pdoc.__main__").cli
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", _stopping)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Read):
        start()


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.where} {shlex.join(line.words)}")
def test_command_lines_take_what_is_written(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is copied from a page must not end in a usage message. A program that is not known here needs a
    proof: to be run, or why not."""
    assert line.program in ("vptm", *NOT_RUN) or line not in OF_BLOCKS, f"{line.program}: run it here, or say why not"
    whole = line in OF_BLOCKS
    if line.program == "vptm":
        _read_vptm(line.words[1:], whole)
    elif line.program == "torchrun":
        from torch.distributed.run import get_args_parser

        read = get_args_parser().parse_args(line.words[1:])
        program = [read.training_script, *read.training_script_args]
        assert read.module and program[0] == "vptm", "-m vptm must be what is started"
        _read_vptm(program[1:], whole)
    elif line.program == "accelerate":
        pytest.importorskip("accelerate", reason="its launcher")
        from accelerate.commands.launch import launch_command_parser

        read = launch_command_parser().parse_args(line.words[2:])
        assert read.module and read.training_script == "vptm"
        _read_vptm(read.training_script_args, whole)
    elif line.words[:2] == ["python", "-m"] and line.program != "venv":
        _read_module(line.program, line.words[3:], monkeypatch)


def test_pytest_takes_what_is_written() -> None:
    """Its options are those of its plugins and of bench/conftest.py, which it reads in a process of its own; files and
    marks are there."""
    written = sorted({tuple(line.words[1:]) for line in LINES if line.program == "pytest"})
    assert len(written) > 3
    for words in written:
        assert all((ROOT / word).exists() for word in words if "/" in word), words
        if "-m" in words:
            mark = words[words.index("-m") + 1]
            assert f'"{mark}: ' in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), words
    # two starts: benches do not go with xdist; --markers: options are read, and nothing is collected
    calls = [[word for line in written if ("-n" in line) == parallel for word in line] for parallel in (False, True)]
    program = "import sys, pytest\nsys.exit(sum(pytest.main([*words, '--markers']) for words in %r))"
    done = subprocess.run([sys.executable, "-c", program % calls], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
