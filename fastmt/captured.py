"""A training step as one CUDA graph: launched at once instead of kernel by kernel."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from fastmt.arguments import check_index
from fastmt.steps import Scheduled, StepReport
from fastmt.trainer import MeanTeacher


class CapturedStep:
    """`trainer.step` from a CUDA graph: the same steps without the time to launch each kernel.

    Every call is one step of training, also the first ones, which run as usual to warm up, and the
    one that is captured. Threshold, weight and decay go on by their schedules, the learning rate by
    its scheduler if it is a tensor.

    Args:
        trainer: made with capturable=True, its student on a GPU and its optimiser capturable too.
        warmup: steps before the capture, at least 1.

    Batches keep their shapes and dtypes from the capture on, and what Python decides inside of the
    networks stays as it was decided then. After `trainer.resume`, or a state that was loaded into
    teacher or optimiser, the next step runs as usual and the one after it is captured anew.

    Raises:
        ValueError: a trainer that cannot be captured, a batch that does not fit.
    """

    _device_type = "cuda"

    def __init__(self, trainer: MeanTeacher, *, warmup: int = 3) -> None:
        _check(trainer, warmup, self._device_type)
        self.trainer, self.warmup = trainer, warmup
        self._replay: Callable[[], object] | None = None
        self._bound: tuple[object, ...] = ()
        self._batch: tuple[Tensor, ...] = ()
        self._now: Scheduled | None = None
        self._means: Tensor | None = None

    def __call__(
        self, source_images: Tensor, source_labels: Tensor, target_images: Tensor
    ) -> StepReport:
        """One step, as MeanTeacher.step."""
        batch, trainer = (source_images, source_labels, target_images), self.trainer
        if self._replay is not None and not self._is_bound():
            self._replay, self._bound, self.warmup = None, (), 1
        if self.warmup > 0:
            self._keep(batch)
            report = self._warm_up()
            self.warmup -= 1
            return report
        trainer.check(*batch)
        if self._replay is not None:
            self._check_fit(batch)
        teacher, now = trainer.teacher, trainer.prepare()
        if self._replay is None:
            self._now = now
        self._check_numbers(now)
        self._keep(batch)
        counted = teacher.calls, teacher.updates
        try:
            if self._replay is None:
                self._replay = self._record()
                self._bound = _tables(trainer)
            self._replay()
        finally:
            teacher.calls, teacher.updates = counted  # what a capture has counted it has not made
        teacher.count()
        return trainer.finish(self._means.clone())

    def _keep(self, batch: tuple[Tensor, ...]) -> None:
        """Copy a batch to where the graph reads it. The warm-up reads it there too, or the capture
        would meet another alignment, and compile for it."""
        layouts = [[(t.shape, t.dtype, t.device) for t in ts] for ts in (self._batch, batch)]
        if layouts[0] != layouts[1]:
            self._batch = tuple(tensor.clone() for tensor in batch)
            return
        for own, given in zip(self._batch, batch, strict=True):
            own.copy_(given, non_blocking=True)

    def _is_bound(self) -> bool:
        """Whether plan and optimiser are those whose memory the graph reads."""
        return all(map(operator.is_, self._bound, _tables(self.trainer)))

    def _compute(self) -> None:
        self._means = self.trainer.compute(self._now, *self._batch)

    def _warm_up(self) -> StepReport:
        """On a stream of its own, as nothing that is captured may depend on the default one."""
        current = torch.cuda.current_stream(self.trainer.device)
        stream = torch.cuda.Stream(self.trainer.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            report = self.trainer.step(*self._batch)
        current.wait_stream(stream)
        return report

    def _record(self) -> Callable[[], object]:
        device, graph = self.trainer.device, torch.cuda.CUDAGraph()
        graph.register_generator_state(self.trainer.views.generator)
        stream = torch.cuda.Stream(device)
        with (
            torch.cuda.device(device),
            # Other threads may allocate meanwhile: a data loader that pins its batches does.
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self._compute()
        return graph.replay

    def _check_fit(self, batch: tuple[Tensor, ...]) -> None:
        names = ("source_images", "source_labels", "target_images")
        for name, own, given in zip(names, self._batch, batch, strict=True):
            if own.shape != given.shape or own.dtype != given.dtype:
                raise ValueError(
                    f"{name}: got {given.dtype} {tuple(given.shape)}, expected {own.dtype} "
                    f"{tuple(own.shape)} as in the step that was captured"
                )

    def _check_numbers(self, now: Scheduled) -> None:
        for name, own, given in zip(Scheduled._fields, self._now, now, strict=True):
            if own is not given:
                raise ValueError(
                    f"{name}: got another tensor than in the capture, expected a schedule whose "
                    "values keep their shape; make a new CapturedStep"
                )


def _tables(trainer: MeanTeacher) -> tuple[object, ...]:
    """What a graph reads that a loaded state replaces: its memory lives as long as this is held."""
    optimizer = trainer.optimizer
    return trainer.teacher._plan, optimizer.state, optimizer.param_groups


def _check(trainer: MeanTeacher, warmup: int, device_type: str) -> None:
    if not trainer.capturable:
        raise ValueError("trainer: got one with capturable=False, expected capturable=True")
    if trainer.device.type != device_type:
        raise ValueError(f"trainer: its student is on {trainer.device}, expected a GPU")
    check_index("warmup", warmup)
    if warmup < 1:
        raise ValueError(f"warmup: got {warmup}, expected at least 1, to allocate what stays")
    if trainer.teacher.update_every != 1:
        raise ValueError(
            f"trainer: its teacher has update_every={trainer.teacher.update_every}, expected 1, as "
            "every replay averages"
        )
    optimizer = trainer.optimizer
    if not all(group.get("capturable", True) for group in optimizer.param_groups):  # SGD has none
        raise ValueError(
            f"trainer: its {type(optimizer).__name__} has capturable=False, expected one made with "
            "capturable=True; in a capture PyTorch refuses another"
        )
    rates = [group["lr"] for group in optimizer.param_groups]
    if trainer.scheduler is not None and not all(isinstance(rate, Tensor) for rate in rates):
        raise ValueError(
            "trainer: its scheduler moves a learning rate that is a float, which a graph would not "
            "follow; give the optimiser lr=torch.tensor(...)"
        )
