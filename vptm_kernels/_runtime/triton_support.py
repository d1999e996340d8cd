"""What Triton can run here. Nothing in this file imports Triton or touches a device until it is asked."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "torch")
# the versions that the kernels are tested with start here
OLDEST = {"torch": (2, 11), "triton": (3, 6)}


def _triton_version() -> str | None:
    """As the package itself says, without importing it: its distribution has other names where torch brings it."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return None
    source = Path(spec.origin).read_text(encoding="utf-8") if spec.origin else ""
    found = re.search(r"^__version__ = ['\"]([^'\"]+)", source, re.MULTILINE)
    return found[1] if found else ""


_TRITON = _triton_version()
_HAS_TRITON = _TRITON is not None


def too_old(package: str, version: str) -> str | None:
    """What `package` must be and is, where that is older than the kernels are tested with; a version that does not
    start with two numbers is nobody's release, and taken for new."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= OLDEST[package]:
        return None
    return f"{package} {'.'.join(map(str, OLDEST[package]))} or newer, got {version}"


_TOO_OLD = too_old("torch", str(torch.__version__)) or too_old("triton", _TRITON or "")


def has_triton() -> bool:
    return _HAS_TRITON


def interpreting() -> bool:
    """Whether kernels run on CPU tensors, in numpy. Triton itself looks at this variable when it is first imported."""
    return _HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def missing_for_triton(t: Tensor, head_dim: int | None = None) -> str | None:
    """Why Triton cannot run on this tensor, in words that fit after "needs"; None when it can. Kernels that hold no
    head as a whole take any head dimension."""
    if not has_triton():
        return "the triton package, which is not installed"
    if _TOO_OLD is not None:
        return _TOO_OLD
    if not t.is_cuda and not (t.device.type == "cpu" and interpreting()):
        return f"GPU tensors (or TRITON_INTERPRET=1 on a CPU), got device {t.device}"
    if t.dtype == torch.float64 and t.is_cuda:
        return "float16, bfloat16 or float32 tensors on a GPU, got float64"
    if head_dim is not None and not 16 <= head_dim <= 128:
        return f"a head dimension from 16 to 128, got {head_dim}"
    return None


def choose(impl: str, t: Tensor, head_dim: int | None = None, *, lacking: str | None = None) -> str:
    """The implementation to run: "auto" is Triton for GPU tensors it supports; an explicit request never falls back.

    lacking: what else an op's kernels need and did not get, in words that fit after "needs"; None where nothing.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "torch" or (impl == "auto" and not t.is_cuda):
        return "torch"
    missing = missing_for_triton(t, head_dim) or lacking
    if missing is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"impl='triton' needs {missing}")
    return "torch"


_HERE = nullcontext()


def float32_precision(dtype: torch.dtype) -> str:
    """What PyTorch's own products of this dtype take now, to be part of what plans are kept by: "tf32" for float32
    after `torch.set_float32_matmul_precision("high")` or "medium", else "ieee"."""
    # torch.get_float32_matmul_precision() raises where this property was set instead; the property follows both.
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """`input_precision` of products of this dtype: `float32_precision`, where the architecture has tf32."""
    # Of AMD's compute cards only MI300 multiplies in it.
    return "ieee" if arch.startswith("gfx") and arch != "gfx942" else float32_precision(dtype)


def device_of(t: Tensor) -> AbstractContextManager[object]:
    """Launch kernels on the tensor's own GPU, whichever one is current."""
    return torch.cuda.device(t.device) if t.is_cuda and _several_gpus() else _HERE


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def architecture(device: torch.device) -> str:
    """ "sm90", "gfx942", ...: what kernels on this device are compiled for."""
    if device.type != "cuda":
        return "cpu"
    return _gpu_architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _gpu_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm{properties.major}{properties.minor}"
