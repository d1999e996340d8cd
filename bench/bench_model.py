"""A whole prompted BEiT, inference: images in, read-out rows out.

    pytest bench/bench_model.py --benchmark-only
    pytest bench/bench_model.py --benchmark-only --peers "torch.compile max-autotune" -k "deep-100-64"

Implementations of one setting share a group: timm's own forward without any prompt, the same blocks with the prompts
concatenated (scaled_dot_product_attention, position bias built per block, as eager code does it), and vptm. vptm is
compared in turns with those and, on a GPU, in the two settings that come first with the concatenated form compiled and
transformers' BEiT without prompts, and for few images with both captured in CUDA graphs. Compiling with max-autotune
takes minutes and happens when asked for by name. Whoever takes prompts is checked against the fp64 reference first.

BEiT-B/16 at 224 and batch 4 on a CPU: the smallest batch at which linear layers, not overhead, take the time. On a GPU
every size, resolution, number of prompts and batch, most important first, so that a run cut short has those.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn import functional as F

from bench import peers, timing
from vptm import PromptedBEiT
from vptm.reference import block_forward, sdpa

DEVICE, DTYPE = timing.selection.device, timing.selection.dtypes[0]
CUDA = DEVICE == "cuda"
TOLERANCE = 2e-2 if DTYPE in (torch.float16, torch.bfloat16) else 1e-4
SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16)}
EAGER = ("timm without prompts", "concatenation")
# (implementation, in a CUDA graph): launches of few images take longer than their work
GRAPHS = {"concatenation in a CUDA graph": "concatenation", "vptm in a CUDA graph": "vptm"}
PEERS = {
    **{name: timing.Peer(lambda: None) for name in EAGER},
    **{name: timing.Peer(lambda: None, needs=("cuda",)) for name in GRAPHS},
    **peers.PEERS,
}


class Setting(NamedTuple):
    mode: str
    length: int
    batch: int
    size: str = "B"
    side: int = 224

    def __str__(self) -> str:
        larger = "" if (self.size, self.side) == ("B", 224) else f"-{self.size}{self.side}"
        return f"{self.mode}-{self.length}-{self.batch}{larger}"


def _settings() -> list[Setting]:
    prompts = [("deep", 100), ("deep", 50), ("deep", 10), ("shallow", 100), ("shallow", 10), ("no", 0)]
    if not timing.selection.full:
        return [Setting(*each, 4) for each in prompts]
    first = [Setting(*each, 64) for each in (("deep", 100), ("shallow", 10), ("deep", 50), ("no", 0))]
    first += [Setting("deep", 100, batch) for batch in (1, 8)]
    every = [*prompts, ("deep", 200), ("shallow", 50), ("shallow", 200)]
    rest = [
        Setting(*each, batch, size, side)
        for (size, side), batch, each in product(product("BL", (224, 384)), (64, 1, 8, 256), every)
    ]
    return list(dict.fromkeys(first + rest))


SETTINGS = _settings()
COMPILED = SETTINGS[:2]  # compiling takes half a minute each


@cache
def _backbone(size: str = "B", side: int = 224) -> Beit:
    torch.manual_seed(0)
    width, depth, heads = SIZES[size]
    beit = Beit(
        img_size=side,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        global_pool="token",
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=0.1,
    )
    for name, parameter in beit.named_parameters():
        if "table" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return beit.eval()


@cache
def _images(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)


@cache
def _model(setting: Setting) -> tuple[PromptedBEiT, Tensor]:
    """The model, and the read-out rows its fp64 reference gives for the first two of the images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(
            copy.deepcopy(_backbone(setting.size, setting.side)),
            100,
            prompt_mode="deep" if setting.mode == "no" else setting.mode,
            prompt_length=setting.length,
            readout="cls",
            token_activation="hidden",
        ).eval()
    oracle = copy.deepcopy(model).to(DEVICE).double()
    oracle.impl = "reference"
    with torch.inference_mode():
        expected = oracle.forward_hidden(_images(setting.batch, setting.side)[:2].double())
    return model.to(DEVICE, DTYPE), expected


