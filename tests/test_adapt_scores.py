"""What the networks of an adaptation are scored by, and the picture of it."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmt import adapt_report
from fastmt.adapt import VARIANTS, predict
from fastmt.data import VOID
from fastmt.metrics import ConfusionMatrix


class Coarse(nn.Module):
    """Tells bright from dark, a logit for 4x4 pixels, as the U-Net has them."""

    stride = 4

    def forward(self, images):
        bright = F.avg_pool2d(images.mean(1, keepdim=True), 4, ceil_mode=True)
        return torch.cat([0.5 - bright, bright - 0.5], dim=1)


def test_predictions_stand_over_their_pixels_at_any_size_of_the_image():
    image = torch.zeros(3, 72, 96, dtype=torch.uint8)
    image[:, 60:, 80:] = 255
    whole = predict(Coarse(), image, torch.device("cpu"))
    assert 0 < whole.float().mean() < 1
    for height, width in ((71, 95), (69, 93)):
        part = predict(Coarse(), image[:, :height, :width], torch.device("cpu"))
        assert torch.equal(part, whole[:height, :width])


class Pairs(list):
    classes, palette = ("dark", "bright"), np.array([[1, 2, 3], [4, 5, 6]], np.uint8)


@pytest.mark.parametrize("void", [False, True])
def test_the_legend_of_the_picture_names_void_where_the_truth_has_some(void, tmp_path, monkeypatch):
    label = torch.zeros(8, 8, dtype=torch.uint8)
    label[0] = VOID if void else 1
    drawn = {}
    monkeypatch.setattr(adapt_report, "panel", lambda *_, **options: drawn.update(options))
    networks = dict.fromkeys(("source_only", "adapted"), Coarse())
    pairs = Pairs([(torch.zeros(3, 8, 8, dtype=torch.uint8), label)] * 2)
    adapt_report.picture(tmp_path / "p.png", networks, pairs, torch.device("cpu"))
    names, colours = drawn["legend"]
    assert list(names) == ["dark", "bright", "void"][: len(colours)]
    assert len(colours) == (3 if void else 2)


def test_figures_of_no_pixel_are_null_in_json(tmp_path):
    void = ConfusionMatrix(2)
    void.update(torch.zeros(4, 4, dtype=torch.int64), torch.full((4, 4), 255))
    figures = adapt_report.results({name: [void] for name in VARIANTS}, ["sky", "road"], [0])
    adapt_report.write_results(tmp_path / "results.json", figures)
    assert "NaN" not in (tmp_path / "results.json").read_text()
    adapted = json.loads((tmp_path / "results.json").read_text())["adapted"]
    assert adapted["miou"] == adapted["pixel_accuracy"] == [None]
    assert adapted["iou"] == [{"sky": None, "road": None}]


def test_a_bar_in_the_name_of_a_class_stays_in_its_cell_of_the_table():
    matrix, names = ConfusionMatrix(2), ["road|lane", "a\\|b"]
    table = adapt_report.table({name: [matrix] for name in VARIANTS}, names)
    for line, name in zip(table.splitlines()[3:], names, strict=True):
        cells = re.findall(r"(?:\\.|[^|\\])+", line)  # an escape and what it escapes are one
        assert len(cells) == 4
        assert re.sub(r"\\(.)", r"\1", cells[0]).strip() == name
