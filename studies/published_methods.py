"""What published methods add to a frozen model, each beside itself without prompts.

    python -m studies.published_methods --tasks fashion-16 digits-16 --seeds 5 --jobs 2

Every method runs its shipped recipe, with the epochs that make 400 steps or more of 160 images, every fifth of which is
validated. Its learning rate is the best of three on validation images: the recipe's, a quarter of it and four times it;
so is that of the same method without prompts, whose read-out and verbalizer are the same. Finished runs are kept in the
json, so the command goes on where it stopped. Writes `results/published_methods.json`.

Questions of the papers, on a model of 2 million parameters whose class row and mask row were trained alike:

- VPTM (arXiv:2303.04998): do prompts on the mask row, read as visual tokens, beat none; beat VPT; do token logits beat
  the hidden state they are made of, and the mask row the class row with the same head?
- VPT (arXiv:2203.12119): do prompts beat a linear head alone, at the start or in every block?
- SPT (arXiv:2402.02382): do prompts that start as tokens beat random ones?
- ProVP (arXiv:2304.08386): do the prompts of the block before, and features held to the frozen model's, help?
- CVPT (arXiv:2408.14961), E2VPT (arXiv:2307.13770), BPT (arXiv:2506.22908), VIPAMIN (arXiv:2510.16446): do they beat a
  linear head alone?

Questions of ours: a linear probe, full fine-tuning, and a linear head on the mask row.
"""

from __future__ import annotations

from pathlib import Path

from studies.runs import Comparison
from studies.trained import Arm, Task, TrainedStudy, around, run_command
from vptm.recipes.recipe import read_recipe

TASKS = {
    "fashion-16": Task("Fashion-MNIST, 16 shots", "--data builtin --shots 16"),
    "digits-16": Task("digits, 16 shots", "--data digits --shots 16"),
}
# epochs that are 400 steps or more of 160 images in the recipe's batches
EPOCHS = {
    "vptm": 80,
    "vpt-shallow": 140,
    "vpt-deep": 140,
    "e2vpt-kv": 140,
    "bpt-shallow": 200,
    "vipamin-deep": 200,
    "linear": 80,
    "finetune": 80,
}
NONE = " without prompts"


def arm(name: str, recipe: str, options: str = "") -> Arm:
    """A method by its recipe, at three learning rates."""
    epochs = f" --epochs {EPOCHS[recipe]}" if recipe in EPOCHS else ""
    options = f"--recipe {recipe}{epochs} --val-every 5{options}"
    return Arm(name, options, around(float(read_recipe(recipe).settings["lr"])))


def arms() -> list[Arm]:
    prompted = [
        arm("VPTM", "vptm"),
        arm("VPTM, hidden state", "vptm", " --token-activation hidden"),
        arm("VPTM, class row", "vptm", " --readout cls"),
        arm("VPT deep, class row", "vpt-deep"),
        arm("VPT deep, mean row", "vpt-deep", " --readout mean"),
        arm("VPT deep, mask row", "vpt-deep", " --readout mask"),
    ]
    bare = [Arm(one.name + NONE, f"{one.options} --prompt-length 0".strip(), one.rates) for one in prompted]
    return [
        *prompted,
        *bare,
        arm("VPT shallow, class row", "vpt-shallow"),
        arm("SPT deep", "spt-deep"),
        arm("SPT deep, random start", "spt-deep", " --prompt-init uniform"),
        arm("SPT shallow", "spt-shallow"),
        arm("SPT shallow, random start", "spt-shallow", " --prompt-init uniform"),
        arm("ProVP", "provp"),
        arm("ProVP, alpha 0", "provp", " --progressive-alpha 0"),
        arm("ProVP, no re-formation", "provp", " --reformation 0"),
        arm("CVPT", "cvpt"),
        arm("E2VPT's keys and values", "e2vpt-kv"),
        arm("BPT shallow", "bpt-shallow"),
        arm("VIPAMIN deep", "vipamin-deep"),
        arm("linear probe", "linear"),
        arm("fine-tuning", "finetune"),
    ]


COMPARISONS = [
    *(
        Comparison(name, name + NONE)
        for name in (
            "VPTM",
            "VPTM, hidden state",
            "VPTM, class row",
            "VPT deep, class row",
            "VPT deep, mean row",
            "VPT deep, mask row",
        )
    ),
    Comparison("VPTM", "VPTM, hidden state"),
    Comparison("VPTM", "VPTM, class row"),
    Comparison("VPTM", "VPT shallow, class row"),
    Comparison("VPTM", "VPT deep, class row"),
    Comparison("VPTM", "VPT deep, mean row"),
    Comparison("VPT shallow, class row", "VPT deep, class row" + NONE),
    Comparison("SPT deep", "SPT deep, random start"),
    Comparison("SPT shallow", "SPT shallow, random start"),
    Comparison("ProVP", "ProVP, alpha 0"),
    Comparison("ProVP", "ProVP, no re-formation"),
    *(
        Comparison(name, "linear probe")
        for name in ("CVPT", "E2VPT's keys and values", "BPT shallow", "VIPAMIN deep", "VPTM")
    ),
    Comparison("VPTM", "fine-tuning"),
]


def study(path: Path) -> TrainedStudy:
    return TrainedStudy(path, arms(), list(TASKS.values()), COMPARISONS)


def main() -> None:
    run_command("published_methods", __doc__, study, TASKS, ["fashion-16"])


if __name__ == "__main__":
    main()
