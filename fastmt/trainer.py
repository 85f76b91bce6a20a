"""The trainer: one step of mean-teacher training, told in the order of the method."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmt import checkpoint, inputs, skipping, trainer_state
from fastmt.consistency import ConsistencyLoss
from fastmt.cross_entropy import CrossEntropy
from fastmt.perturb import class_mix, gaussian_noise, mix, photometric_jitter
from fastmt.schedules import OnDevice, Schedule, as_schedule
from fastmt.steps import Scheduled, StepReport
from fastmt.style import Style, as_style
from fastmt.teacher import EMATeacher

__all__ = ["MeanTeacher", "StepReport"]

_MAX_CLASSES = 4096  # bounds the table of present classes; the loss knows the real number


class MeanTeacher:
    """Mean-teacher training of a student on labelled source and unlabelled target images.

    Args:
        student: any module that maps images to logits (N, C, *spatial) of any resolution: a
            tensor, a dict with "out", or an object with `.logits`. Its mode (train, eval) stays.
        optimizer: of the student's parameters. On a GPU a fused one never waits for the device;
            any other waits once a step, to learn whether the loss and gradients are finite.
        teacher: EMATeacher; by default `EMATeacher(student, decay)`. In a step it has the mode of
            the student: an average of fast-moving weights does not fit the newest running
            statistics, so in training it normalises by the batch. Call its eval() to evaluate.
        consistency: `(student, teacher, valid=, size=, return_stats=True[, threshold=])`; by
            default ConsistencyLoss().
        supervised: `(logits, labels)`; by default CrossEntropy().
        weight: of the consistency loss, a number or a schedule.
        threshold: a number or a schedule; None leaves it to `consistency`.
        style: "fourier", "statistics", "none", None or a callable `(source, target) -> images`.
        noise: (sigma, clip) of the Gaussian noise of both views, None for none.
        jitter: options of photometric_jitter for the styled source and the student's view.
        class_mixing: probability of a step that pastes half of each source image's classes onto
            the student's view: there the source's labels teach, elsewhere the teacher does.
        scheduler: of the learning rate; stepped once a step.
        clip_norm: largest norm of the gradient.
        amp: None, torch.bfloat16 or torch.float16 (with loss scaling).
        accumulate: equal parts in which a batch passes through the networks to save memory.
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
        decay: float = 0.99,
        consistency: Callable[..., Any] | None = None,
        supervised: Callable[..., Tensor] | None = None,
        weight: float | Schedule = 1.0,
        threshold: float | Schedule | None = None,
        style: str | Style | None = "fourier",
        noise: tuple[float, float] | None = (0.1, 0.2),
        jitter: Mapping[str, float] | None = None,
        class_mixing: float = 0.0,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        clip_norm: float | None = None,
        amp: torch.dtype | None = None,
        accumulate: int = 1,
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        inputs.check_options(amp, class_mixing, accumulate)
        if capturable:
            skipping.check_capturable(optimizer, class_mixing)
        self.student, self.optimizer, self.scheduler = student, optimizer, scheduler
        self.teacher = EMATeacher(student, decay) if teacher is None else teacher
        self.consistency = ConsistencyLoss() if consistency is None else consistency
        self.supervised = CrossEntropy() if supervised is None else supervised
        self.weight = as_schedule(weight)
        self.threshold = None if threshold is None else as_schedule(threshold)
        self.style = as_style(style)
        self.noise = (0.0, 0.0) if noise is None else noise
        self.jitter = None if jitter is None else dict(jitter)
        self.class_mixing, self.clip_norm, self.amp = class_mixing, clip_norm, amp
        self.accumulate, self.seed = accumulate, seed
        self.ignore_index = getattr(self.supervised, "options", {}).get("ignore_index", 255)
        self.unit_range = self.jitter is not None or style in ("fourier", "statistics")
        self.steps = 0
        self.device = next(student.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.scaler = torch.amp.GradScaler(self.device.type) if amp == torch.float16 else None
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.capturable, self._tensors = capturable, OnDevice(self.device)

    def step(
        self, source_images: Tensor, source_labels: Tensor, target_images: Tensor
    ) -> StepReport:
        """One update of student and teacher.

        Args:
            source_images: (N, 3, H, W), floating point; in [0, 1] where style or jitter is used.
            source_labels: (N, H, W), uint8 or int64, 255 (the loss's ignore_index) is ignored.
            target_images: (M, 3, H, W), unlabelled; M = N with class mixing.

        A loss or gradient that is not finite leaves student, buffers, optimiser state and teacher
        as they were and counts as skipped; step, schedules and random numbers move on.
        """
        self.check(source_images, source_labels, target_images)
        means = self.compute(self.prepare(), source_images, source_labels, target_images)
        return self.finish(means)

    def prepare(self) -> Scheduled:
        """Weight, threshold and decay of the next step, filled into their tensors if capturable."""
        now = self._numbers()
        if not self.capturable:
            return now
        return Scheduled(
            self._tensors.fill("weight", now.weight),
            None if now.threshold is None else self._tensors.fill("threshold", now.threshold),
            self.teacher.put_decay()[0],
        )

    def compute(self, now: Scheduled, *batch: Tensor) -> Tensor:
        """The device's part of a step; the means of loss, its two terms and the statistics."""
        source_images, source_labels, target_images = batch
        styled = self._jittered(self.style(source_images, target_images))
        view_1 = self._noisy(self._jittered(target_images))
        view_2 = self._noisy(target_images)
        view_1, pasted = self._class_mixed(styled, source_labels, view_1)
        buffers = self._copy_buffers()
        self.teacher.train(self.student.training)
        self.optimizer.zero_grad(set_to_none=True)

        terms = []
        for source, labels, first, second, paste in self._parts(
            styled, source_labels, view_1, view_2, pasted
        ):
            # One forward over both domains lets batch statistics see both.
            logits = self._logits(self.student, torch.cat([source, first]), "student")
            source_logits, target_logits = logits.split([len(source), len(first)])
            with torch.inference_mode():
                teacher_logits = self._logits(self.teacher, second, "teacher")
            supervised = self.supervised(source_logits, labels)
            if paste is not None:
                known = labels.masked_fill(~paste, self.ignore_index)
                supervised = supervised + self.supervised(target_logits, known)
            moving = {} if now.threshold is None else {"threshold": now.threshold}
            valid = None if paste is None else ~paste
            consistency, stats = self._consistency(
                target_logits, teacher_logits, first, valid=valid, **moving
            )
            loss = supervised + now.weight * consistency
            self._backward(loss / self.accumulate)
            terms.append(torch.stack([t.detach() for t in (loss, supervised, consistency, *stats)]))

        means = torch.stack(terms).mean(0)
        self._update(means[0], buffers, now.decay)
        return means

    def finish(self, means: Tensor) -> StepReport:
        """The host's part of a step that has been trained: count it and report it."""
        return self._report(means, *self._numbers()[:2])

    def supervised_step(self, source_images: Tensor, source_labels: Tensor) -> StepReport:
        """One update on labelled images alone, with jitter only: the source-only baseline."""
        self.check(source_images, source_labels)
        images = self._jittered(source_images)
        buffers = self._copy_buffers()
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for source, labels in self._parts(images, source_labels):
            loss = self.supervised(self._logits(self.student, source, "student"), labels)
            self._backward(loss / self.accumulate)
            losses.append(loss.detach())
        loss = torch.stack(losses).mean()
        self._update(loss, buffers, self.prepare().decay)
        zero = torch.zeros_like(loss)
        means = torch.stack([loss, loss, zero, zero, zero])
        return self._report(means, 0.0, self._numbers().threshold)

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write all that `resume` needs, and `extra`, whole or with CheckpointError not at all."""
        checkpoint.save(path, {**trainer_state.collect(self), "extra": dict(extra or {})})

    def resume(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Continue from a checkpoint of `save`, with the numbers of an uninterrupted run.

        Restores the global generators too, for dropout, and returns the `extra` of `save`. Raises
        CheckpointError, before anything is changed, when the file does not fit.
        """
        state = checkpoint.load(path)
        trainer_state.restore(self, state, path)
        return state.get("extra", {})

    def _jittered(self, images: Tensor) -> Tensor:
        if self.jitter is None:
            return images
        return photometric_jitter(images, generator=self.generator, **self.jitter)

    def _noisy(self, images: Tensor) -> Tensor:
        sigma, clip = self.noise
        return gaussian_noise(images, sigma=sigma, clip=clip, generator=self.generator)

    def _class_mixed(
        self, source: Tensor, labels: Tensor, view: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The student's view with source classes pasted in, and where, bool (N, H, W)."""
        # Drawn on the host from seed and step: a draw on the device would have to be waited for.
        if random.Random(f"{self.seed} {self.steps}").random() >= self.class_mixing:
            return view, None
        pasted = class_mix(
            labels, _MAX_CLASSES, ignore_index=self.ignore_index, generator=self.generator
        )
        return mix(pasted, source, view), pasted

    def _parts(self, *batches: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
        n = self.accumulate
        return zip(*([None] * n if b is None else b.chunk(n) for b in batches), strict=True)

    def _logits(self, network: nn.Module, images: Tensor, name: str) -> Tensor:
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            output = network(images)
        return inputs.logits_of(output, images, name)

    def _consistency(
        self, student: Tensor, teacher: Tensor, images: Tensor, **call: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Consistency loss at the images' resolution, up-sampled inside the loss."""
        return self.consistency(student, teacher, size=images.shape[2:], return_stats=True, **call)

    def _backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _update(
        self, loss: Tensor, buffers: list[tuple[Tensor, Tensor]], decay: Tensor | None
    ) -> None:
        """Step the optimiser and the teacher where loss and gradients are finite, else undo."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        finite = loss.isfinite() & norm.isfinite()
        skipping.step_where(finite, self.optimizer, wait=not self.capturable)
        for buffer, old in buffers:
            buffer.copy_(torch.where(finite, buffer, old))
        self.teacher.update(finite=finite, decay=decay)
        if self.scaler is not None:
            self.scaler.update()
        self.skipped += ~finite

    def _copy_buffers(self) -> list[tuple[Tensor, Tensor]]:
        modules = (self.student, self.teacher)
        return [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]

    def _numbers(self) -> Scheduled:
        threshold = None if self.threshold is None else self.threshold(self.steps)
        return Scheduled(self.weight(self.steps), threshold, None)

    def _report(self, means: Tensor, weight: float, threshold: float | Tensor | None) -> StepReport:
        if threshold is None:
            threshold = getattr(self.consistency, "options", {}).get("threshold")
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1
        skipped = self.skipped.clone()
        return StepReport(*means.unbind(), skipped, weight, threshold, self.steps - 1)

    def check(self, source: Tensor, labels: Tensor, target: Tensor | None = None) -> None:
        """TypeError or ValueError for a batch that does not fit, by the name of the argument."""
        named = {"source_images": source} | ({} if target is None else {"target_images": target})
        for name, images in named.items():
            inputs.check_images(name, images, self.device, source, self.accumulate)
            if self.unit_range and self.steps == 0:
                inputs.check_range(name, images)
        inputs.check_labels(labels, source)
        if target is not None and self.class_mixing and len(target) != len(source):
            raise ValueError(
                f"target_images: got {len(target)} images, expected {len(source)} like "
                "source_images, as class_mixing pastes one onto another"
            )
