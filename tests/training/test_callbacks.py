"""What a run tells while it goes on."""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from console import Console
from tiny_data import write_backbone, write_pictures
from tiny_runs import make_model, metrics, run, stopped_run

from vptm.models.opening import load_adapter
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


CHANGES: dict[str, Any] = {
    "edit": lambda model: model.backbone.norm.weight.mul_(1.5),
    "mask token": lambda model: model.mask_token.mul_(1.5),
    "another backbone": lambda model: setattr(model, "backbone", edited(model.backbone)),
    "another head": lambda model: setattr(model, "lm_head", edited(model.lm_head)),
    "unfreeze": lambda model: model.unfreeze(),
    "thaw a block": lambda model: model.backbone.blocks[-1].requires_grad_(True),
    "eps": lambda model: setattr(model.backbone.norm, "eps", 1.0),
    "readout": lambda model: setattr(model, "readout", "cls"),
}
REFUSED = {
    "eps": r"the eps of backbone\.norm must be the 1e-06 that the model was built with",
    "readout": "readout must be the 'mask' that the model was built with",
}


def edited(part: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(part)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    return other


def test_a_run_whose_frozen_part_was_edited_is_not_resumed_without_the_edit(backbone: Path, tmp_path: Path) -> None:
    """Prompts that were learned with it would go on without."""

    def changing(model: Any) -> Callback:
        found = Callback()
        found.epoch = lambda row: CHANGES["another head"](model)  # type: ignore[method-assign]
        return found

    model = make_model(backbone)
    stopped_run(model, tmp_path / "r", 3, callbacks=[changing(model)])
    with pytest.raises(ValueError, match="frozen weights were changed while the run went on, which no state holds"):
        run(make_model(backbone), tmp_path / "r", epochs=3, resume=True)


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_holds_what_a_callback_did_to_frozen_parts(backbone: Path, tmp_path: Path, change: str) -> None:
    """What was compared with the source when the run began would be written of another model, or never load again."""
    model = make_model(backbone)

    class Changing(Callback):
        def epoch(self, row: Any) -> None:
            with torch.no_grad():
                CHANGES[change](model)

    if change in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[change]):
            run(model, tmp_path / "r", epochs=3, callbacks=[Changing()])
        return
    run(model, tmp_path / "r", epochs=3, callbacks=[Changing()])
    loaded = load_adapter(tmp_path / "r")
    for (name, found), expected in zip(loaded.named_parameters(), model.parameters()):
        assert torch.equal(found, expected) and found.requires_grad == expected.requires_grad, name


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


class Remembering:
    """A tracker as those of Accelerate are."""

    requires_logging_directory = True
    told: list[Any]

    def __init__(self, project: str, folder: str) -> None:
        self.told.append((project, folder))

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        if self.told.count("start") > 1:
            raise RuntimeError("no network\nsee the manual")
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finish")


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What two trackers of Accelerate are told, of which one is installed; Accelerate need not be."""
    told: list[Any] = []
    module: Any = ModuleType("accelerate.tracking")
    known = {name: type(name, (Remembering,), {"told": told}) for name in ("wandb", "comet_ml")}
    module.LOGGER_TYPE_TO_CLASS, module.get_available_trackers = known, lambda: ["wandb"]
    monkeypatch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(callbacks, "find_spec", lambda name: object())
    return told


def test_a_tracker_has_the_settings_and_every_epoch(
    vptm: Console, backbone: Path, tmp_path: Path, trackers: list[Any]
) -> None:
    """What cannot start says so in one line."""
    write_pictures(tmp_path / "pictures", 8)
    where = ["--model", backbone, "--data", tmp_path / "pictures", "--log", "wandb", "--no-test", "--shots", 4]
    assert vptm("train", *where, "--epochs", 2, "--lr-of", "prompts=0.1", "--out", tmp_path / "r")[0] == 0
    assert trackers[:2] == [("vptm", str(tmp_path / "r" / "wandb")), "start"] and trackers[-1] == "finish"
    settings, *epochs = trackers[2:-1]
    assert settings["epochs"] == 2 and settings["lr_of"] == "prompts=0.1" and settings["value_range"] is None
    rows = metrics(tmp_path / "r")
    assert [step for step, _ in epochs] == [1, 2]
    for (_, values), row in zip(epochs, rows):
        assert {name: str(value) for name, value in values.items() if name != "seconds"} == {
            name: value for name, value in row.items() if name != "epoch"
        }
    refused = vptm.refused("train", *where, "--out", tmp_path / "again")
    assert refused == (2, "vptm: log wandb could not start: no network")


def test_a_tracker_that_is_not_there_is_refused_at_once(vptm: Console, tmp_path: Path, trackers: list[Any]) -> None:
    for name, line in (
        ("comet_ml", "log comet_ml needs a package that is not installed: pip install comet-ml"),
        ("wandbb", "log must be one of wandb, comet_ml, got 'wandbb', did you mean 'wandb'?"),
    ):
        assert vptm.refused("train", "--log", name, "--out", tmp_path / "r") == (2, f"vptm: {line}")
    assert not (tmp_path / "r").exists() and not trackers


def test_accelerate_lists_the_trackers(tmp_path: Path) -> None:
    """What `Tracker` relies on, where Accelerate is installed; and that it is asked for where it is not."""
    if find_spec("accelerate") is None:
        with pytest.raises(ValueError, match="log wandb needs Accelerate and what it logs to: pip install accelerate"):
            callbacks.check_log("wandb")
        return
    tracking = import_module("accelerate.tracking")
    assert {"wandb", "mlflow", "comet_ml"} <= tracking.LOGGER_TYPE_TO_CLASS.keys()
    for kind in tracking.LOGGER_TYPE_TO_CLASS.values():
        assert isinstance(kind.requires_logging_directory, bool)
        assert all(callable(getattr(kind, name)) for name in ("store_init_configuration", "log", "finish"))
    missing = [
        name for name in tracking.LOGGER_TYPE_TO_CLASS if name not in map(str, tracking.get_available_trackers())
    ]
    for name in {"tensorboard"}.symmetric_difference(missing) - {"tensorboard"}:
        with pytest.raises(ValueError, match=f"log {name} needs a package that is not installed"):
            callbacks.check_log(name)
