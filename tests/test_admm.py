import numpy as np
import pytest
import torch

from deepred_pl import admm

SHAPES = [(1, 3, 33, 47), (1, 1, 5, 4), (1, 2, 1, 3)]


def arrays(shape, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.random(shape, dtype=np.float32) for _ in range(3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_fixed_point_is_the_minimiser_with_f_held(shape):
    x, f_x, v = arrays(shape)
    lam, mu = 0.3, 0.8
    got = admm.fixed_point(*map(torch.from_numpy, (x, f_x, v)), lam, mu).numpy()
    gradient = lam * (got - f_x) + mu * (got - v)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_updates_are_clipped():
    x, f_x, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.tensor([[[[-9.0, 9.0]]]])
    assert admm.fixed_point(x, f_x, v, 0.5, 0.5).tolist() == [[[[0.0, 1.0]]]]
    assert admm.gradient_step(x, f_x, v, 0.5, 0.5).tolist() == [[[[0.0, 1.0]]]]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_step_against_numpy(shape):
    x, f_x, v = arrays(shape)
    lam, mu, step = 0.3, 0.8, 0.7
    want = np.clip(x - step / (lam + mu) * (lam * (x - f_x) + mu * (x - v)), 0, 1)
    got = admm.gradient_step(*map(torch.from_numpy, (x, f_x, v)), lam, mu, step)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


def test_gradient_step_of_one_is_the_fixed_point_and_stays_stable_for_any_weights():
    x, f_x, v = map(torch.from_numpy, arrays((1, 3, 7, 5)))
    for weight in (1e-3, 1.0, 1e6):
        fixed = admm.fixed_point(x, f_x, v, weight, 2 * weight)
        torch.testing.assert_close(admm.gradient_step(x, f_x, v, weight, 2 * weight, 1.0), fixed)
        iterate = x
        for _ in range(60):
            iterate = admm.gradient_step(iterate, f_x, v, weight, 2 * weight, 1.9)
        assert (iterate - fixed).abs().max() < 1e-2


def test_dual_update_and_gap_against_numpy():
    u, out, x = arrays((1, 3, 6, 5))
    tensors = list(map(torch.from_numpy, (u, out, x)))
    got = admm.dual_update(tensors[0] + tensors[1], tensors[2]).numpy()
    np.testing.assert_allclose(got, u + out - x, atol=1e-7)
    want = np.sqrt(((x.astype(float) - out) ** 2).sum())
    assert admm.gap(tensors[1], tensors[2]).item() == pytest.approx(want, rel=1e-5)


def test_red_prior_is_half_the_quadratic_form_per_value():
    x, f_x, _ = arrays((1, 3, 6, 5))
    want = x.ravel().astype(float) @ (x - f_x).ravel() / x.size
    got = admm.red_prior(torch.from_numpy(x), torch.from_numpy(f_x))
    assert got.item() == pytest.approx(want, rel=1e-5)


def test_inner_iterations_call_the_denoiser_on_each_new_x():
    seen = []

    def denoise(x):
        seen.append(x.item())
        return x / 2

    x, f_x = admm.inner_iterations(
        denoise, admm.fixed_point, torch.tensor(0.8), torch.tensor(0.4), 1.0, 1.0, count=3
    )
    # x₁ = (0.4 + 0.4) / 2, x₂ = (0.2 + 0.4) / 2
    assert seen == pytest.approx([0.8, 0.4, 0.3])
    assert (x.item(), f_x.item()) == pytest.approx((0.3, 0.15))


def test_rise_follows_the_threshold():
    lam, mu, threshold = torch.tensor(0.5), torch.tensor(0.4), torch.tensor(20.0)
    below = admm.rise(lam, mu, threshold, torch.tensor(19.9), 0.03)
    assert [t.item() for t in below] == pytest.approx([0.5, 0.4, 20.0])
    above = admm.rise(lam, mu, threshold, torch.tensor(20.1), 0.03)
    assert [t.item() for t in above] == pytest.approx([0.53, 0.43, 20.01])
    # A perfect fit has infinite PSNR and must not spoil the weights.
    assert all(t.isfinite() for t in admm.rise(lam, mu, threshold, torch.tensor(torch.inf), 0.03))


@pytest.mark.parametrize(
    ("residual", "expected", "lam"),
    [
        (0.01, 0.01, 4.5),  # where the residual is the noise's, 450 times its variance
        (0.04, 0.04, 18.0),
        (0.02, 0.01, 0.004394531),  # twice that: 4.5 / 1024
        (0.008, 0.01, 41.90952),  # four fifths of it: 4.5 · 1.25¹⁰ = 4.5 · 9.313226
        (0.001, 0.01, 259.4927),  # below two thirds: 4.5 · 1.5¹⁰ = 4.5 · 57.66504
        (0.0, 0.01, 259.4927),  # a perfect fit must not spoil the weight
    ],
)
def test_discrepancy_is_the_noises_variance_times_a_power_of_the_ratio(residual, expected, lam):
    got = admm.discrepancy(torch.tensor(residual), torch.tensor(expected))
    assert got.item() == pytest.approx(lam, rel=1e-5)


def test_discrepancy_falls_as_the_residual_rises():
    lams = admm.discrepancy(torch.linspace(0.007, 0.02, 14), torch.tensor(0.01))
    assert (lams.diff() < 0).all()
