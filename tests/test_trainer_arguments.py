"""Options, batches and networks that do not fit are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from training import CLASSES, Net, make_batch, make_trainer

import fastmt
from fastmt.cross_entropy import CrossEntropy
from fastmt.trainer import MeanTeacher


@pytest.mark.parametrize(
    ("wrap", "error"),
    [
        (lambda z: (z,), TypeError),
        (lambda z: {"logits?": z}, TypeError),
        (lambda z: z.argmax(1), TypeError),
        (lambda z: z[:1], ValueError),
        (lambda z: z.mean((2, 3)), ValueError),
    ],
)
def test_outputs_that_are_no_logits_are_named(wrap, error):
    with pytest.raises(error, match="^student: returned"):
        make_trainer({"wrap": wrap}).step(*make_batch())


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
        (_replace(0, lambda x: x + 0.1), ValueError, r"source_images: got values .* \[0, 1\]"),
        (_replace(2, lambda x: x - 0.1), ValueError, "target_images: got values"),
        ([x[..., None] for x in make_batch()], ValueError, "source_images: .*style=None"),
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
        ({"accumulate": 0}, ValueError, "^accumulate: got 0"),
        ({"passes": 0}, ValueError, "^passes: got 0"),
        ({"passes": 1.5}, TypeError, "^passes: got float, expected an integer"),
        ({"noise": 0.1}, ValueError, "^noise: got 0.1"),
        ({"noise": (-0.1, 0.2)}, ValueError, "^noise: got"),
        ({"noise": ("much", 0.2)}, ValueError, "^noise: got"),
        ({"jitter": {"brigthness": 0.1}}, ValueError, "^jitter: got brigthness=0.1"),
        ({"jitter": {"contrast": -1}}, ValueError, "^jitter: got contrast=-1"),
        ({"jitter": {"contrast": "1"}}, ValueError, "^jitter: got contrast='1'"),
        ({"jitter": {"greyscale": 2}}, ValueError, "^jitter: got greyscale=2"),
        ({"jitter": 0.4}, TypeError, "^jitter: got float"),
        ({"amp": torch.float32}, ValueError, "^amp: got torch.float32"),
        ({"consistency": "mse"}, TypeError, "^consistency: got 'mse', expected a loss"),
        ({"supervised": "ce"}, TypeError, "^supervised: got 'ce', expected a loss"),
        ({"scheduler": lambda step: 1.0}, TypeError, "^scheduler: got function"),
        ({"scheduler": ExponentialLR}, TypeError, "^scheduler: got the class ExponentialLR"),
        ({"clip_norm": -1}, ValueError, "^clip_norm: got -1"),
        ({"clip_norm": 0}, ValueError, "^clip_norm: got 0"),
        ({"teacher": Net()}, TypeError, "^teacher: got Net, expected an EMATeacher"),
        ({"seed": None}, ValueError, "^seed: got None, expected an integer"),
        ({"seed": 0.5}, ValueError, "^seed: got 0.5, expected an integer"),
        ({"seed": 1 << 64}, ValueError, r"^seed: got 18446744073709551616, expected .* in \["),
        ({"style": "rococo"}, ValueError, "style"),
        ({"weight": "much"}, TypeError, "^weight: got str, expected a number or a callable"),
        ({"weight": float("nan")}, ValueError, "^weight: got nan"),
        ({"threshold": "much"}, TypeError, "^threshold: got str, expected a number or a callable"),
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


def test_a_student_without_parameters_is_named():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="^student: got a module without parameters"):
        MeanTeacher(nn.Identity(), optimizer)


def test_a_student_that_cannot_be_trained_is_named():
    student = Net()
    optimizer = torch.optim.SGD(student.parameters())
    with pytest.raises(TypeError, match="^student: got the class Net, expected a torch.nn.Module"):
        MeanTeacher(Net, optimizer)
    with pytest.raises(ValueError, match="^student: got a frozen module"):
        MeanTeacher(student.requires_grad_(False), optimizer)


def test_an_optimizer_that_does_not_train_the_student_is_named():
    student, other = Net(), Net()
    with pytest.raises(ValueError, match="^optimizer: got one of other parameters"):
        MeanTeacher(student, torch.optim.SGD(other.parameters()))
    with pytest.raises(TypeError, match="^optimizer: got the class SGD, expected an optimizer"):
        MeanTeacher(student, torch.optim.SGD)
    with pytest.raises(TypeError, match="^optimizer: got LBFGS, expected .* without a closure"):
        MeanTeacher(student, torch.optim.LBFGS(student.parameters()))
    with pytest.raises(TypeError, match="^optimizer: got NoneType"):
        MeanTeacher(student, None)


def frozen_head():
    student = Net()
    student.body[4].requires_grad_(False)
    return student


@pytest.mark.parametrize("amp", [None, torch.float16])
def test_an_optimizer_of_frozen_parameters_alone_is_named(amp):
    student = frozen_head()
    optimizer = torch.optim.SGD(student.body[4].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="^optimizer: got frozen parameters alone"):
        MeanTeacher(student, optimizer, amp=amp)


@pytest.mark.parametrize("amp", [None, torch.float16])
def test_an_optimizer_may_hold_frozen_and_other_parameters_beside_the_students(amp):
    student, other = frozen_head(), torch.ones((), requires_grad=True)
    parameters = [*student.body[4].parameters(), other]
    trainer = MeanTeacher(
        student,
        torch.optim.SGD(parameters, lr=0.1),
        amp=amp,
        supervised=lambda logits, labels: CrossEntropy()(logits, labels) * other,
    )
    before = student.body[4].weight.clone()
    trainer.step(*make_batch())
    assert other != 1 and torch.equal(student.body[4].weight, before)
    student.requires_grad_(True)
    trainer.step(*make_batch())
    assert not torch.equal(student.body[4].weight, before)


def test_a_decay_beside_a_teacher_with_its_own_is_refused():
    student = Net()
    teacher, optimizer = fastmt.EMATeacher(student), torch.optim.SGD(student.parameters())
    with pytest.raises(ValueError, match="^decay: got 0.9 beside teacher"):
        MeanTeacher(student, optimizer, teacher=teacher, decay=0.9)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Conv2d(3, 4, 1), "is missing in the student; make a new EMATeacher"),
        (lambda: Net(norm=False), "^student: 'body.1.weight' is missing in the teacher"),
        (lambda: _wider(Net()), "^student: 'body.4.weight' has shape .*, the teacher"),
    ],
)
def test_a_teacher_of_another_architecture_is_refused_before_the_first_step(other, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(teacher=fastmt.EMATeacher(other()))


def _wider(network):
    network.body[4] = nn.Conv2d(8, CLASSES + 1, 1)
    return network


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.body[0] = nn.LazyConv2d(8, 3, stride=2, padding=1)


class Caching(Net):
    """Makes a buffer at its first forward."""

    def forward(self, images):
        if not hasattr(self, "grid"):
            self.register_buffer("grid", torch.ones(images.shape[2:]))
        return super().forward(images)


def _seen(network):
    network(make_batch()[0])
    return network


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (Lazy, lambda: _seen(Lazy())),
        (Caching, lambda: _seen(Caching())),
        (lambda: torch.compile(Net(), backend="eager"), Net),
        (lambda: nn.DataParallel(Net()), lambda: torch.compile(Net(), backend="eager")),
    ],
)
def test_a_teacher_made_before_its_student_was_wrapped_or_has_seen_a_batch_follows_it(
    student, teacher
):
    student, teacher = student(), fastmt.EMATeacher(teacher())
    trainer = MeanTeacher(student, torch.optim.SGD(student.parameters(), lr=0.1), teacher=teacher)
    trainer.step(*make_batch())
    assert teacher.updates == 1


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("images", [torch.float32, torch.bfloat16, torch.float16])
def test_images_of_another_type_than_the_weights_are_named_with_the_remedy(weights, images):
    student = Net().to(weights)
    trainer = MeanTeacher(student, torch.optim.SGD(student.parameters()))
    source, labels, target = make_batch()
    name = "teacher" if weights == images else "student"  # the teacher averages in float32
    network = torch.float32 if weights == images else weights
    if images == network:
        trainer.step(source, labels, target)
        return
    message = f"^{name}: failed on images of {images} with weights of {network} .*set amp="
    with pytest.raises(TypeError, match=message):
        trainer.step(source.to(images), labels, target.to(images))


class CastingNet(Net):
    def forward(self, images):
        return super().forward(images.to(self.body[0].weight.dtype))


def test_a_network_that_casts_its_images_itself_may_have_other_weights():
    student = CastingNet().bfloat16()
    trainer = MeanTeacher(student, torch.optim.SGD(student.parameters()))
    assert trainer.step(*make_batch()).item("loss") > 0


def test_scaled_gradients_of_float16_weights_are_refused_before_the_first_step():
    student = Net().half()
    with pytest.raises(ValueError, match="^amp: got torch.float16 .* expected float32 weights"):
        MeanTeacher(student, torch.optim.SGD(student.parameters()), amp=torch.float16)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"supervised": lambda z, y: z}, r"^supervised: returned shape \(2, 4, 6, 8\)"),
        ({"supervised": lambda z, y: (z.sum(), 1)}, "^supervised: returned tuple"),
        ({"consistency": lambda z, y, **call: z.sum()}, "^consistency: returned Tensor"),
        ({"consistency": lambda z, y, **call: (z, [z.sum()] * 2)}, "^consistency: returned shape"),
        ({"consistency": lambda z, y, **call: (z.sum(), None)}, "^consistency: returned tuple"),
        ({"consistency": lambda z, y, **call: (z.sum(), (0, 1))}, "^consistency: returned tuple"),
    ],
)
def test_losses_that_return_something_else_are_named(losses, message):
    with pytest.raises(TypeError, match=message):
        make_trainer(**losses).step(*make_batch())


class ByEpoch:
    """As timm's schedulers, is stepped with the epoch."""

    def step(self, epoch, metric=None):
        pass


def test_a_scheduler_that_a_step_cannot_step_is_named():
    student = Net()
    own, other = (torch.optim.SGD(student.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(TypeError, match="^scheduler: got ReduceLROnPlateau"):
        MeanTeacher(student, own, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(own))
    with pytest.raises(TypeError, match="^scheduler: got ByEpoch, .* without .* an epoch"):
        MeanTeacher(student, own, scheduler=ByEpoch())
    with pytest.raises(ValueError, match="^scheduler: got one of another optimizer"):
        MeanTeacher(student, own, scheduler=ExponentialLR(other, 0.9))


@pytest.mark.parametrize(
    ("style", "error", "message"),
    [
        (lambda source, target: source[..., :6], ValueError, r"\(2, 3, 12, 6\)"),
        (lambda source, target: source.double(), ValueError, "torch.float64"),
        (lambda source, target: None, TypeError, "NoneType"),
    ],
)
def test_a_style_that_returns_other_images_is_named(style, error, message):
    with pytest.raises(error, match=f"^style: returned .*{message}"):
        make_trainer(style=style).step(*make_batch())
