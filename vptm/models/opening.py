"""From a name, a file, a module or an adapter to the model that runs it: the one rule there is."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from timm.layers import AttentionPoolLatent
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vptm.messages import hint, one_of
from vptm.models.adapter_loading import load
from vptm.models.prompted_beit import PromptedBEiT
from vptm.models.prompted_model import PromptedModel
from vptm.models.prompted_vit import PromptedViT
from vptm.settings import MODEL_SETTINGS, ViTSettings, names
from vptm.weights.adapter_format import CONFIG_FILE, read_adapter_config
from vptm.weights.beits import LoadedBackbone, is_timm_name, probe
from vptm.weights.containers import told_of
from vptm.weights.evas import is_eva
from vptm.weights.families import Told, family_of_timm
from vptm.weights.files import one_line_errors
from vptm.weights.vits import LoadedViT

_CLASSES: dict[str, type[PromptedModel]] = {
    kind: PromptedViT if issubclass(group, ViTSettings) else PromptedBEiT for kind, group in MODEL_SETTINGS.items()
}
MODEL_CLASSES = {kind.__name__: kind for kind in _CLASSES.values()}
"""Classes by the names that adapters know them by."""


def open_model(source: Any, num_classes: int, **settings: Any) -> PromptedModel:
    """The prompted model of any source, with defaults that its weights can serve.

    Masked-modelling weights become a `PromptedBEiT` that is read at its mask row (VPTM). A BEiT without a mask token,
    as a classifier's file and timm's names and instances are, becomes one that is read at its class row by a linear
    verbalizer (VPT); so do ViTs, as a `PromptedViT`: every other timm name or instance, EVA-02, DINOv3 and what else is
    of timm's `Eva` class included, and files and folders of their weights.
    One without a class token is read by the attention pooling that its source has (SigLIP), or the mean of its patches.
    A setting that is given goes before these defaults.

    Args:
        source: "builtin", a checkpoint file (`.pth`, `.safetensors`, Google's `.npz`), a Hugging Face folder or id, a
            timm name, or a timm `Beit`, `VisionTransformer` or `Eva`; a registered timm name goes before a file of that
            name.
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
    kind = kind_of(source, settings.get("readout"), settings.get("architecture"))
    group = MODEL_SETTINGS[kind]
    if unknown := sorted(settings.keys() - set(names(group))):
        raise TypeError(f"open_model takes no {unknown[0]} for {group.whom}{hint(unknown[0], names(group))}")
    return _CLASSES[kind](source, num_classes, **group(**settings).keywords())


def kind_of(source: Any, readout: str | None = None, architecture: str | None = None) -> str:
    """The key of `vptm.settings.MODEL_SETTINGS` under which `source` stands; of a file only names are read.

    readout: the one asked for, where there is one: a BEiT that is read at a mask row has the defaults that go with it.
    architecture: timm name of what a file holds, which tells more of it than its names do.

    Example:
        >>> kind_of("builtin"), kind_of("beit_base_patch16_224"), kind_of("deit_tiny_patch16_224")
        ('beit', 'classifier_beit', 'vit')
    """
    if isinstance(source, LoadedBackbone | LoadedViT):
        source = source.backbone
    if isinstance(source, nn.Module):
        told = _told_of_module(source)
    elif is_timm_name(source):
        name = source.partition(".")[0]
        family = family_of_timm(name)
        told = _told_of_module(probe(name)) if family == "vit" else Told(family or "vit")
    elif architecture is not None and is_eva(architecture):
        told = _told_of_module(probe(architecture.partition(".")[0]))
    else:
        found = told_of(source) if isinstance(source, str | PathLike) and source else None
        told = found or Told("beit", "mask")
    if told.family == "vit":
        return {"cls": "vit", "map": "pooled_vit", "mean": "classless_vit"}[told.readout]
    return "beit" if "mask" in (told.readout, readout) else "classifier_beit"


def _told_of_module(module: Any) -> Told:
    if not isinstance(module, VisionTransformer | Eva):
        return Told("beit" if isinstance(module, Beit) else "vit")
    pools = isinstance(module.attn_pool, AttentionPoolLatent)
    return Told("vit", "cls" if module.cls_token is not None else "map" if pools else "mean")


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
        config = read_adapter_config(folder)
        kind = config["model_class"]
        one_of(f"model_class in {Path(folder) / CONFIG_FILE}", kind, tuple(MODEL_CLASSES))
        model: PromptedModel = load(MODEL_CLASSES[kind], Path(folder), config, source, impl)
        return model
