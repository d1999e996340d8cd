"""fit and evaluate: what is learned, what is kept, what survives a kill, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup
from tiny_data import picture, write_backbone
from tiny_runs import LEARNS, Interrupting, assert_same_run, loaders, make_model, metrics, pictures, run, stopped_run
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

import vptm.frozen.rows
import vptm.training.masters
import vptm.training.progress
from vptm import PromptedBEiT, evaluate, fit, load_adapter, save_adapter, transforms
from vptm.data.datasets import ImageDataset
from vptm.data.split_list import SplitList
from vptm.methods.run import train_run
from vptm.settings import RunSettings
from vptm.training.losses import protoverb_loss
from vptm.training.progress import TrainProgress
from vptm.training.ranks import Ranks
from vptm.training.run_folder import CONFUSION_FILE, CURVES_FILE, METRICS_FILE, RUN_FILE, RUN_FILES
from vptm.training.state import STATE_FILE, read_state, write_state
from vptm.weights.adapter_format import CONFIG_FILE, TENSORS_FILE
from vptm.weights.files import WriteError


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


def test_it_learns_and_changes_only_what_is_not_frozen(backbone: Path) -> None:
    model = make_model(backbone, **LEARNS)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    learned = {name: tensor.clone() for name, tensor in model.learned_state_dict().items()}
    result = run(model, epochs=30)
    assert result.best_val_accuracy == 1.0, f"a separable task stays at {result.best_val_accuracy}"
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), f"{name} is frozen and has changed"
        else:
            assert not torch.equal(parameter, learned[name]), f"{name} was not trained"


class Turned(Dataset[Any]):
    """Another data set whose labels are wrong once `right` of its pictures were read."""

    def __init__(self, inner: Any, right: int) -> None:
        self.inner, self.right = inner, right

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.inner[index]
        self.right -= 1
        return image, label if self.right >= 0 else (label + 1) % 3


def test_the_best_epoch_on_val_is_what_remains(backbone: Path, tmp_path: Path) -> None:
    """Half of the epochs teach wrong labels: the last epoch is not the best, and the model must hold the best one."""
    model = make_model(backbone, **LEARNS)
    train, val = loaders(model)
    train = DataLoader(Turned(train.dataset, 6 * 12), batch_size=5, shuffle=True)
    result = fit(model, train, val, epochs=12, lr=0.1, schedule="none", progress=False, run_dir=tmp_path / "r")
    scores = [(row["val_accuracy"], -row["val_loss"]) for row in result.history]
    best = max(range(12), key=lambda k: scores[k])
    assert best < 11, scores
    assert result.best_epoch == best + 1
    measured = evaluate(model, val)
    assert (measured["accuracy"], -measured["loss"]) == scores[best]
    loaded = load_adapter(tmp_path / "r")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))


def test_without_val_the_last_epoch_remains(backbone: Path) -> None:
    model = make_model(backbone)
    result = fit(model, loaders(model)[0], epochs=3, lr=0.02, progress=False)
    assert result.best_epoch == 3 and result.best_val_accuracy is None
    assert [row["val_loss"] for row in result.history] == [None] * 3


def test_train_metrics_are_those_of_the_steps(backbone: Path) -> None:
    """With a step size that changes nothing, the epoch's numbers are the plain averages over all images."""
    model = make_model(backbone)
    train, _ = loaders(model)
    fixed = DataLoader(train.dataset.with_transform(transforms(model)), batch_size=5)  # type: ignore[attr-defined]
    row = fit(model, fixed, epochs=1, lr=1e-30, progress=False).history[0]
    expected = evaluate(model, fixed)
    assert row["train_accuracy"] == expected["accuracy"]
    assert row["train_loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_train_loss_is_smoothed_and_contrasted(backbone: Path) -> None:
    """Label smoothing e is (1 - e) -log p_y plus e times the mean -log p; ProtoVerb's losses come on top of it."""
    model = make_model(backbone)
    images, labels = next(iter(DataLoader(pictures(12).with_transform(transforms(model)), batch_size=12)))
    data = DataLoader(TensorDataset(images, labels), batch_size=12)

    def train_loss(**options: Any) -> float:
        return float(fit(model, data, epochs=1, lr=1e-30, progress=False, **options).history[0]["train_loss"])

    with torch.no_grad():
        hidden = model.forward_hidden(images)
        logs = -model(images).log_softmax(1)
        contrast = protoverb_loss(model.verbalizer.embed(hidden, model.lm_head), model.verbalizer.prototypes, labels)
    smoothed = (0.7 * logs[torch.arange(12), labels] + 0.3 * logs.mean(1)).mean().item()
    assert train_loss(label_smoothing=0.3) == pytest.approx(smoothed, rel=1e-5)
    both = train_loss(label_smoothing=0.3, protoverb_weight=2.0)
    assert both == pytest.approx(smoothed + 2 * contrast.item(), rel=1e-5)


def test_parts_of_a_batch_add_up_to_it(backbone: Path) -> None:
    """Also those of the last batch, 2 of 12 pictures, which has fewer pictures than parts."""
    histories, learned = [], []
    for parts in (1, 2, 5):
        model = make_model(backbone, temperature=0.5).double()
        data, _ = cast_loaders(model, torch.float64)
        train = DataLoader(data.dataset, batch_size=10)
        options: dict[str, Any] = {"epochs": 3, "lr": 0.01, "progress": False, "optimizer": "sgd"}
        row = fit(model, train, accumulate=parts, **options).history[-1]
        histories.append((row["train_loss"], row["train_accuracy"]))
        learned.append(torch.cat([tensor.flatten() for tensor in model.learned_state_dict().values()]))
    for history, values in zip(histories[1:], learned[1:]):
        assert history == pytest.approx(histories[0], rel=1e-12)
        assert (values - learned[0]).abs().max() < 1e-12


def test_blocks_computed_again_are_the_same_run(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise in float64, with dropout, and where only the end of a run does; the model is as it was afterwards."""
    recomputed: list[Any] = []
    checkpoint = vptm.frozen.rows.checkpoint

    def counted(function: Any, *args: Any, **options: Any) -> Any:
        recomputed.append(options)
        return checkpoint(function, *args, **options)

    monkeypatch.setattr(vptm.frozen.rows, "checkpoint", counted)
    learned = []
    for name, stops, flags in (("plain", [3], [False]), ("again", [3], [True]), ("mixed", [2, 3], [False, True])):
        for stop, flag in zip(stops, flags):
            model = make_model(backbone, prompt_dropout=0.3, prompt_mode="deep").double()
            train, val = cast_loaders(model, torch.float64)
            if stop == 2:
                train = DataLoader(Interrupting(train.dataset, 12 * 2 + 3), batch_size=5, shuffle=True)  # type: ignore[arg-type]
            recomputed.clear()
            options: dict[str, Any] = {"epochs": 3, "lr": 0.02, "progress": False, "resume": (tmp_path / name).exists()}
            fit(model, train, val, run_dir=tmp_path / name, grad_checkpointing=flag, **options)
            assert bool(recomputed) == flag and not model.grad_checkpointing
            assert all(not options["use_reentrant"] for options in recomputed)
        learned.append(model.learned_state_dict())
    for name in ("again", "mixed"):
        assert_same_run(tmp_path / "plain", tmp_path / name)
    assert all(torch.equal(tensor, other[name]) for other in learned[1:] for name, tensor in learned[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_gradient_is_clipped(backbone: Path, dtype: torch.dtype) -> None:
    """One step of plain gradient descent then moves everything that is learned by lr times the longest gradient."""
    moved = []
    for clip in (None, 1e-2):
        model = make_model(backbone).to(dtype)
        train = DataLoader(cast_loaders(model, dtype)[0].dataset, batch_size=12)
        before = {name: tensor.double().clone() for name, tensor in model.learned_state_dict().items()}
        options: dict[str, Any] = {"epochs": 1, "lr": 0.5, "schedule": "none", "progress": False}
        fit(model, train, optimizer="momentum", clip_norm=clip, **options)
        after = model.learned_state_dict()
        moved.append(sum(float((after[name].double() - old).square().sum()) for name, old in before.items()) ** 0.5)
    assert moved[0] > 0.02, "the gradient was short anyway"
    assert moved[1] == pytest.approx(0.005, rel=1e-3 if dtype == torch.float32 else 0.3)


def test_protoverb_losses_train_everything(backbone: Path) -> None:
    """The contrast reaches prompts, projection and prototypes, and falls."""
    model = make_model(backbone)
    before = {name: tensor.clone() for name, tensor in model.learned_state_dict().items()}
    result = run(model, epochs=3, protoverb_weight=1.0)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.learned_state_dict().items())


def test_what_is_not_finite_is_refused_before_a_folder_is_made(backbone: Path, tmp_path: Path) -> None:
    model = make_model(backbone)
    with torch.no_grad():
        model.get_parameter("verbalizer.prototypes")[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"verbalizer\.prototypes must be finite, got nan at \[2, 1\]"):
        run(model, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("classes", [2, 4])
def test_images_of_another_number_of_classes_are_refused(backbone: Path, tmp_path: Path, classes: int) -> None:
    """Also where every label happens to fit."""
    model = make_model(backbone)
    names = ["a", "b", "c", "d"][:classes]
    wrong = ImageDataset(np.zeros((2, 12, 12), np.uint8), np.array([0, 1]), names, keys=["0", "1"])
    with pytest.raises(ValueError, match=f"train images must have the model's 3 classes, got {classes}"):
        fit(model, DataLoader(wrong.with_transform(transforms(model))), epochs=1, lr=0.1, run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_learning_rate_warms_up_and_falls_to_nothing(backbone: Path) -> None:
    rates = [row["lr"] for row in run(make_model(backbone), epochs=8, lr=0.1, warmup_epochs=2).history]
    assert rates[0] < rates[1] <= 0.1 and rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.01


@pytest.mark.usefixtures("drawn")
def test_run_folder_holds_everything(backbone: Path, tmp_path: Path) -> None:
    result = run(make_model(backbone), tmp_path / "r", info={"note": "x"})
    assert {path.name for path in (tmp_path / "r").iterdir()} == set(RUN_FILES) - {CONFUSION_FILE}
    assert [int(row["epoch"]) for row in metrics(tmp_path / "r")] == [1, 2, 3, 4]
    facts = json.loads((tmp_path / "r" / RUN_FILE).read_text())
    assert (
        facts["seed"] == 0 and facts["arguments"]["lr"] == 0.02 and facts["versions"]["torch"] and facts["note"] == "x"
    )
    with Image.open(tmp_path / "r" / CURVES_FILE) as image:
        assert image.size[0] > 600
    extra = json.loads((tmp_path / "r" / CONFIG_FILE).read_text())["extra"]
    assert extra == {"epoch": result.best_epoch, "val_accuracy": result.best_val_accuracy}


def test_global_generators_are_put_back(backbone: Path) -> None:
    model = make_model(backbone)
    own = torch.Generator().manual_seed(3)
    train = DataLoader(pictures(6).with_transform(transforms(model)), batch_size=3, shuffle=True, generator=own)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), own.get_state())
    fit(model, train, epochs=1, lr=0.01, progress=False)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), own.get_state())
    assert before[:2] == after[:2] and torch.equal(before[2], after[2]) and torch.equal(before[3], after[3])


def test_the_seed_alone_decides(backbone: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(99)
        model = make_model(backbone, prompt_dropout=0.3)
        torch.manual_seed(len(name) + seed)  # what was drawn before fit must not matter
        run(model, tmp_path / name, seed=seed)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def uninterrupted(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with dropout."""
    run(make_model(backbone, prompt_dropout=0.3), folder := tmp_path_factory.mktemp("runs") / "whole", epochs=2)
    return folder


@pytest.mark.parametrize("death", range(1, 17))
def test_a_kill_at_any_write_resumes_bitwise(
    backbone: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: int
) -> None:
    """The process dies just before its `death`-th rename; augmentation, shuffling and dropout must not notice."""
    writes = 0
    rename = vptm.weights.files.os.replace

    def mortal(*paths: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == death:
            raise Killed
        rename(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(vptm.weights.files.os, "replace", mortal)
        try:
            run(make_model(backbone, prompt_dropout=0.3), tmp_path / "killed", epochs=2)
        except Killed:
            pass
        else:
            assert death > 13, "a run must write what says what it is, and state and metrics of every epoch"
    if not (tmp_path / "killed" / RUN_FILE).exists():
        with pytest.raises(ValueError, match="nothing to resume"):
            run(make_model(backbone, prompt_dropout=0.3), tmp_path / "killed", epochs=2, resume=True)
        run(make_model(backbone, prompt_dropout=0.3), tmp_path / "killed", epochs=2)
    else:
        run(make_model(backbone, prompt_dropout=0.3), tmp_path / "killed", epochs=2, resume=True)
    assert_same_run(uninterrupted, tmp_path / "killed")


@pytest.mark.parametrize("at", [2, 12 * 2 + 7])
def test_ctrl_c_leaves_a_usable_run_that_resumes_bitwise(backbone: Path, tmp_path: Path, at: int) -> None:
    run(make_model(backbone), tmp_path / "whole")
    model = make_model(backbone)
    train, val = loaders(model)
    broken = DataLoader(Interrupting(train.dataset, at), batch_size=5, shuffle=True)  # type: ignore[arg-type]
    options: dict[str, Any] = {"epochs": 4, "lr": 0.02, "warmup_epochs": 1, "progress": False}
    result = fit(model, broken, val, run_dir=tmp_path / "r", **options)
    assert result.interrupted and len(result.history) == (at - 1) // 12
    assert all(torch.equal(a, b) for a, b in zip(load_adapter(tmp_path / "r").parameters(), model.parameters()))
    resumed = run(make_model(backbone), tmp_path / "r", resume=True)
    assert not resumed.interrupted and len(resumed.history) == 4
    assert_same_run(tmp_path / "whole", tmp_path / "r")


def test_worker_processes_resume_bitwise(backbone: Path, tmp_path: Path) -> None:
    for name, stops in (("whole", (3,)), ("parts", (1, 3))):
        for stop in stops:
            model = make_model(backbone)
            train, val = loaders(model, num_workers=2)
            if stop == 1:
                train.dataset.at = None  # type: ignore[attr-defined]
                val = DataLoader(Interrupting(val.dataset, 9 + 3), batch_size=4)  # type: ignore[arg-type]
            resume = (tmp_path / name).exists()
            fit(model, train, val, epochs=3, lr=0.02, progress=False, run_dir=tmp_path / name, resume=resume)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_finished_run_changes_nothing(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its best epoch comes from the adapter, its state may be gone; it says that there is nothing to train."""
    first = run(make_model(backbone), tmp_path / "r")
    (tmp_path / "r" / STATE_FILE).unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    model = make_model(backbone, seed=5)
    again = run(model, tmp_path / "r", resume=True, progress=True)
    assert (again.history, again.best_epoch, again.best_val_accuracy) == (
        (first.history, first.best_epoch, first.best_val_accuracy)
    )
    assert all(torch.equal(a, b) for a, b in zip(load_adapter(tmp_path / "r").parameters(), model.parameters()))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    said = capsys.readouterr().err
    assert said.endswith(f"is finished after 4 epochs, the best was {first.best_epoch}: nothing to train\n")


def test_a_finished_run_that_was_damaged_is_refused(backbone: Path, tmp_path: Path) -> None:
    """Each would give a model or a history that is not the run's."""
    folder = tmp_path / "r"
    run(make_model(backbone), folder)
    facts = json.loads((folder / RUN_FILE).read_text())
    tensors = bytearray((folder / TENSORS_FILE).read_bytes())
    tensors[-3] ^= 4
    rows = (folder / METRICS_FILE).read_text().splitlines(keepends=True)
    for name, content, message in (
        (RUN_FILE, json.dumps(facts | {"finished": 3}), "run.json must say how the finished run ended"),
        (RUN_FILE, json.dumps(facts | {"finished": facts["finished"] | {"best_epoch": 9}}), "must say how"),
        (RUN_FILE, json.dumps(facts | {"finished": {}}), "must say how"),
        (RUN_FILE, "[", "run.json must be the JSON of a run"),
        (METRICS_FILE, "".join(rows[:-1]), "metrics.csv must have 4 epochs, got 3"),
        (METRICS_FILE, "".join(rows).replace(",", ";"), "metrics.csv must be the metrics of a run"),
        (TENSORS_FILE, bytes(tensors), "is damaged: its tensors do not have the hash"),
    ):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        model = make_model(backbone, seed=5)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"{message}.*; use overwrite$"):
            run(model, folder, resume=True)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), name
        (folder / name).write_bytes(good)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "epochs was 4, now 3"),
        ({"lr": 0.01}, "lr was 0.02, now 0.01"),
        ({"seed": 3}, "seed was 0, now 3"),
        ({"optimizer": "sgd"}, "optimizer was 'adamw', now 'sgd'"),
    ],
)
def test_resuming_with_other_arguments_is_refused(
    backbone: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run(make_model(backbone), tmp_path / "r")
    with pytest.raises(ValueError, match=message):
        run(make_model(backbone), tmp_path / "r", resume=True, **changes)


def test_resuming_with_another_model_or_data_is_refused(backbone: Path, tmp_path: Path) -> None:
    run(make_model(backbone), tmp_path / "r")
    with pytest.raises(ValueError, match=r"model\.prompt_length was 3, now 4"):
        run(make_model(backbone, prompt_length=4), tmp_path / "r", resume=True)
    other = make_model(write_backbone(tmp_path / "other.safetensors", seed=9))
    with pytest.raises(ValueError, match="backbone was"):
        run(other, tmp_path / "r", resume=True)
    model = make_model(backbone)
    train, val = loaders(model)
    relabelled = train.dataset.with_labels(np.roll(train.dataset.labels, 1))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="train labels was"):
        fit(
            model,
            DataLoader(relabelled, batch_size=5, shuffle=True),
            val,
            epochs=4,
            lr=0.02,
            warmup_epochs=1,
            run_dir=tmp_path / "r",
            resume=True,
        )


