"""Files with weights of timm's Eva class (EVA-02, DINOv3, Perception Encoder), under timm's names by its conversion."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
from timm.models import eva
from torch import Tensor

from vptm.messages import error_line, one_line


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
                raise ValueError(
                    f"{label}: architecture must be one with biases of queries and values (timm's names end in _qkvb), "
                    f"got {name} that is not zero"
                )
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
