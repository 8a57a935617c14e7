import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import trapezoid
from scipy.stats import norm, truncnorm

from deepred_pl import DeepRED, InverseProblem, REDUpdate
from deepred_pl.callbacks import Monitor, Writer
from deepred_pl.fidelity import automatic_epsilon, backprojection, expected_backprojection
from deepred_pl.noise import (
    GammaNoise,
    GaussianNoise,
    LaplaceNoise,
    PoissonGaussianNoise,
    PoissonNoise,
)
from deepred_pl.operators import Blur, Downsample, Identity, Mask, Operator, Radon
from deepred_pl.tiles import Region
from tests.helpers import RUN, TinyNet, noisy_problem, picture, result_of, smooth


def test_residual_and_data_term_are_the_mean_squared_residual():
    y, out = 0.1 + 0.8 * noisy_problem().y, picture(3, 9, 11).flip(-1)  # nothing is clipped
    problem = InverseProblem(y, noise=GaussianNoise(25))
    want = ((out.double() - y.double()) ** 2).mean().item()
    assert problem.residual(out).item() == pytest.approx(want, rel=1e-5)
    assert problem.data_term(out).item() == pytest.approx(want, rel=1e-5)
    assert InverseProblem(y).data_term(out).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [2, 25, 80])
def test_the_data_terms_gradient_is_that_of_the_clipped_measurements_likelihood(channels, sigma):
    truth = picture(channels, 9, 11)
    truth[..., 0], truth[..., 1] = 0, 1
    noise, s = GaussianNoise(sigma), sigma / 255
    y = noise.sample(truth, torch.Generator().manual_seed(0)).clamp(0, 1)
    problem = InverseProblem(y, noise=noise)
    out = picture(channels, 9, 11).flip(-1).requires_grad_()
    (got,) = torch.autograd.grad(problem.data_term(out), out)

    def unlikely(prediction):  # −log p(y | prediction), Tobin 1958
        within = -norm.logpdf(values, prediction, s)
        at_white = -norm.logsf((1 - prediction) / s)
        tails = np.where(values == 0, -norm.logcdf(-prediction / s), at_white)
        return np.where((values > 0) & (values < 1), within, tails)

    values, at, step = y.double().numpy(), out.detach().double().numpy(), 1e-4 * s
    slope = (unlikely(at + step) - unlikely(at - step)) / (2 * step)
    want = torch.from_numpy(slope * 2 * s**2 / values.size).float()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)
    assert ((y == 0).any(), (y == 1).any()) == (True, True)


@pytest.mark.parametrize("sigma", [1, 25, 100])
def test_clipped_values_are_completed_by_the_mean_of_a_truncated_normal_distribution(sigma):
    y = torch.tensor([[[[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.4]]]])
    clean = torch.tensor([[[[0.0, 0.3, 1.0, -0.02, 1.0, 0.5, 1.02, 0.6]]]])
    s, m = sigma / 255, clean.double().numpy().ravel()
    below, above = truncnorm.mean(-np.inf, -m / s, m, s), truncnorm.mean((1 - m) / s, np.inf, m, s)
    want = [*below[:4], *above[4:7], 0.4]
    got = InverseProblem(y, noise=GaussianNoise(sigma)).completed(clean).flatten()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_measurement_that_was_not_clipped_is_complete():
    y, clean = picture(3, 9, 11), picture(3, 9, 11).flip(-1)
    y[..., 0], y[..., 1, 0], y[..., 1, 1] = 0, -0.1, 1.1
    assert torch.equal(InverseProblem(y, noise=GaussianNoise(25)).completed(clean), y)
    assert torch.equal(InverseProblem(y.clamp(0, 1)).completed(clean), y.clamp(0, 1))  # no noise
    bar = torch.zeros(1, 1, 32, 40)
    bar[..., 12:20] = 1
    operator = Downsample(4, "lanczos3")
    y = operator(bar)
    assert y.min() < 0 and (y == 0).any()
    assert torch.equal(InverseProblem(y, operator).completed(y - 0.1), y)


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


