"""unilm's BEiT as plain loops, with unilm's state-dict names: what a checkpoint of theirs computes.

Written from the published forward pass alone and sharing no code with timm or vptm: patches are cut by slices, heads
and position offsets are loops, LayerNorm and GELU are formulas.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def position_index(window: tuple[int, int]) -> Tensor:
    """(N, N) rows of the bias table, token 0 is cls; the last three rows are cls to patch, patch to cls, cls to cls."""
    height, width = window
    rows = (2 * height - 1) * (2 * width - 1) + 3
    index = torch.empty(height * width + 1, height * width + 1, dtype=torch.long)
    for i in range(height * width):
        for j in range(height * width):
            dy, dx = i // width - j // width, i % width - j % width
            index[1 + i, 1 + j] = (dy + height - 1) * (2 * width - 1) + dx + width - 1
    index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return index


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-6) * norm.weight + norm.bias


class PositionBias(nn.Module):
    relative_position_index: Tensor

    def __init__(self, window: tuple[int, int], heads: int) -> None:
        super().__init__()
        index = position_index(window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(int(index.max()) + 1, heads))
        self.register_buffer("relative_position_index", index)

    def forward(self, head: int) -> Tensor:
        return self.relative_position_bias_table[:, head][self.relative_position_index]


class Attention(PositionBias):
    """The table and index are unilm's: parameters of the attention itself when every block has its own."""

    def __init__(self, dim: int, heads: int, window: tuple[int, int], own_table: bool) -> None:
        super().__init__(window, heads)
        self.heads, self.own_table = heads, own_table
        if not own_table:
            del self.relative_position_bias_table, self.relative_position_index
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, shared: PositionBias | None) -> Tensor:  # type: ignore[override]
        dim = x.shape[-1]
        wq, wk, wv = self.qkv.weight[:dim], self.qkv.weight[dim : 2 * dim], self.qkv.weight[2 * dim :]
        q, k, v = x @ wq.T + self.q_bias, x @ wk.T, x @ wv.T + self.v_bias
        size = dim // self.heads
        heads = []
        for h in range(self.heads):
            part = slice(h * size, (h + 1) * size)
            scores = (q[..., part] / math.sqrt(size)) @ k[..., part].transpose(-2, -1)
            if self.own_table:
                scores = scores + PositionBias.forward(self, h)
            if shared is not None:
                scores = scores + shared(h)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            heads.append(weights / weights.sum(-1, keepdim=True) @ v[..., part])
        return torch.cat(heads, -1) @ self.proj.weight.T + self.proj.bias


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.fc1.weight.T + self.fc1.bias
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return x @ self.fc2.weight.T + self.fc2.bias


class Block(nn.Module):
    def __init__(
        self, dim: int, heads: int, hidden: int, window: tuple[int, int], own_table: bool, layer_scale: bool
    ) -> None:
        super().__init__()
        self.layer_scale = layer_scale
        if layer_scale:
            self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads, window, own_table)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, hidden)

    def forward(self, x: Tensor, shared: PositionBias | None) -> Tensor:
        for norm, layer, gamma in ((self.norm1, self.attn, "gamma_1"), (self.norm2, self.mlp, "gamma_2")):
            out = layer(layer_norm(x, norm), shared) if layer is self.attn else layer(layer_norm(x, norm))
            x = x + (getattr(self, gamma) * out if self.layer_scale else out)
        return x


class PatchEmbed(nn.Module):
    def __init__(self, chans: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch, self.proj = patch, nn.Conv2d(chans, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        p, (rows, columns) = self.patch, (side // self.patch for side in images.shape[2:])
        weight, bias = self.proj.weight.flatten(1), dict(self.proj.named_parameters())["bias"]
        patches = [
            images[:, :, y * p : (y + 1) * p, x * p : (x + 1) * p].flatten(1) @ weight.T + bias
            for y in range(rows)
            for x in range(columns)
        ]
        return torch.stack(patches, 1)


class UnilmBeit(nn.Module):
    """Pre-training model (`classes=None`: final norm, mask token, lm_head) or fine-tuned one (fc_norm, head)."""

    def __init__(
        self,
        window: tuple[int, int] = (3, 3),
        *,
        patch: int = 4,
        chans: int = 3,
        dim: int = 24,
        heads: int = 3,
        depth: int = 2,
        hidden: int = 40,
        vocab: int = 11,
        shared: bool = True,
        per_block: bool = False,
        absolute: bool = False,
        layer_scale: bool = True,
        cls_pt_layers: int = 0,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(chans, dim, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, window[0] * window[1] + 1, dim)) if absolute else None
        self.rel_pos_bias = PositionBias(window, heads) if shared else None

        def block(own_table: bool) -> Block:
            return Block(dim, heads, hidden, window, own_table, layer_scale)

        self.blocks = nn.ModuleList(block(per_block) for _ in range(depth))
        if classes is None:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.norm, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, vocab)
            if cls_pt_layers:
                self.cls_pt_layers = nn.ModuleList(block(False) for _ in range(cls_pt_layers))
        else:
            self.fc_norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def tokens(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C) after the last block, un-normalised; mask (B, patches) bool puts the mask token in those places."""
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        for block in self.blocks:
            x = block(x, self.rel_pos_bias)
        return x

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pre-training: logits of every patch (B, patches, V). Fine-tuned: class logits (B, classes)."""
        x = self.tokens(images, mask)
        if hasattr(self, "head"):
            pooled = layer_norm(x[:, 1:].mean(1), self.fc_norm)
            return pooled @ self.head.weight.T + self.head.bias
        return layer_norm(x[:, 1:], self.norm) @ self.lm_head.weight.T + self.lm_head.bias
