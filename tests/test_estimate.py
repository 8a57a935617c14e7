import math

import numpy as np
import pytest
import skimage.data
import torch
from skimage.restoration import estimate_sigma

from deepred_pl.estimate import level_of_removed, local_level, noise_level, unclipped
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Blur
from tests.helpers import picture


@pytest.mark.parametrize("sigma", [1, 25, 60])
@pytest.mark.parametrize("size", [(41, 67), (64, 64)])
def test_white_noise_on_a_slope_is_measured_exactly(sigma, size):
    generator = torch.Generator().manual_seed(0)
    slope = torch.linspace(-1, 1, size[0])[:, None] + torch.linspace(0, 1, size[1])
    y = slope + sigma / 255 * torch.randn(1, 3, *size, generator=generator)
    levels = 255 * noise_level(y, torch.ones_like(y) > 0)
    np.testing.assert_allclose(levels, sigma, rtol=0.06)  # of some 2500 values


def test_on_a_photograph_it_agrees_with_scikit_images_wavelets():
    clean = picture(3, 121, 97)
    y = GaussianNoise(25).sample(clean, torch.Generator().manual_seed(0))
    want = estimate_sigma(y[0].movedim(0, -1).numpy(), channel_axis=-1)
    np.testing.assert_allclose(noise_level(y, torch.ones_like(y) > 0), want, rtol=0.06)


@pytest.mark.parametrize("sigma", [15, 25])
def test_clipped_noise_is_not_taken_for_weak(sigma):
    coffee = torch.from_numpy(skimage.data.coffee()[120:248, 250:378] / 255).float()
    dark = (coffee.movedim(-1, 0)[None] - 0.3).clamp(0, 1)  # half of it is black
    y = GaussianNoise(sigma).sample(dark, torch.Generator().manual_seed(0)).clamp(0, 1)
    found = 255 * float(noise_level(y, unclipped(y)).mean())
    assert found == pytest.approx(sigma, rel=0.12)
    wavelets = 255 * estimate_sigma(y[0].movedim(0, -1).numpy(), channel_axis=-1)[0]
    assert sigma - wavelets > 2 * abs(sigma - found)


def test_missing_values_do_not_count():
    y = torch.full((1, 1, 40, 50), 0.5) + 0.1 * torch.randn(
        1, 1, 40, 50, generator=torch.Generator().manual_seed(0)
    )
    known = torch.ones_like(y).bool()
    known[..., 20:, :] = False
    level = noise_level(torch.where(known, y, 0.0), known)
    assert level.item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("size", [(1, 50), (2, 50), (5, 7)])
def test_too_few_values_have_no_level(size):
    y = torch.rand(1, 2, *size)
    assert noise_level(y, torch.ones_like(y) > 0).isnan().all()
    assert math.isnan(local_level(y, torch.ones_like(y) > 0))


def test_texture_in_a_part_of_the_image_does_not_count_locally():
    generator = torch.Generator().manual_seed(0)
    y = 0.5 + 0.02 * torch.randn(1, 1, 66, 98, generator=generator)
    y[..., :50] += 0.3 * torch.rand(1, 1, 66, 50, generator=generator)
    valid = torch.ones_like(y) > 0
    assert local_level(y, valid) == pytest.approx(0.02, rel=0.15)
    assert noise_level(y, valid) > 0.03


KERNELS = {
    "gaussian": Blur.gaussian(9, 1.0, "reflect"),
    "uniform": Blur.uniform(5, "reflect"),
    "motion": Blur.motion(11, 30, "reflect"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sigma", [1, 4, [3, 6, 12]])
def test_the_noise_of_a_blurred_texture_is_that_of_the_frequencies_it_removes(kernel, sigma):
    blur, each = KERNELS[kernel], torch.tensor(sigma).float().expand(3).view(1, 3, 1, 1)
    grass = torch.from_numpy(skimage.data.grass()[:96, :131] / 255).float().expand(1, 3, -1, -1)
    noise = torch.randn(grass.shape, generator=torch.Generator().manual_seed(0))
    y = blur(grass) + each / 255 * noise
    levels = 255 * level_of_removed(y, blur.transfer(*y.shape[-2:]))
    torch.testing.assert_close(levels, each.flatten(), rtol=0.15, atol=0.15)
