"""Label maps as coloured pictures, and panels that compare them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastmt.arguments import check_between, check_index
from fastmt.files import replacing

VOID_COLOUR = (24, 24, 28)
MAX_CLASSES = 255
MIN_PANEL_WIDTH = 320
_GAP = 6
_TEXT_SIZE = 14

# sky, building, road, pavement, tree, pole, car, person, sign, fence, rider
_STREET_COLOURS = (
    (122, 182, 224),
    (146, 110, 94),
    (116, 92, 146),
    (228, 148, 196),
    (96, 150, 62),
    (232, 224, 150),
    (36, 66, 176),
    (222, 46, 62),
    (248, 188, 28),
    (66, 160, 152),
    (140, 20, 40),
)

# of a score, from 0 to 1
_HEAT = ((28, 16, 68), (114, 31, 129), (200, 50, 90), (243, 120, 60), (252, 244, 180))


def require_pillow() -> None:
    """Raise an ImportError that says how to install pillow where it is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        message = 'reading and writing images needs pillow: pip install "fastmt[train]"'
        raise ImportError(message) from error


def default_palette(num_classes: int) -> np.ndarray:
    """Distinct colours, uint8 (num_classes, 3); the same colour for a class at any num_classes.

    The first eleven suit street scenes; each further one is the colour of a coarse RGB grid
    that lies farthest from all before it. At most 255 classes.
    """
    check_index("num_classes", num_classes)
    check_between("num_classes", num_classes, 0, MAX_CLASSES)
    colours = np.array(_STREET_COLOURS, np.float64)[:num_classes]
    steps = np.linspace(40, 250, 8).round()
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    taken = np.vstack([colours, [VOID_COLOUR]])
    distance = _colour_distance(grid[:, None], taken[None]).min(axis=1)
    while len(colours) < num_classes:
        best = grid[distance.argmax()]
        colours = np.vstack([colours, best])
        distance = np.minimum(distance, _colour_distance(grid, best))
    return colours.astype(np.uint8)


def colour(label: np.ndarray | Tensor, palette: np.ndarray) -> np.ndarray:
    """Paint a label map.

    Args:
        label: integer (H, W), ids below len(palette), or 255 for void (drawn near black).
        palette: uint8 (C, 3).

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: label is not 2-D, or an id has no colour.
    """
    ids = _array(label)
    if ids.ndim != 2:
        raise ValueError(f"label: got shape {tuple(ids.shape)}, expected (H, W)")
    wrong = ids[((ids < 0) | (ids >= len(palette))) & (ids != 255)]
    if wrong.size:
        expected = f"expected 0..{len(palette) - 1}, the colours of palette, or 255"
        raise ValueError(f"label: got id {wrong[0]}, {expected}")
    table = np.full((256, 3), VOID_COLOUR, np.uint8)
    table[: len(palette)] = palette
    return table[ids]


def heat(score: np.ndarray | Tensor) -> np.ndarray:
    """Paint scores in [0, 1], (H, W), from dark violet (0) over red to pale yellow (1).

    Returns uint8 (H, W, 3); a NaN is drawn near black, as void is.
    """
    values = _array(score)
    positions = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, positions, channel) for channel in np.array(_HEAT).T]
    painted = np.stack(channels, axis=-1)
    painted[np.isnan(values)] = VOID_COLOUR
    return painted.round().astype(np.uint8)


def blend(image: np.ndarray | Tensor, coloured: np.ndarray, share: float = 0.55) -> np.ndarray:
    """An image uint8 (H, W, 3) seen through a coloured label map of the same shape."""
    mixed = (1 - share) * _array(image).astype(np.float32) + share * coloured.astype(np.float32)
    return mixed.round().astype(np.uint8)


def write_png(
    pixels: np.ndarray | Tensor, path: str | os.PathLike[str], *, software: str | None = None
) -> None:
    """Write uint8 (H, W) or (H, W, 3) as a PNG that appears whole or not at all.

    software: noted in the file, where `software_of` finds it.
    """
    require_pillow()
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    if software is not None:
        notes.add_text("Software", software)
    with replacing(path) as temporary:
        Image.fromarray(_array(pixels)).save(temporary, format="PNG", pnginfo=notes)


def software_of(path: str | os.PathLike[str]) -> str | None:
    """What wrote a PNG, by its own note; None without a note, and for what is no picture."""
    from PIL import Image

    if not os.path.isfile(path):
        return None
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software")
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError):
        return None  # damaged, another kind of file, or too large to be a result


