"""Triton kernels for prompted vision transformers.

Imports with torch alone: no GPU, no Triton and no model library needed.
"""

from .decompositions import decompositions
from .prompted_attention import RelativePositionBias, prompted_attention
from .prototype_cosine import FoldedHead, fold_head, prototype_cosine, token_gram
from .readout_attention import readout_attention

__all__ = [
    "FoldedHead",
    "RelativePositionBias",
    "decompositions",
    "fold_head",
    "prompted_attention",
    "prototype_cosine",
    "readout_attention",
    "token_gram",
]