def test_the_true_image_leaves_the_expected_residual_where_noise_and_overshoot_were_clipped():
    truth = torch.ones(1, 1, 64, 96)
    truth[..., 24:72] = 0
    operator, noise = Downsample(4, "lanczos3"), GaussianNoise(2)
    generator = torch.Generator().manual_seed(0)
    draws = [noise.sample(operator(truth), generator).clamp(0, 1) for _ in range(20)]
    problems = [InverseProblem(y, operator, noise) for y in draws]
    found = np.mean([problem.residual(truth).item() for problem in problems])
    expected = np.mean([problem.expected_residual(truth).item() for problem in problems])
    assert found == pytest.approx(expected, rel=0.03)


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
        (np.zeros((1, 3, 5, 5)), r"got ndarray; deepred_pl\.images\.to_tensor"),
        ([[0.1]], "got list"),
        (255 * picture(3, 5, 5), r"its mean is \d+; divide it by the value of white"),
        (picture(3, 5, 5).requires_grad_(), "is a parameter of the operator"),
    ],
)
def test_a_measurement_that_is_no_image_is_refused(y, message):
    with pytest.raises(ValueError, match=message):
        InverseProblem(y)


def test_what_is_no_noise_model_is_refused():
    with pytest.raises(ValueError, match=r"or None, got 25; for example GaussianNoise\(sigma=25\)"):
        InverseProblem(picture(), noise=25)


class MaskedFourier(Operator):
    """The known part of an image's Fourier transform, as magnetic resonance imaging has it."""

    keeps_units = False

    def __init__(self, known):
        super().__init__()
        self.register_buffer("known", known)

    def forward(self, x):
        return self.known * torch.fft.fft2(x, norm="ortho")

    def image_shape(self, measurement_shape):
        return measurement_shape

    @property
    def observed(self):
        return self.known


class Physics:
    """The same for any program: two functions."""

    def __init__(self, known):
        self.A = MaskedFourier(known)

    def A_adjoint(self, y):
        return torch.fft.ifft2(self.A.known * y, norm="ortho")


def complex_problem(kind=MaskedFourier, sigma=5, height=9, width=12, **settings):
    random = torch.Generator().manual_seed(0)
    truth = picture(1, height, width)
    known = (torch.rand(1, 1, height, width, generator=random) < 0.6).float()
    noise = torch.randn(1, 1, height, width, 2, generator=random) * sigma / 255
    y = known * (torch.fft.fft2(truth, norm="ortho") + torch.view_as_complex(noise))
    return y, truth, known, InverseProblem(y, kind(known), GaussianNoise(sigma), truth, **settings)


def test_a_complex_measurement_is_fitted_by_its_two_parts():
    y, truth, known, problem = complex_problem()
    out = truth.flip(-1).requires_grad_()
    residual = np.fft.fft2(out.detach().double().numpy(), norm="ortho") - y.numpy()
    seen = known.bool().numpy()
    assert problem.image_shape == (1, 1, 9, 12) and problem.y.shape == (1, 1, 9, 12, 2)
    want = (np.abs(residual[seen]) ** 2).sum() / (2 * seen.sum())
    assert problem.residual(out).item() == pytest.approx(want, rel=1e-5)
    (got,) = torch.autograd.grad(problem.data_term(out), out)
    slope = np.fft.ifft2(seen * residual, norm="ortho").real / seen.sum()
    torch.testing.assert_close(got, torch.from_numpy(slope).float(), rtol=1e-4, atol=1e-7)
    assert problem.residual_ratio(truth).item() == pytest.approx(1, abs=0.25)
    assert problem.clipped_to == (-np.inf, np.inf)


def test_a_complex_operator_with_an_adjoint_gives_the_same():
    _, truth, known, ours = complex_problem()
    other = complex_problem(Physics)[3]  # without `observed`
    found = []
    for problem, seen in ((ours, known.mean()), (other, 1)):
        out = truth.flip(-1).requires_grad_()
        (gradient,) = torch.autograd.grad(problem.data_term(out), out)
        found.append((gradient * seen, problem.operator.adjoint(problem.y), problem.first_guess()))
    for one, another in zip(*found, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-6)
    assert backprojection(other, truth.flip(-1), 0.01).isfinite()


