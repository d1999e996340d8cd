"""Which files are pictures, and what 8 bits of grey or colour any of them becomes."""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vptm.data.decoding import BadImageError, read_image, to_8_bit
from vptm.data.picture_files import image_files, left_out_note
from vptm.data.sources import load_data
from vptm.data.transforms import transforms
from vptm.weights.preprocessing import preprocessing_error

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def saved(path: Path, values: np.ndarray, **settings: Any) -> Path:
    Image.fromarray(values).save(path, **settings)
    return path


def grey(path: Path, **options: Any) -> np.ndarray:
    return np.asarray(read_image(path, **options).convert("L")).ravel().astype(int)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
@pytest.mark.parametrize("brightest", [65535, 4095, 256, 255])
def test_sixteen_bits_are_scaled_by_the_files_depth(tmp_path: Path, suffix: str, brightest: int) -> None:
    """Scaled by its own maximum, a dark picture would look like a bright one; divided by chance, one of 0..255 would
    be 256 times as bright as one of 0..256."""
    values = np.rint(RAMP * brightest).astype(np.uint16)
    options = {"irreversible": False} if suffix == "jp2" else {}
    got = grey(saved(tmp_path / f"x.{suffix}", values, **options))
    assert got.tolist() == np.rint(values.ravel() / 257).astype(int).tolist()


def test_a_range_spreads_what_uses_less_than_its_depth(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.png", np.rint(RAMP * 4095).astype(np.uint16))
    got = grey(file, value_range=(0, 4095))
    assert (got.min(), got.max(), len(np.unique(got))) == (0, 255, 256)
    got = grey(file, value_range=(1000, 3000))
    assert got.min() == 0 and got.max() == 255 and (np.diff(got) >= 0).all(), "beyond the range is clipped, not wrapped"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((RAMP * 4000 - 1000).astype(np.int32), "signed or 32-bit values, here from -1000 to 3000"),
        (RAMP.astype(np.float32), "floating-point values, here from 0 to 1"),
    ],
)
def test_values_without_a_stated_depth_need_a_range(tmp_path: Path, values: np.ndarray, kind: str) -> None:
    """A CT of -1000..3000 wrapped modulo 256, and a float picture of 0..1 turned black."""
    file = saved(tmp_path / "x.tif", values)
    with pytest.raises(BadImageError, match=f"x.tif: it has {kind}: pass value_range"):
        read_image(file)
    got = grey(file, value_range=(float(values.min()), float(values.max())))
    assert (got.min(), got.max()) == (0, 255) and (np.diff(got) >= 0).all()


def tiff(values: np.ndarray, sample_format: int, photometric: int = 1) -> bytes:
    """A little-endian TIFF of one strip: kinds of values that Pillow reads and does not write."""
    tags = [(256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, values.itemsize * 8), (259, 3, 1)]
    tags += [(262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, values.shape[0]), (279, 4, values.nbytes)]
    tags += [(339, 3, sample_format)]
    data = values.tobytes()
    entries = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, kind, value in tags
    )
    start = (8 + len(data)).to_bytes(4, "little")
    return b"II*\0" + start + data + len(tags).to_bytes(2, "little") + entries + b"\0\0\0\0"


def test_signed_unsigned_and_inverted_tiffs(tmp_path: Path) -> None:
    """16-bit MRI is signed, old X-rays have white at zero, and 32 unsigned bits do not fit into signed ones."""
    file = tmp_path / "x.tif"
    file.write_bytes(tiff(np.array([[-1024, 0], [1000, 2048]], "<i2"), 2))
    with pytest.raises(BadImageError, match="here from -1024 to 2048: pass value_range"):
        read_image(file)
    assert grey(file, value_range=(-1024, 3072)).tolist() == [0, 64, 126, 191]
    file.write_bytes(tiff(np.array([[0, 65535], [257, 32896]], "<u2"), 1, photometric=0))
    assert grey(file).tolist() == [255, 0, 254, 127]
    file.write_bytes(tiff(np.array([[0, 2**32 - 1], [2**31, 2**24]], "<u4"), 1))
    assert grey(file, value_range=(0, 2**32 - 1)).tolist() == [0, 255, 128, 1]


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.tif", np.array([[0.5, np.nan]], np.float32))
    with pytest.raises(BadImageError, match="must be finite"):
        read_image(file, value_range=(0, 1))


def transparent(mode: str) -> Image.Image:
    """Black under full transparency, and one opaque black pixel: only what is composited tells them apart."""
    image = Image.new("RGBA", (2, 1))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode in ("L", "RGB"):  # one value stands for nothing
        opaque = Image.new(mode, (2, 1))
        opaque.putpixel((0, 0), 9 if mode == "L" else (9, 9, 9))
        opaque.info["transparency"] = 9 if mode == "L" else (9, 9, 9)
        return opaque
    if mode == "P":
        flat = Image.new("P", (2, 1))
        flat.putpalette([0, 0, 0, 0, 0, 0])
        flat.putpixel((1, 0), 1)
        flat.info["transparency"] = 0
        return flat
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_white_unless_told_otherwise(tmp_path: Path, mode: str) -> None:
    """Colours under full transparency are arbitrary: a black square and a black bar on nothing were one picture."""
    file = tmp_path / "x.png"
    transparent(mode).save(file)
    for background, expected in (("white", [255, 0]), ("black", [0, 0]), ("#808080", [128, 0])):
        assert grey(file, background=background).tolist() == expected
    assert read_image(file, background=None).has_transparency_data


