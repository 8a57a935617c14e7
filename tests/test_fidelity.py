"""The back-projection term against dense linear algebra: the matrix of A, by columns, in NumPy."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from deepred_pl import DeepImagePrior, DeepRED, InverseProblem, REDUpdate, admm
from deepred_pl.callbacks.monitor import measure
from deepred_pl.fidelity import (
    automatic_epsilon,
    backprojection,
    expected_backprojection,
    weighted_variance,
)
from deepred_pl.losses import SURE
from deepred_pl.networks import MeasurementNet, SkipNet
from deepred_pl.noise import GammaNoise, GaussianNoise, LaplaceNoise, PoissonNoise
from deepred_pl.operators import (
    Blur,
    Downsample,
    Identity,
    Mask,
    Observed,
    Operator,
    Radon,
    as_operator,
    gaussian_kernel,
)
from deepred_pl.tiles import Region
from tests.helpers import TinyNet, noisy_problem, picture

LOPSIDED = torch.from_numpy(np.random.default_rng(0).random((5, 7))).float()
KNOWN = torch.from_numpy(np.random.default_rng(1).random((1, 1, 12, 17)) > 0.4).float()
OPEN = ["zero", "replicate", "reflect"]  # boundaries

EXACT = {
    "identity": (Identity, (12, 17)),
    "blur": (lambda: Blur(LOPSIDED, "circular"), (12, 17)),
    "blur, square": (lambda: Blur.uniform(9), (12, 17)),
    "blur, learned": (lambda: Blur(nn.Parameter(LOPSIDED / 17)), (12, 17)),
    "mask": (lambda: Mask(KNOWN), (12, 17)),
}
BY_ITERATION = {
    **EXACT,
    **{f"blur, {b}": (lambda b=b: Blur(LOPSIDED, b), (12, 17)) for b in OPEN},
    "downsampling": (lambda: Downsample(3), (12, 18)),
    "radon": (lambda: Radon(5), (17, 17)),
    "radon of a circle": (lambda: Radon(7, circle=True), (12, 12)),
    "partly observed": (lambda: Observed(Blur(LOPSIDED, "zero"), KNOWN), (12, 17)),
}


class Iterated(Operator):
    """Another operator that does not know its own A Aᵀ."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, x):
        return self.operator(x)

    def image_shape(self, measurement_shape):
        return self.operator.image_shape(measurement_shape)


@torch.no_grad()
def matrix(operator, height, width):
    """A as a NumPy matrix (values of y, pixels), one column for each pixel."""
    units = torch.eye(height * width).view(-1, 1, 1, height, width)
    return np.stack([operator(unit).double().numpy().ravel() for unit in units], axis=1)


def dense(a, r, epsilon):
    """‖(A Aᵀ + ε I)^(−1/2) r‖² and its gradient 2 Aᵀ (A Aᵀ + ε I)⁻¹ r, both per pixel."""
    eigenvalues, vectors = np.linalg.eigh(a @ a.T)
    coefficients = vectors.T @ r
    value = (coefficients**2 / (eigenvalues + epsilon)).sum()
    gradient = 2 * a.T @ (vectors @ (coefficients / (eigenvalues + epsilon)))
    return value / a.shape[1], gradient / a.shape[1]


def scene(operator, height, width, channels=1, noise=None):
    """A problem, and an image to try, both random."""
    generator = torch.Generator().manual_seed(2)
    truth = torch.rand(1, channels, height, width, generator=generator)
    with torch.no_grad():
        y = operator(truth)
    y = y + 0.02 * torch.randn(y.shape, generator=generator)
    out = torch.rand(truth.shape, generator=generator, requires_grad=True)
    return InverseProblem(y, operator, noise), out


def residual(problem, out):
    with torch.no_grad():
        return (problem.operator(out) - problem.y).double().numpy()


