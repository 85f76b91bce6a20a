"""The goals on a GPU: every one belongs to a case, and what was measured of it decides."""

from __future__ import annotations

import gpu_results
import pytest

from benchmarks import gpu_cases, gpu_goals, gpu_report

CELLS = "consistency 8x19x1024x1024 float32 from 1/8"
AVERAGE = "EMA of 304 M in 296 tensors, float32 student"
SMALL = "confidence 1x19x64x64 float32"


def judged(case):
    """What is told of the goals of a case, and whether they are met."""
    goals = gpu_goals.judged([case])
    return {g["goal"]: (g["told"], g["met"]) for g in goals if g["case"] == case["name"]}


def test_every_goal_is_of_a_case_that_is_measured():
    cases = {case.name: case for case in gpu_cases.cases()}
    for goal in gpu_goals.GOALS:
        assert goal.case in cases
        assert cases[goal.case].compiled or "torch.compile" not in goal.told


@pytest.mark.parametrize(("own", "met"), [(1e-3, True), (1.2e-3, False)])
def test_the_variant_that_auto_takes_is_judged(own, met):
    case = gpu_results.case(CELLS, "up-sampled", {"triton": own, "cpp": 1e-9}, 11e-3, eager_s=33e-3)
    case["variants"]["eager"]["peak_extra_bytes"] = 200_000_000
    assert judged(case) == {
        "30 times as fast as eager": (f"{33e-3 / own:.2f} x", met),
        "10 times as fast as torch.compile": (f"{11e-3 / own:.2f} x", met),
        "at most 3% of eager's memory": ("2.50%", True),
    }


def test_an_average_is_judged_by_bandwidth_and_launches():
    case = gpu_results.case(AVERAGE, "moving average", {"triton": 1e-3})
    case["variants"]["triton"] |= {"of_copy": 0.8999, "launches": 1}
    assert judged(case) == {
        "at least 90% of a copy's rate": ("89.99%", False),
        "one launch, its decay on the GPU": ("1", True),
    }
    case["variants"]["triton"] |= {"of_copy": 0.9, "launches": 2}
    assert [met for _, met in judged(case).values()] == [True, False]


def test_small_calls_are_judged_by_the_call_and_eager_is_as_fast_as_itself():
    case = gpu_results.case(SMALL, "small", {"triton": 2e-5}, counts="call_s", eager_s=1.9e-5)
    assert judged(case) == {"not slower than eager": ("0.99 x", False)}
    case["auto"] = "eager"
    assert judged(case) == {"not slower than eager": ("1.00 x", True)}


def test_what_was_not_measured_meets_nothing_and_fails_nothing():
    nothing = gpu_results.case(CELLS, "up-sampled", {}, None)  # what auto takes was wrong
    dashes = gpu_results.case(AVERAGE, "moving average", {"triton": None})
    dashes["variants"]["triton"]["launches"] = None
    for goal in gpu_goals.judged([nothing, dashes]):
        assert (goal["told"], goal["met"]) == ("not measured", None)


def test_the_table_says_of_each_goal_whether_it_is_met():
    fast = gpu_results.case("confidence 8x19x1024x1024 bfloat16", "dense", {"triton": 1e-3})
    slow = gpu_results.case(SMALL, "small", {"triton": 2e-3}, counts="call_s", eager_s=1e-3)
    text = gpu_report.markdown(gpu_results.result(fast, slow))
    rows = [line for line in text.splitlines() if line.startswith("| ") and "goal" not in line]
    goals = rows[: len(gpu_goals.GOALS)]
    assert "at least 90% of a copy's rate | 100.00% | triton | yes |" in goals[1]
    assert f"| {SMALL} | not slower than eager | 0.52 x | triton | NO |" in goals
    assert sum(row.endswith("| not measured | - | - |") for row in goals) == len(goals) - 2
