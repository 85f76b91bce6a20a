"""The kernels of csrc/cuda give what the reference gives: compiled for this machine's processor,
and on its GPU where there is one.

For the processor their text is the one that nvcc compiles; tests/cuda_on_host runs the launches as
loops over blocks and threads. That shows wrong indices, formulas, sums, options, layouts, and
barriers whose lack changes a result. It cannot show what only a GPU has: other schedules of the
threads, the vote of a warp, the rounding of the exponential unit, nor anything of the machine code.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from entries import assert_entries_are_updated
from on_gpu import OnGpu
from operands import (
    DTYPES,
    LAYOUTS,
    laid_out,
    random_logits,
    threshold_near,
    thresholds_by_class,
)
from test_upsampling import (  # noqa: F401, the cases of the C++ kernels for the CPU
    assert_consistency_is_the_reference,
    assert_cross_entropy_is_the_reference,
    decided,
    test_a_label_out_of_range_is_named_also_when_logits_are_upsampled,
    test_any_ratio_of_sizes_serves_all_three_operations,
    test_backward_twice_gives_the_same_gradient_twice,
    test_consistency_is_that_of_interpolated_logits,
    test_cross_entropy_is_that_of_interpolated_logits,
    test_logits_of_any_range_are_exact_all_through_wide_cells,
    test_nothing_to_learn_gives_zero_loss_and_gradient,
    test_one_class_that_rises_from_nothing_to_everything_within_a_cell_is_followed,
)
from test_upsampling_borders import (  # noqa: F401
    test_a_logit_leaves_no_trace_where_it_has_no_weight,
    test_a_nan_in_either_network_makes_loss_and_gradient_of_its_pixel_nan,
)
from tolerances import assert_average_close

import fastmt
from benchmarks import cuda_resources
from fastmt import cpp_backend, reference
from fastmt.confidence import KINDS
from fastmt.consistency import CLASS_REDUCTIONS, LOSSES, NORMALIZATIONS, WEIGHTS
from fastmt.ema_table import CHUNK, Entry, Table

ROOT = Path(__file__).parents[1]
COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
OPERATIONS = ("consistency_loss", "cross_entropy", "ema_update_", "scale_")
FIXED = (19, 21)  # class counts with kernels of their own

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(cpp_backend.missing() is not None, reason="the C++ kernels are not built"),
    pytest.mark.usefixtures("poisoned", "one_thread"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
]


def compile_for_host(folder: Path) -> Path:
    """The library of tests/cuda_on_host with the sources of csrc/cuda."""
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{torch_folder}/include"]
    flags += [f"-I{ROOT}/csrc", f"-I{ROOT}/tests/cuda_on_host", "-Wno-unknown-pragmas"]
    sources = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")]
    left_out = {"library.cpp", "device.cpp"}  # which tests/cuda_on_host has its own of
    sources = [source for source in sources if source.name not in left_out]
    sources += [ROOT / "csrc/cpu/host.cpp", ROOT / "tests/cuda_on_host/library.cpp"]
    objects = [folder / f"{number}.o" for number in range(len(sources))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(
            lambda pair: run(COMPILER, *flags, "-xc++", "-c", pair[0], "-o", pair[1]),
            zip(sources, objects, strict=True),
        ):
            assert done.returncode == 0, done.stderr
    library = folder / "cuda_on_host.so"
    links = [f"-L{torch_folder}/lib", "-ltorch_cpu", "-ltorch", "-lc10"]
    done = run(COMPILER, "-shared", *objects, *links, "-o", library)
    assert done.returncode == 0, done.stderr
    return library


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", params=["host", *["gpu"] * torch.cuda.is_available()])
def operations(request, tmp_path_factory):
    """The operations of csrc/cuda on CPU tensors."""
    if request.param == "gpu":
        if reason := cpp_backend.cuda_missing():
            pytest.skip(reason)
        yield OnGpu(torch.ops.fastmt)
        return
    library = torch.library.Library("fastmt_cuda_on_host", "DEF")
    for name in OPERATIONS:
        schema = str(getattr(torch.ops.fastmt, name).default._schema).removeprefix("fastmt::")
        library.define(schema.replace("int wrong, int wrong_label", "Tensor wrong, Tensor label"))
    torch.ops.load_library(str(compile_for_host(tmp_path_factory.mktemp("cuda"))))
    yield torch.ops.fastmt_cuda_on_host
    library._destroy()


@pytest.fixture(autouse=True)
def cuda(operations):
    """Every 4-D call is answered by these kernels, through fastmt's own functions."""

    def consistency_loss(student, *call):
        *before, size, align_corners, wants_gradient = call
        size = list(student.shape[2:]) if size is None else size
        return operations.consistency_loss(student, *before, size, align_corners, wants_gradient)

    def cross_entropy(*call):
        *tensors, wrong, label = operations.cross_entropy(*call)
        returns = torch.ops.fastmt.cross_entropy.default._schema.returns
        if str(returns[-1].type) == "int":
            wrong, label = int(wrong), int(label)
        return *tensors, wrong, label

    answers = torch.library.Library("fastmt", "IMPL")
    for answer in (consistency_loss, cross_entropy, operations.ema_update_, operations.scale_):
        answers.impl(answer.__name__, answer, "CPU", allow_override=True)
    with fastmt.backend("cpp", strict=True):
        yield
    answers._destroy()


