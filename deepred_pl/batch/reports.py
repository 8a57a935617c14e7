"""What a restoration reports at its end: for a person in some lines, for programs as JSON."""

import json
import re
import shlex
from typing import Any

from deepred_pl.batch.jobs import Job
from deepred_pl.checks import RestorationWarning
from deepred_pl.report import TOO_SHORT, USE_LIKELIHOOD, diagnosis

Report = dict[str, Any]

WARNING = re.compile(rf": {RestorationWarning.__name__}: (.*)")  # in a fit's log


def report_of(job: Job) -> Report | None:
    """The report of a job as plain data; None if it is not done.

    It has the `image`, how it was `read`, what was `assumed`, the `chosen` settings, the `result`
    (the contents of `result.json`), how many `fits` it took, its `diagnosis`, the `warnings` of
    these fits, and the paths of its `directory`, of the `restored` image, of the `comparison`, and
    of the `kernel` if the blur was unknown.
    """
    result = job.result
    if result is None:
        return None
    choice, directory = job.fits[0].choice, job.directory
    restored = next(directory.glob("restored.*"), None)
    if restored is None:
        raise ValueError(f"the result in {directory} was deleted; delete this folder, too")
    cause = diagnosis(result)
    if job.fits[0].effort is not None:
        cause = cause.replace(TOO_SHORT, "the fit was too short: use more --effort")
        cause = cause.replace(USE_LIKELIHOOD, "add --model.fidelity likelihood")
    return {
        "image": job.about["image"],
        "read": result.get("read"),
        "assumed": {} if choice is None else choice.assumed,
        "chosen": {} if choice is None else choice.settings,
        "result": result,
        "fits": len(job.fits),
        "diagnosis": cause,
        "warnings": _warnings(job),
        "directory": str(directory),
        "restored": str(restored),
        "comparison": str(directory / "comparison.png"),
        "kernel": str(kernel) if (kernel := directory / "kernel.npy").exists() else None,
    }


def _warnings(job: Job) -> list[str]:
    """What the fits of a job warned about, once each."""
    found: dict[str, None] = {}
    for fit in job.fits:
        log = fit.directory / "run.log"
        text = log.read_text(errors="replace") if log.is_file() else ""
        found |= dict.fromkeys(WARNING.findall(text))
    return list(found)


def lines_of(report: Report) -> list[str]:
    """The report in lines that a person reads."""
    if "pages" in report:
        return _lines_of_stack(report)
    result, chosen = report["result"], report["chosen"]
    lines = [f"Read     {report['read']}"]
    for name, text in report["assumed"].items():
        lines.append(f"Assumed  {text} ({_how_to_change(name, chosen.get(name))})")
    network = chosen.get("model.network", {}).get("init_args", {})
    parts = [f"{result['steps']} steps in {result['seconds']:.0f} s"]
    parts += [f"summed over {report['fits']} fits"] if report["fits"] > 1 else []
    parts += [f"network of {network['width']} channels"] if network else []
    if (stopped := result["stop_reason"]) != "max_steps":
        parts.append(f"stopped by {stopped}")
    lines.append(f"Fit      {', '.join(parts)}")
    parts = []
    if (ratio := result.get("residual_to_sigma")) is not None:
        parts.append(f"the residual is {ratio:.2f} times the noise (1 is best)")
    if (share := result.get("share_in_cells")) is not None:
        parts.append(f"{share:.1%} of the JPEG's coefficients are reproduced")
    if (held := result.get("held_out_error")) is not None:
        parts.append(f"the error at held-out values {held:.2f} grey levels")
    scores = [result["psnr"][name] for name in ("measurement", "restored")]
    if None not in scores:
        parts.append("PSNR {:.2f} -> {:.2f} dB".format(*scores))
    lines += [f"Result   {', '.join(parts)}"] if parts else []
    lines += [f"Warning  {text}" for text in (*report["warnings"], report["diagnosis"]) if text]
    lines += [f"Image    {report['restored']}", f"Compare  {report['comparison']}"]
    return lines + ([f"Kernel   {report['kernel']}"] if report["kernel"] else [])


def _lines_of_stack(report: Report) -> list[str]:
    """The report of a stack: what its pages have in common, and what they do not."""
    pages = report["pages"]
    results = [page["result"] for page in pages]
    lines = [f"Read     {pages[0]['read']}"]
    for name, text in pages[0]["assumed"].items():
        others = "" if all(page["assumed"].get(name) == text for page in pages) else "; others vary"
        how = _how_to_change(name, pages[0]["chosen"].get(name))
        lines.append(f"Assumed  {text}{others} ({how})")
    steps, seconds = (sum(result[name] for result in results) for name in ("steps", "seconds"))
    lines.append(f"Fits     {len(pages)} pages, {steps} steps in {seconds:.0f} s")
    ratios = [r for result in results if (r := result.get("residual_to_sigma")) is not None]
    if ratios:
        span = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios))))
        lines.append(f"Result   the residuals are {span} times the noise (1 is best)")
    alike: dict[str, dict[str, str]] = {}  # warnings that differ by their numbers only, by image
    for page in pages:
        for text in filter(None, (*page["warnings"], page["diagnosis"])):
            alike.setdefault(re.sub(r"[\d.]+", "", text), {}).setdefault(page["image"], text)
    for texts in alike.values():
        image, text = next(iter(texts.items()))
        more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
        lines.append(f"Warning  {image}: {text}{more}")
    for number, reason in report["failed"].items():
        lines.append(f"Failed   page {number}, which is not restored in the result: {reason}")
    if report["others"]:
        empty = len(report["empty"])
        kept = report["others"] - empty
        counts = {f"{kept} are as measured": kept, f"{empty} are 0": empty}
        said = ", ".join(text for text, count in counts.items() if count)
        lines.append(f"Others   of the other pages {said}")
    compared = f"Compare  {report['comparison']} ({report['compared']})"
    return [*lines, f"Image    {report['restored']}", compared]


def _how_to_change(name: str, value: Any) -> str:
    """The option that states an assumption, to be given with another value."""
    if name == "model.fidelity":  # which has other weights
        return "to change: --model.fidelity backprojection"
    if name == "data.noise":
        sigma = None if value is None else value["init_args"]["sigma"]
        if isinstance(sigma, list):
            return f"same as --data.noise GaussianNoise --data.noise.sigma '{sigma}'"
        name, value = "sigma", sigma
    if value is None:
        return f"to change: --{name}"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"same as --{name} {shlex.quote(text)}"
