"""The commands `deepred restore` and `deepred-batch`, and the course of a batch."""

import argparse
import json
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from deepred_pl.batch.arguments import name_of_setting, of_batch, of_restore
from deepred_pl.batch.bar import Bar, label
from deepred_pl.batch.jobs import Effort, Job, finish
from deepred_pl.batch.plan import (
    Batch,
    Source,
    data_settings,
    find_images,
    left_out,
    pages_of,
    plan,
)
from deepred_pl.batch.reports import Report, lines_of, report_of
from deepred_pl.batch.stacks import Stack, assembled, stacks_of
from deepred_pl.batch.tables import rows_of, summary, write_csv
from deepred_pl.batch.workers import Outcome, Where, start
from deepred_pl.callbacks.checkpoint import SIGNALLED, Stopped
from deepred_pl.choose import before_choice
from deepred_pl.cli import EXPECTED, reason
from deepred_pl.files import check_writable, last_checkpoint, replacing, write_bytes
from deepred_pl.lightning import quiet
from deepred_pl.sources import SET

DIAGNOSES = 5  # printed at most, for images whose fit was too short
UNSEEN = "its result is not in DIR; on a cluster --out must be on storage that all nodes share"


def main(args: Sequence[str] | None = None) -> None:
    """Run `deepred-batch`; exits with status 1 if an image failed, or with one line on a mistake.

    Ctrl-C and SIGTERM end it with status 130 and 143; its fits have ten seconds to save their
    checkpoints.

    Args:
        args: Command-line arguments; None uses sys.argv.
    """
    _main("deepred-batch", of_batch, sys.argv[1:] if args is None else args)


def restore(args: Sequence[str], began: float) -> None:
    """Run `deepred restore`; it ends like `deepred-batch`.

    Args:
        args: Command-line arguments.
        began: When the time for a single image began, as of `time.time`.
    """
    _main("deepred restore", partial(of_restore, began=began), args)


def _main(
    name: str, parse: Callable[[Sequence[str]], argparse.Namespace], args: Sequence[str]
) -> None:
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGTERM, _stop)  # as a scheduler sends it
    try:
        failed = run(parse(args))
    except EXPECTED as error:
        if os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
            raise
        sys.exit(f"{name}: error: {reason(error)}")
    except (KeyboardInterrupt, Stopped) as stop:
        print(f"{name}: stopped; repeat the command to resume", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, Stopped) else SIGNALLED + signal.SIGINT)
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    if failed:
        sys.exit(1)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(SIGNALLED + number)


