"""Pictures of what the json files hold: speed-up against prompts and batch, roofline, memory. `python -m bench.report`
makes them; a picture whose numbers nobody measured is not made, and the reason is printed.

What a bench puts into `extra_info` to appear: "speed-up over X" and "ratio quartiles" with "prompt_length" and "batch";
`timing.work_info`; "peak extra bytes" (or "peak bytes") as {implementation: bytes}. "model", "mode", "shape" and
"dtype" name the panel, its benchmark group where there is none of the first three.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import peers
from bench.peers import COLOURS, OURS, PEERS
from vptm.weights.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPEED_UP = "speed-up over "
BENCHES = {
    "model": "Inference",
    "training step": "Training step",
    "training throughput": "Training throughput",
    "prompted attention": "Prompted attention",
    "readout attention": "Read-out attention",
    "residual norm": "Residual norm",
    "prototype cosine": "Prototype cosine",
    "task bank": "Task bank",
    "prompt init": "Prompt initialisation",
    "complexity": "Complexity",
    "import": "Import",
}
"""Titles by the name of a bench's file, in the order of the tables."""
SIZES = {"batch": "(?:B=|batch )", "prompt_length": "P=", "classes": "K="}
"""What is counted, by its name in extra_info, and how a group spells it."""


@dataclass(frozen=True)
class Timed:
    """One benchmark of one json: `bench` is its file without prefix, `group` what its implementations share."""

    bench: str
    group: str
    info: dict[str, Any]
    machine: str
    source: str

    @property
    def dtype(self) -> str:
        found = re.search(r"torch\.(\w+)", str(self.info.get("dtype", self.group)))
        return found[1] if found else ""

    @property
    def setting(self) -> str:
        """What was timed, apart from dtype, device and how many images, prompts and classes."""
        info = self.info
        mode = info.get("mode")
        named = [info.get("model"), f"{mode} prompts" if mode else None, info.get("shape")]
        text = ", ".join(filter(None, named)) or self.group
        return re.sub(r",? \b(torch\.\w+|cpu|cuda|[BPK]=\d+|batch \d+)(?=,|\s|$)", "", text)

    @property
    def sizes(self) -> dict[str, float]:
        """Images, prompts and classes, by their names in extra_info, as that or the group says them."""
        found = {name: re.search(rf"\b{spelt}(\d+)", self.group) for name, spelt in SIZES.items()}
        said = {name: float(match[1]) for name, match in found.items() if match}
        return said | {name: self.info[name] for name in SIZES if name in self.info}


Source = tuple[str, dict[str, Any]]
"""Name and content of a json."""


def results_of(content: Any) -> list[dict[str, Any]]:
    """pytest-benchmark results in a json: itself, or those of the stages of a gpu_check.json; none of another file."""
    if not isinstance(content, dict):
        return []
    stages = content.get("stages", [])
    found = [content, *(stage.get("result", {}) for stage in stages)] if isinstance(stages, list) else [content]
    return [result for result in found if {"machine_info", "benchmarks"} <= set(result)]


def contents(folder: Path) -> list[Source]:
    """(path in `folder`, results) of every json that holds some."""
    found: list[Source] = []
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        found += [(path.relative_to(folder).as_posix(), result) for result in results_of(content)]
    return found


def machine(content: dict[str, Any]) -> str:
    """Where a json was measured, in a few words."""
    info = content["machine_info"]
    cpu = info.get("cpu", {}).get("brand_raw", "unknown CPU")
    threads = info.get("threads") or next((run["extra_info"].get("threads") for run in content["benchmarks"]), None)
    place = info.get("gpu") or (f"{cpu}, {threads} threads" if threads else cpu)
    return f"{place}, torch {info['versions']['torch']}"


