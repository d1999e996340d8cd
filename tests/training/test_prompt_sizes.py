"""Prompts that start longer than uniform ones: made as long, or learned at a rate that is as much larger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from console import Console
from tiny_data import write_backbone, write_pictures
from tiny_models import relative_error
from tiny_runs import assert_same_run, loaders, make_model, run, stopped_run
from torch.utils.data import DataLoader, TensorDataset

from vptm import PromptBank, PromptedBEiT, fit, init_prompts
from vptm.commands.comparison import _as_option
from vptm.commands.train import train_settings
from vptm.training.run_folder import RUN_FILE

DEEP: dict[str, Any] = {"prompt_mode": "deep"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


def scaled(model: PromptedBEiT, factor: float) -> PromptedBEiT:
    with torch.no_grad():
        model.prompts.weight.mul_(factor)
    return model


def one_batch() -> DataLoader[Any]:
    images = torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return DataLoader(TensorDataset(images, torch.arange(6) % 3), batch_size=6)


def test_rescaled_prompts_are_as_long_as_uniform_ones(backbone: Path) -> None:
    """Block by block, each by one number: fails where rows lose their direction or what tells them apart."""
    model = make_model(backbone, prompt_length=20, **DEEP).double()
    train, _ = loaders(model)
    images = TensorDataset(torch.stack([image for image, _ in train.dataset]).double(), torch.arange(12) % 3)
    init_prompts(model, DataLoader(images), progress=False)
    weight, bound = model.prompts.weight, (6 / (4 * 4 + 16)) ** 0.5
    before, factors = weight.detach().clone(), torch.tensor([3.0, 40.0], dtype=torch.float64)
    weight.data.mul_(factors[:, None, None])
    scores = model.eval()(images.tensors[0])
    model.prompts.rescale()
    sizes = weight.detach().square().mean((1, 2)).sqrt()
    assert torch.allclose(sizes, torch.full_like(sizes, bound / 3**0.5), rtol=1e-12)
    numbers = weight.detach() / before
    assert torch.allclose(numbers, numbers[:, :1, :1].expand_as(numbers), rtol=1e-9)
    # block norms take it out again, up to their eps
    assert relative_error(model(images.tensors[0]), scores) <= 1e-3
    shallow = scaled(make_model(backbone).double().eval(), 10.0)
    scores = shallow(images.tensors[0])
    shallow.prompts.rescale()
    assert abs(shallow.prompts.relative_size() - 1) <= 1e-12
    assert relative_error(shallow(images.tensors[0]), scores) > 1e-2, "rows that are carried are another function"


def test_the_size_of_a_uniform_start_is_one() -> None:
    bank = PromptBank(depth=3, length=200, dim=32, mode="deep", patch_values=48)
    assert abs(bank.relative_size() - 1) < 0.02
    bank.weight.data.mul_(7)
    assert abs(bank.relative_size() - 7) < 0.14
    bank.weight.data[1] = 0
    bank.rescale()
    assert bank.weight.isfinite().all() and not bank.weight[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kv"}, "3 prompts of kind 'kv' and placement 'prepend', of 32 values for tokens of 16"),
        ({"kind": "cross"}, "3 prompts of kind 'cross' and placement 'prepend', of 16 values for tokens of 16"),
        ({"prompt_dim": 16}, "3 projected prompts, of 16 values for tokens of 16"),
        ({"prompt_dim": 16, "projection_per": "block"}, "3 projected prompts, of 16 values for tokens of 16"),
    ],
)
def test_what_is_no_token_is_refused(backbone: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Their bound is of another start, or what is added to rows is no row."""
    model = make_model(backbone, prompt_options=options, **DEEP)
    with pytest.raises(
        ValueError, match=rf"^rescale\(\) needs prompts that are token rows of their own, got {message}$"
    ):
        model.prompts.rescale()
    with pytest.raises(ValueError, match=f"^relative_prompt_lr needs prompts that are token rows .*, got {message}$"):
        run(model, tmp_path / "r", relative_prompt_lr=True)
    assert not (tmp_path / "r").exists()


def test_prompts_that_have_no_size_or_no_rate_are_refused(backbone: Path) -> None:
    for model, settings, message in (
        (
            scaled(make_model(backbone), 0.0),
            {},
            "needs prompts that are not all zero, got zeros, whose rate would be 0",
        ),
        (make_model(backbone), {"lr_of": {"prompts": 0}}, "needs a rate of prompts above 0, got lr_of with prompts=0"),
        (make_model(backbone, prompt_length=0), {}, "needs prompts that are token rows .*, got prompts that do not le"),
    ):
        with pytest.raises(ValueError, match=f"^relative_prompt_lr {message}"):
            run(model, relative_prompt_lr=True, **settings)
    with pytest.raises(TypeError, match="relative_prompt_lr must be True or False, got 'yes'"):
        run(make_model(backbone), relative_prompt_lr="yes")


