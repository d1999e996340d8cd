"""The server: labels as the bank gives them, requests that share a batch, limits that hold, the page in a browser."""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from console import Console
from PIL import Image

import vptm
from vptm import PromptedBEiT
from vptm.serving.batching import Batcher, Overloaded

has_server = all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn"))
needs_server = pytest.mark.skipif(not has_server, reason="starlette and uvicorn are not installed")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two adapters of the built-in model: clothes, and shoes of another length."""
    root = tmp_path_factory.mktemp("tasks")
    for name, classes, length in (("clothes", 4, 3), ("shoes", 2, 5)):
        torch.manual_seed(classes)
        model = PromptedBEiT("builtin", classes, prompt_mode="deep", prompt_length=length)
        model.class_names = [f"{name} {k}" for k in range(classes)]
        model.save_pretrained(root / name)
    return root


@contextmanager
def running(folder: Path, thresholds: dict[str, float] | None = None, **limits: Any) -> Iterator[tuple[Any, int]]:
    """A server on a free port of the loopback address, and that port."""
    import uvicorn

    from vptm.serving.limits import Limits
    from vptm.serving.server import Server, open_tasks, task_folders

    server = Server(*open_tasks(task_folders(folder), thresholds=thresholds), Limits(**limits))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    http_server = uvicorn.Server(uvicorn.Config(server.app, log_level="error"))
    thread = threading.Thread(target=http_server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not http_server.started:
        time.sleep(0.01)
    try:
        yield server, listening.getsockname()[1]
    finally:
        http_server.should_exit = True
        thread.join()
        server.close()
        listening.close()


def ask(port: int, path: str, body: Any = None, method: str = "POST") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body=body)
        answer = connection.getresponse()
        content = answer.read().decode()
    finally:
        connection.close()
    return answer.status, json.loads(content) if content.startswith(("{", "[")) else content


def picture(seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (28, 28), generator=generator, dtype=torch.uint8).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def served(tasks: Path) -> Iterator[tuple[Any, int]]:
    if not has_server:
        pytest.skip("starlette and uvicorn are not installed")
    with running(tasks, most_bytes=20_000, most_pixels=10_000, patience=0.05) as found:
        yield found


def test_labels_are_the_model_s_and_requests_share_batches(served: tuple[Any, int], tasks: Path) -> None:
    """Sixteen clients at once, two tasks mixed: each gets its own picture's labels, from far fewer batches."""
    server, port = served
    before = server.batcher.batches
    jobs = [(("clothes", "shoes")[seed % 2], seed) for seed in range(16)]
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda job: ask(port, f"/predict/{job[0]}", picture(job[1])), jobs))
    models = {name: vptm.load_adapter(tasks / name) for name in ("clothes", "shoes")}
    for (name, seed), (status, answer) in zip(jobs, found, strict=True):
        want = vptm.predict(models[name], [Image.open(io.BytesIO(picture(seed)))])[0].top
        assert status == 200 and answer["task"] == name
        assert [(each["label"], pytest.approx(each["score"], abs=2e-5)) for each in answer["labels"]] == want
    assert server.batcher.batches - before <= 8


