"""Answers over HTTP: post a picture, get labels; many tasks by name on one backbone."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
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
    folders: Mapping[str, Path], *, source: Any = None, device: str | torch.device = "cpu", impl: str = "auto"
) -> tuple[TaskBank, dict[str, PromptedModel]]:
    """A bank of adapters on one backbone, and the models that say where they look, on the same weights: they run on the
    path that holds no constants, as each would have its own."""
    first = load_adapter(next(iter(folders.values())), source=source, impl=impl).to(device)
    bank = TaskBank(first, impl=impl)
    models: dict[str, PromptedModel] = {}
    for name, folder in folders.items():
        models[name] = load_on(first, folder)
        models[name].impl = "reference"
        bank.add(name, models[name])
    return bank, models


class _Known(NamedTuple):
    """Of a task that is asked often: what it says of itself, and what follows from that."""

    info: TaskInfo
    prepare: Callable[[Image.Image], torch.Tensor]
    options: dict[str, Any]
    labels: list[str]


_MOST_KNOWN = 1000


class Server:
    """The application, and what it counts; `close` ends its thread.

    Args:
        bank: tasks, which may change while the server runs.
        models: of the tasks whose read-out row is shown on the page.
        limits: of requests.

    Attributes:
        app: for any ASGI server. GET /: a page. GET /tasks, /health, /metrics. POST /predict, /predict/TASK: a picture
            as the body gives `{"task", "labels": [{"label", "score"}, ...]}`; without TASK where there is one alone.
            POST /look/TASK gives what the read-out row attends to as well.
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
                name: {"classes": info.class_names or info.num_classes, "looks": name in self.models}
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

    def _read(self, content: bytes, task: str, answer: Future[Any]) -> None:
        """Make an image of a picture and ask for its labels, on a thread of its own."""
        try:
            picture = self._opened(content, task)
            image = self._know(task).prepare(picture).to(self.bank.device, self.bank.dtype)
            self.batcher.ask(image, task, answer)
        except Exception as error:
            with suppress(InvalidStateError):  # its client is gone
                answer.set_exception(error)
        finally:
            self._left()

    def _labelled(self, images: torch.Tensor, tasks: list[str]) -> list[list[dict[str, Any]]]:
        """The best labels of each image by its own task."""
        labels = [self._know(task).labels for task in tasks]
        best = best_classes(self.bank.predict(images, tasks), self.limits.top)
        return [
            [{"label": own[k], "score": round(share, 6)} for k, share in row if k < len(own)]
            for own, row in zip(labels, best, strict=True)
        ]

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
        task = self._task(request)
        self._enter()
        try:
            content = await self._body(request)
        except BaseException:
            self._left()
            raise
        # one future from the picture's bytes to its labels: a thread reads it, another computes, this one wakes once
        answer: Future[list[dict[str, Any]]] = Future()
        self._readers.submit(self._read, content, task, answer)
        try:
            labels = await asyncio.wrap_future(answer)
        except Overloaded as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
        except ValueError as error:  # the task was removed while this waited
            raise HTTPException(404, str(error)) from None
        self.seconds += time.perf_counter() - started
        self.answers[200] += 1
        return JSONResponse({"task": task, "labels": labels})

    async def _look_at(self, request: Request) -> Response:
        task = self._task(request)
        model = self.models.get(task)
        if not isinstance(model, PromptedBEiT):
            raise HTTPException(404, f"task {task!r} does not show where it looks")
        self._enter()
        try:
            picture = await run_in_threadpool(self._opened, await self._body(request), task)
            found = await run_in_threadpool(self._looked, model, picture)
        finally:
            self._left()
        self.answers[200] += 1
        return Response(json.dumps({"task": task} | found), media_type="application/json")

    def _looked(self, model: PromptedBEiT, picture: Image.Image) -> dict[str, Any]:
        with self._look:  # the mode of a model changes while it is looked at
            report = inspect_tokens(model, picture, top=self.limits.top)
        attention = report.attention.float().mean(0)
        pixels = (report.picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        shown = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(shown, "PNG")
        return {
            "labels": [{"label": each.name, "score": round(each.probability, 6)} for each in report.classes],
            "row": report.row,
            "attention": (attention / attention.max().clamp(min=1e-12)).tolist(),
            "shares": report.shares,
            "picture": "data:image/png;base64," + base64.b64encode(shown.getvalue()).decode(),
        }
