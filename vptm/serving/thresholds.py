"""The least probability of a label of tasks with several labels an image."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from vptm.messages import check_range, hint
from vptm.settings import THRESHOLD


def check_threshold(value: object) -> float:
    """`value` as a probability.

    Raises:
        ValueError, TypeError: what is none.
    """
    check_range("threshold", value, "in [0, 1]")
    return float(value)  # type: ignore[arg-type]


def threshold_of(name: str, several: bool, given: float | None, otherwise: float = THRESHOLD) -> float | None:
    """The threshold of a task: `given`, or `otherwise`; None where an image has one label.

    Args:
        name: of the task, as messages begin.
        several: whether an image of the task has several labels.

    Raises:
        ValueError, TypeError: no probability, or one of a task whose images have one label each.
    """
    if not several:
        if given is not None:
            raise ValueError(f"{name}threshold must be left out for a model of one label an image, got {given!r}")
        return None
    return otherwise if given is None else check_threshold(given)


def check_used(thresholds: Iterable[float | None], given: float | None) -> None:
    """Raise ValueError where a threshold was given for tasks of which none has several labels an image.

    Args:
        thresholds: of all tasks, None where an image has one label.
    """
    threshold_of("", any(value is not None for value in thresholds), given)


def read_thresholds(words: Sequence[str], names: Collection[str]) -> tuple[float | None, dict[str, float]]:
    """What `--threshold 0.3 --threshold TASK=0.4` says: of all tasks, and of some of `names`.

    Raises:
        ValueError: another form, a name that is no task's, no probability, or one thing said twice.

    Example:
        >>> read_thresholds(["0.3", "tags=0.4"], ["tags", "kind"])
        (0.3, {'tags': 0.4})
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, value = word.rpartition("=")
        if "=" in word and name not in names:
            raise ValueError(f"--threshold must name one of {len(names)} tasks, got {name!r}{hint(name, list(names))}")
        if name in found:
            raise ValueError(f"--threshold must be given once{' for ' + name if name else ''}, got {word!r} too")
        try:
            found[name] = check_threshold(float(value))
        except ValueError:
            raise ValueError(f"--threshold must be a number in [0, 1], or TASK=NUMBER, got {word!r}") from None
    return found.pop("", None), found
