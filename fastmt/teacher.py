"""The teacher: a network whose parameters are the moving average of the student's."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastmt import arguments
from fastmt.ema import ema_update_

BUFFERS = ("copy", "ema", "keep")


class EMATeacher(nn.Module):
    """A copy of the student whose parameters are the moving average of the student's.

    After update t = 0, 1, ... the teacher is a_t * teacher + (1 - a_t) * student.

    Args:
        student: the network to follow; wrappers (DistributedDataParallel, torch.compile) are looked
            through. It is not kept alive, nor part of this module's parameters or state.
        decay: a in [0, 1).
        warmup: "reciprocal" takes a_t = min(1 - 1 / (t + 1), decay): the plain mean of the first
            students, the first one whole; None takes `decay` at once; a callable t -> a_t is used
            as it is.
        buffers: "copy" the student's (running statistics belong to the newest weights), "ema"
            averages floating ones, "keep" leaves them. Integer and bool buffers are copied unless
            kept.
        update_every: only every so many calls of update() average.
        start: until that many calls the teacher is a plain copy of the student.
        half_life: instead of `decay`: after that many updates a weight counts half.
        dtype: floating dtype of the teacher's parameters, float32 or float64. Default: the
            student's, and float32 where the student's is half precision, in which an average with
            decay 0.999 would not move.

    Starts in eval mode. `module` is the averaged network; forward runs it without gradient.

    Raises:
        ValueError, TypeError: naming the argument; a student whose parameters changed by name or
        shape is named at update().

    Source: Tarvainen & Valpola 2017.
    """

    def __init__(
        self,
        student: nn.Module,
        decay: float = 0.999,
        *,
        warmup: str | Callable[[int], float] | None = "reciprocal",
        buffers: str = "copy",
        update_every: int = 1,
        start: int = 0,
        half_life: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if half_life is not None:
            arguments.check_positive("half_life", half_life)
            decay = 0.5 ** (1 / half_life)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay!r}, expected a number in [0, 1)")
        if not callable(warmup) and warmup is not None:
            arguments.check_choice("warmup", warmup, ("reciprocal",))
        arguments.check_choice("buffers", buffers, BUFFERS)
        if update_every < 1 or start < 0:
            raise ValueError(
                f"update_every, start: got {update_every}, {start}, expected >= 1 and >= 0"
            )
        self.decay, self.warmup, self.buffer_rule = decay, warmup, buffers
        self.update_every, self.start, self.calls, self.updates = update_every, start, 0, 0
        self.module = copy.deepcopy(unwrapped(student)).requires_grad_(False)
        _widen(self.module, dtype)
        self._student = weakref.ref(student)
        self.eval()

    def current_decay(self) -> float:
        """a_t of the next averaging update."""
        if self.calls < self.start:
            return 0.0
        if callable(self.warmup):
            return self.warmup(self.updates)
        if self.warmup == "reciprocal":
            return min(1 - 1 / (self.updates + 1), self.decay)
        return self.decay

    @torch.no_grad()
    def update(self, *, student: nn.Module | None = None, finite: Tensor | None = None) -> None:
        """Average the student in.

        Args:
            student: default: the one this teacher was made from.
            finite: 0-dim bool tensor; where False (a step that was skipped) nothing changes.
        """
        network = self._resolve(student)
        if finite is not None and finite.device.type == "cpu" and not finite:
            return
        decay = self.current_decay()
        self.calls += 1
        if self.calls > self.start and (self.calls - self.start) % self.update_every:
            return
        self.updates += self.calls > self.start
        parameters = _matched(self.module.named_parameters(), network.named_parameters())
        buffers = _matched(self.module.named_buffers(), network.named_buffers())
        _average(parameters, decay, finite)
        if self.buffer_rule != "keep":
            _average(buffers, decay if self.buffer_rule == "ema" else 0.0, finite)

    def _resolve(self, student: nn.Module | None) -> nn.Module:
        student = self._student() if student is None and self._student else student
        if student is None:
            raise ValueError("student: the student of this teacher is gone; pass update(student=)")
        return unwrapped(student)

    def forward(self, *args: object, **kwargs: object) -> object:
        """The averaged network's output, without gradient."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Write the averaged parameters and buffers into `network`."""
        for target, average in _all_pairs(unwrapped(network), self.module):
            target.copy_(average)

    @contextlib.contextmanager
    def swapped(self, student: nn.Module | None = None) -> Iterator[None]:
        """The student carries the teacher's weights in this context, and its own again after it."""
        network = self._resolve(student)
        own = [tensor.detach().clone() for tensor, _ in _all_pairs(network, self.module)]
        try:
            self.copy_to(network)
            yield
        finally:
            with torch.no_grad():
                for (tensor, _), value in zip(_all_pairs(network, self.module), own, strict=True):
                    tensor.copy_(value)

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """The averaged network's own state dict: it loads into the plain network."""
        return self.module.state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Entries of the plain network, wherever this module stands in a larger one."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}module.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_student": None}


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(network, parallel):
            network = network.module
        elif hasattr(network, "_orig_mod"):
            network = network._orig_mod
        else:
            return network


def _widen(network: nn.Module, dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"dtype: got {dtype}, expected float32 or float64; in half precision the average does "
            "not move, since a step of (1 - decay) is below its rounding"
        )
    for parameter in network.parameters():
        half = parameter.dtype in (torch.float16, torch.bfloat16)
        wide = dtype or (torch.float32 if half else parameter.dtype)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(wide)


def _matched(
    teacher: Iterator[tuple[str, Tensor]], student: Iterator[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs by name; a missing, extra or resized entry is an error that names it."""
    averages, values = dict(teacher), dict(student)
    for name in averages.keys() ^ values.keys():
        where = "student" if name in averages else "teacher"
        raise ValueError(f"student: {name!r} is missing in the {where}; make a new EMATeacher")
    for name, average in averages.items():
        if average.shape != values[name].shape:
            raise ValueError(
                f"student: {name!r} has shape {arguments.shape(values[name])}, the teacher "
                f"{arguments.shape(average)}; make a new EMATeacher"
            )
    return [(average, values[name]) for name, average in averages.items()]


def _all_pairs(network: nn.Module, other: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [
        *_matched(network.named_parameters(), other.named_parameters()),
        *_matched(network.named_buffers(), other.named_buffers()),
    ]


def _average(pairs: list[tuple[Tensor, Tensor]], decay: float, finite: Tensor | None) -> None:
    if not pairs:
        return
    averages, values = [t for t, _ in pairs], [s for _, s in pairs]
    if finite is not None and finite.device.type != "cpu":
        values = [
            torch.where(finite, s, t.to(s.dtype)) for t, s in zip(averages, values, strict=True)
        ]
    ema_update_(averages, values, decay)
