"""The same numbers from every thread count, layout, call and instruction set of this processor."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from entries import assert_entries_are_updated
from operands import laid_out, random_logits
from tolerances import assert_gradient_close, assert_loss_close

import fastmt
from fastmt import cpp_backend
from fastmt.consistency import LOSSES
from fastmt.ema_table import Entry, Table

pytestmark = pytest.mark.usefixtures("kernels")
SHAPE = (2, 19, 67, 71)
ROOT = Path(fastmt.__file__).parents[1]


def labels_of(size):
    return torch.randint(19, size, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("normalize", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_dense_cross_entropy_leaves_its_backward_pass_nothing_to_divide_by(dtype, normalize):
    logits, labels = random_logits(SHAPE, 0, dtype=dtype), labels_of((2, *SHAPE[2:]))
    _, scale, *_ = torch.ops.fastmt.cross_entropy(
        logits, labels, None, None, [255, normalize], 0.0, False, True
    )
    assert (scale == 1) == (dtype != torch.float16)  # which is divided when it is scaled


def test_where_the_sum_of_weights_is_infinite_no_gradient_is_finite():
    logits, labels = random_logits(SHAPE, 0).requires_grad_(), labels_of((2, *SHAPE[2:]))
    weight = torch.ones(labels.shape)
    weight[0, 0, 0], weight[1] = torch.inf, 0
    loss = fastmt.cross_entropy(logits, labels, pixel_weight=weight, normalize="weight")
    loss.backward()
    assert loss.isnan()
    assert logits.grad.isnan().all()


def everything(loss="mse", dtype="float32", layout="contiguous", size=None):
    """Loss, statistics and gradient of each operation on fixed inputs, as one list of tensors."""
    dtype = getattr(torch, dtype)
    student, teacher = (laid_out(random_logits(SHAPE, seed, 4.0, dtype), layout) for seed in (1, 2))
    student.requires_grad_()
    options = {"loss": loss, "weight": "confidence", "normalize": "weight", "threshold": 0.6}
    value, stats = fastmt.consistency_loss(
        student, [teacher, teacher * 2], size=size, return_stats=True, **options
    )
    labels = labels_of((2, *(size or SHAPE[2:])))
    supervised = fastmt.cross_entropy(student, labels, label_smoothing=0.1)
    gradients = [torch.autograd.grad(v, student)[0] for v in (value, supervised)]
    score, label = fastmt.softmax_confidence([teacher, teacher * 2], kind="entropy", size=size)
    averages = [torch.zeros(70_001), torch.zeros(19, 3)]
    fastmt.ema_update_(averages, [random_logits(a.shape, 5, 1.0, dtype) for a in averages], 0.3)
    return [value.detach(), *stats, supervised.detach(), *gradients, score, label, *averages]


def assert_bitwise(left, right):
    for a, b in zip(left, right, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [None, (134, 150)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_number_of_threads_gives_the_same_bits(threads, dtype, size):
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(everything(dtype=dtype, size=size))
    for other in results[1:]:
        assert_bitwise(results[0], other)


@pytest.mark.parametrize("size", [None, (134, 150)])
def test_repeated_calls_give_the_same_bits(size):
    first = everything(size=size)
    for _ in range(5):
        assert_bitwise(first, everything(size=size))


@pytest.mark.parametrize("size", [None, (134, 150)])
@pytest.mark.parametrize("layout", ["channels_last", "cropped", "transposed"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_layouts_give_the_same_bits(loss, layout, size):
    assert_bitwise(everything(loss, size=size), everything(loss, layout=layout, size=size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 3, 4, 5, 8, 9, 15, 16, 17, 31, 40])
@pytest.mark.parametrize("pixels", [1, 3, 7, 8, 9, 37, 300])
def test_rows_give_the_same_bits_whichever_dimension_lies_close(pixels, classes, dtype):
    student, teacher = (random_logits((pixels, classes), seed, 4.0, dtype) for seed in (1, 2))
    labels = torch.randint(classes, (pixels,), generator=torch.Generator().manual_seed(0))
    results = []
    for close in (lambda rows: rows, lambda rows: rows.T.contiguous().T):
        z = close(student).requires_grad_()
        loss = fastmt.consistency_loss(z, close(teacher), threshold=0.3)
        loss = loss + fastmt.cross_entropy(z, labels)
        results.append([loss.detach(), *torch.autograd.grad(loss, z)])
    assert_bitwise(*results)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [None, (134, 150)])
def test_poisoned_outputs_never_show(loss, size):
    assert all(tensor.isfinite().all() for tensor in everything(loss, size=size))


def far_apart(values, dim):
    """`values` with 2^31 elements of untouched memory between neighbours in `dim`."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    distance = 2**31
    storage = torch.empty(distance * (values.shape[dim] - 1) + values.numel(), dtype=values.dtype)
    strides = list(values.contiguous().stride())
    strides[dim] = distance
    return storage.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_2_to_the_31_elements_are_found(dim):
    values = random_logits((2, 2, 2, 3), 0, dtype=torch.bfloat16)
    teacher = random_logits((2, 2, 2, 3), 1)
    labels = torch.ones(2, 2, 3, dtype=torch.uint8)
    results = []
    for logits in (values, far_apart(values, dim)):
        z = logits.requires_grad_()
        loss = fastmt.consistency_loss(z, teacher, weight="none") + fastmt.cross_entropy(z, labels)
        (gradient,) = torch.autograd.grad(loss, z)
        results.append([loss.detach(), gradient, *fastmt.softmax_confidence(z)])
    assert_bitwise(*results)


