"""Ten kinds of clothing from 16 pictures each, on the small model and pictures that come with the package."""

import argparse

from torch.utils.data import DataLoader

import vptm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--shots", type=int, default=16, help="pictures of a class to learn from")
parser.add_argument("--epochs", type=int, default=40)
options = parser.parse_args()

data = vptm.load_data("builtin")
model = vptm.open_model("builtin", len(data.classes), prompt_length=10)
model.print_trainable_parameters()

few = vptm.few_shot(data.train, options.shots).with_transform(vptm.transforms(model, train=True))
test = DataLoader(data.test.with_transform(vptm.transforms(model)), batch_size=256)
vptm.fit(model, DataLoader(few, batch_size=32, shuffle=True), epochs=options.epochs, lr=2e-3, weight_decay=0.1)
print(f"test accuracy {vptm.evaluate(model, test)['accuracy']:.2%}")

vptm.save_adapter(model, "clothing")  # what was learned, about 0.5 MB; the backbone is found again by its name
print(type(vptm.load_adapter("clothing")).__name__, "is back")
