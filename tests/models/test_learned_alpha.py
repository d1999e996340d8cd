"""Progressive prompts whose alpha is learned in every block that mixes: every path against plain formulas."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from beit_factory import tiny_beit
from console import Console
from naive_prompted_beit import naive_hidden
from naive_prompted_eva import naive_eva_hidden
from naive_prompted_vit import naive_hidden as naive_vit_hidden
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
from tiny_runs import assert_same_run, make_model, run, stopped_run

import vptm
from vptm.export.program import export_program
from vptm.models.prompts import PromptBank
from vptm.weights.adapter_format import CONFIG_FILE
from vptm_kernels._runtime.triton_support import has_triton

DEPTH = 4
OPTIONS: dict[str, Any] = {"prompt_mode": "progressive", "prompt_options": {"train_alpha": True}}


def beit_of(**more: Any) -> vptm.PromptedBEiT:
    return build(tiny_beit(depth=DEPTH), **OPTIONS, **more)


def assert_equal(model: Any, hidden: torch.Tensor, expected: torch.Tensor, name: object = "") -> None:
    """Values, and gradients of prompts and alphas."""
    assert relative_error(hidden, expected) <= 1e-12, name
    learned = [model.prompts.weight, model.prompts.alpha]
    found, wanted = (torch.autograd.grad(one.square().sum(), learned) for one in (hidden, expected))
    assert wanted[1].abs().min() > 1e-4, name
    assert max(map(relative_error, found, wanted)) <= 1e-10, name


def assert_checked(model: Any, batch: torch.Tensor, name: object = "") -> None:
    errors = vptm.check(model, batch)
    assert "grad prompts.alpha" in errors
    for tensor, error in errors.items():
        assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (name, tensor, error)


@pytest.mark.parametrize("gate", [None, -1.0])
@pytest.mark.parametrize("readout", ["mask", "cls", "mean"])
def test_a_beit_equals_the_naive_model(readout: str, gate: float | None) -> None:
    """Reference and fast path, with the alphas where they are random, also outside of [0, 1]."""
    for extra_bias in ("zero", "neutral", "learned"):
        model = beit_of(readout=readout, extra_bias=extra_bias, prompt_gate=gate)
        assert not ((model.prompts.alpha >= 0) & (model.prompts.alpha <= 1)).all()
        batch = images(model)
        expected = torch.stack([naive_hidden(model, image) for image in batch])
        assert_equal(model, model.forward_hidden(batch), expected, extra_bias)
        assert_checked(model, batch, extra_bias)


@pytest.mark.parametrize("readout", ["cls", "mean", "mean_with_prompts"])
def test_vits_equal_the_naive_model(readout: str) -> None:
    """With prompts among what is averaged too, with rotary positions, and where a block runs as timm's."""
    model = build_vit(readout=readout, **OPTIONS)
    assert_equal(model, model.forward_hidden(pictures(model)), naive_vit_hidden(model, pictures(model), heads=HEADS))
    assert_checked(model, pictures(model))
    if readout != "cls":
        eva = tiny_vit(cls=Eva, use_rot_pos_emb=True, ref_feat_shape=(2, 3))
        model = build_vit(eva, readout=readout, **OPTIONS)
        expected = naive_eva_hidden(model, pictures(model), heads=HEADS)
        assert_equal(model, model.forward_hidden(pictures(model)), expected)
        assert_checked(model, pictures(model))
    model = build_vit(tiny_vit(qk_norm=True), readout=readout, **OPTIONS)
    assert_equal(model, model.forward_hidden(pictures(model)), naive_vit_hidden(model, pictures(model), heads=HEADS))


