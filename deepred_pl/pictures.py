"""Pictures as Pillow reads them, and PNG files."""

import io
import zlib

import imagecodecs
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import putchunk

from deepred_pl.memory import check_memory

ORIENTATION_TAG = 274
# The orientations of EXIF and TIFF in which the upright image is transposed first, and which of its
# columns and rows are then flipped.
TRANSPOSED, FLIPPED_COLUMNS, FLIPPED_ROWS = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
# A PNG file's signature and IHDR chunk end at byte 33; byte 24 is the bit depth.
PNG_HEADER, PNG_DEPTH_AT = 33, 24


def refuse_bombs(height: int, width: int, bands: int, bytes_each: int = 1) -> None:
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


def pixels_of(picture: Image.Image) -> tuple[np.ndarray, bool]:
    """A picture's 8-bit grey or RGB values, upright, and whether alpha comes last."""
    picture.load()  # applies a TIFF's orientation, and removes the tag
    if picture.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"its mode {picture.mode} is not supported; save it with 8 or 16 bits")
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    transparent = picture.has_transparency_data
    array = np.asarray(picture.convert(mode + "A" if transparent else mode))
    return upright(array, orientation_of(picture)), transparent


def orientation_of(picture: Image.Image) -> int:
    """The orientation in a picture's EXIF data, 1 to 8."""
    return picture.getexif().get(ORIENTATION_TAG, 1)


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror (H, W, ...) by the orientation of EXIF and TIFF, 1 to 8."""
    if orientation in TRANSPOSED:
        array = array.swapaxes(0, 1)
    if orientation in FLIPPED_COLUMNS:
        array = array[:, ::-1]
    if orientation in FLIPPED_ROWS:
        array = array[::-1]
    return array


def profile_for(channels: int, profile: bytes | None) -> bytes | None:
    """The profile if it is for this number of channels: one for CMYK would be wrong for RGB."""
    space = {1: b"GRAY", 3: b"RGB "}.get(channels)
    return profile if profile and profile[16:20] == space else None


def encode_png(array: np.ndarray, profile: bytes | None) -> bytes:
    """A PNG file of (H, W) or (H, W, C), 8 or 16 bits, and a colour profile."""
    png = bytes(imagecodecs.png_encode(array))  # Pillow does not write 16-bit colour
    if profile is None:
        return png
    chunk = io.BytesIO()
    putchunk(chunk, b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))
    return png[:PNG_HEADER] + chunk.getvalue() + png[PNG_HEADER:]
