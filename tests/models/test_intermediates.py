"""Rows after blocks and attention maps, with prompts at work: timm's forms, and formulas of their own."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from beit_factory import tiny_beit
from naive_prompted_vit import linear, naive_hidden, norm
from timm.models.vision_transformer import ParallelThingsBlock
from tiny_models import HEADS, build, build_vit, images, pictures, relative_error, tiny_vit
from torch import Tensor, nn

MODES = ("shallow", "deep", "progressive")
# what timm's method takes, as the forms of what it gives depend on it
FORMS: list[dict[str, Any]] = [
    {},
    {"indices": 2, "norm": True},
    {"indices": [0, -1], "output_fmt": "NLC", "return_prefix_tokens": True},
    {"indices": [1], "stop_early": True},
    {"indices": [-2, 0], "intermediates_only": True, "stop_early": True, "return_prefix_tokens": True},
    {"indices": 1, "output_dict": True, "return_prefix_tokens": True, "norm": True},
    {"output_dict": True, "intermediates_only": True, "output_fmt": "NLC"},
]


def flat(value: Any) -> list[tuple[str, Tensor]]:
    """Tensors with where they stand."""
    if isinstance(value, Tensor):
        return [("", value)]
    found = value.items() if isinstance(value, dict) else enumerate(value)
    kind = type(value).__name__
    return [(f"{kind} {key}.{place}", tensor) for key, one in found for place, tensor in flat(one)]


@pytest.mark.parametrize("family", ["ViT", "ViT with registers", "ViT without prefix", "BEiT", "unfolded"])
def test_without_prompts_the_forms_are_timms(family: str) -> None:
    """Every form of timm's method, the same tensors in the same places: what reads timm's features reads these."""
    options: dict[str, Any] = {"ViT with registers": {"reg_tokens": 2}, "unfolded": {"qk_norm": True}}.get(family, {})
    if family == "ViT without prefix":
        options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    source = tiny_beit() if family == "BEiT" else tiny_vit(**options)
    twin = copy.deepcopy(source).double()
    if family == "BEiT":
        model: Any = build(source, readout="cls", verbalizer="linear", token_activation="hidden", prompt_length=0)
        batch = images(model)
    else:
        model = build_vit(source, prompt_length=0, readout="mean")
        batch = pictures(model)
    for form in FORMS:
        if family == "BEiT" and "output_dict" in form:
            continue  # timm's Beit has no such argument
        found, wanted = (
            flat(model.forward_intermediates(batch, **form)),
            flat(twin.forward_intermediates(batch, **form)),
        )
        assert [place for place, _ in found] == [place for place, _ in wanted], form
        for (place, one), (_, other) in zip(found, wanted):
            assert one.shape == other.shape and relative_error(one, other) <= 1e-12, (form, place)


@pytest.mark.parametrize("prompt_mode", MODES)
def test_with_prompts_each_block_is_the_end_of_a_shorter_model(prompt_mode: str) -> None:
    """Values and gradients of prompts after every block, on both paths, against plain formulas of the model cut there;
    fails if prompts miss a block, or a row that was given changes when the next block begins."""
    model = build_vit(prompt_mode=prompt_mode, progressive_alpha=0.3, prompt_length=4)
    batch, weight = pictures(model), model.prompts.weight
    for impl, readout in itertools.product(("torch", "reference"), ("cls", "mean")):
        model.impl = impl
        _, found = model.forward_intermediates(batch, output_fmt="NLC", return_prefix_tokens=True)
        for layer, (patches, prefix) in enumerate(found):
            cut = copy.deepcopy(model)
            cut.backbone.blocks, cut.backbone.norm = cut.backbone.blocks[: layer + 1], nn.Identity()
            cut.config["readout"] = readout
            cut.prompts.weight = nn.Parameter(weight.detach()[: layer + 1].clone())
            wanted = naive_hidden(cut, batch, heads=HEADS)
            read = prefix[:, 0] if readout == "cls" else patches.mean(1)
            assert relative_error(read, wanted) <= 1e-12, (impl, readout, layer)
            (gradient,) = torch.autograd.grad(wanted.square().sum(), cut.prompts.weight)
            (given,) = torch.autograd.grad(read.square().sum(), weight, retain_graph=True)
            assert relative_error(given[: layer + 1], gradient) <= 1e-10, (impl, readout, layer)


def test_added_prompts_and_mask_rows() -> None:
    """Prompts that are added to patches change them in place in the next block; a mask row is among no map."""
    model = build_vit(prompt_mode="deep", prompt_length=1, prompt_options={"placement": "add"})
    expected = {}
    for impl in ("reference", "torch"):
        model.impl = impl
        expected[impl] = model.forward_intermediates(pictures(model), intermediates_only=True)
    assert all(relative_error(*pair) <= 1e-12 for pair in zip(expected["torch"], expected["reference"]))
    masked = build(prompt_mode="deep")
    features, maps = masked.forward_intermediates(images(masked), output_fmt="NLC", norm=True)
    assert features.shape[1] == 1 + 6 + 1 and {one.shape[1] for one in maps} == {6}
    assert relative_error(maps[-1], features[:, 1:7]) <= 1e-12
    assert relative_error(features, masked.forward_features(images(masked))) <= 1e-12


@pytest.mark.parametrize("prompt_mode", MODES)
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "reg_tokens": 2}])
def test_attention_maps_are_those_of_plain_formulas(options: dict[str, Any], prompt_mode: str) -> None:
    """Queries of token rows over tokens and, last, prompts: fails on another order, scale, norm or block."""
    model = build_vit(tiny_vit(**options), prompt_mode=prompt_mode, prompt_length=4)
    batch, state = pictures(model), dict(model.backbone.state_dict())
    tokens = model.num_rows - 4
    maps = model.attention_maps(batch, indices=[0, -1])
    assert [one.shape for one in maps] == [(2, HEADS, tokens, tokens + 4)] * 2
    x = torch.cat([model.embed(batch), model.prompts.weight[0].expand(2, -1, -1)], 1)
    qkv = linear(norm(x, state, "blocks.0.norm1", 1e-6), state, "blocks.0.attn.qkv").view(2, tokens + 4, 3, HEADS, -1)
    query, key = (norm(qkv[:, :, k], state, f"blocks.0.attn.{'qk'[k]}_norm", 1e-6) for k in (0, 1))
    for head in range(HEADS):
        scores = (query[:, :tokens, head] @ key[:, :, head].mT / query.shape[-1] ** 0.5).exp()
        assert relative_error(maps[0][:, head], scores / scores.sum(-1, keepdim=True)) <= 1e-12
    assert relative_error(maps[1].sum(-1), torch.ones(2, HEADS, tokens, dtype=torch.float64)) <= 1e-12


def test_what_cannot_be_given_is_refused_in_one_line() -> None:
    model = build_vit()
    for indices, message in (
        (0, "indices must be 1 to 3 last blocks, got 0"),
        (4, "indices must be 1 to 3 last blocks, got 4"),
        ([3], r"indices must be integers in -3 \.\. 2, got \[3\]"),
        ([], "indices must be integers"),
        ("1", "indices must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(pictures(model), indices)
    with pytest.raises(ValueError, match="output_fmt must be one of NCHW, NLC, got 'NHWC'"):
        model.forward_intermediates(pictures(model), output_fmt="NHWC")
    odd = build_vit(tiny_vit(block_fn=ParallelThingsBlock))
    with pytest.raises(ValueError, match="attention maps need blocks of one Attention after another, got Parallel"):
        odd.attention_maps(pictures(odd))
    sealed = build_vit().freeze_for_inference()
    assert len(sealed.forward_intermediates(pictures(sealed), intermediates_only=True)) == 3
    with pytest.raises(RuntimeError, match=r"attention_maps\(\) needs the original weights"):
        sealed.attention_maps(pictures(sealed))
