"""Images of several labels: the loss, the scores, the best epoch, and what has no meaning for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from tiny_data import write_backbone
from tiny_runs import LEARNS, assert_same_run, make_model, metrics, pictures, write_as_of_schema
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from vptm import evaluate, fit, load_adapter, predict, save_adapter, transforms
from vptm.training.callbacks import Callback
from vptm.training.run_folder import METRICS_FILE, RUN_FILE


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


def several(model: Any, count: int, first: int = 0, kind: torch.dtype = torch.uint8) -> TensorDataset:
    """Pictures of three kinds: labelled by their kind, by "left or right", and by nothing where they are "upper"."""
    ready = pictures(count, first).with_transform(transforms(model))
    images = torch.stack([ready[k][0] for k in range(count)]).to(model.prompts.weight.dtype)
    kinds = torch.arange(count) % 3
    labels = torch.stack([kinds == 1, kinds == 2, kinds > 0], 1)
    return TensorDataset(images, labels.to(kind))


def loaders(model: Any, **options: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = DataLoader(several(model, 12, **options), batch_size=5, shuffle=True)
    return train, DataLoader(several(model, 9, 100, **options), batch_size=4)


OPTIONS: dict[str, Any] = {"lr": 0.05, "progress": False}


def test_it_learns_what_no_single_label_says(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every label alone, with none and with two on one picture; the best epoch is that of the largest mAP, and the
    adapter knows what it is."""
    model = make_model(backbone, multi_label=True, **LEARNS)
    train, val = loaders(model)
    result = fit(model, train, val, epochs=25, run_dir=tmp_path / "r", **(OPTIONS | {"progress": True}))
    assert result.best_val_accuracy is None and result.best_val_map == 1.0
    scores = [(row["val_map"], -row["val_loss"]) for row in result.history]
    assert result.best_epoch == 1 + max(range(25), key=lambda k: scores[k])
    rows = metrics(tmp_path / "r")
    assert list(rows[0])[-1] == "val_map" and {row["train_accuracy"] + row["val_accuracy"] for row in rows} == {""}
    assert capsys.readouterr().err.count(" mAP ") == 25
    found = load_adapter(tmp_path / "r")
    assert found.multi_label and found.config.problem_type == "multi_label_classification"
    said = evaluate(found, val)
    assert (said["map"], -said["loss"]) == scores[result.best_epoch - 1] and said["n"] == 9
    assert "accuracy" not in said and said["micro_f1"] == said["macro_f1"] == 1.0
    found.class_names = ["left", "right", "not upper"]
    told = predict(found, val.dataset.tensors[0][:3])  # type: ignore[attr-defined]
    assert [{name for name, _ in each.top} for each in told] == [set(), {"left", "not upper"}, {"right", "not upper"}]
    every = predict(found, val.dataset.tensors[0][:1], threshold=0.0)[0].top  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted = found(val.dataset.tensors[0][:1]).sigmoid()[0]  # type: ignore[attr-defined]
    assert [score for _, score in every] == pytest.approx(sorted(wanted.tolist(), reverse=True), rel=1e-5)
    before = json.loads((tmp_path / "r" / RUN_FILE).read_text())["finished"]["best_score"]
    again = fit(
        make_model(backbone, multi_label=True, **LEARNS),
        train,
        val,
        epochs=25,
        run_dir=tmp_path / "r",
        resume=True,
        **OPTIONS,
    )
    assert again.history == result.history and again.best_val_map == before[0]


def test_the_loss_is_torchs_and_parts_add_up_to_it(backbone: Path) -> None:
    """The mean over images and classes, of labels of any type, in training, validation and the model's own forward."""
    losses = []
    for parts, kind in ((1, torch.uint8), (5, torch.float32), (2, torch.bool)):
        model = make_model(backbone, multi_label=True).double()
        data = several(model, 12, kind=kind)
        images, labels = data.tensors
        with torch.no_grad():
            scores = model.eval()(images)
            own = model(images, labels=labels).loss.item()
        wanted = F.binary_cross_entropy_with_logits(scores, labels.double()).item()
        assert own == pytest.approx(wanted, rel=1e-6)
        assert evaluate(model, DataLoader(data, batch_size=5))["loss"] == pytest.approx(wanted, rel=1e-12)
        train = DataLoader(data, batch_size=10)
        losses.append(
            fit(model, train, epochs=2, accumulate=parts, optimizer="sgd", **OPTIONS).history[-1]["train_loss"]
        )
        fixed = make_model(backbone, multi_label=True).double()
        row = fit(fixed, train, train, epochs=1, lr=1e-30, progress=False).history[0]
        assert row["train_loss"] == pytest.approx(wanted, rel=1e-12)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


