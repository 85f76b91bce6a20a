"""Where the time of a training step goes, measured inside real steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import machine
from fastmt.trainer import MeanTeacher

NETWORKS = ("student forward", "teacher forward", "backward through the student", "optimiser")
REST = "checks, zero_grad, report"


class Stopwatch:
    """Seconds by name; what runs inside a named stretch under its own name counts there alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def start(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def stop(self) -> None:
        self._charge()
        self._open.pop()

    def switch(self, name: str) -> None:
        self.stop()
        self.start(name)

    def around(self, name: str, function: Callable) -> Callable:
        """The function with its time charged to `name`."""

        def timed(*args: object, **kwargs: object) -> object:
            self.start(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return timed

    def _charge(self) -> None:
        machine.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def attach(trainer: MeanTeacher) -> Stopwatch:
    """Time every part of the trainer's steps, apart from each other and without a remainder.

    The networks and the optimiser are timed by their own hooks. A backward pass belongs to the
    losses until the gradient reaches the student's output, and to the student from there on.
    """
    watch = Stopwatch(trainer.device)
    _time_module(watch, trainer.teacher.module, "teacher forward")
    _time_module(watch, trainer.student, "student forward")
    trainer.student.register_forward_hook(
        lambda module, images, logits: _split_backward(watch, logits)
    )
    trainer.optimizer.register_step_pre_hook(lambda *_: watch.start("optimiser"))
    trainer.optimizer.register_step_post_hook(lambda *_: watch.stop())
    views = {"style": "style", "jittered": "jitter", "noisy": "noise"}
    parts = {
        "supervised": "supervised loss, forward",
        "_consistency": "consistency loss, forward",
        "_backward": "losses, backward",
        "_copy_buffers": "copy of the buffers",
        "_update": "gradient norm, finite check",
        "step": REST,
    }
    for owner, names in ((trainer.views, views), (trainer, parts)):
        for attribute, name in names.items():
            setattr(owner, attribute, watch.around(name, getattr(owner, attribute)))
    trainer.teacher.update = watch.around("EMA", trainer.teacher.update)
    return watch


def _time_module(watch: Stopwatch, module: nn.Module, name: str) -> None:
    module.register_forward_pre_hook(lambda *_: watch.start(name))
    module.register_forward_hook(lambda *_: watch.stop())


def _split_backward(watch: Stopwatch, logits: Tensor) -> None:
    if logits.requires_grad:
        logits.register_hook(lambda _: watch.switch("backward through the student"))
