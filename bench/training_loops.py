"""Whole training loops, each in a process of its own: decoding, augmentation, steps and validation of a few epochs.

    python -m bench.training_loops LOOP JOB

LOOP is "vptm" (`vptm.fit`), "concatenation" (a careful loop on timm's blocks with the prompts concatenated) or "VPT's
loop" (those blocks in the structure that VPT published: the loss is read in every step, and val and test images are
evaluated after every epoch, with all scores on the CPU). JOB is the json of a `Job`. Prints the seconds of every epoch.

All loops read the same pictures through the same transforms and compute the same function; what differs is the loop and
how a step is computed. Decoded pictures are kept by `vptm train` alone, as it does for its users.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vptm
from bench import bench_model
from vptm.training.devices import loader_of

SYNTHETIC = "synthetic"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATED = 256  # images of a batch where nothing is learned, as in `vptm train`


@dataclass(frozen=True)
class Job:
    """What is trained on what.

    backbone: a checkpoint file. data: a folder with train, val and test, or "synthetic" for random tensors, which need
    no decoding. images: of an epoch; half as many are validated, and half as many are test images. options: keywords of
    `vptm.open_model`. precision: of `vptm.fit`; other loops use PyTorch's autocast.
    """

    backbone: str
    data: str
    images: int
    classes: int
    batch: int
    epochs: int
    device: str
    workers: int | None
    precision: str
    options: dict[str, Any]

    def json(self) -> str:
        return json.dumps(asdict(self))


Scores = Callable[[Tensor], Tensor]
Loaders = dict[str, "DataLoader[Any]"]


def _loaders(job: Job, model: Any) -> Loaders:
    if job.data == SYNTHETIC:
        draw = torch.Generator().manual_seed(0)
        size = model.default_cfg["input_size"]
        parts: dict[str, Any] = {}
        for split, count in (("train", job.images), ("val", job.images // 2), ("test", job.images // 2)):
            parts[split] = TensorDataset(torch.randn(count, *size, generator=draw), torch.arange(count) % job.classes)
    else:
        found = vptm.load_data(job.data)
        changed = vptm.transforms(model, train=True, flip=found.flip)
        parts = {
            split: part.with_transform(changed if split == "train" else vptm.transforms(model))
            for split, part in found.parts().items()
        }
    place = torch.device(job.device)
    sizes = {"train": job.batch, "val": EVALUATED, "test": EVALUATED}
    return {
        split: loader_of(part, sizes[split], job.workers, place, shuffle=split == "train")
        for split, part in parts.items()
    }


def _by_vptm(model: Any, loaders: Loaders, job: Job) -> list[float]:
    result = vptm.fit(
        model,
        loaders["train"],
        loaders["val"],
        epochs=job.epochs,
        lr=2e-3,
        weight_decay=0.1,
        device=job.device,
        precision=job.precision,  # type: ignore[arg-type]
        progress=False,
    )
    return [row["seconds"] for row in result.history]


def concatenated(model: Any) -> Scores:
    """Class scores of images by timm's blocks with the prompts concatenated."""
    if model.readout != "mask":  # the blocks of bench_model read a mask row wherever there is a mask token
        model = model.with_parts(mask_token=None)

    def scores(images: Tensor) -> Tensor:
        hidden = bench_model._concatenate(model, images)
        found = bench_model._scores(model, hidden)
        return model.verbalizer(hidden, model.lm_head) if found is hidden else found

    return scores


def _autocast(job: Job) -> AbstractContextManager[Any]:
    dtype = DTYPES[job.precision]
    return nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(job.device).type, dtype)


def _by_concatenation(model: Any, loaders: Loaders, job: Job) -> list[float]:
    model.to(job.device)
    scores, learned = concatenated(model), list(model.trainable_parameters())
    optimiser = torch.optim.AdamW(learned, lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, job.epochs * len(loaders["train"]))
    scaler = torch.amp.GradScaler(torch.device(job.device).type, enabled=job.precision == "fp16")
    taken = []
    for _ in range(job.epochs):
        started = time.perf_counter()
        model.train()
        losses = []
        for images, labels in loaders["train"]:
            images, labels = (part.to(job.device, non_blocking=True) for part in (images, labels))
            with _autocast(job):
                loss = F.cross_entropy(scores(images).float(), labels)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
            schedule.step()
            losses.append(loss.detach())
        assert bool(torch.stack(losses).isfinite().all())
        model.eval()
        right = torch.zeros((), device=job.device)
        with torch.inference_mode(), _autocast(job):
            for images, labels in loaders["val"]:
                images, labels = (part.to(job.device, non_blocking=True) for part in (images, labels))
                right += (scores(images).argmax(1) == labels).sum()
        right.item()
        taken.append(time.perf_counter() - started)
    return taken


def _by_the_published_loop(model: Any, loaders: Loaders, job: Job) -> list[float]:
    model.to(job.device)
    scores, learned = concatenated(model), list(model.trainable_parameters())
    optimiser = torch.optim.SGD(learned, lr=0.05, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(torch.device(job.device).type, enabled=job.precision == "fp16")

    def one_batch(batch: Any, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = batch[0].float().to(job.device, non_blocking=True), batch[1].to(job.device, non_blocking=True)
        with torch.set_grad_enabled(train), _autocast(job):
            found = scores(images)
            loss = F.cross_entropy(found.float(), labels)
            if loss == float("inf") or torch.isnan(loss).any():
                raise ArithmeticError("the loss is not finite")
        if train:
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
        return loss, found

    taken = []
    for _ in range(job.epochs):
        started = time.perf_counter()
        model.train()
        for batch in loaders["train"]:
            one_batch(batch, True)[0].item()
        model.eval()
        for split in ("val", "test"):
            every, labels = [], []
            for batch in loaders[split]:
                every.append(one_batch(batch, False)[1])
                labels.extend(batch[1].numpy())
            answers = torch.cat(every).float().cpu().numpy().argmax(1)
            sum(int(answer == label) for answer, label in zip(answers, labels))
        taken.append(time.perf_counter() - started)
    return taken


LOOPS: dict[str, Callable[[Any, Loaders, Job], list[float]]] = {
    "vptm": _by_vptm,
    "concatenation": _by_concatenation,
    "VPT's loop": _by_the_published_loop,
}


def seconds_of_epochs(loop: str, job: Job) -> list[float]:
    """Seconds of every epoch of a job: its steps and its validation."""
    torch.manual_seed(0)
    model = vptm.open_model(Path(job.backbone), job.classes, **job.options)
    return LOOPS[loop](model, _loaders(job, model), job)


if __name__ == "__main__":
    print(json.dumps(seconds_of_epochs(sys.argv[1], Job(**json.loads(sys.argv[2])))))
