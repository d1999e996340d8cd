"""Training runs of a second on a tiny backbone, and what is compared of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_data import picture
from torch.utils.data import DataLoader, Dataset

from vptm import PromptedBEiT, fit, transforms
from vptm.data.datasets import ImageDataset
from vptm.training.run_folder import METRICS_FILE
from vptm.weights.adapter_format import CONFIG_FILE, TENSORS_FILE
from vptm.weights.files import weight_hash

LEARNS = {"readout": "mean", "token_activation": "hidden", "verbalizer": "linear", "prompt_length": 3}


def make_model(backbone: Path, seed: int = 0, **arguments: Any) -> PromptedBEiT:
    torch.manual_seed(seed)
    return PromptedBEiT(backbone, 3, **{"prompt_length": 3, "prototype_dim": 8, **arguments})


def pictures(count: int, first: int = 0) -> ImageDataset:
    images = np.stack([np.asarray(picture(k % 3, first + k)) for k in range(count)])
    return ImageDataset(images, np.arange(count) % 3, ["a", "b", "c"], keys=[str(k) for k in range(count)])


def loaders(model: PromptedBEiT, batch_size: int = 5, **options: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Shuffled, augmented train pictures (12, so the last batch of 5 is short) and 9 val pictures."""
    train = pictures(12).with_transform(transforms(model, train=True, flip=False))
    val = pictures(9, first=100).with_transform(transforms(model))
    return DataLoader(train, batch_size=batch_size, shuffle=True, **options), DataLoader(val, batch_size=4)


def run(model: PromptedBEiT, folder: Path | None = None, **arguments: Any) -> Any:
    train, val = loaders(model)
    options: dict[str, Any] = {"epochs": 4, "lr": 0.02, "warmup_epochs": 1, "progress": False, "run_dir": folder}
    return fit(model, train, val, **(options | arguments))


class Interrupting(Dataset[Any]):
    """Raises KeyboardInterrupt when its n-th image is read, as Ctrl-C would."""

    def __init__(self, inner: Any, at: int) -> None:
        self.inner, self.at, self.reads = inner, at, 0
        self.labels = inner.labels if isinstance(inner, ImageDataset) else inner.tensors[1].numpy()

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.reads == self.at:
            raise KeyboardInterrupt
        return self.inner[index]


def stopped_run(model: PromptedBEiT, folder: Path, epochs: int, **arguments: Any) -> None:
    """A run of `epochs` stopped by Ctrl-C early in its last one."""
    train, val = loaders(model)
    broken = DataLoader(Interrupting(train.dataset, 12 * (epochs - 1) + 2), batch_size=5, shuffle=True)  # type: ignore[arg-type]
    options: dict[str, Any] = {"lr": 0.02, "warmup_epochs": 1, "progress": False, "run_dir": folder}
    assert fit(model, broken, val, epochs=epochs, **(options | arguments)).interrupted


def write_as_of_schema(folder: Path, config: dict[str, Any], schema: int, tensors: Any = None) -> None:
    """The adapter in `folder` as an older vptm wrote it: `config`, and tensors with no hash but their own."""
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"schema_version": schema}))
    tensors = load_file(folder / TENSORS_FILE) if tensors is None else tensors
    save_file(tensors, folder / TENSORS_FILE, metadata={"vptm_hash": weight_hash(tensors)})


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv but for the clock."""
    with (folder / METRICS_FILE).open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(one: Path, two: Path) -> None:
    for name in (TENSORS_FILE, CONFIG_FILE):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert metrics(one) == metrics(two)
