"""Triton kernels for prompted vision transformers.

Imports with torch alone: no GPU, no Triton and no model library needed.
"""

__all__: list[str] = []
