"""How an image is stored in its file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

WHITE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}  # the stored value of 1 under "dtype"

Kind = Literal["", "tiff", "imagej", "ome"]


@dataclass(frozen=True)
class ImageFormat:
    """How an image is stored in its file.

    Attributes:
        dtype: The type of the stored values: "uint8", "uint16", "int16", ... or "float32".
        alpha: The alpha channel, (H, W) of that dtype, or None.
        low: The stored value of 0, or one for each channel.
        high: The stored value of 1; by default 255, 65535, or 1 for floats.
        icc_profile: The colour profile, if the file has one for its grey or RGB values.
        resolution: Of a TIFF, pixels per unit along x and y, and the unit: "inch", "centimeter",
            another one that ImageJ or OME name, such as "um", or "none" if only their ratio is
            known. None if the file does not have it.
        kind: The kind of TIFF that it came from and is to be again: "tiff", or "imagej" or "ome",
            with their metadata; "" if it was no TIFF.
        axes: The axes of the stored image (`deepred_pl.axes`), such as "CYX"; "" if they are the
            usual ones, "YX" or "YXS".
        shape: The sizes of these axes.
        page: What it is of its file, such as "axes TCYX, page 0 of 12"; "" if it is all.
        metadata: Of ImageJ or OME, as `tifffile.imwrite` takes it, without axes and pixel size.
    """

    dtype: str = "uint8"
    alpha: np.ndarray | None = None
    low: float | tuple[float, ...] = 0.0
    high: float | tuple[float, ...] = math.nan
    icc_profile: bytes | None = None
    resolution: tuple[float, float, str] | None = None
    kind: Kind = ""
    axes: str = ""
    shape: tuple[int, ...] = ()
    page: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.high, float) and math.isnan(self.high):
            high = WHITE.get(self.dtype) or float(np.iinfo(self.dtype).max)
            object.__setattr__(self, "high", high)

    def suffix(self, channels: int) -> str:
        """The file suffix for images of this format: ".tif" for TIFFs and what PNG cannot store."""
        return ".png" if self.fits_png(channels) and not self.kind else ".tif"

    def fits_png(self, channels: int) -> bool:
        """Whether a PNG can store images of this format."""
        return not self.axes and self.dtype in ("uint8", "uint16") and channels in (1, 3)
