"""Rotary positions of timm's Eva class (EVA-02, DINOv3, Perception Encoder), for rows among which there are prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
