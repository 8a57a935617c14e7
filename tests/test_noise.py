import math

import numpy as np
import pytest
import scipy.stats
import torch

from deepred_pl.noise import GaussianNoise
from tests.conftest import picture


def test_samples_have_the_models_mean_and_variance():
    clean = torch.full((1, 1, 1000, 1000), 0.5)
    y = GaussianNoise(25).sample(clean, torch.Generator().manual_seed(0))
    assert y.mean().item() == pytest.approx(0.5, rel=0.01)
    assert y.var().item() == pytest.approx((25 / 255) ** 2, rel=0.01)


def test_samples_depend_on_the_generator_alone():
    clean = torch.rand(1, 3, 5, 7)
    first, second = (
        GaussianNoise(5).sample(clean, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_data_term_is_the_log_likelihood_in_squared_error_units():
    y, sigma = picture(3, 9, 11), 12.0
    predictions = [picture(3, 9, 11).flip(-1), picture(3, 9, 11) * 0.9]
    noise = GaussianNoise(sigma)

    def reference(prediction):
        log_p = scipy.stats.norm.logpdf(y.numpy(), prediction.numpy(), sigma / 255).sum()
        return 2 * (sigma / 255) ** 2 * -log_p / y.numel()

    got = noise.data_term(predictions[0], y) - noise.data_term(predictions[1], y)
    assert got.item() == pytest.approx(reference(predictions[0]) - reference(predictions[1]), 1e-4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [5, 25, 50])
def test_sigma_is_estimated_from_the_measurement(channels, sigma):
    clean = picture(channels, 121, 97)
    y = GaussianNoise(sigma).sample(clean, torch.Generator().manual_seed(0))
    # Fine texture counts as noise: a photograph reads up to two grey levels too high.
    assert GaussianNoise(None).fitted(y).sigma == pytest.approx(sigma, abs=2)


@pytest.mark.parametrize("sigma", [0, -1, 256, math.nan])
def test_impossible_sigma_is_refused(sigma):
    with pytest.raises(ValueError, match=r"sigma must be in \(0, 255\]"):
        GaussianNoise(sigma)


def test_no_noise_to_estimate_and_none_to_simulate():
    with pytest.raises(ValueError, match="estimated as 0"):
        GaussianNoise(None).fitted(torch.full((1, 1, 16, 16), 0.5))
    with pytest.raises(ValueError, match="to simulate a measurement"):
        GaussianNoise(None).sample(torch.zeros(1, 1, 2, 2), torch.Generator())


def test_variance_is_on_the_unit_scale():
    assert GaussianNoise(51).variance() == pytest.approx(0.04)
    assert np.isclose(-10 * math.log10(GaussianNoise(25).variance()), 20.17, atol=0.01)
