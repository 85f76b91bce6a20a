"""What the kernels have to agree with, and where rounding leaves no doubt of it."""

from __future__ import annotations

from operands import threshold_near
from test_upsampling import assert_consistency_is_the_reference, decided

FIXED = (19, 21)  # class counts with kernels of their own


def assert_consistency(student, teachers, size, quantile=0.5, align_corners=False, **options):
    """Against the reference, where rounding cannot change a label or what passes."""
    kind = options.get("confidence", "max_prob")
    tempered = [t.float() / options.get("temperature", 1.0) for t in teachers]
    score, valid = decided(tempered, size, align_corners, kind)
    options = {"threshold": threshold_near(score, quantile), "valid": valid, **options}
    return assert_consistency_is_the_reference(student, teachers, size, align_corners, **options)
