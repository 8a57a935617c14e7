"""The paper's tables and figures (arXiv:1903.10176), as measured on this machine.

    python tests/benchmarks/paper.py denoising --reduced
    python tests/benchmarks/paper.py sr4 --set set14 --config trainer/gpu
    python tests/benchmarks/paper.py deblur_uniform --set set5_grey --reduced --only bm3d red ours
    python tests/benchmarks/paper.py figure3 --reduced
    python tests/benchmarks/paper.py parts --reduced

A table is `deepred-batch` over the whole images of a set, with the methods of `configs/paper`. Its
commands are printed, and its options for the machine and `--section.key=value` may be given here.

The results, a CSV and the table in Markdown, are in `tests/benchmarks/results`; the run directories
stay in `lightning_logs/paper`. The CSV grows image by image. Repeat the command to resume it: rows
of the CSV are not measured again. For other settings, use another --results and --runs. The exit
status is 1 if a method has no result for an image.
"""

import argparse
import csv
import io
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from deepred_pl import metrics
from deepred_pl.batch.main import main as deepred_batch
from deepred_pl.cli import CONFIGS, EXPECTED, reason
from deepred_pl.files import write_bytes
from deepred_pl.images import read_image
from deepred_pl.sources import find_set
from deepred_pl.tiles import Region

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
RUNS = Path("lightning_logs") / "paper"
REDUCED = "paper/reduced"
MASKS = "--data.operator.mask=set:inpainting/{name}_mask"
PACKAGES = ("deepred_pl", "torch", "pytorch-lightning")
DENOISERS = ("bm3d", "scikit-image")  # packages
OWNED = ("--ground_truth", "--images", "--method", "--out", "--overwrite", "--restarts", "--shard")
OWNED += ("--tile",)
CROP = "--data.crop"
GREY = "_grey"  # ends the name of a set whose images are made grey
WEIGHTS = 0.2989, 0.5870, 0.1140  # of red, green and blue in grey
DIP, OURS = "DIP", "DeepRED, ours"  # headings
BEST = f"{DIP}, best*"
TWICE = f"{OURS}, mean of two"  # restarts
COLUMNS = ("image", "method", "psnr", "metric_on", "psnr_inside", "steps", "seconds", "rollbacks")
COLUMNS += ("date", "machine", "threads", *PACKAGES, *DENOISERS, "options")
Curve = list[tuple[int, float]]  # steps and values
Row = dict[str, str]  # of the CSV
Rows = dict[tuple[str, str], Row]  # by image and heading


@dataclass(frozen=True)
class Table:
    """What is compared on which images.

    Attributes:
        title: What the images suffer from.
        configs: The task, and the paper's overlay on it.
        set: The name of the paper's set.
        folder: The folder of the methods' overlays in `configs`.
        before: What is shown of the measurement.
        methods: The heading of each column.
        dip_steps: Steps after which Deep Image Prior's release stops, where it has that task.
        published: By set and image, or "mean", DeepRED's PSNR in the paper (second-hand).
        border: Pixels at each side that a second PSNR leaves out, 0 for none.
        note: What else the reader of the table should know.
    """

    title: str
    configs: tuple[str, ...]
    set: str
    folder: str
    before: str
    methods: dict[str, str]
    dip_steps: int | None = None
    published: dict[tuple[str, str], float] = field(default_factory=dict)
    border: int = 0
    note: str = ""


