"""One training step: scores, loss, gradients, and what the optimiser changes."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

from vptm.models.adapter_saving import unwrapped
from vptm.models.prompted_model import PromptedModel
from vptm.settings import TrainSettings
from vptm.training.averaging import Average
from vptm.training.graphs import TrainingGraph
from vptm.training.groups import parameter_groups
from vptm.training.losses import protoverb_loss
from vptm.training.masters import MasterWeights
from vptm.training.objective import CrossEntropy
from vptm.training.precision import compiled
from vptm.training.ranks import Ranks
from vptm.training.reformation import FeatureReformation
from vptm.training.schedules import LearningRate


class TrainStep:
    """What one batch does to a model: loss, optimiser and learning rate, as `settings` (the keywords of `fit`) say.

    Args:
        forward: what is trained: a model, or a wrapper of it.
        given: the model that `forward` computes in another type, or what it wraps.
        settings: of `vptm.fit`.
        objective: the loss of class scores.
        dtype: what images are cast to; None leaves them as they are.
        steps: steps in an epoch.
        ranks: the processes that train together.
        cache_frozen: keep the frozen features of ProVP-Ref's contrast.

    Attributes:
        model: what `forward` wraps.
        masters: see `vptm.training.masters.MasterWeights`.
        average: of what is learned, which answers in its place.
        optimiser: timm's, over what `masters` says.
    """

    def __init__(
        self,
        forward: Any,
        given: PromptedModel,
        settings: TrainSettings,
        *,
        objective: CrossEntropy,
        dtype: torch.dtype | None,
        steps: int,
        ranks: Ranks,
        cache_frozen: bool,
    ) -> None:
        self.forward, self.model, self.settings, self.dtype = forward, unwrapped(forward), settings, dtype
        self.objective = objective
        self.reform = None
        if settings.reformation:
            weight, temperature = settings.reformation, settings.reformation_temperature
            self.reform = FeatureReformation(self.model, weight=weight, temperature=temperature, cache=cache_frozen)
        self._hidden: Any = self.model.forward_hidden
        if settings.compile:
            self.forward = compiled(self.model)
            self._hidden = compiled(self.model.forward_hidden)
        self._scores: Any = self.forward
        if settings.cuda_graph:  # validation has a graph of its own, of a sealed model
            self._scores = TrainingGraph(self.model, "forward")
            self._hidden = TrainingGraph(self.model, "forward_hidden")
        self.ranks = ranks
        self.masters = MasterWeights(self.model, given, ranks)
        self.average = Average(self.masters, settings.ema)
        groups = parameter_groups(self.model, settings)
        for group in groups:
            group["params"] = [self.masters.of(parameter) for parameter in group["params"]]
        self.optimiser = create_optimizer_v2(
            groups, opt=settings.optimizer, lr=settings.lr, weight_decay=settings.weight_decay
        )
        self._rate = LearningRate(
            self.optimiser,
            settings.schedule,
            lr=settings.lr,
            epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            steps=steps,
        )

    @property
    def lr(self) -> float:
        """Learning rate of the last step, of what has none of its own."""
        return self._rate.rate

    def __call__(self, images: Tensor, labels: Tensor, number: int, share: Any = 1.0) -> tuple[Tensor, Tensor]:
        """Step `number` of the run, counted from 0, on images (B, C, H, W) and labels (B,): its loss and the scores
        (B, K) before it, both detached. Images that are a `share` of what all processes have give their part of the
        loss."""
        self._rate.step_update(number)
        losses, every = [], []
        parts, whole = self.settings.accumulate, self.objective.mass(labels)
        if self.ranks.count > 1 and isinstance(whole, Tensor):  # weights of classes, which no share of images tells
            own = whole * (share > 0)
            share = own / self.ranks.sum(own)
        for some, theirs in zip(images.chunk(parts), labels.chunk(parts)):
            scores, contrast = self._scores_and_contrast(some, theirs)
            loss = self.objective(scores, theirs)
            if parts > 1 or self.ranks.count > 1:  # parts of a short batch differ in size
                part = share * self.objective.mass(theirs) / whole
                loss = loss * (part.to(loss) if isinstance(part, Tensor) else part)
            if contrast is not None:  # made for gradients that are averaged over processes
                loss = loss + contrast / self.ranks.count
            self.masters.backward(loss)
            losses.append(loss.detach())
            every.append(scores.detach())
        self.masters.step(self.optimiser, self.settings.clip_norm)
        self.average.update(number)
        return (sum(losses[1:], losses[0]), torch.cat(every)) if parts > 1 else (losses[0], every[0])

    def _scores_and_contrast(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, model = self.settings.protoverb_weight, self.model
        if not weight and self.reform is None:
            return self._scores(images), None
        # a wrapper's forward gives scores alone
        hidden, held = (self._hidden(images), None) if self.reform is None else self.reform(images)
        if not weight:
            return model.forward_scores(hidden), held
        verbalizer: Any = model.verbalizer
        embedding = verbalizer.embed(hidden, model.lm_head)
        contrast = weight * protoverb_loss(embedding, verbalizer.prototypes, labels)
        return verbalizer.compare(embedding) / verbalizer.temperature, contrast if held is None else contrast + held
