"""Checks of arguments shared by the operations: which argument, what came, what was expected."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence, Sized
from numbers import Rational, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_POSITIONS = 2**31 - 1  # along one dimension that is up-sampled


def shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def check_choice(name: str, value: object, options: Sequence[object]) -> None:
    if not isinstance(value, Hashable) or value not in options:  # an array is not, and equals some
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, options))}")


def check_positive(name: str, value: float) -> None:
    is_number = type(value) is float or isinstance(value, Real)  # the latter asks an abstract class
    if not (is_number and 0 < value < math.inf and _fits(value)):
        raise ValueError(f"{name}: got {value!r}, expected a positive finite number")


def _fits(value: float) -> bool:
    """Whether a float can hold it: Python's integers may be too large."""
    if type(value) is float or not isinstance(value, Rational):
        return True
    return -sys.float_info.max <= value <= sys.float_info.max


def check_finite(name: str, value: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not (_fits(value) and math.isfinite(value)):
        raise ValueError(f"{name}: got {value!r}, expected a finite number")


def check_at_least(name: str, value: float, least: float) -> None:
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not value >= least:
        raise ValueError(f"{name}: got {value!r}, expected at least {least}")


def check_integer(name: str, value: float) -> None:
    if not (isinstance(value, Real) and value % 1 == 0):
        raise ValueError(f"{name}: got {value!r}, expected an integer")


def as_index(name: str, value: int) -> int:
    """An integer, NumPy's too, and no float that happens to be whole."""
    try:
        return operator.index(value)
    except TypeError:
        got = type(value).__name__
        raise TypeError(f"{name}: got {got}, expected an integer") from None


def check_index(name: str, value: int) -> None:
    if not -(2**63) <= as_index(name, value) < 2**63:
        raise ValueError(f"{name}: got {value}, expected an integer of 64 bits")


def check_count(name: str, value: int, least: int = 1) -> None:
    check_index(name, value)
    check_at_least(name, value, least)


def check_between(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if isinstance(value, Tensor):
        check_real_tensor(name, value)
        if value.numel() != 1:
            raise TypeError(f"{name}: got shape {shape(value)}, expected a number")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value!r}, expected a number in [{low}, {high}]")


def check_real_tensor(name: str, tensor: Tensor) -> None:
    check_strided(name, tensor)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: got {tensor.dtype}, expected real numbers")


def check_flag(name: str, value: object) -> None:
    if not (value is True or value is False or value in (0, 1)):  # NumPy's, too
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def check_height_width(name: str, size: Sequence[int], least: int) -> None:
    if not isinstance(size, Sized):
        raise TypeError(f"{name}: got {size!r}, expected (height, width)")
    for side in size:
        check_index(name, side)
    if len(size) != 2 or min(size) < least:
        raise ValueError(f"{name}: got {tuple(size)}, expected (height, width) of at least {least}")


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got {tensor.dtype}, expected floating point")


def check_image_shape(name: str, images: Tensor, channels: int | None = None) -> None:
    if images.ndim != 4 or channels not in (None, images.shape[1]):
        raise ValueError(
            f"{name}: got shape {shape(images)}, expected (N, {channels or 'C'}, H, W)"
        )


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        raise TypeError(f"generator: got {got}, expected a torch.Generator or None")
    if generator.device.type != device.type:
        raise ValueError(f"generator: got one on {generator.device}, expected one on {device}")


def check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: got {type(logits).__name__}, expected a tensor of logits")
    if logits.dtype not in FLOATS:
        raise TypeError(f"{name}: got {logits.dtype}, expected float32, bfloat16, float16, float64")
    check_strided(name, logits)
    if logits.ndim < 2 or logits.shape[1] == 0:
        raise ValueError(
            f"{name}: got shape {shape(logits)}, expected (N, C, *spatial) with C >= 1"
        )


def check_strided(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: got layout {tensor.layout}, expected a strided tensor")


def members_of(logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Of an ensemble: one tensor of logits, or a sequence of them; not checked."""
    if isinstance(logits, Tensor):
        return [logits]
    is_one = isinstance(logits, Mapping) or not isinstance(logits, Iterable)
    return [logits] if is_one else list(logits)


def check_members(name: str, members: list[Tensor]) -> None:
    """Logits of equal N, C and rank, on one device."""
    if not members:
        raise ValueError(f"{name}: got an empty sequence, expected at least one tensor of logits")
    for member in members:
        check_logits(name, member)
        if member.shape[:2] != members[0].shape[:2] or member.ndim != members[0].ndim:
            raise ValueError(
                f"{name}: members of shapes {shape(members[0])} and {shape(member)} differ in N, C "
                "or rank; expected the same"
            )
        check_device(name, member, members[0].device)


def detached(members: list[Tensor]) -> list[Tensor]:
    return [member.detach() if member.requires_grad else member for member in members]


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {device}")


def output_shape(
    named_logits: Sequence[tuple[str, Tensor]], size: Sequence[int] | None, got: str = "size: got"
) -> tuple[int, ...]:
    """The output pixels (N, *out) of logits that are up-sampled to `size`, or agree without it.

    got: how an error begins that says what size came.
    """
    first_name, first = named_logits[0]
    spatial = first.ndim - 2
    if size is None:
        images, _, *pixels = first.shape
        for name, logits in named_logits[1:]:
            if logits.shape[2:] != first.shape[2:]:
                raise ValueError(
                    f"{name}: got spatial size {tuple(logits.shape[2:])}, {first_name} has "
                    f"{tuple(pixels)}; give size= to up-sample both"
                )
        return (images, *pixels)
    if not isinstance(size, Sequence) or not all(map(_is_integer, size)):
        raise TypeError(f"{got} {size!r}, expected a sequence of integers")
    if not 1 <= spatial <= 3:
        raise ValueError(
            f"{got} {tuple(size)} for {first_name} {shape(first)}, expected that of the logits: 1 "
            "to 3 dimensions can be up-sampled"
        )
    if len(size) != spatial:
        raise ValueError(
            f"{got} {tuple(size)}, expected {spatial} integers, one for each spatial dimension of "
            f"{first_name} {shape(first)}"
        )
    if min(size) < 1:
        raise ValueError(f"{got} {tuple(size)}, expected positive integers")
    if max(size) > MOST_POSITIONS:
        raise ValueError(f"{got} {tuple(size)}, expected integers below 2**31")
    for name, logits in named_logits:
        if 0 in logits.shape[2:]:
            raise ValueError(f"{name}: got shape {shape(logits)}, cannot up-sample zero pixels")
    return (first.shape[0], *size)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def check_map(
    name: str,
    tensor: Tensor | None,
    expected: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """A map of one value a pixel: shape (N, *out), one of `dtypes`, no gradient, same device."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got {tensor.dtype}, expected {names}")
    check_strided(name, tensor)
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: got shape {shape(tensor)}, expected {tuple(expected)}")
    if tensor.requires_grad:
        raise ValueError(f"{name}: requires grad, but is not differentiable; pass {name}.detach()")
    check_device(name, tensor, device)


def check_threshold(threshold: float | Tensor, classes: int, device: torch.device) -> None:
    """A number, a tensor of one, or one for each class."""
    check_threshold_type(threshold)
    if not isinstance(threshold, Tensor):
        return
    if threshold.ndim > 1 or (threshold.ndim == 1 and len(threshold) != classes):
        raise ValueError(
            f"threshold: got shape {shape(threshold)}, expected a 0-dim tensor or "
            f"({classes},), one for each class"
        )
    if threshold.ndim == 1 or threshold.device.type != "cpu":
        check_device("threshold", threshold, device)


def check_threshold_type(threshold: float | Tensor) -> None:
    if isinstance(threshold, Tensor):
        check_strided("threshold", threshold)
        if threshold.is_complex():
            raise TypeError(f"threshold: got {threshold.dtype}, expected real numbers")
        return
    if type(threshold) is not float and not isinstance(threshold, Real):
        raise TypeError(f"threshold: got {type(threshold).__name__}, expected a float or a tensor")
    if not _fits(threshold):
        raise ValueError(f"threshold: got {threshold!r}, expected what a float can hold")


def check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """ValueError for a label outside 0..C-1; reads the labels, so only for tensors on the CPU."""
    labels = labels.long()  # a uint8 tensor would compare with 300 as with 44
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        raise ValueError(label_message(int(labels[wrong][0]), classes, ignore_index))


def label_message(label: int, classes: int, ignore_index: int) -> str:
    return (
        f"labels: got label {label}, expected 0..{classes - 1} or ignore_index={ignore_index} "
        f"for {classes} classes"
    )
