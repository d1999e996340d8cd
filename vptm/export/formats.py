"""Files that give a model's class scores where vptm is not installed."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from vptm.export.program import export_program
from vptm.frozen.modes import eval_mode
from vptm.messages import one_line, one_of
from vptm.models.prompted_model import PromptedModel
from vptm.settings import THRESHOLD, ExportFormat
from vptm.version import __version__
from vptm.weights.adapter_format import PREPROCESSING
from vptm.weights.files import replacing_several

FORMATS = get_args(ExportFormat)
FACTS = "vptm.json"
# Below it torch's ONNX exporter has no translation of its own and converts versions, not always.
_OLDEST_OPSET = 18
# A protobuf file may not be larger; weights then stand beside it.
_LARGEST_PROTOBUF = 1_900_000_000


# What is made of the logits, in every file.
_ONE_LABEL = "logits of one label an image: probabilities are softmax(logits), the label is that of the largest"
_SEVERAL_LABELS = (
    f"logits of several labels an image: probabilities are sigmoid(logits), labels those of at least {THRESHOLD}"
)


class Exported(NamedTuple):
    """A file that was written, how many bytes it and what stands beside it have, and the largest difference from the
    model's scores of those that the graph in it gives in PyTorch over a batch, None of weights alone."""

    path: Path
    size: int
    difference: float | None


def export(model: PromptedModel, path: str | Path, to: str, *, opset: int | None = None) -> Exported:
    """Write `model` as it is now to a file that runs without vptm.

    - "pt2": `torch.export.load(path).module()(images)`, with torch alone. What the model is stands in the extra file
      "vptm.json".
    - "aoti": `torch._inductor.aoti_load_package(path)(images)`, compiled for the device and the processor of the model;
      needs a C++ compiler here, and torch alone there.
    - "onnx": any ONNX runtime; `pip install "vptm[onnx]"` to write it. What the model is stands in its metadata.
    - "safetensors": all weights of the model, backbone too, under their `state_dict` names, and in the metadata how to
      build it; a file of weights, which runs nothing.

    All but the last take `images`, (B, channels, height, width) in the model's dtype and normalised as
    `vptm.transforms` does, for any B >= 1, and give `logits`, (B, K); "scores" in what they say of the model tells
    whether a softmax or, of a model with `multi_label=True`, a sigmoid makes probabilities of them.

    Args:
        model: a prompted model; it is in eval mode meanwhile.
        path: of the file, which is replaced as a whole, or not at all.
        to: "pt2", "aoti", "onnx" or "safetensors".
        opset: of ONNX; by default torch's.

    Raises:
        ValueError: another format or opset, or a graph whose scores are not the model's; nothing is written then.
        ModuleNotFoundError: what writes the format is not installed.
        OSError: the file cannot be written.

    Example:
        >>> model = vptm.PromptedBEiT("builtin", num_classes=10, prompt_mode="deep")
        >>> export(model, "clothes.pt2", "pt2").difference < 1e-4
        True
        >>> torch.export.load("clothes.pt2").module()(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])
    """
    one_of("to", to, FORMATS)
    if to != "onnx" and opset is not None:
        raise ValueError(f"opset must be None for {to!r}, got {opset!r}")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {path}")
    if to == "onnx":
        _check_opset(opset)
    if to == "aoti":
        _check_compiler()
    difference = None
    with eval_mode(model), torch.no_grad():
        if to != "safetensors":
            with _by_torch("torch.export must trace the model"):
                program = export_program(model)
            difference = _difference(program.module(), model)
        with replacing_several(path) as file:
            if to == "safetensors":
                _save_weights(model, file)
            elif to == "pt2":
                _save_program(program, file, facts(model))
            elif to == "aoti":
                _compile(program, file, facts(model))
            else:
                _save_onnx(program, file, facts(model), opset)
            size = sum(made.stat().st_size for made in file.parent.iterdir())
    return Exported(path, size, difference)


