"""Untrained networks T_θ: their structure is the image prior.

A network is built as `network(channels)` for the image's number of channels. It maps z,
(1, 32, H, W), to an image (1, channels, H, W) in [0, 1], and may have
    smallest_side   the least H and W it works for;
    prepare(problem) -> z   to make its own fixed input, called once.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepred_pl import convolution
from deepred_pl.denoisers.bm3d import LEAST_SIDE, deblur
from deepred_pl.operators import Blur
from deepred_pl.problem import InverseProblem

INPUT_CHANNELS = 32


class SkipNet(nn.Module):
    """The hourglass with skip connections of Deep Image Prior and DeepRED.

    Per scale: two convolutions down (the first with stride 2), a thin 1×1 skip connection,
    and two convolutions up behind a bilinear upsampling to the skip's own size, so that any
    image size works. Batch norm uses the statistics of the one image there is. With the
    defaults 2.22 million parameters for 3 channels (arXiv:1711.10925, arXiv:1903.10176).

    Args:
        channels: Channels of the image.
        width: Channels of every convolution.
        skip_width: Channels of the skip connections.
        scales: Number of halvings; sides must have at least 2**scales + 1 pixels.
        input_channels: Channels of z.

    Raises:
        ValueError: An argument below 1.

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
        if min(channels, width, skip_width, scales) < 1:
            raise ValueError(
                "SkipNet needs channels, width, skip_width and scales of at least 1, "
                f"got {channels}, {width}, {skip_width}, {scales}"
            )
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
        """z, (1, input_channels, H, W), to an image, (1, channels, H, W) in [0, 1], float32."""
        x, skips = z, []
        for down, skip in zip(self.down, self.skip, strict=True):
            skips.append(skip(x))
            x = down(x)  # sides: s -> ceil(s / 2)
        for up, skipped in zip(reversed(self.up), reversed(skips), strict=True):
            x = up(skipped, x)
        # In float32 also under autocast: bfloat16 has about 8 bits for all of [0.5, 1].
        return torch.sigmoid(self.head(x).float())


class MeasurementNet(SkipNet):
    """A `SkipNet` whose fixed input z is the measurement, as Stein's estimate (`SURE`) needs it.

    Args:
        channels: Channels of the image.
        width: Channels of every convolution.
        skip_width: Channels of the skip connections.
        scales: Number of halvings; sides must have at least 2**scales + 1 pixels.

    Raises:
        ValueError: An argument below 1; at `prepare`, a measurement not of the image's shape.
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
                "method, as methods/deepred"
            )
        return problem.y.clone()


class DeepDecoder(nn.Module):
    """The Deep Decoder: 1×1 convolutions and upsampling (Heckel & Hand 2019, arXiv:1810.03982).

    Each of `scales` layers mixes channels, upsamples bilinearly, and applies ReLU and a channel
    normalisation; one more does so at the image's size. Its few parameters and its input of a
    few pixels are the prior: with the published width of 128, about 100 000 for images of
    512×512; a smaller image wants a smaller width, so that values stay many times more than
    parameters (32 for 128×128).

    Args:
        channels: Channels of the image.
        width: Channels of every layer and of z.
        scales: Number of doublings; sides must have at least 2**scales + 1 pixels.

    Raises:
        ValueError: An argument below 1.
    """

    def __init__(self, channels: int, width: int = 128, scales: int = 5) -> None:
        super().__init__()
        if min(channels, width, scales) < 1:
            raise ValueError(
                "DeepDecoder needs channels, width and scales of at least 1, "
                f"got {channels}, {width}, {scales}"
            )
        self.smallest_side = 2**scales + 1
        self.mix = nn.ModuleList(
            nn.Conv2d(width, width, kernel_size=1, bias=False) for _ in range(scales + 1)
        )
        self.norm = nn.ModuleList(
            nn.BatchNorm2d(width, track_running_stats=False) for _ in range(scales + 1)
        )
        self.head = nn.Conv2d(width, channels, kernel_size=1)
        self.side = [0, 0]  # the image's, known from `prepare` or from a checkpoint

    def prepare(self, problem: InverseProblem) -> Tensor:
        """z, drawn from U(0, 1), (1, width, ⌈H / 2**scales⌉, ⌈W / 2**scales⌉)."""
        self.side = list(problem.image_shape[-2:])
        return torch.rand(1, self.head.in_channels, *self._sides()[0])

    def forward(self, z: Tensor) -> Tensor:
        """z to an image, (1, channels, H, W) in [0, 1], float32."""
        x, sides = z, self._sides()
        for mix, norm, side in zip(self.mix, self.norm, [*sides[1:], sides[-1]], strict=True):
            x = mix(x)
            if x.shape[-2:] != side:
                x = F.interpolate(x, side, mode="bilinear", align_corners=False)
            x = norm(F.relu(x))
        return torch.sigmoid(self.head(x).float())

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
        """Restore them."""
        self.side = state


class ImageParameter(nn.Module):
    """No network: every value of the image is a parameter, started at the first guess.

    With it T_θ(z) is any image, so that the denoiser is the only prior: RED alone (Romano et al.
    2017, arXiv:1611.02862) and Plug-and-Play. z is not used.

    Args:
        channels: Channels of the image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.empty(1, channels, 0, 0))  # until the size is known

    def prepare(self, problem: InverseProblem) -> Tensor:
        """Take the problem's first guess; z is one 0."""
        self.image = nn.Parameter(problem.first_guess())
        return torch.zeros(1, 1, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """The image, (1, channels, H, W), not clipped."""
        return self.image.clone()  # a copy, for the optimizer moves the parameter in place

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "image")
        if saved is not None and self.image.numel() == 0:
            self.image = nn.Parameter(torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)


