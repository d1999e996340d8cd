"""What is told of a run while it goes on: to a function of yours, to TensorBoard, or to a tracker of Accelerate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from vptm.messages import error_line, one_of


class Callback:
    """Told by `vptm.fit` what happens, in the first of several processes; a subclass defines what it needs.

    What it raises ends the run, whose folder then holds the last finished epoch.

    Example:
        >>> class Losses(Callback):
        ...     def epoch(self, row):
        ...         print(row["epoch"], row["train_accuracy"] <= 1)
        >>> model = vptm.PromptedBEiT("builtin", num_classes=2)
        >>> images = torch.utils.data.TensorDataset(torch.randn(4, 1, 28, 28), torch.arange(4) % 2)
        >>> loader = torch.utils.data.DataLoader(images, batch_size=2)
        >>> _ = vptm.fit(model, loader, epochs=1, lr=1e-3, progress=False, callbacks=[Losses()])
        1 True
    """

    def step(self, number: int, loss: Tensor, lr: float) -> None:
        """After step `number` of the run, counted from 0. `loss` is 0-d where the model computes, of this process's
        share of the batch: to read its value waits for a GPU."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """After an epoch, with its row of `metrics.csv`, when its files are written; what is of validation images is
        None where they were not looked at."""

    def end(self, history: Iterable[Mapping[str, Any]], *, interrupted: bool) -> None:
        """At the end, also after Ctrl-C, with the rows of all epochs; not after an error. The run is written by then:
        what is changed in the model here is in no file."""


class TensorBoard(Callback):
    """Loss, accuracy and learning rate of every epoch as curves that TensorBoard shows.

    Args:
        folder: event files are written to it, from the first epoch on.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        check_log("tensorboard")
        self.folder = folder
        self._writer: Any = None

    def epoch(self, row: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:  # curves of a run that was resumed, or made again, go on from here
            self._writer = SummaryWriter(str(self.folder), purge_step=row["epoch"])
        for name, value in row.items():
            part, _, quantity = name.rpartition("_")
            if name != "epoch" and value is not None:
                self._writer.add_scalar(f"{quantity}/{part}" if part else name, value, row["epoch"])
        self._writer.flush()

    def end(self, history: Iterable[Mapping[str, Any]], *, interrupted: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class Tracker(Callback):
    """The columns of `metrics.csv` of every epoch in a tracker that Accelerate knows, in its project "vptm".

    It starts with the first step; a run that is resumed is another one there.

    Args:
        name: wandb, mlflow, or any that `accelerate.tracking` lists.
        folder: for a tracker that writes files.
        settings: of the run, kept as its configuration.

    Raises:
        ValueError: see `check_log`.
    """

    def __init__(self, name: str, folder: str | Path, settings: Mapping[str, Any]) -> None:
        check_log(name)
        self.name, self.folder = name, folder
        plain = str | int | float | bool | None
        self.settings = {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}
        self._tracker: Any = None

    def step(self, number: int, loss: Tensor, lr: float) -> None:
        if self._tracker is not None:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[self.name]
        try:
            tracker = kind("vptm", *([str(self.folder)] if kind.requires_logging_directory else []))
            if hasattr(tracker, "start"):  # older trackers start when they are made
                tracker.start()
            tracker.store_init_configuration(self.settings)
        except Exception as error:  # of any library
            raise ValueError(f"log {self.name} could not start: {error_line(error, first=True)}") from error
        self._tracker = tracker

    def epoch(self, row: Mapping[str, Any]) -> None:
        values = {name: value for name, value in row.items() if name != "epoch" and value is not None}
        self._tracker.log(values, step=row["epoch"])

    def end(self, history: Iterable[Mapping[str, Any]], *, interrupted: bool) -> None:
        if self._tracker is not None:
            self._tracker.finish()


def logger_of(log: str | None, folder: Path, settings: Mapping[str, Any]) -> list[Callback]:
    """The callback of `vptm train --log`, in a list; none where nothing is logged."""
    if log is None:
        return []
    return [TensorBoard(folder / log) if log == "tensorboard" else Tracker(log, folder / log, settings)]


def check_log(log: str | None) -> None:
    """ValueError unless `log` is a logger of `vptm train --log` that is installed, or None."""
    if log == "tensorboard" and find_spec("tensorboard") is None:
        raise ValueError("log tensorboard needs TensorBoard: pip install tensorboard")
    if log is None or log == "tensorboard":
        return
    if find_spec("accelerate") is None:
        raise ValueError(f"log {log} needs Accelerate and what it logs to: pip install accelerate")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    listed = {name: str(name) in map(str, get_available_trackers()) for name in LOGGER_TYPE_TO_CLASS}
    one_of("log", log, tuple(listed))
    if not listed[log]:
        raise ValueError(f"log {log} needs a package that is not installed: pip install {log.replace('_', '-')}")
