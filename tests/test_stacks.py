"""Stacks and cubes: axes of files, and what is written back."""

import itertools

import numpy as np
import pytest
import tifffile
import torch

from deepred_pl.axes import as_stored, axes_of_image, channels_last, guessed_axes, page_index
from deepred_pl.batch.plan import find_images, pages_of
from deepred_pl.images import (
    brightest_page,
    layout_of,
    read_image,
    to_array,
    write_image,
    write_stack,
)
from deepred_pl.operators import Blur, Mask
from deepred_pl.restore import restore

RNG = np.random.default_rng(28)


def random(dtype, *shape):
    if dtype == "float32":
        return RNG.random(shape, np.float32)
    return RNG.integers(0, 200, shape).astype(dtype)


@pytest.mark.parametrize(
    "axes", ["YX", "YXC", "CYX", "TYX", "TZCYX", "ZTYXS", "CZYX", "YXT", "SYX"]
)
def test_a_page_is_the_same_as_by_plain_indexing(axes):
    sizes = {"T": 2, "Z": 3, "C": 4, "S": 3, "Y": 5, "X": 7}
    array = RNG.random([sizes[axis] for axis in axes])
    own = "".join(axis for axis in axes if axis in "CSYX")
    others = [axis for axis in axes if axis not in own]
    places = itertools.product(*(range(sizes[axis]) for axis in others))
    for page, place in enumerate(places):
        chosen = array
        for axis, i in zip(others, place, strict=True):  # an index along one axis after another
            remaining = [a for a in axes if a in own or others.index(a) >= others.index(axis)]
            chosen = np.take(chosen, i, remaining.index(axis))
        np.testing.assert_array_equal(array[page_index(axes, array.shape, page)], chosen)
        image = channels_last(chosen, own)
        assert image.shape[:2] == (5, 7)
        channels = image[..., None] if image.ndim == 2 else image
        np.testing.assert_array_equal(as_stored(channels, own, chosen.shape), chosen)
    assert axes_of_image(axes, "all") == axes
    whole = channels_last(array, axes)
    assert whole.shape[:2] == (5, 7) and whole.size == array.size
    np.testing.assert_array_equal(as_stored(np.atleast_3d(whole), axes, array.shape), array)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((33, 47), "YX"),
        ((33, 47, 3), "YXC"),
        ((96, 96, 31), "YXC"),
        ((48, 64, 10), "YXC"),
        ((1, 33, 47), "CYX"),
        ((5, 33, 47, 3), "TYXC"),
    ],
)
def test_unambiguous_axes_are_guessed(shape, axes):
    assert guessed_axes(shape, "the file") == axes


@pytest.mark.parametrize(
    "shape",
    [
        *((31, 96, 96), (64, 96, 80), (3, 33, 47), (64, 64, 200), (100, 96, 64), (64, 48, 40)),
        *((2, 3, 33, 47), (9,)),
    ],
)
def test_axes_that_are_not_certain_are_asked_for(tmp_path, shape):
    np.save(tmp_path / "cube.npy", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"cube\.npy; set data\.axes to what its axes are"):
        read_image(tmp_path / "cube.npy")


@pytest.mark.parametrize("axes", ["CY", "CYXT", "CCX", "C1X", "TZC"])
def test_axes_that_do_not_fit_are_refused(tmp_path, axes):
    np.save(tmp_path / "cube.npy", np.zeros((4, 33, 47), np.uint8))
    with pytest.raises(ValueError, match=r"one letter for each axis of cube\.npy.*CYX, TYX or YXC"):
        read_image(tmp_path / "cube.npy", axes=axes)


