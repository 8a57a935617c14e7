"""Read image files as tensors, and write tensors as files of the same depth and range."""

import io
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import putchunk
from torch import Tensor

from deepred_pl.files import write_bytes
from deepred_pl.memory import check_memory
from deepred_pl.sources import find_image

IntensityRange = Literal["dtype", "minmax", "percentile"] | Sequence[float] | Sequence[list[float]]

WHITE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}  # the stored value of 1 under "dtype"
PERCENTILES = {"minmax": (0, 100), "percentile": (0.1, 99.9)}  # the stored values of 0 and 1
# Formats that Pillow may detect; it also knows PostScript, which is a program.
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000")
NPY_START = b"\x93NUMPY"
PLAIN_TIFF = (1, 2)  # photometric interpretations: black is zero, RGB
TIFF_DEPTHS = (1, 8, 16, 32, 64)  # bits; others would be unpacked but not scaled
YCBCR, JPEG = 6, (6, 7)  # tifffile decodes YCbCr to RGB only with these compressions
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_UNITS = {1: "none", 2: "inch", 3: "centimeter"}
ICC_TAG, ORIENTATION_TAG = 34675, 274
NODATA_TAG = 42113  # of GDAL: the value of missing pixels, as text
# A PNG file's signature and IHDR chunk end at byte 33; byte 24 is the bit depth.
PNG_HEADER, PNG_DEPTH_AT = 33, 24


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
        tiff: Whether it came from a TIFF file, and is to be one again.
    """

    dtype: str = "uint8"
    alpha: np.ndarray | None = None
    low: float | tuple[float, ...] = 0.0
    high: float | tuple[float, ...] = math.nan
    icc_profile: bytes | None = None
    resolution: tuple[float, float, str] | None = None
    tiff: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.high, float) and math.isnan(self.high):
            high = WHITE.get(self.dtype) or float(np.iinfo(self.dtype).max)
            object.__setattr__(self, "high", high)

    def suffix(self, channels: int) -> str:
        """The file suffix for images of this format: ".tif" for TIFFs and what PNG cannot store."""
        return ".png" if self.fits_png(channels) and not self.tiff else ".tif"

    def fits_png(self, channels: int) -> bool:
        """Whether a PNG can store images of this format."""
        return self.dtype in ("uint8", "uint16") and channels in (1, 3)


def read_image(
    path: str | os.PathLike,
    intensity_range: IntensityRange = "dtype",
    page: int | None = None,
    missing: bool = False,
) -> tuple[Tensor, ImageFormat]:
    """Read a PNG, JPEG, TIFF or NPY image.

    The orientation noted in the file is applied. An alpha channel is returned with the format.

    Args:
        path: The file, or "sample:NAME" or "set:SET/IMAGE" (`deepred_pl.sources`).
        intensity_range: Which stored values become 0 and 1, as in `to_tensor`.
        page: Page of a TIFF file with several pages, from 0.
        missing: Allow missing values, as in `to_tensor`; also those of a TIFF's nodata tag.

    Returns:
        The image, float32 (1, C, H, W), and its format.

    Raises:
        FileNotFoundError: No such file.
        OSError: An image of a set that cannot be downloaded.
        ValueError: Not an image, or not one that can be read; the message says why.
    """
    source = find_image(path)
    if isinstance(source, np.ndarray):
        return to_tensor(source, intensity_range, str(path), missing)
    try:
        array, has_alpha, metadata = _decode(source, page)
    except Exception as error:  # decoders raise anything on a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"expected a PNG, JPEG, TIFF or NPY image, cannot read {path}: {reason}"
        ) from error
    alpha = None
    array = array if missing else np.ma.getdata(array)  # a mask may be black where GDAL has nodata
    if has_alpha:
        array, alpha = array[..., :-1], array[..., -1]
    image, values = to_tensor(array, intensity_range, str(path), missing)
    return image, replace(
        metadata,
        dtype=values.dtype,
        alpha=None if alpha is None else alpha.astype(values.dtype),
        low=values.low,
        high=values.high,
        icc_profile=_profile_for(image.shape[1], metadata.icc_profile),
    )


def to_tensor(
    array: np.ndarray,
    intensity_range: IntensityRange = "dtype",
    name: str = "the image",
    missing: bool = False,
) -> tuple[Tensor, ImageFormat]:
    """Convert an array of stored values, (H, W) or (H, W, C), to an image.

    Args:
        array: Integers or floats; also a `numpy.ma.MaskedArray`.
        intensity_range: Which stored values become 0 and 1. "dtype": 0 and 255 or 65535 for 8 and
            16 bits; floats are in [0, 1] already, up to noise. "minmax": the minimum and the
            maximum of each channel; "percentile": the 0.1 and 99.9 percentiles. `[lo, hi]`: these
            stored values, which may be lists with one for each channel. Values outside are not
            clipped.
        name: The image's name in error messages.
        missing: Return masked, NaN and infinite values as NaN, instead of refusing them.

    Returns:
        The image, float32 (1, C, H, W), and its format.

    Raises:
        ValueError: Not an image, or one that cannot be scaled this way; the message says why.

    >>> image, image_format = to_tensor(np.array([[100, 300]], np.uint16), [0, 400])
    >>> image.flatten(), image_format.high
    (tensor([0.2500, 0.7500]), 400.0)
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.size == 0:
        raise ValueError(
            f"expected one image, (height, width) or (height, width, channels), got {array.shape} "
            f"in {name}; take one image of it"
        )
    invalid = np.ma.getmaskarray(array) if np.ma.is_masked(array) else np.zeros(array.shape, bool)
    array = np.ma.getdata(array)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected integers or floats, got {array.dtype} in {name}; convert it")
    dtype = "float32" if array.dtype.kind == "f" else array.dtype.name
    if array.dtype.kind == "f":
        invalid = invalid | ~np.isfinite(array)
    if invalid.all() or (invalid.any() and not missing):
        raise ValueError(
            f"expected finite values, but {invalid.sum()} of {array.size} in {name} are NaN, "
            "infinite or marked as missing; replace them first"
        )
    height, width, channels = array.shape
    image = np.empty((1, channels, height, width), np.float32)
    known = [array[..., i] for i in range(channels)]
    if invalid.any():
        known = [known[i][~invalid[..., i]] for i in range(channels)]
    low, high = _stored_range(known, dtype, intensity_range, name)
    for i in range(channels):  # one at a time: the float64 copy dominates the memory
        values = array[..., i].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # overflow is checked below
            values -= low[i]
            values /= high[i] - low[i]
            image[0, i] = values
    missing_values = invalid.transpose(2, 0, 1)  # (C, H, W)
    if not (np.isfinite(image[0]) | missing_values).all():
        raise ValueError(
            f"expected values near the range [{low[0]:g}, {high[0]:g}], got {_span(known)} in "
            f"{name}; set data.intensity_range to the [lo, hi] that are black and white"
        )
    image[0, missing_values] = np.nan
    if len({*low}) == len({*high}) == 1:
        return torch.from_numpy(image), ImageFormat(dtype, None, low[0], high[0])
    return torch.from_numpy(image), ImageFormat(dtype, None, tuple(low), tuple(high))


