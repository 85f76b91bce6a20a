"""The folder of an adaptation run: what it may replace there, and what it must not."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fastmt import checkpoint
from fastmt.adapt import CURVES_SUFFIX, VARIANTS
from fastmt.checkpoint import CheckpointError
from fastmt.data import DataError
from fastmt.pictures import software_of

SOFTWARE = "fastmt adapt"
FIGURES, TABLE, PICTURE = "results.json", "table.md", "adapted.png"
_COMMAND = f"python -m {SOFTWARE}"  # with which figures and table say how they were made


def check_out(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the folder; refuse to replace files that `fastmt adapt` did not write, or a run untold.

    Raises DataError naming a foreign file in the place of a result, or a path that TensorBoard
    cannot write to, and CheckpointError where there is an earlier run, finished or not, that is
    neither resumed nor overwritten. Checkpoints to resume from are left to `MeanTeacher.resume`.
    """
    if not _is_utf8(str(out)):
        raise DataError(f"{out}: is not UTF-8, as TensorBoard's files need; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    earlier = _results(out) + ([] if resume else _checkpoints(out))
    for path in earlier:
        if not _is_ours(path):
            raise DataError(f"{path}: is not of `{SOFTWARE}`; choose another --out")
    if earlier and not (resume or overwrite):
        raise CheckpointError(
            f"{earlier[-1]}: belongs to an earlier run; add --resume to go on with it, --overwrite"
            " to replace it, or choose another --out"
        )


def remove_earlier(out: Path) -> None:
    """Remove results, checkpoints and curves of the run that `check_out` found, of all its seeds.

    None may stay: a later --resume would take a checkpoint of the earlier run for one of this.
    """
    curves = out.glob(f"tensorboard/*/events.out.tfevents.*{CURVES_SUFFIX}")
    for path in [*_results(out), *_checkpoints(out), *curves]:
        Path(os.path.realpath(path)).unlink()  # a link stays, and is written through again


def _results(out: Path) -> list[Path]:
    return [out / name for name in (FIGURES, TABLE, PICTURE) if (out / name).exists()]


def _checkpoints(out: Path) -> list[Path]:
    return sorted(path for variant in VARIANTS for path in out.glob(f"seed*/{variant}.pt"))


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _is_ours(path: Path) -> bool:
    """Whether a file says itself that `fastmt adapt` wrote it."""
    if path.name == PICTURE:
        return software_of(path) == SOFTWARE
    try:
        if path.suffix == ".pt":
            return checkpoint.load(path)["extra"]["variant"] == path.stem
        text = path.read_text(encoding="utf-8")
        if path.name == FIGURES:
            command = json.loads(text)["command"]
        else:
            command = text.splitlines()[-1].strip("`")
    except (CheckpointError, OSError, ValueError, LookupError, TypeError):
        return False
    return str(command).startswith(_COMMAND)
