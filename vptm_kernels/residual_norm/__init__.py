"""Residual addition with LayerScale and stochastic depth, and the LayerNorm after it, in one pass.

Not among the public ops of `vptm_kernels`: on a CPU it does not beat
`torch.addmm` with beta=1 followed by LayerNorm (0.94 times its speed forward, 0.90 times forward and backward, BEiT-B,
four images, 2 threads, `bench/bench_residual_norm.py`). No model runs on it.
"""

from .api import residual_norm

__all__ = ["residual_norm"]
