"""Products of float32 follow the setting that PyTorch's own products follow, at every call."""

import pytest
import torch

pytest.importorskip("triton")

from vptm_kernels import prompted_attention, prototype_cosine
from vptm_kernels._runtime.triton_support import dot_precision, float32_precision
from vptm_kernels.prototype_cosine import torch_impl
from vptm_kernels.readout_attention.api import readout_attention


@pytest.fixture
def setting():
    """Sets the precision, and puts it back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def attention(dtype):
    qkv = torch.randn(1, 5, 3 * 16, dtype=dtype, requires_grad=True)
    prompts = torch.randn(2, 2 * 16, dtype=dtype, requires_grad=True)
    bias = torch.randn(1, 5, 5, requires_grad=True)
    with torch.no_grad():
        prompted_attention(qkv, prompts, num_heads=1, bias=bias, impl="triton")
    prompted_attention(qkv, prompts, num_heads=1, bias=bias, impl="triton").sum().backward()


def readout(dtype):
    x, q = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((1, 5, 16), (1, 16)))
    weights = {"k_weight": torch.randn(16, 16, dtype=dtype), "v_weight": torch.randn(16, 16, dtype=dtype)}
    norm = {"norm_weight": None, "norm_bias": None, "eps": 1e-6, "v_bias": None}
    readout_attention(x, q, num_heads=1, impl="triton", **norm, **weights).sum().backward()


def prototypes(dtype):
    hidden = torch.randn(2, 16, dtype=dtype, requires_grad=True)
    projection = torch.randn(4, 32, dtype=dtype, requires_grad=True)
    weight, bias, classes = (torch.randn(*shape, dtype=dtype) for shape in ((32, 16), (32,), (3, 4)))
    options = {"projection": projection, "activation": "softmax", "impl": "triton"}
    prototype_cosine(hidden, weight, bias, classes, **options).sum().backward()


@pytest.mark.skipif("torch.cuda.is_available()", reason="reads in the interpreter what reaches the products")
@pytest.mark.parametrize("call", [attention, readout, prototypes])
def test_every_product_follows_the_setting_of_its_call(call, setting, monkeypatch):
    """A plan kept from before the setting changed, or one kernel that forgot it, would compute the model's attention in
    another precision than its linears, in silence."""
    from triton.runtime import interpreter

    multiply, found = interpreter.InterpreterBuilder.create_dot, []

    def recorded(self, a, b, acc, input_precision, *rest):
        found.append(str(input_precision).rpartition(".")[2].lower())
        return multiply(self, a, b, acc, input_precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", recorded)
    monkeypatch.setattr(torch_impl, "choose_plan", lambda *shape: "stream")
    for name, expected in (("highest", "ieee"), ("high", "tf32"), ("highest", "ieee"), ("medium", "tf32")):
        setting(name)
        found.clear()
        call(torch.float32)
        assert len(found) > 4 and set(found) == {expected}, f"{name}: {found}"
    found.clear()
    call(torch.float64)
    assert set(found) == {"ieee"}


def test_only_float32_and_only_where_the_hardware_has_it(setting):
    setting("high")
    assert float32_precision(torch.float32) == "tf32"
    assert {float32_precision(t) for t in (torch.float64, torch.float16, torch.bfloat16)} == {"ieee"}
    archs = ("sm80", "sm90", "sm120", "gfx942", "gfx950")
    assert [dot_precision(torch.float32, arch) for arch in archs] == ["tf32"] * 4 + ["ieee"]
    setting("highest")
    assert {dot_precision(torch.float32, arch) for arch in archs} == {"ieee"}
