"""The paper's tables and its Figure 3 (arXiv:1903.10176), as measured on this machine.

    python tests/benchmarks/paper.py denoising --quick
    python tests/benchmarks/paper.py sr4 --set set14 --config trainer/gpu
    python tests/benchmarks/paper.py figure3 --quick

A table is `deepred-batch` over a set with the methods of `configs/paper`: that command is printed,
and its options for the machine and `--section.key=value` may be given here. Repeat the command to
resume it. The table in Markdown, and a CSV, go to `tests/benchmarks/results`; the run directories
stay in `lightning_logs/paper`.
"""

import argparse
import csv
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepred_pl.batch.main import main as deepred_batch
from deepred_pl.cli import CONFIGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
RUNS = Path("lightning_logs") / "paper"
QUICK = "paper/quick"
PACKAGES = ("deepred_pl", "torch", "pytorch-lightning")
DENOISERS = ("bm3d", "scikit-image")  # packages
OWNED = ("--ground_truth", "--images", "--method", "--out", "--restarts", "--shard", "--tile")
REDUCED = ("dip", "dip8", "dip_tv", "deepred")  # methods whose steps and network are the task's
DIP = "DIP"  # the column beside which its best is shown
BEST = f"{DIP}, best*"
Curve = list[tuple[int, float]]  # steps and values


@dataclass(frozen=True)
class Table:
    """What is compared on which images.

    Attributes:
        title: What the images suffer from.
        configs: The task, and the paper's overlay on it.
        set: The name of the paper's set.
        folder: Of the methods, in `configs/paper`.
        before: What is shown of the measurement.
        methods: The heading of each column.
        dip_steps: Steps after which Deep Image Prior's release stops, where it has that task.
        published: By set and image, or "mean", DeepRED's PSNR in the paper (second-hand).
    """

    title: str
    configs: tuple[str, ...]
    set: str
    folder: str
    before: str
    methods: dict[str, str]
    dip_steps: int | None = None
    published: dict[tuple[str, str], float] = field(default_factory=dict)


DEEPRED = {"deepred": "DeepRED, released", "ours": "DeepRED, ours"}
SR = {"red": "RED", "dip": DIP, **DEEPRED}
SR8 = {"red": "RED", "dip8": DIP, "deepred": "DeepRED, as released for ×4", "ours": "DeepRED, ours"}
DEBLURRING = {"bm3d": "BM3D deblurring", "red": "RED", "dip": DIP, **DEEPRED}
TABLES = {
    "denoising": Table(
        "Denoising, σ = 25",
        ("denoising", "paper/denoising"),
        "cbm3d9",
        "denoising",
        "noisy",
        {"nlm": "NLM", "bm3d": "BM3D", "red": "RED", "dip": DIP, "dip_tv": "DIP + TV", **DEEPRED},
        dip_steps=3000,
    ),
    "sr4": Table(
        "Super-resolution ×4",
        ("super_resolution", "paper/sr4"),
        "set5",
        "super_resolution",
        "bicubic",
        SR,
        dip_steps=2000,
        published={("set5", "mean"): 30.72, ("set14", "mean"): 27.63},
    ),
    "sr8": Table(
        "Super-resolution ×8",
        ("super_resolution", "paper/sr8"),
        "set5",
        "super_resolution",
        "bicubic",
        SR8,
        dip_steps=4000,
        published={("set5", "mean"): 26.04, ("set14", "mean"): 24.28},
    ),
    "deblur_uniform": Table(
        "Deblurring, uniform 9×9, noise of σ = √2",
        ("deblurring_uniform", "paper/deblurring"),
        "ncsr",
        "deblurring",
        "blurred",
        DEBLURRING,
        published={("ncsr", "butterfly"): 31.44},
    ),
    "deblur_gaussian": Table(
        "Deblurring, Gaussian 25×25 of width 1.6, noise of σ = √2",
        ("deblurring_gaussian", "paper/deblurring"),
        "ncsr",
        "deblurring",
        "blurred",
        DEBLURRING,
    ),
}


@dataclass(frozen=True)
class Score:
    """What a method made of an image: PSNR in dB, and how long it took."""

    psnr: float
    steps: int
    seconds: float


