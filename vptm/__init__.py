"""Visual prompt learning as masked visual token modelling.

Public names load on first use, so `import vptm` costs nothing until a model is built. Importing vptm after timm (or
touching `vptm.PromptedBEiT`) registers `vptm_beitv2_base_patch16_224` and its siblings with `timm.create_model`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "PromptedBEiT": "prompted_beit",
    "PromptedViT": "prompted_vit",
    "check": "equality",
    "load_backbone": "checkpoints",
    "weight_hash": "checkpoints",
    "PrototypicalVerbalizer": "verbalizers",
    "LinearVerbalizer": "verbalizers",
    "PromptBank": "prompts",
    "save_adapter": "adapters",
    "load_adapter": "adapters",
    "load_data": "data",
    "few_shot": "data",
    "transforms": "data",
    "fit": "training",
    "fit_prototypes": "verbalizers",
    "inspect_tokens": "explain",
    "evaluate": "training",
    "init_prompts": "prompt_init",
    "set_class_embeddings": "provp",
}
__all__ = [
    "LinearVerbalizer",
    "PromptBank",
    "PromptedBEiT",
    "PromptedViT",
    "PrototypicalVerbalizer",
    "__version__",
    "check",
    "evaluate",
    "few_shot",
    "fit",
    "fit_prototypes",
    "init_prompts",
    "inspect_tokens",
    "load_adapter",
    "load_backbone",
    "load_data",
    "save_adapter",
    "set_class_embeddings",
    "transforms",
    "weight_hash",
]

if TYPE_CHECKING:
    from .adapters import load_adapter, save_adapter
    from .checkpoints import load_backbone, weight_hash
    from .data import few_shot, load_data, transforms
    from .equality import check
    from .explain import inspect_tokens
    from .prompt_init import init_prompts
    from .prompted_beit import PromptedBEiT
    from .prompted_vit import PromptedViT
    from .prompts import PromptBank
    from .provp import set_class_embeddings
    from .training import evaluate, fit
    from .verbalizers import LinearVerbalizer, PrototypicalVerbalizer, fit_prototypes


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vptm' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if "timm" in sys.modules:  # timm is paid for already, so its registry can learn our names at once
    import_module(".prompted_beit", __name__)
