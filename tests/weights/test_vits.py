"""Every way in for a ViT's weights computes what its own library computes, and what does not fit is refused."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from beit_factory import randomize, tiny_beit
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from tiny_models import relative_error, tiny_vit
from torch import Tensor, nn

import vptm
from vptm.models.adapter_loading import load_on
from vptm.models.opening import kind_of, open_model
from vptm.weights.beits import load_backbone
from vptm.weights.vits import LoadedViT, load_vit

State = dict[str, Tensor]
NORM = partial(nn.LayerNorm, eps=1e-6)
# heads of 64, as nothing in these files tells another number
PLAIN: dict[str, Any] = {"embed_dim": 64, "num_heads": 1, "depth": 2, "num_classes": 3, "norm_layer": NORM}


def vit(window: tuple[int, int] = (3, 3), seed: int = 0, **options: Any) -> Any:
    """A ViT whose values are few bits long, so that what a conversion adds up is exact."""
    model = tiny_vit(window, seed=seed, **{**PLAIN, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 64).round() / 64)
    return model


def images_for(loaded: LoadedViT) -> Tensor:
    return torch.randn(2, *loaded.default_cfg["input_size"], generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_is(loaded: LoadedViT, expected: Callable[[Tensor, torch.dtype], Tensor]) -> None:
    """Features, prefix first, within rounding in both types, and finite variation in them."""
    images = images_for(loaded)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        features = loaded.backbone.to(dtype).forward_features(images.to(dtype))
        wanted = expected(images.to(dtype), dtype)
        assert wanted.std() > 0.1, "an output without variation hides mistakes"
        assert relative_error(features, wanted) <= bound
    loaded.backbone.float()


def of_timm(model: Any) -> Callable[[Tensor, torch.dtype], Tensor]:
    return lambda images, dtype: copy.deepcopy(model).to(dtype).forward_features(images)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def without(state: State, *starts: str) -> State:
    return {key: value for key, value in state.items() if not key.startswith(starts)}


def mae(state: State) -> dict[str, Any]:
    """As MAE's `mae_visualize_vit_base.pth`: the decoder is as wide as the encoder here, which its names must tell."""
    decoder = {"mask_token": torch.ones(1, 1, 64), "decoder_pos_embed": torch.ones(1, 10, 64)}
    decoder |= prefixed(without(state, "head", "pos_embed", "cls"), "decoder_")
    return {"model": without(state, "head") | decoder}


def moco(state: State) -> dict[str, Any]:
    head = {"head.0.weight": torch.ones(5, 64), "head.1.running_mean": torch.ones(5)}
    both = prefixed(state | head, "module.momentum_encoder.") | {"module.predictor.0.weight": torch.ones(2, 2)}
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": prefixed(without(state, "head") | head, "module.base_encoder.") | both,
        "optimizer": {},
        "scaler": {},
    }


def dino(state: State) -> dict[str, Any]:
    head = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    teacher = prefixed(without(state, "head"), "backbone.") | head
    student = {f"module.{key}": torch.zeros_like(value) for key, value in teacher.items()}
    return {"student": student, "teacher": teacher, "epoch": 1, "args": argparse.Namespace(lr=1), "dino_loss": {}}


def dinov2(state: State, *, chunks: bool = False) -> State:
    """As DINOv2 writes it: a position for the class token, none for registers, a mask token, other names of SwiGLU."""
    out = without(state, "head", "reg_token")
    out["mask_token"] = torch.ones(1, 64)
    if "reg_token" in state:
        first = torch.full((1, 1, 64), 0.25)
        out |= {"register_tokens": state["reg_token"], "cls_token": state["cls_token"] - first}
        out["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
    if state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]:
        out = {key.replace(".fc1.", ".w12.").replace(".fc2.", ".w3."): value for key, value in out.items()}
    return {key.replace("blocks.", "blocks.0.", int(chunks)): value for key, value in out.items()}


def deit3(state: State) -> dict[str, Any]:
    renamed = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): state[key] for key in state}
    return {"model": renamed}


SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 3.0}
REGISTERS = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
# how a repository writes its weights, the timm model they are, and what the report calls the format
REPOSITORIES: dict[str, tuple[Callable[[State], Any], dict[str, Any], str]] = {
    "supervised": (lambda state: state, {}, "timm"),
    "timm's train.py": (lambda state: {"state_dict": state, "arch": "vit", "epoch": 1, "metric": 0.5}, {}, "timm"),
    "MAE": (mae, {}, "timm"),
    "MAE, fine-tuned": (lambda state: {"model": state}, {"global_pool": "avg"}, "timm"),
    "MoCo-v3": (moco, {}, "moco-v3"),
    "DINO": (dino, {}, "timm"),
    "DINOv2": (dinov2, {"init_values": 1e-5}, "dinov2"),
    "DINOv2 with registers": (dinov2, REGISTERS, "dinov2"),
    "DINOv2 giant": (dinov2, REGISTERS | SWIGLU, "dinov2"),
    "DINOv2 training": (
        lambda state: {"teacher": prefixed(dinov2(state, chunks=True), "backbone.") | {"dino_head.x": torch.ones(1)}},
        REGISTERS,
        "dinov2",
    ),
    "DeiT-III": (deit3, {"no_embed_class": True, "init_values": 1e-5}, "timm"),
    "DeiT, distilled": (lambda state: {"model": state}, {"cls": VisionTransformerDistilled}, "timm"),
    "no biases": (lambda state: state, {"qkv_bias": False, "proj_bias": False}, "timm"),
    "SigLIP": (lambda state: state, {"class_token": False, "global_pool": "map"}, "timm"),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_files_of_every_repository_compute_what_it_computes(name: str, tmp_path: Path) -> None:
    """A tensor that is lost, renamed wrongly or taken from the wrong tower changes the features."""
    write, options, form = REPOSITORIES[name]
    model = vit(**options)
    path = tmp_path / "weights.pth"
    torch.save(write(model.state_dict()), path)
    loaded = load_vit(path)
    report = loaded.report
    assert (report.format, report.missing, dict(report.resized or {})) == (form, (), {})
    assert loaded.pretrained and not loaded.backbone.training
    assert kind_of(path) == kind_of(model) == ("pooled_vit" if name == "SigLIP" else "vit")
    assert any(key in note for note in report.notes for key in ("1 heads",)), "an assumed number of heads is told"
    assert all("\n" not in line for row in report.lines() for line in row)
    assert_is(loaded, of_timm(model))
    if name == "MAE":
        assert {"mask_token", "decoder_pos_embed", "decoder_norm.weight"} <= set(report.dropped)
    if name == "DINO":
        assert "student" in report.dropped and "head.mlp.0.weight" in report.dropped
    if "DINOv2" in name:
        assert loaded.mask_token is not None and torch.equal(loaded.mask_token, torch.ones(1, 1, 64))
    else:
        assert loaded.mask_token is None
    classes = "head.weight" in model.state_dict() and name in ("supervised", "SigLIP", "DeiT, distilled")
    assert loaded.report.architecture["num_classes"] == 3 or not classes


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "model.": lambda s: {"state_dict": prefixed(s, "model."), "pytorch-lightning_version": "2.6", "callbacks": {}},
    "module": lambda s: {"module": prefixed(s, "module."), "scheduler": {}},
    "model_state_dict": lambda s: {"model_state_dict": s, "epoch": 1},
    "net": lambda s: {"net": s},
    "student": lambda s: {"student": s},
    "ema": lambda s: {"ema": {"module": s}},
    "numpy's best accuracy": lambda s: {"model": s, "best_acc": np.float64(0.9), "step": np.int64(3)},
    "beside the weights": lambda s: {**s, "best_acc": np.float32(0.9)},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
}


@pytest.mark.parametrize("family", ["vit", "beit"])
def test_wrappers_come_off_for_both_families(family: str, tmp_path: Path) -> None:
    """Fails where a wrapper that loads for one family is refused for the other, or `kind_of` does not look inside."""
    source: Any = vit() if family == "vit" else tiny_beit((3, 3))
    path = tmp_path / "weights.pth"
    for name, wrap in WRAPPERS.items():
        torch.save(wrap(source.state_dict()), path)
        assert kind_of(path) == ("vit" if family == "vit" else "classifier_beit"), name
        loaded: Any = load_vit(path) if family == "vit" else load_backbone(path)
        images = torch.randn(1, *loaded.default_cfg["input_size"], generator=torch.Generator().manual_seed(1))
        assert torch.equal(loaded.backbone.forward_features(images), source.forward_features(images)), name


