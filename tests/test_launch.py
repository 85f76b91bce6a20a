"""A launch that is repeated runs the code that Triton would choose, on its own arguments."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks import aot  # noqa: E402  where Triton is
from fastmt import kernels  # noqa: E402
from fastmt.kernels import launch as launching  # noqa: E402
from fastmt.kernels.ema import scale_kernel  # noqa: E402
from fastmt.kernels.launch import GIVEN, Launch, launch  # noqa: E402
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
    module = None  # that its end would unload, from Triton 3.9 on

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
    options = {"BLOCK": 64, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
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


@pytest.mark.parametrize(
    ("taken", "spilled", "held"), [(168, 0, None), (169, 0, 168), (255, 4, None)]
)
def test_a_kernel_that_takes_more_registers_is_held_to_them_if_it_keeps_none_in_memory(
    taken, spilled, held, monkeypatch
):
    kernel, asked = _Kernel(), []

    def warmup(*arguments, grid, maxnreg=None, **options):
        asked.append(maxnreg)
        if maxnreg is None:
            return SimpleNamespace(run=launch, n_regs=taken, n_spills=0)
        return SimpleNamespace(run=launch, n_regs=maxnreg, n_spills=spilled)

    monkeypatch.setattr(kernel, "warmup", warmup, raising=False)
    for _ in range(2):
        launch(kernel, 3, 0.5, torch.zeros(16), BLOCK=64, registers=168)
    ((_, _, options),) = kernel.asked
    assert asked == ([None, 168] if taken > 168 else [None])
    assert options.get("maxnreg") == held


def test_constants_in_another_order_than_the_kernel_takes_them_are_refused():
    with pytest.raises(TypeError, match=r"got constants \['WIDTH'\], expected \['BLOCK'\]"):
        launch(_Kernel(), 1, 0.5, torch.zeros(16), WIDTH=64)


def test_a_prepared_launch_puts_what_it_is_given_in_its_place():
    kernel, first, second = _Kernel(), torch.zeros(16), torch.ones(16)
    prepared = Launch(kernel, 3, 5, GIVEN, BLOCK=64, num_warps=8)
    prepared(first)
    prepared(second)
    options = {"BLOCK": 64, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    assert kernel.asked == [((3,), (5, first), options)]
    ((grid, (number, data, block)),) = kernel.ran
    assert (grid, number, block) == ((3, 1, 1), 5, 64)
    assert data is second
    prepared(torch.zeros(17)[1:])
    assert len(kernel.asked) == 2


class _Launcher:
    """Triton's own: what it is called with, and what it calls itself."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid, launch_pdl = "cooperative", "dependent"
    arg_annotations, kernel_signature = "annotations", "signature"

    def __init__(self, given):
        self.given = given

    def __call__(self, *arguments):
        self.given.append(("launcher", *arguments))

    def launch(self, *arguments):
        self.given.append(arguments)


@pytest.fixture
def compiled(monkeypatch):
    """A compiled kernel that launches nothing, and the arguments that its launcher was given."""
    given = []
    made = object.__new__(triton.compiler.CompiledKernel)
    made.module, made._run = "module", _Launcher(given)
    made.function, made.packed_metadata = "function", "metadata"
    made._module_pid = None  # of no process, so that its end unloads nothing
    device = SimpleNamespace(get_current_device=lambda: 1, get_current_stream=lambda index: 70)
    monkeypatch.setattr(triton.runtime.driver, "_active", device)
    monkeypatch.setattr(launching, "DIRECT", (tuple(map(int, triton.__version__.split(".")[:2])),))
    return made, given


def test_a_repeated_launch_hands_over_addresses_on_the_stream_of_its_device(compiled):
    made, given = compiled
    is_older = launching.DIRECT == ((3, 6),)  # its launchers take each argument
    kernel, data = _Kernel(), (torch.zeros(16), torch.zeros(16))
    kernel.__class__ = type("Kernel", (_Kernel,), {"__getitem__": lambda *_: lambda *a, **o: made})
    prepared = Launch(kernel, 3, GIVEN, GIVEN, BLOCK=64)
    for number in (0.5, 0.25, 0.125):
        prepared(number, data)
    addresses = tuple(tensor.data_ptr() for tensor in data)
    start, passed = (3, 1, 1, 70, "function"), [(n, addresses, 64) for n in (0.25, 0.125)]
    assert [launched[:5] for launched in given] == [start] * 2
    assert [launched[-3:] if is_older else launched[-1] for launched in given] == passed


