"""Peers of a whole model: every eager form compiled, in a CUDA graph, by another runtime; and transformers' own BEiT.
How each is run, what it is checked against, and its title, colour and marker are declared here, once (`PEERS`), for the
peers of single ops as well where tables and pictures need more than their name. A new peer is an entry here, and what
builds its run in the bench that times it.

    runs |= compiled(runs)                                  # "torch.compile", "PEFT-style prefix compiled", ...
    runs |= graphed(runs)                                   # on a GPU
    runs |= by_runtimes({"prefix": prefix}, model, images)  # on a CPU, where OpenVINO and ONNX Runtime are installed
    runs |= {"transformers without prompts": hugging_face(images)}

Each is the same function as its eager form, so it is checked like that. transformers' BEiT takes no prompts (its
position bias is tied to the number of patches): it stands beside timm without prompts, and is checked against itself in
float64 with eager attention.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import timing
from vptm import PromptedBEiT
from vptm_kernels._runtime.frozen_linear import onednn_is_faster

OURS, CONCATENATION, PREFIX, TIMM = "vptm", "concatenation", "PEFT-style prefix", "timm without prompts"
TRANSFORMERS = "transformers without prompts"
WITH_MKL = f"{OURS} with MKL"
FROZEN = f"{OURS} frozen"
FLOAT32 = f"{OURS}'s own float32"
REDUCE_OVERHEAD = " reduce-overhead"

# colours that differ for every kind of colour vision (Okabe and Ito)
BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
COLOURS = (BLACK, SKY, ORANGE, PINK, GREEN, RED)


def compiled_name(eager: str) -> str:
    """Prompts concatenated have the plain name."""
    return "torch.compile" if eager == CONCATENATION else f"{eager} compiled"


def graphed_name(eager: str) -> str:
    return f"{eager} graphed"


EAGER = {
    OURS: timing.Peer(look=(BLUE, "o")),
    CONCATENATION: timing.Peer(title="concatenated prompts", look=(RED, "s")),
    PREFIX: timing.Peer(look=(BLACK, "*")),
    TIMM: timing.Peer(title="timm without any prompt", function=TIMM, look=(GREEN, "D")),
}
"""Every one of these is compared compiled and in a CUDA graph as well."""
HUGGING_FACE = {TRANSFORMERS: timing.Peer(needs=("transformers",), function=TRANSFORMERS, look=(SKY, "v"))}
_COMPILED_LOOKS = {
    "torch.compile": (PINK, "^"),
    "torch.compile max-autotune": (ORANGE, "P"),
    compiled_name(PREFIX): (SKY, "h"),
}
_NEEDS = {"OpenVINO": ("cpu", "openvino"), "ONNX Runtime": ("cpu", "onnxruntime", "onnxscript")}
RUNTIMES = {
    f"{runtime} {what}": timing.Peer(needs=needs, long=True, way="exported")
    for runtime, needs in _NEEDS.items()
    for what in ("concatenation", "prefix")
}


def compiled_peers(*eager: str) -> dict[str, timing.Peer]:
    """By name; vptm also in the mode that puts it into CUDA graphs."""
    found: dict[str, timing.Peer] = {}
    for name in eager:
        forms = timing.compiled(_nothing, compiled_name(name))
        if name == OURS:
            mode = timing.MODES[REDUCE_OVERHEAD]
            forms[compiled_name(name) + REDUCE_OVERHEAD] = timing.Peer(needs=("cuda",), mode=mode, way="compiled")
        function = EAGER[name].function if name in EAGER else OURS
        found |= {
            form: replace(peer, function=function, look=_COMPILED_LOOKS.get(form)) for form, peer in forms.items()
        }
    return found


def graphed_peers(*eager: str) -> dict[str, timing.Peer]:
    functions = {name: EAGER[name].function if name in EAGER else OURS for name in eager}
    return {
        graphed_name(name): timing.Peer(needs=("cuda",), way="graphed", function=function)
        for name, function in functions.items()
    }


def _nothing() -> None:
    """What a peer runs depends on the setting."""


PEERS: dict[str, timing.Peer] = {
    **EAGER,
    WITH_MKL: timing.Peer(needs=("cpu",)),
    FROZEN: timing.Peer(),
    FLOAT32: timing.Peer(needs=("cpu",), function=FLOAT32),
    **compiled_peers(*EAGER),
    **graphed_peers(*EAGER, FROZEN),
    **RUNTIMES,
    **HUGGING_FACE,
    # of single ops; how they are run stands in their benches
    "eager": timing.Peer(look=(RED, "s")),
    "sdpa": timing.Peer(look=(GREEN, "D")),
    "hand-folded": timing.Peer(look=(GREEN, "D")),
    **{name: timing.Peer(function=name) for name in ("flash without bias", "flash-attn-4 without bias")},
}
"""Every peer of whole models, and others that are shown in a way of their own, by the name in a json."""


def declared(name: str) -> timing.Peer:
    """How an implementation is run, checked and shown."""
    return PEERS.get(name, timing.Peer())


def title(name: str) -> str:
    return declared(name).title or name


def same_function(name: str) -> bool:
    """Whether it computes what vptm does; what takes no prompts is shown beside the peers and is none."""
    return declared(name).function == OURS


def alike(form: str, peer: str) -> bool:
    """Whether a form of vptm and a peer are run in the same way."""
    return declared(form).way == declared(peer).way


def with_mkl() -> dict[str, timing.Peer]:
    """On processors where vptm sends linears to oneDNN: vptm without that."""
    return {WITH_MKL: PEERS[WITH_MKL]} if onednn_is_faster(torch.float32) else {}


def frozen(model: PromptedBEiT) -> PromptedBEiT:
    """A copy that is frozen for inference."""
    with torch.inference_mode(False):
        twin = copy.deepcopy(model)
        twin.freeze_for_inference()
    return twin


def compiled(runs: Mapping[str, Callable[[], Any]], *, backend: str = "inductor") -> dict[str, Callable[[], Any]]:
    """Each of `runs` in one graph, by mode; those that are here and were asked for."""
    present = timing.present(compiled_peers(*runs))
    return {
        form: timing.one_graph(run, peer.mode, backend)
        for name, run in runs.items()
        for form, peer in present.items()
        if peer.mode is not None and form in compiled_peers(name)
    }


def graphed(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Replays of a CUDA graph of each of `runs`; those that are here and were asked for."""
    present = timing.present(graphed_peers(*runs))
    return {
        graphed_name(name): made_when_called(partial(timing.captured, run))
        for name, run in runs.items()
        if graphed_name(name) in present
    }