def save_hf(kind: str, folder: Path, **options: Any) -> Any:
    """A random model of transformers in `folder`, tokens and positions few bits long."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"image_size": 12, "patch_size": 4}
    sizes |= {} if kind.startswith("Dinov2") else {"intermediate_size": 40}
    cls = {"ViTMAE": "ViTMAEModel", "ViTMAEPreTraining": "ViTMAEForPreTraining"}.get(kind, f"{kind}Model")
    config = getattr(transformers, f"{kind.removesuffix('PreTraining')}Config")
    if kind == "ViTMAEPreTraining":
        options |= {"decoder_hidden_size": 24, "decoder_num_attention_heads": 3, "decoder_num_hidden_layers": 1}
        options |= {"decoder_intermediate_size": 24}
    model = getattr(transformers, cls)(config(**{**sizes, **options})).eval()
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token" in name or "position" in name:
                parameter.copy_((parameter * 64).round() / 64)
    model.save_pretrained(folder)
    return model


HUGGINGFACE: dict[str, dict[str, Any]] = {
    "ViT": {},
    "ViT eps": {"layer_norm_eps": 1e-2, "qkv_bias": False, "hidden_act": "gelu_new"},
    "ViTMAE": {"mask_ratio": 0.0},
    "ViTMAEPreTraining": {"mask_ratio": 0.0},
    "ViTMSN": {},
    "DeiT": {},
    "IJepa": {},
    "Dinov2": {},
    "Dinov2 giant": {"use_swiglu_ffn": True},
    "Dinov2WithRegisters": {},
    "CLIPVision": {},
    "SiglipVision": {},
}


@pytest.mark.parametrize("name", HUGGINGFACE)
@torch.no_grad()
def test_hugging_face_folders_compute_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """Rows of the last hidden state, in double precision too: fails on a wrong name, eps, activation or position."""
    kind = name.partition(" ")[0]
    model = save_hf(kind, tmp_path, **HUGGINGFACE[name])
    loaded = load_vit(tmp_path)
    assert loaded.report.format == "huggingface"
    assert kind_of(str(tmp_path)) == {"SiglipVision": "pooled_vit", "IJepa": "classless_vit"}.get(kind, "vit")
    assert loaded.report.architecture["num_heads"] == 3

    def features(images: Tensor, dtype: torch.dtype) -> Tensor:
        own = copy.deepcopy(model).to(dtype)
        inner = own.vit if kind == "ViTMAEPreTraining" else own
        noise = {"noise": torch.arange(9).expand(2, 9)} if kind.startswith("ViTMAE") else {}  # keeps the order
        states = inner(images, **noise).last_hidden_state
        return inner.post_layernorm(states) if kind == "CLIPVision" else states

    assert_is(loaded, features)
    if kind == "SiglipVision":
        images = images_for(loaded)
        pooled = loaded.backbone.forward_head(loaded.backbone.forward_features(images), pre_logits=True)
        assert relative_error(pooled, model(images).pooler_output) <= 1e-5
    if kind == "Dinov2":  # its own masked forward, at the patch that is read
        prompted = open_model(str(tmp_path), 2, readout="mask", prompt_length=0)
        images, masked = images_for(loaded), torch.arange(9).expand(2, 9) == 4
        rows = model(images, bool_masked_pos=masked).last_hidden_state
        assert relative_error(prompted.forward_hidden(images), rows[:, 1 + 4]) <= 1e-5
        prompted = open_model(str(tmp_path), 2, readout="mask", verbalizer="prototypical", prompt_length=3)
        vptm.save_adapter(prompted, tmp_path / "adapter")
        again = vptm.load_adapter(tmp_path / "adapter")
        assert torch.equal(again(images), prompted.eval()(images)), "the mask token is not in the adapter"
        assert "mask_token" not in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert torch.equal(load_on(prompted, tmp_path / "adapter")(images), prompted(images))
    # the names of the modules as they are in memory, which transformers 5 changed
    torch.save(model.state_dict(), tmp_path / "other.bin")
    if kind in ("CLIPVision", "SiglipVision"):
        (tmp_path / "alone").mkdir()
        torch.save(model.state_dict(), tmp_path / "alone" / "x.bin")
        with pytest.raises(ValueError, match=r"config\.json must be beside weights of CLIP or SigLIP"):
            load_vit(tmp_path / "alone" / "x.bin")
    if name != "Dinov2 giant":
        again = load_vit(tmp_path / "other.bin")
        images = images_for(loaded)
        assert torch.equal(again.backbone.forward_features(images), loaded.backbone.forward_features(images))


@torch.no_grad()
def test_data2vec_is_a_beit(tmp_path: Path) -> None:
    """A classifier has the norm of its pooler; a base model has none, which is told and not hidden."""
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    options |= {"image_size": 12, "patch_size": 4, "use_relative_position_bias": True, "num_labels": 3}
    config = transformers.Data2VecVisionConfig(**options)
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    for name in ("Data2VecVisionForImageClassification", "Data2VecVisionModel"):
        model = getattr(transformers, name)(config).eval()
        randomize(model)
        model.save_pretrained(tmp_path)
        loaded = load_backbone(tmp_path)
        assert kind_of(str(tmp_path)) == "classifier_beit" and loaded.report.format == "huggingface"
        own = loaded.backbone
        if name.endswith("Model"):
            assert {"norm.weight", "norm.bias"} <= set(loaded.report.missing)
            assert any("base model" in note for note in loaded.report.notes)
            own.norm = nn.Identity()
            assert relative_error(own.forward_features(images), model(images).last_hidden_state) <= 1e-5
            continue
        for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            pooled = model.to(dtype).data2vec_vision(images.to(dtype)).pooler_output
            features = own.to(dtype).forward_features(images.to(dtype))
            assert relative_error(own.forward_head(features, pre_logits=True), pooled) <= bound
    with pytest.raises(ValueError, match=r"must be a ViT, got a BEiT.*: use PromptedBEiT"):
        load_vit(tmp_path)


def save_npz(model: Any, path: Path, layout: str = "original", **more: np.ndarray) -> None:
    """As Google's repositories write a ViT: kernels transposed, heads apart, blocks one by one or stacked."""
    state = {name: value.detach().double().numpy().astype(np.float32) for name, value in model.state_dict().items()}
    heads, big = model.blocks[0].attn.num_heads, layout != "original"
    width = model.embed_dim

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(name: str) -> dict[str, np.ndarray]:
        first, second, mlp = (
            ("LayerNorm_0", "LayerNorm_1", "MlpBlock_0") if big else ("LayerNorm_0", "LayerNorm_2", "MlpBlock_3")
        )
        mha = f"MultiHeadDotProductAttention_{0 if big else 1}"
        parts: dict[str, dict[str, np.ndarray]] = {first: norm(f"{name}.norm1"), second: norm(f"{name}.norm2")}
        weight, bias = state[f"{name}.attn.qkv.weight"], state[f"{name}.attn.qkv.bias"]
        for k, part in enumerate(("query", "key", "value")):
            rows = slice(k * width, (k + 1) * width)
            kernel = weight[rows].T.reshape(width, heads, -1)
            parts[f"{mha}/{part}"] = {"kernel": kernel, "bias": bias[rows].reshape(heads, -1)}
        out = state[f"{name}.attn.proj.weight"].T.reshape(heads, -1, width)
        parts[f"{mha}/out"] = {"kernel": out, "bias": state[f"{name}.attn.proj.bias"]}
        parts |= {f"{mlp}/Dense_{k}": linear(f"{name}.mlp.fc{k + 1}") for k in (0, 1)}
        return {f"{part}/{kind}": value for part, values in parts.items() for kind, value in values.items()}

    arrays: dict[str, np.ndarray] = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        ("pos_embedding" if big else "Transformer/posembed_input/pos_embedding"): state["pos_embed"],
        **{f"Transformer/encoder_norm/{kind}": value for kind, value in norm("norm").items()},
    }
    if "cls_token" in state:
        arrays["cls"] = state["cls_token"]
    if "head.weight" in state:
        arrays |= {f"head/{kind}": value for kind, value in linear("head").items()}
    blocks = [block(f"blocks.{k}") for k in range(len(model.blocks))]
    if layout == "stacked":
        arrays |= {f"Transformer/encoderblock/{name}": np.stack([one[name] for one in blocks]) for name in blocks[0]}
    else:
        arrays |= {f"Transformer/encoderblock_{k}/{name}": one[name] for k, one in enumerate(blocks) for name in one}
    if "attn_pool.latent" in state:
        pool, rows = "attn_pool", "MAPHead_0/MultiHeadDotProductAttention_0"
        arrays["MAPHead_0/probe"] = state[f"{pool}.latent"]
        kv = {kind: np.split(state[f"{pool}.kv.{kind}"], 2) for kind in ("weight", "bias")}
        parts = {"query": (state[f"{pool}.q.weight"], state[f"{pool}.q.bias"])}
        parts |= {part: (kv["weight"][k], kv["bias"][k]) for k, part in enumerate(("key", "value"))}
        for part, (weight, bias) in parts.items():
            arrays[f"{rows}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{rows}/{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{rows}/out/kernel"] = state[f"{pool}.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{rows}/out/bias"] = state[f"{pool}.proj.bias"]
        arrays |= {f"MAPHead_0/LayerNorm_0/{kind}": value for kind, value in norm(f"{pool}.norm").items()}
        for k in (0, 1):
            dense = linear(f"{pool}.mlp.fc{k + 1}")
            arrays |= {f"MAPHead_0/MlpBlock_0/Dense_{k}/{kind}": value for kind, value in dense.items()}
    prefix = {"original": "", "big_vision": "params/"}.get(layout, "params/img/")
    np.savez(path, **{prefix + name: value for name, value in arrays.items()}, **more)


