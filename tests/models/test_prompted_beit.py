"""PromptedBEiT against an independent implementation, timm, and its own contract."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from beit_factory import tiny_beit
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_prompted_beit import naive_hidden, naive_logits
from tiny_models import build, images, relative_error

import vptm
import vptm_kernels
from vptm import PromptedBEiT
from vptm.frozen.encoder import FrozenEncoder
from vptm.models import adapter_saving
from vptm.models.prompted_beit import PROMPT_LOCATIONS
from vptm.models.verbalizers import TOKEN_ACTIVATIONS

BIASES = ("zero", "cls", "neutral", "grid:1,2", "learned")


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
@pytest.mark.parametrize("readout", ["mask", "cls", "mean"])
def test_reference_equals_naive_model(prompt_mode: str, readout: str) -> None:
    """A wrong row order, bias entry, prompt rule or read-out row anywhere in the reference fails here."""
    for extra_bias, mask_mode in itertools.product(BIASES, ("insert", "replace")):
        if readout != "mask" and (extra_bias.startswith("grid") or mask_mode == "replace"):
            continue
        model = build(
            prompt_mode=prompt_mode,
            readout=readout,
            extra_bias=extra_bias,
            mask_mode=mask_mode,
            progressive_alpha=0.3,
            impl="reference",
        )
        batch = images(model)
        hidden = model.forward_head(model.forward_features(batch), pre_logits=True)
        expected = torch.stack([naive_hidden(model, image) for image in batch])
        assert relative_error(hidden, expected) <= 1e-12, (extra_bias, mask_mode)
        logits = torch.stack([naive_logits(model, row) for row in expected])
        assert relative_error(model(batch), logits) <= 1e-11, (extra_bias, mask_mode)


@pytest.mark.parametrize("prompt_mode", ["shallow", "deep", "progressive"])
@pytest.mark.parametrize("scale_mlp", [False, True])
def test_swiglu_folds_and_equals_the_naive_model(scale_mlp: bool, prompt_mode: str) -> None:
    """Gates and values as one linear, and a norm after them: fails where they change places or the norm is left."""
    for readout in ("mask", "cls", "mean"):
        beit = tiny_beit(swiglu_mlp=True, scale_mlp=scale_mlp)
        model = build(beit, prompt_mode=prompt_mode, readout=readout, progressive_alpha=0.3)
        assert FrozenEncoder.supports(model)
        batch = images(model)
        expected = torch.stack([naive_hidden(model, image) for image in batch])
        assert relative_error(model.forward_hidden(batch), expected) <= 1e-12, readout
        sealed = copy.deepcopy(model).freeze_for_inference()
        assert relative_error(sealed(batch), model(batch)) <= 1e-12


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param({"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True}, id="per-block bias"),
        pytest.param({"use_rel_pos_bias": True}, id="shared and per-block bias"),
        pytest.param({"use_abs_pos_emb": True}, id="shared bias and absolute positions"),
        pytest.param({"init_values": None}, id="no LayerScale"),
        pytest.param({"global_pool": "avg"}, id="norm after pooling"),
    ],
)
@pytest.mark.parametrize("readout", ["mask", "cls", "mean"])
def test_backbone_variants_equal_naive_model(backbone: dict, readout: str) -> None:
    """Each kind of backbone BEiT files come as: a table that is not added, or a norm in the wrong place, fails here."""
    model = build(tiny_beit(**backbone), readout=readout, prompt_mode="progressive", extra_bias="neutral")
    batch = images(model, 1)
    hidden = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert relative_error(hidden[0], naive_hidden(model, batch[0])) <= 1e-12


def test_absolute_positions_reach_a_mask_on_the_grid_only() -> None:
    """With absolute positions, "grid:y,x" gives the inserted mask row the embedding of that place, other modes give it
    none."""
    for extra_bias in ("zero", "learned", "grid:1,0"):
        beit = tiny_beit(use_abs_pos_emb=True, use_shared_rel_pos_bias=False)
        model = build(beit, extra_bias=extra_bias)
        batch = images(model, 1)
        hidden = model.forward_head(model.forward_features(batch), pre_logits=True)
        assert model.backbone.rel_pos_bias is None
        assert relative_error(hidden[0], naive_hidden(model, batch[0])) <= 1e-12, extra_bias


@pytest.mark.parametrize("activation", TOKEN_ACTIVATIONS)
@pytest.mark.parametrize("projection_bias", [False, True])
def test_verbalizer_reads_what_it_says(activation: str, projection_bias: bool) -> None:
    """Each token activation against plain formulas; a missing softmax or head bias fails here."""
    model = build(token_activation=activation, projection_bias=projection_bias, temperature=0.07)
    batch = images(model)
    hidden = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert relative_error(model(batch), torch.stack([naive_logits(model, row) for row in hidden])) <= 1e-12


@given(
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    length=st.integers(0, 5),
    depth=st.integers(1, 3),
    mode=st.sampled_from(["shallow", "deep", "progressive"]),
    location=st.sampled_from(PROMPT_LOCATIONS),
    extra_bias=st.sampled_from(["zero", "cls", "neutral", "learned", "grid"]),
    mask_mode=st.sampled_from(["insert", "replace"]),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_random_shapes_equal_naive_model(
    window: tuple[int, int],
    length: int,
    depth: int,
    mode: str,
    location: str,
    extra_bias: str,
    mask_mode: str,
    alpha: float,
    seed: int,
) -> None:
    """Random windows, prompt counts and switches together: an index that only fits the chosen shapes fails here."""
    if extra_bias == "grid":
        extra_bias = f"grid:{seed % window[0]},{seed % window[1]}"
    model = build(
        tiny_beit(window, depth=depth, seed=seed),
        seed=seed,
        prompt_length=length,
        prompt_mode=mode,
        extra_bias=extra_bias,
        mask_mode=mask_mode,
        progressive_alpha=alpha,
    )
    batch = images(model, 1)
    hidden = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert relative_error(hidden[0], naive_hidden(model, batch[0], location=location)) <= 1e-12


@pytest.mark.parametrize("window", [(3, 3), (2, 5)], ids=["square", "rectangular"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-block"])
def test_without_prompts_features_are_timms(window: tuple[int, int], shared: bool) -> None:
    """prompt_length=0 and the CLS read-out is timm's own model; a changed backbone forward fails here."""
    beit = tiny_beit(window, use_shared_rel_pos_bias=shared, use_rel_pos_bias=not shared).double()
    batch = torch.randn(2, 3, *beit.patch_embed.img_size, dtype=torch.float64)
    expected = beit.forward_features(batch)
    for impl in ("auto", "reference"):
        model = build(copy.deepcopy(beit), prompt_length=0, readout="cls", token_activation="hidden", impl=impl)
        assert relative_error(model.forward_features(batch), expected) <= 1e-12


