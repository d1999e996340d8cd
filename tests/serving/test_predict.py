"""Predictions of many pictures: written as they are made, continued after a kill, in memory that does not grow."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from console import Console
from PIL import Image

import vptm
from vptm import PromptedBEiT
from vptm.data.decoding import BadImageError
from vptm.serving.predict import Prediction, Unreadable, picture_files, predictions
from vptm.serving.prediction_file import continued, header, row


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a and b: two adapters of the built-in model with other classes."""
    root = tmp_path_factory.mktemp("runs")
    for name, classes, options in (("a", 3, {"prompt_mode": "deep"}), ("b", 4, {"prompt_length": 2})):
        torch.manual_seed(classes)
        model = PromptedBEiT("builtin", classes, **options)
        model.class_names = [f"{name} {k}" for k in range(classes)]
        vptm.save_adapter(model, root / name)
    return root


@pytest.fixture
def vptm_command(capsys: pytest.CaptureFixture[str]) -> Console:
    return Console(capsys)


def write_pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    files = [folder / f"{i:05d}.png" for i in range(count)]
    for file in files:
        Image.fromarray(generator.integers(0, 255, (28, 28), dtype=np.uint8)).save(file)
    return files


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_many_adapters_give_a_row_each(vptm_command: Console, runs: Path, tmp_path: Path) -> None:
    """The same as each adapter by itself."""
    files = write_pictures(tmp_path / "p", 5)
    code, both, err = vptm_command("predict", runs / "a", tmp_path / "p", "--adapter", runs / "b", "--batch-size", 2)
    assert code == 0 and err == ""
    rows = table(both)
    assert [(row["path"], row["task"]) for row in rows] == [(str(file), name) for file in files for name in "ab"]
    for name in "ab":
        alone = table(vptm_command("predict", runs / name, tmp_path / "p")[1])
        for mixed, own in zip([each for each in rows if each["task"] == name], alone, strict=True):
            assert mixed["label"] == own["label"] and float(mixed["score"]) == pytest.approx(
                float(own["score"]), abs=2e-6
            )


def test_adapters_of_one_label_and_of_several(vptm_command: Console, runs: Path, tmp_path: Path) -> None:
    """Each row is that of its adapter alone: all labels that reach the threshold of that task, or the best five."""
    torch.manual_seed(7)
    several = PromptedBEiT("builtin", 8, prompt_length=2, multi_label=True)
    for name in ("tags", "others"):
        vptm.save_adapter(several, tmp_path / name)
    files = write_pictures(tmp_path / "p", 3)
    mixed = ["predict", runs / "a", tmp_path / "p", "--adapter", tmp_path / "tags", "--adapter", tmp_path / "others"]
    for given, tags, others in (
        ([], [], []),
        (["--threshold", 0.45], ["--threshold", 0.45], ["--threshold", 0.45]),
        (["--threshold", "tags=0.1", "--threshold", 0.55], ["--threshold", "tags=0.1"], ["--threshold", 0.55]),
        (["--top", 2], ["--top", 2], ["--top", 2]),
    ):
        rows = table(vptm_command(*mixed, *given)[1])
        assert [row["task"] for row in rows] == ["a", "tags", "others"] * 3
        top = ["--top", 2] if "--top" in given else []
        alone = [(runs / "a", top), (tmp_path / "tags", tags), (tmp_path / "others", others)]
        for folder, own in alone:
            single = table(vptm_command("predict", folder, *files, *own)[1])
            for each, want in zip([each for each in rows if each["task"] == folder.name], single, strict=True):
                found, wanted = (dict(json.loads(line["top5"])) for line in (each, want))
                assert list(found) == list(wanted) and found == pytest.approx(wanted, abs=2e-6), (folder, given)
    assert len(json.loads(table(vptm_command(*mixed, "--threshold", 0)[1])[1]["top5"])) == 8
    told = vptm.predict({"a": runs / "a", "tags": tmp_path / "tags"}, files, threshold=1)
    assert [len(each.top) for each in told] == [3, 0] * 3
    for words, message in (
        (["--threshold", "tag=0.3"], "--threshold must name one of 3 tasks, got 'tag', did you mean 'tags'?"),
        (["--threshold", "half"], "--threshold must be a number in [0, 1], or TASK=NUMBER, got 'half'"),
        (["--threshold", "tags=2"], "--threshold must be a number in [0, 1], or TASK=NUMBER, got 'tags=2'"),
        (["--threshold", "0.1", "--threshold", "0.2"], "--threshold must be given once, got '0.2' too"),
        (["--threshold", "a=0.2"], "a: threshold must be left out for a model of one label an image, got 0.2"),
    ):
        code, line = vptm_command.refused(*mixed, *words)
        assert code == 2 and message in line, line
    single = ["predict", runs / "a", tmp_path / "p", "--adapter", runs / "b", "--threshold", 0.5]
    code, line = vptm_command.refused(*single)
    assert code == 2 and "threshold must be left out for a model of one label an image, got 0.5" in line