def main(args: Sequence[str] | None = None) -> None:
    """Run a table, or Figure 3, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=[*TABLES, "figure3"])
    parser.add_argument("--quick", action="store_true", help=f"the reduced form, {QUICK}")
    parser.add_argument("--set", help="another set than the paper's first, as set14 for sr4")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the run directories go")
    given, options = parser.parse_known_args(args)
    for name in OWNED:
        if any(option.partition("=")[0] == name for option in options):
            parser.error(f"{name} is set by the table; for another comparison use deepred-batch")
    if given.what == "figure3" and given.set:
        parser.error("--set is for tables; Figure 3 is of head of Set5")
    command = ["python", "tests/benchmarks/paper.py", *(sys.argv[1:] if args is None else args)]
    given.results.mkdir(parents=True, exist_ok=True)
    if given.what == "figure3":
        figure3(given, options)
    else:
        table(TABLES[given.what], given, options, shlex.join(command))


def run(
    task: str, truth: str, methods: Sequence[str], out: Path, quick: bool, options: Sequence[str]
) -> list[dict[str, str]]:
    """`deepred-batch`, and the rows of its `results.csv`; images that fail have no figures."""
    configs = [*TABLES[task].configs, *(reductions(task) if quick else [])]
    named = [word for config in configs for word in ("--config", config)]
    named += [word for method in methods for word in ("--method", method)]
    command = [*named, "--ground_truth", truth, "--out", str(out), *options]
    print("deepred-batch", *command, file=sys.stderr)
    try:
        deepred_batch(command)
    except SystemExit as end:
        if end.code != 1:  # a mistake; 1 is for images that failed
            raise
    with (out / "results.csv").open(newline="") as rows:
        return list(csv.DictReader(rows))


def reductions(task: str) -> list[str]:
    """The configurations of a task's reduced form: `QUICK`, and one of its methods' folder."""
    own = f"paper/{TABLES[task].folder}/quick"
    return [QUICK, *([own] if (CONFIGS / f"{own}.yaml").exists() else [])]


def curve(directory: Path, name: str) -> Curve:
    """A curve of a run, empty where it was too short; Lightning counts its steps from 0."""
    events = EventAccumulator(str(directory))
    events.Reload()
    tag = f"curves/{name}"
    known = tag in events.Tags()["scalars"]
    return [(e.step + 1, e.value) for e in events.Scalars(tag)] if known else []


def table(what: Table, given: argparse.Namespace, options: Sequence[str], command: str) -> None:
    """Run a table, print it, and write it as CSV and Markdown."""
    of_set = given.set or what.set
    name = f"{given.what}_{of_set}" + ("_quick" if given.quick else "")
    methods = [m if m == "deepred" else f"paper/{what.folder}/{m}" for m in what.methods]
    out = given.runs / name
    rows = run(given.what, f"set:{of_set}", methods, out, given.quick, options)
    done = [row for row in rows if row["psnr_restored"]]
    if not done:
        sys.exit(f"expected restored images, got none; {out / 'summary.md'} says why")
    columns, scores = columns_of(what, done, out)
    images = list(dict.fromkeys(row["image"] for row in rows))
    minutes = sum(float(row["seconds"]) for row in done) / 60
    about = {
        "date": max(measured(out / row["directory"]) for row in done).isoformat(),
        "machine": machine(),
        "threads": ", ".join(sorted({row["threads"] for row in done})),
        **{package: ", ".join(sorted({row[package] for row in done})) for package in PACKAGES},
        **{package: version(package) for package in DENOISERS},
    }
    versions = ", ".join(f"{package} {about[package]}" for package in (*PACKAGES, *DENOISERS))
    form = f", reduced by {' and '.join(reductions(given.what))}" if given.quick else ""
    lines = [
        f"# {what.title}, {of_set}{form}",
        "",
        f"PSNR in dB, {about['date']}, {about['machine']}, threads of a fit: {about['threads']}; "
        f"{versions}; {minutes:.0f} minutes, summed over the fits.",
        "",
        f"    {command}",
        "",
        *markdown(images, columns, scores, {} if given.quick else of_paper(what, of_set)),
        *remarks(what, of_set, done, given.quick),
    ]
    (given.results / f"{name}.md").write_text("\n".join(lines) + "\n")
    with (given.results / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "method", "psnr", "steps", "seconds", *about])
        for (image, column), score in scores.items():
            seconds = f"{score.seconds:.1f}"
            writer.writerow(
                [image, column, f"{score.psnr:.4f}", score.steps, seconds, *about.values()]
            )
    print("\n".join(lines))


def columns_of(
    what: Table, rows: Sequence[dict[str, str]], out: Path
) -> tuple[list[str], dict[tuple[str, str], Score]]:
    """The headings of the columns, and by image and heading what is there.

    Deep Image Prior's release stops early, so that the fit's PSNR then is its result (and its
    seconds in proportion); beside it is the fit's best, which only the true image tells.
    """
    columns = [what.before]
    for heading in what.methods.values():
        columns += [heading, BEST] if heading == DIP else [heading]
    scores: dict[tuple[str, str], Score] = {}
    for row in rows:
        image, heading = row["image"], what.methods[row["method"]]
        steps, seconds = int(row["steps"]), float(row["seconds"])
        scores[image, what.before] = Score(float(row["psnr_measurement"]), 0, 0.0)
        end = float(row["psnr_restored"])
        if heading != DIP:
            scores[image, heading] = Score(end, steps, seconds)
            continue
        points = curve(out / row["directory"], "psnr_average")
        until = what.dip_steps or steps
        stop, stopped = (steps, end) if steps <= until else max(p for p in points if p[0] <= until)
        scores[image, heading] = Score(stopped, stop, seconds * stop / steps)
        best, at = max((psnr, step) for step, psnr in [*points, (steps, end)])
        scores[image, BEST] = Score(best, at, 0.0)  # the same fit
    return columns, scores


def of_paper(what: Table, of_set: str) -> dict[str, float]:
    """DeepRED's PSNR in the paper by image, and "mean"."""
    return {image: psnr for (s, image), psnr in what.published.items() if s == of_set}


