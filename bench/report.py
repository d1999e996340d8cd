"""Tables and pictures of measured results: `python -m bench.report` after a bench run has stored its json.

    pytest bench/ --benchmark-only --grid full --benchmark-json bench/results/cpu.json
    python -m bench.report                            # README, bench/results/results.md and bench/results/plots
    python -m bench.report mine.json                  # tables of a run of your own, on the terminal
    python -m bench.report mine.json --out report     # the same in report/results.md, and its pictures
    python -m bench.report --against bench/results/cpu.json mine.json   # names every ratio that fell; status 1 if any

The text between the result markers of README.md and `bench/results/results.md` are made here from `bench/results/` and
nowhere else; a test fails when they differ.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import against, peers, plots
from bench.plots import BENCHES, OURS, SPEED_UP, Source, Timed
from vptm.weights.files import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
TABLES = "results.md"
LINK = f"bench/results/{TABLES}"
# tabled by prompts
MODELS = ("model", "training step")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

LEGEND = (
    "Speed-up: time of the peer over that of vptm, median of the ratios of interleaved runs. "
    "Memory: that of vptm over the peer's. "
    "VPTM: mask row, token head and prototypes, from images to class scores; otherwise VPT's class row, in inference "
    "without a head. The defaults: those of `vptm.PromptedBEiT`."
)

# ------------------------------------------------------------------ tables

Info = dict[str, Any]


def _times(value: float) -> str:
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x" if value >= 0.1 else f"{value:.3f}x"


def _duration(microseconds: float) -> str:
    return f"{microseconds / 1000:.1f} ms" if microseconds >= 1000 else f"{microseconds:.1f} µs"


def _exponent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


# columns that compare with no peer: name in extra_info, heading, how its value is written
OTHERS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("microseconds per image", "time per image", _duration),
    ("share of ceiling", "share of ceiling", "{:.0%}".format),
    ("images per second", "images/s", "{:.3g}".format),
    ("seconds beyond torch", "beyond torch", "{:.2f} s".format),
    ("expected exponent of time", "exponent of time, expected", _exponent),
    ("exponent of time", "exponent of time", _exponent),
    ("exponent of memory", "exponent of memory", _exponent),
)


def _shares(info: Info, what: str) -> dict[str, float]:
    """Bytes of vptm over those of each peer: "saved" for backward, or at the "peak"."""
    keys = ("bytes saved for backward",) if what == "saved" else ("peak bytes", "peak extra bytes")
    held = next((info[key] for key in keys if isinstance(info.get(key), dict)), {})
    if OURS in held:
        return {peer: held[OURS] / size for peer, size in held.items() if peer != OURS and size}
    # a run that counted the bytes of vptm alone says the share itself
    starts = (f"{what} over ", "memory over ") if what == "peak" else (f"{what} over ",)
    return {
        name.removeprefix(start): share for start in starts for name, share in info.items() if name.startswith(start)
    }


def _speed_up(info: Info, peer: str) -> str:
    if SPEED_UP + peer not in info:
        return ""
    quartiles = info.get("ratio quartiles", {}).get(peer)
    spread = f" [{_times(quartiles[0])}, {_times(quartiles[2])}]" if quartiles else ""
    return _times(info[SPEED_UP + peer]) + spread


def _of_forms(infos: Sequence[Info], names: Sequence[str]) -> dict[str, list[str]]:
    """Cells of other forms of vptm: speed-ups over peers that are run alike, and their time over that of vptm."""
    found = {}
    for form in dict.fromkeys(form for info in infos for form in info.get("forms", {})):
        for peer in (name for name in names if peers.alike(form, name)):
            ratios = [info.get("forms", {}).get(form, {}).get(peer) for info in infos]
            if any(ratios):
                cells = [_times(each[1]) if each else "" for each in ratios]
                found[f"speed-up of {form} over {peers.title(peer)}"] = cells
        taken = [info.get(SPEED_UP + form) for info in infos]
        found[f"time of {form} over that of vptm"] = [_times(each) if each else "" for each in taken]
    return found


def _ordered(names: Iterable[str]) -> list[str]:
    """Those with a title first, what computes less, and so is no peer, last."""

    def place(name: str) -> tuple[bool, bool]:
        return not peers.same_function(name), peers.declared(name).title is None

    return sorted(dict.fromkeys(names), key=place)


def _peers(infos: Iterable[Info]) -> list[str]:
    timed = _ordered(name.removeprefix(SPEED_UP) for info in infos for name in info if name.startswith(SPEED_UP))
    return [peer for peer in timed if not peer.startswith(f"{OURS} ")]


def _columns(infos: Sequence[Info]) -> dict[str, list[str]]:
    """Cells by heading."""
    compared = _peers(infos)
    found = {f"speed-up over {peers.title(peer)}": [_speed_up(info, peer) for info in infos] for peer in compared}
    found |= _of_forms(infos, compared)
    for what, heading in (("saved", "bytes kept for backward"), ("peak", "peak memory")):
        shares = [_shares(info, what) for info in infos]
        for peer in _ordered(peer for share in shares for peer in share):
            cells = [_times(share[peer]) if peer in share else "" for share in shares]
            found[f"{heading} over {peers.title(peer)}"] = cells
    for key, heading, write in OTHERS:
        if any(key in info for info in infos):
            found[heading] = [write(info[key]) if key in info else "" for info in infos]
    medians = [info.get("microseconds", {}).get(OURS) for info in infos]
    if any(medians):
        found["median time of vptm"] = [_duration(median[1]) if median else "" for median in medians]
    return found


def _label(run: Timed) -> str:
    """The first cell of a row: kind and number of prompts, or what the group says beyond the table's title."""
    if run.bench in MODELS:
        length = run.info["prompt_length"]
        note = f" ({run.info['note']})" if "note" in run.info else ""
        return "none" if length == 0 else f"{run.info['mode']}, P = {length}{note}"
    text = re.sub(r",? \b(torch\.\w+|cpu|cuda)\b", "", run.group)
    return text.removeprefix(f"{run.bench}, ").removeprefix(f"{run.bench} in ")