RELEASED = {"deepred": "DeepRED, released"}
SR = {"red": "RED", "dip": DIP, **RELEASED, "ours": OURS}
SR8 = {"red": "RED", "dip8": DIP, "deepred": "DeepRED, as released for ×4", "ours": OURS}
DEBLURRING = {"bm3d": "BM3D deblurring", "red": "RED", "dip": DIP, **RELEASED, "ours": OURS}
DENOISING = {"nlm": "NLM", "bm3d": "BM3D", "bm3d_declipped": "BM3D, declipped"}
DENOISING |= {"red": "RED", "dip": DIP, "dip_tv": "DIP + TV"}
INPAINTING = {"red": "RED", "dip": DIP, "dip_tv": "DIP + TV", "deepred": OURS}
TABLES = {
    "denoising": Table(
        "Denoising, σ = 25",
        ("denoising", "paper/denoising"),
        "cbm3d9",
        "paper/denoising",
        "noisy",
        {**DENOISING, **RELEASED, "ours": OURS},
        dip_steps=3000,
    ),
    "sr4": Table(
        "Super-resolution ×4",
        ("super_resolution", "paper/sr4"),
        "set5",
        "paper/super_resolution",
        "bicubic",
        SR,
        dip_steps=2000,
        published={("set5", "mean"): 30.72, ("set14", "mean"): 27.63},
        border=4,
    ),
    "sr8": Table(
        "Super-resolution ×8",
        ("super_resolution", "paper/sr8"),
        "set5",
        "paper/super_resolution",
        "bicubic",
        SR8,
        dip_steps=4000,
        published={("set5", "mean"): 26.04, ("set14", "mean"): 24.28},
        border=4,
    ),
    "deblur_uniform": Table(
        "Deblurring, uniform 9×9, noise of σ = √2",
        ("deblurring_uniform", "paper/deblurring"),
        "ncsr",
        "paper/deblurring",
        "blurred",
        DEBLURRING,
        published={("ncsr", "butterfly"): 31.44},
    ),
    "deblur_gaussian": Table(
        "Deblurring, Gaussian 25×25 of width 1.6, noise of σ = √2",
        ("deblurring_gaussian", "paper/deblurring"),
        "ncsr",
        "paper/deblurring",
        "blurred",
        DEBLURRING,
    ),
    "inpainting": Table(
        "Inpainting, the masks of Deep Image Prior",
        ("inpainting",),
        "inpainting",
        "methods",
        "masked",
        INPAINTING,
        note="In vase, an object is to be removed. The true image shows the object, not what is "
        "behind it, so the PSNR says little about the methods.",
    ),
}


PARTS = [  # table, set, image, part
    ("deblur_uniform", "ncsr", "butterfly", Region(20, 90, 90, 90)),
    ("sr4", "set5", "bird", Region(40, 60, 100, 100)),
    ("sr4", "set14", "zebra", Region(70, 330, 120, 120)),
    ("inpainting", "inpainting", "kate", Region(105, 190, 120, 120)),
]


@dataclass(frozen=True)
class Score:
    """What a method made of an image: PSNR in dB, and how long it took."""

    psnr: float
    steps: int
    seconds: float


