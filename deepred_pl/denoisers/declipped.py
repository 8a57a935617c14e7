"""Denoising of measurements whose noise was clipped."""

import math

import numpy as np
import torch
from torch import Tensor

from deepred_pl.denoisers.denoiser import Denoiser, GreyLevelDenoiser, through_numpy

LEVELS = 4001  # of the tabulated means


class Declipped(Denoiser):
    """A denoiser followed by the inverse of the bias of clipping (Foi 2009, Signal Processing 89).

    If Gaussian noise was clipped to [0, 1], the mean of a black area is brighter than black and
    that of a white area darker than white, and denoisers find these means. This is for
    measurements that are denoised once, as by `paper/denoising/bm3d_declipped`; the data term of a
    fit takes clipping into account itself.

    Args:
        denoiser: The denoiser of the measurement. Its sigma must be that of the noise before
            clipping, as it is for BM3D and Wavelet.

    Raises:
        ValueError: The denoiser has no sigma.
    """

    def __init__(self, denoiser: GreyLevelDenoiser) -> None:
        if not isinstance(denoiser, GreyLevelDenoiser) or denoiser.sigma is None:
            raise ValueError(
                "Declipped needs the noise level: expected a denoiser with a sigma such as BM3D, "
                f"got {type(denoiser).__name__} without one; use that without Declipped"
            )
        self.denoiser = denoiser

    @property
    def sigma(self) -> float | None:
        """The noise level in grey levels of an 8-bit image."""
        return self.denoiser.sigma

    @sigma.setter
    def sigma(self, sigma: float) -> None:
        self.denoiser.sigma = sigma

    def __call__(self, x: Tensor) -> Tensor:
        return through_numpy(self._inverse, self.denoiser(x))

    def check(self, x: Tensor) -> None:
        """Refuse images that the denoiser refuses."""
        self.denoiser.check(x)

    def _inverse(self, image: np.ndarray) -> np.ndarray:
        clean = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
        means = self._light(clean) - self._light(clean - 1)  # of clip(clean + n, 0, 1)
        return np.interp(image, means.numpy(), clean.numpy())

    def _light(self, clean: Tensor) -> Tensor:
        """E[max(clean + n, 0)], n ~ N(0, sigma²)."""
        t = clean / self.denoiser.level
        density = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
        return clean * torch.special.ndtr(t) + self.denoiser.level * density
