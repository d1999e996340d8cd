"""What of a frozen block can be folded into constants, and how."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, GluMlp, LayerScale, SwiGLU
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vptm.frozen.parts import ATTENTIONS, EVA_ATTENTIONS, MLPS, MODELESS, NORMS, is_tensor, oddity
from vptm.frozen.rotary import KINDS, half_order
from vptm_kernels._runtime.frozen_linear import pack_weight


class PackedWeights(NamedTuple):
    """Weights of a block once more, as the linears of this processor read them fastest; None where that is how they
    are. Not to be copied, sliced or saved."""

    qkv: Tensor | None = None
    proj: Tensor | None = None
    fc1: Tensor | None = None
    fc2: Tensor | None = None


class CrossWeights(NamedTuple):
    """What a cross-attention reads of a block beside `FrozenBlock`: queries, scaled, and keys and values of rows that
    are not normalised, and the bias of the projection without what came out of self-attention."""

    query_weight: Tensor
    query_bias: Tensor
    key_value_weight: Tensor
    key_value_bias: Tensor
    proj_bias: Tensor


class FrozenBlock(NamedTuple):
    """One pre-norm block with constants folded: `qkv(normalise(x))`, `x + scale_1 * proj(...)`, `x + scale_2 *
    fc2(act(fc1(normalise(x))))`. Queries come scaled by `head_dim ** -0.5`.

    keeps_biases: keys and values have theirs in `qkv_bias`, those of prompts too. left_out: (2C,), the bias that keys
    and values come without; learned ones, which stand among them, come without it as well. key_order: (C,), which
    channel stands in the place of each of queries and keys; None where all are where they were. attn_eps, mlp_eps: of a
    norm before proj and before fc2, whose weights are folded as well; None without one. gated: fc1 gives gates and
    values side by side, `act(gates) * values`.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale_1: Tensor | None
    scale_2: Tensor | None
    eps_1: float
    eps_2: float
    activation: nn.Module
    heads: int
    left_out: Tensor
    key_order: Tensor | None
    packed: PackedWeights = PackedWeights()
    keeps_biases: bool = False
    attn_eps: float | None = None
    mlp_eps: float | None = None
    gated: bool = False

    def with_packed(self) -> FrozenBlock:
        """The same with its weights packed, too; itself where they are."""
        if any(weight is not None for weight in self.packed):
            return self
        weights = self.qkv_weight, self.proj_weight, self.fc1_weight, self.fc2_weight
        return self._replace(packed=PackedWeights._make(map(pack_weight, weights)))


def _holds_tensors(module: nn.Module) -> bool:
    """Subclasses of Tensor, as quantised ones, have their own arithmetic; a trace puts stand-ins of its own there."""
    held = (tensors.values() for part in module.modules() for tensors in (part._parameters, part._buffers))
    return torch.compiler.is_compiling() or all(map(is_tensor, chain.from_iterable(held)))


def unfoldable(block: Any) -> str | None:
    """Why a block is not norm, attention, LayerScale, norm, two-layer MLP or SwiGLU, LayerScale and nothing else, in
    words; None where it is."""
    for module in block.modules():
        odd = oddity(module)
        if odd is not None:
            return f"blocks with {odd}"
        if module.training and type(module) not in MODELESS:
            return "blocks with parts in training mode"
    attn: Any = getattr(block, "attn", None)
    mlp: Any = getattr(block, "mlp", None)
    other = f"{type(block).__name__} blocks with other parts"
    if type(block) is eva.EvaBlock:
        return None if _is_plain_eva(attn) and _has_plain_parts(block) else other
    if mlp is not None and type(mlp) not in MLPS:
        return f"{type(mlp).__name__} blocks"
    if type(block) is beit.Block:
        if type(attn) not in ATTENTIONS[:2]:
            return other
    elif type(block) is vision_transformer.Block:
        if type(attn) is not ATTENTIONS[2] or attn.gate is not None:
            return other
        if not type(attn.q_norm) is type(attn.k_norm) is nn.Identity:
            return other
        if not all(type(part) in (nn.Identity, LayerScale) for part in (block.ls1, block.ls2)):
            return other
    else:
        return f"{type(block).__name__} blocks"
    plain = _has_plain_parts(block) and (type(block) is not beit.Block or attn.qkv.bias is None)
    return None if plain else other  # a BEiT's bias stands beside the linear