@pytest.mark.parametrize(
    "owner, name, value",
    [
        (_Launcher, "global_scratch_size", 8),
        (_Launcher, "profile_scratch_size", 8),
        (triton, "__version__", triton.__version__ + "+git1234567"),
    ],
)
def test_room_or_a_build_that_is_no_release_asks_tritons_launcher(
    owner, name, value, compiled, monkeypatch
):
    made, given = compiled
    monkeypatch.setattr(owner, name, value)
    assert launching._direct(made)(3, (1, 2))
    start = ("launcher", 3, 1, 1, 70, "function", "metadata", None, None, None)
    assert given == [(*start, 1, 2)]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_is_told_of_launches_in_tritons_own_way(hook, compiled, monkeypatch):
    made, given = compiled
    direct = launching._direct(made)
    monkeypatch.setattr(triton.knobs.runtime, hook, lambda metadata: None)
    assert not direct(3, (1, 2))
    monkeypatch.setattr(triton.knobs.runtime, hook, None)
    assert direct(3, (1, 2))
    assert len(given) == 1


def test_a_repeated_launch_keeps_the_compiled_kernel_whose_end_would_unload_its_code(compiled):
    made, _ = compiled
    direct = launching._direct(made)
    assert any(cell.cell_contents is made for cell in direct.__closure__)


def test_another_triton_launches_in_its_own_way(compiled, monkeypatch):
    made, given = compiled
    monkeypatch.setattr(launching, "DIRECT", ())
    assert not launching._direct(made)(3, (1, 2))
    assert not given


@compiles
@pytest.mark.parametrize("size", [None, [32, 32]])
def test_what_is_prepared_for_a_layout_holds_no_tensor(size):
    with aot.compiling("sm_90"):
        z, maps = torch.zeros(1, 3, 16, 16), torch.zeros(1, *(size or (16, 16)))
        kernels.consistency_loss(
            z, [z], z[0, 0, 0, :1], maps, maps.bool(), [0] * 6, 1.0, size, False, True
        )
        kernels.cross_entropy(z, maps.byte(), maps, None, [255, 0], 0.0, False, True)
        kernels.softmax_confidence([z], 0, 1.0, size, False)
    assert len(launching._prepared) == 3
    held = [weakref.ref(tensor) for tensor in (z, maps)]
    del z, maps
    gc.collect()
    assert [reference() for reference in held] == [None, None]


@compiles
@pytest.mark.parametrize("size", [None, [32, 32]])
def test_a_threshold_that_is_a_number_is_one_of_the_launch(size):
    z, call = aot.meta(1, 3, 16, 16), (None, None, [0] * 6, 1.0, size, False, True)
    with aot.compiling("sm_90") as launches:
        for threshold in (0.5, aot.meta(1), aot.meta(3)):
            kernels.consistency_loss(z, [z], threshold, *call)
    kinds = [
        made.compiled.src.signature["threshold"]
        for made in launches
        if made.kernel.endswith("consistency_kernel")
    ]
    assert kinds == ["fp32", "*fp32", "*fp32"]


@compiles
def test_a_call_is_prepared_for_the_device_of_its_tensors_not_for_the_current_one(monkeypatch):
    z, labels = aot.meta(1, 3, 16, 16), aot.meta(1, 32, 32, dtype=torch.uint8)
    with aot.compiling("sm_90") as launches:
        current, own = triton.runtime.driver.active, aot.TARGETS["sm_90"]
        current.target = triton.backends.compiler.GPUTarget("cuda", 75, 32)

        @contextlib.contextmanager
        def device_of(tensor):
            before, current.target = current.target, own
            yield
            current.target = before

        monkeypatch.setattr(kernels, "device_of", device_of)
        kernels.consistency_loss(z, [z], 0.5, None, None, [0] * 6, 1.0, [32, 32], False, True)
        kernels.cross_entropy(z, labels, None, None, [255, 1], 0.0, False, True)
    of_products = [
        made.compiled.src.constants[(made.compiled.src.fn.arg_names.index("PRECISION"),)]
        for made in launches
        if "PRECISION" in made.compiled.src.fn.arg_names
    ]
    assert of_products == ["tf32x3", "tf32x3"]


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
    calls = [(sums, 32, None, tuple(results), pixels, 1.0) for pixels in (1.0, 16.0, 0.5, 1e30)]
    constants = {"COUNT": 5, "NORMALIZE": "all", "RATIO": False, "COMPLETE": True, "BLOCK": 1024}
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