@pytest.mark.parametrize("schedule", ["cosine", "vpt"])
def test_one_step_moves_prompts_by_their_rate_times_their_size(backbone: Path, schedule: str) -> None:
    """Rows alone: a learned bias of their columns is of the group, and no longer than it was. The rate multiplies the
    one of `lr_of`, and follows a published schedule too."""
    model = scaled(make_model(backbone, prompt_gate=-1.0, extra_bias="learned").double(), 10.0)
    size, data = model.prompts.relative_size(), one_batch()
    start = {name: tensor.clone() for name, tensor in model.learned_state_dict().items()}
    images, labels = data.dataset.tensors  # type: ignore[attr-defined]
    torch.nn.functional.cross_entropy(model.train()(images), labels).backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    options: dict[str, Any] = {"epochs": 1, "lr": 0.02, "progress": False, "optimizer": "momentum"}
    options |= {"lr_of": {"prompts": 0.05}, "relative_prompt_lr": True, "schedule": schedule}
    fit(model, data, **options)
    for name, tensor in model.learned_state_dict().items():
        rate = {"prompts.weight": 0.05 * size, "prompt_bias": 0.05}.get(name, 0.02)
        assert torch.allclose(tensor, start[name] - rate * gradients[name], rtol=1e-10, atol=1e-12), name
    assert size > 8 and not torch.equal(model.prompts.weight, start["prompts.weight"])


def test_long_prompts_learn_what_short_ones_do(backbone: Path) -> None:
    """Deep prompts ten times as long, by AdamW: with the rule they turn as uniform ones do, without it they hardly
    move."""
    found = {}
    for name, factor, relative in (("short", 1.0, True), ("long", 10.0, True), ("one rate", 10.0, False)):
        model = scaled(make_model(backbone, **DEEP).double(), factor)
        start = model.prompts.weight.detach().clone()
        fit(model, one_batch(), epochs=20, lr=0.01, relative_prompt_lr=relative, progress=False)
        found[name] = (model.prompts.weight.detach() - start) / factor
    assert relative_error(found["long"], found["short"]) <= 1e-3
    assert found["one rate"].norm() < 0.2 * found["short"].norm()


def test_a_resumed_run_keeps_its_rate(backbone: Path, tmp_path: Path) -> None:
    """Bitwise, though a command resumes with prompts that did not start as tokens; also for more epochs."""
    options: dict[str, Any] = {"relative_prompt_lr": True, "lr_of": {"temperature": 0.05}, "schedule": "none"}
    run(scaled(make_model(backbone), 8.0), tmp_path / "whole", epochs=4, **options)
    stopped_run(scaled(make_model(backbone), 8.0), tmp_path / "parts", 3, **options)
    for epochs in (3, 4):
        run(make_model(backbone, seed=5), tmp_path / "parts", epochs=epochs, resume=True, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rates = [json.loads((tmp_path / name / RUN_FILE).read_text())["prompt_lr"] for name in ("whole", "parts")]
    assert rates == [0.02 * scaled(make_model(backbone), 8.0).prompts.relative_size()] * 2
    with pytest.raises(ValueError, match="relative_prompt_lr was True, now False"):
        run(make_model(backbone), tmp_path / "parts", epochs=4, resume=True, **options | {"relative_prompt_lr": False})


def test_learned_in_16_bits_the_rate_is_the_same(backbone: Path, tmp_path: Path) -> None:
    """It is that of the model that was passed, up to the rounding of its copy."""
    options: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "relative_prompt_lr": True}
    for precision in ("fp32", "bf16"):
        run(scaled(make_model(backbone), 8.0), tmp_path / precision, precision=precision, **options)
    one, other = (json.loads((tmp_path / name / RUN_FILE).read_text())["prompt_lr"] for name in ("fp32", "bf16"))
    assert abs(one / other - 1) < 1e-3


def test_the_command_recipes_and_search_take_both(vptm: Console, backbone: Path, tmp_path: Path) -> None:
    """Kept in run.json, resumed with; a recipe says them, and a search turns them on and off."""
    write_pictures(tmp_path / "pictures", 8)
    (tmp_path / "own.yaml").write_text(
        "summary: x\nsettings: {prompt_init: random, init_rescale: true, epochs: 1}\n"
        "search: {init_rescale: [true, false]}\n"
    )
    where = ["--model", backbone, "--data", tmp_path / "pictures", "--shots", 2, "--no-test"]
    relative = ["--prompt-init", "random", "--relative-prompt-lr", "--epochs", 2]
    status, said, _ = vptm("train", *where, "--out", tmp_path / "a", *relative)
    content = json.loads((tmp_path / "a" / RUN_FILE).read_text())
    assert status == 0 and content["settings"]["relative_prompt_lr"] is True and content["prompt_lr"] != 0.002
    assert vptm("train", "--resume", "--out", tmp_path / "a", "--epochs", 3)[0] == 0
    assert vptm("train", *where, "--out", tmp_path / "b", "--recipe", tmp_path / "own.yaml")[0] == 0
    content = json.loads((tmp_path / "b" / RUN_FILE).read_text())
    assert content["settings"]["init_rescale"] is True and "prompt_lr" not in content
    for value in (True, False):
        chosen = ["--recipe", str(tmp_path / "own.yaml"), *_as_option("init_rescale", value)]
        assert train_settings(chosen)[0].init_rescale is value
        tokens = ["--prompt-init", "random", *_as_option("relative_prompt_lr", value)]
        assert train_settings(tokens)[0].train_settings.relative_prompt_lr is value
    for more, line in (
        (["--init-rescale"], "--init-rescale needs a --prompt-init from tokens, got uniform"),
        (["--relative-prompt-lr"], "--relative-prompt-lr needs a --prompt-init from tokens, got uniform"),
        (
            [*relative, "--init-rescale"],
            "--init-rescale and --relative-prompt-lr exclude each other: either does it all",
        ),
        (
            [*relative, "--lr-of", "prompts=0"],
            "relative_prompt_lr needs a rate of prompts above 0, got lr_of with promp",
        ),
    ):
        status, said = vptm.refused("train", *where, "--out", tmp_path / "c", *more)
        assert status == 2 and said.startswith(f"vptm: {line}"), said
    assert not (tmp_path / "c").exists()
