"""BEiT and BEiT v2 weights from unilm, timm, Hugging Face and vptm files, all under timm's parameter names.

`load_backbone` reads any of them into a `timm.models.beit.Beit` plus what timm's class has no place for: the mask token
and the head over visual tokens (`lm_head`). Nothing is guessed silently: whatever was dropped, absent, resized or
assumed stands in the report, and a file that does not fit is refused in one line. No file can run code: safetensors, or
`torch.load(weights_only=True)`.

BEiT: Bao et al. 2022, https://arxiv.org/abs/2106.08254. BEiT v2: Peng et al. 2022, https://arxiv.org/abs/2208.06366.
"""

from __future__ import annotations

import difflib
import importlib.resources
import inspect
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.mlp import Mlp, SwiGLU
from timm.layers.norm import LayerNorm
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models.beit import Beit, gen_relative_position_index
from torch import Tensor, nn

from vptm.data.pictures import check_picture_options
from vptm.frozen.sharing import shared_twin
from vptm.messages import error_line
from vptm.weights.files import (
    SUFFIXES,
    TORCH_SUFFIXES,
    check_values,
    one_line_errors,
    read_json,
    read_safetensors,
    read_torch,
)

__all__ = ["LoadReport", "LoadedBackbone", "canonical_state_dict", "load_backbone"]

_UNILM_EPS = 1e-6
_HUGGINGFACE_EPS = 1e-12
_HALF = (0.5, 0.5, 0.5)
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_ID = re.compile(r"(?:hf[-_]hub:)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")
_WRAPPERS = ("model", "module", "state_dict")  # unilm; DeepSpeed; mmsegmentation: they also nest
_PREFIXES = ("_orig_mod.", "module.", "backbone.")  # torch.compile; DistributedDataParallel; mmsegmentation
_TRAINING_STATE = re.compile(
    r"optimizer|lr_scheduler|scheduler|scaler|epoch|iteration|step|args|meta|best_\w+|model_ema"
)
_DROPPABLE = re.compile(r"cls_pt_|head\.|decode_head\.|auxiliary_head\.|fpn\d\.")

_HF_MARK = "embeddings.patch_embeddings.projection."
_HF_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "encoder.relative_position_bias.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
    "encoder.relative_position_bias.relative_position_index": "rel_pos_bias.relative_position_index",
    "shared_position_bias.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
    "pooler.layernorm.weight": "fc_norm.weight",
    "pooler.layernorm.bias": "fc_norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_HF_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)")
_HF_QKV = re.compile(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)")
_HF_LEAF = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(?:attention\.(?:attention\.)?)?relative_position_bias\.", "attn."),
        (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
        (r"layernorm_before\.", "norm1."),
        (r"layernorm_after\.", "norm2."),
        (r"lambda_", "gamma_"),
        (r"(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
        (r"(?:output\.dense|mlp\.fc2)\.", "mlp.fc2."),
    )
)
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of PIL's Resampling
_CROP_MODES = ("center", "squash", "border")  # timm's
_HF_INTERPOLATION = {str(number): name for number, name in enumerate(_INTERPOLATIONS)}


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
        height, width = arch["img_size"]
        rows, columns = _window(arch["img_size"], arch["patch_size"])
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
            (
                "architecture",
                f"{arch['depth']} blocks, {arch['embed_dim']} wide, {arch['num_heads']} heads of "
                f"{arch['embed_dim'] // arch['num_heads']}, MLP {_mlp_width(arch)}"
                + (", LayerScale" if arch["init_values"] else ", no LayerScale"),
            ),
            (
                "input",
                f"{arch['in_chans']} x {height} x {width}, patch {arch['patch_size']}, window {rows} x {columns}",
            ),
            ("position", ", ".join(position) or "none"),
            ("final norm", "fc_norm, after pooling" if arch["use_fc_norm"] else "norm, on every token"),
            ("LayerNorm eps", f"{self.eps:g}"),
            ("mean / std", f"{_join(self.mean)} / {_join(self.std)}"),
            ("dropped", _summary(self.dropped)),
            ("missing", _summary(self.missing)),
            ("resized", _resize_summary(self.resized)),
        ]
        return lines + [("note", note) for note in self.notes]


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


@dataclass
class _Facts:
    """What a source says about itself beyond its tensors; the shapes must confirm `stated`, Beit keyword arguments."""

    format: str | None = None
    eps: float | None = None
    stated: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    statistics_from: str = "the file"
    interpolation: str = "bicubic"
    crop_pct: float | None = None
    notes: list[str] = field(default_factory=list)


