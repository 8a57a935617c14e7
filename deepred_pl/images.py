"""Read image files as tensors, and write tensors as files of the same depth and range."""

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from deepred_pl.axes import (
    CHANNELS,
    MOST_COLOURS,
    Page,
    as_stored,
    axes_of_image,
    channels_last,
    check_axes,
    check_page,
    count_pages,
    guessed_axes,
    of_page,
    page_index,
    page_text,
)
from deepred_pl.files import replacing, write_bytes
from deepred_pl.image_format import WHITE, ImageFormat
from deepred_pl.memory import check_memory
from deepred_pl.pictures import (
    PNG_DEPTH_AT,
    encode_png,
    orientation_of,
    pixels_of,
    profile_for,
    refuse_bombs,
    upright,
)
from deepred_pl.sources import find_image
from deepred_pl.tiffs import SINGLE, STARTS, Stored, tiff_layout, tiff_pages, write_tiff

IntensityRange = Literal["dtype", "minmax", "percentile"] | Sequence[float] | Sequence[list[float]]

PERCENTILES = {"minmax": (0, 100), "percentile": (0.1, 99.9)}  # the stored values of 0 and 1
# Formats that Pillow may detect; it also knows PostScript, which is a program.
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000")
NPY_START = b"\x93NUMPY"


