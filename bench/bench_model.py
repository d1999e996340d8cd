"""A whole prompted BEiT, inference: images in, read-out rows or class scores out.

    pytest bench/bench_model.py --benchmark-only
    pytest bench/bench_model.py --benchmark-only --grid full
    pytest bench/bench_model.py --benchmark-only --peers "torch.compile max-autotune" -k "deep-100-64"

Settings with the class row are VPT's and end there; those with the mask row are VPTM's own, through the token head and
the prototypes to class scores, among them what `PromptedBEiT` does by default. Implementations of one setting share a
group: timm's own forward without any prompt, the same blocks with the prompts concatenated
(scaled_dot_product_attention, position bias built per block, as eager code does it), and vptm. vptm is compared in
turns with those and with deep prompts as cached keys and values that every block concatenates, which is what PEFT's
prefix tuning does and needs the same linears as vptm. In the settings that come first each of them is compared compiled
as well, vptm too, on a CPU run by OpenVINO and ONNX Runtime, and with transformers' BEiT without prompts. On a GPU a
CUDA graph of each is compared in the first settings and for few images, of vptm frozen too. Whoever is compared is
first checked against its own function in float64, with as much error as the definition makes in its dtype.

On AMD processors vptm sends its frozen linears to oneDNN, where PyTorch would take MKL: "vptm with MKL" does not, and
what it reaches over every peer stands in `extra_info["forms"]`, as for every other form of vptm. "vptm frozen" is vptm
after `freeze_for_inference`: prompts are projected once, as those of the prefix are here, and weights packed where that
is faster. On a CPU that multiplies bfloat16 a few settings are timed in it as well, beside vptm's own float32.

BEiT-B/16 at 224 and batch 4 on a CPU: the smallest batch at which linear layers, not overhead, take the time. Its full
grid has more numbers of prompts, other batches, and what is compiled or exported. On a GPU every size, resolution,
number of prompts and batch, most important first, so that a run cut short has those.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache, lru_cache, partial
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
from vptm.frozen.parts import block_forward, sdpa
from vptm.models.verbalizers import LinearVerbalizer

DEVICE = timing.selection.device
CUDA, TINY = DEVICE == "cuda", timing.selection.tiny
# channels, blocks, heads
SIZES = dict.fromkeys("BL", (48, 2, 3)) if TINY else {"B": (768, 12, 12), "L": (1024, 24, 16)}
# of the package's defaults
CLASSES, DIM, VOCABULARY = 100, 128, 8192
PREFIX, TIMM = peers.PREFIX, peers.TIMM
EAGER = (TIMM, peers.CONCATENATION)
PEERS = {
    **{name: peers.PEERS[name] for name in (*EAGER, PREFIX)},
    **peers.with_mkl(),
    **{name: peers.PEERS[name] for name in (peers.FROZEN, peers.FLOAT32)},
    **peers.compiled_peers(peers.CONCATENATION, PREFIX, TIMM, peers.OURS),
    **peers.graphed_peers(peers.OURS, peers.FROZEN, peers.CONCATENATION, PREFIX, TIMM),
    **peers.RUNTIMES,
    **peers.HUGGING_FACE,
}


class Setting(NamedTuple):
    """readout: "cls" for VPT's row without a head, or "mask" for VPTM's own, from the mask row to class scores."""

    mode: str
    length: int
    batch: int
    size: str = "B"
    side: int = 224
    readout: str = "cls"

    def __str__(self) -> str:
        larger = "" if (self.size, self.side) == ("B", 224) else f"-{self.size}{self.side}"
        return f"{self.mode}-{self.length}-{self.batch}{larger}" + ("" if self.readout == "cls" else "-mask")

    @property
    def model(self) -> str:
        return ("" if self.readout == "cls" else "VPTM on ") + f"BEiT-{self.size}/16 at {self.side}"

    @property
    def info(self) -> dict[str, object]:
        """For `extra_info`."""
        default = self.readout == "mask" and (self.mode, self.length) == ("shallow", 10)
        named = {"model": self.model, "mode": self.mode, "prompt_length": self.length, "batch": self.batch}
        return named | ({"note": "the defaults"} if default else {})


def _settings() -> list[tuple[Setting, torch.dtype]]:
    """With every dtype, most important first."""
    prompts = [("deep", 100), ("deep", 50), ("deep", 10), ("shallow", 100), ("shallow", 10), ("no", 0)]
    own = [("shallow", 10), ("deep", 100)]
    dtypes, full = timing.selection.of_models(), timing.selection.full
    if not CUDA and not TINY:
        found = [Setting("deep", 100, 4), Setting("shallow", 10, 4), Setting("no", 0, 4)]
        found += [Setting(*each, 4, readout="mask") for each in own[: None if full else 1]]
        if full:
            found += [setting for each in prompts if (setting := Setting(*each, 4)) not in found]
            found += [Setting("deep", 100, batch) for batch in (1, 16)] + [Setting("shallow", 10, 1, readout="mask")]
        if full or timing.selection.dtypes == dtypes:
            return list(product(found, dtypes))
        beside = [found[0], found[0]._replace(batch=1), found[-1]]
        return [*product(found, dtypes[:-1]), *product(beside, dtypes[-1:])]
    first = [Setting(*each, 64) for each in (("deep", 100), ("shallow", 10), ("deep", 50), ("no", 0))]
    first += [Setting(*each, 64, readout="mask") for each in own]
    first += [Setting("deep", 100, batch) for batch in (1, 8)]
    every = [*prompts, ("deep", 200), ("shallow", 50), ("shallow", 200)]
    rest = [
        Setting(*each, batch, size, side)
        for (size, side), batch, each in product(product("BL", (224, 384)), (64, 1, 8, 256), every)
    ]
    rest = [setting for setting in rest if setting not in first and not TINY]
    return [(setting, dtype) for part in (first, rest) for dtype in dtypes for setting in part]


SETTINGS = _settings()


def pixels(side: int) -> int:
    """Of an image's side: a rehearsal keeps the name of a setting and takes small images."""
    return 32 if TINY else side


