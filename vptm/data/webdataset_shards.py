"""Shards of webdataset, tar files of pictures with their labels, by an index of their members.

A stream would do without the index, but has no length, no few of each class and no list of what it gave.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vptm.data.datasets import ImageDataset
from vptm.data.folders import split_of
from vptm.data.labelled_pictures import Entry, parts_of
from vptm.data.picture_files import suffixes
from vptm.messages import error_line, listed, one_line

_SAMPLE = re.compile(
    r"^((?:.*/)?[^./]+)\.([^/]*)$"
)  # the key of a sample and the name of its field, as webdataset has it
_INFO = ("_info.json", "info.json")


class Member(NamedTuple):
    """A picture in an uncompressed tar file: where its bytes stand, and what messages call it."""

    file: Path
    start: int
    size: int
    name: str

    def content(self) -> bytes:
        """Its encoded bytes."""
        with self.file.open("rb") as tar:
            tar.seek(self.start)
            return tar.read(self.size)


def read_shards(source: Path) -> dict[str, ImageDataset]:
    """The pictures of a .tar file or of those in a folder, by split; "all" where nothing says which.

    A sample is the members that share the name before the first dot: a picture, and a label as text in `cls` or under
    `label` or `cls` in `json`. Splits are those of `_info.json` beside the shards, or of their names
    (birds-train-000.tar). Reads the headers and the labels of every shard once.

    Raises:
        FileNotFoundError: no shard, or one that `_info.json` names and is not there.
        ValueError: a file that is no uncompressed tar file, a sample without picture or label, or shards of several
            data sets.
    """
    entries: list[Entry] = []
    for split, files in _splits(source).items():
        for file in files:
            entries += _samples(file, split)
    return parts_of(entries, source)


def _splits(source: Path) -> dict[str, list[Path]]:
    if source.is_file():
        return {"all": [source]}
    info = next((source / name for name in _INFO if (source / name).is_file()), None)
    if info is not None:
        return _stated(info)
    files = sorted(source.glob("*.tar"))
    if not files:
        raise FileNotFoundError(f"data not found: {source} holds no .tar files")
    named = {file: split_of(file.stem) for file in files}
    if not any(named.values()):
        return {"all": files}
    if unnamed := [file.name for file, split in named.items() if split is None]:
        raise ValueError(f"{source} must say the split of every shard or of none, got {listed(unnamed)} without")
    found: dict[str, list[Path]] = {}
    for file, split in named.items():
        found.setdefault(split[0], []).append(file)  # type: ignore[index]
    if len({split[1] for split in named.values() if split}) > 1:
        raise ValueError(f"{source} must hold the shards of one data set, got {listed([file.name for file in files])}")
    return found


def _stated(info: Path) -> dict[str, list[Path]]:
    try:
        splits = json.loads(info.read_text(encoding="utf-8"))["splits"]
        files = {name: [str(file) for file in split["filenames"]] for name, split in splits.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{info} must have the filenames of its splits: {error_line(error)}") from None
    found: dict[str, list[Path]] = {}
    for name, shards in files.items():
        split = split_of(name)
        if split is None or split[1] or split[0] in found:
            raise ValueError(f"{info} must have the splits train, val and test, each once, got {listed(list(files))}")
        found[split[0]] = [info.parent / shard for shard in shards]
    if missing := [path for paths in found.values() for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{info}: shard not found: {one_line(missing[0], 1000)}")
    return found


def _samples(file: Path, split: str) -> Iterator[Entry]:
    key = ""
    fields: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                parsed = _SAMPLE.match(member.name) if member.isfile() else None
                if parsed is None:
                    continue
                if parsed[1] != key:
                    if fields:
                        yield _entry(file, key, fields, split, tar)
                    key, fields = parsed[1], {}
                fields[parsed[2].lower()] = member
            if fields:
                yield _entry(file, key, fields, split, tar)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file} must be an uncompressed tar file: {error_line(error)}") from None


def _entry(file: Path, key: str, fields: dict[str, tarfile.TarInfo], split: str, tar: tarfile.TarFile) -> Entry:
    where = f"{file} sample {one_line(key)}"
    picture = next((member for name, member in fields.items() if f".{name}" in suffixes()), None)
    if picture is None:
        raise ValueError(f"{where} must have a picture, got {listed(list(fields))}")
    image = Member(file, picture.offset_data, picture.size, f"{file}:{picture.name}")
    return Entry(image, f"{file.name}/{picture.name}", _label(fields, tar, where), split)


def _label(fields: dict[str, tarfile.TarInfo], tar: tarfile.TarFile, where: str) -> str:
    label: object = None
    try:
        if "cls" in fields:
            label = _content(fields["cls"], tar).strip()
        elif "json" in fields:
            facts = json.loads(_content(fields["json"], tar))
            label = facts.get("label", facts.get("cls"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{where} must have a readable label: {error_line(error)}") from None
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label):
        raise ValueError(f"{where} must have a label in cls, or under label or cls in json, got {one_line(label)}")
    return str(label)


def _content(member: tarfile.TarInfo, tar: tarfile.TarFile) -> str:
    file = tar.extractfile(member)
    assert file is not None
    return file.read().decode()
