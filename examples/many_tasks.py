"""Two tasks learned apart and answered in one batch: which of ten kinds a picture shows, and whether it is a shoe."""

import argparse

import numpy as np
import torch
from torch.utils.data import DataLoader

import vptm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--shots", type=int, default=16, help="pictures of a class to learn from")
parser.add_argument("--epochs", type=int, default=20)
options = parser.parse_args()

data = vptm.load_data("builtin")
shoes = [data.classes.index(name) for name in ("Sandal", "Sneaker", "Ankle boot")]
few = vptm.few_shot(data.train, options.shots)
asked = {"kind": few, "shoe": few.with_labels(np.isin(few.labels, shoes).astype(int), ["no", "yes"])}

bank = vptm.TaskBank("builtin")
for task, pictures in asked.items():
    model = vptm.open_model("builtin", len(pictures.classes), prompt_mode="deep", prompt_length=4)
    batches = DataLoader(pictures.with_transform(vptm.transforms(model, train=True)), batch_size=32, shuffle=True)
    vptm.fit(model, batches, epochs=options.epochs, lr=2e-3, weight_decay=0.1, progress=False)
    bank.add(task, model.eval())  # what was learned; the backbone is the bank's

test = data.test.with_transform(vptm.transforms(model))
chosen = range(0, len(test), 15)
images = torch.stack([test[index][0] for index in chosen])
labels = torch.tensor([test[index][1] for index in chosen])
scores = bank.predict(torch.cat([images, images]), ["kind"] * len(images) + ["shoe"] * len(images))
kind, shoe = scores.argmax(1).chunk(2)
right = {"kind": kind == labels, "shoe": shoe == torch.isin(labels, torch.tensor(shoes))}
print(", ".join(f"{task} {found.float().mean():.0%}" for task, found in right.items()))
