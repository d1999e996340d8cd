"""Learned gates on prompt columns: every path against plain formulas, and what a gate is beside attention."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from beit_factory import tiny_beit
from console import Console
from naive_prompted_beit import naive_hidden
from naive_prompted_eva import naive_eva_hidden
from naive_prompted_vit import naive_hidden as naive_vit_hidden
from timm.models import vision_transformer
from timm.models.eva import Eva
from tiny_data import write_backbone, write_pictures
from tiny_models import (
    HEADS,
    assert_as_exact_as_the_reference,
    assert_one_graph_and_bitwise_checkpoints,
    build,
    build_vit,
    images,
    pictures,
    relative_error,
    tiny_vit,
)

import vptm
from vptm.frozen import folded
from vptm.frozen.encoder import FrozenEncoder
from vptm.frozen.fold import linears_of
from vptm.weights.adapter_format import CONFIG_FILE
from vptm_kernels import prompted_attention
from vptm_kernels._runtime.triton_support import has_triton

MODES = ("shallow", "deep", "progressive")
KV: dict[str, Any] = {"prompt_mode": "deep", "prompt_options": {"kind": "kv"}}
EVA = {
    "angles by position": {"use_rot_pos_emb": True, "ref_feat_shape": (2, 3)},
    "query-key norm": {"use_rot_pos_emb": True, "ref_feat_shape": (2, 3), "qk_norm": True},
    "norms after": {"use_post_norm": True},
    "fewer keys than queries": {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "use_rot_pos_emb": True},
}
BLOCKS = ("ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock", "DiffParallelScalingBlock")


def assert_checked(model: Any, batch: torch.Tensor, name: object = "") -> None:
    for tensor, error in vptm.check(model, batch).items():
        assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (name, tensor, error)


def assert_equal(model: Any, hidden: torch.Tensor, expected: torch.Tensor, name: object = "") -> None:
    """Values, and gradients of prompts and gates."""
    assert relative_error(hidden, expected) <= 1e-12, name
    learned = [model.prompts.weight, model.prompts.gate]
    found, wanted = (torch.autograd.grad(one.square().sum(), learned) for one in (hidden, expected))
    assert wanted[1].abs().max() > 1e-4, name
    assert max(map(relative_error, found, wanted)) <= 1e-10, name


@pytest.mark.parametrize("prompt_mode", MODES)
@pytest.mark.parametrize("readout", ["mask", "cls", "mean"])
def test_a_beit_equals_the_naive_model(prompt_mode: str, readout: str) -> None:
    """Reference and fast path, with a learned bias beside the gates and with a bias of their columns."""
    for extra_bias in ("zero", "neutral", "learned"):
        model = build(
            prompt_mode=prompt_mode, readout=readout, extra_bias=extra_bias, progressive_alpha=0.3, prompt_gate=-1.0
        )
        batch = images(model)
        expected = torch.stack([naive_hidden(model, image) for image in batch])
        assert_equal(model, model.forward_hidden(batch), expected, extra_bias)
        assert_checked(model, batch, extra_bias)


@pytest.mark.parametrize("prompt_mode", MODES)
def test_a_vit_equals_the_naive_model(prompt_mode: str) -> None:
    """Read at a row, as a mean, with prompts among what is averaged, and by attention pooling; without a position bias
    there is nothing but the gates to add."""
    families = ({}, {"reg_tokens": 2, "no_embed_class": True}, {"class_token": False, "global_pool": "map"})
    for family in families:
        readouts = ["map"] if "global_pool" in family else ["cls", "mean", "mean_with_prompts"]
        for readout in readouts:
            model = build_vit(
                tiny_vit(**family), prompt_mode=prompt_mode, readout=readout, prompt_gate=-1.0, progressive_alpha=0.3
            )
            assert FrozenEncoder.supports(model)
            batch = pictures(model)
            expected = naive_vit_hidden(model, batch, heads=HEADS)
            assert_equal(model, model.forward_hidden(batch), expected, (family, readout))
            assert_checked(model, batch, (family, readout))


@pytest.mark.parametrize("family", EVA)
def test_an_eva_equals_the_naive_model(family: str) -> None:
    """Folded and through timm's own blocks, to which gates go as their mask."""
    for prompt_mode, readout in itertools.product(MODES, ("mean", "mean_with_prompts")):
        vit = tiny_vit(cls=Eva, **EVA[family])
        model = build_vit(vit, prompt_mode=prompt_mode, readout=readout, prompt_gate=-1.0, progressive_alpha=0.3)
        batch = pictures(model)
        assert FrozenEncoder.supports(model) == (family == "angles by position")
        if family in ("angles by position", "norms after"):
            expected = naive_eva_hidden(model, batch, heads=HEADS)
            assert_equal(model, model.forward_hidden(batch), expected, (prompt_mode, readout))
        assert_checked(model, batch, (prompt_mode, readout))


