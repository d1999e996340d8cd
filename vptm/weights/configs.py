"""What a source says about itself beyond its tensors: vptm's metadata, and the configs of transformers and timm."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.beit import Beit

from vptm.weights.beit_architecture import mlp_ratio_of, pair
from vptm.weights.families import MODEL_TYPES, Family, family_of_timm
from vptm.weights.files import read_json
from vptm.weights.preprocessing import INTERPOLATIONS, floats, interpolation_name, positive, share

HUGGINGFACE_EPS = 1e-12


class _Defaults(NamedTuple):
    """What a config of transformers leaves out where it is the default of its kind."""

    eps: float = HUGGINGFACE_EPS
    activation: str = "gelu"
    patch_size: int = 16


_VIT_DEFAULTS = {
    "vit": _Defaults(),
    "vit_msn": _Defaults(eps=1e-6),
    "dinov2": _Defaults(eps=1e-6, patch_size=14),
    "dinov2_with_registers": _Defaults(eps=1e-6),
    "clip": _Defaults(eps=1e-5, activation="quick_gelu", patch_size=32),
    "siglip": _Defaults(eps=1e-6, activation="gelu_pytorch_tanh"),
}
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_HF_INTERPOLATION = {str(number): name for number, name in enumerate(INTERPOLATIONS)}


@dataclass
class SourceFacts:
    """What a source says about itself beyond its tensors; the shapes must confirm `architecture`, keyword arguments of
    timm's Beit, VisionTransformer or Eva, whichever it is of.

    model_type: as transformers calls it. timm_name, timm_arguments: the model that timm's `create_model` made.
    activation: of the MLPs, as timm calls it. biases: for every linear of a block whether it has one, as transformers'
    DINOv3 says it ("query_bias"). mean_pooling: whether the final norm is that of a pooler, which a base
    model lacks.
    """

    format: str | None = None
    family: Family | None = None
    model_type: str | None = None
    timm_name: str | None = None
    timm_arguments: dict[str, Any] = field(default_factory=dict)
    activation: str | None = None
    biases: dict[str, bool] = field(default_factory=dict)
    mean_pooling: bool = False
    eps: float | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    stated_by: str = "the file"
    interpolation: str = "bicubic"
    crop_pct: float | None = None
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


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
            family="beit",
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
        return _timm_facts(config, label)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ValueError(f"{label}: config.json must have model_type {', '.join(MODEL_TYPES)}, got {kind!r}")
    stated = config.get("vision_config", {}) if kind in ("clip", "siglip") else config
    if not isinstance(stated, dict):
        raise ValueError(f"{label}: config.json must have vision_config as an object, got {stated!r}")
    if MODEL_TYPES[kind] == "beit":
        facts = _beit_facts(stated, label)
    else:
        facts = _dinov3_facts(stated, label) if kind == "dinov3_vit" else _vit_facts(stated, kind, label)
    facts.model_type = kind
    preprocessor = path.with_name("preprocessor_config.json")
    if not preprocessor.is_file():
        facts.mean, facts.std = _default_statistics(kind, facts.architecture["in_chans"])
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


def _whole(config: Mapping[str, Any], key: str, default: int, label: str, *, least: int = 1) -> int:
    value = config.get(key, default)
    if type(value) is not int or value < least:
        what = "a positive integer" if least else "an integer >= 0"
        raise ValueError(f"{label}: config.json {key} must be {what}, got {value!r}")
    return value


def _either(config: Mapping[str, Any], key: str, default: bool, label: str) -> bool:
    value = config.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{label}: config.json {key} must be true or false, got {value!r}")
    return value


def _sizes(
    config: Mapping[str, Any], patch_size: int, label: str, *, width: int = 768, heads: int = 12
) -> dict[str, Any]:
    """What every config of transformers states of a vision transformer."""
    patch = pair(config.get("patch_size", patch_size), f"{label}: config.json patch_size")
    return {
        "img_size": pair(config.get("image_size", 224), f"{label}: config.json image_size"),
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "in_chans": _whole(config, "num_channels", 3, label),
        "embed_dim": _whole(config, "hidden_size", width, label),
        "depth": _whole(config, "num_hidden_layers", 12, label),
        "num_heads": _whole(config, "num_attention_heads", heads, label),
    }


def _beit_facts(config: Mapping[str, Any], label: str) -> SourceFacts:
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{label}: config.json must have hidden_act gelu, got {config['hidden_act']!r}")
    sizes, scale = _sizes(config, 16, label), config.get("layer_scale_init_value", 0.1)
    return SourceFacts(
        format="huggingface",
        family="beit",
        eps=positive(config.get("layer_norm_eps", HUGGINGFACE_EPS), "layer_norm_eps", label),
        vocab_size=_whole(config, "vocab_size", 8192, label),
        mean_pooling=bool(config.get("use_mean_pooling", True)),
        architecture={
            **sizes,
            "mlp_ratio": mlp_ratio_of(_whole(config, "intermediate_size", 3072, label), sizes["embed_dim"]),
            "init_values": positive(scale, "layer_scale_init_value", label) if scale else None,
            "use_abs_pos_emb": bool(config.get("use_absolute_position_embeddings", False)),
            "use_rel_pos_bias": bool(config.get("use_relative_position_bias", False)),
            "use_shared_rel_pos_bias": bool(config.get("use_shared_relative_position_bias", False)),
        },
    )


def _vit_facts(config: Mapping[str, Any], kind: str, label: str) -> SourceFacts:
    default = _VIT_DEFAULTS.get(kind.removesuffix("_vision_model"), _VIT_DEFAULTS["vit"])
    act = config.get("hidden_act", default.activation)
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise ValueError(f"{label}: config.json must have hidden_act {', '.join(_ACTIVATIONS)}, got {act!r}")
    return SourceFacts(
        format="huggingface",
        family="vit",
        eps=positive(config.get("layer_norm_eps", default.eps), "layer_norm_eps", label),
        activation=_ACTIVATIONS[act],
        architecture=_sizes(config, default.patch_size, label),
    )


def _dinov3_facts(config: Mapping[str, Any], label: str) -> SourceFacts:
    sizes = _sizes(config, 16, label, width=384, heads=6)
    gated = _either(config, "use_gated_mlp", False, label)
    act, wanted = config.get("hidden_act", "gelu"), "silu" if gated else "gelu"
    if act != wanted:
        raise ValueError(
            f"{label}: config.json must have hidden_act {wanted} with use_gated_mlp {str(gated).lower()}, got {act!r}"
        )
    return SourceFacts(
        format="huggingface",
        family="vit",
        eps=positive(config.get("layer_norm_eps", 1e-5), "layer_norm_eps", label),
        biases={
            name: _either(config, name, name != "key_bias", label)
            for name in ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias")
        },
        architecture={
            **sizes,
            "mlp_ratio": mlp_ratio_of(_whole(config, "intermediate_size", 1536, label), sizes["embed_dim"]),
            "swiglu_mlp": gated,
            "num_reg_tokens": _whole(config, "num_register_tokens", 0, label, least=0),
            "rope_temperature": positive(config.get("rope_theta", 100.0), "rope_theta", label),
        },
    )


def _default_statistics(kind: str, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the image processor that transformers has for a kind of model."""
    if in_chans == 3:
        if kind.startswith("clip"):
            return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        if kind.startswith(("dinov", "deit", "vit_mae", "vit_msn")):
            return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (0.5,) * in_chans, (0.5,) * in_chans


def _timm_facts(config: Mapping[str, Any], label: str) -> SourceFacts:
    cfg, name = config["pretrained_cfg"], config.get("architecture")
    arguments = config.get("model_args") or {}
    if not isinstance(name, str | None) or not isinstance(arguments, dict):
        raise ValueError(
            f"{label}: config.json must have architecture as a timm name and model_args as an object, "
            f"got {name!r} and {arguments!r}"
        )
    facts = SourceFacts(format="timm", timm_name=name, timm_arguments=arguments)
    facts.family = None if name is None else family_of_timm(name)
    facts.interpolation = interpolation_name(cfg.get("interpolation", "bicubic"), label)
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
