"""Prototypes that start whitened: a linear discriminant analysis of what is read, compared by cosine."""

import warnings

import numpy as np
import pytest
import torch
from beit_factory import randomize, tiny_beit
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from vptm import PromptedBEiT
from vptm.models.verbalizers import PrototypicalVerbalizer
from vptm.models.whitening import Moments, discriminants, shrunk, whitened_start


def build(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fresh token head is expected here
        options = {"prototype_dim": 4, "projection_bias": True, **options}
        model = PromptedBEiT(tiny_beit(), 3, prompt_length=2, vocab_size=11, **options)
    randomize(model.verbalizer)
    return model.double()


def support(labels, batch=2):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(len(labels), 3, 8, 12, generator=generator, dtype=torch.float64)
    return [(images[i : i + batch], torch.tensor(labels[i : i + batch])) for i in range(0, len(labels), batch)]


def clouds(classes, width, each, seed):
    """Rows of classes that are long in one direction and lie apart, far from zero."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    shape = torch.randn(width, width, generator=draw, dtype=torch.float64)
    centres = 5 + torch.randn(classes, width, generator=draw, dtype=torch.float64)
    rows = centres[labels] + torch.randn(len(labels), width, generator=draw, dtype=torch.float64) @ shape
    return rows, labels


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(2, 5),
    width=st.integers(1, 9),
    each=st.integers(1, 6),
    batch=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_moments_of_batches_are_those_of_all_rows(classes, width, each, batch, seed):
    """With batches of any size, and shrinkage as scikit-learn's `oas` has it."""
    rows, labels = clouds(classes, width, each, seed)
    moments = Moments(classes, rows[0] + 1)
    for some, theirs in zip(rows.split(batch), labels.split(batch)):
        moments.add(some, theirs)
    means = torch.stack([rows[labels == k].mean(0) for k in range(classes)])
    residuals = rows - means[labels]
    torch.testing.assert_close(moments.means(), means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.within(), residuals.mT @ residuals / len(rows), rtol=1e-9, atol=1e-10)
    if each > 1 and width > 1:  # of one feature scikit-learn shrinks nothing, which is the same
        wanted, _ = oas(residuals.numpy(), assume_centered=True)
        np.testing.assert_allclose(shrunk(moments.within(), len(rows)), wanted, rtol=1e-7, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(classes=st.integers(2, 6), width=st.integers(1, 9), dim=st.integers(1, 9), seed=st.integers(0, 99))
def test_discriminants_whiten_and_hold_the_class_means(classes, width, dim, seed):
    """Every direction has width one and none goes with another; no class mean lies outside of the first K - 1."""
    rows, labels = clouds(classes, width, 8, seed)
    means = torch.stack([rows[labels == k].mean(0) for k in range(classes)])
    covariance = shrunk(torch.cov(rows.mT, correction=0).reshape(width, width), len(rows))
    projection = discriminants(means, covariance, dim)
    assert projection.shape == (min(dim, width), width)
    one = torch.eye(len(projection), dtype=torch.float64)
    torch.testing.assert_close(projection @ covariance @ projection.mT, one, rtol=1e-8, atol=1e-8)
    apart = (means - means.mean(0)) @ projection.mT
    assert (apart[:, classes - 1 :].abs() < 1e-8).all()
    if dim >= min(width, classes - 1):
        mahalanobis = (means[0] - means[1]) @ torch.linalg.solve(covariance, means[0] - means[1])
        torch.testing.assert_close((apart[0] - apart[1]).square().sum(), mahalanobis, rtol=1e-8, atol=1e-8)


def test_nearest_prototypes_are_a_linear_discriminant_analysis():
    """scikit-learn's, with the same covariance; cosine then weighs the same space."""
    rows, labels = clouds(4, 6, 12, seed=3)
    fresh, _ = clouds(4, 6, 40, seed=3)
    weight, bias, prototypes = whitened_start([(rows, labels)], 4, 6, None)
    means = torch.stack([rows[labels == k].mean(0) for k in range(4)])

    class Pooled:
        def fit(self, some):  # of one class, centred: all have the same
            self.covariance_ = shrunk((rows - means[labels]).mT @ (rows - means[labels]) / len(rows), len(rows)).numpy()
            return self

    lda = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Pooled()).fit(rows.numpy(), labels.numpy())
    nearest = torch.cdist(fresh @ weight.mT + bias, prototypes).argmin(1)
    assert (nearest.numpy() == lda.predict(fresh.numpy())).all()
    assert prototypes.sum(0).abs().max() < 1e-9


@pytest.mark.parametrize("activation", ["hidden", "logits"])
def test_the_model_starts_at_them(activation):
    """What is compared is what the module computes through token head, projection and bias; classes of different sizes
    in ragged batches; 11 tokens of 24 channels are a head that loses some, 4 dimensions leave some out."""
    model = build(token_activation=activation)
    labels = [0, 2, 1, 0, 2, 2, 1, 0, 0]
    loader = support(labels)
    model.verbalizer.init_prototypes(model, loader, whiten=True)
    assert model.verbalizer.prototypes.requires_grad and model.verbalizer.projection.weight.requires_grad
    with torch.no_grad():
        hidden = model.forward_hidden(torch.cat([x for x, _ in loader]))
        read = hidden if activation == "hidden" else model.lm_head(hidden)
        embedding = model.verbalizer.embed(hidden, model.lm_head)
    truth = torch.tensor(labels)
    means = torch.stack([embedding[truth == k].mean(0) for k in range(3)])
    torch.testing.assert_close(means, model.verbalizer.prototypes.detach(), rtol=1e-8, atol=1e-8)
    read_means = torch.stack([read[truth == k].mean(0) for k in range(3)])
    residuals = read - read_means[truth]
    # in the span of what can be read, where the inverse of the covariance is one
    basis = torch.eye(read.shape[1], dtype=torch.float64)
    if activation == "logits":
        basis = torch.linalg.qr(model.lm_head.weight.double()).Q
    inner = residuals @ basis
    covariance = shrunk(inner.mT @ inner / len(read), len(read))
    gap = (read_means[0] - read_means[2]) @ basis
    distance = (means[0] - means[2]).square().sum()
    torch.testing.assert_close(distance, gap @ torch.linalg.solve(covariance, gap), rtol=1e-6, atol=1e-8)


def test_a_class_of_one_image_says_nothing_of_widths():
    """One shot: nothing to whiten by, so that the prototypes are the images, around their mean."""
    rows, labels = clouds(5, 4, 1, seed=0)
    order = torch.tensor([3, 0, 4, 2, 1])  # sums in another order leave rounding where there is no spread
    rows, labels = rows[order], labels[order]
    weight, bias, prototypes = whitened_start([(rows, labels)], 5, 4, None)
    torch.testing.assert_close(weight @ weight.mT, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(rows @ weight.mT + bias, prototypes[labels], rtol=1e-9, atol=1e-9)
    sorted_rows = rows[labels.argsort()]
    torch.testing.assert_close(torch.cdist(prototypes, prototypes), torch.cdist(sorted_rows, sorted_rows))


def test_one_class_is_its_own_middle():
    """`vptm train` starts like this on a folder of one class, too: scores and gradients are numbers."""
    verbalizer = PrototypicalVerbalizer(4, 1, prototype_dim=4, token_activation="hidden", projection_bias=True)
    rows, labels = clouds(1, 4, 5, seed=0)
    start = whitened_start([(rows, labels)], 1, 4, None)
    with torch.no_grad():
        for target, value in zip(
            (verbalizer.projection.weight, verbalizer.projection.bias, verbalizer.prototypes), start
        ):
            target.copy_(value)
    torch.nn.functional.cross_entropy(verbalizer(rows.float()), labels).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in verbalizer.parameters())


def test_more_dimensions_than_there_are_stay_empty():
    rows, labels = clouds(3, 4, 5, seed=0)
    wide, narrow = (whitened_start([(rows, labels)], 3, dim, None) for dim in (6, 4))
    for many, few in zip(wide[:2], narrow[:2]):
        assert torch.equal(many[:4], few) and not many[4:].any()
    assert wide[2].shape == (3, 6) and not wide[2][:, 4:].any()


def test_rows_that_are_nearly_one_and_the_same():
    """Squares of rows as they are would leave nothing of a spread a millionth of their size, or a negative one."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(200)
    rows = 100 + 1e-4 * torch.randn(1, 64, generator=draw).double() * torch.randn(2000, 1, generator=draw).double()
    rows = (rows + 1e-5 * labels[:, None]).float()
    weight, bias, prototypes = whitened_start([(rows[:5], labels[:5]), (rows[5:], labels[5:])], 10, 64, None)
    assert all(bool(value.isfinite().all()) for value in (weight, bias, prototypes))
    means = torch.stack([rows[labels == k].double().mean(0) for k in range(10)])
    residuals = rows.double() - means[labels]
    covariance = shrunk(residuals.mT @ residuals / 2000, 2000)
    one = torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(weight @ covariance @ weight.mT, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: torch.nn.utils.parametrizations.weight_norm(model.verbalizer.projection),
        lambda model: model.verbalizer.projection.register_forward_hook(lambda *_: None),
        lambda model: model.lm_head.register_forward_hook(lambda *_: None),
        lambda model: setattr(model.verbalizer, "embed", lambda hidden, lm_head: hidden[:, :4]),
    ],
)
def test_parts_that_are_not_what_whitening_assumes_are_refused(spoil):
    """Its values would be written past what runs, and prototypes would stand elsewhere than their classes."""
    model = build()
    spoil(model)
    with pytest.raises(
        ValueError,
        match=r"^whitened prototypes need a PrototypicalVerbalizer whose projection and",
    ):
        model.verbalizer.init_prototypes(model, support([0, 1, 2]), whiten=True)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"projection_bias": False}, r"need a projection with bias \(projection_bias=True\), got one without"),
        ({"prototype_dim": None, "projection_bias": False}, r"need a projection with bias .*, got none"),
        ({"token_activation": "softmax"}, "need token_activation 'logits' or 'hidden', got 'softmax'"),
    ],
)
def test_a_verbalizer_that_cannot_be_whitened_is_left_as_it_was(options, message):
    """Before an image is read: the loader is not touched."""
    model = build(**options)
    before = {name: tensor.clone() for name, tensor in model.verbalizer.state_dict().items()}
    with pytest.raises(ValueError, match=f"^whitened prototypes {message}$"):
        model.verbalizer.init_prototypes(model, iter(lambda: pytest.fail("was read"), None), whiten=True)
    with pytest.raises(ValueError, match="every class must have an image in the support set, got none for class 1"):
        good = build()
        good.verbalizer.init_prototypes(good, support([0, 2]), whiten=True)
    after = model.verbalizer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_half_precision_that_cannot_hold_it_is_refused():
    """Rows so close that the inverse of their spread is beyond float16."""
    verbalizer = PrototypicalVerbalizer(4, 2, prototype_dim=4, token_activation="hidden", projection_bias=True).half()
    rows = torch.tensor([[1.0, 0, 0, 0], [1 + 1e-5, 0, 0, 0], [2, 0, 0, 0], [2 + 1e-5, 0, 0, 0]], dtype=torch.float64)

    class Model(torch.nn.Module):
        lm_head = None

        def __init__(self):
            super().__init__()
            self.verbalizer = verbalizer

        def forward_hidden(self, images):
            return images

    model = Model()
    before = verbalizer.projection.weight.clone()
    with pytest.raises(ValueError, match=r"whitened prototypes must be finite in torch.float16: start them in float32"):
        verbalizer.init_prototypes(model, [(rows, torch.tensor([0, 0, 1, 1]))], whiten=True)
    assert torch.equal(verbalizer.projection.weight, before)
