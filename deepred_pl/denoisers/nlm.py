"""Non-local means."""

import math
from functools import partial
from typing import Literal

import numpy as np
import torch
from skimage.restoration import denoise_nl_means
from torch import Tensor

from deepred_pl.denoisers.denoiser import Denoiser, each_channel, grey_levels, through_numpy

FARTHEST = 5.0  # scikit-image drops patches beyond this squared distance in units of h²
# Values of a strip of the image with all its shifts along one row: on a CPU they stay in its cache,
# on a GPU few calls matter more.
AT_ONCE = {"cpu": 2**20, "cuda": 2**24}


class NonLocalMeans(Denoiser):
    """Non-local means on each channel (Buades et al. 2005).

    The denoiser of the paper's denoising and deblurring; its cut-off distance is h = 0.6 σ in
    fast mode and 0.8 σ in slow mode.

    Args:
        sigma: Noise level it is told, in grey levels of an 8-bit image, in (0, 255].
        patch_size: Side of the patches compared, in pixels; even ones count as the next odd one.
        patch_distance: How far patches are searched for, in pixels.
        fast: Weigh all pixels of a patch alike, by integral images.
        backend: "skimage", on the CPU; "torch", the same on the image's own device, in fast mode;
            "auto": torch for images on a GPU in fast mode, otherwise skimage, which is faster on a
            CPU.

    Raises:
        ValueError: sigma outside (0, 255], a size below 1, or an unknown or impossible backend.

    >>> import torch
    >>> NonLocalMeans(sigma=3)(torch.rand(1, 3, 33, 47)).shape
    torch.Size([1, 3, 33, 47])
    """

    def __init__(
        self,
        sigma: float = 3.0,
        patch_size: int = 5,
        patch_distance: int = 6,
        fast: bool = True,
        backend: Literal["auto", "skimage", "torch"] = "auto",
    ) -> None:
        if min(patch_size, patch_distance) < 1:
            raise ValueError(
                f"patch_size and patch_distance must be at least 1, got {patch_size} and "
                f"{patch_distance}"
            )
        if backend not in ("auto", "skimage", "torch"):
            raise ValueError(f"backend must be 'auto', 'skimage' or 'torch', got {backend!r}")
        if backend == "torch" and not fast:
            raise ValueError("backend='torch' is the fast mode alone; give fast=True, or 'skimage'")
        level = grey_levels(sigma)
        h = (0.6 if fast else 0.8) * level
        self.sigma = sigma
        self.fast = fast
        self.backend = backend
        self._denoise_channel = partial(
            denoise_nl_means,
            patch_size=patch_size,
            patch_distance=patch_distance,
            h=h,
            sigma=level,
            fast_mode=fast,
        )
        self._denoise_tensor = partial(
            nl_means, patch_size=patch_size, patch_distance=patch_distance, h=h, sigma=level
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self.backend == "torch" or (self.backend == "auto" and self.fast and x.is_cuda):
            return self._denoise_tensor(x)
        return through_numpy(self._denoise, x)

    def _denoise(self, image: np.ndarray) -> np.ndarray:
        return each_channel(self._denoise_channel, image)


@torch.no_grad()
def nl_means(x: Tensor, patch_size: int, patch_distance: int, h: float, sigma: float) -> Tensor:
    """Non-local means of each channel, as scikit-image's fast mode computes it, in torch.

    A pixel becomes the mean of the pixels around it, weighed by exp(−d²/h²), and by 0 where d² is
    beyond `FARTHEST` h². d² is the sum of the squared differences of their patches, less 2σ² for
    each, over the number of pixels in a patch; as there, the patch's first row and column are left
    out of the sum and not of the number. The image goes on as its reflection. All shifts along one
    row are taken at once, in strips, so that the memory does not grow with the image's height.

    Args:
        x: (1, C, H, W), on any device.
        patch_size: Side of the patches, in pixels.
        patch_distance: Reach of the search, in pixels.
        h: Cut-off distance, on x's scale.
        sigma: Standard deviation of the noise, on x's scale.
    """
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"expected one image (1, C, H, W), got {tuple(x.shape)}")
    channels, height, width = x.shape[1:]
    half, shifts = patch_size // 2, 2 * patch_distance + 1
    area = (2 * half + 1) ** 2
    padded = _reflected(_reflected(x[0], 1, half + patch_distance), 2, half + patch_distance)
    at_once = AT_ONCE.get(x.device.type, 2**22)
    strip = max(1, at_once // (shifts * channels * width))
    denoised = torch.empty_like(x[0])
    for top in range(0, height, strip):
        rows = min(strip, height - top)
        weighted, total = x.new_zeros(2, channels, rows, width)
        here = _part(
            padded, top + patch_distance, patch_distance, rows + 2 * half, width + 2 * half
        )
        for shift in range(shifts):
            # (C, rows, shifts, W) with a margin of half a patch, as a view of the padded image
            there = _part(padded, top + shift, 0, rows + 2 * half, padded.shape[2])
            there = there.unfold(2, width + 2 * half, 1)
            distance = (here[:, :, None] - there).square_().sub_(2 * sigma**2)
            distance = _sums(_sums(distance, 1, 2 * half)[:, 1:], 3, 2 * half)[..., 1:]
            weight = _exponential(distance.clamp_(min=0).div_(area * h**2))
            weighted += (weight * there[:, half : half + rows, :, half : half + width]).sum(dim=2)
            total += weight.sum(dim=2)
        denoised[:, top : top + rows] = weighted / total  # a pixel's own weight is never 0
    return denoised[None]


def _part(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    return image[:, top : top + height, left : left + width]


def _sums(x: Tensor, dim: int, count: int) -> Tensor:
    """The sums of `count` neighbours along an axis; zeros where `count` is 0."""
    places = x.shape[dim] - count + 1
    if count == 0:
        return x.new_zeros(()).expand(*x.shape[:dim], places, *x.shape[dim + 1 :]).clone()
    total = x.narrow(dim, 0, places).clone()
    for i in range(1, count):
        total += x.narrow(dim, i, places)
    return total


def _exponential(distance: Tensor) -> Tensor:
    """exp(−distance), 0 beyond `FARTHEST`, with scikit-image's approximation.

    Between powers of two it is linear, shifted for the least squared error (Schraudolph 1999, A
    Fast, Compact Approximation of the Exponential Function); up to 4 % off.
    """
    power = distance.mul(-1 / math.log(2)).sub_(60801 / 2**20)
    whole = power.floor()
    weight = torch.exp2(whole).mul_(power.sub_(whole).add_(1))
    return weight.masked_fill_(distance > FARTHEST, 0)


def _reflected(x: Tensor, dim: int, by: int) -> Tensor:
    """x continued on both sides by its reflection, as often as it takes."""
    size = x.shape[dim]
    period = max(1, 2 * (size - 1))
    index = torch.arange(-by, size + by, device=x.device).remainder(period)
    return x.index_select(dim, torch.minimum(index, period - index))
