"""Expand a batch into jobs: images × methods × restarts × tiles."""

import glob
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deepred_pl.axes import count_pages
from deepred_pl.batch.jobs import ON_ANY_MACHINE, Effort, Job
from deepred_pl.choose import Choice, choose_for_stack, is_denoising, seconds_of, set_up
from deepred_pl.cli import EXPECTED, RestorationCLI, find_config, settings_of
from deepred_pl.images import brightest_page, layout_of
from deepred_pl.operators import Operator, unknown_blur
from deepred_pl.problem import InverseProblem
from deepred_pl.sources import SAMPLE, SET, find_image, find_set, name_of
from deepred_pl.tiles import Tiling

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")

# Where settings are chosen, images are cut if the operator can be, because networks fit small
# images better in a given time: if they have MUCH_LARGER times the pixels of such a tile.
SIMPLE_TILE, TILE, MUCH_LARGER = 128, 256, 2.25  # pixels of a side; the first in denoising
LEAST_SECONDS = 30  # for each tile, if an effort is a time

# Settings of every fit of a batch.
WITHIN_A_BATCH = ("--trainer.enable_progress_bar=false", "--trainer.devices=1")
AS_FLOATS = "--data.as_floats=true"  # for images that are blended or averaged


@dataclass(frozen=True)
class Source:
    """An image of a batch.

    Attributes:
        name: The name of its run directory: the file's name without suffix.
        path: The file, or "sample:NAME".
        size: Bytes of the file.
        digest: SHA-256 of the file, if it is one.
        page: The page that is the image, if the file has several.
        pages: How many the file has.
    """

    name: str
    path: str
    size: int = 0
    digest: str | None = None
    page: int | None = None
    pages: int = 1

    @property
    def label(self) -> str:
        """The image's name in messages and tables."""
        return self.name if self.page is None else f"{self.name} page {self.page}"

    def directory(self, method: str) -> Path:
        """Its run directory for a method, in that of the batch."""
        digits = len(str(self.pages - 1))
        page = "" if self.page is None else f"page_{self.page:0{digits}}"
        return Path(self.name) / method / page


@dataclass(frozen=True)
class Batch:
    """The specification of a batch.

    Attributes:
        sources: The images.
        role: The setting that each image is.
        out: The directory of all run directories.
        configs: Names of configurations, or files.
        methods: Names of methods' overlays, or files; none uses the configurations' method.
        options: Other settings of every fit; "{name}" in their values is the image's name.
        restarts: Fits per image, which differ in `model.seed`.
        tile: Side of the tiles in pixels, or None.
        overlap: Pixels that tiles share; None as in `InverseProblem.split`.
        chain: How many pages of a file follow each other, each starting from the network of the one
            before; 1 if none does.
        here: Whether the fits run on this machine.
        effort: How each fit chooses the settings that the options leave open, or None.
    """

    sources: Sequence[Source]
    role: Literal["data.measurement", "data.ground_truth"]
    out: Path
    configs: Sequence[str]
    methods: Sequence[str]
    options: Sequence[str]
    restarts: int
    tile: int | None
    overlap: int | None
    chain: int
    here: bool
    effort: Effort | None = None


def find_images(given: Sequence[str]) -> list[Source]:
    """Find the images of files, folders, patterns, "sample:NAME" and "set:SET".

    Of a folder, these are files with an image's suffix, except hidden ones, NAME.restored.png,
    NAME.comparison.png and NAME.kernel.png.
    """
    named: dict[str, str] = {}
    for path in (path for text in given for path in _matches(text)):
        name = path.removeprefix(SAMPLE) if path.startswith(SAMPLE) else name_of(path)
        if named.get(name, path) != path:
            raise ValueError(
                "expected images with different names, which name their run directories, got "
                f"{named[name]} and {path}; rename one"
            )
        named[name] = path
    return [_source(name, path) for name, path in named.items()]


