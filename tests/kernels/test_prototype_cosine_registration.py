"""prototype_cosine as registered ops: opcheck, compile, export, autocast, fakes, what is kept for backward."""

import importlib.util

import pytest
import torch
from prototype_case import DEVICE, Case, gradients, leaves
from torch._subclasses.fake_tensor import FakeTensorMode

from vptm_kernels import FoldedHead, prototype_cosine
from vptm_kernels.prototype_cosine import plan
from vptm_kernels.prototype_cosine.ops import (
    prototype_similarity_backward_op,
    prototype_similarity_op,
    task_linear_backward_op,
    task_linear_op,
    token_readout_backward_op,
    token_readout_op,
)

IMPLS = ["torch", "triton"] if importlib.util.find_spec("triton") is not None else ["torch"]
FROZEN_HEAD = ("hidden", "prototypes", "projection", "projection_bias")
FLOAT = Case(width=8, dtype=torch.float32, grads=FROZEN_HEAD)
# Every op and every branch of the public function.
KINDS = [
    FLOAT,
    FLOAT.but(activation="softmax"),
    FLOAT.but(head="tokens", activation="log_softmax"),
    FLOAT.but(head="gram"),
    FLOAT.but(head="folded"),
    FLOAT.but(head="tasks", tasks=(2, 5)),
    FLOAT.but(head="tokens", tasks=(2, 5)),
]


def name_of(case):
    return f"{case.head}-{case.activation}-{len(case.tasks)}"


