"""VPT's variants: which blocks have prompts, what happens after them, sharing, projection, placement, dropout order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beit_factory import randomize, tiny_beit
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from tiny_models import build, build_vit, images, pictures, relative_error
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import vptm
from vptm.frozen.encoder import FrozenEncoder

DEPTH, PATCHES = 4, 6
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "first blocks, carried": ("deep", {"blocks": 2}),
    "first blocks, dropped": ("deep", {"blocks": 2, "after": "drop"}),
    "first block alone": ("deep", {"blocks": 1, "after": "drop"}),
    "last blocks": ("deep", {"blocks": -2}),
    "last block alone": ("deep", {"blocks": -1}),
    "shared": ("deep", {"shared": True}),
    "shared by the last": ("deep", {"shared": True, "blocks": -3}),
    "projected": ("deep", {"prompt_dim": 5}),
    "projected, carried": ("shallow", {"prompt_dim": 20}),
    "bilinear": ("deep", {"prompt_dim": 5, "projection_per": "block"}),
    "bilinear, carried": ("shallow", {"prompt_dim": 20, "projection_per": "block"}),
    "bilinear, shared by the last": (
        "deep",
        {"prompt_dim": 5, "projection_per": "block", "shared": True, "blocks": -3},
    ),
    "added once": ("shallow", {"placement": "add"}),
    "added everywhere": ("deep", {"placement": "add"}),
    "added to the first": ("deep", {"placement": "add", "blocks": 2}),
    "added to the last, projected": ("deep", {"placement": "add", "blocks": -2, "prompt_dim": 5}),
    "added everywhere, to the class row": ("deep", {"placement": "add", "added_to": "class_and_patches"}),
    "added once, to the class row": ("shallow", {"placement": "add", "added_to": "class_and_patches"}),
    "progressive, then carried": ("progressive", {"blocks": 3}),
    "progressive, then dropped": ("progressive", {"blocks": 3, "after": "drop"}),
    "progressive at the end": ("progressive", {"blocks": -2}),
}


def added_rows(options: dict[str, Any], prefix: int = 1) -> int:
    """How many rows added prompts are added to."""
    return PATCHES + (prefix if options.get("added_to") == "class_and_patches" else 0)


def length_of(name: str, prefix: int = 1) -> int:
    return added_rows(VARIANTS[name][1], prefix) if "add" in name else 3


def variant(name: str, length: int = 3, **kwargs: Any) -> vptm.PromptedBEiT:
    mode, options = VARIANTS[name]
    options = options | kwargs.pop("prompt_options", {})
    backbone = kwargs.pop("backbone", {})
    beit = tiny_beit(depth=DEPTH, **backbone)
    return build(beit, prompt_mode=mode, prompt_length=length, progressive_alpha=0.3, prompt_options=options, **kwargs)


def naive_row(model: vptm.PromptedBEiT, picture: Tensor) -> Tensor:
    """The class row after the last block for one image, by timm's own blocks and the words of the papers; for a
    backbone without position bias."""
    mode, options, bank = model.config["prompt_mode"], model.config["prompt_options"], model.prompts
    length = model.config["prompt_length"]
    weight = bank.weight if bank.projection is None else bank.weight @ bank.projection.weight.T + bank.projection.bias
    if options.get("projection_per") == "block":
        weight = torch.einsum("lpd,lcd->lpc", bank.weight, bank.basis)
    blocks = options.get("blocks", 1 if mode == "shallow" else DEPTH)
    own = list(range(blocks)) if blocks > 0 else list(range(DEPTH + blocks, DEPTH))
    tokens = torch.cat([model.backbone.cls_token[0], model.backbone.patch_embed(picture[None])[0]])
    rows, gates = tokens[:0], iter([] if bank.gate is None else bank.gate)
    for layer, block in enumerate(model.backbone.blocks):
        prompt = None
        if layer in own:
            prompt = weight[0] if options.get("shared") else weight[own.index(layer)]
        if options.get("placement") == "add":
            if prompt is not None:
                spread = prompt if length > 1 else prompt.expand(added_rows(options), -1)
                tokens = tokens + torch.cat([torch.zeros_like(tokens[len(spread) :]), spread])
        elif prompt is not None:
            mixing = mode == "progressive" and layer != own[0]
            rows = 0.3 * rows + 0.7 * prompt if mixing else prompt
        elif layer > own[-1] and options.get("after") == "drop":
            rows = rows[:0]
        added = None
        if len(rows) and bank.gate is not None:
            gate = next(gates)
            columns = [torch.stack([head[p % len(head)] for p in range(length)]) for head in gate]
            added = torch.stack([torch.cat([torch.zeros(len(tokens)), one]) for one in columns])[None, :, None]
        out = block(torch.cat([tokens, rows])[None], shared_rel_pos_bias=added)[0]
        tokens, rows = out[: len(tokens)], out[len(tokens) :]
    assert next(gates, None) is None, "one gate for every block with prompts, and no more"
    return model.backbone.norm(tokens[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_equals_naive_model(name: str) -> None:
    """One image at a time through timm's own blocks: a prompt in the wrong block, kept or dropped wrongly, fails."""
    lengths = (1, length_of(name)) if "add" in name else (3,)
    for length in lengths:
        backbone = {"use_shared_rel_pos_bias": False}
        model = variant(name, length, backbone=backbone, readout="cls", token_activation="hidden", impl="reference")
        batch = images(model, 2)
        expected = torch.stack([naive_row(model, picture) for picture in batch])
        assert relative_error(model.forward_features(batch)[:, 0], expected) <= 1e-12


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("readout", ["mask", "cls", "mean"])
def test_encoder_equals_reference(name: str, readout: str) -> None:
    """Forward and gradients of the fast path, with every kind of position bias and a learned one, in fp64."""
    for extra_bias in ("zero", "neutral", "learned"):
        model = variant(name, length_of(name), readout=readout, extra_bias=extra_bias)
        assert FrozenEncoder.supports(model)
        for tensor, error in vptm.check(model, images(model)).items():
            assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (extra_bias, tensor, error)


