"""Kernels compiled for GPUs that are not there, once for all tests of an op.

One GPU of every kind of matrix instruction is compiled for in every run; the others, which share their kind and cost
another minute, with `pytest -m slow`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest

from vptm_kernels import aot

EVERY_RUN = ("sm90", "sm100", "sm120", "gfx942")  # wgmma, tcgen05, mma and mfma
_SLOW = tuple(target for target in aot.TARGETS if target not in EVERY_RUN)


def each(targets: Sequence[str] = aot.TARGETS) -> list[Any]:
    """Targets as parameters of a test."""
    return [pytest.param(target, marks=pytest.mark.slow if target in _SLOW else ()) for target in targets]


def reports(target: str, pattern: str) -> list[aot.Report]:
    """Of one target; those that the same run wants are compiled beside it."""
    found = _compiled(_SLOW if target in _SLOW else EVERY_RUN, pattern)
    return [report for report in found if report.target == target]


@functools.cache
def _compiled(targets: tuple[str, ...], pattern: str) -> list[aot.Report]:
    return aot.run(targets, pattern, ci=True)
