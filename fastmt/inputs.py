"""Checks of what a trainer is given, and the logits in what a network returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmt.arguments import (
    as_index,
    check_at_least,
    check_between,
    check_index,
    check_positive,
    first_line,
    shape,
)
from fastmt.matching import unwrapped
from fastmt.teacher import EMATeacher
from fastmt.teacher_network import all_pairs, carries

DECAY = 0.99  # of a trainer's own teacher, unless told otherwise
LABEL_DTYPES = (torch.uint8, torch.int64)
_AMP_DTYPES = (None, torch.bfloat16, torch.float16)
_TOLERANCE = 0.01  # resizing and rounding may leave [0, 1] by a little


def check_networks(student: nn.Module, teacher: EMATeacher | None, decay: float) -> None:
    """A student with parameters to train, and a teacher that follows one by its own decay."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"student: got {_kind(student)}, expected a torch.nn.Module")
    if next(student.parameters(), None) is None:
        raise ValueError("student: got a module without parameters, expected one to train")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("student: got a frozen module, expected a parameter that requires grad")
    if any(hasattr(parameter, "placements") for parameter in student.parameters()):
        raise ValueError(
            "student: got sharded parameters (DTensor), expected whole ones; EMATeacher takes them "
            "in a loop of your own"
        )
    if not isinstance(teacher, EMATeacher | None):
        raise TypeError(
            f"teacher: got {type(teacher).__name__}, expected an EMATeacher; wrap the network that "
            "is to follow: EMATeacher(student)"
        )
    if teacher is not None and decay != DECAY:
        raise ValueError(f"decay: got {decay!r} beside teacher, which has its own; give one")
    if teacher is not None:
        _check_architecture(teacher, student)


def _check_architecture(teacher: EMATeacher, student: nn.Module) -> None:
    """Parameters that belong together, as the first update wants them, after the optimiser's step.

    A first batch may yet give shapes to lazy ones, and buffers to either network.
    """
    network = unwrapped(student)
    if not any(map(is_lazy, network.parameters())):
        all_pairs(teacher.module, network, buffers="keep")


def check_own_weights(call: str, student: nn.Module) -> None:
    """RuntimeError in a call within swapped(), where the student has not its own weights."""
    if carries(unwrapped(student)):
        raise RuntimeError(f"{call}: the student carries a teacher's weights; leave swapped()")


def untrained(student: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The student's parameters that the optimiser does not train; it has to train some."""
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"optimizer: got {_kind(optimizer)}, expected an optimizer of the student's parameters"
        )
    if not _steps_alone(optimizer):
        raise TypeError(
            f"optimizer: got {_kind(optimizer)}, expected one that is stepped without a closure, "
            "as the loss is computed once a step"
        )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trained = set(map(id, held))
    parameters = list(student.parameters())
    others = [parameter for parameter in parameters if id(parameter) not in trained]
    if len(others) == len(parameters):
        raise ValueError(
            "optimizer: got one of other parameters, expected one of student.parameters()"
        )
    if not any(parameter.requires_grad for parameter in held):
        raise ValueError("optimizer: got frozen parameters alone, expected one that requires grad")
    return others


def check_losses(**losses: object) -> None:
    for name, loss in losses.items():
        if not (loss is None or callable(loss)):
            raise TypeError(f"{name}: got {loss!r}, expected a loss that can be called")


def check_amp(amp: torch.dtype | None, student: nn.Module) -> None:
    if amp not in _AMP_DTYPES:
        raise ValueError(f"amp: got {amp!r}, expected None, torch.bfloat16 or torch.float16")
    if amp == torch.float16 and amp in _dtypes(student):
        raise ValueError(
            "amp: got torch.float16 for a student with float16 weights, expected float32 weights, "
            "as PyTorch scales no gradients of float16"
        )


def check_options(
    clip_norm: float | None, class_mixing: float, ignore_index: int | None, **counts: int
) -> None:
    """Options of the trainer that no other part of it checks before the first step."""
    check_between("class_mixing", class_mixing, 0, 1)
    if ignore_index is not None:
        check_index("ignore_index", ignore_index)
    if clip_norm is not None:
        check_positive("clip_norm", clip_norm)
    for name, count in counts.items():
        check_at_least(name, as_index(name, count), 1)


