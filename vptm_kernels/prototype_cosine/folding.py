"""What a frozen token head can be reduced to, once, before any image is seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._runtime.sizes import accumulator


class FoldedHead(NamedTuple):
    """Token head and projection as one linear map, `embedding = hidden @ weight.T + bias`.

    weight: (d, C), or (T, d, C) with one head per task. bias: (d,) or (T, d).
    """

    weight: Tensor
    bias: Tensor


def fold_head(
    token_weight: Tensor,
    token_bias: Tensor | None,
    projection: Tensor,
    projection_bias: Tensor | None = None,
) -> FoldedHead:
    """Multiply a token head and a projection into one (d, C) map: what a trained adapter needs to keep.

    `projection @ (token_weight @ h + token_bias) + projection_bias` is linear in h, so this is exact for
    `prototype_cosine(..., activation="logits")`. It is not for "softmax", and "log_softmax" needs the log-sum-exp of
    all V logits as well; both are refused there. A step on the folded weight is not a step on the projection, so train
    with the projection and fold afterwards. Gradients flow through.

    Args:
        token_weight: (V, C). token_bias: (V,) or None.
        projection: (d, V). projection_bias: (d,) or None.

    Returns:
        `FoldedHead(weight (d, C), bias (d,))` in the dtype of `token_weight`, multiplied in float32 or better.
        `FoldedHead(torch.stack(weights), torch.stack(biases))` makes the (T, d, C) heads of T tasks.

    The predicted class alone needs no norm of the embedding, only a (K, C) matrix: the linear classifier with weight
    `F.normalize(prototypes) @ head.weight` and bias `F.normalize(prototypes) @ head.bias` has the same argmax.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it must be and what it is.

    >>> import torch
    >>> from vptm_kernels import fold_head, prototype_cosine
    >>> weight, bias, projection = torch.randn(64, 24), torch.randn(64), torch.randn(8, 64)
    >>> hidden, prototypes = torch.randn(2, 24), torch.randn(5, 8)
    >>> head = fold_head(weight, bias, projection)
    >>> folded = prototype_cosine(hidden, head, None, prototypes)
    >>> torch.allclose(folded, prototype_cosine(hidden, weight, bias, prototypes, projection=projection), atol=1e-5)
    True
    """
    for name, t, ndim, shape in (
        ("token_weight", token_weight, 2, "(V, C)"),
        ("token_bias", token_bias, 1, "(V,)"),
        ("projection", projection, 2, "(d, V)"),
        ("projection_bias", projection_bias, 1, "(d,)"),
    ):
        if t is None and ndim == 1:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor {shape}, got {type(t).__name__}")
        if t.ndim != ndim or t.dtype != token_weight.dtype:
            raise ValueError(
                f"{name} must be {shape} in the dtype of token_weight, {token_weight.dtype}, "
                f"got {tuple(t.shape)} {t.dtype}"
            )
        if t.device != token_weight.device:
            raise ValueError(f"{name} must be on the device of token_weight, {token_weight.device}, got {t.device}")
    if not token_weight.is_floating_point():
        raise ValueError(f"token_weight must be floating point, got {token_weight.dtype}")
    tokens, dim = token_weight.shape[0], projection.shape[0]
    if projection.shape[1] != tokens:
        raise ValueError(f"projection must be (d, V) with V = {tokens}, got {tuple(projection.shape)}")
    if token_bias is not None and token_bias.shape[0] != tokens:
        raise ValueError(f"token_bias must be (V,) with V = {tokens}, got {tuple(token_bias.shape)}")
    if projection_bias is not None and projection_bias.shape[0] != dim:
        raise ValueError(f"projection_bias must be (d,) with d = {dim}, got {tuple(projection_bias.shape)}")
    exact, dtype = accumulator(token_weight.dtype), token_weight.dtype
    with torch.autocast(token_weight.device.type, enabled=False):  # what is folded once is read outside autocast too
        weight = projection.to(exact) @ token_weight.to(exact)
        bias = weight.new_zeros(dim) if token_bias is None else projection.to(exact) @ token_bias.to(exact)
    if projection_bias is not None:
        bias = bias + projection_bias.to(exact)
    return FoldedHead(weight.to(dtype), bias.to(dtype))


@torch.no_grad()
def token_gram(token_weight: Tensor, token_bias: Tensor | None = None) -> Tensor:
    """The Gram matrix of a frozen token head as a triangular factor R, for prototypes that live in token space (d = V).

    `RᵀR = [W b]ᵀ[W b]`, so `‖W h + b‖ = ‖R [h; 1]‖` costs C² instead of V*C products. The norm is taken from the factor
    and not from `hᵀ(WᵀW)h`, which squares the cancellation: where `W h` nearly meets `-b` the Gram matrix itself leaves
    no correct digit, while R has the error of the logits themselves, at most about `C * eps * ‖R‖ * ‖[h; 1]‖`, in every
    dtype. So it may be used wherever the logits may: within 1e-12 in float64, 1e-5 in float32 and 2 eps in 16 bits of
    `‖W‖ * ‖h‖` for C <= 1024. The factorisation is a QR decomposition in float64 (never of WᵀW), once per head.

    Args:
        token_weight: (V, C) frozen. token_bias: (V,) or None.

    Returns:
        (min(V, C + 1), C + 1) in float32, or float64 for a float64 head: the `token_gram` of `prototype_cosine`.

    >>> import torch
    >>> from vptm_kernels import token_gram
    >>> weight, bias, h = torch.randn(64, 24), torch.randn(64), torch.randn(24)
    >>> norm = (token_gram(weight, bias) @ torch.cat([h, torch.ones(1)])).norm()
    >>> torch.allclose(norm, (weight @ h + bias).norm())
    True
    """
    if not isinstance(token_weight, Tensor) or token_weight.ndim != 2:
        raise ValueError(f"token_weight must be a tensor (V, C), got {getattr(token_weight, 'shape', token_weight)!r}")
    if token_bias is not None and getattr(token_bias, "shape", None) != token_weight.shape[:1]:
        found = tuple(token_bias.shape) if isinstance(token_bias, Tensor) else type(token_bias).__name__
        raise ValueError(f"token_bias must be a tensor (V,) with V = {token_weight.shape[0]}, got {found}")
    column = token_weight.new_zeros(token_weight.shape[0]) if token_bias is None else token_bias
    augmented = torch.cat([token_weight.double(), column.double()[:, None]], 1)
    return torch.linalg.qr(augmented, mode="r").R.to(accumulator(token_weight.dtype)).contiguous()
