"""The `vptm` command. Only typer is imported here; everything else waits until a command runs."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from vptm.data.datasets import ImageData, ImageDataset
    from vptm.data.split_list import SplitList
    from vptm.models.prompted_model import PromptedModel

DEMONSTRATION = "built for 28x28 grey clothing pictures, a demonstration"
EVALUATION_BATCH = 256
_LONGEST = 2000  # characters of an error, two paths of a file system among them
# what a resumed run may change: nothing here alters which function is learned
_FREE_ON_RESUME = {"out", "resume", "overwrite", "device", "workers", "impl"}
_MODEL_ARGUMENTS = (
    "prompt_length",
    "prompt_mode",
    "prompt_location",
    "prompt_dropout",
    "progressive_alpha",
    "readout",
    "mask_mode",
    "train_mask_token",
    "train_lm_head",
    "verbalizer",
    "prototype_dim",
    "token_activation",
    "projection_bias",
    "temperature",
    "extra_bias",
    "img_size",
)
# named so in `vptm.PromptBank`, with what stands for its default there
_PROMPT_OPTIONS = {
    "blocks": ("prompt_blocks", None),
    "after": ("prompt_after", "carry"),
    "shared": ("prompt_shared", False),
    "prompt_dim": ("prompt_dim", None),
    "placement": ("prompt_placement", "prepend"),
    "dropout_per": ("prompt_dropout_per", "sample"),
}
_FIT_ARGUMENTS = (
    "epochs",
    "lr",
    "weight_decay",
    "optimizer",
    "schedule",
    "warmup_epochs",
    "label_smoothing",
    "prompt_weight_decay",
    "head_weight_decay",
    "protoverb_weight",
    "reformation",
    "reformation_temperature",
    "seed",
)

app = typer.Typer(
    name="vptm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 the work failed or was interrupted, 2 bad arguments."""
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


_arguments: list[str] = []


