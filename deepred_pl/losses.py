"""Terms that the θ-update minimises beside the likelihood.

A term is any callable `term(out, model) -> Tensor`, 0-dim, for T_θ(z) = out, (1, C, H, W);
`DeepImagePrior(regularizer=term)` adds it to the data term.
"""

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import total_variation

from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Identity
from deepred_pl.problem import InverseProblem

PERTURBATION = 0.1  # of σ: small against the noise, large against rounding, TF32's too


class Restoration(Protocol):
    """What a term sees of the module that is fitted."""

    network: nn.Module | None
    problem: InverseProblem | None
    z: Tensor
    input_noise_std: float

    def generator(self, purpose: str = "") -> torch.Generator:
        """Random numbers of this step."""


class Term(ABC):
    """A term beside the likelihood; the base class lets the command line find it by name."""

    def check(self, model: Restoration) -> None:  # noqa: B027  most apply everywhere
        """Refuse a model and problem it does not apply to; called before the fit.

        Raises:
            ValueError: It does not apply; the message says why.
        """

    @abstractmethod
    def __call__(self, out: Tensor, model: Restoration) -> Tensor:
        """The term at T_θ(z) = out, 0-dim."""


class TotalVariationPenalty(Term):
    """Anisotropic total variation per value, weight · Σ(|∂ᵥ out| + |∂ₕ out|) / N.

    Args:
        weight: > 0, in the squared-error units of the data term.

    Raises:
        ValueError: weight not above 0.
    """

    def __init__(self, weight: float = 0.01) -> None:
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be > 0, got {weight}; leave the term out instead")
        self.weight = weight

    def __call__(self, out: Tensor, model: Restoration) -> Tensor:
        return self.weight * total_variation(out) / out.numel()


class SURE(Term):
    """What Stein's unbiased risk estimate adds to the mean squared residual (Stein 1981).

    2σ²/N · div_y T_θ(y) − σ², so that the data term and this term together estimate
    mean((T_θ(y) − x)²) without x. The divergence is Monte-Carlo (Ramani et al. 2008): a second
    pass through the network, on the measurement moved by a little fresh noise; under autocast a
    third one, for both are made in float32: bfloat16 would round the difference away. It holds
    for Gaussian noise of known σ, and is a little off near black and white where that was
    clipped; A must be the identity, and the network's input the measurement alone
    (`MeasurementNet`, input_noise_std=0). It is unbiased for a fixed network; one that is fitted
    to the same y can cheat it by a divergence below 0, and the loss then falls below 0, where no
    squared error can be.

    Raises:
        ValueError: At `check`, another noise, operator or network input.
    """

    def check(self, model: Restoration) -> None:
        problem = model.problem
        assert problem is not None
        if not isinstance(problem.operator, Identity):
            raise ValueError(
                "SURE is for denoising: expected the Identity operator, got "
                f"{type(problem.operator).__name__}; use another method, as methods/deepred"
            )
        if not isinstance(problem.noise, GaussianNoise):
            got = "none" if problem.noise is None else type(problem.noise).__name__
            raise ValueError(
                f"SURE needs the sigma of Gaussian noise: expected GaussianNoise, got {got}; give "
                "noise, or use another method, as methods/deepred"
            )
        if model.input_noise_std > 0 or not torch.equal(model.z, problem.y):
            raise ValueError(
                "SURE needs the measurement as the network's only input: expected "
                "network=MeasurementNet and input_noise_std=0, got "
                f"{type(model.network).__name__} and {model.input_noise_std}"
            )

    def __call__(self, out: Tensor, model: Restoration) -> Tensor:
        assert model.network is not None and model.problem is not None
        variance = model.problem.noise_variance()
        assert variance is not None
        moved = torch.randn(out.shape, generator=model.generator("SURE"), device=out.device)
        step = PERTURBATION * variance.sqrt()
        rounded = torch.is_autocast_enabled(out.device.type)
        with torch.autocast(out.device.type, enabled=False):
            here = model.network(model.z) if rounded else out
            change = model.network(model.z + step * moved) - here
        return 2 * variance * (moved * change).mean() / step - variance
