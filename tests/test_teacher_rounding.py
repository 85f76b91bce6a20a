"""Teachers in half precision: stochastic rounding, Kahan's compensation, and what they are for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from followed import Net, advance, assert_same, follow
from operands import random_logits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmt import EMATeacher, MeanTeacher, backend, backends, reference
from fastmt.ema_bound import KAHAN, STOCHASTIC, Bound, Row, update_eagerly
from fastmt.rounding import random_bits

HALVES = [torch.bfloat16, torch.float16]
NEAR = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # half a step of rounding, relative


@pytest.fixture(params=["auto", "eager"], autouse=True)
def implementation(request):
    with backend(request.param):
        yield request.param


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Net()


def moved(student, steps, **options):
    """A teacher of ones after `steps` updates at 0.999 towards a student that stays at 2."""
    teacher = EMATeacher(student, 0.999, warmup=None, **options)
    with torch.no_grad():
        for average, value in zip(teacher.parameters(), student.parameters(), strict=True):
            average.fill_(1)
            value.fill_(2)
    for _ in range(steps):
        teacher.update()
    return teacher.module.first.weight


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_without_rounding_does_not_move(dtype):
    average, value = torch.ones(50, dtype=dtype), torch.full((50,), 1.25)
    for _ in range(1000):
        reference.ema_update_([average], [value], 0.999)
    assert torch.equal(average, torch.ones(50, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_kahan_follows_the_float32_teacher_over_1000_steps(student, dtype):
    wide = moved(student, 1000)
    half = moved(student, 1000, dtype=dtype, rounding="kahan")
    assert half.dtype == dtype
    error = (half.float() - wide).abs().max() / wide.abs().max()
    assert error <= 2 * NEAR[dtype]
    assert wide.mean() > 1.6


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_follows_the_float32_teacher_on_average(dtype):
    student = torch.nn.Linear(200, 100)
    teacher = EMATeacher(student, 0.999, warmup=None, dtype=dtype, rounding="stochastic")
    with torch.no_grad():
        teacher.module.weight.fill_(1)
        student.weight.fill_(2)
    for _ in range(200):
        teacher.update()
    average = teacher.module.weight.double()
    spread = average.std().item()
    assert 0 < spread < 0.1
    assert abs(average.mean().item() - (2 - 0.999**200)) < 5 * spread / average.numel() ** 0.5


VALUES = [0.0, -0.0, 1.0, -3.1415927, 1 + 2.0**-12, 65504.0, 3e-5, -(2.0**-24), 1e-9, 6.1e-5, 250.3]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", VALUES)
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(dtype, value):
    count = 100_000
    exact = torch.tensor(value)
    average, student = torch.zeros(count, dtype=dtype), exact.repeat(count)
    rounded(average, student, 0.0, draw=7)
    above = torch.nextafter(exact.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double()
    below = torch.nextafter(exact.to(dtype), torch.tensor(-torch.inf, dtype=dtype)).double()
    values = average.double()
    if exact.to(dtype).double() == exact.double():
        assert torch.equal(values, exact.double().expand(count))
        return
    assert ((values >= below) & (values <= above)).all()
    assert len(values.unique()) <= 2
    standard_error = values.std().item() / count**0.5
    assert abs(values.mean().item() - exact.double().item()) <= 5 * standard_error + 1e-12


def rounded(average, student, decay, draw, rounding="stochastic", lost=None):
    """One update through the launch, or through the reference."""
    mode = {"stochastic": STOCHASTIC, "kahan": KAHAN}[rounding]
    row = Row(3, (average,), student, (mode,), (lost,))
    if backends.choose("ema_update_", [student]).backend == "eager":
        update_eagerly(row, [decay], [draw])
    else:
        bound = Bound([row])
        assert bound.holds()
        bound.run([decay], [draw])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("student_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 3e3])
def test_the_kernel_rounds_as_the_reference_does(dtype, student_dtype, rounding, scale):
    start = (random_logits((33_000,), 1) * scale).to(dtype)
    values = [(random_logits((33_000,), i) * scale).to(student_dtype) for i in range(2, 5)]
    results = []
    for name in ("auto", "eager"):
        average, lost = start.clone(), torch.zeros_like(start)
        with backend(name):
            for draw, value in enumerate(values):
                rounded(average, value, 0.9, draw, rounding, lost if rounding == "kahan" else None)
        results.append((average, lost))
    (left, _), (right, _) = results
    # A fused multiply-add may land on the other side of a border of rounding, rarely.
    assert (left != right).float().mean() < 1e-2
    whole = [a.double() + lost.double() for a, lost in results]
    largest = torch.stack([tensor.double().abs() for tensor in (start, *values)]).amax(0)
    step = largest * 4 * NEAR[dtype] + 2.0**-24
    assert ((whole[0] - whole[1]).abs() <= step).all()
    if rounding == "kahan":
        assert ((whole[0] - whole[1]).abs() <= step * 2 * NEAR[dtype] + 2.0**-24).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_images_in_channels_last_order_are_rounded_by_the_same_random_numbers(dtype):
    value = random_logits((2, 3, 4, 5), 1).to(memory_format=torch.channels_last)
    results = []
    for name in ("auto", "eager"):
        average = torch.zeros_like(value, dtype=dtype)
        with backend(name):
            rounded(average, value, 0.0, draw=5)
        results.append(average)
    assert torch.equal(*results)
    flat = torch.zeros(value.numel(), dtype=dtype)
    rounded(flat, value.permute(0, 2, 3, 1).flatten(), 0.0, draw=5)
    assert torch.equal(results[0].permute(0, 2, 3, 1).flatten(), flat)


# The last NaN has all bits set: added to as a whole number it becomes -0.
POISONS = [
    torch.nan,
    torch.inf,
    1e30,
    torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_shows_and_leaves_with_the_next_copy(dtype, rounding, poison):
    average, lost = torch.ones(9, dtype=dtype), torch.zeros(9, dtype=dtype)
    value = torch.ones(9)
    value[4] = poison
    given = lost if rounding == "kahan" else None
    rounded(average, value, 0.5, 1, rounding, given)
    assert torch.equal(average.isfinite(), value.to(dtype).isfinite())
    assert average[4].isnan() or not value[4].isnan()
    assert lost.isfinite().all()
    rounded(average, torch.ones(9), 0.0, 2, rounding, given)
    assert torch.equal(average, torch.ones(9, dtype=dtype))


def test_the_same_seed_gives_the_same_teacher_and_another_one_another(student):
    def trained(seed):
        torch.manual_seed(0)
        own = Net()
        teacher = EMATeacher(own, 0.9, dtype=torch.bfloat16, rounding="stochastic", seed=seed)
        follow(teacher, own, 5)
        return teacher.module

    assert_same(trained(1), trained(1))
    assert not torch.equal(trained(1).first.weight, trained(2).first.weight)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copied_teacher_goes_on_with_its_compensation(student, clone):
    teacher = EMATeacher(student, 0.99, dtype=torch.bfloat16, rounding="kahan")
    follow(teacher, student, 3)
    assert any(lost.any() for lost in teacher.compensation.values())
    twin = clone(teacher)
    advance(student, 9)
    teacher.update()
    twin.update(student=student)
    assert_same(twin.module, teacher.module)


def test_a_checkpoint_holds_the_compensation(tmp_path):
    def trainer():
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, 4, 1)
        teacher = EMATeacher(network, 0.99, dtype=torch.bfloat16, rounding="kahan")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        return MeanTeacher(network, optimizer, teacher=teacher, style=None, amp=torch.bfloat16)

    def step(trainer, seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(2, 2, 3, 8, 8, generator=generator)
        labels = torch.randint(4, (2, 8, 8), generator=generator)
        trainer.step(images[0], labels, images[1])

    first, second = trainer(), trainer()
    for seed in range(3):
        step(first, seed)
    first.save(tmp_path / "checkpoint.pt")
    second.resume(tmp_path / "checkpoint.pt")
    assert any(lost.any() for lost in second.teacher.compensation.values())
    for seed in range(3, 6):
        step(first, seed)
        step(second, seed)
    assert_same(first.teacher.module, second.teacher.module)
    for name, lost in first.teacher.compensation.items():
        assert torch.equal(lost, second.teacher.compensation[name])


def test_a_half_precision_student_may_have_a_teacher_like_itself():
    teacher = EMATeacher(Net(torch.bfloat16), rounding="kahan")
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_teacher_in_half_precision_runs_a_network_with_running_statistics(autocast, training):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    teacher = EMATeacher(student, dtype=torch.bfloat16, rounding="stochastic").train(training)
    images = torch.rand(2, 3, 32, 32)
    student.train(training)(images)  # moves the statistics
    teacher.update()
    expected = student(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = teacher(images if autocast else images.bfloat16())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fake tensors ask a GPU for its neighbour")
def test_the_draw_of_a_student_on_several_gpus_serves_averages_on_each_of_them():
    with FakeTensorMode():
        average = torch.empty(3, 4, device="cuda:1", dtype=torch.bfloat16)
        draw = torch.empty((), device="cuda:0", dtype=torch.int64)
        assert random_bits(average, draw, 0).device == average.device


def test_rounding_without_half_precision_is_refused(student):
    with pytest.raises(ValueError, match="^rounding: got 'kahan' for a teacher without"):
        EMATeacher(student, rounding="kahan")
    with pytest.raises(ValueError, match="^rounding: got 'up'"):
        EMATeacher(student, dtype=torch.bfloat16, rounding="up")
