"""Classical denoisers by scikit-image."""

from functools import partial

import numpy as np
from skimage.filters import median
from skimage.restoration import denoise_bilateral, denoise_wavelet
from torch import Tensor

from deepred_pl.checks import check_positive
from deepred_pl.denoisers.denoiser import (
    Denoiser,
    GreyLevelDenoiser,
    each_channel,
    through_numpy,
)


class Wavelet(GreyLevelDenoiser):
    """Wavelet shrinkage (BayesShrink, Chang et al. 2000) of each channel, by scikit-image.

    Args:
        sigma: Assumed noise level in grey levels of an 8-bit image, in (0, 255].

    Raises:
        ValueError: sigma outside (0, 255].
    """

    def __init__(self, sigma: float = 3.0) -> None:
        super().__init__(sigma)

    def __call__(self, x: Tensor) -> Tensor:
        denoise = partial(denoise_wavelet, sigma=self.level, rescale_sigma=True)
        return through_numpy(partial(each_channel, denoise), x)


class Median(Denoiser):
    """The median of each value's neighbourhood, by scikit-image.

    Args:
        size: Side of the square neighbourhood in pixels, odd, at least 3.

    Raises:
        ValueError: size even or below 3.
    """

    def __init__(self, size: int = 3) -> None:
        if size < 3 or size % 2 == 0:
            raise ValueError(f"size must be an odd number of pixels, at least 3, got {size}")
        self.size = size

    def __call__(self, x: Tensor) -> Tensor:
        denoise = partial(median, footprint=np.ones((self.size, self.size)))
        return through_numpy(partial(each_channel, denoise), x)


class Bilateral(GreyLevelDenoiser):
    """The bilateral filter on all channels together (Tomasi & Manduchi 1998), by scikit-image.

    Args:
        sigma: Standard deviation of the weights over differences of values, in grey levels of an
            8-bit image, in (0, 255]; a few times the noise level.
        width: Standard deviation of the spatial weights in pixels, > 0.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, sigma: float = 9.0, width: float = 1.5) -> None:
        check_positive("width", width)
        super().__init__(sigma)
        self.width = width

    def __call__(self, x: Tensor) -> Tensor:
        return through_numpy(self._denoise, x)

    def _denoise(self, image: np.ndarray) -> np.ndarray:
        # Its default border is black, which would darken the image's border.
        denoise = partial(
            denoise_bilateral,
            sigma_color=self.level,
            sigma_spatial=self.width,
            mode="symmetric",
        )
        if image.shape[-1] == 3:
            return denoise(image, channel_axis=-1)
        return each_channel(denoise, image)  # it supports only grey and RGB
