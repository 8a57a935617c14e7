"""Files with several pages, each of which is an image of a batch: one file as the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepred_pl.batch.jobs import Job
from deepred_pl.batch.plan import Source
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
    pages: Mapping[int, Job]

    @property
    def begun(self) -> bool:
        """Whether any of its pages is done."""
        return any(job.result is not None for job in self.pages.values())


def stacks_of(sources: Sequence[Source], jobs: Sequence[Job]) -> list[Stack]:
    """The stacks among the jobs, of which there are equally many for each source, in its order."""
    methods = len(jobs) // len(sources)
    pages: dict[Path, dict[int, Job]] = {}
    firsts: dict[Path, Source] = {}
    for i, job in enumerate(jobs):
        source = sources[i // methods]
        if source.page is not None:
            directory = job.directory.parent
            firsts.setdefault(directory, source)
            pages.setdefault(directory, {})[source.page] = job
    return [Stack(firsts[directory], directory, pages[directory]) for directory in pages]


def assembled(stack: Stack, axes: str | None, errors: Mapping[Path, str]) -> Report | None:
    """Write `restored.tif` and the middle page's `comparison.png`, and report on all pages.

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
    reports = {page: report for page, job in stack.pages.items() if (report := report_of(job))}
    if not reports:
        return None
    restored, comparison = stack.directory / "restored.tif", stack.directory / "comparison.png"
    files = {page: Path(report["restored"]) for page, report in reports.items()}
    write_stack(restored, stack.source.path, files, axes)
    middle = list(reports.values())[len(reports) // 2]
    write_bytes(comparison, Path(middle["comparison"]).read_bytes())
    return {
        "image": stack.source.name,
        "pages": list(reports.values()),
        "failed": {
            page: errors[job.directory] for page, job in stack.pages.items() if page not in reports
        },
        "directory": str(stack.directory),
        "restored": str(restored),
        "comparison": str(comparison),
    }
