"""The frozen encoder is the reference function: forward, gradients, and the constants it derives from frozen
weights."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from beit_factory import randomize, tiny_beit
from forked import Forked
from tiny_models import BACKBONES, assert_as_exact_as_the_reference, build, images, relative_error
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import vptm
from vptm.frozen import folded
from vptm.frozen.encoder import FrozenEncoder
from vptm.frozen.fold import fold_block
from vptm_kernels._runtime.triton_support import has_triton
from vptm_kernels.residual_norm.configs import one_pass_is_worth_it


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
@pytest.mark.parametrize("readout", ["mask", "cls", "mean"])
@pytest.mark.parametrize("length", [0, 1, 10])
def test_encoder_equals_reference(prompt_mode: str, readout: str, length: int) -> None:
    """Every mode, read-out, bias mode and backbone, forward and gradients of all that is learned, in fp64."""
    settings = itertools.product(["zero", "neutral", "grid:1,2", "learned"], ["insert", "replace"])
    for (extra_bias, mask_mode), (name, backbone) in zip(settings, itertools.cycle(BACKBONES.items())):
        if name == "absolute positions" and extra_bias == "neutral":
            name, backbone = "shared bias", {}
        if readout != "mask" and (extra_bias.startswith("grid") or mask_mode == "replace"):
            continue
        model = build(
            tiny_beit(**backbone),
            prompt_mode=prompt_mode,
            readout=readout,
            prompt_length=length,
            extra_bias=extra_bias,
            mask_mode=mask_mode,
            progressive_alpha=0.3,
            train_mask_token=readout == "mask",
            train_lm_head=True,
        )
        assert FrozenEncoder.supports(model)
        for tensor, error in vptm.check(model, images(model)).items():
            assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (
                name,
                extra_bias,
                mask_mode,
                tensor,
                error,
            )


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
@pytest.mark.parametrize("depth", [1, 2])
def test_encoder_equals_reference_at_small_depth(prompt_mode: str, depth: int) -> None:
    """One block is first and last at once; two leave nothing in between: the special cases of both ends meet."""
    model = build(tiny_beit(depth=depth), prompt_mode=prompt_mode, extra_bias="cls")
    assert max(vptm.check(model, images(model)).values()) <= 1e-10


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_prompt_dropout_draws_a_mask_per_sample(prompt_mode: str) -> None:
    """With dropout in training, keys and values are per sample and equal the reference under the same seed."""
    model = build(prompt_mode=prompt_mode, prompt_dropout=0.5).train()
    batch = images(model, 3)
    outputs = {}
    for impl in ("torch", "reference"):
        model.impl = impl
        torch.manual_seed(3)
        outputs[impl] = model(batch)
    assert relative_error(outputs["torch"], outputs["reference"]) <= 1e-12
    same = batch[:1].expand(2, -1, -1, -1)
    model.impl = "torch"
    first, second = model(same)
    assert not torch.allclose(first, second)


def test_sharing_one_dropout_mask_would_differ() -> None:
    """Why sharing is switched off under dropout: the shared prefix gives both copies of an image the same output."""
    model = build(prompt_mode="deep", prompt_dropout=0.5).train()
    batch = images(model, 1).expand(2, -1, -1, -1)
    dropped = model(batch)
    model.prompts.eval()
    shared = model(batch)
    assert torch.allclose(shared[0], shared[1]) and not torch.allclose(dropped[0], dropped[1])


@pytest.mark.parametrize("prompt_mode", ["shallow", "progressive"])
def test_prompts_that_are_carried_may_not_become_a_prefix(prompt_mode: str) -> None:
    """Treating carried or mixed prompts as deep ones would change the function, so the modes must stay apart."""
    model = build(prompt_mode=prompt_mode, progressive_alpha=0.3)
    deep = build(prompt_mode="deep")
    deep.load_learned_state_dict(
        {**model.learned_state_dict(), "prompts.weight": model.prompts.weight.detach().expand(3, -1, -1)}
    )
    batch = images(model)
    assert relative_error(deep(batch), model(batch)) > 1e-3


def test_output_follows_every_change_of_a_frozen_weight() -> None:
    """Derived constants are made again after an in-place edit, load_state_dict and .to(); a stale one fails here."""
    model = build(prompt_mode="deep", extra_bias="cls")
    batch = images(model)
    edits = {
        "a weight": lambda: model.backbone.blocks[0].mlp.fc1.weight.add_(0.3),
        "a norm": lambda: model.backbone.blocks[1].norm1.weight[2].mul_(-3.0),
        "LayerScale": lambda: model.backbone.blocks[2].gamma_1[0].add_(2.0),
        "a norm's eps": lambda: setattr(model.backbone.blocks[1].norm2, "eps", 0.3),
        "the bias table": lambda: model.backbone.rel_pos_bias.relative_position_bias_table[-1].add_(4.0),
        "the prompts": lambda: model.prompts.weight[1].mul_(-1.0),
    }
    for name, edit in edits.items():
        with torch.no_grad():
            before = model(batch)
            edit()
            after = model(batch)
        assert relative_error(after, before) > 1e-6, name
        assert max(vptm.check(model, batch, gradients=False).values()) <= 1e-12, name
    model.backbone.blocks[0].attn.proj.weight.data.add_(0.3)  # PyTorch does not count edits through .data
    model.refresh()
    assert max(vptm.check(model, batch, gradients=False).values()) <= 1e-12
    other = build(tiny_beit(seed=9), prompt_mode="deep", extra_bias="cls")
    other.backbone.blocks[1].norm2.eps = 0.3  # no state_dict holds it
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(model(batch), other(batch))
    assert model.float()(batch.float()).dtype == torch.float32
    assert max(vptm.check(model, batch.float()).values()) <= 1e-4


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use() -> None:
    """Constants made under inference_mode must be usable with autograd afterwards."""
    model = build(prompt_mode="deep")
    batch = images(model)
    with torch.inference_mode():
        expected = model(batch).clone()
    loss = model(batch)
    loss.square().sum().backward()
    assert torch.allclose(loss, expected)


@torch.inference_mode()
def test_model_made_under_inference_mode_runs() -> None:
    """Tensors made under inference_mode have no version counter: reading it would raise, and an adapter that is loaded
    afterwards would go unnoticed."""
    model, other = build(prompt_mode="deep"), build(prompt_mode="deep", seed=2)
    assert max(vptm.check(model, images(model), gradients=False).values()) <= 1e-12
    before = model(images(model))
    model.load_learned_state_dict(other.learned_state_dict())
    assert relative_error(model(images(model)), before) > 1e-2
    assert max(vptm.check(model, images(model), gradients=False).values()) <= 1e-12


@pytest.mark.parametrize("name", ["prompts.weight", "backbone.blocks.0.mlp.fc1.weight", "verbalizer.prototypes"])
@torch.no_grad()
def test_a_replaced_tensor_at_a_reused_address_is_noticed(name: str) -> None:
    """Memory that was freed is given out again: an address and a version alone would find the old constants."""
    model = build(prompt_mode="deep")
    batch, weight = images(model), model.get_parameter(name).detach().clone()
    for factor in (1.0, 2.0, 3.0, -4.0, 0.5):
        expected = copy.deepcopy(model)
        expected.get_parameter(name).copy_(weight * factor)
        found = functional_call(model, {name: weight * factor}, (batch,))
        assert relative_error(found, expected(batch)) <= 1e-12, factor


@torch.no_grad()
def test_what_is_not_a_parameter_is_noticed_too() -> None:
    """Another activation, a hook, and drop path in training mode change the function; folded constants hold none."""
    model = build(tiny_beit(drop_path_rate=0.5), prompt_mode="deep")
    batch = images(model)
    before = model(batch)
    model.backbone.blocks[0].mlp.act = torch.nn.GELU(approximate="tanh")
    assert max(vptm.check(model, batch, gradients=False).values()) <= 1e-12
    assert not torch.equal(model(batch), before)
    hook = model.backbone.blocks[1].mlp.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert not model._encoder.runs(model) and "blocks with hooks" in model.why_unfolded()
    assert max(vptm.check(model, batch, gradients=False).values()) <= 1e-12
    hook.remove()
    assert model._encoder.runs(model)
    model.unfreeze().requires_grad_(False).train()
    assert not model._encoder.runs(model) and not torch.equal(model(batch), model(batch))


def test_a_norm_with_a_forward_of_its_own_is_not_folded() -> None:
    class Doubled(torch.nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = build(prompt_mode="deep")
    model.backbone.blocks[1].norm2 = Doubled(16).double().requires_grad_(False)
    assert not model._encoder.runs(model)
    assert max(vptm.check(model, images(model)).values()) <= 1e-10


def test_parts_of_another_dtype_or_device_are_refused_by_name() -> None:
    """PyTorch would speak of mat1 and mat2."""
    changes = [
        (lambda model: model.prompts.to(torch.bfloat16), "prompts must have the dtype of the backbone, torch.float64"),
        (lambda model: model.verbalizer.float(), "verbalizer must have the dtype of the backbone, torch.float64"),
        (lambda model: model.prompts.to("meta"), "prompts must be on the device of the backbone, cpu, got meta"),
    ]
    for change, message in changes:
        model = build(prompt_mode="deep")
        change(model)
        with pytest.raises((TypeError, ValueError), match=message):
            model(images(model))
    model = build(prompt_mode="deep").float()
    wrong = "images must have the dtype of the model, torch.float32, got torch.float64"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=wrong):
        model(images(model))


def test_state_dict_holds_the_original_weights_bitwise() -> None:
    """Folded weights never reach state_dict, a deep copy or timm."""
    model = build(prompt_mode="deep")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(images(model))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    twin = copy.deepcopy(model)
    twin.backbone.blocks[0].attn.proj.bias.data.add_(1.0)
    assert relative_error(twin(images(model)), model(images(model))) > 1e-6


def test_a_pickled_model_is_the_same_and_still_follows_load_state_dict() -> None:
    """Processes that are spawned get their model by pickle; what is derived from frozen weights stays behind."""
    model = build(prompt_mode="deep")
    batch = images(model)
    expected = model(batch)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(batch), expected)
    other = build(tiny_beit(seed=9), prompt_mode="deep")
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(batch), other(batch))


class _Calls(TorchDispatchMode):
    """Counts every operator that runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("extra_bias", ["zero", "neutral"])