@quiet()
def run(arguments: argparse.Namespace) -> int:
    """Restore the images; return the number of images that failed, with --shard of fits."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    files = find_images(arguments.images)
    if passed_over := left_out(arguments.images):
        console.print(f"Skipped files of other types: {passed_over}")
    single = arguments.out is None
    out = _single_run(files, arguments) if single else arguments.out.resolve()
    data = data_settings(arguments.config, arguments.options)
    axes, page = data.get("axes"), data.get("page")
    if page is not None and arguments.pages is not None:
        raise ValueError(f"--pages chooses pages, and so does data.page={page}; leave one out")
    note = console.print
    sources = pages_of(files, axes, arguments.pages, note) if page is None else files
    batch = Batch(
        sources=sources,
        role=arguments.role,
        out=out,
        configs=arguments.config,
        methods=arguments.method,
        options=arguments.options,
        restarts=arguments.restarts,
        tile=arguments.tile,
        overlap=arguments.overlap,
        chain=arguments.chain,
        here=arguments.ray in (None, "local"),
        effort=_effort(arguments, len(sources)),
    )
    jobs = plan(batch)
    stacks = stacks_of(batch, jobs)
    if arguments.effort is not None:
        left = {source.name for source, job in zip(sources, jobs, strict=True) if not job.result}
        left -= {stack.source.name for stack in stacks if stack.begun}
        of_left = [file for file in files if file.name in left]
        blind = "deblurring_blind" in arguments.config
        _refuse_existing(of_left, None if single else out, arguments.overwrite, blind)
    check_writable(out, "--out")
    _refuse_changes(jobs, arguments.overwrite)
    where = Where(arguments.ray, arguments.workers, arguments.threads, arguments.gpus)
    if arguments.shard is not None:
        return _run_shard(jobs, where, arguments.shard, console)
    failed_fits = _follow(jobs, [fit for job in jobs for fit in job.fits], where, console)
    rows = rows_of(jobs, failed_fits, out)
    failed = sum(job.result is None for job in jobs)
    in_stacks = {job.directory for stack in stacks for job in stack.pages.values()}
    reports = [
        report
        for job in jobs
        if job.directory not in in_stacks and (report := report_of(job)) is not None
    ]
    errors, unwritten = {out / row["directory"]: row["error"] for row in rows}, 0
    for stack in stacks:
        try:
            report = assembled(stack, axes, errors)
        except EXPECTED as error:  # its pages are kept, and other results are not affected
            console.print(f"{stack.source.name}: {reason(error)}")
            unwritten += 1
        else:
            reports += [report] if report is not None else []
    if single:
        reports = [_copied_next_to(files[0], report) for report in reports]
        if unwritten or _has_more(out, jobs, stacks):
            console.print(f"partial results are in {out}; repeat the command to resume")
        else:
            shutil.rmtree(out)
            reports = [_without_runs(report) for report in reports]
    elif arguments.effort is not None:
        for report in reports:
            _copy_into(out, report, console)
    if arguments.json:
        failures = [{n: row[n] for n in ("image", "error")} for row in rows if row["error"]]
        print(json.dumps([*reports, *failures], indent=2))
    elif len(files) == 1 and arguments.effort is not None:
        for text in (line for report in reports for line in lines_of(report)):
            console.print(text)
    else:
        _print_warnings(reports, out, console)
    if not single:
        write_csv(out / "results.csv", rows)
        write_bytes(out / "summary.md", summary(rows).encode())
        console.print(f"{len(jobs) - failed} of {len(jobs)} restored: {out / 'summary.md'}")
    return failed + unwritten


def _effort(arguments: argparse.Namespace, images: int) -> Effort | None:
    if arguments.effort is None:
        return None
    given = tuple(map(name_of_setting, arguments.options))
    before = tuple(before_choice(arguments.config[0], given, arguments.effort))
    return Effort(arguments.effort, given, before, arguments.began if images == 1 else None)


def _print_warnings(reports: Sequence[Report], out: Path, console: Console) -> None:
    """Print each image's warnings, and some of the diagnoses."""
    diagnoses = []
    pages = [page for report in reports for page in report.get("pages", [report])]
    for report in reports:
        if failed := ", ".join(map(str, report.get("failed", ()))):
            console.print(f"{report['image']}: not restored in {report['restored']}: page {failed}")
        if empty := report.get("empty"):
            console.print(f"{report['image']}: {len(empty)} pages of {report['restored']} are 0")
    for report in pages:
        name = Path(report["directory"]).relative_to(out).as_posix()
        for text in report["warnings"]:
            console.print(f"{name}: {text}")
        diagnoses += [f"{name}: {text}"] if (text := report["diagnosis"]) else []
    for text in diagnoses[:DIAGNOSES]:
        console.print(text)
    if (more := len(diagnoses) - DIAGNOSES) > 0:
        console.print(f"and {more} more: see residual_to_sigma in results.csv")


def _run_shard(jobs: Sequence[Job], where: Where, shard: tuple[int, int], console: Console) -> int:
    """Run a part of the fits without tables; return the number of fits that failed."""
    index, count = shard
    fits = [fit for job in jobs for fit in job.fits][index - 1 :: count]
    failures = _follow(jobs, fits, where, console, finishing=False)
    done = f"{len(fits) - len(failures)} of {len(fits)} fits done"
    console.print(f"part {index} of {count}: {done}")
    return len(failures)


