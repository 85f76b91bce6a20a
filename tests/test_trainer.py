import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastmt.checkpoint import CheckpointError
from fastmt.consistency import ConsistencyLoss
from fastmt.schedules import LinearRampUp
from fastmt.teacher import EMATeacher
from fastmt.trainer import MeanTeacher

CLASSES = 4
STILL = {"style": None, "noise": None}  # no randomness, so that runs can be compared


class Net(nn.Module):
    """Logits at half resolution; records what it was given."""

    def __init__(self, norm=True, dropout=0.0, wrap=None):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(8, CLASSES, 1),
        )
        self.wrap = wrap
        self.seen = []

    def forward(self, images):
        self.seen.append(images.detach().clone())
        logits = self.body(images)
        return logits if self.wrap is None else self.wrap(logits)


def make_trainer(net_options=None, optimizer=torch.optim.Adam, lr=1e-2, **options):
    torch.manual_seed(0)
    student = Net(**(net_options or {}))
    options.setdefault("consistency", ConsistencyLoss(threshold=0.0))
    return MeanTeacher(student, optimizer(student.parameters(), lr=lr), **options)


def make_batch(seed=0, count=2, size=(12, 16)):
    generator = torch.Generator().manual_seed(seed)
    source = torch.rand(count, 3, *size, generator=generator)
    labels = torch.randint(CLASSES, (count, *size), generator=generator, dtype=torch.uint8)
    labels[:, 0] = 255
    return source, labels, torch.rand(count, 3, *size, generator=generator)


def everything(trainer):
    parts = (trainer.student, trainer.teacher, trainer.optimizer)
    return copy.deepcopy([part.state_dict() for part in parts])


def assert_same(left, right):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


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


def test_threshold_above_every_score_selects_nothing_and_has_no_consistency():
    report = make_trainer(threshold=1.1).step(*make_batch())
    assert report.item("selected") == 0 and report.item("consistency") == 0
    assert report.item("loss") == report.item("supervised")


@pytest.mark.parametrize("options", [{}, {"amp": torch.float16}, {"clip_norm": 1.0}])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_non_finite_loss_leaves_everything_bitwise_unchanged_and_counts(options, optimizer):
    trainer = make_trainer(optimizer=optimizer, **options)
    trainer.step(*make_batch(0))
    before = everything(trainer)
    source, labels, target = make_batch(1)
    source[0, 0, 3, 3] = math.nan
    report = trainer.step(source, labels, target)
    assert not math.isfinite(report.item("loss")) and report.item("skipped") == 1
    assert_same(before, everything(trainer))
    report = trainer.step(*make_batch(2))
    assert math.isfinite(report.item("loss")) and report.item("skipped") == 1
    assert not torch.equal(before[0]["body.0.weight"], trainer.student.body[0].weight)


def test_non_finite_gradient_of_a_finite_loss_is_skipped():
    def overflow(logits, labels):
        return logits.sum().sub(logits.sum().detach()).abs().sqrt()  # 0 with gradient inf * sign

    trainer = make_trainer(supervised=overflow)
    before = everything(trainer)
    report = trainer.step(*make_batch())
    assert math.isfinite(report.item("loss")) and report.item("skipped") == 1
    assert_same(before, everything(trainer))


def test_skipped_step_of_float16_lowers_the_loss_scale():
    trainer = make_trainer(amp=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    report = trainer.step(*make_batch())
    assert report.item("skipped") == 1 and trainer.scaler.get_scale() == 2.0**126


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


@pytest.mark.parametrize("amp", [None, torch.float16])
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, amp):
    def make():
        trainer = make_trainer(
            {"dropout": 0.3}, jitter={}, class_mixing=0.5, weight=LinearRampUp(2.0, 5), amp=amp
        )
        trainer.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            trainer.optimizer, 1e-2, total_steps=8
        )
        return trainer

    trainer = make()
    for seed in range(3):
        trainer.step(*make_batch(seed))
    trainer.save(tmp_path / "run.pt", {"note": "kept"})
    expected = [trainer.step(*make_batch(seed)) for seed in range(3, 8)]

    resumed = make()
    torch.manual_seed(99)
    assert resumed.resume(tmp_path / "run.pt") == {"note": "kept"}
    for seed, uninterrupted in zip(range(3, 8), expected, strict=True):
        assert resumed.step(*make_batch(seed)).as_dict() == uninterrupted.as_dict()
    assert_same(everything(trainer), everything(resumed))


def test_checkpoint_of_another_architecture_is_refused_and_changes_nothing(tmp_path):
    make_trainer().save(tmp_path / "run.pt")
    other = make_trainer({"norm": False})
    before = everything(other)
    with pytest.raises(CheckpointError, match=r"run\.pt.*body\.1\.weight"):
        other.resume(tmp_path / "run.pt")
    assert_same(before, everything(other))


