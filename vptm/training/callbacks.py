"""What is told of a run while it goes on: to a function of yours, or to TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor


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
        """After an epoch, with its row of `metrics.csv`, when its files are written."""

    def end(self, history: Iterable[Mapping[str, Any]], *, interrupted: bool) -> None:
        """At the end, also after Ctrl-C, with the rows of all epochs; not after an error."""


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


def check_log(log: str | None) -> None:
    """ValueError where a logger of `vptm train --log` is not installed."""
    if log == "tensorboard" and find_spec("tensorboard") is None:
        raise ValueError("log tensorboard needs TensorBoard: pip install tensorboard")
