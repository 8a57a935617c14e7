"""The command line of `deepred-batch`, and the course of a batch."""

import argparse
import logging
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from deepred_pl.batch.bar import Bar, label
from deepred_pl.batch.jobs import Job, finish, progress_file
from deepred_pl.batch.plan import Batch, Source, find_images, left_out, plan
from deepred_pl.batch.tables import rows_of, summary, write_csv
from deepred_pl.batch.workers import Outcome, Where, start
from deepred_pl.callbacks.checkpoint import SIGNALLED, Stopped
from deepred_pl.checks import RestorationWarning
from deepred_pl.cli import EXPECTED, reason
from deepred_pl.files import check_writable, last_checkpoint, write_bytes
from deepred_pl.lightning import NAMES
from deepred_pl.report import diagnosis
from deepred_pl.sources import SET

DIAGNOSES = 5  # printed at most, for images whose fit was too short
WARNING = re.compile(rf": {RestorationWarning.__name__}: (.*)")  # in a fit's log
UNSEEN = "its result is not in DIR; on a cluster --out must be on storage that all nodes share"

# Without --config: a photograph with noise of unknown strength.
DEFAULT_CONFIGS = ["denoising", "methods/quick"]
DEFAULT_OPTIONS = ("--data.noise.sigma=null",)
DEFAULT_TILE = 128  # for a given number of steps, networks fit small images better

# Settings of a single fit that the batch sets, and its own options for them.
OWNED = {
    "data.measurement": "--images",
    "data.region": "--tile",
    "data.as_floats": "--restarts or --tile, which set it",
    "trainer.default_root_dir": "--out",
    "trainer.logger": "--out",
    "trainer.devices": "--workers or --gpus",
    "trainer.plugins": "--ray",
    "trainer.enable_progress_bar": "the bar over all fits",
    "trainer.fast_dev_run": "`deepred fit`",
}

ABOUT = """\
Restore many images, one fit each, with the configurations of `deepred fit`.

  deepred-batch photo.jpg
  deepred-batch --config denoising --config methods/quick --images FOLDER --out DIR

The first writes photo.restored.png next to the photo. The second creates a run directory for each
image in DIR, and results.csv and summary.md. Repeat the same command to resume it after a stop.
"""

SETTINGS = """\
Every other --section.key=value is passed to each fit, as in `deepred fit`; {name} in its value
is the image's name without suffix, as in --data.operator.mask 'masks/{name}.png'.
"""


TRUTHS = """\
instead of --images: clean images, whose degradation is simulated, for scores; also the published
set:cbm3d9, set:set5, set:set14, set:ncsr and set:inpainting, in DEEPRED_DATA or downloaded; for
true images of --images use --data.ground_truth 'FOLDER/{name}.png'"""
RESTARTS = "fits per image, with seeds model.seed, model.seed + 1, ...; the result is their mean"
OVERLAP = "shared by tiles (default: an eighth of a tile, plus what A mixes)"
WORKERS = "parallel fits on this machine (default: what its cores, or GPUs, and memory allow)"
THREADS = "CPU threads per fit (default: OMP_NUM_THREADS, or the cores divided by the workers)"


def main(args: Sequence[str] | None = None) -> None:
    """Run `deepred-batch`; exits with status 1 if an image failed, or with one line on a mistake.

    Ctrl-C and SIGTERM end it with status 130 and 143; its fits have ten seconds to save their
    checkpoints.

    Args:
        args: Command-line arguments; None uses sys.argv.
    """
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGTERM, _stop)  # as a scheduler sends it
    try:
        failed = run(parse(sys.argv[1:] if args is None else args))
    except EXPECTED as error:
        if os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
            raise
        sys.exit(f"deepred-batch: error: {reason(error)}")
    except (KeyboardInterrupt, Stopped) as stop:
        print("deepred-batch: stopped; repeat the command to resume", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, Stopped) else SIGNALLED + signal.SIGINT)
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    if failed:
        sys.exit(1)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(SIGNALLED + number)


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `options` are those of each fit."""
    own, options = _split(args)
    parser = _Parser(
        "deepred-batch",
        description=ABOUT,
        epilog=SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    files: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    add("photos", nargs="*", metavar="IMAGE", help="images to restore; a single one needs no --out")
    add("--config", **several, help="YAML file or shipped configuration")
    add("--images", **files, help="files, folders or patterns: images to restore")
    add("--ground_truth", **files, metavar="TRUTHS", help=TRUTHS)
    add("--out", type=Path, metavar="DIR", help="where the run directories and tables go")
    add("--method", **several, help="overlay of a method, such as dip; several are compared")
    add("--restarts", type=_count, default=1, metavar="R", help=RESTARTS)
    add("--tile", type=_count, metavar="PIXELS", help="restore tiles of this side, and blend them")
    add("--overlap", type=int, metavar="PIXELS", help=OVERLAP)
    add("--workers", type=_count, metavar="N", help=WORKERS)
    add("--threads", type=_count, metavar="T", help=THREADS)
    add("--ray", metavar="ADDRESS", help="run on a Ray cluster; `local` starts one here")
    add(
        "--gpus",
        type=float,
        metavar="G",
        help="with --ray: GPUs per fit; with 0.25 four share one",
    )
    add("--shard", metavar="I/N", help="only the I-th of N parts of the fits (from 1), no tables")
    add("--overwrite", action="store_true", help="restart fits whose settings have changed")
    arguments = parser.parse_args(own)
    arguments.options = tuple(options)
    _check(arguments)
    return arguments


class _Parser(argparse.ArgumentParser):
    """Raises errors, which `main` reports."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the batch's arguments from settings of the fits: options with a dot in the name."""
    own, settings, rest = [], [], iter(args)
    for arg in rest:
        name, equals, _ = arg.partition("=")
        if not (name.startswith("--") and "." in name):
            own.append(arg)
        elif equals:
            settings.append(arg)
        else:
            value = next(rest, None)
            if value is None:
                raise ValueError(f"expected a value after {arg}, got none")
            settings.append(f"{arg}={value}")
    return own, settings