SIZE = {"PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0, "PhysicalSizeXUnit": "µm"}
# A pixel size of exactly one micrometre is one, too.
OME = {**SIZE, "PhysicalSizeYUnit": "µm", "PhysicalSizeZ": 1.5, "PhysicalSizeZUnit": "µm"}
IMAGEJ = {"unit": "um", "spacing": 0.5, "finterval": 2.0, "mode": "composite", "min": 0.0}


def write_pyramid(path, array):
    with tifffile.TiffWriter(path, ome=True) as file:
        metadata = {"axes": "ZCYX", **OME, "Channel": {"Name": ["DAPI", "GFP"]}}
        file.write(array, subifds=1, photometric="minisblack", metadata=metadata)
        file.write(array[..., ::2, ::2], subfiletype=1, photometric="minisblack")


def write_truncated(path, array):  # as ImageJ writes files of more than 4 GB, uncompressed
    options = {"metadata": {"axes": "TZCYX", **IMAGEJ}, "resolution": (4, 2)}
    tifffile.imwrite(path, array, imagej=True, truncate=True, **options)


def write_one_by_one(path, array):
    with tifffile.TiffWriter(path) as file:
        for page in array:
            file.write(page, contiguous=False, metadata=None, resolution=(300, 150))


def tiff(**options):
    return lambda path, array: tifffile.imwrite(path, array, **options)


# How a file is written, its type, its shape, and the shape of one page as (H, W, C).
FILES = {
    "hyperstack": (
        tiff(
            imagej=True,
            metadata={"axes": "TZCYX", **IMAGEJ, "Labels": [f"plane {i}" for i in range(12)]},
            resolution=(4, 2),
        ),
        *("uint16", (2, 3, 2, 33, 47), (33, 47, 2)),
    ),
    "hyperstack with one directory": (
        write_truncated,
        *("float32", (2, 3, 2, 33, 47), (33, 47, 2)),
    ),
    "imagej colours": (
        tiff(imagej=True, metadata={"axes": "ZYXS"}, photometric="rgb"),
        *("uint8", (3, 33, 47, 3), (33, 47, 3)),
    ),
    "ome": (
        tiff(ome=True, metadata={"axes": "TCZYX", **OME}),
        *("int16", (2, 2, 3, 33, 47), (33, 47, 2)),
    ),
    "ome with sub-resolutions": (write_pyramid, "uint16", (3, 2, 33, 48), (33, 48, 2)),
    "plain pages": (write_one_by_one, "uint8", (5, 33, 47), (33, 47, 1)),
    "BigTIFF": (
        tiff(bigtiff=True, photometric="minisblack"),
        *("uint16", (5, 33, 47), (33, 47, 1)),
    ),
    "planes of colours": (
        tiff(photometric="rgb", planarconfig="separate"),
        *("uint8", (4, 3, 33, 47), (33, 47, 3)),
    ),
    "transparency": (
        tiff(photometric="rgb", extrasamples=["unassalpha"]),
        *("uint8", (3, 33, 47, 4), (33, 47, 3)),
    ),
    "without axes": (
        tiff(photometric="minisblack"),
        *("uint16", (2, 3, 33, 47), (33, 47, 1)),
    ),
    "compressed": (
        tiff(photometric="minisblack", compression="deflate", metadata={"axes": "TYX"}),
        *("float32", (4, 33, 47), (33, 47, 1)),
    ),
    "volume": (
        tiff(volumetric=True, tile=(16, 16, 16), photometric="minisblack"),
        *("float32", (5, 33, 47), (33, 47, 1)),
    ),
}


def described(path):
    """What tifffile says about a file."""
    with tifffile.TiffFile(path) as file:
        series, page = file.series[0], file.pages[0]
        about = [series.axes, series.shape, series.dtype, page.get_resolution()]
        imagej = {k: v for k, v in (file.imagej_metadata or {}).items() if k != "ImageJ"}
        pixels = {}
        if file.is_ome:
            found = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
            pixels = {k: v for k, v in found.items() if k not in ("TiffData", "ID")}
        unit = page.resolutionunit if series.kind != "ome" else None
        return [*about[: 3 if file.is_ome else 4], unit, imagej, pixels, page.photometric]


@pytest.mark.parametrize("kind", FILES)
def test_a_stack_comes_back_with_other_pages(tmp_path, kind):
    write, dtype, shape, of_page = FILES[kind]
    array = random(dtype, *shape)
    write(tmp_path / "in.tif", array)
    axes, found, series = layout_of(tmp_path / "in.tif")
    assert (found, series) == (shape, 1)
    count = array.size // (np.prod(of_page) if kind != "transparency" else 33 * 47 * 4)
    restored, expected = {}, array.copy()
    for page in range(count):
        image, image_format = read_image(tmp_path / "in.tif", [0, 1], page=page)
        assert image.shape == (1, of_page[2], *of_page[:2])
        index = page_index(axes, shape, page)
        own = channels_last(array[index], axes_of_image(axes, page)).reshape(33, of_page[1], -1)
        np.testing.assert_array_equal(to_array(image, image_format), own[..., : of_page[2]])
        if page in (1, count - 1):  # as a fit does it
            restored[page] = tmp_path / f"{page}.tif"
            write_image(restored[page], image + 3, image_format)
            expected[index] += np.array(3, dtype)
    if kind == "transparency":
        expected[..., 3] = array[..., 3]
    write_stack(tmp_path / "out.tif", tmp_path / "in.tif", restored)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), expected)
    before, after = described(tmp_path / "in.tif"), described(tmp_path / "out.tif")
    assert after == before


