"""The checks inside the bench files: what each refuses to time."""

from __future__ import annotations

import gc
import re
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counting_clock import CountingClock
from torch._dynamo import config
from torch.utils.flop_counter import FlopCounterMode

from bench import (
    bench_backbones,
    bench_complexity,
    bench_import,
    bench_model,
    bench_prompt_init,
    bench_prompted_attention,
    bench_prototype_cosine,
    bench_readout_attention,
    bench_residual_norm,
    bench_task_bank,
    bench_training_step,
    peers,
    timing,
)
from vptm import PromptedBEiT
from vptm.models.verbalizers import PrototypicalVerbalizer

FP32 = torch.float32


def timed(report, *arguments):
    """What a row reports that must not be skipped: pytest would count the test as skipped then."""
    try:
        return report(*arguments)
    except pytest.skip.Exception as skipped:
        pytest.fail(str(skipped))


def test_prompts_that_are_no_tokens_are_refused(monkeypatch):
    """Prompts drawn from noise cost nothing to make: they must not count as a fast initialisation."""
    loader = bench_prompt_init._loader().dataset
    few = torch.utils.data.DataLoader(torch.utils.data.Subset(loader, range(20)), batch_size=8)
    monkeypatch.setattr(bench_prompt_init, "_loader", lambda: few)
    check = bench_prompt_init.each_is_a_token.__wrapped__("random")
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
    x = bench_task_bank._problem(4, FP32)
    shifted = x._replace(ranges=x.ranges.roll(1, 0), task_ids=x.task_ids.roll(1, 0))
    ours, peer = bench_task_bank.WHERE[where]["vptm"], bench_task_bank.WHERE[where]["call per task"]
    check = bench_task_bank._check(where, 4, FP32)
    runs = {"shifted": lambda: ours(shifted), "peer": lambda: peer(x), "vptm": lambda: ours(x)}
    found = timing.compare(runs, check=check)
    assert set(found.seconds) == {"vptm", "peer"} and "exceeds the budget" in found.refused["shifted"]
    for cached in (bench_task_bank._problem, bench_task_bank._check):
        cached.cache_clear()


@pytest.fixture
def counted(monkeypatch):
    """Time that only work moves, wherever a bench asks for a clock, and ceilings that nobody measures."""
    clock = CountingClock().seconds
    monkeypatch.setattr(timing, "clock_of", lambda *_: clock)
    monkeypatch.setattr(timing, "ceilings", lambda *_: (1e3, 1e3))


def thrice(function):
    def slow(*arguments, **options):
        for _ in range(2):
            function(*arguments, **options)
        return function(*arguments, **options)

    return slow


@pytest.fixture
def tiny_model(monkeypatch):
    """Models are kept between calls: these are never those of another test."""
    for cached in (bench_model.prompted, bench_model._exact, bench_training_step._model, bench_training_step._exact):
        cached.cache_clear()
    monkeypatch.setitem(bench_model.SIZES, "tiny", (48, 2, 3))
    return bench_model.Setting("deep", 3, 2, "tiny", 32)


def model_info(setting, name="vptm"):
    benchmark = Benchmark()
    bench_model.bench_inference(benchmark, name, setting, FP32)
    return benchmark.extra_info


def step_info(setting, name="vptm"):
    benchmark = Benchmark()
    bench_training_step.bench_training_step(benchmark, name, setting, FP32)
    return benchmark.extra_info


def test_bfloat16_of_a_cpu_is_timed_beside_float32_and_sealed(monkeypatch, tiny_model):
    """Whoever gains least by bfloat16 must be seen; a form that a bench cannot build would be refused, not timed."""
    monkeypatch.setattr(timing, "multiplies_bfloat16", lambda: True)
    assert timing.Selection("cpu").of_models() == (FP32, torch.bfloat16)
    assert timing.Selection("cpu", any_dtype=False).of_models() == (FP32,)
    frozen = {peers.FROZEN, peers.graphed_name(peers.FROZEN)}
    asked = timing.Selection("cpu", peers=(*frozen, peers.FLOAT32), tiny=True)  # which rehearses graphs
    monkeypatch.setattr(timing, "selection", asked)
    inference, step = Benchmark(), Benchmark()
    bench_model.bench_inference(inference, "vptm", tiny_model, torch.bfloat16)
    assert set(inference.extra_info["microseconds"]) >= {"vptm", *frozen, peers.FLOAT32}
    assert set(inference.extra_info["forms"]) == frozen
    bench_training_step.bench_training_step(step, "vptm", tiny_model, torch.bfloat16)
    assert f"speed-up over {peers.FLOAT32}" in step.extra_info
    assert "refused" not in inference.extra_info | step.extra_info


