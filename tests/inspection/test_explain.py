"""inspect_tokens: what it reports is what the model computes, and the picture can be read."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beit_factory import randomize, tiny_beit
from naive_prompted_beit import Row, naive_hidden
from PIL import Image

from vptm import PromptedBEiT, inspect_tokens
from vptm.inspection.explain import readout_attention_weights


def build(**options: Any) -> PromptedBEiT:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fresh token head is expected here
        model = PromptedBEiT(tiny_beit(), 3, **{"prompt_length": 2, "prototype_dim": 4, "vocab_size": 11, **options})
    for module in (model.prompts, model.verbalizer):
        if model.prompts.length or module is not model.prompts:
            randomize(module)
    return model.double().eval()


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt_mode": "deep", "extra_bias": "cls"},
        {"prompt_mode": "progressive"},
        {"mask_mode": "replace"},
        {"readout": "cls", "prompt_length": 0},
        {"readout": "mean", "extra_bias": "neutral"},
    ],
    ids=str,
)
def test_attention_is_that_of_the_naive_model(options: dict[str, Any]) -> None:
    """Weights of the read-out row on every patch and prompt."""
    model = build(**options)
    seen: list[Row] = []
    naive_hidden(model, pixels(), seen)
    end = 1 + model.num_patches
    first_prompt = model.num_rows - model.prompts.length
    place = {
        row: {"class": 0, "patch": 1 + seen[row].place, "mask": end, "prompt": first_prompt + seen[row].place}[
            seen[row].kind
        ]
        for row in range(len(seen))
    }
    expected = torch.zeros(len(seen), 2, len(seen), dtype=torch.float64)
    for row, place_of_row in place.items():
        for column, place_of_column in place.items():
            looks = seen[row].looks
            assert looks is not None
            expected[place_of_row, :, place_of_column] = looks[:, column]
    row_read = model._readout_row()
    wanted = expected[1:end].mean(0) if row_read is None else expected[row_read]
    found = readout_attention_weights(model, pixels()[None])[0]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    report = inspect_tokens(model, pixels())
    torch.testing.assert_close(report.attention, wanted[:, 1:end].reshape(2, 2, 3), rtol=1e-10, atol=1e-12)
    assert sum(report.shares.values()) == pytest.approx(1)
    if model.prompts.length:
        assert report.shares["prompts"] == pytest.approx(wanted[:, first_prompt:].sum(-1).mean().item())


def test_earlier_blocks_can_be_asked_for() -> None:
    """The first of three blocks equals the only block of a model cut after it."""
    model = build()
    cut = copy.deepcopy(model)
    cut.backbone.blocks = cut.backbone.blocks[:1]
    first = readout_attention_weights(model, pixels()[None], 0)
    torch.testing.assert_close(first, readout_attention_weights(cut, pixels()[None]), rtol=1e-10, atol=1e-12)
    assert inspect_tokens(model, pixels(), layer=0).layer == (1, 3)
    assert inspect_tokens(model, pixels()).layer == (3, 3)


def test_tokens_and_classes_are_the_models() -> None:
    model = build()
    model.class_names = ["ant", "bee", "cat"]
    model.train()
    report = inspect_tokens(model, pixels(), top=4)
    assert model.training and not model.backbone.training
    model.eval()
    with torch.no_grad():
        tokens = model.predict_tokens(pixels()[None])[0].softmax(0)
        probabilities = model(pixels()[None])[0].softmax(0)
        cosines = model.verbalizer.cosine(model.forward_hidden(pixels()[None]), model.lm_head)[0]
    assert [token for token, _ in report.tokens] == tokens.argsort(descending=True)[:4].tolist()
    assert [p for _, p in report.tokens] == pytest.approx(tokens.sort(descending=True).values[:4].tolist())
    order = cosines.argsort(descending=True).tolist()
    assert [score.name for score in report.classes] == [["ant", "bee", "cat"][k] for k in order]
    assert [score.similarity for score in report.classes] == pytest.approx([cosines[k].item() for k in order])
    assert [score.probability for score in report.classes] == pytest.approx([probabilities[k].item() for k in order])


def test_a_linear_verbalizer_has_classes_and_no_prototypes() -> None:
    report = inspect_tokens(build(verbalizer="linear", token_activation="hidden", readout="cls"), pixels())
    assert report.tokens == [] and all(score.similarity is None for score in report.classes) and report.row == "class"


def test_the_picture_is_the_image_as_the_model_gets_it() -> None:
    """Prepared, and its normalisation undone."""
    model = build().float()
    model.default_cfg["crop_pct"] = 1.0
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    report = inspect_tokens(model, image)
    assert np.abs(report.picture.permute(1, 2, 0).numpy() - np.asarray(image) / 255).max() < 2e-2


def test_the_png_shows_picture_attention_and_bars(tmp_path: Path) -> None:
    """A bright patch that is looked at must be seen in the drawing, and a negative cosine must not break it."""
    model = build()
    report = inspect_tokens(model, pixels())
    report.draw(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.format == "PNG" and drawn.size[0] > 1200 and drawn.size[1] > 350
        one = np.asarray(drawn.convert("RGB"), dtype=int)
    moved = torch.zeros_like(report.attention)
    moved[:, 0, 0] = 0.5
    type(report)(**{**report.__dict__, "attention": moved}).draw(tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as drawn:
        two = np.asarray(drawn.convert("RGB"), dtype=int)
    assert one.shape == two.shape and (abs(one - two).sum(2) > 30).mean() > 0.01
    named = [score._replace(name="$x^{$ caf\udce9") for score in report.classes]
    type(report)(**{**report.__dict__, "classes": named}).draw(
        tmp_path / "c.png"
    )  # a name is no formula, and may be no text
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": 0}, "top must be an integer >= 1, got 0"),
        ({"layer": 3}, "layer must be an integer in -3 .. 2, got 3"),
        ({"layer": -4}, "layer must be an integer in -3 .. 2, got -4"),
        ({"image": torch.zeros(3, 8, 8)}, "images must be (B, 3, 8, 12), got (1, 3, 8, 8)"),
        ({"image": torch.zeros(3, 8, 12, dtype=torch.uint8)}, "image must be floating point, normalised as vptm"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"model": torch.nn.Linear(1, 1)}, "model must be a PromptedBEiT, got Linear"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    arguments = {"model": build(), "image": pixels(), **changes}
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=re.escape(message)) as error:
        inspect_tokens(arguments.pop("model"), arguments.pop("image"), **arguments)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x\.png"):
        inspect_tokens(build().float(), tmp_path / "x.png")
