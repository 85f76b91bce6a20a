"""The trainer: one step of mean-teacher training, told in the order of the method."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmt import checkpoint, inputs, skipping, trainer_state
from fastmt.consistency import ConsistencyLoss
from fastmt.cross_entropy import CrossEntropy
from fastmt.schedules import OnDevice, Schedule, as_schedule
from fastmt.skipping import Buffers
from fastmt.steps import Scheduled, StepReport
from fastmt.style import Style
from fastmt.teacher import EMATeacher
from fastmt.teacher_network import follow_mode
from fastmt.views import Views, ignored_label

__all__ = ["MeanTeacher", "StepReport"]


class MeanTeacher:
    """Mean-teacher training of a student on labelled source and unlabelled target images.

    Args:
        student: any module that maps images to logits (N, C, *spatial) of any resolution: a
            tensor, a dict with "out", or an object with `.logits`. Its mode (train, eval) stays.
        optimizer: of the student's parameters. On a GPU a fused one never waits for the device;
            any other waits once a step, to learn whether the loss and gradients are finite.
        teacher: EMATeacher; by default `EMATeacher(student, decay)`. It follows `student`, whatever
            it was made from. In a step each of its modules has the mode of the student's: an
            average of fast-moving weights does not fit the newest running statistics, so in
            training it normalises by the batch. Its own passes leave its buffers alone. Call its
            eval() to evaluate.
        decay: of the default teacher, 0.99 unless given.
        consistency: `(student, teacher, valid=, size=, return_stats=True[, threshold=]) -> (loss,
            (selected, mean_score))`, 0-dim tensors; by default ConsistencyLoss(). With several
            passes `teacher` is a list of logits.
        supervised: `(logits, labels) -> loss`, 0-dim; by default CrossEntropy().
        ignore_index: the label that `supervised` ignores, for class mixing; by default what it says
            itself: its `ignore_index`, or that of its options.
        weight: of the consistency loss, a number or a schedule.
        threshold: a number or a schedule; None leaves it to `consistency`.
        style: "fourier", "statistics", "none", None or a callable `(source, target) -> images`.
        noise: (sigma, clip) of the Gaussian noise of each view, None for none.
        passes: of the teacher over the target, each under its own noise; their softmaxes are
            averaged (uncertainty-aware training takes 8).
        jitter: options of photometric_jitter for the styled source and the student's view.
        class_mixing: probability of a step that pastes half of each source image's classes onto
            the student's view: there the source's labels teach, elsewhere the teacher does. Each
            part divides as its loss is told; with CrossEntropy(normalize="all") all pixels weigh
            alike, as in DAFormer.
        scheduler: of the learning rate; stepped once a step.
        clip_norm: largest norm of the gradient.
        amp: None, torch.bfloat16 or torch.float16 (with loss scaling).
        accumulate: equal parts in which a batch passes through the networks to save memory. The
            loss is the mean of the parts', which differs from the whole batch's where the parts
            have unequal numbers of ignored pixels.
        seed: of noise, jitter and mixing; the global generators are never drawn from.
        capturable: keep threshold, weight and decay in tensors that are filled and never read, and
            leave out a step that is not finite without waiting for the device, for which the
            optimiser has to be a fused one; so that CapturedStep can record the step.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017; French et
    al., "Self-ensembling for visual domain adaptation", ICLR 2018.
    """

    def __init__(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        teacher: EMATeacher | None = None,
        decay: float = inputs.DECAY,
        consistency: Callable[..., Any] | None = None,
        supervised: Callable[..., Tensor] | None = None,
        ignore_index: int | None = None,
        weight: float | Schedule = 1.0,
        threshold: float | Schedule | None = None,
        style: str | Style | None = "fourier",
        noise: tuple[float, float] | None = (0.1, 0.2),
        passes: int = 1,
        jitter: Mapping[str, float] | None = None,
        class_mixing: float = 0.0,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        clip_norm: float | None = None,
        amp: torch.dtype | None = None,
        accumulate: int = 1,
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        inputs.check_networks(student, teacher, decay)
        self._untrained = inputs.untrained(student, optimizer)
        inputs.check_scheduler(scheduler, optimizer)
        inputs.check_losses(consistency=consistency, supervised=supervised)
        inputs.check_amp(amp, student)
        counts = {"accumulate": accumulate, "passes": passes}
        inputs.check_options(clip_norm, class_mixing, ignore_index, **counts)
        if capturable:
            skipping.check_capturable(optimizer, class_mixing)
        self.student, self.optimizer, self.scheduler = student, optimizer, scheduler
        self.teacher = EMATeacher(student, decay) if teacher is None else teacher
        self.consistency = ConsistencyLoss() if consistency is None else consistency
        self.supervised = CrossEntropy() if supervised is None else supervised
        self.weight = as_schedule(weight, "weight")
        self.threshold = None if threshold is None else as_schedule(threshold, "threshold")
        self.clip_norm, self.amp, self.accumulate = clip_norm, amp, accumulate
        self.steps = 0
        self.device = next(student.parameters()).device
        if ignore_index is None:
            ignore_index = ignored_label(self.supervised, mixes=class_mixing > 0)
        self.views = Views(
            style, noise, jitter, passes, class_mixing, ignore_index, seed, self.device
        )
        self.scaler = torch.amp.GradScaler(self.device.type) if amp == torch.float16 else None
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.capturable, self._tensors = capturable, OnDevice(self.device)
        self._now: Scheduled | None = None  # what the step that has been prepared goes by

    def step(
        self, source_images: Tensor, source_labels: Tensor, target_images: Tensor
    ) -> StepReport:
        """One update of student and teacher.

        Args:
            source_images: (N, C, *spatial), floating point; for style or jitter 2-D, in [0, 1],
                and for jitter with C = 3.
            source_labels: (N, *spatial), uint8 or int64, 255 (the loss's ignore_index) is ignored.
            target_images: (M, C, *spatial), unlabelled; M = N with class mixing.

        A loss or gradient that is not finite leaves student, buffers, optimiser state and teacher
        as they were and counts as skipped; step, schedules and random numbers move on. A step that
        raises before the optimiser's, for a label out of range for one, leaves these and the views'
        random numbers as they were; gradients are cleared.
        """
        self.check(source_images, source_labels, target_images)
        with self.views.undrawn_on_error():
            means = self.compute(self.prepare(), source_images, source_labels, target_images)
        return self.finish(means)

    def prepare(self) -> Scheduled:
        """Weight, threshold and decay of the next step, filled into their tensors if capturable."""
        threshold = None if self.threshold is None else self.threshold(self.steps)
        now = self._now = Scheduled(self.weight(self.steps), threshold, None)
        if not self.capturable:
            return now
        return Scheduled(
            self._tensors.fill("weight", now.weight),
            None if now.threshold is None else self._tensors.fill("threshold", now.threshold),
            self.teacher.put_decay()[0],
        )

    def compute(self, now: Scheduled, *batch: Tensor) -> Tensor:
        """The device's part of a step; the means of loss, its two terms and the statistics."""
        student, teacher = self._copy_buffers()
        try:
            means = self._losses(now, *batch) if len(batch) == 3 else self._supervised_loss(*batch)
        except BaseException:
            student.put_back()
            raise
        finally:
            teacher.put_back()  # its buffers follow by its own rule, not by its own passes
        self._update(means[0], student, now.decay)
        return means

    def _losses(
        self, now: Scheduled, source_images: Tensor, source_labels: Tensor, target_images: Tensor
    ) -> Tensor:
        """The views, both networks, the losses and the gradient."""
        views = self.views.of(source_images, source_labels, target_images, self.steps)
        follow_mode(self.teacher.module, self.student)
        self.teacher.training = self.student.training
        self._zero_grad()

        terms = []
        for source, labels, first, paste, *seconds in self._parts(
            views.styled, source_labels, views.student, views.pasted, *views.teacher
        ):
            # One forward over both domains lets batch statistics see both.
            logits = self._logits(self.student, torch.cat([source, first]), "student")
            source_logits, target_logits = logits.split([len(source), len(first)])
            teacher_logits = [self._logits(self.teacher, second, "teacher") for second in seconds]
            supervised = self._supervised(source_logits, labels)
            if paste is not None:
                known = self.views.known(labels, paste)
                supervised = supervised + self._supervised(target_logits, known)
            moving = {} if now.threshold is None else {"threshold": now.threshold}
            valid = None if paste is None else ~paste
            consistency, stats = self._consistency(
                target_logits, teacher_logits, first, valid=valid, **moving
            )
            loss = supervised + now.weight * consistency
            self._backward(loss / self.accumulate)
            terms.append(torch.stack([t.detach() for t in (loss, supervised, consistency, *stats)]))
        return torch.stack(terms).mean(0)

    def _supervised_loss(self, source_images: Tensor, source_labels: Tensor) -> Tensor:
        images = self.views.jittered(source_images)
        self._zero_grad()
        losses = []
        for source, labels in self._parts(images, source_labels):
            loss = self._supervised(self._logits(self.student, source.clone(), "student"), labels)
            self._backward(loss / self.accumulate)
            losses.append(loss.detach())
        loss = torch.stack(losses).mean()
        zero = torch.zeros_like(loss)
        return torch.stack([loss, loss, zero, zero, zero])

    def finish(self, means: Tensor) -> StepReport:
        """The host's part of a step that has been trained: count it and report it."""
        return self._report(means, self._now.weight)

    def supervised_step(self, source_images: Tensor, source_labels: Tensor) -> StepReport:
        """One update on labelled images alone, with jitter only: the source-only baseline."""
        self.check(source_images, source_labels)
        with self.views.undrawn_on_error():
            means = self.compute(self.prepare(), source_images, source_labels)
        return self._report(means, 0.0)

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write all that `resume` needs, and `extra`, whole or with CheckpointError not at all."""
        checkpoint.save(path, {**trainer_state.collect(self), "extra": dict(extra or {})})

    def resume(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Continue from a checkpoint of `save`, with the numbers of an uninterrupted run.

        Restores state dicts of losses, seed and global generators too, so that of several processes
        each needs its own file, and returns the `extra` of `save`; another kind of device draws
        other numbers. CheckpointError, before anything is changed, when the file does not fit.
        """
        state = checkpoint.load(path)
        trainer_state.restore(self, state, path)
        return state.get("extra", {})

    def _parts(self, *batches: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
        n = self.accumulate
        return zip(*([None] * n if b is None else b.chunk(n) for b in batches), strict=True)

    def _logits(self, network: nn.Module, images: Tensor, name: str) -> Tensor:
        return inputs.logits_from(network, images, name, self.amp)

    def _supervised(self, logits: Tensor, labels: Tensor) -> Tensor:
        return inputs.loss_of(self.supervised(logits, labels), "supervised")

    def _consistency(
        self, student: Tensor, passes: list[Tensor], images: Tensor, **call: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Consistency loss at the images' resolution, up-sampled inside the loss."""
        teacher = passes if len(passes) > 1 else passes[0]
        size = images.shape[2:]
        returned = self.consistency(student, teacher, size=size, return_stats=True, **call)
        return inputs.loss_and_stats_of(returned)

    def _backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _update(self, loss: Tensor, buffers: Buffers, decay: Tensor | None) -> None:
        """Step the optimiser and the teacher where loss and gradients are finite, else undo."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        finite = skipping.on_all_processes(loss.isfinite() & norm.isfinite(), self.student)
        skipping.step_where(finite, self.optimizer, buffers, wait=not self.capturable)
        self.teacher.update(student=self.student, finite=finite, decay=decay)
        if self.scaler is not None:
            self.scaler.update()
        self.skipped += ~finite

    def _copy_buffers(self) -> tuple[Buffers, Buffers]:
        return Buffers(self.student), Buffers(self.teacher)

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._untrained:  # they would gather their gradients for ever
            parameter.grad = None

    def _report(self, means: Tensor, weight: float) -> StepReport:
        threshold = self._now.threshold
        if threshold is None:
            threshold = getattr(self.consistency, "options", {}).get("threshold")
        self.steps += 1  # first: a scheduler that has come to its end raises
        if self.scheduler is not None:
            self.scheduler.step()
        skipped = self.skipped.clone()
        return StepReport(*means.unbind(), skipped, weight, threshold, self.steps - 1)

    def check(self, source: Tensor, labels: Tensor, target: Tensor | None = None) -> None:
        """TypeError or ValueError for a batch that does not fit, by the name of the argument."""
        inputs.check_own_weights("step", self.student)
        unit_range = self.steps == 0 and self.views.needs_unit_range(target is not None)
        mixes = self.views.class_mixing > 0
        inputs.check_batch(source, labels, target, self.device, self.accumulate, unit_range, mixes)
