"""`dynamic_img_size`: one model on pictures of several sizes answers as a model that was made at each of them."""

from __future__ import annotations

import copy
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from beit_factory import tiny_beit
from timm.layers import resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock
from tiny_models import BACKBONES, build, build_vit, copied, relative_error, tiny_vit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vptm
from vptm.frozen.encoder import FrozenEncoder
from vptm.inspection.explain import inspect_tokens, readout_attention_weights
from vptm.inspection.profile import stages_of
from vptm.models import prompted_model
from vptm.models.opening import open_model
from vptm.training.reformation import FeatureReformation
from vptm.weights.vits import load_vit
from vptm_kernels._runtime.triton_support import has_triton

pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # of timm's
SIZES = ((8, 20), (16, 16), (12, 12), (4, 12))
ROTARY = {"cls": Eva, "use_rot_pos_emb": True, "global_pool": "token"}
VITS: dict[str, dict[str, Any]] = {
    "ViT": {},
    "DINOv2 with registers": {"init_values": 1e-5, "reg_tokens": 3, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "SigLIP": {"class_token": False, "global_pool": "map"},
    "timm's own dynamic size": {"dynamic_img_size": True},
    "blocks that do not fold": {"block_fn": ResPostBlock},
    "EVA-02": {**ROTARY, "swiglu_mlp": True, "ref_feat_shape": (2, 3)},
    "DINOv3": {
        **ROTARY,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "num_reg_tokens": 2,
        "use_abs_pos_emb": False,
    },
    "DINOv3 of any size": {**ROTARY, "rope_type": "dinov3", "dynamic_img_size": True},
    "learned angles": {**ROTARY, "rope_type": "mixed"},
    "MRope": {**ROTARY, "rope_type": "mrope", "rope_mrope_section": (1, 1, 2)},
}


def pictures(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def prompted(module: Any, **options: Any) -> Any:
    """A random model in double precision of a copy of `module`, whose values `build` writes over."""
    return (build if isinstance(module, Beit) else build_vit)(copied(module), **options)


def made_at(module: Any, size: tuple[int, int], like: Any, **options: Any) -> Any:
    """A model of `module` at `size`, set by timm in float32, with what `like` learned."""
    resized = copied(module)
    resized.set_input_size(img_size=size)
    model = prompted(resized, **options)
    learned = like.learned_state_dict()
    model.load_learned_state_dict(learned)
    for name in ("mask_token", "lm_head"):
        if (part := getattr(like, name)) is not None and not isinstance(part, nn.Module):
            getattr(model, name).data = part.data.clone()
        elif part is not None:
            getattr(model, name).load_state_dict(part.state_dict())
    return model


def assert_same(model: Any, fixed: Any, size: tuple[int, int], name: object) -> None:
    """Rows, read-out row, scores and gradients of prompts, on the path the model runs on and on the reference path."""
    batch = pictures(size)
    for impl in ("torch", "reference"):
        model.impl = fixed.impl = impl
        rows, expected = model.forward_features(batch), fixed.forward_features(batch)
        assert rows.shape == expected.shape and relative_error(rows, expected) <= 1e-12, (name, size, impl)
        assert relative_error(model.forward_hidden(batch), fixed.forward_hidden(batch)) <= 1e-12, (name, size, impl)
        found, wanted = model(batch), fixed(batch)
        assert relative_error(found, wanted) <= 1e-12, (name, size, impl)
        pair = ((one, scores.square().sum()) for one, scores in ((model, found), (fixed, wanted)))
        gradients = [torch.autograd.grad(loss, one.prompts.weight)[0] for one, loss in pair]
        assert gradients[0].any() and relative_error(*gradients) <= 1e-10, (name, size, impl)
    model.impl = "auto"


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
@pytest.mark.parametrize("name", VITS)
def test_vits_answer_at_every_size_as_models_made_at_it(name: str, prompt_mode: str) -> None:
    """Absolute positions, resampled, and rotary ones of every kind: fails where positions, the place of a row or the
    number of patches stay those of the model's own size."""
    family = VITS[name]
    backbone = tiny_vit((3, 3), **family)
    readouts = {"no class token": ("mean",), "SigLIP": ("map", "mean")}.get(name, ("cls", "mean_with_prompts"))
    for size, readout in zip(SIZES[:3], itertools.cycle(readouts)):
        options = {"prompt_mode": prompt_mode, "readout": readout, "progressive_alpha": 0.3}
        model = prompted(backbone, dynamic_img_size=True, **options)
        assert FrozenEncoder.supports(model) == (name != "blocks that do not fold")
        assert_same(model, made_at(backbone, size, model, **options), size, (name, readout))


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_beits_answer_at_every_size_as_models_made_at_it(backbone: str, prompt_mode: str) -> None:
    """Position tables, shared and per block, in every bias mode, with a mask row and a masked patch."""
    beit = tiny_beit((3, 3), **BACKBONES[backbone])
    settings = [("zero", "insert"), ("zero", "replace"), ("grid:0,1", "insert"), ("learned", "insert")]
    settings += [] if backbone == "absolute positions" else [("neutral", "insert")]
    for (extra_bias, mask_mode), size in zip(settings, itertools.cycle(SIZES)):
        options = {"prompt_mode": prompt_mode, "extra_bias": extra_bias, "mask_mode": mask_mode}
        options |= {"progressive_alpha": 0.3}
        model = prompted(beit, dynamic_img_size=True, **options)
        assert_same(model, made_at(beit, size, model, **options), size, (backbone, extra_bias, mask_mode))


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_gates_of_prompts_go_to_every_size(prompt_mode: str) -> None:
    """They stand in the last columns, however many rows are before them, on both paths and where blocks do not fold;
    a sealed model takes those that it was sealed with."""
    options = {"prompt_mode": prompt_mode, "prompt_gate": -1.0, "progressive_alpha": 0.3}
    for backbone in (tiny_beit((3, 3)), tiny_vit((3, 3)), tiny_vit((3, 3), block_fn=ResPostBlock)):
        for size in SIZES[:2]:
            model = prompted(backbone, dynamic_img_size=True, **options)
            fixed = made_at(backbone, size, model, **options)
            assert_same(model, fixed, size, (type(backbone).__name__, size))
            with torch.no_grad():
                model.prompts.gate.zero_()
                changed = model(pictures(size))
                assert relative_error(changed, fixed(pictures(size))) > 1e-3
                if FrozenEncoder.supports(model):
                    assert relative_error(model.freeze_for_inference()(pictures(size)), changed) <= 1e-12


def test_a_mask_row_stands_in_the_centre_of_every_size() -> None:
    token, backbone = torch.randn(1, 1, 16), tiny_vit((3, 3))
    loaded = load_vit(copied(backbone))
    loaded.mask_token = token
    model = build_vit(loaded, readout="mask", dynamic_img_size=True)
    for size in SIZES:
        resized = copied(backbone)
        resized.set_input_size(img_size=size)
        loaded = load_vit(resized)
        loaded.mask_token = token
        fixed = build_vit(loaded, readout="mask")
        fixed.load_learned_state_dict(model.learned_state_dict())
        fixed.mask_token.data = model.mask_token.data
        assert_same(model, fixed, size, "mask")


@torch.no_grad()
def test_files_opened_at_a_size_say_the_same(tmp_path: Path) -> None:
    """Through the doors that resize positions as they load, in float32 and in double precision; and an adapter keeps
    the setting."""
    torch.save(tiny_vit((3, 3), embed_dim=64, num_heads=1).state_dict(), tmp_path / "vit.pth")
    torch.save(tiny_beit((3, 3)).state_dict(), tmp_path / "beit.pth")
    for file in ("vit.pth", "beit.pth"):
        settings: dict[str, Any] = {"readout": "cls", "verbalizer": "linear", "token_activation": "hidden"}
        model = open_model(tmp_path / file, 3, dynamic_img_size=True, **settings).eval()
        vptm.save_adapter(model, tmp_path / "adapter")
        again = vptm.load_adapter(tmp_path / "adapter")
        assert again.config["dynamic_img_size"]
        for size in SIZES:
            fixed = open_model(tmp_path / file, 3, img_size=size, **settings).eval()
            fixed.load_learned_state_dict(model.learned_state_dict())
            for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
                batch = pictures(size).to(dtype)
                expected = fixed.to(dtype)(batch)
                assert relative_error(model.to(dtype)(batch), expected) <= bound, (file, size)
                assert relative_error(again.to(dtype)(batch), expected) <= bound, (file, size)
            model.float(), again.float()


@torch.no_grad()
def test_intermediates_and_attention_maps_at_another_size() -> None:
    for backbone in (tiny_vit((3, 3), **VITS["EVA-02"]), tiny_beit((3, 3))):
        model = prompted(backbone, prompt_mode="deep", dynamic_img_size=True)
        fixed = made_at(backbone, (8, 20), model, prompt_mode="deep")
        batch = pictures((8, 20))
        features, maps = model.forward_intermediates(batch, indices=2)
        expected, wanted = fixed.forward_intermediates(batch, indices=2)
        assert maps[0].shape == (2, 16, 2, 5) and relative_error(features, expected) <= 1e-12
        assert all(relative_error(*pair) <= 1e-12 for pair in zip(maps, wanted))
        pairs = zip(model.attention_maps(batch), fixed.attention_maps(batch))
        assert all(relative_error(*pair) <= 1e-12 for pair in pairs)


def test_every_path_at_another_size() -> None:
    """Folded, recorded, sealed and the loss; in eval mode and in training."""
    for backbone in (tiny_vit((3, 3), **VITS["EVA-02"]), tiny_beit((3, 3))):
        model = prompted(backbone, prompt_mode="deep", dynamic_img_size=True)
        batch = pictures((8, 20))
        assert max(vptm.check(model, batch).values()) <= 1e-10
        fixed = made_at(backbone, (8, 20), model, prompt_mode="deep")
        labels = torch.tensor([0, 1])
        assert relative_error(model(batch, labels=labels).loss, fixed(batch, labels=labels).loss) <= 1e-12
        model.train(), fixed.train()
        assert relative_error(model(batch), fixed(batch)) <= 1e-12
        sealed = copy.deepcopy(model).freeze_for_inference()
        for grad in (torch.inference_mode(), torch.enable_grad()):
            with grad:
                assert relative_error(sealed(batch), fixed(batch)) <= 1e-12
                assert relative_error(sealed(pictures((12, 12))), model.eval()(pictures((12, 12)))) <= 1e-12
        with pytest.raises(RuntimeError, match=r"attention_maps\(\) needs the original weights"):
            sealed.attention_maps(batch)
        bare = model.without_prompts()
        assert relative_error(bare(batch), fixed.without_prompts()(batch)) <= 1e-12
        half, single = model.float(), fixed.float()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            assert relative_error(half(batch.float()).float(), single(batch.float()).float()) <= 1e-6


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (3, {"kind": "kv"}),
        (3, {"kind": "cross"}),
        (1, {"placement": "add"}),
        (1, {"placement": "add", "added_to": "class_and_patches"}),
    ],
)
def test_prompts_of_other_kinds_at_another_size(length: int, options: dict[str, Any]) -> None:
    for backbone in (tiny_vit((3, 3), **VITS["EVA-02"]), tiny_beit((3, 3))):
        settings = {"prompt_mode": "deep", "prompt_length": length, "prompt_options": options}
        model = prompted(backbone, dynamic_img_size=True, **settings)
        assert_same(model, made_at(backbone, (8, 20), model, **settings), (8, 20), options)


