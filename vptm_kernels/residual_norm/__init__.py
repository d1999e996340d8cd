"""Residual addition with LayerScale and stochastic depth, and the LayerNorm after it, in one pass.

Not among the public ops of `vptm_kernels`: its GPU speed is not yet measured, and on a CPU it is no faster than
`torch.addmm` with beta=1 followed by LayerNorm, which the models use (`bench/bench_residual_norm.py`).
"""

from .api import residual_norm

__all__ = ["residual_norm"]
