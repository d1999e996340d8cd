"""The definition of the read-out: normalise every token, project keys and values of all of them, attend with one row.

Every other implementation is tested against this one in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def readout_attention_reference(
    x: Tensor,
    q: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    *,
    num_heads: int,
    prompt_kv: Tensor | None = None,
    prompt_column_bias: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`vptm_kernels.readout_attention`, whose docstring describes the arguments."""
    weight, shift = (None if t is None else t.to(x.dtype) for t in (norm_weight, norm_bias))
    tokens = F.layer_norm(x, x.shape[-1:], weight, shift, eps).to(q.dtype)
    k, v = F.linear(tokens, k_weight), F.linear(tokens, v_weight, v_bias)
    if prompt_kv is not None:
        prompt_k, prompt_v = prompt_kv.expand(len(x), *prompt_kv.shape[-2:]).chunk(2, -1)
        k, v = torch.cat([k, prompt_k], 1), torch.cat([v, prompt_v], 1)
    k, v = (t.unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (k, v))
    query = q.unflatten(1, (num_heads, 1, -1))
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ k.mT
    if bias is not None:
        scores = scores + F.pad(bias, (0, scores.shape[-1] - bias.shape[-1])).to(scores.dtype)[:, None]
    if prompt_column_bias is not None:
        scores = scores + F.pad(prompt_column_bias, (x.shape[1], 0)).to(scores.dtype)[:, None]
    # A head that attends to nothing gives zeros.
    masked = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(masked, 0).softmax(-1).masked_fill(masked, 0)
    return (weights @ v).flatten(1)
