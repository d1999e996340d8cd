"""Adapters: what was learned comes back, and nothing damaged or foreign is loaded."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from beit_factory import randomize, tiny_beit
from safetensors.torch import load_file, save_file
from timm.layers import DropPath, Mlp
from tiny_data import write_backbone
from tiny_runs import write_as_of_schema

from vptm import PromptedBEiT, PromptedViT, load_adapter, save_adapter
from vptm.models.adapter_loading import load_on
from vptm.weights.adapter_format import CONFIG_FILE, TENSORS_FILE, read_adapter_config
from vptm.weights.description import describe
from vptm.weights.files import weight_hash, write_atomically


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
    assert config["schema_version"] == 5 and config["extra"] == {"epoch": 3}
    assert config["backbone"]["source"] == config["base_model_name_or_path"] == backbone.name
    assert config["peft_type"] == "VPTM" and config["task_type"] == "IMAGE_CLASSIFICATION"
    assert (folder / config["backbone"]["path"]).resolve() == backbone.resolve()
    assert str(backbone.parent) not in (folder / CONFIG_FILE).read_text(), "a path of this machine"
    assert config["backbone"]["weight_hash"] == trained(backbone).weight_hash()
    assert config["backbone"]["architecture"]["embed_dim"] == 16 and config["backbone"]["dtype"] == "float32"
    assert config["trained"] == sorted(trained(backbone).learned_state_dict())
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
    assert str(folder) in str(refusal.value)


def edit(folder: Path, **changes: Any) -> None:
    """Other entries of a config, of its "model" those that are named."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    if "model" in changes:
        changes["model"] = config["model"] | changes["model"]
    (folder / CONFIG_FILE).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 6}, "has schema_version 6, this vptm .* reads up to 5: update vptm"),
        ({"peft_type": "LORA"}, "must have peft_type 'VPTM', got 'LORA'"),
        ({"extras": {}}, "must have no entry 'extras'"),
        ({"schema_version": "1"}, "must have an integer schema_version, got '1'"),
        ({"backbone": None}, "must have an object 'backbone', got None"),
        ({"backbone": {}}, "must have backbone.source, it is missing"),
        ({"class_names": ["a", "b"]}, "must name every class: 2 class_names for 3 classes"),
        ({"class_names": "ab"}, "must have class_names as a list of strings or null"),
        ({"model": {"depht": 2}}, "does not fit PromptedBEiT: .*depht"),
        ({"model": {"prompt_gate": 1e39}}, "does not (open|fit PromptedBEiT): prompt_gate must be finite"),
        # a few bytes must not take the memory of the machine
        ({"model": {"prompt_length": 10**9}}, "model.prompt_length asks for 1000000000"),
        ({"model": {"prototype_dim": 10**9}}, "model.num_classes asks for 3000000000"),
        (
            {"model": {"prompt_length": 0, "prompt_options": {"prompt_dim": 10**9}}},
            r"model\.prompt_options\.prompt_dim asks for 1000000000",
        ),
    ],
)
def test_configs_that_do_not_fit_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    """In one line that says which adapter it is, also where many are read onto one backbone."""
    model = load_adapter(folder)
    edit(folder, **changes)
    for read in (load_adapter, lambda folder: load_on(model, folder)):
        with pytest.raises(ValueError, match=message) as refusal:
            read(folder)
        assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


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
        save_file(tensors | {"backbone.token": torch.zeros(1, 1, 16)}, path)
    elif kind == "tensor of the backbone":
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
        ("missing tensor", r"missing prompts\.weight"),
        ("unknown tensor", r"unknown backbone\.token"),
        ("tensor of the backbone", "is damaged"),
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