def test_the_noise_of_a_complex_measurement_must_be_stated():
    y, _, known, _ = complex_problem()
    with pytest.raises(ValueError, match="of a complex measurement cannot be estimated"):
        InverseProblem(y, MaskedFourier(known), GaussianNoise(None))


def test_a_complex_measurement_needs_an_operator_whose_values_may_be_double():
    y, _, known, problem = complex_problem()
    with pytest.raises(ValueError, match="a complex measurement needs an operator"):
        InverseProblem(y)
    other = MaskedFourier(known)
    other.known = known.to(torch.complex128)
    double = InverseProblem(y, other)
    assert torch.equal(double.operator.adjoint(double.y), problem.operator.adjoint(problem.y))


@pytest.mark.parametrize("kind", [MaskedFourier, Physics])
def test_an_attribute_that_is_set_on_the_wrapper_of_an_operator_is_refused(kind):
    *_, problem = complex_problem(kind)
    name, inner = (
        ("known", "operator.operator") if kind is MaskedFourier else ("A", "operator.physics")
    )
    wrapper = problem.operator if kind is MaskedFourier else problem.operator.operator
    with pytest.raises(AttributeError, match=rf"{name} is an attribute .* {inner}\.{name}"):
        setattr(wrapper, name, None)
    problem.operator.eval()  # torch's own attributes are set
    assert not problem.operator.training


def test_a_complex_measurement_is_restored(make_trainer, tmp_path):
    *_, problem = complex_problem(height=33, width=36)
    model = DeepRED(network=TinyNet, problem=problem, fidelity="backprojection", input_scale=1.0)
    parts = [REDUpdate(smooth, every_n_steps=5), Monitor(), Writer()]
    make_trainer(max_steps=20, log_every_n_steps=10, callbacks=parts).fit(model)
    assert model.restored.shape == (1, 1, 33, 36) and model.restored.isfinite().all()
    scores = result_of(tmp_path / RUN)["psnr"]
    assert scores["out"] > scores["measurement"]  # that of the first guess


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


@pytest.mark.parametrize("sigma", [5, 25, 80])
def test_the_variance_of_a_completed_measurement(sigma):
    clean = torch.linspace(0, 1, 7).repeat_interleave(40_000).view(1, 1, 7, -1)
    noise = GaussianNoise(sigma)
    y = noise.sample(clean, torch.Generator().manual_seed(0)).clamp(0, 1)
    problem = InverseProblem(y, noise=noise)
    error = problem.completed(clean) - clean
    torch.testing.assert_close(
        error.mean(-1), torch.zeros(1, 1, 7), rtol=0, atol=5 * sigma / 255 / 200
    )
    want = error.square().mean(-1)
    torch.testing.assert_close(problem.completed_variance(clean).mean(-1), want, rtol=0.03, atol=0)
    # At black and white the Fisher information, 1/2 + 1/π of that of the unclipped measurement.
    if sigma < 50:
        share = problem.completed_variance(clean)[0, 0, [0, -1], 0] / (sigma / 255) ** 2
        torch.testing.assert_close(share, torch.full((2,), 0.5 + 1 / np.pi), rtol=1e-4, atol=0)


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


CLIPPED = [
    (GaussianNoise(25), 0.02),
    (GaussianNoise(25), 0.97),
    (PoissonGaussianNoise(2, 5), 0.01),
    (PoissonNoise(30), 0.95),
    (GammaNoise(10), 0.9),
]


def fitted_level(problem, fidelity):
    level = torch.tensor(0.5, requires_grad=True)
    descent = torch.optim.SGD([level], lr=0.2)
    for _ in range(100):
        descent.zero_grad()
        out = level.expand_as(problem.y)
        if fidelity == "likelihood":
            problem.data_term(out).backward()
        else:
            backprojection(problem, out, epsilon=0.1).backward()
        descent.step()
    return level.item()


