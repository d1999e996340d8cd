"""Adapters: what was learned comes back, and nothing damaged or foreign is loaded."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from beit_factory import randomize, tiny_beit
from safetensors.torch import load_file, save_file
from tiny_data import write_backbone

from vptm import PromptedBEiT, load_adapter, save_adapter
from vptm.adapters import CONFIG_FILE, TENSORS_FILE, write_atomically


def trained(source: Any, **arguments: Any) -> PromptedBEiT:
    """A model whose learned tensors are all random, as after training."""
    model = PromptedBEiT(source, 3, **{"prompt_length": 2, "prototype_dim": 5, **arguments})
    learned = model.learned_state_dict()
    generator = torch.Generator().manual_seed(7)
    model.load_learned_state_dict({k: torch.randn(v.shape, generator=generator) for k, v in learned.items()})
    model.class_names = ["upper", "left", "right"]
    return model.eval()


IMAGES = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    return write_backbone(tmp_path / "backbone.safetensors")


@pytest.fixture
def folder(tmp_path: Path, backbone: Path) -> Path:
    save_adapter(trained(backbone), tmp_path / "adapter", extra={"epoch": 3})
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prompt_mode": "deep", "verbalizer": "linear", "token_activation": "hidden"},
        {"train_mask_token": True, "train_lm_head": True, "extra_bias": "learned"},
        {"prompt_length": 0, "readout": "cls", "temperature": 0.2},
        {"img_size": (16, 8)},
    ],
    ids=["default", "deep-linear", "learned-head", "no-prompts", "resized"],
)
def test_a_loaded_adapter_gives_bitwise_the_same_scores(backbone: Path, tmp_path: Path, arguments: Any) -> None:
    model = trained(backbone, **arguments)
    height, width = arguments.get("img_size", (12, 12))
    images = torch.randn(4, 1, height, width, generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(tmp_path / "a")
    assert torch.equal(loaded(images), model(images))
    assert loaded.class_names == model.class_names and not loaded.training and loaded.config == model.config


def test_only_learned_tensors_are_written(folder: Path, backbone: Path) -> None:
    stored = load_file(folder / TENSORS_FILE)
    assert stored.keys() == trained(backbone).learned_state_dict().keys()
    assert not any(name.startswith(("backbone.", "lm_head", "mask_token")) for name in stored)


def test_the_config_says_how_to_rebuild_the_model(folder: Path, backbone: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["schema_version"] == 1 and config["extra"] == {"epoch": 3}
    assert config["backbone"]["source"] == str(backbone.resolve())
    assert config["backbone"]["weight_hash"] == trained(backbone).weight_hash()
    assert config["backbone"]["architecture"]["embed_dim"] == 16
    assert config["model"]["prompt_length"] == 2 and config["class_names"] == ["upper", "left", "right"]
    assert config["preprocessing"]["mean"] == [0.4] and config["preprocessing"]["input_size"] == [1, 12, 12]


def test_a_relative_source_is_found_from_any_folder(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(trained(backbone.name), "a")
    monkeypatch.chdir("/")
    load_adapter(tmp_path / "a")


def test_changed_preprocessing_comes_back(backbone: Path, tmp_path: Path) -> None:
    model = trained(backbone)
    model.default_cfg["mean"] = (0.25,)
    save_adapter(model, tmp_path / "a")
    assert load_adapter(tmp_path / "a").default_cfg["mean"] == (0.25,)


def test_a_fine_tuned_backbone_is_learned_and_comes_back(backbone: Path, tmp_path: Path) -> None:
    model = trained(backbone).unfreeze()
    randomize(model.backbone, seed=5)
    model.eval()
    save_adapter(model, tmp_path / "a")
    assert torch.equal(load_adapter(tmp_path / "a")(IMAGES), model(IMAGES))


def test_a_module_backbone_must_be_given_again(tmp_path: Path) -> None:
    model = trained(tiny_beit(), readout="cls", token_activation="hidden")
    save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="pass the backbone as source="):
        load_adapter(tmp_path / "a")
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(load_adapter(tmp_path / "a", source=tiny_beit())(images), model(images))


def test_a_moved_backbone_can_be_given_again(folder: Path, backbone: Path) -> None:
    moved = backbone.rename(backbone.with_name("moved.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"backbone\.safetensors.*pass the backbone as source="):
        load_adapter(folder)
    load_adapter(folder, source=moved)


def test_other_backbone_weights_are_refused_with_both_hashes(folder: Path, tmp_path: Path) -> None:
    other = write_backbone(tmp_path / "other.safetensors", seed=3)
    expected = json.loads((folder / CONFIG_FILE).read_text())["backbone"]["weight_hash"]
    with pytest.raises(ValueError, match="pass the right weights as source=") as refusal:
        load_adapter(folder, source=other)
    assert expected[:19] in str(refusal.value) and PromptedBEiT(other, 3).weight_hash()[:19] in str(refusal.value)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "has schema_version 2, this vptm .* reads up to 1: update vptm"),
        ({"schema_version": "1"}, "must have an integer schema_version, got '1'"),
        ({"backbone": None}, "must have an object 'backbone', got None"),
        ({"backbone": {}}, "must have the string backbone.weight_hash"),
        ({"class_names": ["a", "b"]}, "must name every class: 2 class_names for 3 classes"),
        ({"class_names": "ab"}, "must have class_names as a list of strings or null"),
        ({"model": {"num_classes": 3, "depht": 2}}, "does not fit PromptedBEiT: .*depht"),
    ],
)
def test_configs_that_do_not_fit_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message) as refusal:
        load_adapter(folder)
    assert "\n" not in str(refusal.value)


def damage(folder: Path, kind: str) -> None:
    path = folder / TENSORS_FILE
    content = bytearray(path.read_bytes())
    tensors = load_file(path)
    if kind == "truncated":
        path.write_bytes(content[:-7])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flipped bit":
        content[-3] ^= 1
        path.write_bytes(content)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "missing tensor":
        save_file({name: tensor for name, tensor in tensors.items() if name != "prompts.weight"}, path)
    elif kind == "unknown tensor":
        save_file(tensors | {"backbone.cls_token": torch.zeros(1, 1, 16)}, path)
    elif kind == "wrong shape":
        save_file(tensors | {"prompts.weight": torch.zeros(1, 3, 16)}, path)
    elif kind == "nan":
        save_file(tensors | {"prompts.weight": torch.full((1, 2, 16), float("nan"))}, path)
    else:
        (folder / CONFIG_FILE).write_text("{")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "must be a safetensors file"),
        ("empty", "must be a safetensors file"),
        ("pickle", "must be a safetensors file"),
        ("flipped bit", "is damaged"),
        ("missing tensor", r"missing \['prompts\.weight'\]"),
        ("unknown tensor", r"unknown \['backbone\.cls_token'\]"),
        ("wrong shape", r"prompts\.weight must have shape \(1, 2, 16\), got \(1, 3, 16\)"),
        ("nan", "prompts.weight must be finite"),
        ("no json", "must be JSON"),
    ],
)
def test_damaged_files_are_refused(folder: Path, kind: str, message: str) -> None:
    damage(folder, kind)
    with pytest.raises(ValueError, match=message) as refusal:
        load_adapter(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", [TENSORS_FILE, CONFIG_FILE])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        load_adapter(folder)
    with pytest.raises(FileNotFoundError, match="adapter folder not found"):
        load_adapter(folder / "nowhere")


def test_a_failed_save_leaves_the_old_adapter(folder: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TypeError):
        save_adapter(trained(backbone), folder, extra={"not json": object()})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(folder / CONFIG_FILE, b"half")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
