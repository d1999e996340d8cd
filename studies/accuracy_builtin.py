"""Accuracy of the built-in model from labelled images, beside its random-weight twin and simple baselines.

    python -m studies.accuracy_builtin --data fashion-mnist digits --shots 4 16 64 all --seeds 5

Every method sees the same training images of a seed, selects its epoch (or its regularisation) on validation images and
is tested once. Every trained method, each random-weight twin for itself, first chooses its learning rate by
validation accuracy on Fashion-MNIST, 16 shots, with seeds that are not reported, from three rates and more until the
best is not the first or the last; that rate is used everywhere.

Finished runs are kept in the json, so the command resumes where it stopped, and several commands (of other methods)
can work on one json; runs of other weights are dropped. Writes `<out>.json` with every run, means and paired
differences with 95 % intervals, and `<out>.png`.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.beit import Beit
from torch.utils.data import DataLoader

import vptm
from studies.runs import BATCH, RESULTS, WEIGHT_DECAY, Study, accuracy, interval
from vptm.data.datasets import ImageData, ImageDataset
from vptm.inspection.figures import new_figure, write_png

VPT = {"readout": "cls", "verbalizer": "linear", "token_activation": "hidden"}
PROMPTED: dict[str, dict[str, Any]] = {
    "vptm": {},
    "mask row, hidden state": {"token_activation": "hidden"},
    "cls row, token head": {"readout": "cls"},
    "vpt": VPT,
    "fine-tuning": {**VPT, "prompt_length": 0},
}
METHODS = (*PROMPTED, *(f"{name}, random weights" for name in PROMPTED), "linear probe", "pixels")
RATES = (5e-4, 2e-3, 8e-3)
FINE_TUNING_RATES = (1e-4, 5e-4, 2e-3)
TUNED_ON = ("fashion-mnist", 16)
TUNING_SEEDS = (1000, 1001)
COMPARISONS = [
    ("vptm", "vptm, random weights"),
    ("vptm", "pixels"),
    ("vptm", "vpt"),
    ("vptm", "cls row, token head"),
    ("vptm", "linear probe"),
    ("vptm", "fine-tuning"),
    ("mask row, hidden state", "pixels"),
    ("vpt", "vpt, random weights"),
    ("cls row, token head", "cls row, token head, random weights"),
    ("fine-tuning", "fine-tuning, random weights"),
]
VAL_SHOTS = 32
REGULARISATION = (1e-3, 1e-2, 1e-1, 1.0)


def random_twin(seed: int) -> Beit:
    """The built-in architecture with timm's initial weights."""
    architecture = dict(vptm.load_backbone("builtin").report.architecture)
    torch.manual_seed(seed)
    return Beit(**architecture, num_classes=0)


def build(method: str, classes: int, seed: int) -> vptm.PromptedBEiT:
    name = method.removesuffix(", random weights")
    builtin = vptm.load_backbone("builtin")
    source: str | Beit = "builtin" if name == method else random_twin(seed)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random mask token and head are what the twin is for
        model = vptm.PromptedBEiT(source, classes, vocab_size=builtin.lm_head.out_features, **PROMPTED[name])
    model.default_cfg = dict(builtin.default_cfg)  # a twin sees the same pixels: normalised alike and not cropped
    return model.unfreeze() if name == "fine-tuning" else model