PROGRAM = """
import sys, torch
sys.path[:0] = {path!r}
import fastmt
from fastmt import cpp_backend
from test_kernels import everything
with fastmt.backend("cpp", strict=True):
    results = [everything(*case) for case in {cases!r}]
torch.save((cpp_backend.instruction_set(), results), {out!r})
"""
CASES = [(loss, dtype, "contiguous", None) for loss in LOSSES for dtype in ("float32", "bfloat16")]
CASES += [
    ("mse", "float16", "contiguous", (134, 150)),
    ("bce", "float32", "transposed", (134, 150)),
]


def run_with(isa, program):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FASTMT_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_results(isa, tmp_path):
    out = str(tmp_path / "results.pt")
    path = [str(ROOT), str(Path(__file__).parent)]
    done = run_with(isa, PROGRAM.format(path=path, cases=CASES, out=out))
    if "as this processor has them" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    name, results = torch.load(out)
    assert name == isa
    for case, result in zip(CASES, results, strict=True):
        expected = everything(*case)
        dtype = getattr(torch, case[1])
        for i, (got, want) in enumerate(zip(result, expected, strict=True)):
            if i < 4:
                assert_loss_close(got, want, dtype)
            elif got.dtype == torch.int64:
                assert (got != want).float().mean() < 1e-4
            else:
                assert_gradient_close(got, want.double(), dtype)


def test_an_unknown_instruction_set_is_a_clear_error():
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import fastmt, torch
from fastmt import cpp_backend
assert not cpp_backend.missing()
logits = torch.zeros(2, 3)
calls = [
    lambda: fastmt.softmax_confidence(logits),
    lambda: torch.ops.fastmt.softmax_confidence([logits], 0, 1.0, None, False),
]
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    done = run_with("sse9", program)
    message = "FASTMT_CPU_ISA: got 'sse9', expected baseline, avx2 or avx512"
    assert done.stdout.count(message) == 2, done.stderr


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integers_are_refused_where_kernels_compute(dtype):
    kernels = torch.ops.fastmt
    floats, one = torch.zeros(2, 3, 5), torch.ones(())
    integers, labels = floats.to(dtype), torch.zeros(2, 5, dtype=torch.uint8)
    weights = labels.to(dtype)
    rest = [0] * 6, 1.0, None, False, True

    def consistency(student, teacher, weight):
        return kernels.consistency_loss(student, [floats, teacher], one, weight, None, *rest)

    def supervised(logits, weight):
        return kernels.cross_entropy(logits, labels, weight, None, [255, 0], 0.0, False, True)

    calls = {
        "images": lambda: kernels.gaussian_noise(integers, torch.tensor(0), 0.1, 0.2, False),
        "data": lambda: kernels.scale_(integers, one, one),
        "student": lambda: consistency(integers, floats, None),
        "teacher": lambda: consistency(floats, integers, None),
        "pixel_weight": lambda: consistency(floats, floats, weights),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: got integers, expected float32"):
            call()
    with pytest.raises(RuntimeError, match="logits: got integers"):
        kernels.softmax_confidence([floats, integers], 0, 1.0, None, False)
    with pytest.raises(RuntimeError, match="logits: got integers"):
        supervised(integers, None)
    with pytest.raises(RuntimeError, match="pixel_weight: got integers"):
        supervised(floats, weights)


def test_the_widest_instruction_set_is_taken():
    flags = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not flags.exists():
        pytest.skip("no processor flags to compare with")
    words = set(flags.read_text().split())
    avx2 = {"avx2", "fma", "bmi2", "f16c"} <= words
    wide = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= words
    expected = "avx512" if wide else "avx2" if avx2 else "baseline"
    if "FASTMT_CPU_ISA" not in os.environ:
        assert cpp_backend.instruction_set() == expected


def test_one_launch_averages_and_copies_for_several_teachers():
    assert_entries_are_updated(torch.ops.fastmt)


@pytest.mark.parametrize("decay", [0.9, 0.0, -1.0])
def test_a_table_of_addresses_gives_the_average_of_the_tensors_themselves(decay):
    sizes, dtypes = [1, 40_000, 16_384, 7], [torch.float32, torch.bfloat16, torch.float16]
    teacher = [random_logits([n], n) for n in sizes]
    student = [random_logits([n], n + 1).to(dtypes[i % 3]) for i, n in enumerate(sizes)]
    expected = [average.clone() for average in teacher]
    if decay >= 0:
        fastmt.ema_update_(expected, student, decay)
    table = Table(list(map(Entry, teacher, student)), torch.device("cpu"))
    table.update(torch.ops.fastmt, torch.tensor(decay, dtype=torch.float64))
    assert_bitwise(teacher, expected)
