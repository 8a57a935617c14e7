"""Convolutions for CPUs that compute the same functions as torch's with fewer operations.

Images are (1, C, H, W) in channels_last, which is a matrix of pixels by channels in memory.
"""

import warnings
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from deepred_pl.resize import reflection_pad, upsampling_matrix

SMALL = 2**15  # values; below, the overhead of more calls exceeds the savings


def pays_off(x: Tensor) -> bool:
    """Whether these functions are faster than torch's for x: large, full precision, on a CPU."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() < SMALL:
        return False
    precise = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return precise and x.shape[0] == 1 and multiplies_sparse()


@lru_cache(maxsize=1)
def multiplies_sparse() -> bool:
    """Whether this torch can multiply sparse matrices, which requires MKL."""
    try:
        _product(_sparse(torch.eye(2, device="cpu")), torch.ones(2, 2, device="cpu"))
    except RuntimeError:
        return False
    return True


def join(skipped: Tensor, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor) -> Tensor:
    """The 3×3 convolution of batch_norm(cat(skipped, upsample(x))), up to a constant per channel.

    The upsampled x is never computed. Only the scale of the batch normalization is applied: its
    offset is constant, and the batch normalization after the convolution removes it.

    Args:
        skipped: (1, S, H, W).
        x: (1, C, h, w).
        norm: Batch normalization of S + C channels.
        weight: (O, S + C, 3, 3).

    Returns:
        (1, O, H, W).
    """
    size, thin = (skipped.shape[2], skipped.shape[3]), skipped.shape[1]
    mean, variance = upsampled_moments(x, size)
    variance = torch.cat([skipped.var(dim=(0, 2, 3), correction=0), variance])
    scale = norm.weight * (variance + norm.eps).rsqrt()
    scale = scale + 0 * norm.bias  # so that its gradient is 0 and not None
    weight = weight * scale[:, None, None]
    x = conv2d_upsampled(x - mean[:, None, None], weight[:, thin:], size)
    return x + conv2d(reflection_pad(skipped), weight[:, :thin])


def conv2d(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Convolution without padding, (1, C, H, W) to (1, O, ⌈(H − k + 1) / stride⌉, …).

    The weight's gradient is one matrix product over all pixels: oneDNN's is several times slower in
    channels_last on CPUs without AVX-512.
    """
    return _Convolution.apply(x, weight, stride)


class _Convolution(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride)

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = None
        if for_x:
            sides = [ctx.stride] * 2, [0, 0], [1, 1], False, [0, 0], 1  # no padding, no groups
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *sides, [True, False, False]
            )[0]
        grad_weight = None
        if for_weight:
            outputs, inputs, kernel, _ = weight.shape
            patches = _patches(x, kernel, ctx.stride, *grad.shape[-2:])
            product = _pixels(grad).t() @ patches  # (O, k · k · C)
            grad_weight = product.view(outputs, kernel, kernel, inputs).permute(0, 3, 1, 2)
        return grad_x, grad_weight, None


