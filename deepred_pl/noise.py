"""Noise models: how a measurement is corrupted, and the data term that follows from it.

Data terms are in squared-error units, D = 2σ̄² · (−log p(y | A x)) / N up to a constant,
with σ̄² the model's mean variance and N the number of observed values. For Gaussian noise
this is the mean squared residual, and λ and μ mean the same for every model.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from skimage.restoration import estimate_sigma
from torch import Tensor, nn

LEAST_ESTIMATE = 0.1  # grey levels; rounding to 8 bits alone is 0.29


class NoiseModel(nn.Module, ABC):
    """The distribution of y given A x."""

    @abstractmethod
    def sample(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """A measurement drawn around `clean` = A x, of its shape, not clipped."""

    @abstractmethod
    def data_term(self, prediction: Tensor, y: Tensor) -> Tensor:
        """D(prediction, y) in squared-error units, 0-dim; `prediction` is A T_θ(z)."""

    @abstractmethod
    def variance(self) -> float:
        """Mean variance σ̄² on the scale of images in [0, 1]."""

    def fitted(self, y: Tensor) -> "NoiseModel":
        """The model with everything it left open estimated from the measurement y."""
        return self


class GaussianNoise(NoiseModel):
    """White Gaussian noise, y = A x + N(0, σ²).

    Args:
        sigma: Standard deviation in grey levels of an 8-bit image, in (0, 255]; None
            estimates it from the measurement (median absolute deviation of its wavelet
            details: Donoho & Johnstone 1994, by scikit-image).

    Raises:
        ValueError: sigma outside (0, 255].
    """

    def __init__(self, sigma: float | None = 25.0) -> None:
        super().__init__()
        if sigma is not None and not 0 < sigma <= 255:
            raise ValueError(
                f"noise sigma must be in (0, 255] grey levels, got {sigma}; "
                "give 25 for 25/255, or null (None) to estimate it from the measurement"
            )
        self.sigma = sigma

    def sample(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        if self.sigma is None:
            raise ValueError(
                "noise sigma must be a number to simulate a measurement, got null (None); "
                "give noise.sigma, or give a measurement"
            )
        return clean + self.sigma / 255 * torch.randn(clean.shape, generator=generator)

    def data_term(self, prediction: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(prediction, y)

    def variance(self) -> float:
        if self.sigma is None:
            raise ValueError("noise sigma is not known yet; an InverseProblem estimates it from y")
        return (self.sigma / 255) ** 2

    def fitted(self, y: Tensor) -> "GaussianNoise":
        if self.sigma is not None:
            return self
        image = y[0].detach().cpu().movedim(0, -1).numpy()  # (C, H, W) -> (H, W, C)
        sigma = 255 * float(estimate_sigma(image, channel_axis=-1, average_sigmas=True))
        if not sigma >= LEAST_ESTIMATE:
            raise ValueError(
                f"expected noise in the measurement, but its sigma was estimated as {sigma:.3f}; "
                "give noise.sigma in grey levels"
            )
        return GaussianNoise(sigma)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:.2f}" if self.sigma is not None else "sigma=None"
