"""Data as people have it: published lists, shards, tables of `datasets`, torchvision's folders."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_data import CLASSES, picture, write_backbone, write_pictures

from vptm.commands.app import main
from vptm.data.datasets import ImageDataset
from vptm.data.decoding import BadImageError
from vptm.data.sources import absolute, load_data
from vptm.training.run_folder import located


def same(part: ImageDataset | None, expected: list[tuple[int, int]]) -> bool:
    """Whether a part is these tiny pictures (kind, seed), in this order."""
    assert part is not None
    return [image.tobytes() for image, _ in part] == [picture(kind, seed).tobytes() for kind, seed in expected]


def write_lines(path: Path, rows: list[tuple[int, int]], folder: str = "images") -> Path:
    path.write_text("".join(f"{folder}/{CLASSES[kind]}/{seed}.png {kind + 3}\n" for kind, seed in rows))
    return path


def test_lists_of_vtab_say_what_is_trained_on(tmp_path: Path) -> None:
    """A label that no training image has still has its place among the scores, as in the published code; the images of
    val200 may not be trained on by the list without them, and are by the list with them."""
    write_pictures(tmp_path / "a b" / "images", 4)
    root = tmp_path / "a b"
    few, more = [(0, 0), (1, 0), (0, 1)], [(1, 1)]
    for name, rows in (("train800", few), ("val200", more), ("train800val200", few + more), ("test", [(2, 0), (0, 2)])):
        write_lines(root / f"{name}.txt", rows)
    data = load_data(root / "train800.txt")
    assert same(data.train, few) and same(data.val, more) and same(data.test, [(2, 0), (0, 2)])
    assert data.classes == ["3", "4", "5"] and data.train.labels.tolist() == [0, 1, 0] and data.name == "a b"
    assert "classes without a training image: 5" in data.notes
    whole = load_data(root / "train800val200.txt")
    assert same(whole.train, few + more) and whole.val is None and same(whole.test, [(2, 0), (0, 2)])
    assert same(load_data(root / "test.txt", holdout=False).test, [(2, 0), (0, 2)])
    with pytest.raises(
        ValueError, match=rf"images holds .*; its lists are read by their names, as {root}/train800.txt$"
    ):
        (root / "images" / "train").mkdir()
        (root / "images" / "test").mkdir()
        load_data(root)


def test_json_lists_of_vpt_are_relative_to_a_folder_of_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path / "Images", 2)
    (tmp_path / "train.json").write_text(json.dumps({f"{name}/0.png": k + 1 for k, name in enumerate(CLASSES)}))
    (tmp_path / "val.json").write_text(json.dumps({"left/1.png": 2}))
    data = load_data(tmp_path / "train.json")
    assert data.classes == ["1", "2", "3"] and same(data.train, [(0, 0), (1, 0), (2, 0)]) and same(data.val, [(1, 1)])
    assert data.test is None and data.notes == ("no test images",)


def test_the_split_of_coop_names_its_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "101_ObjectCategories", 2)
    write_pictures(tmp_path / "other", 1)
    rows = {
        split: [[f"{name}/{seed}.png", 2 - k, f"a {name} one"] for k, name in enumerate(CLASSES)]
        for split, seed in (("train", 1), ("test", 0))
    }
    file = tmp_path / "split_zhou_Caltech101.json"
    file.write_text(json.dumps(rows | {"val": []}))
    data = load_data(file)
    assert data.classes == ["a right one", "a left one", "a upper one"] and data.train.labels.tolist() == [2, 1, 0]
    assert same(data.train, [(0, 1), (1, 1), (2, 1)]) and same(data.test, [(0, 0), (1, 0), (2, 0)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.txt", "images/left/0.png\n", "line 1: must be a path and a label, got 'images/left/0.png'"),
        ("train.txt", "images/left/7.png 0\n", "train.txt: image not found: "),
        ("train.txt", "images/left/0.png 0\nimages/left/0.png 1\n", "images/left/0.png has the labels '0' and '1'"),
        ("train.txt", "", "must list images, got none"),
        ("train.txt", "images/left/0.png 0\n", "must have at least two classes, got only '0'"),
        ("train.json", "[1]", "must be an object, .* got list"),
        ("train.json", "{", "must be a json file: "),
        ("train.json", '{"images/left/0.png": 1.5}', "label of images/left/0.png must be a number or a name, got 1.5"),
        ("split_zhou_X.json", '{"trian": [["a", 0, "x"]]}', "must have the splits train, val and test, got 'trian'"),
        ("split_zhou_X.json", '{"train": [["a", 0]]}', r"train\[0\] must be \[path, label, class name\], got "),
        ("split_zhou_X.json", '{"train": [["a", 0, "x"], ["b", 0, "y"]]}', "label 0 must have one class name, got 'x'"),
        ("split_zhou_X.json", '{"train": [["a", 0, "x"], ["b", 1, "x"]]}', "the class name 'x' must have one label"),
        ("train.json", '{"left/0.png": 0}', "images in one folder, left/0.png is in again, images"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    for folder in ("images", "again"):
        write_pictures(tmp_path / folder, 1)
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        load_data(tmp_path / name)
    assert "\n" not in str(refusal.value)


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """Samples of {name of the field: content}; their keys are numbers."""
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for field, content in sample.items():
                member = tarfile.TarInfo(f"{path.stem}/{number:05d}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def png(kind: int, seed: int) -> bytes:
    file = io.BytesIO()
    picture(kind, seed).save(file, "PNG")
    return file.getvalue()


def shard_samples(count: int, first: int = 0) -> list[dict[str, bytes]]:
    return [
        {"cls": str(k % 3).encode(), "json": b"{}", "png": png(k % 3, first + k)}
        if k % 2
        else {"png": png(k % 3, first + k), "json": json.dumps({"label": k % 3}).encode()}
        for k in range(count)
    ]


def test_shards_are_read_as_files_are(tmp_path: Path) -> None:
    """Their pictures are kept in memory, hashed, listed and drawn from like others."""
    write_shard(tmp_path / "birds-train-000.tar", shard_samples(3))
    write_shard(tmp_path / "birds-train-001.tar", shard_samples(3, 3))
    write_shard(tmp_path / "birds-validation-000.tar", shard_samples(3, 6))
    data = load_data(f"wds/{tmp_path}")
    assert data.name == tmp_path.name and data.classes == ["0", "1", "2"]
    assert same(data.train, [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4), (2, 5)]) and same(
        data.val, [(0, 6), (1, 7), (2, 8)]
    )
    assert data.train.keys[4] == "birds-train-001.tar/birds-train-001/00001.png" and not data.train.unreadable()
    kept = data.train.in_memory(10_000)
    assert kept is not data.train and kept.content_hashes() == data.train.content_hashes()
    stated = {"validation": ["birds-train-001.tar"], "train": ["birds-train-000.tar"]}
    (tmp_path / "_info.json").write_text(
        json.dumps({"splits": {name: {"filenames": files} for name, files in stated.items()}})
    )
    assert same(load_data(f"wds/{tmp_path}").val, [(0, 3), (1, 4), (2, 5)])
    alone = load_data(f"wds/{write_shard(tmp_path / 'few.tar', shard_samples(9))}")
    assert alone.name == "few" and [len(part) for part in alone.parts().values()] == [3, 3, 3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.tar": [{"cls": b"0"}]}, "a.tar sample a/00000 must have a picture, got cls"),
        ({"a.tar": [{"png": b"x"}]}, "must have a label in cls, or under label or cls in json, got None"),
        ({"a.tar": [{"png": b"x", "json": b"["}]}, "sample a/00000 must have a readable label: "),
        ({"a.tar": b"no tar file"}, "a.tar must be an uncompressed tar file: "),
        ({"a-train-0.tar": [], "other.tar": []}, "must say the split of every shard or of none, got other.tar without"),
        ({"a-train-0.tar": [], "b-train-0.tar": []}, "must hold the shards of one data set, got a-train-0.tar, b-trai"),
        ({"a.tar": [], "info.json": b'{"splits": {"train": {}}}'}, "info.json must have the filenames of its splits"),
        ({"info.json": b'{"splits": {"train": {"filenames": ["b.tar"]}}}'}, "info.json: shard not found: .*b.tar"),
        ({"x.txt": b""}, "data not found: .* holds no .tar files"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            write_shard(tmp_path / name, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        load_data(f"wds/{tmp_path}")
    assert "\n" not in str(refusal.value)


def test_a_broken_picture_in_a_shard_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [*shard_samples(9), {"png": b"no picture", "cls": b"0"}])
    part = load_data(f"wds/{shard}", holdout=False).test
    assert part is not None
    with pytest.raises(BadImageError, match=rf"cannot read image {shard}:a/00009.png: "):
        part[9]
    shard.unlink()
    with pytest.raises(BadImageError, match=r"a/00000.png: .*No such file"):
        part[0]


def test_a_prefix_is_no_path_and_what_is_behind_it_moves_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path recorded with a run is another one in another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    for prefix in ("wds/", "hf:", "hfds/", "torch/mnist:"):
        assert located("data", f"{prefix}shards") == absolute(f"{prefix}shards") == f"{prefix}{tmp_path}/shards"
        assert absolute(f"{prefix}nowhere") == f"{prefix}nowhere"
    (tmp_path / "wds" / "shards").mkdir(parents=True)
    for load in (load_data, lambda source: located("data", source)):
        with pytest.raises(ValueError, match=r"pass ./wds/shards for that one"):
            load("wds/shards")
    for source, message in (
        ("hf:", "a name or a path after hf:, got 'hf:'"),
        ("wds/none", "no folder or .tar file at none"),
        ("torch/mnist", r"must name the folder that holds it, torch/mnist:FOLDER"),
        ("torch/cifar1:x", r"data after torch/ must be one of .*, did you mean 'cifar10'"),
        ("torch/cifar10:x", r"torch/cifar10 not found in x: fetch it once with: python -c .*CIFAR10\('x', download=T"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_data(source)


def test_torchvision_folders_are_read_by_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and test are apart, and a mirrored digit is another sign."""
    import torch
    from torchvision.datasets import MNIST

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 20), ("t10k", 10)):
        for kind, dims, content in (
            ("images-idx3", (count, 28, 28), np.arange(count * 784, dtype=np.uint8)),
            ("labels-idx1", (count,), np.arange(count, dtype=np.uint8) % 10),
        ):
            head = bytes([0, 0, 8, len(dims)]) + b"".join(size.to_bytes(4, "big") for size in dims)
            (raw / f"{stem}-{kind}-ubyte").write_bytes(head + content.tobytes())
    data = load_data(f"torch/mnist:{tmp_path}")
    expected = MNIST(tmp_path, train=False)
    assert data.name == "mnist" and not data.flip and data.val is None and len(data.train) == 20
    assert data.test is not None and torch.equal(torch.from_numpy(data.test.images), expected.data)
    assert data.classes == expected.classes and data.test.labels.tolist() == expected.targets.tolist()


