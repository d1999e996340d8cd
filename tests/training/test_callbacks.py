"""What a run tells while it goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from console import Console
from tiny_data import write_backbone, write_pictures
from tiny_runs import make_model, metrics, run, stopped_run

from vptm.training import callbacks
from vptm.training.callbacks import Callback, TensorBoard


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


class Told(Callback):
    def __init__(self) -> None:
        self.steps: list[tuple[int, float, float]] = []
        self.epochs: list[Any] = []
        self.ended: list[Any] = []

    def step(self, number: int, loss: torch.Tensor, lr: float) -> None:
        self.steps.append((number, loss.item(), lr))

    def epoch(self, row: Any) -> None:
        self.epochs.append(dict(row))

    def end(self, history: Any, *, interrupted: bool) -> None:
        self.ended.append((list(history), interrupted))


def test_a_callback_hears_every_step_and_epoch_and_the_end(backbone: Path, tmp_path: Path) -> None:
    """Numbers go on where a run is resumed, and the rows are those of metrics.csv, which is written then."""
    stopped, resumed = Told(), Told()
    stopped_run(make_model(backbone), tmp_path / "r", 3, callbacks=[stopped])
    written: list[int] = []
    resumed.epoch = lambda row: (Told.epoch(resumed, row), written.append(len(metrics(tmp_path / "r"))))  # type: ignore[method-assign]
    result = run(make_model(backbone), tmp_path / "r", epochs=3, resume=True, callbacks=[resumed])
    assert [number for number, _, _ in stopped.steps] == list(range(6)) and written == [3]
    assert [number for number, _, _ in resumed.steps] == [6, 7, 8]
    assert stopped.epochs + resumed.epochs == result.history
    assert resumed.ended == [(result.history, False)] and stopped.ended == [(result.history[:2], True)]
    sizes = [5, 5, 2]
    mean = sum(loss * size for (_, loss, _), size in zip(resumed.steps, sizes)) / 12
    assert mean == pytest.approx(result.history[2]["train_loss"]) and resumed.steps[-1][2] == result.history[2]["lr"]


def test_what_a_callback_raises_leaves_the_epochs_before(backbone: Path, tmp_path: Path) -> None:
    class Failing(Callback):
        def step(self, number: int, loss: torch.Tensor, lr: float) -> None:
            if number == 4:
                raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run(make_model(backbone), tmp_path / "r", callbacks=[Failing()])
    assert len(metrics(tmp_path / "r")) == 1
    assert len(run(make_model(backbone), tmp_path / "r", resume=True).history) == 4


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be written by TensorBoard, which need not be installed."""
    found: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            found.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            found.append((name, value, epoch))

        def flush(self) -> None: ...

        def close(self) -> None:
            found.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(callbacks, "find_spec", lambda name: object())
    return found


def test_tensorboard_has_a_curve_of_every_column(
    vptm: Console, backbone: Path, tmp_path: Path, written: list[Any]
) -> None:
    write_pictures(tmp_path / "pictures", 8)
    more = ["--readout", "cls", "--verbalizer", "linear", "--token-activation", "hidden", "--out", tmp_path / "r"]
    where = ["--model", backbone, "--data", tmp_path / "pictures", "--log", "tensorboard", "--no-test"]
    assert vptm("train", *where, "--shots", 4, "--epochs", 2, *more)[0] == 0
    assert written[0] == (str(tmp_path / "r" / "tensorboard"), 1) and written[-1] == "closed"
    rows = metrics(tmp_path / "r")
    values = {(name, epoch): value for name, value, epoch in written[1:-1]}
    for row in rows:
        epoch = int(row["epoch"])
        assert values["loss/train", epoch] == float(row["train_loss"])
        assert values["accuracy/val", epoch] == float(row["val_accuracy"]) and values["lr", epoch] == float(row["lr"])


def test_a_logger_that_is_not_installed_is_refused_at_once(
    vptm: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "find_spec", lambda name: None)
    line = "log tensorboard needs TensorBoard: pip install tensorboard"
    assert vptm.refused("train", "--log", "tensorboard", "--out", tmp_path / "r") == (2, f"vptm: {line}")
    assert not (tmp_path / "r").exists()
    with pytest.raises(ValueError, match=line):
        TensorBoard(tmp_path)
