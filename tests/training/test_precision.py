"""What a run computes in, what it learns in, and what a compiled run makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from tiny_data import write_backbone
from tiny_runs import LEARNS, assert_same_run, loaders, make_model, run, stopped_run
from torch.utils.data import DataLoader

from vptm import evaluate, fit, load_adapter
from vptm.training.precision import float32_products, resolve_precision, slow_note
from vptm.training.state import STATE_FILE
from vptm.weights.adapter_format import TENSORS_FILE


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


@pytest.mark.parametrize("resumed", [False, True])
def test_bf16_learns_in_float32_and_leaves_the_model_as_it_was(backbone: Path, tmp_path: Path, resumed: bool) -> None:
    """A backbone cast in place is lost, and an adapter of it would hold every weight; learned values that are rounded
    stop moving. What is validated is what computes in bf16, and `evaluate` says the same of the adapter."""
    model = make_model(backbone)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    options: dict[str, Any] = {"epochs": 3, "precision": "bf16"}
    if resumed:
        stopped_run(make_model(backbone), tmp_path / "r", **options)
        state = torch.load(tmp_path / "r" / STATE_FILE, weights_only=True)
        assert all(tensor.dtype == torch.float32 for tensor in state["learned"].values())
        assert all(
            value.dtype == torch.float32
            for moments in state["optimizer"]["state"].values()
            for value in moments.values()
        )
        whole = run(make_model(backbone), tmp_path / "whole", **options)
    result = run(model, tmp_path / "r", resume=resumed, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())
    prompts = model.prompts.weight.detach()
    assert not torch.equal(prompts, prompts.bfloat16().float()), "what was learned was rounded"
    if resumed:
        assert_same_run(tmp_path / "whole", tmp_path / "r")
        assert result.history[-1]["val_loss"] == whole.history[-1]["val_loss"]
    best = result.history[result.best_epoch - 1]
    loaded = load_adapter(tmp_path / "r")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    val = loaders(model)[1]
    assert evaluate(loaded, val, precision="bf16")["loss"] == best["val_loss"]
    assert evaluate(loaded, val)["loss"] != best["val_loss"], "it was validated in another type than it was trained in"
    assert (tmp_path / "r" / TENSORS_FILE).stat().st_size < 20_000, "an adapter holds the whole backbone"


def test_bf16_reaches_the_loss_of_fp32(backbone: Path) -> None:
    """Both of the frozen backbone and of a fine-tuned one, whose every weight is learned in float32."""
    for finetune, lr in ((False, 0.02), (True, 1e-3)):
        losses = []
        for precision in ("bf16", "fp32", None):
            model = make_model(backbone, **LEARNS)
            if finetune:
                model.unfreeze()
            losses.append(run(model, epochs=6, lr=lr, precision=precision).history[-1]["train_loss"])
        assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] != losses[1]
        assert losses[1] == losses[2], "fp32 is what a float32 model does anyway"


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp16", "^precision fp16 trains on a GPU only, got device cpu: bf16 trains on both$"),
        ("tf32", r"^precision tf32 needs a GPU of compute capability 8\.0 or later, got device cpu$"),
        ("bf61", "^precision must be one of auto, fp32, tf32, bf16, fp16, got 'bf61', did you mean 'bf16'"),
    ],
)
def test_a_precision_that_the_device_lacks_is_refused(
    backbone: Path, tmp_path: Path, precision: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_model(backbone), tmp_path / "r", precision=precision)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), ("bf16", "tf32", "bf16")), ((7, 5), ("fp32", ValueError, ValueError))]
)
def test_auto_is_what_the_gpu_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: tuple[Any, ...]
) -> None:
    """PyTorch emulates bf16 on older GPUs, at a fraction of fp32's speed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
    for name, outcome in zip(("auto", "tf32", "bf16"), expected):
        if isinstance(outcome, str):
            assert resolve_precision(name, torch.device("cuda"), training=True) == outcome
        else:
            with pytest.raises(
                ValueError, match=rf"{name} needs .* of compute capability 8\.0 or later, got Old \(7\.5\)"
            ):
                resolve_precision(name, torch.device("cuda"), training=True)
    assert resolve_precision("auto", torch.device("cpu"), training=True) == "fp32"


def _set_tf32() -> None:
    torch.cuda.is_available = lambda: True
    matmul = torch.backends.cuda.matmul
    for way, before in (("function", "ieee"), ("function", "tf32"), ("property", "ieee"), ("property", "tf32")):
        if way == "property":
            matmul.fp32_precision = before
        else:
            torch.set_float32_matmul_precision("highest" if before == "ieee" else "high")
        for precision, inside in (("tf32", "tf32"), ("fp32", "ieee"), ("bf16", before), (None, before)):
            with float32_products(precision):
                assert matmul.fp32_precision == inside, (way, precision, matmul.fp32_precision)
            assert matmul.fp32_precision == before, (way, precision, matmul.fp32_precision)


def test_tf32_is_set_for_the_run_and_put_back() -> None:
    """In a process of its own, where a GPU is pretended: what torch reads of one setting depends on how it was set, and
    once it was set by the property, the function is no longer told."""
    status, _, errors = Forked(_set_tf32).outcome()
    assert status == 0, errors


def test_bf16_says_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for known, slow in (({"avx512_bf16": True, "avx2": True}, False), ({"avx512_bf16": False, "avx2": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert (slow_note("bf16", torch.device("cpu")) is not None) == slow
        assert slow_note("fp32", torch.device("cpu")) is None


def test_another_precision_is_another_run(backbone: Path, tmp_path: Path) -> None:
    stopped_run(make_model(backbone), tmp_path / "r", 2)
    with pytest.raises(ValueError, match="precision was None, now 'bf16'"):
        run(make_model(backbone), tmp_path / "r", epochs=2, resume=True, precision="bf16")


def test_a_compiled_run_is_the_run(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for the steps of all batch sizes and one for validation, with no break in either."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_(*args, **(options | {"backend": backend})))
    torch._dynamo.reset()
    for weight, expected in ((0.0, 2), (0.5, 3)):
        histories = []
        for flag in (False, True):
            model = make_model(backbone)
            train, few = loaders(model)
            val = None if weight else DataLoader(few.dataset, batch_size=5)  # torch.compile makes a graph for one image
            options: dict[str, Any] = {"epochs": 1, "lr": 0.02, "progress": False, "protoverb_weight": weight}
            history = fit(model, train, val, compile=flag, **options).history
            histories.append({k: v for k, v in history[0].items() if k != "seconds" and v is not None})
        assert histories[1] == pytest.approx(histories[0], rel=1e-4)
        assert len(graphs) == expected, f"{len(graphs)} graphs"
    with pytest.raises(ValueError, match="compile must be False with reformation"):
        run(make_model(backbone), reformation=1.0, compile=True)


def test_a_wrapper_is_neither_cast_nor_compiled(backbone: Path) -> None:
    model = make_model(backbone)
    train, val = loaders(model)
    wrapped: Any = torch.nn.DataParallel(model)
    cases: list[dict[str, Any]] = [{"precision": "bf16"}, {"compile": True}]
    for options in cases:
        with pytest.raises(ValueError, match=f"^{next(iter(options))} must be left out for a model in a wrapper"):
            fit(wrapped, train, epochs=1, lr=0.1, **options)
    with pytest.raises(ValueError, match=r"^precision must be left out for a model in a wrapper, got 'bf16'"):
        evaluate(wrapped, val, precision="bf16")
