"""Training with plain DataLoaders; a run folder survives a kill at any moment and resumes bitwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vptm.data.split_list import SplitList
from vptm.frozen.modes import checkpointing
from vptm.models.adapter_saving import unwrapped
from vptm.models.prompted_model import PromptedModel
from vptm.settings import Precision, Schedule, TrainSettings
from vptm.training.batches import images_and_labels
from vptm.training.callbacks import Callback
from vptm.training.checks import check_data, check_loaders, check_model, check_settings, check_together
from vptm.training.evaluate import ask
from vptm.training.graphs import check_graph
from vptm.training.groups import relative_rate
from vptm.training.label_kinds import labels_of
from vptm.training.objective import make_objective
from vptm.training.precision import dtype_of, float32_products, in_type, resolve_precision, slow_note
from vptm.training.progress import Pace, TrainProgress
from vptm.training.ranks import RankBatches, join, local_device, rank_loader
from vptm.training.run_folder import Run, listed_images, run_identity
from vptm.training.scores import not_validated
from vptm.training.seeding import generators_kept, seed_everything
from vptm.training.step import TrainStep
from vptm.training.streams import epoch_batches, epoch_steps

_STEPS_PER_CHECK = 50


@dataclass
class FitResult:
    """What `fit` did. The model holds the state of `best_epoch` (0: as it was given) when `fit` returns.

    `history` has one mapping per finished epoch with the columns of `metrics.csv`; accuracies are shares in 0..1.
    `stopped` says why a run was done before its last epoch, None where it was not. `best_val_map` is the mean average
    precision of a multi-label model, which has no accuracy. `pace` is how fast it trained and what share of the time it
    waited for data, None of a run of up to two steps.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_val_accuracy: float | None = None
    interrupted: bool = False
    run_dir: Path | None = None
    stopped: str | None = None
    best_val_map: float | None = None
    pace: Pace | None = None


