"""A GPU that is not there: Triton binds, specialises and keeps its kernels, and nothing is compiled or launched.

    with pretend_gpu("sm90") as seen:
        model(images)                       # CPU tensors, impl="triton"
    seen.compiled                           # names of the kernels that a GPU would have compiled, one for each variant
    seen.bound                              # of the launches that went through Triton's binder

For the host's share of a call, and for what a call compiles; outputs hold whatever memory held. Not counted is the last
step of a launch, in Triton's C code and the driver. TRITON_INTERPRET must not be set when Triton is first imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from .._runtime import triton_support
from .._runtime.plans import forget_plans
from ..aot import IdleDriver


@dataclass
class Seen:
    compiled: list[str] = field(default_factory=list)
    bound: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.compiled.clear()
        self.bound.clear()


@contextmanager
def pretend_gpu(arch: str = "sm90") -> Iterator[Seen]:
    """Inside, ops take CPU tensors with impl="triton" as if they were on an NVIDIA GPU of this architecture.

    Raises:
        RuntimeError: Triton interprets kernels, or this version keeps compiled kernels in another way.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    if triton_support.interpreting():
        raise RuntimeError("TRITON_INTERPRET must not be set for a pretended GPU, got it set")
    wanted = ["self", "key", "signature", "device", "constexprs", "options", "attrs", "warmup"]
    found = list(inspect.signature(JITFunction._do_compile).parameters)
    if found != wanted:
        raise RuntimeError(f"JITFunction._do_compile must take {wanted} for a pretended GPU, got {found}")

    class Kernel:
        """What Triton's own handle of a compiled kernel asks for."""

        function, packed_metadata = 0, ()
        __getitem__ = CompiledKernel.__getitem__

        def _init_handles(self) -> None:
            pass

        def launch_metadata(self, grid: Any, stream: Any, *args: Any) -> None:
            pass

        def run(self, *args: Any) -> None:
            pass

    seen = Seen()
    run, touched = JITFunction.run, set()

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.bound.append(self.fn.__name__)
        touched.add(self)
        return run(self, *args, **kwargs)

    def do_compile(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Kernel:
        seen.compiled.append(self.fn.__name__)
        kernel = self.device_caches[device][0][key] = Kernel()
        return kernel

    driver = triton.runtime.driver
    forget_plans()
    with ExitStack() as patches:
        patches.enter_context(patch.object(JITFunction, "run", counted))
        patches.enter_context(patch.object(JITFunction, "_do_compile", do_compile))
        patches.enter_context(patch.object(triton_support, "missing_for_triton", lambda t, head_dim=None: None))
        for module in _launchers():
            patches.enter_context(patch.object(module, "architecture", lambda device: arch))
        driver.set_active(IdleDriver(GPUTarget("cuda", int(arch.removeprefix("sm")), 32)))
        try:
            yield seen
        finally:
            driver.set_active(None)  # the real one, when it is next asked for
            for kernel in touched:
                kernel.device_caches.clear()
            forget_plans()


def _launchers() -> Iterator[Any]:
    """The `triton_impl` of every op."""
    import vptm_kernels

    for package in pkgutil.iter_modules(vptm_kernels.__path__, "vptm_kernels."):
        name = f"{package.name}.triton_impl"
        if package.ispkg and importlib.util.find_spec(name) is not None:
            yield importlib.import_module(name)
