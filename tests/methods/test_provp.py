"""ProVP-Ref: its loss, the frozen branch, and class embeddings, each against the words of the paper's code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from beit_factory import randomize
from forked import forks
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from tiny_models import build, images
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import vptm
from vptm.methods import provp
from vptm.methods.provp import ridge_projection
from vptm.training.losses import feature_reformation
from vptm.training.reformation import FeatureReformation


def clip(width: int = 16) -> VisionTransformer:
    """CLIP's visual tower in miniature: norm before the blocks, QuickGELU, a projection as head, random weights."""
    vit = VisionTransformer(
        img_size=(8, 12), patch_size=4, embed_dim=width, depth=3, num_heads=2, pre_norm=True, act_layer=QuickGELU,
        num_classes=10, class_token=True,
    )  # fmt: skip
    randomize(vit, 2)
    return vit.eval()


def clip_model(**kwargs: Any) -> tuple[vptm.PromptedViT, Tensor]:
    """A prompted tower in fp64, and the projection its head was."""
    vit = clip()
    projection = vit.head.weight.detach().double().clone()
    torch.manual_seed(1)
    model = vptm.PromptedViT(vit, 5, prompt_mode="progressive", prompt_length=3, **kwargs).double().eval()
    randomize(model.prompts, 4)
    return model, projection


@given(st.integers(1, 7), st.integers(1, 5), st.floats(0.1, 3.0), st.integers(0, 99))
def test_loss_equals_loops(batch: int, dim: int, temperature: float, seed: int) -> None:
    """-log of the softmax share of the image's own frozen feature, averaged, with plain loops."""
    generator = torch.Generator().manual_seed(seed)
    f, g = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    total = 0.0
    for i in range(batch):
        exponentials = [
            math.exp(float(f[i] @ g[j]) / float(f[i].norm() * g[j].norm()) / temperature) for j in range(batch)
        ]
        total -= math.log(exponentials[i] / sum(exponentials))
    assert float(feature_reformation(f, g, temperature=temperature)) == pytest.approx(total / batch, abs=1e-12)


def test_loss_at_known_points() -> None:
    """Batch of 32: orthonormal 2.518, all alike ln 32, own cosine 1 and others 0.7 3.177."""
    eye = torch.eye(32, dtype=torch.float64)
    assert float(feature_reformation(eye, eye)) == pytest.approx(math.log(1 + 31 / math.e))
    assert float(feature_reformation(torch.ones(32, 4), torch.ones(32, 4))) == pytest.approx(math.log(32))
    close = torch.linalg.cholesky(0.7 + 0.3 * eye)
    assert float(feature_reformation(close, close)) == pytest.approx(3.177, abs=5e-4)


def test_no_gradient_reaches_the_frozen_features() -> None:
    """The frozen side is a target: pulling it along would let both collapse."""
    f, g = torch.randn(2, 4, 3, requires_grad=True).unbind()
    leaf_f, leaf_g = f.detach().requires_grad_(), g.detach().requires_grad_()
    feature_reformation(leaf_f, leaf_g).backward()
    assert leaf_g.grad is None and leaf_f.grad is not None and float(leaf_f.grad.abs().max()) > 0


def _rank(rank: int, rendezvous: str, f: Tensor, g: Tensor, parts: list[slice], answers: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(parts))
    own = f[parts[rank]].clone().requires_grad_()
    loss = feature_reformation(own, g[parts[rank]], temperature=0.5)
    loss.backward()
    answers.put((rank, float(loss), own.grad.numpy()))
    torch.distributed.destroy_process_group()


