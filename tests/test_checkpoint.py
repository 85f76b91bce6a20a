import builtins
import contextlib
import errno
import os
import stat
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastmt import checkpoint
from fastmt.checkpoint import (
    CheckpointError,
    check_architecture,
    load,
    load_weights,
    save,
    save_weights,
)

ROOT = Path(__file__).resolve().parents[1]


def some_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {
        "step": 7,
        "loss": 0.25,
        "name": "day to dusk",
        "done": False,
        "note": None,
        "classes": ["sky", "road"],
        "size": (144, 192),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": torch.get_rng_state(),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and all(
            same(a, b) for a, b in zip(first, second, strict=True)
        )
    return type(first) is type(second) and first == second


def one_line(info):
    message = str(info.value)
    assert "\n" not in message
    return message


def test_a_state_comes_back_as_it_was(tmp_path):
    state = some_state()
    save(tmp_path / "a.pt", state)
    assert same(load(tmp_path / "a.pt"), state)


def test_numbers_of_numpy_come_back_as_those_of_python(tmp_path):
    rates = [np.float64(0.5), np.float32(0.25)]
    state = {"rates": rates, "at": Counter({np.int64(3): 1}), "best": (np.int64(7), np.True_)}
    with pytest.raises(TypeError, match=r"^state\['at'\]: got a int64 as key"):
        save(tmp_path / "a.pt", state)
    state["at"] = Counter({3: np.int64(1)})
    save(tmp_path / "a.pt", state)
    assert same(load(tmp_path / "a.pt"), {"rates": [0.5, 0.25], "at": {3: 1}, "best": (7, True)})
    assert state["rates"] is rates and type(rates[0]) is np.float64


def test_a_state_dict_tells_the_versions_of_its_modules(tmp_path):
    state = nn.BatchNorm2d(8).state_dict()
    save(tmp_path / "a.pt", {"model": state})
    assert load(tmp_path / "a.pt")["model"]._metadata == state._metadata


def test_saving_replaces_the_former_checkpoint_and_leaves_nothing_beside_it(tmp_path):
    save(tmp_path / "a.pt", {"step": 1})
    save(tmp_path / "a.pt", {"step": 2})
    assert load(tmp_path / "a.pt") == {"step": 2}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_file_and_folder_reach_the_disk_and_are_closed_again(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((file, os.fstat(file).st_mode)))
    save(tmp_path / "run.pt", some_state())
    assert [stat.S_ISDIR(mode) for _, mode in synced] == [False, True]
    for file, _ in synced:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_only_a_file_system_that_syncs_no_folders_may_refuse_to(tmp_path, monkeypatch, error):
    def sync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", sync)
    fails = error == errno.EIO
    with pytest.raises(CheckpointError) if fails else contextlib.nullcontext():
        save(tmp_path / "run.pt", some_state())


def test_saving_makes_missing_folders_and_writes_through_links(tmp_path):
    save(tmp_path / "runs" / "first" / "a.pt", {"step": 1})
    (tmp_path / "latest.pt").symlink_to(tmp_path / "runs" / "first" / "a.pt")
    save(tmp_path / "latest.pt", {"step": 2})
    assert (tmp_path / "latest.pt").is_symlink()
    assert load(tmp_path / "runs" / "first" / "a.pt") == {"step": 2}


def test_a_name_as_long_as_the_file_system_takes_is_saved(tmp_path):
    path = tmp_path / f"{'a' * 252}.pt"
    save(path, {"step": 1})
    assert load(path) == {"step": 1}


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"model": {"act": nn.ReLU()}}, r"state\['model'\]\['act'\]: got ReLU, expected a dict"),
        ({"history": [1, {2, 3}]}, r"state\['history'\]\[1\]: got set, expected"),
        ({"scale": lambda step: step}, r"state\['scale'\]: got function, expected"),
        ([1, 2], "^state: got list, expected a dict"),
    ],
)
def test_what_could_not_be_loaded_is_refused_at_saving(tmp_path, state, where):
    with pytest.raises(TypeError, match=where):
        save(tmp_path / "a.pt", state)
    assert os.listdir(tmp_path) == []


class FullDisk:
    """A file on a disk with room for `room` more bytes, or where another error comes then."""

    def __init__(self, file, room, error=None):
        self.file, self.room = file, room
        self.error = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.file.close()


