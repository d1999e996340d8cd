"""Prompts started from tokens: they are the tokens, the draw is the published one, and only the images drawn are
run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from beit_factory import randomize, tiny_beit
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

import vptm
from vptm.methods.spt import INIT_METHODS, pooling_windows

DEPTH = 3


class Images(Dataset[tuple[Tensor, int]]):
    """Random pictures that count how often each is read; with `noise` every read is augmented afresh."""

    def __init__(self, count: int, size: tuple[int, int] = (8, 12), noise: float = 0.0) -> None:
        self.images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.noise = noise
        self.read: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read[index] += 1
        image = self.images[index]
        return image + self.noise * torch.randn_like(image), index % 2


def build(length: int = 4, mode: str = "deep", **backbone: object) -> vptm.PromptedBEiT:
    options: dict[str, object] = {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True, "depth": DEPTH} | backbone
    model = vptm.PromptedBEiT(
        tiny_beit(**options),  # type: ignore[arg-type]
        num_classes=2,
        prompt_length=length,
        prompt_mode=mode,
        readout="cls",
        token_activation="hidden",
    )
    return model.double()


def fed_tokens(model: vptm.PromptedBEiT, images: Tensor) -> list[Tensor]:
    """Per block the patch rows it is fed, (S, N, C), read by hooks from timm's own forward pass; block 0's come
    straight from the projection."""
    caught: list[Tensor] = []
    blocks = model.backbone.blocks
    hooks = [
        block.register_forward_pre_hook(lambda module, given: caught.append(given[0][:, 1:])) for block in blocks[1:]
    ]
    with torch.no_grad():
        model.backbone.forward_features(images)
        first = model.backbone.patch_embed.proj(images).flatten(2).mT
    for hook in hooks:
        hook.remove()
    return [first, *caught]


def rows_of(found: Tensor, among: Tensor) -> list[int]:
    """Which row of `among` each row of `found` is; fails where one is none of them."""
    distance = (found.detach()[:, None] - among).abs().amax(dim=-1)
    assert bool((distance.amin(dim=1) < 1e-12).all())
    return distance.argmin(dim=1).tolist()


@pytest.mark.parametrize("mode", ["deep", "shallow", "progressive"])
def test_random_rows_are_rows_of_the_hooked_tensors(mode: str) -> None:
    """Layer 0 holds patch projections without position embeddings, layer l the inputs of block l; of one image, no
    token twice."""
    model, data = build(5, mode), Images(7)
    fed = fed_tokens(model, data.images)
    assert len(model.prompts.weight) == (1 if mode == "shallow" else DEPTH)
    for images, distinct in ((None, 2), (1, 5)):
        vptm.init_prompts(model, DataLoader(data), images=images, progress=False)
        for prompts, tokens in zip(model.prompts.weight, fed):
            assert len(set(rows_of(prompts, tokens.flatten(0, 1)))) >= distinct
    with pytest.raises(AssertionError):
        rows_of(model.prompts.weight[0], (fed[0] + model.backbone.pos_embed[:, 1:]).flatten(0, 1))


@pytest.mark.parametrize("method", ["random", "mean", "max"])
def test_index_first_equals_reducing_every_image(method: str) -> None:
    """The published order, all tokens of all drawn images first and the draw after, gives the same prompts bitwise."""
    length, count = 4, 9
    model, data = build(length), Images(count)
    vptm.init_prompts(model, DataLoader(data), method, seed=5, progress=False)
    draw = np.random.default_rng(5)
    images = data.images[draw.integers(count, size=count)]
    for prompts, tokens in zip(model.prompts.weight, fed_tokens(model, images)):
        if method != "random":
            # 6 tokens in 4 slots leave no remainder for a last window of 2: divided evenly
            pool = {"mean": torch.mean, "max": torch.amax}[method]
            tokens = torch.stack([pool(tokens[:, start:stop], dim=1) for start, stop in _even(6, 4)], dim=1)
        pool_of_rows = tokens.flatten(0, 1)
        expected = pool_of_rows[draw.choice(len(pool_of_rows), length, replace=False)]
        assert torch.allclose(prompts, expected, atol=1e-12, rtol=0)


def _even(tokens: int, slots: int) -> list[tuple[int, int]]:
    return [(tokens * slot // slots, tokens * (slot + 1) // slots) for slot in range(slots)]


def test_every_token_is_equally_likely() -> None:
    """The draw is uniform over (image, token): a slice always taken from the front, or distinct images only, fails."""
    model, data = build(2, depth=1), Images(3)
    tokens = fed_tokens(model, data.images)[0].flatten(0, 1)
    hits: Counter[int] = Counter()
    for seed in range(300):
        vptm.init_prompts(model, DataLoader(data), seed=seed, progress=False)
        hits.update(rows_of(model.prompts.weight[0], tokens))
    assert chisquare([hits[row] for row in range(len(tokens))]).pvalue > 1e-4


@pytest.mark.parametrize("method", ["random", "mean", "max"])
def test_forwards_at_most_layers_times_prompts_images(method: str) -> None:
    """6000 images of 6 tokens, 12 layers, 20 prompts: at most 240 are read, however many there are to draw from."""
    model, data = build(20 if method == "random" else 6, depth=12, dim=4, heads=1), Images(6000)
    forwarded = vptm.init_prompts(model, DataLoader(data), method, progress=False)
    assert forwarded == sum(data.read.values()) <= 12 * model.prompts.length
    assert forwarded > 6 * model.prompts.length


def test_published_windows_of_224_pixels() -> None:
    """196 tokens: windows of 10 and a last one of 6 for 20 prompts; where the released code pools all tokens or drops
    some, every token is in one window."""
    sizes = {slots: [w.stop - w.start for w in pooling_windows(196, slots)] for slots in (1, 5, 10, 20, 30, 50, 100)}
    assert sizes[20] == [10] * 19 + [6]
    assert sizes[10] == [21] * 9 + [7]
    assert sizes[1] == [196]
    assert set(sizes[5]) == {39, 40} and set(sizes[30]) == {6, 7} and set(sizes[100]) == {1, 2}


@given(st.integers(1, 300), st.integers(1, 400))
def test_windows_cover_every_token_once(tokens: int, slots: int) -> None:
    """Whatever the two numbers are, also more slots than tokens, no window is empty and none overlaps another."""
    windows = pooling_windows(tokens, slots)
    assert len(windows) == min(slots, tokens)
    assert [token for window in windows for token in range(tokens)[window]] == list(range(tokens))


@pytest.mark.parametrize("method", INIT_METHODS)
def test_same_seed_same_prompts(method: str) -> None:
    """Augmentation, draws and clusters follow the seed alone, and the caller's generators are left as they were."""
    model, data = build(4), Images(12, noise=0.5)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(found))
        before = torch.get_rng_state()
        vptm.init_prompts(model.train(), DataLoader(data, shuffle=True), method, seed=seed, progress=False)
        assert torch.equal(torch.get_rng_state(), before) and model.training and not model.backbone.training
        found.append(model.prompts.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_kmeans_finds_the_clusters_of_every_layer() -> None:
    """Pictures of three flat colours have few distinct tokens a layer: each centre is near one, and each is found."""
    data = Images(24)
    data.images = (
        torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64).repeat(8)[:, None, None, None].expand(24, 3, 8, 12)
    )
    model = build(3, use_shared_rel_pos_bias=False, use_abs_pos_emb=False)
    assert vptm.init_prompts(model, DataLoader(data), "kmeans", progress=False) == 24
    for prompts, tokens in zip(model.prompts.weight, fed_tokens(model, data.images)):
        centres = tokens[:3].mean(dim=1)
        assert torch.cdist(centres, prompts).amin(dim=1).max() < 1e-4 * centres.abs().max()


