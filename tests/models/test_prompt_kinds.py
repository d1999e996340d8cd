"""Learned keys and values (E2VPT, prefix tuning) and prompts in a cross-attention (CVPT), against the independent
models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from beit_factory import tiny_beit
from naive_prompted_beit import Row, naive_hidden
from naive_prompted_eva import naive_eva_hidden
from naive_prompted_vit import naive_hidden as naive_vit_hidden
from safetensors.torch import load_file, save_file
from test_prompted_eva import FAMILIES, eps_of, tiny_eva
from tiny_models import (
    BACKBONES,
    HEADS,
    assert_as_exact_as_the_reference,
    build,
    build_vit,
    images,
    pictures,
    relative_error,
    tiny_vit,
)

import vptm
from vptm.export.program import export_program
from vptm.frozen import folded
from vptm.frozen.encoder import FrozenEncoder
from vptm.weights.files import WriteError
from vptm_kernels._runtime.triton_support import has_triton

KV: dict[str, Any] = {"prompt_mode": "deep", "prompt_options": {"kind": "kv"}}
CROSS: dict[str, Any] = {"prompt_mode": "deep", "prompt_options": {"kind": "cross"}}
KINDS = {"kv": KV, "cross": CROSS}


def assert_equal_to(model: Any, batch: torch.Tensor, expected: torch.Tensor, label: object) -> None:
    """The read-out row and the gradient of the prompts are the naive model's, and every path's are the reference's."""
    hidden = model.forward_hidden(batch)
    assert expected.std() > 0.01 and relative_error(hidden, expected) <= 1e-12, label
    weight = model.prompts.weight
    found, wanted = (torch.autograd.grad(one.square().sum(), weight)[0] for one in (hidden, expected))
    assert wanted.abs().max() > 1e-3 and relative_error(found, wanted) <= 1e-10, label
    for tensor, error in vptm.check(model, batch).items():
        assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (label, tensor, error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_kinds_of_a_beit(backbone: str, kind: str) -> None:
    """Fails if a bias of the block's own keys or values reaches a learned one, if columns take another's bias, or if a
    cross-attention reads normalised rows, loses a bias or takes a share of the softmax of self-attention."""
    for readout, extra_bias in (("mask", "zero"), ("cls", "neutral"), ("mean", "learned")):
        if extra_bias == "neutral" and backbone == "absolute positions":
            continue
        model = build(tiny_beit(**BACKBONES[backbone]), readout=readout, extra_bias=extra_bias, **KINDS[kind])
        assert FrozenEncoder.supports(model)
        batch = images(model, 3)
        expected = torch.stack([naive_hidden(model, picture) for picture in batch])
        assert_equal_to(model, batch, expected, (readout, extra_bias))


VITS: list[dict[str, Any]] = [{}, {"init_values": 0.1}, {"reg_tokens": 1, "pre_norm": True}, {"scale_attn_norm": True}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", VITS)
def test_kinds_of_a_vit(more: dict[str, Any], kind: str) -> None:
    """With LayerScale, register tokens, and a norm before the projection, which a value bias cannot pass; with few
    prompts, whose keys of all heads are fewer than the channels of a row, and with more."""
    for readout, length in (("cls", 3), ("mean", 9)):
        model = build_vit(tiny_vit(**more), readout=readout, prompt_length=length, **KINDS[kind])
        assert FrozenEncoder.supports(model)
        batch = pictures(model, 3)
        assert_equal_to(model, batch, naive_vit_hidden(model, batch, heads=HEADS), readout)


def test_query_key_norm_is_not_of_learned_keys() -> None:
    """Such blocks are not folded; a learned key stands as it is among those that are normed."""
    model = build_vit(tiny_vit(qk_norm=True), **KV)
    batch = pictures(model, 3)
    assert not FrozenEncoder.supports(model)
    assert_equal_to(model, batch, naive_vit_hidden(model, batch, heads=HEADS), "qk_norm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "norms after"])
def test_kinds_of_an_eva(family: str, kind: str) -> None:
    """A learned key is not turned and its channels are the model's own order, whatever order keys are folded in; a
    value that is normed after attention keeps its bias and a learned one gets none. No position turns a query of a
    cross-attention."""
    vit = tiny_eva(family)
    model = build_vit(vit, readout="map" if vit.attn_pool is not None else "mean", **KINDS[kind])
    assert FrozenEncoder.supports(model)
    batch = pictures(model, 3)
    assert_equal_to(model, batch, naive_eva_hidden(model, batch, heads=HEADS, eps=eps_of(family)), family)


def test_bilinear_prompts_in_a_cross_attention() -> None:
    """The two options go together, folded and not."""
    options = {"kind": "cross", "prompt_dim": 4, "projection_per": "block"}
    model = build(prompt_mode="deep", prompt_options=options)
    errors = vptm.check(model, images(model, 3))
    assert "grad prompts.basis" in errors and max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("kind", KINDS)
def test_only_blocks_of_their_own_have_them(kind: str) -> None:
    """Of the first or the last blocks; the others equal the model without prompts, as no row is carried on."""
    for blocks in (1, -1):
        model = build(prompt_mode="deep", prompt_options={"kind": kind, "blocks": blocks}, readout="cls")
        batch = images(model, 3)
        _, kept = model.forward_intermediates(batch, output_fmt="NLC")
        bare = model.without_prompts().forward_intermediates(batch, output_fmt="NLC")[1]
        same = [relative_error(one, other) < 1e-13 for one, other in zip(kept, bare)]
        assert same == ([False, False, False] if blocks == 1 else [True, True, False])
        assert max(vptm.check(model, batch).values()) <= 1e-10


def test_attention_maps_have_their_columns() -> None:
    """(B, H, T, T + P), the naive model's weights, prompts last."""
    model = build(readout="cls", **KV)
    picture = images(model, 1)
    rows: list[Row] = []
    naive_hidden(model, picture[0], rows)
    found = model.attention_maps(picture, [-1])[0]
    assert found.shape == (1, HEADS, 7, 10) and relative_error(found[0, :, 0], rows[0].looks) <= 1e-12
    vit = build_vit(readout="cls", **KV)
    maps = vit.attention_maps(pictures(vit, 3), [0])[0]
    assert maps.shape == (3, HEADS, 7, 10)
    assert torch.allclose(maps.sum(-1), torch.ones_like(maps[..., 0]), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_dropout_of_kinds(per: str, kind: str) -> None:
    """Both paths draw the same masks; per sample, copies of an image differ."""
    model = build(prompt_dropout=0.5, prompt_mode="deep", prompt_options={"kind": kind, "dropout_per": per}).train()
    batch = images(model, 1).expand(3, -1, -1, -1)
    found = {}
    for impl in ("torch", "reference"):
        model.impl = impl
        torch.manual_seed(3)
        found[impl] = model(batch)
    assert relative_error(found["torch"], found["reference"]) <= 1e-12
    assert torch.allclose(found["torch"][0], found["torch"][1]) == (per == "batch")


def test_initial_bound_is_e2vpts() -> None:
    """Kaiming's of a (heads, P, D) tensor, as its released code draws it: sqrt(6 / (P * D))."""
    bank = vptm.PromptBank(3, 5, 768, mode="deep", patch_values=768, kind="kv", heads=12)
    expected = torch.nn.init.kaiming_uniform_(torch.empty(12, 5, 64), a=0).abs().max()
    assert bank.weight.shape == (3, 5, 1536)
    assert float(bank.weight.detach().abs().max()) == pytest.approx(float(expected), rel=0.01)


def test_initial_bound_is_cvpts() -> None:
    """Xavier's of a (layers, P, C) tensor, as its released code draws it."""
    bank = vptm.PromptBank(12, 10, 768, mode="deep", patch_values=768, kind="cross")
    expected = torch.nn.init.xavier_uniform_(torch.empty(12, 10, 768)).abs().max()
    assert bank.weight.shape == (12, 10, 768) and bank.length == 0
    assert float(bank.weight.detach().abs().max()) == pytest.approx(float(expected), rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_mode": "shallow"}, "kind='kv' needs prompt_mode='deep', got 'shallow'"),
        ({"prompt_options": {"kind": "kv", "placement": "add"}}, "kind='kv' needs placement='prepend', got 'add'"),
        ({"prompt_options": {"kind": "kv", "prompt_dim": 4}}, "kind='kv' needs prompt_dim=None, got 4"),
        ({"prompt_options": {"kind": "vk"}}, "kind must be one of tokens, kv, cross, got 'vk'"),
        (
            {"prompt_options": {"kind": "cross"}, "prompt_mode": "progressive"},
            "kind='cross' needs prompt_mode='deep', got 'progressive'",
        ),
    ],
)
def test_what_they_cannot_be(arguments: dict[str, Any], message: str) -> None:
    """One line for each."""
    with pytest.raises(ValueError, match=message):
        build(**{**KV, **arguments})
    for kind in KINDS.values():
        with pytest.raises(ValueError, match="needs prompt rows in the last block"):
            build_vit(readout="mean_with_prompts", **kind)
        model = build_vit(tiny_eva("norms after"), readout="mean", **kind)
        with pytest.raises(ValueError, match="timm's plain pre-norm blocks, got EvaBlockPostNorm blocks"):
            model(pictures(model))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_sealed_models_keep_them(tmp_path: Any, kind: str) -> None:
    """Saved, loaded, sealed and copied, the scores are the same."""
    model = vptm.PromptedBEiT("builtin", 3, **KINDS[kind])
    picture = torch.rand(3, 1, 28, 28)
    expected = model.eval()(picture)
    vptm.save_adapter(model, tmp_path / "adapter")
    loaded = vptm.load_adapter(tmp_path / "adapter")
    assert loaded.config["prompt_options"] == {"kind": kind} and torch.equal(loaded(picture), expected)
    sealed = loaded.freeze_for_inference()
    for one in (sealed, copy.deepcopy(sealed)):
        with torch.no_grad():
            assert torch.allclose(one(picture), expected, atol=1e-5)


def peft_file(folder: Path, length: int, layers: int, heads: int, depth: int, **config: Any) -> torch.Tensor:
    """A folder as PEFT writes one, and what its `get_prompt` makes of it: (L * 2, H, P, D)."""
    embedding = torch.randn(length, layers * 2 * heads * depth, generator=torch.Generator().manual_seed(7))
    folder.mkdir(exist_ok=True)
    save_file({"prompt_embeddings": embedding}, folder / "adapter_model.safetensors")
    stated = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": length, "num_attention_heads": heads} | config
    (folder / "adapter_config.json").write_text(json.dumps(stated | {"num_transformer_submodules": 1}))
    return embedding.view(length, layers * 2, heads, depth).permute(1, 2, 0, 3)


def test_prefixes_of_peft_go_in_and_out(tmp_path: Path) -> None:
    """Every block gets PEFT's own keys and values of every head; what is written again is the same file content."""
    past = peft_file(tmp_path / "peft", 3, 3, HEADS, 8)
    model = build(**KV).float()
    model.freeze_for_inference(keep_originals=True)
    before = model(images(model).float())
    vptm.load_peft_prefix(model, tmp_path / "peft")
    assert not torch.allclose(model(images(model).float()), before)
    for layer, weight in enumerate(model.prompts.weight):
        keys, values = weight.detach().chunk(2, -1)
        for head in range(HEADS):
            part = slice(8 * head, 8 * head + 8)
            assert torch.equal(keys[:, part], past[2 * layer, head])
            assert torch.equal(values[:, part], past[2 * layer + 1, head])
    vptm.save_peft_prefix(model, tmp_path / "again")
    found, first = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "peft"))
    assert found.keys() == first.keys() and torch.equal(found["prompt_embeddings"], first["prompt_embeddings"])
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    sizes = ("num_layers", "num_virtual_tokens", "num_attention_heads", "token_dim")
    assert [config[name] for name in sizes] == [3, 3, HEADS, 16] and config["peft_type"] == "PREFIX_TUNING"


def test_a_sealed_model_takes_a_prefix(tmp_path: Path) -> None:
    """Sealed, its projected prompts are made again."""
    peft_file(tmp_path / "peft", 3, 3, HEADS, 8)
    model, sealed = build(**KV), build(**KV).freeze_for_inference()
    with torch.no_grad():
        sealed(images(model))
        for one in (model, sealed):
            vptm.load_peft_prefix(one, tmp_path / "peft")
        assert relative_error(sealed(images(model)), model(images(model))) <= 1e-12


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ((4, 3, HEADS, 8), r"\(P, L \* 2 \* C\) = \(3, 3 \* 2 \* 16\) for this model, got \(4, 96\)"),
        ((3, 3, HEADS, 4), r"= \(3, 3 \* 2 \* 16\) for this model, got \(3, 48\)"),
        ((3, 3, 4, 4), "must have num_attention_heads 2, the model's, got 4"),
        ({"peft_type": "LORA"}, "must have peft_type 'PREFIX_TUNING', got 'LORA'"),
        ("adapter_config.json", "adapter_config.json is missing"),
        ("adapter_model.safetensors", "adapter_model.safetensors is missing"),
        (None, "must be finite, got NaN"),
        (1e300, r"prompt_embeddings must be finite as torch\.float32, got 1e\+300"),
    ],
)
def test_a_prefix_that_does_not_fit(tmp_path: Path, file: Any, message: str) -> None:
    """One line, and the prompts stay as they were."""
    more = file if isinstance(file, dict) else {}
    peft_file(tmp_path, *(file if isinstance(file, tuple) else (3, 3, HEADS, 8)), **more)
    if isinstance(file, str):
        (tmp_path / file).unlink()
    if file is None or isinstance(file, float):
        values = torch.full((3, 96), file or torch.nan, dtype=torch.float64)
        save_file({"prompt_embeddings": values}, tmp_path / "adapter_model.safetensors")
    model = build(**KV) if file is None else build(**KV).float()
    before = model.prompts.weight.detach().clone()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        vptm.load_peft_prefix(model, tmp_path)
    assert "\n" not in str(raised.value) and torch.equal(model.prompts.weight, before)


