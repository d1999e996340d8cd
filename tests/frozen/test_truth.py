"""What a model answers follows from its weights and parts as they are, whatever was done to them and however."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from beit_factory import tiny_beit
from timm.layers import GluMlp, Mlp
from timm.models.eva import Eva
from tiny_models import build, build_vit, images, pictures, relative_error, tiny_vit
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

import vptm
from vptm.export.program import export_program
from vptm.frozen import parts
from vptm_kernels._runtime import frozen_linear
from vptm_kernels.testing import assert_close_to_exact

MLP_FORWARD = Mlp.forward
KINDS = ("beit, mask row and prototypes", "beit, bias of every block", "vit", "vit, attention pooling", "eva")


def make(kind: str) -> tuple[Any, torch.Tensor]:
    """A model in eval mode, and images."""
    if kind == "vit":
        model = build_vit(tiny_vit(depth=2), prompt_mode="deep")
        return model, pictures(model)
    if kind == "vit, attention pooling":
        model = build_vit(tiny_vit(depth=2, global_pool="map", class_token=False), prompt_mode="deep", readout="map")
        return model, pictures(model)
    if kind == "eva":
        eva = {"swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (2, 3)}
        model = build_vit(tiny_vit(depth=2, cls=Eva, **eva), prompt_mode="deep")
        return model, pictures(model)
    options = {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True} if "every" in kind else {}
    model = build(tiny_beit(depth=2, **options), prompt_mode="deep", extra_bias="cls")
    return model, images(model)


@torch.no_grad()
def textbook(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """What a fresh copy says, in which nothing was derived before, by the textbook."""
    fresh = copy.deepcopy(model)
    fresh.impl = "reference"
    return fresh(batch)


def holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def in_place(model: nn.Module, name: str, value: torch.Tensor) -> None:
    with torch.no_grad():
        getattr(*holder(model, name)).copy_(value)


def set_storage(model: nn.Module, name: str, value: torch.Tensor) -> None:
    with torch.no_grad():
        getattr(*holder(model, name)).set_(value)


def replaced(model: nn.Module, name: str, value: torch.Tensor) -> None:
    parent, attribute = holder(model, name)
    if attribute in parent._buffers:
        setattr(parent, attribute, value)
    else:
        setattr(parent, attribute, nn.Parameter(value, requires_grad=parent._parameters[attribute].requires_grad))


def data_assigned(model: nn.Module, name: str, value: torch.Tensor) -> None:
    getattr(*holder(model, name)).data = value


def plain_attribute(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """As sharded training does: a tensor stands where a parameter was."""
    parent, attribute = holder(model, name)
    (parent._parameters if attribute in parent._parameters else parent._buffers).pop(attribute)
    parent.__dict__[attribute] = value


def data_edited(model: nn.Module, name: str, value: torch.Tensor) -> None:
    getattr(*holder(model, name)).data.copy_(value)


def through_numpy(model: nn.Module, name: str, value: torch.Tensor) -> None:
    getattr(*holder(model, name)).detach().numpy()[...] = value.numpy()


def fused_step(model: nn.Module, name: str, value: torch.Tensor) -> None:
    parameter = getattr(*holder(model, name))
    parameter.grad = value
    torch.optim.AdamW([parameter], lr=0.3, fused=True).step()
    parameter.grad = None


COUNTED = (in_place, set_storage, replaced, data_assigned)
UNCOUNTED = (data_edited, through_numpy, fused_step)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_followed_by_every_route(kind: str) -> None:
    """A constant or a projected prompt kept from the call before would answer for weights that are gone."""
    model, batch = make(kind)
    learned = set(model.learned_state_dict())
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    moved = 0
    with torch.no_grad():
        before = model(batch)
    for name in names:
        expected = None  # of the same value, whichever way it came
        routes = COUNTED + (UNCOUNTED if name in learned else (plain_attribute,))
        if name == "mask_token" or name.startswith(("lm_head", "verbalizer")):
            routes = tuple(route for route in routes if route is not plain_attribute)
        for route in routes:
            twin = copy.deepcopy(model)
            tensor = getattr(*holder(twin, name))
            if not tensor.is_floating_point() and route is set_storage:
                continue
            with torch.no_grad():
                twin(batch)
                if name.endswith("rope.pos_embed"):
                    value = tensor * 1.7  # both channels of a pair go on turning by one angle
                elif tensor.is_floating_point():
                    value = tensor * 1.7 + 0.3 * torch.linspace(-1, 1, max(tensor.numel(), 1)).view_as(tensor)
                else:
                    value = tensor.flip(-1).clone()
            route(twin, name, value.to(tensor.dtype))
            with torch.no_grad():
                after = twin(batch)
            if expected is None or route is fused_step:
                expected = textbook(twin, batch)
            assert relative_error(after, expected) <= 1e-11, (name, route.__name__)
            moved += relative_error(after, before) > 1e-9
    assert moved > 2 * len(names), "the edits must move the answer, or this test sees nothing"


def test_in_place_edits_that_pytorch_does_not_count_need_refresh() -> None:
    """The limit that is documented in FrozenEncoder: such an edit of a frozen weight is seen after refresh()."""
    for route in (data_edited, through_numpy):
        model, batch = make(KINDS[0])
        with torch.no_grad():
            model(batch)
            weight = model.backbone.blocks[0].mlp.fc1.weight
            route(model, "backbone.blocks.0.mlp.fc1.weight", (weight * 2).clone())
            model.refresh()
            assert relative_error(model(batch), textbook(model, batch)) <= 1e-11


class Doubled(nn.Module):
    """Somebody's module around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * self.inner(*args, **kwargs)


