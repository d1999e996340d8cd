"""readout_attention against its definition in float64: forward, gradients, invariants, adversarial values, bad input,
and as a registered op.

The Triton kernels run in the interpreter where there is no GPU, with every access checked for bounds and races.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import COMPILING
from hypothesis import given, settings
from hypothesis import strategies as st
from op_case import converted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vptm_kernels._runtime.plans import forget_plans
from vptm_kernels._runtime.triton_support import has_triton
from vptm_kernels.readout_attention import readout_attention
from vptm_kernels.readout_attention.ops import readout_attention_backward_op, readout_attention_op
from vptm_kernels.readout_attention.reference import readout_attention_reference
from vptm_kernels.testing import assert_close_to_exact, largest_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton"] if has_triton() else ["torch"]
# Kernels multiply float64 in the interpreter only.
EXACT_IMPLS = [impl for impl in IMPLS if impl == "torch" or (DEVICE == "cpu" and not COMPILING)]
needs_triton = pytest.mark.skipif(not has_triton(), reason="the triton package is not installed")
TENSORS = (
    *("x", "q", "norm_weight", "norm_bias", "k_weight", "v_weight", "v_bias"),
    *("prompt_kv", "prompt_column_bias", "bias"),
)


@dataclass(frozen=True)
class Case:
    """One call. prompts: "none", "shared" or "image"; bias: "none", "tokens" (H, N) or "all" (H, N+P); columns:
    whether prompts, where there are any, have values for their columns (H, P); layout of x:
    "contiguous", "sliced" (from wider rows and more tokens) or "expanded"; stream: dtype of x where it is another."""

    batch: int = 2
    tokens: int = 21
    width: int = 20
    heads: int = 2
    head_dim: int = 5
    prompt_length: int = 3
    prompts: str = "shared"
    bias: str = "all"
    columns: bool = False
    norm: bool = True
    v_bias: bool = True
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float64
    stream: torch.dtype | None = None
    scale: float | None = None
    seed: int = 0

    def inputs(self, learned: tuple[str, ...] = TENSORS) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(DEVICE, dtype or self.dtype)

        inner, length = self.heads * self.head_dim, self.prompt_length
        x = (self.batch, self.tokens, self.width)
        stream = 2 * random(x[0], x[1] + 3, x[2] + 4, dtype=self.stream) + 0.5
        if self.layout == "sliced":
            stream = stream[:, 1 : 1 + x[1], 2 : 2 + x[2]]
        elif self.layout == "expanded":
            stream = stream[:1, : x[1], : x[2]].contiguous().expand(x)
        else:
            stream = stream[:, : x[1], : x[2]].contiguous()
        columns = self.tokens + (length if self.bias == "all" and self.prompts != "none" else 0)
        call = {
            "x": stream,
            "q": random(self.batch, inner),
            "norm_weight": random(self.width) if self.norm else None,
            "norm_bias": random(self.width) if self.norm else None,
            "eps": 1e-6,
            "k_weight": random(inner, self.width) / self.width**0.5,
            "v_weight": random(inner, self.width) / self.width**0.5,
            "v_bias": random(inner) if self.v_bias else None,
            "num_heads": self.heads,
            "prompt_kv": None,
            "prompt_column_bias": None,
            "bias": None if self.bias == "none" else random(self.heads, columns),
            "scale": self.scale,
        }
        if self.prompts != "none":
            call["prompt_kv"] = random(*([self.batch] if self.prompts == "image" else []), length, 2 * inner)
            if self.columns:
                call["prompt_column_bias"] = random(self.heads, length)
        for name in learned:
            if call[name] is not None:
                call[name].requires_grad_()
        return call


def leaves(call: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: call[name] for name in TENSORS if call[name] is not None and call[name].requires_grad}


def gradients(call: dict[str, Any], out: torch.Tensor) -> dict[str, torch.Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    # Prompts of length 0 are in no graph.
    upstream = upstream.to(torch.float32).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves(call).values()), upstream, materialize_grads=True)
    return dict(zip(leaves(call), found))


def check(case: Case, impl: str, *, change: Any = None, growth: float = 1.0, terms: float = 0.0) -> None:
    """Forward and every gradient within the error budget of the dtype. growth: factor of exact tolerances. terms: size
    of those that cancel in sums."""
    call = case.inputs()
    if change is not None:
        with torch.no_grad():
            change(call)
    exact_call = converted(call, torch.float64)
    out, exact = readout_attention(**call, impl=impl), readout_attention_reference(**exact_call)
    assert out.dtype == case.dtype
    low = case.dtype != torch.float64
    eager_call = converted(call, case.dtype) if low else None
    if eager_call is not None and case.stream is not None:
        eager_call["x"] = call["x"].detach().clone().requires_grad_()
    eager = readout_attention_reference(**eager_call) if low else None
    assert_close_to_exact(f"{case} out", out, exact, eager, factor=2, tolerance=1e-12 * growth, terms=terms)
    found, wanted = gradients(call, out), gradients(exact_call, exact)
    peers = gradients(eager_call, eager) if low else dict.fromkeys(wanted)
    for name in wanted:
        assert found[name].dtype == call[name].dtype
        label = f"{case} gradient of {name}"
        limits = {"factor": 3, "tolerance": 1e-10 * growth, "terms": terms}
        assert_close_to_exact(label, found[name], wanted[name], peers[name], **limits)


KINDS = list(itertools.product(["none", "shared", "image"], ["none", "tokens", "all"], [True, False]))


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("prompts,bias,affine", KINDS)
def test_every_kind_of_prompt_bias_and_norm_equals_the_definition(prompts, bias, affine, impl):
    check(Case(prompts=prompts, bias=bias, norm=affine, v_bias=affine), impl)
    if prompts != "none":
        check(Case(prompts=prompts, bias=bias, norm=affine, v_bias=affine, columns=True), impl)


# One below, at and above a block of 16 tokens or channels; one of everything; more heads than a block of 16; head
# dimensions that no other kernel takes; one prompt, and more than a block of 16 of them.
SHAPES = [
    (15, 16, 1, 1, 1),
    (16, 17, 2, 3, 16),
    (17, 15, 2, 130, 17),
    (33, 48, 17, 2, 2),
    (1, 1, 1, 1, 1),
    (1, 33, 3, 4, 0),
    (2, 20, 1, 4, 35),
    (0, 20, 2, 4, 3),
    (0, 20, 2, 4, 0),
]


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("tokens,width,heads,head_dim,prompts", SHAPES)
def test_shapes(tokens, width, heads, head_dim, prompts, impl):
    check(Case(tokens=tokens, width=width, heads=heads, head_dim=head_dim, prompt_length=prompts), impl)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("layout", ["sliced", "expanded"])
def test_layouts_of_tokens(layout, impl):
    check(Case(layout=layout), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_image_of_a_real_model(impl):
    """197 tokens of 768 channels in 12 heads and 10 prompts: ragged splits, channels in even blocks."""
    check(Case(1, 197, 768, 12, 64, 10, dtype=torch.float32), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prompts", ["none", "shared", "image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_budget(dtype, prompts, impl):
    check(Case(tokens=50, width=96, heads=3, head_dim=32, prompts=prompts, prompt_length=10, dtype=dtype), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_budget_of_a_float32_stream(dtype, impl):
    """Under autocast the tokens stay in float32: they are normalised before they are rounded."""
    check(Case(tokens=50, width=96, heads=3, head_dim=32, dtype=dtype, stream=torch.float32), impl)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@settings(max_examples=15)
@given(data=st.data())
def test_random_cases(data, impl):
    case = data.draw(
        st.builds(
            Case,
            batch=st.integers(0, 3),
            tokens=st.sampled_from([0, 1, 2, 15, 16, 17, 33]),
            width=st.sampled_from([1, 7, 16, 20, 33]),
            heads=st.sampled_from([1, 2, 3, 17]),
            head_dim=st.sampled_from([1, 3, 8]),
            prompt_length=st.sampled_from([0, 1, 3, 17]),
            prompts=st.sampled_from(["none", "shared", "image"]),
            bias=st.sampled_from(["none", "tokens", "all"]),
            columns=st.booleans(),
            norm=st.booleans(),
            v_bias=st.booleans(),
            layout=st.sampled_from(["contiguous", "sliced"]),
            scale=st.sampled_from([None, 0.0, -1.5]),
            seed=st.integers(0, 9),
        )
    )
    check(case, impl)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("prompts", ["none", "shared", "image"])
def test_gradcheck(prompts, impl):
    """Numerical derivatives of every input, so that the definition's own autograd is not the only witness."""
    sizes = {"batch": 2, "tokens": 3, "width": 4, "heads": 2, "head_dim": 2, "prompt_length": 2}
    call = Case(prompts=prompts, columns=True, **sizes).inputs()
    names = list(leaves(call))

    def run(*tensors):
        return readout_attention(**{**call, **dict(zip(names, tensors))}, impl=impl)

    assert torch.autograd.gradcheck(run, tuple(leaves(call).values()), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("learned", [("x",), ("q",), ("prompt_kv",), ("bias",), ("v_weight", "v_bias"), ("norm_bias",)])
def test_only_the_gradients_asked_for(learned, impl):
    """Every kernel flag alone gives the gradient of the whole."""
    case = Case(dtype=torch.float32)
    full = gradients(call := case.inputs(), readout_attention(**call, impl=impl))
    found = gradients(call := case.inputs(learned), readout_attention(**call, impl=impl))
    assert set(found) == set(learned)
    for name, grad in found.items():
        torch.testing.assert_close(grad, full[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_bitwise_repeatable(impl):
    case = Case(batch=3, tokens=40, dtype=torch.float32)
    first = gradients(call := case.inputs(), readout_attention(**call, impl=impl))
    for _ in range(1 if impl == "triton" and DEVICE == "cpu" else 9):
        again = gradients(call := case.inputs(), readout_attention(**call, impl=impl))
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
def test_tokens_given_as_prompts_are_the_same_function(impl):
    """A token normalised and projected outside must count as much as one inside: one softmax over both."""
    call = Case(prompts="none", bias="none").inputs(())
    tokens = torch.nn.functional.layer_norm(call["x"], (20,), call["norm_weight"], call["norm_bias"], 1e-6)
    keys, values = tokens @ call["k_weight"].mT, tokens @ call["v_weight"].mT + call["v_bias"]
    split = {**call, "x": call["x"][:, :9], "prompt_kv": torch.cat([keys, values], -1)[:, 9:]}
    whole = readout_attention(**call, impl=impl)
    torch.testing.assert_close(readout_attention(**split, impl=impl), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("gated", [False, True])
def test_ranges_of_a_pool_equal_each_image_alone(gated, impl):
    """Every image reads its own rows, of any number, with the values of their columns, and a NaN in nobody's rows
    reaches nobody."""
    call = Case(batch=3, bias="tokens").inputs(learned=("x", "q", "prompt_kv"))
    pool = call.pop("prompt_kv").new_full((9, 20), float("nan"))
    pool[3:8] = torch.randn(5, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pool.requires_grad_()
    values = torch.randn(2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE)
    values[:, [0, 8]] = float("nan")
    values.requires_grad_()
    ranges = [[3, 5], [0, 0], [4, 2]]
    placed = torch.tensor(ranges, dtype=torch.int32, device=DEVICE)
    call["prompt_column_bias"] = values if gated else None
    pooled = readout_attention(**call, prompt_kv=pool, prompt_ranges=placed, max_prompt_length=6, impl=impl)

    def own(start, length):
        columns = values[:, start : start + length] if gated else None
        return {"prompt_kv": pool[start : start + length], "prompt_column_bias": columns}

    alone = torch.cat(
        [
            readout_attention(
                **(call | {name: call[name][image : image + 1] for name in ("x", "q")} | own(start, length)),
                impl=impl,
            )
            for image, (start, length) in enumerate(ranges)
        ]
    )
    torch.testing.assert_close(pooled, alone, rtol=0, atol=1e-12)
    of = [*([values] if gated else []), call["x"], call["q"], pool]
    grads = [torch.autograd.grad(out.square().sum(), of)[:-1] for out in (pooled, alone)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_scores(size, impl):
    """Scores of +-1e4: every exponential but the largest underflows, none may overflow; error relative to the score."""
    check(Case(scale=size / 5), impl, growth=1e4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prompts", ["shared", "image"])
def test_scores_that_only_scaled_fit_16_bits(prompts, impl):
    """q k of 100 000 is beyond float16, the score of 12 500 is not: scaled last, it would be NaN."""
    call = Case(heads=1, head_dim=64, prompts=prompts, bias="none", norm=False, dtype=torch.float16).inputs(())
    dim = call["q"].shape[1]
    call["q"] = torch.full_like(call["q"], 40.0)
    call["prompt_kv"] = torch.full_like(call["prompt_kv"], 40.0)
    assert dim * 40 * 40 > torch.finfo(torch.float16).max > dim**0.5 * 40 * 40
    assert bool(readout_attention(**call, impl=impl).isfinite().all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_channels_have_no_variance(dtype, impl):
    """A row of equal values normalises to zero, with a finite gradient of 1 / sqrt(eps), not to a division by zero."""
    if impl not in EXACT_IMPLS and dtype == torch.float64:
        pytest.skip("float64 runs in the interpreter only")

    def flatten(call):
        call["x"][0, 3], call["x"][1, :] = 1.5, 0.0

    # The gradient is 1e3 times the others.
    check(Case(dtype=dtype, width=32), impl, change=flatten, growth=1e3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "dtype,mean,deviation",
    [(torch.float64, 1e4, 1.0), (torch.float32, 1e4, 1.0), (torch.bfloat16, 1e4, 100.0), (torch.float16, 1e4, 10.0)],
)
def test_a_mean_far_above_the_deviation(dtype, mean, deviation, impl):
    """Sums of squares would lose mean² / deviation² in accuracy: 1e8 here, all that float32 has."""
    if impl not in EXACT_IMPLS and dtype == torch.float64:
        pytest.skip("float64 runs in the interpreter only")

    def shift(call):
        call["x"].mul_(deviation / 2).add_(mean)

    check(Case(dtype=dtype, width=96, norm=False), impl, change=shift, growth=1e4)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_channel_far_above_the_others(impl):
    """Vision transformers have such channels; the first ones are what sums are centred on, where it matters most."""

    def outlier(call):
        call["x"][:, :, 0] = 1e4

    # 16 images, as of two eager may err little by chance; D = 4, whose scale rounds nothing, as that of 64 does not.
    # Normalised, the channel is the root of the width in every token: a term of that size stands in every score and
    # value, which libraries of matrix products round in an order of their own, and the gradient of its weight cancels.
    check(Case(batch=16, head_dim=4, dtype=torch.float32, width=96), impl, change=outlier, terms=96**0.5)


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_heads_give_zeros(impl):
    """All -inf attends to nothing, no value bias either, with zero gradients; prompts stay where tokens are masked."""

    def mask(call):
        call["bias"][0] = float("-inf")
        call["bias"][1, :21] = float("-inf")

    if impl in EXACT_IMPLS:
        check(Case(), impl, change=mask)
    call = Case(dtype=torch.float32).inputs()
    with torch.no_grad():
        mask(call)
    out = readout_attention(**call, impl=impl)
    assert not out[:, :5].any() and out[:, 5:].all()
    grads = gradients(call, out)
    assert all(bool(grad.isfinite().all()) for grad in grads.values())
    assert not grads["bias"][0].any() and not grads["x"].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_not_hidden(impl):
    call = Case(dtype=torch.float32).inputs(())
    call["x"][1, 4, 2] = float("nan")
    out = readout_attention(**call, impl=impl)
    assert bool(out[0].isfinite().all()) and bool(out[1].isnan().all())


@needs_triton
def test_offsets_of_64_bits_give_the_same_result(monkeypatch):
    """Rows beyond 2**31 elements use 64-bit offsets: the same kernels, forced here on a small input."""
    from vptm_kernels.readout_attention import triton_impl

    results = []
    for wide in (False, True):
        monkeypatch.setattr(triton_impl, "needs_int64", lambda reach, wide=wide: wide)
        forget_plans()
        call = Case(dtype=torch.float32).inputs()
        out = readout_attention(**call, impl="triton")
        results.append([out, *gradients(call, out).values()])
    assert all(torch.equal(narrow, wide) for narrow, wide in zip(*results))


@needs_triton
def test_kernels_allocate_results_and_one_sum_per_split():
    """A normalised copy of the tokens, keys or values, forward or backward, would be a tensor as large as x."""
    from vptm_kernels.readout_attention import triton_impl

    class Allocations(TorchDispatchMode):
        shapes: tuple = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket is torch.ops.aten.new_empty and out.numel():
                self.shapes += (tuple(out.shape),)
            return out

    x, absorbed = torch.randn(2, 40, 64, device=DEVICE), torch.randn(2, 3, 64, device=DEVICE)
    with Allocations() as forward:
        outputs = triton_impl.forward(x, absorbed, None, None, 1e-6, True)
    mixed, weights, mass, lse, moments = outputs
    with Allocations() as backward:
        triton_impl.backward(
            mixed, weights, mass, x, absorbed, None, None, mixed, lse, moments, [False, True, False, False]
        )
    splits = -(-40 // 16)
    per_split = [(2, splits, 3, 64), (2, splits, 2, 3)]
    assert sorted(forward.shapes) == sorted([(2, 3, 64), (2, 3), (2, 3), (2, 2, 40), *per_split])
    assert backward.shapes == ((splits, 2, 3, 64),)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_keeps_inputs_and_a_few_numbers_per_head(impl):
    """No normalised copy of the tokens is held between forward and backward."""
    call = Case(tokens=40, width=64, dtype=torch.float32, norm=False).inputs(("x", "prompt_kv"))
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        readout_attention(**call, impl=impl)
    for t in call.values():
        if isinstance(t, torch.Tensor):
            kept.pop(t.untyped_storage().data_ptr(), None)
    heads, width, columns = 2, 64, 43
    assert 0 < sum(kept.values()) <= 4 * 2 * (2 * heads * width + 4 * heads * columns + 2 * 40)


def shared_call(**changes: Any) -> dict[str, Any]:
    return {**Case(dtype=torch.float32).inputs(()), **changes}


BAD_INPUT = {
    "num_heads must be a positive int, got 0": {"num_heads": 0},
    "eps must be a finite non-negative number, got -1.0": {"eps": -1.0},
    "prompt_column_bias must be a floating point (H, P) = (2, 3), one value for each head and row of the prompts, got "
    "(3, 2)": {"prompt_column_bias": torch.zeros(3, 2)},
    "prompt_column_bias must come with prompt_kv, got none": {
        "prompt_column_bias": torch.zeros(2, 3),
        "prompt_kv": None,
    },
    "x must be (B, N, C), got (2, 20)": {"x": torch.randn(2, 20)},
    "x must have a unit last stride": {"x": torch.randn(2, 20, 21).mT},
    "x must have the dtype of q, torch.float32, got torch.float16": {"x": torch.randn(2, 21, 20).half()},
    "q must be (B, H*D) with B = 2, H = num_heads = 2, got (3, 10)": {"q": torch.randn(3, 10)},
    "q must be float16, bfloat16, float32 or float64, got torch.int64": {"q": torch.ones(2, 10).long()},
    "norm_weight must be (20,), got (19,)": {"norm_weight": torch.randn(19)},
    "norm_bias must be floating point, got torch.int64": {"norm_bias": torch.ones(20).long()},
    "k_weight must be (10, 20), got (10, 21)": {"k_weight": torch.randn(10, 21)},
    "v_weight must have the dtype of q, torch.float32, got torch.float64": {"v_weight": torch.randn(10, 20).double()},
    "v_bias must be (10,), got (20,)": {"v_bias": torch.randn(20)},
    "v_bias must be on the device of x, cpu, got meta": {"v_bias": torch.randn(10, device="meta")},
    "prompt_kv must be (P, 2*H*D) or (B, P, 2*H*D) with B = 2, 2*H*D = 20, got (3, 10)": {
        "prompt_kv": torch.randn(3, 10)
    },
    "bias must be (2, 21) or (2, 24) (H, N or N+P), got (2, 22)": {"bias": torch.randn(2, 22)},
    "scale must be a finite number, got nan": {"scale": float("nan")},
    "impl must be one of ('auto', 'triton', 'torch'), got 'cuda'": {"impl": "cuda"},
}


@pytest.mark.parametrize("message", BAD_INPUT, ids=lambda message: re.sub(r"[^a-z_]+", "-", message[:30]))
def test_bad_input_is_refused_by_name_and_value(message):
    call = {
        name: t.cpu() if isinstance(t, torch.Tensor) and t.is_cuda else t for name, t in shared_call().items()
    } | BAD_INPUT[message]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        readout_attention(**call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x", "q", "prompt_kv", "bias"])
def test_wrong_types_are_refused_by_name(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        readout_attention(**shared_call(**{name: [1.0]}))


@needs_triton
def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    many = Case(heads=65, head_dim=1, dtype=torch.float32).inputs(())
    with pytest.raises(ValueError, match="impl='triton' needs at most 64 heads, got 65"):
        readout_attention(**many, impl="triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        forget_plans()
        with pytest.raises(ValueError, match=r"impl='triton' needs GPU tensors .*, got device cpu"):
            readout_attention(**shared_call(impl="triton"))


def test_double_backward_is_a_clear_error():
    call = Case(dtype=torch.float32).inputs(("x",))
    (grad,) = torch.autograd.grad(readout_attention(**call).sum(), call["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="readout_attention is not differentiable twice"):
        grad.sum().backward()


def op_arguments(case: Case) -> tuple[Any, ...]:
    """x, absorbed, prompt_scores, bias, eps of the registered op."""
    generator = torch.Generator().manual_seed(0)
    batch, length = case.batch, 0 if case.prompts == "none" else case.prompt_length
    shapes = [(batch, case.tokens, case.width), (batch, case.heads, case.width), (batch, case.heads, length)]
    x, absorbed, scores, bias = (
        torch.randn(*shape, generator=generator).to(DEVICE, case.dtype).requires_grad_()
        for shape in [*shapes, (case.heads, case.tokens + length)]
    )
    return x, absorbed, scores if length else None, bias if case.bias != "none" else None, 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prompts,bias", [("shared", "all"), ("none", "none")])
def test_opcheck(prompts, bias, impl):
    """Schema, autograd registration, fakes with the real strides, and AOT dispatch with dynamic shapes."""
    arguments = op_arguments(Case(tokens=5, width=8, prompts=prompts, bias=bias, dtype=torch.float32))
    torch.library.opcheck(readout_attention_op, (*arguments, True, impl))
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    torch.library.opcheck(readout_attention_op, (*detached, False, impl))
    mixed, weights, mass, kept, moments = readout_attention_op(*detached, True, impl)
    grads = [torch.randn_like(t) for t in (mixed, weights, mass)]
    needs = [True, True, prompts != "none", bias != "none"]
    backward = (*grads, *detached[:4], mixed, kept, moments, 1e-6, needs, impl)
    torch.library.opcheck(readout_attention_backward_op, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend,norm", [("aot_eager", True), ("inductor", False)])
def test_fullgraph_compile_forward_and_backward(backend, norm, impl):
    """Inductor asserts the strides that the fakes promise, so it sees a wrong fake that opcheck misses."""
    torch._dynamo.reset()
    call = Case(tokens=5, norm=norm, v_bias=norm, dtype=torch.float32).inputs(("x", "q", "prompt_kv", "bias"))
    expected = gradients(call, readout_attention(**call, impl=impl))
    compiled = torch.compile(lambda **call: readout_attention(**call, impl=impl) * 1, backend=backend, fullgraph=True)
    for name, gradient in gradients(call, compiled(**call)).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_compile_serves_all_batch_sizes(impl):
    """Forward and backward: one graph under dynamic=True."""
    torch._dynamo.reset()
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    call = Case(tokens=5, width=8, dtype=torch.float32).inputs(())

    def run(x, q):
        return readout_attention(**{**call, "x": x, "q": q}, impl=impl)

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    # No batch size equals the number of heads: it would be taken for the same dimension.
    for batch in (6, 3, 4):
        inputs = [torch.randn(batch, *shape, device=DEVICE).requires_grad_() for shape in ((5, 8), (10,))]
        found, expected = (torch.autograd.grad(f(*inputs).sin().sum(), inputs) for f in (compiled, run))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
    assert len(compiles) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_export_keeps_the_op_with_a_dynamic_batch(impl):
    call = Case(dtype=torch.float32).inputs(())

    class Module(torch.nn.Module):
        def forward(self, x, q):
            return readout_attention(**{**call, "x": x, "q": q}, impl=impl)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Module(), (call["x"], call["q"]), dynamic_shapes=({0: batch}, {0: batch}))
    assert any("vptm.readout_attention" in str(node.target) for node in program.graph.nodes)
    inputs = torch.randn(5, 21, 20, device=DEVICE), torch.randn(5, 10, device=DEVICE)
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_the_tokens_in_float32(impl):
    call = Case(dtype=torch.float32, width=64).inputs()
    expected = readout_attention(**call, impl=impl)
    # Large enough that rounding the tokens to bf16, rather than their normalised values, would lose all digits.
    with torch.no_grad():
        call["x"].add_(1000.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = readout_attention(**call, impl=impl)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(call, out).values())


def test_fakes_and_meta_tensors_need_no_device():
    with FakeTensorMode():
        q, weight = (torch.empty(*s, device="cuda", dtype=torch.bfloat16) for s in ((2, 8), (8, 16)))
        x = torch.empty(2, 7, 16, device="cuda", dtype=torch.bfloat16)
        assert readout_attention(x, q, None, None, 1e-6, weight, weight, None, num_heads=2).shape == (2, 8)
    x, q, weight = (torch.empty(*s, device="meta") for s in ((2, 7, 16), (2, 8), (8, 16)))
    assert readout_attention(x, q, None, None, 1e-6, weight, weight, None, num_heads=2).shape == (2, 8)


@pytest.mark.parametrize("impl", IMPLS)
def test_flop_counter_counts_the_op(impl):
    """2 * B*H*C*(2*N + 2*D) without prompts: scores, weighted sum, and one product with each weight."""
    case = Case(prompts="none", bias="none", norm=False, v_bias=False, dtype=torch.float32)
    call = case.inputs(())
    with FlopCounterMode(display=False) as forward:
        readout_attention(**call, impl=impl)
    assert forward.get_total_flops() == 2 * 2 * 2 * 20 * (2 * 21 + 2 * 5)
    call = case.inputs(("x", "q"))
    with FlopCounterMode(display=False) as both:
        readout_attention(**call, impl=impl).sum().backward()
    # scores of gradients, two products for x, one for q; both weights once more, and the scores again in Triton
    core = 4 + (impl == "triton")
    assert both.get_total_flops() == forward.get_total_flops() + 2 * 2 * 2 * 20 * (core * 21 + 2 * 5)


def test_the_checks_see_a_wrong_result():
    """Guards this file: a result off by one part in 1e9 fails the exact comparison."""
    call = Case().inputs(())
    exact = readout_attention_reference(**call)
    assert largest_error(exact * (1 + 1e-9), exact) > 1e-12
    with pytest.raises(AssertionError):
        assert_close_to_exact("out", exact * (1 + 1e-9), exact)
    assert replace(Case(), seed=1).inputs(())["q"].ne(call["q"]).any()
