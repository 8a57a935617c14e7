"""Write files atomically; read and validate checkpoints."""

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

ROOM = 2**16  # bytes that a run needs at least


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file to be written atomically: under its name it is complete or absent.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through an existing symlink
            yield file
        move(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: It cannot be written.
    """
    with replacing(path) as file:
        file.write(data)


def move(complete: Path, path: Path) -> None:
    """Rename a complete file to `path`, once its contents are on the disk.

    Raises:
        OSError: It cannot be written.
    """
    with complete.open("r+b") as file:  # Windows syncs only files open for writing
        os.fsync(file.fileno())
    os.replace(complete, path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write plain data atomically.

    Raises:
        OSError: It cannot be written.
    """
    write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; None where there is none.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"expected a JSON file, but {path} is damaged; remove it") from error


def check_writable(directory: Path, setting: str = "trainer.default_root_dir") -> None:
    """Create a run directory and test that it can be written; `setting` chooses another.

    Raises:
        OSError: It cannot be created or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(ROOM))  # on a full disk an empty file can still be created
    except OSError as error:
        raise OSError(
            f"expected to write the run directory {directory}: {describe(error)}; "
            f"choose another with {setting}"
        ) from error


def describe(error: OSError) -> str:
    """The reason of an operating-system error, without its number and path."""
    return error.strerror or str(error)


def last_checkpoint(directory: Path) -> Path:
    """The path of the checkpoint in a run directory."""
    return directory / "checkpoints" / "last.ckpt"


def load_checkpoint(path: Path, entry: str = "state_dict") -> dict[str, Any]:
    """Load a checkpoint onto the CPU as plain data, and verify its checksums, which torch ignores.

    Raises:
        ValueError: It is missing or damaged, holds more than data, or lacks `entry`.
    """
    if not path.is_file():
        raise ValueError(f"expected a run's checkpoints/last.ckpt, found no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if entry not in checkpoint:
            raise ValueError(f"it has no {entry}")
    except Exception as error:  # unpicklers raise anything
        raise ValueError(
            f"expected a run's checkpoints/last.ckpt, got {path}, which is damaged or another kind "
            "of file; use another checkpoint, or remove it to start again"
        ) from error
    return checkpoint
