"""What the tensors of a BEiT say about the model they are of, and its position tables at another size."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models.beit import gen_relative_position_index
from torch import Tensor, nn

from vptm.messages import listed

# from 1.0.31 on
TIMM_RESIZES_RECTANGLES = "old_window_size" in inspect.signature(resize_rel_pos_bias_table).parameters


def architecture_of(
    state: Mapping[str, Tensor],
    stated: Mapping[str, Any],
    index: Mapping[str, Tensor],
    size: tuple[int, int] | None,
    label: str,
    notes: list[str],
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Keyword arguments of timm's Beit, and the window (rows, columns) in patches of the position tensors.

    Args:
        state: under timm's names.
        stated: keyword arguments of timm's Beit that the source states; the shapes must confirm them.
        index: the source's `relative_position_index` buffers.
        size: (height, width) that is wanted, None for the source's own.
        label: what messages begin with.
        notes: gets a line for what is assumed.
    """
    proj, fc1 = state["patch_embed.proj.weight"], state.get("blocks.0.mlp.fc1.weight")
    if proj.ndim != 4 or fc1 is None or fc1.ndim != 2:
        found = "none" if fc1 is None else str(tuple(fc1.shape))
        raise ValueError(
            f"{label}: must have patch_embed.proj.weight of 4 and blocks.0.mlp.fc1.weight of 2 dimensions, "
            f"got {tuple(proj.shape)} and {found}"
        )
    embed_dim, in_chans, *patch = proj.shape
    blocks = {int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))}
    depth = len(blocks)
    if blocks != set(range(depth)):
        raise ValueError(f"{label}: must have blocks 0 to {max(blocks)}, got {depth} of them")
    shared = "rel_pos_bias.relative_position_bias_table"
    per_block = "blocks.0.attn.relative_position_bias_table"
    table = state.get(shared, state.get(per_block))
    if table is not None and table.ndim != 2:
        raise ValueError(
            f"{label}: relative_position_bias_table must have shape (offsets, heads), got {tuple(table.shape)}"
        )

    num_heads = table.shape[1] if table is not None else stated.get("num_heads")
    if num_heads is None:
        if embed_dim % 64:
            raise ValueError(
                f"{label}: must have a position table or a config that tells the number of heads, or a width that is a "
                f"multiple of 64, got width {embed_dim}"
            )
        num_heads = embed_dim // 64
        notes.append(f"{num_heads} heads: without a position table or a config, heads of 64 are assumed")
    if type(num_heads) is not int or num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"{label}: must have a number of heads that divides {embed_dim}, got {num_heads!r}")
    scaled = "blocks.0.gamma_1" in state
    architecture: dict[str, Any] = {
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "mlp_ratio": mlp_ratio_of(fc1.shape[0], embed_dim),
        "init_values": (stated.get("init_values") or 1e-5) if scaled else None,
        "use_abs_pos_emb": "pos_embed" in state,
        "use_rel_pos_bias": per_block in state,
        "use_shared_rel_pos_bias": shared in state,
    }
    for key, value in stated.items():
        if key == "img_size":
            continue  # the window of the position tables confirms it, below
        if key == "mlp_ratio":
            same = math.isclose(value, architecture[key])
        elif key == "patch_size":
            same = pair(value, f"{label}: patch_size") == tuple(patch)
        else:
            same = value == architecture.get(key, value)
        if not same and (key != "init_values" or bool(value) != scaled):
            raise ValueError(f"{label}: must have {key} {value!r} (its config), the weights have {architecture[key]!r}")

    stated_size = stated.get("img_size")
    native = pair(stated_size, f"{label}: img_size") if stated_size is not None else None
    if size is not None:
        check_size(size, patch, label)
    window = _native_window(state, table, native, index, size, patch, label)
    architecture["img_size"] = size or native or (window[0] * patch[0], window[1] * patch[1])
    architecture["global_pool"] = "avg" if "fc_norm.weight" in state else "token"  # timm has fc_norm with "avg" alone
    return architecture, window