def main(args: Sequence[str] | None = None) -> None:
    """Run a table or draw a figure, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=[*TABLES, *FIGURES])
    parser.add_argument("--reduced", action="store_true", help=f"the reduced form, {REDUCED}")
    parser.add_argument("--set", help="another set than the paper's first, as set14 for sr4")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="run only these methods")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the run directories go")
    given, options = parser.parse_known_args(args)
    for name in OWNED:
        if any(option.partition("=")[0] == name for option in options):
            parser.error(f"{name} is set by the table; for another comparison use deepred-batch")
    if given.what in FIGURES and (given.set or given.only):
        parser.error("--set and --only are for tables")
    if given.what == "inpainting" and given.set:
        parser.error("inpainting needs masks, which only its own set has; leave out --set")
    if given.only and (unknown := set(given.only) - set(TABLES[given.what].methods)):
        known = ", ".join(f"{m} ({heading})" for m, heading in TABLES[given.what].methods.items())
        parser.error(f"--only expects some of {known}, got {', '.join(sorted(unknown))}")
    if given.what == "parts" and options:
        parser.error(f"parts only reads tables; leave out {shlex.join(options)}")
    given.results.mkdir(parents=True, exist_ok=True)
    if given.what in FIGURES:
        FIGURES[given.what](given, options)
    else:
        table(given, options)


def run(
    task: str, truth: str, methods: Sequence[str], out: Path, reduced: bool, options: Sequence[str]
) -> list[dict[str, str]]:
    """`deepred-batch`, and the rows of its `results.csv`; images that fail have no figures."""
    configs = [*TABLES[task].configs, *(reductions(task) if reduced else [])]
    named = [word for config in configs for word in ("--config", config)]
    named += [word for method in methods for word in ("--method", method)]
    masks = [MASKS] if task == "inpainting" else []
    command = [*named, "--ground_truth", truth, "--out", str(out), *masks, *options]
    print("deepred-batch", *command, file=sys.stderr)
    try:
        deepred_batch(command)
    except SystemExit as end:
        if end.code != 1:  # a mistake; 1 is for images that failed
            raise
    with (out / "results.csv").open(newline="") as rows:
        return list(csv.DictReader(rows))


def reductions(task: str) -> list[str]:
    """The configurations of a task's reduced form: `REDUCED`, and one of its methods' folder."""
    own = f"{TABLES[task].folder}/reduced"
    return [REDUCED, *([own] if (CONFIGS / f"{own}.yaml").exists() else [])]


def curve(directory: Path, name: str) -> Curve:
    """A curve of a run, empty where it was too short; Lightning counts its steps from 0."""
    events = EventAccumulator(str(directory))
    events.Reload()
    tag = f"curves/{name}"
    known = tag in events.Tags()["scalars"]
    return [(e.step + 1, e.value) for e in events.Scalars(tag)] if known else []


def images_of(of_set: str, runs: Path) -> dict[str, str]:
    """The files of a set by image; of its grey form, converted copies."""
    files = find_set(f"set:{of_set.removesuffix(GREY)}")
    if not of_set.endswith(GREY):
        return {path.stem: str(path) for path in files}
    made = {}
    (runs / of_set).mkdir(parents=True, exist_ok=True)
    for path in files:
        colours = np.asarray(Image.open(path).convert("RGB"))
        grey = (colours @ np.array(WEIGHTS)).round().astype(np.uint8)
        made[path.stem] = str(runs / of_set / f"{path.stem}.png")
        Image.fromarray(grey).save(made[path.stem])
    return made


def table(given: argparse.Namespace, options: Sequence[str]) -> None:
    """Run what a table lacks, image by image, and write it as CSV and Markdown."""
    what = TABLES[given.what]
    of_set = given.set or what.set
    name = f"{given.what}_{of_set}" + ("_reduced" if given.reduced else "")
    out, written = given.runs / name, given.results / f"{name}.csv"
    sources = images_of(of_set, given.runs)
    rows = read(written)
    these = settings(options)
    for row in rows.values():
        if settings(shlex.split(row["options"])) != these:
            sys.exit(
                f"expected results with the same settings in {written}, got those of "
                f"{row['options'] or 'no options'}; use another --results and --runs"
            )
    last = {m: TWICE if heading == OURS else heading for m, heading in what.methods.items()}
    if given.only:
        last = {m: heading for m, heading in last.items() if m in given.only}
    if all((image, heading) in rows for image in sources for heading in last.values()):
        again = "to measure them again, use another --results and --runs"
        print(f"nothing to run, {written} has all results; {again}", file=sys.stderr)

    def save() -> str:  # after each image, so that a stop loses nothing
        text = page(given, list(sources), rows, last.values())
        write_bytes(written.with_suffix(".md"), text.encode())
        return text

    for image, source in sources.items():
        missing = [m for m in last if (image, last[m]) not in rows]
        once = [m for m in missing if last[m] != TWICE]
        twice = [m for m in missing if last[m] == TWICE]
        for methods, more in ((once, []), (twice, ["--restarts=2"])):
            if methods:
                paths = [m if m == "deepred" else f"{what.folder}/{m}" for m in methods]
                done = run(given.what, source, paths, out, given.reduced, [*options, *more])
                rows |= rows_of(what, done, out, source, shlex.join(options))
                write(written, rows)
                save()
    if not rows:
        sys.exit(f"expected restored images, got none; {out / 'summary.md'} says why")
    print(save(), end="")
    if any((image, heading) not in rows for image in sources for heading in last.values()):
        sys.exit(1)


def page(given: argparse.Namespace, images: Sequence[str], rows: Rows, asked: Iterable[str]) -> str:
    """A table as a page of Markdown, with the columns that have rows or are `asked` for."""
    what = TABLES[given.what]
    of_set = given.set or what.set
    columns = [what.before]
    for heading in what.methods.values():
        columns += [heading, *({DIP: [BEST], OURS: [TWICE]}.get(heading, []))]
    shown = {heading for _, heading in rows} | set(asked)
    columns = [heading for heading in columns if heading in shown]
    part = cropped(rows)
    published = {} if part else of_paper(what, of_set)
    title = f"# {what.title}, {of_set}" + (f", crops ({part} pixels)" if part else "")
    lines = [
        title + (", networks of 32 channels" if given.reduced else ""),
        "",
        about(rows.values()),
        "",
        *commands(given, what, rows),
        "",
        *markdown(images, columns, rows, published),
        *remarks(what, bool(published), rows, given.reduced),
    ]
    return "\n".join(lines) + "\n"


def commands(given: argparse.Namespace, what: Table, rows: Rows) -> list[str]:
    """The commands that measured the rows, indented for Markdown; several if options differ."""
    found = []
    for options in dict.fromkeys(row["options"] for row in rows.values()):
        of_these = {heading for (_, heading), row in rows.items() if row["options"] == options}
        methods = [method for method, heading in what.methods.items() if heading in of_these]
        words = [given.what, *(["--set", given.set] if given.set else [])]
        words += ["--only", *methods] if len(methods) < len(what.methods) else []
        words += ["--reduced"] if given.reduced else []
        command = shlex.join(["python", "tests/benchmarks/paper.py", *words])
        found.append(f"    {command} {options}".rstrip())
    return found


def settings(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configurations and other options that are not about the machine."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--config", action="append", default=[])
    for name in ("--gpus", "--ray", "--threads", "--workers"):
        parser.add_argument(name)
    known, rest = parser.parse_known_args(list(options))
    pairs = [word.split("=", 1) if word.startswith("--") else [word] for word in rest]
    configs = [config for config in known.config if not config.startswith("trainer/")]
    return configs, list(chain.from_iterable(pairs))


def cropped(rows: Rows) -> str | None:
    """What part of each image was restored, if not the whole; all rows have the same settings."""
    for row in rows.values():
        _, words = settings(shlex.split(row["options"]))
        return words[words.index(CROP) + 1] if CROP in words else None
    return None


def read(path: Path) -> Rows:
    """The rows of a table's CSV; none if there is no such file yet."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["image"], row["method"]): row for row in csv.DictReader(file)}


