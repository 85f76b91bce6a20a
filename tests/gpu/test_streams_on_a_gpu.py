"""Copies that are still under way, streams beside the default one, and a second GPU."""

from __future__ import annotations

import pytest
import torch

import fastmt
from benchmarks import gpu_checks, inputs
from benchmarks.shapes import Shape
from fastmt import selftest
from fastmt.networks import UNet

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)
GPU = torch.device("cuda", 0)
CYCLES = 50_000_000  # tens of milliseconds, in which the host runs ahead of a stream
each_stream = pytest.mark.parametrize("side", [False, True], ids=["default", "side"])


def stream_of(side):
    """A stream that goes on where the current one is."""
    current = torch.cuda.current_stream(GPU)
    stream = torch.cuda.Stream(GPU) if side else current
    stream.wait_stream(current)
    return stream


@torch.no_grad()
def move(student, by):
    for parameter in student.parameters():
        parameter.mul_(-1.25).add_(by)


def make_teachers(*devices):
    torch.manual_seed(0)
    student = UNet(5, width=4).to(GPU)
    return student, [fastmt.EMATeacher(student, 0.9, device=device) for device in devices]


def assert_alike(near, far):
    for average, other in zip(near.module.parameters(), far.module.parameters(), strict=True):
        torch.testing.assert_close(other, average.cpu(), rtol=1e-5, atol=1e-5)


@each_stream
def test_a_teacher_in_host_memory_has_its_student_as_it_was_at_each_update(side):
    student, (near, far) = make_teachers(None, "cpu")
    with torch.cuda.stream(stream_of(side)):
        for step in range(4):
            torch.cuda._sleep(CYCLES)
            move(student, step)
            near.update()
            far.update()
            move(student, 0.5)  # what the student becomes later is none of this update
        far.flush()
        assert_alike(near, far)


@each_stream
def test_teachers_in_host_memory_leave_out_what_only_the_gpu_knows_to_be_skipped(side):
    student, (near, far, other) = make_teachers(None, "cpu", "cpu")
    with torch.cuda.stream(stream_of(side)):
        for step, value in enumerate((1.0, float("inf"), 2.0)):
            torch.cuda._sleep(CYCLES)
            finite = torch.full((), value, device=GPU).isfinite()
            move(student, step)
            near.update(finite=finite)
            fastmt.update_together([far, other], finite=finite)
        for teacher in (far, other):
            assert teacher.progress()["updates"] == 2
            assert_alike(near, teacher)


@pytest.mark.parametrize(
    ("name", "size"), [("cpp", (64, 64)), ("triton", (64, 64)), ("triton", None)]
)
def test_kernels_read_what_the_stream_that_they_are_called_on_has_made(name, size):
    if name not in gpu_checks.serving(selftest.PLAIN["ema_update_"], GPU):
        pytest.skip(f"no {name} kernels here")
    shape = Shape(2, 5, (32, 32))
    logits = [inputs.logits(shape, device=GPU, seed=seed) for seed in (0, 1)]
    labels = inputs.labels(Shape(2, 5, size or shape.spatial), device=GPU, seed=2)
    made = [*logits, labels, torch.ones(40_000, device=GPU)]

    def results(student, teacher, labels, value):
        student, average = student.requires_grad_(), torch.zeros(40_000, device=GPU)
        loss = fastmt.consistency_loss(student, teacher, threshold=0.3, size=size)
        loss = loss + fastmt.cross_entropy(student, labels)
        (gradient,) = torch.autograd.grad(2 * loss, student)
        fastmt.ema_update_([average], [value], 0.5)
        scores = fastmt.softmax_confidence(teacher, size=size) if name == "triton" else ()
        return [loss.detach(), gradient, *scores, average]

    with fastmt.backend(name, strict=True):
        expected = results(*(tensor.clone() for tensor in made))
        later = [torch.zeros_like(tensor) for tensor in made]
        with torch.cuda.stream(stream := stream_of(True)):
            torch.cuda._sleep(CYCLES)
            torch._foreach_copy_(later, made)
            found = results(*later)
        stream.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("operation", selftest.PLAIN)
def test_kernels_run_where_their_tensors_are_whatever_device_is_the_current_one(operation):
    build, other = selftest.PLAIN[operation], torch.device("cuda", 1)
    for backend in gpu_checks.serving(build, other):
        gpu_checks.is_right(build, torch.float32, backend, other)
        assert torch.cuda.current_device() == 0
