"""prompted_attention as a registered op: opcheck, compile, export, autocast, fakes, saved memory, a light import."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vptm_kernels import RelativePositionBias, prompted_attention
from vptm_kernels._runtime.triton_support import has_triton
from vptm_kernels.prompted_attention.ops import prompted_attention_backward_op, prompted_attention_op
from vptm_kernels.testing import AttentionCase
from vptm_kernels.testing.prompted_attention import differentiable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton"] if has_triton() else ["torch"]
CASES = [
    AttentionCase(tokens=7, dtype=torch.float32),
    AttentionCase(tokens=7, dtype=torch.float32, prompts="none", bias="dense4"),
    AttentionCase(tokens=7, dtype=torch.float32, prompts="queries", bias="table", window=(2, 3)),
    AttentionCase(tokens=7, dtype=torch.float32, prompts="pool", bias="dense"),
    AttentionCase(tokens=7, dtype=torch.float32, prompts="image", bias="columns", layout="sliced"),
    AttentionCase(tokens=7, dtype=torch.float32, prompts="shared", columns="columns"),
    AttentionCase(tokens=7, dtype=torch.float32, prompts="pool", bias="dense", columns="heads"),
    AttentionCase(tokens=7, dtype=torch.float32, prompts="image queries", bias="dense", columns="columns"),
    AttentionCase(tokens=7, dtype=torch.float32, prompts="shared", rotary="shared"),
    AttentionCase(tokens=7, dtype=torch.float32, prompts="queries", bias="dense", rotary="heads"),
]


def op_arguments(call, impl):
    prompts = call.get("prompt_kv") if call.get("prompt_kv") is not None else call.get("prompt_qkv")
    bias, window, ids = call.get("bias"), [], None
    if isinstance(bias, RelativePositionBias):
        bias, window, ids = bias.table, list(bias.window), bias.token_ids
    elif bias is not None and bias.ndim == 4:
        bias = bias[0]
    options = (window, 2, call.get("prompt_qkv") is not None, call.get("max_prompt_length") or 0, 0.25)
    given = (call.get("prompt_column_bias"), ids, call.get("prompt_ranges"), *call.get("rotary", (None, None)))
    return (call["qkv"], prompts, bias, *given), options


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.prompts}-{case.bias}-{case.columns}-{case.rotary}")
def test_opcheck(case, impl):
    """Schema, autograd registration, fakes with the real strides, and AOT dispatch with dynamic shapes."""
    inputs, options = op_arguments(case.inputs(DEVICE, requires_grad=True), impl)
    torch.library.opcheck(prompted_attention_op, (*inputs, *options, True, impl))
    detached = [None if t is None else t.detach() for t in inputs]
    out, lse = prompted_attention_op(*detached, *options, True, impl)
    needs = [True, *(t is not None for t in inputs[1:4])]
    backward = (torch.randn_like(out), torch.randn_like(lse), *detached, out, lse, *options, needs, impl)
    torch.library.opcheck(prompted_attention_backward_op, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_compile_forward_and_backward(backend, impl):
    """Inductor asserts the strides that the fakes promise, so it sees a wrong fake that opcheck misses."""
    torch._dynamo.reset()
    case = AttentionCase(tokens=7, dtype=torch.float32, bias="table", window=(2, 3), rotary="heads", columns="columns")
    call = case.inputs(DEVICE, requires_grad=True)

    def run(**call):
        out, lse = prompted_attention(**call, return_lse=True, impl=impl)
        return (out * 2).sum() + lse.sum()

    leaves = list(differentiable(call).values())
    expected = torch.autograd.grad(run(**call), leaves)
    found = torch.autograd.grad(torch.compile(run, backend=backend, fullgraph=True)(**call), leaves)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_compile_serves_all_batch_sizes(impl):
    torch._dynamo.reset()
    compiles = []

    def backend(graph, example_inputs):
        compiles.append(graph)
        return graph.forward

    call = AttentionCase(tokens=7, dtype=torch.float32, bias="dense").inputs(DEVICE)
    run = torch.compile(
        lambda qkv: prompted_attention(**{**call, "qkv": qkv}, impl=impl), backend=backend, fullgraph=True, dynamic=True
    )
    # The first batch size differs from the two heads: equal sizes would be taken for one dimension.
    for batch in (6, 3, 5, 8):
        qkv = torch.randn(batch, 7, 96, device=DEVICE)
        torch.testing.assert_close(run(qkv), prompted_attention(**{**call, "qkv": qkv}, impl=impl))
    assert len(compiles) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_export_keeps_the_op_with_a_dynamic_batch(impl):
    call = AttentionCase(tokens=7, dtype=torch.float32, bias="dense").inputs(DEVICE)

    class Module(torch.nn.Module):
        def forward(self, qkv):
            return prompted_attention(**{**call, "qkv": qkv}, impl=impl)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Module(), (call["qkv"],), dynamic_shapes=({0: batch},))
    assert any("vptm.prompted_attention" in str(node.target) for node in program.graph.nodes)
    qkv = torch.randn(5, 7, 96, device=DEVICE)
    torch.testing.assert_close(program.module()(qkv), prompted_attention(**{**call, "qkv": qkv}, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_tokens_and_prompts_and_leaves_the_bias(impl):
    call = AttentionCase(tokens=7, dtype=torch.float32, bias="table", window=(2, 3)).inputs(DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = prompted_attention(**call, impl=impl)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    for t in differentiable(call).values():
        assert t.grad.dtype == torch.float32 and bool(t.grad.isfinite().all())
    torch.testing.assert_close(out.float(), prompted_attention(**call, impl=impl), rtol=0, atol=0.05)


def test_fakes_and_meta_tensors_need_no_device():
    with FakeTensorMode():
        qkv = torch.empty(2, 7, 96, device="cuda", dtype=torch.bfloat16)
        out, lse = prompted_attention(qkv, num_heads=2, return_lse=True)
        assert out.device.type == "cuda" and out.shape == (2, 7, 32) and lse.dtype == torch.float32
    out = prompted_attention(torch.empty(2, 7, 96, device="meta"), torch.empty(4, 64, device="meta"), num_heads=2)
    assert out.shape == (2, 7, 32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rotary", ["none", "shared"])
def test_backward_keeps_no_copy_of_keys_and_values(rotary, impl):
    """Only the inputs, the output and the log-sum-exp may be held between forward and backward: not turned rows."""
    call = AttentionCase(tokens=7, dtype=torch.float32, bias="dense", rotary=rotary).inputs(DEVICE, requires_grad=True)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, lse = prompted_attention(**call, return_lse=True, impl=impl)
    inputs = [*differentiable(call).values(), *call.get("rotary", ())]
    allowed = {t.untyped_storage().data_ptr() for t in [*inputs, out, lse]}
    assert saved and {t.untyped_storage().data_ptr() for t in saved} <= allowed


@pytest.mark.parametrize("impl", IMPLS)
def test_activation_checkpointing(impl):
    call = AttentionCase(tokens=7, dtype=torch.float32).inputs(DEVICE, requires_grad=True)
    leaves = list(differentiable(call).values())
    expected = torch.autograd.grad(prompted_attention(**call, impl=impl).sin().sum(), leaves)

    def run(qkv, prompt_kv):
        return prompted_attention(qkv, prompt_kv, num_heads=2, impl=impl)

    out = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out.sin().sum(), leaves), expected):
        assert torch.equal(a, b)


def test_import_needs_neither_triton_nor_a_device():
    script = """
import sys, torch
sys.modules["triton"] = None
before = set(sys.modules)
import vptm_kernels
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"triton", "timm", "torchvision", "numpy", "vptm"}, loaded
assert not torch.cuda.is_initialized()
out = vptm_kernels.prompted_attention(torch.randn(1, 3, 96), num_heads=2)
assert out.shape == (1, 3, 32)
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning:vptm_kernels", "-c", script], check=True)
