"""Read and write TIFF files: single images and stacks, also those of ImageJ and OME."""

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image

from deepred_pl.axes import (
    Page,
    axes_of_image,
    channels_last,
    check_axes,
    check_page,
    count_pages,
    page_index,
    page_text,
)
from deepred_pl.image_format import ImageFormat
from deepred_pl.memory import check_memory
from deepred_pl.pictures import pixels_of, refuse_bombs, upright

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


def read_tiff(path: Path, page: Page, axes: str | None) -> tuple[np.ndarray, bool, ImageFormat]:
    """The stored values of a page, (H, W) or (H, W, C), whether alpha comes last, and the metadata.

    Args:
        path: The file.
        page: The page, from 0, counted through all series of images; None if there is only one;
            "all" of the first series as channels.
        axes: Axes of the first series that replace those of its metadata.

    Raises:
        ValueError: It cannot be read; the message says why.
    """
    with _opened(path) as file:
        series, letters, number = _find(file, page, axes, path.name)
        if any(one is None for one in series.pages):
            raise ValueError("a part of its pages is in another file; save all in one file")
        index, own = page_index(letters, series.shape, number), axes_of_image(letters, number)
        numbers = _tiff_pages(series, index)
        page_or_frame = series.pages[0 if numbers is None else int(numbers.flat[0])]
        assert page_or_frame is not None
        first = page_or_frame.aspage()
        all_sizes = dict(zip(letters, series.shape, strict=True))
        sizes = {axis: all_sizes[axis] for axis in own}
        bands = math.prod(sizes.values()) // max(1, sizes["Y"] * sizes["X"])
        bytes_each = np.dtype(first.dtype or np.uint8).itemsize
        refuse_bombs(sizes["Y"], sizes["X"], bands, bytes_each)
        if first.bitspersample not in DEPTHS:
            raise ValueError(
                f"{first.bitspersample} bits per value are not supported; save it with 8 or 16 bits"
            )
        orientation = first.tags.valueof(ORIENTATION_TAG, 1)
        decoded = first.photometric == YCBCR and first.compression in JPEG
        if first.photometric in PLAIN or decoded:
            array = channels_last(_stored(series, index, numbers), own)
            array = upright(array, orientation)
            has_alpha = bool(first.extrasamples) and first.extrasamples[-1] in (1, 2)
            has_alpha = has_alpha and own.replace("S", "") == "YX" != own
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
        kind = "imagej" if file.is_imagej else "ome" if file.is_ome else "tiff"
        plain, count = own in ("YX", "YXS"), count_pages(letters, series.shape)
        return (
            _without_nodata(array, first.tags.valueof(NODATA_TAG)),
            has_alpha,
            ImageFormat(
                icc_profile=first.tags.valueof(ICC_TAG),
                resolution=_resolution(pixels, orientation),
                kind=kind,  # type: ignore[arg-type]
                axes="" if plain else own,
                shape=() if plain else tuple(sizes.values()),
                page=page_text(letters, number, count),
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
    sizes = dict(zip(axes, array.shape, strict=True))
    samples = sizes.get("S", sizes["C"] if axes == "YXC" else 1)
    colours = 3 if samples - has_alpha == 3 else 1
    unit = "none" if image_format.resolution is None else image_format.resolution[2]
    kind = image_format.kind or ("tiff" if axes in SINGLE else "imagej")
    imagej = array.dtype.name in IMAGEJ_TYPES and samples == (colours if sizes.get("S") else 1)
    if kind == "imagej" and not (imagej and _in_order(axes)):
        kind = "ome"
    if kind == "ome" and not ({*axes} <= {*IMAGEJ_AXES} and axes.endswith(("YX", "YXS"))):
        kind = "tiff"
    metadata = {**image_format.metadata, "axes": axes}
    if kind == "imagej":
        metadata |= {} if unit == "none" else {"unit": unit}
        planes = array.size // (sizes["Y"] * sizes["X"] * samples)
        if len(metadata.get("Labels", ())) != planes:
            metadata.pop("Labels", None)
    elif kind == "ome":
        metadata |= _ome_pixels(image_format.resolution)
        if len(metadata.get("Channel", {}).get("Name", ())) != sizes.get("C", 1):
            metadata.pop("Channel", None)
    else:
        metadata = {} if axes in ("YX", "YXS") else {"axes": axes}
    extra = ["unspecified"] * (samples - has_alpha - colours) + ["unassalpha"] * has_alpha
    tifffile.imwrite(
        file,
        array,
        imagej=kind == "imagej",
        ome=kind == "ome",
        photometric="rgb" if colours == 3 else "minisblack",
        planarconfig=("separate" if "SYX" in axes else "contig") if samples > 1 else None,
        extrasamples=extra or None,
        resolution=image_format.resolution and image_format.resolution[:2],
        resolutionunit=unit if unit in UNITS.values() else "none",
        metadata=metadata or None,
        iccprofile=image_format.icc_profile,
    )


@contextmanager
def _opened(path: Path) -> Iterator[tifffile.TiffFile]:
    """Open a file, without its metadata if they are damaged."""
    # A private argument of tifffile 2026.3: no other file is read, whatever the metadata name.
    with tifffile.TiffFile(path, _multifile=False) as file:
        try:
            assert file.series
        except Exception:  # of tifffile's parsers
            plain = tifffile.TiffFile(path, is_ome=False, is_imagej=False)
        else:
            yield file
            return
    with plain:
        yield plain


def _axes_of(series: tifffile.TiffPageSeries, stated: str | None, name: str) -> str:
    return series.axes if stated is None else check_axes(stated, series.shape, name)


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


def _stored(
    series: tifffile.TiffPageSeries, index: tuple[int | slice, ...], numbers: np.ndarray | None
) -> np.ndarray:
    """A part of the array of a series; `numbers` are those of its TIFF pages."""
    if numbers is None:
        needed = math.prod(series.shape) * series.dtype.itemsize
        check_memory(needed, "reading it", "save a part of it")
        return series.asarray()[index]
    chosen = [series.pages[int(i)] for i in numbers.flat]
    pages = np.stack([page.asarray() for page in chosen if page is not None])
    inside = index[len(index) - (pages.ndim - 1) :]
    return pages.reshape(*numbers.shape, *pages.shape[1:])[(..., *inside)]


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
    if not (0 < x < math.inf and 0 < y < math.inf) or x == y == 1:
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
    sizes = {"X": scale / x, "Y": scale / y}
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
