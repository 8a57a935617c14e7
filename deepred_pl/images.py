"""Image files to tensors and back, at the file's depth."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

PLAIN_TIFF = (
    tifffile.PHOTOMETRIC.MINISBLACK,
    tifffile.PHOTOMETRIC.RGB,
    tifffile.PHOTOMETRIC.YCBCR,
)
# The 25th byte of a PNG file is its bit depth.
PNG_DEPTH_AT = 24


@dataclass(frozen=True)
class ImageFormat:
    """How an image was stored: what it takes to store a restored image alike.

    Attributes:
        dtype: "uint8", "uint16" or "float32".
        alpha: The transparency kept aside, (H, W) of that dtype, or None.
    """

    dtype: str = "uint8"
    alpha: np.ndarray | None = None

    def suffix(self, channels: int) -> str:
        """The file suffix for images of this format: ".png", or ".tif" where PNG cannot."""
        return ".png" if self.dtype != "float32" and channels in (1, 3) else ".tif"


def read_image(path: str | os.PathLike) -> tuple[Tensor, ImageFormat]:
    """Read a PNG, JPEG, TIFF or NPY image.

    8 and 16 bits are divided by 255 and 65535; floats must be in [0, 1] already, give or take
    noise. Orientation noted in the file is applied.

    Returns:
        The image, float32 (1, C, H, W), and its format.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not an image, or not one that can be read; the message says why.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an image file, found none at {path}; check the path")
    try:
        array, has_alpha = _decode(path)
    except Exception as error:  # decoders raise what they like at a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"expected a PNG, JPEG, TIFF or NPY image, cannot read {path}: {reason}"
        ) from error
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.size == 0:
        raise ValueError(
            f"expected one image, (height, width) or (height, width, channels), got {array.shape} "
            f"in {path}; save one page of it"
        )
    alpha = None
    if has_alpha:
        array, alpha = array[..., :-1], array[..., -1]
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype in (np.uint8, np.uint16):
        image = array.astype(np.float32) / np.iinfo(array.dtype).max
        dtype = str(array.dtype)
    elif np.issubdtype(array.dtype, np.floating):
        image, dtype = array.astype(np.float32), "float32"
        _check_floats(image, path)
    else:
        raise ValueError(
            f"expected 8-bit, 16-bit or float values, got {array.dtype} in {path}; convert it"
        )
    tensor = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)[None]
    return tensor.contiguous(), ImageFormat(dtype, alpha)


def write_image(
    path: str | os.PathLike, image: Tensor, image_format: ImageFormat | None = None
) -> None:
    """Write an image (1, C, H, W) in [0, 1] as PNG or TIFF, by the suffix of `path`.

    The file appears under its name only when it is complete.

    Raises:
        OSError: It cannot be written.
    """
    image_format = image_format or ImageFormat()
    array = image[0].detach().cpu().movedim(0, -1).numpy()  # (C, H, W) -> (H, W, C)
    if image_format.dtype != "float32":
        peak = np.iinfo(image_format.dtype).max
        array = np.rint(array.clip(0, 1) * peak).astype(image_format.dtype)
    photometric = "rgb" if array.shape[-1] == 3 else "minisblack"
    alpha = image_format.alpha
    has_alpha = alpha is not None and alpha.shape == array.shape[:2]
    if alpha is not None and has_alpha:
        array = np.concatenate([array, alpha[..., None]], axis=-1)
    array = array[..., 0] if array.shape[-1] == 1 else array
    if Path(path).suffix == ".png":
        write_bytes(path, bytes(imagecodecs.png_encode(np.ascontiguousarray(array))))
    else:
        buffer = io.BytesIO()
        tifffile.imwrite(
            buffer,
            array,
            photometric=photometric,
            planarconfig="contig" if array.ndim == 3 else None,
            extrasamples=["unassalpha"] if has_alpha else None,
        )
        write_bytes(path, buffer.getvalue())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file so that it is never seen half-written under its name.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _decode(path: Path) -> tuple[np.ndarray, bool]:
    """The values as stored, (H, W) or (H, W, C), and whether the last channel is alpha."""
    data = path.read_bytes()
    if not data:
        raise ValueError("the file is empty")
    if path.suffix.lower() == ".npy":
        return np.load(io.BytesIO(data), allow_pickle=False), False
    if path.suffix.lower() in (".tif", ".tiff"):
        return _decode_tiff(data)
    if data.startswith(b"\x89PNG") and data[PNG_DEPTH_AT : PNG_DEPTH_AT + 1] == b"\x10":
        array = imagecodecs.png_decode(data)  # Pillow would round 16-bit colour to 8 bits
        return array, array.ndim == 3 and array.shape[-1] in (2, 4)
    return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> tuple[np.ndarray, bool]:
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("its contents are none of these") from None
    with opened as file:
        picture = ImageOps.exif_transpose(file)
        transparent = picture.has_transparency_data
        grey = picture.mode in ("1", "L", "LA")
        if picture.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
            raise ValueError(f"its mode {picture.mode} is not supported; save it as 8 or 16 bits")
        mode = ("LA" if transparent else "L") if grey else ("RGBA" if transparent else "RGB")
        return np.asarray(picture.convert(mode)), transparent


def _decode_tiff(data: bytes) -> tuple[np.ndarray, bool]:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if len(file.pages) != 1:
            raise ValueError(f"it has {len(file.pages)} pages; save one of them")
        page = file.pages.first
        orientation = page.tags.get("Orientation")
        turned = orientation is not None and orientation.value != 1
        if turned or page.photometric not in PLAIN_TIFF:
            if page.dtype != np.uint8:
                raise ValueError(
                    "its orientation or colour layout is not supported; save it as RGB"
                )
            return _decode_with_pillow(data)  # palettes, CMYK, inverted grey, cameras held upright
        array = page.asarray()
        if page.axes.startswith("S"):  # planes apart: (C, H, W) -> (H, W, C)
            array = np.moveaxis(array, 0, -1)
        alpha = bool(page.extrasamples) and page.extrasamples[-1] in (1, 2)
        return array, alpha and array.ndim == 3 and array.shape[-1] in (2, 4)


def _check_floats(image: np.ndarray, path: Path) -> None:
    finite = np.isfinite(image)
    if not finite.all():
        raise ValueError(
            f"expected finite values, but {(~finite).sum()} of {image.size} in {path} are NaN or "
            "infinite; replace them first"
        )
    low, high = image.min(), image.max()
    if low < -0.5 or high > 1.5:
        raise ValueError(
            f"expected float values in [0, 1], give or take noise, got [{low:g}, {high:g}] in "
            f"{path}; scale them to [0, 1] and save again"
        )
