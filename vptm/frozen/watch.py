"""How it is noticed that modules are no longer what constants were made of."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vptm.frozen.parts import KNOWN, MODELESS, is_tensor
from vptm.frozen.sharing import HOOKS

_version, _requires_grad = attrgetter("_version"), attrgetter("requires_grad")
_training = itemgetter("training")
_END = object()
# Plain attributes that enter what is folded or kept.
_WATCHED = (
    *("eps", "scale", "num_heads", "head_dim", "rotate_half", "gate_last", "num_prefix_tokens"),
    *("token_activation", "mode", "kind", "after", "blocks", "dropout"),
)


class Watch:
    """Notices that modules are no longer what they were when it was made: an object replaced, a tensor edited in place,
    moved, set or asked for gradients, a mode, a hook, a patched `forward`, an eps.

    `also` are further dictionaries of what a module holds. No value is looked at. What PyTorch does not count is not
    seen: edits through `.data` that keep the storage, through an alias that is no tensor (numpy, shared memory), or of
    tensors made under `inference_mode`.
    """

    def __init__(self, modules: Iterable[nn.Module], also: Iterable[dict[str, Any]] = ()) -> None:
        self._modules = list(modules)
        self.root = self._modules[0]
        self._contents: list[dict[str, Any]] = [
            content
            for module in self._modules
            for content in (module._parameters, module._buffers, module._modules)
            if content
        ]
        self._contents += also
        # holding every object keeps its address, as holding storages keeps theirs, from being given out again
        self._held = list(chain.from_iterable(map(dict.values, self._contents)))
        # a tensor may stand in place of a parameter as a plain attribute
        self._attributes = [
            (module.__dict__, name, value)
            for module in self._modules
            for name, value in module.__dict__.items()
            if isinstance(value, Tensor)
        ]
        self._scalars = [
            (module.__dict__, name) for module in self._modules for name in _WATCHED if name in module.__dict__
        ]
        self._moded = [module.__dict__ for module in self._modules if type(module) not in MODELESS]
        self._hooks = [getattr(module, hooks) for module in self._modules for hooks in HOOKS]
        self._dicts: list[dict[str, Any]] = [module.__dict__ for module in self._modules]
        self._kinds = list(KNOWN)
        self.tensors = [value for value in self._held if isinstance(value, Tensor)]
        self.tensors += [value for _, _, value in self._attributes]
        self._held.append(_END)
        self._addressed = [tensor for tensor in self.tensors if is_tensor(tensor) and not tensor.is_meta]
        self._storages = [tensor.untyped_storage() for tensor in self._addressed]
        self._counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self._registered = getattr(RemovableHandle, "next_id", None)
        self._hooked = list(map(len, self._hooks))
        self._any_hooked = any(self._hooked)
        self._seen = self._look()
        self._learned = list(map(_requires_grad, self.tensors))

    def _look(self) -> tuple[object, ...]:
        return (
            list(map(type, self._modules)),
            list(map(_version, self._counted)),
            list(map(Tensor.data_ptr, self._addressed)),
            list(map(_training, self._moded)),
            list(map(len, self._dicts)),  # a tensor in place of None
            ["forward" in attributes for attributes in self._dicts],
            [attributes.get(name) for attributes, name in self._scalars],
            [kind.forward for kind in self._kinds],
        )

    def _holds_the_same(self) -> bool:
        """Whether every object is where it was; with an end to both, one more or one less is another too."""
        present = chain(chain.from_iterable(map(dict.values, self._contents)), (_END,))
        return all(map(is_, present, self._held)) and all(
            attributes.get(name) is value for attributes, name, value in self._attributes
        )

    def changed(self, *, gradients: bool = True) -> bool:
        """Whether anything is another; without `gradients` tensors may have been asked for them."""
        if not self._holds_the_same() or self._look() != self._seen or self._hooks_changed():
            return True
        return gradients and list(map(_requires_grad, self.tensors)) != self._learned

    def _hooks_changed(self) -> bool:
        # every registration anywhere takes a number: without a new one nobody can have added a hook here
        registered = getattr(RemovableHandle, "next_id", None)
        if not self._any_hooked and registered is not None and registered == self._registered:
            return False
        if list(map(len, self._hooks)) != self._hooked:
            return True
        self._registered = registered
        return False