def write(path: Path, rows: Rows) -> None:
    """Write a table's CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    write_bytes(path, text.getvalue().encode())


def rows_of(
    what: Table, found: Sequence[dict[str, str]], out: Path, truth: str, options: str
) -> Rows:
    """The rows of finished runs in the CSV, by image and heading."""
    rows: Rows = {}
    for result in found:
        if not result["psnr_restored"]:
            continue
        directory = out / result["directory"]
        kept = ("image", "metric_on", "rollbacks", "threads", *PACKAGES)
        common = {name: result[name] for name in kept}
        common |= {"date": measured(directory).isoformat(), "machine": machine()}
        common |= {package: version(package) for package in DENOISERS} | {"options": options}
        for heading, score in scores_of(what, result, directory).items():
            figures = {"psnr": f"{score.psnr:.4f}", "steps": str(score.steps)}
            figures["seconds"] = f"{score.seconds:.1f}"
            if what.border and score.steps == int(result["steps"]):  # is the restored image
                (restored,) = directory.glob("restored.*")  # of a restart in floats
                inside = psnr_inside(restored, truth, what.border)
                figures["psnr_inside"] = f"{inside:.4f}"
            rows[result["image"], heading] = {"method": heading, **figures, **common}
    return rows


def scores_of(what: Table, result: dict[str, str], directory: Path) -> dict[str, Score]:
    """The scores of a run, by heading.

    Deep Image Prior's release stops early, so its result is the PSNR at that step (with seconds in
    proportion); next to it is the best PSNR of the fit, which only the true image reveals. Of two
    restarts, the first and the mean image are scored.
    """
    if result["restart"] == "1":
        return {}
    heading = TWICE if result["restart"] == "mean" else what.methods[result["method"]]
    steps, seconds = int(result["steps"]), float(result["seconds"])
    end = float(result["psnr_restored"])
    scores = {what.before: Score(float(result["psnr_measurement"]), 0, 0.0)}
    if heading != DIP:
        return scores | {heading: Score(end, steps, seconds)}
    points = curve(directory, "psnr_average")
    until = what.dip_steps or steps
    stop, stopped = (steps, end) if steps <= until else max(p for p in points if p[0] <= until)
    best, at = max((psnr, step) for step, psnr in [*points, (steps, end)])
    scores[DIP] = Score(stopped, stop, seconds * stop / steps)
    return scores | {BEST: Score(best, at, 0.0)}  # the same fit


def psnr_inside(restored: Path, truth_path: str, border: int) -> float:
    """PSNR on luminance without a border; a grey image counts as one of equal channels.

    Close to how the authors of Deep Image Prior scored their tables, with a border of 4 (5 at the
    right and the bottom) and without rounding: `super-resolution_eval_script.py` of their release.
    """
    image, truth = read_image(restored)[0], read_image(truth_path)[0]
    height, width = image.shape[-2:]
    truth = centre(truth, height, width)
    part = Region(border, border, height - 2 * border, width - 2 * border)
    image, truth = (part.of(whole).expand(-1, 3, -1, -1) for whole in (image, truth))
    return metrics.psnr(image, truth, on="luminance").item()


def centre(image: Tensor, height: int, width: int) -> Tensor:
    """The central height × width pixels of an image, to which a table crops the true image."""
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return Region(top, left, height, width).of(image)


def of_paper(what: Table, of_set: str) -> dict[str, float]:
    """DeepRED's PSNR in the paper by image, and "mean"."""
    return {image: psnr for (s, image), psnr in what.published.items() if s == of_set}


