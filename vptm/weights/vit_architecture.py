"""What the tensors of a ViT say about the model they are of, and its positions at another size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, SwiGLUPacked
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vptm.messages import listed
from vptm.weights.beit_architecture import check_size, mlp_ratio_of, window_of
from vptm.weights.families import ROTARY

VIT_EPS = 1e-6
"""Of every ViT whose repository is not transformers': JAX's, timm's, MAE's, MoCo-v3's, DINO's, DINOv2's."""

# published widths whose heads are not of 64; every other width has such heads
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 4096: 32}
_NAMED = "architecture= with the timm name of the model says it"


def timm_names(tensors: Mapping[str, Tensor], label: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """A ViT's tensors under timm's names, by timm's own conversion, and its mask token (1, 1, C) where it has one.

    Biases of queries, keys and values become one; DINOv2's register tokens come after its positions, DeiT-III's
    LayerScale has a module; CLIP's whole names are timm's. Values do not change but for the class token of a model with
    registers, which gets its position added.

    Args:
        tensors: with names of transformers replaced before.
        label: what messages begin with.
    """
    state = {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", key): value for key, value in tensors.items()}  # in chunks
    if len(state) < len(tensors):
        raise ValueError(f"{label}: must have one of every block, got blocks twice, with and without chunks")
    _join_biases(state, label)
    _split_pool(state, label)
    embedding = next((state[key] for key in _EMBEDDINGS if key in state), None)
    if embedding is None or embedding.ndim not in (2, 4):
        found = listed(state) if embedding is None else f"one of shape {tuple(embedding.shape)}"
        raise ValueError(f"{label}: must have a patch embedding, patch_embed.proj.weight of 4 dimensions, got {found}")
    mask_token = state.get("mask_token")
    if mask_token is not None and mask_token.numel() != len(embedding):
        del state["mask_token"]  # of a decoder, in another width: MAE's
        mask_token = None
    if "register_tokens" in state:
        state.setdefault("mask_token", embedding)  # by its name timm's conversion tells DINOv2
    # of the file's patch, and without positions: what is resized is resized below, and reported
    stand_in = VisionTransformer(
        img_size=embedding.shape[-2:] if embedding.ndim == 4 else 16,
        patch_size=embedding.shape[-2:] if embedding.ndim == 4 else 16,
        embed_dim=len(embedding),
        depth=0,
        num_heads=1,
        num_classes=1,
        pos_embed="none",
        device="meta",
    )
    try:
        names: dict[str, Tensor] = checkpoint_filter_fn(state, stand_in, adapt_layer_scale=True)
    except (RuntimeError, IndexError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{label}: must be a ViT, timm cannot convert its tensors: {error}") from error
    return names, None if mask_token is None else mask_token.reshape(1, 1, -1).clone()


_EMBEDDINGS = ("patch_embed.proj.weight", "visual.conv1.weight", "visual.trunk.patch_embed.proj.weight")


def _join_biases(state: dict[str, Tensor], label: str) -> None:
    places = {key.removesuffix("q_bias") for key in state if key.endswith(".attn.q_bias")}
    for place in sorted(places):
        parts = [state.pop(f"{place}{one}_bias", None) for one in "qkv"]
        found = [part for part in parts if part is not None]
        if len(found) < 3:
            lacking = [f"{one}_bias" for one, part in zip("qkv", parts) if part is None]
            raise ValueError(
                f"{label}: must be a ViT, with biases of queries, keys and values, got {place}q_bias and no "
                f"{' and no '.join(lacking)}: a BEiT goes into PromptedBEiT"
            )
        state[f"{place}qkv.bias"] = torch.cat(found)


def _split_pool(state: dict[str, Tensor], label: str) -> None:
    """Queries apart from keys and values, as timm's attention pooling has them."""
    for kind in ("weight", "bias"):
        joined = state.pop(f"attn_pool.in_proj_{kind}", None)
        if joined is None:
            continue
        if not joined.ndim or len(joined) % 3:
            raise ValueError(f"{label}: attn_pool.in_proj_{kind} must have 3 C rows, got shape {tuple(joined.shape)}")
        query, keys, values = joined.chunk(3)
        state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"] = query, torch.cat([keys, values])


def shape_of(state: Mapping[str, Tensor], name: str, ndim: int, label: str) -> tuple[int, ...]:
    """Shape of a tensor that has to be there, of so many dimensions."""
    found = state.get(name)
    if found is None or found.ndim != ndim:
        what = "none" if found is None else str(tuple(found.shape))
        raise ValueError(f"{label}: must have {name} of {ndim} dimensions, got {what}")
    return tuple(found.shape)


def depth_of(state: Mapping[str, Tensor], label: str) -> int:
    """How many blocks there are, none of them missing."""
    blocks = {int(m[1]) for key in state if (m := re.match(r"blocks\.(\d{1,9})\.", key))}
    if blocks != set(range(len(blocks))):
        missing = sorted(set(range(max(blocks))) - blocks)
        raise ValueError(f"{label}: must have blocks 0 to {max(blocks)}, got no {', '.join(map(str, missing[:3]))}")
    return len(blocks)


def heads_of(width: int, known: int | None, label: str, notes: list[str]) -> int:
    """The number of heads that is `known`, else the one that published ViTs of this width have, which `notes` say."""
    heads = known
    if heads is None:
        heads = _HEADS.get(width) or (width // 64 if width % 64 == 0 else None)
        if heads is None:
            raise ValueError(
                f"{label}: number of heads must be told, by a config.json beside the weights or a width that is a "
                f"multiple of 64, got width {width}: {_NAMED}"
            )
        notes.append(f"{heads} heads: published ViTs of width {width} have so many; {_NAMED} where it has others")
    if width % heads:
        raise ValueError(f"{label}: must have a number of heads that divides {width}, got {heads}: {_NAMED}")
    return heads


def confirm(stated: Mapping[str, Any], found: Mapping[str, Any], names: Iterable[str], label: str) -> None:
    """Raise ValueError where a config states another value of `names` than the shapes of the weights say."""
    for name in names:
        if stated.get(name, found[name]) != found[name]:
            raise ValueError(
                f"{label}: must have {name} {stated[name]!r} (its config), the weights have {found[name]!r}"
            )


def arguments_of(
    state: Mapping[str, Tensor],
    stated: Mapping[str, Any],
    eps: float,
    activation: str | None,
    heads: int | None,
    wanted: tuple[int, int] | None,
    label: str,
    notes: list[str],
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Keyword arguments of timm's VisionTransformer, and the window (rows, columns) in patches of the positions.

    Args:
        state: under timm's names.
        stated: keyword arguments that the source states; the shapes must confirm them.
        eps: of the norms.
        activation: of the MLPs, as timm calls it; None for GELU.
        heads: of weights of this kind, where it is known; `stated` goes before.
        wanted: (height, width) asked for, None for the source's own.
        label: what messages begin with.
        notes: gets a line for what is assumed.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        return shape_of(state, name, ndim, label)

    width, in_chans, *edges = shape("patch_embed.proj.weight", 4)
    patch = edges[0], edges[1]
    hidden, inner = shape("blocks.0.mlp.fc1.weight", 2)[0], shape("blocks.0.mlp.fc2.weight", 2)[1]
    depth = depth_of(state, label)
    num_heads = heads_of(width, stated.get("num_heads", heads), label, notes)
    has_class, head = "cls_token" in state, state.get("head.weight")
    registers = shape("reg_token", 3)[1] if "reg_token" in state else 0
    pooled = "attn_pool.latent" in state
    after = "fc_norm.weight" in state
    arguments: dict[str, Any] = {
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "in_chans": in_chans,
        "num_classes": 0 if head is None else len(head),
        "global_pool": "map" if pooled else "avg" if after or not has_class else "token",
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio_of(hidden, width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "scale_attn_norm": "blocks.0.attn.norm.weight" in state,
        "scale_mlp_norm": "blocks.0.mlp.norm.weight" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "class_token": has_class,
        "reg_tokens": registers,
        "pre_norm": "norm_pre.weight" in state,
        "fc_norm": after,
        "norm_layer": partial(LayerNorm, eps=eps),
        "act_layer": activation,
    }
    if hidden == 2 * inner:
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    confirm(stated, arguments, ("in_chans", "embed_dim", "depth", "patch_size"), label)
    prefix = int(has_class) + registers + int("dist_token" in state)
    if "pos_embed" not in state:
        raise ValueError(f"{label}: must have pos_embed, got none: {ROTARY}")
    position = shape("pos_embed", 3)[1]
    native = stated.get("img_size")
    window, arguments["no_embed_class"] = window_of_positions(
        position, prefix, patch, native, wanted, label, bare_prefix=stated.get("no_embed_class")
    )
    if wanted is not None:
        check_size(wanted, patch, label)
    arguments["img_size"] = wanted or native or (window[0] * patch[0], window[1] * patch[1])
    return arguments, window


def window_of_positions(
    positions: int,
    prefix: int,
    patch: tuple[int, int],
    native: tuple[int, int] | None,
    wanted: tuple[int, int] | None,
    label: str,
    *,
    bare_prefix: bool | None = None,
) -> tuple[tuple[int, int], bool]:
    """The window (rows, columns) of patches that so many positions are of, and whether the `prefix` rows have none,
    which is told by `bare_prefix` where that is known.

    A source that states no size (`native`) is taken to be square, as timm does, or of the size that is `wanted`.
    """
    bare = (False, True) if bare_prefix is None else (bare_prefix,)

    def fits(window: tuple[int, int]) -> list[tuple[tuple[int, int], bool]]:
        count = window[0] * window[1]
        return [(window, without) for without in bare if positions == count + (0 if without else prefix)][:1]

    if native is not None:
        window = window_of(native, patch)
        if not (found := fits(window)):
            raise ValueError(
                f"{label}: must have positions of {window[0]} x {window[1]} patches (img_size {native}), "
                f"got {positions} for them and {prefix} rows before"
            )
        return found[0]
    sides = {math.isqrt(max(positions - prefix, 0)), math.isqrt(positions)}
    found = [one for side in sorted(sides) if side for one in fits((side, side))]
    if len(found) != 1 and wanted is not None and (asked := fits(window_of(wanted, patch))):
        found = asked
    if len(found) != 1:
        raise ValueError(
            f"{label}: img_size must be the (height, width) of the weights, whose window is not square or not the only "
            f"one that fits, got {positions} positions, {prefix} rows before the patches and img_size {wanted}"
        )
    return found[0]


def resize_position(
    state: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int], prefix: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Resize `pos_embed` in `state` with timm's function; {name: (old shape, new shape)}.

    prefix: rows of it that are not patches'.
    """
    if old == new or "pos_embed" not in state:
        return {}
    value = state["pos_embed"]
    state["pos_embed"] = resample_abs_pos_embed(value, list(new), list(old), num_prefix_tokens=prefix)
    return {"pos_embed": (tuple(value.shape), tuple(state["pos_embed"].shape))}
