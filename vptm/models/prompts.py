"""Prompt banks: what is learned and joins the tokens of a frozen transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F

from vptm.messages import check_integer, check_range, number, one_of
from vptm.models.claims import check_claim
from vptm.settings import (
    AddedTo,
    AfterPrompts,
    DropoutPer,
    GatePer,
    Placement,
    ProjectionPer,
    PromptKind,
    PromptMode,
    PromptSettings,
)

TOKEN_ROWS = "prompts that are token rows of their own"  # in messages


class PromptBank(nn.Module):
    """Learnable prompts in the three ways of the literature, with VPT's variants.

    With `P_l = dropout(expand(projection(weight[l])))` and `Z_l` the prompt rows as block `l - 1` left them, block `l`
    receives

    - shallow (VPT-shallow, arXiv:2203.12119): `P_0` at block 0, `Z_l` afterwards (carried like any token);
    - deep (VPT-deep): `P_l` at every block, `Z_l` is discarded;
    - progressive (ProVP, arXiv:2304.08386): `P_0` at block 0, then `alpha * Z_l + (1 - alpha) * P_l`.

    alpha = 0 is deep, alpha = 1 is shallow. Any number of prompts enters block 0; ProVP's code leaves four or fewer out
    there and then writes them over image patches. Its alpha is one constant; with `train_alpha` every block that mixes
    learns its own, which starts at alpha and may leave [0, 1].

    With `kind="kv"` a block has learned keys and values `K_l, V_l` (P, C) in place of rows: in its attention every
    query attends to `[k; K_l]` and `[v; V_l]`, where k and v are keys and values of its rows, after their biases, a
    norm of theirs and rotary positions. These are the key-value prompts of E2VPT (arXiv:2307.13770), without its input
    prompts and its pruning, and what PEFT's prefix tuning learns (`vptm.load_peft_prefix`). They are for "deep" and in
    the blocks that have their own alone. E2VPT's released settings learn one tensor for both; here they are two.

    With `kind="cross"` prompts are no keys of self-attention and take nothing from its softmax: between self-attention
    and MLP the rows x of a block become `x + s * proj(softmax(q(x) k(P_l)^T / sqrt(D)) v(P_l))`, a cross-attention with
    the block's own projections, on rows and prompts that are not normalised. This is CVPT (arXiv:2408.14961) with its
    weights shared and frozen, where its released code puts it by default (`insert=3`). s is the block's LayerScale, of
    which the paper's ViT has none; no position bias and no rotary position reaches it. It is for "deep" and in the
    blocks that have prompts of their own alone.

    With a gate, every query of a block adds `gate[block, head, prompt]` to its scaled score with a prompt, prompt rows
    too: a prompt has exp(gate) of the weight it would have. A start of -4 lets training begin near the frozen model,
    as zero-initialised attention does in LLaMA-Adapter (arXiv:2303.16199).

    Args:
        depth: number of transformer blocks L.
        length: prompts per layer P, 0 allowed.
        dim: token width C.
        mode: "shallow", "deep" or "progressive".
        patch_values: numbers in one image patch (channels * height * width): the fan-in of the initial bound
            `sqrt(6 / (patch_values + prompt_dim))`, VPT's uniform initialisation. ProVP's code takes 588 for any patch.
        dropout: prompt dropout in training, in [0, 1).
        alpha: progressive mixing weight, in [0, 1]; or L - 1 of them, for blocks 1 to L - 1.
        train_alpha: learn alpha, one number for every block that mixes; for "progressive".
        blocks: k > 0: only the first k blocks have prompts of their own; k < 0: only the last -k, and no block before
            them sees a prompt (the released code of VPT overwrites image patches there); None: all.
        after: with k > 0, whether the blocks after the first k "carry" the prompt rows on, or "drop" them.
        shared: one prompt for all blocks.
        prompt_dim: width of the learned rows, brought to C by a learned linear `projection` shared by all blocks; None
            has no projection.
        projection_per: "model" for that projection, or "block" for a learned matrix `basis[l]` (C, prompt_dim) of every
            block with prompts of its own, without a bias: `P_l = weight[l] basis[l]^T`, the bilinear prompts of BPT
            (arXiv:2506.22908), which start normal with deviation 0.02 and by Xavier's rule. Its whitening is left out.
        kind: "tokens", or "kv" for learned keys and values, which start uniform in `sqrt(6 / (P * C / heads))`, E2VPT's
            Kaiming initialisation; or "cross" for prompts in a cross-attention of their own, which start uniform in
            `sqrt(6 / ((P + rows) * C))`, CVPT's Xavier initialisation.
        placement: "prepend" gives the prompts rows of their own. "add" adds them to the rows that enter a block, one
            prompt to all of them (P = 1) or one to each; in shallow mode to block 0 alone.
        added_to: the rows of "add": "patches", the N patch tokens, as VPT's text has it; "class_and_patches", the class
            row (and what else comes before the patches) as well, as VPT's released code does ("add" and "add-1").
        dropout_per: "sample" draws a dropout mask for every image, as VPT does for ViTs; "batch" one for all.
        gate: start of the learned gates, finite; None has none. Not for placement="add", kind="cross" or no prompt,
            which put no column into self-attention.
        gate_per: "prompt" learns a gate for each prompt in each head of each block, "head" one for all prompts there.
        heads: attention heads H, for gates and "kv".

    Attributes:
        weight: (rows, P, prompt_dim): one row where shallow or shared, else one for every block with prompts of its
            own. With "kv" (rows, P, 2C): keys, then values, each heads then channels.
        gate: (blocks, H, P), or (blocks, H, 1) with gate_per="head", of the blocks whose attention has prompts among
            its keys; None without gates.
        alpha: (blocks,), of the blocks that mix, which are those with prompts of their own but the first; None where it
            is not learned.
        length: prompt rows, or keys, among the tokens: P, or 0 where they are added or in a cross-attention.
        bound: of the uniform start.

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
        mode: PromptMode = "shallow",
        patch_values: int,
        dropout: float = 0.0,
        alpha: float | Sequence[float] = 0.01,
        train_alpha: bool = False,
        blocks: int | None = None,
        after: AfterPrompts = "carry",
        shared: bool = False,
        prompt_dim: int | None = None,
        projection_per: ProjectionPer = "model",
        kind: PromptKind = "tokens",
        placement: Placement = "prepend",
        added_to: AddedTo = "patches",
        dropout_per: DropoutPer = "sample",
        gate: float | None = None,
        gate_per: GatePer = "prompt",
        heads: int | None = None,
    ) -> None:
        super().__init__()
        one_of("prompt_mode", mode, get_args(PromptMode))
        options = PromptSettings.of(locals())
        check_integer("prompt_length", length, 0)
        check_range("prompt_dropout", dropout, "in [0, 1)")
        check_integer("heads", heads, 1, optional=True)
        _refuse_together(options, mode, depth)
        if kind == "kv" and (heads is None or dim % heads):
            raise ValueError(f"kind='kv' needs heads, a divisor of the width {dim}, got {heads!r}")
        self.mode: str = mode
        self.kind: str = kind
        self.dim = dim
        self.placement: str = placement
        self.added_to: str = added_to
        self.length = length if placement == "prepend" and kind != "cross" else 0
        self.dropout = dropout
        self.dropout_per = dropout_per
        self.after = after
        self._alphas = _alphas(alpha, depth)
        count = 1 if mode == "shallow" else abs(blocks or depth)
        first = depth - count if blocks is not None and blocks < 0 else 0
        self.blocks = range(first, first + count)
        rows = 1 if shared else count
        width = 2 * dim if kind == "kv" else prompt_dim or dim
        check_claim("prompt_length", rows * length * width)
        if prompt_dim is not None:
            check_claim("prompt_dim", (rows if projection_per == "block" else 1) * prompt_dim * dim)
        values = self._uniform(rows, length, prompt_dim or dim, patch_values, heads or 1)
        # without a value there is nothing to learn, and DistributedDataParallel would wait for its gradient
        self.weight = nn.Parameter(values, requires_grad=length > 0)
        self.projection = None
        self.basis: nn.Parameter | None = None
        if prompt_dim is not None and projection_per == "block":
            nn.init.normal_(self.weight, std=0.02)
            start = torch.empty(rows, dim, prompt_dim).uniform_(-1, 1) * math.sqrt(6.0 / (dim + prompt_dim))
            self.basis = nn.Parameter(start, requires_grad=length > 0)
        elif prompt_dim is not None:
            self.projection = nn.Linear(prompt_dim, dim).requires_grad_(length > 0)
            nn.init.kaiming_normal_(self.projection.weight, a=0, mode="fan_out")
            nn.init.zeros_(self.projection.bias)
        self.alpha: nn.Parameter | None = None
        if train_alpha:
            if length == 0 or count == 1:
                raise ValueError(
                    f"train_alpha needs prompts, and a block that mixes, got {length} prompts of {count} blocks"
                )
            self.alpha = nn.Parameter(torch.tensor([self._alphas[block - 1] for block in self.blocks[1:]]))
        self.gate: nn.Parameter | None = None
        if gate is not None:
            self.gate = nn.Parameter(self._gates(gate, gate_per, depth, heads))
        elif gate_per != "prompt":
            raise ValueError(f"gate_per={gate_per!r} needs prompt_gate, got None")

    def _uniform(self, rows: int, length: int, width: int, patch_values: int, heads: int) -> Tensor:
        """Values (rows, P, width), (rows, P, 2C) with "kv", uniform in the bound of their kind."""
        fans = patch_values + width
        if self.kind == "kv":
            width, fans = 2 * self.dim, max(length * (self.dim // heads), 1)
        elif self.kind == "cross":
            fans = (length + rows) * width
        self.bound = math.sqrt(6.0 / fans)
        return torch.empty(rows, length, width).uniform_(-self.bound, self.bound)

    def _gates(self, start: float, per: str, depth: int, heads: int | None) -> Tensor:
        check_range("prompt_gate", start, "finite", optional="or None for no gate")
        if self.length == 0:
            without = "placement='add'" if self.placement == "add" else "prompt_length=0"
            without = "kind='cross'" if self.kind == "cross" else without
            raise ValueError(f"prompt_gate must be None for {without}, which has no prompt columns, got {start!r}")
        if heads is None:
            raise ValueError("heads must be those of a block's attention where prompt_gate is given, got None")
        blocks = sum(self.role(block) != "none" for block in range(depth))
        return torch.full((blocks, heads, self.length if per == "prompt" else 1), float(start))

    @property
    def holds_tokens(self) -> bool:
        """Whether `weight` holds rows as blocks are fed them, so that they can start as tokens of the model."""
        return self.kind == "tokens" and self.length > 0 and self.projection is None and self.basis is None

    def relative_size(self) -> float:
        """Root mean square of `weight` over that of a uniform start, `bound / sqrt(3)`."""
        return float(self.weight.detach().double().square().mean().sqrt()) * math.sqrt(3.0) / self.bound

    @torch.no_grad()
    def rescale(self) -> None:
        """Multiply the rows of each block by one number, so that their root mean square is that of a uniform start.

        For prompts that start as tokens, which are about ten times longer (docs/prompts.md). Deep prompts are
        normalised before anything reads them: to them it is nothing but a larger learning rate.

        Raises:
            ValueError: prompts that are no rows of tokens.

        Example:
            >>> bank = PromptBank(depth=2, length=3, dim=8, mode="deep", patch_values=48)
            >>> _ = bank.weight.data.mul_(10)
            >>> bank.rescale()
            >>> round(bank.relative_size(), 6)
            1.0
        """
        if not self.holds_tokens:
            raise ValueError(f"rescale() needs {TOKEN_ROWS}, got {self.described()}")
        rows = self.weight.double()
        size = rows.square().mean((1, 2), keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        self.weight.copy_(rows * (self.bound / math.sqrt(3.0) / size))

    def described(self) -> str:
        """What the prompts are, as messages say it."""
        kind = f"prompts of kind {self.kind!r} and placement {self.placement!r}"
        if self.projection is not None or self.basis is not None:
            kind = "projected prompts"
        return f"{self.weight.shape[1]} {kind}, of {self.weight.shape[-1]} values for tokens of {self.dim}"

    def role(self, block: int) -> str:
        """Which prompt rows, or keys and values, enter a block: "own" (fresh ones), "mixed", "carried", or "none"."""
        if self.length == 0 or block < self.blocks.start:
            return "none"
        if block >= self.blocks.stop:
            return "carried" if self.after == "carry" and self.kind == "tokens" else "none"
        return "mixed" if self.mode == "progressive" and block > self.blocks.start else "own"

    def mixing(self, block: int) -> float | Tensor:
        """alpha of a block that mixes; (1,), of at least 32 bits, where it is learned."""
        if self.alpha is None:
            return self._alphas[block - 1]
        index = block - self.blocks.start - 1
        # 16 bits hold 1 - alpha to 0.4 %, and a 0-d tensor would be rounded to those of the rows
        return self.alpha[index : index + 1].to(torch.promote_types(self.alpha.dtype, torch.float32))

    def per_sample(self) -> bool:
        """Whether every image has prompts of its own, by its own dropout mask."""
        return self.training and self.dropout > 0 and self.dropout_per == "sample"

    def columns(self, block: int) -> Tensor | None:
        """What a block adds to its scaled scores with its prompts, (H, P); None where it adds nothing."""
        if self.gate is None or self.role(block) == "none":
            return None
        return self.gate[block - self.blocks.start].expand(-1, self.length)

    def rows(self, block: int, batch: int) -> Tensor:
        """`P_l` of one block: (P, C), or (B, P, C) where `per_sample()`; keys and values (P, 2C) or (B, P, 2C) with
        "kv"."""
        index = 0 if len(self.weight) == 1 else block - self.blocks.start
        rows = self.weight[index]
        if self.projection is not None:
            rows = self.projection(rows)
        if self.basis is not None:
            rows = rows @ self.basis[index].mT
        if self.per_sample():
            rows = repeat(rows, "p c -> b p c", b=batch)
        return F.dropout(rows, self.dropout, self.training)

    def expanded(self) -> Tensor:
        """Prompts (rows, P, C) of all blocks that have their own, without dropout."""
        if self.basis is not None:
            return torch.bmm(self.weight, self.basis.mT)
        return self.weight if self.projection is None else self.projection(self.weight)

    def added(self, block: int, batch: int) -> Tensor | None:
        """What is added to `added_to` of the rows that enter a block, (P, C) or (B, P, C); None where nothing is."""
        return self.rows(block, batch) if self.placement == "add" and block in self.blocks else None

    def keys_values(self, block: int, batch: int) -> Tensor | None:
        """Learned keys and values (P, 2C) or (B, P, 2C) of one block; None where it has none."""
        return self.rows(block, batch) if self.kind == "kv" and self.role(block) == "own" else None

    def crossing(self, block: int, batch: int) -> Tensor | None:
        """Prompts (P, C) or (B, P, C) of the cross-attention of one block; None where it has none."""
        held = self.kind == "cross" and self.weight.shape[1] > 0 and block in self.blocks
        return self.rows(block, batch) if held else None

    def forward(self, block: int, batch: int, carried: Tensor | None = None) -> Tensor:
        """Prompt rows (B, P, C) that enter a block, (B, 0, C) where none do; `carried` (B, P, C) are the rows the block
        before it produced."""
        role = self.role(block)
        if role == "none" or self.kind == "kv":
            return self.weight.new_empty(batch, 0, self.dim)
        if role != "own" and carried is None:
            raise ValueError(f"carried must be the (B, P, C) prompt rows of block {block - 1}, got None")
        if role == "carried" and carried is not None:
            return carried
        rows = self.rows(block, batch)
        if rows.ndim == 2:
            rows = repeat(rows, "p c -> b p c", b=batch)
        if role == "mixed" and carried is not None:
            alpha = self.mixing(block)
            mixed = alpha * carried + (1.0 - alpha) * rows
            return mixed.to(torch.promote_types(carried.dtype, rows.dtype))
        return rows

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, mode={self.mode}, dropout={self.dropout}"


def _refuse_together(options: PromptSettings, mode: str, depth: int) -> None:
    """Raise ValueError where options do not go with each other, with the mode or with so many blocks."""
    blocks, kind, placement = options.blocks, options.kind, options.placement
    if blocks is not None and (
        isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= abs(blocks) <= depth
    ):
        raise ValueError(f"blocks must be in 1..{depth}, in -{depth}..-1, or None, got {blocks!r}")
    if mode == "shallow" and (blocks is not None or options.shared):
        raise ValueError("blocks and shared need prompt_mode 'deep' or 'progressive', got 'shallow'")
    if options.train_alpha and mode != "progressive":
        raise ValueError(f"train_alpha needs prompt_mode='progressive', got {mode!r}")
    if mode == "progressive" and placement == "add":
        raise ValueError("placement='add' needs prompt_mode 'shallow' or 'deep', got 'progressive'")
    if options.after == "drop" and (blocks is None or blocks < 0):
        raise ValueError(f"after='drop' needs blocks > 0, the blocks that have prompts, got {blocks!r}")
    if options.added_to != "patches" and placement != "add":
        raise ValueError(f"added_to={options.added_to!r} needs placement='add', got {placement!r}")
    if kind != "tokens":
        for name, value, needed in (("prompt_mode", mode, "deep"), ("placement", placement, "prepend")):
            if value != needed:
                raise ValueError(f"kind={kind!r} needs {name}={needed!r}, got {value!r}")
    if options.projection_per == "block" and options.prompt_dim is None:
        raise ValueError("projection_per='block' needs prompt_dim, the width of what it projects, got None")
    if kind == "kv" and options.prompt_dim is not None:
        raise ValueError(f"kind='kv' needs prompt_dim=None, got {options.prompt_dim!r}")


def _alphas(alpha: float | Sequence[float], depth: int) -> list[float]:
    values: list[object] = list(alpha) if isinstance(alpha, list | tuple) else [alpha] * (depth - 1)
    if len(values) != depth - 1:
        raise ValueError(f"progressive_alpha must be a number or {depth - 1} of them, got {len(values)}")
    for value in values or [alpha]:
        check_range("progressive_alpha", value, "in [0, 1]")
    return [number("progressive_alpha", value) for value in values]
