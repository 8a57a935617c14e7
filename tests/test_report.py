"""Diagnosis of a bad residual."""

import pytest
import skimage.data
import torch

from deepred_pl import InverseProblem
from deepred_pl.noise import GaussianNoise, PoissonNoise
from deepred_pl.operators import Blur, Identity, Mask, Radon
from deepred_pl.report import diagnosis, examine
from tests.helpers import picture


def measured(truth, operator, noise, seed=0):
    return noise.sample(operator(truth), torch.Generator().manual_seed(seed))


def diagnosed(y, operator, noise, restored, **others):
    limits = others.pop("limits", (0, 1))
    problem = InverseProblem(y, operator, noise, limits=limits)
    return diagnosis({**examine(problem, restored), **others})


TRUTH = picture(3, 65, 81)


@pytest.mark.parametrize(
    ("operator", "noise"),
    [
        (Identity(), GaussianNoise(25)),
        (Blur.uniform(5), GaussianNoise(2)),
        (Mask(picture(1, 65, 81) > 0.3), GaussianNoise([5, 10, 20])),
        (Identity(), PoissonNoise(30)),
    ],
)
def test_the_residual_of_the_true_image_needs_no_word(operator, noise):
    for seed in range(5):
        y = measured(TRUTH, operator, noise, seed)
        assert diagnosed(y, operator, noise, TRUTH) == ""
        assert diagnosed(y.clamp(0, 1), operator, noise, TRUTH) == ""


def test_noise_that_is_stronger_than_stated_is_white():
    y = measured(TRUTH, Identity(), GaussianNoise(20))
    text = diagnosed(y, Identity(), GaussianNoise(10), TRUTH)
    assert text.startswith(
        "The residual is 2 times the noise and looks like noise. Likely causes: "
    )
    assert "(1) the noise is stronger than stated: set data.noise.sigma to 2" in text
    assert "too short" not in text


def test_noise_that_is_weaker_than_stated():
    y = measured(TRUTH, Identity(), GaussianNoise(5))
    text = diagnosed(y, Identity(), GaussianNoise(25), TRUTH)
    assert "0.2 times the noise" in text
    assert "(1) the fit was too short" in text  # perhaps: restore() and tiles do not know
    assert "(2) the noise is weaker than stated: set data.noise.sigma to 5.02;" in text
    assert "(3) the network has learned the noise" in text
    flat = diagnosed(y, Identity(), GaussianNoise(25), TRUTH, residual_to_sigma_at_half=0.2)
    assert "(1) the noise is weaker" in flat


def test_counts_of_another_peak_have_their_own_setting():
    truth = 0.2 + 0.8 * TRUTH
    y = measured(truth, Identity(), PoissonNoise(20))
    text = diagnosed(y, Identity(), PoissonNoise(80), truth)
    assert float(text.partition("set data.noise.peak to ")[2].rstrip(".")) == pytest.approx(20, 0.1)


@pytest.mark.parametrize("share", [1, 0.3, 0.1])
def test_the_residuals_correlation_is_that_of_the_observed_values(share):
    known = torch.rand(1, 1, 65, 81, generator=torch.Generator().manual_seed(0)) < share
    problem = InverseProblem(
        measured(TRUTH, Mask(known), GaussianNoise(1)), Mask(known), GaussianNoise(1)
    )
    found = []
    for seed in range(12):  # with few values a single draw is off by a tenth
        noise = torch.randn(TRUTH.shape, generator=torch.Generator().manual_seed(seed))
        wrong = TRUTH + Blur.uniform(9, "reflect")(noise)
        found.append(examine(problem, wrong)["residual_correlation"])
    assert sum(found) / 12 == pytest.approx(8 / 9, abs=0.05)


def test_an_average_that_has_not_left_the_measurement_yet():
    y = measured(TRUTH, Identity(), GaussianNoise(25))
    noise, restored = GaussianNoise(25), TRUTH.lerp(y, 0.8)
    text = diagnosed(y, Identity(), noise, restored, residual_to_sigma_at_half=0.1)
    assert "0.2 times the noise, and was still rising: the fit was too short" in text
    assert "weaker" not in text


@pytest.mark.parametrize(
    ("true", "assumed", "suspect"),
    [
        (Blur.uniform(9), Blur.uniform(5), "the blur's kernel or boundary"),
        (Radon(30), Radon(torch.arange(30) * 6.0 + 9), "the angles, their order or unit"),
    ],
)
def test_a_wrong_operator_is_suspected_first_unless_the_fit_was_too_short(true, assumed, suspect):
    truth = picture(1, 64, 64)
    y, noise = measured(truth, true, GaussianNoise(1)), GaussianNoise(1)
    ratio = examine(InverseProblem(y, assumed, noise), truth)["residual_to_sigma"]
    ended = diagnosed(y, assumed, noise, truth, residual_to_sigma_at_half=1.01 * ratio)
    assert "has structure" in ended and f"(1) {suspect}" in ended and "too short" not in ended
    short = diagnosed(y, assumed, noise, truth, residual_to_sigma_at_half=1.5 * ratio)
    assert "(1) the fit was too short" in short and f"(2) {suspect}" in short
    unknown = diagnosed(y, assumed, noise, truth)
    assert "(1) the fit was too short" in unknown and suspect in unknown


def test_the_worst_channel_is_shown():
    noise = GaussianNoise([10, 10])
    truth = picture(2, 65, 81)
    y = measured(truth, Identity(), GaussianNoise([10, 40]))
    text = diagnosed(y, Identity(), noise, truth)
    assert "(by channel: 1, 4)" in text


@pytest.mark.parametrize("limits", [(0, 1), (0, 8)])
@pytest.mark.parametrize("noise", [None, GaussianNoise(0.5)])
def test_an_image_that_would_be_brighter_than_its_limit(limits, noise):
    truth = torch.full((1, 1, 45, 51), 0.1)
    truth[..., 20:23, 30:33] = 4
    operator = Blur.gaussian(13, 2, "reflect")
    y = measured(truth, operator, GaussianNoise(0.5)).clamp(max=0.99)
    restored = truth.clamp(max=limits[1])
    text = diagnosed(y, operator, noise, restored, limits=limits)
    asks = "he measurement asks for values above those that the image may have: set data.intens"
    assert (asks in text) == (limits[1] == 1)


def test_white_areas_of_a_photograph_are_at_no_limit():
    coffee = torch.from_numpy(skimage.data.coffee()[120:185, 250:331] / 255).float()
    truth = (1.6 * coffee.movedim(-1, 0)[None]).clamp(0, 1)
    assert (truth == 1).float().mean() > 0.05
    for operator in (Identity(), Blur.uniform(5)):
        for sigma in (2, 25):
            y = measured(truth, operator, GaussianNoise(sigma)).clamp(0, 1)
            assert diagnosed(y, operator, GaussianNoise(sigma), truth) == ""
