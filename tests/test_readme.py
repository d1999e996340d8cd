"""The README says what was measured and what runs, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import peers, plots, report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_come_from_the_json_files() -> None:
    """A number typed into the README, or a json that was measured again without updating it, fails here."""
    assert report.updated(README) == README, "run: python -m bench.report"
    assert len(report.section().splitlines()) <= 10, "a reader of the first page wants the point; the rest is linked"


def test_tables_and_pictures_of_the_results_folder_are_current() -> None:
    """A json measured again without `python -m bench.report`, or a picture of numbers that are gone, fails here."""
    sources = plots.contents(report.RESULTS)
    committed = (report.RESULTS / report.TABLES).read_text(encoding="utf-8")
    assert report.tables(sources) == committed, "run: python -m bench.report"
    drawn = {name for name, make in plots.pictures(plots.load(sources)).items() if make is not None}
    files = {path.name for path in (report.RESULTS / "plots").iterdir()}
    assert files == {f"{name}.{ending}" for name in drawn for ending in ("png", "svg")}


def timed(file: str, group: str, **info: object) -> dict[str, object]:
    return {"fullname": f"bench/bench_{file}.py::bench_x", "group": group, "extra_info": info}


def model(file: str = "model", **info: object) -> dict[str, object]:
    shared = {"model": "BEiT-B/16 at 224", "mode": "deep", "prompt_length": 50, "batch": 64, "dtype": "torch.bfloat16"}
    return timed(file, "inference", **shared | info)


def measured(*runs: dict[str, object], gpu: str | None = "NVIDIA H200") -> dict[str, object]:
    info = {"gpu": gpu, "cpu": {"brand_raw": "A CPU"}, "threads": 2, "versions": {"torch": "2.11.0", "triton": "3.6"}}
    return {"machine_info": info, "benchmarks": list(runs)}


def lines_of(bench: str, *runs: dict[str, object]) -> list[str]:
    return [line for line in report._tables(("x.json", measured(*runs)), bench) if line]


def test_every_batch_has_a_table_and_every_peer_a_column() -> None:
    """A peer that one setting lacks leaves its cell empty, not its number under another's name."""
    lines = lines_of(
        "model",
        model(**{"speed-up over concatenation": 1.8, "speed-up over torch.compile": 1.5}),
        model(**{"speed-up over concatenation": 1.2, "prompt_length": 0, "mode": "no"}),
        model(batch=1, **{"speed-up over concatenation": 2.5}),
        model(batch=1, implementation="concatenation"),
        timed("other", "other", **{"speed-up over concatenation": 9.9}),
    )
    assert lines == [
        "Inference of BEiT-B/16 at 224, batch 64, bfloat16, random weights, NVIDIA H200, torch 2.11.0:",
        "| prompts | speed-up over concatenated prompts | speed-up over torch.compile |",
        "|---|---|---|",
        "| deep, P = 50 | 1.80x | 1.50x |",
        "| none | 1.20x |  |",
        "Inference of BEiT-B/16 at 224, batch 1, bfloat16, random weights, NVIDIA H200, torch 2.11.0:",
        "| prompts | speed-up over concatenated prompts |",
        "|---|---|",
        "| deep, P = 50 | 2.50x |",
    ]


def test_models_and_dtypes_never_share_a_table() -> None:
    """A ratio of BEiT-L at 384 under the title of BEiT-B at 224 would be a claim nobody measured."""
    large = {"model": "BEiT-L/16 at 384", "speed-up over concatenation": 1.4}
    lines = lines_of(
        "model",
        model(**{"speed-up over concatenation": 1.8}),
        model(**large),
        model(dtype="torch.float16", **large),
    )
    titles = [line.split(", random")[0] for line in lines if "random weights" in line]
    assert titles == [
        "Inference of BEiT-B/16 at 224, batch 64, bfloat16",
        "Inference of BEiT-L/16 at 384, batch 64, bfloat16",
        "Inference of BEiT-L/16 at 384, batch 64, float16",
    ]
    assert [line for line in lines if "x |" in line] == [
        f"| deep, P = 50 | {ratio}x |" for ratio in ("1.80", *["1.40"] * 2)
    ]


def front(monkeypatch: pytest.MonkeyPatch, folder: Path, **contents: dict[str, object]) -> list[str]:
    """The lines between the markers of a README, from json files in `folder`."""
    monkeypatch.setattr(report, "RESULTS", folder)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return [line for line in report.section().splitlines() if line]


