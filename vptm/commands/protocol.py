"""`vptm protocol`."""

from __future__ import annotations

import csv
import sys
from typing import Annotated, Any

import typer

from vptm.commands.options import takes
from vptm.settings import ProtocolSettings
from vptm.terminal import say


@takes(ProtocolSettings.options_of())
def protocol(
    name: Annotated[str, typer.Argument(help="few-shot or base-to-novel.")],
    **options: Any,
) -> None:
    """Run ProVP-Ref's few-shot or base-to-novel protocol.

    Prompts are trained and classes are frozen embeddings, so in base-to-novel the second half of the classes is known
    by name alone. Weights that were trained with a text encoder have a projection to its space: that of a CLIP in timm
    is taken with --text-encoder open_clip, others bring it in --class-embeddings; for the rest one is fitted by ridge
    regression on the training images, a stand-in. Prints CSV.

    \b
    Example:
      vptm protocol base-to-novel --shots 16 --seeds 3
    """
    settings = ProtocolSettings(**options)
    from vptm.methods.provp_protocols import run_protocols

    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, run in enumerate(run_protocols(name, settings, report=say)):
        if number == 0:
            writer.writerow(["protocol", "shots", "seed", "base", "novel", "harmonic"])
        shares = ["" if share is None else f"{share:.4f}" for share in (run.base, run.novel, run.harmonic)]
        writer.writerow([run.protocol, run.shots, run.seed, *shares])
        sys.stdout.flush()
