"""Settings stand once: what Python's keywords, the command line, recipes and files have follows from them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, get_type_hints

import pytest

from vptm import settings
from vptm.models.prompted_beit import PromptedBEiT
from vptm.models.prompted_vit import PromptedViT
from vptm.models.prompts import PromptBank
from vptm.settings import RunSettings, train_options
from vptm.training.fit import fit


@pytest.mark.parametrize(
    ("takes", "group", "others"),
    [
        (PromptedBEiT, settings.BEiTSettings, {"prompt_location"}),
        (PromptedViT, settings.ViTSettings, set()),
        (PromptBank, settings.PromptSettings, {"mode", "dropout", "alpha", "gate", "heads"}),
        (
            fit,
            settings.TrainSettings,
            {
                "cache_frozen",
                "run_dir",
                "resume",
                "overwrite",
                "device",
                "progress",
                "info",
                "images",
                "steps_per_epoch",
                "callbacks",
            },
        ),
    ],
)
def test_keywords_are_the_settings(takes: Any, group: type[settings.SettingsGroup], others: set[str]) -> None:
    """A default that differs would make the command train another model than the same words in Python."""
    keywords = {p.name: p for p in inspect.signature(takes).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keywords.keys() - others == set(settings.names(group))
    required, types = (
        {"epochs", "lr", "patch_values"},
        get_type_hints(takes.__init__ if inspect.isclass(takes) else takes),
    )
    for name, default in {name: group.__dataclass_fields__[name].default for name in settings.names(group)}.items():
        assert name in required or keywords[name].default == default, name
        # settings import no torch, whose types a codebook may have
        assert name in ("patch_values", "codebook") or types[name] == get_type_hints(group)[name], name


@pytest.mark.parametrize("kind", settings.MODEL_SETTINGS)
def test_options_name_every_setting_and_come_back(kind: str) -> None:
    """A setting that is lost on the way through `run.json` would resume a run as another one."""
    changed = {"readout": "mean", "prompt_blocks": -1, "prompt_mode": "deep", "epochs": 3, "shots": "all"}
    run = RunSettings.from_options(changed, kind)
    flat = run.options()
    assert changed.items() <= flat.items() and RunSettings.from_options(flat, kind) == run
    assert run.model_settings.prompt_options == {"blocks": -1}, "only what is no default is kept with the adapter"
    assert type(run.model_settings) is settings.MODEL_SETTINGS[kind]
    assert RunSettings() == RunSettings.from_options({}, "beit")
    assert train_options().keys() - flat.keys() <= {
        "mask_mode",
        "train_mask_token",
        "extra_bias",
        "architecture",
        "codebook",
    }


@pytest.mark.parametrize(
    ("said", "kind", "start", "mode", "gate"),
    [
        ({}, "beit", "whitened", "deep", -4.0),
        ({"prompt_gate": None}, "beit", "whitened", "deep", None),
        ({"prompt_gate": 0.0, "prompt_mode": "shallow"}, "beit", "whitened", "shallow", 0.0),
        ({"prototype_init": "xavier"}, "beit", "xavier", "deep", -4.0),
        ({"verbalizer": "linear"}, "beit", "xavier", "deep", -4.0),
        ({"multi_label": True, "shots": "all"}, "beit", "xavier", "deep", -4.0),
        ({"token_activation": "hidden"}, "beit", "whitened", "deep", -4.0),
        ({"token_activation": "softmax"}, "beit", "class_means", "deep", -4.0),
        ({"prototype_dim": None}, "beit", "class_means", "deep", -4.0),
        ({"projection_bias": False}, "beit", "class_means", "deep", -4.0),
        ({"prompt_length": 0}, "beit", "whitened", "deep", None),
        ({"prompt_kind": "cross"}, "beit", "whitened", "deep", None),
        ({"prompt_kind": "kv"}, "beit", "whitened", "deep", -4.0),
        ({"prompt_placement": "add"}, "beit", "whitened", "deep", None),
        ({"recipe": "vptm"}, "beit", "xavier", "shallow", None),
        ({"recipe": "vptm", "prototype_init": "whitened"}, "beit", "whitened", "shallow", None),
        ({}, "classifier_beit", "xavier", "shallow", None),
        ({}, "vit", "xavier", "deep", None),
        ({"verbalizer": "prototypical", "prompt_mode": "shallow"}, "vit", "whitened", "shallow", None),
    ],
)
def test_defaults_that_follow_from_other_options(
    said: dict[str, Any], kind: str, start: str, mode: str, gate: float | None
) -> None:
    """One that does not fit the rest would refuse a run that asked for nothing of the kind, or change a recipe's."""
    run = RunSettings.from_options(said, kind)
    model = run.model_settings
    assert (run.prototype_init, model.prompt_mode, model.prompt_gate) == (start, mode, gate)
    assert (model.projection_bias, run.train_settings.lr) == ((True, 0.0005) if start == "whitened" else (False, 0.002))
    assert RunSettings.from_options({**said, "lr": 0.1, "projection_bias": True}, kind).train_settings.lr == 0.1
    assert RunSettings.from_options(run.options(), kind) == run, "a run that is resumed keeps its own"


