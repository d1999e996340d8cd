"""The processes that train one model together: which of them this is, its share of a batch, and what they sum up.

`torchrun` and `accelerate launch` start them; Accelerate connects them. Each holds the whole model and computes its
share of every batch of the loader, so that `batch_size` is that of all together; only gradients of what is learned are
summed. A process alone does none of it.
"""

from __future__ import annotations

import atexit
import os
import random
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from vptm.messages import one_line


class Ranks:
    """One process alone: it is the first of one, and what it sums up stays as it is."""

    index, count = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in all of them."""
        return tensor

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its sum over the processes."""

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in all of them."""
        return [value]

    def first(self, value: Any) -> Any:
        """The value of the first process, in all of them."""
        return value


class SeveralRanks(Ranks):
    """One of several processes, which all call the same methods in the same order."""

    def __init__(self, device: torch.device) -> None:
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list, gather_object, reduce

        begins = not torch.distributed.is_initialized()
        state = PartialState(cpu=device.type == "cpu")
        if begins:  # a thread of gloo that outlives the interpreter aborts the process at its very end
            atexit.register(state.destroy_process_group)
        self.index, self.count, self.device = state.process_index, state.num_processes, state.device
        self._reduce, self._gather, self._broadcast = reduce, gather_object, broadcast_object_list

    def sum(self, tensor: Tensor) -> Tensor:
        return self._together(self._reduce, tensor, reduction="sum")

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for kind in dict.fromkeys(gradient.dtype for gradient in gradients):
            same = [gradient for gradient in gradients if gradient.dtype == kind]
            summed = self.sum(torch.cat([gradient.flatten() for gradient in same]))
            for gradient, part in zip(same, summed.split([gradient.numel() for gradient in same])):
                gradient.copy_(part.view_as(gradient))

    def gather(self, value: Any) -> list[Any]:
        return list(self._together(self._gather, [value]))

    def first(self, value: Any) -> Any:
        return self._together(self._broadcast, [value])[0]

    def _together(self, collective: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return collective(*arguments, **options)
        except RuntimeError as error:  # what gloo and NCCL raise where a process is gone
            raise RuntimeError(
                "another process of the run ended, the run folder holds the last finished epoch: "
                f"{one_line(error, 200)}"
            ) from error


def rank_and_count() -> tuple[int, int]:
    """Which of how many processes this is, as `torchrun` and `accelerate launch` say in the environment."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes and prints for the run: the first of several, or one alone."""
    return rank_and_count()[0] == 0


def first_reports(report: Callable[[str], None]) -> Callable[[str], None]:
    """`report` in the first process, and nothing in the others."""
    return report if is_first() else lambda line: None


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process where `device` is a GPU without a number and `torchrun` started several."""
    local = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(local)) if device.type == "cuda" and device.index is None and local else device


def join(device: torch.device) -> Ranks:
    """The processes of this run, as `torchrun` and `accelerate launch` describe them in the environment.

    Raises:
        ValueError: there are several, and Accelerate is not installed.
    """
    _, count = rank_and_count()
    if count == 1:
        return Ranks()
    if find_spec("accelerate") is None:
        raise ValueError(f"a run in {count} processes needs Accelerate: pip install accelerate")
    return SeveralRanks(device)


class RankBatches(Sampler[list[int]]):
    """The share of one process of every batch; batches and their order are the same in all.

    A process that a short batch has no image for takes its first one and counts none of it, so that all take the same
    number of steps.

    Attributes:
        sizes: images of each batch so far, of this process and of all.
    """

    def __init__(self, batches: Any, ranks: Ranks, draws_first: bool) -> None:
        self.batches, self.ranks, self.draws_first = batches, ranks, draws_first
        self.sizes: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        index, count = self.ranks.index, self.ranks.count
        if self.draws_first:  # as a loader without a generator does before it asks for the first batch
            torch.empty((), dtype=torch.int64).random_()
        every = list(self.batches)
        if index:  # images of other processes are augmented and dropped out otherwise
            seed = (torch.initial_seed() + index) % 2**32
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
        self.sizes = []
        for batch in every:
            share = list(batch)[index::count]
            self.sizes.append((len(share), len(batch)))
            yield share or list(batch)[:1]


def check_shared(loader: DataLoader[Any], ranks: Ranks, name: str) -> None:
    """ValueError where the batches of `loader` cannot be shared out to several processes: a stream, a loader without
    batches, or batches with fewer images than processes."""
    if ranks.count == 1:
        return
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise ValueError(f"{name} must be a data set with batches for {ranks.count} processes, got a stream")
    if loader.batch_size is not None:
        check_images_for_all(loader.batch_size, ranks, name)


def check_images_for_all(batch_size: int, ranks: Ranks, name: str) -> None:
    """ValueError where batches of that many images have none for some process."""
    if batch_size < ranks.count:
        raise ValueError(f"{name} must have an image for each of {ranks.count} processes in a batch, got {batch_size}")


def rank_loader(loader: DataLoader[Any], ranks: Ranks, name: str) -> tuple[DataLoader[Any], RankBatches | None]:
    """A loader of this process's share, and the batches it takes; `loader` itself, and None, for one alone.

    Raises:
        ValueError: what `check_shared` refuses.
    """
    check_shared(loader, ranks, name)
    if ranks.count == 1:
        return loader, None
    batches = RankBatches(loader.batch_sampler, ranks, draws_first=loader.generator is None)
    share: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )
    return share, batches
