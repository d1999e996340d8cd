"""What a model holds that its source does not give, as an adapter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vptm.frozen.parts import has_patched_forward
from vptm.messages import listed, one_line
from vptm.models.codebooks import empty_codebook
from vptm.models.learned import LearnedParts
from vptm.models.verbalizers import folded_verbalizer
from vptm.weights.adapter_format import PREPROCESSING, write_adapter
from vptm.weights.containers import local_files_only
from vptm.weights.files import weight_hash


class Saved(LearnedParts):
    """What a model has that is saved as an adapter.

    saved_as: the name of the class that loads it; that of a subclass would be lost. keeps_unread_head: whether a token
    head is part of a model that reads none.
    """

    saved_as = ""
    keeps_unread_head = True
    default_cfg: dict[str, Any]
    architecture: dict[str, Any]
    source: str | None
    class_names: list[str] | None
    _frozen: bool

    def unfreeze(self) -> Any:
        """Make the backbone trainable too."""
        raise NotImplementedError

    def with_parts(self, **parts: Any) -> Any:
        """A model with other parts of those names."""
        raise NotImplementedError

    def _make_prompts(self) -> Any:
        raise NotImplementedError

    def _make_verbalizer(self, num_classes: int) -> Any:
        raise NotImplementedError


def build(kind: type[Saved], source: Any, config: Mapping[str, Any], impl: str = "auto") -> Any:
    """A model of a class from `source` and another model's `config`."""
    # adapters of older versions name it, and it has no effect
    config = {name: value for name, value in config.items() if name != "prompt_location"}
    size = config.get("img_size")
    size = tuple(size) if isinstance(size, list) else size
    if config.get("codebook") is not None:  # its shape, for what an adapter holds to be filled into
        config["codebook"] = empty_codebook(config["codebook"])
    return kind(source, **{**config, "img_size": size}, impl=impl)


def deployed(model: Saved) -> Any:
    """`model` with its token head and projection, or linear verbalizer, as one map of the hidden state: the same scores
    from V / C times fewer numbers, which only the hidden state's own training can change.

    Raises:
        ValueError: a verbalizer where that is not exact.
    """
    verbalizer = folded_verbalizer(model.verbalizer, model.lm_head)
    unread = {} if model.keeps_unread_head else {"lm_head": None}
    twin = model.with_parts(verbalizer=verbalizer.to(model.prompts.weight), **unread)
    changes = {"token_activation": "hidden", "train_lm_head": False}
    if "codebook" in model.config:
        changes["codebook"] = None
    if "projection_bias" in model.config and model.config["verbalizer"] == "prototypical":
        changes["projection_bias"] = True
    twin.config = type(model.config)(model.config | changes)
    return twin