def loop_over(model: PromptedBEiT, images: torch.Tensor = IMAGES, steps: int = 2) -> None:
    """A user's own training, of whatever requires a gradient."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(4) % 3).backward()
        optimizer.step()


def freeze_all(model: PromptedBEiT) -> None:
    loop_over(model)
    model.requires_grad_(False)


def freeze_prompts(model: PromptedBEiT) -> None:
    model.prompts.requires_grad_(False)
    loop_over(model)


def train_a_block(model: PromptedBEiT) -> None:
    model.backbone.blocks[-1].requires_grad_(True)
    loop_over(model)


def train_a_block_and_freeze_it(model: PromptedBEiT) -> None:
    train_a_block(model)
    model.backbone.requires_grad_(False)


def train_biases(model: PromptedBEiT) -> None:
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    loop_over(model)


def train_lm_head(model: PromptedBEiT) -> None:
    assert model.lm_head is not None
    model.lm_head.requires_grad_(True)
    loop_over(model)


def fine_tune_and_freeze(model: PromptedBEiT) -> None:
    model.unfreeze()
    loop_over(model)
    model.backbone.requires_grad_(False)


def load_other_weights(model: PromptedBEiT) -> None:
    model.load_state_dict({k: v * 1.1 if "blocks" in k else v for k, v in model.state_dict().items()})


def edit_data(model: PromptedBEiT) -> None:
    model.backbone.blocks[0].mlp.fc1.weight.data.mul_(1.5)
    model.refresh()


@pytest.mark.parametrize(
    "change",
    [
        freeze_all,
        freeze_prompts,
        train_a_block,
        train_a_block_and_freeze_it,
        train_biases,
        train_lm_head,
        fine_tune_and_freeze,
        load_other_weights,
        edit_data,
    ],
    ids=lambda change: change.__name__,
)
def test_whatever_was_changed_comes_back_and_what_trains_still_trains(
    backbone: Path, tmp_path: Path, change: Callable[[PromptedBEiT], None]
) -> None:
    """An adapter of a model changed by hand gives another function, or cannot be loaded, where this fails."""
    plain, model = trained(backbone), trained(backbone)
    change(model)
    model.eval()
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(tmp_path / "a")
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert not torch.equal(plain(IMAGES), model(IMAGES)), "a change without an effect shows nothing"
    flags = [{name: p.requires_grad for name, p in m.named_parameters()} for m in (loaded, model)]
    assert flags[0] == flags[1] and loaded._frozen == model._frozen
    stored = load_file(tmp_path / "a" / TENSORS_FILE)
    assert ("backbone.blocks.0.attn.proj.weight" in stored) == (change in (fine_tune_and_freeze, load_other_weights))
    # and again: an adapter that was loaded and saved is the same adapter
    save_adapter(loaded, tmp_path / "b")
    assert torch.equal(load_adapter(tmp_path / "b")(IMAGES), model(IMAGES))


def test_random_weights_are_stored_as_no_source_has_them(tmp_path: Path) -> None:
    """A timm name without its weights is drawn anew by every construction."""
    model = PromptedViT("test_vit", 3, prompt_length=2, img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    drawn = torch.get_rng_state()
    save_adapter(model, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), drawn), "saving must not use up random numbers"
    assert torch.equal(load_adapter(tmp_path / "a")(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_model_is_known_by_its_source(backbone: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """The hash is that of weights in another dtype: fails if they are stored, or refused, as if they had changed."""
    model = trained(backbone).to(dtype)
    save_adapter(model, tmp_path / "a")
    assert load_file(tmp_path / "a" / TENSORS_FILE).keys() == model.learned_state_dict().keys()
    loaded = load_adapter(tmp_path / "a")
    assert all(torch.equal(a.to(dtype), b) for a, b in zip(loaded.parameters(), model.parameters()))
    other = write_backbone(tmp_path / "other.safetensors", seed=3)
    with pytest.raises(ValueError, match="pass the right weights as source="):
        load_adapter(tmp_path / "a", source=other)


def test_a_model_of_several_dtypes_is_known_by_its_source(backbone: Path, tmp_path: Path) -> None:
    model = trained(backbone)
    model.backbone.blocks.to(torch.bfloat16)
    save_adapter(model, tmp_path / "a")
    assert load_file(tmp_path / "a" / TENSORS_FILE).keys() == model.learned_state_dict().keys()
    loaded = load_adapter(tmp_path / "a")
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(loaded.parameters(), model.parameters()))


def test_wrappers_come_off(backbone: Path, tmp_path: Path) -> None:
    """torch.compile's and DDP's wrappers give the class and the names of what they wrap another name."""
    model = trained(backbone)
    for name, wrapped in (("c", torch.compile(model)), ("d", torch.nn.DataParallel(torch.compile(model)))):
        save_adapter(wrapped, tmp_path / name)
        assert torch.equal(load_adapter(tmp_path / name)(IMAGES), model(IMAGES))


def test_a_sealed_model_is_saved_with_the_hash_of_what_it_holds(backbone: Path, tmp_path: Path) -> None:
    model = trained(backbone)
    digest = model.weight_hash()
    model.freeze_for_inference()
    assert model.weight_hash() == digest
    save_adapter(model, tmp_path / "a")
    assert torch.equal(load_adapter(tmp_path / "a")(IMAGES), trained(backbone)(IMAGES))
    changed = trained(backbone)
    load_other_weights(changed)
    changed.freeze_for_inference()
    with pytest.raises(ValueError, match=r"must have the weights of .* got others, which are dropped: save it before"):
        save_adapter(changed, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_changed_module_backbone_is_not_the_one_that_was_passed(tmp_path: Path) -> None:
    """Without a source to compare with the hash, of what the model holds when saved, is all there is."""
    model = trained(tiny_beit(), readout="cls", token_activation="hidden")
    load_other_weights(model)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="pass the right weights as source="):
        load_adapter(tmp_path / "a", source=tiny_beit())
    images = torch.randn(2, 3, 8, 12)
    loaded = load_adapter(tmp_path / "a", source=copy.deepcopy(model.backbone))
    assert torch.equal(loaded(images), model(images))


class Mine(PromptedBEiT):
    """A class that an adapter has no name for."""


class Wider(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear, self.low = linear, torch.nn.Linear(linear.in_features, 1)


def never_loadable(backbone: Path) -> list[tuple[PromptedBEiT, type[Exception], str]]:
    names, words, head, rank, hollow, picture, shape, row, read = (trained(backbone) for _ in range(9))
    names.class_names = ["a", "b"]
    words.class_names = ["a", "b", 3]  # type: ignore[list-item]
    head.verbalizer = PromptedBEiT(backbone, 4, prototype_dim=5).verbalizer
    head.num_classes, head.class_names = 4, None
    rank.backbone.blocks[0].mlp.fc1 = Wider(rank.backbone.blocks[0].mlp.fc1)
    hollow.backbone.blocks[0].mlp.fc1.weight.data.fill_(float("nan"))
    picture.default_cfg["mean"] = (0.1, 0.2)
    shape.prompts.weight = torch.nn.Parameter(torch.zeros(1, 7, 16))
    row.readout, read.verbalizer.token_activation = "cls", "softmax"  # it would come back as another function
    return [
        (Mine(backbone, 3), TypeError, "model must be a PromptedBEiT or a PromptedViT, got Mine"),
        (names, ValueError, "must name every class: 2 class_names for 3 classes"),
        (words, ValueError, "class_names as a list of strings or null"),
        (head, ValueError, r"verbalizer\.prototypes must have the shape that the model's config makes, \(3, 5\)"),
        (rank, ValueError, r"unknown backbone\.blocks\.0\.mlp\.fc1\.linear\.bias"),
        (hollow, ValueError, r"backbone\.blocks\.0\.mlp\.fc1\.weight must be finite"),
        (picture, ValueError, r"preprocessing\.mean of 1 channels, got \[0\.1, 0\.2\]"),
        (shape, ValueError, r"prompts\.weight must have the shape .*, \(1, 2, 16\), got \(1, 7, 16\)"),
        (row, ValueError, "readout must be the 'mask' that the model was built with, to be saved, got 'cls'"),
        (read, ValueError, "the token_activation of verbalizer must be the 'logits' that the model was built with, to"),
    ]


def of_other_parts(model: PromptedBEiT) -> list[tuple[PromptedBEiT, str]]:
    """Models of the same tensors that are other functions, and what is said of them."""
    eps, act, patched, rows, sealed, same, method, blocks, idle = (copy.deepcopy(model) for _ in range(9))
    idle.backbone.blocks[0].mlp.drop1 = type("Scaling", (torch.nn.Dropout,), {"forward": lambda self, x: 2 * x})()
    eps.backbone.blocks[1].norm2.eps = 0.5
    act.backbone.blocks[0].mlp.act = torch.nn.ReLU()
    block = patched.backbone.blocks[0]
    block.mlp.forward = lambda x: 0 * x  # type: ignore[method-assign]
    rows.bias_index = rows.bias_index.flip(0)
    same.backbone.blocks[0].mlp.act = type("GELU", (torch.nn.GELU,), {"forward": lambda self, x: 2 * x})()
    method.verbalizer.compare = lambda *arguments: 2 * type(plain).compare(plain, *arguments)
    plain = model.verbalizer
    blocks.prompts.blocks = range(0, 0)
    sealed.freeze_for_inference()
    with torch.no_grad():
        sealed.backbone.norm.weight *= 2
    return [
        (eps, "the eps of backbone.blocks.1.norm2 must be the 1e-06 that the model was built with, to be saved, got 0"),
        (
            act,
            r"blocks\.0\.mlp\.act must be the torch\.nn\.\S+GELU that the model was built with, .* torch\.nn\S+ReLU",
        ),
        (patched, "backbone.blocks.0.mlp must have the forward of its class, to be saved, got a patched one"),
        (same, r"act must be the torch\.nn\.\S+GELU that .* got tests\.\S+GELU|got test_adapter_format\.GELU"),
        (method, "verbalizer must have the compare of its class, to be saved, got a patched one"),
        (blocks, r"the blocks of prompts must be the range\(0, 1\) that .*, got range\(0, 0\)"),
        (idle, r"blocks\.0\.mlp\.drop1 must be the torch\S+Identity that .* got \S+\.Scaling"),
        (rows, "bias_index must be as the model was built with it, to be saved, got other values"),
        (sealed, r"model must have the frozen weights that freeze_for_inference\(\) left to be saved, got others"),
    ]


def test_a_model_of_other_parts_is_not_saved_as_one_without_them(backbone: Path, tmp_path: Path) -> None:
    """Its tensors are those of its source, and what loads them would be another function without a word."""
    plain = trained(backbone).eval()
    for model, message in of_other_parts(plain):
        if model._sealed_hash is None:
            assert not torch.equal(model(IMAGES), plain(IMAGES)), "a change without an effect shows nothing"
        with pytest.raises(ValueError, match=message) as refusal:
            save_adapter(model, tmp_path / "a")
        assert "\n" not in str(refusal.value) and not (tmp_path / "a").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mlp, "forward", lambda self, x: x)
        with pytest.raises(ValueError, match="mlp must have the forward of its class, to be saved, got a patched one"):
            save_adapter(plain, tmp_path / "a")
    dropping = trained(backbone)
    dropping.backbone.blocks[1].drop_path1 = DropPath(0.1)
    dropping.backbone.blocks[1].mlp.drop1.p = dropping.prompts.dropout = 0.1
    save_adapter(dropping, tmp_path / "a")  # the same function wherever it is loaded
    hooked = trained(backbone).eval()
    hooked.backbone.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"hooks are not saved in an adapter, got some on backbone\.blocks\.1"):
        save_adapter(hooked, tmp_path / "a")
    load_adapter(tmp_path / "a")


def test_what_could_never_be_loaded_is_not_written(backbone: Path, tmp_path: Path) -> None:
    for model, kind, message in never_loadable(backbone):
        with pytest.raises(kind, match=message) as refusal:
            save_adapter(model, tmp_path / "a")
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) <= 500
        assert not (tmp_path / "a").exists(), message
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_adapter(trained(backbone), tmp_path / "a", extra={"accuracy": float("nan")})
    assert not (tmp_path / "a").exists()


def test_doubles_beyond_float32_are_neither_written_nor_read(folder: Path, backbone: Path, tmp_path: Path) -> None:
    """A model is opened in float32, where they are infinite and every score NaN."""
    model = trained(backbone).double()
    with torch.no_grad():
        model.prompts.weight[0, 0, 0] = 1e300
    message = r"prompts\.weight must be finite as torch\.float32, got 1e\+300"
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=message):
        load_adapter(folder).load_learned_state_dict(model.learned_state_dict())
    tensors = load_file(folder / TENSORS_FILE) | {"prompts.weight": model.prompts.weight.detach()}
    write_as_of_schema(folder, json.loads((folder / CONFIG_FILE).read_text()), 4, tensors)
    with pytest.raises(ValueError, match=f"does not fit its config: {message}"):
        load_adapter(folder)


@pytest.mark.parametrize("unfrozen", [False, True])
def test_adapters_of_schema_1_still_load(backbone: Path, tmp_path: Path, unfrozen: bool) -> None:
    """Before, a fine-tuned adapter had the hash of the backbone it started from, no list of what was trained, and a
    place of the prompts, which changes nothing: it is not warned of, as its user cannot help it."""
    model = trained(backbone)
    start = model.weight_hash()
    if unfrozen:
        model.unfreeze()
        randomize(model.backbone, seed=5)
        model.eval()
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    del config["trained"], config["backbone"]["dtype"]
    config["backbone"] |= {"weight_hash": start, "unfrozen": unfrozen}
    config["model"]["prompt_location"] = "end"
    write_as_of_schema(tmp_path / "a", config, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        loaded = load_adapter(tmp_path / "a")
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.learned_state_dict().keys() == model.learned_state_dict().keys() and loaded._frozen != unfrozen
    config["backbone"]["weight_hash"] = "sha256:0"
    write_as_of_schema(tmp_path / "a", config, 1)
    with pytest.raises(ValueError, match="pass the right weights as source="):
        load_adapter(tmp_path / "a")


def test_nothing_is_fetched_unless_the_source_is_passed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's own words must not make this machine call another: a hub id, a timm name, an address in timm."""
    calls: list[object] = []

    def refuse(*arguments: object, **_: object) -> Any:
        calls.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    # where a machine says HF_HUB_OFFLINE, the hub's own library refuses before any call
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    config = json.loads((folder / CONFIG_FILE).read_text())
    hub = config["backbone"] | {"source": "nobody/no-such-beit", "path": None}
    own = {"mask_mode", "train_mask_token", "extra_bias", "vocab_size"}  # of a BEiT
    vit = {name: value for name, value in config["model"].items() if name not in own} | {
        "readout": "cls",
        "pretrained": True,
    }
    for changes in (
        {"backbone": hub},
        {
            "backbone": hub | {"source": "vit_tiny_patch16_224.augreg_in21k"},
            "model": vit,
            "model_class": "PromptedViT",
        },
        {
            "backbone": hub | {"source": "vit_huge_patch14_gap_224.in1k_ijepa"},
            "model": vit | {"readout": "mean"},
            "model_class": "PromptedViT",
        },
    ):
        (folder / CONFIG_FILE).write_text(json.dumps(config | changes))
        with pytest.raises(FileNotFoundError, match="pass the backbone as source="):
            load_adapter(folder)
        assert not calls
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"backbone": hub}))
    with pytest.raises(FileNotFoundError, match="the Hugging Face hub did not give it"):
        load_adapter(folder, source="nobody/no-such-beit")
    assert calls, "a source that is passed may be fetched"


