"""The back-projection term on whole images: PSNR against steps and seconds, as on this machine.

    python tests/benchmarks/backprojection.py deblurring
    python tests/benchmarks/backprojection.py rule --grid
    python tests/benchmarks/backprojection.py butterfly
    python tests/benchmarks/backprojection.py tomography
    python tests/benchmarks/backprojection.py poisson
    python tests/benchmarks/backprojection.py tiles

Every fit is one of the shipped configurations, and takes as many threads as OMP_NUM_THREADS. The
curve of each goes to `lightning_logs/backprojection/fits.jsonl` at once, so that the same command
resumes; two commands may run at the same time. The tables are printed. After a change of the
package or of its configurations, start in another folder: fits are known by their settings only.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import numpy as np
import skimage
import torch

from deepred_pl import InverseProblem, REDUpdate, restore
from deepred_pl.callbacks import CollapseGuard, KeepMemory
from deepred_pl.cli import RestorationCLI
from deepred_pl.lightning import NAME, Callback, LightningModule, Trainer
from deepred_pl.metrics import psnr
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Blur
from deepred_pl.tiles import Tiling

RUNS = Path("lightning_logs") / "backprojection"
SAMPLES = [f"sample:{name}" for name in ("astronaut", "camera", "chelsea", "coffee", "rocket")]
SIGMAS = 0.5, math.sqrt(2), 5.0, 10.0
EVERY = 25  # steps between two looks
STEPS = 600

QUICK = ["--config=methods/quick"]
UNIFORM = ["--config=deblurring_uniform", *QUICK, "--data.operator.boundary=circular"]
GAUSSIAN = ["--config=deblurring_gaussian", *QUICK, "--data.operator.boundary=circular"]
# As the tasks were before the back-projection, with methods/quick.
LIKELIHOOD = [
    *("--model.fidelity=likelihood", "--model.weighting=fixed"),
    *("--model.lam=0.02", "--model.mu=0.04", "--red.denoiser.sigma=3", "--model.result=x-u"),
]
# Each rival with the settings that were best at the end on astronaut and camera, uniform 9×9.
RIVALS = {
    "before": LIKELIHOOD,
    "default": [],
    "BM3D": ["--config=paper/deblurring/bm3d"],
    "RED + BP": [
        *("--config=methods/red", "--model.lr_scheduler=null"),
        *("--model.lam=0.5", "--model.mu=0.5", "--model.epsilon=0.03", "--red.denoiser.sigma=7"),
    ],
    "PnP + BP": [
        *("--config=methods/pnp", "--model.lr_scheduler=null"),
        *("--model.lam=1", "--model.mu=1", "--model.epsilon=0.01", "--red.denoiser.sigma=10"),
    ],
    "DIP + BP": [
        *("--config=methods/dip", "--model.fidelity=backprojection", "--model.epsilon=0.1"),
    ],
}


class Curve(Callback):
    """PSNR of the result every few steps; its own time does not count."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float]] = []  # steps, seconds, dB

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        self.seconds, self.since = 0.0, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, model: LightningModule, *batch: object) -> None:
        last = model.step == trainer.max_steps
        if model.step % EVERY and not last:
            return
        self.seconds += time.perf_counter() - self.since
        value = psnr(model.restored, model.problem.ground_truth, model.problem.metric_on)
        self.points.append((model.step, round(self.seconds, 2), round(float(value), 3)))
        self.since = time.perf_counter()


def fit(settings: Iterable[str], keep: bool = False) -> list[tuple[int, float, float]]:
    """The curve of one fit, made now or before; `keep` its image, as `image(settings)`."""
    settings = list(settings)
    RUNS.mkdir(parents=True, exist_ok=True)
    table = RUNS / "fits.jsonl"
    for line in table.read_text().splitlines() if table.exists() else []:
        known = json.loads(line)
        if known["settings"] == settings and (not keep or image(settings).exists()):
            return known["curve"]
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    cli = RestorationCLI([*settings, *quiet, f"--trainer.default_root_dir={RUNS}"], run=False)
    cli.datamodule.setup()
    cli.model.build(cli.datamodule.problem)
    needed = [
        c for c in cli.trainer.callbacks if isinstance(c, CollapseGuard | KeepMemory | REDUpdate)
    ]
    cli.trainer.callbacks = [*needed, curve := Curve()]
    cli.trainer.fit(cli.model, cli.datamodule)
    if keep:
        torch.save(cli.model.restored, image(settings))
    with table.open("a") as file:
        file.write(json.dumps({"settings": settings, "curve": curve.points}) + "\n")
    return curve.points


def image(settings: list[str]) -> Path:
    """Where the result of a fit is kept."""
    return RUNS / (hashlib.sha256("\n".join(settings).encode()).hexdigest()[:16] + ".pt")