def test_the_whole_model_bench_sees_a_slower_vptm(counted, tiny_model, monkeypatch):
    """The ratio of the README's first table, with vptm made to do everything three times: a third must be left."""
    honest = model_info(tiny_model)["speed-up over concatenation"]
    monkeypatch.setattr(PromptedBEiT, "forward_hidden", thrice(PromptedBEiT.forward_hidden))
    assert model_info(tiny_model)["speed-up over concatenation"] == pytest.approx(honest / 3, abs=1e-3)


def test_the_bench_of_the_own_path_sees_a_slower_verbalizer(counted, tiny_model, monkeypatch):
    """Token head and prototypes are part of VPTM: a bench that stopped at the hidden row would not see them."""
    own = tiny_model._replace(readout="mask")
    honest = model_info(own)["microseconds"]["vptm"][1]
    monkeypatch.setattr(PrototypicalVerbalizer, "forward", thrice(PrototypicalVerbalizer.forward))
    assert model_info(own)["microseconds"]["vptm"][1] > honest


@pytest.mark.parametrize("wrong", [lambda x: x * float("nan"), lambda x: x.flip(0), lambda x: x + 1e-4])
def test_the_whole_model_bench_refuses_a_wrong_peer(counted, tiny_model, monkeypatch, wrong):
    concatenate = bench_model._concatenate
    monkeypatch.setattr(bench_model, "_concatenate", lambda *arguments: wrong(concatenate(*arguments)))
    info = model_info(tiny_model)
    assert re.search("exceeds the budget|not finite", info["refused"]["concatenation"])
    assert "speed-up over concatenation" not in info and "speed-up over timm without prompts" in info
    assert "concatenation" not in info["peak extra bytes"]
    with pytest.raises(pytest.skip.Exception, match="not timed: concatenation: "):
        model_info(tiny_model, "concatenation")


def test_the_whole_model_bench_times_nothing_when_vptm_is_wrong(counted, tiny_model, monkeypatch):
    forward = PromptedBEiT.forward_hidden
    bench_model._exact(tiny_model, FP32, "vptm")  # the reference is right; what is timed is not
    monkeypatch.setattr(PromptedBEiT, "forward_hidden", lambda *arguments: forward(*arguments) + 1e-4)
    with pytest.raises(AssertionError, match=r"vptm: error .* exceeds the budget"):
        model_info(tiny_model)


def test_timm_is_checked_against_its_own_float64(counted, tiny_model, monkeypatch):
    """The speed without prompts is one only if that forward is right."""
    plain = bench_model._plain("tiny", 32, FP32)
    assert f"speed-up over {bench_model.TIMM}" in model_info(tiny_model)
    forward = plain.forward
    monkeypatch.setattr(plain, "forward", lambda images: forward(images) + 1e-4)
    assert "exceeds the budget" in model_info(tiny_model)["refused"][bench_model.TIMM]


def test_the_budget_is_the_error_of_the_definition_in_the_same_dtype(tiny_model):
    """A fixed tolerance of bfloat16 would let a kernel pass that is ten times worse than eager."""
    for dtype, scale in ((FP32, 1e-5), (torch.bfloat16, 0.1)):
        exact, eager = bench_model._exact(tiny_model, dtype, "vptm")
        error = (eager.double() - exact).abs().max()
        assert 0 < error < scale * exact.abs().max()
        check = bench_model._check(tiny_model, dtype)
        check("near", (exact + 2 * error).to(dtype))
        with pytest.raises(AssertionError, match=r"far: error .* exceeds the budget"):
            check("far", (exact + 6 * error).to(dtype))


