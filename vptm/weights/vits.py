"""ViT weights from timm, Google's .npz, MAE, MoCo-v3, DINO, DINOv2 and Hugging Face, under timm's parameter names.

`load_vit` reads any of them into a `timm.models.vision_transformer.VisionTransformer`. As with BEiTs
(`vptm.weights.beits`) nothing is guessed silently, a file that does not fit is refused in one line, and no file can
run code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import eva, get_pretrained_cfg, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vptm.frozen.sharing import shared_twin
from vptm.messages import error_line, hint, listed, one_line
from vptm.weights.beit_architecture import check_size, pair, window_of
from vptm.weights.beits import is_timm_name, probe, size_rows, with_outcome
from vptm.weights.configs import HUGGINGFACE_EPS, SourceFacts
from vptm.weights.containers import Checkpoint, read_checkpoint
from vptm.weights.evas import classes_of, dinov3_arguments, dinov3_tensors, eva_tensors, is_eva
from vptm.weights.families import family_of_names, is_dinov3, refuse_rotary
from vptm.weights.files import SUFFIXES, check_values, one_line_errors
from vptm.weights.key_maps import canonical_names, is_huggingface, unwrap
from vptm.weights.preprocessing import statistics
from vptm.weights.vit_architecture import VIT_EPS, arguments_of, resize_position, timm_names

BLOCKS = ("Block", "ResPostBlock", "ParallelScalingBlock", "DiffParallelScalingBlock", "ParallelThingsBlock")
EVA_BLOCKS = ("EvaBlock", "EvaBlockPostNorm")
# other heads than one linear, decoders and other towers: what a backbone does not need
_SURPLUS = re.compile(
    r"decoder|head\.(?!(weight|bias)$)|(dino|ibot)_head\.|predictor\.|momentum_encoder\.|pooler\.|pre_logits\.|"
    r"text_model\.|text_projection|logit_(scale|bias)$|.*position_ids$"
)
_VISUAL = "visual."
_CLIP_NAMES = re.compile(r"(^|\.)embeddings\.patch_embedding\.")
_RANDOM = "random weights: pretrained=True loads timm's"


@dataclass(frozen=True)
class ViTReport:
    """What was read and what was made of it; `vptm inspect` prints `lines()`.

    `format` is "timm", "jax" (Google's .npz), "moco-v3", "dinov2", "dinov3", "clip", "huggingface", "timm-name" or
    "module". `dropped` names what the source holds and the backbone does not need, `missing` is empty, as weights that
    lack something are refused, `resized` has the shapes of `pos_embed` before and after. `architecture` describes the
    backbone in plain values.
    """

    source: str
    format: str
    architecture: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[tuple[str, str]]:
        """(label, value) rows for a terminal; the label "note" may repeat."""
        arch = self.architecture
        lines = [
            ("source", self.source),
            ("format", self.format),
            *size_rows(arch, arch["mlp"], arch["layer_scale"]),
            ("rows before the patches", ", ".join(arch["prefix"]) or "none"),
            ("position", arch["position"]),
            ("final norm", arch["final_norm"]),
            ("LayerNorm eps", f"{arch['eps']:g}"),
            ("classifier", f"{arch['num_classes']} classes" if arch["num_classes"] else "none"),
        ]
        return with_outcome(lines, self)


@dataclass
class LoadedViT:
    """A backbone in eval mode, with the classifier of its source where that is one linear.

    mask_token: (1, 1, C) of weights pre-trained with one (DINOv2, EVA-02), else None. pretrained: False for random
    weights (a timm name with `pretrained=False`). default_cfg: preprocessing, as timm's.
    """

    backbone: VisionTransformer | Eva
    mask_token: Tensor | None
    pretrained: bool
    report: ViTReport
    default_cfg: dict[str, Any]


def load_vit(
    source: str | os.PathLike[str] | VisionTransformer | Eva | LoadedViT,
    *,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    architecture: str | None = None,
) -> LoadedViT:
    """Read ViT weights of any common origin into timm's `VisionTransformer`, or those of EVA-02, DINOv3 and what else
    timm builds as its `Eva` into that class.

    source: one of
      - a timm name of either class, with its tag where it has one: random weights, or with `pretrained=True` timm's;
      - a `.pth`, `.pt`, `.bin`, `.ckpt`, `.tar` or `.safetensors` file of timm, MAE, MoCo-v3, DINO, DINOv2 (with
        registers) or transformers, in the usual wrappers; of a DINO checkpoint the teacher is read;
      - Google's `.npz`;
      - a folder with `config.json` and weights, as transformers (ViT, ViTMAE, ViTMSN, DeiT, I-JEPA, DINOv2, CLIP,
        DINOv3, SigLIP) or timm save it, or the hub id of one;
      - a `VisionTransformer` or `Eva` instance, which stays as it is: the backbone is another module on its storage;
      - what this function gave, likewise.
    img_size: pixels, int or (height, width), multiples of the patch; `pos_embed` is resized by timm's
      `resample_abs_pos_embed`. None keeps the source's size. A file that states no size is taken to be square.
    pretrained: for a timm name, load timm's weights. Files always count as trained.
    architecture: timm name of what a file holds, where its tensors do not tell: number of heads, eps, activation. By
      default they are those of the published weights of that width, and the report says so. Files of EVA-02, DINOv3 and
      what else is timm's Eva class, under the names of timm or their repository, need it; DINOv3 of transformers does
      not.

    Weights are fp32 whatever the file stores (an instance keeps its dtype). A registered timm name wins over a file or
    folder of the same name; write "./name" for the latter.

    Raises FileNotFoundError for a path that is not there, TypeError for a source of another type, and ValueError, in
    one line, for everything that does not fit: see `vptm.load_backbone`.

    >>> load_vit("vit_tiny_patch16_224", img_size=(32, 48)).report.architecture["img_size"]
    (32, 48)
    """
    size = pair(img_size, "img_size") if img_size is not None else None
    with one_line_errors(source if isinstance(source, str) else type(source).__name__):
        return _load(source, size, pretrained, architecture)


def _load(source: Any, size: tuple[int, int] | None, pretrained: bool, architecture: str | None) -> LoadedViT:
    if isinstance(source, LoadedViT):
        own = tuple(source.backbone.patch_embed.img_size)
        if size not in (None, own):
            raise ValueError(f"img_size must be None or {own} for a loaded backbone, got {size}")
        return replace(source, backbone=shared_twin(source.backbone))
    named = isinstance(source, str) and is_timm_name(source)
    if architecture is not None and (named or isinstance(source, nn.Module)):
        raise ValueError(
            f"architecture must be None for a timm name or an instance, which have theirs, got {architecture!r}"
        )
    if isinstance(source, nn.Module):
        label = type(source).__name__
        check_backbone(source, label)
        if size is not None:
            raise ValueError(f"img_size must be None for an instance, which has its own size, got {size!r}")
        check_values(source.state_dict(), label, backbone=True)
        return _finished(shared_twin(source), label, "module", pretrained)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source must be a path, a timm name or a timm VisionTransformer or Eva, got {type(source).__name__}"
        )
    label = os.fspath(source)
    if named:
        return _from_timm_name(label, size, pretrained)
    checkpoint = read_checkpoint(source) if label else None
    if checkpoint is not None:
        return _from_checkpoint(checkpoint, label, size, architecture)
    if not isinstance(source, str) or Path(label).suffix in SUFFIXES or os.sep in label or "/" in label:
        raise FileNotFoundError(f"{label}: no such file or folder")
    known = timm.list_models(module="vision_transformer") + timm.list_models(module="eva")
    raise ValueError(
        f"source must be a file, a timm name or a timm VisionTransformer or Eva, got {label!r}"
        f"{hint(label.partition('.')[0], known)}"
    )


def check_backbone(backbone: nn.Module, label: str) -> None:
    """Refuse, by name, what is no VisionTransformer or Eva by its class, or is one that computes something else."""
    kind = Eva if isinstance(backbone, Eva) else VisionTransformer
    if not isinstance(backbone, kind):
        other = ": use PromptedBEiT" if type(backbone).__name__ == "Beit" else ""
        raise ValueError(
            f"PromptedViT runs timm's VisionTransformer and Eva classes, {label} is a {type(backbone).__name__}{other}"
        )
    for method in ("forward_features", "forward", "forward_intermediates"):
        if method in backbone.__dict__ or getattr(type(backbone), method) is not getattr(kind, method):
            own = type(backbone)
            if own is VisionTransformerDistilled and method not in backbone.__dict__:
                continue
            raise ValueError(
                f"PromptedViT runs what {kind.__name__}.{method} computes, {label} has a {method} of its own "
                f"({own.__name__})"
            )
    home, names = (eva, EVA_BLOCKS) if kind is Eva else (vision_transformer, BLOCKS)
    kinds = tuple(getattr(home, name) for name in names if hasattr(home, name))
    for block in backbone.blocks:
        if type(block) not in kinds:
            raise ValueError(f"PromptedViT runs blocks of {', '.join(names)}, {label} has {type(block).__name__}")
    if not isinstance(backbone.patch_drop, nn.Identity | None):
        raise ValueError(f"patch_drop_rate must be 0, {label} drops patches")


def _from_timm_name(label: str, size: tuple[int, int] | None, pretrained: bool) -> LoadedViT:
    model: Any = probe(label.partition(".")[0])
    check_backbone(model, label)
    asked = {}
    if size is not None:
        check_size(size, model.patch_embed.patch_size, label)
        asked["img_size"] = size
    try:
        backbone: Any = timm.create_model(label, pretrained=pretrained, **asked)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"{label}: timm could not build it: {error_line(error, first=True)}") from error
    check_values(backbone.state_dict(), label, backbone=True)
    return _finished(backbone, label, "timm-name", pretrained, notes=() if pretrained else (_RANDOM,))


def _from_checkpoint(
    checkpoint: Checkpoint, label: str, size: tuple[int, int] | None, architecture: str | None
) -> LoadedViT:
    raw, facts = checkpoint
    tensors, dropped = unwrap(raw, label)
    dropped += facts.dropped
    named = architecture or facts.timm_name
    if is_dinov3(tensors) or (named is not None and is_eva(named)):
        return _from_eva_tensors(
            tensors, dropped, facts, named, {} if architecture else facts.timm_arguments, label, size
        )
    refuse_rotary(tensors, label)
    if facts.family == "beit" or (facts.family is None and family_of_names(tensors) == "beit"):
        raise ValueError(f"{label}: must be a ViT, got a BEiT{_mark(tensors)}: use PromptedBEiT or vptm.open_model")
    huggingface, raw_names = is_huggingface(tensors), list(tensors)
    moco = any(key.startswith("base_encoder.") for key in tensors)
    if moco:
        dropped += [key for key in tensors if not key.startswith("base_encoder.")]
        tensors = {key.removeprefix("base_encoder."): one for key, one in tensors.items() if key not in set(dropped)}
    clip = any(key.startswith(_VISUAL) for key in tensors)
    if clip:
        if architecture is None and facts.timm_name is None:
            raise ValueError(
                f"{label}: architecture must be given for CLIP's own names (visual.*), which tell no activation; "
                "vit_base_patch16_clip_quickgelu_224 is of OpenAI, vit_base_patch16_clip_224 of OpenCLIP"
            )
        dropped += [key for key in tensors if not key.startswith(_VISUAL)]
        tensors = {key: value for key, value in tensors.items() if key.startswith(_VISUAL)}
    tensors = canonical_names(tensors, label)
    surplus = {key for key in tensors if _SURPLUS.match(key)}
    if any(key.startswith("decoder_") for key in surplus) and "mask_token" in tensors:
        surplus.add("mask_token")  # MAE's decoder has it, its encoder never saw one
    if any(key.startswith("pre_logits.") for key in surplus):
        surplus |= {"head.weight", "head.bias"} & tensors.keys()  # timm has no place for the layer between
    tensors = {key: value for key, value in tensors.items() if key not in surplus}
    dropped += sorted(surplus)
    dino = "register_tokens" in tensors or "mask_token" in tensors

    notes = list(facts.notes)
    check_values(tensors, label, backbone=True)
    stored = {str(value.dtype).removeprefix("torch.") for value in tensors.values()}
    if stored != {"float32"}:
        notes.append(f"stored as {', '.join(sorted(stored))}, loaded as float32")
    state, mask_token = timm_names({key: value.float() for key, value in tensors.items()}, label)
    dropped += _take_classifier(state)

    name, arguments = architecture or facts.timm_name, {} if architecture else facts.timm_arguments
    if name is None:
        if huggingface and facts.model_type is None and any(map(_CLIP_NAMES.search, raw_names)):
            raise ValueError(
                f"{label}: config.json must be beside weights of CLIP or SigLIP, or architecture be given: "
                "nothing else tells their activation and eps"
            )
        plain = huggingface and "blocks.0.ls1.gamma" not in state  # DINOv2 has another default than ViT
        eps = facts.eps or (HUGGINGFACE_EPS if plain else VIT_EPS)
        if facts.eps is None:
            notes.append(f"eps {eps:g}: the default of this format is assumed, nothing beside the weights states it")
        heads = 12 if moco and state.get("cls_token", torch.empty(0)).shape[-1:] == (384,) else None  # its ViT-S
        given = facts.architecture | ({"no_embed_class": True} if "register_tokens" in tensors else {})
        options, window = arguments_of(state, given, eps, facts.activation, heads, size, label, notes)
        kind = VisionTransformerDistilled if "dist_token" in state else VisionTransformer
        build: Callable[[], Any] = partial(kind, device="meta", **options)
    else:
        window, target = _window_of_name(state, name, arguments, facts, size, label)
        options = {**arguments, "num_classes": len(state["head.weight"]) if "head.weight" in state else 0}
        options["img_size"] = target
        build = partial(timm.create_model, name, device="meta", **options)
    backbone, resized = _fill(state, build, window, label)
    if resized:
        new = window_of(backbone.patch_embed.img_size, backbone.patch_embed.patch_size)
        notes.append(f"window {window[0]} x {window[1]} resized to {new[0]} x {new[1]} by timm's rule")
    form = facts.format or ("huggingface" if huggingface else "moco-v3" if moco else "clip" if clip else "timm")
    loaded = _finished(
        backbone, label, "dinov2" if form == "timm" and dino else form, True, tuple(dropped), resized, tuple(notes)
    )
    loaded.mask_token = mask_token
    return _with_preprocessing(loaded, facts, name, label, notes)


def _with_preprocessing(
    loaded: LoadedViT, facts: SourceFacts, name: str | None, label: str, notes: list[str]
) -> LoadedViT:
    """`loaded` with what its file, or timm's configuration of `name`, states of the pictures it was trained on."""
    backbone: Any = loaded.backbone
    stated = (facts.mean, facts.std), facts.stated_by
    known = get_pretrained_cfg(name) if name is not None and timm.is_model(name) else None
    if facts.mean is None and known is not None:
        stated = (known.mean, known.std), f"timm's configuration of {name}"
    mean, std, rule = statistics(*stated, Path(label).name, backbone.in_chans)
    size_now = tuple(backbone.patch_embed.img_size)
    loaded.default_cfg |= {
        "mean": mean,
        "std": std,
        "interpolation": facts.interpolation,
        "crop_pct": facts.crop_pct or (0.9 if max(size_now) < 384 else 1.0),
        "crop_mode": "center",
    }
    backbone.pretrained_cfg = backbone.default_cfg = dict(loaded.default_cfg)
    loaded.report = replace(loaded.report, mean=mean, std=std, notes=(*notes, rule))
    return loaded


def _from_eva_tensors(
    tensors: dict[str, Tensor],
    dropped: list[str],
    facts: SourceFacts,
    name: str | None,
    arguments: Mapping[str, Any],
    label: str,
    size: tuple[int, int] | None,
) -> LoadedViT:
    """Of timm's Eva class, whose tensors do not tell what turns them: `name` does, or for transformers' DINOv3 the
    config in `facts`."""
    dinov3, notes = is_dinov3(tensors), list(facts.notes)
    if dinov3:
        tensors = canonical_names(tensors, label)
        if "register_tokens" in tensors and not tensors["register_tokens"].numel():
            del tensors["register_tokens"]  # how transformers writes that there are none
    check_values(tensors, label, backbone=True)
    # not on the meta device: angles are kept in no file
    build: Callable[[], Any]
    if name is None:
        given = dinov3_arguments(tensors, facts, size, label, notes)
        check_size(given["img_size"], pair(given["patch_size"], f"{label}: patch_size"), label)
        build = partial(Eva, **given)
    else:
        empty = _without_memory(name, arguments, label)
        if not isinstance(empty, Eva):
            raise ValueError(
                f"{label}: architecture must be of timm's Eva class for DINOv3, such as vit_base_patch16_dinov3, "
                f"got {name}"
            )
        _check_stated(facts, empty, name, label)
        own = arguments.get("img_size") or facts.architecture.get("img_size")
        target = size or (pair(own, f"{label}: img_size") if own else None) or tuple(empty.patch_embed.img_size)
        check_size(target, tuple(empty.patch_embed.patch_size), label)
        given = {**arguments, "img_size": target, "num_classes": classes_of(tensors, empty.embed_dim)}
        build = partial(timm.create_model, name.partition(".")[0], **given)
    backbone = build()
    found = dinov3_tensors(tensors, facts, backbone, label) if dinov3 else eva_tensors(tensors, backbone, label)
    _check_tensors(found.state, backbone, label)
    backbone.load_state_dict(found.state)
    if found.resized:
        notes.append(f"positions resized to {' x '.join(map(str, backbone.patch_embed.grid_size))} by timm's rule")
    form = facts.format or ("huggingface" if dinov3 else "dinov3" if "storage_tokens" in tensors else "timm")
    loaded = _finished(backbone, label, form, True, (*dropped, *found.dropped), found.resized, tuple(notes))
    loaded.mask_token = found.mask_token
    return _with_preprocessing(loaded, facts, name, label, notes)


def _check_stated(facts: SourceFacts, model: Any, name: str, label: str) -> None:
    """Raise ValueError where a config beside the weights states other heads or another rotary base than `name` has."""
    rope: Any = getattr(model, "rope", None)
    for key, what, own in (
        ("num_heads", "heads", model.blocks[0].attn.num_heads),
        ("rope_temperature", "as rotary base", getattr(rope, "temperature", None)),
    ):
        stated = facts.architecture.get(key)
        if stated not in (None, own):
            raise ValueError(f"{label}: must have {stated} {what} (its config), architecture {name} has {own}")


def _without_memory(name: str, arguments: Mapping[str, Any], label: str) -> Any:
    """The timm model `name`, whose prompts can be learned, on the meta device."""
    base = name.partition(".")[0]
    try:
        model = timm.create_model(base, device="meta", **arguments) if arguments else probe(base)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        why = error_line(error, first=True)
        raise ValueError(f"{label}: config.json must have model_args that timm's {base} takes: {why}") from error
    check_backbone(model, f"{label}: {name}")
    return model


def _mark(tensors: Mapping[str, Tensor]) -> str:
    mark = next((key for key in tensors if family_of_names([key]) == "beit"), None)
    return "" if mark is None else f" ({one_line(mark)})"


def _take_classifier(state: dict[str, Tensor]) -> list[str]:
    """Leave a classifier in `state` where it is one linear of the pooled row, with its bias; what was taken out."""
    width = len(state["patch_embed.proj.weight"]) if "patch_embed.proj.weight" in state else 0
    weight = state.get("head.weight")
    if weight is not None and (weight.ndim != 2 or weight.shape[1] != width):
        return [key for key in ("head.weight", "head.bias") if state.pop(key, None) is not None]
    if weight is not None:
        state.setdefault("head.bias", weight.new_zeros(len(weight)))  # CLIP's projection has none
    elif "head.bias" in state:
        del state["head.bias"]
        return ["head.bias"]
    return []


def _window_of_name(
    state: dict[str, Tensor],
    name: str,
    arguments: Mapping[str, Any],
    facts: SourceFacts,
    size: tuple[int, int] | None,
    label: str,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The window of the positions in `state`, of the timm model `name`, and the size in pixels that is wanted."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        known = timm.list_models(module="vision_transformer")
        raise ValueError(f"{label}: architecture must be a timm name, got {name!r}{hint(base, known)}")
    model = _without_memory(name, arguments, label)
    _check_stated(facts, model, name, label)
    patch = tuple(model.patch_embed.patch_size)
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    own = arguments.get("img_size") or facts.architecture.get("img_size")
    target = size or (pair(own, f"{label}: img_size") if own else None) or tuple(model.patch_embed.img_size)
    check_size(target, patch, label)
    position = state.get("pos_embed")
    if position is None or position.ndim != 3:
        return window_of(target, patch), target
    side = round(max(position.shape[1] - prefix, 0) ** 0.5)
    for window in (window_of(target, patch), tuple(model.patch_embed.grid_size), (side, side)):
        if window[0] * window[1] + prefix == position.shape[1]:
            return (window[0], window[1]), target
    raise ValueError(
        f"{label}: img_size must be the (height, width) of the weights, whose window is not square, "
        f"got {position.shape[1]} positions with {prefix} before the patches"
    )


def _fill(
    state: dict[str, Tensor], build: Callable[[], Any], window: tuple[int, int], label: str
) -> tuple[Any, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """What `build` gives, filled with `state`, whose positions are of `window`; and what was resized."""
    try:
        # on the meta device: no time and no random numbers spent on values that are overwritten
        model = build()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{label}: timm cannot build what its tensors say: {error_line(error, first=True)}") from error
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    resized = resize_position(state, window, tuple(model.patch_embed.grid_size), prefix)
    _check_tensors(state, model, label)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model, resized


def _check_tensors(state: Mapping[str, Tensor], model: Any, label: str) -> None:
    """Raise ValueError unless `state` has every tensor of `model`, in its shape, and no other."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if unknown := [key for key in state if key not in expected]:
        raise ValueError(f"{label}: must have ViT tensors only, got unknown {listed(unknown)}")
    if missing := [key for key in expected if key not in state]:
        raise ValueError(
            f"{label}: must have all tensors of a ViT of {len(model.blocks)} blocks, missing {listed(missing)}"
        )
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise ValueError(f"{label}: {key} must have shape {shape}, got {tuple(state[key].shape)}")


def _finished(
    backbone: Any,
    label: str,
    form: str,
    pretrained: bool,
    dropped: tuple[str, ...] = (),
    resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    notes: tuple[str, ...] = (),
) -> LoadedViT:
    config = _preprocessing(backbone)
    report = ViTReport(
        source=label,
        format=form,
        architecture=_described(backbone),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        dropped=dropped,
        resized=resized or {},
        notes=notes,
    )
    return LoadedViT(backbone.eval(), None, pretrained, report, config)


def _described(backbone: Any) -> dict[str, Any]:
    """A VisionTransformer or an Eva in plain values, for people and for files."""
    first = backbone.blocks[0]
    attn, norm, mlp = getattr(first, "attn", None), getattr(first, "norm1", None), getattr(first, "mlp", None)
    prefix = ["class"] * (backbone.cls_token is not None) + ["distillation"] * hasattr(backbone, "dist_token")
    registers = 0 if backbone.reg_token is None else backbone.reg_token.shape[1]
    prefix += [f"{registers} registers"] * bool(registers)
    return {
        "img_size": tuple(backbone.patch_embed.img_size),
        "patch_size": tuple(backbone.patch_embed.patch_size),
        "in_chans": backbone.in_chans,
        "embed_dim": backbone.embed_dim,
        "depth": len(backbone.blocks),
        "num_heads": getattr(attn, "num_heads", 1),
        "mlp": mlp.fc2.in_features if isinstance(mlp, Mlp | GluMlp | SwiGLU) else type(mlp).__name__,
        "layer_scale": not isinstance(getattr(first, "ls1", nn.Identity()), nn.Identity)
        or getattr(first, "gamma_1", None) is not None,
        "prefix": prefix,
        "position": _position(backbone),
        "final_norm": "norm, on every token" if not isinstance(backbone.norm, nn.Identity) else _after(backbone),
        "eps": float(getattr(norm, "eps", VIT_EPS)),
        "num_classes": backbone.num_classes if isinstance(backbone.head, nn.Linear) else 0,
    }


def _position(backbone: Any) -> str:
    found = []
    if backbone.pos_embed is not None:
        found.append("absolute embedding" + (" of patches" if backbone.no_embed_class else ""))
    if getattr(backbone, "rope", None) is not None:
        found.append("rotary")
    return ", ".join(found) or "none"


def _after(backbone: Any) -> str:
    return "none" if isinstance(backbone.fc_norm, nn.Identity) else "fc_norm, after pooling"


def _preprocessing(backbone: Any) -> dict[str, Any]:
    """timm's preprocessing of this model at the size it has."""
    config = dict(resolve_model_data_config(backbone))
    channels = backbone.in_chans
    config["input_size"] = (channels, *backbone.patch_embed.img_size)
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (0.5,) * channels
    return config
