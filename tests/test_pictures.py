"""Coloured label maps and panels."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmt.pictures import VOID_COLOUR, colour, default_palette, panel, software_of, write_png


@pytest.mark.parametrize("num_classes", [0, 1, 8, 11, 19, 150, 255])
def test_palette_colours_are_distinct_and_differ_from_void(num_classes):
    palette = default_palette(num_classes)
    assert palette.shape == (num_classes, 3) and palette.dtype == np.uint8
    assert len({tuple(c) for c in palette.tolist()} | {VOID_COLOUR}) == num_classes + 1


def test_first_colours_are_well_separated():
    palette = default_palette(24).astype(float)
    apart = np.linalg.norm(palette[:, None] - palette[None], axis=-1)
    assert apart[np.triu_indices(24, 1)].min() > 40


def test_a_class_keeps_its_colour_when_classes_are_added():
    np.testing.assert_array_equal(default_palette(30)[:13], default_palette(13))


def test_too_many_classes_are_refused():
    with pytest.raises(ValueError, match=r"^num_classes: got 256, expected a number in \[0, 255\]"):
        default_palette(256)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_each_pixel_gets_its_colour_and_void_is_dark(kind):
    palette = default_palette(3)
    label = kind(np.array([[0, 1], [2, 255]], np.uint8))
    painted = colour(label, palette)
    assert painted.dtype == np.uint8
    np.testing.assert_array_equal(painted.reshape(4, 3), [*palette, VOID_COLOUR])


def test_an_id_without_colour_is_named():
    with pytest.raises(ValueError, match=r"^label: got id 3, expected 0\.\.2, the colours"):
        colour(np.array([[3]]), default_palette(3))
    with pytest.raises(ValueError, match="^label: got id -1"):
        colour(np.array([[-1]]), default_palette(3))
    with pytest.raises(ValueError, match=r"^label: got shape \(1, 2, 2\), expected \(H, W\)"):
        colour(np.zeros((1, 2, 2), np.uint8), default_palette(3))


def flat(rgb, size=(20, 30)):
    return np.full((*size, 3), rgb, np.uint8)


def test_a_panel_holds_every_image_enlarged_by_an_integer(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    images = [flat(c) for c in colours]
    panel([images[:2], images[2:]], ["a", "b"], tmp_path / "p.png")
    sheet = np.array(Image.open(tmp_path / "p.png"))
    assert sheet.shape[1] >= 320
    factor = -(-320 // 60)
    for c in colours:
        rows, columns = np.nonzero((sheet == c).all(-1))
        assert len(rows) == 20 * 30 * factor**2
        assert np.ptp(rows) + 1 == 20 * factor and np.ptp(columns) + 1 == 30 * factor


def test_large_images_are_not_enlarged(tmp_path):
    panel([[flat((9, 99, 9), (10, 400))]], ["x"], tmp_path / "p.png")
    sheet = np.array(Image.open(tmp_path / "p.png"))
    assert (sheet == (9, 99, 9)).all(-1).sum() == 4000


def test_a_long_title_widens_its_column_instead_of_overlapping(tmp_path):
    title = "a title much wider than any of the images " * 3
    panel([[flat(0)]], [title], tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as sheet:
        assert sheet.width > 600


def test_the_legend_shows_every_colour_and_stays_within_the_panel(tmp_path):
    names, palette = [f"class number {c}" for c in range(30)], default_palette(30)
    panel([[flat(1)]], ["x"], tmp_path / "p.png", legend=(names, palette))
    sheet = np.array(Image.open(tmp_path / "p.png"))
    assert sheet.shape[1] < 420
    for c in palette:
        assert (sheet == c).all(-1).sum() >= 100


def test_tensors_are_images_too(tmp_path):
    panel([[torch.zeros(4, 4, 3, dtype=torch.uint8)]], ["x"], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 0


def test_a_failed_write_leaves_the_old_picture_and_no_scraps(tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    panel([[flat(1)]], ["x"], path)
    before = path.read_bytes()

    def fail(self, file, **kwargs):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        panel([[flat(2)]], ["x"], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_a_picture_is_written_to_where_a_link_points(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "p.png").symlink_to(tmp_path / "elsewhere" / "p.png")
    write_png(flat(3), tmp_path / "p.png", software="one")
    panel([[flat(2)]], ["x"], tmp_path / "p.png", software="two")
    assert (tmp_path / "p.png").is_symlink()
    assert software_of(tmp_path / "elsewhere" / "p.png") == "two"


@pytest.mark.parametrize("letter", ["x", "\N{CJK UNIFIED IDEOGRAPH-540D}"])
def test_a_picture_may_have_the_longest_name_that_a_file_can_have(tmp_path, letter):
    name = letter * (251 // len(letter.encode()))
    write_png(flat(3), tmp_path / f"{name}.png")
    assert [path.stem for path in tmp_path.iterdir()] == [name]


def test_a_picture_too_large_to_open_has_no_known_origin(tmp_path, monkeypatch):
    write_png(flat(3), tmp_path / "p.png", software="one")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert software_of(tmp_path / "p.png") is None


def test_a_texture_of_an_unknown_kind_has_no_known_origin(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "p.png", format="DDS")
    content = bytearray((tmp_path / "p.png").read_bytes())
    content[80:84] = bytes(4)  # flags of the pixel format: none
    (tmp_path / "p.png").write_bytes(content)
    assert software_of(tmp_path / "p.png") is None


@pytest.mark.parametrize(
    ("rows", "titles", "message"),
    [
        ([], ["a"], "^rows, titles: got 0 and 1, expected at least one of each"),
        ([[flat(0)]], ["a", "b"], r"^rows\[0\]: got 1 images, expected 2"),
        ([[np.zeros((3, 4, 4), np.uint8)]], ["a"], r"^rows\[0\]\[0\]: got uint8 \(3"),
        (
            [[np.zeros((4, 4, 3), np.float32)]],
            ["a"],
            r"got float32 \(4, 4, 3\), expected uint8 \(H, W, 3\)",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(rows, titles, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        panel(rows, titles, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())