@pytest.mark.parametrize("epsilon", [0.01, 1.0])
@pytest.mark.parametrize("name", EXACT)
def test_value_and_gradient_are_those_of_dense_algebra(name, epsilon):
    make, size = EXACT[name]
    problem, out = scene(make(), *size, channels=3)
    a = matrix(problem.operator, *size)
    parts = [dense(a, r.ravel(), epsilon) for r in residual(problem, out)[0]]
    value = backprojection(problem, out, epsilon)
    value.backward()
    assert value.item() == pytest.approx(np.mean([v for v, _ in parts]), rel=1e-4)
    expected = np.stack([g for _, g in parts]).reshape(out.shape) / 3
    np.testing.assert_allclose(out.grad, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-3)


@pytest.mark.parametrize("name", BY_ITERATION)
def test_conjugate_gradients_are_dense_algebra(name):
    make, size = BY_ITERATION[name]
    problem, out = scene(Iterated(make()), *size)
    if problem.operator.operator.observed is not None:
        problem.y.mul_(problem.operator.operator.observed)
    a = matrix(problem.operator, *size)
    epsilon = 0.05 * np.linalg.norm(a, 2) ** 2
    expected, slope = dense(a, residual(problem, out).ravel(), epsilon)
    value = backprojection(problem, out, epsilon)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-3)
    np.testing.assert_allclose(out.grad.ravel(), slope, atol=2e-3 * np.abs(slope).max())


@pytest.mark.parametrize("channels", [1, 3])
def test_conjugate_gradients_suffice_for_the_epsilon_of_little_noise(channels):
    """A 9×9 mean and σ = √2 on 64×80 pixels."""
    problem, _ = scene(Blur.uniform(9), 64, 80, channels, GaussianNoise(math.sqrt(2)))
    noise = torch.randn(problem.y.shape, generator=torch.Generator().manual_seed(0))
    epsilon, _ = automatic_epsilon(problem)
    transfer = np.zeros((64, 80))
    transfer[np.ix_(range(-4, 5), range(-4, 5))] = 1 / 81
    weights = 1 / (np.abs(np.fft.fft2(transfer)) ** 2 + epsilon)
    expected = np.fft.ifft2(np.fft.fft2(noise.double().numpy()) * weights).real
    error = Iterated(problem.operator).inverse_gram(noise, epsilon).numpy() - expected
    assert np.linalg.norm(error) < 0.005 * np.linalg.norm(expected)


@pytest.mark.parametrize("boundary", OPEN)
@pytest.mark.parametrize("masked", [False, True])
def test_elsewhere_a_blur_is_weighted_on_the_extended_image(boundary, masked):
    """PᵀWP with W that of the circular blur of the image extended by half of the kernel."""
    blur = Blur(LOPSIDED, boundary)
    operator = Observed(blur, KNOWN) if masked else blur
    problem, out = scene(operator, 12, 17)
    r = residual(problem, out) * (KNOWN.numpy() if masked else 1)
    extended = np.zeros((12 + 4, 17 + 6))
    extended[:12, :17] = r[0, 0]
    a = matrix(Blur(LOPSIDED, "circular"), 16, 23)
    weighted = np.linalg.solve(a @ a.T + 0.01 * np.eye(len(a)), extended.ravel())
    weighted = weighted.reshape(16, 23)[:12, :17]
    value = backprojection(problem, out, 0.01)
    value.backward()
    assert value.item() == pytest.approx((r[0, 0] * weighted).mean(), rel=1e-4)
    slope = 2 * matrix(operator, 12, 17).T @ weighted.ravel() / weighted.size
    np.testing.assert_allclose(out.grad.ravel(), slope, atol=1e-4 * np.abs(slope).max())


def test_far_from_the_border_it_is_that_of_the_operator_itself():
    blur = Blur(LOPSIDED, "reflect")
    r = np.zeros((12, 17))
    r[6, 8] = 1
    exact = np.linalg.solve(
        (a := matrix(blur, 12, 17)) @ a.T + 0.3 * np.eye(a.shape[0]), r.ravel()
    ).reshape(12, 17)
    ours = blur.inverse_gram(torch.from_numpy(r)[None, None].float(), 0.3)[0, 0]
    inner = slice(5, 8), slice(7, 10)
    np.testing.assert_allclose(ours[inner], exact[inner], atol=0.03 * exact.max())


