"""A bank as it grows: what its tasks take, and what a mixed batch costs.

    python -m bench.task_bank_scale --tasks 10,1000,10000 --batch 64 --dtype bfloat16

Every task has deep prompts, a head and prototypes of its own, as adapters hold that were folded for deployment; the
backbone has random weights. At each number of tasks three things are timed in turns, in seconds of the calling thread's
processor time where torch runs on one thread (OMP_NUM_THREADS=1), else of the wall: a batch whose images are of as many
tasks, the same images of one task, and the loop that anyone would write, a call for each task. Prints JSON lines: bytes
beside what the formula of docs/serving.md says, medians, and ratios of images/s with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch

import vptm


def model_of(source: str, classes: int, prompts: int) -> vptm.PromptedBEiT:
    """A task on random weights, in the form of a deployed adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return vptm.PromptedBEiT(
            source,
            classes,
            prompt_mode="deep",
            prompt_length=prompts,
            token_activation="hidden",
            projection_bias=True,
        ).eval()


def computed_bytes(model: vptm.PromptedBEiT, item: int) -> int:
    """e (2 L P C + d (C + 1) + K d) of docs/serving.md."""
    layers, prompts, width = model.prompts.weight.shape
    classes, dim = model.verbalizer.prototypes.shape
    return item * (2 * layers * prompts * width + dim * (width + 1) + classes * dim)


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every function in each of some rounds, in turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            found[name].append(clock() - start)
    return found


def ratio(over: list[float], under: list[float]) -> list[float]:
    """Quartiles of the ratios of two lists of seconds."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return (
        [round(value, 3) for value in statistics.quantiles(ratios, n=4)] if len(ratios) > 1 else [round(ratios[0], 3)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="beitv2_base_patch16_224", help="a timm name, or builtin")
    parser.add_argument("--tasks", default="10,1000,10000", help="numbers of tasks, ascending")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    template = model_of(arguments.model, arguments.classes, arguments.prompts)
    bank = vptm.TaskBank(template, dtype=dtype)
    each = computed_bytes(template, dtype.itemsize)
    images = torch.randn(arguments.batch, *template.default_cfg["input_size"], dtype=dtype)
    for count in map(int, arguments.tasks.split(",")):
        while len(bank) < count:
            with torch.no_grad():
                template.prompts.weight.normal_(std=0.1)
                template.verbalizer.prototypes.normal_()
            bank.add(f"task {len(bank)}", template)
        step = max(1, count // arguments.batch)
        names = [f"task {i * step % count}" for i in range(arguments.batch)]
        functions = {
            "mixed": lambda names=names: bank.predict(images, names),
            "one task": lambda names=names: bank.predict(images, names[:1] * len(names)),
            "loop over tasks": lambda names=names: [
                bank.predict(images[i : i + 1], [name]) for i, name in enumerate(names)
            ],
        }
        seconds = timed(functions, arguments.rounds)
        medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
        line = {
            "model": arguments.model,
            "dtype": arguments.dtype,
            "tasks": count,
            "batch": arguments.batch,
            "bytes": bank.memory,
            "computed": count * each,
            "share": round(bank.memory / (count * each), 4),
            "seconds": medians,
            "mixed over one task, images/s": ratio(seconds["one task"], seconds["mixed"]),
            "mixed over loop, images/s": ratio(seconds["loop over tasks"], seconds["mixed"]),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
