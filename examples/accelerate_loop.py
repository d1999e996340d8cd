"""A prompted model in a loop of your own with Accelerate: accelerate launch examples/accelerate_loop.py

Of several processes, the batch size is that of each.
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import vptm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--precision", default="no", help="or bf16, which is PyTorch's autocast")
options = parser.parse_args()

data = vptm.load_data("builtin")
model = vptm.open_model("builtin", len(data.classes))
few = vptm.few_shot(data.train, 16).with_transform(vptm.transforms(model, train=True))
test = DataLoader(data.test.with_transform(vptm.transforms(model)), batch_size=256)

accelerator = Accelerator(mixed_precision=options.precision, cpu=not torch.cuda.is_available())
optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=2e-3, weight_decay=0.1)
wrapped, optimiser, train, test = accelerator.prepare(
    model, optimiser, DataLoader(few, batch_size=32, shuffle=True), test
)
for _ in range(options.epochs):
    for images, labels in train:
        accelerator.backward(wrapped(images, labels=labels).loss)
        optimiser.step()
        optimiser.zero_grad()

wrapped.eval()
with torch.inference_mode():
    found = [accelerator.gather_for_metrics(wrapped(images).argmax(1) == labels) for images, labels in test]
accelerator.print(f"test accuracy {torch.cat(found).float().mean():.2%}")
if accelerator.is_main_process:
    vptm.save_adapter(accelerator.unwrap_model(wrapped), "clothing")
