"""Terms beside the likelihood, against independent formulas."""

import numpy as np
import pytest
import torch
from torch import nn

from deepred_pl import DeepImagePrior, InverseProblem
from deepred_pl.losses import SURE, TotalVariationPenalty
from deepred_pl.networks import MeasurementNet
from deepred_pl.noise import GaussianNoise, PoissonNoise
from deepred_pl.operators import Blur
from tests.helpers import TinyNet, noisy_problem, picture


@pytest.mark.parametrize("shape", [(1, 9, 11), (3, 33, 47)])
def test_total_variation_is_the_sum_of_differences_per_value(shape):
    out = picture(*shape)
    array = out.double().numpy()
    want = np.abs(np.diff(array, axis=-1)).sum() + np.abs(np.diff(array, axis=-2)).sum()
    got = TotalVariationPenalty(0.3)(out, None)
    assert got.item() == pytest.approx(0.3 * want / array.size, rel=1e-5)


def test_the_regularizer_is_added_to_the_loss():
    settings = {"network": TinyNet, "problem": noisy_problem(), "seed": 4}
    plain = DeepImagePrior(**settings)
    model = DeepImagePrior(**settings, regularizer=lambda out, model: 2 * out.mean())
    loss, without = model.training_step(), plain.training_step()
    assert torch.equal(model.out, plain.out)
    assert loss.item() == pytest.approx(without.item() + 2 * model.out.mean().item(), rel=1e-6)


def test_weights_of_no_sense_are_refused():
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight must be > 0"):
            TotalVariationPenalty(weight)


class Linear(nn.Module):
    """T_θ(y) = M y for one matrix of all values: its divergence is the trace."""

    def __init__(self, channels, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def prepare(self, problem):
        return problem.y.clone()

    def forward(self, z):
        return (self.matrix @ z.flatten()).view(z.shape)


def sure_of(model, steps):
    """SURE over many draws of its random direction."""
    values = []
    for model.step in range(steps):
        out = model.network(model.z)
        values.append(model.problem.data_term(out) + model.regularizer(out, model))
    return torch.stack(values).detach()


def test_sure_is_the_residual_and_the_trace_of_a_linear_network():
    problem = InverseProblem(picture(3, 6, 7), noise=GaussianNoise(25))
    count = problem.y.numel()
    matrix = torch.randn(count, count, generator=torch.Generator().manual_seed(0)) / count**0.5
    matrix += 0.5 * torch.eye(count)
    model = DeepImagePrior(
        lambda c: Linear(c, matrix), input_noise_std=0, regularizer=SURE(), problem=problem
    )
    y, m = problem.y.flatten().double().numpy(), matrix.double().numpy()
    variance = (25 / 255) ** 2
    want = ((m @ y - y) ** 2).mean() + 2 * variance * np.trace(m) / count - variance
    values = sure_of(model, 3600)
    error = values.std().item() / 60
    assert values.mean().item() == pytest.approx(want, abs=4 * error)
    assert 4 * error < 0.02 * 2 * variance * np.trace(m) / count  # or it would prove little


def test_sure_estimates_the_error_against_the_true_image_without_it():
    truth = picture(1, 12, 13)
    count = truth.numel()
    # A moving average: smooth enough to denoise, with a divergence that matters.
    index = torch.arange(count)
    matrix = ((index[:, None] - index).abs() <= 1).float() / 3
    estimates, errors = [], []
    for seed in range(60):
        noise = GaussianNoise(25)
        y = noise.sample(truth, torch.Generator().manual_seed(seed))
        model = DeepImagePrior(
            lambda c: Linear(c, matrix),
            input_noise_std=0,
            regularizer=SURE(),
            seed=seed,  # other directions too, or their error would be common to all
            problem=InverseProblem(y, noise=noise),
        )
        estimates.append(sure_of(model, 8).mean())
        errors.append((model.network(y) - truth).square().mean())
    estimate, error = torch.stack(estimates), torch.stack(errors)
    spread = (estimate - error).std().item() / 60**0.5
    assert estimate.mean().item() == pytest.approx(error.mean().item(), abs=4 * spread)
    assert 4 * spread < 0.15 * error.mean()


def test_sure_leaves_clipped_values_out_of_the_divergence():
    levels = torch.tensor([0.0, 0.1, 0.4]).view(1, 1, 3, 1)
    truth = levels.expand(1, 1, 3, 10_000)
    noise = GaussianNoise(25)
    y = noise.sample(truth, torch.Generator().manual_seed(0)).clamp(0, 1)

    class Affine(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.5))
            self.offset = nn.Parameter(torch.tensor(0.1))

        def prepare(self, problem):
            return problem.y.clone()

        def forward(self, z):
            return self.offset + self.slope * z

    model = DeepImagePrior(
        Affine, input_noise_std=0, regularizer=SURE(), problem=InverseProblem(y, noise=noise)
    )
    descent = torch.optim.Adam(model.network.parameters(), lr=0.03)
    for model.step in range(200):
        descent.zero_grad()
        out = model.network(model.z)
        (model.problem.data_term(out) + model.regularizer(out, model)).backward()
        descent.step()
    error = (model.network(y) - truth).square().mean().item()
    slope, offset = np.polyfit(y.flatten().numpy(), truth.flatten().numpy(), 1)
    least = ((slope * y + offset - truth) ** 2).mean().item()
    assert error < 1.01 * least


