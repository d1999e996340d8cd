"""Suggestions in messages about unknown names: near names, abbreviations, and silence where nothing is near."""

from __future__ import annotations

import pytest

from vptm.messages import check_range, hint, one_of

RECIPES = ("finetune", "linear", "provp", "spt-deep", "spt-shallow", "vpt-deep", "vptm")


@pytest.mark.parametrize(
    "value, allowed, near",
    [
        ("spt", RECIPES, "spt-deep"),  # 3 of 8 letters, too few for difflib alone
        ("prov", RECIPES, "provp"),
        ("vpt_deep", RECIPES, "vpt-deep"),
        ("vpt", RECIPES, "vptm"),
        ("exp", ("expansive", "additive"), "expansive"),
        ("to", ("auto", "torch"), "torch"),  # difflib prefers auto
        ("zzz", RECIPES, None),
        ("s", RECIPES, None),
        ("", RECIPES, None),
        ("c", ("mask", "cls", "mean"), None),
        ("vit", ("vit_base_patch16_224", "vit_large_patch14_clip_224"), None),
        (None, RECIPES, None),
    ],
)
def test_hint(value: object, allowed: tuple[str, ...], near: str | None) -> None:
    """An abbreviation finds its name; a far name, or a letter or family that many begin with, gets no random one."""
    assert hint(value, allowed) == ("" if near is None else f", did you mean {near!r}?")


def test_numbers_that_no_float_holds_are_refused_by_name() -> None:
    """Python's integers have no end; what learns is float32, which 1e39 would make infinite."""
    with pytest.raises(ValueError, match=r"^ema must be a number that a float holds, got an integer of 1329 bits$"):
        check_range("ema", 10**400, "in (0, 1)")
    with pytest.raises(ValueError, match=r"^prompt_gate must be finite, got -1e\+39$"):
        check_range("prompt_gate", -1e39, "finite")


def test_one_of_names_argument_choices_and_value() -> None:
    one_of("impl", "torch", ("auto", "torch"))
    with pytest.raises(ValueError, match=r"^impl must be one of auto, torch, got 'torhc', did you mean 'torch'\?$"):
        one_of("impl", "torhc", ("auto", "torch"))
