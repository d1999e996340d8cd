"""A prompted model as a graph of plain ATen: images in, class scores out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vptm.frozen.folded import Folded
from vptm.models.prompted_model import PromptedModel
from vptm_kernels import decompositions

# Any but 0 and 1, which a trace would take for the only size.
_EXAMPLES = 2


class Inference(nn.Module):
    """What a model answers as it is now, with every constant folded: prompts projected, token head and projection one
    map. Only what runs is held.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: PromptedModel) -> None:
        super().__init__()
        folded = model.folded_constants()
        self._folded: Folded | None = None
        if folded is not None:
            if model.prompt_bias is not None:
                folded = folded.beside(model, learned=True)
            learned = folded.seal_of(model)
            self._folded = _without_views(folded.sealed(learned))
            backbone = copy.copy(model.backbone)
            backbone._modules = backbone._modules | {"blocks": nn.ModuleList()}
            for name in {"rel_pos_bias", "rope"} & backbone._modules.keys():
                backbone._modules[name] = None
            parts = {"backbone": backbone, "prompt_bias": None} | ({} if learned.head is None else {"lm_head": None})
            model = model.with_parts(**parts)
        model.impl = "torch"
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, K) of normalised images (B, channels, height, width)."""
        if self._folded is None:
            return self.model(images)
        return self.model.forward_scores(self.model.hidden_on(images, self._folded), self._folded)


def _without_views(folded: Folded) -> Folded:
    """The same with memory of its own for every constant: of views a file would hold all that they are views of."""
    made: dict[tuple[object, ...], Tensor] = {}

    def own(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        key = tensor.data_ptr(), tensor.shape, tensor.stride()
        if key not in made:  # blocks share a bias
            made[key] = tensor.clone(memory_format=torch.contiguous_format)
        return made[key]

    twin = folded.packed(False)
    twin.blocks = [block._replace(qkv_weight=own(block.qkv_weight)) for block in folded.blocks]
    for name in ("biases", "square_biases", "wide_biases", "prefix_biases"):
        setattr(twin, name, [own(tensor) for tensor in getattr(folded, name)])
    learned = folded.learned
    twin.learned = learned._replace(
        prefixes=[own(tensor) for tensor in learned.prefixes or ()],
        columns=[own(tensor) for tensor in learned.columns or ()],
        mixed=[None if one is None else one._replace(fresh=own(one.fresh)) for one in learned.mixed or ()],
    )
    return twin


def export_program(model: PromptedModel) -> torch.export.ExportedProgram:
    """`model` as a graph for any batch size of at least one image, without an op of vptm's.

    Input: `images` (B, channels, height, width) in the model's dtype, normalised as `vptm.transforms` does. Output:
    class scores (B, K). The graph runs the PyTorch path of the model, with its constants as they are now.

    Args:
        model: a prompted model; it is in eval mode meanwhile.

    Example:
        >>> program = export_program(vptm.PromptedBEiT("builtin", num_classes=10))
        >>> program.module()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """
    weight = model.backbone.patch_embed.proj.weight
    example = weight.new_zeros(_EXAMPLES, *model.default_cfg["input_size"])
    sizes = {"images": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        program = torch.export.export(Inference(model), (example,), dynamic_shapes=sizes, strict=False)
        return program.run_decompositions(decompositions())