def hooked(parent: nn.Module, name: str) -> None:
    getattr(parent, name).register_forward_hook(
        lambda module, inputs, output: output * 1.5 if isinstance(output, torch.Tensor) else None
    )


def patched(parent: nn.Module, name: str) -> None:
    module = getattr(parent, name)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 1.5 * type(self).forward(self, *args, **kwargs)

    module.forward = types.MethodType(forward, module)


def wrapped(parent: nn.Module, name: str) -> None:
    setattr(parent, name, Doubled(getattr(parent, name)).eval())


def in_training(parent: nn.Module, name: str) -> None:
    getattr(parent, name).train()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [hooked, patched, wrapped, in_training])
def test_every_part_that_was_changed_runs_as_it_is(kind: str, change: Callable[[nn.Module, str], None]) -> None:
    """An adapter in place of a linear, a hook or a patched method that is stepped over makes another function of the
    model in silence."""
    model, batch = make(kind)
    for drop in (module for module in model.backbone.modules() if isinstance(module, nn.Dropout)):
        drop.p = 0.4
    seen = 0
    with torch.no_grad():
        before = model(batch)
    for name, module in model.named_modules():
        if not name or isinstance(module, nn.ModuleList) or (change is wrapped and isinstance(module, nn.Sequential)):
            continue
        keeps = name in ("backbone", "backbone.patch_embed", "prompts", "verbalizer", "backbone.patch_embed.proj")
        if change is wrapped and keeps:
            continue  # their attributes are part of the model's own interface
        expected = None
        for warm in (True, False):  # with constants made before the change, and after
            twin = copy.deepcopy(model)
            if warm:
                with torch.no_grad():
                    twin(batch)
            change(*holder(twin, name))
            torch.manual_seed(1)
            try:
                with torch.no_grad():
                    after = twin(batch)
            except ValueError as error:
                assert "must " in str(error) and name.rsplit(".")[-1] in str(error), (name, error)
                seen += 1
                continue
            if expected is None:
                torch.manual_seed(1)
                expected = textbook(twin, batch)
            assert relative_error(after, expected) <= 1e-11, (name, warm)
            seen += relative_error(after, before) > 1e-9
    assert seen > 6, "the changes must move the answer, or this test sees nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_blocks_attention_and_heads_fire(kind: str) -> None:
    """Attention maps and class activation maps are read by hooks; timm's own models fire them."""
    model, batch = make(kind)
    for name in ("backbone.blocks.1", "backbone.blocks.1.attn", "backbone.blocks.1.mlp", "lm_head", "verbalizer"):
        if name == "lm_head" and model.lm_head is None:
            continue
        fired: list[object] = []
        hook = model.get_submodule(name).register_forward_hook(lambda module, *_, fired=fired: fired.append(module))
        with torch.no_grad():
            model(batch)
        hook.remove()
        assert fired == [model.get_submodule(name)], name


