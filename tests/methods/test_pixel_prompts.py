"""Pixel prompts: the border by hand, the short cut through patches, and training under every mapping."""

from __future__ import annotations

import pytest
import torch
from beit_factory import randomize
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from vptm.methods.reprogramming.label_mapping import (
    LabelMapping,
    assign,
    frequency_mapping,
    label_counts,
    random_mapping,
)
from vptm.methods.reprogramming.pixel_prompts import (
    MAPPING_UPDATES,
    ReprogrammedClassifier,
    VisualPrompt,
    fit_visual_prompt,
)


def vit(kind: type[VisionTransformer] = VisionTransformer, **more: object) -> VisionTransformer:
    arguments = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 6}
    model = kind(**(arguments | more))
    randomize(model, 1)
    return model.double().eval()


def prompt(mode: str, **kwargs: int) -> VisualPrompt:
    made = VisualPrompt(mode, size=24, **kwargs).double()
    with torch.no_grad():
        made.delta.normal_(generator=torch.Generator().manual_seed(2))
    return made


def test_expansive_border_by_hand() -> None:
    """Sigmoid pixels around the image, both normalised; at the start the border is 0.5 grey and not black."""
    made = prompt("expansive", image_size=10)
    image = torch.rand(3, 10, 10, dtype=torch.float64)
    canvas = torch.sigmoid(made.delta.detach()).clone()
    canvas[:, 7:17, 7:17] = image
    expected = torch.stack([(canvas[c] - made.mean[c]) / made.std[c] for c in range(3)])
    assert torch.allclose(made(image[None])[0], expected, atol=1e-12)
    fresh = VisualPrompt("expansive", size=24, image_size=10)(torch.zeros(1, 3, 10, 10))
    assert torch.allclose(
        fresh[0, :, 0, 0] * torch.tensor([0.229, 0.224, 0.225]), 0.5 - torch.tensor([0.485, 0.456, 0.406])
    )


@pytest.mark.parametrize("image_size", [10, 9, 1, 23, 24])
def test_expansive_border_stands_where_the_released_code_has_it(image_size: int) -> None:
    """ILM-VP pads by int((out - in + 1) / 2) on the left and the top, by int((out - in) / 2) on the others: elsewhere
    every patch of an odd difference sees other pixels than in a model that was trained there."""
    left, right = int((24 - image_size + 1) / 2), int((24 - image_size) / 2)
    padded = torch.nn.functional.pad(torch.ones(1, 1, image_size, image_size), (left, right, left, right))
    assert torch.equal(1 - VisualPrompt("expansive", size=24, image_size=image_size).mask, padded[0])


def test_additive_border_by_hand() -> None:
    """The outer pixels are moved, the inner ones not, and the images given are left as they were."""
    made = prompt("additive", border=5)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    before = images.clone()
    found = made(images)
    assert torch.equal(images, before) and torch.equal(found[..., 5:19, 5:19], images[..., 5:19, 5:19])
    assert torch.allclose(found[..., :5, :], images[..., :5, :] + made.delta[:, :5, :])


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        ("expansive", {"image_size": 8}),  # in step with the patches
        ("expansive", {"image_size": 9}),  # across patches, and off the middle by a pixel
        ("expansive", {"image_size": 1}),
        ("expansive", {"image_size": 24}),  # no border
        ("additive", {"border": 1}),
        ("additive", {"border": 12}),  # nothing left inside
    ],
)
def test_patches_equal_the_whole_image(mode: str, arguments: dict[str, int]) -> None:
    """Embedding border patches once gives the same patches, scores and gradient as embedding every image."""
    made, model = prompt(mode, **arguments), vit()
    size = arguments.get("image_size", 24)
    images = torch.rand(3, 3, size, size, dtype=torch.float64)
    whole, short = model.patch_embed(made(images)), made.patches(model.patch_embed, images)
    assert torch.allclose(short, whole, atol=1e-12)
    reprogrammed = ReprogrammedClassifier(model, LabelMapping(random_mapping(3, 6)).double(), made)
    expected = reprogrammed.mapping(model(made(images)))
    scores = reprogrammed(images)
    assert torch.allclose(scores, expected, atol=1e-12)
    cotangent = torch.randn_like(scores)
    found = torch.autograd.grad((scores * cotangent).sum(), made.delta)[0]
    assert torch.allclose(found, torch.autograd.grad((expected * cotangent).sum(), made.delta)[0], atol=1e-10)