def markdown(
    images: Sequence[str],
    columns: Sequence[str],
    scores: dict[tuple[str, str], Score],
    published: dict[str, float],
) -> list[str]:
    """The table, with the mean over the images that all methods restored."""
    header = ["image", *columns, *(["published†"] if published else [])]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    complete = [i for i in images if all((i, c) in scores for c in columns)]

    def line(name: str, cells: Sequence[str], of_paper: float | None, strong: str = "") -> str:
        more = ["" if of_paper is None else str(of_paper)] if published else []
        texts = [f"{strong}{text}{strong}" if text else "" for text in (name, *cells, *more)]
        return "| " + " | ".join(texts) + " |"

    for image in images:
        known = [scores.get((image, column)) for column in columns]
        cells = [f"{score.psnr:.2f}" if score else "" for score in known]
        lines.append(line(image, cells, published.get(image)))
    if complete:
        means = [f"{mean(scores[i, c].psnr for i in complete):.2f}" for c in columns]
        whole = len(complete) == len(images)
        name = "mean" if whole else f"mean of {len(complete)}"
        lines.append(line(name, means, published.get("mean") if whole else None, strong="**"))
    told = []
    for column in columns:
        steps = sorted(scores[i, column].steps for i in images if (i, column) in scores)
        if steps and steps[-1] > 1:
            more = f" to {steps[-1]}" if steps[-1] > steps[0] else ""
            told.append(f"{column} {steps[0]}{more}")
    lines += ["", f"Steps: {'; '.join(told)}."]
    if BEST in columns:
        lines += ["", "\\* At its best step, which only the true image reveals: an oracle."]
    return lines


def remarks(what: Table, of_set: str, rows: Sequence[dict[str, str]], quick: bool) -> list[str]:
    """What is to be known beside a table."""
    published = [f"{image} {psnr}" for image, psnr in of_paper(what, of_set).items()]
    lines = []
    if published:
        lines += [
            "",
            f"{'' if quick else '† '}DeepRED in the paper (second-hand), on whole images with "
            f"the full network, a soft target: {', '.join(published)} dB.",
        ]
    for metric in sorted({row["metric_on"] for row in rows}):
        of_metric = dict.fromkeys(row["image"] for row in rows if row["metric_on"] == metric)
        lines += ["", f"PSNR on {metric}: {', '.join(of_metric)}."]
    if what.dip_steps:
        lines += ["", f"The release of DIP stops after {what.dip_steps} steps."]
    if quick:
        reduced = [what.methods[method] for method in REDUCED if method in what.methods]
        lines += [
            "",
            f"Fewer channels and steps than published: {', '.join(reduced)}; the other methods "
            "only have smaller images. Do not compare with published figures.",
        ]
    back = [
        f"{row['image']}, {what.methods[row['method']]}" for row in rows if int(row["rollbacks"])
    ]
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
    form = "_quick" if given.quick else ""
    figure.suptitle("head of Set5" + (f", reduced by {QUICK}" if given.quick else ""))
    for row, task in zip(axes, ("denoising", "sr4"), strict=True):
        out = given.runs / f"figure3_{task}{form}"
        methods = [f"paper/{TABLES[task].folder}/dip", "deepred"]
        run(task, "set:set5/head", methods, out, given.quick, options)
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
            end = f"at the end {points[-1][1]:.2f} dB"
            print(f"{TABLES[task].title}, {name}: best {best:.2f} dB at step {at}, {end}")
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


if __name__ == "__main__":
    main()
