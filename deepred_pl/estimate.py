"""Estimate the noise of a measurement."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAD = 0.6745  # median |n| of a standard normal variable
BLOCK = 16  # pixels of a side, in which `local_level` takes medians
QUIET = 0.2  # quantile of the blocks that counts as having no detail
REMOVED, ATTENUATED = 0.1, 0.03  # share of a blurred image's frequencies, or their gain
FEWEST = 64  # values of which a median is taken
ENOUGH = 2**18  # values of a channel, to less than a percent; of larger images a grid is taken


def noise_level(y: Tensor, valid: Tensor) -> Tensor:
    """The standard deviation of white noise in each channel, (C,); NaN if too few values are valid.

    Median absolute deviation of the second differences along both axes (Immerkær 1996), which leave
    little of an image but its texture. So that clipped noise does not count as small, only 3×3
    pixels that are all `valid` are used.

    Args:
        y: The measurement, (1, C, H, W).
        valid: Which values are neither clipped nor missing, of y's shape.
    """
    differences, whole = _second_differences(y, valid)
    levels = [_median(d[w]) for d, w in zip(differences, whole, strict=True)]
    return torch.stack(levels) / MAD


def local_level(y: Tensor, valid: Tensor, quantile: float = QUIET) -> float:
    """The noise's standard deviation in the least textured part of the image; NaN if unknown.

    Args:
        y, valid: As for `noise_level`, which texture makes larger.
        quantile: The part, by default a fifth of the blocks of 16×16 pixels; their chance makes the
            level 8 % too small, and that of a tenth 13 %.
    """
    differences, whole = _second_differences(y, valid)
    sides = [side // BLOCK for side in differences.shape[-2:]]
    if min(sides) == 0:
        return float("nan")
    blocks = _blocks(torch.where(whole, differences, torch.nan))  # (n, BLOCK²)
    enough = blocks.isfinite().sum(dim=1) > BLOCK**2 // 2
    if not enough.any():
        return float("nan")
    return float((blocks[enough].abs().nanmedian(dim=1)[0] / MAD).quantile(quantile))


def level_of_removed(y: Tensor, transfer: Tensor) -> Tensor:
    """The standard deviation of white noise in each channel, (C,), of a blurred image.

    From the median power of the frequencies that the blur attenuates most, at least a tenth of
    them, where hardly anything but the noise is left. A Hann window keeps the borders out.

    Args:
        y: The measurement, (1, C, H, W).
        transfer: The blur's Fourier transform on H × W pixels, (H, W // 2 + 1).
    """
    height, width = y.shape[-2:]
    rows, columns = (torch.hann_window(n, device=y.device) for n in (height, width))
    window = rows[:, None] * columns
    centred = y - y.mean(dim=(2, 3), keepdim=True)
    power = torch.fft.rfft2(centred * window)[0].abs().square()  # (C, H, W // 2 + 1)
    gain = transfer.abs()
    removed = gain <= max(ATTENUATED, float(gain.flatten().quantile(REMOVED)))
    # The power of white noise is exponentially distributed, with a median of log 2.
    mean = power[:, removed].median(dim=1)[0] / math.log(2)
    return (mean / window.square().sum()).sqrt()


def unclipped(y: Tensor) -> Tensor:
    """Which values of y, on the [0, 1] scale, were not clipped to 0 or 1.

    A measurement with values beyond 0 or 1 was not clipped there.
    """
    low = 0.0 if y.min() >= 0 else -torch.inf
    high = 1.0 if y.max() <= 1 else torch.inf
    return (y > low) & (y < high)


def _second_differences(y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled to keep the variance of white noise, and where they are valid, (C, H', W')."""
    if min(y.shape[-2:]) < 3:
        empty = y.new_zeros(y.shape[1], 0, 0)
        return empty, empty.bool()
    weights = torch.tensor([1.0, -2.0, 1.0], device=y.device)
    kernel = weights[:, None] * weights / 6
    step = max(1, math.isqrt(y.shape[-2] * y.shape[-1] // ENOUGH))
    channels = y.movedim(1, 0).float()  # (C, 1, H, W)
    differences = F.conv2d(channels, kernel[None, None], stride=step)  # (C, 1, H', W')
    whole = F.max_pool2d(1 - valid.expand_as(y).float(), 3, stride=step) == 0
    return differences[:, 0], whole[0]


def _median(values: Tensor) -> Tensor:
    return values.abs().median() if values.numel() >= FEWEST else values.new_tensor(torch.nan)


def _blocks(values: Tensor) -> Tensor:
    """(C, H, W) cut into blocks, (n, BLOCK²); what is left at the border is dropped."""
    height, width = (side // BLOCK * BLOCK for side in values.shape[-2:])
    cut = values[:, :height, :width].unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK)
    return cut.reshape(-1, BLOCK**2)
