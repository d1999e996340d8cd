"""The frozen encoder: the same function as `vptm.reference`, computing only what reaches the answer.

- Deep prompts are a key/value prefix: projected once per step for the whole batch, never given queries, an MLP or a
  norm.
- The last block computes the one row that is read, and projects no key or value of any token.
- LayerNorm weights and LayerScale are folded into the frozen linears, the position bias is expanded, both once.

Each is exact in real arithmetic and used only where it is. A backbone that trains, or whose blocks are not plain BEiT
blocks, runs through `vptm.reference` with fused attention instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from timm.layers import Mlp
from timm.models.beit import Block
from torch import Tensor, nn
from torch.nn import functional as F

from vptm_kernels import prompted_attention
from vptm_kernels._runtime.triton_support import choose
from vptm_kernels.prompted_attention.bias import align_rows

from .reference import canonical_bias

if TYPE_CHECKING:
    from .prompted_beit import PromptedBEiT


class FrozenBlock(NamedTuple):
    """One BEiT block with constants folded: `qkv(normalise(x))`, `x + scale_1 * proj(...)`, `x + scale_2 *
    fc2(act(fc1(normalise(x))))`."""

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


def can_fold(block: Block) -> bool:
    """Whether a block is norm, attention, LayerScale, norm, two-layer MLP, LayerScale, and nothing else."""
    return (
        isinstance(block.mlp, Mlp)
        and isinstance(block.mlp.norm, nn.Identity)
        and isinstance(block.norm1, nn.LayerNorm)
        and isinstance(block.norm2, nn.LayerNorm)
    )


def fold_block(block: Block, dtype: torch.dtype) -> FrozenBlock:
    """Fold norm weights into the linear after them and LayerScale into the one before, in fp64, rounded once to
    `dtype`.

    The key part of the bias is left out: it adds the same number to every score of a query, which the softmax does not
    see. In fp16 the LayerScale stays apart, where `gamma * weight` would be subnormal (gamma starts at 1e-5 in BEiT-L).
    """
    attn, mlp = block.attn, block.mlp
    fold_scale = dtype != torch.float16

    def after_norm(weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        wide = weight.double()
        shift = wide @ norm.bias.double()
        return wide * norm.weight.double(), shift if bias is None else shift + bias.double()

    def before_scale(linear: nn.Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
        weight, bias = linear.weight.double(), linear.bias.double()
        if gamma is None or not fold_scale:
            return weight, bias
        return gamma.double()[:, None] * weight, gamma.double() * bias

    bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    qkv_weight, qkv_bias = after_norm(attn.qkv.weight, bias, block.norm1)
    width = qkv_bias.numel() // 3
    qkv_bias[width : 2 * width] = 0
    tensors = [
        qkv_weight,
        qkv_bias,
        *before_scale(attn.proj, block.gamma_1),
        *after_norm(mlp.fc1.weight, mlp.fc1.bias, block.norm2),
        *before_scale(mlp.fc2, block.gamma_2),
    ]
    scales = [None if fold_scale or gamma is None else gamma.to(dtype) for gamma in (block.gamma_1, block.gamma_2)]
    fixed = [tensor.to(dtype) for tensor in tensors]
    return FrozenBlock._make([*fixed, *scales, block.norm1.eps, block.norm2.eps, mlp.act])


def _state(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    """What changes when the values of `tensor` do; tensors made under inference_mode have no version to look at."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version, tensor.dtype


def _bias_values(bias: Tensor, dtype: torch.dtype, triton: bool) -> Tensor:
    """The bias in the type its attention reads best: for 16-bit kernels fp16, which keeps three more bits than bf16."""
    if not triton or dtype not in (torch.float16, torch.bfloat16):
        return bias.to(dtype)
    half = bias.half()
    return half if torch.equal(half.isinf(), bias.isinf()) else bias.float()


