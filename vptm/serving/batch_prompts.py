"""Prompts of many tasks that enter a batch as rows: every image its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from vptm.models.prompts import PromptBank


def schedule(prompts: PromptBank, depth: int) -> Hashable:
    """What tasks must share to run as rows of one batch: how many prompts, and what each block does with them."""
    return prompts.length, tuple(prompts.role(block) for block in range(depth))


def mixing_blocks(prompts: PromptBank) -> range:
    """Blocks whose prompts are mixed with those of the block before."""
    return prompts.blocks[1:] if prompts.mode == "progressive" else range(0)


class BatchPrompts(nn.Module):
    """`PromptBank` for a batch in which every image has the prompts of its own task; for inference.

    Args:
        template: prompts of any of the tasks, with the same `schedule`.
        rows: for every image the prompts (layers, P, C) of the blocks that have their own.
        alpha: for every image the alphas (M,) of the blocks that mix, of at least 32 bits.
    """

    projection = None
    dropout = 0.0
    kind = "tokens"
    placement = "prepend"
    added_to = "patches"

    def __init__(self, template: PromptBank, rows: Sequence[Tensor], alpha: Sequence[Tensor]) -> None:
        super().__init__()
        self.mode, self.after = template.mode, template.after
        self.length, self.blocks = template.length, template.blocks
        self.role = template.role
        self.weight = torch.stack(list(rows), 1)  # (layers, B, P, C)
        self.alpha = torch.stack(list(alpha), 1)[..., None, None]  # (M, B, 1, 1)
        self.eval()

    def per_sample(self) -> bool:
        """Every image has its own."""
        return True

    def columns(self, block: int) -> None:
        """Tasks with gates are in no such batch."""

    def mixing(self, block: int) -> Tensor:
        """alpha of every image, (B, 1, 1)."""
        return self.alpha[block - self.blocks.start - 1]

    def rows(self, block: int, batch: int) -> Tensor:
        """`P_l` of every image, (B, P, C)."""
        return self.weight[0 if len(self.weight) == 1 else block - self.blocks.start]

    def expanded(self) -> Tensor:
        """(layers, B, P, C)."""
        return self.weight

    def added(self, block: int, batch: int) -> None:
        """Nothing is added to patch tokens."""

    def keys_values(self, block: int, batch: int) -> None:
        """No block has learned keys and values."""

    def crossing(self, block: int, batch: int) -> None:
        """No block has a cross-attention."""

    def forward(self, block: int, batch: int, carried: Tensor | None = None) -> Tensor:
        """Prompt rows (B, P, C) that enter a block, as in `PromptBank`."""
        role = self.role(block)
        if role == "own":
            return self.rows(block, batch)
        assert carried is not None
        if role == "carried":
            return carried
        alpha = self.mixing(block)
        return alpha * carried + (1.0 - alpha) * self.rows(block, batch)
