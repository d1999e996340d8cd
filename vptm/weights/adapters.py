"""What was learned, as two small files: `adapter_model.safetensors` and `adapter_config.json`.

An adapter holds every tensor that its backbone's source does not give: what was trained, what was changed, and what was
made at random. Of the rest it holds a hash, so it runs on those weights alone.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from vptm import __version__
from vptm.messages import one_line, one_of
from vptm.models.prompted_beit import PromptedBEiT
from vptm.models.prompted_model import PromptedModel
from vptm.models.prompted_vit import PromptedViT
from vptm.models.verbalizers import check_finite
from vptm.weights.backbones import local_files_only, one_line_errors, preprocessing_error, weight_hash

SCHEMA_VERSION = 2  # 1 had no "trained", and its hash left out what the constructor makes trainable and no more
MODEL_CLASSES: dict[str, type[PromptedModel]] = {"PromptedBEiT": PromptedBEiT, "PromptedViT": PromptedViT}
TENSORS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "background", "value_range")


class WriteError(OSError):
    """A file cannot be written: the disk is full, its folder is gone, or it may not be; the message has its path."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `path` and rename it: a kill leaves the old file or the new one.

    Raises:
        WriteError: naming `path`; an old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error
        raise


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`'s and `DistributedDataParallel`'s wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


class FrozenPart(NamedTuple):
    """What an adapter leaves to its source.

    weight_hash: of the tensors that the source gives. dtype: theirs, as a name, or a name for each tensor. changed:
    what is frozen but not given by the source, edited or made at random; it goes into the adapter.
    """

    weight_hash: str
    dtype: str | dict[str, str]
    changed: dict[str, Tensor]


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


def _built_again(model: PromptedModel) -> PromptedModel | None:
    """A model made as `model` was, None where its source is not there; no random number is used up."""
    if model.source is None:
        return None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), local_files_only():
        warnings.simplefilter("ignore")
        try:
            return _build(type(model).__name__, model.source, model.config)
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
                f"unknown {_some(unknown)}, missing {_some(missing)}"
            )
        )
    for name, tensor in held.items():
        if tensor.shape != made[name].shape:
            raise ValueError(
                f"{name} must have the shape that the model's config makes, {tuple(made[name].shape)}, "
                f"got {tuple(tensor.shape)}"
            )


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
        >>> save_adapter(PromptedBEiT("builtin", num_classes=10), "clothes")
        >>> load_adapter("clothes").num_classes
        10
    """
    model = unwrapped(model)
    if type(model) not in MODEL_CLASSES.values():
        raise TypeError(f"model must be a {' or a '.join(MODEL_CLASSES)}, got {type(model).__name__}")
    write_adapter(model, folder, frozen_part(model), extra)


def write_adapter(
    model: PromptedModel, folder: str | Path, frozen: FrozenPart, extra: Mapping[str, Any] | None = None
) -> None:
    """`save_adapter` of a model whose frozen part was compared before, and has not changed since."""
    check_finite(model)
    folder = Path(folder)
    # copies: tensors that share memory cannot be written
    learned = {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in (model.learned_state_dict() | frozen.changed).items()
    }
    _check_finite(learned)
    source = model.source
    if source is not None and source != "builtin" and not timm.is_model(source) and Path(source).exists():
        source = str(Path(source).resolve())  # found again from any working directory
    config = {
        "schema_version": SCHEMA_VERSION,
        "vptm_version": __version__,
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
        "preprocessing": {name: model.default_cfg[name] for name in _PREPROCESSING if name in model.default_cfg},
        "extra": dict(extra or {}),
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    if wrong := _config_error(json.loads(text)):
        raise ValueError(one_line(f"model must be one that an adapter can hold: {wrong}"))
    # inside the tensor file, so one rename replaces both; one entry, because safetensors writes several in random order
    tensors = save(learned, metadata={"vptm_hash": weight_hash(learned)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"adapter folder {folder} cannot be written: {error.strerror or error}") from error
    write_atomically(folder / CONFIG_FILE, text.encode())
    write_atomically(folder / TENSORS_FILE, tensors)


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The checked content of a folder's `adapter_config.json`.

    Raises:
        FileNotFoundError: no adapter in the folder.
        ValueError: not JSON, of a newer schema, or an entry that is missing or of another type.
    """
    folder = Path(folder)
    with one_line_errors(folder):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"adapter folder not found: {folder}")
        for name in (CONFIG_FILE, TENSORS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} must hold {TENSORS_FILE} and {CONFIG_FILE}, {name} is missing")
        path = folder / CONFIG_FILE
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} must be JSON: {error}") from None
        version = config.get("schema_version") if isinstance(config, dict) else None
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"{path} must have an integer schema_version, got {version!r}")
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema_version {version}, this vptm {__version__} reads up to {SCHEMA_VERSION}: "
                "update vptm"
            )
        if wrong := _config_error(config):
            raise ValueError(f"{path} {wrong}")
    return config


def _config_error(config: dict[str, Any]) -> str | None:
    """What of a config is missing or of another type, None where nothing is."""
    for section in ("backbone", "model"):
        if not isinstance(config.get(section), dict):
            return f"must have an object {section!r}, got {config.get(section)!r}"
    backbone, model, names = config["backbone"], config["model"], config.get("class_names")
    if not isinstance(backbone.get("weight_hash"), str):
        return "must have the string backbone.weight_hash"
    if not isinstance(backbone.get("source"), str | None):
        return f"must have backbone.source as a string or null, got {backbone['source']!r}"
    if not isinstance(backbone.get("unfrozen", False), bool):
        return f"must have backbone.unfrozen as true or false, got {backbone['unfrozen']!r}"
    if config["schema_version"] > 1:
        kinds = backbone.get("dtype")
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if not isinstance(kind, str) or not isinstance(getattr(torch, kind, None), torch.dtype):
                return f"must have backbone.dtype as a torch dtype, or one for each tensor, got {kind!r}"
        trained = config.get("trained")
        if not isinstance(trained, list) or not all(isinstance(name, str) for name in trained):
            return f"must have trained as a list of tensor names, got {trained!r}"
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return f"must have class_names as a list of strings or null, got {names!r}"
    if type(model.get("num_classes")) is not int:
        return f"must have model.num_classes as an integer, got {model.get('num_classes')!r}"
    if names is not None and len(names) != model["num_classes"]:
        return f"must name every class: {len(names)} class_names for {model['num_classes']} classes"
    if not isinstance(config.get("extra") or {}, dict):
        return f"must have extra as an object, got {config['extra']!r}"
    return preprocessing_error(config.get("preprocessing") or {})


def load_adapter(folder: str | Path, *, source: Any = None, impl: str = "auto") -> PromptedModel:
    """Rebuild the model an adapter was trained on and load what was learned.

    Nothing is fetched: a recorded source that is a Hugging Face id or a timm name is read from the local cache. One
    that is passed as `source` may be downloaded.

    Args:
        folder: written by `save_adapter`, or a run folder of `vptm train`.
        source: backbone to use in place of the recorded one (as in the model's class); its weights must be the same.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        The model in eval mode, on the CPU, in the dtype of its source, with the `class_names` and preprocessing it was
        trained with; the parameters that were trained require a gradient.

    Raises:
        FileNotFoundError: the folder, one of its files or the backbone is missing.
        ValueError: damaged files, a newer schema, other backbone weights, or tensors that do not fit.
    """
    with one_line_errors(folder):
        return _load(Path(folder), source, impl)


def _load(folder: Path, source: Any, impl: str) -> PromptedModel:
    config = read_adapter_config(folder)
    recorded, given = config["backbone"].get("source"), source
    if source is None:
        if recorded is None:
            raise ValueError(f"{folder} was trained on a model object, not a file: pass the backbone as source=")
        source = recorded
    learned, metadata = read_tensors(folder / TENSORS_FILE)
    kind = config.get("model_class", "PromptedBEiT")
    one_of(f"model_class in {folder / CONFIG_FILE}", kind, tuple(MODEL_CLASSES))
    try:
        if given is None:
            if config["model"].get("pretrained"):
                _refuse_download(source)
            with local_files_only():
                model = _build(kind, source, config["model"], impl)
        else:
            model = _build(kind, source, config["model"], impl)
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not fit {kind}: {error}") from None
    except (FileNotFoundError, ValueError) as error:
        if not isinstance(error, FileNotFoundError) and not (given is None and isinstance(error.__cause__, OSError)):
            raise
        raise FileNotFoundError(
            f"{error}; the adapter was trained on {recorded}: pass the backbone as source="
        ) from error
    try:
        _check_learned(model, learned, config)
    except ValueError as error:
        raise ValueError(f"{folder / TENSORS_FILE} does not fit its config: {error}") from None
    if metadata.get("vptm_hash") != weight_hash(learned):
        raise ValueError(f"{folder / TENSORS_FILE} is damaged: its tensors do not have the hash written with them")
    _check_backbone(model, learned, config)
    _fill(model, learned, config)
    model.class_names = config.get("class_names")
    size = model.default_cfg["input_size"]
    for name, value in (config.get("preprocessing") or {}).items():
        model.default_cfg[name] = tuple(value) if isinstance(value, list) else value
    if tuple(model.default_cfg["input_size"]) != tuple(size):
        raise ValueError(
            f"{folder / CONFIG_FILE} must have preprocessing.input_size {list(size)}, the model's, "
            f"got {list(model.default_cfg['input_size'])}"
        )
    return model.eval()


def _refuse_download(name: str) -> None:
    """timm fetches weights that are not on the hub by their address, whatever the hub's cache says."""
    cfg = get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None or cfg.hf_hub_id or not isinstance(cfg.url, str) or not cfg.url:
        return
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(cfg.url).path).name)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: its weights are not in {path.parent}")


def _build(kind: str, source: Any, config: Mapping[str, Any], impl: str = "auto") -> PromptedModel:
    size = config.get("img_size")
    size = tuple(size) if isinstance(size, list) else size
    return MODEL_CLASSES[kind](source, **{**config, "img_size": size}, impl=impl)


def _check_backbone(model: PromptedModel, learned: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse a backbone whose weights are not those that the adapter was trained on."""
    expected, frozen = config["backbone"]["weight_hash"], model._frozen_state()
    if config["schema_version"] > 1:
        kinds = config["backbone"]["dtype"]
        frozen = {
            name: tensor.to(getattr(torch, kinds if isinstance(kinds, str) else kinds.get(name, "float32")))
            for name, tensor in frozen.items()
            if name not in learned
        }
    if expected != (found := weight_hash(frozen)):
        raise ValueError(
            f"backbone {model.source or 'object'} has weight hash {found[:19]}, the adapter was trained on "
            f"{expected[:19]} from {config['backbone'].get('source')}: pass the right weights as source="
        )


def _check_learned(model: PromptedModel, learned: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse tensors that are not parameters of `model`, or not all that no source has."""
    own = dict(model.named_parameters(remove_duplicate=False))
    unknown, missing = sorted(learned.keys() - own.keys()), sorted(model.learned_state_dict().keys() - learned.keys())
    if unknown or missing:
        raise ValueError(
            f"learned tensors must be parameters of it: unknown {_some(unknown)}, missing {_some(missing)}"
        )
    if unknown := sorted(set(config.get("trained", ())) - own.keys()):
        raise ValueError(f"trained must name parameters of it: unknown {_some(unknown)}")
    for name, tensor in learned.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} must have shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    _check_finite(learned)


def _fill(model: PromptedModel, learned: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Copy what the adapter holds into `model`, and let require a gradient what did when it was saved."""
    own = dict(model.named_parameters(remove_duplicate=False))
    trained = learned if config["schema_version"] == 1 else config["trained"]
    every = {name for name in own if name.startswith("backbone.")}
    if config["backbone"].get("unfrozen") and (config["schema_version"] > 1 or every <= learned.keys()):
        model.unfreeze()
    for name, parameter in own.items():
        parameter.requires_grad_(name in learned)
    model.load_learned_state_dict(learned)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must be finite, got NaN or infinite values")


def _some(names: list[str]) -> str:
    return f"[{', '.join(map(repr, names[:3]))}{', …' if len(names) > 3 else ''}]"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ValueError where it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a safetensors file: {one_line(error)}") from None
