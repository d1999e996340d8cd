"""prompted_attention against its definition in float64: forward, gradients, invariants, adversarial values, bad input.

The Triton kernels run in the interpreter where there is no GPU, with every access checked for bounds and races.
"""

import contextlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import COMPILING
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch.utils._python_dispatch import TorchDispatchMode

from vptm_kernels import RelativePositionBias, prompted_attention
from vptm_kernels._runtime import triton_support
from vptm_kernels._runtime.plans import forget_plans
from vptm_kernels._runtime.triton_support import has_triton
from vptm_kernels.prompted_attention.bias import table_rows
from vptm_kernels.testing import AttentionCase, assert_close_to_exact
from vptm_kernels.testing.prompted_attention import (
    BIASES,
    COLUMNS,
    LAYOUTS,
    PROMPTS,
    ROTARIES,
    differentiable,
    reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton"] if has_triton() else ["torch"]
# Kernels multiply float64 in the interpreter only.
EXACT_IMPLS = [impl for impl in IMPLS if impl == "torch" or (DEVICE == "cpu" and not COMPILING)]


def gradients(call, outputs, upstream):
    leaves = differentiable(call)
    total = sum((out.double() * grad).sum() for out, grad in zip(outputs, upstream))
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))


def with_forward(call, choose):
    """(out, lse) of the Triton forward with `choose(config)` for the block sizes and form that the table gave."""
    from vptm_kernels.prompted_attention import triton_impl

    table = triton_impl.forward_config
    triton_impl.forward_config = lambda *args, **options: choose(table(*args, **options))
    forget_plans()
    try:
        with torch.no_grad():
            return prompted_attention(**call, return_lse=True, impl="triton")
    finally:
        triton_impl.forward_config = table
        forget_plans()


def with_other_forward(call):
    """All scores resident where the table says block by block, and the other way round."""
    pooled = call.get("prompt_ranges") is not None
    return with_forward(call, lambda c: c._replace(scores_resident=not c.scores_resident and not pooled))


def check(case, impl, *, with_lse=True):
    """Forward (both of its variants), lse and every gradient within the error budget of the case's dtype."""
    call = case.inputs(DEVICE, requires_grad=True)
    exact_call = case.converted(call, torch.float64)
    outputs = prompted_attention(**call, return_lse=True, impl=impl)
    exact = reference(exact_call)
    low = case.dtype != torch.float64
    eager_call = case.converted(call, case.dtype) if low else None
    eager = reference(eager_call) if low else (None, None)
    for name, actual, want, peer in zip(("out", "lse"), outputs, exact, eager):
        # lse is float32 whatever the inputs are, and may carry the rounding of a 16-bit bias.
        peer = peer if peer is None or name == "out" else peer.to(actual.dtype)
        assert_close_to_exact(f"{case} {name}", actual, want, peer, factor=2, tolerance=1e-12)
    if impl == "triton":
        peer = None if eager[0] is None else eager[0]
        assert_close_to_exact(f"{case} out of the other forward", with_other_forward(call)[0], exact[0], peer)

    upstream = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).double() for t in exact]
    upstream[0] = upstream[0].to(case.dtype).double()
    if not with_lse:
        outputs, exact, eager, upstream = outputs[:1], exact[:1], eager[:1], upstream[:1]
    found = gradients(call, outputs, upstream)
    wanted = gradients(exact_call, exact, upstream)
    peers = gradients(eager_call, eager, upstream) if low else dict.fromkeys(wanted)
    for name in wanted:
        assert found[name].dtype == case.dtype
        label = f"{case} gradient of {name}"
        assert_close_to_exact(label, found[name], wanted[name], peers[name], factor=3, tolerance=1e-10)


KINDS = [AttentionCase(prompts=prompts, bias=bias) for prompts, bias in itertools.product(PROMPTS, BIASES)]
# 20 prompts: a whole block of them and a tail; 17 tokens, so that the tail has both
KINDS += [
    AttentionCase(prompts=prompts, bias=bias, columns="columns", tokens=17, prompt_length=20)
    for prompts, bias in itertools.product(PROMPTS, ("none", "dense", "columns", "square", "table"))
]


VALID_KINDS = [case for case in KINDS if case.valid]


def kind(case):
    return f"{case.prompts}-{case.bias}-{case.columns}"


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("case", VALID_KINDS, ids=kind)
def test_every_kind_of_prompt_and_bias_equals_the_definition(case, impl):
    # 2 x 3 patches and a class token, a mask row and rows without a position for the table.
    check(replace(case, window=(2, 3) if case.bias == "table" else None), impl)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("prompts", ["shared", "queries"])