def load(sources: Iterable[Source]) -> list[Timed]:
    found = []
    for name, content in sources:
        for run in content["benchmarks"]:
            file = re.search(r"bench_(\w+)\.py", run["fullname"])
            bench = file[1].replace("_", " ") if file else run["fullname"]
            found.append(Timed(bench, run["group"] or run["fullname"], run["extra_info"], machine(content), name))
    return found


# ------------------------------------------------------------------ what is drawn


class Point(NamedTuple):
    """`low` and `high` are quartiles, equal to y where only that is known."""

    x: float
    y: float
    low: float
    high: float


Series = dict[str, list[Point]]
"""Points by the name of their line."""


class Panel(NamedTuple):
    bench: str
    title: str
    machine: str


def speed_ups(runs: Iterable[Timed], against: str) -> dict[Panel, Series]:
    """By panel and peer: (`against`, ratio); see `_panels`."""

    def values(run: Timed) -> dict[str, tuple[float, float, float]]:
        found = {name.removeprefix(SPEED_UP): v for name, v in run.info.items() if name.startswith(SPEED_UP)}
        found = {name: v for name, v in found.items() if not name.startswith(f"{OURS} ")}
        quartiles = run.info.get("ratio quartiles", {})
        return {name: (v, *quartiles.get(name, (v, v, v))[::2]) for name, v in found.items()}

    return _panels(runs, against, values)


def memory(runs: Iterable[Timed], against: str) -> dict[Panel, Series]:
    """By panel and implementation: (`against`, MiB held at most beyond the inputs)."""

    def values(run: Timed) -> dict[str, tuple[float, float, float]]:
        held = run.info.get("peak extra bytes", run.info.get("peak bytes"))
        return {name: (size / 2**20,) * 3 for name, size in held.items()} if isinstance(held, dict) else {}

    return _panels(runs, against, values)


SAID = {"batch": "batch ", "prompt_length": "P = ", "classes": "K = "}


def _panels(
    runs: Iterable[Timed], against: str, values: Callable[[Timed], dict[str, tuple[float, float, float]]]
) -> dict[Panel, Series]:
    """One panel per bench, machine, model, kind of prompts, shape and dtype, if it has a line of two points or more.
    Of several other sizes it shows those with most points, of these the largest.

    Raises:
        ValueError: one point was measured twice.
    """
    others = [name for name in SIZES if name != against]
    found: dict[Panel, dict[tuple[float, ...], Series]] = defaultdict(dict)
    sources: dict[tuple[object, ...], str] = {}
    for run in runs:
        if against not in run.sizes or not (measured := values(run)):
            continue
        x, sizes = run.sizes[against], tuple(run.sizes.get(name, 0.0) for name in others)
        # without prompts there is no kind of prompts: that point begins the line of every kind
        kinds = ["deep", "shallow"] if run.info.get("mode") == "no" and against == "prompt_length" else [None]
        for kind in kinds:
            setting = run.setting.replace("no prompts", f"{kind} prompts") if kind else run.setting
            panel = Panel(run.bench, ", ".join(filter(None, (setting, run.dtype))), run.machine)
            series = found[panel].setdefault(sizes, defaultdict(list))
            for name, value in measured.items():
                key = (panel, sizes, name, x)
                if key in sources:
                    raise ValueError(
                        f"{panel.bench}, {panel.title}, {against} {x:g}, {panel.machine}: {name} must be measured "
                        f"once, got it in {sources[key]} and in {run.source}"
                    )
                sources[key] = run.source
                series[name].append(Point(x, *value))
    panels = {}
    for panel, by_sizes in found.items():
        sizes = max(by_sizes, key=lambda sizes: (max(map(len, by_sizes[sizes].values())), sizes))
        lines = {name: sorted(points) for name, points in by_sizes[sizes].items()}
        if any(len(points) > 1 for points in lines.values()):
            said = [f"{SAID[name]}{size:g}" for name, size in zip(others, sizes) if size]
            panels[panel._replace(title=", ".join([panel.title, *said]))] = lines
    return panels


