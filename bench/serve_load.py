"""Load on a server of the loopback address, beside the same batches in process.

    python -m bench.serve_load --seconds 60 --clients 64
    python -m bench.serve_load --seconds 60 --clients 64 --backbone beitv2_base_patch16_224 --batch 16

A server of the built-in model, or of another BEiT by its timm name with random weights, with `--tasks` adapters runs
in a process of its own; each client posts the next picture when the last is answered, over a connection that stays
open, until the time is over. All clients are sockets of one thread, which reads an answer in 30 us: more would be
taken from the server where both share the cores. Prints one JSON line: answers by status, p50 and p99 of the seconds
of an answer, images/s, images/s of `vptm.TaskBank.predict` on batches of the server's size in this process, with and
without reading the pictures, and their ratios, and the memory of the server before and after.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import vptm
from bench.timing import environment
from vptm.data.decoding import read_upload


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A port of the loopback address that nobody has at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def pictures(count: int, side: int) -> list[bytes]:
    """PNG files of random grey pixels."""
    generator, found = np.random.default_rng(0), []
    for _ in range(count):
        content = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (side, side), dtype=np.uint8)).save(content, "PNG")
        found.append(content.getvalue())
    return found


class Client:
    """One of many on a connection of its own; (status, seconds) of each answer in `found`, status 0 for none."""

    def __init__(self, port: int, requests: list[bytes], first: int, found: list[tuple[int, float]]) -> None:
        self.requests, self.next, self.found, self.got = requests, first, found, b""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.send()

    def send(self) -> None:
        self.started = time.perf_counter()
        self.socket.sendall(self.requests[self.next % len(self.requests)])
        self.next += 1

    def read(self) -> bool:
        """Take what has arrived; whether an answer is complete."""
        new = self.socket.recv(1 << 16)
        if not new:
            self.found.append((0, time.perf_counter() - self.started))
            raise ConnectionError("the server closed a connection")
        self.got += new
        head, _, body = self.got.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if length is None or len(body) < int(length[1]):
            return False
        self.found.append((int(head.split(maxsplit=2)[1]), time.perf_counter() - self.started))
        self.got = b""
        return True


def load(port: int, names: list[str], content: list[bytes], clients: int, seconds: float) -> list[tuple[int, float]]:
    """Post pictures for some seconds; (status, seconds) of each answer."""
    head = "POST /predict/{} HTTP/1.1\r\nHost: bench\r\nContent-Length: {}\r\n\r\n"
    requests = [
        head.format(quote(name, safe=""), len(picture)).encode() + picture
        for name, picture in zip(itertools.cycle(names), content)
    ]
    found: list[tuple[int, float]] = []
    until, waiting = time.perf_counter() + seconds, 0
    with selectors.DefaultSelector() as selector:
        for i in range(clients):
            one = Client(port, requests, i, found)
            selector.register(one.socket, selectors.EVENT_READ, one)
            waiting += 1
        while waiting:
            for key, _ in selector.select(60):
                one = key.data
                if one.read():
                    if time.perf_counter() < until:
                        one.send()
                    else:
                        waiting -= 1
                        selector.unregister(one.socket)
                        one.socket.close()
    return found


def adapters(folder: Path, backbone: str, tasks: int) -> str:
    """Folders task0, task1, ... in `folder`, and what their backbone is opened by: a file for random weights."""
    torch.manual_seed(0)
    source, first = backbone, None
    for i in range(tasks):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random weights are what is timed
            model = vptm.PromptedBEiT(source, 10, prompt_mode="deep")
        if first is None and backbone != "builtin":
            first = {"lm_head.weight": model.lm_head.weight, "lm_head.bias": model.lm_head.bias}
            first |= {"mask_token": model.mask_token, **model.backbone.state_dict()}
            source = str(folder.parent / f"{folder.name}.safetensors")
            save_file({name: tensor.detach().contiguous() for name, tensor in first.items()}, source)
            model = vptm.PromptedBEiT(source, 10, prompt_mode="deep")
        model.save_pretrained(folder / f"task{i}", form="folded")
    return source


def in_process(
    folder: Path, source: str, names: list[str], content: list[bytes], batch: int, seconds: float
) -> dict[str, float]:
    """images/s of the bank alone, and with pictures read and prepared one after the other."""
    bank = vptm.TaskBank(source)
    for name in names:
        bank.add(name, folder / name)
    prepare = vptm.transforms(bank.info(names[0]))
    tasks = [names[i % len(names)] for i in range(batch)]

    def read() -> torch.Tensor:
        return torch.stack([prepare(read_upload(content[i % len(content)])) for i in range(batch)])

    images, rates = read(), {}
    for name, make in (("model", lambda: images), ("model and reading", read)):
        bank.predict(make(), tasks)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            bank.predict(make(), tasks)
            count += batch
        rates[name] = round(count / (time.perf_counter() - start), 1)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--backbone", default="builtin", help="or a BEiT of timm's (default: builtin)")
    arguments = parser.parse_args()
    content = pictures(64, 28 if arguments.backbone == "builtin" else 224)
    with tempfile.TemporaryDirectory() as place:
        folder, port = Path(place) / "tasks", free_port()
        folder.mkdir()
        names = [f"task{i}" for i in range(arguments.tasks)]
        source = adapters(folder, arguments.backbone, arguments.tasks)
        command = [sys.executable, "-m", "vptm", "serve", str(folder), "--port", str(port)]
        command += [] if source == "builtin" else ["--source", source]
        server = subprocess.Popen([*command, "--batch-size", str(arguments.batch)], stderr=subprocess.DEVNULL)
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    if server.poll() is not None:
                        raise SystemExit("the server ended before it listened") from None
                    time.sleep(0.2)
            load(port, names, content, arguments.clients, 2.0)
            before, start = resident(server.pid), time.perf_counter()
            answers = load(port, names, content, arguments.clients, arguments.seconds)
            lasted, after = time.perf_counter() - start, resident(server.pid)
        finally:
            server.terminate()
            server.wait()
        taken = sorted(seconds for _, seconds in answers)
        rates = in_process(folder, source, names, content, arguments.batch, min(10.0, arguments.seconds))
        rate = len(answers) / lasted
        line = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "command": "python -m bench.serve_load " + " ".join(sys.argv[1:]),
            "environment": environment(),
            "clients": arguments.clients,
            "seconds": round(lasted, 1),
            "statuses": dict(Counter(status for status, _ in answers)),
            "p50": round(statistics.median(taken), 4),
            "p99": round(taken[int(0.99 * len(taken))], 4),
            "images/s": round(rate, 1),
            "images/s in process": rates,
            "share of in process": {name: round(rate / found, 3) for name, found in rates.items()},
            "memory of the server": [before, after],
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
