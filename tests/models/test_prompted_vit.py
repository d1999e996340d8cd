"""PromptedViT against an independent implementation, timm, and its own contract."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from beit_factory import randomize, tiny_beit
from naive_prompted_vit import naive_hidden
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models import vision_transformer
from timm.models.deit import VisionTransformerDistilled
from tiny_models import HEADS, build_vit, pictures, relative_error, tiny_vit
from torch import nn

import vptm
from vptm import PromptedViT
from vptm.frozen.encoder import FrozenEncoder
from vptm.weights.vits import load_vit

# what the weights of each family look like to timm
FAMILIES: dict[str, dict[str, Any]] = {
    "supervised": {},
    "MAE, norm after pooling": {"global_pool": "avg"},
    "CLIP": {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5), "act_layer": "quick_gelu"},
    "DINOv2 with registers": {"init_values": 1e-5, "reg_tokens": 3, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 2},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "mean with prefix": {"reg_tokens": 2, "global_pool": "avg", "pool_include_prefix": True},
    "mean after the norm": {"global_pool": "avg", "fc_norm": False},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "no positions": {"pos_embed": "none"},
    "dynamic size": {"dynamic_img_size": True},
    "DINOv2 giant": {"init_values": 1e-5, "reg_tokens": 3, "no_embed_class": True, "mlp_layer": SwiGLUPacked}
    | {"act_layer": nn.SiLU},
    "SwiGLU of two linears": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "proj_bias": False},
    "BEiT-3": {"scale_attn_norm": True, "scale_mlp_norm": True, "global_pool": "avg"},
    "SwiGLU with norms": {"mlp_layer": SwiGLU, "scale_attn_norm": True, "scale_mlp_norm": True, "act_layer": nn.SiLU},
}


def settings_of(name: str) -> dict[str, Any]:
    """What the naive model has to be told, because no tensor holds it."""
    return {"heads": HEADS} | ({"eps": 1e-5, "kind": "quick"} if name == "CLIP" else {})


@pytest.mark.parametrize("readout", ["cls", "mean", "mean_with_prompts"])
@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_every_family_equals_the_naive_model(prompt_mode: str, readout: str) -> None:
    """Reference and folded path against plain formulas: a wrong row, eps, activation or pooling of any family fails."""
    for (name, family), length in itertools.product(FAMILIES.items(), (0, 4)):
        if readout == "cls" and not family.get("class_token", True):
            continue
        model = build_vit(
            tiny_vit(**family), prompt_mode=prompt_mode, readout=readout, prompt_length=length, progressive_alpha=0.3
        )
        assert FrozenEncoder.supports(model), name
        batch = pictures(model)
        expected = naive_hidden(model, batch, **settings_of(name))
        assert relative_error(model.forward_hidden(batch), expected) <= 1e-12, name
        for tensor, error in vptm.check(model, batch).items():
            assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (name, tensor, error)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_prompts_it_is_timms_model(name: str) -> None:
    """No prompts: features and pooled features are those of timm's own forward."""
    vit = tiny_vit(**FAMILIES[name])
    twin = copy.deepcopy(vit).double()
    model = build_vit(vit, prompt_length=0, readout="cls" if twin.global_pool == "token" else "mean")
    batch = pictures(model)
    features = twin.forward_features(batch)
    assert relative_error(model.forward_features(batch), features) <= 1e-12
    assert relative_error(model.forward_hidden(batch), twin.forward_head(features, pre_logits=True)) <= 1e-12


