"""What must hold on a GPU before anything is timed there; tests/gpu runs the same.

A check raises AssertionError, or whatever goes wrong on the way.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

import fastmt
from benchmarks import inputs, machine
from benchmarks.shapes import Shape
from fastmt import decays, schedules, selftest
from fastmt.confidence import KINDS
from fastmt.consistency import LOSSES, NORMALIZATIONS, WEIGHTS
from fastmt.networks import UNet

Check = Callable[[torch.device], None]
SIZES = selftest.Sizes()
VOLUMES = selftest.Sizes(2, 5, (9, 11, 12), (20, 33, 30))
TRIALS = (selftest.consistency, selftest.labelled, selftest.confidence)
_CLASSES, _SIDE = 5, 32


def checks(device: torch.device) -> dict[str, Check]:
    """Every check by its name, first what only a GPU shows; the others for each backend."""
    found: dict[str, Check] = {function.__name__: function for function in BEHAVIOUR}
    for name, (build, dtypes) in trials().items():
        for backend in serving(build, device):
            for dtype in dtypes:
                text = str(dtype).removeprefix("torch.")
                found[f"{name}, {text}, {backend}"] = partial(is_right, build, dtype, backend)
    return found


def trials() -> dict[str, tuple[selftest.Build, tuple[torch.dtype, ...]]]:
    """Builders of trials by name: the plain ones in every dtype, each option in one."""
    every, one = tuple(selftest.TOLERANCE), (torch.float32,)
    found = {name: (build, every) for name, build in selftest.PLAIN.items()}
    variants = [
        *((selftest.consistency, {"loss": loss}) for loss in LOSSES[1:]),
        *((selftest.consistency, {"confidence": kind}) for kind in KINDS[1:]),
        *(
            (selftest.consistency, {"weight": w, "normalize": "valid", "maps": True})
            for w in WEIGHTS
        ),
        *((selftest.consistency, {"normalize": n, "by_class": True}) for n in NORMALIZATIONS[1:]),
        (selftest.consistency, {"members": 3, "loss": "kl", "class_reduction": "mean"}),
        (selftest.consistency, {"temperature": 0.5, "strict": True, "align_corners": True}),
        (selftest.labelled, {"maps": True, "normalize": "weight"}),
        (selftest.labelled, {"label_smoothing": 0.1, "normalize": "all"}),
        (selftest.labelled, {"label_dtype": torch.uint8, "align_corners": True}),
        *((selftest.confidence, {"kind": kind}) for kind in KINDS[1:]),
        (selftest.confidence, {"temperature": 2.0, "align_corners": True}),
    ]
    for trial, options in variants:
        said = ", ".join(f"{name}={value}" for name, value in options.items())
        for form, upsampled in (("dense", False), ("up-sampled", True)):
            build = partial(trial, upsampled=upsampled, **options)
            found[f"{trial.__name__}, {form}, {said}"] = build, one
    for trial in TRIALS:
        found[f"{trial.__name__}, volumes"] = partial(of_volumes, trial), one
    return found


def _plain() -> list[selftest.Build]:
    return [*selftest.PLAIN.values(), *(partial(of_volumes, trial) for trial in TRIALS)]


def of_volumes(
    trial: selftest.Build, device: torch.device, dtype: torch.dtype, _: selftest.Sizes
) -> selftest.Trial:
    return trial(device, dtype, VOLUMES, upsampled=True)


def serving(build: selftest.Build, device: torch.device) -> list[str]:
    """The backends whose kernels serve a trial; "auto" where none does, to test the fallback."""
    return selftest.serving(build, device) or ["auto"]


def is_right(build: selftest.Build, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """The result and the gradient are those of the reference in float64, and repeat to the bit."""
    with fastmt.backend(backend):
        error = build(device, dtype, SIZES).error()
        assert error <= selftest.TOLERANCE[dtype], f"error {error:.3g} of the largest value"
        first, second = (build(device, dtype, SIZES).run() for _ in range(2))
        assert all(map(torch.equal, first, second)), "two runs differ"


def a_step_never_waits_for_the_device(device: torch.device) -> None:
    trainer = make_trainer(device, jitter={}, class_mixing=1.0)
    given = batch(device, seed=0)
    for _ in range(2):  # the first looks at the range of the images; both make what stays
        trainer.step(*given)
    with waiting_is_an_error(device):
        trainer.step(*given)


def a_loss_never_waits_for_the_device(device: torch.device) -> None:
    for build in _plain():
        trial = build(device, torch.float32, SIZES)
        trial.run()
        with waiting_is_an_error(device):
            trial.run()


def a_replayed_step_is_the_step(device: torch.device) -> None:
    for amp in (None, torch.bfloat16):
        _replayed_like_launched(device, amp)


def _replayed_like_launched(device: torch.device, amp: torch.dtype | None) -> None:
    trainers = [make_trainer(device, amp=amp) for _ in range(2)]
    captured = fastmt.CapturedStep(trainers[0])
    with deterministic_convolutions():
        for seed in range(7):
            given = batch(device, seed)
            replayed, launched = captured(*given), trainers[1].step(*given)
            for name in ("loss", "consistency", "selected", "skipped"):
                pair = (getattr(replayed, name), getattr(launched, name))
                torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5, msg=f"step {seed}: {name}")
            assert replayed.weight == launched.weight
            assert replayed.threshold == launched.threshold
    assert trainers[0].teacher.updates == trainers[1].teacher.updates == 7
    for part in ("student", "teacher"):
        networks = (getattr(trainer, part) for trainer in trainers)
        for own, other in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4, msg=part)


def a_captured_loss_follows_threshold_weight_and_decay(device: torch.device) -> None:
    shape = Shape(2, _CLASSES, (_SIDE, _SIDE))
    student = inputs.logits(shape, device=device, seed=0).requires_grad_()
    teacher = inputs.logits(shape, device=device, seed=1)
    average, value = torch.zeros(1000, device=device), torch.ones(1000, device=device)
    threshold, weight = (torch.zeros((), device=device) for _ in range(2))
    decay = torch.zeros((), dtype=torch.float64, device=device)

    def compute() -> tuple[Tensor, Tensor]:
        loss = weight * fastmt.consistency_loss(student, teacher, threshold=threshold)
        fastmt.ema_update_([average], [value], decay)
        # Without its graph, which would keep the leaf's node on the stream of the capture.
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    _on_a_side_stream(compute, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute()
    for step in range(3):
        for scalar, number in ((threshold, 0.3 + 0.2 * step), (weight, step), (decay, 0.5)):
            scalar.fill_(number)
        average.zero_()
        graph.replay()
        replayed = [t.clone() for t in (*results, average)]
        average.zero_()
        expected = [*compute(), average]
        assert all(map(torch.equal, replayed, expected)), f"replay {step}"


def labels_out_of_range_are_named_when_checked_and_harmless_otherwise(device: torch.device) -> None:
    shape = Shape(2, _CLASSES, (_SIDE, _SIDE))
    logits = inputs.logits(shape, device=device, seed=0).requires_grad_()
    labels = inputs.labels(shape, device=device, seed=0)
    labels[1, 2, 3] = 77
    before = os.environ.pop("FASTMT_CHECK", None)
    try:
        fastmt.cross_entropy(logits, labels).backward()
        torch.cuda.synchronize(device)
        os.environ["FASTMT_CHECK"] = "1"
        fastmt.cross_entropy(logits, torch.where(labels == 77, 255, labels))
        try:
            fastmt.cross_entropy(logits, labels)
        except ValueError as error:
            assert "got label 77, expected 0..4" in str(error), error
        else:
            raise AssertionError("FASTMT_CHECK=1 did not find label 77")
    finally:
        os.environ.pop("FASTMT_CHECK", None)
        if before is not None:
            os.environ["FASTMT_CHECK"] = before


def kernels_are_deterministic(device: torch.device) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for build in _plain():
            for backend in selftest.serving(build, device):  # eager's up-sampling would raise
                with fastmt.backend(backend):
                    build(device, torch.float32, SIZES).run()
    finally:
        torch.use_deterministic_algorithms(before)


def sums_of_many_programs_are_the_same_whichever_is_the_last(device: torch.device) -> None:
    shape = Shape(17, 3, (1024, 1024))  # so many pixels that a denominator is of many programs too
    labels = inputs.labels(shape, device=device, seed=2)
    consistency = partial(fastmt.consistency_loss, threshold=0.5, size=shape.spatial)
    calls = []
    for low in (shape, shape.lowered(8)):
        student, teacher = (inputs.logits(low, device=device, seed=seed) for seed in (0, 1))
        leaf = student.requires_grad_()
        calls += [(consistency, leaf, teacher), (fastmt.cross_entropy, leaf, labels)]
    found = [[f(z, target).detach() for _ in range(50)] for f, z, target in calls]
    for (function, z, target), values in zip(calls, found, strict=True):
        wanted = target.double() if target.is_floating_point() else target
        with fastmt.backend("eager"):
            exact = function(z.detach().double(), wanted)
        torch.testing.assert_close(values[0].double(), exact, rtol=1e-5, atol=0)
        assert all(torch.equal(value, values[0]) for value in values)


def an_average_of_many_tensors_is_one_launch(device: torch.device) -> None:
    teacher = [torch.zeros(n, device=device) for n in range(1, 200)]
    student = [torch.ones(n, device=device) for n in range(1, 200)]
    decay = torch.full((), 0.5, dtype=torch.float64, device=device)
    build = selftest.PLAIN["ema_update_"]
    for backend in selftest.serving(build, device):
        with fastmt.backend(backend):
            count = machine.launches(lambda: fastmt.ema_update_(teacher, student, decay))
        assert count in (1, None), f"{backend}: {count} launches"


def teachers_of_a_student_take_one_launch_and_some_for_their_decays(device: torch.device) -> None:
    student = UNet(_CLASSES, width=4).to(device)
    tensors = [*student.parameters(), *student.buffers()]
    teachers = [fastmt.EMATeacher(student, decay) for decay in (0.9, 0.99)]
    if fastmt.explain(fastmt.ema_update_, tensors[:1], tensors[:1], 0.5).backend != "eager":
        for together, most in ((teachers[:1], 2), (teachers, 4)):
            count = machine.launches(partial(fastmt.update_together, together))
            few = count is None or count <= most
            assert few, f"{count} launches for {len(together)} x {len(tensors)} tensors"


BEHAVIOUR: tuple[Check, ...] = (
    a_step_never_waits_for_the_device,
    a_loss_never_waits_for_the_device,
    a_replayed_step_is_the_step,
    a_captured_loss_follows_threshold_weight_and_decay,
    labels_out_of_range_are_named_when_checked_and_harmless_otherwise,
    kernels_are_deterministic,
    sums_of_many_programs_are_the_same_whichever_is_the_last,
    an_average_of_many_tensors_is_one_launch,
    teachers_of_a_student_take_one_launch_and_some_for_their_decays,
)


def make_trainer(device: torch.device, **options: object) -> fastmt.MeanTeacher:
    """A small capturable trainer in which threshold, weight, decay and learning rate all move."""
    torch.manual_seed(0)
    student = _network().to(device)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=torch.tensor(1e-3, device=device), fused=True, capturable=True
    )
    return fastmt.MeanTeacher(
        student,
        optimizer,
        teacher=fastmt.EMATeacher(student, decays.Cosine(0.5, 5)),
        consistency=fastmt.ConsistencyLoss(confidence="entropy"),
        weight=schedules.LinearRampUp(3.0, 4),
        threshold=schedules.UncertaintyThreshold(6),
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        capturable=True,
        **options,
    )


def _network() -> nn.Module:
    """Logits at a quarter of the side, without up-sampling: PyTorch sums its gradient on a GPU in
    any order, which in bfloat16 soon makes two runs of the same steps differ."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, _CLASSES, 1),
    )


def batch(device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Source images, labels and target images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((2, 2, 3, _SIDE, _SIDE), generator=generator).to(device)
    labels = inputs.labels(Shape(2, _CLASSES, (_SIDE, _SIDE)), device=device, seed=seed)
    return images[0], labels, images[1]


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """A host that waits for the device raises in this context."""
    torch.cuda.synchronize(device)
    with warnings.catch_warnings():  # it is a prototype: PyTorch says so, once
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _on_a_side_stream(compute: Callable[[], object], device: torch.device) -> None:
    """Warm up as a capture has to be."""
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute()
    current.wait_stream(stream)
