"""`vptm predict`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vptm.commands.options import Backbone, Compile, Device, Impl, OnBadImage, PrecisionOption, Run
from vptm.settings import EVALUATION_BATCH
from vptm.terminal import say


def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    on_bad_image: OnBadImage = "error",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = EVALUATION_BATCH,
    source: Backbone = None,
    device: Device = "auto",
    impl: Impl = "auto",
    precision: PrecisionOption = "auto",
    compile: Compile = False,
) -> None:
    """Name what pictures show.

    CSV on stdout with the columns path, label, score, top5: score is the softmax probability of the label; top5 is a
    JSON list of [label, score] pairs, best first.

    \b
    Example:
      vptm predict runs/builtin-1 shoe.png wardrobe/ > names.csv
    """
    from vptm.models.opening import load_adapter
    from vptm.training.predict import picture_files, predict
    from vptm.training.sources import device_of

    place = device_of(device)
    files = picture_files(images, report=say)
    model = load_adapter(run, source=source, impl=impl).to(place)
    found = predict(
        model,
        files,
        batch_size=batch_size,
        on_bad_image=on_bad_image,
        precision=precision,
        compile=compile,
        report=say,
    )
    # printed at the end: an unreadable image leaves no half of a table behind
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "label", "score", "top5"])
    for path, top in found:
        label, score = top[0]
        pairs = json.dumps([[name, round(value, 6)] for name, value in top], ensure_ascii=False)
        writer.writerow([str(path), label, f"{score:.6f}", pairs])
