"""Exported models: the same scores where neither vptm nor its kernels are, for any batch size."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from beit_factory import tiny_beit
from console import Console
from safetensors import safe_open
from tiny_models import build, build_vit, images, pictures, relative_error, tiny_vit

from vptm import PromptedBEiT, save_adapter
from vptm.export import formats
from vptm.export.formats import export
from vptm.export.program import export_program

DEEP = {"prompt_mode": "deep"}
# Prompts as a prefix and as rows, mixed and with a bias that was learned; every way to read and to score.
CASES = {
    "deep": DEEP,
    "shallow, softmax tokens, a patch replaced": {"token_activation": "softmax", "mask_mode": "replace"},
    "progressive, class row, linear": {"prompt_mode": "progressive", "readout": "cls", "verbalizer": "linear"},
    "gates": DEEP | {"prompt_gate": -1.0},
    "gates of rows, mean": {"prompt_gate": -1.0, "readout": "mean", "prompt_options": {"gate_per": "head"}},
    "learned bias, mean, token space": DEEP | {"extra_bias": "learned", "readout": "mean", "prototype_dim": None},
}
has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not has_onnx, reason="onnx, onnxscript and onnxruntime are not installed")

ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vptm", "vptm_kernels", "timm", "einops"):
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Absent())
import json, numpy, torch
said = {"vptm.json": ""}
program = torch.export.load(sys.argv[1], extra_files=said).module()
images = numpy.load(sys.argv[2])
scores = program(torch.from_numpy(images))
numpy.save(sys.argv[3], scores.detach().numpy())
print(json.loads(said["vptm.json"])["class_names"])
"""


@pytest.mark.parametrize("case", CASES)
def test_the_graph_is_plain_and_gives_the_same_scores(case):
    """For one image and for more than were traced, in no_grad as everyone exports; one case with gradients left on."""
    model = build(tiny_beit(depth=2), **CASES[case])
    with torch.set_grad_enabled(case == "deep"):
        program = export_program(model)
    assert not [node.target for node in program.graph.nodes if "vptm" in str(node.target)]
    run = program.module()
    for batch in (1, 5):
        x = images(model, batch)
        with torch.no_grad():
            assert relative_error(run(x), model(x)) <= 1e-12


def test_a_graph_holds_no_weight_twice():
    """The originals of folded blocks, and a token head that became part of a projection, stay out of the file."""
    model = build(tiny_beit(dim=32), **DEEP, vocab_size=500)
    program = export_program(model)
    held = sum(t.numel() for t in (*program.state_dict.values(), *formats._tensors(program)))
    blocks = sum(p.numel() for p in model.backbone.blocks.parameters())
    biases = sum(t.numel() for t in model.folded_constants().biases[:1])
    assert held < 1.1 * blocks + biases + 500 * 6 + 3 * 2 * 3 * 32 * 3 + 2000


def test_a_vision_transformer_and_a_backbone_that_does_not_fold():
    model = build_vit(tiny_vit(depth=2), **DEEP)
    x = pictures(model, 4)
    with torch.no_grad():
        assert relative_error(export_program(model).module()(x), model(x)) <= 1e-12
    model = build(tiny_beit(depth=1))
    model.backbone.blocks[0].mlp.fc1 = torch.nn.Sequential(model.backbone.blocks[0].mlp.fc1)
    with torch.no_grad():
        assert relative_error(export_program(model).module()(images(model, 3)), model(images(model, 3))) <= 1e-12


def test_a_pt2_runs_where_vptm_is_not(tmp_path):
    """In a process that can import neither vptm, its kernels nor timm: the same labels, and what they are called."""
    model = build(tiny_beit(depth=1), **DEEP)
    model.class_names = [f"kind {k}" for k in range(5)]
    done = export(model, tmp_path / "model.pt2", "pt2")
    assert done.difference < 1e-10 and done.size == (tmp_path / "model.pt2").stat().st_size
    x = images(model, 7)
    np.save(tmp_path / "images.npy", x.numpy())
    command = [sys.executable, "-c", ALONE, "model.pt2", "images.npy", "scores.npy"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True).stdout
    assert json.loads(told) == model.class_names
    with torch.no_grad():
        assert relative_error(torch.from_numpy(np.load(tmp_path / "scores.npy")), model(x)) <= 1e-12


