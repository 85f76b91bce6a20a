"""The main job: a U-Net trained on labelled source images, adapted to unlabelled target images.

Two runs of the same steps, source batches and jitter are compared on held-out target images:
"source_only", supervised alone, and "adapted", the mean teacher. Of both, the moving average of the
student is evaluated.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmt import checkpoint
from fastmt.adapt_data import Domains
from fastmt.checkpoint import CheckpointError
from fastmt.consistency import ConsistencyLoss
from fastmt.data import Batches, SegmentationDataset
from fastmt.metrics import ConfusionMatrix
from fastmt.networks import UNet
from fastmt.schedules import SigmoidRampUp, UncertaintyThreshold
from fastmt.segment import segment
from fastmt.style import Style, fourier_style
from fastmt.trainer import MeanTeacher, StepReport

VARIANTS = ("source_only", "adapted")
CURVES_SUFFIX = ".fastmt"  # TensorBoard's files say nothing else of their origin
_PROGRESS_EVERY = 10  # steps; reading a report waits for a GPU


@dataclass(frozen=True)
class Settings:
    """What determines a run, beside its data and seed."""

    steps: int = 1500
    batch: int = 6  # images of each domain
    crop: tuple[int, int] = (144, 192)  # height, width
    lr: float = 2e-3  # peak of the one-cycle schedule
    weight: float = 10.0  # of the consistency loss after its ramp
    ramp: float = 0.6  # fraction of the run over which the weight rises
    decay: float = 0.99
    style: str = "fourier"
    beta: float = 0.06  # of the style "fourier": the frequencies it takes, relative to the side
    class_mixing: float = 1.0  # probability that a step pastes source classes into the target
    jitter: bool = True
    width: int = 32  # channels of the U-Net at a quarter of the resolution


SCENE_SETTINGS = Settings(
    steps=400, crop=(72, 96), decay=0.9, style="statistics", class_mixing=0.0, width=16
)


class Interrupted(Exception):
    """Training was interrupted after a whole step and saved; holds the checkpoint's path."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(f"interrupted after step {step}, saved in {path}")
        self.path, self.step = path, step


def build(settings: Settings, num_classes: int, seed: int, device: torch.device) -> MeanTeacher:
    """The trainer of both variants: U-Net, AdamW with one learning-rate cycle, mean teacher."""
    torch.manual_seed(seed)
    student = UNet(num_classes, width=settings.width)
    student = student.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.lr, fused=True)
    return MeanTeacher(
        student,
        optimizer,
        decay=settings.decay,
        consistency=ConsistencyLoss(loss="mse", confidence="entropy", strict=True),
        weight=SigmoidRampUp(settings.weight, round(settings.ramp * settings.steps)),
        threshold=UncertaintyThreshold(settings.steps),
        style=_style(settings),
        class_mixing=settings.class_mixing,
        jitter={} if settings.jitter else None,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.lr, total_steps=settings.steps
        ),
        seed=seed,
    )


def _style(settings: Settings) -> str | Style:
    fourier = settings.style == "fourier"
    return partial(fourier_style, beta=settings.beta) if fourier else settings.style


def train(
    variant: str,
    domains: Domains,
    settings: Settings,
    seed: int,
    out: Path,
    *,
    device: torch.device,
    checkpoint_every: int,
    resume: bool = False,
) -> UNet:
    """Train one variant and return the moving average of its student.

    Writes `out/seed<seed>/<variant>.pt` every `checkpoint_every` steps and at the end, curves
    under `out/tensorboard`. `resume` goes on from that checkpoint where it exists. Raises
    Interrupted after Ctrl-C (the step is finished and saved first), CheckpointError, DataError.
    """
    path = checkpoint_path(out, seed, variant)
    facts = {
        "variant": variant,
        "settings": asdict(settings),
        "classes": list(domains.source.classes),
        "images": [len(domains.source), len(domains.target)],
        "names of images": [_names(domains.source), _names(domains.target)],
    }
    resume = resume and path.exists()
    if resume:
        _check_facts(checkpoint.load(path).get("extra", {}), facts, path)
    trainer = build(settings, len(domains.source.classes), seed, device)
    if resume:
        trainer.resume(path)
    load = _loader(variant, domains, settings, seed, device)
    advance = trainer.step if variant == "adapted" else trainer.supervised_step
    images = settings.batch * (2 if variant == "adapted" else 1)
    remaining = range(trainer.steps, settings.steps)
    with _interrupts() as interrupted, _Curves(variant, seed, out, remaining, images) as curves:
        for step, batch in _ahead(load, remaining):
            report = advance(*batch)
            curves.add(report, trainer.optimizer.param_groups[0]["lr"])
            stop = interrupted()  # asked once: it may come true at any moment
            if stop or (step + 1) % checkpoint_every == 0 or step + 1 == settings.steps:
                trainer.save(path, facts)
            if stop:
                raise Interrupted(path, step + 1)
    if skipped := int(trainer.skipped):
        warnings.warn(
            f"{variant} (seed {seed}): {skipped} of {settings.steps} steps were left out, as their"
            " loss or gradient was not finite; where these are many, choose a smaller --lr",
            stacklevel=2,
        )
    return trainer.teacher.module