MAP: dict[str, dict[str, Any]] = {
    "SigLIP": {"class_token": False, "global_pool": "map"},
    "with a class token": {"global_pool": "map", "reg_tokens": 2, "norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    "over the prefix too": {"global_pool": "map", "pool_include_prefix": True},
}


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_attention_pooling_equals_the_naive_model(prompt_mode: str) -> None:
    """readout="map", values and gradients of prompts on both paths: fails if prompts are among its keys, if the prefix
    is where the source does not take it, or if no key and value are projected where that is another function."""
    for (name, family), length in itertools.product(MAP.items(), (0, 4)):
        vit = tiny_vit(**family)
        twin = copy.deepcopy(vit).double()
        model = build_vit(
            vit,
            prompt_mode=prompt_mode,
            readout="map",
            prompt_length=length,
            progressive_alpha=0.3,
            train_lm_head=False,
        )
        assert FrozenEncoder.supports(model), name
        batch, eps = pictures(model), 1e-2 if "norm_layer" in family else 1e-6
        hidden = model.forward_hidden(batch)
        expected = naive_hidden(model, batch, heads=HEADS, eps=eps)
        assert expected.std() > 0.1 and relative_error(hidden, expected) <= 1e-12, name
        for tensor, error in vptm.check(model, batch).items():
            assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (name, tensor, error)
        if not length:
            assert relative_error(hidden, twin.forward_head(twin.forward_features(batch), pre_logits=True)) <= 1e-12
            continue
        weight = model.prompts.weight
        found, wanted = (torch.autograd.grad(one.square().sum(), weight)[0] for one in (hidden, expected))
        assert relative_error(found, wanted) <= 1e-10, name
    sealed = copy.deepcopy(model).freeze_for_inference()
    assert relative_error(sealed(batch), model(batch)) <= 1e-12


def test_an_attention_pooling_of_another_kind_runs_as_the_module_it_is() -> None:
    """A hook on the pooling, a key norm, two latent rows: none may be stepped over."""
    for change in ("hook", "key norm", "latent rows", "kv"):
        vit = tiny_vit(class_token=False, global_pool="map")
        pool = vit.attn_pool
        if change == "hook":
            pool.register_forward_hook(lambda module, given, out: 2 * out)
        elif change == "key norm":
            pool.k_norm = nn.LayerNorm(pool.head_dim)
        elif change == "latent rows":
            pool.latent_len, pool.pool, pool.latent = 2, "avg", nn.Parameter(torch.randn(1, 2, 16))
        else:
            pool.kv.register_forward_hook(lambda module, given, out: out + 1)
        twin = copy.deepcopy(vit).double()
        model = build_vit(vit, prompt_length=0, readout="map")
        assert FrozenEncoder.supports(model)
        batch = pictures(model)
        expected = twin.forward_head(twin.forward_features(batch), pre_logits=True)
        assert relative_error(model.forward_hidden(batch), expected) <= 1e-12, change


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_a_mask_row_equals_the_naive_model(prompt_mode: str) -> None:
    """readout="mask": the mask token in place of the centre patch, with its position; values and gradients, registers
    and sizes that are read as rows and columns too."""
    for family in ({}, {"reg_tokens": 2, "no_embed_class": True}, {"dynamic_img_size": True}):
        loaded = load_vit(tiny_vit((3, 4), **family))
        loaded.mask_token = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2))
        model = build_vit(loaded, prompt_mode=prompt_mode, readout="mask", progressive_alpha=0.3)
        assert FrozenEncoder.supports(model) and not model.mask_token.requires_grad
        batch = pictures(model)
        hidden, expected = model.forward_hidden(batch), naive_hidden(model, batch, heads=HEADS)
        assert relative_error(hidden, expected) <= 1e-12, family
        for tensor, error in vptm.check(model, batch).items():
            assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (family, tensor, error)
        found, wanted = (torch.autograd.grad(one.square().sum(), model.prompts.weight)[0] for one in (hidden, expected))
        assert relative_error(found, wanted) <= 1e-10
        with torch.no_grad():
            model.mask_token += 1  # frozen, yet followed
        assert relative_error(model.forward_hidden(batch), naive_hidden(model, batch, heads=HEADS)) <= 1e-12


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("readout", ["cls", "mean", "mean_with_prompts"])
def test_small_depths(readout: str, depth: int) -> None:
    """One block is first and last at once; two leave nothing in between."""
    for prompt_mode in ("shallow", "deep", "progressive"):
        model = build_vit(tiny_vit(depth=depth, global_pool="avg"), prompt_mode=prompt_mode, readout=readout)
        batch = pictures(model)
        assert relative_error(model.forward_hidden(batch), naive_hidden(model, batch, heads=HEADS)) <= 1e-12
        assert max(vptm.check(model, batch).values()) <= 1e-10


