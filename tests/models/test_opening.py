"""One rule from a name, a file or a module to a class and its defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from beit_factory import tiny_beit
from tiny_models import relative_error, tiny_vit

from vptm.models.opening import kind_of, open_model
from vptm.settings import MODEL_SETTINGS

VPT = ("cls", "linear", "hidden")
VPTM = ("mask", "prototypical", "logits")


@pytest.mark.parametrize(
    ("source", "kind", "mode", "reads"),
    [
        ("builtin", "PromptedBEiT", "shallow", VPTM),
        ("deit_tiny_patch16_224", "PromptedViT", "deep", VPT),
        (tiny_vit(), "PromptedViT", "deep", VPT),
        (tiny_beit(), "PromptedBEiT", "shallow", VPT),
        (tiny_vit(class_token=False, global_pool="map"), "PromptedViT", "deep", ("map", "linear", "hidden")),
        (tiny_vit(class_token=False, global_pool="avg"), "PromptedViT", "deep", ("mean", "linear", "hidden")),
        ("eva02_tiny_patch14_224", "PromptedViT", "deep", VPT),
        ("vit_base_patch16_siglip_224", "PromptedViT", "deep", ("map", "linear", "hidden")),
    ],
    ids=["builtin", "name", "ViT", "BEiT", "pooled by attention", "no class token", "EVA-02", "name of SigLIP"],
)
def test_every_source_has_the_class_and_defaults_that_suit_it(
    source: object, kind: str, mode: str, reads: tuple[str, ...]
) -> None:
    """A model that needs options before it can be made at all, or one with a made-up mask token, fails here."""
    if source == "vit_base_patch16_siglip_224":  # too large to build here
        assert MODEL_SETTINGS[kind_of(source)]().readout == "map"
        return
    size = {"img_size": 2 * int(source[-6:-4])} if isinstance(source, str) and source != "builtin" else {}
    model = open_model(source, 3, prompt_length=2, **size)
    assert type(model).__name__ == kind
    assert tuple(model.config[name] for name in ("readout", "verbalizer", "token_activation")) == reads
    assert (model.config["prompt_mode"], model.prompts.length, model.num_classes) == (mode, 2, 3)
    if not size:
        assert open_model(source, 3, readout="mean").readout == "mean", "what is given goes before the defaults"


def test_a_file_of_a_beit_is_read_at_the_row_it_has(tmp_path: Path) -> None:
    """A classifier's file has no mask row, so the defaults of masked-modelling weights would refuse it."""
    tensors, path = tiny_beit((3, 3)).state_dict(), tmp_path / "classifier.pth"
    torch.save({"model": tensors}, path)
    assert kind_of(path) == "classifier_beit" and kind_of(path, "mask") == "beit"
    model = open_model(path, 3)
    assert tuple(model.config[name] for name in ("readout", "verbalizer", "token_activation")) == VPT
    with pytest.raises(ValueError, match="readout='mask' needs a mask token"):
        open_model(path, 3, readout="mask")
    torch.save({"model": tensors | {"mask_token": torch.zeros(1, 1, model.num_features)}}, path)
    assert kind_of(path) == kind_of(path, "cls") == "beit"


def test_a_module_in_double_precision_goes_in_as_it_is() -> None:
    """Features of the very weights that were passed, prompts and verbalizer in their type."""
    for source in (tiny_vit().double(), tiny_beit().double()):
        model = open_model(source, 3, prompt_length=0)
        images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
        assert relative_error(model.forward_features(images), source.forward_features(images)) <= 1e-12
        assert model(images).dtype == open_model(source, 3)(images).dtype == torch.float64


def test_a_mask_row_that_is_asked_for_brings_its_verbalizer() -> None:
    with pytest.warns(UserWarning, match="made a random mask token and a random token head"):
        model = open_model(tiny_beit(), 3, readout="mask", vocab_size=5)
    assert model.config["verbalizer"] == "prototypical" and model.config["token_activation"] == "logits"


@pytest.mark.parametrize(
    ("source", "settings", "error", "message"),
    [
        ("builtin", {"readouts": "cls"}, TypeError, "takes no readouts for a BEiT, did you mean 'readout'"),
        ("vit_tiny_patch16_224", {"mask_mode": "insert"}, TypeError, "takes no mask_mode for a ViT"),
        ("builtin", {"readout": "mean_with_prompts"}, ValueError, "readout must be one of mask, cls, mean"),
        (timm.create_model("resnet10t"), {}, ValueError, "VisionTransformer and Eva classes, ResNet is a ResNet"),
        ("none.pth", {}, FileNotFoundError, "none.pth: no such file"),
        ("beit_base_patch16_22", {}, ValueError, "beit_base_patch16_224"),
    ],
)
def test_what_does_not_fit_is_refused(source: object, settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_model(source, 3, **settings)


def test_a_folder_without_a_config_is_refused_by_what_it_holds(tmp_path: Path) -> None:
    """A run folder is easily taken for a model; an error of the file system names no way out."""
    for found in ("none in it", "an adapter, which vptm.load_adapter opens"):
        with pytest.raises(ValueError, match=f"must be a Hugging Face folder with config.json, got {found}$"):
            open_model(tmp_path, 2)
        (tmp_path / "adapter_config.json").write_text("{}")
