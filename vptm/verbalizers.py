"""Verbalizers: from the hidden state of the read-out row to class scores, through the visual-token head or beside
it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vptm_kernels import prototype_cosine

from .choices import number, one_of

if TYPE_CHECKING:
    from .prompted_beit import PromptedBEiT

TOKEN_ACTIVATIONS = ("hidden", "logits", "softmax", "log_softmax")


def read_tokens(hidden: Tensor, lm_head: nn.Linear | None, token_activation: str) -> Tensor:
    """What a verbalizer reads: the hidden state itself, or the visual-token prediction made from it.

    Args:
        hidden: (B, C) normalised read-out row.
        lm_head: (V, C) token head; may be None when `token_activation` is "hidden".
        token_activation: "hidden", "logits", "softmax" or "log_softmax" over the V tokens.

    Returns:
        (B, C) for "hidden", else (B, V).
    """
    if token_activation == "hidden":
        return hidden
    if lm_head is None:
        raise ValueError(f"token_activation={token_activation!r} needs a token head (lm_head), this model has none")
    logits = lm_head(hidden)
    if token_activation == "softmax":
        return logits.softmax(dim=-1)
    if token_activation == "log_softmax":
        return logits.log_softmax(dim=-1)
    return logits


def _check_num_classes(num_classes: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}")


class PrototypicalVerbalizer(nn.Module):
    """Cosine similarity of the projected token prediction to learned class prototypes, over a temperature.

    `e = projection(read_tokens(hidden)); score_k = cos(e, prototypes_k) / temperature`. The prototypes follow ProtoVerb
    (arXiv:2203.09770); reading them from masked visual token logits follows VPTM (arXiv:2303.04998), whose method text
    is not public, so this is a reconstruction with every open choice an argument.

    Args:
        in_features: width of what is read, V for token predictions or C for the hidden state.
        num_classes: K.
        prototype_dim: d, or None to keep the prototypes in the space that is read (no projection, d = in_features).
        token_activation: see `read_tokens`.
        projection_bias: whether the projection has a bias.
        temperature: fixed value > 0, or None for one that is learned, starting at 0.1.

    Attributes:
        projection: `nn.Linear(in_features, d)` or None.
        prototypes: (K, d) parameter, Xavier-uniform at the start.
        log_temperature: 0-d parameter, or buffer when fixed; the logarithm keeps the temperature positive in training.

    Example:
        >>> verbalizer = PrototypicalVerbalizer(16, 3, prototype_dim=4, token_activation="hidden")
        >>> verbalizer(torch.randn(2, 16)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        prototype_dim: int | None = 128,
        token_activation: str = "logits",
        projection_bias: bool = False,
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        _check_num_classes(num_classes)
        one_of("token_activation", token_activation, TOKEN_ACTIVATIONS)
        if prototype_dim is not None and (
            isinstance(prototype_dim, bool) or not isinstance(prototype_dim, int) or prototype_dim < 1
        ):
            raise ValueError(f"prototype_dim must be an integer >= 1 or None, got {prototype_dim!r}")
        if temperature is not None and not 0 < number("temperature", temperature) < math.inf:
            raise ValueError(f"temperature must be finite and > 0, or None to learn it, got {temperature!r}")
        self.token_activation = token_activation
        self.projection = None
        if prototype_dim is not None:
            self.projection = nn.Linear(in_features, prototype_dim, bias=projection_bias)
        self.prototypes = nn.Parameter(torch.empty(num_classes, prototype_dim or in_features))
        nn.init.xavier_uniform_(self.prototypes)
        log_temperature = torch.tensor(math.log(0.1 if temperature is None else temperature))
        if temperature is None:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    @property
    def temperature(self) -> Tensor:
        """The temperature that divides the cosines, a 0-d tensor."""
        return self.log_temperature.exp()

    def embed(self, hidden: Tensor, lm_head: nn.Linear | None = None) -> Tensor:
        """What is compared to the prototypes: (B, d) projections of what is read from the rows (B, C)."""
        read = read_tokens(hidden, lm_head, self.token_activation)
        return read if self.projection is None else self.projection(read)

    @torch.no_grad()
    def init_prototypes(self, model: PromptedBEiT, loader: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start every prototype at the mean embedding of its class, under the model's present prompts and projection.

        Args:
            model: the model this verbalizer belongs to; it is in eval mode meanwhile.
            loader: the support set as (images, labels) batches, labels (B,) integers in 0 .. K - 1.

        Raises:
            ValueError: a label outside 0 .. K - 1, embeddings that are not finite, or a class without an image. The
                prototypes are then unchanged.
        """
        device, classes = self.prototypes.device, self.prototypes.shape[0]
        sums = torch.zeros(self.prototypes.shape, dtype=torch.float64, device=device)
        counts = torch.zeros(classes, dtype=torch.long, device=device)
        seen, training = 0, model.training
        model.eval()
        try:
            for images, labels in loader:
                labels = labels.to(device)
                outside = ((labels < 0) | (labels >= classes)).nonzero()
                if outside.numel():
                    index = int(outside[0])
                    raise ValueError(
                        f"labels must lie in 0 .. {classes - 1}, got {int(labels[index])} for image {seen + index}"
                    )
                embedding = self.embed(model.forward_hidden(images.to(device)), model.lm_head).double()
                if not bool(embedding.isfinite().all()):
                    raise ValueError(f"embeddings must be finite, got NaN or inf in the batch from image {seen} on")
                sums.index_add_(0, labels, embedding)
                counts += torch.bincount(labels, minlength=classes)
                seen += len(labels)
        finally:
            model.train(training)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"every class must have an image in the support set, got none for class {empty[0]}")
        self.prototypes.copy_(sums / counts[:, None])

    def cosine(self, hidden: Tensor, lm_head: nn.Linear | None = None, impl: str = "auto") -> Tensor:
        """Cosine similarities (B, K) of the read-out rows (B, C) to the prototypes, in [-1, 1].

        What reads tokens runs in `vptm_kernels.prototype_cosine`, with its `impl`, and stores token logits only where
        that is cheapest; "reference" always stores them.
        """
        if lm_head is None or self.token_activation == "hidden" or impl == "reference":
            embedding = self.embed(hidden, lm_head)
            return F.linear(F.normalize(embedding, dim=-1), F.normalize(self.prototypes, dim=-1))
        return prototype_cosine(
            hidden,
            lm_head.weight,
            lm_head.bias,
            self.prototypes,
            projection=None if self.projection is None else self.projection.weight,
            projection_bias=None if self.projection is None else self.projection.bias,
            activation=self.token_activation,
            impl=impl,
        )

    def forward(self, hidden: Tensor, lm_head: nn.Linear | None = None, impl: str = "auto") -> Tensor:
        """Class scores (B, K) = cosine / temperature; `impl` as in `cosine`."""
        return self.cosine(hidden, lm_head, impl) / self.temperature


class LinearVerbalizer(nn.Module):
    """A linear classifier on what is read: with `token_activation="hidden"` and the CLS row this is the head of VPT.

    Args:
        in_features: width of what is read.
        num_classes: K.
        token_activation: see `read_tokens`.

    Attributes:
        head: `nn.Linear(in_features, K)`, truncated normal (0.02) weight and zero bias at the start.
    """

    def __init__(self, in_features: int, num_classes: int, *, token_activation: str = "hidden") -> None:
        super().__init__()
        _check_num_classes(num_classes)
        one_of("token_activation", token_activation, TOKEN_ACTIVATIONS)
        self.token_activation = token_activation
        self.head = nn.Linear(in_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, lm_head: nn.Linear | None = None) -> Tensor:
        """Class scores (B, K)."""
        return self.head(read_tokens(hidden, lm_head, self.token_activation))