def fit(
    model: PromptedModel,
    train: DataLoader[Any],
    val: DataLoader[Any] | None = None,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
    schedule: Schedule = "cosine",
    warmup_epochs: int = 0,
    label_smoothing: float = 0.0,
    class_weights: str | Sequence[float] | None = None,
    protoverb_weight: float = 0.0,
    reformation: float = 0.0,
    reformation_temperature: float = 1.0,
    cache_frozen: bool = False,
    prompt_weight_decay: float | None = None,
    head_weight_decay: float | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    info: Mapping[str, Any] | None = None,
    images: SplitList | None = None,
    steps_per_epoch: int | None = None,
    callbacks: Sequence[Callback] = (),
    precision: Precision | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    lr_of: Mapping[str, float] | None = None,
    relative_prompt_lr: bool = False,
    weight_decay_of: Mapping[str, float] | None = None,
    ema: float | None = None,
    early_stopping: int | None = None,
    val_every: int = 1,
    grad_checkpointing: bool = False,
) -> FitResult:
    """Train what `model` leaves unfrozen by cross-entropy, and keep the epoch that is best on `val`.

    Best is the highest validation accuracy, then the lowest validation loss, then the earliest; without `val`, and
    until it is first looked at, it is the last epoch. Optimiser and per-step learning-rate schedule (from `lr` to 0)
    come from timm, with `model.no_weight_decay()` respected. A model with `multi_label=True` is trained by binary
    cross-entropy, and mean average precision takes the place of accuracy.

    With `precision` a copy of the model in that type is trained, once cast, and the model takes what it learned at the
    end. What is learned in float16 or bfloat16, by such a copy or a model of that type, is learned as float32 copies,
    from which those that compute are rounded after every step: in 16 bits Adam divides by a zero and small steps are
    lost. With float16 the loss is scaled (`torch.amp.GradScaler`), so that small gradients are not lost either.

    torch's, numpy's and Python's global generators, and those of the loaders, are seeded from (seed, epoch) at the
    start of every epoch and put back at the end, so a resumed run equals an uninterrupted one bitwise on one machine.
    Loaders with `persistent_workers=True` keep generators of their own and do not have this property.

    In the processes that `torchrun` or `accelerate launch` start, all of which call it, each computes its share of
    every batch: `train` and `val` are the same in all, with the batches of one process, whose losses they repeat up to
    rounding. The first process writes the run folder. It needs Accelerate.

    Args:
        model: see `vptm.PromptedBEiT`, or one inside `torch.compile`; trained in place.
        train, val: yield (images (B, C, H, W) float, labels (B,) integers in 0..K-1), and anything after them, or a
            mapping with `pixel_values` and `labels`. Labels of `train` may be shares (B, K) of the classes, as MixUp
            and CutMix make them. Those of a multi-label model are (B, K) of 0 and 1, of any type.
        epochs: number of passes over `train`.
        lr: peak learning rate.
        weight_decay: for matrices; vectors and `no_weight_decay()` have none.
        optimizer: a timm optimiser name.
        schedule: "cosine", "tanh", "none", or a published one: "vpt", "spt", "provp", see
            `vptm.training.schedules.published_rate`.
        warmup_epochs: part of `epochs`; linear from 1 % of `lr` unless a published schedule says otherwise.
        label_smoothing: of the cross-entropy, in [0, 1).
        class_weights: of the classes in the cross-entropy of training: "balanced" is N / (K * images of the class), as
            scikit-learn has it; or K numbers > 0. A batch is divided by the sum of its weights, as
            `F.cross_entropy(weight=...)` does. None weighs all alike. Validation is not weighted.
        protoverb_weight: of `vptm.training.losses.protoverb_loss` of a batch, added to its cross-entropy (and to the
            reported train loss); needs the prototypical verbalizer. `vptm.fit_prototypes` trains by it alone, later.
        reformation: lambda of ProVP-Ref's contrast with the features of the frozen model, see
            `vptm.training.reformation.FeatureReformation`, added to the cross-entropy; 1 in the published code.
        reformation_temperature: of that contrast.
        cache_frozen: compute the frozen features of an image once; for training without augmentation.
        prompt_weight_decay: of prompts, None for none.
        head_weight_decay: of the verbalizer's matrices, None for `weight_decay`.
        run_dir: folder for the adapter, `metrics.csv`, `curves.png`, `run.json`, `split.csv` and, until the run is
            finished, the state to resume from; every file is replaced by a rename at the end of an epoch. None writes
            nothing.
        resume: continue the run in `run_dir`; every argument that changes the result must be as it was, but that there
            may be more `epochs`, or a longer `early_stopping`. The epochs that are left then have the learning rates
            that a run of so many epochs has there. Of a finished run without them the best epoch is loaded, and nothing
            trained.
        overwrite: replace the run in `run_dir`; files of other names stay.
        seed: of data order, augmentation and dropout.
        device: where to train; None stays on the model's device.
        progress: a progress bar and a line per epoch on stderr.
        info: JSON-able facts to add to `run.json`.
        images: what the run is trained, validated and tested on, kept in `split.csv`; a run that is resumed must have
            been started on the same. None lists those of `train` and `val`, where they are `ImageDataset`s.
        steps_per_epoch: batches of a stream (an `IterableDataset`) that make an epoch, where it has no length. It is
            begun again for every epoch, its `set_epoch(epoch)` called first where it has one, and where it ends before.
        callbacks: told of every step and epoch and of the end, see `vptm.training.callbacks.Callback`.
        precision: what computes: "fp32", "tf32", "bf16", "fp16", or "auto", which is bf16 on a GPU that has it and fp32
            elsewhere; images are cast to it. None computes in the model's own type, which images must have. A GPU needs
            compute capability 8.0 for tf32 and bf16; fp16 is trained on GPUs only.
        compile: `torch.compile` the step's forward, without graph breaks, once for all batch sizes
            (and once more for a batch of one image).
        cuda_graph: record what a GPU does for the scores of a batch and their gradients, once for the size of the first
            batch, and replay it; batches of other sizes, loss, optimiser and validation run without.
        accumulate: parts that every batch is computed in, one after the other, for a part of the memory: gradients add
            up to those of the whole batch. It divides the batch size.
        clip_norm: longest gradient of a step over all that is learned; longer ones are scaled to it. None takes any.
        lr_of: peak learning rates of groups of learned tensors, which follow the schedule in proportion; 0 leaves a
            group as it is, others have `lr`. Groups are "prompts" (with their projection and bias), "gate",
            "alpha", "verbalizer", "temperature", "mask_token", "lm_head" and "backbone", those of them that the model
            learns.
        relative_prompt_lr: multiply the rate of prompts by `model.prompts.relative_size()` at the start, their root
            mean square over that of uniform ones: prompts that start as tokens are about ten times longer, and an
            optimiser whose steps are as long as the rate, as Adam's, moves them that much less. A resumed run keeps
            its rate, which `run.json` has as `prompt_lr`.
        weight_decay_of: weight decays of such groups: of their matrices, and all of prompts, gates, alpha, mask token
            and temperature (whose logarithm decays, to a temperature of 1), which otherwise have none. "prompts" and
            "verbalizer" stand for `prompt_weight_decay` and `head_weight_decay`.
        ema: decay, in (0, 1), of an average of what is learned over the steps, see
            `vptm.training.averaging.Average`: what is validated, kept and left in the model is the average. None for
            what the last step came to.
        early_stopping: stop after so many epochs in a row of which none was better on `val` than one before. None
            trains all `epochs`.
        val_every: epochs from one validation to the next; the last epoch is validated, too. Epochs between have no
            numbers of `val` in `metrics.csv`, and neither become the best nor stop the run. Of few training images
            validation can be the larger part of an epoch.
        grad_checkpointing: keep the input of every block alone for backward and compute the block again there, as
            `model.set_grad_checkpointing()` does: bitwise the same gradients. False leaves the model as that set it.

    Returns:
        A `FitResult`; after Ctrl-C it has `interrupted=True` and the run folder is complete and can be resumed. A
        process that ignores SIGINT, as a shell starts what runs in its background, is not stopped by it: end such a
        run with SIGTERM, and resume it.

    Raises:
        ValueError: an argument out of range, labels outside 0..K-1, an existing run folder, nothing to resume, a state
            that is damaged, or a folder that cannot be written; all before anything is trained.
        WriteError: an OSError that names the file of the run folder that could not be written on the way.
        FloatingPointError: the loss became NaN or infinite; the run folder keeps the best epoch before.

    Example:
        >>> model = PromptedBEiT("builtin", num_classes=10)
        >>> images = torch.utils.data.TensorDataset(torch.randn(20, 1, 28, 28), torch.arange(20) % 10)
        >>> fit(model, DataLoader(images, batch_size=10, shuffle=True), epochs=1, lr=1e-3, progress=False).best_epoch
        1
    """
    settings = TrainSettings.of(locals())
    check_settings(settings)
    check_loaders(train, val, settings)
    steps = epoch_steps(train, steps_per_epoch)
    inner = unwrapped(model)
    place = next(inner.parameters()).device if device is None else local_device(torch.device(device))
    check_graph(settings.cuda_graph, place)
    ranks = join(place)
    check_together(settings, train, val, ranks, wrapped=model is not inner)
    kind = resolve_precision(settings.precision, place, training=True)
    work = _working_model(model, dtype_of(kind), place, settings)
    check_model(inner, settings)
    labels = check_data(inner, train, "train", cast=kind is not None, shares=not settings.protoverb_weight)
    if val is not None:
        check_data(inner, val, "val", cast=kind is not None, shares=False)
    # a model that has the type anyway is trained the same without a word
    settings = replace(settings, precision=None if work is model and kind != "tf32" else kind)
    identity = run_identity(inner, settings, train, steps, labels)
    step = TrainStep(
        work,
        inner,
        settings,
        objective=make_objective(settings, labels, inner),
        dtype=dtype_of(kind),
        steps=steps,
        ranks=ranks,
        cache_frozen=cache_frozen,
    )
    with Run(inner, step, identity, None if run_dir is None or ranks.index else Path(run_dir)) as run:
        if images is None and run_dir is not None:
            images = listed_images(train, val)
        run.join(ranks, resume=resume, overwrite=overwrite, images=images, settings=settings, info=info)
        progress = progress and ranks.index == 0
        if progress:
            for line in filter(None, (slow_note(kind, place), _opening(run, step, steps))):
                print(line, file=sys.stderr, flush=True)
        bar = TrainProgress(progress, epochs=epochs, done=run.epoch, steps=steps)
        feed = _Feed(*rank_loader(train, ranks, "train"), steps, bar, [] if ranks.index else list(callbacks))
        interrupted = False
        try:
            again = checkpointing(step.model, grad_checkpointing)
            with generators_kept(train, val), float32_products(kind), again, bar:
                while run.left:
                    epoch = run.epoch + 1
                    seed_everything(seed, epoch, train, val)
                    if feed.shares is not None:
                        feed.loader.generator.manual_seed(torch.initial_seed() + ranks.index)
                    run.finish_epoch(_epoch(step, feed, val, epoch))
                    bar.epoch(run.history[-1])
                    for callback in feed.told:
                        callback.epoch(run.history[-1])
        except KeyboardInterrupt:
            interrupted = True
            run.catch_up()
        except FloatingPointError:
            inner.load_learned_state_dict(run.best_state)
            raise
        finally:
            inner.to(place)
        run.end(finished=not interrupted)
        if progress and run.stopped and not interrupted:
            print(f"stopped after epoch {run.epoch} of {epochs}: {run.stopped}", file=sys.stderr, flush=True)
        for callback in feed.told:
            callback.end(run.history, interrupted=interrupted)
        best = None if run.best_score is None else run.best_score[0]
        accuracy, mean_precision = (None, best) if inner.multi_label else (best, None)
        return FitResult(
            run.history,
            run.best_epoch,
            accuracy,
            interrupted,
            run.folder,
            run.stopped,
            best_val_map=mean_precision,
            pace=bar.pace,
        )


