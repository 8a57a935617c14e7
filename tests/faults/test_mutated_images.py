"""Damaged and hostile image files give a picture or a clear error, whatever they say."""

import io
import random
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image

from deepred_pl.images import read_image, to_array
from tests.faults import processes

SECONDS = 20.0  # for one file; it takes milliseconds
MOST_MEMORY = 2 * 2**30  # bytes, beside what the process has before


def originals():
    """Valid files by name: PNG, JPEG, TIFF and NPY in their kinds."""
    colour = skimage.data.astronaut()[64:103, 160:207]  # 39 rows, 47 columns
    grey, deep = colour[..., 0], colour.astype(np.uint16) * 257
    files = {}

    def pillow(name, array, mode=None, **settings):
        buffer = io.BytesIO()
        picture = Image.fromarray(array)
        (picture.convert(mode) if mode else picture).save(buffer, name.split(".")[-1], **settings)
        files[name] = buffer.getvalue()

    def tiff(name, array, **settings):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, **settings)
        files[name] = buffer.getvalue()

    def npy(name, array):
        buffer = io.BytesIO()
        np.save(buffer, array)
        files[name] = buffer.getvalue()

    pillow("grey.png", grey)
    pillow("colour.png", colour, dpi=(72, 72))
    pillow("alpha.png", colour, "RGBA")
    pillow("palette.png", colour, "P")
    pillow("bilevel.png", grey, "1")
    pillow("deep.png", deep[..., 0])
    pillow("colour.jpeg", colour, quality=90)
    pillow("progressive.jpeg", colour, progressive=True)
    pillow("grey.jpeg", grey)
    pillow("cmyk.jpeg", colour, "CMYK")
    tiff("colour.tif", colour, photometric="rgb")
    tiff("deep.tif", deep, photometric="rgb", compression="zlib", byteorder=">")
    tiff("floats.tif", grey / np.float32(255), compression="lzw", predictor=True)
    tiff("tiles.tif", colour, photometric="rgb", tile=(16, 16), compression="packbits")
    tiff("planes.tif", np.moveaxis(colour, -1, 0), photometric="rgb", planarconfig="separate")
    tiff("jpeg.tif", colour, photometric="rgb", compression="jpeg")
    tiff("zstd.tif", grey, compression="zstd")
    tiff("pages.tif", np.stack([grey] * 2), photometric="minisblack")
    tiff("inverted.tif", grey, photometric="miniswhite")
    npy("bytes.npy", colour)
    npy("floats.npy", grey / 255)
    npy("fortran.npy", np.asfortranarray(deep))
    return files