@pytest.mark.parametrize("use_abs_pos_emb", [False, True])
def test_the_place_of_prompts_cannot_matter(use_abs_pos_emb: bool) -> None:
    """Attention is permutation-equivariant, bias and positions go with the rows. `prompt_location` is accepted, with
    one line, and leaves no trace in what an adapter keeps; those of older versions name it."""
    beit = tiny_beit(use_abs_pos_emb=use_abs_pos_emb)
    model = build(beit, prompt_mode="deep", extra_bias="cls")
    batch = images(model)
    found = torch.stack([naive_hidden(model, batch[0], location=location) for location in PROMPT_LOCATIONS])
    assert relative_error(found, model.forward_hidden(batch)[:1].expand_as(found)) <= 1e-12
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", DeprecationWarning)
        located = PromptedBEiT(beit, **model.config, prompt_location="end")
    deprecated = [str(warning.message) for warning in told if warning.category is DeprecationWarning]
    assert len(deprecated) == 1 and "prompt_location is ignored" in deprecated[0] and located.config == model.config
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", DeprecationWarning)
        older = adapter_saving.build(PromptedBEiT, beit, {**model.config, "prompt_location": "end"})
    assert older.config == model.config and not any(warning.category is DeprecationWarning for warning in told)


def test_progressive_ends_are_deep_and_shallow() -> None:
    """alpha=0 is VPT-deep and alpha=1 is VPT-shallow; a mixing weight on the wrong side fails here."""
    deep, shallow = build(prompt_mode="deep"), build(prompt_mode="shallow")
    shallow.prompts.weight.data.copy_(deep.prompts.weight[:1])
    batch = images(deep)
    for alpha, target in ((0.0, deep), (1.0, shallow)):
        progressive = build(prompt_mode="progressive", progressive_alpha=alpha)
        progressive.load_learned_state_dict(
            {**target.learned_state_dict(), "prompts.weight": deep.prompts.weight.detach()}
        )
        assert relative_error(progressive(batch), target(batch)) <= 1e-12
    assert relative_error(deep(batch), shallow(batch)) > 1e-3


