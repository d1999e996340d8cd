"""VIPAMIN's start against the words of its paper, image by image and prompt by prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import HEADS, build, build_vit, tiny_vit
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vptm
from vptm.methods.vipamin import outside_of
from vptm.settings import RunSettings


def loader_of(model: Any, count: int = 5) -> DataLoader[Any]:
    size = model.default_cfg["input_size"]
    pictures = torch.randn(count, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return DataLoader(TensorDataset(pictures, torch.zeros(count)), batch_size=2)


def drawn(loader: DataLoader[Any], images: int, seed: int) -> Tensor:
    import numpy as np

    return loader.dataset.tensors[0][np.random.default_rng(seed).integers(len(loader.dataset), size=images)]


@pytest.mark.parametrize("mode", ["shallow", "deep"])
def test_matched_prompts_are_means_of_the_patches_most_like_them(mode: str) -> None:
    """On a plain ViT, by its own blocks: keys with their bias, averaged over images and heads, alike by their cosine,
    and the patch rows that enter the block. Another row, another block's keys or the class row fail."""
    vit = tiny_vit((3, 4), depth=2)
    model = build_vit(vit, prompt_mode=mode, prompt_length=4)
    loader, images = loader_of(model), 6
    weight = model.prompts.weight.detach().clone()
    assert vptm.init_vipamin(model, loader, neighbours=3, orthogonal=0.0, images=images, seed=4, progress=False) == 6
    backbone, pictures = model.backbone, drawn(loader, images, 4)
    x = backbone._pos_embed(backbone.patch_embed(pictures))
    for layer, block in enumerate(backbone.blocks):
        fresh = weight[layer] if layer < len(weight) else None
        entering = x if fresh is None else torch.cat([x[:, :13], fresh.expand(images, -1, -1)], 1)
        if fresh is not None:
            keys = block.attn.qkv(block.norm1(entering))[..., 16:32].reshape(images, 17, HEADS, 8).mean((0, 2))
            patches, rows = keys[1:13], entering.mean(0)[1:13]
            for prompt in range(4):
                likeness = torch.stack([F.cosine_similarity(keys[13 + prompt], key, dim=0) for key in patches])
                expected = rows[likeness.argsort(descending=True)[:3]].mean(0)
                assert torch.allclose(model.prompts.weight[layer, prompt], expected, atol=1e-12), (layer, prompt)
        x = block(entering)


@pytest.mark.parametrize("kind", ["vit", "beit"])
def test_values_of_what_is_outside_are_orthogonal_to_what_heads_give(kind: str) -> None:
    """With orthogonal=1 no head of the model without prompts gives anything that has a part in a prompt's value."""
    if kind == "vit":
        model: Any = build_vit(tiny_vit(), prompt_length=3)
    else:
        model = build(prompt_mode="deep", readout="cls", token_activation="hidden")
    loader = loader_of(model)
    vptm.init_vipamin(model, loader, orthogonal=1.0, neighbours=1, images=7, seed=1, progress=False)
    caught: dict[int, Tensor] = {}
    twin = model.without_prompts()
    hooks = [
        block.attn.proj.register_forward_pre_hook(lambda _, rows, layer=layer: caught.update({layer: rows[0].mean(0)}))
        for layer, block in enumerate(twin.backbone.blocks)
    ]
    twin.impl = "reference"
    twin.forward_features(drawn(loader, 7, 1))
    for hook in hooks:
        hook.remove()
    for layer, block in enumerate(model.backbone.blocks):
        bias = block.attn.qkv.bias[32:] if kind == "vit" else block.attn.v_bias
        value = model.prompts.weight[layer].detach() @ block.attn.qkv.weight[32:].T + bias
        assert value.abs().max() > 1e-3
        assert (value @ caught[layer].T).abs().max() < 1e-10 * value.norm() * caught[layer].norm()


def test_outside_keeps_what_the_span_does_not_have() -> None:
    """The value of the noise less its projection, written with a least-squares fit in place of a basis."""
    span, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 8), (8, 8), (8,)))
    noise = torch.randn(5, 8, dtype=torch.float64)
    value = noise @ weight.T + bias
    fit = torch.linalg.lstsq(span.T, value.T).solution
    found = outside_of(span, weight, bias, noise) @ weight.T + bias
    assert torch.allclose(found, value - (span.T @ fit).T, atol=1e-9)


def test_the_two_parts_are_mixed_and_draws_are_repeated() -> None:
    """The same seed gives the same start, another seed another one; half is the mean of both ends."""
    found = {}
    for share, seed in ((0.0, 3), (0.5, 3), (1.0, 3), (0.5, 4)):
        model = build_vit(tiny_vit(), prompt_length=3)
        vptm.init_vipamin(model, loader_of(model), orthogonal=share, neighbours=2, images=6, seed=seed, progress=False)
        found[share, seed] = model.prompts.weight.detach()
    assert torch.allclose(found[0.5, 3], (found[0.0, 3] + found[1.0, 3]) / 2, atol=1e-12)
    assert not torch.allclose(found[0.5, 3], found[0.5, 4])


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"prompt_options": {"kind": "kv"}}, {}, "init_vipamin needs prompts that are token rows of their own"),
        ({"prompt_options": {"kind": "cross"}}, {}, "of their own, got 3 prompts of kind 'cross'"),
        ({}, {"neighbours": 7}, "neighbours must be at most the number of patches, 6, got 7"),
        ({}, {"neighbours": 0}, "neighbours must be an integer >= 1, got 0"),
        ({}, {"orthogonal": 1.5}, r"orthogonal must be in \[0, 1\], got 1.5"),
        ({}, {"images": 0}, "images must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_start_so(options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    """One line, and the prompts stay as they were."""
    model = build_vit(tiny_vit(), **options)
    before = model.prompts.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        vptm.init_vipamin(model, loader_of(model), **({"neighbours": 2} | arguments), progress=False)
    assert torch.equal(model.prompts.weight, before)


def test_a_model_of_bfloat16_starts_where_one_of_float32_does() -> None:
    """Averages over images and what is outside them are computed in float32: bfloat16 has no QR, and no digits for
    sums."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_vit(tiny_vit(), prompt_length=3).bfloat16().to(dtype)
        loader = loader_of(model)
        loader.dataset.tensors = (loader.dataset.tensors[0].bfloat16().to(dtype), loader.dataset.tensors[1])
        vptm.init_vipamin(model, loader, neighbours=6, images=40, seed=2, progress=False)
        found.append(model.prompts.weight.detach().float())
    assert model.prompts.weight.dtype == torch.bfloat16
    assert (found[0] - found[1]).abs().max() < 0.05 * found[0].abs().max()


def test_rows_that_span_every_channel_leave_nothing_outside() -> None:
    """As many rows as channels: refused, unless nothing outside is asked for."""
    model = build_vit(tiny_vit((4, 4)), prompt_length=2)
    with pytest.raises(ValueError, match=r"orthogonal must be 0 where 17 rows span all 16 channels, got 0\.5"):
        vptm.init_vipamin(model, loader_of(model), images=2, progress=False)
    assert vptm.init_vipamin(model, loader_of(model), orthogonal=0.0, images=2, progress=False) == 2


def test_options_of_another_start_are_refused() -> None:
    """Neighbours of prompts that start uniform would do nothing."""
    for option in ({"init_neighbours": 2}, {"init_orthogonal": 0.1}):
        with pytest.raises(ValueError, match="needs --prompt-init vipamin, got uniform"):
            RunSettings(**option)
    assert RunSettings(prompt_init="vipamin", init_neighbours=2).init_neighbours == 2
