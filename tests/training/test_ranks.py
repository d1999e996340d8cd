"""Several processes train what one does: the same losses, one run folder, and an end that all of them see."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from console import Console
from forked import Forked
from tiny_data import write_backbone, write_pictures
from tiny_runs import metrics
from torch.utils.data import DataLoader, TensorDataset

from vptm import PromptedBEiT, evaluate, fit, load_adapter
from vptm.data.balance import balanced_sampler
from vptm.training.state import STATE_FILE

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="several processes need accelerate")


def start(target: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Forked]:
    """`target` in processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [Forked(target, *arguments, environment=one) for one in ranks]


def outcomes(processes: list[Forked]) -> list[tuple[int | None, str, str]]:
    return [process.outcome() for process in processes]


class Pictures(TensorDataset):
    """11 random pictures; `act(index)` is called before one is read."""

    def __init__(self, act: Any = None, count: int = 11, several: bool = False) -> None:
        images = torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        kinds = torch.arange(count) % 3
        super().__init__(images, torch.stack([kinds == 0, kinds > 0, kinds == 2], 1).float() if several else kinds)
        self.act, self.reads = act, 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        image, label = super().__getitem__(index)
        return (image if self.act is None else self.act(self, index, image)), label


def model_of(backbone: Path, **settings: Any) -> PromptedBEiT:
    torch.manual_seed(3)
    return PromptedBEiT(backbone, 3, **({"prototype_dim": 8} | settings)).double()