def test_sixteen_bits_with_a_transparent_value(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    Image.fromarray(np.array([[0, 700]], np.uint16)).save(file, transparency=700)
    with Image.open(file) as image:
        assert image.info.get("transparency") == 700, "the case needs a file that says so"
    assert grey(file).tolist() == [0, 255]


def test_transforms_see_no_hidden_colours_and_no_clipped_depth() -> None:
    """PIL images that did not come from `read_image` are shown in the same way, with what the model was trained on."""
    config: dict[str, Any] = {"input_size": (1, 28, 28), "mean": (0.0,), "std": (1.0,)}
    model: Any = SimpleNamespace(default_cfg=config)
    assert (transforms(model)(Image.new("RGBA", (28, 28))) == 1).all()
    half = Image.fromarray(np.full((28, 28), 32896, np.uint16))
    assert transforms(model)(half).mean().item() == pytest.approx(128 / 255)
    config |= {"background": "black", "value_range": (0, 65792)}
    assert (transforms(model)(Image.new("RGBA", (28, 28))) == 0).all()
    assert transforms(model)(half).mean().item() == pytest.approx(128 / 255, abs=1 / 255)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "whte"}, "background must be a colour such as white or #808080, got 'whte'"),
        ({"value_range": (5, 5)}, "value_range must be two finite numbers, the lower first, got"),
        ({"value_range": (0, float("inf"))}, "value_range must be two finite numbers"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_8_bit(Image.new("L", (1, 1)), **options)
    with pytest.raises(ValueError, match=message):
        load_data(**options)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return buffer.getvalue()


def test_files_are_found_by_format_and_the_rest_is_counted(tmp_path: Path) -> None:
    """Browsers save .jfif, crawlers no suffix at all: left out without a word, almost nothing of a class remains."""
    names = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c": "PNG", "d.png?w=200": "PNG", "e.jp2": "JPEG2000", "f.webp": "WEBP"}
    if ".avif" in Image.registered_extensions():
        names["g.avif"] = "AVIF"
    for name, kind in names.items():
        (tmp_path / name).write_bytes(encoded(kind))
    for name in ("x.heic", "y.heic", "notes.txt", "Thumbs"):
        (tmp_path / name).write_bytes(b"P1 is no picture")
    (tmp_path / ".hidden.png").write_bytes(encoded("PNG"))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    left_out: Counter[str] = Counter()
    found = image_files(tmp_path, left_out)
    assert [path.name for path in found] == sorted(names)
    assert left_out == {".heic": 2, ".txt": 1, "no suffix": 1, "broken link": 2}
    assert left_out_note(left_out).startswith("left out 6 files that are no images of AVIF, BMP,")
    assert left_out_note(left_out, shown=1).endswith(": 2 broken link, 4 others")
    for path in found:
        assert read_image(path).size == (8, 8)


def test_postscript_starts_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript: a picture from outside must not run a program."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started Ghostscript"))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(BadImageError, match=r"x\.png: cannot identify"):
        read_image(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "plain")
    assert image_files(tmp_path) == []


def test_special_files_and_endless_names_do_not_wait(tmp_path: Path) -> None:
    """Opening a FIFO waits for a writer that never comes."""
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(BadImageError, match=r"x\.png: it is no regular file"):
        read_image(tmp_path / "x.png")
    left_out: Counter[str] = Counter()
    assert image_files(tmp_path, left_out) == [] and left_out == {"special file": 1}
    with pytest.raises(BadImageError) as refusal:
        read_image(tmp_path / ("x" * 100_000))
    assert len(str(refusal.value)) < 2000 and "\n" not in str(refusal.value)
    with pytest.raises(FileNotFoundError, match="image not found"):
        read_image(tmp_path / "none.png")


def test_deep_folders_are_looked_through(tmp_path: Path) -> None:
    """One call per level would end in a RecursionError."""
    deep = tmp_path.joinpath(*["a"] * 80)
    deep.mkdir(parents=True)
    (deep / "x.png").write_bytes(encoded("PNG"))
    image_files(tmp_path)  # what is imported and cached by a first call
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 60)
    try:
        assert len(image_files(tmp_path)) == 1
    finally:
        sys.setrecursionlimit(limit)


def test_an_adapter_with_other_options_is_refused() -> None:
    """They come from a file, and are read again before any picture."""
    assert preprocessing_error({"background": "black", "value_range": [0, 4095]}) is None
    assert preprocessing_error({"background": None, "value_range": None}) is None
    for wrong in ({"background": 3}, {"background": "x" * 9999}, {"value_range": "0,1"}, {"value_range": [1, 0]}):
        found = preprocessing_error(wrong)
        assert found is not None and f"{next(iter(wrong))} must be" in found and len(found) < 700
