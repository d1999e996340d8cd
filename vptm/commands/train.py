"""`vptm train`."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any

import typer

from vptm.commands.options import takes
from vptm.settings import FREE_ON_RESUME, PROMPT_LOCATION, RunSettings, option_name, option_value, train_options
from vptm.terminal import say


@takes(train_options())
def train(
    ctx: typer.Context,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; the next free runs/DATA-N by default.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out with its own arguments.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    synthetic: Annotated[
        bool,
        typer.Option(
            "--synthetic", help="Only measure whether reading pictures limits the speed: with synthetic ones, too."
        ),
    ] = False,
    prompt_location: Annotated[str | None, typer.Option(hidden=True)] = None,
    **options: Any,
) -> None:
    """Learn labels from a few images.

    Writes a run folder and prints the test accuracy. The epoch best on validation images is kept; test images are read
    once, at the end. The run folder holds the adapter (adapter_model.safetensors, adapter_config.json), metrics.csv,
    curves.png, confusion.png (of the test images), run.json, split.csv (name and SHA-256 of every image used) and the
    state to resume from. Data that moved is given again: --resume --out RUN --data NEW.

    \b
    Examples:
      vptm train
      vptm train --data photos/ --model beitv2_base_patch16_224_pt1k.pth --shots 16 --out runs/photos
      vptm train --resume --out runs/photos
    """
    if resume and out is None:
        raise ValueError("--resume needs --out, the run folder to continue")
    if synthetic and (resume or overwrite or out is not None):
        raise ValueError("--synthetic writes no run: leave out --out, --resume and --overwrite")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if prompt_location is not None:
        say(f"vptm: DeprecationWarning: {PROMPT_LOCATION}")
    given = _given(ctx)
    values = _located(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        settings = _resumed(out, values, given) if out is not None and resume else _fresh(values, given)
    for warning in caught:
        say(f"vptm: {warning.category.__name__}: {warning.message}")
    if synthetic:
        from vptm.methods.feeding import measure_feeding

        print("\n".join(measure_feeding(settings, report=say).lines()))
        return
    from vptm.methods.run import resume_command, train_run
    from vptm.training.ranks import is_first

    run = train_run(
        settings, out, resume=resume, overwrite=overwrite, command=shlex.join(["vptm", *ctx.obj]), report=say
    )
    if not is_first():  # of several processes
        return
    if run.stopped is not None:
        say(f"vptm: interrupted {run.stopped}, continue with: {resume_command(run.folder)}")
        raise typer.Exit(1)
    if run.val_map is not None:
        print(f"validation mAP       {run.val_map:.4f} at epoch {run.best_epoch}")
    if run.best_val_accuracy is not None:
        print(f"validation accuracy  {run.best_val_accuracy:.2%} at epoch {run.best_epoch}")
    if losses := run.prototype_losses:
        after = "" if run.val_accuracy is None else f", validation accuracy then {run.val_accuracy:.2%}"
        steps = settings.prototype_steps
        print(f"prototypes           ProtoVerb loss {losses[0]:.4f}, after {steps} steps {losses[-1]:.4f}{after}")
    if run.test is not None:
        quality = (
            f"accuracy        {run.test['accuracy']:.2%}"
            if "accuracy" in run.test
            else (f"mAP             {run.test['map']:.4f}")
        )
        print(f"test {quality} of {run.test['n']} images, {test_line(run.test)}")
    drawn = "curves.png" if "confusion" not in (run.test or ()) else "curves.png, confusion.png"
    print(f"run folder           {run.folder} (adapter, run.json, split.csv, metrics.csv, {drawn})")
    print(f"next                 vptm predict {shlex.quote(str(run.folder))} IMAGE.png")


def test_line(scores: Mapping[str, Any]) -> str:
    """What is said of test images beside accuracy; a run of an older version kept fewer numbers."""
    kinds = {"loss": ".4f", "balanced_accuracy": ".2%", "macro_f1": ".4f", "micro_f1": ".4f", "ece": ".4f"}
    shown = {
        "balanced_accuracy": "balanced",
        "macro_f1": "macro-F1",
        "micro_f1": "micro-F1",
        "ece": "calibration error",
    }
    return ", ".join(f"{shown.get(name, name)} {scores[name]:{kind}}" for name, kind in kinds.items() if name in scores)


def train_settings(arguments: Sequence[str]) -> tuple[RunSettings, set[str]]:
    """What a fresh `vptm train ARGUMENTS` trains with, its recipe included, and the names of the options given.

    Raises:
        ValueError: an option that `train` does not have or whose value is of another type, or a wrong recipe.
    """
    single = typer.Typer(add_completion=False)
    single.command()(train)
    try:
        ctx: Any = typer.main.get_command(single).make_context("train", list(arguments))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise ValueError(error.format_message()) from None
    given = _given(ctx)
    return _fresh(_located({name: ctx.params[name] for name in train_options()}), given), given


def _given(ctx: typer.Context) -> set[str]:
    return {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def _located(options: Mapping[str, Any]) -> dict[str, Any]:
    from vptm.training.run_folder import located

    found = {name: located(name, options[name]) for name in ("model", "data")}
    if options["codebook"] is not None:
        found["codebook"] = str(Path(options["codebook"]).expanduser().resolve())
    return {**options, **found}


def _fresh(values: Mapping[str, Any], given: AbstractSet[str]) -> RunSettings:
    from vptm.recipes.recipe import with_recipe

    said = {name: value for name, value in values.items() if name in given or value is not None}
    return _settings(with_recipe(said, given))


def _settings(values: Mapping[str, Any]) -> RunSettings:
    from vptm.models.opening import kind_of

    return RunSettings.from_options(values, kind_of(*map(values.get, ("model", "readout", "architecture"))))


def _resumed(out: Path, values: Mapping[str, Any], given: AbstractSet[str]) -> RunSettings:
    from vptm.data.split_list import SPLIT_FILE
    from vptm.training.run_folder import grows, read_run

    stored = read_run(out).get("settings")
    if not isinstance(stored, dict):
        raise ValueError(f"{out} was not made by `vptm train`, it cannot be resumed by it")
    known = {name: value for name, value in stored.items() if name in values}
    moved = {"data"} if (out / SPLIT_FILE).is_file() else set()  # compared with the list, image by image
    for name in sorted(values.keys() & given - FREE_ON_RESUME - moved):
        if known.get(name) != values[name] and not grows(name, known.get(name), values[name]):
            raise ValueError(
                f"{option_name(name)} {option_value(values[name])} differs from the run's "
                f"{option_value(known.get(name))}: leave it out to resume"
            )
    return _settings({**values, **{name: value for name, value in known.items() if name not in given}})
