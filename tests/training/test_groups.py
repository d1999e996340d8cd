"""Groups of learned tensors with learning rates and weight decays of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from console import Console
from tiny_data import write_backbone, write_pictures
from tiny_runs import assert_same_run, make_model, run, stopped_run
from torch.utils.data import DataLoader, TensorDataset

from vptm import PromptedBEiT, fit
from vptm.commands.comparison import _as_option
from vptm.commands.train import train_settings
from vptm.settings import RunSettings, TrainSettings
from vptm.training.groups import parameter_groups
from vptm.training.run_folder import RUN_FILE


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


def groups_of(model: PromptedBEiT, **settings: Any) -> dict[str, tuple[float, float]]:
    """{name: (learning rate, weight decay)} of what is stepped."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = TrainSettings(epochs=1, lr=0.01, weight_decay=0.1, **settings)
    return {
        names[id(parameter)]: (0.01 * group.get("lr_scale", 1.0), group["weight_decay"])
        for group in parameter_groups(model, chosen)
        for parameter in group["params"]
    }


def test_every_learned_tensor_has_the_decay_of_its_group(backbone: Path) -> None:
    """By default prompts, vectors and the temperature have none; each group can have its own."""
    model = make_model(backbone, projection_bias=True, train_mask_token=True, prompt_gate=-4.0)
    prompts, mask, temperature = "prompts.weight", "mask_token", "verbalizer.log_temperature"
    gate = "prompts.gate"
    matrices = ("verbalizer.prototypes", "verbalizer.projection.weight")
    everything = {prompts, gate, mask, temperature, *matrices, "verbalizer.projection.bias"}

    def decays(**settings: Any) -> dict[str, float]:
        found = {name: decay for name, (_, decay) in groups_of(model, **settings).items()}
        assert found.keys() == everything
        return {name: decay for name, decay in found.items() if decay}

    assert decays() == dict.fromkeys(matrices, 0.1)
    assert decays(prompt_weight_decay=0.2, head_weight_decay=0.3) == {prompts: 0.2, **dict.fromkeys(matrices, 0.3)}
    named = {"verbalizer": 0.0, "prompts": 0.5, "temperature": 0.6, "mask_token": 0.7, "gate": 0.8}
    assert decays(weight_decay_of=named) == {prompts: 0.5, temperature: 0.6, mask: 0.7, gate: 0.8}


def test_no_factor_of_prompts_decays(backbone: Path) -> None:
    """Rows, matrices and gates of bilinear prompts are all prompts: in vptm's groups, and in timm's by
    `no_weight_decay`."""
    bilinear = {"prompt_dim": 4, "projection_per": "block"}
    model = make_model(backbone, prompt_mode="deep", prompt_gate=-4.0, prompt_options=bilinear)
    factors = {"prompts.weight", "prompts.basis", "prompts.gate"}
    found = {name: decay for name, (_, decay) in groups_of(model).items() if name.startswith("prompts.")}
    assert found == dict.fromkeys(factors, 0.0) and factors <= model.no_weight_decay()
    named = groups_of(model, prompt_weight_decay=0.2)
    assert {name: named[name][1] for name in factors} == dict.fromkeys(factors, 0.2) | {"prompts.gate": 0.0}


def test_one_step_moves_each_group_by_its_own_rate(backbone: Path) -> None:
    """Plain gradient descent under a published schedule, which wrote one rate for all: what moves is the rate times the
    gradient, and a rate of 0 leaves its group bitwise alone, also with decay and a clipped gradient."""
    images = torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = DataLoader(TensorDataset(images, torch.arange(6) % 3), batch_size=6)
    model = make_model(backbone, prompt_mode="deep", prompt_gate=-1.0).double()
    start = {name: tensor.clone() for name, tensor in model.learned_state_dict().items()}
    loss = torch.nn.functional.cross_entropy(model.train()(images), torch.arange(6) % 3)
    loss.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    rates = {"prompts": 0.5, "gate": 0.3, "temperature": 0.0}
    options: dict[str, Any] = {"epochs": 1, "lr": 0.02, "progress": False, "optimizer": "momentum", "schedule": "vpt"}
    row = fit(model, data, lr_of=rates, weight_decay_of={"temperature": 0.5}, **options).history[0]
    assert row["lr"] == 0.02, "what is reported is the rate of what has none of its own"
    for name, tensor in model.learned_state_dict().items():
        own = {"prompts.weight": 0.5, "prompts.gate": 0.3, "verbalizer.log_temperature": 0.0}
        rate = own.get(name, 0.02)
        assert torch.allclose(tensor, start[name] - rate * gradients[name], rtol=1e-10, atol=1e-12), name
    assert torch.equal(model.verbalizer.log_temperature, start["verbalizer.log_temperature"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rates_are_part_of_what_a_run_is(backbone: Path, tmp_path: Path) -> None:
    """A run resumes bitwise with them, and is refused with others."""
    rates = {"temperature": 0.0, "prompts": 0.1}
    run(make_model(backbone), tmp_path / "whole", epochs=3, lr_of=rates)
    stopped_run(make_model(backbone), tmp_path / "parts", 3, lr_of=rates)
    with pytest.raises(ValueError, match=r"lr_of was {'prompts': 0.1, 'temperature': 0.0}, now None"):
        run(make_model(backbone), tmp_path / "parts", epochs=3, resume=True)
    run(make_model(backbone), tmp_path / "parts", epochs=3, resume=True, lr_of=rates)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    run(make_model(backbone), tmp_path / "whole", epochs=3, resume=True, lr_of=dict(reversed(rates.items())))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_of": {"prompt": 0.1}}, "lr_of must be one of prompts, .*, got 'prompt', did you mean 'prompts'"),
        ({"lr_of": {"prompts": math.nan}}, r"lr_of\['prompts'\] must be finite and >= 0, got nan"),
        ({"weight_decay_of": {"prompts": -1}}, r"weight_decay_of\['prompts'\] must be finite and >= 0, got -1"),
        ({"lr_of": {"gate": 0.1}}, "lr_of must name groups that the model learns, prompts, ver.*, got 'gate'"),
        ({"lr_of": {"mask_token": 0.1}}, "lr_of must name groups that the model learns, prompts, ver.*, got 'mask_tok"),
        (
            {"lr_of": {"prompts": 0, "verbalizer": 0, "temperature": 0}},
            "lr_of must leave a rate above 0, got 0 for all that the model learns, prompts, verbalizer, temperature$",
        ),
        (
            {"weight_decay_of": {"verbalizer": 0.1}, "head_weight_decay": 0.1},
            "weight_decay_of must leave verbalizer out where head_weight_decay is given, got both",
        ),
        ({"prompt_weight_decay": -1}, "prompt_weight_decay must be finite and >= 0, or None, got -1"),
    ],
)
def test_wrong_groups_are_refused_before_a_folder_is_made(
    backbone: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_model(backbone), tmp_path / "r", **changes)
    assert not (tmp_path / "r").exists()