class _LowRank(nn.Linear):
    """What adapter libraries put in place of a linear: its weight, and a product of two small ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, dtype=base.weight.dtype)
        self.load_state_dict(base.state_dict())
        self.requires_grad_(False)
        generator = torch.Generator().manual_seed(3)
        shape_a, shape_b = (2, base.in_features), (base.out_features, 2)
        self.a = nn.Parameter(torch.randn(shape_a, generator=generator, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(shape_b, generator=generator, dtype=base.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.a.mT @ self.b.mT

    def merge(self) -> nn.Linear:
        merged = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=self.weight.dtype)
        merged.load_state_dict({name: value for name, value in self.state_dict().items() if name not in ("a", "b")})
        merged.weight.data += self.b.data @ self.a.data
        return merged.requires_grad_(False)  # in training mode, which makes no difference to a linear


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_adapters_on_queries_keys_and_values_learn_and_merge(kind: str) -> None:
    """Every adapter gets a gradient, and merging it does not change the answer; read past, it would do neither."""
    model, batch = make(kind)
    for block in model.backbone.blocks:
        block.attn.qkv = _LowRank(block.attn.qkv)
    out = model(batch)
    out.square().sum().backward()
    for block in model.backbone.blocks:
        assert block.attn.qkv.a.grad.any() and block.attn.qkv.b.grad.any()
        block.attn.qkv = block.attn.qkv.merge()
    with torch.no_grad():
        assert relative_error(model(batch), out) <= 1e-11 and model._encoder.runs(model)


def test_a_dynamically_quantised_model_runs() -> None:
    """Linears of int8 have no weight to read; they run as the modules they are."""
    model = build(prompt_mode="deep").float()
    batch = images(model).float()
    with torch.no_grad():
        expected = model(batch)
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert relative_error(small(batch), expected) < 0.5 and small._encoder.folded(small) is None


@torch.no_grad()
def test_a_parametrised_table_is_followed() -> None:
    """Position bias and embeddings through torch.nn.utils.parametrize: the original may change, or how it is read."""

    class Scaled(nn.Module):
        factor = 1.0

        def forward(self, table: torch.Tensor) -> torch.Tensor:
            return self.factor * table

    for options, part, name in (
        ({}, "rel_pos_bias", "relative_position_bias_table"),
        ({"use_abs_pos_emb": True}, "", "pos_embed"),
    ):
        model = build(tiny_beit(depth=2, **options), prompt_mode="deep")
        batch = images(model)
        scaled = Scaled()
        parametrize.register_parametrization(model.backbone.get_submodule(part), name, scaled)
        before = model(batch)
        scaled.factor = 3.0
        assert relative_error(model(batch), before) > 1e-6
        assert relative_error(model(batch), textbook(model, batch)) <= 1e-11


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)])
def test_threads_under_different_autocast_share_one_model(dtypes: tuple[torch.dtype, ...]) -> None:
    """Constants of two types derived at once must not mix, and nothing of a shared module may be swapped meanwhile."""
    model = build(tiny_beit(dim=32, depth=2), prompt_mode="deep").float()
    batch = images(model).float()

    def run(dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(batch)

    expected = {dtype: run(dtype) for dtype in dtypes}
    failures: list[object] = []
    for _ in range(4):
        model.refresh()
        start = threading.Barrier(4)

        def work(dtype: torch.dtype, start: threading.Barrier = start) -> None:
            start.wait()
            for _ in range(3):
                try:
                    if not torch.equal(run(dtype), expected[dtype]):
                        failures.append(dtype)
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=work, args=(dtypes[i % len(dtypes)],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.parametrize("fused", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_validation_follows_a_fused_optimiser(fused: Callable[..., torch.optim.Optimizer]) -> None:
    """Fused steps do not raise the version of a tensor; evaluation between epochs must see them all the same."""
    model, batch = make(KINDS[0])
    labels = torch.arange(len(batch)) % model.num_classes
    optimiser = fused(list(model.trainable_parameters()), lr=0.05, fused=True)
    loader = DataLoader(TensorDataset(batch, labels), batch_size=2)
    losses = []
    for _ in range(3):
        model.train()
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(batch), labels).backward()
        optimiser.step()
        losses.append(vptm.evaluate(model, loader)["loss"])
        true = nn.functional.cross_entropy(textbook(model.eval(), batch).float(), labels).item()
        assert losses[-1] == pytest.approx(true, rel=1e-5)
    assert len(set(losses)) == 3
    assert max(vptm.check(model, batch).values()) <= 1e-10


def test_check_sees_a_stale_constant_of_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vptm.check` compares the path without gradients too, which is where something could be kept."""
    from vptm.frozen.watch import Watch

    model, batch = make(KINDS[0])
    with torch.no_grad():
        model(batch)
    monkeypatch.setattr(Watch, "changed", lambda self, **_: False)
    in_place(model, "backbone.blocks.0.mlp.fc1.weight", 2 * model.backbone.blocks[0].mlp.fc1.weight)
    assert vptm.check(model, batch, gradients=False)["logits"] > 1e-6


def test_constants_are_not_made_again_for_what_learns() -> None:
    """A step that moves the token head, mask token, prompts or verbalizer leaves the folded backbone as it is."""
    model = build(tiny_beit(depth=2), prompt_mode="deep", train_mask_token=True, train_lm_head=True).train()
    batch = images(model)
    folded = model._encoder.folded(model)
    model(batch).square().sum().backward()
    torch.optim.SGD(list(model.trainable_parameters()), lr=0.1).step()
    assert model._encoder.folded(model) is folded
    with torch.no_grad():
        assert relative_error(model.eval()(batch), textbook(model, batch)) <= 1e-11


