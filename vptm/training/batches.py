"""What a loader may yield."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

IMAGES, LABELS = ("pixel_values", "images", "image"), ("labels", "label")


def images_and_labels(batch: Any, name: str = "loader", *, tensors: bool = True) -> tuple[Any, Any]:
    """Images and labels of a batch, or of an item of a data set: its first two parts, or those of a mapping.

    Args:
        batch: (images, labels), followed by anything such as indices, or a mapping with `pixel_values`, `images` or
            `image`, and `labels` or `label`.
        name: what messages call the loader.
        tensors: refuse what is no tensor.

    Raises:
        TypeError: neither of them.

    Example:
        >>> images_and_labels({"pixel_values": torch.zeros(2, 1, 4, 4), "labels": torch.tensor([0, 1])})[1]
        tensor([0, 1])
    """
    if isinstance(batch, Mapping):
        found = [next((batch[key] for key in keys if key in batch), None) for keys in (IMAGES, LABELS)]
        given = f"a mapping with {', '.join(map(str, batch))}"
    else:
        found = list(batch[:2]) if isinstance(batch, Sequence) and not isinstance(batch, str) else []
        given = f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in found)}" if found else ""
    wrong = len(found) < 2 or any(part is None or (tensors and not isinstance(part, Tensor)) for part in found)
    if wrong:
        raise TypeError(
            f"{name} must yield (images, labels) or a mapping with pixel_values and labels, "
            f"got {given or type(batch).__name__}"
        )
    return found[0], found[1]
