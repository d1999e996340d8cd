"""An independent prompted Eva (EVA-02, DINOv3, Perception Encoder): plain formulas, rotary positions as products of
complex numbers, prompts between the prefix and the patches."""

from __future__ import annotations

import torch
from naive_prompted_vit import crossed, gates, learned_heads, linear, mlp, naive_hidden, norm
from torch import Tensor

from vptm import PromptedViT


def turned(x: Tensor, turns: Tensor, half: bool) -> Tensor:
    """(B, N, D), its pairs of channels as complex numbers times (N, D / 2) of them."""
    first, second = x.chunk(2, -1) if half else (x[..., 0::2], x[..., 1::2])
    product = torch.complex(first, second) * turns
    pairs = [product.real, product.imag]
    return torch.cat(pairs, -1) if half else torch.stack(pairs, -1).flatten(-2)


def naive_eva_hidden(model: PromptedViT, images: Tensor, *, heads: int, eps: float = 1e-6) -> Tensor:
    """The read-out row (B, C) that `model` should give for images (B, channels, height, width)."""
    backbone = model.backbone
    tokens = (model.config["prompt_options"] or {}).get("kind", "tokens") == "tokens"
    first = backbone.num_prefix_tokens + (model.config["prompt_length"] if tokens else 0)  # of the patches
    half = bool(getattr(backbone.blocks[0].attn, "rotate_half", False))
    embedding, turns = backbone._pos_embed(backbone.patch_embed(images))[1], None
    if embedding is not None:
        sines, cosines = (
            one[..., : one.shape[-1] // 2] if half else one[..., 0::2] for one in embedding.double().chunk(2, -1)
        )
        turns = torch.complex(cosines, sines)

    def run(
        x: Tensor, state: dict[str, Tensor], layer: int, keys_values: Tensor | None, crossing: Tensor | None
    ) -> Tensor:
        name = f"blocks.{layer}"
        post = type(backbone.blocks[0]).__name__ == "EvaBlockPostNorm"
        inner = x if post else norm(x, state, f"{name}.norm1", eps)
        if f"{name}.attn.qkv.weight" in state:
            query, key, value = linear(inner, state, f"{name}.attn.qkv").chunk(3, -1)
            if f"{name}.attn.q_bias" in state:
                query, value = query + state[f"{name}.attn.q_bias"], value + state[f"{name}.attn.v_bias"]
        else:
            query, key, value = (linear(inner, state, f"{name}.attn.{one}_proj") for one in "qkv")
        added = gates(model, layer, backbone.num_prefix_tokens, x.shape[1], heads)
        mixed = []
        for h, (q, k, v) in enumerate(zip(*(one.chunk(heads, -1) for one in (query, key, value)))):
            if turns is not None:
                own = turns[layer, h] if turns.ndim == 4 else turns
                q, k = (torch.cat([one[:, :first], turned(one[:, first:], own, half)], 1) for one in (q, k))
            if keys_values is not None:
                more = learned_heads(keys_values, len(x), heads, h)
                k, v = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1)
            scores = (q @ k.mT / q.shape[-1] ** 0.5 + added[h]).exp()
            mixed.append(scores / scores.sum(-1, keepdim=True) @ v)
        update = linear(norm(torch.cat(mixed, -1), state, f"{name}.attn.norm", eps), state, f"{name}.attn.proj")
        if post:
            x = x + norm(update, state, f"{name}.norm1", eps)
        else:
            x = x + update * state.get(f"{name}.gamma_1", 1.0)
        if crossing is not None:
            zero = x.new_zeros(x.shape[-1])
            fused = f"{name}.attn.qkv.weight" in state
            weights = list(state[f"{name}.attn.qkv.weight"].chunk(3)) if fused else []
            biases = list(state.get(f"{name}.attn.qkv.bias", x.new_zeros(3 * len(zero))).chunk(3))
            if not fused:
                weights = [state[f"{name}.attn.{one}_proj.weight"] for one in "qkv"]
                biases = [state.get(f"{name}.attn.{one}_proj.bias", zero) for one in "qkv"]
            elif f"{name}.attn.q_bias" in state:
                biases = [state[f"{name}.attn.q_bias"], zero, state[f"{name}.attn.v_bias"]]
            scale = state.get(f"{name}.gamma_1", 1.0)

            def after(mixed: Tensor) -> Tensor:
                return scale * linear(norm(mixed, state, f"{name}.attn.norm", eps), state, f"{name}.attn.proj")

            x = crossed(x, crossing, weights, biases, heads, after)
        inner = x if post else norm(x, state, f"{name}.norm2", eps)
        update = mlp(inner, state, f"{name}.mlp", eps, "erf")
        if post:
            return x + norm(update, state, f"{name}.norm2", eps)
        return x + update * state.get(f"{name}.gamma_2", 1.0)

    return naive_hidden(model, images, heads=heads, eps=eps, run=run)
