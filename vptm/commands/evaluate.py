"""`vptm evaluate`."""

from __future__ import annotations

import json
from typing import Annotated, get_args

import typer

from vptm.commands.options import (
    Backbone,
    Compile,
    CudaGraph,
    Device,
    Impl,
    OnBadImage,
    PrecisionOption,
    Run,
    Workers,
    choice,
)
from vptm.settings import EVALUATION_BATCH, Split
from vptm.terminal import print_columns, say


def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="Other data, as in `vptm train`; the run's own by default.", show_default=False)
    ] = None,
    split: Annotated[str, choice(get_args(Split), "Images to count.")] = "test",
    include_trained: Annotated[
        bool, typer.Option("--include-trained", help="Also count images that the run was trained on or chosen by.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with the confusion matrix.")] = False,
    on_bad_image: OnBadImage = "error",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = EVALUATION_BATCH,
    workers: Workers = None,
    source: Backbone = None,
    device: Device = "auto",
    impl: Impl = "auto",
    precision: PrecisionOption = "auto",
    compile: Compile = False,
    cuda_graph: CudaGraph = False,
) -> None:
    """Measure a run on its test images or other data.

    Other data must have labels the run knows; without splits of its own it is evaluated whole. The run's own data is
    known again where it moved. Images that the run was trained on, or whose accuracy chose its epoch, are counted and
    left out, by the contents of their files.

    \b
    Example:
      vptm evaluate runs/builtin-1
      vptm evaluate runs/photos --data more-photos/ --json
    """
    from vptm.training.evaluate_run import evaluate_run
    from vptm.training.ranks import is_first

    found = evaluate_run(
        run,
        data=data,
        split=split,
        include_trained=include_trained,
        confusion=as_json,
        on_bad_image=on_bad_image,
        batch_size=batch_size,
        workers=workers,
        source=source,
        device=device,
        impl=impl,
        precision=precision,
        compile=compile,
        cuda_graph=cuda_graph,
        report=say,
    )
    if not is_first():  # of several processes
        return
    scores = found.scores
    if as_json:
        facts = {"split": found.split, "data": found.data, "classes": found.classes, "left_out": found.left_out}
        print(json.dumps({**facts, **scores}))
        return
    columns = {"recall": "per_class", "precision": "precision_per_class", "F1": "f1_per_class"}
    if "map" in scores:
        columns = {"average precision": "ap_per_class", **columns, "recall": "recall_per_class"}
    shares = zip(*(["-" if one is None else format(one, ".2%") for one in scores[name]] for name in columns.values()))
    print_columns([("", *columns), *((name, *row) for name, row in zip(found.classes, shares))])
    if "map" in scores:
        print(f"macro-F1 {scores['macro_f1']:.4f}, micro-F1 {scores['micro_f1']:.4f} at a probability of 0.5")
        print(f"{found.split} mAP {scores['map']:.4f} of {scores['n']} images, loss {scores['loss']:.4f}")
        return
    print(
        f"balanced accuracy {scores['balanced_accuracy']:.2%}, macro-F1 {scores['macro_f1']:.4f}, "
        f"calibration error {scores['ece']:.4f}"
    )
    print(f"{found.split} accuracy {scores['accuracy']:.2%} of {scores['n']} images, loss {scores['loss']:.4f}")
