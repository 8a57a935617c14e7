"""Measurements that disagree with what is stated about them, and the remedies of the messages."""

import re
import warnings

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from skimage.transform import radon, resize

from deepred_pl import RestorationDataModule
from deepred_pl.checks import RestorationWarning
from deepred_pl.noise import (
    GammaNoise,
    GaussianNoise,
    LaplaceNoise,
    PoissonGaussianNoise,
    PoissonNoise,
)
from deepred_pl.operators import Blur, Downsample, Mask, Radon
from tests.helpers import picture


def build(measurement, **settings) -> RestorationDataModule:
    data = RestorationDataModule(**settings)
    data.measurement = measurement
    data.setup()
    return data


def read(measurement, **settings) -> RestorationDataModule:
    """A datamodule that was set up without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestorationWarning)
        return build(measurement, **settings)


def photo(channels=3, height=97, width=121) -> np.ndarray:
    return picture(channels, height, width)[0].movedim(0, -1).numpy()  # (H, W, C)


CROP = skimage.data.coffee()[120:217, 250:371] / 255
COFFEE = torch.from_numpy(CROP).float().movedim(-1, 0)[None]


def drawn(noise, clean=COFFEE, seed=0) -> np.ndarray:
    y = noise.sample(clean, torch.Generator().manual_seed(seed))
    return y[0].movedim(0, -1).numpy()


def as_bytes(y) -> np.ndarray:
    return np.rint(255 * y.clip(0, 1)).astype(np.uint8)


def numbers(message, name) -> float:
    """The value that a message gives for a setting."""
    return float(re.search(rf"{name} to ([\d.]+)", str(message))[1])


# The strength of the noise


@pytest.mark.parametrize("sigma", [3, 5])
def test_a_sigma_far_above_the_noise_is_refused_with_one_that_works(sigma):
    y = as_bytes(drawn(GaussianNoise(sigma)))
    with pytest.raises(ValueError, match=r"set data.noise.sigma to") as refused:
        build(y, noise=GaussianNoise(25))
    found = numbers(refused.value, "data.noise.sigma")
    assert found == pytest.approx(sigma, rel=0.4)  # texture counts as noise
    read(y, noise=GaussianNoise(found))
    read(y, noise=GaussianNoise(None))


@pytest.mark.parametrize("operator", [None, Blur.gaussian(9, 1.6, "reflect"), Mask(photo(1) > 0.3)])
def test_a_sigma_on_the_unit_scale_is_refused(operator):
    clean = picture(1, 97, 121)
    y = drawn(GaussianNoise(10), clean if operator is None else operator(clean))
    if isinstance(operator, Mask):
        y = y * operator.mask[0, 0, ..., None].numpy()
    with pytest.raises(ValueError, match=r"sigma is in grey levels.*not in \[0, 1\]") as refused:
        build(y, operator=operator, noise=GaussianNoise(0.04))
    found = numbers(refused.value, "data.noise.sigma")
    assert found == pytest.approx(10, rel=0.2)
    read(y, operator=operator, noise=GaussianNoise(found))


@pytest.mark.parametrize("sigma", [12, 40])
def test_a_doubtful_sigma_is_a_warning(sigma):
    y = drawn(GaussianNoise(sigma)).clip(0, 1)
    with pytest.warns(RestorationWarning, match="times as strong; set data.noise.sigma to"):
        build(y, noise=GaussianNoise(25 if sigma < 25 else 14))


@pytest.mark.parametrize(
    ("true", "stated", "setting", "right"),
    [
        (PoissonNoise(60), PoissonNoise(30), "data.noise.peak", 60),
        (GammaNoise(20), GammaNoise(5), "data.noise.looks", 20),
        (PoissonGaussianNoise(2, 5), PoissonGaussianNoise(6, 9), "data.noise.gain", 2),
        (LaplaceNoise(10), LaplaceNoise(20), "data.noise.sigma", 10),
    ],
)
def test_other_noise_of_another_strength_is_a_warning_with_its_own_settings(
    true, stated, setting, right
):
    y = drawn(true).clip(0, 1.4)
    with pytest.warns(RestorationWarning, match=setting) as warned:
        build(y, noise=stated)
    assert numbers(warned[0].message, setting) == pytest.approx(right, rel=0.35)


NOISES = [
    GaussianNoise(2),
    GaussianNoise(25),
    GaussianNoise(60),
    LaplaceNoise(20),
    PoissonNoise(30),
    PoissonGaussianNoise(2, 5),
    GammaNoise(9),
]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_as_stated_is_no_warning(noise, channels):
    for seed in range(3):
        y = drawn(noise, picture(channels, 97, 121), seed)
        read(y.clip(0, 1), noise=noise)


def test_the_noise_of_a_jpeg_is_not_refused(tmp_path):
    y = as_bytes(drawn(GaussianNoise(25)))
    Image.fromarray(y).save(tmp_path / "photo.jpg", quality=85)
    read(tmp_path / "photo.jpg", noise=GaussianNoise(25))  # no warning either


def test_grain_of_some_pixels_is_a_warning():
    generator = torch.Generator().manual_seed(0)
    grain = Blur.gaussian(17, 2.5, "reflect")(torch.randn(COFFEE.shape, generator=generator))
    y = as_bytes((COFFEE + 25 / 255 * grain / grain.std())[0].movedim(0, -1).numpy())
    with pytest.warns(RestorationWarning, match="or keep it if the noise is not white"):
        build(y, noise=GaussianNoise(25))


def test_noise_beyond_the_range_is_not_corrected_by_an_impossible_sigma():
    y = np.random.default_rng(0).normal(0.5, 1.2, (64, 64, 1))
    with pytest.warns(RestorationWarning, match=r"set data.intensity_range to a wider \[lo, hi\]"):
        build(y, intensity_range=[0, 1], noise=GaussianNoise(90))


@pytest.mark.parametrize("height", [1, 2, 9])
def test_tiny_images_have_too_few_values_to_judge(height):
    read(photo(1, height, 11), noise=GaussianNoise(25))


# The range


def test_counts_in_sixteen_bits_are_refused_with_a_range_that_works():
    counts = np.random.default_rng(0).poisson(50 * photo(1)).astype(np.uint16)
    with pytest.raises(ValueError, match=r"set data.intensity_range to .*such as \[0, 70\], or"):
        build(counts, noise=PoissonNoise(50))  # minmax would be refused
    data = read(counts, noise=PoissonNoise(70), intensity_range=[0, 70])
    assert data.problem.y.max() == counts.max() / 70 == 1


def test_a_camera_with_an_offset_is_refused_and_minmax_keeps_its_brightness():
    y = np.rint(100 + 119 * photo(1)).astype(np.uint16)
    with pytest.raises(ValueError, match=r"219, is 0.0033 of its range.*\(or minmax\)"):
        build(y, noise=GaussianNoise(10))
    data = read(y, noise=None, intensity_range="minmax")
    assert (data.image_format.low, data.image_format.high) == (y.min(), y.max())
    dark = read(y, noise=None, intensity_range=[0, 65535])  # if it is as dark as that
    assert dark.problem.y.max() == pytest.approx(y.max() / 65535)


@pytest.mark.parametrize("bits", [12, 14])
def test_fewer_bits_than_the_file_has(bits):
    y = np.rint((2**bits - 1) * photo(3)).astype(np.uint16)
    with (
        pytest.raises(ValueError, match=r"\[0, 4095\]")
        if bits == 12
        else pytest.warns(RestorationWarning, match=r"\[0, 16383\]")
    ):
        build(y, noise=None)
    read(y, intensity_range=[0, 2**bits - 1])


def test_an_explicit_range_that_holds_few_values_is_refused():
    with pytest.raises(ValueError, match=r"lie outside of intensity_range \[0, 1\]"):
        build(50 + 200 * photo(), intensity_range=[0, 1])


def test_floats_beyond_one_are_refused_with_a_range_that_every_operator_takes():
    sinogram = radon(resize(photo(1)[:90, :90, 0], (33, 33)), np.arange(0, 180, 6.0), circle=False)
    operator = Radon(30)
    with pytest.raises(ValueError, match=r"set data.intensity_range to .*such as \[0, ") as refused:
        build(sinogram, operator=operator)
    high = float(re.search(r"such as \[0, ([\d.]+)\]", str(refused.value))[1])
    read(sinogram, operator=operator, intensity_range=[0, high])


def test_a_channel_that_is_much_darker_is_a_warning():
    y = np.rint(photo(2) * [60000, 900]).astype(np.uint16)
    with pytest.warns(RestorationWarning, match="channel 1 .* data.intensity_range to minmax"):
        build(y)
    read(y, intensity_range="minmax")
    y[..., 1] = 0  # an empty one
    read(y)


def test_a_darker_channel_within_a_given_range_is_a_warning():
    y = photo(2) * [3300, 180]
    with pytest.warns(RestorationWarning, match="channel 1 .* data.intensity_range to minmax"):
        build(y, intensity_range=[0, 4095])
    read(y, intensity_range="minmax")


def test_a_channel_with_less_noise_is_a_warning():
    y = drawn(GaussianNoise([10, 1]), COFFEE[:, :2])
    with pytest.warns(RestorationWarning, match=r"that of the channels seems to be 1\.*"):
        build(y, noise=GaussianNoise(10))
    read(y, noise=GaussianNoise(None))


def test_hot_pixels_do_not_hide_an_empty_range():
    y = np.rint(4095 * photo(1)).astype(np.uint16)
    y[[3, 30, 50], [7, 70, 90]] = 65535
    with pytest.warns(RestorationWarning, match=r"hot pixels, set .* to \[0, 4095"):
        build(y)
    read(y, intensity_range=[0, 4095])


@pytest.mark.parametrize("intensity_range", ["dtype", [0, 1]])
@pytest.mark.parametrize("mark", [-9999, -3.4e38])
def test_values_that_mark_missing_ones_are_to_be_nan(intensity_range, mark):
    y = photo(1)
    y[10:20, 30:40] = mark
    with pytest.raises(ValueError, match=r"the value of 100, marks|100 of .* set them to NaN"):
        build(y, intensity_range=intensity_range)
    y[10:20, 30:40] = np.nan
    with pytest.warns(RestorationWarning, match="100 of the 11737 values"):
        build(y, intensity_range=intensity_range)


def test_an_image_without_noise_gets_a_sigma_that_is_taken():
    y = np.full((64, 64), 90, np.uint8)
    y[20:40, 20:40] = 200
    with pytest.raises(ValueError, match=r"set data.noise.sigma to 0\.3"):
        build(y, noise=GaussianNoise(25))
    with pytest.raises(ValueError, match=r"set data\.noise\.sigma"):
        build(y, noise=GaussianNoise(None))
    read(y, noise=GaussianNoise(0.3))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_opaque_last_channel_of_an_array_is_transparency(channels):
    y = as_bytes(photo(channels))
    data = read(np.dstack([y, np.full(y.shape[:2], 255, np.uint8)]))
    assert data.problem.y.shape[1] == channels and (data.image_format.alpha == 255).all()


def test_nothing_but_zeros_is_refused():
    with pytest.raises(ValueError, match="every value of the measurement is 0"):
        build(np.zeros((9, 11), np.uint8))


# The range is no cage


@pytest.mark.parametrize("intensity_range", ["percentile", [-60, 60]])
def test_a_star_beyond_the_range_is_within_the_limits(intensity_range):
    y = np.random.default_rng(0).normal(0, 20, (67, 91))
    y[30, 40] += 5000
    high = read(y, intensity_range=intensity_range).problem.limits[1]
    data = read(y, intensity_range=intensity_range, noise=GaussianNoise(None))
    span = data.image_format.high - data.image_format.low
    assert data.image_format.low + span * high == pytest.approx(y.max(), rel=1e-4)
    # 20 in grey levels of the range, although the star makes it small
    assert data.problem.noise.sigma * span / 255 == pytest.approx(20, rel=0.1)


def test_beads_may_be_brighter_than_their_blur_but_not_negative():
    clean = np.full((67, 91), 100.0)
    clean[30:32, 40:42] = 1000
    operator = Blur.gaussian(13, 2, "reflect")
    y = operator(torch.tensor(clean)[None, None].float())[0, 0].numpy()
    data = read(y, operator=operator, intensity_range="minmax")
    (low, high), stored = data.problem.limits, data.image_format
    stored_limits = [stored.low + limit * (stored.high - stored.low) for limit in (low, high)]
    assert stored_limits[0] == pytest.approx(0, abs=1e-3)
    assert stored_limits[1] > 1000 > y.max() + 500


def test_photographs_stay_within_their_type():
    operator = Blur.gaussian(9, 1.6, "reflect")
    assert read(as_bytes(photo()), operator=operator).problem.limits == (0, 1)
    assert read(as_bytes(photo()), intensity_range="minmax").problem.limits == (0, 1)
    assert read(drawn(GaussianNoise(25)), noise=GaussianNoise(25)).problem.limits == (0, 1)


@pytest.mark.parametrize("brightness", [1, 4])
def test_an_object_brighter_than_one_is_within_the_limits_of_tomography(brightness):
    x = np.zeros((33, 33))
    x[12:19, 10:20] = brightness
    angles = np.arange(0, 180, 6.0)
    sinogram = radon(x, angles, circle=True) / 33
    high = read(sinogram, operator=Radon(angles, circle=True)).problem.limits[1]
    assert high == 1 if brightness == 1 else high > brightness


# How it was read


@pytest.mark.parametrize("shape", [(3, 64, 97), (31, 64, 64), (64, 3, 64)])
def test_channels_that_come_first_are_refused(shape):
    with pytest.raises(ValueError, match=rf"read as {shape[0]}×{shape[1]} pixels with {shape[2]}"):
        build(np.full(shape, 0.5))


def test_more_channels_than_rows_are_a_warning():
    with pytest.warns(RestorationWarning, match="64×96 pixels with 80 channels"):
        build(np.full((64, 96, 80), 0.5))
    read(np.full((64, 60, 31), 0.5))
    with pytest.warns(RestorationWarning, match="100×31 pixels with 31 channels"):
        build(np.full((100, 31, 31), 0.5))


def sinogram(angles) -> np.ndarray:
    x = np.zeros((45, 45))
    x[12:19, 10:30] = 1
    x[25:30, 27:31] = 0.5
    return radon(x, angles, circle=True) / 45


DEGREES = np.linspace(0, 180, 45, endpoint=False)


def test_transmitted_light_is_no_sinogram():
    y = sinogram(DEGREES)
    with pytest.warns(RestorationWarning, match=r"−log\(I / I₀\)"):
        build(np.exp(-y), operator=Radon(DEGREES, circle=True))


def test_angles_in_radians_are_refused_and_degrees_are_not():
    y, radians = sinogram(DEGREES), np.deg2rad(DEGREES)
    with pytest.raises(ValueError, match=r"seems to be radians.*numpy.rad2deg"):
        build(y, operator=Radon(radians, circle=True))
    read(y, operator=Radon(np.rad2deg(radians), circle=True))


def test_a_transposed_sinogram_is_refused():
    y = sinogram(DEGREES)
    with pytest.raises(ValueError, match=r"transpose it to \(detectors, angles\)"):
        build(y.T.copy(), operator=Radon(DEGREES, circle=True))


def test_a_small_object_in_noise_is_no_warning():
    x = np.zeros((65, 65))
    x[30:37, 29:36] = 0.5
    noise = np.random.default_rng(0).normal(0, 5 / 255, (65, 45))
    y = radon(x, DEGREES, circle=True) / 65 + noise
    read(y, operator=Radon(DEGREES, circle=True), noise=GaussianNoise(5))


def test_a_few_degrees_around_zero_are_only_a_warning():
    angles = np.linspace(-3, 3, 13)
    with pytest.warns(RestorationWarning, match="seems to be radians"):
        build(sinogram(angles), operator=Radon(angles, circle=True))


@pytest.mark.parametrize("angles", [np.random.default_rng(0).permutation(DEGREES), 4 * DEGREES])
def test_angles_of_another_scan_are_a_warning(angles):
    with pytest.warns(RestorationWarning, match="not that of one object at these angles"):
        build(sinogram(DEGREES), operator=Radon(angles, circle=True))


def test_an_object_that_leaves_the_field_of_view_is_a_warning():
    y = sinogram(DEGREES)[9:20]
    with pytest.warns(RestorationWarning, match="sums of the projections vary by"):
        build(y, operator=Radon(DEGREES, circle=True))


@pytest.mark.parametrize("span", [120, 180, 360])
@pytest.mark.parametrize("sigma", [0, 2, 10])
def test_a_consistent_scan_is_no_warning(span, sigma):
    angles = np.linspace(0, span, 40, endpoint=False)
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(0, sigma / 255, (45, 40))
        read(
            sinogram(angles) + noise,
            operator=Radon(angles, circle=True),
            noise=GaussianNoise(max(sigma, 0.5)) if sigma else None,
        )


def painted() -> tuple[np.ndarray, np.ndarray]:
    y, known = as_bytes(photo()), np.ones((97, 121), bool)
    known[40:48, 10:86] = False
    y[~known] = 255, 0, 0
    return y, known


def test_an_inverted_mask_is_refused():
    y, known = painted()
    with pytest.raises(ValueError, match=r"all have one value.*invert the mask"):
        build(y, operator=Mask(~known))
    read(y, operator=Mask(known))


def test_a_mask_that_may_be_inverted_is_a_warning():
    y, known = as_bytes(photo()), painted()[1]
    with pytest.warns(RestorationWarning, match=r"Only 5.2% of the pixels.*invert the mask"):
        build(y, operator=Mask(~known))
    read(y, operator=Mask(np.random.default_rng(0).random(known.shape) < 0.1))
    gone = np.where(known[..., None], np.nan, y / 255)  # no mask that could be inverted
    with pytest.warns(RestorationWarning) as warned:
        build(gone)
    assert [str(w.message)[:5] for w in warned] == ["33387"]


@pytest.mark.parametrize("width", [2, 3])
def test_thin_scratches_that_may_be_inverted_are_a_warning(width):
    rows, columns = np.indices((97, 121))
    scratches = (rows + columns // 2) % 30 < width
    with pytest.warns(RestorationWarning, match="in connected regions"):
        build(photo(), operator=Mask(scratches))
    read(photo(), operator=Mask(~scratches))
    read(photo(), operator=Mask(rows % 4 == 0))  # every fourth row was measured


def test_a_mask_without_a_missing_pixel_is_a_warning():
    with pytest.warns(RestorationWarning, match="Every pixel of the mask is known"):
        build(photo(), operator=Mask(np.ones((97, 121))))


@pytest.mark.parametrize("factor", [2, 3])
def test_small_images_are_no_warning(factor):
    read(as_bytes(photo(3, 30, 42)), operator=Downsample(factor))
