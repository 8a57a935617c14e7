"""Untrained networks T_θ, whose structure is the image prior.

A network is created as `network(channels)` for the image's number of channels. It maps z,
(1, 32, H, W), to an image (1, channels, H, W) in [0, 1], and may define
    smallest_side   the smallest H and W it works for;
    limits          (low, high) of its output, (0, 1) at first, set to the problem's;
    prepare(problem) -> z   to create its own fixed input, called once.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepred_pl import fast_conv
from deepred_pl.checks import check_at_least
from deepred_pl.problem import InverseProblem
from deepred_pl.resize import reflection_pad, upsample

INPUT_CHANNELS = 32


def bounded(t: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """A sigmoid between `low` < 0.5 and `high` > 0.5, with value 1/2 and slope 1/4 at t = 0.

    For (0, 1) it is the logistic function. With wider limits a network starts with the same output
    and learns images within [0, 1] as before, but may leave it.
    """
    if (low, high) == (0, 1):
        return torch.sigmoid(t)
    middle = (0.5 - low) / (high - low)
    steepness = 0.25 / ((high - low) * middle * (1 - middle))
    return low + (high - low) * torch.sigmoid(math.log(middle / (1 - middle)) + steepness * t)


class SkipNet(nn.Module):
    """The hourglass with skip connections of Deep Image Prior and DeepRED.

    Per scale: two convolutions down (the first with stride 2), a thin 1×1 skip connection,
    and two convolutions up after bilinear upsampling to the skip's size, so that any image size
    works. Batch normalization always uses the statistics of the one image. The defaults have 2.22
    million parameters for 3 channels (arXiv:1711.10925, arXiv:1903.10176).

    Args:
        channels: Channels of the image.
        width: Channels of every convolution.
        skip_width: Channels of the skip connections.
        scales: Number of halvings; sides must have at least 2**scales + 1 pixels.
        input_channels: Channels of z.

    Raises:
        ValueError: An argument is below 1.

    >>> SkipNet(3, width=8)(torch.rand(1, 32, 33, 47)).shape
    torch.Size([1, 3, 33, 47])
    """

    def __init__(
        self,
        channels: int,
        width: int = 128,
        skip_width: int = 4,
        scales: int = 5,
        input_channels: int = INPUT_CHANNELS,
    ) -> None:
        super().__init__()
        check_at_least(1, channels=channels, width=width, skip_width=skip_width, scales=scales)
        self.input_channels = input_channels
        self.limits = (0.0, 1.0)
        self.smallest_side = 2**scales + 1
        self.down = nn.ModuleList()
        self.skip = nn.ModuleList()
        self.up = nn.ModuleList()
        inputs = input_channels
        for _ in range(scales):
            self.skip.append(_conv(inputs, skip_width, kernel=1))
            self.down.append(
                nn.Sequential(_conv(inputs, width, kernel=3, stride=2), _conv(width, width, 3))
            )
            self.up.append(_Up(skip_width, width))
            inputs = width
        self.head = nn.Conv2d(width, channels, kernel_size=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map z, (1, input_channels, H, W), to an image, (1, channels, H, W), float32."""
        if torch.is_autocast_enabled(z.device.type):
            z = z.to(torch.get_autocast_dtype(z.device.type))  # once for both convolutions
        x, skips = z, []
        for down, skip in zip(self.down, self.skip, strict=True):
            skips.append(skip(x))
            x = down(x)  # sides: s -> ceil(s / 2)
        for up, skipped in zip(reversed(self.up), reversed(skips), strict=True):
            x = up(skipped, x)
        # In float32 even under autocast: bfloat16 has only 8 bits of precision.
        return bounded(self.head(x).float(), *self.limits)


class MeasurementNet(SkipNet):
    """A `SkipNet` whose fixed input z is the measurement, as Stein's estimate (`SURE`) requires.

    Args:
        channels: Channels of the image.
        width: Channels of every convolution.
        skip_width: Channels of the skip connections.
        scales: Number of halvings; sides must have at least 2**scales + 1 pixels.

    Raises:
        ValueError: An argument is below 1; at `prepare`, the measurement has another shape than the
            image.
    """

    def __init__(
        self, channels: int, width: int = 128, skip_width: int = 4, scales: int = 5
    ) -> None:
        super().__init__(channels, width, skip_width, scales, input_channels=channels)

    def prepare(self, problem: InverseProblem) -> Tensor:
        """The measurement y, (1, C, H, W)."""
        if tuple(problem.y.shape) != problem.image_shape:
            raise ValueError(
                "MeasurementNet is for denoising: expected a measurement of the image's shape "
                f"{problem.image_shape}, got {tuple(problem.y.shape)}; use SkipNet, or another "
                "method such as methods/deepred"
            )
        return problem.y.clone()


