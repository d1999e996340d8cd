"""Where a run ends: before its last epoch, or after more epochs than it was started for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from console import Console
from tiny_data import write_backbone, write_pictures
from tiny_runs import assert_same_run, loaders, make_model, metrics, run, stopped_run

from vptm import fit, load_adapter
from vptm.training.run_folder import RUN_FILE
from vptm.training.scores import validation_score
from vptm.training.state import STATE_FILE
from vptm.weights.adapter_format import TENSORS_FILE


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


def facts(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
    return content


def test_a_run_stops_where_no_epoch_is_better(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a step size that changes nothing the first epoch stays the best. Resumed it is known to be done, also after
    a kill; with more patience it goes on and is the run that had it from the start."""
    still: dict[str, Any] = {"epochs": 5, "lr": 1e-30, "schedule": "none", "warmup_epochs": 0}
    result = run(make_model(backbone), tmp_path / "r", early_stopping=2, progress=True, **still)
    why = "no validation of the last 2 epochs was better"
    assert (len(result.history), result.best_epoch, result.stopped) == (3, 1, why)
    assert capsys.readouterr().err.endswith(f"stopped after epoch 3 of 5: {why}\n")
    finished = facts(tmp_path / "r")["finished"]
    assert (finished["epochs"], finished["stopped"]) == (3, why)
    content = facts(tmp_path / "r")
    del content["finished"]
    (tmp_path / "r" / RUN_FILE).write_text(json.dumps(content))  # as a kill before it was written leaves it
    for _ in range(2):
        again = run(make_model(backbone), tmp_path / "r", early_stopping=2, resume=True, progress=True, **still)
        assert len(again.history) == 3 and again.stopped == why
        assert "is finished after 3 epochs, the best was 1: nothing to train\nstopped" in capsys.readouterr().err
    with pytest.raises(ValueError, match="early_stopping was 2, now 1"):
        run(make_model(backbone), tmp_path / "r", early_stopping=1, resume=True, **still)
    longer = run(make_model(backbone), tmp_path / "r", early_stopping=3, resume=True, **still)
    assert len(longer.history) == 4
    run(make_model(backbone), tmp_path / "whole", early_stopping=3, **still)
    assert_same_run(tmp_path / "whole", tmp_path / "r")


def test_patience_needs_images_to_be_judged_on(backbone: Path, tmp_path: Path) -> None:
    model = make_model(backbone)
    with pytest.raises(ValueError, match="early_stopping needs validation images, got 2 without any"):
        fit(model, loaders(model)[0], epochs=2, lr=0.1, early_stopping=2, run_dir=tmp_path / "r")
    with pytest.raises(ValueError, match="early_stopping must be >= 1, or None, got 0"):
        run(model, tmp_path / "r", early_stopping=0)
    assert not (tmp_path / "r").exists()


def validated(folder: Path) -> list[int]:
    return [int(row["epoch"]) for row in metrics(folder) if row["val_loss"]]


def assert_same_learned(one: Any, two: Any) -> None:
    learned = two.learned_state_dict()
    assert all(torch.equal(tensor, learned[name]) for name, tensor in one.learned_state_dict().items())


def test_validation_now_and_then_changes_nothing_but_which_epochs_can_be_best(backbone: Path, tmp_path: Path) -> None:
    """Looking at validation images draws no random number; the best of the epochs that are looked at is kept, and a run
    that was stopped between two looks and resumed is the whole one."""
    options: dict[str, Any] = {"ema": 0.8, "schedule": "none"}
    every = run(make_model(backbone), tmp_path / "every", epochs=5, **options)
    some = run(make_model(backbone), tmp_path / "some", epochs=5, val_every=2, **options)
    assert validated(tmp_path / "some") == [2, 4, 5]
    looked = [row for row in every.history if row["epoch"] in (2, 4, 5)]
    same = ("epoch", "train_loss", "val_loss", "val_accuracy")
    assert [[row[name] for name in same] for row in some.history if row["val_loss"] is not None] == [
        [row[name] for name in same] for row in looked
    ]
    assert some.best_epoch == max(looked, key=validation_score)["epoch"]
    stopped_run(make_model(backbone), tmp_path / "parts", 4, val_every=2, **options)
    assert validated(tmp_path / "parts") == [2] and len(metrics(tmp_path / "parts")) == 3
    run(make_model(backbone), tmp_path / "parts", epochs=5, val_every=2, resume=True, **options)
    assert_same_run(tmp_path / "some", tmp_path / "parts")
    with pytest.raises(ValueError, match="val_every was 2, now 1"):
        run(make_model(backbone), tmp_path / "parts", epochs=5, resume=True, **options)


