"""Segmentation data in folders: `images/*` beside `labels/*.png` of the same stems."""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmt.arguments import as_index, first_line
from fastmt.pictures import default_palette, require_pillow

VOID = 255
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_LABEL_MODES = frozenset({"P", "L", "1"})
_WIDE_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
# Besides OSError, pillow's decoders let these through on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)


class DataError(ValueError):
    """A data set that cannot be used as it is; the message names the file and the remedy."""


class SegmentationFolder:
    """Images and labels read from folders; `ds[i]` is `(image, label)`.

    `root` is a folder with `images/` (jpg, jpeg, png, bmp, webp) and `labels/` (png of the same
    stems), a folder whose immediate subfolders are such folders (train, val, test: all but hidden
    ones are used, in sorted order), or a sequence of either. Images are uint8 (3, H, W), turned
    upright as their EXIF says; labels are uint8 (H, W) class ids from an 8-bit grey, palette or
    bilevel PNG, with 255 for void. Both are shared with the cache: copy before writing into them.

    Args:
        num_classes: C; by default the number of names, else the largest label id + 1 (reads all).
        classes: C different names; by default `classes.txt` in the root or its parent, one name a
            line, else "class 0", "class 1", ...
        labelled: False never opens `labels/` and gives None for every label, which a DataLoader
            batches with a collate_fn of its own only; `Batches` takes it.
        cache: keep decoded images and labels in memory.

    Raises:
        DataError: missing folder, no images, image without label or the reverse, names or
            num_classes that do not fit, at construction; unreadable file, sizes that differ, label
            id outside the classes, when an item is read.
        ImportError: pillow is not installed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        labelled: bool = True,
        cache: bool = True,
    ) -> None:
        require_pillow()
        roots = [root] if isinstance(root, (str, os.PathLike)) else list(root)
        if not roots:
            raise DataError("root: got an empty sequence, expected at least one folder")
        roots = [expanded(r) for r in roots]
        self.labelled = labelled
        self.cache = cache
        self._files = [f for r in roots for part in _parts(r) for f in _pairs(part, labelled)]
        self._images: dict[int, Tensor] = {}
        self._labels: dict[int, Tensor] = {}
        self.classes = self._class_names(roots, num_classes, classes)
        self.palette = default_palette(len(self.classes))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:
        index = range(len(self))[index]
        image = self._image(index)
        if not self.labelled:
            return image, None
        label = self._label(index)
        self._check_pair(index, image, label)
        return image, label

    def stem(self, index: int) -> str:
        """File name of an item without its suffix; two folders may repeat a stem."""
        return self._files[index][0].stem

    def path(self, index: int) -> Path:
        """Image file of an item."""
        return self._files[index][0]

    def check(self, *, crop: tuple[int, int] | None = None) -> None:
        """Read every item once; raises the DataError of the first that cannot be used.

        crop: (h, w) that every image must cover.
        """
        for index in range(len(self)):
            image, _ = self[index]
            if crop is not None:
                check_crop(image, crop, str(self.path(index)))

    def _image(self, index: int) -> Tensor:
        return self._read(self._images, index, read_image, self._files[index][0])

    def _label(self, index: int) -> Tensor:
        return self._read(self._labels, index, _read_label, self._files[index][1])

    def _read(self, held: dict[int, Tensor], index: int, reader, path: Path) -> Tensor:
        if index in held:
            return held[index]
        tensor = reader(path)
        if self.cache:
            held[index] = tensor
        return tensor

    def _check_pair(self, index: int, image: Tensor, label: Tensor) -> None:
        path = self._files[index][1]
        if image.shape[1:] != label.shape:
            raise DataError(
                f"{path}: label is {size_of(label)} but its image is {size_of(image)};"
                " export both at one size"
            )
        largest = _largest_id(label)
        if largest >= len(self.classes):
            raise DataError(
                f"{path}: label id {largest} is outside 0..{len(self.classes) - 1} for"
                f" {len(self.classes)} classes; raise num_classes, or mark the pixels {VOID} (void)"
            )

    def _class_names(
        self, roots: list[Path], num_classes: int | None, classes: Sequence[str] | None
    ) -> tuple[str, ...]:
        if isinstance(classes, str):
            raise TypeError(f"classes: got {classes!r}, expected a sequence of names")
        if num_classes is not None and not 1 <= as_index("num_classes", num_classes) <= VOID:
            raise DataError(f"num_classes: got {num_classes}, expected 1 to {VOID}")
        source, names = ("classes", classes) if classes is not None else names_file(roots)
        if names is None:
            count = self._infer_num_classes() if num_classes is None else num_classes
            names = [f"class {c}" for c in range(count)]
        elif not names:
            raise DataError("classes: got no name, expected one for each class")
        elif num_classes is not None and num_classes != len(names):
            raise DataError(
                f"num_classes: got {num_classes}, expected {len(names)}, the number of names in"
                f" {source}"
            )
        if len(names) > VOID:
            name = source or "num_classes"
            raise DataError(f"{name}: got {len(names)} classes, expected at most {VOID}")
        if odd := [n for n in map(str, names) if n.isspace() or n.splitlines() != [n]]:
            raise DataError(f"{source}: got {odd[0]!r}, expected a name of one line for each class")
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(
                f"{source}: got {repeated[0]!r} for {names.count(repeated[0])} classes, expected a"
                " name for each"
            )
        return tuple(names)

    def _infer_num_classes(self) -> int:
        if not self.labelled:
            return 0
        count = 1 + max(_largest_id(self._label(i)) for i in range(len(self)))
        if count == 0:
            raise DataError(
                f"{self._files[0][1].parent}: every label pixel is void ({VOID});"
                " pass num_classes or label some pixels"
            )
        return count


def _parts(root: Path) -> list[Path]:
    """Folders below `root` that hold `images/`: itself, else its immediate subfolders."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; check the path")
    if (root / "images").is_dir():
        return [root]
    visible = (p for p in root.iterdir() if not p.name.startswith("."))
    parts = sorted(p for p in visible if (p / "images").is_dir())
    if not parts:
        raise DataError(
            f"{root}: no images/ folder in it or in its subfolders; lay it out as images/*.jpg"
            " beside labels/*.png"
        )
    return parts


