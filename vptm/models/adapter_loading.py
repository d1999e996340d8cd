"""From the files of an adapter to a model: its backbone found, its weights checked, what was learned filled in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor

from vptm.models.adapter_saving import Saved, build
from vptm.models.claims import at_most
from vptm.weights.adapter_format import (
    CONFIG_FILE,
    TENSORS_FILE,
    Stated,
    check_adapter_tensors,
    check_backbone_hash,
    read_adapter_config,
    read_adapter_tensors,
)
from vptm.weights.containers import local_files_only
from vptm.weights.files import SUFFIXES, one_line_errors


def load(kind: type[Saved], folder: Path, config: Mapping[str, Any], source: Any = None, impl: str = "auto") -> Any:
    """The model of class `kind` that an adapter describes.

    Args:
        folder, config: of the adapter, as `read_adapter_config` gives it.
        source: backbone in place of the recorded one; or a folder of weight files, of which the one with the recorded
            hash is taken.
        impl: as in the model's class.

    Raises:
        FileNotFoundError, ValueError: as `vptm.load_adapter`.
    """
    recorded = config["backbone"].get("source")
    learned, stated = read_adapter_tensors(folder)
    check_claims(folder, config["model"], learned)
    if source is not None and (files := list(_weight_files(source))):
        return _of_the_same_hash(kind, folder, config, learned, stated, files, impl)
    if source is None and recorded is None:
        raise ValueError(f"{folder} was trained on a model object, not a file: pass the backbone as source=")
    try:
        if source is None:
            found = _recorded(folder, config["backbone"])
            if config["model"].get("pretrained"):
                _refuse_download(found)
            with local_files_only():
                model = _built(kind, found, config, learned, impl)
        else:
            model = _built(kind, source, config, learned, impl)
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not fit {kind.__name__}: {error}") from None
    except (FileNotFoundError, ValueError) as error:
        if not isinstance(error, FileNotFoundError) and not (source is None and isinstance(error.__cause__, OSError)):
            raise ValueError(f"{folder} does not open: {error}") from error
        raise FileNotFoundError(
            f"{error}; the adapter was trained on {recorded}: pass the backbone as source="
        ) from error
    return completed(folder, model, config, learned, stated)


def _recorded(folder: Path, backbone: Mapping[str, Any]) -> str:
    """Where the backbone of an adapter is now: the file it was, seen from the adapter, or one of its name beside it."""
    name, path = str(backbone["source"]), backbone.get("path")
    if path is None:
        return name
    for candidate in (Path(os.path.normpath(folder.resolve() / path)), folder / name, folder.parent / name):
        if os.path.exists(candidate):  # also where a name is too long to be one
            return str(candidate)
    raise FileNotFoundError(f"backbone not found: {name} (was at {path} from {folder})")


def _weight_files(source: Any) -> Iterator[Path]:
    """Files of weights in a folder that is none of Hugging Face's; none for any other source."""
    if not isinstance(source, str | Path) or (isinstance(source, str) and timm.is_model(source)):
        return
    place = Path(source)
    if place.is_dir() and not (place / "config.json").exists():
        yield from sorted(file for file in place.iterdir() if file.suffix in SUFFIXES)


def _of_the_same_hash(
    kind: type[Saved],
    folder: Path,
    config: Mapping[str, Any],
    learned: Mapping[str, Tensor],
    stated: Stated,
    files: list[Path],
    impl: str,
) -> Any:
    name = config["backbone"].get("source")
    reasons = []
    for file in sorted(files, key=lambda file: file.name != name):  # that of the recorded name first
        try:
            return completed(folder, _built(kind, file, config, learned, impl), config, learned, stated)
        except ValueError as error:
            reasons.append(f"{file.name}: {error}")
    raise ValueError(
        f"none of {len(files)} weight files in {files[0].parent} is the backbone of {folder}, of weight hash "
        f"{config['backbone']['weight_hash'][:19]}; {reasons[0]}"
    )


