"""What the networks of an adaptation are scored by."""

import torch
import torch.nn.functional as F
from torch import nn

from fastmt.adapt import predict


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