def _pairs(part: Path, labelled: bool) -> list[tuple[Path, Path]]:
    """(image, label) paths of one folder in stem order; label paths are unused if unlabelled."""
    images = _by_stem(part / "images", IMAGE_SUFFIXES)
    if not images:
        wanted = ", ".join(sorted(s[1:] for s in IMAGE_SUFFIXES))
        raise DataError(f"{part / 'images'}: no image in it; put {wanted} files there")
    folder = part / "labels"
    if not labelled:
        return [(path, folder / f"{stem}.png") for stem, path in sorted(images.items())]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; add the labels or pass labelled=False")
    labels = _by_stem(folder, frozenset({".png"}))
    for stem, path in sorted(images.items()):
        if stem not in labels:
            raise DataError(
                f"{path}: no label {folder / f'{stem}.png'}; add it or pass labelled=False"
            )
    for stem, path in sorted(labels.items()):
        if stem not in images:
            raise DataError(f"{path}: no image of this stem in {part / 'images'}; add or remove")
    return [(path, labels[stem]) for stem, path in sorted(images.items())]


def _by_stem(folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        if path.stem in found:
            raise DataError(f"{path}: same stem as {found[path.stem].name}; keep one of the two")
        found[path.stem] = path
    return found


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path from the home folder where it begins with ~ and not with a name like ~old."""
    return Path(os.path.expanduser(path))


def names_file(roots: list[Path]) -> tuple[str, list[str] | None]:
    """The classes.txt that belongs to these folders, and its names; None without one."""
    candidates = [d / "classes.txt" for r in roots for d in (r, r.resolve().parent)]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        return "", None
    try:
        names = [n.strip() for n in path.read_text(encoding="utf-8-sig").strip().splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    if not names or not all(names):
        raise DataError(f"{path}: empty file or empty line; write one class name a line")
    return str(path), names


def read_image(path: Path) -> Tensor:
    """An image as uint8 (3, H, W), upright; DataError naming a file that is no 8-bit image."""
    picture, bits = _decode(path)
    if picture.mode in _WIDE_MODES or bits == 16:
        raise DataError(f"{path}: {picture.mode} image with more than 8 bits; save it as 8-bit RGB")
    return torch.from_numpy(np.array(picture.convert("RGB")).transpose(2, 0, 1).copy())


def _read_label(path: Path) -> Tensor:
    picture, bits = _decode(path)
    if bits is None:
        raise DataError(f"{path}: is no PNG file; save class ids as 8-bit PNG, which loses nothing")
    if picture.mode in _WIDE_MODES:
        raise DataError(f"{path}: 16-bit label ({picture.mode}); save class ids as 8-bit PNG")
    if picture.mode not in _LABEL_MODES:
        raise DataError(
            f"{path}: {picture.mode} label; save class ids, not colours, as 8-bit grey or palette"
        )
    ids = np.array(picture).astype(np.uint8)
    if picture.mode == "L":
        ids //= {2: 85, 4: 17}.get(bits, 1)  # pillow spreads few grey values over 0..255
    return torch.from_numpy(ids)


def _decode(path: Path):
    """A picture, upright, and of a PNG the bits a channel, which pillow's mode does not tell."""
    from PIL import Image, ImageOps

    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe may wait for ever
        kind = "a folder" if os.path.isdir(path) else "a pipe or a device"
        raise DataError(f"{path}: is {kind}, expected a picture; move it elsewhere or rename it")
    try:
        with Image.open(path) as picture, open(path, "rb") as file:
            picture.load()
            bits = file.read(25)[24] if picture.format == "PNG" else None
            return ImageOps.exif_transpose(picture), bits
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        reason = first_line(error)
        raise DataError(f"{path}: cannot be decoded ({reason}); export it again") from error


def _largest_id(label: Tensor) -> int:
    """Largest class id in a label, -1 if all of it is void."""
    ids = label[label != VOID]
    return int(ids.max()) if ids.numel() else -1


def check_crop(image: Tensor, crop: tuple[int, int], name: str) -> None:
    """DataError naming an image (3, H, W) that is smaller than a crop (h, w)."""
    if image.shape[1] < crop[0] or image.shape[2] < crop[1]:
        raise DataError(
            f"{name}: image is {size_of(image)}, smaller than the crop {crop[1]}x{crop[0]};"
            " choose a smaller crop or enlarge the image"
        )


def size_of(tensor: Tensor) -> str:
    """Width x height, as people write it."""
    return f"{tensor.shape[-1]}x{tensor.shape[-2]}"