class BM3DDeblurring(ImageParameter):
    """No network, but an image started at BM3D's deblurring: a rival without one.

    After one step that is what comes out; more would be a fit that starts there. **Licence: the
    `bm3d` package is free for non-commercial use only.**

    Args:
        channels: Channels of the image.

    Raises:
        ValueError: The problem is no `Blur` with a circular boundary, or has no noise model (whose
            mean variance is taken for that of white noise); when it is built.
    """

    smallest_side = LEAST_SIDE

    def prepare(self, problem: InverseProblem) -> Tensor:
        """Deblur the measurement; z is one 0."""
        operator, variance = problem.operator, problem.noise_variance()
        if not isinstance(operator, Blur) or operator.boundary != "circular" or variance is None:
            raise ValueError(
                "BM3D's deblurring needs a Blur with a circular boundary and a noise model, got "
                f"{operator} and {problem.noise}; take another method"
            )
        sigma = 255 * math.sqrt(float(variance))
        self.image = nn.Parameter(deblur(problem.y, operator.kernel, sigma).clamp(0, 1))
        return torch.zeros(1, 1, 1, 1)


class _Up(nn.Module):
    """Joins a skip connection, (1, S, H, W), and the scale below, (1, C, h, w), at (H, W)."""

    def __init__(self, skip_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(skip_width + width, track_running_stats=False)
        self.mix = _Conv2d(skip_width + width, width, kernel_size=3, bias=False)
        self.after = nn.Sequential(*_normalized(width), _conv(width, width, kernel=1))

    def forward(self, skipped: Tensor, x: Tensor) -> Tensor:
        """The two joined, (1, C, H, W)."""
        size = skipped.shape[2], skipped.shape[3]
        if not convolution.pays_off(x):
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
            return self.after(self.mix(self.norm(torch.cat([skipped, x], dim=1))))
        # The same function without ever making the upsampled x. Of the first batch norm only the
        # scale is needed: what it adds is equal everywhere, and the next one takes that out.
        mean, variance = convolution.upsampled_moments(x, size)
        variance = torch.cat([skipped.var(dim=(0, 2, 3), correction=0), variance])
        scale = self.norm.weight * (variance + self.norm.eps).rsqrt()
        scale = scale + 0 * self.norm.bias  # whose gradient is 0, not missing
        weight = self.mix.weight * scale[:, None, None]
        thin = skipped.shape[1]
        x = convolution.conv2d_upsampled(x - mean[:, None, None], weight[:, thin:], size)
        skipped = F.pad(skipped, (1, 1, 1, 1), mode="reflect")
        return self.after(x + convolution.conv2d(skipped, weight[:, :thin]))


class _Conv2d(nn.Conv2d):
    """A convolution with reflection padding."""

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel_size[0] // 2
        if side:
            x = F.pad(x, (side, side, side, side), mode="reflect")
        if side and convolution.pays_off(x):
            return convolution.conv2d(x, self.weight, self.stride[0])
        return F.conv2d(x, self.weight, stride=self.stride)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    # No bias: the batch norm behind it would take it out again.
    return nn.Sequential(
        _Conv2d(inputs, outputs, kernel, stride=stride, bias=False), *_normalized(outputs)
    )


def _normalized(channels: int) -> tuple[nn.Module, nn.Module]:
    """What follows every convolution."""
    norm = nn.BatchNorm2d(channels, track_running_stats=False)
    return norm, nn.LeakyReLU(0.2, inplace=True)
