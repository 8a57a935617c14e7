import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from deepred_pl.images import ImageFormat, read_image, write_bytes, write_image

RNG = np.random.default_rng(0)


def values(dtype, *shape):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def sixteen_bit_png(array):
    """A 16-bit PNG written from the format's specification: no filter, one IDAT chunk."""
    height, width = array.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if array.ndim == 2 else array.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def expected(array):
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array.astype(np.float64) / np.iinfo(array.dtype).max).movedim(-1, 0)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1, 3)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_eight_bits_are_read_as_stored_and_written_back(tmp_path, shape, suffix):
    array = values(np.uint8, *shape)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(array).save(path)
    image, image_format = read_image(path)
    torch.testing.assert_close(image[0].double(), expected(array), atol=1e-7, rtol=0)
    assert image_format == ImageFormat("uint8", None)
    write_image(tmp_path / "back.png", image, image_format)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "back.png")), array)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
@pytest.mark.parametrize("suffix", ["png", "tif", "npy"])
def test_sixteen_bits_keep_their_depth(tmp_path, shape, suffix):
    array = values(np.uint16, *shape)
    path = tmp_path / f"image.{suffix}"
    if suffix == "png":
        path.write_bytes(sixteen_bit_png(array))
    elif suffix == "tif":
        tifffile.imwrite(path, array)
    else:
        np.save(path, array)
    image, image_format = read_image(path)
    torch.testing.assert_close(image[0].double(), expected(array), atol=1e-7, rtol=0)
    assert image_format.dtype == "uint16"
    write_image(tmp_path / "back.png", image, image_format)
    again, again_format = read_image(tmp_path / "back.png")
    assert torch.equal(again, image)
    assert again_format.dtype == "uint16"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_kept_aside_and_written_back(tmp_path, dtype, channels):
    array = values(dtype, 6, 5, channels)
    path = tmp_path / "image.png"
    if dtype == np.uint16:
        path.write_bytes(sixteen_bit_png(array))
    else:
        Image.fromarray(array, "LA" if channels == 2 else "RGBA").save(path)
    image, image_format = read_image(path)
    assert image.shape == (1, channels - 1, 6, 5)
    np.testing.assert_array_equal(image_format.alpha, array[..., -1])
    write_image(tmp_path / "back.png", image, image_format)
    again, again_format = read_image(tmp_path / "back.png")
    assert torch.equal(again, image)
    np.testing.assert_array_equal(again_format.alpha, array[..., -1])


def test_floats_come_back_as_floats(tmp_path):
    array = RNG.random((5, 7, 3), dtype=np.float32)
    np.save(tmp_path / "image.npy", array)
    image, image_format = read_image(tmp_path / "image.npy")
    assert image_format.suffix(3) == ".tif"
    write_image(tmp_path / "back.tif", image, image_format)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "back.tif"), array)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels_fits_a_tiff(tmp_path, channels):
    array = RNG.random((5, 7, channels), dtype=np.float32)
    np.save(tmp_path / "image.npy", array)
    image, image_format = read_image(tmp_path / "image.npy")
    assert image.shape == (1, channels, 5, 7)
    write_image(tmp_path / f"back{image_format.suffix(channels)}", image, image_format)
    with tifffile.TiffFile(tmp_path / "back.tif") as file:
        assert len(file.pages) == 1
    assert torch.equal(read_image(tmp_path / "back.tif")[0], image)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_written_into_a_tiff(tmp_path, channels):
    array = values(np.uint8, 6, 5, channels)
    alpha = ImageFormat("uint8", array[..., -1])
    image = expected(array[..., :-1]).float()[None]
    write_image(tmp_path / "image.tif", image, alpha)
    again, again_format = read_image(tmp_path / "image.tif")
    assert torch.equal(again, image)
    np.testing.assert_array_equal(again_format.alpha, array[..., -1])