def panel(
    rows: Sequence[Sequence[np.ndarray | Tensor]],
    titles: Sequence[str],
    path: str | os.PathLike[str],
    *,
    legend: tuple[Sequence[str], np.ndarray] | None = None,
    software: str | None = None,
) -> None:
    """Write one PNG with rows of images under column titles.

    Args:
        rows: each a sequence of uint8 (H, W, 3) images, one for each title. Small images are
            enlarged by one integer factor until the panel is at least 320 pixels wide.
        titles: one a column.
        path: file to write; it appears whole or not at all.
        legend: class names and their uint8 (C, 3) palette, drawn below the rows.
        software: noted in the file, as in `write_png`.

    Raises:
        ValueError: no rows, or a row that does not fit the titles, or an image of another kind.
    """
    require_pillow()
    from PIL import Image, ImageDraw

    images = _check_rows(rows, titles)
    font = _font()
    factor, cell_w, cell_h = _cell_size(images, titles, font)
    width = _GAP + len(titles) * (cell_w + _GAP)
    line = _TEXT_SIZE + _GAP
    body = _GAP + line + len(images) * (cell_h + _GAP)
    swatches = _legend_layout(legend, width, font)
    height = body + (swatches[-1][1] + line if swatches else 0)
    sheet = Image.new("RGB", (width, height), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    lefts = [_GAP + c * (cell_w + _GAP) for c in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left + cell_w / 2, _GAP), title, (20, 20, 20), font, anchor="mt")
    for r, row in enumerate(images):
        for left, image in zip(lefts, row, strict=True):
            large = image.repeat(factor, axis=0).repeat(factor, axis=1)
            corner = (left + (cell_w - large.shape[1]) // 2, _GAP + line + r * (cell_h + _GAP))
            sheet.paste(Image.fromarray(large), corner)
    for left, top, name, paint in swatches:
        box = (left, body + top, left + _TEXT_SIZE, body + top + _TEXT_SIZE)
        draw.rectangle(box, paint, (60, 60, 60))
        middle = body + top + _TEXT_SIZE / 2
        draw.text((left + line, middle), name, (20, 20, 20), font, anchor="lm")
    write_png(np.asarray(sheet), path, software=software)


def _check_rows(rows, titles: Sequence[str]) -> list[list[np.ndarray]]:
    if not rows or not titles:
        got = f"got {len(rows)} and {len(titles)}"
        raise ValueError(f"rows, titles: {got}, expected at least one of each")
    for r, row in enumerate(rows):
        if len(row) != len(titles):
            expected = f"expected {len(titles)}, one for each title"
            raise ValueError(f"rows[{r}]: got {len(row)} images, {expected}")
    images = [[_array(image) for image in row] for row in rows]
    for r, row in enumerate(images):
        for c, image in enumerate(row):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                got = f"{image.dtype} {tuple(image.shape)}"
                raise ValueError(f"rows[{r}][{c}]: got {got}, expected uint8 (H, W, 3)")
    return images


def _cell_size(images, titles: Sequence[str], font) -> tuple[int, int, int]:
    """Enlargement, then width and height of a cell in pixels, wide enough for every title."""
    widest = max(image.shape[1] for row in images for image in row)
    tallest = max(image.shape[0] for row in images for image in row)
    text = max(round(font.getlength(title) + 0.5) for title in titles)
    factor = -(-MIN_PANEL_WIDTH // (len(titles) * widest))
    return factor, max(factor * widest, text), factor * tallest


def _legend_layout(legend, width: int, font) -> list[tuple[int, int, str, tuple[int, ...]]]:
    """(left, top, name, colour) of each swatch, flowing in lines of the panel's width."""
    if legend is None:
        return []
    line = _TEXT_SIZE + _GAP
    placed, left, top = [], _GAP, 0
    for name, paint in zip(*legend, strict=True):
        advance = line + round(font.getlength(name)) + 2 * _GAP
        if left + advance > width and left > _GAP:
            left, top = _GAP, top + line
        placed.append((left, top, name, tuple(int(v) for v in paint)))
        left += advance
    return placed


def _font():
    from PIL import ImageFont

    return ImageFont.load_default(size=_TEXT_SIZE)


def _array(image: np.ndarray | Tensor) -> np.ndarray:
    return image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)


def _colour_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared "redmean" distance, a cheap stand-in for perceived difference."""
    red = (a[..., 0] + b[..., 0]) / 2
    weight = np.stack([2 + red / 256, np.full_like(red, 4.0), 3 - red / 256], axis=-1)
    return (weight * (a - b) ** 2).sum(axis=-1)
