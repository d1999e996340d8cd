"""The registered ops as plain ATen, for graphs that are to run where vptm_kernels is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._runtime.sizes import accumulator
from .prompted_attention.bias import expand_table
from .prototype_cosine.activations import activate


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions of the forward ops, by overload: an argument of `ExportedProgram.run_decompositions`.

    For inference of one task: no gradient is kept, and prompt_ranges and task_ids, which are read on the host, are
    refused by name. Scores of `prompted_attention` whose whole row is -inf give NaN, as
    `torch.nn.functional.scaled_dot_product_attention` does.

    >>> import torch
    >>> from vptm_kernels import decompositions, prompted_attention
    >>> class Attend(torch.nn.Module):
    ...     def forward(self, qkv):
    ...         return prompted_attention(qkv, num_heads=2)
    >>> program = torch.export.export(Attend(), (torch.randn(1, 5, 24),)).run_decompositions(decompositions())
    >>> any("vptm" in str(node.target) for node in program.graph.nodes)
    False
    """
    ops = torch.ops.vptm
    return {
        ops.prompted_attention.default: _prompted_attention,
        ops.readout_attention.default: _readout_attention,
        ops.token_readout.default: _token_readout,
    }


def _prompted_attention(
    qkv: Tensor,
    prompts: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    token_ids: Tensor | None,
    ranges: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    window: Sequence[int],
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    scale: float,
    with_lse: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if ranges is not None or with_lse:
        raise ValueError("prompted_attention must be without prompt_ranges and return_lse to be plain ATen")
    parts = 3 if prompt_queries else 2
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)  # (B, N, H, D)
    if cos is not None and sin is not None:
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    if prompts is not None:
        rows = prompts if prompts.ndim == 3 else prompts.expand(qkv.shape[0], -1, -1)
        *q_rows, k_rows, v_rows = rows.unflatten(2, (parts, num_heads, -1)).unbind(2)
        k, v = torch.cat([k, k_rows], 1), torch.cat([v, v_rows], 1)
        if q_rows:
            q = torch.cat([q, q_rows[0]], 1)
    mask = expand_table(bias, (window[0], window[1]), token_ids) if bias is not None and window else bias
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[1] - mask.shape[2], 0, q.shape[1] - mask.shape[1])).to(q.dtype)[None]
    if columns is not None:
        of_prompts = F.pad(columns.to(q.dtype), (qkv.shape[1], 0))[None, :, None]
        mask = of_prompts if mask is None else mask + of_prompts
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2), qkv.new_empty(0, dtype=accumulator(qkv.dtype))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, N, H, D) turned by cosines and sines (N, D/2) or (H, N, D/2)."""
    cos, sin = (t[:, None] if t.ndim == 2 else t.transpose(0, 1) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _readout_attention(
    x: Tensor, absorbed: Tensor, prompt_scores: Tensor | None, bias: Tensor | None, eps: float, keep: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if keep:
        raise ValueError("readout_attention must be traced without gradients to be plain ATen")
    exact = accumulator(absorbed.dtype)
    tokens = F.layer_norm(x, x.shape[-1:], eps=eps).to(absorbed.dtype)
    scores = (absorbed @ tokens.mT).to(exact)
    if prompt_scores is not None:
        scores = torch.cat([scores, prompt_scores.to(exact)], -1)
    if bias is not None:
        scores = scores + F.pad(bias.to(exact), (0, scores.shape[2] - bias.shape[1]))
    weights = scores.softmax(-1).to(absorbed.dtype)
    of_tokens, of_prompts = weights[..., : x.shape[1]], weights[..., x.shape[1] :]
    # outputs of an op share no memory
    return of_tokens @ tokens, of_prompts.clone(), of_tokens.sum(-1), absorbed.new_empty(0), absorbed.new_empty(0)


def _token_readout(
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    room: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = accumulator(hidden.dtype)
    tokens = activate(F.linear(hidden, token_weight, token_bias), activation)
    squared = tokens.to(exact).square().sum(1) if squares else tokens.new_empty(0, dtype=exact)
    out = F.linear(tokens, reader).to(exact)
    return out, squared, hidden.new_empty(0, dtype=exact), hidden.new_empty(0)
