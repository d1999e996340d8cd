"""Processes of a test that need not import what they run: they are forks of one that has imported torch and vptm alone,
and computed nothing. An import takes longer than most of what is tested in them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

IMPORTED = """
torch._dynamo torch.distributed.fsdp accelerate torchvision timm sklearn.metrics matplotlib.pyplot rich.progress
vptm.methods.run vptm.serving.predict vptm.commands.app
"""
_NOTHING: Mapping[str, str] = {}


@cache
def forks() -> ForkServerContext:
    """What starts processes as such forks. Triton does not interpret its kernels in them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED.split())
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), before.get("PYTHONPATH", "")])
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Forked:
    """`target(*arguments)` in a process, with `environment` beside this one's; what it prints goes to files."""

    def __init__(self, target: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] = _NOTHING) -> None:
        folder = Path(mkdtemp())
        self._printed = folder / "out", folder / "err"
        whole = dict(os.environ) | dict(environment)
        whole.pop("TRITON_INTERPRET", None)
        inner: Any = (target, arguments, whole, *map(str, self._printed))
        self.process = forks().Process(target=_run, args=inner)
        self.process.start()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def running(self) -> bool:
        return self.process.is_alive()

    def outcome(self, timeout: float = 120) -> tuple[int | None, str, str]:
        """Exit code, minus a signal where one ended it, stdout and stderr; it is killed where it takes longer."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        out, err = (path.read_text(encoding="utf-8") for path in self._printed)
        rmtree(self._printed[0].parent)
        return self.process.exitcode, out, err


def _run(target: Callable[..., Any], arguments: Any, environment: dict[str, str], out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    # tests that a shell runs in its background ignore SIGINT, and so would what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*arguments)
