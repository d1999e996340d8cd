"""`vptm map`: from a classifier file and class names to a mapping, its accuracy, and clear refusals."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from console import Console
from safetensors.torch import save_file
from torch import Tensor

from vptm.methods.reprogramming import label_mapping
from vptm.methods.reprogramming import map as reprogram
from vptm.methods.reprogramming.source_classifier import load_classifier

SOURCES = ["left hand", "teapot", "upper deck", "zebra", "right turn", "violin"]
# timm's smallest classifier that takes pictures of 32 pixels in a moment
CLASSIFIER = "test_resnet.r160_in1k"


def letters(texts: Sequence[str]) -> Tensor:
    return torch.tensor([[float(text.lower().count(chr(97 + k))) for k in range(26)] for text in texts])


@pytest.fixture
def arguments(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A classifier of six labels with random weights, and an encoder that needs no package."""
    torch.manual_seed(0)
    save_file(timm.create_model(CLASSIFIER, num_classes=6).state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "labels.txt").write_text("\n".join(SOURCES) + "\n")
    monkeypatch.setattr(reprogram, "text_encoder", lambda name: letters)
    found = ["map", "--data", material / "pictures", "--classifier", CLASSIFIER]
    return [*found, "--weights", "weights.safetensors", "--source-labels", "labels.txt", "--template", "{}"]


def rows(text: str) -> dict[str, list[str]]:
    return {row["label"]: row["source_labels"].split("; ") for row in csv.DictReader(io.StringIO(text))}


def test_zero_shot_mapping_by_meaning(vptm: Console, arguments: list[object], material: Path) -> None:
    """Names alone give the mapping, and the accuracy is that of the chosen outputs of the classifier itself."""
    code, out, err = vptm(*arguments)
    assert code == 0, err
    assert rows(out) == {"upper": ["upper deck"], "left": ["left hand"], "right": ["right turn"]}
    source = load_classifier(CLASSIFIER, weights="weights.safetensors", labels="labels.txt")
    from vptm.data.sources import load_data

    test = load_data(material / "pictures", transform=source.prepare).test
    chosen = [
        SOURCES.index(f"{name} {rest}") for name, rest in (("left", "hand"), ("right", "turn"), ("upper", "deck"))
    ]
    assert test.classes == ["left", "right", "upper"]
    hits = [int(source.model(image[None])[0, chosen].argmax()) == label for image, label in test]
    assert f"test accuracy {sum(hits) / len(hits):.2%}" in err


@pytest.mark.parametrize(
    ("more", "count"),
    [
        (["--assignment", "top", "--m", 2, "--aggregation", "logsumexp"], 2),
        (["--method", "random", "--m", 2], 2),
        (["--method", "flm", "--shots", 3], 1),
        (["--method", "blm", "--shots", 3], None),
        (["--method", "ilm", "--shots", 2, "--epochs", 2, "--prompt", "expansive", "--image-size", 32], 1),
        (["--prompt", "additive", "--border", 10, "--shots", 2, "--epochs", 2], 1),
    ],
)
def test_every_method_runs(vptm: Console, arguments: list[object], more: list[object], count: int | None) -> None:
    """Each way of mapping goes through to the test images, with as many sources as asked for."""
    code, out, err = vptm(*arguments, *more)
    assert code == 0 and "test accuracy" in err, err
    found = rows(out)
    assert found.keys() == {"upper", "left", "right"}
    assert count is None or all(len(sources) == count for sources in found.values())
    assert ("border trained" in err) == ("--prompt" in more)


def test_soft_mapping_of_more_labels_than_sources(vptm: Console, arguments: list[object]) -> None:
    """BLM shares source labels, so a classifier of two serves three classes; a mapping that uses them once cannot."""
    save_file(timm.create_model(CLASSIFIER, num_classes=2).state_dict(), "two.safetensors")
    Path("two.txt").write_text("teapot\nzebra\n")
    two = [*arguments, "--weights", "two.safetensors", "--source-labels", "two.txt"]
    for more in ([], ["--prompt", "expansive", "--image-size", 32, "--epochs", 1]):
        code, out, err = vptm(*two, "--method", "blm", "--shots", 3, *more)
        assert code == 0 and "test accuracy" in err, err
        assert rows(out).keys() == {"upper", "left", "right"}
    code, line = vptm.refused(*two, "--method", "flm")
    assert code == 2 and "m=1 for each of 3 labels need 3, there are 2" in line, line