def test_alphas_start_where_they_are_told() -> None:
    """One for every block that mixes: none would be left without a gradient, for which other processes would wait."""
    options: dict[str, Any] = {"mode": "progressive", "patch_values": 48, "train_alpha": True}
    for more, alphas in (
        ({"alpha": 0.25}, [0.25] * 3),
        ({"alpha": [0.0, 0.5, 1.0]}, [0.0, 0.5, 1.0]),
        ({"alpha": [0.0, 0.5, 1.0], "blocks": 3}, [0.0, 0.5]),
        ({"alpha": [0.0, 0.5, 1.0], "blocks": -2}, [1.0]),
        ({"alpha": 0.25, "shared": True}, [0.25] * 3),
    ):
        bank = PromptBank(4, 2, 8, **options, **more)
        assert bank.alpha is not None and bank.alpha.tolist() == alphas, more
        mixes = [block for block in range(4) if bank.role(block) == "mixed"]
        assert [bank.mixing(block) for block in mixes] == alphas, more
    plain = build(tiny_beit(depth=DEPTH), prompt_mode="progressive", progressive_alpha=0.3, readout="cls", seed=2)
    model = build(tiny_beit(depth=DEPTH), progressive_alpha=0.3, readout="cls", **OPTIONS)
    model.load_learned_state_dict(plain.learned_state_dict() | {"prompts.alpha": torch.full((3,), 0.3)})
    with torch.no_grad():
        model.prompts.alpha.fill_(0.3)
    assert relative_error(model.forward_hidden(images(model)), plain.forward_hidden(images(model))) <= 1e-12


def test_what_is_frozen_of_prompts_and_alpha_gives_the_gradients_of_the_reference() -> None:
    for prompts, alpha in itertools.product((False, True), repeat=2):
        model = beit_of()
        model.prompts.weight.requires_grad_(prompts)
        model.prompts.alpha.requires_grad_(alpha)
        assert max(vptm.check(model, images(model)).values()) <= 1e-10, (prompts, alpha)
    assert "prompts.alpha" in beit_of().no_weight_decay()
    twin = beit_of().without_prompts()
    assert twin.prompts.alpha is None


def test_prompt_dropout_is_drawn_alike() -> None:
    """Masks of an image or of the batch, in training: fast path and reference."""
    for per in ("sample", "batch"):
        options = OPTIONS | {"prompt_options": {"train_alpha": True, "dropout_per": per}}
        model = build(tiny_beit(depth=DEPTH), prompt_dropout=0.5, **options).train()
        found = {}
        for model.impl in ("torch", "reference"):
            torch.manual_seed(3)
            hidden = model.forward_hidden(images(model))
            found[model.impl] = hidden, torch.autograd.grad(hidden.square().sum(), model.prompts.alpha)[0]
        assert all(relative_error(*pair) <= 1e-10 for pair in zip(found["torch"], found["reference"])), per


def test_compiled_and_checkpointed_it_is_the_same() -> None:
    """One graph for every batch size with gradients of the alphas; recomputed blocks give bitwise the same ones."""
    model = build(tiny_beit((3, 3), depth=3), **OPTIONS)
    assert_one_graph_and_bitwise_checkpoints(model, model.prompts.alpha)


def test_low_precision_stays_within_the_error_of_the_reference() -> None:
    """16 bits hold 1 - alpha to 0.4 %: it is computed in 32."""
    for dtype in (torch.bfloat16, torch.float16):
        model = beit_of().to(dtype)
        with torch.no_grad():
            model.prompts.alpha.fill_(0.01)
        assert_as_exact_as_the_reference(model, images(model).to(dtype), dtype)
        mixed = model.prompts(1, 1, torch.zeros(1, 3, 16, dtype=dtype))
        single = (1 - model.prompts.alpha[0].float()) * model.prompts.weight[1].float()
        assert torch.equal(mixed[0], single.to(dtype))
    model = beit_of()
    wanted, single = model(images(model)), copy.deepcopy(model).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for single.impl in ("torch", "reference"):
            assert relative_error(single(images(model).float()).double(), wanted) <= 0.1


def test_a_sealed_model_follows_its_alphas_and_computes_no_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """(1 - alpha) P is there before the first image; an edit of either is seen by the next call."""
    model = beit_of()
    batch = images(model)
    wanted = model(batch)
    with torch.no_grad():
        model.freeze_for_inference()
        assert relative_error(model(batch), wanted) <= 1e-12
        with monkeypatch.context() as patched:
            patched.setattr(PromptBank, "forward", None)
            assert relative_error(model(batch), wanted) <= 1e-12
        for tensor in (model.prompts.alpha, model.prompts.weight):
            tensor.mul_(0.5)
            changed = model(batch)
            assert relative_error(changed, wanted) > 1e-3
            with torch.enable_grad():
                wanted = model(batch).detach()
            assert relative_error(changed, wanted) <= 1e-12
        twin = beit_of().sealed_twin()
        assert relative_error(twin(batch), beit_of()(batch)) <= 1e-12


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_the_triton_path_is_the_same() -> None:
    if torch.cuda.is_available():
        pytest.skip("fp64 Triton needs the interpreter, which runs where there is no GPU")
    model = build(tiny_beit((3, 3), dim=32, depth=3), impl="triton", prompt_gate=-1.0, **OPTIONS)
    assert_checked(model, images(model))


