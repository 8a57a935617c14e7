import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from deepred_pl.metrics import psnr, scored_on, ssim
from tests.conftest import picture


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_psnr_is_the_formula_on_the_clipped_image(channels):
    truth = picture(channels)
    image = truth + 0.3 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    mse = ((np.clip(image.double().numpy(), 0, 1) - truth.double().numpy()) ** 2).mean()
    assert psnr(image, truth).item() == pytest.approx(-10 * math.log10(mse), abs=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_agrees_with_scikit_image(channels):
    truth = picture(channels, 47, 61)
    image = truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    image = image.clamp(0, 1)
    # scikit-image leaves out a border of half a window; mirrored outside, all pixels count.
    mirrored = [
        np.pad(i[0].double().numpy(), [(0, 0), (5, 5), (5, 5)], "reflect") for i in (image, truth)
    ]
    want = structural_similarity(
        *mirrored,
        channel_axis=0,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(image, truth).item() == pytest.approx(want, abs=5e-4)


def test_ssim_is_nan_below_its_window():
    assert ssim(torch.zeros(1, 1, 10, 40), torch.zeros(1, 1, 10, 40)).isnan()


def test_what_is_scored():
    assert [scored_on(c) for c in (1, 3, 5)] == ["grey", "rgb", "channels"]
