"""Jobs of a batch: single fits, and images combined from several fits."""

import logging
import math
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepred_pl.callbacks import Writer
from deepred_pl.callbacks.base import is_log_step, run_directory
from deepred_pl.choose import Choice, as_options, choose, seconds_of, set_up
from deepred_pl.cli import RestorationCLI, reason
from deepred_pl.data import RestorationDataModule
from deepred_pl.files import last_checkpoint, load_checkpoint, read_json, write_json
from deepred_pl.images import read_image, write_image
from deepred_pl.lightning import NAME, NAMES, Callback, LightningModule, Trainer, rank_zero_only
from deepred_pl.moments import RunningMoments
from deepred_pl.report import combine, compare, write_uncertainty
from deepred_pl.tiles import Tiling, blend

PACKAGES = ("deepred_pl", "torch", "pytorch-lightning")
ON_ANY_MACHINE = ("--trainer.accelerator=cpu", "--trainer.precision=32")  # where nothing is fitted
LABELS = ("image", "method")  # for TensorBoard's HParams page
REPORTED = 1.0  # seconds between two reports of progress


@dataclass(frozen=True)
class Effort:
    """How the fits of an image choose their settings.

    Attributes:
        name: The effort, as in `choose`.
        given: Names of settings that are not chosen.
        before: Options in place of those that are not chosen yet (`choose.before_choice`).
        began: When the time for a single image began, as of `time.time`; None is when its fit does.
        fits: Fits of the image, which share its time.
        chosen: What was chosen for all pages of its file.
    """

    name: str
    given: tuple[str, ...]
    before: tuple[str, ...] = ()
    began: float | None = None
    fits: int = 1
    chosen: Choice = field(default_factory=Choice)

    def end(self, workers: float) -> float | None:
        """When a fit that starts now is to end, if the effort is a time."""
        seconds = seconds_of(self.name)
        if seconds is None:
            return None
        if self.fits == 1 and self.began is not None:
            return self.began + seconds
        return time.time() + seconds / max(1, math.ceil(self.fits / workers))


@dataclass(frozen=True)
class Job:
    """One restored image and its run directory, as plain data.

    Attributes:
        directory: The run directory.
        options: The command-line options of the fit; of a job with parts, those that read the
            image.
        about: The contents of `job.json` in the run directory, which must be unchanged when a batch
            is resumed: "settings" and others, and labels for the tables.
        parts: The jobs whose images are combined: tiles that are blended, or restarts that are
            averaged. A job without parts is a fit.
        tiling: How the image is cut, if the parts are tiles.
        effort: How its fit chooses the settings that the options leave open; None if it does not.
        after: The run directory of the fit that has to end before this one, which starts from its
            network if it succeeded; None if there is none.
    """

    directory: Path
    options: tuple[str, ...]
    about: dict[str, Any]
    parts: tuple["Job", ...] = ()
    tiling: Tiling | None = None
    effort: Effort | None = None
    after: Path | None = None

    @property
    def first_options(self) -> list[str]:
        """The options before its effort has chosen others."""
        effort = self.effort
        chosen = () if effort is None else (*effort.before, *as_options(effort.chosen.settings))
        return inserted(self.options, chosen)

    @property
    def fits(self) -> list["Job"]:
        """Its fits: itself, or those of its parts."""
        return [fit for part in self.parts for fit in part.fits] if self.parts else [self]

    @property
    def choice(self) -> Choice | None:
        """What its fit has chosen, the contents of `choice.json`; None if it has not."""
        found = read_json(self.directory / "choice.json")
        return None if found is None else Choice(**found)

    @property
    def result(self) -> dict[str, Any] | None:
        """The contents of `result.json`; None if the job is not done."""
        result = read_json(self.directory / "result.json")
        names = [part.directory.name for part in self.parts]
        return result if result is not None and result.get("parts", []) == names else None

    def changed(self) -> str | None:
        """How it differs from the job that this directory was started with.

        None if there is none, or nothing was computed, as for an image that could not be read.
        """
        began = read_json(self.directory / "job.json")
        computed = ("result.json", "last.ckpt")
        if began is not None and any(any(self.directory.rglob(name)) for name in computed):
            before, now = _flat(began), _flat(self.about)
            before.pop("settings.red.wait_for_denoiser", None)  # of an earlier version
            for name in [*now, *sorted(before.keys() - now.keys())]:
                if not name.startswith("machine.") and before.get(name) != now.get(name):
                    label = name.removeprefix("settings.").replace("init_args.", "")
                    return f"{label} was {before.get(name)}, and is now {now.get(name)}"
        return next((c for c in (part.changed() for part in self.parts) if c is not None), None)

    def start(self, threads: int | None = None) -> None:
        """Write the job into the run directory, with the CPU threads of a fit."""
        self.directory.mkdir(parents=True, exist_ok=True)
        machine: dict[str, Any] = {name: version(name) for name in PACKAGES}
        machine |= {"threads": threads, "host": socket.gethostname()}
        write_json(self.directory / "job.json", {**self.about, "machine": machine})

    def start_parents(self) -> None:
        """`start` all jobs with parts, so that changed settings are detected before they end."""
        if self.parts:
            self.start()
            for part in self.parts:
                part.start_parents()

    def clean_up(self) -> None:
        """Remove what a killed fit has left that the next one cannot use."""
        progress_file(self.directory).unlink(missing_ok=True)
        if not last_checkpoint(self.directory).is_file():
            (self.directory / "run.log").unlink(missing_ok=True)  # its warnings would be reported

    def discard(self) -> None:
        """Empty the run directory, except for other methods' directories."""
        for path in self.directory.iterdir():
            if not path.is_dir():
                path.unlink()
            elif path.name == "checkpoints" or path.name.startswith(("tile_", "restart_")):
                shutil.rmtree(path)


