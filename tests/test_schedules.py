import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmt.schedules import (
    Constant,
    CosineRampDown,
    LinearRampUp,
    SigmoidRampUp,
    UncertaintyThreshold,
    as_schedule,
)

ALL = [
    Constant(0.3),
    SigmoidRampUp(2.0, 40),
    LinearRampUp(2.0, 40),
    CosineRampDown(2.0, 40),
    UncertaintyThreshold(40),
]
lengths = st.integers(0, 1000)
steps = st.integers(0, 2000)


@pytest.mark.parametrize("schedule", ALL)
def test_schedules_are_pickled_and_compared_by_value(schedule):
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    assert copy(17) == schedule(17)
    assert isinstance(schedule(17), float)


@given(lengths, steps)
def test_ramp_ups_never_fall_and_end_at_their_value(length, step):
    for schedule in (SigmoidRampUp(0.7, length), LinearRampUp(0.7, length)):
        assert 0.0 <= schedule(step) <= schedule(step + 1) <= 0.7
        assert schedule(length) == schedule(length + step) == 0.7


@given(lengths, steps)
def test_ramp_downs_never_rise_and_end_at_zero(length, step):
    for schedule in (CosineRampDown(0.7, length), UncertaintyThreshold(length)):
        assert 0.7 >= schedule(step) >= schedule(step + 1) >= 0.0
        assert schedule(length) == schedule(length + step) == 0.0


def test_ramps_pass_through_the_values_of_their_formulas():
    assert SigmoidRampUp(2.0, 40)(0) == pytest.approx(2 * math.exp(-5))
    assert SigmoidRampUp(2.0, 40)(20) == pytest.approx(2 * math.exp(-1.25))
    assert LinearRampUp(2.0, 40)(0) == 0.0
    assert LinearRampUp(2.0, 40)(10) == pytest.approx(0.5)
    assert CosineRampDown(2.0, 40)(0) == 2.0
    assert CosineRampDown(2.0, 40)(20) == pytest.approx(1.0)
    assert Constant(3)(9) == 3.0


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 40))
def test_uncertainty_threshold_selects_what_the_entropy_rule_selects(base, entropy, step):
    ramp = math.exp(-5 * (1 - step / 40) ** 2)
    bound = base + (1 - base) * ramp
    if abs(entropy - bound) > 1e-9:  # entropy in units of ln C
        assert (1 - entropy > UncertaintyThreshold(40, base)(step)) == (entropy < bound)


def test_numbers_become_constants_and_callables_stay_themselves():
    assert as_schedule(2) == Constant(2.0)
    assert as_schedule(math.sqrt) is math.sqrt
    for wrong in ("0.5", None, True):
        kind = type(wrong).__name__
        with pytest.raises(TypeError, match=f"^value: got {kind}, expected a number or a callable"):
            as_schedule(wrong)
        with pytest.raises(TypeError, match=f"^weight: got {kind}, expected a number or a callabl"):
            as_schedule(wrong, "weight")
    with pytest.raises(ValueError, match="^weight: got inf, expected a finite number"):
        as_schedule(math.inf, "weight")


def test_arguments_out_of_range_are_named():
    for ramp in (SigmoidRampUp, LinearRampUp, CosineRampDown):
        with pytest.raises(ValueError, match="^length: got -1, expected at least 0"):
            ramp(1.0, -1)
        with pytest.raises(ValueError, match="^value: got nan, expected a finite number"):
            ramp(math.nan, 10)
        with pytest.raises(TypeError, match="^length: got str, expected a number"):
            ramp(1.0, "10")
        with pytest.raises(ValueError, match="^length: got inf, expected a finite number"):
            ramp(1.0, math.inf)
    with pytest.raises(ValueError, match=r"^base: got 1.5, expected .* \[0, 1\]"):
        UncertaintyThreshold(10, base=1.5)
    with pytest.raises(ValueError, match="^step: got -3, expected at least 0"):
        LinearRampUp(1.0, 10)(-3)
