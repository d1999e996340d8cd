"""Bytes that launches of the read-out kernels move, as formulas of their arguments; see `vptm_kernels.aot.Traffic`.

Per image, with N tokens of C channels, H heads and `splits` programs that walk over the channels twice:

    split    N * (2 C + the first BLOCK_C for the centre) tokens  +  splits * H * C (query read, sums written)
    grad     N * 2 C tokens, the same stored  +  splits * H * C * (two or three operands, twice)  +  sums written
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..aot import Traffic

Arguments = Mapping[str, Any]


def _bytes(t: Any) -> int:
    return 0 if t is None else t.numel() * t.element_size()


def _split(a: Arguments) -> Traffic:
    x, w, part = a["x_ptr"], a["w_ptr"], a["part_ptr"]
    batch, tokens, width = x.shape
    kept = _bytes(part) + _bytes(a["statistics_ptr"]) + (_bytes(a["moments_ptr"]) if a["KEEP"] else 0)
    bias = a["H"] * tokens * a["bias_ptr"].element_size() if a["BIAS"] else 0
    centre = batch * tokens * min(a["BLOCK_C"], width) * x.element_size()
    cache = 2 * _bytes(x) + centre + a["splits"] * _bytes(w) + batch * bias + kept
    return Traffic(cache, _bytes(x) + _bytes(w) + bias + kept)


def _grad(a: Arguments) -> Traffic:
    x, w, g, mixed = a["x_ptr"], a["w_ptr"], a["g_ptr"], a["mixed_ptr"]
    batch, tokens, width = x.shape
    splits, again = a["splits"], a["OF_X"] or a["OF_W"]
    stored = (_bytes(a["dx_ptr"]) if a["OF_X"] else 0) + (_bytes(a["dw_ptr"]) if a["OF_W"] else 0)
    stored += batch * a["H"] * tokens * a["ds_ptr"].element_size() if a["OF_BIAS"] else 0
    prompts = _bytes(a["prompts_ptr"]) + _bytes(a["gp_ptr"])
    bias = a["H"] * a["bias_ptr"].shape[1] * a["bias_ptr"].element_size() if a["BIAS"] else 0
    centre = batch * tokens * min(a["BLOCK_C"], width) * x.element_size() if a["CENTRE"] else 0
    second = _bytes(x) + (splits * (_bytes(w) + _bytes(g)) if a["OF_X"] else 0) if again else 0
    once = _bytes(x) + prompts + _bytes(a["moments_ptr"]) + stored
    cache = once + centre + splits * (_bytes(w) + _bytes(g) + _bytes(mixed)) + second + batch * bias
    return Traffic(cache, once + _bytes(w) + _bytes(g) + _bytes(mixed) + bias)


KERNELS: dict[str, Callable[[Arguments], Traffic]] = {
    "readout_attention_split_kernel": _split,
    "readout_attention_grad_kernel": _grad,
}
