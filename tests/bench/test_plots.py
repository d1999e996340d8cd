"""Pictures come from the json files: what was measured is drawn, what was not is named."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from bench import peers, plots

GPU = "NVIDIA H200"
MODES = ("deep", "shallow")
MODEL, BF16 = "BEiT-B/16 at 224", "torch.bfloat16"


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
                shared = {"model": MODEL, "mode": mode, "prompt_length": prompts, "batch": batch, "dtype": BF16}
                quartiles = {
                    name.removeprefix("speed-up over "): [0.9 * ratio, ratio, 1.1 * ratio]
                    for name, ratio in ratios.items()
                }
                shared |= {"ratio quartiles": quartiles, "peak extra bytes": held}
                found.append(entry("model", "m", **shared, **ratios))
    found.append(entry("model", "m", model=MODEL, mode="no", prompt_length=0, batch=64, dtype=BF16, **ratios))
    for name, share in (("vptm", 0.8), ("sdpa efficient", 0.4), ("eager", 0.08)):
        for operations, moved in ((2e9, 1e8), (9e9, 1.2e8), (4e10, 1.4e8)):
            seconds = max(moved / 4.3e12, operations / 7.9e14) / share
            found.append(
                entry(
                    "prompted_attention",
                    "a",
                    implementation=name,
                    dtype=BF16,
                    bytes=moved,
                    operations=operations,
                    **{"measured copy bandwidth": 4.3e12, "measured matrix rate": 7.9e14},
                    **{"achieved rate": operations / seconds},
                )
            )
    return content(*found)


def save(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def test_everything_measured_is_drawn(tmp_path):
    save(tmp_path, gpu=full())
    written = plots.draw(plots.contents(tmp_path), tmp_path / "plots")
    names = {path.name for path in written}
    kinds = ("speedup_prompts", "speedup_batch", "roofline", "memory_prompts", "memory_batch")
    assert names == {f"{kind}.{ending}" for kind in kinds for ending in ("png", "svg")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names, "no temporary file stays"
    for path in written:
        start = path.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start
    # text stays text in the svg: axes and panels say what they show
    text = (tmp_path / "plots" / "speedup_prompts.svg").read_text()
    for said in (
        "prompts P",
        "time of the peer / time of vptm",
        GPU,
        MODEL,
        "deep prompts",
        "concatenated prompts",
        "1x: as fast as",
    ):
        assert said in text, said


def test_points_are_the_numbers_of_the_json(tmp_path):
    save(tmp_path, gpu=full())
    runs = plots.load(plots.contents(tmp_path))
    panels = plots.speed_ups(runs, "prompt_length")
    where = f"{GPU}, torch 2.11.0"
    assert list(panels) == [
        plots.Panel("model", f"{MODEL}, {mode} prompts, bfloat16, batch 64", where) for mode in MODES
    ]
    for ratios, expected in zip(panels.values(), (100, 800)):
        assert ratios["concatenation"][0] == (0, 1.35, 1.35, 1.35)
        ys = [(p, 1.1 + p / expected) for p in (10, 50, 100, 200)]
        assert ratios["concatenation"][1:] == [(p, y, 0.9 * y, 1.1 * y) for p, y in ys]
    panels = plots.speed_ups(runs, "batch")
    assert [panel.title for panel in panels] == [f"{MODEL}, {mode} prompts, bfloat16, P = 200" for mode in MODES]
    assert [point[:2] for point in next(iter(panels.values()))["torch.compile"]] == [
        (batch, 1.8) for batch in (1, 8, 64)
    ]
    held = next(iter(plots.memory(runs, "batch").values()))
    assert [point[:2] for point in held["vptm"]] == [(1, 1), (8, 8), (64, 64)]
    (((_, title, _), (series, bandwidth, rate)),) = plots.roofline(runs).items()
    assert (title, bandwidth, rate) == ("Prompted attention, bfloat16", 4.3e12, 7.9e14)
    assert series["vptm"][0][:2] == pytest.approx((20, 0.8 * 2e9 / (1e8 / 4.3e12)))


def test_models_and_dtypes_have_panels_of_their_own(tmp_path):
    """BEiT-L at 384 on the line of BEiT-B at 224, or float32 under the ceiling of bfloat16, would show what is not."""
    runs = content(
        *(
            entry(
                "model", "m", model=model, mode="deep", prompt_length=p, batch=64, dtype=dtype, **{"speed-up over x": r}
            )
            for model, dtype, r in (
                ("BEiT-B/16 at 224", BF16, 1.5),
                ("BEiT-L/16 at 384", BF16, 2),
                (MODEL, "torch.float32", 3),
            )
            for p in (10, 50)
        ),
        *(
            entry(
                *("readout_attention", f"readout attention, B=64, torch.{dtype}, cuda"),
                **{"bytes": 1, "operations": 1, "achieved rate": 1, "measured copy bandwidth": 1},
                **{"measured matrix rate": rate},
            )
            for dtype, rate in (("bfloat16", 800), ("float32", 50))
        ),
    )
    save(tmp_path, gpu=runs)
    loaded = plots.load(plots.contents(tmp_path))
    panels = plots.speed_ups(loaded, "prompt_length")
    assert {
        panel.title.split(", deep")[0]: series["x"][0].y for panel, series in panels.items() if "bf" in panel.title
    } == {
        "BEiT-B/16 at 224": 1.5,
        "BEiT-L/16 at 384": 2,
    }
    assert len(panels) == 3
    assert {panel.title: ceiling for panel, (_, _, ceiling) in plots.roofline(loaded).items()} == {
        "Read-out attention, bfloat16": 800,
        "Read-out attention, float32": 50,
    }


@pytest.mark.parametrize("said", [{}, {"shape": "KIND, K={k}"}])
def test_kernels_are_drawn_by_what_their_group_or_shape_says(tmp_path, said):
    """A bench of a kernel names no model: its group or shape keeps cases apart, and says batch and classes."""
    runs = content(
        *(
            entry(
                "prototype_cosine",
                f"prototype cosine, {kind}, B={b}, K={k}, cpu",
                **{name: text.replace("KIND", kind).format(k=k) for name, text in said.items()},
                **{"speed-up over eager": 10 * k + b},
            )
            for kind in ("folded inference", "softmax inference")
            for b in (1, 64)
            for k in (10, 1000)
        )
    )
    save(tmp_path, cpu=runs)
    panels = plots.speed_ups(plots.load(plots.contents(tmp_path)), "batch")
    start = "" if said else "prototype cosine, "
    assert [panel.title for panel in panels] == [
        f"{start}{kind}, K = 1000" for kind in ("folded inference", "softmax inference")
    ]
    assert all([point[:2] for point in series["eager"]] == [(1, 10001), (64, 10064)] for series in panels.values())
    names = {path.stem for path in plots.draw(plots.contents(tmp_path), tmp_path / "plots")}
    assert names == {"speedup_batch_prototype_cosine"}


def test_a_point_measured_twice_is_refused(tmp_path):
    """The last one read would win, whichever it is."""
    runs = content(
        *(
            entry("model", "m", model=MODEL, mode="deep", prompt_length=p, batch=4, **{"speed-up over x": 2.0})
            for p in (10, 50)
        )
    )
    save(tmp_path, first=runs, second=runs)
    with pytest.raises(
        ValueError, match=r"prompt_length 10.*x must be measured once, got it in first.json and in second"
    ):
        plots.draw(plots.contents(tmp_path), tmp_path / "plots")


def test_an_implementation_looks_the_same_in_every_picture(tmp_path):
    """vptm blue in one picture and a peer blue in the next would be read wrongly; in one bench no two may be alike."""
    for path in sorted((Path(__file__).parents[2] / "bench").glob("bench_*.py")):
        names = [plots.OURS, *getattr(importlib.import_module(f"bench.{path.stem}"), "PEERS", {})]
        shown = plots.looks(names)
        assert len({shown[name] for name in names}) == len(names), path.name
    save(tmp_path, gpu=full())
    pictures = plots.pictures(plots.load(plots.contents(tmp_path)))
    colours = set()
    for name in ("speedup_prompts", "speedup_batch", "memory_prompts", "memory_batch"):
        for axis in pictures[name]().axes:
            colours |= {(line.get_label(), line.get_color()) for line in axis.lines if line.get_label()[0] != "_"}
    assert colours == {
        ("vptm", peers.BLUE),
        ("concatenated prompts", peers.RED),
        ("torch.compile", peers.PINK),
    }


def test_panels_of_one_machine_share_their_scale(tmp_path):
    """On scales of their own a gain of 1.1x and one of 3x look the same."""
    save(tmp_path, gpu=full(), cpu=content(*full()["benchmarks"], gpu=None))
    figure = plots.pictures(plots.load(plots.contents(tmp_path)))["speedup_prompts"]()
    tops = {axis.get_title(loc="left"): axis.get_ylim() for axis in figure.axes}
    assert len(tops) == 4 and all(bottom == 0 for bottom, _ in tops.values())
    assert len({limits for title, limits in tops.items() if GPU in title}) == 1
    assert len(figure.legends) == 1


def test_results_inside_a_gpu_check_are_read(tmp_path):
    stages = [
        {"name": "model", "result": full()},
        {"name": "kernel tests"},
        {"name": "autotune", "result": {"kept": []}},
    ]
    save(tmp_path, gpu_check={"stages": stages})
    assert len(plots.load(plots.contents(tmp_path))) == len(full()["benchmarks"])


def test_what_was_not_measured_is_named_and_not_drawn(tmp_path, capsys):
    """One point is no line, and a picture without numbers is not made."""
    one = entry("model", "m", mode="deep", prompt_length=10, batch=4, **{"speed-up over concatenation": 2.0})
    save(tmp_path, one=content(one), other={"summary": {}}, list=[1])
    assert plots.draw(plots.contents(tmp_path), tmp_path / "plots") == []
    said = capsys.readouterr().out
    for name in ("speedup_prompts", "speedup_batch", "roofline", "memory_prompts", "memory_batch"):
        assert f"{name}: not drawn" in said


def test_machines_are_never_mixed_in_a_panel(tmp_path):
    """A ratio from a CPU beside one from a GPU on one line would be a comparison nobody made."""
    points = [entry("model", "m", mode="deep", prompt_length=p, batch=4, **{"speed-up over x": 2.0}) for p in (1, 2)]
    save(tmp_path, cpu=content(*points, gpu=None), gpu=content(*points))
    panels = plots.speed_ups(plots.load(plots.contents(tmp_path)), "prompt_length")
    assert len(panels) == 2 and sum(GPU in panel.machine for panel in panels) == 1