def test_the_command_and_recipes_take_rates(vptm: Console, backbone: Path, tmp_path: Path) -> None:
    """Kept in run.json as they are given, and resumed with; a recipe may say them as a mapping."""
    write_pictures(tmp_path / "pictures", 8)
    (tmp_path / "own.yaml").write_text("summary: x\nsettings:\n  lr_of: {prompts: 0.5}\n  epochs: 2\n")
    where = ["--model", backbone, "--data", tmp_path / "pictures", "--shots", 2, "--out", tmp_path / "r"]
    more = ["--no-test", "--weight-decay-of", "temperature=0.1,prompts=1e-3", "--recipe", tmp_path / "own.yaml"]
    assert vptm("train", *where, *more)[0] == 0
    content = json.loads((tmp_path / "r" / RUN_FILE).read_text())
    assert content["settings"]["lr_of"] == "prompts=0.5"
    assert content["arguments"]["lr_of"] == {"prompts": 0.5}
    assert content["settings"]["weight_decay_of"] == "prompts=0.001,temperature=0.1"
    again = RunSettings.from_options(content["settings"], "beit").train_settings
    assert again.weight_decay_of == {"prompts": 0.001, "temperature": 0.1} and again.lr_of == {"prompts": 0.5}
    assert vptm("train", "--resume", "--out", tmp_path / "r")[0] == 0
    searched = train_settings(_as_option("lr_of", {"prompts": 0.5, "temperature": 0}))[0].train_settings
    assert searched.lr_of == {"prompts": 0.5, "temperature": 0.0}


def test_wrong_numbers_are_refused_before_data_is_opened(vptm: Console, tmp_path: Path) -> None:
    """The data does not exist: it would be named if it were looked for first."""
    for option, value, line in (
        ("--lr", "nan", "lr must be finite and > 0, got nan"),
        ("--epochs", "0", "epochs must be >= 1, got 0"),
        ("--prompt-length", "-1", "prompt_length must be an integer >= 0, got -1"),
        ("--prompt-dropout", "nan", "prompt_dropout must be in [0, 1), got nan"),
        ("--progressive-alpha", "2", "progressive_alpha must be in [0, 1], got 2.0"),
        ("--temperature", "nan", "temperature must be finite and > 0, or None to learn it, got nan"),
        ("--prototype-dim", "0", "prototype_dim must be an integer >= 1 or None, got 0"),
        ("--init-images", "0", "--init-images must be >= 1, got 0"),
        ("--label-smoothing", "1", "label_smoothing must be in [0, 1), got 1.0"),
        ("--clip-norm", "-1", "clip_norm must be finite and > 0, or None, got -1.0"),
        ("--weight-decay", "inf", "weight_decay must be finite and >= 0, got inf"),
        (
            "--lr-of",
            "prompts",
            "--lr-of must be NAME=NUMBER, with commas between several of other names, got 'prompts'",
        ),
        ("--lr-of", "prompts=1,prompts=2", "--lr-of must be NAME=NUMBER, with commas between several of other names, "),
        ("--lr-of", "gait=1", "lr_of must be one of prompts, gate, alpha, verbalizer, temperature, mask_token, lm_he"),
        ("--optimizer", "adamww", "optimizer must be one of timm.optim.list_optimizers(), got 'adamww', did you mean"),
    ):
        status, said = vptm.refused("train", "--data", tmp_path / "none", option, value)
        assert status == 2 and said.startswith(f"vptm: {line}"), said
    for command, option, value, line in (
        (("protocol", "few-shot"), "--lr", "nan", "--lr must be finite and > 0, got nan"),
        (("protocol", "few-shot"), "--epochs", "0", "--epochs must be >= 1, got 0"),
        (("protocol", "few-shot"), "--logit-scale", "0", "--logit-scale must be finite and > 0, or left out, got 0.0"),
        (("map",), "--lr", "inf", "--lr must be finite and > 0, got inf"),
        (("map",), "--border", "0", "--border must be >= 1, got 0"),
    ):
        assert vptm.refused(*command, "--data", tmp_path / "none", option, value) == (2, f"vptm: {line}")