def _tables(source: Source, bench: str) -> list[str]:
    """The tables of one bench in one json: of whole models one for every model, batch and dtype, else for every dtype.

    Raises:
        ValueError: one setting was measured twice.
    """
    where, what = plots.machine(source[1]), BENCHES.get(bench, bench)
    runs = [run for run in plots.load([source]) if run.bench == bench]
    held: dict[str, dict[str, int]] = {}
    for run in runs:
        # implementations timed one by one say their own bytes
        if isinstance(sizes := run.info.get("peak extra bytes"), dict):
            held[run.group] = held.get(run.group, {}) | sizes
    tables: dict[str, list[tuple[str, Info]]] = {}
    for run in runs:
        if run.info.get("implementation", OURS) != OURS or not _columns([run.info]):
            continue
        title = f"{what}, {run.dtype}, {where}" if run.dtype else f"{what}, {where}"
        if bench in MODELS:
            model = run.info.get("model", "a model without a name")
            title = f"{what} of {model}, batch {run.info['batch']}, {run.dtype}, random weights, {where}"
        rows, label = tables.setdefault(title, []), _label(run)
        if label in dict(rows):
            raise ValueError(f"{title}: {label!r} must be measured once, got it twice in {source[0]}")
        rows.append((label, run.info | ({"peak extra bytes": held[run.group]} if run.group in held else {})))
    lines: list[str] = []
    for title, rows in tables.items():
        columns = _columns([info for _, info in rows])
        lines += [
            f"{title}:",
            "",
            f"| {'prompts' if bench in MODELS else 'case'} | {' | '.join(columns)} |",
            "|---" * (1 + len(columns)) + "|",
            *(f"| {' | '.join(cells)} |" for cells in zip([label for label, _ in rows], *columns.values())),
            "",
        ]
    refused = {f"{run.group}: {peer}: {why}" for run in runs for peer, why in run.info.get("refused", {}).items()}
    return lines + (["Refused, not timed:", "", *(f"- {line}" for line in sorted(refused)), ""] if refused else [])


