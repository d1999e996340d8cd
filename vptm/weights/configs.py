"""What a source says about itself beyond its tensors: vptm's metadata, and the configs of transformers and timm."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models.beit import Beit

from vptm.weights.architecture import mlp_ratio_of, pair
from vptm.weights.files import read_json
from vptm.weights.preprocessing import INTERPOLATIONS, floats, interpolation_name, positive, share

HUGGINGFACE_EPS = 1e-12
_HF_INTERPOLATION = {str(number): name for number, name in enumerate(INTERPOLATIONS)}


@dataclass
class SourceFacts:
    """What a source says about itself beyond its tensors; the shapes must confirm `architecture`, keyword arguments of
    timm's Beit."""

    format: str | None = None
    eps: float | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    stated_by: str = "the file"
    interpolation: str = "bicubic"
    crop_pct: float | None = None
    notes: list[str] = field(default_factory=list)


def vptm_facts(metadata: Mapping[str, str], label: str) -> SourceFacts:
    """From the metadata of a safetensors file that vptm wrote."""
    try:
        stated = json.loads(metadata["vptm"])
        architecture = dict(stated["architecture"])
        for key in ("mlp_ratio", "init_values"):
            if key in architecture and (key == "mlp_ratio" or architecture[key] is not None):
                architecture[key] = positive(architecture[key], key, label)
        facts = SourceFacts(
            format="vptm",
            eps=positive(stated["eps"], "eps", label),
            architecture={k: tuple(v) if isinstance(v, list) else v for k, v in architecture.items()},
            vocab_size=stated.get("vocab_size"),
            mean=floats(stated["mean"], "mean", label),
            std=floats(stated["std"], "std", label),
            interpolation=interpolation_name(stated.get("interpolation", "bicubic"), label),
            crop_pct=share(stated.get("crop_pct", 1.0), "crop_pct", label),
            notes=[str(stated["description"])] if stated.get("description") else [],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{label}: the vptm metadata must have architecture, eps, mean and std: {error!r}") from error
    unknown = sorted(set(architecture) - set(inspect.signature(Beit.__init__).parameters))
    channels = architecture.get("in_chans", 3)
    if len(facts.mean or ()) != channels or len(facts.std or ()) != channels:
        raise ValueError(f"{label}: must have mean and std of {channels} channels, got {facts.mean} and {facts.std}")
    if unknown:
        raise ValueError(
            f"{label}: architecture must have keyword arguments of timm's Beit only, got {', '.join(unknown)}"
        )
    return facts


def folder_facts(path: Path, label: str) -> SourceFacts:
    """From a `config.json` of transformers or timm, and the `preprocessor_config.json` beside it."""
    config = read_json(path, label)
    if "model_type" not in config and isinstance(config.get("pretrained_cfg"), dict):
        return _timm_facts(config["pretrained_cfg"], label)
    if config.get("model_type") != "beit":
        raise ValueError(f"{label}: config.json must have model_type beit, got {config.get('model_type')!r}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{label}: config.json must have hidden_act gelu, got {config['hidden_act']!r}")

    def whole(key: str, default: int) -> int:
        value = config.get(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{label}: config.json {key} must be a positive integer, got {value!r}")
        return value

    width, scale = whole("hidden_size", 768), config.get("layer_scale_init_value", 0.1)
    patch = pair(config.get("patch_size", 16), f"{label}: config.json patch_size")
    facts = SourceFacts(
        format="huggingface",
        eps=positive(config.get("layer_norm_eps", HUGGINGFACE_EPS), "layer_norm_eps", label),
        vocab_size=whole("vocab_size", 8192),
        architecture={
            "img_size": pair(config.get("image_size", 224), f"{label}: config.json image_size"),
            "patch_size": patch[0] if patch[0] == patch[1] else patch,
            "in_chans": whole("num_channels", 3),
            "embed_dim": width,
            "depth": whole("num_hidden_layers", 12),
            "num_heads": whole("num_attention_heads", 12),
            "mlp_ratio": mlp_ratio_of(whole("intermediate_size", 3072), width),
            "init_values": positive(scale, "layer_scale_init_value", label) if scale else None,
            "use_abs_pos_emb": bool(config.get("use_absolute_position_embeddings", False)),
            "use_rel_pos_bias": bool(config.get("use_relative_position_bias", False)),
            "use_shared_rel_pos_bias": bool(config.get("use_shared_relative_position_bias", False)),
        },
    )
    preprocessor = path.with_name("preprocessor_config.json")
    if not preprocessor.is_file():
        facts.mean = facts.std = (0.5,) * facts.architecture["in_chans"]
        facts.stated_by = "Hugging Face's default, there is no preprocessor_config.json"
        return facts
    steps = read_json(preprocessor, label)
    if "image_mean" in steps and "image_std" in steps:
        facts.mean = floats(steps["image_mean"], "image_mean", label)
        facts.std = floats(steps["image_std"], "image_std", label)
        facts.stated_by = "preprocessor_config.json"
    resample = steps.get("resample", 3)
    if str(resample) not in _HF_INTERPOLATION:
        raise ValueError(f"{label}: resample must be one of {', '.join(_HF_INTERPOLATION)}, got {resample!r}")
    facts.interpolation = _HF_INTERPOLATION[str(resample)]
    facts.crop_pct = _crop_pct(steps, label)
    return facts


def _timm_facts(cfg: dict[str, Any], label: str) -> SourceFacts:
    facts = SourceFacts(format="timm", interpolation=interpolation_name(cfg.get("interpolation", "bicubic"), label))
    if "mean" in cfg and "std" in cfg:
        facts.mean, facts.std = floats(cfg["mean"], "mean", label), floats(cfg["std"], "std", label)
        facts.stated_by = "config.json"
    if "crop_pct" in cfg:
        facts.crop_pct = share(cfg["crop_pct"], "crop_pct", label)
    return facts


def _crop_pct(steps: dict[str, Any], label: str) -> float:
    """Share of the resized image that a Hugging Face processor keeps: crop_size / size, 1 without a centre crop."""

    def edge(name: str) -> float | None:
        value = steps.get(name)
        if isinstance(value, dict):
            value = value.get("shortest_edge", value.get("height"))
        return None if value is None else positive(value, name, label)

    if not steps.get("do_center_crop"):
        return 1.0
    size, crop = edge("size"), edge("crop_size")
    return crop / size if size and crop and crop <= size else 1.0