@pytest.mark.parametrize("prompt_dropout", [0.0, 0.5])
def test_gates_of_learned_keys_and_values_equal_the_naive_model(prompt_dropout: float) -> None:
    """They are columns without rows, on a BEiT, a ViT and an Eva, folded and written out; with dropout per image both
    paths draw the same."""
    options = {"prompt_gate": -1.0, "prompt_dropout": prompt_dropout, **KV}
    cases: list[tuple[Any, Any, Any]] = []
    for readout, extra_bias in (("mask", "zero"), ("cls", "neutral"), ("mean", "learned")):
        model = build(readout=readout, extra_bias=extra_bias, **options)
        cases.append((model, images(model), lambda m, b: torch.stack([naive_hidden(m, one) for one in b])))
    for readout, more in (("cls", {}), ("mean", {"qk_norm": True})):
        model = build_vit(tiny_vit(**more), readout=readout, **options)
        cases.append((model, pictures(model), lambda m, b: naive_vit_hidden(m, b, heads=HEADS)))
    model = build_vit(tiny_vit(cls=Eva, **EVA["angles by position"]), readout="mean", **options)
    cases.append((model, pictures(model), lambda m, b: naive_eva_hidden(m, b, heads=HEADS)))
    for number, (model, batch, naive) in enumerate(cases):
        assert_equal(model, model.forward_hidden(batch), naive(model, batch), number)
        assert_checked(model, batch, number)
        (gated,) = model.attention_maps(batch, [0])
        gate = model.prompts.gate.detach()[0].clone()
        with torch.no_grad():
            model.prompts.gate[0] = 0.0
            (plain,) = model.attention_maps(batch, [0])
            model.prompts.gate[0] = gate
        factors = torch.cat([torch.ones(HEADS, plain.shape[2]), gate.exp()], 1)[None, :, None]
        assert relative_error(gated, plain * factors / (plain * factors).sum(-1, keepdim=True)) <= 1e-12, number
        found = {}
        model.train()
        for impl in ("torch", "reference"):
            model.impl = impl
            torch.manual_seed(3)
            found[impl] = model(batch)
        assert relative_error(found["torch"], found["reference"]) <= 1e-12, number


@pytest.mark.parametrize("block", ["Block", *BLOCKS])
@pytest.mark.parametrize("fused", [True, False])
def test_a_shut_gate_is_no_prompt_and_an_open_one_no_gate(block: str, fused: bool) -> None:
    """Every kind of block that timm has: a gate at 0 changes nothing, and one at -60 leaves nothing of the prompts."""
    kind = getattr(vision_transformer, block)
    model = build_vit(tiny_vit(block_fn=kind, qk_norm=True), prompt_gate=0.0, readout="mean")
    plain = build_vit(tiny_vit(block_fn=kind, qk_norm=True), readout="mean")
    for one in (model, plain):
        for part in one.backbone.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = fused
    plain.load_learned_state_dict({k: v for k, v in model.learned_state_dict().items() if k != "prompts.gate"})
    batch = pictures(model)
    with torch.no_grad():
        model.prompts.gate.zero_()
        assert relative_error(model(batch), plain(batch)) <= 1e-12
        assert relative_error(model(batch), model.without_prompts()(batch)) > 1e-3
        model.prompts.gate.fill_(-60.0)
        assert relative_error(model(batch), model.without_prompts()(batch)) <= 1e-12
    assert model.without_prompts().prompts.gate is None and model.without_prompts().config["prompt_gate"] is None


def test_a_block_that_takes_no_mask_is_refused() -> None:
    """A patched forward would lose the gates in silence."""
    model = build_vit(prompt_gate=-1.0)
    inner = model.backbone.blocks[1]
    inner.forward = lambda x: type(inner).forward(inner, x)
    with pytest.raises(ValueError, match="prompt_gate needs blocks whose forward takes attn_mask, block 1 is a Block"):
        model(pictures(model))


