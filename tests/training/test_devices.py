"""Where a run computes, and who reads its images."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils.data import TensorDataset

from vptm.training.devices import loader_of


def test_a_gpu_is_fed_by_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without, it waits for pictures that the process that drives it reads; with more than batches, they idle."""
    images, gpu = TensorDataset(torch.zeros(100, 1)), torch.device("cuda")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert [loader_of(images, size, None, gpu).num_workers for size in (5, 32, 256)] == [8, 4, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    found = loader_of(images, 5, None, gpu, shuffle=True)
    assert found.num_workers == 2 and found.pin_memory and len(found) == 20
    assert loader_of(images, 5, 3, gpu).num_workers == 3 and loader_of(images, 5, 0, gpu).num_workers == 0
    cpu = loader_of(images, 5, None, torch.device("cpu"))
    assert cpu.num_workers == 0 and not cpu.pin_memory
