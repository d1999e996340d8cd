"""Checkpoints as they lie on disk or on the Hugging Face hub: their tensors, and what is stated beside them."""

from __future__ import annotations

import importlib.resources
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vptm.messages import error_line
from vptm.weights.adapter_format import CONFIG_FILE
from vptm.weights.configs import SourceFacts, folder_facts, vptm_facts
from vptm.weights.families import MODEL_TYPES, Family, Told, family_of_timm, told_by_names
from vptm.weights.files import SUFFIXES, TORCH_SUFFIXES, read_json, read_safetensors, read_torch, safetensors_names
from vptm.weights.jax_files import npz_names, read_npz
from vptm.weights.key_maps import is_huggingface, tensor_names, unwrap

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_ID = re.compile(r"(?:hf[-_]hub:)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")


class Checkpoint(NamedTuple):
    """`state`: what was saved, wrappers and training state included. `facts`: what the source states beside it."""

    state: Mapping[str, Any]
    facts: SourceFacts


def read_checkpoint(source: str | os.PathLike[str]) -> Checkpoint | None:
    """The checkpoint in a file, in a folder or on the hub, or the built-in one; None where there is nothing so called.

    Raises:
        FileNotFoundError: a hub id that the hub does not give.
        ValueError: what is there is no checkpoint, or not a whole one.
    """
    label = os.fspath(source)
    if source == "builtin":
        with importlib.resources.as_file(importlib.resources.files("vptm") / "assets" / "builtin.safetensors") as path:
            if not path.is_file():
                raise FileNotFoundError(
                    "builtin: vptm is installed without its built-in model, assets/builtin.safetensors"
                )
            return _read_file(path, label)
    path = Path(label).expanduser()
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # not there, or no path at all: a name too long, a null byte
        mode = 0
    if stat.S_ISDIR(mode):
        return _read_folder(path, label)
    if mode:
        if not stat.S_ISREG(mode):
            raise ValueError(f"{label}: must be a file or a folder, got a pipe, a socket or a device")
        return _read_file(path, label)
    hub_id = _hub_id(source)
    return None if hub_id is None else _read_folder(_download(hub_id, label), label)


def _hub_id(source: str | os.PathLike[str]) -> str | None:
    """The id of a repository on the hub that `source` may be, where nothing here is called so."""
    found = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if found is None or Path(source).suffix in SUFFIXES or os.path.exists(Path(source).expanduser().parts[0]):
        return None
    return found[1]


def is_something(source: str | os.PathLike[str]) -> bool:
    """Whether `read_checkpoint` finds something so called, or may find it on the hub; nothing is read or fetched."""
    if source == "builtin" or _hub_id(source) is not None:
        return True
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError):  # no path at all
        return False


def told_of(source: str | os.PathLike[str]) -> Told | None:
    """What can be told of what `read_checkpoint` would read from the names in it; no weights are read. None where it is
    of no family, or nothing can be told: reading it then says why.

    Raises:
        FileNotFoundError: a hub id that the hub does not give.
    """
    label = os.fspath(source)
    if source == "builtin":
        return Told("beit", "mask")
    path = Path(label).expanduser()
    try:
        if not path.exists():
            hub_id = _hub_id(source)
            if hub_id is None:
                return None
            path = _download(hub_id, label)
        if path.is_file():
            return told_by_names(_names_in(path))
        if not (path / "config.json").is_file():
            return None
        config = read_json(path / "config.json")
        family: Family | None = None
        if "model_type" in config:
            family = MODEL_TYPES.get(str(config["model_type"]))
        elif isinstance(config.get("architecture"), str):
            family = family_of_timm(config["architecture"])
        found = next((path / name for name in _WEIGHT_FILES if (path / name).is_file()), None)
        return told_by_names([] if found is None else _names_in(found), family)
    except FileNotFoundError:
        raise
    except (ValueError, OSError):
        return None