@pytest.mark.parametrize("to", ["pt2", "safetensors", pytest.param("onnx", marks=needs_onnx)])
@pytest.mark.parametrize("several", [False, True])
def test_a_file_says_what_its_scores_mean(to, several, tmp_path):
    """Without it who loads a file of several labels would take a softmax, and of one label sigmoids."""
    model = build(tiny_beit(depth=1), **DEEP, multi_label=several).float()
    path = tmp_path / "model"
    export(model, path, to)
    if to == "pt2":
        found = {"vptm.json": ""}
        program = torch.export.load(path, extra_files=found).module()
        said = json.loads(found["vptm.json"])
        with torch.no_grad():
            assert relative_error(program(images(model, 3).float()), model(images(model, 3).float())) <= 1e-5
    elif to == "safetensors":
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()["vptm"])
    else:
        import onnx

        said = {each.key.removeprefix("vptm."): each.value for each in onnx.load(path).metadata_props}
    assert json.loads(said["model"])["multi_label"] is several
    assert ("sigmoid(logits)" in said["scores"], "softmax(logits)" in said["scores"]) == (several, not several)


@needs_onnx
def test_onnx_runtime_gives_the_same_scores_for_any_batch(tmp_path):
    """Prompts that run as rows, then as a prefix; an activation of tokens."""
    import onnxruntime

    options = DEEP | {"prompt_options": {"blocks": 1}, "token_activation": "softmax"}
    model = build(tiny_beit(depth=2), **options).float()
    export(model, tmp_path / "model.onnx", "onnx", opset=20)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == ["images"]
    assert [node.name for node in session.get_outputs()] == ["logits"]
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["vptm.model"])["num_classes"] == 5 and said["vptm.weight_hash"] == model.weight_hash()
    for batch in (1, 2, 9):
        x = images(model, batch).float()
        with torch.no_grad():
            want = model(x)
        found = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
        assert relative_error(found, want) <= 1e-5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exporters_that_know_no_op_of_ours_name_the_way_out(tmp_path):
    """Theirs would be pages about an operator that the user never wrote; the reference path is traced."""
    model = build(tiny_beit(depth=1), impl="auto").float()
    x = images(model, 2).float()
    calls = {"jit.trace": lambda: torch.jit.trace(model, x)}
    if has_onnx:
        path = str(tmp_path / "model.onnx")
        calls["TorchScript"] = lambda: torch.onnx.export(model, (x,), path, dynamo=False)
        calls["dynamo"] = lambda: torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=r"need impl='reference', got impl='auto': .* `vptm export RUN") as error:
            call()
        assert name == "dynamo" or "\n" not in str(error.value)
    model.impl = "reference"
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiled_package_gives_the_same_scores(tmp_path):
    """Small enough to compile in a test; the file is written as a whole under the name that was asked for."""
    model = build(tiny_beit(depth=1), **DEEP).float()
    export(model, tmp_path / "model.aoti", "aoti")
    assert [file.name for file in tmp_path.iterdir()] == ["model.aoti"]
    run = torch._inductor.aoti_load_package(str(tmp_path / "model.aoti"))
    for batch in (1, 6):
        x = images(model, batch).float()
        with torch.no_grad():
            assert relative_error(run(x), model(x)) <= 1e-5


