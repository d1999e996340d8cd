"""Patch embeddings as a matrix product, against the convolution they stand for."""

from __future__ import annotations

import pytest
import torch
from beit_factory import tiny_beit
from timm.layers import PatchEmbed
from tiny_models import build, images
from torch import nn

from vptm.frozen.patches import PatchProduct, with_patch_product


# square; rows and columns that differ; pixels that are no whole patch, which a convolution leaves out; one patch
@pytest.mark.parametrize("patch,side", [((4, 4), (12, 12)), ((2, 5), (8, 15)), ((4, 3), (14, 11)), ((6, 6), (6, 6))])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_convolution(patch: tuple[int, int], side: tuple[int, int], bias: bool) -> None:
    convolution = nn.Conv2d(3, 7, patch, patch, bias=bias, dtype=torch.float64)
    for pixels in (torch.randn(2, 3, *side, dtype=torch.float64), torch.randn(0, 3, *side, dtype=torch.float64)):
        for given in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(PatchProduct(convolution)(given), convolution(given), rtol=1e-12, atol=1e-12)


def test_a_patch_embedding_keeps_all_else() -> None:
    """Its checks of sizes, its norm and its order of rows; an edit of the weights in place is followed."""
    own = PatchEmbed(12, 4, 3, 8, norm_layer=nn.LayerNorm).double()
    twin = with_patch_product(own)
    assert twin is not None and type(own.proj) is nn.Conv2d
    batch = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(twin(batch), own(batch), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        own.proj.weight.mul_(2)
    torch.testing.assert_close(twin(batch), own(batch), rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError, match="doesn't match model"):
        twin(batch[:, :, :8])


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 3}],
    ids=lambda options: next(iter(options)),
)
def test_other_convolutions_stay(options: dict[str, int]) -> None:
    own = PatchEmbed(12, 4, 3, 9)
    own.proj = nn.Conv2d(3, 9, 4, **{"stride": 4, **options})
    assert with_patch_product(own) is None


def test_a_hooked_convolution_stays() -> None:
    """Its hook would never fire."""
    own = PatchEmbed(12, 4, 3, 9)
    own.proj.register_forward_hook(lambda module, given, out: out * 2)
    assert with_patch_product(own) is None


def test_models_on_a_gpu_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images through the product, with the same rows as through the convolution."""
    model = build(tiny_beit(dim=32), impl="triton")
    batch, taken = images(model), []
    forward = PatchProduct.forward
    monkeypatch.setattr(PatchProduct, "forward", lambda self, given: taken.append(1) or forward(self, given))
    with torch.no_grad():
        found = model.forward_hidden(batch)
        model.impl = "torch"
        torch.testing.assert_close(model.forward_hidden(batch), found, rtol=1e-9, atol=1e-9)
    assert len(taken) == 1, "once on the kernels' path, and a CPU has a fast convolution"
