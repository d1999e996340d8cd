"""Options of the commands, made from settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from vptm.settings import Option, option_name, train_options

Command = TypeVar("Command", bound=Callable[..., Any])


def choice(words: Sequence[str], text: str, *spelt: str, show_default: bool | str = True) -> Any:
    """typer's description of an option that is one of some words: help and completion know them, and whatever takes
    the option checks them."""

    def completed(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    metavar = f"[{'|'.join(words)}]"
    return typer.Option(*spelt, help=text, metavar=metavar, autocompletion=completed, show_default=show_default)


def _info(option: Option) -> Any:
    spelt = [option_name(option.name)] if option.switch or option.type is not bool else []
    if option.choices:
        return choice(option.choices, option.help, *spelt, show_default=option.shown_default())
    if option.says_none:
        return typer.Option(
            *spelt,
            help=option.help,
            metavar=f"{option.type.__name__.upper()}|none",
            parser=partial(_or_none, option.type),
            show_default=option.shown_default(),
        )
    return typer.Option(*spelt, help=option.help, show_default=option.shown_default())


def _or_none(kind: type, text: str) -> Any:
    try:
        return None if text == "none" else kind(text)
    except ValueError:
        raise typer.BadParameter(f"must be {kind.__name__} or none, got {text!r}") from None


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = list[str] if option.several else option.type
    default = list(option.default) if option.several else option.default
    annotation: Any = Annotated[kind if default is not None else kind | None, _info(option)]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def takes(options: Mapping[str, Option]) -> Callable[[Command], Command]:
    """A decorator of a command's function with `**settings`: those become options, by name.

    An option whose default depends on others is None where it is not given.
    """

    def decorate(function: Command) -> Command:
        signature = inspect.signature(function, eval_str=True)
        parameters = [
            one.replace(kind=one.KEYWORD_ONLY)
            for one in signature.parameters.values()
            if one.kind is not one.VAR_KEYWORD
        ]
        parameters += [_parameter(option) for option in options.values()]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {one.name: one.annotation for one in parameters}
        return function

    return decorate


_SHARED = train_options()
OnBadImage = Annotated[str, _info(_SHARED["on_bad_image"])]
Device = Annotated[str, _info(_SHARED["device"])]
PrecisionOption = Annotated[str, _info(_SHARED["precision"])]
Compile = Annotated[bool, _info(_SHARED["compile"])]
CudaGraph = Annotated[bool, _info(_SHARED["cuda_graph"])]
Impl = Annotated[str, _info(_SHARED["impl"])]
BatchSize = Annotated[int, _info(_SHARED["batch_size"])]
Workers = Annotated[int | None, _info(_SHARED["workers"])]
Backbone = Annotated[
    str | None, typer.Option(help="Backbone weights, where they moved since training.", show_default=False)
]
Thresholds = Annotated[
    list[str] | None,
    typer.Option(
        help="Least score of a label of multi-label runs, 0.5 by default; of one of them NAME=0.3. May be repeated.",
        show_default=False,
    ),
]
Run = Annotated[Path, typer.Argument(help="Run or adapter folder.")]
