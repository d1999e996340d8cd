"""Which labels a model takes for which, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vptm.inspection.figures import new_figure, write_png
from vptm.messages import one_line

_MOST_NUMBERS, _MOST_NAMES, _LONGEST_NAME = 25, 60, 30


def plot_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Rows are labels, columns predictions: the share of a label's images as a shade, and their number where there is
    room; with more than 60 classes they are numbered. A PNG.

    Args:
        counts: (K, K).
        classes: K names.
        path: of the file.

    Raises:
        WriteError: naming `path`.
    """
    found = np.asarray(counts)
    shares = found / np.maximum(found.sum(1, keepdims=True), 1)
    side = min(3.5 + 0.38 * len(classes), 14.0)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(drawn, ax=axes, fraction=0.046, label="share of the label's images")
    axes.set(xlabel="prediction", ylabel="label")
    if len(classes) <= _MOST_NAMES:
        # as they are: matplotlib would read $...$ as a formula
        names = [one_line(name, _LONGEST_NAME).replace("$", r"\$") for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(classes) <= _MOST_NUMBERS:
        for row, column in zip(*found.nonzero()):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(found[row, column]), ha="center", va="center", color=colour, fontsize=8)
    write_png(figure, path)