def _native_window(
    state: Mapping[str, Tensor],
    table: Tensor | None,
    native: tuple[int, int] | None,
    index: Mapping[str, Tensor],
    size: tuple[int, int] | None,
    patch: list[int],
    label: str,
) -> tuple[int, int]:
    """(rows, columns) of patches the position tensors were made for."""
    rows = None if table is None else table.shape[0]
    tokens = state["pos_embed"].shape[1] if "pos_embed" in state and state["pos_embed"].ndim == 3 else None

    def fits(window: tuple[int, int]) -> bool:
        return rows in (None, offsets(window)) and tokens in (None, window[0] * window[1] + 1)

    found = " and ".join(
        text
        for text, there in ((f"a table of {rows} offsets", rows), (f"pos_embed of {tokens} tokens", tokens))
        if there is not None
    )
    wanted = window_of(size, patch) if size is not None else None
    if native is not None:
        window = window_of(native, patch)
        if not fits(window):
            raise ValueError(
                f"{label}: must have tables of window {window[0]} x {window[1]} (img_size {native}), got {found}"
            )
        return window
    if index:
        window = _index_window(index, wanted, label)
        if not fits(window):
            raise ValueError(f"{label}: must have tables of window {window[0]} x {window[1]} (its index), got {found}")
        return window
    if rows is not None:
        side = (math.isqrt(max(rows - 3, 0)) + 1) // 2
    elif tokens is not None:
        side = math.isqrt(tokens - 1)
    elif wanted is not None:
        return wanted
    else:
        raise ValueError(f"{label}: img_size must be given, the file holds no position table that tells it")
    if side > 0 and fits((side, side)):
        return side, side
    if wanted is not None and fits(wanted):
        return wanted
    raise ValueError(
        f"{label}: img_size of the file must be given (height, width), its window is not square, got {found}"
    )


def _index_window(index: Mapping[str, Tensor], wanted: tuple[int, int] | None, label: str) -> tuple[int, int]:
    """The window from unilm's persistent index: along the first row of patches the offset to patch 0 grows by one."""
    key, first = next(iter(index.items()))
    patches = len(first) - 1 if first.ndim else 0
    if first.is_floating_point() or first.ndim != 2 or patches < 1 or first.shape[1] != patches + 1:
        raise ValueError(f"{label}: {key} must be integers of shape (N, N), got {first.dtype} {tuple(first.shape)}")
    offset = first[1:, 1] - first[1, 1]
    jumps = (offset != torch.arange(patches)).nonzero()
    columns = int(jumps[0]) if len(jumps) else patches
    window = patches // columns, columns
    # one row and one column of patches have the same index
    if wanted == window[::-1] and 1 in window:
        window = wanted
    expected = gen_relative_position_index(window)
    for key, value in index.items():
        if value.shape != expected.shape or not torch.equal(value.long(), expected):
            raise ValueError(
                f"{label}: {key} must be BEiT's index of window {window[0]} x {window[1]}, got another numbering"
            )
    return window


def norm_is_after_pooling(architecture: Mapping[str, Any]) -> bool:
    """Whether the trained final norm is timm's fc_norm; without the keyword it is where timm averages the tokens."""
    return bool(architecture.get("use_fc_norm", architecture["global_pool"] == "avg"))


def _resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    options: dict[str, Any] = {"old_window_size": old} if TIMM_RESIZES_RECTANGLES else {}
    if not options and old[0] != old[1]:
        raise ValueError(
            f"timm must be 1.0.31 or newer to resize the position bias of a window that is not square, "
            f"got {timm.__version__} and {old[0]} x {old[1]}"
        )
    return resize_rel_pos_bias_table(table, new, (offsets(new), table.shape[1]), **options)