class ProgressFile(Callback):
    """Keeps `progress.json` in the run directory during a fit: step, max_steps and two curves.

    It has the values that `Monitor` logged last, and is written at most once a second: psnr_average
    and held_out_error, None if they are not known.
    """

    def __init__(self) -> None:
        self._written = -math.inf

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if is_log_step(trainer) and time.monotonic() - self._written >= REPORTED:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with suppress(OSError):
            progress_file(run_directory(trainer)).unlink(missing_ok=True)

    def _write(self, trainer: Trainer) -> None:
        report: dict[str, Any] = {"step": trainer.global_step, "max_steps": trainer.max_steps}
        for name in ("psnr_average", "held_out_error"):
            value = float(trainer.callback_metrics.get(f"curves/{name}", math.nan))
            report[name] = value if math.isfinite(value) else None
        with suppress(OSError):  # progress is not essential
            write_json(progress_file(run_directory(trainer)), report)
        self._written = time.monotonic()


def progress_file(directory: Path) -> Path:
    """The path of a run's progress."""
    return directory / "progress.json"


def fit(job: Job, threads: int, end: float | None = None) -> str | None:
    """Run the fit of a job, or resume it from its checkpoint; return the reason if it failed.

    Args:
        job: A job without parts.
        threads: CPU threads.
        end: When a fit whose effort is a time is to end, as of `time.time`.

    Messages, warnings and the traceback of a failure are written to `run.log` in the run directory.
    """
    if job.result is not None:  # the process was killed after everything was written
        return None
    try:
        job.start(threads)
        torch.set_num_threads(threads)
        # In a scheduler's environment this may look like one process of many, which do not log.
        rank_zero_only.rank = 0
        with _log_into(job.directory / "run.log"):
            _fit(job, end)
    except Exception as error:  # other images are not affected, whatever was raised
        return None if job.result is not None else reason(error)
    finally:
        progress_file(job.directory).unlink(missing_ok=True)
    return None


