"""`vptm profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from vptm.commands.options import Device, Impl, choice
from vptm.settings import PromptMode, Readout
from vptm.terminal import print_table, say


def profile(
    model: Annotated[str, typer.Argument(help="builtin, a checkpoint as --model of `vptm train`, or a timm ViT name.")],
    prompts: Annotated[int, typer.Option(help="Prompts per layer.")] = 10,
    mode: Annotated[str, choice(get_args(PromptMode), "Where prompts enter.")] = "deep",
    readout: Annotated[
        str | None,
        choice(
            get_args(Readout),
            "Row that is read; the mask row where the weights have one, else cls.",
            show_default=False,
        ),
    ] = None,
    img_size: Annotated[
        int | None, typer.Option(help="Pixels; the source's own where not given.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 4,
    repeats: Annotated[int, typer.Option(help="Timed runs of each path; the median counts.")] = 5,
    device: Device = "auto",
    impl: Impl = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw where FLOPs and time go, a PNG.", show_default=False)] = None,
) -> None:
    """Show what each block costs, beside concatenated prompts.

    Parameters, trained parameters, and per image: FLOPs of inference, bytes a training step keeps for backward, time of
    inference. Weights do not change any of it, so a timm name is not downloaded.

    \b
    Example:
      vptm profile builtin
      vptm profile beit_base_patch16_224 --prompts 100 --plot beit.png
    """
    if plot is not None and plot.suffix != ".png":
        raise ValueError(f"--plot must be a file name that ends in .png, got {plot}")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise FileNotFoundError(f"--plot: no such folder: {plot.absolute().parent}")
    for name, value in (("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    import torch

    from vptm.inspection.profile import draw, forwards_of, stages_of, table
    from vptm.models.opening import open_model
    from vptm.training.devices import device_of

    place = device_of(device)
    asked = {} if readout is None else {"readout": readout}
    prompted = open_model(model, 100, prompt_length=prompts, prompt_mode=mode, img_size=img_size, impl=impl, **asked)
    images = torch.randn(batch, *prompted.default_cfg["input_size"], device=place)
    stages = stages_of(prompted.to(place), images, repeats=repeats)
    forwards = forwards_of(prompted, images, repeats=repeats)
    title = f"{model}, {mode} prompts, P = {prompts}, read-out {prompted.readout}, batch {batch}, per image"
    print_table(table(stages, batch, title, forwards))
    if plot is not None:
        draw(stages, batch, title, plot)
        say(f"wrote {plot}")