def checkpoint_path(out: Path, seed: int, variant: str) -> Path:
    return out / f"seed{seed}" / f"{variant}.pt"


def predict(network: UNet, image: Tensor, device: torch.device) -> Tensor:
    """Class ids int64 (H, W) of an image uint8 (3, H, W), as `fastmt segment` gives them."""
    return segment(network, image.to(device), divisor=network.stride).label


def evaluate(network: UNet, dataset: SegmentationDataset, device: torch.device) -> ConfusionMatrix:
    """Confusion matrix of the network's predictions on a labelled data set."""
    matrix = ConfusionMatrix(len(dataset.classes))
    for index in range(len(dataset)):
        image, label = dataset[index]
        matrix.update(predict(network, image, device), label.to(device))
    return matrix


def _check_facts(found: object, expected: dict[str, Any], path: Path) -> None:
    """CheckpointError naming the first option that differs from the checkpoint's."""
    flat = [_flat(facts) for facts in (found, expected)]
    if "names of images" not in flat[0]:  # an earlier fastmt did not note them
        flat[1].pop("names of images", None)
    for name, value in flat[1].items():
        if name != "settings" and flat[0].get(name) != value:
            raise CheckpointError(
                f"{path}: was written with {name} {flat[0].get(name)}, this run has {value}; resume"
                " with the same options, or choose another --out"
            )


def _names(dataset: SegmentationDataset) -> str:
    """A checksum of the names of all items; of their pixels it would depend on the decoder."""
    stems = "\n".join(dataset.stem(index) for index in range(len(dataset)))
    return f"{zlib.crc32(os.fsencode(stems)):08x}"


def _flat(facts: object) -> dict[str, Any]:
    """Facts and settings in one; none where a checkpoint of another origin has something else."""
    known = facts if isinstance(facts, dict) else {}
    settings = known.get("settings")
    return known | (settings if isinstance(settings, dict) else {})


def _loader(
    variant: str, domains: Domains, settings: Settings, seed: int, device: torch.device
) -> Callable[[int], list[Tensor]]:
    """The batch of a step: source images and labels, and for "adapted" target images."""
    source = Batches(domains.source, settings.batch, crop=settings.crop, seed=2 * seed)
    target = Batches(domains.target, settings.batch, crop=settings.crop, seed=2 * seed + 1)

    def load(step: int) -> list[Tensor]:
        images, labels = source.batch(step)
        batch = [images, labels] + ([target.batch(step)[0]] if variant == "adapted" else [])
        return [_on(tensor, device) for tensor in batch]

    return load


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.ndim == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.to(device)


def _ahead(load: Callable[[int], list[Tensor]], steps: range) -> Iterator[tuple[int, list[Tensor]]]:
    """Each step with its batch, which a thread loads while the step before is computed."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(load, steps[0]) if steps else None
        for step in steps:
            batch = upcoming.result()
            if step + 1 in steps:
                upcoming = pool.submit(load, step + 1)
            yield step, batch


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed since; a second one interrupts at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    former = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, former)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, former)


class _Curves:
    """Progress bar and TensorBoard scalars of a run, refreshed every few steps."""

    def __init__(self, variant: str, seed: int, out: Path, steps: range, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        folder = out / "tensorboard" / f"{variant}-seed{seed}"
        self.writer = SummaryWriter(
            str(folder), purge_step=steps.start, filename_suffix=CURVES_SUFFIX
        )
        total = max(steps.stop, steps.start)
        title = f"{variant} (seed {seed})"
        self.bar = tqdm(total=total, initial=steps.start, desc=title, unit="step", disable=None)
        self.images, self.first, self.begun = images, steps.start, time.perf_counter()

    def add(self, report: StepReport, lr: float) -> None:
        self.bar.update()
        if report.step % _PROGRESS_EVERY and report.step + 1 < self.bar.total:
            return
        values = report.as_dict()
        done = report.step + 1 - self.first
        values |= {"lr": lr, "images/s": self.images * done / (time.perf_counter() - self.begun)}
        for name, value in values.items():
            if name != "step":
                self.writer.add_scalar(name, value, report.step)
        shown = {"loss": "loss", "weight": "weight", "confident": "selected", "img/s": "images/s"}
        self.bar.set_postfix({title: f"{values[name]:.3g}" for title, name in shown.items()})

    def __enter__(self) -> _Curves:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.writer.close()
