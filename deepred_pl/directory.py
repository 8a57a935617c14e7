"""The run directory."""

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer

from deepred_pl.images import write_bytes

ROOM = 2**16  # bytes that a run takes at the least


def run_directory(trainer: Trainer) -> Path:
    """Where the trainer's run is kept: its logger's directory, or its default root."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def last_checkpoint(directory: Path) -> Path:
    """The checkpoint that a run leaves in its directory."""
    return directory / "checkpoints" / "last.ckpt"


def check_checkpoint(path: Path) -> None:
    """Find out whether a file is a run's checkpoint, whole, and data alone.

    Lightning would unpickle what comes from the network, and older ones any file; torch would
    advise to.

    Raises:
        ValueError: It is none, or is damaged.
    """
    if not path.is_file():
        raise ValueError(f"expected a run's checkpoints/last.ckpt, found no file {path}")
    try:
        load_checkpoint(path)["loops"]
    except Exception as error:  # unpicklers raise what they like
        raise ValueError(
            f"expected a run's checkpoints/last.ckpt, got {path}, which is damaged or none; "
            "give another, or remove it to begin anew"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU: plain data, whose checksums torch does not look at.

    Raises:
        Exception: Of any kind, where it is none, holds more than data, or is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in {path} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_writable(directory: Path, option: str = "--trainer.default_root_dir") -> None:
    """Make the directory and try it; `option` is what chooses another.

    Raises:
        OSError: It cannot be made or written; the message says how to choose another.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(ROOM))  # a full disk makes empty files
    except OSError as error:
        raise OSError(
            f"expected to write the run directory {directory}: {why(error)}; "
            f"choose another by {option}"
        ) from error


def why(error: OSError) -> str:
    """What went wrong, without number and path."""
    return error.strerror or str(error)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write plain data so that it is never seen half-written.

    Raises:
        OSError: It cannot be written.
    """
    write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is no such file.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"expected what a run wrote, but {path} is damaged; remove it") from error
