"""The public function: argument checks, autocast, choice of implementation, and the products with the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .._runtime.arguments import check_prompt_columns, shape_of
from .._runtime.plans import Plans, signature
from .._runtime.private_torch import autocasting
from .._runtime.ranges import check_ranges
from .._runtime.tracing import nothing_traces
from .._runtime.triton_support import choose
from . import torch_impl
from .ops import direct_readout, readout_attention_op, run_readout

MAX_HEADS = 64  # of the kernels, which hold all heads at once

# Head dimension, scale and implementation of calls that passed the checks, by all that checks ask for.
_checked: Plans[tuple[int, float, str]] = Plans()


def readout_attention(
    x: Tensor,
    q: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    *,
    num_heads: int,
    prompt_kv: Tensor | None = None,
    prompt_ranges: Tensor | None = None,
    max_prompt_length: int | None = None,
    prompt_column_bias: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of one query row per image to all its tokens, without a key or a value of any token.

    The last block of a vision transformer whose output is one row (class or mask token) needs `q_h . (W_k,h n_j)` and
    `sum_j a_hj W_v,h n_j` only, with n_j the normalised token j. Multiplied in the other order, `(q_h W_k,h) . n_j` and
    `W_v,h (sum_j a_hj n_j)`, both cost one product with a weight per image instead of one per token.

    Args:
        x: (B, N, C), tokens before the block's LayerNorm; float16, bfloat16, float32 or float64. Any strides with a
            unit last one.
        q: (B, H*D), the projected query row, heads then channels; its dtype is the one of everything but x, the norm
            and the bias. x may be float32 with 16-bit q, as the residual stream is under autocast.
        norm_weight, norm_bias: (C,) of the LayerNorm before the projections; None where folded into the weights.
        eps: of the LayerNorm.
        k_weight: (H*D, C). The key bias is left out: it adds the same number to every score of a query.
        v_weight: (H*D, C).
        v_bias: (H*D,) or None.
        num_heads: H.
        prompt_kv: projected keys and values of prompts, which are attended to as well: (P, 2*H*D) shared by the batch,
            (B, P, 2*H*D) per image, or with `prompt_ranges` a pool (S, 2*H*D), of which max_prompt_length rows are
            gathered for every image: for one query a copy costs what reading them does. Values include the value bias.
        prompt_ranges: (B, 2) int32, start and length of every image's rows of the pool, as in `prompted_attention`.
        max_prompt_length: an upper bound of those lengths; `bias` is then (H, N).
        prompt_column_bias: (H, P), or (H, S) for a pool, floating point: added to the scaled scores with each prompt,
            beside `bias`, as in `prompted_attention`.
        bias: (H, N) or (H, N+P), prompts last, added to the scaled scores. Any floating dtype.
        scale: factor of the scores, default `D ** -0.5`. The bias is not scaled.
        impl: "auto" is "triton" for GPU tensors of float16, bfloat16 or float32 with at most 64 heads, else "torch". An
            explicit "triton" or "torch" never falls back.

    Returns:
        (B, H*D) in the dtype of `q`. A head whose scores are all -inf attends to nothing and gives zeros.

    Gradients reach every tensor. Only those asked for are computed, in a fixed order: equal inputs give bitwise equal
    gradients. There is no second derivative. Beside its inputs the backward pass keeps tensors of H*(N+P) or H*C + 2*N
    elements per image, and computes normalised tokens again. Under autocast everything but x, the norm and the bias is
    cast. On a GPU, products of float32 follow `torch.get_float32_matmul_precision()` at the time of the call, as
    `F.linear` does: TF32 for "high" and "medium".

    Equal to::

        n = layer_norm(x, (C,), norm_weight, norm_bias, eps)
        k, v = n @ k_weight.T, n @ v_weight.T + v_bias                  # (B, N, H*D), then split into heads
        k, v = cat([k, prompt_k], 1), cat([v, prompt_v], 1)
        bias = bias + cat([zeros(H, N), prompt_column_bias], 1)
        out = softmax((q * scale) @ k.mT + bias) @ v                    # (B, H, 1, D), then heads joined

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it must be and what it is.

    >>> import torch
    >>> from vptm_kernels import readout_attention
    >>> x = torch.randn(2, 197, 96)
    >>> weight = torch.randn(3, 64, 96) / 10
    >>> q = torch.nn.functional.layer_norm(x[:, 0], (96,)) @ weight[0].T
    >>> prompts = torch.randn(10, 128, requires_grad=True)
    >>> out = readout_attention(x, q, None, None, 1e-6, weight[1], weight[2], None, num_heads=4, prompt_kv=prompts)
    >>> out.shape
    torch.Size([2, 64])
    >>> out.sum().backward()
    >>> prompts.grad.shape
    torch.Size([10, 128])
    """
    outside = None
    columns = prompt_column_bias
    if columns is not None:
        prompts = prompt_kv if isinstance(prompt_kv, Tensor) and prompt_kv.ndim > 1 else None
        check_prompt_columns(columns, prompts, num_heads, q, called="q", beside="prompt_kv, got none")
    if prompt_ranges is not None or max_prompt_length is not None:
        prompt_kv, rows, outside = _gather(x, q, prompt_kv, prompt_ranges, max_prompt_length, bias)
        # an empty pool has no row that any image could read
        columns = None if columns is None or not columns.shape[1] else columns[:, rows].transpose(0, 1)
    tensors = (x, q, norm_weight, norm_bias, k_weight, v_weight, v_bias, prompt_kv, columns, bias)
    plain = nothing_traces(*tensors)
    key = _signature(tensors, num_heads, eps, scale, impl) if plain and not autocasting() else None
    known = None if key is None else _checked.get(key)
    if known is not None:
        head_dim, scale, impl = known
    else:
        named = {"x": x, "q": q, "k_weight": k_weight, "v_weight": v_weight}
        optional = {"v_bias": v_bias, "prompt_kv": prompt_kv, "norm_weight": norm_weight, "norm_bias": norm_bias}
        named |= {name: t for name, t in (*optional.items(), ("bias", bias)) if t is not None}
        for name, t in named.items():
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if not x.is_meta and torch.is_autocast_enabled(x.device.type) and q.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            q, k_weight, v_weight = q.to(dtype), k_weight.to(dtype), v_weight.to(dtype)
            v_bias = None if v_bias is None else v_bias.to(dtype)
            prompt_kv = None if prompt_kv is None else prompt_kv.to(dtype)
            named |= {"q": q, "k_weight": k_weight, "v_weight": v_weight}
            named |= {name: t for name, t in (("v_bias", v_bias), ("prompt_kv", prompt_kv)) if t is not None}
            # 16 bits other than those of autocast would be a third type.
            x = named["x"] = x if x.dtype in (dtype, torch.float32) else x.to(dtype)
        head_dim = _check(named, num_heads, eps)
        if scale is None:
            scale = head_dim**-0.5
        elif not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}")
        many = num_heads > MAX_HEADS
        impl = choose(impl, q, lacking=f"at most {MAX_HEADS} heads, got {num_heads}" if many else None)
        if x.shape[1] == 0:
            impl = "torch"  # the kernels walk over tokens, and only prompts are left
        if key is not None:
            _checked.keep(key, (head_dim, scale, impl))

    # Products with weights and shared prompts are one matrix product per head, so heads come first around the core.
    # Scaled first: unscaled scores of 16 bits would overflow where scaled ones do not.
    query = (q * scale).unflatten(1, (num_heads, head_dim)).transpose(0, 1)
    absorbed = torch.bmm(query, k_weight.unflatten(0, (num_heads, head_dim))).transpose(0, 1)
    prompt_scores = prompt_v = None
    shared = prompt_kv is not None and prompt_kv.ndim == 2
    if prompt_kv is not None and prompt_kv.shape[-2]:
        prompt_k, prompt_v = prompt_kv.unflatten(-1, (2, num_heads, head_dim)).unbind(-3)
        if shared:
            prompt_scores = torch.bmm(query, prompt_k.permute(1, 2, 0)).transpose(0, 1)
        else:
            prompt_scores = torch.einsum("hbd,bphd->bhp", query, prompt_k)
        if norm_bias is not None:
            # The norm's shift adds one number to the scores of all tokens, so the prompts may have its negative.
            shift = (absorbed * norm_bias).sum(-1, keepdim=True)
            prompt_scores = (prompt_scores - shift).to(q.dtype)
        if columns is not None:
            prompt_scores = (prompt_scores + columns).to(q.dtype)
        if outside is not None:
            prompt_scores = prompt_scores.masked_fill(outside[:, None], float("-inf"))
    if norm_weight is not None:
        absorbed = (absorbed * norm_weight).to(q.dtype)

    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, absorbed, prompt_scores, bias)
    )
    inputs = (x, absorbed, prompt_scores, bias, float(eps))
    if plain and not keep and impl == "torch":  # without the copies that tell the outputs of an op apart
        mixed, prompt_weights, mass, _ = torch_impl.forward(*inputs)
    else:
        run: Callable[..., tuple[Tensor, ...]] = readout_attention_op
        if plain:
            run = direct_readout if keep else run_readout
        mixed, prompt_weights, mass, _, _ = run(*inputs, keep, impl)
    if norm_weight is not None:
        mixed = mixed * norm_weight
    if norm_bias is not None:
        mixed = mixed + mass[..., None] * norm_bias
    out = torch.bmm(mixed.to(q.dtype).transpose(0, 1), v_weight.unflatten(0, (num_heads, head_dim)).mT)
    if prompt_v is not None and shared:
        out = torch.baddbmm(out, prompt_weights.transpose(0, 1), prompt_v.transpose(0, 1))
    elif prompt_v is not None:
        out = out + torch.einsum("bhp,bphd->hbd", prompt_weights, prompt_v)
    if v_bias is not None:
        out = torch.addcmul(out, mass.mT[..., None], v_bias.unflatten(0, (num_heads, 1, head_dim)))
    return out.transpose(0, 1).flatten(1)