def load_backbone(
    source: str | os.PathLike[str] | Beit, *, img_size: int | tuple[int, int] | None = None, pretrained: bool = False
) -> LoadedBackbone:
    """Read BEiT weights of any common origin into timm's `Beit`, with mask token and visual-token head where present.

    source: one of
      - "builtin": the small model that comes with vptm;
      - a timm name of the Beit class ("beitv2_base_patch16_224"): random weights, or timm's own with `pretrained=True`;
      - a `.pth`, `.pt`, `.bin`, `.ckpt` file (unilm pre-training or fine-tuned, timm or Hugging Face names) or a
        `.safetensors` file (vptm's own, or plain weights under any of those names);
      - a folder with `config.json` and weights, as Hugging Face's `save_pretrained` writes, or the hub id of one;
      - a `timm.models.beit.Beit` instance, which stays as it is: the backbone is another module on the same storage, in
        eval mode and without a classifier.
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
    size = _pair(img_size, "img_size") if img_size is not None else None
    with one_line_errors(source if isinstance(source, str) else type(source).__name__):
        return _load(source, size, pretrained)


@contextmanager
def local_files_only() -> Iterator[None]:
    """Read names of the Hugging Face hub from the local cache alone; a name that is not there is not found.

    The flag is the one that HF_HUB_OFFLINE=1 sets for a whole process; timm passes no argument on to the hub.
    """
    try:
        from huggingface_hub import constants
    except ImportError:  # then nothing here can reach the hub
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def preprocessing_error(config: Any) -> str | None:
    """What is wrong with a "preprocessing" read from JSON, None where `vptm.transforms` can follow it."""
    if not isinstance(config, dict):
        return f"must have preprocessing as an object, got {config!r}"
    size = config.get("input_size", [1, 1, 1])
    if not isinstance(size, list) or len(size) != 3 or any(type(edge) is not int or edge < 1 for edge in size):
        return f"must have preprocessing.input_size as (channels, height, width), got {size!r}"
    try:
        for name in ("mean", "std"):
            count = len(_floats(config[name], name, "")) if name in config else size[0]
            if "input_size" in config and count != size[0]:
                return f"must have preprocessing.{name} of {size[0]} channels, got {config[name]!r}"
        if "interpolation" in config:
            _interpolation(config["interpolation"], "")
        if "crop_pct" in config:
            _share(config["crop_pct"], "crop_pct", "")
    except ValueError as error:
        return f"must have a usable preprocessing{error}"
    try:
        check_picture_options(config.get("background"), config.get("value_range"))
    except ValueError as error:
        return f"must have a usable preprocessing: {error}"
    if (mode := config.get("crop_mode", "center")) not in _CROP_MODES:
        return f"must have preprocessing.crop_mode as one of {', '.join(_CROP_MODES)}, got {mode!r}"
    known = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "background", "value_range"}
    unknown = set(config) - known
    return f"must have a preprocessing without {sorted(unknown)[0]!r}" if unknown else None


def _load(source: str | os.PathLike[str] | Beit, size: tuple[int, int] | None, pretrained: bool) -> LoadedBackbone:
    if isinstance(source, nn.Module):
        if not isinstance(source, Beit):
            raise TypeError(f"PromptedBEiT runs timm's Beit class, the given module is a {type(source).__name__}")
        return _from_module(shared_twin(source), "timm Beit instance", "module", size, pretrained)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a path, a name or a timm Beit instance, got {type(source).__name__}")

    label = os.fspath(source)
    if isinstance(source, str):
        if source == "builtin":
            with importlib.resources.as_file(
                importlib.resources.files("vptm") / "assets" / "builtin.safetensors"
            ) as path:
                if not path.is_file():
                    raise FileNotFoundError(
                        "builtin: vptm is installed without its built-in model, assets/builtin.safetensors"
                    )
                return _from_file(path, label, size)
        if timm.is_model(source) and Path(source).suffix not in SUFFIXES:
            return _from_timm_name(source, size, pretrained)

    path = Path(label).expanduser()
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # not there, or no path at all: a name too long, a null byte
        mode = 0
    if stat.S_ISDIR(mode):
        return _from_folder(path, label, size)
    if mode:
        if not stat.S_ISREG(mode):
            raise ValueError(f"{label}: must be a file or a folder, got a pipe, a socket or a device")
        return _from_file(path, label, size)
    hub_id = _HUB_ID.fullmatch(label) if isinstance(source, str) else None
    if hub_id and path.suffix not in SUFFIXES and not os.path.exists(path.parts[0]):
        return _from_folder(_download(hub_id[1], label), label, size)
    if not isinstance(source, str) or path.suffix in SUFFIXES or os.sep in label or "/" in label:
        raise FileNotFoundError(f"{label}: no such file or folder")
    raise ValueError(_unknown_name(label))


def canonical_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a unilm, timm or Hugging Face (transformers 4 or 5 names) BEiT checkpoint under timm's names.

    Unwraps `model`, `module`, `state_dict` and the prefixes `module.`, `backbone.`; joins query, key and value weights
    into `blocks.i.attn.qkv.weight` with `q_bias` and `v_bias`. Left out: `relative_position_index` buffers, and key
    biases, to which the softmax is invariant. `mask_token`, `lm_head.*`, `head.*`, `cls_pt_layers.*` and unknown names
    pass through; dtype and values do not change. Raises ValueError where two keys mean the same parameter or a block
    lacks its query, key or value.
    """
    tensors, _ = _unwrap(state, "state dict")
    return {
        k: v for k, v in _rename(tensors, "state dict").items() if not _is_index(k) and not k.endswith("attn.k_bias")
    }


