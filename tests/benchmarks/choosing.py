"""What `deepred restore` chooses, against a grid of settings chosen by the true image.

    python tests/benchmarks/choosing.py 0/2 & python tests/benchmarks/choosing.py 1/2

Combinations of image, degradation and noise: twenty on which the rules were improved, and twelve
that were not looked at before. The images are whole, of the published sets in DEEPRED_DATA, reduced
to a shorter side of 96 to 160 pixels by Pillow's Lanczos filter. The grid knows the true noise.
Fits take one thread; each is kept in `lightning_logs/choosing/fits.jsonl`, so that the same command
resumes. The table is printed.
"""

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deepred_pl.callbacks import LastCheckpoint, Panels, Writer
from deepred_pl.choose import as_options, choose, steps_and_width
from deepred_pl.cli import RestorationCLI
from deepred_pl.data import simulate
from deepred_pl.images import write_image
from deepred_pl.lightning import NAME, Callback, LightningModule, SaveConfigCallback, Trainer
from deepred_pl.metrics import psnr
from deepred_pl.moments import RunningMoments, together
from deepred_pl.noise import GaussianNoise, NoiseModel, PoissonNoise
from deepred_pl.operators import Blur, Downsample, Identity, Mask, Operator, Radon

RUNS = Path("lightning_logs") / "choosing"
BLOCK = 20  # steps; the peak is that of the average, or of the mean of five blocks
TASKS = {
    **{"noise": "denoising", "counts": "denoising", "blur": "deblurring_uniform"},
    **{"small": "super_resolution", "mask": "inpainting", "text": "inpainting"},
    "rays": "tomography",
}
# Image, its shorter side in pixels, kind, its parameter, and σ (counts: the peak).
CASES: list[tuple[str, int, str, Any, float]] = [
    ("cbm3d9/image_House256rgb.png", 96, "noise", None, 25),
    ("cbm3d9/kodim01.png", 96, "noise", None, 10),
    ("set14/flowers.png", 96, "noise", None, 40),
    ("set5/baby.png", 96, "noise", None, 5),
    ("set14/monarch.png", 96, "counts", None, 60),
    ("set14/foreman.png", 96, "counts", None, 200),
    ("ncsr_deblur/parrots.tif", 96, "blur", ("gaussian", 15, 1.6), math.sqrt(2)),
    ("ncsr_deblur/starfish.tif", 96, "blur", ("uniform", 7), 4),
    ("ncsr_deblur/leaves.tif", 96, "blur", ("motion", 11, 30), 2),
    ("set14/lenna.png", 96, "blur", ("gaussian", 21, 2.5), 1),
    ("cbm3d9/image_F16_512rgb.png", 96, "blur", ("gaussian", 9, 1.0), 8),
    ("set5/bird.png", 128, "small", 2, 0),
    ("set5/woman.png", 128, "small", 4, 0),
    ("set14/coastguard.png", 128, "small", 3, 8),
    ("set14/barbara.png", 96, "mask", 0.5, 0),
    ("set14/man.png", 96, "mask", 0.3, 0),
    ("dip_inpainting/kate.png", 96, "text", None, 0),
    ("set14/bridge.png", 96, "mask", 0.6, 15),
    ("dip_inpainting/vase.png", 96, "rays", 60, 0.5),
    ("set14/ppt3.png", 96, "rays", 45, 1.0),
    # Not used before the rules were final:
    ("cbm3d9/kodim03.png", 96, "noise", None, 15),
    ("cbm3d9/kodim12.png", 96, "noise", None, 30),
    ("dip_inpainting/library.png", 96, "noise", None, 8),
    ("cbm3d9/kodim02.png", 96, "counts", None, 100),
    ("ncsr_deblur/butterfly.tif", 160, "blur", ("gaussian", 13, 1.4), 3),
    ("cbm3d9/image_Lena512rgb.png", 96, "blur", ("uniform", 5), 6),
    ("cbm3d9/image_Baboon512rgb.png", 96, "blur", ("motion", 9, 120), 1.5),
    ("set14/face.png", 128, "small", 2, 5),
    ("cbm3d9/kodim12.png", 128, "small", 4, 0),
    ("cbm3d9/image_Peppers512rgb.png", 96, "mask", 0.4, 0),
    ("dip_inpainting/library.png", 96, "mask", 0.7, 10),
    ("dip_inpainting/barbara.png", 160, "rays", 50, 0.7),
]


def weights(value: float, *others: str) -> list[str]:
    """Options with λ = μ."""
    return [f"--model.lam={value}", f"--model.mu={value}", *others]


