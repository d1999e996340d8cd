"""Lists of pictures with any number of labels each, and the command that learns them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from console import Console
from PIL import Image
from tiny_data import write_list
from torch.utils.data import DataLoader

from vptm.data.division import few_shot
from vptm.data.several_labels import SeveralLabelsDataset
from vptm.data.sources import load_data
from vptm.data.transforms import transforms
from vptm.models.opening import load_adapter


def test_lists_are_read_as_they_say(tmp_path: Path) -> None:
    """Labels in columns of their natural order; what is collated is (B, K) of 0 and 1."""
    data = load_data(write_list(tmp_path / "a"), multi_label=True)
    assert data.classes == ["left", "right", "some"] and data.name == "metadata"
    assert {split: len(part) for split, part in data.parts().items()} == {"train": 12, "val": 6, "test": 6}
    assert data.train.counts().tolist() == [4, 4, 8] and data.train.keys[:4] == ["0.png", "1.png", "2.png", "3.png"]
    ready = data.train.with_transform(lambda image: torch.from_numpy(np.array(image)))
    images, labels = next(iter(DataLoader(ready.subset([1, 2, 3]), batch_size=3)))
    assert images.shape == (3, 12, 12) and labels.tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 0]]
    assert data.train.in_memory(10**6).labels.shape == (12, 3)
    moved = data.train.renumbered(np.array([3, 0, 1]), ["right", "some", "none", "left"])
    assert moved.labels[1].tolist() == [0, 1, 0, 1] and moved.counts().tolist() == [4, 8, 0, 4]
    whole = load_data(write_list(tmp_path / "b", splits=None), multi_label=True)
    assert [len(part) for part in whole.parts().values()] == [17, 2, 5]
    assert whole.notes == ("no splits given: divided by seed 0 into 70 % train, 10 % val, 20 % test",)
    again = load_data(tmp_path / "b" / "metadata.jsonl", multi_label=True, seed=1)
    assert sorted(whole.train.keys) != sorted(again.train.keys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r'line 3: must be \{"file_name": "\.\.\.", "labels": \["\.\.\.", \.\.\.\]\}, with a "split" or without'),
        ('["0.png"]', "line 3: must be"),
        ('{"file_name": "0.png", "labels": "left"}', "line 3: must be"),
        ('{"file_name": "0.png", "labels": [1]}', "line 3: must be"),
        ('{"file_name": "0.png", "label": ["left"]}', "line 3: must be"),
        ('{"file_name": "0.png", "labels": [], "boxes": []}', "line 3: must be"),
        ('{"file_name": "9.png", "labels": []}', "line 3: image not found"),
        ('{"file_name": "0.png", "labels": []}', "line 3: must list each image once, got 0.png more than once"),
        ('{"file_name": "./2.png", "labels": ["some", "some"]}', "line 3: labels must be there once each"),
        ('{"file_name": "2.png", "labels": [], "split": "exam"}', "line 3: split must be one of .*, got 'exam'"),
        ('{"file_name": "2.png", "labels": [], "split": "train"}', "must give every image a split, or none, got both"),
    ],
)
def test_what_is_no_such_list_is_refused_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    file = write_list(tmp_path, 3, splits=None)
    first, second = file.read_text().splitlines()[:2]
    file.write_text("\n".join([first, second, line]))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        load_data(file, multi_label=True)
    assert "\n" not in str(refusal.value)


def test_labels_and_data_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    """Else one label of many would be trained on, or counted, as if it were the only one."""
    file = write_list(tmp_path)
    with pytest.raises(ValueError, match=r"metadata has several labels an image, which vptm train --multi-label"):
        load_data(file)
    with pytest.raises(ValueError, match=r"--multi-label \(multi_label=True\) needs a .jsonl list .*, digits has one"):
        load_data("digits", multi_label=True)
    data = load_data(file, multi_label=True)
    with pytest.raises(ValueError, match="shots must be all for images of several labels, got 2"):
        few_shot(data.train, 2)
    with pytest.raises(ValueError, match="must be 0 or 1 for each of 3 classes, got 2 for image 0"):
        data.train.with_labels(data.train.labels * 2 + 2 - data.train.labels)
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows[:6], '{"file_name": "6.png", "labels": ["up"], "split": "val"}']))
    with pytest.raises(ValueError, match=r"6\.png of the val split has the label 'up', which the train split does not"):
        load_data(file, multi_label=True)
    file.write_text("\n")
    with pytest.raises(ValueError, match="must list images, got none"):
        load_data(file, multi_label=True)
    assert isinstance(data.train, SeveralLabelsDataset)


def test_the_command_learns_measures_and_names_several_labels(vptm: Console, material: Path, tmp_path: Path) -> None:
    """From the list to rows of predictions, with what each command says of them."""
    file = write_list(tmp_path / "pictures", 48)
    learns = ["--readout", "mean", "--token-activation", "hidden", "--verbalizer", "linear", "--lr", 0.05, "--no-flip"]
    start = ["train", "--model", material / "backbone.safetensors", "--data", file, "--shots", "all", "--multi-label"]
    code, out, err = vptm(*start, "--epochs", 25, "--batch-size", 8, "--out", tmp_path / "r", *learns)
    assert code == 0 and "3 classes, images of each:" in err and "some   train 16, val 8, test 8" in err
    lines = out.splitlines()
    assert lines[0].startswith("validation mAP       1.0000 at epoch ")
    assert lines[1].startswith("test mAP             1.0000 of 12 images, loss 0.") and "micro-F1 " in lines[1]
    assert lines[2].endswith("metrics.csv, curves.png)") and not (tmp_path / "r" / "confusion.png").exists()
    facts = json.loads((tmp_path / "r" / "run.json").read_text())
    assert facts["result"]["val_map"] == 1.0 and facts["result"]["val_accuracy"] is None
    assert facts["result"]["test"]["ap_per_class"] == {"left": 1.0, "right": 1.0, "some": 1.0}
    code, printed, _ = vptm("evaluate", tmp_path / "r", "--json")
    measured = json.loads(printed)
    assert code == 0 and measured["map"] == 1.0 and measured["loss"] == facts["result"]["test"]["loss"]
    code, printed, _ = vptm("evaluate", tmp_path / "r")
    rows = printed.splitlines()
    assert rows[0].split() == ["average", "precision", "recall", "precision", "F1"] and rows[1].startswith(
        "left   100.00%"
    )
    assert rows[-1].startswith("test mAP 1.0000 of 12 images")
    assert "test mAP" in vptm("inspect", tmp_path / "r")[1]
    shown = [tmp_path / "pictures" / f"{k}.png" for k in range(3)]
    code, printed, _ = vptm("predict", tmp_path / "r", *shown)
    said = list(csv.DictReader(printed.splitlines()))
    assert [{name for name, _ in json.loads(row["top5"])} for row in said] == [
        set(),
        {"left", "some"},
        {"right", "some"},
    ]
    assert said[0]["label"] == said[0]["score"] == "" and float(said[1]["score"]) >= 0.5
    code, printed, _ = vptm("predict", tmp_path / "r", shown[0], "--threshold", 0, "--format", "jsonl")
    model = load_adapter(tmp_path / "r")
    with torch.no_grad(), Image.open(shown[0]) as image:
        scores = model(transforms(model)(image)[None]).sigmoid()[0]
    wanted = dict(zip(model.class_names or (), scores.tolist()))
    assert dict(json.loads(printed)["top5"]) == pytest.approx(wanted, abs=1e-5)
    for more, reason in (
        (["--shots", 4], "--shots must be all with --multi-label, got 4"),
        (["--balanced-sampler"], "--balanced-sampler must be False with --multi-label, got True"),
        (["--data", "digits"], "digits has one each"),
        (["--no-multi-label"], "no-multi-label"),
    ):
        code, line = vptm.refused(*start, "--out", tmp_path / "no", *learns, *more)
        assert code == 2 and reason in line and not (tmp_path / "no").exists()
    code, line = vptm.refused(*(one for one in start if one != "--multi-label"), "--out", tmp_path / "no", *learns)
    assert code == 2 and "metadata has several labels an image" in line
    code, line = vptm.refused("compare", "--data", file, "--out", tmp_path / "c")
    assert code == 2 and "metadata has several labels an image" in line
