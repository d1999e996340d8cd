"""A folder of pictures as classes and splits; what is not surely either is refused, what is left out is said."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from vptm.data.picture_files import image_files, is_picture, left_out_note
from vptm.messages import listed

_SPLIT_WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validating", "dev"),
    "test": ("test", "testing", "tst"),
}
SPLIT_NAMES = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_FILLERS = {
    "set",
    "sets",
    "data",
    "dataset",
    "image",
    "images",
    "img",
    "imgs",
    "picture",
    "pictures",
    "photo",
    "photos",
}
_FILLERS |= {"split", "folder", "sample", "samples"}
_NO_CLASS = {"unlabelled", "unlabeled"}
_UNLABELLED = _NO_CLASS | {"unknown", "all"}
_NO_DATA = {"__MACOSX"}  # what macOS puts beside the folders of an archive
_TOKEN = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+")


class Listing(NamedTuple):
    """The pictures of one split: paths and, in the same order, names of their classes."""

    paths: list[Path]
    names: list[str]


def read_folder(root: Path, notes: list[str]) -> tuple[dict[str, Listing], list[str]]:
    """Splits and classes of `root/class/picture` or `root/split/class/picture`; a folder without splits is "all".

    Folders are splits where their names are a word for train, val or test, with at most a word such as "set" or
    "images", numbers, and a part that they share ("train800" and "val200", "seg_train" and "seg_test"). A split other
    than train that holds pictures without classes is unlabelled and left out, and so is a folder of pictures that is
    called test or unlabelled beside the classes. One that is called train or val there is a class, which is noted.
    Hidden folders and __MACOSX are passed over.

    Args:
        root: an existing folder.
        notes: gets a line for pictures that are left out, and for what may be meant in another way.

    Raises:
        ValueError: no folder of pictures per class, or folders that may be splits and may be classes.
    """
    folders = _subfolders(root)
    if not folders:
        files = sorted(root.iterdir())
        lists = [file for file in files if file.suffix in (".jsonl", ".csv")]
        hint = f": pass a list by its file, as {lists[0]}" if lists else ""
        raise ValueError(
            f"{root} must hold one folder per class, got {'loose files only' if files else 'nothing'}{hint}"
        )
    _note_loose(root, notes)
    left_out: Counter[str] = Counter()
    splits = _splits(root, folders)
    if not splits:
        classes = _classes(root, folders, notes)
        parts = {"all": _class_folders(classes, left_out)}
        names = [folder.name for folder in classes]
    else:
        if ignored := [folder.name for folder in folders if folder not in splits.values()]:
            notes.append(f"folders beside the splits are ignored: {listed(ignored, 10)}")
        order = [split for split in ("train", "val", "test") if split in splits]
        names = [child.name for child in _labelled(splits[order[0]], [])]
        parts = {}
        for split in order:
            folder = splits[split]
            if split != "train" and _is_unlabelled(folder, _subfolders(folder), names):
                count = len(image_files(folder))
                notes.append(f"{folder.name} holds {count} pictures without classes: unlabelled, left out")
                continue
            _note_loose(folder, notes)
            children = _labelled(folder, notes)
            if unknown := [child.name for child in children if child.name not in names]:
                raise ValueError(f"{folder} holds the class {unknown[0]!r}, which the train split does not have")
            if not children:
                raise ValueError(
                    f"{folder} must hold one folder per class, as a split does, got "
                    f"{'pictures only' if image_files(folder) else 'no images'}"
                )
            parts[split] = _class_folders(children, left_out)
        if not parts:
            raise ValueError(f"{root} must hold one folder of images per class, got pictures without classes only")
    if left_out:
        notes.append(left_out_note(left_out))
    return parts, names


def _subfolders(folder: Path) -> list[Path]:
    folders = (child for child in folder.iterdir() if child.is_dir() and child.name not in _NO_DATA)
    return sorted(child for child in folders if not child.name.startswith("."))


def _loose(folder: Path) -> int:
    """How many pictures lie in `folder` itself."""
    files = (path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    return sum(map(is_picture, files))


def _note_loose(folder: Path, notes: list[str]) -> None:
    if count := _loose(folder):
        notes.append(f"{folder.name} holds {count} pictures beside its folders: without a class, left out")


def split_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Split that a folder's name stands for, and what else the name says; None where it names none, or several.

    Example:
        >>> split_of("train_set"), split_of("Testing"), split_of("val200"), split_of("seg_train"), split_of("strainer")
        (('train', ()), ('test', ()), ('val', ()), ('train', ('seg',)), None)
    """
    found: list[str] = []
    rest: list[str] = []
    for token in (token.lower() for token in _TOKEN.findall(name)):
        # "trainset" is one word
        stems = (token[: -len(end)] for end in _FILLERS if token.endswith(end))
        word = next((stem for stem in stems if stem in SPLIT_NAMES), token)
        if word in SPLIT_NAMES:
            found.append(SPLIT_NAMES[word])
        elif word not in _FILLERS and not word.isdigit():
            rest.append(word)
    return (found[0], tuple(rest)) if len(found) == 1 else None


