"""Files that are damaged, or no checkpoint, are named with a remedy."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from test_checkpoint import one_line, some_state, write_a
from torch import nn

from fastmt.checkpoint import CheckpointError, load, save, save_weights


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named(tmp_path, share):
    path = tmp_path / "a.pt"
    save(path, some_state())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="truncated .*; restore a complete copy") as info:
        load(path)
    assert one_line(info).startswith(str(path))


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    write_a(path, 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged .*; restore an intact copy"):
        load(path)


def test_weights_whose_record_is_marked_as_a_folder_are_not_read_as_nothing(tmp_path):
    path = tmp_path / "a.pt"
    write_a(path, 1)
    content = bytearray(path.read_bytes())
    attributes = content.rindex(b"archive/data/0") - 8  # in the directory at the end of an archive
    content[attributes] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged .*data/0.*; restore an intact copy"):
        load(path)


def test_checksums_are_written_even_where_they_are_switched_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        write_a(tmp_path / "a.pt", 1)
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert load(tmp_path / "a.pt")["step"] == 1


class Malicious:
    def __init__(self, witness):
        self.witness = str(witness)

    def __reduce__(self):
        return Path.touch, (Path(self.witness),)


def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path):
    path, witness = tmp_path / "a.pt", tmp_path / "witness"
    state = {"format": "fastmt-checkpoint", "version": 1, "state": {"model": Malicious(witness)}}
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="never loaded; use a checkpoint") as info:
        load(path)
    assert one_line(info).startswith(str(path))
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists()  # the file would indeed have run code


def foreign_text(path):
    path.write_text("no checkpoint")


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


def foreign_torch(path):
    torch.save({"model": torch.zeros(3)}, path)


def newer_version(path):
    torch.save({"format": "fastmt-checkpoint", "version": 2, "state": {}}, path)


def without_state(path):
    torch.save({"format": "fastmt-checkpoint", "version": 1}, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file; check the path"),
        (Path.mkdir, "is not a file; give the checkpoint file"),
        (foreign_text, "truncated or no checkpoint of fastmt"),
        (foreign_zip, "cannot be loaded onto cpu .*use a checkpoint written by fastmt"),
        (foreign_torch, "format tag 'fastmt-checkpoint' missing.*use a file written by"),
        (newer_version, "version 2, this fastmt reads 1; use the fastmt that wrote it"),
        (without_state, "holds no state; restore an intact copy"),
    ],
)
def test_files_that_are_no_checkpoint_are_named_with_a_remedy(tmp_path, make, message):
    path = tmp_path / "a.pt"
    make(path)
    with pytest.raises(CheckpointError, match=message) as info:
        load(path)
    assert one_line(info).startswith(str(path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_a_device_that_is_missing_is_told_apart_from_a_bad_file(tmp_path):
    write_a(tmp_path / "a.pt", 1)
    with pytest.raises(CheckpointError, match="onto cuda .*; check map_location") as info:
        load(tmp_path / "a.pt", map_location="cuda")
    one_line(info)


def freed():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def made_of_others():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (made_of_others, "is made of other tensors, expected a single one"),
        (lambda: torch.ones(3, device="meta"), "is on the meta device, expected a .* with memory"),
        (lambda: torch.ones(3).to_mkldnn(), "is torch._mkldnn, expected a .*"),
        (freed, "its storage was freed, expected memory"),
    ],
    ids=["nested", "meta", "mkldnn", "freed"],
)
@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_a_tensor_that_no_file_holds_is_named(tmp_path, make, found):
    with pytest.raises(TypeError, match=rf"^state\['model'\]\['bias'\]: {found}$"):
        save(tmp_path / "a.pt", {"model": {"bias": make()}})
    with pytest.raises(TypeError, match=rf"^state_dict\['bias'\]: {found}$"):
        save_weights(tmp_path / "a.safetensors", {"weight": torch.ones(2), "bias": make()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: torch.eye(3).to_sparse(), "is torch.sparse_coo, expected a dense tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "is torch.sparse_csr, expected a dense tensor"),
        (lambda: torch.ones(3).cdouble(), "is torch.complex128, which safetensors lacks"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "is torch.qint8, expected a dense tensor",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(quantize|Sparse|TypedStorage).*")
def test_a_tensor_that_no_safetensors_file_holds_is_named_and_a_checkpoint_holds_it(
    tmp_path, make, found
):
    with pytest.raises(TypeError, match=rf"^state_dict\['bias'\]: {found}$"):
        save_weights(tmp_path / "a.safetensors", {"weight": torch.ones(2), "bias": make()})
    save(tmp_path / "a.pt", {"bias": make()})
    loaded, saved = load(tmp_path / "a.pt")["bias"], make()
    assert (loaded.dtype, loaded.layout) == (saved.dtype, saved.layout)
    assert str(loaded) == str(saved)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (nn.Linear(2, 2), "got Linear, expected a state dict, as module.state_dict()"),
        ({1: torch.ones(2)}, "got a int as key, expected a string"),
    ],
)
def test_weights_that_are_no_state_dict_are_named(tmp_path, wrong, found):
    with pytest.raises(TypeError, match=f"^state_dict: {found}"):
        save_weights(tmp_path / "a.safetensors", wrong)
