"""Compiling without a break, and how many graphs that took."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters


def compiled(function, backend="aot_eager", **options):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def graphs():
    """How many graphs dynamo has captured since the last reset."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]
