"""What C++ is asked of the dense consistency loss, asked of the Triton kernels."""

from __future__ import annotations

from test_consistency import *  # noqa: F403
