"""Learned tensors in groups, each with its own learning rate and weight decay."""

from __future__ import annotations

from typing import Any

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

    A rate other than `settings.lr` is there as `lr_scale`, its share of that. What has a rate of 0 is left out. Vectors
    and scalars, `model.no_weight_decay()`, prompts, gates and alpha do not decay unless they are named: prompts by
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

    found: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = rates.get(group_of(name), settings.lr)
        if parameter.requires_grad and rate > 0:
            scale = rate / settings.lr
            found.setdefault((scale != 1.0, scale, float(decay(name, parameter))), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": value} | ({"lr_scale": scale} if own else {})
        for (own, scale, value), parameters in sorted(found.items(), key=lambda item: item[0])
    ]