def test_unfreezing_training_and_freezing_again() -> None:
    """Constants of before the training would be those of other weights."""
    model, batch = make(KINDS[0])
    with torch.no_grad():
        before = model(batch)
    model.unfreeze().train()
    optimiser = torch.optim.SGD(list(model.trainable_parameters()), lr=0.05, fused=True)
    model(batch).square().sum().backward()
    optimiser.step()
    model.backbone.requires_grad_(False)
    model.eval()
    with torch.no_grad():
        assert model._encoder.runs(model) and relative_error(model(batch), before) > 1e-6
        assert relative_error(model(batch), textbook(model, batch)) <= 1e-11


def test_a_sealed_model_follows_what_pytorch_counts_and_loading() -> None:
    """Sealed, projected prompts and the folded head are kept; an edit of what was learned must reach both."""
    for name in ("prompts.weight", "verbalizer.prototypes", "verbalizer.projection.weight", "lm_head.bias"):
        model, batch = make(KINDS[0])
        other = copy.deepcopy(model)
        model.freeze_for_inference()
        with torch.no_grad():
            before = model(batch)
            value = 2 * getattr(*holder(other, name)) + 0.1
        in_place(model, name, value)
        in_place(other, name, value)
        with torch.no_grad():
            assert relative_error(model(batch), textbook(other, batch)) <= 1e-11, name
            assert relative_error(model(batch), before) > 1e-9, name
    model, batch = make(KINDS[0])
    learned = {name: 2 * tensor for name, tensor in model.learned_state_dict().items()}
    other = copy.deepcopy(model)
    other.load_learned_state_dict(learned)
    model.freeze_for_inference()
    model.load_learned_state_dict(learned)
    with torch.no_grad():
        assert relative_error(model(batch), textbook(other, batch)) <= 1e-11


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_sealed_model_is_refused_once_a_frozen_tensor_was_edited(kind: str) -> None:
    """Some of its weights run as they are and some from folded copies: an edit would reach the answer or not, and an
    adapter saved afterwards would know nothing of it."""
    model, batch = make(kind)
    names = [f"backbone.{name}" for name, _ in (*model.backbone.named_parameters(), *model.backbone.named_buffers())]
    for at, name in enumerate(names):
        # every tensor by one route, some by all
        for route in (in_place,) if at % 5 else (in_place, replaced, data_assigned, plain_attribute):
            sealed = copy.deepcopy(model).freeze_for_inference()
            sealed(batch)
            if route is data_assigned and getattr(*holder(sealed, name)).is_meta:
                continue  # PyTorch refuses it
            route(sealed, name, getattr(*holder(model, name)) + 1)
            with pytest.raises(RuntimeError, match="must stay as freeze_for_inference left it, got another weight"):
                sealed(batch)
    assert len(names) > 20


@torch.no_grad()
def test_a_number_that_a_part_reads_is_followed() -> None:
    """What was folded with it, or reads it on one path alone, answers for a part that is gone."""
    model, batch = make("vit, attention pooling")
    model(batch)
    model.backbone.attn_pool.scale = 1.0
    assert relative_error(model(batch), textbook(model, batch)) <= 1e-11
    gated = build_vit(tiny_vit(depth=2, mlp_layer=GluMlp), prompt_mode="deep")
    batch = pictures(gated)
    gated(batch)
    gated.backbone.blocks[0].mlp.gate_last = not gated.backbone.blocks[0].mlp.gate_last
    assert relative_error(gated(batch), textbook(gated, batch)) <= 1e-11
    model, batch = make("eva")
    model(batch)
    model.backbone.blocks[0].attn.rotate_half = True
    with pytest.raises(ValueError, match="must turn both channels of a pair by one angle, block 0 got two"):
        model(batch)


def test_a_forward_that_was_patched_before_vptm_came_is_no_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries patch timm's attention for the whole process; folded, it would run as timm wrote it."""
    assert all(parts.KNOWN.values())
    monkeypatch.setattr(Mlp, "forward", lambda self, x: 2 * MLP_FORWARD(self, x))
    assert parts._own_forward(Mlp) is None
    monkeypatch.setattr(Mlp, "forward", functools.wraps(MLP_FORWARD)(lambda self, x: 2 * MLP_FORWARD(self, x)))
    assert parts._own_forward(Mlp) is None
    monkeypatch.setitem(parts.KNOWN, Mlp, None)  # as it is when vptm is imported after that
    model, batch = make("vit")
    with torch.no_grad():
        assert relative_error(model(batch), textbook(model, batch)) <= 1e-11


