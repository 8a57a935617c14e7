"""Evaluate restored images: scores, diagnosis, comparison image and uncertainty."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from deepred_pl.files import write_bytes
from deepred_pl.image_format import ImageFormat
from deepred_pl.images import displayed, write_image
from deepred_pl.jpeg import JPEG
from deepred_pl.metrics import psnr, scored_on, ssim
from deepred_pl.noise import corrected, parameters
from deepred_pl.operators import CUT_OFF, POINT, Observed, unknown_blur
from deepred_pl.problem import InverseProblem

# The squared residual is that of the noise plus that of missing detail. Beyond this ratio to the
# noise, more is missing than noise was removed.
TOO_FAR = math.sqrt(2)
TOO_FAR_BLIND = 2 * TOO_FAR  # of an unknown blur, whose kernel is never found exactly
TOO_CLOSE = 0.5  # below, most of the stated noise is missing in the residual, or in the measurement
WHITE = 0.15  # correlation of neighbours, below which a residual looks like white noise
FALLING = 1.1  # ratio of the residual after half of the steps to the last one
SUMMED = ("steps", "seconds", "denoiser_wait_seconds", "rollbacks")  # over the fits of an image
FEW_STEPS = 300  # below, an average of 100 steps has not forgotten its start
REACH = 8  # pixels, by which the result of an unknown blur may be shifted
AT_LIMIT = 0.02  # of the range between the limits
SURELY, BEYOND = 6.0, 0.05  # standard deviations, and units of that range
USE_LIKELIHOOD = "use methods/likelihood"
TOO_SHORT = (
    "the fit was too short: increase trainer.max_steps and model.lr_scheduler.total_steps alike"
)
# The settings of each operator that most often differ from those of the measurement.
SUSPECTS = {
    "Blur": "the blur's kernel or boundary",
    "UnknownBlur": "the kernel that was found",
    "Downsample": "the factor or the kernel",
    "Radon": "the angles, their order or unit, the centre of rotation or data.intensity_range",
    "Adapted": "the operator",
}


Pair = tuple[Tensor, Tensor]  # an image and the true one, of the same shape


def score(problem: InverseProblem, restored: Tensor, **others: Tensor | None) -> dict[str, Any]:
    """The part of `result.json` that evaluates images, as plain data.

    Args:
        problem: The problem; without a ground truth its PSNR and SSIM are None.
        restored: The restored image, (1, C, H, W).
        others: Further images to score, by name, with known pixels put back as in `restored`.
    """
    images = {"measurement": problem.as_image(), "restored": restored, **others}
    truth, pairs = problem.ground_truth, dict[str, Pair]()
    for name, image in images.items():
        if truth is not None and image is not None:
            pairs[name] = pair(problem, problem.keep_known(image), truth)

    def values(metric: Callable[..., Tensor]) -> dict[str, float | None]:
        numbers = {n: float(metric(*p, problem.metric_on)) for n, p in pairs.items()}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}

    return {
        "psnr": dict.fromkeys(images) | values(psnr),
        "ssim": dict.fromkeys(images) | values(ssim),
        "metric_on": scored_on(problem.image_shape[1], problem.metric_on),
        **examine(problem, restored),
    }


def pair(problem: InverseProblem, image: Tensor, truth: Tensor) -> Pair:
    """An image and the true one, as they are compared.

    If the blur was unknown, so is the image's position: it is `registered`.
    """
    return (image, truth) if unknown_blur(problem.operator) is None else registered(image, truth)


def registered(image: Tensor, truth: Tensor, reach: int = REACH) -> Pair:
    """The image shifted by up to `reach` whole pixels onto the true one, and both without a border.

    Args:
        image: (1, C, H, W).
        truth: (1, C, H, W).
        reach: Largest shift, and the border that is left out, in pixels; at most a quarter of the
            image's smaller side.
    """
    height, width = truth.shape[-2:]
    reach = min(reach, min(height, width) // 4)
    inner = truth[..., reach : height - reach, reach : width - reach]
    places = [(i, j) for i in range(2 * reach + 1) for j in range(2 * reach + 1)]
    moved = [image[..., i:, j:][..., : inner.shape[-2], : inner.shape[-1]] for i, j in places]
    return min(moved, key=lambda one: float((one - inner).square().mean())), inner


def combine(
    problem: InverseProblem, restored: Tensor, results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The result of an image that was restored by several fits, such as those of tiles.

    Args:
        problem: The problem of the whole image.
        restored: The restored image, (1, C, H, W).
        results: Those of the fits, as in `result.json`.
    """
    return {
        **score(problem, restored),
        **{name: sum(result[name] for result in results) for name in SUMMED},
        "stop_reason": ", ".join(sorted({result["stop_reason"] for result in results})),
        "seed": results[0]["seed"],
    }


