"""What a source holds, as rows for a terminal: also where something is missing, or does not fit."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vptm.messages import WITH_PATHS, error_line, one_line
from vptm.weights.adapter_format import (
    CONFIG_FILE,
    TENSORS_FILE,
    changed_since,
    read_adapter_config,
    read_adapter_tensors,
)
from vptm.weights.beits import folded_names, is_timm_name, load_backbone, probe, report_of_name
from vptm.weights.containers import read_checkpoint, told_of
from vptm.weights.files import check_values
from vptm.weights.key_maps import WRAPPERS, canonical_names, is_huggingface, is_index, unwrap
from vptm.weights.vits import load_vit

Rows = list[tuple[str, str]]
_PARTS = {
    "class token": ("cls_token",),
    "patch embedding": ("patch_embed.proj.weight", "patch_embed.proj.bias"),
    "absolute positions": ("pos_embed",),
    "shared position table": ("rel_pos_bias.relative_position_bias_table",),
    "position table of block 0": ("blocks.0.attn.relative_position_bias_table",),
    "mask token": ("mask_token",),
    "visual-token head": ("lm_head.weight", "lm_head.bias"),
    "final norm": ("norm.weight", "norm.bias"),
    "norm after pooling": ("fc_norm.weight", "fc_norm.bias"),
    "classifier": ("head.weight", "head.bias"),
}


def describe(source: str | os.PathLike[str]) -> Rows:
    """(label, value) rows of what a source of a model, or an adapter or run folder, holds.

    A backbone that loads is described by the report of its loader (`vptm.weights.beits.LoadReport`,
    `vptm.weights.vits.ViTReport`), a timm model of another class and an adapter by what they state. Of one that does
    not load all that can be read is shown, and why it does not load in a row "problem". Nothing is downloaded for a
    timm name; a hub id is.

    Args:
        source: as `vptm.open_model` takes it, any other timm name, or a folder of an adapter or a run.

    Raises:
        FileNotFoundError: there is nothing so called.
        ValueError: an unknown name, or a file of which nothing can be read.

    Example:
        >>> dict(describe("builtin"))["format"]
        'vptm'
        >>> dict(describe("deit_tiny_patch16_224"))["architecture"]
        '12 blocks, 192 wide, 3 heads of 64'
    """
    folder = Path(source)
    if os.path.isdir(folder) and any((folder / name).is_file() for name in (CONFIG_FILE, TENSORS_FILE)):
        rows = _adapter_rows(folder)
    elif is_timm_name(source):
        rows = _timm_rows(str(source))
    else:
        try:
            loaded = load_vit(source) if _is_vit(source) else load_backbone(source)
            return loaded.report.lines()
        except ValueError as error:
            checkpoint = read_checkpoint(source)
            if checkpoint is None:
                raise
            rows = [("source", str(source)), *_tensor_rows(checkpoint.state, str(source)), ("problem", str(error))]
    return [(one_line(label, 80), one_line(value, WITH_PATHS)) for label, value in rows]


def _is_vit(source: str | os.PathLike[str]) -> bool:
    told = told_of(source)
    return told is not None and told.family == "vit"


def _timm_rows(name: str) -> Rows:
    base, _, tag = name.partition(".")
    tags = timm.list_pretrained(f"{base}.*")
    model: Any = probe(base)
    if isinstance(model, Beit):
        rows = [("source", name), *report_of_name(base).lines()[1:]]
    else:
        rows = [("source", name), ("format", "timm-name"), ("class", type(model).__name__)]
    if isinstance(model, VisionTransformer | Eva):
        size = " x ".join(map(str, (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)))
        patch = " x ".join(map(str, model.patch_embed.patch_size))
        window = " x ".join(map(str, model.patch_embed.grid_size))
        attention: Any = model.blocks[0].attn if hasattr(model.blocks[0], "attn") else None
        heads = "" if attention is None else f", {attention.num_heads} heads of {attention.head_dim}"
        rows += [
            ("architecture", f"{len(model.blocks)} blocks, {model.embed_dim} wide{heads}"),
            ("input", f"{size}, patch {patch}, window {window}"),
            ("rows before the patches", str(model.num_prefix_tokens)),
        ]
    rows.append(("values", f"{sum(parameter.numel() for parameter in model.parameters()):,}"))
    rows.append(("pretrained weights", ", ".join(tags) or "none"))
    if tag and name not in tags:
        rows.append(("problem", f"pretrained tag must be one of {', '.join(tags)}"))
    if not isinstance(model, VisionTransformer | Eva | Beit):
        classes = "Beit, VisionTransformer and Eva"
        rows.append(("problem", f"prompts go into timm's {classes}, this is a {type(model).__name__}"))
    return rows


def _tensor_rows(state: Mapping[str, Any], label: str) -> Rows:
    """What is in a checkpoint that does not load."""
    try:
        tensors, dropped = unwrap(state, label)
        names = "Hugging Face" if is_huggingface(tensors) else "unilm or timm"
        tensors = canonical_names(tensors, label)
    except ValueError:
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), state)
        tensors = {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}
        dropped, names = [str(key) for key in inner if not isinstance(inner[key], Tensor)], "as they stand in the file"
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    blocks = sorted({int(found[1]) for key in tensors if (found := re.match(r"blocks\.(\d{1,9})\.", key))})
    rows = [
        ("names", names),
        ("tensors", ", ".join(f"{count} of {dtype}" for dtype, count in dtypes.most_common()) or "none"),
        ("values", f"{sum(tensor.numel() for tensor in tensors.values()):,}"),
        ("blocks", f"{len(blocks)}, from {blocks[0]} to {blocks[-1]}" if blocks else "none"),
    ]
    for part, keys in _PARTS.items():
        shapes = [f"{key} {_shape(tensors[key])}" if key in tensors else f"{key} missing" for key in keys]
        rows.append((part, ", ".join(shapes) if any(key in tensors for key in keys) else "missing"))
    known = {key for keys in _PARTS.values() for key in keys}
    others = [key for key in tensors if key not in known and not key.startswith("blocks.") and not is_index(key)]
    return [*rows, ("other tensors", folded_names(others)), ("beside them", folded_names(dropped))]


def _adapter_rows(folder: Path) -> Rows:
    rows: Rows = []
    problems: list[tuple[str, str]] = []

    def part(read: Callable[[], Rows]) -> None:
        try:
            rows.extend(read())
        except (ValueError, OSError) as error:
            problems.append(("problem", error_line(error)))

    configs: list[dict[str, Any]] = []

    def config_rows() -> Rows:
        configs.append(read_adapter_config(folder))
        return _config_rows(configs[0])

    part(config_rows)
    if (folder / TENSORS_FILE).is_file():
        part(lambda: _learned_rows(folder, configs[0] if configs else None))
    return rows + problems


def _config_rows(config: dict[str, Any]) -> Rows:
    backbone, model = config["backbone"], config["model"]
    return [
        ("adapter", f"schema {config['schema_version']}, written by vptm {config.get('vptm_version')}"),
        ("backbone", f"{backbone.get('source')} {backbone['weight_hash']}"),
        ("classes", ", ".join(config.get("class_names") or []) or str(model.get("num_classes"))),
        *((name, str(value)) for name, value in model.items()),
        *((str(name), str(value)) for name, value in (config.get("extra") or {}).items()),
    ]


def _learned_rows(folder: Path, config: dict[str, Any] | None) -> Rows:
    tensors, stated = read_adapter_tensors(folder)
    rows = [(f"learned {name}", _shape(tensor)) for name, tensor in tensors.items()]
    rows.append(("learned values", f"{sum(tensor.numel() for tensor in tensors.values()):,}"))
    if changed := changed_since("", config, tensors, stated):
        rows.append(("problem", changed))
    try:
        check_values(tensors)
    except ValueError as error:
        rows.append(("problem", str(error)))
    return rows


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
