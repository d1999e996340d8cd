"""What messages about arguments and files have in common: one line, of a length that fits a terminal."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Sequence
from itertools import islice

_LONGEST = 500
WITH_PATHS = 2000
"""Characters of a line that may hold two paths of a file system."""


def one_of(argument: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is in `allowed`, naming the argument, what it takes, and the nearest name.

    Example:
        >>> one_of("impl", "tritn", ("auto", "triton"))
        Traceback (most recent call last):
        ValueError: impl must be one of auto, triton, got 'tritn', did you mean 'triton'?
    """
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}{hint(value, allowed)}")


def hint(value: object, allowed: Sequence[str]) -> str:
    """The end of a message about an unknown name: ", did you mean 'x'?", or nothing where no name is near.

    A beginning of a name goes before other near names, where it is at least a third of it.
    """
    text = str(value)
    longer = [name for name in allowed if len(text) > 1 and name.startswith(text)]
    near = difflib.get_close_matches(text, longer, n=1, cutoff=0.5) or difflib.get_close_matches(text, allowed, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def one_line(text: object, longest: int = _LONGEST) -> str:
    """`text` on one line of at most `longest` characters, its middle left out where it has more.

    What a file says about itself may be of any length, and may hold what moves a terminal's cursor.

    Example:
        >>> one_line("no  such\\nfile")
        'no such file'
    """
    words = " ".join(str(text).split())
    if len(words) > longest:
        head = longest * 2 // 3
        words = f"{words[:head]} … {words[len(words) - (longest - head - 3) :]}"
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in words)


def number(argument: str, value: object) -> float:
    """`value` as a float; TypeError naming the argument where it is no number, ValueError where no float holds it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        bits = int(value).bit_length()
        raise ValueError(f"{argument} must be a number that a float holds, got an integer of {bits} bits") from None


_LARGEST = 3.4028234663852886e38
"""Of float32, in which everything learns."""

_RANGES: dict[str, Callable[[float], bool]] = {
    "finite": lambda value: abs(value) <= _LARGEST,
    "finite and > 0": lambda value: 0 < value < math.inf,
    "finite and >= 0": lambda value: 0 <= value < math.inf,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1)": lambda value: 0 < value < 1,
}


def check_range(argument: str, value: object, allowed: str, *, optional: str | None = None) -> None:
    """TypeError unless `value` is a number, ValueError unless it is what `allowed` says, a range in words.

    None is taken where `optional` says what it means, as "or None".

    Example:
        >>> check_range("clip_norm", float("nan"), "finite and > 0", optional="or None")
        Traceback (most recent call last):
        ValueError: clip_norm must be finite and > 0, or None, got nan
    """
    if optional is not None and value is None:
        return
    if not _RANGES[allowed](number(argument, value)):
        raise ValueError(f"{argument} must be {allowed}{f', {optional}' if optional else ''}, got {value!r}")


def check_integer(argument: str, value: object, lowest: int, *, optional: bool = False) -> None:
    """ValueError unless `value` is an integer >= `lowest`, or None where it is `optional`.

    Example:
        >>> check_integer("prompt_length", -1, 0)
        Traceback (most recent call last):
        ValueError: prompt_length must be an integer >= 0, got -1
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{argument} must be an integer >= {lowest}{' or None' if optional else ''}, got {value!r}")


def error_line(error: BaseException, longest: int = _LONGEST, *, first: bool = False) -> str:
    """What an error says, on one line; the name of its class where it says nothing.

    Args:
        error: of any library.
        longest: characters, see `one_line`.
        first: only the first line, where a page of advice follows.

    Example:
        >>> error_line(KeyError()), error_line(OSError("no such host\\nsee the manual"), first=True)
        ('KeyError', 'no such host')
    """
    text = str(error).strip()
    return one_line(text.splitlines()[0] if first and text else text, longest) or type(error).__name__


def listed(names: Collection[str], shown: int = 3) -> str:
    """The first of `names`, each on one line, and how many there are beside; "none" where there are none.

    Example:
        >>> listed(["a", "b", "c", "d", "e"]), listed([])
        ('a, b, c and 2 more', 'none')
    """
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(one_line(name) for name in islice(names, shown)) or "none") + rest