def test_values_and_bias_of_fewer_bits_add_up_in_those_of_the_scores(prompts, impl):
    """Both are float32 beside float64: their sum rounded to float32 would be off by 1e-7."""
    call = AttentionCase(prompts=prompts, prompt_length=3, tokens=5, bias="columns").inputs(DEVICE)
    call["bias"] = (call["bias"] * 3).float()
    values = torch.linspace(-5, 4, 6, device=DEVICE).view(2, 3)
    exact = call | {"bias": call["bias"].double(), "prompt_column_bias": values.double()}
    out = prompted_attention(**call, prompt_column_bias=values, impl=impl)
    torch.testing.assert_close(out, reference(exact)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("prompts", ["shared", "image", "pool", "queries", "image queries"])
def test_a_column_value_is_a_weight_of_its_prompt(prompts, impl):
    """A value of -inf is no prompt, zero changes nothing. Fails where values reach tokens, another head, or another row
    of a pool."""
    call = AttentionCase(prompts=prompts, prompt_length=3, tokens=5, bias="dense").inputs(DEVICE)
    name = "prompt_qkv" if "queries" in prompts else "prompt_kv"
    rows = call[name].shape[-2]
    values = torch.zeros(2, rows, dtype=torch.float64, device=DEVICE)
    plain, lse = prompted_attention(**call, return_lse=True, impl=impl)
    zero, zero_lse = prompted_attention(**call, prompt_column_bias=values, return_lse=True, impl=impl)
    torch.testing.assert_close((zero, zero_lse), (plain, lse), rtol=0, atol=1e-12)

    muted = values.clone()
    muted[:, -1] = float("-inf")
    if prompts != "pool":  # the range of another image may not reach the last row
        kept = {**call, name: call[name][..., :-1, :]}
        expected = prompted_attention(**kept, return_lse=True, impl=impl)
        found = prompted_attention(**call, prompt_column_bias=muted, return_lse=True, impl=impl)
        tokens = expected[0].shape[1]  # a muted prompt still attends
        torch.testing.assert_close(found[0][:, :tokens], expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1][..., :tokens], expected[1], rtol=0, atol=1e-12)

    louder = values.clone()
    louder[1] = torch.arange(1, rows + 1, dtype=torch.float64).to(DEVICE) / 3
    found = prompted_attention(**call, prompt_column_bias=louder, impl=impl)
    torch.testing.assert_close(found, reference({**call, "prompt_column_bias": louder})[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[..., :16], plain[..., :16], rtol=0, atol=1e-12)
    assert float((found - plain)[-1, :, 16:].abs().min()) > 0


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
@pytest.mark.parametrize("scores", [False, True], ids=["by blocks", "all scores"])
@pytest.mark.parametrize(
    "prompts,bias,tokens,length,head_dim,columns",
    [
        ("shared", "aligned", 50, 13, 16, "none"),
        ("shared", "columns", 50, 40, 48, "columns"),
        ("image", "table", 33, 3, 16, "none"),
        ("queries", "square", 38, 27, 16, "none"),
        ("none", "none", 17, 0, 48, "none"),
        ("shared", "none", 64, 32, 16, "none"),
        # whole blocks of prompts and a tail of both
        ("shared", "none", 50, 37, 16, "columns"),
    ],
)
def test_resident_keys_equal_the_definition(prompts, bias, tokens, length, head_dim, columns, scores):
    """One program walks over all rows of an image with keys it loaded once: a row block read with another's bias, a
    tail stored where the next block belongs or keys scaled twice would show here, and nowhere else but on a GPU."""
    for dtype in [torch.float64, torch.bfloat16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]:
        case = AttentionCase(2, 2, tokens, length, head_dim, prompts, bias, columns=columns, dtype=dtype)
        call = case.inputs(DEVICE)
        seen = []

        def choose(config, seen=seen):
            seen.append(config._replace(keys_resident=True, scores_resident=scores))
            return seen[-1]

        found, exact = with_forward(call, choose), reference(case.converted(call, torch.float64))
        assert seen and (DEVICE != "cpu" or seen[0].block_m < tokens), "rows must take more than one block"
        eager = (None, None) if dtype == torch.float64 else reference(call)
        for name, actual, want, peer in zip(("out", "lse"), found, exact, eager):
            peer = peer if peer is None or name == "out" else peer.to(actual.dtype)
            assert_close_to_exact(f"{case} {name}", actual, want, peer, factor=2, tolerance=1e-12)


@pytest.mark.skipif("triton" not in EXACT_IMPLS, reason="needs triton's interpreter")
@pytest.mark.parametrize("tokens,length", [(17, 17), (31, 14), (32, 5), (45, 31), (9, 0)])
@pytest.mark.parametrize("prompts", ["shared", "pool", "queries", "image queries"])
def test_a_tail_that_is_walked_over_equals_the_definition(prompts, tokens, length, monkeypatch):
    """Kernels of float32 take what whole blocks leave in steps of 16, from one to four of them: tokens end and prompts
    begin inside a step and between two. Fails where a step is left out, read twice or masked by another's end."""
    from vptm_kernels.prompted_attention import triton_impl

    asked = []
    monkeypatch.setattr(triton_impl, "loops_over_tail", lambda *sizes: asked.append(sizes) or True)
    forget_plans()
    kinds = {"prompts": prompts, "bias": "table", "columns": "columns", "window": (3, 3)}
    check(AttentionCase(2, 2, tokens, length, **kinds), "triton")
    forget_plans()
    assert asked and triton_impl.tails(tokens, length, 32)[0] > 0


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
@pytest.mark.parametrize("prompts", ["shared", "queries", "pool"])
def test_the_order_of_programs_changes_no_bit(prompts):
    """Heads first or rows first: another order of the same programs, whatever their indices are computed from."""
    call = AttentionCase(heads=3, tokens=33, prompts=prompts, bias="dense", dtype=torch.float32).inputs(DEVICE)
    expected = with_forward(call, lambda c: c)
    for actual, want in zip(with_forward(call, lambda c: c._replace(heads_first=True)), expected):
        assert torch.equal(actual, want)


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
@pytest.mark.parametrize("bias", ["aligned", "table", "none"])
def test_queries_that_come_scaled_are_not_multiplied_again(bias, monkeypatch):
    """A model that folds D**-0.5 into its weights passes scale=1, and the kernel must then hold no multiplication."""
    from vptm_kernels.prompted_attention import triton_impl

    call = AttentionCase(head_dim=64, bias=bias, dtype=torch.float32).inputs(DEVICE)
    folded = dict(call, qkv=call["qkv"].clone(), scale=1.0)
    folded["qkv"][..., : 2 * 64] *= 64**-0.5
    table, asked = triton_impl.forward_config, []

    def recorded(*args, **options):
        asked.append(args[6])
        return table(*args, **options)

    monkeypatch.setattr(triton_impl, "forward_config", recorded)
    forget_plans()
    expected = prompted_attention(**call, return_lse=True, impl="triton")
    for actual, want in zip(prompted_attention(**folded, return_lse=True, impl="triton"), expected):
        torch.testing.assert_close(actual, want, rtol=1e-6, atol=1e-6)
    # without a bias the scale joins the exponent's factor either way
    assert asked == [bias != "none", False]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prompts", [None, 0, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_without_tokens_gradients_are_empty_or_zero(biased, prompts, impl):
    """No query attends: were rows of no scores reduced, backward would raise an IndexError."""
    leaves = {"qkv": torch.randn(2, 0, 3 * 32, device=DEVICE)}
    if prompts is not None:
        leaves["prompt_kv"] = torch.randn(prompts, 2 * 32, device=DEVICE)
    if biased:
        leaves["bias"] = torch.randn(2, 0, 0, device=DEVICE)
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, lse = prompted_attention(**leaves, num_heads=2, return_lse=True, impl=impl)
    assert out.shape == (2, 0, 32) and lse.shape == (2, 2, 0)
    for leaf, grad in zip(leaves.values(), torch.autograd.grad(out.sum() + lse.sum(), list(leaves.values()))):
        assert grad.shape == leaf.shape and not grad.any()


# Tokens: one; one below, at and above a 16-wide tile; class token + 7x7 patches; a 224-pixel BEiT without and with mask
# row, and with ten prompts; class token + 16x16 patches. Prompts: none, one, few, more than a narrow tail, more than a
# block. Head dimensions: powers of two, and two between them.
GRID = {
    "tokens": [1, 15, 16, 17, 50, 197, 198, 207, 257],
    "prompt_length": [0, 1, 3, 10, 57],
    "head_dim": [16, 32, 48, 64, 80, 128],
    "layout": list(LAYOUTS),
    "window": [(3, 5), (7, 7)],
    "prompts": ["shared", "image", "pool", "queries"],
}


def pairwise(factors) -> Iterator[dict]:
    """Rows in which every pair of values of two factors occurs, by greedy choice; the same at every run."""
    names = list(factors)
    pairs = list(itertools.combinations(names, 2))
    missing = {(a, x, b, y) for a, b in pairs for x in factors[a] for y in factors[b]}
    draw = random.Random(0)
    while missing:
        a, x, b, y = min(missing, key=str)
        tries = [{name: draw.choice(factors[name]) for name in names} | {a: x, b: y} for _ in range(60)]
        covered = [{(a, row[a], b, row[b]) for a, b in pairs} & missing for row in tries]
        best = max(range(len(tries)), key=lambda i: len(covered[i]))
        missing -= covered[best]
        yield tries[best]


ROWS = list(pairwise(GRID))


def test_the_grid_covers_all_pairs():
    for a, b in itertools.combinations(GRID, 2):
        assert {(row[a], row[b]) for row in ROWS} == set(itertools.product(GRID[a], GRID[b]))


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(value) for value in row.values()))
def test_pairwise_grid(row, impl):
    """All pairs of sizes, layouts, windows and kinds of prompts; one image and head where there are many tokens."""
    large = row["tokens"] >= 197
    check(AttentionCase(batch=1 if large else 2, heads=1 if large else 2, bias="table", **row), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "prompts,bias,rotary,columns",
    [
        ("shared", "table", "none", "columns"),
        ("queries", "dense", "none", "none"),
        ("image queries", "dense", "none", "columns"),
        ("pool", "aligned", "none", "columns"),
        ("image", "none", "none", "none"),
        ("shared", "none", "shared", "columns"),
    ],
)
def test_error_budget(prompts, bias, rotary, columns, dtype, impl):
    sizes = {"tokens": 50, "window": (7, 7), "prompt_length": 10, "head_dim": 64}
    check(AttentionCase(prompts=prompts, bias=bias, rotary=rotary, columns=columns, dtype=dtype, **sizes), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens,prompts", [(197, 10), (198, 50), (207, 0), (257, 3)])
def test_image_sizes_of_real_models(tokens, prompts, impl):
    """N of a 224-pixel BEiT with and without mask token, with 10 prompt rows, and of a 16x16 grid."""
    case = AttentionCase(
        batch=1, heads=1, tokens=tokens, prompt_length=prompts, head_dim=64, bias="dense", dtype=torch.float32
    )
    check(case, impl, with_lse=False)


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
@pytest.mark.parametrize("columns", ["none", "columns"])
@pytest.mark.parametrize("prompts", ["none", "shared", "pool", "queries"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16] if DEVICE == "cpu" else [torch.float16])
def test_kernels_gather_from_tables_whose_tile_would_be_too_large(prompts, columns, dtype, monkeypatch):
    """Tokens in any order, some without a position, several class tokens; the table's gradient one head at a time."""
    from vptm_kernels.prompted_attention import triton_impl

    monkeypatch.setattr(triton_impl, "fits_tile", lambda *args: False)
    monkeypatch.setattr(triton_impl, "heads_per_table_grad", lambda *args: 1)
    monkeypatch.setattr(triton_impl.Plan, "_expand_launch", None)
    forget_plans()
    if prompts == "none" and columns != "none":
        return
    kinds = {"prompts": prompts, "bias": "table", "window": (3, 4), "columns": columns}
    check(AttentionCase(tokens=38, prompt_length=5, dtype=dtype, **kinds), "triton")
    forget_plans()


def test_large_tables_are_gathered_and_their_gradient_is_bounded():
    from vptm_kernels.prompted_attention import configs

    assert configs.fits_tile(12, 197, 2) and configs.fits_tile(16, 577, 4)
    assert not configs.fits_tile(16, 1601, 2)
    for heads, tokens in [(12, 197), (16, 1601), (16, 40_000)]:
        group = configs.heads_per_table_grad(heads, tokens)
        assert 1 <= group <= heads and (group == 1 or group * tokens**2 * 4 <= 128 << 20)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_table_values_beyond_fp16_do_not_saturate(dtype, impl):
    """Entries of 80000 and 100000 are both 65504 in saturated fp16, and would share a row's attention."""
    case = AttentionCase(tokens=7, bias="table", window=(2, 3), prompts="none", dtype=dtype)
    call = case.inputs(DEVICE)
    table = torch.full((table_rows((2, 3)), 2), 8e4, device=DEVICE)
    table[7] = 1e5  # the offset of a patch to itself
    bias = RelativePositionBias(table, (2, 3), torch.arange(7, dtype=torch.int32, device=DEVICE))
    out = prompted_attention(**{**call, "bias": bias}, impl=impl)
    torch.testing.assert_close(out[:, 1:], call["qkv"][:, 1:, 64:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@given(data=st.data())
def test_random_cases(data, impl):
    case = data.draw(
        st.builds(
            AttentionCase,
            batch=st.integers(0, 2),
            heads=st.integers(1, 2),
            tokens=st.sampled_from([1, 2, 15, 16, 17, 33, 50]),
            prompt_length=st.sampled_from([0, 1, 3, 10, 17, 40]),
            head_dim=st.sampled_from([16, 20, 32, 48]),
            prompts=st.sampled_from(PROMPTS),
            bias=st.sampled_from(BIASES),
            rotary=st.sampled_from(ROTARIES),
            columns=st.sampled_from(COLUMNS),
            layout=st.sampled_from(LAYOUTS),
            scale=st.sampled_from([None, 0.0, 1.0]),
            seed=st.integers(0, 9),
        ).filter(lambda case: case.valid)
    )
    check(case, impl)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("prompts", ["shared", "image", "pool", "queries", "image queries"])
def test_gradcheck(prompts, impl):
    """Numerical derivatives of out and lse, so that the definition's own autograd is not the only witness."""
    sizes = {"batch": 2, "heads": 1, "tokens": 3, "prompt_length": 2}
    case = AttentionCase(**sizes, prompts=prompts, bias="dense", rotary="shared", columns="columns")
    call = case.inputs(DEVICE, requires_grad=True)
    leaves = differentiable(call)

    def run(*tensors):
        return prompted_attention(**{**call, **dict(zip(leaves, tensors))}, return_lse=True, impl=impl)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("prompts", ["shared", "image", "pool", "queries", "image queries"])
@pytest.mark.parametrize("learned", ["prompt_column_bias", "qkv"])
def test_values_of_prompt_columns_learn_alone_and_not_at_all(prompts, learned, impl):
    """Neither needs what the other has: fails where their gradient needs that of prompts, or rows have too little."""
    case = AttentionCase(batch=3, tokens=19, prompt_length=18, prompts=prompts, columns="columns", bias="dense")
    call = case.inputs(DEVICE)
    call[learned] = call[learned].requires_grad_()
    found, expected = (
        torch.autograd.grad(out.sin().sum(), call[learned])[0]
        for out in (prompted_attention(**call, impl=impl), reference(call)[0])
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_rotary_positions_are_those_of_timm(prompts, impl):
    """Queries and keys that timm turned, in halves and in neighbouring channels, per head too: fails if another pair of
    channels, the other direction, values or prompts are turned, or another head's angles are read."""
    for half, rotary in ((True, "shared"), (True, "heads"), (False, "shared"), (False, "heads")):
        case = AttentionCase(tokens=11, prompts=prompts, bias="dense", rotary=rotary)
        call = case.inputs(DEVICE)
        cos, sin = call.pop("rotary")
        parts = case.heads, case.head_dim
        if half:
            embedding, order = torch.cat([sin, sin, cos, cos], -1), torch.arange(parts[1])
        else:  # the halves are the even and the odd channels
            embedding = torch.cat([sin.repeat_interleave(2, -1), cos.repeat_interleave(2, -1)], -1)
            order = torch.arange(parts[1]).view(-1, 2).T.flatten()

        def turned(t, embedding=embedding, half=half, parts=parts):
            return apply_rot_embed_cat(t.unflatten(2, parts).transpose(1, 2), embedding, half=half).transpose(1, 2)

        def ordered(t, sections, order=order, parts=parts):
            """Channels of queries and keys in `order`, those of values as they are."""
            if t is None:
                return None
            found = t.unflatten(-1, (sections, *parts)).clone()
            found[..., :-1, :, :] = found[..., :-1, :, order]
            return found.flatten(-3)

        q, k, v = call["qkv"].chunk(3, -1)
        expected = reference({**call, "qkv": torch.cat([turned(q).flatten(2), turned(k).flatten(2), v], -1)})
        names = {"qkv": 3, "prompt_kv": 2, "prompt_qkv": 3}
        found = prompted_attention(
            **{**call, **{name: ordered(call.get(name), sections) for name, sections in names.items()}},
            rotary=(cos, sin),
            return_lse=True,
            impl=impl,
        )
        for actual, want in zip(found, expected):
            torch.testing.assert_close(actual, want, rtol=0, atol=1e-12)
        plain = prompted_attention(**call, impl=impl)
        assert (plain - expected[0]).abs().max() > 1e-2


@contextlib.contextmanager
def turned_by_a_pass():
    """What kernels do not turn as they load it, a kernel of its own turns before them."""
    from vptm_kernels.prompted_attention import triton_impl

    with pytest.MonkeyPatch.context() as patch:
        table = triton_impl.rotary_config
        patch.setattr(triton_impl, "rotary_config", lambda *a, **o: table(*a, **o)._replace(while_loading=False))
        forget_plans()
        yield
    forget_plans()


@pytest.mark.skipif("triton" not in EXACT_IMPLS, reason="needs triton's interpreter")
@pytest.mark.parametrize("prompts,head_dim", [("none", 16), ("shared", 24), ("pool", 40), ("queries", 16)])
def test_rotary_by_a_pass_before_the_kernels_equals_the_definition(prompts, head_dim):
    """Fails where the pass leaves a pair of channels out, gradients are not turned back in place, or are twice; where
    rows of a wider tensor are read as if they lay side by side."""
    kinds = {"prompts": prompts, "head_dim": head_dim, "rotary": "heads", "layout": "sliced"}
    with turned_by_a_pass():
        check(AttentionCase(2, 2, 19, 5, **kinds), "triton")


@pytest.mark.skipif("triton" not in EXACT_IMPLS, reason="needs triton's interpreter")
@pytest.mark.parametrize("prompts", ["shared", "queries", "pool"])
@pytest.mark.parametrize("head_dim,tokens,length", [(16, 1, 0), (24, 33, 31), (40, 35, 34), (16, 64, 65)])
def test_turned_as_they_are_loaded(head_dim, tokens, length, prompts):
    """Whole blocks of tokens and of prompts, and tails of both, with heads of no power of two, whose halves stand apart
    in registers: fails where a prompt is turned, a token is not, or halves of queries, keys and gradients disagree."""
    check(AttentionCase(1, 2, tokens, length, head_dim, prompts=prompts, rotary="shared"), "triton")


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("form", ["sliced", "transposed", "one by heads", "wider", "expanded"])
def test_angles_of_any_strides_and_types(form, impl):
    """Rows of longer tables, the other order in memory, cosines of all heads beside sines of each, float64 beside
    float32, one table for all heads by expand: fails where one table is read by the other's strides."""
    case = AttentionCase(tokens=19, rotary="heads", dtype=torch.float32 if form == "wider" else torch.float64)
    call = case.inputs(DEVICE)
    cos, sin = call["rotary"]
    if form == "sliced":
        cos, sin = (torch.cat([t, t], 1)[:, :19] for t in (cos, sin))
    elif form == "transposed":
        cos = cos.transpose(0, 2).contiguous().transpose(0, 2)
    elif form == "one by heads":
        cos = cos[0]
    elif form == "wider":
        cos = cos.double()
    else:
        cos, sin = (t[:1].expand(2, -1, -1) for t in (cos, sin))
    call["rotary"] = cos, sin
    whole = tuple(t.expand(2, -1, -1).contiguous().to(sin.dtype) for t in (cos, sin))
    expected = prompted_attention(**{**call, "rotary": whole}, impl="torch")
    torch.testing.assert_close(prompted_attention(**call, impl=impl), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
def test_a_call_that_was_checked_once_is_refused_when_its_angles_change():
    """Plans are kept by signature: fails where one without angles, or with others, is found for one that has them."""
    call = AttentionCase(tokens=7, rotary="shared", dtype=torch.float32).inputs(DEVICE)
    cos, sin = call["rotary"]
    for _ in range(2):  # looked at, then known
        turned = prompted_attention(**call, impl="triton")
        plain = prompted_attention(**{**call, "rotary": None}, impl="triton")
        assert not torch.allclose(turned, plain)
    refused = [(cos, sin.clone().requires_grad_()), (cos, None), (None, None), (cos[:3], sin[:3]), (cos, sin, sin)]
    for rotary in refused:
        with pytest.raises((ValueError, TypeError), match="rotary"):
            prompted_attention(**{**call, "rotary": rotary}, impl="triton")


@pytest.mark.parametrize("impl", EXACT_IMPLS)
def test_gradcheck_of_a_table(impl):
    call = AttentionCase(batch=2, heads=2, tokens=5, bias="table", window=(2, 2)).inputs(DEVICE, requires_grad=True)

    def run(table):
        bias = call["bias"]._replace(table=table)
        return prompted_attention(**{**call, "bias": bias}, impl=impl)

    assert torch.autograd.gradcheck(run, (call["bias"].table,), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", [{"qkv"}, {"prompt_kv"}, {"bias"}, {"prompt_kv", "bias"}])
def test_only_the_gradients_asked_for(wanted, impl):
    case = AttentionCase(tokens=17, bias="dense", dtype=torch.float32)
    call = case.inputs(DEVICE, requires_grad=True)
    outputs = prompted_attention(**call, impl=impl)
    full = torch.autograd.grad(outputs.square().sum(), list(differentiable(call).values()))
    for name, t in differentiable(call).items():
        t.requires_grad_(name in wanted)
    found = prompted_attention(**call, impl=impl)
    leaves = {name: t for name, t in differentiable(call).items() if t.requires_grad}
    grads = torch.autograd.grad(found.square().sum(), list(leaves.values()))
    expected = dict(zip(differentiable(call), full))
    assert set(leaves) == wanted
    for name, grad in zip(leaves, grads):
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_ranges_and_ids_of_any_strides(layout, impl):
    """One range for all images by expand, start and length stacked and transposed, every other id of a longer list."""
    call = AttentionCase(prompts="pool", bias="table", tokens=7, window=(2, 3)).inputs(DEVICE, requires_grad=True)
    ranges = torch.tensor([[2, 3], [1, 2]], dtype=torch.int32, device=DEVICE)
    call["prompt_ranges"] = ranges[:1].expand(2, 2) if layout == "expanded" else ranges.T.contiguous().T
    call["bias"] = call["bias"]._replace(token_ids=call["bias"].token_ids.repeat_interleave(2)[::2])
    assert not call["prompt_ranges"].is_contiguous() and not call["bias"].token_ids.is_contiguous()
    exact_call = AttentionCase().converted(call, torch.float64)
    outputs, exact = prompted_attention(**call, return_lse=True, impl=impl), reference(exact_call)
    upstream = [torch.randn_like(t) for t in exact]
    found, wanted = gradients(call, outputs, upstream), gradients(exact_call, exact, upstream)
    for actual, want in zip(outputs, exact):
        assert_close_to_exact(layout, actual, want, tolerance=1e-12)
    for name in wanted:
        assert_close_to_exact(name, found[name], wanted[name], tolerance=1e-10)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
def test_shared_prompts_equal_copies_ranges_and_concatenated_tokens(impl):
    case = AttentionCase(tokens=17, prompt_length=5)
    call = case.inputs(DEVICE)
    qkv, shared, heads = call["qkv"], call["prompt_kv"], call["num_heads"]
    out = prompted_attention(qkv, shared, num_heads=heads, impl=impl)
    copies = prompted_attention(qkv, shared.expand(2, -1, -1), num_heads=heads, impl=impl)
    pool = torch.cat([shared.new_full((3, shared.shape[1]), 7.0), shared])
    ranges = torch.tensor([[3, 5], [3, 5]], dtype=torch.int32, device=DEVICE)
    ranged = prompted_attention(qkv, pool, num_heads=heads, prompt_ranges=ranges, max_prompt_length=9, impl=impl)
    rows = torch.cat([torch.zeros_like(shared[:, : shared.shape[1] // 2]), shared], 1).expand(2, -1, -1)
    joined = prompted_attention(torch.cat([qkv, rows], 1), num_heads=heads, impl=impl)[:, :17]
    for other in (copies, ranged, joined):
        torch.testing.assert_close(out, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
def test_prompts_that_attend_equal_concatenated_tokens(impl):
    case = AttentionCase(tokens=17, prompt_length=5, prompts="queries")
    call = case.inputs(DEVICE)
    joined = torch.cat([call["qkv"], call["prompt_qkv"].expand(2, -1, -1)], 1)
    out = prompted_attention(**call, impl=impl)
    torch.testing.assert_close(out, prompted_attention(joined, num_heads=2, impl=impl), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("bias", ["none", "dense", "square"])
def test_rows_given_in_two_views_have_a_value_of_their_last_columns(bias, impl):
    """What a block of carried prompts asks for: equal to one tensor of rows and a dense bias with those values in its
    last columns, gradients too. Fails where an image attends to another's prompts, or a view is read as if it were
    packed."""
    case = AttentionCase(batch=3, tokens=17, prompt_length=20, prompts="image queries", bias=bias, columns="columns")
    call = case.inputs(DEVICE, requires_grad=True)
    rows = torch.cat([call.pop("qkv"), call.pop("prompt_qkv")], 1).detach().requires_grad_()
    values, given = call.pop("prompt_column_bias"), call.pop("bias", None)
    dense = torch.nn.functional.pad(values, (17, 0))[:, None].expand(-1, 37, -1)
    if given is not None:
        missing = (0, 37 - given.shape[2], 0, 37 - given.shape[1])
        dense = dense + torch.nn.functional.pad(given, missing)
    expected = prompted_attention(rows, bias=dense, num_heads=2, impl=impl)
    tokens, prompts = rows.split([17, 20], 1)
    found = prompted_attention(
        tokens, prompt_qkv=prompts, bias=given, prompt_column_bias=values, num_heads=2, impl=impl
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    leaves = [rows, values, *([] if given is None else [given])]
    one, other = (torch.autograd.grad(out.sin().sum(), leaves) for out in (found, expected))
    for actual, wanted in zip(one, other):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_prompts_is_plain_attention(impl):
    call = AttentionCase(tokens=17, prompt_length=0, dtype=torch.float32).inputs(DEVICE)
    out = prompted_attention(**call, impl=impl)
    q, k, v = call["qkv"].unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-6)
    assert torch.equal(out, prompted_attention(call["qkv"], num_heads=2, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_order_of_images_and_prompts_does_not_matter(impl):
    case = AttentionCase(batch=3, tokens=17, prompt_length=5, bias="dense", dtype=torch.float32)
    call = case.inputs(DEVICE)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    out = prompted_attention(**call, impl=impl)
    permuted = prompted_attention(**{**call, "qkv": call["qkv"][order]}, impl=impl)
    assert torch.equal(out[order], permuted), "permuting the batch must permute the output bitwise"
    reordered = prompted_attention(**{**call, "prompt_kv": call["prompt_kv"].flip(0)}, impl=impl)
    torch.testing.assert_close(out, reordered, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_merging_attention_over_disjoint_keys_by_lse(impl):
    case = AttentionCase(tokens=17, prompt_length=5, dtype=torch.float32)
    call = case.inputs(DEVICE)
    prompts = call.pop("prompt_kv")
    whole = prompted_attention(**call, prompt_kv=prompts, impl=impl)
    tokens, lse = prompted_attention(**call, return_lse=True, impl=impl)
    both, both_lse = prompted_attention(**call, prompt_kv=prompts, return_lse=True, impl=impl)
    share = (lse - both_lse).exp().mT.repeat_interleave(16, 2)
    q = call["qkv"].unflatten(2, (3, 2, 16))[:, :, 0].transpose(1, 2)
    pk, pv = prompts.unflatten(1, (2, 2, 16)).permute(1, 2, 0, 3)
    only = torch.nn.functional.scaled_dot_product_attention(q, pk.expand(2, -1, -1, -1), pv.expand(2, -1, -1, -1))
    merged = share * tokens + (1 - share) * only.transpose(1, 2).flatten(2)
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-5)
    assert torch.equal(both, whole)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fully_masked_rows_give_zeros_and_equal_finite_rows_stay_uniform(dtype, impl):
    case = AttentionCase(tokens=17, prompts="none", dtype=dtype)
    call = case.inputs(DEVICE, requires_grad=True)
    bias = torch.zeros(2, 17, 17, device=DEVICE)
    bias[:, 3], bias[:, 5] = float("-inf"), -1e9
    bias[:, 7, 1:] = float("-inf")
    out, lse = prompted_attention(**{**call, "bias": bias.requires_grad_()}, return_lse=True, impl=impl)
    assert torch.equal(out[:, 3], torch.zeros_like(out[:, 3]))
    assert bool((lse[:, :, 3] == float("-inf")).all())
    v = call["qkv"][..., -32:]
    torch.testing.assert_close(
        out[:, 5].float(), v.float().mean(1), rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
    )
    torch.testing.assert_close(out[:, 7], v[:, 0], rtol=0, atol=1e-6)
    grads = torch.autograd.grad(out.float().square().sum(), [call["qkv"], bias])
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not bool(grads[1][:, 3].any()), "a fully masked row has no gradient"


@pytest.mark.skipif(DEVICE != "cpu", reason="a form for CPUs")
@pytest.mark.parametrize("case", VALID_KINDS, ids=kind)
def test_stored_scores_of_bfloat16_on_a_cpu_keep_the_error_budget(case, monkeypatch):
    """Processors that multiply bfloat16 take this form in inference; others must find its faults too."""
    from vptm_kernels.prompted_attention import torch_impl

    taken = []
    by_products = torch_impl._by_products
    monkeypatch.setattr(torch_impl, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(torch_impl, "_by_products", lambda *given: taken.append(1) or by_products(*given))
    # 33 tokens: columns that are no multiple of a row's alignment
    case = replace(case, tokens=33, dtype=torch.bfloat16)
    if case.bias == "table":
        case = replace(case, window=(4, 8))
    call = case.inputs()
    with torch.no_grad():
        out = prompted_attention(**call, impl="torch")
        exact = reference(case.converted(call, torch.float64))[0]
        assert_close_to_exact(str(case), out, exact, reference(case.converted(call, case.dtype))[0], factor=2)
    assert taken and out.dtype == torch.bfloat16


@pytest.mark.skipif(DEVICE != "cpu", reason="a form for CPUs")
@pytest.mark.parametrize("operator", [True, False])
@pytest.mark.parametrize("case", VALID_KINDS, ids=kind)
def test_stored_scores_of_bfloat16_on_a_cpu_have_the_gradients(case, operator, monkeypatch):
    """Training takes this form where inference does, with PyTorch's gradient of a softmax or without."""
    from vptm_kernels.prompted_attention import torch_impl

    taken = []
    backward = torch_impl._by_products_backward
    monkeypatch.setattr(torch_impl, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(torch_impl, "_by_products_backward", lambda *given: taken.append(1) or backward(*given))
    if not operator:
        monkeypatch.setattr(torch_impl, "activation_gradients", {})
    case = replace(case, tokens=33, dtype=torch.bfloat16)
    if case.bias == "table":
        case = replace(case, window=(4, 8))
    call = case.inputs(DEVICE, requires_grad=True)
    if isinstance(call.get("bias"), RelativePositionBias):
        call["bias"] = call["bias"]._replace(table=call["bias"].table.detach())
    elif call.get("bias") is not None:
        call["bias"] = call["bias"].detach()  # one that learns is written out
    learned = [t for name, t in differentiable(call).items() if name != "bias"]

    def gradients(of, tensors):
        return torch.autograd.grad(of.square().sum(), tensors)

    found = gradients(prompted_attention(**call, impl="torch"), learned)
    assert taken
    results = []
    for dtype in (torch.float64, case.dtype):
        own = case.converted(call, dtype)
        leaves = [t for name, t in differentiable(own).items() if name != "bias"]
        results.append(gradients(reference(own)[0], leaves))
    for actual, exact, eager in zip(found, *results):
        assert_close_to_exact(str(case), actual, exact, eager, factor=3)


@pytest.mark.skipif(DEVICE != "cpu", reason="a form for CPUs")
@pytest.mark.parametrize("masked, stored", [(slice(None), False), (slice(0, 5), True), (slice(5, 9), True)])
def test_stored_scores_leave_a_row_that_is_masked_as_a_whole_to_the_other_form(masked, stored, monkeypatch):
    """softmax of a row of -inf is NaN, and the contract says zeros; a row that is masked in part stays."""
    from vptm_kernels.prompted_attention import torch_impl

    taken = []
    by_products = torch_impl._by_products
    monkeypatch.setattr(torch_impl, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(torch_impl, "_by_products", lambda *given: taken.append(1) or by_products(*given))
    case = AttentionCase(tokens=17, prompts="none", dtype=torch.bfloat16)
    call = case.inputs()
    call["bias"] = torch.zeros(2, 17, 17)
    call["bias"][:, 3, masked] = float("-inf")
    with torch.no_grad():
        out = prompted_attention(**call, impl="torch")
        exact = reference(case.converted(call, torch.float64))[0]
        assert_close_to_exact("masked", out, exact, reference(case.converted(call, case.dtype))[0], factor=2)
    assert bool(taken) == stored and bool(out[:, 3].any()) == stored


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_scores(size, impl):
    """Scores of +-1e4: every exponential but the largest underflows, none may overflow; error relative to the score."""
    case = AttentionCase(tokens=17, prompt_length=5, bias="dense", scale=size / 50)
    call = case.inputs(DEVICE, requires_grad=True)
    exact_call = case.converted(call, torch.float64)
    outputs, exact = prompted_attention(**call, return_lse=True, impl=impl), reference(exact_call)
    largest = exact[1].abs().max().item()
    assert largest > 1e3
    for actual, want in zip(outputs, exact):
        assert_close_to_exact("huge scores", actual, want, tolerance=1e-12 * (1 + largest))
    upstream = [torch.ones_like(t) for t in exact]
    found, wanted = gradients(call, outputs, upstream), gradients(exact_call, exact, upstream)
    for name in wanted:
        assert_close_to_exact(name, found[name], wanted[name], tolerance=1e-10 * (1 + largest))


@pytest.mark.parametrize("impl", EXACT_IMPLS)
def test_equal_rows_and_one_table_entry_for_every_pair(impl):
    """All keys equal gives the mean of the values; ids that repeat make one table entry collect every gradient."""
    call = AttentionCase(tokens=17, prompt_length=5).inputs(DEVICE, requires_grad=True)
    ids = torch.ones(17, dtype=torch.int32, device=DEVICE)
    table = torch.randn(table_rows((2, 3)), 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    call["bias"] = RelativePositionBias(table, (2, 3), ids)
    exact_call = AttentionCase().converted(call, torch.float64)
    outputs, exact = prompted_attention(**call, return_lse=True, impl=impl), reference(exact_call)
    upstream = [torch.randn_like(t) for t in exact]
    found, wanted = gradients(call, outputs, upstream), gradients(exact_call, exact, upstream)
    assert wanted["bias"].abs().gt(0).sum() <= 2, "one entry per head is used"
    for name in wanted:
        assert_close_to_exact(name, found[name], wanted[name], tolerance=1e-10)
    qkv = call["qkv"].detach().clone()
    qkv[..., 32:64] = 1.5
    qkv.requires_grad_()
    uniform = prompted_attention(qkv, num_heads=2, impl=impl)
    mean = qkv[..., 64:].mean(1, keepdim=True).expand(-1, 17, -1)
    torch.testing.assert_close(uniform, mean, rtol=0, atol=1e-12)
    exact = reference({"qkv": qkv, "num_heads": 2})[0]
    upstream = torch.randn_like(exact)
    found, wanted = (torch.autograd.grad((t * upstream).sum(), qkv)[0] for t in (uniform, exact))
    assert_close_to_exact("gradient of equal rows", found, wanted, tolerance=1e-10)
    assert not bool(found[..., :32].abs().gt(1e-12).any()), "no query can change a uniform row"


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_bitwise_reproducible(impl):
    case = AttentionCase(batch=3, tokens=7, prompt_length=5, bias="table", window=(2, 3), dtype=torch.float32)
    first = None
    for _ in range(20 if DEVICE == "cuda" else 4):  # the interpreter has one order
        call = case.inputs(DEVICE, requires_grad=True)
        grads = torch.autograd.grad(
            prompted_attention(**call, impl=impl).sin().sum(), list(differentiable(call).values())
        )
        first = first or grads
        assert all(torch.equal(a, b) for a, b in zip(grads, first))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "batch,tokens,prompts,bias",
    [
        (0, 17, "shared", "none"),
        (0, 5, "pool", "none"),
        (2, 0, "shared", "none"),
        (2, 0, "queries", "none"),
        (2, 0, "queries", "square"),
        (2, 0, "image queries", "square"),
        (0, 5, "image queries", "none"),
    ],
)
@pytest.mark.parametrize("columns", ["none", "columns"])
def test_empty_batch_and_no_tokens(batch, tokens, prompts, bias, columns, impl):
    case = AttentionCase(batch=batch, tokens=tokens, prompts=prompts, bias=bias, columns=columns, dtype=torch.float32)
    call = case.inputs(DEVICE, requires_grad=True)
    out, lse = prompted_attention(**call, return_lse=True, impl=impl)
    rows = tokens + (3 if "queries" in prompts else 0)
    assert out.shape == (batch, rows, 32) and lse.shape == (batch, 2, rows)
    grads = torch.autograd.grad(out.sum(), list(differentiable(call).values()), allow_unused=True)
    for grad, t in zip(grads, differentiable(call).values()):
        assert grad is None or grad.shape == t.shape
    if rows and batch:
        exact = reference(case.converted(call, torch.float64))
        assert_close_to_exact("out", out, exact[0], reference(call)[0])


def shared_call(**changes):
    call = AttentionCase(tokens=7, prompt_length=3, dtype=torch.float32).inputs()
    return {**call, **changes}


RANGES = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)
BAD_INPUT = {
    "qkv must be (B, N, 3*H*D)": lambda c: {**c, "num_heads": 5},
    "num_heads must be a positive int, got 0": lambda c: {**c, "num_heads": 0},
    "qkv must be float16, bfloat16, float32 or float64, got torch.int32": lambda c: {**c, "qkv": c["qkv"].int()},
    "qkv must have a unit last stride": lambda c: {**c, "qkv": torch.randn(2, 96, 7).mT},
    "prompt_kv must have the dtype of qkv": lambda c: {**c, "prompt_kv": c["prompt_kv"].double()},
    "prompt_kv must be (P, 2*H*D) or (B, P, 2*H*D) with B = 2, 2*H*D = 64, got (3, 60)": lambda c: {
        **c,
        "prompt_kv": torch.randn(3, 60),
    },
    "prompt_kv must be on the device of qkv": lambda c: {**c, "prompt_kv": c["prompt_kv"].to("meta")},
    "prompt_kv and prompt_qkv must not both be given": lambda c: {**c, "prompt_qkv": torch.randn(3, 96)},
    "prompt_qkv must be (P, 3*H*D) or (B, P, 3*H*D) with B = 2, 3*H*D = 96, got (3, 64)": lambda c: {
        **c,
        "prompt_kv": None,
        "prompt_qkv": torch.randn(3, 64),
    },
    "prompt_qkv must be (P, 3*H*D) or (B, P, 3*H*D) with B = 2, 3*H*D = 96, got (3, 3, 96)": lambda c: {
        **c,
        "prompt_kv": None,
        "prompt_qkv": torch.randn(3, 3, 96),
    },
    "bias must be a floating point (2, 7, 7) or (2, 7, 10) (H, queries, keys), got (2, 7, 8)": lambda c: {
        **c,
        "bias": torch.randn(2, 7, 8),
    },
    "bias.table must be a floating point (R, H) = (18, 2) for window (2, 3)": lambda c: {
        **c,
        "bias": RelativePositionBias(torch.randn(17, 2), (2, 3)),
    },
    "bias.token_ids must be given unless N = Hp*Wp + 1 = 10, got None with N = 7": lambda c: {
        **c,
        "bias": RelativePositionBias(torch.randn(28, 2), (3, 3)),
    },
    "bias.token_ids must be (N,) = (7,) int32, got (7,) torch.int64": lambda c: {
        **c,
        "bias": RelativePositionBias(torch.randn(18, 2), (2, 3), torch.arange(7)),
    },
    "bias.window must be two positive ints": lambda c: {**c, "bias": RelativePositionBias(torch.randn(18, 2), (2, 0))},
    "rotary[0] (cos) must be a floating point (N, D/2) = (7, 8) or (H, N, D/2) = (2, 7, 8), got (7, 16)": lambda c: {
        **c,
        "rotary": (torch.ones(7, 16), torch.zeros(7, 16)),
    },
    "rotary[1] (sin) must be a constant, got one that requires a gradient": lambda c: {
        **c,
        "rotary": (torch.ones(7, 8), torch.zeros(7, 8, requires_grad=True)),
    },
    "rotary[1] (sin) must be on the device of qkv, cpu, got meta": lambda c: {
        **c,
        "rotary": (torch.ones(7, 8), torch.zeros(7, 8, device="meta")),
    },
    "rotary must come with an even head dimension, got D = 3": lambda c: {
        "qkv": torch.randn(2, 7, 18),
        "num_heads": 2,
        "rotary": (torch.ones(7, 1), torch.zeros(7, 1)),
    },
    "prompt_column_bias must be a floating point (H, P) = (2, 3), one value for each head and row of the prompts, got "
    "(3, 2)": lambda c: {**c, "prompt_column_bias": torch.zeros(3, 2)},
    "prompt_column_bias must come with prompt_kv or prompt_qkv, got neither": lambda c: {
        **c,
        "prompt_kv": None,
        "prompt_column_bias": torch.zeros(2, 3),
    },
    "prompt_column_bias must be on the device of qkv, cpu, got meta": lambda c: {
        **c,
        "prompt_column_bias": torch.zeros(2, 3, device="meta"),
    },
    "scale must be a finite number, got nan": lambda c: {**c, "scale": float("nan")},
    "impl must be one of ('auto', 'triton', 'torch'), got 'cuda'": lambda c: {**c, "impl": "cuda"},
    "prompt_ranges must come with prompt_kv": lambda c: {
        **c,
        "prompt_kv": None,
        "prompt_ranges": RANGES,
        "max_prompt_length": 3,
    },
    "max_prompt_length must be a non-negative int with prompt_ranges, got None": lambda c: {
        **c,
        "prompt_ranges": RANGES,
    },
    "max_prompt_length must be None without prompt_ranges, got 3": lambda c: {**c, "max_prompt_length": 3},
    "prompt_ranges must be (B, 2) = (2, 2) int32, got (2, 2) torch.int64": lambda c: {
        **c,
        "prompt_ranges": RANGES.long(),
        "max_prompt_length": 3,
    },
    "prompt_ranges must lie inside the pool of 3 rows, got start 1, length 3 for image 1": lambda c: {
        **c,
        "prompt_ranges": torch.tensor([[0, 3], [1, 3]], dtype=torch.int32),
        "max_prompt_length": 3,
    },
    "prompt_ranges must have lengths <= max_prompt_length = 2, got 3 for image 0": lambda c: {
        **c,
        "prompt_ranges": RANGES,
        "max_prompt_length": 2,
    },
}


@pytest.mark.parametrize("message", BAD_INPUT, ids=lambda message: re.sub(r"[^a-z_]+", "-", message[:40]))
def test_bad_input_is_refused_by_name_and_value(message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        prompted_attention(**BAD_INPUT[message](shared_call()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["qkv", "prompt_kv", "bias", "prompt_column_bias"])
def test_wrong_types_are_refused_by_name(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        prompted_attention(**shared_call(**{name: [1.0]}))


def test_a_rotary_that_is_no_pair_is_refused():
    with pytest.raises(TypeError, match=r"rotary must be a pair of tensors \(cos, sin\), got Tensor"):
        prompted_attention(**shared_call(rotary=torch.ones(7, 16)))
    with pytest.raises(TypeError, match=r"rotary\[1\] \(sin\) must be a tensor"):
        prompted_attention(**shared_call(rotary=(torch.ones(7, 8), None)))


def test_ranges_changed_in_place_are_checked_again():
    ranges = RANGES.clone()
    call = shared_call(prompt_ranges=ranges, max_prompt_length=3)
    prompted_attention(**call)
    ranges[1, 0] = 9
    with pytest.raises(ValueError, match="inside the pool"):
        prompted_attention(**call)


def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="impl='triton' needs a head dimension from 16 to 128, got 8"):
        prompted_attention(torch.randn(1, 3, 48, device=DEVICE), num_heads=2, impl="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="needs tensors that Triton cannot use")
def test_triton_names_what_is_missing(monkeypatch):
    call = shared_call(impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(triton_support, "_HAS_TRITON", True)
    forget_plans()
    with pytest.raises(ValueError, match=r"impl='triton' needs GPU tensors .*, got device cpu"):
        prompted_attention(**call)
    monkeypatch.setattr(triton_support, "_TOO_OLD", triton_support.too_old("triton", "3.5.1"))
    with pytest.raises(ValueError, match=r"^impl='triton' needs triton 3\.6 or newer, got 3\.5\.1$"):
        prompted_attention(**call)
    monkeypatch.setattr(triton_support, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="impl='triton' needs the triton package, which is not installed"):
        prompted_attention(**call)


@pytest.mark.parametrize(
    "package,version,expected",
    [
        ("triton", "3.5.1", "triton 3.6 or newer, got 3.5.1"),
        ("triton", "2.10.0", "triton 3.6 or newer, got 2.10.0"),
        ("torch", "2.9.1+cu128", "torch 2.11 or newer, got 2.9.1+cu128"),
        ("torch", "2.11.0", None),
        ("triton", "3.10.0", None),
        ("triton", "3.6.0+git1a2b", None),
    ],
)
def test_a_version_is_too_old(package, version, expected):
    """Compared as numbers: as text, 2.9 is newer than 2.11 and 3.10 older than 3.6."""
    assert triton_support.too_old(package, version) == expected


def test_the_oldest_torch_is_what_the_package_asks_for():
    """Installed by pip beside an older one, vptm would refuse its own kernels, or run what nobody tested."""
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    asked = {name: tuple(map(int, v.split("."))) for name, v in re.findall(r"(torch|triton)>=([\d.]+)", declared)}
    assert asked == triton_support.OLDEST


@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
@pytest.mark.parametrize("prompts", ["shared", "queries", "pool"])
def test_offsets_of_64_bits_give_the_same_result(prompts, monkeypatch):
    """Rows beyond 2**31 elements use 64-bit offsets: the same kernels, forced here on a small input."""
    from vptm_kernels.prompted_attention import triton_impl

    case = AttentionCase(tokens=17, prompts=prompts, bias="dense", rotary="heads", dtype=torch.float32)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(triton_impl, "needs_int64", lambda reach, wide=wide: wide)
        forget_plans()
        call = case.inputs(DEVICE, requires_grad=True)
        out = prompted_attention(**call, impl="triton")
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(differentiable(call).values()))])
    for narrow, wide in zip(*results):
        assert torch.equal(narrow, wide)


@pytest.mark.skipif("triton" not in IMPLS or DEVICE == "cuda", reason="needs the interpreter")
def test_rows_and_images_beyond_two_to_the_31_elements(tmp_path):
    """Real addresses: a sparse file of 14 GB, of which a few pages exist."""
    strides = (2**32, 2**30 + 8, 1)
    elements = sum((size - 1) * stride for size, stride in zip((2, 3, 96), strides)) + 1
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2 * elements)
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=elements, dtype=torch.float16)
    far = memory.as_strided((2, 3, 96), strides)
    near = torch.randn(2, 3, 96).half()
    far.copy_(near)
    prompts = torch.randn(4, 64).half()
    results = []
    for qkv in (far, near):
        leaves = [qkv.detach().requires_grad_(), prompts.clone().requires_grad_()]
        out = prompted_attention(*leaves, num_heads=2, impl="triton")
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.skipif("triton" not in IMPLS or DEVICE == "cuda", reason="needs the interpreter")
def test_rows_of_a_bias_beyond_two_to_the_31_elements(tmp_path):
    """A bias that is read where it lies, in a sparse file of 6 GB."""
    strides = (0, 2**30 + 16, 1)
    elements = 2 * strides[1] + 16
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2 * elements)
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=elements, dtype=torch.float16)
    far = memory.as_strided((2, 3, 3), strides)
    far[0] = torch.randn(3, 3)
    results = []
    for bias in (far, far.clone()):
        leaves = [torch.ones(2, 3, 96).cumsum(1).sin().half().requires_grad_(), bias.detach().requires_grad_()]
        out = prompted_attention(leaves[0], num_heads=2, bias=leaves[1], impl="triton")
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
@pytest.mark.parametrize("prompts", ["shared", "queries"])
def test_the_gradient_of_one_image_has_the_same_bits_summed_or_not(prompts, monkeypatch):
    """After larger batches the last image of an epoch goes through their kernel, which stores sums to be converted."""
    from vptm_kernels.prompted_attention import triton_impl

    case, found = AttentionCase(batch=1, tokens=17, prompts=prompts, dtype=torch.float16), []
    for summed in (None, True):
        monkeypatch.setattr(triton_impl._summed, "get", lambda shape, summed=summed: summed)
        forget_plans()
        call = case.inputs(DEVICE, requires_grad=True)
        out = prompted_attention(**call, impl="triton")
        found.append(torch.autograd.grad(out.float().sin().sum(), list(differentiable(call).values())))
    for direct, converted in zip(*found):
        assert torch.equal(direct, converted)


class Forbidden(TorchDispatchMode):
    """Operations that make a host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim"}
        assert func.overloadpacket.__name__ not in waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
@pytest.mark.parametrize("prompts,bias", [("shared", "table"), ("pool", "dense"), ("queries", "square")])
def test_launches_do_not_wait_for_the_device(prompts, bias):
    case = AttentionCase(tokens=7, prompts=prompts, bias=bias, window=(2, 3), dtype=torch.float32)
    call = case.inputs(DEVICE, requires_grad=True)
    prompted_attention(**call, impl="triton")  # ranges are read back once, when they are first seen
    with Forbidden():
        out = prompted_attention(**call, impl="triton")
        torch.autograd.grad(out.sum(), list(differentiable(call).values()))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_captured_graph_replays_forward_and_backward():
    case = AttentionCase(tokens=50, prompt_length=10, bias="table", window=(7, 7), dtype=torch.float16)
    call = case.inputs(DEVICE, requires_grad=True)
    leaves = list(differentiable(call).values())

    def step():
        out = prompted_attention(**call, impl="triton")
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        call["qkv"].mul_(0.5)
    graph.replay()
    for a, b in zip(captured, step()):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors():
    call = AttentionCase(tokens=17, bias="dense", dtype=torch.float16).inputs("cuda:1")
    with torch.cuda.device(0):
        out = prompted_attention(**call, impl="triton")
    exact = reference(AttentionCase().converted(call, torch.float64))[0]
    assert_close_to_exact("out", out, exact, reference(call)[0])


@pytest.mark.skipif("triton" not in IMPLS, reason="needs triton")
def test_nothing_is_allocated_but_results(monkeypatch):
    """Forward: out and lse. Backward: delta, dqkv and the prompts' partial sums. Nothing is concatenated or padded."""

    class Allocations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes, self.ops = [], set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.ops.add(func.overloadpacket.__name__)
            if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like):
                self.shapes += [tuple(result.shape)] * (result.numel() > 0)
            return result

    from vptm_kernels.prompted_attention import triton_impl

    call = AttentionCase(tokens=17, prompt_length=5, bias="aligned", dtype=torch.float32).inputs(DEVICE)
    inputs = (call["qkv"], call["prompt_kv"], call["bias"], *(5 * [None]))
    options = ([], 2, False, 0, 0.25)
    with Allocations() as forward:
        out, lse = triton_impl.forward(*inputs, *options, True)
    assert sorted(forward.shapes) == [(2, 2, 17), (2, 17, 32)]
    with Allocations() as backward:
        triton_impl.backward(torch.ones_like(out), None, *inputs, out, lse, *options, [True, True, False, False])
    assert sorted(backward.shapes) == [(2, 2, 17), (2, 5, 64), (2, 17, 96)]

    # A table adds its tile to both, and to backward its dense gradient by chunks of the batch and its own.
    table = AttentionCase(tokens=17, prompt_length=5, bias="table", window=(4, 4), dtype=torch.float32).inputs(DEVICE)
    inputs = (table["qkv"], table["prompt_kv"], table["bias"].table, None, table["bias"].token_ids, *(3 * [None]))
    options = ([4, 4], 2, False, 0, 0.25)
    with Allocations() as with_table:
        out, lse = triton_impl.forward(*inputs, *options, True)
        triton_impl.backward(torch.ones_like(out), None, *inputs, out, lse, *options, [True, True, True, False])
    extra = [(2, 17, 32), (2, 17, 32), (2, 2, 17, 17), (52, 2)]
    assert sorted(with_table.shapes) == sorted(forward.shapes + backward.shapes + extra)
    assert not (forward.ops | backward.ops) & {"cat", "constant_pad_nd", "scaled_dot_product_attention"}


def test_double_backward_is_a_clear_error():
    call = shared_call()
    qkv = call["qkv"].requires_grad_()
    (grad,) = torch.autograd.grad(prompted_attention(**call).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        grad.sum().backward()
