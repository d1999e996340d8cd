"""Studies whose every run is a `vptm train` of its own: arms, learning rates chosen on validation, paired differences.

An arm is what `vptm train` is given. All arms of a seed see the same images. Where an arm has rates to choose from,
that one is taken whose validation accuracy is best in the mean over seeds that are not reported; every arm of a study
has as many. A difference is judged by its paired t-interval over the seeds, and one that is to be above zero by its
p-value as well, corrected by Holm for all such comparisons of the study:

- better: seen here, if it is above zero after correction; not seen here, if 95 % of the interval leave no room for
  `ROOM` points.
- no worse: seen here, if the interval stays above -`ROOM`; not seen here, if it stays below.
- else too little data.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import ttest_1samp

from bench.timing import commit
from studies.runs import RESULTS, Study, accuracy, interval

ROOT = Path(__file__).parent.parent
ROOM = 1.0
LEVEL = 0.05
TUNING_SEEDS = (1000, 1001, 1002)


def train(options: Iterable[str], seed: int) -> dict[str, Any]:
    """One `vptm train` with `options` on a CPU thread of its own, and what its `run.json` says."""
    command = ["vptm", "train", "--device", "cpu", *options, "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        made = subprocess.run(
            [sys.executable, "-m", *command, "--out", str(out)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise SystemExit(f"{shlex.join(command)} ended with status {made.returncode}:\n{made.stderr[-2000:]}")
        run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    result = run["result"]
    test, used = result.get("test"), {**run["settings"], **run["arguments"]}
    return {
        "seed": seed,
        "command": shlex.join(command),
        "settings": {name: used[name] for name in ("shots", "epochs", "batch_size", "lr")},
        "val": result["val_accuracy"],
        **({"test": test["accuracy"]} if test else {}),
    }


@dataclass(frozen=True)
class Arm:
    """What `vptm train` is given, and the learning rates to choose from where there are several."""

    name: str
    options: str
    rates: tuple[float, ...] = ()

    def command(self, task: Task, rate: float | None) -> list[str]:
        own = [] if rate is None else ["--lr", f"{rate:g}"]
        return [*shlex.split(task.options), *shlex.split(self.options), *own]


class Task(NamedTuple):
    """Images that are learned, by name and as options of `vptm train`."""

    name: str
    options: str


class Comparison(NamedTuple):
    """What is asked of two arms: whether the first is better than the second, or no worse."""

    first: str
    second: str
    asked: Literal["better", "no worse"] = "better"


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


class TrainedStudy(Study):
    """Runs of arms on tasks in one json that several processes may add to."""

    def __init__(
        self, path: Path, arms: Sequence[Arm], tasks: Sequence[Task], comparisons: Sequence[Comparison]
    ) -> None:
        super().__init__(path)
        self.arms, self.tasks, self.comparisons = arms, tasks, comparisons
        self.commit = commit(RESULTS.relative_to(ROOT).as_posix())

    def content(self, runs: list[dict[str, Any]], trials: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.origin(), "summary": self.summary(runs), "tuning": trials, "runs": runs}

    def summary(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """Accuracies and differences of each task, the p-values corrected over all tasks."""
        found: dict[str, Any] = {}
        asked_better: list[dict[str, Any]] = []
        for task in self.tasks:
            accuracies, by = {}, {}
            for arm in self.arms:
                own = {r["seed"]: 100 * r["test"] for r in runs if (r["task"], r["arm"]) == (task.name, arm.name)}
                if own:
                    accuracies[arm.name] = accuracy(np.array(list(own.values())))
                    by[arm.name] = own
            paired = {}
            for first, second, asked in self.comparisons:
                seeds = sorted(by.get(first, {}).keys() & by.get(second, {}).keys())
                if not seeds:
                    continue
                differences = np.array([by[first][seed] - by[second][seed] for seed in seeds])
                one = {**interval(differences), "asked": asked}
                if asked == "better" and len(seeds) > 1:
                    # equal differences have no spread to test, and so no p-value
                    one["p"] = float(np.nan_to_num(ttest_1samp(differences, 0).pvalue, nan=1.0))
                    asked_better.append(one)
                paired[f"{first} - {second}"] = one
            if accuracies:
                found[task.name] = {"test_accuracy_percent": accuracies, "paired_difference_points": paired}
        for one, corrected in zip(asked_better, holm([one["p"] for one in asked_better])):
            one["p_holm"] = corrected
        for task_found in found.values():
            for one in task_found["paired_difference_points"].values():
                one["verdict"] = verdict(one, one["asked"])
        return {"comparisons_corrected_for": len(asked_better), "tasks": found}

    def _rate(self, arm: Arm, task: Task) -> float | None:
        """The arm's learning rate on a task; runs what is missing for the choice."""
        if not arm.rates:
            return None
        mine = {"arm": arm.name, "task": task.name}
        for seed in TUNING_SEEDS:
            for rate in arm.rates:
                done = {**mine, "rate": rate, "seed": seed}
                if not any(trial.items() >= done.items() for trial in self.stored()[1]):
                    found = train([*arm.command(task, rate), "--no-test"], seed)
                    self.add({**found, **done, "commit": self.commit}, tuning=True)
                    print(f"{task.name}, {arm.name}, lr {rate:g}, seed {seed}: val {found['val']:.2%}", flush=True)
        trials = [trial for trial in self.stored()[1] if trial.items() >= mine.items()]
        return max(arm.rates, key=lambda rate: (np.mean([t["val"] for t in trials if t["rate"] == rate]), -rate))

    def _run(self, arm: Arm, task: Task, seed: int) -> None:
        done = {"arm": arm.name, "task": task.name, "seed": seed}
        if any(run.items() >= done.items() for run in self.stored()[0]):
            return
        found = train(arm.command(task, self._rate(arm, task)), seed)
        self.add({**found, **done, "commit": self.commit})
        print(f"{task.name}, {arm.name}, seed {seed}: test {found['test']:.2%}", flush=True)

    def run(
        self, seeds: int, jobs: int, tasks: Sequence[Task] | None = None, arms: Sequence[Arm] | None = None
    ) -> None:
        """What is missing of `tasks` and `arms`, all by default, seed by seed, `jobs` at a time."""
        tasks = self.tasks if tasks is None else tasks
        arms = self.arms if arms is None else arms
        # rates first, so that no two jobs choose the same one
        with ThreadPoolExecutor(jobs) as pool:
            tuned = [(arm, task) for task in tasks for arm in arms if arm.rates]
            list(pool.map(lambda one: self._rate(*one), tuned))
            left = [(arm, task, seed) for seed in range(seeds) for task in tasks for arm in arms]
            list(pool.map(lambda one: self._run(*one), left))
