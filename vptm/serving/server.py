"""Answers over HTTP: post a picture, get labels; many tasks by name on one backbone."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from vptm.data.decoding import BadImageError, read_upload
from vptm.data.labels import class_labels
from vptm.data.transforms import picture_options, transforms
from vptm.inspection.explain import inspect_tokens
from vptm.messages import hint
from vptm.models.adapter_loading import load_on
from vptm.models.opening import load_adapter
from vptm.models.prompted_beit import PromptedBEiT
from vptm.models.prompted_model import PromptedModel
from vptm.serving.batching import Batcher, Overloaded
from vptm.serving.limits import Limits
from vptm.serving.predict import best_classes
from vptm.serving.task_bank import TaskBank, TaskInfo
from vptm.serving.thresholds import threshold_of
from vptm.settings import THRESHOLD
from vptm.weights.adapter_format import CONFIG_FILE

PAGE = Path(__file__).with_name("page.html")


def task_folders(folder: str | Path) -> dict[str, Path]:
    """The adapters of a folder by their names: the folder itself, or those in it.

    Raises:
        FileNotFoundError: no adapter there.
    """
    folder = Path(folder)
    if not folder.is_dir() or (folder / CONFIG_FILE).is_file():
        return {folder.resolve().name: folder}
    found = {each.name: each for each in sorted(folder.iterdir()) if (each / CONFIG_FILE).is_file()}
    if not found:
        raise FileNotFoundError(f"{folder} must be an adapter or a folder of them, none has {CONFIG_FILE}")
    return found


def open_tasks(
    folders: Mapping[str, Path],
    *,
    source: Any = None,
    device: str | torch.device = "cpu",
    impl: str = "auto",
    threshold: float = THRESHOLD,
    thresholds: Mapping[str, float] | None = None,
) -> tuple[TaskBank, dict[str, PromptedModel]]:
    """A bank of adapters on one backbone, and the models that say where they look, on the same weights: they run on the
    path that holds no constants, as each would have its own.

    Args:
        threshold: least probability of a label of tasks with several labels an image, those of `thresholds` excepted.
    """
    first = load_adapter(next(iter(folders.values())), source=source, impl=impl).to(device)
    bank = TaskBank(first, impl=impl, threshold=threshold)
    models: dict[str, PromptedModel] = {}
    for name, folder in folders.items():
        models[name] = load_on(first, folder)
        models[name].impl = "reference"
        bank.add(name, models[name], threshold=(thresholds or {}).get(name))
    return bank, models


class _Asked(NamedTuple):
    """Whose labels are asked for, and the least probability of one, None where an image has one label."""

    task: str
    threshold: float | None


class _Known(NamedTuple):
    """Of a task that is asked often: what it says of itself, and what follows from that."""

    info: TaskInfo
    prepare: Callable[[Image.Image], torch.Tensor]
    options: dict[str, Any]
    labels: list[str]


_MOST_KNOWN = 1000


def _listed(labels: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": label, "score": round(score, 6)} for label, score in labels]


def _answer(asked: _Asked, labels: list[dict[str, Any]]) -> dict[str, Any]:
    """What every answer begins with."""
    threshold = {} if asked.threshold is None else {"threshold": asked.threshold}
    return {"task": asked.task, **threshold, "labels": labels}


class Server:
    """The application, and what it counts; `close` ends its thread.

    Args:
        bank: tasks, which may change while the server runs.
        models: of the tasks whose read-out row is shown on the page.
        limits: of requests.

    Attributes:
        app: for any ASGI server. GET /: a page. GET /tasks, /health, /metrics. POST /predict, /predict/TASK: a picture
            as the body gives `{"task", "labels": [{"label", "score"}, ...]}`; without TASK where there is one alone.
            Of a task with several labels an image also `"threshold"`: labels are all those whose score, a sigmoid, is
            at least that, which may be none; `?threshold=0.3` asks for another than the task's. POST /look/TASK gives
            what the read-out row attends to as well.
    """

    def __init__(
        self, bank: TaskBank, models: Mapping[str, PromptedModel] | None = None, limits: Limits | None = None
    ) -> None:
        self.bank, self.models, self.limits = bank, dict(models or {}), limits or Limits()
        self.batcher = Batcher(
            self._labelled,
            batch_size=self.limits.batch_size,
            patience=self.limits.patience,
            most_waiting=self.limits.most_waiting,
        )
        self.answers: Counter[int] = Counter()
        self.seconds = 0.0
        self.reading = 0
        self._counting = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._readers = ThreadPoolExecutor(thread_name_prefix="vptm pictures")
        self._look = threading.Lock()
        self.app = Starlette(
            routes=[  # matched one after the other
                Route("/predict/{task:path}", self._predict, methods=["POST"]),
                Route("/predict", self._predict, methods=["POST"]),
                Route("/look/{task:path}", self._look_at, methods=["POST"]),
                Route("/", self._page),
                Route("/tasks", self._tasks),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            exception_handlers={HTTPException: self._refused},
        )

    def close(self) -> None:
        """Answer what waits, and end."""
        self._readers.shutdown()
        self.batcher.close()

    async def _refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self.answers[error.status_code] += 1
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def _tasks(self, _: Request) -> Response:
        infos = {name: self.bank.info(name) for name in self.bank.names}
        return JSONResponse(
            {
                name: {
                    "classes": info.class_names or info.num_classes,
                    "looks": name in self.models,
                    "threshold": info.threshold,
                }
                for name, info in infos.items()
            }
        )

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "tasks": len(self.bank), "waiting": self.batcher.waiting})

    async def _metrics(self, _: Request) -> Response:
        lines = [f'vptm_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.answers.items())]
        lines += [
            f"vptm_request_seconds_total {self.seconds:.6f}",
            f"vptm_images_total {self.batcher.images}",
            f"vptm_batches_total {self.batcher.batches}",
            f"vptm_waiting {self.reading + self.batcher.waiting}",
            f"vptm_tasks {len(self.bank)}",
            f"vptm_task_bytes {self.bank.memory}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    def _task(self, request: Request) -> str:
        task: str | None = request.path_params.get("task")
        if task is None:
            if len(self.bank) != 1:
                raise HTTPException(404, f"name one of {len(self.bank)} tasks: POST /predict/TASK")
            return self.bank.names[0]
        if task not in self.bank:
            raise HTTPException(404, f"no task {task[:100]!r}{hint(task[:100], self.bank.names[:1000])}")
        return task

    def _asked(self, request: Request) -> _Asked:
        """Whose labels, and which of them."""
        task, said = self._task(request), request.query_params.get("threshold")
        try:
            own = self.bank.info(task).threshold
        except ValueError as error:  # removed meanwhile
            raise HTTPException(404, str(error)) from None
        if said is None:
            return _Asked(task, own)
        try:
            given = float(said)
        except ValueError:
            raise HTTPException(400, f"threshold must be a number, got {said[:100]!r}") from None
        try:
            return _Asked(task, threshold_of(f"{task}: ", own is not None, given))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    async def _body(self, request: Request) -> bytes:
        """What was sent, up to the limit: no more is read."""
        most = self.limits.most_bytes
        stated = request.headers.get("content-length")
        if stated is not None and stated.isdigit() and int(stated) > most:
            raise HTTPException(413, f"a picture may have {most} bytes, got {stated}")
        content = bytearray()
        try:
            async for chunk in request.stream():
                content += chunk
                if len(content) > most:
                    raise HTTPException(413, f"a picture may have {most} bytes, got more")
        except ClientDisconnect:
            raise HTTPException(400, "the picture did not arrive") from None
        if not content:
            raise HTTPException(400, "the body must be a picture, got nothing")
        return bytes(content)

    def _know(self, task: str) -> _Known:
        """Raises ValueError where the task was removed."""
        info, known = self.bank.info(task), self._known.get(task)
        if known is None or known.info is not info:
            labels = list(class_labels(info.class_names, info.num_classes))
            known = _Known(info, transforms(info), picture_options(info), labels)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[task] = known
        return known

    def _opened(self, content: bytes, task: str) -> Image.Image:
        try:
            return read_upload(content, **self._know(task).options, most_pixels=self.limits.most_pixels)
        except BadImageError as error:
            raise HTTPException(415, str(error)) from None
        except ValueError:  # removed meanwhile
            raise HTTPException(404, f"no task {task!r}") from None

    def _read(self, content: bytes, asked: _Asked, answer: Future[Any]) -> None:
        """Make an image of a picture and ask for its labels, on a thread of its own."""
        try:
            picture = self._opened(content, asked.task)
            image = self._know(asked.task).prepare(picture).to(self.bank.device, self.bank.dtype)
            self.batcher.ask(image, asked, answer)
        except Exception as error:
            with suppress(InvalidStateError):  # its client is gone
                answer.set_exception(error)
        finally:
            self._left()

    def _labelled(self, images: torch.Tensor, asked: list[_Asked]) -> list[list[dict[str, Any]]]:
        """The labels of each image by its own task: the best, or those of several that reach their threshold."""
        labels = [self._know(task).labels for task, _ in asked]
        scores = self.bank.predict(images, [task for task, _ in asked])
        several = [i for i, each in enumerate(asked) if each.threshold is not None]
        single = [i for i, each in enumerate(asked) if each.threshold is None]
        least = [each.threshold for each in asked if each.threshold is not None]
        best = dict(zip(single, best_classes(scores[single], self.limits.top)))
        best |= zip(several, best_classes(scores[several], None, least))
        return [_listed((own[k], share) for k, share in best[i] if k < len(own)) for i, own in enumerate(labels)]

    def _enter(self) -> None:
        """One more request is read; refused at once where too many are."""
        with self._counting:
            waiting = self.reading + self.batcher.waiting
            if waiting < self.limits.most_waiting:
                self.reading += 1
                return
        raise HTTPException(503, f"{waiting} requests wait, try again later", {"Retry-After": "1"})

    def _left(self) -> None:
        """One of those that are read is not any more."""
        with self._counting:
            self.reading -= 1

    async def _predict(self, request: Request) -> Response:
        started = time.perf_counter()
        asked = self._asked(request)
        self._enter()
        try:
            content = await self._body(request)
        except BaseException:
            self._left()
            raise
        # one future from the picture's bytes to its labels: a thread reads it, another computes, this one wakes once
        answer: Future[list[dict[str, Any]]] = Future()
        self._readers.submit(self._read, content, asked, answer)
        try:
            labels = await asyncio.wrap_future(answer)
        except Overloaded as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
        except ValueError as error:  # the task was removed while this waited
            raise HTTPException(404, str(error)) from None
        self.seconds += time.perf_counter() - started
        self.answers[200] += 1
        return JSONResponse(_answer(asked, labels))

    async def _look_at(self, request: Request) -> Response:
        asked = self._asked(request)
        task, model = asked.task, self.models.get(asked.task)
        if not isinstance(model, PromptedBEiT):
            raise HTTPException(404, f"task {task!r} does not show where it looks")
        self._enter()
        try:
            picture = await run_in_threadpool(self._opened, await self._body(request), task)
            found = await run_in_threadpool(self._looked, model, picture, asked)
        finally:
            self._left()
        self.answers[200] += 1
        return Response(json.dumps(found), media_type="application/json")

    def _looked(self, model: PromptedBEiT, picture: Image.Image, asked: _Asked) -> dict[str, Any]:
        least = asked.threshold
        top = self.limits.top if least is None else model.num_classes
        with self._look:  # the mode of a model changes while it is looked at
            report = inspect_tokens(model, picture, top=top)
        attention = report.attention.float().mean(0)
        pixels = (report.picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        shown = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(shown, "PNG")
        kept = ((each.name, each.probability) for each in report.classes if each.probability >= (least or 0.0))
        return _answer(asked, _listed(kept)) | {
            "row": report.row,
            "attention": (attention / attention.max().clamp(min=1e-12)).tolist(),
            "shares": report.shares,
            "picture": "data:image/png;base64," + base64.b64encode(shown.getvalue()).decode(),
        }
