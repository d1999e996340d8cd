"""What an optimiser steps: learned tensors, or float32 copies of those that compute in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vptm.models.prompted_model import PromptedModel
from vptm.training.ranks import Ranks

_FIRST_SCALE = 1024.0  # of fp16 losses; a mean over a batch needs less than torch's 65536, which costs the first steps


class MasterWeights:
    """float32 copies of the learned tensors that compute in 16 bits, which the optimiser steps in their place.

    Args:
        model: what is trained.
        given: what it is a copy of in another type, or `model` itself; what is learned starts at its values.
        ranks: the processes whose gradients are summed.
    """

    def __init__(self, model: PromptedModel, given: PromptedModel, ranks: Ranks) -> None:
        self.model, self.given, self.ranks = model, given, ranks
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        start = given.learned_state_dict()
        self.copies = {
            parameter: start[name].to(parameter.device, torch.float32, copy=True)
            for parameter, name in self.names.items()
            if parameter.dtype in (torch.float16, torch.bfloat16)
        }
        scaled = any(parameter.dtype == torch.float16 for parameter in self.copies)
        place = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(place, init_scale=_FIRST_SCALE, enabled=scaled)

    def of(self, parameter: torch.nn.Parameter) -> Tensor:
        """What the optimiser steps for `parameter`."""
        return self.copies.get(parameter, parameter)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        self.scaler.scale(loss).backward()

    def step(self, optimiser: torch.optim.Optimizer, clip_norm: float | None) -> None:
        """A step of the optimiser by the gradients added up, at most `clip_norm` long, and its outcome in the model."""
        for parameter, copy in self.copies.items():
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        stepped = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        self.ranks.sum_gradients(stepped)
        if clip_norm is not None:
            self.scaler.unscale_(optimiser)
            torch.nn.utils.clip_grad_norm_(stepped, clip_norm)
        self.scaler.step(optimiser)
        self.scaler.update()
        for tensor in (*self.names, *self.copies.values()):  # also of what the optimiser does not step
            tensor.grad = None
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, copy in self.copies.items():
            parameter.copy_(copy)

    def trained(self) -> dict[str, Tensor]:
        """What is stepped, by the name of its parameter, detached."""
        return {name: self.of(parameter).detach() for parameter, name in self.names.items()}

    def learned(self) -> dict[str, Tensor]:
        """`given.learned_state_dict()` with what was trained in place of what it started at."""
        return self.given.learned_state_dict() | self.trained()

    def kept(self, instead: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of it: copies on the CPU in the types that `given` has, of `instead` where that has some."""
        kinds = {name: tensor.dtype for name, tensor in self.given.learned_state_dict().items()}
        return {name: tensor.to("cpu", kinds[name], copy=True) for name, tensor in (self.learned() | instead).items()}

    @torch.no_grad()
    def load(self, learned: Mapping[str, Tensor]) -> None:
        """Put back what `learned` gave."""
        self.model.load_learned_state_dict(learned)
        for parameter, copy in self.copies.items():
            copy.copy_(learned[self.names[parameter]])

    def note(self) -> str:
        """What is said of it before training."""
        kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in self.copies})
        return f", computed in {' and '.join(kinds)}, learned in float32" if kinds else ""
