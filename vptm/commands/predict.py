"""`vptm predict`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, get_args

import typer

from vptm.commands.options import Backbone, Compile, CudaGraph, Device, Impl, PrecisionOption, Run, Thresholds, choice
from vptm.settings import EVALUATION_BATCH, THRESHOLD, OnBadImage, RowFormat
from vptm.terminal import SECONDS_PER_LINE, progress_bar, say

if TYPE_CHECKING:
    from vptm.models.prompted_model import PromptedModel
    from vptm.serving.predict import Prediction, Unreadable
    from vptm.serving.task_bank import TaskBank

_SHOWN = 20  # unreadable pictures that are named at the end


def predict(
    run: Run,
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders of them, patterns in quotes, or - for a list on stdin.")
    ],
    adapter: Annotated[
        list[Path] | None, typer.Option(help="A further run or adapter folder on the same backbone; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File of the rows; stdout by default.", show_default=False)] = None,
    form: Annotated[
        str | None,
        choice(get_args(RowFormat), "By default csv, or what --out ends in.", "--format", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the rows of --out.")] = False,
    top: Annotated[
        int | None,
        typer.Option(help="Labels of a picture in top5: 5, and of a multi-label run all.", show_default=False),
    ] = None,
    threshold: Thresholds = None,
    on_bad_image: Annotated[
        str, choice(get_args(OnBadImage), "With files that cannot be read: fail when all others are done, or succeed.")
    ] = "error",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = EVALUATION_BATCH,
    source: Backbone = None,
    device: Device = "auto",
    impl: Impl = "auto",
    precision: PrecisionOption = "auto",
    compile: Compile = False,
    cuda_graph: CudaGraph = False,
) -> None:
    """Name what pictures show.

    Rows with path, label, score and top5, written as they are made: score is the softmax probability of the label; top5
    is a JSON list of [label, score] pairs, best first. Of a multi-label run scores are sigmoids, and all labels with
    --threshold or more are named, which may be none. With --adapter every picture has a row of each, of one label or of
    several, and a column task says whose, by the folder's name. Pictures that cannot be read are named at the end, and
    make the command fail unless --on-bad-image skip. After a kill, the same command with --resume leaves out what --out
    has. Of several processes that torchrun starts each takes a part of the pictures, and writes a file:
    names-0-of-2.csv for names.csv.

    \b
    Example:
      vptm predict runs/builtin-1 shoe.png wardrobe/ > names.csv
      find photos -name '*.jpg' | vptm predict runs/photos - --out names.jsonl --resume
    """
    from vptm.data.decoding import BadImageError
    from vptm.messages import one_of
    from vptm.models.opening import load_adapter
    from vptm.serving.predict import picture_files, predictions
    from vptm.serving.task_bank import TaskBank
    from vptm.serving.thresholds import check_used, read_thresholds
    from vptm.settings import RunSettings, choices
    from vptm.training.devices import device_of
    from vptm.training.precision import dtype_of, resolve_precision
    from vptm.training.ranks import first_reports, local_device, rank_and_count

    one_of("--on-bad-image", on_bad_image, choices(RunSettings, "on_bad_image"))
    by_name = "jsonl" if out is not None and out.suffix in (".jsonl", ".ndjson") else "csv"
    one_of("--format", form or by_name, ("csv", "jsonl"))
    chosen: RowFormat = "jsonl" if (form or by_name) == "jsonl" else "csv"
    if resume and out is None:
        raise ValueError("--resume needs --out, the file to continue")
    rank, count = rank_and_count()
    if count > 1:
        if out is None or "-" in images:
            given = "- for stdin" if "-" in images else "no --out"
            raise ValueError(f"{count} processes need --out, and pictures that each of them can list, got {given}")
        out = out.with_name(f"{out.stem}-{rank}-of-{count}{out.suffix}")
    if out is not None and out.exists() and not resume:
        raise ValueError(f"--out must be a new file, {out} is there: continue it with --resume, or take another")
    listed = picture_files([image for image in images if image != "-"], report=first_reports(say))
    listed = listed[rank::count]
    stdin = (Path(line) for line in map(str.strip, sys.stdin) if line) if "-" in images else iter(())
    names = _names([run, *(adapter or [])])
    least, own = read_thresholds(threshold or [], names)
    place = local_device(device_of(device))
    model = load_adapter(run, source=source, impl=impl).to(place)
    tasks: PromptedModel | TaskBank = model
    if adapter:
        kind = dtype_of(resolve_precision(precision, place, training=False))
        tasks = TaskBank(model, dtype=kind, impl=impl, threshold=THRESHOLD if least is None else least)
        folders: list[PromptedModel | Path] = [model, *adapter]
        for name, task in zip(names, folders):
            tasks.add(name, task, threshold=own.get(name))
        check_used((tasks.info(name).threshold for name in names), least)
    found = predictions(
        tasks,
        (missing := _Missing(chain(listed, stdin))),
        top=top,
        threshold=None if adapter else own.get(names[0], least),
        batch_size=batch_size,
        precision=precision,
        compile=compile,
        cuda_graph=cuda_graph,
    )
    counted = None if "-" in images else len(listed)
    bad, written = _write(found, missing, names if adapter else [None], counted, out, chosen)
    for each in bad[:_SHOWN]:
        say(f"skipped: {each.reason}")
    if len(bad) > _SHOWN:
        say(f"skipped: {len(bad) - _SHOWN} more that cannot be read")
    if bad and not written:
        raise BadImageError(f"none of {len(bad)} images could be read; the first: {bad[0].reason}")
    if bad and on_bad_image == "error":
        raise BadImageError(
            f"{len(bad)} images could not be read, {bad[0].path} the first; rows of the others are there"
        )


def _names(folders: list[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--adapter folders must differ in name, which their rows have, got {name!r} twice")
    return names


class _Missing:
    """Those of some files that have no row for every task yet; `had` counts the others."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = files
        self.done: set[tuple[str, str | None]] = set()
        self.names: list[str] | list[None] = [None]
        self.had = 0

    def __iter__(self) -> Iterator[Path]:
        for file in self._files:
            if all((str(file), name) in self.done for name in self.names):
                self.had += 1
            else:
                yield file