def _benches(sources: Iterable[Source]) -> list[str]:
    """In the order of the tables."""
    found = dict.fromkeys(run.bench for run in plots.load(sources))
    return sorted(found, key=lambda bench: list(BENCHES).index(bench) if bench in BENCHES else len(BENCHES))


def tables(sources: Sequence[Source]) -> str:
    """Everything that was measured, by json, with the machine it was measured on."""
    ceiling = (
        "Share of ceiling: time that the copy bandwidth and matrix rate measured in the same run allow, over the time"
    )
    lines = [
        "# Measured results",
        "",
        f"Made by `python -m bench.report`. {LEGEND} {ceiling} taken. Quartiles stand in brackets.",
        "",
    ]
    for source in sources:
        name, content = source
        machine = content["machine_info"]
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items() if version)
        state = [f"{what} {value}" for what, value in (machine.get("gpu state") or {}).items()]
        lines += [f"## {name}", "", f"{plots.machine(content).rsplit(', torch', 1)[0]}; {versions}.", ""]
        for dtype, rates in (machine.get("matrix rates") or {}).items():
            said = ", ".join(f"{library} {rate / 1e9:.0f}" for library, rate in rates.items())
            state.append(f"{dtype.removeprefix('torch.')} products by {said} GFLOP/s")
        if load := machine.get("load average"):
            state.append(f"load average before {load[0]:g}")
        lines += [f"{', '.join(state)}.", ""] if state else []
        lines += [f"Commit {machine.get('commit') or 'unknown'}, `{machine.get('command') or 'command unknown'}`.", ""]
        for bench in _benches([source]):
            lines += _tables(source, bench)
    return "\n".join(lines)


def one_commit(sources: Iterable[Source]) -> None:
    """Figures of several commits side by side would be a product that nobody can check out.

    Raises:
        ValueError: what was measured on one machine is of several commits.
    """
    found: dict[str, dict[str, str]] = {}
    for name, content in sources:
        machine = content["machine_info"]
        place = machine.get("gpu") or machine.get("cpu", {}).get("brand_raw", "unknown CPU")
        found.setdefault(place, {})[machine.get("commit") or "unknown"] = name
    for place, commits in found.items():
        if len(commits) > 1:
            said = ", ".join(f"{commit[:10]} in {name}" for commit, name in commits.items())
            raise ValueError(f"results of {place} must be of one commit, got {said}")


# the lines of the README: bench, whether it is VPTM's own read-out, and what it is called there
HEADLINES = (
    ("model", False, "Inference"),
    ("training step", False, "Training step"),
    ("model", True, "VPTM itself, inference"),
    ("training step", True, "VPTM itself, training step"),
)


def _headline(title: str, run: Timed) -> str:
    """Over prompts concatenated and over the peer that comes closest, whichever it is."""
    info, held = run.info, _shares(run.info, "peak")
    same = [peer for peer in _peers([info]) if peers.same_function(peer)]
    first, closest = same[0], min(same, key=lambda peer: info[SPEED_UP + peer])
    said = [f"**{_times(info[SPEED_UP + first])}** as fast as {peers.title(first)}"]
    if closest != first:
        said.append(f"{_times(info[SPEED_UP + closest])} as fast as the closest peer ({peers.title(closest)})")
    if first in held:
        said.append(f"{_times(held[first])} of the memory")
    return f"- {title}, {_label(run)}, batch {info['batch']}: {', '.join(said)}"


def section() -> str:
    """The README text between the markers: the first setting of every bench of a whole model, as benches run what
    matters most first; on the first GPU that was measured, then on the first other machine.

    Raises:
        ValueError: see `one_commit`.
    """
    sources = plots.contents(RESULTS)
    one_commit(sources)
    on_gpu = [source for source in sources if source[1]["machine_info"].get("gpu")]
    others = [source for source in sources if source not in on_gpu]
    parts = [part for group in (on_gpu, others) if (part := next(filter(None, map(_machine, group)), None))]
    if not parts:
        return "Nothing has been measured yet.\n"
    return "\n".join([*parts, *([] if on_gpu else ["Speed on a GPU is not yet measured.", ""])])


