"""How pictures are prepared for weights: what a source states about it, and what is assumed where it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vptm.data.decoding import check_picture_options

INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of PIL's Resampling
_CROP_MODES = ("center", "squash", "border")  # timm's
_HALF = (0.5, 0.5, 0.5)


def preprocessing_error(config: Any) -> str | None:
    """What is wrong with a "preprocessing" read from JSON, None where `vptm.transforms` can follow it."""
    if not isinstance(config, dict):
        return f"must have preprocessing as an object, got {config!r}"
    size = config.get("input_size", [1, 1, 1])
    if not isinstance(size, list) or len(size) != 3 or any(type(edge) is not int or edge < 1 for edge in size):
        return f"must have preprocessing.input_size as (channels, height, width), got {size!r}"
    try:
        for name in ("mean", "std"):
            count = len(floats(config[name], name, "")) if name in config else size[0]
            if "input_size" in config and count != size[0]:
                return f"must have preprocessing.{name} of {size[0]} channels, got {config[name]!r}"
        if "interpolation" in config:
            interpolation_name(config["interpolation"], "")
        if "crop_pct" in config:
            share(config["crop_pct"], "crop_pct", "")
    except ValueError as error:
        return f"must have a usable preprocessing{error}"
    try:
        check_picture_options(config.get("background"), config.get("value_range"))
    except ValueError as error:
        return f"must have a usable preprocessing: {error}"
    if (mode := config.get("crop_mode", "center")) not in _CROP_MODES:
        return f"must have preprocessing.crop_mode as one of {', '.join(_CROP_MODES)}, got {mode!r}"
    known = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "background", "value_range"}
    unknown = set(config) - known
    return f"must have a preprocessing without {sorted(unknown)[0]!r}" if unknown else None


def statistics(
    stated: tuple[Sequence[float] | None, Sequence[float] | None],
    stated_by: str,
    name: str,
    in_chans: int,
    *,
    has_class_layers: bool = False,
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and deviation of a source, and a note with the rule that chose them.

    Args:
        stated: mean and deviation as the source states them, where it does.
        stated_by: what of the source does.
        name: its file or model name, which tells BEiT v1 from v2.
        in_chans: channels of its pictures.
        has_class_layers: whether it has the `cls_pt` layers of BEiT v2.
    """
    mean, std = stated
    if mean is not None and std is not None and len(mean) == len(std) == in_chans:
        return tuple(mean), tuple(std), f"mean and std: {stated_by}"
    if in_chans != 3:
        half = (0.5,) * in_chans
        return half, half, f"mean and std 0.5: the source states none for {in_chans} channels"
    lower = name.lower()
    if "beitv2" in lower or "beit-v2" in lower or has_class_layers:
        why = "cls_pt layers" if has_class_layers else "the name says BEiT v2"
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, f"mean and std of ImageNet: {why}"
    if lower.startswith(("beit_", "beit-")):
        return _HALF, _HALF, "mean and std 0.5: the name says BEiT v1"
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "mean and std of ImageNet assumed: the source does not tell"


def positive(value: Any, name: str, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ValueError(f"{label}: {name} must be a positive number, got {value!r}")
    return float(value)


def share(value: Any, name: str, label: str) -> float:
    share = positive(value, name, label)
    if share > 1:
        raise ValueError(f"{label}: {name} must be a number in (0, 1], got {value!r}")
    return share


def interpolation_name(value: Any, label: str) -> str:
    if value not in INTERPOLATIONS:
        raise ValueError(f"{label}: interpolation must be one of {', '.join(INTERPOLATIONS)}, got {value!r}")
    return str(value)


def floats(value: Any, name: str, label: str) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else [value]
    if (
        not numbers
        or not all(isinstance(v, int | float) and type(v) is not bool and math.isfinite(v) for v in numbers)
        or ("std" in name and min(numbers) <= 0)
    ):
        raise ValueError(f"{label}: {name} must be finite numbers{', positive' * ('std' in name)}, got {value!r}")
    return tuple(float(v) for v in numbers)