@contextmanager
def _by_torch(must: str) -> Iterator[None]:
    """What torch says at length of a model that it cannot write, as one line; of a file, as it is."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # torch's exporters and compilers raise whatever is raised inside
        raise ValueError(one_line(f"{must}, got {type(error).__name__}: {error}")) from error


def facts(model: PromptedModel) -> dict[str, str]:
    """What a file says of its model: strings, those that are not words as JSON."""
    weight = model.backbone.patch_embed.proj.weight
    config = model.default_cfg
    return {
        "vptm_version": __version__,
        "model_class": type(model).__name__,
        "model": json.dumps(model.config),
        "architecture": json.dumps(model.architecture, default=str),
        "weight_hash": model.weight_hash(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "class_names": json.dumps(model.class_names),
        "scores": _SEVERAL_LABELS if model.multi_label else _ONE_LABEL,
        "preprocessing": json.dumps({name: config[name] for name in PREPROCESSING if name in config}, default=str),
    }


def _difference(run: Callable[[Tensor], Tensor], model: PromptedModel) -> float:
    """Largest difference of the scores of `run` from the model's, over a batch of another size than was traced."""
    weight = model.backbone.patch_embed.proj.weight
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, *model.default_cfg["input_size"], generator=generator).to(weight)
    found, want = run(images).double(), model(images).double()
    difference = float((found - want).abs().max())
    # what one forward pass may lose in this dtype, and a wrong graph would not stay below
    allowed = 1e3 * torch.finfo(weight.dtype).eps * max(1.0, float(want.abs().max()))
    if not difference <= allowed:
        raise ValueError(f"the exported scores must be the model's, got a difference of {difference:.3g}")
    return difference


def _save_program(program: torch.export.ExportedProgram, file: Path, said: Mapping[str, str]) -> None:
    buffer = io.BytesIO()  # where a disk is full, torch's own writer ends the process
    torch.export.save(program, buffer, extra_files={FACTS: json.dumps(dict(said), indent=2)})
    file.write_bytes(buffer.getbuffer())


def _check_compiler() -> None:
    compiler = os.environ.get("CXX")
    if compiler is not None and shutil.which(compiler) is None:
        raise ModuleNotFoundError(f"export to aoti needs a C++ compiler, CXX={compiler!r} is none: set it to one")
    if compiler is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ModuleNotFoundError("export to aoti needs a C++ compiler: install g++ or set CXX")


def _compile(program: torch.export.ExportedProgram, file: Path, said: Mapping[str, str]) -> None:
    with _by_torch("AOTInductor must compile the graph"):
        made = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(file.with_name("package.pt2")),
            inductor_configs={"aot_inductor.metadata": dict(said)},
        )
    os.replace(made, file)


def _check_opset(opset: int | None) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'export to onnx needs {" and ".join(missing)}: pip install "vptm[onnx]"')
    if opset is None:
        return
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not _OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"opset must be in {_OLDEST_OPSET}..{newest}, got {opset!r}")


def _save_onnx(program: torch.export.ExportedProgram, file: Path, said: Mapping[str, str], opset: int | None) -> None:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with _by_torch(f"torch.onnx.export must write the graph in opset {opset or 'of its choice'}"):
        exported = torch.onnx.export(program, dynamo=True, **names, opset_version=opset, verbose=False)
    assert exported is not None  # it is where dynamo=False
    exported.model.metadata_props.update({f"vptm.{name}": value for name, value in said.items()})
    weights = sum(value.nbytes for value in (*program.state_dict.values(), *_tensors(program)))
    exported.save(file, external_data=weights > _LARGEST_PROTOBUF)


def _tensors(program: torch.export.ExportedProgram) -> list[Tensor]:
    return [value for value in program.constants.values() if isinstance(value, Tensor)]


def _save_weights(model: PromptedModel, file: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    # one entry: safetensors writes several in random order, and equal models are to be equal files
    save_file(tensors, file, metadata={"vptm": json.dumps(facts(model), sort_keys=True)})
