"""Predictions as rows of a file that is written while they are made, and continued where it ends."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import IO, Any

from vptm.messages import one_line
from vptm.serving.predict import Prediction
from vptm.settings import RowFormat
from vptm.weights.files import WriteError

_COLUMNS = ("path", "label", "score", "top5")


def columns(several: bool) -> tuple[str, ...]:
    """Names of what a row holds; with several tasks, which one speaks."""
    return ("path", "task", *_COLUMNS[1:]) if several else _COLUMNS


def row(prediction: Prediction, form: RowFormat) -> str:
    """One line: score is the probability of the label, top5 a list of [label, score] pairs, best first. Where no label
    of a multi-label model has the probability that was asked for, label and score are empty."""
    label, score = prediction.top[0] if prediction.top else (None, None)
    pairs = [[name, round(value, 6)] for name, value in prediction.top]
    own = {} if prediction.task is None else {"task": prediction.task}
    if form == "jsonl":
        facts = {
            "path": str(prediction.path),
            **own,
            "label": label,
            "score": None if score is None else round(score, 6),
            "top5": pairs,
        }
        return json.dumps(facts, ensure_ascii=False) + "\n"
    best = ("", "") if score is None else (label, f"{score:.6f}")
    cells = [str(prediction.path), *own.values(), *best, json.dumps(pairs, ensure_ascii=False)]
    return _csv(cells)


def header(several: bool, form: RowFormat) -> str:
    """What stands before the first row."""
    return _csv(columns(several)) if form == "csv" else ""


def _csv(cells: Any) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def continued(path: Path, form: RowFormat, several: bool) -> tuple[IO[str], set[tuple[str, str | None]]]:
    """`path` opened at the end of its last whole row, and the (path, task) that its rows have; a file that is not there
    is begun.

    Raises:
        ValueError: a file of other columns or of another format.
        WriteError: it cannot be written.
    """
    done: set[tuple[str, str | None]] = set()
    try:
        stream = path.open("r+b") if path.exists() else path.open("x+b")
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error
    whole = number = 0
    pending = b""
    expected = header(several, form).encode()
    for line in stream:
        pending += line
        # a row ends where every quote is closed; one that a kill cut off does not end at all
        if not line.endswith(b"\n") or (form == "csv" and pending.count(b'"') % 2):
            continue
        if number or form == "jsonl":
            done.add(_key(path, pending, form, several))
        elif pending != expected:
            stream.close()
            found = one_line(pending.decode(errors="replace"), 100)
            raise ValueError(f"{path} must begin with {expected.decode().strip()!r}, got {found!r}")
        number += 1
        whole += len(pending)
        pending = b""
    stream.truncate(whole)
    stream.seek(whole)
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
    if whole == 0:
        text.write(expected.decode())
    return text, done


def _key(path: Path, line: bytes, form: RowFormat, several: bool) -> tuple[str, str | None]:
    try:
        text = line.decode()
        if form == "jsonl":
            found = json.loads(text)
            key = found["path"], found.get("task")
        else:
            cells = dict(zip(columns(several), next(csv.reader(io.StringIO(text, newline="")), []), strict=True))
            key = cells["path"], cells.get("task")
        if isinstance(key[0], str) and (key[1] is not None) == several:
            return key
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} must hold predictions as {form}, got {one_line(line.decode(errors='replace'), 100)!r}")