@pytest.mark.parametrize("layout", ["original", "big_vision", "stacked", "SigLIP"])
def test_googles_npz_computes_what_timm_loads_from_it(layout: str, tmp_path: Path) -> None:
    """The number of heads is in the file: 2 of 32 here, where width 64 alone would say 1."""
    options = {} if layout == "original" else {"class_token": False, "global_pool": "avg", "fc_norm": False}
    options |= {"global_pool": "map"} if layout == "SigLIP" else {}
    model = vit(num_heads=2, **options)
    save_npz(model, tmp_path / "ViT-T_4.npz", layout, opt_step=np.ones(1))
    loaded = load_vit(tmp_path / "ViT-T_4.npz")
    assert loaded.report.format == "jax" and loaded.report.dropped == ("opt_step",)
    assert loaded.report.architecture["num_heads"] == 2
    kinds = {"original": "vit", "SigLIP": "pooled_vit"}
    assert kind_of(tmp_path / "ViT-T_4.npz") == kinds.get(layout, "classless_vit")
    assert_is(loaded, of_timm(model))
    if layout == "SigLIP":
        features = model.forward_features(images_for(loaded))
        pooled = [one.forward_head(features, pre_logits=True) for one in (loaded.backbone, model)]
        assert relative_error(*pooled) <= 1e-5
    assert loaded.default_cfg["mean"] == (0.5, 0.5, 0.5)
    assert torch.equal(loaded.backbone.head.weight, model.head.weight)


