"""One frozen backbone, thousands of tasks: what each learned, kept so that one batch may mix them all."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vptm.frozen.folded import Folded, PooledPrefix, Sealed
from vptm.messages import hint, one_of
from vptm.models.adapter_loading import load_on
from vptm.models.opening import open_model
from vptm.models.prompted_model import PromptedModel
from vptm.serving.batch_prompts import BatchPrompts, mixing_blocks, schedule
from vptm.serving.pool import Pool
from vptm.serving.readouts import Readout, readout_of
from vptm.serving.thresholds import check_threshold, threshold_of
from vptm.settings import THRESHOLD
from vptm.weights.files import weight_hash
from vptm_kernels import FoldedHead, prototype_cosine

WHEN_FULL = ("refuse", "evict")
# What a pool may hold beyond its tasks, as a share of them: so often it is copied while it grows.
_SLACK = 32
# Pools of prompts: of tasks without gates, and of those whose prompts have some.
_KEYS_VALUES, _GATED = "keys and values", "keys, values and gates"


class TaskInfo(NamedTuple):
    """What a bank says of a task: its classes and their names, where known; its prompts; what it takes in memory, in
    bytes; how pictures are made into its images, for `vptm.transforms`; and of a task with several labels an image the
    least probability of a label, None of any other."""

    num_classes: int
    class_names: tuple[str, ...] | None
    prompt_length: int
    prompt_mode: str
    memory: int
    default_cfg: Mapping[str, Any]
    threshold: float | None


@dataclass(frozen=True)
class _Task:
    """A task as it was when it was added.

    group: what its images run with, and frame: what that runs on. prompts: its range of `pool`, of keys and values.
    rows: prompts that run as rows, and alpha: of its blocks that mix. model: of its own, where neither is exact. dim,
    head, classes: its head, and its range of prototypes, among those of d = dim. outside: bytes that are in no pool.
    """

    info: TaskInfo
    group: Hashable
    frame: Hashable
    readout: Readout
    outside: int
    pool: str = _KEYS_VALUES
    prompts: tuple[int, int] = (0, 0)
    rows: Tensor | None = None
    alpha: Tensor | None = None
    model: PromptedModel | None = None
    dim: int = 0
    head: int = 0
    classes: tuple[int, int] = (0, 0)


class _Frame(NamedTuple):
    """A model of one kind, whatever its prompts, and the constants it runs on."""

    model: PromptedModel
    folded: Folded


class _Snapshot(NamedTuple):
    """All that a prediction reads, as it is from one edit of the bank to the next."""

    version: int
    tasks: Mapping[str, _Task]
    pools: Mapping[Hashable, tuple[Tensor, ...]]
    frames: Mapping[Hashable, _Frame]


class TaskBank:
    """Many tasks on one frozen backbone, predicted together: every image of a batch may belong to another.

    A task is what was learned and saved as an adapter, as it was when it was added: a later edit of the model it came
    from changes nothing here. Deep prompts are held as the keys and values they become, in one pool in which each task
    takes as many rows as it has prompts, and those with gates in another; token head and projection are held as one
    map, prototypes as unit rows. Tasks whose prompts run as rows (shallow, progressive) share a batch with those that
    have as many and use them alike; what fits neither form (prompts with a bias of their own, added to patches, or
    averaged by the read-out; gates of rows; a mask token that learned) runs task by task, on the same frozen weights.
    Tasks whose images have one label and tasks whose images have several stand side by side: scores of the first are
    logits of a softmax, of the second of sigmoids.

    Any number of threads may call any method at any time: a prediction reads the bank as it was when it began.

    Args:
        backbone: what `vptm.open_model` takes, or a model of vptm's. The bank holds its weights, and folded copies.
        memory_limit: bytes that tasks may take, None for no limit. While predictions run on what a pool was before it
            grew, that is there as well.
        when_full: "refuse" a task that does not fit, or "evict" those that were not predicted for longest.
        impl: "auto", "triton" or "torch".
        device, dtype: where tasks run, and in which type; None for those of the backbone. Adapters are checked against
            the weights as they were before.
        threshold: least probability of a label of tasks with `multi_label=True` that are added without one.
        settings: further settings of `vptm.open_model` that say what the backbone is, such as `img_size`.

    Attributes:
        device, dtype: of images and scores.
        threshold: as given.

    Raises:
        ValueError: a backbone that does not run folded, an option outside its set.
        RuntimeError: a model whose weights `freeze_for_inference` dropped, with which no task can be compared.

    Example:
        >>> bank = TaskBank("builtin")
        >>> bank.add("clothes", vptm.PromptedBEiT("builtin", num_classes=10, prompt_mode="deep"))
        >>> bank.add("shoes", vptm.PromptedBEiT("builtin", num_classes=3, prompt_length=4))
        >>> bank.predict(torch.zeros(2, 1, 28, 28), tasks=["shoes", "clothes"]).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        backbone: Any,
        *,
        memory_limit: int | None = None,
        when_full: str = "refuse",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        threshold: float = THRESHOLD,
        **settings: Any,
    ) -> None:
        self.threshold = check_threshold(threshold)
        one_of("when_full", when_full, WHEN_FULL)
        if memory_limit is not None and (
            isinstance(memory_limit, bool) or not isinstance(memory_limit, int) or memory_limit < 1
        ):
            raise ValueError(f"memory_limit must be bytes >= 1 or None, got {memory_limit!r}")
        if impl == "reference":
            raise ValueError("impl must be one of auto, triton, torch for a TaskBank, got 'reference'")
        if isinstance(backbone, PromptedModel):
            if settings:
                raise TypeError(f"a model is taken as it is, got {sorted(settings)[0]}=")
            backbone._refuse_dropped("a TaskBank")
            model = backbone.without_prompts()
        else:
            model = open_model(backbone, 1, prompt_length=0, **settings)
        self._source = model.eval()
        weight = model.backbone.patch_embed.proj.weight
        place = torch.device(weight.device if device is None else device)
        if place != weight.device or dtype not in (None, weight.dtype):
            model = copy.deepcopy(model).to(device=place, dtype=weight.dtype if dtype is None else dtype)
        model.impl = impl
        self._model = model
        folded = model.folded_constants()
        if folded is None:
            raise ValueError(f"a TaskBank needs a backbone that runs folded, got {model.why_unfolded()}")
        self._folded = folded
        self._weight = model.backbone.patch_embed.proj.weight
        self.device, self.dtype = self._weight.device, self._weight.dtype
        self.memory_limit = memory_limit
        self.when_full = when_full
        self._changing = threading.Condition()
        self._snapshot = _Snapshot(0, {}, {}, {})
        self._pools: dict[Hashable, Pool] = {}
        self._frames: dict[Hashable, _Frame] = {}
        self._outside = 0  # bytes of tasks that are in no pool
        self._clock = 0
        self._used: dict[str, int] = {}  # when a task was last predicted
        self._readers: list[int] = []  # versions that predictions read
        # ranges of removed tasks, (version, pool, start, length): nobody reads them from that version on
        self._returned: list[tuple[int, Hashable, int, int]] = []

    @property
    def names(self) -> list[str]:
        """Of all tasks, in the order in which they were added."""
        return list(self._snapshot.tasks)

    def __len__(self) -> int:
        return len(self._snapshot.tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._snapshot.tasks

    @property
    def memory(self) -> int:
        """Bytes that tasks take, with what pools keep for the next: up to 1/32 of them, and what was removed since."""
        with self._changing:
            return self._reserved()

    def info(self, name: str) -> TaskInfo:
        """What is known of a task."""
        return _named(self._snapshot, name).info

    def add(self, name: str, adapter: str | Path | PromptedModel, *, threshold: float | None = None) -> None:
        """Add a task.

        Args:
            name: of the task, not in use.
            adapter: a folder that `vptm.save_adapter` or `vptm train` wrote, or a model; on the weights of this bank.
            threshold: least probability of a label of a model with `multi_label=True`; None is the bank's.

        Raises:
            ValueError: a name in use, another backbone or image size, a threshold of a model of one label an image, or
                what `vptm.load_adapter` refuses.
            MemoryError: the task does not fit below `memory_limit`, also where all others were evicted.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a string that is not empty, got {name!r}")
        if name in self._snapshot.tasks:
            raise ValueError(f"name must not be in use, got {name!r}: remove it first")
        given = adapter if isinstance(adapter, PromptedModel) else load_on(self._source, adapter)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            model = self._own(name, given)
            task, wanted = self._task(model, threshold_of(f"{name}: ", given.multi_label, threshold, self.threshold))
            frame = self._frames.get(task.frame) or self._frame(model, task)
            with self._changing:
                self._make_room(name, task, wanted)
                if name in self._snapshot.tasks:  # added by another thread meanwhile
                    raise ValueError(f"name must not be in use, got {name!r}: remove it first")
                self._frames.setdefault(task.frame, frame)
                task = _placed(task, {key: self._write(key, values) for key, values in wanted.items()})
                self._outside += task.outside
                self._clock += 1
                self._used[name] = self._clock
                self._publish({**self._snapshot.tasks, name: task})

    def remove(self, name: str) -> None:
        """Forget a task; predictions that run keep it until they end.

        Raises:
            ValueError: no task of that name.
        """
        with self._changing:
            _named(self._snapshot, name)
            self._remove(name)

    def predict(self, images: Tensor, tasks: Sequence[str]) -> Tensor:
        """Class scores of every image by its own task, as that task's model gives them; no gradient is recorded.

        Args:
            images: (B, channels, height, width), normalised as each image's task wants it, in the dtype and on the
                device of the backbone.
            tasks: B names.

        Returns:
            (B, K), K the largest class count among `tasks`, -inf beyond those of an image's task; (0, 0) for no image.
            Probabilities are the softmax of a row, or its sigmoid where the task has several labels an image.

        Raises:
            ValueError, TypeError: images that do not fit the backbone, other than one task for each, or an unknown one.
            RuntimeError: the backbone's weights changed since the bank was made.
        """
        if isinstance(tasks, str) or not isinstance(tasks, Sequence):
            raise TypeError(f"tasks must be a name for each image, got {type(tasks).__name__}")
        if not isinstance(images, Tensor) or images.ndim != 4 or len(tasks):
            self._model.check_images(images)
        if len(images) != len(tasks):
            raise ValueError(f"tasks must be a name for each of {len(images)} images, got {len(tasks)}")
        if not tasks:
            return images.new_empty(0, 0)
        if self._model.folded_constants() is not self._folded:
            raise RuntimeError("weights of the backbone must stay as they were when the bank was made, got others")
        with (
            self._reading(tasks) as snapshot,
            torch.no_grad(),
            torch.autocast(images.device.type, enabled=False),
        ):
            return self._predict(snapshot, images, [snapshot.tasks[name] for name in tasks])

    @contextmanager
    def _reading(self, tasks: Sequence[str]) -> Iterator[_Snapshot]:
        """The bank as it is now, whose memory stays as it is meanwhile."""
        for name in set(tasks):
            _named(self._snapshot, name)
        with self._changing:
            snapshot = self._snapshot
            for name in set(tasks):
                _named(snapshot, name)
            self._clock += 1
            self._used.update(dict.fromkeys(tasks, self._clock))
            self._readers.append(snapshot.version)
        try:
            yield snapshot
        finally:
            with self._changing:
                self._readers.remove(snapshot.version)
                self._changing.notify_all()

    def _predict(self, snapshot: _Snapshot, images: Tensor, tasks: list[_Task]) -> Tensor:
        # images that run together side by side, and among them those of one task
        groups = {task.group: i for i, task in enumerate(tasks)}
        place = [(groups[task.group], task.dim, task.head, id(task)) for task in tasks]
        order = sorted(range(len(tasks)), key=place.__getitem__)
        moved = order != list(range(len(tasks)))
        if moved:
            tasks = [tasks[i] for i in order]
            images = images[torch.tensor(order, device=images.device)]
        hidden = [
            self._hidden(snapshot, images[run], tasks[run]) for run in _runs([groups[task.group] for task in tasks])
        ]
        scores = self._scores(snapshot, hidden[0] if len(hidden) == 1 else torch.cat(hidden), tasks)
        if not moved:
            return scores
        out = torch.empty_like(scores)
        out[torch.tensor(order, device=out.device)] = scores
        return out

    def _hidden(self, snapshot: _Snapshot, images: Tensor, tasks: list[_Task]) -> Tensor:
        """Read-out rows (B, C) of images whose tasks share a group."""
        model, folded = snapshot.frames[tasks[0].frame]
        if tasks[0].model is not None:
            return tasks[0].model.hidden_on(images, folded)
        if tasks[0].rows is not None:
            own = [(task.rows, task.alpha) for task in tasks if task.rows is not None and task.alpha is not None]
            rows = BatchPrompts(model.prompts, *zip(*own))
            return model.with_parts(prompts=rows).hidden_on(images, folded)
        ranges = [task.prompts for task in tasks]
        longest = max(length for _, length in ranges)
        if longest == 0:
            return model.hidden_on(images, folded)
        pool = snapshot.pools[tasks[0].pool]
        alone = len(set(ranges)) == 1
        if alone:
            start, length = ranges[0]
            pool = tuple(rows[start : start + length] for rows in pool)
        depth = len(folded.blocks)
        prefixes: Sequence[Any] = pool[:depth]
        if not alone:
            placed = torch.tensor(ranges, dtype=torch.int32)
            prefixes = [PooledPrefix(rows, placed, longest) for rows in prefixes]
        columns = [gates.T for gates in pool[depth:]] or None
        return model.hidden_on(images, folded.sealed(Sealed(prefixes, columns=columns)))

    def _scores(self, snapshot: _Snapshot, hidden: Tensor, tasks: list[_Task]) -> Tensor:
        widest = max(task.readout.classes for task in tasks)
        out = hidden.new_full((len(tasks), widest), float("-inf"))
        for run in _runs([task.dim or id(task) for task in tasks]):
            own, rows = tasks[run], hidden[run]
            first = own[0]
            if first.readout.cosine is not None:
                scores = self._cosines(snapshot, rows, own)
            elif first.readout.linear is not None:
                scores = F.linear(rows, *first.readout.linear)
            else:
                assert first.readout.module is not None
                verbalizer, lm_head = first.readout.module
                scores = verbalizer(rows, lm_head)
            out[run, : scores.shape[1]] = scores
        return out

    def _cosines(self, snapshot: _Snapshot, hidden: Tensor, tasks: list[_Task]) -> Tensor:
        dim = tasks[0].dim
        heads, (prototypes,) = snapshot.pools["heads", dim], snapshot.pools["prototypes", dim]
        cosine = prototype_cosine(
            hidden,
            FoldedHead(*heads),
            None,
            prototypes,
            task_ids=torch.tensor([task.head for task in tasks]),
            class_ranges=[task.classes for task in tasks],
            unit_prototypes=True,
            impl=self._model.impl,
        )
        temperatures = torch.tensor([task.readout.temperature for task in tasks], dtype=torch.float64)
        return cosine / temperatures.to(cosine.device, cosine.dtype, non_blocking=True)[:, None]

    def _own(self, name: str, given: PromptedModel) -> PromptedModel:
        """A model with what `given` has learned, as it is now, on the weights of this bank."""
        self._check_fits(name, given)
        mine, source = self._model, self._source
        parts = {
            part: getattr(mine, part) if _equal(getattr(given, part), getattr(source, part)) else getattr(given, part)
            for part in ("mask_token", "lm_head")
        }
        parts |= {part: getattr(given, part) for part in ("prompts", "verbalizer", "prompt_bias")}
        for part, value in parts.items():
            if value is not None and value is not getattr(mine, part):
                value = copy.deepcopy(value).requires_grad_(False)
                if isinstance(value, nn.Parameter):
                    value.data = value.data.to(self._weight)
                else:
                    value.to(self._weight)
                parts[part] = value
        own = given.with_parts(backbone=mine.backbone, **parts)
        own.impl = mine.impl
        return own.eval()

    def _check_fits(self, name: str, given: PromptedModel) -> None:
        mine = self._source
        if type(given) is not type(mine):
            raise ValueError(
                f"{name}: must be a {type(mine).__name__}, as the backbone of the bank is, got a {type(given).__name__}"
            )
        given._refuse_dropped("TaskBank.add()")
        sizes = [tuple(model.default_cfg["input_size"]) for model in (given, mine)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{name}: images must be (channels, height, width) {sizes[1]}, the bank's, got {sizes[0]}")
        reason = given.unread_prompts()
        if reason is not None:
            raise ValueError(f"{name}: prompts must be a plain PromptBank, got {reason}")
        try:
            given.check_finite(self.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        theirs, own = _weights(given), _weights(mine)
        if theirs.keys() == own.keys() and all(_is_same(value, own[key]) for key, value in theirs.items()):
            return
        found, expected = weight_hash(theirs), weight_hash(own)
        if found != expected:
            raise ValueError(f"{name}: backbone must be the bank's, of weight hash {expected[:19]}, got {found[:19]}")

    def _task(self, model: PromptedModel, threshold: float | None) -> tuple[_Task, dict[Hashable, tuple[Tensor, ...]]]:
        """What a model is to the bank, and the rows it puts into each pool."""
        prompts, kind = model.prompts, _kind(model)
        readout = readout_of(model.verbalizer, model.lm_head)
        wanted: dict[Hashable, tuple[Tensor, ...]] = {}
        dim = 0
        if readout.cosine is not None:
            head, unit = readout.cosine
            dim = len(head.weight)
            wanted["heads", dim] = head.weight[None], head.bias[None]
            wanted["prototypes", dim] = (unit,)
            readout = readout._replace(cosine=_IN_POOLS)
        alike = (
            prompts.placement == "prepend"
            and prompts.kind != "cross"
            and model.prompt_bias is None
            and model.extra_bias.startswith(("zero", "grid"))
            and (model.mask_token is None or model.mask_token is self._model.mask_token)
            and not model.pools_prompts
        )
        prefixes = self._folded.prefixes(model, 1) if alike and prompts.length else []
        group: Hashable
        frame: Hashable
        rows, alpha, pool = None, None, _KEYS_VALUES if prompts.gate is None else _GATED
        if alike and all(prefix is not None for prefix in prefixes):
            group, frame = ("prefixes", kind, pool), ("prefixes", kind)
            if prefixes:
                columns = [prompts.columns(block) for block in range(len(prefixes))] if pool is _GATED else []
                gates = [one.T for one in columns if one is not None]
                wanted[pool] = (*(prefix for prefix in prefixes if isinstance(prefix, Tensor)), *gates)
        elif alike and prompts.kind == "tokens" and prompts.gate is None:
            group = frame = "rows", kind, schedule(prompts, len(self._folded.blocks))
            rows = torch.stack([prompts.rows(block, 1) for block in prompts.blocks[: len(prompts.weight)]])
            exact = torch.promote_types(rows.dtype, torch.float32)
            found = [float(prompts.mixing(block)) for block in mixing_blocks(prompts)]
            alpha = torch.tensor(found, dtype=exact, device=rows.device)
        else:
            group, frame, alike = object(), ("alone", kind, prompts.kind, prompts.length), False
        alone = None if alike else model
        outside = _bytes(rows, alpha, readout.linear, readout.module)
        if alone is not None:
            outside += _bytes(model.prompts, model.prompt_bias, model.mask_token)
        info = TaskInfo(
            readout.classes,
            None if model.class_names is None else tuple(model.class_names),
            prompts.weight.shape[1],
            prompts.mode,
            outside + _bytes(*wanted.values()),
            dict(model.default_cfg),
            threshold,
        )
        return _Task(info, group, frame, readout, outside, pool, rows=rows, alpha=alpha, model=alone, dim=dim), wanted

    def _frame(self, model: PromptedModel, task: _Task) -> _Frame:
        if task.model is None and task.rows is None:
            model = model.without_prompts()
        return _Frame(model, self._folded.beside(model))

    def _make_room(self, name: str, task: _Task, wanted: Mapping[Hashable, tuple[Tensor, ...]]) -> None:
        """See to it that the pools have the rows that a task needs, below the limit."""
        rows = {key: len(values[0]) for key, values in wanted.items()}
        for key, values in wanted.items():
            if key not in self._pools:
                shapes = [tuple(value.shape[1:]) for value in values]
                self._pools[key] = Pool(shapes, values[0].dtype, values[0].device)
        self._reclaim()
        while True:
            growth = sum(
                (pool.grown(rows[key]) - pool.capacity) * pool.row_bytes
                for key, pool in self._pools.items()
                if key in rows and pool.find(rows[key]) is None
            )
            needed = self._reserved() + task.outside + growth
            tasks = self._snapshot.tasks
            if self.memory_limit is None or needed <= self.memory_limit:
                break
            if self._returned:
                self._changing.wait()
                self._reclaim()
            elif any(pool.used < pool.capacity for pool in self._pools.values()):
                self._pack()
            elif self.when_full == "evict" and tasks:
                self._remove(min(tasks, key=self._used.__getitem__))
                self._reclaim()
            else:
                raise MemoryError(
                    f"{name!r} takes {task.info.memory:,} bytes, the bank's {len(tasks)} tasks take "
                    f"{self._reserved():,} of the {self.memory_limit:,} of memory_limit: remove tasks, raise it, "
                    "or use when_full='evict'"
                )
        spare = None if self.memory_limit is None else self.memory_limit - needed
        for key, count in rows.items():
            pool = self._pools[key]
            if pool.find(count) is None:
                least = pool.grown(count)
                slack = least // _SLACK
                if spare is not None:
                    slack = min(slack, spare // pool.row_bytes)
                    spare -= slack * pool.row_bytes
                pool.grow(least + slack)

    def _reserved(self) -> int:
        return self._outside + sum(pool.capacity * pool.row_bytes for pool in self._pools.values())

    def _write(self, key: Hashable, values: tuple[Tensor, ...]) -> int:
        """Write rows that nobody reads; where they start."""
        pool, length = self._pools[key], len(values[0])
        start = pool.take(length)
        for tensor, value in zip(pool.tensors, values):
            tensor[start : start + length] = value
        return start

    def _publish(self, tasks: Mapping[str, _Task]) -> None:
        if self.device.type == "cuda":  # a prediction on another stream reads what was written on this one
            torch.cuda.current_stream(self.device).synchronize()
        pools = {key: pool.tensors for key, pool in self._pools.items()}
        self._snapshot = _Snapshot(self._snapshot.version + 1, tasks, pools, dict(self._frames))

    def _remove(self, name: str) -> None:
        tasks = dict(self._snapshot.tasks)
        task = tasks.pop(name)
        del self._used[name]
        self._outside -= task.outside
        self._publish(tasks)
        self._returned += [(self._snapshot.version, key, *place) for key, place in _ranges(task).items()]

    def _reclaim(self) -> None:
        """Give rows of removed tasks back to their pools, where no prediction reads them any more."""
        oldest = min(self._readers, default=self._snapshot.version)
        done = [each for each in self._returned if each[0] <= oldest]
        if done and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a prediction that returned may still run
        for _, key, start, length in done:
            self._pools[key].give_back(start, length)
        self._returned = [each for each in self._returned if each[0] > oldest]

    def _pack(self) -> None:
        """Move what tasks hold together, and let go of the rest; nobody reads a removed task's rows."""
        tasks = dict(self._snapshot.tasks)
        for key, pool in self._pools.items():
            if pool.used == pool.capacity:
                continue
            holders = {name: place for name, task in tasks.items() if (place := _ranges(task).get(key))}
            for name, start in zip(holders, pool.pack(list(holders.values()))):
                tasks[name] = _placed(tasks[name], {key: start})
        self._publish(tasks)


# Stands for a head that a pool holds.
_IN_POOLS = (FoldedHead(torch.empty(0), torch.empty(0)), torch.empty(0))


def _ranges(task: _Task) -> dict[Hashable, tuple[int, int]]:
    """Which rows of which pools a task holds: (start, length)."""
    found: dict[Hashable, tuple[int, int]] = {}
    if task.prompts[1]:
        found[task.pool] = task.prompts
    if task.dim:
        found["heads", task.dim] = task.head, 1
        found["prototypes", task.dim] = task.classes
    return found


def _placed(task: _Task, starts: Mapping[Hashable, int]) -> _Task:
    """The same task where its rows start elsewhere."""
    if task.pool in starts:
        task = replace(task, prompts=(starts[task.pool], task.info.prompt_length))
    if ("heads", task.dim) in starts:
        task = replace(task, head=starts["heads", task.dim])
    if ("prototypes", task.dim) in starts:
        task = replace(task, classes=(starts["prototypes", task.dim], task.readout.classes))
    return task


def _kind(model: PromptedModel) -> Hashable:
    """What models must share to read their images alike, whatever their prompts and verbalizer."""
    return tuple(str(model.config.get(name)) for name in ("readout", "mask_mode", "extra_bias"))


def _named(snapshot: _Snapshot, name: str) -> _Task:
    task = snapshot.tasks.get(name)
    if task is None:
        raise ValueError(
            f"task must be one of the bank's {len(snapshot.tasks)}, got {name!r}{hint(name, list(snapshot.tasks))}"
        )
    return task


def _runs(keys: Sequence[Hashable]) -> Iterator[slice]:
    """Slices of equal keys that follow each other."""
    first = 0
    for i in range(1, len(keys) + 1):
        if i == len(keys) or keys[i] != keys[first]:
            yield slice(first, i)
            first = i


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory read in the same way."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def _weights(model: PromptedModel) -> dict[str, Tensor]:
    """The tensors of a backbone, by their names in the model."""
    return {name: tensor for name, tensor in model.frozen_state_dict().items() if name.startswith("backbone.")}


def _equal(a: nn.Module | Tensor | None, b: nn.Module | Tensor | None) -> bool:
    """Whether two parts hold the same values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if type(a) is nn.Linear and type(b) is nn.Linear:
        mine, theirs = a.state_dict(), b.state_dict()
        return mine.keys() == theirs.keys() and all(_equal(value, theirs[name]) for name, value in mine.items())
    return a is b


def _bytes(*held: Any) -> int:
    """Of tensors, and of all that modules hold."""
    total = 0
    for value in held:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, nn.Module):
            total += _bytes(*value.state_dict().values())
        elif isinstance(value, tuple):
            total += _bytes(*value)
    return total