def test_templates_given_together_count_together(vptm: Console, arguments: list[object]) -> None:
    """--template repeated scores by the mean of the embeddings, not by the last or the first."""
    code, out, err = vptm(*arguments, "--template", "a photo of a {}.", "--no-evaluate")
    assert code == 0, err
    names = ["left", "right", "upper"]
    scores = label_mapping.semantic_scores(names, SOURCES, letters, template=["{}", "a photo of a {}."])
    for row in csv.DictReader(io.StringIO(out)):
        expected = scores[names.index(row["label"]), SOURCES.index(row["source_labels"])]
        assert row["score"] == f"{float(expected):.4f}"


def test_weights_under_other_names(tmp_path: Path, arguments: list[object]) -> None:
    """A state dict of another package fits by order and shape, says so, and gives the same logits."""
    own = timm.create_model(CLASSIFIER, num_classes=6)
    renamed = {f"_{number}": tensor for number, tensor in enumerate(own.state_dict().values())}
    torch.save(renamed, tmp_path / "other.pth")
    source = load_classifier(CLASSIFIER, weights=tmp_path / "other.pth", labels=tmp_path / "labels.txt")
    image = torch.rand(1, 3, 64, 64)
    assert "matched by order and shape" in source.notes[0]
    # the order of memory decides how sums are rounded
    assert torch.equal(source.model(image), own.eval().to(memory_format=torch.channels_last)(image))


def test_a_flipped_bit_of_the_weights_is_refused(tmp_path: Path, arguments: list[object]) -> None:
    """`torch.load` reads past the checksums of its own archive."""
    own, path = timm.create_model(CLASSIFIER, num_classes=6), tmp_path / "own.pth"
    torch.save(own.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[content.index(next(own.parameters()).detach().numpy().tobytes()) + 7] ^= 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"own\.pth must be a whole torch checkpoint, it is damaged: .* changed"):
        load_classifier(CLASSIFIER, weights=path, labels=tmp_path / "labels.txt")


def test_bad_input_is_refused(vptm: Console, arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, before anything is trained or printed."""
    Path("junk.pth").write_text("junk")
    Path("few.txt").write_text("a\nb\n")
    Path("bytes.txt").write_bytes(b"\xff\n")
    for more, message in (
        (["--m", 3], "3 for each of 3 labels need 9, there are 6"),
        (["--method", "random", "--m", 3], "need 9, there are 6"),
        (["--method", "semantik"], "did you mean 'semantic'"),
        (["--assignment", "hungry"], "assignment must be one of argmax, hungarian"),
        (["--method", "flm", "--assignment", "hungry"], "--assignment must be one of argmax, hungarian"),
        (["--method", "blm", "--m", 0], "--m must be >= 1, got 0"),
        (["--aggregation", "mean-prob"], "did you mean 'mean_prob'"),
        (["--method", "ilm"], "pass --prompt"),
        (["--method", "blm", "--aggregation", "max"], "must be mean for the soft mapping"),
        (["--template", "a photo"], "template must hold {} once"),
        (["--classifier", "test_resne"], "classifier must be a timm model"),
        (["--weights", "none.pth"], "weights not found: none.pth"),
        (["--weights", "junk.pth"], "junk.pth must be a whole torch checkpoint"),
        (["--source-labels", "few.txt"], "must name all 6 outputs"),
        (["--source-labels", "none.txt"], "labels not found: none.txt"),
        (["--source-labels", "bytes.txt"], "bytes.txt: must be a readable file, got text that is not Unicode"),
        (["--method", "flm", "--shots", 99], "shots must be at most 7, or all"),
    ):
        code, line = vptm.refused(*arguments, *more)
        assert code == 2 and message in line, line
    monkeypatch.setattr(reprogram, "text_encoder", label_mapping.text_encoder)
    monkeypatch.setattr(label_mapping, "find_spec", lambda name: None)
    code, line = vptm.refused(*arguments)
    assert code == 2 and "pip install 'vptm[text]'" in line