def test_the_readme_names_the_strongest_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line with the slowest peer alone would hide the one that matters; timm without prompts is none."""
    peers = {"torch.compile": 1.6, "concatenation": 1.8, "OpenVINO prefix": 1.05, "timm without prompts": 1.01}
    info = {f"speed-up over {peer}": ratio for peer, ratio in peers.items()} | {"speed-up over vptm with MKL": 1.15}
    held = {"peak extra bytes": {"vptm": 29, "concatenation": 50}}
    runs = [model(**info, **held, model="VPTM on BEiT", note="the defaults"), model(**info), model(batch=1, **info)]
    lines = front(monkeypatch, tmp_path, cpu=measured(*runs, model("training_step", **info), gpu=None))
    assert lines[1:] == [
        "- Inference, deep, P = 50, batch 64: **1.80x** as fast as concatenated prompts, "
        "1.05x as fast as the closest peer (OpenVINO prefix)",
        "- Training step, deep, P = 50, batch 64: **1.80x** as fast as concatenated prompts, "
        "1.05x as fast as the closest peer (OpenVINO prefix)",
        "- VPTM itself, inference, deep, P = 50 (the defaults), batch 64: **1.80x** as fast as concatenated prompts, "
        "1.05x as fast as the closest peer (OpenVINO prefix), 0.58x of the memory",
        "Speed on a GPU is not yet measured.",
    ]


def test_the_readme_shows_a_gpu_where_one_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own numbers and name before those of a CPU, and without the sentence that none was."""
    cpu = measured(model(**{"speed-up over concatenation": 1.3}), gpu=None)
    gpu = measured(model(**{"speed-up over concatenation": 1.8}))
    lines = front(monkeypatch, tmp_path, cpu=cpu, gpu=gpu)
    assert "NVIDIA H200" in lines[0] and "**1.80x**" in lines[1]
    assert "NVIDIA" not in lines[2] and "**1.30x**" in lines[3] and len(lines) == 4


def test_forms_of_vptm_have_columns_of_their_own() -> None:
    """vptm's other ways to run are no peers: their time over that of vptm is no speed-up."""
    peers = {"torch.compile": 1.6, "concatenation": 1.8}
    forms = {"vptm with MKL": {"concatenation": [1.5, 1.55, 1.6], "torch.compile": [1.3, 1.4, 1.5]}}
    info = {f"speed-up over {peer}": ratio for peer, ratio in peers.items()} | {"speed-up over vptm with MKL": 1.15}
    head, _, row = lines_of("model", model(**info, forms=forms, readout="mask", note="the defaults"))[1:4]
    assert "over vptm with MKL |" not in head
    assert "with MKL over torch.compile" not in head, "compiled and eager peers are no pair"
    assert row.endswith("| 1.55x | 1.15x |") and head.endswith("| time of vptm with MKL over that of vptm |")


@pytest.mark.parametrize("form, peer", [("graphed", "concatenation graphed"), ("compiled", "torch.compile")])
def test_forms_of_vptm_are_tabled_beside_peers_that_run_alike(form: str, peer: str) -> None:
    """vptm in a graph over a peer without one would be a speed-up of the graph."""
    name, others = f"vptm {form}", ["concatenation", "PEFT-style prefix graphed", "PEFT-style prefix compiled"]
    forms = {name: {each: [2.0, 2.0, 2.0] for each in (*others, peer)}}
    info = {f"speed-up over {each}": 1.5 for each in (*others, peer)}
    header = lines_of("model", model(**info, forms=forms))[1]
    found = [cell.strip() for cell in header.split("|") if f"speed-up of {name}" in cell]
    assert found == [f"speed-up of {name} over {each}" for each in (*others, peer) if peers.alike(name, each)]
    assert len(found) == 2 and f"speed-up of {name} over {peer}" in found


def test_results_of_one_machine_are_of_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios of several commits in one table describe a version that never was."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name, gpu, commit in (("cpu", None, "a" * 40), ("gpu", "NVIDIA H200", "b" * 40)):
        content = measured(model(**{"speed-up over concatenation": 1.8}), gpu=gpu)
        content["machine_info"]["commit"] = commit  # type: ignore[index]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert re.findall(r"commit (\w+) ", report.section()) == ["b" * 10, "a" * 10]
    content["machine_info"]["commit"] = "c" * 40  # type: ignore[index]
    (tmp_path / "more.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"NVIDIA H200 must be of one commit, got bbb.* in gpu.json, ccc.* in more.json"
    ):
        report.section()


def test_a_setting_measured_twice_is_refused() -> None:
    """Else a reader picks whichever row reads better."""
    run = model(**{"speed-up over concatenation": 1.8})
    with pytest.raises(ValueError, match=r"'deep, P = 50' must be measured once, got it twice in x\.json"):
        lines_of("model", run, run)


