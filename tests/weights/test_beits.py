"""Every checkpoint format computes what its own library computes, and everything that does not fit is refused."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import random
import re
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from beit_factory import randomize, tiny_beit
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive_unilm import UnilmBeit, layer_norm, position_index
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models.beit import Beit
from torch import Tensor, nn

from vptm.weights.beit_architecture import TIMM_RESIZES_RECTANGLES
from vptm.weights.beits import LoadedBackbone, load_backbone
from vptm.weights.files import weight_hash
from vptm.weights.key_maps import canonical_state_dict

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def unilm(seed: int = 0, **options: Any) -> UnilmBeit:
    model = UnilmBeit(**options)
    randomize(model, seed)
    return model.eval()


def save_unilm(model: nn.Module, path: Path) -> Path:
    """As unilm's utils.save_model: optimizer state and the command line travel with the weights."""
    args = argparse.Namespace(model="beit_base_patch16_224_8k_vocab", lr=1.5e-3, betas=[0.9, 0.98], output_dir=None)
    torch.save({"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 3, "args": args}, path)
    return path


def images_for(loaded: LoadedBackbone, batch: int = 2) -> Tensor:
    return torch.randn(batch, *loaded.default_cfg["input_size"], generator=torch.Generator().manual_seed(5))


def masked_tokens(loaded: LoadedBackbone, images: Tensor, mask: Tensor) -> Tensor:
    """Normalised tokens of the loaded backbone with the loaded mask token in the masked places."""
    beit = loaded.backbone
    assert loaded.mask_token is not None
    x = torch.where(mask[..., None], loaded.mask_token.to(images.dtype), beit.patch_embed(images))
    x = torch.cat([beit.cls_token.expand(len(x), -1, -1), x], 1)
    x = x if beit.pos_embed is None else x + beit.pos_embed
    bias = None if beit.rel_pos_bias is None else beit.rel_pos_bias()
    for block in beit.blocks:
        x = block(x, shared_rel_pos_bias=bias)
    return beit.norm(x)


def max_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert b.std() > 0.1, "an output without variation hides mistakes"
    return (a - b).abs().max().item()


def assert_rebuilds(loaded: LoadedBackbone) -> None:
    """The report's architecture makes a plain timm Beit that takes the weights strictly."""
    plain = Beit(num_classes=0, **loaded.report.architecture)
    plain.load_state_dict(loaded.backbone.state_dict(), strict=True)
    json.dumps(loaded.report.architecture)


@torch.no_grad()
def compare_with_unilm(model: UnilmBeit, loaded: LoadedBackbone) -> None:
    images = images_for(loaded)
    mask = torch.rand(2, loaded.backbone.patch_embed.num_patches, generator=torch.Generator().manual_seed(6)) < 0.4
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model, backbone, head = model.to(dtype), loaded.backbone.to(dtype), loaded.lm_head
        images = images.to(dtype)
        tokens = layer_norm(model.tokens(images), model.norm)
        assert max_error(backbone.forward_features(images), tokens) <= bound
        assert head is not None
        logits = head.to(dtype)(masked_tokens(loaded, images, mask)[:, 1:])
        assert max_error(logits, model(images, mask)) <= bound


PRETRAINING = {
    "released": {},
    "cls_pt": {"cls_pt_layers": 2},
    # no table tells the heads: 64 channels each are assumed
    "absolute positions, no LayerScale (v1 800ep)": {
        "shared": False,
        "absolute": True,
        "layer_scale": False,
        "dim": 128,
        "heads": 2,
    },
    "per block": {"shared": False, "per_block": True},
    "shared, per block and absolute": {"per_block": True, "absolute": True},
    # taller than wide and wider than tall: a transposed window is visible
    "window 2 x 4": {"window": (2, 4)},
    "window 5 x 2, absolute": {"window": (5, 2), "absolute": True},
    # windows of one row or one column of patches
    "window 1 x 4": {"window": (1, 4)},
    "one channel, patch 3": {"chans": 1, "patch": 3},
    # int(14 * (61 / 14)) is 60 in floats
    "MLP width that floats round down": {"dim": 14, "heads": 7, "hidden": 61},
}


@pytest.mark.parametrize("options", PRETRAINING.values(), ids=PRETRAINING.keys())
def test_unilm_pretraining_file_computes_what_unilm_computes(options: dict[str, Any], tmp_path: Path) -> None:
    model = unilm(**options)
    loaded = load_backbone(save_unilm(model, tmp_path / "checkpoint.pth"))
    report = loaded.report
    assert (report.format, report.eps, report.missing, report.resized) == ("unilm", 1e-6, (), {})
    assert {"optimizer", "epoch", "args"} <= set(report.dropped)
    assert any(name.startswith("cls_pt_layers.1.") for name in report.dropped) == ("cls_pt_layers" in options)
    assert (loaded.backbone.rel_pos_bias is not None) == options.get("shared", True)
    assert (loaded.backbone.pos_embed is not None) == options.get("absolute", False)
    assert loaded.pretrained and not loaded.backbone.training and loaded.backbone.num_classes == 0
    assert_rebuilds(loaded)
    compare_with_unilm(model, loaded)


@settings(max_examples=12)
@given(
    depth=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 6]),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    shared=st.booleans(),
    per_block=st.booleans(),
    absolute=st.booleans(),
    layer_scale=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_unilm_geometry_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    depth: int,
    heads: int,
    head_dim: int,
    window: tuple[int, int],
    **rest: Any,
) -> None:
    seed = rest.pop("seed")
    if not rest["shared"] and not rest["per_block"]:
        # heads show in a table only; without one, 64-dim heads are assumed
        heads, head_dim = 1, 64
        # an embedding of 1 x 4 patches alone is read as 2 x 2, as timm does
        assume(window[0] == window[1] or math.isqrt(window[0] * window[1]) ** 2 != window[0] * window[1])
    model = unilm(seed, depth=depth, heads=heads, dim=heads * head_dim, window=window, **rest)
    path = save_unilm(model, tmp_path_factory.mktemp("any") / "any.pth")
    size = (4 * window[0], 4 * window[1])
    loaded = load_backbone(path, img_size=size)
    assert loaded.report.resized == {} and loaded.backbone.patch_embed.img_size == size
    assert_rebuilds(loaded)
    compare_with_unilm(model, loaded)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "plain": lambda s: s,
    "model": lambda s: {"model": s},
    "module": lambda s: {"module": s},
    "model.module": lambda s: {"model": {"module": s}, "lr_scheduler": {}},
    "state_dict and backbone.": lambda s: {"state_dict": prefixed(s, "backbone."), "meta": {"epoch": 1}},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "epoch": 1, "callbacks": {}},
    "model_state_dict": lambda s: {"model_state_dict": s, "epoch": 1},
    "net": lambda s: {"net": s, "optimizer": {}},
    "DistributedDataParallel": lambda s: {"model": prefixed(s, "module.")},
    "compiled": lambda s: {"model": prefixed(s, "_orig_mod."), "epoch": 2},
    "DistributedDataParallel inside mmsegmentation": lambda s: {"state_dict": prefixed(s, "module.backbone.")},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_and_prefixes_come_off(wrap: Callable[[dict[str, Tensor]], dict[str, Any]], tmp_path: Path) -> None:
    model = unilm()
    torch.save(wrap(model.state_dict()), tmp_path / "wrapped.pth")
    compare_with_unilm(model, load_backbone(tmp_path / "wrapped.pth"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_both_torch_file_layouts_load(zipped: bool, tmp_path: Path) -> None:
    model = unilm()
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    compare_with_unilm(model, load_backbone(tmp_path / "x.pth"))


@torch.no_grad()
def test_fine_tuned_file_keeps_per_block_tables_and_the_norm_after_pooling(tmp_path: Path) -> None:
    model = unilm(shared=False, per_block=True, classes=7)
    torch.save({"module": model.state_dict()}, tmp_path / "beitv2_base_patch16_224_pt1k_ft21k.pth")
    loaded = load_backbone(tmp_path / "beitv2_base_patch16_224_pt1k_ft21k.pth")
    beit = loaded.backbone
    assert isinstance(beit.norm, nn.Identity) and isinstance(beit.fc_norm, nn.LayerNorm)
    assert loaded.mask_token is None and loaded.lm_head is None
    assert loaded.report.missing == ("mask_token", "lm_head.weight", "lm_head.bias")
    assert {"head.weight", "head.bias", "blocks.1.attn.relative_position_index"} <= set(loaded.report.dropped)
    assert any("fc_norm" in note for note in loaded.report.notes)
    assert_rebuilds(loaded)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model, beit = model.to(dtype), beit.to(dtype)
        images = images_for(loaded).to(dtype)
        assert max_error(beit.forward_features(images), model.tokens(images)) <= bound * 10  # un-normalised: larger
        assert max_error(model.head(beit(images)), model(images)) <= bound


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_timm_state_dict_loads_under_either_suffix(suffix: str, global_pool: str, tmp_path: Path) -> None:
    source = tiny_beit((3, 3), global_pool=global_pool, use_rel_pos_bias=True)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path, metadata={"format": "pt"})
    loaded = load_backbone(path)
    assert loaded.report.format == "timm" and loaded.report.dropped == ()
    images = images_for(loaded)
    assert max_error(loaded.backbone.forward_features(images), source.forward_features(images)) == 0
    assert_rebuilds(loaded)


def huggingface(folder: Path, *, v5: bool, eps: float, masked: bool, **options: Any) -> Any:
    """A random transformers model, saved in `folder` under the names of transformers 4 or 5."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=12,
        patch_size=4,
        vocab_size=11,
        layer_norm_eps=eps,
        use_mask_token=masked,
        use_shared_relative_position_bias=masked,
        use_relative_position_bias=not masked,
        **options,
    )
    cls = transformers.BeitForMaskedImageModeling if masked else transformers.BeitForImageClassification
    model = cls(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    state = {to_v5(key) if v5 else to_v4(key): value.clone() for key, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    assert any(("encoder.layer.0.attention.attention.query" in key) != v5 for key in state)
    return model


_V4_TO_V5 = (
    ("encoder.relative_position_bias.", "shared_position_bias."),
    ("encoder.layer.", "layers."),
    (".attention.attention.relative_position_bias.", ".relative_position_bias."),
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)


def to_v5(key: str) -> str:
    for old, new in _V4_TO_V5:
        key = key.replace(old, new)
    return key


def to_v4(key: str) -> str:
    if "encoder." in key:
        return key
    key = key.replace("shared_position_bias.", "encoder.relative_position_bias.").replace("layers.", "encoder.layer.")
    key = re.sub(r"(layer\.\d+)\.relative_position_bias", r"\1.attention.attention.relative_position_bias", key)
    for old, new in _V4_TO_V5[3:]:
        key = key.replace(new, old)
    return key


def test_the_v5_names_in_these_tests_are_those_of_transformers_5(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 has no such names")
    for masked in (True, False):
        model = huggingface(tmp_path, v5=True, eps=1e-12, masked=masked)
        assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


@pytest.mark.parametrize("v5", [False, True], ids=["v4 names", "v5 names"])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])  # the last is large enough to show in the output
@torch.no_grad()
def test_huggingface_masked_image_model(v5: bool, eps: float, tmp_path: Path) -> None:
    model = huggingface(tmp_path, v5=v5, eps=eps, masked=True)
    loaded = load_backbone(tmp_path)
    report = loaded.report
    assert (report.format, report.eps, report.missing, report.dropped) == ("huggingface", eps, (), ())
    assert {m.eps for m in loaded.backbone.modules() if isinstance(m, nn.LayerNorm)} == {eps}
    images = images_for(loaded)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) < 0.4
    head = loaded.lm_head
    assert head is not None
    tokens = model.layernorm(model.beit(images, bool_masked_pos=torch.zeros(2, 9, dtype=torch.bool)).last_hidden_state)
    assert max_error(loaded.backbone.forward_features(images), tokens) <= 1e-5
    logits = model(images, bool_masked_pos=mask).logits
    assert max_error(head(masked_tokens(loaded, images, mask)[:, 1:]), logits) <= 1e-5
    model, head, backbone = model.double(), head.double(), loaded.backbone.double()
    logits = model(images.double(), bool_masked_pos=mask).logits
    assert max_error(head(masked_tokens(loaded, images.double(), mask)[:, 1:]), logits) <= 1e-12
    assert backbone.rel_pos_bias is not None and backbone.blocks[0].attn.relative_position_bias_table is None


@pytest.mark.parametrize("v5", [False, True], ids=["v4 names", "v5 names"])
@pytest.mark.parametrize("mean_pooling", [True, False])
@torch.no_grad()
def test_huggingface_classifier(v5: bool, mean_pooling: bool, tmp_path: Path) -> None:
    model = huggingface(tmp_path, v5=v5, eps=1e-12, masked=False, use_mean_pooling=mean_pooling, num_labels=5)
    loaded = load_backbone(tmp_path)
    assert set(loaded.report.dropped) == {"head.weight", "head.bias"}
    images = images_for(loaded)
    # pooled and normalised, whichever comes first
    assert max_error(model.classifier(loaded.backbone(images)), model(images).logits) <= 1e-5
    assert loaded.report.architecture["global_pool"] == ("avg" if mean_pooling else "token")
    assert_rebuilds(loaded)


def test_huggingface_shards_torch_files_and_lone_safetensors_are_the_same_weights(tmp_path: Path) -> None:
    huggingface(tmp_path / "one", v5=False, eps=1e-12, masked=True)
    state, config = load_file(tmp_path / "one/model.safetensors"), (tmp_path / "one/config.json").read_text()
    expected = weight_hash(load_backbone(tmp_path / "one").backbone.state_dict())
    half = sorted(state)[: len(state) // 2]
    parts = {"a": {k: v for k, v in state.items() if k in half}, "b": {k: v for k, v in state.items() if k not in half}}
    for name, suffix, save in (("model", "safetensors", save_file), ("pytorch_model", "bin", torch.save)):
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / "config.json").write_text(config)
        for part, tensors in parts.items():
            save(tensors, folder / f"{name}-{part}.{suffix}")
        weight_map = {key: f"{name}-{part}.{suffix}" for part, tensors in parts.items() for key in tensors}
        (folder / f"{name}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert weight_hash(load_backbone(folder).backbone.state_dict()) == expected
        (folder / f"{name}-b.{suffix}").unlink()
        with pytest.raises(ValueError, match=rf"names {name}-b\.{suffix}, which is not in the folder"):
            load_backbone(folder)
    (tmp_path / "bin/pytorch_model.bin.index.json").unlink()
    torch.save(state, tmp_path / "bin/pytorch_model.bin")
    assert weight_hash(load_backbone(tmp_path / "bin").backbone.state_dict()) == expected
    beside = load_backbone(tmp_path / "one/model.safetensors")
    assert weight_hash(beside.backbone.state_dict()) == expected and beside.report.eps == 1e-12
    save_file(state, tmp_path / "lone.safetensors")
    lone = load_backbone(tmp_path / "lone.safetensors")
    assert weight_hash(lone.backbone.state_dict()) == expected
    assert lone.report.eps == 1e-12 and any("no config.json" in note for note in lone.report.notes)
    torch.save({"model": state}, tmp_path / "lone.pth")
    assert load_backbone(tmp_path / "lone.pth").report.eps == 1e-12


def test_index_of_shards_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    huggingface(tmp_path / "x", v5=False, eps=1e-12, masked=True)
    (tmp_path / "x/model.safetensors").rename(tmp_path / "outside.safetensors")
    (tmp_path / "x/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../outside.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"must have weight_map, tensor names to file names in the folder"):
        load_backbone(tmp_path / "x")


def test_huggingface_preprocessing_comes_from_its_config(tmp_path: Path) -> None:
    huggingface(tmp_path, v5=False, eps=1e-12, masked=True)
    loaded = load_backbone(tmp_path)
    assert (loaded.report.mean, loaded.report.std) == HALF
    steps = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
        "do_center_crop": True,
        "size": {"height": 256, "width": 256},
        "crop_size": {"height": 224, "width": 224},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps))
    cfg = load_backbone(tmp_path).default_cfg
    assert (cfg["mean"], cfg["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (cfg["interpolation"], cfg["crop_pct"], cfg["input_size"]) == ("bilinear", 0.875, (3, 12, 12))


@torch.no_grad()
def test_rectangular_huggingface_window_follows_timm(tmp_path: Path) -> None:
    """transformers reads a rectangular table with height and width exchanged, so timm is the reference here."""
    huggingface(tmp_path, v5=False, eps=1e-6, masked=True)
    source = tiny_beit((2, 5), dim=24, heads=3, depth=2, mlp_ratio=40 / 24)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    table = "beit.encoder.relative_position_bias.relative_position_bias_table"
    state[table] = source.state_dict()["rel_pos_bias.relative_position_bias_table"]
    save_file(state, path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": [8, 20]}))
    loaded = load_backbone(tmp_path)
    assert loaded.default_cfg["input_size"] == (3, 8, 20) and loaded.report.resized == {}
    source.load_state_dict(loaded.backbone.state_dict())
    images = images_for(loaded)
    assert max_error(loaded.backbone.forward_features(images), source.forward_features(images)) == 0


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    # square to larger, to smaller, to rectangular; rectangular to its transpose (as many patches) and to square
    [((3, 3), (5, 5)), ((4, 4), (3, 3)), ((3, 3), (3, 5)), ((2, 5), (5, 2)), ((5, 2), (4, 4))],
)
def test_resize_follows_timm_and_is_reported(
    old: tuple[int, int], new: tuple[int, int], absolute: bool, tmp_path: Path
) -> None:
    model = unilm(window=old, per_block=True, absolute=absolute)
    path = save_unilm(model, tmp_path / "m.pth")
    size = (4 * new[0], 4 * new[1])
    if old[0] != old[1] and not TIMM_RESIZES_RECTANGLES:
        with pytest.raises(ValueError, match=r"timm must be 1\.0\.31 or newer"):
            load_backbone(path, img_size=size)
        return
    loaded = load_backbone(path, img_size=size)
    before, after = model.state_dict(), loaded.backbone.state_dict()
    tables = [key for key in after if key.endswith("relative_position_bias_table")]
    assert len(tables) == 3
    offsets = (2 * new[0] - 1) * (2 * new[1] - 1) + 3
    for key in tables:
        known = {"old_window_size": old} if TIMM_RESIZES_RECTANGLES else {}
        expected = resize_rel_pos_bias_table(before[key], new, (offsets, 3), **known)
        assert torch.equal(after[key], expected)
        assert loaded.report.resized[key] == (tuple(before[key].shape), (offsets, 3))
    if absolute:
        expected = resample_abs_pos_embed(before["pos_embed"], list(new), list(old))
        assert torch.equal(after["pos_embed"], expected) and "pos_embed" in loaded.report.resized
    assert len(loaded.report.resized) == 3 + absolute
    assert loaded.default_cfg["input_size"] == (3, *size)
    assert f"resized to {new[0]} x {new[1]} by timm's rule" in " ".join(loaded.report.notes)
    native = load_backbone(path).backbone
    if not hasattr(native, "set_input_size"):  # timm 1.0.30
        return
    native.set_input_size(size)
    images = images_for(loaded)
    assert max_error(loaded.backbone.forward_features(images), native.forward_features(images)) == 0


def test_table_of_one_block_that_does_not_match_is_named_at_every_size(tmp_path: Path) -> None:
    state = unilm(shared=False, per_block=True).state_dict()
    name = "blocks.1.attn.relative_position_bias_table"
    torch.save(state | {name: torch.ones(12, 3)}, tmp_path / "x.pth")
    for size, rows in ((None, 28), (20, 84)):
        with pytest.raises(ValueError, match=rf"{re.escape(name)} must have shape \({rows}, 3\), got \(12, 3\)"):
            load_backbone(tmp_path / "x.pth", img_size=size)


def test_square_table_without_an_index_gives_its_window_and_a_rectangular_one_needs_img_size(tmp_path: Path) -> None:
    path = tmp_path / "timm.pth"
    torch.save(tiny_beit((3, 3)).state_dict(), path)
    assert load_backbone(path).default_cfg["input_size"] == (3, 12, 12)
    source = tiny_beit((2, 3))
    torch.save(source.state_dict(), path)
    with pytest.raises(
        ValueError, match=r"img_size of the file must be given .* its window is not square, got a table of 18"
    ):
        load_backbone(path)
    loaded = load_backbone(path, img_size=(8, 12))
    images = images_for(loaded)
    assert loaded.report.resized == {}
    assert max_error(loaded.backbone.forward_features(images), source.forward_features(images)) == 0


@pytest.mark.parametrize(
    ("size", "match"), [(13, "multiples of the patch 4 x 4"), ((8, 0), "positive"), ("8", "positive")]
)
def test_unfit_img_size_is_refused(size: Any, match: str, tmp_path: Path) -> None:
    path = save_unilm(unilm(), tmp_path / "m.pth")
    with pytest.raises(ValueError, match=match):
        load_backbone(path, img_size=size)


def write_vptm(path: Path, **changes: Any) -> dict[str, Tensor]:
    """A file as the pre-training script writes it: fp16 tensors, canonical names, no index, json in the metadata."""
    model = unilm(chans=1)
    state = canonical_state_dict(model.state_dict())
    state = {key: value.half() for key, value in state.items()}
    architecture = {
        "img_size": 12,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 40 / 24,
        "init_values": 0.1,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
    }
    changed = changes.pop("architecture", {})
    stated = {
        "architecture": architecture | changed if isinstance(changed, dict) else changed,
        "eps": 1e-6,
        "vocab_size": 11,
        "mean": [0.286],
        "std": [0.353],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "description": "grey clothes",
    }
    metadata = {"format": "vptm", "vptm": json.dumps(stated | changes)}
    save_file(state, path, metadata=metadata)
    return state


def test_vptm_file_states_its_architecture_and_preprocessing(tmp_path: Path) -> None:
    state = write_vptm(tmp_path / "small.safetensors")
    loaded = load_backbone(tmp_path / "small.safetensors")
    report, cfg = loaded.report, loaded.default_cfg
    assert (report.format, report.mean, report.std, report.missing) == ("vptm", (0.286,), (0.353,), ())
    assert (cfg["interpolation"], cfg["crop_pct"], cfg["input_size"]) == ("bilinear", 1.0, (1, 12, 12))
    assert report.architecture["init_values"] == 0.1 and "grey clothes" in report.notes
    assert loaded.mask_token is not None and loaded.lm_head is not None
    assert torch.equal(loaded.mask_token, state["mask_token"].float())
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"].float())
    for key, value in loaded.backbone.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[key].float())
    assert_rebuilds(loaded)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": {"num_heads": 4}}, "must have num_heads 4 .* the weights have 3"),
        ({"architecture": {"depth": 3}}, "must have depth 3 .* the weights have 2"),
        ({"architecture": {"mlp_ratio": 4.0}}, "must have mlp_ratio 4.0"),
        ({"architecture": {"init_values": None}}, "must have init_values None"),
        (
            {"architecture": {"img_size": 16}},
            r"must have tables of window 4 x 4 \(img_size \(16, 16\)\), got a table of 28",
        ),
        ({"architecture": {"widen": 2}}, "keyword arguments of timm's Beit only, got widen"),
        ({"vocab_size": 12}, r"lm_head must have 12 tokens \(vocab_size\), got 11"),
        ({"eps": 0}, "eps must be a positive number"),
        ({"std": [0.0]}, "std must be finite numbers, positive"),
        ({"mean": None}, "mean must be finite numbers"),
        ({"mean": [0.5, 0.5, 0.5]}, "must have mean and std of 1 channels"),
        ({"architecture": {"patch_size": 3}}, "must have patch_size 3"),
        ({"architecture": {"init_values": "small"}}, "init_values must be a positive number"),
        ({"architecture": 3}, "the vptm metadata must have architecture, eps, mean and std"),
    ],
)
def test_vptm_file_that_contradicts_its_tensors_is_refused(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    write_vptm(tmp_path / "x.safetensors", **changes)
    with pytest.raises(ValueError, match=match):
        load_backbone(tmp_path / "x.safetensors")


def test_builtin_is_read_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="vptm is installed without its built-in model"):
        load_backbone("builtin")
    (tmp_path / "assets").mkdir()
    write_vptm(tmp_path / "assets/builtin.safetensors")
    loaded = load_backbone("builtin")
    assert loaded.report.source == "builtin" and loaded.report.format == "vptm" and loaded.pretrained


def test_instance_stays_as_it_is_and_is_described() -> None:
    """The backbone is another module on its storage, in eval mode and without a classifier."""
    beit = Beit(
        img_size=(8, 12),
        patch_size=4,
        num_classes=5,
        embed_dim=16,
        depth=2,
        num_heads=2,
        init_values=0.2,
        use_abs_pos_emb=True,
        use_rel_pos_bias=True,
    ).train()
    loaded = load_backbone(beit)
    assert beit.training and beit.num_classes == 5 and all(tensor.requires_grad for tensor in beit.parameters())
    backbone = loaded.backbone
    assert backbone is not beit and not backbone.training and backbone.num_classes == 0
    assert backbone.cls_token.data_ptr() == beit.cls_token.data_ptr()
    assert loaded.report.format == "module" and not loaded.pretrained
    assert loaded.report.dropped == ("head.weight", "head.bias")
    assert loaded.default_cfg["input_size"] == (3, 8, 12)
    assert_rebuilds(loaded)
    with pytest.raises(ValueError, match=r"img_size must be \(8, 12\), .*got \(16, 16\)"):
        load_backbone(beit, img_size=16)
    with pytest.raises(TypeError, match="PromptedBEiT runs timm's Beit class, the given module is a Linear"):
        load_backbone(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be a path, a name or a timm Beit instance, got int"):
        load_backbone(3)


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own models with small blocks; pretrained=True gives random weights that differ from the initial ones."""
    create = timm.create_model

    def small(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if name.startswith("beit_") or name.startswith("beitv2_"):
            options |= {"embed_dim": 16, "depth": 2, "num_heads": 2}
        model = create(name, **options)
        if pretrained:
            randomize(model)
        return model

    monkeypatch.setattr(timm, "create_model", small)


@pytest.mark.usefixtures("small_timm")
def test_timm_name_without_pretrained_is_random_and_has_timm_preprocessing() -> None:
    loaded = load_backbone("beitv2_base_patch16_224", img_size=(32, 48))
    assert not loaded.pretrained and loaded.report.format == "timm-name"
    assert loaded.report.missing == ("mask_token", "lm_head.weight", "lm_head.bias")
    assert loaded.default_cfg["input_size"] == (3, 32, 48) and loaded.report.resized == {}
    assert (loaded.report.mean, loaded.report.std) == IMAGENET
    v1 = load_backbone("beit_base_patch16_384.in22k_ft_in22k_in1k", img_size=64)
    assert (v1.report.mean, v1.report.std) == HALF and v1.default_cfg["crop_pct"] == 1.0
    assert_rebuilds(v1)


@pytest.mark.usefixtures("small_timm")
@pytest.mark.skipif(not hasattr(Beit, "set_input_size"), reason="timm 1.0.30 resizes no BEiT to compare with")
def test_timm_pretrained_weights_are_resized_from_their_native_window() -> None:
    native = load_backbone("beit_base_patch16_224", pretrained=True)
    assert native.pretrained and native.default_cfg["input_size"] == (3, 224, 224)
    loaded = load_backbone("beit_base_patch16_224", pretrained=True, img_size=(64, 96))
    table = "blocks.0.attn.relative_position_bias_table"
    assert loaded.report.resized[table] == ((732, 2), (80, 2)) and len(loaded.report.resized) == 2
    assert {"head.weight", "head.bias"} == set(loaded.report.dropped)
    native.backbone.set_input_size((64, 96))
    images = images_for(loaded)
    assert max_error(loaded.backbone(images), native.backbone(images)) == 0


def test_timm_failure_to_fetch_weights_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise OSError("no connection\nand a page of advice")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"timm could not load its pretrained weights: no connection$"):
        load_backbone("beit_base_patch16_224", pretrained=True)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("vit_tiny_patch16_224", "PromptedBEiT runs timm's Beit class, vit_tiny_patch16_224 is a VisionTransformer"),
        ("resnet18", "PromptedBEiT runs timm's Beit class, resnet18 is a ResNet"),
        ("beit3_base_patch16_224", "is a VisionTransformer"),
        ("beitv3_base_patch16_224", "no such file, folder or timm model; nearest: beitv2_base_patch16_224"),
        ("bultin", "nearest: builtin"),
        ("deit_tiny", "nearest: deit_tiny_patch16_224"),
        ("nothing_of_it", "known names: builtin and timm's of BEiTs and ViTs"),
        ("beit_base_patch16_224.in1k", r"pretrained tag must be one of beit_base_patch16_224\.in22k"),
    ],
)
def test_name_that_is_no_beit_is_refused_with_the_nearest(name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as refusal:
        load_backbone(name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "path", ["nowhere.pth", "no/such/folder", "./nowhere", "tests/nowhere", "beit_base_patch16_224.pth"]
)
def test_missing_path_is_file_not_found(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"^{re.escape(path)}: no such file or folder$"):
        load_backbone(path)
    with pytest.raises(FileNotFoundError):
        load_backbone(tmp_path / "gone")


def test_hub_id_goes_through_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface(tmp_path, v5=False, eps=1e-12, masked=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        if repo == "some/missing":
            raise OSError("Repository Not Found\nand a page of advice")
        if not any("bin" in pattern for pattern in allow_patterns):
            return str(tmp_path / "empty")
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    loaded = load_backbone("some/beit-base")
    assert loaded.report.source == "some/beit-base" and loaded.report.format == "huggingface"
    # torch files are fetched only where there is no safetensors file
    assert [repo for repo, _ in asked] == ["some/beit-base"] * 2
    with pytest.raises(FileNotFoundError, match=r"hub did not give it: Repository Not Found$"):
        load_backbone("some/missing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'vptm\[hf\]'"):
        load_backbone("some/beit-base")


def test_timm_folder_with_its_own_config_loads(tmp_path: Path) -> None:
    source = tiny_beit((3, 3), global_pool="avg")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.95, "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "beit_tiny", "pretrained_cfg": cfg}))
    loaded = load_backbone(tmp_path)
    assert loaded.report.format == "timm" and loaded.report.mean == (0.1, 0.2, 0.3)
    assert loaded.default_cfg["crop_pct"] == 0.95 and loaded.default_cfg["interpolation"] == "bilinear"
    assert weight_hash(loaded.backbone.state_dict()) == weight_hash(source.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "statistics", "rule"),
    [
        ("beit_base_patch16_224_pt22k.pth", {}, HALF, "BEiT v1"),
        ("beitv2_base_patch16_224_pt1k.pth", {}, IMAGENET, "BEiT v2"),
        ("checkpoint-299.pth", {"cls_pt_layers": 1}, IMAGENET, "cls_pt layers"),
        ("checkpoint-299.pth", {}, IMAGENET, "assumed"),
        ("checkpoint-299.pth", {"chans": 2}, ((0.5, 0.5), (0.5, 0.5)), "2 channels"),
    ],
)
def test_mean_and_std_follow_a_stated_rule(
    name: str, options: dict[str, Any], statistics: tuple[Any, Any], rule: str, tmp_path: Path
) -> None:
    loaded = load_backbone(save_unilm(unilm(**options), tmp_path / name))
    assert (loaded.report.mean, loaded.report.std) == statistics
    assert (loaded.default_cfg["mean"], loaded.default_cfg["std"]) == statistics
    assert any(note.startswith("mean and std") and rule in note for note in loaded.report.notes)


@pytest.mark.parametrize("lacking", ["mask_token", "lm_head"])
def test_absent_mask_token_or_head_is_reported(lacking: str, tmp_path: Path) -> None:
    state = {key: value for key, value in unilm().state_dict().items() if not key.startswith(lacking)}
    torch.save({"model": state}, tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth")
    names = {"mask_token": ("mask_token",), "lm_head": ("lm_head.weight", "lm_head.bias")}[lacking]
    assert loaded.report.missing == names
    assert (loaded.mask_token is None) == (lacking == "mask_token") and (loaded.lm_head is None) == (
        lacking == "lm_head"
    )


@torch.no_grad()
def test_key_bias_is_dropped_silently_if_zero_and_with_a_note_if_not(tmp_path: Path) -> None:
    source = tiny_beit((3, 3))
    zero = {f"blocks.{i}.attn.k_bias": torch.zeros(16) for i in range(3)}
    torch.save(source.state_dict() | zero, tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth")
    assert set(loaded.report.dropped) == set(zero) and not any("key bias" in note for note in loaded.report.notes)
    torch.save(source.state_dict() | zero | {"blocks.1.attn.k_bias": torch.randn(16)}, tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth")
    assert any("key bias of 1 blocks dropped: the softmax over keys is invariant" in n for n in loaded.report.notes)
    images = images_for(loaded)
    for block in source.blocks:
        block.attn.k_bias.copy_(torch.randn(16))
    assert max_error(loaded.backbone.forward_features(images), source.forward_features(images)) <= 1e-5


def test_segmentation_file_starts_the_norm_it_lacks(tmp_path: Path) -> None:
    state = {k: v for k, v in unilm(shared=False, per_block=True).state_dict().items() if not k.startswith("norm.")}
    state = prefixed({k: v for k, v in state.items() if k.startswith(("cls", "patch", "blocks"))}, "backbone.")
    extra = {
        "backbone.fpn1.0.weight": torch.ones(2),
        "decode_head.conv.weight": torch.ones(2),
        "auxiliary_head.x": torch.ones(1),
    }
    torch.save({"state_dict": state | extra}, tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth")
    assert "norm.weight" in loaded.report.missing and "decode_head.conv.weight" in loaded.report.dropped
    assert any("segmentation" in note for note in loaded.report.notes)
    assert torch.equal(loaded.backbone.norm.weight, torch.ones(24))
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"missing norm\.weight, norm\.bias"):
        load_backbone(tmp_path / "x.pth")


def test_half_precision_and_double_files_load_as_fp32(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = unilm().to(dtype)
        loaded = load_backbone(save_unilm(model, tmp_path / "x.pth"))
        assert {p.dtype for p in loaded.backbone.parameters()} == {torch.float32}
        assert loaded.mask_token is not None and loaded.mask_token.dtype == torch.float32
        assert f"stored as {str(dtype)[6:]}, loaded as float32" in loaded.report.notes


def test_loading_leaves_random_state_and_default_dtype_alone(tmp_path: Path) -> None:
    path = save_unilm(unilm(), tmp_path / "x.pth")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        loaded = load_backbone(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in loaded.backbone.parameters()} == {torch.float32}
    assert all(buffer.device.type == "cpu" for buffer in loaded.backbone.buffers())


def test_weights_do_not_change_with_the_file_they_came_from(tmp_path: Path) -> None:
    path = save_unilm(unilm(), tmp_path / "x.pth")
    loaded = load_backbone(path)
    mask_token, lm_head = loaded.mask_token, loaded.lm_head
    assert mask_token is not None and lm_head is not None

    def everything() -> str:
        return weight_hash({**loaded.backbone.state_dict(), **lm_head.state_dict(), "mask_token": mask_token})

    before = everything()
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\xff" * size)
    assert everything() == before


Mutation = Callable[[dict[str, Any]], dict[str, Any]]


def without(*names: str) -> Mutation:
    return lambda state: {key: value for key, value in state.items() if key not in names}


def plus(**changes: Any) -> Mutation:
    return lambda state: state | {key.replace("__", "."): value for key, value in changes.items()}


def filled(name: str, value: float) -> Mutation:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        tensor = state[name].clone()
        tensor.view(-1)[-1] = value
        return state | {name: tensor}

    return change


REFUSED: dict[str, tuple[Mutation, str]] = {
    "missing tensor": (
        without("blocks.1.norm2.bias"),
        r"must have all tensors of a BEiT of 2 blocks, missing blocks\.1\.norm2\.bias",
    ),
    "missing block": (
        lambda s: {k.replace("blocks.1.", "blocks.4."): v for k, v in s.items()},
        "must have blocks 0 to 4",
    ),
    "missing norm": (without("norm.weight", "norm.bias"), r"missing norm\.weight, norm\.bias"),
    "two norms": (plus(fc_norm__weight=torch.ones(24)), "must have one final norm, got both norm and fc_norm"),
    "unknown tensor": (plus(blocks__0__ls1__gamma=torch.ones(24)), r"got unknown blocks\.0\.ls1\.gamma"),
    "LayerScale in one block": (plus(blocks__1__gamma_3=torch.ones(24)), r"got unknown blocks\.1\.gamma_3"),
    "wrong shape": (
        plus(blocks__1__mlp__fc2__weight=torch.ones(24, 41)),
        r"blocks\.1\.mlp\.fc2\.weight must have shape \(24, 40\), got \(24, 41\)",
    ),
    "wrong mask token": (plus(mask_token=torch.ones(24)), r"mask_token must have shape \(1, 1, 24\), got \(24,\)"),
    "head without bias": (without("lm_head.bias"), "lm_head must have weight and bias"),
    "head of another width": (plus(lm_head__weight=torch.ones(11, 23)), r"lm_head must have weight \(V, 24\)"),
    "NaN": (filled("blocks.0.attn.qkv.weight", float("nan")), r"blocks\.0\.attn\.qkv\.weight must be finite"),
    "infinity": (filled("lm_head.bias", float("inf")), r"lm_head\.bias must be finite, got NaN or infinite values"),
    "integer weights": (
        plus(cls_token=torch.ones(1, 1, 24, dtype=torch.int8)),
        r"cls_token must be floating point, got torch\.int8",
    ),
    "sparse weights": (plus(norm__bias=torch.ones(24).to_sparse()), r"norm\.bias must have dense values"),
    "weights without data": (plus(norm__bias=torch.ones(24, device="meta")), r"norm\.bias must have dense values"),
    "double beyond fp32": (
        plus(norm__bias=torch.full((24,), 1e300, dtype=torch.float64)),
        r"norm\.bias must be finite as torch\.float32, got 1e\+300",
    ),
    "qkv of no dimension": (plus(blocks__0__attn__qkv__weight=torch.tensor(1.0)), r"attn\.qkv\.weight must have shape"),
    "heads unknown": (
        lambda s: unilm(shared=False, absolute=True).state_dict(),
        "must have a position table or a config that tells the number of heads, .* got width 24",
    ),
    "nested": (
        lambda s: s | {"n": torch.nested.nested_tensor([torch.ones(2)])},
        r"n must have dense values, got a nested tensor",
    ),
    "packed floats": (
        plus(norm__bias=torch.zeros(24, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
        r"norm\.bias must be floating point of 8 bits or more, got torch\.float4",
    ),
    "empty tensor": (plus(norm__bias=torch.ones(0)), r"norm\.bias must hold values, got shape \(0,\)"),
    "not a tensor": (plus(norm__bias=[1.0]), r"norm\.bias must be a tensor, got a list"),
    "heads that do not divide": (
        plus(rel_pos_bias__relative_position_bias_table=torch.ones(28, 5)),
        "must have a number of heads that divides 24, got 5",
    ),
    "table of another window": (
        plus(rel_pos_bias__relative_position_bias_table=torch.ones(12, 3)),
        r"must have tables of window 3 x 3 \(its index\), got a table of 12 offsets",
    ),
    "another numbering of positions": (
        plus(rel_pos_bias__relative_position_index=position_index((3, 3)).T.contiguous()),
        "must be BEiT's index of window",
    ),
    "index of floats": (
        plus(rel_pos_bias__relative_position_index=torch.full((10, 10), float("nan"))),
        r"relative_position_index must be integers of shape \(N, N\), got torch\.float32 \(10, 10\)",
    ),
    "plain ViT": (
        lambda s: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).state_dict(),
        r"must be a BEiT, got a plain ViT \(blocks\.0\.attn\.qkv\.bias",
    ),
    "ResNet": (
        lambda s: timm.create_model("resnet10t").state_dict(),
        r"must be a BEiT state dict .*, got conv1\.0\.weight",
    ),
    "no tensors": (lambda s: {"epoch": 3, "args": argparse.Namespace()}, "got no tensors"),
    "nothing": (lambda s: {}, "got no tensors"),
    "no position, no img_size": (
        lambda s: unilm(shared=False, dim=64, heads=1).state_dict(),
        "img_size must be given, the file holds no position table that tells it",
    ),
    "prefixed twice": (lambda s: s | {"module.norm.bias": torch.ones(24)}, r"must have one norm\.bias, got two"),
}


@pytest.mark.parametrize(("change", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_state_dict_that_does_not_fit_is_refused_in_one_line(change: Mutation, match: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": change(unilm().state_dict())}, path)
    with pytest.raises(ValueError, match=match) as refusal:
        load_backbone(path)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


class Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("raw", [False, True], ids=["torch file", "bare pickle"])
def test_pickle_with_code_is_refused_and_not_run(raw: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "x.pth"
    content = {"model": unilm().state_dict(), "args": Payload(f"touch {marker}")}
    if raw:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must ") as refusal:
        load_backbone(path)
    assert "\n" not in str(refusal.value) and refusal.value.__cause__ is not None
    if not raw:
        assert re.search(r"holds (posix|nt)\.system; nothing was run", str(refusal.value))
    assert not marker.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    torch_file, safe_file = tmp_path / "x.pth", tmp_path / "x.safetensors"
    write_vptm(safe_file)
    whole = {}
    for zipped in (True, False):
        torch.save({"model": unilm().state_dict()}, torch_file, _use_new_zipfile_serialization=zipped)
        whole[torch_file, zipped] = torch_file.read_bytes()
    whole[safe_file, True] = safe_file.read_bytes()
    for (path, _), content in whole.items():
        # cut inside the header, in the middle and just before the end
        for keep in (1, 5, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:keep])
            with pytest.raises(ValueError, match=r"(truncated or )?damaged") as refusal:
                load_backbone(path)
            assert "\n" not in str(refusal.value) and refusal.value.__cause__ is not None
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"is empty \(0 bytes\)"):
            load_backbone(path)
        path.write_text("<html>not weights</html>" * 20)
        with pytest.raises(ValueError, match="damaged"):
            load_backbone(path)
    torch.save(torch.ones(3), torch_file)
    with pytest.raises(ValueError, match=r"must be a mapping of names to tensors, got a Tensor"):
        load_backbone(torch_file)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must be a file ending in .*\.safetensors.*, got \.txt"):
        load_backbone(tmp_path / "x.txt")


def test_unfit_huggingface_folders_are_refused(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as refusal:
            load_backbone(tmp_path)
        assert str(refusal.value).startswith(f"{tmp_path}: ") and "\n" not in str(refusal.value)

    refused("must be a Hugging Face folder with config.json")
    huggingface(tmp_path, v5=False, eps=1e-12, masked=True)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, state = json.loads(config.read_text()), load_file(weights)
    for change, match in (
        ({"model_type": "data2vec-audio"}, "config.json must have model_type beit, .*, got 'data2vec-audio'"),
        ({"model_type": "vit"}, r"must be a BEiT, got a ViT \(vit\): use PromptedViT or vptm\.open_model"),
        ({"hidden_act": "relu"}, "must have hidden_act gelu, got 'relu'"),
        ({"hidden_size": "24"}, "hidden_size must be a positive integer, got '24'"),
        ({"num_attention_heads": 4}, "must have num_heads 4 .* the weights have 3"),
        ({"num_hidden_layers": 3}, "must have depth 3 .* the weights have 2"),
        ({"use_relative_position_bias": True}, "must have use_rel_pos_bias True .* the weights have False"),
        ({"image_size": 16}, r"must have tables of window 4 x 4 \(img_size \(16, 16\)\)"),
        ({"image_size": [12]}, "config.json image_size must be a positive integer or"),
        ({"vocab_size": 12}, "lm_head must have 12 tokens"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps must be a positive number"),
    ):
        config.write_text(json.dumps(good | change))
        refused(match)
    config.write_text("{")
    refused("config.json must be JSON")
    config.write_text("[]")
    refused("config.json must be a JSON object")
    config.write_text(json.dumps(good))
    save_file({k: v for k, v in state.items() if not k.endswith("0.attention.attention.key.weight")}, weights)
    refused("block 0 must have query, key and value weights, got no key")
    name = "beit.encoder.layer.0.attention.attention.key.weight"
    save_file(state | {name: torch.zeros(24, 25)}, weights)
    refused(r"block 0 must have query, key and value weights of one shape, got \(24, 24\), \(24, 25\), \(24, 24\)")
    save_file(state | {name.replace("attention.attention", "attention"): torch.zeros(24, 24)}, weights)
    refused("must have one k weight, got two")
    save_file(state | {"blocks.0.attn.qkv.weight": torch.zeros(72, 24)}, weights)
    refused(r"must have one blocks\.0\.attn\.qkv\.weight, got two")
    weights.unlink()
    refused("must have weights beside config.json, one of model.safetensors")


def test_masked_image_model_with_two_final_norms_is_refused(tmp_path: Path) -> None:
    huggingface(tmp_path, v5=False, eps=1e-12, masked=True, use_mean_pooling=False)
    with pytest.raises(ValueError, match=r"got layernorm and beit\.layernorm .*use_mean_pooling=False"):
        load_backbone(tmp_path)


def test_huggingface_vit_without_its_config_is_recognised_by_its_key_bias(tmp_path: Path) -> None:
    huggingface(tmp_path, v5=False, eps=1e-12, masked=True)
    state = load_file(tmp_path / "model.safetensors")
    vit = {k.removeprefix("beit."): v for k, v in state.items() if "relative_position" not in k and "lambda_" not in k}
    vit["embeddings.position_embeddings"] = torch.randn(1, 10, 24)
    for i in range(2):
        vit[f"encoder.layer.{i}.attention.attention.key.bias"] = torch.randn(24)
    save_file(vit, tmp_path / "vit.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="must be a BEiT, got a plain ViT"):
        load_backbone(tmp_path / "vit.safetensors")


def test_canonical_names_are_timms_and_values_are_untouched(tmp_path: Path) -> None:
    model = unilm(per_block=True, cls_pt_layers=1)
    state = canonical_state_dict({"model": prefixed(model.state_dict(), "module.")})
    source = {key: value for key, value in model.state_dict().items() if "index" not in key}
    assert weight_hash(state) == weight_hash(source)
    huggingface(tmp_path / "4", v5=False, eps=1e-12, masked=True)
    huggingface(tmp_path / "5", v5=True, eps=1e-12, masked=True)
    v4, v5 = (canonical_state_dict(load_file(tmp_path / v / "model.safetensors")) for v in "45")
    assert weight_hash(v4) == weight_hash(v5)
    assert set(v4) == set(canonical_state_dict(unilm().state_dict()))


def test_weight_hash_sees_every_name_dtype_shape_and_byte_but_not_order_or_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(4, dtype=torch.bfloat16)
    reference = weight_hash({"a": a, "b": b})
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", reference)
    assert weight_hash({"b": b, "a": a.T.contiguous().T.requires_grad_()}) == reference
    changed = a.clone()
    changed[1, 2] += 1e-6
    for other in (
        {"a": a},
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a.view(torch.int32), "b": b},
        {"a": changed, "b": b},
        {"b": a, "a": b},
    ):
        assert weight_hash(other) != reference
    assert weight_hash({"x": torch.zeros(0), "y": torch.tensor(1.0)}) != weight_hash({"y": torch.tensor(1.0)})


def test_report_lines_say_what_was_dropped_missing_and_resized(tmp_path: Path) -> None:
    path = save_unilm(unilm(per_block=True, cls_pt_layers=2), tmp_path / "beitv2_x.pth")
    lines = load_backbone(path, img_size=20).report.lines()
    rows = dict(lines)
    assert rows["source"] == str(path) and rows["format"] == "unilm"
    assert rows["architecture"] == "2 blocks, 24 wide, 3 heads of 8, MLP 40, LayerScale"
    assert rows["input"] == "3 x 20 x 20, patch 4, window 5 x 5"
    assert rows["position"] == "relative bias per block, relative bias shared by all blocks"
    assert rows["LayerNorm eps"] == "1e-06" and rows["missing"] == "nothing"
    # names of all blocks fold into one
    assert "blocks.*.attn.relative_position_index (2)" in rows["dropped"] and "cls_pt_layers.* (" in rows["dropped"]
    assert "blocks.*.attn.relative_position_bias_table (28, 3) to (84, 3)" in rows["resized"]
    assert any(label == "note" and "window 3 x 3 resized to 5 x 5" in text for label, text in lines)
    assert all("\n" not in text for _, text in lines)


def test_plain_pickle_with_code_is_named_and_not_run(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A pickle written without torch is refused by what it would call, in one line and without a warning."""
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    path = tmp_path / "code.pth"
    path.write_bytes(pickle.dumps({"model": Bomb()}))
    with pytest.raises(ValueError, match=r"is a plain pickle that calls \w+\.system; nothing was run") as refusal:
        load_backbone(path)
    assert "\n" not in str(refusal.value) and not marker.exists() and not recwarn.list


def test_a_flipped_bit_is_refused_or_changes_no_weight(tmp_path: Path) -> None:
    """Fails if weights can differ from the file that was written: `torch.load` reads past the archive's checksums."""
    path = save_unilm(unilm(), tmp_path / "x.pth")
    whole = path.read_bytes()

    def weights() -> str:
        loaded = load_backbone(path)
        assert loaded.lm_head is not None and loaded.mask_token is not None
        return weight_hash(
            loaded.backbone.state_dict() | loaded.lm_head.state_dict() | {"mask_token": loaded.mask_token}
        )

    expected, refused = weights(), 0
    # the values of the first and of another tensor, then anywhere
    values = [whole.index(t.numpy().tobytes()) + 9 for t in (unilm().cls_token.data, unilm().lm_head.weight.data)]
    places = [*values, *random.Random(0).sample(range(len(whole)), 38)]
    for number, place in enumerate(places):
        content = bytearray(whole)
        content[place] ^= 1 << number % 8
        path.write_bytes(content)
        try:
            assert weights() == expected, f"bit {number % 8} of byte {place} changed a weight without a word"
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert number > 1, "a changed weight must be refused"
    assert refused > 20


def test_archives_without_checksums_load_and_compressed_ones_are_refused(tmp_path: Path) -> None:
    """torch can leave checksums out; a compressed archive cannot be mapped and would be called damaged."""
    path = tmp_path / "x.pth"
    torch.serialization.set_crc32_options(False)
    try:
        save_unilm(unilm(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    expected = weight_hash(load_backbone(save_unilm(unilm(), tmp_path / "y.pth")).backbone.state_dict())
    assert weight_hash(load_backbone(path).backbone.state_dict()) == expected
    with zipfile.ZipFile(tmp_path / "y.pth") as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    with pytest.raises(ValueError, match=r"must be an archive as torch\.save writes it, y/data\.pkl in it is compres"):
        load_backbone(path)


def test_no_file_can_hang_the_loader_or_claim_memory_it_does_not_hold(tmp_path: Path) -> None:
    """A mapping that holds itself, a value repeated to any shape, a pipe nobody writes to, values nested for ever."""
    path = tmp_path / "x.pth"
    loop: dict[str, Any] = {}
    loop["model"] = {"module": loop}
    state = unilm().state_dict()
    huge = torch.ones(1).expand(10**12)
    for content, match in (
        (loop, "'module' holds the mapping it stands in"),
        (state | {"norm.bias": huge}, r"norm\.bias must have a value for each of its 1000000000000 places, got 1"),
        (
            state | {"norm.bias": torch.ones(24).as_strided((10**6, 24), (0, 1))},
            r"a value for each of its 24000000 places, got 24",
        ),
        (state | {"k" * 100_000: torch.ones(1)}, "got unknown kkk"),
    ):
        torch.save(content, path)
        assert path.stat().st_size < 500_000
        with pytest.raises(ValueError, match=match) as refusal:
            load_backbone(path)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) <= 500
    for name in ("pipe.pth", "pipe.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="must be a file or a folder, got a pipe"):
            load_backbone(tmp_path / name)
    for source in ("", "x" * 100_000, "x/" * 50_000, "a\0b", "\udcff.pth"):
        with pytest.raises((ValueError, FileNotFoundError)) as refusal:
            load_backbone(source)
        assert len(str(refusal.value)) <= 500
    huggingface(tmp_path, v5=False, eps=1e-12, masked=True)
    for raw in (b"[" * 100_000, b"\xff\xfe", b"1" * 10_000):
        (tmp_path / "config.json").write_bytes(raw)
        with pytest.raises(ValueError, match=r"config\.json must be JSON") as refusal:
            load_backbone(tmp_path)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "value", [None, -1, True, "x", [], [None], {}, 10**400, float("nan"), "DELETED"], ids=lambda v: repr(v)[:9]
)
def test_no_value_of_the_metadata_escapes_as_another_error(value: Any, tmp_path: Path) -> None:
    """Each entry in turn: the file loads or is refused in one line; fails if KeyError, TypeError, ... come out."""
    path = tmp_path / "x.safetensors"
    tensors = write_vptm(path)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["vptm"])
    for section in (None, "architecture"):
        for name in facts if section is None else facts["architecture"]:
            changed = json.loads(json.dumps(facts))
            place = changed if section is None else changed[section]
            if value == "DELETED":
                del place[name]
            else:
                place[name] = value
            save_file(tensors, path, metadata={"format": "vptm", "vptm": json.dumps(changed)})
            try:
                load_backbone(path)
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) <= 500


def test_preprocessing_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """Fails if an unknown interpolation is read as bicubic, or a crop of nonsense as none."""
    huggingface(tmp_path, v5=False, eps=1e-12, masked=True)
    path = tmp_path / "preprocessor_config.json"
    for change, match in (
        ({"resample": 9}, "resample must be one of 0, 1, 2, 3, 4, 5, got 9"),
        ({"do_center_crop": True, "size": "large"}, "size must be a positive number, got 'large'"),
        ({"image_std": [True] * 3, "image_mean": [0.5] * 3}, "image_std must be finite numbers"),
    ):
        path.write_text(json.dumps(change))
        with pytest.raises(ValueError, match=match):
            load_backbone(tmp_path)
    write_vptm(tmp_path / "x.safetensors", interpolation="cubic")
    with pytest.raises(ValueError, match=r"interpolation must be one of nearest, .*, got 'cubic'"):
        load_backbone(tmp_path / "x.safetensors")