def motion_kernel(length: float = 15.0, degrees: float = 30.0, size: int = 17) -> np.ndarray:
    """A line of `length` pixels, (size, size): a camera that moved evenly while exposing."""
    t = (np.arange(2000) + 0.5) / 2000 * length - length / 2
    rows = size // 2 - t * math.sin(math.radians(degrees))
    columns = size // 2 + t * math.cos(math.radians(degrees))
    kernel = np.zeros((size, size))
    for row, column in zip(rows, columns, strict=True):
        down, right = row - int(row), column - int(column)
        kernel[int(row), int(column)] += (1 - down) * (1 - right)
        kernel[int(row), int(column) + 1] += (1 - down) * right
        kernel[int(row) + 1, int(column)] += down * (1 - right)
        kernel[int(row) + 1, int(column) + 1] += down * right
    return kernel / kernel.sum()


def motion() -> list[str]:
    RUNS.mkdir(parents=True, exist_ok=True)
    path = RUNS / "motion.npy"
    if not path.exists():
        np.save(path, motion_kernel().astype(np.float32))
    return [
        *("--config=deblurring_uniform", *QUICK),
        "--data.operator=deepred_pl.operators.Blur.from_file",
        *(f"--data.operator.path={path}", "--data.operator.boundary=circular"),
    ]


def deblurring() -> None:
    """Five samples and three kernels at σ = √2: before, now, and rivals."""
    print(f"| kernel | image | {' | '.join(RIVALS)} |\n|---|---|{'---|' * len(RIVALS)}")
    rows = []
    for kernel, task in {"uniform": UNIFORM, "Gaussian": GAUSSIAN, "motion": motion()}.items():
        for sample in SAMPLES:
            ends = [
                fit([*task, *method, f"--data.ground_truth={sample}"])[-1][2]
                for method in RIVALS.values()
            ]
            rows.append(ends)
            print(
                f"| {kernel} | {sample[7:]} | " + " | ".join(f"{e:.2f}" for e in ends) + " |",
                flush=True,
            )
    print(
        "| mean | | "
        + " | ".join(f"{mean(column):.2f}" for column in zip(*rows, strict=True))
        + " |"
    )


def rule(grid: bool) -> None:
    """The automatic ε at four noise levels: end, own peak, and the best end of a grid."""
    print("| image | σ | end | own peak | best of the grid |\n|---|---|---|---|---|")
    for sample in SAMPLES:
        for sigma in SIGMAS:
            task = [*UNIFORM, f"--data.noise.sigma={sigma:.7f}", f"--data.ground_truth={sample}"]
            curve = fit(task)
            end, peak = curve[-1][2], max(point[2] for point in curve)
            print(f"| {sample[7:]} | {sigma:.2f} | {end:.2f} | {peak:.2f} |", end=" ", flush=True)
            if grid:
                epsilon = automatic(task)
                others = {
                    f"ε × {of_epsilon:g}, λ × {of_lam:g}, μ × {of_mu:g}": fit(
                        [
                            *(*task, f"--model.epsilon={of_epsilon * epsilon:.6g}"),
                            *(f"--model.lam={0.7 * of_lam:g}", f"--model.mu={0.7 * of_mu:g}"),
                        ]
                    )[-1][2]
                    for of_epsilon, of_lam, of_mu in GRID
                }
                best = max(others, key=lambda key: others[key])
                print(f"{others[best]:.2f} ({best}) |", flush=True)
            else:
                print()


# On astronaut and camera, ε × 3, ε / 3, and λ and μ × 2 were never best.
GRID = (1, 0.5, 0.5), (1, 1, 2)


def automatic(settings: list[str]) -> float:
    cli = RestorationCLI([*settings, "--trainer.logger=false"], run=False)
    cli.datamodule.setup()
    cli.model.build(cli.datamodule.problem)
    return float(cli.model.epsilon)


def curves(named: dict[str, list[str]], at: Iterable[int]) -> None:
    """PSNR of fits after some of their steps, and their seconds."""
    at = list(at)
    print(
        "| | "
        + " | ".join(map(str, at))
        + " | best | seconds |"
        + "\n|---"
        + "|---" * (len(at) + 2)
        + "|"
    )
    for name, settings in named.items():
        curve = fit(settings)
        points = {step: value for step, _, value in curve}
        shown = " | ".join(f"{points[step]:.2f}" if step in points else "" for step in at)
        best = max(point[2] for point in curve)
        print(f"| {name} | {shown} | {best:.2f} | {curve[-1][1]:.0f} |", flush=True)


