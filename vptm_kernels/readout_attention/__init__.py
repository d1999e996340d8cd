"""Attention of one query row per image to tokens that are neither normalised nor projected beforehand."""

from .api import readout_attention

__all__ = ["readout_attention"]
