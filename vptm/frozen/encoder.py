"""The holder of what is derived from frozen weights: what may be kept between calls, and when it is made again.

A backbone that trains, or whose blocks are not plain pre-norm blocks of timm's BEiT or ViT, has no constants: it runs
through `vptm.frozen.reference` with fused attention instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vptm.frozen.fold import refuse_unread, unfoldable, unread
from vptm.frozen.folded import Folded, Sealed
from vptm.frozen.parts import learns
from vptm.frozen.rows import PromptedRows
from vptm.frozen.watch import Watch
from vptm_kernels._runtime.triton_support import choose

Made = TypeVar("Made")
_MOST_SIZES = 8


class _Made(NamedTuple):
    """What was derived from a backbone as `watch` saw it."""

    watch: Watch
    reason: str | None
    folded: dict[str, Folded]


class FrozenEncoder:
    """Holds what is derived from the frozen weights of a `PromptedRows`, and says how long it is true.

    - Constants of frozen weights are made at the first forward after construction, `to`, `load_state_dict`, `refresh`
      or `freeze_for_inference`, into one `Folded` for each type they are computed in (two under a change of autocast).
      A `Folded` never changes; threads that run at once share it.
    - Every forward looks whether the backbone is what it was: objects, in-place edits, modes, hooks, patched methods
      (`vptm.frozen.watch.Watch`). Where it is not, constants are made again.
    - Nothing learned is kept between calls, so every way of changing it is followed: fused optimisers, `.data` and
      aliases too. A model sealed by `freeze_for_inference` is the exception. Where no gradient is recorded and nothing
      traces, it keeps projected prompts and the folded head, made again after an edit that PyTorch counts, or by
      `load_learned_state_dict`. It refuses to run once a weight, part, mode or hook of its backbone is another.
    - What PyTorch does not count is not seen, and a compiled graph looks at nothing: docs/inference.md lists these
      edits of frozen weights, after which `model.refresh()` is to be called.

    With `prompted`, which gives what a model with prompts runs on, it runs the same model without prompts on that.

    The originals stay in `model.backbone`: `state_dict()` never sees a folded weight. Once sealed, they are gone, and
    what is here is all there is.
    """

    def __init__(self, prompted: Callable[[], Folded | None] | None = None) -> None:
        self._lock = threading.Lock()
        self._made: _Made | None = None
        self._keys: dict[tuple[str, torch.device, torch.dtype], tuple[str, torch.dtype, bool]] = {}
        self._seal: Folded | None = None
        self._seal_watch: Watch | None = None
        self._bare: Folded | None = None
        self._packs = False
        self._seal_backbone: Watch | None = None
        self._prompted = prompted
        self._without_prompts: tuple[Folded, Folded] | None = None
        self._sizes: dict[tuple[Any, int], tuple[Folded, Any]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in ("_seal", "_bare", "_packs", "_prompted")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__ |= state

    @property
    def sealed(self) -> bool:
        return self._seal is not None

    @property
    def follows_another(self) -> bool:
        """Whether it runs on the constants of the same model with prompts."""
        return self._prompted is not None

    @staticmethod
    def unsupported(model: PromptedRows) -> str | None:
        """What keeps a backbone from being folded, in words that fit after "got"; None where nothing does."""
        backbone = model.backbone
        if learns(backbone):
            return "a trainable one"
        if backbone.training:
            return "one in training mode"
        return model.unread_prompts() or unread(backbone) or next(filter(None, map(unfoldable, backbone.blocks)), None)

    @classmethod
    def supports(cls, model: PromptedRows) -> bool:
        """Whether the backbone is frozen, drops nothing at random, and is made of blocks that fold."""
        return cls.unsupported(model) is None

    def runs(self, model: PromptedRows) -> bool:
        """Whether `model` runs folded."""
        return self.folded(model) is not None

    def runs_eagerly(self, model: PromptedRows) -> bool:
        """`runs`, from inside a trace: constants are made now, of real weights."""
        return self._eagerly(model) is not None

    def constants(self) -> Iterator[Tensor]:
        """Every tensor derived from frozen weights."""
        for folded in [self._seal] if self._seal is not None else self._made.folded.values() if self._made else ():
            yield from folded.constants()

    def folded(self, model: PromptedRows) -> Folded | None:
        """What `model` runs on as its weights are now; None where its backbone does not fold."""
        if self._prompted is not None:
            return self._of_prompted(self._prompted())
        if self._seal is not None:
            return self._sealed(model)
        if torch.compiler.is_compiling():
            return self._traced(model)
        return self._eagerly(model)

    def _eagerly(self, model: PromptedRows) -> Folded | None:
        made = self._looked(model)
        if made.reason is not None or model.unread_prompts() is not None:
            return None
        key, dtype, triton = self._key(model)
        found = made.folded.get(key)
        if found is None:
            with self._lock:
                found = made.folded.get(key)
                if found is None:
                    with torch.inference_mode(False), torch.no_grad():
                        found = Folded(model, dtype, triton, key)
                    # under fake tensors nothing may be kept that another call would take for real
                    if all(type(tensor) in (Tensor, nn.Parameter) for tensor in found.constants()):
                        made.folded[key] = found
        return found

    def _key(self, model: PromptedRows) -> tuple[str, torch.dtype, bool]:
        """What constants are kept by, the type they have, and whether attention runs in Triton kernels."""
        weights = model.backbone.patch_embed.proj.weight
        device, dtype = weights.device, weights.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled(device.type):  # autocast leaves fp64 alone
            dtype = torch.get_autocast_dtype(device.type)
        known = self._keys.get((model.impl, device, dtype))
        if known is None:
            head_dim = model.num_features // model.backbone.blocks[0].attn.num_heads
            triton = choose(model.impl, weights.new_empty(0, dtype=dtype), head_dim) == "triton"
            known = f"{dtype} {device} {'triton' if triton else 'torch'}", dtype, triton
            # also in what a trace runs for real: found only after it, it would be a guard that an eager call breaks
            if not torch.compiler.is_dynamo_compiling():
                self._keys[model.impl, device, dtype] = known
        return known

    def _looked(self, model: PromptedRows) -> _Made:
        made = self._made
        if made is None or made.watch.changed():
            refuse_unread(model.backbone)
            with self._lock:
                made = self._made
                if made is None or made.watch.changed():
                    # a token head that learns is folded into nothing, and changes at every step
                    heads = [] if model.lm_head is None or learns(model.lm_head) else [model.lm_head]
                    modules = [module for part in (model.backbone, *heads) for module in part.modules()]
                    # the watch first: an edit between the two is then seen at the next call
                    mask = model.mask_token
                    frozen_mask = {} if mask is None or mask.requires_grad else {"mask_token": mask}
                    watch = Watch(modules, [model._buffers, model._modules, frozen_mask])
                    self._keys = {}  # another number of heads may take another implementation
                    self._made = made = _Made(watch, self.unsupported(model), {})
                    self._sizes.clear()
        return made

    def _traced(self, model: PromptedRows) -> Folded | None:
        if torch.compiler.is_dynamo_compiling():
            # made once and eagerly while the graph is traced, which then reads them from here at every call
            if not model.fold_while_tracing():
                return None
            assert self._made is not None
            return self._made.folded[self._key(model)[0]]
        # without dynamo parameters are stand-ins: constants are derived in the graph
        if not self.supports(model):
            return None
        key, dtype, triton = self._key(model)
        return Folded(model, dtype, triton, key)

    def _of_prompted(self, folded: Folded | None) -> Folded | None:
        if folded is None:
            return None
        known = self._without_prompts
        if known is None or known[0] is not folded:
            self._without_prompts = known = folded, folded.without_prompts()
            self._sizes.clear()
        return known[1]

    def _sealed(self, model: PromptedRows) -> Folded:
        assert self._seal is not None
        if not torch.compiler.is_compiling():
            # a frozen part that is asked for gradients gets none, which matters only where they are recorded
            self.refuse_changed(model, gradients=torch.is_grad_enabled())
        key, dtype, _ = self._key(model)
        if self._seal.key != key:
            raise RuntimeError(
                f"freeze_for_inference dropped the weights that {dtype} with impl={model.impl!r} needs: "
                "call it where the model will run"
            )
        bare = self._bare
        assert bare is not None
        # a graph looks at nothing, so what is learned is read in it; with gradients it may learn, training may draw it
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or model.prompts.training:
            return bare
        if self._seal_watch is None or self._seal_watch.changed():
            self.seal(model, self._seal)
        return self._seal

    def seal(self, model: PromptedRows, folded: Folded, *, pack: bool = False) -> None:
        """Be all there is of the frozen weights, and keep what is learned projected and folded as it is now; with
        `pack` weights as well as this processor reads them fastest, now and whenever it is made again."""
        learned = [*model.prompts.modules(), *model.verbalizer.modules()]
        learned += [] if model.lm_head is None else model.lm_head.modules()
        with self._lock:
            watch = Watch(learned, [model._modules])
            with torch.inference_mode(False), torch.no_grad():
                self._packs |= pack
                unsealed = folded.sealed(Sealed())
                seal = unsealed.packed(self._packs).sealed(unsealed.seal_of(model))
            self.look_at_sealed(model)
            self._seal, self._bare, self._seal_watch, self._made = seal, unsealed.packed(False), watch, None
            self._sizes.clear()

    def look_at_sealed(self, model: PromptedRows) -> None:
        """Take the frozen part of a sealed model, also of a copy, for what it is to stay, where that was not done."""
        if self._seal_backbone is None:
            self._seal_backbone = Watch(model.backbone.modules(), [model._buffers])

    def refuse_changed(self, model: PromptedRows, *, gradients: bool = True) -> None:
        """RuntimeError where the frozen part of a sealed model is not what it is to stay."""
        watch = self._seal_backbone
        assert watch is not None
        if watch.changed(gradients=gradients) or watch.root is not model.backbone or model.unread_prompts() is not None:
            raise RuntimeError(
                "a sealed model must stay as freeze_for_inference left it, got another weight, part, mode or hook"
            )

    def at_size(self, folded: Folded, size: tuple[int, int], make: Callable[[], Made]) -> Made:
        """What `make` makes of `folded` for pictures of `size`, kept for the last sizes while `folded` is true."""
        with self._lock:
            # the object itself is kept beside, so that its address is nobody else's
            known = self._sizes.pop((size, id(folded)), None)
            if known is None:
                with torch.inference_mode(False), torch.no_grad():
                    known = folded, make()
                while len(self._sizes) >= _MOST_SIZES:
                    del self._sizes[next(iter(self._sizes))]
            self._sizes[size, id(folded)] = known
        made: Made = known[1]
        return made

    def forget_learned(self) -> None:
        """Project and fold what is learned again, after an edit that PyTorch does not count."""
        self._seal_watch = None


class SizedEncoder(FrozenEncoder):
    """Of a model at another size than its own, for one call: runs on what `encoder`'s model made for that size.

    Args:
        folded: None where it runs its modules.
        encoder: of the model at its own size.
    """

    def __init__(self, folded: Folded | None, encoder: FrozenEncoder) -> None:
        super().__init__()
        self._given, self._own = folded, encoder

    @property
    def sealed(self) -> bool:
        return self._own.sealed

    def folded(self, model: PromptedRows) -> Folded | None:
        """What it was given."""
        return self._given