def _run(arguments: list[str]) -> int:
    from vptm.messages import error_line, one_line

    debug = os.environ.get("VPTM_DEBUG") == "1"
    # OpenMP threads that spin while they wait make small models ten times slower where other work shares the cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _arguments[:] = arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a letter that the console lacks must not end the command
    try:
        status = app(args=arguments, prog_name="vptm", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as in `vptm predict | head`
        return 1
    except (KeyboardInterrupt, typer.Abort):
        _say("vptm: interrupted")
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error: its class moved between versions of typer
            if message := error.format_message():
                is_help = type(error).__name__ == "NoArgsIsHelpError"
                _say(f"vptm: {message if is_help else one_line(message, _LONGEST)}")
            return int(getattr(error, "exit_code", 2))
        if debug:
            raise
        _say(f"vptm: {error_line(error, _LONGEST)}")
        return _exit_code(error)


def _exit_code(error: Exception) -> int:
    from vptm.data.datasets import BadImageError

    bad_argument = isinstance(error, (ValueError, TypeError, FileNotFoundError)) and not isinstance(
        error, BadImageError
    )
    return 2 if bad_argument else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _version(shown: bool) -> None:
    if shown:
        from vptm import __version__

        print(f"vptm {__version__}")
        raise typer.Exit


@app.callback()
def _vptm(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Visual prompt learning as masked visual token modelling: teach a frozen BEiT new labels from a few images.

    \b
    vptm train                                     learn ten kinds of clothing on the built-in model
    vptm predict runs/builtin-1 picture.png        name what a picture shows
    vptm explain runs/builtin-1 picture.png        show why

    Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 the work failed or was interrupted,
    2 bad arguments. With VPTM_DEBUG=1 in the environment an error shows its traceback.
    """


OnBadImage = Annotated[
    str,
    typer.Option(
        help="Broken image files among those that are read: error (stop, naming the file) or skip (report and go on)."
    ),
]
Background = Annotated[str, typer.Option(help="Colour under what is transparent in a picture, by name or as #rrggbb.")]
ValueRange = Annotated[
    str | None,
    typer.Option(
        help="LOW,HIGH: darkest and brightest value of pictures of more than 8 bits; by default the file's depth, "
        "which signed, 32-bit and floating-point files lack.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto is a GPU where there is one.")]
Impl = Annotated[str, typer.Option(help="auto, triton, torch or reference.")]
Backbone = Annotated[str | None, typer.Option(help="Backbone weights, where they moved since training.")]
Run = Annotated[Path, typer.Argument(help="Run or adapter folder.")]


@app.command()
def train(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="builtin, a unilm .pth, a .safetensors file, a Hugging Face folder or id, or a timm name."),
    ] = "builtin",
    data: Annotated[
        str,
        typer.Option(
            help="builtin, fashion-mnist, digits, mnist5k, stamps, a folder of class folders, or a .csv of "
            "path,label[,split]."
        ),
    ] = "builtin",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Settings of a published method, by name (any unknown name lists them) or from a .yaml file; "
            "options given here go before it, and --epochs scales its warm-up.",
            show_default=False,
        ),
    ] = None,
    shots: Annotated[str, typer.Option(help="Training images per class, or all.")] = "16",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 40,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 32,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of matrices.")] = 0.1,
    optimizer: Annotated[str, typer.Option(help="A timm optimiser.")] = "adamw",
    schedule: Annotated[str, typer.Option(help="cosine, tanh, none, vpt, spt or provp.")] = "cosine",
    warmup_epochs: Annotated[int, typer.Option(help="Epochs of linear warm-up, part of --epochs.")] = 0,
    prompt_weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay of prompts; none by default.", show_default=False)
    ] = None,
    head_weight_decay: Annotated[
        float | None, typer.Option(help="Of the verbalizer's matrices; --weight-decay by default.", show_default=False)
    ] = None,
    label_smoothing: Annotated[float, typer.Option(help="In [0, 1).")] = 0.0,
    protoverb_weight: Annotated[float, typer.Option(help="Of ProtoVerb's contrast losses in every step.")] = 0.0,
    reformation: Annotated[
        float, typer.Option(help="Of ProVP-Ref's contrast with the features of the frozen model.")
    ] = 0.0,
    reformation_temperature: Annotated[float, typer.Option(help="Of that contrast.")] = 1.0,
    prototype_steps: Annotated[
        int, typer.Option(help="Steps on projection and prototypes alone after training, by ProtoVerb's losses.")
    ] = 0,
    prototype_lr: Annotated[float, typer.Option(help="Learning rate of --prototype-steps.")] = 1e-3,
    augment: Annotated[bool, typer.Option(help="Random shift or crop, and mirror, of training images.")] = True,
    flip: Annotated[
        bool | None, typer.Option(help="Mirror training images; by default not for digits.", show_default=False)
    ] = None,
    prompt_length: Annotated[int, typer.Option(help="Prompts per layer.")] = 10,
    prompt_mode: Annotated[str, typer.Option(help="shallow, deep or progressive.")] = "shallow",
    prompt_init: Annotated[
        str,
        typer.Option(help="uniform, or from tokens of the frozen model (SPT): random, mean, max or kmeans."),
    ] = "uniform",
    init_images: Annotated[
        int | None,
        typer.Option(help="Images such tokens are drawn from; all training images by default.", show_default=False),
    ] = None,
    finetune: Annotated[bool, typer.Option("--finetune", help="Also train every weight of the backbone.")] = False,
    prompt_location: Annotated[str, typer.Option(help="after_cls, after_mask, before_mask or end.")] = "after_cls",
    prompt_dropout: Annotated[float, typer.Option(help="Dropout of prompts.")] = 0.0,
    progressive_alpha: Annotated[float, typer.Option(help="Alpha of progressive prompts.")] = 0.01,
    prompt_blocks: Annotated[
        int | None,
        typer.Option(help="Only the first N blocks have prompts, or the last -N; all by default.", show_default=False),
    ] = None,
    prompt_after: Annotated[
        str, typer.Option(help="What blocks after the first N do with the prompts: carry or drop.")
    ] = "carry",
    prompt_shared: Annotated[bool, typer.Option(help="One prompt for all blocks.")] = False,
    prompt_dim: Annotated[
        int | None, typer.Option(help="Width of prompts that a learned projection maps to tokens.", show_default=False)
    ] = None,
    prompt_placement: Annotated[str, typer.Option(help="prepend, or add to the patch tokens.")] = "prepend",
    prompt_dropout_per: Annotated[str, typer.Option(help="A dropout mask per sample or per batch.")] = "sample",
    readout: Annotated[str, typer.Option(help="mask, cls or mean.")] = "mask",
    mask_mode: Annotated[str, typer.Option(help="insert a mask row, or replace a patch.")] = "insert",
    train_mask_token: Annotated[bool, typer.Option(help="Also learn the mask token.")] = False,
    train_lm_head: Annotated[bool, typer.Option(help="Also learn the visual-token head.")] = False,
    verbalizer: Annotated[str, typer.Option(help="prototypical or linear.")] = "prototypical",
    prototype_dim: Annotated[int, typer.Option(help="Dimension of the prototypes.")] = 128,
    prototype_init: Annotated[str, typer.Option(help="xavier, or class_means of the training images.")] = "xavier",
    token_activation: Annotated[
        str, typer.Option(help="What the verbalizer reads: hidden, logits, softmax or log_softmax.")
    ] = "logits",
    projection_bias: Annotated[bool, typer.Option(help="Bias in the prototype projection.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Fixed temperature; learned from 0.1 by default.", show_default=False)
    ] = None,
    extra_bias: Annotated[
        str, typer.Option(help="Position bias of prompts and mask: zero, cls, neutral, grid:y,x or learned.")
    ] = "zero",
    img_size: Annotated[
        int | None, typer.Option(help="Pixels; the model's own by default.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initialisation, drawn shots, order and augmentation.")] = 0,
    shuffle_labels: Annotated[
        bool, typer.Option("--shuffle-labels", help="A control: permute train and val labels; test falls to chance.")
    ] = False,
    on_bad_image: OnBadImage = "error",
    background: Background = "white",
    value_range: ValueRange = None,
    test: Annotated[bool, typer.Option(help="Read the test images, once, at the end.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; the next free runs/DATA-N by default.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out with its own arguments.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    device: Device = "auto",
    impl: Impl = "auto",
) -> None:
    """Learn labels from a few images.

    Writes a run folder and prints the test accuracy. The epoch best on validation images is kept; test images are read
    once, at the end. The run folder holds the adapter (adapter_model.safetensors, adapter_config.json), metrics.csv,
    curves.png, run.json, split.csv (name and SHA-256 of every image used) and the state to resume from. Data that moved
    is given again: --resume --out RUN --data NEW.

    \b
    Examples:
      vptm train
      vptm train --data photos/ --model beitv2_base_patch16_224_pt1k.pth --shots 16 --out runs/photos
      vptm train --resume --out runs/photos
    """
    settings, given = _options(ctx)
    if resume and out is None:
        raise ValueError("--resume needs --out, the run folder to continue")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if out is not None and resume:
        settings = _resumed_settings(out, settings, given)
    else:
        settings = _with_recipe(settings, given)
    _train(settings, out, resume, overwrite)


def train_settings(arguments: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """What a fresh `vptm train ARGUMENTS` trains with, its recipe included, and the names of the options given.

    Raises:
        ValueError: an option that `train` does not have or whose value is of another type, or a wrong recipe.
    """
    command: Any = typer.main.get_command(app)
    try:
        ctx = command.commands["train"].make_context("train", list(arguments))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise ValueError(error.format_message()) from None
    settings, given = _options(ctx)
    return _with_recipe(settings, given), given


def _options(ctx: typer.Context) -> tuple[dict[str, Any], set[str]]:
    settings = {name: value for name, value in ctx.params.items() if name not in ("out", "resume", "overwrite")}
    settings |= {name: _located(name, settings[name]) for name in ("model", "data")}
    return settings, {
        name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def _with_recipe(settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """`settings`, with the recipe's where nothing is given, and its warm-up scaled to epochs that are."""
    import inspect

    from vptm.recipes import scaled_warmup

    if settings["recipe"] is None:
        return settings
    own = _recipe_settings(settings["recipe"])
    if "epochs" in given and "warmup_epochs" in own:
        published = own.get("epochs", inspect.signature(train).parameters["epochs"].default)
        own["warmup_epochs"] = scaled_warmup(own["warmup_epochs"], published, settings["epochs"])
    return settings | {name: value for name, value in own.items() if name not in given}


def _recipe_settings(name: str) -> dict[str, Any]:
    """A recipe's settings, with the types of the options they stand for."""
    from contextlib import suppress
    from typing import get_args, get_type_hints

    from vptm.messages import hint
    from vptm.recipes import read_recipe

    options = {key: get_args(kind) or (kind,) for key, kind in get_type_hints(train).items()}
    for key in ("ctx", "recipe", "return", *_FREE_ON_RESUME):
        options.pop(key, None)
    settings = {}
    for key, value in read_recipe(name).settings.items():
        if key not in options:
            raise ValueError(f"recipe {name}: unknown setting {key!r}{hint(key, list(options))}")
        kinds = options[key]
        if float in kinds and isinstance(value, (int, str)) and not isinstance(value, bool):
            with suppress(ValueError):
                value = float(value)  # YAML reads 5e-2 as text
        elif str in kinds and isinstance(value, (int, float)):
            value = str(value)
        if type(value) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"recipe {name}: {key} must be {wanted}, got {value!r}")
        settings[key] = value
    return settings


def _located(option: str, source: str) -> str:
    """A path as an absolute one, so the run can be used from any folder; a name as it is, unless it is both."""
    import timm

    from vptm.data.datasets import SOURCES
    from vptm.weights.files import SUFFIXES

    if option == "data":
        is_name = source in SOURCES
    else:
        is_name = source == "builtin" or (timm.is_model(source) and Path(source).suffix not in SUFFIXES)
    if not os.path.exists(source):
        return source
    if is_name:
        raise ValueError(
            f"--{option} {source} is a name that vptm knows and {os.path.abspath(source)}: pass ./{source} for "
            "that one, or run in another folder"
        )
    return str(Path(source).resolve())


def _resumed_settings(out: Path, settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    from vptm.data.split_list import SPLIT_FILE

    stored = _read_run(out).get("settings")
    if not isinstance(stored, dict):
        raise ValueError(f"{out} was not made by `vptm train`, it cannot be resumed by it")
    moved = {"data"} if (out / SPLIT_FILE).is_file() else set()  # compared with the list, image by image
    for name in sorted(given - _FREE_ON_RESUME - moved):
        if stored.get(name) != settings[name]:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} {settings[name]} differs from the run's {stored.get(name)}: leave it out to resume"
            )
    return settings | {name: value for name, value in stored.items() if name in settings and name not in given}


