"""Google's `.npz` checkpoints of ViTs, which JAX wrote: original, AugReg's and big_vision's, SigLIP's visual part."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vptm.messages import error_line, listed
from vptm.weights.beit_architecture import mlp_ratio_of
from vptm.weights.vit_architecture import window_of_positions

_PREFIXES = ("", "opt/target/", "params/", "params/img/")
_READ = re.compile(r"embedding/(kernel|bias)|cls|pos_embedding|Transformer/.+|MAPHead_0/.+|head/(kernel|bias)")


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an `.npz`; none where it is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        return []


def read_npz(path: Path, label: str) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The tensors of an `.npz` under timm's names, keyword arguments of timm's VisionTransformer that the shapes tell,
    and names of what was left.

    timm's own `VisionTransformer.load_pretrained` converts them. A classifier behind a representation layer
    (`pre_logits`), which timm's class has no place for, is left with that layer.

    Raises:
        ValueError: not such a file, a damaged one, or one that lacks arrays or has some of other shapes.
    """
    try:
        # nothing in it can run: numpy refuses pickled objects; every array is read whole, which compares its checksum
        with np.load(path, allow_pickle=False) as archive:
            shapes = {name: archive[name].shape for name in archive.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{label}: must be a whole .npz archive of arrays, {error_line(error, first=True)}") from error
    prefix = next((one for one in reversed(_PREFIXES) if f"{one}embedding/kernel" in shapes), None)
    if prefix is None:
        raise ValueError(f"{label}: must be a ViT of Google's (embedding/kernel, cls, …), got {listed(shapes)}")
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    arguments = _arguments(own, label)
    model = VisionTransformer(device="meta", **arguments).to_empty(device="cpu")
    try:
        model.load_pretrained(str(path))
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError) as error:
        why = error_line(error, first=True)
        raise ValueError(f"{label}: must have all arrays of a ViT of {arguments['depth']} blocks: {why}") from error
    taken = {
        name for name in own if _READ.fullmatch(name) and (arguments["num_classes"] or not name.startswith("head/"))
    }
    values = sum(int(np.prod(own[name])) for name in taken)
    expected = sum(tensor.numel() for tensor in model.state_dict().values())
    if values != expected:  # timm's copies spread what is too small, and pass over what they do not know
        raise ValueError(
            f"{label}: must hold {expected} values, those of a ViT of {arguments['depth']} blocks, got {values}"
        )
    dropped = sorted(name for name in shapes if name.removeprefix(prefix) not in taken)
    return dict(model.state_dict()), arguments, dropped


def _arguments(shapes: Mapping[str, tuple[int, ...]], label: str) -> dict[str, Any]:
    kernel = shapes["embedding/kernel"]
    depth = len({m[1] for name in shapes if (m := re.match(r"Transformer/encoderblock_(\d+)/", name))})
    stacked = shapes.get("Transformer/encoderblock/LayerNorm_0/scale")
    place = "Transformer/encoderblock_0/"
    if stacked is not None:
        depth, place = stacked[0], "Transformer/encoderblock/"
    found = (name for name in shapes if name.startswith(place) and name.endswith("/query/kernel"))
    query = shapes.get(next(found, ""), ())[-3:]
    found = (name for name in shapes if name.startswith(place) and name.endswith("/Dense_0/kernel"))
    hidden = shapes.get(next(found, ""), (0,))[-1]
    position = shapes.get("pos_embedding", shapes.get("Transformer/posembed_input/pos_embedding"))
    if len(kernel) != 4 or len(query) != 3 or not hidden or position is None or len(position) != 3:
        raise ValueError(
            f"{label}: must have embedding/kernel of 4 and pos_embedding of 3 dimensions, query/kernel of (C, heads, "
            f"channels) and Dense_0/kernel in block 0, got {kernel}, {position}, {query or 'none'}, {hidden or 'none'}"
        )
    rows, columns, in_chans, width = kernel
    has_class = "cls" in shapes
    window, without_class = window_of_positions(position[1], int(has_class), (rows, columns), None, None, label)
    head = None if any(name.startswith("pre_logits/") for name in shapes) else shapes.get("head/bias")
    pooled = any(name.startswith("MAPHead_0/") for name in shapes)
    return {
        "img_size": (window[0] * rows, window[1] * columns),
        "patch_size": rows if rows == columns else (rows, columns),
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": depth,
        "num_heads": query[1],
        "mlp_ratio": mlp_ratio_of(hidden, width),
        "class_token": has_class,
        "no_embed_class": without_class,
        "global_pool": "map" if pooled else "token" if has_class else "avg",
        "fc_norm": False,
        "num_classes": 0 if head is None else head[-1],
    }
