"""Small calls of every kernel for a sanitizer to watch, which slows them down a hundred times and more.

compute-sanitizer --tool memcheck python -m bench.small_case          # training steps of a small model
compute-sanitizer --tool memcheck python -m bench.small_case --ops    # forward and backward of every op: seconds
TRITON_INTERPRET=1 python -m bench.small_case --ops --rehearse        # no GPU needed
"""

from __future__ import annotations

import argparse
import os
import sys

# Every tensor in an allocation of its own: an access past its end is then outside of any.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

import vptm
from bench import autotune

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


def single_ops(place: autotune.Place) -> list[str]:
    """A line for every call that block sizes are tuned for, made tiny: ragged blocks everywhere.

    Raises:
        ArithmeticError: a result is not finite.
    """
    found = []
    for call in autotune.calls():
        torch.manual_seed(0)
        results = call.make(place)()
        if not all(bool(result.isfinite().all()) for result in results):
            raise ArithmeticError(f"{call.op}, {call.name}: a result is not finite")
        found.append(f"{call.op}: {call.name}, made tiny: {len(results)} results")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.small_case", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ops", action="store_true", help="single calls of every op")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: in the interpreter")
    options = parser.parse_args(argv)
    if not (options.rehearse or torch.cuda.is_available()):
        print("no GPU here", file=sys.stderr)
        return 2
    place = autotune.rehearsal() if options.rehearse else autotune.Place(tiny=True)
    if options.ops:
        print(*single_ops(place), sep="\n", flush=True)
        return 0
    for mode in MODES:
        print(one_step(mode, place.device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
