"""Segmenting images: tiles, flips and scales are what they stand for, and leave nothing behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmt
from fastmt import cpp_backend
from fastmt.segment import spans, tile_side

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, STRIDE = 5, 4


class Net(nn.Module):
    """Logits at a quarter of the resolution that reach 11 pixels far; records what it saw."""

    def __init__(self, wrap=lambda logits: logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
            nn.Conv2d(8, CLASSES, 5, 2, 2),
        )  # fmt: skip
        self.body[4].weight.data.mul_(20)
        self.wrap, self.seen = wrap, []

    def forward(self, images):
        assert not self.training and torch.is_inference_mode_enabled()
        self.seen.append(tuple(images.shape[2:]))
        return self.wrap(self.body(images))


def image(height, width, seed=0, count=None):
    shape = (3, height, width) if count is None else (count, 3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def softmax_of(network, pixels, size):
    """The plain way: logits up-sampled to `size`, then softmax, in float64."""
    logits = network.eval().double()(pixels[None].double())
    network.float()
    return F.interpolate(logits, size, mode="bilinear").softmax(1)[0]


def assert_same(result, q):
    torch.testing.assert_close(result.score.double(), q.amax(0), rtol=0, atol=2e-5)
    top = q.topk(2, dim=0).values
    clear = top[0] - top[1] > 1e-4
    assert torch.equal(result.label[clear], q.argmax(0)[clear])


def test_an_image_is_the_networks_softmax_at_its_own_size():
    network, pixels = Net(), image(48, 64)
    result = fastmt.segment(network, pixels)
    assert (result.score.dtype, result.label.dtype) == (torch.float32, torch.int64)
    assert result.score.shape == result.label.shape == (48, 64)
    assert_same(result, softmax_of(network, pixels, (48, 64)))


def test_a_batch_is_its_images():
    network, pixels = Net(), image(20, 24, count=3)
    batch = fastmt.segment(network, pixels, flip=True)
    for k, single in enumerate(pixels):
        alone = fastmt.segment(network, single, flip=True)
        torch.testing.assert_close(batch.score[k], alone.score)


def test_bytes_are_divided_by_255():
    network = Net()
    pixels = torch.randint(256, (3, 20, 24), dtype=torch.uint8)
    assert torch.equal(
        fastmt.segment(network, pixels).score, fastmt.segment(network, pixels / 255).score
    )


@pytest.mark.parametrize("size", [(97, 130), (128, 41), (200, 64)])
def test_tiles_that_overlap_by_the_networks_reach_leave_no_trace(size):
    network, pixels = Net(), image(*size)
    whole = fastmt.segment(network, pixels, divisor=STRIDE)
    network.seen.clear()
    tiled = fastmt.segment(network, pixels, tile=64, overlap=40, divisor=STRIDE)
    assert len(network.seen) > 2
    assert max(max(shape) for shape in network.seen) <= 64
    torch.testing.assert_close(tiled.score, whole.score, rtol=0, atol=1e-5)
    assert (tiled.label == whole.label).float().mean() > 0.999


def test_tiles_that_do_not_overlap_do_leave_one():
    network, pixels = Net(), image(97, 130)
    whole = fastmt.segment(network, pixels, divisor=STRIDE)
    tiled = fastmt.segment(network, pixels, tile=64, overlap=0, divisor=STRIDE)
    assert (tiled.score - whole.score).abs().max() > 1e-3


@given(st.integers(1, 500), st.integers(1, 30), st.integers(0, 100), st.integers(1, 8))
def test_what_tiles_keep_covers_an_axis_once(length, tiles_of, overlap, divisor):
    tile = tiles_of * divisor
    parts = spans(length, tile, min(overlap, tile - 1), divisor)
    assert [part.first for part in parts] == [0, *(part.last for part in parts[:-1])]
    assert parts[-1].last == length
    for part in parts:
        assert part.start <= part.first < part.last <= part.stop <= part.start + max(tile, 1)
        assert part.start % divisor == 0


@pytest.mark.parametrize("scales", [(1.0, 2.0), (1.3,), (0.5, 1.0)])
def test_no_input_of_the_network_is_larger_than_a_tile_at_any_scale(scales):
    network = Net()
    fastmt.segment(network, image(97, 130), tile=64, scales=scales, divisor=STRIDE)
    assert max(max(shape) for shape in network.seen) <= 64


@pytest.mark.parametrize("scales", [(1.0,), (1.5,)])
def test_tiles_share_a_quarter_unless_told(scales):
    call = {"tile": 64, "scales": scales, "divisor": STRIDE}
    quarter = {64: 16, 40: 10}[tile_side(64, scales, STRIDE)]
    default = fastmt.segment(Net(), image(97, 130), **call)
    assert torch.equal(
        default.score, fastmt.segment(Net(), image(97, 130), overlap=quarter, **call).score
    )


def test_the_score_is_of_the_kind_and_the_temperature_asked_for():
    network, pixels = Net(), image(48, 64)
    score = fastmt.segment(network, pixels, kind="margin", temperature=2.0).score
    q = softmax_of(network, pixels, (48, 64)).sqrt()  # softmax(z / 2), but for its sum
    first, second = (q / q.sum(0)).topk(2, dim=0).values
    torch.testing.assert_close(score.double(), first - second, rtol=0, atol=2e-5)


def test_flips_and_scales_are_the_mean_of_their_softmaxes():
    network, pixels = Net(), image(48, 64)
    result = fastmt.segment(network, pixels, flip=True, scales=(1.0, 0.5), divisor=STRIDE)
    small = F.interpolate(pixels[None], (24, 32), mode="bilinear", antialias=True)[0]
    passes = []
    for view in (pixels, small):
        passes.append(softmax_of(network, view, (48, 64)))
        passes.append(softmax_of(network, view.flip(-1), (48, 64)).flip(-1))
    assert_same(result, torch.stack(passes).mean(0))


@pytest.mark.parametrize("size", [(45, 61), (46, 63)])
def test_a_mirrored_image_gives_the_mirrored_result_when_flips_are_averaged(size):
    network, pixels = Net(), image(*size)
    options = {"flip": True, "divisor": 1}
    result = fastmt.segment(network, pixels, **options)
    mirrored = fastmt.segment(network, pixels.flip(-1), **options)
    torch.testing.assert_close(mirrored.score.flip(-1), result.score, rtol=0, atol=1e-5)


class InPlace(Net):
    """Normalises what it is given where it lies."""

    def forward(self, images):
        return super().forward(images.sub_(0.4).div_(0.2))


def test_a_network_that_writes_into_its_input_writes_into_no_image_and_no_other_pass():
    pixels = image(40, 48)
    options = {"tile": 16, "overlap": 8, "flip": True, "scales": (1.0, 0.5)}
    given = pixels.clone()
    result = fastmt.segment(InPlace(), given, **options)
    assert torch.equal(given, pixels)
    expected = fastmt.segment(Net(), (pixels - 0.4) / 0.2, **options)
    torch.testing.assert_close(result.score, expected.score, rtol=0, atol=1e-4)


def test_padding_to_the_stride_puts_logits_over_their_pixels():
    network, pixels = Net(), image(45, 61)
    result = fastmt.segment(network, pixels, divisor=STRIDE)
    padded = F.pad(pixels[None], (0, 3, 0, 3), mode="replicate")[0]
    assert_same(result, softmax_of(network, padded, (48, 64))[:, :45, :61])


class LargestLogits(TorchDispatchMode):
    """The most pixels that any floating tensor with CLASSES channels has."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and tensor.shape[1] == CLASSES:
                self.largest = max(self.largest, tensor.shape[2] * tensor.shape[3])
        return result


