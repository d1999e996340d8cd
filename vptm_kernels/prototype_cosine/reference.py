"""The definition of prototype cosine, in eager PyTorch of any floating dtype: every token logit is stored.

Every other implementation is tested against this one in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from .folding import FoldedHead


def prototype_cosine_reference(
    hidden: Tensor,
    token_weight: Tensor | FoldedHead,
    token_bias: Tensor | None,
    prototypes: Tensor,
    *,
    projection: Tensor | None = None,
    projection_bias: Tensor | None = None,
    activation: str = "logits",
    class_offsets: Sequence[int] | None = None,
    task_ids: Tensor | None = None,
    class_ranges: Sequence[tuple[int, int]] | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """`vptm_kernels.prototype_cosine`, whose docstring describes the arguments."""
    if isinstance(token_weight, FoldedHead):
        weight, bias = token_weight
        if weight.ndim == 3:
            assert task_ids is not None
            rows = [weight[task] @ h + bias[task] for h, task in zip(hidden, task_ids.tolist())]
            embedding = torch.stack(rows) if rows else hidden.new_zeros(0, weight.shape[1])
        else:
            embedding = F.linear(hidden, weight, bias)
    else:
        tokens = F.linear(hidden, token_weight, token_bias)
        if activation == "softmax":
            tokens = tokens.softmax(-1)
        elif activation == "log_softmax":
            tokens = tokens.log_softmax(-1)
        embedding = tokens if projection is None else F.linear(tokens, projection, projection_bias)
    eps = max(eps, torch.finfo(hidden.dtype).tiny)
    cosine = F.linear(F.normalize(embedding, dim=-1, eps=eps), F.normalize(prototypes, dim=-1, eps=eps))
    if class_ranges is not None:
        widest = max((count for _, count in class_ranges), default=0)
    elif class_offsets is not None and task_ids is not None:
        widest = max(end - start for start, end in pairwise(class_offsets))
        counts = [(start, end - start) for start, end in pairwise(class_offsets)]
        class_ranges = [counts[task] for task in task_ids.tolist()]
    else:
        return cosine
    rows = []
    for row, (start, count) in zip(cosine, class_ranges):
        rows.append(F.pad(row[start : start + count], (0, widest - count), value=float("-inf")))
    return torch.stack(rows) if rows else cosine.new_zeros(0, widest)
