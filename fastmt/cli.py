"""The commands: `fastmt adapt`."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn

import torch

from fastmt import adapt, adapt_report
from fastmt.checkpoint import CheckpointError
from fastmt.data import DataError
from fastmt.pictures import require_pillow

_MIN_CROP = 32  # one pixel at the U-Net's coarsest level
_EVALUATION = "Of both runs the moving average of the student is evaluated, on images never seen."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 after an error told in one line on stderr, 130 on Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser().parse_args(words)
    except SystemExit as stop:  # argparse has told the error, or the help
        return int(stop.code or 0)
    name = f"fastmt {args.command}"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            args.run(args, shlex.join(["python", "-m", "fastmt", *words]))
    except adapt.Interrupted as stop:
        _say(f"{name}: {stop}; go on with --resume")
        return 130
    except KeyboardInterrupt:
        _say(f"{name}: interrupted; checkpoints are in {args.out}, go on with --resume")
        return 130
    except (DataError, CheckpointError, ImportError) as error:
        _say(f"{name}: error: {error}")
        return 2
    except OSError as error:
        place = error.filename or args.out
        reason = error.strerror or error
        _say(f"{name}: error: {place}: {reason}; choose a writable --out with free space")
        return 2
    return 0


def run_adapt(args: argparse.Namespace, command: str) -> None:
    """Train both variants with every seed, then write table, figures and picture."""
    require_pillow()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = _settings(args)
    out, seeds = Path(args.out), args.seeds
    _prepare(out, args.resume)
    if args.source:
        folders = (args.source, args.target, args.test)
        domains = adapt.folder_domains(*folders, num_classes=args.num_classes, classes=args.classes)
    else:
        domains = adapt.scene_domains(settings.crop)
    print(f"Data: {domains.description}", flush=True)
    every = args.checkpoint_every or max(1, settings.steps // 5)

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

    text = adapt_report.table(scores, domains.test.classes)
    note = f"Data: {domains.description}\n\n{len(domains.test)} test images. {_EVALUATION}"
    print(f"\n{text}\n\n{len(domains.test)} test images. {_EVALUATION}\nWritten to {out}")
    adapt_report.picture(out / "adapted.png", networks, domains.test, device)
    adapt_report.write_text(out / "table.md", f"{note}\n\n{text}\n\n`{command}`\n")
    figures = {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": adapt_report.versions(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "data": domains.description,
        "settings": asdict(settings),
        **adapt_report.results(scores, domains.test.classes, seeds),
    }
    adapt_report.write_results(out / "results.json", figures)


def _prepare(out: Path, resume: bool) -> None:
    """Make the folder; refuse to start over what an interrupted run has left there."""
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        return
    finished = out / "results.json"
    unfinished = sorted(out.glob("seed*/*.pt"))
    if unfinished and not finished.exists():
        raise CheckpointError(
            f"{unfinished[0]}: belongs to an unfinished run; add --resume to go on with it, or"
            " choose another --out"
        )
    finished.unlink(missing_ok=True)


def _settings(args: argparse.Namespace) -> adapt.Settings:
    base = adapt.Settings() if args.source else adapt.SCENE_SETTINGS
    given = {f.name: getattr(args, f.name) for f in fields(base)}
    given = {name: value for name, value in given.items() if value is not None}
    if "crop" in given:
        given["crop"] = tuple(given["crop"])
    return replace(base, **given)


def _say(message: str) -> None:
    print(" ".join(message.splitlines()), file=sys.stderr)


def _note(message: Warning | str, *_: object) -> None:
    print(f"Note: {message}", flush=True)


class _Parser(argparse.ArgumentParser):
    """Tells an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class _AdaptParser(_Parser):
    """Also checks options that depend on each other."""

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        given = [n for n in ("source", "target", "test") if getattr(parsed, n)]
        if given and len(given) < 3:
            self.error("--source, --target and --test are given together or not at all")
        for name in ("num_classes", "classes"):
            if getattr(parsed, name) is not None and not given:
                option = name.replace("_", "-")
                self.error(f"--{option} belongs to folders; give --source, --target and --test")
        return parsed, rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastmt", description="Mean-teacher training of dense prediction.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_AdaptParser)
    command = commands.add_parser(
        "adapt",
        help="adapt a segmentation network to unlabelled images",
        description="Train a U-Net on labelled source images, alone and as a mean teacher with"
        " unlabelled target images, and compare both on held-out target images. Without folders it"
        " renders synthetic street scenes, day -> dusk. Defaults in brackets: with folders / with"
        " scenes.",
    )
    command.set_defaults(run=run_adapt)
    _add_data_options(command)
    _add_training_options(command)
    return parser


