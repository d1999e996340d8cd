"""Prompts in pixels: a learned border around the image, and training it under a label mapping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from vptm.data.labels import check_labels
from vptm.frozen.fold import unfoldable
from vptm.messages import number, one_of
from vptm.methods.reprogramming.label_mapping import (
    LabelMapping,
    bayesian_mapping,
    frequency_mapping,
    label_counts,
)
from vptm.settings import PixelPrompt

PIXEL_PROMPTS = get_args(PixelPrompt)
MAPPING_UPDATES = ("fixed", "flm", "ilm", "blm")


class VisualPrompt(nn.Module):
    """A learned border in pixel space (visual prompting, as in arXiv:2211.11635).

    - "expansive": the (image_size)-pixel image stands in the middle of (size)-pixel grey, whose pixels are
      `sigmoid(delta)`, and the whole is normalised; the border starts at 0.5. Of an odd difference of sizes the pixel
      more is on the left and on the top, as in the released code of ILM-VP.
    - "additive": `delta`, starting at 0, is added to the outer `border` pixels of the normalised image.

    Args:
        mode: "expansive" or "additive".
        size: pixels of what the classifier takes.
        image_size: pixels of the image, for "expansive".
        border: width of the border, for "additive"; 30 in the released code.
        mean, std: of the classifier's normalisation, for "expansive".

    Attributes:
        delta: (C, size, size); only its border is used.

    Example:
        >>> VisualPrompt("expansive", size=8, image_size=4)(torch.rand(2, 3, 4, 4)).shape
        torch.Size([2, 3, 8, 8])
    """

    mask: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mode: str = "expansive",
        *,
        size: int = 224,
        image_size: int = 32,
        border: int = 30,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        one_of("mode", mode, PIXEL_PROMPTS)
        if mode == "expansive" and not 1 <= image_size <= size:
            raise ValueError(f"image_size must be in 1..{size}, the size around it, got {image_size}")
        if mode == "additive" and not 1 <= border <= size // 2:
            raise ValueError(f"border must be in 1..{size // 2}, half of the image, got {border}")
        self.mode, self.size = mode, size
        self.image_size = image_size if mode == "expansive" else size
        width = (size - image_size + 1) // 2 if mode == "expansive" else border
        inside = image_size if mode == "expansive" else size - 2 * border
        self.inside = slice(width, width + inside)
        self.delta = nn.Parameter(torch.zeros(len(mean), size, size))
        mask = torch.ones(1, size, size)
        mask[:, self.inside, self.inside] = 0.0
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def border(self) -> Tensor:
        """What stands on, or is added to, the border: (C, size, size), zero inside."""
        if self.mode == "additive":
            return self.delta * self.mask
        return (torch.sigmoid(self.delta) - self.mean) / self.std * self.mask

    def forward(self, images: Tensor) -> Tensor:
        """Images with their border, (B, C, size, size): from (B, C, image_size, image_size) in 0..1 for "expansive",
        from normalised (B, C, size, size) for "additive", which stay as they are: the released code adds in place.

        Raises:
            ValueError: images of another shape.
        """
        self._check(images)
        if self.mode == "additive":
            return images + self.border()
        left = self.inside.start
        right = self.size - self.inside.stop
        return F.pad((images - self.mean) / self.std, (left, right, left, right)) + self.border()

    def _check(self, images: Tensor) -> None:
        wanted = (len(self.delta), self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise ValueError(f"images must be (B, {', '.join(map(str, wanted))}), got {tuple(images.shape)}")

    def embeds_once(self, patch_embed: nn.Module) -> bool:
        """Whether border patches can be embedded once for a batch: a plain convolution of patches at the prompt's size,
        and for "additive", which needs a linear map, without a norm after it."""
        if type(patch_embed) is not PatchEmbed or not patch_embed.flatten or patch_embed.dynamic_img_pad:
            return False
        linear = isinstance(patch_embed.norm, nn.Identity)
        return patch_embed.img_size == (self.size, self.size) and (linear or self.mode == "expansive")

    def _image_places(self, patch_embed: nn.Module) -> tuple[slice, slice]:
        """Rows and columns of the grid of patches that hold pixels of the image."""
        sides = patch_embed.patch_size
        rows, columns = (slice(self.inside.start // side, -(-self.inside.stop // side)) for side in sides)  # type: ignore[union-attr]
        return rows, columns

    def image_patches(self, patch_embed: nn.Module) -> Tensor:
        """Places of those patches, in the order of `patches`."""
        rows, columns = self._image_places(patch_embed)
        places = torch.arange(patch_embed.num_patches, device=self.delta.device).view(patch_embed.grid_size)  # type: ignore[call-overload]
        return places[rows, columns].flatten()

    def patches(self, patch_embed: nn.Module, images: Tensor) -> Tensor:
        """`patch_embed(self(images))` of a ViT, (B, N, C), computing patches of the border once for the batch.

        "expansive": a patch without an image pixel is the same for every image. "additive": the projection is linear,
        `proj(x + d) = proj(x) + proj(d) - bias`, so images may be embedded once and kept. Where `embeds_once` says no,
        every image is embedded whole.
        """
        if not self.embeds_once(patch_embed):
            return patch_embed(self(images))
        height, width = patch_embed.patch_size  # type: ignore[misc]
        if self.mode == "additive":
            self._check(images)
            shift = patch_embed(self.border()[None]) - patch_embed(torch.zeros_like(self.delta)[None])
            return patch_embed(images) + shift
        proj, norm = patch_embed.proj, patch_embed.norm
        rows, columns = self._image_places(patch_embed)
        pixels = self(images)[
            ..., rows.start * height : rows.stop * height, columns.start * width : columns.stop * width
        ]
        grid = proj(self.border()[None]).expand(len(images), -1, -1, -1).clone()  # type: ignore[operator]
        grid[..., rows, columns] = proj(pixels)  # type: ignore[operator]
        return norm(grid.flatten(2).mT)  # type: ignore[operator]


class ReprogrammedClassifier(nn.Module):
    """A frozen classifier behind a pixel prompt and before a label mapping; only the prompt is trained.

    Args:
        classifier: images -> (B, Ns) logits; frozen here and kept in eval mode.
        mapping: to the K labels.
        prompt: None classifies the images as they are, which with a semantic mapping needs no training image.

    Raises:
        ValueError: a classifier that takes another size than the prompt makes, where its `patch_embed` tells.

    Example:
        >>> source = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
        >>> model = ReprogrammedClassifier(source, LabelMapping(torch.eye(2, 6)), VisualPrompt(size=8, image_size=4))
        >>> model(torch.rand(5, 3, 4, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(self, classifier: nn.Module, mapping: LabelMapping, prompt: VisualPrompt | None = None) -> None:
        super().__init__()
        embed = getattr(classifier, "patch_embed", None)
        if prompt is not None and getattr(embed, "strict_img_size", False):
            taken = getattr(embed, "img_size", None)
            if taken is not None and tuple(taken) != (prompt.size, prompt.size):
                taken = "x".join(map(str, taken))
                raise ValueError(f"prompt must make {taken} pixels, what the classifier takes, got size={prompt.size}")
        self.classifier = classifier.requires_grad_(False).eval()
        self.mapping = mapping
        self.prompt = prompt

    def train(self, mode: bool = True) -> ReprogrammedClassifier:
        """Training mode for the prompt; the classifier stays in eval mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def source_logits(self, images: Tensor) -> Tensor:
        """(B, Ns), before the mapping."""
        vit = self.classifier
        if self.prompt is None:
            return vit(images)
        if (
            not isinstance(vit, VisionTransformer)
            or type(vit).forward is not VisionTransformer.forward
            or type(vit).forward_features is not VisionTransformer.forward_features
            or not self.prompt.embeds_once(vit.patch_embed)
        ):
            return vit(self.prompt(images))
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(self.prompt.patches(vit.patch_embed, images))))
        blocks = list(vit.blocks)
        if self.prompt.mode == "expansive" and unfoldable(blocks[0]) is None:
            changing = vit.num_prefix_tokens + self.prompt.image_patches(vit.patch_embed)
            x = _block_with_shared_rows(blocks.pop(0), x, changing)
        for block in blocks:
            x = block(x)
        return vit.forward_head(vit.norm(x))

    def forward(self, images: Tensor) -> Tensor:
        """(B, K) scores."""
        return self.mapping(self.source_logits(images))


def _block_with_shared_rows(block: nn.Module, x: Tensor, changing: Tensor) -> Tensor:
    """`block(x)` for rows (B, T, C) of which only those at `changing` differ between images: queries, keys and values
    of the others are made once for the batch."""
    attn: Any = block.attn
    shared = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    shared[changing] = False
    of_changing, of_shared = attn.qkv(block.norm1(x[:, changing])), attn.qkv(block.norm1(x[:1, shared]))  # type: ignore[operator]
    qkv = of_changing.new_empty(*x.shape[:2], of_changing.shape[-1])
    qkv[:, changing], qkv[:, shared] = of_changing, of_shared
    query, key, value = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attn.scale).transpose(1, 2).flatten(2)
    x = x + block.ls1(attn.proj(mixed))  # type: ignore[operator]
    return x + block.ls2(block.mlp(block.norm2(x)))  # type: ignore[operator]


class _Source(nn.Module):
    """The source logits of a reprogrammed classifier, as a module that can be counted."""

    def __init__(self, model: ReprogrammedClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.source_logits(images)


def fit_visual_prompt(
    model: ReprogrammedClassifier,
    train: DataLoader[Any],
    *,
    epochs: int,
    lr: float = 0.01,
    update: str = "fixed",
    m: int = 1,
    seed: int = 0,
) -> list[float]:
    """Train the pixel prompt by cross-entropy, as the released code of ILM does: Adam, the rate divided by ten after
    half and again after 72 % of the epochs, rounded, the first epoch always at `lr`. The last epoch is what is left;
    the released code keeps the one that is best on test images.

    Args:
        model: its prompt is trained in place, its mapping replaced where `update` says so.
        train: (images, labels) batches.
        epochs, lr: passes and first learning rate, > 0.
        update: "fixed" keeps the mapping; "flm" counts once, before training; "ilm" before every epoch, under the
            prompt of that moment; "blm" takes soft weights from those counts, before every epoch.
        m: source labels of a label, for "flm" and "ilm".
        seed: of the order of images.

    Returns:
        Mean training loss of every epoch.

    Raises:
        ValueError: a model without a prompt, an argument out of range, no image in `train`, a label outside 0..K-1, or
            with an `update` a label without an image.
        FloatingPointError: the loss became NaN or infinite.
    """
    one_of("update", update, MAPPING_UPDATES)
    if model.prompt is None:
        raise ValueError("model must have a prompt to train, it has none")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be an integer >= 1, got {epochs!r}")
    if not 0 < number("lr", lr) < float("inf"):
        raise ValueError(f"lr must be finite and > 0, got {lr}")
    labels = len(model.mapping.weights)
    optimiser = torch.optim.Adam(model.prompt.parameters(), lr=lr)
    steps = [max(1, round(share * epochs)) for share in (0.5, 0.72)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, steps, gamma=0.1)
    place = model.prompt.delta.device
    losses = []
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(epochs):
            if update in ("ilm", "blm") or (update == "flm" and epoch == 0):
                batches = ((images.to(place), targets) for images, targets in train)
                counts = label_counts(_Source(model), batches, labels)
                weights = bayesian_mapping(counts) if update == "blm" else frequency_mapping(counts, m=m)
                model.mapping = LabelMapping(weights, "mean" if update == "blm" else model.mapping.aggregation).to(
                    place
                )
            model.train()
            summed = seen = 0.0
            for images, targets in train:
                check_labels(targets, labels, first=int(seen))
                loss = F.cross_entropy(model(images.to(place)), targets.to(place))
                if not math.isfinite(value := float(loss.detach())):
                    rate = optimiser.param_groups[0]["lr"]
                    raise FloatingPointError(f"loss became {value} at epoch {epoch} with lr {rate:.3g}: use a lower lr")
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                summed, seen = summed + value * len(targets), seen + len(targets)
            if not seen:
                raise ValueError("train must hold at least one image, it is empty")
            schedule.step()
            losses.append(summed / seen)
    model.eval()
    return losses
