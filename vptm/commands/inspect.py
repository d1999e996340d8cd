"""`vptm inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vptm.terminal import print_columns


def inspect(
    path: Annotated[
        str, typer.Argument(help="A checkpoint or a name, as --model of `vptm train`, or a run or adapter folder.")
    ],
) -> None:
    """Show what a checkpoint or a run holds, also where something is missing.

    \b
    Example:
      vptm inspect beitv2_base_patch16_224_pt1k.pth
      vptm inspect runs/builtin-1
    """
    from vptm.training.run_folder import RUN_FILE, read_run
    from vptm.weights.description import describe

    rows = describe(path)
    if (Path(path) / RUN_FILE).is_file():
        run = read_run(Path(path))
        rows.append(("command", str(run.get("command"))))
        if test := (run.get("result") or {}).get("test"):
            quality = ("mAP", f"{test['map']:.4f}") if "map" in test else ("accuracy", f"{test['accuracy']:.2%}")
            rows.append((f"test {quality[0]}", f"{quality[1]} of {test['n']} images"))
    print_columns(rows)
