"""The programs in examples/ are what a user copies first: each runs as it stands, on a CPU and without a network."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny_data import write_backbone, write_pictures

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs an example in an empty folder and returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_examples_are_short_and_all_tested() -> None:
    """One that is not run here rots; one that does not fit a screen is not read."""
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path.name
        assert f'run("{path.name}"' in source, path.name


def test_drop_in(run) -> None:
    printed = run("drop_in.py", "--shots", "2", "--epochs", "1")
    assert re.search(r"test accuracy \d+\.\d+%", printed) and "PromptedBEiT is back" in printed


def test_many_tasks(run) -> None:
    """Were a picture answered by the other task, it would be right by chance: a tenth of the kinds, and fewer shoes."""
    printed = run("many_tasks.py", "--shots", "4", "--epochs", "3")
    kind, shoe = map(int, re.fullmatch(r"kind (\d+)%, shoe (\d+)%\n", printed).groups())  # type: ignore[union-attr]
    assert kind > 35 and shoe > 80


def test_lightning_module(run) -> None:
    """Lightning validates first, in inference mode, what it then trains, and moves and saves it."""
    pytest.importorskip("lightning", reason="an example of it")
    import vptm

    printed = run("lightning_module.py", "--steps", "5")
    assert float(re.search(r"validation accuracy (\d+\.\d+)%", printed)[1]) > 20  # type: ignore[index]
    vptm.load_adapter("clothing")  # refused where the backbone is not what it was
    assert list(Path("checkpoints").glob("*.ckpt"))


def test_accelerate_loop(run) -> None:
    pytest.importorskip("accelerate", reason="an example of it")
    from accelerate.state import AcceleratorState

    import vptm

    AcceleratorState._reset_state(reset_partial_state=True)  # one for the whole process, also what other tests left
    try:
        printed = run("accelerate_loop.py", "--epochs", "1", "--precision", "bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert float(re.search(r"test accuracy (\d+\.\d+)%", printed)[1]) > 20  # type: ignore[index]
    vptm.load_adapter("clothing")


VALIDATE = """
import sys
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, load_checkpoint
from timm.utils import accuracy

model = create_model(
    "vptm_beitv2_base_patch16_224", pretrained=False, num_classes=3, in_chans=1, global_pool=None, scriptable=False,
    source=sys.argv[2], prompt_mode="deep", prototype_dim=8,
)
load_checkpoint(model, "last.pth.tar", False)
config = resolve_data_config({}, model=model, use_test_size=True)
model = model.to(device="cpu", dtype=None).to(memory_format=torch.channels_last).eval()
dataset = create_dataset("", root=sys.argv[1], split="validation", input_img_mode="L")
loader = create_loader(
    dataset, input_size=config["input_size"], batch_size=4, use_prefetcher=False, num_workers=0, mean=config["mean"],
    std=config["std"], interpolation=config["interpolation"], crop_pct=config["crop_pct"], device=torch.device("cpu"),
)
with torch.inference_mode():
    scores, labels = zip(*((model(images), labels) for images, labels in loader))
top1, top3 = accuracy(torch.cat(scores), torch.cat(labels), topk=(1, 3))
print(f"top1 {top1.item():.4f} top3 {top3.item():.1f}")
"""


def test_timm_scripts(run, tmp_path: Path) -> None:
    """What timm's validate.py calls, on the state dict that its train.py saves: the accuracy is `vptm.evaluate`'s."""
    import torch
    from torch.utils.data import DataLoader

    import vptm

    write_pictures(tmp_path / "photos" / "validation", 7)
    (tmp_path / "validate.py").write_text(VALIDATE)
    backbone = write_backbone(tmp_path / "backbone.safetensors")
    torch.manual_seed(3)
    model = vptm.PromptedBEiT(backbone, 3, prompt_mode="deep", prototype_dim=8)
    torch.save({"epoch": 1, "arch": "vptm", "state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    printed = run("timm_scripts.py", "validate.py", "photos", str(backbone))
    data = vptm.load_data(tmp_path / "photos" / "validation", transform=vptm.transforms(model), holdout=False)
    expected = vptm.evaluate(model, DataLoader(data.test, 21))["accuracy"]  # type: ignore[arg-type]
    assert f"top1 {100 * expected:.4f} top3 100.0" in printed and 0 < expected < 1
    assert "vptm_beitv2_large_patch16_224" in printed


def test_train_on_a_folder(run, tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 10)
    model = str(write_backbone(tmp_path / "backbone.safetensors"))
    picture = next((tmp_path / "photos").rglob("*.png"))
    printed = run("train_on_a_folder.py", "photos", "--model", model, "--epochs", "1", "--predict", str(picture))
    assert re.search(r"test accuracy \d+\.\d+%", printed)
    assert re.search(rf"{picture.name}: \w+, \d+%", printed) and (tmp_path / "adapter").is_dir()


def test_own_backbone(run) -> None:
    printed = run("own_backbone.py")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert printed.startswith("PromptedViT reads cls") and losses[-1] < losses[0]


def test_kernels_alone(run) -> None:
    """The plain PyTorch beside every op is what it is documented to equal."""
    printed = run("kernels_alone.py")
    errors = [float(error) for error in re.findall(r"off by (\S+)", printed)]
    assert len(errors) == 2 and max(errors) < 1e-5
