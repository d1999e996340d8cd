"""Files of EVA-02 and DINOv3, under timm's names and their repositories', compute what timm computes, and DINOv3 of
transformers what transformers computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from beit_factory import randomize
from safetensors.torch import load_file, save_file
from timm.models.eva import Eva
from tiny_models import relative_error, tiny_vit

import vptm
from vptm.models.opening import kind_of
from vptm.weights.beits import load_backbone
from vptm.weights.evas import eva_tensors
from vptm.weights.vits import load_vit

EVA02, DINOV3 = "eva02_tiny_patch14_224", "vit_tiny_patch16_dinov3_qkvb"


def made(name: str, **kwargs: Any) -> Any:
    pixels = 28 if name == EVA02 else 32
    model = timm.create_model(name, **({"img_size": pixels, "num_classes": 0} | kwargs))
    randomize(model)
    return model.eval()


def original(model: Any) -> dict[str, torch.Tensor]:
    """As the repository of EVA-02 keeps its masked image modelling, or that of DINOv3 its weights."""
    state = dict(model.state_dict())
    width = model.embed_dim
    if model.reg_token is None:
        for kind in ("weight", "bias"):
            state[f"norm.{kind}"] = state.pop(f"fc_norm.{kind}")
        state["rope.freqs_cos"] = torch.ones(4, 64)
        return {**state, "lm_head.weight": torch.ones(7, width), "mask_token": torch.randn(1, 1, width)}
    found = {"storage_tokens": state.pop("reg_token"), "rope_embed.periods": torch.ones(16)}
    for name, value in state.items():
        if name.endswith("attn.q_bias"):
            place = name.removesuffix("q_bias")
            value = torch.cat([value, torch.zeros(width), state[f"{place}v_bias"]])
            found[f"{place}qkv.bias"], found[f"{place}qkv.bias_mask"] = value, torch.ones_like(value)
        elif not name.endswith("attn.v_bias"):
            found[name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = value
    return {**found, "mask_token": torch.zeros(1, width)}


@pytest.mark.parametrize("name", [EVA02, DINOV3])
def test_files_compute_what_timm_computes(name: str, tmp_path: Path) -> None:
    """A file of timm's and one of the repository: fails where a tensor is renamed wrongly, positions are taken for
    those of another size, or angles are left as memory was."""
    model = made(name, num_classes=5)
    pixels = model.patch_embed.img_size[0]
    images = torch.randn(2, 3, pixels, pixels)
    expected = model.forward_features(images)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    bare = copy.deepcopy(model)
    bare.reset_classifier(0)
    torch.save({"model": original(bare)}, tmp_path / "original.pth")
    for file, classes in (("timm.safetensors", 5), ("original.pth", 0)):
        path = str(tmp_path / file)
        loaded = load_vit(path, architecture=name, img_size=pixels)
        assert relative_error(loaded.backbone.forward_features(images), expected) <= 1e-5, file
        assert loaded.pretrained and loaded.report.architecture["num_classes"] == classes
        assert loaded.default_cfg["mean"] == model.pretrained_cfg["mean"] and not loaded.report.resized
        assert (loaded.mask_token is not None) == (classes == 0)
        if not classes and name == EVA02:
            assert {"lm_head.weight", "rope.freqs_cos", "mask_token"} <= set(loaded.report.dropped)
        prompted = vptm.open_model(path, 3, architecture=name, img_size=pixels, prompt_length=0)
        assert type(prompted) is vptm.PromptedViT and prompted.config["readout"] == "cls"
        assert relative_error(prompted.eval().forward_features(images), expected) <= 1e-5
    vptm.save_adapter(prompted, tmp_path / "adapter")
    assert torch.equal(vptm.load_adapter(tmp_path / "adapter")(images), prompted(images))
    larger = load_vit(str(tmp_path / "original.pth"), architecture=name, img_size=2 * pixels)
    assert larger.backbone.forward_features(torch.randn(1, 3, 2 * pixels, 2 * pixels)).isfinite().all()
    assert set(larger.report.resized) == ({"pos_embed"} if name == EVA02 else set())


def test_the_mask_row_of_eva02_is_read_as_hidden_state(tmp_path: Path) -> None:
    """readout="mask": the mask token stands in place of the centre patch, is turned as that patch, and its hidden row,
    through the norm that the weights bring, is read."""
    model = made(EVA02)
    state = original(model)
    torch.save(state, tmp_path / "mim.pt")
    prompted = vptm.open_model(
        str(tmp_path / "mim.pt"), 3, architecture=EVA02, img_size=28, readout="mask", prompt_length=0
    ).eval()
    images = torch.randn(2, 3, 28, 28)
    hook = model.patch_embed.register_forward_hook(
        lambda module, given, rows: torch.cat([rows[:, :3], state["mask_token"].expand(2, -1, -1)], 1)
    )
    expected = model.fc_norm(model.forward_features(images)[:, 4])
    hook.remove()
    assert relative_error(prompted.forward_hidden(images), expected) <= 1e-5
    assert (prompted.config["token_activation"], prompted.config["verbalizer"]) == ("hidden", "linear")


def save_dinov3(folder: Path, **options: Any) -> Any:
    """A random DINOv3 of transformers, and its folder."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 40, "image_size": 12, "patch_size": 4, "num_register_tokens": 4}
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**(sizes | options))).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


