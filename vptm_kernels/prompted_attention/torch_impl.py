"""The same algebra with PyTorch ops: the CPU path, and what runs where Triton cannot.

Forward is scaled_dot_product_attention on a bias with aligned rows. No concatenated keys and values are kept for
backward, which builds them again. On a CPU it is that kernel's own backward, given lse; where the bias or lse have
gradients, and on a GPU, it is written out and works on slices of the batch, so that score matrices stay small. On a CPU
that multiplies bfloat16, both passes of such tensors store the scores of one image at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._runtime.frozen_linear import multiplies_bfloat16
from .._runtime.private_torch import activation_gradients, cpu_attention, cpu_attention_backward
from .._runtime.sizes import accumulator
from .bias import ROW_ALIGNMENT, expand_table, reduce_to_table
from .rotary import turned

Angles = tuple[Tensor | None, Tensor | None]
"""Cosines and sines, or neither."""

# Backward holds about four score matrices of this many elements at a time.
_SCORES_PER_SLICE = 1 << 22


def forward(
    qkv: Tensor,
    prompts: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    token_ids: Tensor | None,
    ranges: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    window: Sequence[int],
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    rows = tokens + (prompts.shape[-2] if prompt_queries and prompts is not None else 0)
    out = qkv.new_empty(batch, rows if ranges is not None or batch == 0 else 0, width // 3)
    lse = qkv.new_empty((batch, num_heads, rows) if with_lse else (0,), dtype=accumulator(qkv.dtype))
    dense = _dense(bias, token_ids, window)
    # images whose prompts stand in other rows of a pool have other values of their columns
    by_length = None if columns is not None else ranges
    for images, chosen in _groups(batch, prompts, ranges, batch) if by_length is None else _lengths(by_length):
        own = None if prompts is None else prompts[chosen]
        values = columns if columns is None or ranges is None else columns[:, chosen]
        if not with_lse and products_are_faster(qkv):
            keys = tokens + (0 if own is None else own.shape[-2])
            bias_16 = _mask(dense, values, rows, keys, qkv.dtype)
            # a row that is masked as a whole would be NaN here
            if bias_16 is None or not _may_mask_a_row(bias_16):
                attended = _by_products(qkv[images], own, bias_16, (cos, sin), num_heads, prompt_queries, scale)
                if ranges is None:
                    out = attended
                else:
                    out[images] = attended
                continue
        q, k, v = _project(qkv[images], own, (cos, sin), num_heads, prompt_queries)
        mask = _mask(dense, values, rows, k.shape[2], _mask_type(q))
        if with_lse and cpu_attention is not None and _on_cpu(q):
            # called by name because only this form of scaled_dot_product_attention returns lse
            attended, found = cpu_attention(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
            if mask is not None and bool((found == 0).any()):
                # The kernel gives 0 for rows that are masked as a whole, and for others by chance.
                found = found.masked_fill((mask == float("-inf")).all(-1), float("-inf"))
            lse[images] = found
        else:
            with _backends(mask):
                attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
            if with_lse:
                lse[images] = _scores(q, k, dense, values, scale).logsumexp(-1)
        rows_first = attended.transpose(1, 2).flatten(2)
        if ranges is None:  # one group; attention wrote rows first already, so this is what it allocated
            out = rows_first.contiguous()
        else:
            out[images] = rows_first
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    prompts: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    token_ids: Tensor | None,
    ranges: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: Sequence[int],
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    batch, tokens, width = qkv.shape
    heads, head_dim = num_heads, width // (3 * num_heads)
    exact = accumulator(qkv.dtype)
    dense = _dense(bias, token_ids, window)
    dqkv = qkv.new_empty(qkv.shape) if needs[0] else None
    dprompts = torch.zeros(prompts.shape, dtype=exact, device=qkv.device) if needs[1] and prompts is not None else None
    ddense = torch.zeros(dense.shape, dtype=exact, device=qkv.device) if needs[2] and dense is not None else None
    dcolumns = torch.zeros_like(columns, dtype=exact) if needs[3] and columns is not None else None
    grad_out = grad_out.unflatten(2, (heads, head_dim)).transpose(1, 2)

    keys = tokens + (0 if prompts is None else max_prompt_length if ranges is not None else prompts.shape[-2])
    flash = lse.numel() > 0 and ddense is None and grad_lse is None and cpu_attention is not None and _on_cpu(grad_out)
    stored = lse.numel() == 0 and ddense is None and grad_lse is None and products_are_faster(grad_out)
    stored = stored and (dense is None or not _may_mask_a_row(dense))
    slice_size = batch if flash or stored else max(1, _SCORES_PER_SLICE // max(1, heads * keys * keys))
    for images, chosen in _groups(batch, prompts, ranges, slice_size):
        own = None if prompts is None else prompts[chosen]
        q, k, v = _project(qkv[images], own, (cos, sin), heads, prompt_queries)
        if q.shape[2] == 0:  # nobody attends
            continue
        values = columns if columns is None or ranges is None else columns[:, chosen]
        of_values = None if dcolumns is None else dcolumns if ranges is None else dcolumns[:, chosen]
        if stored:
            mask = _mask(dense, values, q.shape[2], k.shape[2], q.dtype)
            dq, dk, dv = _by_products_backward(grad_out[images], q, k, v, mask, scale, of_values)
        elif flash and cpu_attention_backward is not None:
            mask = _mask(dense, values, q.shape[2], k.shape[2], _mask_type(q))
            attended = out[images].unflatten(2, (heads, head_dim)).transpose(1, 2)
            shift = lse[images].masked_fill(lse[images] == float("-inf"), 0)
            dq, dk, dv = cpu_attention_backward(
                grad_out[images], q, k, v, attended, shift, 0.0, False, attn_mask=mask, scale=scale
            )
            if of_values is not None and mask is not None:
                of_values += _column_gradient(grad_out[images], q, k, v, attended, shift, mask, scale, tokens)
        else:
            scores = _scores(q, k, dense, values, scale)
            masked = scores.amax(-1, keepdim=True) == float("-inf")
            weights = scores.softmax(-1).masked_fill_(masked, 0)
            q, k, v, dout = (t.to(exact) for t in (q, k, v, grad_out[images]))
            dweights = dout @ v.mT
            dscores = dweights - (weights * dweights).sum(-1, keepdim=True)
            if grad_lse is not None:
                dscores += grad_lse[images][..., None]
            dscores *= weights
            dq, dk, dv = dscores @ k * scale, dscores.mT @ q * scale, weights.mT @ dout
            if ddense is not None:
                ddense += dscores[:, :, : ddense.shape[1], : ddense.shape[2]].sum(0)
            if of_values is not None:
                of_values += dscores[..., tokens:].sum((0, 2))
        if dqkv is not None:
            sections = dqkv.unflatten(2, (3, heads, head_dim))
            for i, part in enumerate((dq, dk, dv)):
                of_tokens = part[:, :, :tokens]
                if i < 2 and cos is not None and sin is not None:
                    of_tokens = turned(of_tokens, cos, sin, back=True)
                sections[images, :, i] = of_tokens.transpose(1, 2).to(dqkv.dtype)
        if dprompts is not None:
            parts = [dq, dk, dv] if prompt_queries else [dk, dv]
            sections = dprompts[chosen].unflatten(-1, (len(parts), heads, head_dim))
            for i, part in enumerate(parts):
                rows = part[:, :, tokens:].transpose(1, 2)
                sections[..., i, :, :] += rows if dprompts.ndim == 3 else rows.sum(0, dtype=exact)

    dbias = ddense
    if ddense is not None and bias is not None:
        dbias = (reduce_to_table(ddense, (window[0], window[1]), token_ids) if window else ddense).to(bias.dtype)
    if dcolumns is not None and columns is not None:
        dcolumns = dcolumns.to(columns.dtype)
    return dqkv, None if dprompts is None else dprompts.to(qkv.dtype), dbias, dcolumns


def _on_cpu(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.numel() > 0


def _lengths(ranges: Tensor) -> Iterator[tuple[slice | list[int], slice | Tensor]]:
    """(images, rows): images that have as many prompts, and where in the pool each one's stand: (images, length)."""
    members: dict[int, list[int]] = {}
    pairs = ranges.tolist()
    for image, (_, length) in enumerate(pairs):
        members.setdefault(length, []).append(image)
    for length, images in members.items():
        if len({pairs[image][0] for image in images}) == 1:
            start = pairs[images[0]][0]
            rows: slice | Tensor = slice(start, start + length)
        else:
            starts = torch.tensor([pairs[image][0] for image in images], device=ranges.device)
            rows = starts[:, None] + torch.arange(length, device=ranges.device)
        yield slice(None) if len(images) == len(pairs) else images, rows


