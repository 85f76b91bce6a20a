"""Tensors that C++ holds from one update to the next: how they are let go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastmt
from fastmt import backends

pytestmark = pytest.mark.skipif(
    backends.extension_missing() is not None, reason="the C++ kernels are not built"
)
ROOT = Path(fastmt.__file__).parents[1]
START = f"""
import sys, threading, time, weakref
sys.path[:0] = [{str(ROOT)!r}]
import torch
from torch import nn
import fastmt

def follow(count):
    student = nn.ModuleList([nn.Linear(4, 4) for _ in range(count)])
    teacher = fastmt.EMATeacher(student, decay=0.9, warmup=None)
    teacher.update()
    return student, teacher
"""
# The last hold on a parameter is C++'s, and its end lets a second binding go.
NESTED = """
student, teacher = follow(1)
others = [parameter.detach().clone() for parameter in student.parameters()]
fastmt.ema_update_(others, list(student.parameters()), 0.9)
student[0].weight = nn.Parameter(torch.zeros(4, 4))
teacher.update()
"""
# The end of a parameter lets another thread run, which looks at what is bound.
BESIDE = """
from fastmt.ema_bound import AVERAGE, Bound, Row

student, teacher = follow(1)
bound = Bound([Row(0, (torch.zeros(4),), torch.ones(4), (AVERAGE,), (None,))])
ended = threading.Event()

def keep_looking():
    while not ended.is_set():
        assert bound.holds()

beside = threading.Thread(target=keep_looking)
beside.start()
weakref.finalize(student[0].weight, time.sleep, 0.1)
student[0].weight = nn.Parameter(torch.zeros(4, 4))
teacher.update()
ended.set()
beside.join()
"""


@pytest.mark.parametrize("program", [NESTED, BESIDE], ids=["by its own end", "beside an update"])
def test_letting_tensors_go_waits_for_nobody(program):
    done = subprocess.run(
        [sys.executable, "-c", START + program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
