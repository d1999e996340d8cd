"""shifted_norm against its definition in float64: shapes, dtypes, adversarial values, bad input, registration, and
compiled for GPUs that are not there.

The Triton kernel runs in the interpreter where there is no GPU, with every access checked for bounds and races.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compiled import each, reports
from hypothesis import given, settings
from hypothesis import strategies as st

import vptm_kernels
from vptm_kernels._runtime.triton_support import has_triton
from vptm_kernels.shifted_norm import shifted_norm
from vptm_kernels.shifted_norm.ops import shifted_norm_op
from vptm_kernels.shifted_norm.reference import shifted_norm_reference
from vptm_kernels.testing import assert_close_to_exact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton"] if has_triton() else ["torch"]
# Kernels compute in float64 in the interpreter only.
EXACT_IMPLS = [impl for impl in IMPLS if impl == "torch" or DEVICE == "cpu"]
needs_triton = pytest.mark.skipif(not has_triton(), reason="the triton package is not installed")


@dataclass(frozen=True)
class Case:
    """One call. sliced: rows of x are parts of longer ones."""

    shape: tuple[int, ...] = (2, 19, 20)
    shift: bool = True
    sliced: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)
        *leading, width = self.shape
        longer = width + 4 if self.sliced else width
        x = torch.randn(*leading, longer, generator=generator, dtype=torch.float64).to(DEVICE, self.dtype)
        # kept in float32 beside 16-bit rows, as models do
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        shift = torch.randn(width, generator=generator, dtype=torch.float64).to(DEVICE, exact)
        return x[..., 3 : 3 + width] if self.sliced else x, shift if self.shift else None


def check(case: Case, impl: str, change: Any = None) -> None:
    x, shift = case.inputs()
    if change is not None:
        change(x)
    found = shifted_norm(x, shift, eps=1e-6, impl=impl)
    assert found.dtype == case.dtype and found.is_contiguous()
    exact = shifted_norm_reference(x.double(), None if shift is None else shift.double(), eps=1e-6)
    eager = None if case.dtype == torch.float64 else shifted_norm_reference(x, shift, eps=1e-6)
    assert_close_to_exact(str(case), found, exact, eager)


# One below, at and above a block of 16 rows; one channel; a width that is no power of two; one and four dimensions; no
# row.
@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("shape", [(15, 1), (16, 16), (17, 33), (7,), (2, 3, 5, 7), (0, 8), (1, 130)])
def test_shapes(shape, impl):
    check(Case(shape), impl)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@settings(max_examples=20)
@given(data=st.data())
def test_random_cases(data, impl):
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 17]), min_size=1, max_size=3)))
    check(data.draw(st.builds(Case, st.just(shape), st.booleans(), st.booleans(), seed=st.integers(0, 9))), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [True, False])
def test_error_budget(shift, dtype, impl):
    """The width of a real model, and a sum that is not rounded before the norm sees it."""
    check(Case((3, 50, 96), shift, dtype=dtype), impl)
    check(Case((2, 768), shift, dtype=dtype), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype,mean", [(torch.float32, 1e4), (torch.bfloat16, 1e3), (torch.float16, 1e3)])
def test_a_mean_far_above_the_deviation(dtype, mean, impl):
    """Sums of squares would lose mean² / deviation² in accuracy: 1e8 here, all that float32 has."""
    check(Case((2, 19, 96), dtype=dtype), impl, change=lambda x: x.add_(mean))


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_channels_have_no_variance(impl):
    x = torch.full((2, 32), 1.5, device=DEVICE)
    assert not shifted_norm(x, torch.full((32,), -3.0, device=DEVICE), eps=1e-6, impl=impl).any()


def small(**changes: Any) -> dict[str, Any]:
    return {"x": torch.randn(2, 20), "shift": torch.randn(20), "eps": 1e-6, **changes}


BAD_INPUT = {
    "eps must be a finite non-negative number, got -1": {"eps": -1},
    "x must be (..., C) of at least one dimension, got (2, 0)": {"x": torch.randn(2, 0)},
    "x must be float16, bfloat16, float32 or float64, got torch.int64": {"x": torch.ones(2, 20).long()},
    "shift must be (C,) = (20,), got (19,)": {"shift": torch.randn(19)},
    "shift must be floating point, got torch.int64": {"shift": torch.ones(20).long()},
    "shift must be on the device of x, cpu, got meta": {"shift": torch.randn(20, device="meta")},
    "impl must be one of ('auto', 'triton', 'torch'), got 'cuda'": {"impl": "cuda"},
}


@pytest.mark.parametrize("message", BAD_INPUT, ids=lambda message: re.sub(r"[^a-z_]+", "-", message[:30]))
def test_bad_input_is_refused_by_name_and_value(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shifted_norm(**(small() | BAD_INPUT[message]))


def test_wrong_types_are_refused_by_name():
    with pytest.raises(TypeError, match="shift must be a tensor, got float"):
        shifted_norm(**small(shift=1.0))


@needs_triton
def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    wide = torch.randn(1, 8193, device=DEVICE)
    with pytest.raises(ValueError, match="impl='triton' needs at most 8192 channels, got 8193"):
        shifted_norm(wide, None, eps=1e-6, impl="triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match=r"impl='triton' needs GPU tensors .*, got device cpu"):
            shifted_norm(**small(impl="triton"))


def test_a_gradient_is_refused_and_not_lost():
    """Run without the registered op, the result would be a constant to autograd."""
    out = shifted_norm(**small(x=torch.randn(2, 20, requires_grad=True)))
    with pytest.raises(RuntimeError, match="shifted_norm"):
        out.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shift", [True, False])
def test_opcheck(shift, impl):
    """Schema, fakes with the real strides, and AOT dispatch with dynamic shapes."""
    torch.library.opcheck(shifted_norm_op, (*Case((2, 3, 8), shift, dtype=torch.float32).inputs(), 1e-6, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_fullgraph_compile(impl):
    """Inductor asserts the strides that the fakes promise, so it sees a wrong fake that opcheck misses."""
    torch._dynamo.reset()
    inputs = Case((2, 5, 8), sliced=True, dtype=torch.float32).inputs()
    compiled = torch.compile(lambda x, shift: shifted_norm(x, shift, eps=1e-6, impl=impl), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), shifted_norm(*inputs, eps=1e-6, impl=impl))


def test_it_is_not_among_the_public_ops():
    """It has no derivative."""
    assert "shifted_norm" not in vptm_kernels.__all__


@needs_triton
@pytest.mark.parametrize("target", each())
def test_kernels_compile_without_spills(target, against_baseline):
    found = reports(target, "shifted_norm/")
    assert [report.kernel for report in found] and not [report.row() for report in found if report.problems]
    if target.startswith("sm"):
        assert all(report.loads.get("128") for report in found), "rows are read 16 bytes at a time"
    against_baseline(found)