@pytest.mark.parametrize("name", VARIANTS)
def test_vit_encoder_equals_reference(name: str) -> None:
    """The same on a timm VisionTransformer with a register token, read at the class token and as a mean with
    prompts."""
    mode, options = VARIANTS[name]
    for readout in ("cls", "mean", "mean_with_prompts"):
        if readout == "mean_with_prompts" and options.get("after") == "drop":
            continue
        vit = VisionTransformer(
            img_size=(8, 12), patch_size=4, embed_dim=16, depth=DEPTH, num_heads=2, reg_tokens=1, num_classes=0
        )
        model = vptm.PromptedViT(
            vit, 5, prompt_length=length_of(name, 2), prompt_mode=mode, prompt_options=options, readout=readout
        )
        randomize(model, 3)
        model = model.double().eval()
        for tensor, error in vptm.check(model, images(model)).items():
            assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (readout, tensor, error)


ROWS = [name for name in VARIANTS if "added" not in name]  # those whose prompts are among the keys


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("per", ["prompt", "head"])
def test_gates_of_every_variant_equal_the_naive_model(name: str, per: str) -> None:
    """Reference path and fast path by timm's own blocks: fails if a gate is of another block, head or prompt, or misses
    a query, as one of a prompt row, whose gradients then differ."""
    options: dict[str, Any] = {"prompt_gate": -1.0, "prompt_options": {"gate_per": per}}
    backbone = {"use_shared_rel_pos_bias": False}
    model = variant(name, backbone=backbone, readout="cls", token_activation="hidden", **options)
    batch = images(model, 2)
    expected = torch.stack([naive_row(model, picture) for picture in batch])
    learned = model.prompts.weight, model.prompts.gate
    wanted = torch.autograd.grad(expected.square().sum(), learned)
    for impl in ("reference", "torch"):
        model.impl = impl
        hidden = model.forward_hidden(batch)
        assert relative_error(hidden, expected) <= 1e-12
        assert max(map(relative_error, torch.autograd.grad(hidden.square().sum(), learned), wanted)) <= 1e-10
    for readout, extra_bias in (("mask", "neutral"), ("mean", "learned"), ("cls", "zero"), ("mask", "learned")):
        model = variant(name, readout=readout, extra_bias=extra_bias, **options)
        for tensor, error in vptm.check(model, images(model)).items():
            assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (readout, extra_bias, tensor, error)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_dropout_order(name: str, per: str) -> None:
    """Dropped per sample, two copies of an image differ; per batch they agree. Both equal the reference under one
    seed, so the fast path draws as many masks, in the same order, and uses each once."""
    options: dict[str, Any] = {} if "add" in name else {"prompt_gate": -0.5}
    model = variant(name, length_of(name), prompt_dropout=0.5, prompt_options={"dropout_per": per}, **options)
    model.train()
    batch = images(model, 1).expand(3, -1, -1, -1)
    outputs = {}
    for impl in ("torch", "reference"):
        model.impl = impl
        torch.manual_seed(3)
        outputs[impl] = model(batch)
    assert relative_error(outputs["torch"], outputs["reference"]) <= 1e-12
    assert torch.allclose(outputs["torch"][0], outputs["torch"][1]) == (per == "batch")


