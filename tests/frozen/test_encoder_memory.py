"""What the encoder keeps: for backward, after `freeze_for_inference`, and how often it casts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from beit_factory import tiny_beit
from tiny_models import build, build_vit, images, pictures, relative_error, tiny_vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vptm

WIDTH, HEADS, PROMPTS, BATCH = 32, 2, 13, 8  # 26 tokens to 13 prompts: BEiT-B/16 with 100 has the same ratio
TOKENS = 26


def small(**kwargs: Any) -> vptm.PromptedBEiT:
    beit = tiny_beit((5, 5), dim=WIDTH, heads=HEADS, depth=4, mlp_ratio=4.0)
    model = build(beit, **({"prompt_mode": "deep", "prompt_length": PROMPTS, "readout": "cls"} | kwargs))
    return model.float().train()


@contextmanager
def saved_tensors() -> Iterator[list[torch.Tensor]]:
    """Collects what autograd keeps."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def bytes_of(tensors: list[torch.Tensor], without: list[torch.Tensor] = ()) -> int:  # type: ignore[assignment]
    """Bytes of the distinct storages."""
    outside = {tensor.untyped_storage().data_ptr() for tensor in without}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for pointer, size in sizes.items() if pointer not in outside)


def constants(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model._encoder.constants()]


def test_a_block_keeps_what_backward_reads_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved input of a frozen linear (the normalised rows, the MLP's activations) or concatenated keys and values
    would be one more tensor here (identities A1, A2, A11)."""
    model = small()
    batch = images(model, BATCH).float()
    kept: list[list[torch.Tensor]] = []

    def run_block(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        with saved_tensors() as tensors:
            out = function(*args)
        kept.append(tensors)
        return out

    monkeypatch.setattr(model, "run_block", run_block)
    model(batch)
    frozen = {tensor.untyped_storage().data_ptr() for tensor in constants(model)}
    found = []
    for tensors in kept[:-1]:
        distinct = {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}
        shapes = [
            tuple(t.shape) for t in distinct.values() if t.untyped_storage().data_ptr() not in frozen and t.ndim == 3
        ]
        found.append(Counter(shape for shape in shapes if shape[-1] > 1))
    rows = (BATCH, TOKENS)
    expected = Counter(
        {
            (*rows, WIDTH): 3,  # both norms' inputs, and what attention gave
            (*rows, 3 * WIDTH): 1,  # queries, keys, values
            (*rows, 4 * WIDTH): 1,  # the MLP before its activation
            (BATCH, HEADS, TOKENS): 1,  # log-sum-exp of the scores
        }
    )
    first = expected - Counter({(*rows, WIDTH): 1})  # nothing before block 0 learns, so its first norm keeps nothing
    assert found == [first, expected, expected]


def test_no_gradient_flows_into_the_image_rows_of_block_0() -> None:
    """Deep prompts: the backward of block 0's attention is asked for prompts alone (identity A10)."""
    model = small()
    loss = model(images(model, 2).float()).square().sum()
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == "vptm::prompted_attention_backward":
                asked.append(list(args[[one.name for one in func._schema.arguments].index("needs")]))
            return func(*args, **(kwargs or {}))

    with Watch():
        loss.backward()
    assert asked == [[True, True, False, False]] * 2 + [[False, True, False, False]]  # qkv, prompts, bias, columns


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_bytes_saved_for_backward(prompt_mode: str) -> None:
    """Deep prompts keep at most 0.62 of what concatenation keeps, at the shape ratios of BEiT-B/16 with 100 prompts."""
    model = small(prompt_mode=prompt_mode)
    batch = images(model, BATCH).float()
    sizes = {}
    for impl in ("torch", "reference"):
        model.impl = impl
        model(batch)
        with saved_tensors() as kept:
            model(batch)
        sizes[impl] = bytes_of(kept, constants(model))
    limit = 0.62 if prompt_mode == "deep" else 0.85
    assert sizes["torch"] <= limit * sizes["reference"], sizes


@torch.no_grad()
def test_inference_holds_the_projected_prompts_of_one_block_at_a_time() -> None:
    """With many prompts those of all blocks are more than everything else that a forward holds."""
    model = small(prompt_length=400).eval()
    batch = images(model, 1).float()
    sealed = model.sealed_twin()

    def peak(run: Any) -> int:
        run(batch)
        with torch.profiler.profile(profile_memory=True) as recorded:
            run(batch)
        held = most = 0
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    one = 400 * 2 * WIDTH * 4
    assert 0 < peak(model) - peak(sealed) <= 2 * one


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
@pytest.mark.parametrize("readout", ["cls", "mean"])
def test_checkpointed_blocks_give_bitwise_the_same_gradients(prompt_mode: str, readout: str) -> None:
    """Outputs and gradients do not change by a bit, with dropout drawn again alike, and far fewer bytes are kept."""
    model = small(prompt_mode=prompt_mode, readout=readout, prompt_dropout=0.3, progressive_alpha=0.3)
    batch = images(model, BATCH).float()
    results = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        torch.manual_seed(4)
        with saved_tensors() as kept:
            out = model(batch)
        model.zero_grad()
        out.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.trainable_parameters()]
        results.append((out.detach(), gradients, bytes_of(kept, constants(model))))
    (out, gradients, plain), (again, recomputed, few) = results
    assert torch.equal(out, again) and all(torch.equal(a, b) for a, b in zip(gradients, recomputed))
    assert few < 0.4 * plain, (few, plain)


