"""Triton kernels for prompted vision transformers. Imports with torch alone: no GPU, no Triton, no model library needed."""