class DeepDecoder(nn.Module):
    """The Deep Decoder: 1×1 convolutions and upsampling (Heckel & Hand 2019, arXiv:1810.03982).

    Each of `scales` layers mixes channels, upsamples bilinearly, and applies ReLU and a channel
    normalization; a last one does so without upsampling. The prior is the small number of
    parameters: about 100 000 with the published width of 128, for images of 512×512. Smaller
    images need a smaller width (32 for 128×128), so that the image has many times more values than
    the network parameters.

    Args:
        channels: Channels of the image.
        width: Channels of every layer and of z.
        scales: Number of doublings; sides must have at least 2**scales + 1 pixels.

    Raises:
        ValueError: An argument is below 1.
    """

    def __init__(self, channels: int, width: int = 128, scales: int = 5) -> None:
        super().__init__()
        check_at_least(1, channels=channels, width=width, scales=scales)
        self.limits = (0.0, 1.0)
        self.smallest_side = 2**scales + 1
        self.mix = nn.ModuleList(
            nn.Conv2d(width, width, kernel_size=1, bias=False) for _ in range(scales + 1)
        )
        self.norm = nn.ModuleList(
            nn.BatchNorm2d(width, track_running_stats=False) for _ in range(scales + 1)
        )
        self.head = nn.Conv2d(width, channels, kernel_size=1)
        self.side = [0, 0]  # the image's height and width, from `prepare` or a checkpoint

    def prepare(self, problem: InverseProblem) -> Tensor:
        """Draw z from U(0, 1), (1, width, ⌈H / 2**scales⌉, ⌈W / 2**scales⌉)."""
        self.side = list(problem.image_shape[-2:])
        return torch.rand(1, self.head.in_channels, *self._sides()[0])

    def forward(self, z: Tensor) -> Tensor:
        """Map z to an image, (1, channels, H, W), float32."""
        x, sides = z, self._sides()
        for mix, norm, side in zip(self.mix, self.norm, [*sides[1:], sides[-1]], strict=True):
            x = mix(x)
            if x.shape[-2:] != side:
                x = upsample(x, side)
            x = norm(F.relu(x))
        return bounded(self.head(x).float(), *self.limits)

    def _sides(self) -> list[tuple[int, int]]:
        """(H, W) of every layer, from z to the image."""
        sides = [(self.side[0], self.side[1])]
        for _ in range(len(self.mix) - 1):
            height, width = sides[0]
            sides.insert(0, ((height + 1) // 2, (width + 1) // 2))
        return sides

    def get_extra_state(self) -> list[int]:
        """The image's height and width."""
        return self.side

    def set_extra_state(self, state: list[int]) -> None:
        """Set the image's height and width."""
        self.side = state


class ImageParameter(nn.Module):
    """The image itself as the parameters, instead of a network.

    T_θ(z) can then be any image, and the denoiser is the only prior: RED (Romano et al. 2017,
    arXiv:1611.02862) and Plug-and-Play. z is not used.

    Args:
        channels: Channels of the image.
        start: Called with the problem, gives the image to start at, (1, C, H, W) in [0, 1]; None is
            the problem's first guess.
    """

    def __init__(
        self, channels: int, start: Callable[[InverseProblem], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.start = start
        self.image = nn.Parameter(torch.empty(1, channels, 0, 0))  # until the size is known

    def prepare(self, problem: InverseProblem) -> Tensor:
        """Set the image to its start; z is a single 0."""
        start = problem.first_guess() if self.start is None else self.start(problem)
        self.image = nn.Parameter(start)
        return torch.zeros(1, 1, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """The image, (1, channels, H, W), not clipped."""
        return self.image.clone()  # a copy, because the optimizer moves the parameter in place

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "image")
        if saved is not None and self.image.numel() == 0:
            self.image = nn.Parameter(torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Up(nn.Module):
    """Joins a skip connection, (1, S, H, W), and the scale below, (1, C, h, w), at (H, W)."""

    def __init__(self, skip_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(skip_width + width, track_running_stats=False)
        self.mix = _Conv2d(skip_width + width, width, kernel_size=3, bias=False)
        self.after = nn.Sequential(*_normalized(width), _conv(width, width, kernel=1))

    def forward(self, skipped: Tensor, x: Tensor) -> Tensor:
        """The joined features, (1, C, H, W)."""
        if fast_conv.pays_off(x):
            return self.after(fast_conv.join(skipped, x, self.norm, self.mix.weight))
        x = upsample(x, (skipped.shape[2], skipped.shape[3]))
        return self.after(self.mix(self.norm(torch.cat([skipped, x], dim=1))))


class _Conv2d(nn.Conv2d):
    """A convolution, with reflection padding if its kernel is 3×3."""

    def forward(self, x: Tensor) -> Tensor:
        padded = self.kernel_size[0] == 3
        if padded:
            x = reflection_pad(x)
        if padded and fast_conv.pays_off(x):
            return fast_conv.conv2d(x, self.weight, self.stride[0])
        return F.conv2d(x, self.weight, stride=self.stride)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    # No bias: the batch normalization that follows would remove it.
    return nn.Sequential(
        _Conv2d(inputs, outputs, kernel, stride=stride, bias=False), *_normalized(outputs)
    )


def _normalized(channels: int) -> tuple[nn.Module, nn.Module]:
    """The layers after every convolution."""
    norm = nn.BatchNorm2d(channels, track_running_stats=False)
    return norm, nn.LeakyReLU(0.2, inplace=True)