def _train(settings: dict[str, Any], out: Path | None, resume: bool, overwrite: bool) -> None:
    import shlex

    import numpy as np
    import torch

    from vptm.data.datasets import few_shot, load_data, transforms
    from vptm.data.split_list import SPLIT_FILE, SplitList
    from vptm.messages import one_of
    from vptm.methods.spt import INIT_METHODS, init_prompts
    from vptm.models.saving import save_adapter
    from vptm.models.verbalizers import fit_prototypes
    from vptm.training.evaluate import evaluate
    from vptm.training.facts import peak_memory
    from vptm.training.fit import fit
    from vptm.training.run_folder import RUN_FILE, holds_progress, update_run_file
    from vptm.weights.adapters import read_adapter_config
    from vptm.weights.files import WriteError

    shots = _parse_shots(settings["shots"])
    for name in ("batch_size", "workers", "prototype_steps"):
        if settings[name] < (lowest := 1 if name == "batch_size" else 0):
            raise ValueError(f"--{name.replace('_', '-')} must be >= {lowest}, got {settings[name]}")
    if not 0 <= settings["seed"] < 2**32:
        raise ValueError(f"--seed must be in 0..2^32-1, got {settings['seed']}")
    one_of("--prototype-init", settings["prototype_init"], ("xavier", "class_means"))
    for name, unused in (("prototype_steps", 0), ("prototype_init", "xavier")):
        if settings[name] != unused and settings["verbalizer"] != "prototypical":
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} needs --verbalizer prototypical, got {settings['verbalizer']}")
    if not 0 < settings["prototype_lr"] < float("inf"):
        raise ValueError(f"--prototype-lr must be finite and > 0, got {settings['prototype_lr']}")
    one_of("--prompt-init", settings["prompt_init"], ("uniform", *INIT_METHODS))
    place = _device(settings["device"])
    read = {"background": settings["background"], "value_range": _parse_range(settings["value_range"])}
    with _asking_for_moved_data(resume):
        data = load_data(settings["data"], on_bad_image=settings["on_bad_image"], **read)
    _report(data)
    train_set = data.train if shots is None else few_shot(data.train, shots, seed=settings["seed"])
    val_set, test_set = data.val, data.test if settings["test"] else None
    _report_classes({"train": train_set, "val": val_set, "test": test_set}, data.train)
    if settings["on_bad_image"] == "error":
        _refuse_unreadable([train_set, val_set, test_set])
    _report_dark(train_set)
    if settings["shuffle_labels"]:
        draw = np.random.default_rng(settings["seed"])
        train_set = train_set.with_labels(draw.permutation(train_set.labels))
        # true validation labels would still select the luckiest epoch
        val_set = None if val_set is None else val_set.with_labels(draw.permutation(val_set.labels))

    torch.manual_seed(settings["seed"])
    model = _build(settings, len(data.classes))
    model.class_names = data.classes
    model.default_cfg |= read  # kept with the adapter, so that other pictures are read in the same way
    if settings["model"] == "builtin" and data.name not in ("builtin", "fashion-mnist"):
        _say(f"the built-in model is {DEMONSTRATION}")
    flip = data.flip if settings["flip"] is None else settings["flip"]
    prepare = transforms(model)
    plain_train_set = train_set.with_transform(prepare)
    train_set = train_set.with_transform(transforms(model, train=True, flip=flip) if settings["augment"] else prepare)
    loader = _loader(train_set, settings["batch_size"], settings["workers"], place, shuffle=True)
    val_loader = None
    if val_set is not None:
        val_loader = _loader(val_set.with_transform(prepare), EVALUATION_BATCH, settings["workers"], place)
    if settings["finetune"]:
        model.unfreeze()
    folder = _free_folder(data.name) if out is None else out
    if settings["prompt_init"] != "uniform" and not (resume and holds_progress(folder)):
        model.to(place)
        init_prompts(model, loader, settings["prompt_init"], images=settings["init_images"], seed=settings["seed"])
    support = _loader(plain_train_set, EVALUATION_BATCH, settings["workers"], place)
    if settings["prototype_init"] == "class_means" and not (resume and holds_progress(folder)):
        verbalizer: Any = model.to(place).verbalizer
        verbalizer.init_prototypes(model, support)
    again = f"vptm train --resume --out {shlex.quote(str(folder))}"
    parts = {split: part for split, part in (("train", train_set), ("val", val_set), ("test", test_set)) if part}
    listed = SplitList.of(parts)
    for split, repeated in listed.repeated().items():
        _say(f"{repeated} {split} images have the contents of training images")
    result = fit(
        model,
        loader,
        val_loader,
        **{name: settings[name] for name in _FIT_ARGUMENTS},
        cache_frozen=not settings["augment"],
        run_dir=folder,
        resume=resume,
        overwrite=overwrite,
        device=place,
        info={
            "command": shlex.join(["vptm", *_arguments]),
            "settings": settings,
            "data": {
                "name": data.name,
                "images": {split: len(part) for split, part in parts.items()},
                "notes": list(data.notes),
            },
        },
        images=listed,
    )
    if resume:
        update_run_file(folder, settings=settings)  # where the data lies now
    if result.interrupted:
        _say(f"vptm: interrupted after epoch {len(result.history)} of {settings['epochs']}, continue with: {again}")
        raise typer.Exit(1)
    if not (folder / RUN_FILE).is_file():
        raise WriteError(f"run folder {folder} is gone, it was removed while the run trained")
    known = _read_run(folder).get("result") or {}
    test, accuracy = known.get("test"), result.best_val_accuracy
    contrast: list[float] = []
    try:
        if steps := settings["prototype_steps"]:
            kept = read_adapter_config(folder).get("extra") or {}
            fitted = kept.get("prototype_losses")
            if kept.get("prototype_steps") == steps and isinstance(fitted, list) and len(fitted) == 2:
                contrast, accuracy = fitted, kept.get("val_accuracy")  # a finished run: its adapter has them
            else:
                contrast = fit_prototypes(model, support, steps=steps, lr=settings["prototype_lr"])
                accuracy = None if val_loader is None else evaluate(model, val_loader)["accuracy"]
                extra = {"epoch": result.best_epoch, "val_accuracy": accuracy, "prototype_steps": steps}
                save_adapter(model, folder, extra=extra | {"prototype_losses": [contrast[0], contrast[-1]]})
        if test is None and test_set is not None:
            test_loader = _loader(test_set.with_transform(prepare), EVALUATION_BATCH, settings["workers"], place)
            test = evaluate(model, test_loader)
            test["per_class"] = dict(zip(data.classes, test["per_class"]))
    except KeyboardInterrupt:
        _say(f"vptm: interrupted before the test, continue with: {again}")
        raise typer.Exit(1) from None
    outcome = {"best_epoch": result.best_epoch, "val_accuracy": accuracy, "test": test}
    update_run_file(folder, result=outcome, cost=_cost(model, result.history, len(train_set), peak_memory(place)))
    if result.best_val_accuracy is not None:
        print(f"validation accuracy  {result.best_val_accuracy:.2%} at epoch {result.best_epoch}")
    if contrast:
        after = "" if accuracy is None else f", validation accuracy then {accuracy:.2%}"
        print(f"prototypes           ProtoVerb loss {contrast[0]:.4f}, after {steps} steps {contrast[-1]:.4f}{after}")
    if test is not None:
        print(f"test accuracy        {test['accuracy']:.2%} of {test['n']} images, loss {test['loss']:.4f}")
    print(f"run folder           {folder} (adapter, {RUN_FILE}, {SPLIT_FILE}, metrics.csv, curves.png)")
    print(f"next                 vptm predict {shlex.quote(str(folder))} IMAGE.png")