def made_when_called(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """A peer that cannot even be built is then refused like any other."""
    made = cache(make)
    return lambda: made()()


# ------------------------------------------------------------------ other runtimes on a CPU


class _Module(nn.Module):
    """`function(model, images)` as exporters want it."""

    def __init__(self, model: nn.Module, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self.model, images)


def openvino(module: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """`module(images)` by OpenVINO in float32, with as many threads as PyTorch."""
    import openvino as ov

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it traces, and the tracer warns of every shape
        exported = ov.convert_model(module, example_input=images, input=[tuple(images.shape)])
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(exported, "CPU", options).create_infer_request()
    rows = images.numpy()
    return lambda: torch.from_numpy(request.infer([rows], share_inputs=True, share_outputs=True)[0])


def onnx_runtime(module: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """`module(images)` by ONNX Runtime, with as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(module, (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rows = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, rows)[0])


_RUNTIMES = {"OpenVINO": openvino, "ONNX Runtime": onnx_runtime}


def by_runtimes(
    functions: Mapping[str, Callable[[Any, Tensor], Tensor]], model: nn.Module, images: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """`function(model, images)` by every runtime that is here and was asked for; "concatenation" and "prefix" by name.

    A form is exported when first called.
    """
    present = timing.present(RUNTIMES)
    return {
        f"{runtime} {what}": made_when_called(partial(make, _Module(model, function), images))
        for runtime, make in _RUNTIMES.items()
        for what, function in functions.items()
        if f"{runtime} {what}" in present
    }


# ------------------------------------------------------------------ transformers

_HUGGING_FACE_SIZES = {"tiny": (32, 2, 2, 32), "B": (768, 12, 12, 224), "L": (1024, 24, 16, 224)}


@cache
def _hugging_face(size: str) -> Any:
    """BEiT-B/16 or -L/16 at 224 with random weights, tables of position bias included."""
    from transformers import BeitConfig, BeitModel

    width, depth, heads, side = _HUGGING_FACE_SIZES[size]
    config = BeitConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=side,
        use_relative_position_bias=True,
        use_mean_pooling=False,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = BeitModel(config, add_pooling_layer=False)
    for name, parameter in model.named_parameters():
        if "table" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def hugging_face(images: Tensor, size: str = "B") -> Callable[[], Tensor]:
    """Features (B, C) of the class token by transformers' BEiT with its fused attention, in the dtype of `images`.

    Raises:
        ImportError: transformers is not installed.
    """
    if not timing.installed("transformers"):
        raise ImportError("needs the package transformers, which is not installed")
    model = copy.deepcopy(_hugging_face(size)).to(images.device, images.dtype)
    return lambda: model(images).last_hidden_state[:, 0]


def hugging_face_check(images: Tensor, size: str = "B") -> timing.Check:
    """Whether a result is that of the same weights in float64 with attention spelled out, on the first two images; as
    exact as that is in the dtype of `images`."""
    own = copy.deepcopy(_hugging_face(size)).to(images.device, images.dtype)
    own.set_attn_implementation("eager")
    exact = copy.deepcopy(own).double()
    with torch.inference_mode():
        few = images[:2]
        expected, eager = (model(rows).last_hidden_state[:, 0] for model, rows in ((exact, few.double()), (own, few)))
    within = timing.within_budget([expected], [eager], [timing.FACTOR])

    def check(name: str, found: Tensor) -> None:
        timing.finite(name, found)
        within(name, found[:2])

    return check
