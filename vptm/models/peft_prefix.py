"""Files of PEFT's prefix tuning, in and out, without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from safetensors.torch import save

from vptm.weights.adapter_format import CONFIG_FILE, TENSORS_FILE
from vptm.weights.files import check_values, make_folder, one_line_errors, read_json, read_safetensors, write_atomically

if TYPE_CHECKING:
    from vptm.models.prompted_model import PromptedModel

_PREFIX, _TENSOR = "PREFIX_TUNING", "prompt_embeddings"


def load_peft_prefix(model: PromptedModel, folder: str | Path) -> None:
    """Take the keys and values that PEFT's prefix tuning learned as the prompts of a model.

    PEFT writes `prompt_embeddings` (P, L * 2 * C) into `adapter_model.safetensors`, also where it learned them through
    a projection: for each of L blocks the keys, then the values, each heads then channels. Only prompts are read; the
    head that was trained beside them is in no file of prefix tuning.

    Args:
        model: with `prompt_options={"kind": "kv"}` of every block, and as many prompts as the file has.
        folder: of `adapter_config.json` with peft_type "PREFIX_TUNING", and of `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: one of both files is not there.
        ValueError: a file of another method, or prompts of another number, depth, width or number of heads, or a model
            of other prompts; the prompts are then as they were.

    Example:
        >>> import tempfile
        >>> model = vptm.PromptedViT("vit_tiny_patch16_224", 3, prompt_options={"kind": "kv"}, img_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vptm.save_peft_prefix(model, folder)
        ...     vptm.load_peft_prefix(model, folder)
    """
    layers, heads, width = _sizes(model, "load_peft_prefix")
    folder = Path(folder)
    with one_line_errors(folder):
        for name in (CONFIG_FILE, TENSORS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} must hold {CONFIG_FILE} and {TENSORS_FILE}, {name} is missing")
        config = read_json(folder / CONFIG_FILE)
        if config.get("peft_type") != _PREFIX:
            raise ValueError(f"{folder / CONFIG_FILE} must have peft_type {_PREFIX!r}, got {config.get('peft_type')!r}")
        own: dict[str, Any] = {"num_attention_heads": heads, "num_transformer_submodules": 1}
        for name, wanted in own.items():
            if config.get(name) not in (None, wanted):
                raise ValueError(f"{folder / CONFIG_FILE} must have {name} {wanted}, the model's, got {config[name]!r}")
        tensors, _ = read_safetensors(folder / TENSORS_FILE)
        if _TENSOR not in tensors:
            raise ValueError(f"{folder / TENSORS_FILE} must hold {_TENSOR!r}, got {sorted(tensors)}")
        learned, weight = tensors[_TENSOR], model.prompts.weight
        check_values({_TENSOR: learned}, str(folder / TENSORS_FILE), dtype=weight.dtype)
        if learned.shape != (weight.shape[1], layers * 2 * width):
            raise ValueError(
                f"{folder / TENSORS_FILE} must hold {_TENSOR} (P, L * 2 * C) = "
                f"({weight.shape[1]}, {layers} * 2 * {width}) for this model, got {tuple(learned.shape)}"
            )
    with torch.no_grad():
        weight.copy_(rearrange(learned, "p (l two_c) -> l p two_c", l=layers))


def save_peft_prefix(model: PromptedModel, folder: str | Path) -> None:
    """Write a model's learned keys and values as PEFT's prefix tuning writes its own; the folder is made where missing.

    The verbalizer is not part of it: `vptm.save_adapter` keeps all that was learned.

    Raises:
        ValueError: a model whose prompts are no learned keys and values of every block, or not finite ones, or have
            gates or a position bias, for which such a file has no place.
        WriteError: an OSError that names the file that cannot be written.
    """
    layers, heads, width = _sizes(model, "save_peft_prefix")
    if model.prompts.gate is not None:
        start = model.config["prompt_gate"]
        raise ValueError(f"save_peft_prefix needs prompts without gates, which its files cannot hold, got {start!r}")
    if not model.extra_bias.startswith(("zero", "grid")):
        raise ValueError(
            "save_peft_prefix needs prompts without a position bias, which its files cannot hold, "
            f"got extra_bias={model.extra_bias!r}"
        )
    weight = model.prompts.weight.detach().cpu()
    check_values({"prompts.weight": weight})
    config = {
        "base_model_name_or_path": model.source,
        "encoder_hidden_size": width,
        "inference_mode": True,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": weight.shape[1],
        "peft_type": _PREFIX,
        "prefix_projection": False,
        "task_type": None,
        "token_dim": width,
    }
    folder = Path(folder)
    content = save({_TENSOR: rearrange(weight, "l p two_c -> p (l two_c)").contiguous()}, metadata={"format": "pt"})
    make_folder(folder)
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    write_atomically(folder / TENSORS_FILE, content)


def _sizes(model: PromptedModel, action: str) -> tuple[int, int, int]:
    """Blocks, heads and width of a model that has learned keys and values of its own in every block."""
    prompts, layers = model.prompts, len(model.backbone.blocks)
    if prompts.kind != "kv" or len(prompts.weight) != layers or prompts.length == 0:
        raise ValueError(
            f"{action} needs prompt_options={{'kind': 'kv'}} with prompts of its own in all {layers} blocks, "
            f"got {prompts.length} prompts of kind {prompts.kind!r} in {len(prompts.weight)}"
        )
    return layers, int(model.backbone.blocks[0].attn.num_heads), model.num_features
