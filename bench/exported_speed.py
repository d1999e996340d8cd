"""Exported models in the runtimes that read them, beside vptm itself.

    python -m bench.exported_speed --batch 4 --out bench/results/exported.json

A model with deep prompts and random weights is written by `vptm.export.formats.export` and run by torch (pt2), by the
compiled package (aoti), by ONNX Runtime and by OpenVINO (onnx), with as many threads as PyTorch; what is not installed,
or does not give the model's scores, is left out by name. All are timed in turns: in seconds of the process's processor
time where torch runs on one thread (OMP_NUM_THREADS=1), else of the wall. Prints JSON: medians, and quartiles of the
images/s of each over those of vptm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from cpuinfo import get_cpu_info
from torch import Tensor

import vptm
from bench.task_bank_scale import model_of, ratio, timed
from bench.timing import environment
from vptm.export.formats import export

Run = Callable[[], Tensor]
# of the largest score: other runtimes sum in another order
TOLERANCE = 1e-3


def torch_program(model: vptm.PromptedBEiT, folder: Path, images: Tensor) -> Run:
    export(model, folder / "model.pt2", "pt2")
    run = torch.export.load(folder / "model.pt2").module()
    return lambda: run(images)


def compiled_package(model: vptm.PromptedBEiT, folder: Path, images: Tensor) -> Run:
    export(model, folder / "model.aoti", "aoti")
    run = torch._inductor.aoti_load_package(str(folder / "model.aoti"))
    return lambda: run(images)


def _onnx(model: vptm.PromptedBEiT, folder: Path) -> Path:
    path = folder / "model.onnx"
    if not path.exists():
        export(model, path, "onnx")
    return path


def onnx_runtime(model: vptm.PromptedBEiT, folder: Path, images: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx(model, folder), options, providers=["CPUExecutionProvider"])
    rows = {"images": images.numpy()}
    return lambda: torch.from_numpy(session.run(["logits"], rows)[0])


def openvino(model: vptm.PromptedBEiT, folder: Path, images: Tensor) -> Run:
    import openvino as ov

    core = ov.Core()
    read = core.read_model(_onnx(model, folder))
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request, rows = core.compile_model(read, "CPU", options).create_infer_request(), images.numpy()
    return lambda: torch.from_numpy(request.infer([rows], share_inputs=True)[0])


RUNTIMES = {"pt2": torch_program, "aoti": compiled_package, "ONNX Runtime": onnx_runtime, "OpenVINO": openvino}


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    model = model_of(arguments.model, arguments.classes, arguments.prompts)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(arguments.batch, *model.default_cfg["input_size"], generator=generator)
    twin = model.sealed_twin()
    runs: dict[str, Run] = {"vptm": lambda: twin(images)}
    want, left_out = runs["vptm"](), {}
    for name in arguments.runtimes.split(","):
        try:
            run = RUNTIMES[name](model, folder, images)
            difference = float((run() - want).abs().max() / want.abs().max())
        except ModuleNotFoundError as error:
            left_out[name] = str(error)
            continue
        if not difference <= TOLERANCE:
            left_out[name] = f"its scores are {difference:.2g} of the largest away from vptm's"
            continue
        runs[name] = run
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = timed(dict(runs), arguments.rounds, clock)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m bench.exported_speed " + " ".join(sys.argv[1:]),
        "cpu": get_cpu_info()["brand_raw"],
        "environment": environment(),
        "clock": "processor time of the process" if clock is time.process_time else "wall",
        "model": arguments.model,
        "batch": arguments.batch,
        "prompts": arguments.prompts,
        "rounds": arguments.rounds,
        "seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "images/s over vptm": {
            name: ratio(seconds["vptm"], values) for name, values in seconds.items() if name != "vptm"
        },
        "left out": left_out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="beitv2_base_patch16_224", help="a timm name, or builtin")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="those that are tried")
    parser.add_argument("--out", type=Path, help="json to write as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        text = json.dumps(measured(arguments, Path(folder)), indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
