"""Evaluate restored images: scores, diagnosis, comparison image and uncertainty."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from deepred_pl.files import write_bytes
from deepred_pl.images import write_image
from deepred_pl.metrics import psnr, scored_on, ssim
from deepred_pl.problem import InverseProblem

# The squared residual is that of the noise plus that of missing detail. Beyond this ratio to the
# noise, more is missing than noise was removed.
TOO_FAR = math.sqrt(2)


def score(problem: InverseProblem, restored: Tensor, **others: Tensor | None) -> dict[str, Any]:
    """The part of `result.json` that evaluates images, as plain data.

    Args:
        problem: The problem; without a ground truth its PSNR and SSIM are None.
        restored: The restored image, (1, C, H, W).
        others: Further images to score, by name, with known pixels put back as in `restored`.
    """
    truth = problem.ground_truth
    images = {"measurement": problem.as_image(), "restored": restored, **others}

    def value(metric: Callable[..., Tensor], image: Tensor | None) -> float | None:
        if truth is None or image is None:
            return None
        number = float(metric(problem.keep_known(image), truth, problem.metric_on))
        return number if math.isfinite(number) else None

    variance = problem.noise_variance()
    return {
        "psnr": {name: value(psnr, image) for name, image in images.items()},
        "ssim": {name: value(ssim, image) for name, image in images.items()},
        "metric_on": scored_on(problem.image_shape[1], problem.metric_on),
        "noise_sigma": None if variance is None else 255 * math.sqrt(float(variance)),
        "residual_to_sigma": residual_to_sigma(problem, restored),
    }


@torch.no_grad()
def residual_to_sigma(problem: InverseProblem, restored: Tensor) -> float | None:
    """Root mean square of the residual in units of its expectation; None without a noise model.

    At 1 only the noise is left. Far above, detail of the measurement is missing, as after too few
    steps.
    """
    ratio = problem.residual_ratio(restored)
    return None if ratio is None else float(ratio.sqrt())


def diagnosis(result: dict[str, Any]) -> str:
    """What to do if `result.json` shows that detail is missing; "" if it does not."""
    ratio = result["residual_to_sigma"]
    if ratio is None or ratio <= TOO_FAR:
        return ""
    return (
        f"The residual is {ratio:.1f} times the noise: detail is missing, because the fit was too "
        "short (trainer.max_steps and, if set, model.lr_scheduler.total_steps), or the operator is "
        "wrong (such as a blur's kernel or boundary); or the noise is stronger than specified (set "
        "data.noise.sigma) or not white, as in a former JPEG (in deblurring use "
        "methods/likelihood)."
    )


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


def compare(problem: InverseProblem, restored: Tensor) -> Tensor:
    """Measurement, restored and (if known) true image side by side, (1, 3, H', W').

    Small images are enlarged by whole factors; each panel has a caption with its PSNR.
    """
    truth = problem.ground_truth
    panels = {"measurement": problem.as_image(), "restored": restored}
    if truth is not None:
        on = problem.metric_on
        panels = {f"{name}, {psnr(v, truth, on):.2f} dB": v for name, v in panels.items()}
        panels["ground truth"] = truth
    scale = max(1, 256 // min(problem.image_shape[-2:]))
    return torch.cat([_panel(name, image.cpu(), scale) for name, image in panels.items()], dim=-1)


def _panel(caption: str, image: Tensor, scale: int) -> Tensor:
    channels = image.shape[1]
    colour = image[:, :3] if channels >= 3 else image[:, :1].expand(-1, 3, -1, -1)
    colour = F.interpolate(colour, scale_factor=scale, mode="nearest")
    margin, header = 4, 24  # pixels
    framed = F.pad(colour, (margin, margin, header, margin), value=1.0)
    strip = Image.new("L", (framed.shape[-1], header), 255)
    font = ImageFont.load_default(14)
    ImageDraw.Draw(strip).text((margin, 4), caption, fill=0, font=font)
    framed[..., :header, :] = torch.from_numpy(np.asarray(strip) / 255)
    return framed
