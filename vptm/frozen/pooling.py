"""Attention pooling of rows, timm's `AttentionPoolLatent` (SigLIP's MAP head), without a key or a value of any row."""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from vptm.frozen.parts import NORMS, is_plain_linear, oddity
from vptm_kernels import readout_attention


def pool_rows(pool: Any, norm: Any, x: Tensor, impl: str) -> Tensor:
    """`pool(norm(x))` for rows (B, T, C), (B, C).

    One query for all images attends to normalised rows: that is what `readout_attention` computes, and a key bias adds
    the same to every score (A4, A5). A pooling or a norm of another kind runs as the module it is.
    """
    if not _is_one_plain_query(pool) or type(norm) not in NORMS or oddity(norm) is not None:
        pooled: Tensor = pool(norm(x))
        return pooled
    weight, bias = pool.kv.weight, pool.kv.bias
    width = weight.shape[0] // 2
    query = pool.q(pool.latent)[0] * pool.scale
    mixed = readout_attention(
        x.contiguous(),  # sums of 16 and 32 bits under autocast may lie otherwise
        query.expand(x.shape[0], -1).contiguous(),
        norm.weight,
        norm.bias,
        norm.eps,
        weight[:width],
        weight[width:],
        None if bias is None else bias[width:],
        num_heads=pool.num_heads,
        scale=1.0,
        impl=impl,
    )
    out = pool.proj_drop(pool.proj(mixed))
    return out if pool.mlp is None else out + pool.mlp(pool.norm(out))


def _is_one_plain_query(pool: Any) -> bool:
    return (
        type(pool) is AttentionPoolLatent
        and oddity(pool) is None
        and is_plain_linear(pool.kv)
        and all(type(norm) is nn.Identity and oddity(norm) is None for norm in (pool.q_norm, pool.k_norm))
        and pool.pos_embed is None
        and pool.latent_len == 1
        and pool.scale == pool.head_dim**-0.5  # timm's fused attention reads no other
        and pool.pool in ("token", "avg")
    )
