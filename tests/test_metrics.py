import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import structural_similarity

from deepred_pl.metrics import luminance, psnr, scored_on, ssim
from tests.helpers import picture


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


def noisy(truth):
    return truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))


def reference_luminance(image):
    levels = np.rint(np.clip(image[0].movedim(0, -1).double().numpy(), 0, 1) * 255)
    return np.rint(rgb2ycbcr(levels.astype(np.uint8))[..., 0])


def test_luminance_is_the_rounded_luma_of_rounded_rgb():
    image = noisy(picture())
    got = luminance(image)
    assert got.shape == (1, 1, 33, 47)
    np.testing.assert_array_equal(got[0, 0].numpy(), reference_luminance(image))
    ends = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
    assert luminance(ends).flatten().tolist() == [16, 235]


def test_psnr_and_ssim_on_luminance():
    truth, image = picture(), noisy(picture())
    y_truth, y_image = reference_luminance(truth), reference_luminance(image)
    want = 10 * math.log10(255**2 / ((y_image - y_truth) ** 2).mean())
    assert psnr(image, truth, "luminance").item() == pytest.approx(want, abs=1e-4)
    want = structural_similarity(
        *(np.pad(v, 5, "reflect") for v in (y_image, y_truth)),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(image, truth, "luminance").item() == pytest.approx(want, abs=5e-4)
    for metric in (psnr, ssim):  # grey images are compared as they are
        assert metric(image[:, :1], truth[:, :1], "luminance") == metric(image[:, :1], truth[:, :1])


def test_ssim_is_nan_below_its_window():
    assert ssim(torch.zeros(1, 1, 10, 40), torch.zeros(1, 1, 10, 40)).isnan()


def test_what_is_scored():
    assert [scored_on(c) for c in (1, 3, 5)] == ["grey", "rgb", "channels"]
    assert [scored_on(c, "luminance") for c in (1, 3, 5)] == ["grey", "luminance", "channels"]
    with pytest.raises(RuntimeError, match="the same shape"):
        psnr(picture(3), picture(1), "luminance")


def test_a_truth_beyond_the_unit_range_is_compared_up_to_its_own():
    truth = 3 * picture(1, 33, 47) - 1
    image = truth + 0.1
    clipped = image.clamp(truth.min(), truth.max())
    want = -10 * math.log10(((clipped - truth) ** 2).mean())
    assert psnr(image, truth).item() == pytest.approx(want, abs=1e-4)