def _working_model(model: Any, dtype: torch.dtype | None, device: torch.device, settings: TrainSettings) -> Any:
    """What is trained: the model itself, or a copy in another type."""
    inner = unwrapped(model)
    if model is inner:
        return in_type(inner, dtype, device)
    asked = {"precision": dtype not in (None, next(inner.parameters()).dtype), "compile": settings.compile}
    asked["cuda_graph"] = settings.cuda_graph
    for name in filter(asked.get, asked):
        value = getattr(settings, name)
        raise ValueError(f"{name} must be left out for a model in a wrapper, got {value!r}: pass the model itself")
    inner.to(device)
    return model


def _opening(run: Run, step: TrainStep, batches: int) -> str:
    """What is said before the first step."""
    if not run.left:
        return f"run {run.folder} is finished after {run.epoch} epochs, the best was {run.best_epoch}: nothing to train"
    model = step.model
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    rate = relative_rate(step.optimiser, step.settings.lr)
    learning = "" if rate is None else f", prompts at a rate of {rate:.3g}"
    return (
        f"training {trained:,} of {total:,} parameters, {model.num_classes} classes, {batches} batches an epoch, "
        f"on {next(model.parameters()).device}{step.masters.note()}{learning}"
    )


class _Feed(NamedTuple):
    """What an epoch is trained on, and who is told of it; `shares` of one of several processes, `steps` in an epoch."""

    loader: DataLoader[Any]
    shares: RankBatches | None
    steps: int
    bar: TrainProgress
    told: list[Callback]


