"""Which calls may go past the dispatcher: those that nobody would miss there."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vptm_kernels import prompted_attention
from vptm_kernels._runtime.plans import Plans, forget_plans, place, signature
from vptm_kernels._runtime.private_torch import autocasting
from vptm_kernels._runtime.tracing import nothing_traces
from vptm_kernels._runtime.triton_support import has_triton


class Subclass(torch.Tensor):
    pass


def test_plain_tensors_are_heard_by_nobody():
    t = torch.zeros(2)
    assert nothing_traces(t, None, torch.nn.Parameter(t)) and not autocasting()
    with torch.inference_mode():
        assert nothing_traces(t)


@pytest.mark.parametrize("value", [torch.zeros(2).as_subclass(Subclass), "not a tensor"])
def test_other_types_are_not_plain(value):
    """A subclass would lose its `__torch_function__`, and a wrong argument the words of the checks."""
    assert not nothing_traces(torch.zeros(2), value)


@pytest.mark.parametrize("mode", [FakeTensorMode, FlopCounterMode, TorchFunctionMode, forward_ad.dual_level])
def test_modes_and_forward_derivatives_listen(mode):
    """Past the dispatcher they would see nothing: no FLOPs, no fake result, a derivative of zero."""
    t = torch.zeros(2)
    context = mode(display=False) if mode is FlopCounterMode else mode()
    with context:
        assert not nothing_traces(t)
    assert nothing_traces(t)


def test_transforms_and_traces_listen():
    heard = []

    def call(t):
        heard.append(nothing_traces(torch.zeros(2)))
        return t * 2

    torch.func.vmap(call)(torch.zeros(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        torch.jit.trace(call, (torch.zeros(2),), check_trace=False)
    assert heard and not any(heard)


def test_autocast_may_be_on_for_any_device():
    with torch.autocast("cpu", torch.bfloat16):
        assert autocasting()


def test_plans_are_dropped_when_there_are_many_and_when_told():
    """Shapes that never come again, as of a data set of many sizes, must not be held for ever."""
    plans: Plans[int] = Plans()
    for key in range(1024):
        plans.keep(key, key)
    assert plans.get(0) == 0 and len(plans) == 1024
    plans.keep(1024, 1024)
    assert plans.get(0) is None and plans.get(1024) == 1024
    forget_plans()
    assert len(plans) == 0


def test_a_signature_tells_apart_what_kernels_are_compiled_for():
    """Were two of these one, a kernel compiled for aligned rows would read others, or past the end of a buffer."""
    base = torch.zeros(4, 32)
    others = [
        *(base[:2], base.t(), base.half(), base[:, 1:29], base[:, 4:32][:, :28]),
        *(base.flatten()[1:29].view(1, 28), base.flatten()[4:32].view(1, 28)),
    ]
    found = [signature(base), *map(signature, others)]
    assert len(set(found)) == len(found)
    assert signature(base.flatten()[8:36].view(1, 28)) == found[-1], "both start at a multiple of 16 bytes"
    shorter = torch.zeros(3, 32)[:2]
    assert signature(shorter) == signature(base[:2]) and place(shorter) != place(base[:2])


@pytest.mark.skipif(not has_triton() or torch.cuda.is_available(), reason="needs the interpreter")
def test_backward_plans_by_the_tensors_that_hooks_give_back():
    """Offloading hooks may return saved tensors with other strides: with the plan of forward, rows would be misread."""
    qkv, prompts = torch.randn(2, 5, 96), torch.randn(3, 64)
    found = []

    def padded(t):
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 8), float("nan"), dtype=t.dtype)[..., : t.shape[-1]]
        return wide.copy_(t)

    for unpack in (lambda t: t, padded):
        leaves = [qkv.clone().requires_grad_(), prompts.clone().requires_grad_()]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            out = prompted_attention(*leaves, num_heads=2, impl="triton")
        found.append(torch.autograd.grad(out.sin().sum(), leaves))
    for expected, actual in zip(*found):
        assert torch.equal(actual, expected)
