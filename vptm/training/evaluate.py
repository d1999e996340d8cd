"""How good a model is on a loader."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from vptm.frozen.modes import eval_mode
from vptm.models.adapter_saving import unwrapped
from vptm.models.prompted_model import PromptedModel
from vptm.training.batches import images_and_labels
from vptm.training.graphs import InferenceGraph, check_graph
from vptm.training.label_kinds import labels_of
from vptm.training.precision import compiled, dtype_of, float32_products, in_type, resolve_precision
from vptm.training.ranks import Ranks, join, rank_loader
from vptm.training.scores import Answers, SeveralAnswers


def evaluate(
    model: PromptedModel,
    loader: DataLoader[Any],
    *,
    device: str | torch.device | None = None,
    confusion: bool = False,
    precision: str | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
    distributed: bool = False,
) -> dict[str, Any]:
    """Accuracy, mean cross-entropy and scikit-learn's scores of `model` on `loader`, in eval mode; the model's mode is
    put back.

    Args:
        model: gives (B, K) scores.
        loader: yields (images, labels), labels in 0..K-1, or (B, K) of 0 and 1 for a multi-label model, or a mapping
            with `pixel_values` and `labels`.
        device: where to run; None stays on the model's device.
        confusion: also return the counts (K, K), row = label, column = prediction.
        precision: "fp32", "tf32", "bf16", "fp16" or "auto", see `vptm.fit`: a copy of the model in that type answers,
            and images are cast to it. None computes in the model's own type, which images must have.
        compile: `torch.compile` the model, see `vptm.fit`.
        cuda_graph: record what a GPU does for a batch, once for every size that comes twice, and replay it.
        distributed: the processes that `torchrun` started all call this with the same model and loader: each answers
            for its share of every batch, every image is counted once, and all have the scores of all. It needs
            Accelerate where there is more than one.

    Returns:
        `accuracy` (share in 0..1), `balanced_accuracy` (mean of the shares of the classes with images), `macro_f1`
        (mean F1 of the classes that occur among labels or predictions), `ece` (expected calibration error over 15 bins,
        see `vptm.training.scores.calibration_error`), `loss`, `n`, and lists of K numbers: `per_class` (the recall of a
        class: the share of its images that is right), `precision_per_class` and `f1_per_class`, None for a class that
        has none; and, when asked for, `confusion` as nested lists.

        Of a multi-label model, whose labels are (B, K) of 0 and 1: `map` (the mean of the average precisions of the
        classes with images, by scikit-learn), `ap_per_class` (None for a class without images), `loss` (mean binary
        cross-entropy), `n`, and by a threshold of 0.5 on the sigmoid of scores `macro_f1`, `micro_f1`,
        `recall_per_class`, `precision_per_class` and `f1_per_class`.

    Raises:
        ValueError: no images, a label outside 0..K-1, a confusion matrix of a multi-label model, or a precision that
            the device lacks.

    Example:
        >>> model = PromptedBEiT("builtin", num_classes=2)
        >>> images = torch.utils.data.TensorDataset(torch.zeros(3, 1, 28, 28), torch.tensor([0, 1, 1]))
        >>> scores = evaluate(model, DataLoader(images, batch_size=3))
        >>> scores["n"], scores["balanced_accuracy"]  # the same answer for every image
        (3, 0.5)
    """
    check_loader(loader)
    inner = unwrapped(model)
    if confusion and inner.multi_label:
        raise ValueError(
            "confusion must be False for a multi-label model: an image has no one label to take for another"
        )
    if device is not None:
        inner.to(device)
    weight = next(inner.parameters())
    kind = resolve_precision(precision, weight.device, training=False)
    dtype = dtype_of(kind)
    asked = {"precision": dtype not in (None, weight.dtype) and kind, "compile": compile}
    asked["cuda_graph"] = cuda_graph
    for name in filter(asked.get, asked if model is not inner else ()):
        raise ValueError(f"{name} must be left out for a model in a wrapper, got {asked[name]!r}: pass the model")
    runs = in_type(inner, dtype, weight.device) if asked["precision"] else model
    check_graph(cuda_graph, weight.device, compile=compile)
    if compile:
        runs = compiled(runs)
    with float32_products(kind):
        ranks = join(weight.device) if distributed else Ranks()
        answers = ask(runs, loader, dtype=dtype, ranks=ranks, cuda_graph=cuda_graph)
    return answers.scores(inner.num_classes, confusion=confusion)


def check_loader(loader: Any) -> None:
    """TypeError unless `loader` is a DataLoader."""
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader must be a torch DataLoader, got {type(loader).__name__}")


@torch.no_grad()
def ask(
    forward: Any,
    loader: DataLoader[Any],
    *,
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
    cuda_graph: bool = False,
) -> Answers | SeveralAnswers:
    """The answers of a model, or a wrapper of it, in eval mode to every image of `loader`, cast to `dtype` where there
    is one; see `evaluate`. With `ranks` every process answers for its share, and has the answers of all."""
    ranks = Ranks() if ranks is None else ranks
    loader, shares = rank_loader(loader, ranks, "loader")
    model = unwrapped(forward)
    place, classes, kind = next(model.parameters()).device, model.num_classes, labels_of(model)
    kept: list[tuple[torch.Tensor, ...]] = []
    total = torch.zeros((), dtype=torch.float64)
    with eval_mode(model):
        # what was compiled runs compiled
        seals = isinstance(model, PromptedModel) and "_orig_mod" not in forward._modules
        runs = model.sealed_twin() if seals else forward
        runs = InferenceGraph(runs) if cuda_graph else runs
        for number, batch in enumerate(loader):
            images, labels = images_and_labels(batch)
            labels = kind.read(labels)
            if shares is not None:
                images, labels = (part[: shares.sizes[number][0]] for part in (images, labels))
                if not len(labels):
                    continue
            scores = runs(images.to(place, dtype or images.dtype, non_blocking=True)).double().cpu()
            if scores.shape[1] != classes:
                raise ValueError(f"model must give a score for each of its {classes} classes, got {scores.shape[1]}")
            labels = labels.cpu()
            total += kind.loss(scores, labels)
            kept.append(kind.kept(scores, labels))
    found = ranks.gather(([torch.cat(parts) for parts in zip(*kept)], float(total)))
    whole = [torch.cat(parts) for parts in zip(*(own for own, _ in found if own))]
    if not whole:
        raise ValueError("loader must yield at least one image, it is empty")
    return kind.answers(whole, sum(loss for _, loss in found) / len(whole[0]))
