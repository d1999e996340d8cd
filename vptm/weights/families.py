"""Whether weights are a BEiT's or a ViT's, told from the names of their tensors or from what states it beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

import timm

from vptm.messages import one_line

Family = Literal["beit", "vit"]


class Told(NamedTuple):
    """What names alone tell of weights: their family, and what their source reads: of a BEiT its mask row, or where
    there is no mask token its class row; of a ViT its class row, its patches by attention pooling, or their mean."""

    family: Family
    readout: Literal["mask", "cls", "map", "mean"] = "cls"


TIMM_MODULES = ("beit", "vision_transformer", "deit", "eva")
"""timm's modules whose models are of a family."""

MODEL_TYPES: dict[str, Family] = {
    "beit": "beit",
    "data2vec-vision": "beit",
    "vit": "vit",
    "vit_mae": "vit",
    "vit_msn": "vit",
    "deit": "vit",
    "ijepa": "vit",
    "dinov2": "vit",
    "dinov2_with_registers": "vit",
    "clip": "vit",
    "clip_vision_model": "vit",
    "siglip": "vit",
    "siglip_vision_model": "vit",
    "dinov3_vit": "vit",
}
"""What transformers calls a model in its config, and the family whose arithmetic it has."""

# parts of names under timm's, unilm's and transformers' names and behind any prefix
_ROTARY = re.compile(r"(^|\.)rope[._]|(^|\.)rope_embed\.|\.mlp\.fc1_[gx]\.|\.mlp\.w[12]\.|storage_tokens$")
_DINOV3 = re.compile(r"(?:(?:model|backbone|dinov3_vit)\.)*layer\.\d+\.attention\.")
_BEIT = re.compile(
    r"relative_position_bias_table$|\.attn\.[qv]_bias$|(^|\.)lm_head\.|(^|\.)(beit|data2vec_vision)\.|\.lambda_[12]$"
)
_VIT = re.compile(r"\.attn\.(qkv\.|in_proj_)|embedding/kernel$|\.(key|k_proj)\.(weight|bias)$")
_CLASS = re.compile(r"(^|[./])(cls_token|class_embedding|cls)$")
_MASK = re.compile(r"(^|\.)mask_token$")
_POOL = re.compile(r"(^|\.)(attn_pool\.latent|head\.probe)$|(^|/)MAPHead_0/probe$")
ROTARY = "rotary positions, as EVA-02 and DINOv3 have them, need architecture= with timm's name of the model"


def family_of_names(names: Iterable[str]) -> Family | None:
    """The family that tensors of these names belong to, None where they tell none.

    Example:
        >>> family_of_names(["blocks.0.attn.q_bias"]), family_of_names(["module.blocks.0.attn.qkv.bias"])
        ('beit', 'vit')
    """
    found = list(names)
    if any(map(_BEIT.search, found)):
        return "beit"
    return "vit" if any(map(_VIT.search, found)) else None


def told_by_names(names: Iterable[str], family: Family | None = None) -> Told | None:
    """What tensors of these names tell, in `family` where that is known; None where they tell nothing.

    Example:
        >>> told_by_names(["blocks.0.attn.qkv.bias", "attn_pool.latent"])
        Told(family='vit', readout='map')
        >>> told_by_names(["blocks.0.attn.q_bias", "mask_token"])
        Told(family='beit', readout='mask')
    """
    found = list(names)
    family = family or family_of_names(found)
    if family is None:
        return None
    if family == "beit":
        return Told(family, "mask" if not found or any(map(_MASK.search, found)) else "cls")
    if any(map(_CLASS.search, found)):
        return Told(family)
    return Told(family, "map" if any(map(_POOL.search, found)) else "mean")


def is_dinov3(names: Iterable[str]) -> bool:
    """Whether names are those that transformers gives DINOv3, in memory or in files; its repository's and timm's are
    not.

    Example:
        >>> is_dinov3(["layer.0.attention.q_proj.weight"]), is_dinov3(["encoder.layer.0.attention.attention.key.bias"])
        (True, False)
    """
    return any(map(_DINOV3.match, names))


def refuse_rotary(names: Iterable[str], label: str) -> None:
    """Raise ValueError where a name is one that only models with rotary positions have."""
    if rotary := next(filter(_ROTARY.search, names), None):
        raise ValueError(f"{label}: must be a BEiT or a ViT, got {one_line(rotary)}: {ROTARY}")


def family_of_timm(name: str) -> Family | None:
    """The family of a timm name, without its tag; None for what is neither.

    Example:
        >>> family_of_timm("beit_base_patch16_224"), family_of_timm("vit_tiny_patch16_224"), family_of_timm("resnet18")
        ('beit', 'vit', None)
    """
    if name in timm.list_models(module="beit"):
        return "beit"
    return "vit" if any(name in timm.list_models(module=module) for module in TIMM_MODULES) else None