def _build(settings: dict[str, Any], classes: int) -> PromptedModel:
    """The model that the options describe: `PromptedViT` for timm's VisionTransformers, else `PromptedBEiT`."""
    import inspect

    import timm

    from vptm.models.prompted_beit import PromptedBEiT
    from vptm.models.prompted_vit import PromptedViT

    source = settings["model"]
    is_vit = source.partition(".")[0] in timm.list_models(module="vision_transformer")
    kind = PromptedViT if is_vit else PromptedBEiT
    accepted, defaults = inspect.signature(kind).parameters, inspect.signature(train).parameters
    for name in _MODEL_ARGUMENTS:
        if name not in accepted and settings[name] != defaults[name].default:
            raise ValueError(f"--{name.replace('_', '-')} is for BEiT models, {source} is a timm VisionTransformer")
    options = {key: settings[name] for key, (name, default) in _PROMPT_OPTIONS.items() if settings[name] != default}
    return kind(
        source,
        classes,
        pretrained=True,
        impl=settings["impl"],
        prompt_options=options or None,
        **{name: settings[name] for name in _MODEL_ARGUMENTS if name in accepted},
    )


def _cost(model: PromptedModel, history: list[dict[str, Any]], images: int, memory: int) -> dict[str, Any]:
    """What training took: parameters, training images a second with validation, peak memory in bytes."""
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    seconds = sum(row["seconds"] for row in history)
    speed = images * len(history) / seconds if seconds else None
    return {"trainable_parameters": trained, "images_per_second": speed, "peak_memory": memory}


