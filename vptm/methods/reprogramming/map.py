"""A whole classifier for a new task from one for another: `vptm map`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import center_crop, resize, to_tensor

from vptm.data.datasets import ImageData, few_shot, load_data
from vptm.data.pictures import BACKGROUND, to_8_bit
from vptm.messages import one_of
from vptm.methods.reprogramming.label_mapping import (
    ASSIGNMENTS,
    LabelMapping,
    assign,
    bayesian_mapping,
    frequency_mapping,
    label_counts,
    random_mapping,
    semantic_scores,
    text_encoder,
)
from vptm.methods.reprogramming.pixel_prompts import (
    PIXEL_PROMPTS,
    ReprogrammedClassifier,
    VisualPrompt,
    fit_visual_prompt,
)
from vptm.methods.reprogramming.source_classifier import SourceClassifier, load_classifier

METHODS = ("semantic", "random", "flm", "ilm", "blm")


def map_labels(
    *,
    data: str | ImageData,
    classifier: str,
    weights: Path | None,
    source_labels: Path | None,
    method: str,
    assignment: str,
    m: int,
    threshold: float,
    aggregation: str,
    template: str | Sequence[str],
    encoder: str,
    prompt: str | None,
    image_size: int,
    border: int,
    shots: int | None,
    epochs: int,
    lr: float,
    batch_size: int,
    test: bool,
    seed: int,
    device: torch.device,
    report: Callable[[str], None],
    background: str = BACKGROUND,
    value_range: tuple[float, float] | None = None,
) -> tuple[list[list[str]], float | None]:
    """The mapping as rows of (label, source labels, score of the first), and the test accuracy.

    See `vptm map --help` for the arguments; `data` may also be loaded already, without transforms, and `template` may
    be several. `assignment`, `threshold`, `template` and `encoder` are of method "semantic"; "blm" takes no `m`.
    """
    one_of("--method", method, METHODS)
    one_of("--assignment", assignment, ASSIGNMENTS)
    if m < 1:
        raise ValueError(f"--m must be >= 1, got {m}")
    if prompt is not None:
        one_of("--prompt", prompt, PIXEL_PROMPTS)
    if method == "ilm" and prompt is None:
        raise ValueError(
            "--method ilm counts again after every epoch of a pixel prompt: pass --prompt, or --method flm"
        )
    if aggregation != "mean" and method == "blm":
        raise ValueError(f"--aggregation must be mean for the soft mapping of --method blm, got {aggregation}")
    # what can be refused is, before a classifier is loaded
    encode = text_encoder(encoder) if method == "semantic" else None
    images = data if isinstance(data, ImageData) else load_data(data, background=background, value_range=value_range)
    source = load_classifier(classifier, weights=weights, labels=source_labels)
    for note in (*images.notes, *source.notes):
        report(note)
    labels, sources = images.classes, source.labels
    scores = None
    if encode is not None:
        scores = semantic_scores(labels, sources, encode, template=template)
        chosen = assign(scores, assignment, m=m, threshold=threshold)
    elif method == "blm":
        chosen = torch.ones(len(labels), len(sources))  # until images are counted; sources are shared
    else:
        chosen = random_mapping(len(labels), len(sources), m=m, seed=seed)
    border_of = _prompt(prompt, source, image_size, border)
    model = ReprogrammedClassifier(source.model, LabelMapping(chosen, aggregation), border_of).to(device)
    prepare = source.prepare if prompt != "expansive" else _inside(image_size)
    if prompt is not None or method in ("flm", "blm"):
        part = images.train if shots is None else few_shot(images.train, shots, seed=seed)
        train = DataLoader(part.with_transform(prepare), batch_size=batch_size, shuffle=True)
        if prompt is not None:
            update = "fixed" if method in ("semantic", "random") else method
            losses = fit_visual_prompt(model, train, epochs=epochs, lr=lr, update=update, m=m, seed=seed)
            report(f"border trained for {epochs} epochs, loss {losses[0]:.4f} to {losses[-1]:.4f}")
        else:
            batches = ((pixels.to(device), targets) for pixels, targets in train)
            scores = label_counts(source.model, batches, len(labels))
            found = bayesian_mapping(scores) if method == "blm" else frequency_mapping(scores, m=m)
            model.mapping = LabelMapping(found, aggregation).to(device)
    rows = []
    for label, joined in zip(labels, model.mapping.sources()):
        strength = "" if scores is None else f"{float(scores[labels.index(label), joined[0]]):.4f}"
        rows.append([label, "; ".join(sources[index] for index in joined[:10]), strength])
    if not test or images.test is None:
        return rows, None
    return rows, _accuracy(model, DataLoader(images.test.with_transform(prepare), batch_size=batch_size), device)


def _prompt(mode: str | None, source: SourceClassifier, image_size: int, border: int) -> VisualPrompt | None:
    if mode is None:
        return None
    config: dict[str, Any] = source.data_config
    size = config["input_size"][-1]
    return VisualPrompt(mode, size=size, image_size=image_size, border=border, mean=config["mean"], std=config["std"])


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
