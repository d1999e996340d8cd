"""Training images a second of a whole process: decoding, augmentation, steps and validation, from JPEG files and from
random tensors that need no decoding.

    pytest bench/bench_training_throughput.py --benchmark-only
    pytest bench/bench_training_throughput.py --benchmark-only --grid full --dtype float32,bfloat16

Every run is a process of its own and trains BEiT-B/16 at 224: `vptm train` with its defaults from files, `vptm.fit`
from tensors, beside the loops of `bench/training_loops.py`: the same with timm's blocks and the prompts concatenated,
and the structure of the loop that VPT published. A speed-up is the time of an epoch after the first: training images,
and half as many validation images (VPT's loop evaluates as many test images as well, as published). What the whole
process took, imports, reading of weights and checks of files included, stands beside it. Between the two kinds of data
lies what decoding costs; `waiting for data` is the share of time that `vptm train` notes in run.json.

The step alone, in every precision, is `bench/bench_training_step.py`.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import save_file
from torch import Tensor, nn

from bench import bench_model, peers, timing
from bench.bench_import import by_its_own_report
from bench.training_loops import DTYPES, LOOPS, SYNTHETIC, Job
from vptm.settings import option_name

ROOT = Path(__file__).parent.parent
DEVICE, TINY, FULL = timing.selection.device, timing.selection.tiny, timing.selection.full
CUDA = DEVICE == "cuda"
VPT = "VPT's loop"
PEERS = {peers.CONCATENATION: peers.PEERS[peers.CONCATENATION], VPT: timing.Peer(lambda: None)}
CLASSES, VOCABULARY = 4, 24 if TINY else 8192
IMAGES, BATCH, EPOCHS = (8, 4, 2) if TINY else (4096, 64, 3) if CUDA else (16, 4, 2)
ROUNDS = 3 if FULL and not TINY else 1
PIXELS = (60, 45) if TINY else (500, 375)  # of a file, as ImageNet's are on average
_PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}


class Setting(NamedTuple):
    """data: "jpeg" or "synthetic"; the rest as in `bench_model.Setting`."""

    data: str
    mode: str
    length: int
    readout: str

    def __str__(self) -> str:
        return f"{self.data}-{self.mode}-{self.length}-{self.readout}"

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the model; VPTM's with the mask row are those of the recipe vptm."""
        vpt = {"readout": "cls", "verbalizer": "linear", "token_activation": "hidden"}
        return {"prompt_mode": self.mode, "prompt_length": self.length} | (vpt if self.readout == "cls" else {})


RECIPES = [("shallow", 10, "mask"), ("deep", 50, "cls")][: 2 if FULL and not TINY else 1]
SETTINGS = [Setting(data, *recipe) for recipe, data in product(RECIPES, ("jpeg", SYNTHETIC))]


@dataclass
class Measured:
    """Of one process: seconds of its epochs and of all of it, and the share of time that it waited for data."""

    epochs: list[float]
    whole: float
    waiting: float | None = None

    @property
    def epoch(self) -> float:
        """The median of those after the first, in which constants are made and memory is taken."""
        return float(np.median(self.epochs[1:]))


def write_backbone(path: Path) -> Path:
    """A random BEiT of bench_model's size with mask token and token head, in vptm's own format."""
    side = bench_model.pixels(224)
    beit = bench_model._backbone("B", side)
    width, depth, heads = bench_model.SIZES["B"]
    torch.manual_seed(0)
    head = nn.Linear(width, VOCABULARY)
    tensors: dict[str, Tensor] = {name: each for name, each in beit.state_dict().items() if "index" not in name}
    tensors |= {f"lm_head.{name}": each for name, each in head.state_dict().items()}
    tensors["mask_token"] = torch.randn(1, 1, width) * 0.02
    facts = {
        "architecture": {
            "img_size": side,
            "patch_size": 16,
            "in_chans": 3,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": 4.0,
            "init_values": 0.1,
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": True,
            "use_shared_rel_pos_bias": False,
        },
        "eps": 1e-6,
        "vocab_size": VOCABULARY,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "description": "random",
    }
    stored = {name: each.detach().contiguous() for name, each in tensors.items()}
    save_file(stored, path, metadata={"format": "vptm", "vptm": json.dumps(facts)})
    return path


def write_pictures(root: Path) -> Path:
    """JPEG files as a camera's: large shapes under a little noise, by which their size and decoding time are real."""
    draw = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", IMAGES // 2), ("test", IMAGES // 2)):
        for k in range(count):
            shapes = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(PIXELS, Image.BICUBIC)
            noisy = np.asarray(shapes, dtype=np.int16) + draw.integers(-12, 13, (PIXELS[1], PIXELS[0], 1))
            folder = root / split / f"c{k % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{k}.jpg", quality=90)
    return root


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """What all runs read, until the process ends."""
    folder = tempfile.TemporaryDirectory()
    write_backbone(Path(folder.name) / "backbone.safetensors")
    write_pictures(Path(folder.name) / "photos")
    return folder


