"""The tables of a batch, `results.csv` and `summary.md`, from its run directories."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from deepred_pl.batch.jobs import Job
from deepred_pl.files import read_json, write_bytes

COLUMNS = (
    *("image", "method", "restart", "seed"),
    *("psnr_measurement", "psnr_restored", "ssim_measurement", "ssim_restored", "metric_on"),
    *("noise_sigma", "residual_to_sigma", "steps", "seconds", "stop_reason", "rollbacks"),
    *("threads", "host", "deepred_pl", "torch", "pytorch-lightning"),
    *("directory", "error"),
)

Row = dict[str, Any]


def rows_of(jobs: Iterable[Job], failures: Mapping[Path, str], root: Path) -> list[Row]:
    """One row per image, method and restart, and one for the mean of several restarts.

    Args:
        jobs: The jobs of a batch, one per image and method.
        failures: The reasons of failed jobs, or of their parts, by run directory.
        root: The batch's directory.
    """
    rows = []
    for job in jobs:
        restarts = () if job.tiling else job.parts
        rows += [_row(part, failures, root) for part in restarts]
        rows.append(_row(job, failures, root))
    return rows


def _row(job: Job, failures: Mapping[Path, str], root: Path) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    row |= {name: job.about[name] for name in ("image", "method", "restart")}
    row["directory"] = job.directory.relative_to(root).as_posix()
    result = job.result
    if result is None:
        reasons = [
            f"{fit.directory.relative_to(job.directory)}: {failures[fit.directory]}".removeprefix(
                ".: "
            )
            for fit in job.fits
            if fit.directory in failures
        ]
        row["error"] = failures.get(job.directory) or "; ".join(reasons) or "not done"
        return row
    for metric in ("psnr", "ssim"):
        for name in ("measurement", "restored"):
            row[f"{metric}_{name}"] = result[metric][name]
    row |= {name: result[name] for name in COLUMNS if name in result}
    began = read_json(job.fits[0].directory / "job.json") or {}
    row |= began.get("machine", {})
    return row


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, in full digits."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def summary(rows: Sequence[Row]) -> str:
    """The results of a batch in Markdown."""
    done = [row for row in rows if not row["error"]]
    failed = [row for row in rows if row["error"]]
    single = [row for row in done if row["restart"] != "mean"]
    lines = ["# Restored images", ""]
    images = {row["image"] for row in rows}
    minutes = sum(row["seconds"] for row in single) / 60
    lines += [f"Images: {len(images)}. Fits done: {len(single)}, in {minutes:.1f} minutes of work."]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    scored = [row for row in done if row["psnr_restored"] is not None]
    if scored:
        lines += _scores(scored, methods)
    elif done:
        lines += ["", "| image | noise σ | steps | seconds | stopped by |", "|---|---|---|---|---|"]
        lines += [
            f"| {_name(row)} | {_number(row['noise_sigma'])} | {row['steps']} "
            f"| {row['seconds']:.0f} | {row['stop_reason']} |"
            for row in done
        ]
    if failed:
        lines += ["", "## Not restored", ""]
        lines += [f"- {_name(row)}: {row['error']}" for row in failed]
    return "\n".join(lines) + "\n"


def _scores(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """A table per metric, and the methods' differences; means are over the same images."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["image"], row["method"]), []).append(row)
    images = dict.fromkeys(row["image"] for row in rows)
    complete = [i for i in images if all((i, method) in groups for method in methods)]
    on = ", ".join(sorted({row["metric_on"] for row in rows}))
    lines = []
    for metric, unit, digits in (("psnr", ", dB", 2), ("ssim", "", 4)):
        before, after = f"{metric}_measurement", f"{metric}_restored"
        lines += ["", f"## {metric.upper()}{unit} ({on})", ""]
        lines.append(
            "| image | measurement | " + " | ".join(m or "restored" for m in methods) + " |"
        )
        lines.append("|---" * (2 + len(methods)) + "|")
        for image in images:
            of_image = [groups.get((image, method), []) for method in methods]
            measured = next(group[0][before] for group in of_image if group)
            cells = [_number(measured, digits), *(_cell(g, after, digits) for g in of_image)]
            lines.append(f"| {image} | " + " | ".join(cells) + " |")
        columns = [[groups[i, methods[0]][0][before] for i in complete]]
        columns += [[_mean(groups[i, m], after) for i in complete] for m in methods]
        means = [_known(column) for column in columns]
        cells = [f"**{mean(values):.{digits}f}**" if values else "" for values in means]
        lines.append(f"| **mean of {len(complete)}** | " + " | ".join(cells) + " |")
    if len(methods) > 1:
        lines += ["", f"PSNR less that of {methods[0]}, image by image:", ""]
        for method in methods[1:]:
            gains = [
                _mean(groups[i, method], "psnr_restored")
                - _mean(groups[i, methods[0]], "psnr_restored")
                for i in complete
            ]
            lines.append(f"- {method}: {_gain(_known(gains))}")
    return lines


def _cell(group: Sequence[Row], name: str, digits: int) -> str:
    """A value; of several restarts mean ± standard deviation, and that of their mean image."""
    values = _known([row[name] for row in group if row["restart"] != "mean"])
    averaged = _known([row[name] for row in group if row["restart"] == "mean"])
    if len(values) < 2:
        return _number(values[0], digits) if values else ""
    text = f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"
    return text + (f" (their mean image {averaged[0]:.{digits}f})" if averaged else "")


def _mean(group: Sequence[Row], name: str) -> float:
    """The mean over restarts; NaN if it is not known."""
    values = _known([row[name] for row in group if row["restart"] != "mean"])
    return mean(values) if values else math.nan


def _gain(gains: Sequence[float]) -> str:
    if not gains:
        return "no image was restored by all methods"
    spread = f" ± {stdev(gains):.2f}" if len(gains) > 1 else ""
    better = sum(gain > 0 for gain in gains)
    return f"{mean(gains):+.2f}{spread} dB, better on {better} of {len(gains)}"


def _name(row: Row) -> str:
    parts = [row["image"], row["method"]]
    restart = row["restart"]
    if restart is not None:
        parts.append("mean of restarts" if restart == "mean" else f"restart {restart}")
    return ", ".join(part for part in parts if part)


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _known(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]
