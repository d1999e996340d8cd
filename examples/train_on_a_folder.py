"""A frozen backbone learns the classes of a folder, photos/CLASS/*.jpg, and names the classes of further pictures.

python examples/train_on_a_folder.py photos --model beitv2_base_patch16_224_pt1k.pth --predict holiday.jpg
"""

import argparse

import torch
from torch.utils.data import DataLoader

import vptm
from vptm.data.decoding import read_image

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "folder", help="a folder per class, or train, val and test folders with those, or a csv of path,label"
)
parser.add_argument("--model", default="builtin", help="a checkpoint file, a timm name or a Hugging Face folder")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--predict", nargs="*", default=[], metavar="PICTURE")
options = parser.parse_args()

data = vptm.load_data(options.folder)  # divided within each class where the folder is not
model = vptm.open_model(options.model, len(data.classes))
model.class_names = data.classes
prepare = vptm.transforms(model)

train = data.train.with_transform(vptm.transforms(model, train=True, flip=data.flip))
val, test = (DataLoader(part.with_transform(prepare), batch_size=64) for part in (data.val, data.test))
vptm.fit(model, DataLoader(train, batch_size=32, shuffle=True), val, epochs=options.epochs, lr=2e-3)
print(f"test accuracy {vptm.evaluate(model, test)['accuracy']:.2%}")
vptm.save_adapter(model, "adapter")

for path in options.predict:
    with torch.inference_mode():
        scores = model(prepare(read_image(path))[None]).softmax(-1)[0]
    print(f"{path}: {data.classes[int(scores.argmax())]}, {scores.max():.0%}")