def _from_module(
    model: Beit, label: str, form: str, size: tuple[int, int] | None, pretrained: bool, notes: Iterable[str] = ()
) -> LoadedBackbone:
    first: Any = model.blocks[0]
    norms = [name for name in ("norm", "fc_norm") if isinstance(getattr(model, name), nn.LayerNorm)]
    if len(norms) != 1 or not isinstance(first.norm1, nn.LayerNorm):
        raise ValueError(
            f"{label}: must have LayerNorm blocks and exactly one final norm or fc_norm, got {norms or 'none'}"
        )
    own_size, patch = _pair(model.patch_embed.img_size, label), tuple(model.patch_embed.patch_size)
    if size not in (None, own_size):
        raise ValueError(f"{label}: img_size must be {own_size}, or set_input_size called before, got {size}")
    check_values(model.state_dict(), label, backbone=True)
    architecture: dict[str, Any] = {
        "img_size": own_size,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "in_chans": model.patch_embed.proj.in_channels,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": first.attn.num_heads,
        "qkv_bias": first.attn.q_bias is not None,
        "mlp_ratio": _mlp_ratio(first.mlp.fc2.in_features, model.embed_dim),
        "init_values": None if first.gamma_1 is None else float(first.init_values),
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_rel_pos_bias": first.attn.relative_position_bias_table is not None,
        "use_shared_rel_pos_bias": model.rel_pos_bias is not None,
        "use_fc_norm": norms == ["fc_norm"],
    }
    if isinstance(first.mlp, SwiGLU) or not isinstance(getattr(first.mlp, "norm", nn.Identity()), nn.Identity):
        architecture["swiglu_mlp"] = isinstance(first.mlp, SwiGLU)
        architecture["scale_mlp"] = not isinstance(first.mlp.norm, nn.Identity)
    elif not isinstance(first.mlp, Mlp):
        raise ValueError(f"{label}: must have timm's Mlp or SwiGLU in every block, got {type(first.mlp).__name__}")

    dropped = tuple(f"head.{name}" for name, _ in model.head.named_parameters())
    if dropped:
        model.reset_classifier(0)
    cfg = dict(getattr(model, "default_cfg", None) or {})
    facts = _Facts(
        statistics_from="timm's configuration of this model",
        mean=cfg.get("mean"),
        std=cfg.get("std"),
        interpolation=cfg.get("interpolation", "bicubic"),
        crop_pct=cfg.get("crop_pct"),
    )
    mean, std, rule = _statistics(facts, cfg.get("architecture") or "", False, architecture["in_chans"])
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
    return LoadedBackbone(
        model.eval(), None, None, pretrained, report, _default_cfg(report, facts, cfg.get("architecture"))
    )


def _from_timm_name(name: str, size: tuple[int, int] | None, pretrained: bool) -> LoadedBackbone:
    model_name, _, tag = name.partition(".")
    probe = _probe(model_name)
    if not isinstance(probe, Beit):
        raise ValueError(f"{name}: PromptedBEiT runs timm's Beit class, {model_name} is a {type(probe).__name__}")
    tags = timm.list_pretrained(f"{model_name}.*")
    if tag and name not in tags:
        raise ValueError(f"{name}: pretrained tag must be one of {', '.join(tags)}")
    native, patch = _pair(probe.patch_embed.img_size, name), tuple(probe.patch_embed.patch_size)
    size = size or native
    _check_size(size, patch, name)
    if not pretrained:
        model = timm.create_model(name, num_classes=0, img_size=size)
        return _from_module(model, name, "timm-name", None, False, ["random weights: pretrained=True loads timm's"])
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        why = error_line(error, first=True)
        raise ValueError(f"{name}: timm could not load its pretrained weights: {why}") from error
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    if size != native:
        state = model.state_dict()
        resized = _resize(state, _window(native, patch), _window(size, patch))
        model = timm.create_model(name, num_classes=0, img_size=size)
        model.load_state_dict(state)
    loaded = _from_module(model, name, "timm-name", None, True)
    loaded.report = replace(loaded.report, dropped=("head.weight", "head.bias"), resized=resized)
    return loaded


def _probe(model_name: str) -> nn.Module:
    """An instance to look at, without memory for its weights where timm can build it on the meta device."""
    try:
        return timm.create_model(model_name, device="meta")
    except (TypeError, RuntimeError, NotImplementedError):
        return timm.create_model(model_name)


def _unknown_name(name: str) -> str:
    known = ["builtin", *timm.list_models(module="beit")]
    beit = [n for n in known if not n.startswith("beit3")]
    near = difflib.get_close_matches(name, beit, n=3, cutoff=0.5)
    expected = f"nearest: {', '.join(near)}" if near else f"known names: {', '.join(beit)}"
    return f"{name}: no such file, folder or timm model; {expected}"


def _download(repo: str, label: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{label}: no such folder; to download it from the Hugging Face hub, pip install 'vptm[hf]'"
        ) from error
    configs = ["config.json", "preprocessor_config.json"]
    try:
        folder = Path(
            snapshot_download(repo, allow_patterns=[*configs, "model*.safetensors", "model.safetensors.index.json"])
        )
        if not any((folder / name).exists() for name in _WEIGHT_FILES):
            folder = Path(
                snapshot_download(repo, allow_patterns=[*configs, "pytorch_model*.bin", "pytorch_model.bin.index.json"])
            )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{label}: no such folder, and the Hugging Face hub did not give it: {error_line(error, first=True)}"
        ) from error
    return folder


def _from_file(path: Path, label: str, size: tuple[int, int] | None) -> LoadedBackbone:
    facts = _Facts()
    state: Mapping[str, Any]
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path, label)
        if metadata.get("format") == "vptm":
            facts = _vptm_facts(metadata, label)
    elif path.suffix in TORCH_SUFFIXES:
        state = read_torch(path, label)
    else:
        raise ValueError(
            f"{label}: must be a file ending in {', '.join(sorted(SUFFIXES))}, got {path.suffix or 'no suffix'}"
        )
    config = path.with_name("config.json")
    if facts.format is None and config.is_file() and any(_HF_MARK in key for key in _unwrap(state, label)[0]):
        facts = _folder_facts(config, label)
    return _from_state(state, facts, label, size)