@pytest.mark.parametrize("unfrozen", [False, True])
def test_checkpointing_works_on_every_path(unfrozen: bool) -> None:
    """Reference blocks and a trainable backbone are checkpointed too."""
    model = build_vit(prompt_mode="deep").train()
    model = model.unfreeze() if unfrozen else model
    model.impl = "auto" if unfrozen else "reference"
    found = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        with saved_tensors() as kept:
            loss = model(pictures(model, 4)).square().sum()
        found.append((torch.autograd.grad(loss, list(model.trainable_parameters())), bytes_of(kept)))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0]))
    assert found[1][1] < found[0][1]


def test_a_forward_between_does_not_change_what_is_recomputed() -> None:
    """Constants derived for another dtype in between may not reach the backward of an earlier forward."""
    model = small()
    batch = images(model, 2).float()
    model.set_grad_checkpointing()
    expected = torch.autograd.grad(model(batch).sum(), model.prompts.weight)[0]
    loss = model(batch).sum()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch)
    assert torch.equal(torch.autograd.grad(loss, model.prompts.weight)[0], expected)


def held(model: Any) -> int:
    real = [tensor for tensor in [*constants(model), *model.buffers()] if tensor.device.type != "meta"]
    return bytes_of(real)


@pytest.mark.parametrize("kind", ["beit", "vit"])
def test_freeze_for_inference_drops_the_originals(kind: str) -> None:
    """Half the memory of the weights goes, features stay bitwise, and what needs the originals says so."""
    if kind == "beit":
        model = small().eval()
        batch = images(model, 2).float()
    else:
        model = build_vit(tiny_vit((5, 5), embed_dim=WIDTH, depth=4, mlp_ratio=4.0), readout="mean").float()
        batch = pictures(model, 2).float()
    with torch.no_grad():
        expected = model(batch)
        features = model.forward_features(batch)
    linears = sum(p.numel() * p.element_size() for name, p in model.backbone.named_parameters() if "blocks" in name)
    before = held(model)
    assert model.freeze_for_inference(keep_originals=True) is model and held(model) == before
    model.state_dict()
    assert model.freeze_for_inference() is model and model.freeze_for_inference() is model
    assert before - held(model) > 0.95 * linears
    with torch.no_grad():
        assert torch.equal(model.forward_features(batch), features)
        sealed = model(batch)  # token head and projection are multiplied in another order than before
        assert relative_error(sealed, expected) <= 1e-5
        expected = sealed
        twin = copy.deepcopy(model)
        assert torch.equal(twin(batch), expected)
        model.prompts.weight.mul_(2.0)  # an edit that PyTorch counts is followed by a sealed model too
        assert not torch.equal(model(batch), expected) and torch.equal(twin(batch), expected)
    assert "prompts.weight" in model.learned_state_dict() and model.weight_hash().startswith("sha256:")
    needs_originals: dict[str, Callable[[], Any]] = {
        "state_dict": model.state_dict,
        "load_state_dict": lambda: model.load_state_dict({}),
        "train": model.train,
        "unfreeze": model.unfreeze,
        "refresh": model.refresh,
        "moving or casting": lambda: model.to(torch.bfloat16),
        "reference path": lambda: vptm.check(model, batch),
    }
    needs_originals["keep_originals=True"] = lambda: model.freeze_for_inference(keep_originals=True)
    for name, use in needs_originals.items():
        with pytest.raises(RuntimeError, match=f"{name}.* freeze_for_inference dropped them"):
            use()
    dropped = r"dropped the weights that torch\.bfloat16 with impl='auto' needs"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match=dropped):
        model(batch)
    with torch.no_grad():
        assert torch.equal(twin(batch), expected)


