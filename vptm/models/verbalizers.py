"""Verbalizers: from the hidden state of the read-out row to class scores, through the visual-token head or beside
it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vptm.frozen.modes import eval_mode
from vptm.frozen.parts import is_plain_linear
from vptm.frozen.rows import PreparedHead, PromptedRows
from vptm.messages import check_integer, number, one_of
from vptm.models.claims import check_claim
from vptm.models.support_set import support_rows
from vptm.models.whitening import whitened_start
from vptm.settings import TokenActivation
from vptm_kernels import fold_head, prototype_cosine
from vptm_kernels.prototype_cosine.activations import activate

TOKEN_ACTIVATIONS = get_args(TokenActivation)
_ROWS_AT_ONCE = 256


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
    return activate(lm_head(hidden), token_activation)


def _check_sizes(in_features: int, num_classes: int) -> None:
    for name, size in (("in_features", in_features), ("num_classes", num_classes)):
        check_integer(name, size, 1)


class PrototypicalVerbalizer(nn.Module):
    """Cosine similarity of the projected token prediction to learned class prototypes, over a temperature.

    `e = projection(read_tokens(hidden)); score_k = cos(e, prototypes_k) / temperature`. The prototypes follow ProtoVerb
    (arXiv:2203.09770); reading them from masked visual token logits follows VPTM (arXiv:2303.04998), whose method text
    is not public, so this is a reconstruction with every open choice an argument. Training is by cross-entropy;
    ProtoVerb's own losses join it with `vptm.fit(..., protoverb_weight=1.0)`, or come after it with
    `vptm.fit_prototypes`.

    Args:
        in_features: width of what is read, V for token predictions or C for the hidden state.
        num_classes: K.
        prototype_dim: d, or None to keep the prototypes in the space that is read (no projection, d = in_features).
        token_activation: see `read_tokens`.
        projection_bias: whether the projection has a bias.
        temperature: fixed value > 0, or None for one that is learned, starting at 0.1.

    Attributes:
        projection: `nn.Linear(in_features, d)` or None.
        prototypes: (K, d) parameter, Xavier-uniform at the start; `init_prototypes` starts them at class means.
        log_temperature: (1,) parameter, or buffer when fixed; the logarithm keeps the temperature positive in training.

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
        _check_sizes(in_features, num_classes)
        one_of("token_activation", token_activation, TOKEN_ACTIVATIONS)
        check_integer("prototype_dim", prototype_dim, 1, optional=True)
        # as the float32 it is kept as
        if temperature is not None and not 0 < torch.tensor(float(number("temperature", temperature))) < math.inf:
            raise ValueError(f"temperature must be finite and > 0, or None to learn it, got {temperature!r}")
        self.token_activation = token_activation
        self.projection = None
        check_claim("num_classes", num_classes * (prototype_dim or in_features))
        if prototype_dim is not None:
            check_claim("prototype_dim", prototype_dim * in_features)
            self.projection = nn.Linear(in_features, prototype_dim, bias=projection_bias)
        self.prototypes = nn.Parameter(torch.empty(num_classes, prototype_dim or in_features))
        nn.init.xavier_uniform_(self.prototypes)
        log_temperature = torch.tensor([math.log(0.1 if temperature is None else temperature)])
        if temperature is None:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)
        self.register_load_state_dict_pre_hook(_take_scalar)

    @property
    def temperature(self) -> Tensor:
        """The temperature that divides the cosines, a 0-d tensor."""
        return self.log_temperature.exp().reshape(())  # without dimensions it leaves the type of the cosines alone

    def embed(self, hidden: Tensor, lm_head: nn.Linear | None = None) -> Tensor:
        """What is compared to the prototypes: (B, d) projections of what is read from the rows (B, C)."""
        read = read_tokens(hidden, lm_head, self.token_activation)
        return read if self.projection is None else self.projection(read)

    def embed_support(self, hidden: Tensor, lm_head: nn.Linear | None) -> Tensor:
        """`embed` for many rows at once: where that is exact, without the V token logits of each."""
        if self.token_activation == "logits" and self.projection is not None and self._is_plain(lm_head):
            assert lm_head is not None
            head = fold_head(lm_head.weight, lm_head.bias, self.projection.weight, self.projection.bias)
            return F.linear(hidden, *head)
        return self.embed(hidden, lm_head)

    @torch.no_grad()
    def init_prototypes(
        self, model: PromptedRows, loader: Iterable[tuple[Tensor, Tensor]], *, whiten: bool = False
    ) -> None:
        """Start every prototype at the mean embedding of its class, under the model's present prompts and projection.

        Memory does not depend on the number of images.

        Args:
            model: the model this verbalizer belongs to; it is in eval mode meanwhile.
            loader: the support set as (images, labels) batches, labels (B,) integers in 0 .. K - 1.
            whiten: also start the projection, as `W (z - m)` of what is read, z: m is the mean of the class means, and
                W makes classes round, see `vptm.models.whitening.discriminants`, by the covariance within classes,
                shrunk as `shrunk` there says. The model then is a linear discriminant analysis that compares by cosine.
                It needs a projection with bias, and "logits" or "hidden" to read.

        Raises:
            ValueError: a label outside 0 .. K - 1, read-out rows or embeddings that are not finite, a class without
                an image, or a verbalizer that cannot be whitened. It is then unchanged.
        """
        head = self._whitened_head(model.lm_head) if whiten else None
        with eval_mode(model):
            support = support_rows(model, loader, len(self.prototypes))
            if not whiten:
                self.to_class_means(support, model.lm_head)
                return
            classes, dim = self.prototypes.shape
            found = [value.to(self.prototypes.dtype) for value in whitened_start(support, classes, dim, head)]
        if not all(bool(value.isfinite().all()) for value in found):
            raise ValueError(f"whitened prototypes must be finite in {self.prototypes.dtype}: start them in float32")
        assert self.projection is not None
        for target, value in zip((self.projection.weight, self.projection.bias, self.prototypes), found):
            target.copy_(value)

    def _whitened_head(self, lm_head: nn.Linear | None) -> tuple[Tensor, Tensor | None] | None:
        """The map from read-out rows to what is read, None for the rows themselves; ValueError where there is no linear
        one, or no projection to whiten."""
        if self.projection is None or self.projection.bias is None:
            found = "none" if self.projection is None else "one without"
            raise ValueError(f"whitened prototypes need a projection with bias (projection_bias=True), got {found}")
        if self.token_activation not in ("logits", "hidden"):
            raise ValueError(
                f"whitened prototypes need token_activation 'logits' or 'hidden', got {self.token_activation!r}"
            )
        reads_tokens = self.token_activation == "logits"
        if not self._is_itself() or (reads_tokens and not is_plain_linear(lm_head)):
            raise ValueError(
                "whitened prototypes need a PrototypicalVerbalizer whose projection and token head are plain linears "
                f"without hooks, got {type(self).__name__}, {type(self.projection).__name__}, {type(lm_head).__name__}"
            )
        if not reads_tokens:
            return None
        assert lm_head is not None
        return lm_head.weight, lm_head.bias

    @torch.no_grad()
    def to_class_means(self, support: Iterable[tuple[Tensor, Tensor]], lm_head: nn.Linear | None) -> None:
        """Every prototype at the mean embedding of the read-out rows of its class, given as batches of rows (B, C) and
        labels (B,)."""
        sums = torch.zeros(self.prototypes.shape, dtype=torch.float64, device=self.prototypes.device)
        counts = torch.zeros(len(sums), dtype=torch.float64, device=sums.device)
        for hidden, labels in support:
            counts += torch.bincount(labels, minlength=len(sums))
            for rows, their in zip(hidden.split(_ROWS_AT_ONCE), labels.split(_ROWS_AT_ONCE)):
                sums.index_add_(0, their, self.embed_support(rows, lm_head).double())
        means = sums / counts[:, None]
        if not bool(means.isfinite().all()):
            raise ValueError("embeddings of the support set must be finite, got NaN or inf: look at the projection")
        self.prototypes.copy_(means)

    def compare(self, embedding: Tensor) -> Tensor:
        """Cosine similarities (B, K) of embeddings (B, d), as `embed` makes them, to the prototypes."""
        return F.linear(F.normalize(embedding, dim=-1), F.normalize(self.prototypes, dim=-1))

    def prepare(self, lm_head: nn.Linear | None) -> PreparedHead | None:
        """Token head and projection as one map, and unit prototypes, as they are now; None where that is not exact."""
        if self.token_activation != "logits" or self.projection is None or not self._is_plain(lm_head):
            return None
        assert lm_head is not None
        head = fold_head(lm_head.weight, lm_head.bias, self.projection.weight, self.projection.bias)
        return PreparedHead(head, F.normalize(self.prototypes, dim=-1))

    def _is_plain(self, lm_head: nn.Linear | None) -> bool:
        """Whether token head and projection are linears whose weights may be read past them, and nobody's `embed` or
        `compare` would have to run."""
        return is_plain_linear(lm_head) and self._is_itself()

    def _is_itself(self) -> bool:
        """`_is_plain`, the token head left out."""
        if type(self) is not PrototypicalVerbalizer or "embed" in self.__dict__ or "compare" in self.__dict__:
            return False
        return self.projection is None or is_plain_linear(self.projection)

    def cosine(
        self,
        hidden: Tensor,
        lm_head: nn.Linear | None = None,
        impl: str = "auto",
        token_head: tuple[Tensor, Tensor | None] | None = None,
        prepared: PreparedHead | None = None,
    ) -> Tensor:
        """Cosine similarities (B, K) of the read-out rows (B, C) to the prototypes, in [-1, 1].

        What reads tokens runs in `vptm_kernels.prototype_cosine`, with its `impl`, and stores token logits only where
        that is cheapest; "reference" always stores them, and so does a token head or projection that is not a plain
        linear, which runs as the module it is. `token_head` is weight and bias of a frozen `lm_head` in the type of
        autocast; `prepared` what `prepare` gave, which then stands for everything learned here but the temperature.
        """
        if prepared is not None:
            return prototype_cosine(hidden, prepared.head, None, prepared.prototypes, unit_prototypes=True, impl=impl)
        if self.token_activation == "hidden" or impl == "reference" or not self._is_plain(lm_head):
            return self.compare(self.embed(hidden, lm_head))
        assert lm_head is not None
        return prototype_cosine(
            hidden,
            *(token_head or (lm_head.weight, lm_head.bias)),
            self.prototypes,
            projection=None if self.projection is None else self.projection.weight,
            projection_bias=None if self.projection is None else self.projection.bias,
            activation=self.token_activation,
            impl=impl,
        )

    def forward(
        self,
        hidden: Tensor,
        lm_head: nn.Linear | None = None,
        impl: str = "auto",
        token_head: tuple[Tensor, Tensor | None] | None = None,
        prepared: PreparedHead | None = None,
    ) -> Tensor:
        """Class scores (B, K) = cosine / temperature; arguments as in `cosine`."""
        return self.cosine(hidden, lm_head, impl, token_head, prepared) / self.temperature


