"""What `fastmt adapt` replaces in --out, and what it never touches."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from adapt_runs import command, fail, run, started, write_domains

from fastmt import adapt, adapt_out, checkpoint, cli

RESULTS = ("results.json", "table.md", "adapted.png")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = write_domains(tmp_path_factory.mktemp("ran"))
    threads = torch.get_num_threads()
    assert cli.main(command(folder, "--seeds", "0", "1")) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def finished(ran, tmp_path):
    """Data, and a finished run of two seeds in out/."""
    return shutil.copytree(ran, tmp_path / "copy")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_an_error_before_the_first_step_costs_nothing(finished, capfd, option):
    before = contents(finished / "out")
    assert "nowhere" in fail(capfd, command(finished, "--source", "nowhere", option))
    assert contents(finished / "out") == before


@pytest.mark.parametrize("left", [RESULTS, ()], ids=["finished", "unfinished"])
def test_an_earlier_run_is_not_replaced_untold(finished, capfd, left):
    for name in {*RESULTS} - {*left}:
        (finished / "out" / name).unlink()
    before = contents(finished / "out")
    line = fail(capfd, command(finished))
    assert str(finished / "out" / "seed1" / "source_only.pt") in line
    assert "--resume" in line and "--overwrite" in line and "another --out" in line
    assert contents(finished / "out") == before


def test_overwrite_leaves_nothing_of_the_earlier_run(finished):
    notes = finished / "out" / "seed0" / "notes.txt"
    notes.write_text("mine")
    assert cli.main(command(finished, "--overwrite", steps=3)) == 0
    out = finished / "out"
    assert sorted(p.name for p in out.glob("seed*/*.pt")) == ["adapted.pt", "source_only.pt"]
    assert all(checkpoint.load(p)["steps"] == 3 for p in out.glob("seed0/*.pt"))
    assert json.loads((out / "results.json").read_text())["settings"]["steps"] == 3
    assert len(list(out.glob("tensorboard/*/*"))) == 2
    assert notes.read_text() == "mine"


def test_an_overwriting_run_that_stops_early_can_be_resumed(finished, monkeypatch):
    train = adapt.train
    begun = []

    def only_the_first(*args, **options):
        if begun:
            raise KeyboardInterrupt
        begun.append(True)
        return train(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(adapt, "train", only_the_first)
        assert cli.main(command(finished, "--overwrite", steps=3)) == 130
    assert not any((finished / "out" / name).exists() for name in RESULTS)
    assert cli.main(command(finished, "--resume", steps=3)) == 0
    assert checkpoint.load(finished / "out" / "seed0" / "adapted.pt")["steps"] == 3


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize(
    "content", [b"mine", b'{"command": "make", "versions": {}}\n', b"[1]", b"\xff\xfe"]
)
def test_a_foreign_file_in_the_place_of_a_result_is_never_replaced(
    tmp_path, capfd, option, name, content
):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_bytes(content)
    line = fail(capfd, command(tmp_path, *option))
    assert f"{path}: is not of `fastmt adapt`; choose another --out" in line
    assert contents(tmp_path / "out") == {path: content}


def test_a_foreign_checkpoint_is_never_replaced(tmp_path, capfd):
    path = tmp_path / "out" / "seed0" / "adapted.pt"
    checkpoint.save(path, {"steps": 1, "extra": {"variant": "mine"}})
    before = path.read_bytes()
    for option in ([], ["--overwrite"]):
        line = fail(capfd, command(tmp_path, *option))
        assert f"{path}: is not of `fastmt adapt`" in line
    write_domains(tmp_path)
    assert str(path) in fail(capfd, command(tmp_path, "--resume"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "facts", [None, [1], {"settings": [1]}, {"variant": "source_only", "settings": None}]
)
def test_a_checkpoint_with_other_facts_is_named_and_not_resumed(tmp_path, capfd, facts):
    path = write_domains(tmp_path) / "out" / "seed0" / "source_only.pt"
    checkpoint.save(path, {"steps": 1, "extra": facts})
    assert f"{path}: was written with" in fail(capfd, command(tmp_path, "--resume"))


def test_what_stdout_or_utf8_cannot_write_is_escaped(tmp_path):
    folder = write_domains(tmp_path / os.fsdecode(b"d\xff"))
    words = command(folder, "--seeds", "0", "1", "--out", str(out := tmp_path / "out"))
    status, stdout, stderr = run("-m", "fastmt", *words, PYTHONIOENCODING="ascii")
    assert (status, stderr) == (0, "")
    assert "\\xb1" in stdout and "d\\udcff" in stdout
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "±" in table and "d\\udcff" in table
    assert set(RESULTS) <= set(os.listdir(out))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_run_whose_output_is_read_no_further_leaves_its_results(tmp_path, unbuffered):
    words = command(write_domains(tmp_path), steps=1)
    with started("-m", "fastmt", *words, PYTHONUNBUFFERED=unbuffered) as process:
        assert process.stdout.readline().startswith("Data: ")
        process.stdout.close()
        (line,) = process.stderr
    assert line == "fastmt adapt: error: nothing reads its output any more\n"
    assert process.returncode == 2
    assert set(RESULTS) <= set(os.listdir(tmp_path / "out"))


def test_a_run_whose_steps_were_left_out_says_so(tmp_path, capfd):
    assert cli.main(command(write_domains(tmp_path), "--lr", "1e30", steps=4)) == 0
    note = r"Note: source_only \(seed 0\): [123] of 4 steps were left out, as their loss or"
    assert re.search(note, capfd.readouterr().out)
    assert cli.main(command(tmp_path, "--overwrite")) == 0
    assert "left out" not in capfd.readouterr().out


def test_a_run_is_not_resumed_with_as_many_other_images(finished, capfd):
    before = contents(finished / "out")
    for i, path in enumerate(sorted((finished / "dusk" / "images").iterdir())):
        path.rename(path.with_name(f"night{i}.png"))
    assert cli.main(command(finished, "--resume")) == 2
    assert "names of images" in capfd.readouterr().err
    assert contents(finished / "out") == before


def test_a_checkpoint_that_names_no_images_is_resumed(finished):
    path = finished / "out" / "seed0" / "adapted.pt"
    state = checkpoint.load(path)
    del state["extra"]["names of images"]
    checkpoint.save(path, state)
    assert cli.main(command(finished, "--resume")) == 0


def test_results_behind_a_link_are_replaced_where_it_points(finished):
    figures, moved = finished / "out" / "results.json", finished / "moved.json"
    shutil.move(figures, moved)
    figures.symlink_to(moved)
    assert cli.main(command(finished, "--overwrite", steps=3)) == 0
    assert figures.is_symlink() and json.loads(moved.read_text())["settings"]["steps"] == 3


def test_resume_and_overwrite_exclude_each_other(capfd):
    assert "not allowed with" in fail(capfd, ["adapt", "--resume", "--overwrite"])


def test_every_file_of_a_run_is_known_as_its_own(finished):
    out = finished / "out"
    ours = [*(out / name for name in RESULTS), *out.glob("seed*/*.pt")]
    assert len(ours) == 7 and all(map(adapt_out._is_ours, ours))
