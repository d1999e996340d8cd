"""Adapters that people share: folders that other tools can tell, with a card, and the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin

from vptm.messages import one_of
from vptm.models.adapter_loading import load
from vptm.models.adapter_saving import Saved, deployed, frozen_part, save_compared
from vptm.weights.adapter_format import CONFIG_FILE, TENSORS_FILE, read_adapter_config
from vptm.weights.containers import from_hub
from vptm.weights.files import one_line_errors, write_atomically

CARD = "README.md"
_METHOD = ("prompt_mode", "prompt_length", "readout", "verbalizer")
FORMS = ("trainable", "folded")
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Kind = TypeVar("Kind", bound="Pretrained")


class Pretrained(Saved):
    """A model that is saved, shared and loaded by the folder or the hub's name of its adapter."""

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        form: str = "trainable",
        dtype: str = "float32",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `adapter_model.safetensors`, `adapter_config.json` and a card: what was learned, and how to rebuild it.

        It is the format of `vptm.save_adapter` and `vptm train`: the backbone by its name, where it lies from the
        folder, and the hash of its weights; no path of this machine.

        Args:
            folder: created where missing; an adapter in it is replaced, a card is kept.
            form: "trainable" as it is; "folded" for deployment, with token head and projection as one map of the hidden
                state, which takes C / V of the memory.
            dtype: of the stored tensors, "float32", "bfloat16" or "float16".
            extra: JSON-able facts to keep and to show in the card, such as data, accuracy and command.

        Raises:
            ValueError: what `vptm.save_adapter` refuses, an option outside its set, or a verbalizer that does not fold.
            WriteError: an OSError that names the file that cannot be written.

        Example:
            >>> model = vptm.PromptedBEiT("builtin", num_classes=10)
            >>> model.save_pretrained("clothes", form="folded", dtype="bfloat16", extra={"data": "fashion-mnist"})
            >>> vptm.PromptedBEiT.from_pretrained("clothes").num_classes
            10
        """
        one_of("form", form, FORMS)
        one_of("dtype", dtype, tuple(STORED))
        model = deployed(self) if form == "folded" else self
        save_compared(model, folder, frozen_part(model), extra, STORED[dtype])
        if not (path := Path(folder, CARD)).exists():
            write_atomically(path, card(read_adapter_config(folder)))

    @classmethod
    def from_pretrained(
        cls: type[Kind],
        name: str | Path,
        *,
        backbone: Any = None,
        impl: str = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Kind:
        """The model of an adapter, in eval mode.

        The adapter is read from the hub where `name` is no folder; its backbone is never fetched unless passed here.

        Args:
            name: folder, or id on the Hugging Face hub.
            backbone: in place of the recorded one; or a folder of weight files, of which the one with the recorded hash
                is taken.
            impl: "auto", "triton", "torch" or "reference".
            revision, local_files_only, token: of the hub.

        Raises:
            FileNotFoundError: the folder, one of its files or the backbone is missing, or the hub does not give it.
            ValueError: damaged files, a newer schema, another class or backbone, or tensors that do not fit.
        """
        folder = Path(name)
        if not folder.exists() and isinstance(name, str) and name.count("/") == 1 and not name.startswith("."):
            options = {"revision": revision, "local_files_only": local_files_only, "token": token}
            folder = from_hub(name, name, [TENSORS_FILE, CONFIG_FILE], **options)
        with one_line_errors(folder):
            config = read_adapter_config(folder)
            kind = config["model_class"]
            if kind != cls.__name__:
                raise ValueError(f"{folder / CONFIG_FILE} is of a {kind}: use vptm.{kind}.from_pretrained")
            model: Kind = load(cls, folder, config, backbone, impl)
            return model

    def push_to_hub(self, repo_id: str, *, options: Mapping[str, Any] | None = None, **saved: Any) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; the address of the commit.

        Args:
            repo_id: "owner/name", created where missing.
            options: of `huggingface_hub.ModelHubMixin.push_to_hub`: private, token, branch, create_pr, commit_message.
            saved: of `save_pretrained`.
        """
        return str(_Upload(self, saved).push_to_hub(repo_id, **dict(options or {})))


class _Upload(ModelHubMixin):
    """huggingface_hub's way of uploading, with vptm's files."""

    def __init__(self, model: Pretrained, saved: dict[str, Any]) -> None:
        self.model, self.saved = model, saved

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        self.model.save_pretrained(save_directory, **self.saved)


def card(config: Mapping[str, Any]) -> str:
    """The model card of an adapter, from its config: method, classes, and what `extra` says of data and accuracy.

    Example:
        >>> config = {"backbone": {"source": "builtin", "weight_hash": "sha256:0"}, "model": {"num_classes": 2}}
        >>> card(config | {"model_class": "PromptedBEiT"}).splitlines()[0]
        '---'
    """
    backbone, model, extra = config["backbone"], config["model"], config.get("extra") or {}
    names = config.get("class_names")
    kind = config["model_class"]
    facts = {
        "method": ", ".join(f"{name} {model[name]}" for name in _METHOD if name in model),
        "classes": ", ".join(names) if names else model["num_classes"],
        "backbone": f"{backbone.get('source') or 'a module'}, weights {backbone['weight_hash']}",
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in extra.items()},
    }
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    return f"""---
library_name: vptm
pipeline_tag: image-classification
tags:
- visual-prompt-learning
- adapter
---

# {kind} adapter

Prompts and a verbalizer for a frozen backbone, learned with [vptm](https://arxiv.org/abs/2303.04998). It runs on the
weights with the hash below alone.

| | |
|---|---|
{rows}

```python
import vptm

model = vptm.{kind}.from_pretrained("FOLDER_OR_HUB_ID")  # backbone="weights.pth" where it lies elsewhere
```
"""


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
