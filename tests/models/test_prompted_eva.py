"""PromptedViT on timm's Eva class: rotary positions, against an independent implementation and timm."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import timm
import torch
from naive_prompted_eva import naive_eva_hidden
from timm.layers import LayerNorm
from timm.models.eva import Eva
from tiny_models import HEADS, assert_as_exact_as_the_reference, build_vit, pictures, relative_error, tiny_vit
from torch import nn

import vptm
from vptm import PromptedViT
from vptm.frozen.encoder import FrozenEncoder
from vptm.frozen.fold import linears_of
from vptm_kernels._runtime.triton_support import has_triton

EVA02: dict[str, Any] = {"swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (2, 3)}
DINOV3: dict[str, Any] = {
    "dynamic_img_size": True,
    "qkv_bias": False,
    "init_values": 1e-5,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 2,
    "use_fc_norm": False,
    "norm_layer": partial(LayerNorm, eps=1e-5),
}
# as timm builds each; every parameter is random
FAMILIES: dict[str, dict[str, Any]] = {
    "EVA-02": EVA02,
    "EVA-02, separate projections, norm in the MLP": {**EVA02, "qkv_fused": False, "scale_mlp": True},
    "EVA-02 CLIP": {**EVA02, "scale_mlp": True, "scale_attn_inner": True, "global_pool": "token"},
    "DINOv3": DINOV3,
    "DINOv3 plus": {**DINOV3, "qkv_bias": True, "swiglu_mlp": True, "swiglu_align_to": 8},
    "Perception Encoder": {
        "attn_type": "rope",
        "use_pre_transformer_norm": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (3, 3),
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "global_pool": "map",
        "norm_layer": partial(LayerNorm, eps=1e-5),
    },
    "RoPE-ViT, angles of each block and head": {
        "attn_type": "rope",
        "init_values": 1e-5,
        "global_pool": "token",
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_grid_indexing": "xy",
        "rope_temperature": 10.0,
        "rope_type": "mixed",
    },
    "EVA, no rotary positions": {},
    "multimodal rotary positions": {"use_rot_pos_emb": True, "rope_type": "mrope"},
    "no class token": {**EVA02, "class_token": False, "num_reg_tokens": 1},
    "norms after": {"use_post_norm": True, "global_pool": "token"},
}
# what runs through timm's code and is written down nowhere else
ODD: dict[str, dict[str, Any]] = {
    "query-key norm": {**EVA02, "qk_norm": True},
    "fewer keys than queries": {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "use_rot_pos_emb": True},
}


def tiny_eva(family: str, **kwargs: Any) -> Any:
    return tiny_vit(cls=Eva, **({**FAMILIES, **ODD}[family] | kwargs))


def eps_of(family: str) -> float:
    return 1e-5 if family.startswith(("DINOv3", "Perception")) else 1e-6


def readouts_of(vit: Any) -> list[str]:
    found = ["mean", "mean_with_prompts"] + ["cls"] * (vit.cls_token is not None)
    return found + ["map"] * (vit.attn_pool is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_naive_model(family: str) -> None:
    """Features with prompts, shallow, deep and progressive, of every read-out: fails if prompt or prefix rows are
    turned, if patches are turned by another row's, block's or head's angles, or by another pairing of channels."""
    modes = itertools.cycle(("shallow", "deep", "progressive"))
    for readout in readouts_of(tiny_eva(family)):
        for prompt_mode in (next(modes), next(modes)):
            model = build_vit(
                tiny_eva(family), prompt_mode=prompt_mode, readout=readout, prompt_length=4, progressive_alpha=0.3
            )
            assert FrozenEncoder.supports(model) == (family != "norms after"), model.why_unfolded()
            batch = pictures(model)
            hidden = model.forward_hidden(batch)
            expected = naive_eva_hidden(model, batch, heads=HEADS, eps=eps_of(family))
            assert expected.std() > 0.01 and relative_error(hidden, expected) <= 1e-12, (readout, prompt_mode)
            for tensor, error in vptm.check(model, batch).items():
                assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (readout, prompt_mode, tensor, error)
            weight = model.prompts.weight
            found, wanted = (torch.autograd.grad(one.square().sum(), weight)[0] for one in (hidden, expected))
            assert relative_error(found, wanted) <= 1e-10, (readout, prompt_mode)