def test_a_head_reads_no_other_row_of_features_of_another_size() -> None:
    """Fails where the row of the model's own size is read of other pictures' features, which is another patch."""
    models = [prompted(tiny_beit((3, 3)), readout=readout, dynamic_img_size=True) for readout in ("mask", "mean")]
    models += [prompted(tiny_vit((3, 3)), readout=one, dynamic_img_size=True) for one in ("mean", "mean_with_prompts")]
    for model in models:
        own, other = model.forward_features(pictures((12, 12))), model.forward_features(pictures((8, 20)))
        assert relative_error(model.forward_head(own), model(pictures((12, 12)))) <= 1e-12
        message = rf"features must have the {own.shape[1]} rows .* own size, got {other.shape[1]}: forward_hidden takes"
        with pytest.raises(ValueError, match=message):
            model.forward_head(other)
    model = prompted(tiny_vit((3, 3)), dynamic_img_size=True)  # the class row is the first at every size
    batch = pictures((8, 20))
    assert relative_error(model.forward_head(model.forward_features(batch)), model(batch)) <= 1e-12


@pytest.mark.parametrize("readout", ["mask", "mean"])
def test_what_looks_into_a_model_follows_the_size(readout: str) -> None:
    """Attention of the row that is read, and both paths of a profile."""
    backbone = tiny_beit((3, 3))
    model = prompted(backbone, readout=readout, dynamic_img_size=True)
    fixed, batch = made_at(backbone, (8, 20), model, readout=readout), pictures((8, 20))
    found, wanted = (inspect_tokens(one, batch[0]) for one in (model, fixed))
    assert found.attention.shape == (2, 2, 5) and relative_error(found.attention, wanted.attention) <= 1e-12
    assert found.shares == pytest.approx(wanted.shares, rel=1e-12)
    assert found.classes[0].probability == pytest.approx(wanted.classes[0].probability, rel=1e-12)
    weights = [readout_attention_weights(one, batch) for one in (model, fixed)]
    assert relative_error(*weights) <= 1e-12
    stages = [stages_of(one, batch, repeats=1) for one in (model, fixed)]
    assert [stage.flops for stage in stages[0]] == [stage.flops for stage in stages[1]]