def _gather(
    x: Tensor, q: Tensor, pool: Tensor | None, ranges: Tensor | None, longest: int | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every image's rows of the pool, (B, longest, 2*H*D), their numbers, and which of them (B, longest) are beyond
    its range."""
    if ranges is None:
        raise ValueError(f"max_prompt_length must be None without prompt_ranges, got {longest}")
    if not isinstance(pool, Tensor) or pool.ndim != 2:
        found = tuple(pool.shape) if isinstance(pool, Tensor) else type(pool).__name__
        raise ValueError(f"prompt_kv must be a pool (S, 2*H*D) with prompt_ranges, got {found}")
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError(f"x must be (B, N, C), got {shape_of(x) if isinstance(x, Tensor) else type(x).__name__}")
    if bias is not None and bias.shape[-1] != x.shape[1]:
        raise ValueError(f"bias must be (H, N) = (H, {x.shape[1]}) with prompt_ranges, got {shape_of(bias)}")
    ranges = check_ranges(ranges, x.shape[0], pool.shape[0], longest, x.device, "x")
    assert longest is not None
    step = torch.arange(longest, device=ranges.device)
    start, length = ranges[:, :1], ranges[:, 1:]
    outside = step >= length
    rows = (start + step).masked_fill(outside, 0)
    if pool.shape[0] == 0:
        return pool.new_zeros(x.shape[0], longest, pool.shape[1]), rows, outside
    # what stands in row 0 is nobody's business where it is not read: it may be NaN
    return pool[rows].masked_fill(outside[..., None], 0), rows, outside


def _signature(
    tensors: tuple[Tensor | None, ...], num_heads: int, eps: float, scale: float | None, impl: str
) -> Hashable:
    """What equal calls have in common; None where options are of a type that would not tell them apart."""
    if type(num_heads) is not int or type(eps) is not float or type(scale) not in (float, int, type(None)):
        return None
    return (*map(signature, tensors), num_heads, eps, scale, impl)


def _check(named: dict[str, Tensor], num_heads: int, eps: float) -> int:
    """The head dimension, if the tensors fit each other."""
    x, q = named["x"], named["q"]
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be a positive int, got {num_heads!r}")
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite non-negative number, got {eps!r}")
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"x must be (B, N, C), got {shape_of(x)}")
    batch, tokens, width = x.shape
    if q.ndim != 2 or q.shape[0] != batch or q.shape[1] == 0 or q.shape[1] % num_heads:
        raise ValueError(f"q must be (B, H*D) with B = {batch}, H = num_heads = {num_heads}, got {shape_of(q)}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if x.dtype not in (q.dtype, torch.float32 if q.element_size() == 2 else q.dtype):
        wider = ", or float32 with 16-bit q" if q.element_size() == 2 else ""
        raise ValueError(f"x must have the dtype of q, {q.dtype}{wider}, got {x.dtype}")
    if x.stride(2) != 1:
        raise ValueError(f"x must have a unit last stride, got strides {tuple(x.stride())}")
    inner = q.shape[1]
    shapes: dict[str, tuple[int, ...]] = {"norm_weight": (width,), "norm_bias": (width,), "v_bias": (inner,)}
    shapes |= {"k_weight": (inner, width), "v_weight": (inner, width)}
    for name, t in named.items():
        if t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
        if name in shapes and shape_of(t) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {shape_of(t)}")
        if name in ("k_weight", "v_weight", "v_bias", "prompt_kv") and t.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {t.dtype}")
        if not t.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {t.dtype}")
    prompts = 0
    if "prompt_kv" in named:
        prompt_kv = named["prompt_kv"]
        per_image = prompt_kv.ndim == 3 and prompt_kv.shape[0] == batch
        if not (prompt_kv.ndim == 2 or per_image) or prompt_kv.shape[-1] != 2 * inner:
            raise ValueError(
                f"prompt_kv must be (P, 2*H*D) or (B, P, 2*H*D) with B = {batch}, 2*H*D = {2 * inner}, "
                f"got {shape_of(prompt_kv)}"
            )
        prompts = prompt_kv.shape[-2]
    if "bias" in named:
        allowed = [(num_heads, tokens), (num_heads, tokens + prompts)]
        if shape_of(named["bias"]) not in allowed:
            wanted = " or ".join(map(str, dict.fromkeys(allowed)))
            raise ValueError(f"bias must be {wanted} (H, N or N+P), got {shape_of(named['bias'])}")
    return inner // num_heads
