"""Peers of a whole model: the eager form compiled, and Hugging Face transformers' own BEiT.

    runs |= compiled(lambda: concatenate(model, images))          # on a GPU; max-autotune when asked for by name
    runs |= {"transformers without prompts": hugging_face(images)}

A compiled form is the same function, so it is checked like the eager one. transformers' BEiT takes no prompts (its
position bias is tied to the number of patches): it stands beside timm without prompts, and is checked against itself in
float64 with eager attention.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench import timing

TRANSFORMERS = "transformers without prompts"
COMPILED = timing.compiled(lambda: None)
PEERS = {**COMPILED, TRANSFORMERS: timing.Peer(lambda: None, needs=("transformers",))}


def compiled(eager: Callable[[], Any], *, backend: str = "inductor") -> dict[str, Callable[[], Any]]:
    """`eager` in one graph, by mode; those that are here and were asked for."""
    return {name: timing.one_graph(eager, timing.MODES[name], backend) for name in timing.present(COMPILED)}


@cache
def _hugging_face(size: str) -> Any:
    """BEiT-B/16 or -L/16 at 224 with random weights, tables of position bias included."""
    from transformers import BeitConfig, BeitModel

    shapes = {"tiny": (32, 2, 2, 32), "base": (768, 12, 12, 224), "large": (1024, 24, 16, 224)}
    width, depth, heads, side = shapes[size]
    config = BeitConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=side,
        use_relative_position_bias=True,
        use_mean_pooling=False,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = BeitModel(config, add_pooling_layer=False)
    for name, parameter in model.named_parameters():
        if "table" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def hugging_face(images: Tensor, size: str = "base") -> Callable[[], Tensor]:
    """Features (B, C) of the class token by transformers' BEiT with its fused attention, in the dtype of `images`.

    Raises:
        ImportError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("needs the package transformers, which is not installed")
    model = copy.deepcopy(_hugging_face(size)).to(images.device, images.dtype)
    return lambda: model(images).last_hidden_state[:, 0]


def hugging_face_check(images: Tensor, tolerance: float, size: str = "base") -> timing.Check:
    """Whether a result is that of the same weights in float64 with attention spelled out, on the first two images."""
    exact = copy.deepcopy(_hugging_face(size)).double()
    exact.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = exact(images[:2].double().cpu()).last_hidden_state[:, 0]

    def check(name: str, found: Tensor) -> None:
        error = (found[:2].double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error <= tolerance, f"{name} differs from its own float64 by {error:.1e}"

    return check
