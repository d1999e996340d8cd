"""The files of an adapter, `adapter_model.safetensors` and `adapter_config.json`: their schema, hashes and checks.

An adapter holds every tensor that its backbone's source does not give: what was trained, what was changed, and what was
made at random. Of the rest it holds a hash, so it runs on those weights alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from vptm.messages import listed, one_line
from vptm.version import __version__
from vptm.weights.files import (
    check_values,
    make_folder,
    one_line_errors,
    read_json,
    read_safetensors,
    weight_hash,
    write_atomically,
)
from vptm.weights.preprocessing import preprocessing_error

# 1 had no "trained", and its hash left out what the constructor makes trainable and no more; 2 had no "peft_type",
# "task_type" and "base_model_name_or_path", and the whole path of a file in backbone.source;
# 3 had the temperature without a dimension, and no "multi_label"; 4 had no hash of the settings beside the tensors' own
SCHEMA_VERSION = 5
PEFT_TYPE, TASK_TYPE = "VPTM", "IMAGE_CLASSIFICATION"
TENSORS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# What every adapter has since a schema; what came within one, as "architecture" of a PromptedViT, may be missing.
_SINCE: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "": ("schema_version", "vptm_version", "backbone", "model", "class_names", "preprocessing", "extra"),
        "backbone": ("source", "architecture", "weight_hash", "unfrozen"),
        "model": (
            *("num_classes", "prompt_length", "prompt_mode", "prompt_dropout", "progressive_alpha", "readout"),
            *("train_lm_head", "verbalizer", "prototype_dim", "token_activation", "projection_bias", "temperature"),
            *("img_size", "pretrained"),
        ),
        "preprocessing": ("input_size", "mean", "std"),
    },
    2: {"": ("model_class", "trained"), "backbone": ("dtype",), "model": ("prompt_options",)},
    3: {"": ("peft_type", "task_type", "base_model_name_or_path"), "backbone": ("path",)},
    4: {"model": ("multi_label",)},
}
_OF_A_BEIT = ("mask_mode", "train_mask_token", "extra_bias", "vocab_size")
_ENTRIES = {name for since in _SINCE.values() for name in since.get("", ())}
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "background", "value_range")


def write_adapter(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files of an adapter, each by one rename.

    Args:
        folder: created where missing; an adapter in it is replaced.
        config: what `read_adapter_config` gives, without the versions.
        tensors: by name, of any device and layout.

    Raises:
        ValueError: what `read_adapter_config` would refuse, or values that are not finite as float32; nothing is
            written.
        TypeError: a config that is not JSON-able; nothing is written.
        WriteError: an OSError that names the file that cannot be written.
    """
    folder = Path(folder)
    # copies: tensors that share memory cannot be written
    tensors = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    check_values(tensors, dtype=torch.float32)  # what a model is opened in
    stated = {
        "schema_version": SCHEMA_VERSION,
        "peft_type": PEFT_TYPE,
        "task_type": TASK_TYPE,
        "base_model_name_or_path": config["backbone"]["source"],
        "vptm_version": __version__,
        **config,
    }
    text = json.dumps(stated, indent=2, allow_nan=False) + "\n"
    if wrong := _config_error(json.loads(text)):
        raise ValueError(one_line(f"model must be one that an adapter can hold: {wrong}"))
    # inside the tensor file, so one rename replaces both; one entry, because safetensors writes several in random order
    content = save(tensors, metadata={"vptm_hash": f"{weight_hash(tensors)} {settings_hash(json.loads(text))}"})
    make_folder(folder)
    write_atomically(folder / CONFIG_FILE, text)
    write_atomically(folder / TENSORS_FILE, content)


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
        config = read_json(path)
        version = config.get("schema_version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"{path} must have an integer schema_version, got {version!r}")
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema_version {version}, this vptm {__version__} reads up to {SCHEMA_VERSION}: "
                "update vptm"
            )
        if wrong := _config_error(config):
            raise ValueError(f"{path} {wrong}")
    return {"model_class": "PromptedBEiT"} | config  # the first adapters named no class


def _config_error(config: dict[str, Any]) -> str | None:
    """What of a config is missing or of another type, None where nothing is."""
    for section in ("backbone", "model"):
        if not isinstance(config.get(section), dict):
            return f"must have an object {section!r}, got {config.get(section)!r}"
    backbone, model, names = config["backbone"], config["model"], config.get("class_names")
    if missing := _missing(config):
        return f"must have {missing}, it is missing"
    if not isinstance(backbone.get("weight_hash"), str):
        return "must have the string backbone.weight_hash"
    if not isinstance(backbone.get("source"), str | None):
        return f"must have backbone.source as a string or null, got {backbone['source']!r}"
    if config["schema_version"] > 2:
        if config.get("peft_type") != PEFT_TYPE:
            return f"must have peft_type {PEFT_TYPE!r}, got {config.get('peft_type')!r}"
        if unknown := sorted(config.keys() - _ENTRIES):
            return f"must have no entry {unknown[0]!r}"
        path = backbone.get("path")
        if path is not None and (not isinstance(path, str) or os.path.isabs(path)):
            return f"must have backbone.path as a relative path or null, got {path!r}"
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
    return preprocessing_error(config["preprocessing"])