@pytest.mark.parametrize(("noise", "truth"), CLIPPED)
@pytest.mark.parametrize("fidelity", ["likelihood", "backprojection"])
def test_a_flat_area_is_fitted_as_dark_or_bright_as_before_its_noise_was_clipped(
    noise, truth, fidelity
):
    flat = torch.full((1, 1, 200, 200), truth)
    y = noise.sample(flat, torch.Generator().manual_seed(0)).clamp(0, 1)
    problem = InverseProblem(y, noise=noise)
    level = fitted_level(problem, fidelity)
    error = 5 * noise.variance(flat).mean().sqrt().item() / 200
    if isinstance(noise, GaussianNoise):
        assert level == pytest.approx(truth, abs=error)
    assert abs(level - truth) < 0.3 * abs(y.mean() - truth)  # others are taken as normal


def test_laplace_noise_is_not_completed():
    y = LaplaceNoise(25).sample(torch.zeros(1, 1, 9, 11), torch.Generator()).clamp(0, 1)
    problem = InverseProblem(y, noise=LaplaceNoise(25))
    assert torch.equal(problem.completed(y + 0.1), y)
    assert not problem.clipped().any()


@pytest.mark.parametrize("fidelity", ["likelihood", "backprojection"])
def test_values_below_black_are_fitted_under_clipped_noise(fidelity):
    noise, truth = GaussianNoise(25), -0.05
    y = noise.sample(torch.full((1, 1, 200, 200), truth), torch.Generator().manual_seed(0))
    problem = InverseProblem(y.clamp(0, 1), noise=noise)
    level = fitted_level(problem, fidelity)
    assert level == pytest.approx(truth, abs=0.004)


def test_clipping_reaches_parts_and_leaves_out_what_is_not_observed():
    noise, clean = GaussianNoise(25), picture(3, 40, 52)
    y = noise.sample(clean, torch.Generator().manual_seed(0)).clamp(0, 1)
    problem, region = InverseProblem(y, noise=noise), Region(8, 16, 24, 24)
    want = region.of(problem.completed(clean))
    assert not torch.equal(want, region.of(y))
    torch.testing.assert_close(problem.part(region).completed(region.of(clean)), want)
    known = clean[:, :1] > 0.3
    masked = InverseProblem(y, Mask(known), noise).data_term(clean)
    error = ((clean - problem.completed(clean)).square() * known).sum() / known.sum() / 3
    torch.testing.assert_close(masked, error)


def test_outputs_far_beyond_the_range_keep_finite_gradients():
    for noise in NOISES:
        y = noise.sample(picture(3, 9, 11), torch.Generator().manual_seed(0)).clamp(0, 1)
        y[..., 0], y[..., 1] = 0, 1
        for value in (-1e3, -0.1, 0.0, 1.0, 1e3):
            out = torch.full_like(y, value).requires_grad_()
            (gradient,) = torch.autograd.grad(InverseProblem(y, noise=noise).data_term(out), out)
            assert gradient.isfinite().all()


# Held-out values

SEEN = {
    "identity": (Identity(), GaussianNoise(20), (3, 33, 47)),
    "blur": (Blur.gaussian(7, 1.1, boundary="reflect"), GaussianNoise(5), (1, 33, 47)),
    "downsample": (Downsample(2), None, (3, 66, 94)),
    "mask": (Mask(torch.rand(33, 47, generator=torch.Generator().manual_seed(1)) < 0.7), None, 3),
    "radon": (Radon(30), GaussianNoise(1), (1, 48, 48)),
    "counts": (Identity(), PoissonNoise(40), (3, 33, 47)),
}


def held_out_of(name, share=0.1):
    """A problem with held-out values, and the one that it was before."""
    operator, noise, shape = SEEN[name]
    truth = picture(*((shape, 33, 47) if isinstance(shape, int) else shape))
    y = operator(truth)
    y = y if noise is None else noise.sample(y, torch.Generator().manual_seed(2))
    whole = InverseProblem(y, operator, noise, truth)
    return whole.hold_out(share, seed=3), whole