def to_array(image: Tensor, image_format: ImageFormat) -> np.ndarray:
    """Convert an image (1, C, H, W) to an array (H, W, C) of stored values; undoes `to_tensor`.

    Integers are rounded, and clipped to the range of their type.
    """
    scaled = image[0].detach().cpu().double().movedim(0, -1).numpy()  # (C, H, W) -> (H, W, C)
    low, high = np.asarray(image_format.low), np.asarray(image_format.high)
    values = low + scaled * (high - low)
    if image_format.dtype != "float32":
        info = np.iinfo(image_format.dtype)
        # The largest float64 that is cast correctly: 2⁶³ − 1 is not representable.
        values = np.rint(values).clip(info.min, np.nextafter(info.max + 1.0, 0))
    return np.ascontiguousarray(values.astype(image_format.dtype))


def write_image(
    path: str | os.PathLike, image: Tensor, image_format: ImageFormat | None = None
) -> None:
    """Write an image (1, C, H, W) in [0, 1] atomically as PNG or TIFF, by the suffix of `path`.

    Raises:
        OSError: It cannot be written.
        ValueError: A file of that suffix cannot store it.
    """
    image_format = image_format or ImageFormat()
    array = to_array(image, image_format)
    channels = array.shape[-1]
    suffix, best = Path(path).suffix.lower(), image_format.suffix(channels)
    as_png = suffix == ".png" and image_format.fits_png(channels)
    if not (as_png or suffix in (".tif", ".tiff")):
        raise ValueError(
            f"expected a name ending in {best} for {channels} channels of {image_format.dtype}, "
            f"got {path}; rename it"
        )
    alpha = image_format.alpha
    if alpha is not None and alpha.shape == array.shape[:2]:
        array = np.concatenate([array, alpha[..., None].astype(array.dtype)], axis=-1)
    array = array[..., 0] if array.shape[-1] == 1 else array
    profile = _profile_for(channels, image_format.icc_profile)
    if suffix == ".png":
        encoded = _encode_png(array, profile)
    else:
        encoded = _encode_tiff(array, channels, profile, image_format.resolution)
    write_bytes(path, encoded)


