"""Search block sizes on this GPU and propose entries for the ops' `configs.py`.

    python -m bench.autotune --seconds 60 --json configs.json
    python -m bench.autotune --exhaustive --seconds 50   # all block sizes of attention, from `bench.kernel_cache`
    python -m bench.autotune --list
    TRITON_INTERPRET=1 python -m bench.autotune --rehearse   # no GPU needed: a tiny call in the interpreter

The ops never search: their tables answer at once, the same on every rank. This is how an entry gets into a table. A
call is run with the table's answer, with the other forms that its op names, then with one field at a time halved or
doubled; what is faster and gives the same result becomes the next start; with `--exhaustive` every block size is tried
instead. A proposal is printed when the best found beats the table by more than 3 % in paired replays made afterwards.
The file is rewritten after every table function, so that an early end loses little.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import timing
from vptm.messages import error_line
from vptm.weights.files import write_atomically
from vptm_kernels._runtime.plans import forget_plans
from vptm_kernels._runtime.triton_support import interpreting

PACKAGE = "vptm_kernels"
WORTH_AN_ENTRY = 1.03
REHEARSED = 1
"""Calls of a rehearsal."""
# Results of two block sizes differ by the rounding of sums in another order.
TOLERANCE = 2e-2

Tensors = tuple[Tensor, ...]
Setting = tuple[str, tuple[Any, ...]]
"""A table function and the arguments it was asked with."""


@dataclass(frozen=True)
class Place:
    """Where calls run, and how large they are: `tiny` ones are through in a second in the interpreter."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    tiny: bool = False

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(self.device, self.dtype)


@dataclass(frozen=True)
class Call:
    """A call of one op as models make it; `make` allocates the inputs in a place and returns the call. exhaustive:
    every candidate of it is worth a run."""

    op: str
    name: str
    make: Callable[[Place], Callable[[], Tensors]]
    exhaustive: bool = False


@dataclass(frozen=True)
class Proposal:
    op: str
    call: str
    function: str
    arguments: list[Any]
    table: Any
    proposed: Any
    speed_up: float
    microseconds: float


def _attention(
    place: Place, prompts: int, window: tuple[int, int], heads: int, batch: int, backward: bool, rotary: bool = False
) -> Callable[[], Tensors]:
    """rotary: in place of a bias, as such models have it."""
    from vptm_kernels import RelativePositionBias, prompted_attention

    if place.tiny:
        window, heads, batch, prompts = (3, 5), 2, 2, min(prompts, 3)
    tokens, width = window[0] * window[1] + 1, 64 * heads
    qkv = place.random(batch, tokens, 3 * width).requires_grad_(backward)
    prefix = place.random(prompts, 2 * width).requires_grad_(backward) if prompts else None
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1) + 3, heads, device=place.device)
    bias = None if rotary else RelativePositionBias(table, window).dense(torch.float16)
    angles = torch.randn(tokens, 32, device=place.device)
    turns = (angles.cos(), angles.sin()) if rotary else None
    grad = place.random(batch, tokens, width)

    def forward() -> Tensor:
        return prompted_attention(qkv, prefix, num_heads=heads, bias=bias, rotary=turns, impl="triton")

    return _call(forward, [t for t in (qkv, prefix) if t is not None], grad, backward)


def _readout(place: Place, batch: int, backward: bool) -> Callable[[], Tensors]:
    from vptm_kernels.readout_attention.api import readout_attention

    tokens, width, heads = 197, 768, 12
    if place.tiny:
        tokens, width, heads, batch = 17, 32, 2, 2
    x, q = (place.random(*shape).requires_grad_(backward) for shape in ((batch, tokens, width), (batch, width)))
    k_weight, v_weight = (place.random(width, width, scale=width**-0.5) for _ in range(2))
    prompts = place.random(50, 2 * width)

    def forward() -> Tensor:
        return readout_attention(
            x,
            q,
            norm_weight=None,
            norm_bias=None,
            eps=1e-6,
            k_weight=k_weight,
            v_weight=v_weight,
            v_bias=None,
            num_heads=heads,
            prompt_kv=prompts,
            impl="triton",
        )

    return _call(forward, [x, q], place.random(batch, width), backward)