@pytest.mark.parametrize(
    "kind", ["hyperstack", "ome with sub-resolutions", "plain pages", "without axes"]
)
def test_all_pages_are_channels_of_one_image(tmp_path, kind):
    write, dtype, shape, _ = FILES[kind]
    array = random(dtype, *shape)
    write(tmp_path / "in.tif", array)
    image, image_format = read_image(tmp_path / "in.tif", page="all")
    assert image.shape == (1, array.size // (shape[-1] * shape[-2]), *shape[-2:])
    write_image(tmp_path / "out.tif", image, image_format)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), array)
    assert described(tmp_path / "out.tif") == described(tmp_path / "in.tif")


@pytest.mark.parametrize(
    ("axes", "shape"), [("CYX", (31, 33, 47)), ("YXC", (33, 47, 8)), ("YXC", (33, 47, 3))]
)
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_bands_of_an_array_come_back_in_their_order(tmp_path, axes, shape, dtype):
    array = random(dtype, *shape)
    np.save(tmp_path / "cube.npy", array)
    image, image_format = read_image(
        tmp_path / "cube.npy", axes=None if axes == "YXC" else axes.lower()
    )
    bands_first = np.moveaxis(array, axes.index("C"), 0)
    white = 65535 if dtype == "uint16" else 1
    np.testing.assert_allclose(image[0].numpy(), bands_first / white, atol=1e-7)
    path = tmp_path / f"out{image_format.suffix(image.shape[1])}"
    write_image(path, image, image_format)
    if path.suffix == ".tif":
        np.testing.assert_array_equal(tifffile.imread(path), array)
        with tifffile.TiffFile(path) as file:
            assert file.series[0].axes == (axes if 3 not in shape else "YXS")
            assert file.is_imagej == (axes == "CYX")
    np.testing.assert_array_equal(to_array(*read_image(path)), np.moveaxis(bands_first, 0, -1))


def test_enlarged_pages_leave_others_black(tmp_path):
    options = {"metadata": {"axes": "TYX", "unit": "um"}, "resolution": (4, 4)}
    tifffile.imwrite(tmp_path / "in.tif", random("uint8", 3, 33, 47), imagej=True, **options)
    _, image_format = read_image(tmp_path / "in.tif", page=1)
    larger = torch.rand(1, 1, 66, 94)
    write_image(tmp_path / "page.tif", larger, image_format)
    write_stack(tmp_path / "out.tif", tmp_path / "in.tif", {1: tmp_path / "page.tif"})
    stack = tifffile.imread(tmp_path / "out.tif")
    assert stack.shape == (3, 66, 94) and not stack[[0, 2]].any()
    np.testing.assert_array_equal(stack[1], to_array(larger, image_format)[..., 0])