@torch.no_grad()
def examine(problem: InverseProblem, restored: Tensor) -> dict[str, Any]:
    """The part of `result.json` that compares a restored image with the measurement.

    noise_sigma: mean standard deviation of the noise in grey levels; None without a noise model.
    residual_to_sigma: root mean square of the residual in units of its expectation, or None; at 1
        only the noise is left, and far above detail of the measurement is missing.
    residual_to_sigma_of_channels: the same for each channel.
    residual_correlation: that of neighbouring values of the residual; 0 for white noise.
    kernel_largest, kernel_at_border, kernel_agreement: only of an unknown blur, the largest value
        of its kernel, the share of it in its outermost pixels, and how well it was determined.
    share_in_cells: share of a JPEG's coefficients that the image reproduces, or None.
    beyond_limits: whether the measurement asks for values "above" or "below" what x may have.
    operator, noise: its class, and the noise model's parameters.
    """
    variance, operator = problem.noise_variance(), problem.operator
    while isinstance(operator, Observed):
        operator = operator.operator
    measured = problem.operator(restored)
    observed = problem.operator.observed
    valid = ~problem.clipped() if observed is None else ~problem.clipped() & observed.bool()
    residual = (operator.nearest(problem.y, measured) - measured) * valid
    result: dict[str, Any] = {
        "operator": type(operator).__name__,
        "noise": None if problem.noise is None else parameters(problem.noise),
        "noise_sigma": None if variance is None else 255 * math.sqrt(float(variance)),
        "residual_to_sigma": None,
        "residual_to_sigma_of_channels": None,
        "residual_correlation": _correlation(residual, valid),
        "share_in_cells": None,
        "beyond_limits": _beyond_limits(problem, restored, residual),
    }
    if (blur := unknown_blur(operator)) is not None:
        result["kernel_largest"] = float(blur.kernel.max())
        result["kernel_at_border"] = blur.share_at_border
        result["kernel_agreement"] = blur.agreement
        result["beyond_limits"] = []  # a kernel that is not exact seems to ask for them
    if isinstance(operator, JPEG):
        result["beyond_limits"] = []  # a quantized image overshoots
        result["share_in_cells"] = operator.share_in_cells(restored, problem.y)
    ratio = problem.residual_ratio(restored)
    if ratio is not None:
        # Of the values that were not clipped, whose noise has its full variance.
        expected = problem.variance(measured) * valid
        ratios = residual.square().sum((0, 2, 3)) / expected.sum((0, 2, 3)).clamp(min=1e-20)
        result["residual_to_sigma"] = float(ratio.sqrt())
        result["residual_to_sigma_of_channels"] = ratios.sqrt().tolist()
    return result


def _correlation(residual: Tensor, valid: Tensor) -> float:
    """The mean correlation of vertical and horizontal neighbours that are both valid."""
    valid = valid.expand_as(residual).float()
    products = pairs = 0.0
    for dim in (2, 3):
        size = max(0, residual.shape[dim] - 1)
        products += float((residual.narrow(dim, 1, size) * residual.narrow(dim, 0, size)).sum())
        pairs += float((valid.narrow(dim, 1, size) * valid.narrow(dim, 0, size)).sum())
    variance = float(residual.square().sum() / valid.sum().clamp(min=1))
    return products / max(pairs, 1.0) / max(variance, 1e-20)


def _beyond_limits(problem: InverseProblem, restored: Tensor, residual: Tensor) -> list[str]:
    """The limits that the image would exceed if its pixels there were shifted to fit y best."""
    (low, high), variance = problem.limits, problem.noise_variance()
    near = AT_LIMIT * (high - low)
    sigma = float((residual.square().mean() if variance is None else variance).sqrt())
    touching = {"above": restored > high - near, "below": restored < low + near}
    found = []
    for name, at in touching.items():
        seen = problem.operator(at.float()) * (residual != 0)
        energy, score = float(seen.square().sum()), float((seen * residual).sum())
        excess = (1 if name == "above" else -1) * score / max(energy, 1e-12)  # of x, on average
        if excess > max(BEYOND * (high - low), SURELY * sigma / max(math.sqrt(energy), 1e-12)):
            found.append(name)
    return found


