"""Training and evaluation with plain DataLoaders; a run folder survives a kill at any moment and resumes bitwise."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import random
import shlex
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from vptm import __version__
from vptm.data.datasets import ImageDataset, dataset_labels
from vptm.data.split_list import SPLIT_FILE, SplitList
from vptm.frozen.modes import eval_mode
from vptm.messages import hint, number, one_line, one_of
from vptm.methods.provp import FeatureReformation
from vptm.models.prompted_model import PromptedModel
from vptm.models.verbalizers import PrototypicalVerbalizer, check_finite
from vptm.training.losses import protoverb_loss
from vptm.training.schedules import SCHEDULES, decay_groups, make_schedule
from vptm.weights.adapters import (
    CONFIG_FILE,
    TENSORS_FILE,
    WriteError,
    frozen_part,
    unwrapped,
    write_adapter,
    write_atomically,
)
from vptm.weights.backbones import check_archive, weight_hash

STATE_FILE, METRICS_FILE, CURVES_FILE, RUN_FILE = "state.pt", "metrics.csv", "curves.png", "run.json"
RUN_FILES = (TENSORS_FILE, CONFIG_FILE, STATE_FILE, METRICS_FILE, CURVES_FILE, RUN_FILE, SPLIT_FILE)
METRICS = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds")
_STATE_VERSION = 2  # 1 had neither scaler nor digest
_STATE_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "identity": dict,
    "epoch": int,
    "learned": dict,
    "optimizer": dict,
    "best": dict,
    "best_epoch": int,
    "best_score": (list, type(None)),
    "history": list,
}
_STEPS_PER_CHECK = 50
_FIRST_SCALE = 1024.0  # of fp16 losses; a mean over a batch needs less than torch's 65536, which costs the first steps


@dataclass
class FitResult:
    """What `fit` did. The model holds the state of `best_epoch` (0: as it was given) when `fit` returns.

    `history` has one mapping per finished epoch with the columns of `metrics.csv`; accuracies are shares in 0..1.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_val_accuracy: float | None = None
    interrupted: bool = False
    run_dir: Path | None = None