def trained(backbone: Path, act: Any = None, model: Any = None, balanced: bool = False, **options: Any) -> Any:
    """Two epochs in batches of 5, of which the last has a single picture: none for a second process."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # processes do not start at the same values by themselves
    found = PromptedBEiT(backbone, 3, **({"prototype_dim": 8} | (model or {}))).double()
    order: Any = {"sampler": balanced_sampler(torch.arange(11).numpy() % 3)} if balanced else {"shuffle": True}
    train = DataLoader(Pictures(act, several=found.multi_label), batch_size=5, **order)
    val = DataLoader(Pictures(count=9, several=found.multi_label), batch_size=4)
    options = {"epochs": 2, "lr": 0.02, "progress": False} | options
    return found, fit(found, train, val, **options)


LINEAR = {"prompt_length": 0, "readout": "cls", "verbalizer": "linear", "token_activation": "hidden"}
PROVP = {"readout": "cls", "verbalizer": "linear", "token_activation": "hidden", "prompt_mode": "progressive"}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 0.05, "optimizer": "momentum"},
    "linear": {"model": LINEAR},
    "several labels": {"model": {"multi_label": True}},
    "rates": {
        "model": {"prompt_mode": "progressive", "prompt_gate": -1.0, "prompt_options": {"train_alpha": True}},
        "lr_of": {"alpha": 0.1, "gate": 0.0},
        "relative_prompt_lr": True,
    },
    "weighted": {"class_weights": [0.2, 1.0, 3.0], "label_smoothing": 0.1, "balanced": True},
}


def scenarios(backbone: Path, folder: Path) -> None:
    """What every process of the run does; the first writes what it saw."""
    seen = {name: trained(backbone, **options)[1].history for name, options in CASES.items()}
    trained(backbone, run_dir=folder / "whole", epochs=3)

    def stop(pictures: Pictures, index: int, image: Any) -> Any:
        share = {"0": 3 + 3 + 1, "1": 2 + 2 + 1}[os.environ["RANK"]]
        if pictures.reads == 1 + 2 * share + 1:  # after a look at the data and two epochs, both at the same step
            raise KeyboardInterrupt
        return image

    assert trained(backbone, stop, run_dir=folder / "parts", epochs=3)[1].interrupted
    trained(backbone, run_dir=folder / "parts", resume=True, epochs=3)

    def poison(pictures: Pictures, index: int, image: Any) -> Any:
        return image * float("nan") if os.environ["RANK"] == "1" and pictures.reads > 8 else image

    errors = []
    for options in (
        {"act": poison, "run_dir": folder / "nan"},
        {"run_dir": folder / "whole"},
        {"protoverb_weight": 1.0},
        {"model": PROVP, "reformation": 1.0},
    ):
        try:
            trained(backbone, **options)  # type: ignore[arg-type]
        except (FloatingPointError, ValueError) as error:
            errors.append(str(error))
    pictures = Pictures(count=9)
    found = evaluate(model_of(backbone), DataLoader(pictures, batch_size=4), confusion=True, distributed=True)
    facts = [seen, errors, [found, pictures.reads], [sharded(backbone, learned) for learned in (False, True)]]
    Path(folder / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(facts))


def sharded(backbone: Path, learned: bool) -> float:
    """Largest difference of values that three AdamW steps under FSDP2, of everything or of what is learned alone, make
    from those that one process makes."""
    from torch.distributed.fsdp import fully_shard

    model, alone = model_of(backbone), model_of(backbone)
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    fully_shard(model, ignored_params=frozen if learned else None)
    rank, images, labels = int(os.environ["RANK"]), Pictures().tensors[0][:8], Pictures().tensors[1][:8]
    for one, part in ((model, slice(rank, None, 2)), (alone, slice(None))):
        optimiser = torch.optim.AdamW(one.trainable_parameters(), lr=0.02)
        for _ in range(3):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(one(images[part]), labels[part]).backward()
            optimiser.step()
    values: dict[str, Any] = model.state_dict()
    assert all(hasattr(values[name], "full_tensor") for name, one in alone.named_parameters() if one.requires_grad)
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in values.items()}
    return max(float((whole[name] - value).detach().abs().max()) for name, value in alone.state_dict().items())


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


def test_two_processes_train_as_one_does(backbone: Path, tmp_path: Path) -> None:
    """Losses to 1e-10 in float64, where a batch has a picture for one of them alone; a resumed run is bitwise the same;
    one that sees NaN stops both; what does not work together is refused in both. Every image is evaluated once, and
    FSDP2 takes the model."""
    for status, _, errors in outcomes(start(scenarios, backbone, tmp_path)):
        assert status == 0, errors
    seen, errors, *evaluated = json.loads((tmp_path / "seen-0.json").read_text())
    others, same, *evaluated_there = json.loads((tmp_path / "seen-1.json").read_text())
    assert evaluated == evaluated_there
    (found, reads), shards = evaluated
    expected = evaluate(model_of(backbone), DataLoader(Pictures(count=9), batch_size=4), confusion=True)
    for name in ("loss", "ece"):
        assert found.pop(name) == pytest.approx(expected.pop(name), rel=1e-12)
    assert found == expected and reads == 2 + 2 + 1, "each reads its share alone"
    assert max(shards) <= 1e-12, "FSDP2 trains other values"
    for name, options in CASES.items():
        alone = trained(backbone, **options)[1].history
        for history in (seen[name], others[name]):
            for row, expected in zip(history, alone, strict=True):
                for quantity in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_map", "lr"):
                    wanted = pytest.approx(expected.get(quantity), abs=1e-10)
                    assert row.get(quantity) == wanted, (name, quantity)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    whole, parts = (load_adapter(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert errors == same and len(errors) == 4
    for text, expected in zip(
        errors,
        ("loss became nan at epoch", "exists and is not empty", "protoverb_weight must be 0", "reformation needs an"),
    ):
        assert expected in text
    assert (tmp_path / "nan" / STATE_FILE).is_file(), "the last good epoch is kept"


def killed(backbone: Path, folder: Path) -> None:
    def die(pictures: Pictures, index: int, image: Any) -> Any:
        if os.environ["RANK"] == "1" and pictures.reads == 1 + 6 + 2:
            os._exit(9)
        return image

    trained(backbone, die, run_dir=folder)


def test_a_killed_process_ends_the_run_and_leaves_a_usable_folder(backbone: Path, tmp_path: Path) -> None:
    first, second = outcomes(start(killed, backbone, tmp_path / "r"))
    assert second[0] == 9 and first[0] == 1
    assert "another process of the run ended, the run folder holds the last finished epoch" in first[2]
    assert len(metrics(tmp_path / "r")) == 1 and load_adapter(tmp_path / "r").num_classes == 3
    _, result = trained(backbone, run_dir=tmp_path / "r", resume=True)
    assert len(result.history) == 2


def commands(several: list[list[str]]) -> None:
    """One after the other; each evaluation says of how many processes."""
    from vptm.commands import app
    from vptm.training import evaluate as evaluation

    ask = evaluation.ask

    def asked(*arguments: Any, **options: Any) -> Any:
        print("asked", options["ranks"].count, file=sys.stderr)
        return ask(*arguments, **options)

    evaluation.ask = asked
    for arguments in several:
        try:
            app.main(arguments)
        except SystemExit as end:
            if end.code:
                raise


def test_the_commands_write_and_print_once(backbone: Path, tmp_path: Path, vptm: Console) -> None:
    """Both processes test, evaluate and predict; what one of them fitted after training both have."""
    write_pictures(tmp_path / "pictures", 8)
    more = ["--prototype-dim", "4", "--prototype-steps", "2", "--out", str(tmp_path / "r")]
    where = ["--model", str(backbone), "--data", str(tmp_path / "pictures"), "--device", "cpu"]
    train = ["train", *where, "--shots", "4", "--epochs", "2", *more]
    names = ["predict", str(tmp_path / "r"), str(tmp_path / "pictures" / "*" / "*"), "--out", str(tmp_path / "n.csv")]
    found = outcomes(start(commands, [train, ["evaluate", str(tmp_path / "r")], names]))
    assert [status for status, _, _ in found] == [0, 0], found[0][2] + found[1][2]
    assert found[0][1].count("test accuracy") == 2 and found[1][1] == "" and "epoch" not in found[1][2]
    # the test and `vptm evaluate`; prototypes are validated by the one that fitted them
    assert [errors.count("asked 2") for _, _, errors in found] == [2, 2] and found[0][2].count("asked 1") == 1
    assert len(metrics(tmp_path / "r")) == 2
    facts = json.loads((tmp_path / "r" / "run.json").read_text())
    test = facts["result"]["test"]
    assert test["n"] == facts["data"]["images"]["test"]
    alone = json.loads(vptm("evaluate", tmp_path / "r", "--json")[1])
    assert (alone["n"], alone["accuracy"]) == (test["n"], test["accuracy"])
    assert alone["loss"] == pytest.approx(test["loss"], rel=1e-5), "what is tested is what was fitted"
    assert vptm("predict", *names[1:-1], tmp_path / "whole.csv")[0] == 0
    parts = [(tmp_path / f"n-{rank}-of-2.csv").read_text().splitlines() for rank in range(2)]
    assert abs(len(parts[0]) - len(parts[1])) <= 1
    rows = [[field.split(",")[:2] for field in lines[1:]] for lines in parts]
    whole = [line.split(",")[:2] for line in (tmp_path / "whole.csv").read_text().splitlines()[1:]]
    assert sorted(rows[0] + rows[1]) == sorted(whole)


def test_several_processes_predict_into_files(vptm: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = "vptm: 2 processes need --out, and pictures that each of them can list, got"
    assert vptm.refused("predict", tmp_path, "x.png") == (2, f"{line} no --out")
    assert vptm.refused("predict", tmp_path, "-", "--out", tmp_path / "n.csv") == (2, f"{line} - for stdin")
