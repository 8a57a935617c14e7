"""Terms that the θ-update minimizes in addition to the data term.

A term is any callable `term(out, model) -> Tensor`, 0-dim, for T_θ(z) = out, (1, C, H, W);
`DeepImagePrior(regularizer=term)` adds it to the data term.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import total_variation

from deepred_pl.checks import check_positive
from deepred_pl.fidelity import Fidelity
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Identity
from deepred_pl.problem import InverseProblem

PERTURBATION = 0.1  # of σ: small compared to the noise, large compared to rounding, also in TF32


class Restoration(Protocol):
    """The part of a restoration module that terms use."""

    network: nn.Module | None
    problem: InverseProblem | None
    z: Tensor
    input_noise_std: float
    fidelity: Fidelity

    def generator(self, purpose: str = "") -> torch.Generator:
        """The random generator of this step."""


class Term(ABC):
    """Base class of terms, which lets the command line find them by their short names."""

    def check(self, model: Restoration) -> None:  # noqa: B027  most apply everywhere
        """Refuse a model and problem to which the term does not apply; called before the fit.

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
        ValueError: weight is not positive.
    """

    def __init__(self, weight: float = 0.01) -> None:
        check_positive("weight", weight, "leave the term out instead")
        self.weight = weight

    def __call__(self, out: Tensor, model: Restoration) -> Tensor:
        return self.weight * total_variation(out) / out.numel()


class SURE(Term):
    """The penalty of Stein's unbiased risk estimate (Stein 1981).

    2σ²/N · div_y T_θ(y) − σ², so that the data term plus this term estimates mean((T_θ(y) − x)²)
    without x. The divergence is estimated by Monte Carlo (Ramani et al. 2008), with a second pass
    through the network on the measurement plus a small perturbation. Under autocast both passes are
    repeated in float32, because bfloat16 would round the difference away. It is valid for Gaussian
    noise of known σ; where values were clipped, it is exact only if `out` equals x there. A
    must be the identity, and the network's input the measurement without noise (`MeasurementNet`,
    input_noise_std=0). It is unbiased for a fixed network; one fitted to the same y can reach a
    negative divergence, and then a loss below 0, which no squared error has.

    Raises:
        ValueError: At `check`, the noise, operator or network input is another.
    """

    def check(self, model: Restoration) -> None:
        problem = model.problem
        assert problem is not None
        if not isinstance(problem.operator, Identity):
            raise ValueError(
                "SURE is for denoising: expected the Identity operator, got "
                f"{type(problem.operator).__name__}; use another method such as methods/deepred"
            )
        if not isinstance(problem.noise, GaussianNoise):
            got = "none" if problem.noise is None else type(problem.noise).__name__
            raise ValueError(
                f"SURE needs the sigma of Gaussian noise: expected GaussianNoise, got {got}; set "
                "noise, or use another method such as methods/deepred"
            )
        if isinstance(problem.noise.sigma, Sequence):
            raise ValueError(
                f"SURE needs one sigma for all channels, got {problem.noise.sigma}; set "
                "data.noise.sigma to a number, or use another method such as methods/deepred"
            )
        if model.fidelity != "likelihood":
            raise ValueError(
                "SURE estimates the error from the likelihood: expected fidelity='likelihood', got "
                f"{model.fidelity!r}; set it"
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
        moved = torch.randn(
            out.shape, generator=model.generator("SURE"), dtype=out.dtype, device=out.device
        )
        step = PERTURBATION * variance.sqrt()
        rounded = torch.is_autocast_enabled(out.device.type)
        with torch.autocast(out.device.type, enabled=False):
            here = model.network(model.z) if rounded else out
            change = model.network(model.z + step * moved) - here
        free = ~model.problem.clipped()  # by Stein's identity for the clipped measurement
        return 2 * variance * (moved * change * free).mean() / step - variance
