import pytest
import torch
from operands import DTYPES as KERNEL_DTYPES
from operands import LAYOUTS, laid_out

from fastmt import backend, explain
from fastmt.perturb import class_mix, gaussian_noise, mix, photometric_jitter
from fastmt.threefry import random_words

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=4, size=(24, 32)):
    return torch.rand(count, 3, *size, generator=seeded(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [gaussian_noise, photometric_jitter])
def test_views_keep_shape_and_dtype_and_leave_the_input_alone(view, dtype):
    images = some_images().to(dtype)
    before = images.clone()
    noisy = view(images, generator=seeded())
    assert noisy.shape == images.shape
    assert noisy.dtype == dtype
    assert torch.equal(images, before)
    assert not torch.equal(noisy, images)


@pytest.mark.parametrize("view", [gaussian_noise, photometric_jitter])
def test_the_generator_decides_the_view(view):
    images = some_images()
    first = view(images, generator=seeded(1))
    assert torch.equal(first, view(images, generator=seeded(1)))
    assert not torch.equal(first, view(images, generator=seeded(2)))
    assert not torch.equal(view(images), view(images))


def test_noise_has_the_deviation_asked_for_and_never_exceeds_the_clip():
    images = torch.full((8, 3, 64, 64), 0.5)
    noise = gaussian_noise(images, sigma=0.05, clip=0.2, generator=seeded()) - images
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(noise.mean().item()) < 1e-3
    clipped = gaussian_noise(images, sigma=1.0, clip=0.2, generator=seeded()) - images
    assert clipped.abs().max().item() == pytest.approx(0.2, abs=1e-6)
    assert (clipped.abs() > 0.199).float().mean().item() > 0.8


def test_random_words_are_those_of_the_published_generator():
    words = random_words(torch.zeros(1, dtype=torch.int64), torch.tensor(0))
    expected = [0x531C7E4F, 0x39491EE5, 0x2C855A92, 0x3D6ABF9A]
    assert [word & 0xFFFFFFFF for word in words.flatten().tolist()] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 17, 23), (3, 128), (1, 3, 8, 16), (2, 0)])
def test_noise_of_the_kernel_is_that_of_the_reference(kernels, shape, dtype, layout):
    images = torch.rand(shape, generator=seeded()).to(dtype)
    images = images if len(shape) < 3 else laid_out(images, layout)
    call = {"sigma": 0.3, "clip": 0.5, "clamp": layout == "channels_last"}
    noisy = gaussian_noise(images, **call, generator=seeded(5))
    with backend("eager"):
        expected = gaussian_noise(images, **call, generator=seeded(5))
    assert noisy.stride() == expected.stride()
    rounding = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(noisy, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("clamp", [False, True])
def test_noise_on_what_is_not_finite_is_that_of_the_reference(kernels, clamp, dtype):
    images = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5, 3.0, -3.0], dtype=dtype)
    noisy = gaussian_noise(images, clamp=clamp, generator=seeded())
    with backend("eager"):
        expected = gaussian_noise(images, clamp=clamp, generator=seeded())
    torch.testing.assert_close(noisy, expected, equal_nan=True)


def test_noise_is_bitwise_the_same_for_every_number_of_threads(kernels):
    images = torch.rand(3, 200, 333)
    one = gaussian_noise(images, generator=seeded())
    torch.set_num_threads(4)
    assert torch.equal(one, gaussian_noise(images, generator=seeded()))


def test_noise_is_normal_and_without_correlation(either):
    noise = gaussian_noise(torch.zeros(1 << 20), sigma=1.0, clip=10.0, generator=seeded())
    assert abs(noise.mean()) < 0.005
    moments = [noise.pow(k).mean().item() for k in (2, 3, 4)]
    assert moments == pytest.approx([1, 0, 3], abs=0.03)
    for step in (1, 2, 32, 64, 128):
        assert abs((noise[step:] * noise[:-step]).mean()) < 0.005
    tail = (noise.abs() > 3).double().mean().item()
    assert tail == pytest.approx(2.7e-3, rel=0.1)


def test_noise_on_images_that_require_a_gradient_is_drawn_by_the_reference():
    images = some_images()
    answer = explain(gaussian_noise, images.requires_grad_())
    assert answer == ("eager", "images require a gradient")


