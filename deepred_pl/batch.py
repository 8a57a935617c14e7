"""The `deepred-batch` command: many images, on this machine or on a Ray cluster."""

import argparse
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deepred_pl.callbacks.preflight import step_memory
from deepred_pl.callbacks.writer import hint
from deepred_pl.directory import check_writable, read_json
from deepred_pl.images import write_bytes
from deepred_pl.jobs import Job, finish
from deepred_pl.memory import free_memory, give_memory_back
from deepred_pl.plan import Batch, Source, find_images, plan
from deepred_pl.run import EXPECTED, RestorationCLI, reason
from deepred_pl.tables import rows_of, summary, write_csv
from deepred_pl.tiles import default_overlap
from deepred_pl.workers import Outcome, on_ray, on_this_machine

PROCESS = 700 * 2**20  # bytes of a process with torch, beside its fit
HINTS = 5  # at most, on images whose fit was too short; residual_to_sigma in the table has all
SPEED_PERIOD = 600.0  # seconds by which the bar estimates the time left
UNSEEN = "its result is not in DIR; on a cluster --out must be on storage that all nodes share"
LOOKED_AT, SHOWN = 64, 3  # fits that may run now, of which the bar names some

# Without --config: a photograph with noise of unknown strength.
DEFAULT_OPTIONS = ("--config=denoising", "--config=methods/quick", "--data.noise.sigma=null")
DEFAULT_TILE = 128  # in as many steps a network learns a small image better than a large one

