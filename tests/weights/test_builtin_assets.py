"""The shipped weights and images, and the pieces of the script that made them."""

import hashlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models.beit import Beit

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "vptm" / "assets"
WEIGHTS = ASSETS / "builtin.safetensors"
PREFIX = 5  # bytes of sha256: 2460 shipped against 55000 trained on, a chance hit has probability 1e-4


def load_script():
    spec = importlib.util.spec_from_file_location("pretrain_builtin", ROOT / "tools" / "pretrain_builtin.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def subset():
    with np.load(ASSETS / "fashion_mnist_subset.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights():
    with safe_open(WEIGHTS, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def fake_fashion(train=600, test=40, seed=0):
    """Images of a few random bright rectangles: enough structure for k-means, no data package needed."""
    rng = np.random.default_rng(seed)
    images = np.zeros((train + test, 28, 28), np.uint8)
    for image in images:
        for _ in range(3):
            y, x = rng.integers(0, 20, 2)
            image[y : y + rng.integers(4, 9), x : x + rng.integers(4, 9)] = rng.integers(40, 256)
    labels = np.arange(train + test).astype(np.uint8) % 10
    return {
        "train_images": images[:train],
        "train_labels": labels[:train],
        "test_images": images[train:],
        "test_labels": labels[train:],
    }


TINY = replace(
    script.Recipe(),
    **{"dim": 32, "depth": 2, "heads": 2, "codes": (12, 6, 5), "teacher_layer": 1, "code_dim": 6, "steps": (20, 20)},
    **{"batch": 32, "warmup": 4, "kmeans_images": 200, "precision": "fp32", "softness": 0.05},
)


def tiny_tokenizer(images, recipe=TINY):
    features = script.orientation_features(images, recipe.patch)
    return script.fit_tokenizer(features, recipe, None)[0]


def test_weights_are_small_half_precision_and_finite(weights):
    """Breaks when the wheel grows past its budget or a diverged run is shipped."""
    _, tensors = weights
    assert WEIGHTS.stat().st_size <= 6_000_000
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float16, name
        assert torch.isfinite(tensor).all(), name
        assert tensor.float().abs().max() > 0, name


def test_weights_metadata_rebuilds_the_timm_model_exactly(weights):
    """Breaks when the metadata and the tensors disagree: a missing, an extra or a misshapen tensor."""
    metadata, tensors = weights
    assert metadata["format"] == "vptm"
    about = json.loads(metadata["vptm"])
    for key in ("architecture", "eps", "vocab_size", "mean", "std", "interpolation", "crop_pct", "description"):
        assert key in about
    assert about["eps"] == 1e-6
    assert len(about["mean"]) == len(about["std"]) == about["architecture"]["in_chans"] == 1
    assert "28x28 grey clothing pictures, a demonstration" in about["description"]
    dim = about["architecture"]["embed_dim"]
    assert dim <= 192 and about["architecture"]["depth"] <= 6
    own = {name: tensors[name] for name in ("mask_token", "lm_head.weight", "lm_head.bias")}
    assert own["mask_token"].shape == (1, 1, dim)
    assert own["lm_head.weight"].shape == (about["vocab_size"], dim)
    assert own["lm_head.bias"].shape == (about["vocab_size"],)
    backbone = Beit(**about["architecture"], num_classes=0, global_pool="token")
    backbone.load_state_dict({n: t.float() for n, t in tensors.items() if n not in own}, strict=True)


def test_script_and_timm_compute_the_same_rows(weights):
    """Breaks when the script trains another function than the one timm runs with these weights."""
    model, _ = script.load_weights(WEIGHTS)
    net = model.backbone
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = net.patch_embed(images)
        x = torch.cat([net.cls_token.expand(3, -1, -1), x, model.mask_token.expand(3, -1, -1)], 1)
        size = x.shape[1] - 1
        bias = F.pad(net.rel_pos_bias().view(1, -1, size, size), (0, 1, 0, 1))
        for block in net.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        torch.testing.assert_close(model.rows(images), net.norm(x), atol=2e-5, rtol=1e-5)
        middle = model.rows(images, layer=1)
        assert not torch.allclose(middle, model.rows(images), atol=0.1)


def test_the_pretrained_mask_row_is_the_row_that_prompted_beit_reads(subset):
    """Breaks when PromptedBEiT inserts its mask row with another position bias than the one that was pre-trained."""
    vptm = pytest.importorskip("vptm")
    images = script.normalise(torch.from_numpy(subset["test_images"][::300].copy()))
    prompted = vptm.PromptedBEiT("builtin", num_classes=10, prompt_length=0).eval()
    model, _ = script.load_weights(WEIGHTS)
    with torch.no_grad():
        expected = model.logits(model.rows(images)[:, -1])
        torch.testing.assert_close(prompted.predict_tokens(images), expected, atol=2e-4, rtol=1e-4)


def test_a_hidden_patch_changes_the_weights_answer(subset):
    """Breaks when the shipped model ignores its input: masked-token logits must depend on the visible patches."""
    model, _ = script.load_weights(WEIGHTS)
    images = script.normalise(torch.from_numpy(subset["test_images"][[0, 1000]].copy()))
    masked = torch.zeros(2, (28 // model.backbone.patch_embed.patch_size[0]) ** 2, dtype=torch.bool)
    masked[:, 5] = True
    with torch.no_grad():
        logits = model.logits(model.rows(images, masked)[:, 1 + 5])
    assert (logits[0] - logits[1]).abs().max() > 0.5


def test_subset_is_small_balanced_and_named(subset):
    """Breaks when the default data set loses a class, its balance or its size budget."""
    assert (ASSETS / "fashion_mnist_subset.npz").stat().st_size <= 1_200_000
    assert tuple(subset["classes"]) == script.CLASSES
    for name, per_class in (("train", 64), ("val", 32), ("test", 150)):
        images, labels = subset[f"{name}_images"], subset[f"{name}_labels"]
        assert images.dtype == np.uint8 and images.shape == (10 * per_class, 28, 28)
        assert np.bincount(labels, minlength=10).tolist() == [per_class] * 10
        assert images.std() > 50


def test_no_test_image_was_trained_on_or_appears_twice(subset):
    """Breaks when a shipped test image leaks into pre-training, or an image stands in two splits."""
    hashes = {
        n: {hashlib.sha256(i.tobytes()).digest() for i in subset[f"{n}_images"]} for n in ("train", "val", "test")
    }
    assert sum(map(len, hashes.values())) == sum(len(subset[f"{n}_images"]) for n in hashes)
    assert not hashes["train"] & hashes["val"] and not (hashes["train"] | hashes["val"]) & hashes["test"]
    path = ROOT / "tests" / "weights" / "pretraining_hashes.bin"
    assert path.stat().st_size <= 350_000
    raw = path.read_bytes()
    pretraining = [raw[i : i + PREFIX] for i in range(0, len(raw), PREFIX)]
    assert len(raw) % PREFIX == 0 and pretraining == sorted(set(pretraining)) and len(pretraining) >= 50_000
    known = set(pretraining)
    assert not known & {digest[:PREFIX] for digest in hashes["test"]}
    # the list is of the right images: most of the subset's own training images come from the same 60000
    assert len(known & {digest[:PREFIX] for digest in hashes["train"]}) > 0.8 * len(hashes["train"])


def test_licence_and_card_are_shipped():
    """Breaks when the data are shipped without their MIT text or the weights without their limits."""
    licence = (ASSETS / "FASHION_MNIST_LICENSE").read_text()
    assert "MIT License" in licence and "Zalando SE" in licence
    card = (ASSETS / "builtin.md").read_text()
    assert "built for 28x28 grey clothing pictures, a demonstration" in card
    assert (ASSETS / "builtin_masks.png").stat().st_size <= 200_000


def test_missing_data_names_the_package_and_returns_1(tmp_path, capsys):
    """Breaks when a user without the data package is not told how to get it."""
    assert script.main(["proxy", str(WEIGHTS), "--data", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "apt install dataset-fashion-mnist" in message and str(tmp_path) in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patch", 5),
        ("heads", 5),
        ("teacher_layer", 9),
        ("precision", "fp8"),
        ("bag_of", "words"),
        ("mask_ratio", 0.0),
        ("mask_ratio", 1.5),
        ("unmasked", 1.0),
        ("steps", (0, 3)),
        ("steps", (-5, 0)),
        ("codes", (0, 6, 5)),
        ("batch", 0),
        ("lr", float("nan")),
        ("softness", 0.0),
        ("ema", 1.0),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_by_name(name, value):
    """Breaks when a bad argument surfaces as a shape error an hour into the run."""
    with pytest.raises(ValueError, match=f"^{name}: "):
        replace(script.Recipe(), **{name: value})


def test_subset_and_pretraining_split_leave_copies_out():
    """Breaks when a copy of a test image, or of a held-out one, can be trained on."""
    data = {name: array.copy() for name, array in fake_fashion(600, 40).items()}
    data["train_images"][:20] = data["test_images"][:20]
    _, held = script.pretraining_split(data)
    free = np.setdiff1d(np.arange(20, 600), held)[:10]
    data["train_images"][free] = data["train_images"][held[held >= 20][:10]]
    chosen, held = script.pretraining_split(data)
    assert not set(chosen) & set(range(20)) and not set(chosen) & set(free) and not set(chosen) & set(held)
    assert len(chosen) > 400
    few = script.make_subset(data, train=8, val=4, test=4)
    every = [i.tobytes() for n in ("train", "val", "test") for i in few[f"{n}_images"]]
    assert len(every) == len(set(every)) == 160
    again = script.make_subset(data, train=8, val=4, test=4)
    assert all((few[name] == again[name]).all() for name in few)


@pytest.mark.parametrize("grid", [4, 7])
def test_masks_hide_the_exact_share_in_blocks(grid):
    """Breaks when the masking ratio drifts, or masks fall apart into single patches."""
    count = round(0.4 * grid * grid)
    rng = np.random.default_rng(0)

    def neighbours(mask):
        mask = mask.reshape(grid, grid)
        return (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()

    blocks = [script.block_mask(grid, count, rng) for _ in range(300)]
    assert {int(mask.sum()) for mask in blocks} == {count}
    assert np.mean(blocks, 0).min() > 0.1, "some patch is hardly ever hidden"
    single = [rng.permutation(np.arange(grid * grid) < count) for _ in range(300)]
    assert np.mean([neighbours(m) for m in blocks]) > 1.3 * np.mean([neighbours(m) for m in single])


def test_augmentation_moves_and_flips_whole_images():
    """Breaks when pixels are lost inside the frame or an image is mixed with another."""
    images = torch.zeros(64, 28, 28, dtype=torch.uint8)
    images[:, 10, 8] = torch.arange(1, 65, dtype=torch.uint8)
    moved = script.augment(images, 2, torch.Generator().manual_seed(0))
    assert torch.equal(moved.flatten(1).sum(1), images.flatten(1).sum(1))
    places = {tuple(p) for p in moved.nonzero()[:, 1:].tolist()}
    assert {y for y, _ in places} == set(range(8, 13))
    assert {x for _, x in places} == set(range(6, 11)) | set(range(17, 22))


def test_tokenizer_is_deterministic_and_its_bag_is_a_distribution_over_all_scales():
    """Breaks when two runs of one seed get two codebooks, or the bag stops being a distribution with equal scales."""
    images = torch.from_numpy(fake_fashion()["train_images"])
    features = script.orientation_features(images, TINY.patch)
    assert features.shape == (600, 4, 4, 36) and torch.isfinite(features).all()
    (a, dead), (b, _) = (script.fit_tokenizer(features, TINY, None) for _ in range(2))
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)
    assert a.sizes == [12, 6, 5] and a.vocab_size == 23 and len(dead) == 3
    codes, bag = a.patch_codes(features), a.bag(features)
    assert codes.shape == (600, 16) and codes.min() >= 0 and codes.max() < 12
    for part in bag.split(a.sizes, 1):
        torch.testing.assert_close(part.sum(1), torch.full((600,), 1 / 3))
    flat = a.project(features).flatten(0, 2)
    nearest = torch.cdist(flat[:200], a.state["centres0"]).argmin(1)
    assert torch.equal(nearest, codes.flatten()[:200])
    # flipping an image flips its tokens' features and nothing else: whole-image codes see it, the patch count does not
    assert script.orientation_features(images.flip(-1), TINY.patch).shape == features.shape


def test_codebook_larger_than_the_distinct_features_is_refused():
    """Breaks when k-means is asked for more codes than there are different patches, which leaves copies among them."""
    x = np.repeat(np.eye(5, dtype=np.float32), 40, 0)
    with pytest.raises(ValueError, match="codebook of 6 needs as many distinct features, got 5"):
        script.fit_codebook(x, 6, 0)
    centres, dead = script.fit_codebook(x, 5, 0)
    assert centres.shape == (5, 5) and 0 <= dead < 5


def test_mask_row_learns_the_bag_and_patches_learn_tokens():
    """Breaks when a loss no longer reaches the model: both must halve while one batch is learned by heart.

    How soon depends on the version of torch, by its random numbers and the order in which it adds.
    """
    images = torch.from_numpy(fake_fashion(200)["train_images"])
    extract = script.feature_extractor(None, TINY, torch.float32)
    tokenizer = tiny_tokenizer(images)
    model = script.MaskedBeit(TINY.architecture(), tokenizer.vocab_size, 0)
    batch, masks = images[:32], script.mask_pool(TINY, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    while len(history) < 400:
        losses = script.masked_losses(model, tokenizer, extract, batch, masks, None, torch.float32)
        # a bag's cross-entropy cannot fall below its entropy: what can be learned is the excess
        excess = (losses["bag"] - losses["bag_entropy"]).item()
        history.append((losses["token"].item(), excess))
        if history[-1][0] < 0.5 * history[0][0] and excess < 0.5 * history[0][1]:
            break
        optimizer.zero_grad()
        (losses["token"] + losses["bag"]).backward()
        optimizer.step()
    (token, bag), (learned_token, learned_bag) = history[0], history[-1]
    assert abs(token - np.log(23)) < 0.2, "fresh weights should know nothing"
    assert learned_token < 0.5 * token and 0 <= learned_bag < 0.5 * bag


def test_class_row_and_mask_row_learn_the_same_bag():
    """Breaks when one of them is trained for the whole image and the other is not: it would win any comparison."""
    images = torch.from_numpy(fake_fashion(200)["train_images"])[:8]
    extract = script.feature_extractor(None, TINY, torch.float32)
    tokenizer = tiny_tokenizer(torch.from_numpy(fake_fashion(200)["train_images"]))
    model = script.MaskedBeit(TINY.architecture(), tokenizer.vocab_size, 0)
    masks = script.mask_pool(TINY, 8)
    loss = script.masked_losses(model, tokenizer, extract, images, masks, None, torch.float32)["bag"]
    rows = model.rows(script.normalise(images), masks)
    bag = tokenizer.bag(extract(images))
    by_row = [-(bag * model.logits(rows[:, row]).log_softmax(-1)).sum(1).mean() for row in (0, -1)]
    assert abs(by_row[0] - by_row[1]) > 1e-4
    torch.testing.assert_close(loss, (by_row[0] + by_row[1]) / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_resumes_bitwise(tmp_path, monkeypatch, precision):
    """Breaks when anything but seed and step decides a batch, a mask or an update, or a tensor is not saved."""
    images = torch.from_numpy(fake_fashion()["train_images"])
    recipe = replace(TINY, precision=precision)
    tokenizer = tiny_tokenizer(images)
    extract = script.feature_extractor(None, recipe, torch.float32)

    def run(out, resume):
        out.mkdir(exist_ok=True)
        return script.train_round(recipe, 1, images, tokenizer, extract, None, out, resume, every=5)

    whole = run(tmp_path / "whole", False).state_dict()
    rate = script.learning_rate

    def killed_at_13(step, *rest):
        if step == 13:
            raise KeyboardInterrupt
        return rate(step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "learning_rate", killed_at_13)
        run(tmp_path / "killed", False)
    saved = torch.load(tmp_path / "killed" / "checkpoint1.pt", weights_only=True)
    assert saved["step"] == 10
    resumed = run(tmp_path / "killed", True).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    finished = [torch.load(tmp_path / n / "checkpoint1.pt", weights_only=True) for n in ("whole", "killed")]
    assert all(torch.equal(finished[0]["model"][name], finished[1]["model"][name]) for name in whole)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["checkpoint1.pt", "log1.csv"]


def test_both_rounds_end_in_loadable_weights_and_a_report(tmp_path, capsys, monkeypatch):
    """Breaks when one of the run's outputs is missing, or a second run silently overwrites the first."""
    scores = script.few_shot_scores
    monkeypatch.setattr(script, "few_shot_scores", lambda features, labels, *_: scores(features, labels, 4, 1))
    data = fake_fashion(1500, 40)
    recipe = replace(TINY, steps=(3, 3))
    report = script.pretrain(recipe, data, tmp_path / "run", resume=False)
    assert set(report["dead_codes"]) == {1, 2} and all(len(dead) == 3 for dead in report["dead_codes"].values())
    assert f"of which dead {report['dead_codes'][2]}" in capsys.readouterr().out
    model, about = script.load_weights(tmp_path / "run" / "builtin.safetensors")
    assert about["vocab_size"] == 23 == model.lm_head.out_features
    assert report["held_out"]["images"] == 150 and report["training_images"] <= 1350
    assert 0 <= report["held_out"]["masked_token_accuracy"] <= 1
    assert set(report["few_shot_proxy"]) >= {"pixels", "mask_row", "mask_logits", "random_mask_row"}
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {"report.json", "loss.png", "masks.png", "log1.csv", "log2.csv", "recipe.json"}
    with pytest.raises(ValueError, match="--resume"):
        script.pretrain(recipe, data, tmp_path / "run", resume=False)
    with pytest.raises(ValueError, match="another recipe"):
        script.pretrain(replace(recipe, lr=1.0), data, tmp_path / "run", resume=True)
    other = {**data, "train_images": 255 - data["train_images"]}
    with pytest.raises(ValueError, match="other images"):
        script.pretrain(recipe, other, tmp_path / "run", resume=True)


def test_what_is_refused_leaves_the_folder_free(tmp_path):
    """Breaks when a codebook that cannot be made blocks the folder it was to go to, or the next run takes over a
    codebook nobody asked to resume."""
    data = fake_fashion(600, 40)
    with pytest.raises(ValueError, match="codebook of 100000 needs as many distinct features"):
        script.pretrain(replace(TINY, codes=(100_000, 6, 5)), data, tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    """Breaks when a run that diverged ends in a file of NaN."""
    with pytest.raises(ValueError, match="lr: weights became NaN or infinite"):
        script.pretrain(replace(TINY, lr=1e30), fake_fashion(600, 40), tmp_path / "run", resume=False)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "builtin.safetensors" not in names and "checkpoint1.pt" not in names
