"""Every kernel variant, and whole models on them, on the GPU and in the types it computes in: `pytest -m gpu`.

The ops' own tests run these grids in float64, which kernels multiply in the interpreter alone. Here they run in
float32, bfloat16 and float16 in turn, each within the error budget of its type against the definition in float64;
twice, with the same bits; and with NaN in all memory that is asked for, so that an element that no program wrote is
seen. Where there is no GPU a few of them run in the interpreter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import prototype_case
import pytest
import test_prompted_attention
import test_readout_attention
import test_residual_norm
import torch
from beit_factory import tiny_beit
from conftest import COMPILING
from test_prototype_cosine import ACTIVATIONS, TRAINED, force_plan  # noqa: F401  (a fixture)
from tiny_models import BACKBONES, build, images

import vptm
from vptm.inspection.check import _outputs
from vptm_kernels._runtime.triton_support import has_triton
from vptm_kernels.testing import AttentionCase, assert_close_to_exact, largest_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_triton(), reason="the triton package is not installed")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# all of them also where the kernels are only compiled, for a GPU elsewhere
FULL = DEVICE == "cuda" or COMPILING
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_turn(cases: Sequence[Any], few: int) -> list[Any]:
    """Every case in one dtype after the other; without a GPU so many of them, spread over all."""
    rotating = [replace(case, dtype=DTYPES[i % len(DTYPES)]) for i, case in enumerate(cases)]
    return rotating if FULL else rotating[:: -(-len(rotating) // few)]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is asked for holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def twice(monkeypatch):
    """Runs a check, whose comparisons are those of `module`, two times and compares the bits of all it looked at."""

    def run(module: ModuleType, check: Callable[[], None], *, cancels: bool = False) -> None:
        """cancels: gradients that are zero, as of a softmax over one key, are sums of terms that cancel, and may carry
        four roundings of the largest result before them, or in float32 the errors of approximate functions in a
        difference of two such."""
        seen: list[list[tuple[str, torch.Tensor]]] = []
        largest = 1.0

        def recorded(name: str, actual: torch.Tensor, exact: torch.Tensor, *rest: Any, **options: Any) -> None:
            nonlocal largest
            seen[-1].append((name, actual.detach().clone(memory_format=torch.contiguous_format)))
            if COMPILING:
                return
            largest = max([largest, *exact.detach().abs().flatten().tolist()]) if cancels else 0.0
            if largest_error(actual, exact) > 4 * torch.finfo(actual.dtype).eps * largest:
                options["terms"] = max(options.get("terms", 0.0), 2 * largest)
                assert_close_to_exact(name, actual, exact, *rest, **options)

        monkeypatch.setattr(module, "assert_close_to_exact", recorded)
        for _ in range(1 if COMPILING else 2):
            seen.append([])
            check()
        assert seen[0], "a check that compares nothing"
        for (name, first), (_, second) in zip(seen[0], seen[-1], strict=True):
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), f"{name}: other bits in a second run"

    return run


def test_an_element_that_no_program_writes_is_seen(twice, monkeypatch):
    """What makes the other tests mean something: a result that is left as it was allocated fails."""
    if COMPILING:
        pytest.skip("nothing is compared")
    from vptm_kernels.residual_norm import triton_impl

    assert torch.empty(3, device=DEVICE).isnan().all()
    launched = triton_impl.forward

    def partly(*arguments: Any) -> Any:
        *outputs, mean, rstd = launched(*arguments)
        hidden = outputs[0].new_empty(())
        outputs[0].view(-1)[-1] = hidden
        return (*outputs, mean, rstd)

    monkeypatch.setattr(triton_impl, "forward", partly)
    case = test_residual_norm.Case(shape=(2, 19, 20), dtype=torch.float32)
    with pytest.raises(AssertionError, match="x_new: error inf"):
        twice(test_residual_norm, lambda: test_residual_norm.check(case, "triton"))


KINDS = [case for case in test_prompted_attention.KINDS if case.valid]
# 2 x 3 patches and a class token, a mask row and rows without a position for the table
KINDS = [replace(case, window=(2, 3) if case.bias == "table" else None) for case in KINDS]
LARGE = 197


def _grid(row: dict[str, Any]) -> AttentionCase:
    # the interpreter's cost is the number of programs
    few = row["tokens"] >= LARGE and not FULL
    return AttentionCase(batch=1 if few else 2, heads=1 if few else 2, bias="table", **row)


@pytest.mark.parametrize("case", in_turn(KINDS, 4), ids=str)
def test_attention_of_every_kind_of_prompt_and_bias(case, twice):
    twice(test_prompted_attention, lambda: test_prompted_attention.check(case, "triton"))


@pytest.mark.parametrize("case", in_turn([_grid(row) for row in test_prompted_attention.ROWS], 3), ids=str)
def test_attention_in_the_pairwise_grid(case, twice):
    twice(test_prompted_attention, lambda: test_prompted_attention.check(case, "triton"))


Readout = test_readout_attention.Case
_IMAGE = {"tokens": 50, "width": 96, "heads": 3, "head_dim": 32, "prompt_length": 10}
READOUTS = [
    *(Readout(prompts=p, bias=b, norm=a, v_bias=a, **_IMAGE) for p, b, a in test_readout_attention.KINDS),
    *(Readout(layout=layout, **_IMAGE) for layout in ("sliced", "expanded")),
    # a real model's image: ragged splits, channels in even blocks
    *(Readout(2, 197, 768, 12, 64, length) for length in ((10, 50, 0) if FULL else ())),
]
RAGGED = [
    Readout(tokens=tokens, width=width, heads=heads, head_dim=dim, prompt_length=prompts)
    for tokens, width, heads, dim, prompts in test_readout_attention.SHAPES
]


@pytest.mark.parametrize("case", in_turn(READOUTS, 3), ids=str)
def test_readout_of_every_kind(case, twice):
    twice(test_readout_attention, lambda: test_readout_attention.check(case, "triton"))


@pytest.mark.parametrize("case", in_turn(RAGGED, 2), ids=str)
def test_readout_of_every_shape(case, twice):
    twice(test_readout_attention, lambda: test_readout_attention.check(case, "triton"), cancels=True)


Norm = test_residual_norm.Case
NORMS = [
    *(Norm(gamma=g, row_scale=r, affine=a) for g, r, a in itertools.product([True, False], [0, 1, 2], [True, False])),
    *(Norm(shape=shape) for shape in [(15, 1), (16, 16), (17, 33), (1, 1), (2, 3, 5, 7), (0, 4, 8), (1, 1, 130)]),
    *(Norm(shape=shape, sliced=True) for shape in [(2, 19, 20), (5, 20), (2, 2, 5, 20)]),
    *(Norm(shape=(2, 197, 768)) for _ in DTYPES if FULL),
]


@pytest.mark.parametrize("case", in_turn(NORMS, 4), ids=str)
def test_residual_norm_of_every_kind_and_shape(case, twice):
    twice(test_residual_norm, lambda: test_residual_norm.check(case, "triton"))


# 20 rows and 70 tokens are two blocks of each in the interpreter, the last ones ragged
Prototypes = prototype_case.Case
_SHAPE = {"batch": 20, "width": 21, "tokens": 70, "dim": 18, "classes": 17}
PROTOTYPES = [
    *(
        Prototypes(head=head, activation=activation, biases=biases, **_SHAPE)
        for head, activation, biases in itertools.product(["projection", "tokens"], ACTIVATIONS, [True, False])
    ),
    *(
        Prototypes(head=head, tasks=tasks, batch=7, width=21, dim=18)
        for head, tasks in [("folded", ()), ("folded", (2, 5, 1)), ("tasks", (3, 3)), ("tasks", (1, 18, 2))]
    ),
    *(
        Prototypes(head=head, tasks=(2, 5, 1), batch=7, activation=activation)
        for head, activation in itertools.product(["projection", "tokens"], ACTIVATIONS)
    ),
    *(
        Prototypes(batch=batch, width=width, tokens=tokens, dim=dim, classes=classes, activation=activation)
        for (batch, width, tokens, dim, classes), activation in itertools.product(
            [(15, 16, 31, 16, 1), (16, 17, 32, 15, 16), (17, 15, 33, 17, 15), (1, 33, 200, 4, 3)],
            ["softmax", "log_softmax"],
        )
    ),
    # the token head of BEiT
    *(Prototypes(64, 768, 8192, 128, 100, activation=activation) for activation in ACTIVATIONS if FULL),
]
PROTOTYPES = [case.but(grads=TRAINED["triton"]) for case in PROTOTYPES]


@pytest.mark.parametrize("case", in_turn(PROTOTYPES, 4), ids=str)
def test_prototypes_of_every_head_and_activation(case, twice, force_plan):  # noqa: F811
    force_plan("stream")
    twice(prototype_case, lambda: prototype_case.check(case, "triton"))


MODELS = [
    (mode, readout, name, dtype)
    for i, (mode, readout) in enumerate(itertools.product(["shallow", "deep", "progressive"], ["mask", "cls", "mean"]))
    for name, dtype in ((list(BACKBONES)[i % len(BACKBONES)], DTYPES[i % 3]), ("shared bias", DTYPES[(i + 1) % 3]))
]


@pytest.mark.parametrize(("mode", "readout", "backbone", "dtype"), MODELS if FULL else MODELS[::5], ids=str)
def test_whole_models(mode, readout, backbone, dtype):
    """Features, read-out rows, logits and the gradients of all that is learned: as near to float64 as the reference
    path is in the same dtype on the same device."""
    window, width, heads, length = ((14, 14), 128, 2, 10) if FULL else ((2, 3), 32, 2, 3)
    model = build(
        tiny_beit(window, dim=width, heads=heads, **BACKBONES[backbone]),
        prompt_mode=mode,
        readout=readout,
        prompt_length=length,
        progressive_alpha=0.3,
        train_mask_token=readout == "mask",
        impl="triton",
    )
    inputs = images(model).to(DEVICE, dtype)
    model = model.to(DEVICE, dtype)
    found = _outputs(model, inputs, "triton", True)
    if COMPILING:
        return
    again = _outputs(model, inputs, "triton", True)
    eager = _outputs(model, inputs, "reference", True)
    exact = _outputs(model.double(), inputs.double(), "reference", True)
    for name, value in found.items():
        assert torch.equal(value, again[name]), f"{name}: other bits in a second run"
        factor = 3 if name.startswith("grad") else 2
        # the gradient of the temperature is one sum over all logits, which cancel in it
        terms = exact["logits"].abs().max().item() if value.numel() == 1 else 0.0
        assert_close_to_exact(name, value, exact[name], eager[name], factor=factor, terms=terms, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES[1 if FULL else 2 :])
@pytest.mark.parametrize("mode", ["shallow", "deep"] if FULL else ["deep"])
def test_training_steps_under_autocast(mode, dtype):
    """As models train: a float32 stream beside 16-bit products."""
    torch.manual_seed(0)
    if FULL:
        model = vptm.PromptedBEiT("builtin", num_classes=7, prompt_length=5, prompt_mode=mode).to(DEVICE)
        inputs = torch.randn(3, 1, 28, 28, device=DEVICE)
    else:
        model = build(tiny_beit(dim=32), prompt_mode=mode).float()
        inputs = images(model, 3).float()
    labels = torch.arange(3, device=DEVICE)
    learned = list(model.trainable_parameters())
    losses, steps = {}, {}
    for impl in ("triton",) if COMPILING else ("triton", "reference"):
        model.impl = impl
        with torch.autocast(DEVICE, dtype):
            losses[impl] = torch.nn.functional.cross_entropy(model(inputs).float(), labels)
        steps[impl] = torch.autograd.grad(losses[impl], learned)
    if COMPILING:
        return
    torch.testing.assert_close(losses["triton"], losses["reference"], rtol=2e-2, atol=2e-2)
    for found, expected in zip(steps["triton"], steps["reference"]):
        assert (found - expected).norm() <= 0.1 * expected.norm()