def schedule(images: int) -> tuple[int, int]:
    """Epochs, and passes over the training images in one: `vptm train`'s 40 for 16 images of ten classes, else ten
    epochs with 200 steps of 32 in all for fewer images, 400 for more, and at least one pass."""
    if images == 160:
        return 40, 1
    passes = max(1, round((6400 if images < 160 else 12800) / images))
    return (10, passes // 10) if passes >= 10 else (passes, 1)


def train(
    method: str,
    images: ImageDataset,
    data: ImageData,
    val: ImageDataset,
    seed: int,
    lr: float,
    *,
    test: bool = True,
) -> dict[str, Any]:
    model = build(method, len(data.classes), seed)
    prepare = vptm.transforms(model)
    epochs, passes = schedule(len(images))
    repeated = images.subset(list(range(len(images))) * passes)
    result = vptm.fit(
        model,
        DataLoader(
            repeated.with_transform(vptm.transforms(model, train=True, flip=data.flip)), batch_size=BATCH, shuffle=True
        ),
        DataLoader(val.with_transform(prepare), batch_size=256),
        epochs=epochs,
        lr=lr,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        progress=False,
    )
    found = {"val": result.best_val_accuracy, "lr": lr}
    if test:
        assert data.test is not None
        found["test"] = vptm.evaluate(model, DataLoader(data.test.with_transform(prepare), batch_size=256))["accuracy"]
        found["trained_parameters"] = sum(parameter.numel() for parameter in model.trainable_parameters())
    return found


@torch.inference_mode()
def features(part: ImageDataset, kind: str) -> dict[str, np.ndarray]:
    """Pixels (N, H*W), or the frozen class row, mean patch row and mask row of the built-in model, by name."""
    if kind == "pixels":
        return {"pixels": np.stack([np.asarray(part.image(i), np.float32).ravel() / 255 for i in range(len(part))])}
    found = {}
    for readout in ("cls", "mean", "mask"):
        model = vptm.PromptedBEiT("builtin", 2, prompt_length=0, readout=readout, token_activation="hidden").eval()
        loader = DataLoader(part.with_transform(vptm.transforms(model)), batch_size=256)
        found[readout] = torch.cat([model.forward_hidden(images) for images, _ in loader]).numpy()
    return found


def logistic_regression(
    kind: str, train: ImageDataset, val: ImageDataset, test: dict[str, np.ndarray], labels: np.ndarray
) -> dict[str, Any]:
    """Read-out and strength chosen on validation."""
    best: tuple[float, float, Any, str] | None = None
    train_features, val_features = features(train, kind), features(val, kind)
    for name, strength in ((name, strength) for name in train_features for strength in REGULARISATION):
        iterations = 2000 if len(train) < 5000 else 200
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=iterations))
        classifier.fit(train_features[name], train.labels)
        score = classifier.score(val_features[name], val.labels)
        if best is None or score > best[0]:
            best = (score, strength, classifier, name)
    assert best is not None
    return {"val": best[0], "test": float(best[2].score(test[best[3]], labels)), "C": best[1], "features": best[3]}


def order(shots: int | str) -> float:
    return math.inf if isinstance(shots, str) else shots


def title(data: str, shots: int | str) -> str:
    return f"{data}, all training images" if shots == "all" else f"{data}, {shots} shots"


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    by = {(run["data"], run["shots"], run["method"], run["seed"]): 100 * run["test"] for run in runs}
    names = list(dict.fromkeys(run["data"] for run in runs))
    settings = sorted({(run["data"], run["shots"]) for run in runs}, key=lambda s: (names.index(s[0]), order(s[1])))
    summary: dict[str, Any] = {}
    for data, shots in settings:
        accuracies, paired = {}, {}
        for method in METHODS:
            values = np.array([value for (d, s, m, _), value in by.items() if (d, s, m) == (data, shots, method)])
            if len(values):
                accuracies[method] = accuracy(values)
        for first, second in COMPARISONS:
            seeds = [seed for (d, s, m, seed) in by if (d, s, m) == (data, shots, first) and (d, s, second, seed) in by]
            if seeds:
                differences = [by[data, shots, first, seed] - by[data, shots, second, seed] for seed in seeds]
                paired[f"{first} - {second}"] = interval(np.array(differences))
        summary[title(data, shots)] = {"test_accuracy_percent": accuracies, "paired_difference_points": paired}
    return summary


def plot(summary: dict[str, Any], path: Path) -> None:

    columns = min(4, len(summary))
    rows = math.ceil(len(summary) / columns)
    figure = new_figure(5.2 * columns, 4.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (setting, content) in zip(grid, summary.items()):
        accuracy = content["test_accuracy_percent"]
        names = sorted(accuracy, key=lambda name: accuracy[name]["mean"])
        colours = ["#c8553d" if name == "vptm" else "#b8b8b8" if "random" in name else "#1f6f8b" for name in names]
        means = [accuracy[name]["mean"] for name in names]
        spreads = [accuracy[name]["std"] or 0 for name in names]
        bars = axes.barh(names, means, xerr=spreads, color=colours)
        axes.bar_label(bars, fmt="%.1f", padding=4)
        axes.set(
            title=setting.replace(", ", "\n", 1), xlabel="test accuracy, %", xlim=(0, 112), xticks=range(0, 101, 20)
        )
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(summary) :]:
        axes.set_visible(False)
    write_png(figure, path, dpi=100)


