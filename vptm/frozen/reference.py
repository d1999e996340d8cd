"""The definition of a prompted transformer: concatenate every row, run every row through every block, store all scores.

Slow and plain on purpose. All faster paths are tested against this file, and `vptm.check` compares with it on a user's
own model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vptm.frozen.parts import softmax_attention
from vptm.frozen.rows import AttentionFunction, PromptedRows


def reference_features(
    model: PromptedRows,
    images: Tensor,
    attention: AttentionFunction = softmax_attention,
    observe: Callable[[int, Tensor, Tensor, Tensor | None], None] | None = None,
) -> Tensor:
    """Rows `[prefix | patches | mask?]` after the last block and the backbone's final norm, (B, T, C); with the prompts
    last where the read-out averages them too.

    `observe(layer, rows before, rows after, learned keys and values)` is called for every block, with all of its rows,
    prompts last.
    """
    x = rows = model.reference_embed(images)
    batch, tokens = x.shape[:2]
    carried, rotary = None, model.rotary_embedding()
    for layer in range(len(model.backbone.blocks)):
        added = model.prompts.added(layer, batch)
        if added is not None:
            where = model.rows_added_to()
            x = torch.cat([x[:, : where.start], x[:, where] + added, x[:, where.stop :]], dim=1)
        entering = torch.cat([x, model.prompts(layer, batch, carried).to(x.dtype)], dim=1)
        keys_values = model.prompts.keys_values(layer, batch)
        crossing = model.prompts.crossing(layer, batch)
        rows = model.run_block(model.reference_block, layer, entering, attention, rotary, keys_values, crossing)
        if observe is not None:
            observe(layer, entering, rows, keys_values)
        x, carried = rows[:, :tokens], rows[:, tokens:]
    return model.backbone.norm(rows if model.pools_prompts else x)
