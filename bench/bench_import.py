"""What importing costs beyond torch, in fresh processes: vptm and its kernels beside the libraries it stands on.

    pytest bench/bench_import.py --benchmark-only

Every timed import runs in a process of its own that has imported torch already, and says whether it started CUDA:
an import that does is refused. `speed-up over X` is the time of X over ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import timing

ROOT = Path(__file__).parent.parent
ROUNDS = 3
_CHILD = """
import json, sys, time
import torch
started = time.perf_counter()
__import__(sys.argv[1])
taken = time.perf_counter() - started
print(json.dumps([taken, torch.cuda.is_initialized()]))
"""

OURS = ("vptm", "vptm_kernels")
PEERS = {name: timing.Peer(lambda: None, needs=(name,)) for name in ("timm", "transformers", "peft", "xformers")}


def seconds_to_import(package: str) -> float:
    """In a new process, beyond torch.

    Raises:
        RuntimeError: the import fails, or starts CUDA.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", _CHILD, package]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{package}: {done.stderr.strip().splitlines()[-1]}")
    taken, initialised = json.loads(done.stdout.splitlines()[-1])
    if initialised:
        raise RuntimeError(f"{package}: importing it started CUDA")
    return float(taken)


def by_its_own_report(run: timing.Run) -> float:
    """A clock for runs that return the seconds they took."""
    taken = run()
    assert isinstance(taken, float)
    return taken


@cache
def _compared() -> timing.Comparison:
    """All packages in turns; a first import from a cold disk is one round of three."""
    runs = {name: partial(seconds_to_import, name) for name in (*OURS, *timing.present(PEERS))}
    return timing.compare(runs, OURS[0], check=None, rounds=ROUNDS, warmup=0, clock=by_its_own_report)


@pytest.mark.parametrize("package", OURS)
def bench_import(benchmark: BenchmarkFixture, package: str) -> None:
    benchmark.group = f"import of {package} beyond torch"
    found, other = _compared(), OURS[package == OURS[0]]
    assert other not in found.refused, found.refused[other]
    found = timing.Comparison(package, {n: s for n, s in found.seconds.items() if n != other}, found.refused)
    benchmark.extra_info |= found.info() | {"seconds beyond torch": round(found.median(package), 4)}
    benchmark.pedantic(partial(seconds_to_import, package), rounds=1)
