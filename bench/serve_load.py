"""Load on a server of the loopback address, beside the same batches in process.

    python -m bench.serve_load --seconds 60 --clients 64

A server of the built-in model with `--tasks` adapters runs in a process of its own; clients on one thread each post
pictures over connections that stay open, until the time is over. Prints one JSON line: answers by status, p50 and p99
of the seconds of an answer, images/s, images/s of `vptm.TaskBank.predict` on batches of the server's size in this
process, with and without reading the pictures, and the memory of the server before and after.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vptm
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


def pictures(count: int) -> list[bytes]:
    """PNG files of random grey pixels."""
    generator, found = np.random.default_rng(0), []
    for _ in range(count):
        content = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (28, 28), dtype=np.uint8)).save(content, "PNG")
        found.append(content.getvalue())
    return found


def client(port: int, names: list[str], content: list[bytes], until: float, found: list[tuple[int, float]]) -> None:
    """Post pictures one after the other; (status, seconds) of each, 0 for none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    count = 0
    while time.perf_counter() < until:
        start, status = time.perf_counter(), 0
        try:
            connection.request("POST", f"/predict/{names[count % len(names)]}", body=content[count % len(content)])
            answer = connection.getresponse()
            answer.read()
            status = answer.status
        except OSError:
            connection.close()
        found.append((status, time.perf_counter() - start))
        count += 1
    connection.close()


def in_process(folder: Path, names: list[str], content: list[bytes], batch: int, seconds: float) -> dict[str, float]:
    """images/s of the bank alone, and with pictures read and prepared one after the other."""
    bank = vptm.TaskBank("builtin")
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
    arguments = parser.parse_args()
    content = pictures(64)
    with tempfile.TemporaryDirectory() as place:
        folder, port = Path(place), free_port()
        names = [f"task{i}" for i in range(arguments.tasks)]
        for i, name in enumerate(names):
            torch.manual_seed(i)
            vptm.PromptedBEiT("builtin", 10, prompt_mode="deep").save_pretrained(folder / name, form="folded")
        command = [sys.executable, "-m", "vptm", "serve", str(folder), "--port", str(port)]
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
            warm: list[tuple[int, float]] = []
            client(port, names, content, time.perf_counter() + 2, warm)
            before, found = resident(server.pid), [[] for _ in range(arguments.clients)]
            start = time.perf_counter()
            threads = [
                threading.Thread(target=client, args=(port, names, content, start + arguments.seconds, each))
                for each in found
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            lasted, after = time.perf_counter() - start, resident(server.pid)
        finally:
            server.terminate()
            server.wait()
        answers = [answer for each in found for answer in each]
        taken = sorted(seconds for _, seconds in answers)
        rates = in_process(folder, names, content, arguments.batch, min(10.0, arguments.seconds))
        line = {
            "clients": arguments.clients,
            "seconds": round(lasted, 1),
            "statuses": dict(Counter(status for status, _ in answers)),
            "p50": round(statistics.median(taken), 4),
            "p99": round(taken[int(0.99 * len(taken))], 4),
            "images/s": round(len(answers) / lasted, 1),
            "images/s in process": rates,
            "memory of the server": [before, after],
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