def _add_data_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("data").add_argument
    layout = "images/* beside labels/*.png of the same stems, or subfolders like that"
    add("--source", nargs="+", metavar="DIR", help=f"labelled source: {layout}")
    add("--target", nargs="+", metavar="DIR", help="target to train on: images/*, no labels read")
    add("--test", nargs="+", metavar="DIR", help="held-out labelled target images, for the table")
    add("--num-classes", type=_integer(1), metavar="C", help="classes [names or largest label id]")
    add("--classes", nargs="+", metavar="NAME", help="their names [classes.txt beside the source]")
    add("--out", default="runs/adapt", metavar="DIR", help="where results go [%(default)s]")


def _add_training_options(command: argparse.ArgumentParser) -> None:
    folders, scenes = adapt.Settings(), adapt.SCENE_SETTINGS
    group = command.add_argument_group("training")

    def add(name: str, kind: Callable, text: str, **more) -> None:
        values = [getattr(defaults, name) for defaults in (folders, scenes)]
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            help=f"{text} [{values[0]} / {values[1]}]",
            **more,
        )

    add("steps", _integer(1), "updates of each run", metavar="N")
    add("batch", _integer(1), "images of each domain in a step", metavar="N")
    add("crop", _integer(_MIN_CROP), "size of the crops", nargs=2, metavar=("H", "W"))
    add("lr", _number(above=0), "peak learning rate of AdamW", metavar="LR")
    add("weight", _number(), "weight of the consistency loss", metavar="W")
    add("ramp", _number(most=1), "fraction of the run over which the weight rises", metavar="R")
    add("decay", _number(below=1), "of the teacher's moving average", metavar="D")
    add("style", str, "of the source images", choices=("fourier", "statistics", "none"))
    add("beta", _number(most=0.5), "frequencies of the Fourier style, of the side", metavar="B")
    add("class_mixing", _number(most=1), "probability of pasted source classes", metavar="P")
    add("width", _even, "channels of the U-Net at a quarter of the resolution", metavar="C")
    group.add_argument(
        "--jitter",
        action=argparse.BooleanOptionalAction,
        help="photometric jitter of source and student view [on]",
    )
    seeds = {"dest": "seeds", "type": _integer(0), "nargs": "+", "default": [0], "metavar": "SEED"}
    group.add_argument("--seeds", "--seed", **seeds, help="one pair of runs for each [0]")
    group.add_argument("--threads", type=_integer(1), metavar="N", help="CPU threads [PyTorch's]")
    group.add_argument("--device", type=_device, help="cpu, cuda, cuda:1 [cuda where there is one]")
    group.add_argument(
        "--checkpoint-every", type=_integer(1), metavar="N", help="steps [a fifth of the run]"
    )
    group.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= {least}")
        return value

    return integer


def _even(text: str) -> int:
    value = _integer(2)(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an even number >= 2")
    return value


def _number(
    *, above: float | None = None, below: float = math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """A number in [0, most], or strictly between the bounds given."""
    bounds = ["> 0" if above is not None else ">= 0"]
    bounds += [f"< {below:g}"] if below < math.inf else []
    bounds += [f"<= {most:g}"] if most < math.inf else []

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low = value > above if above is not None else value >= 0
        if not (low and value < below and value <= most):
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a number {' and '.join(bounds)}"
            )
        return value

    return number


def _device(text: str) -> str:
    try:
        torch.zeros((), device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"got {text!r}, which is not available: {reason}"
        ) from error
    return text
