"""Recipes: every shipped one trains, says what its paper says, and goes behind the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from beit_factory import tiny_beit
from console import Console
from tiny_models import tiny_vit

from vptm.commands.train import train_settings
from vptm.methods import run as run_module
from vptm.models import prompted_vit
from vptm.models.opening import load_adapter
from vptm.recipes.recipe import ALIASES, read_recipe, recipe_names
from vptm.settings import train_options
from vptm.training.schedules import SCHEDULES

FAST = ["--epochs", 2, "--warmup-epochs", 1, "--prompt-length", 2, "--shots", 2, "--batch-size", 3]


def train(vptm: Console, material: Path, recipe: str, *more: object) -> tuple[dict, str]:
    arguments = ["train", "--model", material / "backbone.safetensors", "--data", material / "pictures"]
    code, out, err = vptm(*arguments, "--recipe", recipe, "--out", "run", "--overwrite", *FAST, *more)
    assert code == 0, err
    return json.loads(Path("run/run.json").read_text()), out


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains(vptm: Console, material: Path, name: str) -> None:
    """A recipe whose settings contradict each other, or that the model refuses, fails here; its values are the run's
    where the command line says nothing."""
    run, out = train(vptm, material, name)
    given = {str(option)[2:].replace("-", "_") for option in FAST if str(option).startswith("--")}
    for key, value in read_recipe(name).settings.items():
        assert key in given or run["settings"][key] == value, key
    assert run["settings"]["recipe"] == name and run["settings"]["epochs"] == 2
    assert (run["settings"]["prompt_gate"], run["settings"]["prototype_init"]) == (None, "xavier"), "no method's own"
    assert "test accuracy" in out and load_adapter("run", source=material / "backbone.safetensors").num_classes == 3
    assert run["cost"]["trainable_parameters"] > 0 and run["cost"]["images_per_second"] > 0
    assert run["cost"]["peak_memory"] > 1e6


def test_settings_of_the_papers() -> None:
    """Values that identify a method: changing one silently would train another."""
    recipes = {name: read_recipe(name).settings for name in recipe_names()}
    assert {"vptm", "vpt-shallow", "vpt-deep", "spt-shallow", "spt-deep", "linear", "finetune"} <= recipes.keys()
    vpt, spt = recipes["vpt-deep"], recipes["spt-deep"]
    assert (vpt["optimizer"], vpt["schedule"], vpt["warmup_epochs"], vpt["epochs"]) == ("momentum", "vpt", 10, 100)
    assert vpt["prompt_weight_decay"] == vpt["weight_decay"] and vpt["prompt_dropout"] == 0.1
    assert (spt["prompt_length"], spt["prompt_init"], spt["head_weight_decay"], spt["lr"]) == (20, "random", 0.5, 0.05)
    assert recipes["spt-shallow"]["prompt_length"] == 100
    assert all(settings["schedule"] in SCHEDULES for settings in recipes.values())
    stated = {"optimizer", "lr", "weight_decay", "schedule", "epochs", "batch_size", "prompt_length", "augment"}
    for name, settings in recipes.items():
        assert stated <= settings.keys(), f"{name} leaves {stated - settings.keys()} to the defaults of `vptm train`"
        assert settings["augment"] is True, f"{name}: the published codes crop and mirror photos, save those of VTAB"
    kv = recipes["e2vpt-kv"]
    assert (kv["prompt_kind"], kv["prompt_mode"], kv["prompt_length"], kv["batch_size"]) == ("kv", "deep", 5, 64)
    vipamin = recipes["vipamin-deep"]
    assert (vipamin["prompt_length"], vipamin["prompt_init"], vipamin["batch_size"]) == (20, "vipamin", 128)
    bpt = recipes["bpt-shallow"]
    assert (bpt["prompt_length"], bpt["prompt_dim"], bpt["lr"], bpt["head_weight_decay"]) == (100, 75, 0.05, 0.5)
    cvpt = recipes["cvpt"]
    assert (cvpt["prompt_kind"], cvpt["optimizer"], cvpt["lr"], cvpt["weight_decay"]) == ("cross", "adamw", 1e-3, 0.05)
    assert (cvpt["prompt_length"], cvpt["prompt_dropout"], cvpt["batch_size"]) == (10, 0.1, 32)
    assert "`vptm protocol`" in read_recipe("provp").summary, "its linear head is not the paper's"


def test_search_values_are_options_of_train() -> None:
    """`vptm compare --search` would fail late on a misspelt option."""
    options = train_options().keys()
    for name in recipe_names():
        recipe = read_recipe(name)
        assert recipe.search.keys() <= options and recipe.search.keys() <= recipe.settings.keys()
        assert all(recipe.settings[key] in values for key, values in recipe.search.items())


def test_own_recipe_and_command_line(vptm: Console, material: Path) -> None:
    """A file of one's own works like a shipped one, and an option on the command line goes before it."""
    Path("mine.yaml").write_text(
        "summary: mine\nsettings: {readout: mean, token_activation: hidden, lr: 1e-3, seed: 4, temperature: null}\n"
    )
    run, _ = train(vptm, material, "mine.yaml", "--lr", 0.02)
    assert (run["settings"]["readout"], run["settings"]["seed"], run["settings"]["lr"]) == ("mean", 4, 0.02)


