"""How far a result may be from the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

APPROXIMATE = 8
"""Units of eps, of the largest value, that float32 results of a GPU may carry beside those of eager PyTorch."""


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, infinities equal to themselves; infinite if anything but those is not finite."""
    actual, exact = actual.detach().double(), exact.detach().double()
    difference = torch.where(actual == exact, 0.0, (actual - exact).abs()).nan_to_num(nan=float("inf"))
    return difference.max().item() if difference.numel() else 0.0


def _largest(t: Tensor) -> float:
    finite = t.detach().double().abs()
    finite = finite[finite.isfinite()]
    return finite.max().item() if finite.numel() else 0.0


def approximate(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels compute there with approximate functions, whose errors this dtype shows."""
    return device.type == "cuda" and dtype == torch.float32


def assert_close_to_exact(
    name: str,
    actual: Tensor,
    exact: Tensor,
    eager: Tensor | None = None,
    *,
    factor: float = 2,
    tolerance: float = 1e-12,
    terms: float = 0.0,
    dtype: torch.dtype | None = None,
) -> None:
    """`actual` must be as good as eager PyTorch in its dtype, or in float64 exact up to `tolerance`.

    exact: the float64 result on the same (quantised) inputs. eager: the eager result in the dtype of `actual`; the
    budget is `factor` times its error plus one eps of the largest exact value. Without eager the budget is
    `tolerance * max(1, largest exact value)`.

    A float32 result that lies on a GPU may err by `APPROXIMATE` = 8 eps of the largest exact value more. Kernels
    compute there with functions that PyTorch and NumPy round further; PTX bounds their errors, in eps = 2**-23, by
    2 for `ex2.approx` (2**-22), 2 for `lg2.approx` (2**-22), 2 for `div.full` (2 ulp) and 1.1 for `rsqrt.approx`
    (2**-22.9). Behind one another stand at most four: two exponents (of a score, and in the sum it is divided by), that
    division, and in a backward pass the logarithm that the sum was kept as, 2 + 2 + 2 + 2. A product in tf32 errs by
    2**-11, 4096 eps, of what it multiplies, and one in bfloat16 by 2**-9. Few results come near all four: what is left
    covers sums of products, which kernels make term after term and PyTorch's libraries in parts.

    terms: size of the terms that cancel in the result, where they are larger than it: every eps is of them. dtype: what
    was computed in, where the results were widened since.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = largest_error(actual, exact)
    if eager is None:
        budget = tolerance * max(1.0, _largest(exact))
    else:
        assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
        dtype = actual.dtype if dtype is None else dtype
        roundings = 1 + APPROXIMATE if approximate(actual.device, dtype) else 1
        budget = factor * largest_error(eager, exact)
        budget += roundings * torch.finfo(dtype).eps * max(terms, _largest(exact))
    assert error <= budget, f"{name}: error {error:.3g} exceeds the budget {budget:.3g}"
