"""The picture of a run's curves is drawn whatever the run saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vptm.training.curves import plot_curves


def history(epochs: int, quality: str = "accuracy", val: bool = True, **last: Any) -> list[dict[str, Any]]:
    rows = [{"epoch": k + 1, "train_loss": 2.0 / (k + 1), f"train_{quality}": 0.5} for k in range(epochs)]
    for row in rows:
        row |= {"val_loss": 3.0, f"val_{quality}": 0.25} if val else {"val_loss": None, f"val_{quality}": None}
    rows[-1] |= last
    return rows


@pytest.mark.parametrize(
    "rows",
    [
        history(1),
        history(40),
        history(3, val=False),
        history(3, "map"),
        history(3, "map", train_map=None),
        history(2, train_loss=float("nan"), val_loss=float("inf")),
    ],
    ids=["one epoch", "many", "no val", "several labels", "val alone", "not finite"],
)
def test_every_history_is_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_curves(rows, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.size == (1170, 468)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or ()}
    assert (0x1F, 0x6F, 0x8B) in colours, "the training curve is not there"
    assert ((0xC8, 0x55, 0x3D) in colours) == (rows[0]["val_loss"] is not None)