@pytest.mark.parametrize(
    ("written", "given", "gate"),
    [
        ("{}", [], None),
        ("{prompt_gate: -3}", [], -3.0),
        ("{prompt_gate: null}", [], None),
        ("{prompt_gate: none}", [], None),
        ("{prompt_gate: -3}", ["--prompt-gate", "none"], None),
        ("{prompt_gate: none}", ["--prompt-gate", "-2"], -2.0),
    ],
)
def test_gates_of_a_recipe(tmp_path: Path, written: str, given: list[str], gate: float | None) -> None:
    """A recipe without gates has none, and takes the word that the command line takes, which goes before it."""
    (tmp_path / "mine.yaml").write_text(f"summary: mine\nsettings: {written}\n")
    settings, _ = train_settings(["--recipe", str(tmp_path / "mine.yaml"), *given])
    assert settings.model_settings.prompt_gate == gate


def test_a_recipe_decides_on_augmentation(vptm: Console, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`augment: false` of a recipe must reach the images, and --augment on the command line goes before it."""
    asked: list[bool] = []
    original = run_module.transforms

    def transforms(model: object, train: bool = False, **settings: object) -> object:
        asked.append(train)
        return original(model, train, **settings)

    monkeypatch.setattr(run_module, "transforms", transforms)
    Path("mine.yaml").write_text("summary: x\nsettings: {readout: mean, token_activation: hidden, augment: false}\n")
    for more, augmented in (([], False), (["--augment"], True)):
        asked.clear()
        run, _ = train(vptm, material, "mine.yaml", *more)
        assert run["settings"]["augment"] is augmented and any(asked) is augmented


@pytest.mark.parametrize(
    "given, warmup",
    [
        ([], 10),
        (["--epochs", "1"], 0),
        (["--epochs", "15"], 2),
        (["--epochs", "200"], 20),
        (["--epochs", "15", "--warmup-epochs", "4"], 4),
        (["--warmup-epochs", "4"], 4),
    ],
)
def test_the_warm_up_keeps_its_share_of_given_epochs(given: list[str], warmup: int) -> None:
    """The recipe's 10 of 100 epochs; as they stand, `--epochs` up to 10 would be refused."""
    settings, _ = train_settings(["--recipe", "vpt-deep", *given])
    assert settings.train_settings.warmup_epochs == warmup


def test_few_epochs_of_a_recipe_with_warm_up_train(vptm: Console, material: Path) -> None:
    arguments = ["train", "--model", material / "backbone.safetensors", "--data", material / "pictures", "--shots", 2]
    code, _, err = vptm(*arguments, "--recipe", "vpt-deep", "--prompt-length", 2, "--epochs", 1, "--out", "run")
    assert code == 0, err
    assert json.loads(Path("run/run.json").read_text())["arguments"]["warmup_epochs"] == 0


def test_aliases_are_recipes_everywhere(vptm: Console, material: Path) -> None:
    """A name that `vptm compare` takes is one for `vptm train`, and trains the same."""
    assert ALIASES["spt"] == "spt-deep" and not ALIASES.keys() & set(recipe_names())
    for alias, name in ALIASES.items():
        assert read_recipe(alias) == read_recipe(name)
    run, _ = train(vptm, material, "spt")
    assert run["settings"]["prompt_init"] == "random" and run["settings"]["head_weight_decay"] == 0.5


def test_prompts_start_from_tokens_and_survive_a_resume(vptm: Console, material: Path) -> None:
    """`--prompt-init` changes where training starts, alike for one seed; a finished run resumed is unchanged."""
    arguments = ["train", "--model", material / "backbone.safetensors", "--data", material / "pictures"]
    arguments += ["--readout", "cls", "--token-activation", "hidden", *FAST, "--lr", 1e-12, "--seed", 5]
    weights = {}
    for out, method in (("a", "random"), ("b", "random"), ("c", "uniform"), ("d", "kmeans")):
        code, _, err = vptm(*arguments, "--prompt-init", method, "--out", out)
        assert code == 0, err
        weights[out] = Path(out, "adapter_model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] and len(set(weights.values())) == 3
    assert vptm("train", "--resume", "--out", "a")[0] == 0
    assert Path("a", "adapter_model.safetensors").read_bytes() == weights["a"]


def test_bad_recipes_are_refused(vptm: Console, material: Path) -> None:
    """One line that lists the known names, suggests the nearest, or names the wrong entry; nothing is trained."""
    for name, text, message in (
        ("spt-depe", None, "finetune, linear,"),
        ("spt-depe", None, "did you mean 'spt-deep'?"),
        ("sptt", None, "an alias (spt, provp-ref), or a .yaml file, got 'sptt', did you mean 'spt'?"),
        ("prov", None, "did you mean 'provp'?"),
        ("none.yaml", None, "recipe not found: none.yaml"),
        ("x.yaml", "settings: {}", "must have summary, settings and optionally search, got settings"),
        ("x.yaml", "- 1", "got list"),
        ("x.yaml", "a: [", "must be YAML"),
        ("x.yaml", "[" * 5000, "nested too deeply"),
        ("x.yaml", "summary: \udcff", "text that is not Unicode"),
        ("x.yaml", "summary: x\nsettings: {lrr: 1}", "unknown setting 'lrr', did you mean 'lr'?"),
        ("x.yaml", "summary: x\nsettings: {out: y}", "unknown setting 'out'"),
        ("x.yaml", "summary: x\nsettings: {epochs: 2.5}", "epochs must be int, got 2.5"),
        ("x.yaml", "summary: x\nsettings: {}\nsearch: {lr: 1}", "search.lr must be a list"),
    ):
        if text is not None:
            Path(name).write_text(text, errors="surrogateescape")
        code, line = vptm.refused("train", "--data", material / "pictures", "--recipe", name)
        assert code == 2 and message in line, line
    code, line = vptm.refused("train", "--data", material / "pictures", "--prompt-init", "k-means")
    assert code == 2 and "did you mean 'kmeans'" in line


def test_prompt_variants_from_the_command_line(vptm: Console, material: Path) -> None:
    """The options reach the prompt bank, and only those that were given are stored with the adapter."""
    run, _ = train(
        vptm, material, "vpt-deep", "--prompt-blocks", -1, "--prompt-dim", 5, "--prompt-dropout-per", "batch"
    )
    assert run["settings"]["prompt_blocks"] == -1
    loaded = load_adapter("run", source=material / "backbone.safetensors")
    assert loaded.config["prompt_options"] == {"blocks": -1, "prompt_dim": 5, "dropout_per": "batch"}
    assert loaded.prompts.weight.shape == (1, 2, 5)
    arguments = ["train", "--model", material / "backbone.safetensors", "--data", material / "pictures"]
    code, line = vptm.refused(*arguments, "--shots", 2, "--prompt-placement", "add", "--prompt-length", 4)
    assert code == 2 and "prompt_length must be 1 or the number of patches, 9" in line


def test_a_classifiers_file_has_the_defaults_of_its_kind(vptm: Console, material: Path) -> None:
    """Deep prompts and gates by default are for weights with a mask token: they were chosen on no others."""
    torch.save({"model": tiny_beit((3, 3), in_chans=1).state_dict()}, "classifier.pth")
    arguments = ["train", "--model", "classifier.pth", "--data", material / "pictures", *FAST, "--out", "run"]
    for more in ([], ["--readout", "mean", "--overwrite"]):
        code, _, err = vptm(*arguments, *more)
        assert code == 0 and "classifier.pth is a BEiT without a mask token: shallow prompts, " in err, err
        found = json.loads(Path("run/run.json").read_text())["settings"]
        kept = [found[name] for name in ("prompt_gate", "prototype_init", "verbalizer", "token_activation")]
        assert kept == [None, "xavier", "linear", "hidden"] and found["readout"] == ("mean" if more else "cls")
    code, line = vptm.refused(*arguments, "--readout", "mask", "--overwrite")
    assert code == 2 and "readout='mask' needs a mask token" in line


def test_vision_transformers_by_name(vptm: Console, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT's file or timm name trains a PromptedViT under the same recipes; options of BEiT alone are refused by
    name, and a run of a file resumes and predicts from the file."""
    torch.save({"model": tiny_vit((3, 3), embed_dim=64, num_heads=1, in_chans=1).state_dict()}, "mae.pth")
    code, out, err = vptm("train", "--model", "mae.pth", "--data", material / "pictures", *FAST, "--out", "file")
    assert code == 0 and "mae.pth is a ViT: deep prompts, read-out cls, verbalizer linear" in err, err
    code, out, err = vptm("predict", "file", material / "pictures" / "left" / "0.png")
    assert code == 0 and out.count("left") >= 1, err
    original = prompted_vit.load_vit
    monkeypatch.setattr(
        prompted_vit, "load_vit", lambda source, **options: original(source, **options | {"pretrained": False})
    )
    arguments = ["train", "--model", "vit_tiny_patch16_224", "--img-size", 32, "--data", material / "pictures", *FAST]
    code, out, err = vptm(*arguments, "--recipe", "spt-deep", "--epochs", 2, "--out", "vit")
    assert code == 0 and "test accuracy" in out, err
    assert json.loads(Path("vit/adapter_config.json").read_text())["model_class"] == "PromptedViT"
    code, line = vptm.refused(*arguments, "--recipe", "vpt-deep", "--mask-mode", "replace")
    assert code == 2 and "--mask-mode is for BEiT models" in line
    code, line = vptm.refused(*arguments, "--readout", "mask")
    assert code == 2 and "readout='mask' needs a mask token in the encoder, vit_tiny_patch16_224 has none" in line
    arguments[2] = "deit_tiny_patch16_224"  # a ViT by another name, with the defaults of its kind
    code, out, err = vptm(*arguments, "--out", "deit")
    assert code == 0 and "test accuracy" in out, err
    settings = json.loads(Path("deit/run.json").read_text())["settings"]
    assert (settings["prompt_mode"], settings["readout"], settings["verbalizer"]) == ("deep", "cls", "linear")
    assert "deit_tiny_patch16_224 is a ViT: deep prompts, read-out cls, verbalizer linear" in err
    eva = [*arguments[:2], "eva02_tiny_patch14_224", "--img-size", 28, *arguments[5:]]
    code, out_eva, err = vptm(*eva, "--out", "eva")
    assert code == 0 and "test accuracy" in out_eva, err
    assert "eva02_tiny_patch14_224 is a ViT: deep prompts, read-out cls, verbalizer linear" in err
    code, again, _ = vptm("train", "--resume", "--out", "deit")
    assert code == 0 and again == out, "a finished run that is resumed is read again"


def test_an_option_that_changes_nothing_is_taken_with_one_line(vptm: Console, material: Path) -> None:
    """Recipes and scripts of an older version name `prompt_location`; they must go on training the same."""
    Path("old.yaml").write_text(
        "summary: x\nsettings: {prompt_location: end, readout: mean, token_activation: hidden}\n"
    )
    for arguments in (["--recipe", "old.yaml"], ["--readout", "mean", "--prompt-location", "end"]):
        start = ["train", "--model", material / "backbone.safetensors", "--data", material / "pictures"]
        code, _, err = vptm(*start, "--token-activation", "hidden", *FAST, *arguments, "--out", "r", "--overwrite")
        assert code == 0 and err.count("DeprecationWarning: prompt_location is ignored") == 1, err
        assert "prompt_location" not in json.loads(Path("r/run.json").read_text())["settings"]
