"""Non-local means."""

from functools import partial

import numpy as np
from skimage.restoration import denoise_nl_means
from torch import Tensor

from deepred_pl.denoisers.denoiser import Denoiser, each_channel, grey_levels, through_numpy


class NonLocalMeans(Denoiser):
    """Non-local means on each channel (Buades et al. 2005), by scikit-image.

    The denoiser of the paper's denoising and deblurring; its cut-off distance is h = 0.6 σ in
    fast mode and 0.8 σ in slow mode.

    Args:
        sigma: Noise level it is told, in grey levels of an 8-bit image, in (0, 255].
        patch_size: Side of the patches compared, in pixels.
        patch_distance: How far patches are searched for, in pixels.
        fast: Weigh all pixels of a patch alike, by integral images.

    Raises:
        ValueError: sigma outside (0, 255], or a size below 1.

    >>> import torch
    >>> NonLocalMeans(sigma=3)(torch.rand(1, 3, 33, 47)).shape
    torch.Size([1, 3, 33, 47])
    """

    def __init__(
        self, sigma: float = 3.0, patch_size: int = 5, patch_distance: int = 6, fast: bool = True
    ) -> None:
        if min(patch_size, patch_distance) < 1:
            raise ValueError(
                f"patch_size and patch_distance must be at least 1, got {patch_size} and "
                f"{patch_distance}"
            )
        level = grey_levels(sigma)
        self.sigma = sigma
        self._denoise_channel = partial(
            denoise_nl_means,
            patch_size=patch_size,
            patch_distance=patch_distance,
            h=(0.6 if fast else 0.8) * level,
            fast_mode=fast,
            sigma=level,
        )

    def __call__(self, x: Tensor) -> Tensor:
        return through_numpy(self._denoise, x)

    def _denoise(self, image: np.ndarray) -> np.ndarray:
        return each_channel(self._denoise_channel, image)