@pytest.mark.parametrize("readout", ["cls", "mean", "mean_with_prompts"])
@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_prompt_dropout_equals_the_reference_under_the_same_seed(prompt_mode: str, readout: str) -> None:
    """Per-sample prompts take other branches of the encoder, which must draw and use the same masks."""
    model = build_vit(prompt_mode=prompt_mode, readout=readout, prompt_dropout=0.5).train()
    outputs = {}
    for impl in ("torch", "reference"):
        model.impl = impl
        torch.manual_seed(3)
        outputs[impl] = model(pictures(model, 3))
    assert relative_error(outputs["torch"], outputs["reference"]) <= 1e-12


def test_prompts_as_a_prefix_would_be_wrong_where_they_are_averaged() -> None:
    """mean_with_prompts may not treat the last block's deep prompts as a prefix: their rows reach the answer."""
    model = build_vit(readout="mean_with_prompts")
    batch = pictures(model)
    with_prompts = model(batch)
    model.readout = "mean"
    assert relative_error(model(batch), with_prompts) > 1e-3


@pytest.mark.parametrize("activation", ["hidden", "logits", "softmax", "log_softmax"])
@pytest.mark.parametrize("verbalizer", ["linear", "prototypical"])
def test_verbalizers_read_the_sources_classifier(verbalizer: str, activation: str) -> None:
    """The verbalizer reads the pooled state, or the classifier of the source, which leaves the backbone."""
    vit = tiny_vit(num_classes=7)
    head = copy.deepcopy(vit.head).double()
    model = PromptedViT(vit, 4, token_activation=activation, verbalizer=verbalizer, prototype_dim=6).double().eval()
    batch = pictures(model)
    hidden = model.forward_hidden(batch)
    read = {"hidden": hidden, "logits": head(hidden), "softmax": head(hidden).softmax(-1)}
    read["log_softmax"] = head(hidden).log_softmax(-1)
    value = read[activation]
    if verbalizer == "linear":
        expected = value @ model.verbalizer.head.weight.T + model.verbalizer.head.bias
    else:
        embedding = nn.functional.normalize(value @ model.verbalizer.projection.weight.T, dim=-1)
        expected = (
            embedding @ nn.functional.normalize(model.verbalizer.prototypes, dim=-1).T / model.verbalizer.temperature
        )
    assert relative_error(model(batch), expected) <= 1e-10
    learned = model.learned_state_dict()
    assert not [name for name in learned if name.startswith(("backbone.", "lm_head."))]


@pytest.mark.parametrize(
    "odd",
    [
        {"mlp_layer": GluMlp},
        {"qk_norm": True},
        {"block_fn": vision_transformer.ResPostBlock},
        {"block_fn": vision_transformer.ParallelScalingBlock},
        {"block_fn": vision_transformer.ParallelThingsBlock},
    ],
    ids=lambda odd: "-".join(getattr(value, "__name__", name) for name, value in odd.items()),
)
def test_blocks_that_do_not_fold_run_through_timms_code(odd: dict[str, Any]) -> None:
    """A block with anything more than the plain parts is never folded; without prompts it is timm's output."""
    vit = tiny_vit(**odd)
    twin = copy.deepcopy(vit).double()
    model = build_vit(vit, prompt_length=0)
    assert not FrozenEncoder.supports(model)
    batch = pictures(model)
    assert relative_error(model.forward_features(batch), twin.forward_features(batch)) <= 1e-12
    model.impl = "triton"
    with pytest.raises(ValueError, match="impl='triton' needs a frozen backbone of plain pre-norm blocks"):
        model(batch)


