"""Non-local means."""

import math
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import torch
from skimage.restoration import denoise_nl_means
from torch import Tensor

from deepred_pl.checks import RestorationWarning, check_at_least, check_choice
from deepred_pl.denoisers.denoiser import GreyLevelDenoiser, each_channel, through_numpy

Backend = Literal["auto", "skimage", "torch"]

LEAST_SQUARES = 60801 / 2**20  # shift of the approximate exponential, in `_exponential`
FARTHEST = 5.0  # scikit-image drops patches beyond this squared distance in units of h²
# Values of a strip of the image with all its shifts along one row: small enough for a CPU's cache;
# on a GPU, few calls matter more.
AT_ONCE = {"cpu": 2**20, "cuda": 2**24}


class NonLocalMeans(GreyLevelDenoiser):
    """Non-local means of each channel (Buades et al. 2005).

    The denoiser of the paper's denoising and deblurring; the cut-off distance is h = 0.6 σ in fast
    mode and 0.8 σ in slow mode.

    Args:
        sigma: Assumed noise level in grey levels of an 8-bit image, in (0, 255].
        patch_size: Side of the patches compared, in pixels; even sizes count as the next odd one.
        patch_distance: Search distance for patches, in pixels.
        fast: Weight all pixels of a patch equally, with integral images.
        backend: "skimage", on the CPU; "torch", the same on the image's device, in fast mode;
            "auto": for images on a GPU in fast mode one Triton kernel, or torch if that does not
            run, otherwise skimage, which is faster on a CPU.

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
        backend: Backend = "auto",
    ) -> None:
        super().__init__(sigma)
        check_at_least(1, patch_size=patch_size, patch_distance=patch_distance)
        check_choice("backend", backend, Backend)
        if backend == "torch" and not fast:
            raise ValueError("backend='torch' has only the fast mode; set fast=True, or 'skimage'")
        self.patch_size = patch_size
        self.patch_distance = patch_distance
        self.fast = fast
        self.backend = backend

    def __call__(self, x: Tensor) -> Tensor:
        size, reach = self.patch_size, self.patch_distance
        h = (0.6 if self.fast else 0.8) * self.level
        if self.backend == "torch":
            return nl_means(x, size, reach, h, self.level)
        if self.backend == "auto" and self.fast and x.is_cuda:
            return _on_gpu()(x, size, reach, h, self.level)
        denoise = partial(
            denoise_nl_means,
            patch_size=size,
            patch_distance=reach,
            h=h,
            sigma=self.level,
            fast_mode=self.fast,
        )
        return through_numpy(partial(each_channel, denoise), x)


@cache
def _on_gpu() -> Callable[[Tensor, int, int, float, float], Tensor]:
    """`nl_means` as a Triton kernel, or in torch where that does not run."""
    try:
        from deepred_pl.denoisers import nlm_triton

        nlm_triton.nl_means(torch.zeros(1, 1, 8, 8, device="cuda"), 3, 1, 0.1, 0.1)
    except Exception as error:  # no Triton, no C compiler, an old GPU
        warnings.warn(
            f"NonLocalMeans runs in torch, several times slower than its Triton kernel: {error}",
            RestorationWarning,
            stacklevel=2,
        )
        return nl_means
    return nlm_triton.nl_means


@torch.no_grad()
def nl_means(x: Tensor, patch_size: int, patch_distance: int, h: float, sigma: float) -> Tensor:
    """Non-local means of each channel in torch, equal to scikit-image's fast mode.

    A pixel becomes the mean of the pixels around it, weighted by exp(−d²/h²), or by 0 where d²
    exceeds `FARTHEST` h². d² is the sum of the squared differences of their patches, less 2σ² each,
    divided by the number of pixels in a patch; as in scikit-image, the patch's first row and column
    are left out of the sum but not of the number. The image is reflected at its borders. All shifts
    along one row are computed at once, in strips, so that memory does not grow with the height.

    Args:
        x: (1, C, H, W), on any device.
        patch_size: Side of the patches, in pixels.
        patch_distance: Search distance, in pixels.
        h: Cut-off distance, on x's scale.
        sigma: Standard deviation of the noise, on x's scale.
    """
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"expected one image (1, C, H, W), got {tuple(x.shape)}")
    channels, height, width = x.shape[1:]
    half, shifts = patch_size // 2, 2 * patch_distance + 1
    area = (2 * half + 1) ** 2
    padded = reflected(reflected(x[0], 1, half + patch_distance), 2, half + patch_distance)
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
    """The sums of `count` neighbours along an axis; zeros if `count` is 0."""
    places = x.shape[dim] - count + 1
    if count == 0:
        return x.new_zeros(()).expand(*x.shape[:dim], places, *x.shape[dim + 1 :]).clone()
    total = x.narrow(dim, 0, places).clone()
    for i in range(1, count):
        total += x.narrow(dim, i, places)
    return total


def _exponential(distance: Tensor) -> Tensor:
    """exp(−distance), 0 beyond `FARTHEST`, with scikit-image's approximation.

    It is linear between powers of two, shifted for the least squared error (Schraudolph 1999, A
    Fast, Compact Approximation of the Exponential Function), with errors up to 4 %.
    """
    power = distance.mul(-1 / math.log(2)).sub_(LEAST_SQUARES)
    whole = power.floor()
    weight = torch.exp2(whole).mul_(power.sub_(whole).add_(1))
    return weight.masked_fill_(distance > FARTHEST, 0)


def reflected(x: Tensor, dim: int, by: int) -> Tensor:
    """x extended on both sides by repeated reflection."""
    size = x.shape[dim]
    period = max(1, 2 * (size - 1))
    index = torch.arange(-by, size + by, device=x.device).remainder(period)
    return x.index_select(dim, torch.minimum(index, period - index))
