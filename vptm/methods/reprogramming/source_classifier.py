"""Classifiers whose labels are mapped: a timm model with its weights, its preprocessing and the names of its labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn

from vptm.data.decoding import to_8_bit
from vptm.messages import error_line, hint
from vptm.weights.files import one_line_errors, read_safetensors, read_torch


class SourceClassifier(NamedTuple):
    """A frozen classifier, its preprocessing (PIL image -> normalised tensor), timm's data settings, and its labels."""

    model: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    data_config: dict[str, Any]
    labels: list[str]
    notes: tuple[str, ...] = ()


def load_classifier(
    name: str, *, weights: str | Path | None = None, labels: str | Path | None = None
) -> SourceClassifier:
    """A timm classifier with the names of its labels.

    Args:
        name: of a timm model.
        weights: a `.safetensors` or `.pth` state dict of the whole model; None takes timm's own. One with other names
            fits where it has as many tensors, of the same shapes in the same order; that is said in `notes`.
        labels: a text file with a label on every line, in the order of the outputs; None takes ImageNet's 1000 names,
            the first of every synonym list.

    Raises:
        ValueError: an unknown model, weights that do not fit, or another number of labels than outputs.
        FileNotFoundError: a file that does not exist.
    """
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise ValueError(f"classifier must be a timm model, got {name!r}{hint(base, timm.list_models())}")
    notes: list[str] = []
    if weights is None:
        model = timm.create_model(name, pretrained=True)
    else:
        state = _read(Path(weights))
        head = timm.models.get_pretrained_cfg_value(name, "classifier")
        last = state.get(f"{head}.weight", next(reversed(list(state.values()))))
        model = timm.create_model(name, num_classes=len(last) if last.ndim else 0)
        expected = model.state_dict()
        if expected.keys() != state.keys():
            shapes = [tuple(tensor.shape) for tensor in state.values()]
            if shapes != [tuple(tensor.shape) for tensor in expected.values()]:
                raise ValueError(f"{weights} does not fit {name}: other names and other shapes")
            notes.append(f"{weights} names its tensors otherwise than timm: matched by order and shape")
            state = dict(zip(expected, state.values()))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit {name}: {error_line(error, 200)}") from None
    # convolutions with the channels last take 0.7 of the time
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    config = resolve_model_data_config(model)
    outputs = model.num_classes
    if labels is not None:
        path = Path(labels)
        if not path.is_file():
            raise FileNotFoundError(f"labels not found: {path}")
        with one_line_errors(labels):
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        info = ImageNetInfo()
        names = [info.index_to_description(index).partition(",")[0] for index in range(info.num_classes())]
    if len(names) != outputs:
        given = "ImageNet" if labels is None else str(labels)
        raise ValueError(f"labels must name all {outputs} outputs of {name}, {given} has {len(names)}")
    transform = create_transform(**config, is_training=False)
    return SourceClassifier(model, lambda image: transform(to_8_bit(image).convert("RGB")), config, names, tuple(notes))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights not found: {path}")
    state: Any
    with one_line_errors(path):
        state = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_torch(path)
    state = state.get("state_dict", state)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state dict of tensors")
    return state
