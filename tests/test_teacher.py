"""The averaged network: what update() does to parameters and buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from followed import Net, advance, assert_same, follow, weights

from fastmt import EMATeacher


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Net()


def test_it_starts_as_a_copy_in_eval_mode_that_needs_no_gradient(student):
    teacher = EMATeacher(student.train())
    assert_same(teacher.module, student)
    assert not teacher.training
    assert not teacher.module.training
    assert student.training
    assert all(not p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    advance(student, 0)
    assert not torch.equal(teacher.module.first.weight, student.first.weight)


def test_without_warmup_every_update_takes_the_same_decay(student):
    teacher = EMATeacher(student, decay=0.9, warmup=None)
    expected = weights(student)
    for seen in follow(teacher, student, 3):
        expected = {n: 0.9 * expected[n] + 0.1 * seen[n] for n in seen}
    for name, average in teacher.module.named_parameters():
        torch.testing.assert_close(average, expected[name])


def test_reciprocal_warmup_is_the_plain_mean_of_the_first_students(student):
    teacher = EMATeacher(student, decay=0.99)
    seen = follow(teacher, student, 7)
    for name, average in teacher.module.named_parameters():
        mean = torch.stack([each[name] for each in seen]).mean(0)
        torch.testing.assert_close(average, mean)
    assert teacher.current_decay() == pytest.approx(1 - 1 / 8)


def test_reciprocal_warmup_ends_at_the_decay(student):
    teacher = EMATeacher(student, decay=0.75)
    follow(teacher, student, 10)
    assert teacher.current_decay() == 0.75


def test_the_first_student_is_taken_whole(student):
    with torch.no_grad():
        student.first.weight.fill_(1e8)
    teacher = EMATeacher(student, buffers="copy")
    follow(teacher, student, 1)
    assert_same(teacher.module, student)


def test_a_callable_warmup_gives_the_decay_of_each_update(student):
    asked = []
    teacher = EMATeacher(student, warmup=lambda t: asked.append(t) or 0.5)
    follow(teacher, student, 3)
    assert asked == [0, 1, 2]


def test_half_life_is_the_number_of_updates_after_which_a_weight_counts_half(student):
    teacher = EMATeacher(student, half_life=10, warmup=None)
    assert teacher.decay**10 == pytest.approx(0.5)


def test_until_start_the_teacher_is_a_plain_copy(student):
    teacher = EMATeacher(student, decay=0.9, start=3)
    for seed in range(3):
        advance(student, seed)
        teacher.update()
        assert_same(teacher.module, student)
    assert teacher.updates == 0


def test_update_every_averages_every_so_many_calls(student):
    teacher = EMATeacher(student, decay=0.5, warmup=None, update_every=3)
    start = weights(student)
    seen = follow(teacher, student, 5)
    assert teacher.updates == 1
    expected = 0.5 * start["first.weight"] + 0.5 * seen[2]["first.weight"]
    torch.testing.assert_close(teacher.module.first.weight.detach(), expected)


def test_buffers_are_copied_averaged_or_kept_and_integers_copied_unless_kept(student):
    rules = ("copy", "ema", "keep")
    teachers = {r: EMATeacher(student, 0.5, warmup=None, buffers=r) for r in rules}
    with torch.no_grad():
        student.norm.running_mean.fill_(1e8)
    for teacher in teachers.values():
        teacher.module.norm.running_mean.fill_(3e8)
    advance(student, 0)
    for teacher in teachers.values():
        teacher.update()
    mean = student.norm.running_mean
    assert torch.equal(teachers["copy"].module.norm.running_mean, mean)
    torch.testing.assert_close(teachers["ema"].module.norm.running_mean, 1.5e8 + mean / 2)
    assert torch.equal(teachers["keep"].module.norm.running_mean, torch.full((4,), 3e8))
    for rule in ("copy", "ema"):
        assert teachers[rule].module.norm.num_batches_tracked == 1
        assert teachers[rule].module.flag
    assert teachers["keep"].module.norm.num_batches_tracked == 0
    assert not teachers["keep"].module.flag


@pytest.mark.parametrize("buffers", ["copy", "ema"])
def test_buffers_that_are_views_of_others_or_expanded_are_each_averaged_once(student, buffers):
    student.register_buffer("whole", torch.zeros(4, 3))
    student.register_buffer("flat", student.whole.view(12))
    student.register_buffer("expanded", torch.zeros(()).expand(3))
    teacher = EMATeacher(student, 0.5, warmup=None, buffers=buffers)
    student.whole.fill_(4)
    student.expanded = torch.tensor(4.0).expand(3)
    teacher.update()
    for name in ("whole", "flat", "expanded"):
        assert (teacher.module.get_buffer(name) == {"copy": 4, "ema": 2}[buffers]).all(), name


def test_tied_parameters_stay_tied_and_are_averaged_once(student):
    teacher = EMATeacher(student, 0.5, warmup=None)
    before = teacher.module.last.weight.clone()
    advance(student, 0)
    teacher.update()
    assert teacher.module.tied is teacher.module.last.weight
    torch.testing.assert_close(teacher.module.tied, (before + student.tied.detach()) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_student_has_a_float32_teacher_that_moves(dtype):
    student = Net(dtype)
    teacher = EMATeacher(student, decay=0.999, warmup=None)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    with torch.no_grad():
        for p in student.parameters():
            p.fill_(1)
        for p in teacher.parameters():
            p.fill_(0)
    for _ in range(3):
        teacher.update()
    torch.testing.assert_close(teacher.module.first.bias, torch.full((4,), 1 - 0.999**3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_the_teacher_of_a_half_precision_student_runs_in_its_own_dtype(dtype, training):
    student = Net(torch.bfloat16)
    teacher = EMATeacher(student, dtype=dtype).train(training)
    wide = dtype or torch.float32
    assert teacher(torch.randn(5, 3, dtype=wide)).dtype == wide
    teacher.update()
    assert teacher.module.norm.running_mean.dtype == wide


def test_a_layer_that_holds_weak_references_to_its_weights_is_widened_as_well():
    teacher = EMATeacher(torch.nn.GRU(2, 3).bfloat16())
    assert teacher(torch.rand(4, 1, 2))[0].dtype == torch.float32


def test_buffers_keep_their_dtype_where_parameters_are_narrowed_or_have_another(student):
    student.register_buffer("table", torch.zeros(2, dtype=torch.bfloat16))
    narrow = EMATeacher(student, dtype=torch.bfloat16, rounding="kahan").module
    assert narrow.norm.running_mean.dtype == torch.float32
    assert EMATeacher(student).module.table.dtype == torch.bfloat16


def test_a_float64_teacher_averages_in_float64(student):
    teacher = EMATeacher(student, decay=0.9, warmup=None, dtype=torch.float64)
    start = weights(student)["first.bias"].double()
    (seen,) = follow(teacher, student, 1)
    expected = 0.9 * start + (1 - 0.9) * seen["first.bias"].double()
    torch.testing.assert_close(teacher.module.first.bias.detach(), expected, rtol=1e-14, atol=0)


def test_update_without_finite_gradients_changes_nothing(student):
    teacher = EMATeacher(student)
    advance(student, 0)
    before = copy.deepcopy(teacher.module)
    state = teacher.calls, teacher.updates, teacher.current_decay()
    teacher.update(finite=torch.tensor(False))
    assert_same(teacher.module, before)
    assert state == (teacher.calls, teacher.updates, teacher.current_decay())
    teacher.update(finite=torch.tensor(True))
    assert_same(teacher.module, student)


def test_weights_that_autocast_remembers_are_those_that_the_student_carries(student):
    student.eval()
    teacher = EMATeacher(student)
    advance(student, 0)
    x = torch.randn(2, 3)
    with torch.autocast("cpu"):
        own, average = student(x), teacher(x)
        assert not torch.equal(own, average)
        with teacher.swapped():
            assert torch.equal(student(x), average)
        assert torch.equal(student(x), own)
        teacher.copy_to(student)
        assert torch.equal(student(x), average)
