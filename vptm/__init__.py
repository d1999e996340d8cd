"""Visual prompt learning as masked visual token modelling.

Public names load on first use, so `import vptm` costs nothing until a model is built. Importing vptm after timm (or
touching `vptm.PromptedBEiT`) registers `vptm_beitv2_base_patch16_224` and its siblings with `timm.create_model`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vptm.version import __version__

_HOME = {
    "TaskBank": "serving.task_bank",
    "predict": "serving.predict",
    "PromptedBEiT": "models.prompted_beit",
    "PromptedViT": "models.prompted_vit",
    "check": "inspection.check",
    "load_backbone": "weights.beits",
    "weight_hash": "weights.files",
    "PrototypicalVerbalizer": "models.verbalizers",
    "LinearVerbalizer": "models.verbalizers",
    "PromptBank": "models.prompts",
    "save_adapter": "models.adapter_saving",
    "open_model": "models.opening",
    "load_adapter": "models.opening",
    "load_peft_prefix": "models.peft_prefix",
    "save_peft_prefix": "models.peft_prefix",
    "load_data": "data.sources",
    "few_shot": "data.division",
    "transforms": "data.transforms",
    "fit": "training.fit",
    "fit_prototypes": "methods.protoverb",
    "inspect_tokens": "inspection.explain",
    "evaluate": "training.evaluate",
    "init_prompts": "methods.spt",
    "init_vipamin": "methods.vipamin",
    "set_class_embeddings": "methods.provp",
}
__all__ = [
    "LinearVerbalizer",
    "PromptBank",
    "PromptedBEiT",
    "PromptedViT",
    "PrototypicalVerbalizer",
    "TaskBank",
    "__version__",
    "check",
    "evaluate",
    "few_shot",
    "fit",
    "fit_prototypes",
    "init_prompts",
    "init_vipamin",
    "inspect_tokens",
    "load_adapter",
    "load_backbone",
    "load_data",
    "load_peft_prefix",
    "open_model",
    "predict",
    "save_adapter",
    "save_peft_prefix",
    "set_class_embeddings",
    "transforms",
    "weight_hash",
]

if TYPE_CHECKING:
    from vptm.data.division import few_shot
    from vptm.data.sources import load_data
    from vptm.data.transforms import transforms
    from vptm.inspection.check import check
    from vptm.inspection.explain import inspect_tokens
    from vptm.methods.protoverb import fit_prototypes
    from vptm.methods.provp import set_class_embeddings
    from vptm.methods.spt import init_prompts
    from vptm.methods.vipamin import init_vipamin
    from vptm.models.adapter_saving import save_adapter
    from vptm.models.opening import load_adapter, open_model
    from vptm.models.peft_prefix import load_peft_prefix, save_peft_prefix
    from vptm.models.prompted_beit import PromptedBEiT
    from vptm.models.prompted_vit import PromptedViT
    from vptm.models.prompts import PromptBank
    from vptm.models.verbalizers import LinearVerbalizer, PrototypicalVerbalizer
    from vptm.serving.predict import predict
    from vptm.serving.task_bank import TaskBank
    from vptm.training.evaluate import evaluate
    from vptm.training.fit import fit
    from vptm.weights.beits import load_backbone
    from vptm.weights.files import weight_hash


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vptm' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if "timm" in sys.modules:  # timm is paid for already, so its registry can learn our names at once
    import_module(".models.prompted_beit", __name__)
