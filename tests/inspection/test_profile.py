"""The numbers of `vptm profile` are the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_flops import B, D, H, K, L, N, P, beit_model
from tiny_models import HEADS, build_vit, images, pictures, tiny_vit

from vptm.commands.app import _run
from vptm.inspection.profile import PATHS, Quartiles, Stage, forwards_of, stages_of, table, total


@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_stages_add_up_and_name_the_right_block(mode: str) -> None:
    """Parameters of all stages are the model's; FLOPs of each block are those of the cost model, on both paths."""
    model = beit_model(mode, P)
    stages = stages_of(model, images(model, B), repeats=1)
    assert [stage.name for stage in stages] == ["embedding", *(f"block {i}" for i in range(L)), "read-out"]
    whole = total(stages)
    assert whole.parameters == sum(p.numel() for p in model.parameters())
    assert whole.trained == sum(p.numel() for p in model.trainable_parameters())
    assert stages[1].trained == (P * D if mode == "deep" else 0)
    rows = N + P
    assert {stage.flops["concatenation"] for stage in stages[1:-1]} == {B * (24 * rows * D**2 + 4 * rows**2 * D)}
    middle = 24 * N * D**2 + 4 * N * rows * D if mode == "deep" else 24 * rows * D**2 + 4 * rows**2 * D
    assert stages[2].flops["vptm"] == B * middle
    # deep prompts are projected before; shallow ones get queries, keys and values in block 0, once for the batch
    first = B * middle if mode == "deep" else B * (middle - 6 * P * D**2) + 6 * P * D**2
    assert stages[1].flops["vptm"] == first
    last = 4 * H * N * D + 4 * P * D if mode == "deep" else 4 * H * rows * D  # projected prompts
    assert stages[L].flops["vptm"] == B * (24 * D**2 + last)
    assert stages[-1].flops["vptm"] == B * 2 * D * K
    # the float64 of these models: two norm inputs, qkv, attention's out, the MLP's inner rows, statistics; and keys and
    # values of a block's own prompts, on a CPU
    kept = 8 * B * (N if mode == "deep" else rows) * (10 * D + H + 4) + (8 * P * 2 * D if mode == "deep" else 0)
    assert stages[2].saved["vptm"] == pytest.approx(kept, rel=0.02)
    if mode == "deep":  # what block 0 projects needs no gradient
        assert stages[1].saved["vptm"] == pytest.approx(kept - 8 * B * N * D, rel=0.03)
    assert all(stage.seconds[path] > 0 for stage in stages for path in stage.seconds)


def test_gates_count_with_the_blocks_they_are_of() -> None:
    """Those of carried prompts too, whose rows count with the embedding; a block without prompts has none."""
    model = build_vit(tiny_vit(), prompt_mode="shallow", prompt_gate=-4.0)
    stages = stages_of(model, pictures(model), repeats=1)
    assert [stage.trained for stage in stages[:-1]] == [3 * 16, *[HEADS * 3] * 3]
    dropped = {"prompt_mode": "deep", "prompt_options": {"blocks": 2, "after": "drop"}}
    stages = stages_of(build_vit(tiny_vit(), prompt_gate=-4.0, **dropped), pictures(model), repeats=1)
    assert [stage.trained for stage in stages[:-1]] == [0, *[3 * 16 + HEADS * 3] * 2, 0]


def test_matrices_of_bilinear_prompts_count_with_their_blocks() -> None:
    """Fails where a block's own matrix counts with the embedding."""
    model = build_vit(tiny_vit(), prompt_mode="deep", prompt_options={"prompt_dim": 4, "projection_per": "block"})
    stages = stages_of(model, pictures(model), repeats=1)
    assert [stage.trained for stage in stages[:-1]] == [0, *[3 * 4 + 16 * 4] * 3]


def test_a_trainable_backbone_is_refused() -> None:
    """It runs unfolded; counting it frozen would report a path that does not run."""
    model = beit_model("deep", P).unfreeze()
    with pytest.raises(ValueError, match="profiling needs a frozen backbone, got a trainable one"):
        stages_of(model, images(model, B), repeats=1)


