"""Data for segmentation: labelled folders, rendered street scenes, reproducible batches.

A dataset is anything with `len(ds)`, `ds[i] -> (image, label)`, `ds.stem(i)`, `ds.classes` and
`ds.palette`; images are uint8 (3, H, W), labels uint8 (H, W) or None, and label 255 is void.
"""

from fastmt.data.batches import Batches, SegmentationDataset
from fastmt.data.folders import (
    IMAGE_SUFFIXES,
    VOID,
    DataError,
    SegmentationFolder,
    read_image,
)
from fastmt.data.scenes import Scenes, render_scene

__all__ = [
    "IMAGE_SUFFIXES",
    "VOID",
    "Batches",
    "DataError",
    "Scenes",
    "SegmentationDataset",
    "SegmentationFolder",
    "read_image",
    "render_scene",
]
