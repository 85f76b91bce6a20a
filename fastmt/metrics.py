"""Segmentation scores from a confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmt import arguments


class ConfusionMatrix:
    """Counts of (truth, prediction) pairs, and the scores that follow from them.

    Updating never waits for a GPU: there, values out of range are counted apart and raise when
    a score is read. On CPU they raise at once. Reading a score synchronises.

    Args:
        num_classes: C.
        ignore_index: label of pixels that do not count, whatever was predicted there.
        device: where the counts live; by default that of the first update's labels.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        device: torch.device | str | None = None,
    ) -> None:
        arguments.check_count("num_classes", num_classes)
        arguments.check_index("ignore_index", ignore_index)
        self.num_classes, self.ignore_index = int(num_classes), int(ignore_index)
        self._device = None if device is None else torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        # C*C pairs, then pixels ignored, then pixels out of range
        self._counts = torch.zeros(
            self.num_classes**2 + 2, dtype=torch.int64, device=self._device or "cpu"
        )

    @torch.no_grad()
    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Count the pixels of two integer tensors of one shape and device, any shape.

        Raises:
            TypeError: a tensor is not integer.
            ValueError: shapes differ, or (on CPU) a value outside 0..C-1 and not ignored.
        """
        _check_integers(predicted, labels)
        self._prepare(labels.device)
        truth = labels.to(self._counts.device, torch.int64).flatten()
        guess = predicted.to(self._counts.device, torch.int64).flatten()
        c = self.num_classes
        ignored = truth == self.ignore_index
        wrong = ((truth < 0) | (truth >= c) | (guess < 0) | (guess >= c)) & ~ignored
        if truth.device.type == "cpu" and bool(wrong.any()):
            raise ValueError(self._out_of_range(truth[wrong], guess[wrong]))
        cell = (truth * c + guess).masked_fill(ignored, c * c).masked_fill(wrong, c * c + 1)
        if cell.is_cuda:
            # bincount reads the largest value back to size its output, which waits for the GPU
            self._counts.scatter_add_(0, cell, torch.ones_like(cell))
        else:
            self._counts += torch.bincount(cell, minlength=c * c + 2)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix of the same classes."""
        if other.num_classes != self.num_classes:
            raise ValueError(
                f"other: got a matrix of {other.num_classes} classes, expected {self.num_classes}"
            )
        self._prepare(other._counts.device)
        self._counts += other._counts.to(self._counts.device)

    @property
    def matrix(self) -> Tensor:
        """Pixel counts, int64 (C, C): row is the truth, column the prediction."""
        out_of_range = int(self._counts[-1])
        if out_of_range:
            raise ValueError(
                f"predicted, labels: got {out_of_range} pixels out of range, expected "
                f"0..{self.num_classes - 1} or ignore_index={self.ignore_index}"
            )
        return self._counts[:-2].view(self.num_classes, self.num_classes).clone()

    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 (C,); NaN where neither side has it."""
        matrix = self.matrix.double()
        hit = matrix.diagonal()
        return hit / (matrix.sum(0) + matrix.sum(1) - hit)

    def miou(self) -> float:
        """Mean IoU over the classes present in truth or prediction; NaN if nothing was counted."""
        return float(self.iou().nanmean())

    def pixel_accuracy(self) -> float:
        """Share of counted pixels predicted right; NaN if nothing was counted."""
        matrix = self.matrix.double()
        return float(matrix.diagonal().sum() / matrix.sum())

    def _prepare(self, device: torch.device) -> None:
        """Counts that can be added to, on the device of the first that are."""
        if self._device is None:
            self._device = device
            self._counts = self._counts.to(device)
        if self._counts.is_inference() and not torch.is_inference_mode_enabled():
            self._counts = self._counts.clone()  # autograd refuses to write into the former

    def _out_of_range(self, truth: Tensor, guess: Tensor) -> str:
        c = self.num_classes
        bad = truth[(truth < 0) | (truth >= c)]
        if bad.numel():
            return arguments.label_message(int(bad[0]), c, self.ignore_index)
        bad = guess[(guess < 0) | (guess >= c)]
        return f"predicted: got {int(bad[0])}, expected 0..{c - 1}"


def _check_integers(predicted: Tensor, labels: Tensor) -> None:
    for name, tensor in (("predicted", predicted), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        if tensor.is_floating_point() or tensor.is_complex():
            raise TypeError(f"{name}: got {tensor.dtype}, expected integers")
    if predicted.shape != labels.shape:
        raise ValueError(
            f"predicted: got shape {arguments.shape(predicted)}, expected "
            f"{arguments.shape(labels)} as labels"
        )