def read_image(
    path: str | os.PathLike,
    intensity_range: IntensityRange = "dtype",
    page: Page = None,
    missing: bool = False,
    axes: str | None = None,
) -> tuple[Tensor, ImageFormat]:
    """Read a PNG, JPEG, TIFF or NPY image.

    The orientation noted in the file is applied. An alpha channel is returned with the format.

    Args:
        path: The file, or "sample:NAME" or "set:SET/IMAGE" (`deepred_pl.sources`).
        intensity_range: Which stored values become 0 and 1, as in `to_tensor`.
        page: Page of a TIFF or NPY file with several, from 0 (`deepred_pl.axes`), or "all" as
            channels of one image.
        missing: Allow missing values, as in `to_tensor`; also those of a TIFF's nodata tag.
        axes: The axes of a TIFF or NPY file, such as "CYX"; None are those that the file names, or
            that its shape leaves no doubt about.

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
        array, has_alpha, metadata = _decode(source, page, axes)
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
        icc_profile=profile_for(image.shape[1], metadata.icc_profile),
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

    A TIFF has the axes that `image_format` has for one page.

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
    array = with_alpha(array, image_format)
    has_alpha = array.shape[-1] > channels
    profile = profile_for(channels, image_format.icc_profile)
    if suffix == ".png":
        write_bytes(path, encode_png(array[..., 0] if array.shape[-1] == 1 else array, profile))
    else:
        axes, stored = stored_page(array, image_format)
        with replacing(path) as file:
            write_tiff(file, stored, axes, replace(image_format, icc_profile=profile), has_alpha)


def displayed(image: Tensor) -> Tensor:
    """The part of an image (1, C, H, W) that is shown, (1, 1 or 3, H, W).

    Three channels are colours. Of others, which may be bands or frames, it is the middle one.
    """
    middle = (image.shape[1] - 1) // 2
    return image if image.shape[1] == 3 else image[:, middle : middle + 1]


def with_alpha(array: np.ndarray, image_format: ImageFormat) -> np.ndarray:
    """An array (H, W, C) with the alpha channel of its format, if there is one of its size."""
    alpha = image_format.alpha
    if alpha is None or alpha.shape != array.shape[:2]:
        return array
    return np.concatenate([array, alpha[..., None].astype(array.dtype)], axis=-1)


def stored_page(array: np.ndarray, image_format: ImageFormat) -> tuple[str, np.ndarray]:
    """An array (H, W, C) with the axes of its format, and these axes."""
    axes, shape = image_format.axes, image_format.shape
    channels = math.prod(n for axis, n in zip(axes, shape, strict=True) if axis not in "YX")
    if axes and channels == array.shape[-1]:
        return axes, as_stored(array, axes, shape)
    return ("YX", array[..., 0]) if array.shape[-1] == 1 else ("YXS", array)


# Stacks


def layout_of(path: str | os.PathLike, axes: str | None = None) -> tuple[str, tuple[int, ...], int]:
    """The axes and the shape of an image file, from its header, and its number of series.

    Axes are those of TIFF and NPY files; of others they are "" and the shape is (). A TIFF may have
    several series of images of unlike sizes; these are the first one's.

    Args:
        path: A file.
        axes: As in `read_image`.

    Raises:
        OSError: There is no such file.
        ValueError: It cannot be read, or its axes do not fit or are not certain.
    """
    with Path(path).open("rb") as file:
        start = file.read(len(NPY_START))
    try:
        if start == NPY_START:
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            return _npy_axes(shape, axes, Path(path).name), shape, 1
        if start.startswith(STARTS):
            return tiff_layout(Path(path), axes)
    except ValueError:
        raise
    except Exception as error:  # decoders raise anything on a broken file
        raise ValueError(f"expected an image, cannot read {path}: {error}") from error
    return "", (), 1


def brightest_page(path: str | os.PathLike, axes: str | None = None) -> int:
    """The page of a file with the largest value, as `read_image` counts pages.

    Pages that cannot be read are left out.

    Args:
        path: A file.
        axes: As in `read_image`.
    """
    letters, shape, _ = layout_of(path, axes)
    brightest, largest = 0, -math.inf
    with _pages(Path(path), axes) as read:
        for page in range(count_pages(letters, shape)):
            with suppress(Exception):  # its fit reports it
                values = np.ma.filled(read(page)[0].astype(np.float64), -math.inf)
                value = values.max(initial=-math.inf, where=np.isfinite(values))
                if value > largest:
                    brightest, largest = page, float(value)
    return brightest


def write_stack(
    path: str | os.PathLike,
    source: str | os.PathLike,
    restored: Mapping[int, Path],
    axes: str | None = None,
    keep_others: bool = True,
) -> list[int]:
    """Write a stack with the axes and metadata of another from restored pages, atomically as TIFF.

    Args:
        path: The TIFF file.
        source: The stack that was restored.
        restored: Image files by their pages, at least one.
        axes: The axes of the stack, as in `read_image`.
        keep_others: Copy other pages from the stack, if they have the size and kind of values of
            the restored ones and can be read; or else they are 0.

    Returns:
        The pages that are 0.

    Raises:
        OSError: It cannot be written.
        ValueError: The memory is too small for it.
    """
    letters, shape, _ = layout_of(source, axes)
    a_page = next(iter(restored))
    first, has_alpha, of_first = _decode(restored[a_page], None, None)
    first = np.atleast_3d(first)
    count = count_pages(letters, shape)
    check_memory(2 * count * first.nbytes, "writing the stack", "restore it on a larger machine")
    own = of_page(letters)
    sizes = list(zip(letters, shape, strict=True))
    if math.prod(n for axis, n in sizes if axis in CHANNELS) != first.shape[-1]:
        sizes = [(axis, n) for axis, n in sizes if axis not in own]
        sizes += [("Y", 0), ("X", 0), ("S", first.shape[-1])]
        letters, own = "".join(axis for axis, _ in sizes), "YXS"
    new = {"Y": first.shape[0], "X": first.shape[1]}
    shape = tuple(new.get(axis, n) for axis, n in sizes)
    own_shape = [n for axis, n in zip(letters, shape, strict=True) if axis in own]
    stack, empty = np.zeros(shape, first.dtype), list[int]()
    with _pages(Path(source), axes) as read:
        of_source = read(a_page)[2]
        for page in range(count):
            values: np.ndarray | None = None
            if page in restored:
                values = np.atleast_3d(_decode(restored[page], None, None)[0])
            elif keep_others:
                values = _own_page(read, page, first)
            if values is None:
                empty.append(page)
            else:
                stack[page_index(letters, shape, page)] = as_stored(values, own, own_shape)
    channels = first.shape[-1] - has_alpha
    image_format = replace(
        of_source,
        resolution=of_first.resolution or of_source.resolution,
        icc_profile=profile_for(channels, of_source.icc_profile),
    )
    with replacing(path) as output:
        write_tiff(output, stack, letters, image_format, has_alpha)
    return empty


def _own_page(read: Callable[[Page], Stored], page: int, like: np.ndarray) -> np.ndarray | None:
    """A page of a stack, (H, W, C), or None if it is not like another or cannot be read."""
    with suppress(Exception):  # which may be why it is not restored
        values = np.atleast_3d(read(page)[0])
        values = values.astype(np.uint8) * 255 if values.dtype == bool else values
        if values.shape == like.shape and values.dtype.kind == like.dtype.kind:
            return np.ma.getdata(values)
    return None


@contextmanager
def _pages(path: Path, axes: str | None) -> Iterator[Callable[[Page], Stored]]:
    """Open a file once, to read its pages by a function."""
    with path.open("rb") as file:
        is_tiff = file.read(4) in STARTS
    if is_tiff:
        with tiff_pages(path, axes) as read:
            yield read
    else:
        yield lambda page: _decode(path, page, axes)


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
                f"expected unsigned 8 or 16 bits, or floats, got {dtype} in {name}; set "
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


def _decode(path: Path, page: Page, axes: str | None) -> Stored:
    """The stored values, (H, W) or (H, W, C), whether alpha comes last, and the metadata."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError("the file is empty")
    with path.open("rb") as file:
        start = file.read(len(NPY_START))
    if start == NPY_START:
        return _decode_npy(path, page, axes)
    if start.startswith(STARTS):
        with tiff_pages(path, axes) as read:
            return read(page)
    if page not in (None, 0, "all"):
        raise ValueError(f"it has no page {page}: pages are in TIFF and NPY files only")
    if axes is not None and axes.upper() not in SINGLE:
        raise ValueError("axes are stated for TIFF and NPY files only; leave data.axes out")
    check_memory(size, "reading it", "save a part of it")
    data = path.read_bytes()
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("its contents are in none of these formats") from None
    with opened as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format != "MPO":  # a camera's MPO begins with the photo
            raise ValueError(f"it has {frames} frames; save one of them")
        refuse_bombs(picture.height, picture.width, len(picture.getbands()))
        if picture.format == "PNG" and data[PNG_DEPTH_AT] == 16:
            array = imagecodecs.png_decode(data)  # Pillow would round 16-bit colour to 8 bits
            array = upright(array, orientation_of(picture))
            has_alpha = array.ndim == 3 and array.shape[-1] in (2, 4)
        else:
            array, has_alpha = pixels_of(picture)
        return array, has_alpha, ImageFormat(icc_profile=picture.info.get("icc_profile"))


