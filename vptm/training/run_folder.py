"""The folder of a run: the best adapter so far, the state to resume from, and what is known of the run.

Every file is replaced by one rename, at the end of an epoch. The state is written first, as the other files follow from
it; when the last epoch is done `run.json` says what a resume has to know, and the state is for more epochs alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from vptm.data.datasets import ImageDataset
from vptm.data.named_datasets import DATASET_NAMES
from vptm.data.sources import PREFIXES, absolute
from vptm.data.split_list import SPLIT_FILE, SplitList
from vptm.frozen.parts import learns
from vptm.frozen.watch import Watch
from vptm.messages import error_line, one_line
from vptm.models.adapter_saving import FrozenPart, frozen_part, save_compared
from vptm.models.prompted_model import PromptedModel
from vptm.settings import FREE_ON_RESUME, TrainSettings, names
from vptm.training.curves import plot_curves
from vptm.training.facts import environment
from vptm.training.folder_lock import FolderLock
from vptm.training.groups import relative_rate
from vptm.training.ranks import Ranks
from vptm.training.scores import validation_score
from vptm.training.state import STATE_FILE, read_state, write_state
from vptm.training.step import TrainStep
from vptm.weights.adapter_format import CONFIG_FILE, TENSORS_FILE, changed_since, read_adapter_tensors
from vptm.weights.beits import is_timm_name
from vptm.weights.files import WriteError, read_json, weight_hash, write_atomically

METRICS_FILE, CURVES_FILE, CONFUSION_FILE, RUN_FILE = "metrics.csv", "curves.png", "confusion.png", "run.json"
RUN_FILES = (TENSORS_FILE, CONFIG_FILE, STATE_FILE, METRICS_FILE, CURVES_FILE, CONFUSION_FILE, RUN_FILE, SPLIT_FILE)
METRICS = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds")
MULTI_LABEL_METRICS = (*METRICS[:-1], "val_map", "seconds")
_DEFAULTS = {name: getattr(TrainSettings, name, None) for name in names(TrainSettings)} | {"model.multi_label": False}


def run_identity(
    model: PromptedModel, settings: TrainSettings, train: DataLoader[Any], steps: int, labels: np.ndarray | None
) -> dict[str, Any]:
    """What must be as it was for a run to be continued: settings, model, frozen weights, steps of an epoch and training
    labels."""
    return {
        **{name: value for name, value in settings.keywords().items() if name not in FREE_ON_RESUME},
        **{f"model.{name}": value for name, value in model.config.items()},
        "backbone": model.weight_hash(),
        "batches": steps,
        "batch_size": train.batch_size or 0,
        "train labels": hashlib.sha256(labels.tobytes()).hexdigest() if labels is not None else "unknown",
    }


class Run:
    """Progress of one training run, in memory and in its folder.

    Args:
        model: what the run leaves: learned tensors of the best epoch are kept in its types.
        step: trains it, or a copy of it in another type.
        identity: see `run_identity`.
        folder: None keeps the run in memory.

    Attributes:
        epoch: finished epochs.
        best_epoch, best_score, best_state: the epoch that is best so far, its (accuracy, -loss) on the validation
            images, and what was learned then.
        history: one row of `metrics.csv` per finished epoch.
    """

    def __init__(self, model: PromptedModel, step: TrainStep, identity: dict[str, Any], folder: Path | None) -> None:
        self.model, self.masters, self.optimiser, self.average = model, step.masters, step.optimiser, step.average
        self._epochs, self._patience = step.settings.epochs, step.settings.early_stopping
        self.identity, self.folder = identity, folder
        self._lock = FolderLock()
        self._frozen: FrozenPart | None = None
        self._compared: Watch | None = None
        self._adapter_of: str | None = None
        if folder is not None:
            self._compare_frozen()
        self.epoch = self._written = self.best_epoch = 0
        self.best_score: tuple[float, float] | None = None
        self.best_state = self.average.kept()
        self.history: list[dict[str, Any]] = []

    @property
    def stopped(self) -> str | None:
        """Why the run is done before its last epoch, None where it is not."""
        patience = self._patience
        if patience is None or self.epoch == self._epochs or self.epoch - self.best_epoch < patience:
            return None
        if validation_score(self.history[-1]) is None:  # it could have been better
            return None
        return f"no validation of the last {patience} epochs was better"

    @property
    def left(self) -> int:
        """Epochs that are still to be trained."""
        return 0 if self.stopped else self._epochs - self.epoch

    def begin(
        self,
        *,
        resume: bool,
        overwrite: bool,
        images: SplitList | None,
        settings: TrainSettings,
        info: Mapping[str, Any] | None,
    ) -> None:
        """Make the folder ready, and take up where the run in it stopped; no other process may train in it until the
        end of a `with` of this object.

        Raises:
            ValueError: what `prepare_run_folder` refuses, a folder that another process trains in, a run of another
                identity or of other `images`, or a state that does not fit the model.
        """
        if self.folder is None:
            if resume:
                raise ValueError("resume=True needs run_dir, the folder of the run to continue")
            return
        self._lock.take(self.folder)  # before anything in it is looked at, or goes
        is_new = not self.folder.exists()
        state = prepare_run_folder(self.folder, resume=resume, overwrite=overwrite and not is_new)
        self._lock.take(self.folder)
        if state is None:
            facts = {"seed": settings.seed, "arguments": settings.keywords(), **(info or {})}
            if (rate := relative_rate(self.optimiser, settings.lr)) is not None:
                facts["prompt_lr"] = rate
            _write_run_file(self.folder, {**environment(), **facts})
            if images is not None:
                images.write(self.folder)
            self._write()
            return
        grown = self._grown(state)
        if grown and "learned" not in state:
            if not (path := self.folder / STATE_FILE).is_file():
                raise ValueError(f"cannot resume {self.folder} for more epochs: its {STATE_FILE} is gone")
            state = read_state(path)
            self._grown(state)
        _check_images(images, self.folder)
        try:
            self._restore(state)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            where = self.folder / (STATE_FILE if "learned" in state else TENSORS_FILE)
            raise ValueError(f"{where} does not fit the run: {error_line(error, 200)}; use overwrite") from error
        if grown:
            self._extend(grown, settings, info or {})

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def join(self, ranks: Ranks, **options: Any) -> None:
        """`begin` in the first process of several, and its outcome or its error in all: each then holds the same run,
        whose files only the first has."""
        if ranks.count == 1:
            self.begin(**options)
            return
        outcome: Exception | bytes = b""
        if ranks.index == 0:
            try:
                self.begin(**options)
                buffer = io.BytesIO()
                torch.save(self._entries(), buffer)
                outcome = buffer.getvalue()
            except (ValueError, OSError) as error:
                outcome = error
        outcome = ranks.first(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        if ranks.index:
            self._restore(torch.load(io.BytesIO(outcome), map_location="cpu", weights_only=True))

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Keep and write what an epoch reached."""
        score = validation_score(row)
        # without a look at validation images the last epoch is best
        if self.best_score is None or (score is not None and score > self.best_score):
            self.best_epoch, self.best_score, self.best_state = row["epoch"], score, self.average.kept()
        self.epoch, self.history = row["epoch"], [*self.history, row]
        self._write()

    def catch_up(self) -> None:
        """Write an epoch that was finished when Ctrl-C came, and was not yet on disk."""
        if self.epoch > self._written:
            self._write()

    def end(self, *, finished: bool) -> None:
        """Leave the best epoch in the model, and in the folder curves and whether the run is finished."""
        if self.folder is not None and self.history:
            self._compare_frozen()
            if self._frozen is not None and self._frozen.digest != self._adapter_of:
                self._write()
        self.model.load_learned_state_dict(self.best_state)
        self.model.eval()
        if self.folder is None or not self.history:
            return
        plot_curves(self.history, self.folder / CURVES_FILE)
        if finished:
            score = None if self.best_score is None else list(self.best_score)
            facts = {"identity": self.identity, "best_epoch": self.best_epoch, "best_score": score}
            update_run_file(self.folder, finished=facts | {"epochs": self.epoch, "stopped": self.stopped})

    def _grown(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """{name: [value before, value now]} of the settings by which the run is longer than that of `state`; ValueError
        where it is another."""
        grown: dict[str, Any] = {}
        stored, given = state["identity"], self.identity
        if state["version"] == 1:
            given = {**given, "backbone": _first_hash(self.model)}
        elif "learned" not in state:  # from JSON, where tuples are lists
            given = json.loads(json.dumps(given))
        for name, value in given.items():
            # what an older version did not have, it did as the default does now
            before = stored.get(name, _DEFAULTS.get(name))
            if grows(name, before, value):
                grown[name] = [before, value]
            elif before != value:
                raise ValueError(f"cannot resume {self.folder}: {name} was {before!r}, now {value!r}")
        return grown

    def _extend(self, grown: dict[str, Any], settings: TrainSettings, info: Mapping[str, Any]) -> None:
        """Make the run in the folder one that is not finished, of these settings."""
        assert self.folder is not None
        content = _read_run_file(self.folder / RUN_FILE)
        for name in ("finished", "result", "cost"):
            content.pop(name, None)
        content |= {"arguments": settings.keywords()} | {name: info[name] for name in ("settings",) if name in info}
        extended, entry = content.get("extended") or [], {"after_epoch": self.epoch, **grown}
        _write_run_file(self.folder, content | {"extended": [*extended, *([entry] if entry not in extended else [])]})
        self._save_best()  # without what followed the training
        self._write()

    def _restore(self, state: dict[str, Any]) -> None:
        if state.get("frozen") is not None and self._frozen is not None and state["frozen"] != self._frozen.digest:
            raise ValueError("frozen weights were changed while the run went on, which no state holds")
        self._adapter_of = None if self._frozen is None else self._frozen.digest
        own = self.model.learned_state_dict()
        # an adapter also holds what is frozen and differs from the source
        best = state["best"] if "learned" in state else {k: v for k, v in state["best"].items() if k in own}
        self.model.load_learned_state_dict(best)  # first, as it is refused where it does not fit
        if "learned" in state:
            self.masters.load(state["learned"])
            self.optimiser.load_state_dict(state["optimizer"])
            self.average.load(state.get("average"))
            if state.get("scaler"):
                self.masters.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        self.best_score = None if state["best_score"] is None else tuple(state["best_score"])
        self.best_state, self.history = best, state["history"]
        if "learned" in state and self.folder is not None:
            self._write_files()

    def _write(self) -> None:
        if self.folder is None:
            return
        if self._compared is not None and self._compared.changed():  # a callback changed what does not learn
            self._compare_frozen()
        write_state(self.folder / STATE_FILE, self._entries())
        self._write_files()
        self._written = self.epoch

    def _entries(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "epoch": self.epoch,
            "learned": {name: tensor.cpu() for name, tensor in self.masters.learned().items()},
            "optimizer": self.optimiser.state_dict(),
            "scaler": self.masters.scaler.state_dict(),
            "average": self.average.state(),
            "best": self.best_state,
            "best_epoch": self.best_epoch,
            "best_score": None if self.best_score is None else list(self.best_score),
            "history": self.history,
            "frozen": None if self._frozen is None else self._frozen.digest,
        }

    def _write_files(self) -> None:
        assert self.folder is not None and self._frozen is not None
        text = io.StringIO()
        columns = MULTI_LABEL_METRICS if self.model.multi_label else METRICS
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_atomically(self.folder / METRICS_FILE, text.getvalue().encode())
        missing = not (self.folder / TENSORS_FILE).is_file()
        edited = self._frozen.digest != self._adapter_of
        if edited or self.epoch in (0, self.best_epoch) or missing:
            self._save_best()

    def _compare_frozen(self) -> None:
        """Say what an adapter leaves to its source, and look at what does not learn, which a callback may change."""
        frozen = [part for part in (self.model.backbone, self.model.lm_head) if part is not None and not learns(part)]
        modules = [module for part in frozen for module in part.modules()]
        self._compared = Watch(modules, [self.model._buffers]) if modules else None
        found = frozen_part(self.model)
        # a file that went meanwhile says nothing of what was edited before
        if self._frozen is None or found.compared or not self._frozen.compared:
            self._frozen = found

    def _save_best(self) -> None:
        assert self.folder is not None and self._frozen is not None
        current = {name: tensor.clone() for name, tensor in self.masters.learned().items()}
        self.model.load_learned_state_dict(self.best_state)
        try:
            best = None if self.best_score is None else self.best_score[0]
            extra = {"epoch": self.best_epoch, "val_map" if self.model.multi_label else "val_accuracy": best}
            save_compared(self.model, self.folder, self._frozen, extra)
            self._adapter_of = self._frozen.digest
        finally:
            self.masters.load(current)


def check_run_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder that `prepare_run_folder` would, as far as its files' names say; nothing is written.

    Raises:
        ValueError: as there.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other, both were given")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run folder must be a folder, {folder} is a file")
    if resume and not (folder / RUN_FILE).is_file():
        raise ValueError(f"nothing to resume: {folder} has no {RUN_FILE}")
    if not resume and not overwrite and folder.is_dir() and not all(map(_is_leftover, folder.iterdir())):
        raise ValueError(f"run folder {folder} exists and is not empty: pass resume, overwrite or another folder")


