"""Repairs and memory checks for Triton's CPU interpreter, so that kernel tests without a GPU mean something.

`install()` must run after TRITON_INTERPRET=1 is set and before the first kernel. It mends, for Triton 3.6 to 3.9:

* bfloat16: the stock interpreter computes on the raw bit patterns and truncates fp32 -> bf16 casts. Here every bf16
  operation is done in fp32 and rounded once, to nearest even.
* Triton 3.6 with numpy >= 2.5: `range(0, runtime_value, BLOCK)` raises TypeError; boolean scalars raise ValueError.
* calls of `@triton.jit` helpers re-patch the whole language each time: skipped while a kernel runs (2-3x faster).

and it checks what the stock interpreter cannot see (Triton >= 3.9 wraps the error in its own InterpreterError):

* bounds: every unmasked lane of a load, store or atomic lies inside a tensor passed to the launch, else IndexError;
* races: no two programs store to one element, and none reads what another one stored, else RuntimeError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch


def install() -> None:
    from triton.runtime import interpreter

    if getattr(interpreter, "_repaired", False):
        return
    interpreter._repaired = True
    _repair_bfloat16(interpreter)
    _repair_scalars(interpreter)
    _skip_repeated_patching(interpreter)
    _check_memory(interpreter)


def _repair_bfloat16(interpreter: Any) -> None:
    import numpy as np
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    bf16 = tl.bfloat16

    def is_bf16(h: Any) -> bool:
        return bool(getattr(h.dtype, "scalar", h.dtype) == bf16)

    def widen(h: Any) -> Any:
        return (h.data.astype(np.uint32) << np.uint32(16)).view(np.float32) if is_bf16(h) else h.data

    def narrow(x: Any) -> Any:
        x = np.ascontiguousarray(x, dtype=np.float32)
        bits = x.view(np.uint32)
        even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return np.where(np.isnan(x), np.uint16(0x7FC0), ((bits + even) >> np.uint32(16)).astype(np.uint16))

    binary, unary, ternary = builder.binary_op, builder.unary_op, builder.ternary_op
    cast, dot, fma = builder.cast_impl, builder.create_dot, builder.create_fma

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (is_bf16(lhs) or is_bf16(rhs)):
            return binary(self, lhs, rhs, op)
        out = op(widen(lhs), widen(rhs))
        return handle(out, tl.int1) if out.dtype == np.bool_ else handle(narrow(out), bf16)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        return handle(narrow(op(widen(arg))), bf16) if is_bf16(arg) else unary(self, arg, op)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if op is np.where or not is_bf16(c):
            return ternary(self, a, b, c, op)
        return handle(narrow(op(widen(a), widen(b), widen(c))), bf16)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if is_bf16(z):
            return handle(narrow(widen(x).astype(np.float64) * widen(y) + widen(z)), bf16)
        return fma(self, x, y, z)

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        source, target = src.dtype.scalar, dst.scalar
        if source == bf16 and target == tl.float32:
            return handle(widen(src), tl.float32)
        if source == tl.float32 and target == bf16:
            return handle(narrow(src.data), bf16)
        return cast(self, src, dst)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if is_bf16(a) or is_bf16(b):
            a, b = handle(widen(a), tl.float32), handle(widen(b), tl.float32)
        return dot(self, a, b, *rest)

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.cast_impl, builder.create_dot, builder.create_fma = cast_impl, create_dot, create_fma
    builder.create_fneg = lambda self, x: self.unary_op(x, np.negative)
    builder.get_bf16 = lambda self, v: handle(narrow(np.array([v], np.float32)), bf16)


def _repair_scalars(interpreter: Any) -> None:
    import numpy as np
    import triton.language as tl

    convert, patch_tensor = interpreter._implicit_cvt, interpreter._patch_lang_tensor

    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, bool):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], np.bool_), tl.int1), tl.int1)
        return convert(arg)

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        set_attr = scope[0].set_attr if scope else setattr
        set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._implicit_cvt, interpreter._patch_lang_tensor = implicit_cvt, patch_lang_tensor


def _skip_repeated_patching(interpreter: Any) -> None:
    import numpy as np

    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    running = [0]
    seen: list[Any] = []

    class Nothing:
        def restore(self) -> None:
            pass

    def patch_lang(fn: Any) -> Any:
        if running[0] and any(module is fn.__globals__ for module in seen):
            return Nothing()
        seen.append(fn.__globals__)
        return patch(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        running[0] += 1
        try:
            # As a GPU, without a word: kernels compute on lanes that they mask later.
            with np.errstate(all="ignore"):
                return execute(self, *args, **kwargs)
        finally:
            running[0] -= 1
            if not running[0]:
                seen.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


def _check_memory(interpreter: Any) -> None:
    import numpy as np

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    init, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    atomic, atomic_cas = builder.create_atomic_rmw, builder.create_atomic_cas
    regions: list[list[Any]] = []  # [first byte, last byte + 1, element size, program that stored each element]

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        host_args, host_kwargs = init(self, args, kwargs)
        regions.clear()
        for arg in [*host_args, *host_kwargs.values()]:
            t = getattr(arg, "base", arg)
            if hasattr(t, "data_ptr") and hasattr(t, "stride") and t.numel():
                extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) + 1
                regions.append([t.data_ptr(), t.data_ptr() + extent * t.element_size(), t.element_size(), None])
        return host_args, host_kwargs

    def visit(self: Any, pointers: Any, mask: Any, what: str) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        address = np.asarray(pointers.data)
        if mask is not None:
            shape = np.broadcast_shapes(address.shape, mask.data.shape)
            address = np.broadcast_to(address, shape)[np.broadcast_to(mask.data, shape)]
        address = address.ravel()
        if not address.size:
            return
        x, y, z = self.grid_idx
        program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        legal = np.zeros(address.shape, bool)
        for region in regions:
            first, end, itemsize, owner = region
            inside = (address >= np.uint64(first)) & (address <= np.uint64(end - size))
            legal |= inside
            if inside.any() and (what == "store" or owner is not None):
                if owner is None:
                    owner = region[3] = np.full((end - first) // itemsize, -1, np.int32)
                index = ((address[inside] - np.uint64(first)) // np.uint64(itemsize)).astype(np.int64)
                foreign = (owner[index] != -1) & (owner[index] != program)
                if foreign.any():
                    other = owner[index][foreign][0]
                    raise RuntimeError(f"race: program {self.grid_idx} {what}s an element stored by program #{other}")
                if what == "store":
                    owner[index] = program
        if not legal.all():
            bad = int(address[~legal][0])
            near: Any = min(regions, key=lambda r: min(abs(bad - r[0]), abs(bad - r[1])), default=[0, 0, 1, None])
            raise IndexError(
                f"out of bounds {what} in program {self.grid_idx}: element {(bad - near[0]) // near[2]} "
                f"of a tensor of {(near[1] - near[0]) // near[2]} ({int((~legal).sum())} lanes)"
            )

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        visit(self, pointers, mask, "load")
        return load(self, pointers, mask, *rest, **kwargs)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        visit(self, pointers, mask, "store")
        return store(self, pointers, value, mask, *rest, **kwargs)

    def atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        visit(self, pointers, mask, "atomic")
        return atomic(self, op, pointers, value, mask, *rest, **kwargs)

    def compare_and_swap(self: Any, pointers: Any, *rest: Any, **kwargs: Any) -> Any:
        visit(self, pointers, None, "atomic")
        return atomic_cas(self, pointers, *rest, **kwargs)

    executor._init_args_hst = init_args
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = atomic_rmw, compare_and_swap


@contextlib.contextmanager
def approximate_functions() -> Iterator[None]:
    """Inside, float32 is computed as on an NVIDIA GPU: exponents, logarithms, roots and quotients err by anything up to
    what PTX allows, the same in every run, and products are summed one term after the other."""
    import numpy as np
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    random = np.random.default_rng(0)

    def off(x: Any, bound: float, absolute: Any = False) -> Any:
        by = random.uniform(-bound, bound, x.shape)
        return np.where(absolute, x + by, x * (1 + by)).astype(np.float32)

    def unary(name: str, function: Callable[[Any], Any], bound: float) -> Any:
        exact = getattr(builder, name)

        def call(self: Any, arg: Any) -> Any:
            if arg.data.dtype != np.float32:
                return exact(self, arg)
            # a logarithm near 0 errs by an absolute bound
            near = (arg.data > 0.5) & (arg.data < 2) if name.startswith("create_log") else False
            return handle(off(function(arg.data.astype(np.float64)), bound, near), arg.dtype.scalar)

        return patch.object(builder, name, call)

    def through_base_2(x: Any) -> Any:
        return np.exp2((x * np.log2(np.e)).astype(np.float32).astype(np.float64))

    def divide(self: Any, lhs: Any, rhs: Any) -> Any:
        quotient = self.binary_op(lhs, rhs, np.divide)
        if quotient.data.dtype == np.float32:
            quotient.data = off(quotient.data, 2.0**-22)
        return quotient

    dot = builder.create_dot

    def one_by_one(self: Any, a: Any, b: Any, sums: Any, *rest: Any) -> Any:
        if a.data.dtype != np.float32:
            return dot(self, a, b, sums, *rest)
        wide, total = (a.data.astype(np.float64), b.data.astype(np.float64)), sums.data
        for k in range(a.data.shape[-1]):
            total = (total + wide[0][..., :, k, None] * wide[1][..., None, k, :]).astype(np.float32)
        return handle(total, sums.dtype.scalar)

    with contextlib.ExitStack() as patches:
        for name, function, bound in (
            ("create_exp2", np.exp2, 2.0**-22),
            ("create_exp", through_base_2, 2.0**-22),
            ("create_log2", np.log2, 2.0**-22),
            ("create_log", np.log, 2.0**-22),
            ("create_sqrt", np.sqrt, 2.0**-23),
            ("create_rsqrt", lambda x: 1 / np.sqrt(x), 2.0**-22.9),
        ):
            patches.enter_context(unary(name, function, bound))
        patches.enter_context(patch.object(builder, "create_fdiv", divide))
        patches.enter_context(patch.object(builder, "create_dot", one_by_one))
        yield
