"""What C++ is asked of the dense cross-entropy, asked of the Triton kernels."""

from __future__ import annotations

from test_cross_entropy import *  # noqa: F403
