"""The checks inside the bench files: what each refuses to time."""

from __future__ import annotations

import pytest
import torch
from counting_clock import CountingClock

from bench import (
    bench_import,
    bench_model,
    bench_prompt_init,
    bench_prompted_attention,
    bench_prototype_cosine,
    bench_task_bank,
    timing,
)
from vptm import PromptedBEiT


def test_prompts_that_are_no_tokens_are_refused(monkeypatch):
    """Prompts drawn from noise cost nothing to make: they must not count as a fast initialisation."""
    loader = bench_prompt_init._loader().dataset
    few = torch.utils.data.DataLoader(torch.utils.data.Subset(loader, range(20)), batch_size=8)
    monkeypatch.setattr(bench_prompt_init, "_loader", lambda: few)
    check = bench_prompt_init.each_is_a_token("random")
    honest = bench_prompt_init._ours("random")
    check("vptm", honest)
    check("every image forwarded", bench_prompt_init._published("random"))
    with pytest.raises(AssertionError, match="noise: a prompt of layer 0 is no token"):
        check("noise", torch.randn_like(honest))
    with pytest.raises(AssertionError, match="copies: the prompts of layer 0 are copies"):
        check("copies", honest[:, :1].expand_as(honest))


def test_a_failing_import_is_refused_by_name():
    with pytest.raises(RuntimeError, match="no_such_package: ModuleNotFoundError"):
        bench_import.seconds_to_import("no_such_package")


def test_an_import_that_starts_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(bench_import, "_CHILD", "print('[0.01, true]')")
    with pytest.raises(RuntimeError, match="vptm: importing it started CUDA"):
        bench_import.seconds_to_import("vptm")


def test_a_slower_import_lowers_the_ratio(monkeypatch):
    """The clock of the import bench is the child's own report: twice the seconds of ours, half the ratio."""
    for seconds, ratio in ((0.05, 8.0), (0.1, 4.0)):
        runs = {"vptm": lambda s=seconds: s, "timm": lambda: 0.4}
        found = timing.compare(runs, check=None, clock=bench_import.by_its_own_report)
        assert found.speed_up("timm") == ratio


@pytest.mark.parametrize("where", bench_task_bank.WHERE)
def test_images_that_get_another_tasks_prompts_or_prototypes_are_refused(where, monkeypatch):
    """A pool read at the wrong rows is as fast as the right one."""
    monkeypatch.setattr(bench_task_bank, "TOKENS", 5)
    monkeypatch.setattr(bench_task_bank, "CLASSES", 7)
    for cached in (bench_task_bank._problem, bench_task_bank._check):
        cached.cache_clear()
    x = bench_task_bank._problem(4)
    shifted = x._replace(ranges=x.ranges.roll(1, 0), task_ids=x.task_ids.roll(1, 0))
    ours, peer = bench_task_bank.WHERE[where]["vptm"], bench_task_bank.WHERE[where]["call per task"]
    check = bench_task_bank._check(where, 4)
    runs = {"shifted": lambda: ours(shifted), "peer": lambda: peer(x), "vptm": lambda: ours(x)}
    found = timing.compare(runs, check=check)
    assert set(found.seconds) == {"vptm", "peer"} and "exceeds the budget" in found.refused["shifted"]
    for cached in (bench_task_bank._problem, bench_task_bank._check):
        cached.cache_clear()


@pytest.fixture
def counted(monkeypatch):
    """Time that only work moves, wherever a bench asks for a clock."""
    clock = CountingClock().seconds
    monkeypatch.setattr(timing, "clock_of", lambda *_: clock)


def thrice(function):
    def slow(*arguments, **options):
        for _ in range(2):
            function(*arguments, **options)
        return function(*arguments, **options)

    return slow


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setitem(bench_model.SIZES, "tiny", (48, 2, 3))
    return bench_model.Setting("deep", 3, 2, "tiny", 32)


def ratios_of_model(setting):
    with torch.inference_mode():
        return timing.compare(
            bench_model._peers(setting), check=bench_model._check(setting), device=timing.selection.device
        )


def test_the_whole_model_bench_sees_a_slower_vptm(counted, tiny_model, monkeypatch):
    """The ratio of the README's first table, with vptm made to do everything three times: a third must be left."""
    honest = ratios_of_model(tiny_model).speed_up("concatenation")
    monkeypatch.setattr(PromptedBEiT, "forward_hidden", thrice(PromptedBEiT.forward_hidden))
    assert ratios_of_model(tiny_model).speed_up("concatenation") == pytest.approx(honest / 3)