def _splits(root: Path, folders: list[Path]) -> dict[str, Path]:
    """The folder of each split, empty where `folders` are classes."""
    groups: dict[tuple[str, ...], dict[str, list[Path]]] = {}
    for folder in folders:
        if named := split_of(folder.name):
            groups.setdefault(named[1], {}).setdefault(named[0], []).append(folder)
    plain = groups.get((), {})
    divisions = [group for group in groups.values() if "train" in group and len(group) > 1]
    if not divisions and plain:
        members = [folder for found in plain.values() for folder in found]
        # "train" can also be the name of a class (of vehicles): a split alone holds class folders and no images
        if all(map(_is_divided, plain.get("train", ()))) and (
            "train" in plain or (len(members) == len(folders) and any(map(_is_divided, members)))
        ):
            divisions = [plain]
    if len(divisions) > 1:
        several = [folder.name for group in divisions for found in group.values() for folder in found]
        raise ValueError(f"{root} must be divided into splits once, got {listed(several, 10)}")
    if not divisions:
        return {}
    if any(len(found) > 1 for found in divisions[0].values()):
        repeated = [folder.name for found in divisions[0].values() for folder in found]
        raise ValueError(f"{root} must name each split once, got {listed(repeated, 10)}")
    return {split: found[0] for split, found in divisions[0].items()}


def _is_divided(folder: Path) -> bool:
    return bool(_subfolders(folder)) and not _loose(folder)


def _labelled(split: Path, notes: list[str]) -> list[Path]:
    """The folders of classes in a split; what says that it is unlabelled is noted."""
    found = []
    for folder in _subfolders(split):
        if _says_unlabelled(folder.name) and not _subfolders(folder) and (count := _loose(folder)):
            notes.append(f"{split.name}/{folder.name} holds {count} pictures without classes: unlabelled, left out")
        else:
            found.append(folder)
    return found


def _is_unlabelled(folder: Path, children: list[Path], classes: list[str]) -> bool:
    """Whether a split has pictures and none of them in the folder of a class."""
    if not children:
        return _loose(folder) > 0
    if len(children) > 1 or children[0].name in classes:
        return False
    return _tokens(children[0].name) <= _FILLERS | _UNLABELLED | set(SPLIT_NAMES)


def _tokens(name: str) -> set[str]:
    return {token.lower() for token in _TOKEN.findall(name)}


def _says_unlabelled(name: str) -> bool:
    """Whether a folder's name says that its pictures have no class; "unknown" may be one."""
    tokens = {token for token in _tokens(name) if not token.isdigit()}
    return bool(tokens & _NO_CLASS) and tokens <= _NO_CLASS | _FILLERS | set(SPLIT_NAMES)


def _classes(root: Path, folders: list[Path], notes: list[str]) -> list[Path]:
    """The folders that are classes of an undivided root: an unlabelled one is noted, what may be a split refused."""
    no_splits = (folder for folder in folders if (named := split_of(folder.name)) is None or named[1])
    others = [folder for folder in no_splits if not _says_unlabelled(folder.name)]
    classes = []
    for folder in folders:
        children = _subfolders(folder)
        inner = {named[0] for child in children if (named := split_of(child.name)) and not named[1]}
        if len(inner) > 1:
            raise ValueError(
                f"{root} must hold classes, or splits above classes: {folder.name} holds the folders "
                f"{listed([child.name for child in children], 10)}"
            )
        named = split_of(folder.name)
        split = named if named and not named[1] else None
        if split is not None and split[0] != "train" and _is_divided(folder):
            raise ValueError(
                f"{root} must hold classes or splits, {folder.name} looks like a split beside "
                f"{listed([other.name for other in others], 10)}: put those into a folder train, "
                "or rename it if it is a class"
            )
        flat = not children and _loose(folder) > 0
        unlabelled = (split is not None and split[0] == "test") or _says_unlabelled(folder.name)
        if not (flat and unlabelled):
            classes.append(folder)
            if flat and split is not None:
                notes.append(f"{folder.name} is taken for a class: it holds pictures, and no folder of a class")
        elif len(others) > 1:
            notes.append(f"{folder.name} holds {_loose(folder)} pictures without classes: unlabelled, left out")
        else:
            raise ValueError(
                f"{root} must hold one folder per class, {folder.name} looks like unlabelled pictures: "
                "rename it if it is a class"
            )
    _note_repeated(classes, notes)
    return classes


def _note_repeated(classes: list[Path], notes: list[str]) -> None:
    """Say where every class is divided into the same folders: they may be the classes, below folds or sessions."""
    inner = [[child.name for child in _subfolders(folder)] for folder in classes]
    same = len(inner) > 1 and len(inner[0]) > 1 and all(names == inner[0] for names in inner)
    if same and not any(map(_loose, classes)):
        notes.append(
            f"the classes are {listed([folder.name for folder in classes])}, and each holds the folders "
            f"{listed(inner[0])}: if those are the classes, put each into one folder"
        )


def _class_folders(folders: list[Path], left_out: Counter[str]) -> Listing:
    paths: list[Path] = []
    names: list[str] = []
    for folder in folders:
        others: Counter[str] = Counter()
        files = image_files(folder, others)
        if not files:
            why = f": {left_out_note(others)}" if others else ""
            raise ValueError(f"{folder} must hold images of the class {folder.name!r}, got none{why}")
        paths += files
        names += [folder.name] * len(files)
        left_out += others
    return Listing(paths, names)
