"""How the kernels share out their work on a GPU: block shapes against each other, each timed there.

python -m benchmarks.gpu_choice.run >> benchmarks/gpu_choice/results.txt

Times are of the GPU with the host ahead (benchmarks/gpu_times.py); nothing is checked here, which
tests/gpu and tests/triton_kernels do. A line: what, microseconds, GB/s of the bytes that have to
move. What is compiled most comes last: it takes longer than all else, and may be cut short.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import gpu_times, harness, machine, models, shapes
from fastmt import cpp_backend, ema_table, kernels
from fastmt.confidence import KINDS
from fastmt.consistency import LOSSES
from fastmt.kernels import dense_confidence, dense_consistency, dense_cross_entropy, launch
from fastmt.kernels.columns import Blocks, tiles_of

BATCH, SIDE = 8, 1024
ROUNDS = 7
LAUNCHES = 8  # of a call, at most


class Timer:
    """Prints the time of a call on the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.speed = device, gpu_times.cycles_per_second()

    def __call__(self, name: str, run: Callable[[], object], nbytes: int) -> None:
        try:
            seconds = self._seconds(run)
            told = f"{seconds * 1e6:9.1f} us {nbytes / seconds / 1e9:6.0f} GB/s"
        except Exception as error:  # blocks that need more than a multiprocessor has
            told = harness.told(error)
        print(f"{name:60} {told}", flush=True)

    def _seconds(self, run: Callable[[], object]) -> float:
        for _ in range(2):
            run()
        ahead = gpu_times.HostAhead(run, LAUNCHES, self.device, self.speed, 0.02)
        samples = [s for s in (ahead.sample() for _ in range(ROUNDS)) if s is not None]
        return statistics.median(samples) if samples else float("nan")


