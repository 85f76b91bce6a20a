import math

import pytest
import torch

from fastmt.style import as_style, fourier_style, match_statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STYLES = [fourier_style, match_statistics]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=2, size=(36, 48), low=0.3, high=0.7, seed=1):
    return low + (high - low) * torch.rand(count, 3, *size, generator=seeded(seed))


def shifted_reference(source, target, beta):
    """The published recipe: full FFT, centred, a (2b + 1)-wide square of amplitudes swapped."""
    height, width = source.shape[-2:]
    reach = math.floor(beta * min(height, width))
    source_spectrum = torch.fft.fftshift(torch.fft.fft2(source.double()), dim=(-2, -1))
    target_spectrum = torch.fft.fftshift(torch.fft.fft2(target.double()), dim=(-2, -1))
    amplitude = source_spectrum.abs()
    rows = slice(height // 2 - reach, height // 2 + reach + 1)
    columns = slice(width // 2 - reach, width // 2 + reach + 1)
    amplitude[..., rows, columns] = target_spectrum.abs()[..., rows, columns]
    mixed = torch.polar(amplitude, source_spectrum.angle())
    return torch.fft.ifft2(torch.fft.ifftshift(mixed, dim=(-2, -1))).real.clamp(0, 1).float()


@pytest.mark.parametrize("size", [(36, 48), (35, 47), (48, 36), (31, 64), (60, 66)])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.05, 0.09, 0.3, 0.45])
def test_fourier_style_equals_the_published_recipe(size, beta):
    source, target = some_images(size=size), some_images(size=size, low=0.1, high=0.6, seed=2)
    styled = fourier_style(source, target, beta=beta)
    torch.testing.assert_close(styled, shifted_reference(source, target, beta))


def test_fourier_style_with_every_frequency_takes_all_amplitudes_of_the_target():
    source, target = some_images(), some_images(seed=2)
    styled = fourier_style(source, target, beta=0.5)
    rows = torch.fft.fftfreq(36).mul(36).abs() <= 18
    wanted = torch.fft.rfft2(target).abs()[..., rows, :19]
    torch.testing.assert_close(
        torch.fft.rfft2(styled).abs()[..., rows, :19], wanted, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("style", STYLES)
def test_styles_compute_in_float32_under_autocast_too(style):
    source, target = some_images(), some_images(seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        styled = style(source, target)
    assert torch.equal(styled, style(source, target))


@pytest.mark.parametrize("style", STYLES)
def test_an_image_in_its_own_style_stays_itself(style):
    images = some_images()
    torch.testing.assert_close(style(images, images), images)


@pytest.mark.parametrize("style", STYLES)
def test_the_styled_image_has_the_brightness_of_its_target(style):
    source, target = some_images(), some_images(low=0.1, high=0.5, seed=2)
    styled = style(source, target)
    torch.testing.assert_close(styled.mean((-2, -1)), target.mean((-2, -1)))


def test_statistics_match_mean_and_deviation_of_each_channel():
    source, target = some_images(), some_images(low=0.4, high=0.5, seed=2)
    styled = match_statistics(source, target)
    torch.testing.assert_close(styled.std((-2, -1)), target.std((-2, -1)))
    flat = match_statistics(torch.full_like(source, 0.5), target)
    torch.testing.assert_close(flat, target.mean((-2, -1), keepdim=True).expand_as(flat))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", STYLES)
def test_styles_keep_dtype_and_range_and_leave_both_inputs_alone(style, dtype):
    source, target = (
        some_images(low=0, high=1).to(dtype),
        some_images(low=0.5, high=1, seed=2).to(dtype),
    )
    copies = source.clone(), target.clone()
    styled = style(source, target)
    assert styled.dtype == dtype
    assert styled.shape == source.shape
    assert styled.min() >= 0
    assert styled.max() <= 1
    assert torch.equal(source, copies[0])
    assert torch.equal(target, copies[1])
    in_float = style(source.float(), target.float()).to(dtype)
    torch.testing.assert_close(styled, in_float)


@pytest.mark.parametrize("style", STYLES)
def test_targets_are_cycled_when_fewer_and_cut_when_more(style):
    source, targets = some_images(5), some_images(3, seed=2, low=0.1)
    cycled = style(source, targets)
    torch.testing.assert_close(cycled, style(source, targets[[0, 1, 2, 0, 1]]))
    torch.testing.assert_close(style(source[:2], targets), style(source[:2], targets[:2]))


@pytest.mark.parametrize("style", STYLES)
def test_the_generator_draws_the_targets(style):
    source = some_images(1).expand(12, -1, -1, -1)
    targets = some_images(3, seed=2) * torch.tensor([0.4, 0.7, 1.0]).view(3, 1, 1, 1)
    styled = style(source, targets, generator=seeded(3))
    assert torch.equal(styled, style(source, targets, generator=seeded(3)))
    brightness = {round(value, 3) for value in styled.mean((1, 2, 3)).tolist()}
    assert brightness == {round(value, 3) for value in targets.mean((1, 2, 3)).tolist()}


@pytest.mark.parametrize("style", STYLES)
def test_targets_of_another_size_are_accepted(style):
    source, target = some_images(), some_images(size=(72, 90), low=0.1, high=0.4, seed=2)
    styled = style(source, target)
    assert styled.shape == source.shape
    torch.testing.assert_close(styled.mean((-2, -1)), target.mean((-2, -1)), atol=2e-3, rtol=0)


@pytest.mark.parametrize("style", STYLES)
def test_styles_carry_no_gradient(style):
    assert not style(some_images().requires_grad_(), some_images()).requires_grad


def test_styles_are_found_by_name():
    source, target = some_images(), some_images(seed=2)
    assert as_style("fourier") is fourier_style
    assert as_style("statistics") is match_statistics
    assert as_style("none")(source, target) is source
    assert as_style(None)(source, target) is source
    assert as_style(torch.add) is torch.add
    with pytest.raises(ValueError, match="^style: got 'cyclegan', expected one of 'fourier', 's"):
        as_style("cyclegan")
    with pytest.raises(TypeError, match="^style: got int, expected a name, a callable or None"):
        as_style(3)


@pytest.mark.parametrize("style", STYLES)
def test_images_that_do_not_fit_are_named(style):
    source = some_images()
    with pytest.raises(TypeError, match="^target: got torch.uint8, expected floating point"):
        style(source, source.byte())
    with pytest.raises(ValueError, match=r"^source: got shape .* expected \(N, C, H, W\)"):
        style(source[0], source)
    with pytest.raises(ValueError, match="^target: got no images, expected at least one"):
        style(source, source[:0])
    with pytest.raises(ValueError, match="^target: got 1 channels, expected 3 as source"):
        style(source, source[:, :1])
    with pytest.raises(ValueError, match="^target: got a tensor on meta, expected cpu"):
        style(source, source.to("meta"))


def test_a_beta_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"^beta: got 0.6, expected a number in \[0, 0.5\]"):
        fourier_style(some_images(), some_images(), beta=0.6)