def test_bytes_of_a_training_step_stand_beside_its_speed() -> None:
    """Memory is half of the claim: a table without it, or with the ratio upside down, would mislead."""
    info = {
        "speed-up over concatenation": 1.7,
        "bytes saved for backward": {"vptm": 30, "concatenation": 50},
        "peak bytes": {"vptm": 40, "concatenation": 50},
    }
    assert lines_of("training step", model("training_step", **info))[1:] == [
        "| prompts | speed-up over concatenated prompts | bytes kept for backward over concatenated prompts "
        "| peak memory over concatenated prompts |",
        "|---|---|---|---|",
        "| deep, P = 50 | 1.70x | 0.60x | 0.80x |",
    ]


def test_kernels_have_tables_with_bytes_of_separately_timed_peers() -> None:
    """Implementations timed one by one each say their own bytes; what one of them says alone is no comparison."""

    def attention(name: str, held: int, **info: object) -> dict[str, object]:
        group = "prompted attention, forward, B=64 N=197 P=50, torch.bfloat16, cuda"
        return timed("prompted_attention", group, implementation=name, **{"peak extra bytes": {name: held}}, **info)

    ours = {"speed-up over sdpa": 1.31, "ratio quartiles": {"sdpa": [1.3, 1.31, 1.4]}, "share of ceiling": 0.62}
    runs = [attention("vptm", 5, **ours), attention("sdpa", 10, **{"share of ceiling": 0.5})]
    assert lines_of("prompted attention", *runs) == [
        "Prompted attention, bfloat16, NVIDIA H200, torch 2.11.0:",
        "| case | speed-up over sdpa | peak memory over sdpa | share of ceiling |",
        "|---|---|---|---|",
        "| forward, B=64 N=197 P=50 | 1.31x [1.30x, 1.40x] | 0.50x | 62% |",
    ]


def test_figures_that_compare_with_no_peer_are_tabled() -> None:
    """Exponents and import times come from the same json files; a bench without a table would be evidence unseen."""
    sweep = {"exponent of time": 1.04, "exponent of memory": None, "expected exponent of time": 1}
    lines = lines_of("complexity", timed("complexity", "complexity in batch B, torch.float32, cpu", **sweep))
    assert lines[1:] == [
        "| case | exponent of time, expected | exponent of time | exponent of memory |",
        "|---|---|---|---|",
        "| batch B | 1.00 | 1.04 | none |",
    ]
    lines = lines_of("import", timed("import", "import of vptm beyond torch", **{"seconds beyond torch": 0.25}))
    assert lines[-1] == "| import of vptm beyond torch | 0.25 s |"


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
        "| batch | vptm on H200 |\n|---|---|\n| 64 | 1.8x |",
        "| batch | speed-up on H200 |\n|---|---|\n| 64 | 1.8 |",
        "| batch | µs, H200 |\n|---|---|\n| 64 | 72 |",
        "Measured on an H200. The model is 1.8x faster than eager.",
        "On a GPU the speed-up is 1.8.",
        "A GPU makes it faster by a factor of 1.8.",
        "On a GPU it is twice as fast.",
        "A GPU needs 72 microseconds for an image.",
        "1.8x faster on CUDA",
        "On Hopper the step is 1.7x.",
        "GH200: an image takes 72 µs.",
        "Built for sm_90 it reaches 1.8x.",
        "On a GPU, half the time of eager.",
        "On a GPU 14000 images per second.",
        "On a CPU it is 1.6x faster, on an H100 1.8x.",
    ],
)
def test_a_gpu_figure_typed_into_the_readme_is_found(claim: str) -> None:
    """Were it not, anybody could write a number nobody measured."""
    before, after = README.split("## Limits")
    (found,) = report.unsupported_claims(f"{before}\n\n{claim}\n\n## Limits{after}")
    assert found in " ".join(claim.split())


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        (
            "Measured on an H200.\n\n| batch | vptm |\n|---|---|\n| 64 | 1.8x |",
            "| batch | vptm | |---|---| | 64 | 1.8x |",
        ),
        ("Measured on an H200:\n\n- batch 64: 1.8x", "- batch 64: 1.8x"),
        ("### On an H200\n\nThe model is 1.8x faster.", "The model is 1.8x faster."),
        ("```python\nmodel(images)  # 1.8x on an H200\n```", "1.8x on an H200"),
        ("```text\nH200 1.8x\n```", "```text H200 1.8x ```"),
    ],
)
def test_a_gpu_figure_is_found_by_what_it_stands_under(text: str, claim: str) -> None:
    """A table does not repeat the name of the machine, and a comment in an example is read like any sentence."""
    before, after = README.split("## Limits")
    assert report.unsupported_claims(f"{before}\n\n{text}\n\n## Limits{after}") == [claim]


