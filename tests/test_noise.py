import math

import numpy as np
import pytest
import scipy.stats
import torch

from deepred_pl import InverseProblem
from deepred_pl.noise import (
    LEAST_SPECKLE,
    GammaNoise,
    GaussianNoise,
    LaplaceNoise,
    PoissonGaussianNoise,
    PoissonNoise,
)
from deepred_pl.operators import Mask
from tests.helpers import picture

# A model, its variance at a clean value c, and SciPy's log p(y | m).
MODELS = {
    "gaussian": (
        GaussianNoise(25),
        lambda c: (25 / 255) ** 2,
        lambda y, m: scipy.stats.norm.logpdf(y, m, 25 / 255),
    ),
    "laplace": (
        LaplaceNoise(20),
        lambda c: (20 / 255) ** 2,
        lambda y, m: scipy.stats.laplace.logpdf(y, m, 20 / 255 / math.sqrt(2)),
    ),
    "poisson": (
        PoissonNoise(30),
        lambda c: c / 30,
        lambda y, m: scipy.stats.poisson.logpmf(np.rint(30 * y), 30 * m),
    ),
    # 255 / 5.1 = 50 photons at white; the read noise adds σ² / gain² = 1 count.
    "poisson-gaussian": (
        PoissonGaussianNoise(gain=5.1, sigma=5.1),
        lambda c: c / 50 + 0.02**2,
        lambda y, m: scipy.stats.poisson.logpmf(np.rint(50 * y) + 1, 50 * m + 1),
    ),
    "gamma": (
        GammaNoise(4),
        lambda c: c**2 / 4,
        lambda y, m: scipy.stats.gamma.logpdf(y, 4, scale=m / 4),
    ),
}