def test_safetensors_hold_every_weight(tmp_path):
    model = build()
    export(model, tmp_path / "model.safetensors", "safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["vptm"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert said["weight_hash"] == model.weight_hash()
    state = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_a_file_with_other_scores_is_not_written(tmp_path, monkeypatch):
    """What was there stays, and nothing else is left, where a graph is wrong or the disk is full."""
    model, other, path = build(), build(seed=3), tmp_path / "model.pt2"
    path.write_bytes(b"before")
    monkeypatch.setattr(formats, "export_program", lambda model: SimpleNamespace(module=lambda: other))
    with pytest.raises(ValueError, match="the exported scores must be the model's, got a difference of"):
        export(model, path, "pt2")

    def full(program, file, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "export_program", lambda model: SimpleNamespace(module=lambda: model))
    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match=r"model\.pt2 cannot be written: No space left on device"):
        export(model, path, "pt2")
    assert path.read_bytes() == b"before" and [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


FULL = """
import resource, sys
import vptm
from vptm.export.formats import export
model = vptm.PromptedBEiT("builtin", 3)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for to in sys.argv[2:]:
    try:
        export(model, sys.argv[1] + "/model." + to, to)
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(importlib.util.find_spec("resource") is None, reason="this system has no limit of file sizes")
def test_a_file_that_grows_no_further_is_named(tmp_path):
    """In a process of its own, as torch's writer ends the one that it fails in."""
    writer_raises = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 11)  # that of 2.11 crashes its process
    formats = ["pt2", "safetensors"] if writer_raises else ["safetensors"]
    command = [sys.executable, "-c", FULL, str(tmp_path), *formats]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    assert len(told) == len(formats), told
    for line, name in zip(told, (f"model.{each}" for each in formats)):
        assert f"{name} cannot be written: " in line and "File too large" in line, line
    assert not list(tmp_path.iterdir())


class Branching(torch.nn.Linear):
    """What no exporter can trace."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


def test_what_torch_cannot_write_is_one_clear_line(tmp_path, monkeypatch):
    """A backbone that branches on its values, and a compiler that is none: nothing is written, pages are not shown."""
    model = build(tiny_beit(depth=1))
    fc1 = model.backbone.blocks[0].mlp.fc1
    model.backbone.blocks[0].mlp.fc1 = Branching(fc1.in_features, fc1.out_features).double()
    with pytest.raises(ValueError, match=r"^torch\.export must trace the model, got ") as error:
        export(model, tmp_path / "model.pt2", "pt2")
    assert "\n" not in str(error.value) and len(str(error.value)) <= 500
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModuleNotFoundError, match="needs a C\\+\\+ compiler, CXX='no-such-compiler' is none"):
        export(model, tmp_path / "model.aoti", "aoti")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: "):
        export(model, tmp_path / "file" / "model.safetensors", "safetensors")


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"to": "tflite"}, "to must be one of pt2, aoti, onnx, safetensors, got 'tflite'"),
        ({"to": "pt2", "opset": 20}, "opset must be None for 'pt2', got 20"),
        pytest.param({"to": "onnx", "opset": 3}, "opset must be in 18..", marks=needs_onnx),
        ({"to": "pt2", "path": "."}, "path must be a file, got the folder ."),
    ],
)
def test_wrong_calls_are_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        export(**({"model": build(), "path": "model"} | arguments))
    assert "\n" not in str(error.value)


def test_onnx_without_its_packages_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    missing = ("onnx", "onnxscript")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest)
    )
    with pytest.raises(
        ModuleNotFoundError, match=r'export to onnx needs onnx and onnxscript: pip install "vptm\[onnx\]"'
    ):
        export(build(), "model.onnx", "onnx")


def test_the_command_says_what_it_wrote(capsys, tmp_path):
    vptm_command = Console(capsys)
    save_adapter(PromptedBEiT("builtin", 3), tmp_path / "run")
    common = ["export", tmp_path / "run", "--out", tmp_path / "model.safetensors"]
    code, out, _ = vptm_command(*common, "--to", "safetensors")
    assert (
        code == 0
        and out.startswith(f"{tmp_path / 'model.safetensors'}  ")
        and (tmp_path / "model.safetensors").is_file()
    )
    for arguments, message in (
        ([], "Missing option '--to'. It must be one of pt2, aoti, onnx, safetensors."),
        (["--to", "tflite"], "to must be one of pt2, aoti, onnx, safetensors, got 'tflite'"),
        (["--to", "pt2", "--opset", "20"], "opset must be None for 'pt2', got 20"),
    ):
        code, line = vptm_command.refused(*common, *arguments)
        assert code == 2 and message in line