@pytest.mark.parametrize("kind", ["beit", "vit", "eva"])
def test_attention_maps_and_intermediates_have_the_gates(kind: str) -> None:
    """In block 0, which is fed the same, a prompt has exp(gate) of its weight, in prompt rows too."""
    models = {"beit": build, "vit": build_vit, "eva": build_vit}
    backbone = {"beit": tiny_beit, "vit": tiny_vit, "eva": lambda: tiny_vit(cls=Eva, **EVA["angles by position"])}
    model = models[kind](backbone[kind](), prompt_gate=-1.0, readout="mean")
    batch = images(model) if kind == "beit" else pictures(model)
    (gated,) = model.attention_maps(batch, [0])
    gate = model.prompts.gate.detach()[0].clone()
    with torch.no_grad():
        model.prompts.gate.zero_()
    (plain,) = model.attention_maps(batch, [0])
    factors = torch.cat([torch.ones(HEADS, plain.shape[2]), gate.exp()], 1)[None, :, None]
    assert relative_error(gated, plain * factors / (plain * factors).sum(-1, keepdim=True)) <= 1e-12
    assert relative_error(gated, plain) > 1e-2
    _, maps = model.forward_intermediates(batch)
    with torch.no_grad():
        model.prompts.gate[0] = gate
    _, others = model.forward_intermediates(batch)
    model.impl = "reference"
    _, wanted = model.forward_intermediates(batch)
    assert max(map(relative_error, others, wanted)) <= 1e-12
    assert relative_error(maps[0], others[0]) > 1e-3


