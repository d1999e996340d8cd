"""What torchvision keeps in a folder, by way of timm. Nothing is fetched."""

from __future__ import annotations

import numpy as np
from timm.data import create_dataset

from vptm.data.datasets import ImageDataset
from vptm.messages import one_line, one_of

# by timm's names; what lies in folders of classes is read as such
_CLASSES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "kmnist": "KMNIST",
    "fashion_mnist": "FashionMNIST",
}


def read_torchvision(source: str) -> tuple[dict[str, ImageDataset], str, bool]:
    """The train and test pictures of NAME:FOLDER, the name, and whether the pictures may be mirrored.

    Raises:
        FileNotFoundError: not in the folder, or damaged there; it says how to fetch it.
        ValueError: another name, or no folder.
    """
    name, _, folder = source.partition(":")
    one_of("data after torch/", name, tuple(_CLASSES))
    if not folder:
        raise ValueError(f"data must name the folder that holds it, torch/{name}:FOLDER, got 'torch/{name}'")
    parts = {}
    for split in ("train", "test"):
        try:
            found = create_dataset(f"torch/{name}", root=folder, split=split, download=False)
        except RuntimeError:
            raise FileNotFoundError(
                f"data torch/{name} not found in {one_line(folder, 1000)}: fetch it once with: "
                f'python -c "import torchvision; torchvision.datasets.{_CLASSES[name]}({folder!r}, download=True)"'
            ) from None
        keys = [f"{split}/{index}" for index in range(len(found))]
        parts[split] = ImageDataset(np.asarray(found.data), np.asarray(found.targets), found.classes, keys=keys)
    return parts, name, name not in ("mnist", "kmnist")
