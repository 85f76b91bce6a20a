"""The update of teachers as on a GPU, a table and one launch, against the one by tensors."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastmt
from fastmt import cpp_backend, ema_plan, ema_table
from fastmt.ema_bound import AVERAGE, COPY, KAHAN, KEEP, STOCHASTIC, Row
from fastmt.ema_layout import Layout
from fastmt.ema_table import DeviceUpdate

pytestmark = [
    pytest.mark.skipif(cpp_backend.missing() is not None, reason="the C++ kernels are not built"),
    pytest.mark.usefixtures("one_thread"),
]
CPU = torch.device("cpu")


class Net(nn.Module):
    """Parameters and buffers of every kind that a teacher meets."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1))
        self.tied = self.body[0].weight
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.register_buffer("in_half", torch.randn(7).bfloat16())
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("bytes", torch.arange(5, dtype=torch.uint8))
        self.register_buffer("words", torch.arange(5).to(torch.uint16))
        self.register_buffer("wide", torch.randn(3, dtype=torch.float64))
        self.register_buffer("complex", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0))


def moved(network, seed):
    """Every parameter and buffer becomes another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.dtype == torch.bool:
                tensor.logical_not_()
            elif tensor.dtype == torch.uint16:
                tensor.copy_(tensor.int() + seed + 1)
            elif tensor.is_floating_point() or tensor.is_complex():
                tensor.add_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.add_(seed + 1)


def assert_alike(one, other):
    for mine, others in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(*(m for m in (mine[1], others[1])), rtol=1e-6, atol=1e-7)
        assert mine[0] == others[0]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """From here on tensors of the CPU are updated as those of a GPU."""
    return lambda: monkeypatch.setattr(ema_plan, "is_read_by", lambda *_: True)


def teachers(**options):
    torch.manual_seed(0)
    student = Net()
    options = {"decay": 0.9, "warmup": "tenths", **options}
    return student, fastmt.EMATeacher(student, **options), fastmt.EMATeacher(student, **options)


@pytest.mark.parametrize("buffers", ["copy", "ema", "keep"])
@pytest.mark.parametrize("options", [{}, {"start": 2}, {"update_every": 2}])
@pytest.mark.parametrize("given", ["number", "tensor"])
def test_few_launches_do_what_one_a_tensor_does(buffers, options, given, as_on_a_gpu):
    student, by_tensor, by_table = teachers(buffers=buffers, **options)
    states = []
    for seed in range(5):
        moved(student, seed)
        by_tensor.update()
        states.append(copy.deepcopy(by_tensor))
    as_on_a_gpu()
    student = teachers()[0]
    for seed, expected in enumerate(states):
        moved(student, seed)
        decay = by_table.put_decay()[0] if given == "tensor" else None
        by_table.update(student=student, decay=decay)
        assert_alike(by_table, expected)


def test_what_no_launch_takes_is_averaged_by_decays_that_the_host_knows(as_on_a_gpu, monkeypatch):
    """A tensor on the CPU of a student on a GPU would wait for one that lies there."""
    as_on_a_gpu()
    monkeypatch.setattr(ema_plan, "are_on_host", lambda tensors: False)
    given, update = [], ema_plan.update_eagerly

    def noted(row, decays, draws):
        given.extend(decays)
        update(row, decays, draws)

    monkeypatch.setattr(ema_plan, "update_eagerly", noted)
    student, teacher, expected = teachers(buffers="ema")
    for seed in range(3):
        moved(student, seed)
        teacher.update()
    assert given and {type(decay) for decay in given} == {float}
    monkeypatch.undo()
    student = teachers()[0]  # as it was
    for seed in range(3):
        moved(student, seed)
        expected.update(student=student)
    assert_alike(teacher, expected)


def test_a_step_that_was_skipped_changes_nothing(as_on_a_gpu):
    as_on_a_gpu()
    student, teacher, _ = teachers()
    for finite in (True, False, True):
        moved(student, int(finite))
        before, versions = copy.deepcopy(teacher), teacher.module.scalar._version
        decay = torch.tensor(0.5, dtype=torch.float64)
        teacher.update(finite=torch.tensor(finite), decay=decay)
        assert teacher.module.scalar._version > versions
        if finite:
            assert not torch.equal(teacher.module.scalar, before.module.scalar)
            assert torch.equal(teacher.module.bytes, student.bytes)
        else:
            assert_alike(teacher, before)


def test_a_tensor_that_moved_in_memory_is_found_again(as_on_a_gpu):
    as_on_a_gpu()
    student, teacher, other = teachers(warmup=None)
    fastmt.update_together([teacher, other])
    other.module.scalar.data = other.module.scalar.data.clone()
    student.scalar.data = torch.tensor(5.0)
    before = [t.module.scalar.item() for t in (teacher, other)]
    fastmt.update_together([teacher, other])
    for average, old in zip((teacher, other), before, strict=True):
        assert average.module.scalar.item() == pytest.approx(0.9 * old + 0.1 * 5.0)


@pytest.mark.parametrize("name", ["in_half", "wide"])  # in the table and left out of it
def test_memory_that_becomes_shared_is_refused(name, as_on_a_gpu):
    student, teacher, _ = teachers(buffers="ema")
    as_on_a_gpu()
    teacher.update()
    student.get_buffer(name).data = teacher.module.get_buffer(name).data
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^student: '{name}' shares storage"):
            teacher.update()


def test_what_is_no_matter_of_memory_makes_no_new_table():
    tensors = [torch.zeros(3), torch.ones(2, 2)]
    layout = Layout(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layout.is_that_of(tensors)
    with torch.inference_mode():
        assert layout.is_that_of(tensors)
    assert layout.is_that_of([tensors[0].requires_grad_(), tensors[1]])
    assert not layout.is_that_of([tensors[0], tensors[1].t()[:1]])
    assert not layout.is_that_of([tensors[0], tensors[1].view(torch.int32)])


class Counting:
    """The C++ kernels, and how often they were launched."""

    launches = 0

    def ema_update_(self, *arguments):
        self.launches += 1
        torch.ops.fastmt.ema_update_(*arguments)


def row(average, value, mode=AVERAGE):
    return Row(0, (average,), value, (mode,), (None,))


COPIED = (torch.bool, torch.uint16, torch.int64, torch.float64, torch.complex64, torch.float16)


def test_any_number_of_tensors_of_any_dtype_takes_one_launch():
    kernels = Counting()
    copied = [(torch.zeros(5, dtype=t), torch.ones(5, dtype=t)) for t in COPIED]
    widened = (torch.zeros(5), torch.ones(5).bfloat16())
    averaged = [(torch.zeros(n), torch.ones(n)) for n in range(1, 300)]
    rows = [
        *(row(*pair, COPY) for pair in (*copied, widened)),
        *(row(*pair) for pair in averaged),
        row(torch.zeros(5), torch.ones(5), KEEP),
    ]
    update = DeviceUpdate(rows, CPU)
    assert not update.rest
    update.run(kernels, [torch.tensor(0.75, dtype=torch.float64)])
    assert kernels.launches == 1
    for average, value in (*copied, widened):
        assert torch.equal(average, value.to(average.dtype))
    assert all((average == 0.25).all() for average, _ in averaged)
    assert not rows[-1].averages[0].any()


@pytest.mark.parametrize("decays", [(0.5, 0.75), (-1.0, 0.5), (0.0, 1.0), (-1.0, -1.0)])
def test_teachers_of_any_decay_are_updated_in_one_launch(decays, as_on_a_gpu, monkeypatch):
    options = {"warmup": None, "buffers": "copy"}
    student, one, other = teachers(**options)
    moved(student, 1)
    expected = copy.deepcopy([one, other])
    for teacher, decay in zip(expected, decays, strict=True):
        teacher.update(student=student, decay=torch.tensor(decay, dtype=torch.float64))
    as_on_a_gpu()
    kernels = Counting()
    monkeypatch.setattr(ema_plan.backends, "operations", lambda backend: kernels)
    given = [torch.tensor(decay, dtype=torch.float64) for decay in decays]
    fastmt.update_together([one, other], decays=given)
    assert kernels.launches == 1
    assert_alike(one, expected[0])
    assert_alike(other, expected[1])


def test_what_no_kernel_serves_is_left_to_the_reference():
    served = row(torch.zeros(3), torch.ones(3))
    left = [
        row(torch.zeros(3, dtype=torch.float64), torch.ones(3)),
        row(torch.zeros(2, 3), torch.ones(3, 2).t()),
        row(torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=torch.int64), COPY),
        row(torch.zeros(2).cfloat(), torch.ones(2).cfloat().conj(), COPY),
        row(torch.zeros(3), torch.zeros(3), STOCHASTIC),
        row(torch.zeros(3).bfloat16(), torch.zeros(3, dtype=torch.float64), STOCHASTIC),
        Row(0, (torch.zeros(3).half(),), torch.zeros(3), (KAHAN,), (torch.zeros(6).half()[::2],)),
        row(torch.zeros(3, device="meta"), torch.zeros(3, device="meta")),
    ]
    rest = DeviceUpdate([served, *left], CPU).rest
    assert [(teacher, id(each.value)) for teacher, each in rest] == [(0, id(r.value)) for r in left]


def test_a_table_outlives_what_another_stream_still_reads_of_it(monkeypatch):
    """Else its memory would be given away on the stream that it was made on, and written there."""
    now, recorded = [1], []
    monkeypatch.setattr(ema_table, "_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    table = ema_table.Table([], CPU)
    for name in ("rows", "starts"):
        note = partial(lambda name, stream: recorded.append((name, stream)), name)
        setattr(table, name, SimpleNamespace(device=CPU, record_stream=note))
    kernels = SimpleNamespace(ema_update_=lambda *_: None)
    table.update(kernels, torch.zeros(1))
    assert not recorded
    now[0] = 2
    table.update(kernels, torch.zeros(1))
    assert recorded == [("rows", 2), ("starts", 2)]
    monkeypatch.setattr(ema_table, "is_capturing", lambda: True)  # a graph's tables are kept
    table.update(kernels, torch.zeros(1))
    assert len(recorded) == 2