def test_only_the_file_itself_is_read(tmp_path):
    """OME metadata name other files, which are not opened."""
    part = (
        "<TiffData FirstZ='{0}' IFD='0'><UUID FileName='{1}.ome.tif'>urn:uuid:{1}</UUID></TiffData>"
    )
    xml = (
        "<OME UUID='urn:uuid:{}' xmlns='http://www.openmicroscopy.org/Schemas/OME/2016-06'>"
        "<Image ID='Image:0'><Pixels ID='Pixels:0' DimensionOrder='XYZCT' Type='uint8' SizeX='47' "
        "SizeY='33' SizeC='1' SizeZ='2' SizeT='1'><Channel ID='Channel:0:0' SamplesPerPixel='1'/>"
        + part.format(0, "a")
        + part.format(1, "b")
        + "</Pixels></Image></OME>"
    )
    arrays = random("uint8", 2, 33, 47)
    for name, array in zip("ab", arrays, strict=True):
        path = tmp_path / f"{name}.ome.tif"
        tifffile.imwrite(path, array, description=xml.format(name), metadata=None)
    image, image_format = read_image(tmp_path / "a.ome.tif")
    np.testing.assert_array_equal(to_array(image, image_format)[..., 0], arrays[0])


def test_sinograms_keep_their_axes_though_not_their_units():
    cube = RNG.random((5, 60, 12), np.float32)
    settings = {"trainer.max_steps": 2, "data.axes": "CYX", "data.operator.angles": 12}
    settings["data.noise.sigma"] = 60
    restored = restore(cube, ["tomography", "methods/quick"], settings)
    assert restored.shape[0] == 5 and restored.shape[1] == restored.shape[2]


def test_restore_keeps_the_axes_of_an_array(tmp_path):
    cube = RNG.random((5, 35, 41), np.float32)
    settings = {"trainer.max_steps": 2, "data.noise.sigma": 20, "data.axes": "CYX"}
    restored = restore(cube, ["denoising", "methods/quick"], settings)
    assert restored.shape == cube.shape and restored.dtype == np.float32
    last = restore(
        np.moveaxis(cube, 0, -1),
        ["denoising", "methods/quick"],
        {**settings, "data.axes": None},
    )
    np.testing.assert_array_equal(np.moveaxis(last, -1, 0), restored)
    one = restore(
        cube[0][..., None], ["denoising", "methods/quick"], {**settings, "data.axes": "YXC"}
    )
    assert one.shape == (35, 41, 1)
    np.save(tmp_path / "one.npy", cube[0][..., None])
    of_file = restore(
        tmp_path / "one.npy", ["denoising", "methods/quick"], {**settings, "data.axes": "YXC"}
    )
    np.testing.assert_array_equal(of_file, one[..., 0])  # the image of a file is grey
    floats = {**settings, "data.as_floats": True, "data.intensity_range": [0, 2]}
    assert restore(cube, ["denoising", "methods/quick"], floats).shape == cube.shape
    with pytest.raises(ValueError, match="a tensor's axes are known"):
        restore(torch.from_numpy(cube), ["denoising", "methods/quick"], settings)


def test_of_several_series_the_first_is_restored(tmp_path):
    with tifffile.TiffWriter(tmp_path / "in.tif") as file:
        file.write(random("uint8", 3, 33, 47), photometric="minisblack")
        small = random("uint8", 10, 12)
        file.write(small)
    notes = []
    pages = pages_of(find_images([str(tmp_path / "in.tif")]), None, None, notes.append)
    assert [(page.page, page.pages) for page in pages] == [(0, 3), (1, 3), (2, 3)]
    assert len(notes) == 1 and "only the first of its 2 series" in notes[0]
    image, image_format = read_image(tmp_path / "in.tif", page=3)  # of the second
    np.testing.assert_array_equal(to_array(image, image_format)[..., 0], small)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_colour_frames_of_an_array_become_a_stack_of_colours(tmp_path, dtype):
    array = random(dtype, 4, 33, 47, 3)
    np.save(tmp_path / "in.npy", array)
    image, image_format = read_image(tmp_path / "in.npy", [0, 1], page=2)
    write_image(tmp_path / "page.tif", image, image_format)
    write_stack(tmp_path / "out.tif", tmp_path / "in.npy", {2: tmp_path / "page.tif"})
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert file.series[0].axes == "TYXS" and file.pages[0].photometric == 2
        assert file.is_imagej == (dtype == "uint8")
        np.testing.assert_array_equal(file.asarray(), array)


