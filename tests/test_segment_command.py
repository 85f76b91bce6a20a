"""`fastmt segment`: what it writes, and a one-line error for what it cannot do."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastmt
from fastmt import checkpoint, cli, segment_command
from fastmt.pictures import heat

ROOT = Path(__file__).parent.parent
SMALL = ["--crop", "32", "48", "--batch", "2", "--width", "2", "--threads", "1", "--steps", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of `fastmt adapt` on rendered scenes."""
    out = tmp_path_factory.mktemp("adapt")
    threads = torch.get_num_threads()
    assert cli.main(["adapt", *SMALL, "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    return out / "seed0" / "adapted.pt"


def write_image(path, size=(40, 52), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def photos(tmp_path):
    for k, name in enumerate(("a.png", "b.bmp")):
        write_image(tmp_path / "photos" / name, seed=k)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def read(path):
    with Image.open(path) as picture:
        return np.array(picture)


def fail(capfd, words):
    """The one line on stderr of a command that must fail with status 2."""
    assert cli.main(["segment", *map(str, words)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "error: " in lines[0], lines
    return lines[0]


def test_command_writes_labels_overlays_and_confidence_of_a_folder(trained, photos, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "fastmt", "segment", trained, photos, "--out", out, "--flip"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 images" in done.stdout and "mean confidence 0." in done.stdout
    assert str(out / "labels") in done.stdout
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*.*"))
    assert written == [f"{f}/{s}.png" for f in ("confidence", "labels", "overlays") for s in "ab"]
    labels = read(out / "labels" / "a.png")
    assert labels.dtype == np.uint8 and labels.shape == (40, 52)
    assert labels.max() < len(checkpoint.load(trained)["extra"]["classes"])
    for folder in ("overlays", "confidence"):
        assert read(out / folder / "b.png").shape == (40, 52, 3)


def test_written_labels_are_those_of_the_teacher(trained, photos, tmp_path):
    write_image(photos / "a.png", size=(37, 49))  # no multiple of the network's stride
    state, sharp = checkpoint.load(trained), tmp_path / "sharp.pt"
    teacher = state["teacher"]
    teacher["head.weight"] *= 100  # two steps leave it indifferent
    checkpoint.save(sharp, state)
    assert cli.main(["segment", str(sharp), str(photos), "--out", str(tmp_path / "o")]) == 0
    network = segment_command.load_teacher(sharp)
    assert all(torch.equal(v, teacher[n]) for n, v in network.state_dict().items())
    pixels = torch.from_numpy(read(photos / "a.png")).permute(2, 0, 1)
    score, label = fastmt.segment(network, pixels, divisor=network.stride)
    assert (fastmt.segment(network, pixels).score - score).abs().max() > 0.05
    assert np.array_equal(read(tmp_path / "o" / "labels" / "a.png"), label.numpy())
    shown = read(tmp_path / "o" / "confidence" / "a.png").astype(int)
    assert np.abs(shown - heat(score).astype(int)).max() <= 1


def test_pixels_below_a_score_are_void(trained, photos, tmp_path):
    words = ["segment", str(trained), str(photos / "a.png"), "--out", str(tmp_path / "o")]
    assert cli.main([*words, "--void-below", "1"]) == 0
    assert (read(tmp_path / "o" / "labels" / "a.png") == 255).all()


@pytest.mark.parametrize("options", [[], ["--void-below", "0.5"]])
def test_pixels_whose_score_is_nan_are_void(trained, photos, tmp_path, options):
    state = checkpoint.load(trained)
    state["teacher"]["head.bias"][1] = torch.nan
    checkpoint.save(tmp_path / "nan.pt", state)
    words = ["segment", str(tmp_path / "nan.pt"), str(photos / "a.png")]
    assert cli.main([*words, "--out", str(tmp_path / "o"), *options]) == 0
    assert (read(tmp_path / "o" / "labels" / "a.png") == 255).all()


def test_tiles_flips_and_scales_are_options(trained, tmp_path):
    write_image(tmp_path / "large.png", size=(100, 150))
    words = ["segment", str(trained), str(tmp_path / "large.png"), "--out", str(tmp_path / "o")]
    options = ["--tile", "64", "--flip", "--scales", "1", "0.75"]
    assert cli.main([*words, *options, "--overlap", "16"]) == 0
    assert cli.main([*words, *options]) == 0
    assert read(tmp_path / "o" / "labels" / "large.png").shape == (100, 150)


def test_a_second_run_replaces_its_own_results(trained, photos, tmp_path):
    words = ["segment", str(trained), str(photos), "--out", str(tmp_path / "o")]
    assert cli.main(words) == 0
    first = read(tmp_path / "o" / "overlays" / "a.png")
    write_image(photos / "a.png", seed=9)
    assert cli.main(words) == 0
    assert not np.array_equal(read(tmp_path / "o" / "overlays" / "a.png"), first)
    assert not list((tmp_path / "o").rglob("*.tmp"))


def test_no_image_is_ever_overwritten(trained, tmp_path, capfd):
    pixels = write_image(tmp_path / "o" / "labels" / "a.png")
    words = [trained, tmp_path / "o" / "labels", "--out", tmp_path / "o"]
    assert "a.png: is one of the images; choose another --out" in fail(capfd, words)
    assert np.array_equal(read(tmp_path / "o" / "labels" / "a.png"), pixels)


@pytest.mark.parametrize("content", [None, b"notes"])
def test_labels_that_the_command_did_not_write_are_never_replaced(
    trained, photos, tmp_path, capfd, content
):
    truth = tmp_path / "labels" / "b.png"
    write_image(truth)
    if content is not None:
        truth.write_bytes(content)
    before = truth.read_bytes()
    line = fail(capfd, [trained, photos, "--out", tmp_path])
    assert f"{truth}: is not of `fastmt segment`; choose another --out" in line
    assert truth.read_bytes() == before
    assert not (tmp_path / "overlays").exists()


def test_ctrl_c_is_one_line_and_status_130(trained, photos, tmp_path, capfd, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(segment_command, "read_image", press)
    words = ["segment", str(trained), str(photos), "--out", str(tmp_path / "o")]
    assert cli.main(words) == 130
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"fastmt segment: interrupted; what is finished is in {tmp_path / 'o'}"


def test_two_images_of_one_stem_are_refused(trained, photos, tmp_path, capfd):
    write_image(tmp_path / "more" / "a.png")
    line = fail(capfd, [trained, photos, tmp_path / "more", "--out", tmp_path / "o"])
    assert f"{tmp_path / 'more' / 'a.png'}: same stem as {photos / 'a.png'}" in line
    assert not (tmp_path / "o").exists()


def test_stems_that_differ_in_case_alone_are_one_stem(trained, photos, tmp_path, capfd):
    write_image(tmp_path / "more" / "A.png")
    line = fail(capfd, [trained, photos, tmp_path / "more", "--out", tmp_path / "o"])
    assert f"{tmp_path / 'more' / 'A.png'}: same stem as {photos / 'a.png'}" in line


def test_missing_and_empty_places_are_named(trained, photos, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "o"]
    assert "nowhere: no such file or folder" in fail(capfd, [trained, tmp_path / "nowhere", *out])
    assert "empty: no image in it" in fail(capfd, [trained, tmp_path / "empty", *out])
    assert "no.pt: no such file" in fail(capfd, [tmp_path / "no.pt", photos, *out])


@pytest.fixture
def waits_for_nobody():
    """A test that waits for what never comes fails."""

    def fail(*_):
        raise AssertionError("it waits")

    former = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.mark.usefixtures("waits_for_nobody")
def test_what_is_no_file_is_named_for_what_it_is_and_not_waited_for(
    trained, photos, tmp_path, capfd
):
    out = tmp_path / "o"
    (photos / "c.png").mkdir()
    line = fail(capfd, [trained, photos, "--out", out])
    assert f"{photos / 'c.png'}: is a folder, expected a picture" in line
    (photos / "c.png").rmdir()
    os.mkfifo(photos / "c.png")
    for given in (photos, photos / "c.png"):
        line = fail(capfd, [trained, given, "--out", out])
        assert f"{photos / 'c.png'}: is a pipe or a device, expected a picture" in line


@pytest.mark.usefixtures("waits_for_nobody")
def test_a_pipe_in_the_place_of_a_result_is_not_replaced(trained, photos, tmp_path, capfd):
    (tmp_path / "o" / "labels").mkdir(parents=True)
    os.mkfifo(tmp_path / "o" / "labels" / "a.png")
    line = fail(capfd, [trained, photos, "--out", tmp_path / "o"])
    assert "a.png: is not of `fastmt segment`; choose another --out" in line


def test_an_empty_path_is_not_the_current_folder(trained, photos, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(photos)
    before = set(photos.iterdir())
    for words in (
        ["", photos, "--out", "o"],
        [trained, "", "--out", "o"],
        [trained, photos, "--out", ""],
    ):
        assert "got '', expected a path" in fail(capfd, words)
    assert set(photos.iterdir()) == before


def test_damaged_images_and_checkpoints_are_named(trained, photos, tmp_path, capfd):
    out = ["--out", tmp_path / "o"]
    whole = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(whole[: len(whole) // 2])
    assert "a.png: cannot be decoded" in fail(capfd, [trained, photos / "a.png", *out])
    cut = tmp_path / "cut.pt"
    cut.write_bytes(trained.read_bytes()[:5000])
    assert "cut.pt: is truncated" in fail(capfd, [cut, photos / "b.bmp", *out])
    foreign = tmp_path / "foreign.pt"
    checkpoint.save(foreign, {"student": {}})
    line = fail(capfd, [foreign, photos / "b.bmp", *out])
    assert "foreign.pt: does not say which network it holds; use a checkpoint of" in line


@pytest.mark.parametrize(
    ("width", "classes"), [(2, 3), (2, None), (3, ["a"]), ("wide", ["a"]), (2, [])]
)
def test_a_checkpoint_that_says_it_in_another_way_is_named(photos, tmp_path, capfd, width, classes):
    facts = {"settings": {"width": width}, "classes": classes}
    checkpoint.save(tmp_path / "own.pt", {"teacher": {}, "extra": facts})
    line = fail(capfd, [tmp_path / "own.pt", photos, "--out", tmp_path / "out"])
    assert "own.pt: does not say which network it holds" in line


def test_a_checkpoint_of_another_architecture_is_named(trained, photos, tmp_path, capfd):
    state = checkpoint.load(trained)
    state["extra"]["settings"]["width"] = 4
    checkpoint.save(tmp_path / "other.pt", state)
    line = fail(capfd, [tmp_path / "other.pt", photos, "--out", tmp_path / "o"])
    assert "other.pt: entry 'stem" in line and "the network expects" in line


def test_an_out_that_cannot_be_written_is_named(trained, photos, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    line = fail(capfd, [trained, photos, "--out", tmp_path / "file"])
    assert str(tmp_path / "file") in line and "choose a writable --out" in line


def test_a_full_disk_leaves_no_half_picture(trained, tmp_path, capfd):
    write_image(tmp_path / "large.png", size=(200, 200))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        line = fail(capfd, [trained, tmp_path / "large.png", "--out", tmp_path / "o"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert "free space" in line
    assert not list((tmp_path / "o").rglob("*.*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tile", "63"], "--tile: got '63', expected a multiple of 4"),
        (["--tile", "8"], "--tile: got '8', expected an integer >= 32"),
        (["--tile", "1" + 400 * "0"], "expected an integer >= 32 and <= 268435456"),
        (["--tile", "64", "--overlap", "64"], "--overlap 64 is not less than --tile 64"),
        (["--tile", "64", "--scales", "1", "4"], "--tile 64 / 4, the largest of --scales"),
        (["--tile", "64", "--overlap", "32", "--scales", "2"], "--overlap 32 is not less than"),
        (["--overlap", "16"], "--overlap is that of tiles; give --tile too"),
        (["--scales", "0"], "--scales: got '0'"),
        (["--scales", "1e18"], "--scales: got '1e18', expected a number > 0 and <= 1e+09"),
        (["--threads", "9999999999"], "--threads: got '9999999999', expected an integer >= 1 and"),
        (["--device", "meta"], "--device: got 'meta', which is not available"),
        (["--scales", "1e9"], "out of memory; choose a smaller --tile or --scales"),
        (["--void-below", "2"], "--void-below: got '2'"),
    ],
)
def test_options_that_do_not_fit_are_named(trained, photos, capfd, options, message):
    assert message in fail(capfd, [trained, photos, "--out", "unused", *options])