def test_scores_are_those_of_scikit_learn(backbone: Path) -> None:
    """A class without images (of 4) has no average precision and is left out of the mean."""
    torch.manual_seed(0)
    model = make_model(backbone, multi_label=True)
    images = torch.randn(20, 1, 12, 12)
    labels = (torch.rand(20, 3) < 0.4).long()
    labels[:, 2] = 0
    said = evaluate(model, DataLoader(TensorDataset(images, labels), batch_size=8))
    with torch.no_grad():
        scores = model.eval()(images).double().numpy()
    every = [average_precision_score(labels[:, k], scores[:, k]) for k in range(2)]
    assert said["ap_per_class"] == pytest.approx([*every, None]) and said["map"] == pytest.approx(np.mean(every))
    hits = (scores >= 0) & (labels.numpy() == 1)
    assert said["recall_per_class"] == pytest.approx([*(hits.sum(0)[:2] / labels.sum(0).numpy()[:2]), None])
    total = 2 * hits.sum() / ((scores >= 0).sum() + labels.sum().item())
    assert said["micro_f1"] == pytest.approx(total)
    with pytest.raises(ValueError, match="loader must yield an image with a label, all labels are 0"):
        evaluate(model, DataLoader(TensorDataset(images, torch.zeros(20, 3)), batch_size=8))


def test_a_stopped_run_resumes_bitwise(backbone: Path, tmp_path: Path) -> None:
    """`metrics.csv` has another column, which a resume reads."""

    class Stop(Callback):
        def step(self, number: int, loss: Any, lr: float) -> None:
            if number == 4:
                raise KeyboardInterrupt

    for name, told in (("whole", []), ("parts", [Stop()]), ("parts", [])):
        model = make_model(backbone, multi_label=True)
        resume = (tmp_path / name).exists()
        fit(model, *loaders(model), epochs=3, run_dir=tmp_path / name, resume=resume, callbacks=told, **OPTIONS)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "parts" / METRICS_FILE).read_text().startswith("epoch,lr,train_loss,train_accuracy,val_loss,")


def test_a_compiled_run_is_the_run(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for the steps of all batch sizes and one for validation, without a break (fullgraph=True raises at
    one), and the losses and values that eager steps learn; the model's own loss is one graph too."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_, told = torch.compile, []

    def recorded(*args: Any, **options: Any) -> Any:
        told.append(options)
        return compile_(*args, **(options | {"backend": backend}))

    monkeypatch.setattr(torch, "compile", recorded)
    torch._dynamo.reset()
    histories, learned = [], []
    for flag in (False, True):
        model = make_model(backbone, multi_label=True).double()
        train = DataLoader(several(model, 12), batch_size=5)  # the last has 2
        val = DataLoader(several(model, 9, 100), batch_size=5)
        rows = fit(model, train, val, epochs=3, compile=flag, **OPTIONS).history
        histories.append([[row["train_loss"], row["val_loss"], row["val_map"]] for row in rows])
        learned.append(torch.cat([value.flatten() for value in model.learned_state_dict().values()]))
    assert len(graphs) == 2 and all(options["fullgraph"] for options in told), f"{len(graphs)} graphs"
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-10)
    torch.testing.assert_close(learned[1], learned[0], rtol=0, atol=1e-10)
    assert histories[0][0] != histories[0][2], "a run that learns nothing compares nothing"
    images, labels = several(model, 4).tensors
    whole = torch.compile(model, fullgraph=True)
    losses = [own(images, labels=labels).loss for own in (model, whole)]
    slopes = [torch.autograd.grad(loss, model.prompts.weight)[0] for loss in losses]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=0, atol=1e-12)


