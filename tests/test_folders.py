"""Images and labels read from folders."""

import builtins
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


def no_folder(root):
    return root / "nowhere", {}, "nowhere: no such folder"


def no_images_folder(root):
    (root / "pictures").mkdir()
    return root, {}, "no images/ folder in it or in its subfolders"


def empty_images(root):
    (root / "images").mkdir()
    return root, {}, "images: no image in it"


def no_labels_folder(root):
    write(root, "a")
    (root / "labels").rename(root / "masks")
    return root, {}, "labels: no such folder; .* labelled=False"


def image_without_label(root):
    write(root, "a")
    write(root, "b")
    (root / "labels" / "b.png").unlink()
    return root, {}, r"images/b.png: no label .*labels/b.png; .*labelled=False"


def label_without_image(root):
    write(root, "a")
    write(root, "b")
    (root / "images" / "b.png").unlink()
    return root, {}, "labels/b.png: no image of this stem"


def repeated_stem(root):
    write(root, "a")
    write(root, "a", suffix=".bmp")
    return root, {}, "a.png: same stem as a.bmp"


def names_that_do_not_match(root):
    write(root, "a")
    (root / "classes.txt").write_text("x\ny\n")
    return root, {"num_classes": 3}, "^num_classes: got 3, expected 2, .*classes.txt"


def blank_name(root):
    write(root, "a")
    (root / "classes.txt").write_text("x\n\ny\n")
    return root, {}, "classes.txt: empty file or empty line"


def no_class(root):
    write(root, "a")
    return root, {"num_classes": 0}, "num_classes: got 0, expected 1 to 255"


def fewer_than_no_class(root):
    write(root, "a")
    return root, {"num_classes": -3, "labelled": False}, "num_classes: got -3, expected 1 to 255"


def no_name(root):
    write(root, "a")
    return root, {"classes": []}, "classes: got no name"


def more_names_than_labels_hold(root):
    write(root, "a")
    return root, {"classes": ["x"] * 256}, "^classes: got 256 classes, expected at most 255"


def only_void(root):
    write(root, "a", label=np.full((6, 8), 255, np.uint8))
    return root, {}, "every label pixel is void"


@pytest.mark.parametrize(
    "broken",
    [
        no_folder,
        no_images_folder,
        empty_images,
        no_labels_folder,
        image_without_label,
        label_without_image,
        repeated_stem,
        names_that_do_not_match,
        blank_name,
        no_class,
        fewer_than_no_class,
        no_name,
        more_names_than_labels_hold,
        only_void,
    ],
)
def test_structural_problems_are_found_at_construction(broken, tmp_path):
    root, arguments, message = broken(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        SegmentationFolder(root, **arguments)
    assert "\n" not in str(caught.value)


def truncated_image(root):
    path = root / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:50])
    return "images/b.png: cannot be decoded"


def truncated_label(root):
    path = root / "labels" / "b.png"
    path.write_bytes(path.read_bytes()[:50])
    return "labels/b.png: cannot be decoded"


def text_as_image(root):
    (root / "images" / "b.png").write_text("not an image")
    return "images/b.png: cannot be decoded"


def empty_label(root):
    (root / "labels" / "b.png").write_bytes(b"")
    return "labels/b.png: cannot be decoded"


def other_size(root):
    Image.new("L", (5, 4)).save(root / "labels" / "b.png")
    return "labels/b.png: label is 5x4 but its image is 8x6"


def id_outside(root):
    Image.fromarray(np.full((6, 8), 7, np.uint8)).save(root / "labels" / "b.png")
    return r"labels/b.png: label id 7 is outside 0\.\.2 for 3 classes"


def sixteen_bits(root):
    Image.fromarray(np.zeros((6, 8), np.uint16)).save(root / "labels" / "b.png")
    return "labels/b.png: 16-bit label"


def coloured_label(root):
    Image.new("RGB", (8, 6)).save(root / "labels" / "b.png")
    return "labels/b.png: RGB label; save class ids"


def sixteen_bit_image(root):
    Image.fromarray(np.zeros((6, 8), np.uint16)).save(root / "images" / "b.png")
    return "images/b.png: .* more than 8 bits"


def sixteen_bits_a_colour(root):
    path = root / "images" / "b.png"
    path.write_bytes(png(8, 6, 16, 2, (b"\0" + bytes(48)) * 6))
    return "images/b.png: .* more than 8 bits"


def label_of_another_format(root):
    label = Image.fromarray(np.zeros((6, 8), np.uint8))
    label.save(root / "labels" / "b.png", format="JPEG")
    return "labels/b.png: is no PNG file"


@pytest.mark.parametrize(
    "spoil",
    [
        truncated_image,
        truncated_label,
        text_as_image,
        empty_label,
        other_size,
        id_outside,
        sixteen_bits,
        coloured_label,
        sixteen_bit_image,
        sixteen_bits_a_colour,
        label_of_another_format,
    ],
)
def test_content_problems_are_found_when_the_item_is_read(spoil, tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b")
    message = spoil(tmp_path)
    data = SegmentationFolder(tmp_path, num_classes=3)
    assert data[0][1] is not None
    for read in (lambda: data[1], data.check):
        with pytest.raises(DataError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_one_string_is_no_sequence_of_class_names(tmp_path):
    write(tmp_path, "a")
    with pytest.raises(TypeError, match="^classes: got 'road', expected a sequence of names"):
        SegmentationFolder(tmp_path, classes="road")


def test_an_empty_sequence_of_folders_is_refused():
    with pytest.raises(
        DataError, match="^root: got an empty sequence, expected at least one folder"
    ):
        SegmentationFolder([])


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "fastmt\[train\]"'):
        SegmentationFolder(tmp_path)