@pytest.mark.parametrize("cache", [False, True])
def test_reformation_at_another_size(cache: bool) -> None:
    for backbone in (tiny_vit((3, 3)), tiny_beit((3, 3))):
        model = prompted(backbone, prompt_mode="progressive", dynamic_img_size=True)
        fixed = made_at(backbone, (8, 20), model, prompt_mode="progressive")
        for impl in ("torch", "reference"):
            model.impl = fixed.impl = impl
            found, wanted = (FeatureReformation(one, cache=cache)(pictures((8, 20))) for one in (model, fixed))
            assert all(relative_error(*pair) <= 1e-12 for pair in zip(found, wanted)), (type(backbone), impl)


def test_training_at_another_size_learns_what_a_model_made_at_it_learns() -> None:
    """Fails where a loader's pictures are refused, or a step runs on constants of the model's own size."""
    backbone = tiny_vit((3, 3), **VITS["DINOv3"])
    model = prompted(backbone, prompt_mode="deep", dynamic_img_size=True)
    fixed = made_at(backbone, (8, 20), model, prompt_mode="deep")
    images, labels = pictures((8, 20), 8), torch.arange(8) % 5
    train = DataLoader(TensorDataset(images, labels), batch_size=4)
    before = model(images)
    for one in (model, fixed):
        vptm.fit(one, train, epochs=2, lr=1e-2, seed=0)
    assert relative_error(model(images), fixed(images)) <= 1e-10 and relative_error(model(images), before) > 1e-3


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_triton_kernels_run_at_another_size() -> None:
    backbone = tiny_beit((3, 3), dim=32)
    model = prompted(backbone, prompt_mode="deep", dynamic_img_size=True)
    batch = pictures((8, 20))
    with torch.no_grad():
        expected = made_at(backbone, (8, 20), model, prompt_mode="deep")(batch)
        model.impl = "triton"
        assert relative_error(model(batch), expected) <= 1e-12