@given(st.data())
def test_random_variants_run_alike(data: st.DataObject) -> None:
    """Any allowed combination, also those nobody wrote down above, is the reference function."""
    mode = data.draw(st.sampled_from(["shallow", "deep", "progressive"]))
    options: dict[str, Any] = {"prompt_dim": data.draw(st.sampled_from([None, 3, 24]))}
    if options["prompt_dim"] is not None:
        options["projection_per"] = data.draw(st.sampled_from(["model", "block"]))
    if mode != "progressive":
        options["placement"] = data.draw(st.sampled_from(["prepend", "add"]))
        if options["placement"] == "add":
            options["added_to"] = data.draw(st.sampled_from(["patches", "class_and_patches"]))
    if mode != "shallow":
        options["shared"] = data.draw(st.booleans())
        options["blocks"] = data.draw(st.sampled_from([None, 1, 2, 3, 4, -1, -2, -3, -4]))
        if mode == "progressive" and options["blocks"] not in (1, -1):
            options["train_alpha"] = data.draw(st.booleans())
        if (options["blocks"] or 0) > 0:
            options["after"] = data.draw(st.sampled_from(["carry", "drop"]))
    length = data.draw(st.sampled_from([1, added_rows(options)])) if options.get("placement") == "add" else 2
    alpha = data.draw(st.lists(st.floats(0, 1), min_size=3, max_size=3))
    model = build(
        tiny_beit(depth=DEPTH),
        prompt_mode=mode,
        prompt_length=length,
        prompt_options=options,
        progressive_alpha=alpha,
        readout=data.draw(st.sampled_from(["cls", "mask", "mean"])),
        prompt_gate=None if options.get("placement") == "add" else data.draw(st.sampled_from([None, -1.0, 0.0])),
    )
    errors = vptm.check(model, images(model))
    assert max(errors.values()) <= 1e-10, errors


def test_one_alpha_per_block() -> None:
    """The alphas belong to blocks 1 to L - 1: 0 at a block hides everything the prompts were before it."""
    model = build(tiny_beit(depth=DEPTH), prompt_mode="progressive", progressive_alpha=[0.5, 0.0, 1.0])
    batch = images(model)
    rows = torch.randn(2, 3, 16, dtype=torch.float64)
    assert torch.equal(model.prompts(3, 2, rows), rows)
    assert torch.equal(model.prompts(2, 2, rows), model.prompts.weight[2].expand(2, -1, -1))
    assert torch.allclose(model.prompts(1, 2, rows), 0.5 * rows + 0.5 * model.prompts.weight[1])
    assert max(vptm.check(model, batch).values()) <= 1e-10


