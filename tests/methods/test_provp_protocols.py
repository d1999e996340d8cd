"""Few-shot and base-to-novel: which classes are learned, which are only named, and what is reported."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from console import Console
from safetensors.torch import save_file
from tiny_data import write_pictures

import vptm.methods.provp_protocols as protocols
from vptm.data.sources import load_data
from vptm.methods.provp import ridge_projection
from vptm.methods.provp_protocols import (
    ClassFeatures,
    harmonic_mean,
    only_classes,
    published_settings,
    read_class_features,
    run_protocol,
    split_classes,
)
from vptm.methods.reprogramming import label_mapping
from vptm.models.prompted_beit import PromptedBEiT
from vptm.training.reformation import FeatureReformation

CLASSES = ("upper", "left", "right")  # in the data: left, right, upper


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "all", 12)


def builder(material: Path, readout: str = "cls") -> Any:
    def build(classes: int) -> PromptedBEiT:
        return PromptedBEiT(
            str(material / "backbone.safetensors"),
            classes,
            prompt_mode="progressive",
            prompt_length=2,
            readout=readout,
            token_activation="hidden",
        )

    return build


SETTINGS: dict[str, Any] = {"epochs": 3, "lr": 0.1, "optimizer": "momentum", "schedule": "provp", "progress": False}


def test_harmonic_mean_of_the_paper() -> None:
    """85.20 base and 73.22 novel are 78.76; nothing right is 0 and no division by zero."""
    assert harmonic_mean(0.8520, 0.7322) == pytest.approx(0.7876, abs=5e-5)
    assert harmonic_mean(0.0, 0.0) == 0.0 and harmonic_mean(1.0, 0.0) == 0.0


def test_classes_are_numbered_anew(pictures: Path) -> None:
    """A part of the classes keeps its images, in the order asked for, and no other image."""
    data = load_data(pictures).train
    part = only_classes(data, [2, 0])
    assert part.classes == ["upper", "left"]
    for key, label in zip(part.keys, part.labels):
        assert key.split("/")[0] == part.classes[label]
    assert len(part) == int((data.labels != 1).sum())
    assert split_classes(3) == ([0, 1], [2]) and split_classes(4) == ([0, 1], [2, 3])


def test_base_to_novel_never_sees_the_novel_classes(
    pictures: Path,
    material: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training, validation and the fitted projection hold base images alone; both halves are tested once, each among
    its own classes with its own embeddings."""
    data = load_data(pictures)
    embeddings = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    seen: dict[str, Any] = {"tested": []}
    fit, evaluate = protocols.fit, protocols.evaluate

    def spied_fit(model: Any, train: Any, val: Any, **kwargs: Any) -> Any:
        seen["train"], seen["val"] = train.dataset, val.dataset
        seen["before"] = model.prompts.weight.detach().clone()
        seen["projection"] = model.verbalizer.projection.detach().clone()
        seen["frozen"] = FeatureReformation(model).twin.backbone
        return fit(model, train, val, **kwargs)

    def spied_evaluate(model: Any, loader: Any, **options: Any) -> Any:
        weights = model.verbalizer.embeddings.detach().clone()
        seen["tested"].append((loader.dataset, weights, model.prompts.weight.detach().clone()))
        return evaluate(model, loader, **options)

    monkeypatch.setattr(protocols, "fit", spied_fit)
    monkeypatch.setattr(protocols, "evaluate", spied_evaluate)
    run = run_protocol("base-to-novel", builder(material), data, ClassFeatures(embeddings), shots=4, **SETTINGS)
    assert seen["train"].classes == seen["val"].classes == ["left", "right"] and len(seen["train"]) == 8
    assert all(key.startswith(("left", "right")) for key in (*seen["train"].keys, *seen["val"].keys))
    assert set(seen["val"].keys) == {key for key in data.val.keys if not key.startswith("upper")}, (
        "the epoch may not be chosen on test images"
    )
    (base, base_rows, base_prompts), (novel, novel_rows, novel_prompts) = seen["tested"]
    assert base.classes == ["left", "right"] and torch.equal(base_rows, embeddings[:2])
    assert novel.classes == ["upper"] and torch.equal(novel_rows, embeddings[2:])
    assert torch.equal(base_prompts, novel_prompts) and not torch.equal(base_prompts, seen["before"])
    assert run.novel == 1.0 and run.harmonic == harmonic_mean(run.base, 1.0)
    plain = seen["train"].with_transform(protocols.transforms(builder(material)(2)))
    images = torch.stack([image for image, _ in plain])
    features = seen["frozen"].forward_features(images)[:, 0]
    expected = ridge_projection(features.detach(), torch.from_numpy(plain.labels), embeddings[:2], strength=0.01)
    assert torch.allclose(seen["projection"], expected, atol=1e-5)


