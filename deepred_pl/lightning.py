"""PyTorch Lightning, by whichever of its two names the program uses.

`lightning.pytorch` and `pytorch_lightning` are the same library with classes of their own, which do
not fit together. This package uses the one that the environment variable DEEPRED_LIGHTNING names,
or else the one that is imported already. If none is, or both are, it is the one that the files
importing this package name, or else `pytorch_lightning`.
"""

import linecache
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING

# Messages of both go to the logger of the one that was imported last.
NAMES = ("pytorch_lightning", "lightning.pytorch")
IMPORT = re.compile(  # but not lightning.fabric, which does not tell which of the two is used
    r"^\s*(?:from|import)\s+(pytorch_lightning\b|lightning\b(?!\.(?!pytorch\b)))", re.MULTILINE
)


def _name() -> str:
    chosen = os.environ.get("DEEPRED_LIGHTNING")
    if chosen is None:
        imported = [name for name in list(sys.modules) if name in NAMES]  # in their order
        named = _named(sys._getframe()) if len(imported) != 1 else None
        return named or next(iter(imported), NAMES[0])
    if chosen not in NAMES:
        raise ImportError(f"DEEPRED_LIGHTNING must be one of {', '.join(NAMES)}, got {chosen!r}")
    return chosen


def _named(frame: FrameType | None) -> str | None:
    """The name that the files importing this package import, often after it, as they are sorted."""
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("deepred_pl"):
            source = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
            for found in IMPORT.finditer(source):
                if find_spec(found[1]) is not None:  # else an alternative that is not installed
                    return NAMES[found[1] == "lightning"]
        frame = frame.f_back
    return None


NAME = _name()

if TYPE_CHECKING or NAME == "pytorch_lightning":
    from pytorch_lightning import (
        Callback,
        LightningDataModule,
        LightningModule,
        Trainer,
        callbacks,
        loggers,
    )
    from pytorch_lightning.cli import (
        ArgsType,
        LightningArgumentParser,
        LightningCLI,
        SaveConfigCallback,
    )
    from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.utilities.rank_zero import (
        rank_zero_info,
        rank_zero_only,
        rank_zero_warn,
    )
else:
    from lightning.pytorch import (
        Callback,
        LightningDataModule,
        LightningModule,
        Trainer,
        callbacks,
        loggers,
    )
    from lightning.pytorch.cli import (
        ArgsType,
        LightningArgumentParser,
        LightningCLI,
        SaveConfigCallback,
    )
    from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.rank_zero import (
        rank_zero_info,
        rank_zero_only,
        rank_zero_warn,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Lightning's messages, such as those about the machine, but not its warnings."""
    logs = [logging.getLogger(name) for name in NAMES]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


__all__ = [
    "NAME",
    "NAMES",
    "ArgsType",
    "Callback",
    "LightningArgumentParser",
    "LightningCLI",
    "LightningDataModule",
    "LightningEnvironment",
    "LightningModule",
    "MisconfigurationException",
    "SLURMEnvironment",
    "SaveConfigCallback",
    "Trainer",
    "callbacks",
    "loggers",
    "quiet",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
