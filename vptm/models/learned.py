"""What training changes of a model, and how it is told from what stays frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vptm.frozen.encoder import FrozenEncoder
from vptm.frozen.rows import PromptedRows
from vptm.frozen.sharing import unshare_storage
from vptm.models.verbalizers import PrototypicalVerbalizer
from vptm.weights.adapter_format import with_one_element
from vptm.weights.files import check_values, weight_hash


class LearnedParts(PromptedRows):
    """Prompts, verbalizer and whatever else of a model requires a gradient; the rest is frozen and comes from its
    source."""

    config: Any
    num_classes: int
    _encoder: FrozenEncoder
    _sealed_hash: str | None = None
    _sealed_left: str | None = None

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that training changes."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print every trained tensor, and the trained share of all parameters."""
        total = sum(parameter.numel() for parameter in self.parameters())
        trained = 0
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                trained += parameter.numel()
                print(f"{name:40s} {tuple(parameter.shape)!s:20s} {parameter.numel():>12,}")
        print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.3f} %)")

    def weight_hash(self) -> str:
        """Hash of the frozen weights as they are now, in their dtype; those that `freeze_for_inference` dropped count
        as they were then. An adapter fits this model only where the hashes agree."""
        return weight_hash(self.frozen_state_dict()) if self._sealed_hash is None else self._sealed_hash

    def _hash_left(self) -> str:
        """Hash of the frozen weights whose values `freeze_for_inference` did not drop, as they are now."""
        return weight_hash({name: value for name, value in self.frozen_state_dict().items() if not value.is_meta})

    def learned_state_dict(self) -> dict[str, Tensor]:
        """The tensors that training changes, detached, under their `state_dict` names: every parameter that requires a
        gradient, and prompts and verbalizer (and a codebook, and what `train_mask_token` and `train_lm_head` name) even
        where they do not, as no source has them."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if parameter.requires_grad or self._comes_from_no_source(name)
        }

    def load_learned_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors saved from `learned_state_dict`; names and shapes must be those of this model.

        Raises:
            ValueError: a missing, unknown, wrongly shaped or non-finite tensor; nothing is copied then.
        """
        learned, state = self.learned_state_dict(), with_one_element(state)
        missing, unknown = sorted(learned.keys() - state.keys()), sorted(state.keys() - learned.keys())
        if missing or unknown:
            raise ValueError(
                f"learned tensors must be {sorted(learned)}, got {sorted(state)}: missing {missing}, unknown {unknown}"
            )
        for name, tensor in learned.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} must have shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}")
            check_values({name: state[name]}, dtype=tensor.dtype)
        if any(name.startswith("backbone.") for name in learned):
            unshare_storage(self.backbone)
            learned = self.learned_state_dict()
        with torch.no_grad():
            for name, tensor in learned.items():
                tensor.copy_(state[name])
        self._encoder.forget_learned()

    def check_finite(self, dtype: torch.dtype | None = None) -> None:
        """Raise ValueError where something learned, or a frozen verbalizer, holds NaN, infinite values or, as `dtype`,
        would, or a verbalizer another number of prototypes than there are classes."""
        verbalizer = self.verbalizer
        if isinstance(verbalizer, PrototypicalVerbalizer) and len(verbalizer.prototypes) != self.num_classes:
            raise ValueError(
                f"verbalizer.prototypes must have a row for each of the model's {self.num_classes} classes, "
                f"got {len(verbalizer.prototypes)}"
            )
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.requires_grad or name.startswith("verbalizer."):
                wrong = (~tensor.detach().to(dtype or tensor.dtype).isfinite()).nonzero()
                if len(wrong):
                    index, kind = wrong[0].tolist(), "" if dtype is None else f" as {dtype}"
                    value = float(tensor.detach()[tuple(index)])
                    raise ValueError(f"{name} must be finite{kind}, got {value} at {index}")

    def _comes_from_no_source(self, name: str) -> bool:
        """Whether a tensor is made here, or learned by `config`, and so belongs to what was learned, trained or not."""
        trained = self.config.get("train_mask_token"), self.config["train_lm_head"] or self.config.get("codebook")
        return (
            name == "prompt_bias"
            or name.startswith(("prompts.", "verbalizer."))
            or (name == "mask_token" and bool(trained[0]))
            or (name.startswith("lm_head.") and bool(trained[1]))
        )

    def frozen_state_dict(self) -> dict[str, Tensor]:
        """What `learned_state_dict` leaves to the source; also of a model whose originals were dropped."""
        learned = self.learned_state_dict()
        return {
            name: tensor
            for name, tensor in nn.Module.state_dict(self).items()
            if name not in learned and not name.startswith("verbalizer.")
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameter names exempt from weight decay: timm's for the backbone, the mask token, prompts and their
        matrices, gates, alpha and bias."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()} | {
            "mask_token",
            "prompts.weight",
            "prompts.basis",
            "prompts.gate",
            "prompts.alpha",
            "prompt_bias",
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for timm's layer-wise learning-rate decay: embeddings, mask token and prompts, blocks, then the
        head."""
        stem = "cls_token|reg_token|pos_embed|patch_embed|norm_pre|rel_pos_bias"
        return {
            "stem": rf"^backbone\.(?:{stem})|^mask_token|^prompts\.|^prompt_bias",
            "blocks": [(r"^backbone\.blocks\.(\d+)", None), (r"^backbone\.norm", (99999,))],
        }
