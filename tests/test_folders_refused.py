"""Folders and files that cannot be used are named with what is wrong."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from PIL import Image, features
from test_folders import png, write

from fastmt.data import DataError, SegmentationFolder


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


def names_in_another_encoding(root):
    write(root, "a")
    (root / "classes.txt").write_bytes("Straße\n".encode("latin-1"))
    return root, {}, "classes.txt: not UTF-8 text; save it as UTF-8"


def no_class(root):
    write(root, "a")
    return root, {"num_classes": 0}, "num_classes: got 0, expected 1 to 255"


def more_classes_than_ids(root):
    write(root, "a")
    return root, {"num_classes": 256, "labelled": False}, "num_classes: got 256, expected 1 to 255"


def more_classes_than_fit_in_memory(root):
    write(root, "a")
    return root, {"num_classes": 10**30}, "num_classes: got 10{30}, expected 1 to 255"


def fewer_than_no_class(root):
    write(root, "a")
    return root, {"num_classes": -3, "labelled": False}, "num_classes: got -3, expected 1 to 255"


def no_name(root):
    write(root, "a")
    return root, {"classes": []}, "classes: got no name"


def empty_name(root):
    write(root, "a")
    return root, {"classes": ["", "road"]}, "classes: got '', expected a name of one line"


def name_of_a_space(root):
    write(root, "a")
    return root, {"classes": ["road", " "]}, "classes: got ' ', expected a name of one line"


def name_of_two_lines(root):
    write(root, "a")
    return root, {"classes": ["a\nb", "road"]}, r"classes: got 'a\\nb', expected a name of one line"


def more_names_than_labels_hold(root):
    write(root, "a")
    return root, {"classes": ["x"] * 256}, "^classes: got 256 classes, expected at most 255"


def one_name_for_two_classes(root):
    write(root, "a")
    (root / "classes.txt").write_text("road\nsky\nroad\n")
    return root, {}, "classes.txt: got 'road' for 2 classes, expected a name for each"


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
        names_in_another_encoding,
        no_class,
        fewer_than_no_class,
        more_classes_than_ids,
        more_classes_than_fit_in_memory,
        no_name,
        empty_name,
        name_of_a_space,
        name_of_two_lines,
        more_names_than_labels_hold,
        one_name_for_two_classes,
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


def damaged_avif_of_another_name(root):
    if not features.check("avif"):
        pytest.skip("this pillow decodes no AVIF")
    path = root / "images" / "b.png"
    Image.new("RGB", (8, 6)).save(path, format="AVIF")
    path.write_bytes(path.read_bytes().replace(b"av01", b"av09"))
    return "images/b.png: cannot be decoded"


def unknown_texture_of_another_name(root):
    path = root / "images" / "b.png"
    Image.new("RGB", (8, 6)).save(path, format="DDS")
    content = bytearray(path.read_bytes())
    content[80:84] = bytes(4)  # of the pixel format: none that there is
    path.write_bytes(content)
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
        damaged_avif_of_another_name,
        unknown_texture_of_another_name,
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
