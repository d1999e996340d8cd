"""Random calls of `prototype_cosine`, and the comparison with its definition in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from op_case import converted
from torch import Tensor

from vptm_kernels import FoldedHead, prototype_cosine, token_gram
from vptm_kernels.prototype_cosine.reference import prototype_cosine_reference
from vptm_kernels.testing import assert_close_to_exact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TENSORS = ("hidden", "token_weight", "token_bias", "prototypes", "projection", "projection_bias")


@dataclass(frozen=True)
class Case:
    """head: "projection", "tokens" (prototypes in token space), "gram" (the same with token_gram), "folded" or "tasks"
    (a folded head per task). tasks: class counts, or () for one task. grads: names that ask for a gradient."""

    batch: int = 3
    width: int = 10
    tokens: int = 37
    dim: int = 5
    classes: int = 4
    head: str = "projection"
    activation: str = "logits"
    biases: bool = True
    tasks: tuple[int, ...] = ()
    layout: str = "contiguous"
    scale: float = 1.0
    dtype: torch.dtype = torch.float64
    grads: tuple[str, ...] = TENSORS
    seed: int = 0

    def inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)

        def random(name: str, *shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return values.to(self.dtype).to(DEVICE).requires_grad_(name in self.grads)

        c, v, d = self.width, self.tokens, self.dim
        classes = sum(self.tasks) or self.classes
        in_tokens = self.head in ("tokens", "gram")
        call: dict[str, Any] = {"activation": self.activation}
        if self.layout == "sliced":
            call["hidden"] = random("hidden", self.batch, 3 * c)[:, c : 2 * c]
            weight = random("token_weight", v, c + 3, scale=self.scale)[:, 2 : c + 2]
        elif self.layout == "expanded":
            call["hidden"] = random("hidden", 1, c).expand(self.batch, -1)
            weight = random("token_weight", v, c, scale=self.scale)
        else:
            call["hidden"] = random("hidden", self.batch, c)
            weight = random("token_weight", v, c, scale=self.scale)
        call["prototypes"] = random("prototypes", classes, v if in_tokens else d)
        call["token_bias"] = random("token_bias", v, scale=self.scale) if self.biases else None
        if self.tasks:
            offsets = [0]
            for count in self.tasks:
                offsets.append(offsets[-1] + count)
            call["class_offsets"] = offsets
            ids = torch.randint(len(self.tasks), (self.batch,), generator=generator)
            call["task_ids"] = ids.to(DEVICE)
        if self.head in ("folded", "tasks"):
            shape = (len(self.tasks), d) if self.head == "tasks" else (d,)
            call["token_weight"] = FoldedHead(
                random("token_weight", *shape, c, scale=self.scale), random("token_bias", *shape, scale=self.scale)
            )
            call["token_bias"] = None
            return call
        call["token_weight"] = weight
        if self.head == "projection":
            call["projection"] = random("projection", d, v)
            call["projection_bias"] = random("projection_bias", d) if self.biases else None
        if self.head == "gram":
            call["token_gram"] = token_gram(weight.detach(), None if not self.biases else call["token_bias"].detach())
        return call

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


def leaves(call: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in TENSORS:
        value = call.get(name)
        if isinstance(value, FoldedHead):
            found["head weight"], found["head bias"] = value
        elif isinstance(value, Tensor):
            found[name] = value
    return {name: t for name, t in found.items() if t.requires_grad}


def reference(call: dict[str, Any]) -> Tensor:
    return prototype_cosine_reference(**{name: value for name, value in call.items() if name != "token_gram"})


def gradients(out: Tensor, call: dict[str, Any]) -> dict[str, Tensor]:
    found = leaves(call)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device).to(out.dtype)
    total = torch.where(out.isfinite(), out * upstream, 0).sum()
    return dict(zip(found, torch.autograd.grad(total, list(found.values()))))


def check(case: Case, impl: str = "torch", *, growth: float = 1.0) -> None:
    """Cosines and every gradient within the error budget of the case's dtype. growth: of the float64 tolerance, for
    adversarial scores."""
    call = case.inputs()
    found = prototype_cosine(**call, impl=impl)
    assert found.dtype == case.dtype
    exact_call = converted(call, torch.float64)
    exact = reference(exact_call)
    low = case.dtype != torch.float64
    eager_call = converted(call, case.dtype) if low else None
    eager = reference(eager_call) if eager_call is not None else None
    assert_close_to_exact(f"{case} {impl}", found, exact, eager, factor=2, tolerance=1e-12 * growth)
    if not leaves(call):
        return
    wanted = gradients(exact, exact_call)
    peers = gradients(eager, eager_call) if eager is not None and eager_call is not None else dict.fromkeys(wanted)
    for name, gradient in gradients(found, call).items():
        label = f"{case} {impl} gradient of {name}"
        assert_close_to_exact(label, gradient, wanted[name], peers[name], factor=3, tolerance=1e-10 * growth)
