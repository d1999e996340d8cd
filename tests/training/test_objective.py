"""The loss of class scores: what it weighs, and that parts of a batch add up to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import write_backbone
from tiny_runs import assert_same_run, make_model, pictures, stopped_run
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from vptm import fit, transforms
from vptm.data.balance import balanced_sampler


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


def unbalanced(model: Any) -> TensorDataset:
    """10 pictures in float64: 5, 3 and 2 of the classes."""
    whole = pictures(15).with_transform(transforms(model))
    chosen = [0, 1, 2, 3, 4, 5, 6, 7, 9, 12]
    return TensorDataset(
        torch.stack([whole[k][0] for k in chosen]).double(), torch.from_numpy(whole.labels[chosen]).long()
    )


def test_class_weights_weigh_a_batch_as_torch_does(backbone: Path) -> None:
    """Whole and in parts: a part divided by its number of images would weigh classes by chance."""
    model = make_model(backbone).double()
    data = unbalanced(model)
    images, labels = data.tensors
    assert labels.bincount().tolist() == [5, 3, 2]
    with torch.no_grad():
        scores = model.eval()(images)
    weights = torch.tensor([10 / 15, 10 / 9, 10 / 6], dtype=torch.float64)
    plain = F.cross_entropy(scores, labels).item()
    wanted = F.cross_entropy(scores, labels, weights, label_smoothing=0.2).item()
    assert abs(wanted - plain) > 1e-3
    learned = []
    for given, parts in (("balanced", 1), (weights.tolist(), 5), (None, 1)):
        model = make_model(backbone).double()
        options: dict[str, Any] = {"epochs": 1, "lr": 0.1, "optimizer": "sgd", "schedule": "none", "progress": False}
        options |= {"label_smoothing": 0.2 if given else 0.0, "class_weights": given, "accumulate": parts}
        loss = fit(model, DataLoader(data, batch_size=10), **options).history[0]["train_loss"]
        assert loss == pytest.approx(wanted if given else plain, rel=1e-6)
        learned.append(torch.cat([tensor.flatten() for tensor in model.learned_state_dict().values()]))
    torch.testing.assert_close(learned[0], learned[1], rtol=0, atol=1e-12)
    assert (learned[0] - learned[2]).abs().max() > 1e-4, "the weights reach no gradient"


def test_a_balanced_run_resumes_bitwise(backbone: Path, tmp_path: Path) -> None:
    """The draw of every epoch follows from the seed; another weighting is another run."""
    options: dict[str, Any] = {"lr": 0.02, "warmup_epochs": 1, "progress": False, "epochs": 3}
    labels = pictures(12).labels

    def loader(model: Any) -> DataLoader[Any]:
        train = pictures(12).with_transform(transforms(model, train=True, flip=False))
        return DataLoader(train, batch_size=5, sampler=balanced_sampler(labels))

    for name, stops in (("whole", (3,)), ("parts", (1, 3))):
        for stop in stops:
            model = make_model(backbone)
            told = [] if stop == 3 else [_stopping()]
            resume = (tmp_path / name).exists()
            fit(model, loader(model), run_dir=tmp_path / name, resume=resume, callbacks=told, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    stopped_run(make_model(backbone), tmp_path / "r", 3)
    with pytest.raises(ValueError, match="class_weights was None, now 'balanced'"):
        model = make_model(backbone)
        fit(model, loader(model), run_dir=tmp_path / "r", resume=True, class_weights="balanced", **options)


def _stopping() -> Any:
    from vptm.training.callbacks import Callback

    class Stop(Callback):
        def step(self, number: int, loss: Any, lr: float) -> None:
            if number == 4:  # in the second epoch
                raise KeyboardInterrupt

    return Stop()


def test_weights_are_refused_before_a_folder_is_made(backbone: Path, tmp_path: Path) -> None:
    model = make_model(backbone).double()
    data = unbalanced(model)
    for given, message in (
        ("1,2", "balanced or 3 numbers, one for a class, got 2"),
        ("-1,2,3", "list of finite numbers > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(model, DataLoader(data), epochs=1, lr=0.1, class_weights=given, run_dir=tmp_path / "r")
    two = TensorDataset(data.tensors[0], torch.from_numpy(np.arange(10) % 2))
    with pytest.raises(ValueError, match="got none of class 2"):
        fit(model, DataLoader(two), epochs=1, lr=0.1, class_weights="balanced", run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()
