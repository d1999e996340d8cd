"""What every prompted model shares: which path it runs on, what is trained, and what leaves the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.nn import functional as F

from vptm.data.labels import check_labels, check_several
from vptm.frozen.encoder import FrozenEncoder, SizedEncoder
from vptm.frozen.fold import linears_of, refuse_unread
from vptm.frozen.folded import Folded, Start
from vptm.frozen.parts import learns, oddity, sdpa, softmax_attention
from vptm.frozen.reference import reference_features
from vptm.frozen.sharing import take_own_tensors, unshare_storage
from vptm.frozen.written_out import not_written_out
from vptm.messages import one_of
from vptm.models.adapter_hub import Pretrained
from vptm.models.config import LabelledOutput, ModelConfig
from vptm.models.intermediates import FORMATS, as_timm, chosen_blocks
from vptm.models.prompts import PromptBank
from vptm.models.sizes import Size, Sized, at_size, check_dynamic, size_of
from vptm.models.verbalizers import ClassEmbeddings, LinearVerbalizer, PrototypicalVerbalizer
from vptm.settings import PromptSettings, names

Verbalizer = PrototypicalVerbalizer | LinearVerbalizer | ClassEmbeddings


class PromptedModel(Pretrained):
    """A frozen transformer with learned prompts and a verbalizer; `PromptedBEiT` and `PromptedViT` say what rows it
    has.

    How rows stand is said in `vptm.frozen.rows.PromptedRows`, how long what is derived from weights holds in
    `vptm.frozen.encoder.FrozenEncoder`. A subclass builds `backbone`, `prompts` and `verbalizer`, calls `_finish`, and
    defines the methods that raise NotImplementedError in `PromptedRows`, and `_readout_row`.
    """

    prompts: PromptBank
    verbalizer: Verbalizer
    default_cfg: dict[str, Any]
    architecture: dict[str, Any]
    source: str | None
    num_classes: int
    readout: str

    @property
    def multi_label(self) -> bool:
        """Whether an image has any number of labels."""
        return bool(self.config["multi_label"])

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """`default_cfg`, where `timm.data.resolve_model_data_config` looks for it, with what else timm keeps there: the
        number of classes, and the names of the first and the last layer."""
        facts = {"num_classes": self.num_classes, "pool_size": None, "fixed_input_size": True}
        return self.default_cfg | facts | {"first_conv": "backbone.patch_embed.proj", "classifier": "verbalizer"}

    def _finish(self) -> None:
        """The end of every constructor: freeze, remember what was frozen, and be ready to run."""
        self.config = ModelConfig(self.config)
        self.class_names: list[str] | None = None
        self._frozen = True
        dtype = self.backbone.patch_embed.proj.weight.dtype
        if dtype != torch.float32:  # of a module that was passed in
            for name, child in self.named_children():
                if name != "backbone":
                    child.to(dtype)
            for parameter in self._parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.to(dtype)
        if self.config["dynamic_img_size"]:
            check_dynamic(self.backbone)
        self._encoder = FrozenEncoder()
        self.register_load_state_dict_pre_hook(_refuse_loading)
        self.register_load_state_dict_post_hook(_refresh_loaded)
        self._freeze()
        self.train(self.training)

    def _readout_row(self) -> int | None:
        """Row of `forward_features` that is read, None where rows are averaged or pooled by attention."""
        raise NotImplementedError

    def loaded(self) -> Any:
        """The frozen weights of this model, as a source of others that share them."""
        raise NotImplementedError

    def _refuse_other_blocks(self, block: Any) -> None:
        reason = not_written_out(block)
        if reason is not None:
            raise ValueError(f"prompts of kind {self.prompts.kind!r} need timm's plain pre-norm blocks, got {reason}")

    def unread_prompts(self) -> str | None:
        """What keeps prompts from being asked for their rows, in words; None where nothing does."""
        prompts = self.prompts
        if type(prompts) is not PromptBank:
            return f"prompts of {type(prompts).__name__}"
        odd = oddity(prompts)
        return None if odd is None else f"prompts with {odd}"

    def _make_prompts(self) -> PromptBank:
        """The prompts that `config` describes, for this backbone."""
        config, options = self.config, dict(self.config["prompt_options"] or {})
        for name in options:
            one_of("prompt_options", name, names(PromptSettings))
        if options.get("patch_values") is None:
            options["patch_values"] = self.backbone.patch_embed.proj.weight[0].numel()
        bank = PromptBank(
            len(self.backbone.blocks),
            config["prompt_length"],
            self.num_features,
            mode=config["prompt_mode"],
            dropout=config["prompt_dropout"],
            alpha=config["progressive_alpha"],
            heads=self._heads(),
            gate=config["prompt_gate"],
            **options,
        )
        rows, named = self.num_patches, "patches"
        if bank.added_to == "class_and_patches":
            rows, named = rows + int(self.backbone.num_prefix_tokens), "rows with those before the patches"
        if bank.placement == "add" and config["prompt_length"] not in (1, rows):
            raise ValueError(
                f"prompt_length must be 1 or the number of {named}, {rows}, for placement='add', "
                f"got {config['prompt_length']}"
            )
        last = len(self.backbone.blocks) - 1
        rows_to_read = bank.kind == "tokens" and bank.role(last) != "none"
        if self.pools_prompts and config["prompt_length"] and bank.placement == "prepend" and not rows_to_read:
            raise ValueError(f"readout={self.readout!r} needs prompt rows in the last block, prompt_options leave none")
        return bank

    def _heads(self) -> int | None:
        """Heads of a block's attention, None where no part of it says how many."""
        parts = self.backbone.blocks[0].modules()
        return next((part.num_heads for part in parts if isinstance(getattr(part, "num_heads", None), int)), None)

    def _make_verbalizer(self, num_classes: int) -> Verbalizer:
        activation = self.config["token_activation"]
        in_features = self.num_features if activation == "hidden" or self.lm_head is None else self.lm_head.out_features
        if self.config["verbalizer"] == "class_embeddings":
            dim, temperature = self.config["prototype_dim"], self.config["temperature"] or 0.01
            return ClassEmbeddings(in_features, num_classes, dim=dim, temperature=temperature)
        if self.config["verbalizer"] == "linear":
            return LinearVerbalizer(in_features, num_classes, token_activation=activation)
        return PrototypicalVerbalizer(
            in_features,
            num_classes,
            prototype_dim=self.config["prototype_dim"],
            token_activation=activation,
            projection_bias=self.config["projection_bias"],
            temperature=self.config["temperature"],
        )

    def _freeze(self) -> None:
        self.backbone.requires_grad_(False)
        if self.mask_token is not None:
            self.mask_token.requires_grad_(bool(self.config.get("train_mask_token")))
        if self.lm_head is not None:
            self.lm_head.requires_grad_(self.config["train_lm_head"])

    def train(self, mode: bool = True) -> PromptedModel:
        """Training mode for prompts and verbalizer; a frozen backbone stays in eval mode."""
        if mode:
            self._refuse_dropped("train()")
        self.training = mode
        for name, child in self.named_children():
            child.train(mode and not (self._frozen and name == "backbone"))
        return self

    def unfreeze(self) -> PromptedModel:
        """Make the backbone trainable too (full fine-tuning), and let it follow `train()`.

        A backbone that was passed in as a module is copied first: what trains is not the module that was passed.
        """
        self._refuse_dropped("unfreeze()")
        unshare_storage(self.backbone)
        self.refresh()
        self._frozen = False
        self.backbone.requires_grad_(True)
        return self.train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> PromptedModel:
        self._refuse_dropped("moving or casting the model")
        self.refresh()
        return super()._apply(fn, recurse)

    def refresh(self) -> None:
        """Derive the folded constants again at the next forward.

        Needed only after an edit of frozen weights that PyTorch does not count, and after any of a compiled model's:
        which these are is said in docs/inference.md.
        """
        self._refuse_dropped("refresh()")
        self._encoder = FrozenEncoder()

    @torch.compiler.assume_constant_result
    def fold_while_tracing(self) -> bool:
        """Whether this model runs folded, asked by a trace: constants are made at once, of real weights."""
        self._refuse_exporters()
        return self._encoder.runs_eagerly(self)

    def freeze_for_inference(self, keep_originals: bool = False) -> PromptedModel:
        """Fold the frozen weights now and, by default, drop the originals, which halves the memory the model holds.

        Until this is called every block has its weights twice: the originals in `backbone`, which `state_dict()` gives
        and training can unfreeze, and folded copies in the encoder, which run. Afterwards the block's linear
        weights in `backbone` are without values (on the meta device; a module that was passed in keeps its own): the
        model is for inference as it stands, on its device, in its dtype and with the parts, modes and hooks it has.
        Prompts are projected, and token head and projection multiplied, once, for calls that record no gradient. Where
        oneDNN is faster (float32 on AMD processors with AVX-512, bfloat16 on x86 processors that multiply it) such
        calls read weights in a layout of its own, held beside the folded ones: what the originals took is taken again,
        unless `torch.backends.mkldnn.enabled` is False.
        `state_dict`, `load_state_dict`, `train`, `unfreeze`, `refresh`, `.to` and the
        reference path then raise RuntimeError.
        `learned_state_dict`, `vptm.save_adapter` and `weight_hash` go on working. A pickle of such a model, as a
        spawned process gets it, holds the folded weights; nothing else writes them.

        Args:
            keep_originals: only fold now, before the first image; everything stays possible.

        Raises:
            ValueError: a trainable backbone, blocks that do not fold, or impl="reference".
            RuntimeError: of a model that `without_prompts` gave, whose weights are another model's.
            RuntimeError: from calls and copies of the model afterwards, where a weight, part, mode or hook of its
                backbone is not what it was.

        Example:
            >>> model = vptm.PromptedBEiT("builtin", num_classes=10).freeze_for_inference()
            >>> model(torch.zeros(2, 1, 28, 28)).shape
            torch.Size([2, 10])
        """
        folded = self.folded_constants()
        if folded is None:
            raise ValueError(f"freeze_for_inference needs a model that runs folded, got {self.why_unfolded()}")
        if self._encoder.sealed:
            if keep_originals:
                self._refuse_dropped("freeze_for_inference(keep_originals=True)")
            return self
        if self._encoder.follows_another and not keep_originals:
            raise RuntimeError("freeze_for_inference must be called on the model with prompts, whose weights these are")
        self.eval()
        if not keep_originals:
            self._sealed_hash = self.weight_hash()
            with torch.inference_mode(False), torch.no_grad():  # of inference tensors PyTorch counts no edits
                for block in self.backbone.blocks:
                    for linear in linears_of(block):
                        linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
                take_own_tensors(self.backbone)
            self._sealed_left = self._hash_left()
            self.backbone.register_load_state_dict_pre_hook(_refuse_dropped_weights)
            self._encoder.seal(self, folded, pack=True)
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self._encoder.sealed:
            self._encoder.refuse_changed(self)  # a copy would know nothing of it
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._encoder.sealed:
            self._encoder.look_at_sealed(self)

    def _twin(self, encoder: FrozenEncoder) -> PromptedModel:
        """A model of the same parts, with an encoder of its own."""
        twin = copy.copy(self)
        for kind in ("_modules", "_parameters", "_buffers"):
            twin.__dict__[kind] = dict(self.__dict__[kind])
        twin._encoder = encoder
        return twin

    def with_parts(self, **parts: Any) -> PromptedModel:
        """A model with `parts` in place of its own of those names, that shares every other; its encoder is its own."""
        twin = self._twin(FrozenEncoder())
        for name, part in parts.items():
            setattr(twin, name, part)
        return twin

    def without_prompts(self) -> PromptedModel:
        """The same model without its prompts, `prompt_length=0`: what a frozen backbone says by itself.

        It shares every weight that is left, and the encoder's folded constants of this model, which therefore has to
        stay, and stays in charge of them: call `to`, `unfreeze`, `refresh` and `freeze_for_inference` on this one, and
        make another twin after `to`. An edit of a weight is seen by both.

        Example:
            >>> model = vptm.PromptedBEiT("builtin", num_classes=10, prompt_mode="deep")
            >>> twin = model.without_prompts()
            >>> twin.prompts.length, twin(torch.zeros(2, 1, 28, 28)).shape
            (0, torch.Size([2, 10]))
        """
        twin = self._twin(FrozenEncoder(self.folded_constants))
        twin.config = self.config | {"prompt_length": 0, "prompt_mode": "shallow"}
        twin.config |= {"prompt_dropout": 0.0, "prompt_gate": None, "prompt_options": None}
        if twin.extra_bias == "learned":  # of prompts alone
            twin.extra_bias = twin.config["extra_bias"] = "zero"
        twin.prompt_bias = None
        twin.prompts = twin._make_prompts().to(self.prompts.weight)
        twin.num_rows = self.num_rows - self.prompts.length
        return twin

    def sealed_twin(self) -> PromptedModel:
        """This model as it is now, to predict with: the same parts, with prompts projected and the head folded once.

        The parts keep their mode: call `eval()` before. A model that does not run folded, or is sealed, is its own.
        """
        folded = None if self._encoder.sealed else self.folded_constants()
        if folded is None:
            return self
        twin = self._twin(FrozenEncoder())
        twin._encoder.seal(twin, folded)
        return twin

    def _refuse_dropped(self, action: str) -> None:
        encoder = self.__dict__.get("_encoder")
        if encoder is not None and encoder.sealed:
            raise RuntimeError(
                f"{action} needs the original weights, freeze_for_inference dropped them: "
                "load the model again, or call freeze_for_inference(keep_originals=True)"
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original, unfolded weights, bitwise, with what was learned."""
        self._refuse_dropped("state_dict()")
        return super().state_dict(*args, **kwargs)

    def of_size(self, images: Any) -> PromptedModel:
        """This model at the size of `images`, for one call: itself at its own size, and where it takes no other.

        Raises:
            ValueError: a size that it cannot take.
        """
        own = self.backbone.patch_embed
        if not self.config.get("dynamic_img_size") or not isinstance(images, Tensor) or images.ndim != 4:
            return self
        if tuple(images.shape[2:]) == tuple(own.img_size):
            return self
        size = size_of(images, own.patch_size)
        if torch.compiler.is_compiling() or is_tracing():
            raise ValueError(f"images in a compiled or exported program must be of {tuple(own.img_size)}, got {size}")
        if self.prompts.placement == "add" and self.config["prompt_length"] > 1:
            raise ValueError(
                f"images of another size need prompts that are added to all patches alike, "
                f"got {self.config['prompt_length']}"
            )
        folded = self.folded_constants()
        if folded is None:
            found = Sized(self._parts_at(size), None)
        else:
            given = folded

            def make() -> Sized:
                parts = self._parts_at(size)
                embed = None if given.patch_embed is None else at_size(given.patch_embed, size)
                return Sized(parts, given.at_size(self._with_size(parts, None), embed))

            found = self._encoder.at_size(folded, size, make)
        return self._with_size(found.parts, found.folded)

    def _with_size(self, parts: Mapping[str, Any], folded: Folded | None) -> PromptedModel:
        twin = self._twin(SizedEncoder(folded, self._encoder))
        for name, part in parts.items():
            setattr(twin, name, part)
        return twin

    def _parts_at(self, size: Size) -> dict[str, Any]:
        """The attributes of this model that are others at `size`."""
        twin = self._twin(FrozenEncoder())
        twin.backbone = at_size(self.backbone, size)
        twin._take_size(self)
        before = {**self.__dict__, **self._buffers, **self._modules}
        now = {**twin.__dict__, **twin._buffers, **twin._modules}
        kept = ("_encoder", "_modules", "_parameters", "_buffers")
        return {name: value for name, value in now.items() if name not in kept and value is not before.get(name)}

    def _take_window(self) -> None:
        """Take what goes with the window of patches that `backbone` has."""
        raise NotImplementedError

    def _take_size(self, own: Any) -> None:
        """Take what goes with the size that `backbone` has; `own` is the model at its own size."""
        self._take_window()

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError or TypeError unless `images` is (B, channels, height, width) floating point of this model's
        size, on its device and, outside autocast, in its dtype, and the model is on one device in one dtype."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        patch_embed = self.backbone.patch_embed
        weight, (height, width) = patch_embed.proj.weight, patch_embed.img_size
        channels = self.default_cfg["input_size"][0]
        if images.ndim != 4 or images.shape[1:] != (channels, height, width):
            raise ValueError(f"images must be (B, {channels}, {height}, {width}), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point, normalised as vptm.transforms does, got {images.dtype}")
        if images.device != weight.device:
            raise ValueError(f"images must be on the device of the model, {weight.device}, got {images.device}")
        autocast = torch.is_autocast_enabled(images.device.type)
        if images.dtype != weight.dtype and (not autocast or torch.float64 in (images.dtype, weight.dtype)):
            raise TypeError(f"images must have the dtype of the model, {weight.dtype}, got {images.dtype}")
        for name, part in (("prompts", self.prompts.weight), ("verbalizer", next(self.verbalizer.parameters(), None))):
            if part is None:
                continue
            if part.device != weight.device:
                raise ValueError(f"{name} must be on the device of the backbone, {weight.device}, got {part.device}")
            if part.dtype != weight.dtype and not autocast:
                raise TypeError(f"{name} must have the dtype of the backbone, {weight.dtype}, got {part.dtype}")

    def forward_features(self, images: Tensor) -> Tensor:
        """Rows `[prefix | patches | mask?]` after the backbone's final norm; prompts do not enter what is returned,
        unless the read-out averages them: then they are its last rows.

        Args:
            images: (B, channels, height, width), normalised.

        Returns:
            (B, prefix + N, C), and one more row at the end where a mask row is inserted. With `prompt_length=0` and the
            CLS or mean read-out this equals `backbone.forward_features`.
        """
        if (model := self.of_size(images)) is not self:
            return model.forward_features(images)
        self.check_images(images)
        folded = self.folded_constants()
        return self._plain_features(images) if folded is None else folded.features(self, images)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Patch rows after some blocks, as timm's `forward_intermediates` gives them, with prompts at work.

        Prompts are among the keys of every block and, as a mask row that is inserted, in none of what is returned but
        the features. Without prompts it equals timm's.

        Args:
            images: (B, channels, height, width), normalised.
            indices: blocks: all for None, the last n for a number, or each by its number, from the end where negative.
            return_prefix_tokens: each with the rows before the patches, (B, prefix, C), in a pair.
            norm: through the final norm.
            stop_early: run no block after the last that is asked for; the features are then those after it.
            output_fmt: "NCHW", (B, C, rows, columns), or "NLC", (B, N, C).
            intermediates_only: without the features.
            output_dict: "image_intermediates", "image_intermediates_prefix" and "image_features" in place of a tuple.

        Returns:
            (`forward_features(images)`, list in the order of the blocks), or as the arguments say.

        Raises:
            ValueError: an index or a format that there is not, or images of another size.

        Example:
            >>> model = vptm.PromptedBEiT("builtin", num_classes=3)
            >>> features, maps = model.forward_intermediates(torch.zeros(2, 1, 28, 28), indices=2)
            >>> features.shape, [one.shape for one in maps]
            (torch.Size([2, 18, 192]), [torch.Size([2, 192, 4, 4]), torch.Size([2, 192, 4, 4])])
        """
        one_of("output_fmt", output_fmt, FORMATS)
        if (model := self.of_size(images)) is not self:
            return model.forward_intermediates(
                images,
                indices,
                return_prefix_tokens=return_prefix_tokens,
                norm=norm,
                stop_early=stop_early,
                output_fmt=output_fmt,
                intermediates_only=intermediates_only,
                output_dict=output_dict,
            )
        self.check_images(images)
        depth, final = len(self.backbone.blocks), self.backbone.norm
        chosen = chosen_blocks(indices, depth)
        tokens = self.num_rows - self.prompts.length
        folded = self.folded_constants()
        features: Tensor | None = None
        if folded is not None:
            rows, kept = folded.intermediates(self, images, chosen, chosen[-1] + 1 if stop_early else depth)
            features = None if stop_early or intermediates_only else final(rows)
        else:
            kept = {}

            def observe(layer: int, _: Tensor, rows: Tensor, __: Tensor | None) -> None:
                if layer in chosen:
                    kept[layer] = rows[:, :tokens]

            features = self._plain_features(images, observe)
        if intermediates_only:
            features = None
        elif stop_early and chosen[-1] + 1 < depth:
            features = final(kept[chosen[-1]])
        elif features is None:
            features = final(rows)
        return as_timm(
            {layer: final(one) for layer, one in kept.items()} if norm else kept,
            features,
            prefix=self.backbone.num_prefix_tokens,
            grid=tuple(self.backbone.patch_embed.grid_size),
            output_fmt=output_fmt,
            return_prefix_tokens=return_prefix_tokens,
            output_dict=output_dict,
        )

    def attention_maps(self, images: Tensor, indices: int | Sequence[int] | None = None) -> list[Tensor]:
        """What every row attends to in some blocks, by the reference path, the only one that stores it.

        Args:
            images: (B, channels, height, width), normalised.
            indices: blocks, as in `forward_intermediates`.

        Returns:
            For each block (B, H, T, T + P): rows `[prefix | patches | mask?]` over the same and, last, the prompts of
            that block; the last dimension sums to 1. It has a gradient.

        Raises:
            ValueError: an index that there is not, images of another size, or blocks without one plain attention.
            RuntimeError: after `freeze_for_inference` dropped the weights.

        Example:
            >>> model = vptm.PromptedBEiT("builtin", num_classes=3, prompt_length=10)
            >>> [one.shape for one in model.attention_maps(torch.zeros(2, 1, 28, 28), indices=[-1])]
            [torch.Size([2, 6, 18, 28])]
        """
        if (model := self.of_size(images)) is not self:
            return model.attention_maps(images, indices)
        self.check_images(images)
        self._refuse_dropped("attention_maps()")
        refuse_unread(self.backbone)
        chosen = chosen_blocks(indices, len(self.backbone.blocks))
        tokens = self.num_rows - self.prompts.length
        kept: list[Tensor] = []

        def observe(layer: int, rows: Tensor, _: Tensor, keys_values: Tensor | None) -> None:
            if layer in chosen:
                kept.append(self.attention_weights(layer, rows, keys_values)[:, :, :tokens])

        reference_features(self, images, softmax_attention, observe)
        return kept

    def folded_constants(self) -> Folded | None:
        """The folded constants this model runs on now, None where it runs its modules.

        Raises:
            RuntimeError: inside `torch.jit.trace` and `torch.onnx.export`, which know no op of vptm's.
        """
        if self.impl == "reference":
            return None
        # what dynamo traces asks through fold_while_tracing
        if is_tracing() or (torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()):
            self._refuse_exporters()
        return self._encoder.folded(self)

    def _plain_features(
        self, images: Tensor, observe: Callable[[int, Tensor, Tensor, Tensor | None], None] | None = None
    ) -> Tensor:
        self._refuse_dropped("the reference path")
        refuse_unread(self.backbone)
        if self.impl == "triton":
            raise ValueError(
                "impl='triton' needs a frozen backbone of plain pre-norm blocks with a two-layer or gated MLP, "
                f"got {self.why_unfolded()}"
            )
        if learns(self.backbone):
            unshare_storage(self.backbone)
        attention = softmax_attention if self.impl == "reference" else sdpa
        return reference_features(self, images, attention, observe)

    def _refuse_exporters(self) -> None:
        """Those that would record ops of vptm's and not know how to write them."""
        if is_tracing() or torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                f"torch.jit.trace and torch.onnx.export need impl='reference', got impl={self.impl!r}: or write the "
                "model with `vptm export RUN --to pt2` (or aoti, onnx), or with vptm.export.formats.export"
            )

    def why_unfolded(self) -> str:
        """What keeps this model from the folded path, in words."""
        return FrozenEncoder.unsupported(self) or f"impl={self.impl!r}"

    @contextmanager
    def listening_to_blocks(self, listener: Callable[[], None]) -> Iterator[None]:
        """Inside, `listener()` is called before and after every block that this model runs, on every path."""
        self.block_listener = listener
        try:
            yield
        finally:
            self.block_listener = None

    def forward_hidden(self, images: Tensor) -> Tensor:
        """The normalised read-out row (B, C), at the model's own size equal to
        `forward_head(forward_features(images), pre_logits=True)`."""
        if (model := self.of_size(images)) is not self:
            return model.forward_hidden(images)
        self.check_images(images)
        return self.hidden_on(images, self.folded_constants())

    def hidden_on(self, images: Tensor, folded: Folded | None, start: Start | None = None) -> Tensor:
        """`forward_hidden` of images that were checked, on constants of this backbone that may be another model's.

        Args:
            folded: what `folded_constants` gives, or what was made from it.
            start: rows that enter block 0, where they were computed before.
        """
        if folded is None:
            return self.forward_head(self._plain_features(images), pre_logits=True)
        row = self._readout_row()
        pooled = folded.mean(self, images, start) if row is None else folded.row(self, images, row, start)
        return self.backbone.fc_norm(pooled)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Class scores (B, K) from `forward_features`; with `pre_logits` the normalised read-out row (B, C).

        Weights that were trained with mean pooling keep their norm after the pooling (`fc_norm`); it is then used on
        the row that is read, whichever it is.

        Raises:
            ValueError: features of another number of rows, as those of pictures of another size than the model's are,
                whose window no row tells: `forward_hidden` and the model itself take such pictures.
        """
        row = self._readout_row()
        rows = self.num_rows - (0 if self.pools_prompts else self.prompts.length)
        if row != 0 and features.shape[1] != rows:
            raise ValueError(
                f"features must have the {rows} rows that readout={self.readout!r} has at the model's own size, "
                f"got {features.shape[1]}: forward_hidden takes pictures of other sizes"
            )
        if row is not None:
            pooled = features[:, row]
        else:
            averaged, pool = features[:, self.mean_rows()], self.attention_pool
            pooled = averaged.mean(dim=1) if pool is None else pool(averaged)
        hidden = self.backbone.fc_norm(pooled)
        return hidden if pre_logits else self.forward_scores(hidden)

    def forward(
        self, images: Tensor | None = None, pixel_values: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        """Class scores (B, K), cosine / temperature with the prototypical verbalizer, of normalised images.

        Args:
            images: (B, channels, H, W).
            pixel_values: the same under the name that `transformers` has for it; one of both is given.
            labels: (B,) integers in 0..K-1, or (B, K) shares; (B, K) of 0 and 1 for a multi-label model.

        Returns:
            The scores; with `labels` a `LabelledOutput` (loss, logits), the loss being
            `F.cross_entropy(scores.float(), labels)`, or `F.binary_cross_entropy_with_logits` of a multi-label model.

        Example:
            >>> model = vptm.PromptedBEiT("builtin", num_classes=3)
            >>> images = torch.zeros(2, 1, 28, 28)
            >>> model(images).shape, model(pixel_values=images, labels=torch.tensor([0, 2])).loss.shape
            (torch.Size([2, 3]), torch.Size([]))
        """
        if (images is None) == (pixel_values is None):
            raise TypeError(f"one of images and pixel_values must be given, got {'none' if images is None else 'both'}")
        pixels: Tensor = pixel_values if images is None else images  # type: ignore[assignment]
        if (model := self.of_size(pixels)) is not self:
            return model.forward(pixels, labels=labels)
        self.check_images(pixels)
        folded = self.folded_constants()
        scores = self.forward_scores(self.hidden_on(pixels, folded), folded)
        return scores if labels is None else LabelledOutput(self._loss(scores, labels), scores)

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        looks = labels.device.type == "cpu" and not torch.compiler.is_compiling()  # looking stalls a GPU
        if self.multi_label:
            if looks or labels.shape != scores.shape:
                check_several(labels, scores.shape[1])
            return F.binary_cross_entropy_with_logits(scores.float(), labels.float())
        shares = labels.is_floating_point()
        if labels.shape != (scores.shape if shares else scores.shape[:1]) or labels.dtype == torch.bool:
            raise ValueError(
                f"labels must be ({len(scores)},) integers or {tuple(scores.shape)} shares, "
                f"got {tuple(labels.shape)} of {labels.dtype}"
            )
        if looks and not shares:
            check_labels(labels, scores.shape[1])
        return F.cross_entropy(scores.float(), labels.float() if shares else labels.long())

    def forward_scores(self, hidden: Tensor, folded: Folded | None = None) -> Tensor:
        """Class scores (B, K) of read-out rows (B, C), with the token head of `folded` where there is one."""
        if not isinstance(self.verbalizer, PrototypicalVerbalizer):
            return self.verbalizer(hidden, self.lm_head)
        if folded is None:
            return self.verbalizer(hidden, self.lm_head, self.impl)
        return self.verbalizer(hidden, self.lm_head, self.impl, folded.token_head, folded.learned.head)

    def get_classifier(self) -> nn.Module:
        """The verbalizer."""
        return self.verbalizer

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the verbalizer by a fresh one for `num_classes`; the read-out is a constructor argument and stays."""
        if global_pool is not None:
            raise ValueError(
                "global_pool must be None, the read-out is fixed at construction "
                f"(readout={self.readout!r}), got {global_pool!r}"
            )
        reference = self.prompts.weight
        self.verbalizer = self._make_verbalizer(num_classes).to(device=reference.device, dtype=reference.dtype)
        self.num_classes = self.config["num_classes"] = num_classes
        self.class_names = None

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of every block for backward and compute the rest again there (timm's name).

        Outputs and gradients are bitwise the same; a training step takes about a third longer.
        """
        self.grad_checkpointing = enable


# functions and not lambdas: a model can be pickled, to be spawned with a process
def _refresh_loaded(module: Any, *_: Any) -> None:
    module.refresh()


def _refuse_dropped_weights(*_: Any) -> None:
    raise RuntimeError("load_state_dict() needs the original weights, freeze_for_inference dropped them")


def _refuse_loading(module: Any, *_: Any) -> None:
    module._refuse_dropped("load_state_dict()")