@app.command()
def compare(
    methods: Annotated[
        str, typer.Option(help="Recipes to compare, with commas between them; any unknown name lists them.")
    ] = "vptm,vpt-shallow,vpt-deep,spt,provp,linear,finetune",
    data: Annotated[str, typer.Option(help="As in `vptm train`.")] = "builtin",
    shots: Annotated[str, typer.Option(help="Training images per class, or all.")] = "16",
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the training images, for every method.")] = 20,
    search: Annotated[
        bool,
        typer.Option("--search", help="First choose each recipe's search settings on validation images."),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the comparison; runs in it are kept.")] = Path("runs/comparison"),
    model: Annotated[str, typer.Option(help="As in `vptm train`.")] = "builtin",
    background: Background = "white",
    value_range: ValueRange = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; more than one disturbs images/s.")] = 1,
    device: Device = "auto",
) -> None:
    """Train methods side by side.

    Every method is trained with its recipe on the same images for as many epochs, over several seeds; the epoch (and
    with --search the settings) is chosen on validation images, and each run is tested once. Prints a table and writes
    comparison.csv, comparison.json and comparison.png. Finished runs are kept, so the same command goes on where it was
    stopped, and refuses them where a setting changed; a run that fails is reported and the others go on.

    \b
    Example:
      vptm compare --methods vptm,vpt-deep,spt,linear --seeds 3
    """
    from vptm.commands.comparison import compare as run
    from vptm.commands.comparison import table

    _parse_shots(shots)
    _device(device)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    arguments = ["--model", _located("model", model), "--device", device, "--background", background]
    arguments += [] if value_range is None else [f"--value-range={value_range}"]
    results = run(
        names,
        out,
        data=_located("data", data),
        seeds=seeds,
        epochs=epochs,
        shots=shots,
        arguments=arguments,
        search=search,
        jobs=jobs,
        report=_say,
    )
    print(table(results))
    print(f"comparison folder  {out} (comparison.csv, comparison.json, comparison.png)")
    failed = [f"{result.name} {run}: {reason}" for result in results for run, reason in result.failures.items()]
    if failed:
        _say(f"vptm: {len(failed)} runs failed, the same command tries them again: {'; '.join(failed)}")
        raise typer.Exit(1)


@app.command()
def protocol(
    name: Annotated[str, typer.Argument(help="few-shot or base-to-novel.")],
    data: Annotated[str, typer.Option(help="As in `vptm train`.")] = "builtin",
    model: Annotated[
        str, typer.Option(help="As in `vptm train`; CLIP's visual weights by their timm name.")
    ] = "builtin",
    class_embeddings: Annotated[
        Path | None,
        typer.Option(
            help="Safetensors file with embeddings (K, D), class_names in its metadata, optionally projection (D, C); "
            "by default the names go through --text-encoder.",
            show_default=False,
        ),
    ] = None,
    text_encoder: Annotated[str, typer.Option(help="sentence or open_clip.")] = "sentence",
    template: Annotated[str, typer.Option(help="Around a class name, with {} for it.")] = "a photo of a {}.",
    shots: Annotated[
        str | None,
        typer.Option(
            help="Training images per class, with commas between several; 1,2,4,8,16 for few-shot, else 16.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs for each number of shots.")] = 3,
    prompt_length: Annotated[
        int | None,
        typer.Option(help="Prompts per layer; as published, 50 for few-shot, else 16.", show_default=False),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Of progressive prompts.")] = 0.01,
    reformation: Annotated[float, typer.Option(help="Lambda of the contrast with the frozen features.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of that contrast.")] = 1.0,
    ridge: Annotated[float, typer.Option(help="Strength of the projection fitted where none is given.")] = 0.01,
    logit_scale: Annotated[
        float | None,
        typer.Option(
            help="Factor of the cosines; 100 with a given projection, 10 with a fitted one.", show_default=False
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the training images; as published, 50, 100 or 200 from 1, 2 or 8 shots on for few-shot, "
            "else 100.",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    weight_decay: Annotated[
        float | None, typer.Option(help="As published, 0.0005 for few-shot, else 0.001.", show_default=False)
    ] = None,
    augment: Annotated[bool, typer.Option(help="Random changes of training images.")] = True,
    background: Background = "white",
    value_range: ValueRange = None,
    device: Device = "auto",
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
    import csv
    from inspect import signature

    from vptm.data.datasets import load_data
    from vptm.messages import one_of
    from vptm.methods.provp import clip_projection, is_clip_tower
    from vptm.methods.provp_protocols import (
        PROTOCOLS,
        SHOTS,
        ClassFeatures,
        published_settings,
        read_class_features,
        run_protocol,
    )
    from vptm.methods.reprogramming.label_mapping import embed_names
    from vptm.methods.reprogramming.label_mapping import text_encoder as make_encoder

    one_of("protocol", name, PROTOCOLS)
    place = _device(device)
    if seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {seeds}")
    if shots is None:
        shots = ",".join(map(str, SHOTS)) if name == "few-shot" else "16"
    parsed = [_parse_shots(count) for count in shots.split(",")]
    counts = [count for count in parsed if count is not None]
    if len(counts) < len(parsed):
        raise ValueError(f"--shots must be integers >= 1 in a protocol, got {shots!r}")
    images = load_data(data, background=background, value_range=_parse_range(value_range))
    _report(images)
    if class_embeddings is not None:
        features = read_class_features(class_embeddings, images.classes)
    else:
        own = text_encoder.startswith("open_clip") and is_clip_tower(model)
        encoder = make_encoder(text_encoder)
        features = ClassFeatures(
            embed_names(images.classes, encoder, template), clip_projection(model) if own else None
        )
    arguments = {
        "model": model,
        "prompt_mode": "progressive",
        "progressive_alpha": alpha,
        "readout": "cls",
        "token_activation": "hidden",
        "verbalizer": "linear",
        "impl": "auto",
    }
    settings = {key: value.default for key, value in signature(train).parameters.items()} | arguments
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["protocol", "shots", "seed", "base", "novel", "harmonic"])
    for count in counts:
        chosen = published_settings(name, count)
        given = {"prompt_length": prompt_length, "epochs": epochs, "weight_decay": weight_decay}
        chosen |= {key: value for key, value in given.items() if value is not None}
        settings["prompt_length"] = chosen["prompt_length"]
        for seed in range(seeds):
            run = run_protocol(
                name,
                lambda classes: _build(settings, classes),
                images,
                features,
                shots=count,
                seed=seed,
                ridge=ridge,
                logit_scale=logit_scale,
                augment=augment,
                device=place,
                epochs=chosen["epochs"],
                lr=lr,
                optimizer="momentum",
                weight_decay=chosen["weight_decay"],
                prompt_weight_decay=chosen["weight_decay"],
                schedule="provp",
                warmup_epochs=min(1, chosen["epochs"] - 1),
                reformation=reformation,
                reformation_temperature=temperature,
                progress=False,
            )
            shares = [run.base, run.novel, run.harmonic]
            writer.writerow([name, count, seed, *("" if share is None else f"{share:.4f}" for share in shares)])
            sys.stdout.flush()


@app.command(name="map")
def map_labels(
    data: Annotated[str, typer.Option(help="As in `vptm train`; its class names are mapped.")] = "builtin",
    classifier: Annotated[str, typer.Option(help="A timm classifier.")] = "tf_efficientnet_lite0",
    weights: Annotated[
        Path | None, typer.Option(help="Its weights, .safetensors or .pth; timm's by default.", show_default=False)
    ] = None,
    source_labels: Annotated[
        Path | None,
        typer.Option(help="Text file with its labels, one a line; ImageNet's by default.", show_default=False),
    ] = None,
    method: Annotated[
        str, typer.Option(help="semantic (SeMap), random, or by training images: flm, ilm or blm.")
    ] = "semantic",
    assignment: Annotated[
        str,
        typer.Option(
            help="argmax, hungarian, greedy, round_robin, top or threshold, of --method semantic; top shares source "
            "labels between labels, as suits --m above 1."
        ),
    ] = "hungarian",
    m: Annotated[int, typer.Option(help="Source labels of a label; not of --method blm.")] = 1,
    threshold: Annotated[float, typer.Option(help="Of --assignment threshold.")] = 0.5,
    aggregation: Annotated[str, typer.Option(help="mean, max, logsumexp or mean_prob.")] = "mean",
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Around a name, with {} for it; repeated, the mean of the embeddings counts.",
            metavar="<str>",
            show_default="This is a photo of a {}.",
        ),
    ] = None,
    text_encoder: Annotated[
        str,
        typer.Option(
            help="sentence, or open_clip (CLIP ViT-B/32), open_clip:ViT-B-16-quickgelu or open_clip:ViT-L-14-quickgelu."
        ),
    ] = "sentence",
    prompt: Annotated[
        str | None,
        typer.Option(help="Train a pixel border first: expansive or additive; none by default.", show_default=False),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Pixels of the image inside an expansive border.")] = 128,
    border: Annotated[int, typer.Option(help="Pixels of an additive border.")] = 30,
    shots: Annotated[str, typer.Option(help="Training images per class, or all; for flm, ilm, blm, --prompt.")] = "16",
    epochs: Annotated[int, typer.Option(help="Of training the border.")] = 20,
    lr: Annotated[float, typer.Option(help="Of the border.")] = 0.01,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    evaluate: Annotated[bool, typer.Option(help="Read the test images, once, at the end.")] = True,
    seed: Annotated[int, typer.Option(help="Of random mappings, shots and order.")] = 0,
    background: Background = "white",
    value_range: ValueRange = None,
    device: Device = "auto",
) -> None:
    """Map a classifier's labels to the classes of a data set.

    By default by meaning, without a training image. Prints CSV: label, source labels, and the similarity or count that
    joined the first; the test accuracy goes to stderr.

    \b
    Example:
      vptm map --data photos/ --classifier resnet18
    """
    from vptm.methods.reprogramming.label_mapping import TEMPLATE
    from vptm.methods.reprogramming.map import map_labels as run

    if batch_size < 1:
        raise ValueError(f"--batch-size must be >= 1, got {batch_size}")
    rows, accuracy = run(
        data=_located("data", data),
        background=background,
        value_range=_parse_range(value_range),
        classifier=classifier,
        weights=weights,
        source_labels=source_labels,
        method=method,
        assignment=assignment,
        m=m,
        threshold=threshold,
        aggregation=aggregation,
        template=template or TEMPLATE,
        encoder=text_encoder,
        prompt=prompt,
        image_size=image_size,
        border=border,
        shots=_parse_shots(shots),
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        test=evaluate,
        seed=seed,
        device=_device(device),
        report=_say,
    )
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["label", "source_labels", "score"])
    writer.writerows(rows)
    if accuracy is not None:
        _say(f"test accuracy {accuracy:.2%}")


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="Other data, as in `vptm train`; the run's own by default.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    include_trained: Annotated[
        bool, typer.Option("--include-trained", help="Also count images that the run was trained on or chosen by.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with the confusion matrix.")] = False,
    on_bad_image: OnBadImage = "error",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = EVALUATION_BATCH,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    source: Backbone = None,
    device: Device = "auto",
    impl: Impl = "auto",
) -> None:
    """Measure a run on its test images or other data.

    Other data must have labels the run knows; without splits of its own it is evaluated whole. The run's own data is
    known again where it moved. Images that the run was trained on, or whose accuracy chose its epoch, are counted and
    left out, by the contents of their files.

    \b
    Example:
      vptm evaluate runs/builtin-1
      vptm evaluate runs/photos --data more-photos/ --json
    """
    import json

    from vptm.data.datasets import load_data, picture_options, transforms
    from vptm.data.split_list import SplitList
    from vptm.messages import one_line, one_of
    from vptm.models.opening import load_adapter
    from vptm.training.evaluate import evaluate as measure

    one_of("--split", split, ("test", "val", "train"))
    if batch_size < 1:
        raise ValueError(f"--batch-size must be >= 1, got {batch_size}")
    place = _device(device)
    model = load_adapter(run, source=source, impl=impl)
    own = _own_data(run)
    if data is None and own is None:
        raise ValueError(f"{run} does not record its data: pass --data")
    chosen = data if data is not None else str(own)
    # a division made at training time is kept, so test images are never training images
    same = own is not None and _located("data", chosen) == own
    listed = SplitList.read(run)
    read = {"transform": transforms(model), "on_bad_image": on_bad_image, **picture_options(model)}
    with _asking_for_moved_data(data is None):
        loaded = load_data(chosen, holdout=same, **read)
    if not same and listed is not None and listed.is_within(loaded.parts()):
        _say(f"{chosen} holds the run's own images: divided as for training")
        same, loaded = True, load_data(chosen, **read)
    _report(loaded)
    part = loaded.parts().get(split)
    if not part:
        raise ValueError(f"{chosen} has no {split} images")
    left_out: dict[str, int] = {}
    if listed is not None:
        part, left_out = _without_trained(part, listed, split if same else None, include_trained)
    elif not same:
        _say(f"{run} keeps no list of its images: whether it was trained on some of these is not known")
    part = _with_labels_of(model, part)
    result = measure(model, _loader(part, batch_size, workers, place), device=place, confusion=as_json)
    names = model.class_names or [str(k) for k in range(model.num_classes)]
    if as_json:
        facts = {"split": split, "data": loaded.name, "classes": names, "left_out": left_out}
        print(json.dumps({**facts, **result}))
        return
    names = [one_line(name) for name in names]
    width = max(map(len, names))
    for name, share in zip(names, result["per_class"]):
        print(f"{name:{width}}  {'-' if share is None else format(share, '.2%')}")
    print(f"{split} accuracy {result['accuracy']:.2%} of {result['n']} images, loss {result['loss']:.4f}")


