"""The data of an adaptation: source, target, and held-out target images to test on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmt.data import DataError, Scenes, SegmentationDataset, SegmentationFolder
from fastmt.data.folders import expanded, names_file

_CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Domains:
    """Labelled source, unlabelled target, and labelled target images that are never trained on."""

    source: SegmentationDataset
    target: SegmentationDataset
    test: SegmentationDataset
    description: str


def scene_domains(size: tuple[int, int]) -> Domains:
    """The embedded data: rendered street scenes by day (source) and on a rainy dusk (target)."""
    return Domains(
        source=Scenes("day", 96, seed=0, size=size),
        target=Scenes("dusk", 96, seed=1, size=size, labelled=False),
        test=Scenes("dusk", 40, seed=2, size=size),
        description="synthetic street scenes rendered by fastmt, day -> rainy dusk; no photographs,"
        " so the figures say little about real streets",
    )


def folder_domains(
    source: Sequence[str],
    target: Sequence[str],
    test: Sequence[str],
    *,
    crop: tuple[int, int],
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
) -> Domains:
    """Data from folders as SegmentationFolder reads them; labels of the target are never opened.

    Every file is read once up front, and all are kept where they take less than 4 GiB, by the size
    of each folder's first image. Raises DataError naming the file and the remedy, also for a
    training image smaller than `crop` (height, width), for a test image that is a training image,
    and for a classes.txt of the test images that is not that of the source, unless `classes` are
    given.
    """
    if classes is None:
        _check_names(source, test)
    labelled = SegmentationFolder(source, num_classes=num_classes, classes=classes)
    target_folder = SegmentationFolder(target, labelled=False)
    test_folder = SegmentationFolder(test, classes=labelled.classes)
    folders = (labelled, target_folder, test_folder)
    cache = sum(map(_bytes, folders)) < _CACHE_BYTES
    for folder in folders:
        folder.cache = cache
        folder.check(crop=None if folder is test_folder else crop)
    _check_held_out(test_folder, source=labelled, target=target_folder)
    names = (", ".join(map(str, folders)) for folders in (source, target, test))
    return Domains(labelled, target_folder, test_folder, "{} -> {}, tested on {}".format(*names))


def _check_names(source: Sequence[str], test: Sequence[str]) -> None:
    """A class id has to mean the same in both, where both say what it means."""
    found = [names_file(list(map(expanded, folders))) for folders in (source, test)]
    (trained, expected), (tested, names) = found
    if expected is not None and names is not None and names != expected:
        raise DataError(
            f"{tested}: other classes than in {trained}; number the labels of both alike, or give"
            " the names for both as classes"
        )


def _check_held_out(test: SegmentationFolder, **trained: SegmentationFolder) -> None:
    for name, folder in trained.items():
        seen = {folder.path(i).resolve() for i in range(len(folder))}
        for path in map(test.path, range(len(test))):
            if path.resolve() in seen:
                raise DataError(
                    f"{path}: is in the {name} and in the test folder; hold the test images out of"
                    f" the {name}"
                )


def _bytes(folder: SegmentationFolder) -> int:
    """What a folder's images and labels take, were all of the first one's size."""
    image, label = folder[0]
    return len(folder) * (image.numel() + (0 if label is None else label.numel()))
