import sys
import types

import bm3d
import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from skimage.restoration import (
    denoise_bilateral,
    denoise_nl_means,
    denoise_tv_chambolle,
    denoise_wavelet,
)

from deepred_pl.denoisers import (
    BM3D,
    Bilateral,
    Declipped,
    Learned,
    Median,
    NonLocalMeans,
    TotalVariation,
    Wavelet,
    nlm,
)
from tests.helpers import noisy_problem, picture

ALL = [
    NonLocalMeans(10),
    NonLocalMeans(10, backend="torch"),
    TotalVariation(0.05),
    BM3D(10, profile="lc"),
    Wavelet(10),
    Median(3),
    Bilateral(25),
]
STRONG = {TotalVariation: TotalVariation(0.1), Median: Median(5), Bilateral: Bilateral(25, 1)}


def name(denoiser):
    return type(denoiser).__name__


def to_numpy(x):
    return x[0].movedim(0, -1).double().numpy()


@pytest.mark.parametrize("denoiser", ALL, ids=name)
@pytest.mark.parametrize("shape", [(1, 33, 47), (2, 16, 9), (3, 33, 47), (3, 5, 6), (5, 9, 9)])
def test_any_size_and_channel_count_keeps_shape_and_dtype(denoiser, shape):
    x = picture(*shape)
    before = x.clone()
    denoised = denoiser(x)
    assert denoised.shape == x.shape and denoised.dtype == x.dtype
    assert denoised.isfinite().all()
    assert torch.equal(x, before)  # the input is left alone


