"""A whole classifier for a new task from one for another: `vptm map`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import center_crop, resize, to_tensor

from vptm.data.datasets import ImageData
from vptm.data.decoding import to_8_bit
from vptm.data.division import few_shot
from vptm.data.sources import load_data
from vptm.methods.reprogramming.label_mapping import (
    LabelMapping,
    assign,
    bayesian_mapping,
    frequency_mapping,
    label_counts,
    random_mapping,
    semantic_scores,
    text_encoder,
)
from vptm.methods.reprogramming.pixel_prompts import ReprogrammedClassifier, VisualPrompt, fit_visual_prompt
from vptm.methods.reprogramming.source_classifier import SourceClassifier, load_classifier
from vptm.settings import MapSettings, parse_shots
from vptm.training.devices import device_of
from vptm.training.run_folder import located


def map_labels(
    settings: MapSettings, *, data: ImageData | None = None, report: Callable[[str], None] = print
) -> tuple[list[list[str]], float | None]:
    """Map a classifier's labels to the classes of a data set, as `vptm map` does.

    Args:
        settings: what to map, and how.
        data: the pictures, without transforms, in place of those that `settings` names.
        report: called with lines on what is found.

    Returns:
        The mapping as rows of (label, source labels, score of the first), and the test accuracy, None where it was not
        asked for.

    Raises:
        ValueError: settings, data or weights that do not fit together.
        FileNotFoundError: a path that does not exist.
    """
    place = device_of(settings.device)
    # what can be refused is, before a classifier is loaded
    encode = text_encoder(settings.text_encoder) if settings.method == "semantic" else None
    images = load_data(located("data", settings.data), **settings.reading()) if data is None else data
    source = load_classifier(settings.classifier, weights=settings.weights, labels=settings.source_labels)
    for note in (*images.notes, *source.notes):
        report(note)
    labels, sources, m, method = images.classes, source.labels, settings.m, settings.method
    scores = None
    if encode is not None:
        scores = semantic_scores(labels, sources, encode, template=settings.template)
        chosen = assign(scores, settings.assignment, m=m, threshold=settings.threshold)
    elif method == "blm":
        chosen = torch.ones(len(labels), len(sources))  # until images are counted; sources are shared
    else:
        chosen = random_mapping(len(labels), len(sources), m=m, seed=settings.seed)
    border = _border(settings, source)
    model = ReprogrammedClassifier(source.model, LabelMapping(chosen, settings.aggregation), border).to(place)
    prepare = source.prepare if settings.prompt != "expansive" else _inside(settings.image_size)
    if border is not None or method in ("flm", "blm"):
        shots = parse_shots(settings.shots)
        part = images.train if shots is None else few_shot(images.train, shots, seed=settings.seed)
        train = DataLoader(part.with_transform(prepare), batch_size=settings.batch_size, shuffle=True)
        if border is not None:
            update, epochs = "fixed" if method in ("semantic", "random") else method, settings.epochs
            losses = fit_visual_prompt(
                model, train, epochs=epochs, lr=settings.lr, update=update, m=m, seed=settings.seed
            )
            report(f"border trained for {epochs} epochs, loss {losses[0]:.4f} to {losses[-1]:.4f}")
        else:
            batches = ((pixels.to(place), targets) for pixels, targets in train)
            scores = label_counts(source.model, batches, len(labels))
            found = bayesian_mapping(scores) if method == "blm" else frequency_mapping(scores, m=m)
            model.mapping = LabelMapping(found, settings.aggregation).to(place)
    rows = []
    for label, joined in zip(labels, model.mapping.sources()):
        strength = "" if scores is None else f"{float(scores[labels.index(label), joined[0]]):.4f}"
        rows.append([label, "; ".join(sources[index] for index in joined[:10]), strength])
    if not settings.evaluate or images.test is None:
        return rows, None
    loader = DataLoader(images.test.with_transform(prepare), batch_size=settings.batch_size)
    return rows, _accuracy(model, loader, place)


def _border(settings: MapSettings, source: SourceClassifier) -> VisualPrompt | None:
    if settings.prompt is None:
        return None
    config: dict[str, Any] = source.data_config
    return VisualPrompt(
        settings.prompt,
        size=config["input_size"][-1],
        image_size=settings.image_size,
        border=settings.border,
        mean=config["mean"],
        std=config["std"],
    )


def _inside(size: int) -> Callable[[Image.Image], Tensor]:
    """PIL image -> (3, size, size) in 0..1, for the middle of an expansive border."""
    return lambda image: to_tensor(center_crop(resize(to_8_bit(image).convert("RGB"), size), [size, size]))


@torch.no_grad()
def _accuracy(model: ReprogrammedClassifier, loader: DataLoader[Any], device: torch.device) -> float:
    correct = seen = 0
    model.eval()
    for images, labels in loader:
        correct += int((model(images.to(device)).argmax(dim=1).cpu() == labels).sum())
        seen += len(labels)
    return correct / seen
