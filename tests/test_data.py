from pathlib import Path

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image

from deepred_pl import RestorationDataModule
from deepred_pl.noise import GaussianNoise, PoissonNoise
from deepred_pl.operators import Blur, Downsample, Mask, Radon
from deepred_pl.sources import SAMPLES


def set_up(**settings) -> RestorationDataModule:
    data = RestorationDataModule(**settings)
    data.setup()
    return data


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(skimage.data.astronaut()[:35, :41]).save(path)
    return path


def test_without_files_the_embedded_crop_is_degraded():
    problem = set_up(noise=GaussianNoise(25)).problem
    crop = skimage.data.astronaut()[64:192, 160:288] / 255
    np.testing.assert_allclose(problem.ground_truth[0].movedim(0, -1).numpy(), crop, atol=1e-7)
    assert problem.y.shape == (1, 3, 128, 128)
    assert problem.y.min() == 0 and problem.y.max() == 1  # clipped
    mse = ((problem.y - problem.ground_truth) ** 2).mean().item()
    assert -10 * np.log10(mse) == pytest.approx(20.6, abs=0.1)
    assert not torch.equal((problem.y * 255).round() / 255, problem.y)  # not rounded


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_a_crop_of_128_pixels(name):
    problem = set_up(ground_truth=f"sample:{name}").problem
    assert problem.ground_truth.shape == (1, 1 if name == "camera" else 3, 128, 128)


def test_simulation_depends_on_the_data_seed_alone(photo):
    def simulated(seed):
        torch.manual_seed(np.random.default_rng().integers(1000))
        return set_up(ground_truth=photo, noise=GaussianNoise(25), seed=seed).problem.y

    assert torch.equal(simulated(0), simulated(0))
    assert not torch.equal(simulated(0), simulated(1))


@pytest.mark.parametrize(
    ("crop", "rows", "columns"),
    [
        (20, slice(7, 27), slice(10, 30)),
        (37, slice(0, 35), slice(2, 39)),
        (99, slice(35), slice(41)),
    ],
)
def test_a_crop_is_the_middle_before_it_is_degraded(photo, crop, rows, columns):
    blur = Blur.uniform(5)
    problem = set_up(ground_truth=photo, operator=blur, crop=crop).problem
    truth = torch.from_numpy(skimage.data.astronaut()[:35, :41][rows, columns] / 255).float()
    assert torch.equal(problem.ground_truth, truth.movedim(-1, 0)[None])
    torch.testing.assert_close(problem.y, blur(problem.ground_truth).clamp(0, 1))


def test_a_crop_takes_the_mask_with_it(photo):
    known = torch.arange(35 * 41).reshape(35, 41) % 3 > 0
    problem = set_up(ground_truth=photo, operator=Mask(known), crop=20).problem
    assert torch.equal(problem.operator.mask[0, 0].bool(), known[7:27, 10:30])


def test_a_crop_takes_the_transparency_with_it(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8)
    Image.fromarray(levels).save(tmp_path / "clear.png")
    data = set_up(ground_truth=tmp_path / "clear.png", crop=34)
    assert (data.image_format.alpha == levels[3:37, 8:42, 3]).all()


def test_a_crop_of_a_measurement_or_of_nothing_is_refused(photo):
    with pytest.raises(ValueError, match="there is a measurement; set region"):
        set_up(measurement=photo, crop=20)
    with pytest.raises(ValueError, match="crop must be at least 1, got 0"):
        RestorationDataModule(ground_truth=photo, crop=0)


def test_a_measurement_is_taken_as_it_is(photo):
    problem = set_up(measurement=photo, noise=GaussianNoise(3)).problem
    want = skimage.data.astronaut()[:35, :41] / 255
    np.testing.assert_allclose(problem.y[0].movedim(0, -1).numpy(), want, atol=1e-7)
    assert problem.ground_truth is None


