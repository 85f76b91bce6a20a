"""Scalars of a wrong type: one line that names the argument, what came and what was expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmt
from fastmt import decays, perturb, posthoc, schedules, style
from fastmt.data.batches import Batches
from fastmt.data.folders import SegmentationFolder
from fastmt.data.scenes import Scenes, render_scene
from fastmt.metrics import ConfusionMatrix
from fastmt.networks import UNet
from fastmt.pictures import default_palette
from fastmt.segment import tile_side

IMAGES, LABELS = torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)
SCENES = Scenes("day", 3)


def network() -> torch.nn.Module:
    return torch.nn.Conv2d(3, 4, 1)


def trainer(**options):
    student = network()
    return fastmt.MeanTeacher(student, torch.optim.SGD(student.parameters(), 0.1), **options)


def folder(root, **options):
    (root / "images").mkdir()
    (root / "images/a.png").write_bytes(b"")
    return SegmentationFolder(root, labelled=False, **options)


COUNTS = {
    ("ConfusionMatrix", "num_classes"): lambda n: ConfusionMatrix(n),
    ("ConfusionMatrix", "ignore_index"): lambda n: ConfusionMatrix(4, ignore_index=n),
    ("class_mix", "num_classes"): lambda n: perturb.class_mix(LABELS, n),
    ("class_mix", "ignore_index"): lambda n: perturb.class_mix(LABELS, 4, ignore_index=n),
    ("cross_entropy", "ignore_index"): lambda n: fastmt.CrossEntropy(ignore_index=n),
    ("MeanTeacher", "ignore_index"): lambda n: trainer(ignore_index=n),
    ("MeanTeacher", "accumulate"): lambda n: trainer(accumulate=n),
    ("MeanTeacher", "passes"): lambda n: trainer(passes=n),
    ("segment", "tile"): lambda n: fastmt.segment(network(), IMAGES, tile=n),
    ("segment", "overlap"): lambda n: fastmt.segment(network(), IMAGES, tile=8, overlap=n),
    ("segment", "divisor"): lambda n: fastmt.segment(network(), IMAGES, divisor=n),
    ("tile_side", "divisor"): lambda n: tile_side(8, [1.0], n),
    ("Batches", "batch_size"): lambda n: Batches(SCENES, n),
    ("Batches", "seed"): lambda n: Batches(SCENES, 2, seed=n),
    ("Batches", "step"): lambda n: Batches(SCENES, 2).indices(n),
    ("Batches", "crop"): lambda n: Batches(SCENES, 2, crop=(8, n)),
    ("Scenes", "count"): lambda n: Scenes("day", n),
    ("Scenes", "size"): lambda n: Scenes("day", 3, size=(n, 192)),
    ("render_scene", "index"): lambda n: render_scene(0, n),
    ("default_palette", "num_classes"): lambda n: default_palette(n),
    ("UNet", "num_classes"): lambda n: UNet(n),
    ("UNet", "in_channels"): lambda n: UNet(4, in_channels=n),
    ("UNet", "width"): lambda n: UNet(4, width=n),
}
MAY_BE_NONE = {("MeanTeacher", "ignore_index"), ("segment", "tile"), ("segment", "overlap")}

NUMBERS = {
    ("gaussian_noise", "sigma"): lambda x: perturb.gaussian_noise(IMAGES, sigma=x),
    ("gaussian_noise", "clip"): lambda x: perturb.gaussian_noise(IMAGES, clip=x),
    ("jitter", "brightness"): lambda x: perturb.photometric_jitter(IMAGES, brightness=x),
    ("jitter", "contrast"): lambda x: perturb.photometric_jitter(IMAGES, contrast=x),
    ("jitter", "saturation"): lambda x: perturb.photometric_jitter(IMAGES, saturation=x),
    ("fourier_style", "beta"): lambda x: style.fourier_style(IMAGES, IMAGES, beta=x),
    ("schedules", "step"): lambda x: schedules.LinearRampUp(1.0, 5)(x),
    ("half_life_decay", "steps"): lambda x: decays.half_life_decay(100.0, x),
    ("EMATeacher", "update_every"): lambda x: fastmt.EMATeacher(
        network(), half_life=100.0, update_every=x
    ),
    ("PowerFunction", "gamma"): lambda x: decays.PowerFunction(x),
    ("gamma_of", "sigma_rel"): posthoc.gamma_of,
    ("MeanTeacher", "class_mixing"): lambda x: trainer(class_mixing=x),
}

GENERATORS = {
    "gaussian_noise": lambda g: perturb.gaussian_noise(IMAGES, generator=g),
    "photometric_jitter": lambda g: perturb.photometric_jitter(IMAGES, generator=g),
    "class_mix": lambda g: perturb.class_mix(LABELS, 4, generator=g),
    "match_statistics": lambda g: style.match_statistics(IMAGES, IMAGES, generator=g),
}


@pytest.mark.parametrize("wrong", [2.5, float("inf"), "3", None, [1], torch.tensor(2.5)])
@pytest.mark.parametrize("which", COUNTS, ids=".".join)
def test_what_counts_is_an_integer(which, wrong):
    if wrong is None and which in MAY_BE_NONE:
        pytest.skip("None is the default")
    with pytest.raises(TypeError, match=f"^{which[1]}: got {type(wrong).__name__}, expected an in"):
        COUNTS[which](wrong)


@pytest.mark.parametrize("wrong", [2.5, "3"])
def test_the_number_of_classes_in_a_folder_is_an_integer(tmp_path, wrong):
    with pytest.raises(TypeError, match="^num_classes: got (float|str), expected an integer"):
        folder(tmp_path, num_classes=wrong)


@pytest.mark.parametrize("wrong", ["3", None, [1], float("nan")])
@pytest.mark.parametrize("which", NUMBERS, ids=".".join)
def test_what_measures_is_a_number(which, wrong):
    with pytest.raises((TypeError, ValueError), match=rf"^{which[1]}: got \S+, expected [^\n]*$"):
        NUMBERS[which](wrong)


@pytest.mark.parametrize("function", GENERATORS)
def test_a_generator_is_one_of_pytorch(function):
    with pytest.raises(TypeError, match="^generator: got int, expected a torch.Generator or None"):
        GENERATORS[function](3)


@pytest.mark.parametrize("wrong", ["3", [1, 2], None])
def test_flags_are_true_or_false(wrong):
    with pytest.raises(TypeError, match="^clamp: got .*, expected True or False"):
        perturb.gaussian_noise(IMAGES, clamp=wrong)
    with pytest.raises(TypeError, match="^flip: got .*, expected True or False"):
        fastmt.segment(network(), IMAGES, flip=wrong)


def test_integers_of_numpy_count():
    classes = np.uint8(200)  # whose square is none
    matrix = ConfusionMatrix(classes, ignore_index=np.int64(3))
    matrix.update(torch.tensor([0, 1, 199]), torch.tensor([0, 3, 199]))
    assert matrix.matrix.shape == (200, 200)
    assert matrix.matrix.sum() == 2
    assert perturb.class_mix(LABELS, classes).all()
    net = network()
    tiled = fastmt.segment(net, IMAGES, tile=np.int8(4), overlap=np.int8(1), divisor=np.int8(2))
    assert torch.equal(tiled.label, fastmt.segment(net, IMAGES).label)
