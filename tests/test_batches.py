"""Batches as a function of seed and step."""

from collections import Counter

import numpy as np
import pytest
import torch

from fastmt.data import Batches, DataError, Scenes


class Numbered:
    """Image i is a coordinate grid: channels hold row, column and i; the label is the row."""

    classes = ("only",)
    palette = np.zeros((1, 3), np.uint8)

    def __init__(self, count, sizes=((20, 30),), labelled=True):
        self.count, self.sizes, self.labelled = count, sizes, labelled

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        h, w = self.sizes[i % len(self.sizes)]
        rows = torch.arange(h, dtype=torch.uint8)[:, None].expand(h, w)
        columns = torch.arange(w, dtype=torch.uint8).expand(h, w)
        image = torch.stack([rows, columns, torch.full((h, w), i, dtype=torch.uint8)])
        return image, rows.clone() if self.labelled else None

    def stem(self, i):
        return f"item{i}"


def test_a_batch_depends_on_seed_and_step_alone():
    one, two = (Batches(Numbered(7), 3, crop=(8, 9), seed=5) for _ in range(2))
    seen = [one.batch(step) for step in range(6)]
    for step in (5, 0, 3):
        images, labels = two.batch(step)
        assert torch.equal(images, seen[step][0]) and torch.equal(labels, seen[step][1])


def test_another_seed_gives_other_batches():
    one, two = (Batches(Numbered(50), 8, crop=(8, 9), seed=s) for s in (0, 1))
    assert one.indices(0) != two.indices(0)
    assert not torch.equal(one.batch(0)[0], two.batch(0)[0])


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (4, 4), (3, 8), (1, 2)])
def test_every_epoch_shows_each_item_once(count, batch_size):
    batches = Batches(Numbered(count), batch_size)
    stream = [i for step in range(3 * count) for i in batches.indices(step)]
    for start in range(0, len(stream), count):
        assert sorted(stream[start : start + count]) == list(range(count))


def test_epochs_differ_in_order():
    batches = Batches(Numbered(20), 20)
    assert batches.indices(0) != batches.indices(1)


def test_images_are_unit_floats_and_labels_bytes():
    images, labels = Batches(Numbered(4), 4, flip=False).batch(0)
    assert images.dtype == torch.float32 and images.shape == (4, 3, 20, 30)
    assert labels.dtype == torch.uint8 and labels.shape == (4, 20, 30)
    assert torch.equal((images[:, 0] * 255).round().to(torch.uint8), labels)
    assert images.max() <= 1


def test_image_and_label_share_crop_and_flip():
    batches = Batches(Numbered(6), 6, crop=(7, 11))
    corners, flips = set(), Counter()
    for step in range(30):
        images, labels = batches.batch(step)
        pixels = (images * 255).round().to(torch.int64)
        assert torch.equal(pixels[:, 0], labels.long())
        across = pixels[:, 1, 0, 1] - pixels[:, 1, 0, 0]
        flips.update(across.tolist())
        corners.update(
            zip(pixels[:, 0, 0, 0].tolist(), pixels[:, 1].amin((1, 2)).tolist(), strict=True)
        )
    assert set(flips) == {-1, 1} and min(flips.values()) > 50
    tops, lefts = ({c[k] for c in corners} for k in (0, 1))
    assert tops == set(range(14)) and lefts == set(range(20))


def test_without_flip_and_crop_the_image_comes_whole():
    images, _ = Batches(Numbered(1), 1, flip=False).batch(3)
    assert torch.equal((images[0] * 255).round().to(torch.uint8), Numbered(1)[0][0])


def test_the_dataset_is_not_written():
    scenes = Scenes("day", 2, size=(32, 32))
    before = [scenes[i][0].clone() for i in range(2)]
    images, labels = Batches(scenes, 2, crop=(32, 32)).batch(0)
    images.zero_(), labels.zero_()
    assert all(torch.equal(scenes[i][0], before[i]) for i in range(2))


def test_unlabelled_data_gives_no_labels():
    images, labels = Batches(Numbered(3, labelled=False), 2, crop=(4, 4)).batch(0)
    assert images.shape == (2, 3, 4, 4) and labels is None


def test_a_crop_takes_images_of_several_sizes():
    images, _ = Batches(Numbered(4, sizes=((20, 30), (12, 50))), 4, crop=(12, 30)).batch(0)
    assert images.shape == (4, 3, 12, 30)


def test_an_image_smaller_than_the_crop_is_named():
    batches = Batches(Numbered(2, sizes=((20, 30), (10, 30))), 2, crop=(16, 16))
    with pytest.raises(DataError, match="item1: image is 30x10, smaller than the crop 16x16"):
        batches.batch(0)


def test_images_of_several_sizes_without_crop_are_refused():
    batches = Batches(Numbered(2, sizes=((20, 30), (10, 30))), 2)
    with pytest.raises(DataError, match=r"image is .* but the batch is .*; pass crop"):
        batches.batch(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "^batch_size: got 0, expected at least 1"),
        ({"batch_size": 1, "seed": -2}, "^seed: got -2, expected at least 0"),
        ({"batch_size": 1, "crop": (0, 4)}, r"^crop: got \(0, 4\), expected \(height, width\)"),
    ],
)
def test_unusable_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(Numbered(2), **arguments)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="^dataset: got no items, expected at least one"):
        Batches(Numbered(0), 1)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="^step: got -1, expected at least 0"):
        Batches(Numbered(2), 1).batch(-1)


def test_a_side_in_place_of_a_size_is_named():
    with pytest.raises(TypeError, match=r"^crop: got 32, expected \(height, width\)"):
        Batches(Scenes("day", 1), 2, crop=32)
    with pytest.raises(TypeError, match=r"^size: got 64, expected \(height, width\)"):
        Scenes("day", 1, size=64)
