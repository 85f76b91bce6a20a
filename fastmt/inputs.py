"""Checks of what a trainer is given, and the logits in what a network returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmt.arguments import check_positive, shape
from fastmt.matching import unwrapped
from fastmt.teacher import EMATeacher
from fastmt.teacher_network import carrying

LABEL_DTYPES = (torch.uint8, torch.int64)
_AMP_DTYPES = (None, torch.bfloat16, torch.float16)
_TOLERANCE = 0.01  # resizing and rounding may leave [0, 1] by a little


def check_networks(student: nn.Module, teacher: EMATeacher | None) -> None:
    """A student with parameters, and a teacher that follows one."""
    if next(student.parameters(), None) is None:
        raise ValueError("student: got a module without parameters, expected one to train")
    if not isinstance(teacher, EMATeacher | None):
        raise TypeError(
            f"teacher: got {type(teacher).__name__}, expected an EMATeacher; wrap the network that "
            "is to follow: EMATeacher(student)"
        )


def check_own_weights(call: str, student: nn.Module) -> None:
    """RuntimeError in a call within swapped(), where the student has not its own weights."""
    if unwrapped(student) in carrying:
        raise RuntimeError(f"{call}: the student carries a teacher's weights; leave swapped()")


def check_options(amp: torch.dtype | None, clip_norm: float | None, **counts: int) -> None:
    """Options of the trainer that no other part of it checks before the first step."""
    if amp not in _AMP_DTYPES:
        raise ValueError(f"amp: got {amp!r}, expected None, torch.bfloat16 or torch.float16")
    if clip_norm is not None:
        check_positive("clip_norm", clip_norm)
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: got {count!r}, expected an integer of at least 1")


def check_scheduler(scheduler: object | None, optimizer: torch.optim.Optimizer) -> None:
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "scheduler: got ReduceLROnPlateau, expected one that is stepped without a metric; step "
            "this one in the training loop"
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
