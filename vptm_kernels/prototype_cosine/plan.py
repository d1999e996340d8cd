"""Which exact way is cheapest, counted in multiply-adds.

With B images, width C, V tokens and a reader of D rows (the projection, or the prototypes when there is none):

    keep     logits stored for backward   B V (C + D)      + B V (C + D) for hidden  + B V D for the reader
    stream   logits computed twice        the same                                   + B V C to compute them again
    fold     reader @ token_weight once   D V C + B D C    + B D C for hidden        + D V C + B D C for the reader

A training step for hidden and reader at C = 768, V = 8192, D = 128 is cheapest folded from B = 105 against keeping;
inference on unfolded arguments from B = 112. Only logits fold, and without a projection only with the Gram factor of
the token head. The PyTorch implementation alone keeps logits, when they fit 16 MB. Triton folds whatever can be folded,
so that no smaller last batch of an epoch needs kernels that the others did not; what that costs a small batch, 0.8 G
multiply-adds beside the reading of the token head, is not yet measured.
"""

from __future__ import annotations

from collections.abc import Sequence

KEEP_BYTES = 16 * 2**20


def can_fold(activation: str, squares: bool, has_gram: bool, needs: Sequence[bool]) -> bool:
    """needs: whether hidden, token_weight, token_bias, reader ask for a gradient."""
    return activation == "logits" and (not squares or (has_gram and not needs[1] and not needs[2]))


def multiply_adds(
    plan: str,
    batch: int,
    width: int,
    tokens: int,
    dim: int,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
) -> tuple[int, int]:
    """What a plan costs forward, and backward for the gradients in `needs`."""
    if plan == "fold":
        fold, apply = dim * tokens * width, batch * dim * width
        norm = batch * width * width if squares else 0
        backward = fold * (needs[1] + needs[3]) + apply * (needs[0] + (needs[1] or needs[3])) + norm * needs[0]
        return fold + apply + norm, backward
    logits = batch * tokens * width
    for_hidden = needs[0] or needs[1] or needs[2]
    backward = batch * tokens * (for_hidden * dim + (needs[0] + needs[1]) * width + needs[3] * dim)
    if plan == "stream" and (needs[3] or (for_hidden and (squares or activation != "logits"))):
        backward += logits
    return logits + batch * tokens * dim, backward


def choose_plan(
    batch: int,
    width: int,
    tokens: int,
    dim: int,
    activation: str,
    squares: bool,
    has_gram: bool,
    needs: Sequence[bool],
    kept_size: int,
    keeping: bool,
) -> str:
    """ "keep", "stream" or "fold". kept_size: elements that may be kept for backward."""
    training = any(needs)
    plans = ["stream"]
    if training and keeping and batch * tokens <= kept_size:
        plans.append("keep")
    if can_fold(activation, squares, has_gram, needs) and (not training or dim * width <= kept_size):
        if not keeping:
            return "fold"
        plans.append("fold")
    shape = (batch, width, tokens, dim, activation, squares, needs)
    return min(plans, key=lambda plan: sum(multiply_adds(plan, *shape)))


def size_to_keep(
    batch: int,
    width: int,
    tokens: int,
    dim: int,
    activation: str,
    squares: bool,
    has_gram: bool,
    needs: Sequence[bool],
    itemsize: int,
    keeping: bool,
) -> int:
    """Elements the cheapest plan keeps between forward and backward."""
    if not any(needs):
        return 0
    shape = (batch, width, tokens, dim, activation, squares, has_gram, needs)
    plan = choose_plan(*shape, max(KEEP_BYTES // itemsize, dim * width), keeping)
    return {"keep": batch * tokens, "fold": dim * width, "stream": 0}[plan]
