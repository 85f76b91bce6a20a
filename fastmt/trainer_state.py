"""Everything a trainer needs to go on with the numbers of an uninterrupted run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from fastmt.checkpoint import CheckpointError, check_architecture

if TYPE_CHECKING:
    from fastmt.trainer import MeanTeacher

_PARTS = ("student", "teacher", "optimizer", "scheduler", "scaler")
_COUNTERS = ("steps", "skipped", "teacher_counts")
_GENERATORS = ("generator", "global_generators")


def collect(trainer: MeanTeacher) -> dict[str, Any]:
    """The state of a trainer: networks, optimiser, counters, its generator and the global ones."""
    cuda = torch.cuda.get_rng_state_all() if trainer.device.type == "cuda" else []
    return {name: part.state_dict() for name, part in _parts(trainer).items()} | {
        "steps": trainer.steps,
        "skipped": trainer.skipped,
        "teacher_counts": [trainer.teacher.calls, trainer.teacher.updates],
        "teacher_compensation": dict(trainer.teacher.compensation),
        "generator": trainer.views.generator.get_state(),
        "global_generators": [torch.get_rng_state(), *cuda],
    }


def restore(trainer: MeanTeacher, state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Put a collected state back; CheckpointError, with nothing changed, where it does not fit."""
    parts = _parts(trainer)
    _check(trainer, state, path)
    try:
        trainer.optimizer.load_state_dict(state["optimizer"])  # checks its groups before it loads
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: the optimiser's state does not fit ({error}); use the optimiser it was "
            "trained with"
        ) from error
    for name, part in parts.items():
        if name != "optimizer":
            part.load_state_dict(state[name])
    trainer.steps = state["steps"]
    trainer.skipped.copy_(state["skipped"])
    trainer.teacher.calls, trainer.teacher.updates = state["teacher_counts"]
    lost = state.get("teacher_compensation", {})
    trainer.teacher.compensation = {n: t.to(trainer.device) for n, t in lost.items()}
    trainer.views.generator.set_state(state["generator"])
    cpu, *cuda = state["global_generators"]
    torch.set_rng_state(cpu)
    if trainer.device.type == "cuda" and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def _check(trainer: MeanTeacher, state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    needed = {*_parts(trainer), *_COUNTERS, *_GENERATORS}
    if missing := sorted(needed - state.keys()):
        raise CheckpointError(
            f"{path}: holds no {', '.join(missing)}; use a checkpoint of a trainer with these parts"
        )
    for name in ("student", "teacher"):
        check_architecture(getattr(trainer, name).state_dict(), state[name], path)


def _parts(trainer: MeanTeacher) -> dict[str, Any]:
    parts = {name: getattr(trainer, name) for name in _PARTS}
    return {name: part for name, part in parts.items() if part is not None}
