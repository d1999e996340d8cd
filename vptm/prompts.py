"""Prompt banks: the learned rows that are added to the token sequence of a frozen transformer."""

from __future__ import annotations

import math

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F

from .choices import number, one_of

PROMPT_MODES = ("shallow", "deep", "progressive")


class PromptBank(nn.Module):
    """Learnable prompts in the three ways of the literature.

    With `P_l = dropout(expand(weight[l]))`, one dropout mask per sample as in VPT, and `Z_l` the prompt rows as block
    `l - 1` left them, block `l` receives

    - shallow (VPT-shallow, arXiv:2203.12119): `P_0` at block 0, `Z_l` afterwards (carried like any token);
    - deep (VPT-deep): `P_l` at every block, `Z_l` is discarded;
    - progressive (ProVP, arXiv:2304.08386): `P_0` at block 0, then `alpha * Z_l + (1 - alpha) * P_l`.

    alpha = 0 is deep, alpha = 1 is shallow.

    Args:
        depth: number of transformer blocks L.
        length: prompts per layer P, 0 allowed.
        dim: token width C.
        mode: "shallow", "deep" or "progressive".
        patch_values: numbers in one image patch (channels * height * width): the fan-in of the initial bound
            `sqrt(6 / (patch_values + dim))`, VPT's uniform initialisation.
        dropout: prompt dropout in training, in [0, 1).
        alpha: progressive mixing weight, in [0, 1].

    Attributes:
        weight: (1, P, C) for shallow, (L, P, C) otherwise.

    Example:
        >>> bank = PromptBank(depth=2, length=3, dim=8, mode="deep", patch_values=48)
        >>> bank(1, 4).shape
        torch.Size([4, 3, 8])
    """

    weight: nn.Parameter

    def __init__(
        self,
        depth: int,
        length: int,
        dim: int,
        *,
        mode: str = "shallow",
        patch_values: int,
        dropout: float = 0.0,
        alpha: float = 0.01,
    ) -> None:
        super().__init__()
        one_of("prompt_mode", mode, PROMPT_MODES)
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise ValueError(f"prompt_length must be an integer >= 0, got {length!r}")
        if not 0.0 <= number("prompt_dropout", dropout) < 1.0:
            raise ValueError(f"prompt_dropout must be in [0, 1), got {dropout!r}")
        if not 0.0 <= number("progressive_alpha", alpha) <= 1.0:
            raise ValueError(f"progressive_alpha must be in [0, 1], got {alpha!r}")
        self.mode = mode
        self.length = length
        self.dropout = dropout
        self.alpha = alpha
        bound = math.sqrt(6.0 / (patch_values + dim))
        layers = 1 if mode == "shallow" else depth
        self.weight = nn.Parameter(torch.empty(layers, length, dim).uniform_(-bound, bound))

    def forward(self, layer: int, batch: int, carried: Tensor | None = None) -> Tensor:
        """Prompt rows (B, P, C) that enter block `layer`; `carried` (B, P, C) are the rows the block before it
        produced."""
        if layer > 0 and self.mode == "shallow":
            if carried is None:
                raise ValueError(f"carried must be the (B, P, C) prompt rows of block {layer - 1}, got None")
            return carried
        rows = F.dropout(repeat(self.weight[layer], "p c -> b p c", b=batch), self.dropout, self.training)
        if layer > 0 and self.mode == "progressive":
            if carried is None:
                raise ValueError(f"carried must be the (B, P, C) prompt rows of block {layer - 1}, got None")
            return self.alpha * carried + (1.0 - self.alpha) * rows
        return rows

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, mode={self.mode}, dropout={self.dropout}"
