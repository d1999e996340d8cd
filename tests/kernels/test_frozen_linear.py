"""Linear layers that do not learn, on a CPU: either library gives the same numbers, and gradients are never lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from beit_factory import tiny_beit
from tiny_models import build, build_vit, images, pictures, tiny_vit
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vptm_kernels._runtime import frozen_linear as module
from vptm_kernels._runtime.frozen_linear import frozen_linear, pack_weight, runs_onednn
from vptm_kernels.testing import assert_close_to_exact

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """Calls of oneDNN's operator."""
    found: list[int] = []
    own = module._onednn
    monkeypatch.setattr(module, "_onednn", lambda *arguments: found.append(1) or own(*arguments))
    return found


@pytest.fixture(params=[True, False], ids=["onednn", "default"])
def onednn(request, monkeypatch):
    """Both libraries, whatever processor this is and however small the layer."""
    monkeypatch.setattr(module, "onednn_is_faster", lambda dtype: request.param)
    monkeypatch.setattr(module, "_FEWEST_WEIGHTS", 0)
    return request.param


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 7), (1, 7), (2, 5, 7)])  # no row, one row, and rows that are a slice of more
@torch.no_grad()
def test_equals_linear_and_gelu(onednn: bool, shape: tuple[int, ...], dtype: torch.dtype, gelu: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((*shape[:-1], 9), (3, 7), (3,)))
    x = x[..., 1:8]
    assert runs_onednn(x, weight) == onednn

    def textbook(*tensors: torch.Tensor) -> torch.Tensor:
        out = F.linear(*tensors)
        return F.gelu(out) if gelu else out

    found = frozen_linear(x, weight, bias, gelu=gelu)
    assert found.shape == (*shape[:-1], 3) and found.dtype == dtype
    exact = textbook(x.double(), weight.double(), bias.double())
    assert_close_to_exact("frozen_linear", found, exact, textbook(x, weight, bias), factor=2)
    packed = pack_weight(weight)
    assert (packed is not None) == onednn
    found = frozen_linear(x, weight, bias, gelu=gelu, packed=packed)
    assert_close_to_exact("packed", found, exact, textbook(x, weight, bias), factor=2)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_linear(onednn: bool, calls: list[int], dtype: torch.dtype, gelu: bool) -> None:
    """oneDNN's operator has no gradient: prompts would stop learning without the one that is given to it."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 7).to(dtype), torch.randn(3, 7).to(dtype), torch.randn(3).to(dtype)
    upstream = torch.randn(4, 2, 3).to(dtype).transpose(0, 1)  # as attention gives it: rows that are not contiguous

    def gradient(function: Any, cast: torch.dtype) -> torch.Tensor:
        leaf = x.to(cast).requires_grad_()
        return torch.autograd.grad(function(leaf, weight.to(cast), bias.to(cast)), leaf, upstream.to(cast))[0]

    def textbook(*tensors: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.linear(*tensors)) if gelu else F.linear(*tensors)

    found = gradient(lambda *tensors: frozen_linear(*tensors, gelu=gelu), dtype)
    assert bool(calls) == (onednn and dtype == torch.float32)
    assert_close_to_exact("gradient", found, gradient(textbook, torch.float64), gradient(textbook, dtype), factor=3)


def test_a_gradient_of_the_gradient_is_that_of_linear(onednn: bool) -> None:
    """A penalty on gradients needs it, and an operator without a gradient would give zeros."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 7, requires_grad=True), torch.randn(3, 7)
    second = []
    for function in (lambda x: frozen_linear(x, weight, gelu=True), lambda x: F.gelu(F.linear(x, weight))):
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*second)
    assert bool(second[0].any())


def test_a_weight_that_learns_gets_its_gradient(onednn: bool, calls: list[int]) -> None:
    x, weight, bias = torch.randn(4, 7), torch.randn(3, 7, requires_grad=True), torch.randn(3, requires_grad=True)
    frozen_linear(x, weight, bias).sum().backward()
    frozen_linear(x, weight.detach(), bias).sum().backward()
    assert weight.grad is not None and torch.equal(bias.grad, torch.full((3,), 8.0)) and not calls


