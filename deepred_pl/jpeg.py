"""The forward operator of JPEG files, whose measurement is their quantized coefficients."""

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from deepred_pl.checks import check_choice
from deepred_pl.image_format import ImageFormat
from deepred_pl.images import to_array
from deepred_pl.operators import Operator
from deepred_pl.pictures import FLIPPED_COLUMNS, FLIPPED_ROWS, TRANSPOSED, orientation_of
from deepred_pl.tiles import Region

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]

SIDE = 8  # of a block
WHITE = 255  # coefficients are those of 8-bit values, here in [0, 1]
LEVEL = 128 * SIDE / WHITE  # DC coefficient of the grey that JPEG subtracts from luminance
# ITU-T T.871 (JFIF): Y, Cb, Cr of red, green and blue.
YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)
# Factors of the coefficients of Y, Cb and Cr. Chrominance is quantized more coarsely, so that the
# prior knows more about it: with 1 the result had 0.1 dB less on astronaut and 0.8 dB less on
# coffee (quality 10, 128×128), and with 0.3 0.7 dB less and 0.7 dB more than with 0.5.
WEIGHTS = (1.0, 0.5, 0.5)
# The share of a cell, around its middle, in which the data term is 0: for Y, Cb and Cr. With 1 the
# prior moves coefficients to the border of their cells, though the middle is a better estimate: at
# quality 10 that costs 0.6 dB (astronaut, 128×128, each with its best λ), mostly in chrominance.
FLAT = (0.3, 0.0, 0.0)
# An image is stored with 8 bits: by this much less than half a quantization step the coefficients
# of a result may differ from those of the file, so that rounding seldom moves them further.
ROUNDING = 1.0 / WHITE
PROJECTIONS = 5  # more than one only matters where the last blocks are not full


