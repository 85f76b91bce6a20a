"""No kernel of csrc/cuda reads beyond its operands, and offsets of more than 2^31 are no others."""

from __future__ import annotations

import itertools

import pytest
import torch
from agreement import FIXED
from guarded import guarded
from on_gpu import OnGpu
from operands import random_logits
from test_large import (  # noqa: F401, run here on these kernels too
    test_images_more_than_2_31_elements_apart_give_the_same_results,
)

import fastmt
from fastmt.ema_table import CHUNK

SIZES = [  # (low resolution, output): one pixel, blocks without rows, tiles that are not full
    ((1, 1), (1, 1)),
    ((1, 5), (9, 40)),
    ((9, 3), (1, 70)),
    ((4, 9), (33, 130)),
    ((3, 40), (35, 90)),
]


@pytest.fixture
def poisoned(operations):
    """Not here: it would write the pages between images that are far apart."""
    if isinstance(operations, OnGpu):
        pytest.skip("of the processor's memory")


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(("low", "size"), SIZES)
@pytest.mark.parametrize("classes", [*FIXED, 1, 7])
def test_no_kernel_reads_beyond_its_operands(classes, low, size, at_end):
    def maps(dtype, low=0, high=2):
        return guarded(torch.randint(low, high, (2, *size)).to(dtype), at_end)

    for dtype, channels_last in ((torch.float32, False), (torch.float16, True)):
        order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
        student, *teachers = (
            guarded(random_logits((2, classes, *low), seed, dtype=dtype).permute(order), at_end)
            .permute([order.index(dim) for dim in range(4)])
            .requires_grad_(seed == 0)
            for seed in range(3)
        )
        weights = {"valid": maps(torch.bool), "pixel_weight": maps(torch.float32)}
        for members, loss in itertools.product((1, 2), ("mse", "kl")):
            options = {**weights, "loss": loss, "threshold": 0.3, "size": size}
            value = fastmt.consistency_loss(student, teachers[:members], **options)
            torch.autograd.grad(value, student)
        for label_dtype in (torch.uint8, torch.int64):
            labels = maps(label_dtype, high=classes)
            options = {"pixel_weight": maps(torch.float32)}
            if channels_last:
                options["class_weight"] = guarded(torch.rand(classes), at_end)
            torch.autograd.grad(fastmt.cross_entropy(student, labels, **options), student)


def test_a_chunk_behind_more_than_2_31_elements_is_updated_where_it_lies(operations):
    before = 2**31 // CHUNK + 1  # chunks that an entry of `starts` leaves out
    length = before * CHUNK + 5
    teacher, student = (torch.empty(length, dtype=torch.bfloat16) for _ in range(2))
    teacher[-5:], student[-5:] = 1, 2
    entry = [teacher.data_ptr(), student.data_ptr(), length, 1, 1, 0, 0]
    starts, decay = torch.tensor([-before, 1]), torch.tensor([0.5], dtype=torch.float64)
    operations.ema_update_(torch.tensor([entry]), starts, decay)
    assert teacher[-5:].tolist() == [1.5] * 5