def fit(
    model: PromptedModel,
    train: DataLoader[Any],
    val: DataLoader[Any] | None = None,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    warmup_epochs: int = 0,
    label_smoothing: float = 0.0,
    protoverb_weight: float = 0.0,
    reformation: float = 0.0,
    reformation_temperature: float = 1.0,
    cache_frozen: bool = False,
    prompt_weight_decay: float | None = None,
    head_weight_decay: float | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    info: Mapping[str, Any] | None = None,
    images: SplitList | None = None,
) -> FitResult:
    """Train what `model` leaves unfrozen by cross-entropy and keep the epoch that is best on `val`.

    Best is the highest validation accuracy, then the lowest validation loss, then the earliest; without `val` it is the
    last epoch. Optimiser and per-step learning-rate schedule (from `lr` to 0) come from timm, with
    `model.no_weight_decay()` respected.

    Learned tensors in float16 or bfloat16 are trained as float32 copies, from which the model's own are rounded after
    every step: in 16 bits Adam divides by a zero and small steps are lost. With float16 the loss is scaled
    (`torch.amp.GradScaler`), so that small gradients are not lost either.

    torch's, numpy's and Python's global generators, and those of the loaders, are seeded from (seed, epoch) at the
    start of every epoch and put back at the end, so a resumed run equals an uninterrupted one bitwise on one machine.
    Loaders with `persistent_workers=True` keep generators of their own and do not have this property.

    Args:
        model: see `vptm.PromptedBEiT`, or one inside `torch.compile`; trained in place.
        train, val: yield (images (B, C, H, W) float, labels (B,) integers in 0..K-1).
        epochs: number of passes over `train`.
        lr: peak learning rate.
        weight_decay: for matrices; vectors and `no_weight_decay()` have none.
        optimizer: a timm optimiser name.
        schedule: "cosine", "tanh", "none", or a published one: "vpt", "spt", "provp", see
            `vptm.training.schedules.published_rate`.
        warmup_epochs: part of `epochs`; linear from 1 % of `lr` unless a published schedule says otherwise.
        label_smoothing: of the cross-entropy, in [0, 1).
        protoverb_weight: of `vptm.training.losses.protoverb_loss` of a batch, added to its cross-entropy (and to the
            reported train loss); needs the prototypical verbalizer. `vptm.fit_prototypes` trains by it alone, later.
        reformation: lambda of ProVP-Ref's contrast with the features of the frozen model, see
            `vptm.methods.provp.FeatureReformation`, added to the cross-entropy; 1 in the published code.
        reformation_temperature: of that contrast.
        cache_frozen: compute the frozen features of an image once; for training without augmentation.
        prompt_weight_decay: of prompts, None for none.
        head_weight_decay: of the verbalizer's matrices, None for `weight_decay`.
        run_dir: folder for the adapter, `metrics.csv`, `curves.png`, `run.json`, `split.csv` and the state to resume
            from; every file is replaced by a rename at the end of an epoch. None writes nothing.
        resume: continue the run in `run_dir`; every argument that changes the result must be as it was.
        overwrite: replace the run in `run_dir`; files of other names stay.
        seed: of data order, augmentation and dropout.
        device: where to train; None stays on the model's device.
        progress: a progress bar and a line per epoch on stderr.
        info: JSON-able facts to add to `run.json`.
        images: what the run is trained, validated and tested on, kept in `split.csv`; a run that is resumed must have
            been started on the same. None lists those of `train` and `val`, where they are `ImageDataset`s.

    Returns:
        A `FitResult`; after Ctrl-C it has `interrupted=True` and the run folder is complete and can be resumed.

    Raises:
        ValueError: an argument out of range, labels outside 0..K-1, an existing run folder, nothing to resume, a state
            that is damaged, or a folder that cannot be written; all before anything is trained.
        WriteError: an OSError that names the file of the run folder that could not be written on the way.
        FloatingPointError: the loss became NaN or infinite; the run folder keeps the best epoch before.

    Example:
        >>> model = PromptedBEiT("builtin", num_classes=10)
        >>> images = torch.utils.data.TensorDataset(torch.randn(20, 1, 28, 28), torch.arange(20) % 10)
        >>> fit(model, DataLoader(images, batch_size=10, shuffle=True), epochs=1, lr=1e-3, progress=False).best_epoch
        1
    """
    _check_arguments(train, val, epochs, lr, weight_decay, optimizer, schedule, warmup_epochs, label_smoothing)
    forward, model = model, unwrapped(model)
    if not 0 <= number("protoverb_weight", protoverb_weight) < float("inf"):
        raise ValueError(f"protoverb_weight must be finite and >= 0, got {protoverb_weight!r}")
    if protoverb_weight and not isinstance(model.verbalizer, PrototypicalVerbalizer):
        raise ValueError(f"protoverb_weight needs verbalizer='prototypical', got {type(model.verbalizer).__name__}")
    if device is not None:
        model.to(device)
    parameters = list(model.trainable_parameters())
    if not parameters:
        raise ValueError("model must have trainable parameters, all of them are frozen")
    reform = (
        FeatureReformation(model, weight=reformation, temperature=reformation_temperature, cache=cache_frozen)
        if reformation
        else None
    )
    check_finite(model)
    labels = _check_labels(train, model.num_classes, "train", _check_sample(model, train))
    if val is not None:
        _check_labels(val, model.num_classes, "val", _check_sample(model, val))
    settings = {
        "epochs": epochs,
        "lr": lr,
        "weight_decay": weight_decay,
        "optimizer": optimizer,
        "schedule": schedule,
        "warmup_epochs": warmup_epochs,
        "label_smoothing": label_smoothing,
        "prompt_weight_decay": prompt_weight_decay,
        "head_weight_decay": head_weight_decay,
        "protoverb_weight": protoverb_weight,
        "reformation": reformation,
        "reformation_temperature": reformation_temperature,
        "seed": seed,
    }
    identity = {
        **settings,
        **{f"model.{name}": value for name, value in model.config.items()},
        "backbone": model.weight_hash(),
        "batches": len(train),
        "batch_size": train.batch_size or 0,
        "train labels": hashlib.sha256(labels.tobytes()).hexdigest() if labels is not None else "unknown",
    }
    masters = _Masters(model)
    groups = decay_groups(model, weight_decay, prompts=prompt_weight_decay, head=head_weight_decay)
    for group in groups:
        group["params"] = [masters.of(parameter) for parameter in group["params"]]
    optimiser = create_optimizer_v2(groups, opt=optimizer, lr=lr, weight_decay=weight_decay)
    scheduler = make_schedule(schedule, optimiser, lr=lr, epochs=epochs, warmup_epochs=warmup_epochs, steps=len(train))

    folder = None if run_dir is None else Path(run_dir)
    state = None
    if folder is None:
        if resume:
            raise ValueError("resume=True needs run_dir, the folder of the run to continue")
    else:
        if images is None:
            images = _listed(train, val)
        state = prepare_run_folder(folder, resume=resume, overwrite=overwrite)
        if state is not None:
            expected = identity if state["version"] > 1 else {**identity, "backbone": _first_hash(model)}
            _check_identity(state["identity"], expected, folder)
            _check_images(images, folder)
    run = _Run(model, masters, optimiser, identity, folder)
    if state is not None:
        try:
            run.restore(state)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            what = one_line(error, 200)
            raise ValueError(f"{run.path(STATE_FILE)} does not fit the run: {what}; use overwrite") from error
    elif folder is not None:
        _write_run_file(folder, {**_environment(), "seed": seed, "arguments": settings, **(info or {})})
        if images is not None:
            images.write(folder)
        run.write()

    result = FitResult(run_dir=folder)
    if progress:
        trained = sum(parameter.numel() for parameter in parameters)
        total = sum(parameter.numel() for parameter in model.parameters())
        place = next(model.parameters()).device
        print(
            f"training {trained:,} of {total:,} parameters, {model.num_classes} classes, "
            f"{len(train)} batches an epoch, on {place}{masters.note()}",
            file=sys.stderr,
            flush=True,
        )
    with generators_kept(train, val), _Progress(progress, epochs, run.epoch, len(train)) as bar:
        try:
            for epoch in range(run.epoch + 1, epochs + 1):
                started = time.perf_counter()
                seed_everything(seed, epoch, train, val)
                train_loss, train_accuracy = _train_epoch(
                    forward, train, optimiser, masters, scheduler, label_smoothing, protoverb_weight, reform, epoch, bar
                )
                scores = None if val is None else evaluate(forward, val)
                run.finish_epoch(
                    {
                        "epoch": epoch,
                        "lr": optimiser.param_groups[0]["lr"],
                        "train_loss": train_loss,
                        "train_accuracy": train_accuracy,
                        "val_loss": None if scores is None else scores["loss"],
                        "val_accuracy": None if scores is None else scores["accuracy"],
                        "seconds": round(time.perf_counter() - started, 3),
                    }
                )
                bar.epoch(run.history[-1])
        except KeyboardInterrupt:
            result.interrupted = True
            run.catch_up()
        except FloatingPointError:
            model.load_learned_state_dict(run.best_state)
            raise
    model.load_learned_state_dict(run.best_state)
    model.eval()
    if folder is not None and run.history:
        plot_curves(run.history, folder / CURVES_FILE)
    result.history, result.best_epoch = run.history, run.best_epoch
    result.best_val_accuracy = run.best_score[0] if run.best_score is not None else None
    return result


