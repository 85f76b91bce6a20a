"""Averages in half precision that move, by the kernels of csrc/cuda: they are the reference's."""

from __future__ import annotations

from test_rounding_kernels import *  # noqa: F403, isort: skip
from test_cuda_on_host import operations, pytestmark  # noqa: F401, compiled for this processor
