"""Tables of the studies: numbers are those of the committed runs, and each says where its runs are from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from studies import label_mapping, plain_twin, prompt_length, published_methods, report, what_prompts_add
from studies.runs import RESULTS, builtin_weights
from studies.what_prompts_add import MEANS, WHITENED, without

PROGRAMS = {
    "prompt_length": prompt_length,
    "what_prompts_add": what_prompts_add,
    "published_methods": published_methods,
    "plain_twin": plain_twin,
    "label_mapping": label_mapping,
}


@pytest.mark.parametrize("name", report.STUDIES)
def test_committed_runs_have_the_committed_summary_and_table(name: str) -> None:
    """Numbers of other runs, other weights or by hand would be read as measured, and one counted twice narrows them."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        unbegun = ("published_methods",)
        assert name in unbegun and not path.with_suffix(".md").exists(), "a table of no runs"
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    study = PROGRAMS[name].study(path)
    assert content["weights"] == study.weights
    # what was read from json once more has the same numbers
    assert content["summary"] == json.loads(json.dumps(study.summary(content["runs"])))
    keys = [(run["task"], run["arm"], run["seed"]) for run in content["runs"]]
    assert len(set(keys)) == len(keys)
    assert all(run["commit"] or "bench/accuracy_claims.py" in run["command"] for run in content["runs"])
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert table == report.table(name, content), "run: python -m studies.report"


def test_runs_of_another_built_in_model_are_told() -> None:
    """They would be read as those of the one that is shipped."""
    assert report.of_weights({"weights": builtin_weights()}).endswith(", which are shipped.")
    assert report.of_weights({"weights": "sha256:0"}).startswith("**Of an earlier built-in model**, sha256:0; ")


def test_a_table_counts_runs_by_their_command() -> None:
    """Runs of an earlier program would be read as those of the one whose arms the table names."""

    def run(command: str, commit: str | None) -> dict[str, Any]:
        return {"command": command, "commit": commit, "versions": {"vptm": "1", "torch": "2"}}

    mine, old = "python -m studies.label_mapping --seeds 2", "python bench/old.py"
    told = report.made_by({"runs": [run(old, None), run(mine, "a"), run(old, None), run(mine, "b")]})
    assert told.splitlines() == [
        f"Runs: 2 by `{old}`, an earlier program with these arms; vptm 1, torch 2, commit not recorded.",
        f"Runs: 1 by `{mine}`; vptm 1, torch 2, commit a.",
        f"Runs: 1 by `{mine}`; vptm 1, torch 2, commit b.",
    ]


@pytest.mark.parametrize("name", report.PLACES)
def test_committed_texts_are_those_of_the_json(name: str) -> None:
    """A number typed into README or docs would be read as measured."""
    page = report.PLACES[name][0].read_text(encoding="utf-8")
    assert report.updated(page, name) == page, "run: python -m studies.report"


def test_what_is_said_of_prompts_follows_from_verdicts() -> None:
    """A gain that was not seen must not be told as one."""
    bare = without(WHITENED), without(MEANS)

    def task(verdict: str, mean: float) -> dict[str, Any]:
        one = {"mean": mean, "low": mean - 1, "high": mean + 1, "verdict": verdict}
        return {"paired_difference_points": {f"{WHITENED} - {bare[0]}": one}}

    lengths = json.loads((RESULTS / "prompt_length.json").read_text(encoding="utf-8"))
    tasks = {"new": task("seen here", 2), "known": task("not seen here", 0), "few": task("too little data", 3)}
    gain = {"mean": 4.0, "low": 3.0, "high": 5.0, "verdict": "seen here"}
    tasks["new"]["paired_difference_points"][f"{MEANS} - {bare[1]}"] = gain
    told = " ".join(report.prompts({"summary": {"tasks": tasks}}, lengths).split())
    assert "prompts on new (+2.0 [1.0, 3.0]); no gain" in told
    assert "on known (+0.0 [-1.0, 1.0]); few (+3.0 [2.0, 4.0]). How the" in told
    assert "class means on no task, and beside class means prompts gain on new (+4.0 [3.0, 5.0]). Many" in told
    tasks |= {"small": task("not seen here", -0.5), "other": task("not seen here", 0.5)}
    told = " ".join(report.prompts({"summary": {"tasks": tasks}}, lengths).split())
    assert "on 4 of 5 tasks, from small (-0.5 [-1.5, 0.5]) to few (+3.0 [2.0, 4.0]). How" in told
    none = report.prompts({"summary": {"tasks": {"known": tasks["known"]}}}, lengths)
    assert "prompts on no task; no gain" in " ".join(none.split())
