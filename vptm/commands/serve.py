"""`vptm serve`."""

from __future__ import annotations

import gc
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vptm.commands.options import Backbone, Device, Impl, Thresholds
from vptm.serving.limits import Limits
from vptm.settings import THRESHOLD
from vptm.terminal import say


def serve(
    folder: Annotated[Path, typer.Argument(help="Run or adapter folder, or a folder of them on one backbone.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    batch_size: Annotated[int, typer.Option(help="Images of a batch, at most.")] = Limits.batch_size,
    patience: Annotated[
        float, typer.Option(help="Seconds that the first of a batch waits for others.")
    ] = Limits.patience,
    most_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; more are answered 503 at once.")
    ] = Limits.most_waiting,
    most_bytes: Annotated[int, typer.Option(help="Bytes of a picture.")] = Limits.most_bytes,
    most_pixels: Annotated[int, typer.Option(help="Pixels of a picture.")] = Limits.most_pixels,
    threshold: Thresholds = None,
    source: Backbone = None,
    device: Device = "auto",
    impl: Impl = "auto",
) -> None:
    """Answer over HTTP: post a picture, get labels; and a page to drop pictures on.

    Needs `pip install "vptm[serve]"`. Requests that arrive together share a batch, whatever their tasks. There is no
    login: put it behind what has one, and keep the address to this machine otherwise.

    \b
    Example:
      vptm serve runs/builtin-1
      curl --data-binary @shoe.png http://127.0.0.1:8000/predict
    """
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'vptm serve needs {" and ".join(missing)}: pip install "vptm[serve]"')
    import uvicorn

    from vptm.serving.server import Server, open_tasks, task_folders
    from vptm.serving.thresholds import check_used, read_thresholds
    from vptm.training.devices import device_of

    limits = Limits(batch_size, patience, most_waiting, most_bytes, most_pixels)
    folders = task_folders(folder)
    least, own = read_thresholds(threshold or [], folders)
    bank, models = open_tasks(
        folders,
        source=source,
        device=device_of(device),
        impl=impl,
        threshold=THRESHOLD if least is None else least,
        thresholds=own,
    )
    check_used((bank.info(name).threshold for name in bank.names), least)
    server = Server(bank, models, limits)
    say(f"{len(bank)} tasks: {', '.join(bank.names[:10])}{' ...' if len(bank) > 10 else ''}")
    # what is loaded stays: looking through it for garbage takes a third of the time of a request outside its model
    gc.collect()
    gc.freeze()
    try:
        uvicorn.run(server.app, host=host, port=port, log_level="warning", access_log=False, proxy_headers=False)
    finally:
        server.close()
