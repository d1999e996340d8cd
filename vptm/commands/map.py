"""`vptm map`."""

from __future__ import annotations

import csv
import sys
from typing import Any

from vptm.commands.options import takes
from vptm.settings import MapSettings
from vptm.terminal import say


@takes(MapSettings.options_of())
def map_labels(**options: Any) -> None:
    """Map a classifier's labels to the classes of a data set.

    By default by meaning, without a training image. Prints CSV: label, source labels, and the similarity or count that
    joined the first; the test accuracy goes to stderr.

    \b
    Example:
      vptm map --data photos/ --classifier resnet18
    """
    settings = MapSettings(**{**options, "template": tuple(options["template"])})
    from vptm.methods.reprogramming.map import map_labels as run

    rows, accuracy = run(settings, report=say)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["label", "source_labels", "score"])
    writer.writerows(rows)
    if accuracy is not None:
        say(f"test accuracy {accuracy:.2%}")
