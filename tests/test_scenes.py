"""Rendered street scenes."""

import numpy as np
import pytest
import torch

from fastmt.data import Scenes, render_scene
from fastmt.data.looks import CLASSES

DOMAINS = ("day", "dusk")


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_scene_depends_on_its_arguments_alone(domain):
    first = render_scene(3, 5, domain=domain)
    render_scene(9, 9, domain="day")
    again = render_scene(3, 5, domain=domain)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_seed_index_and_domain_each_change_the_scene():
    base = render_scene(0, 0)[1]
    for other in (render_scene(1, 0), render_scene(0, 1), render_scene(0, 0, domain="dusk")):
        assert (base != other[1]).mean() > 0.05


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("size", [(144, 192), (33, 47), (200, 64)])
def test_image_and_label_have_the_size_asked_for(domain, size):
    image, label = render_scene(0, 1, domain=domain, size=size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert label.shape == size and label.dtype == np.uint8
    assert label.max() < len(CLASSES)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_class_covers_pixels_in_most_scenes(domain):
    labels = np.stack([render_scene(0, i, domain=domain)[1] for i in range(24)])
    scenes_with = [(labels == c).any(axis=(1, 2)).mean() for c in range(len(CLASSES))]
    assert min(scenes_with) > 0.6, dict(zip(CLASSES, scenes_with, strict=True))


def test_both_domains_have_the_same_distribution_of_classes():
    shares = []
    for domain in DOMAINS:
        labels = np.stack([render_scene(2, i, domain=domain, size=(72, 96))[1] for i in range(50)])
        shares.append(np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size)
    assert np.abs(shares[0] - shares[1]).max() < 0.07


def test_dusk_is_darker_almost_everywhere_on_average_and_noisier():
    day, dusk = (
        np.stack([render_scene(0, i, domain=d)[0] for i in range(12)]).astype(np.float32)
        for d in DOMAINS
    )
    assert dusk.mean() < 0.8 * day.mean()
    assert (dusk.mean(axis=(0, 3)) < day.mean(axis=(0, 3))).mean() > 0.9
    roughness = [np.median(np.abs(np.diff(x, axis=2))) / x.mean() for x in (day, dusk)]
    assert roughness[1] > 2 * roughness[0]


def test_classes_differ_in_colour_within_a_domain():
    images, labels = zip(*(render_scene(0, i) for i in range(12)), strict=True)
    pixels, ids = np.concatenate(images).reshape(-1, 3), np.concatenate(labels).ravel()
    means = np.stack([pixels[ids == c].mean(0) for c in range(len(CLASSES))])
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1)[np.triu_indices(len(CLASSES), 1)]
    assert apart.min() > 5


def test_the_dataset_gives_the_rendered_scene_channels_first():
    scenes = Scenes("dusk", 3, seed=4, size=(48, 64))
    image, label = scenes[1]
    expected = render_scene(4, 1, domain="dusk", size=(48, 64))
    assert image.dtype == torch.uint8 and image.is_contiguous()
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected[0])
    np.testing.assert_array_equal(label.numpy(), expected[1])


def test_the_cache_does_not_change_what_is_seen():
    cached, fresh = (Scenes("day", 2, size=(48, 64), cache=c) for c in (True, False))
    for _ in range(2):
        assert torch.equal(cached[1][0], fresh[1][0])


def test_an_unlabelled_dataset_withholds_labels_but_keeps_images():
    plain, bare = (Scenes("day", 2, size=(48, 64), labelled=k) for k in (True, False))
    assert bare[0][1] is None
    assert torch.equal(plain[0][0], bare[0][0])


def test_the_dataset_ends():
    scenes = Scenes("day", 2, size=(32, 32))
    assert len(scenes) == 2 and len(list(scenes)) == 2
    assert torch.equal(scenes[-1][0], scenes[1][0])
    with pytest.raises(IndexError):
        scenes[2]
    assert len({scenes.stem(0), scenes.stem(1), Scenes("dusk", 1).stem(0)}) == 3
    assert len(scenes.classes) == len(scenes.palette)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scenes("noon", 1), "^domain: got 'noon', expected one of 'day', 'dusk'"),
        (lambda: Scenes("day", 0), "^count: got 0, expected at least 1"),
        (lambda: Scenes("day", 1, seed=-1), "^seed: got -1, expected at least 0"),
        (lambda: Scenes("day", 1, size=(8, 64)), r"^size: got \(8, 64\), expected .*32"),
        (lambda: render_scene(0, -1), "^index: got -1, expected at least 0"),
    ],
)
def test_unusable_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
