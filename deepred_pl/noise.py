"""Noise models: how a measurement is corrupted, and the data term that follows.

Data terms are in squared-error units, D = 2σ̄² · (−log p(y | A x)) / N up to a constant,
with σ̄² the noise's mean variance and N the number of observed values. For Gaussian noise that was
not clipped this is the mean squared residual, so that λ and μ have the same scale for every model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deepred_pl.checks import as_plain, check_grey_levels, check_positive
from deepred_pl.estimate import noise_level, unclipped

LEAST_ESTIMATE, ROUNDING = 0.1, 0.3  # grey levels; rounding to 8 bits has 0.29
# How parameters of noise models depend on its standard deviation: as this power of it.
POWERS = {"sigma": 1, "gain": 2, "peak": -2, "looks": -2}
ALIKE = 1.3  # channels whose noise levels differ by less get their mean

# The likelihoods of photon counts and speckle are infinite at 0. Below these values, a tenth of a
# photon and far below any grey level, they are continued by their tangents, for finite gradients.
LEAST_PHOTONS = 0.1
LEAST_SPECKLE = 1e-4


class NoiseModel(nn.Module, ABC):
    """The distribution of y given A x.

    A model defines how to draw y, its negative log-likelihood and its variance, from which the data
    term follows.

    Attributes:
        from_zero: Whether 0 must mean no light, so that an offset would change the noise.
        has_outliers: Whether squared residuals are unsuitable, because few values dominate them.
    """

    from_zero: ClassVar[bool] = False
    has_outliers: ClassVar[bool] = False

    @abstractmethod
    def sample(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a measurement given `clean` = A x, of its shape, not clipped."""

    @abstractmethod
    def negative_log_likelihood(self, prediction: Tensor, y: Tensor) -> Tensor:
        """−log p(y | A x) for every value, up to a constant of y; `prediction` is A x."""

    @abstractmethod
    def variance(self, clean: Tensor) -> Tensor:
        """The variance of y given A x = `clean`, on the [0, 1] scale.

        Per value, 0-dim if it is the same everywhere, or (1, C, 1, 1) if it depends on the channel.
        """

    def mean_variance(self, y: Tensor, observed: Tensor | None = None) -> Tensor:
        """σ̄², the mean variance of the observed values estimated from y, 0-dim."""
        return mean_over(self.variance(y), observed)  # unbiased if it is linear in A x

    def data_term(
        self, prediction: Tensor, y: Tensor, mean_variance: Tensor, observed: Tensor | None = None
    ) -> Tensor:
        """D(prediction, y) in squared-error units, 0-dim, over the observed values.

        Args:
            prediction: A x, of y's shape.
            y: The measurement, with clipped values completed (`InverseProblem.completed`).
            mean_variance: σ̄², 0-dim.
            observed: 1 where y was observed and 0 elsewhere; None means everywhere.
        """
        return 2 * mean_variance * mean_over(self.negative_log_likelihood(prediction, y), observed)

    def fitted(self, y: Tensor, observed: Tensor | None = None) -> "NoiseModel":
        """The model with its open parameters estimated from the observed values of y.

        Raises:
            ValueError: y is impossible under the model.
        """
        return self


def mean_over(values: Tensor, observed: Tensor | None) -> Tensor:
    """Mean of the values where `observed` (1 or 0, broadcastable) is 1; None means all values."""
    if observed is None:
        return values.mean()
    return (values * observed).mean() / observed.mean()


