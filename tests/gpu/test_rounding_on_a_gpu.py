"""Teachers in half precision on a GPU: the reference to the bit, in one launch, also of a graph."""

from __future__ import annotations

import pytest
import torch

import fastmt
from benchmarks import gpu_checks, machine
from fastmt import selftest
from fastmt.networks import UNet

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)
GPU = torch.device("cuda", 0)
KINDS = [
    {"dtype": dtype, "rounding": rounding}
    for dtype in (torch.bfloat16, torch.float16)
    for rounding in ("stochastic", "kahan")
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["rounding"])


@pytest.fixture(params=["cpp", "triton"])
def backend(request):
    if request.param not in gpu_checks.serving(selftest.PLAIN["ema_update_"], GPU):
        pytest.skip(f"no {request.param} kernel serves the moving average here")
    return request.param


def make_student():
    torch.manual_seed(0)
    return UNet(5, width=4).to(GPU)


@torch.no_grad()
def move(student, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(GPU))


def assert_alike(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs if pair[0].itemsize == 2)
    assert all(torch.equal(lost, other.compensation[n]) for n, lost in one.compensation.items())


@each_kind
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_200_updates_of_several_teachers_are_the_reference_to_the_bit(backend, kind, layout):
    student = make_student().to(memory_format=layout)
    options = (kind, {**kind, "seed": 3, "decay": 0.3}, KINDS[0], {})
    fused, eager = ([fastmt.EMATeacher(student, **own) for own in options] for _ in range(2))
    for seed in range(200):
        move(student, seed)
        for name, teachers in ((backend, fused), ("eager", eager)):
            with fastmt.backend(name):
                fastmt.update_together(teachers)
    for one, other in zip(fused, eager, strict=True):
        assert_alike(one, other)


@each_kind
def test_an_update_is_one_launch_beside_those_for_decay_and_draw_and_waits_for_nothing(
    backend, kind
):
    student = make_student()
    teacher = fastmt.EMATeacher(student, **kind)
    with fastmt.backend(backend):
        count = machine.launches(teacher.update)
        with gpu_checks.waiting_is_an_error(GPU):
            teacher.update()
    assert count in (1, 2, 3, None)


@each_kind
def test_replays_of_a_captured_update_go_by_a_decay_and_a_draw_of_their_own(backend, kind):
    student = make_student()
    replayed, eager = (fastmt.EMATeacher(student, warmup="tenths", **kind) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with fastmt.backend(backend):
        replayed.update()
        replayed.put_decay()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            replayed.update()
    with fastmt.backend("eager"):
        eager.update()
        for seed in range(5):
            move(student, seed)
            replayed.advance()
            graph.replay()
            eager.update()
            assert_alike(replayed, eager)
