import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import trapezoid

from deepred_pl import InverseProblem
from deepred_pl.fidelity import backprojection
from deepred_pl.noise import (
    GammaNoise,
    GaussianNoise,
    LaplaceNoise,
    PoissonGaussianNoise,
    PoissonNoise,
)
from deepred_pl.operators import Blur, Downsample, Identity, Mask
from tests.helpers import noisy_problem, picture


def test_residual_and_data_term_are_the_mean_squared_residual():
    problem, out = noisy_problem(), picture(3, 9, 11).flip(-1)
    want = ((out.double() - problem.y.double()) ** 2).mean().item()
    assert problem.residual(out).item() == pytest.approx(want, rel=1e-5)
    assert problem.data_term(out).item() == pytest.approx(want, rel=1e-5)
    assert InverseProblem(problem.y).data_term(out).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(("channels", "factor"), [(3, 4), (1, 3)])
def test_a_true_image_leaves_only_rounding_where_pillow_clipped_its_small_image(channels, factor):
    # Constant down its columns: Pillow also clips between its two passes, along rows and columns.
    levels = np.full((5 * factor, 7 * factor, channels), 255, np.uint8)
    levels[:, factor + 2 : 4 * factor] = 0  # Lanczos overshoots next to it
    small = Image.fromarray(levels.squeeze()).resize((7, 5), Image.Resampling.LANCZOS)
    y = torch.from_numpy(np.asarray(small).reshape(5, 7, channels) / 255).movedim(-1, 0)[None]
    truth = torch.from_numpy(levels / 255).movedim(-1, 0)[None].float()
    operator = Downsample(factor, "lanczos3")
    assert operator(truth).max() > 1.03
    assert operator(truth).min() < -0.03
    problem = InverseProblem(y.float(), operator)
    assert problem.residual(truth).item() < (1 / 255) ** 2  # Pillow rounds twice, by 1/2 at most
    assert problem.data_term(truth).item() == problem.residual(truth).item()
    noisy = InverseProblem(y.float(), operator, GaussianNoise(1))
    assert noisy.data_term(truth).item() == problem.residual(truth).item()


def test_the_true_image_leaves_the_expected_residual_where_noise_and_overshoot_were_clipped():
    truth = torch.ones(1, 1, 64, 96)
    truth[..., 24:72] = 0
    operator, noise = Downsample(4, "lanczos3"), GaussianNoise(2)
    generator = torch.Generator().manual_seed(0)
    draws = [noise.sample(operator(truth), generator).clamp(0, 1) for _ in range(20)]
    problems = [InverseProblem(y, operator, noise) for y in draws]
    found = np.mean([problem.residual(truth).item() for problem in problems])
    expected = np.mean([problem.expected_residual(truth).item() for problem in problems])
    assert found == pytest.approx(expected, rel=0.15)  # a bit less, beyond black and white


def test_only_values_beyond_a_clipped_one_have_no_gradient():
    y = torch.tensor([[[[0.0, 0.0, 1.0, 1.0, 0.1, 0.9]]]])
    out = torch.tensor([[[[-0.2, 0.3, 1.2, 0.6, -0.2, 1.2]]]], requires_grad=True)
    want = torch.tensor([0, 0.3, 0, -0.4, -0.3, 0.3]) * 2 / 6
    identity = Identity()
    identity.overshoots = True
    problem = InverseProblem(y, identity)
    for value, scale in (
        (problem.data_term(out), 1),
        (backprojection(problem, out, epsilon=1.0), 2),  # (A Aᵀ + ε I) = 2
    ):
        (gradient,) = torch.autograd.grad(value, out)
        torch.testing.assert_close(gradient.flatten(), want / scale)


def test_an_open_sigma_is_estimated_without_touching_the_model_given():
    given = GaussianNoise(None)
    y = GaussianNoise(25).sample(picture(3, 64, 64), torch.Generator().manual_seed(0))
    problem = InverseProblem(y, noise=given)
    assert problem.noise.sigma == pytest.approx(25, rel=0.2)
    assert given.sigma is None


def test_first_guess_is_the_measurement_clipped():
    y = torch.tensor([[[[-0.2, 0.5, 1.3]]]])
    assert torch.equal(InverseProblem(y).first_guess(), y.clamp(0, 1))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.rand(3, 5, 5), r"\(1, C, H, W\)"),
        (torch.rand(2, 3, 5, 5), r"\(1, C, H, W\)"),
        (torch.rand(5), r"\(1, C, H, W\)"),
        (torch.zeros(1, 3, 0, 5), r"\(1, C, H, W\)"),
        (torch.zeros(1, 3, 5, 5, dtype=torch.uint8), "float"),
        (torch.tensor([[[[0.0, np.nan, np.inf]]]]), "2 of its 3 values"),
    ],
)
def test_a_measurement_that_is_no_image_is_refused(y, message):
    with pytest.raises(ValueError, match=message):
        InverseProblem(y)


