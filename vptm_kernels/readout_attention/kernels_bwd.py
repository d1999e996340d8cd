"""Triton kernel of the backward pass: one program per split of an image, which walks over the channels twice.

With n_j the normalised token, a_hj its weight, g_h the gradient of the mixed token, and G_h = that of the weights' sum,

    da_hj = n_j . g_h + G_h      ds_hj = a_hj (da_hj - delta_h)      delta_h = sum over tokens and prompts of a da
    dw_h  = sum_j ds_hj n_j
    dn_j  = sum_h (ds_hj w_h + a_hj g_h)
    dx_j  = (dn_j - mean(dn_j) - n_j mean(dn_j n_j)) / std_j

where delta_h = g_h . mixed_h + ... needs the outputs only, and both means over channels are sums over heads of products
that the first walk has made, so dx_j takes no reduction of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_fwd import LOG2E, first_mean, load_chunk, prompt_logits


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
# a smaller last batch must not compile: strides of tensors that stand heads first count images
@triton.jit(do_not_specialize=["B", "stride_wb", "stride_wh", "stride_pb", "stride_ph", "stride_gb", "stride_gh"])
def readout_attention_grad_kernel(
    x_ptr, w_ptr, prompts_ptr, bias_ptr, g_ptr, gp_ptr, gm_ptr, mixed_ptr, lse_ptr, moments_ptr,
    dx_ptr, dw_ptr, dprompts_ptr, ds_ptr,
    B, N, P, columns, splits, stride_b, stride_n: tl.constexpr, stride_wb, stride_wh, stride_pb, stride_ph, stride_pp,
    stride_bias, stride_gb, stride_gh,
    C: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, BIAS: tl.constexpr, HAS_PROMPTS: tl.constexpr,
    PROMPT_BIAS: tl.constexpr, OF_X: tl.constexpr, OF_W: tl.constexpr, OF_PROMPTS: tl.constexpr, OF_BIAS: tl.constexpr,
    CENTRE: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x (B, N, C), w (B, H, C), prompts (B, H, P) scaled scores, bias (H, N or N + P); g (B, H, C), gp (B, H, P) and gm
    (B, H), gradients of mixed, of the prompts' weights and of the tokens' mass; mixed (B, H, C), lse (B, H), moments
    (2, B, N) -> dx (B, N, C), dw (splits, B, H, C): sums of one split each, dprompts (B, H, P), ds (B, H, columns):
    gradient of the bias per image. If only prompts are learned one program per image is launched, and computes delta.
    ALIGNED: strides of w and g are multiples of 16, which Triton does not look at."""
    if ALIGNED:
        # tl.multiple_of says nothing about an argument
        stride_wb, stride_wh = stride_wb // 16 * 16, stride_wh // 16 * 16
        stride_gb, stride_gh = stride_gb // 16 * 16, stride_gh // 16 * 16
    OF_TOKENS: tl.constexpr = OF_X or OF_W or OF_BIAS
    pid = tl.program_id(0)
    split = pid % splits
    b = (pid // splits).to(tl.int64)
    j = split * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(j, N - 1)
    h = tl.arange(0, HP)
    head = tl.minimum(h, H - 1)
    x_base = x_ptr + b * stride_b
    w_base = w_ptr + b * stride_wb
    g_base = g_ptr + b * stride_gb
    x_row = row.to(INDEX) * stride_n
    w_row = head.to(INDEX) * stride_wh
    g_row = head.to(INDEX) * stride_gh
    dtype = w_ptr.dtype.element_ty
    at_head = b * H + head
    lse = tl.load(lse_ptr + at_head)
    # +inf makes every weight of a fully masked head zero.
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    grad_mass = tl.load(gm_ptr + at_head).to(ACC)
    bias_row = bias_ptr
    if BIAS:
        bias_row = bias_ptr + head * stride_bias

    delta = grad_mass
    if HAS_PROMPTS:
        prompts = prompts_ptr + b * stride_pb
        for first in range(0, P, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            inside = (p < P)[None, :]
            t = prompt_logits(prompts, bias_row, p, N, P, stride_ph, stride_pp, head, PROMPT_BIAS, ACC)
            gp = tl.load(gp_ptr + at_head[:, None] * P + p[None, :], mask=inside, other=0.0).to(ACC)
            delta += tl.sum(tl.exp2(t * LOG2E - lse[:, None]) * (gp - grad_mass[:, None]), 1)

    mean = tl.load(moments_ptr + b * N + row)
    rstd = tl.load(moments_ptr + (B + b) * N + row)
    if CENTRE:
        centre = first_mean(x_base, x_row, C, EVEN, BLOCK_C, ACC)
    else:
        centre = tl.zeros((BLOCK_N,), ACC)
    w_sum = tl.zeros((HP,), ACC)
    g_sum = tl.zeros((HP,), ACC)
    u = tl.zeros((HP, BLOCK_N), ACC)
    v = tl.zeros((HP, BLOCK_N), ACC)
    for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = first + tl.arange(0, BLOCK_C)
        x = load_chunk(x_base, x_row, c, C, EVEN)
        w = load_chunk(w_base, w_row, c, C, EVEN)
        g = load_chunk(g_base, g_row, c, C, EVEN)
        mixed = load_chunk(mixed_ptr, at_head * C, c, C, EVEN)
        delta += tl.sum(g.to(ACC) * mixed.to(ACC), 1)
        if OF_TOKENS:
            w_sum += tl.sum(w.to(ACC), 1)
            g_sum += tl.sum(g.to(ACC), 1)
            if CENTRE:
                x = (x.to(ACC) - centre[:, None]).to(dtype)
            x = tl.trans(x)
            u = tl.dot(w, x, u, input_precision=PRECISION, out_dtype=ACC)
            v = tl.dot(g, x, v, input_precision=PRECISION, out_dtype=ACC)
    # Products with normalised tokens.
    offset = (mean - centre)[None, :]
    u = (u - w_sum[:, None] * offset) * rstd[None, :]
    v = (v - g_sum[:, None] * offset) * rstd[None, :]

    s = u
    if BIAS:
        s += tl.load(bias_row[:, None] + row[None, :]).to(ACC)
    live = (h < H)[:, None] & (j < N)[None, :]
    a = tl.where(live, tl.exp2(s * LOG2E - lse[:, None]), 0.0)
    ds = a * (v + (grad_mass - delta)[:, None])
    if OF_BIAS:
        tl.store(ds_ptr + (b * H + h[:, None]) * columns + j[None, :], ds, mask=live)

    if HAS_PROMPTS and (OF_PROMPTS or (OF_BIAS and PROMPT_BIAS)):
        if split == 0:
            for first in range(0, P, BLOCK_P):
                p = first + tl.arange(0, BLOCK_P)
                inside = (p < P)[None, :]
                t = prompt_logits(prompts, bias_row, p, N, P, stride_ph, stride_pp, head, PROMPT_BIAS, ACC)
                gp = tl.load(gp_ptr + at_head[:, None] * P + p[None, :], mask=inside, other=0.0).to(ACC)
                dt = tl.exp2(t * LOG2E - lse[:, None]) * (gp - delta[:, None])
                stored = (h < H)[:, None] & inside
                if OF_PROMPTS:
                    tl.store(dprompts_ptr + (b * H + h[:, None]) * P + p[None, :],
                             dt.to(dprompts_ptr.dtype.element_ty), mask=stored)
                if OF_BIAS and PROMPT_BIAS:
                    tl.store(ds_ptr + (b * H + h[:, None]) * columns + (N + p)[None, :], dt, mask=stored)

    if OF_X or OF_W:
        du = ds.to(dtype)
        a = a.to(dtype)
        # Of the rounded factors, so that dx keeps no part along the mean or the token itself.
        du_wide = du.to(ACC)
        a_wide = a.to(ACC)
        along_mean = tl.sum(du_wide * w_sum[:, None] + a_wide * g_sum[:, None], 0) * (1.0 / C)
        along_token = tl.sum(du_wide * u + a_wide * v, 0) * (1.0 / C)
        for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
            c = first + tl.arange(0, BLOCK_C)
            normed = (load_chunk(x_base, x_row, c, C, EVEN).to(ACC) - mean[:, None]) * rstd[:, None]
            inside = (c < C)[None, :]
            if OF_W:
                dw = tl.dot(du, normed.to(dtype), input_precision=PRECISION, out_dtype=ACC)
                out_w = dw_ptr + ((split.to(tl.int64) * B + b) * H + h[:, None]) * C
                tl.store(out_w + c[None, :], dw.to(dw_ptr.dtype.element_ty), mask=(h < H)[:, None] & inside)
            if OF_X:
                w = load_chunk(w_base, w_row, c, C, EVEN)
                g = load_chunk(g_base, g_row, c, C, EVEN)
                dn = tl.dot(tl.trans(du), w, input_precision=PRECISION, out_dtype=ACC)
                dn = tl.dot(tl.trans(a), g, dn, input_precision=PRECISION, out_dtype=ACC)
                dx = (dn - along_mean[:, None] - normed * along_token[:, None]) * rstd[:, None]
                out_x = dx_ptr + (b * N + j[:, None]) * C
                tl.store(out_x + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=(j < N)[:, None] & inside)
