"""A module that was passed in stays as it is: what is done to it is done to a twin on the same storage."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import chain

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def shared_twin(module: nn.Module) -> nn.Module:
    """A module of the same parts, frozen, on the storage of `module`.

    Modes, gradients and parts that are replaced or taken away are the twin's own; values edited in place are seen by
    both, until `unshare_storage` or `load_state_dict` of the twin. Hooks run on the twin too.
    """
    memo = empty_containers(module)
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        attributes = (value for value in part.__dict__.values() if isinstance(value, Tensor))
        for tensor in chain(part._buffers.values(), attributes):
            if tensor is not None:
                memo[id(tensor)] = tensor.detach()
        for hook in chain.from_iterable(getattr(part, hooks).values() for hooks in HOOKS):
            memo[id(hook)] = hook  # a bound method would be copied with the object it belongs to
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        part._shares_storage = True  # type: ignore[assignment]
        part.register_load_state_dict_pre_hook(_unshare_before_loading)
    return twin


def empty_containers(module: nn.Module) -> dict[int, object]:
    """A memo for `copy.deepcopy(module, memo)` with a copy of every empty container of its parts, of which each has a
    dozen for hooks: without it they take most of the time of a copy."""
    return {
        id(value): type(value)()
        for part in module.modules()
        for value in part.__dict__.values()
        if type(value) in (OrderedDict, dict, set) and not value
    }


@torch.no_grad()
def unshare_storage(module: nn.Module) -> None:
    """Give every part of a `shared_twin` storage of its own, with the same values, before they change; other modules
    have it."""
    for part in module.modules():
        if part.__dict__.get("_shares_storage", False):
            attributes = (value for value in part.__dict__.values() if isinstance(value, Tensor))
            for tensor in chain(part._parameters.values(), part._buffers.values(), attributes):
                if tensor is not None:
                    tensor.data = tensor.data.clone()
            part._shares_storage = False  # type: ignore[assignment]


def take_own_tensors(module: nn.Module) -> None:
    """`unshare_storage` by new tensors, so that edits of the other module are not counted here either."""
    for part in module.modules():
        if part.__dict__.get("_shares_storage", False):
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for held in (part._buffers, part.__dict__):
                held |= {name: value.detach().clone() for name, value in held.items() if isinstance(value, Tensor)}
            part._shares_storage = False  # type: ignore[assignment]


def _unshare_before_loading(module: nn.Module, *_: object) -> None:
    unshare_storage(module)
