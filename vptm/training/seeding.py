"""Every generator that a run draws from: seeded from (seed, epoch), and put back afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset


def _loader_generators(*loaders: DataLoader[Any] | None) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for loader in loaders:
        for owner in (loader, getattr(loader, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if generator is not None and all(generator is not other for other in found):
                found.append(generator)
    return found


def seed_everything(seed: int, epoch: int, train: DataLoader[Any], val: DataLoader[Any] | None) -> None:
    """Seed torch's, numpy's and Python's global generators, and those of the loaders, from (seed, epoch), and tell the
    epoch to a sampler or stream that wants to know it."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    for generator in _loader_generators(train, val):
        generator.manual_seed(mixed)
    told: list[Any] = [train.sampler, *([train.dataset] if isinstance(train.dataset, IterableDataset) else ())]
    for one in told:
        if hasattr(one, "set_epoch"):
            one.set_epoch(epoch)


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
