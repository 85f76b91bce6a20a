"""Training batches that are a pure function of seed and step."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastmt.arguments import check_count, check_height_width
from fastmt.data.folders import DataError, check_crop, size_of


class SegmentationDataset(Protocol):
    """What `Batches` reads: uint8 images (3, H, W) with uint8 labels (H, W) or None."""

    classes: tuple[str, ...]
    palette: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]: ...

    def stem(self, index: int) -> str: ...


class Batches:
    """Random batches of a dataset; a run resumed at step t sees what it would have seen.

    Items follow one endless stream of permutations, a fresh one each epoch, cut into batches, so
    that no item is dropped and a batch may span two epochs.

    Args:
        dataset: a `SegmentationFolder`, `Scenes` or anything alike.
        batch_size: N, images in a batch; may exceed the dataset.
        crop: (h, w) of a random crop, the same of image and label; None keeps whole images,
            which then must be of one size.
        seed: not negative; with the step it determines a batch.
        flip: mirror half of the items left to right.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        batch_size: int,
        *,
        crop: tuple[int, int] | None = None,
        seed: int = 0,
        flip: bool = True,
    ) -> None:
        check_count("batch_size", batch_size)
        check_count("seed", seed, 0)
        if crop is not None:
            check_height_width("crop", crop, 1)
        if not len(dataset):
            raise DataError("dataset: got no items, expected at least one")
        self.dataset = dataset
        self.batch_size = batch_size
        self.crop = crop
        self.seed = seed
        self.flip = flip
        self._order = (-1, np.empty(0, np.int64))

    def indices(self, step: int) -> list[int]:
        """Dataset indices of the batch of a step."""
        check_count("step", step, 0)
        count = len(self.dataset)
        stream = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._permutation(at // count)[at % count]) for at in stream]

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Images float32 (N, 3, h, w) in [0, 1] and labels uint8 (N, h, w), None if unlabelled.

        Raises:
            DataError: an image smaller than the crop, or of another size than the first where
                there is no crop; whatever the dataset raises.
        """
        indices = self.indices(step)
        rng = np.random.default_rng((self.seed, 1, step))
        images, labels = [], []
        for index in indices:
            image, label = self._view(index, rng)
            if images and image.shape != images[0].shape:
                raise DataError(
                    f"{self.dataset.stem(index)}: image is {size_of(image)} but the batch is"
                    f" {size_of(images[0])}; pass crop=(h, w)"
                )
            images.append(image)
            labels.append(label)
        unlabelled = any(label is None for label in labels)
        stacked = torch.stack(images).to(torch.float32).div_(255)
        return stacked, None if unlabelled else torch.stack(labels)

    def _view(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        image, label = self.dataset[index]
        top, left, flip = rng.random(3)
        height, width = self.crop or image.shape[1:]
        check_crop(image, (height, width), self.dataset.stem(index))
        spare_h, spare_w = image.shape[1] - height, image.shape[2] - width
        y, x = int(top * (spare_h + 1)), int(left * (spare_w + 1))
        views = [t if t is None else t[..., y : y + height, x : x + width] for t in (image, label)]
        if self.flip and flip < 0.5:
            views = [t if t is None else t.flip(-1) for t in views]
        return views[0], views[1]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, 0, epoch))
            self._order = (epoch, rng.permutation(len(self.dataset)))
        return self._order[1]
