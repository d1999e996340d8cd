"""Kernels compiled for GPUs that are not there, once for all tests: those of all ops together, as for every target a
process has to start.

One GPU of each vendor is compiled for in every run, the one that kernels were timed on among them; the others, two
minutes of a processor, with `pytest -m slow`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest

from vptm_kernels import aot

EVERY_RUN = ("sm90", "gfx942")
_SLOW = tuple(target for target in aot.TARGETS if target not in EVERY_RUN)


def each(targets: Sequence[str] = aot.TARGETS) -> list[Any]:
    """Targets as parameters of a test."""
    return [pytest.param(target, marks=pytest.mark.slow if target in _SLOW else ()) for target in targets]


def reports(target: str, op: str = "") -> list[aot.Report]:
    """Of one target, of one op or of all; the targets that the same run wants are compiled beside it."""
    found = _compiled(_SLOW if target in _SLOW else EVERY_RUN)
    return [report for report in found if report.target == target and report.case.startswith(op)]


@functools.cache
def _compiled(targets: tuple[str, ...]) -> list[aot.Report]:
    return aot.run(targets, "", ci=True)