def test_a_run_that_is_stopped_before_the_first_validation_keeps_its_last_epoch(backbone: Path, tmp_path: Path) -> None:
    """And not what it started from."""
    model, twin = make_model(backbone), make_model(backbone)
    stopped_run(model, tmp_path / "r", 3, val_every=3, schedule="none")
    assert validated(tmp_path / "r") == [] and len(metrics(tmp_path / "r")) == 2
    train, _ = loaders(twin)
    fit(twin, train, epochs=2, lr=0.02, warmup_epochs=1, schedule="none", progress=False)
    assert not torch.equal(twin.prompts.weight, make_model(backbone).prompts.weight)
    assert_same_learned(model, twin)
    assert_same_learned(load_adapter(tmp_path / "r"), twin)


def test_no_run_stops_between_two_looks_at_validation_images(backbone: Path, tmp_path: Path) -> None:
    """An epoch that was not looked at could have been better: patience of one ends the run at the second look."""
    still: dict[str, Any] = {"epochs": 9, "lr": 1e-30, "schedule": "none", "warmup_epochs": 0}
    result = run(make_model(backbone), tmp_path / "r", early_stopping=1, val_every=3, **still)
    assert (len(result.history), result.best_epoch, validated(tmp_path / "r")) == (6, 3, [3, 6])
    with pytest.raises(ValueError, match="val_every needs validation images, got 2 without any"):
        fit(make_model(backbone), loaders(make_model(backbone))[0], epochs=2, lr=0.1, val_every=2)
    with pytest.raises(ValueError, match="val_every must be >= 1, got 0"):
        run(make_model(backbone), val_every=0)


@pytest.mark.parametrize("stopped", [False, True])
def test_more_epochs_at_a_constant_rate_are_the_longer_run(backbone: Path, tmp_path: Path, stopped: bool) -> None:
    """Bitwise, whether the run was finished or not; what followed the shorter run is gone from its facts."""
    options: dict[str, Any] = {"schedule": "none", "ema": 0.8}
    run(make_model(backbone), tmp_path / "whole", epochs=4, **options)
    if stopped:
        stopped_run(make_model(backbone), tmp_path / "parts", 2, **options)
    else:
        run(make_model(backbone), tmp_path / "parts", epochs=2, **options)
        (tmp_path / "parts" / RUN_FILE).write_text(json.dumps(facts(tmp_path / "parts") | {"result": {}, "cost": {}}))
    run(make_model(backbone), tmp_path / "parts", epochs=4, resume=True, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    content = facts(tmp_path / "parts")
    assert content["extended"] == [{"after_epoch": 1 if stopped else 2, "epochs": [2, 4]}]
    assert content["arguments"]["epochs"] == content["finished"]["identity"]["epochs"] == 4
    assert not {"result", "cost"} & content.keys()


def test_more_epochs_have_the_rates_of_the_longer_schedule(backbone: Path, tmp_path: Path) -> None:
    """And the epochs before those of the shorter one; without its state no finished run goes on, and none gets
    shorter."""
    run(make_model(backbone), tmp_path / "r", epochs=2)
    short = [row["lr"] for row in metrics(tmp_path / "r")]
    with pytest.raises(ValueError, match="epochs was 2, now 1"):
        run(make_model(backbone), tmp_path / "r", epochs=1, warmup_epochs=0, resume=True)
    run(make_model(backbone), tmp_path / "r", epochs=4, resume=True)
    run(make_model(backbone), tmp_path / "long", epochs=4)
    assert [row["lr"] for row in metrics(tmp_path / "r")] == [
        *short,
        *[row["lr"] for row in metrics(tmp_path / "long")[2:]],
    ]
    (tmp_path / "r" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=r"cannot resume .*/r for more epochs: its state\.pt is gone"):
        run(make_model(backbone), tmp_path / "r", epochs=5, resume=True)


def test_the_command_trains_a_finished_run_for_longer(vptm: Console, backbone: Path, tmp_path: Path) -> None:
    """The steps on prototypes after it and the test are made anew: the adapter is that of the longer run."""
    write_pictures(tmp_path / "pictures", 8)
    where = ["--model", backbone, "--data", tmp_path / "pictures", "--shots", 2, "--schedule", "none"]
    where += ["--prototype-dim", 4, "--prototype-steps", 2, "--prototype-init", "class_means"]  # epochs improve on it
    assert vptm("train", *where, "--epochs", 1, "--out", tmp_path / "r")[0] == 0
    before = facts(tmp_path / "r")
    assert vptm("train", "--resume", "--epochs", 3, "--out", tmp_path / "r")[0] == 0
    assert vptm("train", *where, "--epochs", 3, "--out", tmp_path / "whole")[0] == 0
    one, two = (facts(tmp_path / name) for name in ("r", "whole"))
    assert (tmp_path / "r" / TENSORS_FILE).read_bytes() == (tmp_path / "whole" / TENSORS_FILE).read_bytes()
    assert one["result"] == two["result"] != before["result"] and one["settings"] == two["settings"]
    status, said = vptm.refused("train", "--resume", "--epochs", 2, "--out", tmp_path / "r")
    assert (status, said) == (2, "vptm: --epochs 2 differs from the run's 3: leave it out to resume")
