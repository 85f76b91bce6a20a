import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training import (
    CLASSES,
    STILL,
    Net,
    Stateful,
    assert_same,
    everything,
    make_batch,
    make_trainer,
)

from fastmt.consistency import ConsistencyLoss
from fastmt.schedules import LinearRampUp
from fastmt.steps import StepReport
from fastmt.teacher import EMATeacher
from fastmt.trainer import MeanTeacher


def test_student_sees_both_domains_in_one_forward_and_teacher_the_other_view():
    trainer = make_trainer(style=None, noise=(0.1, 0.2))
    source, labels, target = make_batch()
    trainer.step(source, labels, target)
    (seen,) = trainer.student.seen
    (view_2,) = trainer.teacher.module.seen
    assert torch.equal(seen[:2], source)
    for view in (seen[2:], view_2):
        noise = view - target
        assert 0 < noise.abs().max() <= 0.2 + 1e-6
    assert not torch.equal(seen[2:], view_2)


def test_step_is_the_gradient_of_both_losses_and_the_moving_average():
    trainer = make_trainer(optimizer=torch.optim.SGD, lr=0.5, weight=3.0, decay=0.9, **STILL)
    source, labels, target = make_batch()
    student, teacher = copy.deepcopy(trainer.student), copy.deepcopy(trainer.student)
    logits, guide = (
        nn.functional.interpolate(z, size=(12, 16), mode="bilinear")
        for z in (student(torch.cat([source, target])), teacher(target))
    )
    supervised = nn.functional.cross_entropy(logits[:2], labels.long(), ignore_index=255)
    consistency = (logits[2:].softmax(1) - guide.softmax(1)).square().sum(1).mean()
    (supervised + 3.0 * consistency).backward()

    report = trainer.step(source, labels, target)

    assert report.item("supervised") == pytest.approx(supervised.item(), rel=1e-5)
    assert report.item("consistency") == pytest.approx(consistency.item(), rel=1e-4)
    expected_loss = (supervised + 3.0 * consistency).item()
    assert report.item("loss") == pytest.approx(expected_loss, rel=1e-5)
    for trained, reference in zip(trainer.student.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(trained, reference - 0.5 * reference.grad, rtol=1e-4, atol=1e-6)
    trainer.step(source, labels, target)
    trainer.teacher.decay = 0.9
    before = [p.clone() for p in trainer.teacher.parameters()]
    for _ in range(12):
        trainer.step(source, labels, target)
        before = [p.clone() for p in trainer.teacher.parameters()]
    trainer.step(source, labels, target)
    for old, new, student_parameter in zip(
        before, trainer.teacher.parameters(), trainer.student.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student_parameter.detach())


def test_teacher_gets_no_gradient_and_copies_the_buffers():
    trainer = make_trainer()
    for seed in range(3):
        trainer.step(*make_batch(seed))
    assert all(p.grad is None for p in trainer.teacher.parameters())
    student_buffers = dict(trainer.student.named_buffers())
    for name, buffer in trainer.teacher.module.named_buffers():
        assert torch.equal(buffer, student_buffers[name])
    assert student_buffers["body.1.num_batches_tracked"] == 3


def test_weight_and_threshold_follow_their_schedules():
    trainer = make_trainer(weight=LinearRampUp(4.0, 4), threshold=lambda step: 0.2 * step)
    reports = [trainer.step(*make_batch(seed)) for seed in range(3)]
    assert [r.weight for r in reports] == [0.0, 1.0, 2.0]
    assert [r.threshold for r in reports] == pytest.approx([0.0, 0.2, 0.4])
    assert [r.step for r in reports] == [0, 1, 2]
    assert trainer.step(*make_batch()).as_dict()["selected"] < 1.0


def test_a_step_calls_each_schedule_once_and_reports_what_it_trained_with():
    schedules = weight, threshold, decay = Stateful(0.5), Stateful(0.01), Stateful(0.1)
    used = []

    def consistency(*logits, threshold, **call):
        used.append(threshold)
        return ConsistencyLoss()(*logits, threshold=threshold, **call)

    student = Net()
    trainer = MeanTeacher(
        student,
        torch.optim.SGD(student.parameters(), lr=0.1),
        teacher=EMATeacher(student, decay),
        consistency=consistency,
        weight=weight,
        threshold=threshold,
    )
    for n in (1, 2):
        report = trainer.step(*make_batch())
        assert [len(schedule.given) for schedule in schedules] == [n] * 3
        assert (report.weight, report.threshold) == (weight.given[-1], used[-1])
        expected = report.supervised + report.weight * report.consistency
        torch.testing.assert_close(report.loss, expected)
    report = trainer.supervised_step(*make_batch()[:2])
    assert (report.weight, report.threshold) == (0.0, threshold.given[-1])
    assert [len(schedule.given) for schedule in schedules] == [3] * 3


def test_threshold_above_every_score_selects_nothing_and_has_no_consistency():
    report = make_trainer(threshold=1.1).step(*make_batch())
    assert report.item("selected") == 0 and report.item("consistency") == 0
    assert report.item("loss") == report.item("supervised")


def test_accumulation_equals_the_whole_batch_without_batch_norm():
    whole = make_trainer({"norm": False}, torch.optim.SGD, jitter={})
    parts = make_trainer({"norm": False}, torch.optim.SGD, jitter={}, accumulate=2)
    for seed in range(3):
        batch = make_batch(seed, count=4)
        expected, report = whole.step(*batch), parts.step(*batch)
        assert report.item("loss") == pytest.approx(expected.item("loss"), rel=1e-5)
    assert len(parts.student.seen) == 6 and len(parts.student.seen[0]) == 4
    for a, b in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_gradient():
    trainer = make_trainer(optimizer=torch.optim.SGD, lr=1.0, clip_norm=1e-3)
    before = [p.detach().clone() for p in trainer.student.parameters()]
    trainer.step(*make_batch())
    moved = [a - b for a, b in zip(trainer.student.parameters(), before, strict=True)]
    assert torch.nn.utils.get_total_norm(moved).item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_amp_trains_with_losses_near_full_precision(dtype):
    full, mixed = make_trainer(seed=3), make_trainer(seed=3, amp=dtype)
    for seed in range(3):
        expected, report = full.step(*make_batch(seed)), mixed.step(*make_batch(seed))
        assert report.loss.dtype == torch.float32 and report.item("skipped") == 0
        assert report.item("loss") == pytest.approx(expected.item("loss"), rel=0.05)


@pytest.mark.parametrize("wrap", [lambda z: {"out": z}, lambda z: SimpleNamespace(logits=z)])
def test_dict_and_object_outputs_train_like_tensors(wrap):
    plain, wrapped = make_trainer(), make_trainer({"wrap": wrap})
    for seed in range(2):
        batch = make_batch(seed)
        assert plain.step(*batch).as_dict() == wrapped.step(*batch).as_dict()


def test_logits_of_different_resolution_meet_at_the_images_resolution():
    trainer = make_trainer()
    trainer.teacher.module.wrap = lambda z: nn.functional.interpolate(z, scale_factor=0.5)
    assert math.isfinite(trainer.step(*make_batch()).item("consistency"))


def test_supervised_step_learns_the_source_and_averages_the_teacher():
    trainer = make_trainer(lr=0.05)
    source, labels, _ = make_batch()
    reports = [trainer.supervised_step(source, labels) for _ in range(30)]
    assert reports[-1].item("loss") < 0.8 * reports[0].item("loss")
    assert reports[0].weight == 0 and trainer.steps == 30
    assert trainer.teacher.updates == 30


def test_a_teacher_of_the_callers_is_used():
    student = Net()
    teacher = EMATeacher(student, 0.5, warmup=None)
    trainer = MeanTeacher(student, torch.optim.SGD(student.parameters(), lr=0.1), teacher=teacher)
    trainer.step(*make_batch())
    assert trainer.teacher is teacher and teacher.updates == 1


def test_each_module_of_the_teacher_has_the_mode_of_the_students():
    trainer = make_trainer()
    trainer.student.body[1].eval()  # frozen statistics
    modes = []
    trainer.teacher.module.body[1].register_forward_hook(lambda m, *_: modes.append(m.training))
    trainer.step(*make_batch())
    assert modes == [False] and trainer.teacher.module.body[3].training and trainer.teacher.training
    trainer.student.eval()
    trainer.step(*make_batch())
    assert not any(module.training for module in trainer.teacher.modules())


@pytest.mark.parametrize("rule", ["keep", "ema"])
def test_passes_of_the_teacher_leave_its_buffers_to_its_rule(rule):
    student = Net()
    teacher = EMATeacher(student, 0.9, warmup=None, buffers=rule)
    trainer = MeanTeacher(student, torch.optim.SGD(student.parameters(), lr=0.1), teacher=teacher)
    before = teacher.module.body[1].running_mean.clone()
    trainer.step(*make_batch())
    moved = 0.9 * before + 0.1 * student.body[1].running_mean
    expected = before if rule == "keep" else moved
    assert not torch.equal(moved, before)
    torch.testing.assert_close(teacher.module.body[1].running_mean, expected)


def test_between_updates_the_teacher_keeps_its_buffers():
    student = Net()
    teacher = EMATeacher(student, update_every=2)
    trainer = MeanTeacher(student, torch.optim.SGD(student.parameters(), lr=0.1), teacher=teacher)
    trainer.step(*make_batch())
    assert not teacher.module.body[1].running_mean.any()


def test_a_loss_of_the_callers_may_use_the_teachers_logits_directly():
    def consistency(student, teacher, **_):
        loss = nn.functional.mse_loss(student, teacher) + (student * teacher).mean()
        return loss, (loss.detach(), loss.detach())

    report = make_trainer(consistency=consistency).step(*make_batch())
    assert math.isfinite(report.item("consistency"))


def test_gradients_outside_of_the_optimiser_do_not_gather():
    student = Net()
    trainer = MeanTeacher(student, torch.optim.SGD(student.body[4].parameters(), lr=0.0), **STILL)
    gradients = []
    for _ in range(2):
        trainer.step(*make_batch())
        gradients.append(student.body[0].weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_what_is_frozen_in_a_student_stays_and_the_rest_trains():
    student = Net()
    student.body[0].requires_grad_(False)
    before = copy.deepcopy(student.body)
    trainer = MeanTeacher(student, torch.optim.SGD(student.parameters(), lr=0.1), **STILL)
    trainer.step(*make_batch())
    assert torch.equal(student.body[0].weight, before[0].weight)
    assert not torch.equal(student.body[4].weight, before[4].weight)


def test_a_teacher_made_from_another_network_follows_the_trainers_student():
    other = make_trainer()  # nothing but the teacher knows it, once it is gone
    teacher, reference = copy.deepcopy(other.teacher), make_trainer(**STILL)
    trainer = make_trainer(teacher=teacher, **STILL)
    for each in (trainer, reference):
        each.step(*make_batch())
    assert teacher.updates == 1
    assert_same(everything(trainer), everything(reference))


def test_a_supervised_step_needs_no_unit_range_for_a_style_it_does_not_use():
    source, labels, _ = make_batch()
    trainer = make_trainer()
    trainer.supervised_step(source * 4 - 2, labels)
    with pytest.raises(ValueError, match="source_images: got values"):
        make_trainer(jitter={}).supervised_step(source * 4 - 2, labels)
    assert trainer.steps == 1


def test_a_report_is_read_at_once_and_figures_by_name(monkeypatch):
    report = make_trainer(threshold=lambda t: torch.linspace(0, 0.1, CLASSES)).step(*make_batch())
    figures = report.as_dict()
    names = ("loss", "supervised", "consistency", "selected", "mean_score", "skipped", "weight")
    assert list(figures) == [*names, "step"]
    assert all(figures[name] == report.item(name) for name in figures)
    with pytest.raises(ValueError, match="^threshold: got tensor"):
        report.item("threshold")
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "__float__", None)  # one wait for each would be six
        report.as_dict()
    plain = StepReport(*torch.arange(6.0), 1.0, torch.tensor(0.5), 3)
    assert plain.as_dict()["threshold"] == plain.item("threshold") == 0.5