def save_adapter(model: Saved, folder: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
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
            those of its config, class names that do not name every class; and what it would make without what was done
            to it: a part of another class, another eps, a patched `forward`. Nothing is written then.
        TypeError: a model of another class, or `extra` is not JSON-able; nothing is written then.
        WriteError: an OSError that names the file that cannot be written.

    Warns:
        UserWarning: hooks, which no adapter holds. What only training reads, as the rate of a dropout, is left out as
            well: a loaded model has that of its config.

    Example:
        >>> save_adapter(vptm.PromptedBEiT("builtin", num_classes=10), "clothes")
        >>> vptm.load_adapter("clothes").num_classes
        10
    """
    model = unwrapped(model)
    if not isinstance(model, Saved) or type(model).saved_as != type(model).__name__:
        raise TypeError(f"model must be a PromptedBEiT or a PromptedViT, got {type(model).__name__}")
    save_compared(model, folder, frozen_part(model), extra)


class FrozenPart(NamedTuple):
    """What an adapter leaves to its source.

    weight_hash: of the tensors that the source gives. dtype: theirs, as a name, or a name for each tensor. changed:
    what is frozen but not given by the source, edited or made at random; it goes into the adapter. digest: of both.
    compared: whether the source was there.
    """

    weight_hash: str
    dtype: str | dict[str, str]
    changed: dict[str, Tensor]
    digest: str
    compared: bool


def save_compared(
    model: Saved,
    folder: str | Path,
    frozen: FrozenPart,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """`save_adapter` of a model whose frozen part was compared before, and has not changed since."""
    model.check_finite()
    source, path = model.source, None
    if source is not None and source != "builtin" and not timm.is_model(source) and Path(source).exists():
        # its name, and where it is from the adapter: no path of this machine, and found again while both stay or move
        path = Path(os.path.relpath(Path(source).resolve(), Path(folder).resolve())).as_posix()
        source = Path(source).name
    config = {
        "model_class": type(model).__name__,
        "backbone": {
            "source": source,
            "path": path,
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
    tensors = model.learned_state_dict() | frozen.changed
    write_adapter(folder, config, {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()})


def frozen_part(model: Saved) -> FrozenPart:
    """Compare the frozen tensors of `model` with those that its source gives, by building it once more.

    Where there is no source, or it is not there any more, nothing can be compared: then the hash is all there is.

    Raises:
        ValueError: a model that its config and source cannot make again.
    """
    frozen, learned = model.frozen_state_dict(), model.learned_state_dict()
    again = _built_again(model)
    made = _made_here(model) if again is None else again
    fresh = None if again is None else again.frozen_state_dict() | again.learned_state_dict()
    _check_layout(frozen | learned, dict(made.named_parameters()) if fresh is None else fresh, whole=fresh is not None)
    _check_parts(model, made)
    changed: dict[str, Tensor] = {}
    if model._sealed_hash is not None:
        digest = model._sealed_hash
        if model._hash_left() != model._sealed_left:
            raise ValueError(
                "model must have the frozen weights that freeze_for_inference() left to be saved, got others: "
                "edit them before it"
            )
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
    both = f"{digest} {weight_hash(changed)}" if changed else digest
    return FrozenPart(
        digest, dtypes if len(kinds) > 1 else next(iter(kinds), "float32"), changed, both, again is not None
    )


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`'s and `DistributedDataParallel`'s wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _built_again(model: Saved) -> Saved | None:
    """A model made as `model` was, None where its source is not there; no random number is used up."""
    if model.source is None:
        return None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), local_files_only():
        warnings.simplefilter("ignore")
        try:
            return build(type(model), model.source, model.config)
        except (OSError, ValueError):
            return None


def _check_parts(model: Saved, built: nn.Module) -> None:
    """Refuse a model whose parts do something else, on the same tensors, than those that its config and source make."""
    if model.readout != (readout := model.config["readout"]):
        raise ValueError(
            f"readout must be the {readout!r} that the model was built with, to be saved, got {model.readout!r}"
        )

    made, hooked = dict(built.named_modules()), []
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            hooked.append(name or type(module).__name__)
        if name and name in made:  # trainers patch the forward of the whole
            _check_part(name, module, made[name])
    buffers = dict(built.named_buffers())
    for name, buffer in model.named_buffers():
        if name in buffers and not torch.equal(buffers[name].to(buffer.dtype), buffer.detach().cpu()):
            raise ValueError(f"{name} must be as the model was built with it, to be saved, got other values")
    if hooked:
        warnings.warn(f"hooks are not saved in an adapter, got some on {listed(hooked)}", stacklevel=4)


def _check_part(name: str, module: nn.Module, built: nn.Module) -> None:
    """Refuse a part that says other things of itself than the same one as built."""

    def differs(what: str, wanted: object, found: object) -> ValueError:
        return ValueError(
            one_line(f"{what} must be the {wanted} that the model was built with, to be saved, got {found}")
        )

    kinds = [nn.Identity if type(part) in _IDLE else type(part) for part in (built, module)]
    if kinds[0] is not kinds[1]:
        raise differs(name, *(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds))
    methods = [key for key in module.__dict__.keys() - built.__dict__.keys() if callable(getattr(kinds[1], key, None))]
    if methods or has_patched_forward(module):
        what = one_line(methods[0] if methods else "forward")
        raise ValueError(f"{name} must have the {what} of its class, to be saved, got a patched one")
    for key, wanted in built.__dict__.items():
        if type(wanted) in _PLAIN and not key.startswith("_") and key not in _OF_TRAINING:
            found = module.__dict__.get(key)
            if found != wanted:
                raise differs(f"the {key} of {name}", repr(wanted), repr(found))


# what may differ without another function in eval mode
_IDLE = (nn.Identity, nn.Dropout, DropPath)
_OF_TRAINING = {"training", "grad_checkpointing", "fused_attn", "dropout", "p", "drop_prob", "scale_by_keep", "inplace"}
_PLAIN = (bool, int, float, str, tuple, range, type(None))


def _made_here(model: Saved) -> nn.Module:
    """Prompts and verbalizer as the config makes them, with no source."""
    with torch.random.fork_rng(devices=[]):
        verbalizer = model._make_verbalizer(model.config["num_classes"])
        return nn.ModuleDict({"prompts": model._make_prompts(), "verbalizer": verbalizer})


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