def test_ranks_together_are_one_batch(tmp_path: Path) -> None:
    """Two ranks of 3 and 2 images: mean loss and DDP-averaged gradients equal one process with all 5, so negatives
    really cross ranks and unequal batches weigh right."""
    f, g = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = f.clone().requires_grad_()
    expected = feature_reformation(whole, g, temperature=0.5)
    expected.backward()
    # forks of a process that has not run backward: once it has, they may not use autograd
    context = forks()
    answers = context.Queue()
    parts = [slice(0, 3), slice(3, 5)]
    ranks = [context.Process(target=_rank, args=(r, str(tmp_path / "meet"), f, g, parts, answers)) for r in range(2)]
    for process in ranks:
        process.start()
    found = {rank: (loss, grad) for rank, loss, grad in (answers.get(timeout=300) for _ in ranks)}
    for process in ranks:
        process.join()
    assert sum(loss for loss, _ in found.values()) / 2 == pytest.approx(float(expected.detach()), abs=1e-12)
    for rank, (_, grad) in found.items():
        assert torch.allclose(torch.from_numpy(grad) / 2, whole.grad[parts[rank]], atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("mode", ["shallow", "deep", "progressive"])
def test_twin_is_the_backbone_without_prompts(impl: str, mode: str) -> None:
    """Its class row is timm's own; it runs on the prompted model's folded weights and follows their changes."""
    for model in (build(prompt_mode=mode, readout="cls", impl=impl, extra_bias="learned"), clip_model(impl=impl)[0]):
        batch = images(model)
        reform = FeatureReformation(model)
        model.train()
        for _ in range(2):
            expected = model.backbone.forward_features(batch)[:, 0]
            assert torch.allclose(reform.frozen(batch), expected, atol=1e-12, rtol=0)
            if impl != "reference":
                folded, of_twin = model._encoder.folded(model), reform.twin._encoder.folded(reform.twin)
                assert of_twin.qkv_weights is folded.qkv_weights
                assert of_twin.blocks[0].fc1_weight is folded.blocks[0].fc1_weight
            with torch.no_grad():
                model.backbone.blocks[1].mlp.fc1.weight.mul_(1.5)
        assert model.training and model.prompts.length == 3


def test_cached_features_are_computed_once() -> None:
    """A second epoch of the same pixels runs nothing, in any order, and gives the same features bitwise."""
    model, _ = clip_model()
    batch = images(model, 5)
    plain, cached = FeatureReformation(model), FeatureReformation(model, cache=True)
    calls = []
    compute = cached._compute
    cached._compute = lambda part: (calls.append(len(part)), compute(part))[1]  # type: ignore[method-assign]
    first = cached.frozen(batch[:3])
    again = cached.frozen(batch[[4, 2, 0, 3, 1]])
    assert calls == [3, 2] and torch.equal(again[[2, 4, 1]], first)
    assert torch.allclose(again, plain.frozen(batch[[4, 2, 0, 3, 1]]), atol=1e-12)
    assert not torch.allclose(cached.frozen(batch + 1)[0], first[0]) and calls[-1] == 5


def test_scores_are_clips() -> None:
    """exp(logit scale) times the cosine of the projected class token to the text features; nothing but prompts is
    trained, and the scores of the frozen tower are timm's head, normalised."""
    model, projection = clip_model()
    text = torch.randn(7, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    names = [f"class {k}" for k in range(7)]
    vptm.set_class_embeddings(model, text, projection=projection, logit_scale=50.0, class_names=names)
    batch = images(model, 3)
    f = model.forward_hidden(batch) @ projection.T
    expected = 50 * (f / f.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T
    assert torch.allclose(model(batch), expected, atol=1e-12)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["prompts.weight"]
    tower = clip().double()
    frozen = FeatureReformation(model).frozen(batch)
    assert torch.allclose(frozen, tower(batch) - tower.head.bias, atol=1e-12)


def test_fit_adds_the_loss_and_trains_prompts_alone() -> None:
    """One step of plain SGD equals the gradient of cross-entropy + lambda * loss, written out with two forward
    passes."""
    found = {}
    for weight in (0.0, 2.0):
        model, projection = clip_model()
        text = torch.randn(5, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        vptm.set_class_embeddings(model, text, projection=projection)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        batch, labels = images(model, 4), torch.arange(4)
        hidden, frozen = model.forward_hidden(batch), model.backbone.forward_features(batch)[:, 0]
        held = feature_reformation(hidden @ projection.T, frozen @ projection.T, temperature=0.7)
        loss = torch.nn.functional.cross_entropy(model(batch), labels) + weight * held
        (gradient,) = torch.autograd.grad(loss, [model.prompts.weight])
        data = DataLoader(TensorDataset(batch, labels), batch_size=4)
        settings: dict[str, Any] = {"reformation": weight, "reformation_temperature": 0.7, "cache_frozen": True}
        result = vptm.fit(
            model, data, epochs=1, lr=1e-3, optimizer="momentum", schedule="none", progress=False, **settings
        )
        assert result.history[0]["train_loss"] == pytest.approx(float(loss.detach()), abs=1e-9)
        moved = before.pop("prompts.weight") - model.prompts.weight
        assert torch.allclose(moved, 1e-3 * gradient, atol=1e-10)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        found[weight] = gradient
    assert not torch.allclose(found[0.0], found[2.0])


def test_adapters_keep_the_class_embeddings(tmp_path: Path) -> None:
    """The loaded model classifies the same way without being given the embeddings again."""
    model = vptm.PromptedBEiT("builtin", 2, prompt_mode="progressive", readout="cls", token_activation="hidden")
    vptm.set_class_embeddings(model, torch.randn(3, 20), projection=torch.randn(20, 192), class_names=list("abc"))
    vptm.save_adapter(model, tmp_path)
    loaded = vptm.load_adapter(tmp_path)
    picture = torch.rand(2, 1, 28, 28)
    assert loaded.class_names == ["a", "b", "c"] and torch.equal(loaded(picture), model.eval()(picture))


def test_ridge_projection_is_the_regression() -> None:
    """Equal to scikit-learn's Ridge without intercept, from unit features to unit targets."""
    from sklearn.linear_model import Ridge

    generator = torch.Generator().manual_seed(0)
    features, text = torch.randn(40, 6, generator=generator), torch.randn(3, 4, generator=generator)
    labels = torch.arange(40) % 3
    found = ridge_projection(features, labels, text, strength=0.3)
    unit = torch.nn.functional.normalize(features, dim=-1).double()
    penalty = 0.3 * float((unit.T @ unit).diagonal().mean())
    ridge = Ridge(alpha=penalty, fit_intercept=False).fit(unit, torch.nn.functional.normalize(text, dim=-1)[labels])
    assert torch.allclose(found.double(), torch.from_numpy(ridge.coef_).double(), atol=1e-6)


def test_the_projection_of_a_clip_is_its_towers_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitting another one beside it would throw away what CLIP was trained for."""
    tower = clip()
    tower.head.bias.data.zero_()  # what timm gives to a projection without one
    monkeypatch.setattr(provp.timm, "create_model", lambda name, pretrained: tower)
    assert torch.equal(provp.clip_projection("vit_base_patch16_clip_quickgelu_224.openai"), tower.head.weight)
    with pytest.raises(ValueError, match=r"must be the visual tower of a CLIP in timm, got 'vit_base_patch16_224'"):
        provp.clip_projection("vit_base_patch16_224")
    tower.head.bias.data[0] = 1.0
    with pytest.raises(ValueError, match=r"must end in a projection without a bias"):
        provp.clip_projection("vit_base_patch16_clip_224")


def test_frozen_features_are_kept_in_every_dtype() -> None:
    """numpy knows no bfloat16: hashing pixels through it would end training."""
    model, _ = clip_model()
    model = model.bfloat16()
    kept = FeatureReformation(model, cache=True)
    images = torch.randn(3, 3, 8, 12, dtype=torch.bfloat16)
    first = kept.frozen(images)
    assert torch.equal(kept.frozen(images.flip(0)), first.flip(0)) and len(kept._cache or {}) == 3


def test_bad_input_is_refused() -> None:
    """One line that names the argument and what it was."""
    model, projection = clip_model()
    text = torch.randn(5, 10, dtype=torch.float64)
    model.class_names = list("abcde")
    for arguments, message in (
        ({"embeddings": text}, r"projection must be \(10, 16\), None is for embeddings of 16 values"),
        ({"embeddings": text, "projection": projection.T}, r"projection must be \(10, 16\), finite, got \(16, 10\)"),
        ({"embeddings": text[0]}, r"embeddings must be \(K, D\), finite"),
        ({"embeddings": text * math.nan, "projection": projection}, "finite"),
        ({"embeddings": text, "projection": projection, "logit_scale": 0}, "logit_scale must be finite and > 0"),
        ({"embeddings": text, "projection": projection, "class_names": list("abc")}, "name all 5 embeddings, got 3"),
        (
            {"embeddings": text, "projection": projection, "class_names": list("abced")},
            "must be those of the model, a, b, c, d, e, got a, b, c, e, d",
        ),
        ({"embeddings": text[:4], "projection": projection}, "one for each of the 5 classes of the model, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            vptm.set_class_embeddings(model, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a frozen backbone"):
        FeatureReformation(clip_model()[0].unfreeze())
    with pytest.raises(ValueError, match="reformation must be finite and >= 0, got -1"):
        FeatureReformation(model, weight=-1)
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        feature_reformation(text, text, temperature=0)
    with pytest.raises(ValueError, match="prompted and frozen must be"):
        feature_reformation(text, text[:2])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["shallow", "deep", "progressive"])
def test_both_branches_start_together(mode: str, dropout: float) -> None:
    """Patches are embedded once for both, and read-out, loss and gradient are those of two passes of their own, also
    with a dropout mask per sample, a trained mask token, and where backward computes blocks again."""
    calls: list[int] = []
    for checkpointing in (False, True):
        model = build(prompt_mode=mode, prompt_dropout=dropout, train_mask_token=True, progressive_alpha=0.3).train()
        model.set_grad_checkpointing(checkpointing)
        reform, batch = FeatureReformation(model, temperature=0.5), images(model, 3)
        torch.manual_seed(1)
        hidden = model.forward_hidden(batch)
        expected = feature_reformation(hidden, reform.frozen(batch), temperature=0.5)
        parameters = [model.prompts.weight, model.mask_token]
        gradients = torch.autograd.grad(expected, parameters)
        calls.clear()
        hook = model.backbone.patch_embed.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)
        found_hidden, loss = reform(batch)
        found = torch.autograd.grad(loss, parameters)
        hook.remove()
        assert calls == [1]
        assert torch.allclose(found_hidden, hidden, atol=1e-12) and torch.allclose(loss, expected, atol=1e-12)
        assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(found, gradients))
        assert torch.allclose(model.forward_hidden(batch + 1), model.forward_hidden(batch + 1)) or dropout
    added = build(prompt_mode="deep", prompt_length=1, prompt_options={"placement": "add"}, readout="cls")
    batch = images(added)
    hidden, _ = FeatureReformation(added)(batch)
    assert torch.equal(hidden, added.forward_hidden(batch))
