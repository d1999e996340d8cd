"""Write the measured results into the README and draw them: `python -m bench.report` after a bench run has stored its
json.

    pytest bench/bench_model.py --benchmark-only --benchmark-json bench/results/inference_cpu.json
    python -m bench.report

The text between the result markers of README.md is made here from `bench/results/` and nowhere else; a test fails when
they differ.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench import plots

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# what stands in the README, by bench
TABLES = {"bench_model": "Inference", "bench_training_step": "Training step"}
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


PEER_TITLES = {"concatenation": "concatenated prompts", "timm without prompts": "timm without any prompt"}
RATIO = "speed-up over "


def _ratio_tables(content: dict[str, Any], bench: str, what: str) -> list[str]:
    """One table of a bench file's results for every batch and dtype: prompts by peers, ratios of interleaved runs."""
    runs = [run["extra_info"] for run in content["benchmarks"] if f"{bench}.py" in run["fullname"]]
    runs = [info for info in runs if any(name.startswith(RATIO) for name in info)]
    machine = content["machine_info"]
    lines: list[str] = []
    for batch, dtype in dict.fromkeys((info["batch"], info["dtype"]) for info in runs):
        rows = [info for info in runs if (info["batch"], info["dtype"]) == (batch, dtype)]
        peers = list(dict.fromkeys(name for info in rows for name in info if name.startswith(RATIO)))
        peers.sort(key=lambda name: name.removeprefix(RATIO) not in PEER_TITLES)
        peers.sort(key=lambda name: "without" in name)
        titles = [f"vptm over {PEER_TITLES.get(name := peer.removeprefix(RATIO), name)}" for peer in peers]
        threads = machine.get("threads") or rows[0].get("threads")
        where = machine["gpu"] or f"{machine['cpu']['brand_raw']}, {threads} threads"
        lines += [
            f"{what} of {rows[0].get('model', 'BEiT-B/16 at 224')}, batch {batch}, {dtype.removeprefix('torch.')}, "
            f"random weights, {where}, torch {machine['versions']['torch']}; ratios of interleaved runs:",
            "",
            f"| prompts | {' | '.join(titles)} |",
            "|---" * (1 + len(peers)) + "|",
        ]
        for info in rows:
            prompts = "none" if info["prompt_length"] == 0 else f"{info['mode']}, P = {info['prompt_length']}"
            cells = [f"{info[peer]:.2f}x" if peer in info else "" for peer in peers]
            lines.append(f"| {prompts} | {' | '.join(cells)} |")
        lines.append("")
    return lines


TWIN = ", random weights"


def _accuracy_lines(content: dict[str, Any]) -> list[str]:
    """Methods by settings, each twin of random weights in brackets, and the paired differences at the first setting."""
    summary = content["summary"]
    found = {setting: values["test_accuracy_percent"] for setting, values in summary.items()}
    # a method that has not run all the seeds yet is no fair neighbour of one that has
    seeds = max(value["seeds"] for accuracy in found.values() for value in accuracy.values())
    complete = {s: {m: v["mean"] for m, v in accuracy.items() if v["seeds"] == seeds} for s, accuracy in found.items()}
    complete = {setting: accuracy for setting, accuracy in complete.items() if "vptm" in accuracy}
    methods = list(dict.fromkeys(m for accuracy in complete.values() for m in accuracy if not m.endswith(TWIN)))
    rows = []
    for method in methods:
        cells = []
        for accuracy in complete.values():
            twin = f" ({accuracy[method + TWIN]:.1f})" if method + TWIN in accuracy else ""
            cells.append(f"{accuracy[method]:.1f}{twin}" if method in accuracy else "")
        rows.append(f"| {method} | {' | '.join(cells)} |")
    setting = "fashion-mnist, 16 shots"
    differences = "; ".join(
        f"{names} {value['mean']:+.1f} [{value['low']:.1f}, {value['high']:.1f}]"
        for names, value in summary[setting]["paired_difference_points"].items()
        if value["low"] is not None and value["seeds"] == seeds and names.startswith("vptm - ")
    )
    return [
        f"Built-in model, test accuracy in %, mean of {seeds} seeds; in brackets the same method on random weights:",
        "",
        f"| method | {' | '.join(complete)} |",
        "|---" * (1 + len(complete)) + "|",
        *rows,
        "",
        f"Paired differences in points with 95 % intervals, {setting}: {differences}.",
    ]


def section() -> str:
    """The README text between the markers, from the json files that are there."""
    lines: list[str] = []
    for bench, what in TABLES.items():
        for _, content in plots.contents(RESULTS):
            lines += _ratio_tables(content, bench, what)
    accuracy = RESULTS / "accuracy" / "builtin.json"
    if accuracy.is_file():
        lines += [*_accuracy_lines(json.loads(accuracy.read_text(encoding="utf-8"))), ""]
    return "\n".join(lines)


def updated(readme: str) -> str:
    """`readme` with the text between the markers replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section()}{END}{after}"


# ------------------------------------------------------------------ claims

_GPU = re.compile(r"\bGPUs?\b|\bCUDA graphs?\b|\b(?:A|H|B|L|V)\d{2,3}S?\b|\bMI\d{3}X?\b|\bRTX\b|TFLOP/s|TB/s")
# a time, a rate, a ratio or a share; not a size, which a download has as well
_FIGURE = re.compile(r"\d(?:[\d.,]*\d)?\s?(?:x\b|×|[µmn]s\b|us\b|TFLOP/s|[GT]B/s|%|images/s|times\b|-fold)")


def unsupported_claims(readme: str) -> list[str]:
    """Sentences and table rows with a measured GPU figure that stand outside the result markers, where no json is
    behind them, and GPUs named inside that no json was measured on."""
    before, rest = readme.split(BEGIN)
    inside, after = rest.split(END)
    found = []
    for text in (before, after):
        # of code, only what is said in comments could be a claim; those are outputs and shapes
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for paragraph in re.split(r"\n\s*\n|\n(?=[|\-*#])", prose):
            for sentence in re.split(r"(?<=[.;!?])\s", " ".join(paragraph.split())):
                if _GPU.search(sentence) and _FIGURE.search(sentence):
                    found.append(sentence)
    measured = {content["machine_info"].get("gpu") for _, content in plots.contents(RESULTS)} - {None}
    named = re.findall(r"\b(?:NVIDIA|AMD|Tesla) [A-Z][\w-]*(?: [A-Z\d][\w-]*)?", inside)
    return found + [f"{name}: no json was measured on it" for name in named if not any(name in gpu for gpu in measured)]


def evidence_missing(content: dict[str, Any]) -> list[str]:
    """What a json measured on a GPU must say and does not: where, with what, by which command, and of which commit."""
    machine = content["machine_info"]
    wanted = {
        "driver and clocks": machine.get("gpu state"),
        "command": machine.get("command"),
        "commit": machine.get("commit"),
        "torch version": machine.get("versions", {}).get("torch"),
        "triton version": machine.get("versions", {}).get("triton"),
    }
    return [] if machine.get("gpu") is None else [name for name, value in wanted.items() if not value]


def main() -> None:
    path = ROOT / "README.md"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
    temporary.replace(path)
    print(f"wrote the result section of {path}")
    for picture in plots.draw(RESULTS, RESULTS / "plots"):
        print(f"wrote {picture.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
