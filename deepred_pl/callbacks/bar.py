"""The progress bar of a fit."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from deepred_pl.callbacks.base import is_log_step, restoration_callbacks
from deepred_pl.lightning import LightningModule, Trainer, callbacks

SHOWN = {"psnr_average": ("PSNR average", "{:.2f}", " dB"), "gap": ("gap", "{:.3g}", "")}
MOST_SHOWN = 3  # restorations whose numbers are shown; of more, the least and the largest


class RestorationBar(callbacks.ProgressBar):
    """A progress bar over θ-steps with PSNR, gap and the time left.

    It shows what `Monitor` logged last of each restoration: the PSNR of the average if the true
    image is known, and the gap. Without a terminal, it prints a line for every tenth of the fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._progress: Progress | None = None
        self._printed = -1  # the tenth of the fit of the latest line

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        self._printed = -1
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._task = self._progress.add_task("restoring", total=total, numbers="")
        self._progress.update(self._task, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if self._progress is None:
            return
        step, total = trainer.global_step, trainer.max_steps
        self._progress.update(self._task, completed=step)
        if not is_log_step(trainer):
            return
        groups = {callback.group: None for callback in restoration_callbacks(trainer)}
        numbers = _numbers(trainer.callback_metrics, groups)
        self._progress.update(self._task, numbers=numbers)
        tenths = 10 * step // total if total > 0 else step
        if numbers and tenths > self._printed and not self._progress.console.is_terminal:
            self._printed = tenths
            of = f" of {total}" if total > 0 else ""
            self._progress.console.print(f"step {step}{of}: {numbers}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _numbers(logged: Mapping[str, Tensor], groups: Iterable[str]) -> str:
    shown = []
    for name, (label, form, unit) in SHOWN.items():
        found = (float(logged[f"{g}/{name}"]) for g in groups if f"{g}/{name}" in logged)
        values = [value for value in found if math.isfinite(value)]
        texts = [form.format(value) for value in values]
        if len(values) > MOST_SHOWN:
            texts = [f"{form.format(min(values))} … {form.format(max(values))}"]
        if texts:
            shown.append(f"{label} {', '.join(texts)}{unit}")
    return "  ".join(shown)
