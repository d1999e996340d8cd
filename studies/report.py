"""Tables and pictures of the studies of accuracy, from their json files: `python -m studies.report`.

Writes `prompt_length.md` with its picture, `what_prompts_add.md`, `published_methods.md`, `plain_twin.md` and
`label_mapping.md` into `studies/results/`, the sentences of `precision.json` into `docs/training.md` and the built-in
model's card, and what prompts add into `README.md`; a test fails when a table or one of these texts is not that of its
json.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from studies import prompt_length, what_prompts_add
from studies.plain_twin import WEIGHTS
from studies.precision_builtin import PAIR, PRECISIONS
from studies.runs import RESULTS, ROOM, builtin_weights


def of_weights(content: dict[str, Any]) -> str:
    """Whether runs are of the built-in model that is shipped."""
    found, shipped = content["weights"], builtin_weights()
    if found == shipped:
        return f"Weights: {found[:19]}, which are shipped."
    return f"**Of an earlier built-in model**, {found[:19]}; shipped is {shipped[:19]}. Not measured again yet."


def of_twin(content: dict[str, Any]) -> str:
    """Of which weights runs of the plain twin are."""
    return (
        f"Weights: {content['weights'][:19]}, `{WEIGHTS.name}`, of a twin of the built-in model pre-trained by "
        "`python tools/pretrain_builtin.py train --bag-weight 0`: no row was trained to know the whole image."
    )


def made_by(content: dict[str, Any]) -> str:
    """By which commands runs were made, where each says it for itself."""
    origins: Counter[str] = Counter()
    for run in content["runs"]:
        program = "" if run["command"].startswith("python -m studies.") else ", an earlier program with these arms"
        versions = f"vptm {run['versions']['vptm']}, torch {run['versions']['torch']}"
        origins[f"`{run['command']}`{program}; {versions}, commit {run['commit'] or 'not recorded'}."] += 1
    return "\n".join(f"Runs: {count} by {origin}" for origin, count in origins.items())


def _points(found: dict[str, Any]) -> str:
    interval = "one seed" if found["low"] is None else f"[{found['low']:.1f}, {found['high']:.1f}]"
    return f"{round(found['mean'], 1) + 0.0:+.1f} {interval}"  # no -0.0


VERDICTS = {
    "better": "Better: seen here, if it is above zero after Holm's correction for {count} such comparisons; not seen "
    "here, if the interval leaves no room for {room:g} point.",
    "no worse": "No worse: seen here, if the interval stays above -{room:g}; not seen here, if it stays below.",
}


class Told(NamedTuple):
    """What a table says besides its numbers: its title, where its runs are from, and of which model they are."""

    title: str
    origin: Callable[[dict[str, Any]], str]
    model: str


SMALL = "On a model of 2 million parameters."
STUDIES = {
    "prompt_length": Told("How many prompts do no harm", of_weights, SMALL),
    "what_prompts_add": Told("What prompts add", of_weights, SMALL),
    "published_methods": Told("What published methods add", of_weights, SMALL),
    "plain_twin": Told("Prompts on a model without a term for the whole image", of_twin, SMALL),
    "label_mapping": Told(
        "Labels mapped by meaning",
        made_by,
        "On EfficientNet-Lite0, trained on ImageNet, with 30 test images of a class; meaning is all-MiniLM-L6-v2's.",
    ),
}
"""Studies with a table, by the name of their json; one that was not begun has none."""
DRAWN = {"prompt_length": prompt_length.plot}


def table(name: str, content: dict[str, Any]) -> str:
    """Accuracies and judged differences of a study."""
    title, origin, model = STUDIES[name]
    summary = content["summary"]
    differences = [found["paired_difference_points"].values() for found in summary["tasks"].values()]
    asked = {one["asked"] for paired in differences for one in paired}
    rules = " ".join(rule for kind, rule in VERDICTS.items() if kind in asked)
    said = rules.format(count=summary["comparisons_corrected_for"], room=ROOM)
    lines = [
        f"# {title}",
        "",
        f"Made by `python -m studies.report` from `{name}.json`; arms: `studies/{name}.py`. Test accuracy in %.",
        "",
        origin(content),
        "",
        textwrap.fill(
            f"Differences are paired by seed, with 95 % intervals. {said} Else too little data. {model}",
            120,
            break_on_hyphens=False,
        ),
        "",
    ]
    if name in DRAWN:
        lines += [f"![{title}]({name}.png)", ""]
    for task, found in summary["tasks"].items():
        lines += [f"## {task}", "", "| arm | accuracy | seeds |", "|---|---|---|"]
        for arm, values in found["test_accuracy_percent"].items():
            spread = "" if values["std"] is None else f" ± {values['std']:.1f}"
            lines.append(f"| {arm} | {values['mean']:.1f}{spread} | {values['seeds']} |")
        lines += ["", "| difference | asked | points | verdict |", "|---|---|---|---|"]
        for pair, one in found["paired_difference_points"].items():
            lines.append(f"| {pair} | {one['asked']} | {_points(one)} | {one['verdict']} |")
        lines.append("")
    return "\n".join(lines)


ROOT = Path(__file__).parent.parent
TRAINING, README = ROOT / "docs" / "training.md", ROOT / "README.md"
CARD = ROOT / "vptm" / "assets" / "builtin.md"


def _stored(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _filled(text: str, width: int = 120) -> str:
    whole = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), text)  # code is not broken over lines
    return textwrap.fill(whole, width, break_on_hyphens=False, break_long_words=False).replace("\0", " ")


def precision(content: dict[str, Any]) -> str:
    """What fp32 and bf16 came to, and by how much they differ."""
    accuracy = content["summary"]["test_accuracy_percent"]
    difference = content["summary"]["paired_difference_points"][PAIR]
    used, seeds = content["runs"][0]["settings"], difference["seeds"]
    processor = "with" if content["bfloat16_instructions"] else "without"
    means = " and ".join(f"{accuracy[p]['mean']:.1f} % ± {accuracy[p]['std']:.1f} in {p}" for p in PRECISIONS)
    return _filled(
        f"On the built-in task ({used['shots']} pictures of each of 10 classes, {used['epochs']} epochs, `vptm train` "
        f"with {seeds} seeds, a CPU {processor} bfloat16 instructions) test accuracy is {means}, mean and standard "
        f"deviation over the seeds. The paired difference {PAIR} is {_points(difference)} points (95 % interval). "
        "`python -m studies.precision_builtin` makes `studies/results/precision.json`, and `python -m studies.report` "
        "this paragraph."
    )


def default(content: dict[str, Any]) -> str:
    """What `vptm train` without options comes to."""
    found = content["summary"]["test_accuracy_percent"]["fp32"]
    used = content["runs"][0]["settings"]
    return _filled(
        f"`vptm train` as it comes ({used['shots']} images per class) reaches {found['mean']:.1f} % ± "
        f"{found['std']:.1f} on the 1500 shipped test images, {found['seeds']} seeds (`python -m "
        "studies.precision_builtin`, float32)."
    )


def prompts(added: dict[str, Any], lengths: dict[str, Any]) -> str:
    """What prompts add to none, where, and where not, in three sentences."""
    whitened, means = what_prompts_add.WHITENED, what_prompts_add.MEANS

    def told(first: str, second: str, *, seen: bool = True) -> str:
        """The tasks on which the first arm was seen to be better than the second, or was not; of more than three the
        least and the largest difference."""
        tasks, pair = added["summary"]["tasks"], f"{first} - {second}"
        asked = [(task, of["paired_difference_points"].get(pair)) for task, of in tasks.items()]
        every = [(one["mean"], f"{task} ({_points(one)})", one["verdict"]) for task, one in asked if one]
        found = [(mean, line) for mean, line, verdict in every if (verdict == "seen here") == seen]
        if len(found) <= 3:
            return "; ".join(line for _, line in found) or "no task"
        count = f"all {len(found)}" if len(found) == len(every) else f"{len(found)} of {len(every)}"
        return f"{count} tasks, from {min(found)[1]} to {max(found)[1]}"

    bare = what_prompts_add.without
    asked = whitened, bare(whitened)
    found = lengths["summary"]["tasks"][prompt_length.TASK.name]["paired_difference_points"]
    gate, none = (
        _points(found[f"{prompt_length.name('shallow', 50, kind)} - {prompt_length.NONE}"])
        for kind in ("gate from -4", "no gate")
    )
    return _filled(
        "What prompts add, on the built-in model of 2 million parameters, in points of test accuracy (paired, 95 % "
        f"interval): `vptm train` gains over itself without prompts on {told(*asked)}; no gain was seen, or the data "
        f"are too few to tell, on {told(*asked, seen=False)}. How the verbalizer starts counts for more: without any "
        "prompt whitened prototypes, its start, are better than class means on "
        f"{told(bare(whitened), bare(means))}, and beside class means prompts gain on {told(means, bare(means))}. Many "
        f"prompts without gates take attention from the patches: 50 beside 16 patches {none}, with the gates that "
        f"`vptm train` begins with {gate}.",
        136,
    )


PLACES: dict[str, tuple[Path, Callable[[], str]]] = {
    "precision": (TRAINING, lambda: precision(_stored("precision"))),
    "default": (CARD, lambda: default(_stored("precision"))),
    "prompts": (README, lambda: prompts(_stored("what_prompts_add"), _stored("prompt_length"))),
}
"""Where what is said of a study stands between markers of its name, and what makes it."""


def updated(page: str, name: str) -> str:
    """`page` with the text between the markers of `name` made anew."""
    begin, end = (f"<!-- {name}: {mark} -->" for mark in ("begin", "end"))
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{PLACES[name][1]()}\n{end}{after}"


def main() -> None:
    argparse.ArgumentParser(prog="python -m studies.report", description=__doc__).parse_args()
    for name in STUDIES:
        if not (RESULTS / f"{name}.json").exists():
            continue
        content = _stored(name)
        (RESULTS / f"{name}.md").write_text(table(name, content), encoding="utf-8")
        if name in DRAWN:
            DRAWN[name](content["summary"], RESULTS / f"{name}.png")
        print(f"wrote {RESULTS / name}.md")
    for name, (path, _) in PLACES.items():
        path.write_text(updated(path.read_text(encoding="utf-8"), name), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
