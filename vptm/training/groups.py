"""Learned tensors in groups, each with its own learning rate and weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vptm.models.prompted_model import PromptedModel
from vptm.settings import TrainSettings

# Tensors whose group is not the part that holds them.
_OWN = {"verbalizer.log_temperature": "temperature", "prompts.gate": "gate", "prompts.alpha": "alpha"}


def group_of(name: str) -> str:
    """The group of a parameter by its `state_dict` name, as `lr_of` and `weight_decay_of` of `vptm.fit` call it.

    Example:
        >>> [group_of(name) for name in ("prompts.weight", "verbalizer.prototypes", "verbalizer.log_temperature")]
        ['prompts', 'verbalizer', 'temperature']
    """
    if name in _OWN:
        return _OWN[name]
    first = name.partition(".")[0]
    return "prompts" if first == "prompt_bias" else first


def trained_groups(model: PromptedModel) -> list[str]:
    """The groups that `model` learns something of, each once."""
    return list(dict.fromkeys(group_of(name) for name, one in model.named_parameters() if one.requires_grad))


def parameter_groups(model: PromptedModel, settings: TrainSettings) -> list[dict[str, Any]]:
    """What `model` trains as an optimiser takes it: one group per learning rate and weight decay.

    A rate other than `settings.lr` is there as `lr_scale`, its share of that; with `relative_prompt_lr` that of prompts
    is times `relative`, how much longer they are than uniform ones. What has a rate of 0 is left out. Vectors and
    scalars, `model.no_weight_decay()`, prompts, gates and alpha do not decay unless they are named: prompts by
    `prompt_weight_decay`, all of a group without a matrix by `weight_decay_of`.
    """
    rates, decays = settings.lr_of or {}, dict(settings.weight_decay_of or {})
    if settings.prompt_weight_decay is not None:
        decays["prompts"] = settings.prompt_weight_decay
    if settings.head_weight_decay is not None:
        decays["verbalizer"] = settings.head_weight_decay
    exempt = model.no_weight_decay()

    def decay(name: str, parameter: nn.Parameter) -> float:
        group = group_of(name)
        own = group == "prompts" and name.endswith(("weight", "basis"))
        if group in ("gate", "alpha", "temperature", "mask_token") or own:
            return decays.get(group, 0.0)
        if parameter.ndim <= 1 or name in exempt:
            return 0.0
        return decays.get(group, settings.weight_decay)

    found: dict[tuple[bool, bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = rates.get(group_of(name), settings.lr)
        if parameter.requires_grad and rate > 0:
            scale, relative = rate / settings.lr, settings.relative_prompt_lr and name == "prompts.weight"
            kind = relative, scale != 1.0, scale, float(decay(name, parameter))
            found.setdefault(kind, []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (relative, own, scale, value), parameters in sorted(found.items(), key=lambda item: item[0]):
        group: dict[str, Any] = {"params": parameters, "weight_decay": value}
        if relative:
            size = model.prompts.relative_size()
            group |= {"lr_scale": scale * size, "relative": size}
        elif own:
            group["lr_scale"] = scale
        groups.append(group)
    return groups


def relative_rate(optimiser: torch.optim.Optimizer, lr: float) -> float | None:
    """Peak learning rate that `relative_prompt_lr` gave the prompts, also in a run that was resumed; None without."""
    groups = (group for group in optimiser.param_groups if "relative" in group)
    return next((lr * group["lr_scale"] for group in groups), None)
