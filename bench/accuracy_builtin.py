"""Accuracy of the built-in model from a few labelled images, beside its random-weight twin and simple baselines.

    python bench/accuracy_builtin.py --data fashion-mnist --shots 4 16 64 --seeds 5

Every method sees the same training images of a seed, selects its epoch (or its regularisation) on validation images and
is tested once. Finished runs are kept in the json, so the command resumes where it stopped; runs of other weights are
dropped. Writes `<out>.json` with every run, means and paired differences with 95 % intervals, and `<out>.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.beit import Beit
from torch.utils.data import DataLoader

import vptm
from vptm.data import ImageData, ImageDataset

VPT = {"readout": "cls", "verbalizer": "linear", "token_activation": "hidden"}
PROMPTED: dict[str, dict[str, Any]] = {
    "vptm": {},
    "mask row, hidden state": {"token_activation": "hidden"},
    "cls row, token head": {"readout": "cls"},
    "vpt": VPT,
    "fine-tuning": {**VPT, "prompt_length": 0},
}
METHODS = (*PROMPTED, *(f"{name}, random weights" for name in PROMPTED), "linear probe", "pixels")
# one recipe for everything prompted; full fine-tuning needs a smaller step
RECIPE = {"epochs": 40, "lr": 2e-3, "weight_decay": 0.1}
FINE_TUNING = {**RECIPE, "lr": 5e-4}
COMPARISONS = [
    ("vptm", "vptm, random weights"),
    ("vptm", "pixels"),
    ("vptm", "vpt"),
    ("vptm", "cls row, token head"),
    ("vptm", "linear probe"),
    ("mask row, hidden state", "pixels"),
    ("vpt", "vpt, random weights"),
    ("cls row, token head", "cls row, token head, random weights"),
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
    vocabulary = vptm.load_backbone("builtin").lm_head.out_features
    source: str | Beit = "builtin" if name == method else random_twin(seed)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random mask token and head are what the twin is for
        model = vptm.PromptedBEiT(source, classes, vocab_size=vocabulary, **PROMPTED[name])
    return model.unfreeze() if name == "fine-tuning" else model


def train_prompted(method: str, train: ImageDataset, data: ImageData, val: ImageDataset, seed: int) -> dict[str, Any]:
    model = build(method, len(data.classes), seed)
    prepare = vptm.transforms(model)
    augmented = train.with_transform(vptm.transforms(model, train=True, flip=data.flip))
    recipe = FINE_TUNING if method.startswith("fine-tuning") else RECIPE
    result = vptm.fit(
        model,
        DataLoader(augmented, batch_size=32, shuffle=True),
        DataLoader(val.with_transform(prepare), batch_size=256),
        **recipe,
        seed=seed,
        progress=False,
    )
    assert data.test is not None
    test = vptm.evaluate(model, DataLoader(data.test.with_transform(prepare), batch_size=256))
    parameters = sum(parameter.numel() for parameter in model.trainable_parameters())
    return {"val": result.best_val_accuracy, "test": test["accuracy"], "trained_parameters": parameters}


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
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        classifier.fit(train_features[name], train.labels)
        score = classifier.score(val_features[name], val.labels)
        if best is None or score > best[0]:
            best = (score, strength, classifier, name)
    assert best is not None
    return {"val": best[0], "test": float(best[2].score(test[best[3]], labels)), "C": best[1], "features": best[3]}


def interval(values: np.ndarray) -> dict[str, Any]:
    """Mean and 95 % t-interval of paired differences, in points."""
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": 1}
    half = float(student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(values)}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    by = {(run["data"], run["shots"], run["method"], run["seed"]): 100 * run["test"] for run in runs}
    settings = sorted({(run["data"], run["shots"]) for run in runs})
    summary: dict[str, Any] = {}
    for data, shots in settings:
        accuracy, paired = {}, {}
        for method in METHODS:
            values = np.array([value for (d, s, m, _), value in by.items() if (d, s, m) == (data, shots, method)])
            if len(values):
                spread = float(values.std(ddof=1)) if len(values) > 1 else None
                accuracy[method] = {"mean": float(values.mean()), "std": spread, "seeds": len(values)}
        for first, second in COMPARISONS:
            seeds = [seed for (d, s, m, seed) in by if (d, s, m) == (data, shots, first) and (d, s, second, seed) in by]
            if seeds:
                differences = [by[data, shots, first, seed] - by[data, shots, second, seed] for seed in seeds]
                paired[f"{first} - {second}"] = interval(np.array(differences))
        summary[f"{data}, {shots} shots"] = {"test_accuracy_percent": accuracy, "paired_difference_points": paired}
    return summary


def plot(summary: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(summary), 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (setting, content) in zip(np.atleast_1d(figure.subplots(1, len(summary))), summary.items()):
        accuracy = content["test_accuracy_percent"]
        names = sorted(accuracy, key=lambda name: accuracy[name]["mean"])
        colours = ["#c8553d" if name == "vptm" else "#b8b8b8" if "random" in name else "#1f6f8b" for name in names]
        means = [accuracy[name]["mean"] for name in names]
        spreads = [accuracy[name]["std"] or 0 for name in names]
        bars = axes.barh(names, means, xerr=spreads, color=colours)
        axes.bar_label(bars, fmt="%.1f", padding=4)
        axes.set(title=setting, xlabel="test accuracy, %", xlim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
    canvas.print_figure(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["fashion-mnist"])
    parser.add_argument("--shots", nargs="+", type=int, default=[16])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy" / "builtin")
    arguments = parser.parse_args()

    path = arguments.out.with_suffix(".json")
    weights = vptm.PromptedBEiT("builtin", 2).weight_hash()
    stored = json.loads(path.read_text()) if path.exists() else {}
    runs = stored.get("runs", []) if stored.get("weights") == weights else []
    done = {(run["data"], run["shots"], run["method"], run["seed"]) for run in runs}

    def save() -> None:
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "weights": weights,
            "recipe": {"prompted": RECIPE, "fine-tuning": FINE_TUNING, "batch_size": 32},
            "validation_images_per_class": VAL_SHOTS,
            "versions": {"vptm": vptm.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "summary": summarise(runs),
            "runs": runs,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)

    for name in arguments.data:
        data = vptm.load_data(name)
        if data.val is None or data.test is None:
            raise SystemExit(f"{name} must have validation and test images")
        val = vptm.few_shot(data.val, min(VAL_SHOTS, int(np.bincount(data.val.labels).min())), seed=0)
        test_features: dict[str, dict[str, np.ndarray]] = {}
        for shots in arguments.shots:
            for seed in range(arguments.seeds):
                train = vptm.few_shot(data.train, shots, seed=seed)
                for method in arguments.methods:
                    if (name, shots, method, seed) in done:
                        continue
                    started = time.perf_counter()
                    if method in ("linear probe", "pixels"):
                        if method not in test_features:
                            test_features[method] = features(data.test, method)
                        result = logistic_regression(method, train, val, test_features[method], data.test.labels)
                    else:
                        result = train_prompted(method, train, data, val, seed)
                    seconds = round(time.perf_counter() - started, 1)
                    key = {"data": name, "shots": shots, "method": method, "seed": seed}
                    runs.append({**key, **result, "seconds": seconds})
                    print(
                        f"{name}, {shots} shots, seed {seed}, {method}: test {result['test']:.2%}, {seconds} s",
                        flush=True,
                    )
                    save()
    save()
    plot(summarise(runs), arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
