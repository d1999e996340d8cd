"""PrototypicalVerbalizer on prototype_cosine: the same scores as its textbook path, and prototypes from class means."""

import copy
import math
import re
import warnings
import weakref

import pytest
import torch
from beit_factory import randomize, tiny_beit

from vptm import PromptedBEiT, evaluate, fit, fit_prototypes, save_adapter
from vptm.models.verbalizers import PrototypicalVerbalizer
from vptm.training.losses import protoverb_loss
from vptm_kernels import FoldedHead, prototype_cosine


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


@pytest.mark.parametrize("whiten", [False, True])
def test_class_means_keep_no_rows_of_earlier_batches(whiten, monkeypatch):
    """`vptm train` starts at them by default, also with a million images, whose rows would be gigabytes."""
    model, rows, alive = build(projection_bias=True), [], []
    forward = model.forward_hidden

    def watched(images):
        alive.append(sum(row() is not None for row in rows))
        hidden = forward(images)
        rows.append(weakref.ref(hidden))
        return hidden

    monkeypatch.setattr(model, "forward_hidden", watched)
    model.verbalizer.init_prototypes(model, support([0, 2, 1] * 8), whiten=whiten)
    assert len(rows) == 12 and max(alive) <= 1


@pytest.mark.parametrize(
    "labels,message",
    [
        ([0, 1, 0], "every class must have an image in the support set, got none for class 2"),
        ([0, 1, 3], "labels must be in 0..2, got 3 for image 2"),
        ([0, -1, 2], "labels must be in 0..2, got -1 for image 1"),
        ([], "every class must have an image in the support set, got none for class 0"),
    ],
)
def test_a_support_set_that_does_not_fit_changes_nothing(labels, message):
    model = build()
    before = model.verbalizer.prototypes.detach().clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.verbalizer.init_prototypes(model, support(labels) if labels else [])
    assert torch.equal(model.verbalizer.prototypes, before)


