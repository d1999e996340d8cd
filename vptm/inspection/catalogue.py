"""What can be opened by name: the built-in model and timm's published weights, without a model, a file or a network."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

import timm
from timm.models import get_pretrained_cfg

from vptm.models.opening import kind_of
from vptm.settings import MODEL_SETTINGS
from vptm.weights.beits import load_backbone, probe
from vptm.weights.families import TIMM_MODULES
from vptm.weights.vits import check_backbone

NOT_STATED = "not stated"


class OpenableModel(NamedTuple):
    """One source that `vptm.open_model` takes by name.

    kind: as `vptm.settings.MODEL_SETTINGS` describes it. readout: its default. input_size: (channels, height, width).
    parameters: of the backbone without a classifier. license: of the published weights, as timm states it.
    token_head: whether the weights predict visual tokens, which VPTM's own read-out needs.
    """

    name: str
    kind: str
    readout: str
    input_size: tuple[int, int, int]
    parameters: int
    license: str
    token_head: bool


def openable_models(pattern: str | None = None) -> list[OpenableModel]:
    """The built-in model and every published weight of timm whose architecture opens, by name.

    Args:
        pattern: with `*` and `?` as in file names; without them, a part of the name; None for all.

    Raises:
        ValueError: nothing matches.

    Example:
        >>> openable_models("built*")[0].token_head
        True
        >>> openable_models("dinov2")[0].readout
        'cls'
    """
    wanted = pattern if pattern is None or set(pattern) & set("*?[") else f"*{pattern}*"
    found = [_builtin()] if wanted is None or fnmatchcase("builtin", wanted) else []
    for module in TIMM_MODULES:
        for name in timm.list_models(module=module, pretrained=True, include_tags=True):
            if (wanted is None or fnmatchcase(name, wanted)) and (facts := _facts(name.partition(".")[0])):
                found.append(_published(name, *facts))
    if not found:
        raise ValueError(f"pattern must match a name, got {pattern!r}: `vptm models` without one lists all")
    return found


def architectures() -> list[str]:
    """timm's names, without tags, of the classes that open."""
    return [name for module in TIMM_MODULES for name in timm.list_models(module=module)]


def looked_up(architecture: str) -> tuple[str, int] | None:
    """Kind and parameters of a timm architecture, built on the meta device; None where it does not open."""
    model: Any = probe(architecture)
    try:
        kind = kind_of(model)
        if MODEL_SETTINGS[kind].whom.startswith("a ViT"):
            check_backbone(model, architecture)
    except ValueError:
        return None
    model.reset_classifier(0)
    return kind, sum(parameter.numel() for parameter in model.parameters())


@cache
def _table() -> dict[str, tuple[str, int]]:
    path = importlib.resources.files("vptm") / "assets" / "backbones.json"
    return {name: (kind, count) for name, (kind, count) in json.loads(path.read_text(encoding="utf-8")).items()}


@cache
def _facts(architecture: str) -> tuple[str, int] | None:
    known = _table().get(architecture)
    return known or looked_up(architecture)  # of a timm that is newer than the table


def _published(name: str, kind: str, parameters: int) -> OpenableModel:
    cfg: Any = get_pretrained_cfg(name)
    return _row(name, kind, cfg.input_size, parameters, cfg.license or NOT_STATED)


def _builtin() -> OpenableModel:
    loaded = load_backbone("builtin")
    count = sum(parameter.numel() for parameter in loaded.backbone.parameters())
    return _row("builtin", "beit", loaded.default_cfg["input_size"], count, "apache-2.0", token_head=True)


def _row(
    name: str, kind: str, size: Sequence[int], parameters: int, terms: str, *, token_head: bool = False
) -> OpenableModel:
    settings = MODEL_SETTINGS[kind]
    whom, pixels = settings.whom.removeprefix("a "), (size[0], size[1], size[2])
    return OpenableModel(name, whom, settings().readout, pixels, parameters, terms, token_head)
