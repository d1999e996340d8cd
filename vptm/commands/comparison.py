"""The runs of a comparison: each recipe trained under one budget over several seeds.

Every run is a `vptm train` of its own in a process of its own, so one that fails or runs out of memory takes nothing
else with it, and a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vptm.commands.comparison_table import MethodResult, write_results
from vptm.commands.train import train_settings
from vptm.data.datasets import ImageData
from vptm.data.division import few_shot
from vptm.data.sources import load_data
from vptm.data.split_list import SplitList
from vptm.methods.run import checked_place
from vptm.recipes.recipe import Recipe, read_recipe
from vptm.settings import FREE_ON_RESUME, RunSettings, option_name, option_value, parse_shots, train_options
from vptm.training.run_folder import RUN_FILE, prepare_run_folder
from vptm.training.state import STATE_FILE

# options of every run that `compare` sets itself
OWN = ("data", "epochs", "out", "overwrite", "recipe", "resume", "seed", "shots", "test")
# what may differ between runs of one comparison; the recipe's name says less than its settings
FREE = FREE_ON_RESUME | {"recipe"}
SEARCH_SEED = 1000  # of runs that choose settings, none of the seeds that are reported
Launch = Callable[[list[str]], "tuple[int, str]"]


def launch(arguments: list[str]) -> tuple[int, str]:
    """Run `vptm ARGUMENTS` in a process of its own; its exit code and what it wrote to stderr."""
    # the package this process runs, also where it runs from a source tree
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "vptm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    return done.returncode, done.stderr


def compare(
    methods: Sequence[str],
    out: str | Path,
    *,
    data: str = "builtin",
    seeds: int = 3,
    epochs: int = 20,
    shots: str = "16",
    arguments: Sequence[str] = (),
    search: bool = False,
    jobs: int = 1,
    report: Callable[[str], None] = lambda line: None,
    launch: Launch = launch,
) -> list[MethodResult]:
    """Train every method with its recipe and test each run once.

    All methods see the same images of a seed for the same number of epochs; a recipe's warm-up keeps its share of
    them. The epoch is chosen on validation images, and with `search` also the recipe's `search` settings, by runs of a
    seed that is not reported and that never see a test image. A finished run in `out` is kept, an unfinished one
    resumed, or started anew where its settings differ or its state is damaged.

    Args:
        methods: recipe names, aliases or .yaml files.
        out: folder for the runs (`out/METHOD/seed-K`), `comparison.csv`, `comparison.json` and `comparison.png`, which
            are written again after every run.
        data, shots: as in `vptm train`.
        seeds: number of runs of each method, seeds 0, 1, ...
        epochs: passes over the training images, for every method.
        arguments: further options of `vptm train`, for every run; none that other arguments stand for.
        search: choose settings on validation images first.
        jobs: runs at a time.
        report: called with a line of text after every run.
        launch: runs `vptm` with a list of arguments; gives (exit code, stderr).

    Returns:
        One result per method, in the order given.

    Raises:
        ValueError: before any run: an unknown or repeated method or model, a number out of range, an option or recipe
            that `vptm train` refuses, data without test images, with too few training images, or with `search` without
            validation images, an `out` that is no folder, or finished runs in it made with other settings.
        FileNotFoundError: data, weights or a .yaml file that does not exist.
    """
    recipes = [read_recipe(method) for method in methods]
    names = [recipe.name for recipe in recipes]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods must be one or more different recipes, got {', '.join(methods) or 'none'}")
    for argument, value in (("seeds", seeds), ("epochs", epochs), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{argument} must be >= 1, got {value}")
    _, given = train_settings(arguments)
    if taken := sorted(given.intersection(OWN)):
        raise ValueError(f"arguments must leave --{taken[0]} to compare, got {' '.join(arguments)}")
    out = Path(out)
    common = ["--data", data, "--shots", shots, "--epochs", str(epochs), *arguments]
    results = [MethodResult(name) for name in names]
    methods_run = list(zip(methods, recipes, results))

    def options_of(method: str, extra: dict[str, Any], seed: int | None = None) -> list[str]:
        """Of a run that is tested, or without a seed of one that chooses settings."""
        chosen = [text for name, value in extra.items() for text in _as_option(name, value)]
        last = ["--seed", str(SEARCH_SEED), "--no-test"] if seed is None else ["--seed", str(seed), "--test"]
        return [*common, "--recipe", method, *chosen, *last]

    for method in methods:
        checked_place(train_settings(options_of(method, {}, 0))[0])
    _check_data(train_settings(common)[0], search)
    for method, recipe, result in methods_run:
        searched = recipe.search if search else {}
        for name, values in searched.items():
            for value in values:
                try:
                    train_settings(options_of(method, {name: value}))
                except ValueError as error:
                    raise ValueError(f"recipe {method}: search.{name}: {error}") from None
        for seed in range(seeds):
            settings, _ = train_settings(options_of(method, {}, seed))
            _finished(out / result.name / f"seed-{seed}", settings, searched)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if out.is_file() else error.strerror
        raise ValueError(f"out must be a folder, got {out}: {why}") from None

    def run(result: MethodResult, folder: str, options: list[str]) -> dict[str, Any] | None:
        where = out / result.name / folder
        settings, _ = train_settings(options)
        facts = _finished(where, settings)
        if facts is None:
            resumed = ["--resume", "--data", data]  # which may have moved
            start = resumed if _can_resume(where, settings) else ["--overwrite", *options]
            code, errors = launch(["train", "--out", str(where), *start])
            facts = _finished(where, settings) if code == 0 else None
            if facts is None:
                result.failures[folder] = _reason(code, errors)
                report(f"{result.name} {folder}: failed, {result.failures[folder]}")
            else:
                (where / STATE_FILE).unlink(missing_ok=True)  # of four adapters' size, for a longer run
        return facts

    def task(method: str, recipe: Recipe, result: MethodResult, seed: int) -> None:
        facts = run(result, f"seed-{seed}", options_of(method, result.chosen, seed))
        if facts is not None:
            result.runs[seed] = facts
            accuracy = facts["result"]["test"]["accuracy"]
            report(f"{result.name} seed {seed}: test accuracy {accuracy:.2%}")
        write_results(results, out)

    def choose(method: str, recipe: Recipe, result: MethodResult) -> None:
        def trial(folder: str, extra: dict[str, Any]) -> dict[str, Any] | None:
            return run(result, folder, options_of(method, extra))

        result.chosen = _search(recipe, trial)
        report(f"{result.name}: chose {result.chosen_text()}")

    with ThreadPoolExecutor(jobs) as pool:
        if search:
            list(pool.map(lambda method: choose(*method), methods_run))
        # seed by seed, so a comparison that is stopped has as many runs of every method
        list(pool.map(lambda job: task(*job), [(*method, seed) for seed in range(seeds) for method in methods_run]))
    return results


def _as_option(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", option_value(value)]


def _check_data(settings: RunSettings, search: bool) -> None:
    """Refuse data that every run would refuse, or that leaves nothing to test or to choose on."""
    data = _load(settings)
    if not data.test:
        raise ValueError(f"data must have test images to compare on, {data.name} has none")
    if search and not data.val:
        raise ValueError(f"data must have validation images for search, {data.name} has none")
    if (shots := parse_shots(settings.shots)) is not None:
        few_shot(data.train, shots)


def _load(settings: RunSettings) -> ImageData:
    return load_data(settings.data, on_bad_image=settings.on_bad_image, **settings.reading())


def _search(recipe: Recipe, run: Callable[[str, dict[str, Any]], dict[str, Any] | None]) -> dict[str, Any]:
    """The values best on validation images, one setting after the other."""
    chosen: dict[str, Any] = {}
    for name, values in recipe.search.items():
        scores = {}
        for number, value in enumerate(values):
            facts = run(f"search-{name}-{number}", {**chosen, name: value})
            if facts is not None and facts["result"]["val_accuracy"] is not None:
                scores[number] = facts["result"]["val_accuracy"]
        if scores:
            chosen[name] = values[max(scores, key=lambda number: (scores[number], -number))]
    return chosen


def _read(folder: Path) -> dict[str, Any] | None:
    """A run's `run.json`, None where there is none that `vptm train` wrote."""
    try:
        facts = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) and isinstance(facts.get("settings"), dict) else None


