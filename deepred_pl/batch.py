"""The `deepred-batch` command: many images, on this machine or on a Ray cluster."""

import argparse
import logging
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from deepred_pl.bar import Bar, label
from deepred_pl.callbacks.checkpoint import SIGNALLED, Stopped
from deepred_pl.callbacks.progress import progress_file
from deepred_pl.callbacks.writer import hint
from deepred_pl.datasets import PREFIX
from deepred_pl.directory import check_writable, last_checkpoint
from deepred_pl.images import write_bytes
from deepred_pl.jobs import Job, finish
from deepred_pl.plan import Batch, Source, find_images, plan
from deepred_pl.run import EXPECTED, reason
from deepred_pl.tables import rows_of, summary, write_csv
from deepred_pl.workers import Outcome, Where, start

HINTS = 5  # at most, on images whose fit was too short
UNSEEN = "its result is not in DIR; on a cluster --out must be on storage that all nodes share"

# Without --config: a photograph with noise of unknown strength.
DEFAULT_CONFIGS = ["denoising", "methods/quick"]
DEFAULT_OPTIONS = ("--data.noise.sigma=null",)
DEFAULT_TILE = 128  # in as many steps a network learns a small image better than a large one

# Settings of a single fit that a batch owns, and its own name for them.
OWNED = {
    "data.measurement": "--images",
    "data.region": "--tile",
    "data.as_floats": "--restarts or --tile, which need it",
    "trainer.default_root_dir": "--out",
    "trainer.logger": "--out",
    "trainer.devices": "--workers or --gpus",
    "trainer.plugins": "--ray",
    "trainer.enable_progress_bar": "none, for there is one over all fits",
    "trainer.fast_dev_run": "`deepred fit` for that",
}

ABOUT = """\
Restore many images, one fit each, by the configurations of `deepred fit`.

  deepred-batch photo.jpg
  deepred-batch --config denoising --config methods/quick --images FOLDER --out DIR

The first writes photo.restored.png beside the photo. The second makes a run directory for each
image in DIR, and results.csv and summary.md. The same command again goes on where it was stopped.
"""

SETTINGS = """\
Every other --section.key=value reaches each fit, as in `deepred fit`; {name} in its value is the
image's name without suffix, as in --data.operator.mask 'masks/{name}.png'.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run `deepred-batch`; status 1 when an image failed, or by a mistake, told in one line.

    Ctrl-C and SIGTERM end it with status 130 and 143; its fits have ten seconds to save their
    checkpoints.

    Args:
        args: Command-line arguments; None takes sys.argv.
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
        print("deepred-batch: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, Stopped) else SIGNALLED + signal.SIGINT)
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    if failed:
        sys.exit(1)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(SIGNALLED + number)


def parse(args: Sequence[str]) -> argparse.Namespace:
    """The command line; `options` are those of each fit.

    Raises:
        ValueError: Arguments that do not go together.
    """
    own, options = _split(args)
    parser = _Parser(
        "deepred-batch",
        description=ABOUT,
        epilog=SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("photos", nargs="*", metavar="IMAGE", help="images to restore; one alone needs no --out")
    add("--config", action="append", default=[], help="YAML file or shipped configuration")
    add(
        "--images",
        nargs="+",
        action="extend",
        default=[],
        help="files, folders or patterns: images to restore",
    )
    add(
        "--ground_truth",
        nargs="+",
        action="extend",
        default=[],
        metavar="TRUTHS",
        help="in place of --images: clean images, whose degradation is simulated, for scores; also "
        "set:cbm3d9, set:set5, set:set14, set:ncsr and set:inpainting, the literature's, which are "
        "in DEEPRED_DATA or downloaded; true images of --images are --data.ground_truth "
        "'FOLDER/{name}.png'",
    )
    add("--out", type=Path, metavar="DIR", help="where the run directories and tables go")
    add(
        "--method",
        action="append",
        default=[],
        help="overlay of a method, as dip or paper/denoising/bm3d; several are compared on the "
        "same data",
    )
    add(
        "--restarts",
        type=_count,
        default=1,
        metavar="R",
        help="fits per image, with seeds model.seed, model.seed + 1, ...; their mean is the "
        "result, their standard deviation uncertainty.png and .npy",
    )
    add("--tile", type=_count, metavar="PIXELS", help="restore tiles of that side, and blend them")
    add(
        "--overlap",
        type=int,
        metavar="PIXELS",
        help="that tiles share (default: an eighth of one, and what A mixes)",
    )
    add(
        "--workers",
        type=_count,
        metavar="N",
        help="fits beside each other on this machine (default: what its cores, or GPUs, and its "
        "memory take)",
    )
    add(
        "--threads",
        type=_count,
        metavar="T",
        help="CPU threads of a fit (default: the cores by the workers); another number changes the "
        "last bits of the results",
    )
    add("--ray", metavar="ADDRESS", help="run on a Ray cluster; `local` starts one here")
    add("--gpus", type=float, metavar="G", help="with --ray: GPUs of a fit; 0.25 packs four on one")
    add("--shard", metavar="I/N", help="only the I-th of N parts of the fits (from 1), no tables")
    add("--overwrite", action="store_true", help="begin anew where settings have changed")
    arguments = parser.parse_args(own)
    arguments.options = tuple(options)
    _check(arguments)
    return arguments


class _Parser(argparse.ArgumentParser):
    """Leaves it to `main` to tell a mistake."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The batch's own arguments, and settings of the fits: options with a dot in their name."""
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
                raise ValueError(f"expected a value behind {arg}, got none")
            settings.append(f"{arg}={value}")
    return own, settings