@pytest.mark.parametrize(
    "value",
    [None, -1, True, "x" * 100_000, [], {"a": 1}, float("nan"), "DELETED"],
    ids=lambda value: repr(value)[:9],
)
@torch.no_grad()
def test_no_value_of_the_config_escapes_as_another_error(folder: Path, value: Any) -> None:
    """Each entry in turn: the same scores, or one line that refuses it; KeyError, TypeError, ... must not come out."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    expected = load_adapter(folder)(IMAGES)
    places = [(None, name) for name in config]
    places += [(section, name) for section in ("backbone", "model", "preprocessing") for name in config[section]]
    for section, name in places:
        changed = json.loads(json.dumps(config))
        place = changed if section is None else changed[section]
        if value == "DELETED":
            del place[name]
        else:
            place[name] = value
        (folder / CONFIG_FILE).write_text(json.dumps(changed))
        try:
            loaded = load_adapter(folder)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and len(str(error)) <= 500
            continue
        assert torch.equal(loaded(IMAGES), expected), (section, name)


@pytest.mark.parametrize(
    ("options", "changes", "name"),
    [
        ({"prompt_mode": "deep"}, {"prompt_length": 150}, "prompt_length"),
        ({"prompt_mode": "deep"}, {"prompt_options": {"prompt_dim": 40}}, "prompt_dim"),
        ({"verbalizer": "linear"}, {"num_classes": 90}, "num_classes"),
        ({"token_activation": "hidden"}, {"prototype_dim": 40}, "prototype_dim"),
        ({}, {"prototype_dim": None, "num_classes": 30}, "num_classes"),
    ],
)
def test_an_adapter_asks_for_no_more_memory_than_it_holds(
    backbone: Path, tmp_path: Path, options: Any, changes: Any, name: str
) -> None:
    """By the depth and width of the backbone, which its config need not tell truly: a small file of a large backbone
    would take all memory before its tensors are compared with what was made."""
    save_adapter(trained(backbone, **options), tmp_path / "a")
    edit(tmp_path / "a", model=changes, class_names=None)
    with pytest.raises(ValueError, match=f"{name} must ask for at most the .* values that the file holds, got"):
        load_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=f"{name} must ask for at most"):
        load_on(trained(backbone, **options), tmp_path / "a")
    PromptedBEiT(backbone, 3, prompt_length=150, prompt_mode="deep")  # a limit of the loading alone


def test_a_bias_of_no_prompt_columns_is_none(backbone: Path, tmp_path: Path) -> None:
    """It was an empty parameter, for which processes of one run wait; adapters that hold one still load."""
    for options in ({"prompt_options": {"kind": "cross"}, "prompt_mode": "deep"}, {"prompt_length": 0}):
        model = trained(backbone, extra_bias="learned", **options)
        assert model.prompt_bias is None
        save_adapter(model, tmp_path / "a")
        config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
        config["trained"].append("prompt_bias")
        older = load_file(tmp_path / "a" / TENSORS_FILE) | {"prompt_bias": torch.zeros(2, 2, 2, 0)}
        write_as_of_schema(tmp_path / "a", config, 4, older)
        assert torch.equal(load_adapter(tmp_path / "a")(IMAGES), model(IMAGES))
    assert trained(backbone, extra_bias="learned").prompt_bias is not None


@pytest.mark.parametrize(
    ("options", "edited"),
    [
        ({"prompt_options": {"kind": "cross"}}, {"prompt_options": {"kind": "tokens"}}),
        ({}, {"prompt_mode": "progressive"}),
        ({"readout": "cls"}, {"readout": "mean"}),
        ({"temperature": 0.5}, {"temperature": 0.25}),
    ],
    ids=str,
)
def test_settings_of_another_function_are_refused(backbone: Path, tmp_path: Path, options: Any, edited: Any) -> None:
    """Their shapes agree, so that the tensors would load, and every score would be that of a model nobody trained. An
    adapter of before has no hash of its settings, and taking the newer schema's number away does not make one."""
    save_adapter(trained(backbone, prompt_mode="deep", **options), tmp_path / "a")
    path = tmp_path / "a" / CONFIG_FILE
    config = json.loads(path.read_text())
    edit(tmp_path / "a", model=edited)
    for schema in (5, 4):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": schema}))
        with pytest.raises(ValueError, match="must have the model_class and model that its tensors were saved with"):
            load_adapter(tmp_path / "a")
        assert any(name == "problem" and "saved with" in said for name, said in describe(tmp_path / "a"))
    write_as_of_schema(tmp_path / "a", config, 4)
    load_adapter(tmp_path / "a")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="that its tensors were saved with"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize("schema", [1, 2, 3, 4, 5])
