"""The data term by back-projection, an alternative to the noise model's likelihood.

    D_BP(out) = ‖(A Aᵀ + ε I)^(−1/2) (A out − y)‖² / N,   N the number of values of the image

(Tirer & Giryes 2020, arXiv:1906.06794; for Deep Image Prior: Zukerman et al. 2020,
arXiv:2003.05417). Where A attenuates detail, as a strong blur does, the likelihood hardly depends
on that detail and a network learns it last. D_BP measures the residual in units of the image, up
to what ε permits. It then weights the noise too:

    E(ε) = σ̄² · trace((A Aᵀ + ε I)⁻¹) / N

is the expected value of D_BP at the true image, the variance of the weighted noise. Clipped
values of y are replaced by their mean before clipping (`InverseProblem.completed`), which makes the
expectation smaller (`expected_backprojection`).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from deepred_pl.noise import mean_over
from deepred_pl.operators import unknown_blur
from deepred_pl.problem import InverseProblem

Fidelity = Literal["likelihood", "backprojection"]

# Constants of `automatic_epsilon`, whose docstring says how they were chosen.
WEIGHTED_VARIANCE = 0.00133
GROWTH = 0.3
VARIANCE_OFFSET = 2.0  # squared grey levels: with even less noise, E hardly changes
RGB = 3  # channels
DARKEST = 0.1  # of the mean variance: signal-dependent noise counts as at least that

# The error of an unknown blur's kernel, on the [0, 1] scale. Fits that stated σ = 2 for noise of
# σ = 1 ended 0.5 to 1.7 dB better on three of six images of 128×128 pixels, and within 0.13 dB on
# the others.
KERNEL_ERROR = math.sqrt(3) / 255

EPSILON_RANGE = 1e-6, 1e3  # in units of ‖A‖²
HALVINGS = 12  # of that range, on a logarithmic scale: ε to 0.5 %
POWER_ITERATIONS = 20
ROUNDING = 1e-6  # of the largest value


def backprojection(problem: InverseProblem, out: Tensor, epsilon: float) -> Tensor:
    """D_BP(out), 0-dim, with the gradient 2 Aᵀ (A Aᵀ + ε I)⁻¹ (A out − y) / N.

    The residual of signal-dependent noise is divided by its standard deviation at the current
    `out` and multiplied by the mean one, so that D_BP is in squared-error units for every noise.

    Args:
        problem: The inverse problem.
        out: T_θ(z), (1, C, H, W).
        epsilon: ε > 0, in the units of A Aᵀ's eigenvalues, which are in [0, 1] for a blur.
    """
    measured = problem.operator(out)
    residual = measured - problem.completed(measured)
    if problem.operator.observed is not None:
        residual = residual * problem.operator.observed
    residual = residual * _standardization(problem, measured.detach())
    with torch.no_grad():
        solved = problem.operator.inverse_gram(residual, epsilon)
    half = (residual * solved).sum() / out.numel()
    return 2 * half - half.detach()  # the value ⟨r, s⟩ / N, and twice the gradient of r in it


def check_backprojection(problem: InverseProblem) -> None:
    """Raise ValueError if the noise rules out a squared residual, or the operator is learned."""
    operator = problem.operator
    if any(t.requires_grad for t in (*operator.parameters(), *operator.buffers())):
        raise ValueError(
            "fidelity='backprojection' weights the residual by the operator itself, and a learned "
            "kernel would shrink until the weights vanish; set fidelity='likelihood', or freeze "
            "the operator (operator.requires_grad_(False))"
        )
    if problem.noise is not None and problem.noise.has_outliers:
        raise ValueError(
            "fidelity='backprojection' squares the residual, in which the outliers of "
            f"{type(problem.noise).__name__} dominate; set fidelity='likelihood', with its own lam "
            "and mu (methods/likelihood), or another noise"
        )


def _standardization(problem: InverseProblem, measured: Tensor) -> Tensor | float:
    """σ̄ over the noise's standard deviation, per value, or 1 if it is the same everywhere."""
    variance = 0.0 if problem.noise is None else problem.noise.variance(measured)
    if not isinstance(variance, Tensor) or variance.ndim == 0:
        return 1.0
    mean = problem.noise_variance()
    assert mean is not None
    return (mean / variance.clamp(min=DARKEST * mean)).sqrt()


def _variance(problem: InverseProblem) -> Tensor | None:
    """σ̄², the mean variance of the noise, plus that of the kernel's errors if a blur is unknown."""
    variance = problem.noise_variance()
    if variance is None or unknown_blur(problem.operator) is None:
        return variance
    return variance + KERNEL_ERROR**2