def _groups(
    batch: int, prompts: Tensor | None, ranges: Tensor | None, at_most: int
) -> Iterator[tuple[slice | list[int], slice]]:
    """(images, rows): images that share their prompts, so many at a time, and where in `prompts` those stand."""
    if ranges is None:
        for first in range(0, batch, max(1, at_most)):
            images = slice(first, first + at_most)
            yield images, images if prompts is not None and prompts.ndim == 3 else slice(None)
        return
    users: dict[tuple[int, int], list[int]] = {}
    for image, (start, length) in enumerate(ranges.tolist()):
        users.setdefault((start, length), []).append(image)
    for (start, length), members in users.items():
        for first in range(0, len(members), at_most):
            yield members[first : first + at_most], slice(start, start + length)


def _project(
    qkv: Tensor, prompts: Tensor | None, rotary: Angles, heads: int, prompt_queries: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, rows, D), keys and values (B, H, keys, D), prompts last."""
    (batch, tokens, width), (cos, sin) = qkv.shape, rotary
    width //= 3
    split = (heads, width // heads)
    sections = qkv.unflatten(2, (3, *split)).permute(2, 0, 3, 1, 4)
    if cos is not None and sin is not None:
        # queries of prompts that do not attend have a place, so that keys and queries are turned at once, and no value
        length = 0 if prompts is None else prompts.shape[-2]
        joined = qkv.new_empty(batch, tokens + length, (2 if prompts is None else 3) * width)
        parts = joined.unflatten(2, (-1, *split)).permute(2, 0, 3, 1, 4)
        turned(sections[:2], cos, sin, out=parts[:2, :, :, :tokens])
        if prompts is None:
            return parts[0], parts[1], sections[2]
        joined[:, :tokens, 2 * width :] = qkv[..., 2 * width :]
        joined[:, tokens:, 3 * width - prompts.shape[-1] :] = prompts
        return parts[0] if prompt_queries else parts[0, :, :, :tokens], parts[1], parts[2]
    if prompts is None:
        return sections[0], sections[1], sections[2]
    # whole rows are copied, keys and values side by side: joining them head by head takes twice as long
    own = qkv if prompt_queries else qkv[..., width:]
    joined = qkv.new_empty(batch, tokens + prompts.shape[-2], own.shape[2])
    joined[:, :tokens] = own
    joined[:, tokens:] = prompts
    *q, k, v = joined.unflatten(2, (3 if prompt_queries else 2, *split)).permute(2, 0, 3, 1, 4)
    return q[0] if q else sections[0], k, v


def _dense(bias: Tensor | None, token_ids: Tensor | None, window: Sequence[int]) -> Tensor | None:
    if bias is None or not window:
        return bias
    return expand_table(bias, (window[0], window[1]), token_ids)


def _mask_type(q: Tensor) -> torch.dtype:
    """Of the bias for scaled_dot_product_attention, which on a CPU takes float32: finite values stay finite."""
    return torch.float32 if q.device.type == "cpu" and q.dtype in (torch.float16, torch.bfloat16) else q.dtype


def products_are_faster(qkv: Tensor) -> bool:
    """Whether scores of bfloat16 that are stored take less time than attention that does not store them, forward and
    backward; lse is no part of that."""
    return qkv.dtype == torch.bfloat16 and _on_cpu(qkv) and multiplies_bfloat16()


def _may_mask_a_row(bias: Tensor) -> bool:
    """Whether a row of the bias may be -inf as a whole. Most have a first column that is not, which is quickly read."""
    return not bool(bias[..., 0].isfinite().all()) and not bool(bias.amax(-1).isfinite().all())


def _by_products(
    qkv: Tensor,
    prompts: Tensor | None,
    bias: Tensor | None,
    rotary: Angles,
    heads: int,
    prompt_queries: bool,
    scale: float,
) -> Tensor:
    """softmax(q k^T * scale + bias) v with rows first, (B, rows, H * D), for one image after the other, whose scores
    stay in the cache. Keys and values are copied head by head, which products of bfloat16 would do by themselves."""
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * heads)
    sections = qkv.unflatten(2, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)
    cos, sin = rotary
    parts = 3 if prompt_queries and prompts is not None else 2
    length = 0 if prompts is None else prompts.shape[-2]
    joined = qkv.new_empty(parts, heads, tokens + length, head_dim)
    given = None if prompts is None else prompts.unflatten(-1, (parts, heads, head_dim)).movedim(-4, -2)
    out = qkv.new_empty(batch, tokens + (length if parts == 3 else 0), heads, head_dim)
    for i in range(batch):
        if cos is not None and sin is not None:
            q = turned(sections[0, i], cos, sin, out=None if parts == 2 else joined[0, :, :tokens])
            turned(sections[1, i], cos, sin, out=joined[-2, :, :tokens])
            joined[-1, :, :tokens] = sections[2, i]
        else:
            q = sections[0, i]
            joined[:, :, :tokens] = sections[3 - parts :, i]
        if given is not None and (i == 0 or given.ndim == 5):
            joined[:, :, tokens:] = given if given.ndim == 4 else given[i]
        q = joined[0] if parts == 3 else q
        k, v = joined[-2], joined[-1]
        out[i] = torch.bmm(_weights(q, k, bias, scale), v).transpose(0, 1)
    return out.flatten(2)


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Of one image, (H, rows, keys)."""
    if bias is None:
        return torch.bmm(q, k.mT).mul_(scale).softmax(-1)
    return torch.baddbmm(bias[0], q, k.mT, alpha=scale).softmax(-1)


