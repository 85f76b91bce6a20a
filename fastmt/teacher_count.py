"""How often a teacher was updated and what decay comes next, on the host and on a device."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn

from fastmt import arguments, decays
from fastmt.rounding import mixed

_32_BITS = 0xFFFFFFFF


class DeviceCount:
    """The decay of the next update on a device, which alone may know what updates were skipped.

    The host does not wait to learn of them. It puts the decay of every count into a table, and the
    device takes that of its own count: the host's less what was skipped.
    """

    LENGTH = 1 << 16  # the last counts; of so many skipped updates between two settle() it forgets

    @torch.inference_mode(False)  # no step outside that mode could write tensors made in it
    def __init__(self, device: torch.device) -> None:
        self.decay = torch.zeros((), dtype=torch.float64, device=device)
        self.draw = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.may_skip = False  # an update was given what only the device knows, or a graph holds it
        self._tables: dict[str, Tensor] = {}
        self._last = -2

    @torch.inference_mode(False)
    def put(self, calls: int, decay: float, draw: int | None) -> None:
        """Decay, and draw if any, of the next update, where `calls` were made before."""
        at = None
        if self.may_skip:
            at = (calls - self.skipped).bitwise_and_(self.LENGTH - 1)
        goes_on = calls in (self._last, self._last + 1)
        for name, value in (("decay", decay), ("draw", draw)):
            if value is not None:
                self._put(name, value, calls if goes_on else None, at)
        self._last = calls

    def _put(self, name: str, value: float, calls: int | None, at: Tensor | None) -> None:
        scalar = getattr(self, name)
        if name not in self._tables:
            self._tables[name] = scalar.new_zeros(self.LENGTH)
        table = self._tables[name]
        # After a jump of the count all that was before it counts as the present.
        (table if calls is None else table[calls % self.LENGTH]).fill_(value)
        if at is None:
            scalar.fill_(value)
        else:
            torch.take(table, at, out=scalar)

    def skip(self, finite: Tensor) -> None:
        """Leave an update out of the count where `finite` holds False."""
        self.may_skip = True
        self.skipped.add_(finite.logical_not().to(self.skipped.device))

    def settle(self) -> int:
        """The updates that were skipped since the last time; waits for the device."""
        skipped = int(self.skipped) if self.may_skip else 0
        self.skipped.zero_()
        return skipped


class Counting(nn.Module):
    """A module that counts its updates and knows the decay of the next: the half of EMATeacher.

    `calls` and `updates` are the host's counts: exact, but for updates that were skipped where only
    a device knows of it; settle() subtracts those.
    """

    def __init__(
        self,
        decay: float | decays.Decay,
        warmup: str | Callable[[int], float] | None,
        update_every: int,
        start: int,
        draw_seed: int | None,
    ) -> None:
        super().__init__()
        for name, count, least in (("update_every", update_every, 1), ("start", start, 0)):
            arguments.check_integer(name, count)
            arguments.check_at_least(name, count, least)
        if not callable(decay) and not (isinstance(decay, Real) and 0 <= decay < 1):
            raise ValueError(f"decay: got {decay!r}, expected a number in [0, 1)")
        if not callable(warmup) and warmup is not None:
            arguments.check_choice("warmup", warmup, tuple(decays.WARMUPS))
        self.decay, self.warmup, self._draw_seed = decay, warmup, draw_seed
        self.update_every, self.start = int(update_every), int(start)
        self.calls, self.updates = 0, 0
        self._device_count: DeviceCount | None = None

    def current_decay(self) -> float:
        """a_t of the next averaging update; waits for the device where it knows of skipped ones."""
        self.settle()
        return self._decay()

    def _decay(self) -> float:
        if self.calls < self.start:
            return 0.0
        decay, warmup = self.decay, self.warmup
        if callable(decay):
            return _checked("decay", decay, self.updates)
        if callable(warmup):
            return _checked("warmup", warmup, self.updates)
        return decays.warmed_up(warmup, decay)(self.updates)

    def _is_due(self) -> bool:
        """Whether the next call of update() averages."""
        own = self.__dict__
        past = own["calls"] - own["start"]
        return past < 0 or (past + 1) % own["update_every"] == 0

    def _due_decay(self) -> float:
        """a_t of the next call of update(); negative where it does not average."""
        return self._decay() if self._is_due() else -1.0

    def _draw(self) -> int:
        """The seed of the next update's random numbers."""
        if self._draw_seed is None:
            return 0
        seed = mixed(self._draw_seed & _32_BITS)
        return mixed((seed + self.calls) & _32_BITS)

    def count(self) -> None:
        """Count a call of update() that something else has made, such as the replay of a graph."""
        due, own = self._is_due(), self.__dict__  # nn.Module's way to get and set is slow
        own["calls"] = calls = own["calls"] + 1
        if due and calls > own["start"]:
            own["updates"] += 1

    @torch.no_grad()
    def advance(self) -> None:
        """The host's half of update(): count, and put the decay of this step on the device.

        For a training step that is a CUDA graph: update() that is being captured records the
        device's half alone, which reads the decay (and the seed of stochastic rounding) there. Call
        advance() before each replay; nothing waits for the device. Inside the graph a step that
        `update_every` leaves out changes nothing. A graph reads tables that the teacher holds:
        after a state was loaded, or the teacher was moved, capture anew.
        """
        self.put_decay()
        self.count()

    def put_decay(self) -> tuple[Tensor, Tensor]:
        """Decay and draw of the next update as 0-dim tensors on the student's device."""
        count = self._count_on(None)
        count.put(self.calls, self._due_decay(), None if self._draw_seed is None else self._draw())
        return count.decay, count.draw

    def _count_on(self, device: torch.device | None) -> DeviceCount:
        if self._device_count is None:
            self._device_count = DeviceCount(device or self._counting_device())
        return self._device_count

    def _counting_device(self) -> torch.device:
        """Where it is known first whether an update is to be skipped: where the student is."""
        raise NotImplementedError

    def _may_skip(self) -> bool:
        """Whether a device may know of skipped updates, and so alone of the count."""
        count = self.__dict__["_device_count"]
        return count is not None and count.may_skip

    def _captured(self) -> DeviceCount:
        if self._device_count is None:
            raise RuntimeError(
                "update: the first one cannot be captured; call advance() before the capture"
            )
        return self._device_count

    def settle(self) -> None:
        """Leave what a device knows to be skipped out of `calls` and `updates`; waits for it."""
        if self._device_count is not None:
            calls = self.calls - self._device_count.settle()
            self.updates -= self._averaging(self.calls) - self._averaging(calls)
            self.calls = calls

    def _averaging(self, calls: int) -> int:
        """How many of the first `calls` average."""
        return max(0, calls - self.start) // self.update_every

    def _go_on(self, updates: int | None) -> None:
        """Count on from so many updates; from None, an average of unknown age, past the warm-up.

        A callable schedule has no end of its warm-up to go to, and goes on where it is.
        """
        self.settle()
        if updates is None:
            own = callable(self.decay) or callable(self.warmup)
            length = 0 if own else decays.warmup_length(self.warmup, self.decay)
            updates = max(self.updates, length)
        self.calls, self.updates = self.start + updates * self.update_every, updates


def _checked(name: str, schedule: Callable[[int], float], update: int) -> float:
    decay = schedule(update)
    if not 0 <= decay <= 1:
        raise ValueError(f"{name}: gave {decay!r} for update {update}, expected a number in [0, 1]")
    return decay