def check_writable(folder: Path) -> None:
    """Refuse a run folder that cannot be written, before anything long is done; what is made to try it is gone after.

    Raises:
        ValueError: it cannot be made, or holds no new files.

    Example:
        >>> check_writable(Path("runs/new"))
        >>> Path("runs").exists()
        False
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _make_writable(folder)
        (folder / _PROBE).unlink(missing_ok=True)
    finally:
        for path in missing:
            with suppress(OSError):  # another run may have begun in it
                path.rmdir()


_PROBE = ".probe.tmp"


def _make_writable(folder: Path) -> None:
    """`folder`, with a file in it that leaves with others of its kind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _PROBE).touch()
    except OSError as error:
        raise ValueError(f"run folder {folder} cannot be written: {error.strerror}") from None


def _is_leftover(path: Path) -> bool:
    """Whether a file is what a killed run was about to rename."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def prepare_run_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Make `folder` ready for a run and return the state to resume from, or None for a fresh run.

    Of a finished run the state holds what was best and nothing to train on: neither `learned` nor `optimizer`.

    Raises:
        ValueError: it holds files and neither `resume` nor `overwrite` was given, both were, there is nothing to
            resume, its state is damaged, or it cannot be written. Nothing is deleted then.
    """
    check_run_folder(folder, resume=resume, overwrite=overwrite)
    state = None
    if resume:
        # a kill before the first state was written leaves run.json alone: the run starts again
        state = _finished_state(folder)
        if state is None and (folder / STATE_FILE).is_file():
            state = read_state(folder / STATE_FILE)
    _make_writable(folder)
    try:
        for path in filter(_is_leftover, folder.iterdir()):
            path.unlink(missing_ok=True)
        if overwrite:
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"run folder {folder} cannot be written: {error.strerror}") from None
    return state


