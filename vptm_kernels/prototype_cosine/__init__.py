"""Cosine similarity of a hidden state's visual-token prediction to class prototypes."""

from .api import prototype_cosine
from .folding import FoldedHead, fold_head, token_gram

__all__ = ["FoldedHead", "fold_head", "prototype_cosine", "token_gram"]
