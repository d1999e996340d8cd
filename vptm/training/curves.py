"""Loss and accuracy by epoch, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vptm.inspection.figures import new_figure, write_png


def plot_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy by epoch, mean average precision of multi-label runs, as a PNG."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = new_figure(9, 3.6)
    quality = "map" if "val_map" in history[0] else "accuracy"
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", quality)):
        for part, colour in (("train", "#1f6f8b"), ("val", "#c8553d")):
            points = [(row["epoch"], value) for row in history if (value := row.get(f"{part}_{quantity}")) is not None]
            if points:
                axes.plot(*zip(*points), color=colour, marker="o" if len(points) < 30 else "", markersize=3, label=part)
        axes.set(xlabel="epoch", ylabel={"map": "mean average precision"}.get(quantity, quantity))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if quantity != "loss":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(0, 1)
        else:
            axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(frameon=False)
    write_png(figure, path)
