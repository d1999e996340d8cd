"""What can be opened by name is listed as it is, without a model, a file or a network."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import timm
from console import Console
from timm.models import get_pretrained_cfg

from vptm.inspection import catalogue
from vptm.models.opening import kind_of
from vptm.settings import MODEL_SETTINGS

SMALL = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
)


@pytest.mark.parametrize("name", SMALL)
def test_the_table_says_what_building_says(name: str) -> None:
    """A table of another timm, or one that counts a classifier, fails here."""
    kind, count = catalogue._table()[name]
    assert catalogue.looked_up(name) == (kind, count) and kind == kind_of(name)
    pretrained: Any = timm.create_model(name, num_classes=0, device="meta")
    assert count == sum(parameter.numel() for parameter in pretrained.parameters())


def test_every_published_weight_of_a_class_that_opens_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built for it, and nothing asked of a network; what does not open is not listed."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("not for a list")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(catalogue, "looked_up", refused)
    found = {model.name: model for model in catalogue.openable_models()}
    assert len(found) > 200 and [model.name for model in found.values() if model.token_head] == ["builtin"]
    assert not [name for name in found if name.startswith(("resnet", "swin"))]
    assert found["vit_pe_core_gigantic_patch14_448.fb"].readout == "map"
    assert found["eva02_tiny_patch14_224.mim_in22k"].kind == found["vit_small_patch16_dinov3.lvd1689m"].kind == "ViT"
    model = found["vit_base_patch16_siglip_224.webli"]
    assert (model.readout, model.input_size, model.kind) == ("map", (3, 224, 224), "ViT with attention pooling")
    for name in list(found)[1::40]:
        assert found[name].license == (get_pretrained_cfg(name).license or "not stated"), name
        assert found[name].readout == MODEL_SETTINGS[kind_of(name)]().readout, name


def test_the_command_prints_what_is_listed(vptm: Console) -> None:
    code, out, _ = vptm("models", "deit_tiny*", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["name"] for row in rows] == [one.name for one in catalogue.openable_models("deit_tiny*")]
    assert rows[0]["parameters"] == catalogue._table()["deit_tiny_distilled_patch16_224"][1]
    code, out, err = vptm("models", "builtin")
    assert code == 0 and out.splitlines()[1].split()[-1] == "yes" and "vptm inspect FILE" in err
    code, line = vptm.refused("models", "nothing-so-called")
    assert code == 2 and "pattern must match a name, got 'nothing-so-called'" in line
