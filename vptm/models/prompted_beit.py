"""PromptedBEiT: a frozen, pre-trained BEiT that learns new labels through a few prompts and a verbalizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange, repeat
from timm.models import register_model
from timm.models.beit import Attention, Beit
from torch import Tensor, nn

from vptm.frozen.parts import (
    BiasedAttention,
    GivenBias,
    biased_attention,
    block_forward,
    softmax_attention,
    with_columns,
)
from vptm.frozen.rows import AttentionFunction
from vptm.frozen.written_out import cross_attend, pre_norm_block
from vptm.messages import one_of
from vptm.models.claims import check_claim
from vptm.models.position_bias import extended_index, parse_extra_bias
from vptm.models.prompted_model import PromptedModel
from vptm.settings import (
    PROMPT_LOCATION,
    BEiTReadout,
    BEiTSettings,
    Implementation,
    MaskMode,
    PromptMode,
    TokenActivation,
    VerbalizerName,
)
from vptm.weights.beit_architecture import resize_positions
from vptm.weights.beits import LoadedBackbone, LoadReport, load_backbone

PROMPT_LOCATIONS = ("after_cls", "after_mask", "before_mask", "end")
MASKED_MODELLING_WEIGHTS = (
    "masked-modelling weights such as beitv2_base_patch16_224_pt1k.pth "
    "or the Hugging Face id microsoft/beit-base-patch16-224-pt22k"
)


class PromptedBEiT(PromptedModel):
    """A frozen BEiT with learned prompts, read at a mask token, and a verbalizer from visual tokens to labels.

    VPTM (arXiv:2303.04998): prompts and a mask token join the patches, the model predicts the visual token at the mask
    as it did in pre-training, and a prototypical verbalizer maps that prediction to labels. The method text is not
    public; the defaults are a reconstruction and each open choice is an argument. With `readout="cls",
    verbalizer="linear", token_activation="hidden"` this is VPT (arXiv:2203.12119) on BEiT.

    Everything is frozen but `prompts` and `verbalizer` (and what `train_*` and `extra_bias="learned"` add); the frozen
    backbone stays in eval mode under `model.train()`.

    Args:
        source: unilm `.pth`, safetensors file, Hugging Face folder or id, timm name, timm `Beit` instance (which stays
            as it is: `backbone` is another module on the same storage) or "builtin". See `vptm.load_backbone`.
        num_classes: K.
        prompt_length: prompts per layer P, 0 allowed.
        prompt_mode: "shallow", "deep" or "progressive", see `vptm.PromptBank`.
        prompt_location: deprecated and without effect: attention is permutation-equivariant, and position bias and
            embeddings go with the rows, so their order cannot change the function.
        prompt_dropout: per-sample prompt dropout in training.
        progressive_alpha: alpha of progressive prompts, or one for every block but the first.
        prompt_gate: start of learned gates, added in every block to the scaled scores with its prompts, one for each
            head and prompt: a prompt has exp(gate) of its weight, and -4 starts near the frozen model. None has none.
        prompt_options: further arguments of `vptm.PromptBank`: "blocks", "after", "shared", "prompt_dim",
            "projection_per", "kind", "placement", "added_to", "dropout_per", "gate_per", "train_alpha",
            "patch_values".
        readout: row the head reads: "mask", "cls", or "mean" over the patch rows.
        mask_mode: "insert" an extra mask row, or "replace" the patch at the centre (at (y, x) with
            `extra_bias="grid:y,x"`).
        train_mask_token, train_lm_head: also learn the mask token or the token head.
        verbalizer: "prototypical", "linear", or "class_embeddings", which `vptm.set_class_embeddings` fills.
        prototype_dim: d of the prototypes, None for no projection.
        token_activation: what the verbalizer reads: "hidden", "logits", "softmax" or "log_softmax".
        projection_bias: bias in the prototype projection.
        temperature: fixed value, or None to learn it from 0.1.
        extra_bias: position bias of prompts and an inserted mask row: "zero", "cls", "neutral", "grid:y,x" or "learned"
            (a parameter `prompt_bias` (L, 2, H, P): added to prompt columns in class and mask rows, and in patch rows;
            none without such columns, as with no prompt and with those of kind cross).
        vocab_size: tokens of a fresh token head, used only where the source brings neither trained weights nor a head.
        img_size: pixels, int or (height, width); None keeps the source's. Position bias is resized by timm's rule.
        dynamic_img_size: also take pictures of other sizes, multiples of the patch, each as a model of that size does:
            position bias and embeddings are resized by timm's rules. Constants of a size are made at its first pictures
            and kept for the last eight sizes. Compiled and exported programs take the model's own size alone.
        pretrained: for timm names, load timm's weights (classification weights: they have no mask token or token head).
        multi_label: an image has any number of labels, (B, K) of 0 and 1: the loss is binary cross-entropy, and scores
            are logits of probabilities that do not add up to 1.
        impl: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError: an argument outside its set, or weights without what the read-out or verbalizer needs.
        FileNotFoundError: a path that does not exist.

    Example:
        >>> model = PromptedBEiT("builtin", num_classes=10)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    saved_as = "PromptedBEiT"
    bias_index: Tensor
    _resized_from: tuple[int, int] | None = None
    _resized: dict[int, Tensor]

    def __init__(
        self,
        source: str | Path | Beit | LoadedBackbone,
        num_classes: int,
        *,
        prompt_length: int = 10,
        prompt_mode: PromptMode = "shallow",
        prompt_location: str | None = None,
        prompt_dropout: float = 0.0,
        progressive_alpha: float | Sequence[float] = 0.01,
        prompt_gate: float | None = None,
        prompt_options: Mapping[str, Any] | None = None,
        readout: BEiTReadout = "mask",
        mask_mode: MaskMode = "insert",
        train_mask_token: bool = False,
        train_lm_head: bool = False,
        verbalizer: VerbalizerName = "prototypical",
        prototype_dim: int | None = 128,
        token_activation: TokenActivation = "logits",
        projection_bias: bool = False,
        temperature: float | None = None,
        extra_bias: str = "zero",
        vocab_size: int = 8192,
        img_size: int | tuple[int, int] | None = None,
        dynamic_img_size: bool = False,
        pretrained: bool = False,
        multi_label: bool = False,
        impl: Implementation = "auto",
    ) -> None:
        settings = BEiTSettings.of(locals())
        super().__init__()
        if prompt_location is not None:
            one_of("prompt_location", prompt_location, PROMPT_LOCATIONS)
            warnings.warn(PROMPT_LOCATION, DeprecationWarning, stacklevel=2)
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
            raise ValueError(f"vocab_size must be an integer >= 1, got {vocab_size!r}")
        if train_mask_token and readout != "mask":
            raise ValueError(f"train_mask_token=True needs readout='mask', got readout={readout!r}")
        if train_lm_head and token_activation == "hidden":
            raise ValueError("train_lm_head=True needs a token_activation that reads the token head, got 'hidden'")
        self.config = {"num_classes": num_classes, **settings.config()}
        self.num_classes = num_classes
        self.readout = readout
        self.mask_mode = mask_mode
        self.extra_bias = extra_bias
        self.impl = impl

        if pretrained:
            self._refuse_before_download(source, token_activation)
        loaded = load_backbone(source, img_size=img_size, pretrained=pretrained)
        self.source = None if isinstance(source, Beit | LoadedBackbone) else str(source)
        self.report: LoadReport = loaded.report
        self.architecture = loaded.report.architecture
        self.default_cfg = loaded.default_cfg
        self.backbone = loaded.backbone
        for block in self.backbone.blocks:
            if type(block.attn) is Attention:
                block.attn.__class__ = BiasedAttention  # the same parts, for rows that timm's table does not know
        self.num_features = self.backbone.embed_dim

        mask_token, self.lm_head = self._masked_modelling_parts(loaded, token_activation, vocab_size)
        self.mask_token = None if mask_token is None else nn.Parameter(mask_token.detach().clone())

        self.has_mask_row = readout == "mask" and mask_mode == "insert"
        self._take_window()
        bias_mode, _ = parse_extra_bias(extra_bias, tuple(self.backbone.patch_embed.grid_size))
        self._check_bias_source(bias_mode)

        self.prompts = self._make_prompts()
        length = self.prompts.length
        self.register_buffer("bias_index", self._take_rows(), persistent=False)
        self.prompt_bias = None
        if bias_mode == "learned" and length > 0:
            heads = self.backbone.blocks[0].attn.num_heads
            self.prompt_bias = nn.Parameter(torch.zeros(len(self.backbone.blocks), 2, heads, length))
        self.verbalizer = self._make_verbalizer(num_classes)
        self._finish()

    def _refuse_before_download(self, source: Any, token_activation: TokenActivation) -> None:
        """Refuse a read-out of masked-modelling weights where timm's, which have none, would be downloaded."""
        if not isinstance(source, str) or source not in timm.list_models(module="beit"):
            return
        needs = "a visual-token head" if token_activation != "hidden" else ""
        needs = "a mask token" if self.readout == "mask" else needs
        if needs:
            raise ValueError(
                f"this read-out needs {needs}, timm's weights of {source} have none: "
                f"expected {MASKED_MODELLING_WEIGHTS}"
            )

    def _masked_modelling_parts(
        self, loaded: LoadedBackbone, token_activation: TokenActivation, vocab_size: int
    ) -> tuple[Tensor | None, nn.Linear | None]:
        """Mask token and token head of the weights; with a warning random ones, where they are read and there are no
        weights at all."""
        mask_token, lm_head, width = loaded.mask_token, loaded.lm_head, self.num_features
        fresh = []
        if self.readout == "mask" and mask_token is None:
            if loaded.pretrained:
                raise ValueError(
                    f"readout='mask' needs a mask token, {self.report.source} has none: "
                    f"expected {MASKED_MODELLING_WEIGHTS}"
                )
            mask_token = nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02)
            fresh.append("mask token")
        if token_activation != "hidden" and lm_head is None:
            if loaded.pretrained:
                raise ValueError(
                    f"token_activation={token_activation!r} needs a visual-token head, {self.report.source} has none: "
                    f"expected {MASKED_MODELLING_WEIGHTS}"
                )
            check_claim("vocab_size", vocab_size * width)
            lm_head = nn.Linear(width, vocab_size)
            nn.init.trunc_normal_(lm_head.weight, std=0.02)
            nn.init.zeros_(lm_head.bias)
            fresh.append(f"token head of {vocab_size} tokens")
        if fresh:
            warnings.warn(
                f"{self.report.source} brings no masked-modelling weights: "
                f"made a random {' and a random '.join(fresh)}; "
                f"for real use load {MASKED_MODELLING_WEIGHTS}",
                stacklevel=3,
            )
        return mask_token, lm_head

    def _take_window(self) -> None:
        """What goes with the window of patches that the backbone has."""
        self.num_patches = self.backbone.patch_embed.num_patches
        window = tuple(self.backbone.patch_embed.grid_size)
        _, grid = parse_extra_bias(self.extra_bias, window)
        self.grid_position = None if grid is None else grid[0] * window[1] + grid[1]
        self.replaced_patch: int | None = None
        if self.readout == "mask" and self.mask_mode == "replace":
            centre = (window[0] // 2) * window[1] + window[1] // 2
            self.replaced_patch = centre if self.grid_position is None else self.grid_position

    def _take_rows(self) -> Tensor:
        """The number of rows with prompts among them, and their index into the position table."""
        length, window = self.prompts.length, tuple(self.backbone.patch_embed.grid_size)
        self.num_rows = 1 + self.num_patches + int(self.has_mask_row) + length
        mode, grid = parse_extra_bias(self.extra_bias, window)
        return extended_index(window, prompts=length, mask=self.has_mask_row, mode=mode, grid=grid)

    def _take_size(self, own: Any) -> None:
        super()._take_size(own)
        blocks = self.backbone.blocks
        tables = [one for layer in range(len(blocks)) for one in own._position_tables(layer)]
        if tables and not all(biased_attention(block) for block in blocks):
            raise ValueError("images of another size need timm's attention in every block, got another")
        if any(table.requires_grad for table in tables):
            raise ValueError("images of another size need frozen position tables, got some that learn")
        self.bias_index = self._take_rows().to(own.bias_index.device)
        self._resized_from, self._resized = tuple(own.backbone.patch_embed.grid_size), {}

    def _position_tables(self, layer: int) -> list[Tensor]:
        """What block `layer` has of position tables, of the window that the backbone has."""
        parts = (self.backbone.rel_pos_bias, biased_attention(self.backbone.blocks[layer]))
        found = [getattr(part, "relative_position_bias_table", None) for part in parts]
        return [table if self._resized_from is None else self._at_window(table) for table in found if table is not None]

    def _at_window(self, table: Tensor) -> Tensor:
        """A table of another window, resized in float32 as it is where a model is made."""
        known = self._resized.get(id(table))
        if known is None:
            assert self._resized_from is not None
            state, window = (
                {"relative_position_bias_table": table.detach().float()},
                self.backbone.patch_embed.grid_size,
            )
            resize_positions(state, self._resized_from, tuple(window))
            known = self._resized[id(table)] = state["relative_position_bias_table"].to(table)
        return known

    def _check_bias_source(self, mode: str) -> None:
        backbone = self.backbone
        has_table = (
            backbone.rel_pos_bias is not None or backbone.blocks[0].attn.relative_position_bias_table is not None
        )
        if mode in ("cls", "neutral") and not has_table:
            raise ValueError(
                f"extra_bias={mode!r} reads a relative position bias table, this backbone has none: "
                "use 'zero' or 'learned'"
            )
        if mode == "grid" and not (has_table or backbone.pos_embed is not None):
            raise ValueError(
                "extra_bias='grid:y,x' needs position bias or position embeddings, this backbone has neither"
            )
        if mode == "grid" and self.readout != "mask":
            raise ValueError(
                f"extra_bias='grid:y,x' places the mask row, it needs readout='mask', got readout={self.readout!r}"
            )

    def embed(self, images: Tensor, patch_embed: nn.Module | None = None) -> Tensor:
        """Rows `[class | patches | mask?]`, written into one buffer."""
        backbone = self.backbone
        patches = (patch_embed or backbone.patch_embed)(images)
        position = backbone.pos_embed
        end = 1 + self.num_patches
        dtype = torch.promote_types(patches.dtype, backbone.cls_token.dtype)
        x = patches.new_empty(patches.shape[0], end + int(self.has_mask_row), self.num_features, dtype=dtype)
        x[:, 0] = backbone.cls_token[0]
        x[:, 1:end] = patches
        if self.replaced_patch is not None and self.mask_token is not None:
            x[:, 1 + self.replaced_patch] = self.mask_token[0]
        if position is not None:
            x[:, :end] += position
        if self.has_mask_row and self.mask_token is not None:
            x[:, end] = self.mask_token[0]
            if position is not None and self.grid_position is not None:
                x[:, end] += position[:, 1 + self.grid_position]
        return x

    def loaded(self) -> LoadedBackbone:
        """What `vptm.load_backbone` gave for this model, as it is now."""
        return LoadedBackbone(self.backbone, self.mask_token, self.lm_head, True, self.report, self.default_cfg)

    def reference_embed(self, images: Tensor) -> Tensor:
        """Rows `[class | patches | mask?]`, concatenated."""
        backbone = self.backbone
        patches = backbone.patch_embed(images)
        batch = patches.shape[0]
        rows = [repeat(backbone.cls_token, "1 1 c -> b 1 c", b=batch), patches]
        mask_token = self.mask_token
        if self.replaced_patch is not None and mask_token is not None:
            masked = torch.arange(self.num_patches, device=patches.device) == self.replaced_patch
            rows[1] = torch.where(masked[None, :, None], mask_token.to(patches.dtype), patches)
        position = backbone.pos_embed
        if position is not None:
            rows = [rows[0] + position[:, :1], rows[1] + position[:, 1:]]
        if self.has_mask_row and mask_token is not None:
            if position is not None and self.grid_position is not None:
                mask_token = mask_token + position[:, 1 + self.grid_position]
            rows.append(repeat(mask_token, "1 1 c -> b 1 c", b=batch))
        return backbone.pos_drop(torch.cat(rows, dim=1))

    def reference_block(
        self,
        layer: int,
        rows: Tensor,
        attention: AttentionFunction,
        rotary: Tensor | None = None,
        keys_values: Tensor | None = None,
        crossing: Tensor | None = None,
    ) -> Tensor:
        """Block `layer` on rows `[class | patches | mask? | prompts]`, of which the last may be missing."""
        bias, count, columns = self.position_bias(layer), rows.shape[1], self.prompts.columns(layer)
        keys = count if keys_values is None else count + keys_values.shape[-2]
        if bias is not None:
            bias = bias[:, :count, :keys]
        if columns is not None and keys == self.num_rows:
            bias = with_columns(bias, columns, count, keys)
        bias = None if bias is None else bias[None]
        block: Any = self.backbone.blocks[layer]
        if crossing is None:
            return block_forward(block, rows, bias, attention, keys_values)
        self._refuse_other_blocks(block)
        given = GivenBias(bias, attention)
        cross = partial(cross_attend, block.attn, prompts=crossing, attention=attention)
        return pre_norm_block(block, rows, lambda x: block.attn(x, shared_rel_pos_bias=given), cross)

    def attention_weights(self, layer: int, rows: Tensor, keys_values: Tensor | None = None) -> Tensor:
        """What each of the rows (B, T, C) that enter block `layer` attends to, (B, H, T, T), softmax over the last;
        with learned `keys_values` (B, H, T, T + P)."""
        kept: list[Tensor] = []

        def keeping(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
            identity = torch.eye(value.shape[2], dtype=value.dtype, device=value.device)
            kept.append(softmax_attention(query, key, identity, bias))
            return kept[-1] @ value

        self.reference_block(layer, rows, keeping, None, keys_values)
        if not kept:
            raise ValueError(f"attention maps need timm's attention in block {layer}, got another")
        return kept[0]

    def position_bias(self, layer: int, *, learned: bool = True) -> Tensor | None:
        """Bias (H, T, T) of the table's entries for rows `[class | patches | mask? | prompts]`, with `prompt_bias`
        where it is learned and asked for; None where nothing is added."""
        tables = self._position_tables(layer)
        bias = None
        if tables:
            table = sum(tables[1:], start=tables[0])
            table = torch.cat([table, table.new_zeros(1, table.shape[1])])
            bias = rearrange(table[self.bias_index], "i j h -> h i j")
        if learned and self.prompt_bias is not None:
            first_prompt = self.num_rows - self.prompts.length
            patches = 1 + self.num_patches
            columns = self.prompt_bias.new_zeros(self.prompt_bias.shape[2], self.num_rows, self.num_rows)
            columns[:, 1:patches, first_prompt:] = self.prompt_bias[layer, 1][:, None]
            columns[:, 0, first_prompt:] = self.prompt_bias[layer, 0]
            columns[:, patches:first_prompt, first_prompt:] = self.prompt_bias[layer, 0][:, None]
            bias = columns if bias is None else bias + columns
        return bias

    @property
    def bias_is_shared(self) -> bool:
        """Whether all blocks add the same position bias."""
        return self.backbone.blocks[0].attn.relative_position_bias_table is None

    def without_prompts(self) -> PromptedBEiT:
        """The same model without its prompts, see `PromptedModel.without_prompts`."""
        twin = super().without_prompts()
        assert isinstance(twin, PromptedBEiT)
        twin.bias_index = self.bias_index[: twin.num_rows, : twin.num_rows]
        return twin

    def _readout_row(self) -> int | None:
        """Row of `forward_features` that is read, None where patch rows are averaged."""
        if self.readout == "mean":
            return None
        if self.readout == "cls":
            return 0
        return 1 + (self.num_patches if self.replaced_patch is None else self.replaced_patch)

    def predict_tokens(self, images: Tensor) -> Tensor:
        """Visual-token logits (B, V) at the read-out row."""
        if self.lm_head is None:
            raise ValueError(
                f"predict_tokens needs a visual-token head, {self.report.source} has none: "
                f"expected {MASKED_MODELLING_WEIGHTS}"
            )
        return self.lm_head(self.forward_hidden(images))


# what timm's own scripts pass to every model: what asks for nothing is taken, the rest has another name here
_TIMM_ARGUMENTS = {
    "drop_rate": "prompt_dropout is that of what is learned",
    "drop_path_rate": "the backbone is frozen",
    "attn_drop_rate": "the backbone is frozen",
    "proj_drop_rate": "the backbone is frozen",
    "drop_block_rate": "the backbone is frozen",
    "global_pool": "readout says what is read",
    "features_only": "forward_features gives the rows",
}


def _from_registry(architecture: str, pretrained: bool, arguments: dict[str, Any]) -> PromptedBEiT:
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        arguments.pop(name, None)
    for name, instead in _TIMM_ARGUMENTS.items():
        if asked := arguments.pop(name, None):
            raise TypeError(f"vptm_{architecture} takes no {name}, got {asked!r}: {instead}")
    channels = arguments.pop("in_chans", None)
    model = PromptedBEiT(
        arguments.pop("source", architecture), arguments.pop("num_classes", 1000), pretrained=pretrained, **arguments
    )
    taken = model.default_cfg["input_size"][0]
    if channels not in (None, taken):
        raise ValueError(f"in_chans must be {taken}, as the weights of {model.source} have, got {channels!r}")
    return model


@register_model
def vptm_beitv2_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> PromptedBEiT:
    """`timm.create_model("vptm_beitv2_base_patch16_224", num_classes=K, source="beitv2_base_patch16_224_pt1k.pth")`."""
    return _from_registry("beitv2_base_patch16_224", pretrained, kwargs)


@register_model
def vptm_beitv2_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> PromptedBEiT:
    """`timm.create_model("vptm_beitv2_large_patch16_224", num_classes=K,
    source="beitv2_large_patch16_224_pt1k.pth")`."""
    return _from_registry("beitv2_large_patch16_224", pretrained, kwargs)
