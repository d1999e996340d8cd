"""The `vptm` command: its commands put together, what it exits with, and errors as one line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, TextIO

import typer

from vptm.commands.compare import compare
from vptm.commands.env import env
from vptm.commands.evaluate import evaluate
from vptm.commands.explain import explain
from vptm.commands.export import export
from vptm.commands.inspect import inspect
from vptm.commands.map import map_labels
from vptm.commands.models import models
from vptm.commands.predict import predict
from vptm.commands.profile import profile
from vptm.commands.protocol import protocol
from vptm.commands.serve import serve
from vptm.commands.train import train
from vptm.terminal import say_once

_OUTPUT = "standard output"

app = typer.Typer(
    name="vptm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 the work failed or was interrupted, 2 bad arguments, or a package that
    they need is not installed."""
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    from vptm.messages import WITH_PATHS, error_line, one_line

    debug = os.environ.get("VPTM_DEBUG") == "1"
    # OpenMP threads that spin while they wait make small models ten times slower where other work shares the cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a letter that the console lacks must not end the command
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper) and stream is sys.__stdout__ and not stream.isatty():
        sys.stdout = _named(stream)
    try:
        status = app(args=arguments, prog_name="vptm", standalone_mode=False, obj=arguments)
        print(end="", flush=True)  # standard output may be closed
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        _write_no_more()  # the reader left, as in `vptm predict | head`
        return 1
    except (KeyboardInterrupt, typer.Abort):
        say_once("vptm: interrupted")
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error: its class moved between versions of typer
            if message := error.format_message():
                is_help = type(error).__name__ == "NoArgsIsHelpError"
                say_once(f"vptm: {message if is_help else one_line(message + _choices(error), WITH_PATHS)}")
            return int(getattr(error, "exit_code", 2))
        if debug:
            raise
        if isinstance(error, OSError) and error.filename == _OUTPUT:
            _write_no_more()
        say_once(f"vptm: {error_line(error, WITH_PATHS)}")
        return _exit_code(error)


class _Output(io.FileIO):
    """Standard output, whose errors say that it is what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = _OUTPUT
            raise


def _named(stream: io.TextIOWrapper[Any]) -> TextIO:
    raw: Any = _Output(stream.fileno(), "wb", closefd=False)
    through = stream.write_through  # as python -u asks
    buffer = raw if through else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, write_through=through)


def _write_no_more() -> None:
    """Let nothing come of what standard output still holds, which is written once more when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _choices(error: object) -> str:
    """What an option that was left out must be, where its help lists words."""
    words = str(getattr(getattr(error, "param", None), "metavar", None) or "")
    return f" It must be one of {words[1:-1].replace('|', ', ')}." if words.startswith("[") and "|" in words else ""


def _exit_code(error: Exception) -> int:
    from vptm.data.decoding import BadImageError

    found = isinstance(error, (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError))
    return 2 if found and not isinstance(error, BadImageError) else 1


def _version(shown: bool) -> None:
    if shown:
        from vptm.version import __version__

        print(f"vptm {__version__}")
        raise typer.Exit


@app.callback()
def _vptm(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Visual prompt learning as masked visual token modelling: teach a frozen vision transformer
    new labels from a few images.

    \b
    vptm train                                     learn ten kinds of clothing on the built-in model
    vptm predict runs/builtin-1 picture.png        name what a picture shows
    vptm explain runs/builtin-1 picture.png        show why

    Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 the work failed or was interrupted,
    2 bad arguments, or a package that they need is not installed. With VPTM_DEBUG=1 in the environment an error shows
    its traceback.
    """


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "compare": compare,
    "protocol": protocol,
    "map": map_labels,
    "evaluate": evaluate,
    "predict": predict,
    "explain": explain,
    "export": export,
    "serve": serve,
    "models": models,
    "inspect": inspect,
    "profile": profile,
    "env": env,
}
for name, command in _COMMANDS.items():
    app.command(name=name)(command)
