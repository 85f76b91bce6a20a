"""Types of command-line options: a value that does not fit is told with what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from fastmt.arguments import first_line

MIN_SIDE = 32  # pixels: one at the U-Net's coarsest level
_MOST_CHANNELS = 1 << 31  # PyTorch tells of more memory than there is up to 64 bits
_LONGEST_SIDE = 1 << 28  # NumPy, too, tells of more memory than there is up to 64 bits
_MOST_THREADS = 1024  # of more than the system starts OpenMP ends the process


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    expected = f"an integer >= {least}" + ("" if most is None else f" and <= {most}")

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    return integer


def threads(text: str) -> int:
    return integer(1, most=_MOST_THREADS)(text)


def even(text: str) -> int:
    value = integer(2, most=_MOST_CHANNELS)(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an even number >= 2")
    return value


def side(text: str) -> int:
    """Of what the U-Net sees, in whole logits of 4 pixels: more logits than that get stretched."""
    value = integer(MIN_SIDE, most=_LONGEST_SIDE)(text)
    if value % 4:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a multiple of 4")
    return value


def number(
    *, above: float | None = None, below: float = math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """A number in [0, most], or strictly between the bounds given."""
    bounds = ["> 0" if above is not None else ">= 0"]
    bounds += [f"< {below:g}"] if below < math.inf else []
    bounds += [f"<= {most:g}"] if most < math.inf else []

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low = value > above if above is not None else value >= 0
        if not (low and value < below and value <= most):
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a number {' and '.join(bounds)}"
            )
        return value

    return number


def location(text: str) -> str:
    """Of a file or folder: an empty one, as of a shell variable that is unset, would be `.`."""
    if not text:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a path")
    return text


def device(text: str) -> str:
    try:
        float(torch.zeros((), device=text))  # the device meta has none to read
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error)
        raise argparse.ArgumentTypeError(
            f"got {text!r}, which is not available: {reason}"
        ) from error
    return text
