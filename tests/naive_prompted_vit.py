"""A second, independent prompted ViT: prompts after the prefix rows, every row through every block, plain formulas.

It reads tensors by their state_dict names and knows no module of timm but its constants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vptm import PromptedViT


def norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    if f"{name}.weight" not in state:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def gelu(x: Tensor, kind: str) -> Tensor:
    if kind == "quick":
        return x / (1 + (-1.702 * x).exp())
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def mlp(x: Tensor, state: dict[str, Tensor], name: str, eps: float, kind: str) -> Tensor:
    """Two layers, or SwiGLU: of two linears, or of one that is twice as wide as what the last layer takes."""
    if f"{name}.fc1_g.weight" in state:
        gate, inner = linear(x, state, f"{name}.fc1_g"), linear(x, state, f"{name}.fc1_x")
    else:
        gate, inner = None, linear(x, state, f"{name}.fc1")
        if inner.shape[-1] == 2 * state[f"{name}.fc2.weight"].shape[1]:
            gate, inner = inner.chunk(2, -1)
    inner = gelu(inner, kind) if gate is None else gate / (1 + (-gate).exp()) * inner
    return linear(norm(inner, state, f"{name}.norm", eps), state, f"{name}.fc2")


def learned_heads(keys_values: Tensor, batch: int, heads: int, head: int) -> tuple[Tensor, Tensor]:
    """Learned keys and values (B, P, D) of one head, of (P, 2C)."""
    keys, values = keys_values[None].expand(batch, -1, -1).chunk(2, -1)
    return keys.chunk(heads, -1)[head], values.chunk(heads, -1)[head]


def crossed(
    x: Tensor,
    prompts: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    heads: int,
    after: Callable[[Tensor], Tensor],
) -> Tensor:
    """Rows (B, T, C) plus what they take from prompts (P, C), by weights and biases of queries, keys and values, and
    what comes `after` the heads."""
    query = x @ weights[0].T + biases[0]
    key, value = (prompts @ weight.T + bias for weight, bias in zip(weights[1:], biases[1:]))
    mixed = []
    for q, k, v in zip(*(one.chunk(heads, -1) for one in (query, key, value))):
        scores = (q @ k.T / q.shape[-1] ** 0.5).exp()
        mixed.append(scores / scores.sum(-1, keepdim=True) @ v)
    return x + after(torch.cat(mixed, -1))


def gates(model: PromptedViT, layer: int, first: int, rows: int, heads: int) -> list[Tensor]:
    """What each head adds to its scores with every row, of which those from `first` on are prompts, and then with
    learned keys."""
    found = [torch.zeros(rows, dtype=torch.float64) for _ in range(heads)]
    kind = (model.config["prompt_options"] or {}).get("kind")
    beside, length = kind == "kv", 0 if kind == "cross" else model.config["prompt_length"]
    for h in range(heads):
        if model.config["prompt_gate"] is None:
            own = torch.zeros(length, dtype=torch.float64)
        else:
            own = model.prompts.gate[layer, h]
        rest = found[h] if beside else found[h][length:]
        found[h] = torch.cat([rest, own]) if beside else torch.cat([rest[:first], own, rest[first:]])
    return found


def block(
    x: Tensor,
    state: dict[str, Tensor],
    name: str,
    heads: int,
    eps: float,
    kind: str,
    added: list[Tensor],
    keys_values: Tensor | None = None,
    crossing: Tensor | None = None,
) -> Tensor:
    batch, rows, width = x.shape
    qkv = linear(norm(x, state, f"{name}.norm1", eps), state, f"{name}.attn.qkv").view(batch, rows, 3, heads, -1)
    mixed = x.new_zeros(batch, rows, heads, width // heads)
    for h in range(heads):
        query, key, value = qkv[:, :, 0, h], qkv[:, :, 1, h], qkv[:, :, 2, h]
        query, key = (norm(one, state, f"{name}.attn.{which}_norm", eps) for one, which in ((query, "q"), (key, "k")))
        if keys_values is not None:
            more = learned_heads(keys_values, batch, heads, h)
            key, value = torch.cat([key, more[0]], 1), torch.cat([value, more[1]], 1)
        scores = (query @ key.mT / (width // heads) ** 0.5 + added[h]).exp()
        mixed[:, :, h] = scores / scores.sum(-1, keepdim=True) @ value
    update = linear(norm(mixed.flatten(2), state, f"{name}.attn.norm", eps), state, f"{name}.attn.proj")
    x = x + update * state.get(f"{name}.ls1.gamma", 1.0)
    if crossing is not None:
        weights = list(state[f"{name}.attn.qkv.weight"].chunk(3))
        biases = list(state.get(f"{name}.attn.qkv.bias", x.new_zeros(3 * width)).chunk(3))
        x = crossed(
            x,
            crossing,
            weights,
            biases,
            heads,
            lambda mixed: (
                linear(norm(mixed, state, f"{name}.attn.norm", eps), state, f"{name}.attn.proj")
                * state.get(f"{name}.ls1.gamma", 1.0)
            ),
        )
    inner = mlp(norm(x, state, f"{name}.norm2", eps), state, f"{name}.mlp", eps, kind)
    return x + inner * state.get(f"{name}.ls2.gamma", 1.0)


def pooled_by_attention(x: Tensor, state: dict[str, Tensor], heads: int, eps: float, kind: str) -> Tensor:
    """timm's AttentionPoolLatent with one latent row, head by head."""
    pool = {name.removeprefix("attn_pool."): value for name, value in state.items() if name.startswith("attn_pool.")}
    query = linear(pool["latent"][0, 0], pool, "q").view(heads, -1)
    key, value = linear(x, pool, "kv").view(*x.shape[:2], 2, heads, -1).unbind(2)
    mixed = []
    for h in range(heads):
        scores = (key[:, :, h] @ query[h] / query.shape[1] ** 0.5).exp()
        mixed.append((scores / scores.sum(1, keepdim=True))[:, None] @ value[:, :, h])
    out = linear(torch.cat(mixed, -1)[:, 0], pool, "proj")
    return out + linear(gelu(linear(norm(out, pool, "norm", eps), pool, "mlp.fc1"), kind), pool, "mlp.fc2")


