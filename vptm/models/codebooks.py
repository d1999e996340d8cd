"""A user's codebook: the visual tokens that a mask row is compared with, where the weights bring no head over them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vptm.frozen.parts import is_plain_linear
from vptm.messages import listed
from vptm.weights.files import TORCH_SUFFIXES, check_values, one_line_errors, read_safetensors, read_torch
from vptm.weights.key_maps import check_dense


def load_codebook(source: Tensor | nn.Linear | str | os.PathLike[str], width: int, dtype: torch.dtype) -> nn.Linear:
    """The token head that a codebook is: `nn.Linear(width, V)` of copies of its values in `dtype`, with a bias of zeros
    where it has none.

    Args:
        source: (V, width); a linear layer with such a weight; or a `.safetensors`, `.pt` or `.pth` file that holds such
            a tensor, under any name, and at most one of (V,) beside it, which is the bias.
        width: C of the model.
        dtype: of the model.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: a source of another type.
        ValueError: another width, a file that is damaged or holds something else, or values that are not finite.

    Example:
        >>> load_codebook(torch.eye(3, 2), width=2, dtype=torch.float32)(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2., 0.]], grad_fn=<AddmmBackward0>)
    """
    label = "codebook"
    bias: Tensor | None = None
    if isinstance(source, Tensor):
        weight = source
    elif isinstance(source, nn.Linear):
        if not is_plain_linear(source):
            raise ValueError(
                f"codebook must be a plain nn.Linear, got a {type(source).__name__} that computes otherwise"
            )
        weight, bias = source.weight, source.bias
    elif isinstance(source, str | os.PathLike):
        label = f"codebook {os.fspath(source)}"
        with one_line_errors(label):
            weight, bias = _read(Path(source).expanduser(), label)
    else:
        raise TypeError(f"codebook must be a tensor, an nn.Linear or the path of a file, got {type(source).__name__}")
    if weight.ndim != 2 or weight.shape[1] != width or not len(weight):
        raise ValueError(
            f"{label} must have shape (V, {width}), a row as wide as the model for each token, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{label} must have a bias of shape ({len(weight)},), got {tuple(bias.shape)}")
    check_dense(weight, label)
    check_values({"weight": weight} | ({} if bias is None else {"bias": bias}), label, dtype=dtype)
    head = empty_codebook(list(weight.shape)).to(dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    return head


def empty_codebook(shape: Any) -> nn.Linear:
    """A token head of zeros for a codebook of `shape`, [V, C].

    Raises:
        ValueError: that is no list of two positive integers.
    """
    if not isinstance(shape, list) or len(shape) != 2 or any(type(one) is not int or one < 1 for one in shape):
        raise ValueError(f"codebook must be [V, C], two positive integers, in a config, got {shape!r}")
    tokens, width = shape
    head = nn.Linear(width, tokens, device="meta", dtype=torch.float32)
    head.load_state_dict({"weight": torch.zeros(tokens, width), "bias": torch.zeros(tokens)}, assign=True)
    return head.eval()


def _read(path: Path, label: str) -> tuple[Tensor, Tensor | None]:
    """The matrix in a file, and the vector beside it."""
    if not path.exists():
        raise FileNotFoundError(f"{label}: no such file")
    if path.suffix == ".safetensors":
        held: dict[str, Any] = dict(read_safetensors(path, label)[0])
    elif path.suffix in TORCH_SUFFIXES:
        held = dict(read_torch(path, label, alone="codebook"))
    else:
        raise ValueError(f"{label}: must be a .safetensors, .pt or .pth file, got {path.suffix or 'no suffix'}")
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    matrices = [name for name, value in tensors.items() if value.ndim == 2]
    vectors = [name for name, value in tensors.items() if value.ndim == 1]
    if len(tensors) < len(held) or len(matrices) != 1 or len(vectors) > 1 or len(tensors) > len(matrices + vectors):
        raise ValueError(f"{label}: must hold one (V, C) tensor, and at most one (V,) beside it, got {listed(held)}")
    return tensors[matrices[0]], tensors[vectors[0]] if vectors else None