def test_no_logits_of_the_images_size_are_made():
    if cpp_backend.missing():
        pytest.skip("eager PyTorch makes them")
    network, pixels = Net(), image(64, 96)
    with LargestLogits() as mode:
        fastmt.segment(network, pixels, flip=True)
    assert 0 < mode.largest <= 16 * 24


def test_results_can_teach_another_network():
    score, label = fastmt.segment(Net(), image(20, 24))
    logits = torch.zeros(1, CLASSES, 20, 24, requires_grad=True)
    (F.cross_entropy(logits, label[None], reduction="none") * score).mean().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_images_come_in_the_type_of_the_network(dtype, as_bytes):
    pixels = (255 * image(20, 24)).to(torch.uint8)
    result = fastmt.segment(Net().to(dtype), pixels if as_bytes else pixels / 255, scales=(1, 0.5))
    plain = fastmt.segment(Net(), pixels, scales=(1, 0.5))
    assert result.score.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float64 else 0.2
    torch.testing.assert_close(result.score, plain.score, rtol=0, atol=tolerance)


@pytest.mark.parametrize("wrap", [lambda z: {"out": z}, lambda z: SimpleNamespace(logits=z)])
def test_what_networks_return_is_understood(wrap):
    pixels = image(20, 24)
    expected = fastmt.segment(Net(), pixels).score
    assert torch.equal(fastmt.segment(Net(wrap), pixels).score, expected)