class JPEG(Operator):
    """Coefficients of a JPEG file: colour transform, subsampling of chrominance and block DCT.

    A x is (1, K, rows, columns): for each square unit of the image, of 8×8 pixels, or 16×16 where
    chrominance is subsampled by 2, the K coefficients of its blocks, on the [0, 1] scale. The DCT
    and the subsampling have orthonormal rows (a mean of n pixels is multiplied by √n), so that
    errors have the scale of pixels, but those of chrominance count half (`WEIGHTS`). Each
    coefficient of the file is only known to within half a quantization step, its cell. The data
    term is 0 in the middle of a cell (`FLAT`), and the squared distance to that elsewhere; the
    result is moved into the cells. There is no other noise: `noise` is None. The image has the
    units and the format of the decoded file (`keeps_units`).

    `read_jpeg` gives the measurement and the operator of a file. Otherwise the operator has no
    quantization tables yet, and the datamodule takes those of the measurement, or compresses a
    ground truth.

    Args:
        quality: Quality in [1, 100] with which a ground truth is compressed, as Pillow defines it.
        subsampling: Its subsampling of chrominance.

    Raises:
        ValueError: An argument is out of range; or, when used, it has no file's tables.

    >>> y, operator = compress(torch.rand(1, 3, 33, 47), quality=50)
    >>> y.shape, operator.image_shape(tuple(y.shape))
    (torch.Size([1, 384, 3, 3]), (1, 3, 33, 47))
    """

    half_steps: Tensor
    flat: Tensor  # half of what is flat of each cell

    def __init__(self, quality: int = 10, subsampling: Subsampling = "4:2:0") -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise ValueError(f"the quality of a JPEG must be in [1, 100], got {quality}")
        check_choice("subsampling", subsampling, Subsampling)
        self.quality, self.subsampling = quality, subsampling
        self.size = (0, 0)  # of the image as it is stored, before its orientation is applied
        self.orientation = 1
        # Rows and columns of blocks of each component, Y, Cb and Cr, in a unit of factor × factor
        # pixels; none without a file.
        self.blocks: tuple[tuple[int, int], ...] = ()
        self.register_buffer("half_steps", torch.empty(0), persistent=False)
        self.register_buffer("flat", torch.empty(0), persistent=False)
        frequency, place = torch.arange(SIDE)[:, None], torch.arange(SIDE) + 0.5
        transform = torch.cos(math.pi / SIDE * frequency * place) * math.sqrt(2 / SIDE)
        transform[0] /= math.sqrt(2)
        self.register_buffer("transform", transform, persistent=False)
        self.register_buffer("colours", torch.tensor(YCBCR), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self._check_file()
        planes = turned(x, self.orientation)
        if len(self.blocks) > 1:
            planes = torch.einsum("dc,ncij->ndij", self.colours, planes)
        planes, values = _filled(planes, -1, self.factor), []
        for i, (rows, columns) in enumerate(self.blocks):
            coarse = (self.factor // (SIDE * rows), self.factor // (SIDE * columns))
            plane = planes[:, i : i + 1]
            if coarse != (1, 1):
                plane = _filled(plane, -2, coarse[0])
                plane = F.avg_pool2d(plane, coarse)
            # libjpeg fills columns before subsampling, and rows after it.
            plane = _filled(plane, -2, SIDE * rows)
            parts = plane.unflatten(-1, (-1, columns, SIDE)).unflatten(-4, (-1, rows, SIDE))[0, 0]
            parts = torch.einsum("ui,MriNcj,vj->rcuvMN", self.transform, parts, self.transform)
            values.append(self._gain(i) * parts.flatten(0, 3))  # (64 · blocks, down, across)
        return upright(torch.cat(values)[None], self.orientation)

    def decoded(self, y: Tensor, smooth: bool = False) -> Tensor:
        """The image with these coefficients, (1, C, H, W): a right inverse of A where it is full.

        Args:
            y: Coefficients, (1, K, rows, columns).
            smooth: Interpolate subsampled chrominance, as decoders do, instead of repeating it.
        """
        self._check_file()
        values, start = turned(y, self.orientation)[0], 0  # (K, down, across)
        size = [side * self.factor for side in values.shape[1:]]
        planes = []
        for i, (rows, columns) in enumerate(self.blocks):
            parts = values[start : start + rows * columns * SIDE**2]
            start += len(parts)
            parts = parts.unflatten(0, (rows, columns, SIDE, SIDE)) / self._gain(i)
            parts = torch.einsum("ui,rcuvMN,vj->MriNcj", self.transform, parts, self.transform)
            plane = parts.reshape(1, 1, values.shape[1] * rows * SIDE, -1)
            if list(plane.shape[2:]) != size:
                plane = F.interpolate(plane, size, mode="bilinear" if smooth else "nearest")
            planes.append(plane)
        image = torch.cat(planes, dim=1)[..., : self.size[0], : self.size[1]]
        if len(self.blocks) > 1:
            image = torch.einsum("cd,ndij->ncij", torch.linalg.inv(self.colours), image)
        return upright(image, self.orientation)

    def nearest(self, y: Tensor, measured: Tensor) -> Tensor:
        return measured.clamp(y - self.flat, y + self.flat)

    def first_guess(self, y: Tensor) -> Tensor:
        """The decoded file."""
        return self.decoded(y, smooth=True)

    @property
    def step(self) -> float:
        """The mean quantization step of the 4×4 lowest frequencies of luminance, in grey levels."""
        self._check_file()
        lowest = self.half_steps[0, : SIDE**2, 0, 0].view(SIDE, SIDE)[:4, :4]
        return float(2 * WHITE * lowest.mean())

    def keep_known(self, image: Tensor, y: Tensor) -> Tensor:
        """Move the coefficients of `image` into the cells of the file."""
        half = (self.half_steps - ROUNDING).clamp(min=0)
        for _ in range(PROJECTIONS):
            measured = self(image)
            image = image + self.decoded(measured.clamp(y - half, y + half) - measured)
        return image

    def share_in_cells(self, image: Tensor, y: Tensor) -> float:
        """The share of the file's coefficients whose cells have those of `image`, (1, C, H, W)."""
        known = self.half_steps.isfinite()
        within = (self(image) - y).abs() <= self.half_steps
        return float((within & known).sum() / known.sum())

    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        self._check_file()
        if measurement_shape != self.half_steps.shape:
            raise ValueError(
                f"expected coefficients {tuple(self.half_steps.shape)} of the JPEG file, got "
                f"{measurement_shape}; use those that read_jpeg returns with this operator"
            )
        height, width = self.size[::-1] if self.orientation in TRANSPOSED else self.size
        return (1, len(self.blocks), height, width)

    def reach(self) -> tuple[int, int] | None:
        """0, but None if units that are not full come first, because the image is turned."""
        height, width = self.size[::-1] if self.orientation in TRANSPOSED else self.size
        first = (self.orientation in FLIPPED_ROWS and height % self.factor) or (
            self.orientation in FLIPPED_COLUMNS and width % self.factor
        )
        return None if first else (0, 0)

    def cropped(self, region: Region) -> "JPEG":
        if not self.blocks:
            return self
        part = JPEG(self.quality, self.subsampling).to(self.half_steps.device)
        part.blocks, part.orientation, part.factor = self.blocks, self.orientation, self.factor
        sides = region[2:]
        part.size = sides[::-1] if self.orientation in TRANSPOSED else sides
        measured = region.measured(self.factor)
        part.half_steps, part.flat = measured.of(self.half_steps), measured.of(self.flat)
        return part

    def _gain(self, component: int) -> float:
        """By what the coefficients of a component are multiplied."""
        pixels = (self.factor // SIDE) ** 2 / math.prod(self.blocks[component])  # of each mean
        return WEIGHTS[component] * math.sqrt(pixels)

    def _check_file(self) -> None:
        if not self.blocks:
            raise ValueError(
                "this JPEG operator has no file's quantization tables: read_jpeg(path) returns one "
                "that has, with its measurement"
            )

    def extra_repr(self) -> str:
        if not self.blocks:
            return f"quality={self.quality}, subsampling={self.subsampling!r}"
        return f"{_kind(self.blocks)}, mean quantization step {self.step:.0f} grey levels"


def read_jpeg(path: str | os.PathLike) -> tuple[Tensor, JPEG]:
    """Read the measurement and the operator of a JPEG file, grey or in colour.

    Returns:
        The coefficients, (1, K, rows, columns), and the operator with the file's quantization
        tables, which together are an inverse problem: `InverseProblem(*read_jpeg(path))`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a JPEG file, or of a kind that is not supported.
    """
    try:
        import jpeglib
    except ImportError as error:
        raise ValueError(
            "the coefficients of JPEG files are read by the package jpeglib: pip install jpeglib; "
            "on Windows it must be compiled"
        ) from error
    try:
        with Image.open(path) as picture:
            kind, orientation = picture.format, orientation_of(picture)
            picture.load()
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"expected a complete JPEG file, cannot read {path}: {error}") from error
    if kind not in ("JPEG", "MPO"):
        raise ValueError(
            f"expected a JPEG file, got {kind}: {path}; if it was a JPEG once, its coefficients "
            "are lost, and only noise can be removed"
        )
    stored = jpeglib.read_dct(str(path))
    planes = [stored.Y] if stored.Cb is None else [stored.Y, stored.Cb, stored.Cr]
    colours = stored.jpeg_color_space.name.removeprefix("JCS_")
    if colours not in ("GRAYSCALE", "YCbCr"):
        raise ValueError(
            f"expected a JPEG file in grey or YCbCr, as cameras write, got {colours} in "
            f"{path}; convert it to PNG, and restore that"
        )
    largest = stored.samp_factor.max(axis=0)
    unit = SIDE * int(largest.max())
    operator = JPEG()
    operator.size, operator.orientation = (stored.height, stored.width), orientation
    operator.factor = unit
    operator.blocks = tuple(
        (int(unit // SIDE * rows // largest[0]), int(unit // SIDE * columns // largest[1]))
        for rows, columns in stored.samp_factor
    )
    down, across = (math.ceil(side / unit) for side in operator.size)
    values: list[Tensor] = []
    halves: list[Tensor] = []
    flats: list[Tensor] = []
    for i, (plane, (rows, columns)) in enumerate(zip(planes, operator.blocks, strict=True)):
        if unit % (SIDE * rows) or unit % (SIDE * columns):
            raise ValueError(
                f"the chrominance of {path} is subsampled by a fraction, which is not supported; "
                "convert it to PNG, and restore that"
            )
        table = torch.from_numpy(stored.get_component_qt(i).astype(np.float32)) / WHITE
        table = operator._gain(i) * table
        # Blocks that only fill the last units are not in the file, and may have any value.
        half = torch.full((down * rows, across * columns, SIDE, SIDE), math.inf)
        value = torch.zeros(half.shape)
        half[: plane.shape[0], : plane.shape[1]] = table / 2
        value[: plane.shape[0], : plane.shape[1]] = torch.from_numpy(plane).float() * table
        if i == 0:
            value[..., 0, 0] += LEVEL
        flat = torch.where(half.isfinite(), FLAT[i] * half, math.inf)
        for into, blocks in ((values, value), (halves, half), (flats, flat)):
            parts = blocks.view(down, rows, across, columns, SIDE, SIDE)
            into.append(parts.permute(1, 3, 4, 5, 0, 2).flatten(0, 3))
    operator.half_steps = upright(torch.cat(halves)[None], orientation)
    operator.flat = upright(torch.cat(flats)[None], orientation)
    return upright(torch.cat(values)[None], orientation), operator


def compress(
    truth: Tensor, quality: int, subsampling: Subsampling = "4:2:0"
) -> tuple[Tensor, JPEG]:
    """Compress an image, (1, 1 or 3, H, W) in [0, 1], by Pillow; as `read_jpeg` of that file.

    Raises:
        ValueError: It has another number of channels.
    """
    if truth.shape[1] not in (1, 3):
        raise ValueError(f"a JPEG has 1 or 3 channels, got an image of {truth.shape[1]}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.jpg"
        array = to_array(truth, ImageFormat())  # (H, W, C)
        picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        picture.save(path, quality=quality, subsampling=subsampling)
        return read_jpeg(path)


def turned(x: Tensor, orientation: int) -> Tensor:
    """An upright image (..., H, W) as it is stored with an orientation of EXIF, 1 to 8."""
    if orientation in FLIPPED_ROWS:
        x = x.flip(-2)
    if orientation in FLIPPED_COLUMNS:
        x = x.flip(-1)
    return x.mT if orientation in TRANSPOSED else x


def upright(x: Tensor, orientation: int) -> Tensor:
    """Undo `turned`."""
    x = x.mT if orientation in TRANSPOSED else x
    if orientation in FLIPPED_COLUMNS:
        x = x.flip(-1)
    return x.flip(-2) if orientation in FLIPPED_ROWS else x


def _filled(x: Tensor, dim: int, multiple: int) -> Tensor:
    """x with its last value repeated, up to a multiple of values, as encoders do."""
    missing = -x.shape[dim] % multiple
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1).expand(shape)], dim)


def _kind(blocks: Sequence[tuple[int, int]]) -> str:
    """How chrominance is subsampled, in the usual notation."""
    if len(blocks) == 1:
        return "grey"
    rows, columns = blocks[0][0] // blocks[1][0], blocks[0][1] // blocks[1][1]
    return f"4:{4 // columns}:{0 if rows > 1 else 4 // columns}"
