"""Images and labels read from folders."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastmt.data import DataError, SegmentationFolder


def write(root, stem, *, image=None, label=None, suffix=".png"):
    """A pair of files; returns (image, label) arrays."""
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3) if image is None else image
    label = np.arange(48, dtype=np.uint8).reshape(6, 8) % 3 if label is None else label
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / "images" / f"{stem}{suffix}")
    Image.fromarray(label).save(root / "labels" / f"{stem}.png")
    return image, label


def test_items_are_the_files_in_order_of_their_stems(tmp_path):
    write(tmp_path, "b")
    image, label = write(tmp_path, "a", image=np.full((6, 8, 3), 7, np.uint8))
    data = SegmentationFolder(tmp_path)
    assert len(data) == 2 and [data.stem(i) for i in range(2)] == ["a", "b"]
    got = data[0]
    assert got[0].dtype == got[1].dtype == torch.uint8
    np.testing.assert_array_equal(got[0].permute(1, 2, 0).numpy(), image)
    np.testing.assert_array_equal(got[1].numpy(), label)
    assert len(list(data)) == 2


def test_subfolders_and_sequences_are_joined_in_order(tmp_path):
    for part in ("val", "train", "test"):
        write(tmp_path / part, f"{part}0")
    (tmp_path / "notes").mkdir()
    write(tmp_path / ".trash", "deleted")
    data = SegmentationFolder(tmp_path)
    assert [data.stem(i) for i in range(3)] == ["test0", "train0", "val0"]
    data = SegmentationFolder([tmp_path / "val", str(tmp_path / "train")])
    assert [data.stem(i) for i in range(2)] == ["val0", "train0"]


def test_a_folder_may_be_named_like_a_user_that_there_is_none_of(tmp_path, monkeypatch):
    write(tmp_path / "~nobody-here", "a")
    monkeypatch.chdir(tmp_path)
    assert len(SegmentationFolder("~nobody-here")) == 1


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".bmp", ".WebP", ".PNG"])
def test_image_formats_are_found_in_any_case(tmp_path, suffix):
    write(tmp_path, "a", suffix=suffix)
    (tmp_path / "images" / ".hidden.png").write_bytes(b"")
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"")
    data = SegmentationFolder(tmp_path)
    data.check()
    assert len(data) == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_any_8_bit_mode_become_rgb(tmp_path, mode):
    write(tmp_path, "a")
    Image.new(mode, (8, 6)).save(tmp_path / "images" / "a.png")
    assert SegmentationFolder(tmp_path)[0][0].shape == (3, 6, 8)


def test_the_cache_changes_nothing_but_the_reading(tmp_path):
    write(tmp_path, "a")
    cached, fresh = (SegmentationFolder(tmp_path, cache=c) for c in (True, False))
    first = cached[0]
    (tmp_path / "images" / "a.png").unlink()
    assert cached[0][0] is first[0]
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        fresh[0]


def test_an_image_smaller_than_a_crop_is_named_by_its_file(tmp_path):
    write(tmp_path, "a")
    data = SegmentationFolder(tmp_path)
    data.check(crop=(6, 8))
    for crop in ((7, 8), (6, 9)):
        message = rf"a\.png: image is 8x6, smaller than the crop {crop[1]}x{crop[0]}; choose"
        with pytest.raises(DataError, match=message):
            data.check(crop=crop)


def test_an_unlabelled_folder_needs_no_labels(tmp_path):
    write(tmp_path, "a")
    (tmp_path / "labels" / "a.png").unlink()
    (tmp_path / "labels").rmdir()
    image, label = SegmentationFolder(tmp_path, labelled=False)[0]
    assert image.shape == (3, 6, 8) and label is None


def test_the_number_of_classes_follows_from_the_labels_without_void(tmp_path):
    label = np.full((6, 8), 255, np.uint8)
    label[0, 0] = 4
    write(tmp_path, "a", label=label)
    write(tmp_path, "b")
    data = SegmentationFolder(tmp_path)
    assert data.classes == tuple(f"class {c}" for c in range(5))
    assert data.palette.shape == (5, 3)


@pytest.mark.parametrize("beside", [True, False])
def test_class_names_come_from_a_file_in_the_root_or_above(tmp_path, beside):
    write(tmp_path / "day", "a")
    where = tmp_path / "day" if beside else tmp_path
    (where / "classes.txt").write_text("\ufeffroad\nsky \ncar\n", encoding="utf-8")
    assert SegmentationFolder(tmp_path / "day").classes == ("road", "sky", "car")


def test_given_names_win_over_the_file(tmp_path):
    write(tmp_path, "a")
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    assert SegmentationFolder(tmp_path, classes=["p", "q", "r"]).classes == ("p", "q", "r")


def test_palette_labels_give_indices_and_bilevel_labels_give_bits(tmp_path):
    _, ids = write(tmp_path, "a")
    picture = Image.new("P", (8, 6))
    picture.putdata(ids.ravel().tolist())
    picture.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200])
    picture.save(tmp_path / "labels" / "a.png")
    _, bits = write(tmp_path, "b", label=np.eye(6, 8) > 0)
    data = SegmentationFolder(tmp_path)
    np.testing.assert_array_equal(data[0][1].numpy(), ids)
    np.testing.assert_array_equal(data[1][1].numpy(), bits)


def png(width, height, depth, colour, raw):
    """A PNG of a kind that pillow cannot write, from its filtered rows."""

    def chunk(kind, body):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def grey_png(ids, depth):
    """A grey PNG of few bits."""
    h, w = ids.shape
    per_byte = 8 // depth
    shifts = np.arange(per_byte)[::-1] * depth
    rows = (ids.reshape(h, w // per_byte, per_byte) << shifts).sum(-1).astype(np.uint8)
    return png(w, h, depth, 0, b"".join(b"\0" + row.tobytes() for row in rows))


@pytest.mark.parametrize("depth", [2, 4])
def test_grey_labels_of_few_bits_are_not_stretched(tmp_path, depth):
    _, ids = write(tmp_path, "a")
    (tmp_path / "labels" / "a.png").write_bytes(grey_png(ids.astype(np.int64), depth))
    np.testing.assert_array_equal(SegmentationFolder(tmp_path)[0][1].numpy(), ids)


def test_images_are_turned_as_their_exif_says(tmp_path):
    write(tmp_path, "a", image=np.zeros((8, 6, 3), np.uint8), suffix=".jpg")
    path = tmp_path / "images" / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 8)).save(path, exif=exif)
    SegmentationFolder(tmp_path).check()
