"""Whether reading pictures or computing on them limits how fast a run trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vptm.methods.run import checked_place, opened
from vptm.models.prompted_model import PromptedModel
from vptm.settings import RunSettings
from vptm.training.callbacks import Callback
from vptm.training.checks import NEED_VALIDATION
from vptm.training.fit import fit
from vptm.training.precision import dtype_of, resolve_precision
from vptm.training.progress import Pace
from vptm.training.ranks import join

_MUCH = 0.05  # of the speed: less is neither felt nor measured well


@dataclass(frozen=True)
class Feeding:
    """Training speed with the pictures of a run and with synthetic ones that lie in memory, and how many pictures a
    second are read where nothing computes."""

    real: Pace
    synthetic: Pace
    reading: float

    @property
    def lost(self) -> float:
        """The share of the speed that reading pictures costs, 0 where it costs nothing."""
        return max(0.0, 1.0 - self.real.images_per_second / self.synthetic.images_per_second)

    def lines(self) -> list[str]:
        """What was measured, and what it says."""
        if self.lost < _MUCH:
            limit = f"the step: reading pictures costs {self.lost:.0%} of its speed"
        else:
            limit = f"reading pictures, which costs {self.lost:.0%} of the speed: try more --workers"
        return [
            f"real pictures       {self.real.images_per_second:.4g} images/s, {self.real.waiting:.0%} waiting for data",
            f"synthetic pictures  {self.synthetic.images_per_second:.4g} images/s",
            f"reading alone       {self.reading:.4g} images/s",
            f"limit               {limit}",
        ]


def measure_feeding(settings: RunSettings, *, seconds: float = 20.0, report: Callable[[str], None] = print) -> Feeding:
    """Train as `settings` say for some seconds on their pictures, and on synthetic ones; nothing is kept or written.

    Both are steps of the same loop, `vptm.fit`, without validation; the first two, in which things are made ready, do
    not count.

    Args:
        settings: of the run, as `vptm.methods.run.train_run` takes them.
        seconds: of each of the two; fewer where the run's epochs are done before.
        report: called with lines on what is used.

    Raises:
        ValueError: what `train_run` refuses, several processes, or a run of fewer than four steps.

    Example:
        >>> settings = RunSettings.from_options({"shots": "2", "batch_size": 4, "epochs": 2}, "beit")
        >>> measure_feeding(settings, seconds=0.2, report=lambda line: None).synthetic.waiting < 0.5
        True
    """
    place = checked_place(settings)
    if (count := join(place).count) > 1:
        raise ValueError(f"--synthetic measures one process, got {count}")
    run = opened(settings, place, report=report)
    train, model = run.loaders["train"], run.model.to(place)
    if (steps := len(train) * settings.train_settings.epochs) < _Clock.least:
        raise ValueError(f"--synthetic needs {_Clock.least} steps of training to measure, got {steps} in all epochs")
    reading = _reading(train, seconds)
    kind = resolve_precision(settings.train_settings.precision, place, training=True)
    made = synthetic(train, model, dtype_of(kind) or next(model.parameters()).dtype, place)
    real, synthesised = (_pace(model, loader, settings, seconds, place) for loader in (train, made))
    return Feeding(real, synthesised, reading)


class _Clock(Callback):
    """Ends a run after some seconds, when what was started has been computed."""

    least = 4

    def __init__(self, seconds: float) -> None:
        self.seconds, self._steps = seconds, 0
        self._started = time.perf_counter()

    def step(self, number: int, loss: Tensor, lr: float) -> None:
        self._steps += 1
        if self._steps >= self.least and time.perf_counter() - self._started >= self.seconds:
            loss.item()  # waits for a GPU
            raise KeyboardInterrupt


def _pace(
    model: PromptedModel, train: DataLoader[Any], settings: RunSettings, seconds: float, place: torch.device
) -> Pace:
    options = replace(settings.train_settings, **NEED_VALIDATION).keywords()
    result = fit(
        model,
        train,
        **options,
        cache_frozen=not settings.augment,
        device=place,
        progress=False,
        callbacks=[_Clock(seconds)],
    )
    assert result.pace is not None
    return result.pace


def _reading(train: DataLoader[Any], seconds: float) -> float:
    """Images a second that are read, after the first batch."""
    count, started = 0, 0.0
    while not started or time.perf_counter() - started < seconds / 4:
        for batch in train:
            count += len(batch[1]) if started else 0
            started = started or time.perf_counter()
            if count and time.perf_counter() - started >= seconds / 4:
                break
    return count / (time.perf_counter() - started)


class _Numbers(Dataset[tuple[int, Any]]):
    """The numbers of images, and their labels."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.labels = dataset, dataset.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset.label(index)


def synthetic(train: DataLoader[Any], model: PromptedModel, dtype: torch.dtype, place: torch.device) -> DataLoader[Any]:
    """Batches as those of `train`, of the labels of its `ImageDataset` and of random images that lie where the model
    computes, in the type that computes: nothing is read, and nothing copied."""
    size = train.batch_size or 1
    images = torch.randn(size, *model.default_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    held = images.to(place, dtype)

    def collate(items: list[tuple[int, Any]]) -> tuple[Tensor, Tensor]:
        return held[: len(items)], default_collate([label for _, label in items])

    return DataLoader(_Numbers(train.dataset), size, sampler=train.sampler, collate_fn=collate)