NO_BIAS = {f"{kind}_bias": False for kind in ("query", "value", "proj", "mlp")}
DINOV3_CONFIGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu"},
    "no registers": {"num_register_tokens": 0},
    "another base, heads and eps": {"rope_theta": 7.0, "num_attention_heads": 2, "layer_norm_eps": 0.1},
    "key bias": {"key_bias": True},
    "no biases": NO_BIAS,
    "queries without one": {"query_bias": False},
    "gated without biases": {"use_gated_mlp": True, "hidden_act": "silu", **NO_BIAS},
}


@pytest.mark.parametrize("name", DINOV3_CONFIGS)
@torch.no_grad()
def test_dinov3_of_hugging_face_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """Fails where a name, the rotary base, the number of heads or of registers, an eps, gates or a bias that is not
    there are taken otherwise than config.json says; at another size too, and folded with prompts away."""
    model = save_dinov3(tmp_path, **DINOV3_CONFIGS[name])
    assert kind_of(str(tmp_path)) == "vit"
    for size in (None, (8, 20)):
        loaded = load_vit(tmp_path, img_size=size)
        images = torch.randn(2, *loaded.default_cfg["input_size"], generator=torch.Generator().manual_seed(5))
        expected = model(images).last_hidden_state
        assert expected.std() > 0.1
        assert relative_error(loaded.backbone.forward_features(images), expected) <= 1e-5
        prompted = vptm.open_model(str(tmp_path), 3, img_size=size, prompt_length=0).eval()
        assert prompted.why_unfolded() == "impl='auto'" and prompted.readout == "cls"
        assert relative_error(prompted.forward_features(images), expected) <= 1e-5
    report = load_vit(tmp_path).report
    assert (report.format, report.missing, dict(report.resized or {})) == ("huggingface", (), {})
    assert report.architecture["position"] == "rotary" and report.mean == (0.485, 0.456, 0.406)
    masked = vptm.open_model(str(tmp_path), 3, readout="mask", prompt_length=0).eval()
    images = torch.randn(2, 3, 12, 12)
    rows = model(images, bool_masked_pos=torch.arange(9).expand(2, 9) == 4).last_hidden_state
    first = model.config.num_register_tokens + 1
    assert relative_error(masked.forward_hidden(images), rows[:, first + 4]) <= 1e-5
    prompted = vptm.open_model(str(tmp_path), 3, prompt_length=2).eval()
    vptm.save_adapter(prompted, tmp_path / "adapter")
    assert torch.equal(vptm.load_adapter(tmp_path / "adapter")(images), prompted(images))