def _other_setting(folder: Path, settings: RunSettings, searched: Collection[str] = ()) -> str | None:
    """What of `settings` the run in a folder was trained without, as "--lr 0.1, not 0.2"."""
    facts = _read(folder) or {"settings": {}}
    # a run of an older version was trained with the default of an option that came later
    stored = {name: option.default for name, option in train_options().items()} | facts["settings"]
    for name, value in settings.options().items():
        if stored[name] != value and name not in FREE and name not in searched:
            if name == "data" and _moved(folder, stored[name], settings):
                continue
            return f"{option_name(name)} {option_value(stored[name])}, not {option_value(value)}"
    return None


def _moved(folder: Path, old: str, settings: RunSettings) -> bool:
    """Whether the data is no longer where the run had it, and is what the run had where it is now."""
    listed = SplitList.read(folder)
    return listed is not None and not Path(old).exists() and listed.is_within(_load(settings).parts())


def _finished(folder: Path, settings: RunSettings, searched: Collection[str] = ()) -> dict[str, Any] | None:
    """What a finished run recorded, None where there is none; one of other settings, save `searched`, is refused."""
    facts = _read(folder)
    if facts is None or not facts.get("result") or "cost" not in facts:
        return None
    if settings.test and not facts["result"].get("test"):
        return None
    if other := _other_setting(folder, settings, searched):
        raise ValueError(f"{folder} was trained with {other}: choose another folder")
    return facts


def _can_resume(folder: Path, settings: RunSettings) -> bool:
    if _read(folder) is None or _other_setting(folder, settings):
        return False
    try:
        prepare_run_folder(folder, resume=True)
    except ValueError:
        return False
    return True


def _reason(code: int, errors: str) -> str:
    if code <= 0:
        return f"killed by signal {-code}" if code else "ended without a result"
    lines = [line for line in errors.splitlines() if line.strip()]
    said = [line.removeprefix("vptm: ") for line in lines if line.startswith("vptm: ")]
    return (said or lines or [f"exit code {code}"])[-1]
