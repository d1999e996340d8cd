"""ProVP-Ref (arXiv:2304.08386): classes as frozen embeddings, and prompts held to the features of the frozen model."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vptm.messages import number
from vptm.models.prompted_model import PromptedModel
from vptm.models.verbalizers import ClassEmbeddings


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
