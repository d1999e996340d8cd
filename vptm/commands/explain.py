"""`vptm explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vptm.commands.options import Backbone, Device, Impl, Run
from vptm.terminal import print_columns


def explain(
    run: Run,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    out: Annotated[
        Path | None,
        typer.Option(help="PNG to write; the image's name with -explained.png, here, by default.", show_default=False),
    ] = None,
    layer: Annotated[int, typer.Option(help="Block whose attention is drawn, from 0; negative from the end.")] = -1,
    top: Annotated[int, typer.Option(help="Visual tokens and classes to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, attention of every head included.")] = False,
    source: Backbone = None,
    device: Device = "auto",
    impl: Impl = "auto",
) -> None:
    """Show why a picture gets its label.

    Prints the visual tokens predicted for it, the nearest prototypes, and how much attention the row that is
    read pays to patches, prompts, class row and itself; draws that attention over the picture.

    \b
    Example:
      vptm explain runs/builtin-1 shoe.png
    """
    from dataclasses import asdict

    from vptm.inspection.explain import inspect_tokens
    from vptm.models.opening import load_adapter
    from vptm.training.devices import device_of

    target = Path(f"{image.stem}-explained.png") if out is None else out
    _check_target(image, target)
    place = device_of(device)
    report = inspect_tokens(load_adapter(run, source=source, impl=impl).to(place), image, top=top, layer=layer)
    report.draw(target)
    if as_json:
        facts = asdict(report) | {"classes": [score._asdict() for score in report.classes], "drawn": str(target)}
        facts["attention"] = report.attention.tolist()
        print(json.dumps({name: value for name, value in facts.items() if name != "picture"}))
        return
    rows = [("token", str(token), f"probability {probability:.2%}") for token, probability in report.tokens]
    for score in report.classes:
        near = () if score.similarity is None else (f"cosine {score.similarity:+.4f}",)
        rows.append(("class", score.name, f"probability {score.probability:.2%}", *near))
    print_columns(rows)
    print(f"attention of the {report.row} row  {', '.join(f'{k} {v:.0%}' for k, v in report.shares.items())}")
    print(f"drawn  {target}")


def _check_target(image: Path, target: Path) -> None:
    if target.suffix.lower() != ".png":
        raise ValueError(f"--out must be a .png file, got {target}")
    if not image.exists():
        raise FileNotFoundError(f"image not found: {image}")
    if target.is_dir():
        raise ValueError(f"--out must be a file, got the folder {target}")
    if target.exists() and target.samefile(image):
        raise ValueError(f"--out must be another file than the image, got {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--out: folder not found: {target.parent}")
