"""softmax_confidence of csrc/cuda, up-sampled: any sizes, layouts and logits of one teacher."""

from __future__ import annotations

import warnings

import pytest
import torch
from agreement import FIXED
from guarded import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import OnGpu
from operands import DTYPES, LAYOUTS, laid_out, random_logits
from test_upsampling import OUT, RATIOS, SIDES, decided
from tolerances import TOLERANCES

import fastmt
from fastmt import reference
from fastmt.confidence import KINDS

TOLERANCE = TOLERANCES[torch.float32].score


@pytest.fixture(autouse=True)
def confidence(operations, cuda):
    """Every call is answered by these kernels, beside those of the other operations."""

    def kernel(logits, kind, inverse_temperature, size, align_corners):
        size = list(logits[0].shape[2:]) if size is None else size
        return operations.softmax_confidence(logits, kind, inverse_temperature, size, align_corners)

    answers = torch.library.Library("fastmt", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        answers.impl("softmax_confidence", kernel, "CPU", allow_override=True)
    yield
    answers._destroy()


def assert_confidence(
    logits, size, align_corners=False, kind="max_prob", temperature=1.0, tolerance=TOLERANCE
):
    score, label = fastmt.softmax_confidence(
        logits, kind=kind, temperature=temperature, size=size, align_corners=align_corners
    )
    exact = logits.double() / temperature
    expected, valid = decided([exact], size, align_corners, kind)
    assert score.dtype == torch.float32
    assert label.dtype == torch.int64
    assert score.shape == label.shape == (len(logits), *size)
    assert (score.double() - expected).abs().max().item() <= tolerance
    best = reference.softmax_confidence(exact, size=size, align_corners=align_corners).label
    assert torch.equal(label[valid], best[valid])


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    classes=st.sampled_from(FIXED),
    low=st.tuples(SIDES, SIDES),
    size=st.tuples(OUT, OUT),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    align_corners=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_confidence_is_that_of_interpolated_logits(
    batch, classes, low, size, dtype, layout, kind, temperature, align_corners, seed
):
    logits = laid_out(random_logits((batch, classes, *low), seed, 4.0, dtype), layout)
    assert_confidence(logits, size, align_corners, kind, temperature)


@pytest.mark.parametrize(("low", "size"), [*RATIOS, ((260, 3), (65, 9))])
@pytest.mark.parametrize("classes", FIXED)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.usefixtures("busy_blocks")
def test_any_ratio_of_sizes_in_blocks_of_any_bands(low, size, classes, align_corners):
    logits = random_logits((2, classes, *low), 1, 4.0)
    for kind in KINDS:
        assert_confidence(logits, size, align_corners, kind)


@pytest.mark.parametrize("classes", FIXED)
def test_a_large_batch_of_which_a_gpu_gives_blocks_several_bands(operations, classes):
    if not isinstance(operations, OnGpu):
        pytest.skip("a processor's blocks walk several bands of any batch")
    logits = random_logits((512, classes, 22, 5), 1, 4.0)
    for kind in KINDS:
        assert_confidence(logits, (64, 40), kind=kind)


@pytest.mark.parametrize("classes", FIXED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.1, 30.0, 100.0, 1e4])
def test_logits_of_any_range(classes, kind, scale):
    # Logits are interpolated in float32.
    tolerance = TOLERANCE * max(scale / 30, 1)
    logits = random_logits((1, classes, 3, 5), 1, scale)
    assert_confidence(logits, (48, 111), kind=kind, tolerance=tolerance)


@pytest.mark.parametrize("classes", FIXED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(1, 20), (0, 0), (3, 39)])
def test_a_logit_that_is_not_finite_poisons_the_pixels_it_reaches_and_no_other(
    classes, kind, poison, at
):
    teacher, weight = random_logits((1, classes, 4, 40), 0), torch.zeros(1, 1, 4, 40)
    options = {"kind": kind, "temperature": 2.0, "size": (16, 160)}
    clean = fastmt.softmax_confidence(teacher, **options)
    teacher[0, 2, at[0], at[1]], weight[0, 0, at[0], at[1]] = poison, 1
    reached = reference.upsample(weight, (16, 160), False).squeeze(1) > 0
    score, label = fastmt.softmax_confidence(teacher, **options)
    assert torch.equal(score.isnan(), reached & (poison != -torch.inf))
    torch.testing.assert_close(score[~reached], clean.score[~reached])
    assert torch.equal(label[~reached], clean.label[~reached])
    expected = reference.softmax_confidence(teacher.double(), **options)
    error = (score.double() - expected.score)[reached & ~score.isnan()].abs()
    assert not (error > TOLERANCE).any()
    assert torch.equal(label[reached], expected.label[reached])


@pytest.mark.parametrize("classes", FIXED)
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [(7, 9), (35, 90), (300, 131)])
def test_nothing_is_read_beyond_the_logits(operations, classes, at_end, rows, size):
    if isinstance(operations, OnGpu):
        pytest.skip("of the processor's memory")
    assert_confidence(guarded(random_logits((2, classes, rows, 40), 1), at_end), size)


@pytest.mark.parametrize("classes", FIXED)
@pytest.mark.parametrize("width", [60_000, 1_000_000])
def test_a_tile_that_touches_many_logits(classes, width):
    assert_confidence(random_logits((1, classes, 2, width), 1, 4.0), (3, 130))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("align_corners", [False, True])
def test_a_border_knows_nothing_of_large_logits_that_do_not_reach_it(kind, large, align_corners):
    logits = random_logits((1, 19, 3, 5), 1)
    options = {"kind": kind, "size": (24, 40), "align_corners": align_corners}
    expected = fastmt.softmax_confidence(logits, **options).score
    for row, pixels in ((1, (0, -1)), (0, (-1,)), (2, (0,))):
        spoilt = logits.clone()
        spoilt[:, :, row] = large
        score = fastmt.softmax_confidence(spoilt, **options).score
        torch.testing.assert_close(score[:, pixels], expected[:, pixels], rtol=0, atol=TOLERANCE)


def test_what_has_no_kernel_is_an_error_of_the_operation(operations):
    logits = torch.zeros(1, 19, 2, 2)
    with pytest.raises(RuntimeError, match="no CUDA C\\+\\+ kernel for this number of classes"):
        operations.softmax_confidence([torch.zeros(1, 20, 2, 2)], 0, 1.0, [4, 4], False)
    with pytest.raises(RuntimeError, match="2-D logits that they up-sample"):
        operations.softmax_confidence([logits], 0, 1.0, None, False)
    with pytest.raises(RuntimeError, match="score one teacher"):
        operations.softmax_confidence([logits] * 2, 0, 1.0, [4, 4], False)


def test_an_image_without_pixels_has_a_confidence_without_any():
    score, label = fastmt.softmax_confidence(torch.zeros(0, 19, 2, 2), size=(4, 4))
    assert score.shape == label.shape == (0, 4, 4)