@app.command()
def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    on_bad_image: OnBadImage = "error",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = EVALUATION_BATCH,
    source: Backbone = None,
    device: Device = "auto",
    impl: Impl = "auto",
) -> None:
    """Name what pictures show.

    CSV on stdout with the columns path, label, score, top5: score is the softmax probability of the label; top5 is a
    JSON list of [label, score] pairs, best first.

    \b
    Example:
      vptm predict runs/builtin-1 shoe.png wardrobe/ > names.csv
    """
    import csv
    import json
    from collections import Counter

    import torch

    from vptm.data.datasets import ON_BAD_IMAGE, BadImageError, image_files, picture_options, read_image, transforms
    from vptm.data.pictures import left_out_note
    from vptm.messages import one_of
    from vptm.models.opening import load_adapter

    one_of("--on-bad-image", on_bad_image, ON_BAD_IMAGE)
    if batch_size < 1:
        raise ValueError(f"--batch-size must be >= 1, got {batch_size}")
    place = _device(device)
    files: list[Path] = []
    for path in images:
        if not path.exists():
            raise FileNotFoundError(f"image not found: {path}")
        left_out: Counter[str] = Counter()
        found = image_files(path, left_out) if path.is_dir() else [path]
        note = f": {left_out_note(left_out)}" if left_out else ""
        if not found:
            raise ValueError(f"{path} holds no image files{note}")
        if note:
            _say(f"{path}{note}")
        files += found
    model = load_adapter(run, source=source, impl=impl).to(place)
    sealed = model.sealed_twin()
    names = model.class_names or [str(k) for k in range(model.num_classes)]
    prepare, read = transforms(model), picture_options(model)
    rows: list[list[str]] = []
    skipped = 0
    for start in range(0, len(files), batch_size):
        readable, pixels = [], []
        for path in files[start : start + batch_size]:
            try:
                pixels.append(prepare(read_image(path, **read)))
                readable.append(path)
            except BadImageError as error:
                if on_bad_image == "error":
                    raise
                skipped += 1
                _say(f"skipped: {error}")
        if not readable:
            continue
        with torch.inference_mode():
            scores = sealed(torch.stack(pixels).to(place)).float().softmax(1).cpu()
        best = scores.topk(min(5, len(names)))
        for path, values, indices in zip(readable, best.values.tolist(), best.indices.tolist()):
            top = [[names[k], round(value, 6)] for k, value in zip(indices, values)]
            rows.append([str(path), str(top[0][0]), f"{values[0]:.6f}", json.dumps(top, ensure_ascii=False)])
    if not rows:
        raise BadImageError(f"none of {skipped} images could be read")
    # printed at the end: an unreadable image leaves no half of a table behind
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "label", "score", "top5"])
    writer.writerows(rows)


