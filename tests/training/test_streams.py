"""Data sets that are iterated: an epoch of them, what is refused of them, and that they train as others do."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import picture, write_backbone
from tiny_runs import assert_same_run, make_model, pictures
from torch.utils.data import DataLoader, IterableDataset

from vptm import fit, transforms
from vptm.training.run_folder import read_run
from vptm.training.streams import epoch_batches


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("b") / "tiny.safetensors")


class Stream(IterableDataset[Any]):
    """What `items()` gives, each time that it is begun; without a length."""

    def __init__(self, items: Callable[[], Iterator[Any]]) -> None:
        self.items = items
        self.epochs: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items())

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_a_stream_trains_as_the_data_set_it_gives(backbone: Path, tmp_path: Path) -> None:
    """Losses, learned values and learning rates are those of the same batches with a length; the stream is told the
    epoch, and what it reads for the checks is read again."""
    model = make_model(backbone)
    data = pictures(12).with_transform(transforms(model))
    stream = Stream(lambda: (data[index] for index in range(12)))
    val = Stream(lambda: (data[index] for index in range(6)))
    options: dict[str, Any] = {"epochs": 2, "lr": 0.02, "progress": False}
    fit(model, DataLoader(data, 5), DataLoader(data.subset(range(6)), 5), run_dir=tmp_path / "a", **options)
    other = make_model(backbone)
    loader = DataLoader(stream, 5)
    fit(other, loader, DataLoader(val, 5), run_dir=tmp_path / "b", steps_per_epoch=3, **options)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert stream.epochs == [1, 2]
    assert read_run(tmp_path / "b")["finished"]["identity"]["batches"] == 3
    with pytest.raises(ValueError, match=r"cannot resume .*: batches was 3, now 4"):
        fit(other, loader, run_dir=tmp_path / "b", steps_per_epoch=4, resume=True, **options)


def test_an_epoch_of_a_stream_has_the_steps_that_are_asked_for() -> None:
    """One that ends before begins again, one that does not end is left; a data set is not."""
    loader = DataLoader(Stream(lambda: iter(range(5))), batch_size=2)
    assert [batch.tolist() for batch in epoch_batches(loader, 4)] == [[0, 1], [2, 3], [4], [0, 1]]
    endless = DataLoader(Stream(lambda: itertools.count()), batch_size=2)
    assert [batch.tolist() for batch in epoch_batches(endless, 2)] == [[0, 1], [2, 3]]
    assert len(list(epoch_batches(DataLoader(range(5)), 1))) == 5  # type: ignore[arg-type]
    spent = iter(range(3))
    with pytest.raises(ValueError, match="batches whenever it is begun, Stream gave none after 2"):
        list(epoch_batches(DataLoader(Stream(lambda: spent), batch_size=2), 3))


def test_streams_that_cannot_be_trained_on_touch_no_folder(backbone: Path, tmp_path: Path) -> None:
    """Only their first batch can tell, which no run may be replaced for."""

    class Unsure(Stream):
        def __len__(self) -> int:  # as timm's readers say of a number that nobody gave
            return 0

    def of(*items: Any) -> Stream:
        return Stream(lambda: iter(items))

    image, model = torch.zeros(1, 12, 12), make_model(backbone)
    good = DataLoader(pictures(4).with_transform(transforms(model)))
    cases: list[tuple[Any, Any, int | None, type[Exception], str]] = [
        (of(), None, 1, ValueError, "train must hold at least one image, it is empty"),
        (of((torch.zeros(3, 12, 12), 0)), None, 1, ValueError, r"images must be \(B, 1, 12, 12\), got \(1, 3,"),
        (of((image, 3)), None, 1, ValueError, r"labels must be in 0\.\.2, got 3 for row 0"),
        (of((image, 0.5)), None, 1, ValueError, r"labels must be \(B,\) integers or .* got \(1,\) of torch.float64"),
        (of(image), None, 1, TypeError, r"train must yield \(images, labels\) or a mapping"),
        (of((image, 0)), None, None, TypeError, "give Stream a __len__, or pass steps_per_epoch"),
        (Unsure(lambda: iter([(image, 0)])), None, None, ValueError, "0 images .* or steps_per_epoch where Unsure"),
        (of((image, 0)), None, 0, ValueError, "steps_per_epoch must be an integer >= 1, got 0"),
        (good, None, 2, ValueError, "steps_per_epoch must be None for data that is no stream, got 2"),
        (good, of(), None, ValueError, "val must hold at least one image, it is empty"),
        (good, of((image, 7)), None, ValueError, r"labels must be in 0\.\.2, got 7 for row 0"),
    ]  # fmt: skip
    for train, val, steps, kind, message in cases:
        loaders = [data if data in (None, good) else DataLoader(data) for data in (train, val)]
        with pytest.raises(kind, match=message) as refusal:
            fit(model, *loaders, epochs=1, lr=0.1, run_dir=tmp_path / "r", steps_per_epoch=steps)
        assert not (tmp_path / "r").exists() and "\n" not in str(refusal.value), message


def test_timms_shards_stream_into_fit(backbone: Path, tmp_path: Path) -> None:
    """As `create_dataset` makes them, shuffled, with workers that share the shards: a first look in this process would
    make every worker read all of them."""
    pytest.importorskip("webdataset", reason="timm's reader of shards")
    from timm.data import create_dataset

    for shard in range(2):
        with tarfile.open(tmp_path / f"few-train-{shard}.tar", "w") as tar:
            for k in range(6):
                file = io.BytesIO()
                picture(k % 3, shard * 6 + k).save(file, "PNG")
                for field, content in (("png", file.getvalue()), ("cls", str(k % 3).encode())):
                    member = tarfile.TarInfo(f"{shard}{k}.{field}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    model = make_model(backbone)
    options = {"split": "few-train-{0..1}.tar|12", "is_training": True, "batch_size": 3, "input_img_mode": "L"}
    stream = create_dataset("wds/few", root=str(tmp_path), **options)
    stream.transform = transforms(model)
    loader = DataLoader(stream, batch_size=3, num_workers=2)
    assert len(fit(model, loader, epochs=2, lr=0.02, progress=False).history) == 2
    read = torch.cat([images for images, _ in loader])
    assert len(read) == len(read.flatten(1).unique(dim=0)) == 12