ORIGINALS = originals()
ABSURD = (0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutated(chance):
    """A name and the bytes of a damaged file."""
    name = chance.choice(list(ORIGINALS))
    data = bytearray(ORIGINALS[name])
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        kind = chance.choice(["flip", "cut", "number", "size", "copy", "splice"])
        at = chance.randrange(max(1, len(data)))
        if chance.random() < 0.5:
            at = min(at, chance.randrange(200))  # headers say more than pixels
        if kind == "flip":
            for _ in range(chance.randint(1, 16)):
                bit = chance.randrange(8 * len(data)) if data else 0
                data[bit // 8 : bit // 8 + 1] = bytes(
                    b ^ 1 << bit % 8 for b in data[bit // 8 : bit // 8 + 1]
                )
        elif kind == "cut":
            del data[at:]
        elif kind == "number":
            form = chance.choice(["<I", ">I", "<H", ">H"])
            width = struct.calcsize(form)
            data[at : at + width] = struct.pack(form, chance.choice(ABSURD) % 256**width)
        elif kind == "size":
            data = with_absurd_size(name, data, chance)
        elif kind == "copy":
            data[at:at] = data[at : at + chance.randint(1, 64)] * chance.randint(1, 20)
        else:
            other = ORIGINALS[chance.choice(list(ORIGINALS))]
            data[at:] = other[chance.randrange(len(other)) :]
    if name.endswith(".png") and chance.random() < 0.7:
        data = with_right_checksums(data)
    return name, bytes(data)


def with_absurd_size(name, data, chance):
    """The file with another width, height or number of channels in its header."""
    size = chance.choice([0, 1, 38, 1000, 20_000, 65_535, 2**20, 2**31 - 1, 2**32 - 1])
    if name.endswith(".png"):
        at = 16 + 4 * chance.randrange(2)
        data[at : at + 4] = struct.pack(">I", size)
    elif name.endswith(".npy"):
        text = str(size * chance.choice([1, 2**30])).encode()
        return bytearray(bytes(data).replace(b"39", text, chance.randint(1, 2)))
    elif name.endswith(".jpeg"):
        at = bytes(data).find(b"\xff\xc0")
        if at >= 0:
            at += 5 + 2 * chance.randrange(2)
            data[at : at + 2] = struct.pack(">H", size % 2**16)
    else:
        form = ">" if data[:1] == b"M" else "<"
        for code in chance.sample([256, 257, 258, 273, 277, 278, 279, 322, 325], 2):
            at = bytes(data).find(struct.pack(form + "H", code))
            if at >= 0:  # type, count, value
                data[at + 8 : at + 12] = struct.pack(form + "I", size)
    return data


def with_right_checksums(data):
    """A PNG whose chunks' checksums are right, so that decoders look into them."""
    at = 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        end = at + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return data


def read_them(connection, folder, seed, begin, end):
    """Read files `begin` to `end`; say before each which it is, and after it what came of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before = peak()
    for i in range(begin, end):
        name, data = mutated(random.Random(f"{seed} {i}"))
        path = folder / name.replace("jpeg", "jpg")
        path.write_bytes(data)
        connection.send(("reads", i))
        connection.send((outcome(path), i))
    connection.send(("memory", peak() - before))


def outcome(path):
    try:
        image, image_format = read_image(path)
    except ValueError as error:
        reason = str(error)
        return "refused" if "\n" not in reason and str(path) in reason else f"unclear: {reason}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    fits = image.ndim == 4 and image.isfinite().all() and image.dtype == torch.float32
    to_array(image[..., :1, :1], image_format)
    return "picture" if fits else f"{tuple(image.shape)} of {image.dtype}"


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_every_damaged_file_is_read_or_refused(tmp_path, seed, long, record_property):
    tries, ends, memory, at = 10_000 if long else 300, {}, 0, 0
    while at < tries:  # behind a file that ends the process, another goes on
        for what, value in processes.told_by(read_them, tmp_path, seed, at, tries, seconds=SECONDS):
            if what == "reads":
                at = value
            elif what == "memory":
                memory, at = max(memory, value), tries
            elif what in ("ended", "hung"):
                if at < tries:
                    ends[at] = f"{what}: {value}"
            else:
                ends[value] = what
        at += 1
    counts = {word: list(ends.values()).count(word) for word in ("picture", "refused")}
    bad = {
        i: (mutated(random.Random(f"{seed} {i}"))[0], e) for i, e in ends.items() if e not in counts
    }
    record_property(
        "figures",
        f"mutated images: {len(ends)} tried, {len(ends) - len(bad)} survived ({counts['picture']} "
        f"pictures, {counts['refused']} refused), {memory / 2**20:.0f} MB at most, seed {seed}",
    )
    assert not bad
    assert len(ends) == tries and min(counts.values()) > tries // 10  # neither is the rule
    assert memory < MOST_MEMORY


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_undamaged_are_read_or_refused_with_their_reason(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(ORIGINALS[name])
    if name == "pages.tif":
        with pytest.raises(ValueError, match=r"2 pages; set data\.page to"):
            read_image(path)
    else:
        image, _ = read_image(path)
        assert image.shape[-2:] == (39, 47)
