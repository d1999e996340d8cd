"""Rotary positions of timm's Eva class (EVA-02, DINOv3, Perception Encoder), for rows among which there are prompts."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from torch import Tensor

KINDS = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, RotaryEmbeddingMRope)
"""Those that turn both channels of a pair by one angle."""


def rotary_embedding(backbone: Any) -> Tensor | None:
    """Sines and cosines of the patches side by side, (N, 2 D), or (blocks, heads, N, 2 D) where they are learned by
    block, as `Eva.forward_features` gives them to its blocks; None where a backbone has none."""
    rope = getattr(backbone, "rope", None)
    if rope is None:
        return None
    keeps_its_grid = hasattr(rope, "feat_shape") and not backbone.dynamic_img_size
    embedding: Tensor = rope.get_embed() if keeps_its_grid else rope.get_embed(shape=backbone.patch_embed.grid_size)
    return embedding


def of_block(embedding: Tensor, layer: int, more: int) -> Tensor:
    """What block `layer` takes of `rotary_embedding` when `more` rows without a position follow the patches."""
    own = embedding[layer] if embedding.ndim == 4 else embedding
    if not more:
        return own
    shape = (*own.shape[:-2], more, own.shape[-1] // 2)
    sines, cosines = own.new_zeros(shape), own.new_ones(shape)
    return torch.cat([own, torch.cat([sines, cosines], -1)], -2)


def half_order(width: int, heads: int, device: torch.device) -> Tensor:
    """Which channels of all heads, (C,), stand in the place of each where a head's even channels come before its odd
    ones, so that pairs of neighbours lie half a head apart."""
    return torch.arange(width, device=device).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def half_tables(backbone: Any, more: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]] | None:
    """Cosines and sines for `prompted_attention`, (T, D/2) or (H, T, D/2), of each block for rows `[prefix | patches]`
    and `more` without a position; None without rotary positions.

    Raises:
        ValueError: both channels of a pair have angles of their own, as no kind of timm's gives them.
    """
    embedding = rotary_embedding(backbone)
    if embedding is None:
        return None
    found: list[tuple[Tensor, Tensor]] = []
    for layer, block in enumerate(backbone.blocks):
        if layer and embedding.ndim < 4:
            found.append(found[0])
            continue
        sines, cosines = of_block(embedding, layer, more).to(dtype).chunk(2, -1)
        half = sines.shape[-1] // 2
        tables = []
        for table, unturned in ((cosines, 1.0), (sines, 0.0)):
            table, other = table.chunk(2, -1) if block.attn.rotate_half else (table[..., ::2], table[..., 1::2])
            # a trace holds no values to compare
            if not torch.compiler.is_compiling() and not torch.equal(table, other):
                raise ValueError(
                    f"backbone.rope must turn both channels of a pair by one angle, block {layer} got two: "
                    "impl='reference' runs it"
                )
            prefix = table.new_full((*table.shape[:-2], backbone.num_prefix_tokens, half), unturned)
            tables.append(torch.cat([prefix, table], -2))
        found.append((tables[0], tables[1]))
    return found
