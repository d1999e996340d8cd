"""ProtoVerb's training after the fact (arXiv:2203.09770): projection and prototypes learn, everything else stays."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vptm.frozen.modes import eval_mode
from vptm.messages import number, one_of
from vptm.models.prompted_model import PromptedModel
from vptm.models.support_set import support_rows
from vptm.models.verbalizers import PrototypicalVerbalizer
from vptm.training.losses import protoverb_loss

PROTOTYPE_STARTS = ("present", "class_means")


def fit_prototypes(
    model: PromptedModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    start: str = "present",
    steps: int = 5,
    lr: float = 1e-3,
    temperature: float = 1.0,
) -> list[float]:
    """ProtoVerb's post-hoc training (arXiv:2203.09770): projection and prototypes learn, the prompts stay.

    The read-out rows of the support set are computed once, in eval mode; then Adam takes `steps` full-batch steps on
    `vptm.training.losses.protoverb_loss` of their embeddings. The temperature of the verbalizer stays too. Defaults are
    OpenPrompt's. It holds (N, N) cosines.

    Args:
        model: with a prototypical verbalizer, of which what requires a gradient is trained in place.
        loader: the support set as (images, labels) batches, labels (B,) integers in 0 .. K - 1; without augmentation
            unless that is wanted frozen too.
        start: where the prototypes start: "present" values, or "class_means" of the support set.
        steps: of Adam, >= 1.
        lr: learning rate.
        temperature: of the cosines inside the loss, not the verbalizer's.

    Returns:
        The loss before every step and after the last: `steps` + 1 numbers.

    Raises:
        ValueError, TypeError: an argument out of range, another verbalizer, frozen prototypes or such that are not
            finite, a label outside 0 .. K - 1, a class without an image. Nothing has changed then.
        FloatingPointError: the loss became NaN or infinite; the model is as it was.

    Example:
        >>> import vptm
        >>> model = vptm.PromptedBEiT("builtin", num_classes=2, prototype_dim=8)
        >>> losses = vptm.fit_prototypes(model, [(torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 0, 1]))])
        >>> len(losses)
        6
    """
    verbalizer = model.verbalizer
    if not isinstance(verbalizer, PrototypicalVerbalizer):
        raise TypeError(f"model must have a PrototypicalVerbalizer, got {type(verbalizer).__name__}")
    one_of("start", start, PROTOTYPE_STARTS)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    if not 0 < number("lr", lr) < math.inf:
        raise ValueError(f"lr must be finite and > 0, got {lr!r}")
    if not 0 < number("temperature", temperature) < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature!r}")
    parts = [verbalizer.prototypes, *(verbalizer.projection.parameters() if verbalizer.projection else ())]
    learned: list[Tensor] = [parameter for parameter in parts if parameter.requires_grad]
    if not verbalizer.prototypes.requires_grad:
        raise ValueError("verbalizer.prototypes must be trainable, got requires_grad=False")
    model.check_finite()
    with eval_mode(model):
        support = list(support_rows(model, loader, len(verbalizer.prototypes)))
    hidden, labels = map(torch.cat, zip(*support))
    before = [parameter.detach().clone() for parameter in learned]
    # in 16 bits Adam divides by a zero and small steps are lost: float32 copies step, as in `vptm.fit`
    half = (torch.float16, torch.bfloat16)
    stepped = [parameter.detach().float() if parameter.dtype in half else parameter for parameter in learned]
    optimiser = torch.optim.Adam(stepped, lr=lr)
    losses: list[float] = []
    try:
        if start == "class_means":
            verbalizer.to_class_means(support, model.lm_head)
            _copy_values(learned, stepped)
        for step in range(steps + 1):
            with torch.set_grad_enabled(step < steps):
                embedding = verbalizer.embed_support(hidden, model.lm_head)
                loss = protoverb_loss(embedding, verbalizer.prototypes, labels, temperature=temperature)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"loss became {losses[-1]} at step {step} with lr {lr:.3g}: use a lower lr")
            if step < steps:
                for copy, gradient in zip(stepped, torch.autograd.grad(loss, learned)):
                    copy.grad = gradient.to(copy.dtype)
                optimiser.step()
                _copy_values(stepped, learned)
    except BaseException:
        _copy_values(before, learned)
        raise
    finally:
        optimiser.zero_grad(set_to_none=True)
    return losses


@torch.no_grad()
def _copy_values(source: list[Tensor], target: list[Tensor]) -> None:
    for values, tensor in zip(source, target):
        if values is not tensor:
            tensor.copy_(values)
