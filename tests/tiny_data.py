"""A backbone file of a few thousand weights and pictures a frozen random model can tell apart, for tests of the work
around the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beit_factory import randomize
from PIL import Image
from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import nn

ARCHITECTURE = {
    "img_size": 12,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "init_values": 0.1,
    "use_abs_pos_emb": False,
    "use_rel_pos_bias": False,
    "use_shared_rel_pos_bias": True,
}
VOCABULARY = 24


def write_backbone(path: Path, seed: int = 0) -> Path:
    """A random grey 12x12 BEiT in vptm's own file format."""
    beit = Beit(num_classes=0, global_pool="token", **ARCHITECTURE)
    head = nn.Linear(16, VOCABULARY)
    randomize(beit, seed)
    randomize(head, seed + 1)
    tensors = {name: tensor for name, tensor in beit.state_dict().items() if "index" not in name}
    tensors |= {f"lm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    tensors["mask_token"] = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(seed))
    facts = {
        "architecture": ARCHITECTURE,
        "eps": 1e-6,
        "vocab_size": VOCABULARY,
        "mean": [0.4],
        "std": [0.3],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "description": "random",
    }
    stored = {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
    save_file(stored, path, metadata={"format": "vptm", "vptm": json.dumps(facts)})
    return path


def picture(kind: int, seed: int) -> Image.Image:
    """Grey 12x12 noise with a bright upper (kind 0), left (1) or right (2) half: a mirror swaps only the last two."""
    pixels = np.random.default_rng([kind, seed]).integers(0, 60, (12, 12), dtype=np.uint8)
    half = [np.s_[:6, :], np.s_[:, :6], np.s_[:, 6:]][kind]
    pixels[half] += 180
    return Image.fromarray(pixels)


CLASSES = ("upper", "left", "right")


def write_pictures(root: Path, per_class: int, classes: tuple[str, ...] = CLASSES, first: int = 0) -> Path:
    """`root/class/k.png`."""
    for kind, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(first, first + per_class):
            picture(kind, k).save(root / name / f"{k}.png")
    return root


SEVERAL = ([], ["left", "some"], ["right", "some"])


def write_list(folder: Path, count: int = 24, splits: str | None = "train,train,val,test") -> Path:
    """`folder/metadata.jsonl` of pictures of three kinds: one without a label, two with two."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(count):
        picture(k % 3, k).save(folder / f"{k}.png")
        row: dict[str, Any] = {"file_name": f"{k}.png", "labels": SEVERAL[k % 3]}
        if splits is not None:
            row["split"] = splits.split(",")[k // 3 % 4]
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder / "metadata.jsonl"