class Dense:
    """The three operations on logits at output resolution, of one shape and dtype."""

    def __init__(self, classes: int, side: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (BATCH, classes, side, side)
        self.student, self.teacher = (logits(shape, dtype, device) for _ in range(2))
        out = (BATCH, side, side)
        self.labels = torch.randint(classes, out, device=device).to(torch.uint8)
        self.threshold = torch.tensor([0.6], device=device)
        z, confidence = self.student, models.softmax_confidence([self.student])
        self.operations = {
            "consistency": (self.consistency, dense_consistency, 3 * z.nbytes),
            "confidence": (self.confidence, dense_confidence, confidence),
            "cross_entropy": (self.cross_entropy, dense_cross_entropy, 2 * z.nbytes),
        }

    def consistency(self) -> object:
        call = (self.threshold, None, None, [0] * 6, 1.0, None, False, True)
        return kernels.consistency_loss(self.student, [self.teacher], *call)

    def confidence(self) -> object:
        return kernels.softmax_confidence([self.student], 0, 1.0, None, False)

    def cross_entropy(self) -> object:
        call = (self.labels, None, None, [255, 1], 0.0, False, True)
        return kernels.cross_entropy(self.student, *call)


def logits(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return (3 * torch.randn(shape, device=device)).to(dtype)


@contextmanager
def blocks_of(module: ModuleType, blocks: Blocks):
    """A dense kernel takes these blocks, whatever it would choose."""
    before = module.blocks_for
    module.blocks_for = lambda *arguments: blocks
    launch.forget()
    try:
        yield
    finally:
        module.blocks_for = before
        launch.forget()


@contextmanager
def nothing_fetched(module: ModuleType):
    """A dense kernel asks for logits when it needs them, not before."""
    before, module.fetches = module.fetches, lambda *arguments: False
    launch.forget()
    try:
        yield
    finally:
        module.fetches = before
        launch.forget()


def dense(timer: Timer) -> None:
    """Pixels of a thread and warps of a block at 19 classes, each thread with whole columns."""
    for dtype in (torch.bfloat16, torch.float32):
        work = Dense(19, SIDE, dtype, timer.device)
        for name, (run, module, nbytes) in work.operations.items():
            timer(f"dense {name} {dtype} as chosen", run, nbytes)
            if hasattr(module, "fetches"):
                with nothing_fetched(module):
                    timer(f"dense {name} {dtype} not fetched", run, nbytes)
            for vector in (2, 4, 16 // dtype.itemsize):
                for warps in (1, 2, 4):
                    with blocks_of(module, Blocks(32 * warps * vector, warps, (16, 2, 1), vector)):
                        timer(f"dense {name} {dtype} {vector=} {warps=}", run, nbytes)


def many_classes(timer: Timer) -> None:
    for classes in (81, 150):
        work = Dense(classes, SIDE // 2, torch.bfloat16, timer.device)
        for name, (run, module, nbytes) in work.operations.items():
            timer(f"dense {name} {classes} classes as chosen", run, nbytes)
            shapes_of = [(32, 1, 4), (32, 1, 2), (16, 1, 4), (16, 1, 2), (64, 2, 4), (64, 1, 8)]
            for pixels, warps, vector in shapes_of:
                tiles = tiles_of(classes, max(32 * warps * vector // pixels, 1))
                with blocks_of(module, Blocks(pixels, warps, tiles, vector)):
                    told = f"{pixels=} {warps=} {vector=}"
                    timer(f"dense {name} {classes} classes {told}", run, nbytes)


def channels_last(timer: Timer) -> None:
    """How many classes of a pixel neighbouring threads read together."""
    for dtype in (torch.bfloat16, torch.float32):
        work = Dense(19, SIDE, dtype, timer.device)
        work.student, work.teacher = (
            z.to(memory_format=torch.channels_last) for z in (work.student, work.teacher)
        )
        for name, (run, module, nbytes) in work.operations.items():
            timer(f"channels-last {name} {dtype} as chosen", run, nbytes)
            for height in (1, 2, 4, 8):
                with blocks_of(module, Blocks(32, 1, (height,) * -(-19 // height), 1)):
                    timer(f"channels-last {name} {dtype} {height=}", run, nbytes)


def cells(timer: Timer) -> None:
    """Every loss and score up-sampled, CUDA C++ against Triton.

    In CUDA the blocks of 8 images walk several bands each, those of 2 images one: a quarter of the
    time would be the same work. Of 11 and 150 classes CUDA keeps a pixel in shared memory.
    """
    for low in (128, 256):
        _cells(timer, 19, BATCH, low, LOSSES)
    for classes, images in ((19, 2), (11, BATCH), (150, 2)):
        _cells(timer, classes, images, 128, LOSSES[:1])


def _cells(timer: Timer, classes: int, images: int, low: int, losses: Sequence[str]) -> None:
    out, device = [SIDE, SIDE], timer.device
    threshold = torch.tensor([0.6], device=device)
    labels = torch.randint(classes, (images, *out), device=device).to(torch.uint8)
    z, y = (logits((images, classes, low, low), torch.float32, device) for _ in range(2))
    for backend, operations in (("CUDA", torch.ops.fastmt), ("Triton", kernels)):

        def told(what: str, backend: str = backend) -> str:
            return f"{backend} {what}, {images}x{classes} from {low}"

        consistency = partial(operations.consistency_loss, z, [y], threshold, None, None)
        for loss in losses:
            call = ([LOSSES.index(loss), 0, 0, 0, 0, 0], 1.0, out, False, True)
            timer(told(loss), partial(consistency, *call), 3 * z.nbytes)
        call = (z, labels, None, None, [255, 1], 0.0, False, True)
        run, nbytes = partial(operations.cross_entropy, *call), 2 * z.nbytes + labels.nbytes
        timer(told("cross_entropy"), run, nbytes)
        for number, kind in enumerate(KINDS):
            run = partial(operations.softmax_confidence, [z], number, 1.0, out, False)
            timer(told(f"confidence {kind}"), run, models.softmax_confidence([z], out))


def averages(timer: Timer) -> None:
    lists = {
        "ViT-L": shapes.vit_large_parameters(),
        "SegFormer-B5": shapes.segformer_b5_parameters(),
        "ResNet-50": shapes.resnet50_parameters(),
        "1000 small": shapes.MANY_SMALL,
    }
    decay = torch.tensor([0.99], dtype=torch.float64, device=timer.device)
    for name, parameters in lists.items():
        for dtype in (torch.float32, torch.bfloat16):
            teacher = [torch.randn(shape, device=timer.device) for shape in parameters]
            student = [torch.randn(shape, device=timer.device).to(dtype) for shape in parameters]
            entries = list(map(ema_table.Entry, teacher, student))
            table = ema_table.Table(entries, timer.device)
            for backend, operations in (("CUDA", torch.ops.fastmt), ("Triton", kernels)):
                run = partial(operations.ema_update_, table.rows, table.starts, decay)
                nbytes = models.ema_update_(teacher, student)
                timer(f"{backend} average of {name}, {dtype} student", run, nbytes)


def main() -> None:
    if reason := cpp_backend.cuda_missing():
        raise SystemExit(f"benchmarks.gpu_choice: error: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    record = machine.record(device)
    print(record["device"], record["versions"], record["date"], record["commit"])
    timer = Timer(device)
    copy, copied = machine.copy(device, machine.COPY_BYTES)
    timer("copy", copy, copied)
    for part in (cells, averages, channels_last, dense, many_classes):
        part(timer)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
