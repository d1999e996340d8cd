"""Whether prompts may be many: accuracy over their number, with and without gates, beside none at all.

    python -m studies.prompt_length --seeds 5 --jobs 2

The built-in task of `vptm train`, 16 images of each of 10 classes, of 16 patches each. Prototypes start at class means;
all else is what `vptm train` does without a recipe, in 40 epochs at 5e-4. Finished runs are kept in the json, so the
command goes on where it stopped. Writes `results/prompt_length.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studies.runs import Comparison
from studies.trained import Arm, Task, TrainedStudy, run_command
from vptm.inspection.figures import new_figure, write_png

LENGTHS = (1, 5, 10, 20, 50, 100)
MODES = ("shallow", "deep")
GATES = {"no gate": " --prompt-gate none", "gate from -4": " --prompt-gate -4"}
NONE = "no prompts"
TASK = Task("built-in task, 16 shots", "--data builtin --shots 16 --epochs 40 --lr 5e-4 --prototype-init class_means")


def name(mode: str, length: int, gate: str) -> str:
    return f"{mode}, {length} prompts, {gate}"


def arms() -> list[Arm]:
    gated = [
        Arm(name(mode, length, gate), f"--prompt-mode {mode} --prompt-length {length}{option}")
        for gate, option in GATES.items()
        for mode in MODES
        for length in LENGTHS
    ]
    return [Arm(NONE, "--prompt-length 0"), *gated]


def comparisons() -> list[Comparison]:
    return [
        Comparison(name(mode, length, gate), NONE, "no worse") for gate in GATES for mode in MODES for length in LENGTHS
    ]


def study(path: Path) -> TrainedStudy:
    return TrainedStudy(path, arms(), [TASK], comparisons())


def plot(summary: dict[str, Any], path: Path) -> None:
    """Accuracy over the number of prompts, a line for each place and gate; a bar is a standard deviation over seeds."""
    found = summary["tasks"][TASK.name]["test_accuracy_percent"]
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    if NONE in found:
        axes.axhline(found[NONE]["mean"], color="black", linewidth=0.8, linestyle=":", label=NONE)
    for gate, colour in zip(GATES, ("#c8553d", "#1f6f8b")):
        for mode, line in zip(MODES, ("-", "--")):
            there = [length for length in LENGTHS if name(mode, length, gate) in found]
            values = [found[name(mode, length, gate)] for length in there]
            means, spreads = [v["mean"] for v in values], [v["std"] or 0.0 for v in values]
            axes.errorbar(
                there, means, spreads, fmt=f"o{line}", color=colour, markersize=4, capsize=2, label=f"{mode}, {gate}"
            )
    axes.set(xscale="log", xticks=LENGTHS, xlabel="prompts in a block, beside 16 patches", ylabel="test accuracy, %")
    axes.set_xticklabels([str(length) for length in LENGTHS])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    write_png(figure, path, dpi=110)


def main() -> None:
    run_command("prompt_length", __doc__, study)


if __name__ == "__main__":
    main()
