"""The progress bar of a batch."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deepred_pl.batch.jobs import Job, progress_file
from deepred_pl.files import read_json

SPEED_PERIOD = 600.0  # seconds over which the time left is estimated
SILENCE = 60.0  # seconds between two lines without a terminal
READ, SHOWN = 64, 3  # fits whose progress is read, and that are named in the bar


class Bar:
    """A progress bar over the fits of a batch, with curves of running fits and the time left.

    Without a terminal, it prints a line for each fit that ends, and one per minute.

    Args:
        total: Number of fits of the batch.
        left: The fits that are not done.
        console: The console to print on.
    """

    def __init__(self, total: int, left: Sequence[Job], console: Console) -> None:
        self._left = {fit.directory: fit for fit in left}
        self._total = total
        self._console = console
        self._printed = time.monotonic()
        self._progress = Progress(
            TextColumn("restoring"),
            BarColumn(),
            TextColumn("{task.fields[ended]} of {task.total}"),
            TextColumn("{task.fields[running]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=SPEED_PERIOD,
        )
        ended = total - len(left)
        self._task = self._progress.add_task(
            "", total=total, completed=ended, ended=ended, running=""
        )

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def end(self, fit: Job, error: str | None) -> None:
        """Count a fit that ended, and print it."""
        del self._left[fit.directory]
        if error is not None or not self._console.is_terminal:
            ended = f"{self._total - len(self._left)} of {self._total}"
            outcome = _outcome(fit) if error is None else f"failed: {error}"
            self._print(f"{ended}: {label(fit)}: {outcome}")

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        self._console.print(text)

    def refresh(self) -> None:
        """Show the progress of the running fits."""
        running, parts = [], 0.0
        for fit in list(self._left.values())[:READ]:
            report = read_json(progress_file(fit.directory))
            if report is not None:
                parts += max(0.0, report["step"] / report["max_steps"])
                running.append(label(fit) + ("" if _tile(fit) else _numbers(report)))
        ended = self._total - len(self._left)
        text = ", ".join(running[:SHOWN]) + (", …" if len(running) > SHOWN else "")
        self._progress.update(self._task, completed=ended + parts, ended=ended, running=text)
        if not self._console.is_terminal and time.monotonic() - self._printed > SILENCE and running:
            self._print(f"{ended + parts:.1f} of {self._total}, {text}")


def _numbers(report: dict[str, Any]) -> str:
    """The curves of a fit's progress that are known."""
    psnr, error = report["psnr_average"], report["held_out_error"]
    text = "" if psnr is None else f" {psnr:.2f} dB"
    return text + ("" if error is None else f", error at held-out values {error:.2f}")


def label(fit: Job) -> str:
    """The name of a fit in messages."""
    method, restart = fit.about["method"], fit.about["restart"]
    restarted = "" if restart is None else f"restart {restart}"
    named = (fit.about["image"], method, restarted, _tile(fit))
    return " ".join(name for name in named if name)


def _tile(fit: Job) -> str:
    """The name of a tile, whose PSNR means little because its borders are unused; "" otherwise."""
    return fit.directory.name if fit.directory.name.startswith("tile_") else ""


def _outcome(fit: Job) -> str:
    result = fit.result
    assert result is not None
    before, after = (result["psnr"][name] for name in ("measurement", "restored"))
    gain = "" if None in (before, after) or _tile(fit) else f"{before:.2f} -> {after:.2f} dB, "
    return f"{gain}{result['steps']} steps in {result['seconds']:.0f} s"
