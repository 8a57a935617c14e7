"""Image files to tensors and back, at the file's depth and range, with what the file says."""

import io
import math
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo, putchunk
from torch import Tensor

from deepred_pl.datasets import PREFIX, find_image
from deepred_pl.memory import as_text, free_memory

IntensityRange = Literal["dtype", "minmax", "percentile"] | Sequence[float]

WHITE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}  # the stored value of 1 under "dtype"
PERCENTILES = {"minmax": (0, 100), "percentile": (0.1, 99.9)}  # the stored values of 0 and 1
# What Pillow may take a file for; among what else it knows is PostScript, which is a program.
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000")
NPY_START = b"\x93NUMPY"
PLAIN_TIFF = (1, 2)  # photometric interpretations: black is zero, RGB
TIFF_DEPTHS = (1, 8, 16, 32, 64)  # bits; others are unpacked, and not scaled
YCBCR, JPEG = 6, (6, 7)  # another, which is decoded to RGB with these compressions alone
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_UNITS = {1: "none", 2: "inch", 3: "centimeter"}
PER_METRE = {"inch": 1 / 0.0254, "centimeter": 100}
ICC_TAG, ORIENTATION_TAG = 34675, 274
# Texts to keep: TIFF tag and PNG keyword.
TEXTS = {270: "Description", 306: "Creation Time", 315: "Author", 33432: "Copyright"}
# A PNG file's signature and IHDR chunk end at byte 33; byte 24 is the bit depth.
PNG_HEADER, PNG_DEPTH_AT = 33, 24


@dataclass(frozen=True)
class ImageFormat:
    """How an image was stored: what it takes to store a restored image alike.

    Attributes:
        dtype: The type of the stored values: "uint8", "uint16", "int16", ... or "float32".
        alpha: The transparency kept aside, (H, W) of that dtype, or None.
        low: The stored value of 0.
        high: The stored value of 1; by default 255, 65535, 1 for floats, after the dtype.
        icc_profile: The colour profile, if the file has one for its grey or RGB values.
        resolution: Pixels per unit along x and y, and the unit: "inch", "centimeter", or "none"
            where only their ratio is known. None: the file does not tell.
        texts: "Description", "Author", "Copyright" and "Creation Time", as far as they are known.
    """

    dtype: str = "uint8"
    alpha: np.ndarray | None = None
    low: float = 0.0
    high: float = math.nan
    icc_profile: bytes | None = None
    resolution: tuple[float, float, str] | None = None
    texts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if math.isnan(self.high):
            high = WHITE.get(self.dtype) or float(np.iinfo(self.dtype).max)
            object.__setattr__(self, "high", high)

    def suffix(self, channels: int) -> str:
        """The file suffix for images of this format: ".png", or ".tif" where PNG cannot."""
        return ".png" if self.dtype in ("uint8", "uint16") and channels in (1, 3) else ".tif"


def read_image(
    path: str | os.PathLike, intensity_range: IntensityRange = "dtype", page: int | None = None
) -> tuple[Tensor, ImageFormat]:
    """Read a PNG, JPEG, TIFF or NPY image.

    Orientation noted in the file is applied. Transparency is kept aside.

    Args:
        path: The file, or "set:SET/IMAGE" for an image of `deepred_pl.datasets`.
        intensity_range: Which stored values become 0 and 1, as in `to_tensor`.
        page: Page of a TIFF file that has several, from 0.

    Returns:
        The image, float32 (1, C, H, W), and its format.

    Raises:
        FileNotFoundError: No such file.
        OSError: An image of a set that cannot be downloaded.
        ValueError: Not an image, or not one that can be read; the message says why.
    """
    path = find_image(str(path)) if str(path).startswith(PREFIX) else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an image file, found none at {path}; check the path")
    try:
        array, has_alpha, metadata = _decode(path, page)
    except Exception as error:  # decoders raise what they like at a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"expected a PNG, JPEG, TIFF or NPY image, cannot read {path}: {reason}"
        ) from error
    alpha = None
    if has_alpha:
        array, alpha = array[..., :-1], array[..., -1]
    image, values = to_tensor(array, intensity_range, str(path))
    return image, replace(
        metadata,
        dtype=values.dtype,
        alpha=None if alpha is None else alpha.astype(values.dtype),
        low=values.low,
        high=values.high,
        icc_profile=_profile_for(image.shape[1], metadata.icc_profile),
    )


