"""Tables and pictures of the studies of accuracy, from their json files: `python -m studies.report`.

Writes `builtin.md` and `claims.md` with their pictures, `prompt_length.md` and `what_prompts_add.md` into
`studies/results/`, and the sentence of `precision.json` into `docs/training.md`; a test fails when a table or that
sentence is not that of its json.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from studies import accuracy_builtin, accuracy_claims, prompt_length
from studies.precision_builtin import PAIR, PRECISIONS
from studies.runs import RESULTS
from studies.trained import ROOM
from vptm import PromptedBEiT

TWIN = ", random weights"


def of_weights(content: dict[str, Any]) -> str:
    """Whether runs are of the built-in model that is shipped, and what that means where they are not."""
    found, shipped = content["weights"], PromptedBEiT("builtin", 2).weight_hash()
    if found == shipped:
        return f"Weights: {found[:19]}, which are shipped."
    return (
        f"**Of an earlier built-in model**, {found[:19]}; shipped is {shipped[:19]}. Its mask row was trained for the "
        "whole image\nand its class row was not, so that what reads the class row is behind for that reason as well. "
        "Not measured again yet."
    )


def builtin(content: dict[str, Any]) -> str:
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
    lines = [
        "# Accuracy of the built-in model",
        "",
        "Made by `python -m studies.report` from `builtin.json`; methods and recipe: `studies/accuracy_builtin.py`.",
        "",
        of_weights(content),
        "",
        f"Test accuracy in %, mean of {seeds} seeds; in brackets the same method on random weights:",
        "",
        f"| method | {' | '.join(complete)} |",
        "|---" * (1 + len(complete)) + "|",
        *rows,
        "",
        f"Paired differences in points with 95 % intervals, {setting}: {differences}.",
        "",
        "![accuracy by setting](builtin.png)",
        "",
    ]
    return "\n".join(lines)


def claims(content: dict[str, Any]) -> str:
    """Every accuracy and paired difference of the study of claims."""
    lines = [
        "# What the papers claim, tried",
        "",
        "Made by `python -m studies.report` from `claims.json`; arms, data and what a verdict means stand in",
        "`studies/accuracy_claims.py`. Test accuracy in %, differences in points, 95 % intervals over paired seeds.",
        "",
        of_weights(content),
        "",
        "![paired differences](claims.png)",
        "",
    ]
    for setting, found in content["summary"].items():
        lines += [f"## {setting}", ""]
        accuracy = found["test_accuracy_percent"]
        extra = {
            title: name
            for title, name in (
                ("information before", "information_before"),
                ("after training", "information_after"),
                ("trained share of the backbone", "trained_share"),
            )
            if any(name in arm for arm in accuracy.values())
        }
        lines += [f"| arm | {' | '.join(['accuracy', 'seeds', *extra])} |", "|---" * (3 + len(extra)) + "|"]
        for arm, values in accuracy.items():
            more = [f"{values[name]:.2%}" if name in values else "" for name in extra.values()]
            lines.append(f"| {arm} | {values['mean']:.1f} | {' | '.join([str(values['seeds']), *more])} |")
        lines += ["", "| difference | claimed | points | verdict |", "|---|---|---|---|"]
        for name, found_here in found["paired_difference_points"].items():
            lines.append(f"| {name} | {found_here['claimed']} | {_points(found_here)} | {found_here['verdict']} |")
        lines.append("")
    return "\n".join(lines)


def _points(found: dict[str, Any]) -> str:
    interval = "one seed" if found["low"] is None else f"[{found['low']:.1f}, {found['high']:.1f}]"
    return f"{found['mean']:+.1f} {interval}"


VERDICTS = {
    "better": "Better: seen here, if it is above zero after Holm's correction for {count} such comparisons; not seen "
    "here, if the interval leaves no room for {room:g} point.",
    "no worse": "No worse: seen here, if the interval stays above -{room:g}; not seen here, if it stays below.",
}


def trained(title: str, program: str, content: dict[str, Any]) -> str:
    """Accuracies and judged differences of a study made of `vptm train` runs."""
    summary = content["summary"]
    differences = [found["paired_difference_points"].values() for found in summary["tasks"].values()]
    asked = {one["asked"] for paired in differences for one in paired}
    rules = " ".join(rule for name, rule in VERDICTS.items() if name in asked)
    said = rules.format(count=summary["comparisons_corrected_for"], room=ROOM)
    lines = [
        f"# {title}",
        "",
        f"Made by `python -m studies.report` from `{program}.json`; arms: `studies/{program}.py`. Test accuracy in %.",
        "",
        of_weights(content),
        "",
        textwrap.fill(
            f"Differences are paired by seed, with 95 % intervals. {said} Else too little data. On a model of 2 "
            "million parameters.",
            120,
        ),
        "",
    ]
    if program in DRAWN:
        lines += [f"![{title}]({program}.png)", ""]
    for task, found in summary["tasks"].items():
        lines += [f"## {task}", "", "| arm | accuracy | seeds |", "|---|---|---|"]
        for arm, values in found["test_accuracy_percent"].items():
            spread = "" if values["std"] is None else f" ± {values['std']:.1f}"
            lines.append(f"| {arm} | {values['mean']:.1f}{spread} | {values['seeds']} |")
        lines += ["", "| difference | asked | points | verdict |", "|---|---|---|---|"]
        for name, one in found["paired_difference_points"].items():
            lines.append(f"| {name} | {one['asked']} | {_points(one)} | {one['verdict']} |")
        lines.append("")
    return "\n".join(lines)


TRAINED = {"prompt_length": "How many prompts do no harm", "what_prompts_add": "What prompts add"}
"""Titles of the studies made of `vptm train` runs, by the name of their json; one that was not begun has none."""
DRAWN = {"prompt_length": prompt_length.plot}

TRAINING = Path(__file__).parent.parent / "docs" / "training.md"
BEGIN, END = "<!-- precision: begin -->", "<!-- precision: end -->"


def precision(content: dict[str, Any]) -> str:
    """What fp32 and bf16 came to, and by how much they differ."""
    accuracy = content["summary"]["test_accuracy_percent"]
    difference = content["summary"]["paired_difference_points"][PAIR]
    used, seeds = content["runs"][0]["settings"], difference["seeds"]
    processor = "with" if content["bfloat16_instructions"] else "without"
    means = " and ".join(f"{accuracy[p]['mean']:.1f} % ± {accuracy[p]['std']:.1f} in {p}" for p in PRECISIONS)
    said = (
        f"On the built-in task ({used['shots']} pictures of each of 10 classes, {used['epochs']} epochs, `vptm train` "
        f"with {seeds} seeds, a CPU {processor} bfloat16 instructions) test accuracy is {means}, mean and standard "
        f"deviation over the seeds. The paired difference {PAIR} is {_points(difference)} points (95 % interval). "
        "`python -m studies.precision_builtin` makes `studies/results/precision.json`, and `python -m studies.report` "
        "this paragraph."
    )
    whole = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), said)  # code is not broken over lines
    return textwrap.fill(whole, 120, break_on_hyphens=False, break_long_words=False).replace("\0", " ")


def updated(page: str) -> str:
    """`page`, docs/training.md, with the text between the markers that of `precision.json`."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    content = json.loads((RESULTS / "precision.json").read_text(encoding="utf-8"))
    return f"{before}{BEGIN}\n{precision(content)}\n{END}{after}"


STUDIES = {"builtin": (builtin, accuracy_builtin.plot), "claims": (claims, accuracy_claims.plot)}
"""How the table and the picture of a study are made, by the name of its json."""


def main() -> None:
    argparse.ArgumentParser(prog="python -m studies.report", description=__doc__).parse_args()
    for name, (table, plot) in STUDIES.items():
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        (RESULTS / f"{name}.md").write_text(table(content), encoding="utf-8")
        plot(content["summary"], RESULTS / f"{name}.png")
        print(f"wrote {RESULTS / name}.md and {name}.png")
    for name, title in TRAINED.items():
        if (RESULTS / f"{name}.json").exists():
            content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            (RESULTS / f"{name}.md").write_text(trained(title, name, content), encoding="utf-8")
            if name in DRAWN:
                DRAWN[name](content["summary"], RESULTS / f"{name}.png")
            print(f"wrote {RESULTS / name}.md")
    TRAINING.write_text(updated(TRAINING.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {TRAINING}")


if __name__ == "__main__":
    main()