def grid(kind: str, sigma: float) -> dict[str, list[str]]:
    """Settings for a task, by name."""
    dip, likelihood = "--config=methods/dip", "--config=methods/likelihood"
    fixed, automatic = "--model.weighting=fixed", "--model.weighting=discrepancy"
    if kind in ("noise", "counts"):
        level = sigma if kind == "noise" else 255 * math.sqrt(0.45 / sigma)
        scale = min(1.0, (level / 25) ** 2)

        def scaled(factor: float) -> list[str]:
            noise = min(0.1, 0.1 * scale * factor)
            return weights(0.5 * scale * factor, f"--model.input_noise_std={noise}")

        return {
            "weights / 5": scaled(0.2),
            "weights": scaled(1),
            "weights × 5": scaled(5),
            "λ = 1": weights(1, fixed, "--model.input_noise_std=0.03"),
            "DIP": [dip],
            "DIP, less noise on z": [dip, "--model.input_noise_std=0.01"],
        }
    if kind in ("blur", "rays"):
        usual, low, high = (0.7, 0.02, 0.1) if kind == "blur" else (2.1, 0.002, 0.02)
        return {
            "weights / 3": weights(usual / 3),
            "weights": weights(usual),
            "weights × 3": weights(3 * usual),
            "likelihood": [likelihood, *weights(low, fixed)],
            "likelihood, stronger": [likelihood, *weights(high, fixed)],
            "DIP": [dip],
        }
    if sigma == 0:
        return {
            "weights / 4": weights(0.05),
            "weights": weights(0.2),
            "weights × 4": weights(0.8),
            "DIP": [dip],
            "z 0.03": ["--model.input_noise_std=0.03"],
            "z 0.2": ["--model.input_noise_std=0.2"],
        }
    return {
        "weights / 5": weights(0.1, automatic),
        "weights": weights(0.5, automatic),
        "weights × 4": weights(2, automatic),
        "λ = 0.2": weights(0.2, fixed),
        "λ = 1": weights(1, fixed),
        "DIP": [dip],
    }


def reduced(name: str, side: int) -> Tensor:
    """A whole image of the sets with a shorter side of `side` pixels, (1, C, H, W)."""
    picture = Image.open(Path(os.environ["DEEPRED_DATA"]) / name)
    picture = picture if picture.mode == "L" else picture.convert("RGB")
    factor = min(1.0, side / min(picture.size))
    size = round(picture.width * factor), round(picture.height * factor)
    array = np.asarray(picture.resize(size, Image.Resampling.LANCZOS), np.float32) / 255
    return torch.from_numpy(np.atleast_3d(array).copy()).movedim(-1, 0)[None]


def measured(index: int, folder: Path) -> tuple[Tensor, Path, list[str]]:
    """The true image, the file of its measurement, and the options that describe it."""
    name, side, kind, parameter, sigma = CASES[index]
    truth = reduced(name, side)
    generator = torch.Generator().manual_seed(100 + index)
    operator: Operator = Identity()
    noise: NoiseModel | None = GaussianNoise(sigma) if sigma else None
    described: dict[str, Any] = {}
    if kind == "blur":
        path = f"deepred_pl.operators.Blur.{parameter[0]}"
        operator = getattr(Blur, parameter[0])(*parameter[1:], boundary="reflect")
        names = {"gaussian": ("size", "width"), "motion": ("length", "angle")}
        values = dict(zip(names.get(parameter[0], ("size",)), parameter[1:], strict=True))
        described["data.operator"] = {
            "class_path": path,
            "init_args": {**values, "boundary": "reflect"},
        }
    elif kind == "small":
        operator, described["data.operator.factor"] = Downsample(parameter, "lanczos3"), parameter
    elif kind in ("mask", "text"):
        if kind == "text":
            known = reduced("dip_inpainting/kate_mask.png", side)[:, :1] > 0.5
            operator = Mask(known[..., : truth.shape[2], : truth.shape[3]])
        else:
            operator = Mask(keep_fraction=parameter).drawn(tuple(truth.shape), generator)
        write_image(folder / "mask.png", operator.mask)
        described["data.operator.mask"] = str(folder / "mask.png")
    elif kind == "rays":
        side = min(truth.shape[2:])
        truth, operator = truth.mean(1, keepdim=True)[..., :side, :side], Radon(parameter)
        described["data.operator.angles"] = operator.angles.tolist()
    elif kind == "counts":
        noise = PoissonNoise(sigma)
        described["data.noise"] = {"class_path": "PoissonNoise", "init_args": {"peak": sigma}}
        described["data.intensity_range"] = [0, sigma]
    truth = operator.admissible(truth)
    y = simulate(truth, operator, noise, generator)
    file = folder / "y.npy"
    if kind == "rays":
        np.save(file, (y[0, 0] * y.shape[2]).numpy())  # sums along rays
    elif kind == "counts":
        np.save(file, np.rint(y[0].movedim(0, -1).numpy() * sigma).astype(np.float32))
    else:
        file = file.with_suffix(".png")
        write_image(file, y.clamp(0, 1))
    return truth, file, as_options(described)


