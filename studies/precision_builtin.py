"""Whether bf16 learns what fp32 learns: `vptm train` as it comes on a CPU, in both, with the same seeds.

    python -m studies.precision_builtin --seeds 5

Every run is a `vptm train` of its own. Finished ones are kept in the json, so the command goes on where it stopped;
those of another commit or of other weights are dropped, so that all are of one program. Writes
`results/precision.json`: every run, means and the paired difference with its 95 % interval.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from studies import trained
from studies.runs import Study, accuracy, builtin_weights, interval, study_parser
from vptm_kernels._runtime.frozen_linear import has_bfloat16

PRECISIONS = ("fp32", "bf16")
PAIR = "bf16 - fp32"


def train(precision: str, seed: int) -> dict[str, Any]:
    """One run: nothing but the precision differs from the defaults on a CPU."""
    return {"precision": precision, **trained.train(["--precision", precision], seed)}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of each precision over its seeds, and the paired difference over those that both have."""
    found = {name: {run["seed"]: 100 * run["test"] for run in runs if run["precision"] == name} for name in PRECISIONS}
    accuracies = {name: accuracy(np.array(list(by_seed.values()))) for name, by_seed in found.items() if by_seed}
    both = sorted(found["bf16"].keys() & found["fp32"].keys())
    differences = np.array([found["bf16"][seed] - found["fp32"][seed] for seed in both])
    paired = {PAIR: interval(differences)} if both else {}
    return {"test_accuracy_percent": accuracies, "paired_difference_points": paired}


class Precision(Study):
    """Runs of one commit."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, builtin_weights())

    def stored(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        runs, tuning = super().stored()
        return [run for run in runs if run["commit"] == self.commit], tuning

    def head(self) -> dict[str, Any]:
        return {**super().head(), "commit": self.commit, "bfloat16_instructions": has_bfloat16()}

    def summary(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        return summarise(runs)


def main() -> None:
    parser = study_parser("precision_builtin", __doc__, "precision")
    arguments = parser.parse_args()
    study = Precision(arguments.out)
    for seed in range(arguments.seeds):
        for precision in PRECISIONS:
            if not study.has({"precision": precision, "seed": seed}):
                run = train(precision, seed)
                study.add({**run, "commit": study.commit})
                print(f"{precision}, seed {seed}: test {run['test']:.2%}", flush=True)


if __name__ == "__main__":
    main()