def resize_positions(
    state: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Resize position tensors in `state` with timm's functions; {name: (old shape, new shape)}."""
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    if old == new:
        return resized
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's interpolation warns of its own use of torch
        for key, value in state.items():
            # tensors that do not belong to the old window stay as they are, for the shape check to name
            if key.endswith("relative_position_bias_table") and value.shape[:1] == (offsets(old),) and value.ndim == 2:
                state[key] = _resize_table(value, old, new)
            elif key == "pos_embed" and value.ndim == 3:
                state[key] = resample_abs_pos_embed(value, list(new), list(old), num_prefix_tokens=1)
            else:
                continue
            resized[key] = (tuple(value.shape), tuple(state[key].shape))
    return resized


def check_family(state: Mapping[str, Tensor], label: str) -> None:
    """Refuse what is no BEiT."""
    fused = next((key for key in state if key.endswith(".attn.qkv.bias")), None)
    if fused:
        raise ValueError(
            f"{label}: must be a BEiT, got a plain ViT ({fused}; BEiT has q_bias and v_bias): use PromptedViT"
        )
    if "patch_embed.proj.weight" not in state or "blocks.0.attn.qkv.weight" not in state:
        raise ValueError(
            f"{label}: must be a BEiT state dict (patch_embed.proj.weight, blocks.0.attn.qkv.weight, …), "
            f"got {listed(state) if state else 'no tensors'}"
        )


def take_token_head(
    state: dict[str, Tensor], width: int, vocab_size: int | None, label: str
) -> tuple[Tensor | None, nn.Linear | None, list[str]]:
    """Take the mask token and the visual-token head out of `state`."""
    missing = [key for key in ("mask_token", "lm_head.weight", "lm_head.bias") if key not in state]
    mask_token = state.pop("mask_token", None)
    if mask_token is not None:
        mask_token = mask_token.clone()  # what torch.load maps from a file must not outlive it in a model
    weight, bias = state.pop("lm_head.weight", None), state.pop("lm_head.bias", None)
    if mask_token is not None and mask_token.shape != (1, 1, width):
        raise ValueError(f"{label}: mask_token must have shape {(1, 1, width)}, got {tuple(mask_token.shape)}")
    if (weight is None) != (bias is None):
        raise ValueError(f"{label}: lm_head must have weight and bias, got only one of them")
    if weight is None or bias is None:
        return mask_token, None, missing
    if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{label}: lm_head must have weight (V, {width}) and bias (V,), "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if vocab_size not in (None, weight.shape[0]):
        raise ValueError(f"{label}: lm_head must have {vocab_size} tokens (vocab_size), got {weight.shape[0]}")
    head = nn.Linear(width, weight.shape[0], device="meta", dtype=torch.float32)
    head.load_state_dict({"weight": weight.clone(), "bias": bias.clone()}, assign=True)
    return mask_token, head.eval(), missing


def pair(value: Any, name: str) -> tuple[int, int]:
    """(height, width) of a positive integer or a pair of them."""
    pair = (value, value) if type(value) is int else value
    if not isinstance(pair, tuple | list) or len(pair) != 2 or any(type(v) is not int or v < 1 for v in pair):
        raise ValueError(f"{name} must be a positive integer or (height, width), got {value!r}")
    return pair[0], pair[1]


def check_size(size: tuple[int, int], patch: Iterable[int], label: str) -> None:
    """Refuse a size that patches do not divide."""
    rows, columns = patch
    if size[0] % rows or size[1] % columns:
        raise ValueError(f"{label}: img_size must be multiples of the patch {rows} x {columns}, got {size}")


def window_of(size: tuple[int, int], patch: int | Iterable[int]) -> tuple[int, int]:
    """(rows, columns) of patches."""
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return size[0] // rows, size[1] // columns


def offsets(window: tuple[int, int]) -> int:
    """Rows of the position table of a window."""
    return (2 * window[0] - 1) * (2 * window[1] - 1) + 3


def mlp_ratio_of(hidden: int, width: int) -> float:
    """hidden / width such that timm's int(width * ratio) gives hidden back."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def mlp_width(architecture: Mapping[str, Any]) -> int:
    """Hidden width of the MLP."""
    return int(architecture["embed_dim"] * architecture["mlp_ratio"])
