"""Untrained networks T_θ: their structure is the image prior.

A network is built as `network(channels)` for the image's number of channels. It maps z,
(1, 32, H, W), to an image (1, channels, H, W) in [0, 1], and may have
    smallest_side   the least H and W it works for;
    prepare(problem) -> z   to make its own fixed input, called once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    Raises:
        ValueError: An argument below 1.

    >>> SkipNet(3, width=8)(torch.rand(1, 32, 33, 47)).shape
    torch.Size([1, 3, 33, 47])
    """

    def __init__(
        self, channels: int, width: int = 128, skip_width: int = 4, scales: int = 5
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
        inputs = INPUT_CHANNELS
        for _ in range(scales):
            self.skip.append(_conv(inputs, skip_width, kernel=1))
            self.down.append(
                nn.Sequential(_conv(inputs, width, kernel=3, stride=2), _conv(width, width, 3))
            )
            self.up.append(
                nn.Sequential(
                    nn.BatchNorm2d(skip_width + width, track_running_stats=False),
                    _conv(skip_width + width, width, kernel=3),
                    _conv(width, width, kernel=1),
                )
            )
            inputs = width
        self.head = nn.Conv2d(width, channels, kernel_size=1)

    def forward(self, z: Tensor) -> Tensor:
        """z, (1, 32, H, W), to an image, (1, channels, H, W) in [0, 1], float32."""
        x, skips = z, []
        for down, skip in zip(self.down, self.skip, strict=True):
            skips.append(skip(x))
            x = down(x)  # sides: s -> ceil(s / 2)
        for up, skipped in zip(reversed(self.up), reversed(skips), strict=True):
            x = F.interpolate(x, skipped.shape[-2:], mode="bilinear", align_corners=False)
            x = up(torch.cat([skipped, x], dim=1))
        # In float32 also under autocast: bfloat16 has about 8 bits for all of [0.5, 1].
        return torch.sigmoid(self.head(x).float())


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    # No bias: the batch norm behind it would take it out again.
    return nn.Sequential(
        nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride=stride,
            padding=kernel // 2,
            padding_mode="reflect" if kernel > 1 else "zeros",
            bias=False,
        ),
        nn.BatchNorm2d(outputs, track_running_stats=False),
        nn.LeakyReLU(0.2, inplace=True),
    )