def _write(
    found: Iterable[Prediction | Unreadable],
    missing: _Missing,
    names: list[str] | list[None],
    total: int | None,
    out: Path | None,
    form: RowFormat,
) -> tuple[list[Unreadable], int]:
    """Unreadable pictures, and how many have rows now, earlier ones too."""
    from vptm.serving.predict import Prediction
    from vptm.serving.prediction_file import continued, header, row

    several = len(names) > 1
    stream: IO[str] | None = None
    missing.names = names
    if out is not None:
        stream, missing.done = continued(out, form, several)
    bad: list[Unreadable] = []
    pace = _Pace(total)
    with progress_bar() as bar:
        task = bar.add_task("predicting", total=total, note="")
        for each in found:
            if isinstance(each, Prediction):
                if stream is None:  # nothing is printed before there is a row
                    stream = sys.stdout
                    stream.write(header(several, form))
                if (str(each.path), each.task) not in missing.done:
                    stream.write(row(each, form))
                    stream.flush()
                pace.now += each.task == names[-1]
            else:
                bad.append(each)
                pace.now += 1
            pace.had = missing.had
            if not bar.disable:
                bar.update(task, completed=pace.had + pace.now, note=pace.note())
            elif line := pace.line():
                bar.console.print(line)
    if out is not None and stream is not None:
        stream.close()
    return bad, missing.had + pace.now - len(bad)


class _Pace:
    """How many pictures are done, now and `had` before, how fast, and how long the rest takes."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.had = self.now = 0
        self._started = self._spoke = time.perf_counter()

    def note(self) -> str:
        rate = self.now / max(time.perf_counter() - self._started, 1e-9)
        if self.total is None or not rate:
            return f"{rate:.3g} images/s"
        left = (self.total - self.had - self.now) / rate
        return f"{rate:.3g} images/s, {timedelta(seconds=round(left))} left"

    def line(self) -> str | None:
        """What to say without a terminal, twice a minute."""
        now = time.perf_counter()
        if now - self._spoke < SECONDS_PER_LINE:
            return None
        self._spoke = now
        return f"{self.had + self.now}{'' if self.total is None else f'/{self.total}'} images, {self.note()}"
