"""prototype_cosine against its definition in float64: forward, gradients, plans, invariants, bad input.

The Triton kernels run in the interpreter where there is no GPU, with every access checked for bounds and races.
"""

import importlib.util
import itertools
import re

import pytest
import torch
from conftest import COMPILING
from hypothesis import given
from hypothesis import strategies as st
from op_case import converted
from prototype_case import DEVICE, TENSORS, Case, check, gradients, leaves, reference
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vptm_kernels import FoldedHead, fold_head, prototype_cosine, token_gram
from vptm_kernels._runtime.plans import forget_plans
from vptm_kernels.prototype_cosine import api, cosine, plan, torch_impl
from vptm_kernels.testing import assert_close_to_exact

ACTIVATIONS = ["logits", "softmax", "log_softmax"]
HAS_TRITON = importlib.util.find_spec("triton") is not None
IMPLS = ["torch", "triton"] if HAS_TRITON else ["torch"]
# Kernels multiply float64 in the interpreter only.
EXACT_IMPLS = [impl for impl in IMPLS if impl == "torch" or (DEVICE == "cpu" and not COMPILING)]
# Triton differentiates everything but the frozen token head.
TRAINED = {"torch": TENSORS, "triton": tuple(name for name in TENSORS if name != "token_weight")}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the triton package is not installed")
LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def force_plan(monkeypatch):
    """Take one plan whatever the shape, and stream in small tiles so that several are walked."""

    def force(name):
        def room(batch, width, tokens, dim, activation, squares, has_gram, needs, itemsize, keeping):
            return {"keep": batch * tokens, "fold": dim * width, "stream": 0}[name] if any(needs) else 0

        monkeypatch.setattr(api, "size_to_keep", room)
        # Shapes this small are left to autograd otherwise: "keep" would not reach the registered op.
        monkeypatch.setattr(api, "_autograd_keeps", lambda *arguments: False)
        monkeypatch.setattr(torch_impl, "choose_plan", lambda *arguments: name)
        # 37 tokens are two full tiles and a ragged one; 3 rows a full slice and a ragged one.
        monkeypatch.setattr(torch_impl, "_TILE", 16)
        monkeypatch.setattr(torch_impl, "FEW_ROWS", 0)
        monkeypatch.setattr(torch_impl, "_ACTIVATIONS", 2 * 37)
        forget_plans()

    yield force
    forget_plans()


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("head", ["projection", "tokens"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name,impl", [("keep", "torch"), *(("stream", impl) for impl in EXACT_IMPLS)])
def test_keep_and_stream_equal_the_definition(name, impl, activation, head, biases, force_plan):
    """Same function and gradients of all inputs whichever plan the shape selects."""
    force_plan(name)
    # 20 rows and 70 tokens are two blocks of each in the interpreter, the last ones ragged.
    shape = {} if impl == "torch" else {"batch": 20, "width": 21, "tokens": 70, "dim": 18, "classes": 17}
    check(Case(head=head, activation=activation, biases=biases, grads=TRAINED[impl], **shape), impl)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("head", ["projection", "gram"])
def test_fold_equals_the_definition(head, biases, impl, force_plan):
    force_plan("fold")
    frozen = ("hidden", "prototypes")
    check(Case(head=head, biases=biases, grads=TRAINED[impl] if head == "projection" else frozen), impl)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize(
    "head,tasks", [("folded", ()), ("folded", (2, 5, 1)), ("tasks", (3, 3)), ("tasks", (1, 18, 2))]
)
def test_folded_heads_equal_the_definition(head, tasks, impl):
    # Heads of 18 x 21 and 18 classes: two blocks of each, the last ones ragged.
    check(Case(head=head, tasks=tasks, batch=7, width=21, dim=18, grads=TRAINED[impl]), impl)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("head,tasks", [("folded", ()), ("projection", ()), ("tasks", (2, 3)), ("gram", ())])
def test_unit_prototypes_change_nothing_but_the_work(head, tasks, impl):
    """Scores and the gradient of hidden are those of the prototypes before they were normalised."""
    call = Case(head=head, tasks=tasks, grads=("hidden",)).inputs()
    unit = {**call, "prototypes": F.normalize(call["prototypes"], dim=-1), "unit_prototypes": True, "impl": impl}
    with torch.no_grad():
        torch.testing.assert_close(prototype_cosine(**unit), prototype_cosine(**call, impl="torch"))
    found, want = (prototype_cosine(**arguments) for arguments in (unit, {**call, "impl": "torch"}))
    finite = want.isfinite()
    grads = [torch.autograd.grad(scores[finite].square().sum(), call["hidden"])[0] for scores in (found, want)]
    torch.testing.assert_close(*grads)


def test_unit_prototypes_that_learn_are_refused():
    call = Case(head="folded", grads=("prototypes",)).inputs()
    with pytest.raises(ValueError, match="unit_prototypes must be False where prototypes ask for a gradient"):
        prototype_cosine(**call, unit_prototypes=True)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("head", ["projection", "tokens"])
def test_tasks_equal_the_definition(head, activation, impl):
    check(Case(head=head, tasks=(2, 5, 1), batch=7, activation=activation, grads=TRAINED[impl]), impl)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("head", ["tasks", "folded", "tokens"])
def test_ranges_of_a_pool_equal_offsets(head, impl):
    """The same scores and gradients where prototypes stand anywhere in a pool; NaN between them reaches nobody, where
    the pool is not scored as a whole."""
    call = Case(head=head, tasks=(2, 5, 1), batch=7, grads=("hidden", "prototypes")).inputs()
    offsets, ids, prototypes = call.pop("class_offsets"), call.pop("task_ids"), call.pop("prototypes")
    gap = prototypes.new_full((3, prototypes.shape[1]), 1.0 if head == "tokens" else float("nan"))
    pool = torch.cat([gap, prototypes[2:], gap, prototypes[:2]])
    ranges = [{0: (12, 2), 1: (3, 5), 2: (8, 1)}[task] for task in ids.tolist()]
    heads = {"task_ids": ids} if head == "tasks" else {}
    found = prototype_cosine(**call, **heads, prototypes=pool, class_ranges=ranges, impl=impl)
    want = prototype_cosine(**call, prototypes=prototypes, class_offsets=offsets, task_ids=ids, impl=impl)
    torch.testing.assert_close(found, want[:, : found.shape[1]], rtol=0, atol=1e-12)
    of = [call["hidden"], prototypes]
    grads = [torch.autograd.grad(out[out.isfinite()].square().sum(), of) for out in (found, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)


# One image, class, token or dimension; more images or tokens than a tile; none at all.
SHAPES = [
    {"batch": 1, "classes": 1},
    {"dim": 1, "tokens": 1, "width": 1},
    {"batch": 600, "tokens": 9},
    {"tokens": 1100, "dim": 3},
    {"batch": 0},
    {"width": 40, "tokens": 7, "head": "gram", "grads": ("hidden", "prototypes")},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shapes(shape, activation):
    if activation != "logits" and shape.get("head") == "gram":
        shape = {**shape, "head": "tokens"}
    check(Case(activation=activation, **shape))


# One below, at and above a block, a single one of everything, and no image.
@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="float64 runs in the interpreter only")
@pytest.mark.parametrize(
    "batch,width,tokens,dim,classes",
    [
        (15, 16, 31, 16, 1),
        (16, 17, 32, 15, 16),
        (17, 15, 33, 17, 15),
        (1, 1, 1, 1, 1),
        (1, 33, 200, 4, 3),
        (0, 8, 9, 3, 2),
    ],
)
def test_shapes_in_triton(batch, width, tokens, dim, classes, force_plan):
    force_plan("stream")
    shape = {"batch": batch, "width": width, "tokens": tokens, "dim": dim, "classes": classes}
    check(Case(activation="softmax", grads=TRAINED["triton"], **shape), "triton")
    check(Case(activation="log_softmax", head="tokens", grads=TRAINED["triton"], **shape), "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("head", ["projection", "tokens", "folded", "tasks"])
def test_an_empty_batch_of_tasks(head, impl):
    out = prototype_cosine(
        **Case(batch=0, head=head, tasks=(2, 5), grads=TRAINED[impl], dtype=torch.float32).inputs(), impl=impl
    )
    assert out.shape == (0, 5)


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("layout", ["sliced", "expanded"])
@pytest.mark.parametrize("activation", ["logits", "softmax"])
def test_strides(layout, activation, impl):
    check(Case(layout=layout, activation=activation, grads=("projection", "prototypes")), impl)


# 128 images fold, 30 keep; 37 tokens of 24 channels are no multiple of anything.
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("head,batch", [("projection", 30), ("projection", 128), ("tokens", 30)])
def test_low_precision_stays_within_the_error_of_eager(head, batch, activation, dtype):
    check(Case(batch=batch, width=24, dim=8, head=head, activation=activation, dtype=dtype))


# only logits fold
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("name", "activation"), [*itertools.product(["keep", "stream"], ACTIVATIONS), ("fold", "logits")]
)
def test_every_plan_in_low_precision(name, activation, dtype, force_plan):
    force_plan(name)
    check(Case(batch=20, width=24, dim=8, activation=activation, dtype=dtype))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("head", ["projection", "tokens"])
def test_triton_in_low_precision(head, activation, dtype, force_plan):
    force_plan("stream")
    case = Case(batch=20, width=24, dim=8, head=head, activation=activation, dtype=dtype, grads=TRAINED["triton"])
    check(case, "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", LOW)
def test_folded_heads_in_low_precision(dtype, impl):
    check(Case(batch=20, width=24, dim=8, head="folded", dtype=dtype), impl)
    case = Case(batch=20, width=24, dim=8, head="tasks", tasks=(3, 6), dtype=dtype)
    check(case.but(grads=TRAINED[impl]), impl)


@pytest.mark.parametrize("name,impl", [("keep", "torch"), *(("stream", impl) for impl in EXACT_IMPLS)])
@pytest.mark.parametrize("head", ["projection", "tokens"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_logits_of_ten_thousand(name, impl, head, activation, force_plan):
    """A softmax that does not subtract its maximum overflows; a sum that is not relative to it cancels."""
    force_plan(name)
    case = Case(scale=1e4, tokens=70, head=head, activation=activation, grads=TRAINED[impl])
    check(case, impl, growth=1e4)


@pytest.mark.parametrize("name,impl", [("keep", "torch"), *(("stream", impl) for impl in IMPLS)])
@pytest.mark.parametrize("head", ["projection", "tokens"])
def test_log_softmax_of_a_common_offset_keeps_its_digits(name, impl, head, force_plan):
    """Logits near 1e4 with a spread of 1: sums of the logits themselves would leave 4 digits in float32."""
    force_plan(name)
    call = Case(batch=5, activation="log_softmax", head=head, dtype=torch.float32, grads=()).inputs()
    call["token_bias"] = call["token_bias"] + 1e4
    exact, eager = reference(converted(call, torch.float64)), reference(call)
    assert_close_to_exact(name, prototype_cosine(**call, impl=impl), exact, eager)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("head", ["projection", "tokens", "gram", "folded"])
def test_zero_hidden_state_and_zero_prototype(head, dtype, impl):
    """A zero vector has cosine 0 to everything, not 0 / 0, and no gradient is NaN."""
    if impl not in EXACT_IMPLS and dtype == torch.float64:
        pytest.skip("float64 runs in the interpreter only")
    grads = ("hidden", "prototypes", "projection")
    call = Case(biases=False, head=head, dtype=dtype, grads=grads).inputs()
    with torch.no_grad():
        call["hidden"][1] = 0
        call["prototypes"][2] = 0
        if head == "folded":
            call["token_weight"].bias.zero_()
    out = prototype_cosine(**call, impl=impl)
    assert bool(out.isfinite().all())
    assert not out[1].any() and not out[:, 2].any() and bool(out[0, 0] != 0)
    for name, gradient in gradients(out, call).items():
        assert not gradient.isnan().any(), name


def test_zero_vectors_have_the_gradient_of_the_definition():
    call = Case(biases=False, grads=("hidden", "prototypes", "projection")).inputs()
    with torch.no_grad():
        call["hidden"][1] = 0
        call["prototypes"][2] = 0
    wanted = gradients(reference(call), call)
    for name, gradient in gradients(prototype_cosine(**call), call).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=0, msg=name)


def test_duplicate_prototypes_score_the_same():
    call = Case().inputs()
    with torch.no_grad():
        call["prototypes"][3] = 2 * call["prototypes"][0]
    out = prototype_cosine(**call)
    torch.testing.assert_close(out[:, 3], out[:, 0], rtol=1e-12, atol=0)


def test_larger_eps_is_the_bound_of_both_norms():
    call = Case().inputs()
    for eps in (1e-3, 2.0, 1e3):
        assert_close_to_exact("eps", prototype_cosine(**call, eps=eps), reference({**call, "eps": eps}))
        assert_close_to_exact(
            "eps, token space",
            prototype_cosine(**(tokens := Case(head="tokens").inputs()), eps=eps),
            reference({**tokens, "eps": eps}),
        )


@pytest.mark.parametrize("impl", EXACT_IMPLS)
# heads without token logits have no other activation
@pytest.mark.parametrize(
    ("head", "activation"),
    [
        *itertools.product(["projection", "tokens"], ACTIVATIONS),
        *itertools.product(["gram", "folded", "tasks"], ["logits"]),
    ],
)
def test_gradcheck_of_every_input(head, activation, impl, force_plan):
    """Numerical differentiation knows nothing of the formulas that backward is written from."""
    if impl == "triton":
        force_plan("fold" if head == "gram" else "stream")
    tasks = (2, 3) if head == "tasks" else ()
    grads = ("hidden", "prototypes") if head == "gram" else TRAINED[impl]
    call = Case(width=4, tokens=6, dim=3, head=head, activation=activation, tasks=tasks, grads=grads).inputs()
    names = list(leaves(call))

    def run(*values):
        changed = dict(call)
        for name, value in zip(names, values):
            if name.startswith("head "):
                changed["token_weight"] = changed["token_weight"]._replace(**{name[5:]: value})
            else:
                changed[name] = value
        out = prototype_cosine(**changed, impl=impl)
        return out[out.isfinite()]

    assert torch.autograd.gradcheck(run, tuple(leaves(call).values()), fast_mode=impl == "triton")


@pytest.mark.parametrize("impl", EXACT_IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("head", ["projection", "tokens"])
def test_only_what_asks_gets_a_gradient(head, activation, impl):
    """Every subset of asking inputs gives the gradients of the whole, and None for the rest."""
    whole = Case(head=head, activation=activation, grads=("hidden", "token_bias", "prototypes", "projection"))
    call = whole.inputs()
    wanted = gradients(prototype_cosine(**call, impl=impl), call)
    for size in (1, 2):
        for asking in itertools.combinations(wanted, size):
            call = whole.but(grads=asking).inputs()
            found = gradients(prototype_cosine(**call, impl=impl), call)
            assert set(found) == set(asking)
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_bitwise_repeatable(impl):
    for head, activation in itertools.product(("projection", "tokens"), ACTIVATIONS):
        case = Case(batch=40, head=head, activation=activation, dtype=torch.float32, grads=TRAINED[impl])
        call = case.inputs()
        first = gradients(prototype_cosine(**call, impl=impl), call)
        for name, gradient in gradients(prototype_cosine(**call, impl=impl), call).items():
            assert torch.equal(gradient, first[name]), name


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def largest_tensor(impl, activation, head):
    """Of forward and backward of the op, which would be hidden below the registered op, so its inside is called."""
    batch, tokens, dim = 33, 400, 5
    case = Case(batch=batch, tokens=tokens, dim=dim, classes=dim, head=head, activation=activation, dtype=torch.float32)
    call = case.but(grads=()).inputs()
    module = torch_impl if impl == "torch" else importlib.import_module("vptm_kernels.prototype_cosine.triton_impl")
    squares, needs = head == "tokens", [True, False, True, True]
    inputs = (
        call["hidden"],
        call["token_weight"],
        call["token_bias"],
        call.get("projection", call["prototypes"]),
        None,
    )
    room = plan.size_to_keep(batch, 10, tokens, dim, activation, squares, False, needs, 4, impl == "torch")
    with LargestTensor() as largest:
        outputs = module.forward(*inputs, activation, squares, needs, room)
        grad_squared = torch.ones(batch, device=DEVICE) if squares else None
        module.backward(torch.ones_like(outputs[0]), grad_squared, *inputs, *outputs, activation, squares, needs)
    return largest.bytes, batch * tokens * 4


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("head", ["projection", "tokens"])
def test_triton_never_holds_a_tensor_as_large_as_the_logits(head, activation, force_plan):
    """Streaming is the point of the kernel: a (B, V) buffer anywhere, forward or backward, would make it pointless."""
    force_plan("stream")
    largest, logits = largest_tensor("triton", activation, head)
    # The (V, C) head, which the interpreter copies, is 0.3 of the logits here.
    assert largest < logits // 3


def test_the_largest_tensor_is_found(force_plan):
    """The test above can fail: the PyTorch path does keep the logits of so small a batch."""
    force_plan("keep")
    largest, logits = largest_tensor("torch", "softmax", "projection")
    assert largest == logits


@needs_triton
def test_triton_refuses_a_trained_token_head():
    call = Case(dtype=torch.float32).inputs()
    with pytest.raises(ValueError, match="impl='triton' needs a frozen token_weight, got one with requires_grad=True"):
        prototype_cosine(**call, impl="triton")


def test_fold_head_gives_the_cosines_of_its_parts():
    call = Case(grads=()).inputs()
    head = fold_head(call["token_weight"], call["token_bias"], call["projection"], call["projection_bias"])
    assert head.weight.shape == (5, 10) and head.bias.shape == (5,)
    assert_close_to_exact("folded", prototype_cosine(call["hidden"], head, None, call["prototypes"]), reference(call))


@pytest.mark.parametrize("activation", ["softmax", "log_softmax"])
def test_folding_would_be_wrong_after_an_activation(activation):
    """Why no plan folds here: reader @ softmax(W h) is not softmax of anything linear, the cosines differ visibly."""
    call = Case(grads=(), activation=activation).inputs()
    head = fold_head(call["token_weight"], call["token_bias"], call["projection"], call["projection_bias"])
    folded = prototype_cosine(call["hidden"], head, None, call["prototypes"])
    assert (folded - reference(call)).abs().max() > 0.1
    assert not plan.can_fold(activation, False, False, [True] * 4)
    for batch in (1, 100, 10000):
        shape = (batch, 768, 8192, 128)
        assert plan.choose_plan(*shape, activation, False, False, [True, False, False, True], 1 << 40, True) != "fold"


def test_top_1_of_a_folded_head_needs_no_norm_of_the_embedding():
    call = Case(batch=200, classes=9, grads=()).inputs()
    head = fold_head(call["token_weight"], call["token_bias"], call["projection"], call["projection_bias"])
    classes = F.normalize(call["prototypes"])
    top = (call["hidden"] @ (classes @ head.weight).T + classes @ head.bias).argmax(1)
    assert torch.equal(top, reference(call).argmax(1))


def test_training_steps_on_the_projection_are_the_same_folded_and_not(force_plan):
    """A step on a free folded weight moves elsewhere; folding per step must keep the projection's own trajectory."""
    ends = {}
    for name in ("keep", "fold"):
        force_plan(name)
        call = Case(grads=("projection", "prototypes")).inputs()
        optimizer = torch.optim.SGD([call["projection"], call["prototypes"]], lr=0.5, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(prototype_cosine(**call) / 0.1, torch.tensor([0, 1, 2], device=DEVICE)).backward()
            optimizer.step()
        ends[name] = call["projection"].detach()
    torch.testing.assert_close(ends["fold"], ends["keep"], rtol=1e-10, atol=1e-12)
    assert (ends["fold"] - Case().inputs()["projection"]).abs().max() > 1e-2
    # the step not to take: the folded product as the parameter, from the same start at the same rate
    call = Case(grads=("prototypes",)).inputs()
    tokens, bias = call["token_weight"], call["token_bias"]
    free = (call["projection"] @ tokens).detach().requires_grad_()
    constant = (call["projection"] @ bias + call["projection_bias"]).detach().requires_grad_(False)
    optimizer = torch.optim.SGD([free, call["prototypes"]], lr=0.5, momentum=0.9)

    def scores():
        return F.cosine_similarity((call["hidden"] @ free.mT + constant)[:, None], call["prototypes"], dim=-1)

    torch.testing.assert_close(scores(), prototype_cosine(**call))
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(scores() / 0.1, torch.tensor([0, 1, 2], device=DEVICE)).backward()
        optimizer.step()
    assert (free - ends["keep"] @ tokens).abs().max() > 1e-2


def test_the_bias_of_a_fold_is_summed_in_pairs():
    """8192 products summed in a row lose more, the same for every image: gradients of a batch add that up, and the
    fold is then seven times as far off as eager."""
    generator = torch.Generator().manual_seed(0)
    reader, bias = torch.randn(37, 8192, generator=generator), torch.randn(8192, generator=generator)
    exact = reader.double() @ bias.double()
    error = (torch_impl._through_reader(bias, reader).double() - exact).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_the_documented_break_even_points():
    """C = 768, V = 8192, d = 128, gradients for hidden and projection: the figures of the docstring."""

    def chosen(batch, keeping, training=True):
        needs = [training, False, False, training]
        return plan.choose_plan(batch, 768, 8192, 128, "logits", False, False, needs, 1 << 40, keeping)

    def first_fold(keeping, training=True):
        return next(batch for batch in range(1, 1000) if chosen(batch, keeping, training) == "fold")

    assert first_fold(keeping=True) == 105
    assert first_fold(keeping=True, training=False) == 112
    assert chosen(64, True) == "keep"
    # whatever the batch: a small last one must not need kernels that no other did
    assert first_fold(keeping=False) == first_fold(keeping=False, training=False) == 1


def test_logits_above_16_megabytes_are_not_kept():
    arguments = (768, 8192, 128, "softmax", False, False, [True, False, False, True], 4, True)
    assert plan.size_to_keep(512, *arguments) == 512 * 8192
    assert plan.size_to_keep(513, *arguments) == 0


@pytest.mark.parametrize("biases", [True, False])
def test_token_gram_is_the_norm_of_the_logits(biases):
    call = Case(biases=biases, grads=()).inputs()
    factor = token_gram(call["token_weight"], call["token_bias"])
    augmented = torch.cat([call["hidden"], call["hidden"].new_ones(3, 1)], 1)
    wanted = F.linear(call["hidden"], call["token_weight"], call["token_bias"]).norm(dim=1)
    torch.testing.assert_close((augmented @ factor.T).norm(dim=1), wanted, rtol=1e-13, atol=0)


def test_token_gram_survives_cancellation(force_plan):
    """Logits 1e-3 of |W| |h|: from the Gram matrix itself float32 has no digit of a squared norm 1e-6 of its terms."""
    force_plan("fold")
    case = Case(batch=8, width=24, tokens=200, head="gram", dtype=torch.float32, grads=())
    call = case.inputs()
    hidden = call["hidden"][:1].expand(8, -1)
    call["hidden"] = (hidden + 1e-3 * call["hidden"]).contiguous()
    call["token_bias"] = -F.linear(hidden[0].double(), call["token_weight"].double()).float()
    call["token_gram"] = token_gram(call["token_weight"], call["token_bias"])
    call.pop("class_offsets", None)
    exact, eager = reference(converted(call, torch.float64)), reference(call)
    found = prototype_cosine(**call)
    assert_close_to_exact("factor", found, exact, eager, factor=3)

    weight = torch.cat([call["token_weight"], call["token_bias"][:, None]], 1)
    augmented = torch.cat([call["hidden"], torch.ones(8, 1, device=DEVICE)], 1)
    wanted = F.linear(call["hidden"].double(), call["token_weight"].double(), call["token_bias"].double()).norm(dim=1)
    from_matrix = (augmented @ (weight.T @ weight) * augmented).sum(1).clamp_min(0).sqrt()
    from_factor = (augmented @ call["token_gram"].T).norm(dim=1)
    assert ((from_factor - wanted) / wanted).abs().max() < 1e-3
    assert ((from_matrix - wanted) / wanted).abs().max() > 1e-2, "the guard is not needed: this input does not cancel"


@given(data=st.data())
def test_any_shape_and_subset_of_gradients(data):
    """Random shapes, heads, activations and asking inputs against the definition."""
    head = data.draw(st.sampled_from(["projection", "tokens", "gram", "folded", "tasks"]))
    activation = data.draw(st.sampled_from(ACTIVATIONS)) if head in ("projection", "tokens") else "logits"
    tasks = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1 if head == "tasks" else 0, max_size=3)))
    size = st.integers(1, 20)
    frozen = ("hidden", "prototypes")
    case = Case(
        batch=data.draw(st.integers(1 if tasks else 0, 9)),
        width=data.draw(size),
        tokens=data.draw(size),
        dim=data.draw(size),
        classes=data.draw(size),
        head=head,
        activation=activation,
        biases=data.draw(st.booleans()),
        tasks=tasks,
        grads=frozen if head == "gram" else tuple(data.draw(st.lists(st.sampled_from(TENSORS), unique=True))),
        seed=data.draw(st.integers(0, 1000)),
    )
    # With one token or dimension the cosine is the sign of a number that may be tiny: its gradient is pure rounding.
    check(case, growth=100)
    if "triton" in EXACT_IMPLS:
        check(case.but(grads=tuple(name for name in case.grads if name != "token_weight")), "triton", growth=100)


def test_permuting_the_batch_permutes_the_scores():
    call = Case(batch=9, tasks=(2, 3), activation="softmax").inputs()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    permuted = {**call, "hidden": call["hidden"][order], "task_ids": call["task_ids"][order]}
    torch.testing.assert_close(prototype_cosine(**permuted), prototype_cosine(**call)[order], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("unit", [False, True])
def test_ids_of_tasks_are_read_once(monkeypatch: pytest.MonkeyPatch, unit: bool) -> None:
    """Also where the rows of a task are apart: on a GPU every reading waits for all that was launched."""
    ids, offsets = torch.tensor([1, 0, 0, 1, 2, 1]), [0, 2, 5, 6]
    rows, weight, bias, prototypes = torch.randn(6, 4), torch.randn(3, 5, 4), torch.randn(3, 5), torch.randn(6, 4)
    if unit:
        prototypes = torch.nn.functional.normalize(prototypes)
    reads: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(self) or tolist(self))
    out = torch.empty(6, 5)
    cosine.task_linear(rows, weight, bias, ids, out)
    scores = cosine.task_cosine(rows, prototypes, ids, offsets, 3, 1e-8, unit)
    monkeypatch.undo()
    assert len(reads) == 2
    for row, task in enumerate(ids.tolist()):
        torch.testing.assert_close(out[row], weight[task] @ rows[row] + bias[task])
        want = torch.cosine_similarity(rows[row], prototypes[offsets[task] : offsets[task + 1]], dim=1)
        torch.testing.assert_close(scores[row, : len(want)], want)
        assert scores[row, len(want) :].isneginf().all()


BAD = [
    ({"hidden": torch.zeros(3, 10)}, "dtype of hidden, torch.float32, got torch.float64"),
    ({"hidden": torch.zeros(10, dtype=torch.float64)}, "hidden must be (B, C) with C >= 1, got (10,)"),
    ({"hidden": torch.zeros(3, 10, dtype=torch.long)}, "hidden must be float16, bfloat16, float32 or float64"),
    ({"hidden": torch.zeros(3, 9, dtype=torch.float64)}, "token_weight must be (rows, C) = (any, 9), got (37, 10)"),
    ({"token_bias": torch.zeros(36, dtype=torch.float64)}, "token_bias must be (rows,) = (37,), got (36,)"),
    ({"prototypes": torch.zeros(4, 6, dtype=torch.float64)}, "prototypes must be (K, d) = (any, 5), got (4, 6)"),
    ({"prototypes": torch.zeros(0, 5, dtype=torch.float64)}, "prototypes must have at least one row"),
    ({"prototypes": [1, 2]}, "prototypes must be a tensor (K, d), got list"),
    ({"projection": torch.zeros(5, 36, dtype=torch.float64)}, "projection must be (d, V) = (any, 37), got (5, 36)"),
    ({"projection_bias": torch.zeros(4, dtype=torch.float64)}, "projection_bias must be (d,) = (5,), got (4,)"),
    ({"projection": None}, "projection_bias must be None without a projection"),
    ({"activation": "gelu"}, "activation must be one of logits, softmax, log_softmax, got 'gelu'"),
    ({"eps": 0}, "eps must be > 0, got 0"),
    ({"impl": "cuda"}, "impl must be one of ('auto', 'triton', 'torch'), got 'cuda'"),
    ({"task_ids": torch.zeros(3, dtype=torch.long)}, "class_offsets must be given when task_ids is"),
    ({"class_offsets": [0, 4]}, "task_ids must be given when class_offsets is"),
    (
        {"class_offsets": [0, 3], "task_ids": torch.zeros(3, dtype=torch.long)},
        "to the 4 rows of prototypes, got [0, 3]",
    ),
    ({"class_offsets": [0, 0, 4], "task_ids": torch.zeros(3, dtype=torch.long)}, "class_offsets must ascend"),
    ({"class_offsets": [0, 4], "task_ids": torch.zeros(2, dtype=torch.long)}, "task_ids must be (B,) = (3,), got (2,)"),
    ({"class_offsets": [0, 4], "task_ids": torch.zeros(3)}, "task_ids must be an int32 or int64 tensor"),
    ({"class_offsets": [0, 4], "task_ids": torch.tensor([0, 0, 1])}, "lie in 0 .. 0, got 1 for image 2"),
    ({"class_offsets": [0, 4], "task_ids": torch.tensor([0, -1, 0])}, "lie in 0 .. 0, got -1 for image 1"),
    ({"token_gram": torch.zeros(11, 11)}, "token_gram must be None with a projection"),
    ({"token_weight": FoldedHead(torch.zeros(5, 10), torch.zeros(5))}, "token_bias must be None with a FoldedHead"),
    ({"projection": torch.zeros(37, 5, dtype=torch.float64).mT}, "projection must have a unit last stride"),
    ({"class_offsets": 4, "task_ids": torch.zeros(3).long()}, "class_offsets must be a sequence of ints, got int"),
    ({"class_ranges": [(0, 1)]}, "class_ranges must be B = 3 pairs of ints, got 1"),
    ({"class_ranges": [(0, 1), (3, 2), (0, 1)]}, "inside the pool of 4 prototypes and hold at least one, got start 3"),
    ({"class_ranges": [(0, 0)] * 3}, "count 0 for image 0"),
    ({"class_ranges": [(0, 1)] * 3, "class_offsets": [0, 4]}, "class_offsets must be None with class_ranges"),
]


@pytest.mark.parametrize("change,message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_in_one_line(change, message):
    call = Case(grads=()).inputs()
    change = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as error:
        prototype_cosine(**{**call, **change})
    assert "\n" not in str(error.value)


def test_an_activation_of_a_folded_head_is_refused():
    call = Case(head="folded", activation="log_softmax").inputs()
    with pytest.raises(ValueError, match="activation must be 'logits' with a FoldedHead"):
        prototype_cosine(**call)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden": torch.zeros(10)}, "hidden must be (B, C) with C >= 1, got (10,)"),
        ({"hidden": torch.zeros(1, 3, 10)}, "hidden must be (B, C) with C >= 1, got (1, 3, 10)"),
        ({"hidden": torch.zeros(3, 10, dtype=torch.int64)}, "hidden must be float16, bfloat16, float32 or float64"),
        ({"hidden": torch.zeros(3, 9)}, "token_weight.weight must be (rows, C) = (any, 9), got (5, 10)"),
        ({"hidden": [1.0]}, "hidden must be a tensor (B, C), got list"),
        ({"bias": torch.zeros(1)}, "token_weight.bias must be (rows,) = (5,), got (1,)"),
        ({"bias": torch.zeros(3, 5)}, "token_weight.bias must be (rows,) = (5,), got (3, 5)"),
        ({"bias": torch.zeros(5).double()}, "token_weight.bias must have the dtype of hidden"),
        ({"weight": torch.zeros(2, 5, 10)}, "token_weight.weight must be (rows, C) = (any, 10), got (2, 5, 10)"),
        ({"weight": torch.zeros(10)}, "token_weight.weight must be (rows, C) = (any, 10), got (10,)"),
        ({"prototypes": torch.zeros(5)}, "prototypes must be (K, d) = (any, 5), got (5,)"),
        ({"prototypes": torch.zeros(1, 4, 5)}, "prototypes must be (K, d) = (any, 5), got (1, 4, 5)"),
        ({"prototypes": torch.zeros(0, 5)}, "prototypes must have at least one row, got (0, 5)"),
        ({"prototypes": torch.zeros(4, 1)}, "prototypes must be (K, d) = (any, 5), got (4, 1)"),
        ({"prototypes": torch.zeros(4, 5).double()}, "prototypes must have the dtype of hidden"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"eps": float("nan")}, "eps must be > 0, got nan"),
        ({"eps": "x"}, "eps must be a number > 0, got 'x'"),
        ({"impl": "fast"}, "impl must be one of ('auto', 'triton', 'torch'), got 'fast'"),
    ],
    ids=str,
)
def test_bad_input_of_a_folded_head(change, message):
    """What PyTorch would broadcast is refused too: this call computes before it checks."""
    call = Case(head="folded", dtype=torch.float32, grads=()).inputs()
    change = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    weight, bias = call["token_weight"]
    call["token_weight"] = FoldedHead(change.pop("weight", weight), change.pop("bias", bias))
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=re.escape(message)) as error:
        prototype_cosine(**{**call, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("eps", [1e-12, 1e-23, 1e-35])
@pytest.mark.parametrize("activation", ["logits", "log_softmax"])
def test_a_zero_vector_in_token_space_has_cosine_zero(activation, eps):
    """The square of a small eps is zero in float32: the norm would be zero, and the cosine and its gradient NaN."""
    call = Case(head="tokens", activation=activation, dtype=torch.float32, grads=("hidden",), batch=4).inputs()
    zero = torch.zeros_like(call["prototypes"])
    zero[1:] = call["prototypes"][1:]
    call |= {"prototypes": zero, "eps": eps}
    if activation == "logits":
        call["token_bias"] = None
        call["hidden"] = (call["hidden"].detach() * torch.arange(4, device=DEVICE)[:, None]).requires_grad_()
    scores = prototype_cosine(**call)
    (gradient,) = torch.autograd.grad(scores.sum(), call["hidden"])
    assert bool(scores.isfinite().all()) and bool((scores[:, 0] == 0).all())
    assert activation != "logits" or bool((scores[0] == 0).all())
    assert bool(gradient[1:].isfinite().all())


@pytest.mark.parametrize("eps", [1e-12, 1e-35, 1e-300])
def test_a_zero_vector_of_a_folded_head_has_cosine_zero(eps):
    """Whatever eps is: where its reciprocal overflows float32 a product with it would be NaN."""
    call = Case(head="folded", dtype=torch.float32, grads=(), batch=4).inputs()
    weight, bias = call["token_weight"]
    call["token_weight"] = FoldedHead(weight, torch.zeros_like(bias))
    call["hidden"][1] = 0
    call["prototypes"][2] = 0
    with torch.no_grad():
        scores = prototype_cosine(**call, eps=eps)
    assert scores.isfinite().all() and not scores[1].any() and not scores[:, 2].any() and scores[0, 0] != 0


def test_a_wrong_gram_factor_is_refused():
    call = Case(head="gram").inputs()
    with pytest.raises(ValueError, match=re.escape("token_gram must be (min(V, C + 1), C + 1) = (11, 11)")):
        prototype_cosine(**{**call, "token_gram": call["token_gram"][:, :-1]})


@pytest.mark.parametrize(
    "change,message",
    [
        ({"projection": torch.zeros(5, 36)}, "projection must be (d, V) with V = 37, got (5, 36)"),
        ({"token_bias": torch.zeros(36)}, "token_bias must be (V,) with V = 37, got (36,)"),
        ({"projection_bias": torch.zeros(4)}, "projection_bias must be (d,) with d = 5, got (4,)"),
        ({"projection": torch.zeros(5)}, "projection must be (d, V) in the dtype of token_weight"),
        ({"projection": torch.zeros(5, 37, dtype=torch.float64)}, "projection must be (d, V) in the dtype of"),
        ({"token_weight": None}, "token_weight must be a tensor (V, C), got NoneType"),
    ],
    ids=str,
)
def test_bad_input_of_fold_head(change, message):
    parts = {"token_weight": torch.zeros(37, 10), "token_bias": torch.zeros(37), "projection": torch.zeros(5, 37)}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        fold_head(**{**parts, **change})
