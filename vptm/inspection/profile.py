"""Where a prompted model spends parameters, FLOPs, memory and time, block by block, beside concatenation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula, sdpa_flop_count

from vptm.frozen.modes import eval_mode
from vptm.frozen.parts import sdpa
from vptm.frozen.reference import reference_features
from vptm.inspection.figures import new_figure, write_png
from vptm.models.prompted_model import PromptedModel
from vptm_kernels._runtime.private_torch import cpu_attention

if TYPE_CHECKING:
    from rich.table import Table

PATHS = ("vptm", "concatenation")

if cpu_attention is not None and cpu_attention not in flop_registry:  # torch before 2.15 counts nothing for it

    @register_flop_formula(cpu_attention)
    def _cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))


@dataclass
class Stage:
    """One row: numbers of a block, of what comes before the first one, or of what comes after the last one.

    flops, saved and seconds are {path: value}, of one batch: FLOPs of inference, bytes autograd keeps for backward in a
    training step, median time of inference.
    """

    name: str
    parameters: int
    trained: int
    flops: dict[str, int]
    saved: dict[str, int]
    seconds: dict[str, float]


class Quartiles(NamedTuple):
    """Median of what was measured, and the quartiles on both sides of it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Of one value or more."""
        return cls(*statistics.quantiles([*values] * (2 if len(values) == 1 else 1), n=4, method="inclusive"))

    def text(self, unit: float, name: str) -> str:
        low, median, high = (value / unit for value in self)
        return f"{median:.3g}{name} [{low:.3g}, {high:.3g}]"


@dataclass
class Forwards:
    """Seconds of whole forward passes of one batch, {path: one of every turn}, both paths in every turn."""

    seconds: dict[str, list[float]]

    def ratio(self) -> Quartiles:
        """How much longer concatenation takes, from the ratio of every turn: what slows a turn slows both."""
        ours, theirs = (self.seconds[path] for path in PATHS)
        return Quartiles.of([their / our for our, their in zip(ours, theirs)])


def forwards_of(model: PromptedModel, images: Tensor, *, repeats: int = 5) -> Forwards:
    """Time whole forward passes of inference on both paths, in turns, each path first in every second one.

    Args:
        model, images: as `stages_of` takes them.
        repeats: turns that count, after one that warms up.

    Example:
        >>> model = vptm.PromptedBEiT("builtin", num_classes=10)
        >>> times = forwards_of(model, torch.zeros(2, 1, 28, 28), repeats=3)
        >>> {path: len(seconds) for path, seconds in times.seconds.items()}
        {'vptm': 3, 'concatenation': 3}
    """
    _check(model)
    times = Forwards({path: [] for path in PATHS})
    with eval_mode(model), torch.no_grad():
        runs = _inference(model, images)
        for turn in range(repeats + 1):
            for path in PATHS if turn % 2 else reversed(PATHS):
                start = _now(images)
                runs[path][1]()
                times.seconds[path].append(_now(images) - start)
    return Forwards({path: seconds[1:] for path, seconds in times.seconds.items()})


def stages_of(model: PromptedModel, images: Tensor, *, repeats: int = 5) -> list[Stage]:
    """Measure a model on the path it runs on and on the textbook one, stage by stage.

    The textbook path ("concatenation") runs every prompt and patch row through every block with timm's weights and
    `scaled_dot_product_attention`. Both run the same images. FLOPs are counted by `torch.utils.flop_counter`, two a
    multiply-add, with prompts projected and the token head folded already, as after the first batch.

    Args:
        model: any prompted model; it is left in the mode it was in.
        images: (B, channels, height, width) as the model takes them.
        repeats: timed runs of each path, which take turns; their median counts.

    Returns:
        "embedding", "block 0" .. "block L-1", "read-out", in the order they run.

    Example:
        >>> model = vptm.PromptedBEiT("builtin", num_classes=10, prompt_mode="deep")
        >>> stages = stages_of(model, torch.zeros(2, 1, 28, 28), repeats=1)
        >>> sum(stage.flops["vptm"] for stage in stages) < sum(stage.flops["concatenation"] for stage in stages)
        True
    """
    _check(model)
    runs: dict[str, Callable[[], Tensor]] = {
        "vptm": lambda: model(images),
        "concatenation": lambda: _concatenation(model, images),
    }
    flops: dict[str, list[int]] = {}
    saved: dict[str, list[int]] = {}
    times: dict[str, list[list[float]]] = {path: [] for path in PATHS}
    with eval_mode(model):
        with _nothing_learns(model), torch.no_grad():
            inference = _inference(model, images)
            for _ in range(repeats + 1):
                for path, (owner, run) in inference.items():
                    times[path].append(_steps(owner, run, lambda: _now(images)))
            for path, (owner, run) in inference.items():
                with FlopCounterMode(display=False) as counter:
                    flops[path] = _steps(owner, run, counter.get_total_flops)
        model.train()
        for path, run in runs.items():
            saved[path] = _saved_bytes(model, run)
    parameters = _parameters(model)
    return [
        Stage(
            name,
            *parameters[name],
            flops={path: flops[path][i] for path in PATHS},
            saved={path: saved[path][i] for path in PATHS},
            seconds={
                path: statistics.median(run[i] for run in times[path][1:]) for path in PATHS
            },  # the first warms up
        )
        for i, name in enumerate(parameters)
    ]


def _check(model: PromptedModel) -> None:
    if any(parameter.requires_grad for parameter in model.backbone.parameters()):
        raise ValueError("profiling needs a frozen backbone, got a trainable one: it runs every row of every block")
    if model.impl == "reference":
        raise ValueError("profiling compares model.impl with the reference path, got impl='reference' itself")


def _concatenation(model: PromptedModel, images: Tensor) -> Tensor:
    model = model.of_size(images)
    return model.forward_head(reference_features(model, images, sdpa))


def _inference(model: PromptedModel, images: Tensor) -> dict[str, tuple[PromptedModel, Callable[[], Tensor]]]:
    """{path: the model that runs and how}, as inference runs them: vptm with prompts and head folded once."""
    sealed = model.sealed_twin()
    return {"vptm": (sealed, lambda: sealed(images)), "concatenation": (model, lambda: _concatenation(model, images))}


def _steps(model: PromptedModel, run: Callable[[], Tensor], read: Callable[[], Any]) -> list[Any]:
    """What `read()` grew by in every stage of one run; what stands between two blocks counts with the second."""
    marks: list[Any] = []
    start = read()
    with model.listening_to_blocks(lambda: marks.append(read())):
        run()
    return [after - before for before, after in pairwise([start, marks[0], *marks[1::2], read()])]


def _now(images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


@contextmanager
def _nothing_learns(model: nn.Module) -> Iterator[None]:
    """The FLOP counter hooks every module's outputs, which fails on views of a parameter that learns."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _saved_bytes(model: PromptedModel, run: Callable[[], Tensor]) -> list[int]:
    """Bytes that each stage of a training step keeps for backward, parameters and folded weights left out."""
    total = 0
    run()  # derives the folded weights
    known = {tensor.untyped_storage().data_ptr() for tensor in _lasting(model)}

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return _steps(model, run, lambda: total)


