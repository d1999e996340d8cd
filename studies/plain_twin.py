"""The papers' question on a model whose pre-training had no term for the whole image: do prompts on the mask row, read
as visual tokens, beat none, and beat prompts with the class row or the mean row?

    python -m studies.plain_twin --seeds 5 --jobs 2

Class row and mask row of the built-in model were trained to know the whole image; of its twin neither was, as in masked
visual token modelling by itself. `python tools/pretrain_builtin.py train --bag-weight 0` made its weights, which stand
in `results/plain_twin.safetensors`. Arms are those of `studies.published_methods`, on these weights. Finished runs are
kept in the json, so the command goes on where it stopped. Writes `results/plain_twin.json`.
"""

from __future__ import annotations

from pathlib import Path

import vptm
from studies import published_methods
from studies.published_methods import NONE, TASKS
from studies.runs import RESULTS, ROOT, Comparison
from studies.trained import Arm, TrainedStudy, run_command

WEIGHTS = RESULTS / "plain_twin.safetensors"
NAMES = ("VPTM", "VPT deep, class row", "VPT deep, mean row")
COMPARISONS = [*(Comparison(name, name + NONE) for name in NAMES), *(Comparison(NAMES[0], name) for name in NAMES[1:])]


def arms() -> list[Arm]:
    named = {arm.name: arm for arm in published_methods.arms()}
    model = f"--model {WEIGHTS.relative_to(ROOT).as_posix()}"
    chosen = [named[name + none] for none in ("", NONE) for name in NAMES]
    return [Arm(arm.name, f"{model} {arm.options}", arm.rates) for arm in chosen]


def study(path: Path) -> TrainedStudy:
    weights = vptm.PromptedBEiT(WEIGHTS, 2).weight_hash()
    return TrainedStudy(path, arms(), list(TASKS.values()), COMPARISONS, weights)


def main() -> None:
    run_command("plain_twin", __doc__, study, TASKS, list(TASKS))


if __name__ == "__main__":
    main()