def _stored_range(
    known: Sequence[np.ndarray], dtype: str, intensity_range: IntensityRange, name: str
) -> tuple[list[float], list[float]]:
    """The stored values that become 0 and 1, of each channel; `known` has each channel's values."""
    word = intensity_range if isinstance(intensity_range, str) else ""
    count = len(known)
    if word in PERCENTILES:
        ranges = [
            [float(v) for v in np.percentile(c.astype(np.float64), PERCENTILES[word])]
            for c in (channel if channel.size else np.zeros(1) for channel in known)
        ]
        if all(low == high for low, high in ranges):
            low, high = ranges[0]
            raise ValueError(
                f"expected values that differ, but the {word} range of {name} is "
                f"[{low:g}, {high:g}]; set data.intensity_range to [lo, hi]"
            )
        # A constant channel becomes 0.
        highs = [high if high > low else low + 1 for low, high in ranges]
        return [low for low, _ in ranges], highs
    if word == "dtype":
        if dtype not in WHITE:
            raise ValueError(
                f"expected 8-bit, 16-bit or float values, got {dtype} in {name}; set "
                "intensity_range to minmax, percentile or [lo, hi]"
            )
        white = WHITE[dtype]
        least, largest = _extremes(known)
        if least < -0.5 * white or largest > 1.5 * white:
            low = least if least < -0.1 * largest else 0.0  # not noise around 0
            raise ValueError(
                f"expected float values in [0, 1], up to noise, got {_span(known)} in {name}; set "
                "data.intensity_range to the [lo, hi] that are black and white, such as "
                f"[{low:.4g}, {rounded_up(largest):.4g}]{_marked(known, least)}"
            )
        return [0.0] * count, [white] * count
    try:
        ends = () if word else intensity_range
        lows, highs = (np.broadcast_to(np.asarray(v, np.float64), count).tolist() for v in ends)
        is_range = all(a < b < math.inf and a > -math.inf for a, b in zip(lows, highs, strict=True))
    except (TypeError, ValueError):
        is_range = False
    if not is_range:
        raise ValueError(
            "data.intensity_range must be dtype, minmax, percentile or two finite numbers "
            f"[lo, hi], lo < hi, got {intensity_range!r} for {name}; lo and hi may be lists of "
            f"{count}, one for each channel"
        )
    return lows, highs


def rounded_up(value: float) -> float:
    """The largest number of as many bits, or else the next number of two digits."""
    for bits in (8, 10, 12, 14, 16):
        if 2 ** (bits - 1) <= value < 1.1 * 2**bits:  # up to noise
            return 2**bits - 1
    if value <= 0:
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / step) * step


def _extremes(known: Sequence[np.ndarray]) -> tuple[float, float]:
    values = [channel for channel in known if channel.size]
    return min(float(c.min()) for c in values), max(float(c.max()) for c in values)


def _marked(known: Sequence[np.ndarray], least: float) -> str:
    """A hint if the least value is one that marks missing values."""
    count = sum(int((channel == least).sum()) for channel in known)
    if least >= 0 or count < 2:
        return ""
    return f"; if {least:g}, the value of {count}, marks missing ones, set them to NaN"