@pytest.mark.parametrize("readout", ["cls", "mask"])
def test_prompts_as_past_keys_and_values_are_the_same_function(counted, tiny_model, monkeypatch, readout):
    """PEFT's form is compared where prompts are deep; one that computed something else would be refused every time."""

    def refuse(*_):
        raise RuntimeError("cannot be built")

    setting = tiny_model._replace(readout=readout)
    monkeypatch.setattr(bench_model, "FIRST", [setting])
    monkeypatch.setattr(bench_model, "FIRST_BATCH", setting.batch)
    monkeypatch.setattr(peers, "hugging_face", refuse)
    monkeypatch.setattr(peers, "_RUNTIMES", dict.fromkeys(peers._RUNTIMES, refuse))
    info = model_info(setting)
    assert f"speed-up over {bench_model.PREFIX}" in info
    assert info["refused"].pop(peers.TRANSFORMERS) == "cannot be built", "and the others are compared all the same"
    assert set(info["refused"]) <= set(peers.RUNTIMES)
    training = step_info(setting)
    assert f"speed-up over {bench_model.PREFIX}" in training and "refused" not in training


def test_every_number_of_deep_prompts_meets_the_compiled_prefix(tiny_model, monkeypatch):
    """It does the same linears as vptm: the strongest honest peer has to be in every row that claims a speed-up."""
    made = []
    monkeypatch.setattr(timing, "one_graph", lambda run, mode, backend: made.append(mode) or run)
    monkeypatch.setattr(bench_model, "FIRST", [tiny_model])
    monkeypatch.setattr(bench_model, "FIRST_BATCH", tiny_model.batch)
    monkeypatch.setattr(timing, "selection", timing.Selection("cpu", full=True))
    for length, others in ((3, True), (2, False), (1, False)):
        with torch.inference_mode():
            names = set(bench_model._peers(tiny_model._replace(length=length), FP32))
        assert {"PEFT-style prefix", "PEFT-style prefix compiled"} <= names
        assert ("torch.compile" in names) == ("vptm compiled" in names) == others


@pytest.mark.parametrize("readout", ["cls", "mask"])
@pytest.mark.parametrize("mode, length", [("deep", 3), ("shallow", 3), ("no", 0)])
def test_operations_of_the_whole_model_are_those_that_pytorch_counts(monkeypatch, mode, length, readout):
    """The share of the ceiling is worth as much as this formula."""
    monkeypatch.setitem(bench_model.SIZES, "four blocks", (48, 4, 3))
    setting = bench_model.Setting(mode, length, 2, "four blocks", 32, readout)
    run = bench_model._runs(setting, torch.float64)["vptm"]  # float32 may run in oneDNN, which is not counted
    with torch.inference_mode():
        run()  # the weights are folded
        with FlopCounterMode(display=False) as counter:
            run()
    assert bench_model.work(setting, FP32).operations == counter.get_total_flops()


@pytest.mark.parametrize("length, forward, step", [(0, 32.24, None), (100, 32.91, 68.5), (200, 33.57, 70.9)])
def test_operations_are_those_of_the_published_cost_model(length, forward, step):
    """BEiT-B/16 at 224, GFLOP per image at batch 64; a step may differ in its last block,
    where the read-out never forms keys and values."""
    setting = bench_model.Setting("deep", length, 64)
    projected = 4 * 12 * length * 768**2  # once for the batch; kept by the model that was published
    assert (bench_model.work(setting, FP32).operations - projected) / 64e9 == pytest.approx(forward, rel=1e-3)
    if step:
        assert bench_model.work(setting, FP32, step=True).operations / 64e9 == pytest.approx(step, rel=0.03)


def test_one_model_is_held_at_a_time(tiny_model):
    """All settings of a full grid at once do not fit a GPU."""
    other = tiny_model._replace(length=1)
    held = weakref.ref(bench_model.prompted(tiny_model, FP32))
    assert bench_model.prompted(tiny_model, FP32) is held()
    bench_model.prompted(other, FP32)
    gc.collect()
    assert held() is None


