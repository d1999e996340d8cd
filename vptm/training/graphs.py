"""CUDA graphs: what a model launches for a batch, recorded once and replayed as one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vptm.models.prompted_model import PromptedModel

Function = Callable[[Tensor], Tensor]


class Recorded(NamedTuple):
    """A graph, and where it reads and writes."""

    images: Tensor
    output: Tensor
    replay: Callable[[], None]


def record(function: Function, images: Tensor) -> Recorded:
    """A CUDA graph of `function(images)` without gradients, after a run that makes what is made at first use."""
    images = images.clone()
    side = torch.cuda.Stream(images.device)
    side.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(side):
        function(images)
    torch.cuda.current_stream(images.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(images)
    return Recorded(images, output, graph.replay)


class InferenceGraph:
    """`function` of images, recorded for every shape that it is called with for the second time.

    What it returns holds until the next call. What `function` reads must stay as it is: a sealed model does.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self._seen: set[tuple[torch.Size, torch.dtype]] = set()
        self._recorded: dict[tuple[torch.Size, torch.dtype], Recorded] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        key = images.shape, images.dtype
        if key not in self._seen:  # such as the last batch, which is the only one of its size
            self._seen.add(key)
            return self.function(images)
        if key not in self._recorded:
            self._recorded[key] = record(self.function, images)
        graph = self._recorded[key]
        graph.images.copy_(images)
        graph.replay()
        return graph.output


class _Method(nn.Module):
    """A method of a model as a module, whose parameters are the model's."""

    def __init__(self, model: PromptedModel, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = getattr(self.model, self.name)(images)
        return found


class TrainingGraph:
    """A method of a model and its gradients, recorded for the shape of the first images; others run without a graph.

    Random numbers are drawn as without the recording. Parameters may change in place alone.
    """

    def __init__(self, model: PromptedModel, name: str) -> None:
        self._method = _Method(model, name)
        self._shape: torch.Size | None = None
        self._graphed: Any = None
        self._read: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        if self._shape is None:
            self._shape = images.shape
            with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
                self._graphed = torch.cuda.make_graphed_callables(
                    self._method, (images.clone(),), allow_unused_input=True
                )
            # the graph has their addresses
            self._read = list(self._method.model._encoder.constants())
        found: Tensor = (self._graphed if images.shape == self._shape else self._method.forward)(images)
        return found


def check_graph(cuda_graph: bool, device: torch.device, *, compile: bool = False) -> None:
    """ValueError where a CUDA graph is asked of a CPU, or of what is compiled."""
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a GPU, got device {device}")
    if cuda_graph and compile:
        raise ValueError("cuda_graph must be False with compile")