def test_measurement_and_ground_truth_together(photo, tmp_path):
    problem = set_up(measurement=photo, ground_truth=photo).problem
    assert torch.equal(problem.y, problem.ground_truth)
    Image.fromarray(skimage.data.astronaut()[:35, :40]).save(tmp_path / "narrow.png")
    with pytest.raises(ValueError, match=r"ground_truth must be \(1, 3, 35, 41\)"):
        set_up(measurement=photo, ground_truth=tmp_path / "narrow.png")


def test_the_inputs_format_is_known(tmp_path):
    np.save(tmp_path / "y.npy", np.full((9, 9), 0.5, np.float32))
    assert set_up(measurement=tmp_path / "y.npy").image_format.dtype == "float32"


def test_a_blurred_measurement_is_simulated(photo):
    problem = set_up(ground_truth=photo, operator=Blur.uniform(5), noise=GaussianNoise(2)).problem
    clean = Blur.uniform(5)(problem.ground_truth)
    assert (problem.y - clean).std().item() == pytest.approx(2 / 255, rel=0.1)


@pytest.mark.parametrize("degrade", ["operator", "antialiased_resize"])
def test_a_ground_truth_is_cropped_for_downsampling(photo, degrade):
    data = set_up(ground_truth=photo, operator=Downsample(4), degrade=degrade)
    crop = skimage.data.astronaut()[1:33, :40]  # the middle of 35 × 41
    np.testing.assert_allclose(
        data.problem.ground_truth[0].movedim(0, -1).numpy(), crop / 255, atol=1e-7
    )
    assert data.problem.y.shape == (1, 3, 8, 10)
    if degrade == "antialiased_resize":
        small = Image.fromarray(crop).resize((10, 8), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(
            (data.problem.y[0].movedim(0, -1) * 255).round().byte().numpy(), np.asarray(small)
        )


def test_a_small_measurement_and_its_large_ground_truth(photo, tmp_path):
    Image.fromarray(skimage.data.astronaut()[:8, :10]).save(tmp_path / "small.png")
    data = set_up(measurement=tmp_path / "small.png", ground_truth=photo, operator=Downsample(4))
    assert data.problem.ground_truth.shape == data.problem.image_shape == (1, 3, 32, 40)


def test_a_ground_truth_is_padded_to_a_square_for_projections(photo):
    problem = set_up(ground_truth=photo, operator=Radon(5)).problem
    assert problem.image_shape == (1, 3, 41, 41) and problem.y.shape == (1, 3, 58, 5)
    assert problem.ground_truth[..., :3, :].sum() == problem.ground_truth[..., 38:, :].sum() == 0


def test_missing_pixels_are_drawn_with_the_data_seed(photo):
    def mask(seed):
        return set_up(ground_truth=photo, operator=Mask(keep_fraction=0.5), seed=seed).problem

    assert torch.equal(mask(0).y, mask(0).y)
    assert not torch.equal(mask(0).operator.mask, mask(1).operator.mask)
    assert (mask(0).y == 0).float().mean() > 0.49


def test_a_simulation_is_clipped_or_not(photo):
    noise = PoissonNoise(5)
    assert set_up(ground_truth=photo, noise=noise).problem.y.max() == 1
    y = set_up(ground_truth=photo, noise=noise, clip=False).problem.y
    assert y.max() > 1 and torch.equal((y * 5).round(), y * 5)


def test_a_ranges_sigma_and_ground_truth_are_on_one_scale(tmp_path):
    truth = (skimage.data.astronaut()[:35, :41].astype(np.uint16) * 16).clip(max=4095)
    tifffile.imwrite(tmp_path / "truth.tif", truth, photometric="rgb")
    tifffile.imwrite(tmp_path / "y.tif", truth // 4 * 3, photometric="rgb")
    files = {"measurement": tmp_path / "y.tif", "ground_truth": tmp_path / "truth.tif"}
    problem = set_up(**files, intensity_range=[0, 4095]).problem
    np.testing.assert_allclose(
        problem.y[0].movedim(0, -1).numpy(), truth // 4 * 3 / 4095, atol=1e-6
    )
    data = set_up(**files, intensity_range="minmax")  # the measurement's, for both
    assert data.problem.y.max() == 1 and data.problem.ground_truth.max() > 1.3
    assert data.image_format.low == tuple((truth // 4 * 3).min((0, 1)))
    assert data.image_format.high == tuple((truth // 4 * 3).max((0, 1)))


def test_a_sinograms_range_is_not_the_images(photo, tmp_path):
    sums = Radon(5)(torch.rand(1, 1, 41, 41))[0, 0].numpy() * 58
    np.save(tmp_path / "sinogram.npy", sums)
    with pytest.raises(ValueError, match="intensity_range"):
        set_up(measurement=tmp_path / "sinogram.npy", operator=Radon(5))
    with pytest.raises(ValueError, match=r"shifts 0.*number of detectors"):
        set_up(measurement=tmp_path / "sinogram.npy", operator=Radon(5), intensity_range="minmax")
    data = set_up(measurement=tmp_path / "sinogram.npy", operator=Radon(5), intensity_range=[0, 58])
    np.testing.assert_allclose(data.problem.y[0, 0].numpy(), sums / 58, atol=1e-6)
    assert (data.image_format.dtype, data.image_format.high) == ("float32", 1)


def test_a_page_is_chosen(tmp_path):
    pages = np.stack([np.full((9, 11), level, np.uint8) for level in (10, 20, 30)])
    tifffile.imwrite(tmp_path / "pages.tif", pages, photometric="minisblack")
    with pytest.raises(ValueError, match=r"3 pages.*page"):
        set_up(measurement=tmp_path / "pages.tif")
    assert (set_up(measurement=tmp_path / "pages.tif", page=1).problem.y * 255).round().max() == 20
    Image.fromarray(pages[0]).save(tmp_path / "truth.png")
    files = {"measurement": tmp_path / "pages.tif", "ground_truth": tmp_path / "truth.png"}
    assert (set_up(**files, page=2).problem.ground_truth * 255).round().max() == 10


def test_an_array_and_an_operator_of_others_serve(photo):
    class Halve:
        def A(self, x):
            return x / 2

        A_adjoint = A

    data = RestorationDataModule(operator=Halve(), ground_truth=photo)
    data.setup()
    torch.testing.assert_close(data.problem.y, data.problem.ground_truth / 2)
    data = RestorationDataModule(operator=Halve())
    data.measurement = skimage.data.astronaut()[:35, :41]
    data.setup()
    assert data.problem.y.shape == (1, 3, 35, 41)


def test_counts_keep_their_zero(photo, tmp_path):
    with pytest.raises(ValueError, match="shifts 0, but PoissonNoise requires"):
        set_up(measurement=photo, noise=PoissonNoise(5), intensity_range="percentile")
    counts = np.random.default_rng(0).poisson(skimage.data.astronaut()[:35, :41] / 51)
    np.save(tmp_path / "counts.npy", counts)
    assert set_up(
        measurement=tmp_path / "counts.npy", noise=PoissonNoise(5), intensity_range=[0, 5]
    )


def test_bright_counts_are_taken_as_they_are(tmp_path):
    np.save(tmp_path / "counts.npy", np.array([[20.0, 3.0], [11.0, 0.0]]) / 10)
    with pytest.raises(ValueError, match="intensity_range"):
        set_up(measurement=tmp_path / "counts.npy", noise=PoissonNoise(10))
    y = set_up(measurement=tmp_path / "counts.npy", intensity_range=[0, 1]).problem.y
    assert y.max() == 2


def test_what_is_scored_is_told_to_the_problem(photo):
    assert set_up(ground_truth=photo, metric_on="luminance").problem.metric_on == "luminance"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degrade": "bicubic"}, "degrade must be"),
        ({"metric_on": "y"}, "metric_on must be"),
        ({"degrade": "antialiased_resize"}, "needs a Downsample, got Identity"),
        ({"operator": Downsample(200)}, "larger than the image, 128×128"),
        ({"operator": Blur.uniform(129)}, "no larger than the image"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        set_up(**settings)


def test_an_unknown_sample_is_refused():
    with pytest.raises(ValueError, match=r"expected one of the samples astronaut.*sample:house"):
        set_up(ground_truth="sample:house")


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed"):
        RestorationDataModule(seed=-1)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "astronaut"),
        ({"ground_truth": "sample:camera"}, "camera"),
        ({"ground_truth": "set:set5/head"}, "head"),
        ({"measurement": "photos/my house.v2.png"}, "my house.v2"),
        ({"measurement": "scan 12:30:05.png"}, "scan 12:30:05"),
        ({"measurement": "a.png", "ground_truth": Path("clean/b.tif")}, "b"),
        ({"measurement": np.zeros((9, 9))}, "unnamed"),
    ],
)
def test_an_image_has_its_files_name(settings, name):
    assert RestorationDataModule(**settings).name == name


def test_a_simulated_run_keeps_the_format_of_its_ground_truth(tmp_path):
    truth = skimage.data.astronaut()[:35, :41].astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "truth.tif", truth, photometric="rgb", resolution=(300, 300))
    data = RestorationDataModule(tmp_path / "truth.tif", noise=GaussianNoise(25))
    data.setup()
    stored = data.image_format
    assert (stored.dtype, stored.high, stored.kind) == ("uint16", 65535, "tiff")
    assert "uint16, black and white at 0 to 65535" in data.reading


def test_values_are_held_out_of_the_region_that_is_restored(tmp_path):
    photo = skimage.data.astronaut()[:60, :64]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    region = (10, 8, 40, 48)
    data = RestorationDataModule(
        measurement=tmp_path / "photo.png", region=region, hold_out=0.1, noise=GaussianNoise(5)
    )
    data.setup()
    held = data.problem.held_out
    assert held.shape == (1, 1, 40, 48) and held.sum() == 192
    assert not (data.problem.y * held).any()
    part = torch.from_numpy(photo[10:50, 8:56] / 255).movedim(-1, 0)[None].float()
    assert torch.allclose(data.problem.as_image(), part)  # the picture has no holes


def test_the_ground_truth_of_a_stack_may_be_a_stack(tmp_path):
    clean = torch.rand(3, 2, 35, 41, generator=torch.Generator().manual_seed(0)).numpy()
    noisy = (clean + 0.05 * np.random.default_rng(0).normal(size=clean.shape)).astype(np.float32)
    tifffile.imwrite(tmp_path / "y.tif", noisy, imagej=True, metadata={"axes": "TCYX"})
    np.save(tmp_path / "truth.npy", clean)
    np.save(tmp_path / "last.npy", np.moveaxis(clean[1], 0, -1))
    files = {"measurement": tmp_path / "y.tif", "ground_truth": tmp_path / "truth.npy"}
    options = {"axes": "TCYX", "page": 1, "noise": GaussianNoise(12.75)}
    data = set_up(**files, **options)
    np.testing.assert_array_equal(data.problem.y[0].numpy(), noisy[1])
    np.testing.assert_array_equal(data.problem.ground_truth[0].numpy(), clean[1])
    assert "2 channels" in data.reading and "axes TCYX, page 1 (from 0) of 3" in data.reading
    one = set_up(**files | {"ground_truth": tmp_path / "last.npy"}, **options)  # of this page
    np.testing.assert_array_equal(one.problem.ground_truth[0].numpy(), clean[1])
    together = set_up(**files, **options | {"page": "all"})
    np.testing.assert_array_equal(together.problem.y[0].numpy(), noisy.reshape(6, 35, 41))
    np.testing.assert_array_equal(
        together.problem.ground_truth[0].numpy(), clean.reshape(6, 35, 41)
    )
    simulated = set_up(ground_truth=tmp_path / "truth.npy", axes="TCYX", page=2)
    np.testing.assert_array_equal(simulated.problem.ground_truth[0].numpy(), clean[2])
