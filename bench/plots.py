"""Pictures of what the json files hold: speed-up against prompts and batch, roofline, memory. `python -m bench.report`
makes them; a picture whose numbers nobody measured is not made, and the reason is printed.

What a bench puts into `extra_info` to appear: "speed-up over X" with "prompt_length" and "batch"; `timing.work_info`;
"peak extra bytes" (or "peak bytes") as {implementation: bytes}. "mode", "shape" and "dtype" name the panel.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "vptm"
SPEED_UP = "speed-up over "
# colours that differ for every kind of colour vision (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Timed:
    """One benchmark of one json: `bench` is its file without prefix, `where` the machine, versions and dtype."""

    bench: str
    info: dict[str, Any]
    seconds: float
    where: str


def contents(folder: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(file name, pytest-benchmark content) of every json in `folder`, those inside a gpu_check.json included."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue
        if "machine_info" in content and "benchmarks" in content:
            yield path.name, content
        for stage in content.get("stages", []):
            if "machine_info" in stage.get("result", {}):
                yield path.name, stage["result"]


def machine(content: dict[str, Any]) -> str:
    """Where a json was measured, in a few words."""
    info = content["machine_info"]
    threads = info.get("threads") or content["benchmarks"][0]["extra_info"].get("threads")
    cpu = info.get("cpu", {}).get("brand_raw", "unknown CPU")
    place = info.get("gpu") or (f"{cpu}, {threads} threads" if threads else cpu)
    return f"{place}, torch {info['versions']['torch']}"


def load(folder: Path) -> list[Timed]:
    found = []
    for _, content in contents(folder):
        for run in content["benchmarks"]:
            file = re.search(r"bench_(\w+)\.py", run["fullname"])
            bench = file[1].replace("_", " ") if file else run["fullname"]
            found.append(Timed(bench, run["extra_info"], run["stats"]["median"], machine(content)))
    return found


# ------------------------------------------------------------------ what is drawn

Series = dict[str, list[tuple[float, float]]]
"""Points by the name of their line."""


def speed_ups(runs: Iterable[Timed], against: str) -> dict[str, Series]:
    """By panel and peer: (`against`, ratio); see `_panels`."""

    def values(run: Timed) -> dict[str, float]:
        return {name.removeprefix(SPEED_UP): v for name, v in run.info.items() if name.startswith(SPEED_UP)}

    return _panels(runs, against, values)


def memory(runs: Iterable[Timed], against: str) -> dict[str, Series]:
    """By panel and implementation: (`against`, MiB held at most beyond the inputs)."""

    def values(run: Timed) -> dict[str, float]:
        held = run.info.get("peak extra bytes", run.info.get("peak bytes"))
        return {name: size / 2**20 for name, size in held.items()} if isinstance(held, dict) else {}

    return _panels(runs, against, values)


def _panels(runs: Iterable[Timed], against: str, values: Callable[[Timed], dict[str, float]]) -> dict[str, Series]:
    """Lines of two points or more, by title: one panel per bench, machine, kind of prompts, shape and dtype. Of several
    batches (or numbers of prompts) held fixed it shows the one with most points, of those the largest."""
    fixed = "batch" if against == "prompt_length" else "prompt_length"
    found: dict[tuple[str, str, str], dict[float, Series]] = defaultdict(dict)
    for run in runs:
        if against not in run.info or not (measured := values(run)):
            continue
        for kind in _kinds(run, against):
            series = found[kind, run.bench, run.where].setdefault(run.info.get(fixed, 0), defaultdict(list))
            for name, value in measured.items():
                series[name].append((run.info[against], value))
    panels = {}
    for (kind, bench, where), by_size in sorted(found.items()):
        ordered = {
            size: {name: sorted(dict(points).items()) for name, points in series.items()}
            for size, series in by_size.items()
        }
        size = max(ordered, key=lambda size: (max(map(len, ordered[size].values())), size))
        lines = {name: points for name, points in ordered[size].items() if len(points) > 1}
        if lines:
            said = {"batch": f"batch {size:g}", "prompt_length": f"P = {size:g}"}[fixed] if size else ""
            panels[f"{bench}: {', '.join(filter(None, (kind, said)))}\n{where}"] = lines
    return panels


def _kinds(run: Timed, against: str) -> list[str]:
    info = run.info
    mode = info.get("mode")
    # without prompts there is no kind of prompts: that point begins the line of every kind
    modes = ["deep", "shallow"] if mode == "no" and against == "prompt_length" else [mode]
    shape, dtype = info.get("shape"), str(info.get("dtype", "")).removeprefix("torch.")
    return [", ".join(filter(None, (f"{m} prompts" if m else "", shape, dtype))) for m in modes]


def roofline(runs: Iterable[Timed]) -> dict[str, tuple[Series, float, float]]:
    """By machine: (operations per byte, operations per second) of every implementation, and both ceilings."""
    found: dict[str, tuple[Series, float, float]] = {}
    for run in runs:
        info = run.info
        if not {"bytes", "operations", "measured copy bandwidth", "measured matrix rate"} <= set(info):
            continue
        rate = info.get("achieved rate")
        if rate is None and "microseconds per call" in info:
            rate = info["operations"] / (1e-6 * info["microseconds per call"])
        if rate is None:
            continue
        title = f"{run.bench}\n{run.where}"
        series, bandwidth, ceiling = found.get(title, ({}, 0.0, 0.0))
        series.setdefault(info.get("implementation", OURS), []).append((info["operations"] / info["bytes"], rate))
        found[title] = (
            series,
            max(bandwidth, info["measured copy bandwidth"]),
            max(ceiling, info["measured matrix rate"]),
        )
    return found


# ------------------------------------------------------------------ drawing


def _style() -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e5e5e5",
            "axes.axisbelow": True,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            # the same numbers give the same file
            "svg.hashsalt": "vptm",
            "svg.fonttype": "none",
        }
    )


def _figure(panels: dict[str, Any], draw: Callable[[Axes, Any], None], title: str) -> Figure:
    from matplotlib import pyplot

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.9 * rows + 0.4), squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    for axis, (name, content) in zip(axes.flat, panels.items()):
        axis.set_title(name)
        draw(axis, content)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    return figure


Looks = dict[str, tuple[str, str]]
"""Colour and marker of a line by its name."""


def _lines(axis: Axes, series: Series, looks: Looks, label: str, legend: Any, doubling: bool) -> None:
    for name, points in series.items():
        colour, marker = looks[name]
        axis.plot(*zip(*points), marker=marker, color=colour, markersize=5, linewidth=1.6, label=name)
    highest = max(y for points in series.values() for _, y in points)
    axis.set_ylim(0, 1.08 * max(highest, 1e-12))
    sizes = sorted({x for points in series.values() for x, _ in points})
    if doubling:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.set_xlabel(label)
    axis.legend(fontsize=8, loc=legend)


def _looks(panels: Iterable[Series]) -> Looks:
    """One colour and marker per name in all panels."""
    names = list(dict.fromkeys(name for series in panels for name in series))
    names.sort(key=lambda name: name != OURS)
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


LABELS = {"prompt_length": "prompts P", "batch": "batch"}


def _draw_speed_ups(panels: dict[str, Series], against: str) -> Figure:
    looks = _looks(panels.values())

    def draw(axis: Axes, series: Series) -> None:
        axis.axhline(1, color="#777777", linewidth=1)
        _lines(axis, series, looks, LABELS[against], "lower left", doubling=against == "batch")
        axis.set_ylabel("time of the peer / time of vptm")

    return _figure(panels, draw, f"Speed-up against {LABELS[against]}")


def _draw_memory(panels: dict[str, Series], against: str) -> Figure:
    looks = _looks(panels.values())

    def draw(axis: Axes, series: Series) -> None:
        _lines(axis, series, looks, LABELS[against], "lower right", doubling=False)
        axis.set_ylabel("peak beyond the inputs, MiB")

    return _figure(panels, draw, f"Memory of one call against {LABELS[against]}")


def _draw_roofline(panels: dict[str, tuple[Series, float, float]]) -> Figure:
    looks = _looks(series for series, _, _ in panels.values())

    def draw(axis: Axes, content: tuple[Series, float, float]) -> None:
        series, bandwidth, ceiling = content
        intensities = [x for points in series.values() for x, _ in points]
        low, high = min(*intensities, ceiling / bandwidth) / 2, max(*intensities, ceiling / bandwidth) * 2
        knee = ceiling / bandwidth
        axis.plot([low, knee, high], [low * bandwidth / 1e12, ceiling / 1e12, ceiling / 1e12], color="#777777")
        for name, points in series.items():
            colour, marker = looks[name]
            x, y = zip(*points)
            axis.scatter(x, [rate / 1e12 for rate in y], color=colour, marker=marker, s=28, label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("operations that are needed / byte that must move")
        axis.set_ylabel("Top/s")
        axis.legend(fontsize=8)

    return _figure(panels, draw, "Roofline, ceilings as measured")


def draw(results: Path, out: Path) -> list[Path]:
    """Write `NAME.png` and `NAME.svg` for everything that was measured, and say what was not."""
    from matplotlib import pyplot

    runs = load(results)
    _style()
    pictures: dict[str, tuple[Any, Callable[[Any], Figure]]] = {"roofline": (roofline(runs), _draw_roofline)}
    for against, name in (("prompt_length", "prompts"), ("batch", "batch")):
        pictures[f"speedup_{name}"] = speed_ups(runs, against), partial(_draw_speed_ups, against=against)
        pictures[f"memory_{name}"] = memory(runs, against), partial(_draw_memory, against=against)
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for name, (panels, make) in pictures.items():
        if not panels:
            print(f"{name}: not drawn, no json in {results.name} holds its numbers")
            continue
        figure = make(panels)
        for ending, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            path = out / f"{name}.{ending}"
            temporary = path.with_suffix(f".tmp.{ending}")
            figure.savefig(temporary, **options)
            temporary.replace(path)
            written.append(path)
        pyplot.close(figure)
    return written