def saved_tables(kinds: list[int], **columns: Any) -> Any:
    datasets = pytest.importorskip("datasets", reason="data of Hugging Face datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    rows = {"image": [picture(max(kind, 0), seed) for seed, kind in enumerate(kinds)], "label": kinds, **columns}
    typed = {name: features.get(name, datasets.Value("string")) for name in rows}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(typed))


def test_tables_of_datasets_are_read_where_they_lie(tmp_path: Path) -> None:
    """Whether saved, of files, or in the hub's cache: pictures, class names and splits are those of the table."""
    datasets = pytest.importorskip("datasets", reason="data of Hugging Face datasets")
    kinds = [0, 1, 2, 2]
    splits = {"train": saved_tables(kinds), "validation": saved_tables([1]), "test": saved_tables([-1, -1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = load_data(f"hf:{tmp_path}/saved")
    assert data.classes == list(CLASSES) and data.name == "saved" and data.train.labels.tolist() == kinds
    assert same(data.train, [(kind, seed) for seed, kind in enumerate(kinds)]) and same(data.val, [(1, 0)])
    assert data.test is None and "the test split has no labels, left out" in data.notes
    assert data.train.in_memory(10_000).content_hashes() == data.train.content_hashes()
    assert (
        load_data(f"hfds/{tmp_path}/saved").train.keys
        == data.train.keys
        == ["train/0", "train/1", *data.train.keys[2:]]
    )
    saved_tables([0, 1, 2] * 3).save_to_disk(tmp_path / "undivided")
    assert [len(part) for part in load_data(f"hf:{tmp_path}/undivided").parts().values()] == [3, 3, 3]


def test_a_data_set_that_was_fetched_is_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache, as `hf download` and `datasets` leave it; what is not there is not asked for."""
    pytest.importorskip("datasets", reason="data of Hugging Face datasets")

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "tables"))
    kept = tmp_path / "datasets--owner--known"
    for split in ("train", "test"):
        write_pictures(kept / "snapshots" / ("0" * 40) / split, 2)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    data = load_data("hf:owner/known")
    assert data.classes == sorted(CLASSES) and len(data.train) == 6 and data.name == "owner-known"
    assert data.test is not None and {image.size for image, _ in data.test} == {(12, 12)}
    with pytest.raises(FileNotFoundError, match=r"fetch it once with: hf download --repo-type dataset owner/other$"):
        load_data("hf:owner/other")
    with pytest.raises(FileNotFoundError, match="no folder or data set hf:a/b/c"):
        load_data("hf:a/b/c")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, -1, 1]}, "row 1 of train must have a label, got none"),
        (
            {"image": None},
            r"a column of type Image for the picture, .* got label \(ClassLabel\), x \(Value\)",
        ),
        ({"label": None}, r"must have a column of type ClassLabel for the label, .* got image \(Image\), x \(Value\)"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    datasets = pytest.importorskip("datasets", reason="data of Hugging Face datasets")
    table = saved_tables(columns.get("label") or [0, 1, 2], x=["a", "b", "c"])
    table = table.remove_columns([name for name, column in columns.items() if column is None])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message) as refusal:
        load_data(f"hf:{tmp_path}/saved")
    assert "\n" not in str(refusal.value)


def test_without_the_package_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vptm.data.hf_datasets.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="hf:x needs datasets: pip install dat"):
        load_data("hf:x")


def test_a_run_from_shards_records_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes a prefix, records its path whole, and makes no folder for data that cannot be used."""
    monkeypatch.chdir(tmp_path)
    backbone = write_backbone(tmp_path / "tiny.safetensors")
    write_shard(tmp_path / "few.tar", shard_samples(15))
    small = ["--model", str(backbone), "--shots", "2", "--epochs", "1", "--prompt-length", "2", "--prototype-dim", "4"]
    with pytest.raises(SystemExit) as end:
        main(["train", "--data", "wds/few.tar", "--out", "run", *small])
    assert not end.value.code
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["data"] == f"wds/{tmp_path}/few.tar"
    assert "train,few.tar/few/000" in (tmp_path / "run" / "split.csv").read_text()
    with pytest.raises(SystemExit) as end:
        main(["train", "--data", "torch/mnist:here", "--out", "other", *small])
    assert end.value.code and not (tmp_path / "other").exists()