def test_noise_of_images_on_the_cpu_takes_no_notice_of_the_default_device(either):
    images = some_images()
    torch.manual_seed(3)
    expected = gaussian_noise(images)
    torch.manual_seed(3)
    with torch.device("meta"):
        noisy = gaussian_noise(images)
    assert torch.equal(noisy, expected)


def test_noise_that_is_only_explained_is_not_drawn():
    generator = seeded()
    explain(gaussian_noise, some_images(), generator=generator)
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_noise_leaves_the_unit_range_unless_clamped():
    images = torch.zeros(2, 3, 16, 16)
    assert gaussian_noise(images, generator=seeded()).min() < 0
    clamped = gaussian_noise(images, clamp=True, generator=seeded())
    assert clamped.min() == 0
    assert clamped.max() > 0


def test_noise_keeps_the_memory_layout_and_passes_the_gradient():
    images = some_images().contiguous(memory_format=torch.channels_last).requires_grad_()
    noisy = gaussian_noise(images)
    assert noisy.is_contiguous(memory_format=torch.channels_last)
    noisy.sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))


def jitter_step_by_step(images, gain, contrast, colour):
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    images = images * gain
    mean = (images * weights).sum(1, keepdim=True).mean((1, 2, 3), keepdim=True)
    images = mean + contrast * (images - mean)
    grey = (images * weights).sum(1, keepdim=True)
    return (grey + colour * (images - grey)).clamp(0, 1)


def test_jitter_equals_brightness_then_contrast_then_saturation():
    images = some_images()
    draws = torch.rand((4, len(images), 1, 1, 1), generator=seeded(3))
    gain, contrast, colour = 0.7 + 0.6 * draws[0], 0.5 + draws[1], 0.0 + 2.2 * draws[2]
    jittered = photometric_jitter(
        images, brightness=0.3, contrast=0.5, saturation=1.2, generator=seeded(3)
    )
    torch.testing.assert_close(jittered, jitter_step_by_step(images, gain, contrast, colour))


def test_jitter_is_computed_in_float32_under_autocast_too():
    images = some_images()
    with torch.autocast("cpu", torch.bfloat16):
        jittered = photometric_jitter(images, generator=seeded())
    assert torch.equal(jittered, photometric_jitter(images, generator=seeded()))


def test_jitter_of_zero_strength_is_the_identity():
    images = some_images()
    same = photometric_jitter(images, brightness=0, contrast=0, saturation=0)
    torch.testing.assert_close(same, images)


def test_jitter_stays_in_range_and_draws_each_image_its_own_factors():
    images = torch.rand(1, 3, 8, 8, generator=seeded()).expand(6, -1, -1, -1)
    jittered = photometric_jitter(images, brightness=2.0, contrast=2.0, saturation=2.0)
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in jittered}) == 6


def test_greyscale_probability_is_the_share_of_images_without_colour():
    images = some_images(200, (4, 4))
    jittered = photometric_jitter(images, greyscale=0.25, generator=seeded())
    grey = torch.isclose(jittered, jittered[:, :1], atol=1e-6).all(dim=(1, 2, 3))
    assert 0.15 < grey.float().mean().item() < 0.35
    assert torch.isclose(
        *(photometric_jitter(images, greyscale=1.0).split(1, dim=1)[:2]), atol=1e-6
    ).all()


def classes_of(labels, mask):
    return set(labels[mask].tolist())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_class_mix_takes_all_pixels_of_half_the_present_classes(dtype):
    labels = torch.randint(0, 9, (16, 12, 12), generator=seeded())
    labels[labels == 4] = 255
    labels[0] = 3  # a single class: half of one, rounded up, is one
    labels[1] = 255  # nothing present
    labels = labels.to(dtype)
    mask = class_mix(labels, 11, generator=seeded(5))
    assert mask.dtype == torch.bool
    assert mask.shape == labels.shape
    for label, chosen in zip(labels, mask, strict=True):
        present = classes_of(label, label != 255)
        taken = classes_of(label, chosen)
        assert len(taken) == (len(present) + 1) // 2
        assert taken.isdisjoint(classes_of(label, ~chosen))
        assert 255 not in taken


