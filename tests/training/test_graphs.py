"""CUDA graphs: everything but the recording, which needs a GPU; the GPU test is skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from console import Console
from tiny_data import write_backbone
from tiny_runs import loaders, make_model, run
from torch import nn

from vptm import evaluate, fit, predict
from vptm.training import graphs
from vptm.training.graphs import InferenceGraph, Recorded


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that are recorded, where a CPU takes the place of a GPU: a replay computes again what the recording did,
    on the tensors it read and into those it wrote; a recording draws random numbers as its warm-up does."""
    shapes: list[tuple[int, ...]] = []

    def record(function: Any, images: torch.Tensor) -> Recorded:
        shapes.append(tuple(images.shape))
        images = images.clone()
        output = function(images)
        images.zero_()

        def replay() -> None:
            output.copy_(function(images))

        return Recorded(images, output, replay)

    def graphed(module: nn.Module, sample: tuple[torch.Tensor, ...], allow_unused_input: bool) -> Any:
        assert allow_unused_input and any(parameter.requires_grad for parameter in module.parameters())
        shapes.append(tuple(sample[0].shape))
        torch.rand(100)

        def call(images: torch.Tensor) -> torch.Tensor:
            assert images.shape == sample[0].shape, "a graph has one shape"
            found: torch.Tensor = module(images)
            return found

        return call

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    for name in ("vptm.training.fit", "vptm.training.evaluate", "vptm.serving.predict"):
        monkeypatch.setattr(f"{name}.check_graph", lambda asked, place, compile=False: None)
    return shapes


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_recorded_run_is_the_run(backbone: Path, recorded: list[Any], weight: float) -> None:
    """Batches of 5, 5 and 2 with dropout: the first size is recorded, once, and the recording draws nothing."""
    found = []
    for flag in (False, True):
        model = make_model(backbone, prompt_dropout=0.3)
        train, val = loaders(model)
        options: dict[str, Any] = {"epochs": 2, "lr": 0.02, "progress": False, "protoverb_weight": weight}
        history = fit(model, train, val, cuda_graph=flag, **options).history
        found.append(([{**row, "seconds": 0} for row in history], model.learned_state_dict()))
    assert found[0][0] == found[1][0] and recorded == [(5, 1, 12, 12)]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_sizes_that_come_twice_are_recorded_for_inference(backbone: Path, recorded: list[Any]) -> None:
    """9 pictures in batches of 2: four of two and one of one; answers are those without a graph."""
    model = make_model(backbone)
    _, val = loaders(model)
    few = torch.utils.data.DataLoader(val.dataset, batch_size=2)
    assert evaluate(model, few, cuda_graph=True) == evaluate(model, few) and recorded == [(2, 1, 12, 12)]
    images = torch.stack([image for image, _ in val.dataset])
    assert predict(model, images, batch_size=2, cuda_graph=True) == predict(model, images, batch_size=2)
    assert recorded == [(2, 1, 12, 12)] * 2


def test_a_replay_overwrites_what_the_one_before_returned(recorded: list[Any]) -> None:
    """Inputs are copied into the recording: a caller's tensor is neither kept nor changed."""
    graph = InferenceGraph(lambda images: images * 2)
    first = graph(torch.ones(2))
    images = torch.full((2,), 3.0)
    second = graph(images)
    assert second.tolist() == [6.0, 6.0] and first.tolist() == [2.0, 2.0] and images.tolist() == [3.0, 3.0]
    third = graph(torch.full((2,), 5.0))
    assert third is second and third.tolist() == [10.0, 10.0] and recorded == [(2,)]
    assert graph(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "cuda_graph needs a GPU, got device cpu"),
        ({"compile": True}, "cuda_graph must be False with compile"),
        ({"accumulate": 5}, "cuda_graph must be False with accumulate"),
        ({"reformation": 1.0}, "cuda_graph must be False with reformation, whose frozen features are kept"),
        (
            {"grad_checkpointing": True},
            "cuda_graph must be False with grad_checkpointing, which asks for random states",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    backbone: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_model(backbone), tmp_path / "r", cuda_graph=True, **changes)
    assert not (tmp_path / "r").exists()


def test_what_is_compiled_is_not_recorded_where_it_answers() -> None:
    with pytest.raises(ValueError, match="cuda_graph must be False with compile"):
        graphs.check_graph(True, torch.device("cuda"), compile=True)
    graphs.check_graph(True, torch.device("cuda"))


def test_a_cpu_refuses_a_graph_at_once(vptm: Console, backbone: Path, tmp_path: Path) -> None:
    line = "cuda_graph needs a GPU, got device cpu"
    given = ("--cuda-graph", "--device", "cpu")
    assert vptm.refused("train", "--data", tmp_path / "none", *given) == (2, f"vptm: {line}")
    assert vptm.refused("evaluate", tmp_path / "none", *given) == (2, f"vptm: {line}")
    model = make_model(backbone)
    images = torch.zeros(1, 1, 12, 12)
    with pytest.raises(ValueError, match=line):
        predict(model, images, cuda_graph=True)
    with pytest.raises(ValueError, match=line):
        evaluate(model, loaders(model)[1], cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_on_a_gpu_trains_and_answers_as_without_it(backbone: Path) -> None:
    found = []
    for flag in (False, True):
        model = make_model(backbone).cuda()
        train, val = loaders(model)
        history = fit(model, train, val, epochs=3, lr=0.02, progress=False, cuda_graph=flag).history
        found.append([[row["train_loss"], row["val_loss"]] for row in history])
        few = torch.utils.data.DataLoader(val.dataset, batch_size=2)
        assert evaluate(model, few, cuda_graph=True)["loss"] == pytest.approx(evaluate(model, few)["loss"], rel=1e-5)
    assert torch.allclose(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-5)
