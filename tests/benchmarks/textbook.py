"""The θ-step as a textbook writes it: plain PyTorch, eager, float32, contiguous, one Adam.

What the package is measured against. It shares no code with it, and is not tuned with it: a change
of this file never comes together with a change of the package's speed.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def conv_block(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Reflection padding, convolution, batch norm, leaky ReLU."""
    return nn.Sequential(
        nn.ReflectionPad2d(kernel // 2),
        nn.Conv2d(inputs, outputs, kernel, stride=stride, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.2, inplace=True),
    )


class Hourglass(nn.Module):
    """Deep Image Prior's network with skip connections, for sides that 2**scales divides."""

    def __init__(self, channels: int = 3, width: int = 128, skip: int = 4, scales: int = 5) -> None:
        super().__init__()
        inputs = [32] + [width] * (scales - 1)
        self.skip = nn.ModuleList(conv_block(n, skip, 1) for n in inputs)
        self.down = nn.ModuleList(
            nn.Sequential(conv_block(n, width, 3, stride=2), conv_block(width, width, 3))
            for n in inputs
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width + skip),
                conv_block(width + skip, width, 3),
                conv_block(width, width, 1),
            )
            for _ in inputs
        )
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.last = nn.Sequential(nn.Conv2d(width, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """z, (1, 32, H, W), to an image (1, channels, H, W)."""
        skips = []
        for down, skip in zip(self.down, self.skip, strict=True):
            skips.append(skip(x))
            x = down(x)
        for up in reversed(self.up):
            x = up(torch.cat([skips.pop(), self.upsample(x)], dim=1))
        return self.last(x)


class Textbook:
    """Deep Image Prior of a noisy image y, (1, C, H, W), with the released denoising settings."""

    def __init__(
        self,
        y: Tensor,
        width: int = 128,
        learning_rate: float = 0.008,
        input_scale: float = 0.1,
        input_noise_std: float = 0.033,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.y = y
        self.network = Hourglass(y.shape[1], width).to(y.device)
        self.z = input_scale * torch.rand(1, 32, *y.shape[-2:], device=y.device)
        self.input_noise_std = input_noise_std
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate)
        self.average = y.clone()

    def step(self) -> None:
        """One θ-update."""
        self.optimizer.zero_grad()
        out = self.network(self.z + self.input_noise_std * torch.randn_like(self.z))
        self.average = 0.99 * self.average + 0.01 * out.detach()
        loss = F.mse_loss(out, self.y)
        loss.backward()
        self.optimizer.step()