@pytest.mark.parametrize("circle", [False, True])
@pytest.mark.parametrize("angles", [20, 60])
def test_projections_are_weighted_nearly_as_by_the_operators_own_matrix(angles, circle):
    operator = Radon(angles, circle=circle)
    a = matrix(operator, 17, 17)
    rows, columns = np.mgrid[-8:9, -8:9]
    inside = torch.from_numpy(rows**2 + columns**2 <= 64).float()
    x = torch.randn(1, 1, 17, 17, generator=torch.Generator().manual_seed(0)) * inside
    epsilon = 0.03 * np.linalg.norm(a, 2) ** 2
    r = operator(x)
    plain = r.double().numpy().ravel()
    exact = np.linalg.solve(a @ a.T + epsilon * np.eye(len(a)), plain)
    ours = operator.inverse_gram(r, epsilon).double().numpy().ravel()
    assert np.corrcoef(exact, plain)[0, 1] < 0.9 and np.corrcoef(exact, ours)[0, 1] > 0.95
    assert ours @ plain == pytest.approx(exact @ plain, rel=0.3)


def test_the_ramp_is_a_filter_along_the_detectors():
    """Against a matrix of the filter, built of cosines."""
    operator, epsilon = Radon(6), 0.02
    r = torch.randn(1, 2, 24, 6, generator=torch.Generator().manual_seed(0))
    frequencies = np.minimum(np.arange(48), 48 - np.arange(48)) / 48
    gram = 6 / (np.pi * 24**2 * np.maximum(frequencies, 0.25 / 48))
    lags = np.arange(24)[:, None] - np.arange(24)
    weights = 1 / (gram + epsilon)
    kernel = (np.cos(2 * np.pi * lags[..., None] * np.arange(48) / 48) * weights).mean(-1)
    expected = np.einsum("ij,bcja->bcia", kernel, r.double().numpy())
    np.testing.assert_allclose(operator.inverse_gram(r, epsilon), expected, atol=1e-3)