def naive_hidden(
    model: PromptedViT,
    images: Tensor,
    *,
    heads: int,
    eps: float = 1e-6,
    kind: str = "erf",
    run: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The read-out row (B, C) that `model` should give for images (B, channels, height, width); `run(rows, state,
    layer, learned keys and values, prompts of a cross-attention)` is its block where it is none of a ViT."""
    state = dict(model.backbone.state_dict())
    config, prompts = model.config, model.prompts.weight
    weight = state["patch_embed.proj.weight"]
    side = weight.shape[-1]
    patches = images.unfold(2, side, side).unfold(3, side, side)  # (B, channels, rows, columns, side, side)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2) @ weight.flatten(1).T
    if "patch_embed.proj.bias" in state:
        patches = patches + state["patch_embed.proj.bias"]
    batch = len(images)
    rows, columns = model.backbone.patch_embed.grid_size
    centre = rows // 2 * columns + columns // 2
    if config["readout"] == "mask":
        patches = torch.cat([patches[:, :centre], model.mask_token.expand(batch, 1, -1), patches[:, centre + 1 :]], 1)
    prefix = [state[name].expand(batch, -1, -1) for name in ("cls_token", "dist_token", "reg_token") if name in state]
    prefix = torch.cat(prefix, 1) if prefix else patches[:, :0]
    first = prefix.shape[1]
    if "pos_embed" in state:
        position = state["pos_embed"]
        if position.shape[1] == patches.shape[1]:
            patches = patches + position
        else:
            prefix, patches = prefix + position[:, :first], patches + position[:, first:]
    prefix, patches = (norm(x, state, "norm_pre", eps) for x in (prefix, patches))
    length, options = config["prompt_length"], config["prompt_options"] or {}
    learned, crossing = (prompts if options.get("kind") == one else None for one in ("kv", "cross"))
    if learned is not None or crossing is not None:
        length, prompts = 0, patches.new_zeros(len(prompts), 0, patches.shape[-1])
    x = torch.cat([prefix, prompts[0].expand(batch, -1, -1), patches], 1)
    for layer in range(len(model.backbone.blocks)):
        if layer and config["prompt_mode"] != "shallow":
            alpha = config["progressive_alpha"] if config["prompt_mode"] == "progressive" else 0.0
            if model.prompts.alpha is not None:
                alpha = model.prompts.alpha[layer - 1]
            rows = alpha * x[:, first : first + length] + (1 - alpha) * prompts[layer]
            x = torch.cat([x[:, :first], rows, x[:, first + length :]], 1)
        own = [None if one is None else one[layer] for one in (learned, crossing)]
        if run is None:
            added = gates(model, layer, first, x.shape[1], heads)
            x = block(x, state, f"blocks.{layer}", heads, eps, kind, added, *own)
        else:
            x = run(x, state, layer, *own)
    x = norm(x, state, "norm", eps)
    if config["readout"] == "cls":
        read = x[:, 0]
    elif config["readout"] == "mask":
        read = x[:, first + length + centre]
    else:
        start = 0 if getattr(model.backbone, "pool_include_prefix", config["readout"] == "map") else first
        picked = [x[:, start:first], x[:, first + length :]]
        if config["readout"] == "mean_with_prompts":
            picked.append(x[:, first : first + length])
        rows = torch.cat(picked, 1)
        read = pooled_by_attention(rows, state, heads, eps, kind) if config["readout"] == "map" else rows.mean(1)
    return norm(read, state, "fc_norm", eps)
