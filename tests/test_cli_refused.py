"""What a user can mend is told in one line."""

from __future__ import annotations

import os
import shutil
import sys

import numpy as np
import pytest
import torch
from adapt_runs import command, fail, run, write_pair
from PIL import Image

from fastmt import adapt_command, cli, cpp_backend

HUGE = "1" + 400 * "0"  # beyond any float
built = pytest.mark.skipif(
    cpp_backend.missing() is not None, reason="the C++ kernels are not built"
)


def _missing(folder):
    shutil.rmtree(folder / "dusk")
    return folder / "dusk", "no such folder"


def _empty(folder):
    for path in (folder / "dusk" / "images").iterdir():
        path.unlink()
    return folder / "dusk" / "images", "no image"


def _without_label(folder):
    (folder / "day" / "labels" / "day1.png").unlink()
    return folder / "day" / "images" / "day1.png", "no label"


def _sizes_differ(folder):
    path = folder / "day" / "labels" / "day1.png"
    Image.new("L", (40, 32)).save(path)
    return path, "40x32"


def _label_outside(folder):
    path = folder / "dusk_test" / "labels" / "dusk_test1.png"
    Image.new("L", (48, 32), 7).save(path)
    return path, "label id 7"


def _truncated(folder):
    path = folder / "dusk" / "images" / "dusk2.png"
    path.write_bytes(path.read_bytes()[:60])
    return path, "cannot be decoded"


def _sixteen_bit(folder):
    path = folder / "dusk" / "images" / "dusk2.png"
    Image.fromarray(np.zeros((32, 48), np.uint16)).save(path)
    return path, "8-bit"


def _test_in_target(folder):
    for part in ("images", "labels"):
        shutil.rmtree(folder / "dusk_test" / part)
    (folder / "dusk_test" / "images").symlink_to(folder / "dusk" / "images")
    for i in range(3):
        write_pair(folder / "spare", f"dusk{i}", seed=i)
    (folder / "dusk_test" / "labels").symlink_to(folder / "spare" / "labels")
    return folder / "dusk_test" / "images" / "dusk0.png", "hold the test images out"


def _test_in_source(folder):
    for part in ("images", "labels"):
        shutil.rmtree(folder / "dusk_test" / part)
        (folder / "dusk_test" / part).symlink_to(folder / "day" / part)
    return folder / "dusk_test" / "images" / "day0.png", "is in the source and in the test folder"


def _too_small(folder):
    path = folder / "dusk" / "images" / "dusk1.png"
    Image.new("RGB", (24, 24)).save(path)
    return path, "smaller than the crop 48x32"


def _other_classes(folder):
    path = folder / "dusk_test" / "classes.txt"
    path.write_text("road\nsky\ncar\n")
    return path, "other classes than in"


@pytest.mark.parametrize(
    "spoil",
    [
        _missing,
        _empty,
        _without_label,
        _sizes_differ,
        _label_outside,
        _truncated,
        _sixteen_bit,
        _test_in_target,
        _test_in_source,
        _too_small,
        _other_classes,
    ],
)
def test_data_that_cannot_be_used_is_one_line_naming_the_file(folders, capfd, spoil):
    name, complaint = spoil(folders)
    line = fail(capfd, command(folders, steps=4))
    assert str(name) in line and complaint in line
    assert not list((folders / "out").iterdir())  # told before training


