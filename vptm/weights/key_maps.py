"""What a checkpoint calls its tensors, by unilm, timm and Hugging Face, and the same under timm's names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from timm.models import clean_state_dict
from torch import Tensor

Name = TypeVar("Name", str, tuple[str, str])

# unilm and MAE; DeepSpeed; mmsegmentation, Lightning and MoCo; PyTorch's tutorials; loops by hand; DINO, whose teacher
# is what it evaluates, and its student; averages: they also nest
WRAPPERS = ("model", "module", "state_dict", "model_state_dict", "net", "teacher", "student", "ema")
_TRAINING_STATE = re.compile(
    r"optimizer|lr_scheduler|scheduler|scaler|epoch|iteration|step|args|meta|best_\w+|model_ema"
)
SURPLUS = re.compile(r"cls_pt_|head\.|decode_head\.|auxiliary_head\.|fpn\d\.")
"""Names that a backbone does not need: other heads, and the layers of BEiT v2 that help its class token to learn."""


_HUGGINGFACE_MARK = re.compile(r"(^|\.)embeddings\.patch_embedding(s|s\.projection)?\.")
_HF_MODEL = re.compile(
    r"(?:beit|data2vec_vision|vit|deit|dinov2|dinov2_with_registers|dinov3_vit|ijepa|vision_model)\."
)
_HF_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "encoder.relative_position_bias.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
    "encoder.relative_position_bias.relative_position_index": "rel_pos_bias.relative_position_index",
    "shared_position_bias.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
    "pooler.layernorm.weight": "fc_norm.weight",
    "pooler.layernorm.bias": "fc_norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
    "cls_classifier.weight": "head.weight",
    "cls_classifier.bias": "head.bias",
    "distillation_classifier.weight": "head_dist.weight",
    "distillation_classifier.bias": "head_dist.bias",
    "visual_projection.weight": "head.weight",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
    "pre_layrnorm.weight": "norm_pre.weight",  # transformers' own spelling
    "pre_layrnorm.bias": "norm_pre.bias",
    "head.probe": "attn_pool.latent",
    "head.attention.in_proj_weight": "attn_pool.in_proj_weight",
    "head.attention.in_proj_bias": "attn_pool.in_proj_bias",
    "head.attention.out_proj.weight": "attn_pool.proj.weight",
    "head.attention.out_proj.bias": "attn_pool.proj.bias",
    "head.layernorm.weight": "attn_pool.norm.weight",
    "head.layernorm.bias": "attn_pool.norm.bias",
    **{f"head.mlp.{fc}.{kind}": f"attn_pool.mlp.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")},
}
_HF_LAYER = re.compile(r"(?:encoder\.layers?|layers|(?:model\.)?layer)\.(\d+)\.(.+)")
_HF_QKV = re.compile(
    r"(?:attention\.(?:attention\.)?|self_attn\.)(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)"
)
_HF_LEAF = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(?:attention\.(?:attention\.)?)?relative_position_bias\.", "attn."),
        (r"(?:attention\.(?:output\.dense|o_proj)|self_attn\.out_proj)\.", "attn.proj."),
        (r"(?:layernorm_before|layer_norm1)\.", "norm1."),
        (r"(?:layernorm_after|layer_norm2)\.", "norm2."),
        (r"lambda_", "gamma_"),
        (r"layer_scale1\.lambda1", "ls1.gamma"),
        (r"layer_scale2\.lambda1", "ls2.gamma"),
        (r"mlp\.gate_proj\.", "mlp.fc1_g."),
        (r"mlp\.up_proj\.", "mlp.fc1_x."),
        (r"mlp\.down_proj\.", "mlp.fc2."),
        (r"mlp\.weights_in\.", "mlp.fc1."),
        (r"mlp\.weights_out\.", "mlp.fc2."),
        (r"(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
        (r"(?:output\.dense|mlp\.fc2)\.", "mlp.fc2."),
    )
)


def canonical_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a unilm, timm or Hugging Face (transformers 4 or 5 names) BEiT checkpoint under timm's names.

    Unwraps `model`, `module`, `state_dict`, `model_state_dict`, `net`, `teacher`, `student`, `ema` and the prefixes
    `module.`, `model.`, `backbone.`; joins query, key and value weights into `blocks.i.attn.qkv.weight` with `q_bias`
    and `v_bias`. Left out: `relative_position_index` buffers, and key biases, to which the softmax is invariant.
    `mask_token`, `lm_head.*`, `head.*`, `cls_pt_layers.*` and unknown names pass through; dtype and values do not
    change. Raises ValueError where two keys mean the same parameter or a block lacks its query, key or value.
    """
    tensors, _ = unwrap(state, "state dict")
    renamed = canonical_names(tensors, "state dict")
    return {k: v for k, v in renamed.items() if not is_index(k) and not k.endswith("attn.k_bias")}


