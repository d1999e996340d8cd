"""Files of EVA-02 and DINOv3, under timm's names and their repositories', compute what timm computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from beit_factory import randomize
from safetensors.torch import save_file
from timm.models.eva import Eva
from tiny_models import relative_error, tiny_vit

import vptm
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
