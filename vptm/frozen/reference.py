"""The definition of a prompted transformer: concatenate every row, run every row through every block, store all scores.

Slow and plain on purpose. All faster paths are tested against this file, and `vptm.check` compares with it on a user's
own model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange, repeat
from timm.models.beit import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from vptm.models.prompted_beit import PromptedBEiT
    from vptm.models.prompted_model import PromptedModel

AttentionFunction = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, drop: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`drop(softmax(q k^T / sqrt(D) + bias)) v` for (B, H, T, D) inputs and a (1, H, T, T) bias, every score stored."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(dim=-1)
    return (weights if drop is None else drop(weights)) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The same through `scaled_dot_product_attention`, which stores no scores."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=None if bias is None else bias.to(query.dtype))


class GivenBias(NamedTuple):
    """All of the position bias of a block, (1, H, T, T) or None, and the function that attends with it."""

    bias: Tensor | None
    attention: AttentionFunction


class BiasedAttention(Attention):
    """timm's BEiT attention, which may be given all of its bias, for rows that its own table does not know.

    With a `GivenBias` in place of the shared bias it attends by that; its parts run as the modules they are. Without
    one it is timm's.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | GivenBias | None = None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if not isinstance(shared_rel_pos_bias, GivenBias):
            return super().forward(x, shared_rel_pos_bias)
        bias, attention = shared_rel_pos_bias
        qkv_bias = None if self.q_bias is None else torch.cat([self.q_bias, self.k_bias, self.v_bias])
        if type(self.qkv) is nn.Linear and self.qkv.bias is None and not _listened_to(self.qkv):
            qkv = F.linear(x, self.qkv.weight, qkv_bias)
        else:  # an adapter's or a quantised linear has no weight to read past it, and one with a bias keeps it
            qkv = self.qkv(x) if qkv_bias is None else self.qkv(x) + qkv_bias
        query, key, value = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.num_heads)
        if type(self.attn_drop) is nn.Dropout and not self.attn_drop.training and not _listened_to(self.attn_drop):
            mixed = attention(query, key, value, bias)
        else:
            mixed = softmax_attention(query, key, value, bias, self.attn_drop)
        return self.proj_drop(self.proj(rearrange(mixed, "b h t d -> b t (h d)")))


def block_forward(block: Block, x: Tensor, bias: Tensor | None, attention: AttentionFunction) -> Tensor:
    """A BEiT block on rows (B, T, C) with all of its position bias given, (1, H, T, T) or None.

    Somebody's own attention, and a patched `forward` where the block has no table of its own, take the bias as timm's
    does, as one that all blocks share.
    """
    inner = biased_attention(block)
    if inner is None or ("forward" in inner.__dict__ and inner.relative_position_bias_table is None):
        return block(x, shared_rel_pos_bias=bias)
    return block(x, shared_rel_pos_bias=GivenBias(bias, attention))


def biased_attention(block: nn.Module) -> BiasedAttention | None:
    """The attention of a BEiT block, also where the block or its attention stands inside somebody's module."""
    attn = getattr(block, "attn", None)
    if type(attn) is BiasedAttention:
        return attn
    return next((module for module in block.modules() if type(module) is BiasedAttention), None)


def _listened_to(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def canonical_bias(model: PromptedBEiT, layer: int, *, learned: bool = True) -> Tensor | None:
    """Bias (H, T, T) of block `layer` for rows `[class | patches | mask? | prompts]`, or None where nothing is
    added."""
    backbone = model.backbone
    parts = (backbone.rel_pos_bias, biased_attention(backbone.blocks[layer]))
    found = (getattr(part, "relative_position_bias_table", None) for part in parts)
    tables = [table for table in found if table is not None]
    bias = None
    if tables:
        table = sum(tables[1:], start=tables[0])
        table = torch.cat([table, table.new_zeros(1, table.shape[1])])
        bias = rearrange(table[model.bias_index], "i j h -> h i j")
    if learned and model.prompt_bias is not None:
        first_prompt = model.num_rows - model.prompts.length
        patches = 1 + model.num_patches
        columns = model.prompt_bias.new_zeros(model.prompt_bias.shape[2], model.num_rows, model.num_rows)
        columns[:, 1:patches, first_prompt:] = model.prompt_bias[layer, 1][:, None]
        columns[:, 0, first_prompt:] = model.prompt_bias[layer, 0]
        columns[:, patches:first_prompt, first_prompt:] = model.prompt_bias[layer, 0][:, None]
        bias = columns if bias is None else bias + columns
    return bias


def embed(model: PromptedBEiT, images: Tensor) -> Tensor:
    """Rows `[class | patches | mask?]`, (B, 1 + N (+ 1), C), before the first block and without prompts."""
    backbone = model.backbone
    patches = backbone.patch_embed(images)
    batch = patches.shape[0]
    class_row = repeat(backbone.cls_token, "1 1 c -> b 1 c", b=batch)
    rows = [class_row, patches]
    mask_token = model.mask_token
    if model.replaced_patch is not None and mask_token is not None:
        masked = torch.arange(model.num_patches, device=patches.device) == model.replaced_patch
        rows[1] = torch.where(masked[None, :, None], mask_token.to(patches.dtype), patches)
    position = backbone.pos_embed
    if position is not None:
        rows = [rows[0] + position[:, :1], rows[1] + position[:, 1:]]
    if model.has_mask_row and mask_token is not None:
        if position is not None and model.grid_position is not None:
            mask_token = mask_token + position[:, 1 + model.grid_position]
        rows.append(repeat(mask_token, "1 1 c -> b 1 c", b=batch))
    return backbone.pos_drop(torch.cat(rows, dim=1))


def reference_features(
    model: PromptedModel, images: Tensor, attention: AttentionFunction = softmax_attention
) -> Tensor:
    """Rows `[prefix | patches | mask?]` after the last block and the backbone's final norm, (B, T, C); with the prompts
    last where the read-out averages them too."""
    x = rows = model.reference_embed(images)
    batch, real = x.shape[:2]
    carried = None
    for layer in range(len(model.backbone.blocks)):
        added = model.prompts.added(layer, batch)
        if added is not None:
            first = model.backbone.num_prefix_tokens
            before, patches, rest = x.split([first, model.num_patches, real - first - model.num_patches], dim=1)
            x = torch.cat([before, patches + added, rest], dim=1)
        rows = torch.cat([x, model.prompts(layer, batch, carried).to(x.dtype)], dim=1)
        rows = model.run_block(model.reference_block, layer, rows, attention)
        x, carried = rows[:, :real], rows[:, real:]
    return model.backbone.norm(rows if model.pools_prompts else x)
