"""The checkpoint a fit goes on from, and the end of a fit that is told to stop."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from deepred_pl.callbacks.guard import is_finite
from deepred_pl.callbacks.red import a_round_failed, waits_for_denoiser
from deepred_pl.directory import last_checkpoint, run_directory, why
from deepred_pl.images import replace_by
from deepred_pl.model import DeepImagePrior

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a scheduler sends
SIGNALLED = 128  # a shell's exit status of a process that a signal ended, less the signal's number
STOPPING, STOPPING_NOW = b"stopping behind this step; Ctrl-C stops at once\n", b"stopping\n"


class Stopped(SystemExit):
    """A fit was told to stop, and did so between two θ-steps; `code` is the exit status."""


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` in the run directory: every n θ-steps and at the end.

    There is one image and no better or worse epoch, so one file is enough. It is replaced only
    by a complete one of finite values; where it cannot be written, the fit goes on, and says so.
    The one of the last step comes after the results: a fit that is stopped while it writes them,
    or fails in its last round, still has a step to make.

    Ctrl-C and SIGTERM end a fit of the main thread behind the step that is under way, with a
    checkpoint and the exit status that shells give, 130 and 143; a second Ctrl-C ends it at
    once, with the checkpoint before. A denoiser that fails ends it behind its step, too. How to go
    on is told then.

    Args:
        every_n_steps: θ-steps between two saves, at least 1.

    Raises:
        ValueError: every_n_steps below 1.
        Stopped: By a signal.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._handlers: dict[int, Callable | int | None] = {}  # those before ours
        self._signal: int | None = None
        self._ending = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            if self._ending:  # nothing may interrupt what is written then
                return
            again, self._signal = self._signal is not None, number
            waits = waits_for_denoiser(trainer)
            with suppress(OSError, ValueError):  # a handler must not use buffers
                os.write(sys.stderr.fileno(), STOPPING_NOW if waits or again else STOPPING)
            if waits or (again and number == signal.SIGINT):
                self._ending = True
                raise Stopped(SIGNALLED + number)  # a round keeps it until we have saved

        self._ending = False
        # Lightning's own handler stood here since before the callbacks' turn.
        self._signal = signal.SIGTERM if trainer.received_sigterm else None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as in a batch's processes
                    self._handlers[number] = signal.signal(number, handle)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        step = trainer.global_step
        if step == trainer.max_steps:  # that is on_train_end's
            return
        ends = self._signal is not None or a_round_failed(trainer)
        # The one before the last: where the last round fails, that step alone is made again.
        if step % self.every_n_steps == 0 or step == trainer.max_steps - 1 or ends:
            self._save(trainer)
        if self._signal is not None:
            self._ending = True
            raise Stopped(SIGNALLED + self._signal)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._leave_signals_alone()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        path = last_checkpoint(run_directory(trainer))
        if not path.is_file() and trainer.ckpt_path is not None:
            path = Path(trainer.ckpt_path)  # nothing was saved since
        if trainer.training and path.is_file():
            rank_zero_info(f"to go on{_how_to_go_on(path)}")
        self._leave_signals_alone()

    def _leave_signals_alone(self) -> None:
        # Before Lightning does: what stood there before is its own handler, for its own has come
        # in between. The other way round it would stay, and with it the trainer.
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        path = last_checkpoint(run_directory(trainer))
        models = [m for m in trainer.lightning_module.modules() if isinstance(m, DeepImagePrior)]
        if not all(is_finite(model) for model in models):
            rank_zero_info(f"step {trainer.global_step}: no checkpoint, for the fit gives NaN")
            return
        # Lightning's own temporary file may lie on another device, where moving is copying.
        new = path.with_name(".last.ckpt.new")
        try:
            trainer.save_checkpoint(new, weights_only=False)
            replace_by(path, new)
        except OSError as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            left = "the one before stays" if path.is_file() else "there is none yet"
            rank_zero_info(
                f"step {trainer.global_step}: no checkpoint {path} ({why(error)}); {left}"
            )


def _how_to_go_on(checkpoint: Path) -> str:
    """The command, where the command line made the run, and its settings are there."""
    settings = checkpoint.parents[1] / "config.yaml"
    if not settings.is_file():
        return f", give the same settings and the checkpoint (ckpt_path) {checkpoint}"
    command = ["deepred", "fit", "--config", str(settings), "--ckpt_path", str(checkpoint)]
    return ": " + shlex.join(command)