def about(rows: Iterable[Row]) -> str:
    """When, where and with what the rows were measured."""

    def all_of(name: str) -> str:
        return ", ".join(sorted({row[name] for row in rows}))

    rows = list(rows)
    versions = ", ".join(f"{package} {all_of(package)}" for package in (*PACKAGES, *DENOISERS))
    mean_of = {row["image"] for row in rows if row["method"] == TWICE}  # has the first restart's
    fits = [row for row in rows if row["method"] != OURS or row["image"] not in mean_of]
    minutes = sum(float(row["seconds"]) for row in fits) / 60
    return (
        f"PSNR in dB, {all_of('date')}, {all_of('machine')}, threads of a fit: "
        f"{all_of('threads')}; {versions}; {minutes:.0f} minutes, summed over the fits."
    )


def markdown(
    images: Sequence[str], columns: Sequence[str], rows: Rows, published: dict[str, float]
) -> list[str]:
    """The table, with the means over the images that all methods restored."""
    header = ["image", *columns, *(["published†"] if published else [])]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    complete = [i for i in images if all((i, c) in rows for c in columns)]

    def line(name: str, cells: Sequence[str], of_paper: float | None, strong: str = "") -> str:
        more = ["" if of_paper is None else f"{of_paper:.2f}"] if published else []
        texts = [f"{strong}{text}{strong}" if text else "" for text in (name, *cells, *more)]
        return "| " + " | ".join(texts) + " |"

    for image in images:
        known = [rows.get((image, column)) for column in columns]
        cells = [f"{float(row['psnr']):.2f}" if row else "" for row in known]
        lines.append(line(image, cells, published.get(image)))
    if complete:

        def means(name: str) -> list[float]:
            return [mean(float(rows[i, c][name]) for i in complete) for c in columns]

        whole = len(complete) == len(images)
        name = "mean" if whole else f"mean of {len(complete)}"
        cells = [f"{psnr:.2f}" for psnr in means("psnr")]
        lines.append(line(name, cells, published.get("mean") if whole else None, strong="**"))
        scored = [i for i in complete if any(rows[i, c].get("psnr_inside") for c in columns)]
        if scored:
            inside = [[rows[i, c].get("psnr_inside") for i in scored] for c in columns]
            cells = [f"{mean(map(float, known)):.2f}" if all(known) else "" for known in inside]
            name = "mean" if len(scored) == len(images) else f"mean of {len(scored)}"
            lines.append(line(f"{name} inside‡", cells, None))
        cells = [f"{seconds:.0f}" if seconds >= 1 else "" for seconds in means("seconds")]
        lines.append(line("seconds per image", cells, None))
    counts = []
    for column in columns:
        steps = sorted(int(rows[i, column]["steps"]) for i in images if (i, column) in rows)
        if steps and steps[-1] > 1:
            more = f" to {steps[-1]}" if steps[-1] > steps[0] else ""
            counts.append(f"{column} {steps[0]}{more}")
    if counts:
        lines += ["", f"Steps: {'; '.join(counts)}."]
    lacking: dict[tuple[str, ...], list[str]] = {}  # images by the columns that they lack
    for image in images:
        missing = tuple(column for column in columns if (image, column) not in rows)
        if missing:
            lacking.setdefault(missing, []).append(image)
    named = [
        ", ".join(of_these) + (f" (by {'; '.join(missing)})" if len(missing) < len(columns) else "")
        for missing, of_these in lacking.items()
    ]
    if named:
        lines += ["", f"Failed, not run, or without a finite PSNR: {'; '.join(named)}."]
    if BEST in columns:
        lines += ["", "\\* At its best step, which only the true image reveals: an oracle."]
    return lines