def butterfly() -> None:
    """The published image, 256×256 in colour, uniform 9×9, σ = √2: three seeds and their mean."""
    task = ["--config=deblurring_uniform", "--data.operator.boundary=circular", *WHOLE]
    task += ["--data.ground_truth=set:ncsr/butterfly"]
    seeds = {f"seed {seed}": [*task, f"--model.seed={seed}"] for seed in range(3)}
    for settings in seeds.values():
        fit(settings, keep=True)
    curves({**seeds, "likelihood": [*task, *LIKELIHOOD]}, (200, 400, 800, 1200, 1600))
    cli = RestorationCLI([*task, "--trainer.logger=false"], run=False)
    cli.datamodule.setup()
    truth = cli.datamodule.problem.ground_truth
    together = torch.stack([torch.load(image(s)) for s in seeds.values()]).mean(0)
    print(f"mean image: {float(psnr(together, truth, 'luminance')):.2f} dB")


# For a whole image in a quarter of an hour.
WHOLE = [
    *("--model.network.width=64", "--trainer.max_steps=1600"),
    "--model.lr_scheduler.total_steps=1600",
]


def tomography() -> None:
    """60 angles, σ = 0.5: now and before."""
    for sample in SAMPLES[:2]:
        task = ["--config=tomography", *QUICK, f"--data.ground_truth={sample}"]
        before = [
            *("--model.fidelity=likelihood", "--model.weighting=fixed", "--red.denoiser.sigma=3"),
            *("--model.lam=0.002", "--model.mu=0.004", "--model.result=x-u"),
        ]
        print(sample[7:])
        curves(
            {"likelihood": [*task, *before], "back-projection": task},
            (100, 200, 300, 400, 500, 600),
        )


def poisson() -> None:
    """Photon counts behind a Gaussian blur of 1.6 pixels."""
    for peak in (30, 300):
        for sample in SAMPLES[:2]:
            task = [*GAUSSIAN, "--data.noise=PoissonNoise", f"--data.noise.peak={peak}"]
            task += ["--data.clip=false", f"--data.ground_truth={sample}"]
            print(f"peak {peak}, {sample[7:]}")
            fits = {"likelihood": [*task, *LIKELIHOOD]}
            fits["likelihood, λ by discrepancy"] = [
                *(*task, *LIKELIHOOD, "--model.lam=0.5", "--model.mu=0.5"),
                "--model.weighting=discrepancy",
            ]
            curves({**fits, "back-projection": task}, (100, 200, 300, 400, 500, 600))


def tiles() -> None:
    """Two crops of 256×384 pixels behind a Gaussian blur: whole, and in tiles of 128."""
    crops = {
        "coffee": skimage.data.coffee()[72:328, 100:484],
        "astronaut": skimage.data.astronaut()[:256, 64:448],
    }
    quiet = {"trainer.enable_progress_bar": False, "trainer.accelerator": "cpu"}
    blur, noise = Blur.gaussian(25, 1.6, "reflect"), GaussianNoise(math.sqrt(2))
    print(
        "| | | whole | tiles | differences across borders, tiles / whole |\n|---|---|---|---|---|"
    )
    for name, crop in crops.items():
        truth = torch.from_numpy(crop / 255).float().movedim(-1, 0)[None]
        y = noise.sample(blur(truth), torch.Generator().manual_seed(0)).clamp(0, 1)
        tiling, _ = InverseProblem(y, blur, noise).split(128)
        for term, overlay in {"back-projection": [], "likelihood": ["methods/likelihood"]}.items():
            configs = ["deblurring_gaussian", "methods/quick", *overlay]
            images = [restore(y, configs, quiet, tile=tile) for tile in (None, 128)]
            scores = [f"{float(psnr(image, truth, 'luminance')):.2f}" for image in images]
            whole, tiled = (across_borders(image[0], tiling) for image in images)
            print(f"| {name} | {term} | {' | '.join(scores)} | {tiled / whole:.3f} |", flush=True)


def across_borders(image: torch.Tensor, tiling: Tiling) -> float:
    """Mean difference of neighbours across the borders of what tiles contribute, to elsewhere."""
    on, off = [], []
    for axis, margin in zip((1, 2), tiling.margin, strict=True):
        differences = image.diff(dim=axis).abs().mean((0, 3 - axis))
        ends = [(r[axis - 1], r[axis - 1] + r[axis + 1]) for r in tiling.regions]
        borders = {start + margin - 1 for start, _ in ends if start > 0}
        borders |= {end - margin - 1 for _, end in ends if end < image.shape[axis]}
        for at, difference in enumerate(differences.tolist()):
            (on if at in borders else off).append(difference)
    return mean(on) / mean(off)


def main() -> None:
    parts = {f.__name__: f for f in (deblurring, rule, butterfly, tomography, poisson, tiles)}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=parts)
    parser.add_argument("--grid", action="store_true", help="of `rule`: two more fits of each")
    chosen = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    logging.getLogger(NAME).setLevel(logging.ERROR)
    if chosen.what == "rule":
        rule(chosen.grid)
    else:
        parts[chosen.what]()


if __name__ == "__main__":
    main()
