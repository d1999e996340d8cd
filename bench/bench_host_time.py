"""What a call costs the host while a GPU waits for it: thread CPU time, with a GPU that is pretended, on any machine.

    pytest bench/bench_host_time.py --benchmark-only
    python -m bench.bench_host_time bench/results/host_time.json     # the same, in few lines

Tensors are on the CPU, one image of a width at which arithmetic takes little time, and the kernels of vptm are bound
and kept as on sm_90 but not launched: what is left is Python, PyTorch's dispatch and Triton's binder. What is not
counted is the driver's part of a launch, which everybody pays, and vptm for fewer kernels. PyTorch's own operations run
on the CPU, those of vptm and those of peers, and their time is counted. `extra_info` has microseconds of each by name;
the outputs of vptm hold whatever memory held, and are looked at by tests, not here.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timm.models.beit import Beit
from torch import Tensor
from torch.nn import functional as F

from bench import bench_model, peers, timing
from vptm import PromptedBEiT
from vptm_kernels import prompted_attention, readout_attention
from vptm_kernels.testing.pretend_gpu import pretend_gpu

DEVICE = "cpu"
DTYPE = torch.float32  # of the models; ops get bfloat16
SDPA = "scaled_dot_product_attention"
PEERS = {name: timing.Peer(lambda: None) for name in (SDPA, peers.TIMM, peers.CONCATENATION, peers.PREFIX)}
ROUNDS, CALLS = 15, 20
BLOCKS, PROMPTS, CLASSES = 12, 4, 100
DIRECTIONS = ("inference", "forward and backward")

Runs = dict[str, timing.Run]


def thread_seconds(run: timing.Run) -> float:
    """A clock that a busy machine disturbs little: the fastest of a few calls, in CPU time of this thread."""
    times = []
    for _ in range(CALLS):
        started = time.thread_time()
        run()
        times.append(time.thread_time() - started)
    return min(times)


def _inferring(run: timing.Run) -> timing.Run:
    return torch.inference_mode()(run)


def _with_gradients(run: Callable[[], Tensor], inputs: list[Tensor]) -> timing.Run:
    grad = torch.zeros_like(run())
    return lambda: torch.autograd.grad(run(), inputs, grad)


def prompted(direction: str) -> Runs:
    """BEiT-B's attention at 224 with 50 prompts, and PyTorch's own without any."""
    heads, dim, tokens, prompts = 12, 64, 197, 50
    qkv = torch.zeros(1, tokens, 3 * heads * dim, dtype=torch.bfloat16)
    prefix = torch.zeros(prompts, 2 * heads * dim, dtype=torch.bfloat16)
    bias = torch.zeros(heads, tokens, 208, dtype=torch.float16)[..., :tokens]
    query, key, value = torch.zeros(3, 1, 2, 8, 16).unbind()
    learned = [qkv, prefix], [query, key, value]
    calls: list[Callable[[], Tensor]] = [
        lambda: prompted_attention(qkv, prefix, num_heads=heads, bias=bias, impl="triton"),
        lambda: F.scaled_dot_product_attention(query, key, value),
    ]
    return _directed(dict(zip((peers.OURS, SDPA), calls)), learned, direction)


def readout(direction: str) -> Runs:
    """The read-out row of the same block; the peer projects keys and values of all tokens."""
    heads, width, tokens, inner = 2, 32, 17, 32
    x, query, prompts = torch.zeros(1, tokens, width), torch.zeros(1, inner), torch.zeros(PROMPTS, 2 * inner)
    weight = torch.zeros(3, inner, width)

    def eager() -> Tensor:
        rows = F.linear(F.layer_norm(x, (width,), eps=1e-6), weight[1:].flatten(0, 1))
        key, value = torch.cat([rows, prompts[None]], 1).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query.view(1, heads, 1, -1), key, value).flatten(1)

    def ours() -> Tensor:
        weights = (weight[1], weight[2], None)
        return readout_attention(
            x, query, None, None, 1e-6, *weights, num_heads=heads, prompt_kv=prompts, impl="triton"
        )

    learned = [x, query, prompts]
    return _directed({peers.OURS: ours, SDPA: eager}, (learned, learned), direction)


def _directed(
    calls: dict[str, Callable[[], Tensor]], learned: tuple[list[Tensor], list[Tensor]], direction: str
) -> Runs:
    if direction == DIRECTIONS[0]:
        return {name: _inferring(call) for name, call in calls.items()}
    for t in (*learned[0], *learned[1]):
        t.requires_grad_()
    return {name: _with_gradients(call, leaves) for (name, call), leaves in zip(calls.items(), learned)}


OPS = {"prompted_attention": prompted, "readout_attention": readout}
MODES = ("unsealed", "frozen for inference", "training step")


def _model() -> tuple[PromptedBEiT, Beit]:
    """12 blocks of two heads and 32 channels, deep prompts in each, the class row and a linear classifier."""
    torch.manual_seed(0)
    backbone = Beit(
        img_size=32,
        embed_dim=32,
        depth=BLOCKS,
        num_heads=2,
        num_classes=0,
        global_pool="token",
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=0.1,
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(
            copy.deepcopy(backbone),
            CLASSES,
            prompt_mode="deep",
            prompt_length=PROMPTS,
            readout="cls",
            token_activation="hidden",
            verbalizer="linear",
            impl="triton",
        )
    return model, backbone


def of_model(mode: str) -> Runs:
    """vptm, timm without prompts, prompts concatenated and as keys and values; with the classifier, timm without."""
    (model, backbone), images = _model(), torch.zeros(1, 3, 32, 32)
    peer = copy.deepcopy(model)

    def classified(hidden: Tensor) -> Tensor:
        return peer.verbalizer(hidden, peer.lm_head)

    if mode == MODES[2]:
        model.train()
        labels = torch.zeros(1, dtype=torch.long)
        own, others = ([t for t in m.trainable_parameters() if t.numel()] for m in (model, peer))

        def step(learned: list[Tensor], run: Callable[[], Tensor]) -> timing.Run:
            return lambda: torch.autograd.grad(F.cross_entropy(run(), labels), learned)

        return {
            peers.OURS: step(own, partial(model, images)),
            peers.CONCATENATION: step(others, lambda: classified(bench_model._concatenate(peer, images))),
            peers.PREFIX: step(
                others, lambda: classified(bench_model._with_prefixes(peer, bench_model._prefixes(peer), images))
            ),
        }
    model.eval()
    if mode == MODES[1]:
        model.freeze_for_inference()
    with torch.inference_mode():
        past = bench_model._prefixes(peer)
    runs: dict[str, Callable[[], Any]] = {
        peers.OURS: partial(model, images),
        peers.TIMM: partial(backbone, images),
        peers.CONCATENATION: lambda: classified(bench_model._concatenate(peer, images)),
        peers.PREFIX: lambda: classified(bench_model._with_prefixes(peer, past, images)),
    }
    return {name: _inferring(run) for name, run in runs.items()}


def compared(runs: Runs, compiled: list[str]) -> tuple[timing.Comparison, dict[str, Any]]:
    """In turns; and microseconds of host by name. compiled: kernels, as they are asked for."""
    found = timing.compare(runs, check=None, rounds=ROUNDS, warmup=5, clock=thread_seconds)
    assert not found.refused, found.refused
    assert compiled, "no kernel was asked for: this is not the path of a GPU"
    taken = {name: round(1e6 * found.median(name), 1) for name in runs}
    return found, {"microseconds of host": taken, "kernels compiled": len(compiled)}


def _report(benchmark: BenchmarkFixture, group: str, runs: Runs, compiled: list[str]) -> None:
    benchmark.group = f"host time: {group}"
    present = timing.present(PEERS)
    runs = {name: run for name, run in runs.items() if name == peers.OURS or name in present}
    found, taken = compared(runs, compiled)
    benchmark.extra_info |= found.info() | taken
    benchmark.pedantic(runs[peers.OURS], rounds=ROUNDS, iterations=CALLS)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def bench_op(benchmark: BenchmarkFixture, op: str, direction: str) -> None:
    with pretend_gpu() as seen:
        _report(benchmark, f"{op}, {direction}", OPS[op](direction), seen.compiled)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("mode", MODES)
def bench_model_of_12_blocks(benchmark: BenchmarkFixture, mode: str) -> None:
    with pretend_gpu() as seen:
        _report(benchmark, f"{BLOCKS} blocks, {mode}", of_model(mode), seen.compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="json to write")
    path: Path = parser.parse_args().file
    torch.set_num_threads(1)
    document: dict[str, Any] = {"environment": timing.environment(), "load average before": timing.load_average()}
    makes: dict[str, Callable[[], Runs]] = {
        f"{op}, {direction}": partial(make, direction) for op, make in OPS.items() for direction in DIRECTIONS
    }
    makes |= {f"{BLOCKS} blocks, {mode}": partial(of_model, mode) for mode in MODES}
    for group, make in makes.items():
        with pretend_gpu() as seen:
            found, taken = compared(make(), seen.compiled)
        ratios = {
            f"share of {name}": round(1 / found.speed_up(name), 3) for name in found.seconds if name != found.ours
        }
        document[group] = taken | ratios
        print(group, taken["microseconds of host"], ratios, flush=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