def roofline(runs: Iterable[Timed]) -> dict[Panel, tuple[Series, float, float]]:
    """By bench, dtype and machine: (operations per byte, operations per second) of every implementation, and both
    ceilings."""
    found: dict[Panel, tuple[Series, float, float]] = {}
    for run in runs:
        info = run.info
        if not {"bytes", "operations", "achieved rate", "measured copy bandwidth", "measured matrix rate"} <= set(info):
            continue
        panel = Panel(run.bench, ", ".join(filter(None, (BENCHES.get(run.bench, run.bench), run.dtype))), run.machine)
        series, bandwidth, ceiling = found.get(panel, ({}, 0.0, 0.0))
        rate = info["achieved rate"]
        point = Point(info["operations"] / info["bytes"], rate, rate, rate)
        series.setdefault(info.get("implementation", OURS), []).append(point)
        found[panel] = (
            series,
            max(bandwidth, info["measured copy bandwidth"]),
            max(ceiling, info["measured matrix rate"]),
        )
    return found


# ------------------------------------------------------------------ drawing

Looks = dict[str, tuple[str, str]]
"""Colour and marker of an implementation by its name."""


def looks(names: Iterable[str]) -> Looks:
    """The same in all pictures: as declared, and for who has no look there a colour and marker of its own."""
    known = {name: look for name, peer in PEERS.items() if (look := peer.look) is not None}
    taken = set(known.values())
    others = [(colour, marker) for marker in "*hp<>X" for colour in COLOURS if (colour, marker) not in taken]
    return known | dict(zip(sorted(set(names) - set(known)), cycle(others)))


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
            "axes.titlesize": 9,
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            # the same numbers give the same file
            "svg.hashsalt": "vptm",
            "svg.fonttype": "none",
        }
    )


WIDTH = 8.5


def _figure(panels: dict[Panel, Any], draw: Callable[[Axes, Any], None], title: str) -> Figure:
    """One axis per panel; those of one machine share y. Names of lines stand once, below."""
    from matplotlib import pyplot

    # a page shows it about 850 pixels wide: in three columns nobody could read it
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(WIDTH, 3 * rows + 1), squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    drawn = list(axes.flat)[: len(panels)]
    first: dict[str, Axes] = {}
    for axis, (panel, content) in zip(drawn, panels.items()):
        axis.set_title(f"{panel.title}\n{panel.machine}")
        if panel.machine in first:
            axis.sharey(first[panel.machine])
        first.setdefault(panel.machine, axis)
        draw(axis, content)
    for axis in first.values():
        if axis.get_yscale() == "linear":
            axis.set_ylim(bottom=0)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    handles = {label: handle for axis in drawn for handle, label in zip(*axis.get_legend_handles_labels())}
    names = sorted(handles, key=lambda name: name != OURS)
    figure.legend([handles[name] for name in names], names, loc="outside lower left", ncols=min(3, len(names)))
    return figure


def _lines(axis: Axes, series: Series, shown: Looks, against: str) -> None:
    # what computes less is drawn first, below the peers
    for name, points in sorted(series.items(), key=lambda line: peers.same_function(line[0])):
        colour, marker = shown[name]
        x, y, low, high = zip(*points)
        if low != high:
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(x, y, marker=marker, color=colour, markersize=6, linewidth=1.6, label=peers.title(name))
    sizes = sorted({point.x for points in series.values() for point in points})
    if against == "batch":
        axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel(LABELS[against])


LABELS = {"prompt_length": "prompts P", "batch": "batch"}


