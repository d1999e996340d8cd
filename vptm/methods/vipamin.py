"""Prompts that start beside patches, and outside what self-attention spans (VIPAMIN, arXiv:2510.16446)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from vptm.frozen.fold import qkv_of
from vptm.frozen.modes import eval_mode
from vptm.frozen.parts import sdpa
from vptm.frozen.reference import reference_features
from vptm.frozen.written_out import heads_of, not_written_out
from vptm.messages import check_integer, check_range
from vptm.methods.spt import batches_at, check_start, layers_of, tracked
from vptm.models.prompted_model import PromptedModel
from vptm.terminal import progress_bar
from vptm.training.seeding import generators_kept, seed_everything


class _Means:
    """What blocks are fed and make of it, averaged over images in at least float32."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.images = 0

    def add(self, name: str, layer: int, rows: Tensor) -> None:
        """Rows (B, T, D) of a batch."""
        total, found = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)), self.sums.get((name, layer))
        self.sums[name, layer] = total if found is None else found + total

    def of(self, name: str, layer: int) -> Tensor:
        """(T, D)."""
        return self.sums[name, layer] / self.images


@torch.no_grad()
def init_vipamin(
    model: PromptedModel,
    loader: DataLoader[Any],
    *,
    neighbours: int = 8,
    orthogonal: float = 0.5,
    images: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> int:
    """Start every prompt as `(1 - orthogonal) * matched + orthogonal * outside` (VIPAMIN).

    For the prompts p that a block has now, which are random ones, and with all rows averaged over the images:

    - matched: the mean of the `neighbours` patch rows that enter the block, positions included, whose keys are most
      like p's. Keys are those of the block's first norm and projection, averaged over heads, alike by their cosine, in
      the model with its prompts.
    - outside: with O (T, C) what the heads of the block give for all rows of the model without prompts, before their
      projection, and r uniform in VPT's bound: the row whose value is that of r without its part in the span of O,
      `W^-1 ((I - Q Q^T) (W r + b) - b)`, W and b being the value projection and Q an orthonormal basis of O's rows.

    The released code multiplies by the pseudo-inverse of W where its transpose belongs; here the value is outside the
    span, as the text asks.

    Args:
        model: its `prompts` are read and overwritten, P rows for every layer that holds prompts of its own.
        loader: training images under the training augmentation, over a data set that can be indexed; its batch size
            and order are not used.
        neighbours: patches of each prompt, 1 to N; the authors search 2, 8, 32 and 128 of 196.
        orthogonal: share of what is outside, in [0, 1]; the authors search 0, 0.5 and 1.
        images: number of images drawn, with replacement.
        seed: of draws, augmentation and r; the global generators are left as they were.
        progress: a progress bar on stderr.

    Returns:
        Number of images forwarded, twice each: with and without prompts.

    Raises:
        ValueError: prompts that are no token rows, an empty data set, images of another size, more neighbours than
            patches, as many rows as channels (nothing is outside), or values that are not finite. The prompts are then
            unchanged.
        TypeError: the loader's data set cannot be indexed, or does not give (image, label).
        RuntimeError: the original weights were dropped by `freeze_for_inference()`.

    Example:
        >>> import vptm
        >>> model = vptm.PromptedBEiT("builtin", num_classes=10, prompt_mode="deep", prompt_length=5)
        >>> data = torch.utils.data.TensorDataset(torch.rand(20, 1, 28, 28), torch.arange(20) % 10)
        >>> vptm.init_vipamin(model, DataLoader(data), images=16, progress=False)
        16
    """
    size = check_start(model, loader, seed, "init_vipamin")
    check_integer("images", images, 1)
    check_integer("neighbours", neighbours, 1)
    check_range("orthogonal", orthogonal, "in [0, 1]")
    if neighbours > model.num_patches:
        raise ValueError(f"neighbours must be at most the number of patches, {model.num_patches}, got {neighbours}")
    rows = model.num_rows - model.prompts.length
    if orthogonal > 0 and rows >= model.num_features:
        raise ValueError(
            f"orthogonal must be 0 where {rows} rows span all {model.num_features} channels, got {orthogonal}"
        )
    layers, bank = layers_of(model), model.prompts
    for layer in layers:
        if reason := not_written_out(model.backbone.blocks[layer]):
            raise ValueError(f"init_vipamin needs timm's plain pre-norm blocks, got {reason}")
    drawn = np.random.default_rng(seed).integers(size, size=images)
    twin, means = model.without_prompts(), _Means()

    def matched(layer: int, entering: Tensor, _: Tensor, __: Tensor | None) -> None:
        if layer in layers:
            means.add("rows", layer, entering)
            means.add("keys", layer, _heads(model, layer, entering)[1].mean(1))

    def spanned(layer: int, entering: Tensor, _: Tensor, __: Tensor | None) -> None:
        if layer in layers:
            value = _heads(model, layer, entering)[2]
            means.add(
                "heads", layer, rearrange(twin.attention_weights(layer, entering) @ value, "b h t d -> b t (h d)")
            )

    with generators_kept(loader, None), eval_mode(model), progress_bar(progress) as bar:
        seed_everything(seed, 0, loader, None)
        for batch in tracked(batches_at(model, loader, drawn), bar, images):
            means.images += len(batch)
            reference_features(model, batch, sdpa, matched)
            if orthogonal > 0:
                reference_features(twin, batch, sdpa, spanned)
        bound = math.sqrt(6.0 / (model.backbone.patch_embed.proj.weight[0].numel() + model.num_features))
        start = torch.empty_like(bank.weight, dtype=torch.promote_types(bank.weight.dtype, torch.float32))
        for row, layer in enumerate(layers):
            found = (1 - orthogonal) * _matched(model, means, layer, neighbours)
            if orthogonal > 0:
                noise = torch.empty_like(start[row]).uniform_(-bound, bound)
                found = found + orthogonal * outside_of(means.of("heads", layer), *_value_map(model, layer), noise)
            start[row] = found
    if not bool(start.isfinite().all()):
        raise ValueError("prompts must start at finite values, got NaN or infinite ones from the frozen model")
    bank.weight.copy_(start)
    return means.images


def outside_of(span: Tensor, weight: Tensor, bias: Tensor, noise: Tensor) -> Tensor:
    """Rows (P, C) whose values, `row @ weight.T + bias`, are those of noise (P, C) less their part in the span of rows
    (T, C), T < C."""
    basis = torch.linalg.qr(span.mT, mode="reduced").Q
    value = noise @ weight.mT + bias
    value = value - value @ basis @ basis.mT
    return (value - bias) @ torch.linalg.pinv(weight).mT


def _heads(model: PromptedModel, layer: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of rows that enter a block, without their positions."""
    block: Any = model.backbone.blocks[layer]
    return heads_of(block.attn, block.norm1(rows))


def _value_map(model: PromptedModel, layer: int) -> tuple[Tensor, Tensor]:
    weight, bias = qkv_of(model.backbone.blocks[layer].attn)
    width, wide = len(weight) // 3, torch.promote_types(weight.dtype, torch.float32)
    values = weight[2 * width :].to(wide)
    return values, values.new_zeros(width) if bias is None else bias[2 * width :].to(wide)


def _matched(model: PromptedModel, means: _Means, layer: int, neighbours: int) -> Tensor:
    """(P, C): for every prompt the mean of the patch rows whose keys are most like its own."""
    length, first = model.prompts.length, int(model.backbone.num_prefix_tokens)
    patches = slice(first, first + model.num_patches)
    keys, rows = F.normalize(means.of("keys", layer), dim=-1), means.of("rows", layer)
    likeness = keys[-length:] @ keys[patches].mT
    return rows[patches][likeness.topk(neighbours, dim=1).indices].mean(1)