def load_on(model: Any, folder: str | Path) -> Any:
    """The model of an adapter on the weights of `model`: its backbone, mask token and token head are shared, not read
    again.

    Raises:
        FileNotFoundError, ValueError: as `vptm.load_adapter`; a model of another class or image size.
        RuntimeError: a model whose weights `freeze_for_inference` dropped.
    """
    model._refuse_dropped("another adapter on this model")
    with one_line_errors(folder):
        folder = Path(folder)
        config = read_adapter_config(folder)
        learned, stated = read_adapter_tensors(folder)
        kind = config["model_class"]
        if kind != type(model).__name__:
            raise ValueError(f"{folder / CONFIG_FILE} must have model_class {type(model).__name__!r}, got {kind!r}")
        check_claims(folder, config["model"], learned)
        try:
            plain = config | {"model": {**config["model"], "img_size": None, "pretrained": False}}
            own = _built(type(model), model.loaded(), plain, learned)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / CONFIG_FILE} does not fit {kind}: {error}") from None
        own.config |= {name: config["model"][name] for name in ("img_size", "pretrained") if name in config["model"]}
        found = completed(folder, own, config, learned, stated)
        if found.lm_head is not None and not any(name.startswith("lm_head.") for name in learned):
            found.lm_head = model.lm_head  # equal, as the hash says, and the largest part that is not on shared storage
        place = model.backbone.patch_embed.proj.weight.device
        found.prompts.to(place)
        found.verbalizer.to(place)
        if found.prompt_bias is not None:
            found.prompt_bias.data = found.prompt_bias.data.to(place)
        return found


def completed(
    folder: Path,
    model: Any,
    config: Mapping[str, Any],
    learned: Mapping[str, Tensor],
    stated: Stated,
) -> Any:
    """A model as it was built, with what its adapter holds."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    check_adapter_tensors(folder, config, learned, stated, parameters, model.learned_state_dict().keys())
    check_backbone_hash(folder, config, learned, model.frozen_state_dict(), model.source)
    _fill(model, {name: tensor for name, tensor in learned.items() if name in parameters}, config)
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


def _built(
    kind: type[Saved], source: Any, config: Mapping[str, Any], learned: Mapping[str, Tensor], impl: str = "auto"
) -> Any:
    """A model from `source` and a config, with no more to learn than its adapter holds."""
    with at_most(sum(tensor.numel() for tensor in learned.values())):
        return build(kind, source, config["model"], impl)


def check_claims(folder: Path, config: Mapping[str, Any], learned: Mapping[str, Tensor]) -> None:
    """Refuse sizes beyond the values that an adapter holds before its backbone is read; what depends on the depth and
    width of that is looked at when it is made, by `vptm.models.claims`."""
    held = sum(tensor.numel() for tensor in learned.values())
    options = config.get("prompt_options")
    widths = {
        "num_classes": None if config.get("verbalizer") == "linear" else config.get("prototype_dim"),
        "prompt_length": options.get("prompt_dim") if isinstance(options, dict) else None,
    }
    counts = {name: config.get(name) for name in widths}
    # a projection is made for no prompt, too
    counts["prompt_options.prompt_dim"], widths["prompt_options.prompt_dim"] = widths["prompt_length"], None
    if isinstance(codebook := config.get("codebook"), list) and len(codebook) == 2:
        counts["codebook"], widths["codebook"] = codebook
    for name, width in widths.items():
        count = counts[name]
        values = (count if type(count) is int else 0) * (width if type(width) is int else 1)
        if values > held:
            raise ValueError(
                f"{folder / CONFIG_FILE} must ask for at most the {held} values that {TENSORS_FILE} holds, "
                f"model.{name} asks for {values}"
            )


def _refuse_download(name: str) -> None:
    """timm fetches weights that are not on the hub by their address, whatever the hub's cache says."""
    cfg = get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None or cfg.hf_hub_id or not isinstance(cfg.url, str) or not cfg.url:
        return
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(cfg.url).path).name)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: its weights are not in {path.parent}")


def _fill(model: Saved, learned: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Copy what the adapter holds into `model`, and let require a gradient what did when it was saved."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = learned if config["schema_version"] == 1 else config["trained"]
    every = {name for name in parameters if name.startswith("backbone.")}
    if config["backbone"].get("unfrozen") and (config["schema_version"] > 1 or every <= learned.keys()):
        model.unfreeze()
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in learned)
    model.load_learned_state_dict(learned)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
