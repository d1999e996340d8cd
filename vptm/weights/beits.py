"""BEiT and BEiT v2 weights from unilm, timm, Hugging Face and vptm files, all under timm's parameter names.

`load_backbone` reads any of them into a `timm.models.beit.Beit` plus what timm's class has no place for: the mask token
and the head over visual tokens (`lm_head`). Nothing is guessed silently: whatever was dropped, absent, resized or
assumed stands in the report, and a file that does not fit is refused in one line. No file can run code: safetensors, or
`torch.load(weights_only=True)`.

BEiT: Bao et al. 2022, https://arxiv.org/abs/2106.08254. BEiT v2: Peng et al. 2022, https://arxiv.org/abs/2208.06366.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.mlp import Mlp, SwiGLU
from timm.layers.norm import LayerNorm
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vptm.frozen.sharing import shared_twin
from vptm.messages import WITH_PATHS, error_line, listed, one_line
from vptm.weights.beit_architecture import (
    architecture_of,
    check_family,
    check_size,
    mlp_ratio_of,
    mlp_width,
    norm_is_after_pooling,
    pair,
    resize_positions,
    take_token_head,
    window_of,
)
from vptm.weights.configs import HUGGINGFACE_EPS
from vptm.weights.containers import Checkpoint, is_something, read_checkpoint
from vptm.weights.families import TIMM_MODULES, is_dinov3, refuse_rotary
from vptm.weights.files import (
    SUFFIXES,
    check_values,
    one_line_errors,
)
from vptm.weights.key_maps import SURPLUS, WRAPPERS, canonical_names, is_huggingface, is_index, unwrap
from vptm.weights.preprocessing import statistics

_UNILM_EPS = 1e-6
_RANDOM = "random weights: pretrained=True loads timm's"


@dataclass(frozen=True)
class LoadReport:
    """What was read and what was made of it; `vptm inspect` prints `lines()`.

    `architecture` holds the keyword arguments that rebuild the `timm.models.beit.Beit` (with `num_classes=0` and a
    LayerNorm of `eps`), `img_size` after any resize. `format` is "vptm", "unilm", "timm", "huggingface", "timm-name" or
    "module". `dropped` names what the source holds and the backbone does not need, `missing` what it lacks of
    mask_token, lm_head.weight, lm_head.bias (and a segmentation file's final norm), `resized` the shapes of each
    position table before and after.
    """

    source: str
    format: str
    architecture: dict[str, Any]
    eps: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def lines(self) -> list[tuple[str, str]]:
        """(label, value) rows for a terminal; the label "note" may repeat."""
        arch = self.architecture
        position = [
            name
            for name, used in (
                ("absolute embedding", arch["use_abs_pos_emb"]),
                ("relative bias per block", arch["use_rel_pos_bias"]),
                ("relative bias shared by all blocks", arch["use_shared_rel_pos_bias"]),
            )
            if used
        ]
        lines = [
            ("source", self.source),
            ("format", self.format),
            *size_rows(arch, mlp_width(arch), bool(arch["init_values"])),
            ("position", ", ".join(position) or "none"),
            ("final norm", "fc_norm, after pooling" if norm_is_after_pooling(arch) else "norm, on every token"),
            ("LayerNorm eps", f"{self.eps:g}"),
        ]
        return with_outcome(lines, self)


@dataclass
class LoadedBackbone:
    """A backbone in eval mode with `num_classes=0`, and the parts of masked-token pre-training that timm's class lacks.

    mask_token: (1, 1, C) or None. lm_head: `nn.Linear(C, V)` with bias, or None. pretrained: False for random weights
    (a timm name with `pretrained=False`) and for an instance. default_cfg: preprocessing, as timm's.
    """

    backbone: Beit
    mask_token: Tensor | None
    lm_head: nn.Linear | None
    pretrained: bool
    report: LoadReport
    default_cfg: dict[str, Any]


def load_backbone(
    source: str | os.PathLike[str] | Beit | LoadedBackbone,
    *,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
) -> LoadedBackbone:
    """Read BEiT weights of any common origin into timm's `Beit`, with mask token and visual-token head where present.

    source: one of
      - "builtin": the small model that comes with vptm;
      - a timm name of the Beit class ("beitv2_base_patch16_224"): random weights, or timm's own with `pretrained=True`;
      - a `.pth`, `.pt`, `.bin`, `.ckpt` file (unilm pre-training or fine-tuned, timm or Hugging Face names) or a
        `.safetensors` file (vptm's own, or plain weights under any of those names);
      - a folder with `config.json` and weights, as Hugging Face's `save_pretrained` writes, or the hub id of one;
      - a `timm.models.beit.Beit` instance, which stays as it is: the backbone is another module on the same storage, in
        eval mode and without a classifier;
      - what this function gave: another module on the same storage, with the same mask token and token head.
    img_size: pixels, int or (height, width), multiples of the patch; position tables are resized by timm's rule
      (`timm.layers.resize_rel_pos_bias_table`, `resample_abs_pos_embed`). None keeps the source's size.
      A source that does not state its window (no config, no index buffer) is taken to be square where its position
      tables can be, as timm does.
    pretrained: for a timm name, load timm's weights; for an instance, says that its weights are trained. Files always
      count as trained.

    Weights are fp32 whatever the file stores (an instance keeps its dtype). A registered timm name wins over a file or
    folder of the same name; write "./name" for the latter. Loading draws no random numbers, except for random weights.

    Raises FileNotFoundError for a path that is not there, TypeError for a source of another type, and ValueError, one
    line of at most 500 characters, for an unknown name, a pipe or a device, a file that is truncated, differs from the
    checksums of its archive, holds code or belongs to another architecture, tensors that are missing, unknown or
    misshapen, NaN or infinite values, and an `img_size` that does not fit.

    >>> loaded = vptm.load_backbone("beit_base_patch16_224", img_size=64)
    >>> loaded.backbone.forward_features(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 17, 768])
    """
    size = pair(img_size, "img_size") if img_size is not None else None
    with one_line_errors(source if isinstance(source, str) else type(source).__name__):
        return _load(source, size, pretrained)


def _load(
    source: str | os.PathLike[str] | Beit | LoadedBackbone, size: tuple[int, int] | None, pretrained: bool
) -> LoadedBackbone:
    if isinstance(source, LoadedBackbone):
        own = source.backbone.patch_embed.img_size
        if size is not None and size != tuple(own):
            raise ValueError(f"img_size must be None or {tuple(own)} for a loaded backbone, got {size}")
        return replace(source, backbone=shared_twin(source.backbone), lm_head=copy.deepcopy(source.lm_head))
    if isinstance(source, nn.Module):
        if not isinstance(source, Beit):
            raise TypeError(f"PromptedBEiT runs timm's Beit class, the given module is a {type(source).__name__}")
        check_values(source.state_dict(), "timm Beit instance", backbone=True)
        return _from_module(shared_twin(source), "timm Beit instance", "module", size, pretrained)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a path, a name or a timm Beit instance, got {type(source).__name__}")

    label = os.fspath(source)
    if not label:
        raise ValueError("source must be a path, a name or a timm Beit instance, got an empty name")
    if is_timm_name(source):
        return _from_timm_name(label, size, pretrained)
    checkpoint = read_checkpoint(source)
    if checkpoint is not None:
        return _from_checkpoint(checkpoint, label, size)
    raise _not_there(source)


def check_is_there(source: Any) -> None:
    """Refuse a name or a path that is nothing, before anything is read; whatever is no name or path passes.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a name that neither vptm nor timm knows.

    Example:
        >>> check_is_there("weights.pth")
        Traceback (most recent call last):
        FileNotFoundError: weights.pth: no such file or folder
    """
    if isinstance(source, str | os.PathLike) and not (is_timm_name(source) or is_something(source)):
        raise _not_there(source)


def _not_there(source: str | os.PathLike[str]) -> Exception:
    label = os.fspath(source)
    if not isinstance(source, str) or Path(label).suffix in SUFFIXES or os.sep in label or "/" in label:
        return FileNotFoundError(f"{label}: no such file or folder")
    return ValueError(_unknown_name(label))


def _from_module(
    model: Beit, label: str, form: str, size: tuple[int, int] | None, pretrained: bool, notes: Iterable[str] = ()
) -> LoadedBackbone:
    first: Any = model.blocks[0]
    norms = [name for name in ("norm", "fc_norm") if isinstance(getattr(model, name), nn.LayerNorm)]
    if len(norms) != 1 or not isinstance(first.norm1, nn.LayerNorm):
        raise ValueError(
            f"{label}: must have LayerNorm blocks and exactly one final norm or fc_norm, got {norms or 'none'}"
        )
    own_size, patch = pair(model.patch_embed.img_size, label), tuple(model.patch_embed.patch_size)
    if size not in (None, own_size):
        raise ValueError(f"{label}: img_size must be {own_size}, or set_input_size called before, got {size}")
    architecture: dict[str, Any] = {
        "img_size": own_size,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "in_chans": model.patch_embed.proj.in_channels,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": first.attn.num_heads,
        "qkv_bias": first.attn.q_bias is not None,
        "mlp_ratio": mlp_ratio_of(first.mlp.fc2.in_features, model.embed_dim),
        "init_values": None if first.gamma_1 is None else float(first.init_values),
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_rel_pos_bias": first.attn.relative_position_bias_table is not None,
        "use_shared_rel_pos_bias": model.rel_pos_bias is not None,
    }
    if (norms == ["fc_norm"]) != (model.global_pool == "avg"):  # else what timm does by itself
        architecture["use_fc_norm"] = norms == ["fc_norm"]
    if isinstance(first.mlp, SwiGLU) or not isinstance(getattr(first.mlp, "norm", nn.Identity()), nn.Identity):
        architecture["swiglu_mlp"] = isinstance(first.mlp, SwiGLU)
        architecture["scale_mlp"] = not isinstance(first.mlp.norm, nn.Identity)
    elif not isinstance(first.mlp, Mlp):
        raise ValueError(f"{label}: must have timm's Mlp or SwiGLU in every block, got {type(first.mlp).__name__}")

    dropped = tuple(f"head.{name}" for name, _ in model.head.named_parameters())
    if dropped:
        model.reset_classifier(0)
    cfg = dict(getattr(model, "default_cfg", None) or {})
    name = cfg.get("architecture") or ""
    stated = cfg.get("mean"), cfg.get("std")
    mean, std, rule = statistics(stated, "timm's configuration of this model", name, architecture["in_chans"])
    report = LoadReport(
        source=label,
        format=form,
        architecture=architecture,
        eps=first.norm1.eps,
        mean=mean,
        std=std,
        dropped=dropped,
        missing=("mask_token", "lm_head.weight", "lm_head.bias"),
        notes=(*notes, *_norm_notes(architecture), rule),
    )
    config = _default_cfg(report, cfg.get("interpolation", "bicubic"), cfg.get("crop_pct"), name or "beit")
    return LoadedBackbone(model.eval(), None, None, pretrained, report, config)


def _from_timm_name(name: str, size: tuple[int, int] | None, pretrained: bool) -> LoadedBackbone:
    model_name, _, tag = name.partition(".")
    empty = probe(model_name)
    if not isinstance(empty, Beit):
        other = ": use PromptedViT" if isinstance(empty, VisionTransformer | Eva) else ""
        raise ValueError(
            f"{name}: PromptedBEiT runs timm's Beit class, {model_name} is a {type(empty).__name__}{other}"
        )
    tags = timm.list_pretrained(f"{model_name}.*")
    if tag and name not in tags:
        raise ValueError(f"{name}: pretrained tag must be one of {', '.join(tags)}")
    native, patch = pair(empty.patch_embed.img_size, name), tuple(empty.patch_embed.patch_size)
    size = size or native
    check_size(size, patch, name)
    if not pretrained:
        model = timm.create_model(name, num_classes=0, img_size=size)
        return _from_module(model, name, "timm-name", None, False, [_RANDOM])
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        why = error_line(error, first=True)
        raise ValueError(f"{name}: timm could not load its pretrained weights: {why}") from error
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    if size != native:
        state = model.state_dict()
        resized = resize_positions(state, window_of(native, patch), window_of(size, patch))
        model = timm.create_model(name, num_classes=0, img_size=size)
        model.load_state_dict(state)
    check_values(model.state_dict(), name, backbone=True)
    loaded = _from_module(model, name, "timm-name", None, True)
    loaded.report = replace(loaded.report, dropped=("head.weight", "head.bias"), resized=resized)
    return loaded


def report_of_name(name: str) -> LoadReport:
    """The report of a timm name of the Beit class, without making its weights."""
    empty: Any = timm.create_model(name, num_classes=0, device="meta")
    return _from_module(empty, name, "timm-name", None, False, [_RANDOM]).report


def is_timm_name(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a name that timm knows, and no file."""
    return isinstance(source, str) and timm.is_model(source) and Path(source).suffix not in SUFFIXES


def probe(model_name: str) -> nn.Module:
    """An instance to look at, without memory for its weights where timm can build it on the meta device."""
    try:
        return timm.create_model(model_name, device="meta")
    except (TypeError, RuntimeError, NotImplementedError):
        return timm.create_model(model_name)


def _unknown_name(name: str) -> str:
    known = [n for module in TIMM_MODULES for n in timm.list_models(module=module)]
    near = difflib.get_close_matches(
        name, ["builtin", *(n for n in known if not n.startswith("beit3"))], n=3, cutoff=0.5
    )
    such = "known names: builtin and timm's of BEiTs and ViTs, such as beitv2_base_patch16_224 and vit_base_patch16_224"
    return f"{name}: no such file, folder or timm model; {'nearest: ' + ', '.join(near) if near else such}"


def _from_checkpoint(checkpoint: Checkpoint, label: str, size: tuple[int, int] | None) -> LoadedBackbone:
    raw, facts = checkpoint
    tensors, dropped = unwrap(raw, label)
    wrapped = bool(dropped) or any(key in raw for key in WRAPPERS)
    huggingface = is_huggingface(tensors)
    refuse_rotary(tensors, label)
    if facts.family == "vit" or is_dinov3(tensors):
        kind = facts.timm_name or facts.model_type or facts.format or "dinov3_vit"
        raise ValueError(f"{label}: must be a BEiT, got a ViT ({kind}): use PromptedViT or vptm.open_model")
    state = canonical_names(tensors, label)
    check_family(state, label)

    notes = list(facts.notes)
    index = {key: state.pop(key) for key in list(state) if is_index(key)}
    key_bias = {key: state.pop(key) for key in list(state) if key.endswith(".attn.k_bias")}
    check_values(key_bias, label, backbone=True)
    used = [key for key, value in key_bias.items() if value.any()]
    if used:
        if not any("relative_position_bias_table" in key or "gamma_" in key for key in state):
            raise ValueError(
                f"{label}: must be a BEiT, got a plain ViT (it has key biases, BEiT has none): use PromptedViT"
            )
        notes.append(f"non-zero key bias of {len(used)} blocks dropped: the softmax over keys is invariant to it")
    surplus = {key: state.pop(key) for key in list(state) if SURPLUS.match(key)}
    dropped += [*index, *key_bias, *surplus]

    check_values(state, label, backbone=True)
    stored = {str(value.dtype).removeprefix("torch.") for value in state.values()}
    if stored != {"float32"}:
        notes.append(f"stored as {', '.join(sorted(stored))}, loaded as float32")
    state = {key: value.float() for key, value in state.items()}

    architecture, window = architecture_of(state, facts.architecture, index, size, label, notes)
    mask_token, lm_head, missing = take_token_head(state, architecture["embed_dim"], facts.vocab_size, label)
    if "norm.weight" in state and "fc_norm.weight" in state:
        raise ValueError(f"{label}: must have one final norm, got both norm and fc_norm")
    segments = any(key.startswith("decode_head.") for key in surplus)
    if not {"norm.weight", "fc_norm.weight"} & set(state) and (segments or facts.mean_pooling):
        # segmentation models and base models of transformers give un-normalised block outputs
        width = architecture["embed_dim"]
        state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        missing += ["norm.weight", "norm.bias"]
        what = "a segmentation file" if segments else "a base model that is pooled elsewhere"
        notes.append(f"{what} has no final norm: norm starts at weight 1 and bias 0")
    target = window_of(architecture["img_size"], architecture["patch_size"])
    resized = resize_positions(state, window, target)
    if resized:
        notes.append(f"window {window[0]} x {window[1]} resized to {target[0]} x {target[1]} by timm's rule")
    eps = facts.eps or (HUGGINGFACE_EPS if huggingface else _UNILM_EPS)
    if huggingface and facts.eps is None:
        notes.append(f"eps {eps:g}: Hugging Face's default is assumed, there is no config.json beside the file")
    backbone = _build(architecture, eps, state, label)

    if facts.format:
        form = facts.format
    elif huggingface:
        form = "huggingface"
    else:
        form = "unilm" if wrapped or index or mask_token is not None or lm_head is not None else "timm"
    in_chans = architecture["in_chans"]
    has_class_layers = any(key.startswith("cls_pt_") for key in surplus)
    mean, std, rule = statistics(
        (facts.mean, facts.std), facts.stated_by, Path(label).name, in_chans, has_class_layers=has_class_layers
    )
    report = LoadReport(
        source=label,
        format=form,
        architecture=architecture,
        eps=eps,
        mean=mean,
        std=std,
        dropped=tuple(dropped),
        missing=tuple(missing),
        resized=resized,
        notes=(*notes, *_norm_notes(architecture), rule),
    )
    config = _default_cfg(report, facts.interpolation, facts.crop_pct)
    return LoadedBackbone(backbone, mask_token, lm_head, True, report, config)


def _build(architecture: dict[str, Any], eps: float, state: dict[str, Tensor], label: str) -> Beit:
    # on the meta device first: no time and no random numbers spent on values that are overwritten
    norm: Any = partial(LayerNorm, eps=eps)
    model = Beit(num_classes=0, norm_layer=norm, device="meta", dtype=torch.float32, **architecture)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    unknown = [key for key in state if key not in expected]
    if unknown:
        raise ValueError(f"{label}: must have BEiT tensors only, got unknown {listed(unknown)}")
    missing = [key for key in expected if key not in state]
    if missing:
        raise ValueError(
            f"{label}: must have all tensors of a BEiT of {len(model.blocks)} blocks, missing {listed(missing)}"
        )
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise ValueError(f"{label}: {key} must have shape {shape}, got {tuple(state[key].shape)}")
    model.to_empty(device="cpu")
    for module in model.modules():
        init: Any = getattr(module, "init_non_persistent_buffers", None)
        if init is not None:
            init()
    model.load_state_dict(state)
    return model.eval()


def _default_cfg(report: LoadReport, interpolation: str, crop_pct: float | None, name: str = "beit") -> dict[str, Any]:
    size = report.architecture["img_size"]
    return {
        "architecture": name,
        "input_size": (report.architecture["in_chans"], *size),
        "mean": report.mean,
        "std": report.std,
        "interpolation": interpolation,
        "crop_pct": crop_pct or (0.9 if max(size) < 384 else 1.0),
        "crop_mode": "center",
        "fixed_input_size": True,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _norm_notes(architecture: Mapping[str, Any]) -> list[str]:
    if not norm_is_after_pooling(architecture):
        return []
    return ["no trained norm for single tokens: fc_norm, trained after pooling, is what there is for a cls or mask row"]


def size_rows(arch: Mapping[str, Any], mlp: int, scaled: bool) -> list[tuple[str, str]]:
    """Rows of a report: blocks and input of a vision transformer, by timm's names of its arguments."""
    (height, width), patch = arch["img_size"], arch["patch_size"]
    rows, columns = window_of(arch["img_size"], patch)
    blocks = f"{arch['depth']} blocks, {arch['embed_dim']} wide, {arch['num_heads']} heads of "
    blocks += f"{arch['embed_dim'] // arch['num_heads']}, MLP {mlp}, {'LayerScale' if scaled else 'no LayerScale'}"
    size = patch if isinstance(patch, int) else " x ".join(map(str, patch))
    return [
        ("architecture", blocks),
        ("input", f"{arch['in_chans']} x {height} x {width}, patch {size}, window {rows} x {columns}"),
    ]


def with_outcome(rows: list[tuple[str, str]], report: Any) -> list[tuple[str, str]]:
    """Rows of a `LoadReport` or `ViTReport`, followed by what was made of the source; names and notes are the file's
    own, so each is made one line."""
    rows = [
        *rows,
        ("mean / std", f"{numbers(report.mean)} / {numbers(report.std)}"),
        ("dropped", folded_names(report.dropped)),
        ("missing", folded_names(report.missing)),
        ("resized", resized_names(report.resized or {})),
        *(("note", note) for note in report.notes),
    ]
    return [(label, one_line(value, WITH_PATHS)) for label, value in rows]


def numbers(values: Iterable[float]) -> str:
    """Numbers as a row of a report has them."""
    return ", ".join(f"{v:g}" for v in values)


def folded_names(names: Iterable[str]) -> str:
    """Names with block numbers folded: `blocks.*.attn.relative_position_index (12)`."""
    folded: dict[str, int] = {}
    for name in names:
        key = re.sub(r"\.\d+\.", ".*.", name)
        key = re.sub(r"^(cls_pt_layers|decode_head|auxiliary_head)\..*", r"\1.*", key)
        folded[key] = folded.get(key, 0) + 1
    return ", ".join(f"{key} ({count})" if count > 1 else key for key, count in folded.items()) or "nothing"


def resized_names(resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """Names of what was resized, block numbers folded, with the shapes before and after."""
    shapes = {}
    for name, (old, new) in resized.items():
        shapes[re.sub(r"\.\d+\.", ".*.", name)] = f"{old} to {new}"
    return ", ".join(f"{name} {text}" for name, text in shapes.items()) or "nothing"