def _from_folder(folder: Path, label: str, size: tuple[int, int] | None) -> LoadedBackbone:
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{label}: must be a Hugging Face folder with config.json, got none in it")
    facts = _folder_facts(config, label)
    name = next((name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"{label}: must have weights beside config.json, one of {', '.join(_WEIGHT_FILES)}")
    names = [name]
    if name.endswith(".index.json"):
        shards = read_json(folder / name, label).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and s == Path(s).name for s in shards.values()):
            raise ValueError(f"{label}: {name} must have weight_map, tensor names to file names in the folder")
        names = sorted(set(shards.values()))
    state: dict[str, Any] = {}
    for part in names:
        if not (folder / part).is_file():
            raise ValueError(f"{label}: {name} names {part}, which is not in the folder")
        file = folder / part
        state.update(read_safetensors(file, label)[0] if file.suffix == ".safetensors" else read_torch(file, label))
    return _from_state(state, facts, label, size)


def _vptm_facts(metadata: Mapping[str, str], label: str) -> _Facts:
    try:
        stated = json.loads(metadata["vptm"])
        architecture = dict(stated["architecture"])
        for key in ("mlp_ratio", "init_values"):
            if key in architecture and (key == "mlp_ratio" or architecture[key] is not None):
                architecture[key] = _number(architecture[key], key, label)
        facts = _Facts(
            format="vptm",
            eps=_number(stated["eps"], "eps", label),
            stated={k: tuple(v) if isinstance(v, list) else v for k, v in architecture.items()},
            vocab_size=stated.get("vocab_size"),
            mean=_floats(stated["mean"], "mean", label),
            std=_floats(stated["std"], "std", label),
            interpolation=_interpolation(stated.get("interpolation", "bicubic"), label),
            crop_pct=_share(stated.get("crop_pct", 1.0), "crop_pct", label),
            notes=[str(stated["description"])] if stated.get("description") else [],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{label}: the vptm metadata must have architecture, eps, mean and std: {error!r}") from error
    unknown = sorted(set(architecture) - set(inspect.signature(Beit.__init__).parameters))
    channels = architecture.get("in_chans", 3)
    if len(facts.mean or ()) != channels or len(facts.std or ()) != channels:
        raise ValueError(f"{label}: must have mean and std of {channels} channels, got {facts.mean} and {facts.std}")
    if unknown:
        raise ValueError(
            f"{label}: architecture must have keyword arguments of timm's Beit only, got {', '.join(unknown)}"
        )
    return facts


def _folder_facts(path: Path, label: str) -> _Facts:
    config = read_json(path, label)
    if "model_type" not in config and isinstance(config.get("pretrained_cfg"), dict):
        return _timm_folder_facts(config["pretrained_cfg"], label)
    if config.get("model_type") != "beit":
        raise ValueError(f"{label}: config.json must have model_type beit, got {config.get('model_type')!r}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{label}: config.json must have hidden_act gelu, got {config['hidden_act']!r}")

    def whole(key: str, default: int) -> int:
        value = config.get(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{label}: config.json {key} must be a positive integer, got {value!r}")
        return value

    width, scale = whole("hidden_size", 768), config.get("layer_scale_init_value", 0.1)
    patch = _pair(config.get("patch_size", 16), f"{label}: config.json patch_size")
    facts = _Facts(
        format="huggingface",
        eps=_number(config.get("layer_norm_eps", _HUGGINGFACE_EPS), "layer_norm_eps", label),
        vocab_size=whole("vocab_size", 8192),
        stated={
            "img_size": _pair(config.get("image_size", 224), f"{label}: config.json image_size"),
            "patch_size": patch[0] if patch[0] == patch[1] else patch,
            "in_chans": whole("num_channels", 3),
            "embed_dim": width,
            "depth": whole("num_hidden_layers", 12),
            "num_heads": whole("num_attention_heads", 12),
            "mlp_ratio": _mlp_ratio(whole("intermediate_size", 3072), width),
            "init_values": _number(scale, "layer_scale_init_value", label) if scale else None,
            "use_abs_pos_emb": bool(config.get("use_absolute_position_embeddings", False)),
            "use_rel_pos_bias": bool(config.get("use_relative_position_bias", False)),
            "use_shared_rel_pos_bias": bool(config.get("use_shared_relative_position_bias", False)),
        },
    )
    preprocessor = path.with_name("preprocessor_config.json")
    if not preprocessor.is_file():
        facts.mean = facts.std = (0.5,) * facts.stated["in_chans"]
        facts.statistics_from = "Hugging Face's default, there is no preprocessor_config.json"
        return facts
    steps = read_json(preprocessor, label)
    if "image_mean" in steps and "image_std" in steps:
        facts.mean = _floats(steps["image_mean"], "image_mean", label)
        facts.std = _floats(steps["image_std"], "image_std", label)
        facts.statistics_from = "preprocessor_config.json"
    resample = steps.get("resample", 3)
    if str(resample) not in _HF_INTERPOLATION:
        raise ValueError(f"{label}: resample must be one of {', '.join(_HF_INTERPOLATION)}, got {resample!r}")
    facts.interpolation = _HF_INTERPOLATION[str(resample)]
    facts.crop_pct = _crop_pct(steps, label)
    return facts


def _timm_folder_facts(cfg: dict[str, Any], label: str) -> _Facts:
    facts = _Facts(format="timm", interpolation=_interpolation(cfg.get("interpolation", "bicubic"), label))
    if "mean" in cfg and "std" in cfg:
        facts.mean, facts.std = _floats(cfg["mean"], "mean", label), _floats(cfg["std"], "std", label)
        facts.statistics_from = "config.json"
    if "crop_pct" in cfg:
        facts.crop_pct = _share(cfg["crop_pct"], "crop_pct", label)
    return facts


def _crop_pct(steps: dict[str, Any], label: str) -> float:
    """Share of the resized image that a Hugging Face processor keeps: crop_size / size, 1 without a centre crop."""

    def edge(name: str) -> float | None:
        value = steps.get(name)
        if isinstance(value, dict):
            value = value.get("shortest_edge", value.get("height"))
        return None if value is None else _number(value, name, label)

    if not steps.get("do_center_crop"):
        return 1.0
    size, crop = edge("size"), edge("crop_size")
    return crop / size if size and crop and crop <= size else 1.0


def _unwrap(state: Mapping[str, Any], label: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors inside wrappers and prefixes, and the names of the training state left behind."""
    dropped: list[str] = []
    seen = {id(state)}
    while inner := next((key for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None):
        dropped += [str(key) for key in state if key != inner]
        state = state[inner]
        if id(state) in seen:
            raise ValueError(f"{label}: must be a state dict, {inner!r} holds the mapping it stands in")
        seen.add(id(state))
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            if not _TRAINING_STATE.fullmatch(str(key)):
                raise ValueError(f"{label}: {key} must be a tensor, got a {type(value).__name__}")
            dropped.append(str(key))
            continue
        if value.is_meta or value.layout is not torch.strided:
            raise ValueError(f"{label}: {key} must have dense values, got {value.layout} on {value.device.type}")
        stored = value.untyped_storage().nbytes() // value.element_size()
        if value.numel() > stored:  # a few bytes can claim any shape, and every copy of it takes that much memory
            raise ValueError(f"{label}: {key} must have a value for each of its {value.numel()} places, got {stored}")
        tensors[str(key)] = value
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in tensors):
            stripped: dict[str, Tensor] = {}
            for key, value in tensors.items():
                _put(stripped, key.removeprefix(prefix), value, label)
            tensors = stripped
    return tensors, dropped


def _rename(tensors: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """timm's names; key biases become `blocks.i.attn.k_bias`, index buffers stay."""
    if not any(_HF_MARK in key for key in tensors):
        return dict(tensors)
    if {"layernorm.weight", "beit.layernorm.weight"} <= set(tensors):
        raise ValueError(
            f"{label}: must have one final norm, got layernorm and beit.layernorm "
            "(a masked-image model with use_mean_pooling=False)"
        )
    out: dict[str, Tensor] = {}
    qkv: dict[str, dict[tuple[str, str], Tensor]] = {}
    for full, value in tensors.items():
        key = full.removeprefix("beit.")
        layer = _HF_LAYER.fullmatch(key)
        if layer is None:
            _put(out, _HF_TOP.get(key, key), value, label)
        elif part := _HF_QKV.fullmatch(layer[2]):
            qkv.setdefault(layer[1], {})[part[1][0], part[2]] = value
        else:
            leaf = next((p.sub(name, layer[2], count=1) for p, name in _HF_LEAF if p.match(layer[2])), layer[2])
            _put(out, f"blocks.{layer[1]}.{leaf}", value, label)
    for i, parts in qkv.items():
        lacking = [n for c, n in zip("qkv", ("query", "key", "value")) if (c, "weight") not in parts]
        if lacking:
            raise ValueError(
                f"{label}: block {i} must have query, key and value weights, got no {' and no '.join(lacking)}"
            )
        out[f"blocks.{i}.attn.qkv.weight"] = torch.cat([parts[c, "weight"] for c in "qkv"])
        out |= {f"blocks.{i}.attn.{c}_bias": parts[c, "bias"] for c in "qkv" if (c, "bias") in parts}
    return out


def _put(out: dict[str, Tensor], key: str, value: Tensor, label: str) -> None:
    if key in out:
        raise ValueError(f"{label}: must have one {key}, got two")
    out[key] = value


def _is_index(key: str) -> bool:
    return key.endswith("relative_position_index")


def _from_state(raw: Mapping[str, Any], facts: _Facts, label: str, size: tuple[int, int] | None) -> LoadedBackbone:
    tensors, dropped = _unwrap(raw, label)
    wrapped = bool(dropped) or any(key in raw for key in _WRAPPERS)
    huggingface = any(_HF_MARK in key for key in tensors)
    state = _rename(tensors, label)
    _check_family(state, label)

    notes = list(facts.notes)
    index = {key: state.pop(key) for key in list(state) if _is_index(key)}
    key_bias = {key: state.pop(key) for key in list(state) if key.endswith(".attn.k_bias")}
    used = [key for key, value in key_bias.items() if value.float().any()]
    if used:
        if not any("relative_position_bias_table" in key or "gamma_" in key for key in state):
            raise ValueError(f"{label}: must be a BEiT, got a plain ViT (it has key biases, BEiT has none)")
        notes.append(f"non-zero key bias of {len(used)} blocks dropped: the softmax over keys is invariant to it")
    surplus = {key: state.pop(key) for key in list(state) if _DROPPABLE.match(key)}
    dropped += [*index, *key_bias, *surplus]

    check_values(state, label, backbone=True)
    stored = {str(value.dtype).removeprefix("torch.") for value in state.values()}
    if stored != {"float32"}:
        notes.append(f"stored as {', '.join(sorted(stored))}, loaded as float32")
    state = {key: value.float() for key, value in state.items()}

    architecture, window = _architecture(state, facts, index, size, label, notes)
    mask_token, lm_head, missing = _token_head(state, architecture["embed_dim"], facts, label)
    if "norm.weight" in state and "fc_norm.weight" in state:
        raise ValueError(f"{label}: must have one final norm, got both norm and fc_norm")
    if not {"norm.weight", "fc_norm.weight"} & set(state) and any(key.startswith("decode_head.") for key in surplus):
        # segmentation models read un-normalised block outputs
        width = architecture["embed_dim"]
        state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        missing += ["norm.weight", "norm.bias"]
        notes.append("a segmentation file has no final norm: norm starts at weight 1 and bias 0")
    target = _window(architecture["img_size"], architecture["patch_size"])
    resized = _resize(state, window, target)
    if resized:
        notes.append(f"window {window[0]} x {window[1]} resized to {target[0]} x {target[1]} by timm's rule")
    eps = facts.eps or (_HUGGINGFACE_EPS if huggingface else _UNILM_EPS)
    if huggingface and facts.eps is None:
        notes.append(f"eps {eps:g}: Hugging Face's default is assumed, there is no config.json beside the file")
    backbone = _build(architecture, eps, state, label)

    if facts.format:
        form = facts.format
    elif huggingface:
        form = "huggingface"
    else:
        form = "unilm" if wrapped or index or mask_token is not None or lm_head is not None else "timm"
    cls_pretrained = any(key.startswith("cls_pt_") for key in surplus)
    mean, std, rule = _statistics(facts, Path(label).name, cls_pretrained, architecture["in_chans"])
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
    return LoadedBackbone(backbone, mask_token, lm_head, True, report, _default_cfg(report, facts))


def _check_family(state: Mapping[str, Tensor], label: str) -> None:
    fused = next((key for key in state if key.endswith(".attn.qkv.bias")), None)
    if fused:
        raise ValueError(f"{label}: must be a BEiT, got a plain ViT ({fused}; BEiT has q_bias and v_bias)")
    if "patch_embed.proj.weight" not in state or "blocks.0.attn.qkv.weight" not in state:
        raise ValueError(
            f"{label}: must be a BEiT state dict (patch_embed.proj.weight, blocks.0.attn.qkv.weight, …), "
            f"got {_some(state) or 'no tensors'}"
        )


def _token_head(
    state: dict[str, Tensor], width: int, facts: _Facts, label: str
) -> tuple[Tensor | None, nn.Linear | None, list[str]]:
    """Take the mask token and the visual-token head out of `state`."""
    missing = [key for key in ("mask_token", "lm_head.weight", "lm_head.bias") if key not in state]
    mask_token = state.pop("mask_token", None)
    weight, bias = state.pop("lm_head.weight", None), state.pop("lm_head.bias", None)
    if mask_token is not None and mask_token.shape != (1, 1, width):
        raise ValueError(f"{label}: mask_token must have shape {(1, 1, width)}, got {tuple(mask_token.shape)}")
    if (weight is None) != (bias is None):
        raise ValueError(f"{label}: lm_head must have weight and bias, got only one of them")
    if weight is None or bias is None:
        return _own(mask_token), None, missing
    if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{label}: lm_head must have weight (V, {width}) and bias (V,), "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if facts.vocab_size not in (None, weight.shape[0]):
        raise ValueError(f"{label}: lm_head must have {facts.vocab_size} tokens (vocab_size), got {weight.shape[0]}")
    head = nn.Linear(width, weight.shape[0], device="meta", dtype=torch.float32)
    head.load_state_dict({"weight": weight.clone(), "bias": bias.clone()}, assign=True)
    return _own(mask_token), head.eval(), missing


def _own(tensor: Tensor | None) -> Tensor | None:
    """A copy: what torch.load maps from a file must not outlive it in a model."""
    return None if tensor is None else tensor.clone()


def _architecture(
    state: Mapping[str, Tensor],
    facts: _Facts,
    index: Mapping[str, Tensor],
    size: tuple[int, int] | None,
    label: str,
    notes: list[str],
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Keyword arguments of timm's Beit at the wanted size, and the window (in patches) of the tensors."""
    proj, fc1 = state["patch_embed.proj.weight"], state.get("blocks.0.mlp.fc1.weight")
    if proj.ndim != 4 or fc1 is None or fc1.ndim != 2:
        found = "none" if fc1 is None else str(tuple(fc1.shape))
        raise ValueError(
            f"{label}: must have patch_embed.proj.weight of 4 and blocks.0.mlp.fc1.weight of 2 dimensions, "
            f"got {tuple(proj.shape)} and {found}"
        )
    embed_dim, in_chans, *patch = proj.shape
    blocks = {int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))}
    depth = len(blocks)
    if blocks != set(range(depth)):
        raise ValueError(f"{label}: must have blocks 0 to {max(blocks)}, got {depth} of them")
    shared = "rel_pos_bias.relative_position_bias_table"
    own = "blocks.0.attn.relative_position_bias_table"
    table = state.get(shared, state.get(own))
    if table is not None and table.ndim != 2:
        raise ValueError(
            f"{label}: relative_position_bias_table must have shape (offsets, heads), got {tuple(table.shape)}"
        )

    num_heads = table.shape[1] if table is not None else facts.stated.get("num_heads")
    if num_heads is None:
        if embed_dim % 64:
            raise ValueError(
                f"{label}: must have a position table or a config that tells the number of heads, or a width that is a "
                f"multiple of 64, got width {embed_dim}"
            )
        num_heads = embed_dim // 64
        notes.append(f"{num_heads} heads: without a position table or a config, heads of 64 are assumed")
    if type(num_heads) is not int or num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"{label}: must have a number of heads that divides {embed_dim}, got {num_heads!r}")
    scaled = "blocks.0.gamma_1" in state
    architecture: dict[str, Any] = {
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "mlp_ratio": _mlp_ratio(fc1.shape[0], embed_dim),
        "init_values": (facts.stated.get("init_values") or 1e-5) if scaled else None,
        "use_abs_pos_emb": "pos_embed" in state,
        "use_rel_pos_bias": own in state,
        "use_shared_rel_pos_bias": shared in state,
    }
    for key, value in facts.stated.items():
        if key == "img_size":
            continue  # the window of the position tables confirms it, below
        if key == "mlp_ratio":
            same = math.isclose(value, architecture[key])
        elif key == "patch_size":
            same = _pair(value, f"{label}: patch_size") == tuple(patch)
        else:
            same = value == architecture.get(key, value)
        if not same and (key != "init_values" or bool(value) != scaled):
            raise ValueError(f"{label}: must have {key} {value!r} (its config), the weights have {architecture[key]!r}")

    stated_size = facts.stated.get("img_size")
    native = _pair(stated_size, f"{label}: img_size") if stated_size is not None else None
    if size is not None:
        _check_size(size, patch, label)
    window = _native_window(state, table, native, index, size, patch, label)
    architecture["img_size"] = size or native or (window[0] * patch[0], window[1] * patch[1])
    architecture["use_fc_norm"] = "fc_norm.weight" in state
    architecture["global_pool"] = "avg" if architecture["use_fc_norm"] else "token"
    return architecture, window


def _native_window(
    state: Mapping[str, Tensor],
    table: Tensor | None,
    native: tuple[int, int] | None,
    index: Mapping[str, Tensor],
    size: tuple[int, int] | None,
    patch: list[int],
    label: str,
) -> tuple[int, int]:
    """(rows, columns) of patches the position tensors were made for."""
    rows = None if table is None else table.shape[0]
    tokens = state["pos_embed"].shape[1] if "pos_embed" in state and state["pos_embed"].ndim == 3 else None

    def fits(window: tuple[int, int]) -> bool:
        return rows in (None, _offsets(window)) and tokens in (None, window[0] * window[1] + 1)

    found = " and ".join(
        text
        for text, there in ((f"a table of {rows} offsets", rows), (f"pos_embed of {tokens} tokens", tokens))
        if there is not None
    )
    wanted = _window(size, patch) if size is not None else None
    if native is not None:
        window = _window(native, patch)
        if not fits(window):
            raise ValueError(
                f"{label}: must have tables of window {window[0]} x {window[1]} (img_size {native}), got {found}"
            )
        return window
    if index:
        window = _index_window(index, wanted, label)
        if not fits(window):
            raise ValueError(f"{label}: must have tables of window {window[0]} x {window[1]} (its index), got {found}")
        return window
    if rows is not None:
        side = (math.isqrt(max(rows - 3, 0)) + 1) // 2
    elif tokens is not None:
        side = math.isqrt(tokens - 1)
    elif wanted is not None:
        return wanted
    else:
        raise ValueError(f"{label}: img_size must be given, the file holds no position table that tells it")
    if side > 0 and fits((side, side)):
        return side, side
    if wanted is not None and fits(wanted):
        return wanted
    raise ValueError(
        f"{label}: img_size of the file must be given (height, width), its window is not square, got {found}"
    )


def _index_window(index: Mapping[str, Tensor], wanted: tuple[int, int] | None, label: str) -> tuple[int, int]:
    """The window from unilm's persistent index: along the first row of patches the offset to patch 0 grows by one."""
    key, first = next(iter(index.items()))
    patches = len(first) - 1 if first.ndim else 0
    if first.is_floating_point() or first.ndim != 2 or patches < 1 or first.shape[1] != patches + 1:
        raise ValueError(f"{label}: {key} must be integers of shape (N, N), got {first.dtype} {tuple(first.shape)}")
    offset = first[1:, 1] - first[1, 1]
    jumps = (offset != torch.arange(patches)).nonzero()
    columns = int(jumps[0]) if len(jumps) else patches
    window = patches // columns, columns
    # one row and one column of patches have the same index
    if wanted == window[::-1] and 1 in window:
        window = wanted
    expected = gen_relative_position_index(window)
    for key, value in index.items():
        if value.shape != expected.shape or not torch.equal(value.long(), expected):
            raise ValueError(
                f"{label}: {key} must be BEiT's index of window {window[0]} x {window[1]}, got another numbering"
            )
    return window


def _resize(
    state: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Resize position tensors in `state` with timm's functions; {name: (old shape, new shape)}."""
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    if old == new:
        return resized
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's interpolation warns of its own use of torch
        for key, value in state.items():
            # tensors that do not belong to the old window stay as they are, for the shape check to name
            if key.endswith("relative_position_bias_table") and value.shape[:1] == (_offsets(old),) and value.ndim == 2:
                state[key] = resize_rel_pos_bias_table(value, new, (_offsets(new), value.shape[1]), old_window_size=old)
            elif key == "pos_embed" and value.ndim == 3:
                state[key] = resample_abs_pos_embed(value, list(new), list(old), num_prefix_tokens=1)
            else:
                continue
            resized[key] = (tuple(value.shape), tuple(state[key].shape))
    return resized


def _build(architecture: dict[str, Any], eps: float, state: dict[str, Tensor], label: str) -> Beit:
    # on the meta device first: no time and no random numbers spent on values that are overwritten
    norm: Any = partial(LayerNorm, eps=eps)
    model = Beit(num_classes=0, norm_layer=norm, device="meta", dtype=torch.float32, **architecture)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    unknown = [key for key in state if key not in expected]
    if unknown:
        raise ValueError(f"{label}: must have BEiT tensors only, got unknown {_some(unknown)}")
    missing = [key for key in expected if key not in state]
    if missing:
        raise ValueError(
            f"{label}: must have all tensors of a BEiT of {len(model.blocks)} blocks, missing {_some(missing)}"
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


def _statistics(
    facts: _Facts, name: str, cls_pretrained: bool, in_chans: int
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """mean, std and a note with the rule that chose them."""
    if facts.mean is not None and facts.std is not None and len(facts.mean) == len(facts.std) == in_chans:
        return tuple(facts.mean), tuple(facts.std), f"mean and std: {facts.statistics_from}"
    if in_chans != 3:
        half = (0.5,) * in_chans
        return half, half, f"mean and std 0.5: the source states none for {in_chans} channels"
    lower = name.lower()
    if "beitv2" in lower or "beit-v2" in lower or cls_pretrained:
        why = "cls_pt layers" if cls_pretrained else "the name says BEiT v2"
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, f"mean and std of ImageNet: {why}"
    if lower.startswith(("beit_", "beit-")):
        return _HALF, _HALF, "mean and std 0.5: the name says BEiT v1"
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "mean and std of ImageNet assumed: the source does not tell"


def _default_cfg(report: LoadReport, facts: _Facts, name: str | None = None) -> dict[str, Any]:
    size = report.architecture["img_size"]
    return {
        "architecture": name or "beit",
        "input_size": (report.architecture["in_chans"], *size),
        "mean": report.mean,
        "std": report.std,
        "interpolation": facts.interpolation,
        "crop_pct": facts.crop_pct or (0.9 if max(size) < 384 else 1.0),
        "crop_mode": "center",
        "fixed_input_size": True,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _norm_notes(architecture: Mapping[str, Any]) -> list[str]:
    if not architecture["use_fc_norm"]:
        return []
    return ["no trained norm for single tokens: fc_norm, trained after pooling, is what there is for a cls or mask row"]


def _pair(value: Any, name: str) -> tuple[int, int]:
    pair = (value, value) if type(value) is int else value
    if not isinstance(pair, tuple | list) or len(pair) != 2 or any(type(v) is not int or v < 1 for v in pair):
        raise ValueError(f"{name} must be a positive integer or (height, width), got {value!r}")
    return pair[0], pair[1]


def _check_size(size: tuple[int, int], patch: Iterable[int], label: str) -> None:
    rows, columns = patch
    if size[0] % rows or size[1] % columns:
        raise ValueError(f"{label}: img_size must be multiples of the patch {rows} x {columns}, got {size}")


def _window(size: tuple[int, int], patch: int | Iterable[int]) -> tuple[int, int]:
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return size[0] // rows, size[1] // columns


def _offsets(window: tuple[int, int]) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1) + 3


def _mlp_ratio(hidden: int, width: int) -> float:
    """hidden / width such that timm's int(width * ratio) gives hidden back."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _mlp_width(architecture: Mapping[str, Any]) -> int:
    return int(architecture["embed_dim"] * architecture["mlp_ratio"])


def _number(value: Any, name: str, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ValueError(f"{label}: {name} must be a positive number, got {value!r}")
    return float(value)


def _share(value: Any, name: str, label: str) -> float:
    share = _number(value, name, label)
    if share > 1:
        raise ValueError(f"{label}: {name} must be a number in (0, 1], got {value!r}")
    return share


def _interpolation(value: Any, label: str) -> str:
    if value not in _INTERPOLATIONS:
        raise ValueError(f"{label}: interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {value!r}")
    return str(value)


def _floats(value: Any, name: str, label: str) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else [value]
    if (
        not numbers
        or not all(isinstance(v, int | float) and type(v) is not bool and math.isfinite(v) for v in numbers)
        or ("std" in name and min(numbers) <= 0)
    ):
        raise ValueError(f"{label}: {name} must be finite numbers{', positive' * ('std' in name)}, got {value!r}")
    return tuple(float(v) for v in numbers)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f", … ({len(listed)} in all)" if len(listed) > 3 else "")


def _join(values: Iterable[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _summary(names: Iterable[str]) -> str:
    """Names with block numbers folded: `blocks.*.attn.relative_position_index (12)`."""
    folded: dict[str, int] = {}
    for name in names:
        key = re.sub(r"\.\d+\.", ".*.", name)
        key = re.sub(r"^(cls_pt_layers|decode_head|auxiliary_head)\..*", r"\1.*", key)
        folded[key] = folded.get(key, 0) + 1
    return ", ".join(f"{key} ({count})" if count > 1 else key for key, count in folded.items()) or "nothing"


def _resize_summary(resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    shapes = {}
    for name, (old, new) in resized.items():
        shapes[re.sub(r"\.\d+\.", ".*.", name)] = f"{old} to {new}"
    return ", ".join(f"{name} {text}" for name, text in shapes.items()) or "nothing"
