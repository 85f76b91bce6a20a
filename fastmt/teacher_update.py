"""One update of the teachers of a student: which are due, and with what decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmt import arguments
from fastmt.ema_table import is_capturing
from fastmt.teacher_network import carries

if TYPE_CHECKING:
    from fastmt.teacher import EMATeacher


def update_together(
    teachers: Sequence[EMATeacher],
    *,
    student: nn.Module | None = None,
    finite: Tensor | None = None,
    decays: Sequence[Tensor] | None = None,
) -> None:
    """One update() of several teachers of one student, in one launch.

    Args:
        teachers: at least one, of one student unless `student` is given; each goes by its own
            decay, counters and buffer rule.
        student, finite: as of EMATeacher.update.
        decays: one a teacher, as of EMATeacher.update.
    """
    if torch.compiler.is_compiling():
        aside = torch.compiler.disable(
            update_together, reason="a teacher counts its updates and binds tensors by address"
        )
        return aside(teachers, student=student, finite=finite, decays=decays)
    teachers = list(teachers)
    _check(teachers, decays, finite)
    network = teachers[0]._resolve(student)
    if carries(network):
        raise RuntimeError("update: the student carries a teacher's weights; leave swapped()")
    if student is None:
        _check_same(teachers, network)
    if finite is not None and decays is None and _is_on_host(finite):
        if not finite:
            return
        finite = None
    capturing = is_capturing()
    recorded = capturing and decays is None  # advance() counts, at each replay
    on_device = recorded or finite is not None or decays is not None
    on_device = on_device or True in [teacher._may_skip() for teacher in teachers]
    due = [] if on_device else [teacher._due_decay() for teacher in teachers]
    if on_device or max(due) >= 0:
        plan = teachers[0]._plan_for(teachers, network)
        if plan.staging is not None and capturing:
            raise RuntimeError("update: an update of a teacher on the CPU cannot be captured")
        if on_device:
            now, draws = _on_device(teachers, decays, finite, capturing)
        else:
            now, draws = due, [teacher._draw() for teacher in teachers]
        if not plan.run(now, draws):  # a tensor has another layout: match and bind anew
            teachers[0]._plan_anew(teachers, network).run(now, draws)
    for teacher in teachers:
        if finite is not None:
            teacher._count_on(finite.device).skip(finite)
        if not recorded:
            teacher.count()


def _on_device(
    teachers: Sequence[EMATeacher],
    decays: Sequence[Tensor] | None,
    finite: Tensor | None,
    capturing: bool,
) -> tuple[list[Tensor], list[int | Tensor]]:
    """Decay and draw of each teacher where only a device may know what it is the count of."""
    now, draws = [], []
    for teacher, decay in zip(teachers, decays or [None] * len(teachers), strict=True):
        if finite is not None and not capturing:
            teacher._count_on(finite.device)
        if decay is None and not capturing:
            teacher.put_decay()
        count = teacher._captured() if capturing else teacher._device_count
        decay = count.decay if decay is None else decay
        # Negative where the step was skipped, on the device of `finite`.
        now.append(decay if finite is None else torch.where(finite, decay, -1.0))
        is_put = count is not None and (capturing or decay is count.decay)
        draws.append(count.draw if is_put else teacher._draw())
    return now, draws


def _check(
    teachers: list[EMATeacher], decays: Sequence[Tensor] | None, finite: Tensor | None
) -> None:
    if not teachers:
        raise ValueError("teachers: got none, expected at least one")
    if decays is not None and len(decays) != len(teachers):
        raise ValueError(f"decays: got {len(decays)}, expected {len(teachers)}, one a teacher")
    for decay in decays or ():
        _check_scalar("decay", decay, torch.float64)
    if finite is not None:
        _check_scalar("finite", finite, torch.bool)


def _check_scalar(name: str, given: object, dtype: torch.dtype) -> None:
    if isinstance(given, Tensor) and given.ndim == 0 and given.dtype == dtype:
        return
    kind = type(given).__name__
    if isinstance(given, Tensor):
        kind = f"{given.dtype} of shape {arguments.shape(given)}"
    expected = str(dtype).removeprefix("torch.")
    raise TypeError(f"{name}: got {kind}, expected a 0-dim {expected} tensor")


def _check_same(teachers: Sequence[EMATeacher], network: nn.Module) -> None:
    for teacher in teachers[1:]:
        other = teacher._student and teacher._student()
        if other is not None and other is not network:
            raise ValueError(
                "teachers: got teachers of different students; update each student's on their own, "
                "or pass update_together(student=)"
            )


def _is_on_host(finite: Tensor) -> bool:
    return finite.is_cpu
