"""Models in training loops that others wrote: they are given as they are, and what was learned is theirs."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import write_backbone
from torch.nn import functional as F

from vptm import PromptedBEiT, load_adapter, save_adapter
from vptm.models.config import ModelConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PromptedBEiT:
    torch.manual_seed(0)
    return PromptedBEiT(write_backbone(tmp_path_factory.mktemp("b") / "tiny.safetensors"), 3, prototype_dim=8)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(count))


def test_labels_give_the_loss_beside_the_scores(model: PromptedBEiT) -> None:
    pixels, labels = images(4), torch.tensor([0, 2, 1, 1])
    scores = model(pixels)
    assert isinstance(scores, torch.Tensor) and torch.equal(scores, model(pixel_values=pixels))
    shares = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
    for given in (labels, labels.int(), shares):
        out = model(pixels, labels=given)
        loss, logits = out
        assert out.loss is loss and torch.equal(logits, scores)
        assert torch.equal(loss, F.cross_entropy(scores, given.long() if given.dtype == torch.int32 else given))
    out.loss.backward()
    assert model.prompts.weight.grad is not None
    model.zero_grad()
    bf16 = copy.deepcopy(model).bfloat16()
    assert bf16(pixels.bfloat16(), labels=labels).loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, TypeError, "one of images and pixel_values must be given, got none"),
        ({"images": 1, "pixel_values": 1}, TypeError, "must be given, got both"),
        ({"images": 2, "labels": torch.tensor([0, 3])}, ValueError, r"labels must be in 0\.\.2, got 3 for image 1"),
        (
            {"images": 2, "labels": torch.tensor([0])},
            ValueError,
            r"labels must be \(2,\) integers or \(2, 3\) shares, got",
        ),
        ({"images": 2, "labels": torch.tensor([True, False])}, ValueError, r"got \(2,\) of torch.bool"),
        ({"images": 2, "labels": torch.tensor([0.5, 1.0])}, ValueError, r"got \(2,\) of torch.float32"),
    ],
)
def test_what_cannot_be_scored_is_named(
    model: PromptedBEiT, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    given = {name: images(value) if isinstance(value, int) else value for name, value in arguments.items()}
    with pytest.raises(kind, match=message):
        model(**given)


def test_no_parameter_that_is_trained_stays_without_a_gradient(model: PromptedBEiT) -> None:
    """DistributedDataParallel waits for the gradient of each, also of prompts that have no value."""
    for prompts in (0, 2):
        linear = PromptedBEiT(
            str(model.source), 3, prompt_length=prompts, readout="cls", verbalizer="linear", token_activation="hidden"
        )
        linear(images(2), labels=torch.tensor([0, 1])).loss.backward()
        assert all(parameter.grad is not None for parameter in linear.trainable_parameters())


def test_a_config_is_a_mapping_with_attributes(model: PromptedBEiT) -> None:
    """The adapter keeps the mapping, so what a trainer sets on the object must not reach it."""
    config = copy.deepcopy(model.config)
    config.use_cache = False  # type: ignore[attr-defined]
    assert config == dict(model.config) and "use_cache" not in config
    assert config.readout == config["readout"] and config.num_labels == 3  # type: ignore[attr-defined]
    assert json.loads(config.to_json_string()) == config.to_dict() == config  # type: ignore[attr-defined]
    assert getattr(config, "distributed_config", None) is None
    for copied in (pickle.loads(pickle.dumps(config)), copy.copy(config), config | {}):
        assert type(copied) is ModelConfig and copied == config
    config.readout = "cls"  # type: ignore[attr-defined]
    assert config["readout"] == "cls"


def test_the_hugging_face_trainer_takes_the_model_itself(model: PromptedBEiT, tmp_path: Path) -> None:
    """It reads and sets attributes of `config`, passes pixel_values and labels, and saves and loads state dicts. Its
    default optimiser is fused: prompts kept between calls would be those of the first evaluation at every other."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = copy.deepcopy(model)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    pixels, labels = images(12), torch.arange(12) % 3
    data: Any = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels)]
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        load_best_model_at_end=True,
        optim="adamw_torch_fused",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    said: list[tuple[float, float]] = []

    class Textbook(TrainerCallback):
        def on_evaluate(self, *_: Any, metrics: Any, **__: Any) -> None:
            fresh = copy.deepcopy(model).eval()
            fresh.impl = "reference"
            with torch.no_grad():
                said.append((metrics["eval_loss"], F.cross_entropy(fresh(pixels), labels).item()))

    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[Textbook()])
    trainer.train()
    assert len(said) == len({loss for loss, _ in said}) == 3
    assert all(loss == pytest.approx(true, rel=1e-5) for loss, true in said)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
    with torch.no_grad():
        assert F.cross_entropy(model.eval()(pixels), labels).item() == pytest.approx(best, rel=1e-5)
    predicted = trainer.predict([{"pixel_values": x} for x in pixels])  # type: ignore[arg-type]
    assert torch.equal(torch.from_numpy(predicted.predictions).argmax(1), model(pixels).argmax(1))
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())
    save_adapter(model, tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(load_adapter(tmp_path / "adapter").parameters(), model.parameters()))
