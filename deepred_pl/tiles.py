"""Cut an image into tiles, and blend the restored tiles."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Pixels = TypeVar("Pixels", np.ndarray, Tensor)


class Region(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def middle(cls, height: int, width: int, side: int) -> "Region":
        """The central side × side pixels of height × width, or fewer in a smaller image."""
        rows, columns = min(side, height), min(side, width)
        return cls((height - rows) // 2, (width - columns) // 2, rows, columns)

    def of(self, image: Pixels) -> Pixels:
        """The region of an image (..., H, W)."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def measured(self, factor: int) -> "Region":
        """The region of a measurement of one value for factor × factor pixels, rounded up."""
        top, left, height, width = self
        return Region(top // factor, left // factor, -(-height // factor), -(-width // factor))

    def check(self, height: int, width: int, multiple: int = 1) -> None:
        """Refuse a region that is not within height × width pixels.

        Raises:
            ValueError: It is not, or it does not begin and end at multiples of `multiple`, or at
                the end of the image.
        """
        within = min(self.top, self.left) >= 0 and min(self.height, self.width) > 0
        if not (within and self.top + self.height <= height and self.left + self.width <= width):
            raise ValueError(
                f"expected a region [top, left, height, width] within {height}×{width} pixels, "
                f"got {list(self)}"
            )
        ends = [(self.top + self.height, height), (self.left + self.width, width)]
        cuts = [self.top, self.left, *(end for end, side in ends if end < side)]
        if any(cut % multiple for cut in cuts):
            raise ValueError(
                f"expected a region [top, left, height, width] in multiples of the factor "
                f"{multiple}, got {list(self)}"
            )


class Tiling(NamedTuple):
    """How an image is cut.

    Attributes:
        regions: The tiles, which cover the image.
        overlap: Pixels that neighbours share.
        margin: Rows and columns next to a cut that are not used.
    """

    regions: Sequence[Region]
    overlap: int
    margin: tuple[int, int] = (0, 0)


def cut(height: int, width: int, tile: int, overlap: int, multiple: int = 1) -> list[Region]:
    """Cover an image of height × width pixels with tiles, row by row.

    All have one size, tile × tile or the image's side if that is smaller, and are spread evenly, so
    that neighbours share at least `overlap` pixels (up to `multiple` fewer). If the image's sides
    are not multiples of `multiple`, the last ones are smaller.

    Args:
        height: Rows of the image.
        width: Columns of the image.
        tile: Side of a tile.
        overlap: Pixels that neighbours share, below `tile`.
        multiple: Tiles begin at multiples of it; `tile` is rounded up.

    Raises:
        ValueError: Not 0 <= overlap < tile.

    >>> [tuple(region) for region in cut(100, 60, 64, 16)]
    [(0, 0, 64, 60), (36, 0, 64, 60)]
    """
    if not 0 <= overlap < tile:
        raise ValueError(
            f"expected an overlap of at least 0 and less than the tile's {tile} pixels, got "
            f"{overlap}; an eighth of the tile is enough"
        )
    rows, columns = (_spread(side, tile, overlap, multiple) for side in (height, width))
    return [Region(top, left, h, w) for top, h in rows for left, w in columns]


def _spread(side: int, tile: int, overlap: int, multiple: int) -> list[tuple[int, int]]:
    """Start and length of the tiles along one side."""
    tile = math.ceil(tile / multiple) * multiple
    if tile >= side:
        return [(0, side)]
    count = math.ceil((side - overlap) / (tile - overlap))
    last = math.ceil(side / multiple) * multiple - tile
    starts = [i * last / (count - 1) for i in range(count)]
    aligned = dict.fromkeys(round(start / multiple) * multiple for start in starts)
    return [(start, min(tile, side - start)) for start in aligned]  # without duplicates


def blend(images: Iterable[Tensor], tiling: Tiling) -> Tensor:
    """Blend tiles (1, C, H', W') into an image (1, C, H, W).

    A tile's weight is 0 in the margin of its cuts, sin²(π/2 · (d + ½) / (overlap − 2 margin)) at d
    pixels from the margin, and 1 further inside. The weights of two tiles that share `overlap`
    pixels add up to 1; where more is shared, they are normalized.
    """
    regions, overlap, margin = tiling
    height = max(region.top + region.height for region in regions)
    width = max(region.left + region.width for region in regions)
    total, weights = torch.zeros(()), torch.zeros(1, 1, height, width)
    for region, image in zip(regions, images, strict=True):
        image = image.cpu()
        if total.ndim == 0:
            total = torch.zeros(1, image.shape[1], height, width)
        rows = _fade(region.top, region.height, height, overlap, margin[0])
        columns = _fade(region.left, region.width, width, overlap, margin[1])
        weight = rows[:, None] * columns  # (H', W')
        region.of(total).add_(image * weight)
        region.of(weights).add_(weight)
    return total / weights


def _fade(start: int, length: int, side: int, overlap: int, margin: int) -> Tensor:
    """The weights along one side of a tile; the image's borders are not cuts."""
    ramp_length = max(1, overlap - 2 * margin)
    d = (torch.arange(length) + 0.5 - margin).clamp(0, ramp_length)
    ramp = torch.sin(math.pi / 2 * d / ramp_length).square()
    ramp[: min(margin, length)] = 0
    weights = torch.ones(length)
    if start > 0:
        weights = weights * ramp
    if start + length < side:
        weights = weights * ramp.flip(0)
    return weights