@pytest.mark.parametrize("wrong", [torch.tensor([[0], [1]]), torch.tensor([0.0, 1.0]), torch.tensor([0])])
def test_labels_that_are_not_one_integer_an_image_change_nothing(wrong):
    model = build()
    before = model.verbalizer.prototypes.detach().clone()
    batch = torch.zeros(2, 3, 8, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^labels must be \(2,\) integers, one for each image, got .*$"):
        model.verbalizer.init_prototypes(model, [(batch, wrong)])
    assert torch.equal(model.verbalizer.prototypes, before)


def test_images_with_nan_change_nothing():
    model = build()
    before = model.verbalizer.prototypes.detach().clone()
    loader = support([0, 1, 2])
    loader[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="read-out rows must be finite, got NaN or inf for image 2"):
        model.verbalizer.init_prototypes(model, loader)
    assert torch.equal(model.verbalizer.prototypes, before)


def learned(model):
    return {name: tensor.clone() for name, tensor in model.learned_state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.learned_state_dict().items())


@pytest.mark.parametrize("prototype_dim", [4, None])
@pytest.mark.parametrize("activation", ["hidden", "logits", "softmax", "log_softmax"])
def test_post_hoc_training_is_adam_on_projection_and_prototypes_alone(activation, prototype_dim):
    """The same three steps written out with stored token logits; prompts, token head and temperature must not move."""
    model = build(token_activation=activation, prototype_dim=prototype_dim, projection_bias=prototype_dim is not None)
    loader, labels = support([0, 2, 1, 0, 2]), torch.tensor([0, 2, 1, 0, 2])
    before = learned(model)
    with torch.no_grad():
        hidden = torch.cat([model.eval().forward_hidden(images) for images, _ in loader])
        head, verbalizer = model.lm_head, model.verbalizer
        read = hidden if activation == "hidden" else head(hidden)
        read = {"softmax": read.softmax(-1), "log_softmax": read.log_softmax(-1)}.get(activation, read)
    names = [name for name in before if name.startswith("verbalizer.pro")]
    parts = {name: before[name].clone().requires_grad_() for name in names}
    adam = torch.optim.Adam(parts.values(), lr=0.01)
    losses = []
    for _ in range(4):
        embedding = read
        if prototype_dim is not None:
            embedding = read @ parts["verbalizer.projection.weight"].T + parts["verbalizer.projection.bias"]
        loss = protoverb_loss(embedding, parts["verbalizer.prototypes"], labels, temperature=0.5)
        losses.append(loss.item())
        if len(losses) <= 3:
            adam.zero_grad()
            loss.backward()
            adam.step()
    model.train()
    found = fit_prototypes(model, loader, steps=3, lr=0.01, temperature=0.5)
    assert verbalizer.training and verbalizer.prototypes.grad is None
    assert found == pytest.approx(losses, rel=1e-9) and found[-1] < found[0]
    for name, tensor in learned(model).items():
        torch.testing.assert_close(tensor, parts.get(name, before[name]), rtol=1e-7, atol=1e-9)
        assert torch.equal(tensor, before[name]) == (name not in parts), name


@pytest.mark.parametrize("start", ["present", "class_means"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_post_hoc_training_in_16_bits_is_that_of_float32(dtype, start):
    """Without float32 copies Adam's second step is NaN in fp16, and 20 steps of 1e-4 are rounded away in bf16."""
    moved = []
    for kind in (dtype, torch.float32):
        model = build().to(kind)
        loader = [(images.to(kind), labels) for images, labels in support([0, 2, 1, 0, 2])]
        if start == "class_means":
            model.verbalizer.init_prototypes(model, loader)
        before = model.verbalizer.prototypes.detach().float().clone()
        fit_prototypes(model, loader, start=start, steps=20, lr=1e-4)
        assert model.verbalizer.prototypes.dtype == kind
        moved.append((model.verbalizer.prototypes.detach().float() - before).abs().mean().item())
    assert moved[0] == pytest.approx(moved[1], rel=0.3) and moved[1] > 5e-4


def test_post_hoc_training_can_start_at_class_means():
    model = build()
    other, loader = copy.deepcopy(model), support([0, 2, 1, 0, 2])
    other.verbalizer.init_prototypes(other, loader)
    assert fit_prototypes(model, loader, start="class_means") == fit_prototypes(other, loader)
    assert torch.equal(model.verbalizer.prototypes, other.verbalizer.prototypes)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"labels": [0, 1, 0]}, "every class must have an image in the support set, got none for class 2"),
        ({"labels": [0, 1, 3]}, "labels must be in 0..2, got 3 for image 2"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"lr": -1.0}, "lr must be finite and > 0, got -1.0"),
        ({"lr": 1e308}, "loss became nan at step"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"start": "class_mean"}, "start must be one of present, class_means, got 'class_mean', did you mean"),
    ],
)
def test_post_hoc_training_that_cannot_be_done_changes_nothing(changes, message):
    model = build()
    before = learned(model)
    loader = support(changes.pop("labels", [0, 1, 2]))
    with pytest.raises((ValueError, FloatingPointError), match=re.escape(message)):
        fit_prototypes(model, loader, **changes)
    assert unchanged(model, before)


def test_post_hoc_training_needs_prototypes_that_may_move():
    with pytest.raises(TypeError, match="model must have a PrototypicalVerbalizer, got LinearVerbalizer"):
        fit_prototypes(build(verbalizer="linear"), support([0, 1, 2]))
    model = build()
    model.verbalizer.prototypes.requires_grad_(False)
    with pytest.raises(ValueError, match=re.escape("verbalizer.prototypes must be trainable")):
        fit_prototypes(model, support([0, 1, 2]))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_prototypes_that_are_not_finite_are_neither_trained_nor_written(value, frozen, tmp_path):
    model = build()
    with torch.no_grad():
        model.verbalizer.prototypes[1, 3] = value
    model.verbalizer.prototypes.requires_grad_(not frozen)
    message = re.escape(f"verbalizer.prototypes must be finite, got {value} at [1, 3]")
    if not frozen:
        with pytest.raises(ValueError, match=message):
            fit_prototypes(model, support([0, 1, 2]))
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def heads_given(monkeypatch):
    """What `prototype_cosine` gets as token_weight, call by call."""
    seen = []

    def noting(hidden, token_weight, *args, **kwargs):
        seen.append(token_weight)
        return prototype_cosine(hidden, token_weight, *args, **kwargs)

    monkeypatch.setattr("vptm.models.verbalizers.prototype_cosine", noting)
    return seen