def test_published_settings() -> None:
    """The numbers of the released commands; the epochs of a number of shots between two are those of the lower."""
    assert [published_settings("few-shot", shots)["epochs"] for shots in (1, 2, 4, 5, 8, 16)] == [
        *(50, 100, 100, 100, 200, 200)
    ]
    assert published_settings("base-to-novel", 16) == {"prompt_length": 16, "epochs": 100, "weight_decay": 1e-3}


def test_what_cannot_be_tested_is_refused_before_training(
    pictures: Path,
    material: Path,
) -> None:
    """A novel class without test images would end in a division by zero, after all the training."""
    data = load_data(pictures)
    assert data.test is not None
    gone = replace(data, test=data.test.subset([i for i, label in enumerate(data.test.labels) if label != 2]))
    with pytest.raises(ValueError, match="the class 'upper' has no test image"):
        run_protocol("base-to-novel", builder(material), gone, ClassFeatures(torch.eye(3)), shots=1, **SETTINGS)
    with pytest.raises(ValueError, match="logit_scale must be finite and > 0, got 0"):
        run_protocol(
            "few-shot", builder(material), data, ClassFeatures(torch.eye(3)), shots=1, logit_scale=0, **SETTINGS
        )


def test_few_shot_learns_and_tests_every_class(pictures: Path, material: Path) -> None:
    """With embeddings that tell the classes apart the fitted map beats chance, and the run follows its seed."""
    data = load_data(pictures)
    features = ClassFeatures(torch.eye(3))
    settings = SETTINGS | {"epochs": 10, "lr": 0.01, "reformation": 1.0}
    build = builder(material, "mean")
    runs = [
        run_protocol("few-shot", build, data, features, shots=6, ridge=1e-3, augment=False, **settings)
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and runs[0].novel is None and runs[0].harmonic is None
    assert runs[0].base > 0.5


def test_files_are_matched_by_name(tmp_path: Path) -> None:
    """Rows follow the data's order of classes, whatever the file's; a projection comes along."""
    rows = torch.arange(8.0).view(4, 2)
    names = json.dumps(["d", "b", "a", "c"])
    save_file({"embeddings": rows, "projection": torch.ones(2, 3)}, tmp_path / "e.safetensors", {"class_names": names})
    found = read_class_features(tmp_path / "e.safetensors", ["a", "b", "c"])
    assert found.embeddings.tolist() == [[4, 5], [2, 3], [6, 7]] and tuple(found.projection.shape) == (2, 3)
    with pytest.raises(ValueError, match="has no embedding of the class 'x', it has d, b, a, c"):
        read_class_features(tmp_path / "e.safetensors", ["a", "x"])
    save_file({"embeddings": rows}, tmp_path / "unnamed.safetensors")
    with pytest.raises(ValueError, match="K class_names in its metadata"):
        read_class_features(tmp_path / "unnamed.safetensors", ["a"])
    (tmp_path / "junk.safetensors").write_text("junk")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        read_class_features(tmp_path / "junk.safetensors", ["a"])
    with pytest.raises(FileNotFoundError, match="class embeddings not found"):
        read_class_features(tmp_path / "none.safetensors", ["a"])


def test_the_command(vptm: Console, material: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One CSV line per number of shots and seed; refusals are one line, before anything is trained."""
    embeddings = torch.randn(3, 4)
    save_file({"embeddings": embeddings}, "e.safetensors", {"class_names": json.dumps(list(CLASSES))})
    arguments = ["--data", pictures, "--model", material / "backbone.safetensors", "--epochs", 2]
    arguments += ["--class-embeddings", "e.safetensors", "--prompt-length", 2]
    code, out, err = vptm("protocol", "base-to-novel", *arguments, "--shots", "1,2", "--seeds", 2)
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["shots"], row["seed"]) for row in rows] == [("1", "0"), ("1", "1"), ("2", "0"), ("2", "1")]
    assert all(
        abs(float(row["harmonic"]) - harmonic_mean(float(row["base"]), float(row["novel"]))) < 1e-3 for row in rows
    )
    for more, message in (
        (["few-shots"], "did you mean 'few-shot'"),
        (["few-shot", "--shots", "99"], "has 9 training images, got 99"),
        (["few-shot", "--shots", "x"], "--shots must be an integer >= 1"),
        (["few-shot", "--shots", "2,all"], "--shots must be integers >= 1 in a protocol, got '2,all'"),
        (["few-shot", "--seeds", 0], "--seeds must be >= 1"),
    ):
        code, out, err = vptm("protocol", *more[:1], *arguments, *more[1:])
        assert code == 2 and message in err, err
    monkeypatch.setattr(label_mapping, "find_spec", lambda name: None)
    code, line = vptm.refused("protocol", "few-shot", "--data", pictures)
    assert code == 2 and "pip install 'vptm[text]'" in line