def test_a_classifier_behind_a_representation_layer_is_left(tmp_path: Path) -> None:
    """Without that layer, which timm has no place for, its classifier would read another space."""
    more = {"pre_logits/kernel": np.ones((64, 64), np.float32), "pre_logits/bias": np.ones(64, np.float32)}
    save_npz(vit(), tmp_path / "x.npz", **more)
    report = load_vit(tmp_path / "x.npz").report
    assert report.architecture["num_classes"] == 0 and set(report.dropped) == {*more, "head/bias", "head/kernel"}


@pytest.mark.parametrize("size", [16, (8, 20)])
def test_positions_are_resized_as_timm_resizes_them(size: Any, tmp_path: Path) -> None:
    """Square and not; with and without a position for the class token; from a window that is not square."""
    wanted = (size, size) if isinstance(size, int) else size
    for name in ("supervised", "DINOv2 with registers", "SigLIP"):
        write, options, _ = REPOSITORIES[name]
        model = vit(**options)
        torch.save(write(model.state_dict()), tmp_path / "x.pth")
        loaded = load_vit(tmp_path / "x.pth", img_size=size)
        assert dict(loaded.report.resized or {}).keys() == {"pos_embed"}
        model.set_input_size(wanted)
        images = images_for(loaded)
        assert images.shape[2:] == wanted
        assert torch.equal(loaded.backbone.forward_features(images), model.forward_features(images)), name
    flat = vit((2, 5))
    torch.save(flat.state_dict(), tmp_path / "flat.pth")
    loaded = load_vit(tmp_path / "flat.pth", img_size=(8, 20))
    assert loaded.report.resized == {}
    assert torch.equal(loaded.backbone.forward_features(images_for(loaded)), flat.forward_features(images_for(loaded)))


