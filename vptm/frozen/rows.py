"""What the encoder and the reference know of a model: the rows it makes, and what was learned to join them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vptm_kernels import FoldedHead

# (query, key, value, bias or None) -> attended values, all (B, H, T, D), the bias (1, H, T, T)
AttentionFunction = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


Result = TypeVar("Result")


class PreparedHead(NamedTuple):
    """Constants of a verbalizer that does not change any more: token head and projection as one map, and unit
    prototypes (K, d)."""

    head: FoldedHead
    prototypes: Tensor


class Prompts(Protocol):
    """What is learned and joins the rows; `vptm.models.prompts.PromptBank` says what each means."""

    weight: nn.Parameter
    projection: nn.Linear | None
    training: bool
    mode: str
    kind: str
    placement: str
    added_to: str
    length: int
    dropout: float
    blocks: range

    def columns(self, block: int) -> Tensor | None: ...
    def mixing(self, block: int) -> float | Tensor: ...
    def role(self, block: int) -> str: ...
    def per_sample(self) -> bool: ...
    def rows(self, block: int, batch: int) -> Tensor: ...
    def expanded(self) -> Tensor: ...
    def added(self, block: int, batch: int) -> Tensor | None: ...
    def keys_values(self, block: int, batch: int) -> Tensor | None: ...
    def crossing(self, block: int, batch: int) -> Tensor | None: ...
    def __call__(self, block: int, batch: int, carried: Tensor | None = None) -> Tensor: ...
    def modules(self) -> Iterator[nn.Module]: ...


class Verbalizer(Protocol):
    """What scores the read-out row."""

    def prepare(self, lm_head: nn.Linear | None) -> PreparedHead | None: ...
    def modules(self) -> Iterator[nn.Module]: ...


class PromptedRows(nn.Module):
    """A transformer whose rows stand as `[prefix | patches | mask? | prompts]` wherever they are kept; the prefix is
    the class token and what comes with it."""

    backbone: Any
    prompts: Prompts
    verbalizer: Verbalizer
    num_features: int
    num_patches: int
    num_rows: int
    impl: str
    mask_token: nn.Parameter | None
    lm_head: nn.Linear | None
    prompt_bias: nn.Parameter | None
    extra_bias = "zero"
    grad_checkpointing = False
    block_listener: Callable[[], None] | None = None

    @abstractmethod
    def embed(self, images: Tensor, patch_embed: nn.Module | None = None) -> Tensor:
        """Rows `[prefix | patches | mask?]` before block 0, in memory of their own; by another `patch_embed` than the
        backbone's where there is one."""
        raise NotImplementedError

    @abstractmethod
    def reference_block(
        self,
        layer: int,
        rows: Tensor,
        attention: AttentionFunction,
        rotary: Tensor | None = None,
        keys_values: Tensor | None = None,
        crossing: Tensor | None = None,
    ) -> Tensor:
        """Block `layer` on all rows (B, T, C), prompts last, in eager PyTorch; `rotary` is what `rotary_embedding`
        gave, `keys_values` (P, 2C) or (B, P, 2C) are learned ones that every row attends to as well, `crossing` (P, C)
        or (B, P, C) the prompts of a cross-attention."""
        raise NotImplementedError

    @abstractmethod
    def attention_weights(self, layer: int, rows: Tensor, keys_values: Tensor | None = None) -> Tensor:
        """What each of the rows (B, T, C) that enter block `layer` attends to, (B, H, T, T), softmax over the last;
        with learned `keys_values` (B, H, T, T + P)."""
        raise NotImplementedError

    @abstractmethod
    def forward_hidden(self, images: Tensor) -> Tensor:
        """The normalised read-out row (B, C)."""
        raise NotImplementedError

    @abstractmethod
    def unread_prompts(self) -> str | None:
        """What keeps prompts from being asked for their rows, in words: then the module itself has to run. None where
        nothing does."""
        raise NotImplementedError

    @abstractmethod
    def fold_while_tracing(self) -> bool:
        """Whether this model runs folded, asked by a trace: constants are made at once, of real weights."""
        raise NotImplementedError

    def reference_embed(self, images: Tensor) -> Tensor:
        """`embed` as the textbook writes it."""
        return self.embed(images)

    def rotary_embedding(self) -> Tensor | None:
        """What turns queries and keys of patches, as `vptm.frozen.rotary` has it, asked for once in a forward pass: a
        backbone in training may draw it. None without rotary positions."""
        return None

    def position_bias(self, layer: int, *, learned: bool = True) -> Tensor | None:
        """Bias (H, T, T) that block `layer` adds to its scores, None where it adds nothing."""
        return None

    @property
    def bias_is_shared(self) -> bool:
        """Whether all blocks add the same position bias."""
        return True

    def rows_added_to(self) -> slice:
        """Rows that added prompts are added to."""
        first = int(self.backbone.num_prefix_tokens)
        return slice(0 if self.prompts.added_to == "class_and_patches" else first, first + self.num_patches)

    def mean_rows(self) -> slice:
        """Rows that a mean read-out averages."""
        return slice(1, 1 + self.num_patches)

    @property
    def attention_pool(self) -> nn.Module | None:
        """What pools the rows of `mean_rows()`, after the final norm, by attention; None where they are averaged."""
        return None

    @property
    def pools_prompts(self) -> bool:
        """Whether the read-out averages prompt rows too, so that the last block has to compute them."""
        return False

    def run_block(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)`, its activations recomputed in backward where `grad_checkpointing` asks for it; before and
        after, `block_listener` is called where there is one."""
        listener = self.block_listener
        if listener is not None:
            listener()
        if self.grad_checkpointing and torch.is_grad_enabled():
            out: Result = checkpoint(function, *args, use_reentrant=False)
        else:
            out = function(*args)
        if listener is not None:
            listener()
        return out
