"""Classical denoisers, a few lines each."""

from functools import partial

import numpy as np
from skimage.filters import median
from skimage.restoration import denoise_bilateral, denoise_wavelet
from torch import Tensor

from deepred_pl.denoisers.denoiser import Denoiser, each_channel, grey_levels, through_numpy


class Wavelet(Denoiser):
    """Wavelet shrinkage (BayesShrink, Chang et al. 2000), by scikit-image.

    Each channel by itself, so that any number of channels works.

    Args:
        sigma: Noise level it is told, in grey levels of an 8-bit image, in (0, 255].

    Raises:
        ValueError: sigma outside (0, 255].
    """

    def __init__(self, sigma: float = 3.0) -> None:
        self.sigma = sigma
        self._denoise = partial(denoise_wavelet, sigma=grey_levels(sigma), rescale_sigma=True)

    def __call__(self, x: Tensor) -> Tensor:
        return through_numpy(partial(each_channel, self._denoise), x)


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
        self._denoise = partial(median, footprint=np.ones((size, size)))

    def __call__(self, x: Tensor) -> Tensor:
        return through_numpy(partial(each_channel, self._denoise), x)


class Bilateral(Denoiser):
    """The bilateral filter on all channels together (Tomasi & Manduchi 1998), by scikit-image.

    Args:
        sigma: How different values may be to be averaged, in grey levels of an 8-bit image, in
            (0, 255]; a few times the noise level.
        width: Standard deviation of the spatial weights in pixels, > 0.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, sigma: float = 9.0, width: float = 1.5) -> None:
        if not width > 0:
            raise ValueError(f"width must be > 0 pixels, got {width}")
        self.sigma = sigma
        self.width = width
        self._level = grey_levels(sigma)

    def __call__(self, x: Tensor) -> Tensor:
        return through_numpy(self._denoise, x)

    def _denoise(self, image: np.ndarray) -> np.ndarray:
        # Its default border is black, which darkens the image's own.
        denoise = partial(
            denoise_bilateral,
            sigma_color=self._level,
            sigma_spatial=self.width,
            mode="symmetric",
        )
        if image.shape[-1] == 3:
            return denoise(image, channel_axis=-1)
        return each_channel(denoise, image)  # it knows grey and RGB alone