def test_alpha_zero_is_deep_and_one_is_shallow() -> None:
    """ProVP's two ends, bitwise on the reference path."""
    models = {
        key: build(prompt_mode=mode, progressive_alpha=alpha, impl="reference", readout="cls")
        for key, mode, alpha in (("deep", "deep", 0.0), ("zero", "progressive", 0.0), ("one", "progressive", 1.0))
    }
    batch = images(models["deep"])
    assert torch.equal(models["deep"](batch), models["zero"](batch))
    shallow = build(prompt_mode="shallow", impl="reference", readout="cls")
    state = models["one"].learned_state_dict()
    shallow.load_learned_state_dict({**state, "prompts.weight": state["prompts.weight"][:1]})
    assert relative_error(models["one"](batch), shallow(batch)) <= 1e-14


def test_initial_bounds() -> None:
    """sqrt(6 / (3 * patch^2 + width)) of ViT-B/16, ViT-L/16, ViT-H/14 and of ProVP's code; a projection counts its own
    width and maps with Kaiming's fan-out variance."""
    for patch_values, dim, expected in (
        (768, 768, 0.0625),
        (768, 1024, 0.05786),
        (588, 1280, 0.05667),
        (588, 768, 0.06652),
    ):
        bank = vptm.PromptBank(2, 200, dim, mode="deep", patch_values=patch_values)
        assert float(bank.weight.detach().abs().max()) == pytest.approx(expected, rel=2e-3)
        assert abs(float(bank.weight.detach().mean())) < 1e-3
    bank = vptm.PromptBank(2, 200, 512, mode="deep", patch_values=768, prompt_dim=100)
    assert float(bank.weight.detach().abs().max()) == pytest.approx((6 / 868) ** 0.5, rel=2e-3)
    assert float(bank.projection.weight.detach().std()) == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    bank = vptm.PromptBank(2, 200, 512, mode="deep", patch_values=768, prompt_dim=75, projection_per="block")
    assert bank.weight.shape == (2, 200, 75) and float(bank.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    expected = torch.nn.init.xavier_uniform_(torch.empty(512, 75)).abs().max()
    assert bank.basis.shape == (2, 512, 75)
    assert float(bank.basis.detach().abs().max()) == pytest.approx(float(expected), rel=0.01)


def test_parameter_counts_of_the_papers() -> None:
    """ViT-B: VPT-deep n=100 with 6 classes 926,214, n=5 with 397 classes 351,373; SPT deep
    184,320 and shallow 76,800; ProVP 460,800 and 147,456."""

    def count(mode: str, length: int) -> int:
        return vptm.PromptBank(12, length, 768, mode=mode, patch_values=768).weight.numel()

    def head(classes: int) -> int:
        return sum(parameter.numel() for parameter in vptm.LinearVerbalizer(768, classes).parameters())

    assert count("deep", 100) + head(6) == 926_214 and count("deep", 5) + head(397) == 351_373
    assert count("deep", 20) == 184_320 and count("shallow", 100) == 76_800
    assert count("progressive", 50) == 460_800 and count("progressive", 16) == 147_456


def test_adapters_keep_the_variant(tmp_path: Any) -> None:
    """Options and projection come back with the adapter, and the loaded model is the same function."""
    options = {"blocks": -2, "prompt_dim": 5, "dropout_per": "batch"}
    model = vptm.PromptedBEiT(
        "builtin", 3, prompt_mode="deep", prompt_options=options, progressive_alpha=[0.1, 0.2, 0.3]
    )
    randomize(model.prompts, 4)
    vptm.save_adapter(model, tmp_path / "adapter")
    loaded = vptm.load_adapter(tmp_path / "adapter")
    picture = torch.rand(2, 1, 28, 28)
    assert loaded.config["prompt_options"] == options
    assert torch.equal(loaded(picture), model.eval()(picture))


def test_tokens_start_the_prompts_of_their_own_block() -> None:
    """Prompts of the last two blocks start from what those blocks are fed; a shared one from its first block."""
    for options, layers in (({"blocks": -2}, [2, 3]), ({"blocks": -2, "shared": True}, [2]), ({"blocks": 1}, [0])):
        model = build(tiny_beit(depth=DEPTH), prompt_mode="deep", prompt_options=options, readout="cls")
        batch = images(model, 3)
        vptm.init_prompts(model, DataLoader(TensorDataset(batch, torch.zeros(3))), progress=False)
        fed = vptm.methods.spt.layer_tokens(model, batch, layers)
        assert len(fed) == len(model.prompts.weight)
        for prompts, tokens in zip(model.prompts.weight, fed):
            assert (prompts[:, None] - tokens.flatten(0, 1)).abs().amax(-1).amin(1).max() < 1e-12
    bilinear = {"prompt_dim": 16, "projection_per": "block"}
    for options in ({"prompt_dim": 5}, bilinear, {"placement": "add"}):
        model = build(prompt_mode="deep", prompt_options=options, prompt_length=1)
        with pytest.raises(ValueError, match="token rows of their own"):
            vptm.init_prompts(model, DataLoader(TensorDataset(images(model), torch.zeros(2))), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_options": {"block": 2}}, "prompt_options must be one of blocks, .*did you mean 'blocks'"),
        ({"prompt_options": {"blocks": 0}}, r"blocks must be in 1\.\.3, in -3\.\.-1, or None, got 0"),
        ({"prompt_options": {"blocks": 4}}, r"got 4"),
        ({"prompt_options": {"blocks": 2}, "prompt_mode": "shallow"}, "need prompt_mode 'deep' or 'progressive'"),
        ({"prompt_options": {"after": "drop"}}, "after='drop' needs blocks > 0"),
        ({"prompt_options": {"placement": "add"}, "prompt_length": 2}, "must be 1 or the number of patches, 6"),
        ({"prompt_options": {"placement": "add"}, "prompt_mode": "progressive"}, "got 'progressive'"),
        (
            {"prompt_options": {"placement": "add", "added_to": "class_and_patches"}, "prompt_length": 6},
            "must be 1 or the number of rows with those before the patches, 7, for placement='add', got 6",
        ),
        ({"prompt_options": {"added_to": "class_and_patches"}}, "needs placement='add', got 'prepend'"),
        ({"prompt_options": {"placement": "ad"}}, "did you mean 'add'"),
        ({"prompt_options": {"projection_per": "block"}}, "needs prompt_dim, the width of what it projects, got None"),
        ({"prompt_options": {"prompt_dim": 0}}, "prompt_dim must be an integer >= 1 or None, got 0"),
        ({"prompt_options": {"patch_values": -9}}, "patch_values must be an integer >= 1 or None, got -9"),
        ({"prompt_options": "kv"}, "prompt_options must be a mapping or None, got 'kv'"),
        ({"prompt_options": [("kind", "kv")]}, r"prompt_options must be a mapping or None, got \[\('kind', 'kv'\)\]"),
        ({"prompt_options": {"dropout_per": "image"}}, "dropout_per must be one of sample, batch"),
        ({"prompt_gate": float("nan")}, "prompt_gate must be finite, or None for no gate, got nan"),
        ({"prompt_gate": float("inf")}, "prompt_gate must be finite, or None for no gate, got inf"),
        ({"prompt_gate": float("-inf")}, "prompt_gate must be finite, or None for no gate, got -inf"),
        ({"prompt_gate": -4.0, "prompt_length": 0}, "prompt_gate must be None for prompt_length=0, .*, got -4.0"),
        (
            {"prompt_gate": -4.0, "prompt_options": {"placement": "add"}, "prompt_length": 1},
            "prompt_gate must be None for placement='add', which has no prompt columns, got -4.0",
        ),
        (
            {"prompt_gate": -4.0, "prompt_options": {"kind": "cross"}},
            "prompt_gate must be None for kind='cross', which has no prompt columns, got -4.0",
        ),
        ({"prompt_options": {"gate_per": "head"}}, "gate_per='head' needs prompt_gate, got None"),
        ({"prompt_gate": -4.0, "prompt_options": {"gate_per": "block"}}, "gate_per must be one of prompt, head, got"),
        ({"prompt_options": {"train_alpha": True}}, "train_alpha needs prompt_mode='progressive', got 'deep'"),
        (
            {"prompt_mode": "progressive", "prompt_options": {"train_alpha": True, "blocks": 1}},
            "train_alpha needs prompts, and a block that mixes, got 3 prompts of 1 blocks",
        ),
        (
            {"prompt_mode": "progressive", "prompt_options": {"train_alpha": True}, "prompt_length": 0},
            "train_alpha needs prompts, and a block that mixes, got 0 prompts of 3 blocks",
        ),
        ({"prompt_options": {"train_alpha": 1}}, "train_alpha must be True or False, got 1"),
        ({"progressive_alpha": [0.1]}, "must be a number or 2 of them, got 1"),
        ({"progressive_alpha": [0.1, 1.5]}, r"must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_options_are_refused(arguments: dict[str, Any], message: str) -> None:
    """One line that names the argument and what it was."""
    with pytest.raises((ValueError, TypeError), match=message):
        build(**{"prompt_mode": "deep", **arguments})


def test_a_patch_of_no_stated_size_is_the_backbone_s() -> None:
    """None is the default there, as of every option: prompts then start in the bound of the patch."""
    models = []
    for options in ({}, {"patch_values": None}):
        torch.manual_seed(0)
        models.append(build(tiny_beit(depth=DEPTH), readout="cls", prompt_options=options))
    assert torch.equal(models[0].prompts.weight, models[1].prompts.weight)


@pytest.mark.parametrize("options", [{}, {"prompt_dim": 4}, {"prompt_dim": 4, "projection_per": "block"}])
def test_without_prompts_nothing_of_theirs_learns(options: dict[str, Any]) -> None:
    """DistributedDataParallel would wait for the gradient of a parameter that no score depends on."""
    model = build(tiny_beit(depth=DEPTH), prompt_mode="deep", prompt_length=0, prompt_options=options)
    model(images(model)).sum().backward()
    assert [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None] == []


@pytest.mark.parametrize("kind", ["beit", "vit"])
def test_without_prompts_is_the_same_model_of_length_0(kind: str) -> None:
    """Shares weights and constants and follows their edits; what is done to its settings, verbalizer or class names
    stays its own, and it may not drop weights that are another model's."""
    if kind == "beit":
        model = build(prompt_mode="deep", extra_bias="learned", prompt_dropout=0.2)
        batch, bare = images(model), build(prompt_length=0)
    else:
        options = {"readout": "mean_with_prompts", "prompt_mode": "progressive"}
        model = build_vit(**options)
        batch, bare = pictures(model), build_vit(readout="mean", prompt_length=0)
    bare.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.startswith("prompt")}, strict=False
    )
    twin, config = model.without_prompts(), dict(model.config)
    for _ in range(2):
        assert relative_error(twin(batch), bare(batch)) <= 1e-12
        assert twin._encoder.folded(twin).qkv_weights is model._encoder.folded(model).qkv_weights
        for at in (model, bare):
            with torch.no_grad():
                at.backbone.blocks[0].mlp.fc1.weight.mul_(1.5)
    assert max(vptm.check(twin, batch).values()) <= 1e-10
    with pytest.raises(RuntimeError, match="freeze_for_inference must be called on the model with prompts"):
        twin.freeze_for_inference()
    twin.reset_classifier(2)
    twin.class_names = ["a", "b"]
    assert twin(batch).shape == (2, 2) and model(batch).shape == (2, 5)
    assert model.config == config and model.class_names is None and model.prompts.length == 3
    assert twin.config["prompt_length"] == 0 == twin.prompts.length
