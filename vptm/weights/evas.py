"""Files with weights of timm's Eva class (EVA-02, DINOv3, Perception Encoder), under timm's names: by its conversion,
or for transformers' DINOv3 by the one here."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import AttentionRope, LayerNorm
from timm.models import eva
from torch import Tensor

from vptm.messages import error_line, one_line
from vptm.weights.beit_architecture import mlp_ratio_of
from vptm.weights.configs import SourceFacts
from vptm.weights.vit_architecture import confirm, depth_of, heads_of, shape_of


class EvaTensors(NamedTuple):
    """Tensors under timm's names; the mask token (1, 1, C) of weights that were pre-trained with one; what a backbone
    does not need; and the shapes of `pos_embed` before and after, where it was resized."""

    state: dict[str, Tensor]
    mask_token: Tensor | None
    dropped: list[str]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def is_eva(name: str) -> bool:
    """Whether a timm name, with or without its tag, is of the Eva class.

    Example:
        >>> is_eva("eva02_tiny_patch14_224.mim_in22k"), is_eva("vit_tiny_patch16_224")
        (True, False)
    """
    return name.partition(".")[0] in timm.list_models(module="eva")


def classes_of(tensors: Mapping[str, Tensor], width: int) -> int:
    """Of the classifier in a file, 0 where it has none that is one linear of the pooled row."""
    weight = tensors.get("head.weight")
    return len(weight) if weight is not None and weight.ndim == 2 and weight.shape[1] == width else 0


_DINOV3_EPS, _DINOV3_TEMPERATURE = 1e-5, 100.0
# the linears that a config of transformers may leave without a bias, which is then a bias of zeros
_BIASES = {
    "query_bias": ("attn.q_bias",),
    "key_bias": ("attn.k_bias",),
    "value_bias": ("attn.v_bias",),
    "proj_bias": ("attn.proj.bias",),
    "mlp_bias": ("mlp.fc1_g.bias", "mlp.fc1_x.bias", "mlp.fc2.bias"),
}


def dinov3_arguments(
    state: Mapping[str, Tensor], facts: SourceFacts, size: tuple[int, int] | None, label: str, notes: list[str]
) -> dict[str, Any]:
    """Keyword arguments of timm's Eva for a DINOv3 of transformers.

    Args:
        state: under the names that `vptm.weights.key_maps.canonical_names` gives them.
        facts: from the config beside them, which the shapes must confirm; without one the published models' rotary
            base and eps are taken, and `notes` say so.
        size: (height, width) asked for, None for the config's, or 224.
        label: what messages begin with.
        notes: gets a line for what is assumed.
    """
    stated = facts.architecture
    width, in_chans, *patch = shape_of(state, "patch_embed.proj.weight", 4, label)
    hidden = shape_of(state, "blocks.0.mlp.fc1_x.weight", 2, label)[0]
    heads = heads_of(width, stated.get("num_heads"), label, notes)
    if width // heads % 4:
        raise ValueError(f"{label}: must have heads of a multiple of 4 channels, got {heads} heads of {width // heads}")
    if facts.eps is None:
        notes.append(
            f"rotary base {_DINOV3_TEMPERATURE:g} and eps {_DINOV3_EPS:g}: those of the published models are assumed, "
            "no config.json beside the weights states them"
        )
    arguments: dict[str, Any] = {
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "in_chans": in_chans,
        "num_classes": classes_of(state, width),
        "global_pool": "token",
        "embed_dim": width,
        "depth": depth_of(state, label),
        "num_heads": heads,
        "qkv_bias": any(f"blocks.0.{_BIASES[kind][0]}" in state for kind in ("query_bias", "key_bias", "value_bias")),
        "attn_type": "rope" if "blocks.0.attn.k_bias" in state else "eva",  # the other kind has no key bias
        "mlp_ratio": mlp_ratio_of(hidden, width),
        "swiglu_mlp": "blocks.0.mlp.fc1_g.weight" in state,
        "swiglu_align_to": 1,  # gates and values apart, at any width
        "init_values": _DINOV3_EPS,
        "num_reg_tokens": shape_of(state, "register_tokens", 3, label)[1] if "register_tokens" in state else 0,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": stated.get("rope_temperature", _DINOV3_TEMPERATURE),
        "rope_rotate_half": True,
        "dynamic_img_size": True,
        "norm_layer": partial(LayerNorm, eps=facts.eps or _DINOV3_EPS),
    }
    told = ("patch_size", "in_chans", "embed_dim", "depth", "mlp_ratio", "swiglu_mlp", "num_reg_tokens")
    confirm(stated, arguments, told, label)
    return {**arguments, "img_size": size or stated.get("img_size") or (224, 224)}


def dinov3_tensors(state: Mapping[str, Tensor], facts: SourceFacts, backbone: Any, label: str) -> EvaTensors:
    """The tensors of a DINOv3 of transformers for `backbone`, in float32. A linear without a bias gets zeros, which is
    the same.

    Raises:
        ValueError: biases that are not where the config says, or that `backbone` has no place for.
    """
    out = {name: value.float() for name, value in state.items()}
    dropped = [name for name in out if name.startswith("rope_embeddings.")]
    if not backbone.num_classes:
        dropped += [name for name in ("head.weight", "head.bias") if name in out]
    for name in dropped:
        del out[name]
    mask_token = out.pop("mask_token", None)
    if mask_token is not None and mask_token.numel() != backbone.embed_dim:
        raise ValueError(
            f"{label}: mask_token must have {backbone.embed_dim} values, those of a row, got {mask_token.numel()}"
        )
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
    _fill_biases(out, facts.biases, len(backbone.blocks), label)
    for number, block in enumerate(backbone.blocks):
        place = f"blocks.{number}."
        _place_qkv_bias(out, place + "attn.", block.attn, label)
        for kind in ("1", "2"):
            if f"{place}ls{kind}.gamma" in out:
                out[f"{place}gamma_{kind}"] = out.pop(f"{place}ls{kind}.gamma")
        if not hasattr(block.mlp, "fc1_g"):
            for kind in ("weight", "bias"):
                if f"{place}mlp.fc1_x.{kind}" in out:
                    out[f"{place}mlp.fc1.{kind}"] = out.pop(f"{place}mlp.fc1_x.{kind}")
    if mask_token is not None:
        mask_token = mask_token.reshape(1, 1, -1).clone()
    return EvaTensors(out, mask_token, dropped, {})


def _fill_biases(state: dict[str, Tensor], stated: Mapping[str, bool], depth: int, label: str) -> None:
    """Zeros for every bias that no block has, where the config, if there is one, says so."""
    for kind, leaves in _BIASES.items():
        for leaf in leaves:
            if leaf == "mlp.fc1_g.bias" and "blocks.0.mlp.fc1_g.weight" not in state:
                continue
            places = [f"blocks.{number}.{leaf}" for number in range(depth)]
            found = sum(place in state for place in places)
            wanted = stated.get(kind, bool(found))
            if found != (depth if wanted else 0):
                why = f" ({kind} of its config)" if kind in stated else ""
                raise ValueError(
                    f"{label}: must have {leaf} in {'every block' if wanted else 'no block'}{why}, "
                    f"got it in {found} of {depth}"
                )
            for number, place in enumerate(places if not found else ()):
                linear = leaf.removesuffix(".bias") if leaf.endswith(".bias") else "attn.proj"
                if (weight := state.get(f"blocks.{number}.{linear}.weight")) is not None and weight.ndim:
                    state[place] = weight.new_zeros(len(weight))


def _place_qkv_bias(state: dict[str, Tensor], place: str, attn: Any, label: str) -> None:
    """Biases of queries, keys and values where `attn` has them."""
    parts = {one: state.pop(f"{place}{one}_bias") for one in "qkv" if f"{place}{one}_bias" in state}
    if type(attn) is AttentionRope and attn.qkv is not None and attn.qkv.bias is not None:
        state[f"{place}qkv.bias"] = torch.cat(list(parts.values()))
        return
    kept = ("q", "v") if getattr(attn, "q_bias", None) is not None else ()
    for one, value in parts.items():
        if one in kept:
            state[f"{place}{one}_bias"] = value
        elif value.any():
            raise _no_place(f"{place}{one}_bias", label)


def _no_place(name: str, label: str) -> ValueError:
    return ValueError(
        f"{label}: architecture must be one with biases of queries and values (timm's names end in _qkvb), "
        f"got {name} that is not zero"
    )


def eva_tensors(tensors: Mapping[str, Tensor], backbone: Any, label: str) -> EvaTensors:
    """The tensors of a file for `backbone`, in float32; positions of another size are resized by timm's rule.

    Raises:
        ValueError: another patch size, biases that `backbone` has no place for, or what timm cannot convert.
    """
    given = {name: value.float() for name, value in tensors.items()}
    mask_token = given.get("mask_token")
    if mask_token is not None and mask_token.numel() != backbone.embed_dim:
        mask_token = None
    embedding, wanted = given.get("patch_embed.proj.weight"), tuple(backbone.patch_embed.proj.weight.shape)
    if embedding is not None and tuple(embedding.shape) != wanted:
        raise ValueError(
            f"{label}: patch_embed.proj.weight must have shape {wanted} as architecture has it, "
            f"got {tuple(embedding.shape)}"
        )
    if "storage_tokens" in given and backbone.blocks[0].attn.q_bias is None:
        for name, value in given.items():
            if name.endswith("attn.qkv.bias") and any(part.any() for part in value.chunk(3)[::2]):
                raise _no_place(name, label)
    position = given.get("pos_embed")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints what it looked for and did not find
            state: dict[str, Tensor] = dict(eva.checkpoint_filter_fn(dict(given), backbone))
    except (RuntimeError, IndexError, KeyError, ValueError, TypeError, AssertionError) as error:
        why = one_line(error_line(error, first=True))
        raise ValueError(
            f"{label}: must be of architecture's family, timm cannot convert its tensors: {why}"
        ) from error
    if not backbone.num_classes:
        state = {name: value for name, value in state.items() if name not in ("head.weight", "head.bias")}
    taken = {id(value) for value in state.values()}
    renamed = any(name.startswith(("visual.", "conv1.")) or name == "storage_tokens" for name in given)
    dropped = [] if renamed else [n for n, value in given.items() if id(value) not in taken and n not in state]
    resized = {}
    if position is not None and "pos_embed" in state and state["pos_embed"].shape != position.shape:
        resized["pos_embed"] = (tuple(position.shape), tuple(state["pos_embed"].shape))
    return EvaTensors(state, None if mask_token is None else mask_token.reshape(1, 1, -1).clone(), dropped, resized)
