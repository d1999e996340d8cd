"""What a model holds that its source does not give, as an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from vptm.messages import listed, one_line
from vptm.models.opening import MODEL_CLASSES, build
from vptm.models.prompted_model import PromptedModel
from vptm.weights.adapters import PREPROCESSING, write_adapter
from vptm.weights.checkpoints import local_files_only
from vptm.weights.files import weight_hash


def save_adapter(model: PromptedModel, folder: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write what `model` has that its source does not, and how to rebuild it.

    That is its `learned_state_dict()` and every frozen tensor that differs from the source's, which is read once more
    for it. Which parameters require a gradient is written too. A model made from a module has no source: the weights it
    freezes are known by their hash alone.

    Args:
        model: a `PromptedBEiT` or `PromptedViT`, or one inside `torch.compile` or `DistributedDataParallel`; its
            `config`, `class_names`, `source`, preprocessing and `weight_hash()` are stored.
        folder: created where missing; an adapter in it is replaced, each file by one rename.
        extra: JSON-able facts to keep with the adapter.

    Raises:
        ValueError: what `load_adapter` would refuse: a learned value that is NaN or infinite, tensors that are not
            those of its config, class names that do not name every class; nothing is written then.
        TypeError: a model of another class, or `extra` is not JSON-able; nothing is written then.
        WriteError: an OSError that names the file that cannot be written.

    Example:
        >>> save_adapter(vptm.PromptedBEiT("builtin", num_classes=10), "clothes")
        >>> vptm.load_adapter("clothes").num_classes
        10
    """
    model = unwrapped(model)
    if type(model) not in MODEL_CLASSES.values():
        raise TypeError(f"model must be a {' or a '.join(MODEL_CLASSES)}, got {type(model).__name__}")
    save_compared(model, folder, frozen_part(model), extra)


class FrozenPart(NamedTuple):
    """What an adapter leaves to its source.

    weight_hash: of the tensors that the source gives. dtype: theirs, as a name, or a name for each tensor. changed:
    what is frozen but not given by the source, edited or made at random; it goes into the adapter.
    """

    weight_hash: str
    dtype: str | dict[str, str]
    changed: dict[str, Tensor]


def save_compared(
    model: PromptedModel, folder: str | Path, frozen: FrozenPart, extra: Mapping[str, Any] | None = None
) -> None:
    """`save_adapter` of a model whose frozen part was compared before, and has not changed since."""
    model.check_finite()
    source = model.source
    if source is not None and source != "builtin" and not timm.is_model(source) and Path(source).exists():
        source = str(Path(source).resolve())  # found again from any working directory
    config = {
        "model_class": type(model).__name__,
        "backbone": {
            "source": source,
            "architecture": dict(model.architecture),
            "weight_hash": frozen.weight_hash,
            "dtype": frozen.dtype,
            "unfrozen": not model._frozen,
        },
        "model": model.config,
        "trained": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        "class_names": model.class_names,
        "preprocessing": {name: model.default_cfg[name] for name in PREPROCESSING if name in model.default_cfg},
        "extra": dict(extra or {}),
    }
    write_adapter(folder, config, model.learned_state_dict() | frozen.changed)


def frozen_part(model: PromptedModel) -> FrozenPart:
    """Compare the frozen tensors of `model` with those that its source gives, by building it once more.

    Where there is no source, or it is not there any more, nothing can be compared: then the hash is all there is.

    Raises:
        ValueError: a model that its config and source cannot make again.
    """
    frozen, learned = model._frozen_state(), model.learned_state_dict()
    again = _built_again(model)
    fresh = None if again is None else again._frozen_state() | again.learned_state_dict()
    _check_layout(frozen | learned, _made_here(model) if fresh is None else fresh, whole=fresh is not None)
    changed: dict[str, Tensor] = {}
    if model._sealed_hash is not None:
        digest = model._sealed_hash
        given = None if fresh is None else {name: fresh[name].to(tensor.dtype) for name, tensor in frozen.items()}
        if given is not None and weight_hash(given) != digest:
            raise ValueError(
                f"model must have the weights of {model.source} to be saved after freeze_for_inference(), got others, "
                "which are dropped: save it before"
            )
    else:
        if fresh is not None:
            for name, tensor in frozen.items():
                if not torch.equal(fresh[name].to(tensor.dtype), tensor.detach().cpu()):
                    changed[name] = tensor.detach()
        frozen = {name: tensor for name, tensor in frozen.items() if name not in changed}
        digest = weight_hash(frozen)
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in frozen.items()}
    kinds = set(dtypes.values())
    return FrozenPart(digest, dtypes if len(kinds) > 1 else next(iter(kinds), "float32"), changed)


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`'s and `DistributedDataParallel`'s wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _built_again(model: PromptedModel) -> PromptedModel | None:
    """A model made as `model` was, None where its source is not there; no random number is used up."""
    if model.source is None:
        return None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), local_files_only():
        warnings.simplefilter("ignore")
        try:
            return build(type(model).__name__, model.source, model.config)
        except (OSError, ValueError):
            return None


def _made_here(model: PromptedModel) -> dict[str, Tensor]:
    """Prompts and verbalizer as the config makes them, with no source."""
    with torch.random.fork_rng(devices=[]):
        parts = {"prompts": model._make_prompts(), "verbalizer": model._make_verbalizer(model.config["num_classes"])}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}


def _check_layout(held: Mapping[str, Tensor], made: Mapping[str, Tensor], whole: bool) -> None:
    """Refuse a model whose tensors are not those that its config and source make: it could never be loaded."""
    if not whole:
        held = {name: tensor for name, tensor in held.items() if name.startswith(("prompts.", "verbalizer."))}
    unknown, missing = sorted(held.keys() - made.keys()), sorted(made.keys() - held.keys())
    if unknown or missing:
        raise ValueError(
            one_line(
                "model must have the tensors that its config and source make, or its adapter could not be loaded: "
                f"unknown {listed(unknown)}, missing {listed(missing)}"
            )
        )
    for name, tensor in held.items():
        if tensor.shape != made[name].shape:
            raise ValueError(
                f"{name} must have the shape that the model's config makes, {tuple(made[name].shape)}, "
                f"got {tuple(tensor.shape)}"
            )