def holds_progress(folder: Path) -> bool:
    """Whether a resume of the run in `folder` takes up what was learned, rather than starting again."""
    return (folder / STATE_FILE).is_file() or (
        (folder / RUN_FILE).is_file() and "finished" in _read_run_file(folder / RUN_FILE)
    )


def _finished_state(folder: Path) -> dict[str, Any] | None:
    """What a finished run left, None of a run that is not finished."""
    facts = _read_run_file(folder / RUN_FILE).get("finished")
    if facts is None:
        return None
    try:
        identity, best_epoch, score = facts["identity"], facts["best_epoch"], facts["best_score"]
        epochs = facts.get("epochs", identity["epochs"])  # all of them in files of older versions
        fits = type(epochs) is int and type(best_epoch) is int and 0 <= best_epoch <= epochs <= identity["epochs"]
        fits = fits and (score is None or [type(value) for value in score] == [float, float])
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(f"{folder / RUN_FILE} must say how the finished run ended; use overwrite")
    history = _read_history(folder / METRICS_FILE)
    if len(history) != epochs:
        raise ValueError(f"{folder / METRICS_FILE} must have {epochs} epochs, got {len(history)}; use overwrite")
    best, stated = read_adapter_tensors(folder)
    if damage := changed_since(folder, None, best, stated):
        raise ValueError(f"{damage}; use overwrite")
    found = {"identity": identity, "epoch": len(history), "best": best, "best_epoch": best_epoch, "history": history}
    return {"version": None, **found, "best_score": score}