def _lasting(model: PromptedModel) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from model._encoder.constants()


def _parameters(model: PromptedModel) -> dict[str, tuple[int, int]]:
    """{stage: (parameters, trained ones)}; a block's own prompts, gates and alpha count with it."""
    blocks = list(model.backbone.blocks)
    stages = {"embedding": [0, 0]} | {f"block {i}": [0, 0] for i in range(len(blocks))} | {"read-out": [0, 0]}
    for name, parameter in model.named_parameters():
        stage, size = "embedding", parameter.numel()
        if name.startswith("backbone.blocks."):
            stage = f"block {name.split('.')[2]}"
        elif name.startswith(("verbalizer.", "lm_head.", "backbone.norm.", "backbone.fc_norm.")):
            stage = "read-out"
        targets = [stage]
        if name in ("prompts.weight", "prompts.basis") and len(parameter) == len(model.prompts.blocks) > 1:
            targets = [f"block {i}" for i in model.prompts.blocks]
        elif name == "prompts.gate":
            targets = [f"block {i}" for i in range(len(blocks)) if model.prompts.role(i) != "none"]
        elif name == "prompts.alpha":
            targets = [f"block {i}" for i in model.prompts.blocks[1:]]
        for target in targets:
            stages[target][0] += size // len(targets)
            stages[target][1] += size // len(targets) * parameter.requires_grad
    return {name: (total, trained) for name, (total, trained) in stages.items()}


