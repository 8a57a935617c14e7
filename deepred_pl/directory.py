"""The run directory."""

import os
from pathlib import Path

from pytorch_lightning import Trainer

from deepred_pl.images import write_bytes


def run_directory(trainer: Trainer) -> Path:
    """Where the trainer's run is kept: its logger's directory, or its default root."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def last_checkpoint(directory: Path) -> Path:
    """The checkpoint that a run leaves in its directory."""
    return directory / "checkpoints" / "last.ckpt"


def check_writable(directory: Path) -> None:
    """Make the directory and try it.

    Raises:
        OSError: It cannot be made or written; the message says how to choose another.
    """
    probe = directory / ".writable"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_bytes(probe, b"")
        os.unlink(probe)
    except OSError as error:
        raise OSError(
            f"expected to write the run directory {directory}: {error.strerror or error}; "
            "choose another by --trainer.default_root_dir"
        ) from error
