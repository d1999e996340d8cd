"""One batch for many tasks against one call per task, at the two places where tasks differ: prompts and verbalizer.

    pytest bench/bench_task_bank.py --benchmark-only

Every image names its task. vptm takes the whole batch in one call: a pool of all prompts with a range per image, and
prototypes of all tasks with an offset per image. The peer "call per task" sorts images by task and calls the same op
once for each; "prompts per image" gathers every image's prompts and concatenates them for
`scaled_dot_product_attention`, and for the verbalizer multiplies gathered heads. All are checked against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from bench import timing
from vptm_kernels import FoldedHead, prompted_attention, prototype_cosine

DEVICE = timing.selection.device
# a CPU has no time for these
FULL = DEVICE == "cuda" and timing.selection.full
# BEiT-B/16 at 224. One task is the case that must cost nothing; as many as images the one where nothing can be shared.
BATCH, TASKS = (64, (1, 8, 64)) if FULL else (8, (1, 8))
HEADS, TOKENS, PROMPTS, WIDTH, DIM, CLASSES = 12, 197, 10, 768, 128, 100
if timing.selection.tiny:
    HEADS, TOKENS, PROMPTS, WIDTH, DIM, CLASSES = 2, 5, 10, 32, 8, 7
PEERS = {"call per task": timing.Peer(lambda: None), "prompts per image": timing.Peer(lambda: None)}


class Problem(NamedTuple):
    tasks: int
    task_ids: Tensor
    qkv: Tensor
    pool: Tensor
    ranges: Tensor
    hidden: Tensor
    head: FoldedHead
    prototypes: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        head = FoldedHead(*(cast(t) for t in self.head))
        fields: list[Any] = [cast(t) if isinstance(t, Tensor) else t for t in self]
        return Problem(*fields)._replace(head=head)


@lru_cache(maxsize=1)
def _problem(tasks: int, dtype: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    task_ids = torch.arange(BATCH, device=DEVICE) % tasks
    return Problem(
        tasks=tasks,
        task_ids=task_ids,
        qkv=random(BATCH, TOKENS, 3 * WIDTH),
        pool=random(tasks * PROMPTS, 2 * WIDTH),
        ranges=torch.stack([task_ids * PROMPTS, torch.full_like(task_ids, PROMPTS)], 1).int(),
        hidden=random(BATCH, WIDTH),
        head=FoldedHead(random(tasks, DIM, WIDTH, scale=WIDTH**-0.5), random(tasks, DIM)),
        prototypes=random(tasks * CLASSES, DIM),
    )


def _attention_pooled(x: Problem) -> Tensor:
    return prompted_attention(x.qkv, x.pool, num_heads=HEADS, prompt_ranges=x.ranges, max_prompt_length=PROMPTS)


def _per_task(x: Problem, call: Callable[[int, Tensor], Tensor]) -> Tensor:
    out: Tensor | None = None
    for task in range(x.tasks):
        rows = (x.task_ids == task).nonzero()[:, 0]
        found = call(task, rows)
        out = found.new_empty(BATCH, *found.shape[1:]) if out is None else out
        out[rows] = found
    assert out is not None
    return out


def _attention_per_task(x: Problem) -> Tensor:
    prompts = x.pool.view(x.tasks, PROMPTS, -1)
    return _per_task(x, lambda task, rows: prompted_attention(x.qkv[rows], prompts[task], num_heads=HEADS))


def _attention_per_image(x: Problem) -> Tensor:
    q, k, v = x.qkv.view(BATCH, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    prompts = x.pool.view(x.tasks, PROMPTS, 2, HEADS, -1)[x.task_ids].permute(2, 0, 3, 1, 4)
    k, v = torch.cat([k, prompts[0]], 2), torch.cat([v, prompts[1]], 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _cosines_pooled(x: Problem) -> Tensor:
    offsets = [CLASSES * task for task in range(x.tasks + 1)]
    return prototype_cosine(x.hidden, x.head, None, x.prototypes, task_ids=x.task_ids, class_offsets=offsets)


def _cosines_per_task(x: Problem) -> Tensor:
    weight, bias = x.head

    def call(task: int, rows: Tensor) -> Tensor:
        head = FoldedHead(weight[task], None if bias is None else bias[task])
        return prototype_cosine(x.hidden[rows], head, None, x.prototypes[CLASSES * task : CLASSES * (task + 1)])

    return _per_task(x, call)


def _cosines_per_image(x: Problem) -> Tensor:
    weight, bias = x.head
    embedding = torch.einsum("bc,bdc->bd", x.hidden, weight[x.task_ids])
    if bias is not None:
        embedding = embedding + bias[x.task_ids]
    prototypes = F.normalize(x.prototypes, dim=-1).view(x.tasks, CLASSES, DIM)[x.task_ids]
    return torch.einsum("bd,bkd->bk", F.normalize(embedding, dim=-1), prototypes)


WHERE = {
    "prompts in attention": {
        "vptm": _attention_pooled,
        "call per task": _attention_per_task,
        "prompts per image": _attention_per_image,
    },
    "verbalizer": {
        "vptm": _cosines_pooled,
        "call per task": _cosines_per_task,
        "prompts per image": _cosines_per_image,
    },
}


@lru_cache(maxsize=1)
def _check(where: str, tasks: int, dtype: torch.dtype) -> timing.Check:
    """Against the gathered form in float64, with its error in the timed dtype as the measure."""
    gathered, x = WHERE[where]["prompts per image"], _problem(tasks, dtype)
    with torch.inference_mode():
        return timing.within_budget([gathered(x.to(torch.float64))], [gathered(x)], [2])


def _work(where: str, tasks: int, dtype: torch.dtype) -> timing.Work:
    """Of B images and T tasks, whose prompts and heads are read once.

    Attention with P prompts: 4 B N C + 2 T P C elements, 4 B N (N+P) C operations. The verbalizer with K classes per
    task: B (C + K) + T d (C + 1 + K) elements, 2 B d (C + K) operations.
    """
    if where == "verbalizer":
        elements = BATCH * (WIDTH + CLASSES) + tasks * DIM * (WIDTH + 1 + CLASSES)
        operations = 2 * BATCH * DIM * (WIDTH + CLASSES)
    else:
        elements = (4 * BATCH * TOKENS + 2 * tasks * PROMPTS) * WIDTH
        operations = 4 * BATCH * TOKENS * (TOKENS + PROMPTS) * WIDTH
    return timing.Work(elements * dtype.itemsize, operations)


@pytest.mark.parametrize("implementation", timing.rows(PEERS))
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", timing.selection.dtypes, ids=timing.label)
@torch.inference_mode()
def bench_task_bank(
    benchmark: BenchmarkFixture, implementation: str, where: str, tasks: int, dtype: torch.dtype
) -> None:
    benchmark.group = f"{where}, {tasks} tasks in a batch of {BATCH}, {dtype}, {DEVICE}"
    benchmark.extra_info |= {"tasks": tasks, "batch": BATCH, "shape": f"{where}, {tasks} tasks"}
    x = _problem(tasks, dtype)
    present = timing.present(PEERS)
    timing.report(
        benchmark,
        implementation,
        {
            name: lambda run=run: run(x)  # type: ignore[misc]
            for name, run in WHERE[where].items()
            if name == "vptm" or name in present
        },
        check=_check(where, tasks, dtype),
        work=_work(where, tasks, dtype),
        device=DEVICE,
        dtype=dtype,
        rounds=15,
        at_least=1e-3,
    )