def test_the_kernels_gradient_goes_through_a_and_not_through_the_weights():
    kernel = nn.Parameter(LOPSIDED / LOPSIDED.sum())
    problem, out = scene(Blur(kernel), 12, 17)
    backprojection(problem, out.detach(), 0.01).backward()
    fixed = Blur(kernel.detach().clone())
    weighted = fixed.inverse_gram((fixed(out) - problem.y).detach(), 0.01)
    a_slope = torch.autograd.grad((problem.operator(out.detach()) * weighted).sum(), kernel)[0]
    np.testing.assert_allclose(kernel.grad, 2 * a_slope / out.numel(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", [lambda: PoissonNoise(30), lambda: GammaNoise(10)])
def test_the_residual_of_other_noise_is_standardized_at_the_current_image(make):
    noise = make()
    truth = picture(1, 12, 17)
    y = noise.sample(Blur.uniform(3)(truth), torch.Generator().manual_seed(0))
    problem = InverseProblem(y, Blur.uniform(3), noise)
    out = picture(3, 12, 17)[:, 1:2].clone().requires_grad_()
    value = backprojection(problem, out, 0.1)
    value.backward()
    a = matrix(problem.operator, 12, 17)
    clean = a @ out.detach().double().numpy().ravel()
    variance = clean / 30 if isinstance(noise, PoissonNoise) else clean**2 / 10
    y = y.double().numpy().ravel()
    mean = (y / 30).mean() if isinstance(noise, PoissonNoise) else (y**2).mean() / 11
    scale = np.sqrt(mean / np.maximum(variance, 0.1 * mean))
    r = scale * (clean - y)
    weighted = np.linalg.solve(a @ a.T + 0.1 * np.eye(len(a)), r)
    assert value.item() == pytest.approx(r @ weighted / r.size, rel=1e-3)
    slope = 2 * a.T @ (scale * weighted) / r.size  # the scale is not differentiated
    np.testing.assert_allclose(out.grad.ravel(), slope, atol=1e-3 * np.abs(slope).max())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["blur", "mask", "blur, square"])
def test_the_weighted_noise_has_the_variance_that_is_expected_of_it(name, channels):
    height, width = 24, 30
    known = KNOWN.repeat(1, 1, 2, 2)[..., :width]
    operator = Mask(known) if name == "mask" else EXACT[name][0]()
    problem, _ = scene(operator, height, width, channels, GaussianNoise(5))
    a = matrix(problem.operator, height, width)
    trace = (1 / (np.linalg.eigvalsh(a @ a.T) + 0.05)).sum()
    if name == "mask":  # values that are not observed have no noise
        trace = known.sum().item() / 1.05
    expected = (5 / 255) ** 2 * trace / (height * width)
    assert float(weighted_variance(problem, 0.05)) == pytest.approx(expected, rel=0.06)


def test_the_automatic_epsilon_gives_the_same_image_in_any_unit_of_the_measurement():
    """A measurement, its operator and its noise in other units are the same problem."""

    class Scaled(Iterated):
        def forward(self, x):
            return 3 * self.operator(x)

    problem, out = scene(Blur.uniform(5), 12, 17, noise=GaussianNoise(5))
    scaled = InverseProblem(3 * problem.y, Scaled(Blur.uniform(5)), GaussianNoise(15))
    (epsilon, scale), (larger, same) = automatic_epsilon(problem), automatic_epsilon(scaled)
    assert scale == same == 1
    ratio = backprojection(problem, out, epsilon) / backprojection(scaled, out, larger)
    assert ratio.item() == pytest.approx(1, rel=0.01)


def small_model(problem, kind=DeepRED, **settings):
    settings = {"network": TinyNet, "fidelity": "backprojection"} | settings
    return kind(problem=problem, **settings)


def blurred(channels=3, noise=None):
    blur, noise = Blur.uniform(3), noise or GaussianNoise(5)
    truth = picture(channels, 12, 17)
    y = noise.sample(blur(truth), torch.Generator().manual_seed(0))
    return InverseProblem(y, blur, noise, truth)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_and_the_curves_have_the_term(channels):
    problem = blurred(channels)
    model = small_model(problem, epsilon=0.02, mu=0.3)
    model.x.add_(0.1)
    out = torch.rand_like(model.x)
    a = matrix(problem.operator, 12, 17)
    parts = [dense(a, r.ravel(), 0.02)[0] for r in residual(problem, out)[0]]
    near = 0.3 * (out - model.x).square().mean()
    assert model.loss(out).item() == pytest.approx(np.mean(parts) + near.item(), rel=1e-4)
    model.out = out
    assert measure(model)["data_term"].item() == pytest.approx(255**2 * np.mean(parts), rel=1e-4)


def test_epsilon_is_chosen_where_the_weighted_noise_has_its_variance():
    for sigma in (0.5, 10):
        problem = blurred(noise=GaussianNoise(sigma))
        epsilon = small_model(problem).epsilon
        a = matrix(problem.operator, 12, 17)
        trace = (1 / (np.linalg.eigvalsh(a @ a.T) + epsilon)).sum()
        variance = (sigma / 255) ** 2 * trace / (12 * 17)
        assert variance == pytest.approx(0.00133 * (sigma**2 + 2) ** 0.3 * math.sqrt(3), rel=0.25)


@pytest.mark.parametrize("weighting", ["fixed", "discrepancy"])
def test_lam_and_mu_are_reduced_where_no_epsilon_reaches_the_variance(weighting):
    """A blur hardly wider than a pixel leaves the noise nearly as it is."""
    blur, noise, truth = Blur.gaussian(5, 0.4), GaussianNoise(math.sqrt(2)), picture(3, 12, 17)
    y = noise.sample(blur(truth), torch.Generator().manual_seed(0))
    problem = InverseProblem(y, blur, noise)
    model = small_model(problem, lam=0.7, mu=0.35, weighting=weighting)
    a = matrix(blur, 12, 17)
    trace = (1 / (np.linalg.eigvalsh(a @ a.T) + 1e-6)).sum()
    share = (2 / 255**2 * trace / (12 * 17)) / (0.00133 * 4**0.3 * math.sqrt(3))
    assert share < 0.1
    assert model.lam.item() == pytest.approx(0.7 * share, rel=0.25)
    before = model.lam.item()
    model.out = torch.rand_like(model.out)  # far from the measurement
    model.update_weighting()
    assert model.lam.item() == pytest.approx(before)
    assert model.mu.item() == pytest.approx(before / 2)
    assert small_model(problem, lam=0.7, epsilon=0.01).lam.item() == pytest.approx(0.7)
    assert small_model(blurred(), lam=0.7).lam.item() == pytest.approx(0.7)


@pytest.mark.parametrize("epsilon", [0, -0.1, math.inf, math.nan, "small"])
def test_an_epsilon_that_is_none_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        DeepImagePrior(fidelity="backprojection", epsilon=epsilon)


def test_a_fidelity_that_is_none_is_refused():
    with pytest.raises(ValueError, match="must be one of 'likelihood', 'backprojection'"):
        DeepImagePrior(fidelity="projection")


def test_noise_with_outliers_is_refused():
    with pytest.raises(
        ValueError, match=r"outliers of LaplaceNoise dominate; set fidelity='likelihood'"
    ):
        small_model(blurred(noise=LaplaceNoise(5)))


def test_an_operator_that_is_learned_is_refused():
    kernel = nn.Parameter(LOPSIDED / LOPSIDED.sum())
    problem = InverseProblem(picture(3, 12, 17), Blur(kernel), GaussianNoise(5))
    with pytest.raises(ValueError, match=r"learned kernel would shrink .* fidelity='likelihood'"):
        small_model(problem)


def test_without_a_noise_model_epsilon_must_be_a_number():
    problem = InverseProblem(picture(3, 12, 17), Blur.uniform(3))
    with pytest.raises(ValueError, match="epsilon='auto' needs a noise model"):
        small_model(problem)
    assert small_model(problem, epsilon=0.1).epsilon == 0.1


def test_steins_estimate_needs_the_likelihood():
    with pytest.raises(ValueError, match=r"SURE .* expected fidelity='likelihood'"):
        small_model(
            noisy_problem(),
            DeepImagePrior,
            network=functools.partial(MeasurementNet, width=4, skip_width=2, scales=2),
            input_noise_std=0,
            regularizer=SURE(),
        )


def test_a_kernel_that_a_parent_learns_is_refused_at_the_first_step():
    problem = blurred()
    model = small_model(problem, DeepImagePrior)
    assert model.training_step().isfinite()
    width = torch.tensor(1.5, requires_grad=True)
    problem.operator.kernel = gaussian_kernel(5, width)
    with pytest.raises(ValueError, match=r"learned kernel would shrink .* fidelity='likelihood'"):
        model.training_step()


class Foreign:
    """A blur of another package, with the adjoint given by `adjoint`."""

    def __init__(self, adjoint):
        self.blur = Blur(LOPSIDED, "circular")
        self.A_adjoint = adjoint(self.blur)

    def A(self, x):
        return self.blur(x)


WRONG = {
    "itself": lambda blur: blur,
    "scaled": lambda blur: lambda y: 1.1 * blur.adjoint(y),
    "shifted": lambda blur: lambda y: blur.adjoint(y).roll(1, -1),
    "without the mirrored kernel": lambda blur: (
        lambda y: blur.adjoint(y) + 0.5 * (y.roll(1, -1) - y.roll(-1, -1))
    ),
    "an inverse": lambda blur: lambda y: blur.adjoint(blur.inverse_gram(y, 1e-3)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_adjoint_is_refused(name):
    with pytest.raises(ValueError, match="A_adjoint is not the adjoint of its A"):
        InverseProblem(picture(3, 12, 17), Foreign(WRONG[name]))


def test_an_adjoint_that_forgets_the_mask_is_refused():
    class Masked(Foreign):
        def A(self, x):
            return KNOWN * self.blur(x)

    with pytest.raises(ValueError, match="A_adjoint is not the adjoint of its A"):
        InverseProblem(picture(3, 12, 17), Masked(lambda blur: blur.adjoint))


def test_an_a_that_does_not_fit_its_adjoint_is_refused():
    class Cropping(Foreign):
        def A(self, x):
            return self.blur(x)[..., 1:]

    with pytest.raises(ValueError, match=r"A must return \(1, 3, 12, 17\) like the measurement"):
        InverseProblem(picture(3, 12, 17), Cropping(lambda blur: blur.adjoint))


def test_an_adapted_operator_is_weighted_like_the_packages_own():
    problem = blurred()
    foreign = Foreign(lambda blur: blur.adjoint)
    adapted = InverseProblem(problem.y, foreign, problem.noise)
    own = InverseProblem(problem.y, foreign.blur, problem.noise)
    out = torch.rand_like(problem.y)
    ours = backprojection(own, out, 0.05).item()
    assert backprojection(adapted, out, 0.05).item() == pytest.approx(ours, rel=1e-3)


class ForeignMask:
    def A(self, x):
        return x * KNOWN

    A_adjoint = A


def test_values_that_an_adapted_operator_never_measures_have_no_noise():
    y = GaussianNoise(5).sample(picture(3, 12, 17), torch.Generator().manual_seed(0)) * KNOWN
    own, adapted = (InverseProblem(y, a, GaussianNoise(5)) for a in (Mask(KNOWN), ForeignMask()))
    assert automatic_epsilon(adapted) == pytest.approx(automatic_epsilon(own), rel=1e-4)
    assert automatic_epsilon(own)[1] < 0.5


def test_a_partly_observed_adapted_operator_has_the_term():
    foreign, y = Foreign(lambda blur: blur.adjoint), blurred().y
    own, adapted = (
        InverseProblem(y, Observed(operator, KNOWN), GaussianNoise(5))
        for operator in (Iterated(foreign.blur), as_operator(foreign))
    )
    out = torch.rand_like(y)
    expected = backprojection(own, out, 0.05).item()
    assert backprojection(adapted, out, 0.05).item() == pytest.approx(expected, rel=1e-3)
    assert automatic_epsilon(adapted) == pytest.approx(automatic_epsilon(own), rel=0.02)


@pytest.mark.parametrize("boundary", OPEN)
def test_a_tile_has_about_the_epsilon_of_the_whole(boundary):
    y, blur = picture(3, 90, 100), Blur.gaussian(9, 1.2, boundary)
    whole = InverseProblem(y, blur, GaussianNoise(5))
    tile = whole.part(Region(20, 30, 50, 50))
    expected = automatic_epsilon(whole)[0]
    assert automatic_epsilon(tile)[0] == pytest.approx(expected, rel=0.1)


def test_lam_rises_when_the_weighted_noise_is_being_learned():
    """Constant while the residual is above what the noise explains, then by the 20th power."""
    problem = blurred()
    model = small_model(problem, lam=0.5, mu=0.25, weighting="discrepancy")
    noise = (problem.y - problem.operator(problem.ground_truth)).double()
    expected = float(
        expected_backprojection(problem, problem.ground_truth, model.weighted_variance)
    )
    a = matrix(problem.operator, 12, 17)
    at_truth = np.mean([dense(a, n.ravel().numpy(), model.epsilon)[0] for n in noise[0]])
    assert at_truth == pytest.approx(expected, rel=0.15)  # one draw of the noise
    lam = [
        admm.discrepancy_of_backprojection(0.5, torch.tensor(ratio), torch.tensor(1.0)).item()
        for ratio in (3.0, 1.0, 0.95, 0.0)
    ]
    assert lam[0] == lam[1] == 0.5
    assert lam[2] == pytest.approx(0.5 / 0.95**20, rel=1e-4)
    assert lam[3] == pytest.approx(0.5 * 1.1**20, rel=1e-4)  # at most
    model.out = problem.ground_truth
    model.update_weighting()
    expected_lam = 0.5 * min(1.1, max(1, expected / at_truth)) ** 20
    assert model.lam.item() == pytest.approx(expected_lam, rel=0.1)
    assert model.mu.item() == pytest.approx(model.lam.item() / 2)


@pytest.mark.parametrize(
    "noise", [GaussianNoise(20), PoissonNoise(30), GammaNoise(10)], ids=lambda n: type(n).__name__
)
@pytest.mark.parametrize("black", [0.5, 0.9])
def test_the_expectation_at_the_true_image_is_the_mean_of_draws(noise, black):
    """Also where half of the image is black: clipped, or too dark to be standardized."""
    truth = torch.full((1, 1, 96, 110), 0.5)
    truth[..., : round(96 * black), :] = 0.004
    blur = Blur.gaussian(9, 1.2, "reflect")
    drawn = []
    for seed in range(40):
        y = noise.sample(blur(truth), torch.Generator().manual_seed(seed))
        y = y.clamp(0, 1) if isinstance(noise, GaussianNoise) else y
        problem = InverseProblem(y, blur, noise)
        weighted = float(weighted_variance(problem, 0.05))
        expected = float(expected_backprojection(problem, truth, weighted))
        drawn.append(float(backprojection(problem, truth, 0.05)) / expected)
    assert np.mean(drawn) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("boundary", OPEN)
def test_the_expectation_of_a_tile_is_the_mean_of_draws(boundary):
    truth, noise = picture(3, 40, 50), GaussianNoise(5)
    blur = Blur.gaussian(9, 1.2, boundary)
    drawn = []
    for seed in range(20):
        y = noise.sample(blur(truth), torch.Generator().manual_seed(seed))
        tile = InverseProblem(y, blur, noise, truth).part(Region(10, 20, 30, 30))
        weighted = float(weighted_variance(tile, 0.02))
        expected = float(expected_backprojection(tile, tile.ground_truth, weighted))
        drawn.append(float(backprojection(tile, tile.ground_truth, 0.02)) / expected)
    assert np.mean(drawn) == pytest.approx(1, abs=0.05)


def test_a_refused_problem_leaves_the_module_without_one():
    model = DeepRED(network=TinyNet, fidelity="backprojection")
    problem = InverseProblem(picture(3, 12, 17), Blur.uniform(3))
    for _ in range(2):
        with pytest.raises(ValueError, match="epsilon='auto' needs a noise model"):
            model.build(problem)
    assert model.problem is None


def test_epsilon_is_not_that_of_a_problem_that_was_refused():
    model = DeepRED(network=functools.partial(SkipNet, width=4), fidelity="backprojection")
    with pytest.raises(ValueError, match="33"):
        model.build(blurred(noise=GaussianNoise(50)))
    problem = InverseProblem(picture(3, 40, 41), Blur.uniform(3), GaussianNoise(5))
    model.build(problem)
    assert model.epsilon == automatic_epsilon(problem)[0]


def test_a_checkpoint_alone_goes_on_with_the_same_term(make_trainer, tmp_path):
    settings = {"network": TinyNet, "fidelity": "backprojection", "weighting": "discrepancy"}
    model = DeepRED(problem=blurred(), **settings)
    trainer = make_trainer(max_steps=4, callbacks=[REDUpdate(lambda x: x, every_n_steps=2)])
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DeepRED.load_from_checkpoint(tmp_path / "last.ckpt", network=TinyNet)
    with pytest.raises(ValueError, match="is not this problem's"):
        loaded.build(blurred(noise=GaussianNoise(20)))
    loaded.build(blurred())
    for twin in (model, loaded):
        twin.update_weighting()
    assert (loaded.epsilon, loaded.lam) == (model.epsilon, model.lam)
    assert torch.equal(loaded.loss(model.out), model.loss(model.out))


def test_autocast_does_not_reach_the_term():
    model = small_model(blurred())
    expected = model.total_loss(model.x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.total_loss(model.x), expected)


def test_epsilon_does_not_depend_on_the_default_device():
    problem = blurred()
    with torch.device("meta"):
        epsilon = automatic_epsilon(problem)
    assert epsilon == automatic_epsilon(problem)


@pytest.mark.parametrize("frames", [4, 12])
def test_many_channels_have_the_epsilon_of_one(frames):
    y = Blur.gaussian(9, 1.6)(picture(1, 48, 64)).clamp(0, 1)

    def epsilon(channels):
        repeated = y.expand(1, channels, 48, 64)
        return automatic_epsilon(
            InverseProblem(repeated, Blur.gaussian(9, 1.6), GaussianNoise(10))
        )[0]

    assert epsilon(frames) == pytest.approx(epsilon(1), rel=0.1)  # by other random probes
    assert epsilon(3) < 0.8 * epsilon(1)
