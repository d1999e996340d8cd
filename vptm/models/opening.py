"""From a name, a file, a module or an adapter to the model that runs it: the one rule there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models.beit import Beit
from torch import Tensor, nn

from vptm.messages import hint, one_of
from vptm.models.prompted_beit import PromptedBEiT
from vptm.models.prompted_model import PromptedModel
from vptm.models.prompted_vit import PromptedViT
from vptm.settings import MODEL_SETTINGS, names
from vptm.weights.adapters import (
    CONFIG_FILE,
    TENSORS_FILE,
    check_adapter_tensors,
    check_backbone_hash,
    read_adapter_config,
    read_adapter_tensors,
)
from vptm.weights.backbones import is_timm_name
from vptm.weights.checkpoints import local_files_only
from vptm.weights.files import one_line_errors

_CLASSES: dict[str, type[PromptedModel]] = {"beit": PromptedBEiT, "classifier_beit": PromptedBEiT, "vit": PromptedViT}
MODEL_CLASSES = {kind.__name__: kind for kind in _CLASSES.values()}
"""Classes by the names that adapters know them by."""


def open_model(source: Any, num_classes: int, **settings: Any) -> PromptedModel:
    """The prompted model of any source, with defaults that its weights can serve.

    Masked-modelling weights become a `PromptedBEiT` that is read at its mask row (VPTM). A BEiT without mask token and
    token head, which timm's names and instances are, becomes one that is read at its class row by a linear verbalizer
    (VPT); so does every other timm name or instance, as a `PromptedViT`. A setting that is given goes before these
    defaults.

    Args:
        source: "builtin", a checkpoint file, a Hugging Face folder or id, a timm name, or a timm `Beit` or
            `VisionTransformer`; a registered timm name goes before a file of that name.
        num_classes: K.
        settings: keywords of the class, see `vptm.PromptedBEiT` and `vptm.PromptedViT`.

    Raises:
        TypeError: a setting that the class does not take, or a source of another type.
        ValueError: a setting outside its set, weights without what it needs, or a backbone that is not supported.
        FileNotFoundError: a path that does not exist.

    Example:
        >>> type(open_model("builtin", 10)).__name__
        'PromptedBEiT'
        >>> open_model("vit_tiny_patch16_224", 10, img_size=32, prompt_length=5).readout
        'cls'
    """
    kind = kind_of(source, settings.get("readout"))
    group = MODEL_SETTINGS[kind]
    if unknown := sorted(settings.keys() - set(names(group))):
        raise TypeError(f"open_model takes no {unknown[0]} for {group.whom}{hint(unknown[0], names(group))}")
    return _CLASSES[kind](source, num_classes, **group(**settings).keywords())


def kind_of(source: Any, readout: str | None = None) -> str:
    """The key of `vptm.settings.MODEL_SETTINGS` under which `source` stands; nothing is read for it.

    readout: the one asked for, where there is one: a BEiT that is read at a mask row has the defaults that go with it.

    Example:
        >>> kind_of("builtin"), kind_of("beit_base_patch16_224"), kind_of("deit_tiny_patch16_224")
        ('beit', 'classifier_beit', 'vit')
    """
    if isinstance(source, nn.Module):
        is_bare, is_beit = True, isinstance(source, Beit)
    else:
        is_bare = is_timm_name(source)
        is_beit = not is_bare or source.partition(".")[0] in timm.list_models(module="beit")
    if not is_beit:
        return "vit"
    return "classifier_beit" if is_bare and readout != "mask" else "beit"


def build(kind: str, source: Any, config: Mapping[str, Any], impl: str = "auto") -> PromptedModel:
    """A model of the class that `kind` names in `MODEL_CLASSES`, from `source` and a model's `config`."""
    # adapters of older versions name it, and it has no effect
    config = {name: value for name, value in config.items() if name != "prompt_location"}
    size = config.get("img_size")
    size = tuple(size) if isinstance(size, list) else size
    return MODEL_CLASSES[kind](source, **{**config, "img_size": size}, impl=impl)


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
    learned, stated_hash = read_adapter_tensors(folder)
    kind = config.get("model_class", "PromptedBEiT")
    one_of(f"model_class in {folder / CONFIG_FILE}", kind, tuple(MODEL_CLASSES))
    _check_claims(folder, config["model"], learned)
    try:
        if given is None:
            if config["model"].get("pretrained"):
                _refuse_download(source)
            with local_files_only():
                model = build(kind, source, config["model"], impl)
        else:
            model = build(kind, source, config["model"], impl)
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not fit {kind}: {error}") from None
    except (FileNotFoundError, ValueError) as error:
        if not isinstance(error, FileNotFoundError) and not (given is None and isinstance(error.__cause__, OSError)):
            raise
        raise FileNotFoundError(
            f"{error}; the adapter was trained on {recorded}: pass the backbone as source="
        ) from error
    return _completed(folder, model, config, learned, stated_hash)


def adapter_on(model: PromptedModel, folder: str | Path) -> PromptedModel:
    """`load_adapter` on the weights of `model`: its backbone, mask token and token head are shared, not read again.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`; a model of another class or image size.
    """
    with one_line_errors(folder):
        folder = Path(folder)
        config = read_adapter_config(folder)
        learned, stated_hash = read_adapter_tensors(folder)
        kind = config.get("model_class", "PromptedBEiT")
        if kind != type(model).__name__:
            raise ValueError(f"{folder / CONFIG_FILE} must have model_class {type(model).__name__!r}, got {kind!r}")
        try:
            found = build(kind, model.loaded(), {**config["model"], "img_size": None, "pretrained": False})
        except TypeError as error:
            raise ValueError(f"{folder / CONFIG_FILE} does not fit {kind}: {error}") from None
        found.config |= {name: config["model"][name] for name in ("img_size", "pretrained") if name in config["model"]}
        return _completed(folder, found, config, learned, stated_hash)


def _completed(
    folder: Path,
    model: PromptedModel,
    config: Mapping[str, Any],
    learned: Mapping[str, Tensor],
    stated_hash: str | None,
) -> PromptedModel:
    """A model as it was built, with what its adapter holds."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    check_adapter_tensors(folder, config, learned, stated_hash, parameters, model.learned_state_dict().keys())
    check_backbone_hash(config, learned, model._frozen_state(), model.source)
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


def _check_claims(folder: Path, config: Mapping[str, Any], learned: Mapping[str, Tensor]) -> None:
    """Refuse sizes beyond the values that an adapter holds before memory is taken for them."""
    held = sum(tensor.numel() for tensor in learned.values())
    options = config.get("prompt_options")
    widths = {
        "num_classes": None if config.get("verbalizer") == "linear" else config.get("prototype_dim"),
        "prompt_length": options.get("prompt_dim") if isinstance(options, dict) else None,
    }
    for name, width in widths.items():
        count = config.get(name)
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


def _fill(model: PromptedModel, learned: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
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