def _has_plain_parts(block: Any) -> bool:
    """Whether what all kinds of blocks have is what it is called: drops, norms, linears, sizes and the scale."""
    attn, mlp = block.attn, block.mlp
    if type(mlp) not in MLPS or getattr(mlp, "gate_last", False):
        return False
    if not all(type(norm) in (nn.Identity, *NORMS) for norm in (getattr(attn, "norm", nn.Identity()), mlp.norm)):
        return False
    drops = [attn.attn_drop, attn.proj_drop, block.drop_path1, block.drop_path2, mlp.drop1, mlp.drop2]
    if not (
        all(type(drop) in (nn.Identity, nn.Dropout, DropPath) for drop in drops)
        and type(block.norm1) in NORMS
        and type(block.norm2) in NORMS
        and all(type(linear) is nn.Linear for linear in linears_of(block))
        and _holds_tensors(block)
    ):
        return False
    projections = _projections(attn)
    width = projections[0].in_features
    rows = sum(linear.out_features for linear in projections)
    return bool(rows == 3 * width and attn.scale == (width // attn.num_heads) ** -0.5)


def _is_plain_eva(attn: Any) -> bool:
    """Whether what EVA's attention has of its own is of a known kind."""
    return (
        type(attn) in EVA_ATTENTIONS
        and type(attn.q_norm) is type(attn.k_norm) is nn.Identity
        and attn.gate is None
        and getattr(attn, "num_kv_groups", 1) == 1
        # its bias stands beside the linear, which may be somebody's module by now
        and (getattr(attn, "q_bias", None) is None or getattr(attn.qkv, "bias", None) is None)
    )


def unread(backbone: Any) -> str | None:
    """What else of a backbone the folded path steps over though it does something, in words; None where nothing."""
    pos_drop = backbone.pos_drop
    if type(pos_drop) not in (nn.Dropout, nn.Identity) or oddity(pos_drop) is not None or pos_drop.training:
        return "a pos_drop that does something"
    rope = getattr(backbone, "rope", None)
    if rope is not None and (type(rope) not in KINDS or oddity(rope) is not None):
        return "rotary positions of another kind"
    if rope is not None and rope.training and getattr(rope, "aug_active", False):
        return "rotary positions that are drawn"
    shared = getattr(backbone, "rel_pos_bias", None)
    if shared is not None and parametrize.is_parametrized(shared):
        return "a parametrised rel_pos_bias"
    if shared is not None and not _holds_tensors(shared):
        return "a rel_pos_bias of another kind of tensor"
    return None


def refuse_unread(backbone: Any) -> None:
    """Raise ValueError where a part that no path runs as a module has a `forward` of somebody's own, or is one."""
    shared = getattr(backbone, "rel_pos_bias", None)
    if shared is not None and not isinstance(shared, beit.RelativePositionBias):
        raise ValueError(
            "backbone.rel_pos_bias must be timm's RelativePositionBias, whose table is read, "
            f"got {type(shared).__name__}"
        )
    rope, patch_drop = getattr(backbone, "rope", None), getattr(backbone, "patch_drop", None)
    if rope is not None and not hasattr(rope, "get_embed"):
        raise ValueError(f"backbone.rope must have get_embed, which is what is asked of it, got {type(rope).__name__}")
    if not isinstance(patch_drop, nn.Identity | None):
        raise ValueError(f"backbone.patch_drop must be Identity, no patch is dropped, got {type(patch_drop).__name__}")
    for name, module in (
        ("backbone", backbone),
        ("backbone.blocks", backbone.blocks),
        ("backbone.rel_pos_bias", shared),
        ("backbone.rope", rope),
        ("backbone.patch_drop", patch_drop),
    ):
        if module is not None and "forward" in module.__dict__:
            raise ValueError(
                f"{name} must have the forward of its class, which is not run as a whole, got a patched one"
            )


def _projections(attn: Any) -> list[Any]:
    return [attn.q_proj, attn.k_proj, attn.v_proj] if attn.qkv is None else [attn.qkv]


def _first_linears(mlp: Any) -> list[Any]:
    return [mlp.fc1_g, mlp.fc1_x] if type(mlp) is SwiGLU else [mlp.fc1]


def linears_of(block: Any) -> list[Any]:
    """Those of a block that folds, whose weights are in its constants."""
    attn, mlp = block.attn, block.mlp
    return [*_projections(attn), attn.proj, *_first_linears(mlp), mlp.fc2]


def _joined(linears: list[Any]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linears that read the same rows, one after the other."""
    biases = [linear.bias for linear in linears]
    bias = None
    if any(one is not None for one in biases):
        bias = torch.cat(
            [linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears]
        )
    return torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight, bias


def qkv_of(attn: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of queries, keys and values."""
    if getattr(attn, "q_bias", None) is None:
        return _joined(_projections(attn))
    return attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def _layer_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(block, beit.Block | eva.EvaBlock):
        return block.gamma_1, block.gamma_2
    first, second = (scale.gamma if isinstance(scale, LayerScale) else None for scale in (block.ls1, block.ls2))
    return first, second


def fold_block(block: Any, dtype: torch.dtype, *, rotary: bool = False) -> FrozenBlock:
    """Fold norm weights into the linear after them, the scale of the scores into the queries' and LayerScale into the
    linear before it, in fp64, rounded once to `dtype`.

    Of the biases of queries, keys and values, only the queries' is left. A key bias adds the same number to every score
    of a query, which the softmax does not see; a value bias comes out of attention as it is, as its weights sum to 1,
    and joins the bias of the next linear. In fp16 the LayerScale stays apart, where `gamma * weight` would be subnormal
    (gamma starts at 1e-5 in BEiT-L).

    With `rotary` positions a key bias is turned with its key, so it stays; and channels that are turned together come
    to lie half a head apart, as `prompted_attention` takes them: scores do not change where queries and keys have the
    same order. A norm before proj is no linear map, so the value bias stays before it.
    """
    fold_scale = dtype != torch.float16

    def after_norm(weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        weight = weight.double()
        shift = weight.new_zeros(len(weight)) if bias is None else bias.double()
        if norm.bias is not None:
            shift = shift + weight @ norm.bias.double()
        return weight if norm.weight is None else weight * norm.weight.double(), shift

    def before_scale(
        linear: nn.Linear, gamma: Tensor | None, shift: Tensor | None = None, norm: Any = None
    ) -> tuple[Tensor, Tensor]:
        if type(norm) in NORMS:
            weight, bias = after_norm(linear.weight, linear.bias, norm)
        else:
            weight = linear.weight.double()
            bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double()
        if shift is not None:
            bias = bias + weight @ shift
        if gamma is None or not fold_scale:
            return weight, bias
        return gamma.double()[:, None] * weight, gamma.double() * bias

    attn, mlp = block.attn, block.mlp
    attn_norm: Any = getattr(attn, "norm", None)
    mlp_norm: Any = getattr(mlp, "norm", None)
    gammas = _layer_scales(block)
    qkv_weight, qkv_bias = after_norm(*qkv_of(attn), block.norm1)
    width, heads = qkv_bias.numel() // 3, attn.num_heads
    scale = (width // heads) ** -0.5
    key_order = None
    if rotary and not attn.rotate_half:
        key_order = half_order(width, heads, qkv_bias.device)
        values = torch.arange(2 * width, 3 * width, device=key_order.device)
        order = torch.cat([key_order, width + key_order, values])
        qkv_weight, qkv_bias = qkv_weight[order], qkv_bias[order]
    query_bias, key_bias, value_bias = qkv_bias.split(width)
    normed = type(attn_norm) in NORMS
    qkv_weight = torch.cat([qkv_weight[:width] * scale, qkv_weight[width:]])
    stays = torch.cat([torch.full_like(key_bias, rotary), torch.full_like(value_bias, normed)]).bool()
    key_value_bias = torch.cat([key_bias, value_bias])
    kept, left_out = key_value_bias * stays, key_value_bias * ~stays
    fc1 = _joined(_first_linears(mlp))
    tensors = [
        qkv_weight,
        torch.cat([query_bias * scale, kept]),
        *before_scale(attn.proj, gammas[0], None if normed else value_bias, attn_norm),
        *after_norm(*fc1, block.norm2),
        *before_scale(mlp.fc2, gammas[1], norm=mlp_norm),
    ]
    scales = [None if fold_scale or gamma is None else gamma.to(dtype) for gamma in gammas]
    # what nothing was folded into is copied all the same: a constant is never the weight itself
    constants = [tensor.to(dtype, copy=isinstance(tensor, nn.Parameter)) for tensor in tensors]
    inner_eps = [norm.eps if type(norm) in NORMS else None for norm in (attn_norm, mlp_norm)]
    gated = type(mlp) in (GluMlp, SwiGLU)
    return FrozenBlock._make(
        [
            *(*constants, *scales, block.norm1.eps, block.norm2.eps, mlp.act, heads),
            *(left_out.to(dtype), key_order, PackedWeights()),
            *(rotary or normed, *inner_eps, gated),
        ]
    )


def fold_cross(block: Any, dtype: torch.dtype) -> CrossWeights:
    """The weights of a block's cross-attention: its own, with the scale of the scores in the queries' and what
    `fold_block` folds into the projection in that one's bias, in fp64, rounded once to `dtype`."""
    attn = block.attn
    weight, bias = qkv_of(attn)
    weight = weight.double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    width = len(weight) // 3
    scale = (width // attn.num_heads) ** -0.5
    proj = attn.proj.weight.double()
    proj_bias = proj.new_zeros(len(proj)) if attn.proj.bias is None else attn.proj.bias.double()
    norm: Any = getattr(attn, "norm", None)
    if type(norm) in NORMS and norm.bias is not None:
        proj_bias = proj_bias + proj @ norm.bias.double()
    gamma = _layer_scales(block)[0]
    if gamma is not None and dtype != torch.float16:
        proj_bias = gamma.double() * proj_bias
    tensors = weight[:width] * scale, bias[:width] * scale, weight[width:], bias[width:], proj_bias
    return CrossWeights._make(tensor.to(dtype) for tensor in tensors)