def test_the_token_head_is_counted_folded() -> None:
    """Inference multiplies the hidden state with the folded head; folding it is no cost of a batch."""
    options = {"readout": "mask", "verbalizer": "prototypical", "token_activation": "logits"}
    model = beit_model("deep", P, prototype_dim=6, vocab_size=50, **options)
    stages = stages_of(model, images(model, B), repeats=1)
    assert stages[-1].flops["vptm"] == B * 2 * (6 * D + 6 * K)


def test_the_model_is_left_as_it_was() -> None:
    """Profiling changes neither mode, nor what learns, nor the output."""
    model = build_vit(tiny_vit(), readout="mean").train()
    batch = pictures(model)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = model(batch)
    stages_of(model, batch, repeats=1)
    assert model.training and torch.equal(model(batch), before) and model.block_listener is None
    assert learning == [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_whole_forwards_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is slow for one turn slows both paths of it: timed one after the other, the ratio would tell how
    busy the machine was."""
    clock, order = 0.0, []

    def fake(path: str, seconds: float) -> tuple[object, object]:
        def run() -> None:
            nonlocal clock
            clock += seconds * (10 if len(order) // 2 in (2, 3) else 1)
            order.append(path)

        return None, run

    fakes = {"vptm": fake("vptm", 1.0), "concatenation": fake("concatenation", 2.0)}
    monkeypatch.setattr("vptm.inspection.profile._inference", lambda model, images: fakes)
    monkeypatch.setattr("vptm.inspection.profile._now", lambda images: clock)
    model = beit_model("deep", P)
    times = forwards_of(model, images(model, B), repeats=5)
    assert order == ["concatenation", "vptm", "vptm", "concatenation"] * 3  # the first turn warms up
    assert times.seconds == {"vptm": [1, 10, 10, 1, 1], "concatenation": [2, 20, 20, 2, 2]}
    assert (
        times.ratio() == (2, 2, 2)
        and Quartiles.of(times.seconds["vptm"]) == (1, 1, 10)
        and Quartiles.of([3.0]) == (3, 3, 3)
    )
    nothing = dict.fromkeys(PATHS, 0)
    found = table([Stage("block 0", 1, 1, nothing, nothing, nothing)], 1, "", times)
    assert "vptm 1e+03 ms [1e+03, 1e+04]" in found.caption and "takes 2x [2, 2] of the time" in found.caption


def test_command_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage and the total are printed whole, and the picture is a PNG."""
    target = tmp_path / "cost.png"
    assert _run(["profile", "builtin", "--prompts", "3", "--batch", "2", "--repeats", "1", "--plot", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "deep prompts, P = 3" in lines[0] and not any("…" in line for line in lines)
    rows = [line.split("│")[0].strip() for line in lines if "│" in line]
    assert rows == ["embedding", "block 0", "block 1", "block 2", "block 3", "read-out", "total"]
    text = " ".join(" ".join(lines).split())
    assert "whole forward passes, 1 of each in turns, median [quartiles] per image: vptm" in text
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["builtin", "--prompts", "-1"], "prompt_length must be an integer >= 0, got -1"),
        (["builtin", "--mode", "deeper"], "prompt_mode must be one of shallow, deep, progressive, got 'deeper'"),
        (["builtin", "--readout", "clss"], "readout must be one of mask, cls, mean, got 'clss', did you mean 'cls'?"),
        (["builtin", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["builtin", "--plot", "cost.jpg"], "--plot must be a file name that ends in .png, got cost.jpg"),
        (["builtin", "--plot", "nowhere/cost.png"], "--plot: no such folder"),
        (["builtin", "--impl", "reference"], "compares model.impl with the reference path"),
        (["resnet18"], "PromptedViT runs timm's VisionTransformer and Eva classes, resnet18 is a ResNet"),
        (["no_such.pth"], "no_such.pth: no such file or folder"),
    ],
)
def test_bad_input_gets_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
