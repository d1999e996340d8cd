"""The average of what is learned, which answers in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import write_backbone
from tiny_runs import assert_same_run, loaders, make_model, run, stopped_run

from vptm import evaluate, fit, load_adapter
from vptm.training.callbacks import Callback
from vptm.training.state import STATE_FILE, read_state, write_state


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


def test_the_average_is_validated_kept_and_left_in_the_model(backbone: Path, tmp_path: Path) -> None:
    """By hand after every step: the last steps' average, whose loss is the one reported, and not the last step's."""
    model = make_model(backbone)
    expected = {name: tensor.double() for name, tensor in model.learned_state_dict().items()}
    learned: list[dict[str, torch.Tensor]] = []

    class Averaging(Callback):
        def step(self, number: int, loss: torch.Tensor, lr: float) -> None:
            decay = min(0.7, (number + 2) / (number + 11))
            learned.append({name: tensor.clone() for name, tensor in model.learned_state_dict().items()})
            for name, tensor in learned[-1].items():
                expected[name] = decay * expected[name] + (1 - decay) * tensor.double()

    train, val = loaders(model)
    options: dict[str, Any] = {"epochs": 3, "lr": 0.05, "progress": False, "callbacks": [Averaging()], "ema": 0.7}
    result = fit(model, train, val, run_dir=tmp_path / "r", schedule="none", **options)
    assert result.best_epoch == 3 and len(learned) == 9, "the steps after the best epoch would not be in the average"
    for name, tensor in model.learned_state_dict().items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-5, atol=1e-6), name
        assert not torch.allclose(tensor, learned[-1][name], rtol=1e-3), f"{name} is that of the last step"
    assert evaluate(model, val)["loss"] == result.history[-1]["val_loss"]
    loaded = load_adapter(tmp_path / "r").learned_state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.learned_state_dict().items())
    state = read_state(tmp_path / "r" / STATE_FILE)
    assert all(torch.equal(tensor, learned[-1][name]) for name, tensor in state["learned"].items()), "it trains on"


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_an_averaged_run_resumes_bitwise(backbone: Path, tmp_path: Path, precision: str | None) -> None:
    options: dict[str, Any] = {"ema": 0.9, "precision": precision}
    run(make_model(backbone), tmp_path / "whole", epochs=3, **options)
    stopped_run(make_model(backbone), tmp_path / "parts", 3, **options)
    run(make_model(backbone), tmp_path / "parts", epochs=3, resume=True, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (read_state(tmp_path / name / STATE_FILE)["average"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}


def test_a_state_without_its_average_is_refused(backbone: Path, tmp_path: Path) -> None:
    """A run that went on from the last step's values would be another run."""
    stopped_run(make_model(backbone), tmp_path / "r", 2, ema=0.9)
    path = tmp_path / "r" / STATE_FILE
    state = {name: value for name, value in read_state(path).items() if name != "version"}
    write_state(path, state | {"average": None})
    with pytest.raises(ValueError, match=r"does not fit the run: average must be of {.*}, got {}; use"):
        run(make_model(backbone), tmp_path / "r", epochs=2, resume=True, ema=0.9)
    with pytest.raises(ValueError, match=r"ema was 0\.9, now None"):
        run(make_model(backbone), tmp_path / "r", epochs=2, resume=True)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(backbone: Path, tmp_path: Path, decay: float) -> None:
    with pytest.raises(ValueError, match=r"ema must be in \(0, 1\), or None, got"):
        run(make_model(backbone), tmp_path / "r", ema=decay)
    assert not (tmp_path / "r").exists()