@app.command()
def explain(
    run: Run,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    out: Annotated[
        Path | None,
        typer.Option(help="PNG to write; the image's name with -explained.png, here, by default.", show_default=False),
    ] = None,
    layer: Annotated[int, typer.Option(help="Block whose attention is drawn, from 0; negative from the end.")] = -1,
    top: Annotated[int, typer.Option(help="Visual tokens and classes to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, attention of every head included.")] = False,
    source: Backbone = None,
    device: Device = "auto",
    impl: Impl = "auto",
) -> None:
    """Show why a picture gets its label.

    Prints the visual tokens predicted for it, the nearest prototypes, and how much attention the mask row pays to
    patches, prompts, class row and itself; draws that attention over the picture.

    \b
    Example:
      vptm explain runs/builtin-1 shoe.png
    """
    import json
    from dataclasses import asdict

    from vptm.inspection.explain import inspect_tokens
    from vptm.models.opening import load_adapter

    target = Path(f"{image.stem}-explained.png") if out is None else out
    if target.suffix.lower() != ".png":
        raise ValueError(f"--out must be a .png file, got {target}")
    if not image.exists():
        raise FileNotFoundError(f"image not found: {image}")
    if target.is_dir():
        raise ValueError(f"--out must be a file, got the folder {target}")
    if target.exists() and target.samefile(image):
        raise ValueError(f"--out must be another file than the image, got {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--out: folder not found: {target.parent}")
    place = _device(device)
    report = inspect_tokens(load_adapter(run, source=source, impl=impl).to(place), image, top=top, layer=layer)
    report.draw(target)
    if as_json:
        facts = asdict(report) | {"classes": [score._asdict() for score in report.classes], "drawn": str(target)}
        facts["attention"] = report.attention.tolist()
        print(json.dumps({name: value for name, value in facts.items() if name != "picture"}))
        return
    width = max(len(score.name) for score in report.classes)
    for token, probability in report.tokens:
        print(f"token  {token:<{width}}  probability {probability:.2%}")
    for score in report.classes:
        near = "" if score.similarity is None else f"  cosine {score.similarity:+.4f}"
        print(f"class  {score.name:{width}}  probability {score.probability:.2%}{near}")
    print(f"attention of the {report.row} row  {', '.join(f'{k} {v:.0%}' for k, v in report.shares.items())}")
    print(f"drawn  {target}")


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(help="A checkpoint, as --model of `vptm train` takes it, or a run or adapter folder.")
    ],
) -> None:
    """Show what a checkpoint or a run holds.

    \b
    Example:
      vptm inspect beitv2_base_patch16_224_pt1k.pth
      vptm inspect runs/builtin-1
    """
    from vptm.weights.adapters import CONFIG_FILE, TENSORS_FILE

    folder = Path(path)
    if os.path.isdir(folder) and ((folder / CONFIG_FILE).exists() or (folder / TENSORS_FILE).exists()):
        lines = _adapter_lines(folder)
    else:
        from vptm.weights.backbones import load_backbone

        lines = load_backbone(path).report.lines()
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        print(f"{label:{width}}  {value}")


def _adapter_lines(folder: Path) -> list[tuple[str, str]]:
    from vptm.training.run_folder import RUN_FILE
    from vptm.weights.adapters import read_adapter_config, read_adapter_tensors

    config = read_adapter_config(folder)
    backbone = config["backbone"]
    tensors, _ = read_adapter_tensors(folder)
    lines = [
        ("adapter", f"schema {config['schema_version']}, written by vptm {config.get('vptm_version')}"),
        ("backbone", f"{backbone.get('source')} {backbone['weight_hash']}"),
        ("classes", ", ".join(config.get("class_names") or []) or str(config["model"].get("num_classes"))),
        *((name, str(value)) for name, value in config["model"].items()),
        *((f"learned {name}", "x".join(map(str, tensor.shape)) or "scalar") for name, tensor in tensors.items()),
        ("learned values", f"{sum(tensor.numel() for tensor in tensors.values()):,}"),
        *((str(name), str(value)) for name, value in (config.get("extra") or {}).items()),
    ]
    if (folder / RUN_FILE).is_file():
        run = _read_run(folder)
        lines.append(("command", str(run.get("command"))))
        if test := (run.get("result") or {}).get("test"):
            lines.append(("test accuracy", f"{test['accuracy']:.2%} of {test['n']} images"))
    return lines


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="builtin, a checkpoint as --model of `vptm train`, or a timm ViT name.")],
    prompts: Annotated[int, typer.Option(help="Prompts per layer.")] = 10,
    mode: Annotated[str, typer.Option(help="shallow, deep or progressive.")] = "deep",
    readout: Annotated[
        str | None, typer.Option(help="Row that is read; the mask row where the weights have one, else cls.")
    ] = None,
    img_size: Annotated[int | None, typer.Option(help="Pixels; the source's own where not given.")] = None,
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 4,
    repeats: Annotated[int, typer.Option(help="Timed runs of each path; the median counts.")] = 5,
    device: Device = "auto",
    impl: Impl = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw where FLOPs and time go, a PNG.")] = None,
) -> None:
    """Show what each block costs, beside concatenated prompts.

    Parameters, trained parameters, and per image: FLOPs of inference, bytes a training step keeps for backward, time of
    inference. Weights do not change any of it, so a timm name is not downloaded.

    \b
    Example:
      vptm profile builtin
      vptm profile beit_base_patch16_224 --prompts 100 --plot beit.png
    """
    if plot is not None and plot.suffix != ".png":
        raise ValueError(f"--plot must be a file name that ends in .png, got {plot}")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise FileNotFoundError(f"--plot: no such folder: {plot.absolute().parent}")
    for name, value in (("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    import torch
    from rich.console import Console

    from vptm.inspection.profile import draw, stages_of, table
    from vptm.models.opening import open_model

    place = _device(device)
    asked = {} if readout is None else {"readout": readout}
    prompted = open_model(model, 100, prompt_length=prompts, prompt_mode=mode, img_size=img_size, impl=impl, **asked)
    prompted = prompted.to(place)
    images = torch.randn(batch, *prompted.default_cfg["input_size"], device=place)
    stages = stages_of(prompted, images, repeats=repeats)
    title = f"{model}, {mode} prompts, P = {prompts}, read-out {prompted.readout}, batch {batch}, per image"
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table(stages, batch, title))
    if plot is not None:
        draw(stages, batch, title, plot)
        _say(f"wrote {plot}")


@app.command()
def env() -> None:
    """Show versions, devices and what runs where.

    For every operation: the implementation it will use here, and why.

    \b
    Example:
      vptm env
    """
    import platform

    import torch

    from vptm.training.facts import package_versions

    lines = [(name, found or "not installed") for name, found in package_versions().items()]
    lines.append(("system", f"{platform.system()} {platform.machine()}"))
    lines.append(("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"))
    devices = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    for device in devices:
        facts = torch.cuda.get_device_properties(device)
        lines.append(
            (str(device), f"{facts.name}, compute {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
        )
    if not devices:
        lines.append(("gpu", "none that torch can use"))
    for operation in ("prompted_attention", "prototype_cosine"):
        for device in devices or [torch.device("cpu")]:
            by_answer: dict[str, list[str]] = {}
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                by_answer.setdefault(_used(operation, device, dtype), []).append(str(dtype).removeprefix("torch."))
            lines += [
                (operation, f"{answer} ({', '.join(dtypes)} on {device})") for answer, dtypes in by_answer.items()
            ]
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        print(f"{label:{width}}  {value}")


def _used(operation: str, device: Any, dtype: Any) -> str:
    """What impl="auto" runs and why; on a GPU the kernel is run once, which is the only sure answer."""
    if device.type == "cpu":
        return "torch, kernels are for GPUs"
    import torch

    import vptm_kernels
    from vptm.messages import error_line

    def tensor(*shape: int) -> Any:
        return torch.zeros(shape, device=device, dtype=dtype)

    try:
        if operation == "prompted_attention":
            vptm_kernels.prompted_attention(tensor(1, 4, 3 * 32), tensor(2, 2 * 32), num_heads=1, impl="triton")
        else:
            weights = tensor(64, 32), None, tensor(3, 16)
            vptm_kernels.prototype_cosine(tensor(2, 32), *weights, projection=tensor(16, 64), impl="triton")
    except ValueError as error:
        return f"torch, {error_line(error)}"
    except Exception as error:
        return f"triton, which fails here: {type(error).__name__}: {error_line(error, 200)}"
    return "triton"


def _parse_shots(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"--shots must be an integer >= 1 or all, got {text!r}")
    return int(text)


def _parse_range(text: str | None) -> tuple[float, float] | None:
    from vptm.data.pictures import check_picture_options

    if text is None:
        return None
    try:
        low, high = (float(number) for number in text.split(","))
        check_picture_options(None, (low, high))
    except ValueError:
        raise ValueError(f"--value-range must be LOW,HIGH, two finite numbers, the lower first, got {text!r}") from None
    return low, high


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name} was asked for, torch sees {torch.cuda.device_count()} GPUs")
    return place


def _loader(dataset: ImageDataset, batch_size: int, workers: int, place: Any, shuffle: bool = False) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset, batch_size=batch_size, shuffle=shuffle, num_workers=workers, pin_memory=place.type == "cuda"
    )


