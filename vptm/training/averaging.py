"""What is learned, averaged over the steps, which answers in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vptm.training.masters import MasterWeights


class Average:
    """An exponential moving average of what `masters` trains, in the types it is learned in.

    After step n, counted from 1, `average = d average + (1 - d) learned` with `d = min(decay, (1 + n) / (10 + n))`: a
    short run does not end at the values it started at. It begins at those.

    Args:
        masters: what is learned.
        decay: in (0, 1); None averages nothing, and everything here is then of what is learned.

    Attributes:
        values: {name: average}, empty without a decay.
    """

    def __init__(self, masters: MasterWeights, decay: float | None) -> None:
        self.masters, self.decay = masters, decay
        self.values: dict[str, Tensor] = {}
        if decay is not None:
            self.values = {name: tensor.clone() for name, tensor in masters.trained().items()}

    def update(self, number: int) -> None:
        """Take up what step `number`, counted from 0, came to."""
        if self.decay is None:
            return
        learned = self.masters.trained()
        decay = min(self.decay, (number + 2) / (number + 11))
        get_ema_multi_avg_fn(decay)(list(self.values.values()), [learned[name] for name in self.values], number)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside, the model has the average, and afterwards what it had before, bitwise."""
        held = {name: tensor for name, tensor in self.masters.model.learned_state_dict().items() if name in self.values}
        before = {name: tensor.clone() for name, tensor in held.items()}
        try:
            self._copy(self.values, held)
            yield
        finally:
            self._copy(before, held)

    def kept(self) -> dict[str, Tensor]:
        """What a run keeps of an epoch: copies on the CPU in the types of the model that was given."""
        return self.masters.kept(self.values)

    def state(self) -> dict[str, Tensor] | None:
        """What `load` takes; None without a decay."""
        return None if self.decay is None else {name: tensor.cpu() for name, tensor in self.values.items()}

    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Put back what `state` gave; ValueError where it is of other tensors."""
        found = state or {}
        shapes, own = ({name: tuple(one.shape) for name, one in each.items()} for each in (found, self.values))
        if shapes != own:
            raise ValueError(f"average must be of {own}, got {shapes}")
        self._copy(found, self.values)

    @staticmethod
    @torch.no_grad()
    def _copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        for name, tensor in into.items():
            tensor.copy_(values[name])
