import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from deepred_pl import RestorationDataModule
from deepred_pl.data import SAMPLES
from deepred_pl.noise import GaussianNoise


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


def test_a_measurement_is_taken_as_it_is(photo):
    problem = set_up(measurement=photo, noise=GaussianNoise(25)).problem
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
    np.save(tmp_path / "y.npy", np.zeros((9, 9), np.float32))
    assert set_up(measurement=tmp_path / "y.npy").image_format.dtype == "float32"


def test_an_unknown_sample_is_refused():
    with pytest.raises(ValueError, match=r"expected one of the samples astronaut.*sample:house"):
        set_up(ground_truth="sample:house")


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed"):
        RestorationDataModule(seed=-1)
