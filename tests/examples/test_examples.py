"""The programs in examples/ are what a user copies first: each runs as it stands, on a CPU and without a network."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny_data import write_backbone, write_pictures

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs an example in an empty folder and returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_examples_are_short_and_all_tested() -> None:
    """One that is not run here rots; one that does not fit a screen is not read."""
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path.name
        assert f'run("{path.name}"' in source, path.name


def test_drop_in(run) -> None:
    printed = run("drop_in.py", "--shots", "2", "--epochs", "1")
    assert re.search(r"test accuracy \d+\.\d+%", printed) and "PromptedBEiT is back" in printed


def test_train_on_a_folder(run, tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 10)
    model = str(write_backbone(tmp_path / "backbone.safetensors"))
    picture = next((tmp_path / "photos").rglob("*.png"))
    printed = run("train_on_a_folder.py", "photos", "--model", model, "--epochs", "1", "--predict", str(picture))
    assert re.search(r"test accuracy \d+\.\d+%", printed)
    assert re.search(rf"{picture.name}: \w+, \d+%", printed) and (tmp_path / "adapter").is_dir()


def test_own_backbone(run) -> None:
    printed = run("own_backbone.py")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert printed.startswith("PromptedViT reads cls") and losses[-1] < losses[0]


def test_kernels_alone(run) -> None:
    """The plain PyTorch beside every op is what it is documented to equal."""
    printed = run("kernels_alone.py")
    errors = [float(error) for error in re.findall(r"off by (\S+)", printed)]
    assert len(errors) == 2 and max(errors) < 1e-5