def _span(known: Sequence[np.ndarray]) -> str:
    return "[{:g}, {:g}]".format(*_extremes(known))


def _decode(path: Path, page: int | None) -> tuple[np.ndarray, bool, ImageFormat]:
    """The stored values, (H, W) or (H, W, C), whether alpha comes last, and the metadata."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError("the file is empty")
    check_memory(size, "reading it", "save a part of it")
    with path.open("rb") as file:
        start = file.read(len(NPY_START))
    if start == NPY_START and not page:
        return _decode_npy(path), False, ImageFormat()
    data = path.read_bytes()
    if data.startswith(TIFF_STARTS):
        return _decode_tiff(data, page)
    if page:
        raise ValueError(f"it has no page {page}, only TIFF files have pages; leave page out")
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("its contents are in none of these formats") from None
    with opened as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format != "MPO":  # a camera's MPO begins with the photo
            raise ValueError(f"it has {frames} frames; save one of them")
        _refuse_bombs(picture.height, picture.width, len(picture.getbands()))
        if picture.format == "PNG" and data[PNG_DEPTH_AT] == 16:
            array = imagecodecs.png_decode(data)  # Pillow would round 16-bit colour to 8 bits
            array = _upright(array, _orientation(picture))
            has_alpha = array.ndim == 3 and array.shape[-1] in (2, 4)
        else:
            array, has_alpha = _pixels(picture)
        return array, has_alpha, ImageFormat(icc_profile=picture.info.get("icc_profile"))


def _decode_npy(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # only the header is read
    if array.ndim > 1:
        height, width, *channels = array.shape
        _refuse_bombs(height, width, math.prod(channels), array.dtype.itemsize)
    return np.array(array)


def _decode_tiff(data: bytes, number: int | None) -> tuple[np.ndarray, bool, ImageFormat]:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = len(file.pages)
        if number is None and pages > 1:
            raise ValueError(f"it has {pages} pages; set data.page to one of 0 to {pages - 1}")
        number = number or 0
        if not 0 <= number < pages:
            raise ValueError(f"it has no page {number}; set data.page to one of 0 to {pages - 1}")
        page = file.pages[number].aspage()
        if page.imagedepth != 1:
            raise ValueError(f"it is a volume of depth {page.imagedepth}; save one slice")
        bands, bytes_each = page.samplesperpixel, np.dtype(page.dtype or np.uint8).itemsize
        _refuse_bombs(page.imagelength, page.imagewidth, bands, bytes_each)
        if page.bitspersample not in TIFF_DEPTHS:
            raise ValueError(
                f"{page.bitspersample} bits per value are not supported; save it with 8 or 16 bits"
            )
        orientation = page.tags.valueof(ORIENTATION_TAG, 1)
        decoded = page.photometric == YCBCR and page.compression in JPEG
        if page.photometric in PLAIN_TIFF or decoded:
            array = page.asarray()
            if page.axes.startswith("S"):  # separate planes: (C, H, W) -> (H, W, C)
                array = np.moveaxis(array, 0, -1)
            array = _upright(array, orientation)
            has_alpha = bool(page.extrasamples) and page.extrasamples[-1] in (1, 2)
            has_alpha = has_alpha and array.ndim == 3
        elif page.dtype in (np.uint8, np.bool_):  # palettes, CMYK, YCbCr, inverted grey
            with Image.open(io.BytesIO(data), formats=("TIFF",)) as picture:
                picture.seek(number)
                array, has_alpha = _pixels(picture)
        else:
            raise ValueError("its colour layout is not supported; save it as RGB")
        unit = (file.imagej_metadata or {}).get("unit") or TIFF_UNITS.get(page.resolutionunit)
        pixels = _ome_resolution(file.ome_metadata) or (*page.get_resolution(), unit or "none")
        resolution = _resolution(*pixels, orientation)
        icc_profile = page.tags.valueof(ICC_TAG)
        array = _without_nodata(array, page.tags.valueof(NODATA_TAG))
    return array, has_alpha, ImageFormat(icc_profile=icc_profile, resolution=resolution, tiff=True)


def _without_nodata(array: np.ndarray, tag: object) -> np.ndarray:
    """The array, masked where it has the value of GDAL's nodata tag, if there is one."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            value = np.array(float(str(tag).strip("\0 "))).astype(array.dtype)
        fits = array.dtype.kind == "f" or float(value) == float(str(tag).strip("\0 "))
    except ValueError:  # no number, such as "none"
        return array
    return np.ma.masked_where(array == value, array) if fits else array