def _check(arguments: argparse.Namespace) -> None:
    """Find arguments that do not go together, and fill in what follows from others."""
    given = [arguments.photos, arguments.images, arguments.ground_truth]
    if sum(map(bool, given)) != 1:
        raise ValueError(
            "expected one of an IMAGE, --images and --ground_truth; give a file, as in "
            "`deepred-batch photo.jpg`, or see `deepred-batch --help`"
        )
    owned = dict(OWNED)
    if arguments.ground_truth:
        owned["data.ground_truth"] = "--ground_truth, and the images to restore by --images"
    for option in arguments.options:
        name = option[2:].partition("=")[0].rstrip("+")
        for mine, instead in owned.items():
            if name == mine or name.startswith(mine + "."):
                raise ValueError(f"--{name} is the batch's own to set; use {instead}")
    if not arguments.config:
        arguments.config = DEFAULT_CONFIGS
        arguments.options = DEFAULT_OPTIONS + arguments.options
        arguments.tile = arguments.tile or DEFAULT_TILE
    if arguments.ray is None and arguments.gpus is not None:
        raise ValueError("--gpus is for --ray; on this machine --workers packs fits on its GPUs")
    if arguments.ray not in (None, "local") and arguments.workers is not None:
        raise ValueError("--workers is for this machine; a cluster runs what its cores take")
    if arguments.shard is not None and arguments.overwrite:
        raise ValueError("--overwrite would empty what other shards begin; give it without --shard")
    if arguments.tile is None and arguments.overlap is not None:
        raise ValueError("--overlap is that of tiles; give --tile too")
    if arguments.overlap is not None and not 0 <= arguments.overlap < arguments.tile:
        raise ValueError(
            f"expected --overlap of at least 0 and less than --tile {arguments.tile}, got "
            f"{arguments.overlap}"
        )
    arguments.shard = None if arguments.shard is None else _shard(arguments.shard)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"expected --shard I/N with 1 <= I <= N, as 3/8, got {text}")
    return int(index), int(count)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on the machine; fits keep theirs in `run.log`."""
    log = logging.getLogger("pytorch_lightning")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


@_quiet()
def run(arguments: argparse.Namespace) -> int:
    """Restore the images; the number of those that failed, with --shard of fits.

    Raises:
        ValueError: Settings or images that cannot be; nothing is begun.
        OSError: The output directory cannot be written.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    sources = find_images(arguments.photos or arguments.images or arguments.ground_truth)
    beside = arguments.out is None
    out = _beside(sources, arguments) if beside else arguments.out.resolve()
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
    hints = [
        f"{r['directory']}: {hint(r)}" for r in rows if hint(r) and r["restart"] in (None, "mean")
    ]
    for text in hints[:HINTS]:
        console.print(text)
    if len(hints) > HINTS:
        console.print(f"and {len(hints) - HINTS} more: residual_to_sigma in the table")
    if beside:
        return _move_beside(sources[0], jobs[0], out, console)
    write_csv(out / "results.csv", rows)
    write_bytes(out / "summary.md", summary(rows).encode())
    failed = sum(job.result is None for job in jobs)
    console.print(f"{len(jobs) - failed} of {len(jobs)} restored: {out / 'summary.md'}")
    return failed


