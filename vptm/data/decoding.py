"""One picture decoded, from a file or from bytes: how any of them becomes 8 bits of grey or colour."""

from __future__ import annotations

import io
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from vptm.messages import error_line, one_line

# what is read, by Pillow's names; none of them runs another program, as PostScript would start Ghostscript
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
BACKGROUND = "white"
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"})
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES = 258, 262, 339


class BadImageError(ValueError):
    """An image file that cannot be decoded or shown in 8 bits; the message names the file."""


def read_image(
    path: str | Path, *, background: str | None = BACKGROUND, value_range: tuple[float, float] | None = None
) -> Image.Image:
    """Decode one image file fully, upright by its EXIF orientation, in 8 bits, without transparency.

    Read are AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF and WebP, by content and not by suffix; of several frames
    or pages the first.

    Args:
        path: a regular file.
        background, value_range: see `to_8_bit`.

    Raises:
        FileNotFoundError: no such file.
        BadImageError: not a regular file, not an image of these formats, truncated, too large to be one (Pillow's
            decompression-bomb limit), or deeper than 8 bits without a known range.
    """
    check_picture_options(background, value_range)
    path = Path(path)
    try:
        if not path.is_file() and path.exists():
            raise ValueError("it is no regular file")  # opening a FIFO or a device would wait for ever
        return _decoded(path, background, value_range, None)
    except FileNotFoundError:
        raise FileNotFoundError(f"image not found: {path}") from None
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        raise BadImageError(f"cannot read image {one_line(path, 1000)}: {error_line(error)}") from error


def read_upload(
    content: bytes,
    *,
    background: str | None = BACKGROUND,
    value_range: tuple[float, float] | None = None,
    most_pixels: int | None = None,
    name: str = "",
) -> Image.Image:
    """`read_image` of what somebody sent, or of a picture that is no file of its own.

    Args:
        content: of a file.
        background, value_range: see `to_8_bit`.
        most_pixels: larger pictures are refused before they are decoded.
        name: what messages call it.

    Raises:
        BadImageError: as `read_image`, or too many pixels.
    """
    check_picture_options(background, value_range)
    try:
        return _decoded(io.BytesIO(content), background, value_range, most_pixels)
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        named = f" {one_line(name, 1000)}" if name else ""
        raise BadImageError(f"cannot read image{named}: {error_line(error)}") from error


def _decoded(
    source: Path | io.BytesIO,
    background: str | None,
    value_range: tuple[float, float] | None,
    most_pixels: int | None,
) -> Image.Image:
    with Image.open(source, formats=formats()) as image:
        if most_pixels is not None and image.width * image.height > most_pixels:
            raise ValueError(f"it has {image.width} x {image.height} pixels, at most {most_pixels} are read")
        image.load()
        return _shown(ImageOps.exif_transpose(image), _stated_depth(image), background, value_range)


def to_8_bit(
    image: Image.Image, *, background: str | None = BACKGROUND, value_range: tuple[float, float] | None = None
) -> Image.Image:
    """A PIL image in 8 bits a channel, without transparency; one that is so already is returned as it is.

    Args:
        image: of any mode but LAB.
        background: colour under what is transparent, as Pillow names colours; None keeps the transparency.
        value_range: (darkest, brightest) value of images of more than 8 bits a channel; what lies beyond is clipped.
            None takes the depth their file states, which 12-bit and 16-bit grey has. Signed, 32-bit and
            floating-point images have none and are refused: the range of one would not be that of the next.

    Raises:
        ValueError: a mode or colour that is not known, no range where one is needed, or values that are not finite.

    Example:
        >>> to_8_bit(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
        >>> to_8_bit(Image.new("I;16", (1, 1), 1023), value_range=(0, 4095)).getpixel((0, 0))
        64
    """
    check_picture_options(background, value_range)
    return _shown(image, _stated_depth(image), background, value_range)


def check_picture_options(background: str | None, value_range: tuple[float, float] | None) -> None:
    """Raise ValueError unless both are what `to_8_bit` takes."""
    if background is not None:
        try:
            ImageColor.getrgb(background)
        except (ValueError, TypeError, AttributeError):
            raise ValueError(
                f"background must be a colour such as white or #808080, got {one_line(repr(background))}"
            ) from None
    if value_range is not None:
        try:
            low, high = map(float, value_range)
        except (ValueError, TypeError, OverflowError):
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"value_range must be two finite numbers, the lower first, got {one_line(repr(value_range))}"
            )


class _Depth(NamedTuple):
    """What a file says about values of more than 8 bits: their range, None where it says none."""

    range: tuple[float, float] | None
    inverted: bool = False
    unsigned: bool = False


def _stated_depth(image: Image.Image) -> _Depth:
    tags: Any = getattr(image, "tag_v2", {})  # of TIFF alone
    bits = tags.get(_TIFF_BITS, (16,))[0]
    unsigned = tags.get(_TIFF_SAMPLES, (1,))[0] == 1
    inverted = tags.get(_TIFF_PHOTOMETRIC) == 0  # white is zero; Pillow turns these around up to 8 bits only
    if image.mode.startswith("I;16"):
        return _Depth((0, 2**bits - 1), inverted)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return _Depth((0, 2**16 - 1))  # Pillow's mode for 16 bits there; PPM's own maximum is scaled to it
    return _Depth(None, inverted, unsigned and bool(tags))


def _shown(
    image: Image.Image, depth: _Depth, background: str | None, value_range: tuple[float, float] | None
) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _scaled(image, depth, value_range)
    elif image.mode not in _MODES:
        raise ValueError(f"its mode {image.mode} must be one of {', '.join(sorted(_MODES))}, I, I;16 and F")
    if background is None or not image.has_transparency_data:
        return image
    sheet = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
    sheet.alpha_composite(image.convert("RGBA"))
    return sheet.convert("RGB")


def _scaled(image: Image.Image, depth: _Depth, value_range: tuple[float, float] | None) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "I" and depth.unsigned:
        values %= 2**32  # Pillow holds unsigned 32 bits in signed ones
    if not np.isfinite(values).all():
        raise ValueError("its values must be finite, some are NaN or infinite")
    limits = depth.range if value_range is None else value_range
    if limits is None:
        raise ValueError(
            f"it has {'floating-point' if image.mode == 'F' else 'signed or 32-bit'} values, here from "
            f"{values.min():g} to {values.max():g}: pass value_range (--value-range LOW,HIGH) of all images"
        )
    low, high = limits
    share = np.clip((values - low) / (high - low), 0, 1)
    grey = Image.fromarray(np.rint(255 * (1 - share if depth.inverted else share)).astype(np.uint8))
    if value_range is None:
        grey.info["brightest"] = (float(values.max()), high)
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):  # the one value that stands for nothing
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow can open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