def remarks(what: Table, published: bool, rows: Rows, reduced: bool) -> list[str]:
    """Notes below a table."""
    lines = ["", what.note] if what.note else []
    if published:
        lines += ["", "† DeepRED in the paper, second-hand, not verified."]
    if any(row.get("psnr_inside") for row in rows.values()):
        text = f"‡ Without {what.border} pixels at each side, and with grey images scored on the "
        text += "range of luminance: close to how Deep Image Prior's tables were scored."
        lines += ["", text]
    on: dict[str, dict[str, None]] = {}
    for row in rows.values():
        on.setdefault(row["metric_on"], {})[row["image"]] = None
    for metric, images in on.items():
        lines += ["", f"PSNR on {metric}: {', '.join(images)}."]
    headings = {heading for _, heading in rows}
    if what.dip_steps and DIP in headings:
        lines += ["", f"The release of DIP stops after {what.dip_steps} steps."]
    if reduced and what.folder != "methods":
        shortened = (*RELEASED, "dip", "dip8", "dip_tv")
        names = [h for m, h in what.methods.items() if m in shortened and h in headings]
        if names:
            lines += ["", f"Fewer channels and steps than published: {', '.join(names)}."]
        if what.before == "bicubic" and what.methods["deepred"] in headings:
            lines[-1] += " DeepRED's BM3D is called every 40 steps instead of 10."
    fits = {*what.methods.values(), TWICE}
    back = [f"{i}, {h}" for (i, h), row in rows.items() if h in fits and int(row["rollbacks"])]
    if back:
        lines += ["", f"Rolled back by the guard after a collapse: {'; '.join(back)}."]
    return lines


def measured(directory: Path) -> date:
    """The day on which a run ended."""
    return date.fromtimestamp((directory / "result.json").stat().st_mtime)