def data_settings(configs: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """The settings of the section data, without None values."""
    return settings_of([*map(_config, configs), *options])["data"]


def pages_of(
    sources: Sequence[Source], axes: str | None, chosen: str | None, note: Callable[[str], None]
) -> list[Source]:
    """The pages of files with several, as images of their own, and the other files.

    Args:
        sources: Files.
        axes: Their axes, if they are stated.
        chosen: Which pages: START:STOP without STOP, or numbers such as 0,3,5; None is all.
        note: Called with what a user should know.

    Raises:
        ValueError: A file does not have the chosen pages, or none has several.
    """
    images = []
    for source in sources:
        try:
            letters, shape, series = layout_of(source.path, axes)
            count = count_pages(letters, shape)
            if series > 1:
                note(f"{source.path}: only the first of its {series} series of images is restored")
        except (OSError, ValueError):
            if axes is not None and len(sources) == 1:  # the stated ones do not fit
                raise
            count = series = 1  # its fit reports it
        if count > 1 or series > 1:
            numbers = range(count) if chosen is None else _numbers(chosen, count, source.path)
            images += [replace(source, page=page, pages=count) for page in numbers]
        else:
            images.append(source)
    if chosen is not None and all(image.page is None for image in images):
        raise ValueError(f"expected a file with several pages, got none to take pages {chosen} of")
    return images


def _numbers(text: str, count: int, path: str) -> Sequence[int]:
    """Page numbers such as 0:10, 5:, or 0,3,5."""
    start, colon, stop = text.partition(":")
    try:
        if colon:
            numbers: Sequence[int] = range(int(start or 0), int(stop or count))
        else:
            numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        numbers = ()
    if not numbers or not 0 <= numbers[0] <= numbers[-1] < count:
        raise ValueError(
            f"expected pages such as 0:10 or 0,3,5, from 0 to {count - 1} of {path}, got {text}"
        )
    return numbers


def left_out(given: Sequence[str]) -> str:
    """How many files of the folders in `given` are not images that can be read, by suffix."""
    files = [p for text in given if Path(text).is_dir() for p in Path(text).iterdir()]
    kinds = Counter(
        p.suffix.lower() or "without suffix"
        for p in files
        if p.is_file() and p.name[0] != "." and p.suffix.lower() not in SUFFIXES
    )
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _source(name: str, path: str) -> Source:
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while part := file.read(2**24):
                digest.update(part)
            return Source(name, path, file.tell(), digest.hexdigest())
    except OSError:  # a sample; other errors are reported by its fit
        return Source(name, path)


def _matches(text: str) -> list[str]:
    if text.startswith(SAMPLE):
        return [text]
    if text.startswith(SET):
        return [str(path) for path in ([find_image(text)] if "/" in text else find_set(text))]
    if Path(text).is_dir():
        images = (p for p in Path(text).iterdir() if p.suffix.lower() in SUFFIXES)
        found = [p for p in images if not p.stem.endswith((".restored", ".comparison", ".kernel"))]
        what = f"images ({', '.join(SUFFIXES)}) in the folder"
    else:
        found = [Path(text)] if Path(text).is_file() else [Path(p) for p in glob.glob(text)]
        what = "an image, a folder or a pattern"
    files = sorted(os.path.abspath(p) for p in found if p.is_file() and p.name[0] != ".")
    if not files:
        others = left_out([text])
        found_others = f"only {others}; convert them to TIFF" if others else "nothing"
        raise ValueError(f"expected {what}, found {found_others}: {text}")
    return files


def plan(batch: Batch) -> list[Job]:
    """The jobs, one per image and method, with restarts and tiles as parts."""
    labels = [Path(method).stem for method in batch.methods]
    for name in [*labels, *(source.name for source in batch.sources)]:
        if name in (".", "..") or Path(name).name != name:  # run directories stay inside --out
            raise ValueError(f"expected names valid for a directory, got {name!r}; rename it")
    if len(set(labels)) < len(labels):
        raise ValueError(f"expected methods of different names, got {', '.join(labels)}")
    configs = [_config(name) for name in batch.configs]
    overlays = [[_config(_method(name))] for name in batch.methods] or [[]]
    methods = []
    for label, overlay in zip(labels or [""], overlays, strict=True):
        options = [*configs, *overlay, *batch.options, *WITHIN_A_BATCH]
        first = _first_options(batch, options)
        settings = settings_of(first)
        _check(batch, first, settings["data"])
        methods.append((label, options, settings))
    jobs, tilings, befores = [], dict[str, Tiling | None](), _befores(batch)
    chosen = dict[str, Choice]()  # of the files with several pages
    for source, before in zip(batch.sources, befores, strict=True):
        if source.path not in chosen:
            chosen[source.path] = _choice_for_pages(batch, source, methods[0][1])
        if batch.effort is not None:
            batch = replace(batch, effort=replace(batch.effort, chosen=chosen[source.path]))
        tiling = tilings.get(source.path)
        if source.path not in tilings and (found := _read(batch, source, methods[0][1])):
            tiling = _tiling(batch, source, *found)
            if source.page is not None:  # all pages are cut alike
                tilings[source.path] = tiling
        jobs += [_job(batch, source, before, tiling, *method) for method in methods]
    return jobs


def _befores(batch: Batch) -> list[Source | None]:
    """For each image the page before it in its chain, or None."""
    befores: list[Source | None] = []
    place = 0
    for i, source in enumerate(batch.sources):
        follows = i > 0 and source.path == batch.sources[i - 1].path
        place = place + 1 if follows else 0
        befores.append(batch.sources[i - 1] if place % batch.chain else None)
    return befores


def _check(batch: Batch, options: Sequence[str], data: dict[str, Any]) -> None:
    """Refuse settings that no image can be restored with, or that are the same for all images."""
    truth = str(data.get("ground_truth", "{name}"))
    one_for_all = "{name}" not in truth and len(batch.sources) > 1
    twice = batch.role == "data.ground_truth" and "ground_truth" in data
    page = ["page"] if any(source.page is not None for source in batch.sources) else []
    for name in ("measurement", "region", "ground_truth", *page):
        if data.get(name) is not None and (name != "ground_truth" or one_for_all or twice):
            raise ValueError(
                f"the configuration has data.{name}={data[name]}, but each image of a batch has "
                "its own; leave it out, or use {name} in it"
            )
    named = [option.replace("{name}", batch.sources[0].name) for option in options]
    try:
        cli = RestorationCLI(named if batch.here else [*named, *ON_ANY_MACHINE], run=False)
    except EXPECTED:
        if named == list(options):
            raise
        return  # that image's files may be the reason, which its fit reports
    operator = cli.datamodule.operator
    if batch.restarts > 1 and isinstance(operator, Operator) and unknown_blur(operator):
        raise ValueError(
            f"an unknown blur needs a single fit, got {batch.restarts} restarts: each finds a "
            "kernel of its own, and their images are shifted; leave restarts out, or use the "
            "kernel of one"
        )
    if batch.tile is not None:
        smallest = _smallest_side(cli)
        if batch.tile < smallest:
            raise ValueError(
                f"expected tiles of at least {smallest} pixels for this network, got {batch.tile}; "
                "use larger ones"
            )


def _smallest_side(cli: RestorationCLI) -> int:
    return getattr(cli.model.make_network(1), "smallest_side", 1)


def _first_options(batch: Batch, options: Sequence[str]) -> list[str]:
    """The options before the effort has chosen others."""
    return Job(batch.out, tuple(options), {}, effort=batch.effort).first_options


def _choice_for_pages(batch: Batch, source: Source, options: Sequence[str]) -> Choice:
    """What is chosen for all pages of a file, by the brightest; nothing if it has only one."""
    if batch.effort is None or source.page is None:
        return Choice()
    try:
        data = RestorationCLI(
            [*_first_options(batch, _of_image(batch, source, options)), *ON_ANY_MACHINE], run=False
        ).datamodule
        data.page = brightest_page(source.path, data.axes)
        return choose_for_stack(data, batch.effort.given)
    except EXPECTED:  # its fits report it
        return Choice()


def _config(name: str) -> str:
    return f"--config={Path(find_config(name)).resolve()}"


def _method(name: str) -> str:
    return name if "/" in name or Path(name).is_file() else f"methods/{name}"


def _of_image(batch: Batch, source: Source, options: Sequence[str]) -> list[str]:
    """The options of an image's fits."""
    named = [option.replace("{name}", source.name) for option in options]
    page = [] if source.page is None else [f"--data.page={source.page}"]
    return [*named, f"--{batch.role}={source.path}", *page]


def _job(
    batch: Batch,
    source: Source,
    before: Source | None,
    tiling: Tiling | None,
    label: str,
    options: Sequence[str],
    settings: dict[str, Any],
) -> Job:
    """The job of an image with one method, in a chain after that of the page `before`."""
    options = _of_image(batch, source, options)
    directory = batch.out / source.directory(label)
    several = batch.restarts > 1
    about = {
        "image": source.label,
        "method": label,
        "restart": "mean" if several else None,
        "role": batch.role,
        "sha256": source.digest,
        "bytes": source.size,
        "tile": batch.tile,
        "overlap": None if tiling is None else tiling.overlap,
        "chain": batch.chain if batch.chain > 1 else None,
        "effort": None if batch.effort is None else batch.effort.name,
        "settings": settings,
    }
    fits = batch.restarts * (len(tiling.regions) if tiling else 1)
    effort = None if batch.effort is None else replace(batch.effort, fits=fits)

    def after(inside: Path) -> Path | None:
        if before is None:
            return None
        return batch.out / before.directory(label) / inside.relative_to(directory)

    def one(inside: Path, options: Sequence[str], about: dict[str, Any]) -> Job:
        """A fit, or its tiles."""
        if tiling is None or len(tiling.regions) < 2:
            own = (*options, _logger(inside))
            return Job(inside, own, about, effort=effort, after=after(inside))
        parts = []
        for region in tiling.regions:
            part = inside / f"tile_{region.top}_{region.left}"
            own = (*options, f"--data.region={list(region)}", AS_FLOATS, _logger(part))
            parts.append(Job(part, own, about, effort=effort, after=after(part)))
        return Job(inside, tuple(options), about, tuple(parts), tiling)

    if not several:
        return one(directory, options, about)
    first = settings["model"]["init_args"]["seed"]
    restarts = tuple(
        one(
            directory / f"restart_{i}",
            (*options, f"--model.seed={first + i}", AS_FLOATS),
            {**about, "restart": i},
        )
        for i in range(batch.restarts)
    )
    return Job(directory, tuple(options), about, restarts)


def _read(
    batch: Batch, source: Source, options: Sequence[str]
) -> tuple[RestorationCLI, InverseProblem] | None:
    """A fit of an image that may be cut, and its problem; None if its own fit reports an error."""
    if batch.tile is None and batch.effort is None:
        return None
    try:
        options = _first_options(batch, _of_image(batch, source, options))
        cli = RestorationCLI([*options, *ON_ANY_MACHINE], run=False)
        return cli, set_up(cli.datamodule)
    except EXPECTED:
        return None


def _tiling(
    batch: Batch, source: Source, cli: RestorationCLI, problem: InverseProblem
) -> Tiling | None:
    """How an image is cut; None if it is not."""
    if min(problem.image_shape[-2:]) < _smallest_side(cli):
        return None  # one fit, which reports it, instead of one for each tile
    tile = batch.tile
    if tile is None:
        tile = SIMPLE_TILE if is_denoising(cli.datamodule) else TILE
        times = math.prod(problem.image_shape[-2:]) / tile**2
        if times <= MUCH_LARGER or problem.operator.reach() is None:
            return None
    try:
        tiling, _ = problem.split(tile, batch.overlap)
    except ValueError as error:
        if batch.tile is None:
            return None
        raise ValueError(f"{source.path}: {error}") from error
    seconds = None if batch.effort is None else seconds_of(batch.effort.name)
    if batch.tile is None and seconds is not None and seconds < LEAST_SECONDS * len(tiling.regions):
        return None
    return tiling


def _logger(directory: Path) -> str:
    """The option that makes `directory` itself the run directory."""
    settings = {"save_dir": str(directory), "name": "", "version": "", "default_hp_metric": False}
    return "--trainer.logger=" + json.dumps(
        {"class_path": "TensorBoardLogger", "init_args": settings}
    )