def diagnosis(result: dict[str, Any]) -> str:
    """The likely causes if `result.json` shows a bad residual, and their remedies; "" if not."""
    ratio, limits = result.get("residual_to_sigma"), result.get("beyond_limits") or []
    channels = result.get("residual_to_sigma_of_channels") or []
    if (largest := result.get("kernel_largest", 0.0)) > POINT:
        return (
            f"The kernel that was found is nearly a point, with {largest:.0%} of it in one pixel: "
            "the image is hardly blurred, or too noisy to see how."
        )
    white = abs(result.get("residual_correlation") or 0.0) < WHITE
    noise = result.get("noise") or {}
    causes = [
        f"the measurement asks for values {name} those that the image may have: set "
        "data.intensity_range to a wider [lo, hi], and store it as floats if its type ends there"
        for name in limits
        if len(limits) == 1  # beyond both, it rings
    ]
    if (share := result.get("kernel_at_border", 0.0)) > CUT_OFF:
        causes.append(
            f"the kernel that was found is probably cut off, with {share:.0%} of it at its border: "
            "increase data.operator.size"
        )
    too_far = TOO_FAR_BLIND if result.get("operator") == "UnknownBlur" else TOO_FAR
    if ratio is None or TOO_CLOSE <= ratio <= too_far:
        return f"{causes[0][0].upper()}{causes[0][1:]}." if causes else ""
    if ratio < TOO_CLOSE:
        half = result.get("residual_to_sigma_at_half")
        if half is not None and ratio > FALLING * half:  # the average started at the measurement
            return (
                f"The residual is {ratio:.2g} times the noise, and was still rising: {TOO_SHORT}."
            )
        if half is None:  # of tiles and restore()
            causes.append(f"{TOO_SHORT}, because the average starts at the measurement")
        causes += [
            f"the noise is weaker than stated: set {corrected(noise, ratio)}",
            "the network has learned the noise: reduce trainer.max_steps, or use methods/deepred",
        ]
    elif white:
        causes.append(f"the noise is stronger than stated: set {corrected(noise, ratio)}")
    else:
        causes += _missing_detail(result)
    which = ""
    if len(channels) > 1 and max(channels) > 2 * min(channels):
        which = " (by channel: " + ", ".join(f"{one:.2g}" for one in channels) + ")"
    listed = "; ".join(f"({i}) {cause}" for i, cause in enumerate(causes, start=1))
    kind = "" if ratio < TOO_CLOSE else " and looks like noise" if white else " and has structure"
    return f"The residual is {ratio:.2g} times the noise{which}{kind}. Likely causes: {listed}."


def _missing_detail(result: dict[str, Any]) -> list[str]:
    """Causes of a residual with structure, the likeliest first."""
    ratio, half = result["residual_to_sigma"], result.get("residual_to_sigma_at_half")
    suspect = SUSPECTS.get(result.get("operator", ""))
    wrong = [f"{suspect} is not that of the measurement"] if suspect else []
    causes = [f"the noise is not white, as in a former JPEG: {USE_LIKELIHOOD}"]
    causes = causes if result.get("fidelity") == "backprojection" else []
    if half is None or result.get("steps", FEW_STEPS) < FEW_STEPS:
        return [TOO_SHORT, *wrong, *causes]
    if half / ratio > FALLING:
        return [f"{TOO_SHORT} (it was still falling)", *wrong, *causes]
    learned = "the network is too small for this detail: increase model.network.width"
    return [*wrong, learned, *causes]


def write_uncertainty(directory: Path, std: Tensor) -> None:
    """Write a standard deviation per value, (1, C, H, W), as an array and as a picture.

    `uncertainty.npy` is (H, W, C); `uncertainty.png` shows its mean over the channels, scaled so
    that the largest value is white.
    """
    buffer = io.BytesIO()
    np.save(buffer, std[0].movedim(0, -1).cpu().numpy())  # (H, W, C)
    write_bytes(directory / "uncertainty.npy", buffer.getvalue())
    grey = std.mean(dim=1, keepdim=True)
    write_image(directory / "uncertainty.png", grey / grey.max().clamp(min=1e-12))


def write_kernel(directory: Path, kernel: Tensor) -> None:
    """Write a blur's kernel, (rows, columns), as an array and as a picture, for `Blur.from_file`.

    In `kernel.png` the largest value is white; `kernel.npy` has the values themselves.
    """
    buffer = io.BytesIO()
    np.save(buffer, kernel.cpu().numpy())
    write_bytes(directory / "kernel.npy", buffer.getvalue())
    write_image(directory / "kernel.png", kernel[None, None] / kernel.max(), ImageFormat("uint16"))


def compare(problem: InverseProblem, restored: Tensor) -> Tensor:
    """Measurement, restored and (if known) true image side by side, (1, 3, H', W').

    Small images are enlarged by whole factors; each panel has a caption with its PSNR.
    """
    truth = problem.ground_truth
    panels = {"measurement": problem.as_image(), "restored": restored}
    if truth is not None:
        on, pairs = problem.metric_on, {n: pair(problem, v, truth) for n, v in panels.items()}
        panels = {f"{n}, {psnr(*pairs[n], on):.2f} dB": v for n, v in panels.items()}
        panels["ground truth"] = truth
    scale = max(1, 256 // min(problem.image_shape[-2:]))
    return torch.cat([_panel(name, image.cpu(), scale) for name, image in panels.items()], dim=-1)


def _panel(caption: str, image: Tensor, scale: int) -> Tensor:
    colour = displayed(image).expand(-1, 3, -1, -1)
    colour = F.interpolate(colour, scale_factor=scale, mode="nearest")
    margin, header = 4, 24  # pixels
    framed = F.pad(colour, (margin, margin, header, margin), value=1.0)
    strip = Image.new("L", (framed.shape[-1], header), 255)
    font = ImageFont.load_default(14)
    ImageDraw.Draw(strip).text((margin, 4), caption, fill=0, font=font)
    framed[..., :header, :] = torch.from_numpy(np.asarray(strip) / 255)
    return framed