@pytest.mark.parametrize("clean", [0.5, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_a_million_samples_have_the_models_mean_and_variance(name, clean):
    noise, variance, _ = MODELS[name]
    y = noise.sample(torch.full((1, 1, 1000, 1000), clean), torch.Generator().manual_seed(0))
    assert y.mean().item() == pytest.approx(clean, rel=0.01)
    assert y.var().item() == pytest.approx(variance(clean), rel=0.01)
    # What the data term is scaled by is told from y, and is the same.
    assert noise.mean_variance(y).item() == pytest.approx(variance(clean), rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_samples_depend_on_the_generator_alone(name):
    clean = torch.rand(1, 3, 5, 7)
    first, second, other = (
        MODELS[name][0].sample(clean, torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("name", MODELS)
def test_the_data_term_is_scipys_log_likelihood_in_squared_error_units(name):
    noise, _, log_p = MODELS[name]
    clean = 0.1 + 0.8 * picture(3, 9, 11)
    counts = {"poisson": 30, "poisson-gaussian": 50}.get(name)
    y = noise.sample(clean, torch.Generator().manual_seed(0))
    if counts:  # SciPy knows whole counts alone
        y = (y * counts).round().clamp(min=0) / counts
    factor = 2 * noise.mean_variance(y.double()).item()

    def reference(prediction):
        return factor * -log_p(y.double().numpy(), prediction.double().numpy()).mean()

    predictions = [clean.flip(-1), clean * 0.9, clean + 0.05]
    got = [noise.data_term(p, y, noise.mean_variance(y)).item() for p in predictions]
    want = [reference(p) for p in predictions]
    np.testing.assert_allclose(np.diff(got), np.diff(want), rtol=5e-4, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_true_image_explains_best_of_all_constants(name):
    noise = MODELS[name][0]
    y = noise.sample(torch.full((1, 1, 300, 300), 0.5), torch.Generator().manual_seed(0))
    levels = torch.linspace(0.3, 0.7, 81)
    terms = torch.stack(
        [noise.data_term(torch.full_like(y, c), y, noise.mean_variance(y)) for c in levels]
    )
    assert levels[terms.argmin()].item() == pytest.approx(0.5, abs=0.011)


@pytest.mark.parametrize(
    "noise", [PoissonNoise(1e4), PoissonGaussianNoise(0.0255, 0.1), GammaNoise(10)]
)
def test_the_dark_is_not_made_darker(noise):
    y = noise.sample(torch.full((1, 1, 300, 300), 0.002), torch.Generator().manual_seed(0))
    levels = torch.linspace(0, 0.004, 81)
    terms = torch.stack(
        [noise.data_term(torch.full_like(y, c), y, noise.mean_variance(y)) for c in levels]
    )
    assert levels[terms.argmin()].item() == pytest.approx(0.002, abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_finite_everywhere(name):
    noise = MODELS[name][0]
    grid = torch.tensor([-0.1, 0.0, 1e-12, LEAST_SPECKLE, 0.5, 1.0, 1.3])
    prediction, y = torch.meshgrid(grid, grid.clamp(min=0), indexing="ij")
    prediction = prediction.clone().requires_grad_()
    value = noise.data_term(prediction, y, noise.mean_variance(y))
    (gradient,) = torch.autograd.grad(value, prediction)
    assert value.isfinite() and gradient.isfinite().all()
    # In the dark a lit measurement pulls upwards.
    assert (gradient[:3, 4:] < 0).all()


@pytest.mark.parametrize("name", ["poisson", "gamma"])
def test_zeros_give_finite_gradients_and_nothing_but_zeros_is_refused(name):
    prediction, y = torch.zeros(1, 1, 4, 5, requires_grad=True), torch.zeros(1, 1, 4, 5)
    y[..., 0] = 0.5
    noise = MODELS[name][0]
    value = noise.data_term(prediction, y, noise.mean_variance(y))
    gradient = torch.autograd.grad(value, prediction)[0]
    assert gradient.isfinite().all() and (gradient[..., 0] < 0).all()
    with pytest.raises(ValueError, match="every value is 0"):
        InverseProblem(torch.zeros(1, 1, 4, 5), noise=MODELS[name][0])


@pytest.mark.parametrize("name", MODELS)
def test_unobserved_values_count_for_nothing(name):
    noise = MODELS[name][0]
    clean = 0.1 + 0.8 * picture(3, 9, 11)
    y, out = noise.sample(clean, torch.Generator().manual_seed(0)).clamp(min=0), clean.flip(-1)
    mask = picture(1, 9, 11) > 0.4
    known = mask.expand_as(y)
    problem = InverseProblem(y, Mask(mask), noise)
    want = noise.data_term(out[known], y[known], noise.mean_variance(y[known]))
    torch.testing.assert_close(problem.data_term(out), want, rtol=1e-4, atol=1e-6)
    want = noise.mean_variance(y[known])
    torch.testing.assert_close(problem.noise_variance(), want)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [5, 25, 50])
def test_sigma_is_estimated_from_the_measurement(channels, sigma):
    clean = picture(channels, 121, 97)
    y = GaussianNoise(sigma).sample(clean, torch.Generator().manual_seed(0))
    # Fine texture counts as noise: a photograph reads up to two grey levels too high.
    assert GaussianNoise(None).fitted(y).sigma == pytest.approx(sigma, abs=2)


def test_sigma_is_estimated_from_the_known_pixels():
    y = GaussianNoise(30).sample(picture(3, 97, 121), torch.Generator().manual_seed(0))
    known = torch.ones(1, 1, 97, 121).bool()
    known[..., 20:80, 30:60] = False
    problem = InverseProblem(y, Mask(known), GaussianNoise(None))
    assert problem.noise.sigma == pytest.approx(30, rel=0.07)
    with pytest.raises(ValueError, match="too few known values"):
        InverseProblem(picture(), Mask(torch.eye(47)[:33]), GaussianNoise(None))


def test_channels_of_unlike_noise_have_their_own_sigma():
    clean, noise = picture(2, 97, 121), GaussianNoise([8, 40])
    y = noise.sample(clean, torch.Generator().manual_seed(0))
    np.testing.assert_allclose((y - clean).std(dim=(0, 2, 3)) * 255, [8, 40], rtol=0.03)
    assert GaussianNoise(None).fitted(y).sigma == pytest.approx([8, 40], rel=0.25)
    problem = InverseProblem(y, noise=noise)
    assert problem.noise_variance().item() == pytest.approx((8**2 + 40**2) / 2 / 255**2)
    # D = 2σ̄² · (−log p) / N: each channel's squared residual by its own variance.
    variances = np.array([8, 40]) ** 2 / 255**2
    squares = (y - clean).square().mean(dim=(0, 2, 3)).numpy()
    want = variances.mean() * (squares / variances).mean()
    assert problem.data_term(clean).item() == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="one number or 3, one for each channel, got 2"):
        InverseProblem(picture(3), noise=noise)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("rest", [0.0, 0.4])
def test_channels_that_are_empty_have_the_noise_of_the_others(place, rest):
    y = torch.full((1, 3, 41, 47), rest)
    noise = torch.randn(41, 47, generator=torch.Generator().manual_seed(0))
    y[:, place] = 0.5 + 0.1 * noise
    sigma = GaussianNoise(None).fitted(y.clamp(0, 1)).sigma
    assert sigma == pytest.approx(25.5, rel=0.1)


@pytest.mark.parametrize("sigma", [np.float32(10), np.array(10), torch.tensor(10.0)])
def test_numbers_of_other_libraries_are_taken(sigma):
    for noise in (GaussianNoise(sigma), LaplaceNoise(sigma), PoissonGaussianNoise(sigma, sigma)):
        assert isinstance(noise.sigma, float | int) and noise.sigma == 10
    assert PoissonNoise(sigma).peak == GammaNoise(sigma).looks == 10


@pytest.mark.parametrize(
    "model", [GaussianNoise, LaplaceNoise, lambda s: PoissonGaussianNoise(1, s)]
)
@pytest.mark.parametrize("sigma", [0, -1, 256, math.nan])
def test_impossible_sigma_is_refused(model, sigma):
    with pytest.raises(ValueError, match=r"sigma must be in \(0, 255\]"):
        model(sigma)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, None])
def test_impossible_counts_and_looks_are_refused(value):
    for model, name in (
        (PoissonNoise, "peak"),
        (PoissonGaussianNoise, "gain"),
        (GammaNoise, "looks"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be > 0"):
            model(value)


@pytest.mark.parametrize("noise", [PoissonNoise(30), GammaNoise(4)])
def test_counts_and_speckle_are_never_negative(noise):
    with pytest.raises(ValueError, match=r"never negative, got -0\.1 in the measurement"):
        InverseProblem(torch.tensor([[[[0.5, -0.1]]]]), noise=noise)


def test_no_noise_to_estimate_and_none_to_simulate():
    with pytest.raises(ValueError, match="estimated as 0"):
        GaussianNoise(None).fitted(torch.full((1, 1, 16, 16), 0.5))
    with pytest.raises(ValueError, match="to simulate a measurement"):
        GaussianNoise(None).sample(torch.zeros(1, 1, 2, 2), torch.Generator())


def test_variance_is_on_the_unit_scale():
    y = torch.zeros(1, 1, 2, 2)
    assert GaussianNoise(51).variance(y).item() == pytest.approx(0.04)
    assert -10 * math.log10(GaussianNoise(25).variance(y)) == pytest.approx(20.17, abs=0.01)