def total(stages: list[Stage]) -> Stage:
    """The sum of all stages."""
    return Stage(
        "total",
        sum(stage.parameters for stage in stages),
        sum(stage.trained for stage in stages),
        *({path: sum(getattr(stage, name)[path] for stage in stages) for path in PATHS} for name in _MEASURED),
    )


_MEASURED = ("flops", "saved", "seconds")


def table(stages: list[Stage], batch: int, title: str, forwards: Forwards | None = None) -> Table:
    """The stages as a terminal table, everything but parameters per image; below it the whole forward passes, whose
    medians are the total time where they are given."""
    from rich.table import Table
    from rich.text import Text

    found = Table(
        title=title, title_justify="left", show_edge=False, pad_edge=False, caption_justify="left", caption_style=""
    )
    for heading in ("", "parameters", "trained"):
        found.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    whole = total(stages)
    if forwards is not None:
        parts = {path: Quartiles.of(seconds) for path, seconds in forwards.seconds.items()}
        whole.seconds = {path: part.median for path, part in parts.items()}
        times = ", ".join(f"{path} {part.text(1e-3 * batch, ' ms')}" for path, part in parts.items())
        turns = len(forwards.seconds["vptm"])
        found.caption = Text(  # whose brackets are no markup
            f"whole forward passes, {turns} of each in turns, median [quartiles] per image: {times}; "
            f"in the same turn concatenation takes {forwards.ratio().text(1, 'x')} of the time"
        )
    units = (("GFLOP", 1e9) if whole.flops["vptm"] > 1e9 * batch else ("MFLOP", 1e6), ("saved MB", 1e6), ("ms", 1e-3))
    for quantity, _ in units:
        for heading in (f"{quantity}\nvptm", "\nconcat", "\nratio"):
            found.add_column(heading, justify="right", no_wrap=True)
    for stage in [*stages, whole]:
        cells = [stage.name, f"{stage.parameters:,}", f"{stage.trained:,}"]
        for name, (_, unit) in zip(_MEASURED, units):
            ours, theirs = (getattr(stage, name)[path] / unit / batch for path in PATHS)
            cells += [f"{ours:,.3g}", f"{theirs:,.3g}", f"{theirs / ours:.3g}x" if ours else ""]
        found.add_row(*cells, end_section=stage is stages[-1])
    return found


def draw(stages: list[Stage], batch: int, title: str, path: Path) -> None:
    """FLOPs and time of every stage on both paths, as a PNG written in one rename."""
    figure = new_figure(10, 0.34 * len(stages) + 1.8)
    whole = total(stages)
    panels = (("flops", "MFLOP per image", 1e6 * batch), ("seconds", "ms per image", 1e-3 * batch))
    for axes, (name, label, unit) in zip(figure.subplots(1, 2, sharey=True), panels):
        for shift, key, colour in ((-0.2, "vptm", "#1f6f8b"), (0.2, "concatenation", "#c8553d")):
            values = [getattr(stage, name)[key] / unit for stage in stages]
            sum_ = getattr(whole, name)[key] / unit
            places = [i + shift for i in range(len(stages))]
            axes.barh(places, values, height=0.38, color=colour, label=f"{key}, {sum_:,.3g} in all")
        axes.set_xlabel(label)
        axes.set_yticks(range(len(stages)), [stage.name for stage in stages])
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(len(stages) - 0.5, -0.5)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    write_png(figure, path)
