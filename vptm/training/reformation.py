"""ProVP-Ref's contrast (arXiv:2304.08386): prompts held to the features of the frozen model, both in one pass."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vptm.frozen.folded import Folded, Start
from vptm.messages import number
from vptm.models.prompted_model import PromptedModel
from vptm.models.verbalizers import ClassEmbeddings
from vptm.training.losses import feature_reformation


class FeatureReformation:
    """`weight` times `feature_reformation` (vptm.training.losses) of a model's features and those without prompts.

    Both branches share the embedding of images, and in block 0 its norm, queries, keys and values, which no prompt
    reaches. Attention of block 0 runs once with prompts among the keys and once without: joining the two by their
    log-sum-exp would save less than 1 % of a forward pass.

    Args:
        model: has a frozen backbone; its features are what its verbalizer compares with class embeddings, or the
            read-out row.
        weight: lambda, 1 in the published code.
        temperature: 1 in the published code.
        cache: keep the frozen features of every image, found again by its pixels. For training without augmentation,
            where they are the same in every epoch.

    Example:
        >>> import vptm
        >>> model = vptm.PromptedBEiT("builtin", 2, prompt_mode="progressive", readout="cls", token_activation="hidden")
        >>> hidden, loss = FeatureReformation(model)(torch.rand(4, 1, 28, 28))
        >>> hidden.shape, loss.ndim
        (torch.Size([4, 192]), 0)
    """

    def __init__(
        self, model: PromptedModel, *, weight: float = 1.0, temperature: float = 1.0, cache: bool = False
    ) -> None:
        if any(parameter.requires_grad for parameter in model.backbone.parameters()):
            raise ValueError("reformation needs a frozen backbone, this one is trained")
        if not 0 <= number("reformation", weight) < float("inf"):
            raise ValueError(f"reformation must be finite and >= 0, got {weight!r}")
        if not 0 < number("reformation_temperature", temperature) < float("inf"):
            raise ValueError(f"reformation_temperature must be finite and > 0, got {temperature!r}")
        if cache and model.mask_token is not None and model.mask_token.requires_grad:
            raise ValueError("cache must be False where the mask token learns: frozen features change with it")
        self.model, self.twin = model, model.without_prompts()
        self._cached_on: Folded | None = None
        self.weight, self.temperature = weight, temperature
        self._cache: dict[bytes, Tensor] | None = {} if cache else None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The prompted read-out rows (B, C) of a batch, and its loss."""
        model = self.model.of_size(images)
        folded = model.folded_constants() if self._cache is None and model.prompts.placement == "prepend" else None
        if folded is not None:
            model.check_images(images)
            start = folded.start(model, images)
            frozen, hidden = self._compute(images, start), model.hidden_on(images, folded, start)
        else:
            frozen, hidden = self.frozen(images), model.forward_hidden(images)
        loss = feature_reformation(image_features(model, hidden), frozen, temperature=self.temperature)
        return hidden, self.weight * loss

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """Features (B, D) without prompts."""
        folded = self.model.folded_constants()
        if self._cache is None or folded is None:
            return self._compute(images)
        if folded is not self._cached_on:  # of other weights
            self._cache.clear()
            self._cached_on = folded
        pixels = images.detach().cpu().contiguous().view(torch.uint8).numpy()  # numpy knows no bfloat16
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
        missing = [i for i, key in enumerate(keys) if key not in self._cache]
        if missing:
            for i, features in zip(missing, self._compute(images[missing])):
                self._cache[keys[i]] = features
        return torch.stack([self._cache[key] for key in keys])

    @torch.no_grad()
    def _compute(self, images: Tensor, start: Start | None = None) -> Tensor:
        self.twin.impl = self.model.impl
        twin = self.twin.of_size(images)
        return image_features(self.model, twin.hidden_on(images, twin.folded_constants(), start))


def image_features(model: PromptedModel, hidden: Tensor) -> Tensor:
    """What is compared with class embeddings (B, D), or the read-out row itself (B, C) for any other verbalizer."""
    return model.verbalizer.embed(hidden) if isinstance(model.verbalizer, ClassEmbeddings) else hidden