def detached(arguments):
    return [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", [[True, False, False, True], [False] * 4], ids=["training", "inference"])
@pytest.mark.parametrize("case", [FLOAT, FLOAT.but(activation="softmax"), FLOAT.but(head="gram")], ids=name_of)
def test_opcheck_token_readout(case, needs, impl):
    """Schema, autograd registration, fakes with the real strides, and AOT dispatch with dynamic shapes."""
    call = case.but(grads=FROZEN_HEAD if needs[0] else ()).inputs()
    reader, gram = call.get("projection", call["prototypes"]), call.get("token_gram")
    squares = case.head != "projection"
    inputs = (call["hidden"], call["token_weight"], call["token_bias"], reader, gram)
    room = plan.size_to_keep(
        3, 8, 37, len(reader), case.activation, squares, gram is not None, needs, 4, impl == "torch"
    )
    options = (case.activation, squares, needs)
    torch.library.opcheck(token_readout_op, (*inputs, *options, room, impl))
    if not needs[0]:
        return
    outputs = token_readout_op(*detached(inputs), *options, room, impl)
    grads = (torch.randn_like(outputs[0]), torch.randn_like(outputs[1]) if squares else None)
    backward = (*grads, *detached(inputs), *outputs, *options, impl)
    torch.library.opcheck(token_readout_backward_op, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_task_linear(impl):
    call = FLOAT.but(head="tasks", tasks=(2, 5), grads=("hidden", "token_weight", "token_bias")).inputs()
    inputs = (call["hidden"], *call["token_weight"], call["task_ids"])
    # AOT dispatch runs backward a second time on the ids it made up itself, which no head need have.
    torch.library.opcheck(task_linear_op, (*inputs, impl))
    backward = (torch.randn(3, 5, device=DEVICE), *detached((inputs[0], inputs[1])), inputs[3], [True, True, True])
    torch.library.opcheck(task_linear_backward_op, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tasks", [False, True])
def test_opcheck_prototype_similarity(tasks, impl):
    embedding, prototypes = (torch.randn(n, 5, device=DEVICE, requires_grad=True) for n in (3, 7))
    ids = torch.tensor([1, 0, 1], device=DEVICE) if tasks else None
    offsets, widest = ([0, 2, 7], 5) if tasks else ([0, 7], 7)
    arguments = (embedding, prototypes, ids, offsets, widest, 1e-12, impl)
    torch.library.opcheck(prototype_similarity_op, arguments)
    grad = torch.randn(3, widest, device=DEVICE)
    backward = (grad, *detached((embedding, prototypes)), ids, offsets, 1e-12, [True, True])
    torch.library.opcheck(prototype_similarity_backward_op, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_fullgraph_compile_forward_and_backward(case, backend, impl):
    """Inductor asserts the strides that the fakes promise, so it sees a wrong fake that opcheck misses."""
    torch._dynamo.reset()
    call = case.inputs()
    expected_out = prototype_cosine(**call, impl=impl)
    expected = gradients(expected_out, call)
    compiled = torch.compile(lambda **call: prototype_cosine(**call, impl=impl) * 1, backend=backend, fullgraph=True)
    out = compiled(**call)
    torch.testing.assert_close(out, expected_out)
    for name, gradient in gradients(out, call).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_one_compile_serves_all_batch_sizes(case, impl):
    """The plan changes with the batch size, the graph does not: training keeps, streams or folds in one graph."""
    torch._dynamo.reset()
    compiles = []

    def backend(graph, example_inputs):
        compiles.append(graph)
        return graph.forward

    call = case.inputs()

    def run(hidden, task_ids):
        return prototype_cosine(**{**call, "hidden": hidden, "task_ids": task_ids}, impl=impl)

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    # The first batch size differs from every other dimension: equal sizes would be taken for one.
    for batch in (11, 3, 40, 2):
        hidden = torch.randn(batch, 8, device=DEVICE, requires_grad=True)
        ids = torch.arange(batch, device=DEVICE) % len(case.tasks) if case.tasks else None
        out, expected = compiled(hidden, ids), run(hidden, ids)
        torch.testing.assert_close(out, expected)
        finite = expected.isfinite()
        for a, b in zip(*(torch.autograd.grad(t[finite].sin().sum(), [hidden]) for t in (out, expected))):
            torch.testing.assert_close(a, b)
    assert len(compiles) == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_export_with_a_dynamic_batch(case, impl):
    call = case.but(grads=()).inputs()
    tasks = bool(case.tasks)

    class Module(torch.nn.Module):
        def forward(self, hidden, task_ids):
            return prototype_cosine(**{**call, "hidden": hidden, "task_ids": task_ids}, impl=impl)

    batch = torch.export.Dim("batch", min=1, max=64)
    inputs = (call["hidden"], call.get("task_ids"))
    shapes = ({0: batch}, {0: batch} if tasks else None)
    program = torch.export.export(Module(), inputs, dynamic_shapes=shapes)
    hidden = torch.randn(5, 8, device=DEVICE)
    ids = torch.tensor([1, 0, 0, 1, 1], device=DEVICE) if tasks else None
    torch.testing.assert_close(program.module()(hidden, ids), Module()(hidden, ids))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_autocast_casts_the_inputs_and_not_the_sums(case, impl):
    """bfloat16 scores and float32 gradients; cosines of a 16-bit sum would be off by 1e-2 and more."""
    call = case.inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = prototype_cosine(**call, impl=impl)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), prototype_cosine(**call, impl=impl), rtol=0, atol=0.03)
    for name, gradient in gradients(out, call).items():
        assert gradient.dtype == torch.float32 and bool(gradient.isfinite().all()), name


def test_fakes_and_meta_tensors_need_no_device():
    with FakeTensorMode():
        t = {name: torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for name, shape in
             {"h": (2, 8), "w": (37, 8), "c": (4, 5), "p": (5, 37)}.items()}  # fmt: skip
        out = prototype_cosine(t["h"], t["w"], None, t["c"], projection=t["p"], activation="softmax")
        assert out.device.type == "cuda" and out.shape == (2, 4) and out.dtype == torch.bfloat16
    head = FoldedHead(torch.empty(5, 8, device="meta"), torch.empty(5, device="meta"))
    assert prototype_cosine(torch.empty(2, 8, device="meta"), head, None, torch.empty(4, 5, device="meta")).shape == (
        2,
        4,
    )


# 400 images of 64 tokens and a reader of 5 rows of 8 channels: folding is cheapest, then keeping the logits.
@pytest.mark.parametrize("activation,elements", [("logits", 5 * 8), ("softmax", 400 * 64)])
def test_backward_keeps_the_cheaper_of_logits_and_fold(activation, elements):
    """Between forward and backward only inputs, (B, d) sums and what the plan says may be held."""
    call = FLOAT.but(batch=400, tokens=64, activation=activation).inputs()
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prototype_cosine(**call)
    inputs = {t.untyped_storage().data_ptr() for t in call.values() if isinstance(t, torch.Tensor)}
    held = {t.untyped_storage().data_ptr(): t.numel() for t in saved if t.untyped_storage().data_ptr() not in inputs}
    small = 400 * 5
    assert elements in held.values()
    assert max(held.values()) == max(elements, small)
    assert sum(size > small for size in held.values()) == (activation == "softmax")


@pytest.mark.parametrize("impl", IMPLS)
def test_activation_checkpointing(impl):
    call = FLOAT.but(activation="softmax").inputs()
    names = list(leaves(call))
    expected = gradients(prototype_cosine(**call, impl=impl), call)

    def run(*tensors):
        return prototype_cosine(**{**call, **dict(zip(names, tensors))}, impl=impl)

    out = torch.utils.checkpoint.checkpoint(run, *leaves(call).values(), use_reentrant=False)
    for name, gradient in gradients(out, call).items():
        assert torch.equal(gradient, expected[name]), name


def test_double_backward_is_refused():
    """400 images fold: what the op computes must not be taken for differentiable a second time."""
    call = FLOAT.but(batch=400, tokens=64).inputs()
    (grad,) = torch.autograd.grad(prototype_cosine(**call).sin().sum(), [call["hidden"]], create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        grad.sum().backward()