def _normalise(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _residual(x: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        update = update * scale
    # the update is a fresh tensor that nothing saved, so adding in place costs no memory; autocast keeps x in fp32
    return update.add_(x) if update.dtype == x.dtype else x + update


def _mlp(x: Tensor, block: FrozenBlock) -> Tensor:
    inner = block.activation(F.linear(_normalise(x, block.eps_2), block.fc1_weight, block.fc1_bias))
    return _residual(x, F.linear(inner, block.fc2_weight, block.fc2_bias), block.scale_2)


class FrozenEncoder:
    """Runs the frozen blocks of a `PromptedBEiT`; holds what is derived from its frozen weights, and derives it again
    when they change.

    The originals stay in `model.backbone`: `state_dict()` never sees a folded weight.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._blocks: list[FrozenBlock] = []
        self._biases: list[Tensor | None] = []
        self._narrow = False
        self._prefix_key: tuple[object, ...] | None = None
        self._prefixes: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, object]) -> FrozenEncoder:
        return FrozenEncoder()

    def __getstate__(self) -> dict[str, object]:
        return FrozenEncoder().__dict__

    @staticmethod
    def supports(model: PromptedBEiT) -> bool:
        """Whether the backbone is frozen and made of blocks that fold."""
        frozen = not any(parameter.requires_grad for parameter in model.backbone.parameters())
        return frozen and all(can_fold(block) for block in model.backbone.blocks)

    def _refresh(self, model: PromptedBEiT) -> None:
        weights = model.backbone.patch_embed.proj.weight
        device = weights.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.dtype
        if dtype != torch.float64 and weights.dtype == torch.float64:
            dtype = torch.float64  # autocast leaves fp64 alone
        head_dim = model.num_features // model.backbone.blocks[0].attn.num_heads
        triton = choose(model.impl, weights.new_empty(0, dtype=dtype), head_dim) == "triton"
        # a traced graph cannot look at versions: it takes what an eager run left, or derives the constants in the graph
        compiling = torch.compiler.is_compiling()
        if compiling and self._key is not None and self._key[:2] == (dtype, triton):
            return
        key = None
        if not compiling:
            key = (dtype, triton, *(_state(parameter) for parameter in model.backbone.parameters()))
            if key == self._key:
                return
        with torch.inference_mode(False), torch.no_grad():
            self._blocks = [fold_block(block, dtype) for block in model.backbone.blocks]
            self._biases = []
            per_block = model.backbone.blocks[0].attn.relative_position_bias_table is not None
            for layer in range(len(self._blocks)):
                if layer and not per_block:
                    self._biases.append(self._biases[0])
                    continue
                bias = canonical_bias(model, layer, learned=False)
                self._biases.append(None if bias is None else align_rows(_bias_values(bias, dtype, triton)))
        # the kernel reads a token-to-token bias in place and takes prompt columns as zero; SDPA wants all columns
        self._narrow = triton and model.extra_bias.startswith(("zero", "grid"))
        self._key = key
        self._prefix_key = None

    def _bias(self, model: PromptedBEiT, layer: int) -> Tensor | None:
        if model.prompt_bias is None:
            return self._biases[layer]
        return canonical_bias(model, layer)

    def _prompt_rows(self, model: PromptedBEiT, layer: int, batch: int) -> Tensor:
        """Normalised prompts of `layer`: (P, C), or (B, P, C) where dropout draws a mask per sample."""
        prompts = model.prompts
        if prompts.training and prompts.dropout > 0:
            rows = prompts(layer, batch)
        else:
            rows = prompts.weight[layer]
        return _normalise(rows, self._blocks[layer].eps_1)

    def _prefix(self, model: PromptedBEiT, layer: int, batch: int) -> Tensor | None:
        """Keys and values of deep prompts, (P, 2C) or (B, P, 2C); kept between calls while nothing is trained."""
        if model.prompts.length == 0:
            return None
        weight = model.prompts.weight
        keep = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not model.prompts.training
        if keep:
            key = _state(weight)
            if key != self._prefix_key:
                self._prefix_key = key
                self._prefixes = [self._project_prefix(model, i, batch) for i in range(len(self._blocks))]
            return self._prefixes[layer]
        return self._project_prefix(model, layer, batch)

    def _project_prefix(self, model: PromptedBEiT, layer: int, batch: int) -> Tensor:
        block = self._blocks[layer]
        width = model.num_features
        rows = self._prompt_rows(model, layer, batch)
        return F.linear(rows, block.qkv_weight[width:], block.qkv_bias[width:])

    def features(self, model: PromptedBEiT, images: Tensor) -> Tensor:
        """Rows `[class | patches | mask?]` after the final norm, (B, 1 + N (+ 1), C)."""
        x, real = self._run(model, images, len(model.backbone.blocks))
        return model.backbone.norm(x[:, :real])

    def row(self, model: PromptedBEiT, images: Tensor, row: int) -> Tensor:
        """One of those rows, (B, C), with the last block computed for it alone."""
        last = len(model.backbone.blocks) - 1
        x, real = self._run(model, images, last)
        return model.backbone.norm(self._last_block(model, x, real, row, last))

    def _run(self, model: PromptedBEiT, images: Tensor, blocks: int) -> tuple[Tensor, int]:
        """Rows entering block `blocks`, prompt rows last where they are rows, and the number of other rows."""
        self._refresh(model)
        prompts = model.prompts
        real = model.num_rows - prompts.length
        carried = prompts.mode != "deep" and prompts.length > 0
        dropped = prompts.training and prompts.dropout > 0
        x = self._embed(model, images, with_prompts=carried and (dropped or blocks == 0))
        for layer in range(blocks):
            x = self._attend(model, x, layer, real)
            x = _mlp(x, self._blocks[layer])
            if prompts.mode == "progressive" and carried and layer + 1 < len(self._blocks):
                # nothing saved these rows yet, so they may change in place
                x[:, real:] = prompts(layer + 1, len(x), x[:, real:])
        return x, real

    def _embed(self, model: PromptedBEiT, images: Tensor, *, with_prompts: bool) -> Tensor:
        """Rows `[class | patches | mask? | prompts?]` before block 0, written into one buffer."""
        backbone = model.backbone
        patches = backbone.patch_embed(images)
        position = backbone.pos_embed
        end = 1 + model.num_patches
        rows = model.num_rows if with_prompts else model.num_rows - model.prompts.length
        dtype = torch.promote_types(patches.dtype, backbone.cls_token.dtype)
        x = patches.new_empty(len(patches), rows, model.num_features, dtype=dtype)
        x[:, 0] = backbone.cls_token[0]
        x[:, 1:end] = patches
        if model.replaced_patch is not None and model.mask_token is not None:
            x[:, 1 + model.replaced_patch] = model.mask_token[0]
        if position is not None:
            x[:, :end] += position
        if model.has_mask_row and model.mask_token is not None:
            x[:, end] = model.mask_token[0]
            if position is not None and model.grid_position is not None:
                x[:, end] += position[:, 1 + model.grid_position]
        if with_prompts:
            x[:, rows - model.prompts.length :] = model.prompts(0, len(patches))
        return x

    def _attend(self, model: PromptedBEiT, x: Tensor, layer: int, real: int) -> Tensor:
        block = self._blocks[layer]
        prompts = model.prompts
        bias = self._bias(model, layer)
        prefix = prompt_qkv = None
        if prompts.mode == "deep":
            prefix = self._prefix(model, layer, len(x))
            bias = None if bias is None else bias[:, :real, : real if self._narrow else None]
        elif prompts.length and x.shape[1] == real:
            prompt_qkv = F.linear(self._prompt_rows(model, 0, len(x)), block.qkv_weight, block.qkv_bias)
        qkv = F.linear(_normalise(x, block.eps_1), block.qkv_weight, block.qkv_bias)
        heads = model.backbone.blocks[layer].attn.num_heads
        mixed = prompted_attention(qkv, prefix, prompt_qkv=prompt_qkv, num_heads=heads, bias=bias, impl=model.impl)
        update = F.linear(mixed, block.proj_weight, block.proj_bias)
        if prompt_qkv is None:
            return _residual(x, update, block.scale_1)
        if block.scale_1 is not None:
            update = update * block.scale_1
        update = update.to(torch.promote_types(update.dtype, x.dtype))
        update[:, :real] += x
        update[:, real:] += prompts.weight[0]
        return update

    def _last_block(self, model: PromptedBEiT, x: Tensor, real: int, row: int, layer: int) -> Tensor:
        """The block for one query row (B, C): scores `normalise(x_j) . (W_k q)`, output `W_v sum_j a_j normalise(x_j) +
        b_v`."""
        block = self._blocks[layer]
        attn = model.backbone.blocks[layer].attn
        batch, _, width = x.shape
        heads = attn.num_heads
        weight_q, weight_k, weight_v = block.qkv_weight.split(width)
        bias_q, _, bias_v = block.qkv_bias.split(width)
        normed = _normalise(x, block.eps_1).to(block.qkv_weight.dtype)
        query = F.linear(normed[:, row], weight_q, bias_q).unflatten(1, (heads, -1)) * (width // heads) ** -0.5
        absorbed = torch.einsum("bhd,hdc->bhc", query, weight_k.unflatten(0, (heads, -1)))
        tokens = normed.shape[1]
        prompts = None
        if model.prompts.mode == "deep" and model.prompts.length:
            prompts = self._prompt_rows(model, layer, batch).to(normed.dtype)
            scores = normed.new_empty(batch, heads, tokens + model.prompts.length)
            scores[..., :tokens] = absorbed @ normed.mT
            scores[..., tokens:] = absorbed @ prompts.mT
        else:
            scores = absorbed @ normed.mT
        bias = self._bias(model, layer)
        if bias is not None:
            scores = scores + bias[:, row]
        weights = scores.softmax(dim=-1).to(normed.dtype)
        mixed = weights[..., :tokens] @ normed
        if prompts is not None:
            mixed = mixed + weights[..., tokens:] @ prompts
        value = torch.einsum("bhc,hdc->bhd", mixed, weight_v.unflatten(0, (heads, -1))).flatten(1) + bias_v
        out = _residual(x[:, row], F.linear(value, block.proj_weight, block.proj_bias), block.scale_1)
        return _mlp(out, block)
