"""How near an image is to the true one."""

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

SSIM_WINDOW = 11


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all channels, 0-dim; (1, C, H, W), peak 1.

    The image is clipped to [0, 1] first.

    Raises:
        RuntimeError: Two shapes.
    """
    return peak_signal_noise_ratio(image.clamp(0, 1), truth, data_range=1.0)


def ssim(image: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), mean over the channels, 0-dim; peak 1.

    The image is clipped to [0, 1] first. The mean is over all pixels, images mirrored at their
    borders. The Gaussian window (σ = 1.5) has 11 pixels: NaN for smaller images.

    Raises:
        RuntimeError: Two shapes.
    """
    if min(truth.shape[-2:]) < SSIM_WINDOW:
        return torch.tensor(float("nan"))
    value = structural_similarity_index_measure(image.clamp(0, 1), truth, data_range=1.0)
    assert isinstance(value, Tensor)
    return value


def scored_on(channels: int) -> str:
    """What the metrics compare: "rgb", "grey" or "channels"."""
    return {1: "grey", 3: "rgb"}.get(channels, "channels")
