"""PSNR and SSIM."""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

MetricOn = Literal["rgb", "luminance"]

GREY_LEVELS = 255  # of an 8-bit image, per unit
SSIM_WINDOW = 11


def psnr(image: Tensor, truth: Tensor, on: MetricOn = "rgb") -> Tensor:
    """Peak signal-to-noise ratio in dB, 0-dim, of images (1, C, H, W).

    Args:
        image: The image, clipped first: to [0, 1], or to the range of the true image if that is
            wider.
        truth: The true image.
        on: "rgb" compares all channels, with peak 1; "luminance" compares the `luminance` of images
            with three channels, with peak 255.

    Raises:
        RuntimeError: The shapes differ.
    """
    image, truth, peak = _compared(image, truth, on)
    return peak_signal_noise_ratio(image, truth, data_range=peak)


def ssim(image: Tensor, truth: Tensor, on: MetricOn = "rgb") -> Tensor:
    """Structural similarity (Wang et al. 2004), averaged over the channels, 0-dim.

    Arguments as in `psnr`. The mean is over all pixels of images mirrored at their borders. The
    Gaussian window (σ = 1.5) has 11 pixels; NaN for smaller images.

    Raises:
        RuntimeError: The shapes differ.
    """
    if min(truth.shape[-2:]) < SSIM_WINDOW:
        return torch.tensor(float("nan"))
    image, truth, peak = _compared(image, truth, on)
    value = structural_similarity_index_measure(image, truth, data_range=peak)
    assert isinstance(value, Tensor)
    return value


def luminance(image: Tensor) -> Tensor:
    """BT.601 studio-range luma of an RGB image (1, 3, H, W) in [0, 1], (1, 1, H, W) in 16…235.

    RGB and the result are rounded to 8 bits, as in the literature on super-resolution.
    """
    red, green, blue = (image.clamp(0, 1) * 255).round().div(255).unbind(1)
    return (16 + 65.481 * red + 128.553 * green + 24.966 * blue).round()[:, None]


def scored_on(channels: int, on: MetricOn = "rgb") -> str:
    """The channels that the metrics compare: "rgb", "luminance", "grey" or "channels"."""
    return {1: "grey", 3: str(on)}.get(channels, "channels")


def _compared(image: Tensor, truth: Tensor, on: MetricOn) -> tuple[Tensor, Tensor, float]:
    if image.shape != truth.shape:
        raise RuntimeError(
            f"expected images of the same shape, got {tuple(image.shape)} and {tuple(truth.shape)}"
        )
    if scored_on(truth.shape[1], on) == "luminance":
        return luminance(image), luminance(truth), 255.0
    return image.clamp(truth.amin().clamp(max=0), truth.amax().clamp(min=1)), truth, 1.0
