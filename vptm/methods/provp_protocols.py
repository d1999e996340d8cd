"""ProVP-Ref's two protocols: few shots of every class, and base classes learned, new ones only named.

The released pipeline scores test images after every epoch and reports the best; here the epoch is chosen on validation
images and the last one is taken where there are none. Its commands for 1, 2 and 4 shots train without the
re-formation loss; here `reformation` alone says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vptm.data.datasets import ImageData, ImageDataset
from vptm.data.division import few_shot
from vptm.data.sources import load_data
from vptm.data.transforms import transforms
from vptm.messages import error_line, one_line, one_of
from vptm.methods.provp import (
    clip_projection,
    is_clip_tower,
    ridge_projection,
    set_class_embeddings,
)
from vptm.methods.reprogramming.label_mapping import embed_names, text_encoder
from vptm.models.opening import open_model
from vptm.models.prompted_model import PromptedModel
from vptm.settings import EVALUATION_BATCH, ProtocolSettings
from vptm.training.devices import device_of
from vptm.training.evaluate import evaluate
from vptm.training.fit import fit
from vptm.training.reformation import FeatureReformation
from vptm.weights.files import read_safetensors

PROTOCOLS = ("few-shot", "base-to-novel")
SHOTS = (1, 2, 4, 8, 16)
FEW_SHOT_EPOCHS = {8: 200, 2: 100, 1: 50}  # from so many shots on


@dataclass(frozen=True)
class ClassFeatures:
    """Embeddings (K, D) of all classes of a data set in its order, and the projection (D, C) from image features to
    their space; None fits one by ridge regression on the images that are trained on, a stand-in for weights that were
    trained with their text encoder."""

    embeddings: Tensor
    projection: Tensor | None = None


@dataclass(frozen=True)
class ProtocolRun:
    """One run: test accuracies in 0..1, of the classes learned (`base`) and, in base-to-novel, of those only named."""

    protocol: str
    shots: int
    seed: int
    base: float
    novel: float | None = None

    @property
    def harmonic(self) -> float | None:
        """Harmonic mean of both."""
        return None if self.novel is None else harmonic_mean(self.base, self.novel)


def published_settings(protocol: str, shots: int) -> dict[str, Any]:
    """`prompt_length`, `epochs` and `weight_decay` of the released commands.

    Example:
        >>> published_settings("few-shot", 4)
        {'prompt_length': 50, 'epochs': 100, 'weight_decay': 0.0005}
    """
    one_of("protocol", protocol, PROTOCOLS)
    if protocol == "base-to-novel":
        return {"prompt_length": 16, "epochs": 100, "weight_decay": 1e-3}
    epochs = next(epochs for least, epochs in FEW_SHOT_EPOCHS.items() if shots >= least)
    return {"prompt_length": 50, "epochs": epochs, "weight_decay": 5e-4}


def harmonic_mean(base: float, novel: float) -> float:
    """`2 b n / (b + n)`, 0 where both are 0.

    Example:
        >>> round(harmonic_mean(0.8520, 0.7322), 4)
        0.7876
    """
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def split_classes(classes: int) -> tuple[list[int], list[int]]:
    """Base and novel labels: the first half in order, rounded up, and the rest.

    Example:
        >>> split_classes(5)
        ([0, 1, 2], [3, 4])
    """
    if classes < 2:
        raise ValueError(f"base-to-novel needs at least two classes, got {classes}")
    half = -(-classes // 2)
    return list(range(half)), list(range(half, classes))


def only_classes(dataset: ImageDataset, labels: Sequence[int]) -> ImageDataset:
    """The images of some classes, with labels numbered anew in the order given."""
    part = dataset.subset(np.flatnonzero(np.isin(dataset.labels, list(labels))))
    new = {label: number for number, label in enumerate(labels)}
    names = [dataset.classes[label] for label in labels]
    numbers = np.array([new[int(label)] for label in part.labels], dtype=np.int64)
    return part.with_labels(numbers, names)


def read_class_features(path: str | Path, classes: Sequence[str]) -> ClassFeatures:
    """Class embeddings from a safetensors file: `embeddings` (K, D), optionally `projection` (D, C), in the metadata
    `class_names`, a JSON list of the K names, which are matched to `classes` by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or a class of the data that it does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"class embeddings not found: {path}")
    tensors, metadata = read_safetensors(path)
    try:
        names = json.loads(metadata.get("class_names", "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must have class_names as a JSON list: {error_line(error)}") from None
    found = tensors.get("embeddings")
    if found is None or found.ndim != 2 or not isinstance(names, list) or len(names) != len(found):
        shape = "none" if found is None else str(tuple(found.shape))
        listed = f"{len(names)} names" if isinstance(names, list) else "no list of names"
        raise ValueError(
            f"{path} must hold embeddings (K, D) and the K class_names in its metadata, got {shape} and {listed}"
        )
    if missing := [name for name in classes if name not in names]:
        raise ValueError(f"{path} has no embedding of the class {missing[0]!r}, it has {', '.join(map(str, names))}")
    return ClassFeatures(found[[names.index(name) for name in classes]].float(), tensors.get("projection"))


def run_protocols(
    protocol: str, settings: ProtocolSettings, *, report: Callable[[str], None] = print
) -> Iterator[ProtocolRun]:
    """Every run of a protocol, for each number of shots and each seed, as `vptm protocol` does.

    Raises:
        ValueError: settings, data or weights that do not fit together.
        FileNotFoundError: a path that does not exist.
    """
    one_of("protocol", protocol, PROTOCOLS)
    device_of(settings.device)
    data = load_data(settings.data, **settings.reading())
    for note in data.notes:
        report(one_line(f"{data.name}: {note}"))
    features = _features(settings, data.classes)
    for shots in settings.counts() or (SHOTS if protocol == "few-shot" else (16,)):
        chosen = published_settings(protocol, shots)
        chosen |= {name: value for name in chosen if (value := getattr(settings, name)) is not None}
        for seed in range(settings.seeds):
            yield _run(protocol, settings, chosen, data, features, shots, seed)


def _run(
    protocol: str,
    settings: ProtocolSettings,
    chosen: Mapping[str, Any],
    data: ImageData,
    features: ClassFeatures,
    shots: int,
    seed: int,
) -> ProtocolRun:
    def build(classes: int) -> PromptedModel:
        return open_model(
            settings.model,
            classes,
            pretrained=True,
            prompt_mode="progressive",
            prompt_length=chosen["prompt_length"],
            progressive_alpha=settings.alpha,
            readout="cls",
            token_activation="hidden",
            verbalizer="linear",
        )

    return run_protocol(
        protocol,
        build,
        data,
        features,
        shots=shots,
        seed=seed,
        ridge=settings.ridge,
        logit_scale=settings.logit_scale,
        augment=settings.augment,
        device=device_of(settings.device),
        epochs=chosen["epochs"],
        lr=settings.lr,
        optimizer="momentum",
        weight_decay=chosen["weight_decay"],
        prompt_weight_decay=chosen["weight_decay"],
        schedule="provp",
        warmup_epochs=min(1, chosen["epochs"] - 1),
        reformation=settings.reformation,
        reformation_temperature=settings.temperature,
        precision=settings.precision,
        compile=settings.compile,
        cuda_graph=settings.cuda_graph,
        progress=False,
    )


def _features(settings: ProtocolSettings, classes: Sequence[str]) -> ClassFeatures:
    """Embeddings of the classes from a file, or of their names, with CLIP's own projection where the model is one."""
    if settings.class_embeddings is not None:
        return read_class_features(settings.class_embeddings, classes)
    is_clip = settings.text_encoder.startswith("open_clip") and is_clip_tower(settings.model)
    embeddings = embed_names(classes, text_encoder(settings.text_encoder), settings.template)
    return ClassFeatures(embeddings, clip_projection(settings.model) if is_clip else None)


def run_protocol(
    protocol: str,
    build: Callable[[int], PromptedModel],
    data: ImageData,
    features: ClassFeatures,
    *,
    shots: int = 16,
    seed: int = 0,
    ridge: float = 0.01,
    logit_scale: float | None = None,
    augment: bool = True,
    batch_size: int = 32,
    device: torch.device | None = None,
    **settings: Any,
) -> ProtocolRun:
    """Train prompts on a few images and classify by class embeddings.

    "few-shot" learns and tests all classes. "base-to-novel" learns the first half of the classes, and is tested among
    those, and among the others by their embeddings alone. The epoch is chosen on validation images of the classes
    learned; test images are read once.

    Args:
        protocol: "few-shot" or "base-to-novel".
        build: number of classes -> a fresh model whose verbalizer is replaced.
        data: as `vptm.load_data` gives it, without transforms.
        features: embeddings of all classes.
        shots: training images of a class.
        seed: of the images drawn, initialisation and training.
        ridge: strength of the fitted projection, where `features` brings none.
        logit_scale: factor of the cosines; None takes CLIP's 100 where `features` brings a projection, and 10 for the
            fitted one, whose cosines lie further apart than CLIP's.
        augment, batch_size: of training.
        device: where to train.
        settings: of `vptm.fit`: epochs, lr, reformation, ...

    Raises:
        ValueError: a class with fewer than `shots` images or without test images, or embeddings that are not one a
            class.
    """
    one_of("protocol", protocol, PROTOCOLS)
    if len(features.embeddings) != len(data.classes):
        raise ValueError(
            f"embeddings must be one for each of the {len(data.classes)} classes, got {len(features.embeddings)}"
        )
    if data.test is None:
        raise ValueError(f"{data.name} has no test images")
    tested = np.bincount(data.test.labels, minlength=len(data.classes))
    if not tested.all():
        raise ValueError(f"{data.name}: the class {data.classes[int(tested.argmin())]!r} has no test image")
    every = list(range(len(data.classes)))
    learned, named = (every, []) if protocol == "few-shot" else split_classes(len(every))
    torch.manual_seed(seed)
    model = build(len(learned))
    if device is not None:
        model.to(device)
    prepare = transforms(model)
    support = few_shot(only_classes(data.train, learned), shots, seed=seed)
    projection = features.projection
    scale = (10.0 if projection is None else 100.0) if logit_scale is None else logit_scale
    if projection is None:
        projection = _fitted_projection(model, support.with_transform(prepare), features.embeddings[learned], ridge)

    def classify(labels: list[int]) -> None:
        names = [data.classes[label] for label in labels]
        model.class_names = None
        set_class_embeddings(
            model, features.embeddings[labels], projection=projection, logit_scale=scale, class_names=names
        )

    def loader(part: ImageDataset, labels: list[int]) -> DataLoader[Any]:
        return DataLoader(only_classes(part, labels).with_transform(prepare), batch_size=EVALUATION_BATCH)

    classify(learned)
    prepared = support.with_transform(transforms(model, train=True, flip=data.flip) if augment else prepare)
    fit(
        model,
        DataLoader(prepared, batch_size=batch_size, shuffle=True),
        None if data.val is None else loader(data.val, learned),
        seed=seed,
        cache_frozen=not augment,
        **settings,
    )
    precision = settings.get("precision")
    base = evaluate(model, loader(data.test, learned), precision=precision)["accuracy"]
    if not named:
        return ProtocolRun(protocol, shots, seed, base)
    classify(named)
    novel = evaluate(model, loader(data.test, named), precision=precision)["accuracy"]
    return ProtocolRun(protocol, shots, seed, base, novel)


@torch.no_grad()
def _fitted_projection(model: PromptedModel, support: ImageDataset, embeddings: Tensor, strength: float) -> Tensor:
    """The ridge map from the frozen features of the support images to the embeddings of their classes."""
    frozen = FeatureReformation(model)
    place = model.prompts.weight.device
    features, labels = [], []
    for images, targets in DataLoader(support, batch_size=EVALUATION_BATCH):
        features.append(frozen.frozen(images.to(place)).cpu())
        labels.append(targets)
    return ridge_projection(torch.cat(features), torch.cat(labels), embeddings, strength=strength)