@torch.no_grad()
def test_a_copy_of_a_sealed_model_knows_what_it_is_to_stay() -> None:
    """An edit before a copy, or before a copy's first call, was what the copy took for its own state."""
    left = "a sealed model must stay as freeze_for_inference left it"
    model, batch = make(KINDS[0])
    model.freeze_for_inference()
    moved = copy.deepcopy(model)
    moved.backbone = make(KINDS[0])[0].backbone
    with pytest.raises(RuntimeError, match=left):
        copy.deepcopy(moved)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        in_place(copied, "backbone.blocks.0.norm1.weight", torch.zeros(16))
        with pytest.raises(RuntimeError, match=left):
            copied(batch)
        if copied.backbone is model.backbone:
            continue
        for act in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match=left):
                act(copied)
    for change in (
        lambda at: at.bias_index.copy_(at.bias_index.flip(0)),
        lambda at: setattr(at, "bias_index", at.bias_index.flip(0)),
        lambda at: setattr(at, "backbone", make(KINDS[0])[0].backbone),
    ):
        model, batch = make(KINDS[0])
        model.freeze_for_inference()
        model(batch)
        change(model)
        with pytest.raises(RuntimeError, match=left):
            model(batch)


def test_a_model_sealed_under_inference_mode_is_one_sealed_elsewhere() -> None:
    """Its tensors would be inference tensors, whose edits nobody counts and through which no gradient comes."""
    model = vptm.PromptedViT(tiny_vit(depth=2).double(), 5, prompt_length=2).double().eval()
    batch = pictures(model)
    with torch.inference_mode():
        model.freeze_for_inference()
        model(batch)
    model(batch).sum().backward()
    assert not any(tensor.is_inference() for tensor in model.backbone.parameters())


@torch.no_grad()
def test_a_sealed_model_keeps_its_answer_while_the_module_that_was_passed_trains() -> None:
    """Half of it would follow and half not, and every step of the other model would be refused here."""
    own = tiny_vit(depth=2).double()
    model = vptm.PromptedViT(own, 5, prompt_length=2).double().eval()
    batch = pictures(model)
    model.freeze_for_inference()
    before = model(batch)
    for tensor in own.state_dict().values():
        tensor.add_(1)
    assert torch.equal(model(batch), before)


def test_a_module_that_was_passed_in_is_never_changed() -> None:
    """Mode, gradients, classifier, weights and hooks of the user's own model stay, whatever becomes of the prompted
    one; storage is shared while nothing changes it."""
    cases: list[tuple[nn.Module, Callable[[nn.Module], Any]]] = [
        (
            tiny_beit().double(),
            lambda own: vptm.PromptedBEiT(own, 5, readout="cls", token_activation="hidden").double(),
        ),
        (tiny_vit().double(), lambda own: vptm.PromptedViT(own, 5, prompt_length=2).double()),
    ]

    def frozen(model: Any, batch: torch.Tensor) -> None:
        model.eval().freeze_for_inference()
        with torch.no_grad():
            model(batch)

    def unfrozen(model: Any, batch: torch.Tensor) -> None:
        model.unfreeze().train()
        optimiser = torch.optim.SGD(list(model.trainable_parameters()), lr=0.1)
        model(batch).square().sum().backward()
        optimiser.step()

    def partly_unfrozen(model: Any, batch: torch.Tensor) -> None:
        model.backbone.blocks[1].requires_grad_(True)
        unfrozen_parts = [tensor for tensor in model.parameters() if tensor.requires_grad]
        model(batch).square().sum().backward()
        torch.optim.SGD(unfrozen_parts, lr=0.1).step()

    def loaded(model: Any, batch: torch.Tensor) -> None:
        model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})

    def cast(model: Any, batch: torch.Tensor) -> None:
        model.to(torch.float32)(batch.float())

    for own, wrap in cases:
        own.reset_classifier(7)
        own.double().requires_grad_(True)
        seen: list[object] = []
        own.blocks[0].register_forward_hook(lambda module, *_, seen=seen: seen.append(module))
        before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
        batch = torch.randn(2, 3, *own.patch_embed.img_size, dtype=torch.float64)
        with torch.no_grad():
            expected = own.eval()(batch)
            own.train()
        for act in (frozen, unfrozen, partly_unfrozen, loaded, cast):
            if act is frozen:
                continue_with = copy.deepcopy(own)
                continue_with.blocks[0]._forward_hooks.clear()
            model = wrap(continue_with if act is frozen else own)
            shared = model.backbone.blocks[1].attn.qkv.weight
            source = (continue_with if act is frozen else own).blocks[1].attn.qkv.weight
            assert shared.data_ptr() == source.data_ptr() and shared is not source
            act(model, batch)
            for name, tensor in (continue_with if act is frozen else own).state_dict().items():
                assert torch.equal(tensor, before[name]), (act.__name__, name)
            assert own.training and own.num_classes == 7 and all(tensor.requires_grad for tensor in own.parameters())
        assert seen, "hooks of the module run on its twin"
        with torch.no_grad():
            assert torch.equal(own.eval()(batch), expected)