@pytest.mark.parametrize("family", [*FAMILIES, *ODD])
def test_without_prompts_it_is_timms_model(family: str) -> None:
    """Features and pooled features are those of timm's own forward, in both precisions; intermediates and attention
    maps go with them."""
    vit = tiny_eva(family)
    twin = copy.deepcopy(vit).double()
    how = {"token": "cls", "avg": "mean", "map": "map"}[twin.global_pool]
    model = build_vit(vit, prompt_length=0, readout=how)
    batch = pictures(model)
    features = twin.forward_features(batch)
    assert relative_error(model.forward_features(batch), features) <= 1e-12
    assert relative_error(model.forward_hidden(batch), twin.forward_head(features, pre_logits=True)) <= 1e-12
    single = PromptedViT(copy.deepcopy(vit), 2, prompt_length=0, readout=how).eval()
    assert relative_error(single.forward_features(batch.float()), vit.forward_features(batch.float())) <= 1e-5
    _, found = model.forward_intermediates(batch, indices=2)
    _, wanted = twin.forward_intermediates(batch, indices=2)
    assert max(map(relative_error, found, wanted)) <= 1e-12
    assert FrozenEncoder.supports(model) == (family not in ODD and family != "norms after")
    attn = twin.blocks[1].attn
    attn.fused_attn = False
    attn.attn_drop = kept = Kept()
    twin.forward_features(batch)
    assert relative_error(model.attention_maps(batch, indices=[1])[0], kept.weights) <= 1e-12


@pytest.mark.parametrize("family", ["EVA-02 CLIP", "DINOv3", "RoPE-ViT, angles of each block and head"])
def test_every_way_to_run_gives_the_same(family: str) -> None:
    """Prompts of every sample, a sealed model, autocast, without prompts: each takes other branches, where a bias of
    prompts' keys, a norm or a table of another length could be left out."""
    for prompt_mode in ("deep", "progressive"):
        drawn = build_vit(tiny_eva(family, depth=2), prompt_mode=prompt_mode, prompt_dropout=0.5).train()
        outputs = {}
        for impl in ("torch", "reference"):
            drawn.impl = impl
            torch.manual_seed(3)
            outputs[impl] = drawn(pictures(drawn, 3))
        assert relative_error(outputs["torch"], outputs["reference"]) <= 1e-12
    model = build_vit(tiny_eva(family, depth=2))
    batch = pictures(model, 5)
    expected = model(batch)
    bare = build_vit(tiny_eva(family, depth=2), prompt_length=0)
    assert relative_error(model.without_prompts().forward_hidden(batch), bare.forward_hidden(batch)) <= 1e-12
    with torch.no_grad():
        sealed = copy.deepcopy(model).freeze_for_inference()
        assert relative_error(sealed(batch), expected) <= 1e-12
        assert relative_error(copy.deepcopy(sealed)(batch), expected) <= 1e-12
    assert all(weight.is_meta for weight in (linear.weight for linear in linears_of(sealed.backbone.blocks[0])))
    single = copy.deepcopy(model).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = single(batch.float())
    assert relative_error(found.double(), expected) <= 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_within_the_error_of_the_reference(dtype: torch.dtype) -> None:
    """Largest error against fp64 at most twice timm's own in that type, plus one eps of the largest value: fails if
    tables are rounded to 16 bits, or LayerScale is folded where it underflows."""
    for family, prompt_mode in itertools.product(("EVA-02 CLIP", "DINOv3"), ("deep", "shallow")):
        model = build_vit(tiny_eva(family, embed_dim=32), prompt_mode=prompt_mode).to(dtype)
        assert_as_exact_as_the_reference(model, pictures(model, 4).to(dtype), (family, prompt_mode))


