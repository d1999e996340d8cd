"""Studies whose every run is a `vptm train` of its own: arms, learning rates chosen on validation, paired differences.

An arm is what `vptm train` is given. All arms of a seed see the same images. Where an arm has rates to choose from,
that one is taken whose validation accuracy is best in the mean over seeds that are not reported; every arm of a study
has as many. Differences are judged as `studies.runs` says.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from studies.runs import ROOT, Comparison, Study, builtin_weights, study_parser, summarise

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


def around(lr: float) -> tuple[float, ...]:
    """The rates that a study chooses from."""
    return lr / 4, lr, 4 * lr


class Task(NamedTuple):
    """Images that are learned, by name and as options of `vptm train`."""

    name: str
    options: str


class TrainedStudy(Study):
    """Runs of arms on tasks in one json that several processes may add to; `weights` is the hash of their model's, the
    built-in one's by default."""

    def __init__(
        self,
        path: Path,
        arms: Sequence[Arm],
        tasks: Sequence[Task],
        comparisons: Sequence[Comparison],
        weights: str | None = None,
    ) -> None:
        super().__init__(path, builtin_weights() if weights is None else weights)
        self.arms, self.tasks, self.comparisons = arms, tasks, comparisons

    def summary(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        tasks, arms = [task.name for task in self.tasks], [arm.name for arm in self.arms]
        return summarise(runs, tasks, arms, self.comparisons)

    def _rate(self, arm: Arm, task: Task) -> float | None:
        """The arm's learning rate on a task; runs what is missing for the choice."""
        if not arm.rates:
            return None
        mine = {"arm": arm.name, "task": task.name}
        for seed in TUNING_SEEDS:
            for rate in arm.rates:
                done = {**mine, "rate": rate, "seed": seed}
                if not self.has(done, tuning=True):
                    found = train([*arm.command(task, rate), "--no-test"], seed)
                    self.add({**found, **done, "commit": self.commit}, tuning=True)
                    print(f"{task.name}, {arm.name}, lr {rate:g}, seed {seed}: val {found['val']:.2%}", flush=True)
        trials = [trial for trial in self.stored()[1] if trial.items() >= mine.items()]
        return max(arm.rates, key=lambda rate: (np.mean([t["val"] for t in trials if t["rate"] == rate]), -rate))

    def _run(self, arm: Arm, task: Task, seeds: int) -> None:
        """What is missing of an arm on a task: its learning rate, then its seeds."""
        rate = self._rate(arm, task)
        for seed in range(seeds):
            done = {"arm": arm.name, "task": task.name, "seed": seed}
            if not self.has(done):
                found = train(arm.command(task, rate), seed)
                self.add({**found, **done, "commit": self.commit})
                print(f"{task.name}, {arm.name}, seed {seed}: test {found['test']:.2%}", flush=True)

    def run(self, seeds: int, jobs: int, tasks: Sequence[Task] | None = None) -> None:
        """What is missing of `tasks`, all by default, arm by arm, `jobs` arms at a time."""
        tasks = self.tasks if tasks is None else tasks
        left = [(arm, task) for task in tasks for arm in self.arms]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda one: self._run(*one, seeds), left))


def run_command(
    program: str,
    doc: str | None,
    study: Callable[[Path], TrainedStudy],
    tasks: Mapping[str, Task] | None = None,
    default: Sequence[str] = (),
) -> None:
    """`python -m studies.PROGRAM`: the runs of a study, of some of its `tasks` where they have names to choose by, of
    `default` where none are given."""
    parser = study_parser(program, doc)
    if tasks is not None:
        parser.add_argument(
            "--tasks", nargs="+", default=list(default), choices=tasks, metavar="TASK", help=", ".join(tasks)
        )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    arguments = parser.parse_args()
    chosen = None if tasks is None else [tasks[name] for name in arguments.tasks]
    study(arguments.out).run(arguments.seeds, arguments.jobs, chosen)