def test_a_vector_needs_an_operator_that_measures_images():
    with pytest.raises(ValueError, match=r"measurement of an image.*got \(1, 5\)"):
        InverseProblem(torch.rand(1, 5))


def test_a_ground_truth_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 9, 11\).*got \(1, 3, 9, 12\)"):
        InverseProblem(picture(3, 9, 11), ground_truth=picture(3, 9, 12))


def test_the_ground_truth_is_not_saved():
    assert list(noisy_problem().state_dict()) == ["y"]


def test_a_checkpoint_of_another_measurement_is_refused():
    state = InverseProblem(picture(3, 9, 11)).state_dict()
    for other in (picture(3, 9, 12), picture(3, 9, 11).flip(-1)):
        with pytest.raises(ValueError, match="is not this problem's"):
            InverseProblem(other).load_state_dict(state)
    InverseProblem(picture(3, 9, 11)).load_state_dict(state)


def truncated(mean, sigma, low, high):
    """E[(clip(mean + n, low, high) − mean)²], n ~ N(0, σ²), by numerical integration."""
    n = np.linspace(-12 * sigma, 12 * sigma, 40_001)
    density = np.exp(-0.5 * (n / sigma) ** 2) / (sigma * (2 * np.pi) ** 0.5)
    return trapezoid(density * (np.clip(mean + n, low, high) - mean) ** 2, n)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [5, 25, 80])
def test_the_expected_residual_of_a_clipped_measurement_is_that_of_clipped_noise(channels, sigma):
    truth = picture(channels, 9, 11)
    truth[..., 0], truth[..., 1] = 0, 1
    noise = GaussianNoise(sigma)
    y = noise.sample(truth, torch.Generator().manual_seed(0))
    clipped = InverseProblem(y.clamp(0, 1), noise=noise).expected_residual(truth).item()
    values = truth.double().numpy().ravel()
    want = np.mean([truncated(value, sigma / 255, 0, 1) for value in values])
    assert clipped == pytest.approx(want, rel=1e-4)
    assert clipped < 0.95 * (sigma / 255) ** 2
    free = InverseProblem(y, noise=noise).expected_residual(truth).item()
    assert free == pytest.approx((sigma / 255) ** 2, rel=1e-5)


NOISES = [
    GaussianNoise(25),
    LaplaceNoise(20),
    PoissonNoise(30),
    PoissonGaussianNoise(2, 5),
    GammaNoise(9),
]


@pytest.mark.parametrize("noise", NOISES)
def test_the_expected_residual_is_the_residuals_mean_at_the_true_image(noise):
    truth = 0.2 + 0.5 * picture(1, 33, 47)
    operator = Blur.uniform(3)
    measured = [
        noise.sample(operator(truth), torch.Generator().manual_seed(seed)) for seed in range(40)
    ]
    problems = [InverseProblem(y, operator, noise) for y in measured]
    residuals = torch.stack([p.residual(truth) for p in problems])
    want, error = residuals.mean().item(), residuals.std().item() / 40**0.5
    got = torch.stack([p.expected_residual(truth) for p in problems]).mean().item()
    assert got == pytest.approx(want, abs=4 * error)
    assert error < 0.01 * want


def test_the_expected_residual_counts_observed_values_alone():
    mask = picture(1, 9, 11) > 0.4
    problem = InverseProblem(picture(3, 9, 11), Mask(mask), PoissonNoise(30))
    truth = picture(3, 9, 11).flip(-1)
    want = (truth / 30)[mask.expand_as(truth)].mean()
    torch.testing.assert_close(problem.expected_residual(truth), want)
    assert InverseProblem(picture()).expected_residual(picture()) is None


def test_read_noise_is_cut_off_at_black():
    truth = torch.full((1, 1, 100, 100), 0.02)
    noise = PoissonGaussianNoise(gain=1, sigma=20)
    y = noise.sample(truth, torch.Generator().manual_seed(0)).clamp(0, 1)
    problem = InverseProblem(y, noise=noise)
    got, want = problem.expected_residual(truth).item(), problem.residual(truth).item()
    assert got == pytest.approx(want, rel=0.05)
    assert got < 0.6 * noise.variance(truth).mean().item()
