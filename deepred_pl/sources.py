"""Find an image by its name: a file, a sample of scikit-image, or an image of a published set."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import numpy as np
import pooch
import skimage.data

SAMPLE, SET = "sample:", "set:"  # prefixes of names that are not paths

# Crops of images that ship with scikit-image: rows, columns.
SAMPLES = {
    "astronaut": (slice(64, 192), slice(160, 288)),
    "camera": (slice(60, 188), slice(150, 278)),
    "chelsea": (slice(80, 208), slice(180, 308)),
    "coffee": (slice(120, 248), slice(250, 378)),
    "rocket": (slice(60, 188), slice(250, 378)),
}

FOLDER_VARIABLE = "DEEPRED_DATA"  # the folder of the sets; without it the user's cache
FOLDERS = {
    "cbm3d9": "cbm3d9",  # denoising: the nine colour images of colour BM3D
    "set5": "set5",
    "set14": "set14",
    "ncsr": "ncsr_deblur",  # deblurring
    "inpainting": "dip_inpainting",
}
TABLE = Path(__file__).with_name("sources.csv")
ADDRESS = "https://raw.githubusercontent.com/{repository}/{commit}/{path}"
MASK = "_mask"
LONGEST = 160  # characters of a reason


@dataclass(frozen=True)
class _File:
    """A row of `sources.csv`: an image, its digest, and where it was published."""

    folder: str
    file: str
    sha256: str
    repository: str
    commit: str
    path: str

    @property
    def stem(self) -> str:
        return Path(self.file).stem

    @property
    def address(self) -> str:
        """The address of the published file, pinned to a commit."""
        place = {"repository": self.repository, "commit": self.commit, "path": self.path}
        return ADDRESS.format(**place)


def find_image(name: str | os.PathLike) -> Path | np.ndarray:
    """Find one image: the path of its file, or the pixels of a sample.

    Args:
        name: A path, "sample:NAME" for a 128×128 crop of an image of scikit-image, (H, W) or
            (H, W, C) uint8, or "set:SET/IMAGE", such as "set:set5/head" or
            "set:inpainting/kate_mask", which is downloaded at first use.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No such sample, set or image, or another file in its place.
        OSError: It cannot be downloaded.
    """
    text = os.fspath(name)
    if text.startswith(SAMPLE):
        sample = text.removeprefix(SAMPLE)
        if sample not in SAMPLES:
            raise ValueError(f"expected one of the samples {', '.join(SAMPLES)}, got {text}")
        return getattr(skimage.data, sample)()[SAMPLES[sample]]
    if text.startswith(SET):
        of_set, _, image = text.removeprefix(SET).partition("/")
        files = {file.stem: file for file in _files(of_set)}
        if image not in files:
            raise ValueError(
                f"expected {SET}{of_set}/IMAGE with one of {', '.join(files)}, got {text}"
            )
        return _fetch(files[image])
    if not Path(text).is_file():
        raise FileNotFoundError(f"expected an image file, found none at {text}; check the path")
    return Path(text)


def find_set(name: str) -> list[Path]:
    """Find the images of a set, downloaded at first use.

    Masks do not count as images; of a set with masks, only images that have one are returned.

    Args:
        name: "set:SET", with SET one of cbm3d9, set5, set14, ncsr or inpainting.

    Raises:
        ValueError: No such set, or another file in an image's place.
        OSError: An image is missing or cannot be downloaded.
    """
    files = _files(name.removeprefix(SET))
    masked = {f.stem.removesuffix(MASK) for f in files if f.stem.endswith(MASK)}
    return [_fetch(f) for f in files if not masked or f.stem in masked]


def name_of(source: str | os.PathLike) -> str:
    """The name of an image: that of its file without folder and suffix, of its sample or set."""
    return Path(os.fspath(source).removeprefix(SAMPLE).removeprefix(SET)).stem


def _files(name: str) -> list[_File]:
    if name not in FOLDERS:
        raise ValueError(f"expected one of the sets {', '.join(FOLDERS)}, got {SET}{name}")
    with TABLE.open(newline="") as table:
        files = [_File(**row) for row in csv.DictReader(table)]
    return [file for file in files if file.folder == FOLDERS[name]]


def _fetch(file: _File) -> Path:
    """The published file, from the folder of `FOLDER_VARIABLE` or through the user's cache."""
    key = f"{file.folder}/{file.file}"
    store = pooch.create(
        pooch.os_cache("deepred_pl"),
        base_url="",
        registry={key: f"sha256:{file.sha256}"},
        urls={key: file.address},
        env=FOLDER_VARIABLE,
        allow_updates=False,
    )
    path = Path(store.abspath) / key
    found = path.is_file()
    if not found and (folder := os.environ.get(FOLDER_VARIABLE)):
        raise FileNotFoundError(
            f"expected {key} in {FOLDER_VARIABLE}={folder}, found none; save {file.address} "
            f"there, or unset {FOLDER_VARIABLE} to download it"
        )
    try:
        return Path(store.fetch(key))
    except (OSError, ValueError) as error:
        if found and isinstance(error, ValueError):  # pooch's for a wrong checksum
            raise ValueError(
                f"expected the published {file.file} (sha256 {file.sha256[:12]}…), got another "
                f"file at {path}; replace it with {file.address}, or use your own image by its path"
            ) from error
        cause: BaseException = error
        while cause.__context__ is not None:  # the innermost cause is the shortest
            cause = cause.__context__
        raise OSError(
            f"expected to download {file.address}, got {shorten(str(cause), LONGEST)}; try again, "
            f"or set {FOLDER_VARIABLE} to a folder with {file.folder}/{file.file}, or save the "
            f"file as {path}"
        ) from error
