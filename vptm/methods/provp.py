"""ProVP-Ref (arXiv:2304.08386): classes as frozen embeddings, and prompts held to the features of the frozen model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vptm.frozen.folded import Folded, Start
from vptm.messages import number
from vptm.models.prompted_model import PromptedModel
from vptm.models.verbalizers import ClassEmbeddings
from vptm.training.losses import feature_reformation


def set_class_embeddings(
    model: PromptedModel,
    embeddings: Tensor,
    *,
    projection: Tensor | None = None,
    logit_scale: float = 100.0,
    class_names: Sequence[str] | None = None,
) -> None:
    """Classify by cosine to frozen embeddings of the classes, as CLIP does; nothing of the verbalizer is trained then.

    With CLIP weights in timm, `projection` is the weight of the model's own head (512, 768) and `embeddings` what its
    text encoder gives for the class names; for another backbone the projection can be fitted, see `ridge_projection`.

    Args:
        model: its verbalizer and number of classes are replaced.
        embeddings: (K, D), of any length.
        projection: (D, C) from the model's features to the embeddings; None where D = C.
        logit_scale: factor of the cosines; 100 in the released CLIP.
        class_names: the K names the embeddings were made of; must equal the model's where it has names.

    Raises:
        ValueError: shapes or names that do not match, or values that are not finite.

    Example:
        >>> import vptm
        >>> model = vptm.PromptedBEiT("builtin", 2, readout="cls", token_activation="hidden")
        >>> set_class_embeddings(model, torch.eye(3, 192), class_names=["a", "b", "c"])
        >>> model(torch.zeros(1, 1, 28, 28)).shape
        torch.Size([1, 3])
    """
    if embeddings.ndim != 2 or not len(embeddings) or not bool(embeddings.isfinite().all()):
        raise ValueError(f"embeddings must be (K, D), finite, got {tuple(embeddings.shape)}")
    classes, dim = embeddings.shape
    wanted = (dim, model.num_features)
    if projection is None and dim != model.num_features:
        raise ValueError(f"projection must be {wanted}, None is for embeddings of {model.num_features} values")
    if projection is not None and (tuple(projection.shape) != wanted or not bool(projection.isfinite().all())):
        raise ValueError(f"projection must be {wanted}, finite, got {tuple(projection.shape)}")
    if not 0 < number("logit_scale", logit_scale) < float("inf"):
        raise ValueError(f"logit_scale must be finite and > 0, got {logit_scale!r}")
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"class_names must name all {classes} embeddings, got {len(class_names)}")
    present = model.class_names
    if class_names is not None and present is not None and list(class_names) != list(present):
        raise ValueError(f"class_names must be those of the model, {', '.join(present)}, got {', '.join(class_names)}")
    if class_names is None and present is not None and len(present) != classes:
        raise ValueError(f"embeddings must be one for each of the {len(present)} classes of the model, got {classes}")
    model.config |= {
        "verbalizer": "class_embeddings",
        "token_activation": "hidden",
        "prototype_dim": None if projection is None else dim,
        "temperature": 1.0 / logit_scale,
    }
    names = list(class_names) if class_names is not None else present
    model.reset_classifier(classes)
    model.class_names = names
    verbalizer = model.verbalizer
    assert isinstance(verbalizer, ClassEmbeddings)
    with torch.no_grad():
        verbalizer.embeddings.copy_(embeddings)
        if projection is not None and verbalizer.projection is not None:
            verbalizer.projection.copy_(projection)


def is_clip_tower(name: str) -> bool:
    """Whether timm knows `name` as the visual tower of a CLIP."""
    return name.partition(".")[0] in timm.list_models("*clip*", module="vision_transformer")


def clip_projection(name: str, *, pretrained: bool = True) -> Tensor:
    """The projection (D, C) into the joint space of images and texts: the head of timm's visual tower of a CLIP.

    Take the tower whose activation fits its weights: of OpenAI's a "..._clip_quickgelu_..." model, see timm's notes.

    Raises:
        ValueError: no timm VisionTransformer, or a head that is no projection.
    """
    if not is_clip_tower(name):
        raise ValueError(f"model must be the visual tower of a CLIP in timm, got {name!r}")
    head = timm.create_model(name, pretrained=pretrained).head
    if not isinstance(head, nn.Linear) or (head.bias is not None and bool(head.bias.any())):
        raise ValueError(f"model must end in a projection without a bias, {name!r} does not")
    return head.weight.detach().clone()


def image_features(model: PromptedModel, hidden: Tensor) -> Tensor:
    """What is compared with class embeddings (B, D), or the read-out row itself (B, C) for any other verbalizer."""
    return model.verbalizer.embed(hidden) if isinstance(model.verbalizer, ClassEmbeddings) else hidden


def ridge_projection(features: Tensor, labels: Tensor, embeddings: Tensor, *, strength: float = 1.0) -> Tensor:
    """The (D, C) matrix that best maps image features to the embeddings of their classes, by ridge regression.

    A stand-in for weights that were trained with their text encoder: fitted on the base classes alone, it lets any
    backbone be read with class embeddings, also of classes it never saw.

    Args:
        features: (N, C), of the frozen model.
        labels: (N,) integers in 0..K-1.
        embeddings: (K, D).
        strength: of the squared penalty, relative to the mean squared feature; > 0.

    Example:
        >>> features, embeddings = torch.eye(3), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> ridge_projection(features, torch.arange(3), embeddings, strength=1e-6).mT.allclose(embeddings, atol=1e-4)
        True
    """
    if not 0 < number("strength", strength) < float("inf"):
        raise ValueError(f"strength must be finite and > 0, got {strength!r}")
    x, y = F.normalize(features.double(), dim=-1), F.normalize(embeddings.double(), dim=-1)[labels.long()]
    gram = x.mT @ x
    penalty = strength * gram.diagonal().mean()
    solved = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), x.mT @ y)
    return solved.mT.to(embeddings.dtype)


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
        model = self.model
        folded = model._runs_on() if self._cache is None and model.prompts.placement == "prepend" else None
        if folded is not None:
            model.check_images(images)
            start = folded.start(model, images)
            frozen, hidden = self._compute(images, start), model._hidden(images, folded, start)
        else:
            frozen, hidden = self.frozen(images), model.forward_hidden(images)
        loss = feature_reformation(image_features(model, hidden), frozen, temperature=self.temperature)
        return hidden, self.weight * loss

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """Features (B, D) without prompts."""
        folded = self.model._runs_on()
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
        twin = self.twin
        twin.impl = self.model.impl
        return image_features(self.model, twin._hidden(images, twin._runs_on(), start))