def assert_consistency(student, teachers, size, quantile=0.5, align_corners=False, **options):
    """Against the reference, where rounding cannot change a label or what passes."""
    kind = options.get("confidence", "max_prob")
    tempered = [t.float() / options.get("temperature", 1.0) for t in teachers]
    score, valid = decided(tempered, size, align_corners, kind)
    options = {"threshold": threshold_near(score, quantile), "valid": valid, **options}
    return assert_consistency_is_the_reference(student, teachers, size, align_corners, **options)


@pytest.mark.parametrize("classes", [*FIXED, 7])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_loss_weight_score_and_denominator(classes, loss, weight):
    student, teacher = (random_logits((2, classes, 3, 4), seed, 4.0) for seed in (1, 2))
    for i, (normalize, kind) in enumerate(itertools.product(NORMALIZATIONS, KINDS)):
        assert_consistency(
            student,
            [teacher],
            (11, 14),
            loss=loss,
            weight=weight,
            normalize=normalize,
            confidence=kind,
            class_reduction=CLASS_REDUCTIONS[i % 2],
            strict=i % 2 == 0,
            pixel_weight=random_logits((2, 11, 14), i).clamp(0, 2) if i % 3 else None,
        )


@pytest.mark.parametrize("classes", [*FIXED, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_layout(classes, dtype, layout):
    student = laid_out(random_logits((2, classes, 4, 5), 1, 4.0, dtype), layout)
    teacher = laid_out(random_logits((2, classes, 4, 5), 2, 4.0, dtype), layout)
    for loss in ("mse", "kl"):
        gradient = assert_consistency(student, [teacher], (13, 17), loss=loss)
        assert gradient.stride() == torch.empty_like(student).stride()
    labels = torch.randint(classes, (2, 13, 17), generator=torch.Generator().manual_seed(0))
    for smoothing in (0.0, 0.1):
        assert_cross_entropy_is_the_reference(
            student, labels, align_corners=False, label_smoothing=smoothing
        )


@pytest.mark.parametrize("classes", [*FIXED, 6])
@pytest.mark.parametrize("loss", ["mse", "ce", "js"])
def test_a_threshold_for_each_class_and_a_temperature(classes, loss):
    student, teacher = (random_logits((1, classes, 4, 4), seed, 4.0) for seed in (1, 2))
    size = (21, 22)
    big = reference.upsample(teacher.double() / 2, size, False)
    score, label = reference.softmax_confidence(big)
    limits = thresholds_by_class(score, label, classes, 0.5)
    assert_consistency(student, [teacher], size, loss=loss, threshold=limits, temperature=2.0)


@pytest.mark.parametrize("classes", [*FIXED, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_teachers_of_other_resolutions_and_ensembles(classes, kind):
    student = random_logits((2, classes, 3, 5), 1, 4.0)
    shapes = [(2, classes, 6, 4), (2, classes, 3, 5), (2, classes, 9, 2)]
    teachers = [random_logits(shape, 2 + i, 4.0) for i, shape in enumerate(shapes)]
    for members, align_corners in itertools.product((1, 3), (False, True)):
        assert_consistency(
            student, teachers[:members], (20, 33), 0.3, align_corners, loss="mse", confidence=kind
        )


@pytest.mark.parametrize("classes", FIXED)
@pytest.mark.parametrize("scale", [0.1, 4.0, 30.0, 100.0, 1e4])
def test_logits_of_any_range_with_a_constant_number_of_classes(classes, scale):
    student, teacher = (random_logits((1, classes, 3, 5), seed, scale) for seed in (1, 2))
    for loss in ("mse", "ce"):
        assert_consistency(student, [teacher], (48, 111), 0.2, loss=loss, confidence="margin")
    labels = reference.upsample(teacher.double(), (48, 111), False).argmax(1)
    assert_cross_entropy_is_the_reference(student, labels, align_corners=False)


@pytest.mark.parametrize("classes", [150, 1000, 4096])
def test_any_number_of_classes(classes):
    student, teacher = (random_logits((1, classes, 2, 2), seed) for seed in (1, 2))
    for loss in LOSSES:
        assert_consistency(student, [teacher], (4, 5), loss=loss, weight="none")
    labels = torch.arange(20).view(1, 4, 5) * (classes - 1) // 19
    assert_cross_entropy_is_the_reference(student, labels, align_corners=False)


@pytest.mark.parametrize("classes", [19, 4])
@pytest.mark.parametrize(
    ("low", "size"), [((3, 5), (210, 300)), ((30, 40), (5, 300)), ((2, 3000), (3, 40))]
)
def test_images_of_many_blocks(classes, low, size):
    student, teacher = (random_logits((2, classes, *low), seed, 4.0) for seed in (1, 2))
    assert_consistency(student, [teacher], size, 0.4)
    labels = reference.upsample(teacher, size, False).argmax(1)
    assert_cross_entropy_is_the_reference(student, labels, align_corners=False)


@pytest.mark.parametrize("classes", [*FIXED, 33])
@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_threads_in_any_order_give_the_same_bits(classes, loss):
    student, teacher = (random_logits((2, classes, 5, 9), seed, 4.0) for seed in (1, 2))
    student.requires_grad_()
    labels = torch.arange(2 * 40 * 170).view(2, 40, 170) % classes

    def everything():
        value, stats = fastmt.consistency_loss(
            student, teacher, loss=loss, threshold=0.7, size=(40, 170), return_stats=True
        )
        supervised = fastmt.cross_entropy(student, labels)
        gradients = [torch.autograd.grad(v, student)[0] for v in (value, supervised)]
        return [value, *stats, supervised, *gradients]

    first = everything()
    for _ in range(3):
        for one, other in zip(first, everything(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("classes", [19, 4])
def test_labels_out_of_range_are_counted_and_never_a_silent_error(operations, classes):
    logits = random_logits((2, classes, 3, 4), 1)
    labels = torch.randint(classes, (2, 12, 16), generator=torch.Generator().manual_seed(0))
    labels[0, 3, 5], labels[1, 0, 0], labels[1, 11, 15] = classes, -1, 2**40
    value, scale, gradient, count, lowest = operations.cross_entropy(
        logits, labels, None, None, [255, 1], 0.0, False, True
    )
    assert (count.item(), lowest.item()) == (3, -1)
    assert value.isnan()
    assert scale.isnan()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("classes", [19, 4])
def test_a_nan_score_never_passes_and_its_pixels_leave_no_trace(classes):
    student, teacher = (random_logits((1, classes, 3, 9), seed, 4.0) for seed in (1, 2))
    teacher[0, 1, 1, 4] = torch.nan
    student[0, 2, 1, 4] = torch.nan
    student.requires_grad_()
    loss = fastmt.consistency_loss(student, teacher, threshold=0.1, size=(12, 36))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [*FIXED, 7])
@pytest.mark.parametrize("members", [1, 3, 11])
def test_a_certain_teacher_scores_exactly_one(kind, classes, members):
    student = random_logits((1, classes, 3, 5), 0)
    teacher = torch.full((1, classes, 3, 5), -200.0)
    teacher[:, 2] = 40 * torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    options = {"confidence": kind, "threshold": 1.0, "size": (24, 40), "return_stats": True}
    _, stats = fastmt.consistency_loss(student, [teacher] * members, **options)
    assert stats.selected == 1
    assert stats.mean_score == 1


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(("classes", "members"), [(19, 1), (19, 2), (7, 1)])
@pytest.mark.parametrize("at", [0, 3])
def test_the_label_of_a_pixel_that_is_nan_is_that_of_the_reference(poison, classes, members, at):
    student, teacher = (random_logits((1, classes, 2, 6), seed) for seed in (0, 1))
    teacher[0, at] = poison
    for kind in KINDS:
        options = {"loss": "ce", "weight": "none", "confidence": kind, "size": (8, 24)}
        loss = fastmt.consistency_loss(student, [teacher] * members, **options)
        expected = reference.consistency_loss(student.double(), [teacher.double()], **options)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [*FIXED, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_is_excluded_everywhere_has_probability_zero(classes, kind):
    student, teacher = (random_logits((1, classes, 3, 5), seed, 4.0) for seed in (1, 2))
    student[:, -1] = teacher[:, -1] = -torch.inf
    kept = student[:, :-1].double(), [teacher[:, :-1].double()]
    for loss, align_corners in itertools.product(("mse", "ce", "kl"), (False, True)):
        options = {"loss": loss, "confidence": kind, "weight": "none"}
        options |= {"size": (17, 33), "align_corners": align_corners}
        value = fastmt.consistency_loss(student, teacher, **options)
        expected = reference.consistency_loss(*kept, **options)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_alone_is_the_same_loss(operations):
    student, teacher = (random_logits((2, 19, 5, 6), seed, 4.0) for seed in (1, 2))
    call = (student, [teacher], torch.tensor([0.5]), None, None, [0, 0, 0, 0, 0, 0], 1.0, [20, 24])
    alone, both = (operations.consistency_loss(*call, False, wanted) for wanted in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(alone[:4], both[:4], strict=True))
    assert alone[4].numel() == 0


def test_an_empty_batch_is_no_loss(operations):
    logits = torch.zeros(0, 19, 4, 4)
    options = [0, 0, 0, 0, 0, 0]
    loss, *_, gradient = operations.consistency_loss(
        logits, [logits], torch.tensor([0.5]), None, None, options, 1.0, [8, 8], False, True
    )
    assert loss.item() == 0
    assert gradient.shape == logits.shape


@pytest.mark.parametrize("classes", FIXED)
def test_the_table_of_resources_knows_the_shared_memory(operations, classes):
    student, teacher = (random_logits((1, classes, 2, 32), seed) for seed in (1, 2))
    if isinstance(operations, OnGpu):
        pytest.skip("the host's launches measure it")
    operations.most_shared_bytes()
    assert_consistency(student, [teacher], (4, 256))
    reach = cuda_resources.TILE // 8 + 2
    assert operations.most_shared_bytes() == cuda_resources.shared_bytes(classes, 2, reach, True)


def update(operations, teachers, students, decay):
    """One launch over all pairs."""
    table = Table(list(map(Entry, teachers, students)), torch.device("cpu"))
    table.update(operations, torch.tensor(decay, dtype=torch.float64))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_one_launch_averages_tensors_of_all_dtypes_lengths_and_alignments(operations, decay):
    lengths = [1, 3, 8, 4095, 4096, 4097, CHUNK - 1, CHUNK, 2 * CHUNK + 5]
    pairs = list(itertools.product(DTYPES, DTYPES))
    cases = [
        (length, *pairs[i % 9], i % 4, i // 4 % 5)
        for i, length in enumerate(length for length in lengths for _ in range(9))
    ]
    teachers, students = (
        [
            random_logits((case[0] + case[3 + which],), seed, dtype=case[1 + which])[
                case[3 + which] :
            ]
            for seed, case in enumerate(cases, start=1000 * which)
        ]
        for which in (0, 1)
    )
    expected = [
        decay * t.double() + (1 - decay) * s.double()
        for t, s in zip(teachers, students, strict=True)
    ]
    update(operations, teachers, students, decay)
    for average, mean in zip(teachers, expected, strict=True):
        assert_average_close(average, mean)


def test_one_launch_averages_and_copies_for_several_teachers(operations):
    assert_entries_are_updated(operations)


def test_decay_0_copies_over_a_nan(operations):
    teacher, student = torch.full((5000,), torch.nan), random_logits((5000,), 0)
    update(operations, [teacher], [student], 0.0)
    assert torch.equal(teacher, student)


def test_decay_1_keeps_whatever_the_student_holds(operations):
    teacher, student = random_logits((5000,), 0), torch.full((5000,), torch.nan)
    before = teacher.clone()
    update(operations, [teacher], [student], 1.0)
    assert torch.equal(teacher, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_multiplies_by_both_factors_and_0_clears_a_nan(operations, dtype):
    data = random_logits((9001,), 0, dtype=dtype)
    expected = (data.float() * 0.75).to(dtype)
    operations.scale_(data, torch.tensor(1.5), torch.tensor(0.5))
    assert torch.equal(data, expected)
    data[7] = torch.nan
    operations.scale_(data, torch.tensor(0.0), torch.tensor(0.5))
    assert not data.any()