# of a GPU: what `bench.gpu_check` asks for
HEADLINES = [Setting("deep", 100, 64), Setting("deep", 100, 1), Setting("shallow", 10, 64)]
HEADLINES.append(HEADLINES[-1]._replace(readout="mask"))
# compiling and exporting takes half a minute each, and transformers' BEiT as long as the others on a CPU
FIRST = HEADLINES if CUDA else [setting for setting, _ in SETTINGS[:1]]
FIRST_BATCH = FIRST[0].batch


def _in_every_form(setting: Setting) -> bool:
    """Whether all peers are compiled, graphed and exported in this setting. On a CPU that has the time it is what the
    package does by default as well."""
    defaults = setting.readout == "mask" and (setting.mode, setting.length, setting.batch) == (
        "shallow",
        10,
        FIRST_BATCH,
    )
    return setting in FIRST or (timing.selection.full and not CUDA and defaults)


def _prefix_in_every_form(setting: Setting) -> bool:
    """The same for the PEFT-style prefix: every number of prompts."""
    usual = setting.mode == "deep" and setting.batch == FIRST_BATCH and (setting.size, setting.side) == FIRST[0][3:5]
    return _in_every_form(setting) or usual


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


@lru_cache(maxsize=1)
def _images(batch: int, side: int, dtype: torch.dtype) -> Tensor:
    side = pixels(side)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


