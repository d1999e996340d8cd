"""FLOPs that torch.utils.flop_counter counts are those of the cost model, at the batch and token count that run."""

from __future__ import annotations

import pytest
import torch
from beit_factory import tiny_beit
from tiny_models import build, build_vit, images, pictures, tiny_vit
from torch.utils.flop_counter import FlopCounterMode

from vptm_kernels import prompted_attention, prototype_cosine

B, D, H, L, K, P = 3, 32, 4, 4, 5, 7
N = 1 + 5 * 4
PATCHES = 2 * (N - 1) * 3 * 4 * 4 * D


def flops_of(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def beit_model(mode: str, length: int, **kwargs):
    beit = tiny_beit((5, 4), dim=D, heads=H, depth=L, mlp_ratio=4.0)
    options = {"readout": "cls", "verbalizer": "linear", "token_activation": "hidden"} | kwargs
    return build(beit, prompt_mode=mode, prompt_length=length, num_classes=K, **options)


@pytest.mark.parametrize("length", [0, P])
def test_deep_inference(length: int) -> None:
    """Per image: full blocks 24 N D² + 4 N (N+P) D, the last one 24 D² + 4 H N D + 4 P D; prompts once for the batch,
    and never in a sealed model."""
    model = beit_model("deep", length)
    batch = images(model, B)
    full = 24 * N * D**2 + 4 * N * (N + length) * D
    expected = B * (PATCHES + (L - 1) * full + 24 * D**2 + 4 * H * N * D + 4 * length * D + 2 * D * K)
    with torch.no_grad():
        assert flops_of(lambda: model(batch)) == expected + L * 4 * length * D**2  # the prefix of every block
        model.freeze_for_inference()
        assert flops_of(lambda: model(batch)) == expected


@pytest.mark.parametrize("mode", ["shallow", "progressive"])
def test_prompts_that_are_rows(mode: str) -> None:
    """Shallow and progressive prompts are rows after block 0, where they are projected once for the batch."""
    model = beit_model(mode, P)
    batch = images(model, B)
    rows = N + P
    block = 24 * rows * D**2 + 4 * rows * rows * D
    first = 24 * N * D**2 + 18 * P * D**2 + 4 * rows * rows * D
    expected = B * (PATCHES + first + (L - 2) * block + 24 * D**2 + 4 * H * rows * D + 2 * D * K) + 6 * P * D**2
    with torch.no_grad():
        assert flops_of(lambda: model(batch)) == expected


def test_concatenation() -> None:
    """The reference path costs 24 (N+P) D² + 4 (N+P)² D in every block."""
    # the counter cannot hook modules that return a view of a parameter under no_grad
    model = beit_model("deep", P, impl="reference").requires_grad_(False)
    batch = images(model, B)
    rows = N + P
    expected = B * (PATCHES + L * (24 * rows * D**2 + 4 * rows**2 * D) + 2 * D * K)
    assert flops_of(lambda: model(batch)) == expected


@pytest.mark.parametrize(("pool", "after"), [("avg", True), ("token", False)])
def test_mean_readout(pool: str, after: bool) -> None:
    """The last block's output projection and MLP run for patch rows alone, and fc2 once where the norm comes after the
    mean (identity A12)."""
    vit = tiny_vit((5, 4), embed_dim=D, num_heads=H, depth=L, mlp_ratio=4.0, global_pool=pool)
    model = build_vit(vit, readout="mean", prompt_length=P, num_classes=K)
    batch = pictures(model, B)
    attention, patches = 4 * N * (N + P) * D, N - 1
    last = 6 * N * D**2 + attention + 10 * patches * D**2 + 8 * (1 if after else patches) * D**2
    prefixes = L * 4 * P * D**2
    expected = B * (PATCHES + (L - 1) * (24 * N * D**2 + attention) + last + 2 * D * K) + prefixes
    with torch.no_grad():
        assert flops_of(lambda: model(batch)) == expected


def test_training_step() -> None:
    """Frozen linears cost one product backward, attention five, prompts' keys and values one; block 0 sends nothing
    into image rows, so its query-key-value projection costs nothing backward (identity A10)."""
    model = beit_model("deep", P).train()
    batch = images(model, B)
    attention = N * (N + P) * D
    forward = B * (PATCHES + L * (24 * N * D**2 + 4 * attention)) + L * 4 * P * D**2
    backward = B * L * (24 * N * D**2 + 10 * attention) + L * 4 * P * D**2 - B * 6 * N * D**2
    assert flops_of(lambda: model.forward_features(batch).square().sum().backward()) == forward + backward


def test_prompt_dropout_costs_keys_and_values_of_every_sample_and_no_rows() -> None:
    """Masks of their own end the sharing of a prefix over the batch (A2), but prompts stay keys and values (A1): as
    rows they would also cost queries, attention, projection and MLP in every block."""
    costs = []
    for dropout in (0.0, 0.5):
        model = beit_model("deep", P, prompt_dropout=dropout).train()
        batch = images(model, B)
        costs.append(flops_of(lambda model=model, batch=batch: model.forward_features(batch)))
    assert costs[1] - costs[0] == (B - 1) * L * 4 * P * D**2


def test_ops_count_what_was_asked_for() -> None:
    """A pool counts its longest range; prompts that attend are query rows; kernels skip what nobody asked for."""
    qkv, pool = torch.randn(2, 9, 3 * 32), torch.randn(6, 2 * 32)
    ranges = torch.tensor([[0, 2], [1, 4]], dtype=torch.int32)
    pooled = flops_of(
        lambda: prompted_attention(qkv, pool, num_heads=2, prompt_ranges=ranges, max_prompt_length=4, impl="torch")
    )
    assert pooled == 2 * 4 * 9 * 13 * 32
    attending = flops_of(lambda: prompted_attention(qkv, prompt_qkv=torch.randn(3, 96), num_heads=2, impl="torch"))
    assert attending == 2 * 4 * 12 * 12 * 32


def test_kernels_leave_out_image_rows_nobody_asked_for() -> None:
    """With a constant qkv the Triton backward does four products of N x P; PyTorch's does five of N x (N+P)."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    qkv = torch.randn(2, 9, 3 * 32)
    found = {}
    for impl in ("torch", "triton"):
        prompts = torch.randn(4, 2 * 32, requires_grad=True)
        out = prompted_attention(qkv, prompts, num_heads=2, impl=impl)
        found[impl] = flops_of(lambda out=out: out.sum().backward())
    assert found == {"torch": 2 * 10 * 9 * 13 * 32, "triton": 2 * 8 * 9 * 4 * 32}


def test_prototype_cosine() -> None:
    """Training on few images: logits and projection forward; backward what the projection and hidden need;
    per-task prototypes count the classes of one task."""
    hidden, weight = torch.randn(2, D, requires_grad=True), torch.randn(50, D)
    projection, prototypes = torch.randn(6, 50, requires_grad=True), torch.randn(K, 6, requires_grad=True)
    out = []
    forward = flops_of(lambda: out.append(prototype_cosine(hidden, weight, None, prototypes, projection=projection)))
    assert forward == 2 * 2 * (50 * D + 50 * 6) + 2 * 2 * K * 6
    backward = flops_of(lambda: out[0].sum().backward())
    assert backward == 2 * 2 * (50 * 6 + 50 * D + 50 * 6) + 2 * (2 * 2 * K * 6)
    tasks = {"class_offsets": [0, 2, K], "task_ids": torch.tensor([0, 1], dtype=torch.int32)}
    with torch.no_grad():
        per_task = flops_of(lambda: prototype_cosine(hidden, weight, None, prototypes, projection=projection, **tasks))
    assert per_task == 2 * 2 * (50 * D + 50 * 6) + 2 * 2 * 3 * 6