def test_kmeans_learns_from_the_whole_stream() -> None:
    """A kind of picture that the first batch lacks gets a centre too; those of the first batch alone would miss it."""
    data, seed = Images(64), 0
    drawn = np.random.default_rng(seed).permutation(64)
    flat = torch.tensor([-2.0, 0.0], dtype=torch.float64).repeat(32)
    flat[drawn[32:]] = 6.0
    data.images = flat[:, None, None, None].expand(64, 3, 8, 12)
    model = build(3, use_shared_rel_pos_bias=False, use_abs_pos_emb=False)
    vptm.init_prompts(model, DataLoader(data), "kmeans", seed=seed, progress=False)
    kinds = torch.stack([data.images[flat == value][0] for value in (-2.0, 0.0, 6.0)])
    for prompts, tokens in zip(model.prompts.weight, fed_tokens(model, kinds)):
        seen, late = tokens[:2].mean(dim=1), tokens[2:].mean(dim=1)
        assert torch.cdist(late, prompts).min() < 0.5 * torch.cdist(late, seen).min()


def test_kmeans_centres_fit_the_tokens_better_than_random_ones() -> None:
    """Over a stream of several batches the centres leave less distance to the tokens than random tokens do."""
    model, data = build(4), Images(70)
    inertia = {}
    for method in ("kmeans", "random"):
        vptm.init_prompts(model, DataLoader(data), method, progress=False)
        fed = fed_tokens(model, data.images)
        inertia[method] = [
            float(torch.cdist(tokens.flatten(0, 1), prompts.detach()).amin(dim=1).square().mean())
            for prompts, tokens in zip(model.prompts.weight, fed)
        ]
    assert all(a < b for a, b in zip(inertia["kmeans"], inertia["random"]))


def test_training_starts_from_the_tokens() -> None:
    """The encoder sees the new prompts at once: a prefix cached from the old ones would give the old scores."""
    model, data = build(4), Images(6)
    model.eval()
    with torch.no_grad():
        before = model(data.images)
        vptm.init_prompts(model, DataLoader(data), progress=False)
        after = model(data.images)
        model.impl = "reference"
        assert torch.allclose(after, model(data.images), atol=1e-10)
    assert not torch.allclose(before, after, atol=1e-3)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> object:  # type: ignore[override]
        raise AssertionError("must not be read")


