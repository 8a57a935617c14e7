"""Non-local means as one Triton kernel, for images on an NVIDIA GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepred_pl.denoisers.nlm import FARTHEST, LEAST_SQUARES, reflected

ROWS, COLUMNS = 8, 32  # pixels of one program
# One thread for each pixel, which keeps its own patch in registers.
OPTIONS = {"num_warps": ROWS * COLUMNS // 32, "enable_fp_fusion": True}

_FARTHEST, _LEAST_SQUARES = tl.constexpr(FARTHEST), tl.constexpr(LEAST_SQUARES)
_LOG2_E = tl.constexpr(1.4426950408889634)


def nl_means(x: Tensor, patch_size: int, patch_distance: int, h: float, sigma: float) -> Tensor:
    """`nlm.nl_means`, with its arguments, in one pass over the image."""
    channels, height, width = x.shape[1:]
    half = patch_size // 2
    border = half + patch_distance
    padded = reflected(reflected(x[0].float(), 1, border), 2, border).contiguous()
    denoised = padded.new_empty(channels, height, width)
    area = (2 * half + 1) ** 2
    grid = triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS), channels
    with torch.cuda.device_of(x):
        kernel[grid](
            padded,
            denoised,
            height,
            width,
            padded.shape[2],
            padded.shape[1] * padded.shape[2],
            1 / (area * h**2),
            2 * sigma**2,
            HALF=half,
            DISTANCE=patch_distance,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            **OPTIONS,
        )
    return denoised[None].to(x.dtype)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    padded,  # (C, H + 2 border, W + 2 border), border = HALF + DISTANCE
    denoised,  # (C, H, W)
    height,
    width,
    padded_width,
    padded_size,  # values of a channel
    per_distance,  # 1 / (area · h²)
    expected,  # 2σ²
    HALF: tl.constexpr,
    DISTANCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Denoise ROWS × COLUMNS pixels of one channel."""
    channel = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < height) & (column < width)
    here = padded + channel * padded_size + (row + DISTANCE) * padded_width + column + DISTANCE
    weighted = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for down in range(-DISTANCE, DISTANCE + 1):
        for right in range(-DISTANCE, DISTANCE + 1):
            there = here + down * padded_width + right
            distance = tl.zeros((ROWS, COLUMNS), tl.float32)
            for i in tl.static_range(1, 2 * HALF + 1):  # without the patch's first row and column
                for j in tl.static_range(1, 2 * HALF + 1):
                    at = i * padded_width + j
                    mine = tl.load(here + at, mask=inside, other=0.0)
                    difference = mine - tl.load(there + at, mask=inside, other=0.0)
                    distance += difference * difference - expected
            distance = tl.maximum(distance, 0.0) * per_distance
            power = -_LOG2_E * distance - _LEAST_SQUARES
            whole = tl.floor(power)
            weight = tl.exp2(whole) * (power - whole + 1)
            weight = tl.where(distance > _FARTHEST, 0.0, weight)
            centre = there + HALF * padded_width + HALF
            weighted += weight * tl.load(centre, mask=inside, other=0.0)
            total += weight
    result = denoised + (channel * height + row) * width + column
    tl.store(result, weighted / total, mask=inside)
