"""Banks of ever more tasks: what they take, and what a mixed batch costs.

    python -m bench.task_bank_scale --tasks 10,1000,10000 --batch 64 --dtype bfloat16 --out bench/results/task_bank.json

Every task has deep prompts, a head and prototypes of its own, as adapters hold that were folded for deployment; the
backbone has random weights, and all banks share it. In turns, in seconds of the calling thread's processor time where
torch runs on one thread (OMP_NUM_THREADS=1), else of the wall, every bank predicts a batch whose images are of as many
tasks, and the same images of one task; the largest bank also in the loop that anyone would write, a call for each task.
Prints JSON: bytes beside what the formula of docs/serving.md says, medians, and quartiles of the ratios of images/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from cpuinfo import get_cpu_info

import vptm
from bench.timing import environment


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


def timed(
    functions: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] | None = None
) -> dict[str, list[float]]:
    """Seconds of every function in each of some rounds, in turns."""
    clock = clock or (time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
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


def bank_of(template: vptm.PromptedBEiT, tasks: int) -> vptm.TaskBank:
    """A bank on the weights of `template`, of so many tasks with random values."""
    bank = vptm.TaskBank(template)
    for i in range(tasks):
        with torch.no_grad():
            template.prompts.weight.normal_(std=0.1)
            template.verbalizer.prototypes.normal_()
        bank.add(f"task {i}", template)
    return bank


def loop(bank: vptm.TaskBank, images: torch.Tensor, names: list[str]) -> list[torch.Tensor]:
    """A call for each image."""
    return [bank.predict(images[i : i + 1], [name]) for i, name in enumerate(names)]


def measured(arguments: argparse.Namespace) -> dict[str, object]:
    """What the file holds; numbers of tasks ascend."""
    dtype = getattr(torch, arguments.dtype)
    template = model_of(arguments.model, arguments.classes, arguments.prompts).to(dtype)
    each = computed_bytes(template, dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, *template.default_cfg["input_size"])
    images = torch.randn(*shape, generator=generator).to(dtype)
    counts = sorted(map(int, arguments.tasks.split(",")))
    banks = {count: bank_of(template, count) for count in counts}
    functions: dict[str, Callable[[], object]] = {}
    for count, bank in banks.items():
        names = [f"task {i * max(1, count // arguments.batch) % count}" for i in range(arguments.batch)]
        functions[f"{count} tasks, mixed"] = partial(bank.predict, images, names)
        functions[f"{count} tasks, one task"] = partial(bank.predict, images, names[:1] * len(names))
    functions["loop over tasks"] = partial(loop, bank, images, names)
    seconds = timed(functions, arguments.rounds)
    mixed, least = {count: seconds[f"{count} tasks, mixed"] for count in counts}, counts[0]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m bench.task_bank_scale " + " ".join(sys.argv[1:]),
        "cpu": get_cpu_info()["brand_raw"],
        "environment": environment(),
        "clock": "processor time of one thread" if torch.get_num_threads() == 1 else "wall",
        "model": arguments.model,
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "banks": [
            {
                "tasks": count,
                "bytes": bank.memory,
                "computed": count * each,
                "share": round(bank.memory / (count * each), 4),
                "images/s, mixed over one task": ratio(seconds[f"{count} tasks, one task"], mixed[count]),
                f"seconds, mixed over that of {least} tasks": ratio(mixed[count], mixed[least]),
            }
            for count, bank in banks.items()
        ],
        "images/s, mixed over loop over tasks": ratio(seconds["loop over tasks"], mixed[counts[-1]]),
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="beitv2_base_patch16_224", help="a timm name, or builtin")
    parser.add_argument("--tasks", default="10,1000,10000", help="numbers of tasks of the banks")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="json to write as well")
    arguments = parser.parse_args()
    text = json.dumps(measured(arguments), indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