@torch.no_grad()
def expected_backprojection(problem: InverseProblem, out: Tensor, weighted: float) -> Tensor:
    """The expectation of D_BP(out) if `out` is the true image, 0-dim.

    Args:
        problem: The inverse problem, with a noise model.
        out: T_θ(z), (1, C, H, W).
        weighted: E(ε), the `weighted_variance`, reduced here where the measurement was clipped, or
            is too dark for its residual to be standardized.
    """
    measured, mean = problem.operator(out), problem.noise_variance()
    assert mean is not None
    scale = _standardization(problem, measured)
    standardized = problem.completed_variance(measured) * scale**2
    return weighted * mean_over(standardized, problem.operator.observed) / mean


@torch.no_grad()
def weighted_variance(problem: InverseProblem, epsilon: float) -> Tensor:
    """E(ε), the variance of the weighted noise, 0-dim; the trace is estimated by one random probe.

    Args:
        problem: The inverse problem, with a noise model.
        epsilon: ε > 0.
    """
    variance = _variance(problem)
    assert variance is not None
    probe = _probe(problem)
    weighted = (probe * problem.operator.inverse_gram(probe, epsilon)).sum()
    return variance * weighted / math.prod(problem.image_shape)


@torch.no_grad()
def automatic_epsilon(problem: InverseProblem) -> tuple[float, float]:
    """ε for this operator and noise, so that the same λ and μ suit blurs at many noise levels.

    ε solves E(ε) = 0.00133 · √C · (s² + 2)^0.3 for C channels, with s = 255 σ̄ / ‖A‖ the noise in
    grey levels of the image, within 10⁻⁶ to 10³ times ‖A‖²; if only a share of the values was
    measured, E is that share of it. With one channel the network learns the weighted noise sooner
    than with the three of a colour image, and with stronger noise later. For more than three, such
    as frames or bands, C is taken as 1: with √C a stack of 12 frames ended 2.4 dB lower after 1200
    steps (`tests/benchmarks/results/stacks.md`).

    Chosen on 128×128 crops, of one and three channels, of scikit-image's astronaut and camera,
    blurred by a mean of 9×9, at σ = 0.5, √2, 5 and 10, with λ = μ = 0.7 and non-local means of
    σ_f = 4. With an `UnknownBlur`, 3 squared grey levels are added to σ̄² for the kernel's errors.

    Returns:
        ε, and a factor for λ and μ. The factor is 1 unless E stays below that value even at the
        smallest ε, as for operators that attenuate little; then it is their ratio.

    Raises:
        ValueError: The problem has no noise model.
    """
    variance = _variance(problem)
    if variance is None:
        raise ValueError(
            "epsilon='auto' needs a noise model, but this problem has none; set noise, or epsilon "
            "to a number such as 0.01"
        )
    largest = _largest_eigenvalue(problem)
    noise = 255**2 * float(variance) / largest
    channels = problem.image_shape[1]
    target = WEIGHTED_VARIANCE * math.sqrt(channels if channels <= RGB else 1)
    target *= (noise + VARIANCE_OFFSET) ** GROWTH * float(_probe(problem).abs().mean())
    low, high = (math.log(bound * largest) for bound in EPSILON_RANGE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if weighted_variance(problem, math.exp(middle)) > target:
            low = middle
        else:
            high = middle
    epsilon = math.exp(low)
    return epsilon, min(1.0, float(weighted_variance(problem, epsilon)) / target)


def _largest_eigenvalue(problem: InverseProblem) -> float:
    """‖A‖², the largest eigenvalue of A Aᵀ, by power iteration."""
    vector = _probe(problem)
    for _ in range(POWER_ITERATIONS):
        vector = vector / torch.linalg.vector_norm(vector)
        vector = problem.operator(problem.operator.adjoint(vector))
    return float(torch.linalg.vector_norm(vector))


def _probe(problem: InverseProblem) -> Tensor:
    """±1 at random (Hutchinson 1990), and 0 for values that were not measured."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, problem.y.shape, generator=generator, device="cpu")
    probe = (2.0 * signs - 1).to(problem.y)
    observed = problem.operator.observed
    if observed is not None:
        return probe * observed
    # An adapted operator may set values to 0, and y has no noise there.
    mapped = problem.operator(problem.operator.adjoint(probe)).abs()
    return probe * ((mapped > ROUNDING * mapped.max()) | (problem.y != 0))
