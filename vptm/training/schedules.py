"""Learning-rate schedules and weight-decay groups of the published methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from timm.scheduler import create_scheduler_v2
from torch import nn

from vptm.messages import number, one_of
from vptm.settings import Schedule

if TYPE_CHECKING:
    from vptm.models.prompted_model import PromptedModel

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


class PublishedSchedule:
    """`published_rate` as a scheduler with timm's `step_update`; it holds no state."""

    def __init__(self, optimiser: torch.optim.Optimizer, schedule: str, **settings: Any) -> None:
        self.optimiser, self.schedule, self.settings = optimiser, schedule, settings

    def step_update(self, step: int) -> None:
        """Set the learning rate of step `step`, counted from 0."""
        for group in self.optimiser.param_groups:
            group["lr"] = published_rate(self.schedule, step, **self.settings)


def make_schedule(
    schedule: str, optimiser: torch.optim.Optimizer, *, lr: float, epochs: int, warmup_epochs: int, steps: int
) -> Any:
    """An object with `step_update(step)`, or None for "none" without warm-up.

    "cosine" and "tanh" are timm's, per step, from `lr` to 0 after a linear warm-up from 1 % of `lr`; the others see
    `published_rate`.
    """
    one_of("schedule", schedule, SCHEDULES)
    if schedule in ("vpt", "spt", "provp"):
        return PublishedSchedule(
            optimiser, schedule, lr=lr, epochs=epochs, warmup_epochs=warmup_epochs, steps=max(steps, 1)
        )
    scheduler, _ = create_scheduler_v2(
        optimiser,
        sched=schedule,
        num_epochs=epochs,
        warmup_epochs=warmup_epochs,
        warmup_lr=lr / 100,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler


def decay_groups(
    model: PromptedModel, weight_decay: float, *, prompts: float | None = None, head: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of what `model` trains, one per weight decay.

    Vectors and scalars, `model.no_weight_decay()` and prompts have none. VPT and SPT decay prompts too, and SPT the
    head differently.

    Args:
        model: see `vptm.PromptedBEiT`.
        weight_decay: of matrices.
        prompts: of prompts and their projection's weight, None for no decay of prompts.
        head: of the verbalizer's matrices, None for `weight_decay`.
    """
    for argument, value in (("prompt_weight_decay", prompts), ("head_weight_decay", head)):
        if value is not None and not 0 <= number(argument, value) < math.inf:
            raise ValueError(f"{argument} must be finite and >= 0, or None, got {value!r}")
    exempt = model.no_weight_decay()

    def decay(name: str, parameter: nn.Parameter) -> float:
        if name.startswith("prompts.") and name.endswith("weight"):
            return prompts or 0.0
        if parameter.ndim <= 1 or name in exempt:
            return 0.0
        return head if head is not None and name.startswith("verbalizer.") else weight_decay

    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in _trained(model).items():
        groups.setdefault(float(decay(name, parameter)), []).append(parameter)
    return [{"params": parameters, "weight_decay": value} for value, parameters in sorted(groups.items())]


def _trained(model: nn.Module) -> Mapping[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