# one at a time: the settings of a full grid together fill a GPU
@lru_cache(maxsize=1)
def prompted(setting: Setting, dtype: torch.dtype) -> PromptedBEiT:
    """VPT's model with its linear classifier, or with the mask read-out the package's defaults."""
    vpt = {"readout": "cls", "verbalizer": "linear", "token_activation": "hidden"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(
            copy.deepcopy(_backbone(setting.size, pixels(setting.side))),
            CLASSES,
            prompt_mode="deep" if setting.mode == "no" else setting.mode,
            prompt_length=setting.length,
            **(vpt if setting.readout == "cls" else {}),  # type: ignore[arg-type]
        )
    return model.to(DEVICE, dtype).eval()


@lru_cache(maxsize=1)
def _plain(size: str, side: int, dtype: torch.dtype) -> Beit:
    return copy.deepcopy(_backbone(size, pixels(side))).to(DEVICE, dtype)


@lru_cache(maxsize=4)
@torch.inference_mode()
def _exact(setting: Setting, dtype: torch.dtype, function: str) -> tuple[Tensor, Tensor]:
    """What the definition gives for the first two images, in float64 and in the dtype that is timed."""
    images = _images(setting.batch, setting.side, dtype)[:2]
    own: PromptedBEiT | Beit
    if function == TIMM:
        own = copy.deepcopy(_plain(setting.size, setting.side, dtype))
        for block in own.blocks:
            block.attn.fused_attn = False
    else:
        own = copy.deepcopy(prompted(setting, dtype))
        own.impl = "reference"
    found = tuple(
        _read(setting, model, rows) for model, rows in ((copy.deepcopy(own).double(), images.double()), (own, images))
    )
    return found[0], found[1]


def _read(setting: Setting, model: PromptedBEiT | Beit, images: Tensor) -> Tensor:
    """What is timed: class scores at the mask row, and without a head the class row."""
    return (
        model.forward_hidden(images) if setting.readout == "cls" and isinstance(model, PromptedBEiT) else model(images)
    )


def _check(setting: Setting, dtype: torch.dtype) -> timing.Check:
    """Of the first two images, against float64; the others are finite."""

    def check(name: str, found: Tensor) -> None:
        function = peers.declared(name).function
        if function == peers.TRANSFORMERS:
            images = _images(setting.batch, setting.side, dtype)
            peers.hugging_face_check(images, "tiny" if TINY else setting.size)(name, found)
            return
        timing.finite(name, found)
        # timm's forward is the same whatever the prompts
        own = setting._replace(mode="no", length=0, readout="cls") if function == TIMM else setting
        exact, eager = _exact(own, dtype, function)
        timing.within_budget([exact], [eager], [timing.FACTOR])(name, found[:2])

    return check


def _runs(setting: Setting, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """vptm and what every setting is compared with."""
    model, images = prompted(setting, dtype), _images(setting.batch, setting.side, dtype)
    plain = _plain(setting.size, setting.side, dtype)
    found = {
        "vptm": lambda: _read(setting, model, images),
        TIMM: lambda: plain(images),
        "concatenation": lambda: _scores(model, _concatenate(model, images)),
    }
    if setting.mode == "deep":
        prefixes = _prefixes(model)
        found[PREFIX] = lambda: _scores(model, _with_prefixes(model, prefixes, images))
    return found


def _peers(setting: Setting, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """vptm and everything that is here, was asked for and belongs to this setting."""
    found, present = _runs(setting, dtype), timing.present(PEERS)
    model, images = prompted(setting, dtype), _images(setting.batch, setting.side, dtype)
    eager = dict(found)
    every, prefix = _in_every_form(setting), _prefix_in_every_form(setting)
    if present.keys() & {peers.FROZEN, peers.graphed_name(peers.FROZEN)}:
        sealed = cache(lambda: peers.frozen(model))
        found[peers.FROZEN] = eager[peers.FROZEN] = lambda: _read(setting, sealed(), images)
    if peers.FLOAT32 in present and dtype == torch.bfloat16:
        wide = cache(lambda: copy.deepcopy(model).float())
        wider = images.float()
        found[peers.FLOAT32] = lambda: _read(setting, wide(), wider).to(dtype)
    compilable = {name: run for name, run in eager.items() if name != peers.FROZEN}
    in_forms = {name: run for name, run in compilable.items() if every or (prefix and name == PREFIX)}
    # MKL and the other runtimes are for float32
    if peers.WITH_MKL in present and dtype == torch.float32 and (every or timing.selection.full):
        found[peers.WITH_MKL] = timing.without_onednn(eager["vptm"])
    found |= peers.compiled(in_forms)
    if every or setting.batch <= 8:  # launches of few images take longer than their work
        found |= peers.graphed(eager)
    if prefix and PREFIX in eager and dtype == torch.float32:
        prefixes = _prefixes(model)
        functions = {"prefix": lambda model, images: _scores(model, _with_prefixes(model, prefixes, images))}
        if every:
            functions["concatenation"] = lambda model, images: _scores(model, _concatenate(model, images))
        found |= peers.by_runtimes(functions, model, images)
    if every and peers.TRANSFORMERS in present:
        found[peers.TRANSFORMERS] = peers.made_when_called(
            lambda: peers.hugging_face(images, "tiny" if TINY else setting.size)
        )
    return {name: run for name, run in found.items() if name == "vptm" or name in present}


def _scores(model: PromptedBEiT, hidden: Tensor) -> Tensor:
    """From the read-out row what is timed, as the definition has it: the mask row goes through the token head and the
    projection, and is compared to the prototypes."""
    verbalizer = model.verbalizer
    if isinstance(verbalizer, LinearVerbalizer):
        return hidden
    return verbalizer.compare(verbalizer.embed(hidden, model.lm_head)) / verbalizer.temperature


def _rows(model: PromptedBEiT, images: Tensor) -> Tensor:
    """Class token, patches and, where it is read, the mask token."""
    backbone = model.backbone
    patches = backbone.patch_embed(images)
    batch = len(patches)
    rows = [backbone.cls_token.expand(batch, -1, -1), patches]
    if model.mask_token is not None:
        rows.append(model.mask_token.expand(batch, -1, -1))
    return torch.cat(rows, dim=1)


def _read_row(model: PromptedBEiT) -> int:
    return 0 if model.mask_token is None else 1 + model.num_patches


def _concatenate(model: PromptedBEiT, images: Tensor) -> Tensor:
    """What a careful user of timm writes: prompts after the patches, the bias of each block padded with zeros, SDPA."""
    backbone, prompts = model.backbone, model.prompts
    x = _rows(model, images)
    tokens, length = x.shape[1], prompts.length
    for layer, block in enumerate(backbone.blocks):
        if length and (layer == 0 or prompts.mode == "deep"):
            x = torch.cat([x[:, :tokens], prompts.weight[layer].expand(len(x), -1, -1)], dim=1)
        bias = block.attn._get_rel_pos_bias()
        more = x.shape[1] - bias.shape[-1]
        x = block_forward(block, x, F.pad(bias, (0, more, 0, more)), sdpa)
    return backbone.norm(x)[:, _read_row(model)]


def _prefixes(model: PromptedBEiT) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (H, P, D) of the deep prompts of every block."""
    found = []
    for block, prompts in zip(model.backbone.blocks, model.prompts.weight):
        attn = block.attn
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        rows = F.linear(block.norm1(prompts), attn.qkv.weight, bias).unflatten(1, (3, attn.num_heads, -1))
        _, key, value = rows.permute(1, 2, 0, 3).contiguous()
        found.append((key, value))
    return found


def _with_prefixes(model: PromptedBEiT, prefixes: list[tuple[Tensor, Tensor]], images: Tensor) -> Tensor:
    """What PEFT's prefix tuning does: past keys and values, expanded to the batch and concatenated in every block."""
    backbone = model.backbone
    x = _rows(model, images)
    for block, past in zip(backbone.blocks, prefixes):
        bias = block.attn._get_rel_pos_bias()
        more = x.shape[1] - bias.shape[-1]
        bias = F.pad(bias, (0, more + past[0].shape[1], 0, more))
        x = block_forward(block, x, bias, partial(_attention_to_past, *past))
    return backbone.norm(x)[:, _read_row(model)]


def _attention_to_past(
    past_key: Tensor, past_value: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    batch = len(query)
    key = torch.cat([key, past_key.expand(batch, -1, -1, -1)], dim=2)
    value = torch.cat([value, past_value.expand(batch, -1, -1, -1)], dim=2)
    return sdpa(query, key, value, bias)


def work(setting: Setting, dtype: torch.dtype, step: bool = False) -> timing.Work:
    """Of B images of N tokens through L blocks with P prompts, C channels and H heads, the last block for its read-out
    row alone.

    Operations per image: patch embedding 2 n 768 C of n patches; L-1 blocks of 24 N C² + 4 N (N+P) C; the last one
    24 C² + 4 H N C + 4 P C. Keys and values of deep prompts are projected once for the batch, 4 P C² per block. Shallow
    prompts are rows, T = N+P in place of N, which block 0 projects once for the batch. The head of V tokens takes
    2 V C, the projection to d = 128 2 V d and K prototypes 2 K d. A training step goes back once through every linear
    but the projection of image rows in block 0, and with five products for the two of attention; the head then takes
    4 V C + 6 V d and 6 K d, a linear classifier 6 C K.

    Bytes: weights and images once, and 24 C elements per row and block: input and output of its five steps, with
    residual sums and norms inside of them. A step reads the weights twice and moves 34 C elements more: gradients of
    the same, and 10 C that were kept.
    """
    mode, length, batch, size, side, readout = setting
    width, depth, heads = SIZES[size]
    side = pixels(side)
    square, patches = width**2, (side // 16) ** 2
    tokens = patches + (2 if readout == "mask" else 1)
    carried = length if mode == "shallow" else 0
    rows, keys = tokens + carried, tokens + length
    linear = 24 * (depth - 1) * rows * square - 6 * carried * square
    attention = (depth - 1) * rows * keys * width
    reading = 4 * heads * rows * width + 4 * (length - carried) * width
    once = 6 * carried * square + 4 * depth * (length - carried) * square
    weights, kept = (12 * depth * square + 768 * width), batch * (depth - 1) * rows * width
    moved = weights + 24 * kept + batch * (rows * width + 3 * side**2)
    operations = 2 * patches * 768 * width + linear + 4 * attention + 24 * square + reading
    if readout == "mask" and not step:
        operations += 2 * VOCABULARY * (width + DIM) + 2 * CLASSES * DIM
        moved += VOCABULARY * (width + DIM)
    if step and length:
        operations += linear - 6 * tokens * square + 10 * attention + 24 * square + 2 * reading
        once = 12 * carried * square + 8 * depth * (length - carried) * square
        moved += weights + 34 * kept
    if step and readout == "mask":
        operations += 4 * VOCABULARY * width + 6 * VOCABULARY * DIM + 6 * CLASSES * DIM
        moved += 2 * VOCABULARY * (width + 2 * DIM)
    elif step:
        operations += 6 * CLASSES * width
    return timing.Work(moved * dtype.itemsize, batch * operations + once)


@pytest.mark.parametrize("implementation", ["vptm", *EAGER])
@pytest.mark.parametrize(("setting", "dtype"), SETTINGS, ids=timing.label)
@torch.inference_mode()
def bench_inference(benchmark: BenchmarkFixture, implementation: str, setting: Setting, dtype: torch.dtype) -> None:
    mode, length, batch = setting[:3]
    benchmark.group = f"inference, {setting.model}, {mode} prompts, P={length}, batch {batch}, {dtype}, {DEVICE}"
    benchmark.extra_info |= setting.info
    ours = implementation == "vptm"
    runs = _peers(setting, dtype) if ours else _runs(setting, dtype)
    found = timing.report(
        benchmark,
        implementation,
        runs,
        check=_check(setting, dtype),
        work=work(setting, dtype),
        device=DEVICE,
        dtype=dtype,
        held=("vptm", *EAGER, PREFIX),
        table=(5, 1) if CUDA else (3 if ours else 1, 0),
        rounds=7 if CUDA else 5,
        warmup=2 if CUDA else 0,
    )
    if found:
        benchmark.extra_info["microseconds per image"] = round(1e6 * found.median("vptm") / batch, 2)
