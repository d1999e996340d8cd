"""timm's attention written out, for what joins it between its projections and its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import beit, vision_transformer
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from vptm.frozen.parts import ATTENTIONS, EVA_ATTENTIONS, oddity, softmax_attention, with_learned
from vptm.frozen.rows import AttentionFunction


def heads_of(attn: Any, x: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, T, D) that an attention of timm's makes of its rows (B, T, C).

    They come after biases, query-key norm and rotary positions, and as often as heads share them; the scores are not
    scaled yet.
    """
    if attn.qkv is None:
        query, key, value = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        qkv = attn.qkv(x)
        if getattr(attn, "q_bias", None) is not None:
            qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        query, key, value = qkv.chunk(3, -1)
    depth = query.shape[-1] // attn.num_heads
    query, key, value = (rearrange(one, "b t (h d) -> b h t d", d=depth) for one in (query, key, value))
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    if rotary is not None:
        first = attn.num_prefix_tokens
        query, key = (
            torch.cat([one[:, :, :first], apply_rot_embed_cat(one[:, :, first:], rotary, half=attn.rotate_half)], 2)
            for one in (query, key)
        )
    shared = query.shape[1] // key.shape[1]
    return query, key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)


def attend_with(
    attn: Any,
    x: Tensor,
    attention: AttentionFunction,
    rotary: Tensor | None,
    keys_values: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """What a ViT's attention gives for its rows (B, T, C), with learned keys and values beside theirs, and `bias` (1,
    H, 1, T + P) added to the scores."""
    query, key, value = heads_of(attn, x, rotary)
    key, value = with_learned(key, value, keys_values)
    if attn.attn_drop.training and attn.attn_drop.p:
        mixed = softmax_attention(query, key, value, bias, attn.attn_drop)
    else:
        mixed = attention(query, key, value, bias)
    return attn.proj_drop(attn.proj(attn.norm(rearrange(mixed, "b h t d -> b t (h d)"))))


def cross_attend(attn: Any, x: Tensor, prompts: Tensor, attention: AttentionFunction) -> Tensor:
    """What a cross-attention on an attention's own projections gives rows (B, T, C) that attend to prompts (P, C) or
    (B, P, C) alone."""
    query = heads_of(attn, x)[0]
    _, key, value = heads_of(attn, (prompts if prompts.ndim == 3 else prompts.expand(x.shape[0], -1, -1)).to(x.dtype))
    mixed = rearrange(attention(query, key, value, None), "b h t d -> b t (h d)")
    return attn.proj_drop(attn.proj(attn.norm(mixed) if hasattr(attn, "norm") else mixed))


def pre_norm_block(
    block: Any,
    x: Tensor,
    attend: Callable[[Tensor], Tensor],
    cross: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """timm's pre-norm block on rows (B, T, C), with `attend` in place of its attention and, between that and the MLP,
    what `cross` adds to the rows."""
    scales = [block.ls1, block.ls2] if isinstance(block, vision_transformer.Block) else [block.gamma_1, block.gamma_2]

    def scaled(number: int, update: Tensor) -> Tensor:
        scale = scales[number]
        if scale is None:
            return update
        return scale(update) if isinstance(scale, nn.Module) else scale * update

    x = x + block.drop_path1(scaled(0, attend(block.norm1(x))))
    if cross is not None:
        x = x + scaled(0, cross(x))
    return x + block.drop_path2(scaled(1, block.mlp(block.norm2(x))))


def not_written_out(block: Any) -> str | None:
    """What keeps a block from being the function that is written out here, in words that fit after "got"; None where
    nothing does."""
    attn: Any = getattr(block, "attn", None)
    if type(block) not in (beit.Block, vision_transformer.Block, EvaBlock):
        return f"{type(block).__name__} blocks"
    if type(attn) not in (*ATTENTIONS, *EVA_ATTENTIONS) or getattr(attn, "gate", None) is not None:
        return f"{type(block).__name__} blocks with another attention"
    odd = oddity(block) or oddity(attn)
    return None if odd is None else f"blocks with {odd}"