def _epoch(step: TrainStep, feed: _Feed, val: DataLoader[Any] | None, epoch: int) -> dict[str, Any]:
    """Train one epoch, and validate where it is due: its row of `metrics.csv`."""
    started = time.perf_counter()
    train_loss, train_accuracy = _train_epoch(step, feed, epoch)
    answers = None
    settings = step.settings
    if val is not None and (epoch % settings.val_every == 0 or epoch == settings.epochs):
        with step.average.in_model():
            answers = ask(step.forward, val, dtype=step.dtype, ranks=step.ranks)
    return {
        "epoch": epoch,
        "lr": step.lr,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        **(not_validated(step.model.multi_label) if answers is None else answers.row()),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _train_epoch(step: TrainStep, feed: _Feed, epoch: int) -> tuple[float, float | None]:
    """Mean loss over the images of an epoch, and the share that was right, each before the step on its batch; no share
    of a multi-label model."""
    model, loader, shares, kind = step.model, feed.loader, feed.shares, labels_of(step.model)
    place = next(model.parameters()).device
    model.train()
    losses: list[Tensor] = []
    sizes: list[int] = []
    correct = torch.zeros((), dtype=torch.int64, device=place)
    summed, seen, first = 0.0, 0, 1
    asked = time.perf_counter()
    for number, batch in enumerate(epoch_batches(loader, feed.steps), 1):
        waited = time.perf_counter() - asked
        images, labels = images_and_labels(batch, "train")
        labels = kind.learned(labels).to(place, non_blocking=True)
        images = images.to(place, step.dtype or images.dtype, non_blocking=True)
        own, every = (len(labels), len(labels)) if shares is None else shares.sizes[number - 1]
        so_far = (epoch - 1) * feed.steps + number - 1
        loss, scores = step(images, labels, so_far, own / every)
        losses.append(loss)
        sizes.append(every)
        if (hits := step.objective.hits(scores, labels)) is not None:
            correct += hits[:own].sum()
        feed.bar.step(every, waited)
        for callback in feed.told:
            callback.step(so_far, loss, step.lr)
        if len(losses) == _STEPS_PER_CHECK or number == feed.steps:
            # one transfer for many steps: reading every loss would stall a GPU
            values = step.ranks.sum(torch.stack(losses).double()).cpu()
            _check_losses(values, step, epoch, first)
            summed += float((values * torch.tensor(sizes, dtype=torch.float64)).sum())
            seen += sum(sizes)
            losses, sizes, first = [], [], number + 1
        asked = time.perf_counter()
    if seen == 0:
        raise ValueError("train must yield at least one batch, it is empty")
    return summed / seen, None if model.multi_label else int(step.ranks.sum(correct)) / seen


def _check_losses(losses: Tensor, step: TrainStep, epoch: int, first: int) -> None:
    """FloatingPointError where a loss is NaN or infinite; `losses[0]` is that of step `first` of the epoch."""
    bad = (~torch.isfinite(losses)).nonzero()
    if not bad.numel():
        return
    half = any(parameter.dtype == torch.float16 for parameter in step.model.parameters())
    narrow = "train in bfloat16 or float32, as float16 ends at 65504, " if half else ""
    raise FloatingPointError(
        f"loss became {losses[int(bad[0])].item()} at epoch {epoch}, step {first + int(bad[0])} with "
        f"lr {step.lr:.3g}: {narrow}use a lower lr or look for extreme pixel values"
    )