@needs_server
def test_several_labels_are_those_that_reach_the_threshold(tmp_path: Path) -> None:
    """A task of several labels beside one of one: all labels whose sigmoid reaches the task's threshold, more than five
    or none, or another threshold that a request asks for, in batches that mix tasks and thresholds."""
    torch.manual_seed(0)
    models = {
        "tags": PromptedBEiT("builtin", 9, prompt_mode="deep", prompt_length=3, multi_label=True),
        "kind": PromptedBEiT("builtin", 12, prompt_length=2),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    content = picture(4)
    with torch.no_grad():
        model = models["tags"].eval()
        scores = model(vptm.transforms(model)(Image.open(io.BytesIO(content)))[None])[0].sigmoid()
    best = [(str(k), pytest.approx(scores[k].item(), abs=2e-5)) for k in scores.argsort(descending=True).tolist()]
    middle = round(scores.sort().values[2:4].mean().item(), 6)  # three of nine do not reach it
    with running(tmp_path, thresholds={"tags": middle}, patience=0.2) as (server, port):
        wanted = [("/predict/tags", middle, 6), ("/predict/tags?threshold=0", 0.0, 9), ("/predict/kind", None, 5)]
        wanted += [("/predict/tags?threshold=1", 1.0, 0), ("/look/tags", middle, 6), ("/look/tags?threshold=1", 1.0, 0)]
        with ThreadPoolExecutor(6) as clients:
            found = list(clients.map(lambda each: ask(port, each[0], content), wanted))
        for (path, threshold, count), (status, answer) in zip(wanted, found, strict=True):
            assert status == 200 and answer.get("threshold") == threshold, path
            labels = [(each["label"], each["score"]) for each in answer["labels"]]
            assert len(labels) == count and (path == "/predict/kind" or labels == best[:count]), path
        assert server.batcher.batches < 4, "requests must have shared a batch, or nothing was mixed"
        listed = ask(port, "/tasks", method="GET")[1]
        assert {name: each["threshold"] for name, each in listed.items()} == {"tags": middle, "kind": None}
        for path, message in (
            ("/predict/tags?threshold=2", "threshold must be in [0, 1], got 2.0"),
            ("/predict/tags?threshold=nan", "threshold must be in [0, 1], got nan"),
            ("/predict/tags?threshold=half", "threshold must be a number, got 'half'"),
            (
                "/predict/kind?threshold=0.5",
                "kind: threshold must be left out for a model of one label an image, got 0.5",
            ),
            ("/look/kind?threshold=", "threshold must be a number, got ''"),
        ):
            assert ask(port, path, content) == (400, {"error": message})


def test_pages_for_machines(served: tuple[Any, int]) -> None:
    server, port = served
    assert ask(port, "/predict/shoes", picture())[0] == 200
    assert ask(port, "/health", method="GET") == (200, {"status": "ok", "tasks": 2, "waiting": 0})
    status, found = ask(port, "/tasks", method="GET")
    assert status == 200
    assert found["shoes"] == {"classes": ["shoes 0", "shoes 1"], "looks": True, "threshold": None}
    status, text = ask(port, "/metrics", method="GET")
    counted = dict(line.rsplit(" ", 1) for line in text.splitlines())
    assert int(counted['vptm_requests_total{status="200"}']) >= 1 and int(counted["vptm_tasks"]) == 2
    assert int(counted["vptm_images_total"]) == server.batcher.images
    status, looked = ask(port, "/look/clothes", picture())
    assert status == 200 and len(looked["attention"]) == 4 and max(map(max, looked["attention"])) == 1
    clothes, shoes = server.models["clothes"], server.models["shoes"]
    assert clothes.lm_head is shoes.lm_head and not list(clothes._encoder.constants()), (
        "a task must not hold a backbone"
    )
    storages = [model.backbone.blocks[0].attn.qkv.weight.data_ptr() for model in (clothes, shoes)]
    assert storages[0] == storages[1]
    assert looked["row"] == "mask" and sum(looked["shares"].values()) == pytest.approx(1, abs=1e-3)


def bomb() -> bytes:
    content = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(content, "PNG")
    return content.getvalue()[:19_000]


HOSTILE = {
    "nothing": (400, lambda: b""),
    "text": (415, lambda: b"no picture at all"),
    "cut off": (415, lambda: picture()[:200]),
    "a program": (415, lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage"),
    "many pixels in few bytes": (415, bomb),
    "many bytes": (413, lambda: b"\x89PNG" + bytes(30_000)),
    "many bytes, without saying so": (413, lambda: iter([bytes(10_000)] * 5)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_uploads_are_refused_and_hurt_nobody(served: tuple[Any, int], kind: str) -> None:
    _, port = served
    status, make = HOSTILE[kind]
    found, answer = ask(port, "/predict/shoes", make())
    assert found == status and "\n" not in answer["error"], answer
    assert ask(port, "/predict/shoes", picture())[0] == 200


def test_wrong_names_are_refused(served: tuple[Any, int]) -> None:
    _, port = served
    assert ask(port, "/predict/shoe", picture()) == (404, {"error": "no task 'shoe', did you mean 'shoes'?"})
    assert ask(port, "/predict", picture())[0] == 404, "with two tasks one must be named"
    assert ask(port, "/predict/shoes", method="GET")[0] == 405


@needs_server
def test_overload_is_answered_at_once_and_holds_no_more(tasks: Path) -> None:
    """While the model hangs, requests up to the limit wait, the others get 503; then all that waited are answered."""
    with running(tasks / "shoes", most_waiting=3, batch_size=1) as (server, port):
        go, real = threading.Event(), server.batcher._predict

        def slow(images: torch.Tensor, names: list[str]) -> torch.Tensor:
            go.wait(60)
            return real(images, names)

        server.batcher._predict = slow
        with ThreadPoolExecutor(4) as clients:
            waiting = []
            for count in range(4):  # one is computed, three wait
                waiting.append(clients.submit(ask, port, "/predict", picture()))
                until = time.monotonic() + 10
                while server.batcher.waiting < count and time.monotonic() < until:
                    time.sleep(0.01)
            for _ in range(20):
                started = time.perf_counter()
                status, answer = ask(port, "/predict", picture())
                assert status == 503 and "try again later" in answer["error"]
                assert time.perf_counter() - started < 2
            assert server.batcher.waiting == 3
            go.set()
            assert [each.result()[0] for each in waiting] == [200] * 4
        assert ask(port, "/predict", picture())[0] == 200


def test_a_batcher_passes_errors_on_and_ends() -> None:
    def predict(images: torch.Tensor, names: list[str]) -> torch.Tensor:
        if "bad" in names:
            raise ValueError("no such task")
        return images.flatten(1)

    batcher = Batcher(predict, batch_size=4, patience=0.0, most_waiting=8)
    assert torch.equal(batcher.ask(torch.ones(1, 1, 2), "good").result(10), torch.ones(2))
    with pytest.raises(ValueError, match="no such task"):
        batcher.ask(torch.ones(1, 1, 2), "bad").result(10)
    assert batcher.ask(torch.ones(1, 1, 2), "good").result(10) is not None, "the thread goes on after an error"
    batcher.close()
    with pytest.raises(Overloaded):
        batcher.ask(torch.ones(1, 1, 2), "good")


def test_no_request_fails_for_another_s_sake() -> None:
    """One batch with a task that was removed meanwhile: the others have their answers."""

    def predict(images: torch.Tensor, names: list[str]) -> torch.Tensor:
        if "removed" in names:
            raise ValueError("no such task")
        return images.flatten(1)

    batcher = Batcher(predict, batch_size=3, patience=10, most_waiting=8)
    try:
        asked = [batcher.ask(torch.full((1, 1, 2), float(i)), name) for i, name in enumerate(["a", "removed", "b"])]
        assert asked[0].result(10).tolist() == [0, 0] and asked[2].result(10).tolist() == [2, 2]
        with pytest.raises(ValueError, match="no such task"):
            asked[1].result(10)
    finally:
        batcher.close()


def test_tasks_come_and_go_while_they_are_asked(served: tuple[Any, int]) -> None:
    """Clients of a task that stays get 200 alone, those of one that comes and goes, whatever its name, 200 or 404; the
    load of the bench counts each of its answers."""
    from bench.serve_load import load

    server, port = served
    model, stop = server.models["shoes"], threading.Event()

    def churn() -> None:
        while not stop.is_set():
            server.bank.add("a guest/of ours", model)
            time.sleep(0.01)
            server.bank.remove("a guest/of ours")

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        statuses: dict[str, list[int]] = {"shoes": [], "a guest/of ours": []}
        with ThreadPoolExecutor(2) as clients:
            asked = {name: clients.submit(load, port, [name], [picture()], 4, 0.5) for name in statuses}
            for name, found in asked.items():
                statuses[name] = [status for status, seconds in found.result() if seconds > 0]
    finally:
        stop.set()
        churning.join()
    assert len(statuses["shoes"]) >= 4 and set(statuses["shoes"]) == {200}
    assert set(statuses["a guest/of ours"]) <= {200, 404}
    server.bank.add("a guest/of ours", model)
    try:
        assert ask(port, "/predict/a%20guest%2Fof%20ours", picture())[0] == 200
    finally:
        server.bank.remove("a guest/of ours")


@pytest.mark.skipif(importlib.util.find_spec("playwright") is None or BROWSER is None, reason="there is no browser")
def test_a_person_drops_a_picture_and_sees_labels(served: tuple[Any, int], tmp_path: Path) -> None:
    """In a real browser: the labels, the picture with what the mask row looked at, and the words of a refusal."""
    from playwright.sync_api import sync_playwright

    _, port = served
    (tmp_path / "shoe.png").write_bytes(picture(3))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#task option", state="attached")
        page.select_option("#task", "clothes")
        page.set_input_files("#file", tmp_path / "shoe.png")
        page.wait_for_selector("#labels tr")
        page.wait_for_timeout(300)
        assert page.locator("#labels tr").count() == 4
        assert page.locator("#shares").inner_text().startswith("The mask row attends to ")
        with_heat = page.evaluate("document.getElementById('view').toDataURL()")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.uncheck("#heat")
        assert page.evaluate("document.getElementById('view').toDataURL()") != with_heat
        page.set_input_files("#file", tmp_path / "broken.png")
        page.wait_for_function("document.getElementById('error').textContent.includes('cannot read image')")
        browser.close()
    assert not problems and (tmp_path / "page.png").stat().st_size > 5_000


def test_the_command_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tasks: Path, tmp_path: Path
) -> None:
    command = Console(capsys)
    if has_server:
        for arguments, message in (
            ([tmp_path], "must be an adapter or a folder of them"),
            ([tmp_path / "nowhere"], "adapter folder not found"),
            ([tasks, "--batch-size", 0], "batch_size must be an integer >= 1, got 0"),
            ([tasks, "--patience", 60], "patience must be seconds in [0, 10], got 60.0"),
            ([tasks, "--threshold", 0.4], "threshold must be left out for a model of one label an image, got 0.4"),
            ([tasks, "--threshold", "shoe=0.4"], "must name one of 2 tasks, got 'shoe', did you mean 'shoes'?"),
        ):
            code, line = command.refused("serve", *arguments)
            assert code == 2 and message in line, line
    monkeypatch.setattr("vptm.commands.serve.find_spec", lambda name: None)
    code, line = command.refused("serve", tasks)
    assert code == 2 and 'pip install "vptm[serve]"' in line
