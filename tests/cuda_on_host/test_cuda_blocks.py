"""What the blocks and threads of csrc/cuda share: images, shared memory, any order of threads."""

from __future__ import annotations

import pytest
import torch
from agreement import FIXED, assert_consistency
from on_gpu import OnGpu
from operands import random_logits
from test_upsampling import assert_cross_entropy_is_the_reference

import fastmt
from benchmarks.cuda_resources import REACH, shared_bytes
from fastmt import reference


@pytest.mark.parametrize("classes", [*FIXED, 4])
@pytest.mark.parametrize(
    ("low", "size"),
    [
        ((3, 5), (210, 300)),
        ((30, 40), (5, 300)),
        ((2, 3000), (3, 40)),
        ((3, 5), (65, 40)),  # the last band has one row more than a block walks, the first has not
        ((3, 5), (34, 40)),  # two bands of 17 rows each, for the borders are theirs too
        ((22, 5), (64, 40)),
        ((260, 3), (65, 9)),  # where several bands have no row, or one
    ],
)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.usefixtures("busy_blocks")
def test_images_of_many_blocks(classes, low, size, align_corners):
    student, teacher = (random_logits((2, classes, *low), seed, 4.0) for seed in (1, 2))
    for loss in ("mse", "ce", "kl"):
        assert_consistency(student, [teacher], size, 0.4, align_corners, loss=loss)
    labels = reference.upsample(teacher, size, align_corners).argmax(1)
    for smoothing in (0.0, 0.1):
        assert_cross_entropy_is_the_reference(
            student, labels, align_corners=align_corners, label_smoothing=smoothing
        )


@pytest.mark.parametrize("classes", [*FIXED, 4])
def test_a_large_batch_of_which_a_gpu_gives_blocks_several_bands(operations, classes):
    if not isinstance(operations, OnGpu):
        pytest.skip("a processor's blocks walk several bands of any batch")
    low, size = (512, classes, 22, 5), (64, 40)
    student, teacher = (random_logits(low, seed, 4.0) for seed in (1, 2))
    for loss in ("mse", "ce", "kl"):
        assert_consistency(student, [teacher], size, 0.4, loss=loss)
    labels = reference.upsample(teacher, size, False).argmax(1)
    for smoothing in (0.0, 0.1):
        assert_cross_entropy_is_the_reference(
            student, labels, align_corners=False, label_smoothing=smoothing
        )


@pytest.mark.parametrize("classes", [*FIXED, 4])
def test_tiles_that_touch_more_logits_than_a_block_has_memory_for_are_made_narrower(classes):
    student, teacher = (random_logits((1, classes, 2, 60_000), seed, 4.0) for seed in (1, 2))
    for loss in ("mse", "kl"):
        assert_consistency(student, [teacher], (3, 130), 0.4, loss=loss)
    labels = torch.arange(3 * 130).view(1, 3, 130) % classes
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
    for _ in range(5):  # in each of the orders
        for one, other in zip(first, everything(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("classes", FIXED)
def test_the_table_of_resources_knows_the_shared_memory(operations, classes):
    student, teacher = (random_logits((1, classes, 2, 32), seed) for seed in (1, 2))
    if isinstance(operations, OnGpu):
        pytest.skip("the host's launches measure it")
    operations.most_shared_bytes()

    def assert_shared(grids, staged, gradient):
        expected = shared_bytes(classes, grids, REACH, staged, gradient)
        assert operations.most_shared_bytes() == expected

    for loss, staged in (("mse", True), ("kl", False)):
        assert_consistency(student, [teacher], (4, 256), loss=loss)
        assert_shared(2, staged, gradient=True)
    operations.softmax_confidence([student], 0, 1.0, [4, 256], False)
    assert_shared(1, staged=False, gradient=False)