def test_errors_in_the_data_end_the_process_with_one_line(folders):
    name, complaint = _truncated(folders)
    status, _, stderr = run("-m", "fastmt", *command(folders))
    assert status == 2 and len(stderr.splitlines()) == 1
    assert str(name) in stderr and complaint in stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--steps", "0"], "--steps"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--decay", "1"], "--decay"),
        (["--ramp", "1.5"], "--ramp"),
        (["--crop", "16", "48"], "--crop"),
        (["--crop", "33", "48"], "--crop: got '33', expected a multiple of 4"),
        (["--width", "3"], "--width"),
        (["--width", str(1 << 64)], "--width: got '18446744073709551616', expected an"),
        (["--steps", HUGE], "expected an integer >= 1 and <= 9007199254740992"),
        (["--batch", HUGE], "expected an integer >= 1 and <= 65536"),
        (["--crop", HUGE, "48"], "expected an integer >= 32 and <= 268435456"),
        (["--style", "cubist"], "--style"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", str(1 << 64)], "got '18446744073709551616', expected an integer >= 0 and <="),
        (["--device", "toaster"], "--device"),
        (["--device", "meta"], "--device: got 'meta', which is not available"),
        (["--device", "hpu"], "--device: got 'hpu', which is not available"),
        (["--threads", "9999999999"], "--threads: got '9999999999', expected an integer >= 1 and"),
        (["--batch", "1", "--crop", "32", "32"], "--batch 1 needs a --crop with a side above 32"),
        (["--seeds", "0", "1", "0"], "--seeds: got [0, 1, 0], expected each seed once"),
        (["--beta", "0.1"], "--beta is that of the style fourier, and the style is statistics"),
        (["--sources", "x"], "--sources"),
        (["--source", "x"], "--target"),
        (["--num-classes", "3"], "--num-classes"),
        (["--out", ""], "--out: got '', expected a path"),
        (["--source", ""], "--source: got '', expected a path"),
    ],
)
def test_bad_options_are_one_line(tmp_path, monkeypatch, capfd, options, complaint):
    monkeypatch.chdir(tmp_path)
    assert complaint in fail(capfd, ["adapt", *options])


def test_an_out_that_is_a_file_is_named(tmp_path, capfd):
    (tmp_path / "out").write_text("")
    assert str(tmp_path / "out") in fail(capfd, ["adapt", "--out", str(tmp_path / "out")])


def denied(path):
    return PermissionError(13, "Permission denied", path)


@pytest.mark.parametrize("name", ["FASTMT_BACKEND", pytest.param("FASTMT_CPU_ISA", marks=built)])
def test_an_unknown_setting_of_the_environment_is_told_before_the_data_is_read(folders, name):
    words = ["-m", "fastmt", *command(folders, "--overwrite")]
    status, stdout, stderr = run(*words, **{name: "fastest"})
    assert status == 2 and stdout == "" and len(stderr.splitlines()) == 1
    assert stderr.startswith(f"fastmt adapt: error: {name}: got 'fastest', expected ")


def test_an_out_that_tensorboard_cannot_write_to_is_named_before_the_data_is_read(tmp_path, capfd):
    out = os.fsdecode(b"o\xff")
    complaint = fail(capfd, ["adapt", "--out", str(tmp_path / out)])
    assert ": is not UTF-8, as TensorBoard" in complaint and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (denied("day/images"), "day/images: Permission denied; make it readable"),
        (denied("o/p"), "o/p: Permission denied; choose a writable --out"),
        (denied("."), ".: Permission denied; choose a writable --out"),
        (OSError(28, "No space left on device"), "o: No space left on device; choose a writable"),
        (MemoryError(), "out of memory; choose a smaller --batch"),
        (torch.OutOfMemoryError("CUDA"), "out of memory; choose a smaller --batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), "out of memory; choose a smaller"),
    ],
)
def test_what_a_user_can_mend_is_one_line(tmp_path, monkeypatch, capfd, error, told):
    def spoil(*_):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapt_command, "scene_domains", spoil)
    assert told in fail(capfd, ["adapt", "--out", "o"])


def test_a_mistake_of_its_own_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(adapt_command, "scene_domains", lambda _: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        cli.main(["adapt", "--out", str(tmp_path / "o")])


@pytest.mark.parametrize("name", ["tqdm", "tensorboard"])
def test_a_missing_package_is_told_before_the_data_is_read(folders, monkeypatch, capfd, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(adapt_command, "folder_domains", None)
    line = fail(capfd, command(folders))
    assert f'{name} is not installed: pip install "fastmt[train]"' in line