def test_a_run_lists_its_images_and_resumes_on_no_others(backbone: Path, tmp_path: Path) -> None:
    """The labels may be the same where the pictures are not."""
    run(make_model(backbone), tmp_path / "r")
    listed = SplitList.read(tmp_path / "r")
    assert listed is not None and len(listed.keys("train")) == 12 and len(listed.keys("val")) == 9
    assert listed == SplitList.of({"train": pictures(12), "val": pictures(9, first=100)})
    model = make_model(backbone)
    train, val = loaders(model)
    others: Any = train.dataset
    others.images = np.concatenate([others.images[:11], others.images[:1]])
    settings: dict[str, Any] = {"epochs": 4, "lr": 0.02, "warmup_epochs": 1, "progress": False}
    with pytest.raises(ValueError, match=r"of its 12 train images 1 changed, such as 11$"):
        fit(model, train, val, run_dir=tmp_path / "r", resume=True, **settings)
    assert SplitList.of({"train": others, "test": others}).repeated() == {"test": 12}


def test_names_of_any_bytes_are_listed(tmp_path: Path) -> None:
    name = os.fsdecode(b'\xff, "a"\n.png')
    picture(0, 0).save(tmp_path / name)
    part = ImageDataset([tmp_path / name], np.zeros(1), ["a"], keys=[name])
    listed = SplitList.of({"train": part})
    listed.write(tmp_path)
    assert SplitList.read(tmp_path) == listed and listed.is_within({"test": part})
    assert listed.used([*part.content_hashes(), "0" * 64]) == ["train", None]
    picture(0, 1).save(tmp_path / name)
    assert not listed.is_within({"test": part}), "another picture of the same name is not the run's"