class Scaled(VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("mode", ["expansive", "additive"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (VisionTransformer, {"dynamic_img_size": True}),
        (VisionTransformer, {"dynamic_img_size": True, "img_size": 16}),  # its position embedding is resampled
        (VisionTransformer, {"dynamic_img_size": True, "dynamic_img_pad": True, "patch_size": 5, "img_size": 25}),
        (VisionTransformer, {"embed_norm_layer": nn.LayerNorm}),
        (Scaled, {}),
    ],
)
def test_what_the_short_cut_does_not_know_runs_whole(mode: str, kind: type[VisionTransformer], more: dict) -> None:
    """A ViT that embeds patches otherwise gets the whole image, instead of a crash or other scores."""
    made, model = prompt(mode, **({"image_size": 8} if mode == "expansive" else {"border": 5})), vit(kind, **more)
    images = torch.rand(2, 3, made.image_size, made.image_size, dtype=torch.float64)
    found = ReprogrammedClassifier(model, LabelMapping(torch.eye(6)).double(), made)(images)
    assert torch.allclose(found, model(made(images)), atol=1e-12)
    assert torch.allclose(made.patches(model.patch_embed, images), model.patch_embed(made(images)), atol=1e-12)


def test_sizes_that_do_not_fit_are_refused() -> None:
    """A classifier of another size when it is given, images of another size when they come: also one pixel, which would
    be stretched without a word."""
    with pytest.raises(ValueError, match="prompt must make 16x16 pixels, what the classifier takes, got size=24"):
        ReprogrammedClassifier(vit(img_size=16), LabelMapping(torch.eye(6)), prompt("expansive", image_size=8))
    with pytest.raises(AssertionError, match="doesn't match model"):  # timm's own
        prompt("expansive", image_size=8).patches(vit(img_size=16).patch_embed, torch.zeros(2, 3, 8, 8).double())
    for made, size in ((prompt("expansive", image_size=8), 8), (prompt("additive", border=5), 24)):
        model = ReprogrammedClassifier(vit(), LabelMapping(torch.eye(6)).double(), made)
        for shape in ((2, 3, 9, 9), (2, 3, 1, 1), (2, 1, size, size), (3, size, size)):
            for call in (model, made):
                with pytest.raises(ValueError, match=rf"images must be \(B, 3, {size}, {size}\), got \({shape[0]}, "):
                    call(torch.zeros(shape, dtype=torch.float64))


def test_a_small_image_has_few_patches_of_its_own() -> None:
    """32 pixels in 224 with patches of 16: 4 of 196 patches are computed per image, the others once for the batch."""
    seen: list[Tensor] = []
    model = VisionTransformer(img_size=224, patch_size=16, embed_dim=8, depth=1, num_heads=1, num_classes=2)
    model.patch_embed.proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    VisualPrompt("expansive", image_size=32).patches(model.patch_embed, torch.rand(5, 3, 32, 32))
    assert [tuple(pixels.shape) for pixels in seen] == [(1, 3, 224, 224), (5, 3, 32, 32)]


def test_a_small_image_has_few_rows_of_its_own_in_the_first_block() -> None:
    """8 pixels in 24 with patches of 4: block 0 projects keys and values of 4 rows per image and of 33 once."""
    made, model, images = prompt("expansive", image_size=8), vit(), torch.rand(5, 3, 8, 8, dtype=torch.float64)
    reprogrammed = ReprogrammedClassifier(model, LabelMapping(random_mapping(3, 6)).double(), made)

    def flops(run: nn.Module, given: Tensor) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(given)
        return int(counter.get_total_flops())

    embedded = 2 * 36 * 3 * 4 * 4 * 16
    saved = flops(model, made(images)) - flops(model.patch_embed, made(images))
    saved -= flops(reprogrammed.source_logits, images) - embedded - 5 * 2 * 4 * 3 * 4 * 4 * 16
    assert saved == 2 * 3 * 16 * 16 * (5 * 37 - (5 * 4 + 33))


def task() -> tuple[nn.Module, DataLoader]:
    """A random linear source classifier, and two kinds of pictures it sees differently."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    images = torch.rand(24, 3, 4, 4)
    labels = torch.arange(24) % 2
    images[labels == 1, 0] += 2.0
    return source, DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)


@pytest.mark.parametrize("update", MAPPING_UPDATES)
def test_training_lowers_the_loss_and_leaves_the_classifier(update: str) -> None:
    """The prompt alone is trained, alike for one seed, and the mapping follows its rule: kept, counted once, or
    counted again under the prompt of the moment."""
    losses, deltas = [], []
    for _ in range(2):
        source, data = task()
        before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        start = LabelMapping(torch.eye(2, 6))
        model = ReprogrammedClassifier(source, start, VisualPrompt(size=8, image_size=4))
        grey = frequency_mapping(label_counts(nn.Sequential(model.prompt, source), data, 2))
        losses.append(fit_visual_prompt(model, data, epochs=12, lr=0.1, update=update, seed=3))
        deltas.append(model.prompt.delta.detach())
        assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
        assert torch.equal(model.mapping.weights, start.weights) == (
            update == "fixed" or torch.equal(grey, start.weights)
        )
        if update == "flm":
            assert torch.equal(model.mapping.weights, grey)
        if update == "blm":
            assert int((model.mapping.weights > 0).sum()) > 2
    assert losses[0] == losses[1] and torch.equal(deltas[0], deltas[1])
    assert min(losses[0]) < losses[0][0]
    assert float((deltas[0] * (1 - model.prompt.mask)).abs().max()) == 0


def test_iterative_mapping_counts_before_every_epoch() -> None:
    """ILM's mapping is the greedy one for the counts under the prompt as the last epoch found it."""
    source, data = task()
    model = ReprogrammedClassifier(source, LabelMapping(torch.eye(2, 6)), VisualPrompt(size=8, image_size=4))
    fit_visual_prompt(model, data, epochs=1, lr=1e3, update="ilm")
    counted_at_the_start = model.mapping.weights.clone()
    expected = frequency_mapping(label_counts(nn.Sequential(model.prompt, source), data, 2))
    fit_visual_prompt(model, data, epochs=1, lr=1e-9, update="ilm")
    assert torch.equal(model.mapping.weights, expected)
    assert not torch.equal(counted_at_the_start, expected)


@pytest.mark.parametrize("epochs", [1, 2, 20, 50])
def test_the_rate_falls_at_half_and_at_72_percent(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ten each time, counted in epochs and not in steps; the first epoch has the rate that was asked for."""
    rates = []

    class Watched(torch.optim.Adam):
        def step(self, *given: object) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(*given)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    source, data = task()
    model = ReprogrammedClassifier(source, LabelMapping(torch.eye(2, 6)), VisualPrompt(size=8, image_size=4))
    fit_visual_prompt(model, data, epochs=epochs, lr=0.5)
    falls = {1: (1, 1), 2: (1, 1), 20: (10, 14), 50: (25, 36)}[epochs]
    expected = [0.5 * 0.1 ** sum(epoch >= fall for fall in falls) for epoch in range(epochs) for _ in range(len(data))]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("update", ["flm", "ilm", "blm"])
def test_a_label_without_an_image_is_refused(update: str) -> None:
    """Instead of a source label that nothing speaks for."""
    source, data = task()
    model = ReprogrammedClassifier(source, LabelMapping(torch.eye(3, 6)), VisualPrompt(size=8, image_size=4))
    with pytest.raises(ValueError, match="every label must have an image, label 2 has none"):
        fit_visual_prompt(model, data, epochs=1, update=update)


def test_training_that_cannot_work_is_refused() -> None:
    """One line each, instead of a division by zero, an index error of torch, or a loss of NaN that is returned."""
    source, data = task()
    images, labels = data.dataset.tensors
    broken = images.clone()
    broken[5, 0, 0, 0] = torch.nan

    def loader(images: Tensor, labels: Tensor) -> DataLoader:
        return DataLoader(TensorDataset(images, labels), batch_size=8)

    for arguments, given, kind, message in (
        ({"lr": 0.0}, data, ValueError, "lr must be finite and > 0, got 0.0"),
        ({"lr": float("nan")}, data, ValueError, "lr must be finite and > 0, got nan"),
        ({"lr": "0.1"}, data, TypeError, "lr must be a number"),
        ({}, loader(images[:0], labels[:0]), ValueError, "train must hold at least one image"),
        ({}, loader(images, labels + 1), ValueError, r"labels must be in 0\.\.1, got 2 for image 1"),
        ({}, loader(broken, labels), FloatingPointError, "loss became nan at epoch 0 with lr 0.01"),
    ):
        model = ReprogrammedClassifier(source, LabelMapping(torch.eye(2, 6)), VisualPrompt(size=8, image_size=4))
        with pytest.raises(kind, match=message):
            fit_visual_prompt(model, given, epochs=1, **arguments)
        assert bool(model.prompt.delta.isfinite().all())


def test_without_a_prompt_no_image_is_needed() -> None:
    """A semantic mapping classifies with the source classifier alone."""
    source, data = task()
    scores = torch.tensor([[0.1, 0.9, 0.0, 0.0, 0.0, 0.0], [0.0, 0.2, 0.0, 0.8, 0.0, 0.0]])
    model = ReprogrammedClassifier(source.double(), LabelMapping(assign(scores)).double())
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(model(images), source(images)[:, [1, 3]])
    with pytest.raises(ValueError, match="must have a prompt to train"):
        fit_visual_prompt(model, data, epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "expand"}, "did you mean 'expansive'"),
        ({"size": 8, "image_size": 9}, r"image_size must be in 1\.\.8"),
        ({"mode": "additive", "size": 8, "border": 5}, r"border must be in 1\.\.4"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    """One line that names the argument and what it was."""
    with pytest.raises(ValueError, match=message):
        VisualPrompt(**arguments)