def _single_run(files: Sequence[Source], arguments: argparse.Namespace) -> Path:
    """The temporary run directory of a single file, whose result is moved next to it."""
    path = Path(files[0].path)
    of_set = any(name.startswith(SET) for name in arguments.images)  # not a place for results
    several = len(files) > 1 or arguments.restarts > 1
    if several or of_set or arguments.shard is not None:
        raise ValueError(
            "results of several images, restarts or parts go into a folder: expected --out DIR, "
            "got none"
        )
    return path.with_name(f"{path.stem}.restored.run")


def _refuse_existing(
    files: Sequence[Source], out: Path | None, overwrite: bool, blind: bool
) -> None:
    """Refuse to replace files by results: by those in a folder, or next to a single file.

    Args:
        files: Those that have no result yet.
        out: The folder; None is next to the file.
        overwrite: Replace them.
        blind: Each also gets the kernel of its blur.
    """
    paths = [Path(file.path) for file in files]
    if out is None:
        kinds = [("restored", ".png"), ("restored", ".tif"), ("comparison", ".png")]
        kinds += [("kernel", ".png"), ("kernel", ".npy")] * blind
        results = [_next_to(path, *kind) for path in paths for kind in kinds]
    else:
        if out in (folder for p in paths for folder in (p.parent.resolve(), p.resolve().parent)):
            raise ValueError(f"--out {out} has the images, and gets NAME.png; use another folder")
        results = [out / f"{file.name}{suffix}" for file in files for suffix in (".png", ".tif")]
    for path in results:
        if path.exists() and not overwrite:
            raise ValueError(
                f"{path} exists already; use --overwrite, or another folder (--out DIR)"
            )


def _next_to(path: Path, kind: str, suffix: str) -> Path:
    return path.with_name(f"{path.stem}.{kind}{suffix}")


def _copied_next_to(source: Source, report: Report) -> Report:
    """Copy the restored image and the comparison next to the original."""
    if report.get("kernel"):
        with replacing(_next_to(Path(source.path), "kernel", ".png")) as copy:
            copy.write(Path(report["kernel"]).with_suffix(".png").read_bytes())
    for kind in ("restored", "comparison", "kernel"):
        if report.get(kind):
            _copy(report, kind, _next_to(Path(source.path), kind, Path(report[kind]).suffix))
    return report


def _copy_into(out: Path, report: Report, console: Console) -> None:
    """Copy the restored image into the folder, under its image's name."""
    name = report["image"] + Path(report["restored"]).suffix
    try:
        _copy(report, "restored", out / name)
    except OSError as error:  # it is still in its run directory
        console.print(f"{out / name}: {reason(error)}")


def _copy(report: Report, kind: str, path: Path) -> None:
    with replacing(path) as copy, Path(report[kind]).open("rb") as original:
        shutil.copyfileobj(original, copy)
    report[kind] = str(path)


def _has_more(out: Path, jobs: Sequence[Job], stacks: Sequence[Stack]) -> bool:
    """Whether the temporary run directory has more than the results of this call."""
    ours = {job.directory for job in jobs}
    ours |= {job.directory for stack in stacks for job in stack.pages.values()}
    runs = [path.parent for path in out.rglob("job.json")]
    foreign = any(ours.isdisjoint((run, *run.parents)) for run in runs)
    done = [job for job in jobs if job.result is not None]
    begun = done or any(last_checkpoint(fit.directory).exists() for job in jobs for fit in job.fits)
    return foreign or bool(begun and len(done) < len(jobs))


def _without_runs(report: Report) -> Report:
    """A report without the paths of run directories, which are removed."""
    if "pages" not in report:
        return {**report, "directory": None}
    none = dict.fromkeys(("directory", "restored", "comparison", "kernel"))
    return {**report, "directory": None, "pages": [{**page, **none} for page in report["pages"]]}


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
        fit.clean_up()

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
            chains = sum(fit.after is None for job in jobs for fit in job.fits)
            running = start(left, where, chains, console.print)
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
