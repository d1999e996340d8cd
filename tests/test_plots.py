"""Pictures come from the json files: what was measured is drawn, what was not is named."""

from __future__ import annotations

import json

import pytest

from bench import plots

GPU = "NVIDIA H200"


def entry(file, group, **info):
    return {
        "fullname": f"bench/bench_{file}.py::bench_x[1]",
        "group": group,
        "extra_info": info,
        "stats": {"median": 0.001},
    }


def content(*entries, gpu=GPU):
    info = {"gpu": gpu, "cpu": {"brand_raw": "CPU"}, "threads": 2, "versions": {"torch": "2.11.0"}}
    return {"machine_info": info, "benchmarks": list(entries)}


def full(prompt_lengths=(10, 50, 100, 200), batches=(1, 8, 64)):
    """A bench of a model over prompts and batches, and of a kernel with its work."""
    found = []
    for mode in ("deep", "shallow"):
        for prompts in prompt_lengths:
            for batch in batches:
                ratios = {
                    "speed-up over concatenation": 1.1 + prompts / (100 if mode == "deep" else 800),
                    "speed-up over torch.compile": 1.0 + prompts / 250,
                }
                held = {"vptm": 2**20 * batch, "concatenation": 2**20 * batch * (1 + prompts / 197)}
                shared = {"mode": mode, "prompt_length": prompts, "batch": batch, "dtype": "torch.bfloat16"}
                found.append(entry("model", "m", **shared, **ratios, **{"peak extra bytes": held}))
    found.append(entry("model", "m", mode="no", prompt_length=0, batch=64, dtype="torch.bfloat16", **ratios))
    for name, share in (("vptm", 0.8), ("sdpa efficient", 0.4), ("eager", 0.08)):
        for operations, moved in ((2e9, 1e8), (9e9, 1.2e8), (4e10, 1.4e8)):
            seconds = max(moved / 4.3e12, operations / 7.9e14) / share
            found.append(
                entry(
                    "prompted_attention",
                    "a",
                    implementation=name,
                    bytes=moved,
                    operations=operations,
                    **{"measured copy bandwidth": 4.3e12, "measured matrix rate": 7.9e14},
                    **{"microseconds per call": 1e6 * seconds},
                )
            )
    return content(*found)


def save(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def test_everything_measured_is_drawn(tmp_path):
    save(tmp_path, gpu=full())
    written = plots.draw(tmp_path, tmp_path / "plots")
    names = {path.name for path in written}
    kinds = ("speedup_prompts", "speedup_batch", "roofline", "memory_prompts", "memory_batch")
    assert names == {f"{kind}.{ending}" for kind in kinds for ending in ("png", "svg")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names, "no temporary file stays"
    for path in written:
        start = path.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start
    # text stays text in the svg: axes and panels say what they show
    text = (tmp_path / "plots" / "speedup_prompts.svg").read_text()
    for said in ("prompts P", "time of the peer / time of vptm", GPU, "deep prompts", "torch.compile"):
        assert said in text, said


def test_points_are_the_numbers_of_the_json(tmp_path):
    save(tmp_path, gpu=full())
    runs = plots.load(tmp_path)
    panels = plots.speed_ups(runs, "prompt_length")
    assert list(panels) == [
        f"model: {mode} prompts, bfloat16, batch 64\n{GPU}, torch 2.11.0" for mode in ("deep", "shallow")
    ]
    for ratios, expected in zip(panels.values(), (100, 800)):
        assert ratios["concatenation"][0] == (0, 1.35)
        assert ratios["concatenation"][1:] == [(p, 1.1 + p / expected) for p in (10, 50, 100, 200)]
    panels = plots.speed_ups(runs, "batch")
    assert [title.split("\n")[0] for title in panels] == [
        f"model: {mode} prompts, bfloat16, P = 200" for mode in ("deep", "shallow")
    ]
    assert next(iter(panels.values()))["torch.compile"] == [(batch, 1.8) for batch in (1, 8, 64)]
    held = next(iter(plots.memory(runs, "batch").values()))
    assert held["vptm"] == [(1, 1), (8, 8), (64, 64)]
    ((series, bandwidth, rate),) = plots.roofline(runs).values()
    assert (bandwidth, rate) == (4.3e12, 7.9e14)
    assert series["vptm"][0] == pytest.approx((20, 0.8 * 2e9 / (1e8 / 4.3e12)))


def test_results_inside_a_gpu_check_are_read(tmp_path):
    stages = [
        {"name": "model", "result": full()},
        {"name": "kernel tests"},
        {"name": "autotune", "result": {"kept": []}},
    ]
    save(tmp_path, gpu_check={"stages": stages})
    assert len(plots.load(tmp_path)) == len(full()["benchmarks"])


def test_what_was_not_measured_is_named_and_not_drawn(tmp_path, capsys):
    """One point is no line, and a picture without numbers is not made."""
    one = entry("model", "m", mode="deep", prompt_length=10, batch=4, **{"speed-up over concatenation": 2.0})
    save(tmp_path, one=content(one), other={"summary": {}}, list=[1])
    assert plots.draw(tmp_path, tmp_path / "plots") == []
    said = capsys.readouterr().out
    for name in ("speedup_prompts", "speedup_batch", "roofline", "memory_prompts", "memory_batch"):
        assert f"{name}: not drawn" in said


def test_machines_are_never_mixed_in_a_panel(tmp_path):
    """A ratio from a CPU beside one from a GPU on one line would be a comparison nobody made."""
    points = [entry("model", "m", mode="deep", prompt_length=p, batch=4, **{"speed-up over x": 2.0}) for p in (1, 2)]
    save(tmp_path, cpu=content(*points, gpu=None), gpu=content(*points))
    panels = plots.speed_ups(plots.load(tmp_path), "prompt_length")
    assert len(panels) == 2 and sum(GPU in title for title in panels) == 1
