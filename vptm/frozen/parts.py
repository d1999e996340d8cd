"""The parts of a backbone whose arithmetic is known here, and what makes one of them another function than that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from timm.layers import AttentionRope, DropPath, GluMlp, LayerNorm, LayerScale, Mlp, SwiGLU
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from vptm.frozen.rows import AttentionFunction
from vptm.frozen.sharing import HOOKS


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, drop: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`drop(softmax(q k^T / sqrt(D) + bias)) v` for (B, H, T, D) inputs and a (1, H, T, T) bias, every score stored."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(dim=-1)
    return (weights if drop is None else drop(weights)) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The same through `scaled_dot_product_attention`, which stores no scores."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=None if bias is None else bias.to(query.dtype))


def with_learned(key: Tensor, value: Tensor, keys_values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, T + P, D): those (B, H, T, D) of rows, then learned ones (P, 2C) or (B, P, 2C)."""
    own = keys_values if keys_values.ndim == 3 else keys_values.expand(key.shape[0], -1, -1)
    learned = rearrange(own, "b p (two h d) -> two b h p d", two=2, h=key.shape[1]).to(key.dtype)
    return torch.cat([key, learned[0]], 2), torch.cat([value, learned[1]], 2)


def with_columns(bias: Tensor | None, columns: Tensor, queries: int, keys: int) -> Tensor:
    """`bias` (H, queries, keys), None for zeros, with `columns` (H, P) added to its last P keys in every query."""
    wide = F.pad(columns, (keys - columns.shape[1], 0))[:, None]
    return wide.expand(-1, queries, -1) if bias is None else bias + wide


class GivenBias(NamedTuple):
    """All of the position bias of a block, (1, H, T, T) or None, the function that attends with it, and learned keys
    and values (P, 2C) or (B, P, 2C), for which the bias has columns last, or None."""

    bias: Tensor | None
    attention: AttentionFunction
    keys_values: Tensor | None = None


class BiasedAttention(beit.Attention):
    """timm's BEiT attention, which may be given all of its bias, for rows that its own table does not know.

    With a `GivenBias` in place of the shared bias it attends by that; its parts run as the modules they are. Without
    one it is timm's.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | GivenBias | None = None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if not isinstance(shared_rel_pos_bias, GivenBias):
            return super().forward(x, shared_rel_pos_bias)
        bias, attention, keys_values = shared_rel_pos_bias
        qkv_bias = None if self.q_bias is None else torch.cat([self.q_bias, self.k_bias, self.v_bias])
        if is_plain_linear(self.qkv) and self.qkv.bias is None:
            qkv = F.linear(x, self.qkv.weight, qkv_bias)
        else:  # an adapter's or a quantised linear has no weight to read past it, and one with a bias keeps it
            qkv = self.qkv(x) if qkv_bias is None else self.qkv(x) + qkv_bias
        query, key, value = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.num_heads)
        if keys_values is not None:
            key, value = with_learned(key, value, keys_values)
        if type(self.attn_drop) is nn.Dropout and not self.attn_drop.training and oddity(self.attn_drop) is None:
            mixed = attention(query, key, value, bias)
        else:
            mixed = softmax_attention(query, key, value, bias, self.attn_drop)
        return self.proj_drop(self.proj(rearrange(mixed, "b h t d -> b t (h d)")))


def block_forward(
    block: beit.Block,
    x: Tensor,
    bias: Tensor | None,
    attention: AttentionFunction,
    keys_values: Tensor | None = None,
) -> Tensor:
    """A BEiT block on rows (B, T, C) with all of its position bias given, (1, H, T, T) or None, and with learned keys
    and values beside those of its rows where there are any.

    Somebody's own attention, and a patched `forward` where the block has no table of its own, take the bias as timm's
    does, as one that all blocks share.

    Raises:
        ValueError: learned keys and values for such an attention, which knows of none.
    """
    inner = biased_attention(block)
    if inner is None or ("forward" in inner.__dict__ and inner.relative_position_bias_table is None):
        if keys_values is not None:
            raise ValueError("prompts of kind 'kv' need timm's attention in every block, got another")
        return block(x, shared_rel_pos_bias=bias)
    return block(x, shared_rel_pos_bias=GivenBias(bias, attention, keys_values))


def biased_attention(block: nn.Module) -> BiasedAttention | None:
    """The attention of a BEiT block, also where the block or its attention stands inside somebody's module."""
    attn = getattr(block, "attn", None)
    if type(attn) is BiasedAttention:
        return attn
    return next((module for module in block.modules() if type(module) is BiasedAttention), None)


NORMS = (nn.LayerNorm, LayerNorm)
ATTENTIONS = (beit.Attention, BiasedAttention, vision_transformer.Attention)
EVA_ATTENTIONS = (eva.EvaAttention, AttentionRope)
MLPS = (Mlp, GluMlp, SwiGLU)


def _own_forward(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The `forward` that a class was written with, None where somebody replaced it by now."""
    definer = next(base for base in kind.__mro__ if "forward" in base.__dict__)
    forward: Any = kind.forward
    named = (forward.__module__, forward.__qualname__) == (definer.__module__, f"{definer.__qualname__}.forward")
    return forward if named and not hasattr(forward, "__wrapped__") else None  # `functools.wraps` copies names


# How each reads that is known: a class whose `forward` was replaced is another class.
KNOWN = {
    kind: _own_forward(kind)
    for kind in (
        *(beit.Block, vision_transformer.Block, eva.EvaBlock, *ATTENTIONS, *EVA_ATTENTIONS),
        *(*MLPS, nn.Linear, LayerScale, *NORMS),
        *(nn.Dropout, nn.Identity, DropPath, nn.GELU, nn.SiLU, beit.RelativePositionBias),
    )
}
# The same function in training and in eval mode.
MODELESS = (nn.Linear, LayerScale, *NORMS, nn.Identity, nn.GELU, nn.SiLU)


def oddity(module: nn.Module) -> str | None:
    """What makes a module another function than its class says, in words that fit after "with"; None where nothing
    does."""
    for hooks in HOOKS:
        if module.__dict__[hooks]:
            return "hooks"  # they would never fire on a part that does not run as a module
    if has_patched_forward(module):
        return "a patched forward"
    if parametrize.is_parametrized(module):
        return "parametrised tensors"
    return None


def has_patched_forward(module: nn.Module) -> bool:
    """Whether somebody put a `forward` in the place of the one of its class, on it or on a known class."""
    kind = type(module)
    return "forward" in module.__dict__ or kind.forward is not KNOWN.get(kind, kind.forward)


def is_plain_linear(module: nn.Module | None) -> bool:
    """Whether a module is `F.linear(x, weight, bias)` and nothing else; an adapter library may have put its own there,
    or a quantised one."""
    return type(module) is nn.Linear and oddity(module) is None


def learns(module: nn.Module) -> bool:
    """Whether anything in a module asks for a gradient, also a tensor that stands in place of a parameter."""
    return any(parameter.requires_grad for parameter in module.parameters()) or any(
        isinstance(value, Tensor) and value.requires_grad
        for part in module.modules()
        for value in part.__dict__.values()
    )


def is_tensor(value: object) -> bool:
    """Whether it is None or a tensor of PyTorch's own classes: others, as quantised ones, have their own arithmetic."""
    return value is None or type(value) in (Tensor, nn.Parameter)
