import io
import os
import resource
import struct
import zlib

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image, ImageCms

from deepred_pl.images import (
    ImageFormat,
    displayed,
    read_image,
    to_array,
    to_tensor,
    write_bytes,
    write_image,
)
from deepred_pl.operators import Mask

RNG = np.random.default_rng(0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile_for(space):
    """A profile that says it is for grey or CMYK values; only its header counts here."""
    return SRGB[:16] + space + SRGB[20:]


def values(dtype, *shape):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def sixteen_bit_png(array, *extra_chunks):
    """A 16-bit PNG written from the format's specification: no filter, one IDAT chunk."""
    height, width = array.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if array.ndim == 2 else array.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
        *extra_chunks,
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
    assert image_format == ImageFormat("uint8", kind="tiff" if suffix == "tif" else "")
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
    array = RNG.random((21, 22, channels), dtype=np.float32)
    np.save(tmp_path / "image.npy", array)
    image, image_format = read_image(tmp_path / "image.npy")
    assert image.shape == (1, channels, 21, 22)
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
    tifffile.imwrite(tmp_path / "white16.tif", array.astype(np.uint16), photometric="miniswhite")
    with pytest.raises(ValueError, match="save it as RGB"):
        read_image(tmp_path / "white16.tif")


def test_fax_tiffs_and_ycbcr_tiffs_look_as_they_were_made(tmp_path):
    photo = skimage.data.astronaut()[64:103, 160:207]
    bits = Image.fromarray(photo[..., 0]).convert("1")
    for photometric in (0, 1):  # white is zero, or black is
        path = tmp_path / f"bits_{photometric}.tif"
        bits.save(path, tiffinfo={262: photometric}, compression="group4")
        read = read_image(path)[0][0, 0].numpy()
        np.testing.assert_array_equal(read, np.asarray(bits))
    Image.fromarray(photo).convert("YCbCr").save(tmp_path / "ycbcr.tif")
    tifffile.imwrite(tmp_path / "jpeg.tif", photo, photometric="rgb", compression="jpeg")
    for name, levels in (("ycbcr.tif", 3), ("jpeg.tif", 40)):
        difference = read_image(tmp_path / name)[0][0].movedim(0, -1).numpy() * 255 - photo
        assert abs(difference).max() <= levels
        assert abs(difference).mean() < 5


@pytest.mark.parametrize("bits", [4, 12])
def test_depths_between_are_refused(tmp_path, bits):
    tifffile.imwrite(tmp_path / "odd.tif", values(np.uint16, 8, 16))
    with tifffile.TiffFile(tmp_path / "odd.tif", mode="r+b") as file:
        file.pages[0].tags[258].overwrite(bits)
    with pytest.raises(ValueError, match=f"{bits} bits per value are not supported"):
        read_image(tmp_path / "odd.tif")


def test_slices_of_a_volume_are_pages(tmp_path):
    volume = values(np.uint8, 16, 32, 48)
    tifffile.imwrite(tmp_path / "volume.tif", volume, volumetric=True, tile=(16, 16, 16))
    with pytest.raises(ValueError, match="it has 16 pages"):
        read_image(tmp_path / "volume.tif")
    image, image_format = read_image(tmp_path / "volume.tif", page=5)
    np.testing.assert_array_equal(to_array(image, image_format)[..., 0], volume[5])


def test_what_only_pillow_knows_is_not_opened(tmp_path):
    Image.fromarray(values(np.uint8, 9, 7, 3)).save(tmp_path / "program.eps")  # PostScript
    (tmp_path / "program.eps").rename(tmp_path / "program.png")
    with pytest.raises(ValueError, match="none of these"):
        read_image(tmp_path / "program.png")


SIDE = 50_000  # pixels of a bomb


def png_bomb(depth, colours):
    """A PNG of SIDE × SIDE pixels, or as many of them as 300 MB of zeros come to."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colours, 0, 0, 0)
    rows = zlib.compress(bytes(SIDE * (SIDE // 8 + 1)))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def write_bomb(path):
    """A file of less than 1 MB that becomes an image of gigabytes."""
    if path.suffix == ".png":
        path.write_bytes(png_bomb(1, 0) if path.stem == "bits" else png_bomb(16, 2))
    elif path.suffix == ".tif":
        tifffile.imwrite(path, values(np.uint8, 16, 16), compression="deflate")
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags[256].overwrite(SIDE)
            file.pages[0].tags[257].overwrite(SIDE)
    else:
        with path.open("wb") as file:
            shape = {"descr": "<f8", "fortran_order": False, "shape": (SIDE, SIDE, 3)}
            np.lib.format.write_array_header_1_0(file, shape)
    assert path.stat().st_size < 2**20


@pytest.mark.parametrize("name", ["bits.png", "deep.png", "bytes.tif", "numbers.npy"])
def test_bombs_are_refused_before_they_are_decoded(tmp_path, name):
    write_bomb(tmp_path / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"cannot read .*{name}: .*(bomb|greater than file size)"):
        read_image(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kB


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_what_the_memory_does_not_hold_is_refused(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"image{suffix}"
    write_image(path, torch.rand(1, 3, 200, 300))
    free = path.stat().st_size + 10_000  # enough to read the file alone
    monkeypatch.setattr("deepred_pl.memory.free_memory", lambda device: free)
    with pytest.raises(ValueError, match=r"reading it needs about .* of memory, but only"):
        read_image(path)


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


def write_pages(path, pages, **options):
    with tifffile.TiffWriter(path) as file:
        for page in pages:
            file.write(page, contiguous=False, **options)


def test_a_page_of_a_tiff_is_chosen(tmp_path):
    pages = [values(np.uint16, 4 + n, 5) for n in range(3)]
    path = tmp_path / "pages.tif"
    write_pages(path, pages)
    for n, page in enumerate(pages):
        image, image_format = read_image(path, page=n)
        np.testing.assert_array_equal(to_array(image, image_format)[..., 0], page)
    with pytest.raises(ValueError, match=r"3 pages; set data.page to one of 0 to 2"):
        read_image(path)
    for page in (3, -1):
        with pytest.raises(ValueError, match=rf"no page {page}; set data.page to one of 0 to 2"):
            read_image(path, page=page)


def test_pages_that_pillow_decodes_are_chosen_and_turned(tmp_path):
    pictures = [Image.fromarray(values(np.uint8, 8, 16, 3)) for _ in range(3)]
    pictures = [pictures[0].convert("CMYK"), pictures[1].quantize(), pictures[2].quantize()]
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        file.write(np.asarray(pictures[0]), photometric="separated")
        for picture, orientation in zip(pictures[1:], [1, 6], strict=True):
            palette = np.zeros((3, 256), np.uint16)
            colours = np.array(picture.getpalette(), np.uint16).reshape(-1, 3).T
            palette[:, : colours.shape[1]] = colours * 257
            tags = [(274, "H", 1, orientation, True)]
            file.write(np.asarray(picture), photometric="palette", colormap=palette, extratags=tags)
    for n, picture in enumerate(pictures):
        image, image_format = read_image(tmp_path / "pages.tif", page=n)
        shown = np.asarray(picture.convert("RGB"))
        shown = np.rot90(shown, -1) if n == 2 else shown
        np.testing.assert_array_equal(to_array(image, image_format), shown)


@pytest.mark.parametrize("suffix", ["png", "npy", "tif"])
def test_a_file_of_one_image_has_page_0_alone(tmp_path, suffix):
    array = values(np.uint8, 4, 5)
    path = tmp_path / f"image.{suffix}"
    np.save(path, array) if suffix == "npy" else Image.fromarray(array).save(path)
    assert read_image(path, page=0)[0].shape == (1, 1, 4, 5)
    with pytest.raises(ValueError, match="no page 1"):
        read_image(path, page=1)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_are_refused(tmp_path, suffix):
    frames = [Image.fromarray(values(np.uint8, 9, 7, 3)) for _ in range(2)]
    frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="2 frames; save one of them"):
        read_image(tmp_path / f"moving.{suffix}")


def test_a_camera_file_with_a_second_picture_is_read(tmp_path):
    frames = [Image.fromarray(values(np.uint8, 9, 7, 3)) for _ in range(2)]
    frames[0].save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "photo.jpg")[0].shape == (1, 3, 9, 7)


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "result.json"
    write_bytes(path, b"first")
    with pytest.raises(TypeError):
        write_bytes(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_nothing_is_written_through_a_link(tmp_path):
    target, run = tmp_path / "target", tmp_path / "run"
    run.mkdir()
    target.write_text("of somebody else")
    for name in ("restored.png", f".restored.png.{os.getpid()}"):
        (run / name).symlink_to(target)
    write_image(run / "restored.png", torch.rand(1, 3, 9, 7))
    assert target.read_text() == "of somebody else"
    assert [path.name for path in run.iterdir()] == ["restored.png"]
    assert not (run / "restored.png").is_symlink()


def test_12_bits_in_16_are_read_in_their_range_and_written_back(tmp_path):
    array = values(np.uint16, 5, 7, 3) // 16
    array[0, 0], array[1, 1] = 0, 4095
    tifffile.imwrite(tmp_path / "image.tif", array, photometric="rgb")
    for intensity_range in ([0, 4095], "minmax"):
        image, image_format = read_image(tmp_path / "image.tif", intensity_range)
        assert (image.min(), image.max()) == (0, 1)
        torch.testing.assert_close(
            image[0].movedim(0, -1).double(), torch.tensor(array / 4095), atol=1e-7, rtol=0
        )
        assert (image_format.low, image_format.high) == (0, 4095)
        for name in ("back.png", "back.tif"):
            write_image(tmp_path / name, image, image_format)
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "back.tif"), array)
        assert torch.equal(read_image(tmp_path / "back.png", [0, 4095])[0], image)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "int64", "uint64"])
def test_any_integers_are_read_in_a_range_and_written_back(tmp_path, dtype):
    low = 0 if dtype[0] == "u" else -100
    array = RNG.integers(low, 101, (5, 7), dtype=dtype)
    tifffile.imwrite(tmp_path / "image.tif", array)
    with pytest.raises(ValueError, match=rf"got {dtype} .*intensity_range to minmax"):
        read_image(tmp_path / "image.tif")
    for intensity_range in ("minmax", "percentile", (low, 100)):
        image, image_format = read_image(tmp_path / "image.tif", intensity_range)
        assert image_format.dtype == dtype and image_format.suffix(1) == ".tif"
        write_image(tmp_path / "back.tif", image, image_format)
        back = tifffile.imread(tmp_path / "back.tif")
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, array)


def test_the_greatest_integers_do_not_wrap_around():
    array = np.array([[0, np.iinfo(np.int64).max]])
    image, image_format = to_tensor(array, "minmax")
    back = to_array(image, image_format)
    np.testing.assert_allclose(back[..., 0].astype(float), array.astype(float), rtol=1e-15)


def test_floats_of_any_range_come_back_as_floats(tmp_path):
    array = RNG.normal(1000, 50, (5, 7, 2))
    np.save(tmp_path / "image.npy", array)
    image, image_format = read_image(tmp_path / "image.npy", "minmax")
    assert (image.min(), image.max()) == (0, 1)
    assert image_format.low == tuple(array.min((0, 1)))
    assert image_format.high == tuple(array.max((0, 1)))
    write_image(tmp_path / "back.tif", image, image_format)
    back = tifffile.imread(tmp_path / "back.tif")
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, array, rtol=1e-6)


def test_percentiles_leave_the_tails_outside():
    array = RNG.normal(size=(101, 103)).astype(np.float32)
    array[0, 0] = 1e6  # a hot pixel
    image, image_format = to_tensor(array, "percentile")
    np.testing.assert_allclose(
        (image_format.low, image_format.high), np.percentile(array, (0.1, 99.9)), rtol=1e-6
    )
    assert image.max() > 1000 and 0.001 < (image < 0).float().mean() < 0.002
    np.testing.assert_allclose(to_array(image, image_format)[..., 0], array, rtol=1e-6, atol=1e-6)


def test_percentiles_of_integers_do_not_overflow():
    _, image_format = to_tensor(np.array([[-30000, 30000]], np.int16), "percentile")
    assert (image_format.low, image_format.high) == pytest.approx((-29940, 29940))


@pytest.mark.parametrize("measured", ["minmax", "percentile"])
def test_two_files_are_read_in_one_range(tmp_path, measured):
    truth = RNG.normal(200, 30, (33, 47))
    truth[3, 4] = 5000
    noisy = truth + RNG.normal(0, 5, truth.shape)
    np.save(tmp_path / "truth.npy", truth)
    np.save(tmp_path / "noisy.npy", noisy)
    y, image_format = read_image(tmp_path / "noisy.npy", measured)
    shared = (image_format.low, image_format.high)
    image, truth_format = read_image(tmp_path / "truth.npy", shared)
    assert (truth_format.low, truth_format.high) == shared
    assert torch.equal(read_image(tmp_path / "noisy.npy", shared)[0], y)
    scale = shared[1] - shared[0]
    np.testing.assert_allclose((y - image)[0, 0] * scale, noisy - truth, atol=1e-6 * 5000)


def test_alpha_does_not_count_for_the_range(tmp_path):
    array = np.full((5, 7, 4), 255, np.uint8)
    array[..., :3] = RNG.integers(50, 100, (5, 7, 3))
    Image.fromarray(array, "RGBA").save(tmp_path / "image.png")
    image, image_format = read_image(tmp_path / "image.png", "minmax")
    assert image_format.low == tuple(array[..., :3].min((0, 1)))
    assert image_format.high == tuple(array[..., :3].max((0, 1)))
    write_image(tmp_path / "back.png", image, image_format)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "back.png")), array)


@pytest.mark.parametrize(
    "bad",
    ["auto", "12", [0], [0, 1, 2], [1, 1], [2, 1], [0, np.inf], [np.nan, 1], ["a", "b"], None, 5],
)
def test_bad_ranges_are_refused(bad):
    with pytest.raises(ValueError, match=r"intensity_range must be .*lo < hi, got .* for scan"):
        to_tensor(np.array([[0.0, 1.0]]), bad, "scan")


@pytest.mark.parametrize(
    ("array", "intensity_range", "message"),
    [
        (np.full((3, 4), 7, np.uint8), "minmax", r"that differ.* minmax .*\[7, 7\].*\[lo, hi\]"),
        (np.full((3, 4), 7.5), "percentile", r"that differ.*percentile.*\[7\.5, 7\.5\]"),
        (
            np.array([[-3.0, 9]]),
            "dtype",
            r"in \[0, 1\].*\[-3, 9\].*intensity_range to the \[lo, hi\].*such as \[-3, 9\]",
        ),
        (np.array([[1j]]), "minmax", "complex128 in scan"),
        (np.array([[0.0, np.inf]]), "minmax", "1 of 2 in scan are NaN, infinite"),
        (np.zeros(3), "dtype", r"\(3,\) in scan"),
    ],
)
def test_values_that_do_not_fit_a_range_are_refused(array, intensity_range, message):
    with pytest.raises(ValueError, match=message):
        to_tensor(array, intensity_range, "scan")


def test_noise_beyond_an_explicit_range_is_kept():
    image, _ = to_tensor(np.array([[-4, 0, 10, 14]], np.int16), [0, 10])
    torch.testing.assert_close(image.flatten(), torch.tensor([-0.4, 0.0, 1.0, 1.4]))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 6)])
def test_arrays_come_back_as_they_were(dtype, shape):
    array = RNG.random(shape, np.float32) if dtype == "float32" else values(dtype, *shape)
    image, image_format = to_tensor(array)
    assert image.shape == (1, shape[2] if len(shape) == 3 else 1, 5, 7)
    assert image.is_contiguous() and image.dtype == torch.float32
    back = to_array(image, image_format)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, array.reshape(back.shape))


def test_a_format_knows_the_range_of_its_type():
    assert [ImageFormat(d).high for d in ("uint8", "uint16", "float32")] == [255, 65535, 1]
    assert ImageFormat() == ImageFormat("uint8", None, 0, 255)


@pytest.mark.parametrize(
    ("image_format", "channels"),
    [(ImageFormat("float32"), 1), (ImageFormat("int16"), 3), (ImageFormat(), 2)],
)
def test_what_a_png_cannot_hold_is_refused(tmp_path, image_format, channels):
    with pytest.raises(ValueError, match=rf"ending in \.tif for {channels} channels"):
        write_image(tmp_path / "image.png", torch.zeros(1, channels, 5, 7), image_format)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("layout", ["contig", "separate"])
@pytest.mark.parametrize("channels", [2, 5])
def test_many_channels_come_back(tmp_path, channels, layout, dtype):
    shape = (6, 7, channels)
    array = RNG.random(shape, np.float32) if dtype == "float32" else values(dtype, *shape)
    stored = np.moveaxis(array, -1, 0) if layout == "separate" else array
    tifffile.imwrite(tmp_path / "image.tif", stored, planarconfig=layout, photometric="minisblack")
    image, image_format = read_image(tmp_path / "image.tif")
    assert image.shape == (1, channels, 6, 7) and image_format.alpha is None
    assert image_format.suffix(channels) == ".tif"
    np.testing.assert_array_equal(to_array(image, image_format), array)
    write_image(tmp_path / "back.tif", image, image_format)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "back.tif"), stored)


def test_alpha_beside_many_channels_is_kept(tmp_path):
    array = values(np.uint8, 6, 7, 6)
    image, _ = to_tensor(array[..., :5])
    write_image(tmp_path / "image.tif", image, ImageFormat("uint8", array[..., 5]))
    again, again_format = read_image(tmp_path / "image.tif")
    assert torch.equal(again, image)
    np.testing.assert_array_equal(again_format.alpha, array[..., 5])


def checked(path):
    """The picture, by Pillow, after Pillow found the file sound."""
    with Image.open(path) as picture:
        picture.verify()
    picture = Image.open(path)
    picture.load()
    return picture


@pytest.mark.parametrize("source", ["png", "jpg", "tif", "png16", "tif16"])
def test_the_colour_profile_is_kept(tmp_path, source):
    array = values(np.uint16 if source.endswith("16") else np.uint8, 5, 7, 3)
    path = tmp_path / f"image.{source[:3]}"
    if source == "png16":
        chunk = b"iCCP", b"sRGB\0\0" + zlib.compress(SRGB)
        path.write_bytes(sixteen_bit_png(array, chunk))
    elif source == "tif16":
        tags = [(34675, 7, len(SRGB), SRGB, True)]
        tifffile.imwrite(path, array, photometric="rgb", extratags=tags)
    else:
        Image.fromarray(array).save(path, icc_profile=SRGB)
    image, image_format = read_image(path)
    assert image_format.icc_profile == SRGB
    for name in ("back.png", "back.tif"):
        write_image(tmp_path / name, image, image_format)
        assert read_image(tmp_path / name)[1].icc_profile == SRGB
        assert torch.equal(read_image(tmp_path / name)[0], image)
    assert checked(tmp_path / "back.png").info["icc_profile"] == SRGB
    with tifffile.TiffFile(tmp_path / "back.tif") as file:
        assert file.pages[0].tags[34675].value == SRGB


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_grey_profile_is_kept_for_grey(tmp_path, dtype):
    profile = profile_for(b"GRAY")
    array = values(dtype, 5, 7)
    Image.fromarray(array).save(tmp_path / "image.png", icc_profile=profile)
    image, image_format = read_image(tmp_path / "image.png")
    write_image(tmp_path / "back.png", image, image_format)
    back = checked(tmp_path / "back.png")
    assert back.info["icc_profile"] == profile
    np.testing.assert_array_equal(np.asarray(back), array)
    write_image(tmp_path / "rgb.png", image.expand(-1, 3, -1, -1), image_format)
    assert "icc_profile" not in checked(tmp_path / "rgb.png").info


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_a_profile_for_other_colours_is_dropped(tmp_path, suffix):
    picture = Image.fromarray(values(np.uint8, 5, 7, 3)).convert("CMYK")
    picture.save(tmp_path / f"cmyk.{suffix}", icc_profile=profile_for(b"CMYK"))
    assert read_image(tmp_path / f"cmyk.{suffix}")[1].icc_profile is None


@pytest.mark.parametrize("unit", ["inch", "centimeter"])
def test_the_pixel_size_of_a_tiff_is_kept(tmp_path, unit):
    array = values(np.uint16, 5, 7, 3)
    tifffile.imwrite(
        tmp_path / "image.tif",
        array,
        photometric="rgb",
        resolution=(300, 150.5),
        resolutionunit=unit,
    )
    image, image_format = read_image(tmp_path / "image.tif")
    assert image_format.resolution == (300, 150.5, unit)
    write_image(tmp_path / "back.tif", image, image_format)
    assert read_image(tmp_path / "back.tif")[1].resolution == (300, 150.5, unit)


TURNED = {  # EXIF orientation: how NumPy makes the picture upright
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("source", ["png", "png16", "jpg", "tif", "tif16", "palette"])
def test_orientation_is_applied_once(tmp_path, source, orientation):
    array = values(np.uint16 if source.endswith("16") else np.uint8, 5, 7, 3)
    path = tmp_path / ("image." + (source[:3] if source != "palette" else "tif"))
    exif = Image.Exif()
    exif[274] = orientation
    if source == "png16":
        path.write_bytes(sixteen_bit_png(array, (b"eXIf", exif.tobytes()[6:])))
    elif source == "tif16":
        tags = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(path, array, photometric="rgb", extratags=tags)
    else:
        picture = Image.fromarray(array)
        picture = picture.quantize() if source == "palette" else picture
        tiff = {"tiffinfo": {274: orientation}} if path.suffix == ".tif" else {"exif": exif}
        picture.save(path, dpi=(300, 150), **tiff)
        array = np.asarray((Image.open(path) if source == "jpg" else picture).convert("RGB"))
    image, image_format = read_image(path)
    upright = TURNED[orientation](array)
    np.testing.assert_array_equal(to_array(image, image_format), upright)
    for name in ("back.png", "back.tif"):
        write_image(tmp_path / name, image, image_format)
        np.testing.assert_array_equal(to_array(*read_image(tmp_path / name)), upright)
        back = checked(tmp_path / name) if name == "back.png" or array.dtype == np.uint8 else None
        if back is not None:
            assert back.getexif().get(274, 1) == 1
            assert back.size == upright.shape[1::-1]
            if path.suffix == name[4:] == ".tif" and source != "tif16":
                dpi = (300, 150) if orientation < 5 else (150, 300)
                assert back.info["dpi"] == pytest.approx(dpi, rel=1e-3)


# Missing values, ranges of channels, and what a TIFF says about its pixels


@pytest.mark.parametrize("kind", ["nan", "masked", "masked integers"])
def test_missing_values_stay_missing_and_out_of_the_range(kind):
    array = values(np.uint16, 9, 11).astype(np.float32)
    gone = np.zeros(array.shape, bool)
    gone[2, 3] = gone[5] = True
    want = (array - array[~gone].min()) / np.ptp(array[~gone])
    if kind == "nan":
        array = np.where(gone, np.nan, array)
    else:
        array[gone] = 60000
        array = np.ma.masked_array(array, gone)
        array = array.astype(np.uint16) if kind == "masked integers" else array
    image, _ = to_tensor(array, "minmax", missing=True)
    np.testing.assert_array_equal(image[0, 0].isnan().numpy(), gone)
    np.testing.assert_allclose(image[0, 0].numpy()[~gone], want[~gone], atol=1e-6)
    with pytest.raises(ValueError, match=r"12 of 99 in the image are NaN, infinite or marked"):
        to_tensor(array, "minmax")


def test_the_nodata_tag_of_a_tiff_marks_missing_values(tmp_path):
    array = values(np.uint16, 9, 11)
    array[4] = 7777
    extra = [(42113, "s", 0, "7777", True)]
    tifffile.imwrite(tmp_path / "dem.tif", array, extratags=extra)
    image, _ = read_image(tmp_path / "dem.tif", missing=True)
    np.testing.assert_array_equal(image[0, 0].isnan().numpy(), array == 7777)


@pytest.mark.parametrize(
    ("dtype", "tag", "lost"),
    [
        (np.uint8, "-9999", 0),
        (np.uint8, "256", 0),
        (np.uint8, "none", 0),
        (np.uint8, "nan", 0),
        (np.float32, "-3.40282346638529e+38", 11),
        (np.float32, "nan", 11),
    ],
)
def test_nodata_tags_as_other_programs_write_them(tmp_path, dtype, tag, lost):
    array = values(np.uint8, 9, 11).astype(dtype) / (255 if dtype == np.float32 else 1)
    array = array.astype(dtype)
    if lost:
        array[4] = np.float32(tag)
    tifffile.imwrite(tmp_path / "y.tif", array, extratags=[(42113, "s", 0, tag, True)])
    assert read_image(tmp_path / "y.tif", missing=True)[0].isnan().sum() == lost


def test_a_mask_may_be_black_where_gdal_has_no_data(tmp_path):
    known = np.random.default_rng(0).random((9, 11)) < 0.5
    extra = [(42113, "s", 0, "0", True)]
    tifffile.imwrite(tmp_path / "mask.tif", 255 * known.astype(np.uint8), extratags=extra)
    np.testing.assert_array_equal(Mask(tmp_path / "mask.tif").mask[0, 0].bool().numpy(), known)


@pytest.mark.parametrize("xml", ["<OME></OME>", "<OME><Image><Pixels/></Image></OME>", "<OME"])
def test_an_ome_tiff_without_a_pixel_size_is_read(tmp_path, xml):
    array = values(np.uint8, 9, 11)
    tifffile.imwrite(tmp_path / "y.ome.tif", array, description=xml, metadata=None)
    np.testing.assert_array_equal(read_image(tmp_path / "y.ome.tif", [0, 1])[0][0, 0], array)


@pytest.mark.parametrize("word", ["minmax", "percentile"])
def test_every_channel_has_its_own_range(tmp_path, word):
    array = (1 + values(np.uint16, 33, 47, 3) / 65535) * [4000, 200, 3]
    image, stored = to_tensor(array, word)
    ends = {"minmax": (0, 100), "percentile": (0.1, 99.9)}[word]
    for i in range(3):
        low, high = np.percentile(array[..., i].astype(np.float64), ends)
        np.testing.assert_allclose(
            image[0, i].numpy(), (array[..., i] - low) / (high - low), atol=1e-5
        )
    np.testing.assert_allclose(to_array(image, stored), array, rtol=1e-5)
    explicit, _ = to_tensor(array, [list(stored.low), list(stored.high)])
    torch.testing.assert_close(explicit, image)


def test_a_constant_channel_is_black_and_comes_back():
    array = np.dstack([values(np.uint16, 9, 11), np.full((9, 11), 5)]).astype(np.float32)
    image, stored = to_tensor(array, "minmax")
    assert (image[0, 1] == 0).all()
    np.testing.assert_allclose(to_array(image, stored), array, atol=1e-6)


@pytest.mark.parametrize("kind", ["imagej", "ome", "inch"])
def test_a_tiff_stays_a_tiff_with_its_pixel_size(tmp_path, kind):
    array = values(np.uint16, 9, 11)
    if kind == "imagej":
        extra = {"imagej": True, "resolution": (9.2, 9.2), "metadata": {"unit": "um"}}
    elif kind == "ome":
        size = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25}
        extra = {"ome": True, "metadata": {"axes": "YX", **size, "PhysicalSizeYUnit": "µm"}}
    else:
        extra = {"resolution": (300, 300), "resolutionunit": "inch"}
    tifffile.imwrite(tmp_path / "in.tif", array, **extra)
    image, stored = read_image(tmp_path / "in.tif")
    assert stored.suffix(1) == ".tif"
    write_image(tmp_path / "out.tif", image, stored)
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        np.testing.assert_array_equal(file.asarray(), array)
        want = {"imagej": (9.2, 9.2), "ome": (2, 4), "inch": (300, 300)}[kind]
        assert file.pages[0].get_resolution() == pytest.approx(want)
        assert (file.imagej_metadata or {}).get("unit") == {"imagej": "um"}.get(kind)
        assert file.pages[0].resolutionunit == (2 if kind == "inch" else 1)
        if kind == "ome":
            pixels = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
            assert {name: pixels[name] for name in size} == size


@pytest.mark.parametrize(
    ("channels", "shown"),
    [(1, [0]), (2, [0]), (3, [0, 1, 2]), (4, [1]), (5, [2]), (31, [15])],
)
def test_what_is_shown_of_channels(channels, shown):
    image = torch.rand(1, channels, 5, 7)
    assert torch.equal(displayed(image), image[:, shown])