def test_an_option_of_another_kind_of_model_is_refused_by_name() -> None:
    """Dropped silently, a run would not be what was asked for."""
    for values in ({"mask_mode": "replace"}, {"extra_bias": "cls"}):
        option = settings.option_name(next(iter(values)))
        with pytest.raises(ValueError, match=f"{option} is for BEiT models, x is a ViT"):
            RunSettings.from_options({"model": "x", **values}, "vit")
    with pytest.raises(ValueError, match="--architecture is for ViT models, x is a BEiT"):
        RunSettings.from_options({"model": "x", "architecture": "vit_base_patch16_224"}, "beit")
    assert RunSettings.from_options({"mask_mode": "insert"}, "vit") == RunSettings.from_options({}, "vit")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"readout": "row"}, "readout must be one of cls, mean, map, mean_with_prompts, mask, got 'row'"),
        ({"prompt_after": "dropp"}, "after must be one of carry, drop, got 'dropp', did you mean 'drop'"),
        ({"prompt_init": "k-means"}, "--prompt-init must be one of .*, did you mean 'kmeans'"),
        (
            {"verbalizer": "prototypical", "prototype_init": "whitened", "token_activation": "softmax"},
            "--prototype-init whitened needs --token-activation logits or hidden, got softmax",
        ),
        (
            {"verbalizer": "prototypical", "prototype_init": "whitened", "projection_bias": False},
            "--prototype-init whitened needs --projection-bias, got --no-projection-bias",
        ),
        (
            {"verbalizer": "prototypical", "prototype_init": "whitened", "prototype_dim": None},
            "--prototype-init whitened needs a --prototype-dim, got none",
        ),
        ({"batch_size": 0}, "--batch-size must be >= 1, got 0"),
        ({"seed": -1}, r"--seed must be in 0..2\^32-1, got -1"),
        ({"shots": "0"}, "--shots must be an integer >= 1 or all, got '0'"),
        ({"value_range": "5,5"}, "--value-range must be LOW,HIGH"),
        ({"class_weights": "1,x"}, "class_weights must be balanced, or a list of finite numbers > 0, got '1,x'"),
        ({"class_weights": "balanced", "balanced_sampler": True}, "--balanced-sampler and --class-weights balanced ex"),
        ({"prototype_steps": 2}, "--prototype-steps needs --verbalizer prototypical, got linear"),
        ({"verbalizer": "class_embeddings"}, "--verbalizer must be prototypical or linear in a run, got class_emb"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunSettings.from_options(values, "vit")


def test_switches_are_true_or_false() -> None:
    with pytest.raises(TypeError, match="train_lm_head must be True or False, got 1"):
        settings.ViTSettings(train_lm_head=1)  # type: ignore[arg-type]


GROUPS = [
    group
    for _, group in inspect.getmembers(settings, inspect.isclass)
    if issubclass(group, settings.SettingsGroup) and not group.__name__.startswith("_")
]
NUMBERS = {"class_weights", "lr_of", "weight_decay_of"}  # of several, or by name


def made(group: type[settings.SettingsGroup], **values: Any) -> settings.SettingsGroup:
    """A group with what it needs beside `values`."""
    needed = {"epochs": 2, "lr": 0.1, "shots": "1"}
    fields = dataclasses.fields(group)
    missing = [one.name for one in fields if one.default is one.default_factory is dataclasses.MISSING]
    return group(**{name: needed.get(name, "x") for name in missing} | values)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group in GROUPS
        for name, kind in get_type_hints(group).items()
        if "float" in str(kind) and name not in NUMBERS and name in inspect.get_annotations(group)
    ],
)
def test_every_number_has_a_range(group: type[settings.SettingsGroup], name: str) -> None:
    """NaN, infinity and what no float holds are refused in one line that names the setting: later they would be an
    OverflowError of the schedule, or a run of NaN. Below zero only gates and a threshold of cosines may be."""
    label = made(group)._label(name)
    for value in (math.nan, math.inf, -math.inf, 10**400, -(10**400), True, "1"):
        with pytest.raises((ValueError, TypeError), match=f"^{label} must be .*got ") as refusal:
            made(group, **{name: value})
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200
    if name not in ("prompt_gate", "threshold"):
        with pytest.raises(ValueError, match=f"^{label} must be .*got -0.5"):
            made(group, **{name: -0.5})


def test_numbers_of_several_hold_in_a_float() -> None:
    """As weights of classes, rates of groups, and in a recipe, whose YAML has integers of any length."""
    for given in ([1, 10**400], [math.inf, 1], [math.nan]):
        with pytest.raises(ValueError, match="class_weights must be balanced, or a list of finite numbers > 0"):
            settings.parse_weights(given)
    for value in (10**400, math.nan, math.inf, -0.5):
        with pytest.raises(ValueError, match=r"^lr_of\['prompts'\] must be "):
            made(settings.TrainSettings, lr_of={"prompts": value})
    with pytest.raises(ValueError, match="must be float, got 1000"):
        train_options()["lr"].read(10**400)
