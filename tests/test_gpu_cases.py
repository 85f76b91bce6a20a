"""What the GPU benchmark times: bytes, names, inputs about which rounding decides nothing."""

from __future__ import annotations

import pytest
import torch

import fastmt
from benchmarks import gpu_cases

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_bytes_of_each_case_are_those_that_have_to_move():
    pixels, low = 2 * 16 * 24, 2 * 5 * (16 // 8) * (24 // 8)
    of_case = {
        "consistency 2x5x16x24 bfloat16": 3 * 2 * 5 * pixels,
        "consistency 2x5x16x24 float32": 3 * 4 * 5 * pixels,
        "confidence 2x5x16x24 bfloat16": (2 * 5 + 12) * pixels,
        "confidence 2x5x16x24 float32": (4 * 5 + 12) * pixels,
        "cross-entropy 2x5x16x24 bfloat16, uint8 labels": (2 * 2 * 5 + 1) * pixels,
        "consistency 2x5x16x24 float32 from 1/8": 3 * 4 * low,
        "consistency 2x5x16x24 float32 from 1/4": 3 * 4 * (4 * low),
        "confidence 2x5x16x24 float32 from 1/8": 4 * low + 12 * pixels,
        "cross-entropy 2x5x16x24 float32 from 1/4": 2 * 4 * (4 * low) + 8 * pixels,
        "cross-entropy 2x5x16x24 float32": (2 * 4 * 5 + 8) * pixels,
        "consistency 2x5x8x16x24 float32 from 1/4": 3 * 4 * (2 * 5 * 2 * 4 * 6),
        "EMA of 0 M in 5 tensors, float32 student": 12 * 5 * 21,
        "EMA of 0 M in 5 tensors, bfloat16 student": 10 * 5 * 21,
    }
    cases = gpu_cases.cases("tiny")
    assert {case.name for case in cases} == of_case.keys()
    for case in cases:
        assert case.build(CPU, False).bytes == of_case[case.name], case.name


def test_the_real_cases_have_the_sizes_of_their_names():
    names = [case.name for case in gpu_cases.cases()]
    assert len(names) == len(set(names)) == 18
    assert "consistency 8x19x1024x1024 float32 from 1/8" in names
    assert "EMA of 304 M in 296 tensors, float32 student" in names
    assert "EMA of 1 M in 1000 tensors, float32 student" in names


def test_calls_turn_through_more_memory_than_the_cache_holds():
    assert gpu_cases.sets_for(1 << 30, 50 << 20) == 1
    assert gpu_cases.sets_for(1 << 20, 50 << 20) == 100
    assert gpu_cases.sets_for(1, 50 << 20) == 512
    seen = []
    sets = [[torch.tensor(float(i))] for i in range(3)]
    call = gpu_cases._turning(lambda tensor: seen.append(int(tensor)), sets)
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_few_cases_are_compiled_the_up_sampled_and_the_small_among_them():
    compiled = [case.name for case in gpu_cases.cases() if case.compiled]
    assert compiled == [
        "consistency 8x19x1024x1024 bfloat16",
        "consistency 8x19x1024x1024 float32 from 1/8",
        "confidence 8x19x1024x1024 float32 from 1/8",
        "cross-entropy 8x19x1024x1024 float32 from 1/4",
        "consistency 1x19x64x64 float32",
        "confidence 1x19x64x64 float32",
        "cross-entropy 1x19x64x64 float32",
    ]


@pytest.mark.parametrize("stride", [4, 8])
def test_rounding_decides_about_no_pixel_of_a_large_up_sampled_case(stride):
    name = f"consistency 8x19x1024x1024 float32 from 1/{stride}"
    (case,) = [case for case in gpu_cases.cases() if case.name == name]
    _, teacher, options = case.build(CPU, False).expected.args
    images = {image.numpy().tobytes(): image for image in teacher.split(1)}
    for image in images.values():
        score = fastmt.reference.softmax_confidence(image.double(), size=options["size"]).score
        assert (score - options["threshold"]).abs().min() > 3e-6


def test_what_auto_takes_is_called_as_users_call_it(monkeypatch):
    monkeypatch.setattr(gpu_cases, "_by_backend", lambda *_: pytest.fail("within a context"))
    works = [case.build(CPU, False) for case in gpu_cases.cases("tiny")]
    served = [work for work in works if work.choice.backend != "eager"]
    if not served:
        pytest.skip("no kernel serves the CPU")
    for work in served:
        assert work.variants[work.choice.backend]()