def test_a_graph_holds_the_alphas() -> None:
    model = beit_of()
    program = export_program(model)
    assert relative_error(program.module()(images(model, 3)), model(images(model, 3))) <= 1e-12


def test_an_adapter_keeps_them(tmp_path: Path) -> None:
    """They come back as they were learned, and still learn; a config that says otherwise is refused in one line."""
    model = vptm.PromptedBEiT("builtin", 3, progressive_alpha=0.1, **OPTIONS)
    with torch.no_grad():
        model.prompts.alpha.add_(torch.randn_like(model.prompts.alpha))
    vptm.save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / CONFIG_FILE
    config = json.loads(file.read_text())
    assert config["model"]["prompt_options"] == {"train_alpha": True} and "prompts.alpha" in config["trained"]
    loaded, picture = vptm.load_adapter(tmp_path / "adapter"), torch.rand(2, 1, 28, 28)
    assert torch.equal(loaded.prompts.alpha, model.prompts.alpha) and loaded.prompts.alpha.requires_grad
    assert torch.equal(loaded(picture), model.eval()(picture))
    for options, message in (
        (None, "unknown prompts.alpha, missing none"),
        ({"train_alpha": "yes"}, "train_alpha must be True or False, got 'yes'"),
        ({"train_alpha": True, "blocks": 2}, r"prompts.\w+ must have shape"),
    ):
        config["model"]["prompt_options"] = options
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            vptm.load_adapter(tmp_path / "adapter")
    vptm.save_adapter(vptm.PromptedBEiT("builtin", 3, prompt_mode="progressive"), tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / CONFIG_FILE).read_text())
    config["model"]["prompt_options"] = {"train_alpha": True}
    (tmp_path / "plain" / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing prompts\.alpha"):
        vptm.load_adapter(tmp_path / "plain")


def test_a_run_of_them_resumes_bitwise(tmp_path: Path) -> None:
    """With a rate and a decay of their own."""
    backbone = write_backbone(tmp_path / "tiny.safetensors")
    options: dict[str, Any] = {"lr_of": {"alpha": 0.5}, "weight_decay_of": {"alpha": 0.1}}
    run(make_model(backbone, **OPTIONS), tmp_path / "whole", epochs=3, **options)
    stopped_run(make_model(backbone, **OPTIONS), tmp_path / "parts", 3, **options)
    run(make_model(backbone, **OPTIONS), tmp_path / "parts", epochs=3, resume=True, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert abs(vptm.load_adapter(tmp_path / "whole").prompts.alpha.item() - 0.01) > 0.1


def test_the_command_and_recipes_learn_them(vptm: Console, tmp_path: Path) -> None:
    """`--train-alpha` and a recipe's `train_alpha`, kept in run.json; what cannot be is refused in one line."""
    backbone = write_backbone(tmp_path / "tiny.safetensors")
    write_pictures(tmp_path / "pictures", 8)
    (tmp_path / "own.yaml").write_text("summary: x\nsettings: {prompt_mode: progressive, train_alpha: true}\n")
    where = ["--model", backbone, "--data", tmp_path / "pictures", "--shots", 2, "--epochs", 1, "--no-test"]
    progressive = ["--prompt-mode", "progressive", "--train-alpha", "--lr-of", "alpha=0.5"]
    assert vptm("train", *where, "--out", tmp_path / "a", *progressive)[0] == 0
    assert vptm("train", *where, "--out", tmp_path / "b", "--recipe", tmp_path / "own.yaml")[0] == 0
    for name in "ab":
        assert json.loads((tmp_path / name / "run.json").read_text())["settings"]["train_alpha"] is True
    status, said = vptm.refused("train", *where, "--out", tmp_path / "c", "--train-alpha")
    assert status and said == "vptm: train_alpha needs prompt_mode='progressive', got 'deep'"
    status, said = vptm.refused("train", *where, "--out", tmp_path / "c", "--lr-of", "alpha=0.5")
    assert status and said.startswith("vptm: lr_of must name groups that the model learns, prompts, gate, verb"), said
    assert not (tmp_path / "c").exists()
