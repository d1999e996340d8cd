"""Files read and written: checked before use, never run as code, replaced by one rename.

Readers take the `label` that their messages begin with, the source as a user named it; without one it is the path.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import pickletools
import re
import stat
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vptm.messages import error_line, one_line

TORCH_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".tar"}
SUFFIXES = {*TORCH_SUFFIXES, ".safetensors", ".npz"}

_NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]
# a Namespace only holds values, and they must be plain themselves; a best accuracy is often a number of numpy's
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *sorted({type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}, key=repr),
    *((_NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


class WriteError(OSError):
    """A file cannot be written: the disk is full, its folder is gone, or it may not be; the message has its path."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for the block to write, renamed to `path` when the block ends well: a kill leaves
    the old file or the new one.

    Raises:
        WriteError: naming `path`; an old file is as it was.

    Example:
        >>> from pathlib import Path
        >>> with replacing(Path("note.txt")) as temporary:
        ...     _ = temporary.write_text("done")
        >>> Path("note.txt").read_text()
        'done'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _naming(path):
            yield temporary
            _move(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_several(path: Path) -> Iterator[Path]:
    """`replacing` for a writer that puts further files beside `path`, which name each other: the block writes `path`'s
    name in a folder of its own, whose files are renamed into place when the block ends well, `path` itself last.

    Raises:
        WriteError: naming `path`; an old file is as it was.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder, path.name)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                _move(file, path.parent / file.name)


def make_folder(folder: Path) -> None:
    """The folder, where it is missing.

    Raises:
        WriteError: naming it.
    """
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error_line(error)
        raise WriteError(f"{path} cannot be written: {reason}") from error


def _move(file: Path, path: Path) -> None:
    with file.open("r+b") as written:
        os.fsync(written.fileno())
    os.replace(file, path)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` as `replacing` does, text as UTF-8.

    Raises:
        WriteError: naming `path`; an old file is as it was.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def one_line_errors(label: object) -> Iterator[None]:
    """Whatever reading `label` raises, as one line of bounded length: values nested or sized beyond what Python takes
    are a ValueError, as any other content that is not what it should be."""
    try:
        yield
    except (RecursionError, OverflowError, MemoryError, UnicodeError) as error:
        what = {RecursionError: "nested too deeply", UnicodeError: "text that is not Unicode"}
        why = next((text for kind, text in what.items() if isinstance(error, kind)), "sizes beyond what memory holds")
        raise ValueError(one_line(f"{label}: must be a readable file, got {why}")) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch has no class of its own for what a CPU's memory does not hold
            raise
        raise ValueError(one_line(f"{label}: must fit into memory, got sizes that do not")) from error
    except (ValueError, TypeError, FileNotFoundError) as error:
        if str(error) == (line := one_line(error)):
            raise
        kind = next(kind for kind in (FileNotFoundError, TypeError, ValueError) if isinstance(error, kind))
        raise kind(line) from error


def read_safetensors(path: Path, label: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: it is not such a file, or not a whole one.
    """
    named = _named(path, label)
    _check_regular(path, f"{named} must be a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{named} must be a safetensors file, it is damaged: {error_line(error)}") from error


def safetensors_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file, from its header.

    Raises:
        ValueError: it is not such a file.
    """
    _check_regular(path, f"{path} must be a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a safetensors file, it is damaged: {error_line(error)}") from error


def read_torch(
    path: Path, label: str | None = None, *, checked: bool = True, alone: str | None = None
) -> Mapping[str, Any]:
    """The mapping in a file of `torch.save`; its tensors may be mapped from the file, copy what is kept.

    Nothing in it is run: read are tensors, plain values, numpy's numbers and `argparse.Namespace`, as which unilm keeps
    its arguments. Without `checked` the checksums of an archive are not compared, which reads all of it. With `alone`
    a tensor that was saved by itself is taken, too, by that name.

    Raises:
        ValueError: it is not such a file, not a whole one, differs from the checksums of its archive, or holds code.
    """
    named = _named(path, label)
    _check_regular(path, f"{named} must be a torch checkpoint")
    damaged = f"{named} must be a whole torch checkpoint, it is truncated or damaged"
    zipped = check_archive(path, label) if checked else zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            # torch describes foreign pickles at length; the error below says it in a line
            warnings.simplefilter("ignore")
            # mapping the file leaves the optimizer state of a training checkpoint on disk
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None and (code := _pickled_code(path)):
            raise ValueError(
                f"{named} must hold tensors as torch saves, it is a plain pickle that calls {code}; nothing was run"
            ) from error
        if found is None:
            raise ValueError(damaged) from error
        raise ValueError(
            f"{named} must hold tensors, numbers and argparse.Namespace only, it holds {found[1]}; nothing was run"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make torch's and pickle's readers raise many kinds
        raise ValueError(damaged) from error
    if alone is not None and isinstance(state, Tensor):
        return {alone: state}
    if not isinstance(state, Mapping):
        raise ValueError(f"{named} must be a mapping of names to tensors, got a {type(state).__name__}")
    return state


def check_archive(path: Path, label: str | None = None) -> bool:
    """Whether the file is a zip archive; then every entry is compared with the archive's own checksum, which
    `torch.load` does not do.

    An archive without checksums (`torch.serialization.set_crc32_options(False)`) has zeros in their place.

    Raises:
        ValueError: a damaged archive, or a compressed one, which torch does not write.
    """
    named = _named(path, label)
    whole = f"{named} must be a whole torch checkpoint"
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if packed := next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None):
                raise ValueError(
                    f"{named} must be an archive as torch.save writes it, {packed.filename} in it is compressed"
                )
            changed = archive.testzip() if any(entry.CRC for entry in entries) else None
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{whole}, it is truncated or damaged") from error
    if changed is not None:
        raise ValueError(f"{whole}, it is damaged: {changed} in it changed")
    return True


def read_json(path: Path, label: str | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is not JSON, or another value than an object.
    """
    named = _named(path, label)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{named} must be JSON: {error_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{named} must be a JSON object, got a {type(value).__name__}")
    return value


def check_values(
    tensors: Mapping[str, Tensor],
    label: str | None = None,
    *,
    backbone: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ValueError unless every tensor is floating point and finite.

    Args:
        tensors: by name.
        label: what messages begin with.
        backbone: of a backbone: none is without values, and all are made fp32.
        dtype: what they are made, in which larger values are infinite; None where they stay as they are.
    """
    where = "" if label is None else f"{label}: "
    dtype = torch.float32 if backbone else dtype
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{where}{name} must be floating point, got {tensor.dtype}")
        if backbone and tensor.numel() == 0:
            raise ValueError(f"{where}{name} must hold values, got shape {tuple(tensor.shape)}")
        try:  # 8-bit floats have no isfinite of their own
            values = tensor if tensor.dtype == torch.float64 else tensor.float()
        except RuntimeError:  # packed ones have no values one by one
            raise ValueError(f"{where}{name} must be floating point of 8 bits or more, got {tensor.dtype}") from None
        if not values.isfinite().all():
            raise ValueError(f"{where}{name} must be finite, got NaN or infinite values")
        if dtype is not None and not values.to(dtype).isfinite().all():
            largest = float(values.abs().max())
            raise ValueError(f"{where}{name} must be finite as {dtype}, got {largest:.4g}")


def weight_hash(tensors: Mapping[str, Tensor]) -> str:
    """Identity of a set of weights as "sha256:<hex>": two sets agree if names, dtypes, shapes and all bytes do.

    Names are sorted; device, memory layout and requires_grad do not count. A json line of name, dtype and shape stands
    before each tensor's bytes, so no two sets give the same stream.

    >>> vptm.weight_hash({"x": torch.zeros(2)})
    'sha256:f3151283d5c63587cd773d55b3eb39fa7104efa9ae53cdd3a62f4451060848c1'
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(header.encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _named(path: Path, label: str | None) -> str:
    if label is None:
        return str(path)
    return label if Path(label).name == path.name else f"{label}: {path.name}"  # a source that is a file is named once


def _check_regular(path: Path, must: str) -> None:
    """Refuse what would be waited for, and what holds nothing."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{must}, got a folder, a pipe, a socket or a device")
    if not state.st_size:
        raise ValueError(f"{must}, it is empty (0 bytes)")


def _pickled_code(path: Path) -> str | None:
    """What a plain pickle would import, read from its opcodes without running one; None where it is not a pickle."""
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    return str(argument).replace(" ", ".")
                if opcode.name == "STACK_GLOBAL":
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # not a pickle, or a cut one: the caller says "damaged"
        return None
    return None