def test_the_random_direction_of_sure_is_a_function_of_seed_and_step():
    def value(seed, step):
        model = DeepImagePrior(
            lambda c: MeasurementNet(c, width=4, scales=2),
            input_noise_std=0,
            regularizer=SURE(),
            problem=noisy_problem(),
            seed=0,
        )
        model.seed, model.step = seed, step
        return model.training_step().item()

    assert value(1, 5) == value(1, 5)
    assert len({value(1, 5), value(1, 6), value(2, 5)}) == 3


@pytest.mark.parametrize(
    ("problem", "settings", "message"),
    [
        (noisy_problem(), {"network": TinyNet}, "network=MeasurementNet and input_noise_std=0"),
        (noisy_problem(), {"input_noise_std": 0.01}, "network=MeasurementNet and input_noise_std"),
        (
            InverseProblem(picture(3, 9, 11), Blur.uniform(3), GaussianNoise(25)),
            {},
            "expected the Identity operator, got Blur",
        ),
        (
            InverseProblem(picture(3, 9, 11), noise=PoissonNoise(30)),
            {},
            "expected GaussianNoise, got PoissonNoise",
        ),
        (InverseProblem(picture(3, 9, 11)), {}, "expected GaussianNoise, got none"),
    ],
)
def test_sure_is_refused_where_it_does_not_hold(problem, settings, message):
    network = lambda c: MeasurementNet(c, width=4, scales=2)  # noqa: E731
    settings = {"network": network, "input_noise_std": 0, **settings}
    with pytest.raises(ValueError, match=message):
        DeepImagePrior(**settings, regularizer=SURE(), problem=problem)


def test_sures_gradient_survives_bfloat16():
    def gradient(enabled):
        model = DeepImagePrior(
            lambda c: MeasurementNet(c, width=4, scales=2),
            input_noise_std=0,
            regularizer=SURE(),
            problem=noisy_problem(3, 33, 47),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model.network(model.z).float()
            model.regularizer(out, model).backward()
        return torch.cat([p.grad.flatten() for p in model.network.parameters()])

    full, mixed = gradient(False), gradient(True)
    assert torch.nn.functional.cosine_similarity(full, mixed, dim=0) > 0.999


def test_sure_needs_one_sigma_for_all_channels():
    problem = InverseProblem(picture(), noise=GaussianNoise([5, 10, 20]))
    settings = {"input_noise_std": 0, "regularizer": SURE(), "problem": problem}
    with pytest.raises(ValueError, match=r"one sigma for all channels, got \[5, 10, 20\]"):
        DeepImagePrior(lambda c: MeasurementNet(c, width=4, scales=2), **settings)
