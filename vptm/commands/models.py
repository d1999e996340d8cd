"""`vptm models`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vptm.terminal import print_columns, say


def models(
    pattern: Annotated[
        str | None, typer.Argument(help="Part of a name, or a pattern with * and ?; all where not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List what --model takes by name.

    The built-in model and timm's published weights: kind, row that is read by default, input, parameters, licence as
    timm states it, and whether there is a head over visual tokens, which VPTM's own read-out needs. Nothing is
    downloaded.

    \b
    Example:
      vptm models dinov2
      vptm models "vit_base*siglip*" --json
    """
    from vptm.inspection.catalogue import openable_models

    found = openable_models(pattern)
    if as_json:
        print(json.dumps([model._asdict() for model in found]))
        return
    rows = [("name", "kind", "read-out", "input", "parameters", "licence", "token head")]
    for model in found:
        size, count = "x".join(map(str, model.input_size)), f"{model.parameters / 1e6:.1f}M"
        head = "yes" if model.token_head else "no"
        rows.append((model.name, model.kind, model.readout, size, count, model.license, head))
    print_columns(rows)
    say("files and folders open too (.pth, .safetensors, .npz, Hugging Face): `vptm inspect FILE` describes one")