def _by_products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, of_values: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, (B, H, rows or keys, D), from that of the output, as `_by_products` computes that; that
    of values of the last P columns is added to of_values (H, P)."""
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    for i in range(q.shape[0]):
        # each enters two or three products, which would copy it each time
        own_q, own_k, own_v, dout = (t[i].contiguous() for t in (q, k, v, grad))
        weights = _weights(own_q, own_k, bias, scale)
        dv[i] = torch.bmm(weights.mT, dout)
        dscores = _softmax_gradient(torch.bmm(dout, own_v.mT), weights)
        if of_values is not None:
            of_values += dscores[..., dscores.shape[-1] - of_values.shape[1] :].sum(1, dtype=of_values.dtype)
        dq[i] = torch.bmm(dscores, own_k)
        dk[i] = torch.bmm(dscores.mT, own_q)
    return (dq, dk, dv) if scale == 1 else (dq.mul_(scale), dk.mul_(scale), dv)


def _softmax_gradient(grad: Tensor, weights: Tensor) -> Tensor:
    if "softmax" in activation_gradients:
        found: Tensor = activation_gradients["softmax"](grad, weights, -1, weights.dtype)
        return found
    return (grad - (weights * grad).sum(-1, keepdim=True)) * weights


def _column_gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
    tokens: int,
) -> Tensor:
    """(H, P) gradient of values of the columns from `tokens` on, in which all (B, H, rows) have a part: their own
    scores again, image by image, as flash attention gives no gradient of its mask."""
    exact = accumulator(q.dtype)
    total = torch.zeros(q.shape[1], k.shape[2] - tokens, dtype=exact, device=q.device)
    for i in range(q.shape[0]):
        own_q, dout, attended = (t[i].to(exact) for t in (q, grad, out))
        own_k, own_v = (t[i, :, tokens:].to(exact) for t in (k, v))
        weights = torch.baddbmm(mask[0, ..., tokens:].to(exact), own_q, own_k.mT, alpha=scale)
        weights = weights.sub_(lse[i][..., None]).exp_()
        delta = (dout * attended).sum(-1, keepdim=True)
        total += (torch.bmm(dout, own_v.mT) - delta).mul_(weights).sum(1)
    return total


def _mask(dense: Tensor | None, values: Tensor | None, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """(1, H, rows, columns) bias on aligned rows, zero where the dense one does not reach, plus values (H, P) of the
    last columns; of one row where there are only those."""
    width = -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    if values is not None:
        rows = rows if dense is not None else 1
        if dense is None:
            dense = values.new_zeros(values.shape[0], 1, columns)
        wide = torch.promote_types(torch.promote_types(dense.dtype, values.dtype), dtype)
        wider = dense.new_zeros(dense.shape[0], rows, width, dtype=wide)[..., :columns]
        wider[:, : dense.shape[1], : dense.shape[2]] = dense
        wider[..., columns - values.shape[1] :] += values[:, None]
        dense = wider
    if dense is None:
        return None
    complete = dense.shape[1:] == (rows, columns) and dense.dtype == dtype
    if complete and dense.stride(2) == 1 and dense.stride(1) % ROW_ALIGNMENT == 0:
        return dense[None]
    if dtype == torch.float16:
        dense = torch.where(dense == float("-inf"), dense, dense.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max))
    mask = torch.empty(1, dense.shape[0], rows, width, dtype=dtype, device=dense.device)
    mask[0, :, : dense.shape[1], : dense.shape[2]] = dense
    mask[0, :, : dense.shape[1], dense.shape[2] :] = 0
    mask[0, :, dense.shape[1] :] = 0
    return mask[..., :columns]


def _backends(mask: Tensor | None) -> AbstractContextManager[object]:
    """cuDNN 9.15 to 9.25 reads a float32 mask as bfloat16 on Hopper, so it is kept from calls that have one."""
    if mask is None or not mask.is_cuda:
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _scores(q: Tensor, k: Tensor, dense: Tensor | None, values: Tensor | None, scale: float) -> Tensor:
    exact = accumulator(q.dtype)
    scores = q.to(exact) @ k.to(exact).mT * scale
    if dense is not None:
        scores[:, :, : dense.shape[1], : dense.shape[2]] += dense
    if values is not None:
        scores[..., scores.shape[-1] - values.shape[1] :] += values[:, None]
    return scores