@pytest.mark.parametrize("name", SEEN)
def test_nothing_but_the_errors_depends_on_held_out_values(name):
    operator, noise, _ = SEEN[name]
    problem, whole = held_out_of(name)
    held = problem.held_out.bool().expand_as(whole.y)
    noisy = torch.rand(whole.y.shape, generator=torch.Generator().manual_seed(4))
    other_y = torch.where(held, noisy, whole.y)
    other = InverseProblem(other_y, operator, noise).hold_out(0.1, seed=3)
    assert torch.equal(problem.held_out, other.held_out)

    def seen(problem):
        out = picture(*problem.image_shape[1:]).flip(-1).requires_grad_()
        terms = [problem.data_term(out), problem.residual(out)]
        if noise is not None:
            terms.append(backprojection(problem, out, 0.1))
            terms.append(expected_backprojection(problem, out, 0.01))
            terms.append(problem.expected_residual(out))
            terms += [torch.tensor(value) for value in automatic_epsilon(problem)]
        slopes = [torch.autograd.grad(t, out, retain_graph=True)[0] for t in terms[:2]]
        model = DeepRED(network=TinyNet, problem=problem)
        state = [model.x, model.average, model.f_x, problem.first_guess(), problem.y]
        return [value.detach() for value in (*terms, *slopes, *state)]

    for ours, theirs in zip(seen(problem), seen(other), strict=True):
        assert torch.equal(ours, theirs)
    guess = problem.first_guess()
    assert not torch.equal(problem.held_out_errors(guess), other.held_out_errors(guess))


@pytest.mark.parametrize("name", SEEN)
def test_errors_are_those_of_the_measured_values_that_were_held_out(name):
    operator, _, _ = SEEN[name]
    problem, whole = held_out_of(name)
    image = picture(*problem.image_shape[1:]).flip(-1)
    held = problem.held_out.bool().expand_as(whole.y).numpy()
    clean = operator(image).double().numpy()
    clean = clean.clip(*whole.clipped_to)
    want = ((clean - whole.y.double().numpy()) ** 2)[held]
    np.testing.assert_allclose(problem.held_out_errors(image), want, atol=1e-6)
    known = 1 if whole.operator.observed is None else whole.operator.observed
    known = (torch.ones_like(whole.y) * known)[0, 0]
    alike = (held == held[:, :1]).all()  # all channels of a pixel
    assert alike and held[0, 0].sum() == round(0.1 * float(known.sum()))
    assert known.numpy()[held[0, 0]].all()


@pytest.mark.parametrize("name", SEEN)
def test_released_values_are_observed_again(name):
    problem, whole = held_out_of(name)
    out = picture(*problem.image_shape[1:]).flip(-1)
    before = problem.as_image(), problem.keep_known(out)
    assert not torch.allclose(problem.residual(out), whole.residual(out), rtol=1e-4)
    problem.release()
    assert problem.held_out is None
    torch.testing.assert_close(problem.y, whole.y)
    torch.testing.assert_close(problem.data_term(out), whole.data_term(out))
    assert torch.equal(problem.clipped(), whole.clipped())
    for shown, now, want in zip(
        before,
        (problem.as_image(), problem.keep_known(out)),
        (whole.as_image(), whole.keep_known(out)),
        strict=True,
    ):
        torch.testing.assert_close(now, want)
        if whole.operator.keeps_units and not isinstance(whole.operator, Downsample):
            torch.testing.assert_close(shown, want)  # pictures have no holes before, either


@pytest.mark.parametrize("share", [0, -0.1, 0.6, float("nan")])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match=r"held-out values must be in \(0, 0.5\]"):
        noisy_problem().hold_out(share)


def test_too_few_values_to_judge_by_are_refused():
    with pytest.raises(ValueError, match=r"0\.02 of the measured values are 6, too few"):
        noisy_problem(3, 9, 11).hold_out(0.02)
