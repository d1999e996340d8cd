"""Where a prompted model spends parameters, FLOPs, memory and time, block by block, beside concatenation."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula, sdpa_flop_count

from vptm.frozen.modes import eval_mode
from vptm.frozen.parts import sdpa
from vptm.frozen.reference import reference_features

if TYPE_CHECKING:
    from rich.table import Table

from vptm.models.prompted_model import PromptedModel

PATHS = ("vptm", "concatenation")

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if _CPU_ATTENTION not in flop_registry:  # torch before 2.15 counts nothing for it

    @register_flop_formula(_CPU_ATTENTION)
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
    if any(parameter.requires_grad for parameter in model.backbone.parameters()):
        raise ValueError("stages_of needs a frozen backbone, got a trainable one: it runs every row of every block")
    if model.impl == "reference":
        raise ValueError("stages_of compares model.impl with the reference path, got impl='reference' itself")
    runs: dict[str, Callable[[], Tensor]] = {
        "vptm": lambda: model(images),
        "concatenation": lambda: model.forward_head(reference_features(model, images, sdpa)),
    }
    flops: dict[str, list[int]] = {}
    saved: dict[str, list[int]] = {}
    times: dict[str, list[list[float]]] = {path: [] for path in PATHS}
    with eval_mode(model):
        with _nothing_learns(model), torch.no_grad():
            sealed = model.sealed_twin()
            inference = {"vptm": (sealed, lambda: sealed(images)), "concatenation": (model, runs["concatenation"])}
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


def _steps(model: PromptedModel, run: Callable[[], Tensor], read: Callable[[], Any]) -> list[Any]:
    """What `read()` grew by in every stage of one run: both paths send each block through `model.run_block`."""
    values = [read()]
    own = model.run_block

    def counted(function: Any, *args: Any) -> Tensor:
        if len(values) == 1:
            values.append(read())  # the embedding ends where block 0 begins
        out = own(function, *args)
        values.append(read())
        return out

    model.run_block = counted  # type: ignore[method-assign]
    try:
        run()
    finally:
        del model.run_block
    values.append(read())
    return [after - before for before, after in pairwise(values)]


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
    """{stage: (parameters, trained ones)}; a block's own prompts count with it."""
    blocks = list(model.backbone.blocks)
    stages = {"embedding": [0, 0]} | {f"block {i}": [0, 0] for i in range(len(blocks))} | {"read-out": [0, 0]}
    for name, parameter in model.named_parameters():
        stage, size = "embedding", parameter.numel()
        if name.startswith("backbone.blocks."):
            stage = f"block {name.split('.')[2]}"
        elif name.startswith(("verbalizer.", "lm_head.", "backbone.norm.", "backbone.fc_norm.")):
            stage = "read-out"
        targets = [stage]
        if name == "prompts.weight" and len(parameter) == len(model.prompts.blocks) > 1:
            targets = [f"block {i}" for i in model.prompts.blocks]
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


def table(stages: list[Stage], batch: int, title: str) -> Table:
    """The stages as a terminal table, everything but parameters per image."""
    from rich.table import Table

    found = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("", "parameters", "trained"):
        found.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    whole = total(stages)
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from vptm.weights.files import write_atomically

    figure = Figure(figsize=(10, 0.34 * len(stages) + 1.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
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
    buffer = io.BytesIO()
    canvas.print_figure(buffer, dpi=130, format="png")
    write_atomically(path, buffer.getvalue())
