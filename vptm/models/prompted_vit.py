"""PromptedViT: visual prompt tuning of any timm VisionTransformer or Eva, on the folded encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from vptm.frozen.parts import with_columns, with_learned
from vptm.frozen.rotary import of_block, rotary_embedding
from vptm.frozen.rows import AttentionFunction
from vptm.frozen.written_out import attend_with, cross_attend, heads_of, pre_norm_block
from vptm.models.codebooks import load_codebook
from vptm.models.prompted_model import PromptedModel
from vptm.settings import Implementation, PromptMode, TokenActivation, VerbalizerName, ViTReadout, ViTSettings
from vptm.weights.vits import LoadedViT, load_vit


class PromptedViT(PromptedModel):
    """A frozen timm `VisionTransformer` or `Eva` with learned prompts and a verbalizer (VPT, arXiv:2203.12119).

    Supervised, MAE, MoCo-v3, DINO and DINOv2 (with registers) and CLIP's visual weights are all of that class:
    position embeddings on all rows or on patches alone, class token or none, register tokens, a norm before the blocks,
    LayerScale, QuickGELU, and the norm's own eps are the source's. Blocks of norm, attention, norm and MLP, of
    two layers or SwiGLU (DINOv2 giant), with norms inside or without, run folded. Query-key norm, parallel and
    post-norm blocks run unfolded through timm's own code; other block classes are refused by name. The defaults are
    VPT-deep.

    Of timm's `Eva` class (EVA-02, DINOv3, Perception Encoder, RoPE-ViT) the queries and keys of patches are turned by
    their rotary positions, those of class, register and prompt rows are not; a mask token in place of a patch is turned
    as that patch. A row that is read in the last block attends to keys and values that are projected: a key cannot be
    turned by its position before it is one.

    Everything is frozen but `prompts` and `verbalizer` (and `lm_head` with `train_lm_head`).

    Args:
        source: timm name, with its tag where it has one ("vit_base_patch16_224.mae"); `.pth`, `.safetensors` or
            Google's `.npz` file of supervised, MAE, MoCo-v3, DINO or DINOv2 weights; Hugging Face folder or id of a
            ViT, ViTMAE, DeiT, DINOv2, DINOv3, CLIP or SigLIP; or a timm `VisionTransformer` or `Eva` instance (which
            stays as it is: `backbone` is another module on the same storage). What was made of it is in `model.report`.
        num_classes: K.
        prompt_length: prompts per layer P, 0 allowed.
        prompt_mode: "deep", "shallow" or "progressive", see `vptm.PromptBank`. Prompts are inserted after the position
            embeddings and `norm_pre` and get neither; their place among the rows cannot change the function.
        prompt_dropout: per-sample prompt dropout in training.
        progressive_alpha: alpha of progressive prompts, or one for every block but the first.
        prompt_gate: start of learned gates, added in every block to the scaled scores with its prompts, one for each
            head and prompt: a prompt has exp(gate) of its weight, and -4 starts near the frozen model. None has none.
        prompt_options: further arguments of `vptm.PromptBank`: "blocks", "after", "shared", "prompt_dim",
            "projection_per", "kind", "placement", "added_to", "dropout_per", "gate_per", "train_alpha",
            "patch_values".
        readout: "cls"; "mean" over the patch rows (and class and register rows where the source's own mean takes them);
            "map", the source's own attention pooling (SigLIP's), whose one query attends to the normalised patch rows
            (and to the prefix where the source's does) and to no prompt; "mask", an extension of VPTM to weights that
            were pre-trained with a mask token and have no head over visual tokens (DINOv2's, DINOv3's and EVA-02's
            files): the mask token stands in place of the patch in the centre, before positions are added, as in that
            pre-training, and its row is read; or "mean_with_prompts": the rows of "mean" and the last block's prompt
            rows, as VPT does on MAE weights. MAE's mask token is its decoder's: no row of the encoder is a mask row,
            and it is refused, as are timm's weights of DINOv2, which leave the token out. The source's own norms stay
            where it has them: timm's MAE models norm every row and then average, VPT averages first, through a norm
            that its checkpoint lacks and that it keeps at the identity; for that pass a model made with
            `global_pool="avg"`.
        verbalizer: "linear", "prototypical", or "class_embeddings", which `vptm.set_class_embeddings` fills.
        prototype_dim, projection_bias, temperature: see `vptm.PrototypicalVerbalizer`.
        token_activation: what the verbalizer reads: "hidden", or "logits", "softmax" or "log_softmax" of `lm_head`,
            which is the source's own classifier, or `codebook`. Of a mask row it is `codebook` alone: weights of this
            class bring no head over visual tokens.
        codebook: an extension of VPTM to weights that bring none: V visual tokens of the user's as a (V, C) tensor E,
            an `nn.Linear(C, V)`, or a `.safetensors`, `.pt` or `.pth` file of either. The prediction is the plain
            product `logits = h @ E.T + b` with the normalised read-out row h (B, C), what `forward_hidden` gives; b is
            zero where there is none. It is frozen (but with `train_lm_head`), and adapters hold its values.
        train_lm_head: also learn that classifier or codebook.
        img_size: pixels, int or (height, width); None keeps the source's, as an instance has to. Position embeddings
            are resized by timm's rule.
        dynamic_img_size: also take pictures of other sizes, multiples of the patch, each as a model of that size does:
            absolute positions are resampled by timm's rule, rotary ones made for the window. Constants of a size are
            made at its first pictures and kept for the last eight sizes. Compiled and exported programs take the
            model's own size alone.
        pretrained: for a timm name, load timm's weights.
        architecture: timm name of what a file holds, where its tensors do not tell number of heads, eps or activation.
        multi_label: an image has any number of labels, (B, K) of 0 and 1: the loss is binary cross-entropy, and scores
            are logits of probabilities that do not add up to 1.
        impl: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError: an argument outside its set, weights that do not fit, or a backbone that is not supported.
        FileNotFoundError: a path that does not exist.
        TypeError: a source that is neither a name, a path nor a module.

    Example:
        >>> model = PromptedViT("vit_tiny_patch16_224", num_classes=10, prompt_length=5, img_size=32)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    saved_as = "PromptedViT"
    replaced_patch: int | None
    keeps_unread_head = False

    def __init__(
        self,
        source: str | Path | VisionTransformer | Eva | LoadedViT,
        num_classes: int,
        *,
        prompt_length: int = 10,
        prompt_mode: PromptMode = "deep",
        prompt_dropout: float = 0.0,
        progressive_alpha: float | Sequence[float] = 0.01,
        prompt_gate: float | None = None,
        prompt_options: Mapping[str, Any] | None = None,
        readout: ViTReadout = "cls",
        train_lm_head: bool = False,
        verbalizer: VerbalizerName = "linear",
        prototype_dim: int | None = 128,
        token_activation: TokenActivation = "hidden",
        projection_bias: bool = False,
        temperature: float | None = None,
        img_size: int | tuple[int, int] | None = None,
        dynamic_img_size: bool = False,
        pretrained: bool = False,
        architecture: str | None = None,
        codebook: torch.Tensor | nn.Linear | str | Path | None = None,
        multi_label: bool = False,
        impl: Implementation = "auto",
    ) -> None:
        settings = ViTSettings.of(locals())
        super().__init__()
        if train_lm_head and token_activation == "hidden":
            raise ValueError("train_lm_head=True needs a token_activation that reads the classifier, got 'hidden'")
        if codebook is not None and token_activation == "hidden":
            raise ValueError("codebook needs a token_activation that reads it, logits or softmax, got 'hidden'")
        if codebook is None and token_activation != "hidden" and readout == "mask":
            raise ValueError(
                f"token_activation={token_activation!r} of a mask row needs codebook=, these weights have no head over "
                "visual tokens: or use 'hidden'"
            )
        self.config = {"num_classes": num_classes, **settings.config(), "codebook": None}
        self.num_classes = num_classes
        self.readout = readout
        self.impl = impl
        loaded = load_vit(source, img_size=img_size, pretrained=pretrained, architecture=architecture)
        self.source = None if isinstance(source, nn.Module | LoadedViT) else str(source)
        self.report = loaded.report
        backbone: Any = loaded.backbone
        self.backbone = backbone
        for block in backbone.blocks:
            if type(getattr(block, "attn", None)) is EvaAttention:
                block.attn.qkv_bias_separate = True  # qkv runs as the module it is: timm reads past it else
        self._check_readout(loaded)
        self.num_features = backbone.embed_dim
        self.num_patches = backbone.patch_embed.num_patches
        self.architecture = {
            "class": type(backbone).__name__,
            "img_size": list(backbone.patch_embed.img_size),
            "patch_size": list(backbone.patch_embed.patch_size),
            "embed_dim": backbone.embed_dim,
            "depth": len(backbone.blocks),
            "prefix_tokens": backbone.num_prefix_tokens,
        }
        self.default_cfg = dict(loaded.default_cfg)
        self.prompt_bias = None
        self.mask_token = None if loaded.mask_token is None else nn.Parameter(loaded.mask_token.detach().clone())
        self._take_window()
        self.lm_head = self._token_head(codebook, token_activation)
        backbone.reset_classifier(0)
        self.prompts = self._make_prompts()
        self._take_rows()
        self.verbalizer = self._make_verbalizer(num_classes)
        self._finish()

    def _check_readout(self, loaded: LoadedViT) -> None:
        """Refuse a row that the weights do not have."""
        backbone, readout = loaded.backbone, self.readout
        pools = isinstance(backbone.attn_pool, AttentionPoolLatent)
        if readout == "cls" and backbone.cls_token is None:
            instead = "map" if pools else "mean"
            raise ValueError(f"readout='cls' needs a class token, this backbone has none: use readout={instead!r}")
        if readout == "map" and not pools:
            found = type(backbone.attn_pool).__name__ if backbone.attn_pool is not None else "none"
            raise ValueError(
                f"readout='map' needs the attention pooling of its source, AttentionPoolLatent, this backbone has "
                f"{found}: use readout={'mean' if backbone.cls_token is None else 'cls'!r}"
            )
        if readout == "mask" and loaded.mask_token is None:
            raise ValueError(
                f"readout='mask' needs a mask token in the encoder, {loaded.report.source} has none: expected "
                "DINOv2's, DINOv3's or EVA-02's weights as their repository keeps them"
            )

    def _token_head(self, codebook: Any, token_activation: TokenActivation) -> nn.Linear | None:
        """What makes token logits of the read-out row: the codebook, else the source's classifier; None where the
        hidden state is read."""
        backbone = self.backbone
        if codebook is not None:
            head = load_codebook(codebook, backbone.embed_dim, backbone.patch_embed.proj.weight.dtype)
            self.config["codebook"] = list(head.weight.shape)
            return head
        if token_activation == "hidden":
            return None
        plain = type(backbone).forward_head in (VisionTransformer.forward_head, Eva.forward_head)
        if not isinstance(backbone.head, nn.Linear) or not plain:
            raise ValueError(
                f"token_activation={token_activation!r} reads the source's classifier, this backbone does not have "
                "exactly one: use 'hidden'"
            )
        return copy.deepcopy(backbone.head)  # of its own, as it may learn

    def _take_window(self) -> None:
        """What goes with the window of patches that the backbone has."""
        rows, columns = self.backbone.patch_embed.grid_size
        self.num_patches = self.backbone.patch_embed.num_patches
        self.replaced_patch = (rows // 2) * columns + columns // 2 if self.readout == "mask" else None

    def _take_rows(self) -> None:
        """The number of rows, with prompts among them."""
        self.num_rows = self.backbone.num_prefix_tokens + self.num_patches + self.prompts.length

    def _take_size(self, own: Any) -> None:
        super()._take_size(own)
        self._take_rows()

    def embed(self, images: Tensor, patch_embed: nn.Module | None = None) -> Tensor:
        """Rows `[class | registers | patches]` with positions, after `norm_pre`."""
        backbone = self.backbone
        patches = self._masked((patch_embed or backbone.patch_embed)(images))
        return backbone.norm_pre(self._eva_rows(patches) if isinstance(backbone, Eva) else backbone._pos_embed(patches))

    def _eva_rows(self, patches: Tensor) -> Tensor:
        """`Eva._pos_embed` without rotary positions, which it would compute at every call."""
        backbone = self.backbone
        if patches.ndim == 4:
            patches = patches.flatten(1, 2)
        position, every_row = backbone.pos_embed, not backbone.no_embed_class
        if position is not None and not every_row:
            patches = patches + position
        given = [one for one in (backbone.cls_token, backbone.reg_token) if one is not None]
        rows = torch.cat([*(one.expand(patches.shape[0], -1, -1) for one in given), patches], dim=1)
        return backbone.pos_drop(rows + position if position is not None and every_row else rows)

    def _masked(self, patches: Tensor) -> Tensor:
        """Patches (B, N, C), or (B, rows, columns, C), with the mask token in the place of one where it is read."""
        if self.mask_token is None or self.replaced_patch is None:
            return patches
        numbers = torch.arange(self.num_patches, device=patches.device).view(*patches.shape[1:-1], 1)
        return torch.where(numbers == self.replaced_patch, self.mask_token.view(-1).to(patches.dtype), patches)

    def loaded(self) -> LoadedViT:
        """What `vptm.weights.vits.load_vit` gave for this model, as it is now."""
        return LoadedViT(self.backbone, self.mask_token, True, self.report, self.default_cfg)

    def reference_embed(self, images: Tensor) -> Tensor:
        """The same rows by timm's code alone."""
        backbone = self.backbone
        rows = backbone._pos_embed(self._masked(backbone.patch_embed(images)))
        return backbone.norm_pre(rows[0] if isinstance(backbone, Eva) else rows)

    def rotary_embedding(self) -> Tensor | None:
        """Of timm's Eva."""
        return rotary_embedding(self.backbone)

    def reference_block(
        self,
        layer: int,
        rows: Tensor,
        attention: AttentionFunction,
        rotary: Tensor | None = None,
        keys_values: Tensor | None = None,
        crossing: Tensor | None = None,
    ) -> Tensor:
        """timm's own block, of whatever kind, which takes gates of prompts as its mask; `attention` is timm's choice,
        unless there are learned keys and values. With those, or a cross-attention, the block is written out."""
        block: Any = self.backbone.blocks[layer]
        own = None if rotary is None else self._rotary_of(layer, rows, rotary)
        mask = self._gate_mask(layer, rows, keys_values)
        more: dict[str, Any] = {} if own is None else {"rope": own}
        if keys_values is None and crossing is None:
            return block(rows, **more, **self._mask_for(block, layer, mask))
        self._refuse_other_blocks(block)
        if keys_values is not None:
            return pre_norm_block(block, rows, lambda x: attend_with(block.attn, x, attention, own, keys_values, mask))
        assert crossing is not None
        cross = partial(cross_attend, block.attn, prompts=crossing, attention=attention)
        return pre_norm_block(block, rows, lambda x: block.attn(x, **more), cross)

    def _mask_for(self, block: Any, layer: int, mask: Tensor | None) -> dict[str, Tensor]:
        """A mask (1, H, 1, T) of gates as keywords of a block of timm's; none where there is none."""
        if mask is None:
            return {}
        takes = signature(block.forward).parameters.values()
        if not any(one.name == "attn_mask" or one.kind is one.VAR_KEYWORD for one in takes):
            raise ValueError(
                f"prompt_gate needs blocks whose forward takes attn_mask, block {layer} is a "
                f"{type(block).__name__} with another"
            )
        differential = (part for part in block.modules() if type(part).__name__.startswith("Diff"))
        if not all(getattr(part, "fused_attn", True) for part in differential):
            mask = mask.repeat_interleave(2, dim=1)  # both softmaxes of a head stand side by side there
        return {"attn_mask": mask}

    def _gate_mask(self, layer: int, rows: Tensor, keys_values: Tensor | None) -> Tensor | None:
        """What gates of prompts add to the scores of block `layer` with all of its keys, (1, H, 1, keys), in the dtype
        of the rows; None where they add nothing."""
        columns = self.prompts.columns(layer)
        keys = rows.shape[1] + (0 if keys_values is None else keys_values.shape[-2])
        if columns is None or keys != self.num_rows:
            return None
        return with_columns(None, columns, 1, keys)[None].to(rows.dtype)

    def _rotary_of(self, layer: int, rows: Tensor, rotary: Tensor) -> Tensor:
        return of_block(rotary, layer, rows.shape[1] - self.backbone.num_prefix_tokens - self.num_patches)

    def attention_weights(self, layer: int, rows: Tensor, keys_values: Tensor | None = None) -> Tensor:
        """What each of the rows (B, T, C) that enter block `layer` attends to, (B, H, T, T), softmax over the last;
        with learned `keys_values` (B, H, T, T + P)."""
        block: Any = self.backbone.blocks[layer]
        attn: Any = getattr(block, "attn", None)
        if type(block) in (EvaBlock, EvaBlockPostNorm):
            rotary = self.rotary_embedding()
        elif type(block) in (Block, ResPostBlock) and type(attn) is Attention:
            rotary = None
        else:
            raise ValueError(f"attention maps need blocks of one Attention after another, got {type(block).__name__}")
        x = rows if type(block) in (ResPostBlock, EvaBlockPostNorm) else block.norm1(rows)
        query, key, value = heads_of(attn, x, None if rotary is None else self._rotary_of(layer, x, rotary))
        if keys_values is not None:
            key, _ = with_learned(key, value, keys_values)
        scores, mask = query * attn.scale @ key.mT, self._gate_mask(layer, rows, keys_values)
        return (scores if mask is None else scores + mask).softmax(dim=-1)

    @property
    def attention_pool(self) -> nn.Module | None:
        """The source's attention pooling, where it is read."""
        pool: nn.Module | None = self.backbone.attn_pool if self.readout == "map" else None
        return pool

    @property
    def pools_prompts(self) -> bool:
        """Whether the read-out averages prompt rows too."""
        return self.readout == "mean_with_prompts"

    def mean_rows(self) -> slice:
        """Rows that a mean read-out averages, or attention pools."""
        backbone = self.backbone
        if isinstance(backbone, Eva):  # whose attention pooling takes every row, and whose mean the patches
            with_prefix = self.readout == "map"
        else:
            with_prefix = backbone.pool_include_prefix and (backbone.attn_pool is None or self.readout == "map")
        prefix = 0 if with_prefix else backbone.num_prefix_tokens
        return slice(prefix, self.num_rows - (0 if self.pools_prompts else self.prompts.length))

    def _readout_row(self) -> int | None:
        if self.replaced_patch is not None:
            return int(self.backbone.num_prefix_tokens) + self.replaced_patch
        return 0 if self.readout == "cls" else None
