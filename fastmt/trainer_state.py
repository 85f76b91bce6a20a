"""Everything a trainer needs to go on with the numbers of an uninterrupted run."""

from __future__ import annotations

import os
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastmt.checkpoint import CheckpointError, check_architecture
from fastmt.inputs import check_own_weights
from fastmt.matching import plain_name, unwrapped

if TYPE_CHECKING:
    from fastmt.trainer import MeanTeacher

_PARTS = ("student", "teacher", "optimizer", "scheduler", "scaler")
_LOSSES = ("consistency", "supervised")
_COUNTERS = ("steps", "skipped", "teacher_counts")
_GENERATORS = ("seed", "generator", "global_generators")
_HOW = ("fused", "foreach", "capturable")  # how a group is stepped is up to the run, not its state


def collect(trainer: MeanTeacher) -> dict[str, Any]:
    """The state of a trainer: its parts and losses, counters, its generator and the global ones."""
    check_own_weights("save", trainer.student)
    cuda = torch.cuda.get_rng_state_all() if trainer.device.type == "cuda" else []
    parts = _parts(trainer) | _losses(trainer)
    return {name: part.state_dict() for name, part in parts.items()} | {
        "kinds": _kinds(trainer),
        "parameters": _parameters(trainer),
        "steps": trainer.steps,
        "skipped": trainer.skipped,
        "teacher_counts": [trainer.teacher.calls, trainer.teacher.updates],
        "teacher_compensation": dict(trainer.teacher.compensation),
        "seed": trainer.views.seed,
        "generator": trainer.views.generator.get_state(),
        "global_generators": [torch.get_rng_state(), *cuda],
    }


def restore(trainer: MeanTeacher, state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Put a collected state back; CheckpointError, with nothing changed, where it does not fit."""
    check_own_weights("resume", trainer.student)
    parts = _parts(trainer)
    _check(trainer, state, path)
    try:
        _restore_optimizer(trainer.optimizer, state["optimizer"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: the optimiser's state does not fit ({error}); use the optimiser it was "
            "trained with"
        ) from error
    for name, part in (parts | _losses(trainer)).items():
        if name != "optimizer" and name in state:
            part.load_state_dict(state[name])
    trainer.steps = state["steps"]
    trainer.skipped.copy_(state["skipped"])
    trainer.teacher.calls, trainer.teacher.updates = state["teacher_counts"]
    lost = state.get("teacher_compensation", {})
    trainer.teacher.compensation = {n: t.to(trainer.device) for n, t in lost.items()}
    trainer.views.seed = state["seed"]
    if state["kinds"]["device"] == trainer.device.type:
        trainer.views.generator.set_state(state["generator"])
    else:  # it has another generator: other numbers, yet not those of the first steps again
        trainer.views.generator.manual_seed((state["seed"] + state["steps"]) % (1 << 64))
    cpu, *cuda = state["global_generators"]
    torch.set_rng_state(cpu)
    if trainer.device.type == "cuda" and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state, which checks its groups first; a rate stays the tensor or float it was."""
    groups, saved = optimizer.param_groups, state["param_groups"]
    if len(groups) != len(saved):
        raise ValueError(f"it has {len(saved)} parameter groups, the optimiser {len(groups)}")
    own = [{name: group[name] for name in _HOW if name in group} for group in groups]
    merged = [group | how for group, how in zip(saved, own, strict=True)]
    rates = [group["lr"] for group in groups]
    optimizer.load_state_dict(state | {"param_groups": merged})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        saved_rate = group["lr"]
        tensor = isinstance(rate, torch.Tensor)
        group["lr"] = rate.fill_(saved_rate) if tensor else float(saved_rate)


def _check(trainer: MeanTeacher, state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    needed = {*_parts(trainer), *_COUNTERS, *_GENERATORS, "kinds"}
    if missing := sorted(needed - state.keys()):
        raise CheckpointError(
            f"{path}: holds no {', '.join(missing)}; use a checkpoint of a trainer with these parts"
        )
    for name, own in _kinds(trainer).items():
        saved = state["kinds"].get(name)
        if saved != own and name != "device":
            raise CheckpointError(
                f"{path}: its {name} is {saved or 'none'}, the trainer has {own or 'none'}; use "
                "the parts it was trained with"
            )
    # A checkpoint of an earlier fastmt does not name them.
    for own, saved in zip_longest(_parameters(trainer), state.get("parameters", ())):
        if own != saved and "parameters" in state:
            raise CheckpointError(
                f"{path}: the optimiser's state has {saved} where the trainer's optimiser has {own}"
                "; give it the parameters in the order it was trained with"
            )
    for name in ("student", "teacher"):
        check_architecture(_parts(trainer)[name].state_dict(), state[name], path)
    for name, loss in _losses(trainer).items():
        if name in state:
            check_architecture(loss.state_dict(), state[name], path, owner=f"{name} loss")


def _parameters(trainer: MeanTeacher) -> list[str | None]:
    """Names of the optimiser's parameters: its own state tells them by their place alone."""
    named = unwrapped(trainer.student).named_parameters()
    names = {id(parameter): plain_name(name) for name, parameter in named}
    return [names.get(id(p)) for group in trainer.optimizer.param_groups for p in group["params"]]


def _parts(trainer: MeanTeacher) -> dict[str, Any]:
    parts = {name: getattr(trainer, name) for name in _PARTS}
    parts["student"] = unwrapped(trainer.student)  # a run may go on compiled, or on one GPU
    return {name: part for name, part in parts.items() if part is not None}


def _losses(trainer: MeanTeacher) -> dict[str, nn.Module]:
    """Those that keep a state, such as thresholds of each class that move from step to step.

    A checkpoint of an earlier fastmt has none of theirs.
    """
    losses = {name: getattr(trainer, name) for name in _LOSSES}
    modules = {n: unwrapped(loss) for n, loss in losses.items() if isinstance(loss, nn.Module)}
    return {name: loss for name, loss in modules.items() if loss.state_dict()}


def _kinds(trainer: MeanTeacher) -> dict[str, str | None]:
    """What the parts are whose states say it nowhere, and would load into one another."""
    parts = {name: getattr(trainer, name) for name in ("optimizer", "scheduler", "scaler")}
    return {"device": trainer.device.type} | {name: _kind(part) for name, part in parts.items()}


def _kind(part: object) -> str | None:
    if part is None:
        return None
    inner = ", ".join(str(_kind(each)) for each in getattr(part, "_schedulers", ()))
    return type(part).__name__ + (f"({inner})" if inner else "")