# Settings of a single fit that a batch owns, and its own name for them.
OWNED = {
    "data.measurement": "--images",
    "data.region": "--tile",
    "data.as_floats": "--restarts or --tile, which need it",
    "trainer.default_root_dir": "--out",
    "trainer.logger": "--out",
    "ckpt_path": "the same command again, which goes on",
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

    Args:
        args: Command-line arguments; None takes sys.argv.
    """
    try:
        failed = run(parse(sys.argv[1:] if args is None else args))
    except EXPECTED as error:
        if os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
            raise
        sys.exit(f"deepred-batch: error: {reason(error)}")
    except KeyboardInterrupt:
        sys.exit("deepred-batch: stopped; the same command goes on from here")
    if failed:
        sys.exit(1)


def parse(args: Sequence[str]) -> argparse.Namespace:
    """The command line; `options` are those of each fit.

    Raises:
        ValueError: Arguments that do not go together.
    """
    own, options = _split(args)
    parser = argparse.ArgumentParser(
        "deepred-batch",
        description=ABOUT,
        epilog=SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("photos", nargs="*", metavar="IMAGE", help="images to restore; one alone needs no --out")
    add("--config", action="append", default=[], help="YAML file or shipped configuration")
    add("--images", nargs="+", default=[], help="files, folders or patterns: images to restore")
    add(
        "--ground_truth",
        nargs="+",
        default=[],
        metavar="TRUTHS",
        help="in place of --images: clean images, whose degradation is simulated, for scores; "
        "true images of --images are --data.ground_truth 'FOLDER/{name}.png'",
    )
    add("--out", type=Path, metavar="DIR", help="where the run directories and tables go")
    add(
        "--method",
        action="append",
        default=[],
        help="overlay of a method, as dip or deepred; several are compared on the same data",
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
        "--overlap", type=int, metavar="PIXELS", help="that tiles share (default: an eighth of one)"
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
    for option in arguments.options:
        name = option[2:].partition("=")[0].rstrip("+")
        mine = next((n for n in OWNED if name == n or name.startswith(n + ".")), None)
        if name == "data.ground_truth" and arguments.ground_truth:
            mine, instead = name, "--ground_truth, and the images to restore by --images"
        elif mine:
            instead = OWNED[mine]
        if mine:
            raise ValueError(f"--{name} is the batch's own to set; use {instead}")
    if not arguments.config:
        arguments.options = DEFAULT_OPTIONS + arguments.options
        arguments.tile = arguments.tile or DEFAULT_TILE
    if arguments.ray is None and arguments.gpus is not None:
        raise ValueError("--gpus is for --ray; on this machine --workers packs fits on its GPUs")
    if arguments.ray not in (None, "local") and arguments.workers is not None:
        raise ValueError("--workers is for this machine; a cluster runs what its cores take")
    if arguments.overlap is None:
        arguments.overlap = default_overlap(arguments.tile or 0)
    if arguments.tile is not None and not 0 <= arguments.overlap < arguments.tile:
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
    """Restore the images; the number of fits, or with tables images, that failed.

    Raises:
        ValueError: Settings or images that cannot be; nothing is begun.
        OSError: The output directory cannot be written.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    sources = find_images(arguments.photos or arguments.images or arguments.ground_truth)
    beside = arguments.out is None
    out = _beside(sources, arguments) if beside else arguments.out.resolve()
    try:
        check_writable(out)
    except OSError as error:
        raise OSError(str(error).replace("--trainer.default_root_dir", "--out")) from error
    batch = Batch(
        sources,
        "data.ground_truth" if arguments.ground_truth else "data.measurement",
        out,
        arguments.config,
        arguments.method,
        arguments.options,
        arguments.restarts,
        arguments.tile,
        arguments.overlap,
        here=arguments.ray in (None, "local"),
    )
    jobs = plan(batch)
    _refuse_changes(jobs, arguments.overwrite)
    fits = [fit for job in jobs for fit in job.fits]
    started = partial(_start, arguments=arguments, batch_size=len(fits))
    if arguments.shard is not None:
        index, count = arguments.shard
        mine = fits[index - 1 :: count]
        failures = _follow(mine, [], started, console)
        done = len(mine) - len(failures)
        console.print(f"part {index} of {count}: {done} of {len(mine)} fits are done")
        return len(failures)
    failures = _follow(fits, jobs, started, console)
    rows = rows_of(jobs, failures, out)
    for row in [row for row in rows if hint(row)][:HINTS]:
        console.print(f"{row['directory']}: {hint(row)}", markup=False)
    if beside:
        return _move_beside(sources[0], jobs[0], out, console)
    write_csv(out / "results.csv", rows)
    write_bytes(out / "summary.md", summary(rows).encode())
    failed = sum(job.result is None for job in jobs)
    console.print(f"{len(jobs) - failed} of {len(jobs)} restored: {out / 'summary.md'}")
    return failed


def _beside(sources: Sequence[Source], arguments: argparse.Namespace) -> Path:
    """Where the run directory of a single image goes until its result lies beside it."""
    path = Path(sources[0].path)
    if len(sources) > 1 or len(arguments.method) > 1 or arguments.shard is not None:
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


def _start(
    fits: Sequence[Job], arguments: argparse.Namespace, batch_size: int
) -> Iterator[Outcome | None]:
    """Run fits where the arguments say.

    The threads of a fit depend on the whole batch and not on what is left of it, for its numbers
    depend on them.
    """
    accelerator = fits[0].about["settings"]["trainer"]["accelerator"]
    cuda = torch.cuda.is_available()
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and cuda)
    if arguments.ray not in (None, "local"):
        gpus = (1.0 if on_gpu else 0.0) if arguments.gpus is None else arguments.gpus
        return on_ray(fits, arguments.ray, None, arguments.threads or 1, gpus)
    cores, devices = _cores(), torch.cuda.device_count() if on_gpu else 0
    beside = arguments.workers or min(batch_size, devices or cores)
    threads = arguments.threads or max(1, cores // beside)
    workers = arguments.workers
    if workers is None:
        workers = min(devices or max(1, cores // threads), len(fits))
        if workers > 1 and not devices:
            workers = min(workers, _that_fit_into_memory(fits))
    if arguments.ray is None:
        return on_this_machine(fits, workers, threads)
    gpus = devices / workers if arguments.gpus is None else arguments.gpus
    return on_ray(fits, "local", workers, threads, min(1.0, gpus))


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _that_fit_into_memory(fits: Sequence[Job]) -> int:
    """How many fits the free memory takes, at least 1, by the image with the largest file."""
    largest = max(fits, key=lambda fit: fit.about["bytes"])
    try:
        cli = RestorationCLI(list(largest.options), run=False)
        cli.datamodule.setup()
        assert cli.datamodule.problem is not None
        cli.model.build(cli.datamodule.problem)
        needed = step_memory(cli.model)
    except EXPECTED:  # its fit will tell
        return 1
    finally:
        give_memory_back()
    return max(1, free_memory(cli.model.device) // (needed + PROCESS))


def _follow(
    fits: Sequence[Job],
    jobs: Sequence[Job],
    start: Callable[[Sequence[Job]], Iterator[Outcome | None]],
    console: Console,
) -> dict[Path, str]:
    """Run the fits that are not done, and make of them the jobs that they complete.

    Returns:
        By run directory, why some failed.
    """
    failures: dict[Path, str] = {}
    left = [fit for fit in fits if fit.result is None]
    job_of = {fit.directory: job for job in jobs for fit in job.fits}
    open_fits = Counter(job_of[fit.directory].directory for fit in left if jobs)

    def finish_complete(job: Job) -> None:
        if all(fit.result is not None for fit in job.fits):
            try:
                finish(job)
            except Exception as error:  # that image's alone
                failures[job.directory] = reason(error)
                console.print(f"{_label(job)}: {failures[job.directory]}", markup=False)

    for job in jobs:
        if not open_fits[job.directory]:
            finish_complete(job)
    with Bar(len(fits), left, console) as bar:
        for outcome in start(left) if left else ():
            if outcome is not None:
                fit, error = outcome
                if error is None and fit.result is None:
                    error = UNSEEN
                if error is not None:
                    failures[fit.directory] = error
                bar.end(fit, error)
                if jobs:
                    job = job_of[fit.directory]
                    open_fits[job.directory] -= 1
                    if not open_fits[job.directory]:
                        finish_complete(job)
            bar.look()
    return failures


class Bar:
    """A progress bar over the fits of a batch, with the PSNR of those that run and the time left.

    Where the output is no terminal, it prints a line for each fit that ends.

    Args:
        total: Fits of the batch.
        left: Those that are not done.
        console: Where it is shown.
    """

    def __init__(self, total: int, left: Sequence[Job], console: Console) -> None:
        self._left = {fit.directory: fit for fit in left}
        self._total = total
        self._console = console
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
        """Count a fit that ended, and tell of it."""
        del self._left[fit.directory]
        if error is not None or not self._console.is_terminal:
            ended = f"{self._total - len(self._left)} of {self._total}"
            self._console.print(f"{ended}: {_label(fit)}: {error or _said(fit)}", markup=False)

    def look(self) -> None:
        """Show where the fits are."""
        running, parts = [], 0.0
        for fit in list(self._left.values())[:LOOKED_AT]:
            report = read_json(fit.directory / "progress.json")
            if report is not None:
                parts += max(0.0, report["step"] / report["max_steps"])
                psnr = report["psnr"]
                running.append(_label(fit) + ("" if psnr is None else f" {psnr:.2f} dB"))
        ended = self._total - len(self._left)
        text = ", ".join(running[:SHOWN]) + (", …" if len(running) > SHOWN else "")
        self._progress.update(self._task, completed=ended + parts, ended=ended, running=text)


def _label(fit: Job) -> str:
    method, restart = fit.about["method"], fit.about["restart"]
    tile = fit.directory.name if fit.directory.name.startswith("tile_") else ""
    named = (fit.about["image"], method, "" if restart is None else f"restart {restart}", tile)
    return " ".join(name for name in named if name)


def _said(fit: Job) -> str:
    result = fit.result
    assert result is not None
    before, after = (result["psnr"][name] for name in ("measurement", "restored"))
    gain = "" if after is None else f"{before:.2f} -> {after:.2f} dB, "
    return f"{gain}{result['steps']} steps in {result['seconds']:.0f} s"
