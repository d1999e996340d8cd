"""Small random timm BEiTs for tests. Every parameter is random: the initial LayerScale (1e-5) and zero tables hide
mistakes."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Beit
from torch import nn


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fill every parameter in place with values large enough to change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.ndim >= 2 and "table" not in name and "token" not in name and "prompt" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.5 * noise)


def tiny_beit(
    window: tuple[int, int] = (2, 3), *, depth: int = 3, dim: int = 16, heads: int = 2, seed: int = 0, **kwargs: Any
) -> Beit:
    """A random BEiT with 4x4 patches of 3 channels; shared relative position bias and LayerScale unless told
    otherwise."""
    options: dict[str, Any] = {
        "init_values": 0.1,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
        "global_pool": "token",
        "mlp_ratio": 2.0,
    }
    options |= kwargs
    beit = Beit(
        img_size=(4 * window[0], 4 * window[1]),
        patch_size=4,
        num_classes=0,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        **options,
    )
    randomize(beit, seed)
    return beit.eval()