def _draw_speed_ups(panels: dict[Panel, Series], shown: Looks, against: str, what: str) -> Figure:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    # from zero on, 1.2x and 30x would not be told apart in one picture
    drawn = [point for series in panels.values() for points in series.values() for point in points]
    wide = max(point.high for point in drawn) > 5

    def draw(axis: Axes, series: Series) -> None:
        axis.axhline(1, color="#777777", linewidth=1)
        if wide:
            axis.set_yscale("log")
        _lines(axis, series, shown, against)
        if wide:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
        place = {"xy": (1, 1), "xycoords": axis.get_yaxis_transform(), "textcoords": "offset points"}
        axis.annotate("1x: as fast as vptm", xytext=(0, -10), ha="right", fontsize=8, color="#555555", **place)
        axis.set_ylabel("time of the peer / time of vptm")

    bands = ", bands are quartiles" if any(point.low != point.high for point in drawn) else ""
    return _figure(panels, draw, f"{what}: speed-up against {LABELS[against]}{bands}")


def _draw_memory(panels: dict[Panel, Series], shown: Looks, against: str, what: str) -> Figure:
    def draw(axis: Axes, series: Series) -> None:
        _lines(axis, series, shown, against)
        axis.set_ylabel("peak beyond the inputs, MiB")

    return _figure(panels, draw, f"{what}: memory of one call against {LABELS[against]}")


def _draw_roofline(panels: dict[Panel, tuple[Series, float, float]], shown: Looks) -> Figure:
    from matplotlib.ticker import NullFormatter

    def draw(axis: Axes, content: tuple[Series, float, float]) -> None:
        series, bandwidth, ceiling = content
        intensities = [point.x for points in series.values() for point in points]
        knee = ceiling / bandwidth
        low, high = min(*intensities, knee) / 2, max(*intensities, knee) * 2
        axis.plot([low, knee, high], [low * bandwidth / 1e12, ceiling / 1e12, ceiling / 1e12], color="#777777")
        for name, points in series.items():
            colour, marker = shown[name]
            x, y = [point.x for point in points], [point.y / 1e12 for point in points]
            axis.scatter(x, y, color=colour, marker=marker, s=28, label=peers.title(name))
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())  # labels of a short axis would run into each other
        axis.set_xlabel("operations needed / byte that must move")
        axis.set_ylabel("Top/s")

    return _figure(panels, draw, "Roofline, ceilings as measured")


def pictures(runs: Iterable[Timed]) -> dict[str, Callable[[], Figure] | None]:
    """What draws each picture, by name; None for a picture without numbers. Benches other than the model's have
    pictures of their own, named after them."""
    runs = list(runs)
    points = roofline(runs)
    drawn = [
        (what, name, against, make, measure(runs, against))
        for against, name in (("prompt_length", "prompts"), ("batch", "batch"))
        for what, measure, make in (("speedup", speed_ups, _draw_speed_ups), ("memory", memory, _draw_memory))
    ]
    lines = [series for *_, panels in drawn for series in panels.values()] + [
        series for series, _, _ in points.values()
    ]
    shown = looks(name for series in lines for name in series)
    found: dict[str, Callable[[], Figure] | None] = {
        "roofline": partial(_draw_roofline, points, shown) if points else None
    }
    for what, name, against, make, panels in drawn:
        found[f"{what}_{name}"] = None
        for bench in dict.fromkeys(panel.bench for panel in panels):
            of_bench = {panel: series for panel, series in panels.items() if panel.bench == bench}
            file = f"{what}_{name}" + ("" if bench == "model" else f"_{bench.replace(' ', '_')}")
            found[file] = partial(make, of_bench, shown, against, BENCHES.get(bench, bench))
    return found


def draw(sources: Iterable[Source], out: Path) -> list[Path]:
    """Write `NAME.png` and `NAME.svg` for everything that was measured, and say what was not."""
    from matplotlib import pyplot

    made = pictures(load(sources))
    _style()
    written = []
    for name, make in made.items():
        if make is None:
            print(f"{name}: not drawn, no json holds its numbers")
            continue
        out.mkdir(parents=True, exist_ok=True)
        figure = make()
        for ending, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            path = out / f"{name}.{ending}"
            with replacing(path) as temporary:
                figure.savefig(temporary, format=ending, **options)
            written.append(path)
        pyplot.close(figure)
    return written