def test_one_graph_and_one_program_for_every_batch() -> None:
    """fullgraph=True, forward and backward, and export: angles are constants of the graph, and no size is one."""
    model = build_vit(tiny_eva("EVA-02 CLIP", depth=1))
    batch = pictures(model, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 3):
        found, wanted = (
            torch.autograd.grad(run(batch[:size]).square().sum(), model.prompts.weight)[0] for run in (compiled, model)
        )
        assert relative_error(found, wanted) <= 1e-10
    sizes = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (batch,), dynamic_shapes=sizes).module()
    assert relative_error(program(batch[:2]), model(batch[:2])) <= 1e-12


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("family", ["EVA-02 CLIP", "DINOv3 plus"])
def test_triton_kernels_run_the_blocks(family: str) -> None:
    """Asked for by name, Triton runs every block, forward and backward, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("fp64 Triton needs the interpreter, which runs where there is no GPU")
    for prompt_mode in ("deep", "shallow"):
        model = build_vit(tiny_eva(family, embed_dim=32, depth=2), prompt_mode=prompt_mode, impl="triton")
        errors = vptm.check(model, pictures(model))
        assert max(errors.values()) <= 1e-10, errors


def test_what_changes_is_followed() -> None:
    """Frozen angles, gates and inner norms that are edited or hooked, and positions in training that are drawn."""
    family = "RoPE-ViT, angles of each block and head"
    model = build_vit(tiny_eva(family, swiglu_mlp=True, scale_mlp=True))
    batch = pictures(model)
    before = model(batch)
    for name in ("rope.freqs", "blocks.1.mlp.fc1_g.weight", "blocks.0.mlp.norm.bias"):
        with torch.no_grad():
            model.backbone.get_parameter(name).mul_(1.5)
        after = model(batch)
        assert relative_error(after, before) > 1e-4, name
        model.impl = "reference"
        assert relative_error(after, model(batch)) <= 1e-12, name
        model.impl, before = "auto", after
    model.backbone.blocks[1].mlp.act.register_forward_hook(lambda module, given, out: out + 1)
    assert relative_error(model(batch), before) > 1e-4 and model.why_unfolded() == "blocks with hooks"
    drawn = build_vit(tiny_eva("EVA-02", rope_rescale_coords=2.0))
    assert FrozenEncoder.supports(drawn)
    assert max(vptm.check(drawn, pictures(drawn)).values()) <= 1e-10
    drawn.backbone.rope.train()
    assert drawn.why_unfolded() == "rotary positions that are drawn"
    torch.manual_seed(0)
    outputs = [drawn.unfreeze().train()(pictures(drawn)) for _ in range(2)]
    assert relative_error(*outputs) > 1e-6, "timm draws them at every step"


class Kept(nn.Module):
    """In place of the dropout of attention weights, which it keeps."""

    p = 0.0

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        self.weights = weights
        return weights


@pytest.mark.parametrize(
    ("name", "pixels"), [("eva02_tiny_patch14_224", (28, 42)), ("vit_tiny_patch16_dinov3_qkvb", 32)]
)
def test_timm_names_and_adapters(name: str, pixels: Any, tmp_path: Any) -> None:
    """A name builds timm's model at the size asked for; what was learned comes back on the same weights, which the
    adapter knows by their hash; training moves prompts and verbalizer alone."""
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=pixels)
    model = vptm.open_model(vit, 2, prompt_length=2)
    height, width = (pixels, pixels) if isinstance(pixels, int) else pixels
    assert vptm.open_model(name, 2, img_size=pixels).default_cfg["input_size"] == (3, height, width)
    labels = torch.arange(8) % 2
    images = torch.randn(8, 3, height, width) + labels[:, None, None, None]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
    frozen = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    before = model.prompts.weight.detach().clone()
    vptm.fit(model, loader, epochs=1, lr=1e-2)
    assert not torch.equal(model.prompts.weight, before)
    assert all(torch.equal(value, frozen[key]) for key, value in model.backbone.state_dict().items())
    vptm.save_adapter(model, tmp_path / "adapter")
    again = vptm.load_adapter(tmp_path / "adapter", source=vit)
    assert torch.equal(again(images), model.eval()(images))


def test_what_is_no_plain_eva_is_refused_in_one_line() -> None:
    class Windowed(Eva):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x

    for make, message in (
        (lambda: PromptedViT(tiny_vit(cls=Windowed), 2), r"Eva\.forward_features computes, Windowed has .* of its own"),
        (lambda: PromptedViT(tiny_eva("EVA-02", patch_drop_rate=0.1), 2), "patch_drop_rate must be 0"),
        (lambda: PromptedViT(tiny_eva("no class token"), 2), "readout='cls' needs a class token.* use readout='mean'"),
        (lambda: PromptedViT(tiny_eva("EVA-02"), 2, readout="map"), "readout='map' needs the attention pooling"),
        (lambda: PromptedViT(tiny_eva("EVA-02"), 2, readout="mask"), "readout='mask' needs a mask token"),
        (lambda: vptm.PromptedBEiT("eva02_tiny_patch14_224", 2), "is a Eva: use PromptedViT"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            make()
        assert "\n" not in str(refusal.value)
