import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from adapt_runs import DIRS, SMALL, command, fail, write_domains, write_pair
from PIL import Image

from fastmt import adapt, adapt_command, adapt_data, cli
from fastmt.adapt_data import folder_domains
from fastmt.checkpoint import CheckpointError, load

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folders(tmp_path):
    return write_domains(tmp_path)


def run(words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "fastmt", *words]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_example_script_trains_and_scores():
    script = ROOT / "examples" / "adapt.py"
    assert len(script.read_text().splitlines()) < 80
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, script, "--steps", "2"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mIoU on 16 test images" in done.stdout


def test_command_leaves_table_figures_picture_curves_and_checkpoints(folders):
    status, stdout, stderr = run(command(folders, "--seeds", "0", "1"))
    assert (status, stderr) == (0, "")
    out = folders / "out"
    assert "| car |" in stdout and "±" in stdout and "never seen" in stdout
    assert stdout.count("|") == sum(
        line.count("|") for line in (out / "table.md").read_text().splitlines()
    )
    figures = json.loads((out / "results.json").read_text())
    assert figures["command"].startswith("python -m fastmt adapt --source")
    assert figures["settings"]["steps"] == 2 and figures["seeds"] == [0, 1]
    assert figures["versions"].keys() == {"fastmt", "torch", "python"} and figures["date"]
    for variant in ("source_only", "adapted"):
        assert len(figures[variant]["miou"]) == 2
        assert list(figures[variant]["iou"][0]) == ["sky", "road", "car"]
        assert load(out / "seed1" / f"{variant}.pt")["steps"] == 2
        assert list((out / "tensorboard" / f"{variant}-seed0").glob("events*"))
    with Image.open(out / "adapted.png") as picture:
        assert picture.width >= 4 * 48
    assert not list(out.rglob("*.tmp"))


