"""Averages in half precision that move, by the kernels of csrc/cuda: they are the reference's."""

from test_rounding_kernels import *  # noqa: F403

del operations  # noqa: F821, for that of this folder