def test_a_replaced_linear_is_not_folded() -> None:
    """An adapter library's layer in place of a linear must run, not be read as plain weights."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    vit = tiny_vit()
    old = vit.blocks[1].mlp.fc1
    vit.blocks[1].mlp.fc1 = Doubled(old.in_features, old.out_features)
    model = build_vit(vit, prompt_length=0)
    twin = copy.deepcopy(model.backbone)
    batch = pictures(model)
    assert relative_error(model.forward_features(batch), twin.forward_features(batch)) <= 1e-12


def test_distilled_deit_runs_with_both_its_tokens() -> None:
    """A subclass with another prefix gets its own rows."""
    vit = tiny_vit(cls=VisionTransformerDistilled)
    twin = copy.deepcopy(vit).double()
    model = build_vit(vit, prompt_length=0)
    batch = pictures(model)
    assert relative_error(model.forward_features(batch), twin.forward_features(batch)) <= 1e-12
    prompted = build_vit(tiny_vit(cls=VisionTransformerDistilled), prompt_mode="shallow")
    assert relative_error(prompted.forward_hidden(batch), naive_hidden(prompted, batch, heads=HEADS)) <= 1e-12
    with pytest.raises(ValueError, match="does not have exactly one"):
        PromptedViT(tiny_vit(cls=VisionTransformerDistilled, num_classes=3), 2, token_activation="logits")


def test_unfrozen_backbone_trains() -> None:
    """After unfreeze() the gradients of backbone weights are the reference's."""
    model = build_vit(prompt_mode="deep").unfreeze().eval()
    errors = vptm.check(model, pictures(model))
    assert "grad backbone.blocks.0.attn.qkv.weight" in errors and max(errors.values()) <= 1e-10


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep"])
def test_triton_kernels_run_the_blocks(prompt_mode: str) -> None:
    """The Triton path of a ViT, which has no bias, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("fp64 Triton needs the interpreter, which runs where there is no GPU")
    for readout, family in (("mean", {}), ("map", MAP["SigLIP"])):
        vit = tiny_vit((3, 3), embed_dim=32, depth=2, **family)
        model = build_vit(vit, prompt_mode=prompt_mode, readout=readout, impl="triton")
        errors = vptm.check(model, pictures(model))
        assert max(errors.values()) <= 1e-10, errors


def test_compiles_as_one_graph() -> None:
    """fullgraph=True, forward and backward, for several batch sizes."""
    for readout, family in (("mean", {}), ("map", MAP["SigLIP"])):
        torch._dynamo.reset()
        model = build_vit(tiny_vit(depth=2, **family), prompt_mode="deep", readout=readout)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in (5, 3):
            batch = pictures(model, size)
            expected = torch.autograd.grad(model(batch).square().sum(), model.prompts.weight)[0]
            found = torch.autograd.grad(compiled(batch).square().sum(), model.prompts.weight)[0]
            assert relative_error(found, expected) <= 1e-10


def test_attention_pooling_under_autocast() -> None:
    """Its rows are sums of two types then, which may lie in memory in another order than the kernels take."""
    model = build_vit(tiny_vit(**MAP["SigLIP"]), readout="map")
    expected, single = model(pictures(model)), copy.deepcopy(model).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = single(pictures(model).float())
    assert relative_error(found.double(), expected) <= 0.03


def test_exports_for_every_batch_size() -> None:
    """A size read as a Python int anywhere in the model would fix the batch of the exported graph."""
    masked = load_vit(tiny_vit(depth=2))
    masked.mask_token = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2))
    sources = {"mean": tiny_vit(depth=2), "map": tiny_vit(depth=2, **MAP["SigLIP"]), "mask": masked}
    for readout, source in sources.items():
        model = build_vit(source, readout=readout)
        sizes = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
        exported = torch.export.export(model, (pictures(model, 5),), dynamic_shapes=sizes).module()
        assert relative_error(exported(pictures(model, 7)), model(pictures(model, 7))) <= 1e-12, readout


def test_adapter_round_trip(tmp_path: Any) -> None:
    """save_adapter and load_adapter bring back a PromptedViT with the same scores."""
    torch.manual_seed(0)
    vit = tiny_vit()
    model = PromptedViT(copy.deepcopy(vit), 4, prompt_length=2, verbalizer="prototypical", prototype_dim=6)
    randomize(model.prompts)
    vptm.save_adapter(model, tmp_path / "adapter")
    again = vptm.load_adapter(tmp_path / "adapter", source=copy.deepcopy(vit))
    assert isinstance(again, PromptedViT)
    batch = pictures(model).float()
    assert torch.equal(again(batch), model.eval()(batch))
    with pytest.raises(ValueError, match="weight hash"):
        vptm.load_adapter(tmp_path / "adapter", source=tiny_vit(seed=3))


def test_timm_names() -> None:
    """A name builds timm's model at the size asked for, with timm's preprocessing."""
    model = PromptedViT("vit_tiny_patch16_224", 3, prompt_length=1, img_size=(32, 48))
    assert model.default_cfg["input_size"] == (3, 32, 48) and model.num_patches == 6
    assert model.default_cfg["mean"] == (0.5, 0.5, 0.5)
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptedViT("vit_tiny_patch16_2240", 2), "did you mean 'vit_tiny_patch16_224'"),
        (lambda: PromptedViT("resnet18", 2), "resnet18 is a ResNet"),
        (lambda: PromptedViT("beit_base_patch16_224", 2), "is a Beit: use PromptedBEiT"),
        (lambda: PromptedViT(tiny_beit(), 2), "is a Beit: use PromptedBEiT"),
        (
            lambda: PromptedViT(tiny_vit(), 2, readout="masks"),
            "readout must be one of cls, .* did you mean 'mask'",
        ),
        (lambda: PromptedViT(tiny_vit(), 2, readout="mask"), "readout='mask' needs a mask token in the encoder, Vis"),
        (lambda: PromptedViT(tiny_vit(), 2, prompt_mode="deeper"), "prompt_mode must be one of .* did you mean 'deep'"),
        (lambda: PromptedViT(tiny_vit(), 2, prompt_length=-1), "prompt_length must be an integer >= 0, got -1"),
        (lambda: PromptedViT(tiny_vit(), 2, img_size=32), "img_size must be None for an instance"),
        (lambda: PromptedViT(tiny_vit(), 2, token_activation="logits"), "does not have exactly one"),
        (lambda: PromptedViT(tiny_vit(class_token=False, global_pool="avg"), 2), "readout='cls' needs a class token"),
        (lambda: PromptedViT(tiny_vit(**MAP["SigLIP"]), 2), "this backbone has none: use readout='map'"),
        (
            lambda: PromptedViT(tiny_vit(), 2, readout="map"),
            "readout='map' needs the attention pooling .* none: use r",
        ),
        (lambda: PromptedViT(tiny_vit(patch_drop_rate=0.1), 2), "patch_drop_rate must be 0"),
        (
            lambda: PromptedViT("vit_tiny_patch16_224", 2, img_size=30),
            "img_size must be multiples of the patch 16 x 16, got",
        ),
    ],
)
def test_bad_arguments_get_one_clear_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_other_block_classes_are_refused_by_name() -> None:
    class Windowed(vision_transformer.Block):
        pass

    with pytest.raises(ValueError, match="has Windowed"):
        PromptedViT(tiny_vit(block_fn=Windowed), 2)


def test_bad_images_get_one_clear_line() -> None:
    """Wrong size, channels, dtype or device are named before anything runs."""
    model = build_vit()
    for shape in ((2, 3, 8, 8), (2, 1, 8, 12), (3, 8, 12)):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 12\)"):
            model(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(TypeError, match="images must be floating point"):
        model(torch.zeros(2, 3, 8, 12, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"images must have the dtype of the model, torch\.float64"):
        model(torch.zeros(2, 3, 8, 12))
    with pytest.raises(ValueError, match="images must be on the device of the model, cpu, got meta"):
        model(torch.zeros(2, 3, 8, 12, dtype=torch.float64, device="meta"))


def test_fit_trains_prompts_and_head_alone() -> None:
    """`vptm.fit` runs on a PromptedViT: two kinds of pictures are told apart, and no frozen weight moves."""
    torch.manual_seed(0)
    model = PromptedViT(tiny_vit(), 2, prompt_length=2)
    frozen = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    labels = torch.arange(12) % 2
    images = torch.randn(12, 3, 8, 12) + labels[:, None, None, None]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
    vptm.fit(model, loader, epochs=4, lr=1e-2)
    assert vptm.evaluate(model, loader)["accuracy"] > 0.9
    assert all(torch.equal(value, frozen[name]) for name, value in model.backbone.state_dict().items())
