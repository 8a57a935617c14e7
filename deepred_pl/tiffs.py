"""Read and write TIFF files: single images and stacks, also those of ImageJ and OME."""

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image

from deepred_pl.axes import (
    CHANNELS,
    MOST_COLOURS,
    Page,
    axes_of_image,
    channels_last,
    check_axes,
    check_page,
    count_pages,
    page_index,
    page_text,
)
from deepred_pl.image_format import ImageFormat, Kind
from deepred_pl.memory import check_memory
from deepred_pl.pictures import pixels_of, refuse_bombs, upright

Stored = tuple[np.ndarray, bool, ImageFormat]

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PLAIN = (1, 2)  # photometric interpretations: black is zero, RGB
DEPTHS = (1, 8, 16, 32, 64)  # bits; others would be unpacked but not scaled
YCBCR, JPEG = 6, (6, 7)  # tifffile decodes YCbCr to RGB only with these compressions
UNITS = {1: "none", 2: "inch", 3: "centimeter"}
ICC_TAG, ORIENTATION_TAG = 34675, 274
NODATA_TAG = 42113  # of GDAL: the value of missing pixels, as text

SINGLE = ("YX", "YXS", "YXC")  # axes of a single TIFF page
IMAGEJ_AXES, IMAGEJ_TYPES = "TZCYXS", ("uint8", "uint16", "float32")
# Metadata that follow from the array, or from the resolution.
DERIVED = ("ImageJ", "images", "channels", "slices", "frames", "hyperstack", "unit")
KEPT_OF_OME = ("PhysicalSizeZ", "PhysicalSizeZUnit", "TimeIncrement", "TimeIncrementUnit")


def tiff_layout(path: Path, axes: str | None) -> tuple[str, tuple[int, ...], int]:
    """Axes and shape of a file's first series of images, and the number of series.

    Args:
        path: The file.
        axes: Axes that replace those of its metadata.
    """
    with _opened(path) as file:
        series = file.series[0]
        return _axes_of(series, axes, path.name), tuple(series.shape), len(file.series)


@contextmanager
def tiff_pages(path: Path, axes: str | None) -> Iterator[Callable[[Page], Stored]]:
    """Open a file, and read its pages by a function.

    The function returns the stored values of a page, (H, W) or (H, W, C), whether alpha comes last,
    and the metadata. It raises ValueError, or what a decoder raises, if a page cannot be read.

    Args:
        path: The file. Its pages are counted through all series of images; None is the only one,
            and "all" are those of the first series as channels.
        axes: Axes of the first series that replace those of its metadata.
    """
    with _opened(path) as file:
        yield partial(_read, file, path, axes)


