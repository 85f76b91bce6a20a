"""One update of the teachers of a student: which are due, with what decay, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastmt.teacher import EMATeacher


def update_together(
    teachers: Sequence[EMATeacher],
    *,
    student: nn.Module | None = None,
    finite: Tensor | None = None,
    decays: Sequence[Tensor] | None = None,
) -> None:
    """One update() of several teachers of one student, in one launch that reads it once.

    Args:
        teachers: at least one; each goes by its own decay, counters and buffer rule.
        student, finite: as of EMATeacher.update.
        decays: one a teacher, as of EMATeacher.update.
    """
    if torch.compiler.is_compiling():
        aside = torch.compiler.disable(
            update_together, reason="a teacher counts its updates and binds tensors by address"
        )
        return aside(teachers, student=student, finite=finite, decays=decays)
    teachers = list(teachers)
    if not teachers:
        raise ValueError("teachers: got none, expected at least one")
    for teacher in teachers:
        if teacher._swapped:
            raise RuntimeError("update: the student carries the teacher's weights; leave swapped()")
    network = teachers[0]._resolve(student)
    if finite is not None and finite.device.type == "cpu" and decays is None:
        if not finite:
            return
        finite = None
    recorded = decays is None and _is_capturing()  # advance() counts, at each replay
    if recorded or True in [teacher._is_due() for teacher in teachers]:
        plan = teachers[0]._plan_for(teachers, network)
        if plan.staging is not None and _is_capturing():
            raise RuntimeError("update: an update of a teacher on the CPU cannot be captured")
        now, draws = _given(teachers, decays, recorded, plan.device)
        if finite is not None:
            now = [_where(finite, decay) for decay in now]
        if not plan.run(now, draws):  # a tensor has another layout: match and bind anew
            teachers[0]._plan_anew(teachers, network).run(now, draws)
    for teacher in () if recorded else teachers:
        teacher.count()


def _given(
    teachers: Sequence[EMATeacher],
    decays: Sequence[Tensor] | None,
    recorded: bool,
    device: torch.device,
) -> tuple[list[float | Tensor], list[int | Tensor]]:
    """Decay and draw of each teacher."""
    if decays is None and not recorded and device.type == "cpu":
        return [t._due_decay() for t in teachers], [t._draw() for t in teachers]
    if decays is not None:
        draws = [t._captured()[1] if _is_capturing() else t._draw() for t in teachers]
        return list(decays), draws
    scalars = [t._captured() if recorded else t.put_decay() for t in teachers]
    return [decay for decay, _ in scalars], [draw for _, draw in scalars]


def _where(finite: Tensor, decay: float | Tensor) -> Tensor:
    """The decay, and negative where the step was skipped, on the device of `finite`."""
    if not isinstance(decay, Tensor):
        decay = torch.full_like(finite, decay, dtype=torch.float64)
    return torch.where(finite, decay, -1.0)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