def test_scenes_are_the_default_and_called_synthetic(tmp_path, capfd):
    assert cli.main(["adapt", *SMALL, "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    assert "synthetic street scenes" in told.out and "| sky |" in told.out


def test_an_interrupt_saves_the_step_and_resume_continues_to_the_same_figures(folders, capfd):
    assert cli.main(command(folders, steps=60)) == 0
    expected = json.loads((folders / "out" / "results.json").read_text())
    shutil.rmtree(folders / "out")
    capfd.readouterr()

    words = command(folders, "--checkpoint-every", "3", steps=60)
    first = folders / "out" / "seed0" / "source_only.pt"
    with interrupt_once_there(first):
        assert cli.main(words) == 130
    (line,) = capfd.readouterr().err.splitlines()
    assert "interrupted after step" in line and str(first.parent) in line and "--resume" in line
    assert 0 < load(first)["steps"] <= 60

    assert cli.main([*words, "--resume"]) == 0
    figures = json.loads((folders / "out" / "results.json").read_text())
    for variant in ("source_only", "adapted"):
        assert figures[variant] == expected[variant]


def test_an_interrupt_at_any_moment_is_saved_before_it_is_told(folders, monkeypatch):
    presses = iter([False, True])  # Ctrl-C comes right after it was first asked for

    @contextlib.contextmanager
    def pressed():
        yield lambda: next(presses, True)

    monkeypatch.setattr(adapt, "_interrupts", pressed)
    domains = folder_domains(*([str(folders / d)] for d in DIRS), crop=(32, 48))
    settings = adapt.Settings(steps=4, batch=2, crop=(32, 48), width=2)
    options = {"device": torch.device("cpu"), "checkpoint_every": 9}
    with pytest.raises(adapt.Interrupted) as stop:
        adapt.train("source_only", domains, settings, 0, folders / "out", **options)
    assert load(stop.value.path)["steps"] == stop.value.step


@contextlib.contextmanager
def interrupt_once_there(path):
    """Press Ctrl-C as soon as the file exists."""

    def press():
        while not path.exists() and not done.wait(0.005):
            pass
        if not done.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    done = threading.Event()
    thread = threading.Thread(target=press)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint(folders, capfd):
    words = command(folders, "--width", "4", "--checkpoint-every", "1", steps=30)
    checkpoint = folders / "out" / "seed0" / "source_only.pt"
    with interrupt_once_there(checkpoint):
        assert cli.main(words) == 130
    before = checkpoint.read_bytes()
    assert len(before) > 30_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # writes beyond it fail
    try:
        line = fail(capfd, [*words, "--resume"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(checkpoint) in line and "free space" in line
    assert checkpoint.read_bytes() == before


def test_resuming_with_other_options_or_width_names_the_checkpoint(folders, capfd):
    assert cli.main(command(folders)) == 0
    capfd.readouterr()
    before = (folders / "out" / "seed0" / "source_only.pt").read_bytes()
    line = fail(capfd, command(folders, "--resume", steps=3))
    assert "source_only.pt" in line and "steps 2" in line and "3" in line
    line = fail(capfd, command(folders, "--resume", "--width", "4"))
    assert "source_only.pt" in line and "width 2, this run has 4" in line
    assert (folders / "out" / "seed0" / "source_only.pt").read_bytes() == before


def test_a_checkpoint_cut_short_is_named(folders, capfd):
    assert cli.main(command(folders)) == 0
    path = folders / "out" / "seed0" / "adapted.pt"
    path.write_bytes(path.read_bytes()[:-200])
    capfd.readouterr()
    line = fail(capfd, command(folders, "--resume"))
    assert str(path) in line and "truncated" in line


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
    status, _, stderr = run(command(folders))
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
        (["--style", "cubist"], "--style"),
        (["--seeds", "-1"], "--seeds"),
        (["--device", "toaster"], "--device"),
        (["--batch", "1", "--crop", "32", "32"], "--batch 1 needs a --crop with a side above 32"),
        (["--seeds", "0", "1", "0"], "--seeds: got [0, 1, 0], expected each seed once"),
        (["--sources", "x"], "--sources"),
        (["--source", "x"], "--target"),
        (["--num-classes", "3"], "--num-classes"),
    ],
)
def test_bad_options_are_one_line(capfd, options, complaint):
    assert complaint in fail(capfd, ["adapt", *options])


def test_an_out_that_is_a_file_is_named(tmp_path, capfd):
    (tmp_path / "out").write_text("")
    assert str(tmp_path / "out") in fail(capfd, ["adapt", "--out", str(tmp_path / "out")])


def denied(path):
    return PermissionError(13, "Permission denied", path)


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


def test_a_command_is_required_and_help_succeeds(capfd):
    assert "command" in fail(capfd, [])
    assert cli.main(["adapt", "--help"]) == 0
    assert "--checkpoint-every" in capfd.readouterr().out


def test_labels_of_the_target_are_never_opened(folders):
    (folders / "dusk" / "labels").mkdir()
    for i in range(3):
        (folders / "dusk" / "labels" / f"dusk{i}.png").write_text("no label map")
    domains = folder_domains(*([str(folders / d)] for d in DIRS), crop=(32, 48))
    assert domains.target[0][1] is None and len(domains.test) == 3


@pytest.mark.parametrize(("limit", "kept"), [(50_000, False), (51_000, True)])
def test_data_is_kept_where_all_folders_fit_in_memory_together(folders, monkeypatch, limit, kept):
    monkeypatch.setattr(adapt_data, "_CACHE_BYTES", limit)  # 9 images and 6 labels take 50,688
    domains = folder_domains(*([str(folders / d)] for d in DIRS), crop=(32, 48))
    for folder in (domains.source, domains.target, domains.test):
        assert (folder[1][0] is folder[1][0]) == kept


def test_facts_of_a_checkpoint_must_be_those_of_the_run(tmp_path):
    with pytest.raises(CheckpointError, match="lr 1, this run has 2"):
        adapt._check_facts({"settings": {"lr": 1}}, {"settings": {"lr": 2}}, tmp_path)