def _take_scalar(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before it had one element the temperature was saved as a scalar."""
    name = f"{prefix}log_temperature"
    if name in state and state[name].ndim == 0:
        state[name] = state[name].reshape(1)


def folded_verbalizer(verbalizer: Any, lm_head: nn.Linear | None) -> PrototypicalVerbalizer | LinearVerbalizer:
    """The verbalizer of the hidden state that scores as one of token logits does through `lm_head`.

    Raises:
        ValueError: another activation or verbalizer, no projection, or parts that are no plain linears: no map of the
            hidden state alone is the same then.
    """
    activation = getattr(verbalizer, "token_activation", None)
    linear = getattr(verbalizer, "projection" if type(verbalizer) is PrototypicalVerbalizer else "head", None)
    plain = type(verbalizer) in (PrototypicalVerbalizer, LinearVerbalizer)
    if not plain or activation != "logits" or not is_plain_linear(linear) or not is_plain_linear(lm_head):
        raise ValueError(
            "folding needs a verbalizer that reads token logits through a plain linear, got "
            f"{type(verbalizer).__name__} of {activation!r}"
        )
    assert linear is not None and lm_head is not None
    with torch.no_grad():
        head = fold_head(lm_head.weight, lm_head.bias, linear.weight, linear.bias)
    width = lm_head.in_features
    made: PrototypicalVerbalizer | LinearVerbalizer
    if isinstance(verbalizer, LinearVerbalizer):
        made = LinearVerbalizer(width, linear.out_features)
        target = made.head
    else:
        classes, dim = verbalizer.prototypes.shape
        made = PrototypicalVerbalizer(
            width,
            classes,
            prototype_dim=dim,
            token_activation="hidden",
            projection_bias=True,
            temperature=None if isinstance(verbalizer.log_temperature, nn.Parameter) else 1.0,
        )
        made.to(head.weight.dtype)
        with torch.no_grad():
            made.prototypes.copy_(verbalizer.prototypes)
            made.log_temperature.copy_(verbalizer.log_temperature)
        assert made.projection is not None
        target = made.projection
    target.to(head.weight.dtype)
    with torch.no_grad():
        target.weight.copy_(head.weight)
        target.bias.copy_(head.bias)
    return made.to(head.weight.device)


class ClassEmbeddings(nn.Module):
    """Cosine to frozen embeddings of the classes, over a temperature; nothing is trained.

    `score_k = cos(projection hidden, embeddings_k) / temperature`, as CLIP classifies with text features. Filled by
    `vptm.set_class_embeddings`.

    Args:
        in_features: width of the hidden state, C.
        num_classes: K.
        dim: D of the embeddings, None where they live in the space of the hidden state.
        temperature: > 0; 0.01 in the released CLIP.

    Attributes:
        embeddings: (K, D) parameter without gradient.
        projection: (D, C) parameter without gradient, or None.
    """

    def __init__(self, in_features: int, num_classes: int, *, dim: int | None, temperature: float) -> None:
        super().__init__()
        _check_sizes(in_features, num_classes)
        check_claim("num_classes", num_classes * (dim or in_features))
        self.embeddings = nn.Parameter(torch.zeros(num_classes, dim or in_features), requires_grad=False)
        self.projection = None
        if dim is not None:
            self.projection = nn.Parameter(torch.zeros(dim, in_features), requires_grad=False)
        self.temperature = temperature

    def prepare(self, lm_head: nn.Linear | None) -> None:
        """Nothing here can be folded."""

    def embed(self, hidden: Tensor) -> Tensor:
        """What is compared with the embeddings, (B, D), of any length."""
        return hidden if self.projection is None else F.linear(hidden, self.projection)

    def forward(self, hidden: Tensor, lm_head: nn.Linear | None = None) -> Tensor:
        """Class scores (B, K)."""
        unit = F.normalize(self.embed(hidden), dim=-1)
        return F.linear(unit, F.normalize(self.embeddings, dim=-1)) / self.temperature


class LinearVerbalizer(nn.Module):
    """A linear classifier on what is read: with `token_activation="hidden"` and the CLS row this is the head of VPT.

    Args:
        in_features: width of what is read.
        num_classes: K.
        token_activation: see `read_tokens`.

    Attributes:
        head: `nn.Linear(in_features, K)`, truncated normal (0.02) weight and zero bias at the start, as BEiT's. VPT's
            starts wider, Kaiming normal by fan-out, with every bias at -ln 99, which a softmax does not see.
    """

    def __init__(self, in_features: int, num_classes: int, *, token_activation: str = "hidden") -> None:
        super().__init__()
        _check_sizes(in_features, num_classes)
        one_of("token_activation", token_activation, TOKEN_ACTIVATIONS)
        self.token_activation = token_activation
        check_claim("num_classes", num_classes * in_features)
        self.head = nn.Linear(in_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def prepare(self, lm_head: nn.Linear | None) -> None:
        """Nothing here can be folded."""

    def forward(self, hidden: Tensor, lm_head: nn.Linear | None = None) -> Tensor:
        """Class scores (B, K)."""
        return self.head(read_tokens(hidden, lm_head, self.token_activation))
