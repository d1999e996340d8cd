"""Bytes that launches are said to move against those that the interpreter sees them move."""

import contextlib
import functools
import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("counts loads in the interpreter", allow_module_level=True)

import numpy as np

from vptm_kernels import aot
from vptm_kernels._runtime.plans import forget_plans


@contextlib.contextmanager
def counting(monkeypatch):
    """[(kernel, arguments, bytes of every access of every program, bytes touched)] of launches made inside.

    A lane that repeats an address of the same access is not counted: it takes no traffic.
    """
    from triton.runtime import interpreter

    launches, builder = [], interpreter.InterpreterBuilder
    execute, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store

    def visit(pointers, mask):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        address = np.asarray(pointers.data)
        if mask is not None:
            shape = np.broadcast_shapes(address.shape, mask.data.shape)
            address = np.broadcast_to(address, shape)[np.broadcast_to(mask.data, shape)]
        address = np.unique(address)
        launches[-1][2].append(size * len(address))
        launches[-1][3].update(zip(address.tolist(), [size] * len(address)))

    def call(self, *args, **kwargs):
        launches.append((self.fn, dict(zip(self.arg_names, args)) | kwargs, [], {}))
        return execute(self, *args, **kwargs)

    def masked_load(self, pointers, mask, *rest, **options):
        visit(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def masked_store(self, pointers, value, mask, *rest, **options):
        visit(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        yield launches


def attention(prompts, bias, learned=("qkv", "prompts"), form=None, **sizes):
    from vptm_kernels import prompted_attention
    from vptm_kernels.prompted_attention import triton_impl
    from vptm_kernels.testing import AttentionCase
    from vptm_kernels.testing.prompted_attention import differentiable

    sizes = {"tokens": 48, "prompt_length": 16, "dtype": torch.float32} | sizes
    call = AttentionCase(prompts=prompts, bias=bias, **sizes).inputs()
    for name, t in differentiable(call).items():
        t.requires_grad_(name in learned or (name.startswith("prompt") and "prompts" in learned))
    table = triton_impl.forward_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_impl, "forward_config", lambda *a, **o: table(*a, **o)._replace(**(form or {})))
        forget_plans()
        out = prompted_attention(**call, impl="triton")
        if learned:
            out.sum().backward()
    forget_plans()


def readout(learned, batch=2, tokens=32, width=64):
    from vptm_kernels.readout_attention.api import readout_attention

    x = torch.randn(batch, tokens, width, requires_grad=learned)
    q = torch.randn(batch, width, requires_grad=learned)
    out = readout_attention(
        x,
        q,
        norm_weight=None,
        norm_bias=None,
        eps=1e-6,
        k_weight=torch.randn(width, width),
        v_weight=torch.randn(width, width),
        v_bias=None,
        num_heads=2,
        impl="triton",
    )
    if learned:
        out.sum().backward()


def prototypes(activation, monkeypatch):
    from vptm_kernels import prototype_cosine
    from vptm_kernels.prototype_cosine import torch_impl

    monkeypatch.setattr(torch_impl, "choose_plan", lambda *shape: "stream")
    hidden = torch.randn(16, 32, requires_grad=True)
    projection = torch.randn(16, 96, requires_grad=True)
    out = prototype_cosine(
        hidden,
        torch.randn(96, 32),
        torch.randn(96),
        torch.randn(5, 16),
        projection=projection,
        activation=activation,
        impl="triton",
    )
    out.sum().backward()


CALLS = {
    "prefix": lambda m: attention("shared", "aligned"),
    "prefix, keys resident": lambda m: attention("shared", "aligned", (), {"keys_resident": True}),
    "prefix, ragged": lambda m: attention("shared", "aligned", tokens=50, prompt_length=5),
    "prompts only": lambda m: attention("shared", "none", ("prompts",)),
    "attending prompts": lambda m: attention("queries", "none"),
    "rotary": lambda m: attention("shared", "none", rotary="shared"),
    "rotary by heads, ragged": lambda m: attention("shared", "none", rotary="heads", tokens=50, prompt_length=5),
    "rotary, prompts attend": lambda m: attention("queries", "none", rotary="shared"),
    "rotary and bias": lambda m: attention("none", "aligned", ("qkv", "bias"), rotary="shared"),
    "bias": lambda m: attention("none", "aligned", ("qkv", "bias")),
    "read-out": lambda m: readout(True),
    "read-out, inference": lambda m: readout(False),
    "softmax": functools.partial(prototypes, "softmax"),
    "log-softmax": functools.partial(prototypes, "log_softmax"),
    "logits": functools.partial(prototypes, "logits"),
}


@pytest.mark.parametrize("name", CALLS)
def test_formulas_give_the_bytes_that_programs_move(name, monkeypatch):
    """A forgotten operand or a wrong number of passes would send whoever tunes a kernel after the wrong limit."""
    with counting(monkeypatch) as launches:
        CALLS[name](monkeypatch)
    checked = set()
    for kernel, arguments, accesses, touched in launches:
        module = f"{kernel.__module__.rpartition('.')[0]}.traffic"
        formulas = __import__(module, fromlist=["_"]).KERNELS
        if kernel.__name__ in formulas:
            found = aot.traffic(kernel, arguments)
            label = f"{kernel.__name__}: {found} for {sum(accesses)}, {sum(touched.values())}"
            assert found.cache == pytest.approx(sum(accesses), rel=0.03), label
            assert found.memory == pytest.approx(sum(touched.values()), rel=0.03), label
            checked.add(kernel.__name__)
    assert checked


def test_every_formula_belongs_to_a_kernel_and_is_checked():
    """A renamed kernel would silently fall to the formula for kernels that read nothing twice."""
    for op, kernels in {
        "prompted_attention": ["kernels_fwd", "kernels_bwd"],
        "readout_attention": ["kernels_fwd", "kernels_bwd"],
        "prototype_cosine": ["kernels_fwd", "kernels_bwd"],
    }.items():
        formulas = __import__(f"vptm_kernels.{op}.traffic", fromlist=["_"]).KERNELS
        modules = [__import__(f"vptm_kernels.{op}.{name}", fromlist=["_"]) for name in kernels]
        for name in formulas:
            assert any(hasattr(module, name) for module in modules), f"{op} has no {name}"


def test_every_kernel_has_the_name_of_its_op():
    """Profiles show a kernel's name alone: two ops that launch a `forward_kernel` could not be told apart."""
    found = []
    for path in (Path(aot.__file__).parent).glob("*/kernels*.py"):
        module = importlib.import_module(f"vptm_kernels.{path.parent.name}.{path.stem}")
        names = [name for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "fn")]
        own = [name for name in names if getattr(module, name).fn.__module__ == module.__name__]
        assert all(name.startswith(path.parent.name) for name in own), own
        found += own
    assert len(found) == len(set(found)) >= 18


@pytest.mark.parametrize(
    "programs,blocks,target,expected",
    [
        (3072, 3, "sm90", (7.757, 0.970)),
        (132, 1, "sm90", (1, 1)),
        (148, 4, "sm100", (0.25, 0.25)),
        (0, 3, "sm90", (0, 0)),
    ],
)
def test_waves_and_the_share_of_the_last_one(programs, blocks, target, expected):
    assert aot.waves(programs, blocks, target) == pytest.approx(expected, abs=1e-3)


def test_tensors_of_kernels_without_a_formula_are_counted_once():
    def kernel():
        pass

    x, y = torch.empty(4, 8), torch.empty(16, dtype=torch.float16)
    assert aot.traffic(kernel, {"x": x, "again": x, "y": y, "n": 3}) == (160, 160)