@pytest.mark.parametrize(
    "sentence",
    [
        "With a GPU the download is 5 GB.",
        "On two CPU cores it is 1.6x faster.",
        "No kernel has run on a GPU yet.",
        "On a CPU it is 1.6x faster. GPU speed is not measured.",
        "Kernels for sm_90 hold tiles of 64 x 64 in 4 warps.",
    ],
)
def test_a_sentence_without_a_gpu_figure_is_no_claim(sentence: str) -> None:
    assert report.unsupported_claims(f"{README}\n\n{sentence}\n") == []


def test_a_gpu_in_the_results_without_a_json_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section names a machine: it must be one that a json was measured on."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    forged = f"{report.BEGIN}\nbatch 64, NVIDIA H200, torch 2.11\nbatch 4, AMD EPYC, torch 2.11\n{report.END}"
    missing = ["NVIDIA H200: no json was measured on it", "AMD EPYC: no json was measured on it"]
    assert report.unsupported_claims(forged) == missing
    content = {"machine_info": {"gpu": "NVIDIA H200", "versions": {"torch": "2.11.0"}}, "benchmarks": []}
    (tmp_path / "h200.json").write_text(json.dumps(content))
    assert report.unsupported_claims(forged) == missing[1:]
    content["machine_info"] |= {"gpu": None, "cpu": {"brand_raw": "AMD EPYC 9554"}}
    (tmp_path / "cpu.json").write_text(json.dumps(content))
    assert report.unsupported_claims(forged) == []


def test_a_json_without_its_evidence_is_found() -> None:
    """A figure nobody can measure again is no evidence: on a CPU without command and commit, on a GPU without more."""
    content = {"machine_info": {"gpu": None, "versions": {}}, "benchmarks": []}
    assert report.evidence_missing(content) == ["command", "commit", "torch version", "processor"]
    machine = {"gpu": "NVIDIA H200", "versions": {"torch": "2.11.0"}, "command": "pytest bench", "commit": "abc+"}
    missing = report.evidence_missing({"machine_info": machine, "benchmarks": []})
    assert missing == ["commit without changes", "driver and clocks", "triton version"]
    machine |= {
        "versions": {"torch": "2.11.0", "triton": "3.6"},
        "commit": "abc",
        "gpu state": {"driver_version": "570"},
    }
    assert report.evidence_missing({"machine_info": machine, "benchmarks": []}) == []


def test_tables_of_a_run_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user sees the run that was just made, on the terminal or in a folder, and no file of the project changes."""
    info = {"speed-up over concatenation": 1.8, "refused": {"sdpa cudnn": "nan"}}
    path, out = tmp_path / "mine.json", tmp_path / "out"
    runs = [model(prompt_length=length, **info) for length in (10, 50)]
    path.write_text(json.dumps({"stages": [{"result": measured(*runs)}]}))
    kept = {file: file.stat().st_mtime_ns for file in (ROOT / "README.md", report.RESULTS / report.TABLES)}
    assert report.main([str(path)]) == 0
    printed = capsys.readouterr().out
    for said in ("## mine.json", "| deep, P = 50 | 1.80x |", "- inference: sdpa cudnn: nan"):
        assert said in printed
    assert report.main([str(path), "--out", str(out)]) == 0
    assert (out / report.TABLES).read_text(encoding="utf-8") + "\n" == printed
    assert (out / "speedup_prompts.svg").is_file()
    assert kept == {file: file.stat().st_mtime_ns for file in kept}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "JSON must be a file that can be read"),
        ("{", "JSON must be a json file"),
        ("[1]", "JSON must hold timings of bench/"),
        ('{"machine_info": {"versions": {}}, "benchmarks": []}', "JSON must hold timings of bench/"),
        ('{"machine_info": {}, "benchmarks": [{}]}', "JSON must hold timings of bench/"),
    ],
)
def test_a_json_that_is_none_of_ours_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    """In one line that names it, not by a traceback or an empty report."""
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        report.main([str(path)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and said in last and str(path) in last


def test_a_folder_without_a_json_is_refused() -> None:
    """`--out` alone would look as if the committed tables had been written there."""
    with pytest.raises(SystemExit) as caught:
        report.main(["--out", "somewhere"])
    assert caught.value.code == 2


def test_the_first_page_is_one() -> None:
    assert len(README.splitlines()) <= 130


def test_the_drop_in_fits_a_screen() -> None:
    """It runs in test_doc_blocks.py."""
    example = re.search(r"## Drop-in\n+```python\n(.*?)```", README, re.DOTALL)
    assert example is not None and len(example[1].strip().splitlines()) <= 12


def test_continuous_integration_finds_the_lines_it_runs() -> None:
    """It runs the README's own commands; one that was changed there must not drop out."""
    patterns = re.findall(r"grep -m1 '([^']+)' README\.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert len(patterns) == 3
    for pattern in patterns:
        assert len(re.findall(pattern, README, re.MULTILINE)) == 1, pattern