def _report(data: ImageData) -> None:
    from vptm.messages import one_line

    for note in data.notes:
        _say(one_line(f"{data.name}: {note}", _LONGEST))


def _report_classes(parts: dict[str, ImageDataset | None], pool: ImageDataset, shown: int = 20) -> None:
    """How many images of each class are used, and how many of those to train on are left out."""
    import numpy as np

    from vptm.messages import one_line

    names = [one_line(name) for name in pool.classes]
    counts = {split: np.bincount(part.labels, minlength=len(names)) for split, part in parts.items() if part}
    left_out = np.bincount(pool.labels, minlength=len(names)) - counts["train"]
    width = max(len(name) for name in names[:shown])
    _say(f"{len(names)} classes, images of each:")
    for k, name in enumerate(names[:shown]):
        cells = [
            f"{split} {count[k]}" + (f" ({left_out[k]} left out)" if split == "train" and left_out[k] else "")
            for split, count in counts.items()
        ]
        _say(f"  {name:{width}}  {', '.join(cells)}")
    if len(names) > shown:
        rest = [f"{split} {count[shown:].sum()}" for split, count in counts.items()]
        _say(f"  and {len(names) - shown} more classes: {', '.join(rest)} in all")
    if left_out.any():
        _say(
            f"{counts['train'].sum()} of {len(pool)} training images are used, {left_out.sum()} are left out: "
            "--shots all uses every one"
        )


def _report_dark(part: ImageDataset) -> None:
    """Say so where 16-bit pictures hold 10 or 12 bits: by their files' depth they are all but black."""
    used = part.brightest()
    if used is not None and used[0] < used[1] / 8:
        _say(
            f"the pictures of more than 8 bits use values up to {used[0]:g} of {used[1]:g} and are as dark as that: "
            f"--value-range 0,{used[0]:g} would spread them"
        )


def _without_trained(
    part: ImageDataset, listed: SplitList, own: str | None, keep: bool
) -> tuple[ImageDataset, dict[str, int]]:
    """`part` without what a run was trained on or chosen by, and how many images that are; with `keep`, with them.

    `own` is the split of the run's own data that `part` is, whose images it may hold; None for other data.
    """
    hashes = part.content_hashes()
    expected = listed.keys(own)
    used = [
        None if expected.get(key) == digest else split
        for key, digest, split in zip(part.keys, hashes, listed.used(hashes))
    ]
    splits = {"val": ("train",), "train": ()}.get(own or "", ("train", "val"))
    counts = {split: count for split in splits if (count := used.count(split))}
    for split, count in counts.items():
        how = "were trained on" if split == "train" else "chose the epoch"
        _say(f"{count} of {len(part)} images {how}: {'counted, as asked' if keep else 'left out'}")
    if keep or not counts:
        return part, {}
    rest = part.subset([index for index, split in enumerate(used) if split not in counts])
    if not len(rest):
        raise ValueError(
            f"data must have images that the run was not trained on, all {len(part)} were used: "
            "--include-trained counts them"
        )
    return rest, counts


@contextmanager
def _asking_for_moved_data(recorded: bool) -> Iterator[None]:
    """Data that a run recorded and that is not where it was: say how to give its new place."""
    try:
        yield
    except FileNotFoundError as error:
        if not recorded:
            raise
        raise FileNotFoundError(f"{error}; where the run's data moved, --data gives its new place") from None


def _refuse_unreadable(parts: Sequence[ImageDataset | None]) -> None:
    """Every image that will be read is decoded once before training: one epoch of decoding against a run lost late."""
    from vptm.data.datasets import BadImageError

    for part in parts:
        bad = {} if part is None else part.unreadable()
        if bad:
            others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise BadImageError(f"{next(iter(bad.values()))}{others}; --on-bad-image skip leaves such files out")


def _free_folder(name: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def _read_run(folder: Path) -> dict[str, Any]:
    import json

    from vptm.messages import error_line
    from vptm.training.run_folder import RUN_FILE

    path = folder / RUN_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no {RUN_FILE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}")
    for name in ("settings", "result"):
        if not isinstance(content.get(name) or {}, dict):
            raise ValueError(f"{path} must have {name} as an object, got {content[name]!r}")
    test = (content.get("result") or {}).get("test")
    if test is not None:
        facts = (test.get("accuracy"), test.get("loss"), test.get("n")) if isinstance(test, dict) else (None,)
        if any(isinstance(fact, bool) or not isinstance(fact, int | float) for fact in facts):
            raise ValueError(f"{path} must have result.test with accuracy, loss and n, got {test!r}")
    return content


def _own_data(folder: Path) -> str | None:
    from vptm.messages import one_line
    from vptm.training.run_folder import RUN_FILE

    if not (folder / RUN_FILE).is_file():
        return None
    settings = _read_run(folder).get("settings")
    data = settings.get("data") if isinstance(settings, dict) else None
    if data is not None and not isinstance(data, str):
        raise ValueError(f"{folder / RUN_FILE} must record its data as text, got {one_line(data)}")
    return data


def _with_labels_of(model: PromptedModel, part: ImageDataset) -> ImageDataset:
    """`part` with its labels renumbered by name to the model's classes."""
    import numpy as np

    from vptm.messages import one_line

    names = model.class_names
    if names is None or names == part.classes:
        return part
    if unknown := [name for name in part.classes if name not in names]:
        raise ValueError(one_line(f"the data has the label {unknown[0]!r}, the run knows {', '.join(names)}"))
    number = np.array([names.index(name) for name in part.classes])
    return part.with_labels(number[part.labels], names)