def test_the_training_bench_sees_a_slower_vptm(counted, tiny_model, monkeypatch):
    step_info(tiny_model)  # what a first step derives from the weights is no part of the others
    honest = step_info(tiny_model)["speed-up over concatenation"]
    monkeypatch.setattr(PromptedBEiT, "forward", thrice(PromptedBEiT.forward))
    # the backward pass, which runs once, stays as it is
    assert step_info(tiny_model)["speed-up over concatenation"] < 0.75 * honest


@pytest.mark.parametrize("factor", [float("nan"), 1.001])
def test_the_training_bench_refuses_a_wrong_peer_and_times_the_others(counted, tiny_model, monkeypatch, factor):
    """A wrong peer that raised would take vptm's own time with it."""
    concatenate = bench_model._concatenate
    monkeypatch.setattr(bench_model, "_concatenate", lambda *arguments: concatenate(*arguments) * factor)
    info = step_info(tiny_model)
    assert "exceeds the budget" in info["refused"]["concatenation"]
    assert "speed-up over concatenation" not in info and f"speed-up over {bench_model.PREFIX}" in info
    assert set(info["bytes saved for backward"]) == {"vptm", bench_model.PREFIX}
    with pytest.raises(pytest.skip.Exception, match="not timed: concatenation: result 0: error"):
        step_info(tiny_model, "concatenation")


def test_the_training_bench_times_nothing_when_vptm_is_wrong(counted, tiny_model, monkeypatch):
    forward = PromptedBEiT.forward
    bench_training_step._exact(tiny_model, FP32)
    monkeypatch.setattr(PromptedBEiT, "forward", lambda *arguments: forward(*arguments) * 1.001)
    with pytest.raises(AssertionError, match=r"vptm: result 0: error .* exceeds the budget"):
        step_info(tiny_model)


def test_a_training_step_without_prompts_is_timed(counted, tiny_model):
    """An empty parameter has no gradient that autograd could give."""
    info = step_info(tiny_model._replace(mode="no", length=0))
    assert "speed-up over concatenation" in info and info["prompt_length"] == 0


class Benchmark:
    """Enough of pytest-benchmark's fixture to see what a bench reports."""

    def __init__(self):
        self.extra_info, self.group = {}, None

    def pedantic(self, run, **options):
        run()


SMALL = bench_prompted_attention.Shape(2, 3, (3, 3), 2, 16)


def attention_info(name="vptm", direction="forward and backward"):
    benchmark = Benchmark()
    bench_prompted_attention.bench_prompted_attention(benchmark, name, SMALL, FP32, direction)
    return benchmark.extra_info


def replace_peer(monkeypatch, name, run):
    monkeypatch.setitem(bench_prompted_attention.PEERS, name, timing.Peer(run, paired=name != "flash without bias"))


def test_the_attention_bench_sees_a_slower_vptm(counted, monkeypatch):
    honest = attention_info()["speed-up over sdpa"]
    monkeypatch.setattr(bench_prompted_attention, "_vptm", thrice(bench_prompted_attention._vptm))
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
    replace_peer(monkeypatch, "sdpa", lambda shape, x: NanGradient.apply(right(shape, x)))
    for direction in ("forward", "forward and backward"):
        info = attention_info(direction=direction)
        assert "exceeds the budget" in info["refused"]["sdpa"] and "speed-up over sdpa" not in info
        assert "speed-up over eager" in info
        with pytest.raises(pytest.skip.Exception, match="not timed: sdpa: result 1: error inf"):
            attention_info("sdpa", direction)


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("wrong", [lambda out: out.flip(0), lambda out: torch.cat([out[:-1], out[-1:] * float("nan")])])
def test_the_attention_bench_refuses_a_peer_that_is_right_on_two_images_alone(counted, monkeypatch, direction, wrong):
    """A kernel that mixes up images, or fails beyond some batch size, passes a check of two."""
    right = bench_prompted_attention.PEERS["sdpa"].run
    monkeypatch.setattr(f"{__name__}.SMALL", bench_prompted_attention.Shape(3, 3, (3, 3), 2, 16))
    replace_peer(monkeypatch, "sdpa", lambda shape, x: right(shape, x) if shape.batch < 3 else wrong(right(shape, x)))
    assert "in the batch" in attention_info(direction=direction)["refused"]["sdpa"]


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_the_speed_of_light_is_checked_against_attention_without_a_bias(counted, monkeypatch, factor):
    """It takes no part in the ratios, and a wrong one would put the limit in a wrong place."""
    plain = bench_prompted_attention._sdpa
    replace_peer(monkeypatch, "flash without bias", lambda shape, x: factor * plain(shape, x, None, biased=False))
    info = attention_info()
    assert "flash without bias" not in info["microseconds"]
    if factor == 1:
        assert timed(attention_info, "flash without bias")["implementation"] == "flash without bias"
    else:
        with pytest.raises(pytest.skip.Exception, match=r"flash without bias: result 0: .* exceeds the budget"):
            attention_info("flash without bias")