def test_every_module_has_its_own_mode_again_also_after_an_error():
    network = Net().train()
    network.body[1].eval()
    modes = [module.training for module in network.modules()]
    fastmt.segment(network, image(20, 24))
    assert [module.training for module in network.modules()] == modes
    network.wrap = lambda logits: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fastmt.segment(network, image(20, 24))
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": [1]}, TypeError, "images: got list"),
        ({"images": torch.zeros(3, 4, 4).long()}, TypeError, "images: got torch.int64"),
        ({"images": torch.zeros(4, 4)}, ValueError, r"images: got shape \(4, 4\)"),
        ({"images": torch.zeros(3, 0, 4)}, ValueError, r"images: got shape \(3, 0, 4\)"),
        ({"tile": 0}, ValueError, "tile: got 0"),
        ({"tile": 30, "divisor": 4, "overlap": 0}, ValueError, "tile: got 30.*divisor 4"),
        ({"tile": 32, "overlap": 32}, ValueError, "overlap: got 32"),
        ({"tile": 32, "overlap": 16, "scales": (2,)}, ValueError, "overlap: got 16.* 16 pixels"),
        ({"tile": (32, 32)}, TypeError, "tile: got tuple"),
        ({"tile": 4, "scales": (2,), "divisor": 4}, ValueError, "tile: got 4, expected at least 8"),
        ({"tile": 32, "overlap": -1}, ValueError, "overlap: got -1"),
        ({"tile": 32, "overlap": 0.5}, TypeError, "overlap: got float"),
        ({"overlap": 16}, ValueError, "overlap: got 16 without a tile"),
        ({"tile": 32, "divisor": 2.0}, TypeError, "divisor: got float"),
        ({"scales": 2.0}, TypeError, "scales: got float"),
        ({"network": image}, TypeError, "network: got function"),
        ({"network": Net().to("meta")}, ValueError, "network: got body.0.weight on"),
        ({"divisor": 0}, ValueError, "divisor: got 0"),
        ({"scales": ()}, ValueError, "scales: got none"),
        ({"scales": (0.0,)}, ValueError, "scales: got 0.0"),
        ({"scales": (1, 1e18)}, ValueError, r"scales: got 1e\+18"),
        ({"kind": "best"}, ValueError, "kind: got 'best'"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, error, message):
    call = {"network": Net(), "images": image(20, 24), **options}
    with pytest.raises(error, match=f"^{message}"):
        fastmt.segment(**call)