@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_triton_kernels_run_the_blocks(prompt_mode: str, extra_bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the Triton path every block before the read-out is one launch of the attention kernel, the read-out row two
    of its own: no cat, SDPA or pad, and right in fp64."""
    if torch.cuda.is_available():
        pytest.skip("fp64 Triton needs the interpreter, which runs where there is no GPU")
    beit = tiny_beit((3, 3), dim=32, depth=3)
    model = build(beit, prompt_mode=prompt_mode, extra_bias=extra_bias, progressive_alpha=0.3, impl="triton")
    batch = images(model)
    errors = vptm.check(model, batch)
    assert max(errors.values()) <= 1e-10, errors
    from triton.runtime.interpreter import GridExecutor

    launches: Counter[str] = Counter()
    launch = GridExecutor.__call__

    def counted(self: Any, *args: object, **kwargs: object) -> object:
        launches[self.fn.__name__] += 1
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    with torch.no_grad(), _Calls() as calls:
        model(batch)
    blocks = {
        "prompted_attention_forward_kernel": 2,
        "readout_attention_split_kernel": 1,
        "readout_attention_merge_kernel": 1,
        "prototype_cosine_cosine_kernel": 1,
    }
    assert launches == blocks, launches
    attention = {name: count for name, count in calls.names.items() if "prompted_attention" in name}
    assert sum(attention.values()) == 2, attention
    assert calls.names["vptm::readout_attention"] == 1, "the read-out row of the last block"
    assert not [name for name in calls.names if any(word in name for word in ("cat", "scaled_dot_product", "pad"))]
    model.freeze_for_inference()
    launches.clear()
    with torch.no_grad():
        model(batch)
    assert launches == blocks, "sealed, token head and projection are one product"


def test_corrupting_the_kernel_changes_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton path really runs the kernel: with its output doubled, `vptm.check` sees it."""
    from vptm_kernels.prompted_attention import triton_impl

    if torch.cuda.is_available():
        pytest.skip("fp64 Triton needs the interpreter, which runs where there is no GPU")
    model = build(tiny_beit((3, 3), dim=32), prompt_mode="deep", impl="triton")
    forward = triton_impl.Plan.forward

    def doubled(*args, **kwargs):
        out, lse = forward(*args, **kwargs)
        return out * 2, lse

    monkeypatch.setattr(triton_impl.Plan, "forward", doubled)
    assert vptm.check(model, images(model), gradients=False)["logits"] > 1e-3


def _ask_for_triton() -> None:
    model = build(impl="triton")
    model(images(model))


def test_triton_asked_for_on_a_cpu_is_refused_not_replaced() -> None:
    """Without a GPU and outside the interpreter, impl="triton" says what is missing."""
    status, _, errors = Forked(_ask_for_triton).outcome()
    assert status == 1 and "impl='triton' needs " in errors.splitlines()[-1]


def test_unfrozen_backbone_trains_and_is_not_folded() -> None:
    """After unfreeze() the gradients of backbone weights must be those of the reference."""
    model = build(prompt_mode="deep")
    model(images(model))
    model.unfreeze().eval()
    assert not FrozenEncoder.supports(model)
    errors = vptm.check(model, images(model))
    assert "grad backbone.blocks.0.attn.qkv.weight" in errors and max(errors.values()) <= 1e-10
    model.impl = "triton"
    with pytest.raises(ValueError, match=r"impl='triton' needs a frozen backbone .* got a trainable one"):
        model(images(model))


def test_blocks_that_do_not_fold_run_unfolded() -> None:
    """A block with a part that is not what it is called runs as it is; asked for by name, Triton refuses it."""
    beit = tiny_beit()
    beit.blocks[1].drop_path2 = nn.Tanh()
    model = build(beit)
    assert not FrozenEncoder.supports(model)
    assert max(vptm.check(model, images(model)).values()) <= 1e-10
    model.impl = "triton"
    with pytest.raises(ValueError, match="got Block blocks with other parts"):
        model(images(model))


def test_layer_scale_stays_apart_in_fp16() -> None:
    """gamma = 1e-5 times a weight is subnormal in fp16 and would lose most of its bits if folded."""
    beit = tiny_beit()
    for block in beit.blocks:
        block.gamma_1.data.fill_(1e-5)
    half, single = fold_block(beit.blocks[0], torch.float16), fold_block(beit.blocks[0], torch.float32)
    assert half.scale_1 is not None and single.scale_1 is None
    assert torch.equal(half.proj_weight, beit.blocks[0].attn.proj.weight.half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_low_precision_stays_within_the_error_of_the_reference(prompt_mode: str, dtype: torch.dtype) -> None:
    """Largest error against fp64 at most twice the reference's own in that dtype, plus one eps of the largest value."""
    model = build(tiny_beit(dim=32), prompt_mode=prompt_mode, readout="cls", token_activation="hidden").to(dtype)
    assert_as_exact_as_the_reference(model, images(model, 4).to(dtype))


def test_autocast_runs_in_bf16_and_agrees() -> None:
    """Under autocast the frozen weights are cast once, and the result stays near the fp32 one."""
    model = build(tiny_beit(dim=32), prompt_mode="deep").float()
    batch = images(model, 2).float()
    with torch.no_grad():
        expected = model.forward_hidden(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model.forward_hidden(batch)
            assert model._encoder.folded(model).blocks[0].qkv_weight.dtype == torch.bfloat16
        again = model.forward_hidden(batch)
    assert torch.equal(again, expected)
    assert relative_error(actual.float(), expected) < 0.05


def test_training_keeps_no_input_of_a_frozen_linear() -> None:
    """Deep prompts at N = 26: what autograd keeps per block is two norm inputs, qkv, attention output and the MLP's
    inner rows."""
    beit = tiny_beit((5, 5), dim=32, depth=4, mlp_ratio=4.0)
    model = build(beit, prompt_mode="deep", prompt_length=20, readout="cls").float().train()
    batch = images(model, 8).float()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    sizes = {}
    for impl in ("torch", "reference"):
        model.impl = impl
        model(batch)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch)
        sizes[impl] = sum(kept.values())
    assert sizes["torch"] < 0.62 * sizes["reference"], sizes


def test_randomised_parameters_are_seen() -> None:
    """Guards this file: with LayerScale at its initial 1e-5 a wrong block would be invisible, here it is not."""
    model = build(prompt_mode="deep")
    batch = images(model)
    before = model(batch)
    randomize(model.backbone.blocks[1], seed=77)
    assert relative_error(model(batch), before) > 1e-2


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_compiles_as_one_graph_for_every_batch_size(prompt_mode: str) -> None:
    """fullgraph=True, forward and backward; one compilation serves all batch sizes under dynamic=True, also where eager
    calls follow the first compiled one, as validation follows training."""
    torch._dynamo.reset()
    model = build(tiny_beit((3, 3)), prompt_mode=prompt_mode)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch_size in (5, 3, 7):  # not 1 or 2: PyTorch gives 1 a graph of its own and would take 2 for the heads
        batch = images(model, batch_size)
        found = torch.autograd.grad(compiled(batch).square().sum(), model.prompts.weight)[0]
        expected = torch.autograd.grad(model(batch).square().sum(), model.prompts.weight)[0]
        assert relative_error(found, expected) <= 1e-10
    assert len(graphs) == 1


@pytest.mark.parametrize("run_before", [False, True], ids=["fresh", "after a run"])
def test_exports_for_inference(run_before: bool) -> None:
    """torch.export takes the model in eval mode, with constants of the weights it has then, and gives the same
    scores."""
    model = build(tiny_beit((3, 3)), prompt_mode="deep").eval()
    batch = images(model)
    if run_before:
        model(batch)
        model.load_state_dict(build(tiny_beit((3, 3), seed=5), prompt_mode="deep").state_dict())
    exported = torch.export.export(model, (batch,))
    assert relative_error(exported.module()(batch), model(batch)) <= 1e-12


@pytest.mark.parametrize(
    ("prompt_mode", "readout"), [("deep", "mask"), ("shallow", "cls"), ("progressive", "mean")], ids=str
)
def test_exports_for_every_batch_size(prompt_mode: str, readout: str) -> None:
    """A size read as a Python int anywhere in the model would fix the batch of the exported graph."""
    model = build(tiny_beit((3, 3)), prompt_mode=prompt_mode, readout=readout).eval()
    sizes = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(model, (images(model, 5),), dynamic_shapes=sizes).module()
    for batch_size in (1, 7):
        batch = images(model, batch_size)
        assert relative_error(exported(batch), model(batch)) <= 1e-12


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("backbone", ["shared bias", "no LayerScale"])
@pytest.mark.parametrize("mode", ["shallow", "deep"])
def test_blocks_that_add_and_normalise_in_one_pass_equal_the_reference(
    mode: str, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large batches on a GPU take `residual_norm`: a wrong eps, LayerScale or lost gradient shows here."""
    taken: list[int] = []
    op = folded.residual_norm
    monkeypatch.setattr(folded, "one_pass_is_worth_it", lambda elements: True)
    monkeypatch.setattr(folded, "residual_norm", lambda *given, **named: taken.append(1) or op(*given, **named))
    model = build(tiny_beit(dim=32, **BACKBONES[backbone]), prompt_mode=mode, impl="triton")
    for tensor, error in vptm.check(model, images(model)).items():
        assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (tensor, error)
    assert taken


@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_backward_adds_no_residual_into_a_view(mode: str) -> None:
    """An addition in place to the rows of a linear, which are a view, makes backward clear, copy and copy again."""
    model = build(tiny_beit(), prompt_mode=mode).train()
    seen, left = set(), [model(images(model)).sum().grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [each for each, _ in node.next_functions]
    names = Counter(node.name().rpartition(":")[2] for node in seen)
    assert names["AddBackward0"] and not names["CopySlices"], names


def test_small_batches_do_not_wait_for_the_pass() -> None:
    """At 64 images of 197 rows of 768 the GPU has work for longer than the host; at batch 1 it has not."""
    assert one_pass_is_worth_it(64 * 197 * 768) and not one_pass_is_worth_it(197 * 768)
