"""A backbone of your own, any timm VisionTransformer or Beit: prompts are learned and the module is left as it was.

The one here is small and random. `timm.create_model("vit_base_patch14_dinov2", pretrained=True)` is used alike.
"""

import torch
from timm.models.vision_transformer import VisionTransformer

import vptm

torch.manual_seed(0)
backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0)
before = vptm.weight_hash(backbone.state_dict())

model = vptm.open_model(backbone, num_classes=5, prompt_mode="deep", prompt_length=8)
print(type(model).__name__, "reads", model.readout)

images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
for _ in range(5):  # a loop of your own; vptm.fit is another
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    print(f"loss {loss.item():.3f}")

model.eval()
print(vptm.check(model, images))  # the largest difference from the model of the textbook, by path
assert vptm.weight_hash(backbone.state_dict()) == before
