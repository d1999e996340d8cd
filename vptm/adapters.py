"""What was learned, as two small files: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import __version__
from .checkpoints import weight_hash
from .choices import one_of
from .prompted_beit import PromptedBEiT
from .prompted_model import PromptedModel
from .prompted_vit import PromptedViT
from .verbalizers import check_finite

SCHEMA_VERSION = 1
MODEL_CLASSES: dict[str, type[PromptedModel]] = {"PromptedBEiT": PromptedBEiT, "PromptedViT": PromptedViT}
TENSORS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `path` and rename it: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_adapter(model: PromptedModel, folder: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write the trained tensors of `model` and how to rebuild it; frozen weights are never written.

    Args:
        model: its `learned_state_dict()`, `config`, `class_names`, `source` and `weight_hash()` are stored.
        folder: created where missing; an adapter in it is replaced, each file by one rename.
        extra: JSON-able facts to keep with the adapter.

    Raises:
        ValueError: the folder cannot be written, or a learned value is NaN or infinite; nothing is written then.
        TypeError: `extra` is not JSON-able; nothing is written then.

    Example:
        >>> save_adapter(PromptedBEiT("builtin", num_classes=10), "clothes")
        >>> load_adapter("clothes").num_classes
        10
    """
    check_finite(model)
    folder = Path(folder)
    learned = {name: tensor.cpu().contiguous() for name, tensor in model.learned_state_dict().items()}
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
            "weight_hash": model.weight_hash(),
            "unfrozen": any(name.startswith("backbone.") for name in learned),
        },
        "model": model.config,
        "class_names": model.class_names,
        "preprocessing": {name: model.default_cfg[name] for name in _PREPROCESSING if name in model.default_cfg},
        "extra": dict(extra or {}),
    }
    text = json.dumps(config, indent=2) + "\n"
    # inside the tensor file, so one rename replaces both; one entry, because safetensors writes several in random order
    tensors = save(learned, metadata={"vptm_hash": weight_hash(learned)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG_FILE, text.encode())
        write_atomically(folder / TENSORS_FILE, tensors)
    except OSError as error:
        raise ValueError(f"adapter folder {folder} cannot be written: {error.strerror}") from error


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The checked content of a folder's `adapter_config.json`.

    Raises:
        FileNotFoundError: no adapter in the folder.
        ValueError: not JSON, of a newer schema, or without a required entry.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"adapter folder not found: {folder}")
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} must hold {TENSORS_FILE} and {CONFIG_FILE}, {name} is missing")
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    version = config.get("schema_version") if isinstance(config, dict) else None
    if isinstance(version, bool) or not isinstance(version, int):
        raise ValueError(f"{path} must have an integer schema_version, got {version!r}")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version}, this vptm {__version__} reads up to {SCHEMA_VERSION}: update vptm"
        )
    for section in ("backbone", "model"):
        if not isinstance(config.get(section), dict):
            raise ValueError(f"{path} must have an object {section!r}, got {config.get(section)!r}")
    if not isinstance(config["backbone"].get("weight_hash"), str):
        raise ValueError(f"{path} must have the string backbone.weight_hash")
    names = config.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path} must have class_names as a list of strings or null, got {names!r}")
    if names is not None and len(names) != config["model"].get("num_classes"):
        raise ValueError(
            f"{path} must name every class: {len(names)} class_names for {config['model'].get('num_classes')} classes"
        )
    return config


def load_adapter(folder: str | Path, *, source: Any = None, impl: str = "auto") -> PromptedModel:
    """Rebuild the model an adapter was trained on and load what was learned.

    Args:
        folder: written by `save_adapter`, or a run folder of `vptm train`.
        source: backbone to use in place of the recorded one (as in the model's class); its weights must be the same.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        The model in eval mode, on the CPU, with the `class_names` and preprocessing it was trained with.

    Raises:
        FileNotFoundError: the folder, one of its files or the backbone is missing.
        ValueError: damaged files, a newer schema, other backbone weights, or tensors that do not fit.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    recorded = config["backbone"].get("source")
    if source is None:
        if recorded is None:
            raise ValueError(f"{folder} was trained on a model object, not a file: pass the backbone as source=")
        source = recorded
    learned, metadata = read_tensors(folder / TENSORS_FILE)
    kind = config.get("model_class", "PromptedBEiT")
    one_of(f"model_class in {folder / CONFIG_FILE}", kind, tuple(MODEL_CLASSES))
    try:
        model = MODEL_CLASSES[kind](source, **{**config["model"], "img_size": _img_size(config["model"])}, impl=impl)
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not fit {kind}: {error}") from None
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; the adapter was trained on {recorded}: pass the backbone as source="
        ) from None
    expected, found = config["backbone"]["weight_hash"], model.weight_hash()
    if expected != found:
        raise ValueError(
            f"backbone {model.source or 'object'} has weight hash {found[:19]}, the adapter was trained on "
            f"{expected[:19]} from {recorded}: pass the right weights as source="
        )
    if config["backbone"].get("unfrozen"):
        model.unfreeze()
    try:
        model.load_learned_state_dict(learned)
    except ValueError as error:
        raise ValueError(f"{folder / TENSORS_FILE} does not fit its config: {error}") from None
    if metadata.get("vptm_hash") != weight_hash(learned):
        raise ValueError(f"{folder / TENSORS_FILE} is damaged: its tensors do not have the hash written with them")
    model.class_names = config.get("class_names")
    for name, value in (config.get("preprocessing") or {}).items():
        model.default_cfg[name] = tuple(value) if isinstance(value, list) else value
    return model.eval()


def _img_size(config: Mapping[str, Any]) -> Any:
    size = config.get("img_size")
    return tuple(size) if isinstance(size, list) else size


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ValueError where it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a safetensors file: {' '.join(str(error).split())}") from None
