"""Whether reading or computing limits a run: measured on real pictures and on synthetic ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from console import Console
from tiny_data import write_backbone, write_list, write_pictures
from torch.utils.data import DataLoader

from vptm.data.datasets import ImageDataset
from vptm.data.sources import load_data
from vptm.methods.feeding import Feeding, measure_feeding, synthetic
from vptm.models.opening import open_model
from vptm.settings import RunSettings
from vptm.training.progress import Pace, TrainProgress


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


def test_what_is_measured_says_which_is_the_limit() -> None:
    slow = Feeding(Pace(30.0, 0.7), Pace(100.0, 0.01), 31.0)
    assert slow.lines() == [
        "real pictures       30 images/s, 70% waiting for data",
        "synthetic pictures  100 images/s",
        "reading alone       31 images/s",
        "limit               reading pictures, which costs 70% of the speed: try more --workers",
    ]
    quick = Feeding(Pace(98.0, 0.02), Pace(100.0, 0.01), 4000.0)
    assert quick.lines()[-1] == "limit               the step: reading pictures costs 2% of its speed"
    assert Feeding(Pace(101.0, 0.0), Pace(100.0, 0.0), 1.0).lost == 0.0, "noise gains nothing"


def test_slow_pictures_are_found(
    vptm: Console, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading that takes ten times as long as a step; and nothing is written."""
    write_pictures(tmp_path / "pictures", 8)
    get = ImageDataset.__getitem__

    def slow(self: ImageDataset, index: int) -> Any:
        time.sleep(0.02)
        return get(self, index)

    monkeypatch.setattr(ImageDataset, "__getitem__", slow)
    monkeypatch.setattr("vptm.methods.feeding.measure_feeding.__kwdefaults__", {"seconds": 0.5, "report": print})
    before = sorted(tmp_path.rglob("*"))
    where = ["--model", backbone, "--data", tmp_path / "pictures", "--shots", 4, "--batch-size", 4, "--device", "cpu"]
    code, out, err = vptm("train", *where, "--epochs", 500, "--val-every", 5, "--synthetic")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 4, err
    real, made, reading = (float(line.split()[2]) for line in lines[:3])
    assert real < 50 < made and reading < 50, "a picture takes 20 ms"
    assert lines[3].startswith("limit               reading pictures, which costs ")
    assert int(lines[0].split()[4].rstrip("%")) > 50
    assert sorted(tmp_path.rglob("*")) == before and not Path("runs").exists()
    for more, reason in (
        (["--out", tmp_path / "r"], "--synthetic writes no run: leave out --out, --resume and --overwrite"),
        (["--epochs", 1], "--synthetic needs 4 steps of training to measure, got 3 in all epochs"),
        (["--lr", -1], "lr must be finite and > 0"),
    ):
        code, line = vptm.refused("train", *where, "--synthetic", *more)
        assert code == 2 and reason in line


def test_synthetic_batches_are_as_the_real_ones(backbone: Path, tmp_path: Path) -> None:
    """Sizes, labels and order; and one set of images for all of them, so that nothing is copied."""
    model = open_model(str(backbone), 3)
    write_pictures(tmp_path / "pictures", 7)
    data = load_data(tmp_path / "pictures").train
    made = synthetic(DataLoader(data, batch_size=4, shuffle=True), model, torch.float64, torch.device("cpu"))
    torch.manual_seed(0)
    batches = list(made)
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 3] and len(made) == 4
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == sorted(data.labels.tolist())
    assert {images.data_ptr() for images, _ in batches} == {batches[0][0].data_ptr()}
    assert batches[0][0].shape == (4, 1, 12, 12) and batches[0][0].dtype == torch.float64
    several = RunSettings.from_options(
        {"model": str(backbone), "data": str(write_list(tmp_path / "l")), "multi_label": True, "shots": "all"}, "beit"
    )
    assert measure_feeding(several, seconds=0.1, report=lambda line: None).synthetic.images_per_second > 0


def test_the_pace_leaves_out_the_first_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """They compile and allocate; a run of no more steps has none."""
    now = [0.0]
    monkeypatch.setattr("vptm.training.progress.time.perf_counter", lambda: now[0])
    with TrainProgress(False, epochs=1, done=0, steps=5) as bar:
        for seconds, waited in ((50.0, 40.0), (10.0, 0.0), (1.0, 0.25), (1.0, 0.25)):
            now[0] += seconds
            bar.step(8, waited)
            assert bar.pace is None or bar._images > 16
        now[0] += 2.0  # validation
    assert bar.pace == Pace(4.0, 0.125)