def _pixels(x: Tensor) -> Tensor:
    """(1, C, H, W) as its matrix of pixels, (H · W, C); a view in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _patches(x: Tensor, kernel: int, stride: int, height: int, width: int) -> Tensor:
    """The k×k neighbourhoods of x, (height · width, k · k · C), copied."""
    x = x.contiguous(memory_format=torch.channels_last)
    channels, row = x.shape[1], x.shape[1] * x.shape[3]
    # The k pixels of a row of a neighbourhood are contiguous: k runs of k · C values.
    runs = x.as_strided(
        (height, width, kernel, kernel * channels), (stride * row, stride * channels, row, 1)
    )
    return runs.reshape(height * width, -1)


def conv2d_upsampled(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """`conv2d(reflection_pad(upsample(x)))`: (1, C, h, w) to (1, O, H, W) for a 3×3 weight.

    Upsampling (bilinear, align_corners=False) and padding act on each channel separately, so they
    commute with the mixing of channels, which is then computed on fewer pixels: with a quarter of
    the multiplications at a factor of two. The rest is sparse, a few taps along each axis.

    Args:
        x: (1, C, h, w).
        weight: (O, C, 3, 3).
        size: (H, W), at least 2.
    """
    return _UpsampledConvolution.apply(x, weight, size)


class _UpsampledConvolution(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.size = size
        (h, w), (height, width), outputs = x.shape[-2:], size, weight.shape[0]
        pixels, mixing = _columns(x), _mixing(weight)
        mixed = x.new_empty(3, w * h, 3 * outputs)  # by the column of the tap
        for tap in range(3):
            torch.mm(pixels, mixing[tap], out=mixed[tap])
        wide = _product(_spreading(w, width, x.dtype), mixed.view(3 * w, -1))  # (W, h · 3 · O)
        wide = wide.view(width, h, 3, outputs).permute(2, 1, 0, 3).reshape(3 * h, -1)
        out = _product(_spreading(h, height, x.dtype), wide)  # (H, W · O)
        return out.view(height, width, outputs).permute(2, 0, 1)[None]

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        (h, w), (height, width), outputs = x.shape[-2:], ctx.size, weight.shape[0]
        pixels, mixing = _columns(x), _mixing(weight)
        wide = _pixels(grad).reshape(height, -1)
        wide = _product(_gathering(h, height, x.dtype), wide)  # (3 · h, W · O)
        wide = wide.view(3, h, width, outputs).permute(2, 1, 0, 3).reshape(width, -1)
        mixed = _product(_gathering(w, width, x.dtype), wide).view(3, w * h, 3 * outputs)
        grad_pixels = torch.mm(mixed[0], mixing[0].t())  # (w · h, C)
        grad_mixing = torch.empty_like(mixing)
        for tap in range(3):
            torch.mm(pixels.t(), mixed[tap], out=grad_mixing[tap])
            if tap > 0:
                grad_pixels.addmm_(mixed[tap], mixing[tap].t())
        grad_x = grad_pixels.view(w, h, -1).permute(2, 1, 0)[None]
        grad_weight = grad_mixing.view(3, -1, 3, outputs).permute(3, 1, 2, 0)
        return grad_x.contiguous(memory_format=torch.channels_last), grad_weight, None


def _product(sparse: Tensor, dense: Tensor) -> Tensor:
    """The matrix product of a sparse and a dense matrix."""
    # With an output tensor: `sparse @ dense` fills the result first and copies it at the end.
    product = dense.new_empty(sparse.shape[0], dense.shape[1])
    return torch.addmm(product, sparse, dense, beta=0, out=product)


def _columns(x: Tensor) -> Tensor:
    """(1, C, h, w) as its matrix of pixels column by column, (w · h, C)."""
    return x.permute(0, 3, 2, 1).reshape(-1, x.shape[1])


def _mixing(weight: Tensor) -> Tensor:
    """A weight (O, C, rows, columns) as (columns, C, rows · O)."""
    return weight.permute(3, 1, 2, 0).reshape(3, weight.shape[1], -1)


@lru_cache(maxsize=64)
def _spreading(low: int, high: int, dtype: torch.dtype) -> Tensor:
    """(high, 3 · low), sparse: upsample low to high values; then the previous, same and next one,
    with reflection at the ends."""
    upsampling = upsampling_matrix(low, high, dtype)
    here = torch.arange(high, device="cpu")
    taps = [(here + shift).abs() for shift in (-1, 0, 1)]
    taps = [torch.where(tap < high, tap, 2 * (high - 1) - tap) for tap in taps]
    return _sparse(torch.cat([upsampling[tap] for tap in taps], dim=1))


@lru_cache(maxsize=64)
def _gathering(low: int, high: int, dtype: torch.dtype) -> Tensor:
    """The transpose of `_spreading`, (3 · low, high)."""
    return _sparse(_spreading(low, high, dtype).to_dense().t())


def _sparse(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch warns that sparse matrices are in beta
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return matrix.to_sparse_csr()


def upsampled_moments(x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of upsample(x), (C,), from x, (1, C, h, w), itself."""
    rows, columns = (_means(*sides, x.dtype) for sides in zip(x.shape[-2:], size, strict=True))
    mean = torch.einsum("chw,h,w->c", x[0], rows, columns)
    return mean, _UpsampledSquare.apply(x - mean[:, None, None], size)


class _UpsampledSquare(torch.autograd.Function):
    """The mean of upsample(x)² in each channel: Σ x · (R x C) with R and C of `_moments`."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        (h, w), (height, width), channels = x.shape[-2:], size, x.shape[1]
        product = _product(_moments(w, width, x.dtype), _columns(x).reshape(w, -1))  # (w, h · C)
        product = product.view(w, h, channels).transpose(0, 1).reshape(h, -1)
        product = _product(_moments(h, height, x.dtype), product).view(h * w, channels)
        ctx.save_for_backward(product)
        ctx.shape = x.shape
        return (product * _pixels(x)).sum(dim=0)

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (product,) = ctx.saved_tensors
        _, channels, h, w = ctx.shape
        return (2 * grad * product).view(1, h, w, channels).permute(0, 3, 1, 2), None


@lru_cache(maxsize=64)
def _means(low: int, high: int, dtype: torch.dtype) -> Tensor:
    """The weight of each of `low` values in the mean of the `high` upsampled values, (low,)."""
    return upsampling_matrix(low, high, dtype).mean(dim=0)


@lru_cache(maxsize=64)
def _moments(low: int, high: int, dtype: torch.dtype) -> Tensor:
    """UᵀU / high, (low, low), three diagonals, for the matrix U that upsamples low to high."""
    upsampling = upsampling_matrix(low, high, dtype)
    return _sparse(upsampling.t() @ upsampling / high)
