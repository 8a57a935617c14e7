"""How far a fit is, for those who watch it from another process."""

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from deepred_pl.callbacks.monitor import logs_now
from deepred_pl.directory import run_directory, write_json

SECONDS = 1.0  # between two reports


class ProgressFile(Callback):
    """Keeps `progress.json` in the run directory while a fit runs: step, max_steps and psnr.

    It has what `Monitor` logged last, and is written once a second at most. psnr is that of the
    average, None where the true image is not known.
    """

    def __init__(self) -> None:
        self._written = -math.inf

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if logs_now(trainer) and time.monotonic() - self._written >= SECONDS:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with suppress(OSError):
            progress_file(run_directory(trainer)).unlink(missing_ok=True)

    def _write(self, trainer: Trainer) -> None:
        psnr = float(trainer.callback_metrics.get("curves/psnr_average", math.nan))
        report = {
            "step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "psnr": psnr if math.isfinite(psnr) else None,
        }
        with suppress(OSError):  # nobody can watch then, and the fit goes on
            write_json(progress_file(run_directory(trainer)), report)
        self._written = time.monotonic()


def progress_file(directory: Path) -> Path:
    """Where a run's progress is kept."""
    return directory / "progress.json"
