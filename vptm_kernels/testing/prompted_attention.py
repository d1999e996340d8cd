"""Random inputs of `prompted_attention`, by shape and kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..prompted_attention import RelativePositionBias
from ..prompted_attention.bias import table_rows
from ..prompted_attention.reference import prompted_attention_reference

PROMPTS = ("none", "shared", "image", "pool", "queries", "image queries")
BIASES = ("none", "dense", "dense4", "columns", "square", "table", "aligned")
ROTARIES = ("none", "shared", "heads")
COLUMNS = ("none", "columns", "heads")
LAYOUTS = ("contiguous", "sliced", "expanded", "unaligned")


@dataclass(frozen=True)
class AttentionCase:
    """One call of `prompted_attention`.

    prompts: "none", "shared", "image" (per image), "pool" (ranges into a pool, the first of them empty), "queries" or
        "image queries" (per image).
    bias: "none", "dense" (H, N, N), "dense4" (1, H, N, N), "columns" (H, N, N+P), "square" (H, N+P, N+P), "table"
        (shuffled ids, some without a position) or "aligned" (H, N, N) on aligned rows.
    columns: "none", "columns", a value for each head and prompt, or "heads", one for each head, expanded.
    rotary: "none", "shared" (N, D/2) or "heads" (H, N, D/2), angles of any size and a first row that is not turned.
    layout of qkv: "contiguous", "sliced" (from wider rows), "expanded" (one image for all), "unaligned" (odd offset).
    """

    batch: int = 2
    heads: int = 2
    tokens: int = 10
    prompt_length: int = 3
    head_dim: int = 16
    prompts: str = "shared"
    bias: str = "none"
    rotary: str = "none"
    columns: str = "none"
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float64
    window: tuple[int, int] | None = None
    scale: float | None = None
    seed: int = 0

    @property
    def valid(self) -> bool:
        has_prompts = self.prompts not in ("none", "pool")
        if self.batch == 0 and self.layout == "expanded":
            return False
        if self.columns != "none" and self.prompts == "none":
            return False
        return (self.bias != "columns" or has_prompts) and (self.bias != "square" or "queries" in self.prompts)

    def inputs(self, device: str = "cpu", requires_grad: bool = False) -> dict[str, Any]:
        """Keyword arguments of `prompted_attention`."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)
            return values.to(device).requires_grad_(requires_grad)

        heads, n, p, width = self.heads, self.tokens, self.prompt_length, self.heads * self.head_dim
        call: dict[str, Any] = {"qkv": self._lay_out(random, 3 * width), "num_heads": heads, "scale": self.scale}
        if self.prompts == "shared":
            call["prompt_kv"] = random(p, 2 * width)
        elif self.prompts == "image":
            call["prompt_kv"] = random(self.batch, p, 2 * width)
        elif "queries" in self.prompts:
            call["prompt_qkv"] = random(*([] if self.prompts == "queries" else [self.batch]), p, 3 * width)
        elif self.prompts == "pool":
            call["prompt_kv"] = random(p + 5, 2 * width)
            # Empty, whole and overlapping ranges.
            ranges = [(5, 0), (2, p), (3, max(0, p - 1)), (2, p)]
            call["prompt_ranges"] = (
                torch.tensor(ranges, dtype=torch.int32).repeat(self.batch, 1)[: self.batch].to(device)
            )
            call["max_prompt_length"] = p
        if self.bias == "table":
            window = self.window or (1, max(1, n - 1))
            places = window[0] * window[1] + 1
            ids = torch.arange(n) % places
            ids[n // 2 :: 5] = -1
            ids = ids[torch.randperm(n, generator=generator)].int().to(device)
            call["bias"] = RelativePositionBias(random(table_rows(window), heads), window, ids)
        elif self.bias == "aligned":
            padded = random(heads, n, -(-n // 16) * 16)
            call["bias"] = padded[..., :n]
        elif self.bias != "none":
            rows = n + p if self.bias == "square" else n
            columns = n + p if self.bias in ("columns", "square") else n
            call["bias"] = random(*([1] if self.bias == "dense4" else []), heads, rows, columns)
        if self.columns != "none":
            rows = p + 5 if self.prompts == "pool" else p
            call["prompt_column_bias"] = random(heads, rows if self.columns == "columns" else 1).expand(heads, rows)
        if self.rotary != "none":
            leading = (heads,) if self.rotary == "heads" else ()
            angles = 4 * torch.randn(*leading, n, self.head_dim // 2, generator=generator, dtype=torch.float64)
            angles[..., :1, :] = 0
            # 16-bit calls have tables of 32 bits, as models do
            exact = torch.promote_types(self.dtype, torch.float32)
            call["rotary"] = angles.cos().to(device, exact), angles.sin().to(device, exact)
        return call

    def _lay_out(self, random: Any, width: int) -> Tensor:
        if self.layout == "sliced":
            return random(self.batch, self.tokens, width + 8)[..., 4 : 4 + width]
        if self.layout == "expanded":
            return random(1, self.tokens, width).expand(self.batch, -1, -1)
        if self.layout == "unaligned":
            size = self.batch * self.tokens * width
            return random(size + 1)[1:].view(self.batch, self.tokens, width)
        return random(self.batch, self.tokens, width)

    def converted(self, call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The same values in another dtype, as fresh leaves."""

        def convert(value: Any) -> Any:
            if isinstance(value, RelativePositionBias):
                return value._replace(table=convert(value.table))
            if isinstance(value, tuple):  # tables of 32 bits stay so in a 16-bit call
                return tuple(t.to(torch.promote_types(dtype, torch.float32)) for t in value)
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(dtype).requires_grad_(value.requires_grad)
            return value

        return {name: convert(value) for name, value in call.items()}

    def with_dtype(self, dtype: torch.dtype) -> AttentionCase:
        return replace(self, dtype=dtype)


def differentiable(call: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call that gradients can reach, by name."""
    names = ("qkv", "prompt_kv", "prompt_qkv", "prompt_column_bias")
    found = {name: call[name] for name in names if call.get(name) is not None}
    bias = call.get("bias")
    if bias is not None:
        found["bias"] = bias.table if isinstance(bias, RelativePositionBias) else bias
    return found


def reference(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return prompted_attention_reference(**call)
