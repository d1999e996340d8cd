"""The definition of a prompted transformer: concatenate every row, run every row through every block, store all scores.

Slow and plain on purpose. All faster paths are tested against this file, and `vptm.check` compares with it on a user's
own model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from timm.models.beit import Block
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .prompted_beit import PromptedBEiT
    from .prompted_model import PromptedModel

AttentionFunction = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """`softmax(q k^T / sqrt(D) + bias) v` for (B, H, T, D) inputs and a (1, H, T, T) bias, every score stored."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The same through `scaled_dot_product_attention`, which stores no scores."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=None if bias is None else bias.to(query.dtype))


def block_forward(block: Block, x: Tensor, bias: Tensor | None, attention: AttentionFunction) -> Tensor:
    """One pre-norm BEiT block on (B, T, C) with an explicit (1, H, T, T) bias instead of the block's own (1 + N)-token
    one."""
    attn = block.attn
    qkv_bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    qkv = F.linear(block.norm1(x), attn.qkv.weight, qkv_bias)
    query, key, value = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=attn.num_heads)
    mixed = rearrange(attention(query, key, value, bias), "b h t d -> b t (h d)")
    update = attn.proj_drop(attn.proj(mixed))
    x = x + block.drop_path1(update if block.gamma_1 is None else block.gamma_1 * update)
    update = block.mlp(block.norm2(x))
    return x + block.drop_path2(update if block.gamma_2 is None else block.gamma_2 * update)


def canonical_bias(model: PromptedBEiT, layer: int, *, learned: bool = True) -> Tensor | None:
    """Bias (H, T, T) of block `layer` for rows `[class | patches | mask? | prompts]`, or None where nothing is
    added."""
    backbone = model.backbone
    tables = [
        module.relative_position_bias_table
        for module in (backbone.rel_pos_bias, backbone.blocks[layer].attn)
        if module is not None and module.relative_position_bias_table is not None
    ]
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
