"""Prompts that start as tokens of the frozen model (SPT, arXiv:2402.02382).

The published code forwards the whole training set to draw a few tokens of it. Here the (image, token) pairs are drawn
first and only the images they name are forwarded: the same distribution, with at most layers x prompts images. That
code also scores every epoch on test images and keeps the best, and carries an average of weights that nothing reads;
`vptm.fit` chooses by validation images, and has no such average.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate, default_convert

from vptm.frozen.modes import eval_mode
from vptm.messages import one_of
from vptm.models.prompted_model import PromptedModel
from vptm.models.prompts import TOKEN_ROWS
from vptm.settings import PromptStart
from vptm.terminal import progress_bar
from vptm.training.seeding import generators_kept, seed_everything

if TYPE_CHECKING:
    from rich.progress import Progress

INIT_METHODS = get_args(PromptStart)[1:-1]  # the first is the one without images, the last vptm.init_vipamin's
_IMAGES_PER_STEP = 8  # tokens of 12 layers of ViT-B for 8 images are 58 MB


def layer_tokens(model: PromptedModel, images: Tensor, layers: list[int]) -> list[Tensor]:
    """What the un-prompted frozen backbone feeds each of `layers`, class token excluded, un-normalised.

    Args:
        images: (B, channels, height, width), normalised.
        layers: ascending block numbers. Block 0 is fed the patch projection, before position embeddings; block l the
            output of block l - 1.

    Returns:
        One (B, N, C) tensor per layer.
    """
    backbone = model.backbone
    # a backbone of dynamic size keeps rows and columns apart
    found = [backbone.patch_embed(images).flatten(1, -2)] if 0 in layers else []
    if later := [layer - 1 for layer in layers if layer > 0]:
        found += backbone.forward_intermediates(
            images, indices=later, norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
    return found


def pooling_windows(tokens: int, slots: int) -> list[slice]:
    """Contiguous windows that cover all tokens once: the published ones where they do, nearly equal ones elsewhere.

    The released code pools windows of `tokens // (slots - 1)` and what is left over in the last slot. Where nothing is
    left over its last slot pools every token, where more than a window is left over it drops tokens, and with more
    slots than tokens it divides by zero; all three are divided evenly here.

    Example:
        >>> [window.stop - window.start for window in pooling_windows(10, 4)]
        [3, 3, 3, 1]
    """
    slots = min(slots, tokens)
    width = tokens // (slots - 1) if slots > 1 else tokens
    if slots > 1 and 0 < tokens - width * (slots - 1) <= width:
        edges = [*range(0, width * slots, width), tokens]
    else:
        edges = [slot * tokens // slots for slot in range(slots + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


@torch.no_grad()
def init_prompts(
    model: PromptedModel,
    loader: DataLoader[Any],
    method: str = "random",
    *,
    images: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> int:
    """Start the prompts of every layer from the tokens that the un-prompted frozen model feeds that layer.

    Draws `images` training images with replacement (each draw has an augmentation of its own), then per layer,
    independently:

    - "random": P distinct tokens, uniformly;
    - "mean", "max": P distinct (image, window) pairs, uniformly; each pools the tokens of its window, see
      `pooling_windows`;
    - "kmeans": the P centres of the tokens of all drawn images (then without replacement), by scikit-learn's
      MiniBatchKMeans over a stream.

    Memory does not depend on the size of the training set. All but "kmeans" forward at most layers x P images.

    Args:
        model: its `prompts` are overwritten, P rows for every layer that holds prompts of its own.
        loader: training images under the training augmentation, over a data set that can be indexed; its batch size
            and order are not used.
        method: "random" (the authors' choice), "mean", "max" or "kmeans".
        images: number of images drawn; None draws as many as the data set has. 1 is the authors' choice for MoCo.
        seed: of draws, augmentation and k-means; the global generators are left as they were.
        progress: a progress bar on stderr.

    Returns:
        Number of images forwarded.

    Raises:
        ValueError: unknown method, more prompts than tokens, prompts that are no tokens (projected or added ones), an
            empty data set, images of another size, or tokens that are not finite. The prompts are then unchanged.
        TypeError: the loader's data set cannot be indexed, or does not give (image, label).
        RuntimeError: the original weights were dropped by `freeze_for_inference()`.

    Example:
        >>> import vptm
        >>> model = vptm.PromptedBEiT("builtin", num_classes=10, prompt_mode="deep", prompt_length=5)
        >>> data = torch.utils.data.TensorDataset(torch.rand(50, 1, 28, 28), torch.arange(50) % 10)
        >>> init_prompts(model, DataLoader(data), progress=False) <= model.prompts.weight[..., 0].numel()
        True
    """
    one_of("method", method, INIT_METHODS)
    size, bank = check_start(model, loader, seed, "init_prompts"), model.prompts
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
        raise ValueError(f"images must be an integer >= 1 or None, got {images!r}")
    count = images or size
    if method == "kmeans":
        count = min(count, size)
    windows = pooling_windows(model.num_patches, bank.length) if method in ("mean", "max") else None
    rows = count * (model.num_patches if windows is None else len(windows))
    if rows < bank.length:
        raise ValueError(
            f"prompt_length must be at most the number of available tokens, got {bank.length} prompts for {rows} "
            f"tokens of {count} images"
        )
    generator = np.random.default_rng(seed)
    with generators_kept(loader, None), eval_mode(model), progress_bar(progress) as bar:
        seed_everything(seed, 0, loader, None)
        if method == "kmeans":
            prompts, forwarded = _centres(model, loader, generator.permutation(size)[:count], seed, bar)
        else:
            drawn = generator.integers(size, size=count)
            prompts, forwarded = _sampled(model, loader, drawn, windows, method, generator, bar)
    if not bool(prompts.isfinite().all()):
        raise ValueError("tokens must be finite, got NaN or infinite values from the frozen model")
    bank.weight.copy_(prompts)
    return forwarded


def check_start(model: PromptedModel, loader: DataLoader[Any], seed: int, action: str) -> int:
    """The number of images to draw from, where prompts can start at what a model makes of them."""
    model._refuse_dropped(action)
    if not model.prompts.holds_tokens:
        raise ValueError(f"{action} needs {TOKEN_ROWS}, got {model.prompts.described()}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise TypeError("loader must be a torch DataLoader over a data set that can be indexed")
    size = len(loader.dataset)  # type: ignore[arg-type]
    if size == 0:
        raise ValueError("loader must hold at least one image, it is empty")
    return size


def layers_of(model: PromptedModel) -> list[int]:
    """The block each row of the bank is for; a shared prompt starts as the first block's tokens."""
    return list(model.prompts.blocks)[: len(model.prompts.weight)]


def _sampled(
    model: PromptedModel,
    loader: DataLoader[Any],
    drawn: np.ndarray,
    windows: list[slice] | None,
    method: str,
    generator: np.random.Generator,
    bar: Progress,
) -> tuple[Tensor, int]:
    """Rows (layers, P, C) chosen before anything is computed, and the number of images they named."""
    layers, length = layers_of(model), model.prompts.length
    per_image = model.num_patches if windows is None else len(windows)
    # one row per layer: numbers of (draw, token or window) pairs
    pairs = np.stack([generator.choice(len(drawn) * per_image, length, replace=False) for _ in layers])
    named = np.unique(pairs // per_image)
    prompts = torch.empty_like(model.prompts.weight)
    position = 0
    for batch in tracked(batches_at(model, loader, drawn[named]), bar, len(named)):
        tokens = layer_tokens(model, batch, layers)
        place = {int(draw): row for row, draw in enumerate(named[position : position + len(batch)])}
        for layer, chosen in enumerate(pairs):
            for prompt, pair in enumerate(chosen):
                if (row := place.get(int(pair) // per_image)) is None:
                    continue
                if windows is None:
                    prompts[layer, prompt] = tokens[layer][row, int(pair) % per_image]
                else:
                    window = tokens[layer][row, windows[int(pair) % per_image]]
                    prompts[layer, prompt] = window.mean(dim=0) if method == "mean" else window.amax(dim=0)
        position += len(batch)
    return prompts, len(named)


def _centres(
    model: PromptedModel, loader: DataLoader[Any], drawn: np.ndarray, seed: int, bar: Progress
) -> tuple[Tensor, int]:
    """Cluster centres (layers, P, C) of the tokens of each layer, one pass over the images."""
    from sklearn.cluster import MiniBatchKMeans

    layers, length = layers_of(model), model.prompts.length
    clusters = [
        MiniBatchKMeans(length, random_state=(seed + layer) % 2**32, n_init=1, compute_labels=False) for layer in layers
    ]
    weight = model.prompts.weight
    smallest = -(-length // model.num_patches)  # the first batch must hold a token for every centre
    for batch in tracked(batches_at(model, loader, drawn, max(_IMAGES_PER_STEP, smallest)), bar, len(drawn)):
        for cluster, tokens in zip(clusters, layer_tokens(model, batch, layers)):
            rows = tokens.flatten(0, 1).float()
            if not bool(rows.isfinite().all()):
                raise ValueError("tokens must be finite, got NaN or infinite values from the frozen model")
            cluster.partial_fit(rows.cpu().numpy())
    return torch.from_numpy(np.stack([cluster.cluster_centers_ for cluster in clusters])).to(weight), len(drawn)


def batches_at(
    model: PromptedModel, loader: DataLoader[Any], indices: np.ndarray, size: int = _IMAGES_PER_STEP
) -> Iterator[Tensor]:
    """Images of the loader's data set at `indices`, in that order, as its workers and collate function make them."""
    chosen = Subset(loader.dataset, indices.tolist())
    # a loader that makes no batches of its own only converts samples
    collate = (
        default_collate if loader.batch_size is None and loader.collate_fn is default_convert else loader.collate_fn
    )
    for batch in DataLoader(chosen, batch_size=size, num_workers=loader.num_workers, collate_fn=collate):
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[0], Tensor):
            raise TypeError(f"loader must give (images, labels), got {type(batch).__name__}")
        images = batch[0].to(model.prompts.weight.device)
        model.check_images(images)
        yield images


def tracked(batches: Iterator[Tensor], bar: Progress, total: int) -> Iterator[Tensor]:
    """`batches`, with the images forwarded on `bar`."""
    task = bar.add_task("starting prompts from tokens", total=total, note="")
    for batch in batches:
        yield batch
        bar.advance(task, len(batch))