def test_python_gives_what_the_command_prints(vptm_command: Console, runs: Path, tmp_path: Path) -> None:
    """From files, a pattern, PIL images and a tensor alike, by a folder or a model."""
    files = write_pictures(tmp_path / "p", 3)
    model = vptm.load_adapter(runs / "a")
    printed = [
        json.loads(line)
        for line in vptm_command("predict", runs / "a", tmp_path / "p", "--format", "jsonl")[1].splitlines()
    ]
    tensor = torch.stack([vptm.transforms(model)(Image.open(file)) for file in files])
    for images in (files, str(tmp_path / "p" / "*.png"), [Image.open(file) for file in files], tensor):
        found = vptm.predict(model if isinstance(images, list) else runs / "a", images)
        assert [each.top[0][0] for each in found] == [each["label"] for each in printed]
        for each, line in zip(found, printed, strict=True):
            assert [list(pair) for pair in each.top] == [[name, pytest.approx(p, abs=2e-6)] for name, p in line["top5"]]
    assert vptm.predict(model, []) == []


@pytest.mark.parametrize(("form", "several"), [("csv", False), ("csv", True), ("jsonl", True)])
def test_a_run_killed_anywhere_continues_without_loss_or_duplicate(
    vptm_command: Console, runs: Path, tmp_path: Path, form: str, several: bool
) -> None:
    """The file is cut at every kind of place: in the header, in a row, in a quoted path of two lines, between rows."""
    files = write_pictures(tmp_path / "p", 4)
    odd = tmp_path / "p" / 'a "b",\nc.png'
    files[0].rename(odd)
    out = tmp_path / f"rows.{form}"
    command = ["predict", runs / "a", tmp_path / "p", "--out", out, *(["--adapter", runs / "b"] if several else [])]
    assert vptm_command(*command)[0] == 0
    whole = out.read_bytes()
    assert whole.decode().count(str(tmp_path)) == 4 * (1 + several)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in (0, 3, ends[0] + 20, ends[1], ends[-1] - 1):
        out.write_bytes(whole[:cut])
        code, printed, err = vptm_command(*command, "--resume")
        assert code == 0 and printed == "" and err == "", (cut, err)
        # numbers may differ in the last digit, as batches do
        again, before = (text.decode().splitlines() for text in (out.read_bytes(), whole))
        assert [line[:40] for line in again] == [line[:40] for line in before], cut


def test_rows_are_there_before_the_end(runs: Path, tmp_path: Path) -> None:
    """A batch is written before the one after the next is read, so that a kill loses no more than two."""
    files = write_pictures(tmp_path / "p", 6)
    asked = []

    def listed():
        for file in files:
            asked.append(file)
            yield file

    found = predictions(vptm.load_adapter(runs / "a"), listed(), batch_size=2)
    next(found)
    assert asked == files[:4]


