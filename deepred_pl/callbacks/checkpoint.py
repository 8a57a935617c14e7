"""The checkpoint a fit goes on from."""

import os
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from deepred_pl.directory import last_checkpoint, run_directory


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` in the run directory: every n θ-steps and at the end.

    There is one image and no better or worse epoch, so one file is enough. It is replaced only
    by a complete one. The one of the last step comes after the results: a fit that is stopped
    while it writes them still has a step to make.

    Args:
        every_n_steps: θ-steps between two saves, at least 1.

    Raises:
        ValueError: every_n_steps below 1.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != trainer.max_steps:  # that is on_train_end's
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:
            path = last_checkpoint(run_directory(trainer))
            # Lightning's own temporary file may lie on another device, where moving is copying.
            new = path.with_name(".last.ckpt.new")
            trainer.save_checkpoint(new, weights_only=False)
            os.replace(new, path)