def test_freeze_for_inference_refuses_what_does_not_run_folded() -> None:
    """There is nothing to keep where the originals are what runs."""
    cases = [(build(impl="reference"), "impl='reference'"), (build().unfreeze(), "a trainable one")]
    beit = tiny_beit()
    beit.blocks[1].drop_path2 = nn.Tanh()
    cases.append((build(beit), "Block blocks with other parts"))
    for model, found in cases:
        with pytest.raises(ValueError, match=f"freeze_for_inference needs a model that runs folded, got {found}"):
            model.freeze_for_inference()


class _Casts(TorchDispatchMode):
    """Bytes of frozen weights that are cast."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = () if model.lm_head is None else (model.lm_head.weight,)
        frozen = (*model.backbone.parameters(), *head)
        self.sizes = {p.numel() for p in frozen if p.ndim >= 2 and p.numel() > WIDTH * 4}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "aten::_to_copy" and args[0].numel() in self.sizes:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["beit", "vit"])
def test_autocast_casts_the_frozen_backbone_once(kind: str) -> None:
    """The second forward under autocast casts no weight; without the folded copies every linear would be cast."""
    if kind == "beit":
        model = small()
        batch = images(model, 5).float()
    else:
        model = build_vit(tiny_vit((5, 5), embed_dim=WIDTH, depth=4, mlp_ratio=4.0)).float().train()
        batch = pictures(model, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with _Casts(model) as first:
            model(batch)
        with _Casts(model) as again:
            model(batch).sum().backward()
        model.impl = "reference"
        with _Casts(model) as reference:
            model(batch)
    assert first.count >= 16 and again.count == 0 and reference.count >= 16


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_bf16_weights_and_autocast_stay_within_the_budget(prompt_mode: str) -> None:
    """model.to(bfloat16) and autocast: each errs at most twice as much as the reference in the same setting, plus one
    eps of the largest value, and so they agree with each other within the sum."""
    model = small(prompt_mode=prompt_mode, token_activation="hidden").eval()
    batch = images(model, 4).float().bfloat16().float()
    oracle = copy.deepcopy(model).double()
    oracle.impl = "reference"
    low = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        exact = oracle.forward_hidden(batch.double())
        eps = torch.finfo(torch.bfloat16).eps * exact.abs().max()

        def errors(run: Any, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = []
            for impl in ("auto", "reference"):
                run.impl = impl
                found.append((run.forward_hidden(*args).double() - exact).abs().max())
            return found[0], found[1]

        error, budget = errors(low, batch.bfloat16())
        assert error <= 2 * budget + eps
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error, budget = errors(model, batch)
        assert error <= 2 * budget + eps


def test_autocast_and_back_again() -> None:
    """Leaving autocast brings the fp32 constants back, bitwise, and none that was derived inside is a 16-bit one."""
    model = small().eval()
    batch = images(model, 2).float()
    with torch.no_grad():
        expected = copy.deepcopy(model)(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(batch)
        assert torch.equal(model(batch), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(batch)
        assert torch.equal(model(batch), expected)
    assert 0 < relative_error(low.float(), expected) < 0.1
