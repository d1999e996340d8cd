"""What a run records of where it ran."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vptm.version import __version__


def peak_memory(device: torch.device) -> int:
    """Bytes this process held at most: allocated by torch on a GPU, resident on a CPU (0 where the system says
    nothing)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def package_versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None where a package is not installed."""
    found: dict[str, str | None] = {"vptm": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "timm", "numpy", "safetensors", "scikit-learn", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def environment() -> dict[str, Any]:
    """The command, the versions of what a result depends on, and the platform."""
    return {"command": shlex.join(sys.argv), "versions": package_versions(), "platform": platform.platform()}
