"""What every bench shares: what is asked for, where it ran, and the interleaved ratios below pytest-benchmark's tables.

    pytest bench/ --benchmark-only --device cuda --dtype bfloat16,float16 --peers "sdpa efficient,flex compiled"

`--settings "B=64 P=50,deep-100-64"` keeps the shapes and settings whose label has all words of one of these, and
`--each FILE` writes a line of json for every result when it is made.

`--grid tiny` runs the settings of a GPU on models of two blocks, with compiled peers traced and not compiled: a
rehearsal, whose times mean nothing.

What is asked for and not here is skipped by name; a run that times nothing of what was asked for is an error. Peers
that are not here are listed with the reason below the tables and in the json, asked for or not.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

from bench import timing

GRID_HELP = "shapes (default: full on a GPU, small on a CPU); tiny rehearses"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SPEED_UP = "speed-up over "
# parameters of bench functions whose values are names of implementations
IMPLEMENTATION = ("implementation", "name", "peer")
STARTED = pytest.StashKey[float]()
BEFORE = pytest.StashKey[dict[str, Any]]()
WRITTEN = pytest.StashKey[int]()
ABSENT = pytest.StashKey[dict[str, dict[str, str]]]()
"""What is not timed with the reason, by bench file."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vptm benches")
    group.addoption("--device", choices=("cpu", "cuda"), help="where to time (default: a GPU if there is one)")
    group.addoption("--dtype", metavar="NAMES", help=f"comma separated, of {', '.join(DTYPES)}")
    group.addoption("--peers", metavar="NAMES", help="comma separated; vptm itself always runs (default: all)")
    group.addoption("--grid", choices=("small", "full", "tiny"), help=GRID_HELP)
    group.addoption("--settings", metavar="LABELS", help="comma separated: words of the labels of shapes and settings")
    group.addoption("--each", metavar="FILE", help="append every result as a line of json when it is made")


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def pytest_configure(config: pytest.Config) -> None:
    default = timing.Selection()
    device = config.getoption("--device") or default.device
    names = _split(config.getoption("--dtype"))
    if unknown := set(names) - set(DTYPES):
        raise pytest.UsageError(f"--dtype must be of {', '.join(DTYPES)}, got {', '.join(sorted(unknown))}")
    grid = config.getoption("--grid") or ("full" if device == "cuda" else "small")
    dtypes = tuple(DTYPES[name] for name in names) or timing.DTYPES[device]
    peers = _split(config.getoption("--peers"))
    timing.select(timing.Selection(device, dtypes, peers, grid in ("full", "tiny"), grid == "tiny", not names))
    config.stash[STARTED] = time.monotonic()
    state = timing.gpu_state() if device == "cuda" and torch.cuda.is_available() else None
    config.stash[BEFORE] = {"load average before": timing.load_average(), "gpu state before": state}


