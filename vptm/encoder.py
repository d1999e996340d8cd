"""The frozen encoder: the same function as `vptm.reference`, computing only what reaches the answer.

- Deep prompts are a key/value prefix: projected once per step for the whole batch, never given queries, an MLP or a
  norm.
- The last block computes the one row that is read, and projects no key or value of any token; where rows are averaged,
  it computes those rows alone, and averages before its last linear where no norm stands between.
- LayerNorm weights and LayerScale are folded into the frozen linears, the position bias is expanded, both once.

Each is exact in real arithmetic and used only where it is. A backbone that trains, or whose blocks are not plain
pre-norm blocks of timm's BEiT or ViT, runs through `vptm.reference` with fused attention instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers import LayerNorm, LayerScale, Mlp
from timm.models import beit, vision_transformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vptm_kernels import prompted_attention, readout_attention
from vptm_kernels._runtime.frozen_linear import frozen_linear, runs_onednn
from vptm_kernels._runtime.triton_support import choose
from vptm_kernels.prompted_attention.bias import align_rows

if TYPE_CHECKING:
    from .prompted_model import PromptedModel


class FrozenBlock(NamedTuple):
    """One pre-norm block with constants folded: `qkv(normalise(x))`, `x + scale_1 * proj(...)`, `x + scale_2 *
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


_NORMS = (nn.LayerNorm, LayerNorm)


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def can_fold(block: Any) -> bool:
    """Whether a block is norm, attention, LayerScale, norm, two-layer MLP, LayerScale, and nothing else."""
    if any(_hooks(module) for module in block.modules()):
        return False  # a hook on a part that never runs would never fire
    if type(block) is beit.Block:
        plain = type(block.attn) is beit.Attention
    elif type(block) is vision_transformer.Block:
        attn = block.attn
        plain = type(attn) is vision_transformer.Attention and attn.gate is None
        plain = plain and all(type(part) is nn.Identity for part in (attn.q_norm, attn.k_norm, attn.norm))
        plain = plain and all(type(part) in (nn.Identity, LayerScale) for part in (block.ls1, block.ls2))
    else:
        return False
    return (
        plain
        and type(block.mlp) is Mlp
        and isinstance(block.mlp.norm, nn.Identity)
        and type(block.norm1) in _NORMS
        and type(block.norm2) in _NORMS
        # an adapter library may have put its own module in place of a linear
        and all(type(linear) is nn.Linear for linear in _linears(block))
        and block.attn.qkv.out_features == 3 * block.attn.qkv.in_features
    )


def _linears(block: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2


def _qkv_bias(attn: Any) -> Tensor | None:
    if isinstance(attn, vision_transformer.Attention):
        return attn.qkv.bias
    return None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def _layer_scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(block, beit.Block):
        return block.gamma_1, block.gamma_2
    first, second = (scale.gamma if isinstance(scale, LayerScale) else None for scale in (block.ls1, block.ls2))
    return first, second


def fold_block(block: Any, dtype: torch.dtype) -> FrozenBlock:
    """Fold norm weights into the linear after them and LayerScale into the one before, in fp64, rounded once to
    `dtype`.

    Of the biases of queries, keys and values, only the queries' is left. A key bias adds the same number to every score
    of a query, which the softmax does not see; a value bias comes out of attention as it is, as its weights sum to 1,
    and joins the bias of the next linear. In fp16 the LayerScale stays apart, where `gamma * weight` would be subnormal
    (gamma starts at 1e-5 in BEiT-L).
    """
    fold_scale = dtype != torch.float16

    def after_norm(linear: nn.Linear, bias: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        weight = linear.weight.double()
        shift = weight.new_zeros(len(weight)) if bias is None else bias.double()
        if norm.bias is not None:
            shift = shift + weight @ norm.bias.double()
        return weight if norm.weight is None else weight * norm.weight.double(), shift

    def before_scale(linear: nn.Linear, gamma: Tensor | None, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight = linear.weight.double()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double()
        if shift is not None:
            bias = bias + weight @ shift
        if gamma is None or not fold_scale:
            return weight, bias
        return gamma.double()[:, None] * weight, gamma.double() * bias

    qkv, proj, fc1, fc2 = _linears(block)
    gammas = _layer_scales(block)
    qkv_weight, qkv_bias = after_norm(qkv, _qkv_bias(block.attn), block.norm1)
    width = qkv_bias.numel() // 3
    query_bias, value_bias = qkv_bias[:width], qkv_bias[2 * width :]
    qkv_bias = torch.cat([query_bias, torch.zeros_like(qkv_bias[width:])])
    tensors = [
        qkv_weight,
        qkv_bias,
        *before_scale(proj, gammas[0], value_bias),
        *after_norm(fc1, fc1.bias, block.norm2),
        *before_scale(fc2, gammas[1]),
    ]
    scales = [None if fold_scale or gamma is None else gamma.to(dtype) for gamma in gammas]
    fixed = [tensor.to(dtype) for tensor in tensors]
    return FrozenBlock._make([*fixed, *scales, block.norm1.eps, block.norm2.eps, block.mlp.act])


def _state(tensor: Tensor) -> tuple[int, int, torch.dtype, bool]:
    """What changes when the values of `tensor` do, while its storage is held; tensors made under inference_mode have no
    version to look at."""
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.requires_grad


def _states(module: nn.Module, found: list[object]) -> list[object]:
    """Every module, its mode, eps and hooks, and every parameter's state; `parameters()` takes five times as long."""
    found += (module, module.training, module.__dict__.get("eps"), _hooks(module))
    found += [_state(parameter) for parameter in module._parameters.values() if parameter is not None]
    for child in module._modules.values():
        if child is not None:
            _states(child, found)
    return found


def storages(tensors: Iterable[Tensor | None]) -> list[torch.UntypedStorage]:
    """What keeps the addresses in `_state` from being given to other tensors."""
    return [tensor.untyped_storage() for tensor in tensors if tensor is not None]


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


def _add_linear(x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    """`x + scale * linear(inner)`."""
    added = scale is None and x.dtype == inner.dtype == weight.dtype
    if not added or torch.is_grad_enabled() or torch.compiler.is_compiling() or runs_onednn(inner, weight):
        return _residual(x, frozen_linear(inner, weight, bias), scale)
    # the product is added to x where it is: without rows of bias to add it to, and without adding x afterwards
    out = x.reshape(-1, x.shape[-1]) + bias
    return torch.addmm(out, inner.reshape(-1, inner.shape[-1]), weight.t(), out=out).view(x.shape)


def _project(x: Tensor, block: FrozenBlock) -> Tensor:
    """Queries, keys and values; only queries have a bias, so only they are added to where nothing records it."""
    x = _normalise(x, block.eps_1)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or runs_onednn(x, block.qkv_weight):
        return frozen_linear(x, block.qkv_weight, block.qkv_bias)
    qkv = F.linear(x, block.qkv_weight)
    qkv[..., : x.shape[-1]] += block.qkv_bias[: x.shape[-1]]
    return qkv


def _mlp_inner(x: Tensor, block: FrozenBlock) -> Tensor:
    x, act = _normalise(x, block.eps_2), block.activation
    if type(act) is nn.GELU and act.approximate == "none":
        return frozen_linear(x, block.fc1_weight, block.fc1_bias, gelu=True)
    return act(frozen_linear(x, block.fc1_weight, block.fc1_bias))


def _mlp(x: Tensor, block: FrozenBlock) -> Tensor:
    return _add_linear(x, _mlp_inner(x, block), block.fc2_weight, block.fc2_bias, block.scale_2)


class FrozenEncoder:
    """Runs the frozen blocks of a `PromptedModel`; holds what is derived from its frozen weights, and derives it again
    when they change.

    The originals stay in `model.backbone`: `state_dict()` never sees a folded weight. Once `sealed`, they are gone, and
    what is here is all there is.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._walked: list[object] = []
        self._held: list[torch.UntypedStorage] = []
        self._foldable = False
        self._blocks: list[FrozenBlock] = []
        self._biases: list[Tensor | None] = []
        self._patch_state: dict[str, Tensor] = {}
        self._narrow = False
        self.sealed = False
        self._prefix_key: tuple[object, ...] | None = None
        self._prefix_held: list[torch.UntypedStorage] = []
        self._prefixes: dict[int, Tensor] = {}
        self._start: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> FrozenEncoder:
        twin = FrozenEncoder()
        twin.__dict__ |= copy.deepcopy(self.__getstate__(), memo)
        return twin

    def __getstate__(self) -> dict[str, object]:
        derived = self.__dict__ if self.sealed else FrozenEncoder().__dict__
        return derived | {"_prefix_key": None, "_prefix_held": [], "_prefixes": {}, "_start": None}

    def seal(self) -> None:
        """Be all there is of the frozen weights: nothing is looked at, or derived, again."""
        assert self._key is not None
        self.sealed, self._key, self._walked, self._held = True, self._key[:2], [], []

    def forget_prompts(self) -> None:
        """Project the prompts again: tensors made under inference_mode do not tell that they changed."""
        self._prefix_key = None

    @staticmethod
    def supports(model: PromptedModel) -> bool:
        """Whether the backbone is frozen, drops nothing at random, and is made of blocks that fold."""
        learns = model.backbone.training or any(parameter.requires_grad for parameter in model.backbone.parameters())
        return not learns and all(can_fold(block) for block in model.backbone.blocks)

    def runs(self, model: PromptedModel) -> bool:
        """Whether `model` runs folded; then the constants are those of its weights, derived again where one changed."""
        if torch.compiler.is_compiling():
            self._foldable = self.supports(model)
        elif not self.sealed:
            walked = _states(model.backbone, [])
            if walked != self._walked:
                self._foldable, self._walked = self.supports(model), walked
                self._held = storages(model.backbone.parameters())
        if self._foldable:
            self._refresh(model)
        return self._foldable

    def _refresh(self, model: PromptedModel) -> None:
        weights = model.backbone.patch_embed.proj.weight
        device = weights.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.dtype
        if dtype != torch.float64 and weights.dtype == torch.float64:
            dtype = torch.float64  # autocast leaves fp64 alone
        head_dim = model.num_features // model.backbone.blocks[0].attn.num_heads
        triton = choose(model.impl, weights.new_empty(0, dtype=dtype), head_dim) == "triton"
        if self.sealed:
            if self._key is None or self._key[:2] != (dtype, triton):
                raise RuntimeError(
                    f"freeze_for_inference dropped the weights that {dtype} with impl={model.impl!r} needs: "
                    "call it where the model will run"
                )
            return
        # a traced graph cannot look at versions: it takes what an eager run left, or derives the constants in the graph
        compiling = torch.compiler.is_compiling()
        if compiling and self._key is not None and self._key[:2] == (dtype, triton):
            return
        key = None
        if not compiling:
            key = (dtype, triton, self._walked)
            if key == self._key:
                return
        with torch.inference_mode(False), torch.no_grad():
            self._blocks = [fold_block(block, dtype) for block in model.backbone.blocks]
            self._patch_state = {}
            if dtype != weights.dtype:
                named = model.backbone.patch_embed.named_parameters()
                self._patch_state = {name: parameter.to(dtype) for name, parameter in named}
            self._biases = []
            for layer in range(len(self._blocks)):
                if layer and model.bias_is_shared:
                    self._biases.append(self._biases[0])
                    continue
                bias = model.position_bias(layer, learned=False)
                self._biases.append(None if bias is None else align_rows(_bias_values(bias, dtype, triton)))
        # the kernel reads a token-to-token bias in place and takes prompt columns as zero; SDPA wants all columns
        self._narrow = triton and model.extra_bias.startswith(("zero", "grid"))
        self._key = key
        self._prefix_key = None

    def _bias(self, model: PromptedModel, layer: int) -> Tensor | None:
        if model.prompt_bias is None:
            return self._biases[layer]
        return model.position_bias(layer)

    def _prompt_rows(self, model: PromptedModel, layer: int, batch: int) -> Tensor:
        """Normalised prompts of `layer`: (P, C), or (B, P, C) where dropout draws a mask per sample."""
        return _normalise(model.prompts.rows(layer, batch), self._blocks[layer].eps_1)

    def _prompts_attend(self, model: PromptedModel, layer: int) -> bool:
        """Whether anything reads what block `layer` makes of its prompt rows."""
        if layer + 1 == len(self._blocks):
            return model.pools_prompts
        return model.prompts.role(layer + 1) in ("mixed", "carried")

    def _prefix(self, model: PromptedModel, layer: int, batch: int) -> Tensor:
        """Keys and values of fresh prompts, (P, 2C) or (B, P, 2C); kept between calls while nothing is trained."""
        prompts = model.prompts
        keep = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not prompts.training
        if keep:
            key = tuple(_state(parameter) for parameter in prompts.parameters())
            if key != self._prefix_key:
                self._prefix_key = key
                self._prefix_held = storages(prompts.parameters())
                fresh = [i for i in range(len(self._blocks)) if prompts.role(i) == "own"]
                self._prefixes = {i: self._project_prefix(model, i, batch) for i in fresh}
            return self._prefixes[layer]
        return self._project_prefix(model, layer, batch)

    def _project_prefix(self, model: PromptedModel, layer: int, batch: int) -> Tensor:
        block = self._blocks[layer]
        width = model.num_features
        rows = self._prompt_rows(model, layer, batch)
        return F.linear(rows, block.qkv_weight[width:], block.qkv_bias[width:])

    def constants(self) -> Iterator[Tensor]:
        """Every tensor derived from frozen weights."""
        for block in self._blocks:
            yield from (value for value in block if isinstance(value, Tensor))
        yield from (bias for bias in self._biases if bias is not None)
        yield from self._patch_state.values()

    def lend(self, model: PromptedModel, twin: PromptedModel) -> None:
        """Let `twin`, the same model without prompts, run on these folded weights; they are not held twice."""
        if model.impl == "reference" or not self.runs(model):
            return
        if twin._encoder._blocks is not self._blocks:
            rows = twin.num_rows
            twin._encoder.__dict__ |= self.__dict__ | {"_prefix_key": None, "_prefixes": {}}
            twin._encoder._biases = [None if bias is None else bias[:, :rows, :rows] for bias in self._biases]

    @contextmanager
    def started_together(self, model: PromptedModel, twin: PromptedModel, images: Tensor) -> Iterator[None]:
        """Meanwhile `model` and its `twin` without prompts, on these images alone, share what is the same in both: the
        rows before block 0, and their queries, keys and values in it. Not for prompts that are added to the rows."""
        x = model.embed(images)
        self._start = twin._encoder._start = x, _project(x, self._blocks[0])
        try:
            yield
        finally:
            self._start = twin._encoder._start = None

    def patches(self, model: PromptedModel, images: Tensor) -> Tensor:
        """Patch embeddings; under autocast by weights that were cast once."""
        if self._patch_state:
            return functional_call(model.backbone.patch_embed, self._patch_state, (images,))
        return model.backbone.patch_embed(images)

    def features(self, model: PromptedModel, images: Tensor) -> Tensor:
        """Rows `[prefix | patches | mask?]` after the final norm, (B, T, C); prompts last where the read-out averages
        them."""
        x, real = self._run(model, images, len(model.backbone.blocks))
        return model.backbone.norm(x if model.pools_prompts else x[:, :real])

    def row(self, model: PromptedModel, images: Tensor, row: int) -> Tensor:
        """One of those rows, (B, C), with the last block computed for it alone."""
        last = len(model.backbone.blocks) - 1
        x, real = self._run(model, images, last)
        return model.backbone.norm(model.run_block(self._fixed(model)._last_block, model, x, real, row, last))

    def mean(self, model: PromptedModel, images: Tensor) -> Tensor:
        """The mean (B, C) of the rows a mean read-out takes, with the last block computed for those rows alone."""
        last = len(model.backbone.blocks) - 1
        x, real = self._run(model, images, last)
        return model.run_block(self._fixed(model)._mean_block, model, x, real, last)

    def _fixed(self, model: PromptedModel) -> FrozenEncoder:
        """An encoder that keeps the constants of now, where backward recomputes blocks after whatever runs between."""
        if not model.grad_checkpointing or torch.compiler.is_compiling():
            return self
        fixed = FrozenEncoder()
        fixed.__dict__ |= self.__dict__
        return fixed

    def _run(self, model: PromptedModel, images: Tensor, blocks: int) -> tuple[Tensor, int]:
        """Rows entering block `blocks`, prompt rows last where they are rows, and the number of other rows."""
        real = model.num_rows - model.prompts.length
        x = model.embed(images) if self._start is None else self._start[0]
        fixed = self._fixed(model)
        for layer in range(blocks):
            x = self._enter(model, x, layer, real)
            x = model.run_block(fixed._block, model, x, layer, real)
        if blocks < len(self._blocks):
            x = self._enter(model, x, blocks, real)
        return x, real

    def _enter(self, model: PromptedModel, x: Tensor, layer: int, real: int) -> Tensor:
        """Rows that enter block `layer`: with the prompts it wants, unless they are the same for every image."""
        prompts = model.prompts
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

    def _block(self, model: PromptedModel, x: Tensor, layer: int, real: int) -> Tensor:
        return _mlp(self._attend(model, x, layer, real), self._blocks[layer])

    def _attend(self, model: PromptedModel, x: Tensor, layer: int, real: int) -> Tensor:
        block = self._blocks[layer]
        prompts = model.prompts
        bias = self._bias(model, layer)
        prefix = prompt_qkv = fresh = None
        if x.shape[1] == real:
            own = prompts.role(layer) == "own"
            if own and self._prompts_attend(model, layer):
                fresh = prompts.rows(layer, x.shape[0])
                prompt_qkv = F.linear(_normalise(fresh, block.eps_1), block.qkv_weight, block.qkv_bias)
            else:
                prefix = self._prefix(model, layer, x.shape[0]) if own else None
                bias = None if bias is None else bias[:, :real, : None if own and not self._narrow else real]
        shared = layer == 0 and self._start is not None and x.shape[1] == real
        qkv = self._start[1] if shared and self._start is not None else _project(x, block)
        heads = model.backbone.blocks[layer].attn.num_heads
        mixed = prompted_attention(qkv, prefix, prompt_qkv=prompt_qkv, num_heads=heads, bias=bias, impl=model.impl)
        if fresh is None:
            return _add_linear(x, mixed, block.proj_weight, block.proj_bias, block.scale_1)
        update = F.linear(mixed, block.proj_weight, block.proj_bias)
        if block.scale_1 is not None:
            update = update * block.scale_1
        update = update.to(torch.promote_types(update.dtype, x.dtype))
        update[:, :real] += x
        update[:, real:] += fresh
        return update

    def _attend_from(self, model: PromptedModel, x: Tensor, layer: int, real: int, rows: slice) -> Tensor:
        """Attention and residual of some rows, (B, rows, C); no prompt row attends."""
        block = self._blocks[layer]
        bias = self._bias(model, layer)
        qkv_weight, qkv_bias, width = block.qkv_weight, block.qkv_bias, model.num_features
        prompts = None
        if x.shape[1] > real:  # prompts that were rows until here
            prompts = F.linear(_normalise(x[:, real:], block.eps_1), qkv_weight[width:], qkv_bias[width:])
            x = x[:, :real]
        elif model.prompts.role(layer) == "own":
            prompts = self._prefix(model, layer, x.shape[0])
        if bias is not None:
            bias = bias[:, :real, : real if self._narrow or prompts is None else None]
        qkv = _project(x, block)
        heads = model.backbone.blocks[layer].attn.num_heads
        mixed = prompted_attention(qkv, prompts, num_heads=heads, bias=bias, impl=model.impl)[:, rows]
        return _add_linear(x[:, rows], mixed, block.proj_weight, block.proj_bias, block.scale_1)

    def _mean_block(self, model: PromptedModel, x: Tensor, real: int, layer: int) -> Tensor:
        """The last block and the final norm for the rows that are averaged, (B, C).

        Without a norm before the mean, fc2 comes after it: `mean(W a_t + b) = W mean(a_t) + b`.
        """
        norm, rows = model.backbone.norm, model.mean_rows()
        block = self._blocks[layer]
        if model.pools_prompts:
            x = self._attend(model, x, layer, real)[:, rows]
        else:
            x = self._attend_from(model, x, layer, real, rows)
        if not isinstance(norm, nn.Identity):
            return norm(_mlp(x, block)).mean(dim=1)
        inner = _mlp_inner(x, block).mean(dim=1)
        return _residual(x.mean(dim=1), F.linear(inner, block.fc2_weight, block.fc2_bias), block.scale_2)

    def _last_block(self, model: PromptedModel, x: Tensor, real: int, row: int, layer: int) -> Tensor:
        """The block for one query row (B, C), without a key or a value of any token."""
        block, prompts = self._blocks[layer], model.prompts
        width = model.num_features
        weight_q, weight_k, weight_v = block.qkv_weight.split(width)
        bias_q, _, bias_v = block.qkv_bias.split(width)
        own = x[:, row]
        query = F.linear(_normalise(own, block.eps_1), weight_q, bias_q)
        prefix = None
        if x.shape[1] == real and prompts.role(layer) == "own":
            if prompts.per_sample():
                # a row of its own for every image is cheaper as one more token than projected
                x = torch.cat([x, prompts.rows(layer, x.shape[0]).to(x.dtype)], dim=1)
            else:
                prefix = self._prefix(model, layer, x.shape[0])
        bias = self._bias(model, layer)
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
            bias_v,
            num_heads=model.backbone.blocks[layer].attn.num_heads,
            prompt_kv=prefix,
            bias=bias,
            impl=model.impl,
        )
        out = _add_linear(own, value, block.proj_weight, block.proj_bias, block.scale_1)
        return _mlp(out, block)