@pytest.mark.parametrize("denoiser", ALL, ids=name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_comes_back(denoiser, dtype):
    assert denoiser(picture(1, 12, 13).to(dtype)).dtype == dtype


@pytest.mark.parametrize("denoiser", ALL, ids=name)
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_is_taken_away(denoiser, channels):
    problem = noisy_problem(channels, 40, 51)
    error = lambda x: ((x - problem.ground_truth) ** 2).mean()  # noqa: E731
    strong = STRONG.get(type(denoiser)) or type(denoiser)(25)
    assert error(strong(problem.y)) < 0.6 * error(problem.y)


@pytest.mark.parametrize("denoiser", ALL, ids=name)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_flat_image_stays_flat(denoiser, value, channels):
    x = torch.full((1, channels, 12, 13), value)
    torch.testing.assert_close(denoiser(x), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("denoiser", ALL, ids=name)
def test_one_image_is_expected(denoiser):
    with pytest.raises(ValueError, match=r"one image \(1, C, H, W\)"):
        denoiser(torch.rand(3, 12, 13))


@pytest.mark.parametrize("fast", [True, False])
def test_nlm_is_scikit_images_per_channel_with_the_papers_cut_off(fast):
    x = noisy_problem(3, 21, 34).y
    level = 10 / 255
    want = [
        denoise_nl_means(
            channel,
            patch_size=5,
            patch_distance=6,
            h=(0.6 if fast else 0.8) * level,
            sigma=level,
            fast_mode=fast,
        )
        for channel in x[0].double().numpy()
    ]
    got = NonLocalMeans(10, fast=fast)(x)[0].numpy()
    np.testing.assert_allclose(got, np.stack(want), atol=1e-6)


@pytest.mark.parametrize("at_once", [2**20, 2**10])  # the second takes one row at a time
@pytest.mark.parametrize("shape", [(3, 33, 47), (1, 64, 33), (3, 5, 4), (2, 1, 7), (1, 2, 3)])
@pytest.mark.parametrize("settings", [(3, 5, 6), (25, 7, 4), (10, 4, 2), (60, 1, 1)])
def test_nlm_in_torch_is_scikit_images_up_to_the_border(monkeypatch, at_once, shape, settings):
    monkeypatch.setitem(nlm.AT_ONCE, "cpu", at_once)
    x = noisy_problem(*shape).y
    expected = NonLocalMeans(*settings, backend="skimage")(x)
    got = NonLocalMeans(*settings, backend="torch")(x)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_tv_is_scikit_images_over_all_channels():
    x = noisy_problem(3, 21, 34).y
    want = denoise_tv_chambolle(to_numpy(x), weight=0.07, channel_axis=-1)
    np.testing.assert_allclose(to_numpy(TotalVariation(0.07)(x)), want, atol=1e-6)


def test_wavelet_is_scikit_images_per_channel():
    x = noisy_problem(3, 21, 34).y
    want = [denoise_wavelet(c, sigma=10 / 255, rescale_sigma=True) for c in x[0].double().numpy()]
    np.testing.assert_allclose(Wavelet(10)(x)[0].numpy(), np.stack(want), atol=1e-6)


def test_median_is_scipys_per_channel():
    x = noisy_problem(3, 21, 34).y
    want = [median_filter(c, size=5, mode="nearest") for c in x[0].double().numpy()]
    np.testing.assert_allclose(Median(5)(x)[0].numpy(), np.stack(want), atol=1e-6)


def test_bilateral_is_scikit_images_over_all_channels():
    x = noisy_problem(3, 21, 34).y
    want = denoise_bilateral(
        to_numpy(x), sigma_color=0.2, sigma_spatial=2, mode="symmetric", channel_axis=-1
    )
    np.testing.assert_allclose(to_numpy(Bilateral(51, 2)(x)), want, atol=1e-6)


def test_bm3d_is_the_packages_colour_and_grey_denoiser():
    colour, grey = noisy_problem(3, 21, 34).y, noisy_problem(1, 21, 34).y
    want = bm3d.bm3d_rgb(to_numpy(colour), 10 / 255)
    np.testing.assert_allclose(to_numpy(BM3D(10)(colour)), want, atol=1e-6)
    want = bm3d.bm3d(to_numpy(grey)[..., 0], 10 / 255, bm3d.BM3DProfileLC())
    np.testing.assert_allclose(to_numpy(BM3D(10, profile="lc")(grey))[..., 0], want, atol=1e-6)


def test_bm3d_gives_nearly_the_same_on_one_thread_and_two():
    colour = noisy_problem(3, 21, 34).y
    torch.testing.assert_close(BM3D(10, threads=1)(colour), BM3D(10, threads=2)(colour))


def test_bm3d_on_a_gpu_denoises_uncorrelated_colours_at_their_own_levels(monkeypatch):
    calls = []

    def denoise(image, sigma, clamp):
        assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
        calls.append((image, sigma))
        return image

    monkeypatch.setitem(sys.modules, "bm3d_triton", types.SimpleNamespace(denoise=denoise))
    noise = 0.5 + 0.02 * torch.randn(1, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    got = BM3D(0.02 * 255, backend="triton")(noise)
    torch.testing.assert_close(got, noise)  # there and back
    channels = torch.cat([image for image, _ in calls], dim=1)[0].flatten(1)
    levels = torch.tensor([sigma for _, sigma in calls], dtype=torch.float32)
    torch.testing.assert_close(channels.std(dim=1), levels, rtol=0.02, atol=0)
    correlation = torch.corrcoef(channels)
    torch.testing.assert_close(correlation, torch.eye(3), rtol=0, atol=0.02)


def test_bm3d_on_a_gpu_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU and the package bm3d-triton"):
        BM3D(backend="triton").check(picture())


def test_bm3d_takes_grey_stored_as_colour_for_grey():
    grey = noisy_problem(1, 21, 34).y
    got = BM3D(10)(grey.expand(1, 3, 21, 34))
    torch.testing.assert_close(got, BM3D(10)(grey).expand(1, 3, 21, 34))


def test_bm3d_survives_colours_without_contrast():
    x = picture(3, 16, 17)
    x[:, 2] = x[:, 0]  # red is blue: one opponent channel is constant
    assert BM3D(10)(x).isfinite().all()


@pytest.mark.parametrize("kind", [NonLocalMeans, Wavelet, Bilateral])
def test_a_changed_sigma_takes_effect(kind):
    x, denoiser = picture(1, 33, 47), kind(3)
    denoiser.sigma = 60
    assert torch.equal(denoiser(x), kind(60)(x))
    assert not torch.equal(denoiser(x), kind(3)(x))
    with pytest.raises(ValueError, match="grey levels"):
        denoiser.sigma = 300


@pytest.mark.parametrize("kind", [NonLocalMeans, BM3D, Wavelet, Bilateral])
@pytest.mark.parametrize("sigma", [0, -3, 256, float("nan")])
def test_impossible_sigma_is_refused(kind, sigma):
    with pytest.raises(ValueError, match="grey levels"):
        kind(sigma)


def test_other_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="weight"):
        TotalVariation(0)
    for size in (1, 4):
        with pytest.raises(ValueError, match="odd number of pixels"):
            Median(size)
    with pytest.raises(ValueError, match="width must be > 0"):
        Bilateral(width=0)
    with pytest.raises(ValueError, match="patch"):
        NonLocalMeans(patch_size=0)
    with pytest.raises(ValueError, match="profile"):
        BM3D(profile="fast")
    with pytest.raises(ValueError, match="threads must be at least 0"):
        BM3D(threads=-1)
    for kind in (BM3D, NonLocalMeans):
        with pytest.raises(ValueError, match="backend must be"):
            kind(backend="cuda")
    with pytest.raises(ValueError, match="only the fast mode"):
        NonLocalMeans(fast=False, backend="torch")


@pytest.mark.parametrize("sigma", [5, 25, 80])
def test_declipping_recovers_what_clipped_noise_was_added_to(sigma):
    # A denoiser that finds the mean of every row exactly, with its bias.
    class Mean(Wavelet):
        def __call__(self, x):
            return x.mean(-1, keepdim=True).expand_as(x)

    clean = torch.linspace(0, 1, 11).view(1, 1, 11, 1).expand(1, 3, 11, 100_000)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)) * sigma / 255
    y = (clean + noise).clamp(0, 1)
    error = (Declipped(Mean(sigma))(y) - clean).abs().max()
    assert error < 5 * sigma / 255 / 100_000**0.5 / 0.5  # at black and white, half are clipped
    assert (Mean(sigma)(y) - clean).abs().max() > 0.3 * sigma / 255
    denoiser = Declipped(Mean(sigma))
    denoiser.sigma = 2 * sigma
    assert denoiser.sigma == denoiser.denoiser.sigma == 2 * sigma


def test_declipping_needs_a_noise_level():
    with pytest.raises(ValueError, match="a sigma such as BM3D, got TotalVariation without one"):
        Declipped(TotalVariation())
    with pytest.raises(ValueError, match="got Learned without one"):
        Declipped(Learned(module=torch.nn.Identity()))


def test_bm3d_on_a_gpu_is_refused_before_the_fit_where_triton_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm3d_triton", None)
    with pytest.raises(ValueError, match=r"cannot be imported.*or set backend='bm3d'"):
        BM3D(backend="triton").check(picture())
    BM3D(backend="auto").check(picture())  # an image on the CPU needs neither
