"""Devices, and what every operation runs on them."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vptm.messages import error_line
from vptm_kernels import prompted_attention, prototype_cosine, readout_attention
from vptm_kernels.residual_norm import residual_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# every operation on the smallest tensors that it accepts, made by a function of their shape
PROBES: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "prompted_attention": lambda t: prompted_attention(t(1, 4, 3 * 32), t(2, 2 * 32), num_heads=1, impl="triton"),
    "readout_attention": lambda t: readout_attention(
        t(1, 4, 32), t(1, 32), None, None, 1e-6, t(32, 32), t(32, 32), None, num_heads=1, impl="triton"
    ),
    "prototype_cosine": lambda t: prototype_cosine(
        t(2, 32), t(64, 32), None, t(3, 16), projection=t(16, 64), impl="triton"
    ),
    "residual_norm": lambda t: residual_norm(t(2, 32), t(2, 32), eps=1e-6, impl="triton"),
}


def machine_rows() -> list[tuple[str, str]]:
    """(label, value) rows: machine, GPUs, and for every operation and dtype what `impl="auto"` runs here.

    Example:
        >>> [label for label, _ in machine_rows()][:2]
        ['system', 'cpu']
    """
    lines = [("system", f"{platform.system()} {platform.machine()}")]
    lines.append(("cpu", f"{os.cpu_count()} cores, torch threads {torch.get_num_threads()}"))
    devices = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    for device in devices:
        facts = torch.cuda.get_device_properties(device)
        memory = facts.total_memory / 2**30
        lines.append((str(device), f"{facts.name}, compute {facts.major}.{facts.minor}, {memory:.0f} GiB"))
    if not devices:
        lines.append(("gpu", "none that torch can use"))
    for operation in PROBES:
        for device in devices or [torch.device("cpu")]:
            by_answer: dict[str, list[str]] = {}
            for dtype in DTYPES:
                answer = implementation(operation, device, dtype)
                by_answer.setdefault(answer, []).append(str(dtype).removeprefix("torch."))
            lines += [
                (operation, f"{answer} ({', '.join(dtypes)} on {device})") for answer, dtypes in by_answer.items()
            ]
    return lines


def implementation(operation: str, device: torch.device, dtype: torch.dtype) -> str:
    """What impl="auto" runs and why; on a GPU the kernel is run once, which is the only sure answer."""
    if device.type == "cpu":
        return "torch, kernels are for GPUs"
    try:
        PROBES[operation](lambda *shape: torch.zeros(shape, device=device, dtype=dtype))
    except ValueError as error:
        return f"torch, {error_line(error)}"
    except Exception as error:
        return f"triton, which fails here: {type(error).__name__}: {error_line(error, 200)}"
    return "triton"
