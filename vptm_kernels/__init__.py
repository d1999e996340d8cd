"""Triton kernels for prompted vision transformers.

Imports with torch alone: no GPU, no Triton and no model library needed.
"""

from .prompted_attention import RelativePositionBias, prompted_attention

__all__ = ["RelativePositionBias", "prompted_attention"]
