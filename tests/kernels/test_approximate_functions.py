"""Float32 on a GPU, where exponents, logarithms and quotients are approximate: kernels must stay within the budget of
`assert_close_to_exact` for it, and that budget must be too small for a product in fewer bits.

The interpreter computes with NumPy, which errs less than a GPU: what was wrong by its approximate quotients alone was
first seen on one. Here it computes like one.
"""

from __future__ import annotations

from functools import partial

import prototype_case
import pytest
import test_prompted_attention
import test_readout_attention
import test_residual_norm
import torch
from interpreter import approximate_functions
from test_prototype_cosine import TRAINED, force_plan  # noqa: F401  (a fixture)

from vptm_kernels._runtime.triton_support import has_triton
from vptm_kernels.testing import AttentionCase, assert_close_to_exact, budget

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="the triton package is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is approximate itself"),
]

FLOAT32 = torch.float32
Attention, Readout, Norm, Prototypes = (
    AttentionCase,
    test_readout_attention.Case,
    test_residual_norm.Case,
    prototype_case.Case,
)
_SHAPE = {"batch": 20, "width": 21, "tokens": 70, "dim": 18, "classes": 17, "grads": TRAINED["triton"]}
CASES = {
    # one channel is its own mean, and its gradient zero
    "norm": partial(test_residual_norm.check, Norm(shape=(15, 1), dtype=FLOAT32)),
    # a long sum of products, and its gradients
    "attention": partial(
        test_prompted_attention.check, Attention(1, 1, 207, 0, 64, bias="dense", dtype=FLOAT32), with_lse=False
    ),
    "attention of few keys": partial(
        test_prompted_attention.check, Attention(prompts="image", bias="dense", dtype=FLOAT32)
    ),
    "read-out": partial(test_readout_attention.check, Readout(tokens=50, width=96, dtype=FLOAT32)),
    **{
        f"{activation} of {head}": partial(
            prototype_case.check, Prototypes(head=head, activation=activation, biases=False, dtype=FLOAT32, **_SHAPE)
        )
        for head, activation in (("projection", "softmax"), ("tokens", "log_softmax"))
    },
    "folded": partial(prototype_case.check, Prototypes(batch=20, width=24, dim=8, head="folded", dtype=FLOAT32)),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(budget, "approximate", lambda device, dtype: dtype == FLOAT32)
    with approximate_functions():
        yield


@pytest.mark.parametrize("name", CASES)
def test_kernels_stay_within_the_budget_of_a_gpu(name, as_on_a_gpu, force_plan):  # noqa: F811
    force_plan("stream")
    CASES[name]("triton")


def test_the_interpreter_is_exact_again(monkeypatch):
    """The functions above must not leak into the tests of float64 and of the other budgets."""
    from triton.runtime.interpreter import InterpreterBuilder

    names = ("create_exp2", "create_exp", "create_log2", "create_log", "create_rsqrt", "create_fdiv", "create_dot")
    before = [getattr(InterpreterBuilder, name) for name in names]
    with approximate_functions():
        assert not set(before) & {getattr(InterpreterBuilder, name) for name in names}
    assert before == [getattr(InterpreterBuilder, name) for name in names]


def tf32(t: torch.Tensor) -> torch.Tensor:
    """Rounded to the 10 bits that tf32 keeps."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _attention(q, k, v, product):
    return product(torch.softmax(product(q, k.mT) / 8, -1), v)


def test_the_budget_is_too_small_for_a_product_in_tf32(monkeypatch):
    """The likeliest mistake that float32 hides: operands of fewer bits. Its error is a hundred times the allowance."""
    q, k, v = torch.randn(3, 197, 64, generator=torch.Generator().manual_seed(0)).unbind()
    exact = _attention(q.double(), k.double(), v.double(), torch.matmul)
    eager = _attention(q, k, v, torch.matmul)
    monkeypatch.setattr(budget, "approximate", lambda device, dtype: True)
    assert_close_to_exact("float32", eager, exact, eager)
    for product in (
        lambda a, b: tf32(a) @ b,
        lambda a, b: tf32(a) @ tf32(b),
        lambda a, b: (a.half() @ b.half()).float(),
    ):
        with pytest.raises(AssertionError, match="exceeds the budget"):
            assert_close_to_exact("tf32", _attention(q, k, v, product), exact, eager)


def test_the_budget_of_a_gpu_is_that_of_its_functions(monkeypatch):
    """8 eps of the largest value beside PyTorch's error, or of the terms that cancel; elsewhere none."""
    exact = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    eager, eps = exact.float(), torch.finfo(FLOAT32).eps
    off = (exact + torch.tensor([0.0, 0.0, 8 * 2 * eps])).float()
    beyond = (exact + torch.tensor([0.0, 0.0, 10 * 2 * eps])).float()
    for found in (off, beyond):
        with pytest.raises(AssertionError, match="exceeds the budget"):
            assert_close_to_exact("on a CPU", found, exact, eager)
    monkeypatch.setattr(budget, "approximate", lambda device, dtype: True)
    assert_close_to_exact("on a GPU", off, exact, eager)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_close_to_exact("on a GPU", beyond, exact, eager)
    assert_close_to_exact("of larger terms", beyond, exact, eager, terms=3.0)
