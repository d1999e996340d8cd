"""What every bench shares: what is asked for, where it ran, and the interleaved ratios below pytest-benchmark's tables.

    pytest bench/ --benchmark-only --device cuda --dtype bfloat16,float16 --peers "sdpa efficient,flex compiled"

What is asked for and not here is skipped by name; a run that times nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench import timing

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# parameters of bench functions whose values are names of implementations
IMPLEMENTATION = ("implementation", "name", "peer")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vptm benches")
    group.addoption("--device", choices=("cpu", "cuda"), help="where to time (default: a GPU if there is one)")
    group.addoption("--dtype", metavar="NAMES", help=f"comma separated, of {', '.join(DTYPES)}")
    group.addoption("--peers", metavar="NAMES", help="comma separated; vptm itself always runs (default: all)")
    group.addoption("--grid", choices=("small", "full"), help="shapes (default: full on a GPU, small on a CPU)")


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def pytest_configure(config: pytest.Config) -> None:
    default = timing.Selection()
    device = config.getoption("--device") or default.device
    names = _split(config.getoption("--dtype"))
    if unknown := set(names) - set(DTYPES):
        raise pytest.UsageError(f"--dtype must be of {', '.join(DTYPES)}, got {', '.join(sorted(unknown))}")
    fallback = (torch.bfloat16 if device == "cuda" else torch.float32,)
    grid = config.getoption("--grid") or ("full" if device == "cuda" else "small")
    dtypes = tuple(DTYPES[name] for name in names) or fallback
    timing.select(timing.Selection(device, dtypes, _split(config.getoption("--peers")), grid == "full"))


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
    for item in items:
        if reason := _why_not(item):
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_not(item: pytest.Item) -> str | None:
    """What was asked for and this bench cannot time."""
    if reason := timing.selection.missing():
        return reason
    module, name = getattr(item, "module", None), _implementation(item)
    peer = getattr(module, "PEERS", {}).get(name)
    if isinstance(peer, timing.Peer) and (needed := peer.missing()):
        return f"{name}: {needed}"
    # a bench that times on one device or in one dtype says which
    device, dtype = getattr(module, "DEVICE", None), getattr(module, "DTYPE", None)
    if device not in (None, timing.selection.device):
        return f"device {timing.selection.device} is not timed by {item.path.name}, {device} is"
    if dtype is not None and dtype not in timing.selection.dtypes:
        asked = ", ".join(str(wanted).removeprefix("torch.") for wanted in timing.selection.dtypes)
        return f"dtype {asked} is not timed by {item.path.name}, {str(dtype).removeprefix('torch.')} is"
    return None


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which nothing was timed must not look like one in which everything was well."""
    timed = getattr(getattr(session.config, "_benchmarksession", None), "benchmarks", [])
    if exitstatus == pytest.ExitCode.OK and not timed and not session.config.getoption("collectonly"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info |= timing.environment()
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
    machine["cpu"] = {name: machine["cpu"][name] for name in ("brand_raw", "count", "arch") if name in machine["cpu"]}


def command(arguments: Sequence[str | object]) -> str:
    """The command that made a json, without the folders of whoever ran it."""
    return " ".join(["pytest", *(re.sub(r"(?<![\w.])/[^\s=]*/", "", str(argument)) for argument in arguments)])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    ratios, refused, growth, work = [], [], [], []
    benches = getattr(session, "benchmarks", [])
    for bench in benches:
        found = {name: value for name, value in bench.extra_info.items() if name.startswith("speed-up over ")}
        if found:
            text = ", ".join(f"{value:.2f}x {name.removeprefix('speed-up ')}" for name, value in found.items())
            ratios.append(f"{bench.group}: {text}")
        refused += [f"{bench.group}: {peer}: {why}" for peer, why in bench.extra_info.get("refused", {}).items()]
        if "share of ceiling" in bench.extra_info:
            info = bench.extra_info
            work.append(
                f"{bench.group}: {info.get('implementation', bench.name)}: {info['bytes'] / 1e6:.1f} MB, "
                f"{info['operations'] / 1e9:.2f} GFLOP, {info['share of ceiling']:.0%} of the ceiling"
            )
        if "exponent of time" in bench.extra_info:
            time, memory, expected = (
                bench.extra_info[name]
                for name in ("exponent of time", "exponent of memory", "expected exponent of time")
            )
            time, memory = ("none" if found is None else f"{found:.2f}" for found in (time, memory))
            growth.append(f"{bench.group}: time {time} (expected {expected:g}), memory {memory}")
    sections = {
        "interleaved ratios, medians": ratios,
        "bytes that must move, operations, share of this machine's ceiling": work,
        "fitted exponents": growth,
        "refused, not timed": refused,
    }
    for title, lines in sections.items():
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.line(line)
    if not benches and not config.getoption("collectonly"):
        terminalreporter.line("nothing was timed", red=True)