def check_scheduler(scheduler: object | None, optimizer: torch.optim.Optimizer) -> None:
    if scheduler is not None and (isinstance(scheduler, type) or not hasattr(scheduler, "step")):
        raise TypeError(
            f"scheduler: got {_kind(scheduler)}, expected a scheduler of `optimizer`, as those of "
            "torch.optim.lr_scheduler"
        )
    if scheduler is not None and not _steps_alone(scheduler):
        raise TypeError(
            f"scheduler: got {_kind(scheduler)}, expected one that is stepped without a metric or "
            "an epoch; step this one in the training loop"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("scheduler: got one of another optimizer, expected one of `optimizer`")


def check_batch(
    source: Tensor,
    labels: Tensor,
    target: Tensor | None,
    device: torch.device,
    parts: int,
    unit_range: bool,
    mixes: bool,
) -> None:
    """TypeError or ValueError for a batch that does not fit, by the name of the argument."""
    named = {"source_images": source} | ({} if target is None else {"target_images": target})
    for name, images in named.items():
        check_images(name, images, device, source, parts)
        if unit_range:
            check_range(name, images)
    check_labels(labels, source)
    if target is not None and mixes and len(target) != len(source):
        raise ValueError(
            f"target_images: got {len(target)} images, expected {len(source)} like "
            "source_images, as class_mixing pastes one onto another"
        )


def check_images(name: str, images: Tensor, device: torch.device, like: Tensor, parts: int) -> None:
    """Floating point images (N, C, *spatial) on `device`, N in equal parts, else as `like`."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: got {type(images).__name__}, expected a tensor of images")
    if not images.is_floating_point():
        raise TypeError(f"{name}: got {images.dtype}, expected floats (divide uint8 by 255)")
    if images.ndim < 3 or 0 in images.shape:
        raise ValueError(f"{name}: got shape {shape(images)}, expected (N, C, *spatial), not empty")
    if images.device != device:
        raise ValueError(f"{name}: got images on {images.device}, expected the student's {device}")
    if images.shape[1:] != like.shape[1:] or images.dtype != like.dtype:
        raise ValueError(
            f"{name}: got {images.dtype} {shape(images)}, expected the type, channels and size of "
            f"source_images {like.dtype} {shape(like)}, as the student sees both in one forward"
        )
    if len(images) % parts:
        raise ValueError(
            f"{name}: got {len(images)} images, expected a multiple of {parts} (accumulate)"
        )


def check_range(name: str, images: Tensor) -> None:
    """Images in [0, 1]; waits for the device, so for a first step only. NaN passes."""
    if images.ndim != 4:
        raise ValueError(
            f"{name}: got shape {shape(images)}, expected (N, C, H, W) for style and jitter; "
            "volumes take style=None and jitter=None"
        )
    low, high = (float(value) for value in images.aminmax())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise ValueError(
            f"{name}: got values in [{low:g}, {high:g}], expected [0, 1] for style and jitter; "
            "normalise inside the student instead"
        )


def check_labels(labels: Tensor, images: Tensor) -> None:
    """Labels (N, *spatial), uint8 or int64, of the size and on the device of the images."""
    if not isinstance(labels, Tensor) or labels.dtype not in LABEL_DTYPES:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"source_labels: got {got}, expected a tensor of uint8 or int64")
    expected = (len(images), *images.shape[2:])
    if labels.shape != expected or labels.device != images.device:
        raise ValueError(
            f"source_labels: got shape {shape(labels)} on {labels.device}, expected {expected} on "
            f"{images.device} like source_images"
        )


def logits_from(network: nn.Module, images: Tensor, name: str, amp: torch.dtype | None) -> Tensor:
    """The logits of a network under autocast to `amp`, if any; as logits_of.

    Raises TypeError where the network fails on images of another type than its weights: what
    PyTorch says of it names a layer, and neither the network nor a remedy.
    """
    try:
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            output = network(images)
    except RuntimeError as error:
        weights = _dtypes(network)
        if amp or images.dtype in weights or isinstance(error, torch.OutOfMemoryError):
            raise
        raise TypeError(
            f"{name}: failed on images of {images.dtype} with weights of "
            f"{' and '.join(map(str, weights))} ({first_line(error)}); give images of the "
            "weights' type, or for half precision keep both in float32 and set amp=torch.bfloat16"
        ) from error
    return logits_of(output, images, name)


def logits_of(output: Any, images: Tensor, name: str) -> Tensor:
    """The logits (N, C, *spatial) that a network returned for images (N, C', *spatial').

    A tensor is the logits itself; a mapping holds them under "out" (torchvision), any other object
    as its attribute `logits` (transformers). Raises TypeError or ValueError naming the network.
    """
    if isinstance(output, Mapping) and "out" in output:
        output = output["out"]
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"{name}: returned {type(output).__name__}, expected logits: a floating point tensor, "
            "a dict with 'out', or an object with .logits"
        )
    if logits.ndim != images.ndim or len(logits) != len(images):
        raise ValueError(
            f"{name}: returned shape {shape(logits)} for images {shape(images)}, expected "
            f"logits ({len(images)}, C, *spatial)"
        )
    return logits


def loss_of(value: Any, name: str) -> Tensor:
    """What a loss function returned, which has to be a 0-dim tensor."""
    if not _is_figure(value):
        got = f"shape {shape(value)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: returned {got}, expected a 0-dim tensor, the loss")
    return value


def loss_and_stats_of(value: Any) -> tuple[Tensor, Sequence[Tensor]]:
    """What a consistency loss returned: the loss, and two figures of its pixels."""
    if not (_is_pair(value) and _is_pair(value[1]) and all(map(_is_figure, value[1]))):
        raise TypeError(
            f"consistency: returned {type(value).__name__}, expected (loss, (selected, "
            "mean_score)), 0-dim tensors, as it is called with return_stats=True"
        )
    return loss_of(value[0], "consistency"), value[1]


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _is_figure(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _dtypes(network: nn.Module) -> list[torch.dtype]:
    """Of the weights, each once."""
    dtypes = (p.dtype for p in network.parameters() if p.is_floating_point())
    return list(dict.fromkeys(dtypes))


def _steps_alone(stepped: object) -> bool:
    """Whether its step() takes no argument that has to be given, as far as its class tells."""
    step = getattr(type(stepped), "step", None)
    required = list(inspect.signature(step).parameters.values())[1:] if step is not None else []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in variable for p in required)


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