def grows(name: str, before: Any, now: Any) -> bool:
    """Whether a setting lets a run go on that would be done: more epochs, or longer patience."""
    if type(before) is not int or name not in ("epochs", "early_stopping"):
        return False
    return bool(now is None or now > before)


def _read_history(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        columns = MULTI_LABEL_METRICS if "val_map" in (reader.fieldnames or ()) else METRICS
        return [
            {name: int(row[name]) if name == "epoch" else float(row[name]) if row[name] else None for name in columns}
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} must be the metrics of a run: {error_line(error)}; use overwrite") from None


def _first_hash(model: PromptedModel) -> str:
    """The hash that the first version of the state kept of a backbone, whether it trained or not."""
    state = model.state_dict()
    return weight_hash({name: tensor for name, tensor in state.items() if not model._comes_from_no_source(name)})


def listed_images(train: DataLoader[Any], val: DataLoader[Any] | None) -> SplitList | None:
    """The images of the loaders whose data sets name theirs, None where none does."""
    datasets = {"train": train.dataset, "val": None if val is None else val.dataset}
    parts = {split: dataset for split, dataset in datasets.items() if isinstance(dataset, ImageDataset)}
    return SplitList.of(parts) if parts else None


def _check_images(images: SplitList | None, folder: Path) -> None:
    stored = SplitList.read(folder)
    if images is not None and stored is not None and (other := stored.difference(images)):
        raise ValueError(f"cannot resume {folder}: {other}")


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run folder's `run.json`.

    Raises:
        ValueError: no run folder, or a file whose settings or result are not what `vptm train` writes.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no {RUN_FILE}")
    content = read_json(path)
    for name in ("settings", "result"):
        if not isinstance(content.get(name) or {}, dict):
            raise ValueError(f"{path} must have {name} as an object, got {content[name]!r}")
    test = (content.get("result") or {}).get("test")
    if test is not None:
        quality = "map" if isinstance(test, dict) and "map" in test else "accuracy"
        facts = (test.get(quality), test.get("loss"), test.get("n")) if isinstance(test, dict) else (None,)
        if any(isinstance(fact, bool) or not isinstance(fact, int | float) for fact in facts):
            raise ValueError(f"{path} must have result.test with {quality}, loss and n, got {test!r}")
    return content


def located(option: str, source: str) -> str:
    """A path as an absolute one, so that a run can be used from any folder; a name as it is.

    option: "model" or "data", which says what names there are.

    Raises:
        ValueError: a name that is a path here, too.
    """
    is_data = option == "data"
    if not os.path.exists(source):
        return absolute(source) if is_data else source
    data_name = source in DATASET_NAMES or source.startswith(PREFIXES)
    is_name = data_name if is_data else source == "builtin" or is_timm_name(source)
    if is_name:
        raise ValueError(
            f"--{option} {source} is a name that vptm knows and {os.path.abspath(source)}: pass ./{source} for "
            "that one, or run in another folder"
        )
    return str(Path(source).resolve())


def recorded_data(folder: Path) -> str | None:
    """The data that a run was trained on, None where the folder does not say.

    Raises:
        ValueError: a damaged `run.json`.
    """
    if not (folder / RUN_FILE).is_file():
        return None
    settings = read_run(folder).get("settings")
    data = settings.get("data") if isinstance(settings, dict) else None
    if data is not None and not isinstance(data, str):
        raise ValueError(f"{folder / RUN_FILE} must record its data as text, got {one_line(data)}")
    return data


def update_run_file(folder: Path, **facts: Any) -> None:
    """Add facts, such as the test result, to a run's `run.json`."""
    path = folder / RUN_FILE
    if not path.is_file():
        raise WriteError(f"{path} cannot be written, the run folder is gone: No such file or directory")
    _write_run_file(folder, {**_read_run_file(path), **facts})


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be the JSON of a run: {error_line(error)}; use overwrite") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}; use overwrite")
    return content


def _write_run_file(folder: Path, content: dict[str, Any]) -> None:
    write_atomically(folder / RUN_FILE, (json.dumps(content, indent=2) + "\n").encode())