def check_dense(value: Tensor, label: str) -> None:
    """Raise ValueError unless a tensor holds a value for each of its places, side by side.

    A few bytes can claim any shape, and every copy of it takes that much memory.
    """
    if value.is_meta or value.is_nested or value.layout is not torch.strided:
        kind = "a nested tensor" if value.is_nested else f"{value.layout} on {value.device.type}"
        raise ValueError(f"{label} must have dense values, got {kind}")
    stored = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > stored:
        raise ValueError(f"{label} must have a value for each of its {value.numel()} places, got {stored}")


def unwrap(state: Mapping[str, Any], label: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors inside wrappers and prefixes, and the names of the training state left behind."""
    dropped: list[str] = []
    seen = {id(state)}
    while inner := next((key for key in WRAPPERS if isinstance(state.get(key), Mapping)), None):
        dropped += [str(key) for key in state if key != inner]
        state = state[inner]
        if id(state) in seen:
            raise ValueError(f"{label}: must be a state dict, {inner!r} holds the mapping it stands in")
        seen.add(id(state))
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            if not _TRAINING_STATE.fullmatch(str(key)):
                raise ValueError(f"{label}: {key} must be a tensor, got a {type(value).__name__}")
            dropped.append(str(key))
            continue
        check_dense(value, f"{label}: {key}")
        _add(tensors, str(key), value, label)
    cleaned = clean_state_dict(tensors)  # of torch.compile and DistributedDataParallel
    if len(cleaned) < len(tensors):
        counts = Counter(next(iter(clean_state_dict({key: None}))) for key in tensors)
        raise ValueError(f"{label}: must have one {counts.most_common(1)[0][0]}, got two")
    stripped: dict[str, Tensor] = {}
    for key, value in cleaned.items():
        bare = key.removeprefix("model.").removeprefix("backbone.")  # Lightning's, mmsegmentation's
        _add(stripped, bare, value, label)
    return stripped, dropped


def tensor_names(state: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of a checkpoint, inside wrappers as well."""
    names = [str(key) for key, value in state.items() if isinstance(value, Tensor)]
    for key in WRAPPERS:
        if isinstance(inner := state.get(key), Mapping) and inner is not state:
            names += tensor_names(inner)
    return names


def canonical_names(tensors: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """timm's names; biases of queries, keys and values become `blocks.i.attn.q_bias`, `k_bias` and `v_bias`, index
    buffers stay."""
    if not is_huggingface(tensors):
        return dict(tensors)
    if {"layernorm.weight", "beit.layernorm.weight"} <= set(tensors):
        raise ValueError(
            f"{label}: must have one final norm, got layernorm and beit.layernorm "
            "(a masked-image model with use_mean_pooling=False)"
        )
    out: dict[str, Tensor] = {}
    qkv: dict[str, dict[tuple[str, str], Tensor]] = {}
    for full, value in tensors.items():
        key = _HF_MODEL.sub("", full, count=1) if _HF_MODEL.match(full) else full
        layer = _HF_LAYER.fullmatch(key)
        if layer is None:
            name = _HF_TOP.get(key, key)
            if key == "embeddings.class_embedding" or key == "embeddings.position_embedding.weight":  # CLIP's
                value = value.reshape(1, -1, value.shape[-1]) if value.ndim else value
            _add(out, name, value, label)
        elif part := _HF_QKV.fullmatch(layer[2]):
            _add(qkv.setdefault(layer[1], {}), (part[1][0], part[2]), value, label)
        else:
            leaf = next((p.sub(name, layer[2], count=1) for p, name in _HF_LEAF if p.match(layer[2])), layer[2])
            _add(out, f"blocks.{layer[1]}.{leaf}", value, label)
    for i, parts in qkv.items():
        lacking = [n for c, n in zip("qkv", ("query", "key", "value")) if (c, "weight") not in parts]
        if lacking:
            raise ValueError(
                f"{label}: block {i} must have query, key and value weights, got no {' and no '.join(lacking)}"
            )
        weights = [parts[c, "weight"] for c in "qkv"]
        if len({weight.shape for weight in weights}) > 1 or not weights[0].ndim:
            shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
            raise ValueError(f"{label}: block {i} must have query, key and value weights of one shape, got {shapes}")
        _add(out, f"blocks.{i}.attn.qkv.weight", torch.cat(weights), label)
        for c in "qkv":
            if (c, "bias") in parts:
                _add(out, f"blocks.{i}.attn.{c}_bias", parts[c, "bias"], label)
    return out


def is_huggingface(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of transformers."""
    return any(map(_HUGGINGFACE_MARK.search, tensors))


def is_index(key: str) -> bool:
    """Whether a name is that of unilm's stored index into the position table."""
    return key.endswith("relative_position_index")


def _add(out: dict[Name, Tensor], key: Name, value: Tensor, label: str) -> None:
    if key in out:
        name = key if isinstance(key, str) else " ".join(map(str, key))
        raise ValueError(f"{label}: must have one {name}, got two")
    out[key] = value