def _run_shard(jobs: Sequence[Job], where: Where, shard: tuple[int, int], console: Console) -> int:
    """Run a part of the fits, and make nothing of them; the number of those that failed."""
    index, count = shard
    fits = [fit for job in jobs for fit in job.fits][index - 1 :: count]
    failures = _follow(jobs, fits, where, console, finishing=False)
    done = f"{len(fits) - len(failures)} of {len(fits)} fits are done"
    console.print(f"part {index} of {count}: {done}")
    return len(failures)


def _beside(sources: Sequence[Source], arguments: argparse.Namespace) -> Path:
    """Where the run directory of a single image goes until its result lies beside it."""
    path = Path(sources[0].path)
    given = [*arguments.photos, *arguments.images]
    of_set = any(name.startswith(PREFIX) for name in given)  # no place for results
    one_image = len(sources) == 1 and len(arguments.method) < 2 and arguments.restarts == 1
    if not one_image or of_set or arguments.ground_truth or arguments.shard is not None:
        raise ValueError("expected --out DIR, where run directories and tables go; got none")
    there = [p for s in (".png", ".tif") if (p := _restored_beside(path, s)).exists()]
    if there and not arguments.overwrite:
        raise ValueError(f"{there[0]} is there already; give --overwrite, or --out DIR")
    return path.with_name(f"{path.stem}.restored.run")


def _restored_beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}.restored{suffix}")


def _move_beside(source: Source, job: Job, out: Path, console: Console) -> int:
    """Move the restored image beside its original, and remove the rest."""
    if job.result is None:
        if any(last_checkpoint(fit.directory).exists() for fit in job.fits):
            console.print(f"what is done is in {out}; the same command goes on from there")
        else:
            shutil.rmtree(out)
        return 1
    [restored] = job.directory.glob("restored.*")
    target = _restored_beside(Path(source.path), restored.suffix)
    os.replace(restored, target)
    shutil.rmtree(out)
    console.print(f"restored image: {target}")
    return 0


def _refuse_changes(jobs: Sequence[Job], overwrite: bool) -> None:
    """Refuse jobs that were begun with other settings, or empty their directories.

    Raises:
        ValueError: There is one, and not to be overwritten.
    """
    changed = [(job, change) for job in jobs if (change := job.changed()) is not None]
    for job, change in changed:
        if not overwrite:
            raise ValueError(
                f"{job.directory} was begun with other settings: {change}; give the same again, "
                "another --out, or --overwrite to begin it anew"
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
    """Run those of the fits that are not done, and make of them the jobs that they complete.

    Returns:
        By run directory, why some failed.
    """
    failures: dict[Path, str] = {}
    left = [fit for fit in fits if fit.result is None]
    job_of = {fit.directory: job for job in jobs for fit in job.fits}
    open_fits = Counter(job_of[fit.directory].directory for fit in left)
    for job in {job_of[fit.directory].directory: job_of[fit.directory] for fit in left}.values():
        job.begin_parents()
    for fit in left:
        progress_file(fit.directory).unlink(missing_ok=True)  # of one that was killed

    def finish_complete(job: Job) -> None:
        if finishing and not open_fits[job.directory] and all(fit.result for fit in job.fits):
            try:
                finish(job)
            except Exception as error:  # that image's alone
                failures[job.directory] = reason(error)
                console.print(f"{label(job)}: {failures[job.directory]}")

    for job in jobs:
        finish_complete(job)
    with Bar(len(fits), left, console) as bar, ExitStack() as stack:
        outcomes: Iterable[Outcome | None] = ()
        if left:  # closed whatever comes, which ends the processes
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
            bar.look()
    return failures
