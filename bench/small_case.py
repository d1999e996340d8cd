"""A training step through the kernels of a small model, for `compute-sanitizer python -m bench.small_case` to watch."""

from __future__ import annotations

import os
import sys

# Every tensor in an allocation of its own: an access past its end is then outside of any.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

import vptm

MODES = ("deep", "shallow")


def one_step(mode: str, device: str) -> str:
    """Loss and gradients of a training step of the built-in model, 17 tokens and 5 prompts: ragged blocks everywhere.

    Raises:
        ArithmeticError: the loss or a gradient is not finite.
    """
    torch.manual_seed(0)
    images, labels = torch.randn(3, 1, 28, 28, device=device), torch.arange(3, device=device)
    model = vptm.PromptedBEiT("builtin", num_classes=7, prompt_length=5, prompt_mode=mode, impl="triton").to(device)
    with torch.autocast(device, torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not loss.isfinite() or not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise ArithmeticError(f"{mode} prompts: the loss or a gradient is not finite")
    return f"{mode} prompts: loss {loss.item():.4f}, {len(gradients)} gradients"


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here", file=sys.stderr)
        return 2
    for mode in MODES:
        print(one_step(mode, "cuda"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