def test_a_part_that_nothing_runs_is_refused_by_name() -> None:
    model, batch = make(KINDS[0])
    patched(model, "backbone")
    for impl in ("auto", "reference"):
        model.impl = impl
        with pytest.raises(ValueError, match="backbone must have the forward of its class"):
            model(batch)
    model, batch = make(KINDS[0])
    wrapped(model.backbone, "rel_pos_bias")
    with pytest.raises(ValueError, match=r"backbone\.rel_pos_bias must be timm's RelativePositionBias, .* got Doubled"):
        model(batch)

    for name, message in (
        ("rope", r"backbone\.rope must have get_embed, .* got Doubled"),
        ("patch_drop", r"backbone\.patch_drop must be Identity, no patch is dropped, got Doubled"),
    ):
        model, batch = make("eva")
        wrapped(model.backbone, name)
        with pytest.raises(ValueError, match=message):
            model(batch)


def test_pairs_of_channels_that_turn_by_two_angles_are_refused() -> None:
    """Folded tables hold one angle a pair: they would answer for half of such a table. The reference takes it whole."""
    model, batch = make("eva")
    with torch.no_grad():
        model(batch)
        model.backbone.rope.pos_embed[..., 1] += 0.3
        with pytest.raises(ValueError, match=r"backbone\.rope must turn both channels of a pair by one angle, block 0"):
            model(batch)
        model.impl = "reference"
        assert model(batch).isfinite().all()


def test_a_patched_forward_is_seen_beside_an_attribute_that_went() -> None:
    """As many attributes as before, and another function."""
    model, batch = make(KINDS[0])
    model.backbone.blocks[0].mlp.note = 1
    with torch.no_grad():
        model(batch)
        del model.backbone.blocks[0].mlp.note
        patched(model.backbone.blocks[0], "mlp")
        assert relative_error(model(batch), textbook(model, batch)) <= 1e-11


def test_training_mode_of_what_learns_makes_no_constants_again() -> None:
    """Trainers call train() every step, eval() after: the backbone's mode stays."""
    model, batch = make(KINDS[0])
    folded = model._encoder.folded(model)
    model.train()
    model(batch).sum().backward()
    assert model.eval()._encoder.folded(model) is folded