def to_tensor(
    array: np.ndarray, intensity_range: IntensityRange = "dtype", name: str = "the image"
) -> tuple[Tensor, ImageFormat]:
    """An array of stored values, (H, W) or (H, W, C), as an image.

    Args:
        array: Integers or floats.
        intensity_range: Which stored values become 0 and 1. "dtype": 0 and 255 or 65535 for 8 and
            16 bits; floats are in [0, 1] already, give or take noise. "minmax": the least and the
            greatest; "percentile": the 0.1 and 99.9 percentiles. `[lo, hi]`: these, in stored
            units, taken at their word. Values beyond are not clipped.
        name: What error messages call it.

    Returns:
        The image, float32 (1, C, H, W), and its format.

    Raises:
        ValueError: Not an image, or not one that can be scaled so; the message says why.

    >>> image, image_format = to_tensor(np.array([[100, 300]], np.uint16), [0, 400])
    >>> image.flatten(), image_format.high
    (tensor([0.2500, 0.7500]), 400.0)
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.size == 0:
        raise ValueError(
            f"expected one image, (height, width) or (height, width, channels), got {array.shape} "
            f"in {name}; save one page of it"
        )
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected integers or floats, got {array.dtype} in {name}; convert it")
    dtype = "float32" if array.dtype.kind == "f" else array.dtype.name
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        if not finite.all():
            raise ValueError(
                f"expected finite values, but {(~finite).sum()} of {array.size} in {name} are NaN "
                "or infinite; replace them first"
            )
    low, high = _stored_range(array, dtype, intensity_range, name)
    height, width, channels = array.shape
    image = np.empty((1, channels, height, width), np.float32)
    for i in range(channels):  # one at a time: float64 takes the most memory
        values = array[..., i].astype(np.float64)
        values -= low
        values /= high - low
        with np.errstate(over="ignore"):  # which is looked for below
            image[0, i] = values
    if not np.isfinite(image).all():
        raise ValueError(
            f"expected values near the range [{low:g}, {high:g}], got [{array.min():g}, "
            f"{array.max():g}] in {name}; set --data.intensity_range to [lo, hi] of what is meant"
        )
    return torch.from_numpy(image), ImageFormat(dtype, None, low, high)


def to_array(image: Tensor, image_format: ImageFormat) -> np.ndarray:
    """An image (1, C, H, W) as an array (H, W, C) of stored values: `to_tensor` undone.

    Integers are rounded, and clipped to what their type holds.
    """
    scaled = image[0].detach().cpu().double().movedim(0, -1).numpy()  # (C, H, W) -> (H, W, C)
    values = image_format.low + scaled * (image_format.high - image_format.low)
    if image_format.dtype != "float32":
        info = np.iinfo(image_format.dtype)
        # The greatest float64 that is still cast rightly: 2⁶³ − 1 itself is none.
        values = np.rint(values).clip(info.min, np.nextafter(info.max + 1.0, 0))
    return np.ascontiguousarray(values.astype(image_format.dtype))


def write_image(
    path: str | os.PathLike, image: Tensor, image_format: ImageFormat | None = None
) -> None:
    """Write an image (1, C, H, W) in [0, 1] as PNG or TIFF, by the suffix of `path`.

    The file appears under its name only when it is complete.

    Raises:
        OSError: It cannot be written.
        ValueError: A file of that suffix cannot hold it.
    """
    image_format = image_format or ImageFormat()
    array = to_array(image, image_format)
    channels = array.shape[-1]
    suffix, best = Path(path).suffix.lower(), image_format.suffix(channels)
    if suffix not in (best, ".tif", ".tiff"):
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
        write_bytes(path, _encode_png(array, profile, image_format))
    else:
        write_bytes(path, _encode_tiff(array, channels, profile, image_format))


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file so that it is never seen half-written under its name.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that lies there
            file.write(data)
        replace_by(path, temporary)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_by(path: Path, complete: Path) -> None:
    """Give a complete file its name, when its contents are on the disk.

    Raises:
        OSError: It cannot be written.
    """
    with complete.open("r+b") as file:  # Windows syncs what can be written
        os.fsync(file.fileno())
    os.replace(complete, path)


def _stored_range(
    values: np.ndarray, dtype: str, intensity_range: IntensityRange, name: str
) -> tuple[float, float]:
    """The stored values that become 0 and 1, of values (H, W, C)."""
    word = intensity_range if isinstance(intensity_range, str) else ""
    if word in PERCENTILES:
        low, high = (float(v) for v in np.percentile(values.astype(np.float64), PERCENTILES[word]))
        if low == high:
            raise ValueError(
                f"expected values that differ, but the {word} range of {name} is "
                f"[{low:g}, {high:g}]; set --data.intensity_range to [lo, hi]"
            )
        return low, high
    if word == "dtype":
        if dtype not in WHITE:
            raise ValueError(
                f"expected 8-bit, 16-bit or float values, got {dtype} in {name}; set "
                "--data.intensity_range minmax, percentile or [lo, hi]"
            )
        low, high = 0.0, WHITE[dtype]
        if values.min() < low - 0.5 * high or values.max() > 1.5 * high:
            raise ValueError(
                f"expected float values in [0, 1], give or take noise, got [{values.min():g}, "
                f"{values.max():g}] in {name}; set --data.intensity_range to the [lo, hi] that are "
                "black and white, or minmax"
            )
        return low, high
    try:
        low, high = (float(v) for v in (() if word else intensity_range))
    except (TypeError, ValueError):
        low = high = math.nan
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(
            "intensity_range must be dtype, minmax, percentile or two finite numbers [lo, hi], "
            f"lo < hi, got {intensity_range!r} for {name}"
        )
    return low, high


def _decode(path: Path, page: int | None) -> tuple[np.ndarray, bool, ImageFormat]:
    """The stored values, (H, W) or (H, W, C), whether alpha comes last, and the metadata."""
    _refuse_what_is_too_large(bytes_needed=path.stat().st_size)
    data = path.read_bytes()
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(TIFF_STARTS):
        return _decode_tiff(data, page)
    if page:
        raise ValueError(f"it has no page {page}, only TIFF files have; leave --data.page out")
    if data.startswith(NPY_START):
        return _decode_npy(data), False, ImageFormat()
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("its contents are none of these") from None
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
        x, y = picture.info.get("dpi", (0, 0))
        kept = ImageFormat(
            icc_profile=picture.info.get("icc_profile"),
            resolution=_resolution(x, y, "inch", _orientation(picture)),
            texts={key: str(picture.info[key]) for key in TEXTS.values() if key in picture.info},
        )
    return array, has_alpha, kept


def _decode_npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version > (2, 0):
        raise ValueError("its values have names; save an array of numbers")
    header = np.lib.format.read_array_header_1_0
    if version == (2, 0):
        header = np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded; save an array of numbers")
    if math.prod(shape) * dtype.itemsize > len(data):
        raise ValueError(f"it says that it is {shape}, and has not as many values")
    if len(shape) > 1:
        _refuse_bombs(shape[0], shape[1], math.prod(shape[2:]), dtype.itemsize)
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _decode_tiff(data: bytes, number: int | None) -> tuple[np.ndarray, bool, ImageFormat]:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = len(file.pages)
        if number is None and pages > 1:
            raise ValueError(f"it has {pages} pages; choose one by --data.page 0 to {pages - 1}")
        number = number or 0
        if not 0 <= number < pages:
            raise ValueError(f"it has no page {number}; choose --data.page 0 to {pages - 1}")
        page = file.pages[number].aspage()
        if page.imagedepth != 1:
            raise ValueError(f"it is a volume, {page.imagedepth} deep; save one image of it")
        bands, bytes_each = page.samplesperpixel, np.dtype(page.dtype or np.uint8).itemsize
        _refuse_bombs(page.imagelength, page.imagewidth, bands, bytes_each)
        if page.bitspersample not in TIFF_DEPTHS:
            raise ValueError(
                f"its {page.bitspersample} bits a value are not supported; save it as 8 or 16 bits"
            )
        orientation = page.tags.valueof(ORIENTATION_TAG, 1)
        decoded = page.photometric == YCBCR and page.compression in JPEG
        if page.photometric in PLAIN_TIFF or decoded:
            array = page.asarray()
            if page.axes.startswith("S"):  # planes apart: (C, H, W) -> (H, W, C)
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
        unit = TIFF_UNITS.get(page.resolutionunit, "none")
        texts = {key: page.tags.valueof(code) for code, key in TEXTS.items()}
        if page.is_shaped or page.is_imagej or page.is_ome:
            del texts["Description"]  # of the file's pages and axes: no longer true
        kept = ImageFormat(
            icc_profile=page.tags.valueof(ICC_TAG),
            resolution=_resolution(*page.get_resolution(), unit, orientation),
            texts={k: v.replace("\0", " ") for k, v in texts.items() if isinstance(v, str)},
        )
    return array, has_alpha, kept


def _refuse_bombs(height: int, width: int, bands: int, bytes_each: int = 1) -> None:
    """Refuse an image by what its header says of its size, before anything is made of it.

    The limit is Pillow's own, which a program may set.

    Raises:
        ValueError: The image has too many pixels, or is too large for the free memory.
    """
    pixels, limit = height * width, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels * max(1, bands // 4) > 2 * limit:
        raise ValueError(
            f"it says that it has {height}×{width} pixels in {bands} channels, which may be a "
            f"decompression bomb; more than {2 * limit} pixels are read only where a program sets "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )
    # As decoded, and as float32; and float64 of one channel, with what is made on the way.
    _refuse_what_is_too_large(pixels * (bands * (bytes_each + 4) + 16))


def _refuse_what_is_too_large(bytes_needed: int) -> None:
    free = free_memory(torch.device("cpu"))
    if bytes_needed > free:
        raise ValueError(
            f"reading it takes {as_text(bytes_needed)} of memory, and {as_text(free)} are free"
        )


def _pixels(picture: Image.Image) -> tuple[np.ndarray, bool]:
    """A picture's 8-bit grey or RGB values, upright, and whether alpha comes last."""
    picture.load()  # turns a TIFF by itself, and forgets its orientation
    if picture.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"its mode {picture.mode} is not supported; save it as 8 or 16 bits")
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    transparent = picture.has_transparency_data
    array = np.asarray(picture.convert(mode + "A" if transparent else mode))
    return _upright(array, _orientation(picture)), transparent