def _fit(job: Job, end: float | None) -> None:
    (job.directory / "config.yaml").unlink(missing_ok=True)  # Lightning does not replace it
    checkpoint = last_checkpoint(job.directory)
    try:
        cli = RestorationCLI([*_with_choice(job, end), *_first_network(job)], run=False)
        cli.trainer.callbacks.append(ProgressFile())
        for writer in cli.trainer.callbacks:
            if isinstance(writer, Writer):
                writer.labels = {name: job.about[name] for name in LABELS if job.about[name]}
        cli.before_fit()
        begun = checkpoint.is_file()
        if begun:
            load_checkpoint(checkpoint, "loops")
        path = str(checkpoint) if begun else None
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=path)
        cli.after_fit()
    except Exception:
        logging.getLogger(NAME).exception("the fit failed")
        raise


def _with_choice(job: Job, end: float | None) -> list[str]:
    """The options of a job with what its effort chooses, which is kept for a resumed fit."""
    if job.effort is None:
        return list(job.options)

    of_file, given = job.effort.chosen, (*job.effort.given, *job.effort.chosen.settings)

    def assemble(extra: Sequence[str]) -> RestorationCLI:
        extra = [*as_options(of_file.settings), *extra]
        return RestorationCLI(inserted(job.options, extra), run=False)

    choice = job.choice if last_checkpoint(job.directory).is_file() else None
    if choice is None:
        seconds = None if end is None else end - time.time()
        own = choose(assemble, given, job.effort.name, seconds)
        choice = Choice({**of_file.settings, **own.settings}, {**of_file.assumed, **own.assumed})
        write_json(job.directory / "choice.json", asdict(choice))
    return inserted(job.options, as_options(choice.settings))


def _first_network(job: Job) -> list[str]:
    """The option of a fit that starts from the network of another."""
    done = job.after is not None and (job.after / "result.json").is_file()
    return [f"--model.init_from={job.after}"] if done else []


def ready(waiting: Sequence[Job], running: Iterable[Job]) -> list[Job]:
    """The fits that need not wait for another one to end."""
    unfinished = {job.directory for job in (*waiting, *running)}
    return [job for job in waiting if job.after not in unfinished]


def inserted(options: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Options with chosen ones between the configurations and what overrides these."""
    configs = [option for option in options if option.startswith("--config=")]
    others = [option for option in options if not option.startswith("--config=")]
    return [*configs, *chosen, *others]


def finish(job: Job) -> None:
    """Combine the images of a job whose fits are done: blend its tiles, average its restarts."""
    if not job.parts or job.result is not None:
        return
    for part in job.parts:
        finish(part)
    choice = job.fits[0].choice
    whole = {} if choice is None else {**choice.settings, "data.hold_out": 0.0}
    data = datamodule(inserted(job.options, as_options(whole)))
    problem = set_up(data)
    images = (_floats(part) for part in job.parts)
    if job.tiling is not None:
        restored = blend(images, job.tiling)
    else:
        moments = RunningMoments()
        for image in images:
            moments.add(image)
        restored = moments.mean
        write_uncertainty(job.directory, (moments.scatter / (moments.count - 1)).sqrt())
    name = "restored" + data.image_format.suffix(restored.shape[1])
    write_image(job.directory / name, restored, data.image_format)
    write_image(job.directory / "comparison.png", compare(problem, restored))
    results = [result for part in job.parts if (result := part.result) is not None]
    write_json(
        job.directory / "result.json",
        {
            **combine(problem, restored, results),
            "read": data.reading,
            "parts": [part.directory.name for part in job.parts],
        },
    )


def datamodule(options: Sequence[str]) -> RestorationDataModule:
    """The datamodule of command-line options, not set up."""
    return RestorationCLI([*options, *ON_ANY_MACHINE], run=False).datamodule


def _floats(part: Job) -> Tensor:
    return read_image(part.directory / "restored.tif", [0, 1])[0]


@contextmanager
def _log_into(path: Path) -> Iterator[None]:
    """Redirect Lightning's messages and warnings to a file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = [logging.getLogger(name) for name in (*NAMES, "py.warnings")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.handlers = [handler]
        logger.propagate = False
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:  # a class by its name, because modules may move
            flat[prefix + name] = value.rpartition(".")[2] if name == "class_path" else value
    return flat
