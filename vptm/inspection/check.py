"""Compare the path a model runs on with the textbook path, on the user's own model and images."""

from __future__ import annotations

import torch
from torch import Tensor

from vptm.frozen.modes import eval_mode
from vptm.models.prompted_model import PromptedModel


def _outputs(model: PromptedModel, images: Tensor, impl: str, gradients: bool) -> dict[str, Tensor]:
    running = model.impl
    model.impl = impl
    try:
        with torch.no_grad():  # the path that inference takes
            hidden = model.forward_hidden(images)
            tensors = {"features": model.forward_features(images), "hidden": hidden}
            if model.lm_head is not None:
                tensors["token_logits"] = model.lm_head(hidden)
            tensors["logits"] = model(images)
            tensors["logits sealed"] = model.sealed_twin()(images)  # as `evaluate` and `predict` run it
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if gradients and named:
            with torch.enable_grad():
                logits = model(images)
                # a fixed, uneven cotangent: a constant one would hide errors that sum to zero over classes
                cotangent = torch.linspace(-1, 1, logits.numel(), device=images.device).view_as(logits)
                values = torch.autograd.grad((logits * cotangent).sum(), list(named.values()), materialize_grads=True)
            tensors["logits in training"] = logits
            tensors |= {f"grad {name}": value for name, value in zip(named, values)}
    finally:
        model.impl = running
    return {name: tensor.detach().double() for name, tensor in tensors.items()}


def check(model: PromptedModel, images: Tensor, *, gradients: bool = True) -> dict[str, float]:
    """Largest error of the path `model.impl` runs on against the reference path, per tensor.

    Args:
        model: any `PromptedBEiT` or `PromptedViT`; it is compared in eval mode and left in the mode it was in.
        images: (B, channels, height, width) as `model` takes them.
        gradients: also compare the path that records gradients, and the gradients of everything that is trained.

    Returns:
        The largest absolute difference over max(1, largest absolute reference value), for "features", "hidden",
        "token_logits" (with a token head), "logits" and "logits sealed" without gradients, as inference computes them,
        then for "logits in training" and "grad <parameter>". About 1e-6 in fp32; NaN where either path is not finite.

    Example:
        >>> import vptm
        >>> errors = vptm.check(vptm.PromptedBEiT("builtin", num_classes=10), torch.zeros(2, 1, 28, 28))
        >>> max(errors.values()) < 1e-4
        True
    """
    with eval_mode(model):
        running = _outputs(model, images, model.impl, gradients)
        expected = _outputs(model, images, "reference", gradients)
    errors = {}
    for name, reference in expected.items():
        if reference.numel() == 0:
            errors[name] = 0.0
            continue
        errors[name] = ((running[name] - reference).abs().max() / reference.abs().max().clamp(min=1.0)).item()
    return errors