def _prototypes(place: Place, batch: int, activation: str, backward: bool) -> Callable[[], Tensors]:
    from vptm_kernels import prototype_cosine

    width, vocabulary, dim, classes = 768, 8192, 128, 100
    if place.tiny:
        width, vocabulary, dim, classes, batch = 32, 70, 16, 5, 3
    hidden = place.random(batch, width).requires_grad_(backward)
    weight, bias = place.random(vocabulary, width, scale=width**-0.5), place.random(vocabulary)
    projection = place.random(dim, vocabulary, scale=vocabulary**-0.5).requires_grad_(backward)
    prototypes = place.random(classes, dim).requires_grad_(backward)

    def forward() -> Tensor:
        return prototype_cosine(
            hidden, weight, bias, prototypes, projection=projection, activation=activation, impl="triton"
        )

    return _call(forward, [hidden, projection, prototypes], place.random(batch, classes), backward)


def _residual(place: Place, batch: int, backward: bool) -> Callable[[], Tensors]:
    from vptm_kernels.residual_norm.api import residual_norm

    shape = (2, 5, 32) if place.tiny else (batch, 197, 768)
    x, update = (place.random(*shape).requires_grad_(backward) for _ in range(2))
    return _call(lambda: residual_norm(x, update, eps=1e-6, impl="triton"), [x, update], torch.ones_like(x), backward)


def _call(
    forward: Callable[[], Tensor | Tensors], inputs: list[Tensor], grad: Tensor, backward: bool
) -> Callable[[], Tensors]:
    """`grad` is that of every result."""

    def results() -> Tensors:
        found = forward()
        return (found,) if isinstance(found, Tensor) else found

    def run() -> Tensors:
        if not backward:
            with torch.no_grad():
                return results()
        out = results()
        return torch.autograd.grad(out, inputs, [grad] * len(out))

    return run


def calls() -> list[Call]:
    """Most important first: BEiT-B/16 at 224 in a batch, then 384, the read-out row, the verbalizer."""
    found = []
    for backward, what in ((False, "forward"), (True, "forward and backward")):
        for prompts in (50, 0):
            found.append(
                Call(
                    "prompted_attention",
                    f"{what}, B=64 H=12 N=197 P={prompts}",
                    lambda at, p=prompts, b=backward: _attention(at, p, (14, 14), 12, 64, b),  # type: ignore[misc]
                    exhaustive=True,
                )
            )
    for backward, what in ((False, "forward"), (True, "forward and backward")):
        found += [
            Call(
                "prompted_attention",
                f"{what}, B=64 H=12 N=197 P=100, rotary",
                lambda at, b=backward: _attention(at, 100, (14, 14), 12, 64, b, True),  # type: ignore[misc]
            ),
            Call(
                "readout_attention",
                f"{what}, B=64 N=197 P=50",
                lambda at, b=backward: _readout(at, 64, b),  # type: ignore[misc]
            ),
            Call(
                "prototype_cosine",
                f"{what}, B=64, log_softmax",
                lambda at, b=backward: _prototypes(at, 64, "log_softmax", b),  # type: ignore[misc]
            ),
            Call(
                "residual_norm",
                f"{what}, B=64 N=197 C=768",
                lambda at, b=backward: _residual(at, 64, b),  # type: ignore[misc]
            ),
            Call(
                "prompted_attention",
                f"{what}, B=16 H=16 N=577 P=50",
                lambda at, b=backward: _attention(at, 50, (24, 24), 16, 16, b),  # type: ignore[misc]
            ),
        ]
    return found


# ------------------------------------------------------------------ the search


# decisions of a table that are no `Config`: rows with warps
DECISIONS = ("row_block",)


def tables(module: Any) -> dict[str, Callable[..., Any]]:
    """The functions of a launching module that choose what is launched: `..._config` and those in `DECISIONS`."""
    chosen = (name for name in vars(module) if name.endswith("_config") or name in DECISIONS)
    return {name: getattr(module, name) for name in chosen if callable(getattr(module, name))}


@contextlib.contextmanager
def answering(module: Any, answers: dict[Setting, Any]) -> Iterator[dict[Setting, Any]]:
    """Inside, the tables of `module` give `answers` where they are asked that, and their own elsewhere; yields what
    they were asked and gave."""
    given: dict[Setting, Any] = {}
    originals = tables(module)

    def replaced(name: str) -> Callable[..., Any]:
        def table(*arguments: Any, **options: Any) -> Any:
            asked = (name, arguments)
            config = answers[asked] if asked in answers else originals[name](*arguments, **options)
            given[name, arguments] = config
            return config

        return table

    try:
        for name in originals:
            setattr(module, name, replaced(name))
        forget_plans()
        yield given
    finally:
        for name, function in originals.items():
            setattr(module, name, function)
        forget_plans()


