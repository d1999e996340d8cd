"""What a run says on stderr while it trains: where it is, how fast, what it waits for, and when it will be done."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, NamedTuple

from vptm.terminal import SECONDS_PER_LINE, progress_bar

_FIRST_LINE = 2.0  # seconds without a word, where there is no terminal to draw a bar on


_SETTLING = 2  # steps that make things ready


class Pace(NamedTuple):
    """How fast a run trained, with its validation, after its first two steps: images a second, and the share of the
    time in which the model waited for data."""

    images_per_second: float
    waiting: float


class TrainProgress:
    """A bar with one line per epoch; without a terminal, lines: the first after the first step, or two seconds of
    steps, then one every half a minute.

    Args:
        shown: False says nothing.
        epochs: of the run.
        done: epochs that were finished before.
        steps: in an epoch.
    """

    def __init__(self, shown: bool, *, epochs: int, done: int, steps: int) -> None:
        self.shown, self.epochs, self.steps = shown, epochs, steps
        self._first = self._count = done * steps
        self._images, self._waited = 0, 0.0
        self._bar = progress_bar(shown)
        self._task = self._bar.add_task("training", total=epochs * steps, completed=self._first, note="")
        self._started = self._spoke = self._ended = time.perf_counter()
        self._settled: tuple[float, int, float] | None = None
        self._patience = _FIRST_LINE

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        self._started = self._spoke = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = time.perf_counter()
        self._bar.stop()

    def step(self, images: int, waited: float) -> None:
        """One more step, of so many images, that waited so many seconds for its batch."""
        self._count += 1
        self._images += images
        self._waited += waited
        now = time.perf_counter()
        if self._count - self._first == _SETTLING:
            self._settled = now, self._images, self._waited
        if not self.shown:
            return
        if not self._bar.disable:
            self._bar.update(self._task, advance=1, note=self.note(now - self._started))
        elif now - self._spoke >= self._patience:
            epoch, step = divmod(self._count - 1, self.steps)
            self._say(f"epoch {self._epoch(epoch + 1)}  step {step + 1}/{self.steps}  {self.note(now - self._started)}")
            self._patience = SECONDS_PER_LINE

    @property
    def pace(self) -> Pace | None:
        """Of the whole run, once it has ended; None of one of so few steps."""
        if self._settled is None or self._images == self._settled[1]:
            return None
        started, images, waited = self._settled
        seconds = max(self._ended - started, 1e-9)
        return Pace((self._images - images) / seconds, (self._waited - waited) / seconds)

    def note(self, seconds: float) -> str:
        """Images a second, the share of the time that was waiting for data, and the time left, `seconds` after the
        start."""
        left = (self.epochs * self.steps - self._count) * seconds / (self._count - self._first)
        return (
            f"{self._images / seconds:.3g} images/s, {self._waited / seconds:.0%} waiting for data, "
            f"{timedelta(seconds=round(left))} left"
        )

    def epoch(self, row: dict[str, Any]) -> None:
        """The line of a finished epoch, from its row of `metrics.csv`."""
        if not self.shown:
            return
        said = [f"epoch {self._epoch(row['epoch'])}"]
        for part in ("train", "val"):
            loss, accuracy, mean = (row.get(f"{part}_{name}") for name in ("loss", "accuracy", "map"))
            if loss is not None:
                quality = "" if accuracy is None else f" acc {accuracy:.1%}"
                said.append(f"{part} loss {loss:.4f}{quality if mean is None else f' mAP {mean:.4f}'}")
        self._say("  ".join([*said, f"{row['seconds']:.1f} s"]))

    def _epoch(self, number: int) -> str:
        return f"{number:{len(str(self.epochs))}d}/{self.epochs}"

    def _say(self, line: str) -> None:
        self._bar.console.print(line)
        self._spoke = time.perf_counter()
