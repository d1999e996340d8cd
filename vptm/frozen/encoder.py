"""The frozen encoder: the same function as `vptm.frozen.reference`, computing only what reaches the answer.

- Deep prompts are a key/value prefix: projected once per step for the whole batch, never given queries, an MLP or a
  norm.
- The last block computes the one row that is read, and projects no key or value of any token; where rows are averaged,
  it computes those rows alone, and averages before its last linear where no norm stands between.
- LayerNorm weights, LayerScale and the scale of the scores are folded into the frozen linears, the position bias is
  expanded, both once.

Each is exact in real arithmetic and used only where it is. A backbone that trains, or whose blocks are not plain
pre-norm blocks of timm's BEiT or ViT, runs through `vptm.frozen.reference` with fused attention instead.

What may be kept between calls, and when it is made again, is said in one place: `FrozenEncoder`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vptm.frozen.fold import (
    FrozenBlock,
    Watch,
    fold_block,
    is_plain_linear,
    learns,
    oddity,
    refuse_unread,
    unfoldable,
    unread,
)
from vptm.models.prompts import PromptBank
from vptm_kernels import prompted_attention, readout_attention
from vptm_kernels._runtime.frozen_linear import frozen_linear, runs_onednn
from vptm_kernels._runtime.triton_support import choose
from vptm_kernels.prompted_attention.bias import align_rows

if TYPE_CHECKING:
    from vptm.models.prompted_model import PromptedModel
    from vptm.models.verbalizers import PreparedHead

Prefixes = Sequence["Tensor | None"]


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


def _normalise(x: Tensor, eps: float) -> Tensor:
    return torch.layer_norm(x, x.shape[-1:], None, None, eps)


def _residual(x: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        update = update * scale
    # the update is a fresh tensor that nothing saved, so adding in place costs no memory; autocast keeps x in fp32
    return update.add_(x) if update.dtype == x.dtype else x + update


class Folded:
    """Everything an encoder derives from frozen weights, and what runs on it. Never changed once it is made.

    Args:
        model: has a backbone whose blocks fold.
        dtype: the type blocks compute in.
        triton: whether attention runs in Triton kernels.

    Attributes:
        key: what it was made for.
        blocks: folded blocks.
        sealed_prefixes, sealed_head: projected prompts and the verbalizer's constants, where the model was sealed.
    """

    def __init__(self, model: PromptedModel, dtype: torch.dtype, triton: bool, key: str) -> None:
        backbone = model.backbone
        weight = backbone.patch_embed.proj.weight
        self.key = key
        blocks = [fold_block(block, dtype) for block in backbone.blocks]
        # one tensor for all, so that the prompts of all blocks are projected by one product; keys have no bias, and
        # that of values is in the next linear
        self.qkv_weights = torch.stack([block.qkv_weight for block in blocks])
        self._take_weights(blocks)
        self.prefix_eps = blocks[0].eps_1 if len({block.eps_1 for block in blocks}) == 1 else None
        # a GPU's product takes a bias along, and one launch less is worth more than a pass over fewer bytes
        self.plain = triton or weight.device.type != "cpu"
        # the kernel reads a token-to-token bias in place and takes prompt columns as zero; SDPA wants all columns
        self.narrow = triton and model.extra_bias.startswith(("zero", "grid"))
        biases: list[Tensor | None] = []
        for layer in range(len(blocks)):
            if layer and model.bias_is_shared:
                biases.append(biases[0])
                continue
            bias = model.position_bias(layer, learned=False)
            biases.append(None if bias is None else align_rows(_bias_values(bias, dtype, triton)))
        self._take_biases(biases, model.num_rows - model.prompts.length)
        self.patch_embed: nn.Module | None = None
        self.token_head: tuple[Tensor, Tensor | None] | None = None
        if dtype != weight.dtype:  # under autocast: cast once, here
            if not any(map(oddity, backbone.patch_embed.modules())):
                self.patch_embed = copy.deepcopy(backbone.patch_embed).to(dtype)
            head = model.lm_head
            if head is not None and is_plain_linear(head) and not head.weight.requires_grad:
                self.token_head = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        self.sealed_prefixes: Prefixes | None = None
        self.sealed_head: PreparedHead | None = None

    def _take_weights(self, blocks: list[FrozenBlock]) -> None:
        self.blocks = [block._replace(qkv_weight=weight) for block, weight in zip(blocks, self.qkv_weights)]
        self.prefix_weights = self.qkv_weights[:, self.qkv_weights.shape[1] // 3 :].mT

    def _take_biases(self, biases: list[Tensor | None], real: int) -> None:
        self.real = real
        self.biases = biases
        self.square_biases = [None if bias is None else bias[:, :real, :real] for bias in biases]
        self.wide_biases = self.square_biases
        if not self.narrow:
            self.wide_biases = [None if bias is None else bias[:, :real] for bias in biases]

    def _twin(self) -> Folded:
        twin = object.__new__(Folded)
        twin.__dict__ |= self.__dict__
        return twin

    def __getstate__(self) -> dict[str, object]:
        """Without views, which a pickle would write as often as there are any."""
        blocks = [block._replace(qkv_weight=torch.empty(0)) for block in self.blocks]
        views: dict[str, object] = {"prefix_weights": None, "square_biases": [], "wide_biases": []}
        return self.__dict__ | views | {"blocks": blocks}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._take_weights(self.blocks)
        self._take_biases(self.biases, self.real)

    def without_prompts(self) -> Folded:
        """The same for the model without its prompts, on the same tensors."""
        twin = self._twin()
        twin._take_biases(self.square_biases, self.real)
        twin.sealed_prefixes = twin.sealed_head = None
        return twin

    def sealed(self, prefixes: Prefixes | None, head: PreparedHead | None) -> Folded:
        """The same, with what is learned projected and folded as it is now."""
        twin = self._twin()
        twin.sealed_prefixes, twin.sealed_head = prefixes, head
        return twin

    def constants(self) -> Iterator[Tensor]:
        """Every tensor derived from frozen weights."""
        for block in self.blocks:
            yield from (value for value in block if isinstance(value, Tensor))
        yield from (bias for bias in self.biases if bias is not None)
        yield from () if self.patch_embed is None else self.patch_embed.parameters()
        yield from (tensor for tensor in self.token_head or () if tensor is not None)

    def patches(self, model: PromptedModel, images: Tensor) -> Tensor:
        """Patch embeddings; under autocast by weights that were cast once."""
        return (self.patch_embed or model.backbone.patch_embed)(images)

    def start(self, model: PromptedModel, images: Tensor) -> Start:
        """What a model and its twin without prompts share on the same images. Not for prompts that are added to the
        rows."""
        x = model.embed(images, self)
        return Start(x, self._project(x, self.blocks[0]))

    def features(self, model: PromptedModel, images: Tensor) -> Tensor:
        """Rows `[prefix | patches | mask?]` after the final norm, (B, T, C); prompts last where the read-out averages
        them."""
        x, _ = self._run(model, images, len(self.blocks), None)
        return model.backbone.norm(x if model.pools_prompts else x[:, : self.real])

    def row(self, model: PromptedModel, images: Tensor, row: int, start: Start | None = None) -> Tensor:
        """One of those rows, (B, C), with the last block computed for it alone."""
        last = len(self.blocks) - 1
        x, prefix = self._run(model, images, last, start)
        return model.backbone.norm(model.run_block(self._last_block, model, x, row, last, prefix))

    def mean(self, model: PromptedModel, images: Tensor, start: Start | None = None) -> Tensor:
        """The mean (B, C) of the rows a mean read-out takes, with the last block computed for those rows alone."""
        last = len(self.blocks) - 1
        x, prefix = self._run(model, images, last, start)
        return model.run_block(self._mean_block, model, x, last, prefix)

    def prefixes(self, model: PromptedModel, batch: int) -> Prefixes:
        """Keys and values (P, 2C) of the prompts that every block gets fresh; None where it gets none, or rows, or
        prompts of its own for every sample."""
        if self.sealed_prefixes is not None:
            return self.sealed_prefixes
        prompts, depth = model.prompts, len(self.blocks)
        found: list[Tensor | None] = [None] * depth
        if prompts.length == 0 or prompts.per_sample():  # every sample's own are drawn block by block
            return found
        drawn = prompts.training and prompts.dropout > 0
        everywhere = prompts.mode == "deep" and len(prompts.blocks) == len(prompts.weight) == depth
        if not everywhere or model.pools_prompts or drawn or self.prefix_eps is None:
            for layer in range(depth):
                if prompts.role(layer) == "own" and not self._prompts_attend(model, layer):
                    found[layer] = self._prefix(model, layer, batch)
            return found
        rows = prompts.weight if prompts.projection is None else prompts.projection(prompts.weight)
        return torch.bmm(_normalise(rows, self.prefix_eps), self.prefix_weights).unbind()

    def _prefix(self, model: PromptedModel, layer: int, batch: int) -> Tensor:
        rows = _normalise(model.prompts.rows(layer, batch), self.blocks[layer].eps_1)
        return F.linear(rows, self.blocks[layer].qkv_weight[model.num_features :])

    def _prompts_attend(self, model: PromptedModel, layer: int) -> bool:
        """Whether anything reads what block `layer` makes of its prompt rows."""
        if layer + 1 == len(self.blocks):
            return model.pools_prompts
        return model.prompts.role(layer + 1) in ("mixed", "carried")

    def _run(
        self, model: PromptedModel, images: Tensor, blocks: int, start: Start | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows entering block `blocks`, prompt rows last where they are rows, and the prefix of that block."""
        x = model.embed(images, self) if start is None else start.rows
        prefixes = self.prefixes(model, x.shape[0])
        qkv = None if start is None else start.qkv
        prompts = model.prompts
        straight = prompts.placement == "prepend" and (
            prompts.length == 0 or all(prefix is not None for prefix in prefixes)
        )
        for layer in range(blocks):
            if not straight:
                x = self._enter(model, x, layer)
            x = model.run_block(self._block, model, x, layer, prefixes[layer], qkv if layer == 0 else None)
        if blocks == len(self.blocks):
            return x, None
        return x if straight else self._enter(model, x, blocks), prefixes[blocks]

    def _enter(self, model: PromptedModel, x: Tensor, layer: int) -> Tensor:
        """Rows that enter block `layer`: with the prompts it wants, unless they are the same for every image."""
        prompts, real = model.prompts, self.real
        role = prompts.role(layer)
        if role in ("none", "own"):
            x = x[:, :real]
        if role == "mixed":
            # nothing saved these rows yet, so they may change in place, here and below
            x[:, real:] = prompts(layer, x.shape[0], x[:, real:])
        elif role == "own" and prompts.per_sample() and self._prompts_attend(model, layer):
            x = torch.cat([x, prompts(layer, x.shape[0]).to(x.dtype)], dim=1)
        added = prompts.added(layer, x.shape[0])
        if added is not None:
            first = model.backbone.num_prefix_tokens
            x[:, first : first + model.num_patches] += added
        return x

    def _project(self, x: Tensor, block: FrozenBlock) -> Tensor:
        """Queries, keys and values; only queries have a bias, so on a CPU only they are added to where nothing records
        it."""
        x = _normalise(x, block.eps_1)
        if self.plain:
            return F.linear(x, block.qkv_weight, block.qkv_bias)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or runs_onednn(x, block.qkv_weight):
            return frozen_linear(x, block.qkv_weight, block.qkv_bias)
        qkv = F.linear(x, block.qkv_weight)
        qkv[..., : x.shape[-1]] += block.qkv_bias[: x.shape[-1]]
        return qkv

    def _add_linear(self, x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
        """`x + scale * linear(inner)`."""
        if self.plain:
            return _residual(x, F.linear(inner, weight, bias), scale)
        added = scale is None and x.dtype == inner.dtype == weight.dtype
        if not added or torch.is_grad_enabled() or torch.compiler.is_compiling() or runs_onednn(inner, weight):
            return _residual(x, frozen_linear(inner, weight, bias), scale)
        # on a CPU the product is added to x where it is: without rows of bias to add it to, and without adding x after
        out = x.reshape(-1, x.shape[-1]) + bias
        return torch.addmm(out, inner.reshape(-1, inner.shape[-1]), weight.t(), out=out).view(x.shape)

    def _mlp_inner(self, x: Tensor, block: FrozenBlock) -> Tensor:
        x, act = _normalise(x, block.eps_2), block.activation
        exact_gelu = type(act) is nn.GELU and act.approximate == "none"
        if self.plain:
            x = F.linear(x, block.fc1_weight, block.fc1_bias)
            return F.gelu(x) if exact_gelu else act(x)
        if exact_gelu:
            return frozen_linear(x, block.fc1_weight, block.fc1_bias, gelu=True)
        return act(frozen_linear(x, block.fc1_weight, block.fc1_bias))

    def _mlp(self, x: Tensor, block: FrozenBlock) -> Tensor:
        return self._add_linear(x, self._mlp_inner(x, block), block.fc2_weight, block.fc2_bias, block.scale_2)

    def _block(
        self, model: PromptedModel, x: Tensor, layer: int, prefix: Tensor | None, qkv: Tensor | None = None
    ) -> Tensor:
        return self._mlp(self._attend(model, x, layer, prefix, qkv), self.blocks[layer])

    def _learned_bias(self, model: PromptedModel, layer: int, queries: int | None, keys: int | None) -> Tensor:
        bias = model.position_bias(layer)
        assert bias is not None
        return bias[:, :queries, :keys]

    def _attend(self, model: PromptedModel, x: Tensor, layer: int, prefix: Tensor | None, qkv: Tensor | None) -> Tensor:
        block, real, prompts = self.blocks[layer], self.real, model.prompts
        prompt_qkv = fresh = None
        if prefix is None and x.shape[1] == real and prompts.role(layer) == "own":
            if self._prompts_attend(model, layer):  # the same rows for every image, which attend like the others
                fresh = prompts.rows(layer, x.shape[0])
                prompt_qkv = F.linear(_normalise(fresh, block.eps_1), block.qkv_weight, block.qkv_bias)
            else:
                prefix = self._prefix(model, layer, x.shape[0])
        queries = None if x.shape[1] > real or fresh is not None else real
        if model.prompt_bias is not None:
            bias: Tensor | None = self._learned_bias(
                model, layer, queries, None if queries is None or prefix is not None else real
            )
        else:
            chosen = self.biases if queries is None else self.square_biases if prefix is None else self.wide_biases
            bias = chosen[layer]
        if qkv is None or x.shape[1] > real:
            qkv = self._project(x, block)
        mixed = prompted_attention(
            qkv, prefix, prompt_qkv=prompt_qkv, num_heads=block.heads, bias=bias, scale=1.0, impl=model.impl
        )
        if fresh is None:
            return self._add_linear(x, mixed, block.proj_weight, block.proj_bias, block.scale_1)
        update = F.linear(mixed, block.proj_weight, block.proj_bias)
        if block.scale_1 is not None:
            update = update * block.scale_1
        update = update.to(torch.promote_types(update.dtype, x.dtype))
        update[:, :real] += x
        update[:, real:] += fresh
        return update

    def _attend_from(self, model: PromptedModel, x: Tensor, layer: int, rows: slice, prefix: Tensor | None) -> Tensor:
        """Attention and residual of some rows, (B, rows, C); no prompt row attends."""
        block, real = self.blocks[layer], self.real
        if x.shape[1] > real:  # prompts that were rows until here
            prefix = F.linear(_normalise(x[:, real:], block.eps_1), block.qkv_weight[model.num_features :])
            x = x[:, :real]
        elif prefix is None and model.prompts.role(layer) == "own":
            prefix = self._prefix(model, layer, x.shape[0])
        if model.prompt_bias is not None:
            bias: Tensor | None = self._learned_bias(model, layer, real, real if prefix is None else None)
        else:
            bias = (self.square_biases if prefix is None else self.wide_biases)[layer]
        qkv = self._project(x, block)
        mixed = prompted_attention(qkv, prefix, num_heads=block.heads, bias=bias, scale=1.0, impl=model.impl)
        return self._add_linear(x[:, rows], mixed[:, rows], block.proj_weight, block.proj_bias, block.scale_1)

    def _mean_block(self, model: PromptedModel, x: Tensor, layer: int, prefix: Tensor | None) -> Tensor:
        """The last block and the final norm for the rows that are averaged, (B, C).

        Without a norm before the mean, fc2 comes after it: `mean(W a_t + b) = W mean(a_t) + b`.
        """
        norm, rows = model.backbone.norm, model.mean_rows()
        block = self.blocks[layer]
        if model.pools_prompts:
            x = self._attend(model, x, layer, prefix, None)[:, rows]
        else:
            x = self._attend_from(model, x, layer, rows, prefix)
        if type(norm) is not nn.Identity:
            return norm(self._mlp(x, block)).mean(dim=1)
        inner = self._mlp_inner(x, block).mean(dim=1)
        return norm(_residual(x.mean(dim=1), F.linear(inner, block.fc2_weight, block.fc2_bias), block.scale_2))

    def _last_block(self, model: PromptedModel, x: Tensor, row: int, layer: int, prefix: Tensor | None) -> Tensor:
        """The block for one query row (B, C), without a key or a value of any token."""
        block, prompts, width = self.blocks[layer], model.prompts, model.num_features
        weight_q, weight_k, weight_v = block.qkv_weight.split(width)
        own = x[:, row]
        query = F.linear(_normalise(own, block.eps_1), weight_q, block.qkv_bias[:width])
        if prefix is None and x.shape[1] == self.real and prompts.role(layer) == "own":
            # a row of its own for every image, as dropout draws it, is cheaper as one more token than projected
            x = torch.cat([x, prompts.rows(layer, x.shape[0]).to(x.dtype)], dim=1)
        bias = self.biases[layer] if model.prompt_bias is None else model.position_bias(layer)
        if bias is not None:
            bias = bias[:, row, : x.shape[1] + (0 if prefix is None else prompts.length)]
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
            prompt_kv=prefix,
            bias=bias,
            scale=1.0,
            impl=model.impl,
        )
        out = self._add_linear(own, value, block.proj_weight, block.proj_bias, block.scale_1)
        return self._mlp(out, block)


