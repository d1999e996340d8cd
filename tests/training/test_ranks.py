"""Several processes train what one does: the same losses, one run folder, and an end that all of them see."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import write_backbone, write_pictures
from tiny_runs import metrics
from torch.utils.data import DataLoader, TensorDataset

from vptm import PromptedBEiT, fit, load_adapter
from vptm.data.balance import balanced_sampler
from vptm.training.state import STATE_FILE

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="several processes need accelerate")
ROOT = Path(__file__).parents[2]
IMPORTS = f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_ranks as t; P = t.Path"


def start(*command: str, world: int = 2) -> list[subprocess.Popen[str]]:
    """`command` in processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(world):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path}
        pipe: Any = subprocess.PIPE
        run = [sys.executable, *command]
        processes.append(subprocess.Popen(run, env=environment, stdout=pipe, stderr=pipe, text=True))
    return processes


def outcomes(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        printed = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, printed)]


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
    Path(folder / f"seen-{os.environ['RANK']}.json").write_text(json.dumps([seen, errors]))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


def test_two_processes_train_as_one_does(backbone: Path, tmp_path: Path) -> None:
    """Losses to 1e-10 in float64, where a batch has a picture for one of them alone; a resumed run is bitwise the same;
    one that sees NaN stops both; what does not work together is refused in both."""
    code = f"{IMPORTS}\nt.scenarios(P({str(backbone)!r}), P({str(tmp_path)!r}))"
    for status, _, errors in outcomes(start("-c", code)):
        assert status == 0, errors
    seen, errors = json.loads((tmp_path / "seen-0.json").read_text())
    others, same = json.loads((tmp_path / "seen-1.json").read_text())
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


def test_a_killed_process_ends_the_run_and_leaves_a_usable_folder(backbone: Path, tmp_path: Path) -> None:
    lines = [
        IMPORTS,
        "def die(pictures, index, image):",
        "    if os.environ['RANK'] == '1' and pictures.reads == 1 + 6 + 2: os._exit(9)",
        "    return image",
        f"t.trained(P({str(backbone)!r}), die, run_dir=P({str(tmp_path / 'r')!r}))",
    ]
    first, second = outcomes(start("-c", "\n".join(lines)))
    assert second[0] == 9 and first[0] == 1
    assert "another process of the run ended, the run folder holds the last finished epoch" in first[2]
    assert len(metrics(tmp_path / "r")) == 1 and load_adapter(tmp_path / "r").num_classes == 3
    _, result = trained(backbone, run_dir=tmp_path / "r", resume=True)
    assert len(result.history) == 2


def test_the_command_writes_and_prints_once(backbone: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 8)
    more = ["--readout", "cls", "--verbalizer", "linear", "--token-activation", "hidden", "--out", str(tmp_path / "r")]
    where = ["--model", str(backbone), "--data", str(tmp_path / "pictures"), "--device", "cpu"]
    found = outcomes(start("-m", "vptm", "train", *where, "--shots", "4", "--epochs", "2", *more))
    assert [status for status, _, _ in found] == [0, 0], found[0][2] + found[1][2]
    assert "test accuracy" in found[0][1] and found[1][1] == "" and "epoch" not in found[1][2]
    assert len(metrics(tmp_path / "r")) == 2
    facts = json.loads((tmp_path / "r" / "run.json").read_text())
    assert facts["result"]["test"]["n"] == facts["data"]["images"]["test"]