def test_unusual_tiffs_look_as_other_programs_show_them(tmp_path):
    array = values(np.uint8, 8, 16)
    tifffile.imwrite(tmp_path / "inverted.tif", 255 - array, photometric="miniswhite")
    torch.testing.assert_close(
        read_image(tmp_path / "inverted.tif")[0][0].double(), expected(array), atol=1e-7, rtol=0
    )
    colours = values(np.uint8, 8, 16, 3)
    Image.fromarray(colours).convert("P").save(tmp_path / "palette.tif")
    assert read_image(tmp_path / "palette.tif")[0].shape == (1, 3, 8, 16)
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert read_image(tmp_path / "cmyk.tif")[0].shape == (1, 3, 8, 16)
    Image.fromarray(colours).save(tmp_path / "turned.tif", tiffinfo={274: 6})
    assert read_image(tmp_path / "turned.tif")[0].shape == (1, 3, 16, 8)
    tifffile.imwrite(tmp_path / "white16.tif", array.astype(np.uint16), photometric="miniswhite")
    with pytest.raises(ValueError, match="save it as RGB"):
        read_image(tmp_path / "white16.tif")


def test_byte_order_does_not_matter(tmp_path):
    array = values(np.uint16, 5, 7)
    np.save(tmp_path / "big.npy", array.astype(">u2"))
    torch.testing.assert_close(
        read_image(tmp_path / "big.npy")[0][0].double(), expected(array), atol=1e-7, rtol=0
    )


def test_jpeg_palette_cmyk_and_rotation(tmp_path):
    array = values(np.uint8, 8, 16, 3)
    picture = Image.fromarray(array)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° to the right
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert read_image(tmp_path / "turned.jpg")[0].shape == (1, 3, 16, 8)
    picture.convert("P").save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png")[0].shape == (1, 3, 8, 16)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read_image(tmp_path / "cmyk.jpg")[0].shape == (1, 3, 8, 16)
    picture.convert("1").save(tmp_path / "bits.png")
    assert set(read_image(tmp_path / "bits.png")[0].unique().tolist()) <= {0.0, 1.0}


def test_values_beyond_white_are_clipped_on_writing(tmp_path):
    write_image(tmp_path / "image.png", torch.tensor([[[[-0.5, 0.5, 1.5]]]]))
    assert np.asarray(Image.open(tmp_path / "image.png")).tolist() == [[0, 128, 255]]


def png_bytes():
    buffer = io.BytesIO()
    Image.fromarray(values(np.uint8, 40, 40, 3)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.png", b"", "the file is empty"),
        ("empty.tif", b"", "the file is empty"),
        ("empty.npy", b"", "the file is empty"),
        ("text.png", b"I am no picture", "cannot read"),
        ("text.tif", b"I am no picture", "cannot read"),
        ("cut.png", png_bytes()[:300], "cannot read"),
        ("cut16.png", sixteen_bit_png(values(np.uint16, 30, 30, 3))[:200], "cannot read"),
    ],
)
def test_broken_files_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_image(tmp_path / name)
    assert name in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none at .*nowhere\.png"):
        read_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0.5, np.nan]]), "1 of 2 in .* are NaN"),
        (np.array([[0.0, 200.0]]), r"in \[0, 1\].*got \[0, 200\]"),
        (np.zeros((2, 3), np.int64), "int64"),
        (np.zeros((2, 3, 4, 5), np.uint8), r"\(2, 3, 4, 5\)"),
        (np.zeros((0, 3), np.uint8), r"\(0, 3, 1\)"),
        (np.array(["text", None], dtype=object), "cannot read"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, array, message):
    np.save(tmp_path / "image.npy", array)
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / "image.npy")


def test_pages_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        for _ in range(3):
            file.write(values(np.uint8, 4, 5), contiguous=False)
    with pytest.raises(ValueError, match="3 pages"):
        read_image(tmp_path / "pages.tif")


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "result.json"
    write_bytes(path, b"first")
    with pytest.raises(TypeError):
        write_bytes(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
