"""Save checkpoints, and end fits that are interrupted."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from deepred_pl.callbacks.base import restoration_callbacks, run_directory, stability
from deepred_pl.checks import check_at_least
from deepred_pl.files import describe, last_checkpoint, move
from deepred_pl.lightning import LightningModule, Trainer, callbacks, rank_zero_info
from deepred_pl.model import DeepImagePrior

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what schedulers send
SIGNALLED = 128  # the exit status after a signal is its number plus this
STOPPING = b"Stopping after this step; press Ctrl-C again to stop now.\n"
STOPPING_NOW = b"Stopping.\n"


class Stopped(SystemExit):
    """A fit was interrupted by a signal; `code` is the exit status."""


def resume_with(checkpoint: Path) -> str:
    """How to resume a fit of any program."""
    return f", use the same settings and the checkpoint (ckpt_path) {checkpoint}"


class LastCheckpoint(callbacks.Checkpoint):
    """Keeps `checkpoints/last.ckpt` in the run directory, saved every n θ-steps and at the end.

    The file is only replaced by a complete one with finite values; if it cannot be written, the fit
    continues with a message. The last step is saved after the results, so that a fit that is
    interrupted while they are written, or fails in its last round, has a step left to resume.

    Ctrl-C and SIGTERM end a fit in the main thread after the current step, with a checkpoint and
    the exit status that shells give, 130 and 143; a second Ctrl-C ends it immediately, with the
    previous checkpoint. A denoiser that fails also ends it after its step. How to resume the fit is
    then printed.

    Args:
        every_n_steps: θ-steps between two saves, at least 1.

    Attributes:
        how_to_resume: Completes "To resume", given the checkpoint's path.

    Raises:
        ValueError: every_n_steps is below 1.
        Stopped: A signal arrived.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        check_at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._handlers: dict[int, Callable | int | None] = {}  # the previous ones
        self._signal: int | None = None
        self._ending = False
        self._step = 0  # the latest seen
        self._saved: Path | None = None  # of this fit
        self.how_to_resume: Callable[[Path], str] = resume_with

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._saved = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            if self._ending:  # final writes must not be interrupted
                return
            again, self._signal = self._signal is not None, number
            waits = any(c.waiting for c in restoration_callbacks(trainer))
            with suppress(OSError, ValueError):  # a handler must not use buffers
                os.write(sys.stderr.fileno(), STOPPING_NOW if waits or again else STOPPING)
            if waits or (again and number == signal.SIGINT):
                self._ending = True
                raise Stopped(SIGNALLED + number)  # REDUpdate keeps it until we have saved

        self._ending, self._step = False, trainer.global_step
        self._saved = Path(trainer.ckpt_path) if trainer.ckpt_path is not None else None
        # Until now Lightning's own handler was active.
        self._signal = signal.SIGTERM if trainer.received_sigterm else None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as in a batch's workers
                    self._handlers[number] = signal.signal(number, handle)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        step, before = trainer.global_step, self._step
        self._step = step
        if step == trainer.max_steps:  # that is on_train_end's
            return
        failed = any(c.failed for c in restoration_callbacks(trainer))
        ends = self._signal is not None or failed
        # The step before the last: if the last round fails, only that step is repeated.
        due = step % self.every_n_steps == 0 or step == trainer.max_steps - 1
        if ends or (due and step > before):  # a parent that accumulates makes several passes a step
            self._save(trainer)
        if self._signal is not None:
            self._ending = True
            raise Stopped(SIGNALLED + self._signal)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.training and self._saved is not None and self._saved.is_file():
            rank_zero_info(f"To resume{self.how_to_resume(self._saved)}")
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        # Before Lightning restores its own: in the other order, its handler would stay installed,
        # and keep the trainer alive.
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        for callback in restoration_callbacks(trainer):
            callback.settle()
        path = last_checkpoint(run_directory(trainer))
        models = [m for m in trainer.lightning_module.modules() if isinstance(m, DeepImagePrior)]
        if not all(math.isfinite(stability(model)) for model in models):
            rank_zero_info(f"Step {trainer.global_step}: not saved: its state is not finite.")
            return
        # Lightning's own temporary file may be on another device, where a move is a copy.
        new = path.with_name(".last.ckpt.new")
        try:
            trainer.save_checkpoint(new, weights_only=False)
            move(new, path)
            self._saved = path
        except OSError as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            left = "the previous checkpoint is kept" if path.is_file() else "there is none yet"
            rank_zero_info(
                f"Step {trainer.global_step}: cannot save {path} ({describe(error)}); {left}."
            )
