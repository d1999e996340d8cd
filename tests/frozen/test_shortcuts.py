"""Where a shortcut of the encoder is exact, and that taking it where it is not would change the answer."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from beit_factory import tiny_beit
from tiny_models import build, build_vit, images, pictures, relative_error, tiny_vit
from torch import nn
from torch.nn import functional as F

import vptm
from vptm.frozen.fold import fold_block
from vptm.models.prompted_beit import PromptedBEiT


@pytest.mark.parametrize("readout", ["mask", "cls", "mean"])
@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
def test_more_prompts_than_tokens(prompt_mode: str, readout: str) -> None:
    """57 prompts beside 8 tokens: no width, padding or slice may depend on there being fewer."""
    model = build(prompt_mode=prompt_mode, readout=readout, prompt_length=57, extra_bias="neutral")
    for tensor, error in vptm.check(model, images(model)).items():
        assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), tensor


CHOICES = {
    "prompt_mode": ("shallow", "deep", "progressive"),
    "readout": ("mask", "cls", "mean"),
    "extra_bias": ("zero", "cls", "neutral", "grid:1,2", "learned"),
    "use_shared_rel_pos_bias": (True, False),
    "init_values": (0.1, None),
    "prompt_length": (0, 1, 10, 57),
}


def every_pair() -> list[dict[str, object]]:
    """Few combinations of `CHOICES` that hold every pair of values that can meet, taken greedily."""
    rows = [dict(zip(CHOICES, values)) for values in itertools.product(*CHOICES.values())]
    # the grid places the mask row
    rows = [row for row in rows if row["readout"] == "mask" or row["extra_bias"] != "grid:1,2"]
    pairs = [set(itertools.combinations(row.items(), 2)) for row in rows]
    missing, found = set().union(*pairs), []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        found.append(rows[best])
    return found


# Several processes share what takes minutes in the interpreter.
PARTS = [pytest.param("torch", part) for part in range(4)]
if importlib.util.find_spec("triton"):
    PARTS += [pytest.param("triton", part, marks=[pytest.mark.slow] if part else []) for part in range(4)]


@pytest.mark.parametrize("impl,part", PARTS)
def test_encoder_equals_reference_for_every_pair_of_options(impl: str, part: int) -> None:
    """Mode, read-out, bias mode, shared or per-block bias, LayerScale or none, and prompt count meet in pairs."""
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("float64 kernels run in Triton's interpreter, on a machine without a GPU")
    for options in every_pair()[part::4]:
        shared, init_values = options["use_shared_rel_pos_bias"], options["init_values"]
        # heads of 16 are the smallest that kernels take
        bias = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared}
        beit = tiny_beit(dim=32, depth=2 if impl == "triton" else 3, init_values=init_values, **bias)
        own = {name: value for name, value in options.items() if name not in ("use_shared_rel_pos_bias", "init_values")}
        # and the kernel of the token head needs it frozen
        model = build(beit, progressive_alpha=0.3, train_lm_head=impl == "torch", impl=impl, **own)
        for tensor, error in vptm.check(model, images(model)).items():
            assert error <= (1e-10 if tensor.startswith("grad") else 1e-12), (options, tensor, error)


@pytest.mark.parametrize(("alpha", "twin"), [(0.0, "deep"), (1.0, "shallow")])
@pytest.mark.parametrize("readout", ["cls", "mean"])
def test_progressive_ends_at_deep_and_shallow(alpha: float, twin: str, readout: str) -> None:
    """alpha = 0 is deep and alpha = 1 is shallow, on the folded path, which runs the three differently."""
    model = build(prompt_mode="progressive", progressive_alpha=alpha, readout=readout)
    other = build(prompt_mode=twin, readout=readout)
    learned = model.learned_state_dict()
    if twin == "shallow":
        learned["prompts.weight"] = learned["prompts.weight"][:1]
    other.load_learned_state_dict(learned)
    batch = images(model)
    assert relative_error(model(batch), other(batch)) <= 1e-12
    loss, expected = (m(batch).square().sum() for m in (model, other))
    found = torch.autograd.grad(loss, model.prompts.weight)[0]
    wanted = torch.autograd.grad(expected, other.prompts.weight)[0]
    assert relative_error(found[: len(wanted)], wanted) <= 1e-10


def test_pooling_before_a_norm_that_stands_before_pooling_would_differ() -> None:
    """A12 moves fc2 behind the mean. With the norm on every row before the mean that is not exact, and is not done."""
    model = build_vit(tiny_vit(global_pool="avg", fc_norm=False), readout="mean")
    assert isinstance(model.backbone.norm, nn.LayerNorm)
    batch = pictures(model)
    right = model.forward_hidden(batch)
    norm = model.backbone.norm
    model.backbone.norm = nn.Identity()  # pools first, as if there were none ...
    shortcut = norm(model.forward_hidden(batch))  # ... and normalises the mean
    assert relative_error(shortcut, right) > 1e-2


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep"])
def test_one_query_row_would_be_wrong_for_a_mean(prompt_mode: str) -> None:
    """A3 and A4 compute one row; the mean read-out needs all of them, and no row equals their mean."""
    model = build(prompt_mode=prompt_mode, readout="mean")
    batch = images(model)
    right = model.forward_hidden(batch)
    rows = [model._encoder.folded(model).row(model, batch, row) for row in range(1, 1 + model.num_patches)]
    assert min(relative_error(row, right) for row in rows) > 1e-2
    assert relative_error(torch.stack(rows).mean(0), right) <= 1e-12


@pytest.mark.parametrize("prompt_mode", ["shallow", "progressive"])
def test_prompt_rows_matter_until_the_last_block(prompt_mode: str) -> None:
    """Rows that are carried may be dropped in the last block alone: without them one block earlier the answer moves."""
    model = build(prompt_mode=prompt_mode, progressive_alpha=0.3, readout="cls")
    batch = images(model)
    right = model.forward_hidden(batch)
    folded, last = model._encoder.folded(model), len(model.backbone.blocks) - 1
    x, prefix = folded._run(model, batch, last, None)
    assert x.shape[1] == folded.num_tokens + model.prompts.length and prefix is None
    without = model.backbone.norm(folded._last_block(model, x[:, : folded.num_tokens], 0, last, None))
    assert relative_error(without, right) > 1e-3


def test_key_and_value_biases_fold_and_query_bias_does_not() -> None:
    """A5, value biases into the next linear, and the scale into the queries: exact. A query bias dropped like a key
    bias would change the scores."""
    vit = tiny_vit().double()
    block = vit.blocks[0]
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    right = block.attn(block.norm1(x))

    def run(qkv_bias: torch.Tensor) -> torch.Tensor:
        folded = fold_block(block, torch.float64)
        assert not folded.qkv_bias[16:].any() and folded.qkv_bias[:16].all()
        qkv = F.linear(F.layer_norm(x, (16,), eps=folded.eps_1), folded.qkv_weight, qkv_bias)
        query, key, value = qkv.unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).flatten(2)
        return F.linear(mixed, folded.proj_weight, folded.proj_bias)

    bias = fold_block(block, torch.float64).qkv_bias
    assert relative_error(run(bias), right) <= 1e-12
    assert relative_error(run(torch.zeros_like(bias)), right) > 1e-3


def test_layer_scale_folded_in_fp16_would_lose_it() -> None:
    """gamma = 1e-5 times a weight is subnormal in fp16: folded it would err several times as much as kept apart."""
    beit = tiny_beit(dim=32)
    block = beit.blocks[0]
    block.gamma_2.data.fill_(1e-5)
    exact = block.gamma_2.double()[:, None] * block.mlp.fc2.weight.double()
    folded = exact.half().double()
    apart = fold_block(block, torch.float16)
    kept = apart.scale_2.double()[:, None] * apart.fc2_weight.double()
    assert (folded - exact).norm() > 5 * (kept - exact).norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_length": -1}, "prompt_length must be an integer >= 0, got -1"),
        (
            {"prompt_mode": "deepest"},
            "prompt_mode must be one of shallow, deep, progressive, got 'deepest', did you mean",
        ),
        ({"readout": "clas"}, "readout must be one of mask, cls, mean, got 'clas', did you mean 'cls'"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, torch, reference, got 'cuda'"),
    ],
)
def test_bad_arguments_get_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        PromptedBEiT("builtin", 3, **arguments)
    assert "\n" not in str(refusal.value)


def test_unsupported_backbones_are_named() -> None:
    with pytest.raises(ValueError, match="PromptedBEiT runs timm's Beit class, vit_tiny_patch16_224 is a VisionTransf"):
        PromptedBEiT("vit_tiny_patch16_224", 3)
    with pytest.raises(TypeError, match="PromptedBEiT runs timm's Beit class, the given module is a VisionTransformer"):
        PromptedBEiT(tiny_vit(), 3)


def test_bad_images_get_one_line() -> None:
    """Size, channels, dtype and device of images are compared with the model before anything runs."""
    model = build()
    for shape in ((1, 3, 8, 8), (1, 4, 8, 12), (3, 8, 12)):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 12\), got "):
            model(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"images must have the dtype of the model, torch\.float64, got torch\.float32"):
        model(torch.zeros(1, 3, 8, 12))
    with pytest.raises(TypeError, match="images must be a tensor, got list"):
        model([torch.zeros(3, 8, 12)])
    with pytest.raises(ValueError, match="images must be on the device of the model, cpu, got meta"):
        model.forward_features(torch.zeros(1, 3, 8, 12, dtype=torch.float64, device="meta"))