def _check(arguments: argparse.Namespace) -> None:
    """Refuse incompatible arguments, and fill in defaults that depend on others."""
    given = [arguments.photos, arguments.images, arguments.ground_truth]
    if sum(map(bool, given)) != 1:
        raise ValueError(
            "expected one of IMAGE, --images and --ground_truth; give a file, as in "
            "`deepred-batch photo.jpg`, or see `deepred-batch --help`"
        )
    owned = dict(OWNED)
    if arguments.ground_truth:
        owned["data.ground_truth"] = "--ground_truth, and the images to restore by --images"
    for option in arguments.options:
        name = option[2:].partition("=")[0].rstrip("+")
        for mine, instead in owned.items():
            if name == mine or name.startswith(mine + "."):
                raise ValueError(f"--{name} is set by the batch; use {instead}")
    if not arguments.config:
        arguments.config = DEFAULT_CONFIGS
        arguments.options = DEFAULT_OPTIONS + arguments.options
        arguments.tile = arguments.tile or DEFAULT_TILE
    if arguments.ray is None and arguments.gpus is not None:
        raise ValueError("--gpus requires --ray; on this machine use --workers to share its GPUs")
    if arguments.ray not in (None, "local") and arguments.workers is not None:
        raise ValueError("--workers is for this machine; a cluster runs as many as its cores allow")
    if arguments.shard is not None and arguments.overwrite:
        raise ValueError("--overwrite would delete other shards' results; use it without --shard")
    if arguments.tile is None and arguments.overlap is not None:
        raise ValueError("--overlap applies to tiles; set --tile too")
    if arguments.overlap is not None and not 0 <= arguments.overlap < arguments.tile:
        raise ValueError(
            f"expected --overlap of at least 0 and less than --tile {arguments.tile}, got "
            f"{arguments.overlap}"
        )
    arguments.shard = None if arguments.shard is None else _shard(arguments.shard)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"expected --shard I/N with 1 <= I <= N, such as 3/8, got {text}")
    return int(index), int(count)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Lightning's messages about the machine; those of fits go to `run.log`."""
    logs = [logging.getLogger(name) for name in NAMES]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