class GaussianNoise(NoiseModel):
    """White Gaussian noise, y = A x + N(0, σ²).

    Args:
        sigma: Standard deviation in grey levels of an 8-bit image, in (0, 255], or one for each
            channel; None estimates it from the measurement (`estimate.noise_level`), for each
            channel if they differ by more than 30 %.

    Raises:
        ValueError: sigma outside (0, 255], or, at `fitted`, another number of them than channels.
    """

    _variances: Tensor | None

    def __init__(self, sigma: float | Sequence[float] | None = 25.0) -> None:
        super().__init__()
        sigma = as_plain(sigma)
        for one in sigma if isinstance(sigma, Sequence) else () if sigma is None else (sigma,):
            check_grey_levels("noise sigma", one, "25 means 25/255, null (None) estimates it")
        self.sigma = sigma
        several = None
        if isinstance(sigma, Sequence):
            several = (torch.tensor(sigma).float() / 255).square().view(1, -1, 1, 1)
        self.register_buffer("_variances", several, persistent=False)

    def sample(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        if self.sigma is None:
            raise ValueError(
                "noise sigma must be a number to simulate a measurement, got null (None); "
                "set data.noise.sigma, or give a measurement"
            )
        noise = torch.randn(clean.shape, generator=generator)
        return clean + self.variance(clean).sqrt() * noise

    def negative_log_likelihood(self, prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction - y).square() / (2 * self.variance(prediction))

    def variance(self, clean: Tensor) -> Tensor:
        """0-dim, or (1, C, 1, 1) if sigma is one for each channel."""
        if self.sigma is None:
            raise ValueError("noise sigma is unknown; an InverseProblem estimates it from y")
        if self._variances is not None:
            return self._variances
        assert not isinstance(self.sigma, Sequence)
        return clean.new_full((), (self.sigma / 255) ** 2)

    def fitted(self, y: Tensor, observed: Tensor | None = None) -> "GaussianNoise":
        if isinstance(self.sigma, Sequence) and len(self.sigma) != y.shape[1]:
            raise ValueError(
                f"noise sigma must be one number or {y.shape[1]}, one for each channel, got "
                f"{len(self.sigma)}"
            )
        if self.sigma is not None:
            return self
        valid = unclipped(y) if observed is None else unclipped(y) & observed.bool()
        return GaussianNoise(sigma_of(noise_level(y.detach(), valid)))

    def extra_repr(self) -> str:
        if isinstance(self.sigma, Sequence):
            return f"sigma=[{', '.join(f'{sigma:.2f}' for sigma in self.sigma)}]"
        return f"sigma={self.sigma:.2f}" if self.sigma is not None else "sigma=None"


def sigma_of(levels: Tensor) -> float | list[float]:
    """σ in grey levels, one for all channels if they differ by less than 30 %.

    Args:
        levels: The noise's standard deviation in each channel on the [0, 1] scale, (C,); NaN where
            it is not known.

    Raises:
        ValueError: It is not known in any channel, or there is no noise.
    """
    sigmas = [255 * float(level) for level in levels]
    if all(math.isnan(sigma) for sigma in sigmas):
        raise ValueError(
            "too few known values to estimate the noise, which takes 3×3 values that are neither "
            "clipped nor missing; set data.noise.sigma"
        )
    known = [sigma for sigma in sigmas if sigma >= LEAST_ESTIMATE]
    if not known:
        most = max(sigma for sigma in sigmas if not math.isnan(sigma))
        raise ValueError(
            f"expected noise in the measurement, but its sigma was estimated as {most:.3f} grey "
            "levels; set data.noise.sigma"
        )
    # A channel whose noise is not seen, as a constant one, has the least of the others.
    sigmas = [sigma if sigma >= LEAST_ESTIMATE else min(known) for sigma in sigmas]
    alike = max(sigmas) <= ALIKE * min(sigmas)
    return sum(sigmas) / len(sigmas) if alike else sigmas


class LaplaceNoise(NoiseModel):
    """Additive noise with heavy tails, density exp(−|n| / b) / 2b, b = σ / √2.

    Args:
        sigma: Standard deviation in grey levels of an 8-bit image, in (0, 255].

    Raises:
        ValueError: sigma outside (0, 255].
    """

    has_outliers = True

    def __init__(self, sigma: float = 25.0) -> None:
        super().__init__()
        self.sigma = sigma = as_plain(sigma)
        check_grey_levels("noise sigma", sigma, "25 means 25/255")

    @property
    def _scale(self) -> float:
        return self.sigma / 255 / math.sqrt(2)

    def sample(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        size = torch.empty_like(clean).exponential_(1 / self._scale, generator=generator)
        sign = torch.randint(0, 2, clean.shape, generator=generator) * 2 - 1
        return clean + sign * size

    def negative_log_likelihood(self, prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction - y).abs() / self._scale

    def variance(self, clean: Tensor) -> Tensor:
        return clean.new_full((), 2 * self._scale**2)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:.2f}"


class PoissonNoise(NoiseModel):
    """Photon counts, y = Poisson(peak · A x) / peak.

    Args:
        peak: Photons counted at white (A x = 1), > 0.

    Raises:
        ValueError: peak is not positive; at `fitted`, y has negative values or is all 0.
    """

    from_zero = True

    def __init__(self, peak: float = 30.0) -> None:
        super().__init__()
        self.peak = peak = as_plain(peak)
        check_positive("peak", peak, "30 means 30 photons at white")

    def sample(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(self.peak * clean.clamp(min=0), generator=generator) / self.peak

    def negative_log_likelihood(self, prediction: Tensor, y: Tensor) -> Tensor:
        return _unlikely_counts(self.peak * prediction, self.peak * y)

    def variance(self, clean: Tensor) -> Tensor:
        return clean / self.peak

    def fitted(self, y: Tensor, observed: Tensor | None = None) -> "PoissonNoise":
        _check_light(y, "photon counts (PoissonNoise)", "PoissonGaussianNoise")
        return self

    def extra_repr(self) -> str:
        return f"peak={self.peak:g}"


class PoissonGaussianNoise(NoiseModel):
    """Photon counts and read noise of a camera, y = gain · Poisson(A x / gain) + N(0, σ²).

    The likelihood is that of a shifted Poisson variable with the same mean and variance:
    (y + σ² / gain) / gain counts as photons (Snyder et al. 1993).

    Args:
        gain: Grey levels of an 8-bit image per photon, > 0: 255 / peak.
        sigma: Standard deviation of the read noise in grey levels of an 8-bit image, in (0, 255].

    Raises:
        ValueError: gain is not positive, or sigma outside (0, 255].
    """

    from_zero = True

    def __init__(self, gain: float = 2.0, sigma: float = 5.0) -> None:
        super().__init__()
        self.gain, self.sigma = gain, sigma = as_plain(gain), as_plain(sigma)
        check_positive("gain", gain, "2 means 2 grey levels per photon")
        check_grey_levels("noise sigma", sigma, "use PoissonNoise if there is no read noise")

    @property
    def _shift(self) -> float:
        return self.sigma**2 / self.gain / 255

    def sample(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        photons = torch.poisson(clean.clamp(min=0) * 255 / self.gain, generator=generator)
        read_noise = self.sigma * torch.randn(clean.shape, generator=generator)
        return (self.gain * photons + read_noise) / 255

    def negative_log_likelihood(self, prediction: Tensor, y: Tensor) -> Tensor:
        photons = 255 / self.gain
        counts = photons * (y + self._shift).clamp(min=0)
        return _unlikely_counts(photons * (prediction + self._shift), counts)

    def variance(self, clean: Tensor) -> Tensor:
        return self.gain * clean / 255 + (self.sigma / 255) ** 2

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}, sigma={self.sigma:.2f}"


class GammaNoise(NoiseModel):
    """Speckle, y = A x · g with g Gamma-distributed of mean 1 and variance 1 / looks.

    Args:
        looks: Number of independent looks that were averaged, > 0.

    Raises:
        ValueError: looks is not positive; at `fitted`, y has negative values or is all 0.
    """

    from_zero = True

    def __init__(self, looks: float = 10.0) -> None:
        super().__init__()
        self.looks = looks = as_plain(looks)
        check_positive("looks", looks)

    def sample(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        # Torch does not draw Gamma variables from a generator.
        seed = int(torch.randint(2**62, (1,), generator=generator))
        speckle = np.random.default_rng(seed).gamma(self.looks, 1 / self.looks, clean.shape)
        return clean * torch.from_numpy(speckle).to(clean)

    def negative_log_likelihood(self, prediction: Tensor, y: Tensor) -> Tensor:
        lit = prediction.clamp(min=LEAST_SPECKLE)
        beyond = (prediction - lit) / lit  # 0 unless it is darker
        return self.looks * (lit.log() + beyond + y / lit * (1 - beyond))

    def variance(self, clean: Tensor) -> Tensor:
        return clean.square() / self.looks

    def mean_variance(self, y: Tensor, observed: Tensor | None = None) -> Tensor:
        # E[y²] = (A x)² (1 + 1 / looks)
        return super().mean_variance(y, observed) * self.looks / (self.looks + 1)

    def fitted(self, y: Tensor, observed: Tensor | None = None) -> "GammaNoise":
        _check_light(y, "speckle (GammaNoise)", "GaussianNoise")
        return self

    def extra_repr(self) -> str:
        return f"looks={self.looks:g}"


def parameters(noise: NoiseModel) -> dict[str, Any]:
    """The parameters of a noise model on which its strength depends, as plain data."""
    found = {name: getattr(noise, name, None) for name in POWERS}
    return {name: value for name, value in found.items() if value is not None}


def corrected(parameters: Mapping[str, Any], factor: float) -> str:
    """The settings for noise whose standard deviation is `factor` times as large."""
    new = {
        name: value * factor ** POWERS[name]
        for name, value in parameters.items()
        if isinstance(value, int | float)
    }
    if "sigma" in new:
        new["sigma"] = max(new["sigma"], ROUNDING)
    if new.get("sigma", 0) > 255:
        return "data.intensity_range to a wider [lo, hi], because sigma would be above 255"
    settings = [f"data.noise.{name} to {value:.3g}" for name, value in new.items()]
    return " and ".join(settings) or "data.noise.sigma to null, which estimates it"


def _unlikely_counts(expected: Tensor, counts: Tensor) -> Tensor:
    """−log p of Poisson counts with mean `expected`, up to a constant."""
    lit = expected.clamp(min=LEAST_PHOTONS)
    return expected - counts * (lit.log() + (expected - lit) / lit)


def _check_light(y: Tensor, what: str, instead: str) -> None:
    if not y.any():
        raise ValueError(f"expected {what}, but every value is 0; check the file and its range")
    if y.min() < 0:
        raise ValueError(
            f"{what} are never negative, got {float(y.min()):.3g} in the measurement; do not "
            f"subtract a dark level, or use {instead}"
        )
