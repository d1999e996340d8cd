"""One forward and one backward pass through every kernel, small: `compute-sanitizer python -m bench.small_case`."""

from __future__ import annotations

import os
import sys

# Every tensor in an allocation of its own: an access past its end is then outside of any.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

import vptm


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    # 17 tokens and 5 prompts: ragged blocks everywhere
    images, labels = torch.randn(3, 1, 28, 28, device="cuda"), torch.arange(3, device="cuda")
    for mode in ("deep", "shallow"):
        model = vptm.PromptedBEiT("builtin", num_classes=7, prompt_length=5, prompt_mode=mode, impl="triton").cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        torch.cuda.synchronize()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not loss.isfinite() or not all(bool(grad.isfinite().all()) for grad in gradients):
            print(f"{mode} prompts: loss or gradients are not finite", file=sys.stderr)
            return 1
        print(f"{mode} prompts: loss {loss.item():.4f}, {len(gradients)} gradients")
    return 0


if __name__ == "__main__":
    sys.exit(main())