def test_bad_input_is_refused_before_the_prompts_change() -> None:
    """Each refusal names the argument and what it was; the prompts stay as they were."""
    model, data = build(20), Images(3)
    before = model.prompts.weight.detach().clone()
    with pytest.raises(ValueError, match=r"20 prompts for 18 tokens of 3 images"):
        vptm.init_prompts(model, DataLoader(data), progress=False)
    with pytest.raises(ValueError, match=r"20 prompts for 6 tokens of 1 images"):
        vptm.init_prompts(model, DataLoader(data), images=1, progress=False)
    with pytest.raises(ValueError, match=r"did you mean 'kmeans'"):
        vptm.init_prompts(model, DataLoader(data), "k-means", progress=False)
    with pytest.raises(ValueError, match=r"images must be an integer >= 1"):
        vptm.init_prompts(model, DataLoader(data), images=0, progress=False)
    with pytest.raises(ValueError, match=r"at least one image"):
        vptm.init_prompts(model, DataLoader(Images(0)), progress=False)
    with pytest.raises(TypeError, match=r"can be indexed"):
        vptm.init_prompts(model, DataLoader(Stream()), progress=False)
    with pytest.raises(ValueError, match=r"got 0 prompts"):
        vptm.init_prompts(build(0), DataLoader(data), progress=False)
    with pytest.raises(ValueError, match=r"got 4 projected prompts, of 16 values for tokens of 16"):
        # as wide as tokens: tokens put before a random projection would be none behind it
        projected = vptm.PromptedBEiT(
            tiny_beit(), 2, prompt_length=4, prompt_options={"prompt_dim": 16}, readout="cls", token_activation="hidden"
        )
        vptm.init_prompts(projected.double(), DataLoader(data), progress=False)
    with pytest.raises(ValueError, match=r"seed must be an integer >= 0, got -1"):
        vptm.init_prompts(model, DataLoader(data), seed=-1, progress=False)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 12\), got \(8, 3, 8, 8\)"):
        vptm.init_prompts(model, DataLoader(Images(64, size=(8, 8))), progress=False)
    with pytest.raises(TypeError, match=r"loader must give \(images, labels\), got Tensor"):
        vptm.init_prompts(model, DataLoader(Images(64).images), progress=False)  # type: ignore[arg-type]
    data = Images(8)
    data.images[:, 0, 0, 0] = torch.nan
    for method in INIT_METHODS:
        with pytest.raises(ValueError, match=r"tokens must be finite"):
            vptm.init_prompts(model, DataLoader(data), method, progress=False)
    assert torch.equal(model.prompts.weight, before)


def test_a_loader_without_batches_gives_the_same_prompts() -> None:
    """Its batch size is not used, so None may not matter either."""
    found = []
    for batch_size in (4, None):
        model = build(4)
        vptm.init_prompts(model, DataLoader(Images(9), batch_size=batch_size), progress=False)
        found.append(model.prompts.weight.detach())
    assert torch.equal(*found)


def test_a_model_without_its_weights_is_refused() -> None:
    """Tokens of later blocks would be computed from weights that are gone."""
    model = build(4).freeze_for_inference()
    before = model.prompts.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"init_prompts needs the original weights"):
        vptm.init_prompts(model, DataLoader(Images(9)), progress=False)
    assert torch.equal(model.prompts.weight, before)


def test_vision_transformers_give_their_patch_tokens() -> None:
    """The same on a timm VisionTransformer, of fixed and of dynamic size, and on an Eva with rotary positions:
    registers and class token excluded, no position embedding and no norm before the blocks in layer 0."""
    sizes: dict[str, Any] = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 16, "depth": DEPTH, "num_heads": 2}
    for vit in (
        VisionTransformer(**sizes, reg_tokens=2, pre_norm=True),
        VisionTransformer(**sizes, reg_tokens=2, dynamic_img_size=True),
        Eva(**sizes, num_reg_tokens=2, use_rot_pos_emb=True, rope_type="dinov3", dynamic_img_size=True),
    ):
        randomize(vit, 3)
        model = vptm.PromptedViT(vit, 2, prompt_length=5).double()
        data = Images(7)
        vptm.init_prompts(model, DataLoader(data), progress=False)
        caught: list[Tensor] = []
        for block in vit.blocks[1:]:
            block.register_forward_pre_hook(lambda module, given, caught=caught: caught.append(given[0][:, 3:]))
        vit.double()
        with torch.no_grad():
            vit.forward_features(data.images)
            fed = [vit.patch_embed.proj(data.images).flatten(2).mT, *caught]
        for prompts, tokens in zip(model.prompts.weight, fed):
            rows_of(prompts, tokens.flatten(0, 1))
