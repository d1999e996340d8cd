"""Adapters that people share: small, without a path of the machine, found again by hash, told by other tools."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, build_vit, images, relative_error

import vptm
from vptm import PromptedBEiT, PromptedViT
from vptm.weights.adapter_format import CONFIG_FILE, TENSORS_FILE

DEEP: dict[str, Any] = {"prompt_mode": "deep", "prompt_length": 2}


def builtin(classes: int = 4, **options: Any) -> PromptedBEiT:
    torch.manual_seed(0)
    model = PromptedBEiT("builtin", classes, **(DEEP | options)).eval()
    model.class_names = [f"kind | {k}" for k in range(classes)]
    return model


@pytest.mark.parametrize("form", ["trainable", "folded"])
@pytest.mark.parametrize(("dtype", "at_most"), [("float32", 1e-5), ("bfloat16", 0.2), ("float16", 0.02)])
def test_what_is_saved_comes_back(tmp_path: Path, form: str, dtype: str, at_most: float) -> None:
    """In every form and type, within the rounding of the type, with its class names."""
    model = builtin()
    model.save_pretrained(tmp_path / "a", form=form, dtype=dtype)
    found = PromptedBEiT.from_pretrained(tmp_path / "a")
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        assert (found(x) - model(x)).abs().max() < at_most
    assert found.class_names == model.class_names and found.config.verbalizer == "prototypical"
    stored = load_file(tmp_path / "a" / TENSORS_FILE)
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}
    assert not any(name.startswith(("backbone", "lm_head")) for name in stored)


@pytest.mark.parametrize(
    "options", [{}, {"verbalizer": "linear"}, {"projection_bias": True, "temperature": 0.3}], ids=str
)
def test_folding_is_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    """The model that `deployed` makes scores as the one it was made from; in float64 to rounding."""
    from vptm.models.adapter_saving import deployed

    model = build(**DEEP, **options)
    x = images(model, 3)
    with torch.no_grad():
        assert relative_error(deployed(model)(x), model(x)) <= 1e-12


def test_a_verbalizer_that_does_not_fold_is_refused(tmp_path: Path) -> None:
    for options in ({"token_activation": "softmax"}, {"prototype_dim": None}, {"token_activation": "hidden"}):
        with pytest.raises(ValueError, match="folding needs a verbalizer that reads token logits"):
            builtin(**options).save_pretrained(tmp_path / "a", form="folded")
    for wrong, message in (({"form": "small"}, "form must be one of"), ({"dtype": "int8"}, "dtype must be one of")):
        with pytest.raises(ValueError, match=message):
            builtin().save_pretrained(tmp_path / "a", **wrong)
    assert not (tmp_path / "a").exists()


def test_a_deployed_adapter_of_beit_b_takes_1200_kilobytes() -> None:
    """n = 50 deep prompts, K = 100 classes, folded, in 16 bits: counted from the shapes."""
    layers, width, prompts, classes, dim = 12, 768, 50, 100, 128
    tensors = {
        "prompts.weight": torch.zeros(layers, prompts, width, dtype=torch.bfloat16),
        "verbalizer.projection.weight": torch.zeros(dim, width, dtype=torch.bfloat16),
        "verbalizer.projection.bias": torch.zeros(dim, dtype=torch.bfloat16),
        "verbalizer.prototypes": torch.zeros(classes, dim, dtype=torch.bfloat16),
        "verbalizer.log_temperature": torch.zeros(1, dtype=torch.bfloat16),
    }
    assert sum(t.numel() * 2 for t in tensors.values()) < 1_200_000
    from vptm.models.adapter_saving import deployed

    small = deployed(build(**DEEP)).learned_state_dict()
    assert small.keys() == tensors.keys(), "a folded adapter holds these tensors and no other"


def test_no_path_of_this_machine_and_a_card(tmp_path: Path) -> None:
    weights = tmp_path / "secret-place" / "weights.safetensors"
    weights.parent.mkdir()
    save_file(vptm.load_backbone("builtin").backbone.state_dict(), weights)
    model = PromptedBEiT(weights, 2, readout="cls", token_activation="hidden", verbalizer="linear").eval()
    model.class_names = ["a | b", "c"]
    model.save_pretrained(tmp_path / "out" / "a", extra={"data": "fashion-mnist", "test_accuracy": 0.75})
    for file in (tmp_path / "out" / "a").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    card = (tmp_path / "out" / "a" / "README.md").read_text()
    assert (
        "| data | fashion-mnist |" in card and "| test_accuracy | 0.75 |" in card and "| classes | a \\| b, c |" in card
    )
    assert "library_name: vptm" in card and model.weight_hash() in card
    (tmp_path / "out" / "a" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "out" / "a")
    assert (tmp_path / "out" / "a" / "README.md").read_text() == "mine"


def test_a_backbone_is_found_by_its_hash_among_files(tmp_path: Path) -> None:
    """Whatever it is called there; a folder without it says what hash is wanted."""
    state = vptm.load_backbone("builtin").backbone.state_dict()
    (tmp_path / "w").mkdir()
    save_file(state, tmp_path / "w" / "first.safetensors")
    options: dict[str, Any] = {"readout": "cls", "token_activation": "hidden", "verbalizer": "linear"}
    model = PromptedBEiT(tmp_path / "w" / "first.safetensors", 2, **options).eval()
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "w" / "first.safetensors").rename(tmp_path / "w" / "renamed.safetensors")
    save_file({name: tensor * 2 for name, tensor in state.items()}, tmp_path / "w" / "another.safetensors")
    with pytest.raises(FileNotFoundError, match=r"backbone not found: first\.safetensors"):
        PromptedBEiT.from_pretrained(tmp_path / "a")
    found = PromptedBEiT.from_pretrained(tmp_path / "a", backbone=tmp_path / "w")
    assert found.weight_hash() == model.weight_hash() and found.source.endswith("renamed.safetensors")
    (tmp_path / "w" / "renamed.safetensors").unlink()
    with pytest.raises(ValueError, match=r"none of 1 weight files in .* of weight hash sha256:"):
        PromptedBEiT.from_pretrained(tmp_path / "a", backbone=tmp_path / "w")
    # both moved together are found as they were
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "a")
    (tmp_path / "elsewhere" / "w").mkdir()
    save_file(state, tmp_path / "elsewhere" / "w" / "first.safetensors")
    assert PromptedBEiT.from_pretrained(tmp_path / "elsewhere" / "a").weight_hash() == model.weight_hash()


def test_the_class_of_the_adapter_loads_it(tmp_path: Path) -> None:
    builtin().save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"is of a PromptedBEiT: use vptm\.PromptedBEiT\.from_pretrained"):
        PromptedViT.from_pretrained(tmp_path / "a")
    vit = build_vit()
    vit.save_pretrained(tmp_path / "v")
    assert json.loads((tmp_path / "v" / CONFIG_FILE).read_text())["model_class"] == "PromptedViT"
    with pytest.raises(FileNotFoundError, match="adapter folder not found"):
        PromptedBEiT.from_pretrained(tmp_path / "nowhere")


def test_the_hub_gives_and_takes_what_a_folder_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub is asked for the two files of an adapter, and given them with the card."""
    hub = tmp_path / "hub"
    model = builtin()

    def upload(self: Any, *, repo_id: str, folder_path: Any, **_: Any) -> str:
        shutil.copytree(folder_path, hub)
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id})()
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert model.push_to_hub("me/clothes", dtype="bfloat16", form="folded") == "https://hub/me/clothes"
    assert {file.name for file in hub.iterdir()} == {TENSORS_FILE, CONFIG_FILE, "README.md"}
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert PromptedBEiT.from_pretrained("me/clothes").num_classes == 4
    assert asked == [("me/clothes", [TENSORS_FILE, CONFIG_FILE])]


def test_a_hub_that_is_not_reached_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the hub's library reports of every attempt is not shown, and its reports are as they were afterwards."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)

    def download(name: str, **_: Any) -> str:
        logger.warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no such host\nplease check your connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    want = "^me/clothes: no such folder, and the Hugging Face hub did not give it: no such host$"
    with pytest.raises(FileNotFoundError, match=want):
        PromptedBEiT.from_pretrained("me/clothes")
    assert not caplog.records
    logger.warning("another")
    assert [record.message for record in caplog.records] == ["another"]


def test_an_adapter_of_an_earlier_built_in_model_is_refused_and_says_so(tmp_path: Path) -> None:
    """The name "builtin" is the same for every version: its learned prompts would meet weights they never saw."""
    vptm.save_adapter(PromptedBEiT("builtin", 3), tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    changed = json.loads(config.read_text())
    changed["backbone"]["weight_hash"] = f"sha256:{'0' * 64}"
    config.write_text(json.dumps(changed))
    with pytest.raises(
        ValueError, match=r"built-in model of another version of vptm, .*sha256:0{12}.*: train it again"
    ):
        PromptedBEiT.from_pretrained(tmp_path / "a")