def _orientation(picture: Image.Image) -> int:
    return picture.getexif().get(ORIENTATION_TAG, 1)


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror (H, W, ...) as the orientation of EXIF and TIFF, 1 to 8, asks for."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def _resolution(x: float, y: float, unit: str, orientation: int) -> tuple[float, float, str] | None:
    """The resolution of the upright image; None for values that only fill the place."""
    if not (0 < x < math.inf and 0 < y < math.inf) or x == y == 1:
        return None
    x, y = (y, x) if orientation > 4 else (x, y)
    return float(x), float(y), unit


def _profile_for(channels: int, profile: bytes | None) -> bytes | None:
    """The profile if it is one for so many channels: one for CMYK would mislead on RGB."""
    space = {1: b"GRAY", 3: b"RGB "}.get(channels)
    return profile if profile and profile[16:20] == space else None


def _encode_png(array: np.ndarray, profile: bytes | None, image_format: ImageFormat) -> bytes:
    chunks = PngInfo()
    if profile:
        chunks.add(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))
    *resolution, unit = image_format.resolution or (0, 0, "none")
    x, y = (round(v * PER_METRE.get(unit, 0)) for v in resolution)
    if 0 < x < 2**31 and 0 < y < 2**31:
        chunks.add(b"pHYs", struct.pack(">IIB", x, y, 1))
    for key, text in image_format.texts.items():
        chunks.add_text(key, text)
    encoded = io.BytesIO()
    for name, data, *_ in chunks.chunks:
        putchunk(encoded, name, data)
    png = bytes(imagecodecs.png_encode(array))
    return png[:PNG_HEADER] + encoded.getvalue() + png[PNG_HEADER:]


def _encode_tiff(
    array: np.ndarray, channels: int, profile: bytes | None, image_format: ImageFormat
) -> bytes:
    samples = 1 if array.ndim == 2 else array.shape[-1]
    colours = 3 if channels == 3 else 1
    extra = ["unspecified"] * (channels - colours) + ["unassalpha"] * (samples - channels)
    texts, resolution = image_format.texts, image_format.resolution
    tags = [(code, 2, 0, texts[key].encode(), True) for code, key in TEXTS.items() if key in texts]
    if profile:
        tags.append((ICC_TAG, 7, len(profile), profile, True))
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        array,
        photometric="rgb" if colours == 3 else "minisblack",
        planarconfig="contig" if samples > 1 else None,
        extrasamples=extra or None,
        resolution=resolution and resolution[:2],
        resolutionunit=resolution and resolution[2],
        metadata=None,
        extratags=tags,
    )
    return buffer.getvalue()