def candidates(configs: Any, setting: Setting) -> list[Any]:
    """What the module `configs` has beside the answer of a table `..._config`: its `..._candidates`, of the same
    arguments. Other forms of a kernel are several changes away, and no step on the way may be faster."""
    function, arguments = setting
    others = getattr(configs, function.removesuffix("_config") + "_candidates", None)
    return [] if others is None else others(*arguments)


def neighbours(answer: Any) -> list[Any]:
    """The same answer with one of its block sizes, warps or stages halved or doubled, within what kernels take."""
    limits = {"num_warps": (2, 16), "num_stages": (1, 4)}
    named = hasattr(answer, "_asdict")
    found = []
    for i, value in enumerate(answer):
        name = answer._fields[i] if named else ""
        if isinstance(value, bool) or name == "max_registers":  # forms of a kernel, see `candidates`
            continue
        low, high = limits.get(name, (16, 256) if named else (1, 256))
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for step in steps:
            if low <= step <= high:
                numbers = (*answer[:i], step, *answer[i + 1 :])
                found.append(type(answer)(*numbers) if named else numbers)
    return found


BLOCK_SIZES = {"block_m": (32, 64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)}


def block_sizes(answer: Any, arch: str = "") -> list[Any]:
    """Every combination of block sizes, warps and stages, with the answer's other fields as they are.

    On sm90 none with eight warps for fewer than 128 rows, of which Triton lets both warpgroups multiply all: on an
    H200 such query gradients with a tail of 16 keys came out wrong (64, 32, 8, 1) or read where they must not (64, 64,
    8, 1) with Triton 3.6, and of all that came out right none was faster than four warps.
    """
    if not hasattr(answer, "_asdict"):
        return neighbours(answer)
    sizes = {name: values for name, values in BLOCK_SIZES.items() if name in answer._fields}
    found = (answer._replace(**dict(zip(sizes, values))) for values in itertools.product(*sizes.values()))
    return [config for config in found if config != answer and not (arch == "sm90" and shares_rows(config))]


def shares_rows(config: Any) -> bool:
    """Whether two warpgroups have the 64 rows of one multiplication, or fewer, between them."""
    rows = getattr(config, "block_m", None)
    return rows is not None and config.num_warps >= 8 and rows < 16 * config.num_warps


def same(found: Tensors, expected: Tensors) -> bool:
    return all(
        bool(a.isfinite().all()) and (a.double() - b.double()).norm() <= TOLERANCE * b.double().norm()
        for a, b in zip(found, expected, strict=True)
    )


class Broken(RuntimeError):
    """A candidate left the GPU unusable for this process: nothing can be launched any more."""


