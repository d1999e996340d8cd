"""What a comparison shows: its columns, on a terminal, in a csv and a json file, and as a plot."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vptm.inspection.figures import new_figure, write_png
from vptm.settings import option_value
from vptm.weights.files import write_atomically

COLUMNS = (
    "method",
    "runs",
    "failed",
    "accuracy_mean",
    "accuracy_std",
    "val_accuracy_mean",
    "trainable_parameters",
    "images_per_second",
    "peak_memory_mib",
    "chosen",
)


@dataclass
class MethodResult:
    """One method over its seeds; `runs` maps a seed to the run's facts, `failures` to why there are none."""

    name: str
    chosen: dict[str, Any] = field(default_factory=dict)
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def accuracies(self) -> list[float]:
        """Test accuracy of every finished run, shares in 0..1."""
        return [run["result"]["test"]["accuracy"] for run in self.runs.values()]

    def chosen_text(self) -> str:
        """What the search chose, as name=value with spaces between."""
        return " ".join(f"{name}={option_value(value)}" for name, value in self.chosen.items())

    def row(self) -> dict[str, Any]:
        """The method's line of the table; None where there is nothing to say."""
        accuracies = self.accuracies()
        validated = [run["result"]["val_accuracy"] for run in self.runs.values()]
        cost = [run["cost"] for run in self.runs.values()]
        speeds = [one["images_per_second"] for one in cost if one["images_per_second"]]
        return {
            "method": self.name,
            "runs": len(self.runs),
            "failed": len(self.failures),
            "accuracy_mean": statistics.fmean(accuracies) if accuracies else None,
            "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "val_accuracy_mean": None if None in validated or not validated else statistics.fmean(validated),
            "trainable_parameters": cost[0]["trainable_parameters"] if cost else None,
            "images_per_second": statistics.median(speeds) if speeds else None,
            "peak_memory_mib": max(one["peak_memory"] for one in cost) / 2**20 if cost else None,
            "chosen": self.chosen_text(),
        }


def write_results(results: Sequence[MethodResult], out: Path) -> None:
    """`comparison.csv` with one line per method, `comparison.json` with every run, `comparison.png`."""
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([result.row() for result in results])
    write_atomically(out / "comparison.csv", text.getvalue().encode())
    every = [
        {"method": r.name, "chosen": r.chosen, "runs": dict(sorted(r.runs.items())), "failures": r.failures}
        for r in results
    ]
    write_atomically(out / "comparison.json", (json.dumps(every, indent=2) + "\n").encode())
    plot(results, out / "comparison.png")


def table(results: Sequence[MethodResult]) -> list[tuple[str, ...]]:
    """What is printed: a line of headings, and one for every method, best mean accuracy first."""
    rows = sorted((result.row() for result in results), key=lambda row: -(row["accuracy_mean"] or 0.0))
    lines: list[tuple[str, ...]] = [
        ("method", "test accuracy", "runs", "trained values", "images/s", "peak memory", "chosen")
    ]
    for row in rows:
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.1f}"
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        mean, speed, memory = row["accuracy_mean"], row["images_per_second"], row["peak_memory_mib"]
        lines.append(
            (
                row["method"],
                "-" if mean is None else f"{100 * mean:.1f}{spread} %",
                f"{row['runs']}{failed}",
                "-" if row["trainable_parameters"] is None else f"{row['trainable_parameters']:,}",
                "-" if speed is None else f"{speed:.0f}",
                "-" if memory is None else f"{memory:.0f} MiB",
                row["chosen"],
            )
        )
    return lines


def plot(results: Sequence[MethodResult], path: Path) -> None:
    """Test accuracy by method, and against the number of trained values, as a PNG: a dot per run, a line at the
    mean."""

    done = [result for result in results if result.runs]
    figure = new_figure(10, 1.6 + 0.45 * max(len(done), 4))
    by_method, by_size = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = ("#1f6f8b", "#c8553d", "#588157", "#6d597a", "#b5838d", "#e09f3e", "#33658a", "#2f3e46", "#9c6644")
    ordered = sorted(done, key=lambda result: statistics.fmean(result.accuracies()))
    for place, result in enumerate(ordered):
        colour = colours[results.index(result) % len(colours)]
        values = [100 * value for value in result.accuracies()]
        mean = statistics.fmean(values)
        by_method.plot(values, [place] * len(values), "o", color=colour, alpha=0.55, markersize=6, markeredgewidth=0)
        by_method.plot([mean, mean], [place - 0.3, place + 0.3], color=colour, linewidth=2.5)
        size = result.row()["trainable_parameters"]
        by_size.plot(size, mean, "o", color=colour, markersize=7)
        by_size.annotate(
            result.name,
            (size, mean),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            parse_math=False,
        )
    by_method.set_yticks(range(len(ordered)), [result.name for result in ordered], parse_math=False)
    by_method.set(xlabel="test accuracy, %", ylim=(-0.6, max(len(ordered), 1) - 0.4))
    by_method.set_title("every run, and the mean", loc="left", fontsize=10)
    by_size.set(xlabel="trained values", ylabel="mean test accuracy, %", xscale="log")
    by_size.set_title("accuracy for what is trained", loc="left", fontsize=10)
    by_size.margins(0.18)
    for axes in (by_method, by_size):
        axes.grid(alpha=0.3, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    write_png(figure, path)
