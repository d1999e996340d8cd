"""The variants of the prompted_attention kernels that are compiled ahead of time, as models call them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from ..aot import Case
from .bias import table_rows
from .configs import ForwardConfig, forward_candidates

# Of queries that come scaled and prompts that are not pooled and do not attend, as the configs take it.
FOLDED = (False, False, False)


def _run(
    target: str,
    *,
    passes: str,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 197,
    prompts: int = 10,
    head_dim: int = 64,
    kind: str = "shared",
    bias: str = "aligned",
    heads: int = 12,
    learned: str = "qkv prompts",
    window: tuple[int, int] = (14, 14),
    scale: float | None = None,
    columns: bool = False,
    rotary: bool = False,
    form: ForwardConfig | None = None,
) -> None:
    """form: of the forward kernel instead of the table's, on targets that have it among their candidates."""
    from . import triton_impl

    if form is not None and form not in forward_candidates(target, 16, head_dim, tokens, tokens + prompts, 16, *FOLDED):
        return

    batch, width = 64, heads * head_dim
    qkv = torch.empty(batch, tokens, 3 * width, dtype=dtype)
    attend = "queries" in kind
    sections = 3 if attend else 2
    shape = {"none": None, "image": (batch, prompts, 2 * width), "pool": (4 * prompts, 2 * width)}
    shape["image queries"] = (batch, prompts, 3 * width)
    prompt_shape = shape.get(kind, (prompts, sections * width))
    given = None if prompt_shape is None or prompts == 0 else torch.empty(*prompt_shape, dtype=dtype)
    ranges = torch.zeros(batch, 2, dtype=torch.int32) if kind == "pool" else None
    data, ids = None, None
    if bias == "table":
        # A learned table in the type of master weights.
        data, ids = torch.empty(table_rows(window), heads), torch.zeros(tokens, dtype=torch.int32)
    elif bias == "aligned":
        # Frozen tables as models hold them: expanded once, in fp16.
        bias_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        data = torch.empty(heads, tokens, -(-tokens // 16) * 16, dtype=bias_dtype)[..., :tokens]
    elif bias == "columns":
        data = torch.empty(heads, tokens, tokens + prompts, dtype=torch.float32)
    values = torch.empty(heads, given.shape[-2]) if columns and given is not None else None
    angles = torch.empty(tokens, head_dim // 2) if rotary else None
    inputs: tuple[Any, ...] = (qkv, given, data, values, ids, ranges, angles, angles)
    options: tuple[Any, ...] = (window if bias == "table" else (), heads, attend)
    options += (prompts if ranges is not None else 0, head_dim**-0.5 if scale is None else scale)
    with ExitStack() as patches:
        patches.enter_context(patch.object(triton_impl, "architecture", lambda device: target))
        if form is not None:
            patches.enter_context(patch.object(triton_impl, "forward_config", lambda *args, **options: form))
        if passes == "forward":
            triton_impl.forward(*inputs, *(*options, True))
            return
        rows = tokens + (prompts if attend else 0)
        out = torch.empty(batch, rows, width, dtype=dtype)
        lse = torch.empty(batch, heads, rows)
        needs = ["qkv" in learned, "prompts" in learned and given is not None, "bias" in learned]
        needs.append("columns" in learned)
        triton_impl.backward(*(out, None, *inputs, out, lse, *options, needs))


def cases() -> Iterator[Case]:
    def case(name: str, ci: bool = False, precision: str = "highest", candidate: bool = False, **variant: Any) -> Case:
        return Case(f"prompted_attention/{name}", lambda target: _run(target, **variant), ci, precision, candidate)

    half, single = torch.float16, torch.float32
    for passes in ("forward", "backward"):
        yield case(f"{passes}-bf16-P10", True, passes=passes)
        yield case(f"{passes}-fp16-P10", True, passes=passes, dtype=half)
        yield case(f"{passes}-bf16-P0", passes=passes, prompts=0)
        yield case(f"{passes}-bf16-P50", True, passes=passes, prompts=50)
        yield case(f"{passes}-bf16-no-bias", True, passes=passes, bias="none")
        yield case(f"{passes}-bf16-P200", passes=passes, prompts=200)
        yield case(f"{passes}-bf16-queries", True, passes=passes, kind="queries")
        yield case(f"{passes}-fp16-queries", passes=passes, kind="queries", dtype=half)
        yield case(f"{passes}-bf16-pool", passes=passes, kind="pool", prompts=50)
        yield case(f"{passes}-bf16-image", passes=passes, kind="image")
        yield case(f"{passes}-bf16-prompt-columns", passes=passes, bias="columns")
        yield case(f"{passes}-bf16-N577", passes=passes, tokens=577)
        yield case(f"{passes}-fp32", passes=passes, dtype=single)
        # What full blocks leave is 15 keys above and 23 here, where a tail that is written out spills.
        yield case(f"{passes}-fp32-P50", passes=passes, dtype=single, prompts=50)
        yield case(f"{passes}-fp32-P50-folded", True, passes=passes, dtype=single, prompts=50, scale=1.0)
        yield case(f"{passes}-fp32-D16-folded", passes=passes, dtype=single, head_dim=16, scale=1.0)
        yield case(f"{passes}-fp32-D80-folded", passes=passes, dtype=single, head_dim=80, scale=1.0)
        yield case(f"{passes}-fp32-D128-folded", passes=passes, dtype=single, head_dim=128, scale=1.0)
        yield case(f"{passes}-tf32", passes=passes, dtype=single, precision="high")
        for head_dim in (16, 32, 48, 80, 96, 128):
            yield case(f"{passes}-bf16-D{head_dim}", passes=passes, head_dim=head_dim)
        # Models that fold D ** -0.5 into the weights of their queries.
        yield case(f"{passes}-bf16-P0-folded", True, passes=passes, prompts=0, scale=1.0)
        yield case(f"{passes}-bf16-P10-folded", passes == "forward", passes=passes, scale=1.0)
        yield case(f"{passes}-bf16-P50-folded", True, passes=passes, prompts=50, scale=1.0)
        yield case(f"{passes}-fp16-P50-folded", passes=passes, prompts=50, scale=1.0, dtype=half)
        yield case(f"{passes}-bf16-P20-folded", passes=passes, prompts=20, scale=1.0)
        # Two narrow blocks, of 32 and 16 keys, and of 64 and 16 in a pool.
        yield case(f"{passes}-bf16-P100-folded", True, passes=passes, prompts=100, scale=1.0)
        yield case(f"{passes}-bf16-pool-P100-folded", passes=passes, kind="pool", prompts=100, scale=1.0)
        yield case(f"{passes}-bf16-P50-no-bias-folded", passes=passes, prompts=50, scale=1.0, bias="none")
        yield case(f"{passes}-bf16-P200-folded", passes=passes, prompts=200, scale=1.0)
        yield case(f"{passes}-bf16-queries-folded", passes=passes, kind="queries", scale=1.0)
        yield case(f"{passes}-bf16-pool-folded", passes=passes, kind="pool", prompts=50, scale=1.0)
        yield case(f"{passes}-bf16-image-folded", passes=passes, kind="image", scale=1.0)
        yield case(f"{passes}-bf16-N577-folded", passes=passes, tokens=577, scale=1.0)
        for head_dim in (16, 32, 48, 80, 96, 128):
            yield case(f"{passes}-bf16-D{head_dim}-folded", passes=passes, head_dim=head_dim, scale=1.0)
        # Values of prompt columns: beside a bias, without one, in a pool, and where prompts attend.
        gated: dict[str, Any] = {"passes": passes, "columns": True, "learned": "qkv prompts columns", "prompts": 50}
        yield case(f"{passes}-bf16-P50-gated-folded", True, **gated, scale=1.0)
        yield case(f"{passes}-bf16-P50-gated", **gated)
        yield case(f"{passes}-bf16-P50-gated-no-bias", **gated, bias="none")
        yield case(f"{passes}-fp16-P200-gated-folded", **gated | {"prompts": 200, "dtype": half}, scale=1.0)
        yield case(f"{passes}-bf16-gated-queries", **gated, kind="queries")
        yield case(f"{passes}-bf16-gated-pool", **gated, kind="pool")
        # Prompts that are rows of every image, as a block of carried ones gives them.
        rows: dict[str, Any] = gated | {"kind": "image queries", "scale": 1.0}
        yield case(f"{passes}-bf16-gated-rows-folded", **rows)
        yield case(f"{passes}-bf16-gated-rows-no-bias-folded", **rows, bias="none")
        yield case(f"{passes}-fp32-gated-rows-folded", **rows, dtype=single)
        for head_dim in (16, 128):
            yield case(f"{passes}-bf16-D{head_dim}-gated-rows-folded", **rows, head_dim=head_dim)
        yield case(f"{passes}-fp32-gated", **gated, dtype=single)
        yield case(f"{passes}-fp32-D128-gated-folded", **gated, dtype=single, head_dim=128, scale=1.0)
        for head_dim in (16, 80, 128):
            yield case(f"{passes}-bf16-D{head_dim}-gated", **gated, head_dim=head_dim)
        # Rotary positions, whose models have no bias and fold the scale of scores into their queries.
        turned: dict[str, Any] = {"passes": passes, "rotary": True, "bias": "none", "scale": 1.0}
        yield case(f"{passes}-bf16-rotary-P100", True, **turned, prompts=100)
        yield case(f"{passes}-bf16-rotary-P50", **turned, prompts=50)
        yield case(f"{passes}-bf16-rotary-P0", **turned, prompts=0)
        yield case(f"{passes}-fp16-rotary-P50", **turned, prompts=50, dtype=half)
        yield case(f"{passes}-bf16-rotary-pool", **turned, prompts=50, kind="pool")
        yield case(f"{passes}-bf16-rotary-gated", **turned | gated)
        for head_dim in (16, 48, 80, 128):
            yield case(f"{passes}-bf16-rotary-D{head_dim}", **turned, prompts=50, head_dim=head_dim)
        # Turned by a pass of its own: in float32, where prompts attend, and beside a bias.
        yield case(f"{passes}-fp32-rotary", True, **turned, dtype=single)
        yield case(f"{passes}-bf16-rotary-queries", **turned, prompts=50, kind="queries")
        yield case(f"{passes}-bf16-rotary-bias", **turned | {"bias": "aligned", "head_dim": 80})
        yield case(f"{passes}-bf16-P100-no-bias-folded", passes=passes, prompts=100, scale=1.0, bias="none")
    yield case("backward-prompts-only", True, passes="backward", learned="prompts")
    yield case("backward-table", True, passes="backward", bias="table", learned="qkv prompts bias")
    yield case("backward-fp16-table", passes="backward", bias="table", learned="qkv prompts bias", dtype=half)
    yield case("backward-dense-bias", passes="backward", learned="qkv prompts bias")
    yield case("forward-table", passes="forward", bias="table")
    # 40 x 40 patches: the tile of a table would be larger than second-level caches, so kernels gather from the table.
    large: dict[str, Any] = {"bias": "table", "window": (40, 40), "tokens": 1601}
    yield case("forward-gathered", passes="forward", **large)
    yield case("forward-gathered-folded", passes="forward", scale=1.0, **large)
    yield case("backward-gathered", passes="backward", learned="qkv prompts bias", **large)
    for name, form in {
        "64-rows": ForwardConfig(64, 64, 4, 1),
        "128-rows": ForwardConfig(128, 64, 8, 1, max_registers=128),
        "two-stages": ForwardConfig(128, 64, 8, 2, max_registers=128),
        "heads-first": ForwardConfig(128, 64, 8, 1, max_registers=128, heads_first=True),
        "keys-resident": ForwardConfig(128, 64, 8, 1, max_registers=128, keys_resident=True),
        "keys-and-scores-resident": ForwardConfig(64, 64, 4, 1, scores_resident=True, keys_resident=True),
    }.items():
        yield case(f"candidate-{name}", candidate=True, passes="forward", prompts=50, scale=1.0, form=form)
