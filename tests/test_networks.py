import pickle

import pytest
import torch

from fastmt.networks import UNet


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [(16, 16), (17, 33), (50, 31), (64, 48)])
def test_logits_come_at_the_stride_for_any_size(size, stride):
    network = UNet(5, width=4, stride=stride).eval()
    logits = network(torch.rand(2, 3, *size))
    assert logits.shape == (2, 5, -(-size[0] // stride), -(-size[1] // stride))
    assert logits.isfinite().all()


def test_the_default_network_has_about_a_million_parameters():
    count = sum(parameter.numel() for parameter in UNet(11).parameters())
    assert 0.8e6 < count < 1.3e6


def test_every_parameter_receives_a_gradient():
    network = UNet(5, width=8)
    network(torch.rand(2, 3, 40, 48)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_evaluation_treats_images_independently_of_their_batch():
    network = UNet(5, width=8).eval()
    images = torch.rand(3, 3, 32, 40)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]), atol=1e-5, rtol=1e-4)


def test_a_corner_pixel_reaches_logits_far_away():
    network = UNet(5, width=8).eval()
    images = torch.rand(1, 3, 96, 96)
    other = images.clone()
    other[..., :8, :8] += 10
    assert (network(images) - network(other)).abs()[..., -1, -1].max() > 0


def test_the_network_learns_to_tell_left_from_right():
    network = UNet(2, in_channels=1, width=8)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    labels = torch.zeros(4, 8, 8, dtype=torch.long)
    labels[..., 4:] = 1
    images = labels.float().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    images = images + 0.1 * torch.randn_like(images)
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (network(images).argmax(1) == labels).float().mean().item() > 0.95


def test_the_network_is_pickled_with_its_state():
    network = UNet(5, width=8).eval()
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(network))(images), network(images))


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="^stride: got 3, expected one of 2, 4, 8, 16"):
        UNet(5, stride=3)
    with pytest.raises(ValueError, match="^width: got 7, expected an even number of at least 2"):
        UNet(5, width=7)
    with pytest.raises(ValueError, match="^num_classes: got 0, expected at least 1"):
        UNet(0)
    with pytest.raises(ValueError, match="^in_channels: got 0, expected at least 1"):
        UNet(5, in_channels=0)
    with pytest.raises(ValueError, match=r"^images: got shape \(1, 4, .*expected \(N, 3, H, W\)"):
        UNet(5)(torch.rand(1, 4, 32, 32))
