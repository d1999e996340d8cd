"""The README says what was measured and what runs, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import plots, report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_come_from_the_json_files() -> None:
    """A number typed into the README, or a json that was measured again without updating it, fails here."""
    assert report.updated(README) == README, "run: python -m bench.report"


def test_every_batch_has_a_table_and_every_peer_a_column() -> None:
    """A peer that one setting lacks leaves its cell empty, not its number under another's name."""

    def run(file: str, batch: int, **info: object) -> dict[str, object]:
        shared = {"mode": "deep", "prompt_length": 50, "batch": batch, "dtype": "torch.bfloat16"}
        return {"fullname": f"bench/{file}.py::bench_x", "extra_info": shared | info}

    content = {
        "machine_info": {"gpu": "NVIDIA H200", "versions": {"torch": "2.11.0"}},
        "benchmarks": [
            run("bench_model", 64, **{"speed-up over concatenation": 1.8, "speed-up over torch.compile": 1.5}),
            run("bench_model", 64, **{"speed-up over concatenation": 1.2, "prompt_length": 0}),
            run("bench_model", 1, **{"speed-up over concatenation": 2.5}),
            run("bench_model", 1, implementation="concatenation"),
            run("bench_other", 64, **{"speed-up over concatenation": 9.9}),
        ],
    }
    lines = report._ratio_tables(content, "bench_model", "Inference")
    assert [line for line in lines if line.startswith("|")] == [
        "| prompts | vptm over concatenated prompts | vptm over torch.compile |",
        "|---|---|---|",
        "| deep, P = 50 | 1.80x | 1.50x |",
        "| none | 1.20x |  |",
        "| prompts | vptm over concatenated prompts |",
        "|---|---|",
        "| deep, P = 50 | 2.50x |",
    ]
    assert "batch 64, bfloat16, random weights, NVIDIA H200, torch 2.11.0" in lines[0]


def test_gpu_figures_have_a_json_behind_them() -> None:
    """A speed on a GPU may stand between the result markers only, where it comes from a json with its evidence."""
    assert report.unsupported_claims(README) == []
    for name, content in plots.contents(report.RESULTS):
        assert report.evidence_missing(content) == [], name


@pytest.mark.parametrize(
    "claim",
    [
        "On an H200 the whole model is 1.8x faster.",
        "A training step takes\n72 µs on one GPU.",
        "- attention runs at 640 TFLOP/s",
        "| H200, batch 64 | 2.1× |",
        "With CUDA graphs batch 1 is 3 times as fast.",
    ],
)
def test_a_gpu_figure_typed_into_the_readme_is_found(claim: str) -> None:
    """Were it not, anybody could write a number nobody measured."""
    before, after = README.split("## Limits")
    (found,) = report.unsupported_claims(f"{before}\n\n{claim}\n\n## Limits{after}")
    assert found in " ".join(claim.split())


@pytest.mark.parametrize(
    "sentence",
    ["With a GPU the download is 5 GB.", "On two CPU cores it is 1.6x faster.", "No kernel has run on a GPU yet."],
)
def test_a_sentence_without_a_gpu_figure_is_no_claim(sentence: str) -> None:
    assert report.unsupported_claims(f"{README}\n\n{sentence}\n") == []


def test_a_gpu_in_the_results_without_a_json_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section names a machine: it must be one that a json was measured on."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    forged = f"{report.BEGIN}\nbatch 64, NVIDIA H200, torch 2.11\n{report.END}"
    assert report.unsupported_claims(forged) == ["NVIDIA H200: no json was measured on it"]
    content = {"machine_info": {"gpu": "NVIDIA H200", "versions": {"torch": "2.11.0"}}, "benchmarks": []}
    (tmp_path / "h200.json").write_text(json.dumps(content))
    assert report.unsupported_claims(forged) == []
    assert report.evidence_missing(content) == ["driver and clocks", "command", "commit", "triton version"]


def test_every_named_test_exists() -> None:
    """The support table proves each line by a test: a renamed or deleted one fails here."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    table = README[README.index("## What is supported") : README.index("## Limits")]
    named = re.findall(r"`((?:test_\w+\.py)?(?:::test_\w+)?)`", table)
    assert len(named) > 5
    module = ""
    for entry in named:
        module, _, function = (entry if entry.startswith("test_") else module + entry).partition("::")
        assert module in sources, module
        assert not function or f"def {function}(" in sources[module], entry


def test_drop_in_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code a user copies from the README works as it stands."""
    example = re.search(r"## Drop-in\n+```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], "README.md", "exec"), {})
