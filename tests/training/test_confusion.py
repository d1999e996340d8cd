"""The picture of a confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vptm.training import confusion
from vptm.training.confusion import plot_confusion


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of what is drawn."""
    seen: list[Any] = []
    monkeypatch.setattr(
        confusion,
        "write_png",
        lambda figure, path, write=confusion.write_png: (seen.append(figure.axes), write(figure, path)),
    )
    return seen


def test_rows_are_labels_and_shades_are_shares(axes: list[Any], tmp_path: Path) -> None:
    """Turned round it would show which predictions are wrong, not which labels are missed; "$" must draw no formula."""
    plot_confusion([[3, 1], [0, 0]], ["a$^2$", "b\nc"], tmp_path / "c.png")
    drawn = axes[0][0]
    np.testing.assert_array_equal(drawn.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert [text.get_text() for text in drawn.texts] == ["3", "1"]
    assert [text.get_position() for text in drawn.texts] == [(0, 0), (1, 0)]
    assert [text.get_text() for text in drawn.get_yticklabels()] == [r"a\$^2\$", "b c"]
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("prediction", "label")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > picture.height > 300


def test_many_classes_stay_a_picture_of_bounded_size(axes: list[Any], tmp_path: Path) -> None:
    plot_confusion(np.eye(300, dtype=int).tolist(), [f"class {k}" for k in range(300)], tmp_path / "c.png")
    assert not axes[0][0].texts and "class 0" not in [text.get_text() for text in axes[0][0].get_yticklabels()]
    with Image.open(tmp_path / "c.png") as picture:
        assert max(picture.size) < 2500
