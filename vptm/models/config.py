"""What a model was built with, as adapters keep it and as trainers of other libraries ask for it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from torch import Tensor


class ModelConfig(dict[str, Any]):
    """The settings of a model by name: a mapping whose entries are attributes, too, beside those that the Hugging Face
    Trainer, its loggers and PEFT read of a model's `config`.

    An attribute that is no entry, as the `use_cache` the Trainer sets, is kept on the object and not in the mapping.

    Example:
        >>> config = ModelConfig(num_classes=3, readout="cls")
        >>> config.readout, config.num_labels, json.loads(config.to_json_string())["readout"]
        ('cls', 3, 'cls')
    """

    model_type = "vptm"
    is_encoder_decoder = False
    tie_word_embeddings = False

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self:
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __or__(self, other: Any) -> Any:
        return ModelConfig(dict(self) | dict(other))

    @property
    def problem_type(self) -> str:
        """What the labels of an image are."""
        return f"{'multi' if self.get('multi_label') else 'single'}_label_classification"

    @property
    def num_labels(self) -> int:
        """The number of classes."""
        return int(self["num_classes"])

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """None: `LabelledOutput` has the loss and the scores alone."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The entries, in a mapping of its own."""
        return dict(self)

    def to_json_string(self, use_diff: bool = True) -> str:
        """The entries as JSON; `use_diff` is accepted and makes no difference."""
        return json.dumps(self, indent=2, sort_keys=True) + "\n"


class LabelledOutput(NamedTuple):
    """What a model gives for images with labels.

    loss: mean cross-entropy, binary of a multi-label model, 0-d, float32. logits: class scores (B, K).
    """

    loss: Tensor
    logits: Tensor
