"""The kernels without the model layer: they need torch alone, and run in Triton on a GPU and in PyTorch on a CPU."""

import torch
from torch.nn import functional as F

from vptm_kernels import prompted_attention, prototype_cosine

B, N, P, H, D, V, K = 2, 50, 10, 4, 16, 512, 20
torch.manual_seed(0)

# attention of tokens to a prompt prefix, shared by the batch, and to themselves
qkv = torch.randn(B, N, 3 * H * D)
prompts = torch.randn(P, 2 * H * D, requires_grad=True)
out = prompted_attention(qkv, prompts, num_heads=H)
out.square().sum().backward()

q, k, v = qkv.view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
prompt_k, prompt_v = prompts.detach().view(P, 2, H, D).permute(1, 2, 0, 3)
keys, values = (torch.cat([own, more.expand(B, -1, -1, -1)], 2) for own, more in ((k, prompt_k), (v, prompt_v)))
expected = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
print("prompted_attention:", tuple(out.shape), f"off by {(out - expected).abs().max():.1e}")

# from a hidden row over V visual tokens to cosines with K prototypes, without the logits
hidden, weight, bias = torch.randn(B, H * D), torch.randn(V, H * D), torch.randn(V)
projection, prototypes = torch.randn(32, V), torch.randn(K, 32)
cosines = prototype_cosine(hidden, weight, bias, prototypes, projection=projection)

embedded = F.linear(F.linear(hidden, weight, bias), projection)
expected = F.normalize(embedded, dim=-1) @ F.normalize(prototypes, dim=-1).mT
print("prototype_cosine:", tuple(cosines.shape), f"off by {(cosines - expected).abs().max():.1e}")