def test_a_damaged_page_costs_only_itself(tmp_path):
    array = random("uint8", 3, 33, 47)
    path = tmp_path / "in.tif"
    options = {"compression": "deflate", "metadata": {"axes": "TYX"}}
    tifffile.imwrite(path, array, photometric="minisblack", **options)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[1].aspage().dataoffsets[0]
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="cannot read"):
        read_image(path, page=1)
    image, image_format = read_image(path, page=0)
    write_image(tmp_path / "page.tif", image, image_format)
    assert brightest_page(path) in (0, 2)
    write_stack(tmp_path / "out.tif", path, {0: tmp_path / "page.tif"})
    restored = tifffile.imread(tmp_path / "out.tif")
    np.testing.assert_array_equal(restored[[0, 2]], array[[0, 2]])
    assert not restored[1].any()


def test_broken_files_are_refused_in_words(tmp_path):
    tifffile.imwrite(tmp_path / "whole.tif", random("uint8", 3, 33, 47), photometric="minisblack")
    data = (tmp_path / "whole.tif").read_bytes()
    refused = 0
    for size in range(4, len(data), 97):
        (tmp_path / "cut.tif").write_bytes(data[:size])
        try:
            layout_of(tmp_path / "cut.tif")
        except ValueError:  # and nothing else
            refused += 1
    assert refused


def test_units_of_other_programs_are_written(tmp_path):
    array = random("uint16", 2, 33, 47)
    described = b"ImageJ=1.54f\nimages=2\nframes=2\nunit=\xb5m\nspacing=0.5\n"
    options = {"description": described, "metadata": None, "resolution": (4, 4)}
    tifffile.imwrite(tmp_path / "in.tif", array, photometric="minisblack", **options)
    image, image_format = read_image(tmp_path / "in.tif", page="all")
    write_image(tmp_path / "out.tif", image, image_format)
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        np.testing.assert_array_equal(file.asarray(), array)
        assert file.imagej_metadata["unit"] == "um" and file.imagej_metadata["spacing"] == 0.5


def test_inverted_grey_is_read_by_pages_only(tmp_path):
    array = random("uint8", 2, 33, 47)
    options = {"photometric": "miniswhite", "metadata": {"axes": "CYX"}}
    tifffile.imwrite(tmp_path / "channels.tif", array, **options)
    with pytest.raises(ValueError, match="several channels; save it with grey"):
        read_image(tmp_path / "channels.tif")
    image, image_format = read_image(tmp_path / "channels.tif", page=1, axes="TYX")
    np.testing.assert_array_equal(to_array(image, image_format)[..., 0], 255 - array[1])


def test_axes_of_length_one_may_be_stated(tmp_path):
    array = random("uint8", 3, 33, 47)
    tifffile.imwrite(tmp_path / "in.tif", array, imagej=True, metadata={"axes": "ZYX"})
    assert layout_of(tmp_path / "in.tif", "TZCYXS")[:2] == ("ZYX", (3, 33, 47))
    assert layout_of(tmp_path / "in.tif", "CYX")[:2] == ("CYX", (3, 33, 47))


def test_masks_and_kernels_have_their_channels_last(tmp_path):
    known = RNG.random((33, 47, 31)) > 0.5  # which as an image would not be certain
    np.save(tmp_path / "mask.npy", known)
    np.testing.assert_array_equal(Mask(tmp_path / "mask.npy").mask[0], np.moveaxis(known, -1, 0))
    np.save(tmp_path / "kernels.npy", RNG.random((3, 15, 15)))
    with pytest.raises(ValueError, match="got a colour image"):
        Blur.from_file(tmp_path / "kernels.npy")
