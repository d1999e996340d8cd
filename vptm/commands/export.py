"""`vptm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from vptm.commands.options import Backbone, Run, choice
from vptm.settings import ExportFormat


def export(
    run: Run,
    to: Annotated[str, choice(get_args(ExportFormat), "What is written.")],
    out: Annotated[Path, typer.Option(help="The file; it is replaced.")],
    opset: Annotated[int | None, typer.Option(help="Of ONNX; torch's own by default.", show_default=False)] = None,
    source: Backbone = None,
) -> None:
    """Write a run or an adapter, backbone included, to a file that gives its scores without vptm.

    pt2: torch.export.load, with torch alone. aoti: compiled here for this processor, loaded by
    torch._inductor.aoti_load_package. onnx: any ONNX runtime; pip install "vptm[onnx]" writes it. safetensors: all
    weights. One input, images (any number, channels, height, width), normalised as vptm.transforms does; one output,
    logits. Labels and preprocessing stand in the file.

    \b
    Example:
      vptm export runs/builtin-1 --to pt2 --out clothes.pt2
      vptm export runs/photos --to onnx --out photos.onnx
    """
    from vptm.export import formats
    from vptm.models.opening import load_adapter

    done = formats.export(load_adapter(run, source=source), out, to, opset=opset)
    checked = "" if done.difference is None else f", scores within {done.difference:.1e} of the model's"
    print(f"{done.path}  {done.size:,} bytes{checked}")
