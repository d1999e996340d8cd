"""What the studies of accuracy share: runs in one json that several processes may add to, and paired differences."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t

import vptm
from vptm.weights.files import write_atomically

RESULTS = Path(__file__).parent / "results"
BATCH = 32
WEIGHT_DECAY = 0.1


def interval(values: np.ndarray) -> dict[str, Any]:
    """Mean and 95 % t-interval of paired differences, in points."""
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": 1}
    half = float(student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(values)}


def accuracy(values: np.ndarray) -> dict[str, Any]:
    """Mean and standard deviation of an arm over its seeds."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "std": spread, "seeds": len(values)}


class Study:
    """The runs in a json file that several processes may add to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = vptm.PromptedBEiT("builtin", 2).weight_hash()

    def stored(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Reported runs and tuning runs of the present weights."""
        content = json.loads(self.path.read_text()) if self.path.exists() else {}
        if content.get("weights") != self.weights:
            return [], []
        return content["runs"], content["tuning"]

    def origin(self) -> dict[str, Any]:
        """By what command, of which weights, with what and where."""
        return {
            "command": shlex.join(["python", "-m", f"studies.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
            "weights": self.weights,
            "versions": {"vptm": vptm.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        }

    def content(self, runs: list[dict[str, Any]], trials: list[dict[str, Any]]) -> dict[str, Any]:
        """What the json holds, these runs and trials and `origin` among it."""
        raise NotImplementedError

    def add(self, run: dict[str, Any], *, tuning: bool = False) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            runs, trials = self.stored()
            (trials if tuning else runs).append(run)
            content = self.content(runs, trials)
            write_atomically(self.path, json.dumps(content, indent=1) + "\n")
