"""A model's preprocessing, of the pictures of a test and of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.nn import functional as F

from vptm.data.decoding import BACKGROUND, to_8_bit


class _Preprocess:
    """PIL image -> normalised (C, H, W) float tensor, with a random mirror and shift where asked."""

    def __init__(
        self, mode: str, pipeline: Callable[[Image.Image], Tensor], flip: bool, shift: int, options: dict[str, Any]
    ) -> None:
        self.mode, self.pipeline, self.flip, self.shift, self.options = mode, pipeline, flip, shift, options

    def __call__(self, image: Image.Image) -> Tensor:
        if not isinstance(image, Image.Image):
            raise TypeError(f"image must be a PIL image, got {type(image).__name__}")
        pixels = self.pipeline(to_8_bit(image, **self.options).convert(self.mode))
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        if self.shift:
            height, width = pixels.shape[-2:]
            top, left = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
            padded = F.pad(pixels[None], (self.shift,) * 4, mode="replicate")[0]
            pixels = padded[:, top : top + height, left : left + width]
        return pixels


def transforms(model: Any, train: bool = False, *, flip: bool = True) -> Callable[[Image.Image], Tensor]:
    """The preprocessing `model.default_cfg` asks for: PIL image of any mode and size -> float tensor (C, H, W).

    8 bits without transparency (`vptm.data.decoding.to_8_bit`), grey or RGB by the model's channels, resize, centre
    crop and normalisation through timm. For training, images of
    64 pixels and more get timm's random resized crop (area 0.25 to 1) and mirror; smaller ones keep their frame and
    get a mirror and a shift of up to 1/14 of the side with edge padding. Random draws come from torch's and Python's
    global generators. Mean and deviation are those the weights were made with; VPT and SPT feed every ViT ImageNet's:
    to do as they do, set `model.default_cfg["mean"]` and `["std"]` before.

    Args:
        model: has `default_cfg` with `input_size` (C, H, W), `mean`, `std` and optionally `interpolation`, `crop_pct`,
            `crop_mode`, `background`, `value_range`.
        train: add the random changes of training.
        flip: allow the mirror; use False where it changes the class, as with digits (`ImageData.flip`).

    Example:
        >>> import vptm
        >>> model = vptm.PromptedBEiT("builtin", num_classes=10)
        >>> vptm.transforms(model)(Image.new("RGB", (40, 30))).shape
        torch.Size([1, 28, 28])
    """
    config: Mapping[str, Any] = model.default_cfg
    channels, height, width = config["input_size"]
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"transforms needs a model of 1 (grey) or 3 (RGB) channels, this one has {channels}")
    large = min(height, width) >= 64
    options: dict[str, Any] = {}
    if train and large:
        options = {"scale": (0.25, 1.0), "hflip": 0.5 if flip else 0.0, "color_jitter": None, "auto_augment": None}
    pipeline = create_transform(
        input_size=(channels, height, width),
        is_training=train and large,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config.get("interpolation", "bicubic"),
        crop_pct=config.get("crop_pct", 1.0),
        crop_mode=config.get("crop_mode", "center"),
        **options,
    )
    small_training = train and not large
    shift = max(1, round(min(height, width) / 14)) if small_training else 0
    return _Preprocess(modes[channels], pipeline, flip and small_training, shift, picture_options(model))


def picture_options(model: Any) -> dict[str, Any]:
    """`background` and `value_range` of the pictures that `model` was trained on, for `read_image`.

    Example:
        >>> import vptm
        >>> picture_options(vptm.PromptedBEiT("builtin", num_classes=10))
        {'background': 'white', 'value_range': None}
    """
    config: Mapping[str, Any] = model.default_cfg
    return {"background": config.get("background", BACKGROUND), "value_range": config.get("value_range")}