def test_a_list_on_stdin_and_patterns(
    vptm_command: Console, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_pictures(tmp_path / "p", 4)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{files[2]}\n\n{files[0]}\n"))
    rows = table(vptm_command("predict", runs / "a", "-")[1])
    assert [row["path"] for row in rows] == [str(files[2]), str(files[0])]
    rows = table(vptm_command("predict", runs / "a", f"{tmp_path}/**/0000[13].png", files[1])[1])
    assert [row["path"] for row in rows] == [str(files[1]), str(files[3])], "a file that is named twice has one row"
    code, line = vptm_command.refused("predict", runs / "a", f"{tmp_path}/*.jpg")
    assert code == 2 and "image not found" in line


def test_pictures_that_cannot_be_read_are_named_at_the_end(vptm_command: Console, runs: Path, tmp_path: Path) -> None:
    """They stop nothing: the others have their rows, and the exit code says that some are missing."""
    files = write_pictures(tmp_path / "p", 3)
    files[1].write_bytes(b"no picture")
    code, out, err = vptm_command("predict", runs / "a", tmp_path / "p", "--batch-size", 1)
    assert code == 1 and [row["path"] for row in table(out)] == [str(files[0]), str(files[2])]
    assert err.splitlines()[0].startswith("skipped: cannot read image") and "1 images could not be read" in err
    code, out, err = vptm_command("predict", runs / "a", tmp_path / "p", "--on-bad-image", "skip")
    assert code == 0 and len(table(out)) == 2 and "skipped" in err
    with pytest.raises(BadImageError, match="cannot read image"):
        vptm.predict(runs / "a", files)
    kinds = [type(each) for each in predictions(vptm.load_adapter(runs / "a"), files)]
    assert kinds == [Prediction, Unreadable, Prediction]


def test_memory_is_flat_over_ten_thousand_pictures(tmp_path: Path) -> None:
    """What the process holds after ten thousand pictures is what it held after one thousand."""
    from tiny_models import build

    model = build(prompt_mode="deep", prompt_length=1).float()
    file = write_pictures(tmp_path / "p", 1)[0]
    Image.new("L", (1, 1)).save(file)
    for i in range(9_999):
        os.link(file, tmp_path / "p" / f"link{i}.png")
    held, count = [], 0
    for count, _ in enumerate(predictions(model, iter(picture_files([tmp_path / "p"])), batch_size=250), 1):
        if count in (1_000, 10_000):
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    # ten thousand results alone would be more
    assert count == 10_000 and held[1] - held[0] < 4_000_000, held


def test_what_resume_cannot_continue_is_refused(vptm_command: Console, runs: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "p", 1)
    out = tmp_path / "rows.csv"
    common = ["predict", runs / "a", tmp_path / "p"]
    assert vptm_command(*common, "--out", out)[0] == 0
    before = out.read_bytes()
    refused = [
        ([*common, "--out", out], "--out must be a new file"),
        ([*common, "--resume"], "--resume needs --out"),
        ([*common, "--out", out, "--resume", "--adapter", runs / "b"], "must begin with 'path,task,label,score,top5'"),
        ([*common, "--out", out, "--resume", "--format", "jsonl"], "must hold predictions as jsonl"),
        ([*common, "--format", "xml"], "--format must be one of csv, jsonl, got 'xml'"),
        ([*common, "--adapter", runs / "a"], "--adapter folders must differ in name"),
        ([*common, "--top", "0"], "top must be an integer >= 1 or None, got 0"),
        ([*common, "--batch-size", "0"], "batch_size must be >= 1"),
    ]
    for command, message in refused:
        code, line = vptm_command.refused(*command)
        assert code == 2 and message in line, line
    assert out.read_bytes() == before


def test_a_row_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    first, second = (Prediction(Path(name), [("x", 0.5), ("y", 0.25)]) for name in ("a\n", "b"))
    file = tmp_path / "rows.csv"
    file.write_text(header(False, "csv") + row(first, "csv") + row(second, "csv")[:-1])
    stream, done = continued(file, "csv", False)
    with stream:
        stream.write(row(second, "csv"))
    assert done == {("a\n", None)}
    assert [each["path"] for each in csv.DictReader(file.open(newline=""))] == ["a\n", "b"]