class _Made(NamedTuple):
    """What was derived from a backbone as `watch` saw it."""

    watch: Watch
    reason: str | None
    folded: dict[str, Folded]


class FrozenEncoder:
    """Holds what is derived from the frozen weights of a `PromptedModel`, and says how long it is true.

    - Constants of frozen weights are made at the first forward after construction, `to`, `load_state_dict`, `refresh`
      or `freeze_for_inference`, into one `Folded` for each type they are computed in (two under a change of autocast).
      A `Folded` never changes; threads that run at once share it.
    - Every forward looks whether the backbone is what it was: objects, in-place edits, modes, hooks, patched methods
      (`vptm.frozen.fold.Watch`). Where it is not, constants are made again.
    - Nothing learned is kept between calls, so every way of changing it is followed: fused optimisers, `.data` and
      aliases too. A model sealed by `freeze_for_inference` is the exception. Where no gradient is recorded and nothing
      traces, it keeps projected prompts and the folded head, made again after an edit that PyTorch counts, or by
      `load_learned_state_dict`. It refuses to run once a part, mode or hook of its backbone is another.
    - What PyTorch does not count is not seen, and a compiled graph looks at nothing: docs/inference.md lists these
      edits of frozen weights, after which `model.refresh()` is to be called.

    The originals stay in `model.backbone`: `state_dict()` never sees a folded weight. Once sealed, they are gone, and
    what is here is all there is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: _Made | None = None
        self._seal: Folded | None = None
        self._seal_watch: Watch | None = None
        self._bare: Folded | None = None
        self._seal_backbone: Watch | None = None
        self._lender: PromptedModel | None = None
        self._lent: tuple[Folded, Folded] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_seal": self._seal, "_bare": self._bare, "_lender": self._lender}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__ |= state

    @property
    def sealed(self) -> bool:
        return self._seal is not None

    @staticmethod
    def unsupported(model: PromptedModel) -> str | None:
        """What keeps a backbone from being folded, in words that fit after "got"; None where nothing does."""
        backbone = model.backbone
        if learns(backbone):
            return "a trainable one"
        if backbone.training:
            return "one in training mode"
        return (
            FrozenEncoder._prompts_run(model)
            or unread(backbone)
            or next(filter(None, map(unfoldable, backbone.blocks)), None)
        )

    @staticmethod
    def _prompts_run(model: PromptedModel) -> str | None:
        """What keeps prompts from being asked for their rows, in words: then the module itself has to run."""
        if type(model.prompts) is not PromptBank:
            return f"prompts of {type(model.prompts).__name__}"
        odd = oddity(model.prompts)
        return None if odd is None else f"prompts with {odd}"

    @classmethod
    def supports(cls, model: PromptedModel) -> bool:
        """Whether the backbone is frozen, drops nothing at random, and is made of blocks that fold."""
        return cls.unsupported(model) is None

    def runs(self, model: PromptedModel) -> bool:
        """Whether `model` runs folded."""
        return self.folded(model) is not None

    def runs_eagerly(self, model: PromptedModel) -> bool:
        """`runs`, from inside a trace: constants are made now, of real weights."""
        return self._eagerly(model) is not None

    def constants(self) -> Iterator[Tensor]:
        """Every tensor derived from frozen weights."""
        for folded in [self._seal] if self._seal is not None else self._made.folded.values() if self._made else ():
            yield from folded.constants()

    def folded(self, model: PromptedModel) -> Folded | None:
        """What `model` runs on as its weights are now; None where its backbone does not fold."""
        if self._lender is not None:
            return self._borrowed(self._lender)
        if self._seal is not None:
            return self._sealed(model)
        if torch.compiler.is_compiling():
            return self._traced(model)
        return self._eagerly(model)

    def _eagerly(self, model: PromptedModel) -> Folded | None:
        made = self._looked(model)
        if made.reason is not None or self._prompts_run(model) is not None:
            return None
        key, dtype, triton = self._key(model)
        found = made.folded.get(key)
        if found is None:
            with self._lock:
                found = made.folded.get(key)
                if found is None:
                    with torch.inference_mode(False), torch.no_grad():
                        found = Folded(model, dtype, triton, key)
                    # under fake tensors nothing may be kept that another call would take for real
                    if all(type(tensor) in (Tensor, nn.Parameter) for tensor in found.constants()):
                        made.folded[key] = found
        return found

    @staticmethod
    def _key(model: PromptedModel) -> tuple[str, torch.dtype, bool]:
        weights = model.backbone.patch_embed.proj.weight
        device, dtype = weights.device, weights.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled(device.type):  # autocast leaves fp64 alone
            dtype = torch.get_autocast_dtype(device.type)
        head_dim = model.num_features // model.backbone.blocks[0].attn.num_heads
        triton = choose(model.impl, weights.new_empty(0, dtype=dtype), head_dim) == "triton"
        return f"{dtype} {device} {'triton' if triton else 'torch'}", dtype, triton

    def _looked(self, model: PromptedModel) -> _Made:
        made = self._made
        if made is None or made.watch.changed():
            refuse_unread(model.backbone)
            with self._lock:
                made = self._made
                if made is None or made.watch.changed():
                    # a token head that learns is folded into nothing, and changes at every step
                    heads = [] if model.lm_head is None or learns(model.lm_head) else [model.lm_head]
                    modules = [module for part in (model.backbone, *heads) for module in part.modules()]
                    # the watch first: an edit between the two is then seen at the next call
                    mask = model.mask_token
                    fixed = {} if mask is None or mask.requires_grad else {"mask_token": mask}
                    watch = Watch(modules, [model._buffers, model._modules, fixed])
                    self._made = made = _Made(watch, self.unsupported(model), {})
        return made

    def _traced(self, model: PromptedModel) -> Folded | None:
        if torch.compiler.is_dynamo_compiling():
            # made once and eagerly while the graph is traced, which then reads them from here at every call
            if not model._fold_while_tracing():
                return None
            assert self._made is not None
            return self._made.folded[self._key(model)[0]]
        # without dynamo parameters are stand-ins: constants are derived in the graph
        if not self.supports(model):
            return None
        key, dtype, triton = self._key(model)
        return Folded(model, dtype, triton, key)

    def _borrowed(self, lender: PromptedModel) -> Folded | None:
        folded = lender._encoder.folded(lender)
        if folded is None:
            return None
        lent = self._lent
        if lent is None or lent[0] is not folded:
            self._lent = lent = folded, folded.without_prompts()
        return lent[1]

    def borrow(self, lender: PromptedModel) -> None:
        """Run on the constants of `lender`, the same model with prompts; they are not held twice."""
        self._lender = lender

    def _sealed(self, model: PromptedModel) -> Folded:
        assert self._seal is not None
        if not torch.compiler.is_compiling():
            if self._seal_backbone is None:
                self._seal_backbone = Watch(model.backbone.modules(), values=False)
            if self._seal_backbone.changed() or oddity(model.prompts) is not None:
                raise RuntimeError(
                    "a sealed model must stay as freeze_for_inference left it, got another part, mode or hook"
                )
        key, dtype, _ = self._key(model)
        if self._seal.key != key:
            raise RuntimeError(
                f"freeze_for_inference dropped the weights that {dtype} with impl={model.impl!r} needs: "
                "call it where the model will run"
            )
        bare = self._bare
        assert bare is not None
        # a graph looks at nothing, so what is learned is read in it; with gradients it may learn, training may draw it
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or model.prompts.training:
            return bare
        if self._seal_watch is None or self._seal_watch.changed():
            self.seal(model, self._seal)
        return self._seal

    def seal(self, model: PromptedModel, folded: Folded) -> None:
        """Be all there is of the frozen weights, and keep what is learned projected and folded as it is now."""
        heads = [] if model.lm_head is None else [model.lm_head]
        learned = (model.prompts, model.verbalizer, *heads)
        with self._lock:
            watch = Watch([module for part in learned for module in part.modules()], [model._modules])
            with torch.inference_mode(False), torch.no_grad():
                unsealed = folded.sealed(None, None)
                seal = unsealed.sealed(unsealed.prefixes(model, 1), model.verbalizer.prepare(model.lm_head))
            if self._seal_backbone is None:
                self._seal_backbone = Watch(model.backbone.modules(), values=False)
            self._seal, self._bare, self._seal_watch, self._made = seal, unsealed, watch, None

    def forget_learned(self) -> None:
        """Project and fold what is learned again, after an edit that PyTorch does not count."""
        self._seal_watch = None