def _read(file: tifffile.TiffFile, path: Path, axes: str | None, page: Page) -> Stored:
    series, letters, number = _find(file, page, axes, path.name)
    index, own = page_index(letters, series.shape, number), axes_of_image(letters, number)
    numbers = _tiff_pages(series, index)
    chosen = [series.pages[int(i)] for i in ([0] if numbers is None else numbers.flat)]
    pages = [one.aspage() for one in chosen if one is not None]
    if len(pages) < len(chosen):
        raise ValueError("a part of it is in another file; save all in one file")
    first = pages[0]
    shape = tuple(n for n, i in zip(series.shape, index, strict=True) if isinstance(i, slice))
    height, width = shape[own.index("Y")], shape[own.index("X")]
    bytes_each = np.dtype(first.dtype or np.uint8).itemsize
    refuse_bombs(height, width, math.prod(shape) // max(1, height * width), bytes_each)
    if first.bitspersample not in DEPTHS:
        raise ValueError(
            f"{first.bitspersample} bits per value are not supported; save it with 8 or 16 bits"
        )
    orientation = first.tags.valueof(ORIENTATION_TAG, 1)
    decoded = first.photometric == YCBCR and first.compression in JPEG
    alpha_last = bool(first.extrasamples) and first.extrasamples[-1] in (1, 2)
    if first.photometric in PLAIN or decoded:
        if numbers is None:
            array = _part(file, series, path)[index]
        else:
            stored = np.stack([one.asarray() for one in pages])
            inside = index[len(index) - (stored.ndim - 1) :]
            array = stored.reshape(*numbers.shape, *stored.shape[1:])[(..., *inside)]
        array = upright(channels_last(array, own), orientation)
        has_alpha = alpha_last and own in ("YXS", "SYX")
        if alpha_last and page == "all" and not has_alpha:
            raise ValueError("pages with transparency cannot be channels; save it without")
    elif len(pages) > 1:
        raise ValueError(
            "its colour layout is not supported for several channels; save it with grey channels"
        )
    elif first.dtype in (np.uint8, np.bool_):  # palettes, CMYK, YCbCr, inverted grey
        # Of a path, Pillow may map the file, and then ignores its orientation.
        with Image.open(io.BytesIO(path.read_bytes()), formats=("TIFF",)) as picture:
            picture.seek(first.index)
            array, has_alpha = pixels_of(picture)
        own = "YX" if array.ndim == 2 else "YXS"
    else:
        raise ValueError("its colour layout is not supported; save it as RGB")
    imagej = file.imagej_metadata or {}
    unit = imagej.get("unit") or UNITS.get(first.resolutionunit)
    pixels = _ome_resolution(file.ome_metadata) or (*first.get_resolution(), unit or "none")
    kind: Kind = "imagej" if file.is_imagej else "ome" if file.is_ome else "tiff"
    plain = own in ("YX", "YXS")
    return (
        _without_nodata(array, first.tags.valueof(NODATA_TAG)),
        has_alpha,
        ImageFormat(
            icc_profile=first.tags.valueof(ICC_TAG),
            resolution=_resolution(pixels, orientation),
            kind=kind,
            axes="" if plain else own,
            shape=() if plain else shape,
            page=page_text(letters, number, count_pages(letters, series.shape)),
            metadata=_kept(imagej, file.ome_metadata),
        ),
    )


def write_tiff(
    file: BinaryIO, array: np.ndarray, axes: str, image_format: ImageFormat, has_alpha: bool
) -> None:
    """Write an array as a TIFF of the kind of `image_format`, or the most similar one possible.

    Args:
        file: An open file.
        array: The stored values.
        axes: Their axes. Of a file that was no TIFF, all but single images are written for ImageJ.
        image_format: Has kind, metadata, resolution and colour profile.
        has_alpha: Whether the last of the samples is the alpha channel.
    """
    if axes.endswith("YXC") and array.shape[-1] <= MOST_COLOURS:  # as colours are stored
        axes = axes[:-1] + "S"
    samples = array.shape[-1] if axes[-1] in CHANNELS else 1
    samples = array.shape[-3] if axes.endswith("SYX") else samples
    colours = 3 if samples - has_alpha == 3 else 1
    kind = image_format.kind or ("tiff" if axes in SINGLE else "imagej")
    usual = samples == 1 or (samples == 3 and array.dtype == np.uint8)
    imagej = array.dtype.name in IMAGEJ_TYPES and usual and _in_order(axes)
    if kind == "imagej" and not imagej:
        kind = "ome"
    if kind == "ome" and not ({*axes} <= {*IMAGEJ_AXES} and axes.endswith(("YX", "YXS"))):
        kind = "tiff"
    unit = "none" if image_format.resolution is None else image_format.resolution[2]
    extra = ["unspecified"] * (samples - has_alpha - colours) + ["unassalpha"] * has_alpha
    options: dict[str, Any] = {
        "photometric": "rgb" if colours == 3 else "minisblack",
        "planarconfig": ("separate" if "SYX" in axes else "contig") if samples > 1 else None,
        "extrasamples": extra or None,
        "resolution": image_format.resolution and image_format.resolution[:2],
        "resolutionunit": unit if unit in UNITS.values() else "none",
        "iccprofile": image_format.icc_profile,
    }
    described = None if axes in ("YX", "YXS") else {"axes": axes}
    if kind != "tiff":
        metadata = _metadata(kind, array, axes, image_format)
        try:
            tifffile.imwrite(
                file,
                array,
                imagej=kind == "imagej",
                ome=kind == "ome",
                metadata=metadata,
                **options,
            )
        except Exception:  # other programs' metadata may be impossible; the image matters more
            file.seek(0)
            file.truncate()
        else:
            return
    tifffile.imwrite(file, array, metadata=described, **options)


def _metadata(
    kind: Kind, array: np.ndarray, axes: str, image_format: ImageFormat
) -> dict[str, Any]:
    """Metadata of ImageJ or OME for an array."""
    metadata = {**image_format.metadata, "axes": axes}
    sizes = dict(zip(axes, array.shape, strict=True))
    if kind == "ome":
        metadata |= _ome_pixels(image_format.resolution)
        if len(metadata.get("Channel", {}).get("Name", ())) != sizes.get("C", 1):
            metadata.pop("Channel", None)
        return metadata
    if image_format.resolution is not None and image_format.resolution[2] != "none":
        unit = image_format.resolution[2].replace("µ", "u").replace("μ", "u")
        metadata["unit"] = unit.encode("ascii", "backslashreplace").decode()
    planes = math.prod(n for axis, n in sizes.items() if axis in "TZC")
    if len(metadata.get("Labels", ())) != planes:
        metadata.pop("Labels", None)
    return metadata


@contextmanager
def _opened(path: Path) -> Iterator[tifffile.TiffFile]:
    """Open a file, without its metadata if they are damaged."""
    # A private argument of tifffile 2026.3: no other file is read, whatever the metadata name.
    with tifffile.TiffFile(path, _multifile=False) as file:
        try:
            if not file.series:
                raise ValueError("no images")
        except Exception:  # of tifffile's parsers
            plain = tifffile.TiffFile(path, is_ome=False, is_imagej=False)
        else:
            yield file
            return
    with plain:
        yield plain


def _axes_of(series: tifffile.TiffPageSeries, stated: str | None, name: str) -> str:
    if stated is None:
        return series.axes
    whole = series.get_shape(squeeze=False)  # as ImageJ shows it, with axes of length 1
    if len(stated) == len(whole) != len(series.shape):
        named = zip(stated, whole, strict=True)
        stated = "".join(axis for axis, n in named if n != 1 or axis.upper() in "YX")
    return check_axes(stated, series.shape, name)


def _find(
    file: tifffile.TiffFile, page: Page, axes: str | None, name: str
) -> tuple[tifffile.TiffPageSeries, str, Page]:
    """The series with a page, its axes, and the number of the page in it."""
    stated = [axes, *[None] * (len(file.series) - 1)]  # of the first
    described = [(s, _axes_of(s, a, name)) for s, a in zip(file.series, stated, strict=True)]
    counts = [count_pages(letters, one.shape) for one, letters in described]
    check_page(page, sum(counts), described[0][1])
    if page == "all":
        return (*described[0], page)
    number = page or 0
    for (series, letters), count in zip(described, counts, strict=True):
        if number < count:
            return series, letters, number
        number -= count
    raise AssertionError


def _tiff_pages(
    series: tifffile.TiffPageSeries, index: tuple[int | slice, ...]
) -> np.ndarray | None:
    """Numbers of the TIFF pages with that part of the array; None if they are not stored so."""
    leading = series.shape[: len(series.shape) - len(series.keyframe.shape)]
    inside = series.shape[len(leading) :]
    if inside != series.keyframe.shape or len(series.pages) != math.prod(leading):
        return None
    return np.arange(len(series.pages)).reshape(leading)[index[: len(leading)]]


def _part(file: tifffile.TiffFile, series: tifffile.TiffPageSeries, path: Path) -> np.ndarray:
    """The array of a series that is not stored page by page; mapped if it is not compressed."""
    if series.dataoffset is not None:
        dtype = series.dtype.newbyteorder(file.byteorder)
        return np.memmap(path, dtype, "r", series.dataoffset, series.shape)
    needed = math.prod(series.shape) * series.dtype.itemsize
    check_memory(needed, "reading it", "save its pages one by one")
    if any(one is None for one in series.pages):
        raise ValueError("a part of it is in another file; save all in one file")
    return series.asarray()


def _without_nodata(array: np.ndarray, tag: object) -> np.ndarray:
    """The array, masked where it has the value of GDAL's nodata tag, if there is one."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            value = np.array(float(str(tag).strip("\0 "))).astype(array.dtype)
        fits = array.dtype.kind == "f" or float(value) == float(str(tag).strip("\0 "))
    except ValueError:  # no number, such as "none"
        return array
    return np.ma.masked_where(array == value, array) if fits else array


def _resolution(
    pixels: tuple[float, float, str], orientation: int
) -> tuple[float, float, str] | None:
    """The resolution of the upright image; None for placeholder values."""
    x, y, unit = pixels
    unknown = x == y == 1 and unit in UNITS.values()
    if not (0 < x < math.inf and 0 < y < math.inf) or unknown:
        return None
    x, y = (y, x) if orientation > 4 else (x, y)
    return float(x), float(y), unit


def _ome_of(xml: str | None) -> dict[str, Any]:
    """The pixels of an OME-TIFF's first image; empty if there are none, or they are damaged."""
    try:
        image = tifffile.xml2dict(xml or "")["OME"]["Image"]
        return (image[0] if isinstance(image, list) else image)["Pixels"]
    except Exception:  # an image is read without its metadata, too
        return {}


def _ome_resolution(xml: str | None) -> tuple[float, float, str] | None:
    """Pixels per unit along x and y, and the unit, of an OME-TIFF that has them."""
    try:
        pixels = _ome_of(xml)
        unit = str(pixels.get("PhysicalSizeXUnit", "um")).replace("µ", "u").replace("μ", "u")
        return 1 / pixels["PhysicalSizeX"], 1 / pixels["PhysicalSizeY"], unit
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _ome_pixels(resolution: tuple[float, float, str] | None) -> dict[str, Any]:
    """The pixel size as OME names it."""
    if resolution is None or resolution[2] == "none":
        return {}
    x, y, unit = resolution
    scale, unit = (10, "mm") if unit == "centimeter" else (1, unit)
    unit = {"um": "µm", "micron": "µm", "inch": "in"}.get(unit, unit)
    sizes = {"X": float(f"{scale / x:.12g}"), "Y": float(f"{scale / y:.12g}")}
    return {f"PhysicalSize{a}": size for a, size in sizes.items()} | {
        f"PhysicalSize{a}Unit": unit for a in sizes
    }


def _kept(imagej: Mapping[str, Any], xml: str | None) -> dict[str, Any]:
    """Metadata of ImageJ or OME that `write_tiff` writes back."""
    if imagej:
        return {name: value for name, value in imagej.items() if name not in DERIVED}
    pixels = _ome_of(xml)
    kept = {name: pixels[name] for name in KEPT_OF_OME if name in pixels}
    channels = pixels.get("Channel", [])
    channels = channels if isinstance(channels, list) else [channels]
    names = [channel.get("Name") for channel in channels if isinstance(channel, dict)]
    return kept | ({"Channel": {"Name": names}} if names and all(names) else {})


def _in_order(axes: str) -> bool:
    """Whether ImageJ stores the axes in this order."""
    return list(axes) == sorted({*axes} & {*IMAGEJ_AXES}, key=IMAGEJ_AXES.index)