@pytest.mark.parametrize("wrong", [lambda x: x * float("nan"), lambda x: x.flip(0), lambda x: x + 0.05])
def test_the_whole_model_bench_refuses_a_wrong_peer(counted, tiny_model, monkeypatch, wrong):
    concatenate = bench_model._concatenate
    monkeypatch.setattr(bench_model, "_concatenate", lambda *arguments: wrong(concatenate(*arguments)))
    found = ratios_of_model(tiny_model)
    assert "differs from the fp64 reference" in found.refused["concatenation"]
    assert "concatenation" not in found.seconds and "timm without prompts" in found.seconds


def test_the_whole_model_bench_times_nothing_when_vptm_is_wrong(counted, tiny_model, monkeypatch):
    forward = PromptedBEiT.forward_hidden
    bench_model._model(tiny_model)  # the reference is right; what is timed is not
    monkeypatch.setattr(PromptedBEiT, "forward_hidden", lambda *arguments: forward(*arguments) + 0.05)
    with pytest.raises(AssertionError, match="vptm differs from the fp64 reference"):
        ratios_of_model(tiny_model)


class Benchmark:
    """Enough of pytest-benchmark's fixture to see what a bench reports."""

    def __init__(self):
        self.extra_info, self.group = {}, None

    def pedantic(self, run, **options):
        run()


SMALL = bench_prompted_attention.Shape(2, 3, (3, 3), 2, 16)


def attention_info(name="vptm"):
    benchmark = Benchmark()
    bench_prompted_attention.bench_prompted_attention(benchmark, name, SMALL, "forward and backward")
    return benchmark.extra_info


def test_the_attention_bench_sees_a_slower_vptm(counted, monkeypatch):
    honest = attention_info()["speed-up over sdpa"]
    monkeypatch.setitem(
        bench_prompted_attention.IMPLEMENTATIONS, "vptm", thrice(bench_prompted_attention.IMPLEMENTATIONS["vptm"])
    )
    # the backward pass, which runs once, stays as it is
    assert attention_info()["speed-up over sdpa"] < 0.75 * honest


def test_the_attention_bench_refuses_a_wrong_peer(counted, monkeypatch):
    """The class of cuDNN before 9.26, which gives NaN gradients behind a right forward pass."""

    class NanGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    right = bench_prompted_attention.PEERS["sdpa"].run
    wrong = timing.Peer(lambda shape, x: NanGradient.apply(right(shape, x)))
    monkeypatch.setitem(bench_prompted_attention.PEERS, "sdpa", wrong)
    monkeypatch.setitem(bench_prompted_attention.IMPLEMENTATIONS, "sdpa", wrong.run)
    info = attention_info()
    assert "exceeds the budget" in info["refused"]["sdpa"] and "speed-up over sdpa" not in info
    assert "speed-up over eager" in info
    with pytest.raises(pytest.skip.Exception, match="not timed: sdpa: result 1: error inf"):
        attention_info("sdpa")


@pytest.fixture
def cosine_info(counted, monkeypatch):
    """What the bench of prototype_cosine reports of a small folded head."""
    for name, size in (("WIDTH", 24), ("TOKENS", 60), ("DIM", 8)):
        monkeypatch.setattr(bench_prototype_cosine, name, size)
    monkeypatch.setattr(timing, "work_info", lambda *_: {})

    def report():
        benchmark = Benchmark()
        bench_prototype_cosine.bench_folded_inference(benchmark, "raw", 5, 3)
        return benchmark.extra_info

    return report


def test_the_cosine_bench_sees_a_slower_vptm(cosine_info, monkeypatch):
    honest = cosine_info()
    monkeypatch.setattr(bench_prototype_cosine, "prototype_cosine", thrice(bench_prototype_cosine.prototype_cosine))
    for peer in ("eager", "hand-folded"):
        assert cosine_info()[f"speed-up over {peer}"] == pytest.approx(honest[f"speed-up over {peer}"] / 3, rel=1e-2)


def test_the_cosine_bench_refuses_a_wrong_peer(cosine_info, monkeypatch):
    right = bench_prototype_cosine.Problem.hand_folded
    monkeypatch.setattr(bench_prototype_cosine.Problem, "hand_folded", lambda problem: right(problem) + 0.01)
    info = cosine_info()
    assert "exceeds the budget" in info["refused"]["hand-folded"] and "speed-up over hand-folded" not in info
    assert "speed-up over eager" in info
