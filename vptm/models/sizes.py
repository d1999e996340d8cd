"""One model on pictures of several sizes: what of a frozen backbone goes with a size, at another, by timm's rules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vptm.frozen.folded import Folded
from vptm.weights.vit_architecture import resize_position

Size = tuple[int, int]


class Sized(NamedTuple):
    """Attributes of a model at another size than its own, and the folded constants for it, None where it runs its
    modules."""

    parts: Mapping[str, Any]
    folded: Folded | None


def check_dynamic(backbone: Any) -> None:
    """Raise ValueError unless patches of a picture of any size can be made, one by one."""
    embed = backbone.patch_embed
    if type(embed) is not PatchEmbed or embed.dynamic_img_pad:
        found = "one that pads" if type(embed) is PatchEmbed else f"a {type(embed).__name__}"
        raise ValueError(f"dynamic_img_size=True needs timm's PatchEmbed of whole patches, this backbone has {found}")


def size_of(images: Tensor, patch: Size) -> Size:
    """(height, width) of pictures.

    Raises:
        ValueError: patches do not divide it.
    """
    height, width = images.shape[2:]
    if not height or not width or height % patch[0] or width % patch[1]:
        raise ValueError(
            f"images must have a height and width that are multiples of the patch {patch[0]} x {patch[1]}, "
            f"got {height} x {width}"
        )
    return height, width


def at_size(module: Any, size: Size) -> Any:
    """`module` on the same weights for pictures of `size`: a patch embedding, or a backbone with absolute positions
    resampled by `timm.layers.resample_abs_pos_embed` and rotary ones made for its window."""
    twin = _shallow(module)
    if isinstance(module, PatchEmbed):
        rows, columns = size[0] // module.patch_size[0], size[1] // module.patch_size[1]
        twin.img_size, twin.grid_size, twin.num_patches = size, (rows, columns), rows * columns
        return twin
    twin.patch_embed = at_size(module.patch_embed, size)
    window = twin.patch_embed.grid_size
    if module.pos_embed is not None:
        prefix = 0 if getattr(module, "no_embed_class", False) else module.num_prefix_tokens
        state = {"pos_embed": module.pos_embed}
        resize_position(state, tuple(module.patch_embed.grid_size), window, prefix)
        twin._parameters.pop("pos_embed", None)
        twin.pos_embed = state["pos_embed"]
    rope = getattr(module, "rope", None)
    if getattr(rope, "feat_shape", None) is not None:  # else it is asked for the window at every call
        twin.rope = _rope_of(rope, window)
    return twin


def _rope_of(rope: Any, window: Size) -> Any:
    """A rotary embedding that keeps its angles, with those of another window, made in the type it was made in."""
    twin = _shallow(rope)
    kinds = {name: value.dtype for name, value in rope._buffers.items() if value is not None}
    narrow = all(
        torch.equal(value.float().to(value.dtype), value)
        for name in ("bands", "periods")
        if (value := rope._buffers.get(name)) is not None
    )
    # copies: timm writes into the frequencies; doubles that come from float32 make angles in float32, as they did
    twin._buffers = {
        name: value
        if value is None
        else value.to(torch.float32 if narrow and value.is_floating_point() else value.dtype, copy=True)
        for name, value in rope._buffers.items()
    }
    twin.update_feat_shape(window)
    for name, kind in kinds.items():
        twin._buffers[name] = twin._buffers[name].to(kind)
    return twin


def _shallow(module: nn.Module) -> Any:
    """A module of the same parts and tensors, in mappings of its own."""
    twin = copy.copy(module)
    for kind in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[kind] = dict(module.__dict__[kind])
    return twin
