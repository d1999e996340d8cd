"""Attention of image tokens to a prompt prefix and to themselves, with a relative position bias."""

from .api import prompted_attention
from .bias import RelativePositionBias

__all__ = ["RelativePositionBias", "prompted_attention"]
