"""What a model computes with: the types a device has, a copy of a model in one, and compiled code."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from vptm.messages import one_of
from vptm.models.prompted_model import PromptedModel
from vptm.settings import Precision, TrainSettings, choices
from vptm_kernels._runtime.frozen_linear import has_bfloat16

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str | None, device: torch.device, *, training: bool) -> Precision | None:
    """`precision` as the device has it: "auto" is bf16 on a GPU that has it and fp32 elsewhere, None stays None.

    Raises:
        ValueError: a precision that the device lacks, or float16 training on a CPU.

    Example:
        >>> resolve_precision("auto", torch.device("cpu"), training=True)
        'fp32'
    """
    if precision is None:
        return None
    one_of("precision", precision, choices(TrainSettings, "precision"))
    gpu = device.type == "cuda"
    # of compute capability 8.0 and later, as tf32; older GPUs only emulate it
    has_bf16 = gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if precision == "tf32" and not has_bf16:
        raise ValueError(f"precision tf32 needs a GPU of compute capability 8.0 or later, got {_named(device)}")
    if precision == "bf16" and gpu and not has_bf16:
        raise ValueError(
            f"precision bf16 needs a CPU or a GPU of compute capability 8.0 or later, got {_named(device)}"
        )
    if precision == "fp16" and training and not gpu:
        raise ValueError(f"precision fp16 trains on a GPU only, got {_named(device)}: bf16 trains on both")
    return cast(Precision, precision)


def dtype_of(precision: Precision | None) -> torch.dtype | None:
    """The type that weights and images have in a precision; None keeps theirs."""
    return None if precision is None else _DTYPES[precision]


def in_type(model: PromptedModel, dtype: torch.dtype | None, device: torch.device) -> PromptedModel:
    """`model` itself where it has the type (or `dtype` is None), moved to the device; else a copy of it in that type
    there, and `model` stays as and where it is."""
    if dtype is None or {parameter.dtype for parameter in model.parameters()} <= {dtype}:
        return model if next(model.parameters()).device == device else model.to(device)
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def compiled(function: Any) -> Any:
    """`torch.compile` without graph breaks, once for all batch sizes."""
    return torch.compile(function, fullgraph=True, dynamic=True)


@contextmanager
def float32_products(precision: Precision | None) -> Iterator[None]:
    """Products of float32 tensors on a GPU in TF32 for "tf32", exact for "fp32", as they are set for anything else."""
    if precision not in ("fp32", "tf32") or not torch.cuda.is_available():
        yield
        return
    exact, matmul = precision == "fp32", torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the property instead, which this function then no longer reads
        wanted, was = "ieee" if exact else "tf32", matmul.fp32_precision
        matmul.fp32_precision = wanted
        try:
            yield
        finally:
            matmul.fp32_precision = was
        return
    was = matmul.fp32_precision
    torch.set_float32_matmul_precision("highest" if exact else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if matmul.fp32_precision != was:  # the property was set after the function
            matmul.fp32_precision = was


def slow_note(precision: Precision | None, device: torch.device) -> str | None:
    """One line where a precision is slower than fp32 on this processor, None where it is not, or that is not known."""
    if precision != "bf16" or device.type != "cpu" or has_bfloat16() is not False:
        return None
    return "precision bf16 is slower than fp32 here: this processor has no bfloat16 instructions"


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return f"device {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"
