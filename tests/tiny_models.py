"""Random prompted models of a few thousand weights, in float64, and what is measured on them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from beit_factory import randomize, tiny_beit
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

from vptm import PromptedBEiT, PromptedViT
from vptm.frozen.sharing import empty_containers

HEADS = 2
BACKBONES = {
    "shared bias": {},
    "per-block bias": {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True},
    "no LayerScale": {"init_values": None},
    "absolute positions": {"use_shared_rel_pos_bias": False, "use_abs_pos_emb": True},
    "norm after pooling": {"global_pool": "avg"},
    "SwiGLU": {"swiglu_mlp": True},
    "SwiGLU with a norm": {"swiglu_mlp": True, "scale_mlp": True},
}


def build(beit: Beit | None = None, *, seed: int = 1, **kwargs) -> PromptedBEiT:
    """A random prompted model in fp64; fresh mask token and head are expected, so their warning is silenced."""
    options = {"num_classes": 5, "prompt_length": 3, "prototype_dim": 6, "vocab_size": 11} | kwargs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PromptedBEiT(tiny_beit() if beit is None else beit, **options)
    backbone = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    randomize(model, seed)
    model.backbone.load_state_dict(backbone)
    return model.double().eval()


def images(model: PromptedBEiT, batch: int = 2) -> torch.Tensor:
    channels = model.backbone.patch_embed.proj.in_channels
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, channels, *model.backbone.patch_embed.img_size, generator=generator, dtype=torch.float64)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def copied(module: Any) -> Any:
    """`copy.deepcopy` in a third of its time."""
    return copy.deepcopy(module, empty_containers(module))


def assert_as_exact_as_the_reference(model: Any, batch: torch.Tensor, name: object = "") -> None:
    """Largest error of the read-out row against fp64 at most twice the reference's own in the model's dtype, plus one
    eps of the largest value; the model is left on the reference path."""
    oracle = copied(model).double()
    oracle.impl = "reference"
    with torch.no_grad():
        exact = oracle.forward_hidden(batch.double())
        error = (model.forward_hidden(batch).double() - exact).abs().max()
        model.impl = "reference"
        budget = (model.forward_hidden(batch).double() - exact).abs().max()
    assert error <= 2 * budget + torch.finfo(batch.dtype).eps * exact.abs().max(), name


def tiny_vit(window: tuple[int, int] = (2, 3), *, seed: int = 0, cls: type = VisionTransformer, **kwargs: Any) -> Any:
    """A random ViT of 3 blocks with 4x4 patches; every parameter is random."""
    options: dict[str, Any] = {"embed_dim": 16, "depth": 3, "num_heads": HEADS, "mlp_ratio": 2.0, "num_classes": 0}
    options |= kwargs
    vit = cls(img_size=(4 * window[0], 4 * window[1]), patch_size=4, **options)
    randomize(vit, seed)
    return vit.eval()


def build_vit(vit: Any = None, *, seed: int = 1, **kwargs: Any) -> PromptedViT:
    model = PromptedViT(tiny_vit() if vit is None else vit, **({"num_classes": 5, "prompt_length": 3} | kwargs))
    backbone = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    randomize(model, seed)
    model.backbone.load_state_dict(backbone)
    return model.double().eval()


def pictures(model: PromptedViT, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, *model.default_cfg["input_size"], generator=generator, dtype=torch.float64)


def assert_one_graph_and_bitwise_checkpoints(model: Any, learned: torch.Tensor) -> None:
    """One graph for every batch size, with the gradients of `learned`; recomputed blocks give bitwise the same ones."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)

    def gradient(run: Any, batch: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(run(batch).square().sum(), learned)[0]

    for batch_size in (5, 3):
        batch = images(model, batch_size)
        wanted = gradient(model, batch)
        assert relative_error(gradient(compiled, batch), wanted) <= 1e-10
    assert len(graphs) == 1
    batch = images(model, 3)
    plain = gradient(model, batch)
    model.set_grad_checkpointing()
    assert torch.equal(gradient(model, batch), plain)
