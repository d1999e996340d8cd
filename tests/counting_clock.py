"""A clock for tests of benches."""

from torch.utils._python_dispatch import TorchDispatchMode


class CountingClock(TorchDispatchMode):
    """A clock that only work moves: one second per tensor operation, so that ratios are exact and repeatable."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.now += 1
        return func(*args, **(kwargs or {}))

    def seconds(self, run):
        started = self.now
        with self:
            run()
        return float(self.now - started)