def test_an_entry_that_its_schema_has_is_not_made_up(folder: Path, schema: int) -> None:
    """A default in its place would be another model or preprocessing; what the schema did not have yet is fine."""
    config = json.loads((folder / CONFIG_FILE).read_text()) | {"schema_version": schema}
    later = {
        1: {"model_class", "trained", "dtype", "prompt_options"},
        2: {"peft_type", "task_type", "base_model_name_or_path", "path"},
        3: {"multi_label"},
    }
    allowed = set().union(*(names for since, names in later.items() if since >= schema))
    allowed |= {"interpolation", "crop_pct", "crop_mode", "background", "value_range", "schema_version"}
    # came within schema 4, and False, or no gate, is what models were before
    allowed |= {"dynamic_img_size", "prompt_gate"}
    for section in (None, "backbone", "model", "preprocessing"):
        for name in config if section is None else config[section]:
            changed = json.loads(json.dumps(config))
            del (changed if section is None else changed[section])[name]
            (folder / CONFIG_FILE).write_text(json.dumps(changed))
            if name in allowed:
                continue
            wanted = f"must have .*'{name}'|must have {'' if section is None else section + '.'}{name}, it is missing"
            with pytest.raises(ValueError, match=wanted):
                read_adapter_config(folder)


@pytest.mark.parametrize("schema", [1, 2])
def test_adapters_of_older_schemas_hold_the_whole_path(backbone: Path, folder: Path, schema: int) -> None:
    """What was written before still loads: 1 without what was trained, both with a path and without the new fields."""
    want = load_adapter(folder)(IMAGES)
    config = json.loads((folder / CONFIG_FILE).read_text())
    for name in ("peft_type", "task_type", "base_model_name_or_path"):
        del config[name]
    del config["backbone"]["path"]
    config["backbone"]["source"] = str(backbone.resolve())
    if schema == 1:
        del config["trained"], config["backbone"]["dtype"]
    write_as_of_schema(folder, config, schema)
    assert torch.equal(load_adapter(folder)(IMAGES), want)


def test_adapters_with_a_scalar_temperature_load(folder: Path) -> None:
    """As all had it up to schema 3; a changed value is still seen, and so is one in a whole state dict."""
    model = load_adapter(folder)
    want = model(IMAGES)
    assert model.verbalizer.log_temperature.shape == (1,) and model.verbalizer.temperature.ndim == 0
    tensors = load_file(folder / TENSORS_FILE)
    old = tensors | {"verbalizer.log_temperature": tensors["verbalizer.log_temperature"].reshape(())}
    config = json.loads((folder / CONFIG_FILE).read_text())
    write_as_of_schema(folder, config, 3, old)
    assert torch.equal(load_adapter(folder)(IMAGES), want)
    state = model.state_dict() | {"verbalizer.log_temperature": torch.tensor(1.5)}
    model.load_state_dict(state)
    assert model.verbalizer.log_temperature.tolist() == [1.5] and state["verbalizer.log_temperature"].ndim == 0
    changed = old | {"verbalizer.log_temperature": torch.tensor(1.5)}
    save_file(changed, folder / TENSORS_FILE, metadata={"vptm_hash": weight_hash(old)})
    with pytest.raises(ValueError, match="is damaged: its tensors do not have the hash written with them"):
        load_adapter(folder)