def _machine(source: Source) -> str | None:
    """What one machine gave; None where no whole model was compared on it."""
    runs = [run for run in plots.load([source]) if run.info.get("implementation", OURS) == OURS]
    found = []
    for bench, own, title in HEADLINES:
        whole = [run for run in runs if run.bench == bench and str(run.info.get("model")).startswith("VPTM") == own]
        compared = [run for run in whole if any(peers.same_function(peer) for peer in _peers([run.info]))]
        if compared:
            found.append((title, compared[0]))
    if not found:
        return None
    first, commit = found[0][1], str(source[1]["machine_info"].get("commit"))[:10]
    return "\n".join(
        [
            f"{first.info.get('model')}, {first.dtype}, random weights, on {first.machine}, commit {commit} "
            f"([every setting]({LINK})):",
            "",
            *(_headline(title, run) for title, run in found),
            "",
        ]
    )


def updated(readme: str) -> str:
    """`readme` with the text between the markers replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section()}{END}{after}"


# ------------------------------------------------------------------ claims

_GPU = re.compile(
    r"\b(?:[A-Z]?[AHBLV]\d{2,3}S?|P100|[TL]4|MI\d{2,3}[AX]?|[RG]TX|[DH]GX|gfx\d\w+|sm_?\d{2,3}a?)\b"
    r"|\b(?:Hopper|Blackwell|Ampere|Ada|Turing|Volta|CDNA)\b|TFLOP|[TP]B/s"
    r"|(?i:\b(?:GPUs?|CUDA|NVIDIA|GeForce|Radeon|Instinct|tensor cores?|graphics cards?)\b)"
)
_NUMBER = r"(?:\d[\d.,]*|\b(?:two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|fifty|hundred))"
_UNIT = (
    r"(?:x\b(?! ?\d)|×|%|percent\b|times\b|-?fold\b"
    r"|(?:[µμmnu]?s|(?:micro|milli|nano)?sec(?:ond)?s?|min(?:ute)?s?|hours?)\b"
    r"|[GTP]?FLOPS?\b|[GT]op/s|\w+/s\b|\w+ per second\b)"
)
# a time, a rate, a ratio or a share; not a size, which a download has as well
_FIGURE = re.compile(
    rf"{_NUMBER}[\s-]?{_UNIT}"
    r"|\b(?:twice|thrice|double|triple|half|a third) (?:as|of)? ?(?:the )?(?:fast|speed|time|rate)",
    re.IGNORECASE,
)
# beside these words a number needs no unit
_SPEED = re.compile(rf"speed-?ups?\b|\b(?:faster|slower|quicker|latency|throughput)\b|[|(,] ?{_UNIT}", re.IGNORECASE)


def _pieces(block: str) -> list[str]:
    """Sentences; of a table its rows, each with the header."""
    lines = [line for line in block.splitlines() if line.lstrip().startswith("|")]
    prose = [line for line in block.splitlines() if line not in lines]
    found = re.split(r"(?<=[.;!?])\s|\s(?=[-*] )", " ".join(" ".join(prose).split()))
    return found + ([lines[0], *(f"{lines[0]} {line}" for line in lines[1:])] if lines else [])


def _blocks(markdown: str) -> list[tuple[str, str]]:
    """(text, what it stands under) of every paragraph, list, table and code block of a markdown text.

    Under: the headings above it and, for a list, a table or code, the paragraph before. Of program code only comments
    are text; the rest are calls, outputs and shapes.
    """
    found: list[tuple[str, str]] = []
    headings: dict[int, str] = {}
    paragraph = ""
    for block in re.findall(r"^```[^`]*^```$|^#+ [^\n]*|(?:^(?!```|#+ )[^\n]*\S[^\n]*\n?)+", markdown, re.MULTILINE):
        if (heading := re.match(r"(#+) ", block)) is not None:
            level = len(heading[1])
            headings = {above: text for above, text in headings.items() if above < level} | {level: block}
            paragraph = ""
            continue
        program = re.match(r"```(?:bash|sh|python|py)\b", block)
        text = "\n".join(re.findall(r"(?:^|\s)#(.*)", block, re.MULTILINE)) if program else block
        led = block.startswith(("```", "|", "- ", "* ", "1.")) or paragraph.rstrip().endswith(":")
        found.append((text, "\n".join([*headings.values(), paragraph if led else ""])))
        paragraph = "" if led else block
    return found


def unsupported_claims(readme: str) -> list[str]:
    """Paragraphs, lists, tables and comments of code with a figure of speed that name a GPU or stand under one, outside
    of the result markers, where no json is behind them; and GPUs named inside that no json was measured on.

    A figure in a sentence or row about a CPU that names no GPU is none.
    """
    before, rest = readme.split(BEGIN)
    inside, after = rest.split(END)
    found = []
    for text, under in _blocks(f"{before}\n\n{after}"):
        if _GPU.search(f"{under}\n{text}") and any(
            _FIGURE.search(piece) or (_SPEED.search(piece) and re.search(_NUMBER, piece))
            for piece in _pieces(text)
            if _GPU.search(piece) or "CPU" not in piece
        ):
            found.append(" ".join(text.split()))
    machines = [content["machine_info"] for _, content in plots.contents(RESULTS)]
    measured = [str(machine.get("gpu") or machine.get("cpu", {}).get("brand_raw")) for machine in machines]
    named = re.findall(r"\b(?:NVIDIA|AMD|Tesla) [A-Z][\w-]*(?: [A-Z\d][\w-]*)?", inside)
    return found + [f"{name}: no json was measured on it" for name in named if not any(name in one for one in measured)]


def evidence_missing(content: dict[str, Any]) -> list[str]:
    """What a json must say and does not: with what, by which command and of which commit, without changes to it, it was
    measured; on a GPU also its driver and clocks."""
    machine = content["machine_info"]
    wanted = {
        "command": machine.get("command"),
        "commit": machine.get("commit"),
        "torch version": machine.get("versions", {}).get("torch"),
        "processor": machine.get("gpu") or machine.get("cpu", {}).get("brand_raw"),
        "commit without changes": not str(machine.get("commit")).endswith("+"),
    }
    if machine.get("gpu") is not None:
        wanted |= {
            "driver and clocks": machine.get("gpu state"),
            "triton version": machine.get("versions", {}).get("triton"),
        }
    return [name for name, value in wanted.items() if not value]


# ------------------------------------------------------------------ command


def read(path: Path) -> list[Source]:
    """The results in one json.

    Raises:
        ValueError: there is no such file, or it holds no results of these benches.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"JSON must be a file that can be read, got {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"JSON must be a json file, got {path}: {error}") from None
    found = [(path.name, result) for result in plots.results_of(content) if result["benchmarks"]]
    if not found or any("versions" not in result["machine_info"] for _, result in found):
        raise ValueError(f"JSON must hold timings of bench/ (--benchmark-json), {path} does not")
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", nargs="*", type=Path, metavar="JSON", help="of a bench run, or of bench.gpu_check")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write {TABLES} and pictures of the JSONs there")
    parser.add_argument("--against", type=Path, metavar="BASELINE", help="an earlier json: exit with 1 if a ratio fell")
    options = parser.parse_args(argv)
    if options.out is not None and not options.json:
        parser.error("--out needs a JSON: without one, the README and bench/results are written")
    if options.against is not None and (not options.json or options.out is not None):
        parser.error("--against needs a JSON to compare, and no --out")
    try:
        if options.against is not None:
            said, held = against.lines(
                read(options.against), [source for path in options.json for source in read(path)]
            )
            print(*said, sep="\n")
            return 0 if held else 1
        sources = [source for path in options.json for source in read(path)] or plots.contents(RESULTS)
        text = tables(sources)
        if not options.json:
            readme = ROOT / "README.md"
            _write(readme, updated(readme.read_text(encoding="utf-8")))
        elif options.out is None:
            print(text)
            return 0
        out = options.out or RESULTS
        _write(out / TABLES, text)
        drawn = plots.draw(sources, out if options.json else out / "plots")
        print(*(f"wrote {picture}" for picture in drawn), sep="\n")
        if not options.json:
            for stale in set((out / "plots").glob("*.*")) - set(drawn):
                stale.unlink()
                print(f"removed {stale}, no json holds its numbers")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
