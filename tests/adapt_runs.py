"""Small runs of `fastmt adapt` on folders, for the tests of the commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fastmt import cli

ROOT = Path(__file__).parent.parent
SMALL = ["--crop", "32", "48", "--batch", "2", "--width", "2", "--threads", "1"]
DIRS = ("day", "dusk", "dusk_test")


def write_pair(folder, name, seed, classes=3):
    rng = np.random.default_rng(seed)
    label = np.repeat(rng.integers(0, classes, (4, 48)), 8, axis=0).astype(np.uint8)
    image = np.stack([80 * label, 255 - 60 * label, 40 * label], axis=-1)
    for part, pixels in (("images", image), ("labels", label)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"{name}.png")


def write_domains(folder):
    """Three images of 48x32 of each domain, the target's without labels."""
    for k, name in enumerate(DIRS):
        for i in range(3):
            write_pair(folder / name, f"{name}{i}", seed=10 * k + i)
    (folder / "day" / "classes.txt").write_text("sky\nroad\ncar\n")
    shutil.rmtree(folder / "dusk" / "labels")
    return folder


def command(folder, *options, steps=2):
    data = [f"--{n}={folder / d}" for n, d in zip(("source", "target", "test"), DIRS, strict=True)]
    return ["adapt", *data, "--out", str(folder / "out"), *SMALL, f"--steps={steps}", *options]


def run(*call, **environment):
    """Python in a process of its own; its status, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, *call],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def started(*call, **environment):
    """Python in a process of its own, whose stdout and stderr are pipes."""
    return subprocess.Popen(
        [sys.executable, *call],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def fail(capfd, words):
    """Run in this process; the one line on stderr of a command that must fail with status 2."""
    capfd.readouterr()
    assert cli.main(words) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "error: " in lines[0], lines
    return lines[0]