class Payload:
    def __reduce__(self) -> Any:
        return (Path("/nonexistent/ran").write_text, ("x",))


@pytest.mark.parametrize("content", ["truncated", "pickle", "foreign"])
def test_a_damaged_state_is_refused_and_never_runs_code(backbone: Path, tmp_path: Path, content: str) -> None:
    stopped_run(make_model(backbone), tmp_path / "r", 4)
    path = tmp_path / "r" / STATE_FILE
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    else:
        torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="training state") as refusal:
        run(make_model(backbone), tmp_path / "r", resume=True)
    assert "\n" not in str(refusal.value)


def test_existing_run_folders_are_respected(backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    run(make_model(backbone), folder)
    before = (folder / TENSORS_FILE).read_bytes()
    with pytest.raises(ValueError, match="exists and is not empty: pass resume, overwrite or another folder"):
        run(make_model(backbone), folder)
    with pytest.raises(ValueError, match="exclude each other"):
        run(make_model(backbone), folder, resume=True, overwrite=True)
    assert (folder / TENSORS_FILE).read_bytes() == before
    (folder / "mine.txt").write_text("kept")
    run(make_model(backbone), folder, overwrite=True, seed=4)
    assert (folder / "mine.txt").read_text() == "kept" and (folder / TENSORS_FILE).read_bytes() != before
    assert len(metrics(folder)) == 4


def test_folders_that_cannot_hold_a_run_are_refused_before_training(backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = make_model(backbone)
    before = {name: tensor.clone() for name, tensor in model.learned_state_dict().items()}
    for folder, message, options in (
        (tmp_path / "file", "is a file", {}),
        (tmp_path / "file" / "below", "cannot be written", {}),
        (tmp_path / "none", "nothing to resume", {"resume": True}),
        (None, "resume=True needs run_dir", {"resume": True}),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, folder, **options)
    assert not (tmp_path / "none").exists()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.learned_state_dict().items())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be >= 1, got 0"),
        ({"epochs": 2.0}, TypeError, "epochs must be an integer, got 2.0"),
        ({"warmup_epochs": 4}, ValueError, "warmup_epochs must be >= 0 and < epochs=4, got 4"),
        ({"lr": 0.0}, ValueError, "lr must be finite and > 0, got 0.0"),
        ({"lr": math.nan}, ValueError, "lr must be finite and > 0, got nan"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite and >= 0"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"accumulate": 0}, ValueError, "accumulate must be >= 1, got 0"),
        ({"accumulate": 2}, ValueError, "accumulate must divide the batch of 5 images, got 2"),
        ({"accumulate": 5, "protoverb_weight": 1.0}, ValueError, "accumulate must be 1 with protoverb_weight, which"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be finite and > 0, or None, got 0.0"),
        ({"protoverb_weight": -1.0}, ValueError, "protoverb_weight must be finite and >= 0, got -1.0"),
        ({"schedule": "cosin"}, ValueError, "schedule must be one of .*, did you mean 'cosine'"),
        ({"optimizer": "adamww"}, ValueError, "optimizer must be .*, did you mean 'adamw'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    backbone: Path, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        run(make_model(backbone), tmp_path / "r", **changes)
    assert not (tmp_path / "r").exists()


class Together(Ranks):
    """The first of four processes, of which the others are not there: whatever would wait for them fails."""

    index, count = 0, 4

    def first(self, value: Any) -> Any:
        raise AssertionError("a run that is refused must not wait for other processes")

    sum = gather = sum_gradients = first


@pytest.mark.parametrize(
    ("batch_size", "val_size", "changes", "message"),
    [
        (3, 4, {}, "train must have an image for each of 4 processes in a batch, got 3"),
        (4, 3, {}, "val must have an image for each of 4 processes in a batch, got 3"),
        (8, 4, {"accumulate": 4}, "accumulate must divide the 2 images of a process in a batch, got 4"),
        (4, 4, {"protoverb_weight": 1.0}, "protoverb_weight must be 0 in 4 processes"),
    ],
)
def test_what_processes_cannot_share_is_refused_before_a_folder_is_made(
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    val_size: int,
    changes: dict[str, Any],
    message: str,
) -> None:
    """Validation batches were looked at when the first epoch was trained, and the folder was there."""
    monkeypatch.setattr("vptm.training.fit.join", lambda place: Together())
    model = make_model(backbone)
    train, val = loaders(model)
    parts = DataLoader(train.dataset, batch_size=batch_size), DataLoader(val.dataset, batch_size=val_size)
    with pytest.raises(ValueError, match=message):
        fit(model, *parts, epochs=1, lr=0.1, run_dir=tmp_path / "r", **changes)
    if batch_size < 4:  # of a whole run before its data, which is not there, is looked for
        monkeypatch.setattr("vptm.methods.run.join", lambda place: Together())
        settings = RunSettings.from_options({"data": str(tmp_path / "nowhere"), "batch_size": batch_size}, "beit")
        with pytest.raises(ValueError, match=message.replace("train", "--batch-size", 1)):
            train_run(settings, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_that_the_first_process_refuses_is_refused_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The others would read the data and then say that a process ended, and of a folder that there is none of."""
    (tmp_path / "file").touch()
    told: list[Any] = []

    class Pair(Ranks):
        index, count = rank, 2

        def first(self, value: Any) -> Any:
            told.append(value)
            return ValueError("what the first one said") if rank else value

    monkeypatch.setattr("vptm.methods.run.join", lambda place: Pair())
    settings = RunSettings.from_options({"data": str(tmp_path / "nowhere")}, "beit")
    with pytest.raises(ValueError, match="what the first one said" if rank else "file/run cannot be written"):
        train_run(settings, tmp_path / "file" / "run")
    assert [type(value) for value in told] == [type(None) if rank else ValueError]


class Unlabelled(Dataset[Any]):
    """Carries its labels only inside its items."""

    def __init__(self, labels: list[int]) -> None:
        self.items = labels

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(1, 12, 12), self.items[index]


class Stream(IterableDataset[Any]):
    def __init__(self, labels: list[int]) -> None:
        self.items = labels

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return ((torch.zeros(1, 12, 12), label) for label in self.items)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("label", [3, -1])
def test_labels_out_of_range_are_found_before_training(backbone: Path, tmp_path: Path, part: str, label: int) -> None:
    model = make_model(backbone)
    good = DataLoader(TensorDataset(torch.zeros(4, 1, 12, 12), torch.tensor([0, 1, 2, 0])))
    for bad in (
        DataLoader(TensorDataset(torch.zeros(4, 1, 12, 12), torch.tensor([0, 1, label, 0]))),
        DataLoader(Unlabelled([0, 1, label, 0])),
    ):
        given = {"train": good, "val": good} | {part: bad}
        with pytest.raises(ValueError, match=rf"{part} labels must be in 0\.\.2, got {label} for image 2"):
            fit(model, given["train"], given["val"], epochs=1, lr=0.1, run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_labels_of_a_stream_are_checked_batch_by_batch(backbone: Path) -> None:
    model = make_model(backbone)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2, got 7 for row 1"):
        fit(model, DataLoader(Stream([0, 7]), batch_size=2), epochs=1, lr=0.1, progress=False)
    assert len(fit(model, DataLoader(Stream([0, 1]), batch_size=2), epochs=1, lr=0.1, progress=False).history) == 1


def test_empty_or_unlabelled_data_is_refused(backbone: Path) -> None:
    model = make_model(backbone)
    with pytest.raises(ValueError, match="train must hold at least one batch: 0 images in batches of 1"):
        fit(model, DataLoader(TensorDataset(torch.zeros(0, 1, 12, 12), torch.zeros(0).long())), epochs=1, lr=0.1)
    with pytest.raises(ValueError, match=r"train labels must be \(N,\) integers, got shape .* of float32"):
        fit(model, DataLoader(TensorDataset(torch.zeros(2, 1, 12, 12), torch.zeros(2))), epochs=1, lr=0.1)
    with pytest.raises(TypeError, match="train must be a torch DataLoader, got list"):
        fit(model, [], epochs=1, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have trainable parameters"):
        fit(model.requires_grad_(False), loaders(model)[0], epochs=1, lr=0.1)


class Dicts(Unlabelled):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return {"pixel_values": image, "labels": label}


class Triples(Unlabelled):
    def __getitem__(self, index: int) -> Any:
        return (*super().__getitem__(index), index)


def test_mappings_and_items_with_an_index_are_read(backbone: Path) -> None:
    labels = [0, 1, 2, 0, 1]
    rows, scores = [], []
    for kind in (Unlabelled, Dicts, Triples):
        loader = DataLoader(kind(labels), batch_size=2)
        model = make_model(backbone)
        rows.append(fit(model, loader, loader, epochs=1, lr=0.1, progress=False).history[0])
        scores.append(evaluate(model, loader))
    assert [{**row, "seconds": 0} for row in rows] == [{**rows[0], "seconds": 0}] * 3 and scores == [scores[0]] * 3
    bad = DataLoader(Dicts([0, 1, 3]))
    with pytest.raises(ValueError, match=r"train labels must be in 0\.\.2, got 3 for image 2"):
        fit(make_model(backbone), bad, epochs=1, lr=0.1)


def test_labels_may_be_shares_of_classes(backbone: Path) -> None:
    """As MixUp makes them; the loss is that of the shares, and accuracy counts the largest."""
    model = make_model(backbone)
    images, labels = next(iter(DataLoader(pictures(6).with_transform(transforms(model)), batch_size=6)))
    shares = torch.nn.functional.one_hot(labels, 3) * 0.7 + 0.1

    def collate(items: Any) -> Any:
        chosen = [int(index) for _, index in items]
        return torch.stack([image for image, _ in items]), shares[chosen]

    data = TensorDataset(images, torch.arange(6))
    data.labels = labels.numpy()  # type: ignore[attr-defined]
    row = fit(model, DataLoader(data, batch_size=6, collate_fn=collate), epochs=1, lr=1e-30, progress=False).history[0]
    with torch.no_grad():
        scores = model(images)
    assert row["train_loss"] == pytest.approx(torch.nn.functional.cross_entropy(scores, shares).item(), rel=1e-5)
    assert row["train_accuracy"] == (scores.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("kind", ["timm", "MixUp", "CutMix"])
def test_batches_that_timm_and_torchvision_mix_are_trained_on(backbone: Path, tmp_path: Path, kind: str) -> None:
    """The loss is that of the shares they make. timm's asserts an even number of images: of the first look, too; of an
    odd one the refusal says so and touches no folder."""
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    v2 = pytest.importorskip("torchvision.transforms.v2")
    mix = Mixup(mixup_alpha=0.8, num_classes=3) if kind == "timm" else getattr(v2, kind)(num_classes=3)

    def collate(items: Any) -> Any:
        made.append(mix(*default_collate(items)))
        return made[-1]

    model = make_model(backbone)
    data = pictures(12).with_transform(transforms(model))
    row = fit(model, DataLoader(data, batch_size=4, collate_fn=collate), epochs=1, lr=1e-30, progress=False).history[0]
    images, shares = (torch.cat(parts) for parts in zip(*made[-3:]))
    assert shares.shape == (12, 3) and not torch.isin(shares, torch.tensor([0.0, 1.0])).all(), "nothing was mixed"
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model(images), shares).item()
    assert row["train_loss"] == pytest.approx(wanted, rel=1e-5)
    if kind == "timm":
        one = DataLoader(data, batch_size=1, collate_fn=collate)
        with pytest.raises(TypeError, match="train must give tensors that its collate_fn can batch: Batch size should"):
            fit(model, one, epochs=1, lr=0.1, run_dir=tmp_path / "r")
        assert not (tmp_path / "r").exists()


def test_a_data_set_may_hold_shares_of_classes(backbone: Path, tmp_path: Path) -> None:
    """As those of a teacher, carried or inside the items: their loss, and a run on others is another run. Shares that
    are none would train on, to NaN or to whatever a negative share pulls."""
    model = make_model(backbone)
    images, labels = next(iter(DataLoader(pictures(6).with_transform(transforms(model)), batch_size=6)))
    shares = torch.nn.functional.one_hot(labels, 3) * 0.7 + 0.1
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model.eval()(images), shares).item()

    def loader(values: torch.Tensor, carried: bool = True) -> DataLoader[Any]:
        data: Any = TensorDataset(images, values)
        return DataLoader(data if carried else list(data), batch_size=6)

    options: dict[str, Any] = {"epochs": 1, "lr": 1e-30, "progress": False}
    for data in (loader(shares), loader(shares, False), loader(shares.half()), loader(shares.double())):
        row = fit(make_model(backbone), data, **options).history[0]
        assert row["train_loss"] == pytest.approx(wanted, rel=1e-3)
        assert row["train_accuracy"] == (model(images).argmax(1) == labels).double().mean().item()
    fit(make_model(backbone), loader(shares), run_dir=tmp_path / "r", **options)
    fit(make_model(backbone), loader(shares, False), run_dir=tmp_path / "r", resume=True, **options)
    with pytest.raises(ValueError, match="train labels was"):
        fit(make_model(backbone), loader(shares.flip(1)), run_dir=tmp_path / "r", resume=True, **options)
    nothing, negative = shares.clone(), shares.clone()
    nothing[4] = math.nan
    negative[4] = torch.tensor([1.5, -0.5, 0.0])
    refused: list[tuple[DataLoader[Any], dict[str, Any], str]] = [
        (loader(nothing), {}, "train labels must be shares >= 0 that add up to 1, got nan for image 4"),
        (loader(negative, False), {}, "train labels must be shares >= 0 that add up to 1, got -0.5 for image 4"),
        (loader(negative[4:5].expand(6, 3)), {}, "labels must be shares >= 0 that add up to 1, got -0.5 for row 0"),
        (loader(shares), {"val": loader(shares)}, "val labels must be integers for validation"),
        (
            loader(shares),
            {"protoverb_weight": 1.0},
            "train labels must be integers for validation and ProtoVerb's losses",
        ),
        (loader(shares), {"class_weights": "balanced"}, "class_weights must be numbers for images that are shares"),
    ]
    for data, changes, message in refused:
        with pytest.raises(ValueError, match=message):
            fit(model, data, run_dir=tmp_path / "new", **(options | changes))
    assert not (tmp_path / "new").exists()


def test_what_no_batch_can_be_made_of_touches_no_folder(backbone: Path, tmp_path: Path) -> None:
    """Raw errors of torch, timm and Python, some of them after a good run was replaced."""

    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.zeros(1, 12, 12), 0)])

    images = TensorDataset(torch.zeros(9, 1, 12, 12), torch.arange(9) % 3)
    model = make_model(backbone)

    def shares(items: Any) -> Any:
        return torch.stack([image for image, _ in items]), torch.full((len(items), 5), 0.2)

    cases: list[tuple[Any, type[Exception], str]] = [
        (DataLoader(Endless()), TypeError, "give Endless a __len__, or pass steps_per_epoch$"),
        (DataLoader(images, batch_size=32, drop_last=True), ValueError, "one batch: 9 images in batches of 32"),
        (
            DataLoader(pictures(6), batch_size=3),
            TypeError,
            "train must give tensors that its collate_fn can batch: .*PIL",
        ),
        (DataLoader(TensorDataset(torch.zeros(9, 1, 12, 12))), TypeError, r"must yield .* got list of Tensor$"),
        (DataLoader(images, collate_fn=lambda items: {"x": 1}), TypeError, "got a mapping with x$"),
        (DataLoader(images, collate_fn=shares), ValueError, r"integers or \(B, 3\) shares, got \(1, 5\)"),
    ]
    soft = DataLoader(images, collate_fn=lambda items: (items[0][0][None], torch.full((1, 3), 1 / 3)))
    for options in ({"train": soft, "protoverb_weight": 1.0}, {"train": DataLoader(images), "val": soft}):
        with pytest.raises(ValueError, match=r"labels must be integers for validation and ProtoVerb's losses, got sh"):
            fit(model, epochs=1, lr=0.1, run_dir=tmp_path / "r", **options)  # type: ignore[arg-type]
    for loader, kind, message in cases:
        with pytest.raises(kind, match=message):
            fit(model, loader, epochs=1, lr=0.1, run_dir=tmp_path / "r")
        assert not (tmp_path / "r").exists(), message


def test_labels_are_counted_as_items_give_them(backbone: Path, tmp_path: Path) -> None:
    """Labels read off an attribute and others in the batches: the check passes on the wrong ones, and a resumed run
    is not told apart from one on other labels."""

    class Turned(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            image, label = super().__getitem__(index)
            return image, (label + 1) % 4

    wrong = DataLoader(Turned(torch.zeros(4, 1, 12, 12), torch.tensor([0, 1, 2, 0])))
    with pytest.raises(ValueError, match=r"train labels must be in 0\.\.2, got 3 for image 2"):
        fit(make_model(backbone), wrong, epochs=1, lr=0.1, run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_images_that_do_not_fit_touch_no_run_folder(backbone: Path, tmp_path: Path) -> None:
    """Wrong channels or sizes are refused before a folder is made, or a good run in it is replaced."""
    model = make_model(backbone)
    wrong = DataLoader(TensorDataset(torch.zeros(3, 3, 12, 12), torch.tensor([0, 1, 2])))
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 12, 12\), got \(1, 3, 12, 12\)"):
        fit(model, wrong, epochs=1, lr=0.01, run_dir=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
    train, _ = loaders(model)
    fit(model, train, epochs=1, lr=0.01, run_dir=tmp_path / "good", progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    with pytest.raises(ValueError, match="images must be"):
        fit(model, wrong, epochs=1, lr=0.01, run_dir=tmp_path / "good", overwrite=True, progress=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()} == before


def test_evaluate_names_a_wrong_loader(backbone: Path) -> None:
    with pytest.raises(TypeError, match="loader must be a torch DataLoader, got list"):
        evaluate(make_model(backbone), [1])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(backbone: Path, tmp_path: Path, value: float) -> None:
    """The second epoch reads a poisoned image in its second step."""

    class Poisoned(TensorDataset):
        reads = 0

        def __getitem__(self, index: int) -> Any:
            Poisoned.reads += 1
            image, label = super().__getitem__(index)
            return (image * value if Poisoned.reads == 1 + 4 + 3 else image), label  # one is read before the run starts

    model = make_model(backbone)
    images = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    train = DataLoader(Poisoned(images, torch.tensor([0, 1, 2, 0])), batch_size=2)
    with pytest.raises(FloatingPointError, match=r"loss became (nan|inf) at epoch 2, step 2 with lr"):
        fit(model, train, epochs=3, lr=0.01, run_dir=tmp_path / "r", progress=False)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert len(metrics(tmp_path / "r")) == 1
    assert all(torch.equal(a, b) for a, b in zip(load_adapter(tmp_path / "r").parameters(), model.parameters()))


def test_evaluate_counts_right(backbone: Path) -> None:
    model = make_model(backbone).train()
    images = torch.randn(7, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 0])  # class 2 has no image
    got = evaluate(model, DataLoader(TensorDataset(images, labels), batch_size=3), confusion=True)
    assert model.training, "the mode must be put back"
    with torch.no_grad():
        scores = model.eval()(images).double()
    predicted = scores.argmax(1)
    assert got["n"] == 7 and got["accuracy"] == (predicted == labels).double().mean().item()
    assert got["loss"] == pytest.approx(-scores.log_softmax(1)[torch.arange(7), labels].mean().item(), rel=1e-6)
    assert got["per_class"][2] is None
    assert got["per_class"][0] == (predicted[labels == 0] == 0).double().mean().item()
    expected = [[int(((labels == k) & (predicted == j)).sum()) for j in range(3)] for k in range(3)]
    assert got["confusion"] == expected
    recalls = [expected[k][k] / sum(expected[k]) for k in range(2)]
    assert got["balanced_accuracy"] == pytest.approx(sum(recalls) / 2)
    seen = sorted({*labels.tolist(), *predicted.tolist()})
    sizes = [sum(expected[k]) + sum(row[k] for row in expected) for k in seen]
    assert got["macro_f1"] == pytest.approx(sum(2 * expected[k][k] / n for k, n in zip(seen, sizes)) / len(seen))


def test_evaluate_refuses_what_it_cannot_score(backbone: Path) -> None:
    model = make_model(backbone)
    with pytest.raises(ValueError, match="must yield at least one image"):
        evaluate(model, DataLoader(TensorDataset(torch.zeros(0, 1, 12, 12), torch.zeros(0).long())))
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2, got 3 for row 0"):
        evaluate(model, DataLoader(TensorDataset(torch.zeros(1, 1, 12, 12), torch.tensor([3]))))


def test_steps_are_counted_before_the_first_epoch_ends(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    """Without a terminal too: an epoch of a large model takes minutes on a CPU, and an empty log looks dead."""
    with TrainProgress(True, epochs=2, done=1, steps=63) as shown:
        for _ in range(4):
            clock[0] += 12.0
            shown.step(32, waited=3.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "epoch 2/2  step 1/63  2.67 images/s, 25% waiting for data, 0:12:24 left",
        "epoch 2/2  step 4/63  2.67 images/s, 25% waiting for data, 0:11:48 left",
    ]


def test_progress_goes_to_stderr(backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(make_model(backbone), progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("val loss") == 4 and "epoch 4/4" in printed.err


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the progress reads."""
    now = [1000.0]
    monkeypatch.setattr(vptm.training.progress.time, "perf_counter", lambda: now[0])
    return now


def cast_loaders(model: PromptedBEiT, dtype: torch.dtype) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """12 train and 9 val pictures as tensors of `dtype`."""
    parts = [pictures(12), pictures(9, first=100)]
    sets = []
    for part in parts:
        ready = part.with_transform(transforms(model))
        images = torch.stack([ready[k][0] for k in range(len(ready))]).to(dtype)
        sets.append(TensorDataset(images, torch.from_numpy(part.labels)))
    return DataLoader(sets[0], batch_size=5, shuffle=True), DataLoader(sets[1], batch_size=9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_learn_like_float32(backbone: Path, dtype: torch.dtype) -> None:
    """Adam divides by a zero in fp16: without float32 copies its second step is NaN. The model stays in 16 bits."""
    losses = []
    for kind in (dtype, torch.float32):
        model = make_model(backbone, **LEARNS).to(kind)
        train, val = cast_loaders(model, kind)
        result = fit(model, train, val, epochs=20, lr=0.02, progress=False)
        assert result.best_val_accuracy == 1.0
        assert {parameter.dtype for parameter in model.parameters()} == {kind}
        losses.append(result.history[-1]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_steps_smaller_than_16_bits_resolve_add_up(backbone: Path) -> None:
    """60 steps of 4e-5 on values whose bf16 neighbours are 4.9e-4 apart: each alone is rounded away, and all together
    go beyond the half of that where rounding ends."""
    moved = []
    for kind in (torch.bfloat16, torch.float32):
        model = make_model(backbone, **LEARNS).to(kind)
        with torch.no_grad():
            model.prompts.weight.fill_(0.11)
        before = model.prompts.weight.detach().float().clone()
        train, _ = cast_loaders(model, kind)
        fit(model, train, epochs=20, lr=4e-5, schedule="none", progress=False)
        moved.append((model.prompts.weight.detach().float() - before).abs().mean().item())
    assert moved[0] == pytest.approx(moved[1], rel=0.3) and moved[1] > 2.5e-4


def test_a_16_bit_run_resumes_bitwise(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 copies and the scale of the loss, which starts too high here and falls, are part of the state."""
    monkeypatch.setattr(vptm.training.masters, "_FIRST_SCALE", 2.0**24)
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for stop in stops:
            model = make_model(backbone).half()
            train, val = cast_loaders(model, torch.float16)
            if stop == 2:
                train = DataLoader(Interrupting(train.dataset, 12 * 2 + 3), batch_size=5, shuffle=True)  # type: ignore[arg-type]
            resume = (tmp_path / name).exists()
            fit(model, train, val, epochs=4, lr=0.02, progress=False, run_dir=tmp_path / name, resume=resume)
            if stop == 2:
                state = torch.load(tmp_path / name / STATE_FILE, weights_only=True)
    assert len(metrics(tmp_path / "parts")) == 4
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert all(tensor.dtype == torch.float32 for tensor in state["learned"].values())
    assert 1 < state["scaler"]["scale"] < 2.0**24


def test_an_overflow_in_float16_says_so(backbone: Path) -> None:
    model = make_model(backbone).half()
    images = torch.full((4, 1, 12, 12), 6e4, dtype=torch.float16)
    train = DataLoader(TensorDataset(images, torch.tensor([0, 1, 2, 0])), batch_size=2)
    with pytest.raises(FloatingPointError, match=r"train in bfloat16 or float32, as float16 ends at 65504"):
        fit(model, train, epochs=2, lr=1e-3, progress=False)


def test_a_wrapped_model_trains_as_the_model_in_it(backbone: Path, tmp_path: Path) -> None:
    """A wrapper, as torch.compile's, renames every tensor: prompts would decay, and no adapter could be loaded."""
    for name in ("plain", "wrapped"):
        model = make_model(backbone)
        train, val = loaders(model)
        given: Any = torch.nn.DataParallel(model) if name == "wrapped" else model
        options: dict[str, Any] = {"epochs": 2, "lr": 0.02, "progress": False, "weight_decay": 0.5}
        fit(given, train, val, protoverb_weight=0.5, run_dir=tmp_path / name, **options)
    assert_same_run(tmp_path / "plain", tmp_path / "wrapped")


def test_no_entry_of_the_state_can_be_missing_or_wrong(backbone: Path, tmp_path: Path) -> None:
    """Each is refused by name or by the digest, before the model changes: a resumed run would be another one."""
    stopped_run(make_model(backbone), tmp_path / "good", 3)
    good = torch.load(tmp_path / "good" / STATE_FILE, weights_only=True)

    def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield (*at, key)
            yield from places(value[key], (*at, key))

    every = list(places(good))
    assert len(every) > 90
    chosen = [place for place in every if len(place) == 1] + random.Random(0).sample(every, 12)
    for number, place in enumerate(chosen):
        state = copy.deepcopy(good)
        parent = state
        for key in place[:-1]:
            parent = parent[key]
        if number % 3:
            parent[place[-1]] = None if number % 3 == 1 and parent[place[-1]] is not None else "x"
        else:
            del parent[place[-1]]
        torch.save(state, tmp_path / "good" / STATE_FILE)
        model = make_model(backbone)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"state\.pt .*; use overwrite|must be a training state of ver") as refusal:
            run(model, tmp_path / "good", epochs=3, resume=True)
        assert "\n" not in str(refusal.value)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), place


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "half"])
def test_what_is_no_whole_state_is_named(backbone: Path, tmp_path: Path, content: bytes | None) -> None:
    """In the words of the library, and not those of torch's reader of archives."""
    stopped_run(make_model(backbone), tmp_path / "r", 2)
    path = tmp_path / "r" / STATE_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    with pytest.raises(
        ValueError, match=r"state\.pt must be a training state of vptm, it is cut off or .*; use overwrite$"
    ):
        run(make_model(backbone), tmp_path / "r", epochs=3, resume=True)


def test_a_state_cannot_claim_what_it_does_not_hold(backbone: Path, tmp_path: Path) -> None:
    """A mapping that holds itself, a value repeated to a size that no machine has: refused without following either."""
    stopped_run(make_model(backbone), tmp_path / "r", 2)
    path = tmp_path / "r" / STATE_FILE
    good = torch.load(path, weights_only=True)
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    huge = {"prompts.weight": torch.ones(1).expand(10**13)}
    for entries in ({"identity": loop}, {"learned": good["learned"] | huge}, {"best": good["best"] | huge}):
        torch.save(good | entries, path)
        with pytest.raises(ValueError, match="do not have the digest written with them"):
            run(make_model(backbone), tmp_path / "r", epochs=2, resume=True)
        torch.save(good | entries | {"version": 1}, path)
        with pytest.raises(ValueError, match=r"cannot resume|does not fit the run: prompts.weight must have shape"):
            run(make_model(backbone), tmp_path / "r", epochs=2, resume=True)


def test_a_flipped_bit_of_the_state_is_refused(backbone: Path, tmp_path: Path) -> None:
    stopped_run(make_model(backbone), tmp_path / "r", 2)
    path = tmp_path / "r" / STATE_FILE
    whole = path.read_bytes()
    value = torch.load(path, weights_only=True)["learned"]["prompts.weight"].numpy().tobytes()
    content = bytearray(whole)
    content[whole.index(value) + 5] ^= 4
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"state\.pt must be a whole torch checkpoint, it is damaged: .* in it changed; use overwrite$"
    ):
        run(make_model(backbone), tmp_path / "r", epochs=2, resume=True)


def test_states_of_the_first_version_resume(backbone: Path, tmp_path: Path) -> None:
    """They had no digest, and of a fine-tuned backbone the hash it started with."""
    for name in ("whole", "r"):
        model = make_model(backbone)
        start = model.weight_hash()
        model.unfreeze()
        train, val = loaders(model)
        if name == "r":
            train = DataLoader(Interrupting(train.dataset, 12 + 7), batch_size=5, shuffle=True)  # type: ignore[arg-type]
        fit(model, train, val, epochs=2, lr=1e-3, progress=False, run_dir=tmp_path / name)
    path = tmp_path / "r" / STATE_FILE
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == 1 and state["identity"]["backbone"] != start
    del state["digest"], state["scaler"]
    torch.save(state | {"version": 1, "identity": state["identity"] | {"backbone": start}}, path)
    other = write_backbone(tmp_path / "other.safetensors", seed=9)
    with pytest.raises(ValueError, match="backbone was"):
        fit(
            make_model(other).unfreeze(),
            *loaders(make_model(other)),
            epochs=2,
            lr=1e-3,
            run_dir=tmp_path / "r",
            resume=True,
        )
    model = make_model(backbone)
    model.unfreeze()
    fit(model, *loaders(model), epochs=2, lr=1e-3, progress=False, run_dir=tmp_path / "r", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "r")


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_states_with_a_scalar_temperature_resume_bitwise(backbone: Path, tmp_path: Path, optimizer: str) -> None:
    """As all had it before version 3, in what was learned and in what the optimiser holds for it."""
    run(make_model(backbone), tmp_path / "whole", epochs=3, optimizer=optimizer)
    stopped_run(make_model(backbone), tmp_path / "r", 3, optimizer=optimizer)
    path = tmp_path / "r" / STATE_FILE
    state = {name: value for name, value in read_state(path).items() if name != "version"}
    name = "verbalizer.log_temperature"
    for part in ("learned", "best"):
        state[part][name] = state[part][name].reshape(())
    held = [one for one in state["optimizer"]["state"].values() if any(v.shape == (1,) for v in one.values())]
    assert len(held) == 1
    held[0].update({key: value.reshape(()) for key, value in held[0].items()})
    write_state(path, state)
    run(make_model(backbone), tmp_path / "r", epochs=3, resume=True, optimizer=optimizer)
    assert_same_run(tmp_path / "whole", tmp_path / "r")


class Breaking(Interrupting):
    """Calls `act` when its n-th image is read."""

    act: Any = None

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.reads == self.at:
            type(self).act()
        return self.inner[index]


def test_a_run_folder_that_goes_away_is_named_with_its_file(backbone: Path, tmp_path: Path) -> None:
    """Not FileNotFoundError or ValueError, which say that an argument was wrong."""
    model = make_model(backbone)
    train, val = loaders(model)
    Breaking.act = lambda: shutil.rmtree(tmp_path / "r")
    broken = DataLoader(Breaking(train.dataset, 15), batch_size=5)  # type: ignore[arg-type]
    with pytest.raises(WriteError, match=r"r/state\.pt cannot be written: No such file or directory"):
        fit(model, broken, val, epochs=3, lr=0.02, progress=False, run_dir=tmp_path / "r")


def test_a_full_disk_is_reported_with_the_path(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vptm.weights.files.os, "fsync", full)
    with pytest.raises(WriteError, match=r"r/run\.json cannot be written: No space left on device"):
        run(make_model(backbone), tmp_path / "r")
    with pytest.raises(WriteError, match=r"a/adapter_config\.json cannot be written: No space left on device"):
        save_adapter(make_model(backbone), tmp_path / "a")
    assert not list((tmp_path / "a").iterdir()), "half a file must not stay"
