"""Shared fixtures: which implementation answers, and allocations that show if left unfilled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

import fastmt
from fastmt import backends, cpp_backend

settings.register_profile(
    "fastmt",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastmt")


def pytest_collection_modifyitems(items):
    """The one test that takes minutes starts first, or it is left to run alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_triton.py")


@pytest.fixture
def poisoned():
    """torch.empty, also inside the kernels, starts as NaN (integers as their largest value)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def one_thread():
    """Small tensors are sooner done by one thread; test_kernels.py compares thread counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kernels(poisoned, one_thread):
    """Every call is answered by the C++ kernels, or raises."""
    if missing := cpp_backend.missing():
        pytest.skip(missing)
    with fastmt.backend("cpp", strict=True):
        yield


@pytest.fixture(params=["cpp", "eager"])
def either(request, poisoned, one_thread):
    """Once the C++ kernels, once the reference: for what both must do alike."""
    if request.param == "cpp" and (missing := cpp_backend.missing()):
        pytest.skip(missing)
    with fastmt.backend(request.param, strict=True):
        yield request.param


@pytest.fixture
def forgotten_warnings(monkeypatch):
    """No fallback has been warned about yet."""
    monkeypatch.setattr(backends, "_warned", set())


@pytest.fixture(autouse=True)
def forgotten_choices(monkeypatch):
    """A test may change what serves a call."""
    monkeypatch.setattr(backends, "_answers", {})


@pytest.fixture
def folders(tmp_path):
    """A domain by day with labels and one by dusk, in tmp_path."""
    from adapt_runs import write_domains  # with Pillow, which most tests do without

    return write_domains(tmp_path)


@pytest.fixture
def one_graph_and_no_other():
    """Compiled anew in each test; a second compilation of the same code is an error.

    Not from inductor's cache on the disk either: a graph there names an operation, and keeps what
    an older version of the operation returned.
    """
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with (
        fastmt.backend("cpp", strict=True),
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.compiler.config.patch(force_disable_caches=True),
    ):
        yield
    torch.compiler.reset()