@torch.no_grad()
def test_a_file_of_dinov3_alone_is_taken_for_a_published_model(tmp_path: Path) -> None:
    """Under both names that transformers has for its blocks; what is assumed stands in the report."""
    model = save_dinov3(tmp_path, hidden_size=64, num_attention_heads=1)
    (tmp_path / "alone").mkdir()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "alone" / "in_memory.pth")
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "alone" / "saved.safetensors")
    own = {f"dinov3_vit.{name}": value for name, value in model.state_dict().items()}  # as part of a larger model
    torch.save(own, tmp_path / "alone" / "part.pth")
    images = torch.randn(2, 3, 12, 12)
    expected = model(images).last_hidden_state
    for file in ("in_memory.pth", "saved.safetensors", "part.pth"):
        path = str(tmp_path / "alone" / file)
        loaded = load_vit(path, img_size=12)
        assert relative_error(loaded.backbone.forward_features(images), expected) <= 1e-5
        assert any(note.startswith("rotary base 100 and eps 1e-05") for note in loaded.report.notes)
        assert any(note.startswith("1 heads") for note in loaded.report.notes) and kind_of(path) == "vit"
    other = save_dinov3(tmp_path, rope_theta=7.0)
    torch.save(other.state_dict(), tmp_path / "beside.pth")  # a config beside a file tells as one in a folder does
    features = load_vit(tmp_path / "beside.pth").backbone.forward_features(images)
    assert relative_error(features, other(images).last_hidden_state) <= 1e-5


