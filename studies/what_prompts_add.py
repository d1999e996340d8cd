"""What prompts add to a frozen model, and what a better start of prototypes does: six tasks.

    python -m studies.what_prompts_add --seeds 5 --jobs 2

`vptm train` without a recipe, beside itself without prompts, from prototypes whitened and at class means. The frozen
model was pre-trained on pictures of clothing, Fashion-MNIST's; digits are new to it. The learning rate is the best of
three on validation images, for every start with prompts and without. Finished runs are kept in the json, so the command
goes on where it stopped; the first, at class means, are of commits where `vptm train` started there by default. Writes
`results/what_prompts_add.json`.
"""

from __future__ import annotations

from pathlib import Path

from studies.runs import Comparison
from studies.trained import Arm, Task, TrainedStudy, around, run_command

# the package's own pictures are 640 of Fashion-MNIST to train and 320 to validate; 800 steps or more of many images
TASKS = {
    "fashion-16": Task("Fashion-MNIST, 16 shots", "--data builtin --shots 16"),
    "fashion-64": Task("Fashion-MNIST, 64 shots", "--data builtin --shots 64 --epochs 40"),
    "digits-16": Task("digits, 16 shots", "--data digits --shots 16"),
    "digits-all": Task("digits, all 1259 images", "--data digits --shots all --epochs 20"),
    "mnist5k-16": Task("MNIST-5k, 16 shots", "--data mnist5k --shots 16"),
    "mnist5k-all": Task("MNIST-5k, all 3500 images", "--data mnist5k --shots all --epochs 8"),
}
WHITENED, MEANS = "whitened", "class means"
# each with the rate that is its default, around which others are tried
STARTS = {WHITENED: ("--prototype-init whitened", 5e-4), MEANS: ("--prototype-init class_means", 2e-3)}


def without(name: str) -> str:
    return f"{name}, without prompts"


def arms() -> list[Arm]:
    found = []
    for name, (options, lr) in STARTS.items():
        found += [Arm(name, options, around(lr)), Arm(without(name), f"{options} --prompt-length 0", around(lr))]
    return found


# each is one question, asked on six tasks
COMPARISONS = [
    *(Comparison(name, without(name), family=name) for name in STARTS),
    Comparison(WHITENED, MEANS, family="start"),
    Comparison(without(WHITENED), without(MEANS), family="start without prompts"),
]


def study(path: Path) -> TrainedStudy:
    return TrainedStudy(path, arms(), list(TASKS.values()), COMPARISONS)


def main() -> None:
    run_command("what_prompts_add", __doc__, study, TASKS, list(TASKS))


if __name__ == "__main__":
    main()