def test_prompts_mask_and_bias_change_the_output() -> None:
    """Guards the tests above: each learned or chosen piece must reach the class scores at all."""
    model = build(extra_bias="learned")
    batch = images(model)
    before = model(batch)
    for parameter in (model.prompts.weight, model.mask_token, model.prompt_bias, model.lm_head.bias):
        kept = parameter.detach().clone()
        parameter.data.add_(torch.randn_like(parameter))  # a constant would vanish in LayerNorm
        assert relative_error(model(batch), before) > 1e-4
        parameter.data.copy_(kept)
    assert relative_error(build(extra_bias="cls")(batch), build(extra_bias="zero")(batch)) > 1e-4


def test_check_reports_rounding_and_catches_a_wrong_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vptm.check` is small on a right path, covers gradients, and sees a path that is wrong."""
    model = build(extra_bias="learned").train()
    batch = images(model)
    errors = vptm.check(model, batch)
    gradients = {f"grad {name}" for name in model.learned_state_dict()}
    assert set(errors) == {
        "features",
        "hidden",
        "token_logits",
        "logits",
        "logits sealed",
        "logits in training",
        *gradients,
    }
    assert max(errors.values()) <= 1e-10
    assert model.training and model.impl == "auto"
    attention = vptm_kernels.prompted_attention
    monkeypatch.setattr(
        "vptm.frozen.folded.prompted_attention", lambda *args, **kwargs: 1.1 * attention(*args, **kwargs)
    )
    assert vptm.check(model, batch)["logits"] > 1e-3


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_only_prompts_and_verbalizer_learn(impl: str) -> None:
    """A frozen weight that gets a gradient, or a learned one that does not, fails here."""
    model = build(impl=impl).train()
    model(images(model)).square().sum().backward()
    learned = {"prompts.weight", "verbalizer.projection.weight", "verbalizer.prototypes", "verbalizer.log_temperature"}
    assert set(model.learned_state_dict()) == learned
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == (name in learned), name
    assert not model.backbone.training and model.verbalizer.training
    assert sum(p.numel() for p in model.trainable_parameters()) == 3 * 16 + 6 * 11 + 5 * 6 + 1


def test_train_switches_add_to_what_is_learned() -> None:
    """train_mask_token, train_lm_head and unfreeze open exactly what they name."""
    model = build(train_mask_token=True, train_lm_head=True, temperature=0.2, extra_bias="learned")
    assert {"mask_token", "lm_head.weight", "lm_head.bias", "prompt_bias"} <= set(model.learned_state_dict())
    assert "verbalizer.log_temperature" not in model.learned_state_dict()
    model.unfreeze().train()
    assert model.backbone.training
    assert all(p.requires_grad for p in model.backbone.parameters())


def test_prompt_dropout_is_per_sample_and_only_in_training() -> None:
    """VPT drops prompts after expanding to the batch: equal images differ in training, and agree in eval."""
    model = build(prompt_dropout=0.5, prompt_mode="deep")
    batch = images(model, 1).expand(2, -1, -1, -1)
    first, second = model(batch)
    assert relative_error(first, second) <= 1e-14  # a BLAS may round rows of one product differently
    model.train()
    torch.manual_seed(0)
    first, second = model(batch)
    assert not torch.allclose(first, second)


def test_learned_state_round_trips_and_refuses_strangers() -> None:
    """A learned tensor that is missing, unknown, misshapen or not finite is refused before anything is copied."""
    source, target = build(seed=1), build(seed=2)
    batch = images(source)
    state = {name: tensor.clone() for name, tensor in source.learned_state_dict().items()}
    target.mask_token.data.copy_(source.mask_token)
    target.lm_head.load_state_dict(source.lm_head.state_dict())
    target.load_learned_state_dict(state)
    assert torch.equal(source(batch), target(batch))
    before = target.prompts.weight.clone()
    for change, message in [
        ({"prompts.weight": None}, "missing \\['prompts.weight'\\]"),
        ({"stranger": torch.zeros(1)}, "unknown \\['stranger'\\]"),
        ({"prompts.weight": torch.zeros(1, 4, 16)}, "prompts.weight must have shape .1, 3, 16., got .1, 4, 16."),
        ({"prompts.weight": torch.full((1, 3, 16), torch.nan)}, "prompts.weight must be finite"),
    ]:
        broken = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            target.load_learned_state_dict(broken)
    assert torch.equal(target.prompts.weight, before)


def test_predict_tokens_is_the_head_on_the_readout_row() -> None:
    """(B, V) visual-token logits at the mask."""
    model = build()
    batch = images(model)
    hidden = model.forward_head(model.forward_features(batch), pre_logits=True)
    expected = hidden @ model.lm_head.weight.T + model.lm_head.bias
    assert relative_error(model.predict_tokens(batch), expected) <= 1e-12


def test_reset_classifier_makes_a_fresh_verbalizer() -> None:
    """timm's name for changing the number of classes."""
    model = build()
    model.reset_classifier(3)
    assert model(images(model)).shape == (2, 3) and model.config["num_classes"] == 3
    assert model.get_classifier() is model.verbalizer
    with pytest.raises(ValueError, match="global_pool must be None"):
        model.reset_classifier(3, "avg")


def test_timm_optimizer_hooks() -> None:
    """timm's optimiser factory takes the model: exempt names exist, and layer decay puts every parameter in one
    group."""
    model = build(train_mask_token=True, extra_bias="learned")
    names = {name for name, _ in model.named_parameters()}
    assert {"prompts.weight", "mask_token", "backbone.cls_token"} <= model.no_weight_decay() & names
    from timm.models import group_parameters

    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == names
    assert groups["prompts.weight"] == groups["mask_token"] == groups["backbone.cls_token"] == 0
    assert groups["verbalizer.prototypes"] == max(groups.values()) > groups["backbone.blocks.2.norm1.weight"]


def test_linear_verbalizer_is_vpt() -> None:
    """CLS row, hidden state and a linear head: the VPT baseline needs no mask token or token head."""
    model = build(readout="cls", verbalizer="linear", token_activation="hidden", prompt_mode="deep")
    assert model.mask_token is None and model.lm_head is None
    batch = images(model)
    hidden = model.forward_head(model.forward_features(batch), pre_logits=True)
    expected = hidden @ model.verbalizer.head.weight.T + model.verbalizer.head.bias
    assert relative_error(model(batch), expected) <= 1e-12
    with pytest.raises(ValueError, match="predict_tokens needs a visual-token head"):
        model.predict_tokens(batch)


def test_without_projection_prototypes_live_in_token_space() -> None:
    """prototype_dim=None: cosine of the token logits themselves."""
    model = build(prototype_dim=None, temperature=1.0)
    tokens = model.predict_tokens(images(model))
    expected = torch.nn.functional.cosine_similarity(tokens[:, None], model.verbalizer.prototypes[None], dim=-1)
    assert relative_error(model(images(model)), expected) <= 1e-12


def test_prompt_initialisation_bound() -> None:
    """VPT's uniform bound sqrt(6 / (3 * 16 * 16 + 768)) = 0.0625 for BEiT-B/16."""
    bank = vptm.PromptBank(2, 500, 768, mode="deep", patch_values=3 * 16 * 16)
    assert 0.0624 < bank.weight.abs().max().item() <= 0.0625
    assert abs(bank.weight.mean().item()) < 1e-3


def test_timm_registry_builds_the_model() -> None:
    """`timm.create_model` knows the name once vptm is imported, and passes our arguments on."""
    with pytest.warns(UserWarning, match="beitv2_base_patch16_224_pt1k.pth"):
        model = timm.create_model(
            "vptm_beitv2_base_patch16_224", num_classes=7, vocab_size=32, prompt_length=1, img_size=32
        )
    assert isinstance(model, PromptedBEiT) and model.num_classes == 7
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_pretrained_weights_without_mask_or_head_are_refused(tmp_path) -> None:
    """Trained weights that cannot do the chosen read-out are refused by name instead of getting random pieces."""
    beit = tiny_beit((3, 3))
    path = tmp_path / "classifier.pth"
    torch.save({"model": beit.state_dict()}, path)
    with pytest.raises(ValueError, match=r"needs a mask token.*beitv2_base_patch16_224_pt1k.pth.*microsoft/beit-base"):
        PromptedBEiT(path, 5)
    with pytest.raises(ValueError, match=r"needs a visual-token head.*beitv2_base_patch16_224_pt1k.pth"):
        PromptedBEiT(path, 5, readout="cls")
    PromptedBEiT(path, 5, readout="cls", token_activation="hidden")


@pytest.mark.parametrize("arguments", [{}, {"readout": "cls"}], ids=["mask token", "visual-token head"])
def test_timms_pretrained_weights_are_refused_before_any_download(arguments: dict) -> None:
    """timm has classification weights only: with a token read-out they cannot work, and must not be downloaded."""
    with pytest.raises(ValueError, match=r"timm's weights of beitv2_base_patch16_224 have none: expected .*pt1k.pth"):
        PromptedBEiT("beitv2_base_patch16_224", 5, pretrained=True, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_mode": "middle"}, "prompt_mode must be one of shallow, deep, progressive, got 'middle'"),
        ({"prompt_location": "front"}, "prompt_location must be one of .*, got 'front'"),
        ({"prompt_length": -1}, "prompt_length must be an integer >= 0, got -1"),
        ({"prompt_length": 2.0}, "prompt_length must be an integer >= 0, got 2.0"),
        ({"prompt_dropout": 1.0}, "prompt_dropout must be in \\[0, 1\\), got 1.0"),
        ({"progressive_alpha": 1.5}, "progressive_alpha must be in \\[0, 1\\], got 1.5"),
        ({"readout": "max"}, "readout must be one of mask, cls, mean, got 'max'"),
        ({"mask_mode": "swap"}, "mask_mode must be one of insert, replace, got 'swap'"),
        ({"verbalizer": "mlp"}, "verbalizer must be one of prototypical, linear, class_embeddings, got 'mlp'"),
        ({"token_activation": "relu"}, "token_activation must be one of .*, got 'relu'"),
        ({"prototype_dim": 0}, "prototype_dim must be an integer >= 1 or None, got 0"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, or None to learn it, got 0.0"),
        ({"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be an integer >= 1, got 0"),
        ({"extra_bias": "random"}, "extra_bias must be one of .*, got 'random'"),
        ({"extra_bias": "grid:2,0"}, "must lie in the 2x3 window, got 'grid:2,0'"),
        ({"extra_bias": "grid:0,0", "readout": "cls"}, "needs readout='mask', got readout='cls'"),
        ({"train_mask_token": True, "readout": "cls"}, "train_mask_token=True needs readout='mask'"),
        ({"train_lm_head": True, "token_activation": "hidden"}, "train_lm_head=True needs a token_activation"),
        ({"prompt_mode": "deap"}, "did you mean 'deep'"),
        ({"token_activation": "logit"}, "did you mean 'logits'"),
        ({"extra_bias": "nutral"}, "did you mean 'neutral'"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, torch, reference, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    """One line that names the argument, what was required and what was given."""
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"temperature": "a"}, {"prompt_dropout": "a"}, {"progressive_alpha": "a"}, {"train_mask_token": "no"}]
)
def test_values_of_another_type_are_named(arguments: dict) -> None:
    """A string where a number belongs is refused by the argument's name, not by what Python trips over first."""
    with pytest.raises(TypeError, match=rf"{next(iter(arguments))} must be (a number|True or False), got "):
        build(**arguments)


def test_an_instance_is_named_not_printed() -> None:
    """The refusal of a trained instance without a mask token is one line."""
    with pytest.raises(ValueError, match="timm Beit instance has none") as refusal:
        PromptedBEiT(tiny_beit(), 5, pretrained=True)
    assert "\n" not in str(refusal.value)


def test_bias_modes_that_read_a_table_need_one() -> None:
    """ "cls" and "neutral" on a backbone with absolute positions only would silently add nothing."""
    for mode in ("cls", "neutral"):
        with pytest.raises(ValueError, match="reads a relative position bias table, this backbone has none"):
            build(tiny_beit(use_abs_pos_emb=True, use_shared_rel_pos_bias=False), extra_bias=mode)


def test_bad_images_are_named() -> None:
    """Wrong size, channels or dtype is refused before the patch embedding sees it."""
    model = build()
    for shape in [(2, 3, 8, 8), (2, 1, 8, 12), (3, 8, 12)]:
        with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 12\), got "):
            model(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(TypeError, match="images must be floating point"):
        model(torch.zeros(2, 3, 8, 12, dtype=torch.uint8))


def test_import_is_light() -> None:
    """`import vptm` must not pull in torch, so that the command line answers at once."""
    code = "import sys, vptm; assert not {'torch', 'timm'} & set(sys.modules); assert 'fit' in dir(vptm)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'stranger'"):
        vptm.stranger  # noqa: B018
