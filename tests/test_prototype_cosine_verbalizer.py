"""PrototypicalVerbalizer on prototype_cosine: the same scores as its textbook path, and prototypes from class means."""

import re
import warnings

import pytest
import torch
from beit_factory import randomize, tiny_beit

from vptm import PromptedBEiT
from vptm.verbalizers import PrototypicalVerbalizer


def build(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fresh token head is expected here
        model = PromptedBEiT(tiny_beit(), 3, prompt_length=2, vocab_size=11, **{"prototype_dim": 4, **options})
    randomize(model.verbalizer)
    return model.double()


def support(labels, seed=0):
    """Batches of two images, the last one ragged."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(labels), 3, 8, 12, generator=generator, dtype=torch.float64)
    return [(images[i : i + 2], torch.tensor(labels[i : i + 2])) for i in range(0, len(labels), 2)]


@pytest.mark.parametrize("prototype_dim", [4, None])
@pytest.mark.parametrize("activation", ["hidden", "logits", "softmax", "log_softmax"])
def test_scores_and_gradients_equal_the_textbook_path(activation, prototype_dim):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11).double().requires_grad_(False)
    width = 6 if activation == "hidden" else 11
    verbalizer = PrototypicalVerbalizer(
        width, 3, prototype_dim=prototype_dim, token_activation=activation, projection_bias=prototype_dim is not None
    ).double()
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    leaves = [hidden, *verbalizer.parameters()]
    results = []
    for impl in ("reference", "auto"):
        scores = verbalizer(hidden, head, impl)
        results.append([scores, *torch.autograd.grad(scores.sin().sum(), leaves)])
    for found, wanted in zip(results[1], results[0]):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_reference_still_stores_the_logits():
    """`vptm.check` compares implementations with the reference: it must not run the kernel that it judges."""
    head = torch.nn.Linear(6, 11)
    verbalizer = PrototypicalVerbalizer(11, 3, prototype_dim=4)
    seen = []
    head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    verbalizer(torch.randn(5, 6), head, "reference")
    assert seen == [(5, 11)]


@pytest.mark.parametrize("activation", ["hidden", "logits", "softmax", "log_softmax"])
def test_prototypes_are_the_class_means(activation):
    model = build(token_activation=activation)
    labels = [0, 2, 1, 0, 2]
    loader = support(labels)
    model.train()
    model.verbalizer.init_prototypes(model, loader)
    assert model.verbalizer.training and not model.backbone.training
    model.eval()
    with torch.no_grad():
        embedding = model.verbalizer.embed(model.forward_hidden(torch.cat([x for x, _ in loader])), model.lm_head)
    for k in range(3):
        mean = embedding[torch.tensor(labels) == k].mean(0)
        torch.testing.assert_close(model.verbalizer.prototypes[k].detach(), mean, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "labels,message",
    [
        ([0, 1, 0], "every class must have an image in the support set, got none for class 2"),
        ([0, 1, 3], "labels must lie in 0 .. 2, got 3 for image 2"),
        ([0, -1, 2], "labels must lie in 0 .. 2, got -1 for image 1"),
        ([], "every class must have an image in the support set, got none for class 0"),
    ],
)
def test_a_support_set_that_does_not_fit_changes_nothing(labels, message):
    model = build()
    before = model.verbalizer.prototypes.detach().clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.verbalizer.init_prototypes(model, support(labels) if labels else [])
    assert torch.equal(model.verbalizer.prototypes, before)


def test_images_with_nan_change_nothing():
    model = build()
    before = model.verbalizer.prototypes.detach().clone()
    loader = support([0, 1, 2])
    loader[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="embeddings must be finite, got NaN or inf in the batch from image 2 on"):
        model.verbalizer.init_prototypes(model, loader)
    assert torch.equal(model.verbalizer.prototypes, before)