def _names_in(path: Path) -> list[str]:
    if path.suffix == ".npz":
        return npz_names(path)
    if path.suffix == ".json":
        return list(read_json(path).get("weight_map") or {})
    if path.suffix == ".safetensors":
        return safetensors_names(path)
    return tensor_names(read_torch(path, checked=False)) if path.suffix in TORCH_SUFFIXES else []


def _read_file(path: Path, label: str) -> Checkpoint:
    facts = SourceFacts()
    state: Mapping[str, Any]
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path, label)
        if metadata.get("format") == "vptm":
            facts = vptm_facts(metadata, label)
    elif path.suffix in TORCH_SUFFIXES:
        state = read_torch(path, label)
    elif path.suffix == ".npz":
        state, arguments, dropped = read_npz(path, label)
        facts = SourceFacts("jax", "vit", architecture=arguments, dropped=dropped)
        if arguments["in_chans"] == 3:
            facts.mean = facts.std = (0.5,) * 3
            facts.stated_by = "those of Google's ViTs"
    else:
        raise ValueError(
            f"{label}: must be a file ending in {', '.join(sorted(SUFFIXES))}, got {path.suffix or 'no suffix'}"
        )
    config = path.with_name("config.json")
    if facts.format is None and config.is_file() and is_huggingface(unwrap(state, label)[0]):
        facts = folder_facts(config, label)
    return Checkpoint(state, facts)


def _read_folder(folder: Path, label: str) -> Checkpoint:
    config = folder / "config.json"
    if not config.is_file():
        found = "an adapter, which vptm.load_adapter opens" if (folder / CONFIG_FILE).is_file() else "none in it"
        raise ValueError(f"{label}: must be a Hugging Face folder with config.json, got {found}")
    facts = folder_facts(config, label)
    name = next((name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"{label}: must have weights beside config.json, one of {', '.join(_WEIGHT_FILES)}")
    names = [name]
    if name.endswith(".index.json"):
        shards = read_json(folder / name, label).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and s == Path(s).name for s in shards.values()):
            raise ValueError(f"{label}: {name} must have weight_map, tensor names to file names in the folder")
        names = sorted(set(shards.values()))
    state: dict[str, Any] = {}
    for part in names:
        if not (folder / part).is_file():
            raise ValueError(f"{label}: {name} names {part}, which is not in the folder")
        file = folder / part
        state.update(read_safetensors(file, label)[0] if file.suffix == ".safetensors" else read_torch(file, label))
    return Checkpoint(state, facts)


def _download(repo: str, label: str) -> Path:
    configs = ["config.json", "preprocessor_config.json"]
    folder = from_hub(repo, label, [*configs, "model*.safetensors", "model.safetensors.index.json"])
    if not any((folder / name).exists() for name in _WEIGHT_FILES):
        folder = from_hub(repo, label, [*configs, "pytorch_model*.bin", "pytorch_model.bin.index.json"])
    return folder


def from_hub(repo: str, label: str, patterns: Sequence[str], **options: Any) -> Path:
    """The folder of the files of a hub's repository that match `patterns`, downloaded where the cache lacks them.

    Every attempt that the hub's library would report on by itself is left to the one error at the end.

    Args:
        repo: "owner/name" on the Hugging Face hub.
        label: what messages begin with.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: the hub does not give it, or is not reached.
        ValueError: the hub's library is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{label}: no such folder; to download it from the Hugging Face hub, pip install 'vptm[hf]'"
        ) from error
    library = logging.getLogger("huggingface_hub")
    before = library.level
    library.setLevel(logging.ERROR)
    try:
        return Path(str(snapshot_download(repo, allow_patterns=list(patterns), **options)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{label}: no such folder, and the Hugging Face hub did not give it: {error_line(error, first=True)}"
        ) from error
    finally:
        library.setLevel(before)


@contextmanager
def local_files_only() -> Iterator[None]:
    """Read names of the Hugging Face hub from the local cache alone; a name that is not there is not found.

    The flag is the one that HF_HUB_OFFLINE=1 sets for a whole process; timm passes no argument on to the hub.
    """
    try:
        from huggingface_hub import constants
    except ImportError:  # then nothing here can reach the hub
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
