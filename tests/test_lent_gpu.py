"""What is packed for a GPU that is lent for minutes, and the script that runs there."""

import os
import subprocess
import tarfile

import pytest

from benchmarks.lent_gpu import pack

SCRIPT = pack.ROOT / "benchmarks" / "lent_gpu" / "run.sh"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    kept = tmp_path / pack.CACHE / "key"
    kept.mkdir(parents=True)
    (kept / "kernel.cubin").write_bytes(b"code")
    (kept / "kernel.ptx").write_text("text")
    return tmp_path


def test_a_pack_holds_code_and_of_texts_the_names(checkout):
    packed = checkout / "out" / "packed.tar.xz"
    files = [path for path in checkout.rglob("*") if path.is_file()]
    pack.pack(files, packed)
    with tarfile.open(packed) as archive:
        held = {member.name: archive.extractfile(member).read() for member in archive}
    key = f"{pack.CACHE}/key"
    assert held == {f"{key}/kernel.cubin": b"code", f"{key}/kernel.ptx": b""}


def test_nothing_is_packed_without_cuda_kernels(checkout):
    with pytest.raises(SystemExit, match="CUDA kernels are not built"):
        pack.built()


def test_each_step_leaves_its_results_in_one_file(checkout):
    """Python itself is a script here that says what it was asked and fails."""
    packed, out = checkout / "packed.tar.xz", checkout / "results"
    pack.pack([checkout / pack.CACHE / "key" / "kernel.cubin"], packed)
    python = checkout / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$2" = pip ] || { echo "$TRITON_CACHE_DIR $*"; exit 3; }\n')
    python.chmod(0o755)
    there = checkout / "there"
    there.mkdir()
    told = subprocess.run(
        ["bash", SCRIPT, packed, out, "choice", "times"],
        cwd=there,
        env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (there / pack.CACHE / "key" / "kernel.cubin").read_bytes() == b"code"
    assert [line.split(",")[0] for line in told.splitlines() if "status" in line] == [
        "choice: status 3",
        "times: status 3",
    ]
    with tarfile.open(out / "all.tar.xz") as archive:
        text = archive.extractfile("./times.txt").read().decode()
        assert "./choice.txt" in archive.getnames()
    assert text == f"{pack.CACHE} -m benchmarks.gpu --out {out} --minutes 4\n"
