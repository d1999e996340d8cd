"""What a source holds is told also where it cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive_unilm import UnilmBeit
from safetensors.torch import load_file, save_file
from tiny_data import write_backbone
from tiny_models import tiny_vit

from vptm import PromptedBEiT, save_adapter
from vptm.weights.adapter_format import CONFIG_FILE, TENSORS_FILE
from vptm.weights.beits import load_backbone
from vptm.weights.description import describe
from vptm.weights.vits import load_vit


def rows_of(state: Any, path: Path) -> dict[str, str]:
    torch.save(state, path)
    return dict(describe(path))


def test_what_loads_is_described_by_its_report(tmp_path: Path) -> None:
    path = write_backbone(tmp_path / "x.safetensors")
    assert describe(path) == load_backbone(path).report.lines()
    torch.save(tiny_vit((3, 3), embed_dim=64, num_heads=1).state_dict(), tmp_path / "vit.pth")
    assert describe(tmp_path / "vit.pth") == load_vit(tmp_path / "vit.pth").report.lines()


def test_what_is_there_is_told_where_a_part_is_missing(tmp_path: Path) -> None:
    """A user asks just this of a file that does not load: fails if the answer is the refusal alone."""
    state = UnilmBeit(shared=False, dim=64, heads=1).state_dict()  # no position table: the size of its pictures is open
    rows = rows_of({"model": state, "epoch": 3}, tmp_path / "x.pth")
    assert rows["problem"].endswith("img_size must be given, the file holds no position table that tells it")
    assert rows["blocks"] == "2, from 0 to 1" and rows["shared position table"] == "missing"
    assert rows["mask token"] == "mask_token 1x1x64" and rows["beside them"] == "epoch"
    del state["norm.bias"], state["mask_token"]
    rows = rows_of({"model": state | {"extra\x1b[2J": torch.ones(1)}}, tmp_path / "x.pth")
    assert rows["mask token"] == "missing" and rows["final norm"] == "norm.weight 64, norm.bias missing"
    assert rows["other tensors"] == "extra\ufffd[2J", "a file must not move the cursor of a terminal"
    assert (
        rows_of({"model": {"blocks.0.x": [1], "y": torch.ones(2)}}, tmp_path / "x.pth")["beside them"] == "blocks.*.x"
    )


@pytest.mark.parametrize(
    ("name", "label", "value"),
    [
        ("deit_tiny_patch16_224", "architecture", "12 blocks, 192 wide, 3 heads of 64"),
        ("beit_base_patch16_224", "missing", "mask_token, lm_head.weight, lm_head.bias"),
        ("resnet10t", "problem", "prompts go into timm's Beit, VisionTransformer and Eva, this is a ResNet"),
    ],
)
def test_every_timm_name_is_described(name: str, label: str, value: str) -> None:
    rows = dict(describe(name))
    assert rows["source"] == name and rows[label] == value


def test_what_is_left_of_an_adapter_is_told(tmp_path: Path) -> None:
    model = PromptedBEiT(write_backbone(tmp_path / "b.safetensors"), 3, prompt_length=2, prototype_dim=5)
    model.class_names = ["a", "b", "c"]
    save_adapter(model, tmp_path / "a")
    rows = dict(describe(tmp_path / "a"))
    assert rows["classes"] == "a, b, c" and rows["learned prompts.weight"] == "1x2x16" and "problem" not in rows
    tensors = load_file(tmp_path / "a" / TENSORS_FILE)
    save_file(tensors | {"prompts.weight": torch.full((1, 2, 16), torch.nan)}, tmp_path / "a" / TENSORS_FILE)
    problems = [value for label, value in describe(tmp_path / "a") if label == "problem"]
    assert len(problems) == 2 and "damaged" in problems[0] and problems[1].startswith("prompts.weight must be finite")
    (tmp_path / "a" / CONFIG_FILE).unlink()
    rows = dict(describe(tmp_path / "a"))
    assert rows["problem"].endswith(f"{CONFIG_FILE} is missing") and rows["learned prompts.weight"] == "1x2x16"
