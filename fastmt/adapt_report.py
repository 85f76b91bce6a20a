"""What an adaptation run leaves: the table, the figures as JSON, and a picture."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmt.adapt import VARIANTS, predict
from fastmt.adapt_out import SOFTWARE
from fastmt.data import VOID, SegmentationDataset
from fastmt.files import replacing
from fastmt.metrics import ConfusionMatrix
from fastmt.networks import UNet
from fastmt.pictures import VOID_COLOUR, colour, panel

_TITLES = {"source_only": "source only", "adapted": "adapted"}
_PICTURE_ROWS = 4

Scores = Mapping[str, Sequence[ConfusionMatrix]]  # variant -> one matrix a seed


def table(scores: Scores, classes: Sequence[str]) -> str:
    """Markdown: IoU in percent, mean and each class; over several seeds mean ± deviation."""
    ious = {variant: _percent(scores[variant]) for variant in VARIANTS}  # (seeds, 1 + C)
    lines = [
        f"| IoU, % | {' | '.join(_TITLES[variant] for variant in VARIANTS)} | change |",
        "|---|---:|---:|---:|",
    ]
    for row, name in enumerate(["**mean**", *map(_escaped, classes)]):
        before, after = (ious[variant][:, row] for variant in VARIANTS)
        change = round(_mean(after) - _mean(before), 1) + 0.0  # never "-0.0"
        sign = "-" if math.isnan(change) else f"{change:+.1f}"
        lines.append(f"| {name} | {_spread(before)} | {_spread(after)} | {sign} |")
    return "\n".join(lines)


def _escaped(name: str) -> str:
    """What stands in one cell: a backslash before the bar would else take its escape away."""
    return name.replace("\\", r"\\").replace("|", r"\|")


def results(scores: Scores, classes: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """The same figures for JSON: fractions, None for those of no pixel or of an absent class."""
    return {
        variant: {
            "miou": _or_none(matrix.miou() for matrix in scores[variant]),
            "pixel_accuracy": _or_none(matrix.pixel_accuracy() for matrix in scores[variant]),
            "iou": [
                dict(zip(classes, _or_none(matrix.iou().tolist()), strict=True))
                for matrix in scores[variant]
            ],
        }
        for variant in VARIANTS
    } | {"seeds": list(seeds)}


def versions() -> dict[str, str]:
    from fastmt import __version__

    return {"fastmt": __version__, "torch": torch.__version__, "python": platform.python_version()}


def write_text(path: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        # A path need not be UTF-8, and stands in the description of the data.
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")


def write_results(path: Path, figures: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(figures, indent=2) + "\n")


def picture(
    path: Path,
    networks: Mapping[str, UNet],
    dataset: SegmentationDataset,
    device: torch.device,
) -> None:
    """A few test images: image, truth, and what each network makes of it."""
    count = min(_PICTURE_ROWS, len(dataset))
    rows, names, colours = [], list(dataset.classes), dataset.palette
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
        image, label = dataset[index]
        maps = [label, *(predict(networks[v], image, device) for v in VARIANTS)]
        coloured = [colour(ids, dataset.palette) for ids in maps]
        rows.append([image.permute(1, 2, 0).contiguous(), *coloured])
        if "void" not in names and bool((label == VOID).any()):
            names, colours = [*names, "void"], np.vstack([colours, [VOID_COLOUR]])
    titles = ["image", "truth", *(_TITLES[variant] for variant in VARIANTS)]
    panel(rows, titles, path, legend=(names, colours), software=SOFTWARE)


def _percent(matrices: Sequence[ConfusionMatrix]) -> np.ndarray:
    """(seeds, 1 + C): the mean IoU, then that of each class."""
    return 100 * np.array([[matrix.miou(), *matrix.iou().tolist()] for matrix in matrices])


def _or_none(values: Iterable[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]  # JSON has no NaN


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan


def _spread(values: np.ndarray) -> str:
    present = values[~np.isnan(values)]
    if not present.size:
        return "-"
    mean = f"{present.mean():.1f}"
    return mean if present.size == 1 else f"{mean} ± {present.std(ddof=1):.1f}"
