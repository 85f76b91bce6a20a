"""Up-sampling inside the kernels of csrc/cuda: any sizes, any range of logits, any teachers."""

from __future__ import annotations

import itertools

import pytest
import torch
from agreement import FIXED, assert_consistency
from operands import random_logits
from test_upsampling import (  # noqa: F401, the cases of the C++ kernels for the CPU
    assert_cross_entropy_is_the_reference,
    test_a_label_out_of_range_is_named_also_when_logits_are_upsampled,
    test_any_ratio_of_sizes_serves_all_three_operations,
    test_backward_twice_gives_the_same_gradient_twice,
    test_consistency_is_that_of_interpolated_logits,
    test_cross_entropy_is_that_of_interpolated_logits,
    test_logits_of_any_range_are_exact_all_through_wide_cells,
    test_nothing_to_learn_gives_zero_loss_and_gradient,
    test_one_class_that_rises_from_nothing_to_everything_within_a_cell_is_followed,
)
from test_upsampling_borders import (  # noqa: F401, run here on these kernels too
    test_a_logit_leaves_no_trace_where_it_has_no_weight,
    test_a_nan_in_either_network_makes_loss_and_gradient_of_its_pixel_nan,
)

from fastmt import reference
from fastmt.confidence import KINDS


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


@pytest.mark.parametrize("classes", FIXED)
@pytest.mark.parametrize("steps", [(0, 100), (100, 0), (-200, 50), (50, -200)])
@pytest.mark.parametrize("across", [False, True])
def test_a_class_that_rises_from_row_to_row_or_column_to_column_is_followed(classes, steps, across):
    student = random_logits((1, classes, 6, 6), 0, 0.1)
    for first, step in enumerate(steps):
        student[:, 3, first::2] += step
    student = student.mT if across else student
    for loss in ("mse", "ce"):
        assert_consistency(student, [student.flip(1)], (48, 48), loss=loss, weight="none")
    labels = torch.full((1, 48, 48), 3)
    assert_cross_entropy_is_the_reference(student, labels, align_corners=False)


@pytest.mark.parametrize("classes", [*FIXED, 5])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_what_is_left_out_changes_nothing_for_the_pixels_beside_it(classes, kept):
    student, teacher = (random_logits((2, classes, 4, 9), seed, 4.0) for seed in (1, 2))
    chosen = torch.rand(2, 40, 72, generator=torch.Generator().manual_seed(0)) < kept
    assert_consistency(student, [teacher], (40, 72), weight="none", valid=chosen)
    labels = torch.where(chosen, reference.upsample(teacher, (40, 72), False).argmax(1), 255)
    assert_cross_entropy_is_the_reference(student, labels, align_corners=False)