def usable(device: str) -> bool:
    """Whether the GPU still takes work; after an illegal access no process that made it is served again."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def search(
    module: Any,
    run: Callable[[], Tensors],
    prepare: Callable[[timing.Run], timing.Run],
    clock: timing.Clock,
    out_of_time: Callable[[], bool],
    log: Callable[[str], None] = print,
    others: Callable[[Setting], list[Any]] = lambda setting: [],
    sizes: Callable[[Any, str], list[Any]] | None = None,
    works: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[Setting, Any, Any, float, float]]:
    """(setting, the table's answer, the best found, speed-up, seconds of the table's) of every table that is asked.

    others: forms to try beside a table's answer. sizes: all that it gives for a table's answer and an architecture is
    tried, and not what is near to the best found so far. works: asked after a candidate that failed.

    Raises:
        Broken: after a candidate that failed nothing works any more; what was found until then was yielded, by the
            measurements that it was found by.
    """
    with answering(module, {}) as asked:
        expected = run()
    for setting, table in asked.items():
        if out_of_time():
            return

        def built(config: Any, setting: Setting = setting) -> timing.Run:
            with answering(module, {setting: config}):
                if not same(run(), expected):
                    raise ValueError("gives another result")
                return prepare(run)

        best, start = table, built(table)
        current, tried = start, {table}
        gained, seconds = 1.0, clock(start)
        improved = True
        while improved and not out_of_time():
            improved = False
            near = neighbours(best) if sizes is None else sizes(table, str(setting[1][0]))
            for candidate in [*others(setting), *near]:
                if candidate in tried or out_of_time():
                    continue
                tried.add(candidate)
                try:
                    other = built(candidate)
                except Exception as error:  # too much shared memory, a tile the kernel refuses, a compiler's failure
                    log(f"  {_fields(candidate)}: {error_line(error, 100, first=True)}")
                    if not works():
                        yield setting, table, best, gained, seconds
                        reason = error_line(error, 100, first=True)
                        raise Broken(f"{setting[0]} with {_fields(candidate)}: {reason}") from error
                    continue
                pair = timing.compare({"best": current, "other": other}, "other", check=None, clock=clock, rounds=7)
                log(f"  {_fields(candidate)}: {pair.speed_up('best'):.3f}x")
                if pair.speed_up("best") > 1.01:
                    best, current = candidate, other
                    gained *= pair.speed_up("best")
                    if sizes is None:
                        improved = True
                        break
        final = timing.compare({"table": start, "best": current}, "best", check=None, clock=clock, rounds=21)
        yield setting, table, best, final.speed_up("table"), final.median("table")


def _plain(answer: Any) -> Any:
    return answer._asdict() if hasattr(answer, "_asdict") else answer


def _fields(answer: Any) -> str:
    named = _plain(answer)
    return " ".join(f"{name}={value}" for name, value in named.items()) if isinstance(named, dict) else str(named)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.autotune", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="no search starts after this (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print the calls that are tuned, most important first")
    parser.add_argument("--exhaustive", action="store_true", help="every candidate, of the calls that are worth it")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the first call, tiny, and few sizes")
    options = parser.parse_args(argv)
    chosen = [call for call in calls() if call.exhaustive or not options.exhaustive]
    if options.list:
        print(*(f"{call.op}: {call.name}" for call in chosen), sep="\n")
        return 0
    place, sizes = Place(), block_sizes if options.exhaustive else None
    if options.rehearse:
        place, chosen, sizes = rehearsal(), chosen[:REHEARSED], lambda table, arch: block_sizes(table, arch)[:2]
    elif not torch.cuda.is_available():
        print("no GPU here: block sizes are timed on one", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    document: dict[str, Any] = {"environment": timing.environment(), "proposals": [], "kept": [], "failed": {}}
    clock = timing.clock_of(place.device, True)
    prepare = timing.captured if place.device == "cuda" else lambda run: run
    torch.manual_seed(0)
    for call in chosen:
        if time.monotonic() > deadline or "broken by" in document:
            document.setdefault("not reached", []).append(f"{call.op}: {call.name}")
            continue
        print(f"{call.op}: {call.name}", flush=True)
        try:
            module = importlib.import_module(f"{PACKAGE}.{call.op}.triton_impl")
            configs = importlib.import_module(f"{PACKAGE}.{call.op}.configs")
            found = search(
                module,
                call.make(place),
                prepare,
                clock,
                lambda: time.monotonic() > deadline,
                others=functools.partial(candidates, configs),
                sizes=sizes,
                works=lambda: usable(place.device),
            )
            for (function, arguments), table, best, speed_up, seconds in found:
                proposal = Proposal(
                    call.op,
                    call.name,
                    function,
                    list(arguments),
                    _plain(table),
                    _plain(best),
                    round(speed_up, 3),
                    round(1e6 * seconds, 1),
                )
                worth = best != table and speed_up > WORTH_AN_ENTRY
                document["proposals" if worth else "kept"].append(asdict(proposal))
                if worth:
                    print(f"PROPOSE {function}{arguments} -> {_fields(best)}: {speed_up:.2f}x ({_fields(table)})")
                _write(options.json, document)
        except Broken as error:
            document["broken by"] = f"{call.op}: {call.name}: {error}"
            print(f"  the GPU takes no more work of this process after {error}", flush=True)
        except Exception as error:  # one op's failure leaves the others their time
            document["failed"][f"{call.op}: {call.name}"] = error_line(error, first=True)
            print(f"  failed: {error_line(error, first=True)}", flush=True)
        _write(options.json, document)
    _write(options.json, document)
    if not document["proposals"]:
        print("no entry beats the tables")
    return int(bool(document["failed"]) or "broken by" in document)


def rehearsal() -> Place:
    """Kernels run in the interpreter, with the repairs that the tests have for it.

    Raises:
        RuntimeError: TRITON_INTERPRET is not set, which Triton reads when it is imported.
    """
    if not interpreting():
        raise RuntimeError("a rehearsal needs TRITON_INTERPRET=1")
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from interpreter import install

    install()
    return Place("cpu", torch.float16, tiny=True)


def _write(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        write_atomically(path, json.dumps(document, indent=1, default=str))


if __name__ == "__main__":
    sys.exit(main())