def test_checkpoint_of_another_optimizer_is_refused(tmp_path):
    make_trainer().save(tmp_path / "run.pt")
    other = make_trainer()
    other.optimizer = torch.optim.Adam(other.student.body[0].parameters())
    with pytest.raises(CheckpointError, match="optimiser"):
        other.resume(tmp_path / "run.pt")


@pytest.mark.parametrize("wrap", [lambda z: {"out": z}, lambda z: SimpleNamespace(logits=z)])
def test_dict_and_object_outputs_train_like_tensors(wrap):
    plain, wrapped = make_trainer(), make_trainer({"wrap": wrap})
    for seed in range(2):
        batch = make_batch(seed)
        assert plain.step(*batch).as_dict() == wrapped.step(*batch).as_dict()


@pytest.mark.parametrize("wrap", [lambda z: (z,), lambda z: {"logits?": z}, lambda z: z.argmax(1)])
def test_outputs_that_are_no_logits_are_named(wrap):
    with pytest.raises(TypeError, match="student: returned"):
        make_trainer({"wrap": wrap}).step(*make_batch())


def test_logits_of_different_resolution_meet_at_the_images_resolution():
    trainer = make_trainer()
    trainer.teacher.module.wrap = lambda z: nn.functional.interpolate(z, scale_factor=0.5)
    assert math.isfinite(trainer.step(*make_batch()).item("consistency"))


def test_class_mixing_pastes_source_pixels_that_the_teacher_does_not_teach():
    calls = []

    class Recorded(ConsistencyLoss):
        def forward(self, student, teacher, **call):
            calls.append(call["valid"])
            return super().forward(student, teacher, **call)

    trainer = make_trainer(class_mixing=1.0, consistency=Recorded(threshold=0.0), **STILL)
    source, labels, target = make_batch()
    trainer.step(source, labels, target)
    view = trainer.student.seen[0][2:]
    pasted = (view == source).all(1) & (view != target).all(1)
    assert torch.equal(torch.where(pasted[:, None], source, target), view)
    assert 0 < pasted.float().mean() < 1 and not pasted[:, 0].any()
    for image, mask in zip(labels, pasted, strict=True):
        assert len(image[mask].unique()) == 2  # half of four classes
    assert torch.equal(calls[0], ~pasted)


def test_class_mixing_never_happens_at_probability_zero():
    trainer = make_trainer(**STILL)
    source, labels, target = make_batch()
    trainer.step(source, labels, target)
    assert torch.equal(trainer.student.seen[0][2:], target)


def test_the_global_generator_is_never_drawn_from():
    trainer = make_trainer(jitter={}, class_mixing=1.0)
    state = torch.get_rng_state()
    trainer.step(*make_batch())
    assert torch.equal(state, torch.get_rng_state())


def test_the_callers_tensors_are_never_written():
    batch = make_batch()
    copies = [tensor.clone() for tensor in batch]
    make_trainer(jitter={}, class_mixing=1.0).step(*batch)
    assert_same(list(batch), copies)


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


def _replace(index, change):
    batch = list(make_batch())
    batch[index] = change(batch[index])
    return batch


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (_replace(1, lambda y: y.float()), TypeError, "source_labels: got torch.float32"),
        (_replace(1, lambda y: y[:, :6]), ValueError, r"source_labels: .*\(2, 6, 16\)"),
        (_replace(1, lambda y: y.clone().fill_(9)), ValueError, "labels: got label 9"),
        (_replace(0, lambda x: (x * 255).byte()), TypeError, "source_images: got torch.uint8"),
        (_replace(0, lambda x: x * 255), ValueError, r"source_images: got values .* \[0, 1\]"),
        (_replace(2, lambda x: x - 1), ValueError, "target_images: got values"),
        (_replace(2, lambda x: x[..., :8]), ValueError, "target_images: .*source_images"),
        (_replace(2, lambda x: x.double()), ValueError, "target_images: got torch.float64"),
        (_replace(2, lambda x: x.to("meta")), ValueError, "target_images: got images on meta"),
        (_replace(2, lambda x: x[:0]), ValueError, "target_images: .*not empty"),
        (_replace(2, lambda x: None), TypeError, "target_images: got NoneType"),
    ],
)
def test_batches_that_do_not_fit_are_named(batch, error, message):
    if batch[2] is None:
        batch[2] = [1]
        message = "target_images: got list"
    with pytest.raises(error, match=message):
        make_trainer().step(*batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"amp": torch.int8}, ValueError, "amp"),
        ({"class_mixing": 1.5}, ValueError, "class_mixing"),
        ({"accumulate": 0}, ValueError, "accumulate"),
        ({"style": "rococo"}, ValueError, "style"),
        ({"weight": "much"}, TypeError, "schedule"),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**options)


def test_batches_that_cannot_be_split_or_mixed_are_named():
    source, labels, target = make_batch(count=4)
    with pytest.raises(ValueError, match=r"target_images: got 3 .* multiple of 2"):
        make_trainer(accumulate=2).step(source, labels, target[:3])
    with pytest.raises(ValueError, match="class_mixing"):
        make_trainer(class_mixing=1.0).step(source, labels, target[:3])