@torch.no_grad()
def evaluate(
    model: PromptedModel, loader: DataLoader[Any], *, device: str | torch.device | None = None, confusion: bool = False
) -> dict[str, Any]:
    """Accuracy and mean cross-entropy of `model` on `loader`, in eval mode; the model's mode is put back.

    Args:
        model: gives (B, K) scores.
        loader: yields (images, labels); labels in 0..K-1.
        device: where to run; None stays on the model's device.
        confusion: also return the counts (K, K), row = label, column = prediction.

    Returns:
        `accuracy` (share in 0..1), `loss`, `n`, `per_class` (K shares, None for a class without images) and, when
        asked for, `confusion` as nested lists.

    Raises:
        ValueError: no images, or a label outside 0..K-1.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader must be a torch DataLoader, got {type(loader).__name__}")
    if device is not None:
        model.to(device)
    forward, model = model, unwrapped(model)
    place = next(model.parameters()).device
    classes = model.num_classes
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    total = torch.zeros((), dtype=torch.float64)
    with eval_mode(model):
        # what was compiled runs compiled
        seals = isinstance(model, PromptedModel) and "_orig_mod" not in forward._modules
        runs = model.sealed_twin() if seals else forward
        for images, labels in loader:
            _check_batch_labels(labels, classes)
            scores = runs(images.to(place)).float().cpu()
            if scores.shape[1] != classes:
                raise ValueError(f"model must give a score for each of its {classes} classes, got {scores.shape[1]}")
            labels = labels.cpu().long()
            total += F.cross_entropy(scores, labels, reduction="sum").double()
            counts += torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2).view(classes, classes)
    n = int(counts.sum())
    if n == 0:
        raise ValueError("loader must yield at least one image, it is empty")
    per_class = [int(row[k]) / int(row.sum()) if int(row.sum()) else None for k, row in enumerate(counts)]
    result = {"accuracy": int(counts.trace()) / n, "loss": float(total) / n, "n": n, "per_class": per_class}
    if confusion:
        result["confusion"] = counts.tolist()
    return result


class _Masters:
    """float32 copies of the learned tensors that are kept in 16 bits, which the optimiser steps in their place."""

    def __init__(self, model: PromptedModel) -> None:
        self.model = model
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.copies = {
            parameter: parameter.detach().float()
            for parameter in self.names
            if parameter.dtype in (torch.float16, torch.bfloat16)
        }
        scaled = any(parameter.dtype == torch.float16 for parameter in self.copies)
        place = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(place, init_scale=_FIRST_SCALE, enabled=scaled)

    def of(self, parameter: torch.nn.Parameter) -> Tensor:
        """What the optimiser steps for `parameter`."""
        return self.copies.get(parameter, parameter)

    def step(self, loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
        """Gradients of `loss`, a step of the optimiser, and its outcome in the model."""
        optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        for parameter, copy in self.copies.items():
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.scaler.step(optimiser)
        self.scaler.update()
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, copy in self.copies.items():
            parameter.copy_(copy)

    def learned(self) -> dict[str, Tensor]:
        """`model.learned_state_dict()` with the copies in place of what they were rounded to."""
        return self.model.learned_state_dict() | {self.names[p]: copy for p, copy in self.copies.items()}

    @torch.no_grad()
    def load(self, learned: Mapping[str, Tensor]) -> None:
        """Put back what `learned` gave."""
        self.model.load_learned_state_dict(learned)
        for parameter, copy in self.copies.items():
            copy.copy_(learned[self.names[parameter]])

    def note(self) -> str:
        """What is said of it before training."""
        kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in self.copies})
        return f", learned tensors are {' and '.join(kinds)} and trained as float32 copies" if kinds else ""


def _train_epoch(
    forward: PromptedModel,
    loader: DataLoader[Any],
    optimiser: torch.optim.Optimizer,
    masters: _Masters,
    scheduler: Any,
    label_smoothing: float,
    protoverb_weight: float,
    reform: FeatureReformation | None,
    epoch: int,
    bar: _Progress,
) -> tuple[float, float]:
    model = masters.model
    place = next(model.parameters()).device
    model.train()
    losses: list[Tensor] = []
    correct = torch.zeros((), dtype=torch.int64, device=place)
    summed, seen = 0.0, 0
    weights: list[int] = []
    for step, (images, labels) in enumerate(loader):
        _check_batch_labels(labels, model.num_classes)
        images, labels = images.to(place), labels.to(place).long()
        if scheduler is not None:
            scheduler.step_update((epoch - 1) * len(loader) + step)
        scores, contrast = _scores_and_contrast(forward, images, labels, protoverb_weight, reform)
        loss = F.cross_entropy(scores, labels, label_smoothing=label_smoothing)
        if contrast is not None:
            loss = loss + contrast
        masters.step(loss, optimiser)
        losses.append(loss.detach())
        weights.append(len(labels))
        correct += (scores.detach().argmax(1) == labels).sum()
        bar.step()
        if len(losses) == _STEPS_PER_CHECK or step + 1 == len(loader):
            # one transfer for many steps: reading every loss would stall a GPU
            values = torch.stack(losses).double().cpu()
            if not torch.isfinite(values).all():
                first = int((~torch.isfinite(values)).nonzero()[0])
                half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
                narrow = "train in bfloat16 or float32, as float16 ends at 65504, " if half else ""
                raise FloatingPointError(
                    f"loss became {values[first].item()} at epoch {epoch}, step {step + 2 - len(losses) + first} with "
                    f"lr {optimiser.param_groups[0]['lr']:.3g}: {narrow}use a lower lr or look for extreme pixel values"
                )
            summed += float((values * torch.tensor(weights, dtype=torch.float64)).sum())
            seen += sum(weights)
            losses, weights = [], []
    if seen == 0:
        raise ValueError("train must yield at least one batch, it is empty")
    return summed / seen, int(correct) / seen


def _scores_and_contrast(
    forward: PromptedModel,
    images: Tensor,
    labels: Tensor,
    protoverb_weight: float,
    reform: FeatureReformation | None,
) -> tuple[Tensor, Tensor | None]:
    if not protoverb_weight and reform is None:
        return forward(images), None
    model = unwrapped(forward)  # a wrapper's forward gives scores alone
    hidden, held = (model.forward_hidden(images), None) if reform is None else reform(images)
    if not protoverb_weight:
        return model._scores(hidden), held
    verbalizer: Any = model.verbalizer
    embedding = verbalizer.embed(hidden, model.lm_head)
    contrast = protoverb_weight * protoverb_loss(embedding, verbalizer.prototypes, labels)
    return verbalizer.compare(embedding) / verbalizer.temperature, contrast if held is None else contrast + held


class _Run:
    """Progress of one training run, in memory and in its folder."""

    def __init__(
        self,
        model: PromptedModel,
        masters: _Masters,
        optimiser: torch.optim.Optimizer,
        identity: dict[str, Any],
        folder: Path | None,
    ) -> None:
        self.model, self.masters, self.optimiser = model, masters, optimiser
        self.identity, self.folder = identity, folder
        self.frozen = None if folder is None else frozen_part(model)
        self.epoch = self.written = self.best_epoch = 0
        self.best_score: tuple[float, float] | None = None
        self.best_state = self._learned()
        self.history: list[dict[str, Any]] = []

    def _learned(self) -> dict[str, Tensor]:
        return {name: tensor.cpu().clone() for name, tensor in self.model.learned_state_dict().items()}

    def path(self, name: str) -> Path:
        """A file of the run folder."""
        assert self.folder is not None
        return self.folder / name

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_learned_state_dict(state["best"])  # first, as it is refused where it does not fit
        self.masters.load(state["learned"])
        self.optimiser.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.masters.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        self.best_score = None if state["best_score"] is None else tuple(state["best_score"])
        self.best_state, self.history = state["best"], state["history"]
        self._write_files()

    def finish_epoch(self, row: dict[str, Any]) -> None:
        score = None if row["val_accuracy"] is None else (row["val_accuracy"], -row["val_loss"])
        if score is None or self.best_score is None or score > self.best_score:
            self.best_epoch, self.best_score, self.best_state = row["epoch"], score, self._learned()
        self.epoch, self.history = row["epoch"], [*self.history, row]
        self.write()

    def catch_up(self) -> None:
        """Write an epoch that was finished when Ctrl-C came, and was not yet on disk."""
        if self.epoch > self.written:
            self.write()

    def write(self) -> None:
        """The state first: the other files follow from it, and a resume writes them again."""
        if self.folder is None:
            return
        state = {
            "version": _STATE_VERSION,
            "identity": self.identity,
            "epoch": self.epoch,
            "learned": {name: tensor.cpu() for name, tensor in self.masters.learned().items()},
            "optimizer": self.optimiser.state_dict(),
            "scaler": self.masters.scaler.state_dict(),
            "best": self.best_state,
            "best_epoch": self.best_epoch,
            "best_score": None if self.best_score is None else list(self.best_score),
            "history": self.history,
        }
        buffer = io.BytesIO()
        torch.save({**state, "digest": _digest(state)}, buffer)
        write_atomically(self.folder / STATE_FILE, buffer.getvalue())
        self._write_files()
        self.written = self.epoch

    def _write_files(self) -> None:
        assert self.folder is not None
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_atomically(self.folder / METRICS_FILE, text.getvalue().encode())
        if self.epoch in (0, self.best_epoch) or not (self.folder / TENSORS_FILE).is_file():
            self._save_best()

    def _save_best(self) -> None:
        assert self.folder is not None and self.frozen is not None
        current = {name: tensor.clone() for name, tensor in self.masters.learned().items()}
        self.model.load_learned_state_dict(self.best_state)
        try:
            extra = {"epoch": self.best_epoch, "val_accuracy": None if self.best_score is None else self.best_score[0]}
            write_adapter(self.model, self.folder, self.frozen, extra)
        finally:
            self.masters.load(current)


def prepare_run_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Make `folder` ready for a run and return the state to resume from, or None for a fresh run.

    Raises:
        ValueError: it holds files and neither `resume` nor `overwrite` was given, both were, there is nothing to
            resume, its state is damaged, or it cannot be written. Nothing is deleted then.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other, both were given")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run folder must be a folder, {folder} is a file")
    leftovers: list[Path] = []
    others: list[Path] = []
    if folder.is_dir():
        for path in folder.iterdir():
            (leftovers if path.name.startswith(".") and path.suffix == ".tmp" else others).append(path)
    state = None
    if resume:
        if not (folder / RUN_FILE).is_file():
            raise ValueError(f"nothing to resume: {folder} has no {RUN_FILE}")
        # a kill before the first state was written leaves run.json alone: the run starts again
        if (folder / STATE_FILE).is_file():
            state = _read_state(folder / STATE_FILE)
    elif others and not overwrite:
        raise ValueError(f"run folder {folder} exists and is not empty: pass resume, overwrite or another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe.tmp"
        probe.touch()
        probe.unlink()
        for path in leftovers:
            path.unlink(missing_ok=True)
        if overwrite:
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"run folder {folder} cannot be written: {error.strerror}") from None
    return state


def _read_state(path: Path) -> dict[str, Any]:
    try:
        check_archive(path, str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives, foreign files and pickled code raise many kinds
        raise ValueError(f"{path} is not a training state of vptm: {type(error).__name__}; use overwrite") from None
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int or not 1 <= version <= _STATE_VERSION:
        raise ValueError(
            f"{path} must be a training state of version 1 to {_STATE_VERSION}, use overwrite to start again"
        )
    for name, kind in _STATE_ENTRIES.items():
        if name not in state or not isinstance(state[name], kind) or isinstance(state[name], bool):
            found = type(state[name]).__name__ if name in state else "none"
            raise ValueError(f"{path} must have the entry {name!r} of a training state, got {found}; use overwrite")
    if version > 1:
        digest = state.pop("digest", None)
        try:
            same = digest == _digest(state)
        except (RuntimeError, MemoryError):  # a mapping that holds itself, a tensor of a claimed size: more than fits
            same = False
        if not same:
            raise ValueError(f"{path} is damaged: its entries do not have the digest written with them; use overwrite")
    if not len(state["history"]) == state["epoch"] >= state["best_epoch"] >= 0:
        raise ValueError(f"{path} is damaged: its epochs do not agree; use overwrite")
    return state


def _digest(value: Any) -> str:
    """Of nested mappings, sequences, tensors and plain values: keys, order, types and bytes."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        digest.update(f"{type(part).__name__} ".encode())
        if isinstance(part, Mapping):
            for key, item in part.items():
                add(key)
                add(item)
        elif isinstance(part, list | tuple):
            for item in part:
                add(item)
        elif isinstance(part, Tensor):
            if part.numel() * part.element_size() > part.untyped_storage().nbytes():
                part = part.as_strided((part.untyped_storage().nbytes() // part.element_size(),), (1,), 0)
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{part.dtype} {tuple(part.shape)} {zlib.crc32(flat.numpy().data)}".encode())
        else:
            digest.update(repr(part).encode(errors="surrogatepass"))
        digest.update(b";")

    add(value)
    return digest.hexdigest()


def _first_hash(model: PromptedModel) -> str:
    """The hash that the first version of the state kept of a backbone, whether it trained or not."""
    state = model.state_dict()
    return weight_hash({name: tensor for name, tensor in state.items() if not model._comes_from_no_source(name)})


def _check_identity(stored: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    for name, value in given.items():
        if stored.get(name) != value:
            raise ValueError(f"cannot resume {folder}: {name} was {stored.get(name)!r}, now {value!r}")


def _listed(train: DataLoader[Any], val: DataLoader[Any] | None) -> SplitList | None:
    datasets = {"train": train.dataset, "val": None if val is None else val.dataset}
    parts = {split: dataset for split, dataset in datasets.items() if isinstance(dataset, ImageDataset)}
    return SplitList.of(parts) if parts else None


def _check_images(images: SplitList | None, folder: Path) -> None:
    stored = SplitList.read(folder)
    if images is not None and stored is not None and (other := stored.difference(images)):
        raise ValueError(f"cannot resume {folder}: {other}")


def update_run_file(folder: Path, **facts: Any) -> None:
    """Add facts, such as the test result, to a run's `run.json`."""
    try:
        stored = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise WriteError(f"{folder / RUN_FILE} cannot be written, the run folder is gone: {error.strerror}") from error
    _write_run_file(folder, {**stored, **facts})


def _write_run_file(folder: Path, content: dict[str, Any]) -> None:
    write_atomically(folder / RUN_FILE, (json.dumps(content, indent=2) + "\n").encode())


def peak_memory(device: torch.device) -> int:
    """Bytes this process held at most: allocated by torch on a GPU, resident on a CPU (0 where the system says
    nothing)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def package_versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None where a package is not installed."""
    found: dict[str, str | None] = {"vptm": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "timm", "numpy", "safetensors", "scikit-learn", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _environment() -> dict[str, Any]:
    return {"command": shlex.join(sys.argv), "versions": package_versions(), "platform": platform.platform()}


def _check_arguments(
    train: Any,
    val: Any,
    epochs: int,
    lr: float,
    weight_decay: float,
    optimizer: str,
    schedule: str,
    warmup_epochs: int,
    label_smoothing: float,
) -> None:
    for name, loader in (("train", train), ("val", val)):
        if not isinstance(loader, DataLoader) and not (name == "val" and loader is None):
            raise TypeError(f"{name} must be a torch DataLoader, got {type(loader).__name__}")
    for name, value in (("epochs", epochs), ("warmup_epochs", warmup_epochs)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if epochs < 1:
        raise ValueError(f"epochs must be >= 1, got {epochs}")
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warmup_epochs must be >= 0 and < epochs={epochs}, got {warmup_epochs}")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr must be finite and > 0, got {lr}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be finite and >= 0, got {weight_decay}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    one_of("schedule", schedule, SCHEDULES)
    known = [str(name) for name in list_optimizers()]
    if optimizer not in known:
        raise ValueError(
            f"optimizer must be one of timm.optim.list_optimizers(), got {optimizer!r}{hint(optimizer, known)}"
        )


def _check_sample(model: PromptedModel, loader: DataLoader[Any]) -> Any:
    """Refuse images the model does not take before a run folder is touched; streams are seen when they are read.

    Gives the first item's label, None of a stream.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or len(dataset) == 0:
        return None
    with generators_kept(loader, None):  # reading an image may draw augmentation
        item = dataset[0]
    if isinstance(item[0], Tensor):
        model.check_images(item[0][None])
    return item[1]


def _check_labels(loader: DataLoader[Any], classes: int, name: str, first: Any) -> np.ndarray | None:
    """Labels of the loader's data set, checked; a data set that does not carry them is read once. None: a stream."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        return None
    if isinstance(dataset, ImageDataset) and len(dataset.classes) != classes:
        raise ValueError(f"{name} images must have the model's {classes} classes, got {len(dataset.classes)}")
    labels = dataset_labels(dataset)
    if labels is None or (len(labels) and not np.array_equal(labels[0], np.asarray(first))):
        with generators_kept(loader, None):
            labels = _read_labels(dataset, name)
    if len(labels) == 0:
        raise ValueError(f"{name} must hold at least one image, it is empty")
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise ValueError(f"{name} labels must be in 0..{classes - 1}, got {labels[bad[0]]} at index {bad[0]}")
    return labels.astype(np.int64)


def _read_labels(dataset: Any, name: str) -> np.ndarray:
    """The label of every item, which decodes every image."""
    labels = []
    for index in range(len(dataset)):
        label = np.asarray(dataset[index][1])
        if label.ndim or label.dtype.kind not in "iub":
            raise ValueError(
                f"{name} labels must be (N,) integers, got shape {label.shape} of {label.dtype} at index {index}"
            )
        labels.append(int(label))
    return np.array(labels, dtype=np.int64)


def _check_batch_labels(labels: Tensor, classes: int) -> None:
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        bad = int(((labels < 0) | (labels >= classes)).nonzero()[0])
        raise ValueError(f"labels must be in 0..{classes - 1}, got {int(labels[bad])} at row {bad} of a batch")


def _loader_generators(*loaders: DataLoader[Any] | None) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for loader in loaders:
        for owner in (loader, getattr(loader, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if generator is not None and all(generator is not other for other in found):
                found.append(generator)
    return found


def seed_everything(seed: int, epoch: int, train: DataLoader[Any], val: DataLoader[Any] | None) -> None:
    """Seed torch's, numpy's and Python's global generators, and those of the loaders, from (seed, epoch)."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    for generator in _loader_generators(train, val):
        generator.manual_seed(mixed)
    if hasattr(train.sampler, "set_epoch"):
        train.sampler.set_epoch(epoch)


@contextmanager
def generators_kept(train: DataLoader[Any], val: DataLoader[Any] | None) -> Iterator[None]:
    """Put every generator that `seed_everything` seeds back as it was."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    own = [(generator, generator.get_state()) for generator in _loader_generators(train, val)]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for generator, state in own:
            generator.set_state(state)


class _Progress:
    """A bar with the time left and one line per epoch, on stderr."""

    def __init__(self, shown: bool, epochs: int, done: int, steps: int) -> None:
        self.shown, self.epochs = shown, epochs
        if shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(stderr=True, highlight=False, soft_wrap=True)
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps, left"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            self.task = self.bar.add_task("training", total=epochs * steps, completed=done * steps)

    def __enter__(self) -> _Progress:
        if self.shown:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.bar.stop()

    def step(self) -> None:
        if self.shown:
            self.bar.advance(self.task)

    def epoch(self, row: dict[str, Any]) -> None:
        if not self.shown:
            return
        val = "" if row["val_accuracy"] is None else f"  val loss {row['val_loss']:.4f} acc {row['val_accuracy']:.1%}"
        width = len(str(self.epochs))
        self.bar.console.print(
            f"epoch {row['epoch']:{width}d}/{self.epochs}  train loss {row['train_loss']:.4f} "
            f"acc {row['train_accuracy']:.1%}{val}  {row['seconds']:.1f} s"
        )


def plot_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy by epoch, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    epochs = [row["epoch"] for row in history]
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        for part, colour in (("train", "#1f6f8b"), ("val", "#c8553d")):
            values = [row[f"{part}_{quantity}"] for row in history]
            if values[-1] is not None:
                axes.plot(
                    epochs, values, color=colour, marker="o" if len(epochs) < 30 else "", markersize=3, label=part
                )
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if quantity == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(0, 1)
        else:
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    canvas.print_figure(buffer, dpi=130, format="png")
    write_atomically(path, buffer.getvalue())
