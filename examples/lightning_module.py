"""A prompted model in Lightning (pip install lightning), on the small model and pictures that come with the package."""

import argparse

import lightning
import torch
from torch.utils.data import DataLoader

import vptm


class Prompted(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(batch[0], labels=batch[1]).loss

    def validation_step(self, batch, _):
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.trainable_parameters(), lr=2e-3, weight_decay=0.1)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--precision", default="32-true")
options = parser.parse_args()

data = vptm.load_data("builtin")
model = vptm.open_model("builtin", len(data.classes))
few = vptm.few_shot(data.train, 16).with_transform(vptm.transforms(model, train=True))
val = DataLoader(data.val.with_transform(vptm.transforms(model)), batch_size=64)
trainer = lightning.Trainer(max_steps=options.steps, precision=options.precision, logger=False)
trainer.fit(Prompted(model), DataLoader(few, batch_size=32, shuffle=True), val)
print(f"validation accuracy {float(trainer.callback_metrics['accuracy']):.2%}")
vptm.save_adapter(model, "clothing")