def shots_argument(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive number or all, got {text!r}")
    return int(text)


class Builtin(Study):
    """This study's runs, their summary, and how learning rates are chosen."""

    def content(self, runs: list[dict[str, Any]], trials: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self.origin(),
            "recipe": {
                "batch_size": BATCH,
                "weight_decay": WEIGHT_DECAY,
                "epochs": "see `schedule`: 200 steps up to 160 images, 400 for more, and at least one pass",
                "learning_rate": "of each method, the best mean validation accuracy in `tuning`",
            },
            "validation_images_per_class": VAL_SHOTS,
            "summary": summarise(runs),
            "tuning": trials,
            "runs": runs,
        }

    def learning_rate(self, method: str, data: ImageData, val: ImageDataset) -> float:
        """Chosen on validation images; runs what is missing for the choice."""
        rates = list(FINE_TUNING_RATES if method.startswith("fine-tuning") else RATES)
        while True:
            for seed in TUNING_SEEDS:
                images = vptm.few_shot(data.train, TUNED_ON[1], seed=seed)
                for lr in rates:
                    if not any((t["method"], t["seed"], t["lr"]) == (method, seed, lr) for t in self.stored()[1]):
                        found = train(method, images, data, val, seed, lr, test=False)
                        print(f"tuning {method}: lr {lr:g}, seed {seed}: val {found['val']:.2%}", flush=True)
                        self.add({"method": method, "seed": seed, **found}, tuning=True)
            trials = [t for t in self.stored()[1] if t["method"] == method]
            best = max(rates, key=lambda lr: (np.mean([t["val"] for t in trials if t["lr"] == lr]), -lr))
            if rates[0] < best < rates[-1]:
                return best
            rates = [rates[0] / 4, *rates] if best == rates[0] else [*rates, 4 * rates[-1]]


def parts(name: str) -> tuple[ImageData, ImageDataset]:
    """A data set and its validation images."""
    data = vptm.load_data(name)
    if data.val is None or data.test is None:
        raise SystemExit(f"{name} must have validation and test images")
    return data, vptm.few_shot(data.val, min(VAL_SHOTS, int(np.bincount(data.val.labels).min())), seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["fashion-mnist"])
    parser.add_argument("--shots", nargs="+", type=shots_argument, default=[16], help="images per class, or all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--out", type=Path, default=RESULTS / "builtin")
    arguments = parser.parse_args()

    study = Builtin(arguments.out.with_suffix(".json"))
    rates: dict[str, float] = {}
    for name in arguments.data:
        data, val = parts(name)
        assert data.test is not None
        test_features: dict[str, dict[str, np.ndarray]] = {}
        for shots in arguments.shots:
            for seed in range(arguments.seeds):
                images = data.train if shots == "all" else vptm.few_shot(data.train, shots, seed=seed)
                for method in arguments.methods:
                    key = {"data": name, "shots": shots, "method": method, "seed": seed}
                    same = [run for run in study.stored()[0] if run.items() >= (key | {"seed": run["seed"]}).items()]
                    if any(run["seed"] == seed for run in same):
                        continue
                    started = time.perf_counter()
                    if method in ("linear probe", "pixels"):
                        if shots == "all" and same:
                            # a convex problem on the same images: every seed has the same answer
                            study.add({**same[0], **key})
                            continue
                        if method not in test_features:
                            test_features[method] = features(data.test, method)
                        result = logistic_regression(method, images, val, test_features[method], data.test.labels)
                    else:
                        if method not in rates:
                            rates[method] = study.learning_rate(method, *parts(TUNED_ON[0]))
                        result = train(method, images, data, val, seed, rates[method])
                    study.add({**key, **result, "seconds": round(time.perf_counter() - started, 1)})
                    print(f"{title(name, shots)}, seed {seed}, {method}: test {result['test']:.2%}", flush=True)
    plot(summarise(study.stored()[0]), arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