def _implementation(item: pytest.Item) -> str | None:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return next((params[name] for name in IMPLEMENTATION if isinstance(params.get(name), str)), None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = timing.selection.peers
    if asked and items:
        known = {name for item in items if (name := _implementation(item))}
        known |= {name for item in items for name in getattr(getattr(item, "module", None), "PEERS", {})}
        if unknown := set(asked) - known:
            raise pytest.UsageError(
                f"--peers must be of {', '.join(sorted(known - {'vptm'}))}, got {', '.join(sorted(unknown))}"
            )
        dropped = [item for item in items if (_implementation(item) or "vptm") not in (*asked, "vptm")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
    if wanted := _split(config.getoption("--settings")):
        dropped = [item for item in items if not any(_labelled(item, words) for words in wanted)]
        if items and len(dropped) == len(items):
            raise pytest.UsageError(f"--settings must be words of a label, got {', '.join(wanted)}")
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
    for item in items:
        if reason := _why_not(item, bool(config.getoption("--dtype"))):
            item.add_marker(pytest.mark.skip(reason=reason))


def _labelled(item: pytest.Item, words: str) -> bool:
    """Whether a parameter's label has all of these words; benches without shapes or settings are not chosen by them."""
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    return any(set(words.split()) <= set(timing.label(value).split()) for value in values)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """A run that is cut short has written what it had measured until then."""
    yield
    benches = getattr(getattr(item.config, "_benchmarksession", None), "benchmarks", [])
    path, done = item.config.getoption("--each"), item.config.stash.get(WRITTEN, 0)
    if path and len(benches) > done:
        lines = [json.dumps(bench.as_dict(include_data=False, flat=False), default=str) for bench in benches[done:]]
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        item.config.stash[WRITTEN] = len(benches)


def pytest_collection_finish(session: pytest.Session) -> None:
    """After all deselection, -k included."""
    modules = dict.fromkeys(module for item in session.items if (module := getattr(item, "module", None)))
    found = {}
    for module in modules:
        absent = timing.absent(getattr(module, "PEERS", {}))
        dtype = getattr(module, "DTYPE", None)
        if dtype is not None and dtype in timing.selection.dtypes:
            others = [other for other in timing.selection.dtypes if other != dtype]
            absent |= {f"dtype {_short(other)}": f"{_short(dtype)} alone is timed" for other in others}
        if absent:
            found[module.__name__.rpartition(".")[2]] = absent
    session.config.stash[ABSENT] = found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _why_not(item: pytest.Item, dtype_asked: bool) -> str | None:
    """What was asked for and this bench cannot time."""
    if reason := timing.selection.missing():
        return reason
    module, name = getattr(item, "module", None), _implementation(item)
    peer = getattr(module, "PEERS", {}).get(name)
    if isinstance(peer, timing.Peer) and (needed := peer.missing()):
        return f"{name}: {needed}"
    # a bench that times on one device or in one dtype says which; that dtype is its default
    device, dtype = getattr(module, "DEVICE", None), getattr(module, "DTYPE", None)
    if device not in (None, timing.selection.device):
        return f"device {timing.selection.device} is not timed by {item.path.name}, {device} is"
    if dtype_asked and dtype is not None and dtype not in timing.selection.dtypes:
        asked = ", ".join(_short(wanted) for wanted in timing.selection.dtypes)
        return f"dtype {asked} is not timed by {item.path.name}, {_short(dtype)} is"
    return None


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which nothing of what was asked for was timed must not look like one in which everything was well."""
    benches = getattr(getattr(session.config, "_benchmarksession", None), "benchmarks", [])
    idle = not benches or not _asked_and_timed(benches)
    if exitstatus == pytest.ExitCode.OK and idle and not session.config.getoption("collectonly"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def _asked_and_timed(benches: Iterable[Any]) -> bool:
    """Whether any of --peers was timed; True without it."""
    timed = {name.removeprefix(SPEED_UP) for bench in benches for name in bench.extra_info if name.startswith(SPEED_UP)}
    timed |= {name for bench in benches for name in (bench.params or {}).values() if isinstance(name, str)}
    return not timing.selection.peers or not timed.isdisjoint(timing.selection.peers)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info |= timing.environment() | config.stash[BEFORE]
    machine_info["matrix rates"] = timing.measured_rates
    machine_info["absent"] = config.stash.get(ABSENT, {})
    machine_info["command"] = command(config.invocation_params.args)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep of the machine what decides speed, not its kernel release and build dates."""
    machine = output_json["machine_info"]
    for name in (
        "release",
        "python_build",
        "python_compiler",
        "python_implementation",
        "python_implementation_version",
    ):
        machine.pop(name, None)
    kept = ("brand_raw", "count", "arch", "hz_advertised_friendly", "hz_actual_friendly")
    machine["cpu"] = {name: machine["cpu"][name] for name in kept if name in machine["cpu"]}


def command(arguments: Sequence[str | object]) -> str:
    """The command that made a json, without the folders of whoever ran it."""
    return " ".join(["pytest", *(re.sub(r"(?<![\w.])/[^\s=]*/", "", str(argument)) for argument in arguments)])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("collectonly"):
        return
    session = getattr(config, "_benchmarksession", None)
    ratios, refused, growth, work = [], [], [], []
    benches = getattr(session, "benchmarks", [])
    for bench in benches:
        found = {name: value for name, value in bench.extra_info.items() if name.startswith(SPEED_UP)}
        if found:
            text = ", ".join(f"{value:.2f}x {name.removeprefix('speed-up ')}" for name, value in found.items())
            ratios.append(f"{bench.group}: {text}")
        refused += [f"{bench.group}: {peer}: {why}" for peer, why in bench.extra_info.get("refused", {}).items()]
        if "share of ceiling" in bench.extra_info:
            info = bench.extra_info
            work.append(
                f"{bench.group}: {info.get('implementation', bench.name)}: {info['bytes'] / 1e6:.3g} MB, "
                f"{info['operations'] / 1e9:.3g} GFLOP, {info['share of ceiling']:.0%} of the ceiling"
            )
        if "exponent of time" in bench.extra_info:
            taken, held, expected = (
                bench.extra_info[name]
                for name in ("exponent of time", "exponent of memory", "expected exponent of time")
            )
            taken, held = ("none" if found is None else f"{found:.2f}" for found in (taken, held))
            growth.append(f"{bench.group}: time {taken} (expected {expected:g}), memory {held}")
    sections = {
        "interleaved ratios, medians": ratios,
        "bytes that must move, operations, share of this machine's ceiling": work,
        "fitted exponents": growth,
        "refused, not timed": refused,
        "absent, not timed": [
            f"{bench}: {name}: {why}"
            for bench, found in config.stash.get(ABSENT, {}).items()
            for name, why in found.items()
        ],
    }
    for title, lines in sections.items():
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.line(line)
    if not benches:
        terminalreporter.line("nothing was timed", red=True)
    elif not _asked_and_timed(benches):
        terminalreporter.line(f"nothing was timed of --peers {', '.join(timing.selection.peers)}", red=True)
    terminalreporter.line(f"all benches took {time.monotonic() - config.stash[STARTED]:.0f} s")
