"""The command `fastmt segment`: label maps, overlays and confidence pictures of image files."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastmt import checkpoint
from fastmt.checkpoint import CheckpointError
from fastmt.data import IMAGE_SUFFIXES, VOID, DataError, read_image
from fastmt.networks import UNet
from fastmt.options import MIN_SIDE, device, integer, location, number, side, threads
from fastmt.pictures import (
    blend,
    colour,
    default_palette,
    heat,
    require_pillow,
    software_of,
    write_png,
)
from fastmt.segment import LARGEST_SCALE, segment, tile_side

FOLDERS = ("labels", "overlays", "confidence")
_SOFTWARE = "fastmt segment"
_STRIDE = 4  # of the U-Net that `fastmt adapt` trains


def add_segment(commands: argparse._SubParsersAction) -> None:
    """The parser of `fastmt segment`."""
    command = commands.add_parser(
        "segment",
        help="segment images with an adapted network",
        description="Write labels/*.png (class ids: small grey values, so nearly black to the eye),"
        " overlays/*.png (the classes' colours over the image; the legend is that of the run's"
        " adapted.png) and confidence/*.png (from dark violet, 0, over red to pale yellow, 1) of"
        " images, by the moving average in a checkpoint of `fastmt adapt`.",
    )
    command.set_defaults(run=run_segment, check=_check)
    add = command.add_argument
    add("checkpoint", type=location, metavar="CHECKPOINT", help="a .pt file of fastmt adapt")
    images = {"type": location, "nargs": "+", "metavar": "IMAGES"}
    add("images", **images, help="image files, or folders of them")
    add("--out", type=location, required=True, metavar="DIR", help="where the pictures go")
    add("--tile", type=side, metavar="N", help="largest side seen at once [the whole image]")
    add("--overlap", type=integer(0), metavar="N", help="of tiles [a quarter of a tile]")
    add("--flip", action="store_true", help="also look at the mirrored image")
    factor = number(above=0, most=LARGEST_SCALE)
    scales = {"type": factor, "nargs": "+", "default": [1.0], "metavar": "S"}
    add("--scales", **scales, help="look at the image resized by each factor [1]")
    add(
        "--void-below",
        type=number(most=1),
        default=0.0,
        metavar="SCORE",
        help="pixels less sure are labelled 255 [0]",
    )
    add("--threads", type=threads, metavar="N", help="CPU threads [PyTorch's]")
    add("--device", type=device, help="cpu, cuda, cuda:1 [cuda where there is one]")


def _check(args: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    if args.tile is None:
        if args.overlap is not None:
            error("--overlap is that of tiles; give --tile too")
        return
    enlarged = max(1, *args.scales)
    covered = int(args.tile / enlarged)
    at_scale = f" / {enlarged:g}, the largest of --scales" if enlarged > 1 else ""
    if covered < MIN_SIDE:
        error(f"--tile {args.tile}{at_scale} is less than {MIN_SIDE} pixels")
    if args.overlap is not None and args.overlap >= tile_side(args.tile, args.scales, _STRIDE):
        error(f"--overlap {args.overlap} is not less than --tile {args.tile}{at_scale}")


def run_segment(args: argparse.Namespace, command: str) -> None:
    """Segment every image with the teacher of a checkpoint; DataError, CheckpointError by name."""
    require_pillow()
    from tqdm import tqdm

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    place = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = load_teacher(args.checkpoint).to(place, memory_format=torch.channels_last)
    out = Path(args.out)
    paths = find_images(args.images)
    check_outputs(paths, out)
    scores, begun = [], time.perf_counter()
    with tqdm(paths, desc="segment", unit="image", disable=None) as bar:
        for path in bar:
            scores.append(_segment_file(network, path, out, place, args))
            bar.set_postfix(confidence=f"{scores[-1]:.2f}")
    rate = len(paths) / (time.perf_counter() - begun)
    mean = sum(scores) / len(scores)
    plural = "" if len(paths) == 1 else "s"
    print(
        f"{len(paths)} image{plural}, {rate:.1f} images/s, mean confidence {mean:.2f}. "
        f"Written to {', '.join(str(out / folder) for folder in FOLDERS)}"
    )


def load_teacher(path: str | Path) -> UNet:
    """The averaged network of a checkpoint of `fastmt adapt`; CheckpointError naming the file."""
    state = checkpoint.load(path)
    facts: dict[str, Any] = state.get("extra") or {}
    try:
        width, classes = facts["settings"]["width"], facts["classes"]
        teacher, network = state["teacher"], UNet(len(classes), width=width)
        checkpoint.check_architecture(network.state_dict(), teacher, path)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: does not say which network it holds; use a checkpoint of `fastmt adapt`"
        ) from error
    network.load_state_dict(teacher)
    return network


def find_images(given: Sequence[str]) -> list[Path]:
    """The files given and those in the folders given; DataError where there is none."""
    paths: list[Path] = []
    for name in map(Path, given):
        if name.is_dir():
            found = sorted(p for p in name.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            found = [p for p in found if not p.name.startswith(".")]
            if not found:
                wanted = ", ".join(sorted(s[1:] for s in IMAGE_SUFFIXES))
                raise DataError(f"{name}: no image in it; give a folder of {wanted} files")
            paths += found
        elif name.exists():
            paths.append(name)
        else:
            raise DataError(f"{name}: no such file or folder; check the path")
    return list(dict.fromkeys(paths))


def check_outputs(paths: Sequence[Path], out: Path) -> None:
    """DataError where two images would share a result, or a result replace anything but results."""
    by_stem: dict[str, Path] = {}
    images = {path.resolve() for path in paths}
    for path in paths:
        stem = path.stem.casefold()  # some file systems do not tell A.png from a.png
        if stem in by_stem:
            raise DataError(
                f"{path}: same stem as {by_stem[stem]}; segment them into different --out"
            )
        by_stem[stem] = path
        for target in _targets(out, path):
            if target.resolve() in images:
                raise DataError(f"{target}: is one of the images; choose another --out")
            if os.path.lexists(target) and software_of(target) != _SOFTWARE:
                raise DataError(f"{target}: is not of `{_SOFTWARE}`; choose another --out")


def _targets(out: Path, image: Path) -> list[Path]:
    return [out / folder / f"{image.stem}.png" for folder in FOLDERS]


def _segment_file(
    network: UNet, path: Path, out: Path, place: torch.device, args: argparse.Namespace
) -> float:
    """Write the three pictures of one image; its mean confidence."""
    image = read_image(path)
    pixels = image.to(place)
    score, label = segment(
        network,
        pixels,
        tile=args.tile,
        overlap=args.overlap,
        flip=args.flip,
        scales=args.scales,
        divisor=network.stride,
    )
    sure = score >= args.void_below  # a NaN never is
    ids = torch.where(sure, label, VOID).to("cpu", torch.uint8).numpy()
    painted = colour(ids, default_palette(network.num_classes))
    pictures = (ids, blend(image.permute(1, 2, 0), painted), heat(score))
    for target, picture in zip(_targets(out, path), pictures, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(picture, target, software=_SOFTWARE)
    return float(score.mean())
