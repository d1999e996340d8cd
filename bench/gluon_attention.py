"""An experiment: the attention forward in Gluon, keys and values resident in shared memory. No op uses it.

    python -m bench.gluon_attention            # compiles it for sm_90, or on one compares and times it

It has been compiled, with Triton 3.6 and 3.8, and NEVER BEEN EXECUTED: whether the wait for cp.async and the fence
before wgmma are enough is for a GPU to say, before any time is looked at.

Why it is here: `configs.ForwardConfig.keys_resident` reads half of the bytes of the streaming form, but plain Triton
must write out the loop over key blocks, and the descriptors and masks that no row changes take 75 to 80 registers. Here
the blocks of keys stand in one array of shared memory, with a run-time loop over them. It is worth a place among the
kernels if it beats the best form of `python -m bench.autotune` by more than a tenth.

For bfloat16, D = 64, sm_90, shared prompts, a bias on rows of a multiple of 16 fp16 elements, and scale 1.
"""

from __future__ import annotations

import argparse
import sys

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

BLOCK_M, BLOCK_N, NUM_WARPS = 128, 64, 8
HEAD_DIM = 64


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@gluon.jit
def _step(q, ks, vs, j, bias, valid, acc, l, m, MASK: gl.constexpr, DOT: gl.constexpr):
    """acc, l and m with one more block of keys, as `kernels_fwd._accumulate`."""
    s = warpgroup_mma(q, ks.index(j).permute((1, 0)), bias, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    if MASK:
        s = gl.where(valid, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * 1.4426950408889634)
    p = gl.exp2(s * 1.4426950408889634 - gl.expand_dims(m_new, 1))
    alpha = gl.exp2(m - m_new)
    l = l * alpha + gl.sum(p, 1)
    acc = acc * gl.expand_dims(alpha, 1)
    acc = warpgroup_mma(gl.convert_layout(p.to(gl.bfloat16), DOT), vs.index(j), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    return acc, l, m_new


@gluon.jit
def gluon_attention_kernel(qkv_ptr, prompt_ptr, bias_ptr, out_ptr, lse_ptr, N, P, stride_b, stride_th,
                  stride_n: gl.constexpr, stride_p: gl.constexpr, stride_tn: gl.constexpr,
                  H: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                  FULL: gl.constexpr, ROW_BLOCKS: gl.constexpr, WARPS: gl.constexpr):
    """One program per image and head: FULL blocks of tokens and one of the rest, tokens first, then prompts."""
    HD: gl.constexpr = H * D
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 64, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, WIDE)
    COLUMN: gl.constexpr = gl.SliceLayout(0, WIDE)
    MMA_ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    MMA_COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    pid = gl.program_id(0)
    h = pid % H
    b = (pid // H).to(gl.int64)
    ks = gl.allocate_shared_memory(gl.bfloat16, [FULL + 1, BLOCK_N, D], SHARED)
    vs = gl.allocate_shared_memory(gl.bfloat16, [FULL + 1, BLOCK_N, D], SHARED)
    q_shared = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, D], SHARED)
    tokens = qkv_ptr + b * stride_b + h * D
    keys = tokens + HD
    prompts = prompt_ptr + h * D
    d = gl.arange(0, D, COLUMN)
    n = gl.arange(0, BLOCK_N, ROW)
    at = gl.expand_dims(n * stride_n, 1) + gl.expand_dims(d, 0)
    for j in range(FULL):
        base = keys + j * BLOCK_N * stride_n
        async_copy.async_copy_global_to_shared(ks.index(j), base + at)
        async_copy.async_copy_global_to_shared(vs.index(j), base + HD + at)
    t = FULL * BLOCK_N + n
    prompt = gl.minimum(gl.maximum(t - N, 0), P - 1)
    row_ptr = gl.where(t < N, keys + gl.minimum(t, N - 1) * stride_n, prompts + prompt * stride_p)
    row_ptr = gl.multiple_of(row_ptr, 16)
    tail = gl.expand_dims(row_ptr, 1) + gl.expand_dims(d, 0)
    tail = gl.multiple_of(gl.max_contiguous(tail, [1, 64]), [1, 64])
    async_copy.async_copy_global_to_shared(ks.index(FULL), tail)
    async_copy.async_copy_global_to_shared(vs.index(FULL), tail + HD)
    async_copy.commit_group()
    r = gl.arange(0, BLOCK_M, ROW)
    r_mma = gl.arange(0, BLOCK_M, MMA_ROW)
    c = gl.arange(0, BLOCK_N, COLUMN)
    c_mma = FULL * BLOCK_N + gl.arange(0, BLOCK_N, MMA_COLUMN)
    bias_h = bias_ptr + h * stride_th
    for i in range(ROW_BLOCKS):
        row = gl.minimum(i * BLOCK_M + r, N - 1)
        q_shared.store(gl.load(tokens + (gl.expand_dims(row * stride_n, 1) + gl.expand_dims(d, 0))))
        async_copy.wait_group(0)
        fence_async_shared()
        acc = gl.zeros([BLOCK_M, D], gl.float32, MMA)
        l = gl.zeros([BLOCK_M], gl.float32, MMA_ROW)
        m = gl.full([BLOCK_M], -1e30, gl.float32, MMA_ROW)
        rows = gl.expand_dims(row * stride_tn, 1) + gl.expand_dims(c, 0)
        for j in range(FULL):
            bias = gl.convert_layout(gl.load(bias_h + j * BLOCK_N + rows), MMA).to(gl.float32)
            acc, l, m = _step(q_shared, ks, vs, j, bias, 0, acc, l, m, False, DOT)
        inside = gl.expand_dims(FULL * BLOCK_N + c < (N + 15) // 16 * 16, 0)
        bias = gl.convert_layout(gl.load(bias_h + FULL * BLOCK_N + rows, mask=inside, other=0.0), MMA)
        bias = gl.where(gl.expand_dims(c_mma < N, 0), bias, 0.0).to(gl.float32)
        acc, l, m = _step(q_shared, ks, vs, FULL, bias, gl.expand_dims(c_mma < N + P, 0), acc, l, m, True, DOT)
        out = gl.convert_layout((acc * gl.expand_dims(1.0 / l, 1)).to(gl.bfloat16), WIDE)
        out_row = i * BLOCK_M + r
        gl.store(out_ptr + (b * N * HD + h * D) + gl.expand_dims(out_row * HD, 1) + gl.expand_dims(d, 0), out,
                 mask=gl.expand_dims(out_row < N, 1))
        lse_row = i * BLOCK_M + r_mma
        gl.store(lse_ptr + (b * H + h) * N + lse_row, (m + gl.log2(l)) * 0.6931471805599453, mask=lse_row < N)
# fmt: on


def gluon_attention(qkv: Tensor, prompt_kv: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """(out, lse) of `prompted_attention(qkv, prompt_kv, num_heads=num_heads, bias=bias, scale=1.0, return_lse=True)`.

    Raises:
        ValueError: an argument is none that the kernel takes; the message names it.
    """
    batch, tokens, width = qkv.shape
    prompts, padded = prompt_kv.shape[0], -(-tokens // 16) * 16
    if qkv.dtype != torch.bfloat16 or width != 3 * num_heads * HEAD_DIM or not qkv.is_contiguous():
        raise ValueError(
            f"qkv must be contiguous (B, N, 3*{num_heads}*{HEAD_DIM}) bfloat16, got {tuple(qkv.shape)} {qkv.dtype}"
        )
    wanted = (prompts, 2 * num_heads * HEAD_DIM)
    if prompt_kv.dtype != qkv.dtype or tuple(prompt_kv.shape) != wanted or not prompt_kv.is_contiguous():
        raise ValueError(f"prompt_kv must be contiguous {wanted} bfloat16, got {tuple(prompt_kv.shape)}")
    if bias.dtype != torch.float16 or bias.shape[1:] != (tokens, tokens) or bias.stride(1) != padded:
        raise ValueError(
            f"bias must be (H, N, N) float16 on rows of {padded} elements, as RelativePositionBias.dense makes it, "
            f"got {tuple(bias.shape)} {bias.dtype} on rows of {bias.stride(1)}"
        )
    if not 0 < tokens % BLOCK_N + prompts <= BLOCK_N or prompts == 0:
        raise ValueError(
            f"prompt_kv must have from 1 to {BLOCK_N - tokens % BLOCK_N} rows for {tokens} tokens, got {prompts}"
        )
    out = qkv.new_empty(batch, tokens, width // 3)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32)
    gluon_attention_kernel[(batch * num_heads,)](
        *(qkv, prompt_kv, bias, out, lse, tokens, prompts, qkv.stride(0), bias.stride(0)),
        stride_n=qkv.stride(1),
        stride_p=prompt_kv.stride(0),
        stride_tn=bias.stride(1),
        H=num_heads,
        D=HEAD_DIM,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        FULL=tokens // BLOCK_N,
        ROW_BLOCKS=triton.cdiv(tokens, BLOCK_M),
        WARPS=NUM_WARPS,
        num_warps=NUM_WARPS,
        maxnreg=128,
    )
    return out, lse


def inputs(batch: int = 64, heads: int = 12, tokens: int = 197, prompts: int = 50, device: str = "cpu") -> list[Tensor]:
    """qkv, prompt_kv and bias of a BEiT-B block at 224 pixels, queries scaled."""
    width = heads * HEAD_DIM
    qkv = torch.randn(batch, tokens, 3 * width, device=device)
    qkv[..., :width] *= HEAD_DIM**-0.5
    bias = torch.randn(heads, tokens, -(-tokens // 16) * 16, device=device).half()[..., :tokens]
    return [qkv.bfloat16(), torch.randn(prompts, 2 * width, device=device).bfloat16(), bias]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gluon_attention", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        from vptm_kernels.aot import Case, compile_case

        # a small batch: nothing is executed, so only its strides count
        run = lambda target: gluon_attention(*inputs(2, options.heads), options.heads)  # noqa: E731
        [report] = compile_case(Case("gluon_attention", run), "sm90")
        print(report.row())
        return int(bool(report.error))
    if torch.cuda.get_device_capability()[0] != 9:
        print("this form is for sm_90 alone", file=sys.stderr)
        return 2
    from bench import timing
    from vptm_kernels import prompted_attention

    qkv, prompts, bias = inputs(options.batch, options.heads, device="cuda")

    def library() -> tuple[Tensor, Tensor]:
        return prompted_attention(
            qkv, prompts, num_heads=options.heads, bias=bias, scale=1.0, return_lse=True, impl="triton"
        )

    def experiment() -> tuple[Tensor, Tensor]:
        return gluon_attention(qkv, prompts, bias, options.heads)

    for name, ours, theirs in zip(("out", "lse"), experiment(), library(), strict=True):
        error = (ours.double() - theirs.double()).abs().max().item()
        print(f"{name}: largest difference to the library's kernel {error:.2e}")
        if not error <= 2e-2:
            print("the results differ, so times would mean nothing", file=sys.stderr)
            return 1
    forms = {"library": timing.captured(library), "gluon": timing.captured(experiment)}
    pair = timing.compare(forms, "library", check=None, clock=timing.clock_of("cuda", True), rounds=21)
    print(f"gluon {1e6 * pair.median('gluon'):.1f} us, library {1e6 * pair.median('library'):.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
