import contextlib
import json
import os
import resource
import shutil
import signal
import threading

import pytest
import torch
from adapt_runs import DIRS, ROOT, SMALL, command, fail, run
from PIL import Image

from fastmt import adapt, adapt_data, cli
from fastmt.adapt_data import folder_domains
from fastmt.checkpoint import CheckpointError, load


def test_example_script_trains_and_scores():
    script = ROOT / "examples" / "adapt.py"
    assert len(script.read_text().splitlines()) < 80
    status, stdout, stderr = run(script, "--steps", "2")
    assert (status, stderr) == (0, "")
    assert "mIoU on 16 test images" in stdout


def test_command_leaves_table_figures_picture_curves_and_checkpoints(folders):
    status, stdout, stderr = run("-m", "fastmt", *command(folders, "--seeds", "0", "1"))
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
