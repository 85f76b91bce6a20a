"""The teacher: a network whose parameters are the moving average of the student's."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastmt import arguments, decays
from fastmt.ema_plan import Plan, Track
from fastmt.matching import local, unwrapped
from fastmt.teacher_count import Counting
from fastmt.teacher_network import all_pairs, check_wide, copied, lent, retype, write
from fastmt.teacher_state import Loading, add_versions, counts, versioned, whole_compensation
from fastmt.teacher_update import update_together

BUFFERS, ROUNDINGS = ("copy", "ema", "keep"), ("stochastic", "kahan")


class EMATeacher(Counting):
    """A copy of the student whose parameters are the moving average of the student's.

    After update t = 0, 1, ... the teacher is a_t * teacher + (1 - a_t) * student. That goes for
    frozen parameters too, whose average stays as it is until they are loaded or trained after all.

    Args:
        student: the network to follow; wrappers (DistributedDataParallel, torch.compile) are looked
            through. It is not kept alive, nor part of this module's parameters or state.
        decay: a in [0, 1), or a callable t -> a_t that is used as it is (fastmt.decays has some).
        warmup: "reciprocal" takes a_t = min(1 - 1 / (t + 1), decay): the plain mean of the first
            students, the first one whole; "tenths" min((1 + t) / (10 + t), decay); "power"
            min(1 - (1 + t)^(-2/3), decay); None takes `decay` at once; a callable t -> a_t is used
            as it is.
        buffers: "copy" the student's (running statistics belong to the newest weights), "ema"
            averages floating ones, "keep" leaves them, and the student may have others. Integer,
            bool and float8 buffers are copied unless kept, as are parameters of these types and
            frozen ones without arithmetic, such as torchao's quantised weights. No state dict
            holds those that are not persistent: their average begins anew.
        update_every: only every so many calls of update() average.
        start: until that many calls the teacher is a plain copy of the student.
        half_life: instead of `decay`: after that many steps (calls of update()) a weight counts
            half; after that many images where `images_per_step` is given.
        dtype: floating dtype of the teacher's parameters. Default: the student's, and float32 where
            the student's is half precision, in which an average with decay 0.999 would not move.
            bfloat16 and float16 need a `rounding`; layers with running statistics, as BatchNorm,
            stay as the student's. Inputs have the teacher's dtype, or autocast is on.
        rounding: of parameters in half precision: "stochastic" stores each up or down at random,
            right on average; "kahan" keeps what rounding has lost in a tensor beside each
            (`compensation`), as many bytes again. Either is done in the launch that does the rest.
        seed: of stochastic rounding; the same seed and students give the same teacher.
        device: of the teacher; default: the student's. On "cpu" its parameters and buffers take no
            memory of the student's GPU: update() starts a copy of the student to pinned memory and
            returns, and the average is made at the next update(), or when this module is called,
            saved, copied or moved. Whatever else reads it (`module`, parameters(), buffers()) has
            to call flush() before.

    Starts in eval mode, until train() of a module that holds it sets it like its other children.
    `module` is the averaged network; forward runs it without gradient. From an update on it holds
    the student's tensors, which torch.utils.swap_tensors then refuses to swap.
    `calls` and `updates` count update() and those that averaged. Where only a GPU knows that some
    were skipped, they are left out once progress(), state_dict() or current_decay() has asked it.

    Raises:
        ValueError, TypeError: naming the argument; a student whose parameters changed by name or
        shape is named at update().

    Source: Tarvainen & Valpola 2017.
    """

    def __init__(
        self,
        student: nn.Module,
        decay: float | decays.Decay = 0.999,
        *,
        warmup: str | Callable[[int], float] | None = "reciprocal",
        buffers: str = "copy",
        update_every: int = 1,
        start: int = 0,
        half_life: float | None = None,
        images_per_step: float | None = None,
        dtype: torch.dtype | None = None,
        rounding: str | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if half_life is not None:
            if decay != 0.999:
                raise ValueError(f"decay: got {decay!r} beside half_life; give one of them")
            arguments.check_positive("update_every", update_every)
            decay = decays.half_life_decay(half_life, update_every, images_per_step)
        elif images_per_step is not None:
            raise ValueError(f"images_per_step: got {images_per_step!r} without half_life")
        arguments.check_choice("buffers", buffers, BUFFERS)
        if rounding is not None:
            arguments.check_choice("rounding", rounding, ROUNDINGS)
        arguments.check_integer("seed", seed)
        draw_seed = int(seed) if rounding == "stochastic" else None
        super().__init__(decay, warmup, update_every, start, draw_seed)
        self.buffer_rule, self.rounding = buffers, rounding
        self.module = copied(unwrapped(student), device).requires_grad_(False)
        retype(self.module, dtype, rounding)
        self.compensation: dict[str, Tensor] = {}
        self._student = weakref.ref(unwrapped(student))
        self._plan: Plan | None = None
        self._others: list[EMATeacher] = []  # of the plan
        self._offloaded: Plan | None = None  # which owes the last average
        self.register_load_state_dict_post_hook(EMATeacher._end_loading)
        self.eval()

    def update(
        self,
        *,
        student: nn.Module | None = None,
        finite: Tensor | None = None,
        decay: Tensor | None = None,
    ) -> None:
        """Average the student in.

        Args:
            student: default: the one this teacher was made from.
            finite: 0-dim bool tensor; where False (a step that was skipped) nothing changes, nor
                does the update count. On a GPU it is read there alone.
            decay: 0-dim float64 tensor on the teacher's device that holds a_t, read there alone,
                negative to leave the update out, whatever `update_every` and `start` say; default:
                current_decay().
        """
        decays = None if decay is None else [decay]
        update_together([self], student=student, finite=finite, decays=decays)

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Update after each `optimizer.step()`; `.remove()` of what is returned ends that.

        A step that a gradient scaler skips does not count: it never calls the optimiser, or tells
        a fused one by `found_inf`, which is then read on the device.
        """

        def after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
            found = getattr(optimizer, "found_inf", None)
            self.update(finite=None if found is None else found.reshape(()) == 0)

        if not hasattr(optimizer, "_optimizer_step_post_hooks"):  # accelerate wraps another
            optimizer = getattr(optimizer, "optimizer", optimizer)
        return optimizer.register_step_post_hook(after_step)

    @torch.inference_mode(False)  # no update outside that mode could write what is made in it
    @torch.no_grad()
    def _plan_anew(self, teachers: list[EMATeacher], network: nn.Module) -> Plan:
        if len(set(teachers)) < len(teachers):
            raise ValueError("teachers: got one twice, expected each once")
        for teacher in teachers:
            teacher.flush()
        for teacher in teachers:
            check_wide(teacher.module, teacher.rounding)
        plan = self._plan = Plan([teacher._track() for teacher in teachers], network)
        self._others = teachers[1:]  # without itself: a cycle would live on until it is collected
        for teacher in teachers:
            teacher._offloaded = plan if plan.staging is not None else None
        # Its children and parameters would outlive the student in the plan.
        own = weakref.ref(self)
        self._farewell = weakref.ref(network, lambda _: own() and own()._forget())
        return plan

    def _plan_for(self, teachers: list[EMATeacher], network: nn.Module) -> Plan:
        plan = self._plan
        if plan is None or self._others != teachers[1:] or not plan.holds(network):
            return self._plan_anew(teachers, network)
        if plan.staging is not None and any(t._offloaded is not plan for t in teachers):
            return self._plan_anew(teachers, network)  # once another plan's average is made
        return plan

    def _track(self) -> Track:
        return Track(self, self.buffer_rule, self.rounding, self.compensation)

    def flush(self) -> None:
        """Make the average that a teacher on the CPU still owes its last update."""
        if self._offloaded is not None:
            self._offloaded.flush()

    def _forget(self) -> None:
        """Let go of the student's tensors."""
        self.flush()
        for teacher in self._others:
            if teacher._offloaded is self._plan:
                teacher._offloaded = None
        self._plan, self._others, self._offloaded = None, [], None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMATeacher:
        self._forget()
        self.settle()
        self._device_count = None  # a student that moves as well reports from elsewhere
        self.compensation = {name: fn(lost) for name, lost in self.compensation.items()}
        return super()._apply(fn, recurse)

    def _counting_device(self) -> torch.device:
        network = (self._student and self._student()) or self.module
        return next((p.device for p in network.parameters()), torch.device("cpu"))

    def _resolve(self, student: nn.Module | None) -> nn.Module:
        if student is not None:
            return unwrapped(student)
        student = self._student and self._student()
        if student is None:
            raise ValueError("student: the student of this teacher is gone; pass update(student=)")
        return student

    def forward(self, *args: object, **kwargs: object) -> object:
        """The averaged network's output, without gradient."""
        self.flush()
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def copy_to(self, network: nn.Module) -> None:
        """Write the averaged parameters and buffers into `network`; kept ones where they match."""
        self.flush()
        write(all_pairs(self.module, unwrapped(network, "network"), self.buffer_rule))

    @contextlib.contextmanager
    def swapped(self, student: nn.Module | None = None) -> Iterator[None]:
        """The student carries the teacher's weights in this context, and its own again after it.

        No teacher averages it meanwhile: update() and another swapped() raise RuntimeError.
        """
        self.flush()
        with lent(self._resolve(student), self.module, self.buffer_rule):
            yield

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """The averaged network's own state dict: it loads into the plain network.

        What else the next update depends on is in progress().
        """
        self.flush()
        self.settle()
        state = self.module.state_dict(*args, **kwargs)
        add_versions(state, kwargs.get("prefix", ""))
        return state

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint.state_dict: what state_dict() names without "module"."""
        own = self.module
        return dict.fromkeys((*own._modules, *own._parameters, *own._buffers), "module")

    def load_state_dict(
        self, state_dict: Mapping[str, object], strict: bool = True, assign: bool = False
    ) -> object:
        """Load the plain network's state dict, AveragedModel's, or a checkpoint of timm's.

        Prefixes of wrappers are stripped; of a checkpoint with "state_dict_ema" that part is taken;
        AveragedModel's `n_averaged` becomes `updates`. Without it the loaded average is one of
        unknown age: `start` and the warm-up are over, so that it stays; load_progress() afterwards
        gives it its true age. A callable decay or warmup cannot tell where its warm-up ends and
        goes on where it was: give it load_progress().
        """
        return super().load_state_dict(versioned(state_dict, self.module), strict, assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Entries of the plain network, wherever this module stands in a larger one."""
        self._forget()
        self.compensation = {}
        self._loading = Loading.start(self.module, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _end_loading(self, failed: tuple[list[str], list[str]]) -> None:
        loading = self.__dict__.pop("_loading")
        if loading.end(self.module, *failed):
            self._go_on(loading.updates)

    def progress(self) -> dict[str, object]:
        """What a checkpoint needs beside state_dict(), for load_progress().

        `calls` and `updates`, less those that were skipped, for which it waits for the device; and
        `compensation`, the tensors in which rounding="kahan" keeps what was lost.
        """
        self.flush()
        self.settle()
        lost = self.compensation
        if self.rounding == "kahan":
            lost = whole_compensation(self.module, lost)
        return {"calls": self.calls, "updates": self.updates, "compensation": dict(lost)}

    def load_progress(self, progress: Mapping[str, object]) -> None:
        """Go on from a progress(), after load_state_dict() with the numbers of the teacher saved.

        {"calls": 0, "updates": 0} lets the warm-up begin anew.
        """
        calls, updates = counts(progress)
        self._forget()
        self.settle()
        self.calls, self.updates = calls, updates
        lost = progress.get("compensation", {})
        self.compensation = {name: local(tensor) for name, tensor in lost.items()}

    def __getstate__(self) -> dict[str, object]:
        self.flush()
        self.settle()
        lost = ("_student", "_plan", "_offloaded", "_farewell", "_device_count")
        return {**super().__getstate__(), **dict.fromkeys(lost), "_others": []}
