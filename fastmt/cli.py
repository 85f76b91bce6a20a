"""The commands: `fastmt adapt`, `fastmt segment` and `fastmt doctor`."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from fastmt import backends, cpp_backend
from fastmt.adapt import Interrupted
from fastmt.adapt_command import add_adapt
from fastmt.arguments import first_line
from fastmt.checkpoint import CheckpointError
from fastmt.data import DataError
from fastmt.doctor import add_doctor
from fastmt.segment_command import add_segment

# To fit into memory.
_SMALLER = {"adapt": "--batch, --crop or --width", "segment": "--tile or --scales"}
# PyTorch has no class for these: memory that is not there, and more than can be counted.
_TOO_LARGE = ("DefaultCPUAllocator", "Storage size calculation overflowed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 after an error told in one line on stderr, 130 on Ctrl-C.

    1 says that the doctor found something wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _print_any_character()
    try:
        args = _parser().parse_args(words)
    except SystemExit as stop:  # argparse has told the error, or the help
        return int(stop.code or 0)
    name = f"fastmt {args.command}"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            _check_environment()
            status = args.run(args, shlex.join(["python", "-m", "fastmt", *words]))
            print(end="", flush=True)  # what cannot be written is told here
    except Interrupted as stop:
        _say(f"{name}: {stop}; go on with --resume")
        return 130
    except KeyboardInterrupt:
        go_on = "; go on with --resume" if args.command == "adapt" else ""
        kept = f"; what is finished is in {args.out}" if args.out else ""
        _say(f"{name}: interrupted{kept}{go_on}")
        return 130
    except BrokenPipeError:
        _drop_output()
        _say(f"{name}: error: nothing reads its output any more")
        return 2
    except (ValueError, ImportError, OSError, MemoryError, RuntimeError) as error:
        if (told := _told(error, args)) is None:
            raise  # a mistake of fastmt itself, which only its traceback explains
        _say(f"{name}: error: {told}")
        return 2
    return status or 0


def _check_environment() -> None:
    """Ask for what kernels would ask for in the first step, after an earlier run was replaced."""
    backends.default_backend()
    cpp_backend.instruction_set()


def _told(error: Exception, args: argparse.Namespace) -> str | None:
    """One line on what went wrong and what to do; None for what no user can mend."""
    if isinstance(error, ModuleNotFoundError):
        return f'{error.name} is not installed: pip install "fastmt[train]"'
    if isinstance(error, (DataError, CheckpointError, ImportError)):
        return str(error)
    if str(error).startswith("FASTMT_"):  # a variable of the environment, which it names
        return first_line(error)
    if isinstance(error, OSError):
        if args.out is None:
            return f"{error.filename or 'stdout'}: {error.strerror or error}"
        written = error.filename is None or _within(error.filename, args.out)
        remedy = "choose a writable --out with free space" if written else "make it readable"
        return f"{error.filename or args.out}: {error.strerror or error}; {remedy}"
    exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    exhausted |= any(sign in str(error) for sign in _TOO_LARGE)
    if exhausted and args.command in _SMALLER:
        return f"out of memory; choose a smaller {_SMALLER[args.command]}"
    return None


def _within(path: str, out: str) -> bool:
    """Whether a path lies in the folder of results, or is one that had to be made for it."""
    place, folder = Path(path).resolve(), Path(out).resolve()
    return place.is_relative_to(folder) or folder.is_relative_to(place)


def _say(message: str) -> None:
    print(" ".join(message.splitlines()), file=sys.stderr)


def _print_any_character() -> None:
    """What the encoding of stdout lacks is escaped, as on stderr: no result may be lost to it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Nothing that stdout still holds is written at the end: it would raise once more there."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _note(message: Warning | str, *_: object) -> None:
    print(f"Note: {message}", flush=True)


class _Parser(argparse.ArgumentParser):
    """Tells an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class _CommandParser(_Parser):
    """Also checks options that depend on each other."""

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        parsed.check(parsed, self.error)
        return parsed, rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastmt", description="Mean-teacher training of dense prediction.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_CommandParser)
    add_adapt(commands)
    add_segment(commands)
    add_doctor(commands)
    return parser