@torch.no_grad()
def test_constants_of_a_size_are_made_once_and_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made at the first pictures of a size, for the last eight sizes; edits, moves and loading make them again, and
    threads share them."""
    made: list[tuple[int, int]] = []
    own = prompted_model.at_size
    monkeypatch.setattr(prompted_model, "at_size", lambda module, size: made.append(size) or own(module, size))
    for backbone in (tiny_vit((3, 3)), tiny_vit((3, 3), **VITS["EVA-02"]), tiny_beit((3, 3))):
        model = prompted(backbone, prompt_mode="deep", dynamic_img_size=True)
        batch = pictures((8, 20))
        made.clear()
        first = model(batch)
        assert torch.equal(model(batch), first) and made == [(8, 20)]
        versions = [one._version for one in model.backbone.state_dict().values()]
        model.prompts.weight += 0.5
        model.impl = "reference"
        expected = model(batch)
        model.impl = "auto"
        made.clear()
        assert relative_error(model(batch), expected) <= 1e-12 and not made, "what is learned is no constant of a size"
        assert versions == [one._version for one in model.backbone.state_dict().values()]
        position = model.backbone.pos_embed
        edited = [model.backbone.blocks[1].attn.qkv.weight]
        edited += [position] if position is not None else [model.backbone.rel_pos_bias.relative_position_bias_table]
        for tensor in edited:
            tensor *= 1.5
            after = model(batch)
            model.impl = "reference"
            assert relative_error(after, model(batch)) <= 1e-12 and relative_error(after, expected) > 1e-4
            model.impl = "auto"
        made.clear()
        for height in range(4, 4 * 12, 4):
            model(pictures((height, 4)))
        assert len(model._encoder._sizes) == 8
        model(pictures((44, 4)))
        assert len(made) == 11, "the last sizes are kept"
        made.clear()
        model(batch)
        assert made == [(8, 20)], "the first ones are not"
        results: list[torch.Tensor] = []

        def run(model: Any = model, batch: Any = batch, results: Any = results) -> None:
            with torch.no_grad():
                results.append(model(batch))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4 and all(torch.equal(one, results[0]) for one in results)


@torch.no_grad()
@pytest.mark.parametrize("name", ["EVA-02", "DINOv3", "DINOv3 of any size", "learned angles", "MRope", "ViT"])
def test_another_size_writes_nothing_into_the_module_that_was_passed(name: str) -> None:
    """timm writes the frequencies of rotary positions where they are: in float32 those were the owner's own, and a
    sealed model took it for an edit. Sealed, a model goes on taking all sizes."""
    own = tiny_vit((3, 3), **VITS[name]).float()
    model = vptm.PromptedViT(own, 5, prompt_mode="deep", prompt_length=2, dynamic_img_size=True).eval()
    batches = [pictures(size).float() for size in ((12, 12), (8, 20), (12, 12))]
    before = [(tensor, tensor.clone(), tensor._version) for tensor in (*own.parameters(), *own.buffers())]
    expected = [model(batch) for batch in batches]
    assert all(torch.equal(tensor, value) and tensor._version == count for tensor, value, count in before)
    model.freeze_for_inference()
    for batch, scores in zip(batches, expected):
        assert relative_error(model(batch), scores) <= 1e-5


def test_absolute_positions_learn_through_their_resampling() -> None:
    """An unfrozen ViT at another size: the gradient of its own positions is that of the resampled ones, taken back."""
    backbone = tiny_vit((3, 3))
    model = prompted(backbone, dynamic_img_size=True)
    fixed = made_at(backbone, (8, 20), model).unfreeze().eval()
    model.unfreeze().eval()
    batch = pictures((8, 20))
    own, resized = model.backbone.pos_embed, fixed.backbone.pos_embed
    found, weight = torch.autograd.grad(model(batch).square().sum(), [own, model.backbone.blocks[0].attn.qkv.weight])
    wanted, other = torch.autograd.grad(
        fixed(batch).square().sum(), [resized, fixed.backbone.blocks[0].attn.qkv.weight]
    )
    back = torch.autograd.grad(resample_abs_pos_embed(own, [2, 5], [3, 3]), own, wanted)[0]
    assert relative_error(found, back) <= 1e-6 and relative_error(weight, other) <= 1e-10


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    plain, dynamic = build_vit(tiny_vit((3, 3))), build_vit(tiny_vit((3, 3)), dynamic_img_size=True)
    added = build_vit(tiny_vit((3, 3)), prompt_length=9, prompt_options={"placement": "add"}, dynamic_img_size=True)
    grid = build(tiny_beit((3, 3)), extra_bias="grid:2,2", dynamic_img_size=True)
    learns = build(tiny_beit((3, 3)), dynamic_img_size=True).unfreeze()
    batch = pictures((8, 20))
    for model, images, message in (
        (plain, batch, r"images must be \(B, 3, 12, 12\), got \(2, 3, 8, 20\)"),
        (dynamic, pictures((8, 18)), "must have a height and width that are multiples of the patch 4 x 4, got 8 x 18"),
        (dynamic, pictures((8, 20))[:, :2], r"images must be \(B, 3, 8, 20\), got \(2, 2, 8, 20\)"),
        (dynamic, batch[0], r"images must be \(B, 3, 12, 12\), got \(3, 8, 20\)"),
        (added, batch, "images of another size need prompts that are added to all patches alike, got 9"),
        (grid, batch, r"extra_bias grid position must lie in the 2x5 window, got 'grid:2,2'"),
        (learns, batch, "images of another size need frozen position tables, got some that learn"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            model(images)
        assert "\n" not in str(refusal.value)
    padded = tiny_vit((3, 3), dynamic_img_size=True, dynamic_img_pad=True)
    with pytest.raises(ValueError, match="needs timm's PatchEmbed of whole patches, this backbone has one that pads"):
        build_vit(padded, dynamic_img_size=True)
    with pytest.raises(TypeError, match="dynamic_img_size must be True or False, got 1"):
        build_vit(dynamic_img_size=1)
    bank = vptm.TaskBank(dynamic)
    bank.add("a", dynamic)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 12, 12\), got \(2, 3, 8, 20\)"):
        bank.predict(batch, ["a", "a"])
    compiled = torch.compile(dynamic, fullgraph=True, backend="eager")
    own = pictures((12, 12))
    with torch.no_grad():
        assert relative_error(compiled(own), dynamic(own)) <= 1e-12
        # torch 2.11 shows the parts of a message that is raised in a graph
        with pytest.raises(Exception, match=r"compiled or exported program must be of .*\(12, 12\)"):
            compiled(batch)
