"""Requests that arrive together share a batch; more than fit are refused at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Overloaded(RuntimeError):
    """As many requests wait as may."""


class _Asked(NamedTuple):
    image: Tensor
    task: Any
    answer: Future[Any]


class Batcher:
    """One thread that predicts what waits, as many at a time as there are, up to a batch.

    Args:
        predict: (images (B, ...), tasks) -> an answer for each, as `vptm.TaskBank.predict`; tasks are what `ask` was
            told. One that fails is called again for each image by itself, so that no request fails for another's sake.
        batch_size: most images of a batch.
        patience: seconds that the first of a batch waits for others; 0 takes what is there.
        most_waiting: requests in the queue before `ask` refuses.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, list[Any]], Sequence[Any] | Tensor],
        *,
        batch_size: int,
        patience: float,
        most_waiting: int,
    ) -> None:
        self._predict = predict
        self.batch_size, self.patience, self.most_waiting = batch_size, patience, most_waiting
        self.images = self.batches = 0
        self._waiting: deque[_Asked] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="vptm batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def ask(self, image: Tensor, task: Any, answer: Future[Any] | None = None) -> Future[Any]:
        """The answer for one image (channels, height, width), when it is there; in `answer`, where one is given.

        Raises:
            Overloaded: as many wait as may, or the batcher was closed.
        """
        answer = Future() if answer is None else answer
        with self._changed:
            if self._ended or len(self._waiting) >= self.most_waiting:
                raise Overloaded(f"{len(self._waiting)} requests wait, at most {self.most_waiting} may")
            self._waiting.append(_Asked(image, task, answer))
            self._changed.notify()
        return answer

    def close(self) -> None:
        """Answer what waits, and end."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            asked = [each for each in batch if each.answer.set_running_or_notify_cancel()]  # its client may be gone
            if not asked:
                continue
            try:
                self._answer(asked)
            except Exception:  # as that of a task that was removed meanwhile: it is told to whom it concerns
                for each in asked:
                    try:
                        self._answer([each])
                    except Exception as error:
                        each.answer.set_exception(error)
            self.images += len(asked)
            self.batches += 1

    def _answer(self, asked: list[_Asked]) -> None:
        answers = self._predict(torch.stack([each.image for each in asked]), [each.task for each in asked])
        for each, own in zip(asked, answers, strict=True):
            each.answer.set_result(own)

    def _next(self) -> list[_Asked]:
        """What is predicted next; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            until = time.monotonic() + self.patience
            while len(self._waiting) < self.batch_size and not self._ended:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            return [self._waiting.popleft() for _ in range(min(self.batch_size, len(self._waiting)))]