@torch.no_grad()
def test_a_timm_name_says_what_dinov3_of_hugging_face_is(tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    model = save_dinov3(tmp_path, **sizes, patch_size=16, image_size=32)
    images = torch.randn(1, 3, 32, 32)
    loaded = load_vit(tmp_path, architecture=DINOV3)
    assert relative_error(loaded.backbone.forward_features(images), model(images).last_hidden_state) <= 1e-5
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, name, message in (
        ({"num_attention_heads": 6}, DINOV3, rf"must have 6 heads \(its config\), architecture {DINOV3} has 3"),
        ({"rope_theta": 7.0}, DINOV3, rf"must have 7\.0 as rotary base \(its config\), architecture {DINOV3} has 100"),
        (
            {},
            "vit_tiny_patch16_224",
            "architecture must be of timm's Eva class for DINOv3, .*, got vit_tiny_patch16_224",
        ),
        ({}, "resnet18", "resnet18 is a ResNet"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message) as refusal:
            load_vit(tmp_path, architecture=name)
        assert "\n" not in str(refusal.value)


def test_dinov3_folders_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    """What config.json says and the tensors do not, one by one; a tensor that is missing, of another shape or NaN."""
    save_dinov3(tmp_path)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, state = json.loads(path.read_text()), load_file(weights)
    for change, message in (
        ({"hidden_act": "relu"}, "must have hidden_act gelu with use_gated_mlp false, got 'relu'"),
        (
            {"use_gated_mlp": True, "hidden_act": "silu"},
            r"must have swiglu_mlp True \(its config\), the weights have False",
        ),
        ({"use_gated_mlp": "yes"}, "use_gated_mlp must be true or false, got 'yes'"),
        ({"num_register_tokens": 3}, r"must have num_reg_tokens 3 \(its config\), the weights have 4"),
        ({"num_register_tokens": -1}, "num_register_tokens must be an integer >= 0, got -1"),
        ({"num_hidden_layers": 3}, r"must have depth 3 \(its config\), the weights have 2"),
        ({"hidden_size": 32}, "must have embed_dim 32"),
        ({"intermediate_size": 48}, "must have mlp_ratio 2.0"),
        ({"patch_size": 2}, "must have patch_size 2 .*, the weights have 4"),
        ({"image_size": 14}, r"img_size must be multiples of the patch 4 x 4, got \(14, 14\)"),
        ({"num_attention_heads": 5}, "must have a number of heads that divides 24, got 5"),
        ({"num_attention_heads": 4}, "must have heads of a multiple of 4 channels, got 4 heads of 6"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, got -1"),
        ({"key_bias": True}, r"must have attn\.k_bias in every block \(key_bias of its config\), got it in 0 of 2"),
        ({"mlp_bias": False}, r"must have mlp\.fc1_x\.bias in no block \(mlp_bias of its config\), got it in 2 of 2"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message) as refusal:
            load_vit(tmp_path)
        assert "\n" not in str(refusal.value)
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match=r"must be a BEiT, got a ViT \(dinov3_vit\): use PromptedViT"):
        load_backbone(tmp_path)

    def less(*starts: str) -> dict[str, torch.Tensor]:
        return {name: value for name, value in state.items() if not name.startswith(starts)}

    for tensors, message in (
        (
            less("layer.0."),
            r"must have blocks 0 to 1, got no 0|must have blocks\.0\.mlp\.fc1_x\.weight of 2 dimensions",
        ),
        (less("layer.1.mlp.down_proj.weight"), r"missing blocks\.1\.mlp\.fc2\.weight"),
        (less("layer.1.attention.v_proj.bias"), r"must have attn\.v_bias in every block .*, got it in 1 of 2"),
        (less("layer.1.attention.k_proj"), "block 1 must have query, key and value weights, got no key"),
        (less("embeddings.cls_token"), "missing cls_token"),
        (less("embeddings.register"), "must have num_reg_tokens 4"),
        (less("embeddings.patch"), "must have patch_embed.proj.weight of 4 dimensions, got none"),
        (state | {"extra": torch.ones(2)}, "must have ViT tensors only, got unknown extra"),
        (state | {"norm.bias": torch.ones(23)}, r"norm\.bias must have shape \(24,\), got \(23,\)"),
        (state | {"norm.bias": torch.full((24,), torch.nan)}, r"norm\.bias must be finite"),
        (state | {"embeddings.mask_token": torch.ones(1, 1, 7)}, "mask_token must have 24 values"),
    ):
        save_file(tensors, weights)
        with pytest.raises(ValueError, match=message) as refusal:
            load_vit(tmp_path)
        assert str(refusal.value).startswith(f"{tmp_path}: ") and "\n" not in str(refusal.value)
    (tmp_path / "alone").mkdir()
    save_file(state, tmp_path / "alone" / "x.safetensors")
    with pytest.raises(ValueError, match=r"must be a BEiT, got a ViT \(dinov3_vit\)"):
        load_backbone(tmp_path / "alone" / "x.safetensors")
    with pytest.raises(ValueError, match="number of heads must be told"):
        load_vit(tmp_path / "alone" / "x.safetensors")


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    state = made(EVA02).state_dict()
    path = str(tmp_path / "x.pth")
    dinov3 = original(made(DINOV3))
    for tensors, name, message in (
        ({k: v for k, v in state.items() if not k.startswith("blocks.3.")}, EVA02, "missing blocks.3"),
        (state | {"extra": torch.ones(2)}, EVA02, "got unknown extra"),
        (state, DINOV3, r"patch_embed\.proj\.weight must have shape \(192, 3, 16, 16\) as architecture has it"),
        (state, "eva02_small_patch14_224", r"must have shape \(384, 3, 14, 14\)"),
        (state | {"fc_norm.bias": torch.full((192,), torch.nan)}, EVA02, r"fc_norm\.bias must be finite"),
        (dinov3, None, "must be a BEiT or a ViT, got .*: rotary positions, .* need architecture="),
    ):
        torch.save(tensors, path)
        with pytest.raises(ValueError, match=message) as refusal:
            load_vit(path, architecture=name, img_size=None if name is None else 224)
        assert "\n" not in str(refusal.value)
    plain = tiny_vit(cls=Eva, qkv_bias=False, num_reg_tokens=1)
    biased = {"storage_tokens": torch.ones(1, 1, 16), "blocks.0.attn.qkv.bias": torch.ones(48)}
    with pytest.raises(ValueError, match=r"x: architecture must be one with biases .* blocks\.0\.attn\.qkv\.bias that"):
        eva_tensors(biased, plain, "x")
