"""What scores and weights promise at their ends: at 0, at 1, and of what is left out."""

from __future__ import annotations

import itertools

import pytest
import torch
from operands import random_logits
from test_semantics import SHAPE, assert_nothing_is_taught, gradient_of, student_logits

import fastmt
from fastmt.confidence import KINDS

pytestmark = pytest.mark.usefixtures("either")


def test_the_score_of_classes_nearly_alike_is_never_below_zero():
    teacher = random_logits((1, 19, 400), 0, 1e-4)
    for kind, members in itertools.product(KINDS, (1, 2)):
        score = fastmt.softmax_confidence([teacher] * members, kind=kind).score
        assert (score >= 0).all(), kind


def test_certain_members_score_exactly_1_also_where_their_number_has_no_exact_inverse():
    teacher = torch.tensor([[7.0, -200.0]])
    for kind in ("max_prob", "margin"):
        score = fastmt.softmax_confidence([teacher] * 41, kind=kind).score
        assert score == 1, kind  # in float32, 41 * (1 / 41) is more


def test_a_pixel_of_score_0_has_no_weight_whatever_its_factor():
    student, teacher = student_logits(), random_logits(SHAPE, 2)
    teacher[0, :, :2], factor = 0.0, torch.ones(2, 9, 11)
    options = {"weight": "confidence", "confidence": "margin", "threshold": 0.0}
    results = []
    for at_score_0 in (1.0, torch.inf):
        factor[0, :2] = at_score_0
        loss = fastmt.consistency_loss(student, teacher, pixel_weight=factor, **options)
        results.append((loss.detach(), gradient_of(loss, student)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_mean_score_leaves_out_what_is_not_valid_whatever_the_teacher_holds():
    student, teacher = (random_logits((1, 5, 3, 4), seed) for seed in (1, 2))
    valid = torch.ones(1, 3, 4, dtype=torch.bool)
    valid[0, 0] = False
    for size in (None, (3, 8)):
        kept = valid if size is None else valid.repeat_interleave(2, 2)
        means = []
        for held in (1.0, torch.nan):
            teacher[0, :, 0] = held
            options = {"valid": kept, "size": size, "return_stats": True}
            means.append(fastmt.consistency_loss(student, teacher, **options)[1].mean_score)
        assert torch.equal(*means)


def test_a_ratio_of_0_teaches_nothing_beside_a_nan_student():
    student = student_logits()
    with torch.no_grad():
        student[0, 1, 2, 3] = torch.nan
    loss = fastmt.consistency_loss(student, random_logits(SHAPE, 2), weight="ratio", threshold=1.5)
    assert_nothing_is_taught(loss, student)
