"""What the studies of accuracy share: runs in one json that several processes may add to, and judged differences.

A difference is judged by its paired t-interval over the seeds, and one that is to be above zero by its p-value as well,
corrected by Holm for all such comparisons of its family, one question asked on several tasks, or the whole study:

- better: seen here, if it is above zero after correction; not seen here, if 95 % of the interval leave no room for
  `ROOM` points.
- no worse: seen here, if the interval stays above -`ROOM`; not seen here, if it stays below.
- else too little data.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import t as student_t
from scipy.stats import ttest_1samp

import vptm
from bench.timing import commit
from vptm.weights.files import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "studies" / "results"
ROOM = 1.0
LEVEL = 0.05


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


class Comparison(NamedTuple):
    """What is asked of two arms: whether the first is better than the second, or no worse; `family` names those that
    are corrected together."""

    first: str
    second: str
    asked: Literal["better", "no worse"] = "better"
    family: str = ""


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm for how many there are, in their order.

    Example:
        >>> holm([0.01, 0.5, 0.02])
        [0.03, 0.5, 0.04]
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (len(p_values) - place) * float(p_values[index])))
        corrected[int(index)] = least
    return corrected


def verdict(found: dict[str, Any], asked: str) -> str:
    """What the head of this file makes of `mean`, `low`, `high`, `seeds` and, for "better", `p_holm`."""
    if found["seeds"] < 3:
        return "too little data"
    if asked == "no worse":
        return "seen here" if found["low"] > -ROOM else "not seen here" if found["high"] < -ROOM else "too little data"
    if found["mean"] > 0 and found["p_holm"] < LEVEL:
        return "seen here"
    return "not seen here" if found["high"] < ROOM else "too little data"


def summarise(
    runs: Sequence[dict[str, Any]], tasks: Sequence[str], arms: Sequence[str], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """Accuracies and judged differences of each task, the p-values of a family corrected over all tasks; the largest
    family is counted.

    A run has a "task", an "arm", a "seed", and the share of "test" images that were right.
    """
    found: dict[str, Any] = {}
    families: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        accuracies, by = {}, {}
        for arm in arms:
            own = {run["seed"]: 100 * run["test"] for run in runs if (run["task"], run["arm"]) == (task, arm)}
            if own:
                accuracies[arm] = accuracy(np.array(list(own.values())))
                by[arm] = own
        paired = {}
        for first, second, asked, family in comparisons:
            seeds = sorted(by.get(first, {}).keys() & by.get(second, {}).keys())
            if not seeds:
                continue
            differences = np.array([by[first][seed] - by[second][seed] for seed in seeds])
            one = {**interval(differences), "asked": asked}
            if asked == "better" and len(seeds) > 1:
                # equal differences have no spread to test, and so no p-value
                one["p"] = float(np.nan_to_num(ttest_1samp(differences, 0).pvalue, nan=1.0))
                families.setdefault(family, []).append(one)
            paired[f"{first} - {second}"] = one
        if accuracies:
            found[task] = {"test_accuracy_percent": accuracies, "paired_difference_points": paired}
    for members in families.values():
        for one, corrected in zip(members, holm([one["p"] for one in members])):
            one["p_holm"] = corrected
    for task_found in found.values():
        for one in task_found["paired_difference_points"].values():
            one["verdict"] = verdict(one, one["asked"])
    return {"comparisons_corrected_for": max(map(len, families.values()), default=0), "tasks": found}


def study_parser(program: str, doc: str | None, out: str | None = None) -> argparse.ArgumentParser:
    """The options that every study has; its json is `out`, by default that of the program's name."""
    parser = argparse.ArgumentParser(
        prog=f"python -m studies.{program}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{out or program}.json")
    return parser


def builtin_weights() -> str:
    """Hash of the built-in model that is shipped."""
    return vptm.PromptedBEiT("builtin", 2).weight_hash()


class Study:
    """The runs of `weights` in a json file that several processes may add to."""

    def __init__(self, path: Path, weights: str) -> None:
        self.path, self.weights = path, weights
        self.commit = commit(RESULTS.relative_to(ROOT).as_posix())

    def stored(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Reported runs and tuning runs of the present weights."""
        content = json.loads(self.path.read_text()) if self.path.exists() else {}
        if content.get("weights") != self.weights:
            return [], []
        return content["runs"], content["tuning"]

    def has(self, done: dict[str, Any], *, tuning: bool = False) -> bool:
        """Whether a run that `done` describes is stored."""
        runs, trials = self.stored()
        return any(run.items() >= done.items() for run in (trials if tuning else runs))

    def origin(self) -> dict[str, Any]:
        """By what command, with what and where."""
        return {
            "command": shlex.join(["python", "-m", f"studies.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
            "versions": {"vptm": vptm.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        }

    def head(self) -> dict[str, Any]:
        """What the json says of all runs."""
        return {"weights": self.weights, **self.origin()}

    def summary(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """What the runs come to."""
        raise NotImplementedError

    def add(self, run: dict[str, Any], *, tuning: bool = False) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            runs, trials = self.stored()
            (trials if tuning else runs).append(run)
            content = {**self.head(), "summary": self.summary(runs), "tuning": trials, "runs": runs}
            write_atomically(self.path, json.dumps(content, indent=1) + "\n")
