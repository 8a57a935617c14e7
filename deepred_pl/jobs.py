"""The jobs of a batch: one fit each, and what is made of several fits of one image."""

import logging
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from deepred_pl.callbacks.progress import ProgressFile, progress_file
from deepred_pl.callbacks.writer import Writer, compare, score, write_uncertainty
from deepred_pl.data import RestorationDataModule
from deepred_pl.directory import check_checkpoint, last_checkpoint, read_json, write_json
from deepred_pl.images import read_image, write_image
from deepred_pl.moments import RunningMoments
from deepred_pl.run import RestorationCLI, reason
from deepred_pl.tiles import Tiling, blend

PACKAGES = ("deepred_pl", "torch", "pytorch-lightning")
ON_ANY_MACHINE = ("--trainer.accelerator=cpu", "--trainer.precision=32")  # where none is fitted
LABELS = ("image", "method")  # for TensorBoard's HParams page
SUMMED = ("steps", "seconds", "denoiser_wait_seconds", "rollbacks")  # over the fits of an image


@dataclass(frozen=True)
class Job:
    """One restored image and its run directory, as plain data.

    Attributes:
        directory: The run directory.
        options: The options of the command line that make the fit; of a job with parts, those
            that read the image.
        about: What `job.json` keeps in the run directory, and what must not have changed when a
            batch goes on: "settings" and others. With them are labels for the tables.
        parts: The jobs whose images this one is made of: tiles that are blended, or restarts that
            are averaged. None: the job is a fit.
        tiling: How the image is cut, where the parts are tiles.
    """

    directory: Path
    options: tuple[str, ...]
    about: dict[str, Any]
    parts: tuple["Job", ...] = ()
    tiling: Tiling | None = None

    @property
    def fits(self) -> list["Job"]:
        """The fits that it takes: itself, or those of its parts."""
        return [fit for part in self.parts for fit in part.fits] if self.parts else [self]

    @property
    def result(self) -> dict[str, Any] | None:
        """The contents of `result.json`; None where the job is not done."""
        result = read_json(self.directory / "result.json")
        names = [part.directory.name for part in self.parts]
        return result if result is not None and result.get("parts", []) == names else None

    def changed(self) -> str | None:
        """What differs from the job that this directory was begun with.

        None: nothing does, or nothing was computed yet, as of an image that could not be read.
        """
        began = read_json(self.directory / "job.json")
        computed = ("result.json", "last.ckpt")
        if began is not None and any(any(self.directory.rglob(name)) for name in computed):
            before, now = _flat(began), _flat(self.about)
            for name in [*now, *sorted(before.keys() - now.keys())]:
                if not name.startswith("machine.") and before.get(name) != now.get(name):
                    label = name.removeprefix("settings.").replace("init_args.", "")
                    return f"{label} was {before.get(name)}, and is {now.get(name)} now"
        return next((c for c in (part.changed() for part in self.parts) if c is not None), None)

    def begin(self, threads: int | None = None) -> None:
        """Keep in the run directory what the job is, and of a fit the CPU threads that make it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        machine: dict[str, Any] = {name: version(name) for name in PACKAGES}
        machine |= {"threads": threads, "host": socket.gethostname()}
        write_json(self.directory / "job.json", {**self.about, "machine": machine})

    def begin_parents(self) -> None:
        """`begin` all jobs that have parts: so that other settings are noticed before they end."""
        if self.parts:
            self.begin()
            for part in self.parts:
                part.begin_parents()

    def discard(self) -> None:
        """Empty the run directory, but for other methods' directories."""
        for path in self.directory.iterdir():
            if not path.is_dir():
                path.unlink()
            elif path.name == "checkpoints" or path.name.startswith(("tile_", "restart_")):
                shutil.rmtree(path)


def fit(job: Job, threads: int) -> str | None:
    """Make the fit of a job, or go on with it from its checkpoint; None, or why it failed.

    Messages, warnings and the traceback of a failure go into `run.log` in the run directory.
    """
    if job.result is not None:  # the process was killed when all was done
        return None
    try:
        job.begin(threads)
        torch.set_num_threads(threads)
        # A scheduler's environment may say that this is one process of many, which log nothing.
        rank_zero_only.rank = 0
        with _log_into(job.directory / "run.log"):
            _fit(job)
    except Exception as error:  # one bad image fails alone, whatever it raises
        return None if job.result is not None else reason(error)
    finally:
        progress_file(job.directory).unlink(missing_ok=True)
    return None


def _fit(job: Job) -> None:
    (job.directory / "config.yaml").unlink(missing_ok=True)  # Lightning replaces none
    checkpoint = last_checkpoint(job.directory)
    try:
        cli = RestorationCLI(list(job.options), run=False)
        cli.trainer.callbacks.append(ProgressFile())
        for writer in cli.trainer.callbacks:
            if isinstance(writer, Writer):
                writer.labels = {name: job.about[name] for name in LABELS if job.about[name]}
        cli.before_fit()
        begun = checkpoint.is_file()
        if begun:
            check_checkpoint(checkpoint)
        path = str(checkpoint) if begun else None
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=path)
        cli.after_fit()
    except Exception:
        logging.getLogger("pytorch_lightning").exception("the fit failed")
        raise


def finish(job: Job) -> None:
    """Make what is missing of a job whose fits are done: blend its tiles, average its restarts.

    Raises:
        OSError: It cannot be written.
    """
    if not job.parts or job.result is not None:
        return
    for part in job.parts:
        finish(part)
    data = datamodule(job.options)
    data.setup()
    problem = data.problem
    assert problem is not None
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
            **score(problem, restored),
            **{name: sum(result[name] for result in results) for name in SUMMED},
            "stop_reason": ", ".join(sorted({result["stop_reason"] for result in results})),
            "seed": results[0]["seed"],
            "parts": [part.directory.name for part in job.parts],
        },
    )


def datamodule(options: Sequence[str]) -> RestorationDataModule:
    """The datamodule that options make, not set up."""
    return RestorationCLI([*options, *ON_ANY_MACHINE], run=False).datamodule


def _floats(part: Job) -> Tensor:
    return read_image(part.directory / "restored.tif", [0, 1])[0]


@contextmanager
def _log_into(path: Path) -> Iterator[None]:
    """Lightning's messages, and warnings, go to a file and not to the terminal."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "py.warnings")]
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
    """Nested settings under dotted names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
