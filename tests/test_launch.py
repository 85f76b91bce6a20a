"""A launch that is repeated runs the code that Triton would choose, on its own arguments."""

from __future__ import annotations

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks import aot  # noqa: E402  where Triton is
from fastmt.kernels import launch as launching  # noqa: E402
from fastmt.kernels.ema import scale_kernel  # noqa: E402
from fastmt.kernels.launch import launch  # noqa: E402
from fastmt.kernels.sums import consistency_total_kernel  # noqa: E402

compiles = pytest.mark.skipif(
    not isinstance(scale_kernel, triton.JITFunction), reason="the interpreter compiles nothing"
)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    monkeypatch.setattr(launching, "_compiled", {})


class _OnAnotherDevice(torch.Tensor):
    def get_device(self):
        return 1


class _Code(triton.compiler.CompiledKernel):
    def __init__(self, ran):
        self.ran = ran

    def __getitem__(self, grid):
        return lambda *arguments: self.ran.append((grid, arguments))


class _Kernel:
    """A kernel of a number, a tensor and a constant, as launch() sees it."""

    def __init__(self):
        self.arg_names = ["number", "data", "BLOCK"]
        self.asked, self.ran = [], []

    def fn(self):
        raise NotImplementedError

    def __getitem__(self, grid):
        def dispatch(*arguments, **options):
            self.asked.append((grid, arguments, options))
            return _Code(self.ran)

        return dispatch


def test_the_second_launch_asks_no_dispatcher_and_takes_its_own_arguments():
    kernel, first, second = _Kernel(), torch.zeros(16), torch.ones(16)
    launch(kernel, 3, 0.5, first, BLOCK=64, num_warps=8)
    launch(kernel, 5, 0.25, second, BLOCK=64, num_warps=8)
    options = {"BLOCK": 64, "num_warps": 8, "num_stages": 3}
    assert kernel.asked == [((3,), (0.5, first), options)]
    ((grid, (number, data, block)),) = kernel.ran
    assert (grid, number, block) == ((5, 1, 1), 0.25, 64)
    assert data is second


@pytest.mark.parametrize(
    "other",
    [
        {"BLOCK": 128},
        {"num_warps": 4},
        {"num_stages": 1},
        {"data": torch.zeros(17)[1:]},
        {"data": torch.zeros(16, dtype=torch.bfloat16)},
        {"data": torch.zeros(16).as_subclass(_OnAnotherDevice)},
        {"data": (torch.zeros(16),)},
        {"data": None},
        {"number": 1},
        {"number": None},
    ],
    ids=str,
)
def test_what_triton_may_specialise_on_asks_the_dispatcher(other):
    kernel = _Kernel()
    usual = {"number": 0.5, "data": torch.zeros(16), "BLOCK": 64, "num_warps": 8, "num_stages": 3}
    for call in (usual, {**usual, **other}):
        number, data, options = call["number"], call["data"], dict(call)
        del options["number"], options["data"]
        launch(kernel, 1, number, data, **options)
    assert len(kernel.asked) == 2
    assert not kernel.ran


def test_constants_in_another_order_than_the_kernel_takes_them_are_refused():
    with pytest.raises(TypeError, match=r"got constants \['WIDTH'\], expected \['BLOCK'\]"):
        launch(_Kernel(), 1, 0.5, torch.zeros(16), WIDTH=64)


def test_only_so_many_launches_are_remembered(monkeypatch):
    monkeypatch.setattr(launching, "MOST", 4)
    kernel, data = _Kernel(), torch.zeros(16)
    for number in range(10):
        launch(kernel, 1, number, data, BLOCK=64)
    assert len(launching._compiled) <= 4


@compiles
def test_launches_of_equal_traits_are_of_the_same_code_to_triton():
    calls = [
        (data[offset:], elements, torch.ones(()), torch.ones(()))
        for data in (torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16))
        for offset in (0, 1, 16, 17)
        for elements in (1, 2, 15, 16, 2**31, 2**31 + 1)
    ]
    _check(scale_kernel, calls, {"BLOCK": 64})


@compiles
def test_numbers_that_are_not_whole_change_no_code():
    sums, results = torch.zeros(5, 32), [torch.zeros(()) for _ in range(4)]
    calls = [(sums, 32, *results, pixels, 1.0) for pixels in (1.0, 16.0, 0.5, 1e30)]
    constants = {"NORMALIZE": "all", "RATIO": False, "COMPLETE": True, "ROWS": 8, "BLOCK": 1024}
    assert _check(consistency_total_kernel, calls, constants) == 1


def _check(kernel, calls, constants) -> int:
    """Compile each call as Triton's dispatcher would; the number of codes."""
    with aot.compiling("sm_90") as launches:
        for arguments in calls:
            launch(kernel, 1, *arguments, **constants)
    assert len(launches) == len(calls)  # where nothing is launched, nothing is remembered
    traits = [launching._read(arguments)[0] for arguments in calls]
    pairs = list(zip(traits, launches, strict=True))
    for (one, made), (other, also) in itertools.combinations(pairs, 2):
        if one == other:
            assert made.compiled is also.compiled
    return len({id(made.compiled) for made in launches})
