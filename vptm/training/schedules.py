"""Learning-rate schedules: timm's, and those of the published methods."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from timm.scheduler import create_scheduler_v2

from vptm.messages import one_of
from vptm.settings import Schedule

SCHEDULES = get_args(Schedule)
_SPT_FLOOR, _PROVP_START = 1e-8, 1e-5


def published_rate(schedule: str, step: int, *, lr: float, epochs: int, warmup_epochs: int, steps: int) -> float:
    """Learning rate of one step under the schedule of a published method.

    With epoch e (whole for "vpt" and "provp", with a fraction for "spt"), E epochs and W of warm-up:

    - "vpt" (arXiv:2203.12119): `lr e / W` while e < W, so the first epoch learns nothing, then
      `lr (1 + cos(pi (e - W) / (E - W))) / 2`.
    - "spt" (arXiv:2402.02382): the same changed at every step, down to 1e-8 instead of 0.
    - "provp" (arXiv:2304.08386): 1e-5 while e < W, then `lr (1 + cos(pi (e - W) / E)) / 2`; W is 1 there.

    Args:
        schedule: "vpt", "spt" or "provp".
        step: number of steps taken before this one.
        lr: peak.
        epochs, warmup_epochs: E and W.
        steps: steps in an epoch.

    Example:
        >>> [published_rate("vpt", e, lr=1.0, epochs=6, warmup_epochs=2, steps=1) for e in (0, 1, 2, 4)]
        [0.0, 0.5, 1.0, 0.5]
    """
    epoch = step / steps if schedule == "spt" else float(step // steps)
    if epoch < warmup_epochs:
        return _PROVP_START if schedule == "provp" else lr * epoch / warmup_epochs
    floor = min(lr, _SPT_FLOOR) if schedule == "spt" else 0.0
    length = epochs if schedule == "provp" else epochs - warmup_epochs
    return floor + (lr - floor) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / length))


class LearningRate:
    """What an optimiser's rates are at every step: that of a schedule, times the `lr_scale` that a group of its
    parameters may have, as timm calls it. It holds no state.

    "cosine" and "tanh" are timm's, per step, from `lr` to 0 after a linear warm-up from 1 % of `lr`; "none" stays at
    `lr` after it; the others see `published_rate`.

    Args:
        optimiser: of any groups.
        schedule: one of `vptm.settings.Schedule`.
        lr: peak.
        epochs, warmup_epochs: E and W, the second part of the first.
        steps: steps in an epoch.

    Attributes:
        rate: of the last step, before any `lr_scale`.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        schedule: str,
        *,
        lr: float,
        epochs: int,
        warmup_epochs: int,
        steps: int,
    ) -> None:
        one_of("schedule", schedule, SCHEDULES)
        self.optimiser, self.rate = optimiser, lr
        self._published: dict[str, Any] | None = None
        if schedule in ("vpt", "spt", "provp"):
            self._published = {"schedule": schedule, "lr": lr, "epochs": epochs, "warmup_epochs": warmup_epochs}
            self._published["steps"] = max(steps, 1)
            return
        # timm sets the rate of an optimiser: one that has nothing to step carries it
        self._carrier = torch.optim.SGD([torch.zeros(1)], lr=lr)
        self._scheduler, _ = create_scheduler_v2(
            self._carrier,
            sched="step" if schedule == "none" else schedule,
            num_epochs=epochs,
            decay_epochs=epochs,
            decay_rate=1.0,
            warmup_epochs=warmup_epochs,
            warmup_lr=lr / 100,
            min_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )

    def step_update(self, step: int) -> None:
        """Set the learning rates of step `step`, counted from 0."""
        if self._published is None:
            self._scheduler.step_update(step)
            self.rate = float(self._carrier.param_groups[0]["lr"])
        else:
            self.rate = published_rate(step=step, **self._published)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * group.get("lr_scale", 1.0)