def test_only_learned_keys_and_values_are_a_prefix(tmp_path: Path) -> None:
    """Tokens, and keys and values of some blocks alone, are no prefix of every layer."""
    for options in ({}, {"kind": "kv", "blocks": 2}):
        model = build(prompt_mode="deep", prompt_options=options)
        for action in (vptm.load_peft_prefix, vptm.save_peft_prefix):
            with pytest.raises(ValueError, match="with prompts of its own in all 3 blocks, got 3 prompts of kind"):
                action(model, tmp_path)
    with pytest.raises(ValueError, match=r"needs prompts without a position bias, .* got extra_bias='cls'"):
        vptm.save_peft_prefix(build(extra_bias="cls", **KV), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file cannot be written: File exists"):
        vptm.save_peft_prefix(build(**KV), tmp_path / "file")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_of_kinds(kind: str, dtype: torch.dtype) -> None:
    """At most twice the reference's own error in that dtype; under autocast near the float32 result."""
    model = build(tiny_beit(dim=32), readout="cls", token_activation="hidden", **KINDS[kind])
    assert_as_exact_as_the_reference(copy.deepcopy(model).to(dtype), images(model, 4).to(dtype))
    single, batch = model.float(), images(model, 3).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = single.forward_hidden(batch)
    assert relative_error(found.float(), single.forward_hidden(batch)) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_and_one_program_of_kinds(kind: str) -> None:
    """One graph for all batch sizes, forward and backward, and an exported program of any batch."""
    torch._dynamo.reset()
    model = build(tiny_beit((3, 3)), **KINDS[kind])
    graphs: list[Any] = []
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward
    )
    for size in (5, 3, 7):
        batch = images(model, size)
        expected, found = (
            torch.autograd.grad(run(batch).square().sum(), model.prompts.weight)[0] for run in (model, compiled)
        )
        assert relative_error(found, expected) <= 1e-10
    assert len(graphs) == 1
    sizes = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(model, (images(model, 5),), dynamic_shapes=sizes).module()
    for size in (1, 7):
        batch = images(model, size)
        assert relative_error(exported(batch), model(batch)) <= 1e-12


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("kind", KINDS)
def test_triton_kernels_of_kinds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run in kernels, also where they add and normalise in one pass, which a cross-attention stands between."""
    monkeypatch.setattr(folded, "one_pass_is_worth_it", lambda elements: True)
    for readout in ("mask", "mean"):
        model = build(tiny_beit(dim=32), readout=readout, impl="triton", **KINDS[kind])
        for tensor, error in vptm.check(model, images(model)).items():
            assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (readout, tensor, error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_of_blocks_that_do_not_fold_takes_any_batch(kind: str) -> None:
    """Fails where a number of images is a constant of the program."""
    model = build_vit(tiny_vit(qk_norm=True), **KINDS[kind])
    with torch.no_grad():
        program = export_program(model).module()
        assert relative_error(program(pictures(model, 3)), model(pictures(model, 3))) <= 1e-12
