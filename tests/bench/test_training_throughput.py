"""The bench of whole training runs: its loops train the same function, and what is slower or wrong is seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vptm
from bench import bench_model, bench_training_throughput, peers, training_loops
from bench.bench_training_throughput import VPT, Measured, Setting
from vptm.commands.app import main

SETTINGS = [Setting("jpeg", "shallow", 2, "mask"), Setting("synthetic", "deep", 2, "cls")]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model of two blocks, eight pictures, and runs in this process."""

    def run(module: str, arguments: Any) -> tuple[str, float]:
        if module == "vptm":
            with pytest.raises(SystemExit) as end:
                main(list(arguments))
            if end.value.code:
                raise RuntimeError("vptm: it failed")
            return "", 9.0
        name, job = arguments
        return json.dumps(training_loops.seconds_of_epochs(name, training_loops.Job(**json.loads(job)))), 9.0

    sizes = {"IMAGES": 8, "BATCH": 4, "EPOCHS": 2, "PIXELS": (40, 30), "VOCABULARY": 24, "run_process": run}
    for name, value in sizes.items():
        monkeypatch.setattr(bench_training_throughput, name, value)
    for name, value in {"TINY": True, "SIZES": {"B": (48, 2, 3)}, "VOCABULARY": 24}.items():
        monkeypatch.setattr(bench_model, name, value)
    cached = (bench_model._backbone, bench_model.prompted, bench_model._images, bench_model._plain, bench_model._exact)
    for each in (*cached, bench_training_throughput._folder):
        each.cache_clear()
    yield
    for each in (*cached, bench_training_throughput._folder):
        each.cache_clear()


class Benchmark:
    """Enough of pytest-benchmark's fixture to see what a bench reports."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""

    def pedantic(self, run: Any, **options: Any) -> None:
        """The last run of all, which is not looked at."""


def info(setting: Setting) -> dict[str, Any]:
    benchmark = Benchmark()
    bench_training_throughput.bench_training_throughput(benchmark, setting, torch.float32)  # type: ignore[arg-type]
    return benchmark.extra_info


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_loop_is_timed_on_every_kind_of_data(tiny: None, setting: Setting) -> None:
    found = info(setting)
    assert "refused" not in found, found["refused"]
    assert {f"speed-up over {name}" for name in (peers.CONCATENATION, VPT)} <= set(found)
    assert set(found["images per second by loop"]) == {peers.OURS, peers.CONCATENATION, VPT}
    assert all(rate > 0 for rate in found["images per second by loop"].values())
    assert found["images per second of the whole process"][VPT] == round(16 / 9, 3)
    (waiting,) = found["waiting for data"]
    assert waiting is None if setting.data == "synthetic" else 0 <= waiting < 1


def test_loops_of_peers_compute_what_vptm_does_and_learn_it(tiny: None) -> None:
    """A loop that trains another model, or nothing, would be compared in images a second."""
    for setting in SETTINGS:
        job = bench_training_throughput.job_of(setting, torch.float32)
        torch.manual_seed(0)
        model = vptm.open_model(Path(job.backbone), job.classes, **job.options)
        images = torch.randn(3, 3, 32, 32)
        torch.testing.assert_close(training_loops.concatenated(model)(images), model(images), rtol=1e-4, atol=1e-4)
        loaders = training_loops._loaders(job, model)
        assert [len(loaders[split].dataset) for split in ("train", "val", "test")] == [8, 4, 4]  # type: ignore[arg-type]
        for name, loop in training_loops.LOOPS.items():
            torch.manual_seed(0)
            model = vptm.open_model(Path(job.backbone), job.classes, **job.options)
            before = {name: each.clone() for name, each in model.state_dict().items()}
            assert len(loop(model, loaders, job)) == 2
            changed = {n for n, each in model.state_dict().items() if not torch.equal(each, before[n])}
            learned = {n for n, each in model.named_parameters() if each.requires_grad}
            assert changed and changed <= learned, name


def test_a_slower_epoch_lowers_the_ratio_and_a_failing_loop_is_named(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epoch, in which constants are made, counts for the whole process alone."""
    taken = {peers.OURS: Measured([9.0, 2.0, 2.0], 20.0), peers.CONCATENATION: Measured([1.0, 6.0, 6.0], 20.0)}

    def measure(name: str, job: Any) -> Measured:
        if name == VPT:
            raise RuntimeError("bench.training_loops: no memory")
        return taken[name]

    monkeypatch.setattr(bench_training_throughput, "measure", measure)
    found = info(SETTINGS[1])
    assert found[f"speed-up over {peers.CONCATENATION}"] == 3.0 and found["images per second"] == 4.0
    assert found["images per second of the whole process"][peers.OURS] == 0.8
    assert found["refused"] == {VPT: "bench.training_loops: no memory"}


def test_a_wrong_concatenation_stops_the_bench(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    concatenate = bench_model._concatenate
    monkeypatch.setattr(bench_model, "_concatenate", lambda *arguments: concatenate(*arguments) * 1.001)
    with pytest.raises(AssertionError, match=r"concatenation: .*error .* exceeds the budget"):
        bench_training_throughput.same_function(SETTINGS[1])


def test_a_process_that_fails_is_named_by_its_last_line() -> None:
    with pytest.raises(RuntimeError, match=r"^no_such_module: .*No module named no_such_module"):
        bench_training_throughput.run_process("no_such_module", [])
    printed, seconds = bench_training_throughput.run_process("platform", [])
    assert printed.strip() and seconds > 0
