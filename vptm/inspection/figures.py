"""Pictures that are drawn without a window and replaced by one rename."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from vptm.weights.files import write_atomically


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, whose parts make room for each other; nothing of pyplot's is
    touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Any, path: str | Path, *, dpi: int = 130) -> None:
    """Write a figure of `new_figure` as a PNG; a kill leaves the old file or the new one.

    Raises:
        WriteError: naming `path`; an old file is as it was.
    """
    buffer = io.BytesIO()
    figure.canvas.print_figure(buffer, dpi=dpi, format="png")
    write_atomically(Path(path), buffer.getvalue())