def _ome_resolution(xml: str | None) -> tuple[float, float, str] | None:
    """Pixels per unit along x and y, and the unit, of an OME-TIFF that has them."""
    try:
        image = tifffile.xml2dict(xml or "")["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
        unit = str(pixels.get("PhysicalSizeXUnit", "um")).replace("µ", "u").replace("μ", "u")
        return 1 / pixels["PhysicalSizeX"], 1 / pixels["PhysicalSizeY"], unit
    except Exception:  # not there, or damaged: an image is read without its metadata, too
        return None


def _refuse_bombs(height: int, width: int, bands: int, bytes_each: int = 1) -> None:
    """Refuse an image that is too large by its header, before it is decoded.

    The limit is Pillow's own, which a program may set.
    """
    pixels, limit = height * width, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels * max(1, bands // 4) > 2 * limit:
        raise ValueError(
            f"its header promises {height}×{width} pixels in {bands} channels, which may be a "
            f"decompression bomb; to read more than {2 * limit} pixels set "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )
    # As decoded, and as float32; and float64 of one channel with temporaries.
    needed = pixels * (bands * (bytes_each + 4) + 16)
    check_memory(needed, "reading it", "save a part of it")


def _pixels(picture: Image.Image) -> tuple[np.ndarray, bool]:
    """A picture's 8-bit grey or RGB values, upright, and whether alpha comes last."""
    picture.load()  # applies a TIFF's orientation, and removes the tag
    if picture.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"its mode {picture.mode} is not supported; save it with 8 or 16 bits")
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    transparent = picture.has_transparency_data
    array = np.asarray(picture.convert(mode + "A" if transparent else mode))
    return _upright(array, _orientation(picture)), transparent


def _orientation(picture: Image.Image) -> int:
    return picture.getexif().get(ORIENTATION_TAG, 1)


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror (H, W, ...) by the orientation of EXIF and TIFF, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def _resolution(x: float, y: float, unit: str, orientation: int) -> tuple[float, float, str] | None:
    """The resolution of the upright image; None for placeholder values."""
    if not (0 < x < math.inf and 0 < y < math.inf) or x == y == 1:
        return None
    x, y = (y, x) if orientation > 4 else (x, y)
    return float(x), float(y), unit


def _profile_for(channels: int, profile: bytes | None) -> bytes | None:
    """The profile if it is for this number of channels: one for CMYK would be wrong for RGB."""
    space = {1: b"GRAY", 3: b"RGB "}.get(channels)
    return profile if profile and profile[16:20] == space else None


def _encode_png(array: np.ndarray, profile: bytes | None) -> bytes:
    png = bytes(imagecodecs.png_encode(array))  # Pillow does not write 16-bit colour
    if profile is None:
        return png
    chunk = io.BytesIO()
    putchunk(chunk, b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))
    return png[:PNG_HEADER] + chunk.getvalue() + png[PNG_HEADER:]


def _encode_tiff(
    array: np.ndarray,
    channels: int,
    profile: bytes | None,
    resolution: tuple[float, float, str] | None,
) -> bytes:
    samples = 1 if array.ndim == 2 else array.shape[-1]
    colours = 3 if channels == 3 else 1
    extra = ["unspecified"] * (channels - colours) + ["unassalpha"] * (samples - channels)
    unit = resolution[2] if resolution else "none"
    known_unit = unit in TIFF_UNITS.values()
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        array,
        photometric="rgb" if colours == 3 else "minisblack",
        planarconfig="contig" if samples > 1 else None,
        extrasamples=extra or None,
        resolution=resolution and resolution[:2],
        resolutionunit=unit if known_unit else "none",
        # Other units are where ImageJ looks for them.
        description=None if known_unit else f"ImageJ=1.11a\nunit={unit}\n",
        metadata=None,
        iccprofile=profile,
    )
    return buffer.getvalue()
