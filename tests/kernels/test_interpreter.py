"""The interpreter repairs themselves: if one of these fails, no other kernel test on a CPU can be trusted."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is only used where there is no GPU", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def _matmul(a, b, out, M: tl.constexpr):
    i = tl.arange(0, M)
    at = i[:, None] * M + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(out.dtype.element_ty))


@triton.jit
def _copy(x, y, n, shift, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i + shift, mask=i < n), mask=i < n)


@triton.jit
def _sum(x, out, n, BLOCK: tl.constexpr):
    total = 0.0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    tl.store(out, total)


def test_bfloat16_dot_and_rounding_match_torch():
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    _matmul[(1,)](a, b, out, M=16)
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())


def test_runtime_bounded_loop():
    out = torch.empty(1)
    _sum[(1,)](torch.ones(37), out, 37, BLOCK=16)
    assert out.item() == 37


@pytest.mark.parametrize("shift", [1, -1])
def test_out_of_bounds_load_is_an_error(shift):
    x, y = torch.zeros(100), torch.zeros(100)
    with pytest.raises(Exception, match="out of bounds load"):
        _copy[(4,)](x, y, 100, shift, 32, BLOCK=32)


def test_out_of_bounds_store_is_an_error():
    with pytest.raises(Exception, match="out of bounds store"):
        _copy[(1,)](torch.zeros(32), torch.zeros(31), 32, 0, 32, BLOCK=32)


def test_two_programs_storing_to_one_element_is_an_error():
    with pytest.raises(Exception, match="race"):
        _copy[(2,)](torch.zeros(64), torch.zeros(64), 64, 0, 16, BLOCK=32)