def job_of(setting: Setting, dtype: torch.dtype) -> Job:
    """The job of a setting. A CPU reads pictures itself, a GPU is fed as `vptm train` does it."""
    folder = Path(_folder().name)
    data = SYNTHETIC if setting.data == SYNTHETIC else str(folder / "photos")
    backbone, precision = str(folder / "backbone.safetensors"), _PRECISIONS[dtype]
    return Job(backbone, data, IMAGES, CLASSES, BATCH, EPOCHS, DEVICE, None, precision, setting.options)


def train_arguments(job: Job, out: Path) -> list[str]:
    """Those of `vptm train` for a job."""
    settings = {"model": job.backbone, "data": job.data, "shots": "all", "epochs": job.epochs, "batch_size": job.batch}
    settings |= {"device": job.device, "precision": job.precision, "out": out, **job.options}
    settings |= {"prompt_gate": "none", "prototype_init": "xavier"}  # as the peers, which have no gates
    if job.workers is not None:
        settings["workers"] = job.workers
    return [
        "train",
        "--no-test",
        *(word for name, value in settings.items() for word in (option_name(name), str(value))),
    ]


def run_process(module: str, arguments: Sequence[str]) -> tuple[str, float]:
    """What `python -m module` printed, and the seconds it took.

    Raises:
        RuntimeError: it failed, with its last line.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout, time.perf_counter() - started


def measure(name: str, job: Job) -> Measured:
    """One process of vptm or of a peer."""
    if name == peers.OURS and job.data != SYNTHETIC:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            _, whole = run_process("vptm", train_arguments(job, run))
            with (run / "metrics.csv").open(newline="") as rows:
                epochs = [float(row["seconds"]) for row in csv.DictReader(rows)]
            return Measured(epochs, whole, json.loads((run / "run.json").read_text())["cost"]["waiting_for_data"])
    printed, whole = run_process("bench.training_loops", [name, job.json()])
    return Measured(json.loads(printed.splitlines()[-1]), whole)


def same_function(setting: Setting) -> None:
    """The loops' forward pass against float64, where vptm's is measured too: a loop that computes something else is not
    compared."""
    own = bench_model.Setting(setting.mode, setting.length, 2, readout=setting.readout)
    check = bench_model._check(own, torch.float32)
    with torch.inference_mode():
        for name in (peers.OURS, peers.CONCATENATION):
            check(name, bench_model._runs(own, torch.float32)[name]())


@pytest.mark.parametrize(("setting", "dtype"), list(product(SETTINGS, timing.selection.dtypes)), ids=timing.label)
def bench_training_throughput(benchmark: BenchmarkFixture, setting: Setting, dtype: torch.dtype) -> None:
    what = f"{setting.mode} prompts, P={setting.length}, {setting.readout} row, {IMAGES} images from {setting.data}"
    benchmark.group = f"training throughput, BEiT-B/16, {what}, batch {BATCH}, {dtype}, {DEVICE}"
    same_function(setting)
    job = job_of(setting, dtype)
    measured: dict[str, list[Measured]] = {}
    first: dict[str, float] = {}

    def epoch(name: str) -> float:
        if name in first:  # the run that showed that it works counts
            return first.pop(name)
        one = measure(name, job)
        measured.setdefault(name, []).append(one)
        return one.epoch

    runs = {name: partial(epoch, name) for name in LOOPS if name == peers.OURS or name in timing.present(PEERS)}
    found = timing.compare(
        runs, check=first.__setitem__, rounds=ROUNDS, warmup=0, device=DEVICE, clock=by_its_own_report
    )
    whole = {name: IMAGES * EPOCHS / float(np.median([each.whole for each in all_])) for name, all_ in measured.items()}
    rates = {name: round(IMAGES / found.median(name), 3) for name in found.seconds}
    benchmark.extra_info |= found.info() | {
        "implementation": peers.OURS,
        "dtype": str(dtype),
        "device": DEVICE,
        "threads": torch.get_num_threads(),
        "images per second": rates[peers.OURS],
        "images per second by loop": rates,
        "images per second of the whole process": {name: round(rate, 3) for name, rate in whole.items()},
        "waiting for data": [each.waiting for each in measured[peers.OURS]],
    }
    benchmark.pedantic(partial(epoch, peers.OURS), rounds=1)