def _decode_npy(path: Path, page: Page, axes: str | None) -> Stored:
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # only the header is read
    letters = _npy_axes(array.shape, axes, path.name)
    array, image_format = page_of(array, letters, page)
    height, width, *channels = array.shape
    refuse_bombs(height, width, math.prod(channels), array.dtype.itemsize)
    return np.array(array), False, image_format


def _npy_axes(shape: tuple[int, ...], axes: str | None, name: str) -> str:
    return guessed_axes(shape, name) if axes is None else check_axes(axes, shape, name)


def page_of(array: np.ndarray, axes: str, page: Page) -> tuple[np.ndarray, ImageFormat]:
    """A page of an array with these axes, (H, W) or (H, W, C), and its axes as a format.

    Raises:
        ValueError: There is no such page, or there are several and none is chosen.
    """
    count = count_pages(axes, array.shape)
    check_page(page, count, axes)
    own = axes_of_image(axes, page)
    chosen = array[page_index(axes, array.shape, page)]
    if own == "YX" or (own == "YXC" and chosen.shape[-1] <= MOST_COLOURS):
        described = ImageFormat(page=page_text(axes, page, count))
    else:
        described = ImageFormat(axes=own, shape=chosen.shape, page=page_text(axes, page, count))
    return channels_last(chosen, own), described