@_quiet()
def run(arguments: argparse.Namespace) -> int:
    """Restore the images; return the number of images that failed, with --shard of fits."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    given = arguments.photos or arguments.images or arguments.ground_truth
    sources = find_images(given)
    if passed_over := left_out(given):
        console.print(f"Skipped files of other types: {passed_over}")
    single = arguments.out is None
    out = _single_run(sources, arguments) if single else arguments.out.resolve()
    batch = Batch(
        sources=sources,
        role="data.ground_truth" if arguments.ground_truth else "data.measurement",
        out=out,
        configs=arguments.config,
        methods=arguments.method,
        options=arguments.options,
        restarts=arguments.restarts,
        tile=arguments.tile,
        overlap=arguments.overlap,
        here=arguments.ray in (None, "local"),
    )
    jobs = plan(batch)
    check_writable(out, "--out")
    _refuse_changes(jobs, arguments.overwrite)
    where = Where(arguments.ray, arguments.workers, arguments.threads, arguments.gpus)
    if arguments.shard is not None:
        return _run_shard(jobs, where, arguments.shard, console)
    failures = _follow(jobs, [fit for job in jobs for fit in job.fits], where, console)
    rows = rows_of(jobs, failures, out)
    for text in _warnings(jobs, out):
        console.print(text)
    diagnoses = [
        f"{job.directory.relative_to(out).as_posix()}: {text}"
        for job in jobs
        if (text := diagnosis(job.result or {}))
    ]
    for text in diagnoses[:DIAGNOSES]:
        console.print(text)
    if len(diagnoses) > DIAGNOSES:
        console.print(f"and {len(diagnoses) - DIAGNOSES} more: see residual_to_sigma in the table")
    if single:
        return _move_next_to(sources[0], jobs[0], out, console)
    write_csv(out / "results.csv", rows)
    write_bytes(out / "summary.md", summary(rows).encode())
    failed = sum(job.result is None for job in jobs)
    console.print(f"{len(jobs) - failed} of {len(jobs)} restored: {out / 'summary.md'}")
    return failed


def _warnings(jobs: Sequence[Job], out: Path) -> list[str]:
    """What the fits warned about, once for each image."""
    texts: dict[str, None] = {}
    for job in jobs:
        for fit in job.fits:
            log = fit.directory / "run.log"
            found = WARNING.findall(log.read_text(errors="replace") if log.is_file() else "")
            name = job.directory.relative_to(out).as_posix()
            texts |= dict.fromkeys(f"{name}: {text}" for text in found)
    return list(texts)


def _run_shard(jobs: Sequence[Job], where: Where, shard: tuple[int, int], console: Console) -> int:
    """Run a part of the fits without tables; return the number of fits that failed."""
    index, count = shard
    fits = [fit for job in jobs for fit in job.fits][index - 1 :: count]
    failures = _follow(jobs, fits, where, console, finishing=False)
    done = f"{len(fits) - len(failures)} of {len(fits)} fits done"
    console.print(f"part {index} of {count}: {done}")
    return len(failures)


def _single_run(sources: Sequence[Source], arguments: argparse.Namespace) -> Path:
    """The temporary run directory of a single image, whose result is moved next to it."""
    path = Path(sources[0].path)
    given = [*arguments.photos, *arguments.images]
    of_set = any(name.startswith(SET) for name in given)  # not a place for results
    one_image = len(sources) == 1 and len(arguments.method) < 2 and arguments.restarts == 1
    if not one_image or of_set or arguments.ground_truth or arguments.shard is not None:
        raise ValueError("expected --out DIR for run directories and tables, got none")
    there = [p for s in (".png", ".tif") if (p := _restored_path(path, s)).exists()]
    if there and not arguments.overwrite:
        raise ValueError(f"{there[0]} exists already; use --overwrite, or --out DIR")
    return path.with_name(f"{path.stem}.restored.run")


def _restored_path(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}.restored{suffix}")


def _move_next_to(source: Source, job: Job, out: Path, console: Console) -> int:
    """Move the restored image next to its original, and remove the rest."""
    if job.result is None:
        if any(last_checkpoint(fit.directory).exists() for fit in job.fits):
            console.print(f"partial results are in {out}; repeat the command to resume")
        else:
            shutil.rmtree(out)
        return 1
    sigma = job.result["noise_sigma"]
    [restored] = job.directory.glob("restored.*")
    target = _restored_path(Path(source.path), restored.suffix)
    os.replace(restored, target)
    shutil.rmtree(out)
    noise = "" if sigma is None else f", noise sigma {sigma:.1f} grey levels"
    console.print(f"restored image{noise}: {target}")
    return 0


def _refuse_changes(jobs: Sequence[Job], overwrite: bool) -> None:
    """Refuse jobs that were started with other settings, or empty their directories."""
    changed = [(job, change) for job in jobs if (change := job.changed()) is not None]
    for job, change in changed:
        if not overwrite:
            raise ValueError(
                f"{job.directory} was started with other settings: {change}; use the same, another "
                "--out, or --overwrite to restart it"
            )
    for job, _ in changed:
        job.discard()


def _follow(
    jobs: Sequence[Job],
    fits: Sequence[Job],
    where: Where,
    console: Console,
    finishing: bool = True,
) -> dict[Path, str]:
    """Run the fits that are not done, and finish the jobs that they complete.

    Returns:
        The reasons of failures, by run directory.
    """
    failures: dict[Path, str] = {}
    left = [fit for fit in fits if fit.result is None]
    job_of = {fit.directory: job for job in jobs for fit in job.fits}
    open_fits = Counter(job_of[fit.directory].directory for fit in left)
    for job in {job_of[fit.directory].directory: job_of[fit.directory] for fit in left}.values():
        job.start_parents()
    for fit in left:
        progress_file(fit.directory).unlink(missing_ok=True)  # left by a killed fit

    def finish_complete(job: Job) -> None:
        if finishing and not open_fits[job.directory] and all(fit.result for fit in job.fits):
            try:
                finish(job)
            except Exception as error:  # other images are not affected
                failures[job.directory] = reason(error)
                console.print(f"{label(job)}: {failures[job.directory]}")

    for job in jobs:
        finish_complete(job)
    with Bar(len(fits), left, console) as bar, ExitStack() as stack:
        outcomes: Iterable[Outcome | None] = ()
        if left:  # closed in any case, which ends the processes
            running = start(left, where, len(job_of), console.print)
            outcomes = stack.enter_context(closing(running))
        for outcome in outcomes:
            if outcome is not None:
                fit, error = outcome
                if error is None and fit.result is None:
                    error = UNSEEN
                if error is not None:
                    failures[fit.directory] = error
                bar.end(fit, error)
                job = job_of[fit.directory]
                open_fits[job.directory] -= 1
                finish_complete(job)
            bar.refresh()
    return failures