def machine() -> str:
    """What it runs on, in words."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return gpu + processor


def figure3(given: argparse.Namespace, options: Sequence[str]) -> None:
    """Objective, gap and PSNR of `head` of Set5 against the steps, denoised and enlarged."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")
    form = "_reduced" if given.reduced else ""
    figure.suptitle("head of Set5" + (", networks of 32 channels" if given.reduced else ""))
    for row, task in zip(axes, ("denoising", "sr4"), strict=True):
        out = given.runs / f"figure3_{task}{form}"  # with other steps than the table's
        methods = [f"{TABLES[task].folder}/dip", "deepred"]
        run(task, "set:set5/head", methods, out, given.reduced, options)
        directories = {"DeepRED": out / "head" / "deepred", "DIP": out / "head" / "dip"}
        average = {name: curve(path, "psnr_average") for name, path in directories.items()}
        on = "luminance" if task == "sr4" else "RGB"
        for axis, title, curves in zip(
            row,
            ("objective, squared grey levels", "gap ‖x − T_θ(z)‖", f"average, PSNR on {on}, dB"),
            (
                {"DeepRED": curve(directories["DeepRED"], "objective")},
                {"DeepRED": curve(directories["DeepRED"], "gap")},
                average,
            ),
            strict=True,
        ):
            draw(axis, f"{TABLES[task].title}: {title}", curves, log=curves is not average)
        for name, points in average.items():
            best, at = max((psnr, step) for step, psnr in points)
            end, last = points[-1]
            text = f"best {best:.2f} dB at step {at}, {last:.2f} dB at step {end}"
            print(f"{TABLES[task].title}, {name}: {text}")
    path = given.results / f"figure3{form}.png"
    figure.savefig(path, dpi=110)
    print(path)


def draw(axis: "Axes", title: str, curves: dict[str, Curve], log: bool) -> None:
    """Curves against the steps."""
    styles = {"DeepRED": ("tab:blue", "-"), "DIP": ("tab:orange", "--")}
    for name, points in curves.items():
        if not points:
            raise ValueError(
                f"expected a curve of {name}, got none: the fit failed, or is shorter than "
                "--trainer.log_every_n_steps (20); see run.log in its directory"
            )
        colour, line = styles[name]
        axis.plot(*zip(*points, strict=True), label=name, color=colour, linestyle=line)
    if log:
        axis.set_yscale("log")
    else:
        axis.legend()
    axis.set_xlabel("θ-steps")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)


def parts(given: argparse.Namespace, options: Sequence[str]) -> None:
    """Draw an enlarged part of each image in `PARTS`, by RED, DIP and ours, and of the true image.

    Each is a file of its own. Methods that the table lacks are left out, and images without run
    directories here, or of which only a crop was restored, are skipped.
    """
    form = "_reduced" if given.reduced else ""
    drawn = []
    for task, of_set, image, part in PARTS:
        what, name = TABLES[task], f"{task}_{of_set}{form}"
        rows = read(given.results / f"{name}.csv")
        methods = {heading: method for method, heading in what.methods.items()}
        methods |= {TWICE: methods[OURS]}  # the mean image is in the method's directory
        shown = [h for h in ("RED", DIP, TWICE) if (image, h) in rows]
        files = [given.runs / name / image / methods[h] / "restored.png" for h in shown]
        if cropped(rows):
            print(f"skipped {image} of {name}: the table is of crops", file=sys.stderr)
        elif TWICE in shown and all(file.exists() for file in files):
            titles = [f"{h}, {float(rows[image, h]['psnr']):.2f} dB" for h in shown]
            drawn.append(given.results / f"{name}_{image}.png")
            draw_parts(drawn[-1], titles, files, images_of(of_set, given.runs)[image], part)
            print(drawn[-1])
        else:
            print(f"skipped {image} of {name}: not all of its runs are here", file=sys.stderr)
    if not drawn:
        sys.exit(
            "expected an image to draw, got none, for the reasons above; compute one of these "
            "tables, of whole images, with the same --results and --runs"
        )


def draw_parts(
    path: Path, titles: Sequence[str], files: Sequence[Path], truth_path: str, part: Region
) -> None:
    """Write a row of parts of images, the true image last."""
    import matplotlib.pyplot as plt

    images = [read_image(file)[0] for file in files]
    truth = read_image(truth_path)[0]
    images.append(centre(truth, *images[0].shape[-2:]))
    size = 2.5 * len(images), 2.8
    figure, axes = plt.subplots(1, len(images), figsize=size, layout="constrained")
    for axis, title, image in zip(axes, [*titles, "true image"], images, strict=True):
        shown = part.of(image)[0].movedim(0, -1).squeeze(-1)
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


FIGURES = {"figure3": figure3, "parts": parts}

if __name__ == "__main__":
    try:
        main()
    except EXPECTED as error:
        sys.exit(f"paper.py: error: {reason(error)}")