@torch.no_grad()
def test_autocast_decides_the_dtype(onednn: bool) -> None:
    x, weight = torch.randn(4, 7), torch.randn(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_linear(x, weight.bfloat16()).dtype == torch.bfloat16
        assert not runs_onednn(x, weight)  # linear casts such a weight itself
        assert frozen_linear(x, weight).dtype == torch.bfloat16


@torch.no_grad()
def test_flops_are_counted(onednn: bool) -> None:
    """The counter knows no formula of oneDNN's operator: an encoder on it would seem to cost nothing."""
    with FlopCounterMode(display=False) as counter:
        frozen_linear(torch.randn(2, 5, 7), torch.randn(3, 7), torch.randn(3), gelu=True)
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * 3


@torch.no_grad()
def test_a_forward_mode_derivative_is_not_lost(onednn: bool) -> None:
    """Forward mode works where grad mode is off, and oneDNN's operator would drop the tangent without a word."""
    x, tangent, weight = torch.randn(4, 7), torch.randn(4, 7), torch.randn(3, 7)
    with forward_ad.dual_level():
        dual = frozen_linear(forward_ad.make_dual(x, tangent), weight)
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, F.linear(tangent, weight))
    pushed = torch.func.jvp(lambda x: frozen_linear(x, weight, gelu=True), (x,), (tangent,))[1]
    torch.testing.assert_close(pushed, torch.func.jvp(lambda x: F.gelu(F.linear(x, weight)), (x,), (tangent,))[1])


@torch.no_grad()
def test_the_users_switch_turns_it_off(onednn: bool) -> None:
    x, weight = torch.randn(4, 7), torch.randn(3, 7)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not runs_onednn(x, weight)


@torch.no_grad()
def test_nothing_traced_holds_it(onednn: bool, calls: list[int]) -> None:
    """A graph made here runs elsewhere."""
    model = build_vit(tiny_vit(), prompt_mode="deep", prompt_length=3).float()
    batch = pictures(model, 3).float()
    expected = model(batch)
    assert bool(calls) == onednn
    calls.clear()
    exported = torch.export.export(model, (batch,)).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for run in (exported, compiled, make_fx(model)(batch)):
        torch.testing.assert_close(run(batch), expected)
    assert not calls


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("mode", ["shallow", "deep", "progressive"])
@pytest.mark.parametrize("readout", ["mask", "cls", "mean"])
@torch.no_grad()
def test_beit_equals_reference(onednn: bool, calls: list[int], mode: str, readout: str, precision: str) -> None:
    """Whole models, in every precision oneDNN is used in, and it must be used: eager frozen inference is what it is
    for."""
    model = build(tiny_beit(), prompt_mode=mode, prompt_length=3, readout=readout)
    _equals_reference(model, images(model, 3), precision)
    assert bool(calls) == onednn


@pytest.mark.parametrize("mode", ["shallow", "deep"])
def test_a_training_step_has_the_gradients_of_the_reference(onednn: bool, calls: list[int], mode: str) -> None:
    """Prompts, token head and prototypes of whole models learn through oneDNN's products."""
    model = build(tiny_beit(), prompt_mode=mode, prompt_length=3).float().train()
    eager = copy.deepcopy(model)
    eager.impl = "reference"
    exact, batch = copy.deepcopy(eager).double(), images(model, 3)

    def gradients(one: Any, images: torch.Tensor) -> list[torch.Tensor]:
        return list(
            torch.autograd.grad(F.cross_entropy(one(images), torch.arange(3)), list(one.trainable_parameters()))
        )

    found, peers, want = gradients(model, batch.float()), gradients(eager, batch.float()), gradients(exact, batch)
    assert bool(calls) == onednn
    for actual, peer, right in zip(found, peers, want):
        # so small a model is off by an eps or two: which of two orders of summation is nearer is chance
        limit = 3 * (peer - right).abs().max() + 8 * torch.finfo(torch.float32).eps * right.abs().max().clamp(min=1)
        assert (actual - right).abs().max() <= limit


@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "gelu_tanh"])
@torch.no_grad()
def test_vit_equals_reference(onednn: bool, calls: list[int], act: str) -> None:
    """Only the exact GELU runs inside the product: CLIP's and the tanh form must not."""
    model = build_vit(tiny_vit(act_layer=act), prompt_mode="deep", prompt_length=3)
    _equals_reference(model, pictures(model, 3), "float32")
    assert bool(calls) == onednn


def _equals_reference(model: Any, batch: torch.Tensor, precision: str) -> None:
    if precision == "autocast":
        model = model.float()
        batch = batch.float()
        exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
        exact.impl = eager.impl = "reference"
        with torch.autocast("cpu", torch.bfloat16):
            found, peer = model.forward_hidden(batch).double(), eager.forward_hidden(batch).double()
        want = exact.forward_hidden(batch.double())
        assert (found - want).abs().max() <= 2 * (peer - want).abs().max() + torch.finfo(torch.bfloat16).eps
        return
    dtype = getattr(torch, precision)
    model, batch = model.to(dtype), batch.to(dtype)
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact.impl = eager.impl = "reference"
    want = exact.forward_hidden(batch.double())
    # so small a model is off by an eps or two: which of two orders of summation is nearer is chance
    error, peer = ((m.forward_hidden(batch) - want).abs().max() for m in (model, eager))
    assert error <= 2 * peer + 4 * torch.finfo(dtype).eps * want.abs().max()
