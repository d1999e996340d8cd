"""One run folder, one process that trains in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_data import write_backbone
from tiny_runs import assert_same_run, make_model, run

from vptm.training import folder_lock
from vptm.training.callbacks import Callback
from vptm.training.folder_lock import FolderLock


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.safetensors")


class During(Callback):
    """Calls `act` in the first step."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def step(self, number: int, loss: Any, lr: float) -> None:
        if number == 0:
            self.act()


def test_a_run_folder_is_trained_in_by_one_at_a_time(backbone: Path, tmp_path: Path) -> None:
    """Two would write the same files in turn: neither's adapter would be the one that its metrics tell of."""
    folder = tmp_path / "r"
    refusals: list[dict[str, Any]] = []
    first, other = make_model(backbone), make_model(backbone)  # each is seeded, which a run must not be on its way

    def second() -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for how in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(ValueError, match=f"^run folder {folder} is in use: another process trains in it$"):
                run(other, folder, epochs=2, **how)
            refusals.append(how)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    run(first, folder, epochs=2, callbacks=[During(second)])
    assert len(refusals) == 3
    run(make_model(backbone), tmp_path / "alone", epochs=2)
    assert_same_run(folder, tmp_path / "alone")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_stopped_leaves_its_folder_free(
    backbone: Path, tmp_path: Path, error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """Else it could not be resumed until the interpreter ends; a refused resume leaves it free, too."""

    def stop() -> None:
        raise error

    try:
        run(make_model(backbone), tmp_path / "r", epochs=2, callbacks=[During(stop)])
    except RuntimeError as raised:
        kept = raised  # as an interactive session keeps the last error, with all its frames
        assert kept.__traceback__ is not None
    with pytest.raises(ValueError, match="lr was") as refusal:
        run(make_model(backbone), tmp_path / "r", epochs=2, resume=True, lr=0.5)
    assert refusal.traceback
    assert len(run(make_model(backbone), tmp_path / "r", epochs=2, resume=True).history) == 2


def test_where_folders_cannot_be_locked_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(folder_lock.fcntl, "flock", unsupported)
        FolderLock().take(tmp_path)
    monkeypatch.setattr(folder_lock, "fcntl", None)
    lock = FolderLock()
    lock.take(tmp_path)
    lock.release()
