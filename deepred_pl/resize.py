"""Reflection padding and bilinear upsampling of features, deterministic on every device.

They equal torch's. On a GPU those add up their gradients in an order that varies; padding there
leaves channels_last, and upsampling leaves bfloat16.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def reflection_pad(x: Tensor) -> Tensor:
    """x with one more pixel on each side, mirrored about the border pixels.

    Args:
        x: (N, C, H, W) in channels_last, H and W at least 2.

    Returns:
        (N, C, H + 2, W + 2) in channels_last.
    """
    if _on_cpu(x) and x.dtype == torch.float32:  # torch's is a little faster; in bfloat16, slower
        return F.pad(x, (1, 1, 1, 1), mode="reflect")
    return _ReflectionPad.apply(x)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling as `F.interpolate` does it (align_corners=False), in the type of x.

    On a GPU by one matrix product along each axis: few calls, for up to about 1024×1024 pixels
    faster than more calls without the matrices' zeros.

    Args:
        x: (N, C, h, w) in channels_last.
        size: (H, W).

    Returns:
        (N, C, H, W) in channels_last.
    """
    if _on_cpu(x):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)
    return _Upsampling.apply(x, size)


def _on_cpu(x: Tensor) -> bool:
    """Whether torch's own are deterministic; compiled, they add up by index everywhere."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _ReflectionPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        number, channels, height, width = x.shape
        padded = x.new_empty(number, height + 2, width + 2, channels).permute(0, 3, 1, 2)
        padded[..., 1:-1, 1:-1] = x
        padded[..., 1:-1, 0], padded[..., 1:-1, -1] = x[..., 1], x[..., -2]
        padded[..., 0, :], padded[..., -1, :] = padded[..., 2, :], padded[..., -3, :]
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        rows = grad[..., 1:-1].contiguous(memory_format=torch.channels_last)  # (N, C, H + 2, W)
        rows[..., 1] += grad[..., 0]
        rows[..., -2] += grad[..., -1]
        rows[..., 2, :] += rows[..., 0, :]
        rows[..., -3, :] += rows[..., -1, :]
        return rows[..., 1:-1, :]


class _Upsampling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        sides = zip(x.shape[2:], size, strict=True)
        # torch.compile warns of caches, which it does not use.
        make = _matrices.__wrapped__ if torch.compiler.is_compiling() else _matrices
        # Kept, because a CUDA graph reads them long after the cache may have dropped them.
        ctx.rows, ctx.columns = (make(*side, x.dtype, x.device) for side in sides)
        return _multiplied(x, ctx.rows[0], ctx.columns[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _multiplied(grad, ctx.rows[1], ctx.columns[1]), None


def _multiplied(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A matrix product along H with `rows`, (H', H), and along W with `columns`, (W', W)."""
    number, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(number, height, width * channels)
    with torch.autocast(x.device.type, enabled=False):
        pixels = (rows @ pixels).view(-1, width, channels)  # (N · H', W, C)
        pixels = (columns @ pixels).view(number, -1, columns.shape[0], channels)
    return pixels.permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _matrices(
    low: int, high: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The matrix that upsamples along one axis, and its transpose."""
    matrix = upsampling_matrix(low, high, dtype, device)
    return matrix, matrix.t().contiguous()


def upsampling_matrix(
    low: int, high: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """(high, low), linear interpolation of `low` values at `high` places, centred alike."""
    pixels = torch.arange(low, dtype=torch.float64, device=device)
    places = (torch.arange(high, dtype=torch.float64, device=device) + 0.5) * low / high - 0.5
    distance = (places.clamp(0, low - 1)[:, None] - pixels).abs()
    return (1 - distance).clamp(min=0).to(dtype)
