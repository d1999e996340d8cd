"""A user's codebook is the token head of weights that bring none, and is kept with what was learned."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from beit_factory import randomize
from naive_prompted_vit import naive_hidden
from safetensors.torch import load_file, save_file
from tiny_models import relative_error, tiny_vit
from torch import nn
from torch.nn import functional as F

import vptm
from vptm.commands.train import train_settings
from vptm.models.adapter_loading import load_on
from vptm.models.codebooks import load_codebook
from vptm.models.opening import open_model
from vptm.weights.vits import load_vit

TOKENS, WIDTH = 7, 64


def codes(seed: int = 3) -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def dinov2(tmp_path: Path) -> str:
    """A file of weights with a mask token and no head over visual tokens."""
    state = tiny_vit((3, 3), embed_dim=WIDTH, num_heads=1).state_dict()
    torch.save(state | {"mask_token": torch.randn(1, WIDTH)}, tmp_path / "dinov2.pth")
    return str(tmp_path / "dinov2.pth")


def open_tokens(source: Any, **settings: Any) -> Any:
    options = {"readout": "mask", "verbalizer": "prototypical", "token_activation": "logits", "codebook": codes()}
    return open_model(source, 3, **(options | {"prompt_length": 2, "prototype_dim": 5} | settings))


def pictures(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("activation", ["logits", "softmax", "log_softmax"])
@pytest.mark.parametrize("verbalizer", ["prototypical", "linear"])
def test_the_prediction_is_the_product_of_mask_row_and_codebook(activation: str, verbalizer: str, dinov2: str) -> None:
    """`h @ E.T + b` of the naive model's mask row, on both paths, with its gradients: fails where rows are normalised,
    another row is read or the bias is left out."""
    bias = torch.randn(TOKENS, generator=torch.Generator().manual_seed(4))
    head = nn.Linear(WIDTH, TOKENS)
    head.load_state_dict({"weight": codes(), "bias": bias})
    settings = {"token_activation": activation, "verbalizer": verbalizer}
    for codebook, offset in ((codes(), 0.0), (head, bias.double())):
        model = open_tokens(dinov2, codebook=codebook, **settings).double().eval()
        batch = pictures().double()
        logits = naive_hidden(model, batch, heads=1) @ codes().double().T + offset
        assert logits.std() > 0.1
        read = {"logits": logits, "softmax": logits.softmax(-1), "log_softmax": logits.log_softmax(-1)}[activation]
        own: Any = model.verbalizer
        if verbalizer == "linear":
            expected = read @ own.head.weight.T + own.head.bias
        else:
            cosine = F.normalize(own.projection(read), dim=-1) @ F.normalize(own.prototypes, dim=-1).T
            expected = cosine / own.temperature
        assert relative_error(model(batch), expected) <= 1e-10
        assert max(vptm.check(model, batch).values()) <= 1e-10
        assert not any(parameter.requires_grad for parameter in model.lm_head.parameters())
        assert model.config["codebook"] == [TOKENS, WIDTH]
    assert head.weight.requires_grad and torch.equal(head.weight, codes()), "what is passed in stays as it is"
    learned = open_tokens(dinov2, train_lm_head=True)
    assert {"lm_head.weight", "lm_head.bias"} <= {n for n, p in learned.named_parameters() if p.requires_grad}


def test_eva02_predicts_visual_tokens_with_a_codebook(tmp_path: Path) -> None:
    """Masked weights of the Eva class, whose row is normed after it is read."""
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, num_classes=0)
    randomize(eva)
    loaded = load_vit(eva)
    loaded.mask_token = torch.randn(1, 1, 192)
    book = torch.randn(5, 192)
    model = open_tokens(loaded, codebook=book, verbalizer="linear", prompt_length=0).eval()
    images = torch.randn(2, 3, 28, 28)
    expected = model.verbalizer.head(model.forward_hidden(images) @ book.T)
    assert relative_error(model(images), expected) <= 1e-5


@torch.no_grad()
def test_adapters_hold_the_codebook(dinov2: str, tmp_path: Path) -> None:
    """Saved and loaded, on another model, folded, and sealed: the file of the codebook is needed no more. Fails where
    an adapter leaves it to the source, or runs with zeros in its place."""
    file = tmp_path / "codes.pt"
    torch.save(codes(), file)
    model = open_tokens(dinov2, codebook=file).eval()
    file.unlink()
    batch = pictures()
    vptm.save_adapter(model, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(held["lm_head.weight"], codes()) and not held["lm_head.bias"].any()
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert json.loads(config)["model"]["codebook"] == [TOKENS, WIDTH] and "codes.pt" not in config
    again = vptm.load_adapter(tmp_path / "adapter")
    assert torch.equal(again(batch), model(batch))
    assert not any(parameter.requires_grad for parameter in again.lm_head.parameters())
    vptm.save_adapter(again, tmp_path / "again")
    assert torch.equal(vptm.load_adapter(tmp_path / "again")(batch), model(batch))
    other = open_tokens(dinov2, codebook=codes(9))
    assert torch.equal(load_on(other, tmp_path / "adapter")(batch), model(batch))
    bank = vptm.TaskBank(open_tokens(dinov2, codebook=codes(9)))
    bank.add("a", model)
    assert relative_error(bank.predict(batch, ["a", "a"]), model(batch)) <= 1e-5
    of_module = open_tokens(load_vit(dinov2)).eval()
    vptm.save_adapter(of_module, tmp_path / "module")
    loaded = vptm.load_adapter(tmp_path / "module", source=dinov2)
    assert torch.equal(loaded(batch), of_module(batch))
    sealed = copy.deepcopy(model).freeze_for_inference()
    vptm.save_adapter(sealed, tmp_path / "sealed")
    assert torch.equal(vptm.load_adapter(tmp_path / "sealed")(batch), model(batch))
    model.save_pretrained(tmp_path / "folded", form="folded")
    folded = vptm.load_adapter(tmp_path / "folded")
    assert folded.lm_head is None and folded.config["codebook"] is None
    assert relative_error(folded(batch), model(batch)) <= 1e-5
    with torch.inference_mode():
        assert relative_error(sealed(batch), model(batch)) <= 1e-5


@torch.no_grad()
def test_a_classifier_that_is_read_folds_too(tmp_path: Path) -> None:
    """The folded form of a ViT has no classifier where nothing reads one: left in, no source could give it."""
    torch.save(tiny_vit((3, 3), embed_dim=WIDTH, num_heads=1, num_classes=7).state_dict(), tmp_path / "x.pth")
    model = open_model(tmp_path / "x.pth", 3, token_activation="logits").eval()
    model.save_pretrained(tmp_path / "folded", form="folded")
    assert relative_error(vptm.load_adapter(tmp_path / "folded")(pictures()), model(pictures())) <= 1e-5


def test_a_damaged_adapter_with_a_codebook_is_refused_in_one_line(dinov2: str, tmp_path: Path) -> None:
    vptm.save_adapter(open_tokens(dinov2), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for codebook, message in (
        ([TOKENS, WIDTH + 1], r"lm_head\.weight must have shape \(7, 65\), got \(7, 64\)|codebook .* \(V, 64\)"),
        ([10**6, WIDTH], r"must ask for at most the \d+ values .*, model\.codebook asks for 64000000"),
        ([-1, WIDTH], r"codebook must be \[V, C\], two positive integers, in a config, got \[-1, 64\]"),
        ("codes.pt", r"codebook must be \[V, C\], two positive integers, in a config, got 'codes\.pt'"),
        (None, "needs codebook="),
    ):
        path.write_text(json.dumps(config | {"model": config["model"] | {"codebook": codebook}}))
        with pytest.raises(ValueError, match=message) as refusal:
            vptm.load_adapter(tmp_path / "adapter")
        assert "\n" not in str(refusal.value)


def test_files_and_what_they_may_hold(tmp_path: Path) -> None:
    """Every form of the same codebook; what is none is refused in one line that names the file."""
    bias = torch.ones(TOKENS)
    save_file({"anything": codes().half()}, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": codes(), "lm_head.bias": bias}, tmp_path / "b.safetensors")
    torch.save(codes(), tmp_path / "c.pt")
    torch.save({"weight": codes(), "bias": bias}, tmp_path / "d.pth")
    for name, expected, offset in (
        ("a.safetensors", codes().half(), 0.0),
        ("b.safetensors", codes(), 1.0),
        ("c.pt", codes(), 0.0),
        ("d.pth", codes(), 1.0),
    ):
        head = load_codebook(tmp_path / name, WIDTH, torch.float64)
        assert head.weight.dtype == torch.float64 and torch.equal(head.weight, expected.double())
        assert torch.equal(head.bias, torch.full((TOKENS,), offset, dtype=torch.float64))

    class Doubled(nn.Linear):
        pass

    (tmp_path / "e.pt").write_bytes(b"no torch file")
    torch.save({"weight": codes(), "other": codes()}, tmp_path / "f.pt")
    torch.save({"weight": codes(), "epoch": 3}, tmp_path / "g.pt")
    torch.save({"weight": codes(), "bias": torch.ones(TOKENS + 1)}, tmp_path / "h.pt")
    (tmp_path / "i.npy").write_bytes(b"x")
    torch.save(torch.ones(1, WIDTH).expand(10**9, WIDTH), tmp_path / "j.pt")
    for source, kind, message in (
        (codes()[:, 1:], ValueError, r"codebook must have shape \(V, 64\), .*, got \(7, 63\)"),
        (codes()[0], ValueError, r"codebook must have shape \(V, 64\), .*, got \(64,\)"),
        (codes()[:0], ValueError, r"got \(0, 64\)"),
        (codes().long(), ValueError, "must be floating point, got torch.int64"),
        (codes() / 0, ValueError, "must be finite"),
        (codes().double() * 1e300, ValueError, r"weight must be finite as torch\.float32, got .*e\+300"),
        (codes().to("meta"), ValueError, "must have dense values, got torch.strided on meta"),
        (codes().to_sparse(), ValueError, "must have dense values, got torch.sparse_coo on cpu"),
        (Doubled(WIDTH, 3), ValueError, "must be a plain nn.Linear, got a Doubled"),
        ([[1.0]], TypeError, "must be a tensor, an nn.Linear or the path of a file, got list"),
        (tmp_path / "none.pt", FileNotFoundError, r"codebook .*none\.pt: no such file"),
        (tmp_path / "e.pt", ValueError, r"codebook .*e\.pt must be a whole torch checkpoint"),
        (tmp_path / "f.pt", ValueError, r"codebook .*f\.pt: must hold one \(V, C\) tensor, .*, got weight, other"),
        (tmp_path / "g.pt", ValueError, r"must hold one \(V, C\) tensor, .*, got weight, epoch"),
        (tmp_path / "h.pt", ValueError, r"must have a bias of shape \(7,\), got \(8,\)"),
        (tmp_path / "j.pt", ValueError, r"j\.pt must have a value for each of its 64000000000 places, got 64"),
        (tmp_path / "i.npy", ValueError, r"must be a \.safetensors, \.pt or \.pth file, got \.npy"),
    ):
        with pytest.raises(kind, match=message) as refusal:
            load_codebook(source, WIDTH, torch.float32)
        assert "\n" not in str(refusal.value)


def test_a_codebook_goes_with_what_reads_it(dinov2: str, tmp_path: Path) -> None:
    """In Python as in `vptm train`, whose option is of ViTs alone."""
    with pytest.raises(ValueError, match="codebook needs a token_activation that reads it, logits or softmax, got 'hi"):
        open_tokens(dinov2, token_activation="hidden")
    with pytest.raises(ValueError, match="token_activation='logits' of a mask row needs codebook="):
        open_tokens(dinov2, codebook=None)
    with pytest.raises(ValueError, match=r"codebook must have shape \(V, 64\)"):
        open_tokens(dinov2, codebook=torch.ones(3, 5))
    with pytest.raises(TypeError, match="takes no codebook for a BEiT"):
        open_model("builtin", 3, codebook=codes())
    with pytest.raises(ValueError, match="--codebook is for ViT models, builtin is a BEiT"):
        vptm.settings.RunSettings.from_options({"model": "builtin", "codebook": "x.pt"}, "beit")


def test_a_run_records_where_its_codebook_lies(dinov2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does of its weights: a resume from another folder reads the same file."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", dinov2, "--readout", "mask", "--token-activation", "logits", "--codebook", "codes.pt"]
    assert train_settings(arguments)[0].model_settings.codebook == str(tmp_path / "codes.pt")
    with pytest.raises(FileNotFoundError, match=r"codebook .*codes\.pt: no such file"):
        open_tokens(dinov2, codebook="codes.pt")