def test_architecture_says_what_tensors_do_not(tmp_path: Path) -> None:
    """A timm name gives heads, eps and activation: fails where the guess from the width wins."""
    options = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    model = timm.create_model("vit_base_patch32_clip_quickgelu_224", num_classes=4, img_size=64, **options).eval()
    randomize(model)
    state = model.state_dict()
    path = tmp_path / "clip.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match=r"must have all tensors of a ViT of 12 blocks, missing blocks\.2"):
        load_vit(path, architecture="vit_base_patch32_clip_quickgelu_224")
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = {"architecture": "vit_base_patch32_clip_quickgelu_224", "model_args": options, "num_classes": 4}
    config["pretrained_cfg"] = {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.7}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_vit(folder, img_size=64)
    assert loaded.report.format == "timm" and kind_of(str(folder)) == "vit" and loaded.default_cfg["crop_pct"] == 0.7
    images = images_for(loaded)
    assert torch.equal(loaded.backbone.forward_features(images), model.forward_features(images))
    assert not torch.equal(load_vit(path).backbone.forward_features(images), model.forward_features(images))


def test_clips_own_names_need_an_architecture(tmp_path: Path) -> None:
    """OpenAI's and OpenCLIP's names are alike and their activations are not: nothing is guessed."""
    sizes = {"depth": 2, "embed_dim": 64, "num_heads": 2, "patch_size": 4, "img_size": 12}
    name = "vit_base_patch32_clip_quickgelu_224"
    model = timm.create_model(name, num_classes=5, **sizes).eval()
    randomize(model)
    state = dict(model.state_dict())
    with torch.no_grad():
        state["head.bias"].zero_()  # CLIP's projection has none
    named = (
        *(("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("norm1", "ln_1"), ("norm2", "ln_2")),
        *(("norm.", "ln_post."), ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj")),
        *(("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("blocks.", "transformer.resblocks.")),
    )
    clip = {"visual.class_embedding": state.pop("cls_token")[0, 0], "visual.proj": state.pop("head.weight").T}
    clip |= {"visual.positional_embedding": state.pop("pos_embed")[0], "logit_scale": torch.ones(())}
    for key, value in state.items():
        for ours, theirs in named:
            key = key.replace(ours, theirs, 1) if not key.startswith("head") else key
        clip |= {} if key.startswith("head") else {f"visual.{key}": value}
    clip |= {"transformer.resblocks.0.ln_1.weight": torch.ones(3), "token_embedding.weight": torch.ones(3, 3)}
    torch.save(clip, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"architecture must be given for CLIP's own names \(visual\.\*\)"):
        load_vit(tmp_path / "pytorch_model.bin")
    config = {"architecture": name, "model_args": sizes, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_vit(tmp_path)
    assert {"logit_scale", "token_embedding.weight"} <= set(loaded.report.dropped)
    assert_is(loaded, of_timm(model))
    assert relative_error(loaded.backbone(images_for(loaded)), model(images_for(loaded))) <= 1e-5


def test_what_is_opened_trains_as_vpt_and_comes_back(tmp_path: Path) -> None:
    """`open_model` of a file has the defaults of a ViT; its adapter finds the file again."""
    torch.save(vit().state_dict(), tmp_path / "x.pth")
    model = open_model(tmp_path / "x.pth", 2, prompt_length=2)
    settings = tuple(model.config[name] for name in ("prompt_mode", "readout", "verbalizer", "token_activation"))
    assert settings == ("deep", "cls", "linear", "hidden") and model.default_cfg["input_size"] == (3, 12, 12)
    assert max(vptm.check(model, torch.randn(2, 3, 12, 12)).values()) <= 1e-4
    vptm.save_adapter(model, tmp_path / "adapter")
    again = vptm.load_adapter(tmp_path / "adapter")
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(again(images), model.eval()(images)) and again.source == str(tmp_path / "x.pth")
    reads = open_model(tmp_path / "x.pth", 2, token_activation="logits", img_size=(8, 16))
    assert reads.lm_head is not None and reads.lm_head.out_features == 3
    with pytest.raises(TypeError, match="takes no mask_mode for a ViT"):
        open_model(tmp_path / "x.pth", 2, mask_mode="insert")


def damaged(tmp_path: Path) -> dict[str, tuple[Any, str]]:
    state = vit().state_dict()
    return {
        "another family": (tiny_beit().state_dict(), r"must be a ViT, got a BEiT \(.*\): use PromptedBEiT"),
        "a mixture": (
            state | {"blocks.0.attn.q_bias": torch.ones(64)},
            r"must be a ViT, got a BEiT \(blocks\.0\.attn\.q_b",
        ),
        "a block less": (
            without(state, "blocks.0."),
            r"must have blocks\.0\.mlp\.fc1\.weight of 2 dimensions",
        ),
        "a gap": (
            state | {key.replace("blocks.1", "blocks.3"): state[key] for key in state if "blocks.1." in key},
            r"must have blocks 0 to 3, got no 2",
        ),
        "a part of a block": (
            without(state, "blocks.1.mlp.fc2"),
            r"missing blocks\.1\.mlp\.fc2\.weight, blocks",
        ),
        "no final norm": (without(state, "norm."), r"must have all tensors of a ViT of 2 blocks, missing norm\.weight"),
        "something else": ({"conv.weight": torch.ones(2)}, r"must have a patch embedding, .*, got conv\.weight"),
        "unknown tensors": (state | {"extra": torch.ones(2)}, r"must have ViT tensors only, got unknown extra"),
        "another shape": (
            state | {"blocks.1.attn.proj.bias": torch.ones(63)},
            r"blocks\.1\.attn\.proj\.bias must have shape \(64,\), got \(63,\)",
        ),
        "no positions": (without(state, "pos_embed"), r"must have pos_embed, got none: rotary positions"),
        "EVA-02": (
            state | {"blocks.0.mlp.fc1_g.weight": torch.ones(2, 2)},
            r"fc1_g\.weight: rotary positions, as EVA",
        ),
        "odd heads": (
            vit(embed_dim=24, num_heads=3).state_dict(),
            r"number of heads must be told, .*: architecture=",
        ),
        "not square": (
            vit((2, 5)).state_dict(),
            r"img_size must be the \(height, width\) of the weights",
        ),
        "CLIP's names": (
            {"visual.class_embedding": torch.ones(64)},
            r"architecture must be given for CLIP's own",
        ),
        "infinite": (state | {"norm.bias": torch.full((64,), torch.inf)}, r"norm\.bias must be finite"),
    }


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    """Expected, found, and the argument that helps: a traceback of timm's or a model that is silently another fails."""
    path = tmp_path / "x.pth"
    for name, (state, message) in damaged(tmp_path).items():
        torch.save(state, path)
        with pytest.raises(ValueError, match=message) as refusal:
            raise ValueError(f"{name}: loaded {load_vit(path).report}")
        assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value), name
    torch.save(vit().state_dict(), path)
    with pytest.raises(ValueError, match=r"must be a BEiT, got a plain ViT .*: use PromptedViT"):
        load_backbone(path)
    for options, message in (
        ({"img_size": 30}, r"img_size must be multiples of the patch 4 x 4, got \(30, 30\)"),
        (
            {"architecture": "vit_base_patch16_244"},
            "architecture must be a timm name, got .* did you mean 'vit_base_patch16_",
        ),
        ({"architecture": "resnet18"}, "resnet18 is a ResNet"),
        ({"architecture": "vit_tiny_patch16_224"}, r"must have all tensors of a ViT of 12 blocks, missing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_vit(path, **options)
    with pytest.raises(ValueError, match="architecture must be None for a timm name"):
        load_vit("vit_tiny_patch16_224", architecture="vit_tiny_patch16_224")
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such file"):
        load_vit("none.npz")


def test_hugging_face_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_hf("ViT", tmp_path)
    config = tmp_path / "config.json"
    good = json.loads(config.read_text())
    for change, message in (
        ({"model_type": "eva02"}, "must have model_type beit, .*, got 'eva02'"),
        ({"hidden_act": "relu"}, "must have hidden_act gelu, .*, got 'relu'"),
        ({"num_attention_heads": 5}, "must have a number of heads that divides 24, got 5"),
        ({"num_hidden_layers": 3}, r"must have depth 3 \(its config\), the weights have 2"),
        ({"image_size": 16}, r"must have positions of 4 x 4 patches \(img_size \(16, 16\)\), got 10"),
        ({"hidden_size": "24"}, "hidden_size must be a positive integer"),
        ({"patch_size": 2}, "must have patch_size 2 .*, the weights have 4"),
    ):
        config.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message) as refusal:
            load_vit(tmp_path)
        assert "\n" not in str(refusal.value)
    config.write_text(json.dumps(good))
    with pytest.raises(ValueError, match=r"must be a BEiT, got a ViT \(vit\): use PromptedViT or vptm\.open_model"):
        load_backbone(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    save_file(
        {key: value for key, value in state.items() if not key.endswith("0.attention.attention.key.bias")}, weights
    )
    with pytest.raises(
        ValueError, match=r"with biases of queries, keys and values, got blocks\.0\.attn\.q_bias and no k_bias"
    ):
        load_vit(tmp_path)


def test_damaged_npz_is_refused_in_one_line(tmp_path: Path) -> None:
    """Cut, flipped, without an array, with one of another shape, or none of Google's."""
    path = tmp_path / "x.npz"
    save_npz(vit(), path)
    whole = path.read_bytes()
    with np.load(path) as archive:
        arrays = dict(archive)
    place = whole.index(arrays["Transformer/encoder_norm/scale"].tobytes()) + 5
    for content in (b"", whole[:1000], whole[:-1], whole[:place] + b"\xff" + whole[place + 1 :], b"x" * 5000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"must be a whole \.npz archive|is empty") as refusal:
            load_vit(path)
        assert "\n" not in str(refusal.value)
    name = "Transformer/encoderblock_1/LayerNorm_2/scale"
    for changed, message in (
        (
            {key: value for key, value in arrays.items() if key != name},
            "must have all arrays of a ViT of 2 blocks: .*LayerN",
        ),
        (arrays | {name: np.ones(1, np.float32)}, r"must hold \d+ values, those of a ViT of 2 blocks, got"),
        (arrays | {name: np.ones(5, np.float32)}, "must have all arrays of a ViT of 2 blocks"),
        (arrays | {"cls": np.array([object()])}, r"must be a whole \.npz archive"),
        (
            {"cls": np.zeros((1, 1, 192), np.float32)},
            r"must be a ViT of Google's \(embedding/kernel, cls, …\), got cls",
        ),
        (
            arrays | {"embedding/kernel": np.ones((4, 64), np.float32)},
            "must have embedding/kernel of 4 and pos_embedding",
        ),
        (arrays | {"Transformer/encoder_norm/scale": np.full(64, np.nan, np.float32)}, r"norm\.weight must be finite"),
    ):
        np.savez(path, **changed)
        with pytest.raises(ValueError, match=message) as refusal:
            load_vit(path)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) <= 500


class OtherForward(VisionTransformer):
    def forward_features(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return 2 * super().forward_features(x)


def test_a_vision_transformer_by_class_and_not_by_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has a forward_features of its own \(OtherForward\)"):
        load_vit(tiny_vit(cls=OtherForward))
    patched = tiny_vit()
    patched.forward_features = lambda images: images
    with pytest.raises(ValueError, match=r"has a forward_features of its own \(VisionTransformer\)"):
        load_vit(patched)