def test_a_sealed_model_multiplies_token_head_and_projection_once(monkeypatch):
    """Sealed, a model runs on the folded head; before, and where it does not fold, on the token head itself."""
    model = build(projection_bias=True).eval()
    images = support([0, 1])[0][0]
    seen = heads_given(monkeypatch)
    expected = model(images)
    with torch.no_grad():
        model(images)
    assert all(head is model.lm_head.weight for head in seen)
    seen.clear()
    model.freeze_for_inference()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                torch.testing.assert_close(model(images), expected.detach(), rtol=1e-12, atol=1e-12)
    assert isinstance(seen[0], FoldedHead) and all(head is seen[0] for head in seen)
    model(images)
    assert seen.pop() is model.lm_head.weight, "with gradients, what learns is read"
    for options in ({"token_activation": "softmax"}, {"token_activation": "log_softmax"}, {"prototype_dim": None}):
        other = build(**options).eval().freeze_for_inference()
        with torch.no_grad():
            other(images)
        assert seen.pop() is other.lm_head.weight


def _step(model):
    optimiser = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    model(support([0, 1])[0][0])[:, 0].sum().backward()
    optimiser.step()


def _data(model):
    model.verbalizer.projection.weight.data.mul_(-2)
    model.refresh()


@pytest.mark.parametrize(
    "change",
    [
        _step,
        _data,
        lambda model: model.load_state_dict(build().state_dict()),
        lambda model: model.float().double(),
        lambda model: torch.nn.init.normal_(model.lm_head.bias),
        lambda model: torch.nn.init.normal_(model.verbalizer.prototypes),
        lambda model: fit_prototypes(model, support([0, 1, 2]), lr=0.1),
    ],
    ids=[
        "optimiser step",
        "data and refresh",
        "load_state_dict",
        "dtype",
        "token head",
        "prototypes",
        "fit_prototypes",
    ],
)
def test_a_change_reaches_the_folded_head(change):
    """Scores without gradients follow every edit; an old product of token head and projection would not."""
    model = build().eval()
    images = support([0, 1])[0][0]
    with torch.no_grad():
        model(images)
    change(model)
    for at in (model, copy.deepcopy(model)):
        with torch.no_grad():
            found = at(images)
        torch.testing.assert_close(found, model(images).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features must be an integer >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, or None to learn it, got 0.0"),
        ({"temperature": 1e-320}, "temperature must be finite and > 0, or None to learn it, got 1e-320"),
        ({"temperature": 1e39}, "temperature must be finite and > 0, or None to learn it, got 1e+39"),
    ],
)
def test_a_verbalizer_that_could_not_score_is_refused(arguments, message):
    """As a float32 a tiny temperature is zero and a huge one infinite: every score would be NaN or alike."""
    with pytest.raises(ValueError, match=re.escape(message)):
        PrototypicalVerbalizer(**{"in_features": 7, "num_classes": 3} | arguments)


def test_prototypes_for_other_classes_are_found_before_anything_is_trained():
    """Two prototypes for three classes train as long as no label is 2, and end in an IndexError when one is."""
    model = build()
    model.verbalizer.prototypes = torch.nn.Parameter(torch.rand(2, 4, dtype=torch.float64))
    data = [(image, label) for images, labels in support([0, 1, 0, 1]) for image, label in zip(images, labels)]
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    for train in (lambda: fit(model, loader, epochs=1, lr=1e-3), lambda: fit_prototypes(model, loader)):
        with pytest.raises(ValueError, match="a row for each of the model's 3 classes, got 2"):
            train()
    with pytest.raises(ValueError, match="a score for each of its 3 classes, got 2"):
        evaluate(model, loader)


def test_labels_that_are_no_tensor_are_refused():
    images, _ = support([0, 1])[0]
    with pytest.raises(ValueError, match=r"labels must be a tensor \(B,\) of integers, got list"):
        fit_prototypes(build(), [(images, [0, 1])])
