"""Files with several pages, each of which is an image of a batch: one file as the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deepred_pl.batch.jobs import Job
from deepred_pl.batch.plan import Batch, Source
from deepred_pl.batch.reports import Report, report_of
from deepred_pl.files import write_bytes
from deepred_pl.images import write_stack


@dataclass(frozen=True)
class Stack:
    """The pages of a file that are restored with one method.

    Attributes:
        source: The file, as the first of its pages.
        directory: The directory of the pages' run directories.
        pages: The jobs by page.
    """

    source: Source
    directory: Path
    pages: dict[int, Job]

    @property
    def begun(self) -> bool:
        """Whether any of its pages is done."""
        return any(job.result is not None for job in self.pages.values())


def stacks_of(batch: Batch, jobs: Sequence[Job]) -> list[Stack]:
    """The stacks of a batch, also with pages that an earlier call has restored alike.

    Args:
        batch: The batch.
        jobs: Its jobs, of which there are equally many for each source, in its order.
    """
    methods = len(jobs) // len(batch.sources)
    stacks: dict[Path, Stack] = {}
    for i, job in enumerate(jobs):
        source = batch.sources[i // methods]
        if source.page is None:
            continue
        if job.directory.parent not in stacks:
            pages = _earlier(source, job)
            stacks[job.directory.parent] = Stack(source, job.directory.parent, pages)
        stacks[job.directory.parent].pages[source.page] = job
    return list(stacks.values())


def _earlier(source: Source, job: Job) -> dict[int, Job]:
    """The pages of the same file that are done with the settings of a job."""
    found = {}
    for page in range(source.pages):
        other = replace(source, page=page)
        directory = job.directory.parent / other.directory("").name
        done = replace(job, directory=directory, about={**job.about, "image": other.label})
        if done.result is not None and done.changed() is None:
            found[page] = done
    return found


def assembled(stack: Stack, axes: str | None, errors: Mapping[Path, str]) -> Report | None:
    """Write `stack.tif` and the middle page's comparison, and report on all pages.

    Args:
        stack: The stack, whose jobs have ended.
        axes: Its axes, if they are stated.
        errors: Why jobs have no result, by run directory.

    Returns:
        The report; None if no page is restored.

    Raises:
        OSError: The result cannot be written.
        ValueError: The memory is too small for it.
    """
    jobs = sorted(stack.pages.items())
    reports = {page: report for page, job in jobs if (report := report_of(job))}
    if not reports:
        return None
    # Names that the run of the file itself (data.page: all) does not have.
    restored, comparison = stack.directory / "stack.tif", stack.directory / "stack.png"
    files = {page: Path(report["restored"]) for page, report in reports.items()}
    middle = list(reports.values())[len(reports) // 2]
    # Sinograms have other units than the result, and a true image is no measurement.
    measured = stack.pages[min(reports)].about["role"] == "data.measurement"
    keep_others = measured and middle["result"]["operator"] != "Radon"
    empty = write_stack(restored, stack.source.path, files, axes, keep_others)
    write_bytes(comparison, Path(middle["comparison"]).read_bytes())
    return {
        "image": stack.source.name,
        "pages": list(reports.values()),
        "others": stack.source.pages - len(reports),
        "empty": empty,
        "failed": {page: errors[job.directory] for page, job in jobs if page not in reports},
        "directory": str(stack.directory),
        "restored": str(restored),
        "comparison": str(comparison),
        "compared": middle["image"],
    }
