"""The core with torch operations: softmax over tokens that are normalised once and never projected.

Kept for the backward pass: the softmax weights (B, H, N+P). Normalised tokens are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._runtime.sizes import accumulator


def forward(
    x: Tensor, absorbed: Tensor, prompt_scores: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mixed (B, H, C), weights of the prompts (B, H, P), sum of the tokens' weights (B, H), all weights."""
    tokens = F.layer_norm(x, x.shape[-1:], eps=eps).to(absorbed.dtype)
    scores = (absorbed @ tokens.mT).to(accumulator(absorbed.dtype))
    if prompt_scores is not None:
        scores = torch.cat([scores, prompt_scores.to(scores.dtype)], -1)
    masked = None
    if bias is not None and bias.shape[-1] == scores.shape[-1]:
        scores = scores + bias.to(scores.dtype)
        # Scores are finite, so a head attends to nothing where its bias is all -inf.
        masked = (bias.amax(-1, keepdim=True) == float("-inf")) if scores.shape[-1] else None
    elif bias is not None:
        scores[..., : bias.shape[-1]] += bias
    weights = scores.softmax(-1)
    if masked is not None:
        weights.masked_fill_(masked, 0)
    weights = weights.to(absorbed.dtype)
    of_tokens, of_prompts = weights.tensor_split([x.shape[1]], -1)
    return of_tokens @ tokens, of_prompts, of_tokens.sum(-1), weights


def backward(
    grad_mixed: Tensor,
    grad_prompt_weights: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    absorbed: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, absorbed, prompt_scores and bias."""
    count, exact = x.shape[1], accumulator(absorbed.dtype)
    # On a CPU the statistics come in the type of x, where 16 bits are too few.
    wide = x.float() if x.device.type == "cpu" and x.element_size() == 2 else x
    normalised, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
    tokens = normalised.to(absorbed.dtype)

    grad = (grad_mixed @ tokens.mT).to(exact) + grad_mass[..., None]
    if grad_prompt_weights.shape[-1]:
        grad = torch.cat([grad, grad_prompt_weights.to(exact)], -1)
    grad_scores = weights * (grad - (weights * grad).sum(-1, keepdim=True))
    dbias = grad_scores[..., : bias.shape[-1]].sum(0).to(bias.dtype) if bias is not None and needs[3] else None
    grad_scores = grad_scores.to(absorbed.dtype)
    of_tokens = grad_scores[..., :count]
    dabsorbed = of_tokens @ tokens if needs[1] else None
    dx = None
    if needs[0]:
        factors = torch.cat([of_tokens, weights[..., :count]], 1)
        grad_tokens = factors.mT @ torch.cat([absorbed, grad_mixed], 1)
        layer_norm_backward = torch.ops.aten.native_layer_norm_backward
        dx = layer_norm_backward(
            grad_tokens.to(wide.dtype), wide, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0].to(x.dtype)
    return dx, dabsorbed, grad_scores[..., count:].contiguous() if needs[2] else None, dbias
