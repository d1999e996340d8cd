"""How far a result may be from the exact one."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, infinities equal to themselves; infinite if anything but those is not finite."""
    actual, exact = actual.detach().double(), exact.detach().double()
    difference = torch.where(actual == exact, 0.0, (actual - exact).abs()).nan_to_num(nan=float("inf"))
    return difference.max().item() if difference.numel() else 0.0


def _largest(t: Tensor) -> float:
    finite = t.detach().double().abs()
    finite = finite[finite.isfinite()]
    return finite.max().item() if finite.numel() else 0.0


def assert_close_to_exact(
    name: str,
    actual: Tensor,
    exact: Tensor,
    eager: Tensor | None = None,
    *,
    factor: float = 2,
    tolerance: float = 1e-12,
) -> None:
    """`actual` must be as good as eager PyTorch in its dtype, or in float64 exact up to `tolerance`.

    exact: the float64 result on the same (quantised) inputs. eager: the eager result in the dtype of `actual`; the
    budget is `factor` times its error plus one eps of the largest exact value. Without eager the budget is
    `tolerance * max(1, largest exact value)`.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = largest_error(actual, exact)
    if eager is None:
        budget = tolerance * max(1.0, _largest(exact))
    else:
        assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
        budget = factor * largest_error(eager, exact) + torch.finfo(actual.dtype).eps * _largest(exact)
    assert error <= budget, f"{name}: error {error:.3g} exceeds the budget {budget:.3g}"
