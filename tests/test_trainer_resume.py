"""A run that goes on from a checkpoint, and checkpoints that do not fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler
from training import Net, assert_same, everything, make_batch, make_trainer

from fastmt import checkpoint, trainer_state
from fastmt.checkpoint import CheckpointError
from fastmt.schedules import LinearRampUp
from fastmt.trainer import MeanTeacher


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


def test_checkpoint_of_another_precision_is_refused_and_changes_nothing(tmp_path):
    make_trainer().save(tmp_path / "run.pt")
    half = Net().bfloat16()
    other = MeanTeacher(half, torch.optim.Adam(half.parameters()))
    before = everything(other)
    with pytest.raises(CheckpointError, match=r"body\.0\.weight.* float32, .* bfloat16; build"):
        other.resume(tmp_path / "run.pt")
    assert_same(before, everything(other))


def test_checkpoint_of_another_optimizer_is_refused(tmp_path):
    make_trainer().save(tmp_path / "run.pt")
    other = make_trainer()
    other.optimizer = torch.optim.Adam(other.student.body[0].parameters())
    with pytest.raises(CheckpointError, match="optimiser"):
        other.resume(tmp_path / "run.pt")


@pytest.mark.parametrize("fused", [False, True])
def test_checkpoint_of_an_optimizer_of_other_parameters_is_refused(tmp_path, fused):
    trainer, other = make_trainer(), make_trainer()
    trainer.step(*make_batch())
    trainer.save(tmp_path / "run.pt")
    parameters = list(other.student.parameters())
    parameters[1], parameters[2] = parameters[2], parameters[1]  # of one shape
    other.optimizer = torch.optim.Adam(parameters, fused=fused)
    refuses(other, tmp_path / "run.pt", r"optimiser's state has body\.0\.bias where .*1\.weight")


def test_checkpoint_of_an_optimizer_of_other_groups_is_refused(tmp_path):
    make_trainer().save(tmp_path / "run.pt")
    other = make_trainer()
    groups = [{"params": [parameter]} for parameter in other.student.parameters()]
    other.optimizer = torch.optim.Adam(groups)
    refuses(other, tmp_path / "run.pt", r"it has 1 parameter groups, the optimiser 6\)")


def test_a_checkpoint_without_the_names_of_parameters_is_resumed(tmp_path):
    trainer, resumed = make_trainer(), make_trainer()
    trainer.step(*make_batch())
    state = trainer_state.collect(trainer)
    del state["parameters"]
    checkpoint.save(tmp_path / "run.pt", state)
    resumed.resume(tmp_path / "run.pt")
    assert_same(everything(trainer), everything(resumed))


SCHEDULERS = {
    "none": lambda optimizer: None,
    "steps": lambda optimizer: lr_scheduler.StepLR(optimizer, 1),
    "milestones": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3]),
    "one after another": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [2],
    ),
    "others": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer), lr_scheduler.StepLR(optimizer, 1)],
        [2],
    ),
}


def scheduled(name, **options):
    trainer = make_trainer(**options)
    trainer.scheduler = SCHEDULERS[name](trainer.optimizer)
    return trainer


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_saved_and_goes_on(tmp_path, name):
    trainer, resumed = scheduled(name), scheduled(name)
    trainer.step(*make_batch())
    trainer.save(tmp_path / "run.pt")
    resumed.resume(tmp_path / "run.pt")
    for _ in range(3):
        rates = [each.optimizer.param_groups[0]["lr"] for each in (trainer, resumed)]
        assert rates[0] == rates[1]
        for each in (trainer, resumed):
            each.step(*make_batch())


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        ("milestones", "steps", "its scheduler is MultiStepLR, the trainer has StepLR"),
        ("steps", "none", "its scheduler is StepLR, the trainer has none"),
        ("none", "steps", "holds no scheduler"),
        ("one after another", "others", r"SequentialLR\(LinearLR, ExponentialLR\)"),
    ],
)
def test_checkpoint_of_another_scheduler_is_refused_and_changes_nothing(
    tmp_path, saved, own, message
):
    trainer, other = scheduled(saved), scheduled(own)
    trainer.step(*make_batch())
    trainer.save(tmp_path / "run.pt")
    refuses(other, tmp_path / "run.pt", message)


def refuses(trainer, path, message):
    before, generator = everything(trainer), trainer.views.generator.get_state()
    with pytest.raises(CheckpointError, match=rf"run\.pt: .*{message}"):
        trainer.resume(path)
    assert trainer.steps == 0
    assert_same(before, everything(trainer))
    assert torch.equal(generator, trainer.views.generator.get_state())


def test_checkpoint_of_another_kind_of_optimizer_or_precision_is_refused(tmp_path):
    trainer = make_trainer(amp=torch.float16)
    trainer.step(*make_batch())
    trainer.save(tmp_path / "run.pt")
    sgd = make_trainer(amp=torch.float16, optimizer=torch.optim.SGD)
    refuses(sgd, tmp_path / "run.pt", "its optimizer is Adam, the trainer has SGD")
    refuses(make_trainer(), tmp_path / "run.pt", "its scaler is GradScaler, the trainer has none")


@pytest.mark.parametrize("seed", [3, (1 << 64) - 1])
def test_a_run_of_another_kind_of_device_goes_on_with_numbers_of_its_own(tmp_path, seed):
    trainer = make_trainer(seed=seed)
    trainer.step(*make_batch())
    state = trainer_state.collect(trainer)
    state["kinds"]["device"], state["generator"] = "cuda", torch.zeros(16, dtype=torch.uint8)
    checkpoint.save(tmp_path / "run.pt", state)
    resumed = [make_trainer() for _ in range(2)]
    for each in resumed:
        each.resume(tmp_path / "run.pt")
    states = [each.views.generator.get_state() for each in resumed]
    assert torch.equal(*states)
    assert not torch.equal(states[0], make_trainer(seed=seed).views.generator.get_state())
    assert math.isfinite(resumed[0].step(*make_batch()).item("loss"))


def test_the_seed_of_a_run_goes_on_with_it(tmp_path):
    trainer, resumed = make_trainer(seed=5, class_mixing=0.5), make_trainer(class_mixing=0.5)
    trainer.step(*make_batch())
    trainer.save(tmp_path / "run.pt")
    resumed.resume(tmp_path / "run.pt")
    for seed in range(6):
        reports = [each.step(*make_batch(seed)).as_dict() for each in (trainer, resumed)]
        assert reports[0] == reports[1]


def test_how_an_optimiser_steps_and_the_tensor_of_its_rate_are_up_to_the_run(tmp_path):
    trainer = make_trainer()
    trainer.step(*make_batch())
    trainer.save(tmp_path / "run.pt")
    student, rate = Net(), torch.tensor(0.5)
    fused = torch.optim.Adam(student.parameters(), lr=rate, fused=True)
    resumed = MeanTeacher(student, fused)
    resumed.resume(tmp_path / "run.pt")
    (group,) = fused.param_groups
    assert group["fused"] and group["lr"] is rate and rate == torch.tensor(1e-2)
    assert resumed.step(*make_batch()).item("skipped") == 0
    resumed.save(tmp_path / "fused.pt")
    trainer.resume(tmp_path / "fused.pt")
    (group,) = trainer.optimizer.param_groups
    assert not group["fused"] and type(group["lr"]) is float


@pytest.mark.parametrize("call", ["save", "resume"])
def test_swapped_weights_are_neither_saved_as_the_students_nor_resumed_into(tmp_path, call):
    trainer = make_trainer()
    trainer.save(tmp_path / "first.pt")
    trainer.step(*make_batch())
    before = everything(trainer)
    path = tmp_path / ("first.pt" if call == "resume" else "other.pt")
    with trainer.teacher.swapped(), pytest.raises(RuntimeError, match=f"^{call}: .*swapped"):
        getattr(trainer, call)(path)
    assert not (tmp_path / "other.pt").exists()
    assert_same(before, everything(trainer))


@pytest.mark.parametrize("compiled", [(True, False), (False, True)])
def test_a_run_goes_on_with_or_without_the_wrapper_of_its_student(tmp_path, compiled):
    first, second = make_trainer(), make_trainer()
    for trainer, wrap in zip((first, second), compiled, strict=True):
        if wrap:
            trainer.student = torch.compile(trainer.student, backend="eager")
    first.step(*make_batch(0))
    first.save(tmp_path / "run.pt")
    second.resume(tmp_path / "run.pt")
    reports = [trainer.step(*make_batch(1)).as_dict() for trainer in (first, second)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_run_whose_rates_come_from_numpy_goes_on(tmp_path, kind):
    first, second = trainers = [make_trainer(lr=kind(1e-2)) for _ in range(2)]
    for trainer in trainers:
        trainer.scheduler = lr_scheduler.LambdaLR(trainer.optimizer, lambda step: kind(0.9**step))
    first.step(*make_batch(0))
    first.save(tmp_path / "run.pt")
    second.resume(tmp_path / "run.pt")
    for trainer in trainers:
        trainer.step(*make_batch(1))
    assert_same(everything(first), everything(second))
