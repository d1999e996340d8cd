"""What our tests measure kernels with, for users' own tests as well: the float64 oracle and the error budget."""

from .budget import assert_close_to_exact, largest_error
from .prompted_attention import AttentionCase

__all__ = ["AttentionCase", "assert_close_to_exact", "largest_error"]
