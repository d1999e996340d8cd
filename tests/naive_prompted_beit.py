"""A second, independent implementation of a prompted BEiT, one image and one attention row at a time.

Every row knows what it is ("class", "patch", "mask", "prompt") and where it stands; the bias of a pair of rows is
looked up from the two kinds by the written rule, with no index matrix and no reordering.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vptm import PromptedBEiT


@dataclass
class Row:
    kind: str
    value: Tensor
    place: int = 0  # patch number, or number of the prompt
    looks: Tensor | None = None  # (heads, rows), attention of the last block that ran


def _offset(table: Tensor, window: tuple[int, int], query: int, key: int) -> Tensor:
    height, width = window
    dy = query // width - key // width
    dx = query % width - key % width
    return table[(dy + height - 1) * (2 * width - 1) + dx + width - 1]


def pair_bias(table: Tensor, window: tuple[int, int], extra_bias: str, query: Row, key: Row) -> Tensor:
    """(H,) bias of one query row on one key row."""
    class_to_patch, patch_to_class, class_to_class = table[-3], table[-2], table[-1]
    zero = torch.zeros_like(class_to_class)
    kinds = (query.kind, key.kind)
    if kinds == ("patch", "patch"):
        return _offset(table, window, query.place, key.place)
    if kinds == ("class", "patch"):
        return class_to_patch
    if kinds == ("patch", "class"):
        return patch_to_class
    if kinds == ("class", "class"):
        return class_to_class
    if extra_bias.startswith("grid"):
        y, x = (int(part) for part in extra_bias[5:].split(","))
        spot = y * window[1] + x
        if "prompt" in kinds:
            return zero
        if kinds == ("mask", "mask"):
            return _offset(table, window, spot, spot)
        if query.kind == "mask":
            return patch_to_class if key.kind == "class" else _offset(table, window, spot, key.place)
        return class_to_patch if query.kind == "class" else _offset(table, window, query.place, spot)
    if extra_bias in ("zero", "learned"):
        return zero
    if extra_bias == "neutral" and kinds == ("class", "prompt"):
        return class_to_patch
    if key.kind == "patch":
        return class_to_patch
    if query.kind == "patch":
        return patch_to_class
    return class_to_class


def naive_block(
    model: PromptedBEiT, layer: int, rows: list[Row], learned: Tensor | None = None, crossing: Tensor | None = None
) -> None:
    """Run block `layer` on the rows of one image, in place; learned keys and values (P, 2C) stand beside theirs, and
    prompts (P, C) in a cross-attention after it."""
    backbone = model.backbone
    block = backbone.blocks[layer]
    attn = block.attn
    window = tuple(backbone.patch_embed.grid_size)
    heads = attn.num_heads
    width = model.num_features
    depth = width // heads
    gamma_1 = torch.ones(width) if block.gamma_1 is None else block.gamma_1
    gamma_2 = torch.ones(width) if block.gamma_2 is None else block.gamma_2
    normed = [F.layer_norm(row.value, (width,), block.norm1.weight, block.norm1.bias, block.norm1.eps) for row in rows]
    weight_q, weight_k, weight_v = attn.qkv.weight.split(width)
    keys = [weight_k @ x for x in normed]
    values = [weight_v @ x + attn.v_bias for x in normed]
    columns = list(rows)
    for place, pair in enumerate([] if learned is None else learned):
        columns.append(Row("prompt", pair, place))
        keys.append(pair[:width])
        values.append(pair[width:])
    tables = []
    if backbone.rel_pos_bias is not None:
        tables.append(backbone.rel_pos_bias.relative_position_bias_table)
    if attn.relative_position_bias_table is not None:
        tables.append(attn.relative_position_bias_table)
    outputs = []
    for i, query_row in enumerate(rows):
        query = weight_q @ normed[i] + attn.q_bias
        mixed, looks = [], []
        for h in range(heads):
            part = slice(h * depth, (h + 1) * depth)
            scores = []
            for j, key_row in enumerate(columns):
                score = query[part] @ keys[j][part] / depth**0.5
                for table in tables:
                    score = score + pair_bias(table, window, model.extra_bias, query_row, key_row)[h]
                if model.extra_bias == "learned" and key_row.kind == "prompt" and query_row.kind != "prompt":
                    which = 1 if query_row.kind == "patch" else 0
                    score = score + model.prompt_bias[layer, which, h, key_row.place]
                if model.config["prompt_gate"] is not None and key_row.kind == "prompt":
                    score = score + model.prompts.gate[layer, h, key_row.place]
                scores.append(score)
            weights = torch.stack(scores).softmax(0)
            looks.append(weights)
            mixed.append(sum(weight * value[part] for weight, value in zip(weights, values)))
        query_row.looks = torch.stack(looks)
        outputs.append(attn.proj.weight @ torch.cat(mixed) + attn.proj.bias)
    for row, update in zip(rows, outputs):
        row.value = row.value + gamma_1 * update
        if crossing is not None:
            query, mixed = weight_q @ row.value + attn.q_bias, []
            for h in range(heads):
                part = slice(h * depth, (h + 1) * depth)
                scores = [query[part] @ (weight_k @ prompt)[part] / depth**0.5 for prompt in crossing]
                shares = torch.stack(scores).softmax(0)
                mixed.append(sum(s * (weight_v @ p + attn.v_bias)[part] for s, p in zip(shares, crossing)))
            row.value = row.value + gamma_1 * (attn.proj.weight @ torch.cat(mixed) + attn.proj.bias)
        x = F.layer_norm(row.value, (width,), block.norm2.weight, block.norm2.bias, block.norm2.eps)
        mlp = block.mlp
        if hasattr(mlp, "fc1_g"):
            gate = mlp.fc1_g.weight @ x + mlp.fc1_g.bias
            x = gate / (1 + (-gate).exp()) * (mlp.fc1_x.weight @ x + mlp.fc1_x.bias)
        else:
            x = mlp.fc1.weight @ x + mlp.fc1.bias
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        if hasattr(mlp.norm, "weight"):
            x = F.layer_norm(x, x.shape, mlp.norm.weight, mlp.norm.bias, mlp.norm.eps)
        row.value = row.value + gamma_2 * (block.mlp.fc2.weight @ x + block.mlp.fc2.bias)


def naive_hidden(
    model: PromptedBEiT, image: Tensor, seen: list[Row] | None = None, location: str = "after_cls"
) -> Tensor:
    """Normalised read-out row (C,) of one image (channels, height, width), prompts and mask placed as `location` says;
    `seen` receives all rows as the last block leaves them."""
    config = model.config
    backbone = model.backbone
    window = tuple(backbone.patch_embed.grid_size)
    weight, bias = backbone.patch_embed.proj.weight, backbone.patch_embed.proj.bias
    size_y, size_x = weight.shape[2:]
    patches = []
    for y in range(window[0]):
        for x in range(window[1]):
            pixels = image[:, y * size_y : (y + 1) * size_y, x * size_x : (x + 1) * size_x]
            patches.append(Row("patch", weight.flatten(1) @ pixels.flatten() + bias, y * window[1] + x))
    spot = (window[0] // 2) * window[1] + window[1] // 2
    if config["extra_bias"].startswith("grid"):
        y, x = (int(part) for part in config["extra_bias"][5:].split(","))
        spot = y * window[1] + x
    if config["readout"] == "mask" and config["mask_mode"] == "replace":
        patches[spot].value = model.mask_token[0, 0]
    class_row = Row("class", backbone.cls_token[0, 0])
    mask_rows = []
    if config["readout"] == "mask" and config["mask_mode"] == "insert":
        mask_rows = [Row("mask", model.mask_token[0, 0])]
    if backbone.pos_embed is not None:
        position = backbone.pos_embed[0]
        class_row.value = class_row.value + position[0]
        for row in patches:
            row.value = row.value + position[1 + row.place]
        if mask_rows and config["extra_bias"].startswith("grid"):
            mask_rows[0].value = mask_rows[0].value + position[1 + spot]
    weight = model.prompts.weight
    kind = (config["prompt_options"] or {}).get("kind", "tokens")
    prompts = [] if kind != "tokens" else [Row("prompt", weight[0, p], p) for p in range(weight.shape[1])]
    order = {
        "after_cls": [class_row, *prompts, *mask_rows, *patches],
        "after_mask": [class_row, *mask_rows, *prompts, *patches],
        "before_mask": [class_row, *prompts, *patches, *mask_rows],
        "end": [class_row, *patches, *prompts, *mask_rows],
    }[location]
    for layer in range(len(backbone.blocks)):
        for row in prompts if layer else []:
            if config["prompt_mode"] == "deep":
                row.value = weight[layer, row.place]
            elif config["prompt_mode"] == "progressive":
                own = model.prompts.alpha
                alpha = config["progressive_alpha"] if own is None else own[layer - 1]
                row.value = alpha * row.value + (1 - alpha) * weight[layer, row.place]
        learned, crossing = (weight[layer] if kind == one else None for one in ("kv", "cross"))
        naive_block(model, layer, order, learned, crossing)
    if seen is not None:
        seen.extend(order)
    norm = backbone.norm if isinstance(backbone.norm, torch.nn.LayerNorm) else backbone.fc_norm

    def normalise(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape, norm.weight, norm.bias, norm.eps)

    if config["readout"] == "cls":
        return normalise(class_row.value)
    if config["readout"] == "mask":
        return normalise((mask_rows[0] if mask_rows else patches[spot]).value)
    if norm is backbone.fc_norm:
        return normalise(sum(row.value for row in patches) / len(patches))
    return sum(normalise(row.value) for row in patches) / len(patches)


def naive_logits(model: PromptedBEiT, hidden: Tensor) -> Tensor:
    """Class scores (K,) of one read-out row, for the prototypical verbalizer."""
    activation = model.config["token_activation"]
    read = hidden
    if activation != "hidden":
        read = model.lm_head.weight @ hidden + model.lm_head.bias
        if activation == "softmax":
            read = read.exp() / read.exp().sum()
        elif activation == "log_softmax":
            read = read - read.exp().sum().log()
    embedding = model.verbalizer.projection.weight @ read
    if model.verbalizer.projection.bias is not None:
        embedding = embedding + model.verbalizer.projection.bias
    return torch.stack(
        [
            embedding @ prototype / (embedding.norm() * prototype.norm()) / model.verbalizer.log_temperature[0].exp()
            for prototype in model.verbalizer.prototypes
        ]
    )