class Peak(Callback):
    """The largest PSNR of the average, and of the mean of five blocks of outputs, in a fit."""

    def __init__(self, truth: Tensor, scale: float) -> None:
        self.truth, self.scale, self.best = truth, scale, -math.inf
        self.blocks = [RunningMoments()]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, model: LightningModule, *batch: object) -> None:
        self.blocks[-1].add(model.out)
        if self.blocks[-1].count == BLOCK:
            images = [model.average]
            if len(self.blocks) == 5:
                images.append(together(self.blocks)[0])
            images = [model.problem.keep_known(image) for image in images]
            scores = [float(psnr(self.scale * image, self.truth)) for image in images]
            self.best = max(self.best, *scores)
            self.blocks = [*self.blocks[-4:], RunningMoments()]


def fitted(options: Sequence[str], truth: Tensor, scale: float = 1.0) -> dict[str, Any]:
    """Fit, and compare with the true image; values of the restored image are times `scale`."""
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    cli = RestorationCLI([*options, *quiet, f"--trainer.default_root_dir={RUNS}"], run=False)
    unkept = (Writer, LastCheckpoint, SaveConfigCallback, Panels)
    peak = Peak(truth, scale)
    cli.trainer.callbacks = [c for c in cli.trainer.callbacks if not isinstance(c, unkept)]
    cli.trainer.callbacks.append(peak)
    began = time.perf_counter()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    problem = cli.datamodule.problem
    return {
        "measured": float(psnr(scale * problem.as_image(), truth)),
        "end": float(psnr(scale * cli.model.restored, truth)),
        "peak": peak.best,
        "steps": cli.model.step,
        "seconds": time.perf_counter() - began,
        "noise": str(problem.noise),
    }


def run(index: int, which: str) -> dict[str, Any]:
    """The fit of a combination with chosen settings ("restore"), or with those of the grid."""
    _, _, kind, _, sigma = CASES[index]
    task, folder = TASKS[kind], RUNS / str(index)
    folder.mkdir(parents=True, exist_ok=True)
    truth, file, described = measured(index, folder)
    options = [f"--data.measurement={file}", "--trainer.accelerator=cpu", *described]
    options += ["--trainer.precision=32"]
    if which == "restore":
        first = [f"--config={task}"]

        def assemble(extra: Sequence[str]) -> RestorationCLI:
            return RestorationCLI([*first, *extra, *options], run=False)

        given = {option[2:].partition("=")[0] for option in options}
        choice = choose(assemble, given, "default")
        high = choice.settings.get("data.intensity_range", [0, 0])[1]
        scale = high / len(np.load(file)) if high else 1.0
        chosen = [*first, *as_options(choice.settings), *options]
        return {**fitted(chosen, truth, scale), "chosen": choice.settings}
    if kind == "rays":
        options.append(f"--data.intensity_range=[0, {len(np.load(file))}]")
    if kind != "counts":
        noise = {"class_path": "GaussianNoise", "init_args": {"sigma": sigma}} if sigma else None
        options += as_options({"data.noise": noise})
    settings = grid(kind, sigma)[which]
    configs = [setting for setting in settings if setting.startswith("--config")]
    others = [setting for setting in settings if not setting.startswith("--config")]
    first = [f"--config={task}", "--config=methods/quick", *configs]
    steps, _ = steps_and_width("default", truth.shape)
    options += [f"--trainer.max_steps={steps}", f"--model.lr_scheduler.total_steps={steps}"]
    return fitted([*first, *options, *others], truth)


def table(fits: dict[tuple[int, str], dict[str, Any]]) -> str:
    """The combinations in Markdown; differences are of the best of the grid, and of the peak."""
    lines = ["| image | degradation | measured | restore | best of the grid | − best | − peak |"]
    lines.append("|---" * 7 + "|")
    for index, (name, side, kind, parameter, sigma) in enumerate(CASES):
        ours = fits.get((index, "restore"))
        others = {w: fits[index, w]["end"] for w in grid(kind, sigma) if (index, w) in fits}
        if ours is None or not others:
            continue
        best = max(others, key=lambda name: others[name])
        detail = "" if parameter is None else f" {parameter}"
        end, peak = ours["end"], ours["peak"]
        lines.append(
            f"| {Path(name).stem}, {side} | {kind}{detail}, {sigma:.3g} | {ours['measured']:.2f} "
            f"| {end:.2f} | {others[best]:.2f} ({best}) | {end - others[best]:+.2f} "
            f"| {end - peak:+.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="0/1", help="I/N, from 0: a part of the fits")
    part, parts = map(int, parser.parse_args().part.split("/"))
    torch.set_num_threads(1)
    logging.getLogger(NAME).setLevel(logging.ERROR)
    RUNS.mkdir(parents=True, exist_ok=True)
    file = RUNS / "fits.jsonl"
    fits = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        fit = json.loads(line)
        fits[fit["index"], fit["which"]] = fit
    order = [
        (i, which)
        for i, (_, _, kind, _, sigma) in enumerate(CASES)
        for which in ("restore", *grid(kind, sigma))
    ]
    for index, which in order[part::parts]:
        if (index, which) not in fits:
            fit = {"index": index, "which": which, **run(index, which)}
            fits[index, which] = fit
            with file.open("a") as lines:
                lines.write(json.dumps(fit) + "\n")
    print(table(fits))


if __name__ == "__main__":
    main()