def test_xformers_gets_a_bias_it_can_take(counted, monkeypatch):
    """Its kernels read rows of eight and refuse a bias that is not expanded to the batch."""

    def memory_efficient_attention(q, k, v, bias):
        assert bias.shape == (len(q), q.shape[2], q.shape[1], k.shape[1]) and bias.stride(-2) % 8 == 0
        rows = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*rows, bias).transpose(1, 2)

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    replace_peer(monkeypatch, "xformers", bench_prompted_attention._xformers)
    assert "speed-up over xformers" in attention_info()


@pytest.fixture
def tiny_ops(counted, monkeypatch):
    """Benches of single ops at sizes that take no time, by name: a function that gives what one row reports."""
    for name, size in (("WIDTH", 24), ("TOKENS", 60), ("DIM", 8)):
        monkeypatch.setattr(bench_prototype_cosine, name, size)
    bench_prototype_cosine._problem.cache_clear()
    for name, size in (("TOKENS", 5), ("CLASSES", 7)):
        monkeypatch.setattr(bench_task_bank, name, size)
    monkeypatch.setattr(bench_prompt_init, "IMAGES", 64)
    for cached in (
        bench_task_bank._problem,
        bench_task_bank._check,
        bench_prompt_init._loader,
        bench_prompt_init.each_is_a_token,
    ):
        cached.cache_clear()
    # compiling is tested elsewhere
    monkeypatch.setattr(timing, "one_graph", lambda function, mode: function)
    sweep = replace(bench_complexity.SWEEPS["tasks"], sizes=(4, 8, 12))
    monkeypatch.setitem(bench_complexity.SWEEPS, "tasks", sweep)
    readout = bench_readout_attention.Shape(2, 3, 5, 2, 16)
    rows = {
        "bench_prompted_attention": ("bench_prompted_attention", SMALL, FP32, "forward"),
        "bench_readout_attention": ("bench_readout_attention", readout, "forward", FP32),
        "bench_residual_norm": ("bench_residual_norm", (2, 5, 32), True, "forward", FP32),
        "bench_prototype_cosine": ("bench_folded_inference", "raw", 5, 3, FP32),
        "bench_prototype_cosine, unfolded": ("bench_inference", "softmax", 5, 3, FP32),
        "bench_prototype_cosine, training": ("bench_training_step", "logits", 5, 3, FP32),
        "bench_task_bank": ("bench_task_bank", "verbalizer", 4, FP32),
        "bench_prompt_init": ("bench_prompt_init", "mean"),
        "bench_complexity": ("bench_complexity", "tasks", FP32),
    }

    def report(bench, implementation="vptm"):
        benchmark, (function, *arguments) = Benchmark(), rows[bench]
        first = [] if bench == "bench_complexity" else [implementation]
        getattr(BENCHES[bench.partition(",")[0]], function)(benchmark, *first, *arguments)
        return benchmark.extra_info

    yield report
    for cached in (
        bench_prototype_cosine._problem,
        bench_task_bank._problem,
        bench_task_bank._check,
        bench_prompt_init._loader,
        bench_prompt_init.each_is_a_token,
    ):
        cached.cache_clear()


