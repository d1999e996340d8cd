"""Folders as classes and splits: what a name stands for, what is left out, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_data import picture, write_pictures

from vptm.data.folders import split_of
from vptm.data.sources import load_data

PAIR = ("left", "right")


def flat(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        picture(0, k).save(folder / f"{k}.png")
    return folder


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("train_set", "test_set"),
        ("trainset", "testset"),
        ("TrainImages", "TestImages"),
        ("train800", "test200"),
        ("seg_train", "seg_test"),
        ("train-data", "Test"),
    ],
)
def test_splits_go_by_other_names(tmp_path: Path, train: str, test: str) -> None:
    """Taken for classes, they would teach a model to tell training pictures from test pictures."""
    write_pictures(tmp_path / train, 3, PAIR)
    write_pictures(tmp_path / test, 2, PAIR)
    data = load_data(tmp_path)
    assert data.classes == list(PAIR) and data.test is not None
    assert (len(data.train), len(data.test)) == (6, 4)


@pytest.mark.parametrize("inner", [None, "unknown", "test", "images"])
def test_a_test_folder_without_classes_is_unlabelled(tmp_path: Path, inner: str | None) -> None:
    write_pictures(tmp_path / "train", 4, PAIR)
    flat(tmp_path / "test" / inner if inner else tmp_path / "test", 5)
    data = load_data(tmp_path)
    assert data.classes == list(PAIR) and data.test is None and len(data.train) == 8
    assert "test holds 5 pictures without classes: unlabelled, left out" in data.notes


def test_unlabelled_pictures_beside_class_folders_are_left_out(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4, PAIR)
    flat(tmp_path / "test", 5)
    flat(tmp_path, 2)
    data = load_data(tmp_path, holdout=False)
    assert data.classes == list(PAIR) and data.test is not None and len(data.test) == 8
    assert "test holds 5 pictures without classes: unlabelled, left out" in data.notes
    assert f"{tmp_path.name} holds 2 pictures beside its folders: without a class, left out" in data.notes


def test_folders_that_are_no_classes_by_their_names_are_said(tmp_path: Path) -> None:
    """Pictures called unlabelled are no class; what macOS puts into archives is no picture; a flat "training" may be
    one of vehicles, and is told."""
    write_pictures(tmp_path, 4, PAIR)
    for name in ("unlabeled", "unlabelled_images", "training"):
        flat(tmp_path / name, 5)
    (tmp_path / "__MACOSX" / "left").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "left" / "._a.png").write_bytes(b"no picture")
    data = load_data(tmp_path, holdout=False)
    assert data.classes == [*PAIR, "training"]
    for name in ("unlabeled", "unlabelled_images"):
        assert f"{name} holds 5 pictures without classes: unlabelled, left out" in data.notes
    assert "training is taken for a class: it holds pictures, and no folder of a class" in data.notes
    for split in ("train", "val"):
        write_pictures(tmp_path / "divided" / split, 3, PAIR)
        flat(tmp_path / "divided" / split / "unlabelled2", 5)
    data = load_data(tmp_path / "divided")
    assert data.classes == list(PAIR) and len(data.train) == 6
    assert "train/unlabelled2 holds 5 pictures without classes: unlabelled, left out" in data.notes
    write_pictures(tmp_path / "one", 3, ("left",))
    flat(tmp_path / "one" / "unlabelled", 5)
    with pytest.raises(ValueError, match="unlabelled looks like unlabelled pictures: rename it if it is a class"):
        load_data(tmp_path / "one")


def test_loose_pictures_do_not_turn_a_split_into_a_class(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_pictures(tmp_path / split, 3, PAIR)
    flat(tmp_path / "train", 1)
    data = load_data(tmp_path)
    assert data.classes == list(PAIR) and len(data.train) == 6
    assert "train holds 1 pictures beside its folders: without a class, left out" in data.notes


def test_what_is_no_picture_is_counted(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4, PAIR)
    for k in range(3):
        (tmp_path / "left" / f"{k}.heic").write_bytes(b"ftypheic")
    (note,) = load_data(tmp_path, holdout=False).notes
    assert note.startswith("left out 3 files") and note.endswith("3 .heic")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.heic").write_bytes(b"ftypheic")
    with pytest.raises(ValueError, match=r"images of the class 'other', got none: left out 1 files .*1 \.heic$"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    "classes", [("valid", "invalid"), ("steam_train", "test_tube"), ("dev", "ops"), ("train 1", "train 2")]
)
def test_classes_may_have_a_splits_name(tmp_path: Path, classes: tuple[str, ...]) -> None:
    assert load_data(write_pictures(tmp_path, 4, classes)).classes == sorted(classes)


def test_a_class_may_have_folders_of_its_own(tmp_path: Path) -> None:
    write_pictures(tmp_path / "left", 3, ("near", "far"))
    write_pictures(tmp_path, 3, ("right",))
    data = load_data(tmp_path, holdout=False)
    assert data.classes == list(PAIR) and data.test is not None and len(data.test) == 9


@pytest.mark.parametrize("loose", [False, True])
def test_folders_that_every_class_holds_are_said(tmp_path: Path, loose: bool) -> None:
    """Folds above classes would be the classes without a word; folders of sessions below classes are all right."""
    for fold in ("fold1", "fold2"):
        write_pictures(tmp_path / fold, 3, ("cat", "dog"))
    if loose:
        flat(tmp_path / "fold1")
    notes = load_data(tmp_path, holdout=False).notes
    said = "the classes are fold1, fold2, and each holds the folders cat, dog: if those are the classes, put each into"
    assert any(note.startswith(said) for note in notes) is not loose


def build(root: Path, layout: str) -> None:
    for line in layout.split():
        folder, _, classes = line.partition(":")
        if classes:
            write_pictures(root / folder, 3, tuple(classes.split(",")))
        else:
            flat(root / folder)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("train800 val200 test", r"train800 must hold one folder per class, as a split does, got pictures only"),
        ("train:a,b trainset:a,b test:a,b", "must name each split once, got test, train, trainset"),
        ("trainA trainB testA testB", "must be divided into splits once, got"),
        ("test:a,b a b", "test looks like a split beside a, b: put those into a folder train, or rename it"),
        ("test control", "test looks like unlabelled pictures: rename it if it is a class"),
        ("a:train,test b:train,test", "splits above classes: a holds the folders test, train"),
        ("test:a,b val:a,b other", "looks like a split beside other"),
    ],
)
def test_what_may_be_a_split_and_may_be_a_class_is_refused(tmp_path: Path, layout: str, message: str) -> None:
    build(tmp_path, layout)
    with pytest.raises(ValueError, match=message) as refusal:
        load_data(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_name_of_several_splits_names_none() -> None:
    assert split_of("train800val200") is None and split_of("strainer") is None


def test_names_that_are_no_utf_8_are_read(tmp_path: Path) -> None:
    """Archives from other systems unpack to such names: fails if one of them stops the division of a whole folder."""
    root = write_pictures(tmp_path, 4, PAIR)
    picture = next((root / "left").iterdir())
    picture.rename(os.fsdecode(os.fsencode(root / "left") + b"/\xff.png"))
    data = load_data(root)
    assert sum(len(part) for part in data.parts().values()) == 8 and len(data.train.content_hashes()) == len(data.train)