def write_a(path, step):
    save(path, {"step": step, "weights": torch.full((50_000,), float(step))})


def write_b(path, step):
    save_weights(path, {"weights": torch.full((50_000,), float(step))})


@pytest.mark.parametrize("write", [write_a, write_b])
@pytest.mark.parametrize("room", [0, 100_000])
def test_a_full_disk_leaves_the_former_checkpoint_intact(tmp_path, monkeypatch, write, room):
    path = tmp_path / "a.pt"
    write(path, 1)
    before = path.read_bytes()
    real_open = builtins.open
    monkeypatch.setattr(
        checkpoint, "open", lambda *args: FullDisk(real_open(*args), room), raising=False
    )
    with pytest.raises(CheckpointError, match="No space left on device.*free space") as info:
        write(path, 2)
    assert str(path) in one_line(info)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_a_real_write_failure_leaves_the_former_checkpoint_intact(tmp_path):
    path = tmp_path / "a.pt"
    write_a(path, 1)
    program = (
        "import resource, sys, torch\n"
        "from fastmt.checkpoint import CheckpointError, save\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    save(sys.argv[1], {'weights': torch.zeros(50_000)})\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert f"{path}: cannot be written (File too large)" in done.stdout
    assert load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.skipif(os.name != "posix", reason="kills with a POSIX signal")
@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_a_process_killed_while_saving_leaves_the_former_checkpoint(tmp_path, moment):
    path = tmp_path / "a.pt"
    write_a(path, 1)
    program = (
        "import os, signal, sys, torch\n"
        "from fastmt.checkpoint import save\n"
        f"{moment} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "save(sys.argv[1], {'step': 2, 'weights': torch.zeros(50_000)})\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT)
    assert done.returncode == -9
    assert load(path)["step"] == 1
    write_a(path, 3)
    assert load(path)["step"] == 3


def test_an_interrupt_while_saving_removes_the_temporary_file(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.pt", {"step": 1})
    assert os.listdir(tmp_path) == []


def test_an_interrupt_amid_the_bytes_stays_an_interrupt(tmp_path, monkeypatch):
    write_a(tmp_path / "a.pt", 1)
    real_open = builtins.open

    def interrupted(*args):
        return FullDisk(real_open(*args), 100_000, KeyboardInterrupt())

    monkeypatch.setattr(checkpoint, "open", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        write_a(tmp_path / "a.pt", 2)
    assert load(tmp_path / "a.pt")["step"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


def test_the_first_entry_of_another_architecture_is_named():
    state = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()
    check_architecture(state, dict(state), "a.pt")
    wider = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).state_dict()
    deeper = OrderedDict(state, **{"2.weight": torch.zeros(1)})
    remedy = ".*; build the network with the settings"
    shapes = r"shape \(16, 3, 3, 3\) of float32, the network expects shape \(8, 3, 3, 3\)"
    with pytest.raises(CheckpointError, match=f"a.pt: entry '0.weight' has {shapes}{remedy}"):
        check_architecture(state, wider, "a.pt")
    with pytest.raises(CheckpointError, match=f"a.pt: entry '2.weight' is unknown{remedy}"):
        check_architecture(state, deeper, "a.pt")
    with pytest.raises(CheckpointError, match=f"a.pt: entry '2.weight' .* is missing{remedy}"):
        check_architecture(deeper, state, "a.pt")


def test_weights_come_back_with_tied_and_strided_tensors(tmp_path):
    tied = torch.rand(4, 3)
    state = {"a": tied, "b": tied, "t": tied.t(), "n": torch.tensor(3), "h": tied.bfloat16()}
    save_weights(tmp_path / "a.safetensors", state)
    assert same(load_weights(tmp_path / "a.safetensors"), state)


def test_weights_that_are_no_tensors_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"state_dict\['step'\]: got int, expected a tensor"):
        save_weights(tmp_path / "a.safetensors", {"step": 3})


def test_truncated_missing_and_foreign_weights_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        load_weights(path)
    write_b(path, 1)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated or no safetensors file") as info:
        load_weights(path)
    assert one_line(info).startswith(str(path))


def test_missing_safetensors_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r'pip install "fastmt\[train\]"'):
        load_weights(tmp_path / "a.safetensors")
