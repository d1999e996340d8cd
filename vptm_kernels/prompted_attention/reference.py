"""The definition of prompted attention, in eager PyTorch of any floating dtype: concatenate the prompts and attend.

Every other implementation is tested against this one in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bias import RelativePositionBias, expand_table


def prompted_attention_reference(
    qkv: Tensor,
    prompt_kv: Tensor | None = None,
    *,
    prompt_qkv: Tensor | None = None,
    num_heads: int,
    bias: Tensor | RelativePositionBias | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    prompt_column_bias: Tensor | None = None,
    prompt_ranges: Tensor | None = None,
    max_prompt_length: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `vptm_kernels.prompted_attention`, whose docstring describes the arguments."""
    if rotary is not None:
        query, key, value = qkv.chunk(3, -1)
        turned = [_turned(section.unflatten(2, (num_heads, -1)), *rotary) for section in (query, key)]
        qkv = torch.cat([*(section.flatten(2).to(qkv.dtype) for section in turned), value], -1)
    if prompt_ranges is not None:
        assert prompt_kv is not None
        rows = []
        for image, (start, length) in zip(qkv, prompt_ranges.tolist()):
            own = slice(start, start + length)
            columns = None if prompt_column_bias is None else prompt_column_bias[:, own]
            rows.append(
                prompted_attention_reference(
                    image[None],
                    prompt_kv[own],
                    num_heads=num_heads,
                    bias=bias,
                    prompt_column_bias=columns,
                    scale=scale,
                )
            )
        if not rows:
            none = None if prompt_column_bias is None else prompt_column_bias[:, :0]
            return prompted_attention_reference(
                qkv, prompt_kv[:0], num_heads=num_heads, bias=bias, prompt_column_bias=none, scale=scale
            )
        return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])

    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    scale = head_dim**-0.5 if scale is None else scale
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    if prompt_qkv is not None:
        prompts = prompt_qkv.reshape(*prompt_qkv.shape[:-1], 3, num_heads, head_dim).movedim(-4, -2)
        pq, pk, pv = prompts.expand(batch, -1, -1, -1, -1).unbind(1)
        q, k, v = torch.cat([q, pq], 2), torch.cat([k, pk], 2), torch.cat([v, pv], 2)
    elif prompt_kv is not None:
        pk, pv = prompt_kv.reshape(*prompt_kv.shape[:-1], 2, num_heads, head_dim).movedim(-4, -2).unbind(-4)
        k = torch.cat([k, pk.expand(batch, -1, -1, -1)], 2)
        v = torch.cat([v, pv.expand(batch, -1, -1, -1)], 2)

    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        if isinstance(bias, RelativePositionBias):
            bias = expand_table(*bias)
        elif bias.ndim == 4:
            bias = bias[0]
        missing = (0, scores.shape[-1] - bias.shape[-1], 0, scores.shape[-2] - bias.shape[-2])
        scores = scores + torch.nn.functional.pad(bias, missing).to(scores.dtype)
    if prompt_column_bias is not None:
        columns = torch.nn.functional.pad(prompt_column_bias, (tokens, 0))
        scores = scores + columns[:, None].to(scores.dtype)
    lse = scores.logsumexp(-1)
    # A row whose scores are all -inf attends to nothing and gives zeros.
    masked = (lse == float("-inf"))[..., None]
    weights = scores.masked_fill(masked, 0).softmax(-1).masked_fill(masked, 0)
    out = weights @ v
    return out.transpose(1, 2).flatten(2), lse


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, N, H, D), every channel i < D/2 turned with channel i + D/2, tables (N, D/2) or (H, N, D/2)."""
    cos, sin = (table[:, None] if table.ndim == 2 else table.transpose(0, 1) for table in (cos, sin))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
