"""The test images of the literature, by name: found in a folder, or downloaded once."""

import csv
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

# Where the folders of the sets are; without it, files are downloaded into the user's cache.
FOLDER_VARIABLE = "DEEPRED_DATA"
PREFIX = "set:"
FOLDERS = {
    "cbm3d9": "cbm3d9",  # denoising: the nine colour images of colour BM3D
    "set5": "set5",
    "set14": "set14",
    "ncsr": "ncsr_deblur",  # deblurring
    "inpainting": "dip_inpainting",
}
TABLE = Path(__file__).with_name("datasets.csv")
ADDRESS = "https://raw.githubusercontent.com/{repository}/{commit}/{path}"
MASK = "_mask"
LONGEST = 160  # characters of a reason


@dataclass(frozen=True)
class _File:
    """A row of `datasets.csv`: an image, its digest, and where it was published."""

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
        """Of the published file; the commit never changes."""
        place = {"repository": self.repository, "commit": self.commit, "path": self.path}
        return ADDRESS.format(**place)


def find_image(name: str) -> Path:
    """The file of one image, downloaded if need be.

    Args:
        name: "set:SET/IMAGE", as "set:set5/head" or "set:inpainting/kate_mask".

    Raises:
        ValueError: No such set or image, or another file in its place.
        OSError: It cannot be found or downloaded; the message says where to put it by hand.
    """
    of_set, _, image = name.removeprefix(PREFIX).partition("/")
    files = {file.stem: file for file in _files(of_set)}
    if image not in files:
        raise ValueError(
            f"expected {PREFIX}{of_set}/IMAGE with one of {', '.join(files)}, got {name}"
        )
    return _locate(files[image])


def find_set(name: str) -> list[Path]:
    """The files of a set's images, downloaded if need be.

    Masks are not images of a set; where there are any, its images are those with one.

    Args:
        name: "set:SET", with cbm3d9, set5, set14, ncsr or inpainting.

    Raises:
        ValueError: No such set, or another file in an image's place.
        OSError: One cannot be found or downloaded; the message says where to put it by hand.
    """
    files = _files(name.removeprefix(PREFIX))
    masked = {f.stem.removesuffix(MASK) for f in files if f.stem.endswith(MASK)}
    return [_locate(f) for f in files if (f.stem in masked if masked else True)]


def _files(name: str) -> list[_File]:
    if name not in FOLDERS:
        raise ValueError(f"expected one of the sets {', '.join(FOLDERS)}, got {PREFIX}{name}")
    with TABLE.open(newline="") as table:
        files = [_File(**row) for row in csv.DictReader(table)]
    return [file for file in files if file.folder == FOLDERS[name]]


def _locate(file: _File) -> Path:
    given = os.environ.get(FOLDER_VARIABLE)
    if not given:
        return _download(file)
    path = Path(given).expanduser().absolute() / file.folder / file.file
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {file.folder}/{file.file} in {FOLDER_VARIABLE}={given}, found none; put "
            f"{file.address} there, or unset {FOLDER_VARIABLE} to have it downloaded"
        )
    return _checked(path, file)


def _checked(path: Path, file: _File) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != file.sha256:
        raise ValueError(
            f"expected the published {file.file} (sha256 {file.sha256[:12]}…), got another file "
            f"(sha256 {digest[:12]}…) at {path}; replace it by {file.address}, or give your own "
            "image by its path"
        )
    return path


def _download(file: _File) -> Path:
    """From the cache, or by the network; a broken transfer leaves nothing there."""
    import pooch

    folder = Path(pooch.os_cache("deepred_pl")) / file.folder
    if (folder / file.file).is_file():
        return _checked(folder / file.file, file)
    try:
        return Path(pooch.retrieve(file.address, f"sha256:{file.sha256}", file.file, folder))
    except (OSError, ValueError) as error:  # no network or no such file; another file
        cause: BaseException = error
        while cause.__context__ is not None:  # what lies below tells it in fewer words
            cause = cause.__context__
        raise OSError(
            f"expected to download {file.address}, got {shorten(str(cause), LONGEST)}; try again, "
            f"or name a folder with {file.folder}/{file.file} by {FOLDER_VARIABLE}, or put the "
            f"file by hand at {folder / file.file}"
        ) from error