def _runs(setting: Setting) -> dict[str, Callable[[], Tensor]]:
    model, images = _model(setting)[0], _images(setting.batch, setting.side)
    plain = copy.deepcopy(_backbone(setting.size, setting.side)).to(DEVICE, DTYPE)
    return {
        "timm without prompts": lambda: plain(images),
        "concatenation": lambda: _concatenate(model, images),
        "vptm": lambda: model.forward_hidden(images),
    }


def _check(setting: Setting) -> timing.Check:
    expected = _model(setting)[1]

    def check(name: str, found: Tensor) -> None:
        if name == peers.TRANSFORMERS:
            peers.hugging_face_check(_images(setting.batch, setting.side), TOLERANCE)(name, found)
        elif name != "timm without prompts":  # another function: it is there as the speed without prompts
            error = (found[:2].double() - expected).abs().max() / expected.abs().max().clamp(min=1)
            assert error <= TOLERANCE, f"{name} differs from the fp64 reference by {error:.1e}"

    return check


def _peers(setting: Setting) -> dict[str, Callable[[], Tensor]]:
    """vptm and everything that is here, was asked for and belongs to this setting."""
    eager = _runs(setting)
    found = {name: run for name, run in eager.items() if name == "vptm" or name in timing.present(PEERS)}
    if setting in COMPILED and CUDA:
        slow = "torch.compile max-autotune"
        compiled = peers.compiled(eager["concatenation"])
        found |= {name: run for name, run in compiled.items() if name != slow or slow in timing.selection.peers}
    asked = CUDA or peers.TRANSFORMERS in timing.selection.peers
    if asked and setting in COMPILED and peers.TRANSFORMERS in timing.present(PEERS):
        found[peers.TRANSFORMERS] = peers.hugging_face(_images(setting.batch, setting.side))
    if setting.batch <= 8 and CUDA:
        # a replay writes its result where the capture put it
        found |= {name: _replayed(eager[of]) for name, of in GRAPHS.items() if name in timing.present(PEERS)}
    return found


def _replayed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    result: list[Tensor] = []

    def kept() -> Tensor:
        result[:] = [run()]
        return result[0]

    replay = timing.captured(kept)

    def replayed() -> Tensor:
        replay()
        return result[0]

    return replayed


def _concatenate(model: PromptedBEiT, images: Tensor) -> Tensor:
    """What a careful user of timm writes: prompts after the patches, the bias of each block padded with zeros, SDPA."""
    backbone, prompts = model.backbone, model.prompts
    x = backbone.patch_embed(images)
    x = torch.cat([backbone.cls_token.expand(len(x), -1, -1), x], dim=1)
    tokens, length = x.shape[1], prompts.length
    for layer, block in enumerate(backbone.blocks):
        if length and (layer == 0 or prompts.mode == "deep"):
            x = torch.cat([x[:, :tokens], prompts.weight[layer].expand(len(x), -1, -1)], dim=1)
        bias = F.pad(block.attn._get_rel_pos_bias(), (0, length, 0, length))
        x = block_forward(block, x, bias, sdpa)
    return backbone.norm(x)[:, 0]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("implementation", ["vptm", *EAGER])
@torch.inference_mode()
def bench_inference(benchmark: BenchmarkFixture, implementation: str, setting: Setting) -> None:
    mode, length, batch, size, side = setting
    name = f"BEiT-{size}/16 at {side}"
    benchmark.group = f"inference, {name}, {mode} prompts, P={length}, batch {batch}, {DTYPE}, {DEVICE}"
    run, check = _runs(setting)[implementation], _check(setting)
    if implementation == "vptm":
        found = timing.compare(_peers(setting), check=check, device=DEVICE)
        held = {name: timing.peak_extra_bytes(run, DEVICE) for name, run in _runs(setting).items()}
        benchmark.extra_info |= found.info() | {"peak extra bytes": held}
        benchmark.extra_info["microseconds per image"] = round(1e6 * found.median("vptm") / batch, 2)
    elif why := timing.refusal(implementation, run, check):
        pytest.skip(f"not timed: {why}")
    benchmark.extra_info |= {
        "model": name,
        "implementation": implementation,
        "mode": mode,
        "prompt_length": length,
        "batch": batch,
        "dtype": str(DTYPE),
        "device": DEVICE,
        "threads": torch.get_num_threads(),
    }
    benchmark.pedantic(timing.finished(run, DEVICE), rounds=5, warmup_rounds=1)
