"""Pre-train the built-in BEiT by masked visual token modelling, in one round or two, on Fashion-MNIST training images.

    python tools/pretrain_builtin.py subset              # writes vptm/assets/fashion_mnist_subset.npz
    python tools/pretrain_builtin.py train --out runs/builtin [--resume]
    python tools/pretrain_builtin.py proxy vptm/assets/builtin.safetensors

Round one predicts k-means codes of gradient-orientation features; round two predicts k-means codes of a middle layer of
the round-one model, as BEiT v2 (https://arxiv.org/abs/2208.06366) does with its vector-quantised teacher. Every image
also carries one mask row without a position (zero relative position bias to and from everything), the row that VPTM
reads. A masked token of unknown place and extent can only be answered with a distribution, so its target is the image's
bag of visual words: codes of single patches, of 2x2 patches and of the whole image, softly assigned. The CLS row learns
the same, so that neither row knows the whole image better by training; --bag-weight 0 makes a twin in which no row is
trained for it. No label is used.
Round two goes on from the weights of round one instead of starting afresh, which saves most of its time. It is off by
default (--steps 6000 5000 turns it on): it raised what the CLS and patch rows know, not what the mask row knows.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from timm.models.beit import Beit
from torch import Tensor, nn

from vptm.weights.files import read_safetensors, replacing, write_atomically

DATA = Path("/usr/share/datasets/fashion-mnist")
ASSETS = Path(__file__).resolve().parent.parent / "vptm" / "assets"
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
MEAN, STD = 0.2860, 0.3530
HELD_OUT = 5000
console = Console()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; stored with them."""

    seed: int = 0
    patch: int = 7
    dim: int = 192
    depth: int = 4
    heads: int = 6
    codes: tuple[int, ...] = (512, 256, 256)  # codebook sizes for one patch, 2x2 patches, the whole image
    teacher_layer: int = 2  # round two clusters the output of this block
    code_dim: int = 32  # principal components of the teacher's features that are clustered
    softness: float = 0.3  # soft assignment: exp(-d^2 / (softness * mean nearest d^2))
    bag_weight: float = 1.0
    unmasked: float = 0.25  # share of images that keep all their patches, as they do downstream
    mask_ratio: float = 0.4
    shift: int = 2
    bag_of: str = "original"  # the bag is that of the "original" image or of the "augmented" one
    steps: tuple[int, int] = (6000, 0)  # per round
    batch: int = 256
    lr: float = 4e-3
    min_lr: float = 1e-5
    warmup: int = 500
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.999
    kmeans_images: int = 20000
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if 28 % self.patch or self.patch < 4:
            raise ValueError(f"patch: must divide 28 and be at least 4, got {self.patch}")
        if self.dim % self.heads:
            raise ValueError(f"heads: must divide dim {self.dim}, got {self.heads}")
        if not 1 <= self.teacher_layer <= self.depth:
            raise ValueError(f"teacher_layer: must be in 1..depth {self.depth}, got {self.teacher_layer}")
        masked = round(self.mask_ratio * self.grid**2)
        limits = {
            "mask_ratio": (0 < masked < self.grid**2, f"must hide 1 to {self.grid**2 - 1} of {self.grid**2} patches"),
            "unmasked": (0 <= self.unmasked < 1, "must be in [0, 1)"),
            "steps": (self.steps[0] > 0 and self.steps[1] >= 0, "must be > 0 for round one and >= 0 for round two"),
            "codes": (min(self.codes) >= 1, "must be at least 1 each"),
            "ema": (0 <= self.ema < 1, "must be in [0, 1)"),
        }
        positive = ("batch", "code_dim", "softness", "lr", "clip", "kmeans_images")
        limits |= {name: (0 < getattr(self, name) < math.inf, "must be finite and > 0") for name in positive}
        others = ("shift", "warmup", "min_lr", "weight_decay", "bag_weight")
        limits |= {name: (0 <= getattr(self, name) < math.inf, "must be finite and >= 0") for name in others}
        for name, (fits, rule) in limits.items():
            if not fits:
                raise ValueError(f"{name}: {rule}, got {getattr(self, name)}")
        for name, allowed in (("precision", ("bf16", "fp32")), ("bag_of", ("original", "augmented"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: must be one of {allowed}, got {getattr(self, name)!r}")

    @property
    def grid(self) -> int:
        return 28 // self.patch

    def architecture(self) -> dict[str, Any]:
        return {
            "img_size": 28,
            "patch_size": self.patch,
            "in_chans": 1,
            "embed_dim": self.dim,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": 4.0,
            "init_values": 0.1,
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
        }


def load_fashion_mnist(root: Path = DATA) -> dict[str, np.ndarray]:
    """The four IDX files as uint8: train_images (60000, 28, 28), train_labels (60000,), test_images, test_labels."""
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, offset in (("images", 16), ("labels", 8)):
            path = Path(root) / f"{prefix}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz"
            if not path.is_file():
                raise FileNotFoundError(
                    f"data: {path} not found; install it with `apt install dataset-fashion-mnist`, "
                    "or give the folder of the four IDX files with --data"
                )
            raw = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)
            arrays[f"{split}_{kind}"] = raw.reshape(-1, 28, 28) if kind == "images" else raw
    return arrays


def pixel_hashes(images: np.ndarray, size: int = 5) -> np.ndarray:
    """First `size` bytes of sha256 of each image's pixels, (n, size) uint8."""
    digests = b"".join(hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()[:size] for image in images)
    return np.frombuffer(digests, np.uint8).reshape(len(images), size)


def make_subset(
    data: dict[str, np.ndarray], seed: int = 0, train: int = 64, val: int = 32, test: int = 150
) -> dict[str, np.ndarray]:
    """Class-balanced subset: train and val per class from the train split, test from the test split, no image twice."""
    rng = np.random.default_rng(seed)
    seen: set[bytes] = set()
    subset: dict[str, np.ndarray] = {"classes": np.array(CLASSES)}
    for name, split, count in (("test", "test", test), ("val", "train", val), ("train", "train", train)):
        images, labels = data[f"{split}_images"], data[f"{split}_labels"]
        chosen: list[int] = []
        left = dict.fromkeys(range(len(CLASSES)), count)
        for i in rng.permutation(len(images)):
            key = images[i].tobytes()
            if left[int(labels[i])] and key not in seen:
                seen.add(key)
                left[int(labels[i])] -= 1
                chosen.append(int(i))
        order = sorted(chosen, key=lambda i: int(labels[i]))
        subset[f"{name}_images"], subset[f"{name}_labels"] = images[order], labels[order]
    return subset


def pretraining_split(data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Indices into the train split: (to train on, held out). Copies of a test or held-out image are left out."""
    images = data["train_images"]
    test = {image.tobytes() for image in data["test_images"]}
    order = np.random.default_rng(60000).permutation(len(images))
    held = order[: min(HELD_OUT, len(images) // 10)]
    kept_out = test | {images[i].tobytes() for i in held}
    rest = np.array([i for i in order[len(held) :] if images[i].tobytes() not in kept_out])
    return rest, held


def scaled_linear(x: Tensor, linear: nn.Linear, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * linear(x), with LayerScale folded into the weights: one pass less over the activations."""
    return F.linear(x, (linear.weight * scale[:, None]).to(dtype), (linear.bias * scale).to(dtype))


class MaskedBeit(nn.Module):
    """timm's Beit with the mask token and token head of BEiT pre-training. Parameter names are the exported ones."""

    def __init__(self, architecture: dict[str, Any], vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = Beit(**architecture, num_classes=0, global_pool="token")
            dim = architecture["embed_dim"]
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02, a=-0.02, b=0.02))
            self.lm_head = nn.Linear(dim, vocab_size)
            nn.init.trunc_normal_(self.lm_head.weight, std=0.02)
            nn.init.zeros_(self.lm_head.bias)

    def rows(
        self, images: Tensor, masked: Tensor | None = None, layer: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Normed rows [CLS | patches | position-less mask row], (B, 1 + N + 1, C), or the raw output of block `layer`.

        images (B, 1, 28, 28) normalised; masked (B, N) bool: patches replaced by the mask token. The last row has zero
        relative position bias to and from every other.
        """
        net = self.backbone
        x = F.conv2d(images, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=net.patch_embed.patch_size)
        x = x.flatten(2).transpose(1, 2)
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_token.to(x.dtype), x)
        size = (len(x), 1, x.shape[2])
        x = torch.cat([net.cls_token.expand(size), x, self.mask_token.expand(size)], 1).to(dtype)
        table, index = net.rel_pos_bias.relative_position_bias_table, net.rel_pos_bias.relative_position_index
        bias = F.pad(table[index].permute(2, 0, 1)[None], (0, 1, 0, 1)).to(dtype)
        for block in net.blocks[:layer]:
            attn, mlp = block.attn, block.mlp
            batch, tokens, dim = x.shape
            h = F.layer_norm(x, (dim,), block.norm1.weight.to(dtype), block.norm1.bias.to(dtype), block.norm1.eps)
            qkv_bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)).to(dtype)
            qkv = F.linear(h, attn.qkv.weight.to(dtype), qkv_bias)
            q, k, v = qkv.view(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            # SDPA with a bias that needs a gradient takes a slower path than these two products at 18 tokens
            h = ((q * attn.scale) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
            h = h.transpose(1, 2).reshape(batch, tokens, dim)
            x = x + scaled_linear(h, attn.proj, block.gamma_1, dtype)
            h = F.layer_norm(x, (dim,), block.norm2.weight.to(dtype), block.norm2.bias.to(dtype), block.norm2.eps)
            h = F.gelu(F.linear(h, mlp.fc1.weight.to(dtype), mlp.fc1.bias.to(dtype)))
            x = x + scaled_linear(h, mlp.fc2, block.gamma_2, dtype)
        if layer is not None:
            return x.float()
        return F.layer_norm(x.float(), (x.shape[-1],), net.norm.weight, net.norm.bias, net.norm.eps)

    def logits(self, hidden: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return F.linear(hidden.to(dtype), self.lm_head.weight.to(dtype), self.lm_head.bias.to(dtype)).float()

    def exported(self) -> dict[str, Tensor]:
        """Canonical timm names + mask_token + lm_head, fp16."""
        state = {**self.backbone.state_dict(), "mask_token": self.mask_token}
        state |= {f"lm_head.{name}": value for name, value in self.lm_head.state_dict().items()}
        return {n: t.detach().half().contiguous().cpu() for n, t in state.items() if "relative_position_index" not in n}

    def load_exported(self, state: dict[str, Tensor]) -> None:
        state = {n: t.float() for n, t in state.items()}
        own = {n: state.pop(n) for n in ("mask_token", "lm_head.weight", "lm_head.bias")}
        self.load_state_dict({**{f"backbone.{n}": t for n, t in state.items()}, **own}, strict=False)
        missing = set(self.state_dict()) - {f"backbone.{n}" for n in state} - set(own)
        if any("relative_position_index" not in name for name in missing):
            raise ValueError(f"weights: lacks {sorted(missing)}")


def normalise(images: Tensor) -> Tensor:
    """(B, 28, 28) uint8 to (B, 1, 28, 28) fp32 with Fashion-MNIST's mean and deviation."""
    return (images[:, None].float() / 255 - MEAN) / STD


def load_weights(path: Path) -> tuple[MaskedBeit, dict[str, Any]]:
    tensors, metadata = read_safetensors(path)
    meta = json.loads(metadata["vptm"])
    model = MaskedBeit(meta["architecture"], meta["vocab_size"])
    model.load_exported(tensors)
    return model.eval(), meta


def orientation_features(images: Tensor, patch: int) -> Tensor:
    """Root gradient-orientation energies and root intensity in 2x2 overlapping cells per patch: (B, n, n, 36) fp32."""
    x = images[:, None].float() / 255
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    gx = padded[:, 0, 1:-1, 2:] - padded[:, 0, 1:-1, :-2]
    gy = padded[:, 0, 2:, 1:-1] - padded[:, 0, :-2, 1:-1]
    angle = torch.atan2(gy, gx) / (2 * math.pi) * 8 % 8
    # a triangular window shares each gradient between its two nearest of eight orientations
    distance = (angle[:, None] - torch.arange(8, device=x.device).view(1, 8, 1, 1)).abs()
    weight = (1 - torch.minimum(distance, 8 - distance)).clamp(min=0)
    maps = torch.cat([weight * torch.hypot(gx, gy)[:, None], 0.25 * x], 1)
    grid = 28 // patch
    cells = maps.view(len(x), 9, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5).reshape(-1, 9, patch, patch)
    cell = (patch + 1) // 2
    return F.avg_pool2d(cells, cell, patch - cell).flatten(1).view(len(x), grid, grid, 36).sqrt()


class Tokenizer:
    """Codebooks over windows of a feature grid: one patch, 2x2 patches, the whole image.

    A code's index in the common vocabulary is its index in its own codebook plus the sizes of those before it, so patch
    codes come first. `spread` is the mean squared distance to the nearest centre: the unit of the soft assignment.
    """

    def __init__(self, state: dict[str, Tensor], grid: int, softness: float) -> None:
        self.state, self.grid, self.softness = state, grid, softness
        self.windows = (1, 2, grid)
        self.sizes = [len(state[f"centres{i}"]) for i in range(len(self.windows))]

    @property
    def vocab_size(self) -> int:
        return sum(self.sizes)

    def to(self, device: torch.device) -> Tokenizer:
        return Tokenizer({n: t.to(device) for n, t in self.state.items()}, self.grid, self.softness)

    def _distances(self, features: Tensor, scale: int) -> Tensor:
        centres = self.state[f"centres{scale}"]
        x = windows(features, self.windows[scale])
        return (x.square().sum(-1, keepdim=True) - 2 * x @ centres.T + centres.square().sum(-1)).clamp(min=0)

    def project(self, features: Tensor) -> Tensor:
        return (features - self.state["mean"]) @ self.state["basis"]

    def patch_codes(self, features: Tensor) -> Tensor:
        """(B, n, n, D) features to (B, n * n) codes of single patches."""
        return self._distances(self.project(features), 0).argmin(-1)

    def bag(self, features: Tensor) -> Tensor:
        """(B, n, n, D) features to (B, V): a distribution over the vocabulary, each scale with the same weight."""
        features = self.project(features)
        parts = []
        for scale in range(len(self.windows)):
            distances = self._distances(features, scale)
            unit = self.softness * self.state["spread"][scale]
            parts.append((-distances / unit).softmax(-1).mean(1) / len(self.windows))
        return torch.cat(parts, 1)


def windows(features: Tensor, size: int) -> Tensor:
    """All size x size windows of a grid (B, n, n, D) as vectors (B, m, size * size * D)."""
    return features.unfold(1, size, 1).unfold(2, size, 1).flatten(3).flatten(1, 2)


def fit_codebook(x: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, int]:
    """k-means centres (size, D) of rows x (m, D), and how many centres no row is nearest to."""
    distinct: set[bytes] = set()
    for row in x:
        distinct.add(row.tobytes())
        if len(distinct) >= size:
            break
    else:
        raise ValueError(f"codes: a codebook of {size} needs as many distinct features, got {len(distinct)}")
    kmeans = MiniBatchKMeans(size, batch_size=4096, n_init=1, max_iter=30, random_state=seed).fit(x)
    return kmeans.cluster_centers_.astype(np.float32), size - len(np.unique(kmeans.predict(x)))


def fit_tokenizer(features: Tensor, recipe: Recipe, components: int | None) -> tuple[Tokenizer, list[int]]:
    """Tokenizer of grid features (m, n, n, D), and its dead codes per scale. components: principal components kept."""
    grid, width = features.shape[1], features.shape[3]
    flat = features.reshape(-1, width).numpy()
    state = {"mean": torch.zeros(width), "basis": torch.eye(width)}
    if components is not None:
        pca = PCA(components, random_state=recipe.seed).fit(flat)
        basis = torch.from_numpy(pca.components_.T.copy()).float()
        state = {"mean": torch.from_numpy(pca.mean_).float(), "basis": basis}
    projected = (features - state["mean"]) @ state["basis"]
    dead, spread = [], []
    for i, size in enumerate((1, 2, grid)):
        x = windows(projected, size).flatten(0, 1).numpy()
        x = x[np.random.default_rng(recipe.seed).permutation(len(x))[:100_000]]
        centres, unused = fit_codebook(np.ascontiguousarray(x), recipe.codes[i], recipe.seed)
        state[f"centres{i}"] = torch.from_numpy(centres)
        dead.append(unused)
        nearest = torch.cdist(torch.from_numpy(x[:20_000]), state[f"centres{i}"]).min(1).values.square().mean()
        spread.append(float(nearest))
    state |= {"spread": torch.tensor(spread), "dead": torch.tensor(dead)}
    return Tokenizer(state, grid, recipe.softness), dead


def block_mask(grid: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly `count` of grid x grid patches, in rectangles of aspect 0.3 to 1/0.3 (BEiT's block-wise masking)."""
    mask = np.zeros((grid, grid), bool)
    smallest = max(1, round(0.08 * grid * grid))
    while (left := count - int(mask.sum())) > 0:
        area = rng.uniform(min(smallest, left), left) if left > 1 else 1
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = (min(grid, max(1, round(math.sqrt(area * r)))) for r in (aspect, 1 / aspect))
        top, column = rng.integers(grid - h + 1), rng.integers(grid - w + 1)
        new = np.argwhere(~mask[top : top + h, column : column + w]) + np.array([top, column])
        mask[tuple(new[:left].T)] = True
    return mask.ravel()


def mask_pool(recipe: Recipe, size: int) -> Tensor:
    rng = np.random.default_rng((recipe.seed, 1))
    count = round(recipe.mask_ratio * recipe.grid**2)
    return torch.from_numpy(np.stack([block_mask(recipe.grid, count, rng) for _ in range(size)]))


def augment(images: Tensor, shift: int, rng: torch.Generator) -> Tensor:
    """Each image flipped left-right or not, and moved by up to `shift` pixels over a black ground."""
    flip = torch.rand(len(images), generator=rng) < 0.5
    dy, dx = torch.randint(0, 2 * shift + 1, (2, len(images)), generator=rng)
    columns = torch.arange(28)
    x_index = torch.where(flip[:, None], 27 - columns, columns) + dx[:, None]
    y_index = columns + dy[:, None]
    # flipping happens in the padded frame, which is symmetric, so the shift range is the same for both
    padded = F.pad(images, (shift, shift, shift, shift))
    rows = torch.arange(len(images))[:, None, None]
    device = images.device
    return padded[rows.to(device), y_index[:, :, None].to(device), x_index[:, None].to(device)]


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    warmup = min(recipe.warmup, max(1, steps // 5))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (
        1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    )


def batches(recipe: Recipe, round_: int, images: int, step: int) -> tuple[Tensor, torch.Generator]:
    """Image indices of a step and the generator of its other draws, from the seed, the round and the step alone."""
    per_epoch = max(1, images // recipe.batch)
    epoch, at = divmod(step, per_epoch)
    order = np.random.default_rng((recipe.seed, round_, epoch)).permutation(images)
    rng = torch.Generator().manual_seed(int(np.random.default_rng((recipe.seed, round_, step, 7)).integers(2**62)))
    return torch.from_numpy(order[at * recipe.batch : (at + 1) * recipe.batch]), rng


Extract = Callable[[Tensor], Tensor]


def masked_losses(
    model: MaskedBeit,
    tokenizer: Tokenizer,
    extract: Extract,
    images: Tensor,
    masked: Tensor,
    bag: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Cross-entropies of one batch: `token` over the masked patches, `bag` of the mask row and the CLS row."""
    with torch.no_grad():
        features = extract(images)
        codes = tokenizer.patch_codes(features)
        if bag is None:
            bag = tokenizer.bag(features)
    rows = model.rows(normalise(images), masked, dtype=dtype)
    logits = model.logits(torch.cat([rows[:, 1:-1][masked], rows[:, -1], rows[:, 0]]), dtype)
    count = len(logits) - 2 * len(images)
    patch, whole = logits[:count], logits[count:]
    entropy = -torch.special.xlogy(bag, bag).sum(1).mean()
    return {
        "token": F.cross_entropy(patch, codes[masked]),
        "bag": -(bag.repeat(2, 1) * whole.log_softmax(-1)).sum(1).mean(),
        "accuracy": (patch.argmax(-1) == codes[masked]).float().mean(),
        "bag_entropy": entropy,
    }


def feature_extractor(teacher: MaskedBeit | None, recipe: Recipe, dtype: torch.dtype) -> Extract:
    if teacher is None:
        return lambda images: orientation_features(images, recipe.patch)

    def middle_layer(images: Tensor) -> Tensor:
        with torch.no_grad():
            x = teacher.rows(normalise(images), layer=recipe.teacher_layer, dtype=dtype)[:, 1:-1].float()
            return F.layer_norm(x, x.shape[-1:]).view(len(x), recipe.grid, recipe.grid, -1)

    return middle_layer


def in_chunks(function: Extract, images: Tensor, size: int = 1000) -> Tensor:
    with torch.no_grad():
        return torch.cat([function(chunk) for chunk in images.split(size)])


def train_round(
    recipe: Recipe,
    round_: int,
    images: Tensor,
    tokenizer: Tokenizer,
    extract: Extract,
    start: dict[str, Tensor] | None,
    out: Path,
    resume: bool,
    every: int = 500,
) -> MaskedBeit:
    """One round of masked visual token modelling from the weights `start`; returns the moving average of the weights.

    Writes out/checkpoint{round}.pt every `every` steps and goes on from it when `resume`, on a CPU bitwise as if it had
    never stopped.
    """
    device = images.device
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    steps = recipe.steps[round_ - 1]
    model = MaskedBeit(recipe.architecture(), tokenizer.vocab_size, recipe.seed).to(device)
    if start is not None:
        model.load_state_dict(start, strict=False)
    average = MaskedBeit(recipe.architecture(), tokenizer.vocab_size, recipe.seed).to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    no_decay = {
        id(p)
        for n, p in model.named_parameters()
        if p.ndim < 2 or "cls_token" in n or "mask_token" in n or "bias_table" in n
    }
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in no_decay], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if id(p) in no_decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    checkpoint, log_path = out / f"checkpoint{round_}.pt", out / f"log{round_}.csv"
    first, seconds, log, sums = 0, 0.0, [], torch.zeros(4, device=device)
    if resume and checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds, log, sums = saved["step"], saved["seconds"], saved["log"], saved["sums"]
    masks = mask_pool(recipe, min(4096, steps * recipe.batch)).to(device)
    bags = None
    if recipe.bag_of == "original" and first < steps:
        bags = in_chunks(lambda x: tokenizer.bag(extract(x)).half(), images)
    began = time.perf_counter() - seconds

    def save(step: int) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise ValueError(
                f"lr: weights became NaN or infinite before step {step} with {recipe.lr:g}, use a lower one"
            )
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        with replacing(checkpoint) as temporary:
            torch.save(
                {**state, "step": step, "seconds": time.perf_counter() - began, "log": log, "sums": sums}, temporary
            )
        with replacing(log_path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["round", "step", "learning_rate", "token_loss", "bag_loss", "token_accuracy", "bag_entropy", "seconds"]
            )
            writer.writerows(log)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"round {round_}", total=steps, completed=first)
        for step in range(first, steps):
            index, rng = batches(recipe, round_, len(images), step)
            batch = augment(images[index.to(device)], recipe.shift, rng)
            masked = masks[torch.randint(len(masks), (len(batch),), generator=rng).to(device)]
            whole = torch.rand(len(batch), generator=rng) < recipe.unmasked
            masked = masked & ~whole.to(device)[:, None]
            bag = None if bags is None else bags[index.to(device)].float()
            rate = learning_rate(step, steps, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = masked_losses(model, tokenizer, extract, batch, masked, bag, dtype)
            optimizer.zero_grad()
            (losses["token"] + recipe.bag_weight * losses["bag"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            with torch.no_grad():
                decay = min(recipe.ema, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
                sums += torch.stack([losses[k].detach() for k in ("token", "bag", "accuracy", "bag_entropy")])
            if (step + 1) % 100 == 0:
                values = [round(v, 5) for v in (sums / 100).tolist()]
                log.append([round_, step + 1, rate, *values, round(time.perf_counter() - began, 1)])
                sums.zero_()
                progress.update(
                    task, description=f"round {round_} token {values[0]:.3f} acc {values[2]:.3f} bag {values[1]:.3f}"
                )
            if (step + 1) % every == 0 or step + 1 == steps:
                save(step + 1)
            progress.advance(task)
    return average.eval()


def few_shot_scores(
    features: dict[str, np.ndarray], labels: np.ndarray, shots: int = 16, seeds: int = 5
) -> dict[str, list[float]]:
    """Accuracy of logistic regression on `shots` images per class, one number per seed; C chosen on as many others."""
    scores: dict[str, list[float]] = {name: [] for name in features}
    for seed in range(seeds):
        order = np.random.default_rng((16, seed)).permutation(len(labels))
        by_class = [order[labels[order] == c] for c in range(len(CLASSES))]
        train = np.concatenate([c[:shots] for c in by_class])
        val = np.concatenate([c[shots : 2 * shots] for c in by_class])
        test = np.concatenate([c[2 * shots :] for c in by_class])
        for name, x in features.items():
            x = x.reshape(len(x), -1).astype(np.float32)
            x = (x - x[train].mean(0)) * (10 / (x[train].std(0).mean() + 1e-6) / math.sqrt(x.shape[1]))
            # the solution lies in the span of the training rows, so fitting in that basis is the same and much faster
            x = x @ np.linalg.svd(x[train], full_matrices=False)[2].T
            fits = [
                LogisticRegression(C=c, max_iter=2000, tol=1e-3).fit(x[train], labels[train])
                for c in (0.01, 0.1, 1.0, 10.0)
            ]
            scores[name].append(max(fits, key=lambda fit: fit.score(x[val], labels[val])).score(x[test], labels[test]))
    return scores


def frozen_features(model: MaskedBeit, images: Tensor) -> dict[str, np.ndarray]:
    """What a read-out can see of un-prompted images: mask row, its token logits, CLS row, mean of the patch rows."""
    rows = in_chunks(lambda x: model.rows(normalise(x)), images)
    with torch.no_grad():
        named = {
            "mask_row": rows[:, -1],
            "mask_logits": model.logits(rows[:, -1]),
            "cls_row": rows[:, 0],
            "patch_mean": rows[:, 1:-1].mean(1),
        }
    return {name: x.cpu().numpy() for name, x in named.items()}


def proxy(
    model: MaskedBeit, architecture: dict[str, Any], images: Tensor, labels: np.ndarray, seeds: int = 5, shots: int = 16
) -> dict[str, list[float]]:
    """few_shot_scores of pixels, of the model's read-outs and of the same read-outs with random weights."""
    twin = MaskedBeit(architecture, model.lm_head.out_features, seed=1).to(images.device).eval()
    features = {"pixels": images.cpu().numpy() / 255}
    features |= frozen_features(model, images)
    features |= {f"random_{name}": x for name, x in frozen_features(twin, images).items()}
    return few_shot_scores(features, labels, shots, seeds)


def held_out_report(
    model: MaskedBeit, tokenizer: Tokenizer, extract: Extract, images: Tensor, recipe: Recipe
) -> dict[str, Any]:
    """Masked-token loss and accuracy on images never trained on, the commonest code's share, and codebook use."""
    masks = mask_pool(recipe, len(images)).to(images.device)
    totals: dict[str, float] = {}
    codes = in_chunks(lambda x: tokenizer.patch_codes(extract(x)), images)
    with torch.no_grad():
        for chunk, masked in zip(images.split(1000), masks.split(1000), strict=True):
            for name, value in masked_losses(model, tokenizer, extract, chunk, masked, None, torch.float32).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(chunk) / len(images)
    counts = torch.bincount(codes.flatten(), minlength=tokenizer.sizes[0]).float()
    share = counts / counts.sum()
    return {
        "images": len(images),
        "masked_token_loss": totals["token"],
        "masked_token_accuracy": totals["accuracy"],
        "commonest_code_accuracy": float(share.max()),
        "bag_loss": totals["bag"],
        "bag_entropy": totals["bag_entropy"],
        "patch_codes": tokenizer.sizes[0],
        "patch_codes_used": int((counts > 0).sum()),
        "patch_code_perplexity": float((-torch.special.xlogy(share, share).sum()).exp()),
    }


def loss_curve(log: list[list[Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for round_ in sorted({int(row[0]) for row in log}):
        rows = np.array([row for row in log if int(row[0]) == round_], float)
        axes[0].plot(rows[:, 1], rows[:, 3], f"C{round_ - 1}-", label=f"round {round_}: masked patches")
        axes[0].plot(
            rows[:, 1],
            rows[:, 4] - rows[:, 6],
            f"C{round_ - 1}--",
            label=f"round {round_}: mask row, above entropy",
        )
        axes[1].plot(rows[:, 1], rows[:, 5], f"C{round_ - 1}", label=f"round {round_}")
    axes[0].set(xlabel="step", ylabel="cross-entropy [nat]", ylim=(0, None))
    axes[1].set(xlabel="step", ylabel="masked-token accuracy (training)", ylim=(0, None))
    for axis in axes:
        if log:
            axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def mask_picture(
    model: MaskedBeit,
    tokenizer: Tokenizer,
    extract: Extract,
    train: Tensor,
    shown: Tensor,
    labels: np.ndarray,
    recipe: Recipe,
    path: Path,
) -> None:
    """Held-out images, their masks, predicted and true tokens, each token drawn as its mean training patch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    p, grid = recipe.patch, recipe.grid
    patches = train.view(-1, grid, p, grid, p).permute(0, 1, 3, 2, 4).reshape(-1, p * p).float()
    codes = in_chunks(lambda x: tokenizer.patch_codes(extract(x)), train).flatten()
    sums = torch.zeros(tokenizer.sizes[0], p * p, device=train.device).index_add_(0, codes, patches)
    means = sums / torch.bincount(codes, minlength=tokenizer.sizes[0]).clamp(min=1)[:, None]
    pick = torch.tensor([int(np.flatnonzero(labels == c)[0]) for c in range(len(CLASSES))])
    images, masked = shown[pick.to(shown.device)], mask_pool(recipe, len(pick)).to(shown.device)
    with torch.no_grad():
        truth = tokenizer.patch_codes(extract(images))
        predicted = model.logits(model.rows(normalise(images), masked)[:, 1:-1])[..., : tokenizer.sizes[0]].argmax(-1)

    def tiles(values: Tensor) -> Tensor:
        return values.view(-1, grid, grid, p, p).permute(0, 1, 3, 2, 4).reshape(-1, 28, 28)

    hidden = tiles(masked[..., None].expand(-1, -1, p * p))
    pixels = tiles(means[predicted])
    rows = {
        "image": images.float(),
        "input": torch.where(hidden, torch.full_like(pixels, float("nan")), images.float()),
        "predicted\ntokens": torch.where(hidden, pixels, images.float()),
        "true\ntokens": torch.where(hidden, tiles(means[truth]), images.float()),
    }
    figure, axes = plt.subplots(len(rows), len(CLASSES), figsize=(10, 4.4), constrained_layout=True)
    colours = plt.get_cmap("gray").with_extremes(bad="#4477aa")
    for line, (name, values) in zip(axes, rows.items(), strict=True):
        for axis, value, title in zip(line, values, CLASSES, strict=True):
            axis.imshow(value.cpu().numpy(), cmap=colours, vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            if line is axes[0]:
                axis.set_title(title, fontsize=8)
        line[0].set_ylabel(name, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=75, format="png")
    plt.close(figure)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    write_atomically(path, save({n: t.contiguous().cpu() for n, t in tokenizer.state.items()}))


def save_weights(model: MaskedBeit, recipe: Recipe, vocab_size: int, path: Path) -> None:
    about = {
        "architecture": recipe.architecture(),
        "eps": 1e-6,
        "vocab_size": vocab_size,
        "mean": [MEAN],
        "std": [STD],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "description": "built for 28x28 grey clothing pictures, a demonstration",
        "recipe": asdict(recipe),
    }
    write_atomically(path, save(model.exported(), metadata={"format": "vptm", "vptm": json.dumps(about)}))


def write_json(value: Any, path: Path) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def pretrain(recipe: Recipe, data: dict[str, np.ndarray], out: Path, resume: bool, every: int = 500) -> dict[str, Any]:
    """Every round with steps; writes out/{builtin.safetensors, report.json, log*.csv, loss.png, masks.png}."""
    chosen, held = pretraining_split(data)
    stored = out / "recipe.json"
    digest = hashlib.sha256(data["train_images"][chosen].tobytes()).hexdigest()
    started = json.loads(json.dumps({**asdict(recipe), "images": digest}))
    if stored.is_file():
        if not resume:
            raise ValueError(f"out: {out} holds a run; give --resume to go on with it, or another folder")
        found = json.loads(stored.read_text())
        if found.pop("images", None) != started.pop("images"):
            raise ValueError(f"resume: {stored} belongs to a run on other images than the ones given")
        if found != started:
            raise ValueError(f"resume: {stored} holds another recipe than the one given")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    images = torch.from_numpy(data["train_images"][chosen]).to(device)
    held_out, labels = torch.from_numpy(data["train_images"][held]).to(device), data["train_labels"][held]

    average: MaskedBeit | None = None
    log: list[list[Any]] = []
    dead: dict[int, list[int]] = {}
    for round_ in (k for k in (1, 2) if recipe.steps[k - 1]):
        teacher, start = average, None
        if teacher is not None:
            start = {name: t for name, t in teacher.state_dict().items() if not name.startswith("lm_head")}
        extract = feature_extractor(teacher, recipe, dtype)
        path = out / f"tokenizer{round_}.safetensors"
        if not (resume and path.is_file()):
            sample = in_chunks(extract, images[: recipe.kmeans_images]).cpu()
            tokenizer, _ = fit_tokenizer(sample, recipe, None if teacher is None else recipe.code_dim)
            # a run is there once its first codebook is: one that was refused leaves the folder free
            out.mkdir(parents=True, exist_ok=True)
            write_json({**asdict(recipe), "images": digest}, stored)
            save_tokenizer(tokenizer, path)
        tokenizer = Tokenizer(read_safetensors(path)[0], recipe.grid, recipe.softness).to(device)
        dead[round_] = tokenizer.state["dead"].tolist()
        console.print(f"round {round_}: codebooks of {tokenizer.sizes}, of which dead {dead[round_]}")
        average = train_round(recipe, round_, images, tokenizer, extract, start, out, resume, every)
        with open(out / f"log{round_}.csv", newline="") as file:
            log += list(csv.reader(file))[1:]
    assert average is not None
    save_weights(average, recipe, tokenizer.vocab_size, out / "builtin.safetensors")
    exported = load_weights(out / "builtin.safetensors")[0].to(device)
    loss_curve(log, out / "loss.png")
    mask_picture(exported, tokenizer, extract, images, held_out, labels, recipe, out / "masks.png")
    report = {
        "recipe": asdict(recipe),
        "training_images": len(images),
        "dead_codes": dead,
        "seconds": {row[0]: float(row[-1]) for row in log},
        "held_out": held_out_report(exported, tokenizer, extract, held_out, recipe),
        "few_shot_proxy": proxy(exported, recipe.architecture(), held_out, labels),
    }
    write_json(report, out / "report.json")
    return report


def print_scores(scores: dict[str, list[float]]) -> None:
    for name, values in scores.items():
        console.print(f"{name:22s} {np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    subset = commands.add_parser("subset", help="write the shipped few-shot subset")
    subset.add_argument("--out", type=Path, default=ASSETS / "fashion_mnist_subset.npz")
    subset.add_argument("--hashes", type=Path, help="also write the hash prefixes of all pre-training images")
    train = commands.add_parser("train", help="pre-train, evaluate, export")
    train.add_argument("--out", type=Path, required=True, help="run folder")
    train.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    for field in fields(Recipe):
        kind: dict[str, Any] = {"type": type(field.default)}
        if isinstance(field.default, tuple):
            kind = {"type": int, "nargs": len(field.default)}
        train.add_argument(
            "--" + field.name.replace("_", "-"), default=field.default, help=f"default {field.default}", **kind
        )
    score = commands.add_parser("proxy", help="few-shot accuracy of frozen read-outs on held-out training images")
    score.add_argument("weights", type=Path)
    score.add_argument("--shots", type=int, default=16)
    for command in (subset, train, score):
        command.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files")
    args = parser.parse_args(argv)
    try:
        data = load_fashion_mnist(args.data)
        chosen, held = pretraining_split(data)
        if args.command == "subset":
            arrays: dict[str, Any] = make_subset(data)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(args.out) as temporary, open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)
            if args.hashes:
                prefixes = sorted(row.tobytes() for row in pixel_hashes(data["train_images"][chosen]))
                args.hashes.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(args.hashes, b"".join(prefixes))
        elif args.command == "train":
            values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(Recipe)}
            values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            recipe = Recipe(**values)
            print_scores(pretrain(recipe, data, args.out, args.resume)["few_shot_proxy"])
        else:
            model, about = load_weights(args.weights)
            images, labels = torch.from_numpy(data["train_images"][held]), data["train_labels"][held]
            print_scores(proxy(model, about["architecture"], images, labels, shots=args.shots))
    except (OSError, EOFError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
