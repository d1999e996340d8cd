"""How each of many tasks scores its images, and all of them at once."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from vptm.frozen.parts import is_plain_linear
from vptm.models.verbalizers import ClassEmbeddings, LinearVerbalizer, PrototypicalVerbalizer
from vptm_kernels import FoldedHead, fold_head

Verbalizer = PrototypicalVerbalizer | LinearVerbalizer | ClassEmbeddings


class Readout(NamedTuple):
    """A verbalizer as it is at one moment; exactly one of `cosine`, `linear` and `module` is there.

    cosine: head (d, C), (d,) and unit prototypes (K, d), over `temperature`. linear: weight (K, C) and bias (K,).
    module: a copy of the verbalizer and the token head it reads, where neither is exact.
    """

    classes: int
    cosine: tuple[FoldedHead, Tensor] | None = None
    temperature: float = 1.0
    linear: tuple[Tensor, Tensor] | None = None
    module: tuple[Verbalizer, nn.Linear | None] | None = None


def readout_of(verbalizer: Verbalizer, lm_head: nn.Linear | None) -> Readout:
    """What `verbalizer` computes from a hidden state, with the token head and the projection as one map where that is
    exact: cosines and linear heads of token logits, and of the hidden state itself."""
    if type(verbalizer) is LinearVerbalizer and is_plain_linear(verbalizer.head):
        head = verbalizer.head
        if verbalizer.token_activation == "hidden":
            return Readout(head.out_features, linear=_values(head))
        if verbalizer.token_activation == "logits" and is_plain_linear(lm_head):
            assert lm_head is not None
            folded = fold_head(lm_head.weight, lm_head.bias, head.weight, head.bias)
            return Readout(head.out_features, linear=(folded.weight, folded.bias))
    elif type(verbalizer) is ClassEmbeddings and verbalizer.projection is not None:
        weight, embeddings = verbalizer.projection.detach(), verbalizer.embeddings.detach()
        cosine = FoldedHead(weight.clone(), weight.new_zeros(len(weight))), F.normalize(embeddings, dim=-1)
        return Readout(len(embeddings), cosine, float(verbalizer.temperature))
    elif type(verbalizer) is PrototypicalVerbalizer:
        classes, temperature = len(verbalizer.prototypes), float(verbalizer.temperature)
        prepared = verbalizer.prepare(lm_head)
        if prepared is not None:
            return Readout(classes, (prepared.head, prepared.prototypes), temperature)
        if verbalizer.token_activation == "hidden" and is_plain_linear(verbalizer.projection):
            assert verbalizer.projection is not None
            unit = F.normalize(verbalizer.prototypes.detach(), dim=-1)
            return Readout(classes, (FoldedHead(*_values(verbalizer.projection)), unit), temperature)
    classes = next(len(value) for name, value in verbalizer.state_dict().items() if name in _ROWS_ARE_CLASSES)
    kept = copy.deepcopy((verbalizer, lm_head if reads_tokens(verbalizer) else None))
    return Readout(classes, module=kept)


_ROWS_ARE_CLASSES = ("prototypes", "embeddings", "head.weight")


def reads_tokens(verbalizer: Verbalizer) -> bool:
    """Whether a verbalizer needs a token head."""
    return getattr(verbalizer, "token_activation", "hidden") != "hidden"


def _values(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = linear.weight.detach()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
    return weight.clone(), bias.clone()