def test_a_compiled_model_follows_refresh_and_loading() -> None:
    """A traced graph looks at nothing: after an edit of frozen weights and refresh(), and after load_state_dict, it
    reads the new constants."""
    torch._dynamo.reset()
    model, batch = make(KINDS[0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_error(compiled(batch), textbook(model, batch)) <= 1e-11
        model.backbone.blocks[0].mlp.fc1.weight.mul_(2)
        model.refresh()
        assert relative_error(compiled(batch), textbook(model, batch)) <= 1e-11
        model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
        assert relative_error(compiled(batch), textbook(model, batch)) <= 1e-11
        model.prompts.weight.data.mul_(3)
        assert relative_error(compiled(batch), textbook(model, batch)) <= 1e-11


@torch.no_grad()
def test_a_second_hook_fires_beside_a_first_one() -> None:
    """A hook on a part that always runs must not hide the next one, on a part that is folded."""
    for kind in KINDS:
        model, batch = make(kind)
        model.backbone.norm.register_forward_hook(lambda module, inputs, output: None)
        model(batch)
        hooked(model.backbone.blocks[1], "mlp")
        assert relative_error(model(batch), textbook(model, batch)) <= 1e-11, kind


@torch.no_grad()
def test_replaced_roots_and_classes_are_noticed() -> None:
    """Another backbone, token head, prompts or verbalizer, and a module that became one of another class."""

    class Louder(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for name in ("backbone", "lm_head", "prompts", "verbalizer"):
        model, batch = make(KINDS[0])
        model(batch)
        other = build(tiny_beit(depth=2, seed=9), prompt_mode="deep", extra_bias="cls", seed=5)
        setattr(model, name, getattr(other, name))
        assert relative_error(model(batch), textbook(model, batch)) <= 1e-11, name
    model, batch = make(KINDS[0])
    model(batch)
    model.backbone.blocks[0].mlp.fc1.__class__ = Louder
    assert relative_error(model(batch), textbook(model, batch)) <= 1e-11
    model, batch = make(KINDS[0])
    model, batch = model.float(), batch.float()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(batch)
        model.lm_head = nn.Linear(16, 11).requires_grad_(False)
        assert relative_error(model(batch).float(), before.float()) > 1e-2


@torch.no_grad()
def test_a_sealed_model_follows_replaced_learned_parts_and_refuses_changed_frozen_ones() -> None:
    """Nothing that sealing folded may be stepped over: a part that learns is read again, a frozen one is refused."""
    for name in ("prompts", "verbalizer", "lm_head"):
        model, batch = make(KINDS[0])
        twin = copy.deepcopy(model)
        model.freeze_for_inference()
        model(batch)
        other = build(tiny_beit(depth=2), prompt_mode="deep", extra_bias="cls", seed=5)
        for at in (model, twin):
            setattr(at, name, getattr(other, name))
        assert relative_error(model(batch), textbook(twin, batch)) <= 1e-11, name
    model, batch = make(KINDS[0])
    twin = copy.deepcopy(model)
    model.freeze_for_inference()
    model(batch)
    for at in (model, twin):
        at.verbalizer.token_activation = "softmax"
    assert relative_error(model(batch), textbook(twin, batch)) <= 1e-11
    model, batch = make(KINDS[0])
    model.freeze_for_inference().reset_classifier(7)
    assert model(batch).shape == (2, 7)
    for change in (hooked, patched, wrapped, in_training):
        for part in ("backbone.blocks.1.mlp", "backbone.blocks.0.attn"):
            model, batch = make(KINDS[0])
            model.freeze_for_inference()
            change(*holder(model, part))
            with pytest.raises(RuntimeError, match="a sealed model must stay as freeze_for_inference left it"):
                model(batch)
    model, batch = make(KINDS[0])
    model.freeze_for_inference().backbone.norm.requires_grad_(True)
    model(batch)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="a sealed model must stay"):
        model(batch)  # no gradient would come there
    model, batch = make(KINDS[0])
    state = model.backbone.state_dict()
    model.freeze_for_inference()
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) needs the original weights"):
        model.backbone.load_state_dict(state, assign=True)


def test_a_sealed_model_learns_and_is_traced_as_it_is() -> None:
    """Gradients reach what learns, and a graph reads it: what was projected at sealing is for plain inference alone."""
    model, batch = make(KINDS[0])
    twin = copy.deepcopy(model)
    model.freeze_for_inference()
    for at in (model, twin):
        at(batch).square().sum().backward()
    for (name, found), (_, expected) in zip(model.named_parameters(), twin.named_parameters()):
        if expected.requires_grad:
            assert relative_error(found.grad, expected.grad) <= 1e-10, name
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        model(batch)
        compiled(batch)
        learned = {name: 2 * tensor for name, tensor in model.learned_state_dict().items()}
        for at in (model, twin):
            at.load_learned_state_dict(learned)
        expected = textbook(twin, batch)
        assert relative_error(compiled(batch), expected) <= 1e-11
        assert relative_error(torch.export.export(model, (batch,)).module()(batch), expected) <= 1e-11


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_of_a_sealed_model_stand_in_nothings_way(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's layout cannot be copied, traced or differentiated: whatever needs that goes on, by weights as they
    are, and a copy packs its own."""
    monkeypatch.setattr(frozen_linear, "onednn_is_faster", lambda dtype: True)
    monkeypatch.setattr(frozen_linear, "_FEWEST_WEIGHTS", 0)
    read: list[bool] = []
    packs: list[int] = []
    product, pack = frozen_linear._onednn, frozen_linear.onednn_pack
    monkeypatch.setattr(
        frozen_linear, "_onednn", lambda x, weight, *more: read.append(weight.is_mkldnn) or product(x, weight, *more)
    )
    monkeypatch.setattr(frozen_linear, "onednn_pack", lambda *given: packs.append(1) or pack(*given))
    model, batch = make(KINDS[0])
    model, batch = model.to(dtype), batch.to(dtype)
    exact, eager = textbook(copy.deepcopy(model).double(), batch.double()), textbook(model, batch)
    model.freeze_for_inference()
    with torch.no_grad():
        found = model(batch)
        assert_close_to_exact("packed", found, exact, eager, factor=2)
        assert read.count(True) == 4 + 3 and len(packs) == 2 * 4  # the last block multiplies no keys or values
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            read.clear()
            assert torch.equal(same(batch), found) and read.count(True) == 4 + 3
        packs.clear()
        model.load_learned_state_dict({name: tensor.clone() for name, tensor in model.learned_state_dict().items()})
        assert torch.equal(model(batch), found) and not packs, "what is learned is none of these"
        read.clear()
        torch._dynamo.reset()
        traced = (
            torch.compile(model, fullgraph=True, backend="eager"),
            torch.export.export(model, (batch,)).module(),
            export_program(model).module(),
        )
        for graph in traced:
            assert_close_to_exact("traced", graph(batch), exact, eager, factor=2)
    model(batch).square().sum().backward()
    assert model.prompts.weight.grad is not None and not any(read)


def test_a_tensor_in_place_of_a_parameter_learns() -> None:
    """Sharded training puts plain tensors, which ask for gradients, where parameters were."""
    model, batch = make(KINDS[0])
    linear = model.backbone.blocks[0].mlp.fc1
    weight = linear._parameters.pop("weight").detach().clone().requires_grad_(True)
    linear.__dict__["weight"] = weight
    model(batch).sum().backward()
    assert weight.grad is not None and weight.grad.any()


@torch.no_grad()
def test_a_bias_of_the_linear_of_queries_keys_and_values_counts() -> None:
    """timm's BEiT adds its own bias beside a linear without one; a linear with a bias, put there later, keeps it."""
    own = tiny_beit(depth=2, qkv_bias=False).double()
    for block in own.blocks:
        block.attn.qkv = nn.Linear(16, 48).double().requires_grad_(False)
        nn.init.normal_(block.attn.qkv.bias)
    options = {"prompt_length": 0, "readout": "cls", "token_activation": "hidden", "verbalizer": "linear"}
    model = vptm.PromptedBEiT(own, 3, **options).double().eval()
    batch = images(model)
    for impl in ("auto", "reference"):
        model.impl = impl
        assert relative_error(model.forward_features(batch), own.eval().forward_features(batch)) <= 1e-12


@torch.no_grad()
def test_subclasses_of_prompts_and_verbalizers_run_as_they_are() -> None:
    """Somebody's own comparison, or rows of prompts, must not be replaced by ours."""

    class Halved(vptm.PromptBank):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 0.5 * super().forward(*args, **kwargs)

    class Negated(vptm.PrototypicalVerbalizer):
        def compare(self, embedding: torch.Tensor) -> torch.Tensor:
            return -super().compare(embedding)

    for name, kind in (("prompts", Halved), ("verbalizer", Negated)):
        model, batch = make(KINDS[0])
        getattr(model, name).__class__ = kind
        assert relative_error(model(batch), textbook(model, batch)) <= 1e-11, name


@torch.no_grad()
def test_cached_frozen_features_follow_the_weights_and_refuse_a_mask_that_learns() -> None:
    from vptm.training.reformation import FeatureReformation

    model, batch = make(KINDS[0])
    cached = FeatureReformation(model, cache=True)
    before = cached.frozen(batch)
    model.backbone.blocks[0].mlp.fc1.weight.mul_(2)
    assert relative_error(cached.frozen(batch), before) > 1e-6
    assert torch.equal(cached.frozen(batch), FeatureReformation(model).frozen(batch))
    model.mask_token.mul_(3)
    assert torch.equal(cached.frozen(batch), FeatureReformation(model).frozen(batch))
    model.mask_token.requires_grad_(True)
    with pytest.raises(ValueError, match="cache must be False where the mask token learns"):
        FeatureReformation(model, cache=True)


def test_loading_a_part_of_a_backbone_leaves_the_module_that_was_passed() -> None:
    own = tiny_beit()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    model = vptm.PromptedBEiT(own, 3, readout="cls", token_activation="hidden")
    block = model.backbone.blocks[0]
    block.load_state_dict({name: 2 * value for name, value in block.state_dict().items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert not torch.equal(block.attn.qkv.weight, own.blocks[0].attn.qkv.weight)


def test_a_pickle_of_a_sealed_model_holds_its_weights_once() -> None:
    """Folded weights of all blocks are one tensor and its views, which a pickle would write once for every view."""
    sizes = {}
    for depth in (1, 4):
        model = build(tiny_beit(depth=depth, dim=64), prompt_mode="deep").eval().freeze_for_inference()
        held = sum(tensor.nbytes for tensor in {id(t): t for t in model._encoder.constants()}.values())
        data = pickle.dumps(model)
        sizes[depth] = len(data) / held
        batch = images(model)
        with torch.no_grad():
            assert torch.equal(pickle.loads(data)(batch), model(batch))
    assert sizes[4] < 1.3 * sizes[1], sizes


def test_check_sees_a_wrong_sealed_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` and `predict` run sealed, so `check` runs that too."""
    model, batch = make(KINDS[0])
    own = vptm.PrototypicalVerbalizer.prepare

    def wrong(self: Any, lm_head: Any) -> Any:
        prepared = own(self, lm_head)
        return prepared._replace(prototypes=-prepared.prototypes)

    monkeypatch.setattr(vptm.PrototypicalVerbalizer, "prepare", wrong)
    errors = vptm.check(model, batch)
    assert errors["logits sealed"] > 1e-3 and errors["logits"] <= 1e-10


def test_timm_still_builds_what_was_passed() -> None:
    """Guards this file: timm's own model of the same parts gives the features of the prompted one without prompts."""
    own = timm.models.beit.Beit(**{"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2})
    model = vptm.PromptedBEiT(
        own, 3, prompt_length=0, readout="cls", token_activation="hidden", verbalizer="linear"
    ).eval()
    batch = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(model.forward_features(batch), own.eval().forward_features(batch), atol=1e-5)
