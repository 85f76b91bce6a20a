"""Averages of any power-function length, made after training from snapshots of a few tracks.

Train with two teachers, `EMATeacher(student, PowerFunction(gamma))` for two gammas, and keep their
state dicts now and then; a weighted sum of these approximates the average of any other gamma.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2),
CVPR 2024, section 3.2 and appendix C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmt.arguments import shape
from fastmt.reference import is_averaged


class Snapshot(NamedTuple):
    """A track's state dict after `updates` averaging updates."""

    updates: int
    gamma: float
    state: Mapping[str, Tensor]


def gamma_of(sigma_rel: float) -> float:
    """The gamma of a profile whose standard deviation is `sigma_rel` of the training time.

    Raises:
        ValueError: outside (0, 0.288), the widths that a power function can have.
    """
    if not (isinstance(sigma_rel, Real) and 0 < sigma_rel < 12**-0.5):
        raise ValueError(f"sigma_rel: got {sigma_rel!r}, expected a number in (0, 12^-0.5)")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


@torch.no_grad()
def average(
    snapshots: Sequence[Snapshot], gamma: float, updates: int | None = None
) -> dict[str, Tensor]:
    """The state dict of the power-function average of `gamma`, as near as the snapshots come.

    Args:
        snapshots: of at least one track; more times and two gammas come nearer.
        gamma: of the wanted average, see `gamma_of`.
        updates: the moment in training; by default that of the last snapshot.

    Floating and complex tensors are summed in double precision and keep their dtype; all else, as
    float8, is that of the last snapshot. No gradient.

    Raises ValueError without snapshots, for one that lacks an entry of the last, and as `weights`.
    """
    if not snapshots:
        raise ValueError("snapshots: got none, expected at least one")
    last = max(snapshots, key=lambda snapshot: snapshot.updates)
    end = last.updates if updates is None else updates
    shares = weights([s.updates for s in snapshots], [s.gamma for s in snapshots], end, gamma)
    mixed = {}
    for name, entry in last.state.items():
        mixed[name] = entry.clone() if isinstance(entry, Tensor) else entry
        if isinstance(entry, Tensor) and is_averaged(entry):
            wide = torch.complex128 if entry.is_complex() else torch.float64
            states = [_entry(snapshot, name, entry).to(wide) for snapshot in snapshots]
            terms = [share * state for share, state in zip(shares, states, strict=True)]
            mixed[name].copy_(torch.stack(terms).sum(0))
    return mixed


def _entry(snapshot: Snapshot, name: str, like: Tensor) -> Tensor:
    entry = snapshot.state.get(name)
    if not isinstance(entry, Tensor) or entry.shape != like.shape:
        found = f"in shape {shape(entry)}" if isinstance(entry, Tensor) else "nowhere"
        raise ValueError(
            f"snapshots: the one after {snapshot.updates} updates has {name!r} {found}, expected "
            f"{shape(like)} as in the last one"
        )
    return entry


def weights(updates: Sequence[int], gammas: Sequence[float], end: int, gamma: float) -> list[float]:
    """The weight of each snapshot: least squares between the profiles in training time.

    Divided by their sum, as in the authors' code: those of few snapshots would shrink the network.

    Raises ValueError for a time before the first update, which no profile covers, for a gamma whose
    profile has no square integral, of at most -1/2, and where no snapshot has any weight.
    """
    for name, number in (*(("snapshots", number) for number in updates), ("updates", end)):
        if not (isinstance(number, Real) and number >= 1):
            raise ValueError(f"{name}: got one after {number!r} updates, expected at least 1")
    for each in (*gammas, gamma):
        if not (isinstance(each, Real) and each > -0.5):
            raise ValueError(f"gamma: got {each!r}, expected a number above -1/2")
    times, powers = np.asarray(updates, np.float64), np.asarray(gammas, np.float64)
    products = _product(times[:, None], powers[:, None], times[None], powers[None])
    wanted = _product(times, powers, np.float64(end), np.float64(gamma))
    shares = np.linalg.lstsq(products, wanted, rcond=None)[0]
    if not shares.sum() > 0:
        raise ValueError(
            f"snapshots: got none with any weight in the average after {end} updates, expected "
            "one nearer"
        )
    return (shares / shares.sum()).tolist()


def _product(
    time_a: np.ndarray, gamma_a: np.ndarray, time_b: np.ndarray, gamma_b: np.ndarray
) -> np.ndarray:
    """The integral of the product of two profiles (gamma + 1) s^gamma / t^(gamma+1) on [0, t]."""
    exponent = np.where(time_a < time_b, gamma_b, -gamma_a)
    ratio = (time_a / time_b) ** exponent
    longest = np.maximum(time_a, time_b)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * longest)
