"""Private interfaces of PyTorch stand in one file, and where a version lacks one the public way gives the same."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from vptm_kernels import prompted_attention, prototype_cosine
from vptm_kernels._runtime import frozen_linear, private_torch, ranges, tracing
from vptm_kernels.prompted_attention import torch_impl as attention
from vptm_kernels.prototype_cosine import torch_impl as cosine
from vptm_kernels.testing import assert_close_to_exact

ROOT = Path(__file__).parents[2]
HOME = ROOT / "vptm_kernels" / "_runtime" / "private_torch.py"
# AOTInductor is documented under this name
PRIVATE = re.compile(r"\btorch(\.\w+)*\._(?!_|inductor\.aoti_)|\b_C\b|\bforward_ad\._|\bops\.\w+\._|\._version\b")


def test_no_other_file_uses_a_private_interface():
    """A name that a new PyTorch drops would be found when users call it, not when it is read here."""
    assert PRIVATE.search(HOME.read_text(encoding="utf-8"))
    for path in [*ROOT.glob("vptm/**/*.py"), *ROOT.glob("vptm_kernels/**/*.py")]:
        found = PRIVATE.search(path.read_text(encoding="utf-8"))
        assert path == HOME or found is None, f"{path.relative_to(ROOT)}: {found}"


def attend(with_lse=True):
    generator = torch.Generator().manual_seed(0)
    qkv, prompts = torch.randn(2, 5, 96, generator=generator), torch.randn(3, 64, generator=generator)
    leaves = [t.double().requires_grad_() for t in (qkv, prompts)]
    out, lse = prompted_attention(*leaves, num_heads=2, return_lse=True)
    return [out, lse, *torch.autograd.grad(out.sin().sum(), leaves)]


def score(activation):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, projection, prototypes = (
        torch.randn(*shape, generator=generator).double() for shape in ((20, 7), (30, 7), (4, 30), (3, 4))
    )
    leaves = [hidden.requires_grad_(), projection.requires_grad_()]
    scores = prototype_cosine(hidden, weight, None, prototypes, projection=projection, activation=activation)
    return [scores, *torch.autograd.grad(scores.sin().sum(), leaves)]


def test_calls_take_the_registered_op_where_nobody_can_be_asked(monkeypatch):
    expected = attend()
    assert tracing.nothing_traces(expected[0]) and not private_torch.autocasting()
    monkeypatch.setattr(private_torch, "_CAN_ASK", False)
    assert not tracing.nothing_traces(expected[0])
    assert private_torch.autocasting() and private_torch.differentiates_forward()
    for found, wanted in zip(attend(), expected):
        assert torch.equal(found, wanted)


def test_attention_is_written_out_where_its_operator_is_not_there(monkeypatch):
    expected = attend()
    for name in ("cpu_attention", "cpu_attention_backward"):
        assert getattr(attention, name) is not None
        monkeypatch.setattr(attention, name, None)
    for found, wanted in zip(attend(), expected):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["softmax", "log_softmax"])
def test_gradients_of_a_softmax_are_written_out_where_their_operator_is_not_there(activation, monkeypatch):
    api = importlib.import_module("vptm_kernels.prototype_cosine.api")
    monkeypatch.setattr(api, "_autograd_keeps", lambda *arguments: False)
    used, own = [], private_torch.activation_gradients[activation]
    monkeypatch.setitem(cosine.activation_gradients, activation, lambda *given: used.append(1) or own(*given))
    expected = score(activation)
    assert used
    monkeypatch.delitem(cosine.activation_gradients, activation)
    for found, wanted in zip(score(activation), expected):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_frozen_linear_is_the_public_one_where_its_operator_is_not_there(monkeypatch):
    monkeypatch.setattr(frozen_linear, "onednn_is_faster", lambda dtype: True)
    monkeypatch.setattr(frozen_linear, "_FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(frozen_linear, "onednn_linear", None)
    x, weight, bias = torch.randn(2, 7), torch.randn(3, 7), torch.randn(3)
    assert not frozen_linear.runs_onednn(x, weight) and frozen_linear.pack_weight(weight) is None
    eager = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    exact = torch.nn.functional.gelu(torch.nn.functional.linear(*(t.double() for t in (x, weight, bias))))
    found = frozen_linear.frozen_linear(x, weight, bias, gelu=True)
    assert_close_to_exact("frozen_linear", found, exact, eager, factor=2)


def test_weights_are_multiplied_as_they_are_where_nothing_packs_them(monkeypatch):
    monkeypatch.setattr(frozen_linear, "onednn_is_faster", lambda dtype: True)
    monkeypatch.setattr(frozen_linear, "_FEWEST_WEIGHTS", 0)
    weight = torch.randn(3, 7)
    assert frozen_linear.pack_weight(weight) is not None
    monkeypatch.setattr(frozen_linear, "onednn_pack", None)
    assert frozen_linear.pack_weight(weight) is None


def test_ranges_are_read_at_every_call_where_nobody_counts_edits(monkeypatch):
    """Were they taken for unchanged, an image would get prompts of no task of its own."""
    monkeypatch.setattr(ranges, "edits", lambda t: None)
    given = torch.tensor([[0, 2]], dtype=torch.int32)
    for rows, fine in ((4, True), (1, False)):
        if fine:
            ranges.check_ranges(given, 1, rows, 2, given.device, "qkv")
            continue
        given[0, 1] = 9
        with pytest.raises(ValueError, match="must lie inside the pool"):
            ranges.check_ranges(given, 1, 4, 2, given.device, "qkv")
