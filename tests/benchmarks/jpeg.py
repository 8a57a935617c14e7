"""JPEG artefacts: PSNR and SSIM in RGB of the decoded file, classical denoisers, DIP and DeepRED.

    python tests/benchmarks/jpeg.py --qualities 5 10 20 40
    python tests/benchmarks/jpeg.py --qualities 10 --images set:cbm3d9/image_House256rgb

Non-local means, BM3D and total variation denoise the decoded file with the strength that has the
highest PSNR of those below: the truth chooses it, in their favour. DIP and DeepRED have the
settings of `deepred restore --jpeg`, chosen without the truth, but for their steps. Every row is
printed, and appended to `lightning_logs/jpeg.jsonl`; pictures go next to it.
"""

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

from torch import Tensor

from deepred_pl.choose import JPEG_SIGMA
from deepred_pl.cli import RestorationCLI
from deepred_pl.denoisers import BM3D, NonLocalMeans, TotalVariation
from deepred_pl.images import ImageFormat, read_image, to_array, to_tensor, write_image
from deepred_pl.jpeg import compress
from deepred_pl.lightning import NAME
from deepred_pl.metrics import psnr, ssim

LOGS = Path("lightning_logs")
SAMPLES = [f"sample:{name}" for name in ("astronaut", "camera", "chelsea", "coffee", "rocket")]
STRENGTHS = {
    "NLM": (NonLocalMeans, "sigma", (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)),
    "BM3D": (BM3D, "sigma", (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)),
    "TV": (TotalVariation, "weight", (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25)),
}
METHODS = ["decoded", *STRENGTHS, "BM3D in cells", "DIP", "RED", "DeepRED"]


def stored(image: Tensor) -> Tensor:
    """The image with 8 bits."""
    return to_tensor(to_array(image.clamp(0, 1), ImageFormat()))[0]


def fitted(name: str, quality: int, steps: int, sigma: float, *more: str) -> Tensor:
    """The result of a fit."""
    options = [
        *(
            "--config=jpeg",
            *more,
            f"--data.ground_truth={name}",
            f"--data.operator.quality={quality}",
        ),
        f"--trainer.max_steps={steps}",
        f"--model.lr_scheduler.total_steps={steps}",
        *("--trainer.logger=false", "--trainer.enable_progress_bar=false"),
        *([f"--red.denoiser.sigma={sigma}"] if not more else []),
    ]
    cli = RestorationCLI(options, run=False)
    cli.trainer.callbacks = [c for c in cli.trainer.callbacks if type(c).__name__ == "REDUpdate"]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli.model.restored


def compare(name: str, quality: int, steps: int, methods: list[str]) -> None:
    truth = read_image(name)[0]
    y, operator = compress(truth, quality)
    decoded = stored(operator.first_guess(y))
    sigma = round(JPEG_SIGMA * operator.step**0.5, 1)
    best: dict[str, Tensor] = {}
    for method in methods:
        began, strength = time.perf_counter(), None
        if method == "decoded":
            image = decoded
        elif method in STRENGTHS:
            denoiser, argument, values = STRENGTHS[method]
            images = {v: denoiser(**{argument: v})(decoded) for v in values}
            strength = max(images, key=lambda v: float(psnr(images[v], truth, "rgb")))
            image = best[method] = images[strength]
            began += (time.perf_counter() - began) * (1 - 1 / len(images))  # of one of them
        elif method == "BM3D in cells":  # that of the highest PSNR, moved into the cells
            image = operator.keep_known(best["BM3D"], y)
        elif method == "RED":
            image = fitted(name, quality, steps, sigma, "--config=methods/red")
        elif method == "DIP":
            image = fitted(name, quality, steps, sigma, "--config=methods/dip")
        else:
            image, strength = fitted(name, quality, steps, sigma), sigma
        seconds = time.perf_counter() - began
        image = stored(image)
        row = {
            "image": name,
            "quality": quality,
            "method": method,
            "strength": strength,
            "psnr": round(float(psnr(image, truth, "rgb")), 2),
            "psnr_luminance": round(float(psnr(image, truth, "luminance")), 2),
            "ssim": round(float(ssim(image, truth, "rgb")), 4),
            "share_in_cells": round(operator.share_in_cells(image, y), 4),
            "seconds": round(seconds, 1),
        }
        print(json.dumps(row), flush=True)
        with (LOGS / "jpeg.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        short = name.rpartition(":")[2].replace("/", "_")
        write_image(LOGS / f"jpeg_{short}_{quality}_{method}.png", image)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", nargs="+", default=SAMPLES)
    parser.add_argument("--qualities", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger(NAME).setLevel(logging.ERROR)
    LOGS.mkdir(exist_ok=True)
    for name in arguments.images:
        for quality in arguments.qualities:
            compare(name, quality, arguments.steps, arguments.methods)


if __name__ == "__main__":
    main()
