"""The command `fastmt adapt`: its options, and the run from the data to the table."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from fastmt import adapt, adapt_report
from fastmt.adapt_data import Domains, folder_domains, scene_domains
from fastmt.adapt_out import FIGURES, PICTURE, TABLE, check_out, remove_earlier
from fastmt.networks import UNet
from fastmt.options import MIN_SIDE, device, even, integer, location, number, side, threads
from fastmt.pictures import require_pillow

_LARGEST_SEED = (1 << 64) - 1  # of PyTorch's generators
_MOST_STEPS = 1 << 53  # a float counts up to there, as schedules do
_MOST_IMAGES = 1 << 16  # a batch of more is read for hours before memory ends
_EVALUATION = "Of both runs the moving average of the student is evaluated, on images never seen."


def add_adapt(commands: argparse._SubParsersAction) -> None:
    """The parser of `fastmt adapt`."""
    command = commands.add_parser(
        "adapt",
        help="adapt a segmentation network to unlabelled images",
        description="Train a U-Net on labelled source images, alone and as a mean teacher with"
        " unlabelled target images, and compare both on held-out target images. Without folders it"
        " renders synthetic street scenes, day -> dusk. Defaults in brackets: with folders / with"
        " scenes.",
    )
    command.set_defaults(run=run_adapt, check=_check)
    _add_data_options(command)
    _add_training_options(command)


def _check(args: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    given = [name for name in ("source", "target", "test") if getattr(args, name)]
    if given and len(given) < 3:
        error("--source, --target and --test are given together or not at all")
    for name in ("num_classes", "classes"):
        if getattr(args, name) is not None and not given:
            option = name.replace("_", "-")
            error(f"--{option} belongs to folders; give --source, --target and --test")
    settings = _settings(args)
    if settings.batch == 1 and max(settings.crop) <= MIN_SIDE:
        error(
            f"--batch 1 needs a --crop with a side above {MIN_SIDE}, as batch statistics want more"
            " than one value at the U-Net's coarsest level"
        )
    if args.beta is not None and settings.style != "fourier":
        error(f"--beta is that of the style fourier, and the style is {settings.style}")
    if len(set(args.seeds)) < len(args.seeds):
        error(f"--seeds: got {args.seeds}, expected each seed once")


def _add_data_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("data").add_argument
    layout = "images/* beside labels/*.png of the same stems, or subfolders like that"
    folders = {"type": location, "nargs": "+", "metavar": "DIR"}
    add("--source", **folders, help=f"labelled source: {layout}")
    add("--target", **folders, help="target to train on: images/*, no labels read")
    add("--test", **folders, help="held-out labelled target images, for the table")
    add("--num-classes", type=integer(1), metavar="C", help="how many classes [by names or labels]")
    add("--classes", nargs="+", metavar="NAME", help="their names [classes.txt beside the source]")
    where = "where results go [%(default)s]"
    add("--out", type=location, default="runs/adapt", metavar="DIR", help=where)


def _add_training_options(command: argparse.ArgumentParser) -> None:
    folders, scenes = adapt.Settings(), adapt.SCENE_SETTINGS
    group = command.add_argument_group("training")

    def add(name: str, kind: Callable, text: str, **more) -> None:
        values = [getattr(defaults, name) for defaults in (folders, scenes)]
        if "nargs" in more:
            values = [" ".join(map(str, several)) for several in values]
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            help=f"{text} [{values[0]} / {values[1]}]",
            **more,
        )

    add("steps", integer(1, most=_MOST_STEPS), "updates of each run", metavar="N")
    add("batch", integer(1, most=_MOST_IMAGES), "images of each domain in a step", metavar="N")
    add("crop", side, "size of the crops, multiples of 4", nargs=2, metavar=("H", "W"))
    add("lr", number(above=0), "peak learning rate of AdamW", metavar="LR")
    add("weight", number(), "weight of the consistency loss", metavar="W")
    add("ramp", number(most=1), "fraction of the run over which the weight rises", metavar="R")
    add("decay", number(below=1), "of the teacher's moving average", metavar="D")
    add("style", str, "of the source images", choices=("fourier", "statistics", "none"))
    add("beta", number(most=0.5), "frequencies of the Fourier style, of the side", metavar="B")
    add("class_mixing", number(most=1), "probability of pasted source classes", metavar="P")
    add("width", even, "channels of the U-Net at a quarter of the resolution", metavar="C")
    group.add_argument(
        "--jitter",
        action=argparse.BooleanOptionalAction,
        help="photometric jitter of source and student view [on]",
    )
    seeds = {"dest": "seeds", "nargs": "+", "default": [0], "metavar": "SEED"}
    seeds |= {"type": integer(0, most=_LARGEST_SEED), "help": "one pair of runs for each [0]"}
    group.add_argument("--seeds", "--seed", **seeds)
    group.add_argument("--threads", type=threads, metavar="N", help="CPU threads [PyTorch's]")
    group.add_argument("--device", type=device, help="cpu, cuda, cuda:1 [cuda where there is one]")
    group.add_argument(
        "--checkpoint-every",
        type=integer(1),
        metavar="N",
        help="steps from one checkpoint to the next [a fifth of the run]",
    )
    earlier = group.add_mutually_exclusive_group()
    add_flag = partial(earlier.add_argument, action="store_true")
    add_flag("--resume", help="go on with the run in --out, from its checkpoints")
    add_flag("--overwrite", help="replace the run in --out; what adapt did not write stays")


def run_adapt(args: argparse.Namespace, command: str) -> None:
    """Train both variants with every seed, then write table, figures and picture."""
    require_pillow()
    for module in ("tqdm", "torch.utils.tensorboard"):
        importlib.import_module(module)  # `train` would miss them only after the data is read
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = _settings(args)
    out, seeds = Path(args.out), args.seeds
    check_out(out, resume=args.resume, overwrite=args.overwrite)
    if args.source:
        folders = (args.source, args.target, args.test)
        names = {"num_classes": args.num_classes, "classes": args.classes}
        domains = folder_domains(*folders, crop=settings.crop, **names)
    else:
        domains = scene_domains(settings.crop)
    print(f"Data: {domains.description}", flush=True)
    every = args.checkpoint_every or max(1, settings.steps // 5)
    if args.overwrite:
        remove_earlier(out)

    scores = {variant: [] for variant in adapt.VARIANTS}
    for seed in seeds:
        networks = {}
        for variant in adapt.VARIANTS:
            networks[variant] = adapt.train(
                variant,
                domains,
                settings,
                seed,
                out,
                device=device,
                checkpoint_every=every,
                resume=args.resume,
            )
            scores[variant].append(adapt.evaluate(networks[variant], domains.test, device))

    _report(scores, networks, domains, settings, device, args, command)


def _report(
    scores: adapt_report.Scores,
    networks: Mapping[str, UNet],
    domains: Domains,
    settings: adapt.Settings,
    device: torch.device,
    args: argparse.Namespace,
    command: str,
) -> None:
    """Print the table; write it, the figures, and a picture by the networks of the last seed."""
    out, classes = Path(args.out), domains.test.classes
    text = adapt_report.table(scores, classes)
    tested = f"{len(domains.test)} test images. {_EVALUATION}"
    note = f"Data: {domains.description}\n\n{tested}"
    figures = {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": adapt_report.versions(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "data": domains.description,
        "settings": asdict(settings),
        **adapt_report.results(scores, classes, args.seeds),
    }
    try:
        adapt_report.picture(out / PICTURE, networks, domains.test, device)
        adapt_report.write_text(out / TABLE, f"{note}\n\n{text}\n\n`{command}`\n")
        adapt_report.write_results(out / FIGURES, figures)
    finally:  # it is printed where the disk is full, and written where nothing reads stdout
        print(f"\n{text}\n\n{tested}")
    print(f"Picture: {out / PICTURE}; table, figures, curves and checkpoints beside it")


def _settings(args: argparse.Namespace) -> adapt.Settings:
    base = adapt.Settings() if args.source else adapt.SCENE_SETTINGS
    given = {f.name: getattr(args, f.name) for f in fields(base)}
    given = {name: value for name, value in given.items() if value is not None}
    if "crop" in given:
        given["crop"] = tuple(given["crop"])
    return replace(base, **given)
