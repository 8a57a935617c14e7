"""The x- and u-updates of DeepRED, as pure functions of tensors.

DeepRED (Mataev, Elad, Milanfar 2019, arXiv:1903.10176, Eq. 4) solves

    min_{θ,x}  D(A T_θ(z), y) + λ/2 · xᵀ(x − f(x))   subject to  x = T_θ(z)

by ADMM with the scaled dual u. With v = T_θ(z) + u the updates are

    θ-update   Adam steps on  D(A T_θ(z), y) + μ/2 · ‖x − T_θ(z) − u‖²     (model.py)
    x-update   x ← (λ f(x) + μ v) / (λ + μ)                                 `fixed_point`
               x ← x − c [λ (x − f(x)) + μ (x − v)]                         `gradient_step`
               x ← f(v)                                                     `plug_and_play`
    u-update   u ← u + T_θ(z) − x                                           `dual_update`

Images are float tensors of shape (1, C, H, W), x within `limits`; λ and μ are 0-dim tensors or
numbers, and only their ratio matters in the fixed point. Nothing here waits for a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

PER_VARIANCE = 450.0  # κ of `discrepancy`
SHARPNESS = 10.0  # p of `discrepancy`
STEEPNESS, LARGEST_EXCESS = 20.0, 1.1  # of `discrepancy_of_backprojection`
LARGEST_RATIO = 1.5  # keeps λ finite at a residual of 0

Weight = Tensor | float
XUpdate = Callable[[Tensor, Tensor, Tensor, Weight, Weight], Tensor]
Limits = tuple[float, float]


def fixed_point(
    x: Tensor, f_x: Tensor, v: Tensor, lam: Weight, mu: Weight, limits: Limits = (0, 1)
) -> Tensor:
    """The fixed-point x-update, (λ f(x) + μ v) / (λ + μ), clipped to the limits.

    It sets the gradient of λ/2 · xᵀ(x − f(x)) + μ/2 · ‖x − v‖² to zero with f(x) fixed
    (RED, Romano et al. 2017, arXiv:1611.02862); `x` itself enters only through f(x).

    Args:
        x: The current x, (1, C, H, W).
        f_x: The denoised x.
        v: T_θ(z) + u.
        lam: λ > 0, weight of the RED prior.
        mu: μ > 0, penalty of the constraint.
        limits: The least and the largest value of x.
    """
    return ((lam * f_x + mu * v) / (lam + mu)).clamp(*limits)


def gradient_step(
    x: Tensor,
    f_x: Tensor,
    v: Tensor,
    lam: Weight,
    mu: Weight,
    step_size: float = 0.5,
    limits: Limits = (0, 1),
) -> Tensor:
    """One steepest-descent step of the x-update, clipped to the limits.

    x − c [λ (x − f(x)) + μ (x − v)] with c = step_size / (λ + μ). Relative to the curvature
    λ + μ, steps below 2 are stable for any λ and μ, and a step of 1 is the fixed point.

    Args:
        x: The current x, (1, C, H, W).
        f_x: The denoised x.
        v: T_θ(z) + u.
        lam: λ > 0, weight of the RED prior.
        mu: μ > 0, penalty of the constraint.
        step_size: In (0, 2).
        limits: The least and the largest value of x.
    """
    c = step_size / (lam + mu)
    return (x - c * (lam * (x - f_x) + mu * (x - v))).clamp(*limits)


def plug_and_play(
    x: Tensor, f_v: Tensor, v: Tensor, lam: Weight, mu: Weight, limits: Limits = (0, 1)
) -> Tensor:
    """The x-update of Plug-and-Play ADMM, f(v), clipped to the limits.

    The denoiser replaces the whole x-update (Venkatakrishnan et al. 2013), so that λ, μ and x are
    not used, and f_v is the denoised v = T_θ(z) + u, (1, C, H, W), not f(x).
    """
    return f_v.clamp(*limits)


def dual_update(v: Tensor, x: Tensor) -> Tensor:
    """Scaled dual ascent, v − x = u + T_θ(z) − x; all of shape (1, C, H, W)."""
    return v - x


def inner_iterations(
    denoise: Callable[[Tensor], Tensor],
    update: XUpdate,
    x: Tensor,
    v: Tensor,
    lam: Weight,
    mu: Weight,
    count: int,
) -> tuple[Tensor, Tensor]:
    """`count` denoiser calls with `count` − 1 x-updates between them, at a fixed v.

    Returns:
        The last x and its f(x). With `count` = 1 these are the given x and f(x).
    """
    f_x = denoise(x)
    for _ in range(count - 1):
        x = update(x, f_x, v, lam, mu)
        f_x = denoise(x)
    return x, f_x


def red_prior(x: Tensor, f_x: Tensor) -> Tensor:
    """The RED prior per value, mean(x · (x − f(x))), 0-dim (Eq. 4 without λ/2)."""
    return (x * (x - f_x)).mean()


def gap(out: Tensor, x: Tensor) -> Tensor:
    """The residual of the constraint x = T_θ(z), ‖x − T_θ(z)‖₂, 0-dim (Figure 3)."""
    return torch.linalg.vector_norm(x - out)


def discrepancy(residual: Tensor, expected: Tensor) -> Tensor:
    """λ by Morozov's discrepancy principle, 0-dim, without a device synchronization.

    The principle asks for the λ at which the residual mean((A T_θ(z) − y)²) is what the noise
    explains: below that, the network fits noise. Here λ follows the ratio of both directly,

        λ = κ · expected · (expected / residual)^p,   κ = 450, p = 10.

    At residual = expected, λ is κ times the noise's variance, proportional to it as in RED, whose
    data term is divided by σ² (arXiv:1611.02862); the power keeps λ negligible while the network
    does not fit the image yet, and raises it steeply before noise is learned. That must be early,
    because a weak denoiser does not remove learned noise. For p → ∞ it is the principle itself.
    κ and p were chosen on 128×128 crops of scikit-image's astronaut and camera, for Gaussian noise
    of σ = 25 and 50 and Poisson noise, with non-local means of σ_f = 3.

    Args:
        residual: mean((A T_θ(z) − y)²), 0-dim.
        expected: Its expectation at the true image, 0-dim.
    """
    ratio = (expected / residual).clamp(max=LARGEST_RATIO)
    return PER_VARIANCE * expected * ratio**SHARPNESS


def discrepancy_of_backprojection(least: Weight, residual: Tensor, expected: Tensor) -> Tensor:
    """λ that rises above `least` as back-projected noise is learned, 0-dim, without a branch.

    λ = least · max(1, expected / residual)^20: constant until the residual is what the noise
    explains. (A smaller λ before that, as `discrepancy` gives, was 0.1 to 0.5 dB worse.) Below, a
    rise by half for every 2 % keeps a long fit from learning noise, but at most sevenfold, because
    an overestimated noise level must not stop the fit. The power was chosen like the constants of
    `fidelity.automatic_epsilon`.

    Args:
        least: λ while the residual is above its expectation.
        residual: D_BP(T_θ(z)) (`fidelity.backprojection`), 0-dim.
        expected: Its expectation at the true image, 0-dim.
    """
    return least * (expected / residual).clamp(1, LARGEST_EXCESS) ** STEEPNESS


def rise(
    lam: Tensor, mu: Tensor, threshold: Tensor, psnr: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The released code's rise of λ and μ, without a branch and thus a device synchronization.

    When T_θ(z) fits the measurement better than `threshold`, it begins to fit the noise: then λ and
    μ grow by `step`, and the threshold by 0.01 dB.

    Args:
        lam: λ, 0-dim.
        mu: μ, 0-dim.
        threshold: dB, 0-dim.
        psnr: PSNR(A T_θ(z), y) in dB, 0-dim.
        step: Increment of λ and μ.

    Returns:
        The new λ, μ and threshold.
    """
    above = (psnr > threshold).to(lam.dtype)
    return lam + step * above, mu + step * above, threshold + 0.01 * above