BENCHES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        bench_complexity,
        bench_model,
        bench_prompt_init,
        bench_prompted_attention,
        bench_prototype_cosine,
        bench_readout_attention,
        bench_residual_norm,
        bench_task_bank,
        bench_training_step,
    )
}
# what vptm runs, a peer, what that peer runs, and one that stays as it is
OPS = {
    "bench_readout_attention": ("_vptm", "absorbed", None, "sdpa"),
    "bench_residual_norm": ("_vptm", "torch.compile", None, "eager"),
    "bench_prototype_cosine": ("prototype_cosine", "hand-folded", "hand_folded", "eager"),
    "bench_prototype_cosine, unfolded": ("prototype_cosine", "eager", "eager", None),
}


@pytest.mark.parametrize("bench", OPS)
def test_the_bench_of_an_op_sees_a_slower_vptm(tiny_ops, monkeypatch, bench):
    """An op that does everything three times must be left with a third of its ratios."""
    function, *peers_of_it = OPS[bench]
    module, honest = BENCHES[bench.partition(",")[0]], tiny_ops(bench)
    monkeypatch.setattr(module, function, thrice(getattr(module, function)))
    slowed = tiny_ops(bench)
    for peer in (peers_of_it[0], peers_of_it[2]):
        if peer:
            ratio = f"speed-up over {peer}"
            assert slowed[ratio] == pytest.approx(honest[ratio] / 3, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("wrong", [lambda out: out + 0.01, lambda out: out * float("nan")], ids=["off", "nan"])
@pytest.mark.parametrize("bench", [name for name, (_, _, _, right) in OPS.items() if right])
def test_the_bench_of_an_op_refuses_a_wrong_peer(tiny_ops, monkeypatch, bench, wrong):
    _, peer, method, other = OPS[bench]
    module = BENCHES[bench]
    if method:
        right = getattr(module.Problem, method)
        monkeypatch.setattr(module.Problem, method, lambda problem: wrong(right(problem)))
    else:
        entry = module.PEERS[peer]

        def run(*arguments):
            out = entry.run(*arguments)
            return wrong(out) if isinstance(out, torch.Tensor) else (out[0], wrong(out[1]))

        monkeypatch.setitem(module.PEERS, peer, replace(entry, run=run, needs=()))
    info = tiny_ops(bench)
    assert "exceeds the budget" in info["refused"][peer] and f"speed-up over {peer}" not in info
    assert f"speed-up over {other}" in info
    with pytest.raises(pytest.skip.Exception, match=f"not timed: {peer}"):
        tiny_ops(bench, peer)
    assert timed(tiny_ops, bench, other)["implementation"] == other


REPORTED = {
    *("bytes", "operations", "achieved bandwidth", "achieved rate", "share of ceiling", "peak extra bytes", "dtype"),
    *("measured copy bandwidth", "measured matrix rate", "device"),
}


def test_every_bench_reports_work_and_memory(tiny_ops, tiny_model):
    """A speed-up without the share of what the machine can do says nothing about what is left to win."""
    found = {name: tiny_ops(name) for name in ("bench_complexity", "bench_prompt_init", "bench_task_bank", *OPS)}
    found |= {"bench_prompted_attention": attention_info(), "bench_prototype_cosine": found["bench_prototype_cosine"]}
    found |= {"training": tiny_ops("bench_prototype_cosine, training")}
    found |= {"bench_model": model_info(tiny_model), "bench_training_step": step_info(tiny_model)}
    for name, info in found.items():
        assert set(info) >= REPORTED, name
        assert info["share of ceiling"] > 0 and info["peak extra bytes"]["vptm"] > 0, name
        if name != "bench_complexity":
            assert info["implementation"] == "vptm", name
            assert set(info["peak extra bytes"]) <= set(info["microseconds"]), name
    folder = Path(timing.__file__).parent
    # what moves no bytes of its own: imports, kernels that are not launched, whole processes
    others = {"bench_import", "bench_host_time", "bench_training_throughput"}
    # and one whose settings are models of their own, below
    files = {path.stem for path in folder.glob("bench_*.py")} - others - {"bench_backbones"}
    assert files == set(BENCHES) and files <= set(found), "a bench that is not in this test"


def test_rows_of_peers_take_the_time_of_the_comparison(tiny_ops):
    """Timed a second time, a peer would have another share of the ceiling than in the ratios."""
    ours, theirs = (timed(tiny_ops, "bench_readout_attention", name) for name in ("vptm", "sdpa"))
    assert theirs["achieved rate"] * ours["microseconds"]["sdpa"][1] == pytest.approx(1e6 * theirs["operations"])
    timing._last.clear()
    assert timed(tiny_ops, "bench_readout_attention", "sdpa")["achieved rate"] == theirs["achieved rate"]


@pytest.mark.parametrize("bench", [*BENCHES, "bench_import"])
def test_every_peer_can_be_asked_for_by_name(bench):
    """--peers splits at commas: a name with one could never be selected."""
    names = getattr(BENCHES.get(bench, bench_import), "PEERS", {})
    assert not any("," in name for name in names)


def compiled_peers():
    """What torch.compile gets from every bench, as a call without arguments, and the result it must have."""
    x = bench_prompted_attention._inputs(SMALL, FP32)
    # FlexAttention has no backward on a CPU
    x = replace(x, qkv=x.qkv.detach(), prompts=x.prompts.detach())
    eager = bench_prompted_attention._eager(SMALL, x)
    for run in (bench_prompted_attention._eager, bench_prompted_attention._flex):
        yield run, (SMALL, x), eager
    shape = bench_readout_attention.Shape(2, 3, 5, 2, 16)
    inputs = bench_readout_attention._inputs(shape, FP32)
    expected = bench_readout_attention._definition(shape, inputs)
    for run in (bench_readout_attention._sdpa, bench_readout_attention._absorbed):
        yield run, (shape, inputs), expected
    inputs = bench_residual_norm._inputs((2, 5, 32), True, FP32)
    yield bench_residual_norm._eager, (inputs,), bench_residual_norm._eager(inputs)
    problem = bench_prototype_cosine.Problem(3, 5, "logits", True, FP32)
    yield problem.eager, (), problem.eager()
    for mode in ("deep", "shallow"):
        run = bench_model._runs(bench_model.Setting(mode, 3, 2, "tiny", 32), FP32)["concatenation"]
        yield run, (), run()


def test_compiled_peers_are_whole_graphs(tiny_model, monkeypatch):
    """A graph break would refuse the peer on a GPU, where alone it is compiled."""
    for name, size in (("WIDTH", 24), ("TOKENS", 60), ("DIM", 8)):
        monkeypatch.setattr(bench_prototype_cosine, name, size)
    found = 0
    with config.patch(fail_on_recompile_limit_hit=False):  # put back afterwards; monkeypatch would delete it
        for run, arguments, expected in compiled_peers():
            form = timing.one_graph(run, backend="eager")
            torch.testing.assert_close(form(*arguments), expected, rtol=1e-4, atol=1e-5)
            found += 1
    assert found == 8


@pytest.fixture
def backbones(monkeypatch):
    """Tiny ones."""
    monkeypatch.setattr(bench_backbones, "TINY", True)
    kept = (bench_backbones._model, bench_backbones._images, bench_backbones._exact)
    for cached in kept:
        cached.cache_clear()
    yield
    for cached in kept:
        cached.cache_clear()


@pytest.mark.parametrize("setting", bench_backbones.SETTINGS, ids=str)
def test_other_backbones_are_compared_and_a_wrong_vptm_is_refused(backbones, monkeypatch, setting):
    """Their definition is the textbook path of the same model, through timm's own blocks."""
    benchmark = Benchmark()
    bench_backbones.bench_backbones(benchmark, "vptm", setting, FP32)
    assert set(benchmark.extra_info) >= REPORTED and benchmark.extra_info["operations"] > 0
    assert {f"speed-up over {peer}" for peer in bench_backbones.EAGER} <= set(benchmark.extra_info)
    right = bench_backbones._runs

    def wrong(*given):
        return right(*given) | {"vptm": lambda: right(*given)["vptm"]() * 1.01}

    monkeypatch.setattr(bench_backbones, "_runs", wrong)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        bench_backbones.bench_backbones(Benchmark(), "vptm", setting, FP32)