class Stream(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter((torch.zeros(1, 12, 12), torch.tensor(row)) for row in self.rows)


def test_what_has_no_meaning_is_refused_before_a_folder_is_made(backbone: Path, tmp_path: Path) -> None:
    """Each would train or count something else without a word."""
    model = make_model(backbone, multi_label=True)
    train, val = loaders(model)
    images = train.dataset.tensors[0][:3]  # type: ignore[attr-defined]

    def with_labels(labels: Any) -> DataLoader[Any]:
        return DataLoader(TensorDataset(images, torch.tensor(labels)), batch_size=3)

    one = with_labels([0, 1, 2])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"label_smoothing": 0.1}, "label_smoothing must be 0.0 for a multi-label model, got 0.1"),
        ({"protoverb_weight": 1.0}, "protoverb_weight must be 0.0 for a multi-label model, got 1.0"),
        ({"class_weights": "balanced"}, "class_weights must be None for a multi-label model, got 'balanced'"),
        ({"train": one}, r"train labels must be \(N, 3\) of 0 and 1 for a multi-label model, got \(3,\) of int64"),
        ({"val": one}, r"val labels must be \(N, 3\) of 0 and 1 for a multi-label model, got \(3,\) of int64"),
        ({"train": with_labels([[0, 1], [0, 0], [1, 1]])}, r"must be \(N, 3\) of 0 and 1 .*, got \(2, 2\)"),
        (
            {"train": with_labels([[0, 1, 0], [0, 0, 3], [1, 1, 0]])},
            "train labels must be 0 or 1 for each of 3 classes, ",
        ),
        ({"train": with_labels([[0, 1, 0], [0, 0, 0.5], [1, 1, 0]])}, "got 0.5 for image 1"),
        ({"train": DataLoader(Stream([[0, 1, 2]]))}, "labels must be 0 or 1 for each of 3 classes, got 2 for row 0"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message) as refusal:
            fit(model, **({"train": train, "val": val, "epochs": 1, "run_dir": tmp_path / "r"} | OPTIONS | changes))
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="confusion must be False for a multi-label model"):
        evaluate(model, val, confusion=True)
    single = make_model(backbone)
    with pytest.raises(ValueError, match="threshold must be left out for a model of one label an image, got"):
        predict(single, images, threshold=0.5)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        predict(model, images, threshold=2)
    with pytest.raises(ValueError, match=r"labels must be \(B,\) integers or \(B, 3\) shares, got .* of torch.uint8"):
        fit(single, train, epochs=1, run_dir=tmp_path / "r", **OPTIONS)
    hot = DataLoader(TensorDataset(images, torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 0, 0]])), batch_size=3)
    with pytest.raises(
        ValueError, match="labels must be shares that add up to 1, got 2 for row 0: several labels of an"
    ):
        fit(single, hot, epochs=1, run_dir=tmp_path / "r", **OPTIONS)
    assert not (tmp_path / "r").exists()


def test_labels_are_known_from_the_items_or_the_stream(backbone: Path) -> None:
    """Data sets that do not carry (N, K) labels are read once; streams batch by batch."""

    class Inside(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return {"pixel_values": torch.zeros(1, 12, 12), "labels": np.eye(3, dtype=np.float32)[index]}

    for data in (Inside(), Stream(np.eye(3).tolist())):
        model = make_model(backbone, multi_label=True)
        assert len(fit(model, DataLoader(data, batch_size=2), epochs=1, **OPTIONS).history) == 1


def test_older_adapters_and_runs_are_of_one_label(backbone: Path, tmp_path: Path) -> None:
    """Written before there was `multi_label`."""
    save_adapter(make_model(backbone), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["model"].pop("multi_label") is False
    write_as_of_schema(tmp_path / "a", config, 3)
    assert load_adapter(tmp_path / "a").multi_label is False
    model = make_model(backbone)
    data = TensorDataset(torch.zeros(3, 1, 12, 12), torch.arange(3))
    fit(model, DataLoader(data), epochs=1, run_dir=tmp_path / "r", **OPTIONS)
    run = json.loads((tmp_path / "r" / RUN_FILE).read_text())
    assert run["finished"]["identity"].pop("model.multi_label") is False
    (tmp_path / "r" / RUN_FILE).write_text(json.dumps(run))
    fit(make_model(backbone), DataLoader(data), epochs=1, run_dir=tmp_path / "r", resume=True, **OPTIONS)