def test_class_mix_draws_classes_evenly_and_independently_of_their_area():
    labels = torch.zeros(4000, 8, dtype=torch.uint8)
    labels[:, 0], labels[:, 1], labels[:, 2] = 1, 2, 3
    mask = class_mix(labels, 4, generator=seeded())
    for column in range(4):
        assert mask[:, column].float().mean().item() == pytest.approx(0.5, abs=0.03)
    pairs = {tuple(row) for row in mask[:, :4].tolist()}
    assert len(pairs) == 6  # every way to take two of four classes


def test_class_mix_is_one_graph():
    labels = torch.randint(0, 9, (3, 8, 8), generator=seeded())
    masks = []
    for function in (class_mix, torch.compile(class_mix, backend="aot_eager", fullgraph=True)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            masks.append(function(labels, 9))
    assert torch.equal(*masks)


def test_class_mix_honours_an_ignore_index_inside_and_below_the_range():
    labels = torch.tensor([[0, 0, 1, 2]])
    assert not class_mix(labels, 3, ignore_index=0)[0, :2].any()
    negative = torch.tensor([[-100, 1, 1, 1]])
    assert class_mix(negative, 3, ignore_index=-100).tolist() == [[False, True, True, True]]


def test_class_mix_is_decided_by_the_generator():
    labels = torch.randint(0, 9, (4, 12, 12), generator=seeded())
    assert torch.equal(
        class_mix(labels, 9, generator=seeded(1)), class_mix(labels, 9, generator=seeded(1))
    )
    assert not torch.equal(
        class_mix(labels, 9, generator=seeded(1)), class_mix(labels, 9, generator=seeded(2))
    )


def test_class_mix_names_a_label_out_of_range():
    with pytest.raises(ValueError, match="^labels: got label 11, expected 0..10 or ignore"):
        class_mix(torch.tensor([[0, 11]]), 11)
    with pytest.raises(ValueError, match=r"^labels: got shape \(4\), expected \(N, \*spatial\)"):
        class_mix(torch.zeros(4, dtype=torch.int64), 11)
    with pytest.raises(TypeError, match="^labels: got torch.float32, expected integers"):
        class_mix(torch.zeros(1, 4), 11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mix_pastes_images_and_labels_alike(dtype):
    mask = torch.rand(4, 24, 32, generator=seeded()) < 0.5
    pasted, base = some_images().to(dtype), torch.zeros(4, 3, 24, 32, dtype=dtype)
    mixed = mix(mask, pasted, base)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, pasted * mask[:, None])
    ones, twos = torch.ones(4, 24, 32).long(), torch.full((4, 24, 32), 2)
    assert torch.equal(mix(mask, ones, twos), 2 - mask.long())


def test_mix_refuses_what_does_not_fit():
    images, mask = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="^mask: got torch.float32, expected bool"):
        mix(mask.float(), images, images)
    with pytest.raises(
        TypeError, match="^pasted: got torch.float32, expected torch.float16 as base"
    ):
        mix(mask, images, images.half())
    with pytest.raises(ValueError, match=r"^pasted: got shape \(2, .* expected \(1, .* as base"):
        mix(mask, images, images[:1])
    with pytest.raises(
        ValueError, match=r"^mask: got shape \(1, 4, 4\), expected \(N, \*spatial\)"
    ):
        mix(mask[:1], images, images)


def test_arguments_out_of_range_are_named():
    images = some_images()
    with pytest.raises(TypeError, match="^images: got list, expected a tensor"):
        gaussian_noise([0.5])
    with pytest.raises(TypeError, match="^images: got torch.uint8, expected floating point"):
        gaussian_noise(images.byte())
    with pytest.raises(ValueError, match="^sigma: got -0.1, expected at least 0"):
        gaussian_noise(images, sigma=-0.1)
    with pytest.raises(ValueError, match=r"^images: got shape .* expected \(N, 3, H, W\)"):
        photometric_jitter(images[:, :1])
    with pytest.raises(ValueError, match=r"^greyscale: got 1.5, expected a number in \[0, 1\]"):
        photometric_jitter(images, greyscale=1.5)
    with pytest.raises(ValueError, match="^generator: got one on cpu, expected one on meta"):
        gaussian_noise(images.to("meta"), generator=seeded())
