"""Constants of a frozen backbone, and the forward pass that runs on them: the same function as
`vptm.frozen.reference`, computing only what reaches the answer.

- Deep prompts are a key/value prefix: projected once per step for the whole batch, never given queries, an MLP or a
  norm.
- The last block computes the one row that is read, and projects no key or value of any token; where rows are averaged,
  it computes those rows alone, and averages before its last linear where no norm stands between. A key that is turned
  by its position cannot be left unprojected, nor a value that is normed after attention: there keys and values are.
- LayerNorm weights, LayerScale and the scale of the scores are folded into the frozen linears, the position bias is
  expanded, both once.

Each is exact in real arithmetic and used only where it is.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vptm.frozen.fold import CrossWeights, FrozenBlock, PackedWeights, fold_block, fold_cross
from vptm.frozen.parts import is_plain_linear, oddity, with_columns
from vptm.frozen.patches import with_patch_product
from vptm.frozen.pooling import pool_rows
from vptm.frozen.rotary import half_tables
from vptm.frozen.rows import PreparedHead, PromptedRows
from vptm_kernels import prompted_attention, readout_attention
from vptm_kernels._runtime.frozen_linear import frozen_linear, runs_onednn
from vptm_kernels.prompted_attention.bias import align_rows
from vptm_kernels.residual_norm import residual_norm
from vptm_kernels.residual_norm.configs import one_pass_is_worth_it


class PooledPrefix(NamedTuple):
    """Keys and values of the prompts of many tasks, (S, 2C); every image's rows of them, (B, 2) int32 start and
    length, on the CPU where the host is not to wait; and an upper bound of those lengths."""

    pool: Tensor
    ranges: Tensor
    longest: int


Prefix = Tensor | PooledPrefix | None
Prefixes = Sequence[Prefix]
# What each block adds to its scores with prompts, (H, P), or (H, S) for those of a pool; None where nothing.
Columns = Sequence[Tensor | None]


class Mixed(NamedTuple):
    """What a block that mixes makes of prompt rows Z that the block before left: `alpha * Z + fresh`."""

    alpha: float
    fresh: Tensor


class Sealed(NamedTuple):
    """What was learned as it was when a model was sealed: projected prompts, the verbalizer's constants, what gates add
    in every block, and what blocks that mix take; None where it is computed at every call."""

    prefixes: Prefixes | None = None
    head: PreparedHead | None = None
    columns: Columns | None = None
    mixed: Sequence[Mixed | None] | None = None


class Start(NamedTuple):
    """The rows that enter block 0, and their queries, keys and values in it."""

    rows: Tensor
    qkv: Tensor


def _bias_values(bias: Tensor, dtype: torch.dtype, triton: bool) -> Tensor:
    """The bias in the type its attention reads best: for 16-bit kernels fp16, which keeps three more bits than bf16."""
    if not triton or dtype not in (torch.float16, torch.bfloat16):
        return bias.to(dtype)
    half = bias.half()
    return half if torch.equal(half.isinf(), bias.isinf()) else bias.float()


def _prompt_arguments(prefix: Prefix) -> dict[str, Any]:
    if not isinstance(prefix, PooledPrefix):
        return {"prompt_kv": prefix}
    return {"prompt_kv": prefix.pool, "prompt_ranges": prefix.ranges, "max_prompt_length": prefix.longest}


def _residual(x: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        update = update * scale
    # where nothing is recorded the update is a fresh tensor, and costs no memory; autocast keeps x in fp32
    return x + update if _recorded(update) or update.dtype != x.dtype else update.add_(x)


def _recorded(update: Tensor) -> bool:
    """Whether autograd follows what a linear gave: a view of its rows, and adding to a view in place costs backward
    four passes over them."""
    return torch.is_grad_enabled() and update.requires_grad


class Folded:
    """Everything an encoder derives from frozen weights, and what runs on it. Never changed once it is made.

    Args:
        model: has a backbone whose blocks fold.
        dtype: the type blocks compute in.
        triton: whether attention runs in Triton kernels.

    Attributes:
        key: what it was made for.
        blocks: folded blocks.
        learned: what was learned, where the model was sealed.
    """

    def __init__(self, model: PromptedRows, dtype: torch.dtype, triton: bool, key: str) -> None:
        backbone = model.backbone
        weight = backbone.patch_embed.proj.weight
        self.key = key
        self.triton = triton
        self.width = (model.num_features,)
        rotary = getattr(backbone, "rope", None) is not None
        blocks = [fold_block(block, dtype, rotary=rotary) for block in backbone.blocks]
        # one tensor for all, so that the prompts of all blocks are projected by one product; keys have no bias, and
        # that of values is in the next linear, unless a block keeps them
        self.qkv_weights = torch.stack([block.qkv_weight for block in blocks])
        self._take_weights(blocks)
        self.prefix_eps = blocks[0].eps_1 if len({block.eps_1 for block in blocks}) == 1 else None
        # a GPU's product takes a bias along, and one launch less is worth more than a pass over fewer bytes
        self.for_gpu = triton or weight.device.type != "cpu"
        self._expand_biases(model, dtype, triton)
        self._take_cross(model)
        self.patch_embed: nn.Module | None = None
        self.token_head: tuple[Tensor, Tensor | None] | None = None
        if dtype != weight.dtype:  # under autocast: cast once, here
            if not any(map(oddity, backbone.patch_embed.modules())):
                self.patch_embed = copy.deepcopy(backbone.patch_embed).to(dtype)
            head = model.lm_head
            if head is not None and is_plain_linear(head) and not head.weight.requires_grad:
                self.token_head = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        if self.for_gpu:
            self.patch_embed = with_patch_product(self.patch_embed or backbone.patch_embed) or self.patch_embed
        self.learned = Sealed()

    def _normalise(self, x: Tensor, eps: float) -> Tensor:
        return torch.layer_norm(x, self.width, None, None, eps)

    def _take_weights(self, blocks: list[FrozenBlock]) -> None:
        self.blocks = [block._replace(qkv_weight=weight) for block, weight in zip(blocks, self.qkv_weights)]
        width = self.qkv_weights.shape[1] // 3
        self.prefix_weights = self.qkv_weights[:, width:].mT
        self.prefix_biases = [block.qkv_bias[width:] if block.keeps_biases else None for block in self.blocks]
        # of the block that runs for one row
        self.read_weights = self.blocks[-1].qkv_weight.split(width)
        self.read_query_bias = self.blocks[-1].qkv_bias[:width]

    def _take_cross(self, model: PromptedRows) -> None:
        """Weights of cross-attentions, where the model's prompts have any."""
        self.cross: list[CrossWeights] = []
        if model.prompts.kind == "cross":
            dtype = self.qkv_weights.dtype
            folded = (fold_cross(block, dtype) for block in model.backbone.blocks)
            self.cross = [CrossWeights._make(one.to(self.qkv_weights.device) for one in weights) for weights in folded]

    def _expand_biases(self, model: PromptedRows, dtype: torch.dtype, triton: bool, learned: bool = False) -> None:
        # the kernel reads a token-to-token bias in place and takes prompt columns as zero; SDPA wants all columns
        self.bias_without_prompts = triton and model.extra_bias.startswith(("zero", "grid"))
        biases: list[Tensor | None] = []
        for layer in range(len(self.blocks)):
            if layer and model.bias_is_shared and not learned:
                biases.append(biases[0])
                continue
            bias = model.position_bias(layer, learned=learned)
            biases.append(None if bias is None else align_rows(_bias_values(bias, dtype, triton)))
        wide = torch.promote_types(dtype, torch.float32)
        self.rotary = half_tables(model.backbone, model.prompts.length, wide)
        self._take_biases(biases, model.num_rows - model.prompts.length)

    def _take_biases(self, biases: list[Tensor | None], num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.biases = biases
        self.square_biases = [None if bias is None else bias[:, :num_tokens, :num_tokens] for bias in biases]
        self.wide_biases = self.square_biases
        if not self.bias_without_prompts:
            self.wide_biases = [None if bias is None else bias[:, :num_tokens] for bias in biases]

    def __copy__(self) -> Folded:
        """On the same tensors, views and packed weights too."""
        twin = object.__new__(Folded)
        twin.__dict__ |= self.__dict__
        return twin

    def __getstate__(self) -> dict[str, object]:
        """Without views, which a pickle would write as often as there are any, and without packed weights."""
        blocks = [block._replace(qkv_weight=torch.empty(0), packed=PackedWeights()) for block in self.blocks]
        views: dict[str, object] = {"prefix_weights": None, "read_weights": (), "read_query_bias": None}
        views |= {"prefix_biases": []}
        views |= {"square_biases": [], "wide_biases": []}
        return self.__dict__ | views | {"blocks": blocks}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._take_weights(self.blocks)
        self._take_biases(self.biases, self.num_tokens)

    def without_prompts(self) -> Folded:
        """The same for the model without its prompts, on the same tensors."""
        twin = copy.copy(self)
        twin._take_biases(self.square_biases, self.num_tokens)
        twin.learned = Sealed()
        return twin

    def beside(self, model: PromptedRows, *, learned: bool = False) -> Folded:
        """The same for another model on this backbone: the same weights, and the position bias of its rows, with
        `prompt_bias` as it is now where `learned`."""
        twin = copy.copy(self)
        twin.learned = Sealed()
        twin._expand_biases(model, self.qkv_weights.dtype, self.triton, learned)
        if not self.cross:
            twin._take_cross(model)
        return twin

    def at_size(self, model: PromptedRows, patch_embed: nn.Module | None) -> Folded:
        """The same for the same model at another size, with its own `patch_embed` in the type it computes in, where
        there is one; what was sealed does not go with a size."""
        twin = self.beside(model)
        twin.learned, twin.patch_embed = self.learned, patch_embed
        return twin

    def sealed(self, learned: Sealed) -> Folded:
        """The same, with what was learned in place of what a call would compute of it."""
        twin = copy.copy(self)
        twin.learned = learned
        return twin

    def seal_of(self, model: PromptedRows) -> Sealed:
        """What `model` has learned, projected and folded as it is now."""
        prompts, depth = model.prompts, len(self.blocks)
        columns = [prompts.columns(layer) for layer in range(depth)]
        mixed: list[Mixed | None] = [None] * depth
        for layer in range(depth):
            if prompts.role(layer) == "mixed":
                alpha = float(prompts.mixing(layer))
                mixed[layer] = Mixed(alpha, ((1.0 - alpha) * prompts.rows(layer, 1)).detach())
        return Sealed(
            self.prefixes(model, 1),
            model.verbalizer.prepare(model.lm_head),
            # gates at zero add nothing
            [None if one is None or not one.any() else one.detach().clone() for one in columns],
            mixed,
        )

    def packed(self, wanted: bool) -> Folded:
        """The same, where `wanted` with its weights once more as linears read them fastest that neither learn nor are
        traced, else without those. A copy or a pickle has none."""
        twin = copy.copy(self)
        twin._take_weights(
            [block.with_packed() if wanted else block._replace(packed=PackedWeights()) for block in self.blocks]
        )
        return twin

    def constants(self) -> Iterator[Tensor]:
        """Every tensor derived from frozen weights, packed ones left out."""
        for block in self.blocks:
            yield from (value for value in block if isinstance(value, Tensor))
        yield from (tensor for weights in self.cross for tensor in weights)
        yield from (bias for bias in self.biases if bias is not None)
        yield from (table for tables in self.rotary or () for table in tables)
        yield from () if self.patch_embed is None else (*self.patch_embed.parameters(), *self.patch_embed.buffers())
        yield from (tensor for tensor in self.token_head or () if tensor is not None)

    def start(self, model: PromptedRows, images: Tensor) -> Start:
        """What a model and its twin without prompts share on the same images. Not for prompts that are added to the
        rows."""
        x = model.embed(images, self.patch_embed)
        return Start(x, self._project(x, self.blocks[0]))

    def features(self, model: PromptedRows, images: Tensor) -> Tensor:
        """Rows `[prefix | patches | mask?]` after the final norm, (B, T, C); prompts last where the read-out averages
        them."""
        x, _ = self._run(model, images, len(self.blocks), None)
        return model.backbone.norm(x if model.pools_prompts else x[:, : self.num_tokens])

    def intermediates(
        self, model: PromptedRows, images: Tensor, chosen: Collection[int], blocks: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Rows before the final norm after `blocks` blocks, and `[prefix | patches | mask?]` after each that is chosen
        of them."""
        kept: dict[int, Tensor] = {}
        x, _ = self._run(model, images, blocks, None, kept, chosen)
        return x if model.pools_prompts else x[:, : self.num_tokens], kept

    def row(self, model: PromptedRows, images: Tensor, row: int, start: Start | None = None) -> Tensor:
        """One of those rows, (B, C), with the last block computed for it alone."""
        last = len(self.blocks) - 1
        x, prefix = self._run(model, images, last, start)
        return model.backbone.norm(model.run_block(self._last_block, model, x, row, last, prefix))

    def mean(self, model: PromptedRows, images: Tensor, start: Start | None = None) -> Tensor:
        """The mean (B, C) of the rows a mean read-out takes, or what attention pools of them, with the last block
        computed for those rows alone."""
        last = len(self.blocks) - 1
        x, prefix = self._run(model, images, last, start)
        return model.run_block(self._mean_block, model, x, last, prefix)

    def prefixes(self, model: PromptedRows, batch: int) -> Prefixes:
        """Keys and values (P, 2C) of the prompts that every block gets fresh; None where it gets none, or rows, or
        prompts of its own for every sample."""
        if self.learned.prefixes is not None:
            return self.learned.prefixes
        prompts, depth = model.prompts, len(self.blocks)
        drawn = prompts.training and prompts.dropout > 0
        everywhere = prompts.mode == "deep" and len(prompts.blocks) == len(prompts.weight) == depth
        everywhere = everywhere and prompts.kind == "tokens"
        if not everywhere or not prompts.length or model.pools_prompts or drawn or self.prefix_eps is None:
            return [
                self._prefix(model, layer, batch) if self._takes_prefix(model, layer) else None
                for layer in range(depth)
            ]
        rows = self._normalise(prompts.expanded(), self.prefix_eps)
        biases = [bias for bias in self.prefix_biases if bias is not None]
        if self.for_gpu and not biases:
            return torch.bmm(rows, self.prefix_weights).unbind()
        if self.for_gpu:
            return torch.baddbmm(torch.stack(biases)[:, None], rows, self.prefix_weights).unbind()
        # on a CPU launches cost nothing, and a product of many matrices is the slower one
        return [self._project_prompts(row, layer) for layer, row in enumerate(rows.unbind())]

    def _columns(self, model: PromptedRows, layer: int) -> Tensor | None:
        """What block `layer` adds to its scores with prompts, (H, P)."""
        columns = self.learned.columns
        return model.prompts.columns(layer) if columns is None else columns[layer]

    def _project_prompts(self, rows: Tensor, layer: int) -> Tensor:
        """Keys and values of prompt rows that are normalised."""
        return self._linear(rows, self.blocks[layer].qkv_weight[self.width[0] :], self.prefix_biases[layer])

    def _takes_prefix(self, model: PromptedRows, layer: int) -> bool:
        """Whether block `layer` gets fresh prompts, of all images together, that attend to nothing."""
        prompts = model.prompts
        return not prompts.per_sample() and prompts.role(layer) == "own" and not self._prompts_attend(model, layer)

    def _prefix(self, model: PromptedRows, layer: int, batch: int) -> Tensor:
        """Keys and values of the prompts that block `layer` gets fresh, (P, 2C) or (B, P, 2C)."""
        if model.prompts.kind == "kv":
            return self._learned_keys_values(model.prompts.rows(layer, batch), self.blocks[layer])
        return self._project_prompts(self._normalise(model.prompts.rows(layer, batch), self.blocks[layer].eps_1), layer)

    def _learned_keys_values(self, learned: Tensor, block: FrozenBlock) -> Tensor:
        """Learned keys and values as those of tokens are here: without the bias that was left out of them, which adds
        the same to every score of a query, and to every value; and with channels of keys where theirs are."""
        width = self.width[0]
        if block.key_order is not None:
            learned = torch.cat([learned[..., :width][..., block.key_order], learned[..., width:]], -1)
        return (learned - block.left_out).to(block.qkv_weight.dtype)

    def _prompts_attend(self, model: PromptedRows, layer: int) -> bool:
        """Whether anything reads what block `layer` makes of its prompt rows."""
        if layer + 1 == len(self.blocks):
            return model.pools_prompts
        return model.prompts.role(layer + 1) in ("mixed", "carried")

    def _run(
        self,
        model: PromptedRows,
        images: Tensor,
        blocks: int,
        start: Start | None,
        kept: dict[int, Tensor] | None = None,
        chosen: Collection[int] = (),
    ) -> tuple[Tensor, Prefix]:
        """Rows entering block `blocks`, prompt rows last where they are rows, and the prefix of that block; token rows
        after chosen blocks go into `kept`."""
        x = model.embed(images, self.patch_embed) if start is None else start.rows
        qkv = None if start is None else start.qkv
        batch, prompts, depth = x.shape[0], model.prompts, len(self.blocks)
        # one product for all blocks is a few launches; where those cost nothing and backward keeps nothing, the
        # prefixes of one block at a time are the smaller
        if self.learned.prefixes is None and not self.for_gpu and not torch.is_grad_enabled():
            prefixes = None
            straight = all(self._takes_prefix(model, layer) for layer in range(depth))
        else:
            prefixes = self.prefixes(model, batch)
            straight = all(prefix is not None for prefix in prefixes)
        straight = prompts.placement == "prepend" and (straight or prompts.length == 0)

        def prefix(layer: int) -> Prefix:
            if prefixes is not None:
                return prefixes[layer]
            return self._prefix(model, layer, batch) if self._takes_prefix(model, layer) else None

        def stays(layer: int) -> bool:
            """Whether block `layer` takes rows as the block before leaves them."""
            return straight or (prompts.placement == "prepend" and prompts.role(layer) == "carried")

        normed: Tensor | None = None
        for layer in range(blocks):
            if not straight:
                x = self._enter(model, x, layer)
            eps = self.blocks[layer + 1].eps_1 if layer + 1 < blocks and stays(layer + 1) else None
            given = qkv if layer == 0 else None
            x, normed = model.run_block(self._block, model, x, normed, layer, prefix(layer), given, eps)
            if kept is not None and layer in chosen:
                rows = x[:, : self.num_tokens]
                kept[layer] = rows if straight else rows.clone()  # what enters the next block may change in place
        if blocks == depth:
            return x, None
        return x if straight else self._enter(model, x, blocks), prefix(blocks)

    def _enter(self, model: PromptedRows, x: Tensor, layer: int) -> Tensor:
        """Rows that enter block `layer`: with the prompts it wants, unless they are the same for every image."""
        prompts, tokens = model.prompts, self.num_tokens
        role = prompts.role(layer)
        if role in ("none", "own"):
            x = x[:, :tokens]
        if role == "mixed":
            # nothing saved these rows yet, so they may change in place, here and below
            carried, mixed = x[:, tokens:], self.learned.mixed
            if mixed is not None and (held := mixed[layer]) is not None:
                carried.mul_(held.alpha).add_(held.fresh)
            else:
                learns = torch.is_grad_enabled() and isinstance(prompts.mixing(layer), Tensor)
                # the gradient of alpha asks for them
                x[:, tokens:] = prompts(layer, x.shape[0], carried.clone() if learns else carried)
        elif role == "own" and prompts.per_sample() and self._prompts_attend(model, layer):
            x = torch.cat([x, prompts(layer, x.shape[0]).to(x.dtype)], dim=1)
        added = prompts.added(layer, x.shape[0])
        if added is not None:
            x[:, model.rows_added_to()].add_(added)
        return x

    def _project(self, x: Tensor, block: FrozenBlock) -> Tensor:
        """Queries, keys and values; where only queries have a bias, only they are added to on a CPU when nothing
        records it."""
        x = self._normalise(x, block.eps_1)
        if self.for_gpu:
            return F.linear(x, block.qkv_weight, block.qkv_bias)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or runs_onednn(x, block.qkv_weight):
            return frozen_linear(x, block.qkv_weight, block.qkv_bias, packed=block.packed.qkv)
        if block.keeps_biases:
            return F.linear(x, block.qkv_weight, block.qkv_bias)
        qkv = F.linear(x, block.qkv_weight)
        qkv[..., : x.shape[-1]] += block.qkv_bias[: x.shape[-1]]
        return qkv

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias) if self.for_gpu else frozen_linear(x, weight, bias, packed=packed)

    def _add_linear(
        self, x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, packed: Tensor | None
    ) -> Tensor:
        """`x + scale * linear(inner)`."""
        if self.for_gpu:
            return _residual(x, F.linear(inner, weight, bias), scale)
        added = scale is None and x.dtype == inner.dtype == weight.dtype
        if not added or torch.is_grad_enabled() or torch.compiler.is_compiling() or runs_onednn(inner, weight):
            return _residual(x, frozen_linear(inner, weight, bias, packed=packed), scale)
        # on a CPU the product is added to x where it is: without rows of bias to add it to, and without adding x after
        out = x.reshape(-1, x.shape[-1]) + bias
        return torch.addmm(out, inner.reshape(-1, inner.shape[-1]), weight.t(), out=out).view(x.shape)

    def _mlp_inner(self, x: Tensor, block: FrozenBlock) -> Tensor:
        """First linear and activation of rows that are normalised; gates and a norm of its own where the block has
        them."""
        inner = self._activated(x, block)
        return inner if block.mlp_eps is None else torch.layer_norm(inner, inner.shape[-1:], None, None, block.mlp_eps)

    def _activated(self, x: Tensor, block: FrozenBlock) -> Tensor:
        act = block.activation
        if block.gated:
            linear = self._linear(x, block.fc1_weight, block.fc1_bias, block.packed.fc1)
            gates, values = linear.chunk(2, -1)
            return act(gates) * values
        exact_gelu = type(act) is nn.GELU and act.approximate == "none"
        if self.for_gpu:
            x = F.linear(x, block.fc1_weight, block.fc1_bias)
            return F.gelu(x) if exact_gelu else act(x)
        if exact_gelu:
            return frozen_linear(x, block.fc1_weight, block.fc1_bias, gelu=True, packed=block.packed.fc1)
        return act(frozen_linear(x, block.fc1_weight, block.fc1_bias, packed=block.packed.fc1))

    def _mlp(self, x: Tensor, block: FrozenBlock) -> Tensor:
        return self._add_mlp(x, self._normalise(x, block.eps_2), block)

    def _add_mlp(self, x: Tensor, normed: Tensor, block: FrozenBlock) -> Tensor:
        inner = self._mlp_inner(normed, block)
        return self._add_linear(x, inner, block.fc2_weight, block.fc2_bias, block.scale_2, block.packed.fc2)

    def _add_attended(self, x: Tensor, mixed: Tensor, block: FrozenBlock) -> Tensor:
        return self._add_linear(x, mixed, block.proj_weight, block.proj_bias, block.scale_1, block.packed.proj)

    def _block(
        self,
        model: PromptedRows,
        x: Tensor,
        normed: Tensor | None,
        layer: int,
        prefix: Prefix,
        qkv: Tensor | None,
        eps: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows after block `layer`, and normalised with `eps` for the next one where that comes along. normed: rows
        that enter, normalised, where they are."""
        block = self.blocks[layer]
        if normed is not None:
            qkv = F.linear(normed, block.qkv_weight, block.qkv_bias)
        mixed, fresh = self._mix(model, x, layer, prefix, qkv)
        # what is compiled fuses them by itself, and a size that is looked at there would be one of its guards
        eager = fresh is None and self.triton and not torch.compiler.is_compiling()
        if model.prompts.kind == "cross" or not (eager and one_pass_is_worth_it(x.numel())):
            x = self._crossed(model, self._join(x, mixed, fresh, block), layer)
            return self._mlp(x, block), None
        update = F.linear(mixed, block.proj_weight, block.proj_bias)
        x, normed = residual_norm(x, update, gamma=block.scale_1, eps=block.eps_2, impl="triton")
        if eps is None:
            return self._add_mlp(x, normed, block), None
        update = F.linear(self._mlp_inner(normed, block), block.fc2_weight, block.fc2_bias)
        return residual_norm(x, update, gamma=block.scale_2, eps=eps, impl="triton")

    def _learned_bias(self, model: PromptedRows, layer: int, queries: int | None, keys: int | None) -> Tensor:
        bias = model.position_bias(layer)
        assert bias is not None
        return bias[:, :queries, :keys]

    def _attend(self, model: PromptedRows, x: Tensor, layer: int, prefix: Prefix, qkv: Tensor | None) -> Tensor:
        return self._join(x, *self._mix(model, x, layer, prefix, qkv), self.blocks[layer])

    def _mix(
        self, model: PromptedRows, x: Tensor, layer: int, prefix: Prefix, qkv: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What attention gives, and the prompt rows among it that are not among `x`."""
        block, tokens, rows = self.blocks[layer], self.num_tokens, x.shape[1]
        prompt_qkv = fresh = None
        if prefix is None and rows == tokens and model.prompts.role(layer) == "own":
            if self._prompts_attend(model, layer):  # the same rows for every image, which attend like the others
                fresh = model.prompts.rows(layer, x.shape[0])
                prompt_qkv = self._linear(self._normalise(fresh, block.eps_1), block.qkv_weight, block.qkv_bias)
            else:
                prefix = self._prefix(model, layer, x.shape[0])
        queries = None if rows > tokens or fresh is not None else tokens
        if model.prompt_bias is not None:
            bias: Tensor | None = self._learned_bias(
                model, layer, queries, None if queries is None or prefix is not None else tokens
            )
        else:
            chosen = self.biases if queries is None else self.square_biases if prefix is None else self.wide_biases
            bias = chosen[layer]
        columns = self._columns(model, layer)
        if qkv is None or qkv.shape[1] != rows:  # those of a `Start` are of tokens alone
            qkv = self._project(x, block)
        if columns is not None and rows > tokens:  # prompts are rows among others: two views of them
            qkv, prompt_qkv = qkv.split([tokens, rows - tokens], 1)
            if self.bias_without_prompts and model.prompt_bias is None:
                bias = self.square_biases[layer]
        mixed = prompted_attention(
            qkv,
            **_prompt_arguments(prefix),
            prompt_qkv=prompt_qkv,
            num_heads=block.heads,
            bias=bias,
            prompt_column_bias=columns,
            rotary=self._rotary_of(layer, qkv.shape[1]),
            scale=1.0,
            impl=model.impl,
        )
        return self._normed_inside(mixed, block), fresh

    def _crossed(self, model: PromptedRows, x: Tensor, layer: int) -> Tensor:
        """Rows (B, rows, C) after self-attention, with what those of a block that has a cross-attention take from its
        prompts."""
        prompts = model.prompts.crossing(layer, x.shape[0])
        if prompts is None:
            return x
        block, cross = self.blocks[layer], self.cross[layer]
        key, value = self._linear(prompts, cross.key_value_weight, cross.key_value_bias).chunk(2, -1)
        if prompts.ndim == 2 and block.attn_eps is None and block.heads * len(prompts) <= self.width[0]:
            return self._crossed_by_products(x, key, value, block, cross)
        query = self._linear(x, cross.query_weight, cross.query_bias)
        if prompts.ndim == 2:  # the same keys for every image: rows of all images are queries of one
            query, key, value = query.reshape(1, -1, self.width[0]), key[None], value[None]
        query, key, value = (one.unflatten(-1, (block.heads, -1)).transpose(1, 2) for one in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).reshape(x.shape)
        mixed = self._normed_inside(mixed, block)
        return self._add_linear(x, mixed, block.proj_weight, cross.proj_bias, block.scale_1, block.packed.proj)

    def _crossed_by_products(
        self, x: Tensor, key: Tensor, value: Tensor, block: FrozenBlock, cross: CrossWeights
    ) -> Tensor:
        """The same for few keys and values (P, C) that all images share: scores are one product of rows with the keys
        of all heads, (q W) k = q (W k), and a second one maps shares to the output, so that no row has a query."""
        split = (block.heads, -1)
        key, value = (one.unflatten(-1, split).transpose(0, 1) for one in (key, value))  # (H, P, D)
        scoring = (key @ cross.query_weight.unflatten(0, split)).flatten(0, 1)  # (H * P, C)
        offset = (key @ cross.query_bias.unflatten(0, split)[..., None]).flatten()
        giving = (value @ block.proj_weight.unflatten(1, split).movedim(0, -1)).flatten(0, 1)  # (H * P, C)
        scores = self._linear(x, scoring, offset)
        shares = scores.unflatten(-1, split).softmax(-1).flatten(-2).to(giving.dtype)
        return self._add_linear(x, shares, giving.mT, cross.proj_bias, block.scale_1, None)

    def _rotary_of(self, layer: int, rows: int) -> tuple[Tensor, Tensor] | None:
        if self.rotary is None:
            return None
        cos, sin = self.rotary[layer]
        return cos[..., :rows, :], sin[..., :rows, :]

    def _normed_inside(self, mixed: Tensor, block: FrozenBlock) -> Tensor:
        """What attention gives, through the norm before the projection where the block has one."""
        return mixed if block.attn_eps is None else self._normalise(mixed, block.attn_eps)

    def _join(self, x: Tensor, mixed: Tensor, fresh: Tensor | None, block: FrozenBlock) -> Tensor:
        """Rows after attention: its projection added to them."""
        if fresh is None:
            return self._add_attended(x, mixed, block)
        tokens = self.num_tokens
        update = self._linear(mixed, block.proj_weight, block.proj_bias)
        if block.scale_1 is not None:
            update = update * block.scale_1
        update = update.to(torch.promote_types(update.dtype, x.dtype))
        if _recorded(update):
            of_tokens, of_prompts = update.split([tokens, update.shape[1] - tokens], dim=1)
            return torch.cat([of_tokens + x, (of_prompts + fresh).to(update.dtype)], dim=1)
        update[:, :tokens] += x
        update[:, tokens:] += fresh
        return update

    def _attend_from(self, model: PromptedRows, x: Tensor, layer: int, rows: slice, prefix: Prefix) -> Tensor:
        """Attention and residual of some rows, (B, rows, C); no prompt row attends."""
        block, tokens = self.blocks[layer], self.num_tokens
        if x.shape[1] > tokens:  # prompts that were rows until here
            prefix = self._project_prompts(self._normalise(x[:, tokens:], block.eps_1), layer)
            x = x[:, :tokens]
        elif prefix is None and model.prompts.role(layer) == "own":
            prefix = self._prefix(model, layer, x.shape[0])
        if model.prompt_bias is not None:
            bias: Tensor | None = self._learned_bias(model, layer, tokens, tokens if prefix is None else None)
        else:
            bias = (self.square_biases if prefix is None else self.wide_biases)[layer]
        qkv = self._project(x, block)
        mixed = prompted_attention(
            qkv,
            **_prompt_arguments(prefix),
            num_heads=block.heads,
            bias=bias,
            prompt_column_bias=self._columns(model, layer),
            rotary=self._rotary_of(layer, tokens),
            scale=1.0,
            impl=model.impl,
        )
        return self._add_attended(x[:, rows], self._normed_inside(mixed[:, rows], block), block)

    def _mean_block(self, model: PromptedRows, x: Tensor, layer: int, prefix: Prefix) -> Tensor:
        """The last block and the final norm for the rows that are averaged or pooled by attention, (B, C).

        Without a norm before the mean, fc2 comes after it: `mean(W a_t + b) = W mean(a_t) + b`.
        """
        norm, rows = model.backbone.norm, model.mean_rows()
        block = self.blocks[layer]
        if model.pools_prompts:
            x = self._attend(model, x, layer, prefix, None)[:, rows]
        else:
            x = self._crossed(model, self._attend_from(model, x, layer, rows, prefix), layer)
        if model.attention_pool is not None:
            return pool_rows(model.attention_pool, norm, self._mlp(x, block), model.impl)
        if type(norm) is not nn.Identity:
            return norm(self._mlp(x, block)).mean(dim=1)
        inner = self._mlp_inner(self._normalise(x, block.eps_2), block).mean(dim=1)
        return norm(_residual(x.mean(dim=1), self._linear(inner, block.fc2_weight, block.fc2_bias), block.scale_2))

    def _last_block(self, model: PromptedRows, x: Tensor, row: int, layer: int, prefix: Prefix) -> Tensor:
        """The block for one query row (B, C), without a key or a value of any token where those need not be projected
        to be turned or normed."""
        block, prompts = self.blocks[layer], model.prompts
        if block.keeps_biases:
            out = self._attend_from(model, x, layer, slice(row, row + 1), prefix)
            return self._mlp(self._crossed(model, out, layer)[:, 0], block)
        weight_q, weight_k, weight_v = self.read_weights
        row_in = x[:, row]
        query = self._linear(self._normalise(row_in, block.eps_1), weight_q, self.read_query_bias)
        if prefix is None and prompts.kind == "kv" and prompts.role(layer) == "own":
            prefix = self._prefix(model, layer, x.shape[0])
        elif prefix is None and x.shape[1] == self.num_tokens and prompts.role(layer) == "own":
            # a row of its own for every image, as dropout draws it, is cheaper as one more token than projected
            x = torch.cat([x, prompts.rows(layer, x.shape[0]).to(x.dtype)], dim=1)
        bias = self.biases[layer] if model.prompt_bias is None else model.position_bias(layer)
        if bias is not None:
            bias = bias[:, row, : x.shape[1] + (0 if prefix is None else prompts.length)]
        columns = self._columns(model, layer)
        if columns is not None and prefix is None:  # prompts are rows among others
            bias = with_columns(None if bias is None else bias[:, None], columns, 1, x.shape[1])[:, 0]
            columns = None
        value = readout_attention(
            x,
            query,
            None,
            None,
            block.eps_1,
            weight_k,
            weight_v,
            None,  # the value bias is in the next linear
            num_heads=block.heads,
            **_prompt_arguments(prefix),
            prompt_column_bias=columns,
            bias=bias,
            scale=1.0,
            impl=model.impl,
        )
        out = self._add_attended(row_in, value, block)
        if self.cross:
            out = self._crossed(model, out[:, None], layer)[:, 0]
        return self._mlp(out, block)