def _missing(config: Mapping[str, Any]) -> str | None:
    """The first entry that a config of its schema has and this one has not."""
    for version, sections in _SINCE.items():
        for section, names in sections.items() if version <= config["schema_version"] else ():
            held = config[section] if section else config
            if section == "model" and config.get("model_class", "PromptedBEiT") == "PromptedBEiT":
                names += _OF_A_BEIT
            for name in names if isinstance(held, Mapping) else ():  # of another type: said elsewhere
                if name not in held:
                    return f"{section}.{name}" if section else name
    return None


def with_one_element(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the temperature as (1,), as it is since schema 4, and not as the scalar it was before.

    Example:
        >>> with_one_element({"verbalizer.log_temperature": torch.tensor(0.5)})
        {'verbalizer.log_temperature': tensor([0.5000])}
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name == "verbalizer.log_temperature" and tensor.ndim == 0:
            found[name] = tensor.reshape(1)
    return found


class Stated(NamedTuple):
    """The hashes that stand with an adapter's tensors: of themselves, and since schema 5 of what they are for."""

    tensors: str | None
    settings: str | None


def settings_hash(config: Mapping[str, Any]) -> str:
    """Identity of the class and the settings of the model in a config: those of another function of the same tensors,
    as prompts of another kind, give another."""
    text = json.dumps([config.get("model_class"), config["model"]], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read_adapter_tensors(folder: str | Path) -> tuple[dict[str, Tensor], Stated]:
    """The tensors of an adapter by name, and the hashes that were written with them, for `check_adapter_tensors`; both
    as the present schema has them.

    Raises:
        ValueError: not a whole safetensors file.
    """
    tensors, metadata = read_safetensors(Path(folder) / TENSORS_FILE)
    stated, found = metadata.get("vptm_hash", ""), with_one_element(tensors)
    own, _, settings = stated.partition(" ")
    if any(found[name] is not tensor for name, tensor in tensors.items()) and own == weight_hash(tensors):
        own = weight_hash(found)
    return found, Stated(own or None, settings or None)


def check_adapter_tensors(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    stated: Stated,
    parameters: Mapping[str, Tensor],
    sourceless: Collection[str],
) -> None:
    """Refuse tensors that do not fit a model made from `config`, that are not as they were written, or that were
    written for other settings.

    Args:
        folder: of the adapter, for messages.
        config, tensors, stated: what `read_adapter_config` and `read_adapter_tensors` give.
        parameters: all of the model, by name.
        sourceless: names of those that no source gives, so that the adapter must.

    Raises:
        ValueError: naming what does not fit.
    """
    path = Path(folder) / TENSORS_FILE
    # a bias of no prompt columns was a parameter once
    empty = {name for name, tensor in tensors.items() if tensor.numel() == 0 and name not in parameters}
    try:
        unknown, missing = sorted(tensors.keys() - parameters.keys() - empty), sorted(set(sourceless) - tensors.keys())
        if unknown or missing:
            raise ValueError(
                f"learned tensors must be parameters of it: unknown {listed(unknown)}, missing {listed(missing)}"
            )
        if unknown := sorted(set(config.get("trained", ())) - parameters.keys() - empty):
            raise ValueError(f"trained must name parameters of it: unknown {listed(unknown)}")
        for name, tensor in ((name, tensors[name]) for name in tensors if name not in empty):
            if tensor.shape != parameters[name].shape:
                raise ValueError(f"{name} must have shape {tuple(parameters[name].shape)}, got {tuple(tensor.shape)}")
            check_values({name: tensor}, dtype=parameters[name].dtype)
    except ValueError as error:
        raise ValueError(f"{path} does not fit its config: {error}") from None
    if changed := changed_since(folder, config, tensors, stated):
        raise ValueError(changed)


def changed_since(
    folder: str | Path, config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], stated: Stated
) -> str | None:
    """What of an adapter is not as it was written, None where all is. config: None where it cannot be read."""
    if stated.tensors != weight_hash(tensors):
        return f"{Path(folder) / TENSORS_FILE} is damaged: its tensors do not have the hash written with them"
    if config is None or (stated.settings is None and config["schema_version"] < 5):
        return None
    if stated.settings != settings_hash(config):
        return (
            f"{Path(folder) / CONFIG_FILE} must have the model_class and model that its tensors were saved with, "
            "got others: change the model and save it again"
        )
    return None


def check_backbone_hash(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    source: str | None,
) -> None:
    """Refuse a backbone whose weights are not those that the adapter was trained on.

    Args:
        folder, config, tensors: of the adapter.
        frozen: what the model has from `source`.
        source: its name, None for a module.

    Raises:
        ValueError: with both hashes.
    """
    expected = config["backbone"]["weight_hash"]
    if config["schema_version"] > 1:
        kinds = config["backbone"]["dtype"]
        frozen = {
            name: tensor.to(getattr(torch, kinds if isinstance(kinds, str) else kinds.get(name, "float32")))
            for name, tensor in frozen.items()
            if name not in tensors
        }
    if expected != (found := weight_hash(frozen)):
        if source == config["backbone"].get("source") == "builtin":
            raise ValueError(
                f"the adapter {folder} was trained on the built-in model of another version of vptm, of weight hash "
                f"{expected[:19]}, this one comes with {found[:19]}: train it again, or pass those weights as source="
            )
        raise ValueError(
            f"backbone {source or 'object'} has weight hash {found[:19]}, the adapter {folder} was trained on "
            f"{expected[:19]} from {config['backbone'].get('source')}: pass the right weights as source="
        )