@pytest.mark.parametrize("prompt_mode", MODES)
def test_a_sealed_model_follows_its_gates_and_drops_zeros(prompt_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates at zero cost a sealed model nothing; an edit is seen by the next call."""
    model = build(prompt_mode=prompt_mode, prompt_gate=-1.0, progressive_alpha=0.3)
    batch, given = images(model), []

    def spied(*args: Any, **kwargs: Any) -> Any:
        given.append((kwargs["prompt_column_bias"], kwargs["bias"]))
        return prompted_attention(*args, **kwargs)

    wanted = model(batch)
    with torch.no_grad():
        model.prompts.gate.zero_()
        zero = model(batch)
        model.freeze_for_inference()
        monkeypatch.setattr(folded, "prompted_attention", spied)
        assert relative_error(model(batch), zero) <= 1e-12
        assert given and all(columns is None for columns, _ in given)
        biases = model._encoder._seal.biases
        assert all(bias is None or bias.data_ptr() == biases[0].data_ptr() for _, bias in given), "no sum with zeros"
        model.prompts.gate.copy_(build(prompt_mode=prompt_mode, prompt_gate=-1.0).prompts.gate)
        assert relative_error(model(batch), wanted) <= 1e-12
    assert relative_error(model(batch), wanted) <= 1e-12, "with gradients"


@pytest.mark.parametrize("prompt_mode", MODES)
@pytest.mark.parametrize("kind", ["beit", "vit"])
def test_attention_gets_gates_as_columns_and_the_frozen_bias(
    kind: str, prompt_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every block but the last, also where prompts are rows: a bias of all rows that holds the gates would be made
    in each block, and its dense gradient with it."""
    options: dict[str, Any] = {"prompt_mode": prompt_mode, "prompt_gate": -1.0, "readout": "cls"}
    model = build(**options) if kind == "beit" else build_vit(**options)
    batch, given = images(model) if kind == "beit" else pictures(model), []

    def spied(qkv: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append((qkv.shape[1], kwargs["prompt_column_bias"], kwargs["bias"]))
        return prompted_attention(qkv, *args, **kwargs)

    monkeypatch.setattr(folded, "prompted_attention", spied)
    model(batch)
    tokens, gate = model.num_rows - model.prompts.length, model.prompts.gate
    assert len(given) == len(model.backbone.blocks) - 1
    for layer, (rows, columns, bias) in enumerate(given):
        assert rows == tokens and torch.equal(columns, gate[layer]) and columns.requires_grad
        held = None if bias is None else bias.data_ptr()
        assert held == (None if kind == "vit" else model.folded_constants().biases[layer].data_ptr())


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep"])
def test_compiled_and_checkpointed_it_is_the_same(prompt_mode: str) -> None:
    """One graph for every batch size with gradients of the gates; recomputed blocks give bitwise the same ones."""
    model = build(tiny_beit((3, 3), depth=2), prompt_mode=prompt_mode, prompt_gate=-1.0)
    assert_one_graph_and_bitwise_checkpoints(model, model.prompts.gate)


@pytest.mark.parametrize("prompt_mode", MODES)
def test_low_precision_stays_within_the_error_of_the_reference(
    prompt_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 and fp16; under autocast gates go into attention as they are, in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        model = build(prompt_mode=prompt_mode, prompt_gate=-1.0).to(dtype)
        assert_as_exact_as_the_reference(model, images(model).to(dtype), dtype)
    model = build(prompt_mode=prompt_mode, prompt_gate=-1.0)
    exact, single, given = model(images(model)), copy.deepcopy(model).float(), []

    def spied(qkv: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        columns = kwargs["prompt_column_bias"]
        given.append((qkv.dtype, (kwargs["bias"] if columns is None else columns).dtype))
        return prompted_attention(qkv, *args, **kwargs)

    monkeypatch.setattr(folded, "prompted_attention", spied)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = single(images(model).float())
        single.impl = "reference"
        eager = single(images(model).float())
    assert set(given) == {(torch.bfloat16, torch.float32)}
    budget = 2 * (eager.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= budget
    vit = build_vit(prompt_mode=prompt_mode, prompt_gate=-1.0)
    wanted, vit = vit(pictures(vit)), vit.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for vit.impl in ("torch", "reference"):
            assert relative_error(vit(pictures(vit).float()).double(), wanted) <= 0.1


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("prompt_mode", MODES)
def test_triton_kernels_take_the_gates(prompt_mode: str) -> None:
    """The Triton path in the interpreter, forward and gradients, with a position bias and without."""
    if torch.cuda.is_available():
        pytest.skip("fp64 Triton needs the interpreter, which runs where there is no GPU")
    options: dict[str, Any] = {"prompt_mode": prompt_mode, "impl": "triton", "prompt_gate": -1.0}
    model = build(tiny_beit((3, 3), dim=32), progressive_alpha=0.3, **options)
    assert_checked(model, images(model))
    vit = build_vit(tiny_vit((3, 3), embed_dim=32, depth=2), readout="mean", **options)
    assert_checked(vit, pictures(vit))


def test_a_gate_learns_where_prompts_and_bias_do_not() -> None:
    """Every combination of what is frozen gives the gradients of the reference."""
    for prompts, gate in itertools.product((False, True), repeat=2):
        model = build(prompt_gate=-1.0, prompt_mode="shallow")
        model.prompts.weight.requires_grad_(prompts)
        model.prompts.gate.requires_grad_(gate)
        assert_checked(model, images(model), (prompts, gate))
    model = build(prompt_gate=-1.0)
    names = [name for name, one in model.named_parameters() if one.requires_grad]
    assert names[:2] == ["prompts.weight", "prompts.gate"] and "prompts.gate" in model.no_weight_decay()


def test_a_gate_starts_where_it_is_told() -> None:
    """One value for each block, head and prompt, or for each head; a dropped block has none."""
    options = {"prompt_mode": "deep", "prompt_length": 5, "prompt_gate": -4.0}
    for more, shape in (
        ({}, (12, 3, 5)),
        ({"gate_per": "head"}, (12, 3, 1)),
        ({"blocks": 2}, (12, 3, 5)),
        ({"blocks": 2, "after": "drop"}, (2, 3, 5)),
        ({"blocks": -2}, (2, 3, 5)),
    ):
        model = vptm.PromptedViT("vit_tiny_patch16_224", 2, img_size=32, **options, prompt_options=more)
        assert model.prompts.gate.shape == shape and bool((model.prompts.gate == -4).all()), more
    with pytest.raises(ValueError, match="heads must be those of a block's attention where prompt_gate is given"):
        vptm.PromptBank(2, 3, 8, patch_values=48, gate=-4.0)


@pytest.mark.parametrize("heads", [0, -2, 2.0, "2", True])
def test_heads_of_a_bank_are_a_number_of_them(heads: Any) -> None:
    """No heads would be gates without a value, which learn nothing and say nothing."""
    for kind in ("tokens", "kv"):
        with pytest.raises(ValueError, match=re.escape(f"heads must be an integer >= 1 or None, got {heads!r}")):
            vptm.PromptBank(2, 3, 8, mode="deep", patch_values=48, kind=kind, gate=-4.0, heads=heads)


def test_an_adapter_keeps_gates(tmp_path: Path) -> None:
    """They come back as they were learned, and still learn; one that lacks them is refused."""
    model = vptm.PromptedBEiT("builtin", 3, prompt_gate=-4.0, prompt_options={"gate_per": "head"})
    with torch.no_grad():
        model.prompts.gate.add_(torch.randn_like(model.prompts.gate))
    vptm.save_adapter(model, tmp_path / "adapter")
    held = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["model"]
    assert held["prompt_gate"] == -4.0 and held["prompt_options"] == {"gate_per": "head"}
    loaded = vptm.load_adapter(tmp_path / "adapter")
    picture = torch.rand(2, 1, 28, 28)
    assert torch.equal(loaded.prompts.gate, model.prompts.gate) and loaded.prompts.gate.requires_grad
    assert torch.equal(loaded(picture), model.eval()(picture))
    state = {name: value for name, value in model.learned_state_dict().items() if name != "prompts.gate"}
    with pytest.raises(ValueError, match=r"missing \['prompts.gate'\]"):
        model.load_learned_state_dict(state)
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    del config["model"]["prompt_gate"], config["model"]["prompt_options"]["gate_per"]
    (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unknown prompts.gate"):
        vptm.load_adapter(tmp_path / "adapter")


def test_a_prefix_file_of_peft_holds_no_gates(tmp_path: Path) -> None:
    """Its prompts go in beside gates; written, they would be another function."""
    model = build(prompt_gate=-1.0, **KV)
    with pytest.raises(ValueError, match="save_peft_prefix needs prompts without gates"):
        vptm.save_peft_prefix(model, tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()
    plain = build(**KV, seed=3)
    vptm.save_peft_prefix(plain, tmp_path / "prefix")
    gate = model.prompts.gate.detach().clone()
    vptm.load_peft_prefix(model, tmp_path / "prefix")
    assert torch.equal(model.prompts.weight, plain.prompts.weight) and torch.equal(model.prompts.gate, gate)


def test_the_command_and_recipes_start_gates(vptm: Console, tmp_path: Path) -> None:
    """`--prompt-gate -4` and a recipe's `prompt_gate`, kept in run.json; what cannot be is refused in one line."""
    backbone = write_backbone(tmp_path / "tiny.safetensors")
    write_pictures(tmp_path / "pictures", 8)
    (tmp_path / "own.yaml").write_text("summary: x\nsettings:\n  prompt_gate: -2\n  prompt_gate_per: head\n")
    where = ["--model", backbone, "--data", tmp_path / "pictures", "--shots", 2, "--epochs", 1, "--no-test"]
    assert vptm("train", *where, "--out", tmp_path / "a", "--prompt-gate", -4, "--lr-of", "gate=0.5")[0] == 0
    assert vptm("train", *where, "--out", tmp_path / "b", "--recipe", tmp_path / "own.yaml")[0] == 0
    for name, start, per in (("a", -4.0, "prompt"), ("b", -2.0, "head")):
        settings = json.loads((tmp_path / name / "run.json").read_text())["settings"]
        assert settings["prompt_gate"] == start and settings["prompt_gate_per"] == per
    status, said = vptm.refused("train", *where, "--out", tmp_path / "c", "--prompt-gate", "nan")
    assert (status, said) == (2, "vptm: prompt_gate must be finite, or None for no gate, got nan")
    status, said = vptm.refused("train", *where, "--out", tmp_path / "c", "--prompt-gate", -4, "--prompt-length", 0)
    assert status and said.startswith("vptm: prompt_gate must be None for prompt_length=0, which has no prompt columns")


def test_low_rank_adapters_in_a_block_keep_the_gates() -> None:
    """A linear of another class runs as it is, through the reference's blocks."""

    class Other(torch.nn.Linear):
        pass

    for model, batch in ((build(prompt_gate=-1.0), images), (build_vit(prompt_gate=-1.0), pictures)):
        wanted = model(batch(model))
        for linear in linears_of(model.backbone.blocks[1]):
            linear.__class__ = Other
        assert not FrozenEncoder.supports(model)
        assert relative_error(model(batch(model)), wanted) <= 1e-12
